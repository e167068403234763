"""What of a web server is reachable: the page's own requests, at most so large, and files of one folder. An ASGI layer.

Gradio's server can do more than a page needs: fetch addresses, keep a history elsewhere, process recordings.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

API = "/gradio_api"
_PREFIXES = ("/assets/", "/static/", f"{API}/file=", f"{API}/heartbeat/", f"{API}/run/", f"{API}/queue/")
_CALLS = ("startup-events", "theme.css", "info", "upload", "upload_progress", "cancel")
_PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", *(f"{API}/{name}" for name in _CALLS))
# A browser asks nobody else on behalf of the page.
_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
# Of a request that is no upload: settings and the names of what was uploaded.
_MOST_BYTES = 64 * 1024


class Gate:
    """Answers what is not let through itself, with one sentence."""

    def __init__(self, app: Any, *, folder: Path, most_upload_bytes: int, hosts: tuple[str, ...] = ()) -> None:
        """folder: the one whose files are sent and named; most_upload_bytes: of one upload.

        hosts: names that the server answers to, so that no other site's name leads here; any where none is given.
        """
        self._app, self._folder, self._hosts = app, folder.resolve(), hosts
        self._most_upload_bytes = most_upload_bytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] == "http":
            refused = self._refused(scope)
            if refused is None and scope["method"] == "POST" and scope["path"] != f"{API}/upload":
                body = await _body(receive)
                outside = [name for name in _paths(body) if not self._is_ours(name)]
                refused = (403, f"{outside[0]!r} was not uploaded here; upload it first.") if outside else None
                receive = _again(body)
            if refused is not None:
                await _answer(send, *refused)
                return
        await self._app(scope, receive, _with_policy(send))

    def _refused(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """Status and sentence for a request that is not let through."""
        path, method, headers = scope["path"], scope["method"], dict(scope["headers"])
        if self._hosts and headers.get(b"host", b"").decode("latin-1").partition(":")[0] not in self._hosts:
            return 400, f"This page answers to {' and '.join(self._hosts)}."
        if method not in ("GET", "HEAD", "POST") or not (path in _PAGES or path.startswith(_PREFIXES)):
            return 404, "This page has nothing there."
        if path.startswith(f"{API}/file=") and not self._is_ours(path.partition("=")[2]):
            return 403, "Only files of this page are sent."
        if method == "POST":
            stated = headers.get(b"content-length", b"")
            most = self._most_upload_bytes + _MOST_BYTES if path == f"{API}/upload" else _MOST_BYTES
            if not stated.isdigit() or b"transfer-encoding" in headers:
                return 411, "Say how long the request is."
            if int(stated) > most:
                return 413, f"That is {int(stated) / 2**20:,.1f} MiB; at most {most / 2**20:,.1f} MiB are taken."
        return None

    def _is_ours(self, name: str) -> bool:
        """Whether a name is that of a file in the folder, links followed."""
        path = Path(name)
        return "\0" not in name and path.is_absolute() and path.resolve().is_relative_to(self._folder)


async def _body(receive: Any) -> bytes:
    parts, is_more = [], True
    while is_more:
        message = await receive()
        parts.append(message.get("body", b""))
        is_more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes) -> Any:
    """Receives a body that was read already."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    return receive


def _paths(body: bytes) -> Iterator[str]:
    """Every file or address that a JSON body names: what is called so, and any text that looks so."""
    try:
        waiting = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return  # refused further in
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield str(value["path"])
            waiting += [inner for name, inner in value.items() if name != "url"]  # which is not read
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and value.startswith(("/", "http:", "https:")):
            yield value


def _with_policy(send: Any) -> Any:
    async def sends(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
        await send(message)

    return sends


async def _answer(send: Any, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})
