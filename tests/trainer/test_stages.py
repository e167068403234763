"""Settings from a file, and a run in stages."""

import dataclasses
import re
import shutil

import pytest
import torch
import videos
import yaml
from people import Swaying
from places import ROOT

from mimicmotion import train
from mimicmotion.data.curate import Bounds
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.json_values import to_json
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint, record, settings_file
from mimicmotion.run.stopping import Stop

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


def _run_first(path, monkeypatch):
    """The run as a signal leaves it between its first stage and the next."""
    with monkeypatch.context() as patch:
        todo, original = iter([True]), train.train_stage
        patch.setattr(train, "train_stage", lambda *given, **more: next(todo, False) and original(*given, **more))
        assert not _run(path)


def test_stages_go_on_from_each_other_and_a_resumed_run_lands_in_the_right_one(prepared, tmp_path, capsys, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    assert _run(_file(tmp_path / "whole", prepared, STAGES))
    whole = checkpoint.load(tmp_path / "whole" / "run" / "step-00000001")  # the last stage's folder is the run's own
    assert not (tmp_path / "whole" / "run" / "stage-2").exists()
    assert whole.documents["state"]["average_steps"] == 3  # two of the first stage and one of the second
    steps = {float(value) for key, value in whole.tensors["optimizer"].items() if key.endswith("/step")}
    assert steps == {3.0}
    assert "begins with the weights, moments and moving average of" in capsys.readouterr().out
    page = (tmp_path / "whole" / "run" / "index.html").read_text()
    assert page.count("3 steps in") == 1 and (tmp_path / "whole" / "run" / "loss.png").is_file()
    _run_first(_file(tmp_path / "broken", prepared, STAGES), monkeypatch)
    page = (tmp_path / "broken" / "run" / "index.html").read_text()
    assert page.count("2 steps in") == 1 and checkpoint.folders(tmp_path / "broken" / "run") == []
    first = (tmp_path / "broken" / "run" / "stage-1" / "step-00000002" / "manifest.json").stat().st_mtime_ns
    assert _run(tmp_path / "broken" / "settings.yaml", "--resume")
    assert (tmp_path / "broken" / "run" / "stage-1" / "step-00000002" / "manifest.json").stat().st_mtime_ns == first
    newest = checkpoint.newest(tmp_path / "broken" / "run")
    assert newest == tmp_path / "broken" / "run" / "step-00000001"
    assert newest is not None
    broken = checkpoint.load(newest)
    for group, tensors in whole.tensors.items():
        assert all(torch.equal(value, broken.tensors[group][name]) for name, value in tensors.items()), group
    assert broken.documents["config"]["data"]["num_frames"] == 4
    rows = [row["step"] for row in record.rows_of(tmp_path / "broken" / "run")]
    assert rows == [1, 2, 3], "the earlier stage's steps come first"
    assert _run(tmp_path / "broken" / "settings.yaml") and checkpoint.is_run(tmp_path / "broken" / "run.1" / "stage-1")
    assert (tmp_path / "broken" / "run.1" / "step-00000001").is_dir(), "a new run moves all of the old one aside"


def test_a_run_of_other_stages_is_not_gone_on_with(prepared, tmp_path, monkeypatch, capsys):
    path = _file(tmp_path, prepared, STAGES)
    _run_first(path, monkeypatch)
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"run/stage-1 holds checkpoints, and the last stage of 1 lies in .*/run its"):
        _run(_file(tmp_path, prepared, STAGES[1:]), "--resume")
    shutil.copytree(run / "stage-1", run / "stage-2")  # as earlier versions laid a last stage out
    with pytest.raises(ValueError, match=r"the last stage of 2 lies in .*/run itself; .*, move all that .*/stage-2 ho"):
        _run(_file(tmp_path, prepared, STAGES), "--resume")
    for part in (run / "stage-2").iterdir():
        shutil.move(part, run / part.name)
    (run / "stage-2").rmdir()
    shutil.rmtree(run / "stage-1" / "step-00000002")  # to save room: its folder says that the stage was trained
    capsys.readouterr()
    assert _run(path, "--resume", "--trainer.num-steps", "3") and "stage 1 of 2" not in capsys.readouterr().out
    assert checkpoint.newest(run) == run / "step-00000003" and checkpoint.folders(run / "stage-1") == []
    with pytest.raises(ValueError, match=r"holds checkpoints of a last stage, and .*/stage-2 is not there: the settin"):
        _run(_file(tmp_path, prepared, [STAGES[0], *STAGES]), "--resume")


def test_a_stage_that_trains_other_parameters_begins_with_the_averaged_weights_and_fresh_moments(
    prepared, tmp_path, capsys
):
    other = [STAGES[0], {**STAGES[1], "optimizer": {"train": "pose_net|temporal"}}]
    assert _run(_file(tmp_path, prepared, other))
    first = checkpoint.load(tmp_path / "run" / "stage-1" / "step-00000002")
    second = checkpoint.load(tmp_path / "run" / "step-00000001")
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
    run = tmp_path / "run"
    assert first.optimizer.learning_rate == 1e-3 and first.optimizer.learning_rates == {"pose_net": 2e-3}
    assert [config.run_dir for config in (whole, first, second)] == [run, run / "stage-1", run]


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
