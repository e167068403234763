"""Held-out clips: which they are, what is said of them, and that looking changes nothing."""

import dataclasses

import av
import pytest
import torch
import videos
from people import Swaying
from tiny import tiny_config

from mimicmotion.data.curate import Bounds
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.held_out import split
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.model.unet import build_model
from mimicmotion.optimization.optimizer import build_optimization
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history
from mimicmotion.trainer import Trainer
from mimicmotion.validation import QUANTILES, Validation

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    recipe = Recipe(height=64, width=64, num_frames=4, bounds=Bounds(min_frames=1), workers=1)
    clips = [videos.write_video(folder / f"{number}.mp4", number) for number in (12, 13, 14)]
    prepare(clips, folder, recipe=recipe, poses=Swaying(), encoder=PatchCodec())
    return folder


def _config(run_dir, prepared, **trainer):
    config = tiny_config(run_dir, batch_size=1, num_steps=2, validate_share=1.0, **trainer)
    data = dataclasses.replace(config.data, prepared=prepared, height=64, width=64, held_out=0.4)
    model = dataclasses.replace(config.model, cross_attention_dim=1024)
    return dataclasses.replace(config, data=data, model=model)


def _run(config, *, looks):
    data = config.data
    dataset = ClipDataset(data.prepared, data.num_frames, 0, held_out=data.held_out)
    trainer = Trainer(config, dataset, ONE)
    if looks:
        held_out = ClipDataset(data.prepared, data.num_frames, 0, held_out=data.held_out, is_held_out=True)
        trainer.after_step = Validation(trainer, held_out).after_step
    trainer.run()
    return checkpoint.load(config.run_dir / "step-00000002")


def test_whole_videos_are_held_out_and_the_rest_is_trained_on(prepared):
    trained, held = (ClipDataset(prepared, 4, 0, held_out=0.4, is_held_out=side) for side in (False, True))
    assert len(trained.clip_ids) == 2 and len(held.clip_ids) == 1 == trained.num_held_out
    assert not set(trained.clip_ids) & set(held.clip_ids)
    assert trained.identity == held.identity  # of all of the folder: another share is no other footage
    assert {trained.clip_of(step, 0) for step in range(40)} == set(trained.clip_ids)
    clips = [*trained.manifest.clips, *held.manifest.clips]
    twice = [dataclasses.replace(clip, clip_id=f"{clip.clip_id} {part}") for clip in clips for part in (1, 2)]
    for seed in range(5):
        kept, out = split(twice, 0.4, seed)
        assert {name[:-2] for name in kept} & {name[:-2] for name in out} == set() and len(out) == 2
        assert split(twice[::-1], 0.4, seed)[1] == out[::-1]
    assert split(twice, 0.0, 0)[1] == [] and split(twice, 0.3, 0)[1] == []  # rounded down


def test_looking_says_the_loss_writes_a_video_and_changes_no_bit(prepared, tmp_path, capsys):
    plain = _run(_config(tmp_path / "plain", prepared), looks=False)
    looked = _run(_config(tmp_path / "looked", prepared, validate_every=1), looks=True)
    for group, tensors in plain.tensors.items():
        assert all(torch.equal(value, looked.tensors[group][name]) for name, value in tensors.items()), group
    rows = read_history(tmp_path / "looked" / "validation.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["losses"] != rows[1]["losses"]
    assert len(rows[0]["sigmas"]) == len(QUANTILES) and rows[0]["sigmas"] == sorted(rows[0]["sigmas"])
    assert rows[0]["loss"] == pytest.approx(sum(rows[0]["losses"]) / len(QUANTILES))
    assert f"step 2: held-out loss {rows[1]['loss']:.4f} over 1 clips" in capsys.readouterr().out
    with av.open(str(tmp_path / "looked" / "validation.mp4")) as video:
        assert [frame.width for frame in video.decode(video=0)] == [4 * 64] * 3
    page = (tmp_path / "looked" / "index.html").read_text()
    assert "Loss on 1 held-out clips, step 1 to 2" in page and 'src="validation.mp4"' in page


def test_a_run_that_gets_worse_than_what_it_began_with_says_at_which_levels(prepared, tmp_path, capsys):
    config = _config(tmp_path, prepared, validate_every=1)
    # a rate at which the weights are ruined in the first step, and an average that follows at once
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.1, warmup_steps=0, ema_decay=0.0)
    config = dataclasses.replace(config, optimizer=optimizer)
    data = config.data
    trainer = Trainer(config, ClipDataset(prepared, data.num_frames, 0, held_out=data.held_out), ONE)
    held_out = ClipDataset(prepared, data.num_frames, 0, held_out=data.held_out, is_held_out=True)
    validation = Validation(trainer, held_out)
    validation.begin()
    assert not (tmp_path / "validation.mp4").exists()
    trainer.after_step = validation.after_step
    trainer.run()
    rows = read_history(tmp_path / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    risen = [
        f"{after:.4f} from {before:.4f} at sigma {sigma:.2g}"
        for sigma, before, after in zip(rows[0]["sigmas"], rows[0]["losses"], rows[2]["losses"], strict=True)
        if after / before > 1.05
    ]
    assert risen and f"above that of the weights it began with, {'; '.join(risen)}. " in capsys.readouterr().out
    # a resumed run holds its losses against the same first ones, and does not look again
    again = Validation(Trainer(config, trainer.dataset, ONE, resume=True), held_out)
    again.begin()
    assert again._first == rows[0] and read_history(tmp_path / "validation.jsonl") == rows


def test_a_look_is_at_the_averaged_weights_and_they_are_put_back(tmp_path):
    config = tiny_config(tmp_path)
    model = build_model(config.model)
    optimization = build_optimization(model, config, scales_loss=False)
    before = {name: weight.detach().clone() for name, weight in optimization.live.items()}
    assert optimization.average is not None
    for shadow in optimization.average.shadows.values():
        shadow.add_(1.0)
    with pytest.raises(KeyError), optimization.averaged():
        assert all(torch.equal(w, before[name] + 1.0) for name, w in optimization.live.items())
        raise KeyError("what goes wrong inside")
    assert all(torch.equal(w, before[name]) for name, w in optimization.live.items())


def test_memory_that_runs_out_in_a_look_ends_no_run(prepared, tmp_path, capsys, monkeypatch):
    def run_out(*_args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Validation, "_look", run_out)
    _run(_config(tmp_path, prepared, validate_every=1), looks=True)
    assert "step 1: no memory to look at held-out clips; --data.held-out 0" in capsys.readouterr().out


def test_looks_are_put_off_beyond_their_share_of_the_time(prepared, tmp_path):
    config = _config(tmp_path, prepared, validate_every=1)
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, validate_share=0.0))
    _run(config, looks=True)
    assert read_history(tmp_path / "validation.jsonl") == []
