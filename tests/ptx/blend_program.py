"""Launch the Triton kernels of the blend of two streams and of sums over rows on CPU tensors, for a stand-in of a GPU.

`python blend_program.py --dtypes float16` under TRITON_INTERPRET=1 is Triton's interpreter (never bfloat16: it
reads that as raw bits). `python -m ttsem.sanitize blend_program.py -- --dtypes bfloat16` with tests/ in
PYTHONPATH runs the compiler's IR and reports accesses out of bounds and races. Fails where a result is past the budget.
"""

from __future__ import annotations

import torch
from numerics import assert_within_budget
from programs import dtypes_asked, launch_directly
from torch import Tensor

from mmkernels.kernels.blend import triton as kernels
from mmkernels.kernels.column_sums import triton as column_sums_triton
from mmkernels.kernels.launch import CarryOut, Launch, carried_out_by

# (R, P, C): one element, several programs a frame of which the last is not full, one that is not.
BLENDS = ((1, 1, 1), (3, 67, 40), (2, 9, 48))
# (N, K): one row, more splits than one and columns than a tile, odd.
ROWS = ((1, 8), (301, 72), (130, 33))


def check_blend(shape: tuple[int, int, int], dtype: torch.dtype, launch: CarryOut) -> dict[str, Tensor]:
    """Mix and its gradient of one shape, s and ds in every other frame, ds in the place of dm, the rest poisoned."""
    torch.manual_seed(0)
    s, wide_s = (torch.randn(2, *shape).to(dtype).transpose(0, 1).flatten(0, 1)[::2] for _ in range(2))
    t, dm, alpha = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape[0])
    ds, m, dt, dalpha = wide_s.copy_(dm), torch.full_like(t, torch.nan), torch.full_like(t, torch.nan), alpha.clone()
    with carried_out_by(launch=launch):
        kernels.mix_into(s, t, alpha, m)
        kernels.backward_into(ds, s, t, alpha, ds, dt, dalpha)

    def by_torch(wide: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.to(wide).detach().requires_grad_() for x in (s, t, alpha)]
        mixed = torch.lerp(leaves[1], leaves[0], leaves[2][:, None, None])
        gradients = torch.autograd.grad(mixed, leaves, dm.to(wide))
        return dict(zip(("m", "ds", "dt", "dalpha"), (mixed.detach(), *gradients), strict=True))

    actual = {"m": m, "ds": ds, "dt": dt, "dalpha": dalpha}
    assert_within_budget(actual, by_torch(dtype), by_torch(torch.float64))
    return actual


def check_column_sums(shape: tuple[int, int], dtype: torch.dtype, launch: CarryOut) -> dict[str, Tensor]:
    """Sums over the rows of one shape, which lie in wider rows."""
    torch.manual_seed(0)
    rows = torch.randn(shape[0], shape[1] + 16).to(dtype)[:, : shape[1]]
    with carried_out_by(launch=launch):
        actual = {"total": column_sums_triton.sums(rows[None])[0]}
    assert_within_budget(actual, {"total": rows.float().sum(0)}, {"total": rows.double().sum(0)})
    return actual


def level_0_launches(dtype: torch.dtype) -> dict[tuple[str, str], Launch]:
    """Every kernel's launch at level 0 of the UNet, by (kernel, entry), on tensors that hold nothing."""
    made: list[Launch] = []
    streams, alpha = torch.empty(5, 2, 33, 320, dtype=dtype), torch.empty(2)
    with carried_out_by(launch=lambda *launch: made.append(Launch(*launch))):
        s, t, m, ds, dt = streams
        kernels.mix_into(s, t, alpha, m)
        kernels.backward_into(s, t, m, alpha, ds, dt, alpha)
        column_sums_triton.sums(streams[0, 0][None])
    ops = ("blend", "blend", "column_sums")
    return {(op, launch.kernel.__name__): launch for op, launch in zip(ops, made, strict=True)}


def main() -> None:
    """Run every shape in the dtypes named on the command line."""
    for name in dtypes_asked(main.__doc__):
        for shape in BLENDS:
            check_blend(shape, getattr(torch, name), launch_directly)
            print(f"ok {shape} {name}")
        for shape in ROWS:
            check_column_sums(shape, getattr(torch, name), launch_directly)
            print(f"ok {shape} {name}")


if __name__ == "__main__":
    main()
