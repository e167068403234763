"""Clips of several shapes: prepared in the size nearest the video's, trained in batches of one shape, planned for."""

import dataclasses
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
import videos
from people import Swaying
from tiny import MODEL, NoiseClips, tiny_config

from mimicmotion.data.cache import Manifest
from mimicmotion.data.clip_maker import Recipe
from mimicmotion.data.curate import Bounds
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.preparation import prepare, why_stale
from mimicmotion.json_values import from_json, to_json
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.planning.dry_stages import dry_stages
from mimicmotion.planning.fitting import Fitting
from mimicmotion.planning.memory_plan import choose_plan
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history
from mimicmotion.shapes import Bucket
from mimicmotion.trainer import Trainer
from mmkernels.choices import Choice, Modelled, Plan, read_plan

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
SIZES = ("64x128", "128x128")  # beside 128 x 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    clips = [
        videos.write_video(folder / f"{name}.mp4", length, height=height, width=width)
        for name, length, height, width in (
            ("tall", 9, 96, 52), ("wide", 9, 52, 96), ("square", 5, 72, 80), ("wide-short", 5, 60, 106),
        )
    ]  # fmt: skip
    recipe = Recipe(
        height=128, width=64, sizes=SIZES, num_frames=3, bounds=Bounds(min_frames=1, max_camera=9.0), workers=1
    )
    prepare(clips, folder, recipe=recipe, poses=Swaying(), encoder=PatchCodec())
    return folder


def shaped_config(folder: Path, prepared: Path, **trainer):
    config = tiny_config(folder, num_frames=5, **trainer)
    data = dataclasses.replace(
        config.data, prepared=prepared, height=128, width=64, sizes=SIZES, lengths=(3,), held_out=0
    )
    model = dataclasses.replace(MODEL, cross_attention_dim=1024)
    return dataclasses.replace(config, kernels="fused", data=data, model=model)


def dataset_of(config):
    data, settings = config.data, config.trainer
    return ClipDataset(data.prepared, data.num_frames, 0, batch_size=settings.batch_size, lengths=data.lengths)


def test_a_clip_is_prepared_in_the_size_nearest_its_videos_shape(prepared):
    manifest = Manifest.read(prepared)
    sizes = {clip.clip_id.rpartition("-")[0][:-9]: (clip.height, clip.width) for clip in manifest.clips}
    assert sizes == {"tall": (128, 64), "wide": (64, 128), "square": (128, 128), "wide-short": (64, 128)}
    for clip in manifest.clips:
        assert clip.crop.width / clip.crop.height == pytest.approx(clip.width / clip.height, rel=0.05)
    config = shaped_config(Path("run"), prepared)
    assert why_stale(manifest, config) is None
    fewer = dataclasses.replace(config, data=dataclasses.replace(config.data, sizes=SIZES[:1]))
    assert why_stale(manifest, fewer) == "further sizes ['64x128', '128x128'], not ['64x128']"
    assert from_json(to_json(config)) == config
    for wrong, words in (({"sizes": ("64",)}, "got size '64', wanted height x width"), ({"lengths": (5,)}, "below 5")):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(config.data, **wrong)


def test_of_one_shape_the_largest_size_that_the_video_fills():
    recipe = Recipe(height=1024, width=576, sizes=("512x288", "256x144", "576x1024"), num_frames=9)
    shaped = [recipe.shaped(*video) for video in ((1920, 1080), (1280, 720), (640, 360), (120, 60), (720, 1280))]
    assert [(found.height, found.width) for found in shaped] == [
        (1024, 576), (1024, 576), (512, 288), (256, 144), (576, 1024),
    ]  # fmt: skip


