"""`python -m mmkernels`: what is there on this machine, why each missing thing is missing, what tuning chose."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from mmkernels import extension


def _native_row() -> str:
    if (reason := extension.why_not()) is not None:
        return f"no: {reason}"
    native = extension.native()
    others = [name for name in native.supported_instruction_sets() if name != native.instruction_set()]
    threads = "OpenMP" if native.openmp else "one thread (the compiler had no OpenMP)"
    return f"yes: {native.instruction_set()} (this CPU also runs {', '.join(others)}), {threads}, {native.compiler}"


def _cuda_row() -> str:
    if (reason := extension.why_no_cuda()) is not None:
        return f"no: {reason}"
    return f"yes: built for {extension.native().cuda_architectures}"


def _triton_row() -> str:
    if importlib.util.find_spec("triton") is None:
        return "no: not installed; `pip install triton` (Linux)"
    return f"yes: {importlib.metadata.version('triton')}"


def _torch_row() -> str:
    if importlib.util.find_spec("torch") is None:
        return "no: not installed; `pip install torch`"
    return f"yes: {importlib.metadata.version('torch')}"


def _gpu_rows() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return ["unknown: torch is not installed"]
    import torch

    if torch.version.cuda is None:
        return [f"no: torch {torch.__version__} is built without CUDA; install a CUDA build of torch"]
    if not torch.cuda.is_available():
        return [f"no: torch finds no usable GPU{_driver_reason()}; see `nvidia-smi`"]
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(f"yes: {device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB")
    return rows


def _driver_reason() -> str:
    if extension.why_no_cuda() is not None:
        return ""
    _, reason = extension.native().cuda_devices()
    return f" ({reason})" if reason else ""


def _choice_lines() -> list[str]:
    """The kernel variants chosen on each kind of GPU, with their times."""
    if importlib.util.find_spec("torch") is None:
        return []
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


def main() -> None:
    """Print the table."""
    rows = [
        ("native CPU kernels", _native_row()),
        ("native CUDA code", _cuda_row()),
        ("Triton", _triton_row()),
        ("torch", _torch_row()),
        *(("GPU", row) for row in _gpu_rows()),
    ]
    print(f"mmkernels {importlib.metadata.version('mimicmotion-trainer')}")
    for name, text in rows:
        print(f"  {name:<20}{text}")
    print("\n".join(_choice_lines()))


if __name__ == "__main__":
    main()
