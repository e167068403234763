"""Launch the Triton kernels of group_norm_silu_conv on CPU tensors, for a tool that stands in for the GPU.

`python group_norm_silu_conv_program.py --dtypes float16` under TRITON_INTERPRET=1 is Triton's interpreter (never
bfloat16: it reads that as raw bits). `python -m ttsem.sanitize` of this file runs the compiler's IR and reports
accesses out of bounds and races. Fails where a result is past the budget.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from programs import dtypes_asked, launch_directly
from torch import Tensor

from mmkernels.kernels.convolution import triton as convolution
from mmkernels.kernels.convolution.inputs import Added
from mmkernels.kernels.group_norm import triton as norm_kernels
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.kernels.launch import carried_out_by

# (M, H, W, C, C2, G): C/G = 10, 30 and 20, a group across two inputs, several splits of rows, one pixel.
NORMS = ((2, 5, 7, 40, 0, 4), (1, 3, 150, 50, 40, 3), (2, 3, 4, 80, 20, 5), (1, 1, 1, 16, 0, 1))
# (M, H, W, C, C2, K, G, KW): more columns than a tile's, rows and channels that fill none, two inputs, one pixel, the
# four channels that a UNet gives.
CONVOLUTIONS = ((1, 6, 17, 40, 0, 24, 4, 3), (2, 3, 5, 20, 28, 16, 3, 3), (1, 6, 20, 40, 8, 72, 3, 1),
                (1, 1, 1, 16, 0, 16, 1, 3), (2, 6, 17, 40, 0, 4, 4, 3))  # fmt: skip


def check_norm(
    shape: tuple[int, ...], dtype: torch.dtype, launch: Any, *, has_silu: bool = True
) -> dict[str, Tensor]:  # fmt: skip
    """Statistics, application and backward of one shape, x far from zero and outputs poisoned with NaN."""
    M, H, W, C, C2, G = shape
    torch.manual_seed(0)
    joined = (torch.randn(M, H, W + 2, C + C2) + 30 * torch.rand(C + C2)).to(dtype)
    # Without silu its rows do not follow each other.
    joined = joined[:, :, 1:-1].contiguous() if has_silu else joined[:, :, 1:-1]
    da, gamma, beta = torch.randn(joined.shape).to(dtype), torch.randn(C + C2).to(dtype), torch.randn(C + C2).to(dtype)
    x, x2 = joined[..., :C], joined[..., C:] if C2 else None
    kernels = norm_kernels
    out, djoined = torch.full_like(joined, float("nan")), torch.full_like(joined, float("nan"))
    dx, dx2 = djoined[..., :C], djoined[..., C:] if C2 else None
    with carried_out_by(launch=launch):
        mean, rstd = kernels.statistics(x, x2, G, 1e-5)
        norm = Norm(mean, rstd, gamma, beta)
        kernels.normalise(x, x2, norm, out, has_silu=has_silu)
        dgamma, dbeta = kernels.backward(x, x2, da, norm, dx, dx2, has_silu=has_silu)
    names = ("mean", "rstd", "a", "dx", "dgamma", "dbeta")
    actual: dict[str, Tensor] = dict(zip(names, (mean, rstd, out, djoined, dgamma, dbeta), strict=True))
    fp64, plain = ({**_moments(joined.to(narrow), G), **_gradients(joined.to(wide), da, gamma, beta, G, has_silu)}
                   for wide, narrow in ((torch.float64, torch.float64), (dtype, torch.float32)))  # fmt: skip
    assert_within_budget(actual, plain, fp64)
    return actual


def check_convolution(
    shape: tuple[int, ...], dtype: torch.dtype, launch: Any, *, is_plain: bool = False
) -> dict[str, Tensor]:  # fmt: skip
    """Forward, data gradient and weight gradient of one shape, outputs poisoned with NaN; plain: nothing is added."""
    M, H, W, C, C2, K, G, KW = shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    joined, gamma, beta, dy = random(M, H, W, C + C2) + 1, random(C + C2), random(C + C2), random(M, H, W, K)
    weight, bias, residual = random(K, C + C2, 3, KW) / 8, random(K), random(M, H, W, K)
    shift = random(M, H if KW == 1 else 1, K)
    x, x2 = joined[..., :C], joined[..., C:] if C2 else None
    moments = _moments(joined.double(), G)
    mean, rstd = moments["mean"].float(), moments["rstd"].float()
    weight_tck = weight.permute(2, 3, 1, 0).reshape(3 * KW, C + C2, K).contiguous()
    y, da = torch.full_like(dy, float("nan")), torch.full_like(joined, float("nan"))
    kernels = convolution
    norm = Norm(mean, rstd, gamma, beta)
    added = Added(None, None, None) if is_plain else Added(bias, shift, residual)
    with carried_out_by(launch=launch):
        kernels.convolve(x, x2, norm, weight_tck, added, y)
        kernels.data_gradient(dy, weight_tck, da)
        dweight = kernels.weight_gradient(x, x2, norm, dy, 3 * KW)

    def by_torch(wide: torch.dtype) -> dict[str, Tensor]:
        normal = F.group_norm(joined.to(wide).permute(0, 3, 1, 2), G, gamma.to(wide), beta.to(wide), 1e-5)
        a, w = F.silu(normal).requires_grad_(), weight.to(wide).requires_grad_()
        y = F.conv2d(a, w, None if is_plain else bias.to(wide), padding=(1, KW // 2)).permute(0, 2, 3, 1)
        if not is_plain:
            y = y + shift.to(wide)[:, :, None] + residual.to(wide)
        da, dw = torch.autograd.grad(y, (a, w), dy.to(wide))
        return {"y": y.detach(), "da": da.permute(0, 2, 3, 1), "dweight": dw.permute(2, 3, 1, 0).reshape(3 * KW, -1, K)}

    actual = {"y": y, "da": da, "dweight": dweight}
    assert_within_budget(actual, by_torch(dtype), by_torch(torch.float64))
    return actual


def check_far_from_zero(launch: Any) -> None:
    """Mean 1e4 and deviation 1 in float32, with a first row of zeros and without: the statistics of float64."""
    torch.manual_seed(0)
    whole = 1e4 + torch.randn(1, 30, 50, 40)
    whole[:, 0] = 0
    for x in (whole, whole[:, 1:]):
        with carried_out_by(launch=launch):
            mean, rstd = norm_kernels.statistics(x, None, 4, 1e-5)
        exact = _moments(x.double().contiguous(), 4)
        torch.testing.assert_close(mean.double(), exact["mean"], rtol=2e-7, atol=0)
        torch.testing.assert_close(rstd.double(), exact["rstd"], rtol=4e-7, atol=0)


def _moments(x: Tensor, G: int) -> dict[str, Tensor]:
    """mean and rstd of every group, in x's dtype: statistics are float32 whatever the activations are."""
    M, H, W, C = x.shape
    variance, mean = torch.var_mean(x.reshape(M, H * W, G, C // G), (1, 3), correction=0)
    return {"mean": mean, "rstd": (variance + 1e-5).rsqrt()}


def _gradients(
    x: Tensor, da: Tensor, gamma: Tensor, beta: Tensor, G: int, has_silu: bool
) -> dict[str, Tensor]:  # fmt: skip
    x, gamma, beta = (tensor.to(x.dtype).detach().requires_grad_() for tensor in (x, gamma, beta))
    z = F.group_norm(x.permute(0, 3, 1, 2), G, gamma, beta, 1e-5).permute(0, 2, 3, 1)
    a = F.silu(z) if has_silu else z
    gradients = torch.autograd.grad(a, (x, gamma, beta), da.to(x.dtype))
    return dict(zip(("a", "dx", "dgamma", "dbeta"), (a.detach(), *gradients), strict=True))


def main() -> None:
    """Run every shape in the dtypes named on the command line."""
    for name in dtypes_asked(main.__doc__):
        for check, shapes in ((check_norm, NORMS), (check_convolution, CONVOLUTIONS)):
            for shape in shapes:
                check(shape, getattr(torch, name), launch_directly)
                print(f"ok {shape} {name}")
        for shape in NORMS[:2]:
            check_norm(shape, getattr(torch, name), launch_directly, has_silu=False)
            print(f"ok {shape} {name}, no silu")
        if name == "float32":
            check_far_from_zero(launch_directly)
            print("ok far from zero")


if __name__ == "__main__":
    main()
