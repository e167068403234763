"""Make a prepared folder: `python mimicmotion/prepare.py [--videos DIR ...] [--preset demo] ...`.

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
    from mmkernels.optional import explain_missing

    explain_missing("mimicmotion/prepare.py", "`pip install -e .` in the checkout installs all of the trainer")

import tyro

from mimicmotion.commands import one_sentence
from mimicmotion.config import PRESETS, PresetName
from mimicmotion.data.cache import Manifest, check_writable, is_prepared
from mimicmotion.data.curate import Bounds
from mimicmotion.data.footage import embedded_footage, find_all, not_looked_at
from mimicmotion.data.poses import load_backend
from mimicmotion.data.preparation import Engine, NothingKeptError, prepare
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.recipe import Recipe
from mimicmotion.data.reference_noise import ReferenceNoise
from mimicmotion.data.rehearsal import Rehearsal, rehearse
from mimicmotion.data.report_page import write_report
from mimicmotion.data.verification import damages
from mimicmotion.model.encoders import load_encoder
from mimicmotion.paths import printable
from mimicmotion.run.stopping import Stop, say

_STOPPING = "videos under way are left at their next frame; again ends at once"
_GOES_ON = "what is whole stays, and the same command goes on from it"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make training clips of videos. What is not given is taken from the preset."""

    preset: PresetName = "demo"  # where size, length, encoder and poses come from
    videos: tuple[Path, ...] = ()  # folders, videos, patterns as "takes/*.mp4", lists as takes.txt; else the embedded
    prepared: Path | None = None  # folder to write into
    height: int | None = None  # pixels, a multiple of 8 (64 for the UNet)
    width: int | None = None  # pixels, a multiple of 8 (64 for the UNet)
    sizes: tuple[str, ...] = ()  # further sizes, as 576x1024 (height x width); a clip has the one nearest its video's
    num_frames: int | None = None  # frames of a training clip; shorter stretches of a video are left out
    frame_stride: int = 1  # keep every frame_stride-th frame
    with_mirrored: bool = False  # each clip a second time, flipped left to right, with left and right joints exchanged
    jittered_crops: int = 0  # so many further copies of each clip, in crops up to 1.25 times as large drawn at random
    poses: Literal["dwpose", "holistic"] | None = None  # dwpose for your own videos, else the preset's
    dwpose_dir: Path | None = None  # folder of yolox_l.onnx and dw-ll_ucoco_384.onnx; downloaded where none is given
    encoder: str | None = None  # patch-codec (a stand-in), or a folder or hub id of Stable Video Diffusion
    device: str | None = None  # where the encoder runs; the GPU where there is one
    workers: int | None = None  # videos worked on at once; one a processor core where none is given
    reference_noise: ReferenceNoise = field(default_factory=ReferenceNoise)  # on pixels, as a run asks for it
    bounds: Bounds = field(default_factory=Bounds)  # what a stretch of a video must meet
    engine: Engine = "pool"  # pool: this process; ray: a Ray cluster (RAY_ADDRESS), or Ray on this machine
    dry_run: bool = False  # look at the first minute of each video, say what would be kept and how long all would take
    verify: bool = False  # read all of a prepared folder again and say what is damaged
    report: bool = False  # write report.html into the prepared folder; with no other setting, of what is there already
    debug: bool = False  # show where in the code an error arose


def prepared_folder(arguments: Arguments) -> Path:
    """The folder that is asked for."""
    return arguments.prepared or PRESETS[arguments.preset]().data.prepared


def recipe_of(arguments: Arguments) -> Recipe:
    """How clips are made, as asked."""
    data = PRESETS[arguments.preset]().data
    return Recipe(
        height=data.height if arguments.height is None else arguments.height,
        width=data.width if arguments.width is None else arguments.width,
        sizes=arguments.sizes,
        num_frames=data.num_frames if arguments.num_frames is None else arguments.num_frames,
        frame_stride=arguments.frame_stride,
        with_mirrored=arguments.with_mirrored,
        num_jittered=arguments.jittered_crops,
        reference_noise=arguments.reference_noise,
        bounds=arguments.bounds,
        workers=arguments.workers,
    )


def run(arguments: Arguments) -> Manifest | Rehearsal:
    """Prepare or rehearse as asked. Raises ValueError or RuntimeError with what to do."""
    data, prepared, recipe = PRESETS[arguments.preset]().data, prepared_folder(arguments), recipe_of(arguments)
    if not arguments.dry_run:
        check_writable(prepared)  # before anything is fetched or loaded
    videos = find_all(arguments.videos) if arguments.videos else embedded_footage()
    progress = VideoProgress()
    for folder in filter(Path.is_dir, arguments.videos):
        for line in not_looked_at(folder):
            progress.say(line)
    backend = arguments.poses or ("dwpose" if arguments.videos else data.poses)
    encoder = load_encoder(arguments.encoder or data.encoder, device=arguments.device)
    progress.say(f"{len(videos)} videos, {recipe.height}x{recipe.width}, poses {backend}, encoder {encoder.name}")
    poses = load_backend(backend, dwpose_dir=arguments.dwpose_dir)
    if arguments.dry_run:
        return rehearse(videos, recipe=recipe, poses=poses, encoder=encoder, progress=progress)
    return prepare(
        videos, prepared, recipe=recipe, poses=poses, encoder=encoder, progress=progress, engine=arguments.engine
    )


def verify(prepared: Path) -> None:
    """Say what of a prepared folder is damaged; exits with 1 where anything is."""
    found = damages(prepared)
    for line in found:
        VideoProgress().say(f"{printable(prepared)}: {line}")
    if found:
        raise SystemExit(f"{len(found)} files of {printable(prepared)} are damaged; prepare again, which mends them")
    VideoProgress().say(f"all of {printable(prepared)} is as it was made")


def is_report_alone(arguments: Arguments) -> bool:
    """Whether nothing is asked for but a report of what is prepared already."""
    alone = Arguments(preset=arguments.preset, prepared=arguments.prepared, report=True, debug=arguments.debug)
    return arguments == alone and is_prepared(prepared_folder(arguments))


def main() -> None:
    """Run the command line; exits with 1 and the reason where nothing could be prepared or something is damaged."""
    arguments = tyro.cli(Arguments)
    prepared, stop = prepared_folder(arguments), Stop(before=_STOPPING, again=_GOES_ON)
    try:
        with stop, one_sentence("preparing stopped", RuntimeError, debug=arguments.debug):
            if arguments.verify:
                verify(prepared)
                return
            if arguments.dry_run and arguments.report:
                raise ValueError("got --dry-run and --report, wanted one of them: a dry run makes nothing to report on")
            try:
                made = Manifest.read(prepared) if is_report_alone(arguments) else run(arguments)
            except NothingKeptError:
                if arguments.report and not Manifest.read(prepared).clips:
                    VideoProgress().say(f"nothing is kept; see {printable(write_report(prepared))}")
                raise
            page = write_report(prepared) if arguments.report else None
    except KeyboardInterrupt as error:  # Ray raises one of its own in the place of ours
        if not stop.is_asked:
            raise
        say(f"stopped by {stop}: {_GOES_ON}")
        raise SystemExit(stop.exit_code) from error
    if isinstance(made, Rehearsal):
        for line in made.lines():
            VideoProgress().say(line)
        return
    where = printable(page or prepared / "manifest.json")
    kept, dropped = len(made.clips), len(made.dropped)
    VideoProgress().say(f"{kept} clips kept, {dropped} videos or stretches of them dropped; see {where}")


if __name__ == "__main__":
    main()
