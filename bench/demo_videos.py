"""A folder as people have them: `python bench/demo_videos.py --out runs/demo-videos`.

The demo's four clips of a person, and six videos that cannot be trained on, each for another reason: an empty file,
text, a file that is cut short, a picture without anybody, one that stands still, two short scenes in one.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from mimicmotion.data.footage import decode, embedded_footage
from mimicmotion.video import write_video

NUM_FRAMES = 90  # enough for a clip of 72


def write(path: Path, frames: Sequence[np.ndarray]) -> None:
    """A video of frames (H, W, 3) uint8, 30 a second."""
    write_video(path, torch.from_numpy(np.stack(frames)), frames_per_second=30, comment="made for the demo")


def nobody(index: int, height: int = 270, width: int = 480) -> np.ndarray:
    """Stripes that wander."""
    stripes = 120 + 60 * np.sin((np.arange(width) + 4 * index) / 20)
    return np.broadcast_to(stripes[None, :, None], (height, width, 3)).astype(np.uint8)


def fill(folder: Path) -> None:
    """Write the videos into folder, over those of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    good = embedded_footage()
    for path in good:
        shutil.copyfile(path, folder / path.name)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n")
    whole = good[0].read_bytes()
    (folder / "cut-short.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    write(folder / "nobody.mp4", [nobody(index) for index in range(NUM_FRAMES)])
    first, second = (list(islice(decode(path), NUM_FRAMES // 2)) for path in good[:2])
    write(folder / "stands-still.mp4", [first[0]] * NUM_FRAMES)
    write(folder / "two-scenes.mp4", first + second)


def main(arguments: Sequence[str]) -> None:
    """Fill the folder that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-videos"), help="folder to write into")
    fill(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main(sys.argv[1:])
