"""What is not timed, against the reading: bench/results/nvidia-h200.json, replayed on a clock of our own.

The chunked way over frames has become another since, by cuDNN's conv3d: its times are added up of an H100's.
"""

from __future__ import annotations

import ast
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from torch import Tensor

from bench.result_file import read_rows
from mmkernels.kernels.call import Call
from mmkernels.kernels.convolution import triton as convolution
from mmkernels.kernels.convolution.inputs import Added
from mmkernels.kernels.geglu import triton as geglu_triton
from mmkernels.kernels.group_norm import triton as norm_kernels
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.kernels.launch import carried_out_by
from mmkernels.kernels.layer_norm import triton as layer_norm_triton
from mmkernels.kernels.registry import FAMILIES
from mmkernels.known_choices import KNOWN, worth_timing
from mmkernels.tuning import NUM_ROUNDS, Tuner

BF16 = torch.bfloat16

ROWS = read_rows(ROOT / "bench/results/nvidia-h200.json")
Work = tuple[str, str]  # op and key


def over_frames_ms(direction: str, C: int, pixels: int) -> float:
    """The chunked way over frames: products at conv3d's TFLOP/s on an H100, and passes at what activating reaches."""
    tensor_bytes, flops = 2 * C * 72 * pixels, 2 * 3 * C * C * 72 * pixels
    output, data, weights = {320: (590, 481, 306), 640: (705, 520, 474), 1280: (739, 729, 640)}[C]
    products = [output] if direction == "forward" else [data, weights]
    passes = 2 + 3 if direction == "forward" else 2 + 5
    return 1e3 * (sum(flops / (x * 1e12) for x in products) + passes * tensor_bytes / 1.94e12)


def reading() -> dict[Work, dict[str, float]]:
    """Milliseconds of each variant, by op and key."""
    found: dict[Work, dict[str, float]] = defaultdict(dict)
    for row in ROWS:
        kind, _, op = row["bench"].partition("/")
        if kind == "variants":
            found[op, row["shape"]["key"]][row["provider"]] = row["median"]
    for work, times in found.items():
        if kind_of(work) == "3x1x1":
            direction, _, _, pixels, C, *_ = ast.literal_eval(work[1])
            times["chunked"] = over_frames_ms(direction, C, pixels)
    return found


def kind_of(work: Work) -> str:
    """The kind of a key of that day."""
    if work[0] in ("attention", "temporal_attention"):
        return "64 a head"
    K, _, _, kw = ast.literal_eval(work[1])[6:10]
    return "3x1x1" if kw == 1 else "3x3" if K > 4 else "3x3 to few channels"


class Replay:
    """Variants that take the milliseconds that were read; total_ms: of all that ran."""

    def __init__(self) -> None:
        self.elapsed_ms = self.total_ms = 0.0

    def variant(self, ms: float) -> Callable[[], None]:
        def run() -> None:
            self.elapsed_ms += ms

        return run

    def clock(self, variant: Callable[[], None], repeats: int) -> float:
        self.elapsed_ms = 0.0
        for _ in range(repeats):
            variant()
        self.total_ms += self.elapsed_ms
        return self.elapsed_ms


def first_step(path: Path, capability: str) -> tuple[Replay, Tuner, dict[Work, str]]:
    """Every choice of the fused step, in a process of its own."""
    replay = Replay()
    tuner = Tuner(path, {"device": "replayed", "capability": capability}, replay.clock)
    chosen = {
        work: tuner.fastest(
            work[0], (work[1],), {x: replay.variant(times[x]) for x in offered(work, capability)}, kind_of(work)
        )
        for work, times in reading().items()
    }
    return replay, tuner, chosen


def offered(work: Work, capability: str) -> list[str]:
    """Who takes the call of a key, of those that were read."""
    names, op = list(reading()[work]), work[0]
    if op != "group_norm_silu_conv":
        return names
    direction, *shape, _ = ast.literal_eval(work[1])
    major, minor = map(int, capability.split("."))
    call = Call(
        op=op, device="cuda", is_modelled=True, capability=(major, minor), dtype=BF16, shape=tuple(shape),
        is_deterministic=False, work=kind_of(work), direction=direction,
    )  # fmt: skip
    return [name for name in names if FAMILIES[op][name].loaded.why_unsupported(call) is None]


# Besides, products over pixels of kernels that have no wgmma are not offered on a Hopper.
LEFT_OUT = [(known.op, known.kind, known.best, known.slower) for known in KNOWN]
LEFT_OUT.append(("group_norm_silu_conv", "3x3", "chunked", ("cuda", "triton")))


