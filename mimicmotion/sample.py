"""A video of a picture that moves as a driving video does, or of a prepared clip beside its truth.

`python mimicmotion/sample.py --image me.png --video dance.mp4 --weights MimicMotion_1-1.pth --out out.mp4` writes one
video for each seed. `python mimicmotion/sample.py --run-dir runs/demo [--check-pose-order]` writes sample.mp4
(reference | pose | generated | truth side by side), stills of it as sample.png, and sample.json into the run's folder.
By torchrun on several GPUs tiles, guidance's two passes and the decoding are shared out over them.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # python puts this folder first, where our modules would hide others of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mmkernels.optional import explain_missing

    explain_missing("mimicmotion/sample.py", "`pip install -e .` in the checkout installs all of the trainer")

import tyro
from torch import Tensor

from mimicmotion.commands import one_sentence
from mimicmotion.config import Config
from mimicmotion.data.cache import check_writable, write_text
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.evaluation.metrics import psnr
from mimicmotion.evaluation.person_metrics import person_region
from mimicmotion.model.encoders import load_encoder
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.ranks.distributed import ALONE, Ranks, join_ranks
from mimicmotion.run import record
from mimicmotion.run.resumption import of_other_clips
from mimicmotion.sampling.generation import (
    Decoder,
    generate,
    load_averaged,
    other_order,
    reference_and_truth,
    run_folder_of,
)
from mimicmotion.sampling.picture_arguments import PictureArguments
from mimicmotion.sampling.picture_to_video import make_videos
from mimicmotion.sampling.video import side_by_side, write_stills, write_video


@dataclass(frozen=True, kw_only=True)
class Arguments(PictureArguments):
    """Make a video of a picture and a driving video (--image), or of a prepared clip, with a run's averaged weights."""

    prepared: Path | None = None  # without --image: prepared folder; the run's own where none is given
    clip: str | None = None  # without --image: clip id in the prepared folder; its first clip where none is given
    reference: int = 0  # without --image: frame of the clip that is the reference picture
    start: int = 1  # without --image: first frame of the clip to generate
    output: Path | None = None  # without --image: folder to write into; the run's where none is given
    check_pose_order: bool = False  # also sample with the same poses in another order; exit 1 unless the right one wins


def sample_clip(
    model: MimicMotionModel, config: Config, clip: dict[str, Any], decoder: Decoder, *, seed: int, checks_order: bool,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """The wide picture (F - 1, H, 4 W, 3) and the figures of one clip."""
    reference, truth = reference_and_truth(clip, config, decoder, ranks)
    on_forward = _say("right poses", ranks)
    generated = generate(model, config, clip, decoder, seed=seed, ranks=ranks, on_forward=on_forward)
    region = person_region(clip["keypoints"][1:].numpy(), *truth.shape[-2:])

    def against_truth(frames: Tensor, what: str = "") -> dict[str, float]:
        """PSNR of the whole frame, and of the person where there is one in the driving poses."""
        whole = {f"psnr{what}_db": psnr(frames, truth)}
        return whole | ({f"person_psnr{what}_db": psnr(frames, truth, region)} if region.any() else {})

    figures: dict[str, Any] = against_truth(generated)
    figures |= against_truth(reference.expand_as(truth), "_of_repeating_the_reference")
    if checks_order:
        order = other_order(len(clip["pose"]), seed)
        on_forward = _say("poses in another order", ranks)
        permuted = generate(
            model, config, clip, decoder, seed=seed, pose_order=order, ranks=ranks, on_forward=on_forward
        )
        figures |= against_truth(permuted, "_other_pose_order")
        figures["is_right_order_higher"] = figures["psnr_db"] > figures["psnr_other_pose_order_db"]
        figures["other_pose_order"] = order.tolist()
    return side_by_side([reference, clip["pose"][1:], generated, truth]), figures


def _say(what: str, ranks: Ranks) -> Callable[[int, int], None]:
    """A callback that prints each fifth of the way, on the first rank."""

    def say(done: int, total: int) -> None:
        if ranks.is_first and 5 * done // total > 5 * (done - 1) // total:
            print(f"sampling with {what}: {done}/{total}", flush=True)

    return say


def _said(figures: dict[str, Any], what: str) -> str:
    """A PSNR in words, and that of the person where there is one."""
    person = figures.get(f"person_psnr{what}_db")
    return f"{figures[f'psnr{what}_db']:.3f} dB" + ("" if person is None else f", of the person {person:.3f} dB")


def _check_together(arguments: Arguments) -> None:
    """Raise ValueError where something is given that a video of a picture, or one of a prepared clip, does not read."""
    of_both = ("run_dir", "num_frames", "seed", "num_steps", "guidance", "kernels", "debug")
    of_pictures = {field.name for field in dataclasses.fields(PictureArguments)}
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(Arguments)
        if field.name not in of_both
        and (field.name in of_pictures) == (arguments.image is None)
        and getattr(arguments, field.name) != field.default
    ]
    if given and arguments.image is None:
        raise ValueError(f"got {', '.join(given)} without --image; give the picture that is to move")
    if given:
        raise ValueError(f"got {', '.join(given)} with --image; leave it out: they are for prepared clips")


