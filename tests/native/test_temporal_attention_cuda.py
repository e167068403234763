"""The CUDA C++ kernels of temporal attention, without a GPU: compiled, their PTX executed, run on the host."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from numerics import assert_within_budget
from places import ROOT
from temporal_attention_gradients import gradients

from mmkernels import extension, tuning
from mmkernels.kernels import temporal_attention
from mmkernels.kernels.call import Call
from mmkernels.kernels.dispatch import reasons
from mmkernels.kernels.registry import FAMILIES
from mmkernels.kernels.temporal_attention import cuda

pytest.importorskip("triton", reason="Triton's wheel brings the cuobjdump to look into cubins with")
import ptx_temporal_attention_cuda as ptx
import ptxrun
from resources import SHARED_LIMIT_BYTES
from resources_temporal_attention_cuda import CUDA, Instance, compile_cuda

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the CUDA kernels with")
ORDERS = (0, 1, 7)  # warps forward, in reverse, shuffled by this seed
# (B, F, P, N, D): every instantiation, one frame, odd frames and pixels, head dims that do not fill a tile.
SHAPES = (
    (1, 1, 1, 2, 16),
    (2, 35, 3, 1, 48),
    (1, 71, 1, 1, 64),
    (1, 72, 1, 2, 64),
    (1, 72, 1, 1, 112),
    (1, 100, 1, 1, 64),
    (1, 128, 1, 1, 128),
)
BARRIER = "  __syncthreads();"
FIRST_WAIT, LAST_WAIT = f"  copy_async_wait<1>();\n{BARRIER}", f"  copy_async_wait<0>();\n{BARRIER}"
# Each breaks the source in one place, the given occurrence of a text, and must be found.
MUTATIONS = {
    "forward, no barrier before the scores": (FIRST_WAIT, "  copy_async_wait<1>();", 0),
    "forward, no barrier before the values": (LAST_WAIT, "  copy_async_wait<0>();", 0),
    "forward, loosened first wait": (FIRST_WAIT, f"  copy_async_wait<2>();\n{BARRIER}", 0),
    "forward, loosened last wait": (LAST_WAIT, f"  copy_async_wait<1>();\n{BARRIER}", 0),
    "backward, loosened last wait": (LAST_WAIT, f"  copy_async_wait<1>();\n{BARRIER}", 1),
    "backward, no barrier before v is overwritten": (f"{BARRIER}  // v has been read\n", "", 0),
    "backward, no barrier before the transposed scores": (f"{BARRIER}\n  load_tran", "  load_tran", 0),
    "mask of the keys shifted": ("e % 2 >= shape.F", "e % 2 > shape.F", 0),
    "mask of the stores shifted": ("if (f < shape.F && column", "if (f <= shape.F && column", 0),
    "tail of the contraction left out": ("if (TILES % 2) {", "if (false) {", 0),
}  # fmt: skip


@functools.cache
def compiled(instance: Instance, architecture: int = 80) -> str:
    return compile_cuda(instance, architecture)[0]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v packed, and do."""
    B, F, P, N, D = shape
    return torch.randn(B, F, P, 3, N, D).to(dtype), torch.randn(shape).to(dtype)


def check(actual: dict[str, torch.Tensor], qkv: torch.Tensor, do: torch.Tensor) -> None:
    fp64, plain = (gradients(qkv.to(wide), do.to(wide)) for wide in (torch.float64, qkv.dtype))
    assert_within_budget(actual, plain, fp64)


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []


# --- the emitted code, executed


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emitted_ptx(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    qkv, do = inputs(shape, dtype)
    text = compiled(Instance.of(dtype, shape[1], shape[-1]))
    first, *others = (ptx.run(text, qkv, do, order) for order in ORDERS)
    check(first, qkv, do)
    for other in others:
        assert_same_bits(other, first)


@needs_nvcc
@pytest.mark.parametrize("architecture", [90, 120])
def test_architectures_give_the_same_bits(architecture: int) -> None:
    qkv, do = inputs((1, 72, 1, 1, 64), torch.bfloat16)
    instance = Instance.of(torch.bfloat16)
    assert_same_bits(ptx.run(compiled(instance, architecture), qkv, do), ptx.run(compiled(instance), qkv, do))


@needs_nvcc
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name: str, tmp_path: Path) -> None:
    before, after, occurrence = MUTATIONS[name]
    folder = tmp_path / "csrc/cuda"
    shutil.copytree(CUDA.parent, folder.parent)
    source = folder / "temporal_attention.cuh"
    parts = source.read_text().split(before)
    assert len(parts) > occurrence + 1, "the source has changed: give the mutation its new text"
    halves = before.join(parts[: occurrence + 1]), before.join(parts[occurrence + 1 :])
    source.write_text(after.join(halves))
    qkv, do = inputs((1, 71, 1, 2, 64), torch.bfloat16)
    text, _ = compile_cuda(Instance.of(torch.bfloat16, 71), 80, folder)
    with pytest.raises((ptxrun.FaultError, AssertionError)):
        check(ptx.run(text, qkv, do), qkv, do)


