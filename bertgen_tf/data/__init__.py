"""Files and data sets: texts, downloads, and outputs that are there whole or not at all."""
