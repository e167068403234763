"""The bench refuses what is wrong, its statistics and its allocation count are exact, its rows are complete."""

import dataclasses
import importlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import started
import torch
from places import ROOT

from bench import environment, harness, report, sub_block, temporal_attention, training_step
from bench.result_file import read_rows

# As a bench starts itself again, which a test below looks at.
TUNED = environment.QUIET_PROFILER | os.environ | environment.TUNED_ALLOCATOR
CPU = torch.device("cpu")
ROW_KEYS = {
    "bench", "provider", "mode", "metric", "median", "low", "high", "kind", "shape", "dtype", "threads", "device",
    "versions", "commit", "command", "ratio", "allocator",
}  # fmt: skip


def _doubled(x: torch.Tensor, factor: float = 2.0) -> harness.Provider:
    return harness.Provider(name=f"times {factor}", step=lambda: {"y": x * factor}, includes="one product")


def _measure(providers: list[harness.Provider], x: torch.Tensor, baseline: str = "times 2.0") -> harness.Results:
    plain, exact = {"y": x * 2}, {"y": x.double() * 2}
    return harness.measure(providers, plain, exact, baseline=baseline, device=CPU, num_rounds=3)


def test_spread_is_the_median_and_the_low_and_high_quantiles():
    assert harness.spread([5.0, 1.0, 4.0, 2.0, 3.0, 100.0]) == harness.Spread(median=3.5, low=2.0, high=5.0)
    with pytest.raises(ValueError, match="at least one"):
        harness.spread([])


def test_a_wrong_provider_is_refused_and_not_timed():
    x = torch.randn(64)
    results = _measure([_doubled(x), _doubled(x, 2.001)], x)
    assert list(results.measured) == ["times 2.0"]
    assert "y is off by 5.00e-04" in results.refused["times 2.001"]


def test_only_a_refused_provider_of_ours_fails_a_bench():
    x = torch.randn(64)
    peer, ours = (dataclasses.replace(_doubled(x, 2.001), name=name) for name in ("compile", "fused-keep-up"))
    results, console = _measure([_doubled(x), peer, ours], x), report.make_console()
    assert list(results.refused) == ["compile", "fused-keep-up"]
    assert list(results.refused_of_ours) == ["fused-keep-up"]
    with console.capture() as captured:
        report.print_results("both", results, console)
    assert "left out, not timed: compile: y is off by 5.00e-04" in captured.get()
    assert "REFUSED, not timed: fused-keep-up: y is off by" in captured.get()


def test_the_gate_refuses_not_a_number_a_wrong_shape_and_a_missing_name():
    exact = {"y": torch.ones(3, dtype=torch.float64)}
    plain = {"y": torch.ones(3)}
    assert harness.why_wrong(plain, plain, exact) is None
    assert "off by nan" in str(harness.why_wrong({"y": torch.tensor([1.0, float("nan"), 1.0])}, plain, exact))
    assert "shape (1,)" in str(harness.why_wrong({"y": torch.ones(1)}, plain, exact))
    assert "wanted ['y']" in str(harness.why_wrong({"z": torch.ones(3)}, plain, exact))


def test_the_budget_is_twice_the_error_of_plain_torch():
    exact = {"y": torch.ones(1, dtype=torch.float64)}
    plain = {"y": torch.tensor([1.001])}
    assert harness.why_wrong({"y": torch.tensor([0.9981])}, plain, exact) is None
    assert harness.why_wrong({"y": torch.tensor([0.9979])}, plain, exact) is not None


def test_a_refused_baseline_is_an_error():
    x = torch.randn(8)
    with pytest.raises(ValueError, match="baseline 'times 3"):
        _measure([_doubled(x), _doubled(x, 3.0)], x, baseline="times 3.0")


