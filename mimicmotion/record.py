"""What a run leaves to look at, by its first rank: loss.jsonl, TensorBoard's files, loss.png and index.html."""

from collections.abc import Mapping
from typing import Any

from mimicmotion.config import Config, to_json
from mimicmotion.history import History, draw_loss, read_history
from mimicmotion.run_page import write_page
from mimicmotion.trackers import Trackers


class Record:
    """The figures of a run: `add` each step's row, `draw` now and then, `close` at the end."""

    def __init__(self, config: Config, *, encoder: str, resumed_step: int) -> None:
        self._config = config
        self._title = f"{config.preset}, kernels {config.kernels}, encoder {encoder}"
        self._history = History(config.run_dir / "loss.jsonl", resumed_step=resumed_step)
        self._trackers = Trackers(config, resumed_step=resumed_step)

    def add(self, row: Mapping[str, Any]) -> None:
        """Tell one step's row; it is in the history when this returns."""
        self._history.append(dict(row))
        self._trackers.log(row)

    def add_validation(self, row: Mapping[str, Any]) -> None:
        """Tell a row of what held-out clips said."""
        self._trackers.log_validation(row)

    def draw(self) -> None:
        """Write the pictures anew."""
        if rows := read_history(self._history.path):
            draw_loss(rows, self._config.run_dir / "loss.png", self._title)
            write_page(self._config.run_dir, rows, to_json(self._config), self._title)

    def close(self) -> None:
        """Write what trackers hold back."""
        self._trackers.close()
