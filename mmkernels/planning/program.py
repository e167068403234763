"""A mixed-integer linear program, written column by column and row by row, for scipy.optimize.milp (HiGHS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmkernels.optional import wanted_by

with wanted_by("making a plan"):
    from scipy import optimize, sparse

Terms = Mapping[int, float]  # factors by column


@dataclass
class Program:
    """Columns from 0 to a bound, and rows: a sum of columns times factors, at most a bound."""

    upper: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float]] = field(default_factory=list)

    def column(self, upper: float = 1.0, *, is_whole: bool = True) -> int:
        """A new variable from 0 to `upper`."""
        self.upper.append(upper)
        self.whole.append(int(is_whole))
        return len(self.upper) - 1

    def at_most(self, terms: Terms, bound: float) -> None:
        """sum(terms) <= bound."""
        self.rows.append((dict(terms), bound))

    def after(self, terms: Terms, bound: float = 0.0) -> int:
        """A new column that is at least sum(terms) + bound."""
        column = self.column(np.inf, is_whole=False)
        self.at_most({**terms, column: -1.0}, -bound)
        return column

    def minimise(self, terms: Terms, gap: float, time_limit_s: float) -> optimize.OptimizeResult:
        """As scipy returns it."""
        cost = np.zeros(len(self.upper))
        for column, factor in terms.items():
            cost[column] = factor
        entries = [(row, column, x) for row, (each, _) in enumerate(self.rows) for column, x in each.items()]
        rows, columns, factors = zip(*entries, strict=True)
        matrix = sparse.csr_matrix((factors, (rows, columns)), shape=(len(self.rows), len(self.upper)))
        bounds: Any = optimize.Bounds(0.0, np.array(self.upper))  # pyright: ignore[reportArgumentType]
        most: Any = np.array([bound for _, bound in self.rows])
        return optimize.milp(
            cost, integrality=np.array(self.whole), bounds=bounds,
            constraints=optimize.LinearConstraint(matrix, -np.inf, most),
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )  # fmt: skip
