"""The web page: a real server in a process of its own, asked over HTTP as its page does, and in a real browser."""

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import videos
from browser import CHROMIUM, Browser, browser
from people import Swaying
from picture_run import write_run
from PIL import Image

from mimicmotion import app
from mimicmotion.sampling import picture_to_video
from mimicmotion.sampling.picture_arguments import PictureArguments

pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
from served_page import API, Served, served_in

NUM_FRAMES = 7
LONG = 12  # steps of a job that others wait for


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with the stand-in for the encoder."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", num_steps=1)


@pytest.fixture(scope="module")
def server(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "tmp").mkdir()
    (folder / "secret.txt").write_text("a secret")
    (folder / "jobs").touch()
    with served_in(folder, "--run-dir", str(run_dir), "--max-upload-mib", "1", "--max-waiting", "2") as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(videos.picture(3, 120, 160)).save(folder / "me.png")
    Image.new("RGB", (160, 120)).save(folder / "nobody.png")
    (folder / "no.mp4").write_bytes(b"no video" * 100)
    return {
        "picture": folder / "me.png",
        "nobody": folder / "nobody.png",
        "no": folder / "no.mp4",
        "video": videos.write_video(folder / "dance.mp4", NUM_FRAMES, 96, 64),
    }


def shown(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_job_gives_what_sample_gives_beside_picture_and_poses(
    server: Served, files: dict[str, Path], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = server.make(server.upload(files["picture"]), server.upload(files["video"]), seed=3, guidance=2.5)
    assert ended["success"], ended["output"]
    steps = [part for said in ended["before"] if said["msg"] == "progress" for part in said["progress_data"]]
    assert {"dance.mp4: finding poses", "sampling", "decoding"} >= {part["desc"] for part in steps} != set()
    beside, alone, decided = ended["output"]["data"]
    assert "5 frames of 64x128 pixels" in decided and str(server.folder) not in decided
    for part, name in ((beside, "beside.mp4"), (alone, "alone.mp4")):
        (tmp_path / name).write_bytes(server.http.get(part["url"]).content)

    monkeypatch.setattr(picture_to_video, "load_backend", lambda *_, **__: Swaying())
    asked = PictureArguments(
        run_dir=run_dir, image=files["picture"], video=files["video"], out=tmp_path / "own.mp4", seed=3, num_steps=2,
        guidance=2.5, num_frames=6,
    )  # fmt: skip
    picture_to_video.make_videos(asked)
    own, wide = shown(tmp_path / "own.mp4"), shown(tmp_path / "beside.mp4")
    assert np.array_equal(shown(tmp_path / "alone.mp4"), own) and own.shape == (5, 64, 128, 3)
    assert wide.shape == (5, 64, 3 * 128, 3)
    assert np.abs(wide[:, :, 256:].astype(int) - own).mean() < 4  # two lossy files of the same frames
    still = np.asarray(Image.open(files["picture"]).resize((128, 96)))[16:80]
    assert np.abs(wide[:, :, :128].astype(int) - still).mean() < 6
    pose = wide[:, :, 128:256]
    assert (pose.max(axis=-1) < 40).mean() > 0.4 and pose.max() > 150  # strokes on black
    assert not np.array_equal(pose[0], pose[4])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"picture": None}, "give a picture of a person first"),
        ({"video": None}, "give a driving video first"),
        ({"video": "no"}, "video no.mp4 is not a video that can be opened: "),
        ({"picture": "no"}, "picture no.mp4 is no picture that can be read; give a PNG, JPEG or WebP"),
        ({"picture": "nobody"}, "picture nobody.png shows no person that swaying finds"),
        ({"sound": True}, "video dance.mp4 has no sound to copy"),
        ({"steps": 10**9}, "steps is 1000000000, wanted a number from 1 to 100"),
        ({"seed": 0.5}, "seed is 0.5, wanted a whole number"),
        ({"frames": "all"}, "frames is all, wanted a number from 1 to 300"),
        ({"fit": "stretch"}, "fit is stretch, wanted one of crop, pad"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    server: Served, files: dict[str, Path], changes: dict[str, Any], sentence: str
) -> None:
    given: dict[str, Any] = {"picture": "picture", "video": "video"} | changes
    uploads = {name: given.pop(name) for name in ("picture", "video")}
    sent = {name: None if key is None else server.upload(files[key]) for name, key in uploads.items()}
    before = server.made()
    ended = server.make(**sent, **given)
    assert not ended["success"] and sentence in ended["output"]["error"]
    assert "\n" not in ended["output"]["error"] and str(server.folder) not in ended["output"]["error"]
    assert server.made() == before


