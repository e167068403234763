"""How a run uses several ranks, as settings."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks beside each other; every group of `frames` ranks has clips of its own."""

    shard: int = 1  # ranks that share one copy of weights, gradients and moments (FSDP2); 1: each has its own (DDP)
    frames: int = 1  # ranks that train the same clips, each with a part of their frames; 1: each has clips of its own
    auto: bool = False  # --parallel auto: shard and frames are chosen by modelled steps, for the fastest that fits
    given: tuple[str, ...] = ()  # shard, frames: what auto leaves as it is; --parallel auto knows what is typed
    timeout_minutes: float = 30.0  # that a step waits for another rank; preparing, planning and saving may take longer

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise ValueError(f"parallel.shard is {self.shard}; give a number of ranks, 1 for a copy on each.")
        if self.frames < 1:
            raise ValueError(f"parallel.frames is {self.frames}; give a number of ranks, 1 for whole clips on each.")
        if unknown := [name for name in self.given if name not in ("shard", "frames")]:
            raise ValueError(f"parallel.given names {', '.join(unknown)}; give shard, frames or both.")
        if not 0 < self.timeout_minutes < float("inf"):
            raise ValueError(f"parallel.timeout_minutes is {self.timeout_minutes}; give a number of minutes over 0.")

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold a part of each weight alone."""
        return self.shard > 1

    @property
    def runs_together(self) -> bool:
        """Whether the model runs only where every rank calls it."""
        return self.is_sharded or self.frames > 1

    def check(self, config: Any) -> None:
        """Raise ValueError where a run's other settings want what a part of a weight or of a clip cannot give."""
        if self.auto and config.kernels != "fused":
            raise ValueError(
                f"--parallel auto models fused kernels, and kernels is {config.kernels!r}; give --kernels fused"
            )
        if self.is_sharded:
            self._check_shard(config)
        if self.frames > 1:
            self._check_frames(config)

    def _check_shard(self, config: Any) -> None:
        optimizer = config.optimizer
        needs_whole = {
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

    def _check_frames(self, config: Any) -> None:
        if config.kernels != "fused":
            raise ValueError(
                f"parallel.frames is {self.frames} and kernels is {config.kernels!r}, whose blocks see the frames of "
                "their own rank alone; give --kernels fused, or leave parallel.frames out."
            )
        needs_whole = {
            "optimizer.in_backward": config.optimizer.in_backward,  # a gradient is whole once all ranks' are added
        }
        if found := [name for name, is_given in needs_whole.items() if is_given]:
            raise ValueError(
                f"parallel.frames is {self.frames}, and {', '.join(found)} as given takes whole clips on each rank; "
                "leave the one or the other out."
            )
        if (shortest := min(config.data.all_lengths)) < self.frames:
            raise ValueError(
                f"parallel.frames is {self.frames} and there are clips of {shortest} frames (data.num_frames, "
                "data.lengths), of which each rank has to have one; give as many frames or more, or fewer ranks."
            )
