"""What came of one injection, and the figures of a row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one injection."""

    kind: str  # which of the row's
    why_not: str = ""  # what did not hold; none where it survived
    lost: int = 0  # steps that had to be done again, or what else the row counts
    seconds: float = 0.0  # that the row is about

    @property
    def has_survived(self) -> bool:
        """Whether all that the row asks for held."""
        return not self.why_not


def first_of(*checks: tuple[bool, str]) -> str:
    """What the first check says that does not hold; nothing where all do."""
    return next((said for holds, said in checks if not holds), "")


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """injected, survived, lost (most of any), seconds (most of any), kinds (survived of injected), and what failed."""
    injected = Counter(outcome.kind for outcome in outcomes)
    survived = Counter(outcome.kind for outcome in outcomes if outcome.has_survived)
    return {
        "injected": len(outcomes),
        "survived": survived.total(),
        "lost": max(outcome.lost for outcome in outcomes),
        "seconds": round(max(outcome.seconds for outcome in outcomes), 2),
        "kinds": {kind: f"{survived[kind]} of {number}" for kind, number in sorted(injected.items())},
        "failed": [f"{outcome.kind}: {outcome.why_not}" for outcome in outcomes if not outcome.has_survived],
    }
