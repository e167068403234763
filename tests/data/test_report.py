"""The page of a prepared folder: numbers against a count of our own, escaping, pictures, a bound on its size."""

import dataclasses
import html
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import videos
from people import Swaying

from mimicmotion import prepare as command
from mimicmotion.charts import NUM_BINS, Axis
from mimicmotion.data import report_page
from mimicmotion.data.cache import Clip, Crop, Drop, Manifest
from mimicmotion.data.curate import GATES, Bounds, joint_moves
from mimicmotion.data.footage import decode
from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.data.report_page import MOST_DROPPED, MOST_KEPT, bounds_of, write_report
from mimicmotion.data.report_pictures import BEHIND, DIMMED, GAP, Strip, strips
from mimicmotion.data.watching import kept as read_watched
from mimicmotion.model.encoders import PatchCodec


def clip(number: int, source: str, **changes: Any) -> Clip:
    fields: dict[str, Any] = {
        "clip_id": f"clip-{number}", "source": source, "source_sha256": "", "source_height": 64, "source_width": 48,
        "frames_per_second": 20.0, "first_frame": 0, "num_frames": 30, "frame_stride": 1,
        "crop": Crop(left=0, top=0, width=48, height=64), "height": 128, "width": 96,
        "keypoints_file": "", "tensors_file": "",
        "statistics": {"num_frames": 30.0, "confidence": 0.9, "motion": 0.01},
    }  # fmt: skip
    return Clip(**fields | changes)


def manifest(clips: Sequence[Clip], dropped: Sequence[Drop], **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "height": 128, "width": 96, "num_frames": 16, "encoder_name": "codec", "encoder_version": "1",
        "scaling_factor": 1.0, "spatial_factor": 8, "pose_backend": "swaying", "pose_version": "1", "decoder": "none",
        "encoder_device": "cpu", "frame_stride": 1, "bounds": dataclasses.asdict(Bounds()),
    }  # fmt: skip
    return Manifest(clips=list(clips), dropped=list(dropped), **fields | changes)


def page_of(folder: Path, made: Manifest) -> str:
    made.write(folder)
    return write_report(folder).read_text(encoding="utf-8")


def section(page: str, start: str, end: str) -> str:
    return page[page.index(start) : page.index(end)]


def test_its_numbers_are_those_of_the_manifest(tmp_path: Path) -> None:
    clips = [clip(0, "/v/a.mp4"), clip(1, "/v/a.mp4", num_frames=50), clip(2, "/v/b.mp4", frames_per_second=40.0)]
    low = {"num_frames": 30.0, "confidence": 0.31, "motion": 0.5}
    weak = "has a mean body confidence of {}, less than 0.5"
    fast = "moves by {} torso lengths a frame, more than 0.3"
    dropped = [
        Drop(source="/v/b.mp4", stage="curate", reason=f"{weak.format(0.31)}; {fast.format(0.5)}", statistics=low),
        Drop(source="/v/c.mp4", stage="curate", reason=weak.format(0.25), statistics=low | {"motion": 0.02}),
        Drop(source="/v/d.mp4", stage="decode", reason="is damaged at frame 17: Invalid data"),
        Drop(source="/v/e.mp4", stage="decode", reason="is damaged at frame 3: Invalid data"),
        Drop(source="/v/f.mp4", stage="split", reason="has 9 frames, fewer than 16", statistics={"num_frames": 9.0}),
    ]
    page = page_of(tmp_path, manifest(clips, dropped))
    words = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "3 clips of 2 videos kept, 5 videos or stretches dropped; 6 videos looked at." in words
    assert "96x128 pixels, clips of 16 frames or more, 110 frames or 4.8 seconds of footage kept." in words
    rows = re.findall(
        r'<tr><td class="number">(\d+)</td><td class="wide">(.*?)<span.*?</span></td>\s*<td class="stage">(\w+)<', page
    )
    assert {(html.unescape(reason), stage): int(number) for number, reason, stage in rows} == {
        ("has a mean body confidence of …, less than 0.5", "curate"): 2,
        ("moves by … torso lengths a frame, more than 0.3", "curate"): 1,
        ("is damaged at frame …: Invalid data", "decode"): 2,
        ("has … frames, fewer than 16", "split"): 1,
    }
    gates = dict(re.findall(r"<h3>([\w ]+)</h3><figcaption>(.*?)</figcaption>", section(page, 'id="gates"', 'id="dr')))
    assert gates == {
        "frames": "at least 16; 1 of 6 outside",
        "confidence": "at least 0.5; 2 of 5 outside",
        "motion": "at least 0.002 and at most 0.3; 1 of 5 outside",
    }
    assert page.count("<article") == 8 and page.count("&#10007;") == 4
    order = [page.index(f"<h3>{name}.mp4") for name in "bcdef"]
    assert order == sorted(order), "what was looked into comes first, scraps last"


