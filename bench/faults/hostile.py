"""Malicious or unfit input: code in pickles, paths that lead out, wrong shapes, dtypes, names, models."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import safetensors.torch
import torch
import yaml
from torch import Tensor

from bench.faults.child import Child, End
from bench.faults.judge import Judge
from bench.faults.outcome import Outcome, first_of
from mimicmotion.data import wheels
from mimicmotion.data.cache import file_sha256
from mimicmotion.run import checkpoint

COUNT = 40
FAULT = (
    "pickles with code, archives with .. paths, wrong-shape and wrong-dtype files, a config with a typo, "
    "a run folder of another model"
)
MUST = "nothing executed, nothing written outside, an error that names the key"
KINDS = (
    "a pickle with code", "an archive with .. paths", "a file of a wrong shape", "a file of a wrong dtype",
    "a config with a typo", "a run folder of another model",
)  # fmt: skip
LOST = ""


class Code:
    """Pickles to a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def inject(judge: Judge, kind: str, random: Random) -> Outcome:
    """Give a command what it must refuse: one sentence with the name, and nothing but its own folder touched."""
    folder = judge.path("hostile")
    folder.mkdir()
    canary = folder / "canary"
    makers: dict[str, Callable[[], tuple[End, str]]] = {
        "a pickle with code": lambda: _pickle(judge, folder, canary, random),
        "an archive with .. paths": lambda: _archive(judge, folder, canary, random),
        "a file of a wrong shape": lambda: _tensors(judge, folder, random, is_shape=True),
        "a file of a wrong dtype": lambda: _tensors(judge, folder, random, is_shape=False),
        "a config with a typo": lambda: _typo(judge, folder, random),
        "a run folder of another model": lambda: _other_model(judge, folder, random),
    }
    end, key = makers[kind]()
    why = first_of(
        (not canary.exists(), "code was executed, or a file written outside"),
        (end.code == 1, f"it ended with {end.code}: {end.said[-300:]}"),
        ("Traceback" not in end.said, f"a traceback: {end.said[-600:]}"),
        (key in end.said, f"{key!r} was not named: {end.said[-600:]}"),
    )
    return Outcome(kind=kind, why_not=why)


def _resumable(judge: Judge, folder: Path) -> Path:
    """The whole run without its last stage: it has one to go on with."""
    run_dir = folder / "run"
    shutil.copytree(checkpoint.stage(judge.whole, 1, 2), checkpoint.stage(run_dir, 1, 2))
    return run_dir


