"""`--trainer.deterministic`: torch's switch is on while a run trains and while its step is planned, and off after."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import NoiseClips, tiny_config

from bench.verification import bits
from mimicmotion.execution import same_bits
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.trainer import Trainer

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def switch() -> tuple[bool, bool]:
    filling: Any = torch.utils.deterministic
    return torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory


def test_the_switch_is_put_back_whatever_happens() -> None:
    before = switch()
    with mock.patch.dict(os.environ), pytest.raises(RuntimeError, match="broken"), same_bits(True):
        assert switch() == (True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
        raise RuntimeError("broken")
    assert switch() == before == (False, True)
    with same_bits(False):
        assert switch() == before


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_run_trains_under_it(is_wanted: bool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, num_steps=1, deterministic=is_wanted)
    trainer, seen = Trainer(config, NoiseClips(config=config), RANKS), []
    trainer.around_step = lambda step: seen.append(switch()) or step()
    with mock.patch.dict(os.environ):
        trainer.run()
    assert seen == [(True, False) if is_wanted else (False, True)]
    assert switch() == (False, True)


def test_which_layers_came_out_otherwise() -> None:
    names = ["model/unet.a.attn1.to_q.weight", "model/unet.b.attn1.to_q.weight", "model/unet.b.norm1.weight", "other/x"]
    assert bits.operations(names) == "attn1.to_q 2, b.norm1 1"