def test_ratios_are_taken_within_a_round(monkeypatch):
    x = torch.randn(8)
    fast, slow = _doubled(x), harness.Provider(name="slow", step=_doubled(x).step, includes="")
    # Rounds rotate: fast slow, slow fast, fast slow. The second round is ten times slower for both.
    ticks = iter([10.0, 40.0, 400.0, 100.0, 10.0, 20.0])
    monkeypatch.setattr(harness, "time_once_ms", lambda step, device: next(ticks))
    results = _measure([fast, slow], x)
    quick, slower = results.measured["times 2.0"], results.measured["slow"]
    assert (quick.times_ms, slower.times_ms) == ((10.0, 100.0, 10.0), (40.0, 400.0, 20.0))
    assert slower.speed_over(quick).median == 0.25
    assert slower.time_ms.median == 40.0


def test_the_peak_of_a_known_program_is_exact():
    a = torch.ones(1000, 1000)  # 4 MB

    def step() -> torch.Tensor:
        b = a + 1  # 4 MB alive
        c = b * 2  # 8
        del b  # 4
        return torch.cat([c, c])  # 12

    assert harness.allocator_peak_bytes(step, CPU) == 12_000_000


def test_the_peak_sees_temporaries_inside_an_operator_and_not_what_was_there():
    held = [torch.ones(1000, 1000)]
    q = torch.ones(1, 4, 256, 64)

    def attention() -> torch.Tensor:
        held.clear()  # released during the call, allocated before it
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    peak_bytes = harness.allocator_peak_bytes(attention, CPU)
    assert q.nbytes < peak_bytes < 8 * q.nbytes  # the output, and the kernel's own tiles


def test_rows_have_every_key_and_survive_json(tmp_path):
    x = torch.randn(8)
    setting = report.Setting.of(CPU, torch.float32)
    results = _measure([_doubled(x)], x)
    rows = report.rows_of(results, bench="test", mode="forward", shape={"frames": 72}, setting=setting)
    report.write(rows, tmp_path / "rows.json", report.make_console())
    loaded = read_rows(tmp_path / "rows.json")
    assert [row["metric"] for row in loaded] == ["time_ms", "peak_bytes"]
    for row in loaded:
        assert row.keys() >= ROW_KEYS
        assert row["low"] <= row["median"] <= row["high"]
        assert (row["kind"], row["ratio"], row["dtype"]) == ("measured", 1.0, "float32")
        assert row["versions"]["torch"] == torch.__version__
    assert x.nbytes <= loaded[1]["median"] <= x.nbytes + 64  # and the factor, which torch makes a tensor of


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        sub_block.Settings(threads=0)
    assert sub_block.Settings(warm_ups=0).warm_ups == 0


def test_a_row_is_measured_or_modelled():
    setting = report.Setting.of(CPU, torch.float32)
    with pytest.raises(ValueError, match="measured, modelled or dry, got 'guessed'"):
        report.Row(
            bench="", provider="", mode="", metric="", median=0, low=0, high=0, kind="guessed", shape={},
            **{name: getattr(setting, name) for name in setting.__dataclass_fields__},
        )  # fmt: skip


