"""Most resident memory of a fresh process that trains two steps one way: what a machine must have.

    python bench/resident_peak.py --way fused [--preset demo] [--frames 72] [--height 128] [--width 128]

Python, torch's libraries, weights and optimizer included. It is the kernel's own high-water mark (VmHWM of
/proc/self/status), which starts anew with a process; bench/train_step.py runs this once for each way.
"""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from bench.environment import ROOT
from bench.placements import Way
from bench.training_step import TrainingStep
from mimicmotion import config as presets

NUM_STEPS = 2  # from the second on the optimizer's states are there


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The step."""

    way: Way
    preset: Literal["demo", "mimicmotion-72", "mimicmotion-16"] = "demo"
    part: Literal["step", "unet"] = "step"
    frames: int = 72
    height: int = 128  # pixels
    width: int = 128  # pixels
    threads: int = 1


def resident_peak_bytes(way: Way, config: presets.Config, part: str, threads: int) -> int:
    """Run this file for one way of `config` and return what it prints. Raises RuntimeError where it fails."""
    data = config.data
    values = {
        "way": way, "preset": config.preset, "part": part, "frames": data.num_frames, "height": data.height,
        "width": data.width, "threads": threads,
    }  # fmt: skip
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "bench/resident_peak.py", *flags]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ran.returncode}: {ran.stderr.strip()[-2000:]}")
    return int(ran.stdout.split()[-1])


def high_water_bytes(status: Path = Path("/proc/self/status")) -> int:
    """VmHWM of this process."""
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{status} has no line VmHWM; resident memory is measured on Linux only")


def main(settings: Settings) -> None:
    """Train and print the bytes."""
    torch.set_num_threads(settings.threads)
    preset = presets.PRESETS[settings.preset]()
    sizes = {"num_frames": settings.frames, "height": settings.height, "width": settings.width}
    config = dataclasses.replace(preset, data=dataclasses.replace(preset.data, **sizes))
    training = TrainingStep(config, torch.device("cpu"), settings.part)
    with training.running(settings.way):
        for _ in range(NUM_STEPS):
            training.step()
    print(high_water_bytes())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
