"""A real browser without a window, told what to do over a pipe (the Chrome DevTools Protocol)."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# What was drawn: text in our own SVG and pictures count where they have a size, and nothing is wider than the window.
_LOOK = """(() => {
  const size = node => { const box = node.getBoundingClientRect(); return [box.width, box.height]; };
  return {
    pictures: [...document.images].map(image => [image.naturalWidth, ...size(image), image.alt]),
    charts: [...document.querySelectorAll("svg")].filter(svg => svg.checkVisibility()).map(size),
    drawn: [...document.querySelectorAll("svg")].map(svg => svg.querySelectorAll("path,rect").length),
    width: document.documentElement.scrollWidth, window: innerWidth,
    scripts: document.scripts.length, text: document.body.innerText,
    background: getComputedStyle(document.body).backgroundColor,
  };
})()"""


@dataclass
class Browser:
    """One page at a time."""

    told: BinaryIO
    said: BinaryIO
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)  # what the page did unasked
    _number: int = 0

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self.told.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        self.told.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self.events.append(answer)

    def open(self, page: Path, *, width: int, is_dark: bool = False) -> dict[str, Any]:
        """Load a file at a width in pixels and wait until all of it is there; what _LOOK finds on it."""
        self.events.clear()
        scheme = "dark" if is_dark else "light"
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        found = self.ask("Runtime.evaluate", expression=_LOOK, returnByValue=True)
        return found["result"]["value"]

    def complaints(self) -> list[str]:
        """Errors and warnings of the last page, and whatever it asked for beside itself and what lies inside of it."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                found.append(json.dumps(params))
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                found += [url] if not url.startswith(("data:", "file:")) else []
        return found

    def picture(self, path: Path, *, most_height: int = 20_000) -> Path:
        """The whole page as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], most_height), "scale": 1}
        shot = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _read(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self.said.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return json.loads(message)


@contextmanager
def browser(home: Path) -> Iterator[Browser]:
    """Chromium with an empty home; it ends with the block."""
    assert CHROMIUM is not None
    to_browser, our_end = os.pipe()
    their_end, from_browser = os.pipe()
    command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'  # where the protocol's pipes must be
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", command, CHROMIUM, *options, f"--user-data-dir={home}"],
        pass_fds=(to_browser, from_browser),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home)},
    )
    os.close(to_browser)
    os.close(from_browser)
    with os.fdopen(our_end, "wb") as told, os.fdopen(their_end, "rb") as said:
        try:
            opened = Browser(told, said)
            target = opened.ask("Target.createTarget", url="about:blank")["targetId"]
            opened.session = opened.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for part in ("Page", "Runtime", "Log", "Network"):
                opened.ask(f"{part}.enable")
            yield opened
        finally:
            process.terminate()
            process.wait(30)
