"""ptxrun's products of a warpgroup against a plain matrix product and the tables of swizzled shared memory."""

from __future__ import annotations

import itertools

import ptxrun
import pytest
import torch
from ptxrun import mutations
from ptxrun.forms import FORMS
from ptxrun.launching import Mutation
from swizzled_matrix import COPY_TO_SHARED, DEPTH, DTYPES, MATRIX_BYTES, THREADS, Stored

TESTED = ("wgmma",)
SWIZZLES = {128: 1, 64: 2, 32: 3}  # bytes of a row of memory: code in a descriptor


def descriptor(matrix: Stored, row_bytes: int, start: int) -> int:
    return matrix.fields + (start >> 4) | SWIZZLES[row_bytes] << 62


def program(columns: int, type_: str, flags: str, is_a_in_registers: bool) -> str:
    """Both matrices into shared memory; D (128, columns / 2) and A (128, 4 words) in registers, by thread."""
    count = columns // 2
    d, a = (", ".join(f"%{name}{k}" for k in range(number)) for name, number in (("f", count), ("a", 4)))
    given = f"{{{a}}}" if is_a_in_registers else "%d2"
    opcode = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{type_}.{type_}"
    return f"""
.version 8.3
.target sm_90a
.address_size 64
.visible .entry test(.param .u64 in, .param .u64 registers, .param .u64 total, .param .u64 a, .param .u64 b)
{{
  .reg .pred %p<1>; .reg .b32 %r<8>; .reg .b64 %d<12>; .reg .b32 %f<{count}>; .reg .b32 %a<4>;
  .shared .align 1024 .b8 memory[{2 * MATRIX_BYTES}];
  ld.param.u64 %d0, [in]; ld.param.u64 %d1, [registers]; ld.param.u64 %d2, [a]; ld.param.u64 %d3, [b];
  ld.param.u64 %d4, [total];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, memory;
  {COPY_TO_SHARED}
  bar.sync 0;
  mad.wide.u32 %d9, %r0, 16, %d1;
  ld.global.v4.b32 {{{a}}}, [%d9];
  mad.wide.u32 %d10, %r0, {4 * count}, %d4;
  {"".join(f"ld.global.b32 %f{k}, [%d10+{4 * k}]; " for k in range(count))}
  wgmma.fence.sync.aligned;
  {opcode} {{{d}}}, {given}, %d3, {flags};
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  {"".join(f"st.global.b32 [%d10+{4 * k}], %f{k}; " for k in range(count))}
  ret;
}}
"""


