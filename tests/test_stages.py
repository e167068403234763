"""Settings from a file, and a run in stages."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import videos
import yaml
from people import Swaying

from mimicmotion import checkpoint, settings_file, train
from mimicmotion.data.curate import Bounds
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.distributed import Ranks
from mimicmotion.json_values import to_json
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.stopping import Stop

ROOT = Path(__file__).resolve().parents[1]
ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
BASE = {
    "kernels": "fused",
    "model": {
        "block_out_channels": [32, 32, 32, 32], "num_attention_heads": [2, 2, 2, 2], "addition_time_embed_dim": 8,
    },
    "optimizer": {"learning_rate": "1e-3", "warmup_steps": 0, "ema_decay": 0.5, "learning_rates": {"pose_net": 2e-3}},
    "sampling": {"tile_overlap": 0},
    "trainer": {"batch_size": 1, "precision": "fp32", "num_steps": 2},
}  # fmt: skip
STAGES = [{"data": {"num_frames": 3}}, {"data": {"num_frames": 4}, "trainer": {"num_steps": 1}}]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    recipe = Recipe(height=64, width=64, num_frames=4, bounds=Bounds(min_frames=1), workers=1)
    clips = [videos.write_video(folder / "dance.mp4", 12)]
    prepare(clips, folder, recipe=recipe, poses=Swaying(), encoder=PatchCodec())
    return folder


def _file(folder, prepared, stages, **more):
    path = folder / "settings.yaml"
    base = {**BASE, "data": {"prepared": str(prepared), "height": 64, "width": 64}, "run_dir": str(folder / "run")}
    path.write_text(yaml.safe_dump({**base, **more, "stages": stages}))
    return path


def _run(path, *words):
    words = ["--settings", str(path), *words]
    arguments = train.parse(words)
    return train.train(arguments, train.stages_of(words, arguments.config), ONE, Stop())


def test_stages_go_on_from_each_other_and_a_resumed_run_lands_in_the_right_one(prepared, tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    assert _run(_file(tmp_path / "whole", prepared, STAGES))
    whole = checkpoint.load(tmp_path / "whole" / "run" / "stage-2" / "step-00000001")
    assert whole.documents["state"]["average_steps"] == 3  # two of the first stage and one of the second
    steps = {float(value) for key, value in whole.tensors["optimizer"].items() if key.endswith("/step")}
    assert steps == {3.0}
    assert "begins with the weights, moments and moving average of" in capsys.readouterr().out
    page = (tmp_path / "whole" / "run" / "index.html").read_text()
    assert page.count("3 steps in") == 1 and (tmp_path / "whole" / "run" / "loss.png").is_file()
    assert _run(_file(tmp_path / "broken", prepared, STAGES[:1]))  # ended after the first stage
    first = (tmp_path / "broken" / "run" / "stage-1" / "step-00000002" / "manifest.json").stat().st_mtime_ns
    assert _run(_file(tmp_path / "broken", prepared, STAGES), "--resume")
    assert (tmp_path / "broken" / "run" / "stage-1" / "step-00000002" / "manifest.json").stat().st_mtime_ns == first
    newest = checkpoint.newest(tmp_path / "broken" / "run")
    assert newest == tmp_path / "broken" / "run" / "stage-2" / "step-00000001"
    assert newest is not None
    broken = checkpoint.load(newest)
    for group, tensors in whole.tensors.items():
        assert all(torch.equal(value, broken.tensors[group][name]) for name, value in tensors.items()), group
    assert broken.documents["config"]["data"]["num_frames"] == 4


def test_a_stage_that_trains_other_parameters_begins_with_the_averaged_weights_and_fresh_moments(
    prepared, tmp_path, capsys
):
    other = [STAGES[0], {**STAGES[1], "optimizer": {"train": "pose_net|temporal"}}]
    assert _run(_file(tmp_path, prepared, other))
    first = checkpoint.load(tmp_path / "run" / "stage-1" / "step-00000002")
    second = checkpoint.load(tmp_path / "run" / "stage-2" / "step-00000001")
    assert "moments begin anew, since other parameters are trained" in capsys.readouterr().out
    for name, value in second.tensors["model"].items():
        if not re.search("pose_net|temporal", name):
            assert torch.equal(value, first.tensors.get("ema", {}).get(name, first.tensors["model"][name])), name
    assert {float(v) for k, v in second.tensors["optimizer"].items() if k.endswith("/step")} == {1.0}


def test_what_is_typed_wins_over_the_stage_and_the_stage_over_the_file(prepared, tmp_path):
    words = ["--settings", str(_file(tmp_path, prepared, STAGES)), "--trainer.batch-size", "4"]
    whole = train.parse(words).config
    first, second = train.stages_of(words, whole)
    assert [config.trainer.num_steps for config in (whole, first, second)] == [2, 2, 1]
    assert [config.trainer.batch_size for config in (whole, first, second)] == [4, 4, 4]
    assert [config.data.num_frames for config in (first, second)] == [3, 4]
    assert first.optimizer.learning_rate == 1e-3 and first.optimizer.learning_rates == {"pose_net": 2e-3}
    assert first.run_dir == tmp_path / "run" / "stage-1" and whole.run_dir == tmp_path / "run"


def test_resolved_settings_are_read_back(tmp_path):
    config = train.parse(["--preset", "mimicmotion-16", "--optimizer.learning-rates", "pose_net", "1e-4"]).config
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, deterministic=True))
    settings_file.write(config, tmp_path)
    assert to_json(train.parse(["--settings", str(tmp_path / settings_file.FILE)]).config) == to_json(config)


WRONG = {
    "no file": (None, r"--settings: .*other.yaml is not there .*give a YAML file"),
    "no YAML": ("a: [", r"is no YAML \(while parsing"),
    "a list": ("- 1", "holds list, wanted settings by name"),
    "a typo": ("optimizer: {learning_rat: 1}", r"there is no setting optimizer.learning_rat; there are .*, eps,"),
    "a typo in a stage": ("stages: [{dat: {}}]", "stage 1: there is no setting dat; there are data,"),
    "stages as names": ("stages: {a: {}}", "stages of .* is no list of settings"),
    "a group as a number": ("data: 3", "data is 3; give its settings by name"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_by_name(case, tmp_path):
    text, said = WRONG[case]
    path = tmp_path / "other.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said):
        settings_file.read(path)


def test_the_recommended_recipe_is_read(monkeypatch):
    words = ["--settings", str(ROOT / "presets/progressive-72.yaml")]
    whole = train.parse(words).config
    stages = train.stages_of(words, whole)
    sizes = [(config.data.height, config.data.width, config.data.num_frames) for config in stages]
    assert sizes == [(576, 320, 16), (1024, 576, 16), (1024, 576, 72)]
    assert {config.optimizer.kind for config in stages} == {"adamw8bit"} and whole.memory_budget == "auto"
