"""ptxrun's tensor memory: what goes in and out, and its products, against a plain matrix product."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import ptxrun
import pytest
import torch
from ptxrun import mutations
from ptxrun.launching import Mutation
from swizzled_matrix import COPY_TO_SHARED, DEPTH, DTYPES, MATRIX_BYTES, THREADS, Stored

TESTED = ("tcgen05", "mbarrier")
SWIZZLES = {128: 2, 64: 4, 32: 6}  # bytes of a row of memory: code in a descriptor
VERSION = 1 << 46
COLUMNS = 256  # allocated; D has the first 128, A those from 128 on


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product (rows, 16) x (16, columns), 64 or 128 rows; D begins at `lane` of tensor memory."""

    rows: int = 64
    columns: int = 64
    type_: str = "bf16"
    row_bytes: int = 128
    transposed: tuple[bool, bool] = (False, False)
    is_a_in_tensor_memory: bool = False
    adds: bool = True
    lane: int = 0

    @property
    def kind(self) -> int:
        """The instruction descriptor: float32 sums, types, transpositions, sizes by 8 and 16."""
        is_bf16, (a, b) = self.type_ == "bf16", self.transposed
        return (
            1 << 4 | is_bf16 << 7 | is_bf16 << 10 | a << 15 | b << 16 | self.columns // 8 << 17 | self.rows // 16 << 24
        )

    def move(self, name: str, number: int, address: str, first: str) -> str:
        """Registers to or from tensor memory: of 64 rows a warp has 16, and its lanes from 16 on the later columns."""
        registers = "{" + ", ".join(f"%{first}{k}" for k in range(number)) + "}"
        shape, split = ("16x32bx2", f", {number}") if self.rows == 64 else ("32x32b", "")
        operands = f"[{address}]{split}, {registers}" if name == "st" else f"{registers}, [{address}]{split}"
        return f"tcgen05.{name}.sync.aligned.{shape}.x{number}.b32 {operands};"

    def held(self, matrix: torch.Tensor) -> torch.Tensor:
        """What each thread holds of a matrix (rows, columns): (128, columns), or half as many for 64 rows."""
        if self.rows == 128:
            return matrix
        halves = matrix.view(4, 16, 2, -1).transpose(1, 2)  # warp, half, row of 16, columns of a half
        return halves.reshape(THREADS, -1)


def program(case: Case) -> str:
    num_d, num_a = case.columns * case.rows // 128, DEPTH // 2 * case.rows // 128
    a = "[%r12]" if case.is_a_in_tensor_memory else "%d2"
    return f"""
.version 8.7
.target sm_100a
.address_size 64
.visible .entry test(.param .u64 in, .param .u64 held, .param .u64 total, .param .u64 a, .param .u64 b)
{{
  .reg .pred %p<8>; .reg .b32 %r<16>; .reg .b64 %d<12>; .reg .b32 %f<{num_d}>; .reg .b32 %a<{num_a}>;
  .shared .align 1024 .b8 memory[{2 * MATRIX_BYTES}];
  .shared .align 8 .b8 barrier[8];
  .shared .align 4 .b8 address[4];
  ld.param.u64 %d0, [in]; ld.param.u64 %d1, [held]; ld.param.u64 %d2, [a]; ld.param.u64 %d3, [b];
  ld.param.u64 %d4, [total];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, memory;
  setp.lt.u32 %p1, %r0, 32;
  mov.u32 %r5, address; mov.u32 %r6, barrier;
  @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5], {COLUMNS};
  {COPY_TO_SHARED}
  setp.eq.u32 %p2, %r0, 0;
  @%p2 mbarrier.init.shared::cta.b64 [%r6], 1;
  bar.sync 0;
  tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
  ld.shared.b32 %r7, [address];
  add.u32 %r7, %r7, {case.lane << 16};
  shr.u32 %r8, %r0, 5;
  shl.b32 %r9, %r8, 21;
  add.u32 %r10, %r7, %r9;
  add.u32 %r11, %r10, 128; add.u32 %r12, %r7, 128;
  mad.wide.u32 %d9, %r0, {4 * num_a}, %d1;
  mad.wide.u32 %d10, %r0, {4 * num_d}, %d4;
  {"".join(f"ld.global.b32 %a{k}, [%d9+{4 * k}]; " for k in range(num_a))}
  {"".join(f"ld.global.b32 %f{k}, [%d10+{4 * k}]; " for k in range(num_d))}
  {case.move("st", num_d, "%r10", "f")}
  {case.move("st", num_a, "%r11", "a")}
  tcgen05.wait::st.sync.aligned;
  bar.sync 0;
  setp.ne.u32 %p3, {int(case.adds)}, 0;
  @%p2 tcgen05.mma.cta_group::1.kind::f16 [%r7 + 0], {a}, %d3, {case.kind}, %p3;
  @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r6];
  bar.sync 0;
{{
  .reg .pred complete;
  again:
  mbarrier.try_wait.parity.shared::cta.b64 complete, [%r6], 0;
  @!complete bra.uni again;
}}
  {case.move("ld", num_d, "%r10", "f")}
  tcgen05.wait::ld.sync.aligned;
  {"".join(f"st.global.b32 [%d10+{4 * k}], %f{k}; " for k in range(num_d))}
  bar.sync 0;
  @%p2 mbarrier.inval.shared::cta.b64 [%r6];
  @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 {"%r7" if case.lane == 0 else "32"}, {COLUMNS};
  ret;
}}
"""


