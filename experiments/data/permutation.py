"""Pseudo-random orders of any length that take no memory."""

import numpy as np

_ROUNDS = 4
_64_BITS = (1 << 64) - 1
# 2^64 divided by the golden ratio: its multiples are spread evenly (Knuth, vol. 3, 6.4).
_GOLDEN = 0x9E3779B97F4A7C15


class Permutation:
    """A pseudo-random order of the numbers 0 to count - 1.

    It is a Feistel network, applied again until the result is below `count`, so any place is
    computed at once and nothing is stored.
    """

    def __init__(self, count: int, *seed: int) -> None:
        """Chooses the order.

        Args:
          count: at least 1.
          seed: numbers of at least 0; each combination has an order of its own.
        """
        self._count = count
        self._bits = max(1, ((count - 1).bit_length() + 1) // 2)
        keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)
        self._keys = [int(key) for key in keys]

    def __call__(self, place: int) -> int:
        """The number at a place of the order."""
        bits, mask = self._bits, (1 << self._bits) - 1
        value = place
        while True:
            left, right = value >> bits, value & mask
            for key in self._keys:
                left, right = right, left ^ (mixed(right + key) & mask)
            value = left << bits | right
            if value < self._count:
                return value


def mixed(value: int) -> int:
    """64 bits that depend on all bits of a number (the finalizer of SplitMix64)."""
    value = (value + _GOLDEN) & _64_BITS
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


def spread(number: int, seed: int) -> float:
    """A number in [0, 1); those of consecutive numbers are spread evenly over it."""
    return ((number * _GOLDEN + mixed(seed)) & _64_BITS) / 2**64
