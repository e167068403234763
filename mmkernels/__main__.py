"""`python -m mmkernels`: what is there on this machine, why each missing thing is missing, what tuning chose."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

from mmkernels import extension
from mmkernels.version import version


def _load(name: str, install: str) -> tuple[ModuleType | None, str]:
    """The module of that name, and its row of the table: its version, or why it is not there."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, f"no: not installed; {install}"
        return None, f"no: it is installed and does not import: {_first_line(error)}"
    except Exception as error:  # whatever a broken installation raises is the reason
        return None, f"no: it is installed and does not import: {_first_line(error)}"
    return module, f"yes: {getattr(module, '__version__', 'of unknown version')}"


def _first_line(error: Exception | Warning) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _native_row() -> str:
    if (reason := extension.why_not()) is not None:
        return f"no: {reason}"
    native = extension.native()
    others = [name for name in native.supported_instruction_sets() if name != native.instruction_set()]
    threads = "OpenMP" if native.openmp else "one thread (built without OpenMP)"
    return f"yes: {native.instruction_set()} (this CPU also runs {', '.join(others)}), {threads}, {native.compiler}"


def _cuda_row() -> str:
    if (reason := extension.why_no_cuda()) is not None:
        return f"no: {reason}"
    return f"yes: built for {extension.native().cuda_architectures}"


def _gpu_rows(torch: Any) -> list[str]:
    """One row for each GPU, or one that says why there is none; what torch warns of meanwhile is in it."""
    if torch is None:
        return ["unknown: torch is asked for GPUs, and it is not there"]
    if torch.version.cuda is None:
        return [f"no: torch {torch.__version__} is built without CUDA; install a CUDA build of torch"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            rows = [_gpu_row(torch, index) for index in range(count)]
        except Exception as error:  # whatever the driver raises is the reason
            return [f"no: torch finds a GPU and cannot use it ({_first_line(error)}); see `nvidia-smi`"]
    said = "; ".join(str(warning.message).strip().splitlines()[0] for warning in caught)
    if rows:
        return [f"{row}{f' ({said})' if said else ''}" for row in rows]
    reason = said or _driver_reason()
    return [f"no: torch finds no usable GPU{f' ({reason})' if reason else ''}; see `nvidia-smi`"]


def _gpu_row(torch: Any, index: int) -> str:
    device = torch.cuda.get_device_properties(index)
    return f"yes: {device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"


def _driver_reason() -> str:
    """Why the CUDA runtime sees no GPU; "" where it does, or where the native module has none to ask."""
    return "" if extension.why_no_cuda() is not None else extension.native().cuda_devices()[1]


def _choice_lines() -> list[str]:
    """The kernel variants chosen on each kind of GPU, with their times."""
    from mmkernels import tuning

    found = tuning.stored()
    if not found:
        return [
            f"no kernel variants chosen yet: on a GPU they are timed when first needed and kept in {tuning.folder()}"
        ]
    lines = [f"kernel variants chosen by timing, kept in {tuning.folder()}"]
    for machine, choices in found.items():
        lines += [f"  {machine}", *(f"    {choice}" for choice in choices)]
    return lines


def _family_lines() -> list[str]:
    """The backends of every family of kernels in their order, and why those that cannot be here are not."""
    from mmkernels.kernels.registry import FAMILIES

    lines = ["backends of each family of kernels, in their order where no clock decides; mmkernels.report says more"]
    for op, backends in FAMILIES.items():
        parts = []
        for name, backend in backends.items():
            why = backend.why_absent()
            parts.append(f"{name}{f' on {backend.device}' if backend.device else ''}{f' (no: {why})' if why else ''}")
        lines.append(f"  {op:<22}{', '.join(parts)}")
    return lines


def main() -> None:
    """Print the table."""
    _, triton_row = _load("triton", "on Linux `pip install triton`")
    torch, torch_row = _load("torch", "`pip install torch`")
    rows = [
        ("native CPU kernels", _native_row()),
        ("native CUDA code", _cuda_row()),
        ("Triton", triton_row),
        ("torch", torch_row),
        *(("GPU", row) for row in _gpu_rows(torch)),
    ]
    print(f"mmkernels {version()}")
    for name, text in rows:
        print(f"  {name:<20}{text}")
    print("\n".join(_family_lines()))
    if torch is not None:
        print("\n".join(_choice_lines()))


if __name__ == "__main__":
    main()
