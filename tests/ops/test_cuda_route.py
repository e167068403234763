"""Every op on the way that a CUDA tensor goes, every variant, forward and backward, on the UNet's four levels.

CPU tensors stand for CUDA tensors (stand_in_gpu.py): what Python does for one runs here as it is, choice of
variant, chunks, scratch, sums and dtypes, and only launches are carried out in another way. On every level a formula
written for the purpose (kernel_formulas.py) stands for each kernel, since interpreting one of 1280 channels takes
minutes; on the first level the kernels themselves run too, Triton's interpreted and CUDA C++ on the host. Channels and
heads are the real ones, frames and pixels are few, and what is not initialised is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import assert_within_budget, differentiate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import test_blend_projection
import test_context_attention
import test_geglu_feed_forward
import test_group_norm_projection
import test_group_norm_silu_conv
import test_spatial_attention
import test_temporal_attention_block
from kernel_formulas import call_formula, launch_formula
from stand_in_gpu import stand_in_gpu

from mmkernels import extension
from mmkernels.kernels import launch
from mmkernels.kernels.registry import FAMILIES
from mmkernels.kernels.temporal_attention import formula
from mmkernels.ops import blend, temporal_attention
from mmkernels.ops.blend_projection import blend_projection
from mmkernels.ops.context_attention import context_attention
from mmkernels.ops.geglu_feed_forward import Keep, geglu_feed_forward
from mmkernels.ops.group_norm_projection import group_norm_projection
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv
from mmkernels.ops.spatial_attention import spatial_attention
from mmkernels.ops.temporal_attention_block import temporal_attention_block

F = 3  # frames


@dataclass(frozen=True)
class Level:
    C: int
    num_heads: int
    H: int
    W: int


LEVELS = (Level(320, 5, 3, 2), Level(640, 10, 2, 2), Level(1280, 20, 2, 1), Level(1280, 20, 1, 2))


@dataclass(frozen=True, kw_only=True)
class Run:
    """fused(**inputs, **settings) and what it is held to; the settings that only `fused` takes are bound to it."""

    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    dy: Tensor
    settings: dict[str, Any] = field(default_factory=dict)


def _temporal_attention(level: Level, dtype: torch.dtype) -> Run:
    shape = (1, F, level.H * level.W, level.num_heads, 64)
    inputs = {name: torch.randn(shape).to(dtype) for name in ("q", "k", "v")}

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return formula.permuted(q, k, v, None)

    return Run(fused=temporal_attention.temporal_attention, plain=plain, inputs=inputs, dy=torch.randn(shape).to(dtype))


def _temporal_block(level: Level, dtype: torch.dtype, frames: int = F, pixels: int = 0) -> Run:
    module = test_temporal_attention_block
    case = module.Case(F=frames, P=pixels or level.H * level.W, C=level.C, num_heads=level.num_heads)
    inputs, dy = module.build(case)
    return Run(
        fused=partial(temporal_attention_block, chunk_pixels=4 - 3 * (pixels > 0)), plain=module.diffusers_block,
        inputs={name: value.to(dtype) for name, value in inputs.items()}, dy=dy.to(dtype),
        settings={"num_heads": level.num_heads},
    )  # fmt: skip


def _spatial_attention(level: Level, dtype: torch.dtype) -> Run:
    module = test_spatial_attention
    case = module.Case(R=F, P=level.H * level.W, C=level.C, num_heads=level.num_heads, dtype=dtype)
    inputs, dy = module.build(case)
    fused = partial(spatial_attention, chunk_frames=2)
    return Run(fused=fused, plain=module.diffusers_block, inputs=inputs, dy=dy, settings={"num_heads": level.num_heads})


def _context_attention(level: Level, dtype: torch.dtype) -> Run:
    module = test_context_attention
    inputs, settings, dy = module.build(
        module.Case(R=F, P=level.H * level.W, C=level.C, num_heads=level.num_heads, dtype=dtype, has_shares=True)
    )
    fused = partial(context_attention, chunk_tokens=5)
    return Run(fused=fused, plain=module.by_diffusers, inputs=inputs, dy=dy, settings=settings)


def _feed_forward(level: Level, dtype: torch.dtype, keep: Keep = "input") -> Run:
    module = test_geglu_feed_forward
    inputs, dy = module.build(module.Case(R=F, T=level.H * level.W, C=level.C, H=4 * level.C, dtype=dtype))
    fused = partial(geglu_feed_forward, chunk_tokens=8, keep=keep)
    return Run(fused=fused, plain=module.diffusers_feed_forward, inputs=inputs, dy=dy)


def _convolution(level: Level, dtype: torch.dtype, kind: str, frames_at_once: int = 2) -> Run:
    """kind: as an up block's first convolution, its second, one over frames, the UNet's last.

    Over frames fewer at once than F are columns of pixels.
    """
    module, C, G = test_group_norm_silu_conv, level.C, 32
    cases = {
        "two inputs": module.Case(M=F, H=level.H, W=level.W, C=C, C2=C, K=C, G=G, extras=("bias", "shift")),
        "residual": module.Case(M=F, H=level.H, W=level.W, C=C, K=C, G=G, extras=("bias", "residual")),
        "frames": module.Case(
            M=1, H=F, W=level.H * level.W, C=C, K=C, G=G, taps=(3, 1), extras=("bias", "shift", "residual")
        ),
        "head": module.Case(M=F, H=level.H, W=level.W, C=C, K=4, G=G, extras=("bias",)),
    }
    inputs, settings, dy = module.build(cases[kind], dtype)
    chunk_rows = frames_at_once * level.H * level.W
    fused = partial(group_norm_silu_conv, chunk_rows=chunk_rows)
    return Run(fused=fused, plain=module.plain, inputs=inputs, dy=dy, settings=settings)


def _projection(level: Level, dtype: torch.dtype, is_strided: bool = False) -> Run:
    """is_strided: x lies channels first."""
    module, P, C = test_group_norm_projection, level.H * level.W, level.C
    inputs, dy = module.build(module.Case(R=F, P=P, C=C, K=C, dtype=dtype, is_strided=is_strided))
    fused = partial(group_norm_projection, chunk_frames=2)
    return Run(fused=fused, plain=module.plain, inputs=inputs, dy=dy, settings={"num_groups": 32})


def _blend(level: Level, dtype: torch.dtype) -> Run:
    shape = (F, level.H * level.W, level.C)
    inputs = {name: torch.randn(shape).to(dtype) for name in ("spatial", "temporal")}
    inputs["alpha"] = torch.rand(F)
    return Run(fused=blend.blend, plain=blend.reference, inputs=inputs, dy=torch.randn(shape).to(dtype))


def _blend_projection(level: Level, dtype: torch.dtype, is_strided: bool = False) -> Run:
    """is_strided: the residual lies channels first."""
    module, P, C = test_blend_projection, level.H * level.W, level.C
    inputs, dy = module.build(module.Case(R=F, P=P, C=C, K=C, dtype=dtype, is_strided=is_strided))
    return Run(fused=partial(blend_projection, chunk_frames=2), plain=module.plain, inputs=inputs, dy=dy)


OPS: dict[str, Callable[[Level, torch.dtype], Run]] = {
    "temporal_attention": _temporal_attention,
    "temporal_attention_block": _temporal_block,
    "temporal_attention_block, 144 frames": partial(_temporal_block, frames=144, pixels=2),
    "spatial_attention": _spatial_attention,
    "context_attention": _context_attention,
    "geglu_feed_forward": _feed_forward,
    "geglu_feed_forward, kept": partial(_feed_forward, keep="up"),
    "group_norm_silu_conv, two inputs": partial(_convolution, kind="two inputs"),
    "group_norm_silu_conv, residual": partial(_convolution, kind="residual"),
    "group_norm_silu_conv, frames": partial(_convolution, kind="frames"),
    "group_norm_silu_conv, frames at once": partial(_convolution, kind="frames", frames_at_once=F),
    "group_norm_silu_conv, head": partial(_convolution, kind="head"),
    "group_norm_projection": _projection,
    "group_norm_projection, channels first": partial(_projection, is_strided=True),
    "blend": _blend,
    "blend_projection": _blend_projection,
    "blend_projection, channels first": partial(_blend_projection, is_strided=True),
}
CONVOLUTION, ATTENTION = ("chunked", "triton", "cuda"), ("triton", "cuda")
VARIANTS = {
    "temporal_attention": ATTENTION,
    "temporal_attention_block": ATTENTION,
    **{name: CONVOLUTION for name in OPS if name.startswith("group_norm_silu_conv")},
    "group_norm_silu_conv, frames at once": ("chunked",),  # the others do not walk over chunks
    "group_norm_silu_conv, head": ("chunked", "triton"),  # CUDA C++ copies eight channels at a time
}
BY_LIBRARY = ("spatial_attention", "temporal_attention_block, 144 frames")
VARIANTS |= dict.fromkeys(BY_LIBRARY, ("flash", "cudnn"))
VARIANTS["geglu_feed_forward"] = ("pass", "epilogue")
WAYS = [(op, variant) for op in OPS for variant in VARIANTS.get(op, ("only",))]


NORMS = {"norm_weight", "norm_bias", "gamma", "beta"}
# Where the interpreter or the fibers have too many products to go through on every run.
SLOW = [(f"group_norm_silu_conv, {kind}", variant) for kind in ("two inputs", "residual") for variant in ATTENTION]


def force(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an op has this variant, it takes it."""
    tuned = ("group_norm_silu_conv", "temporal_attention", "attention", "geglu")
    forced = [f"{op}={variant}" for op in tuned if variant in FAMILIES[op]]
    monkeypatch.setenv("MMKERNELS_VARIANT", ",".join(forced))


