"""The pages of a prepared folder, of a run and of an evaluation, opened from disk in a real browser."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import videos
from browser import CHROMIUM, Browser, browser
from drawn import inked_share
from test_record import _row
from test_report import prepare_in
from tiny import tiny_config

from mimicmotion.data.report_page import write_report
from mimicmotion.evaluate import Arguments, run
from mimicmotion.run.record import Record

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)"),
    pytest.mark.pictures,
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def report_in(folder: Path) -> Path:
    return write_report(prepare_in(folder))


def run_page_in(folder: Path) -> Path:
    record = Record(tiny_config(folder), encoder="patch <codec>", resumed_step=0)
    for step in (1, 2, 3):
        record.add(_row(step, is_skipped=step == 2))
    record.plot()
    record.close()
    return folder / "index.html"


@pytest.mark.parametrize("make", [report_in, run_page_in])
def test_a_page_opens_from_disk_and_shows_all_of_itself(opened: Browser, tmp_path: Path, make) -> None:
    page = make(tmp_path)
    grounds = {}
    for width in (400, 1400):
        for is_dark in (False, True):
            found = opened.open(page, width=width, is_dark=is_dark)
            assert opened.complaints() == []
            assert found["width"] <= found["window"] == width, "nothing must be scrolled to from side to side"
            assert found["charts"] and all(wide > 200 and high > 30 for wide, high in found["charts"])
            assert all(marks > 1 for marks in found["drawn"])
            assert all(stored > 0 and wide > 50 and alt for stored, wide, _, alt in found["pictures"])
            assert found["scripts"] == 0
            grounds[is_dark] = sum(map(int, re.findall(r"\d+", found["background"])))
    assert grounds[False] > 3 * 240 and grounds[True] < 3 * 40
    assert inked_share(opened.picture(tmp_path / "page.png")) > 0.02
    if make is report_in:
        assert len(found["pictures"]) == 2 and "1 clip of 1 video kept" in found["text"]
    else:
        assert "3 steps in 0.2 minutes" in found["text"]


def test_an_evaluation_shows_both_videos_of_each_clip_and_its_figures(opened: Browser, tmp_path: Path) -> None:
    for number in range(2):
        for name, shift in (("truth", 0), ("ours", 1), ("theirs", 2)):
            (tmp_path / name).mkdir(exist_ok=True)
            videos.write_video(tmp_path / name / f"dance {number} <a>.mp4", 12 + shift, 64, 48)
    asked = Arguments(
        generated=tmp_path / "ours", truth=tmp_path / "truth", against=tmp_path / "theirs", num_frames=9, poses="none"
    )
    run(asked)
    page = tmp_path / "ours" / "evaluate.html"
    for width, is_dark in ((400, True), (1400, False)):
        found = opened.open(page, width=width, is_dark=is_dark)
        assert opened.complaints() == [] and found["scripts"] == 0
        assert found["width"] <= found["window"] == width
        assert len(found["pictures"]) == 4 and all(stored == 144 and alt for stored, _, _, alt in found["pictures"])
    for words in ("dance 1 <a>", "no test can tell with fewer than 6", "repeating the reference", "Not measured: fvd"):
        assert words in found["text"]
    shown = "[...document.querySelectorAll('video')].map(v => [v.error === null, v.videoWidth, v.duration > 0.2])"
    waited = f"new Promise(done => setTimeout(() => done({shown}), 1000))"
    played = opened.ask("Runtime.evaluate", expression=waited, returnByValue=True, awaitPromise=True)
    assert played["result"]["value"] == [[True, 144, True]] * 4
    assert inked_share(opened.picture(tmp_path / "page.png")) > 0.02


def test_the_browser_sees_what_a_page_must_not_do(opened: Browser, tmp_path: Path) -> None:
    """That the checks above can fail: a page with an error, a wide box, a script, and a picture from elsewhere."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><div style='width:900px'>wide</div><img src='http://127.0.0.1:9/x.png' alt=''>"
        "<script>throw new Error('broken')</script>"
    )
    found = opened.open(bad, width=400)
    assert found["width"] > found["window"] and found["scripts"] == 1 and found["pictures"][0][0] == 0
    complaints = " ".join(opened.complaints())
    assert "broken" in complaints and "127.0.0.1:9" in complaints