# --- the source, under sanitizers


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LD_PRELOAD": ""})
    assert done.returncode == 0, done.stderr[:4000]


@pytest.fixture(scope="module")
def host_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The kernels compiled for the host with the address and undefined-behaviour sanitizers."""
    if not COMPILER:
        pytest.skip("no C++ compiler to build the check with")
    program = str(tmp_path_factory.mktemp("host") / "program")
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/native'}"]
    run(COMPILER, *flags, *includes, str(ROOT / "tests/native/temporal_attention_cuda.cpp"), "-o", program)
    return program


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_source_under_sanitizers(
    host_program: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:  # fmt: skip
    qkv, do = inputs(shape, dtype)
    given, got = tmp_path / "given", tmp_path / "got"
    given.write_bytes(b"".join(x.view(torch.int16).numpy().tobytes() for x in (qkv, do)))
    is_reversed = shape[1] % 2  # warps from the last to the first
    name = str(dtype).removeprefix("torch.")
    run(host_program, *map(str, shape), name, str(is_reversed), str(given), str(got))
    outputs = torch.frombuffer(bytearray(got.read_bytes()), dtype=dtype).view(4, *shape)
    check(dict(zip(("o", "dq", "dk", "dv"), outputs, strict=True)), qkv, do)


# --- the native entries and who calls them


@pytest.fixture
def cuda_build():
    if (reason := extension.why_no_cuda()) is not None:
        pytest.skip(reason)
    return extension.native()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "got dtype float32, the CUDA kernels take bfloat16"),
        ({"shape": [1, 129, 1, 1, 64]}, "F = 129, wanted at most 128"),
        ({"shape": [1, 2, 2**31, 1, 64]}, "wanted less than 2.31"),
        ({"shape": [1, 2, 2**16, 2**16, 64]}, "one launch takes less than 2.31"),
        ({"strides": [8] * 15 + [4]}, "stride of 4 elements, wanted multiples of 8"),
        ({"strides": [8] * 28}, "28 strides, wanted 16"),
    ],
)
def test_bad_arguments_are_named(cuda_build, change: dict, message: str) -> None:
    arguments = {"shape": [0, 2, 1, 1, 64], "strides": [8] * 16, "dtype": "bfloat16"}
    entry = cuda_build.temporal_attention_forward_cuda
    entry([0] * 4, *arguments.values(), 1.0, 0, 0)  # an empty tensor is no error
    with pytest.raises(ValueError, match=message):
        entry([0] * 4, *(arguments | change).values(), 1.0, 0, 0)
    with pytest.raises(ValueError, match="not aligned to 16 bytes"):
        entry([0, 0, 8, 0], *arguments.values(), 1.0, 0, 0)


def test_shared_memory_of_every_shape(cuda_build) -> None:
    for F in (1, 16, 64, 65, 72, 73, 112, 128):
        for D in (16, 64, 80, 128):
            needed = cuda_build.temporal_attention_shared_bytes_cuda(F, D)
            assert needed == Instance.of(torch.bfloat16, F, D).shared_bytes("backward", F)


def test_which_build_runs_on_which_gpu() -> None:
    runs = cuda.has_code_for
    assert runs(80, "80-real 90") and runs(86, "80-real 90") and runs(90, "80-real 90") and runs(120, "80-real 90")
    assert not runs(75, "80-real 90") and not runs(100, "80-real 90-real") and not runs(80, "86-real")
    assert runs(100, "80-virtual") and not runs(90, "90a")


HERE = Call(
    op="temporal_attention", device="cuda", is_modelled=False, capability=(8, 0), shared_bytes=SHARED_LIMIT_BYTES[80],
    dtype=torch.bfloat16, shape=(1, 72, 1, 1, 64), is_deterministic=False,
)  # fmt: skip
ADA = {"capability": (8, 9), "shared_bytes": SHARED_LIMIT_BYTES[89]}
# Of both kernels: what is changed of the call, and each one's reason.
REASONS = [
    ({}, "None", "None"),
    ({"is_deterministic": True}, "None", "None"),
    (ADA | {"shape": (1, 72, 1, 1, 128)}, "None", "None"),
    (ADA | {"shape": (1, 64, 3, 1, 16)}, "None", "None"),
    (ADA | {"shape": (1, 128, 1, 1, 64)}, "None", "bytes of shared memory"),
    (ADA | {"shape": (1, 128, 1, 1, 128)}, "a block here has 101376", "bytes of shared memory"),
    ({"shape": (1, 129, 1, 1, 64)}, "129 frames, a block of our GPU kernels owns", "129 frames, a block of our"),
    ({"shape": (1, 72, 1, 1, 24)}, "head dim 24", "head dim 24"),
    ({"shape": (1, 72, 1, 1, 144)}, "head dim 144", "head dim 144"),
    ({"dtype": torch.float32, "shape": (1, 16, 1, 1, 64)}, "None", "dtype torch.float32, the CUDA C++ kernels take"),
    ({"dtype": torch.float64}, "dtype torch.float64", "dtype torch.float64"),
    ({"is_dense": False}, "not contiguous", "not contiguous"),
    ({"is_aligned": False}, "None", "aligned to 16 bytes"),
    ({"shape": (2**10, 72, 2**18, 2**4, 64)}, "None", "rows of frames, one launch takes"),
    ({"capability": (7, 5), "shared_bytes": 65_536, "shape": (1, 16, 1, 1, 64)}, "None", "this GPU is sm_75"),
    ({"device": "mps"}, "for cuda, the tensors are on mps", "for cuda, the tensors are on mps"),
]


@pytest.mark.parametrize(("changes", "triton", "native"), REASONS, ids=str)
def test_every_reason(changes: dict[str, Any], triton: str, native: str) -> None:
    with as_built_with_cuda():
        found = reasons(dataclasses.replace(HERE, **changes))
    assert triton in str(found["triton"]) and native in str(found["cuda"])


@contextmanager
def as_built_with_cuda() -> Iterator[None]:
    """A native module with code for sm_80 and sm_90, and the real one's numbers of bytes."""

    def shared_bytes(F: int, D: int) -> int:
        return Instance.of(torch.bfloat16, F, D).shared_bytes("backward", F)

    native = SimpleNamespace(cuda_architectures="80-real 90", temporal_attention_shared_bytes_cuda=shared_bytes)
    with (
        mock.patch.object(extension, "native", lambda: native),
        mock.patch.object(extension, "why_no_cuda", lambda: None),
    ):
        yield


