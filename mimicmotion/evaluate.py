"""Evaluate a run, or generated videos beside true ones, or two of either.

`python mimicmotion/evaluate.py --run-dir runs/demo`: generates the clips that the run holds out, or all of a prepared
folder. `--generated DIR --truth DIR`: videos or folders of frames of the same names. `--against`: another run, folder
or evaluate.json, with a paired test over the clips. Writes evaluate.json, evaluate.html and a folder of videos.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # python puts this folder first, where our modules would hide others of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mmkernels.optional import explain_missing

    explain_missing("mimicmotion/evaluate.py", "`pip install -e .` in the checkout installs all of the trainer")

import tyro

from mimicmotion.commands import one_sentence
from mimicmotion.data.cache import write_text
from mimicmotion.evaluation.compared import Compared, FolderClips, RunClips
from mimicmotion.evaluation.figures import compared_with, result_of
from mimicmotion.evaluation.page import moved, write_clip, write_page
from mimicmotion.evaluation.person_metrics import PCK_THRESHOLD
from mimicmotion.evaluation.tools import Backbones, Tools, load_tools
from mimicmotion.evaluation.words import clip_line, show
from mimicmotion.model.encoders import load_encoder
from mimicmotion.sampling.generation import run_folder_of

Source = RunClips | FolderClips


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Figures of generated clips against their truth."""

    run_dir: Path = Path("runs/demo")  # a run's folder (its newest checkpoint) or one checkpoint folder
    prepared: Path | None = None  # prepared folder, all of its clips; the run's own held-out ones where none is given
    generated: Path | None = None  # instead of a run: a folder of videos, or of folders of frames
    truth: Path | None = None  # the true ones, of the same names
    against: Path | None = None  # another run, folder of generated videos, or evaluate.json
    num_clips: int | None = None  # clips from the start of the manifest; all where none is given
    num_frames: int | None = (
        None  # frames of each clip with the reference; all of a bucket or video where none is given
    )
    size: tuple[int, int] | None = None  # height and width that folders' frames are brought to; they must agree else
    seed: int = 0  # of the initial noise, the same for every clip
    check_pose_order: bool = False  # also generate from the same poses in another order
    poses: Literal["as prepared", "dwpose", "holistic", "none"] = "as prepared"  # finds poses; folders: holistic
    dwpose_dir: Path | None = None  # folder with DWPose's two ONNX files
    pck_threshold: float = PCK_THRESHOLD  # of the body's size
    encoder: str | None = None  # of folders' frames, for CLIP alone: a folder or hub id of Stable Video Diffusion
    backbones: Backbones = field(default_factory=Backbones)
    output: Path | None = None  # file to write; evaluate.json in the run's folder or in that of generated videos else
    debug: bool = False  # show where in the code an error arose


def _clips_of(arguments: Arguments, source: Source) -> Iterator[Compared]:
    chosen = {"num_clips": arguments.num_clips, "num_frames": arguments.num_frames}
    if isinstance(source, FolderClips):
        return source.clips(**chosen, size=arguments.size)
    return source.clips(**chosen, seed=arguments.seed, checks_order=arguments.check_pose_order)


def evaluate(arguments: Arguments, source: Source, tools: Tools, page: Path, folder: Path) -> dict[str, Any]:
    """The result of one run or pair of folders; videos go into folder, page is what shows them."""
    about = source.about(arguments.seed)
    for line in about.get("without_partner", []):
        print(f"without a partner: {line}", flush=True)
    comment = f"encoder: {about.get('encoder', 'none')}; {about.get('checkpoint') or about['generated']}"
    number = 0

    def write(clip: Compared, row: dict[str, Any]) -> None:
        nonlocal number
        number += 1
        row |= write_clip(page, folder, clip, number, comment)
        print(clip_line(row), flush=True)

    return result_of(about, _clips_of(arguments, source), tools, write)


