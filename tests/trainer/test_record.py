import dataclasses
import sys
import types
from xml.etree import ElementTree

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config

from mimicmotion.page import flat
from mimicmotion.run.record import Record
from mimicmotion.run.trackers import Trackers, by_sigma, scalars


def _row(step, *, is_skipped=False):
    return {
        "step": step, "loss": None if is_skipped else 1 / step, "gradient_norm": None if is_skipped else 2.0,
        "learning_rate": 1e-3, "is_skipped": is_skipped, "clip_losses": [] if is_skipped else [[0.2, 0.1], [5.0, 0.7]],
        "hand_loss": None if is_skipped or step == 3 else 0.9, **({"pose_share": 0.05} if step == 4 else {}),
        "num_clips": 8, "peak_gib": 21.5, "seconds": 3.0, "waiting_seconds": 1.0,
        **({"why": "<x>", "clips": ["a <b>"]} if is_skipped else {}),
    }  # fmt: skip


def test_figures_of_a_step():
    found = scalars(_row(4))
    assert found == {
        "loss": 0.25, "gradient_norm": 2.0, "learning_rate": 1e-3, "skipped": 0.0, "time/seconds a step": 4.0,
        "time/clips a second": 2.0, "time/share waiting for data": 0.25, "memory/peak GiB": 21.5,
        "loss by sigma/0 to 0.3": 0.1, "loss by sigma/3 to 10": 0.7,
        "loss in hands": 0.9, "PoseNet's share of conv_in": 0.05,
    }  # fmt: skip
    assert not {"loss in hands", "PoseNet's share of conv_in"} & set(scalars(_row(3)))  # no hand, not logged
    assert "loss" not in scalars(_row(4, is_skipped=True)) and scalars(_row(4, is_skipped=True))["skipped"] == 1.0


def test_a_sigma_on_an_edge_is_in_the_upper_bin_and_the_last_bin_is_open():
    bins = by_sigma([[0.3, 1.0], [0.29, 2.0], [0.5, 3.0], [1e4, 4.0]])
    assert bins == {"0 to 0.3": [2.0], "0.3 to 1": [1.0, 3.0], "30 and more": [4.0]}


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path):
    config = tiny_config(tmp_path)
    killed = Record(config, encoder="noise", resumed_step=0)
    for step in (1, 2, 3):  # the third is beyond the checkpoint
        killed.add(_row(step))
    killed.close()
    resumed = Record(config, encoder="noise", resumed_step=2)
    for step in (3, 4):
        resumed.add(_row(step))
    resumed.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]


@pytest.mark.pictures
def test_the_page_opens_by_itself_and_shows_what_the_run_did(tmp_path):
    config = tiny_config(tmp_path)
    record = Record(config, encoder="patch <codec>", resumed_step=0)
    record.plot()  # nothing yet: no page of nothing
    assert not (tmp_path / "index.html").exists()
    for step in (1, 2, 3):
        record.add(_row(step, is_skipped=step == 2))
    record.plot()
    record.close()
    page = (tmp_path / "index.html").read_text()
    assert "3 steps in 0.2 minutes, 25% waiting for data; skipped: 2" in page
    assert (
        '<th scope="row">0 to 0.3</th><td>0.1000 over 2 clips</td>' in page
        and '<th scope="row">optimizer.learning_rate</th><td>0.001</td>' in page
    )
    assert "patch &lt;codec&gt;" in page and "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("https://matplotlib.org", "").replace("http://creativecommons.org", "")
    assert "<video" not in page and "<!-- loss in hands -->" in page and "PoseNet's share" not in page
    for step in (4, 5):
        record.add(_row(step))
    record.plot()
    assert "<!-- PoseNet's share -->" in (tmp_path / "index.html").read_text()
    drawn = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}path"))) > 10
    (tmp_path / "sample.mp4").write_bytes(b"")
    record.plot()
    assert '<video src="sample.mp4"' in (tmp_path / "index.html").read_text()


def test_another_tracker_is_told_the_same_and_a_missing_one_is_named(tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", tracker="wandb")
    told = []
    stand_in = types.SimpleNamespace(
        init=lambda **about: told.append(("init", about["project"], about["name"])),
        log=lambda found, step: told.append((step, found["loss"])),
        finish=lambda: told.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    trackers = Trackers(config, resumed_step=0)
    trackers.log(_row(2))
    trackers.close()
    assert told == [("init", "mimicmotion", "run"), (2, 0.5), "finish"]
    monkeypatch.setitem(sys.modules, "trackio", None)
    missing = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, tracker="trackio"))
    with pytest.raises(ModuleNotFoundError, match=r"trainer.tracker trackio is not installed: pip install trackio"):
        Trackers(missing, resumed_step=0)


def test_nested_settings_have_dotted_names() -> None:
    assert dict(flat({"a": {"b": {"c": 1}, "d": {}}, "e": "f"})) == {"a.b.c": 1, "a.d": {}, "e": "f"}
