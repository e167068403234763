"""What ptxrun must catch in a program that computes the right thing by luck, and how it launches."""

from __future__ import annotations

import ptx_registry as registry
import ptxrun
import pytest
import torch
from ptxrun import mutations

LANES = registry.LANES
TWO_WARPS = """
.visible .entry test(.param .u64 test_x, .param .u32 test_n, .param .f32 test_a)
{{
  .reg .pred %p<9>; .reg .b32 %r<20>; .reg .b64 %d<9>; .reg .b32 %f<9>;
  .shared .align 4 .b8 table[256];
  mov.u32 %r0, %tid.x; mov.u32 %r7, %ctaid.x; shr.u32 %r8, %r0, 5; mov.u32 %r1, table;
  and.b32 %r2, %r0, 31; mad.lo.u32 %r2, %r2, 4, %r1;
  ld.param.u64 %d0, [test_x]; ld.param.u32 %r9, [test_n]; ld.param.f32 %f0, [test_a];
  mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d0, %d1;
{body}
  ret;
}}
"""


def launch(
    body: str, grid: int = 1, order: int = 0, n: int = 0, a: float = 0.0, flags: int = ptxrun.ALL_CHECKS
) -> torch.Tensor:
    x = torch.zeros(64)
    ptxrun.launch_ptx(TWO_WARPS.format(body=body), "test", (grid,), (64,), 0, [x, n, a], order=order, flags=flags)
    return x


@pytest.mark.parametrize("order", [0, 1, 7])
def test_two_warps_on_one_word(order: int) -> None:
    """Equal values are no race, other values, or reads without a barrier, are."""
    launch("st.shared.u32 [%r2], 5; bar.sync 0; ld.shared.u32 %r4, [%r2];", order=order)
    launch("st.shared.u32 [%r2], 5; ld.shared.u32 %r4, [%r2];", order=order)
    for body in (
        "st.shared.u32 [%r2], %r8;",
        "st.shared.u32 [%r2], %r0;",
        "setp.eq.u32 %p0, %r8, 0; @%p0 st.shared.u32 [%r2], 5; @!%p0 ld.shared.u32 %r4, [%r2];",
        "setp.eq.u32 %p0, %r8, 1; @%p0 st.shared.u32 [%r2], 5; @!%p0 ld.shared.u32 %r4, [%r2];",
        "st.shared.u32 [%r2], 5; bar.sync 0; ld.shared.u32 %r4, [%r2]; st.shared.u32 [%r2], %r8;",
        "cvt.u64.u32 %d3, %r2; cvta.shared.u64 %d3, %d3; st.u32 [%d3], %r8;",
    ):
        with pytest.raises(ptxrun.FaultError, match="shared RACE"):
            launch(body, order=order)
        launch(body, order=order, flags=ptxrun.ALL_CHECKS & ~ptxrun.SHARED_RACES)


def test_blocks_on_one_word() -> None:
    """Blocks run one after the other here, at once on a GPU."""
    for body in (
        "st.global.u32 [%d1], 5;",
        "setp.eq.u32 %p0, %r7, 0; @%p0 st.global.u32 [%d1], 5; @!%p0 ld.global.u32 %r4, [%d1];",
        "setp.eq.u32 %p0, %r7, 1; @%p0 st.global.u32 [%d1], 5; @!%p0 ld.global.u32 %r4, [%d1];",
        "setp.eq.u32 %p0, %r7, 2; @%p0 st.global.u32 [%d1], 5; @!%p0 ld.global.u32 %r4, [%d1];",
    ):
        launch(body)
        with pytest.raises(ptxrun.FaultError, match="global RACE"):
            launch(body, grid=3)
    launch("ld.global.u32 %r4, [%d1];", grid=3)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ld.global.u32 %r4, [%d1+4];", "READ out of bounds: 4 bytes"),
        ("st.global.u32 [%d1+-8], %r4;", "WRITE out of bounds: 8 bytes"),
        ("ld.global.v2.u32 {%r4, %r5}, [%d1];", "misaligned global"),
        ("ld.shared.u32 %r4, [table+256];", "shared access out of bounds: offset 256"),
        ("ld.shared.u32 %r4, [table+2];", "misaligned shared"),
        ("ld.param.u32 %r4, [test_a+4];", "parameter access out of bounds"),
        ("mov.u64 %d5, 64; ld.global.u32 %r4, [%d5];", "READ out of bounds"),
        ("cp.async.ca.shared.global [%r2], [%d1+4], 4;", "READ out of bounds"),
        ("atom.global.add.u32 %r4, [%d1+256], 1;", "WRITE out of bounds"),
    ],
)
def test_bounds(body: str, fault: str) -> None:
    with pytest.raises(ptxrun.FaultError, match=f"{fault}.*block 0, warp [01], line 10"):
        launch(body)


