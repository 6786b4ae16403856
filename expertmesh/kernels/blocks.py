"""Sizes of blocks and grids. Triton's own helpers of this kind take microseconds on the host."""


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of two that is not below a size of at least 1."""
    return 1 << (size - 1).bit_length()
