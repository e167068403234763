"""A picture and a driving video in, a video out: with a run's folder, with weights, with what is wrong with files."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import videos
from people import Swaying
from picture_run import write_run
from PIL import Image

from mimicmotion import sample
from mimicmotion.commands import one_sentence
from mimicmotion.config import PRESETS
from mimicmotion.data.progress import VideoProgress
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.sampling import picture_to_video
from mimicmotion.sampling.animation import generate_latents, steer
from mimicmotion.sampling.generation import load_averaged
from mimicmotion.sampling.picture_to_video import make_videos

NUM_FRAMES, RATE = 7, 30


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with the stand-in for the encoder and fused kernels; tiles of 4 frames."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", num_steps=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture of another shape than the run's, a driving video, and one with sound."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(videos.picture(3, 120, 160)).save(folder / "me.png")
    silent = videos.write_video(folder / "dance.mp4", NUM_FRAMES, 96, 64, RATE)
    return {"image": folder / "me.png", "video": silent, "loud": with_sound(folder / "loud.mkv")}


def with_sound(path: Path) -> Path:
    """A video of a quarter of a second with two seconds of a 440 Hz tone."""
    with av.open(str(path), "w") as container:
        film, sound = container.add_stream("libx264", rate=RATE), container.add_stream("aac", rate=44100, layout="mono")
        film.width, film.height, film.pix_fmt = 64, 96, "yuv420p"
        for index in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(videos.picture(index, 96, 64), format="rgb24")
            container.mux(film.encode(frame))
        tone = np.sin(2 * np.pi * 440 * np.arange(2 * 44100) / 44100).astype(np.float32)[None]
        for start in range(0, tone.shape[1] - 1024, 1024):
            part = av.AudioFrame.from_ndarray(tone[:, start : start + 1024].copy(), format="fltp", layout="mono")
            part.sample_rate, part.pts = 44100, start
            container.mux(sound.encode(part))
        for stream in (film, sound):
            container.mux(stream.encode(None))
    return path


@pytest.fixture(autouse=True)
def swaying(monkeypatch: pytest.MonkeyPatch) -> Swaying:
    poses = Swaying()
    monkeypatch.setattr(picture_to_video, "load_backend", lambda *_, **__: poses)
    return poses


def asked(run_dir: Path, files: dict[str, Path], out: Path, **changes: Any) -> sample.Arguments:
    given: dict[str, Any] = {"run_dir": run_dir, "image": files["image"], "video": files["video"], "out": out} | changes
    return sample.Arguments(**given)


def shown(path: Path) -> tuple[np.ndarray, float, str]:
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return frames, float(container.streams.video[0].average_rate or 0), container.metadata["comment"]


def test_a_video_for_each_seed_at_the_runs_size(run_dir, files, tmp_path, swaying, capsys):
    kept = tmp_path / "dance.safetensors"
    both = make_videos(asked(run_dir, files, tmp_path / "both.mp4", seeds=(3, 0), poses=kept))
    assert [path.name for path in both] == ["both-seed3.mp4", "both-seed0.mp4"]
    frames, rate, comment = shown(both[1])
    assert frames.shape == (NUM_FRAMES, 64, 128, 3) and rate == RATE
    assert "patch-codec (stand-in)" in comment and "seed 0" in comment and "me.png" in comment
    printed = capsys.readouterr().out
    assert "7 frames of 64x128 pixels" in printed and "sampling: " in printed and "written: " in printed

    again = asked(run_dir, files, tmp_path / "again.mp4", seed=0, poses=kept, video=None)
    num_videos = swaying.num_videos
    assert sample.run(again)
    assert swaying.num_videos == num_videos + 1  # the picture alone: the video's poses were kept
    assert np.array_equal(shown(tmp_path / "again.mp4")[0], frames)
    assert not np.array_equal(shown(both[0])[0], frames)


def test_weights_give_what_their_run_gives(run_dir, files, tmp_path, monkeypatch):
    config, model, _ = load_averaged(run_dir)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    monkeypatch.setitem(PRESETS, "demo", lambda: config)
    given: dict[str, Any] = {"weights": tmp_path / "w.pth", "preset": "demo", "size": "64x128"}
    make_videos(asked(run_dir / "gone", files, tmp_path / "w.mp4", **given))
    make_videos(asked(run_dir, files, tmp_path / "run.mp4"))
    assert np.array_equal(shown(tmp_path / "w.mp4")[0], shown(tmp_path / "run.mp4")[0])
    without = {name: x for name, x in model.state_dict().items() if name.startswith("unet.")}
    without |= {name: torch.zeros_like(x) for name, x in model.state_dict().items() if name.startswith("pose_net.")}
    torch.save(without, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no PoseNet"):
        make_videos(asked(run_dir, files, tmp_path / "n.mp4", weights=tmp_path / "none.pth", preset="demo"))


def test_rate_length_size_and_sound(run_dir, files, tmp_path):
    given = asked(
        run_dir, files, tmp_path / "a.mp4", video=files["loud"], fps=15.0, size="128x64", fit="pad", sound=True
    )
    make_videos(given)
    frames, rate, _ = shown(tmp_path / "a.mp4")
    assert frames.shape == (4, 128, 64, 3) and rate == 15  # poses 0, 2, 4 and 6 of 30 a second
    with av.open(str(tmp_path / "a.mp4")) as container, av.open(str(files["loud"])) as source:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
        played = np.concatenate([frame.to_ndarray() for frame in source.decode(audio=0)], axis=1)
    length = heard.shape[1] / 44100
    assert abs(length - 4 / 15) < 0.05 and np.abs(heard[0, 2048:8192]).max() > 0.5
    np.testing.assert_allclose(heard[:, 2048:8192], played[:, 2048:8192], atol=1e-3)
    make_videos(asked(run_dir, files, tmp_path / "b.mp4", num_frames=3))
    assert len(shown(tmp_path / "b.mp4")[0]) == 2


def test_a_budget_chooses_and_refuses(run_dir, files, tmp_path, capsys):
    make_videos(asked(run_dir, files, tmp_path / "a.mp4", memory_budget=1.0, size="64x64"))
    assert "memory budget 1.00 GiB: 6 of up to 6 tiles together (modelled)" in capsys.readouterr().out
    make_videos(asked(run_dir, files, tmp_path / "b.mp4", size="64x64"))
    one, other = shown(tmp_path / "a.mp4")[0].astype(int), shown(tmp_path / "b.mp4")[0]
    assert np.abs(one - other).mean() < 3  # rounding, through a lossy codec
    with pytest.raises(ValueError, match=r"takes 0\.\d+ GiB \(modelled\) and the budget is 0\.001: give a smaller"):
        make_videos(asked(run_dir, files, tmp_path / "c.mp4", memory_budget=0.001))
    assert not (tmp_path / "c.mp4").exists()


def test_a_budget_counts_the_latents_of_a_long_clip(run_dir, monkeypatch):
    """20,000 frames: five tensors of 20000 x 4 x 128 x 72 floats are 13.7 GiB beside the network."""
    config, *_ = load_averaged(run_dir)
    monkeypatch.setattr(picture_to_video.sampling_memory, "network_bytes", lambda *given: given[-1] << 27)
    shape = (20000, 3, 1024, 576)
    assert picture_to_video._rows_at_once(config, torch.float32, shape, 1, 14.0, VideoProgress()) == 2
    with pytest.raises(ValueError, match=r"a tile of 4 frames .*, of 20000, takes 13\.9 GiB"):
        picture_to_video._rows_at_once(config, torch.float32, shape, 1, 13.5, VideoProgress())


def test_fused_kernels_sample_the_same_and_save_nothing(run_dir):
    """Weights that want gradients, as in training: under no_grad autograd still keeps nothing of a forward."""
    saved: list[torch.Size] = []
    torch.manual_seed(1)
    poses = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    latents = {}
    for kernels in ("fused", "torch"):
        config, model, _ = load_averaged(run_dir, kernels)
        model.requires_grad_(True)
        steered = steer(
            torch.zeros(3, 64, 64), poses, PatchCodec(), config, generators=[torch.Generator().manual_seed(0)]
        )
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
            latents[kernels] = generate_latents(model, *steered, config)
    assert saved == [] and not latents["fused"].requires_grad
    apart = (latents["fused"] - latents["torch"]).norm() / latents["torch"].norm()
    assert float(apart) < 1e-3


def test_no_file_that_is_read_is_written_over(run_dir, files, tmp_path):
    (tmp_path / "link.mp4").symlink_to(files["video"])
    before = files["video"].read_bytes()
    with pytest.raises(ValueError, match="which would take the place of"):
        make_videos(asked(run_dir, files, tmp_path / "link.mp4"))
    named = tmp_path / "a-seed1.mp4"
    named.write_bytes(before)
    with pytest.raises(ValueError, match=r"would take the place of .*a-seed1\.mp4"):
        make_videos(asked(run_dir, files | {"video": named}, tmp_path / "a.mp4", seeds=(0, 1)))
    assert files["video"].read_bytes() == named.read_bytes() == before


class Missing(Swaying):
    """Finds nobody in any video, and somebody in a picture."""

    def track(self, frames):
        found = super().track(frames)
        found.keypoints[1:] = 0
        return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": None}, "give who drives it: --video, or key points"),
        ({"video": None, "poses": Path("none.safetensors")}, "poses none.safetensors are not there; give --video"),
        ({"video": None, "poses": Path("x"), "sound": True}, "got --sound without --video"),
        ({"sound": True}, "has no sound to copy; leave out --sound"),
        ({"size": "100x64"}, "size 100x64 does not go through this UNet; give multiples of 64"),
        ({"image": Path("none.png")}, "picture none.png is not there"),
        ({"video": Path("none.mp4")}, "video none.mp4 is not there"),
        ({"out": Path("out.avi")}, "wanted a file that ends in .mp4"),
        ({"seeds": (1, 1)}, "wanted each once"),
        ({"num_frames": 1}, "wanted the reference and at least one frame"),
        ({"weights": Path("none.pth")}, "none.pth is not there"),
        ({"memory_budget": "auto"}, "got --memory-budget auto without a GPU"),
        ({"memory_budget": float("nan")}, "got --memory-budget nan, wanted a number of GiB over 0"),
        ({"fps": float("inf")}, "got --fps inf, wanted 0.1 to 240.0 frames a second"),
        ({"fps": 1e-4}, "got --fps 0.0001, wanted 0.1"),
        ({"first_guidance": float("nan")}, "sampling.first_guidance is nan; give 0 or more"),
        ({"guidance": float("inf")}, "sampling.guidance is inf; give 0 or more"),
        ({"reference_noise": -1.0}, "got noise of deviation -1.0 on the reference, wanted 0 or more"),
        ({"tile": 0}, "got --tile 0, wanted the reference and at least one frame"),
        ({"seeds": (0, 2**64)}, "got seed 18446744073709551616, wanted one of 64 bits"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(run_dir, files, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught, one_sentence("sampling stopped", debug=False):
        make_videos(asked(run_dir, files, **({"out": Path("out.mp4")} | changes)))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_people_missing_and_places_that_cannot_be_written(run_dir, files, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_to_video, "load_backend", lambda *_, **__: Missing())
    with pytest.raises(ValueError, match="shows a person in 1 of 7 frames"):
        make_videos(asked(run_dir, files, tmp_path / "a.mp4"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is no folder; give another place"):
        make_videos(asked(run_dir, files, tmp_path / "file" / "a.mp4"))
    with pytest.raises(ValueError, match="got --video, --seeds without --image; give the picture"):
        sample.run(sample.Arguments(run_dir=run_dir, video=files["video"], seeds=(1, 2)))
    with pytest.raises(ValueError, match="got --check-pose-order with --image; leave it out"):
        sample.run(asked(run_dir, files, tmp_path / "a.mp4", check_pose_order=True))

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(picture_to_video, "load_backend", lambda *_, **__: Swaying())
    monkeypatch.setattr("mimicmotion.model.encoders.PatchCodec.decode", full)
    with pytest.raises(MemoryError):
        make_videos(asked(run_dir, files, tmp_path / "a.mp4"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
