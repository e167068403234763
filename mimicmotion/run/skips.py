"""Steps that are not used: what cannot be read or is not finite, and losses far above all lately seen.

A spike is a step whose loss, the mean of all ranks, is more than `trainer.spike_factor` times the largest of the last
WINDOW steps that were used. The largest and not the median: losses at drawn noise levels differ by their nature, and of
180 steps of the demo one in fifty had five times the median's loss, and none more than 1.6 times the largest of the 32
before it. The loss and not the gradient's norm, which differs hundredfold between steps of an untrained model and is
clipped. Until LEAST steps were used nothing is a spike, so the first steps of a run are not judged by one another.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mimicmotion.config import Config

WINDOW = 32  # steps
LEAST = 8  # steps
NOT_FINITE = "loss or gradient not finite"  # of any rank


class Skips:
    """Counts skipped steps, and judges steps by the losses of those before; its state is in the checkpoint."""

    def __init__(self, *, spike_factor: float, limit: int) -> None:
        """spike_factor: 0 takes no loss for a spike. limit: skipped steps in a row after which there is no more."""
        self._factor, self._limit = spike_factor, limit
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.total = self.in_a_row = 0
        self.last_why = ""

    @classmethod
    def of(cls, config: Config) -> "Skips":
        """As a run is set. Where weights are updated inside backward, they have moved when the loss is told."""
        settings = config.trainer
        factor = 0.0 if config.optimizer.in_backward else settings.spike_factor
        return cls(spike_factor=factor, limit=settings.max_skipped_in_a_row)

    def why(self, loss: float) -> str:
        """Why a step of this finite loss is not to be used; "" where it is."""
        largest = max(self._losses, default=0.0)
        if self._factor and len(self._losses) >= LEAST and loss > self._factor * largest:
            return f"loss {loss:.4g} is a spike, more than {self._factor:g} times the latest {largest:.4g}"
        return ""

    def count(self, loss: float, why: str) -> None:
        """One step more, with why it was skipped; "" where it was used."""
        self.last_why = why
        if why:
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        else:
            self.in_a_row = 0
            self._losses.append(loss)

    @property
    def are_too_many(self) -> bool:
        """Whether as many in a row were skipped as there may be."""
        return self.in_a_row >= self._limit

    def sentence(self, step: int, batch_size: int, clips_of: Callable[[int], list[str]]) -> str:
        """Why there is no further step, and what to do; names the clips of the steps in a row up to this one."""
        clips = sorted({clip for number in range(step - self.in_a_row, step) for clip in clips_of(number)})
        return (
            f"{self.in_a_row} steps in a row, up to step {step} ({self.total} skipped in all), could not be used, the "
            f"last since: {self.last_why}. Each took samples 0 to {batch_size - 1}, of clips {', '.join(clips)}. The "
            f"weights of step {step - self.in_a_row} are saved: look at these clips, lower optimizer.learning_rate, or "
            "use another trainer.precision, and go on with --resume"
        )

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row, "losses": list(self._losses)}

    def load(self, document: Mapping[str, Any]) -> None:
        """Take up what `document()` gave."""
        self.total, self.in_a_row = document["skipped"], document["skipped_in_a_row"]
        self._losses = deque(document.get("losses", ()), maxlen=WINDOW)  # earlier versions kept none
