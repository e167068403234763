"""The native module: every instruction set, its checks, its symbols under sanitizers, and its build."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from numerics import assert_within_budget
from places import ROOT

from mmkernels import extension
from mmkernels.kernels.temporal_attention import temporal_attention_backward_into, temporal_attention_into
from mmkernels.ops.temporal_attention import reference

KERNELS = sorted(set((ROOT / "csrc/cpu").glob("*.cpp")) - {ROOT / "csrc/cpu/instruction_set.cpp"})
# The flags that CMakeLists.txt gives each build of the kernels.
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", f"-I{ROOT / 'csrc'}"]
# Not optimised: no access is optimised away, and it compiles in a third of the time.
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
# The environment's own cmake before one on the PATH, which may be older than CMakeLists.txt asks for.
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
Objects = dict[tuple[Path, str], Future[str]]  # by kernel file and instruction set
if platform.machine() not in ("x86_64", "AMD64"):
    INSTRUCTION_SETS = {"portable": []}


def run(command: list[str], **keywords) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **keywords)


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    native, name = extension.native(), request.param
    if name not in native.supported_instruction_sets():
        pytest.skip(f"this CPU does not run {name}")
    before = native.instruction_set()
    native.select_instruction_set(name)
    yield name
    native.select_instruction_set(before)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_against_fp64(instruction_set: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v, do = torch.randn(4, 1, 37, 3, 2, 48).to(dtype)
    actual = {name: torch.full_like(q, float("nan")) for name in ("o", "dq", "dk", "dv", "o_again")}
    temporal_attention_into(q, k, v, actual["o"])
    names = ("dq", "dk", "dv")
    dq, dk, dv = (actual[name] for name in names)
    temporal_attention_backward_into(q, k, v, do, (dq, dk, dv), o=actual["o_again"])

    def differentiate(wide: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
        rows = [x.transpose(1, 3) for x in leaves]
        o = torch.nn.functional.scaled_dot_product_attention(rows[0], rows[1], rows[2]).transpose(1, 3)
        gradients = torch.autograd.grad(o, leaves, do.to(wide))
        return {"o": o.detach(), **dict(zip(names, gradients, strict=True)), "o_again": o.detach()}

    assert_within_budget(actual, differentiate(dtype), differentiate(torch.float64))


def test_outputs_larger_than_the_caches_have_the_same_bits() -> None:
    """Large outputs are stored past the caches; those of each half of the pixels, half as large, are not."""
    B, F, P, N, D = 1, 72, 512, 4, 64  # 36 MiB in float32; the kernel streams from 32 MiB
    q, k, v, do = torch.randn(4, B, F, P, N, D)
    whole, halves = (torch.full((4, B, F, P, N, D), float("nan")) for _ in range(2))
    for out, parts in ((whole, [slice(0, P)]), (halves, [slice(0, P // 2), slice(P // 2, P)])):
        for part in parts:
            q_part, k_part, v_part, do_part = (x[:, :, part] for x in (q, k, v, do))
            o, dq, dk, dv = (x[:, :, part] for x in out)
            temporal_attention_into(q_part, k_part, v_part, o)
            temporal_attention_backward_into(q_part, k_part, v_part, do_part, (dq, dk, dv))
    assert torch.equal(whole, halves)


def test_special_values_survive_storage() -> None:
    """Attention over one frame copies v: every bfloat16 and float16 comes back, infinity and NaN included."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        v = bits.view(dtype).reshape(1, 1, 512, 2, 64)
        finite = v.isfinite().all(-1)
        o = torch.full_like(v, 7.0)
        zero = torch.zeros_like(v)
        temporal_attention_into(zero, zero, v, o)
        assert torch.equal(o[finite].view(torch.int16) + 0, (v[finite] + 0).view(torch.int16))
        assert torch.equal(o.isnan(), v.isnan())
        assert torch.equal(o.isinf(), v.isinf())


def test_nan_and_infinite_logits_are_not_hidden() -> None:
    q, k, v = torch.ones(3, 1, 5, 1, 1, 16)
    q[0, 2] = float("nan")
    o = torch.empty_like(q)
    temporal_attention_into(q, k, v, o)
    assert o[0, 2].isnan().all()
    assert not o[0, [0, 1, 3, 4]].isnan().any()


