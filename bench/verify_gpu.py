"""What only a GPU can prove, in a quarter of an hour: parts with a time each, every result written as it comes.

    python bench/verify_gpu.py [--seconds 900] [--parts step,memory,ops,variants,benches,bits] [--dry]

Each part is a process of its own (bench/verification/). It may take its share of the seconds that are left, so what one
part does not use goes to the next; past its time it is ended, and what it has written stays. Everything goes into
bench/results/<device>.json and the page <device>.md beside it, which are written anew with each result: those two files
are all that there is to commit. Run again with other parts, they are added to the same files.

It needs no network and no installation: the packages of this Python are used, and a part that wants more says which.
Kernel choices and compiled kernels are kept in build/verify_gpu for the next time. Ends with 0 where all is well, 1
where something failed (named, the rest goes on), 2 where there is no GPU. `--dry` runs every part on a CPU at tiny
sizes, with a stand-in for all that asks CUDA, and writes into build/verify_gpu.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from bench.verification.record import Record

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build/verify_gpu"
OF_STEP = ("numpy", "scipy", "rich", "safetensors", "diffusers", "transformers", "importlib_metadata")
OF_TRAINER = (*OF_STEP, "matplotlib")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """weight: seconds of 900. needs: packages beside torch and triton."""

    weight: int
    needs: tuple[str, ...]


PARTS: Mapping[str, Part] = {  # most telling first
    "step": Part(weight=235, needs=OF_STEP),
    "memory": Part(weight=180, needs=(*OF_TRAINER, "torchao")),
    "ops": Part(weight=150, needs=OF_STEP),
    "variants": Part(weight=110, needs=OF_STEP),
    "benches": Part(weight=165, needs=(*OF_STEP, "tyro")),
    "bits": Part(weight=60, needs=OF_TRAINER),
    "tests": Part(weight=600, needs=(*OF_TRAINER, "pytest", "hypothesis")),  # only when asked for
}
DEFAULT_PARTS = tuple(name for name in PARTS if name != "tests")
LEAST_SECONDS = 5  # with less a part is not begun
END_S = 3.0  # that a part has to end in when it is told to


def why_no_gpu() -> str | None:
    """Why nothing can be verified here, with what to do; None where there is a GPU. The driver is asked, not torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed here (libcuda.so.1); see `nvidia-smi`"
    count = ctypes.c_int()
    for name, status in (("cuInit", driver.cuInit(0)), ("count", driver.cuDeviceGetCount(ctypes.byref(count)))):
        if status:
            return f"the NVIDIA driver finds no usable GPU ({name} gave error {status}); see `nvidia-smi`"
    return None if count.value else "the NVIDIA driver finds no GPU; see `nvidia-smi` and CUDA_VISIBLE_DEVICES"


