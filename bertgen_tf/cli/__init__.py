"""The command `bertgen-tf`."""
