"""Files and data sets: texts, downloads, and outputs that exist whole or not at all."""
