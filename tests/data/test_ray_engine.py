"""Preparing on a local Ray gives what the pool gives."""

import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import videos
from people import Swaying
from places import python_path
from stopped_prepare import LONGEST
from test_curation import dancing, write
from test_prepare import RECIPE, quiet
from test_stopping import start, wait_for

from mimicmotion.data.cache import Manifest, NotWritableError, is_prepared, load_intact
from mimicmotion.data.clip_maker import ClipMaker
from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.preparation import prepare
from mimicmotion.data.ray_engine import _python_path
from mimicmotion.model.encoders import PatchCodec


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    environment = {"env_vars": {"PYTHONPATH": f"{_python_path()}:{python_path()}"}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    yield
    ray.shutdown()


class Full(Swaying):
    """The disk is full at the second video, which is longer."""

    def track(self, frames) -> PoseTrack:
        found = super().track(frames)
        if len(found.keypoints) == 14:
            raise NotWritableError("full")
        return found


def test_ray_makes_the_same_clips(local_ray: None, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{number}.mp4", dancing(number, 12 + 2 * number)) for number in range(2)]
    paths.append(tmp_path / "text.mp4")
    paths[-1].write_text("no video")
    made: list[Manifest] = [
        prepare(
            paths, tmp_path / engine, recipe=RECIPE, poses=Swaying(), encoder=PatchCodec(), progress=quiet()[0],
            engine=engine,
        )
        for engine in ("pool", "ray")
    ]  # fmt: skip
    assert made[0] == made[1] and len(made[1].clips) == 2 and len(made[1].dropped) == 1
    with pytest.raises(NotWritableError, match="full"):
        prepare(
            paths, tmp_path / "full", recipe=replace(RECIPE, workers=1), poses=Full(), encoder=PatchCodec(),
            progress=quiet()[0], engine="ray",
        )  # fmt: skip


def test_a_maker_travels(tmp_path: Path) -> None:
    maker = ClipMaker(tmp_path, RECIPE, Swaying(), PatchCodec(), quiet()[0])
    again = pickle.loads(pickle.dumps(maker))
    assert again.recipe == RECIPE and again.poses.name == "swaying" and again.encoder.name == maker.encoder.name


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.deep)])
def test_a_signal_to_the_driver_ends_all_and_keeps_what_is_whole(tmp_path: Path, number: int) -> None:
    """Ray would take SIGTERM for itself."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    (tmp_path / "videos").mkdir()
    for name, length in (("a", 10), ("b", LONGEST)):
        videos.write_video(tmp_path / "videos" / f"{name}.mp4", length)
    process = start(tmp_path, "ray", script=Path(__file__).with_name("stopped_prepare.py"))
    wait_for(tmp_path / "ready", process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in out
    assert "what is whole stays, and the same command goes on from it" in out
    (tensors,) = (tmp_path / "prepared" / "clips").glob("*.safetensors")
    assert load_intact(tensors) is not None and not is_prepared(tmp_path / "prepared")
