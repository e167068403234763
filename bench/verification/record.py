"""Where results go as they come: one file of rows for a device, and the page made of it, written anew each time.

A row has the keys of every bench's rows and one more, `part`. What became of a part, and each failure, is a row too, so
the file says all that the page says, and a kill loses nothing that was finished. Rows of a file that have no part were
written by hand, and stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import report
from bench.result_file import read_rows, replace_text, write_rows
from bench.verification.page import FAILURE, STATE, Rows, page_of
from mimicmotion.paths import first_line


def stem_of(device: str) -> str:
    """A device's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Record:
    """The rows of one part of one run. path: of the JSON; the page lies beside it. kind: of all that is measured."""

    path: Path
    part: str
    setting: report.Setting
    kind: str = "measured"

    def rows(self) -> Rows:
        """All rows of the file, those of other parts included."""
        return read_rows(self.path) if self.path.exists() else []

    def begin(self, state: str, *, limit_s: float = 0.0) -> None:
        """Drop what an earlier run left of this part."""
        self._write([row for row in self.rows() if row.get("part") != self.part])
        self.say(state, 0.0, limit_s)

    def begin_if_new(self, state: str) -> None:
        """The same, where no earlier run left anything."""
        if not any(row.get("part") == self.part for row in self.rows()):
            self.begin(state)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows of this part; what claims to be measured is of this record's kind."""
        kinds = {"measured": self.kind}
        new = [{**row, "kind": kinds.get(row["kind"], row["kind"]), "part": self.part} for row in rows]
        self._write([*self.rows(), *new])

    def figures(
        self, bench: str, provider: str, values: Mapping[str, float], *, mode: str = "step",
        shape: Mapping[str, object] | None = None, kind: str | None = None, includes: str = "",
    ) -> None:  # fmt: skip
        """One row for each metric of `values`."""
        rows = report.figures(
            values, self.setting, bench=bench, provider=provider, mode=mode, kind=kind or self.kind,
            shape=shape or {}, includes=includes,
        )  # fmt: skip
        self.add(map(asdict, rows))

    def fail(self, what: str, why: str | Exception) -> None:
        """Write that something went wrong, and print it; of an error its kind and first line."""
        if isinstance(why, Exception):
            why = f"{type(why).__name__}: {first_line(why)}"
        print(f"FAILED: {self.part}: {what}: {why}", flush=True)
        self.figures(FAILURE, what, {"failures": 1}, mode=self.part, includes=why)

    def say(self, state: str, seconds: float, limit_s: float) -> None:
        """Write what becomes of the part, in the place of what was said before: how long it ran, of how long."""
        self._write([row for row in self.rows() if (row.get("part"), row["bench"]) != (self.part, STATE)])
        self.figures(STATE, self.part, {"seconds": seconds, "limit_s": limit_s}, mode="part", includes=state)

    def of_dtype(self, dtype: str) -> Record:
        """The same with another dtype in the rows."""
        return replace(self, setting=replace(self.setting, dtype=dtype))

    def _write(self, rows: Rows) -> None:
        write_rows(rows, self.path)
        replace_text(self.path.with_suffix(".md"), page_of(rows))


def failures_of(rows: Rows, parts: Iterable[str]) -> Rows:
    """The rows that say that something of these parts failed."""
    return [row for row in rows if row["bench"] == FAILURE and row.get("part") in set(parts)]
