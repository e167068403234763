"""What a run leaves to look at, by its first rank: loss.jsonl, TensorBoard's files, loss.png and index.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimicmotion.config import Config
from mimicmotion.json_values import to_json
from mimicmotion.run import checkpoint
from mimicmotion.run.history import History, plot_loss, read_history
from mimicmotion.run.run_page import write_page
from mimicmotion.run.trackers import Trackers

HISTORY = "loss.jsonl"


def plot(run_dir: Path, config: Config, *, encoder: str) -> None:
    """Write loss.png and index.html of a run's folder, where it holds a step; a sample that lies there is shown.

    Of a run in stages, the earlier of which lie in folders of their own, the steps of all are counted through.
    """
    rows = rows_of(run_dir)
    if rows:
        title = f"{config.preset}, kernels {config.kernels}, encoder {encoder}"
        plot_loss(rows, run_dir / "loss.png", title)
        write_page(run_dir, rows, to_json(config), title)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, of all its stages in their order, steps counted through."""
    rows: list[dict[str, Any]] = []
    for folder in checkpoint.places(run_dir):
        before = rows[-1]["step"] if rows else 0
        found = read_history(folder / HISTORY) if (folder / HISTORY).is_file() else []
        rows += [{**row, "step": before + row["step"]} for row in found]
    return rows


class Record:
    """The figures of a run: `add` each step's row, `plot` now and then, `close` at the end."""

    def __init__(self, config: Config, *, encoder: str, resumed_step: int) -> None:
        self._config = config
        self._encoder = encoder
        self._history = History(config.run_dir / HISTORY, resumed_step=resumed_step)
        self._trackers = Trackers(config, resumed_step=resumed_step)

    def add(self, row: Mapping[str, Any]) -> None:
        """Tell one step's row; it is in the history when this returns."""
        self._history.append(dict(row))
        self._trackers.log(row)

    def add_validation(self, row: Mapping[str, Any]) -> None:
        """Tell a row of what held-out clips said."""
        self._trackers.log_validation(row)

    def plot(self) -> None:
        """Write the pictures anew."""
        plot(self._config.run_dir, self._config, encoder=self._encoder)

    def close(self) -> None:
        """Write what trackers hold back."""
        self._trackers.close()
