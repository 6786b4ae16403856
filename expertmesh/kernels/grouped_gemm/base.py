"""What a grouped matrix product must do. I and O are the inner and outer widths of a product."""

from abc import ABC, abstractmethod

from torch import Tensor


class GroupedGemm(ABC):
    """Products of row groups. Group e holds the rows from ``offsets_E[e - 1]`` to ``offsets_E[e]``.

    Rows past the last offset belong to no group. Implementations have no state.
    """

    @abstractmethod
    def matmul(self, x_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
        """Multiply each row with its group's matrix.

        Args:
            x_NI: Rows, ``(N, I)``.
            weight_EIO: One matrix for each group, ``(E, I, O)``, any strides.
            offsets_E: Ends of the groups, int32.

        Returns:
            ``(N, O)``. Rows that belong to no group may hold anything.
        """

    @abstractmethod
    def outer(self, a_NI: Tensor, b_NO: Tensor, offsets_E: Tensor) -> Tensor:
        """Sum the outer products of the rows of each group.

        Args:
            a_NI: Rows, ``(N, I)``.
            b_NO: Rows, ``(N, O)``.
            offsets_E: Ends of the groups, int32.

        Returns:
            ``(E, I, O)``; zero for an empty group, whatever the rows of no group hold.
        """