def run(arguments: Arguments) -> None:
    """Evaluate what was asked for, write it and show it."""
    _check(arguments)
    source, tools = _source_and_tools(arguments)
    if arguments.generated is None:
        output = arguments.output or run_folder_of(arguments.run_dir) / "evaluate.json"
    else:
        output = arguments.output or arguments.generated / "evaluate.json"
    page, folder = output.with_suffix(".html"), output.with_suffix("")
    result = evaluate(arguments, source, tools, page, folder)
    if arguments.against is not None:
        other = _other(arguments, source, tools, page)
        result["against"] = compared_with(result, other, arguments.against.as_posix())
    write_text(output, json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_page(page, result)
    show(result)
    print(f"{output}, {page}")


def _check(arguments: Arguments) -> None:
    """Raise ValueError at a number that is none of clips, frames or pixels, and at a file that is no result."""
    least = {"num_clips": 1, "num_frames": 2}
    for name, fewest in least.items():
        if (given := getattr(arguments, name)) is not None and given < fewest:
            raise ValueError(f"got --{name.replace('_', '-')} {given}, wanted {fewest} or more")
    if arguments.size is not None and min(arguments.size) < 1:
        raise ValueError(f"got --size {' '.join(map(str, arguments.size))}, wanted a height and a width in pixels")
    if not 0 < arguments.pck_threshold < float("inf"):
        raise ValueError(f"got --pck-threshold {arguments.pck_threshold}, wanted a share of the body's size over 0")
    if arguments.output is not None and arguments.output.suffix != ".json":
        raise ValueError(
            f"got --output {arguments.output}, wanted a .json: a page and a folder of its name lie beside it"
        )


def _source_and_tools(arguments: Arguments) -> tuple[Source, Tools]:
    generated, truth = arguments.generated, arguments.truth
    if (generated is None) != (truth is None):
        raise ValueError("--generated and --truth go together; give both, or a run with --run-dir")
    if generated is None and arguments.size is not None:
        raise ValueError("--size is for folders of frames; a run generates the size of its clips")
    if generated is not None and truth is not None:
        source: Source = FolderClips(generated, truth)
        encoder, prepared_with = arguments.encoder and load_encoder(arguments.encoder), "holistic"
    else:
        source = RunClips(arguments.run_dir, prepared=arguments.prepared)
        encoder, prepared_with = source.encoder, source.dataset.manifest.pose_backend
    tools = load_tools(
        arguments.backbones,
        poses=prepared_with if arguments.poses == "as prepared" else arguments.poses,
        encoder=encoder,
        dwpose_dir=arguments.dwpose_dir,
        pck_threshold=arguments.pck_threshold,
    )
    return source, tools


def _other(arguments: Arguments, source: Source, tools: Tools, page: Path) -> dict[str, Any]:
    """The result that --against names: read, or made now of the same clips and noise."""
    given = arguments.against
    assert given is not None
    if given.is_file():
        try:
            read = json.loads(given.read_text())
        except ValueError as error:
            raise ValueError(f"--against: {given} is no evaluate.json ({error})") from error
        if not isinstance(read, dict) or not isinstance(read.get("clips"), list):
            raise ValueError(f"--against: {given} is no evaluate.json: it has no clips")
        read.pop("against", None)
        return {**read, "clips": moved(read["clips"], given.parent, page.parent)}
    again = replace(tools, distances={})
    again.add(arguments.backbones)
    if isinstance(source, FolderClips):
        assert arguments.truth is not None
        other: Source = FolderClips(given, arguments.truth)
    else:
        other = RunClips(given, like=source)
    return evaluate(arguments, other, again, page, page.with_name(f"{page.stem}-against"))


def main() -> None:
    """Run the command line; exits with 1 and the reason where it cannot evaluate."""
    arguments = tyro.cli(Arguments)
    with one_sentence("evaluation stopped", debug=arguments.debug):
        run(arguments)


if __name__ == "__main__":
    main()
