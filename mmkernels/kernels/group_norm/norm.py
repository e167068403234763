"""The parameters of a GroupNorm whose statistics are taken."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Rows = tuple[slice, slice, slice]  # of M, H and W


class Norm(NamedTuple):
    """mean, rstd (M, G), gamma and beta (C + C2), all at least float32."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor

    def of(self, rows: Rows) -> Norm:
        """The same for some of the samples."""
        return self._replace(mean=self.mean[rows[0]], rstd=self.rstd[rows[0]])
