"""The model that a run begins with: fresh or released weights, and adapters where there are to be some."""

from mimicmotion.config import Config
from mimicmotion.model import weights
from mimicmotion.model.adapters import adapt
from mimicmotion.model.unet import MimicMotionModel


def begin(model: MimicMotionModel, config: Config) -> list[str]:
    """Load the released weights of `config` and put its adapters in, in place; returns what to say of it."""
    notes = []
    if config.model.pretrained is not None:
        notes += weights.load(model, weights.read(config.model.pretrained, config.model.pretrained_pose_net))
    return [*notes, *adapt(model, config.lora, config.trainer.precision)]
