"""Where a benchmark runs: the tuned allocator, and the machine, versions and command that each row records."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

# glibc maps every tensor over 32 MiB afresh by default, and then page faults, not kernels, decide.
TUNED_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
CUDA_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
QUIET_PROFILER = {"KINETO_LOG_LEVEL": "99"}  # the profiler counts allocations here; its own log lines are noise
WRITTEN = (":!bench/results", ":!docs/*.png")  # what benches write, as git leaves it out
PACKAGES = ("torch", "diffusers", "numpy", "triton", "xformers", "flash-attn")


def tune_allocator() -> None:
    """Replace this process by itself with the allocator tuned, unless it already runs so.

    glibc reads these variables when a process starts, so they cannot be set later. Values that the user has set
    stay, and every row records what was in force.
    """
    missing = {name: value for name, value in TUNED_ALLOCATOR.items() if name not in os.environ}
    if missing:
        sys.stdout.flush()
        environment = {**QUIET_PROFILER, **os.environ, **missing}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def allocator() -> dict[str, str]:
    """The allocator settings in force, CUDA's where there are any; empty string where one of the host's is not set."""
    of_cuda = {name: os.environ[name] for name in CUDA_ALLOCATOR if name in os.environ}
    return {name: os.environ.get(name, "") for name in TUNED_ALLOCATOR} | of_cuda


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of the checkout, with `-dirty` where tracked files differ from it, but for what a bench itself writes."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return "unknown"
    head = _output([git, "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    changed = _output([git, "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN])
    return f"{head}-dirty" if changed else head


def command() -> str:
    """The command line, as typed."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def chosen_device(name: str) -> torch.device:
    """The device that was asked for, a GPU with its index; auto: the GPU where there is one."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor and the instruction set that torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _output(arguments: list[str]) -> str:
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip()
