"""What is kept on disk: atomic files, keys of content, tensors of clips and the manifest of a prepared folder.

A prepared folder holds manifest.json, keypoints/<key>.safetensors (one a video) and clips/<key>.safetensors (one a
clip, of which a video gives none, one or several). A key is a digest of everything its file follows from, so a changed
input never meets a stale file.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mimicmotion.data.reference_noise import ReferenceNoise
from mimicmotion.paths import free_gib, near, printable
from mmkernels import files

MANIFEST_VERSION = 4
_Kind = TypeVar("_Kind")


# What keeps any file from being written there, whatever it holds.
FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO,
    errno.EFBIG,
)  # fmt: skip
# What runs out for every video alike, whichever met it.
EXHAUSTED = (*FULL, errno.EMFILE, errno.ENFILE)


class NotWritableError(OSError):
    """A place that cannot be written to; the message says why and what to free or give instead."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """As of mmkernels.files. Raises NotWritableError where the disk is full or closed to us."""
    try:
        with files.atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        if isinstance(error, NotWritableError) or error.errno not in (*FULL, *CLOSED):
            raise
        raise NotWritableError(_why_not(path, error)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Make folder where it is missing and write a file there and take it away. Raises NotWritableError."""
    if any("\ud800" <= character <= "\udfff" for character in str(folder.absolute())):
        raise NotWritableError(f"{printable(folder)} is no UTF-8, without which safetensors opens no file; rename it")
    probe = folder / ".writable"
    with atomic_write(probe) as temporary:
        temporary.write_bytes(bytes(4096))
    probe.unlink()


