import statistics

import numpy as np
import pytest

from mimicmotion.config import TrainerConfig
from mimicmotion.run.skips import LEAST, WINDOW, Skips


def used(losses, **settings):
    skips = Skips(**{"spike_factor": 5.0, "limit": 3} | settings)
    for loss in losses:
        skips.count(loss, skips.why(loss))
    return skips


def test_a_spike_is_what_is_far_above_all_lately_used():
    skips = used([1.0] * (LEAST - 1))
    assert skips.why(1e9) == ""  # too few to judge by
    skips.count(1.0, "")
    assert skips.why(5.0) == "" and "5.1 is a spike, more than 5 times the latest 1" in skips.why(5.1)
    assert used([1.0] * 99, spike_factor=0.0).why(1e9) == ""


def test_a_spike_is_not_what_later_ones_are_judged_by_and_an_old_loss_is_forgotten():
    skips = used([100.0] + [1.0] * WINDOW + [10.0] * 2)
    assert (skips.total, skips.in_a_row, skips.are_too_many) == (2, 2, False)
    skips.count(10.0, skips.why(10.0))
    assert skips.are_too_many
    skips.count(1.0, "")
    assert (skips.total, skips.in_a_row) == (3, 0)


def test_what_is_kept_judges_alike():
    skips = used([float(number) for number in range(1, 40)] + [1000.0])
    again = Skips(spike_factor=5.0, limit=3)
    again.load(skips.document())
    assert again.document() == skips.document() and again.total == 1
    assert [bool(again.why(loss)) for loss in (195.0, 195.1)] == [False, True]
    again.load({"skipped": 2, "skipped_in_a_row": 1})  # of an earlier version
    assert again.why(1e9) == ""


@pytest.mark.parametrize("growth", [0.97, 1.0, 1.05])
def test_hardly_a_good_step_is_taken_for_a_spike(growth):
    """Losses that spread as the demo's do, whose largest of 180 is 7 times the median of 32, and fall or grow."""
    factor = TrainerConfig().spike_factor
    random = np.random.default_rng(0)
    spread = np.exp(0.7 * random.standard_normal(20_000))
    assert max(spread[place] / statistics.median(spread[place - 32 : place]) for place in range(32, 400)) > 5
    losses = spread * np.clip(growth ** np.arange(20_000.0).clip(max=999), 1e-3, 1e3)
    assert used(losses.tolist(), spike_factor=factor, limit=10).total <= 2