@pytest.mark.parametrize(("op", "kind", "best", "slower"), LEFT_OUT, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_left_out_was_slower_over_the_step(op: str, kind: str, best: str, slower: tuple[str, ...]) -> None:
    """By the sum over the kind's shapes, forward and backward, of those that were read with the best."""
    works = [work for work, times in reading().items() if (work[0], kind_of(work)) == (op, kind) and best in times]
    of_kind = [reading()[work] for work in works]
    assert of_kind
    for name in slower:
        both = [times for times in of_kind if name in times]
        assert both and sum(times[best] for times in both) < sum(times[name] for times in both)
        assert all(name not in worth_timing(op, kind, "9.0", offered(work, "9.0")) for work in works)


def test_the_first_step_of_a_hopper_times_nothing(tmp_path: Path) -> None:
    replay, tuner, chosen = first_step(tmp_path / "x.json", "9.0")
    assert (replay.total_ms, tuner.num_timed) == (0.0, 0)  # 52 shapes and 13.1 s on that day, compiling not counted
    assert {chosen[work] for work in chosen if kind_of(work) == "3x1x1"} == {"chunked"}


def test_what_one_process_timed_the_next_one_knows(tmp_path: Path) -> None:
    replay, tuner, chosen = first_step(tmp_path / "x.json", "8.0")
    assert replay.total_ms > 0 < tuner.num_timed
    again, tuner, second = first_step(tmp_path / "x.json", "8.0")
    assert (again.total_ms, tuner.num_timed, second) == (0.0, 0, chosen)


def test_no_choice_costs_much_over_the_fastest(tmp_path: Path) -> None:
    """Summed over the shapes, each once: what is lost to not timing."""
    _, _, chosen = first_step(tmp_path / "x.json", "9.0")
    fastest_ms = sum(min(times.values()) for times in reading().values())
    chosen_ms = sum(times[chosen[work]] for work, times in reading().items())
    assert fastest_ms <= chosen_ms < 1.01 * fastest_ms


def compiled_in_the_first_step() -> Counter[str]:
    """Kernels that Triton compiles for the fused step where what KNOWN decides is taken: by name, how often.

    It is compiled again for other constants and dtypes, and where another number is 1 or a multiple of 16.
    """
    seen: set[Any] = set()

    def fact(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dtype
        return (x == 1, x % 16 == 0) if isinstance(x, int) else type(x)

    def note(kernel: Any, _: int, positional: list[Any], constants: dict[str, Any]) -> None:
        seen.add((kernel.__name__, tuple(map(fact, positional)), repr(sorted(constants.items(), key=str))))

    with carried_out_by(launch=note):
        for (op, key), kind in ((work, kind_of(work)) for work in reading()):
            if op == "group_norm_silu_conv":
                arguments: list[Any] = [*ast.literal_eval(key)[:7], kind]
                convolve(*arguments)
        for C, shift, dtype in itertools.product((320, 640, 1280), (None, meta(2, 1280)), (BF16, torch.float32)):
            normalise(C, None if shift is None else shift[:, :C], dtype)
    return Counter(name for name, *_ in seen)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def convolve(direction: str, M: int, H: int, W: int, C: int, C2: int, K: int, kind: str) -> None:
    """What the Triton kernels do of a convolution that is chunked, CUDA C++'s, or Triton's for few channels."""
    samples = M  # within the bound on scratch, on most levels
    x, a, dy = meta(M, H, W, C, dtype=BF16), meta(samples, H, W, C + C2, dtype=BF16), meta(M, H, W, K, dtype=BF16)
    x2 = meta(M, H, W, C2, dtype=BF16) if C2 else None
    part, part2 = x[:samples], None if x2 is None else x2[:samples]
    norm = Norm(meta(M, 32), meta(M, 32), meta(C + C2), meta(C + C2))
    if direction == "forward":
        norm_kernels.statistics(x, x2, 32, 1e-5)
        if kind == "3x3 to few channels":
            added = Added(meta(K, dtype=BF16), None, None)
            convolution.convolve(x, x2, norm, meta(9, C, K, dtype=BF16), added, dy)
        else:
            norm_kernels.normalise(part, part2, norm, a, has_silu=True)
        return
    if kind == "3x3 to few channels":
        convolution.data_gradient(dy, meta(9, C, K, dtype=BF16), x)
        convolution.weight_gradient(x, x2, norm, dy, 9)
    norm_kernels.backward(part, part2, a, norm, part, part2, has_silu=True)


def normalise(C: int, shift: Tensor | None, dtype: torch.dtype) -> None:
    """LayerNorm, its backward, the residual, and GEGLU with its backward, at one level."""
    x, inner, vector, each = meta(2, 9216, C, dtype=dtype), meta(18432, C, dtype=BF16), meta(C), meta(18432)
    layer_norm_triton.forward(x, shift, vector, vector, 1e-5, inner, each, each)
    layer_norm_triton.backward(inner, x, shift, vector, each, each, x, x)
    layer_norm_triton.add_residual(x, shift, inner, vector, x)
    u, g = meta(18432, 8 * C, dtype=BF16), meta(18432, 4 * C, dtype=BF16)
    geglu_triton.forward(u, meta(8 * C), g)
    geglu_triton.backward(u, meta(8 * C), g, u, g)


def test_the_first_step_of_an_h200_compiles_seventy_kernels_of_the_small_kind() -> None:
    """0.24 s each on one core, by Triton 3.8 for sm_90: 17 s in all, and 0.5 s where they are remembered."""
    found = compiled_in_the_first_step()
    assert found["convolve_kernel"] + found["weight_gradient_kernel"] == 3, "a second each: the head's alone"
    assert found.total() <= 70


def test_elsewhere_everything_is_timed_and_what_is_far_slower_is_given_up(tmp_path: Path) -> None:
    replay, tuner, chosen = first_step(tmp_path / "x.json", "8.0")
    assert tuner.num_timed == len(reading()) == 55
    assert chosen == {work: min(times, key=times.__getitem__) for work, times in reading().items()}
    everything_ms = (2 + NUM_ROUNDS) * sum(sum(times.values()) for times in reading().values())
    assert replay.total_ms < 0.65 * everything_ms


def test_left_out_only_where_the_better_one_is_offered_and_the_family_was_read() -> None:
    def left(capability: str, *names: str, kind: str = "3x1x1") -> list[str]:
        return worth_timing("group_norm_silu_conv", kind, capability, names)

    assert left("9.0", "chunked", "triton", "cuda") == ["chunked"]
    assert left("9.0", "triton", "cuda") == ["triton", "cuda"], "the best is not offered"
    assert left("10.0", "chunked", "triton", "cuda") == ["chunked", "triton", "cuda"]
    assert left("9.0", "chunked", "triton", "cuda", kind="") == ["chunked", "triton", "cuda"], "float32 was not read"