def check(case: Case, *, order: int = 0, mutate: Mutation | None = None) -> None:
    """Small integers, so that every order of summation gives the same."""
    generator = torch.Generator().manual_seed(case.columns)
    A, B = (
        torch.randint(-8, 9, (rows, DEPTH), generator=generator).to(DTYPES[case.type_])
        for rows in (case.rows, case.columns)
    )
    C = torch.randint(-64, 65, (case.rows, case.columns), generator=generator).float()
    expected = A.float() @ B.float().T + (C if case.adds else 0)
    # Two 16-bit elements of A are in a word of tensor memory.
    held, total = case.held(A.view(torch.int32)).contiguous(), case.held(C).contiguous()
    stored = [
        Stored(x, case.row_bytes, is_transposed) for x, is_transposed in zip((A, B), case.transposed, strict=True)
    ]
    fields = VERSION | SWIZZLES[case.row_bytes] << 61
    a, b = (x.fields + (number * MATRIX_BYTES >> 4) | fields for number, x in enumerate(stored))
    memory = torch.cat([x.memory for x in stored])
    counts = ptxrun.launch_ptx(
        program(case), None, (1,), (THREADS,), 0, [memory, held, total, a, b], order=order, mutate=mutate
    )
    assert torch.equal(total, case.held(expected))
    assert counts.mma == case.rows * case.columns // 128 and counts.mma_products == case.rows * case.columns * DEPTH


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("type_", DTYPES)
def test_every_width(type_: str, rows: int) -> None:
    """Every number of registers that is moved, too."""
    for columns in (8, 16, 32, 64, 128):
        for is_a_in_tensor_memory in (False, True):
            check(Case(rows=rows, columns=columns, type_=type_, is_a_in_tensor_memory=is_a_in_tensor_memory))


@pytest.mark.parametrize("transposed", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("row_bytes", SWIZZLES)
def test_every_layout(row_bytes: int, transposed: tuple[bool, bool]) -> None:
    check(Case(row_bytes=row_bytes, transposed=transposed), order=1)
    check(Case(row_bytes=row_bytes, transposed=transposed, rows=128, adds=False), order=7)


def test_the_other_lanes() -> None:
    check(Case(lane=16, is_a_in_tensor_memory=True))


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (mutations.without_fence(0), "fence.proxy.async"),
        (mutations.without_barrier(0), "RACE"),
        (mutations.without("@%p2 tcgen05.commit"), "deadlock"),
        (mutations.without("@%p2 mbarrier.init"), "no mbarrier"),
        (mutations.without("@%p1 tcgen05.dealloc"), "not freed"),
        (mutations.replaced(r"\[%r5\], 256", lambda x: "[%r5], 128"), "out of bounds"),
        (mutations.replaced("@%p2 tcgen05.mma", lambda x: "@%p1 tcgen05.mma"), "one issues it"),
        (mutations.replaced("@%p2 tcgen05.commit", lambda x: "tcgen05.commit"), "second commit"),
        (mutations.replaced("shl.b32 %r9, %r8, 21", lambda x: "mov.u32 %r9, 0"), "this warp has 32 from"),
        (mutations.replaced("ld.param.u64 %d3", lambda x: "mov.u64 %d3, 0; ld.param.u64 %d8"), "swizzled"),
        (mutations.replaced(str(Case().kind), lambda x: "0"), "instruction descriptor"),
    ],
)
def test_faults(mutate: Mutation, message: str) -> None:
    with pytest.raises(ptxrun.FaultError, match=message):
        check(Case(), mutate=mutate)


@pytest.mark.parametrize("name", ["wait::st", "wait::ld"])
def test_nothing_is_there_before_the_wait(name: str) -> None:
    with pytest.raises(AssertionError):
        check(Case(), mutate=mutations.without(f"tcgen05.{name}"))


def test_labels_of_inner_blocks_may_share_a_name() -> None:
    block = """{ .reg .pred q; setp.eq.u32 q, %r0, 0; again: @q bra done; add.u32 %r1, %r1, 1; done: }"""
    text = f"""
.version 8.7
.target sm_100a
.address_size 64
.visible .entry test(.param .u64 out)
{{
  .reg .b32 %r<2>; .reg .b64 %d<2>;
  ld.param.u64 %d0, [out];
  mov.u32 %r0, %tid.x; mov.u32 %r1, 0;
  {block}
  {block}
  mad.wide.u32 %d1, %r0, 4, %d0;
  st.global.b32 [%d1], %r1;
  ret;
}}
"""
    out = torch.zeros(32, dtype=torch.int32)
    ptxrun.launch_ptx(text, None, (1,), (32,), 0, [out])
    assert out.tolist() == [0] + [2] * 31
