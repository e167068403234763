"""A plan: for every unit of every block whether what it saves is kept, recomputed or moved. JSON in and out.

A unit is one operation of a fused block, named "<block>/<operation>" (mmkernels.memory.units). Its choices:

- "recompute": its input is saved, what lies inside is computed again in backward; what a fused operation always does;
- "keep": besides its input, the results of its matrix products inside are saved and none of them is computed again;
- "move": as "recompute", and what is saved goes to the host and comes back for backward.

A block in `recomputed_blocks` saves only its input and is recomputed whole in backward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from mmkernels.files import atomic_write
from mmkernels.memory.units import BLOCK_INPUT, Choice
from mmkernels.scratch import DEFAULT_BYTES

OptimizerKind = Literal["adamw", "adamw8bit"]
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """How weights are updated.

    kind: "adamw": float32 weights used under autocast, float32 moments; "adamw8bit": bfloat16 weights rounded
        stochastically, 8-bit moments.
    is_in_backward: each weight is updated as soon as its gradient is there, which is freed at once.
    states_on_host: moments live on the host, and those of one weight at a time come over for its update and go back.
    """

    kind: OptimizerKind = "adamw"
    is_in_backward: bool = False
    states_on_host: bool = False

    def __str__(self) -> str:
        where = "inside" if self.is_in_backward else "after"
        return f"{self.kind}, update {where} backward{', moments on the host' if self.states_on_host else ''}"


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """What the plan costs, modelled. recompute_flops_ratio: FLOPs over plain diffusers' step, less one."""

    peak_gib: float
    recompute_flops_ratio: float
    moved_gib: float  # one way
    hidden_ratio: float  # share of the moving, both ways, that does not lengthen the step; 1 where nothing moves
    step_s: float

    def __str__(self) -> str:
        moved = f"{self.moved_gib:.1f} GiB moved to the host and back, {self.hidden_ratio:.1%} of it hidden"
        return (
            f"modelled: peak {self.peak_gib:.1f} GiB, everything included; {self.step_s:.2f} s a step; FLOPs "
            f"{self.recompute_flops_ratio:+.1%} over plain diffusers; {moved if self.moved_gib else 'nothing moved'}"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Choices by unit and block, and what they were made for; units that are not named are "recompute".

    >>> undo = mmkernels.replace(unet, plan=mmkernels.Plan(recomputed_blocks=("mid_block.attentions.0",)))
    >>> [row.why for row in mmkernels.report(unet).rows if row.name == "mid_block.attentions.0"]
    ['recomputed whole']
    >>> undo()
    """

    units: Mapping[str, Choice] = field(default_factory=dict)
    recomputed_blocks: tuple[str, ...] = ()
    window_bytes: int = 1 << 30  # bytes that may be in flight between device and host, each way
    pinned_bytes: int = 0  # of pinned host memory that moving takes
    scratch_bytes: int = DEFAULT_BYTES  # that one chunk inside a fused operation may take of the device
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)
    made_for: Mapping[str, Any] = field(default_factory=dict)  # frames, height, width, batch, card, budget_gib, ...
    modelled: Modelled | None = None

    def __post_init__(self) -> None:
        if self.scratch_bytes < 1:
            raise ValueError(f"scratch_bytes is {self.scratch_bytes} in the plan, wanted at least 1; make another plan")
        for name, choice in self.units.items():
            if choice not in get_args(Choice):
                raise ValueError(f"unit {name} is {choice!r} in the plan, wanted one of {', '.join(get_args(Choice))}")

    @property
    def moves(self) -> bool:
        """Whether anything goes to the host."""
        return "move" in self.units.values()

    def __str__(self) -> str:
        choices, budget_gib = list(self.units.values()), self.made_for.get("budget_gib")
        window = f" in a window of {self.window_bytes / GIB:.2f} GiB" if self.moves else ""
        return (
            f"plan for {self.made_for.get('card', 'a card')}{'' if budget_gib is None else f', {budget_gib:.4g} GiB'}: "
            f"keeps the inside of {choices.count('keep')} units, moves {choices.count('move')}{window}, "
            f"recomputes {len(self.recomputed_blocks)} blocks whole; {self.optimizer}"
            f"{'' if self.modelled is None else f'; {self.modelled}'}"
        )

    def check(self, units: Mapping[str, Mapping[str, tuple[Choice, ...]]], plain: Mapping[str, str]) -> None:
        """Raise ValueError where a UNet cannot follow the plan.

        units: what each unit of each of its fused blocks can be (mmkernels.replacement.plan_units). plain: why each of
            its other blocks stays plain torch.
        """
        problems = []
        for block in self.recomputed_blocks:
            if block in plain:
                problems.append(f"block {block} stays plain torch ({plain[block]}) and cannot be recomputed")
            elif BLOCK_INPUT not in units.get(block, ()):
                problems.append(f"there is no block {block} that can be recomputed whole")
        for name, choice in self.units.items():
            block, _, unit = name.partition("/")
            can = units.get(block, {}).get(unit, ())
            if block in plain:
                problems.append(f"block {block} stays plain torch ({plain[block]}) and has no unit {unit}")
            elif not can:
                problems.append(f"there is no unit {name}")
            elif choice not in can:
                problems.append(f"unit {name} is {choice!r}, it can be {' or '.join(can)}")
            elif (unit == BLOCK_INPUT) != (block in self.recomputed_blocks):
                whether = "is not" if unit == BLOCK_INPUT else "is"
                problems.append(f"unit {name} is decided on and block {block} {whether} recomputed whole")
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(
                f"this UNet cannot follow the plan: {'; '.join(problems[:3])}{more}. Make a plan for it as it is: "
                "python -m mmkernels.plan"
            )

    def choices_of(self, block: str) -> dict[str, Choice]:
        """The choices for the units of one block, by the unit's name in the block."""
        prefix = f"{block}/"
        return {name.removeprefix(prefix): choice for name, choice in self.units.items() if name.startswith(prefix)}


def document(plan: Plan) -> dict[str, Any]:
    """As JSON values, with the modelled figures at the top level and one entry for each block that is named."""
    names = sorted({name.split("/")[0] for name in plan.units} | set(plan.recomputed_blocks))
    blocks = {name: {"is_recomputed": name in plan.recomputed_blocks, "units": plan.choices_of(name)} for name in names}
    figures = {} if plan.modelled is None else asdict(plan.modelled)
    rest = {
        "blocks": blocks, "window_bytes": plan.window_bytes, "pinned_bytes": plan.pinned_bytes,
        "scratch_bytes": plan.scratch_bytes, "optimizer": asdict(plan.optimizer), "made_for": dict(plan.made_for),
        "kind": "modelled",
    }  # fmt: skip
    return figures | rest


def write_plan(plan: Plan, path: Path) -> None:
    """Write its `document` as JSON, whole or not at all.

    >>> mmkernels.write_plan(mmkernels.Plan(scratch_bytes=1 << 28), folder / "plan.json")
    """
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(document(plan), indent=2) + "\n")


