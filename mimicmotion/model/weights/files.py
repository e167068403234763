"""What a file is, told by its first bytes and never by its name, and the tensors in it by the file's own names.

A pickle can hold any code. It is read with `weights_only`, which builds tensors and plain values and refuses the rest
unexecuted.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_HEAD_BYTES = 512
_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")
_OTHERS = {  # first bytes of what is taken for weights now and then
    b"GGUF": "a GGUF file, whose weights are quantised; give the model's .safetensors",
    b"\x1f\x8b": "a gzip archive; unpack it and give what is inside",
    b"\x89HDF": "an HDF5 file of Keras; give the model's .safetensors",
    b"\x93NUMPY": "an array of numpy; give the model's .safetensors",
}


class WeightsError(ValueError):
    """Weights that cannot be used: what they are, and what to do."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """Tensors by the file's own names, nested ones joined by dots, and what else the file says of itself."""

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]


def read_file(path: Path) -> TensorFile:
    """The tensors of a .safetensors, of a torch.save or of an older one. Raises WeightsError where it is none."""
    if not path.is_file():
        raise WeightsError(f"{path} is {'not there' if not path.exists() else 'no file'}; give a file of weights.")
    with path.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20:
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        _check_archive(path)
        return _read_pickle(path, is_archive=True)
    if head.startswith(b"\x80"):
        return _read_pickle(path, is_archive=False)
    raise WeightsError(f"{path} is {_other_kind(head, path)}")


def _other_kind(head: bytes, path: Path) -> str:
    """What a file that holds no tensors is, and what to do."""
    if not head:
        return "empty (0 bytes), as a download or copy leaves it that was interrupted; fetch it again."
    if head.startswith(_LFS):
        found = re.search(rb"size (\d+)", head)
        size = f" of {int(found[1]):,} bytes" if found else ""
        return f"a Git LFS pointer, which stands for a file{size}; `git lfs pull` in its repository fetches that."
    if head.lstrip().lower().startswith(_MARKUP):
        return "a web page, not the file that its link leads to (a login or error page?); download the file itself."
    for start, what in _OTHERS.items():
        if head.startswith(start):
            return f"{what}."
    words = " ".join(head.decode("ascii", errors="replace").split())
    if words.isascii() and words.isprintable():
        return f"text, which begins with {words[:60]!r}; give a file of weights (.safetensors or .pth)."
    size = path.stat().st_size
    return f"of no known kind ({size:,} bytes, the first {head[:8].hex(' ')}); give a .safetensors or a .pth."


def _read_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length)
    if len(text) < length:
        raise WeightsError(f"{path} is a .safetensors that was cut short within its header; fetch or copy it again.")
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(text).items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise WeightsError(f"{path} is a .safetensors with a damaged header; fetch or copy it again.") from error
    if size < wanted:
        raise WeightsError(
            f"{path} is a .safetensors that was cut short: {size:,} of {wanted:,} bytes; fetch or copy it again."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            names = opened.keys()
            return TensorFile(
                tensors={name: opened.get_tensor(name) for name in names}, metadata=opened.metadata() or {}
            )
    except (SafetensorError, KeyError, AttributeError, RuntimeError) as error:  # a dtype torch has not, among others
        raise WeightsError(
            f"{path} is a .safetensors that cannot be read ({_why(error)}); fetch or copy it again."
        ) from error


def _check_archive(path: Path) -> None:
    """Raise WeightsError unless a file that begins as a zip archive is a whole one, of torch.save."""
    names = None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:  # names that are no UTF-8, among others
        raise WeightsError(f"{path} is a .pth with a damaged archive ({error}); fetch or copy it again.") from error
    if names is None:
        raise WeightsError(
            f"{path} is a .pth that was cut short: the end of its archive, with the list of contents, is missing "
            f"({path.stat().st_size:,} bytes are there); fetch or copy it again."
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"{path} is a TorchScript program, not weights alone; give the .pth of its state_dict().")
    if not any(name.endswith("/data.pkl") for name in names):
        raise WeightsError(
            f"{path} is a zip archive that torch.save did not make (it holds {', '.join(names[:3]) or 'nothing'}); "
            "unpack it and give the file of weights inside."
        )


def _read_pickle(path: Path, *, is_archive: bool) -> TensorFile:
    """The tensors of a torch.save; an archive's are mapped, not read, until they are used."""
    try:
        with path.open("rb") as opened:
            is_mapped = is_archive and path.suffix != ".safetensors"  # which torch takes a path's name for its kind
            found = torch.load(path if is_mapped else opened, map_location="cpu", weights_only=True, mmap=is_mapped)
    except MemoryError:
        raise
    except Exception as error:  # whatever a foreign or damaged pickle makes torch's reader raise: there is no list
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise WeightsError(
                f"{path} is a pickle that asks for code ({asked[1]}); weights need none. Nothing of it was executed; "
                "give a .safetensors, or a .pth of a state_dict alone."
            ) from error
        raise WeightsError(
            f"{path} is a .pth that cannot be read ({_why(error)}): damaged, cut short, or a pickle that torch.save "
            "did not write. Nothing of it was executed; fetch or copy it again."
        ) from error
    tensors = dict(_flat(found, ""))
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors by name, but {type(found).__name__}; give a .pth of a state_dict alone."
        )
    return TensorFile(tensors=tensors, metadata={})


def _flat(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of nested dictionaries, {"state_dict": {"a": x}} as state_dict.a, without what is no tensor."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Tensor) and name:
        yield name, value.detach()


def _why(error: Exception) -> str:
    """The reason in an error of torch's or safetensors', without torch's advice to load unsafely."""
    said = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or type(error).__name__
    return "".join(c for c in said.splitlines()[0].partition(" Please ")[0][:160] if c.isprintable())
