"""Make a prepared folder: `python mimicmotion/prepare.py [--videos DIR] [--preset demo] ...`.

Without --videos the embedded footage is used. Run it again after a change: only what changed is made anew.
"""

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback
    # python puts this folder first, where our modules would hide others of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from mimicmotion.commands import one_sentence
from mimicmotion.config import PRESETS, PresetName
from mimicmotion.data.cache import Manifest, check_writable
from mimicmotion.data.curate import Bounds
from mimicmotion.data.footage import embedded_footage, find_videos, not_looked_at
from mimicmotion.data.poses import load_backend
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.data.progress import VideoProgress
from mimicmotion.model.encoders import load_encoder
from mimicmotion.paths import printable
from mimicmotion.stopping import EndedBySignalError, Stop, say

_STOPPING = "videos under way are left at their next frame; again ends at once"
_GOES_ON = "what is whole stays, and the same command goes on from it"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make training clips of videos. What is not given is taken from the preset."""

    preset: PresetName = "demo"  # where size, length, encoder and poses come from
    videos: Path | None = None  # folder of your own videos; the embedded footage where none is given
    prepared: Path | None = None  # folder to write into
    height: int | None = None  # pixels, a multiple of 8 (64 for the UNet)
    width: int | None = None  # pixels, a multiple of 8 (64 for the UNet)
    sizes: tuple[str, ...] = ()  # further sizes, as 576x1024 (height x width); a clip has the one nearest its video's
    num_frames: int | None = None  # frames of a training clip; shorter stretches of a video are left out
    frame_stride: int = 1  # keep every frame_stride-th frame
    poses: Literal["dwpose", "holistic"] | None = None  # dwpose for your own videos, else the preset's
    dwpose_dir: Path | None = None  # folder of yolox_l.onnx and dw-ll_ucoco_384.onnx; downloaded where none is given
    encoder: str | None = None  # patch-codec (a stand-in), or a folder or hub id of Stable Video Diffusion
    device: str | None = None  # where the encoder runs; the GPU where there is one
    workers: int | None = None  # videos worked on at once; one a processor core where none is given
    bounds: Bounds = field(default_factory=Bounds)  # what a stretch of a video must meet
    debug: bool = False  # show where in the code an error arose


def run(arguments: Arguments) -> Manifest:
    """Prepare as asked; returns the manifest. Raises ValueError or RuntimeError with what to do."""
    data = PRESETS[arguments.preset]().data
    prepared = arguments.prepared or data.prepared
    recipe = Recipe(
        height=data.height if arguments.height is None else arguments.height,
        width=data.width if arguments.width is None else arguments.width,
        sizes=arguments.sizes,
        num_frames=data.num_frames if arguments.num_frames is None else arguments.num_frames,
        frame_stride=arguments.frame_stride,
        bounds=arguments.bounds,
        workers=arguments.workers,
    )
    check_writable(prepared)  # before anything is fetched or loaded
    videos = embedded_footage() if arguments.videos is None else find_videos(arguments.videos)
    progress = VideoProgress()
    for line in not_looked_at(arguments.videos) if arguments.videos is not None else ():
        progress.say(line)
    backend = arguments.poses or (data.poses if arguments.videos is None else "dwpose")
    encoder = load_encoder(arguments.encoder or data.encoder, device=arguments.device)
    progress.say(f"{len(videos)} videos, {recipe.height}x{recipe.width}, poses {backend}, encoder {encoder.name}")
    poses = load_backend(backend, dwpose_dir=arguments.dwpose_dir)
    return prepare(videos, prepared, recipe=recipe, poses=poses, encoder=encoder, progress=progress)


def main() -> None:
    """Run the command line; exits with 1 and the reason where nothing could be prepared."""
    arguments = tyro.cli(Arguments)
    stop = Stop(before=_STOPPING, again=_GOES_ON)
    try:
        with stop, one_sentence("preparing stopped", RuntimeError, debug=arguments.debug):
            manifest = run(arguments)
    except EndedBySignalError as error:
        say(f"stopped by {stop}: {_GOES_ON}")
        raise SystemExit(stop.exit_code) from error
    path = (arguments.prepared or PRESETS[arguments.preset]().data.prepared) / "manifest.json"
    kept, dropped = len(manifest.clips), len(manifest.dropped)
    VideoProgress().say(f"{kept} clips kept, {dropped} videos or stretches of them dropped; see {printable(path)}")


if __name__ == "__main__":
    main()