def run(arguments: Arguments, ranks: Ranks = ALONE) -> bool:
    """Sample as asked; False where the order of poses was checked and the right one did not win, on the first rank."""
    _check_together(arguments)
    if arguments.image is not None:
        make_videos(arguments, ranks=ranks)
        return True
    config, model, folder = load_averaged(arguments.run_dir, arguments.kernels)
    output = arguments.output or run_folder_of(arguments.run_dir)
    if ranks.is_first:
        check_writable(output)  # before all that takes long
    asked = {"num_steps": arguments.num_steps, "guidance": arguments.guidance}
    given = {name: value for name, value in asked.items() if value is not None}
    sampling = dataclasses.replace(config.sampling, **given)
    config = dataclasses.replace(config, sampling=sampling)
    decoder = load_encoder(config.data.encoder)
    data = config.data
    dataset = ClipDataset(
        arguments.prepared or data.prepared, data.num_frames, config.trainer.seed, lengths=data.lengths
    )
    notes = of_other_clips(folder, config, dataset.manifest)
    clip_id = dataset.clip_ids[0] if arguments.clip is None else arguments.clip
    clip = dataset.clip(clip_id, arguments.reference, arguments.start, arguments.num_frames)
    rate = dataset.frames_per_second(clip_id)
    for note in [*notes, f"checkpoint {folder}, clip {clip_id}, encoder {decoder.name}"] if ranks.is_first else ():
        print(note, flush=True)
    wide, figures = sample_clip(
        model, config, clip, decoder, seed=arguments.seed, checks_order=arguments.check_pose_order, ranks=ranks
    )
    if not ranks.is_first:
        return True
    figures = {
        "checkpoint": folder.as_posix(),
        "encoder": decoder.name,
        "clip": clip_id,
        "reference_frame": arguments.reference,
        "first_frame": arguments.start,
        "num_frames": len(wide),
        "seed": arguments.seed,
        "sampling_steps": sampling.num_steps,
        "guidance": sampling.guidance,
        "truth": "the clip's own latents, decoded",
        **figures,
    }
    comment = f"reference | pose | generated | truth; encoder: {decoder.name}; checkpoint: {folder.as_posix()}"
    write_video(output / "sample.mp4", wide, frames_per_second=rate, comment=comment)
    write_stills(output / "sample.png", wide)
    write_text(output / "sample.json", json.dumps(figures, indent=1) + "\n")
    record.plot(output, config, encoder=decoder.name)  # its page shows the video now
    print(f"reference | pose | generated | truth, encoder {decoder.name}: {output / 'sample.mp4'}")
    print(f"PSNR against the truth: {_said(figures, '')} ({output / 'sample.json'})")
    print(f"PSNR of repeating the reference: {_said(figures, '_of_repeating_the_reference')}")
    if not arguments.check_pose_order:
        return True
    print(f"PSNR with the same poses in another order: {_said(figures, '_other_pose_order')}", flush=True)
    return figures["is_right_order_higher"]


def main() -> None:
    """Run the command line; exits with 1 and the reason where it cannot sample or the pose check fails."""
    arguments = tyro.cli(Arguments)
    with one_sentence("sampling stopped", debug=arguments.debug), join_ranks() as ranks:
        is_good = run(arguments, ranks)
    if not is_good:
        raise SystemExit("pose check failed: the right order of poses is not closer to the truth than another order.")


if __name__ == "__main__":
    main()
