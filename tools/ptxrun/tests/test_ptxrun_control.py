"""ptxrun's branches, barriers and exchanges between lanes."""

from __future__ import annotations

import functools
import operator

import ptx_registry as registry
import ptxrun
import pytest
import torch
from ptxrun.forms import FORMS, Form

LANES = registry.LANES
TESTED = ("bra", "ret", "exit", "shfl", "vote", "redux", "barrier")
TESTED_AS_TYPED = ("trap", "activemask.b32", "elect.sync", "bar.warp.sync", "bar.sync", "bar.arrive")


def describe(form: Form) -> str:
    return f"{form.template} {len([x for x in form.operands if x != '-'])}"


@pytest.mark.parametrize("opcode", registry.opcodes("bra"))
def test_branch(opcode: str) -> None:
    """A loop of as many rounds as the lane's number: lanes leave it one by one and meet again."""
    branch = f"  @%p0 {opcode} again;\n" if opcode == "bra" else f"  @!%p0 bra.uni done;\n  {opcode} again;\ndone:\n"
    body = "  mov.u32 %r1, 0; mov.u32 %r2, 0;\nagain:\n  add.u32 %r2, %r2, %r1; add.u32 %r1, %r1, 1;\n"
    body += "  setp.lt.u32 %p0, %r1, %t;\n" + branch + registry.store("b32", 2, 0)
    (got,) = registry.run(registry.program(body), [], 1)
    assert got == [sum(range(max(lane, 1))) for lane in range(LANES)]


@pytest.mark.parametrize("opcode", registry.opcodes("ret", "exit"))
def test_end(opcode: str) -> None:
    """Lanes that leave store nothing; the rest goes on."""
    body = f"  setp.ge.u32 %p0, %t, 20;\n  @%p0 {opcode};\n" + registry.store("b32", 0, 0).replace("%r0", "%t")
    (got,) = registry.run(registry.program(body), [], 1)
    assert got == [lane if lane < 20 else 0x5A5A5A5A5A5A5A5A for lane in range(LANES)]


def test_trap() -> None:
    with pytest.raises(ptxrun.FaultError, match="trap"):
        registry.run(registry.program("  trap;\n"), [], 1)


@pytest.mark.parametrize("opcode", registry.opcodes("shfl"))
@pytest.mark.parametrize(("by", "bounds"), [(1, 0x1F), (3, 0x1F), (4, 0x181F), (2, 0x1C03), (17, 0)])
def test_shuffle(opcode: str, by: int, bounds: int) -> None:
    """PTX ISA, shfl.sync, as it is written there."""
    values, clamp, segment = registry.inputs("b32", 0), bounds & 31, bounds >> 8 & 31
    mode = opcode.split(".")[2]
    wanted, valid = [], []
    for lane in range(LANES):
        last, first = (lane & segment) | (clamp & ~segment & 31), lane & segment
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment & 31)}[mode]
        is_valid = source >= last if mode == "up" else source <= last
        wanted.append(values[source if is_valid else lane])
        valid.append(int(is_valid))
    tail = f", {by}, {bounds}, -1"
    assert registry.apply(opcode, ["b32", "pred"], ["b32"], [values], "{0}|{1}, {2}" + tail) == [wanted, valid]
    assert registry.apply(opcode, ["b32"], ["b32"], [values], "{0}, {1}" + tail) == [wanted]


@pytest.mark.parametrize("truth", [0, 2**32 - 1, 0x00F0F001], ids=hex)
def test_vote(truth: int) -> None:
    p = [truth >> lane & 1 for lane in range(LANES)]
    definitions = {"all": all(p), "any": any(p), "uni": len(set(p)) == 1, "ballot": truth}
    for opcode in registry.opcodes("vote"):
        _, _, mode, type_ = opcode.split(".")
        got = registry.apply(opcode, [type_], ["pred"], [p], "{0}, {1}, -1")
        assert got == [[int(definitions[mode])] * LANES], opcode


@pytest.mark.parametrize("form", registry.forms_named("redux"), ids=lambda form: form.template)
def test_reduction(form: Form) -> None:
    name = form.template.split(".")[2]
    operation = {"add": operator.add, "min": min, "max": max, "and": operator.and_, "or": operator.or_}
    operation |= {"xor": operator.xor}
    for opcode, choices in registry.each_choice(form):
        type_ = choices.get("TYPE", "b32")
        values = registry.inputs(type_, 0)
        numbers = [registry.decode(type_, x) for x in values]
        total = functools.reduce(operation[name], [x for x in numbers if x == x])  # without .NaN a number wins over NaN
        got = registry.apply(opcode, [type_], [type_], [values], "{0}, {1}, -1")
        assert got == [[registry.encode(type_, total)] * LANES], opcode