def test_alignment_is_looked_at() -> None:
    row = torch.empty(256, dtype=torch.bfloat16)
    shape = (1, 2, 1, 1, 64)
    assert temporal_attention.call_on(row.as_strided(shape, (64, 64, 64, 64, 1))).is_aligned
    assert not temporal_attention.call_on(row[4:].as_strided(shape, (64, 64, 64, 64, 1))).is_aligned
    assert not temporal_attention.call_on(row.as_strided(shape, (64, 68, 64, 64, 1))).is_aligned


def test_without_a_cuda_build_triton_is_taken_and_the_reason_said() -> None:
    with mock.patch.object(extension, "why_no_cuda", lambda: "no nvcc"):
        assert reasons(HERE)["cuda"] == "no nvcc"


def test_variants_are_timed_on_outputs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def variant(name: str) -> SimpleNamespace:
        def forward(inputs, outputs, scale) -> None:
            calls.append((name, outputs[0].data_ptr()))
            outputs[0].fill_(scale)

        loaded = SimpleNamespace(forward=forward, HAS_OUTPUT_IN_BACKWARD=False)
        return SimpleNamespace(why_unsupported=lambda call: None, loaded=loaded)

    def fastest(op, key, variants, device, kind) -> str:
        assert (op, key[:6], device.type) == ("temporal_attention", ("forward", 1, 2, 1, 1, 16), "cpu")
        for call in variants.values():
            call()
        return "b"

    q = torch.zeros(1, 2, 1, 1, 16)
    o = torch.empty_like(q)
    monkeypatch.setitem(FAMILIES, "temporal_attention", {name: variant(name) for name in "ab"})
    monkeypatch.setattr(tuning, "fastest", fastest)
    temporal_attention.temporal_attention_into(q, q, q, o, 3.0)
    assert [name for name, _ in calls] == ["a", "b", "b"]
    assert [where == o.data_ptr() for _, where in calls] == [False, False, True]
    assert (o == 3.0).all()
