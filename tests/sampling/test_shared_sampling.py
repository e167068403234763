"""Sampling over several ranks gives one rank's bits, also with more ranks than tiles; what stops one rank stops all."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import videos
from people import Swaying
from picture_run import write_run
from PIL import Image

from mimicmotion import sample
from mimicmotion.commands import one_sentence
from mimicmotion.config import Config
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.ranks.distributed import join_ranks
from mimicmotion.sampling import picture_arguments, picture_to_video
from mimicmotion.sampling.generation import load_averaged
from mimicmotion.sampling.picture_arguments import PictureArguments
from mimicmotion.sampling.sampler import tiles

NUM_FRAMES = 7  # of the driving video


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of a step with tiles of 4 frames, which overlap by one, a picture and a driving video."""
    folder = tmp_path_factory.mktemp("asked")
    Image.fromarray(videos.picture(3, 64, 64)).save(folder / "me.png")
    video = videos.write_video(folder / "dance.mp4", NUM_FRAMES, 96, 64, 30)
    given = {"image": folder / "me.png", "video": video, "size": "64x64", "num_steps": 2}
    return {"run_dir": write_run(folder / "run", num_steps=1)} | given


@pytest.fixture(autouse=True)
def without_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poses that need no model, three frames decoded together, and frames as they are made: x264 gives the same frames
    other bytes now and then.
    """

    def write(path: Path, frames: Iterable[torch.Tensor], **_: object) -> None:
        np.save(path.with_suffix(".npy"), np.stack([frame.numpy() for frame in frames]))

    def as_asked(arguments: PictureArguments, config: Config) -> Config:
        given = picture_arguments.as_asked(arguments, config)
        return dataclasses.replace(given, sampling=dataclasses.replace(given.sampling, decode_frames=3))

    monkeypatch.setattr(picture_to_video, "as_asked", as_asked)
    monkeypatch.setattr(picture_to_video, "load_backend", lambda *_, **__: Swaying())
    monkeypatch.setattr(picture_to_video, "write_video", write)


def over(folder: Path, num_ranks: int, **arguments: Any) -> list[forked.End]:
    """sample.py on so many ranks, and for one as many threads as each of several has."""

    def work(_: int) -> None:
        with one_sentence("sampling stopped", debug=False), join_ranks() as ranks:
            assert sample.run(sample.Arguments(**arguments), ranks)

    return forked.ranks(folder, num_ranks, work)


def test_ranks_share_tiles_and_passes_and_write_one_ranks_video(asked: dict[str, Any], tmp_path: Path) -> None:
    config, *_ = load_averaged(asked["run_dir"])
    assert len(tiles(NUM_FRAMES + 1, config.data.num_frames, config.sampling.tile_overlap)) == 3
    made = {}
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        out = folder / "out.mp4"
        ends = over(folder, num_ranks, **asked, guidance=2.0, seeds=(0, 5), out=out, beside=True)
        assert [end.code for end in ends] == [0] * num_ranks, ends
        assert [end.said for end in ends[1:]] == [""] * (num_ranks - 1)
        shares = f"{num_ranks} ranks share 12 tiles of each step\n"
        assert (shares in ends[0].said) == (num_ranks > 1) and "written: " in ends[0].said
        made[num_ranks] = [np.load(folder / f"out-seed{name}.npy") for name in ("0", "5", "0-beside")]
    assert [frames.shape for frames in made[1]] == [(NUM_FRAMES, 64, width, 3) for width in (64, 64, 192)]
    assert not np.array_equal(made[1][0], made[1][1])
    assert all(map(np.array_equal, made[2], made[1]))


def test_ranks_without_a_tile_only_decode(asked: dict[str, Any], tmp_path: Path) -> None:
    made = []
    for num_ranks in (1, 4):
        ends = over(tmp_path, num_ranks, **asked, guidance=1.0, out=tmp_path / "out.mp4")
        assert [end.code for end in ends] == [0] * num_ranks, ends
        made.append(np.load(tmp_path / "out.npy"))
    assert "4 ranks share 3 tiles of each step; 1 only decode" in ends[0].said and np.array_equal(*made)


def test_a_rank_that_cannot_decode_ends_all_with_its_sentence(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = PatchCodec.decode

    def without_room(codec: PatchCodec, latents: torch.Tensor) -> torch.Tensor:
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("no room on this rank")
        return decode(codec, latents)

    monkeypatch.setattr(PatchCodec, "decode", without_room)
    ends = over(tmp_path, 2, **asked, noise="clip", out=tmp_path / "out.mp4")
    assert [end.code for end in ends] == [1, 1]
    assert ends[1].said.startswith("sampling stopped: the GPU's memory ran out (no room on this rank)")
    assert "sampling stopped" not in ends[0].said and "Traceback" not in ends[0].said + ends[1].said
    assert not (tmp_path / "out.npy").exists()


def test_what_is_refused_is_said_once(asked: dict[str, Any], tmp_path: Path) -> None:
    ends = over(tmp_path, 2, **(asked | {"video": tmp_path / "none.mp4"}), out=tmp_path / "out.mp4")
    assert [end.code for end in ends] == [1, 1]
    assert "".join(end.said for end in ends).count("none.mp4 is not there") == 1
