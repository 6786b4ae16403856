"""Decimal numbers that people write, and what is counted by them."""

from fractions import Fraction


def as_written(number: float) -> Fraction:
    """What the shortest decimal of a float says: a fifth for 0.2, not the float next to it.

    So 0.05 of 140 documents are 7, and 1.1 passes over 10 are 11; products of floats lie a little
    above, and would be rounded up to one more.
    """
    return Fraction(str(number))
