"""evaluate.py on folders of videos and of frames: what is paired, what is written, two of them against each other."""

import json

import av
import cv2
import numpy as np
import pytest
import torch
import videos
from people import Swaying

from mimicmotion import evaluate
from mimicmotion.data.footage import decode
from mimicmotion.evaluate import Arguments, run
from mimicmotion.evaluation import tools as evaluation_tools
from mimicmotion.evaluation.compared import Compared, FolderClips
from mimicmotion.evaluation.figures import measure
from mimicmotion.evaluation.tools import Tools

NAMES = [f"dance{number}" for number in range(6)]
FRAMES, HEIGHT, WIDTH = 6, 64, 48


def frames(number, brighter=0):
    pictures = [videos.picture(3 * number + index, HEIGHT, WIDTH) for index in range(FRAMES)]
    return [np.clip(picture.astype(int) + brighter, 0, 255).astype(np.uint8) for picture in pictures]


def write_folder(folder, pictures):
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):  # 10 comes after 9, not after 1
        cv2.imwrite(str(folder / f"frame_{index + 8}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


@pytest.fixture
def split(tmp_path):
    """True frames as TikTok's folders, generated ones of two models, the second further off in all but one clip."""
    for number, name in enumerate(NAMES):
        write_folder(tmp_path / "truth" / name / "images", frames(number))
        write_folder(tmp_path / "near" / name, frames(number, brighter=4))
        write_folder(tmp_path / "far" / name, frames(number, brighter=9 + number))
    return tmp_path


@pytest.fixture(autouse=True)
def swaying(monkeypatch):
    monkeypatch.setattr(evaluation_tools, "load_backend", lambda name, dwpose_dir: Swaying())


def result_of(folder, **words):
    run(Arguments(generated=folder, truth=folder.parent / "truth", **words))
    return json.loads((folder / "evaluate.json").read_text())


def test_folders_of_frames_are_paired_and_held_against_each_other(split, capsys):
    write_folder(split / "near" / "alone", frames(0))
    found = result_of(split / "near", against=split / "far")
    assert [row["clip"] for row in found["clips"]] == NAMES
    assert found["without_partner"] == [str(split / "near" / "alone")]
    printed = capsys.readouterr().out
    assert f"without a partner: {split / 'near' / 'alone'}" in printed
    row = found["clips"][2]
    assert (row["num_frames"], row["height"], row["width"]) == (FRAMES - 1, HEIGHT, WIDTH)
    assert row["generated_file"]["codec"] == "pictures (.png)" and row["resampling"] == "none"
    true, ours = (np.stack(frames(2, brighter=more))[1:] / 255 for more in (0, 4))
    wanted = np.mean(-10 * np.log10(((true - ours) ** 2).mean(axis=(1, 2, 3))))
    assert row["psnr_db"] == pytest.approx(wanted, abs=1e-3)
    assert found["psnr_db"] == pytest.approx(np.mean([row["psnr_db"] for row in found["clips"]]))
    still = np.mean(-10 * np.log10(((true - np.stack(frames(2))[:1] / 255) ** 2).mean(axis=(1, 2, 3))))
    assert row["repeating_the_reference"]["psnr_db"] == pytest.approx(still, abs=1e-3)
    assert row["motion_strength"] == pytest.approx(1, abs=0.05) and row["motion_distance_px"] == 0
    # The figure sways by 0.1 sin(t / 5) of the width.
    sway = np.mean([abs(np.sin(t / 5)) for t in range(1, FRAMES)]) * 0.1 * WIDTH
    assert row["repeating_the_reference"]["motion_distance_px"] == pytest.approx(sway, abs=1e-3)
    assert row["body_found"] == 1 and row["body_pck"] == 1 and 0 < row["person_share"] < 1
    test = found["against"]["tests"]["psnr_db"]
    assert test["num_clips"] == 6 and test["p_value"] == pytest.approx(2 / 64)
    assert "PSNR (dB): " in test["sentence"] and "better and hardly chance" in test["sentence"]
    assert test["sentence"] in " ".join(printed.split())
    assert {"torch", "opencv-python-headless", "decoder"} <= found["versions"].keys()
    assert set(found["missing"]) == {"identity", "lpips", "fvd", "fid_vid"}
    assert "swaying 1" in found["person"]["poses"]


def test_a_written_result_serves_as_the_other(split):
    far = result_of(split / "far")
    found = result_of(split / "near", against=split / "far" / "evaluate.json")
    assert found["against"]["result"]["psnr_db"] == far["psnr_db"]
    page = (split / "near" / "evaluate.html").read_text()
    assert "../far/evaluate/001-dance0.mp4" in page and "evaluate/001-dance0.png" in page
    assert found["against"]["settings_that_differ"] == []
    few = result_of(split / "near", against=split / "far", num_clips=5)
    assert few["against"]["tests"]["psnr_db"]["p_value"] is None
    assert "no test can tell" in few["against"]["tests"]["psnr_db"]["sentence"]


def test_results_of_other_frames_or_clips_are_refused(split):
    far = result_of(split / "far", num_clips=2)
    path = split / "far" / "evaluate.json"

    def refused(told, words, **more):
        path.write_text(json.dumps({**far, **more}))
        with pytest.raises(ValueError, match=told):
            result_of(split / "near", against=path, **words)

    refused("has no clip dance2", {"num_clips": 3})
    refused("against other frames", {"num_clips": 2, "num_frames": 4})
    refused("has seed 3", {"num_clips": 2}, seed=3)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"no evaluate\.json"):
        result_of(split / "near", against=path)


def test_what_an_evaluation_wrote_is_no_footage(split):
    result_of(split / "near")
    run(Arguments(generated=split / "truth", truth=split / "near", output=split / "truth" / "of" / "other.json"))
    found = result_of(split / "near")
    assert [row["clip"] for row in found["clips"]] == NAMES and found["without_partner"] == []
    (split / "near" / "evaluate.json").unlink()  # as one that was stopped leaves it
    assert [row["clip"] for row in result_of(split / "near")["clips"]] == NAMES


def test_another_result_is_of_the_same_clips_and_sizes(split):
    far = result_of(split / "far")
    found = result_of(split / "near", against=split / "far" / "evaluate.json", num_clips=2)
    assert found["against"]["result"]["psnr_db"] == pytest.approx(np.mean([x["psnr_db"] for x in far["clips"][:2]]))
    result_of(split / "far", size=(32, 24))
    with pytest.raises(ValueError, match=r"dance0 as \(5, 32, 24\) .* where this has \(5, 64, 48\)"):
        result_of(split / "near", against=split / "far" / "evaluate.json")


def test_the_first_frames_of_videos_at_other_rates_are_refused(tmp_path):
    for side, number, rate in (("generated", 3, 15), ("truth", 6, 30)):
        (tmp_path / side).mkdir()
        videos.write_video(tmp_path / side / "a.mp4", number, HEIGHT, WIDTH, rate)
    source = FolderClips(tmp_path / "generated", tmp_path / "truth")
    with pytest.raises(ValueError, match=r"a has 3 frames at 15 a second and 6 at 30: .* show other moments"):
        list(source.clips(num_clips=None, num_frames=3, size=None))
    videos.write_video(tmp_path / "truth" / "a.mp4", 3, HEIGHT, WIDTH, 30)  # as many: frame k is frame k
    assert len(list(source.clips(num_clips=None, num_frames=3, size=None))) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"num_clips": -1}, "got --num-clips -1, wanted 1 or more"),
        ({"num_frames": 0}, "got --num-frames 0, wanted 2 or more"),
        ({"size": (0, 8)}, "got --size 0 8, wanted a height"),
        ({"pck_threshold": float("nan")}, "got --pck-threshold nan, wanted a share"),
        ({"output": "page.html"}, r"wanted a \.json"),
    ],
)
def test_numbers_that_are_none_are_refused_before_any_work(split, words, told):
    words = {name: split / value if name == "output" else value for name, value in words.items()}
    with pytest.raises(ValueError, match=told):
        result_of(split / "near", **words)
    assert {path.name for path in (split / "near").iterdir()} == set(NAMES)


