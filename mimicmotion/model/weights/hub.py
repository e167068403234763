"""Weights on a hub: an id as owner/name or owner/name@revision -> a folder on this machine."""

import re
from pathlib import Path

from mimicmotion.model.weights.files import WeightsError
from mimicmotion.model.weights.reading import choose
from mimicmotion.paths import first_line

_ID = re.compile(r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(@(?P<revision>[\w./-]+))?")
_FILES = (".pth", ".safetensors", ".pt", ".bin", ".ckpt")


def is_hub_id(path: Path) -> bool:
    """Whether a path that is not there can be an id: two parts, no file's suffix, and no folder of the first part."""
    found = _ID.fullmatch(path.as_posix())
    return bool(found) and not path.exists() and path.suffix not in _FILES and not Path(found["owner"]).exists()


def fetch(path: Path) -> Path:
    """The folder that an id's UNet, and PoseNet where there is one, lie in, fetched or from the hub's cache.

    Raises WeightsError where the hub cannot be reached and nothing is cached, has no such model, or has no diffusers
    folder but several files.
    """
    import huggingface_hub

    found = _ID.fullmatch(path.as_posix())
    assert found is not None
    name, revision = f"{found['owner']}/{found['name']}", found["revision"]
    try:
        try:
            names = huggingface_hub.list_repo_files(name, revision=revision)
        except Exception as error:  # OSError, or of httpx or requests, by the hub's version: no network, or no model
            return _cached(name, revision, error)
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_wanted(path, names)))
    except WeightsError:
        raise
    except Exception as error:  # as above: the network may go at any time
        raise _unreachable(path, error) from error


def _cached(name: str, revision: str | None, error: Exception) -> Path:
    """What an earlier fetch left. Raises the error that kept the hub from being asked where there is nothing."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except OSError:
        raise error from None


def _unreachable(path: Path, error: Exception) -> WeightsError:
    why = first_line(error)[:200]
    return WeightsError(
        f"{path.as_posix()} is no path here and could not be had from the hub ({type(error).__name__}: {why}). Give a "
        "path, an id that is there (`hf auth login` where it asks for consent), or fetch it where there is a network: "
        f"`hf download {path.as_posix().partition('@')[0]}`"
    )


def _wanted(path: Path, names: list[str]) -> list[str]:
    """Patterns of what to fetch: config.json and weights under unet/ and pose_net/, or at the top of a UNet's own."""
    top = "unet/" if "unet/config.json" in names else ""
    parts = (top, "pose_net/")
    chosen = {part: choose(name.removeprefix(part) for name in names if name.startswith(part)) for part in parts}
    if chosen[top] is None or f"{top}config.json" not in names:
        files = [name for name in names if name.endswith(_FILES)]
        raise WeightsError(
            f"{path.as_posix()} holds no diffusers folder, but {', '.join(files[:5]) or 'no weights'}; fetch the file "
            f"that is wanted (`hf download {path.as_posix().partition('@')[0]} FILE`) and give its path."
        )
    wanted = [f"{top}config.json"]
    for part, name in chosen.items():
        if name is not None:
            wanted += [part + name, *([f"{part}*-of-*"] if ".index." in name else [])]
    return wanted