def test_nothing_outside_is_read(server: Served, files: dict[str, Path]) -> None:
    secret = server.folder / "secret.txt"
    served = next((server.folder / "runs/page").glob("served-*"))
    for path in (
        "/etc/passwd", secret, f"{served}/../../../secret.txt", "secret.txt", "runs/page/videos/0001.mp4",
        "http://127.0.0.1/x", f"{server.folder}/runs/page/videos/0001.mp4",
    ):  # fmt: skip
        for name in (f"{API}/file={path}", f"{API}/file={str(path).replace('/', '%2f')}"):
            answer = server.http.get(server.address + name)
            assert answer.status_code in (403, 404) and "secret" not in answer.text, name
    (served / "link.txt").symlink_to(secret)
    assert server.http.get(f"{server.address}{API}/file={served}/link.txt").status_code == 403
    video = server.upload(files["video"])
    for path in (str(secret), f"{served}/../../../secret.txt", f"{served}/link.txt", "http://127.0.0.1:1/x.png"):
        for picture in ({"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}, path):
            answer = server.ask(uuid.uuid4().hex, picture, video)
            assert answer.status_code == 403 and "was not uploaded here; upload it first." in answer.text
    for path in ("/proxy=http://127.0.0.1/x", "/runs", "/vibe-code", "/process_recording", "/deep_link", "/call/make"):
        for method in ("GET", "POST"):
            assert server.http.request(method, f"{server.address}{API}{path}").status_code in (404, 405), path
    assert server.http.get(server.address, headers={"Host": "elsewhere.example"}).status_code == 400


def test_uploads_are_capped(server: Served) -> None:
    too_large = {"files": ("large.mp4", bytes(2 * 2**20))}
    answer = server.http.post(f"{server.address}{API}/upload", files=too_large)
    assert answer.status_code == 413 and answer.text == "That is 2.0 MiB; at most 1.1 MiB are taken."
    many = [("files", (f"{index}.mp4", bytes(2**19))) for index in range(4)]
    assert server.http.post(f"{server.address}{API}/upload", files=many).status_code == 413
    parts = server.http.post(f"{server.address}{API}/upload", content=iter([bytes(2**19)] * 4))
    assert parts.status_code == 411
    lengthy = server.http.post(f"{server.address}{API}/queue/join", content=b"[" * 100_000)
    assert lengthy.status_code == 413
    held = sum(path.stat().st_size for path in (server.folder / "runs/page").rglob("large*"))
    assert held == 0


def test_one_at_a_time_in_turn_and_a_bounded_queue(server: Served, files: dict[str, Path]) -> None:
    picture, video = server.upload(files["picture"]), server.upload(files["video"])
    pages = [uuid.uuid4().hex for _ in range(4)]
    has_started, already = threading.Event(), len((server.folder / "jobs").read_text())

    def listen(index: int) -> None:
        for said in server.told(pages[index]):
            if said["msg"] == "process_starts":
                has_started.set()

    listeners = [threading.Thread(target=listen, args=(index,)) for index in range(3)]
    for index, each in enumerate(listeners):
        assert server.ask(pages[index], picture, video, seed=index, steps=LONG // (1 + index)).status_code == 200
        each.start()
        assert has_started.wait(60)
    refused = server.ask(pages[3], picture, video)
    for each in listeners:
        each.join(120)
    noted = (server.folder / "jobs").read_text()[already:].split()
    assert noted == ["begins", "0", "ends", "0", "begins", "1", "ends", "1", "begins", "2", "ends", "2"]
    assert refused.status_code == 503 and "full" in refused.text.lower()


def test_cancel_ends_a_job_and_keeps_nothing(server: Served, files: dict[str, Path]) -> None:
    picture, video = server.upload(files["picture"]), server.upload(files["video"])
    before, page = server.made(), uuid.uuid4().hex
    event = server.ask(page, picture, video, steps=100, frames=6).json()["event_id"]
    for said in server.told(page):
        if said["msg"] == "progress" and said["progress_data"][0]["desc"] == "sampling":
            break
    cancelled = {"fn_index": 1, "data": [], "session_hash": page}
    assert server.http.post(f"{server.address}{API}/run/cancel", json=cancelled).status_code == 200
    stopped = {"session_hash": page, "fn_index": 0, "event_id": event}
    assert server.http.post(f"{server.address}{API}/cancel", json=stopped).status_code == 200
    assert server.make(picture, video, steps=1)["success"]
    assert len(server.made()) == len(before) + 2  # of the job after it, which waited for the end of this one


def _until(opened: Browser, what: str, *, click: str = "", polls: int = 600) -> Any:
    """The value of an expression once it is true; a click is made again every 5 s, as one too early does nothing."""
    for poll in range(polls):
        if click and poll % 25 == 0:
            opened.ask("Runtime.evaluate", expression=click)
        found = opened.ask("Runtime.evaluate", expression=what, returnByValue=True)["result"].get("value")
        if found:
            return found
        time.sleep(0.2)
    page = opened.ask("Runtime.evaluate", expression="document.body.innerText", returnByValue=True)["result"]["value"]
    raise AssertionError(f"never: {what}\n{page}")


def _give(opened: Browser, which: int, path: Path, there: str) -> None:
    root = opened.ask("DOM.getDocument")["root"]["nodeId"]
    inputs = opened.ask("DOM.querySelectorAll", nodeId=root, selector="input[type=file]")["nodeIds"]
    opened.ask("DOM.setFileInputFiles", nodeId=inputs[which], files=[str(path)])
    _until(opened, f"document.querySelectorAll('{there}').length")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
def test_the_page_in_a_browser(server: Served, files: dict[str, Path], tmp_path: Path) -> None:
    click = "[...document.querySelectorAll('button')].find(each => each.innerText.trim() == 'Make the video').click()"
    with browser(tmp_path / "home") as opened:
        opened.ask("Page.navigate", url=server.address)
        _until(opened, "document.querySelectorAll('input[type=file]').length == 2")
        _until(opened, "document.body.innerText.includes('give a picture of a person first')", click=click)
        _give(opened, 0, files["picture"], 'img[src*="file="]')
        _give(opened, -1, files["video"], 'video[src*="file="]')
        opened.ask("Runtime.evaluate", expression=click)
        sizes = "[...document.querySelectorAll('video')].map(each => [each.videoWidth, each.videoHeight])"
        both = _until(opened, f"({sizes}).length == 2 && ({sizes})[1][0] && ({sizes})")
        assert both == [[64, 96], [3 * 128, 64]]
        text = _until(opened, "[...document.querySelectorAll('textarea')].map(each => each.value).join('')")
        assert "frames of 64x128 pixels" in text
        _until(opened, "document.querySelectorAll('a[href*=\".mp4\"]').length")
        sent = [event["params"] for event in opened.events if event.get("method") == "Network.requestWillBeSent"]
        foreign = [each["request"]["url"] for each in sent]
        assert [url for url in foreign if not url.startswith((server.address, "data:", "blob:"))] == []
        bad = [event for event in opened.events if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
        assert bad == []


def test_it_ends_with_one_line_and_leaves_its_videos_alone(server: Served, files: dict[str, Path]) -> None:
    """Last of all: Ctrl-C in the middle of a job."""
    assert server.make(server.upload(files["picture"]), server.upload(files["video"]), steps=1)["success"]
    before, page = server.made(), uuid.uuid4().hex
    assert server.ask(page, server.upload(files["picture"]), server.upload(files["video"]), steps=100).is_success
    for said in server.told(page):
        if said["msg"] == "progress" and said["progress_data"][0]["desc"] == "sampling":
            break
    said = len((server.folder / "stderr").read_text())
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(180) == 0
    assert (server.folder / "stderr").read_text()[said:].strip() == "Ctrl-C: the page ends, and what it was making"
    found = {path.name for path in server.folder.iterdir()}
    assert found == {"jobs", "runs", "secret.txt", "stderr", "tmp"}
    assert [path.name for path in (server.folder / "runs/page").iterdir()] == ["videos"] and server.made() == before
    assert [path for path in (server.folder / "tmp").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--run-dir", "gone"], "page stopped: gone holds no checkpoint"),
        (["--host", "192.0.2.1"], "page stopped: 192.0.2.1:7860 cannot be served at ("),
        (["--max-frames", "0"], "page stopped: got --max-upload-mib, --max-frames or --max-waiting below 1"),
    ],
)
def test_what_cannot_begin(options: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py", *options])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
