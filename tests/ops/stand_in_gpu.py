"""What stands for a GPU where the CUDA route runs on CPU tensors: only launches are carried out in another way.

`stand_in_gpu` lets CPU tensors stand for CUDA tensors. Inside,
- a Triton kernel runs in Triton's interpreter (float32 and float16: it reads bfloat16 as raw bits),
- a native entry runs its own checks and launchers, with the kernels on the host's fibers (tests/native/cuda_host.h),
- torch's attentions for CUDA are torch's own for the CPU, in float32, behind the operators' own schemas,
- uninitialised memory is NaN.
`launch` and `call` take the place of the interpreter and of the fibers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from places import ROOT
from torch import Tensor
from torch.nn import functional

from mmkernels import extension
from mmkernels.costs import modelled_device
from mmkernels.kernels.launch import Call, CarryOut, carried_out_by

SOURCES = (
    "csrc/cuda/group_norm_silu_conv.cu", "csrc/cuda/temporal_attention.cu", "csrc/entry/group_norm_silu_conv_cuda.cpp",
    "csrc/entry/temporal_attention_cuda.cpp", "tests/native/cuda_route.cpp",
)  # fmt: skip
KERNEL_MODULES = tuple(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "mmkernels").rglob("*triton.py"))
)


# --- Triton


@contextmanager
def interpreted() -> Iterator[None]:
    """Triton's kernels and what they call of Triton's own library are interpreted, as under TRITON_INTERPRET=1."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        pytest.skip("this Triton's interpreter leaves its patches of the language behind; pip install 'triton>=3.7'")
    importlib.import_module("triton.experimental.gluon")  # takes the functions as they are before they are replaced
    names = ("triton.language", "triton.language.standard", *KERNEL_MODULES)
    compiled = importlib.import_module("triton.runtime.jit").JITFunction
    with ExitStack() as stack:
        for module in map(importlib.import_module, names):
            for name, value in list(vars(module).items()):
                if isinstance(value, compiled):
                    stack.enter_context(mock.patch.object(module, name, interpreter.InterpretedFunction(value.fn)))
        # A function of Triton's library that is called inside another leaves the interpreter's patches behind.
        language = importlib.import_module("triton.language")
        core = language.core
        places = (language, core, language.math, core.tensor, core.tensor_descriptor_base)
        before = [dict(vars(place)) for place in places]
        try:
            yield
        finally:
            for place, names_before in zip(places, before, strict=True):
                for name, value in list(vars(place).items()):
                    if name not in names_before:
                        delattr(place, name)
                    elif names_before[name] is not value:
                        setattr(place, name, names_before[name])


def interpret(kernel: Any, num_programs: int, positional: list[Any], constants: dict[str, Any]) -> None:
    """Carry out a launch inside of `interpreted`."""
    assert all(not isinstance(x, Tensor) or x.dtype != torch.bfloat16 for x in positional), "bfloat16 is misread"
    kernel[(num_programs,)](*positional, **constants)


# --- native entries


