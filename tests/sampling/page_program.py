"""Run by test_app.py: `page_program.py OPTIONS` is app.py on a pose backend that needs no model.

A picture or video whose first frame is black shows nobody.
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from people import Swaying

from mimicmotion import app
from mimicmotion.data.poses import PoseTrack
from mimicmotion.sampling import picture_to_video
from mimicmotion.sampling.picture_to_video import make_videos


class Watching(Swaying):
    """Finds nobody where it is dark."""

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        seen = iter(frames)
        first = next(seen)
        found = super().track(chain([first], seen))
        if not first.any():
            found.keypoints[:] = 0
        return found


def noted(*given: Any, **named: Any) -> Any:
    """make_videos, with a line in the file `jobs` where it begins and ends."""
    with Path("jobs").open("a") as jobs:
        print("begins", given[0].seed, file=jobs, flush=True)
        try:
            return make_videos(*given, **named)
        finally:
            print("ends", given[0].seed, file=jobs, flush=True)


if __name__ == "__main__":
    with (
        mock.patch.object(picture_to_video, "load_backend", lambda *_, **__: Watching()),
        mock.patch.object(app, "make_videos", noted),
    ):
        app.main()
