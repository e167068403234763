"""How the blocks of a UNet run, and who computes each of their operations: the table that `mmkernels.report` gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmkernels.blocks.cross_attention import BYPASSED
from mmkernels.blocks.drop_in import FusedBlock
from mmkernels.kernels.dispatch import named
from mmkernels.kernels.registry import FAMILIES
from mmkernels.shares import F, H, W


@dataclass(frozen=True)
class Row:
    """One block: its dotted name, its class in diffusers, how it runs (fused, checkpoint or torch) and why so.

    backends: of each operation of a fused block who computes it, as `mmkernels.kernels.dispatch.named` says it.
    """

    name: str
    kind: str
    how: str
    why: str
    backends: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """How every spatio-temporal block of a UNet runs, and its output head as "conv_out"; str() is a table.

    without_gradient: parameters that require a gradient and get none (None) while the context is one token, since a
        fused block does not run what cannot change the result; over several tokens each has one. See `dead_parameters`.
    fused_parameters, fused_flops: the shares of the whole model's that fused blocks compute, without the parts of them
        that are called as they are; FLOPs as mmkernels.shares models them.

    >>> report = mmkernels.report(unet)  # print(report) is the table
    >>> isinstance(report, mmkernels.Report), report.fused_flops
    (True, 0.0)
    """

    rows: tuple[Row, ...]
    without_gradient: tuple[str, ...] = ()
    fused_parameters: float = 0.0
    fused_flops: float = 0.0

    def __str__(self) -> str:
        cells = [("block", "kind", "how", "why"), *((row.name, row.kind, row.how, row.why) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in cells]
        lines += self._backend_lines()
        if self.without_gradient:
            parts = sorted({part for name in self.without_gradient for part in BYPASSED if f".{part}." in name})
            lines.append(
                f"while the context is one token, no gradient for {len(self.without_gradient)} parameters "
                f"({', '.join(parts)}; mmkernels.dead_parameters names them): leave them out of the optimizer, since "
                "DistributedDataParallel gives them zeros, which weight decay acts on"
            )
        lines.append(
            f"fused: {self.fused_parameters:.1%} of parameters, {self.fused_flops:.1%} of FLOPs (modelled, "
            f"{F} frames, {8 * W} pixels wide and {8 * H} high)"
        )
        return "\n".join(lines)

    def _backend_lines(self) -> list[str]:
        """A line for each set of backends that blocks of a kind have in common."""
        same: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = defaultdict(list)
        for row in self.rows:
            if row.backends:
                same[row.kind, tuple(row.backends.items())].append(row.name)
        lines = []
        for (kind, backends), names in same.items():
            of: dict[str, list[str]] = defaultdict(list)
            for operation, backend in backends:
                of[backend].append(operation)
            is_all = sum(row.kind == kind and row.how == "fused" for row in self.rows) == len(names)
            blocks = f"{len(names)} {kind}" if is_all else f"{len(names)} {kind} ({', '.join(names)})"
            parts = (f"{', '.join(operations)}: {backend}" for backend, operations in of.items())
            lines.append(f"kernels of {blocks}: {'; '.join(parts)}")
        return lines


def backends_of(block: FusedBlock) -> dict[str, str]:
    """Who computes each operation of a block."""
    return {operation: named(call) for operation, call in block.calls().items() if call.op in FAMILIES}
