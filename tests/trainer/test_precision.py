"""fp32, bf16 and fp16 with a scaled loss, each through the fused blocks of a small model, on a CPU as on a GPU."""

import dataclasses

import pytest
import torch
from tiny import NoiseClips, tiny_config

from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history
from mimicmotion.trainer import Trainer

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-4, "bf16": 4e-3}  # of the loss: half an ulp of fp16 is 2^-11, of bf16 2^-8


def small_run(folder, precision, **trainer):
    config = tiny_config(folder, num_frames=3, batch_size=1, precision=precision, **trainer)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
    return dataclasses.replace(config, kernels="fused", optimizer=optimizer)


def trained(config, *, scale=None, resume=False):
    trainer = Trainer(config, NoiseClips(config=config), ONE, resume=resume)
    if scale is not None:
        trainer.optimization.scaler._init_scale = scale
    trainer.run()
    return trainer, read_history(config.run_dir / "loss.jsonl")


def test_each_precision_trains_through_the_fused_blocks(tmp_path):
    plain = dataclasses.replace(small_run(tmp_path / "plain", "fp32", num_steps=3), kernels="torch")
    wanted = [row["loss"] for row in trained(plain)[1]]
    for precision, tolerance in TOLERANCE.items():
        trainer, rows = trained(small_run(tmp_path / precision, precision, num_steps=3))
        assert "fused" in trainer.blocks.report and not any(row["is_skipped"] for row in rows)
        assert [row["loss"] for row in rows] == pytest.approx(wanted, rel=tolerance), precision
        assert trainer.optimization.scaler.get_scale() == (2.0**16 if precision == "fp16" else 1.0)
        weights = trainer.model.state_dict()
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
        is_near = abs(rows[0]["loss"] - wanted[0]) < 1e-6 * wanted[0]
        assert is_near == (precision == "fp32")  # the others were used


def test_fp16_lowers_its_scale_until_gradients_are_finite_and_goes_on_there_after_a_resume(tmp_path):
    straight = small_run(tmp_path / "straight", "fp16", num_steps=4, size=64)
    trainer, rows = trained(straight, scale=2.0**20)
    skipped = [row["step"] for row in rows if row["is_skipped"]]
    assert skipped == list(range(1, len(skipped) + 1)) and 1 <= len(skipped) <= 3
    assert trainer.optimization.scaler.get_scale() == 2.0 ** (20 - len(skipped))
    assert trainer.skips.total == len(skipped) and trainer.optimization.document()["average_steps"] == 4 - len(skipped)
    broken = small_run(tmp_path / "broken", "fp16", num_steps=2, size=64)
    trained(broken, scale=2.0**20)
    trained(dataclasses.replace(broken, trainer=straight.trainer), resume=True)
    wanted, found = (checkpoint.load(config.run_dir / "step-00000004") for config in (straight, broken))
    assert found.documents["state"] == wanted.documents["state"]
    for group, tensors in wanted.tensors.items():
        assert all(torch.equal(value, found.tensors[group][name]) for name, value in tensors.items()), group
