"""Checkpoints that a crash or a flipped bit cannot spoil: step-N folders, complete or not there at all.

A folder is written under another name, every file is flushed to the disk, SHA-256 sums go into manifest.json, and the
folder is renamed. Tensors are safetensors, one file a group, or a folder of files where ranks hold them in parts
(mimicmotion/run/tensor_parts.py); the rest is JSON or text. Nothing is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from mimicmotion.data.cache import file_sha256
from mimicmotion.paths import free_gib
from mimicmotion.ranks.distributed import ALONE, Ranks
from mimicmotion.run import tensor_parts
from mimicmotion.tensor_file import save_tensor_file

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_DAMAGED = ".damaged"  # after the name of what was set aside
_STAGE = re.compile(r"stage-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used, and why."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds: groups of tensors and JSON documents, by name."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, Any]


def flush(path: Path) -> None:
    """Put a file's or folder's content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; each was complete when it got its name, and damage() tells."""
    if not run_dir.is_dir():
        return []
    found = [(int(m[1]), path) for path in run_dir.iterdir() if (m := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def is_run(folder: Path) -> bool:
    """Whether there is a checkpoint in a folder."""
    return newest(folder) is not None


def save(run_dir: Path, checkpoint: Checkpoint, *, keep: int, ranks: Ranks = ALONE) -> Path:
    """Write `checkpoint` as run_dir/step-N, then delete all but the newest `keep`; returns the folder.

    ranks: every one of them has to call this; the first writes all that is in no parts, and is done last. Raises
    CheckpointError where the disk does not take it; the checkpoints before it stay.
    """
    final = run_dir / f"step-{checkpoint.step:08d}"
    partial = run_dir / f".{final.name}.partial"
    try:
        if ranks.is_first:
            _begin(checkpoint, partial)
        for name, tensors in checkpoint.tensors.items():
            if _is_in_parts(tensors):
                tensor_parts.save(tensors, partial / name, ranks)
        if ranks.is_first:
            _finish(checkpoint.step, final, partial)
    except (OSError, SafetensorError) as error:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        num_bytes = sum(tensor.nbytes for group in checkpoint.tensors.values() for tensor in group.values())
        before = newest(run_dir)
        kept = "there is none before it" if before is None else f"{before} is the newest that is complete"
        raise CheckpointError(
            f"step {checkpoint.step} could not be saved in {run_dir} ({error}): it takes {num_bytes / 2**30:.1f} GiB"
            f"{free_gib(run_dir)}; {kept}. Make room there and go on with --resume"
        ) from error
    if ranks.is_first:
        for old in folders(run_dir)[:-keep]:
            old.rename(old.with_name(f".{old.name}.old"))  # a kill must not leave half of one under its name
        for left in run_dir.glob(".step-*"):  # by runs that were killed while saving, too
            shutil.rmtree(left)
    return final


def _is_in_parts(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _begin(checkpoint: Checkpoint, partial: Path) -> None:
    """Make the folder `partial`, with all that this rank has whole."""
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed while saving
    partial.mkdir(parents=True)
    for name, tensors in checkpoint.tensors.items():
        if not _is_in_parts(tensors):
            save_tensor_file(tensors, partial / f"{name}.safetensors")
    for name, document in checkpoint.documents.items():
        (partial / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def _finish(step: int, final: Path, partial: Path) -> None:
    """Sum up the folder `partial` in its manifest, then give it the name `final`."""
    paths = sorted(partial.rglob("*"))
    for path in paths:
        flush(path)
    sums = {path.relative_to(partial).as_posix(): file_sha256(path) for path in paths if path.is_file()}
    (partial / MANIFEST).write_text(_manifest(step, sums))
    flush(partial / MANIFEST)
    flush(partial)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the same step again: moved away whole, since a folder cannot be renamed over another
        final.rename(replaced)
    partial.rename(final)
    flush(final.parent)


def _manifest(step: int, sums: dict[str, str]) -> str:
    return json.dumps({"step": step, "sha256": sums}, indent=1) + "\n"


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where every file has its SHA-256 sum."""
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        step, sums = manifest["step"], dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    named = _NAME.fullmatch(folder.name)
    if text != _manifest(step, sums) or (named and int(named[1]) != step):
        return f"{MANIFEST} is not as it was written"
    for name, wanted in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (got := file_sha256(folder / name)) != wanted:
            return f"{name} has SHA-256 {got[:12]}..., the manifest says {wanted[:12]}..."
    return None


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Rename the newest checkpoints of a run, of all its stages, down to the first intact one; what to say of each.

    Raises CheckpointError, and renames nothing, where none is intact.
    """
    whys: dict[Path, str] = {}
    for folder in (path for place in reversed(places(run_dir)) for path in reversed(folders(place))):
        if (why := damage(folder)) is None:
            for damaged in whys:
                damaged.rename(_aside(damaged))
            return [
                f"{damaged} is damaged: {why}. It was not loaded and lies in {damaged.name}{_DAMAGED} now; {folder} is "
                "the newest intact one and is gone on from"
                for damaged, why in whys.items()
            ]
        whys[folder] = why
    if whys:
        first, why = next(iter(whys.items()))
        raise CheckpointError(
            f"{first} is damaged: {why}. It was not loaded: no checkpoint of {run_dir} is intact; start again without "
            "--resume, which moves the run's folder aside"
        )
    return []


def _aside(folder: Path) -> Path:
    """A name beside a damaged checkpoint that is no checkpoint's; what lies there was damaged before, and goes."""
    aside = folder.with_name(folder.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def load(
    folder: Path, groups: Collection[str] | None = None, like: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Checkpoint:
    """Read a checkpoint after checking every SHA-256 sum. groups: of tensors to read, all where none are named.

    like: by group, what is to take the tensors up: those that lie in parts in both come in the parts of this rank.
    Raises CheckpointError where a sum differs, and names the newest intact checkpoint of the same run.
    """
    if why := damage(folder):
        others = [path for path in folders(folder.parent) if path.name < folder.name and damage(path) is None]
        advice = (
            f"the newest intact one before it is {others[-1]}; move {folder.name} away to resume from there"
            if others
            else f"no earlier checkpoint in {folder.parent} is intact; start again in another --run-dir"
        )
        raise CheckpointError(f"{folder} is damaged: {why}. It was not loaded: {advice}.")
    manifest = json.loads((folder / MANIFEST).read_text())
    tensors: dict[str, dict[str, Tensor]] = {}
    documents = {}
    for name in sorted(manifest["sha256"]):  # nothing that was not checked
        path = folder / name
        group = path.stem if path.parent == folder else path.parent.name
        if path.suffix == ".json":
            documents[path.stem] = json.loads(path.read_text())
        elif group not in tensors and (groups is None or group in groups):
            held = {} if like is None else like.get(group, {})
            is_file = path.parent == folder
            tensors[group] = safetensors.torch.load_file(path) if is_file else tensor_parts.load(path.parent, held)
    return Checkpoint(step=manifest["step"], tensors=tensors, documents=documents)


def holds(folder: Path, group: str) -> bool:
    """Whether a checkpoint folder has this group of tensors, in whatever form."""
    is_there = (folder / f"{group}.safetensors").is_file() or (folder / group).is_dir()
    return is_there and (folder / MANIFEST).is_file()


def newest(run_dir: Path) -> Path | None:
    """Newest checkpoint folder of a run, or None; of one in stages, of the last stage that has one."""
    return next((found for place in reversed(places(run_dir)) if (found := newest_in(place))), None)


def newest_in(place: Path) -> Path | None:
    """Newest checkpoint folder that lies in this very folder, as one stage's do, or None."""
    return next(reversed(folders(place)), None)


def places(run_dir: Path) -> list[Path]:
    """Where a run's checkpoints may lie, in the order of training: earlier stages' folders, then its own."""
    return [*stages(run_dir), run_dir]


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(folder.name.removeprefix("step-"))


def stage(run_dir: Path, number: int, num_stages: int) -> Path:
    """The folder of a stage of a run, from 1; the last one's is the run's own."""
    return run_dir if number == num_stages else run_dir / f"stage-{number}"


def stages(run_dir: Path) -> list[Path]:
    """The folders of a run's stages but the last, in their order."""
    found = [(int(m[1]), path) for path in run_dir.glob("stage-*") if (m := _STAGE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
