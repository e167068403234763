"""Whether one of two runs is better on the same clips: a sign-flip permutation test of their differences.

Were there none, each clip's difference could as well have had the other sign. p is the share of all signs under which
the mean lies as far from 0 as it does, or further: of all 2^n for up to MOST_EXACT clips, else of NUM_DRAWN drawn ones.
"""

from dataclasses import dataclass

import numpy as np

MOST_EXACT = 16
NUM_DRAWN = 100_000
# The least p of n clips is 2 / 2^n: with five it is 0.0625, so that no result can fall below LEVEL.
FEWEST_CLIPS = 6
LEVEL = 0.05


@dataclass(frozen=True)
class PairedTest:
    """Of one figure."""

    num_clips: int
    mean_difference: float  # of this run minus the other
    p_value: float | None  # two-sided; None where too few clips have the figure
    sentence: str


def compare(values: list[float], others: list[float], *, name: str, higher_is_better: bool) -> PairedTest:
    """A figure of each clip of this run, and of the same clips of another."""
    differences = np.array(values, dtype=np.float64) - np.array(others, dtype=np.float64)
    number = len(differences)
    if not number:
        return PairedTest(0, 0.0, None, f"{name}: no clip has it in both")
    mean = float(differences.mean())
    said = f"{name}: {abs(mean):.4g} {'higher' if mean > 0 else 'lower'} than the other over {number} clips"
    if number < FEWEST_CLIPS:
        return PairedTest(number, mean, None, f"{said}; no test can tell with fewer than {FEWEST_CLIPS}")
    p_value = sign_flip_p(differences)
    if p_value > LEVEL:
        return PairedTest(number, mean, p_value, f"{said}, which may be chance (p = {p_value:.3g})")
    verdict = "better" if (mean > 0) == higher_is_better else "worse"
    return PairedTest(number, mean, p_value, f"{said}, which is {verdict} and hardly chance (p = {p_value:.3g})")


def sign_flip_p(differences: np.ndarray) -> float:
    """The two-sided p value of differences (n,)."""
    number = len(differences)
    if number <= MOST_EXACT:
        signs = 1 - 2 * ((np.arange(2**number)[:, None] >> np.arange(number)) & 1)
    else:  # the observed signs are among those that are counted
        drawn = np.random.default_rng(0).integers(0, 2, (NUM_DRAWN, number), dtype=np.int8)
        signs = np.concatenate([np.ones((1, number), dtype=np.int8), 1 - 2 * drawn])
    sums = np.abs(signs @ differences)
    # What is as far but for rounding counts as as far.
    return float((sums >= abs(differences.sum()) * (1 - 1e-12) - 1e-300).mean())
