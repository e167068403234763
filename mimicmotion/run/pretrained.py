"""What a run begins with: weights from anywhere, another run of this trainer included."""

from pathlib import Path

from torch import Tensor

from mimicmotion.config import Config, ModelConfig, WeightsKind
from mimicmotion.json_values import from_json
from mimicmotion.model import weights
from mimicmotion.model.adapters import adapt, check_base, is_adapters, merged, sha256_of, weight_of
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.model.weights import Weights, hub
from mimicmotion.model.weights.reading import GIVE
from mimicmotion.paths import check_there
from mimicmotion.run import checkpoint
from mimicmotion.run.checkpoint import Checkpoint

_KINDS: dict[str, WeightsKind] = {"model": "raw", "ema": "ema"}  # groups of a checkpoint, a file or a folder each


def check_given(config: ModelConfig) -> None:
    """Raise ValueError where a path that was given is not there and can be no id of a hub's."""
    for name, path in (("", config.pretrained), ("-pose-net", config.pretrained_pose_net)):
        if path is not None and not hub.is_hub_id(path):
            check_there(f"--model.pretrained{name}", path, GIVE)


def begin(model: MimicMotionModel, config: Config) -> list[str]:
    """Load the weights that a run begins with and put its adapters in, in place; returns what to say of it."""
    notes = [] if config.model.pretrained is None else weights.load(model, read(config.model))
    return [*notes, *adapt(model, config.lora, config.trainer.precision)]


def read(config: ModelConfig) -> Weights:
    """The weights that a model is to begin with. Raises ValueError or CheckpointError where they cannot be used."""
    path, beside = config.pretrained, config.pretrained_pose_net
    assert path is not None
    if (found := own_checkpoint(path, config.pretrained_weights)) is not None:
        if beside is not None:
            raise ValueError(f"{path} is of a run, whose PoseNet it has; leave --model.pretrained-pose-net out.")
        return of_checkpoint(*found)
    path, beside = (hub.fetch(each) if each is not None and hub.is_hub_id(each) else each for each in (path, beside))
    assert path is not None
    return weights.read(path, beside)


def own_checkpoint(path: Path, kind: WeightsKind) -> tuple[Path, WeightsKind] | None:
    """The checkpoint folder that a path means, and which weights of it: of a run, of one checkpoint or of its file."""
    if (group := path.name.removesuffix(".safetensors")) in _KINDS and (path.parent / checkpoint.MANIFEST).is_file():
        return path.parent, _KINDS[group]
    if checkpoint.holds(path, "model"):
        return path, kind
    newest = checkpoint.newest(path)
    return None if newest is None else (newest, kind)


def of_checkpoint(folder: Path, kind: WeightsKind) -> Weights:
    """The weights of one checkpoint of our own, after its SHA-256 sums were checked."""
    saved = checkpoint.load(folder, groups=("model", "ema"))
    tensors, kind = whole(saved, kind)
    return Weights(
        source=folder,
        tensors=tensors,
        config=saved.documents["config"]["model"],
        notes=(f"begins with the {'averaged' if kind == 'ema' else 'raw'} weights of step {saved.step} of {folder}",),
    )


def own(saved: Checkpoint, kind: WeightsKind) -> tuple[dict[str, Tensor], WeightsKind]:
    """The tensors that a checkpoint holds of its model, and which they are: raw ones where the run takes no average.

    What is never trained has no average and is the same in both.
    """
    if kind == "raw" or "ema" not in saved.tensors:
        return saved.tensors["model"], "raw"
    return saved.tensors["model"] | saved.tensors["ema"], "ema"


def whole(saved: Checkpoint, kind: WeightsKind) -> tuple[dict[str, Tensor], WeightsKind]:
    """Every tensor of a checkpoint's model, and which they are, as `own`.

    Adapters are merged into the weights that they were trained on, which are read again. Raises ValueError where they
    are other ones now.
    """
    tensors, kind = own(saved, kind)
    if "base" not in saved.documents:
        return tensors, kind
    config: Config = from_json(saved.documents["config"])
    base = read(config.model).tensors
    check_base(sha256_of(base), saved.documents["base"]["sha256"])
    pose_net = {name: tensor for name, tensor in tensors.items() if not is_adapters(name)}
    return merged(base, tensors, weight_of(config.lora)) | pose_net, kind
