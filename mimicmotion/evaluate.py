"""Evaluate a run: `python mimicmotion/evaluate.py --run-dir runs/demo`: PSNR and SSIM over prepared clips."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

if __name__ == "__main__":  # python puts this folder first, where our modules would hide others of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from mimicmotion.commands import one_sentence
from mimicmotion.data.cache import atomic_write
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.generation import decode_clip, generate, load_averaged, load_decoder, run_folder_of
from mimicmotion.metrics import psnr, ssim
from mimicmotion.resumption import of_other_clips


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """PSNR and SSIM of generated clips against their truth."""

    run_dir: Path = Path("runs/demo")  # a run's folder (its newest checkpoint) or one checkpoint folder
    prepared: Path | None = None  # prepared folder, such as a held-out one; the run's own where none is given
    num_clips: int | None = None  # clips from the start of the manifest; all where none is given
    seed: int = 0  # of the initial noise, the same for every clip
    output: Path | None = None  # file to write; evaluate.json in the run's folder where none is given
    debug: bool = False  # show where in the code an error arose


def run(arguments: Arguments) -> None:
    """Generate each clip from its frame 0 and write one row a clip and the means."""
    config, model, folder = load_averaged(arguments.run_dir)
    decoder = load_decoder(config.data.encoder)
    data = config.data
    dataset = ClipDataset(
        arguments.prepared or data.prepared, data.num_frames, config.trainer.seed, lengths=data.lengths
    )
    for note in of_other_clips(folder, config, dataset.manifest):
        print(note, flush=True)
    rows = []
    for clip_id in dataset.clip_ids[: arguments.num_clips]:
        clip = dataset.clip(clip_id, 0, 1)
        truth = decode_clip(clip["latents"][1:], config, decoder)
        generated = generate(model, config, clip, decoder, seed=arguments.seed)
        rows.append({"clip": clip_id, "psnr_db": psnr(generated, truth), "ssim": ssim(generated, truth)})
        print(f"{clip_id}: PSNR {rows[-1]['psnr_db']:.3f} dB, SSIM {rows[-1]['ssim']:.4f}", flush=True)
    if not rows:
        raise ValueError(f"{dataset.prepared} has no clip to evaluate; run prepare.py with usable videos.")
    result = {
        "checkpoint": folder.as_posix(),
        "encoder": decoder.name,
        "truth": "each clip's own latents, decoded",
        "psnr_db": fmean(row["psnr_db"] for row in rows),
        "ssim": fmean(row["ssim"] for row in rows),
        "clips": rows,
    }
    output = arguments.output or run_folder_of(arguments.run_dir) / "evaluate.json"
    with atomic_write(output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    means = f"PSNR {result['psnr_db']:.3f} dB, SSIM {result['ssim']:.4f}"
    print(f"mean over {len(rows)} clips, encoder {decoder.name}: {means} ({output})")


def main() -> None:
    """Run the command line; exits with 1 and the reason where it cannot evaluate."""
    arguments = tyro.cli(Arguments)
    with one_sentence("evaluation stopped", debug=arguments.debug):
        run(arguments)


if __name__ == "__main__":
    main()
