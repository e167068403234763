"""Checkpoints that a crash or a flipped bit cannot spoil: step-N folders, complete or not there at all.

A folder is written under another name, every file is flushed to the disk, SHA-256 sums go into manifest.json, and the
folder is renamed. Tensors are safetensors, the rest is JSON or text; nothing is pickled.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mimicmotion.data.cache import file_sha256
from mimicmotion.paths import free_gib

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_STAGE = re.compile(r"stage-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used, and why."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds: groups of tensors (one .safetensors each) and JSON documents, by name."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, Any]


def _flush(path: Path) -> None:
    """Put a file's or folder's content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folders(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    if not run_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in run_dir.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / MANIFEST).is_file()]
    return [path for _, path in sorted(found)]


def is_run(folder: Path) -> bool:
    """Whether there is a complete checkpoint in a folder."""
    return newest(folder) is not None


def save(run_dir: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `checkpoint` as run_dir/step-N, then delete all but the newest `keep`; returns the folder.

    Raises CheckpointError where the disk does not take it; the checkpoints before it stay.
    """
    final = run_dir / f"step-{checkpoint.step:08d}"
    partial = run_dir / f".{final.name}.partial"
    try:
        _write(checkpoint, final, partial)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        num_bytes = sum(tensor.nbytes for group in checkpoint.tensors.values() for tensor in group.values())
        before = newest(run_dir)
        kept = "there is none before it" if before is None else f"{before} is the newest that is complete"
        raise CheckpointError(
            f"step {checkpoint.step} could not be saved in {run_dir} ({error}): it takes {num_bytes / 2**30:.1f} GiB"
            f"{free_gib(run_dir)}; {kept}. Make room there and go on with --resume"
        ) from error
    for old in folders(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def _write(checkpoint: Checkpoint, final: Path, partial: Path) -> None:
    """Write the folder `partial`, then give it the name `final`."""
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed while saving
    partial.mkdir(parents=True)
    for name, tensors in checkpoint.tensors.items():
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(plain, partial / f"{name}.safetensors")
    for name, document in checkpoint.documents.items():
        (partial / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    files = sorted(partial.iterdir())
    for path in files:
        _flush(path)
    manifest = {"step": checkpoint.step, "sha256": {path.name: file_sha256(path) for path in files}}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _flush(partial / MANIFEST)
    _flush(partial)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the same step again: moved away whole, since a folder cannot be renamed over another
        final.rename(replaced)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where every file has its SHA-256 sum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sums = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, wanted in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (got := file_sha256(folder / name)) != wanted:
            return f"{name} has SHA-256 {got[:12]}..., the manifest says {wanted[:12]}..."
    return None


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every SHA-256 sum.

    Raises CheckpointError where one differs, and names the newest intact checkpoint of the same run.
    """
    if why := damage(folder):
        others = [path for path in folders(folder.parent) if path.name < folder.name and damage(path) is None]
        advice = (
            f"the newest intact one before it is {others[-1]}; move {folder.name} away to resume from there"
            if others
            else f"no earlier checkpoint in {folder.parent} is intact; start again in another --run-dir"
        )
        raise CheckpointError(f"{folder} is damaged: {why}. It was not loaded: {advice}.")
    step = json.loads((folder / MANIFEST).read_text())["step"]
    return Checkpoint(
        step=step,
        tensors={path.stem: safetensors.torch.load_file(path) for path in sorted(folder.glob("*.safetensors"))},
        documents={p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if p.name != MANIFEST},
    )


def newest(run_dir: Path) -> Path | None:
    """Newest complete checkpoint folder of a run, or None; of one in stages, of the last stage that has one."""
    for folder in (run_dir, *reversed(stages(run_dir))):
        if found := folders(folder):
            return found[-1]
    return None


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(folder.name.removeprefix("step-"))


def stage(run_dir: Path, number: int) -> Path:
    """The folder of a stage of a run, from 1."""
    return run_dir / f"stage-{number}"


def stages(run_dir: Path) -> list[Path]:
    """The folders of a run's stages, in their order."""
    found = [(int(m[1]), path) for path in run_dir.glob("stage-*") if (m := _STAGE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
