"""The server of `bertgen-tf serve`: HTTP around what runs the exports."""
