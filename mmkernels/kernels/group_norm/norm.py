"""The parameters of a GroupNorm whose statistics are taken, and a part of pictures."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Rows = tuple[slice, slice, slice]  # of M, H and W


def at(x: Tensor, rows: Rows) -> Tensor:
    """Those rows of x (M, H, W, ...)."""
    return x[rows[0], rows[1], rows[2]]


class Norm(NamedTuple):
    """mean, rstd (M, G), gamma and beta (C + C2), all at least float32."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor

    @classmethod
    def of_parameters(cls, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Norm:
        """With gamma and beta as the kernels read them, of parameters of any dtype and stride."""
        return cls(mean, rstd, weight.to(mean.dtype).contiguous(), bias.to(mean.dtype).contiguous())

    def of(self, rows: Rows) -> Norm:
        """The same for some of the samples."""
        return self._replace(mean=self.mean[rows[0]], rstd=self.rstd[rows[0]])
