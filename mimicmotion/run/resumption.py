"""What differs between a checkpoint and the run that goes on from it: said where it may, refused where it may not.

One rule: settings hold as they are given now, from the next step on. The learning rate at step n is what a run with
today's learning rate, schedule, warm-up and number of steps has at step n, wherever it came from.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from mimicmotion.config import Config
from mimicmotion.data.batch import Samples
from mimicmotion.data.cache import Manifest
from mimicmotion.data.footage_identity import FootageIdentity
from mimicmotion.json_values import changes, to_json
from mimicmotion.model.adapters import check_base, load_own, own_state
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.optimization.optimizer import Optimization
from mimicmotion.ranks.sharding import in_parts
from mimicmotion.run import checkpoint, pretrained
from mimicmotion.run.checkpoint import Checkpoint
from mimicmotion.run.skips import Skips

_OF_THE_RATE = ("optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps")
# What the weights began with does not shape the model.
_START = ("model.pretrained", "model.pretrained_pose_net", "model.pretrained_weights")


def resume(
    config: Config, dataset: Samples, model: MimicMotionModel, optimization: Optimization, skips: Skips
) -> tuple[int, list[str]]:
    """Take up the newest checkpoint of a run, where there is one; returns its step and what to say of it."""
    folder = checkpoint.newest_in(config.run_dir)
    if folder is None:
        return 0, [f"nothing to resume in {config.run_dir}: starting at step 0"]
    saved = checkpoint.load(folder, like=_held(model, optimization))
    notes = differences(saved, config, dataset.identity)
    go_on(saved, model, optimization)
    if "place" in saved.documents:
        dataset.go_on_from(saved.documents["place"], saved.step)
    skips.load(saved.documents["state"])
    return saved.step, [f"resumed {folder} at step {saved.step}", *notes]


def differences(saved: Checkpoint, config: Config, footage: FootageIdentity) -> list[str]:
    """A line for each setting and for the clips that are not the checkpoint's.

    Raises ValueError where the model or the encoder is another one.
    """
    _check_model(saved, config)
    lines = []
    for change in changes(saved.documents["config"], to_json(config)):
        lines.append(_said(change))
        if change[0] in _OF_THE_RATE or (change[0] == "trainer.num_steps" and _falls(config)):
            lines.append(f"  the learning rate from step {saved.step + 1} on is that of a run with the new setting")
    return [*lines, *footage.changes_since(saved.documents["encoder"])]


def _check_model(saved: Checkpoint, config: Config) -> None:
    """Raise ValueError where the weights are of another model; shapes do not show a wrong number of heads."""
    found = changes(saved.documents["config"], to_json(config))
    if shape := [change for change in found if change[0].startswith("model.") and change[0] not in _START]:
        raise ValueError(
            f"{'; '.join(map(_said, shape))}: the checkpoint's weights are of that model; resume with its settings, or "
            "leave --resume out to start a run of its own"
        )


def of_other_clips(folder: Path, config: Config, manifest: Manifest) -> list[str]:
    """What to say where clips to sample or evaluate are not those that a checkpoint was trained on.

    Latents of another encoder mean something else to the model and to the run's decoder, and other sizes are nothing
    that it was trained on: ValueError. Other clips are what evaluation is for, and are said.
    """
    before, now = json.loads((folder / "encoder.json").read_text()), FootageIdentity.of(manifest)
    if before["name"] != now.encoder and before.get("version") != now.encoder_version:
        raise ValueError(
            f"the clips hold latents of the encoder {now.encoder}, and {folder} was trained on those of "
            f"{before['name']}, to which they mean something else; give --prepared with clips of that encoder"
        )
    sizes = [f"{height}x{width}" for height, width in config.data.all_sizes]
    if others := {size for clip in manifest.clips if (size := f"{clip.height}x{clip.width}") not in sizes}:
        raise ValueError(
            f"the clips are of {' and '.join(sorted(others))} pixels (height x width), and {folder} was trained on "
            f"{' and '.join(sizes)}; give --prepared with clips of that size"
        )
    known = before.get("clips", now.clips)
    if others := [name for name, digest in now.clips.items() if known.get(name) != digest]:
        return [f"{len(others)} of the {len(now.clips)} clips are none that {folder} was trained on"]
    return []


def go_on(saved: Checkpoint, model: MimicMotionModel, optimization: Optimization) -> None:
    """Take up the weights and all of the optimizer's state. Raises ValueError where a tensor does not fit."""
    saved = _checked(saved, model, optimization)
    load_own(model, saved.tensors["model"])
    optimization.load(saved.tensors, saved.documents["state"])


def _held(model: MimicMotionModel, optimization: Optimization) -> dict[str, dict[str, Tensor]]:
    """What takes up a checkpoint's tensors."""
    return {"model": own_state(model), **optimization.tensors()}


def _checked(saved: Checkpoint, model: MimicMotionModel, optimization: Optimization) -> Checkpoint:
    """The checkpoint with its tensors in parts where those of the run are.

    Raises ValueError where a saved tensor has not the name, shape or dtype of what it is loaded into.
    """
    check_base(model.base_sha256, saved.documents.get("base", {}).get("sha256"))
    wanted = _held(model, optimization)
    for group in wanted.keys() & saved.tensors.keys():
        own, theirs = wanted[group], saved.tensors[group]
        for key in sorted(own.keys() | theirs.keys()) if group == "model" else sorted(own.keys() & theirs.keys()):
            said = [
                f"{str(x[key].dtype).removeprefix('torch.')} {tuple(x[key].shape)}" if key in x else "missing"
                for x in (theirs, own)
            ]
            if said[0] != said[1]:
                raise ValueError(
                    f"{key} of {group} is {said[0]} in the checkpoint of step {saved.step} and {said[1]} in this run; "
                    "resume with the settings it was saved with"
                )
    return dataclasses.replace(saved, tensors=in_parts(saved.tensors, wanted))


def begin_from(folder: Path, config: Config, model: MimicMotionModel, optimization: Optimization) -> list[str]:
    """Take up the weights, moments and moving average of an earlier stage's checkpoint; steps and rates begin anew.

    Where other parameters are trained than there, the averaged weights are what it begins with, and moments begin anew:
    what is frozen from here on should be the best of what was trained.
    """
    saved = checkpoint.load(folder, like=_held(model, optimization))
    _check_model(saved, config)
    saved = _checked(saved, model, optimization)
    if optimization.holds_states_of(saved.tensors):
        load_own(model, saved.tensors["model"])
        optimization.begin_from(saved.tensors, saved.documents["state"])
        return [f"begins with the weights, moments and moving average of {folder}"]
    averaged = {"model": pretrained.own(saved, "ema")[0]}
    load_own(model, in_parts(averaged, {"model": own_state(model)})["model"])
    optimization.begin_average()
    return [f"begins with the averaged weights of {folder}; moments begin anew, since other parameters are trained"]


def _said(change: tuple[str, Any, Any]) -> str:
    name, before, now = change
    return f"{name} was {before} in the checkpoint and is {now} now"


def _falls(config: Config) -> bool:
    """Whether the rate depends on the number of steps."""
    return config.optimizer.schedule != "constant_with_warmup"