def elements(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns in D of what threads hold, (128, columns / 2): PTX ISA, figure of wgmma's D fragment."""
    thread, number = torch.arange(THREADS)[:, None], torch.arange(columns // 2)
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * (number // 2 % 2), 8 * (number // 4) + 2 * (lane % 4) + number % 2


def check(
    columns: int, type_: str, row_bytes: int, transposed: tuple[bool, bool], signs: tuple[int, int] = (1, 1),
    *, is_a_in_registers: bool, first_k: int = 0, adds: bool = True, order: int = 0, mutate: Mutation | None = None,
) -> None:  # fmt: skip
    """Small integers, so that every order of summation gives the same."""
    generator = torch.Generator().manual_seed(columns)
    A, B = (torch.randint(-8, 9, (n, DEPTH), generator=generator).to(DTYPES[type_]) for n in (64, columns))
    C = torch.randint(-64, 65, (64, columns), generator=generator).float()
    expected = signs[0] * signs[1] * A.float() @ B.float().T + (C if adds else 0)
    total = C[elements(columns)]
    registers = A[elements(DEPTH)]  # A's fragment is D's of 16 columns
    stored = [Stored(A, row_bytes, transposed[0], first_k), Stored(B, row_bytes, transposed[1], first_k)]
    flags = ", ".join(map(str, (int(adds), *signs, *map(int, transposed[is_a_in_registers:]))))
    a, b = (descriptor(x, row_bytes, number * MATRIX_BYTES) for number, x in enumerate(stored))
    memory = torch.cat([x.memory for x in stored])
    counts = ptxrun.launch_ptx(
        program(columns, type_, flags, is_a_in_registers), None, (1,), (THREADS,), 0, [memory, registers, total, a, b],
        order=order, mutate=mutate,
    )  # fmt: skip
    got = torch.full((64, columns), float("nan"))
    got[elements(columns)] = total
    assert torch.equal(got, expected)
    assert counts.mma == 4 * columns // 8 and counts.mma_products == 64 * columns * DEPTH


@pytest.mark.parametrize("is_a_in_registers", [False, True])
@pytest.mark.parametrize("type_", DTYPES)
def test_every_width(type_: str, is_a_in_registers: bool) -> None:
    for columns in range(8, 257, 8):
        check(columns, type_, 32, (False, columns % 16 == 0), is_a_in_registers=is_a_in_registers)


@pytest.mark.parametrize("transposed", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("row_bytes", SWIZZLES)
def test_every_layout(row_bytes: int, transposed: tuple[bool, bool]) -> None:
    for columns in (16, 64):
        check(columns, "bf16", row_bytes, transposed, is_a_in_registers=False)
        check(columns, "bf16", row_bytes, transposed, (1, -1), is_a_in_registers=True, adds=False, order=1)


@pytest.mark.parametrize("first_k", [16, 32, 48])
def test_later_part_of_a_row(first_k: int) -> None:
    check(64, "f16", 128, (False, False), (-1, 1), is_a_in_registers=False, first_k=first_k, order=7)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (mutations.without_fence(0), "fence.proxy.async"),
        (mutations.without_fence(1), "wgmma.fence"),
        (mutations.without_barrier(0), "RACE"),
        (mutations.replaced("ld.param.u64 %d3", lambda x: "mov.u64 %d3, 0; ld.param.u64 %d8"), "swizzled"),
        (mutations.replaced(r"(?<=\n  )wgmma.f", lambda x: "cvt.u64.u32 %d3, %r0; wgmma.f"), "different matrix"),
        (mutations.replaced(r"(?<=, 1, )1, ", lambda x: "2, "), "a sign of 2"),
    ],
    ids=["proxy fence", "register fence", "barrier", "descriptor", "lanes", "sign"],
)  # fmt: skip
def test_faults(mutate: Mutation, message: str) -> None:
    with pytest.raises(ptxrun.FaultError, match=message):
        check(16, "bf16", 32, (False, False), is_a_in_registers=False, mutate=mutate)


def test_warps_that_differ() -> None:
    other = "shr.u32 %r5, %r0, 5; cvt.u64.u32 %d8, %r5; shl.b64 %d8, %d8, 9; add.u64 %d3, %d3, %d8; wgmma.fence"
    with pytest.raises(ptxrun.FaultError, match="differs between the warps"):
        check(16, "bf16", 32, (False, False), is_a_in_registers=False,
              mutate=mutations.replaced(r"(?<=\n  )wgmma.fence", lambda _: other))  # fmt: skip


def test_nothing_is_there_before_the_wait() -> None:
    with pytest.raises(AssertionError):
        check(16, "bf16", 32, (False, False), is_a_in_registers=False, mutate=mutations.looser_wait(0))


def test_too_few_warps() -> None:
    with pytest.raises(ptxrun.FaultError, match="not one of four"):
        empty = torch.zeros(MATRIX_BYTES, dtype=torch.float32)
        ptxrun.launch_ptx(
            program(16, "bf16", "1, 1, 1, 0, 0", False), None, (1,), (32,), 0, [empty, empty, empty, 0, 0]
        )


def test_all_widths_are_known() -> None:
    named = {form.template for form in FORMS if form.name == "wgmma" and "mma_async" in form.template}
    assert len(named) == 2 * 32, "test_every_width goes through the widths of bf16 and f16"
