"""A run that follows a memory plan: refused where it was made for another, the same numbers, printed and saved."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import NoiseClips, tiny_config

from mimicmotion import train
from mimicmotion.config import Config
from mimicmotion.json_values import from_json, to_json
from mimicmotion.planning import memory_plan
from mimicmotion.planning.dry_run import dry_run
from mimicmotion.planning.memory_plan import choose_plan
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint
from mimicmotion.trainer import Trainer
from mmkernels.cards import CONTEXT_GIB, FRAGMENTS, card
from mmkernels.choices import Modelled, OptimizerChoice, Plan, read_plan, write_plan

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
ON_GPU = dataclasses.replace(ONE, device=torch.device("cuda", 0))
UNLINKED = dataclasses.replace(card("RTX 4090"), link_bytes_per_s=0)  # nothing is large enough to move in these models
BLOCK = "mid_block.attentions.0"
COST = Modelled(peak_gib=20.5, recompute_flops_ratio=0.1, moved_gib=3, hidden_ratio=0.95, step_s=9)
MADE_FOR = {"frames": 4, "height": 128, "width": 128, "batch": 2, "precision": "fp32", "card": "RTX 4090"}


def planned_config(folder: Path, plan: Plan, **changes: Any) -> Config:
    path = folder / "plan.json"
    write_plan(plan, path)
    config = tiny_config(folder / "run", num_steps=2, micro_batch_size=2)
    optimizer = dataclasses.replace(config.optimizer, **changes)
    return dataclasses.replace(config, kernels="fused", plan=path, optimizer=optimizer)


def build_plan(**changes: Any) -> Plan:
    made: dict[str, Any] = {
        "units": {f"{BLOCK}/feed_forward_in": "keep"},
        "recomputed_blocks": ("mid_block.resnets.0",),
    }
    return Plan(**{**made, "made_for": MADE_FOR, "modelled": COST, **changes})


def losses(config: Config, plan: Plan | None) -> list[float]:
    trainer = Trainer(config, NoiseClips(config=config), ONE, plan=plan)
    trainer.run()
    return [json.loads(line)["loss"] for line in (trainer.config.run_dir / "loss.jsonl").read_text().splitlines()]


def test_a_planned_run_trains_as_fused_and_keeps_its_plan(tmp_path: Path, capsys) -> None:
    config, plan, fitting = choose_plan(planned_config(tmp_path, build_plan()), ONE)
    assert fitting is None
    assert plan == build_plan()
    planned = losses(config, plan)
    plain = losses(dataclasses.replace(config, plan=None, run_dir=tmp_path / "plain"), None)
    assert planned == pytest.approx(plain, rel=1e-5)
    printed = " ".join(capsys.readouterr().out.split())
    assert "plan for RTX 4090: keeps the inside of 1 units, moves 0, recomputes 1 blocks whole" in printed
    assert "not in the plan's time: the moving average on the host" in printed
    folder = checkpoint.newest(config.run_dir)
    assert folder is not None
    documents = checkpoint.load(folder).documents
    assert read_plan(folder / "plan.json") == plan
    assert documents["plan"]["peak_gib"] == 20.5
    report = "\n".join(documents["kernels"]["report"])
    assert "keeps 1 of 7 units" in report
    assert "recomputed whole" in report


def test_config_with_a_plan_round_trips_and_is_checked(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    fused = dataclasses.replace(config, kernels="fused", plan=Path("plan.json"))
    assert from_json(to_json(fused)) == fused
    assert train.parse(["--memory-budget", "21.5"]).config.memory_budget == 21.5
    assert train.parse(["--memory-budget", "auto"]).config.memory_budget == "auto"
    assert train.parse(["--plan", "plan.json"]).config.plan == Path("plan.json")
    for changes, message in (
        ({"plan": Path("plan.json")}, "kernels is 'torch'; give fused"),
        ({"kernels": "fused", "plan": Path("plan.json"), "memory_budget": 20.0}, "either plan or memory_budget"),
        ({"kernels": "fused", "memory_budget": -1.0}, "a positive number of GiB, or auto"),
        ({"kernels": "fused", "memory_budget": "most"}, "a positive number of GiB, or auto"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)


def test_a_plan_for_another_step_is_refused_and_both_are_named(tmp_path: Path) -> None:
    other = {**MADE_FOR, "frames": 72, "width": 256, "precision": "bf16"}
    plan = build_plan(made_for=other, optimizer=OptimizerChoice(kind="adamw8bit", is_in_backward=True))
    with pytest.raises(ValueError, match="was made for another step") as refused:
        choose_plan(planned_config(tmp_path, plan), ONE)
    for words in (
        "frames is 4 and the plan's 72",
        "width is 128 and the plan's 256",
        "precision is fp32 and the plan's bf16",
        "optimizer.kind is adamw and the plan's adamw8bit",
    ):
        assert words in str(refused.value)
    with pytest.raises(ValueError, match=r"there is no file .*none\.json"):
        choose_plan(dataclasses.replace(planned_config(tmp_path, plan), plan=tmp_path / "none.json"), ONE)
    turned = tiny_config(tmp_path, micro_batch_size=2)
    turned = dataclasses.replace(turned, data=dataclasses.replace(turned.data, height=256))
    memory_plan.check_plan(turned, build_plan(made_for={**MADE_FOR, "width": 256}), "it")  # they may change places


def test_a_plan_places_the_optimizer(tmp_path: Path) -> None:
    chosen = OptimizerChoice(kind="adamw", is_in_backward=True, states_on_host=True)
    config = planned_config(tmp_path, build_plan(optimizer=chosen))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema="device"))
    placed = choose_plan(config, ONE)[0].optimizer
    assert (placed.in_backward, placed.states_on_host, placed.ema) == (True, True, "host")
    off = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema="off"))
    assert choose_plan(off, ONE)[0].optimizer.ema == "off"


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = planned_config(tmp_path, build_plan())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 << 30, 24 << 30))
    with pytest.raises(ValueError, match=r"peak is 20\.5 GiB, the device has 15\.0 GiB free .* --budget 15\.0 or less"):
        choose_plan(config, ON_GPU)
    with pytest.raises(ValueError, match="memory_budget is 'auto' and there is no GPU"):
        choose_plan(dataclasses.replace(config, plan=None, memory_budget="auto"), ONE)
    plan = build_plan(units={f"{BLOCK}/feed_forward_in": "move"}, pinned_bytes=1 << 30)
    config = planned_config(tmp_path, plan)
    with pytest.raises(ValueError, match="the UNet is on cpu"):
        losses(config, plan)
    assert not (config.run_dir / "loss.jsonl").exists()


@pytest.mark.deep
def test_a_budget_that_nothing_meets_ends_the_command_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--memory-budget", "auto", "--data.num-frames", "8", "--data.height", "64", "--data.width", "64"]
    words += ["--run-dir", str(tmp_path / "run"), "--data.prepared", str(tmp_path / "prepared")]
    monkeypatch.setattr(memory_plan, "usable_gib", lambda device: 0.02)
    monkeypatch.setattr(memory_plan, "measured_card", lambda: UNLINKED)
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(SystemExit, match=r"training stopped: no plan fits a budget of 0\.02 GiB") as stopped:
        train.main()
    least = re.search(r"the least that would do is (\S+) GiB \(modelled; (.*?); at most", str(stopped.value))
    assert least is not None and least[2] == "adamw, update inside backward"
    weights_gib = 4 * dry_run(train.parse(words[2:]).config).num_parameters / 2**30
    assert 3 * weights_gib < float(least[1]) < 5 * weights_gib  # with both moments, and what a step holds besides
    assert "or adamw8bit instead of adamw" in str(stopped.value)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_follows_the_plan(tmp_path: Path) -> None:
    config = planned_config(tmp_path, build_plan())
    kept, fused = dry_run(config, build_plan(recomputed_blocks=())), dry_run(config)
    tokens = 2 * 4 * 2 * 2  # clips, frames and pixels of the middle block
    assert kept.cost.saved_bytes - fused.cost.saved_bytes == tokens * 8 * 64 * 4  # its up-projection, float32
    assert "plan for RTX 4090" in str(kept)
    assert "plan" not in str(fused)


def test_a_budget_makes_a_plan_for_the_runs_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = planned_config(tmp_path, build_plan())
    config = dataclasses.replace(config, plan=None, memory_budget="auto", optimizer=tiny_config(tmp_path).optimizer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 24 << 30))
    monkeypatch.setattr(memory_plan, "measured_card", lambda: UNLINKED)
    budget_gib = pytest.approx((1 - CONTEXT_GIB) * (1 - FRAGMENTS))
    placed, plan, fitting = choose_plan(config, ON_GPU)
    assert fitting is not None and (fitting.plan, fitting.budget_gib) == (plan, budget_gib)
    assert plan is not None and plan.modelled is not None
    assert plan.made_for == {**MADE_FOR, "budget_gib": budget_gib}
    assert plan.modelled.peak_gib <= 0.485
    assert placed.optimizer.ema == "host"
    assert placed.optimizer.in_backward == plan.optimizer.is_in_backward
    memory_plan.check_plan(placed, plan, "it")
    found = dry_run(placed, plan)
    assert found.cost.peak_bytes / 2**30 == pytest.approx(plan.modelled.peak_gib, rel=0.05)
    assert "plan for RTX 4090" in str(found)


def test_later_plans_begin_from_the_last_and_update_as_the_first_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = tiny_config(tmp_path, batch_size=1), list[Any]()
    inside = mock.Mock(plan=build_plan(optimizer=OptimizerChoice(is_in_backward=True)))
    search = mock.Mock(best=lambda budget_gib, like: asked.append((budget_gib, like)) or inside)
    monkeypatch.setattr(memory_plan, "measured_card", lambda: UNLINKED)
    monkeypatch.setattr(memory_plan, "search_step", lambda *_, **__: search)
    planner = memory_plan.StepPlanner(config, 1)
    assert [planner.plan_within(gib) for gib in (20.0, 19.0)] == [inside.plan] * 2
    assert asked == [(20.0, None), (19.0, inside)]
    search.keep_update.assert_called_once_with(is_in_backward=True)
    search.keep_update.reset_mock()
    taken = memory_plan.StepPlanner(config, 1)
    taken.take(build_plan())
    taken.plan_within(20.0)
    search.keep_update.assert_called_once_with(is_in_backward=False)  # before the first plan
