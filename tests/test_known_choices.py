"""What is not timed, against the one reading: bench/results/nvidia-h200.json, replayed on a clock of our own."""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from mmkernels.known_choices import KNOWN, worth_timing
from mmkernels.tuning import NUM_ROUNDS, Tuner

ROWS = json.loads((Path(__file__).parent.parent / "bench/results/nvidia-h200.json").read_text())
Work = tuple[str, str]  # op and key


def reading() -> dict[Work, dict[str, float]]:
    """Milliseconds of each variant, by op and key."""
    found: dict[Work, dict[str, float]] = defaultdict(dict)
    for row in ROWS:
        kind, _, op = row["bench"].partition("/")
        if kind == "variants":
            found[op, row["shape"]["key"]][row["provider"]] = row["median"]
    return found


def kind_of(work: Work) -> str:
    """The kind of a key of that day."""
    if work[0] == "temporal_attention":
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
        (op, key): tuner.fastest(op, (key,), {x: replay.variant(ms) for x, ms in times.items()}, kind_of((op, key)))
        for (op, key), times in reading().items()
    }
    return replay, tuner, chosen


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known.op} {known.kind}")
def test_what_is_left_out_was_slower_over_the_step(known) -> None:
    """By the sum over the kind's shapes, forward and backward, of those that were read with the best."""
    of_kind = [
        times
        for (op, key), times in reading().items()
        if (op, kind_of((op, key))) == (known.op, known.kind) and known.best in times
    ]
    assert of_kind
    for name in known.slower:
        both = [times for times in of_kind if name in times]
        assert both and sum(times[known.best] for times in both) < sum(times[name] for times in both)


def test_the_first_step_of_an_h200_times_eight_shapes_and_the_second_process_none(tmp_path: Path) -> None:
    replay, tuner, chosen = first_step(tmp_path / "x.json", "9.0")
    assert tuner.num_timed == 8, "over frames alone: four levels, forward and backward"
    assert {len(choice.times_ms) for choice in tuner.choices.values()} == {2}
    assert replay.total_ms < 500  # modelled, on whole outputs; 52 shapes and 13.1 s on that day, compiling not counted
    again, tuner, second = first_step(tmp_path / "x.json", "9.0")
    assert (again.total_ms, tuner.num_timed, second) == (0.0, 0, chosen)


def test_no_choice_costs_much_over_the_fastest(tmp_path: Path) -> None:
    """Summed over the shapes, each once: what is lost to not timing."""
    _, _, chosen = first_step(tmp_path / "x.json", "9.0")
    fastest_ms = sum(min(times.values()) for times in reading().values())
    chosen_ms = sum(times[chosen[work]] for work, times in reading().items())
    assert fastest_ms <= chosen_ms < 1.01 * fastest_ms


def test_elsewhere_everything_is_timed_and_what_is_far_slower_is_given_up(tmp_path: Path) -> None:
    replay, tuner, chosen = first_step(tmp_path / "x.json", "8.0")
    assert tuner.num_timed == len(reading()) == 52
    assert chosen == {work: min(times, key=times.__getitem__) for work, times in reading().items()}
    everything_ms = (2 + NUM_ROUNDS) * sum(sum(times.values()) for times in reading().values())
    assert replay.total_ms < 0.65 * everything_ms


def test_left_out_only_where_the_better_one_is_offered_and_the_family_was_read() -> None:
    def left(capability: str, *names: str, kind: str = "3x1x1") -> list[str]:
        return worth_timing("group_norm_silu_conv", kind, capability, names)

    assert left("9.0", "chunked", "triton", "cuda") == ["chunked", "cuda"]
    assert left("9.0", "chunked", "triton") == ["chunked", "triton"], "no CUDA kernels are built"
    assert left("10.0", "chunked", "triton", "cuda") == ["chunked", "triton", "cuda"]
    assert [left(x, "chunked", "triton", "cuda", kind="3x3") for x in ("9.0", "10.0", "11.0")] == [["chunked"]] * 3
    for capability in ("8.0", "8.9", "12.0"):
        assert left(capability, "chunked", "triton", "cuda", kind="3x3") == ["chunked", "triton", "cuda"]
    assert left("9.0", "chunked", "triton", "cuda", kind="") == ["chunked", "triton", "cuda"], "float32 was not read"
