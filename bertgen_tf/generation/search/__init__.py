"""Search for hypotheses, step by step: knows no model and no text, only scores and ids."""
