"""What is trained and how fast, by settings that change from run to run and on resume."""

import dataclasses
import re

import pytest
import torch
from tiny import NoiseClips, tiny_config

from mimicmotion.optimization.optimizer import build_optimization
from mimicmotion.planning.dry_run import dry_run
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run.checkpoint import load
from mimicmotion.run.history import read_history
from mimicmotion.trainer import Trainer

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def _train(config, resume=False):
    trainer = Trainer(config, NoiseClips(config=config), ONE, resume=resume)
    return trainer.run(), trainer


OTHER_RATES = {
    "another schedule, a shorter warm-up": {"schedule": "cosine", "warmup_steps": 1},
    "another rate": {"learning_rate": 3e-4, "schedule": "linear"},
}


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.deep if i else ()) for i, x in enumerate(OTHER_RATES)]
)
def test_a_resumed_run_has_the_rate_of_a_run_with_the_new_settings(case, tmp_path):
    begun = tiny_config(tmp_path / "begun", num_steps=2)
    _train(begun)
    optimizer = dataclasses.replace(begun.optimizer, **OTHER_RATES[case])
    trainer = dataclasses.replace(begun.trainer, num_steps=4)
    gone_on = dataclasses.replace(begun, optimizer=optimizer, trainer=trainer)
    _, resumed = _train(gone_on, resume=True)
    _train(dataclasses.replace(gone_on, run_dir=tmp_path / "whole"))
    rates = [row["learning_rate"] for row in read_history(tmp_path / "begun" / "loss.jsonl")]
    whole = [row["learning_rate"] for row in read_history(tmp_path / "whole" / "loss.jsonl")]
    assert rates[2:] == whole[2:] and len(whole) == 4 and rates[3] != 1e-3  # which the old settings give
    said = resumed.notes.index("  the learning rate from step 3 on is that of a run with the new setting")
    assert "optimizer." in resumed.notes[said - 1]


def test_only_what_a_pattern_finds_is_trained_and_the_rest_costs_nothing(tmp_path):
    config = tiny_config(tmp_path, num_steps=2)
    pattern = "temporal_transformer_blocks|pose_net"
    optimizer = dataclasses.replace(config.optimizer, train=pattern, learning_rates={"pose_net": 1e-2})
    config = dataclasses.replace(config, kernels="fused", optimizer=optimizer)
    begun = Trainer(config, NoiseClips(config=config), ONE)
    start = {name: value.clone() for name, value in begun.model.state_dict().items()}
    begun._backward(begun._load(0))
    given = {name for name, parameter in begun.model.named_parameters() if parameter.grad is not None}
    _, trainer = _train(config)
    tensors = load(tmp_path / "step-00000002").tensors
    moved = {name for name, value in tensors["model"].items() if not torch.equal(value, start[name])}
    trained = {name for name in start if re.search(pattern, name)}
    assert len(moved) > 50 and moved <= trained
    live = set(trainer.optimization.live)
    dead = trained - live
    assert dead and all("attn2.to_q" in name or "attn2.to_k" in name or "norm2" in name for name in dead)
    # a gradient, a moment or a copy of anything else would be seen here
    assert given == live == {name.rpartition("/")[0] for name in tensors["optimizer"]} == set(tensors["ema"])
    moments = sum(value.numel() for name, value in tensors["optimizer"].items() if not name.endswith("/step"))
    num_trained = sum(start[name].numel() for name in live)
    assert moments == 2 * num_trained
    cost, all_bytes = dry_run(config).cost, 4 * sum(value.numel() for value in start.values())
    assert all_bytes + 12 * num_trained < cost.resident_bytes < all_bytes + 12 * num_trained + 2.5e6  # and the batch
    assert cost.end_bytes < cost.resident_bytes + 1.1e8  # cuBLAS's workspaces of a Hopper GPU stay
    assert [group["initial_lr"] for group in trainer.optimization.optimizer.param_groups] == [1e-3, 1e-2]
    for pattern, words in (("nowhere", "in no name of a parameter"), ("(", "is no pattern")):
        with pytest.raises(ValueError, match=words):
            build_optimization(
                trainer.model,
                dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, train=pattern)),
                scales_loss=False,
            )