def _why_not(path: Path, error: OSError) -> str:
    why = f"cannot write {printable(path)}: {os.strerror(error.errno or 0)}"
    if error.errno not in FULL:
        return f"{why}; give a folder that you may write to"
    return (
        f"{why}{free_gib(path)}; free some, or give a folder on another disk. What is whole stays, and the same command"
        " goes on from it"
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_key(inputs: Sequence[Any]) -> str:
    """20 hexadecimal digits that name what follows from inputs (JSON values)."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]


class NotFiniteError(ValueError):
    """Tensors that hold infinities or NaNs, which nothing can be trained on; the message counts them."""


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise NotFiniteError where a value is infinite or NaN, naming each such tensor."""
    counts = {name: (int((~tensor.isfinite()).sum()), tensor) for name, tensor in tensors.items()}
    found = [f"{bad:,} of {x.numel():,} {name} in {x.dtype}" for name, (bad, x) in counts.items() if bad]
    if found:
        raise NotFiniteError(f"not finite: {', '.join(found).replace('torch.', '')}")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to path atomically, with a digest of their content and of the file's name that load_intact checks.

    Raises NotFiniteError, and writes nothing, where a value is infinite or NaN.
    """
    check_finite(tensors)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    payload = save(kept, metadata={"content_sha256": _tensors_sha256(path.name, kept)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(payload)


def load_intact(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file written by save_tensors under this name.

    None where it is missing, cut short, changed, not finite or another one's.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            stated = (opened.metadata() or {}).get("content_sha256")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        check_finite(tensors)
    except (OSError, SafetensorError, NotFiniteError):
        return None
    return tensors if stated == _tensors_sha256(path.name, tensors) else None


def stated_sha256(path: Path) -> str:
    """The digest that save_tensors wrote into a file with its tensors. Raises OSError or SafetensorError."""
    with safe_open(path, framework="pt") as opened:
        return (opened.metadata() or {}).get("content_sha256", "")


def _tensors_sha256(file_name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(file_name.encode())  # a name says what a file follows from
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_prepared(folder: Path) -> bool:
    """Whether there is a manifest, which is written last."""
    return (folder / "manifest.json").is_file()


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The part of every frame of a clip that is kept, in pixels of the source."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip that can be trained on."""

    clip_id: str
    source: str  # the video's path
    source_sha256: str
    source_height: int  # as a player shows it: upright, with square pixels
    source_width: int
    frames_per_second: float
    first_frame: int  # of the source's frames at one rate, a multiple of frame_stride
    num_frames: int
    frame_stride: int  # of the source's frames at one rate, from first_frame on, every frame_stride-th is kept
    crop: Crop
    height: int  # pixels of the frames that the crop was scaled to
    width: int
    keypoints_file: str  # relative to the prepared folder; of the whole source at frame_stride, full frame
    tensors_file: str  # relative to the prepared folder; what `ClipMaker.tensors` says
    statistics: dict[str, float]
    is_mirrored: bool = False  # tensors_file holds the clip flipped left to right; keypoints_file is as filmed
    notes: list[str] = field(default_factory=list)  # what of the video's own statements was overruled

    @property
    def rows(self) -> slice:
        """The rows of keypoints_file that are this clip's."""
        return _rows(self)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A video that was left out, or a stretch of one, and why."""

    source: str
    stage: str  # decode, split (a stretch is too short), curate, check (not finite), memory (too little) or unforeseen
    reason: str
    statistics: dict[str, float] = field(default_factory=dict)  # as a clip's; empty where nothing was measured
    first_frame: int = 0  # as a clip's
    num_frames: int = 0  # 0 where the video was not looked into, as the size
    source_height: int = 0  # as a clip's
    source_width: int = 0
    frame_stride: int = 1
    keypoints_file: str = ""  # as a clip's; "" where no poses were found

    @property
    def rows(self) -> slice:
        """The rows of keypoints_file that are this stretch's."""
        return _rows(self)


def _rows(stretch: Clip | Drop) -> slice:
    first = stretch.first_frame // stretch.frame_stride
    return slice(first, first + stretch.num_frames)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds and how it was made."""

    height: int
    width: int
    sizes: list[str] = field(default_factory=list)  # further ones, as 576x1024: a clip has one of all
    num_frames: int  # every clip has at least this many
    encoder_name: str  # as asked for: "patch-codec (stand-in)", a folder's path or a hub id
    encoder_version: str
    scaling_factor: float
    spatial_factor: int  # pixels per latent cell
    pose_backend: str
    pose_version: str
    decoder: str  # and its version
    encoder_device: str  # kind of device
    frame_stride: int  # every clip's
    with_mirrored: bool = False  # whether each clip is there a second time, flipped left to right
    num_jittered: int = 0  # further copies of each clip in larger crops drawn at random
    reference_noise: ReferenceNoise = field(default_factory=ReferenceNoise)  # on pixels, of latents that have it
    bounds: dict[str, Any]  # what clips were held to, by the names of curate.Bounds
    clips: list[Clip]
    dropped: list[Drop] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # digest of the content of each keypoints and tensors file
    version: int = MANIFEST_VERSION

    def write(self, folder: Path) -> None:
        """Write manifest.json into folder, atomically."""
        write_text(folder / "manifest.json", json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of folder. Raises ValueError where there is none or another version's."""
        path = folder / "manifest.json"
        if not path.is_file():
            why = "holds no manifest.json" if folder.is_dir() else "is not there"
            raise ValueError(
                f"nothing is prepared in {folder}, which {why} (prepared folders {near(folder, is_prepared)}); give one"
                " of those, or make it with `python mimicmotion/prepare.py --videos DIR --prepared DIR`"
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); run prepare again, which makes it anew") from error
        version = stored.get("version") if isinstance(stored, dict) else None
        if version != MANIFEST_VERSION:
            raise ValueError(f"got {path} of version {version}, wanted {MANIFEST_VERSION}; run prepare again")
        try:
            clips = [_checked(Clip, {**clip, "crop": _checked(Crop, clip["crop"])}) for clip in stored.pop("clips")]
            dropped = [_checked(Drop, drop) for drop in stored.pop("dropped")]
            noise = _checked(ReferenceNoise, stored.pop("reference_noise"))
            manifest = _checked(cls, {"clips": clips, "dropped": dropped, "reference_noise": noise, **stored})
        except (TypeError, KeyError, ValueError) as error:  # a name too many, or one too few, or a strange value
            raise ValueError(f"{path} is damaged ({error}); run prepare again, which makes it anew") from error
        names = {part.keypoints_file for part in (*clips, *dropped)} | {clip.tensors_file for clip in clips}
        if strange := sorted(name for name in names | set(manifest.files) if not _is_inside(name)):
            raise ValueError(f"{path} names {printable(strange[0])}, no file of this folder; run prepare again")
        return manifest


def _is_inside(name: str) -> bool:
    """Whether a file's name, relative to the prepared folder, leads out of it nowhere."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _checked(kind: type[_Kind], stored: dict[str, Any]) -> _Kind:
    """A dataclass of stored values. Raises TypeError where one is missing, unknown or of another type."""
    made = kind(**stored)
    for name, hint in get_type_hints(kind).items():
        if not _is_of(value := getattr(made, name), hint):
            raise TypeError(f"{name} is {str(value)[:60]!r}")
    return made


def _is_of(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is list:
        return isinstance(value, list) and all(_is_of(one, parts[0]) for one in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is_of(one, parts[1]) for one in value.values())
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
