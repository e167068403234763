"""Builds the native module with CMake and ninja; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

WHERE_TO_GET = {
    "cmake": "pip install 'cmake>=3.31'",
    "ninja": "pip install ninja",
    "pybind11": "pip install pybind11",
    "a C++ compiler": "Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install; or set CXX to one",
}


def missing_tools() -> list[str]:
    """Names of the build tools that are not there."""
    missing = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        missing.append("a C++ compiler")
    return missing


class CMakeBuild(build_ext):
    """build_ext that hands the work to CMakeLists.txt, the only list of sources."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and put the module where setuptools expects it."""
        if missing := missing_tools():
            lines = [f"  {name}: {WHERE_TO_GET[name]}" for name in missing]
            raise SystemExit("mmkernels cannot be built, missing:\n" + "\n".join(lines))
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]  # fmt: skip
        # What macOS's tools for wheels ask for.
        if architectures := re.findall(r"-arch (\S+)", os.environ.get("ARCHFLAGS", "")):
            configure.append(f"-DCMAKE_OSX_ARCHITECTURES={';'.join(architectures)}")
        for name in ("MMKERNELS_CUDA_ARCHITECTURES", "MMKERNELS_NVCC"):
            if value := os.environ.get(name):
                configure.append(f"-D{name}={value}")
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(
                    f"mmkernels: `{' '.join(command)}` failed; the compiler's message is above.\n"
                    "To build the CPU part only, set the environment variable MMKERNELS_NVCC=OFF."
                )


setup(ext_modules=[Extension("mmkernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
