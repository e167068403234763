"""One clip's frames on one to four ranks: outputs and gradients of one rank, the same bits again, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from frames_ranks import HELD
from launched import launched

from mmkernels.frames import counts_of, slice_of

NAMES = [f"{ranks} ranks, {clips} clips" for ranks, clips in HELD]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks found, in one launch for all tests."""
    file = tmp_path_factory.mktemp("frames") / "found.json"
    done = launched("tests/blocks/frames_ranks.py", 4, file, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", [*NAMES, "in parts, two layers", "run again"])
def test_ranks_compute_what_plain_diffusers_does_in_float64(found: dict[str, Any], name: str) -> None:
    """Uneven frames and pixels; of parameters, sample and context; in float64 only the order of sums is left."""
    off = found[name]
    assert off["count"] > 600 and off["dead"] < 1e-12
    assert off["output"] < 1e-13 and off["gradients"] < 2e-11, off["of"]


def test_every_exchange_was_waited_for(found: dict[str, Any]) -> None:
    """Also of blocks that run again in backward; torch keeps the memory of one that was not until the process ends."""
    assert found["in flight"] == 0


def test_inference_mode(found: dict[str, Any]) -> None:
    assert found["inference"] < 1e-13


def test_the_same_bits_again_and_on_every_rank(found: dict[str, Any]) -> None:
    assert found["bits"] == [True] * 4


def test_what_would_take_one_rank_s_frames_alone_is_refused(found: dict[str, Any]) -> None:
    checkpoint, unknown, few_pixels, block = found["refused"]
    assert "down_blocks.0.attentions.0" in checkpoint and 'plan="checkpoint" fuses none' in checkpoint
    assert "mid_block.resnets.0 would take those of one alone" in unknown and "attentions" not in unknown
    assert "on 4 ranks" in few_pixels and "1 pixel" in few_pixels
    assert "a block has 2 frames" in block and "call the UNet itself" in block


@pytest.mark.parametrize(("num_frames", "size"), [(72, 5), (7, 4), (3, 3), (16, 1)])
def test_frames_are_split_as_torch_splits(num_frames: int, size: int) -> None:
    whole = torch.arange(num_frames)
    wanted = whole.tensor_split(size)
    assert counts_of(num_frames, size) == tuple(map(len, wanted))
    assert all(torch.equal(whole[slice_of(num_frames, size, rank)], part) for rank, part in enumerate(wanted))