class Watch(TorchDispatchMode):
    """Keeps the calls of our operators, and refuses outputs that share storage with each other or with an input."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "mmkernels":
            self.calls.append((func, args))
            inputs, outputs = (
                [x.untyped_storage()._cdata for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (args, out)
            )
            assert len({*inputs, *outputs}) == len(set(inputs)) + len(outputs), f"{func} returns storage that is shared"
        return out


@functools.cache
def prepared(op: str, level: int, dtype: torch.dtype) -> tuple[Run, dict[str, Tensor], dict[str, Tensor]]:
    """An op's inputs, and output and gradients of plain torch in `dtype` and in float64.

    Norms keep their parameters in float32, as under autocast: sums for them are then returned without a cast.
    """
    run = OPS[op](LEVELS[level], dtype)
    plain = differentiate(run.plain, run.inputs, run.dy, **run.settings)
    fp64 = differentiate(run.plain, run.inputs, run.dy, torch.float64, **run.settings)
    for name in NORMS & set(run.inputs):
        run.inputs[name] = run.inputs[name].float()
    return run, plain, fp64


def check(op: str, level: int, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Hold one op to float64 on the way of a CUDA tensor; returns the calls of its operators."""
    run, plain, fp64 = prepared(op, level, dtype)
    with Watch() as watch:
        actual = differentiate(run.fused, run.inputs, run.dy, **run.settings)
    assert_within_budget(actual, plain, fp64)
    return watch.calls