@pytest.mark.pictures
def test_the_picture_is_drawn(tmp_path):
    bars = {"torch": harness.Spread(median=2.0, low=1.0, high=3.0), "fused": harness.Spread(median=1, low=1, high=1)}
    panel = report.Panel(title="time", unit="ms", values=bars, baseline="torch")
    report.plot([panel, panel, panel], title="measured", path=tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_bench_starts_itself_again_with_the_allocator_tuned():
    code = "from bench import environment; environment.tune_allocator(); print(environment.allocator())"
    clean = {name: value for name, value in os.environ.items() if name not in environment.TUNED_ALLOCATOR}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(environment.TUNED_ALLOCATOR)


def test_attn72_runs_as_typed_and_prints_its_bars(tmp_path):
    sizes = {"frames": 5, "height": 2, "width": 3, "channels": 32, "heads": 2, "rounds": 1, "compile-limit-s": 0}
    flags = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    ran = started.python(
        ["bench/attn72.py", *flags, "--device", "cpu", "--json", tmp_path / "rows.json"], environment=TUNED
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "bar: at least 1.35x: for the default shape" in ran.stdout
    rows = read_rows(tmp_path / "rows.json")
    assert {row["bench"] for row in rows} == {"attn72/core", "attn72/sub-block"}
    assert {row["provider"] for row in rows} >= {"torch", "checkpoint", "checkpoint-chunked", "fused", "fused-keep-qkv"}
    assert all(row["allocator"] == environment.TUNED_ALLOCATOR and row["threads"] == 1 for row in rows)
    measured, modelled = ([row for row in rows if row["kind"] == kind] for kind in ("measured", "modelled"))
    assert all(row["shape"]["frames"] == 5 and row["median"] > 0 for row in measured)
    assert "at the real shape, forward + backward (modelled)" in ran.stdout
    _check_the_real_shape({(row["bench"], row["provider"], row["metric"]): row["median"] for row in modelled})


def _check_the_real_shape(figures: dict[tuple[str, str, str], float]) -> None:
    """Against counts by hand: tokens of 405 MiB, products of 320 x 320 and of 72 frames for each of 663,552 tokens."""
    tokens, one = 72 * 72 * 128, 72 * 72 * 128 * 320 * 2
    projection, product = 2 * tokens * 320 * 320, 2 * tokens * 72 * 320
    block = "attn72/sub-block"
    # Plain: 4 projections and 2 products, twice that and half a product more in backward, which makes scores again.
    assert figures[block, "torch", "flops"] == 3 * 4 * projection + 7 * product
    # Saving its input: QKV's projection and the scores again. Keeping q, k, v spares the projection.
    assert figures[block, "fused", "flops"] == 15 * projection + 8 * product
    assert figures[block, "fused-keep-qkv", "flops"] == 12 * projection + 8 * product
    # Beside the output, which is alive when backward begins: x is not counted, it was there before.
    saved = {
        provider: figures[block, provider, "saved_bytes"] / one
        for provider in ("checkpoint", "fused", "fused-keep-qkv")
    }
    assert saved == pytest.approx({"checkpoint": 1, "fused": 1, "fused-keep-qkv": 4}, rel=0.03)
    assert figures[block, "fused", "peak_bytes"] < 0.4 * figures[block, "checkpoint", "peak_bytes"]


def test_the_training_step_gate_finds_one_wrong_gradient_among_many():
    torch.manual_seed(0)
    exact = {f"layer {index}": torch.randn(100, dtype=torch.float64) for index in range(50)}
    plain = {name: value * (1 + 1e-7) for name, value in exact.items()}
    assert training_step.why_wrong_step(plain, plain, exact) is None
    tiny = {**exact, "gate": torch.full((1,), 1e-6, dtype=torch.float64)}
    wrong = {**tiny, "gate": tiny["gate"] * 1.01}
    assert "1 scalar gradients is off by 1.00e-02" in str(training_step.why_wrong_step(wrong, tiny, tiny))
    far = {name: value * (1 + 1e-4) for name, value in exact.items()}
    assert "of their norm" in str(training_step.why_wrong_step(far, plain, exact))


def test_the_training_step_gate_under_autocast_asks_no_luck_of_one_number():
    """As on an H200: one of 32 blend factors off by 1.96e-2 of itself, plain torch by luck 17 times closer there."""
    torch.manual_seed(0)
    exact = {f"layer {index}": torch.randn(100, dtype=torch.float64) for index in range(50)}
    exact |= {f"mix {index}": 0.01 * torch.randn(1, dtype=torch.float64) for index in range(32)}
    exact["loss"] = torch.ones(1, dtype=torch.float64)

    def rounded() -> dict[str, torch.Tensor]:
        return {name: x + 3e-3 * x.abs().max() * torch.randn_like(x) for name, x in exact.items()} | {
            "loss": exact["loss"] * (1 + 1e-4)
        }

    plain, fused = rounded(), rounded()
    plain["mix 3"], fused["mix 3"] = exact["mix 3"] * (1 + 1.15e-3), exact["mix 3"] * (1 - 1.96e-2)
    assert training_step.why_wrong_step(fused, plain, exact) is None
    largest = exact["layer 7"].abs() == exact["layer 7"].abs().max()
    scalars = {name: -x for name, x in fused.items() if name.startswith("mix")}
    wrong = {
        "the sign of all scalars": (scalars, "32 scalar gradients is off by"),
        "the largest of a tensor by an eighth": (
            {"layer 7": fused["layer 7"].where(~largest, 0.875 * fused["layer 7"])},
            "layer 7 is off by",
        ),
        "a tensor's gradient of zero": ({"layer 7": torch.zeros(100)}, "of their norm"),
        "the scalars' gradients of zero": (
            {name: x * 0 for name, x in scalars.items()},
            "32 scalar gradients is off by",
        ),
        "the loss": ({"loss": exact["loss"] * 1.01}, "loss is off by"),
        "not a number": ({"mix 5": exact["mix 5"] * float("nan")}, "off by nan of their norm"),
    }
    for what, (change, reason) in wrong.items():
        assert reason in str(training_step.why_wrong_step(fused | change, plain, exact)), what
    without = {name: x for name, x in fused.items() if name != "layer 7"}
    assert "not in both: ['layer 7']" in str(training_step.why_wrong_step(without, plain, exact))


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("bench", "provider", "bar"),
    [
        ("geglu_feed_forward", "fused-keep-up", "at least 1.05x and at most 0.25 of the peak"),
        ("spatial_attention", "fused", "at least 1.0x"),
        ("temporal_transformer_block", "fused-input-only", "at least 1.12x and at most 0.15 of the peak"),
        ("group_norm_silu_conv 3x3", "fused", "at least 0.98x and at most 0.65 of the peak"),
        ("group_norm_silu_conv 3x1x1", "checkpoint-channels-first", "at least 1.15x and at most 0.35 of the peak"),
    ],
)
def test_an_op_s_bench_measures_every_way_and_prints_its_bar(
    bench: str, provider: str, bar: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, kernel = bench.partition(" ")
    module = importlib.import_module(f"bench.{name}")
    settings = module.Settings(
        frames=5, height=4, width=3, channels=64, heads=2, rounds=1, compile_limit_s=0.0, device="cpu",
        json=tmp_path / "rows.json", picture=tmp_path / "bars.png", **({"kernel": kernel} if kernel else {}),
    )  # fmt: skip
    assert sub_block.run(settings, module.Settings(), module.subjects(settings), lambda console: []) == 0
    assert f"bar: {bar}: for the default shape and conditions, which these are not\n" in capsys.readouterr().out
    rows = read_rows(tmp_path / "rows.json")
    providers = {row["provider"] for row in rows}
    assert providers >= {"torch", "checkpoint", "fused", provider}
    assert {(row["bench"], row["mode"], row["provider"], row["metric"]) for row in rows} == {
        (bench, *each) for each in product(("forward", "both"), providers, ("time_ms", "peak_bytes"))
    }
    assert all(row.keys() >= ROW_KEYS and row["median"] > 0 for row in rows)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_trial_gives_float64_in_pieces_and_refuses_a_way_whose_layout_is_not_brought_back() -> None:
    """The exact outputs of pieces are those of the whole, and a provider's check is of the plain layout."""
    settings = sub_block.Settings(frames=4, height=2, width=3, channels=32, heads=2, device="cpu", compile_limit_s=0.0)
    _, subject = temporal_attention.subjects(settings, eager_chunk_pixels=4)
    trial = sub_block.Trial(subject, settings)
    whole = sub_block.Trial(dataclasses.replace(subject, pieces=None), settings)
    exact, wanted = trial.exact("both"), whole.exact("both")
    assert exact.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-12, atol=1e-12)
    provider = trial.providers["torch-no-permute"]
    check, plain = trial.as_timed("x", provider, "both").check, trial.run(trial.providers["torch"], "both")
    assert check is not None and harness.why_wrong(check(), plain, exact) is None
    forgotten = dataclasses.replace(provider, back=lambda x: x)
    check = trial.as_timed("x", forgotten, "both").check
    assert check is not None and "has shape (6, 4, 32)" in str(harness.why_wrong(check(), plain, exact))


def test_a_bar_is_held_or_not() -> None:
    bar = sub_block.Bar(baseline="checkpoint", least_speed=1.1, most_peak=0.25)
    assert bar.is_met(1.1, 0.25) and not bar.is_met(1.09, 0.25) and not bar.is_met(1.1, 0.26)
    assert sub_block.Bar(baseline="checkpoint", least_speed=1.0).is_met(1.0, 9.0)
