"""Run by test_stopping.py and test_ray_engine.py: `stopped_prepare.py FOLDER ENGINE` prepares FOLDER/videos, for ever.

The poses of the video that is longest never come: FOLDER/ready says that they are awaited.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from people import Swaying

from mimicmotion import prepare
from mimicmotion.data.poses import PoseTrack

LONGEST = 14


class Hanging(Swaying):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        found = super().track(frames)
        if len(found.keypoints) == LONGEST:
            (self.folder / "ready").touch()
            time.sleep(600)
        return found


def main() -> None:
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    prepare.load_backend = lambda *_, **__: Hanging(folder)
    sys.argv = ["prepare.py", "--videos", str(folder / "videos"), "--prepared", str(folder / "prepared")]
    sys.argv += ["--height", "64", "--width", "64", "--num-frames", "8", "--workers", "1", "--engine", engine]
    prepare.main()


if __name__ == "__main__":
    main()
