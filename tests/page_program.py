"""Run by test_app.py: `page_program.py OPTIONS` is app.py on a pose backend that needs no model.

A picture or video whose first frame is black shows nobody.
"""

from collections.abc import Iterable
from itertools import chain
from unittest import mock

import numpy as np
from people import Swaying

from mimicmotion import app, picture_to_video
from mimicmotion.data.poses import PoseTrack


class Watching(Swaying):
    """Finds nobody where it is dark."""

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        seen = iter(frames)
        first = next(seen)
        found = super().track(chain([first], seen))
        if not first.any():
            found.keypoints[:] = 0
        return found


if __name__ == "__main__":
    with mock.patch.object(picture_to_video, "load_backend", lambda *_, **__: Watching()):
        app.main()
