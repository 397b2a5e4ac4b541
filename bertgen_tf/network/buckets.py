"""Lengths that batches are padded to: each shape compiles a function once, so there are few."""


def bucket_lengths(longest: int, first: int = 16) -> list[int]:
    """The powers of two from `first` on that are below `longest`, and `longest`."""
    powers = [2**i for i in range(first.bit_length() - 1, 16)]
    return [power for power in powers if power < longest] + [longest]