def test_arguments_and_blocks() -> None:
    body = "setp.eq.u32 %p0, %r7, %r9; @%p0 st.global.f32 [%d1], %f0;"
    assert torch.equal(launch(body, grid=3, n=2, a=1.5), torch.full((64,), 1.5))
    x = torch.zeros(64)
    text = TWO_WARPS.format(body=body)
    ptxrun.launch_ptx(text, "test", (70_000,), (64,), 0, [x, 69_999, -2.0], blocks=[69_998, 69_999])
    assert torch.equal(x, torch.full((64,), -2.0))


def test_mutation() -> None:
    text = TWO_WARPS.format(body="st.global.f32 [%d1], 1.0;")
    x = torch.zeros(64)
    ptxrun.launch_ptx(text, "test", (1,), (64,), 0, [x, 0, 0.0], mutate=lambda x: x.replace("[%d1], 1.0", "[%d1], 2.0"))
    assert torch.equal(x, torch.full((64,), 2.0))


def test_ready_mutations() -> None:
    body = "cp.async.ca.shared.global [%r2], [%d1], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 1, 64;"
    text = TWO_WARPS.format(body=body + "setp.lt.u32 %p0, %r0, 40;")
    assert mutations.num_barriers(text) == 1
    assert "bar.sync" not in mutations.without_barrier()(text)
    assert "wait_group 1;" in mutations.looser_wait()(text)
    assert "setp.lt.u32 %p0, %r0, 39;" in mutations.shifted_comparison(by=-1)(text)
    with pytest.raises(ValueError, match=r"got 1 places.*wanted number 1"):
        mutations.without_barrier(1)(text)


def test_counts() -> None:
    """A warp's 32 floats in a row are 4 sectors; at a stride of 128 bytes 32 sectors, and one bank 32 times."""
    x = torch.zeros(64 * 32)
    body = "ld.global.f32 %f1, [%d1]; mul.wide.u32 %d2, %r0, 128; add.s64 %d2, %d0, %d2; st.global.f32 [%d2], %f1;"
    body += "st.shared.f32 [%r2], 1.0; bar.sync 0; ld.shared.f32 %f2, [table];"
    counts = ptxrun.launch_ptx(TWO_WARPS.format(body=body), "test", (1,), (64,), 0, [x, 0, 0.0])
    assert (counts.global_loads, counts.global_load_sectors, counts.global_load_bytes) == (2, 8, 256)
    assert (counts.global_stores, counts.global_store_sectors, counts.global_store_bytes) == (2, 64, 256)
    assert counts.sectors == 72 and counts.barriers == 2
    assert (counts.shared_stores, counts.shared_store_waves, counts.bank_conflicts) == (2, 2, 0)
    assert counts.executed["bar"] == 2 and counts.lanes["bar"] == 64
    counts = ptxrun.launch_ptx(TWO_WARPS.format(body="st.shared.f32 [%r1], 1.0;"), "test", (1,), (64,), 0, [x, 0, 0.0])
    assert counts.bank_conflicts == 0
    stride = "and.b32 %r3, %r0, 1; mad.lo.u32 %r3, %r3, 128, %r1; st.shared.f32 [%r3], 1.0;"
    counts = ptxrun.launch_ptx(TWO_WARPS.format(body=stride), "test", (1,), (64,), 0, [x, 0, 0.0])
    assert counts.shared_store_waves == 4 and counts.bank_conflicts == 2
