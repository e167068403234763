"""Run by torchrun from test_distributed.py: `two_ranks.py FOLDER`; each rank writes what it has after its work."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from tiny import NoiseClips, tiny_config
from torch import Tensor

from mimicmotion.config import Config
from mimicmotion.planning import memory_plan
from mimicmotion.planning.fitting import Fitting
from mimicmotion.ranks.distributed import Ranks, join_ranks
from mimicmotion.trainer import Trainer, TrainingStoppedError
from mmkernels.cards import card
from mmkernels.choices import Modelled, Plan, document, write_plan

FREE_GIB = (20.0, 10.0)  # of each rank


def plans(folder: Path, ranks: Ranks) -> dict[str, object]:
    """What each rank is told where plans are asked for; the planning itself costs nothing and is the first rank's."""
    asked: list[tuple[float, bool]] = []

    def search_step(config: Config, _card: object, *, can_update_in_backward: bool, num_ranks: int) -> Any:
        assert num_ranks == ranks.world_size

        def best(budget_gib: float, like: Any = None) -> Any:
            asked.append((budget_gib, can_update_in_backward))
            if budget_gib == 1:
                raise ValueError("no plan fits a budget of 1 GiB")
            if budget_gib == 2:
                raise KeyError("a fault of ours")
            return mock.Mock(plan=Plan(made_for=memory_plan.made_for(config) | {"budget_gib": budget_gib}))

        return mock.Mock(best=best)

    def choose(**changes: Any) -> object:
        config = dataclasses.replace(tiny_config(folder / "planned"), kernels="fused", **changes)
        try:
            config, plan, _ = memory_plan.choose_plan(config, ranks)
        except (ValueError, RuntimeError, KeyError) as error:
            return [type(error).__name__, str(error)]
        assert plan is not None
        return [document(plan), config.optimizer.ema]

    config = tiny_config(folder / "planned")
    cost = Modelled(peak_gib=15, recompute_flops_ratio=0, moved_gib=0, hidden_ratio=1, step_s=1)
    optimizer = dataclasses.replace(config.optimizer, ema="host")
    path = folder / f"plan-{ranks.rank}.json"  # the first rank's is the one that is read
    if ranks.is_first:
        write_plan(Plan(made_for=memory_plan.made_for(config), modelled=cost), path)
    with (
        mock.patch.object(memory_plan, "usable_gib", lambda _: FREE_GIB[ranks.rank]),
        mock.patch.object(memory_plan, "measured_card", lambda: card("RTX 4090")),
        mock.patch.object(memory_plan, "search_step", search_step),
    ):
        return {
            "auto": choose(memory_budget="auto"),
            "does not fit": choose(memory_budget=1.0),
            "fails": choose(memory_budget=2.0),
            "a file": choose(plan=path, optimizer=optimizer),
            "no file": choose(plan=folder / "none.json", optimizer=optimizer),
            "asked": asked,
        }


class OutOnce:
    """An allocator, and a model's forward that runs out of memory on the second rank, once, at its second call."""

    def __init__(self, ranks: Ranks) -> None:
        self.calls_left = 2 if ranks.rank == 1 else 0

    def begin(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 10 << 30

    def before(self, *_: object) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise torch.OutOfMemoryError("no room on this rank")


def save(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """safetensors takes contiguous tensors, and convolutions lie channels last."""
    safetensors.torch.save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)


def fit(folder: Path, ranks: Ranks) -> None:
    """Two steps under a plan, as wrapped by DDP, and as fitted to a budget on ranks of which one runs out of memory."""
    large, small = (
        Plan(
            recomputed_blocks=blocks,
            modelled=Modelled(peak_gib=gib, recompute_flops_ratio=0, moved_gib=0, hidden_ratio=1, step_s=1),
        )
        for gib, blocks in ((10, ()), (8, ("mid_block.resnets.0",)))
    )
    for name in ("wrapped", "fitted"):
        config = tiny_config(folder / name, num_frames=3, num_steps=2, batch_size=4, micro_batch_size=1)
        config = dataclasses.replace(config, kernels="fused")
        allocator, clips = OutOnce(ranks), NoiseClips(config=config)
        fitting = Fitting(large, 10.0, lambda _: small, allocator, ranks) if name == "fitted" else None
        trainer = Trainer(config, clips, ranks, plan=large, fitting=fitting)
        if fitting is not None:
            trainer.model.register_forward_pre_hook(allocator.before)
        trainer.run()
        blocks = "" if trainer.plan is None else trainer.plan.recomputed_blocks
        save(trainer.model.state_dict(), folder / f"{name}-{ranks.rank}.safetensors", blocks=str(blocks))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with join_ranks() as ranks:
        (folder / f"plans-{ranks.rank}.json").write_text(json.dumps(plans(folder, ranks)))
        config = tiny_config(folder / "gradients", batch_size=4)
        trainer = Trainer(config, NoiseClips(config=config), ranks)
        trainer._backward(trainer._load(0))
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        save(gradients, folder / f"gradients-{ranks.rank}.safetensors")

        fit(folder, ranks)

        # a clip of the second rank alone is NaN, first at one step, then at three in a row
        config = tiny_config(folder / "run", num_steps=9, batch_size=4, max_skipped_in_a_row=3)
        config = dataclasses.replace(config, kernels="checkpoint")
        clips = NoiseClips(config=config, bad_steps=(1, 3, 4, 5), bad_sample_ids=(3,))
        trainer = Trainer(config, clips, ranks)
        try:
            trainer.run()
            why = "finished"
        except TrainingStoppedError as error:
            why = str(error)
        counts = {"step": torch.tensor(trainer.step), "skipped": torch.tensor(trainer.skips.total)}
        save({**trainer.model.state_dict(), **counts}, folder / f"end-{ranks.rank}.safetensors", why=why)


if __name__ == "__main__":
    main()
