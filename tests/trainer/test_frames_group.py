"""Ranks that share clips train as one rank with whole clips, by any mesh, and end together."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import av
import pytest
import started
import torch
from frames_group_ranks import CASES, CLIPS, FRAMES, RESUMED
from safetensors.torch import load_file
from tiny import tiny_config

from mimicmotion.config import Config, OptimizerConfig
from mimicmotion.data.batch import Batch
from mimicmotion.diffusion import Draw
from mimicmotion.parallel import ParallelConfig
from mimicmotion.ranks.distributed import Ranks, rank_sample_ids
from mimicmotion.ranks.frames_group import FramesGroup
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history

OFF = 1e-8  # over the largest of a gradient in float64
Found = tuple[dict[str, torch.Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases left, of one launch."""
    path, script = tmp_path_factory.mktemp("ranks"), Path(__file__).with_name("frames_group_ranks.py")
    done = started.python([script, path], environment=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def read(folder: Path, name: str) -> Found:
    """Gradients of a case and its row."""
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [name for name, (ranks, *_) in CASES.items() if ranks > 1])
def test_gradients_and_figures_are_those_of_one_rank_on_the_joined_batch(folder: Path, name: str) -> None:
    (wanted, row), (found, told) = read(folder, "alone"), read(folder, name)
    assert found.keys() == wanted.keys() and len(wanted) > 300
    scale = max(float(x.abs().max()) for x in wanted.values())
    for key, gradient in wanted.items():
        largest = max(float(gradient.abs().max()), 1e-6 * scale)
        assert float((found[key] - gradient).abs().max()) <= OFF * largest, key
    for figure in ("loss", "hand_loss", "gradient_norm"):
        assert told[figure] == pytest.approx(row[figure], rel=1e-9), figure
    ranks, frames, *_ = CASES[name]
    own = CLIPS * frames // ranks  # the clips of the first rank are those of its group
    assert [pytest.approx(pair, rel=1e-9) for pair in row["clip_losses"][:own]] == told["clip_losses"]
    assert row["pose_share"] > 1e-3
    if own == CLIPS:
        assert told["pose_share"] == pytest.approx(row["pose_share"], rel=1e-9)


def test_two_runs_have_the_same_bits(folder: Path) -> None:
    (first, row), (second, told) = (read(folder, f"2 share a clip{again}") for again in ("", ", again"))
    assert [key for key, x in first.items() if not torch.equal(x, second[key])] == []
    assert {**row, "seconds": 0} == {**told, "seconds": 0}


