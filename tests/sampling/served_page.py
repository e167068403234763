"""The server of app.py in a process of its own, asked over HTTP as its page does."""

import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from places import TESTS, python_path

API = "/gradio_api"


@dataclass
class Served:
    """The server, and what one page of it does."""

    process: subprocess.Popen[str]
    folder: Path  # where it was started
    address: str
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120))

    def upload(self, path: Path, name: str | None = None) -> dict[str, Any]:
        answer = self.http.post(f"{self.address}{API}/upload", files={"files": (name or path.name, path.read_bytes())})
        assert answer.status_code == 200, answer.text
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}

    def ask(self, page: str, picture: Any, video: Any, **changes: Any) -> httpx.Response:
        """Put a job into the queue."""
        wanted = {"seed": 0, "steps": 2, "guidance": 2.0, "frames": 5, "fit": "crop", "sound": False} | changes
        body = {"data": [picture, video, *wanted.values()], "fn_index": 0, "session_hash": page}
        return self.http.post(f"{self.address}{API}/queue/join", json=body)

    def told(self, page: str) -> Iterator[dict[str, Any]]:
        """What the queue says to a page, until its job has ended."""
        with self.http.stream("GET", f"{self.address}{API}/queue/data", params={"session_hash": page}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    said = json.loads(line.removeprefix("data:"))
                    yield said
                    if said["msg"] == "process_completed":
                        return

    def make(self, picture: Any, video: Any, **changes: Any) -> dict[str, Any]:
        """The end of a job, with all that was said before it."""
        page = uuid.uuid4().hex
        answer = self.ask(page, picture, video, **changes)
        assert answer.status_code == 200, answer.text
        before = list(self.told(page))
        return before[-1] | {"before": before}

    def made(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "runs/page/videos").glob("*"))


@contextmanager
def served_in(folder: Path, *options: str) -> Iterator[Served]:
    """Start the server in a folder, with `tmp` in it for temporary files and its stderr in a file; kill it after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "sampling/page_program.py"), *options, "--port", str(port)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": python_path(), "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "the page is at " in line), None)
        assert line is not None, (folder / "stderr").read_text()[-2000:]
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield Served(process, folder, line.split("the page is at ")[1].split("/, ")[0])
    finally:
        process.kill()
        process.wait(30)
