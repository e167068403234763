"""What a convolution behind GroupNorm and SiLU is taken of, and what is added to it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkernels.kernels.group_norm.norm import Norm, Rows, at


class Inputs(NamedTuple):
    """x (M, H, W, C), x2 (M, H, W, C2) or None, their norm, weight (K, C + C2, 3, 3) or (K, C + C2, 3, 1)."""

    x: Tensor
    x2: Tensor | None
    norm: Norm
    weight: Tensor

    def of(self, rows: Rows) -> Inputs:
        """The same for some of the pixels."""
        x2 = None if self.x2 is None else at(self.x2, rows)
        return self._replace(x=at(self.x, rows), x2=x2, norm=self.norm.of(rows))


class Wants(NamedTuple):
    """Which gradients are: those of the data and of the norm, and that of the weight."""

    data: bool = True
    weight: bool = True


class Added(NamedTuple):
    """bias (K), shift (M, H or 1, K), residual (M, H, W, K), or None each."""

    bias: Tensor | None
    shift: Tensor | None
    residual: Tensor | None

    def of(self, rows: Rows) -> Added:
        """The same for some of the pixels, with all of H."""
        shift = None if self.shift is None else self.shift[rows[0]]
        return self._replace(shift=shift, residual=None if self.residual is None else at(self.residual, rows))
