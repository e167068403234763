"""From time stamps to one frame rate: numbers of frames, which they are, and what is said of it."""

import numpy as np
import pytest

from mimicmotion.data.timeline import Timeline, at_one_rate, is_even


def shown_at(times: np.ndarray, moment: float) -> int:
    """The frame on screen: the last one whose time has come."""
    return max(0, int((times <= moment).sum()) - 1)


@pytest.mark.parametrize(
    "times",
    [
        np.arange(300) / 30,
        np.round(np.arange(300) / (30000 / 1001), 3),  # as Matroska writes them: in milliseconds
        np.arange(300) / 30 + np.random.default_rng(0).uniform(-0.4, 0.4, 300) / 30,  # a camera's own clock
    ],
)
def test_one_rate_is_left_alone(times: np.ndarray) -> None:
    timeline = at_one_rate(times, 30000 / 1001)
    assert timeline.frames is None and timeline.notes == ()
    assert timeline.frames_per_second == pytest.approx(30, rel=3e-3)


def test_a_stated_rate_is_taken_only_where_it_fits() -> None:
    times = np.round(np.arange(100) / (24000 / 1001), 2)
    assert at_one_rate(times, 24000 / 1001).frames_per_second == 24000 / 1001
    assert at_one_rate(times, 60.0).frames_per_second == pytest.approx(24000 / 1001, rel=1e-3)
    assert at_one_rate(times[:1], 25.0).frames_per_second == 25


def test_half_fast_half_slow_takes_the_rate_of_most_of_the_time() -> None:
    times = np.concatenate([np.arange(60) / 60, 1 + np.arange(60) / 15])
    timeline = at_one_rate(times, 24.0)
    assert timeline.frames_per_second == pytest.approx(15)
    assert timeline.frames == (*range(0, 60, 4), *range(60, 120))
    assert timeline.notes == (
        "variable frame rate, 15 to 60 a second: resampled to 15 by time stamps, 45 of 120 frames left out and"
        " 0 repeated",
    )


def test_each_frame_is_shown_within_half_a_frame_of_its_time() -> None:
    random = np.random.default_rng(1)
    times = random.choice([1, 1, 1, 2, 3, 0.5], 400).cumsum() / 30
    timeline = at_one_rate(times, 0.0)
    assert timeline.frames is not None
    step = 1 / timeline.frames_per_second
    for number, frame in enumerate(timeline.frames):
        moment = times[0] + number * step
        earlier, later = (shown_at(times, moment + early * step) for early in (-0.5, 0.5))
        assert earlier <= frame <= later
    assert (len(timeline.frames) - 1) * step == pytest.approx(times[-1] - times[0], abs=step / 2)


def test_a_gap_is_held_and_named() -> None:
    times = np.concatenate([np.arange(50) / 25, 3 + np.arange(50) / 25])  # one frame for 1.04 s
    timeline = at_one_rate(times, 25.0)
    assert timeline.frames == (*range(49), *([49] * 26), *range(50, 100))
    assert "0 of 100 frames left out and 25 repeated" in timeline.notes[0]
    assert timeline.notes[1] == "1 gap in time, the longest of 1.04 s after frame 49: its last frame is held"


@pytest.mark.parametrize("slip", [-100.0, 0.0, 3600.0])
def test_a_slip_of_the_time_stamps_is_bridged_and_named(slip: float) -> None:
    times = np.arange(100) / 25
    times[40:] += slip - (1 / 25 if slip == 0 else 0)
    timeline = at_one_rate(times, 25.0)
    assert timeline.frames is None and timeline.frames_per_second == pytest.approx(25)
    assert "1 slip of the time stamps" in timeline.notes[0] and "after frame 39: bridged" in timeline.notes[0]


def test_what_stands_still_is_not_even() -> None:
    assert not is_even(np.zeros(5)) and not is_even(np.zeros(1)) and is_even(np.arange(2.0))
    assert at_one_rate(np.zeros(5), 0.0).frames_per_second == pytest.approx(1)
    assert at_one_rate(np.zeros(5), 24.0).frames_per_second == 24


def test_stamps_that_stand_still_for_a_moment_lie_between_their_neighbours() -> None:
    """As recorders with coarse clocks write them: the rate is 30 and not 15."""
    pairs = at_one_rate(np.arange(60) // 2 * 2 / 30, 30.0)
    assert (pairs.frames, pairs.frames_per_second) == (None, 30.0)
    assert pairs.notes[0] == "29 time stamps stand still: put between the ones around"
    once = np.arange(60) / 30
    once[20] = once[19]
    assert at_one_rate(once, 30.0) == Timeline(30.0, None, ("1 time stamp stands still: put between the ones around",))
    behind = np.concatenate([np.arange(20) / 30, np.arange(60) / 30])  # a second recording has no room there
    assert at_one_rate(behind, 30.0).notes[0].startswith("1 slip of the time stamps, first by -0.633 s after frame 19")
    assert at_one_rate(behind, 30.0).frames_per_second == 30
