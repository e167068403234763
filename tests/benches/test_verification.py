"""The parts of bench/verify_gpu.py on a stand-in for a GPU, the rows that they write and the page made of them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import limits, report
from bench.environment import ROOT
from bench.result_file import read_rows
from bench.verification import benches, bits, memory, ops, page, real_ops, step, tests, variants
from bench.verification.device import Gpu, StandIn
from bench.verification.page import PARTS
from bench.verification.record import Record, failures_of, stem_of
from mmkernels.cards import card, find_card
from mmkernels.tuning import Choice

H100 = "NVIDIA H100 80GB HBM3"
SETTING = report.Setting(
    dtype="bfloat16", threads=1, device=H100, versions={"torch": "2.13.0"}, commit="abc", command="x", allocator={}
)
MADE_UP = "RuntimeError: made up"  # what the stand-in says of the variant that it leaves out
KEYS = set(report.Row.__dataclass_fields__) | {"part"}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(path=tmp_path / "h100.json", part="step", setting=SETTING)


def page_text(record: Record) -> str:
    return record.path.with_suffix(".md").read_text()


# --- every part on a stand-in


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return Record(path=tmp_path_factory.mktemp("dry") / "dry.json", part="", setting=SETTING, kind="dry")


BENCHES_OF = {  # what each part leaves, beside what became of it
    "step": {"step", "step/rates", "step/operations of fused", "step/operations of fused-plan"},
    "memory": {"memory", "memory/closed loop"},
    "ops": {f"ops/{name}" for name in real_ops.real_ops(1)},
    "variants": {"variants/group_norm_silu_conv", "variants/temporal_attention"},
    "benches": {"temporal_transformer_block"},
    "bits": {"bits"},
}


# They take longest, and GPUs have run both.
LONG = ("bits", "benches")


@pytest.mark.parametrize("part", [pytest.param(x, marks=pytest.mark.deep if x in LONG else ()) for x in BENCHES_OF])
def test_dry_pass(part: str, dry: Record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMKERNELS_CACHE", str(tmp_path))
    own = replace(dry, part=part)
    own.begin("begun", limit_s=200)
    importlib.import_module(f"bench.verification.{part}").run(StandIn(), own, 200)
    rows = [row for row in own.rows() if row["part"] == part]
    assert {row["bench"] for row in rows} - {page.STATE, page.FAILURE} == BENCHES_OF[part]
    assert [row["includes"] for row in failures_of(rows, [part]) if row["includes"] != MADE_UP] == []
    assert {row["kind"] for row in rows} <= {"dry", "modelled"}, "no row can be mistaken for a measured one"
    assert all(row["median"] >= 0 and set(row) == KEYS for row in rows)
    text = page_text(own)
    assert text.startswith(f"# {H100}: a DRY pass") and all(f"### {name}" in text for name in BENCHES_OF[part])


def test_dry_pass_of_the_step_has_what_is_wanted_of_each_way(dry: Record) -> None:
    rows = [row for row in dry.rows() if row["bench"] == "step"]
    wanted = {"first_step_s", "choices_known_before", "step_s", "forward_s", "backward_s", "peak_gib", "reserved_gib"}
    for provider in ("fused", "fused-plan"):
        assert {row["metric"] for row in rows if row["provider"] == provider and row["kind"] == "dry"} == wanted
        modelled = {row["metric"] for row in rows if row["provider"] == provider and row["kind"] == "modelled"}
        assert modelled == {"step_s", "peak_gib"}
    steps = [row for row in dry.rows() if row["bench"] == "memory" and row["kind"] == "dry"]
    assert {row["mode"] for row in steps} == {"step 1", "step 2"}
    assert "| step_s (modelled) | peak_gib (modelled) |" in page_text(dry)


def test_what_asks_cuda_is_replaced_on_a_stand_in_and_no_more() -> None:
    def asks_cuda(name: str) -> bool:
        member = inspect.getattr_static(Gpu, name)
        function = member.fget if isinstance(member, property) else inspect.unwrap(member)
        return inspect.isfunction(function) and "cuda" in inspect.getsource(function).lower().partition('"""')[2]

    ours = {name for name in vars(StandIn) if not name.startswith("__")}
    assert ours <= set(vars(Gpu))
    names = {name for name in vars(Gpu) if not name.startswith("__") and asks_cuda(name)}
    assert len(names) == 9 and names <= ours