def test_active_lanes_and_election() -> None:
    body = "  mov.u32 %r0, 0; mov.u32 %r1, 99; setp.ge.u32 %p0, %t, 5; setp.ne.u32 %p1, %t, %t;\n"
    body += "  @%p0 activemask.b32 %r0;\n  @%p0 elect.sync %r1|%p1, 0xffffffe0;\n  @%p0 elect.sync _|%p2, 0xffffffe0;\n"
    body += "".join(
        registry.store(type_, k, slot) for slot, (type_, k) in enumerate((("b32", 0), ("b32", 1), ("pred", 1)))
    )
    got = registry.run(registry.program(body), [], 3)
    assert got[0] == [0] * 5 + [0xFFFFFFE0] * 27
    assert got[1] == [99] * 5 + [5] * 27
    assert got[2] == [int(lane == 5) for lane in range(LANES)]


def test_members_must_be_there() -> None:
    body = "  setp.ge.u32 %p0, %t, 5;\n  @%p0 bar.warp.sync {};\n"
    registry.run(registry.program(body.format("0xffffffe0")), [], 1)
    with pytest.raises(ptxrun.FaultError, match="member mask"):
        registry.run(registry.program(body.format("-1")), [], 1)


BARRIERS = [form for form in FORMS if form.name in ("bar", "barrier") and form.template != "bar.warp.sync"]
EXCHANGE = """
.visible .entry test(.param .u64 test_out)
{{
  .reg .pred %p<9>; .reg .b32 %r<20>; .reg .b64 %d<9>;
  .shared .align 4 .b8 table[512];
  mov.u32 %r0, %tid.x; mov.u32 %r1, table; mad.lo.u32 %r2, %r0, 4, %r1;
  mov.u32 %r9, 3; mov.u32 %r10, 128; setp.lt.u32 %p1, %r0, 64; setp.ge.u32 %p2, %r0, 0;
  add.u32 %r3, %r0, 1000; st.shared.u32 [%r2], %r3;
  {barrier}
  xor.b32 %r4, %r0, 127; mad.lo.u32 %r5, %r4, 4, %r1;
  {load} ld.shared.u32 %r6, [%r5];
  ld.param.u64 %d0, [test_out]; mul.wide.u32 %d1, %r0, 4; add.s64 %d0, %d0, %d1;
  {load} st.global.u32 [%d0], %r6;
  ret;
}}
"""


def exchange(barrier: str, order: int, load: str = "") -> list[int]:
    """128 threads write a word each and read that of the thread opposite."""
    out = torch.zeros(128, dtype=torch.int32)
    ptxrun.launch_ptx(EXCHANGE.format(barrier=barrier, load=load), "test", (1,), (128,), 0, [out], order=order)
    return out.tolist()


OPPOSITE = [1000 + (lane ^ 127) for lane in range(128)]


@pytest.mark.parametrize("form", BARRIERS, ids=describe)
@pytest.mark.parametrize("order", [0, 1, 7])
def test_barrier(form: Form, order: int) -> None:
    """Whole block, by number or register, with a count, predicated; .arrive by those who only write."""
    has_count = "-" not in form.operands
    for opcode, _ in registry.each_choice(form):
        if ".arrive" in opcode:
            both = f"@%p1 {opcode} 3, 128;\n  @!%p1 {opcode.replace('arrive', 'sync')} 3, 128;"
            assert exchange(both, order, "@!%p1")[64:] == OPPOSITE[64:]
            continue
        for number, count in (("0", "128"), ("%r9", "%r10")):
            for guard in ("", "@%p2 "):
                text = f"{guard}{opcode} {number}{f', {count}' if has_count else ''};"
                assert exchange(text, order) == OPPOSITE, text


def test_barriers_go_wrong() -> None:
    for text, fault in {
        "": "shared RACE",
        "bar.sync 0, 64;": "shared RACE",  # pairs of warps, not those that exchange
        "@%p1 bar.sync 0;": "deadlock|shared RACE",
        "@%p1 bar.sync 1; @!%p1 bar.sync 2;": "deadlock",
        "bar.sync 16;": "barrier 16 of 16",
        "bar.sync 1, 40;": "no multiple of 32",
        "setp.lt.u32 %p1, %r0, 40; @%p1 bar.sync 1, 64;": "lanes of a warp|shared RACE",
        "@%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 96;": "by an earlier warp|shared RACE",
        "bar.arrive 1, 128; bar.arrive 1, 128;": "second arrival",
        "bar.arrive 1, 128;": "shared RACE",
    }.items():
        for order in (0, 1, 7):
            with pytest.raises(ptxrun.FaultError, match=fault):
                exchange(text, order)