@functools.cache
def host_entries() -> ModuleType:
    """The native CUDA entries compiled for the host."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("no C++ compiler, or no pybind11, to build the CUDA entries for the host with")
    get_include = importlib.import_module("pybind11").get_include
    folder = Path(tempfile.mkdtemp())
    includes = [ROOT / "csrc", ROOT / "tests/native", get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-fPIC", "-fno-strict-aliasing", *(f"-I{path}" for path in includes)]

    def compile_one(source: str) -> str:
        is_kernel = source.endswith(".cu")  # bindings are slow to optimise and need not be
        target = str(folder / f"{Path(source).name}.o")
        run(compiler, *flags, "-O2" if is_kernel else "-O0", "-x", "c++", "-c", str(ROOT / source), "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = folder / "cuda_route.so"
    run(compiler, "-shared", *objects, "-o", str(library))
    spec = importlib.util.spec_from_file_location("cuda_route", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(folder)
    return module


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]


def call_on_host(entry: str, tensors: Sequence[Tensor | None], *arguments: object) -> None:
    """Carry out a call of a native entry."""
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    getattr(host_entries(), f"{entry}_cuda")(pointers, *arguments, 0, 0)


class _Native:
    """The native module as one built with CUDA, whether or not it was."""

    cuda_architectures = "80"

    def __getattr__(self, name: str) -> Any:
        return getattr(host_entries(), name)


# --- torch's attentions


def _note_call(called: list[str], operator: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    called.append(operator)
    return function(*args, **kwargs)


def _flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, **__: Any) -> tuple[Any, ...]:
    assert q.dtype in (torch.float16, torch.bfloat16), f"flash attention on CUDA does not take {q.dtype}"
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, logsumexp = forward(q.float(), k.float(), v.float(), scale=scale)
    state = torch.empty(0, dtype=torch.int64)
    return o.to(q.dtype), logsumexp, None, None, q.shape[2], k.shape[2], state, state, state


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, *_: Any, scale: float | None = None,
    **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = (x.float() for x in (do, q, k, v, o))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return tuple(x.to(q.dtype) for x in backward(*wide, logsumexp, 0.0, False, scale=scale))


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: None, has_logsumexp: bool, *_: Any, **named: Any) -> tuple[Any, ...]:
    assert bias is None and has_logsumexp
    o, logsumexp, *rest = _flash(q, k, v, **named)
    state = torch.empty((), dtype=torch.int64)
    return o, logsumexp[..., None], None, None, q.shape[2], k.shape[2], state, state, None


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, seed: Tensor, offset: Tensor, *_: Any,
    **named: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert logsumexp.shape == (*q.shape[:3], 1)
    assert not seed.shape and seed.dtype == offset.dtype == torch.int64
    return _flash_backward(do, q, k, v, o, logsumexp[..., 0], **named)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: None, has_logsumexp: bool, *_: Any, scale: float | None = None, **__: Any
) -> tuple[Any, ...]:
    assert bias is None and has_logsumexp
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, logsumexp = forward(q.float(), k.float(), v.float(), scale=scale)
    state = torch.empty((), dtype=torch.int64)
    return o.to(q.dtype), functional.pad(logsumexp, (0, -q.shape[2] % 32), value=torch.inf), state, state


def _efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, o: Tensor, logsumexp: Tensor, *_: Any, **named: Any
) -> tuple[Tensor | None, ...]:
    assert logsumexp.shape[2] == -(-q.shape[2] // 32) * 32
    return *_flash_backward(do, q, k, v, o, logsumexp[..., : q.shape[2]].contiguous(), **named), None


ATTENTIONS: dict[str, Callable[..., Any]] = {
    "flash_attention": _flash, "flash_attention_backward": _flash_backward, "cudnn_attention": _cudnn,
    "cudnn_attention_backward": _cudnn_backward, "efficient_attention": _efficient,
    "efficient_attention_backward": _efficient_backward,
}  # fmt: skip


# --- all of it


@contextmanager
def stand_in_gpu(*, launch: CarryOut = interpret, call: Call = call_on_host) -> Iterator[list[str]]:
    """Inside, CPU tensors go the way of CUDA tensors; gives a list that grows with each call of torch's attentions."""
    library, called = torch.library.Library("aten", "IMPL"), []
    for name, function in ATTENTIONS.items():
        library.impl(f"_scaled_dot_product_{name}", functools.partial(_note_call, called, name, function), "CPU")
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # and then torch fills what it does not initialise
    native = _Native()
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(extension, "native", lambda: native))
            stack.enter_context(mock.patch.object(extension, "why_no_cuda", lambda: None))
            stack.enter_context(mock.patch.object(extension, "available", lambda: True))
            if launch is interpret:
                stack.enter_context(interpreted())
            stack.enter_context(modelled_device("cuda"))
            stack.enter_context(
                mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: was_deterministic)
            )
            stack.enter_context(carried_out_by(launch=launch, call=call))
            assert torch.empty(1).isnan().all(), "uninitialised memory is not filled"
            yield called
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        library._destroy()