@pytest.mark.deep
@pytest.mark.parametrize("make", [step.make_plan, memory.make_plan])
def test_plans_are_made_as_the_parts_ask_for_them(make: Any) -> None:
    """What a stand-in's planner takes the place of."""
    config = memory.memory_config(StandIn())
    plan = make(config, StandIn().card(), 22.5)
    assert plan.modelled is not None and 0 < plan.modelled.peak_gib < 22.5 and "keep" in plan.units.values()


@pytest.mark.parametrize("name", real_ops.real_ops(1))
def test_a_wrong_op_is_refused(name: str) -> None:
    """The rows that are compared are those that dy reaches: a gradient that is wrong there, or a wrong y, is seen."""
    op = real_ops.real_ops(1)[name]
    inputs = op.make(op.sizes(ops.TINY))
    assert ops.why_wrong(op, inputs) is None
    wrong = replace(op, call=lambda **inputs: op.call(**inputs) * 1.02)
    assert "is off by" in str(ops.why_wrong(wrong, inputs))
    last = list(inputs)[-1]
    scaled = replace(op, call=lambda **inputs: op.call(**{**inputs, last: _with_wrong_gradient(inputs[last])}))
    assert str(ops.why_wrong(scaled, inputs)).startswith(last)


def _with_wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    return x.detach() + 1.05 * (x - x.detach())


# --- what is written


def test_rows_and_page_are_written_with_each_result(record: Record) -> None:
    record.begin("begun", limit_s=100)
    record.figures("step", "fused", {"step_s": 2.6, "peak_gib": 72.4}, shape={"frames": 72})
    record.figures("step", "fused", {"step_s": 1.7}, kind="modelled", shape={"frames": 72})
    record.fail("checkpoint", "OutOfMemoryError: 2 GiB")
    record.say("done", 50.2, 100)
    replace(record, part="bits").begin_if_new("not reached")
    rows = record.rows()
    assert all(set(row) == KEYS for row in rows) and {row["commit"] for row in rows} == {"abc"}
    text = page_text(record)
    assert f"| step | {PARTS['step']} | done | 50 | 100 | abc |" in text
    assert "| bits | " in text and "| not reached | 0 | 0 | abc |" in text
    assert "1 failures:\n- step: checkpoint: OutOfMemoryError: 2 GiB\n" in text
    assert "frames 72; bfloat16" in text
    assert (
        "| provider | step_s | peak_gib | step_s (modelled) |\n| --- | --- | --- | --- |\n| fused | 2.6 | 72.4 | 1.7 |"
        in text
    )
    assert len(failures_of(rows, ["step"])) == 1 and failures_of(rows, ["bits"]) == []
    record.begin("begun")
    assert [row["part"] for row in record.rows()].count("bits") == 2, "a part that runs again leaves the others"
    assert "72.4" not in page_text(record)
    replace(record, part="bits").begin_if_new("other")
    assert "other" not in page_text(record)


def test_rows_of_no_part_stay(record: Record) -> None:
    """The file of the first GPU run was made by hand."""
    first = ROOT / "bench/results/nvidia-h200.json"
    record.path.write_text(first.read_text())
    record.begin("begun")
    record.figures("step", "fused", {"step_s": 2.5})
    by_hand = [row for row in read_rows(first) if "part" not in row]
    assert [row for row in record.rows() if "part" not in row] == by_hand != []
    assert "## Rows that were there before, of no part\n\n### " in page_text(record)
    assert failures_of(record.rows(), ["step"]) == []


def test_variants_stand_side_by_side(record: Record) -> None:
    choice = Choice(
        op="conv", key="(3, 3)", chosen="b", times_ms={"a": 4.0, "b": 2.0}, left_out={"c": "OSError: x | y"}
    )
    variants.write_choices([choice], record)
    assert [(row["provider"], row["ratio"]) for row in record.rows()[:2]] == [("a", 0.5), ("b", 1.0)]
    text = page_text(record)
    assert "| key | a | b |\n| --- | --- | --- |\n| (3, 3) | 4 | **2** |" in text
    assert "- step: conv=c (3, 3): OSError: x | y" in text


