import re

import pytest

from mimicmotion import train
from mimicmotion.config import mimicmotion_72
from mimicmotion.model.unet import build_model, num_parameters
from mimicmotion.planning import dry_stages
from mimicmotion.planning.dry_run import dry_run

KERNELS = ("torch", "checkpoint", "fused")


@pytest.fixture(scope="module")
def results():
    words = ["--data.num-frames", "16", "--trainer.precision", "bf16", "--model.layers-per-block", "1"]
    return {kernels: dry_run(train.parse(["--kernels", kernels, *words]).config) for kernels in KERNELS}


@pytest.mark.parametrize("kernels", KERNELS)
def test_dry_run_counts_weights_and_optimizer(kernels, results):
    result = results[kernels]
    model = build_model(result.config.model)
    assert result.num_parameters == num_parameters(model) > result.num_trained
    static = 4 * (result.num_parameters + 3 * result.num_trained)  # weights, AdamW's two moments, moving average
    assert static < result.cost.resident_bytes < 1.1 * static
    assert result.cost.peak_bytes > result.cost.resident_bytes + result.cost.saved_bytes
    assert str(result).count("(modelled)") == 4 and "not measured" in str(result)


def test_kernels_save_memory(results):
    saved = {kernels: result.cost.saved_bytes for kernels, result in results.items()}
    assert saved["checkpoint"] < saved["torch"] / 4 and saved["fused"] < saved["torch"] / 2


def test_the_released_model_at_72_frames_needs_no_memory_to_dry_run(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--preset", "mimicmotion-72", "--dry-run", "--kernels", "checkpoint"])
    train.main()
    printed = capsys.readouterr().out
    assert "parameters: 1,524,828,639 (1,474,438,879 trained)" in printed  # 50.4M of cross-attention are dead
    assert "1024x576 pixels" in printed and "GiB (modelled)" in printed
    assert mimicmotion_72().trainer.precision == "bf16"


@pytest.mark.parametrize(
    ("words", "weight_bytes", "trained_bytes"),
    [
        ("--optimizer.states-on-host --optimizer.ema host", 4, 0),
        pytest.param(
            "--optimizer.kind adamw8bit --optimizer.ema device", 2, 2 + 4, marks=pytest.mark.deep
        ),  # the moving average is float32
        ("--optimizer.ema off --optimizer.in-backward", 4, 8),
    ],
)
def test_dry_run_follows_the_optimizers_options(words, weight_bytes, trained_bytes):
    sizes = "--data.num-frames 8 --data.height 64 --data.width 64 --sampling.tile-overlap 2 --trainer.precision bf16"
    sizes += " --model.layers-per-block 1"
    result = dry_run(train.parse([*sizes.split(), *words.split()]).config)
    static = weight_bytes * result.num_parameters + trained_bytes * result.num_trained
    small = 6e6  # the batch, scales of 8-bit moments and their tables of codes
    assert static < result.cost.resident_bytes < static + small
    gradients = weight_bytes * result.num_trained
    workspaces = 2 * (32 << 20)  # cuBLAS's, of forward's thread and of backward's, on a Hopper GPU: they stay
    if "in-backward" in words:
        assert result.cost.peak_bytes < static + small + workspaces + result.cost.saved_bytes + 0.5 * gradients
    assert result.cost.end_bytes < static + small + workspaces
    assert ("no moving average" in str(result)) == ("ema off" in words)


@pytest.mark.parametrize(
    "more", [["--kernels", "torch"], pytest.param(["--memory-budget", "2"], marks=pytest.mark.deep)]
)
def test_a_card_that_is_named_gives_a_time_and_each_shape_a_plan(more, capsys, monkeypatch, tmp_path):
    """The stage's time, from each shape's micro-batch: 6 clips in threes of 2, both shapes alike, ten million steps."""
    small = "--model.block-out-channels 32 32 32 32 --model.num-attention-heads 1 1 1 1 --model.layers-per-block 1"
    small += " --data.height 64 --data.width 64 --data.sizes 64x128 --data.num-frames 4 --sampling.tile-overlap 0"
    small += " --trainer.batch-size 6 --trainer.micro-batch-size 2 --trainer.num-steps 10000000"
    words = ["train.py", "--dry-run", *small.split(), "--data.prepared", str(tmp_path / "none"), *more]
    found = []
    monkeypatch.setattr(
        dry_stages, "dry_run", lambda *given, **more: found.append(dry_run(*given, **more)) or found[-1]
    )
    monkeypatch.setattr("sys.argv", [*words, "--card", "RTX 4090"])
    train.main()
    printed = capsys.readouterr().out
    has_plan = more[0] == "--memory-budget"
    assert [run.config.data.width for run in found] == [128, 64]
    assert printed.count("plan for RTX 4090, 2 GiB") == 2 * has_plan
    assert all((run.plan is not None) == has_plan and run.cost.reserved_bytes < 2 << 30 for run in found)
    seconds = 3 * sum(run.step_s for run in found) / 2
    said = re.search(r"time on one GPU: ([\d.]+) s a step, ([\d.]+) hours in all \(modelled\)", printed)
    assert said is not None and float(said[1]) == pytest.approx(seconds, abs=0.005)
    assert float(said[2]) == pytest.approx(1e7 * seconds / 3600, abs=0.05)
    monkeypatch.setattr("sys.argv", [*words, "--card", "RTX 4O90"])
    with pytest.raises(SystemExit, match=r"no dry run: .*RTX 4O90.*RTX 4090"):
        train.main()
