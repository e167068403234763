"""Run by torchrun from test_distributed.py: `two_ranks.py FOLDER`; each rank writes what it has after its work."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from tiny import NoiseClips, tiny_config

from mimicmotion import memory_plan
from mimicmotion.config import Config
from mimicmotion.distributed import Ranks, join_ranks
from mimicmotion.trainer import Trainer, TrainingStoppedError
from mmkernels.cards import card
from mmkernels.planning.choices import Modelled, Plan, document, write_plan

FREE_GIB = (20.0, 10.0)  # of each rank


def plans(folder: Path, ranks: Ranks) -> dict[str, object]:
    """What each rank is told where plans are asked for; the planning itself costs nothing and is the first rank's."""
    asked: list[tuple[float, bool]] = []

    def plan_step(config: Config, _card: object, budget_gib: float, *, can_update_in_backward: bool) -> Plan:
        asked.append((budget_gib, can_update_in_backward))
        if budget_gib == 1:
            raise ValueError("no plan fits a budget of 1 GiB")
        if budget_gib == 2:
            raise KeyError("a fault of ours")
        return Plan(made_for=memory_plan.made_for(config) | {"budget_gib": budget_gib})

    def choose(**changes: Any) -> object:
        config = dataclasses.replace(tiny_config(folder / "planned"), kernels="fused", **changes)
        try:
            config, plan = memory_plan.choose_plan(config, ranks)
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
        mock.patch.object(memory_plan, "plan_step", plan_step),
    ):
        return {
            "auto": choose(memory_budget="auto"),
            "does not fit": choose(memory_budget=1.0),
            "fails": choose(memory_budget=2.0),
            "a file": choose(plan=path, optimizer=optimizer),
            "no file": choose(plan=folder / "none.json", optimizer=optimizer),
            "asked": asked,
        }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with join_ranks() as ranks:
        (folder / f"plans-{ranks.rank}.json").write_text(json.dumps(plans(folder, ranks)))
        config = tiny_config(folder / "gradients", batch_size=4)
        trainer = Trainer(config, NoiseClips(config=config), ranks, encoder="noise")
        trainer._backward(trainer._load(0))
        found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        gradients = {name: gradient.contiguous() for name, gradient in found.items()}  # safetensors takes no other
        safetensors.torch.save_file(gradients, folder / f"gradients-{ranks.rank}.safetensors")

        # a clip of the second rank alone is NaN, first at one step, then at three in a row
        config = tiny_config(folder / "run", num_steps=9, batch_size=4, max_skipped_in_a_row=3)
        config = dataclasses.replace(config, kernels="checkpoint")
        clips = NoiseClips(config=config, bad_steps=(1, 3, 4, 5), bad_sample_ids=(3,))
        trainer = Trainer(config, clips, ranks, encoder="noise")
        try:
            trainer.run()
            why = "finished"
        except TrainingStoppedError as error:
            why = str(error)
        counts = {"step": torch.tensor(trainer.step), "skipped": torch.tensor(trainer.skipped)}
        end = {name: value.contiguous() for name, value in {**trainer.model.state_dict(), **counts}.items()}
        safetensors.torch.save_file(end, folder / f"end-{ranks.rank}.safetensors", metadata={"why": why})


if __name__ == "__main__":
    main()
