"""From the times at which a video's frames are shown to frames at one rate."""

from dataclasses import dataclass

import numpy as np

# A frame shown this many times as long as most is a gap: the picture stood still, or something is missing.
GAP = 5.0
# Seconds that no frame is shown; a longer one is a slip of the time stamps and is not filled.
LONGEST_GAP_S = 10.0
# A stated rate this near to the measured one is taken: containers round time stamps, often to milliseconds.
RATE_TOLERANCE = 0.005


@dataclass(frozen=True)
class Timeline:
    """Frames at one rate: which of the shown frames each is (None: all, in order), and what had to be done."""

    frames_per_second: float
    frames: tuple[int, ...] | None
    notes: tuple[str, ...] = ()


def is_even(times: np.ndarray) -> bool:
    """Whether each of times (N,), seconds, lies less than half a frame from where one rate would have it."""
    if len(times) < 2:
        return False
    step = _mean_step(times)
    late = times - step * np.arange(len(times))
    return bool(np.ptp(late) < step)


def _mean_step(times: np.ndarray) -> float:
    """Seconds a frame, of the straight line nearest to times."""
    return float(np.polyfit(np.arange(len(times)), times, 1)[0])


def at_one_rate(times: np.ndarray, stated_rate: float) -> Timeline:
    """The frames shown at times (N,), in seconds and in order, at one rate: the one that most of the time is shown at.

    Frames that come faster are left out and frames that stay longer are repeated, each shown within half a frame of its
    time. stated_rate, 0 where unknown, is taken where it fits or where there is nothing to measure.
    """
    times, slips = _without_slips(times, stated_rate)
    if len(times) < 2:
        return Timeline(stated_rate or 1.0, None, slips)
    if is_even(times):
        return Timeline(_near_stated(1 / _mean_step(times), stated_rate), None, slips)
    steps = np.diff(times)
    usual = steps[steps <= GAP * np.median(steps)]
    by_length = np.sort(usual)
    shown_most = by_length[np.searchsorted(by_length.cumsum(), by_length.sum() / 2)]
    step = float(usual[(usual > 0.8 * shown_most) & (usual < 1.25 * shown_most)].mean())
    rate = _near_stated(1 / step, stated_rate)
    step = 1 / rate
    # A frame is due half a frame early, so that uneven time stamps neither drop nor double what comes once a frame.
    due = np.concatenate([times[:1], times[1:] - np.minimum(steps, step) / 2])
    wanted = times[0] + step * np.arange(round((times[-1] - times[0]) / step) + 1)
    frames = np.searchsorted(due, wanted, side="right") - 1
    return Timeline(
        rate, tuple(frames.tolist()), (*slips, _resampled(rate, usual, frames, len(times)), *_gaps(steps, len(usual)))
    )


def _without_slips(times: np.ndarray, stated_rate: float) -> tuple[np.ndarray, tuple[str, ...]]:
    """Times where what goes backwards, stands still or leaps is one ordinary step on, or between its neighbours."""
    times, repeats = _without_repeats(times)
    times, slips = _without_leaps(times, stated_rate)
    return times, (*repeats, *slips)


def _without_repeats(times: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Times where those that stand still for a moment lie evenly between the ones around them."""
    steps = np.diff(times)
    ahead = np.flatnonzero(np.concatenate([[True], times[1:] > np.maximum.accumulate(times)[:-1]]))
    numbers = np.diff(ahead)
    if not (numbers > 1).any() or not (steps > 0).any():
        return times, ()
    between = np.diff(times[ahead]) / numbers
    # Where the clock stood, or a second recording begins, there is no room for them.
    room = between > 0.75 * (times.max() - times[0]) / len(steps)
    is_repeat = np.repeat((numbers > 1) & room, numbers)
    evenly = np.interp(np.arange(len(times)), ahead, times[ahead])
    repaired = times.copy()
    repaired[: len(is_repeat)][is_repeat] = evenly[: len(is_repeat)][is_repeat]
    num_moved = int((repaired != times).sum())
    if num_moved == 0:
        return times, ()
    said = f"{num_moved} time stamp{'s stand' if num_moved > 1 else ' stands'} still: put between the ones around"
    return repaired, (said,)


def _without_leaps(times: np.ndarray, stated_rate: float) -> tuple[np.ndarray, tuple[str, ...]]:
    steps = np.diff(times)
    slipped = (steps <= 0) | (steps > LONGEST_GAP_S)
    if not slipped.any():
        return times, ()
    ordinary = 1 / (stated_rate or 1.0) if slipped.all() else float(np.median(steps[~slipped]))
    repaired = times[0] + np.concatenate([[0.0], np.where(slipped, ordinary, steps).cumsum()])
    first = int(slipped.argmax())
    slips = f"{slipped.sum()} slip{'s' * bool(slipped.sum() > 1)} of the time stamps"
    return repaired, (f"{slips}, first by {steps[first]:.3g} s after frame {first}: bridged",)


def _near_stated(rate: float, stated_rate: float) -> float:
    return stated_rate if abs(stated_rate - rate) < RATE_TOLERANCE * rate else rate


def _resampled(rate: float, usual: np.ndarray, frames: np.ndarray, num_shown: int) -> str:
    num_kept = len(np.unique(frames))
    return (
        f"variable frame rate, {1 / usual.max():.3g} to {1 / usual.min():.3g} a second: resampled to {rate:.4g} by time"
        f" stamps, {num_shown - num_kept} of {num_shown} frames left out and {len(frames) - num_kept} repeated"
    )


def _gaps(steps: np.ndarray, num_usual: int) -> tuple[str, ...]:
    if num_usual == len(steps):
        return ()
    longest, count = int(steps.argmax()), len(steps) - num_usual
    return (
        f"{count} gap{'s' * (count > 1)} in time, the longest of {steps[longest]:.3g} s after frame {longest}: its last"
        " frame is held",
    )