def read_plan(path: Path) -> Plan:
    """What `write_plan` wrote, or `python -m mmkernels.plan`. Raises ValueError where the file is not a plan.

    >>> mmkernels.write_plan(mmkernels.Plan(scratch_bytes=1 << 28), folder / "plan.json")
    >>> mmkernels.read_plan(folder / "plan.json") == mmkernels.Plan(scratch_bytes=1 << 28)
    True
    """
    try:
        values = json.loads(path.read_text())
        blocks = values["blocks"]
        figures = {each.name: values[each.name] for each in fields(Modelled) if each.name in values}
        return Plan(
            units={f"{block}/{unit}": choice for block, one in blocks.items() for unit, choice in one["units"].items()},
            recomputed_blocks=tuple(block for block, one in blocks.items() if one["is_recomputed"]),
            window_bytes=values["window_bytes"],
            pinned_bytes=values["slab_bytes" if "slab_bytes" in values else "pinned_bytes"],  # its name in older plans
            scratch_bytes=values.get("scratch_bytes", DEFAULT_BYTES),  # plans before it have none
            optimizer=OptimizerChoice(**values["optimizer"]), made_for=values["made_for"],
            modelled=Modelled(**figures) if figures else None,
        )  # fmt: skip
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a plan ({error!r}); make one with `python -m mmkernels.plan`") from error
