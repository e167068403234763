"""A folder as people have them, and one picture and dance beside it: `python bench/demo_videos.py`.

For training three cameras' clips of a person, and six videos that cannot be trained on, each for another reason: an
empty file, text, a file that is cut short, a picture without anybody, one that stands still, two short scenes in one.

The fourth camera is put aside, as what the trained model has never seen: its first frame as a picture, and its clip as
the dance that moves it. It is the one whose view is nearest to the others, since three clips teach no other views: in
crops of 128 pixels its joints lie 14 pixels from those of its neighbour at the same time and 25 from those of all
others on average, where the averages of the other three are 25 to 29.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import torch

from mimicmotion.data.cache import Crop
from mimicmotion.data.crop import crop_frame
from mimicmotion.data.footage import decode, embedded_footage, read_properties
from mimicmotion.sampling.video import write_video

NUM_FRAMES = 90  # enough for a clip of 72
NEW = "cam02.mp4"  # the camera that is put aside
AROUND = Crop(left=75, top=347, width=891, height=891)  # the person in all its frames, as prepare.py crops a video
SIDE = 512  # pixels, of the picture and the dance


def write(path: Path, frames: Sequence[np.ndarray], frames_per_second: float = 30) -> None:
    """A video of frames (H, W, 3) uint8."""
    write_video(
        path, torch.from_numpy(np.stack(frames)), frames_per_second=frames_per_second, comment="made for the demo"
    )


def nobody(index: int, height: int = 270, width: int = 480) -> np.ndarray:
    """Stripes that wander."""
    stripes = 120 + 60 * np.sin((np.arange(width) + 4 * index) / 20)
    return np.broadcast_to(stripes[None, :, None], (height, width, 3)).astype(np.uint8)


def fill(folder: Path) -> None:
    """Write the videos for training into folder, over those of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NEW).unlink(missing_ok=True)  # earlier versions trained on it
    good = [path for path in embedded_footage() if path.name != NEW]
    for path in good:
        shutil.copyfile(path, folder / path.name)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n")
    whole = good[0].read_bytes()
    (folder / "cut-short.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    write(folder / "nobody.mp4", [nobody(index) for index in range(NUM_FRAMES)])
    first, second = (list(islice(decode(path), NUM_FRAMES // 2)) for path in good[1:])
    write(folder / "stands-still.mp4", [first[0]] * NUM_FRAMES)
    write(folder / "two-scenes.mp4", first + second)


def put_aside(folder: Path) -> None:
    """Write picture.png and video/dance.mp4 of the camera that is not trained on into folder."""
    (folder / "video").mkdir(parents=True, exist_ok=True)
    (path,) = (path for path in embedded_footage() if path.name == NEW)
    frames = [crop_frame(frame, AROUND, SIDE, SIDE) for frame in decode(path)]
    cv2.imwrite(str(folder / "picture.png"), cv2.cvtColor(frames[0], cv2.COLOR_RGB2BGR))
    write(folder / "video" / "dance.mp4", frames, read_properties(path).frames_per_second)


def main(arguments: Sequence[str]) -> None:
    """Fill the folders that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-videos"), help="folder of videos to train on")
    parser.add_argument("--new", type=Path, default=Path("runs/demo-new"), help="folder of what is not trained on")
    asked = parser.parse_args(arguments)
    fill(asked.out)
    put_aside(asked.new)


if __name__ == "__main__":
    main(sys.argv[1:])