def test_videos_are_read_as_a_player_shows_them_and_sizes_are_asked_for(tmp_path):
    for side in ("generated", "truth"):
        (tmp_path / side).mkdir()
    true = videos.write_video(tmp_path / "truth" / "a.mp4", FRAMES, HEIGHT, WIDTH)
    videos.write_video(tmp_path / "generated" / "a.mkv", FRAMES + 2, HEIGHT * 2, WIDTH * 2)
    source = FolderClips(tmp_path / "generated", tmp_path / "truth")
    with pytest.raises(ValueError, match=r"8 frames of 96x128 and 6 frames of 48x64; give --num-frames .*--size"):
        list(source.clips(num_clips=None, num_frames=None, size=None))
    (clip,) = source.clips(num_clips=None, num_frames=5, size=(HEIGHT, WIDTH))
    shown = np.stack(list(decode(true)))
    assert np.array_equal(((clip.truth + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy(), shown[1:5])
    assert clip.generated.shape == (4, 3, HEIGHT, WIDTH) and "INTER_AREA" in clip.about["resampling"]
    assert clip.about["generated_file"]["codec"] == "h264" and clip.about["generated_file"]["height"] == 2 * HEIGHT


def test_what_cannot_be_compared_is_one_line(tmp_path):
    write_folder(tmp_path / "generated" / "one", frames(0))
    write_folder(tmp_path / "truth" / "two", frames(0))
    for words, told in (
        ({"generated": tmp_path / "generated", "truth": tmp_path / "truth"}, "has the same name"),
        ({"generated": tmp_path / "generated"}, "go together"),
        ({"generated": tmp_path / "generatde", "truth": tmp_path / "truth"}, "generatde is not a folder .*generated"),
        ({"run_dir": tmp_path, "size": (64, 64)}, "for folders of frames"),
    ):
        with pytest.raises(ValueError, match=told) as stopped:
            run(Arguments(**words))
        assert "\n" not in str(stopped.value)
    videos.write_video(tmp_path / "truth" / "two.mp4", 3)
    with pytest.raises(ValueError, match="two stands for"):
        FolderClips(tmp_path / "generated", tmp_path / "truth")
    (tmp_path / "truth" / "two.mp4").rename(tmp_path / "truth" / "one.mp4")
    (tmp_path / "generated" / "one" / "frame_9.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"frame_9\.png is no picture"):
        list(FolderClips(tmp_path / "generated", tmp_path / "truth").clips(num_clips=1, num_frames=None, size=None))


def test_frames_that_are_the_same_have_no_psnr_and_the_json_stays_json(split):
    write_folder(split / "same" / "dance0", frames(0))
    found = result_of(split / "same", poses="none")
    assert (
        found["clips"][0]["psnr_db"] is None and "psnr_db" not in found and found["ssim"] == pytest.approx(1, abs=1e-3)
    )
    assert found["missing"]["poses"] == "--poses none" and "body_pck" not in found
    with av.open(str(split / "same" / "evaluate" / "001-dance0.mp4")) as container:
        assert container.metadata["comment"].startswith("reference | generated | truth; ")
        assert sum(1 for _ in container.decode(video=0)) == FRAMES - 1


def test_frames_that_are_not_finite_are_no_same_frames():
    nothing = torch.full((2, 3, 16, 16), torch.nan)
    clip = Compared(
        name="a", generated=nothing, truth=nothing * 0, reference=nothing[:1], keypoints=None, frames_per_second=8.0,
        truth_sha256="",
    )  # fmt: skip
    with pytest.raises(ValueError, match="clip a: generated frames are not finite"):
        measure(clip, Tools())


def test_the_command_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--generated", str(tmp_path / "gone"), "--truth", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"evaluation stopped: .*gone is not a folder"):
        evaluate.main()