def test_each_bar_holds_the_clips_whose_figure_lies_in_it(tmp_path: Path) -> None:
    figures = np.random.default_rng(0).uniform(0, 1, 50)
    clips = [clip(index, "a", statistics={"confidence": value}) for index, value in enumerate(figures[:30])]
    drops = [Drop(source="b", stage="curate", reason="x", statistics={"confidence": value}) for value in figures[30:]]
    page = page_of(tmp_path, manifest(clips, drops))
    bars = re.findall(r"<title>([\d.]+) to ([\d.]+): (\d+) kept, (\d+) dropped</title>", page)
    expected = [np.histogram(part, NUM_BINS, (0, 1))[0] for part in (figures[:30], figures[30:])]
    found = {round(float(low) * NUM_BINS): (int(kept), int(dropped)) for low, _, kept, dropped in bars}
    assert found == {
        bin_: pair for bin_, pair in enumerate(zip(*map(np.ndarray.tolist, expected), strict=True)) if any(pair)
    }
    assert '<path class="bound" d="M120.0 0V' in page, "the bound of 0.5 stands in the middle of 240"


def test_far_bounds_share_an_axis_and_outliers_do_not_stretch_it() -> None:
    motion = Axis.of(np.array([0.01, 0.02, 0.0, 90.0]), [0.002, 0.3])
    assert 0.1 < motion.place(0.002) < motion.place(0.02) < motion.place(0.3) < 1
    assert (motion.place(0.0), motion.place(1e9)) == (0, 1)
    many = np.concatenate([np.linspace(0.1, 0.5, 200), [1e6]])
    assert Axis.of(many, [0.01]).high == pytest.approx(np.quantile(many, 0.98)) and Axis.of(many[:0], []).high > 0


def test_every_gate_is_shown_with_its_bounds() -> None:
    """Bounds are found by their names, so that a new gate needs no line in the page."""
    made = manifest([], [])
    for figure, names in GATES.items():
        assert sorted(bounds_of(figure, made).values()) == sorted(getattr(Bounds(), name) for name in names), figure
    assert bounds_of("num_frames", made) == {"least": 16.0} and bounds_of("new", made) == {}


