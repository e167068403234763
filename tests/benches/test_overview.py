"""`python -m mmkernels` prints its table whatever is missing: each case in a process that has nothing else installed.

What a case has of torch and Triton are stubs: no one environment has all these builds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from mmkernels import extension

ROWS = ("native CPU kernels", "native CUDA code", "Triton", "torch", "GPU")
TRITON = {"triton": "__version__ = '3.8.0'"}
TORCH = """
import sys, types, warnings
__version__ = {version!r}
version = types.SimpleNamespace(cuda={cuda!r})
def properties(index):
    return types.SimpleNamespace(name="Imagined 1000", major=9, minor=0, total_memory=24 << 30)
def is_available():
    return False
def device_count():
    return 1
{changes}
cuda = types.ModuleType("torch.cuda")
cuda.is_available, cuda.device_count, cuda.get_device_properties = is_available, device_count, properties
sys.modules["torch.cuda"] = cuda
"""
OLD_DRIVER = """
def is_available():
    warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\\nUpdate it")
    return False
"""
WITH_GPU = "def is_available(): return True\n"
LOST_GPU = WITH_GPU + "def properties(index): raise RuntimeError('CUDA error: device is lost\\nCompile with')\n"


def torch(cuda: str | None, changes: str = "") -> dict[str, str]:
    return {"torch": TORCH.format(version="2.14.1", cuda=cuda, changes=changes)}


def overview(folder: Path, packages: dict[str, str], *, has_native: bool = True) -> str:
    """What a fresh process prints from a bare checkout, beside these packages and the standard library alone."""
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "mmkernels", checkout / "mmkernels", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    if has_native:
        module = Path(str(extension.native().__file__))
        (checkout / "mmkernels" / module.name).symlink_to(module)
    for name, source in packages.items():
        (folder / "packages" / name).mkdir(parents=True)
        (folder / "packages" / name / "__init__.py").write_text(source)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {
        "PYTHONPATH": os.pathsep.join([str(folder / "packages"), str(checkout)]),
        "MMKERNELS_CACHE": str(folder / "cache"),
    }
    words = [sys.executable, "-S", "-m", "mmkernels"]  # -S: without what this Python has installed
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def rows(printed: str) -> dict[str, str]:
    lines = printed.splitlines()[1 : 1 + len(ROWS)]
    found = {name: line.split(name, 1)[1].strip() for name, line in zip(ROWS, lines, strict=True)}
    assert all(text.startswith(("yes: ", "no: ", "unknown: ")) for text in found.values()), printed
    return found


@pytest.mark.parametrize(
    ("packages", "row", "wanted"),
    [
        (torch("13.0"), "GPU", "no: torch finds no usable GPU"),
        (torch("13.0", OLD_DRIVER), "GPU", "no: torch finds no usable GPU (CUDA initialization: The NVIDIA driver"),
        (torch("13.0", WITH_GPU), "GPU", "yes: Imagined 1000, sm_90, 24 GiB"),
        (torch("13.0", LOST_GPU), "GPU", "no: torch finds a GPU and cannot use it (RuntimeError: CUDA error: device"),
        (torch(None), "GPU", "no: torch 2.14.1 is built without CUDA; install a CUDA build of torch"),
        ({}, "torch", "no: not installed; `pip install torch`"),
        ({"torch": "raise OSError('libcudart.so.13: cannot open')"}, "torch", "OSError: libcudart.so.13: cannot open"),
        ({"torch": "import numpy"}, "torch", "no: it is installed and does not import: ModuleNotFoundError: No module"),
    ],
    ids=["no driver", "old driver", "a GPU", "a lost GPU", "torch for CPU", "no torch", "broken torch", "no numpy"],
)
def test_torch_of_every_kind(tmp_path: Path, packages: dict[str, str], row: str, wanted: str) -> None:
    printed = overview(tmp_path, {**packages, **TRITON})
    found = rows(printed)
    assert wanted in found[row]
    assert found["Triton"] == "yes: 3.8.0"
    assert "\n  layer_norm            native on cpu, triton on cuda, formula\n" in printed
    has_torch = found["torch"] == "yes: 2.14.1"
    assert has_torch == ("no kernel variants chosen yet" in printed) == (found["GPU"][:7] != "unknown")


def test_a_build_for_cuda_asks_its_runtime_why_there_is_no_gpu(tmp_path: Path) -> None:
    """The overview of torch for CUDA without a driver: the reason is the CUDA runtime's, by the native module."""
    if extension.why_no_cuda() is not None:
        pytest.skip(f"the native module has no CUDA part: {extension.why_no_cuda()}")
    devices, reason = extension.native().cuda_devices()
    text = rows(overview(tmp_path, torch("13.0")))["GPU"]
    assert (f"({reason})" in text) if reason else devices


def test_no_triton_no_native_module_and_nothing_installed(tmp_path: Path) -> None:
    printed = overview(tmp_path, torch(None), has_native=False)
    found = rows(printed)
    assert found["Triton"] == "no: not installed; on Linux `pip install triton`"
    (family,) = (line for line in printed.splitlines() if line.startswith("  layer_norm "))
    assert "native on cpu (no: no native CPU kernels: the native module is not built (" in family
    assert family.endswith("triton on cuda (no: Triton is not installed; pip install triton), formula")
    for name in ("native CPU kernels", "native CUDA code"):
        assert found[name].startswith("no: the native module is not built (")
        assert "build it with `pip install -e .`" in found[name]
    project = (ROOT / "pyproject.toml").read_text()
    number = project.split('\nversion = "', 1)[1].split('"', 1)[0]
    assert printed.startswith(f"mmkernels {number} (not installed, checkout at {tmp_path / 'checkout'})\n")