# Many frames on the first level only: what follows the width is seen without them. Those between run the same code.
PLACES = [(*way, level) for level in range(len(LEVELS)) for way in WAYS if level == 0 or way[0] != BY_LIBRARY[1]]
PLACES = [pytest.param(*place, marks=pytest.mark.deep if place[2] in (1, 2) else ()) for place in PLACES]


@pytest.mark.parametrize(("op", "variant", "level"), PLACES)
def test_every_level(op: str, variant: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(variant, monkeypatch)
    tests = ("test_schema", "test_faketensor") if level < 2 else ("test_faketensor",)
    prepared(op, level, torch.float16)
    with stand_in_gpu(launch=launch_formula, call=call_formula) as attentions:
        calls = check(op, level, torch.float16)
        both = {f"{variant}_attention", f"{variant}_attention_backward"}
        assert set(attentions) == (both if op in BY_LIBRARY else set())
        assert len(calls) == 2, "one operator forward and one backward"
        for operator, arguments in calls:
            torch.library.opcheck(operator, arguments, test_utils=tests)
    if level == len(LEVELS) - 1 or (op, variant) == WAYS[-1]:
        prepared.cache_clear()


NORM_KERNELS = {
    "partial_statistics_kernel", "merge_statistics_kernel", "normalise_kernel",
    "partial_backward_kernel", "merge_backward_kernel", "input_gradient_kernel",
}  # fmt: skip
LAUNCHED = {
    "group_norm_projection": NORM_KERNELS | {"column_sums_kernel"},
    "group_norm_projection, channels first": {"column_sums_kernel"},
    "blend": {"mix_kernel", "mix_backward_kernel"},
    "blend_projection": {"mix_kernel", "mix_backward_kernel", "column_sums_kernel", "residual_kernel"},
    "blend_projection, channels first": {"mix_kernel", "mix_backward_kernel", "column_sums_kernel"},
}


@pytest.mark.parametrize("op", LAUNCHED)
def test_what_is_launched(op: str) -> None:
    names: set[str] = set()

    def launch(kernel: Any, *rest: Any) -> None:
        names.add(kernel.__name__)
        launch_formula(kernel, *rest)

    with stand_in_gpu(launch=launch):
        check(op, 0, torch.float16)
    assert names == LAUNCHED[op]


@pytest.mark.parametrize(
    ("op", "variant"), [pytest.param(*way, marks=pytest.mark.deep if way in SLOW else ()) for way in WAYS]
)
def test_the_kernels_themselves(op: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(variant, monkeypatch)
    prepared(op, 0, torch.float16)
    with stand_in_gpu():
        check(op, 0, torch.float16)


@pytest.mark.parametrize(
    ("op", "variant"),
    [
        *((op, "efficient") for op in BY_LIBRARY),
        *(way for way in WAYS if way[1] not in ("cuda", "flash", "cudnn", "epilogue")),
    ],
)
def test_float32(op: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast no gradient of a parameter is cast; flash attention and CUDA C++ take no float32."""
    force(variant, monkeypatch)
    prepared(op, 0, torch.float32)
    with stand_in_gpu(launch=launch_formula, call=call_formula):
        check(op, 0, torch.float32)


def test_what_a_gpu_is_handed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch runs with the tensors' device current; a native entry gets addresses, device and stream."""
    handed: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *positional, **constants: handed.append((grid, positional, constants))

    class Current:
        def __init__(self, device: torch.device) -> None:
            handed.append(device)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    device = torch.device("cuda", 1)
    x: Any = SimpleNamespace(device=device, data_ptr=lambda: 64)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda where: SimpleNamespace(cuda_stream=7 if where == device else 0)
    )
    monkeypatch.setattr(extension, "native", lambda: SimpleNamespace(entry_cuda=lambda *all: handed.append(all)))
    launch.launch(Kernel(), 4, [x, 3], {"C": 8})
    launch.launch(Kernel(), 0, [x, 3], {"C": 8})
    launch.call("entry", [None, x], "shape")
    assert handed == [device, ((4,), (x, 3), {"C": 8}), ([0, 64], "shape", 1, 7)]
