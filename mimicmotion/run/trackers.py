"""Where a run's figures go beside its own history: TensorBoard always, Weights & Biases or trackio where asked for."""

import importlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from mimicmotion.config import Config, Tracker
from mimicmotion.json_values import to_json

SIGMA_EDGES = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the bins that losses are told in; the last is open

# figures that not every step has: one without a sure hand, one that is not logged
_MAY_LACK = {"loss in hands": "hand_loss", "PoseNet's share of conv_in": "pose_share"}


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one step's row of the history by the names they are tracked under; none that it has not."""
    found = {name: row[name] for name in ("loss", "gradient_norm", "learning_rate") if row[name] is not None}
    found |= {name: row[key] for name, key in _MAY_LACK.items() if row.get(key) is not None}
    found["skipped"] = float(row["is_skipped"])
    both = row["seconds"] + row["waiting_seconds"]
    found["time/seconds a step"] = both
    if both > 0:
        found["time/clips a second"] = row["num_clips"] / both
        found["time/share waiting for data"] = row["waiting_seconds"] / both
    if row["peak_gib"] is not None:
        found["memory/peak GiB"] = row["peak_gib"]
    for name, losses in by_sigma(row["clip_losses"]).items():
        found[f"loss by sigma/{name}"] = sum(losses) / len(losses)
    return found


def by_sigma(clip_losses: list[list[float]]) -> dict[str, list[float]]:
    """Losses of clips, given as [sigma, loss], by the bin of their sigma; bins without one are left out."""
    bins: dict[str, list[float]] = {}
    edges = [*SIGMA_EDGES, float("inf")]
    for low, high in pairwise(edges):
        losses = [loss for sigma, loss in clip_losses if low <= sigma < high]
        if losses:
            bins[f"{low:g} and more" if high == float("inf") else f"{low:g} to {high:g}"] = losses
    return bins


class Trackers:
    """The trackers of one run; `log` each step's row, `close` at the end."""

    def __init__(self, config: Config, *, resumed_step: int) -> None:
        """Raises ModuleNotFoundError where the tracker asked for is not installed."""
        # steps that a killed run had logged beyond its checkpoint are replaced
        folder = config.run_dir / "tensorboard"
        self._board = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)
        self._other = _started(config.trainer.tracker, config.run_dir, to_json(config))

    def log(self, row: Mapping[str, Any]) -> None:
        """One step's row of the history."""
        self._tell(scalars(row), row["step"])

    def _tell(self, found: Mapping[str, float], step: int) -> None:
        for name, value in found.items():
            self._board.add_scalar(name, value, step)
        if self._other is not None:
            self._other.log(dict(found), step=step)

    def log_validation(self, row: Mapping[str, Any]) -> None:
        """What held-out clips said after a step."""
        found = {"held out/loss": row["loss"]}
        found |= {f"held out/sigma {sigma:.2g}": loss for sigma, loss in zip(row["sigmas"], row["losses"], strict=True)}
        self._tell(found, row["step"])

    def close(self) -> None:
        """Write what is not written yet."""
        self._board.close()
        if self._other is not None:
            self._other.finish()


def _started(tracker: Tracker, run_dir: Path, settings: dict[str, Any]) -> Any:
    """wandb or trackio, whose functions are the same, with a run begun; None where none is asked for."""
    if tracker == "none":
        return None
    try:
        module = importlib.import_module(tracker)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"trainer.tracker {tracker} is not installed: pip install {tracker}") from error
    module.init(project="mimicmotion", name=run_dir.name, config=settings)
    return module