def test_a_run_trains_in_batches_of_one_shape(prepared, tmp_path, capsys):
    config = shaped_config(tmp_path, prepared, num_steps=6, batch_size=2, micro_batch_size=2)
    dataset = dataset_of(config)
    assert dataset.buckets == {
        Bucket(height=128, width=128, num_frames=5): 1,
        Bucket(height=64, width=128, num_frames=5): 2 + 1,
        Bucket(height=128, width=64, num_frames=5): 2,
    }
    shapes = [dataset.bucket_of(step) for step in range(6)]
    assert len(set(shapes)) == 3
    for step, shape in enumerate(shapes):
        for sample in (dataset.sample(step, sample_id) for sample_id in range(2)):
            assert sample["pose"].shape == (shape.num_frames, 3, shape.height, shape.width)
            assert sample["latents"].shape[-2:] == (shape.height // 8, shape.width // 8)
    trainer = Trainer(config, dataset, ONE)
    assert trainer.run()
    assert all(row["loss"] is not None for row in read_history(tmp_path / "loss.jsonl"))
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert json.loads((newest / "place.json").read_text())["num_samples"] == {
        "128x128x5": 1, "64x128x5": 3, "128x64x5": 2,
    }  # fmt: skip
    parts = list(islice(dry_stages([config, config], None), 6))  # those of the first stage
    assert parts[0] == f"stage 1 of 2: 6 steps of 2 clips, {tmp_path}"
    assert "clips: 4 and 0 held out in" in parts[1]
    assert "1 of 128x128x5, 2 of 128x64x5, 3 of 64x128x5; 2.0 epochs" in parts[1]
    assert [part.split(" of 5 frames, ")[1][:7] for part in parts[2:5]] == ["128x128", "128x64 ", "64x128 "]
    assert parts[5].startswith("time: not known without a card")


class Alternating(NoiseClips):
    """Noise of two shapes, one step after the other."""

    def bucket_of(self, step):
        return self.config.data.buckets[step % 2]

    def sample(self, step, sample_id):
        return NoiseClips(config=self.config.at(self.bucket_of(step))).sample(step, sample_id)


class Roomy:
    """An allocator that has seen exactly what was modelled."""

    def begin(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 10 << 30


def test_every_shape_has_a_plan_of_its_own_made_once_and_said(tmp_path, capsys):
    config = tiny_config(tmp_path / "planned", num_frames=4, num_steps=4)
    config = dataclasses.replace(config, kernels="fused", data=dataclasses.replace(config.data, lengths=(3,)))
    large, small = config.data.buckets
    cost = Modelled(peak_gib=10, recompute_flops_ratio=0, moved_gib=0, hidden_ratio=1, step_s=1)
    kept: dict[str, Choice] = {"mid_block.attentions.0/feed_forward_in": "keep"}
    plans = {
        large: Plan(recomputed_blocks=("mid_block.resnets.0",), modelled=cost, made_for={"card": "of the large"}),
        small: Plan(units=kept, modelled=cost, made_for={"card": "small"}),
    }
    made = []

    def fitting(bucket):
        made.append(bucket)
        return Fitting(plans[bucket], 10.0, lambda _: plans[bucket], Roomy(), ONE)

    first = fitting(large)
    first.another = fitting
    trainer = Trainer(config, Alternating(config=config), ONE, fitting=first)
    followed = []
    trainer.around_step = lambda step: followed.append(trainer.plan) or step()
    assert trainer.run()
    assert followed == [plans[large], plans[small]] * 2 and made == [large, small]
    said = capsys.readouterr().out
    assert said.count("clips of 128x128x3 (height x width x frames): plan for small") == 1
    assert said.count("clips of 128x128x4 (height x width x frames): plan for of the large") == 1
    folder = config.run_dir / "step-00000004"
    assert [read_plan(folder / name) for name in ("plan.json", "plan-128x128x3.json")] == [plans[large], plans[small]]
    plain = dataclasses.replace(config, run_dir=tmp_path / "plain")
    wanted = Trainer(plain, Alternating(config=plain), ONE)
    wanted.run()
    for name, value in wanted.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"of one shape, and there are 128x128x4 and 128x128x3; give"):
        choose_plan(dataclasses.replace(config, plan=Path("plan.json")), ONE)