def test_no_name_and_no_reason_is_obeyed(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\udcff\u202e.mp4"
    clips = [clip(index, f"/v/{evil}", notes=[evil]) for index in range(MOST_KEPT + 1)]
    dropped = [Drop(source=f"/v/{evil}", stage="decode", reason=f'"{evil}')] * (MOST_DROPPED + 1)
    statistics = {"<b onclick=x>": 1.0}
    clips[0] = clip(0, f"/v/{evil}", statistics=statistics)
    made = manifest(clips, dropped, encoder_name=evil, bounds={"min_<i>": 2.0})
    folder = tmp_path / "<u>&"
    page = page_of(folder, made)
    assert not re.search(r"<(script|img|i|u|b onclick)\b", page) and not re.search("[\x1b\udcff\u202e]", page)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 300 and "&lt;u&gt;&amp;" in page


class WeakInShort(Swaying):
    """Sure of the video of 24 frames, and not of that of 20."""

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        found = super().track(frames)
        if len(found.keypoints) == 20:
            found.keypoints[..., 2] = 0.4
        return found


def prepare_in(folder: Path) -> Path:
    """A prepared folder of three videos: one kept, one dropped for its poses, one that cannot be read."""
    good = videos.write_video(folder / "good.mp4", 24, height=160, width=120)
    weak = videos.write_video(folder / "weak & <wide>.mp4", 20, height=90, width=160)
    (folder / "text.mp4").write_text("no video")
    recipe = Recipe(height=64, width=64, num_frames=8, bounds=Bounds(min_sharpness=0), workers=1)
    paths = [good, weak, folder / "text.mp4"]
    made = prepare(paths, folder / "prepared", recipe=recipe, poses=WeakInShort(), encoder=PatchCodec())
    assert (len(made.clips), [drop.stage for drop in made.dropped]) == (1, ["curate", "decode"])
    return folder / "prepared"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_in(tmp_path_factory.mktemp("report"))


def strip_of(prepared: Path, part: Clip | Drop, *, seconds: float = 60.0) -> tuple[Strip, np.ndarray]:
    """The strip of a part, and its picture (H, W, 4) RGBA."""
    watched = read_watched(prepared / part.keypoints_file, part.source_height, part.source_width)
    (strip,) = strips([(part, watched)], seconds)
    picture = cv2.imdecode(np.frombuffer(strip.webp, np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture is not None
    return strip, picture[..., [2, 1, 0, 3]]


def test_a_strip_shows_frames_of_the_source_with_its_poses(prepared: Path) -> None:
    part = Manifest.read(prepared).clips[0]
    strip, picture = strip_of(prepared, part)
    assert strip.frames == (0, 12, 23) and strip.note == "" and picture.shape[:2] == (strip.height, strip.width)
    width = (strip.width - 2 * GAP) // 3
    assert not picture[:, width + 2 : width + GAP - 2, 3].any(), "nothing stands between frames"
    frames = list(decode(Path(part.source)))
    poses = read_watched(prepared / part.keypoints_file, 160, 120)
    assert poses is not None
    for place, index in enumerate(strip.frames):
        tile = picture[:, place * (width + GAP) :][:, :width, :3].astype(float)
        expected = cv2.resize(frames[index], (width, strip.height), interpolation=cv2.INTER_AREA) * BEHIND
        dark = np.full(expected.shape[:2], DIMMED)
        crop, scale = part.crop, strip.height / 160
        rows = slice(round(crop.top * scale), round((crop.top + crop.height) * scale))
        columns = slice(round(crop.left * scale), round((crop.left + crop.width) * scale))
        dark[rows, columns] = 1
        off = np.abs(tile - expected * dark[..., None]).max(axis=2)
        assert np.median(off) < 6, "where no pose is drawn it is the frame, dark outside of the crop"
        joints = (poses.track.keypoints[index, :18, :2] * (width, strip.height)).astype(int)
        on_joints = off[joints[:, 1].clip(0, strip.height - 1), joints[:, 0].clip(0, width - 1)]
        assert np.median(on_joints) > 40, "and at the joints it is not"


@pytest.mark.parametrize("what", ["missing", "another", "late", "no poses"])
def test_what_cannot_be_shown_is_said(tmp_path: Path, what: str) -> None:
    folder = prepare_in(tmp_path)
    part = Manifest.read(folder).clips[0]
    source, seconds = Path(part.source), 60.0
    said = {
        "missing": "the video is not there any more: the pose alone",
        "another": "the video has another size or length than when it was prepared: the pose alone",
        "late": "the time for pictures was over: the pose alone",
        "no poses": "the file of its poses is missing, damaged or another version&#x27;s",
    }[what]
    if what == "missing":
        source.unlink()
    elif what == "another":
        videos.write_video(source, 23, height=160, width=120)
    elif what == "late":
        seconds = -1.0
    else:
        (folder / part.keypoints_file).write_bytes(b"")
    page = write_report(folder, picture_seconds=seconds).read_text(encoding="utf-8")
    card = section(page, 'id="kept"', 'id="settings"')
    assert said in card and "data:image/webp" in card and ('class="chart"' in card) == (what != "no poses")
    if what != "no poses":
        _, picture = strip_of(folder, part, seconds=seconds)
        assert (picture[..., :3].max(axis=2) > 150).sum() > 100 and np.median(picture[..., :3]) < 30


def test_curves_are_those_of_the_gates_figures(prepared: Path) -> None:
    part = Manifest.read(prepared).clips[0]
    watched = read_watched(prepared / part.keypoints_file, part.source_height, part.source_width)
    assert watched is not None
    moves = joint_moves(watched, part.rows)
    assert moves.shape == (23, 18) and np.nanmean(moves) == pytest.approx(part.statistics["motion"])
    page = write_report(prepared).read_text(encoding="utf-8")
    most = float(moves.mean(axis=1).max())
    assert f"Motion, torso lengths a frame: at most {most:.3g}<" in page
    assert "Confidence of the body, 0 to 1: 0.90 to 0.90<" in page and "0 to 1: 0.40 to 0.40<" in page
    kept = section(page, 'id="kept"', 'id="settings"')
    path = re.findall(r'class="curve kept" d="(.*?)"', kept)[0]
    drawn = np.array([float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)])
    assert len(drawn) == 23, "no motion leads to the first frame"
    assert np.corrcoef(drawn, moves.mean(axis=1))[0, 1] < -0.99, "up is more"


def test_thousands_of_clips_make_a_page_of_bounded_size(prepared: Path, tmp_path: Path) -> None:
    """As many pictures as are shown at most, of real poses and a source that is there, and lines for the rest."""
    real = Manifest.read(prepared)
    folder = tmp_path / "many"
    shutil.copytree(prepared, folder)
    clips, dropped = real.clips * 6000, [real.dropped[0]] * 6000
    page = page_of(folder, dataclasses.replace(real, clips=clips, dropped=dropped))
    assert page.count("<article") == page.count("data:image/webp") == MOST_KEPT + MOST_DROPPED
    assert page.count("good.mp4</td>") == page.count("weak &amp; &lt;wide&gt;.mp4</td>") == report_page.MOST_ROWS
    assert f"and {6000 - MOST_KEPT - report_page.MOST_ROWS:,} more" in page and "6,000 clips of 1 video" in page
    assert len(page) < 8e6


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    command.main()


def test_the_command_reports_what_is_there_and_prepares_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[command.Arguments] = []
    monkeypatch.setattr(command, "run", lambda arguments: asked.append(arguments) or Manifest.read(prepared))
    (prepared / "report.html").unlink(missing_ok=True)
    run_command(monkeypatch, "--prepared", str(prepared), "--report")
    assert not asked and (prepared / "report.html").is_file()
    assert "1 clips kept, 2 videos or stretches of them dropped; see" in " ".join(capsys.readouterr().out.split())
    run_command(monkeypatch, "--prepared", str(prepared), "--report", "--videos", str(tmp_path))
    assert len(asked) == 1, "what was asked beside it is done first"
    with pytest.raises(SystemExit, match="nothing is prepared in"):
        run_command(monkeypatch, "--prepared", str(tmp_path / "none"), "--report")
    assert len(asked) == 2
    with pytest.raises(SystemExit, match="got --dry-run and --report, wanted one of them"):
        run_command(monkeypatch, "--prepared", str(prepared), "--report", "--dry-run")