def _signed(path: Path) -> None:
    """Have the manifest say that a changed file is as it should be."""
    manifest = json.loads((path.parent / checkpoint.MANIFEST).read_text())
    manifest["sha256"][path.name] = file_sha256(path)
    (path.parent / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _pickle(judge: Judge, folder: Path, canary: Path, random: Random) -> tuple[End, str]:
    """As weights to start from, as a cached clip, or as a checkpoint's weights with a manifest that agrees."""
    content = pickle.dumps({"unet.conv_in.weight": Code(canary)})
    where = random.choice(("weights", "old weights", "cache", "checkpoint"))
    if where == "cache":
        path = _cached(judge, folder, random)
        path.write_bytes(content)
        return judge.train(folder / "run", "--data.prepared", str(folder / "prepared")).wait(), path.name
    if where == "checkpoint":
        run_dir = _resumable(judge, folder)
        newest = checkpoint.newest(run_dir)
        assert newest is not None
        path = newest / "model.safetensors"
        path.write_bytes(content)
        _signed(path)
        return judge.train(run_dir).wait(), "header"  # safetensors' own word of what is no file of its
    path = folder / "weights.pth"
    if where == "weights":
        torch.save({"unet.conv_in.weight": Code(canary)}, path)
    else:
        path.write_bytes(content)
    return judge.train(folder / "run", "--model.pretrained", str(path)).wait(), path.name


def _archive(judge: Judge, folder: Path, canary: Path, random: Random) -> tuple[End, str]:
    """A wheel whose member leads out of it, where footage is fetched; or an index of weights that does."""
    if random.random() < 0.5:
        weights = folder / "unet"
        weights.mkdir()
        (weights / "config.json").write_text("{}")
        index = weights / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../outside.safetensors"}}))
        return judge.train(folder / "run", "--model.pretrained", str(weights)).wait(), "../../outside.safetensors"
    cache = folder / "cache"
    wheel = wheels.Wheel(
        requirement="footage==1", file_name="footage.whl", sha256="", platform="any",
        members={"footage/../../../canary": "0" * 64},
    )  # fmt: skip
    archive = cache / "footage-1" / wheel.file_name
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("footage/../../../canary", b"x")
        opened.writestr("../../canary", b"x")

    def fetch() -> None:
        with mock.patch.object(wheels, "_download", lambda *_: archive):
            try:
                wheels.fetch_members(wheel, cache)
            except ValueError as error:
                raise SystemExit(str(error)) from error

    return Child(fetch, ["fetch"], folder / "log").wait(), "SHA-256"


def _cached(judge: Judge, folder: Path, random: Random) -> Path:
    """A clip's file of a copy of the prepared folder; training reads every clip within its steps."""
    shutil.copytree(judge.prepared, folder / "prepared")
    return random.choice(sorted((folder / "prepared" / "clips").glob("*.safetensors")))


def _tensors(judge: Judge, folder: Path, random: Random, *, is_shape: bool) -> tuple[End, str]:
    """One tensor of a cached clip, of a checkpoint, or of weights to start from."""

    def wrong(tensor: Tensor) -> Tensor:
        return tensor[:, :-1].contiguous() if is_shape else tensor.to(torch.int32)

    where = random.choice(("cache", "checkpoint", "weights"))
    if where == "cache":
        shutil.copytree(judge.prepared, folder / "prepared")
        name = random.choice(("latents", "keypoints"))
        for path in (folder / "prepared" / "clips").glob("*.safetensors"):  # the first step reads one of them
            tensors = safetensors.torch.load_file(path)
            safetensors.torch.save_file(tensors | {name: wrong(tensors[name])}, path)
        return judge.train(folder / "run", "--data.prepared", str(folder / "prepared")).wait(), name
    run_dir = _resumable(judge, folder)
    newest = checkpoint.newest(run_dir)
    assert newest is not None
    group = random.choice(("model", "ema")) if where == "checkpoint" else "model"
    tensors = safetensors.torch.load_file(newest / f"{group}.safetensors")
    key = random.choice(sorted(key for key in tensors if tensors[key].ndim > 1))
    tensors[key] = wrong(tensors[key])
    if where == "checkpoint":
        safetensors.torch.save_file(tensors, newest / f"{group}.safetensors")
        _signed(newest / f"{group}.safetensors")
        return judge.train(run_dir).wait(), key
    torch.save(tensors, folder / "weights.pth")
    return judge.train(folder / "other", "--model.pretrained", str(folder / "weights.pth")).wait(), key


def _typo(judge: Judge, folder: Path, random: Random) -> tuple[End, str]:
    """A letter left out or doubled of a setting's name, in the file of settings."""
    settings = yaml.safe_load(judge.settings.read_text())
    group = random.choice([name for name in settings if isinstance(settings[name], dict)])
    name = random.choice(sorted(settings[group]))
    place = random.randrange(1, len(name))
    typo = name[:place] + random.choice(("", 2 * name[place])) + name[place + 1 :]
    settings[group][typo] = settings[group].pop(name)
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return judge.train(folder / "run", settings=path).wait(), f"{group}.{typo}"


def _other_model(judge: Judge, folder: Path, random: Random) -> tuple[End, str]:
    """Go on with a run under another shape of the model."""
    run_dir = _resumable(judge, folder)
    name, words = random.choice(
        (
            ("num_attention_heads", ("1", "1", "1", "1")), ("layers_per_block", ("2",)),
            ("block_out_channels", ("32", "32", "32", "64")), ("addition_time_embed_dim", ("16",)),
        )
    )  # fmt: skip
    return judge.train(run_dir, f"--model.{name.replace('_', '-')}", *words).wait(), f"model.{name}"