def test_other_bits_are_a_failure(record: Record) -> None:
    first = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    bits.compare(record, "rerun", first, {**first, "b": torch.tensor([3.0 + 2**-22])})
    bits.compare(record, "resume", first, {name: tensor.clone() for name, tensor in first.items()})
    assert [(row["provider"], row["includes"]) for row in failures_of(record.rows(), ["step"])] == [
        ("rerun", "1 of 2 tensors have other bits, first b")
    ]  # fmt: skip
    assert "| rerun | 1 | 2 |" in page_text(record) and "| resume | 0 | 2 |" in page_text(record)


def test_bytes_at_the_peak_stand_beside_what_was_modelled(record: Record) -> None:
    row = {"source": "a.py:1", "operation": "mm", "modelled_bytes": 2**30, "measured_bytes": 3 * 2**30}
    other = {"source": "b.py:2", "operation": "add", "modelled_bytes": 2**32, "measured_bytes": None}
    found = {"title": "t", "modelled_bytes": 5 * 2**30, "measured_bytes": 3 * 2**30, "rows": [row, other]}
    memory.write_bytes(found, record)
    lines = [line for line in page_text(record).splitlines() if line.startswith("| fused")]
    assert "| provider | source | operation | peak_gib | peak_gib (modelled) |" in page_text(record)
    assert lines == ["| fused | all |  | 3 | 5 |", "| fused | b.py:2 | add |  | 4 |", "| fused | a.py:1 | mm | 3 | 1 |"]


def test_the_report_is_waited_for_and_its_rows_written_once(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"title": "t", "modelled_bytes": 2**30, "measured_bytes": 2**31, "rows": []}
    sleeping, begin = "import time; time.sleep(60)", memory.subprocess.Popen
    for words, failures in ((f"open({str(tmp_path / 'peak.json')!r}, 'w').write({json.dumps(found)!r})", 0),
                            ("raise SystemExit(3)", 1), (sleeping, 2)):  # fmt: skip
        monkeypatch.setattr(memory, "LONGEST_REPORT_S", 1.0 if words is sleeping else 60.0)
        monkeypatch.setattr(memory.subprocess, "Popen", lambda command, **_: begin([command[0], "-c", words]))  # noqa: B023
        made = memory.Report(tmp_path, record)
        made.end()
        made.end()
        assert len(failures_of(record.rows(), ["step"])) == failures
    assert [row["median"] for row in record.rows() if row["bench"] == "memory/at the peak"] == [2**31, 2**30]
    assert "exit status 3" in page_text(record) and "not done 1 s after the first plan was" in page_text(record)


def test_a_bench_s_times_stand_beside_the_limit(record: Record) -> None:
    row = {
        **vars(
            report.Row(
                bench="attn72/core", provider="fused", mode="both", metric="time_ms", kind="measured", median=2.788,
                low=2.7, high=2.8, shape=limits.LEVEL_0, **vars(SETTING),
            )
        )
    }  # fmt: skip
    gpu: Any = SimpleNamespace(sheet=lambda: card("H100"))
    benches.write_rows([row], gpu, record)
    assert [(found["metric"], found["kind"], round(found["median"], 3)) for found in record.rows()] == [
        ("time_ms", "measured", 2.788), ("limit_ms", "modelled", 1.394)
    ]  # fmt: skip