def test_a_run_goes_on_on_other_ranks_where_it_was(folder: Path) -> None:
    """Frames over ranks, then parts of weights, then one rank: the bits that were saved, and one rank's three steps."""
    for number in range(1, len(RESUMED)):
        held = load_file(folder / f"read-{number}.safetensors")
        kept = checkpoint.load(folder / "resumed" / f"step-{number:08d}").tensors["model"]
        assert held.keys() == kept.keys() and [key for key, x in kept.items() if not torch.equal(x, held[key])] == []
    rows, wanted = (read_history(folder / run / "loss.jsonl") for run in ("resumed", "alone"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, alone in zip(rows, wanted, strict=True):
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-2)
        own = alone["clip_losses"][: len(row["clip_losses"])]  # sigma is drawn, and a latent's noise after it
        assert [[pytest.approx(x, rel=1e-3) for x in pair] for pair in own] == row["clip_losses"]
    states = [load_file(folder / run / "step-00000003" / "optimizer.safetensors") for run in ("resumed", "alone")]
    moments = {key: x for key, x in states[1].items() if key.endswith("/exp_avg")}
    largest = max(float(x.abs().max()) for x in moments.values())
    for key, moment in moments.items():
        torch.testing.assert_close(states[0][key], moment, rtol=1e-2, atol=1e-3 * largest, msg=key)


def test_ranks_look_skip_and_stop_together(folder: Path) -> None:
    """A clip that is not finite, a look at a held-out clip over the ranks, and a signal to one of them."""
    ends = [json.loads((folder / f"ended-{rank}.json").read_text()) for rank in range(2)]
    assert ends == [[False, 2, 1]] * 2 and (folder / "ended" / "step-00000002").is_dir()
    rows = read_history(folder / "ended" / "loss.jsonl")
    assert [row["is_skipped"] for row in rows] == [False, True] and "not finite" in rows[1]["why"]
    looks, (alone, *_) = (read_history(folder / run / "validation.jsonl") for run in ("ended", "alone"))
    assert [row["step"] for row in looks] == [0, 2] and alone["step"] == 0
    assert looks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    with av.open(str(folder / "ended" / "validation.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == FRAMES - 1 and all(frame.std() > 1 for frame in frames), (
        "all but the reference, each a picture"
    )


def test_memory_that_runs_out_on_one_rank_ends_all_with_a_sentence(folder: Path) -> None:
    said, seconds = json.loads((folder / "out.json").read_text())
    assert "memory ran out in step 1 on a rank with 2 frames of clips of 128x128x5" in said and seconds < 60
    assert "Give --memory-budget auto, --parallel.frames more ranks, or smaller clips" in said


def test_each_rank_has_its_part_of_a_batch_and_of_its_noise() -> None:
    """72 frames over 5 ranks; what is of the whole clip stays whole."""
    mesh: Any = object()  # is asked for nothing here
    groups = [FramesGroup(size=5, rank=rank, mesh=mesh) for rank in range(5)]
    assert [group.share(72) * 72 for group in groups] == pytest.approx([15, 15, 14, 14, 14])
    of_frames = torch.arange(72.0)
    one = torch.ones(())
    batch = Batch(
        latents=of_frames.expand(2, 72),
        pose=of_frames.expand(2, 72),
        loss_weight=of_frames.expand(2, 72),
        reference_latent=of_frames,
        reference_sigma=one,
        image_embedding=one,
    )
    draw = Draw(sigma=one, reference_sigma=one, is_dropped=one, noise=of_frames, reference_noise=of_frames)
    parts = [group.part(batch, [draw]) for group in groups]
    for name in ("latents", "pose", "loss_weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part, _ in parts], dim=1), getattr(batch, name))
    assert torch.equal(torch.cat([draws[0].noise for _, draws in parts]), of_frames)
    assert all(part.reference_latent is of_frames and draws[0].reference_noise is of_frames for part, draws in parts)
    alone = FramesGroup()
    assert alone.part(batch, [draw])[0] is batch and alone.share(72) == 1.0


def test_ranks_of_a_group_have_the_same_samples(tmp_path: Path) -> None:
    def ids(world_size: int, frames: int, **settings: int) -> list[list[list[int]]]:
        config = dataclasses.replace(tiny_config(tmp_path, **settings), kernels="fused")
        config = dataclasses.replace(config, parallel=ParallelConfig(frames=frames))
        ranks = [Ranks(rank=rank, world_size=world_size, device=torch.device("cpu")) for rank in range(world_size)]
        return [[list(micro) for micro in rank_sample_ids(config, rank)] for rank in ranks]

    found = ids(4, 2, batch_size=8, micro_batch_size=2)
    assert found[0] == found[1] == [[0, 1], [2, 3]] and found[2] == found[3] == [[4, 5], [6, 7]]
    with pytest.raises(
        ValueError, match=r"batch_size is 6 for 2 groups of 2 ranks of micro-batches of 2; give a multi"
    ):
        ids(4, 2, batch_size=6, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"parallel.frames is 3 and there are 4 rank\(s\); give torchrun"):
        ids(4, 3, batch_size=8)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("kernels is 'checkpoint', whose blocks see the frames of", {"kernels": "checkpoint"}),
        ("optimizer.in_backward as given takes whole clips", {"optimizer": OptimizerConfig(in_backward=True)}),
    ],
)
def test_what_takes_whole_clips_is_refused(words: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"parallel.frames is 2.* {words}"):
        dataclasses.replace(Config(), parallel=ParallelConfig(frames=2), **changes)


def test_numbers_of_frames_are_refused() -> None:
    data = dataclasses.replace(Config().data, num_frames=FRAMES, lengths=(3,))
    with pytest.raises(ValueError, match=r"parallel.frames is 4 and there are clips of 3 frames"):
        dataclasses.replace(
            Config(), data=data, sampling=tiny_config(Path("run")).sampling, parallel=ParallelConfig(frames=4)
        )
    with pytest.raises(ValueError, match=r"parallel\.frames is 0"):
        ParallelConfig(frames=0)
