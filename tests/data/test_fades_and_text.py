"""Fades at the ends of a stretch, and text that is burnt in over the body."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from people import Swaying
from test_curation import dancing, metered, scene, watched, write

from mimicmotion.data.curate import Bounds, Watched, measure, reasons_to_drop
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.data.stretches import without_fades
from mimicmotion.model.encoders import PatchCodec

HEIGHT, WIDTH = 180, 240


def test_a_fade_is_cut_off_and_other_changes_are_not() -> None:
    usual = np.full(100, 60.0) + np.random.default_rng(0).normal(0, 0.3, 100)
    ramp = np.linspace(0.1, 1.0, 20)
    faded = usual.copy()
    faded[10:30] *= ramp
    faded[75:95] *= ramp[::-1]
    whole = slice(10, 95)
    cut = without_fades(whole, faded, 0.8)
    assert faded[10 : cut.start].max() < 0.95 * 60 < faded[cut.start + 1] and abs(cut.start - 28) <= 2
    assert abs(cut.stop - 77) <= 2
    assert without_fades(whole, faded, 0.0) == whole, "off"
    for other in (
        usual,
        np.where(np.arange(100) < 40, 40.0, 60.0),  # darker there, and no fade
        usual * (0.85 + 0.15 * np.sin(np.arange(100) / 30)),
        60 * (0.7 + 0.001 * np.arange(100)),  # hardly a change a frame
    ):
        assert without_fades(slice(0, 100), other, 0.8) == slice(0, 100)
    assert without_fades(slice(5, 6), usual, 0.8) == slice(5, 6)


def test_a_clip_begins_where_the_fade_is_over(tmp_path: Path) -> None:
    levels = np.concatenate([np.linspace(0.05, 1.0, 24), np.ones(40), np.linspace(1.0, 0.05, 16)])
    frames = ((frame * level).astype(np.uint8) for frame, level in zip(dancing(0, 80), levels, strict=True))
    video = write(tmp_path / "a.mp4", frames)
    recipe = Recipe(height=64, width=64, num_frames=16, workers=1)
    (clip,) = prepare([video], tmp_path / "p", recipe=recipe, poses=Swaying(), encoder=PatchCodec()).clips
    assert levels[clip.first_frame] > 0.9 and levels[clip.first_frame + clip.num_frames - 1] > 0.9
    assert 40 <= clip.num_frames <= 46


def film(text: tuple[float, float] | None, *, is_still: bool = False) -> Iterator[np.ndarray]:
    """Somebody in stripes, swaying as people.Swaying before lines, and white text from a place of the picture on."""
    for index in range(60):
        frame = scene(1, HEIGHT, WIDTH)
        frame[:, ::16] = 250
        left = round(WIDTH * (0.36 + (0.0 if is_still else 0.1 * np.sin(index / 5))))
        frame[45:120, left : left + 67] = scene(9)[:75, :67]
        frame[45:120, left : left + 67 : 12] = (230, 230, 40)
        if text is not None:
            x, y = text
            place, white = (round(x * WIDTH), round(y * HEIGHT)), (255, 255, 255)
            cv2.putText(frame, "www.dance.tv", place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, white, 1, cv2.LINE_AA)
        yield frame


@pytest.mark.parametrize(
    ("text", "is_still", "is_over"),
    [(None, False, False), ((0.3, 0.45), False, True), ((0.02, 0.95), False, False), (None, True, False)],
)
def test_text_over_the_moving_body_is_measured(text: tuple[float, float] | None, is_still: bool, is_over: bool) -> None:
    keypoints = watched(60).track.keypoints.copy()
    if is_still:
        keypoints[:] = keypoints[:1]
    seen = watched(60, keypoints=keypoints, pictures=vars(metered(film(text, is_still=is_still))))
    found = measure(Watched(seen.track, seen.pictures, HEIGHT, WIDTH), slice(0, 60))
    assert (found["burnt_in"] > 0.06) if is_over else (found["burnt_in"] < 0.005)
    said = "; ".join(reasons_to_drop(found, Bounds(max_burnt_in=0.03)))
    assert ("edges that stand still in a share of 0." in said) == is_over
    assert "stand still" not in "; ".join(reasons_to_drop(found, Bounds())), "off by default"