def test_limits_are_those_of_the_facts() -> None:
    """The table of known limits: level 0, 72 frames of 1024x576, bfloat16; in ms on A100, H100, H200."""
    known = {
        ("attn72/core", "forward"): (0.83, 0.51, 0.35),
        ("attn72/core", "backward"): (1.46, 0.89, 0.62),
        ("attn72/sub-block", "forward"): (1.94, 0.61, 0.61),
        ("group_norm_silu_conv 3x3", "forward"): (3.92, 1.24, 1.24),
        ("group_norm_silu_conv 3x1x1", "forward"): (1.31, 0.41, 0.41),
    }
    for (bench, mode), expected in known.items():
        found = limits.limits_ms(bench, mode, limits.LEVEL_0, "bfloat16")
        assert [round(ms, 2) for ms in found.values()] == list(expected), bench
    both = limits.limits_ms("attn72/core", "both", limits.LEVEL_0, "bfloat16")
    assert round(both["H100"], 2) == 1.39
    assert limits.limits_ms("attn72/core", "both", limits.LEVEL_0, "float32") == {}
    # 2 x 9 x 663,552 tokens x 320 x 320 operations forward, twice that backward, at 989e12 a second.
    assert round(limits.limits_ms("group_norm_silu_conv 3x3", "both", limits.LEVEL_0, "bfloat16")["H100"], 2) == 3.71
    # Products a token: twice 12 C^2 for feed-forwards, 4 C^2 + 2 F C for attention; backward 32, and 11 and 6.
    assert round(limits.limits_ms("temporal_transformer_block", "both", limits.LEVEL_0, "bfloat16")["H100"], 2) == 14.40
    assert limits.limits_ms("train_step", "step", {}, "bfloat16") == {}
    with pytest.raises(KeyError, match="backwards"):
        limits.limits_ms("attn72/core", "backwards", limits.LEVEL_0, "bfloat16")


def test_cards_of_one_family_are_not_taken_for_each_other() -> None:
    assert find_card(H100) == limits.CARDS[1]
    assert find_card("NVIDIA H100 PCIe") is None


def test_every_bench_is_found_and_takes_its_arguments() -> None:
    names = benches.benches()
    assert {"attn72", "geglu_feed_forward", "group_norm_silu_conv", "spatial_attention"} <= set(names)
    assert not {"verify_gpu", "train_step", "modelled", "unet_cost", "harness"} & set(names)
    assert all("json" in benches.flags_of(name) for name in names)
    gpu: Any = SimpleNamespace(is_full_size=True, device=torch.device("cuda"))
    assert benches.arguments_of("attn72", gpu)[:6] == ["--height", "72", "--width", "128", "--dtype", "bfloat16"]
    assert benches.arguments_of("attn72", gpu)[-2:] == ["--device", "cuda"]


def test_variants_are_forced_once_each() -> None:
    convolution = Choice(op="conv", key="(3, 3)", chosen="b", times_ms={"a": 4.0, "b": 2.0, "c": 3.0})
    attention = Choice(op="attention", key="(72,)", chosen="cuda", times_ms={"cuda": 0.6})
    assert tests.forced_variants([convolution, attention]) == [
        "conv=a,attention=cuda", "conv=b,attention=cuda", "conv=c,attention=cuda"
    ]  # fmt: skip


def test_a_device_s_name_as_that_of_a_file() -> None:
    assert stem_of(H100) == "nvidia-h100-80gb-hbm3"


# Three tests of an op: one fails, one is fine, the last takes no interrupt and does not end.
OF_AN_OP = """
import signal, time
import pytest
pytestmark = pytest.mark.op
def test_first():
    assert 1 == 2, "made up"
def test_second():
    pass
def test_third():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60)
"""


@pytest.mark.parametrize("is_full_size", [True, pytest.param(False, marks=pytest.mark.deep)])  # several processes; one
def test_a_failing_test_is_written_though_pytest_had_to_be_killed(
    is_full_size: bool, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    (tmp_path / "tests/ops").mkdir(parents=True)
    (tmp_path / "tests/ops/test_blend.py").write_text(OF_AN_OP)
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    monkeypatch.setattr(tests, "END_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    begin_s = time.monotonic()
    gpu: Any = SimpleNamespace(is_full_size=is_full_size, device=torch.device("cpu"), choices=lambda: [])
    tests.run(gpu, replace(record, part="tests"), 10 + 1 + tests.MARGIN_S)
    assert time.monotonic() - begin_s < 18
    rows = record.rows()
    found = {row["provider"]: row["includes"] for row in failures_of(rows, ["tests"])}
    assert found == {
        "tests/ops/test_blend.py::test_first with chosen variants": "AssertionError: made up assert 1 == 2",
        "tests, chosen variants": "not done in the time of the part: 2 had ended",
        "tests, every variant timed": "there was no time for it",
    }
    counts = {row["metric"]: row["median"] for row in rows if row["bench"] == "tests"}
    assert (counts["passed_tests"], counts["failed_tests"]) == (1, 1)