def test_reference_is_torch_attention() -> None:
    q, k, v = torch.randn(3, 2, 7, 3, 2, 16, dtype=torch.float64)
    rows = [x.permute(0, 2, 3, 1, 4) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(rows[0], rows[1], rows[2])
    torch.testing.assert_close(reference(q, k, v), expected.permute(0, 3, 1, 2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [1, 2**20 + 1, 1, 1, 64]}, "F = 1048577, wanted at most 1048576"),
        ({"shape": [1, 2, 1, 1, 24]}, "D = 24, wanted a multiple of 16"),
        ({"shape": [1, 2, 1, 64]}, "shape of 4 sizes"),
        ({"strides": [0] * 3}, "3 strides, wanted 16"),
        ({"dtype": "float64"}, "dtype float64, wanted float32"),
        ({"num_threads": 0}, "num_threads = 0"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"shape": [0, 2, 1, 1, 64], "strides": [0] * 16, "dtype": "float32", "scale": 1.0, "num_threads": 1}
    entry = extension.native().temporal_attention_forward
    entry(0, 0, 0, 0, *arguments.values())  # an empty tensor is no error
    with pytest.raises(ValueError, match=message):
        entry(0, 0, 0, 0, *(arguments | change).values())


def test_unknown_instruction_set_is_named() -> None:
    with pytest.raises(ValueError, match="got instruction set sse9"):
        extension.native().select_instruction_set("sse9")


def compile_kernel(kernel: Path, instruction_set: str, target: Path) -> str:
    """Compile a kernel file for an instruction set, for sanitizers; returns the object's path."""
    options = [*FLAGS, *INSTRUCTION_SETS[instruction_set], *SANITIZE, f"-DMM_ISA={instruction_set}"]
    built = run([COMPILER, *options, "-c", str(kernel), "-o", str(target)])
    assert built.returncode == 0, built.stderr
    return str(target)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Objects]:
    """Every kernel file for every instruction set; each core compiles one at a time."""
    folder = tmp_path_factory.mktemp("objects")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (kernel, name): pool.submit(compile_kernel, kernel, name, folder / f"{kernel.stem}_{name}.o")
            for kernel in KERNELS
            for name in INSTRUCTION_SETS
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler to build the check with")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_no_build_leaks_into_another(kernel: Path, objects: Objects) -> None:
    """A weak symbol of the AVX-512 build could be linked into the portable one, and crash an older CPU.

    Not optimised, every function that a build could leave out of line is a symbol of its own.
    """
    for name in INSTRUCTION_SETS:
        symbols = run(["nm", "-C", objects[kernel, name].result()]).stdout.splitlines()
        weak = [line for line in symbols if " W " in line or (" V " in line and "DW.ref." not in line)]
        assert [line for line in weak if f"mm::{name}::" not in line] == []  # a name of its own cannot be mixed up


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler to build the check with")
@pytest.mark.parametrize("source", sorted((ROOT / "tests/native").glob("*_sanitized.cpp")), ids=lambda path: path.stem)
def test_clean_under_sanitizers(source: Path, objects: Objects, tmp_path: Path) -> None:
    sources = [str(ROOT / "csrc/cpu/instruction_set.cpp"), str(source)]
    sources += [built.result() for built in objects.values()]
    program = str(tmp_path / "program")
    built = run([COMPILER, *FLAGS, *SANITIZE, *sources, "-o", program])
    assert built.returncode == 0, built.stderr
    ran = run([program], env={**os.environ, "LD_PRELOAD": ""})
    assert ran.returncode == 0, ran.stderr
    assert "clean portable" in ran.stdout


def test_missing_tools_are_named(tmp_path: Path) -> None:
    built = run([sys.executable, str(ROOT / "setup.py"), "build_ext"], cwd=ROOT, env={"PATH": str(tmp_path)})
    assert built.returncode != 0
    for text in ("missing", "cmake: pip install", "ninja: pip install", "a C++ compiler: Debian, Ubuntu: apt-get"):
        assert text in built.stdout + built.stderr


@pytest.mark.skipif(CMAKE is None, reason="no cmake (it is in the extra `test`)")
def test_builds_without_cuda_and_says_so_once(tmp_path: Path) -> None:
    import pybind11

    configure = [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DMMKERNELS_NVCC=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configured = run(configure)
    assert configured.returncode == 0, configured.stderr
    assert (configured.stdout + configured.stderr).count("no nvcc found: building the CPU kernels only") == 1


def test_report_names_every_part() -> None:
    printed = run([sys.executable, "-m", "mmkernels"], cwd=ROOT).stdout
    for part in ("native CPU kernels", "native CUDA code", "Triton", "torch", "GPU"):
        row = next(line for line in printed.splitlines() if line.strip().startswith(part))
        text = row.split(part, 1)[1].strip()
        assert text.startswith(("yes: ", "no: ")), row


def test_cuda_part_has_code_for_each_architecture() -> None:
    native = extension.native()
    if not native.cuda_architectures:
        pytest.skip(f"built without CUDA: {native.cuda_why_not}")
    triton = pytest.importorskip("triton", reason="Triton's wheel brings the cuobjdump to look into the binary with")
    cuobjdump = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    listed = (
        run([cuobjdump, "--list-elf", str(native.__file__)]).stdout
        + run([cuobjdump, "--list-ptx", str(native.__file__)]).stdout
    )
    for architecture in native.cuda_architectures.split():
        assert f"sm_{architecture.removesuffix('-real')}" in listed
    assert ".ptx" in listed
