"""Weights in parts on two and four ranks train as one rank does on the joined batch, and resume on any number."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
from launched import launched
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_ranks import config_of, train

from mimicmotion.config import Config, LoraConfig, OptimizerConfig
from mimicmotion.parallel import ParallelConfig
from mimicmotion.planning.memory_plan import placed
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint
from mmkernels.choices import OptimizerChoice, Plan

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
GROUPS = ("model", "ema", "optimizer")


def launch(folder: Path, ranks: int, shard: int, steps: int, *more: str) -> subprocess.CompletedProcess[str]:
    """The script on so many ranks."""
    return launched("tests/trainer/sharded_ranks.py", ranks, folder, shard, steps, *more, timeout=400)


def saved(folder: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint."""
    return checkpoint.load(folder / "run" / f"step-{step:08d}").tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps: of one rank, and sharded: one of four ranks, two groups of two, and gone on with on two ranks."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("alone", "sharded")}
    train(config_of(folders["alone"], 1, 2), ALONE, resume=False)
    for ranks, *more in ((4,), (2, "--resume")):
        done = launch(folders["sharded"], ranks, 2, 1 + len(more), *map(str, more))
        assert done.returncode == 0 and ("resumed" in done.stdout) == bool(more), done.stdout + done.stderr
    return folders


def test_sharded_weights_train_as_those_of_one_rank(runs: dict[str, Path]) -> None:
    """After two steps of AdamW in float32, whose first divides each gradient by its own size."""
    before, wanted, found = saved(runs["alone"], 1), saved(runs["alone"], 2), saved(runs["sharded"], 2)
    for group in GROUPS:
        assert found[group].keys() == wanted[group].keys() and len(wanted[group]) > 300
    moments = {key: x for key, x in wanted["optimizer"].items() if key.endswith("/exp_avg")}
    largest = max(float(x.abs().max()) for x in moments.values())
    for key, moment in moments.items():
        torch.testing.assert_close(found["optimizer"][key], moment, rtol=1e-3, atol=2e-5 * largest, msg=key)
    for group in ("model", "ema"):
        moved = sum(float((x - before[group][key]).norm()) ** 2 for key, x in wanted[group].items())
        off = sum(float((found[group][key] - x).norm()) ** 2 for key, x in wanted[group].items())
        assert moved > 0 and off <= 1e-4 * moved, group


def test_ranks_agree_to_the_bit_and_hold_a_part_each(runs: dict[str, Path]) -> None:
    paths = [runs["sharded"] / f"end-{rank}.safetensors" for rank in range(2)]
    first, second = map(load_file, paths)
    kept = saved(runs["sharded"], 2)["model"]
    assert [key for key, x in first.items() if not (torch.equal(second[key], x) and torch.equal(kept[key], x))] == []
    for path in paths:
        with safe_open(path, framework="pt") as opened:
            weights, moments = (float(word) for word in opened.metadata()["shares"].split())
        assert weights == pytest.approx(0.5, abs=0.03) and moments == pytest.approx(0.5, abs=0.03)


def test_one_rank_reads_to_the_bit_what_two_have_saved(runs: dict[str, Path]) -> None:
    again = train(config_of(runs["sharded"], 1, 2), ALONE, resume=True)
    held, wanted = {"model": again.model.state_dict(), **again.optimization.tensors()}, saved(runs["sharded"], 2)
    for group in GROUPS:
        assert [key for key, x in wanted[group].items() if not torch.equal(held[group][key], x)] == []


def test_a_plan_leaves_the_average_with_weights_that_are_in_parts() -> None:
    whole = Config(kernels="fused", plan=Path("plan.json"))
    sharded = dataclasses.replace(whole, parallel=ParallelConfig(shard=2))
    assert placed(whole, Plan()).optimizer.ema == "host" and placed(sharded, Plan()).optimizer.ema == "device"
    with pytest.raises(ValueError, match=r"optimizer\.states_on_host as given takes whole weights"):
        placed(sharded, Plan(optimizer=OptimizerChoice(states_on_host=True)))


def test_a_number_of_ranks_that_cannot_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel.shard is 2 and there are 1 rank\(s\); give torchrun"):
        train(config_of(tmp_path, 2, 1), ALONE, resume=False)
    with pytest.raises(ValueError, match=r"parallel\.shard is 0"):
        ParallelConfig(shard=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("optimizer.ema", {"optimizer": OptimizerConfig(ema="host")}),
        ("optimizer.in_backward", {"optimizer": OptimizerConfig(in_backward=True)}),
        ("lora.rank", {"lora": LoraConfig(rank=4)}),
    ],
)
def test_what_takes_whole_weights_is_refused(name: str, changes: dict[str, object]) -> None:
    config = Config()
    if "lora" in changes:
        changes = {**changes, "model": dataclasses.replace(config.model, pretrained=Path("weights"))}
    with pytest.raises(ValueError, match=f"parallel.shard is 2, and {name} as given takes whole weights"):
        dataclasses.replace(config, parallel=ParallelConfig(shard=2), **changes)
