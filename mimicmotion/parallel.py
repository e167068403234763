"""How a run uses several ranks, as settings."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks beside each other; every rank has clips of its own."""

    shard: int = 1  # ranks that share one copy of weights, gradients and moments (FSDP2); 1: each has its own (DDP)
    timeout_minutes: float = 30.0  # that a step waits for another rank; preparing, planning and saving may take longer

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise ValueError(f"parallel.shard is {self.shard}; give a number of ranks, 1 for a copy on each.")
        if not 0 < self.timeout_minutes < float("inf"):
            raise ValueError(f"parallel.timeout_minutes is {self.timeout_minutes}; give a number of minutes over 0.")

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold a part of each weight alone."""
        return self.shard > 1

    def check(self, config: Any) -> None:
        """Raise ValueError where a run's other settings want what a part of a weight cannot give."""
        if not self.is_sharded:
            return
        optimizer = config.optimizer
        needs_whole = {
            "plan": config.plan is not None,  # knows one GPU's memory, with all weights on it
            "memory_budget": config.memory_budget is not None,
            "lora.rank": config.lora.rank > 0,  # few weights are trained, and each rank can have the frozen ones
            "optimizer.kind": optimizer.kind != "adamw",  # its 8-bit blocks would begin elsewhere on other ranks
            "optimizer.in_backward": optimizer.in_backward,
            "optimizer.states_on_host": optimizer.states_on_host,
            "optimizer.ema": optimizer.ema == "host",
            "trainer.precision": config.trainer.precision == "fp16",  # whose scale follows from all gradients at once
        }
        if found := [name for name, is_given in needs_whole.items() if is_given]:
            raise ValueError(
                f"parallel.shard is {self.shard}, and {', '.join(found)} as given takes whole weights on each rank; "
                "leave the one or the other out."
            )
