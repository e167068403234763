"""Whether two commits train the same bits: `python tools/same_bits.py BEFORE AFTER`, for whoever moves code about.

Both are checked out into a temporary folder. BEFORE prepares the demo's footage; each trains the first ten steps of the
demo on it, on one thread with the fused kernels, and what they leave is compared: every tensor of the checkpoint
(weights, moments, moving average), and loss and gradient norm of each step. Takes a few minutes on two cores. Ends with
0 where all bits are the same, else with 1 and the names of what differs.

The C++ kernels are taken as they are built in this checkout where a commit has the same sources, else they are built.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ("csrc", "CMakeLists.txt", "setup.py")  # what the native module is made of
STEPS = 10
OF_A_STEP = ("loss", "gradient_norm")


def check_out(commit: str, folder: Path) -> None:
    """The commit's files, with the native module."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    built = sorted((ROOT / "mmkernels").glob("_native*.so"))
    is_same = not subprocess.run(["git", "diff", "--quiet", commit, "--", *NATIVE], cwd=ROOT, check=False).returncode
    if is_same and built:
        shutil.copy(built[0], folder / "mmkernels")
    else:
        run(folder, "setup.py", "build_ext", "--inplace")


def run(checkout: Path, *words: object) -> None:
    """A script of a checkout, with its modules; what it says is shown where it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # CMake, Ninja
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment |= {"OMP_WAIT_POLICY": "passive", "MMKERNELS_NVCC": "OFF"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {checkout} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def found_in(run_dir: Path) -> dict[str, str]:
    """What a run left, by name: a hash of each tensor, and each step's figures as Python writes them."""
    found: dict[str, str] = {}
    for file in sorted(run_dir.glob(f"step-{STEPS:08d}/*.safetensors")):
        for name, tensor in load_file(file).items():
            content = str(tensor.dtype).encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[f"{file.name}: {name}"] = hashlib.sha256(content).hexdigest()
    for line in (run_dir / "loss.jsonl").read_text().splitlines():
        row = json.loads(line)
        found |= {f"step {row['step']}: {name}": repr(row[name]) for name in OF_A_STEP}
    return found


def main() -> int:
    """Compare two commits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: list[dict[str, str]] = []
        for number, commit in enumerate((asked.before, asked.after)):
            checkout = folder / f"checkout-{number}"
            check_out(commit, checkout)
            if number == 0:
                run(checkout, "bench/demo_videos.py", "--out", folder / "videos", "--new", folder / "new")
                footage = ("--videos", folder / "videos", "--prepared", folder / "prepared")
                run(checkout, "mimicmotion/prepare.py", "--preset", "demo", *footage, "--poses", "holistic")
            run_dir = folder / f"run-{number}"
            run(
                checkout, "mimicmotion/train.py", "--kernels", "fused", "--preset", "demo", "--run-dir", run_dir,
                "--data.prepared", folder / "prepared", "--data.num-frames", 16, "--trainer.num-steps", STEPS,
            )  # fmt: skip
            found.append(found_in(run_dir))
    before, after = found
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in differing:
        print(f"{name} differs: {before.get(name)} before, {after.get(name)} after")
    print(
        f"{len(before)} tensors and figures of {STEPS} steps: " + ("the same bits" if not differing else "NOT the same")
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