def why_torch_cannot() -> str | None:
    """Why torch cannot use the GPU that there is, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed in {sys.executable}; install a CUDA build of it"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no usable GPU; see `nvidia-smi`"


def missing(parts: Sequence[str]) -> dict[str, list[str]]:
    """Of each part that cannot run here, the packages that it lacks."""
    found = {part: [name for name in PARTS[part].needs if importlib.util.find_spec(name) is None] for part in parts}
    return {part: names for part, names in found.items() if names}


def share_s(part: str, waiting: Sequence[str], left_s: float) -> float:
    """Seconds that `part` may take of those that are left for it and all that wait."""
    return left_s * PARTS[part].weight / sum(PARTS[name].weight for name in waiting)


def environment_of(part: str, kept: Path) -> dict[str, str]:
    """Choices and compiled kernels are kept between runs; those of parts that time every variant begin empty."""
    choices = kept / "choices"
    if part in ("variants", "ops"):
        choices = kept / f"choices-{part}"
        shutil.rmtree(choices, ignore_errors=True)
    own = {
        "MMKERNELS_CACHE": str(choices),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(kept / "triton")),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor")),
    }
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    quiet = {"KINETO_LOG_LEVEL": "99", "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore")}
    expandable = {"PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")}
    return {**os.environ, **quiet, **expandable, **own, "PYTHONPATH": path}


def run_part(part: str, record: Record, limit_s: float, kept: Path, *, is_dry: bool) -> str:
    """Run one part in a process group of its own. Returns what became of it, in words."""
    command = [sys.executable, "-m", "bench.verification", part, str(record.path), f"{limit_s:.0f}"]
    command += ["--dry"] if is_dry else []
    print(f"\n== {part}: at most {limit_s:.0f} s", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment_of(part, kept), start_new_session=True)
    try:
        status = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        record.fail(part, f"not done in its {limit_s:.0f} s: ended; what it had finished is here")
        return "out of time"
    finally:
        end_group(process)
    if status < 0:
        record.fail(part, f"ended by signal {-status}")
    return "done" if status == 0 else "failed"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it has started, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            continue


def verify(parts: Sequence[str], seconds: float, record: Record, kept: Path, *, is_dry: bool) -> None:
    """Run the parts one after the other; each says in the record what became of it, those not reached too."""
    end_s, lacking = time.monotonic() + seconds, missing(parts)
    records = {part: dataclasses.replace(record, part=part) for part in parts}
    for part, names in lacking.items():
        records[part].begin("not run")
        records[part].fail(part, f"not run: this Python lacks {', '.join(names)}: pip install {' '.join(names)}")
    waiting = [part for part in parts if part not in lacking]
    for part in waiting:
        records[part].begin_if_new("not reached")
    while waiting:
        part, limit_s = waiting[0], share_s(waiting[0], waiting, end_s - time.monotonic())
        if limit_s < LEAST_SECONDS:
            print(f"{', '.join(waiting)}: not reached within {seconds:.0f} s", flush=True)
            return
        records[part].begin("begun", limit_s=limit_s)
        begin_s, state = time.monotonic(), "stopped"
        try:
            state = run_part(part, records[part], limit_s, kept, is_dry=is_dry)
        finally:
            records[part].say(state, time.monotonic() - begin_s, limit_s)
        waiting.pop(0)


def stop(number: int, frame: object) -> None:
    """A request to end is taken like Ctrl-C: what is there has been written."""
    raise KeyboardInterrupt


def settings() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=900, help="for all parts together; default: 900")
    parser.add_argument("--parts", default=",".join(DEFAULT_PARTS), help=f"of {', '.join(PARTS)}, in this order")
    parser.add_argument("--dry", action="store_true", help="every part on a CPU, for a look at this command itself")
    parser.add_argument("--look", action="store_true", help="only say whether there is a GPU")
    parser.add_argument(
        "--out", type=Path, help="folder for the two files; default: bench/results, dry: build/verify_gpu"
    )
    asked = parser.parse_args()
    asked.parts = [name.strip() for name in asked.parts.split(",") if name.strip()]
    if unknown := [name for name in asked.parts if name not in PARTS]:
        parser.error(f"--parts has {', '.join(unknown)}, wanted some of {','.join(PARTS)}")
    return asked


def main() -> int:
    """Verify and say where the results are. Returns the exit status."""
    asked = settings()
    if not asked.dry and (reason := why_no_gpu() or (None if asked.look else why_torch_cannot())) is not None:
        print(f"verify-gpu: NO GPU, nothing was run on one: {reason}")
        return 2
    if asked.look:
        return 0
    try:
        import torch

        from bench import report
        from bench.verification.device import Gpu, StandIn
        from bench.verification.record import Record, failures_of, stem_of
    except ModuleNotFoundError as error:
        lacking = missing(["step"]).get("step") or [str(error.name)]
        print(f"verify-gpu: this Python lacks {', '.join(lacking)}: pip install {' '.join(lacking)}")
        return 1
    signal.signal(signal.SIGTERM, stop)
    gpu = StandIn() if asked.dry else Gpu()
    folder = asked.out or (KEPT if asked.dry else ROOT / "bench/results")
    path = folder / f"{'dry' if asked.dry else stem_of(gpu.name)}.json"
    setting = report.Setting(dtype="", threads=torch.get_num_threads(), device=gpu.name)
    record, status = Record(path=path, part="", setting=setting, kind=gpu.kind), 0
    try:
        verify(asked.parts, asked.seconds, record, asked.out or KEPT, is_dry=asked.dry)
    except KeyboardInterrupt:
        status = 130
    print(f"\n{path.with_suffix('.md').read_text()}\nrows: {path}\npage: {path.with_suffix('.md')}")
    return status or int(bool(failures_of(record.rows(), asked.parts)))


if __name__ == "__main__":
    sys.exit(main())
