"""Choosing among kernel variants: by a clock of our own, so that every time and every failure is known beforehand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from mmkernels import __main__ as overview
from mmkernels import tuning
from mmkernels.tuning import Choice, Tuner

MACHINE = {"device": "Imagined 1000", "capability": "9.0", "torch": "2.13.0"}
CUDA = torch.device("cuda")


class Machine:
    """Variants that take the milliseconds given for them, one value a call and the last one on and on."""

    def __init__(self, **costs_ms: float | list[float] | Exception) -> None:
        self.costs_ms, self.calls, self._elapsed_ms = costs_ms, [], 0.0

    def variants(self) -> dict[str, Callable[[], None]]:
        return {name: lambda name=name: self._run(name) for name in self.costs_ms}

    def _run(self, name: str) -> None:
        cost = self.costs_ms[name]
        if isinstance(cost, Exception):
            raise cost
        count = self.calls.count(name)
        self.calls.append(name)
        self._elapsed_ms += cost[min(count, len(cost) - 1)] if isinstance(cost, list) else cost

    def clock(self, variant: Callable[[], None], repeats: int) -> float:
        self._elapsed_ms = 0.0
        for _ in range(repeats):
            variant()
        return self._elapsed_ms


def choose(path: Path, machine: Machine, key: tuple = (72, "bfloat16")) -> str:
    return Tuner(path, MACHINE, machine.clock).fastest("op", key, machine.variants())


def test_the_fastest_by_median_after_warm_up(tmp_path: Path) -> None:
    # The first call of b compiles for a second; one later call of a was lucky, one of b unlucky.
    machine = Machine(a=[2.0, 2.0, 2.0, 0.1, 2.0], b=[1000.0, 1.5, 1.5, 90.0, 1.5])
    tuner = Tuner(tmp_path / "x.json", MACHINE, machine.clock)
    assert tuner.fastest("op", (1,), machine.variants()) == "b"
    assert tuner.choices["op", "(1,)"].times_ms == {"a": 2.0, "b": 1.5}


def test_variants_take_turns_and_short_ones_are_repeated(tmp_path: Path) -> None:
    machine = Machine(a=0.3, b=0.25)
    assert choose(tmp_path / "x.json", machine) == "b"
    rounds = machine.calls[4:]  # two calls each before
    assert rounds[:21] == [*["a"] * 3, *["b"] * 4, *["b"] * 4, *["a"] * 3, *["a"] * 3, *["b"] * 4]
    assert (rounds.count("a"), rounds.count("b")) == (3 * tuning.NUM_ROUNDS, 4 * tuning.NUM_ROUNDS)


def test_what_is_far_slower_is_given_up_after_three_rounds_and_the_last_one_left_needs_no_more(tmp_path: Path) -> None:
    machine = Machine(a=2.0, b=9.0, c=2.2)
    assert choose(tmp_path / "x.json", machine) == "a"
    counts = {name: machine.calls.count(name) - 2 for name in "abc"}  # without the warm-up and the first look
    assert counts == {"a": tuning.NUM_ROUNDS, "b": tuning.LEAST_ROUNDS, "c": tuning.NUM_ROUNDS}
    machine = Machine(a=2.0, b=9.0)
    assert choose(tmp_path / "y.json", machine) == "a"
    assert len(machine.calls) == 2 * (2 + tuning.LEAST_ROUNDS)


def test_a_tie_goes_to_the_first(tmp_path: Path) -> None:
    assert choose(tmp_path / "x.json", Machine(b=1.0, a=1.0)) == "b"


def test_remembered_in_memory_and_on_disk(tmp_path: Path) -> None:
    path, machine = tmp_path / "deep/x.json", Machine(a=2.0, b=1.0)
    tuner = Tuner(path, MACHINE, machine.clock)
    assert [tuner.fastest("op", (1,), machine.variants()) for _ in range(2)] == ["b", "b"]
    num_calls = len(machine.calls)
    faster_now = Machine(a=0.1, b=1.0)
    assert choose(path, faster_now, (1,)) == "b"
    assert (len(machine.calls), faster_now.calls) == (num_calls, [])
    assert choose(path, faster_now, (2,)) == "a"  # another key
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_timed_again_where_the_set_of_variants_is_another(tmp_path: Path) -> None:
    choose(tmp_path / "x.json", Machine(a=2.0, b=1.0))
    assert choose(tmp_path / "x.json", Machine(a=2.0, b=1.0, c=0.5)) == "c"
    assert choose(tmp_path / "x.json", Machine(a=2.0, b=1.0)) == "b"


def test_two_processes_keep_each_others_choices(tmp_path: Path) -> None:
    path, machine = tmp_path / "x.json", Machine(a=2.0, b=1.0)
    tuners = [Tuner(path, MACHINE, machine.clock) for _ in range(2)]
    for index, tuner in enumerate(tuners):
        tuner.fastest("op", (index,), machine.variants())
    assert {row["key"] for row in json.loads(path.read_text())["choices"]} == {"(0,)", "(1,)"}


def test_a_variant_that_raises_is_left_out_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    machine = Machine(a=RuntimeError("out of shared memory\nmore"), b=1.0)
    with pytest.warns(UserWarning, match="op .* a is left out: RuntimeError: out of shared memory$"):
        assert choose(path, machine) == "b"
    (row,) = json.loads(path.read_text())["choices"]
    assert row["left_out"] == {"a": "RuntimeError: out of shared memory"}
    assert str(Choice(**row)) == (
        "op (72, 'bfloat16'): b (b 1.000 ms; a left out: RuntimeError: out of shared memory)"
    )  # fmt: skip
    machine = Machine(a=0.5, b=1.0)
    assert choose(path, machine) == "b"  # nor does the next process compile it to fail again
    assert machine.calls == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), RuntimeError("CUDA error: out of memory")]
)
def test_what_lacked_memory_is_tried_again_by_the_next_process(tmp_path: Path, error: Exception) -> None:
    with pytest.warns(UserWarning, match="a is left out"):
        assert choose(tmp_path / "x.json", Machine(a=error, b=1.0)) == "b"
    assert choose(tmp_path / "x.json", Machine(a=0.5, b=1.0)) == "a"


def test_where_every_variant_fails_for_lack_of_memory_that_is_what_is_raised(tmp_path: Path) -> None:
    """A run that is fitted to its device goes on under a smaller plan."""
    errors = {"a": torch.OutOfMemoryError("CUDA out of memory"), "b": ValueError("no such shape")}
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match="every variant of op"):
        choose(tmp_path / "x.json", Machine(**errors))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="every variant of op") as raised:
        choose(tmp_path / "x.json", Machine(b=errors["b"], c=errors["b"]))
    assert not isinstance(raised.value, torch.OutOfMemoryError)


def test_scratch_is_returned_before_anything_else_and_a_line_says_what_is_timed(tmp_path: Path, caplog) -> None:
    machine, events = Machine(a=2.0, b=9.0), []

    @contextmanager
    def scratch() -> Iterator[None]:
        events.append(len(machine.calls))
        try:
            yield
        finally:
            events.append(len(machine.calls))

    tuner = Tuner(tmp_path / "x.json", MACHINE, machine.clock, scratch)
    with caplog.at_level("INFO", logger="mmkernels"):
        for key in (("backward", 72, 128), ("backward", 72, 64), ("backward", 72, 128)):
            tuner.fastest("op", key, machine.variants())
    each = len(machine.calls) // 2
    assert events == [0, each, each, 2 * each]
    assert [record.getMessage() for record in caplog.records] == [
        "timing op backward 72x128: a, b (shape 1 of this run)", "timing op backward 72x64: a, b (shape 2 of this run)",
    ]  # fmt: skip


def test_choices_are_those_of_the_kernels_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mmkernels"
    for name in ("ops/a.py", "kernels/b.py", "_native.so"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    monkeypatch.setattr(tuning, "__file__", str(package / "tuning.py"))
    found = [tuning.kernels_digest.__wrapped__()]
    for name in ("ops/a.py", "kernels/b.py", "_native.so"):
        (package / name).write_text("2")
        found.append(tuning.kernels_digest.__wrapped__())
    (package / "tuning.py").write_text("2")
    assert len(set(found)) == 4
    assert tuning.kernels_digest.__wrapped__() == found[-1]


def test_all_raising_gives_every_reason_and_remembers_nothing(tmp_path: Path) -> None:
    machine = Machine(a=RuntimeError("no memory"), b=ValueError("bad shape"))
    with pytest.warns(UserWarning, match="left out"), pytest.raises(RuntimeError) as failure:
        choose(tmp_path / "x.json", machine)
    assert "op (72, 'bfloat16') failed on Imagined 1000" in str(failure.value)
    assert "a: RuntimeError: no memory" in str(failure.value)
    assert "b: ValueError: bad shape" in str(failure.value)
    assert list(tmp_path.iterdir()) == []


GOOD_ROW = {"op": "op", "key": "(72, 'bfloat16')", "chosen": "a", "times_ms": {"a": 1.0, "b": 2.0}, "left_out": {}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"machine": {', "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps({"machine": MACHINE | {"torch": "2.12.0"}, "choices": [GOOD_ROW]}), "this machine is"),
        (json.dumps({"machine": MACHINE, "choices": [GOOD_ROW | {"chosen": "c"}]}), "KeyError"),
        (json.dumps({"machine": MACHINE, "choices": [GOOD_ROW | {"times_ms": ["a"]}]}), "TypeError"),
        (json.dumps({"machine": MACHINE, "choices": [GOOD_ROW | {"surprise": 1}]}), "surprise"),
        ("\x00\xff", "ValueError|JSONDecodeError"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_ignored_and_replaced(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match=f"x.json is ignored and will be replaced: .*({reason})"):
        assert choose(path, Machine(a=2.0, b=1.0)) == "b"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(path, Machine(a=1.0, b=2.0)) == "b"


def test_a_good_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"machine": MACHINE, "choices": [GOOD_ROW]}))
    assert choose(tmp_path / "x.json", Machine(a=2.0, b=1.0)) == "a"


def test_an_unwritable_folder_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not remembered past this process"):
        assert choose(tmp_path / "file/x.json", Machine(a=2.0, b=1.0)) == "b"


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError("disk full")

    choose(tmp_path / "x.json", Machine(a=2.0, b=1.0))
    before = (tmp_path / "x.json").read_text()
    monkeypatch.setattr(tuning.os, "fsync", fail)
    with pytest.warns(UserWarning, match="not remembered past this process: disk full"):
        assert choose(tmp_path / "x.json", Machine(a=2.0, b=1.0), (1,)) == "b"
    assert [path.read_text() for path in tmp_path.iterdir()] == [before]


def test_the_cpu_and_a_single_variant_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_tuner", None)  # not to be called
    machine = Machine(a=2.0, b=1.0)
    assert tuning.fastest("op", (), machine.variants(), torch.device("cpu")) == "a"
    assert tuning.fastest("op", (), Machine(b=1.0).variants(), CUDA) == "b"
    assert machine.calls == []
    with pytest.raises(ValueError, match="offers no variant"):
        tuning.fastest("op", (), {}, CUDA)


def test_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_tuner", None)
    variants = Machine(a=2.0, b=1.0).variants()
    monkeypatch.setenv("MMKERNELS_VARIANT", "other=x, op=a")
    assert tuning.fastest("op", (), variants, CUDA) == "a"
    monkeypatch.setenv("MMKERNELS_VARIANT", "op=c")
    with pytest.raises(tuning.NotOfferedError, match=r"has op=c, wanted a or b for \(\)"):
        tuning.fastest("op", (), variants, CUDA)
    monkeypatch.setenv("MMKERNELS_VARIANT", "op")
    with pytest.raises(ValueError, match="is 'op', wanted op=variant"):
        tuning.fastest("op", (), variants, CUDA)


def test_what_is_known_to_be_slower_is_timed_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(chunked=2.0, cuda=1.0)
    tuner = Tuner(tmp_path / "x.json", MACHINE, machine.clock)
    monkeypatch.setattr(tuning, "_tuner", lambda _: tuner)
    monkeypatch.setattr(tuning.torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(tuning.torch.cuda, "current_device", lambda: 0)
    ask = partial(tuning.fastest, "group_norm_silu_conv", ("forward",), machine.variants(), CUDA, "3x1x1")
    assert (ask(), machine.calls) == ("chunked", [])
    monkeypatch.setenv("MMKERNELS_TIME_ALL", "1")
    assert ask() == "cuda"
    monkeypatch.delenv("MMKERNELS_TIME_ALL")
    assert (
        Tuner(tmp_path / "x.json", MACHINE, machine.clock).fastest(
            "group_norm_silu_conv", ("forward",), machine.variants(), "3x1x1"
        )
        == "chunked"
    )


def test_not_inside_a_trace() -> None:
    def ask(x: torch.Tensor) -> torch.Tensor:
        tuning.fastest("op", (), {"a": lambda: None}, x.device)
        return x

    with pytest.raises(Exception, match="inside a trace"):
        torch.compile(ask, fullgraph=True, backend="eager")(torch.ones(1))


def test_the_overview_shows_what_was_chosen(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MMKERNELS_CACHE", str(tmp_path))
    overview.main()
    assert "no kernel variants chosen yet" in capsys.readouterr().out
    choose(tmp_path / "variants-1.json", Machine(a=2.0, b=1.0))
    overview.main()
    printed = capsys.readouterr().out
    assert "device Imagined 1000, capability 9.0, torch 2.13.0" in printed
    assert "op (72, 'bfloat16'): b (b 1.000 ms; a 2.000 ms)" in printed
