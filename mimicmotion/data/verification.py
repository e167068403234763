"""Whether a prepared folder still holds what its manifest names, by reading all of it again."""

from pathlib import Path

from mimicmotion.data.cache import Manifest, load_intact, stated_sha256
from mimicmotion.data.progress import VideoProgress


def damages(folder: Path, progress: VideoProgress | None = None) -> list[str]:
    """One line for each file of a prepared folder that is not as it was made; raises ValueError without a manifest."""
    files = Manifest.read(folder).files
    found = []
    with progress or VideoProgress() as shown:
        work = shown.start("reading all files again", len(files))
        for name, digest in files.items():
            why = _damage(folder / name, digest)
            if why is not None:
                found.append(f"{name} {why}")
            work.advance()
        work.finish()
    return found


def _damage(path: Path, digest: str) -> str | None:
    if not path.is_file():
        return "is missing"
    if load_intact(path) is None:
        return "is damaged"
    if stated_sha256(path) != digest:
        return "is whole, and is not the file that the manifest names"
    return None
