"""Compiles the runtime once per machine, and CUDA C++ to PTX; both are kept in a cache folder by the hash of all input.

The folder is $PTXRUN_CACHE, or ptxrun-<user> in the folder for temporary files. Needs g++ 12 or newer; nvcc for CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptxrun.assembler import functions

_RUNTIME = Path(__file__).parent / "runtime"
_OPTIONS = ("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w")


def cache_folder() -> Path:
    """Where builds are kept; made where it is missing."""
    default = Path(tempfile.gettempdir()) / f"ptxrun-{os.getuid()}"
    folder = Path(os.environ.get("PTXRUN_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def runtime() -> ctypes.CDLL:
    """The runtime with every function of the registry; about ten seconds the first time."""
    names = ",\n".join(f"    {name}" for name in functions())
    source = (
        '#include "launch.h"\n\nusing namespace ptxrun;\n\n'
        f"static const Function FUNCTIONS[] = {{\n{names}}};\n\n"
        'extern "C" int ptxrun_run(const Launch* launch, char* message) { return run(*launch, FUNCTIONS, message); }\n'
    )
    headers = [path.read_text() for path in sorted(_RUNTIME.glob("*.h"))]
    library = cache_folder() / f"runtime-{_hash(source, *headers, *_OPTIONS, _processor())}.so"
    if not library.exists():
        text = library.with_suffix(".cpp")
        text.write_text(source)
        _build(["g++", *_OPTIONS, "-I", str(_RUNTIME), str(text)], library)
    return ctypes.CDLL(str(library))


def nvcc_ptx(
    source_path: Path | str,
    architecture: int,
    include_dirs: Sequence[Path | str] = (),
    defines: Mapping[str, str | int] | None = None,
) -> str:
    """PTX of a CUDA C++ file for one architecture (80, 90, ...), with the debugger's line information left out.

    Kept by the hash of the file, of every .h and .cuh of its folder and the include folders, and of the options.
    """
    source = Path(source_path)
    folders = [source.parent, *map(Path, include_dirs)]
    words = ["nvcc", "-std=c++17", "-ptx", f"-arch=sm_{architecture}"]
    words += [f"-I{folder}" for folder in folders]
    words += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    headers = [path.read_text() for folder in folders for path in sorted(folder.glob("*.*h"))]
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    output = cache_folder() / f"{source.stem}-{_hash(source.read_text(), *headers, *words, version)}.ptx"
    if not output.exists():
        _build([*words, str(source)], output)
    return output.read_text()


def _build(words: list[str], output: Path) -> None:
    """Run a compiler into a file of its own and move that into place, so that two processes may build at once."""
    partial = output.with_suffix(f".{os.getpid()}{output.suffix}")
    done = subprocess.run([*words, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr[-8000:]}")
    partial.rename(output)


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]
