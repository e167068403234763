"""A run's folder that was copied elsewhere is a run like any other; clips that are not its own are refused or said."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import started
import videos
from people import Swaying

from mimicmotion import evaluate, export, sample
from mimicmotion.config import Config
from mimicmotion.data.cache import Manifest
from mimicmotion.data.curate import Bounds
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.json_values import from_json
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.run import checkpoint
from mimicmotion.run.resumption import of_other_clips

WORDS = [
    "--kernels", "torch", "--data.height", "64", "--data.width", "64", "--data.num-frames", "4",
    "--model.block-out-channels", "32", "32", "32", "32", "--model.num-attention-heads", "2", "2", "2", "2",
    "--model.layers-per-block", "1", "--sampling.num-steps", "1", "--sampling.tile-overlap", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    recipe = Recipe(height=64, width=64, num_frames=4, bounds=Bounds(min_frames=1), workers=1)
    prepare([videos.write_video(folder / "a.mp4", 6)], folder, recipe=recipe, poses=Swaying(), encoder=PatchCodec())
    return folder


def _train(prepared: Path, run_dir: Path, *words: str) -> str:
    command = ["mimicmotion/train.py", *WORDS, "--data.prepared", prepared, "--run-dir", run_dir, *words]
    done = started.python(command, environment=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def moved(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is no longer where it was trained, nor under its name."""
    folder = tmp_path_factory.mktemp("runs")
    _train(prepared, folder / "run", "--trainer.num-steps", "1")
    (folder / "run").rename(folder / "moved é")
    return folder / "moved é"


def test_it_samples_evaluates_exports_and_resumes_where_it_is(moved, prepared):
    sample.run(sample.Arguments(run_dir=moved))
    evaluate.run(evaluate.Arguments(run_dir=moved, num_clips=1))
    made = export.run(export.Arguments(run_dir=moved, layout="diffusers"))
    for name in ("sample.mp4", "sample.json", "evaluate.json", "index.html"):
        assert (moved / name).is_file(), name
    assert made.parent == moved / "export" and "# moved é, step 1" in (made / "README.md").read_text()
    assert "| psnr_db |" in (made / "README.md").read_text()
    assert f"manifest.json: `{checkpoint.file_sha256(prepared / 'manifest.json')}`" in (made / "README.md").read_text()
    said = _train(prepared, moved, "--resume", "--trainer.num-steps", "2")
    assert f"resumed {moved / 'step-00000001'} at step 1" in said
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(moved)] == [1, 2]
    assert {path.name for path in moved.parent.iterdir()} <= {moved.name, f".{moved.name}.lock", ".run.lock"}


def test_clips_of_another_encoder_or_size_are_refused_and_other_clips_said(moved, prepared, tmp_path):
    folder = checkpoint.newest(moved)
    assert folder is not None
    config: Config = from_json(json.loads((folder / "config.json").read_text()))
    own = Manifest.read(prepared)
    assert of_other_clips(folder, config, own) == []
    foreign = dataclasses.replace(own, encoder_name="owner/svd", encoder_version="0123")
    with pytest.raises(ValueError, match=r"latents of the encoder owner/svd, .* those of patch-codec \(stand-in\)"):
        of_other_clips(folder, config, foreign)
    assert of_other_clips(folder, config, dataclasses.replace(own, encoder_name="moved/svd")) == []  # the same weights
    larger = dataclasses.replace(own, clips=[dataclasses.replace(clip, height=128) for clip in own.clips])
    with pytest.raises(ValueError, match=r"of 128x64 pixels \(height x width\), and .* was trained on 64x64"):
        of_other_clips(folder, config, larger)
    more = [*own.clips, dataclasses.replace(own.clips[0], clip_id="b")]
    said = of_other_clips(folder, config, dataclasses.replace(own, clips=more))
    assert said == [f"1 of the 2 clips are none that {folder} was trained on"]
    shutil.copytree(prepared, tmp_path / "other")
    foreign.write(tmp_path / "other")
    for command, arguments in (
        (sample, sample.Arguments(run_dir=moved, prepared=tmp_path / "other", output=tmp_path)),
        (evaluate, evaluate.Arguments(run_dir=moved, prepared=tmp_path / "other", output=tmp_path / "e.json")),
    ):
        with pytest.raises(ValueError, match="latents of the encoder owner/svd"):
            command.run(arguments)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "sample.mp4").exists() and not (tmp_path / "e.json").exists()
