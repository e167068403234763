"""ptxrun's loads, stores, copies and atomics against what memory must hold afterwards."""

from __future__ import annotations

import operator
from collections.abc import Callable

import ptx_registry as registry
import ptxrun
import pytest
import torch
from ptxrun.forms import Form

LANES = registry.LANES
THREAD_BYTES = 32
NUM_BYTES = LANES * THREAD_BYTES


def random_bytes() -> list[int]:
    return torch.randint(0, 256, (NUM_BYTES,)).tolist()


def words_of(data: list[int]) -> list[list[int]]:
    """Bytes of memory as the 64-bit slots that a program's input holds."""
    numbers = [int.from_bytes(bytes(data[k : k + 8]), "little") for k in range(0, len(data), 8)]
    return [numbers[k : k + LANES] for k in range(0, len(numbers), LANES)]


def describe(form: Form) -> str:
    return f"{form.template} {len(form.operands)} {form.slots.get('TYPE', ('',))[0]}"


# Each thread fills its own 32 bytes of a space from the input; %d10 (or %r10 in shared memory) is where.
FILL = """
  ld.param.u64 %d30, [test_in]; mul.wide.u32 %d31, %t, 32; add.s64 %d30, %d30, %d31;
  ld.global.b64 %d0, [%d30]; ld.global.b64 %d1, [%d30+8]; ld.global.b64 %d2, [%d30+16]; ld.global.b64 %d3, [%d30+24];
"""
SPACES = {
    "global": "  mov.u64 %d10, %d30;\n",
    "": "  mov.u64 %d10, %d30;\n",
    "shared": "  mov.u32 %r9, table; mad.lo.u32 %r10, %t, 32, %r9; cvt.u64.u32 %d10, %r10;\n"
    "  st.shared.v2.b64 [%d10], {%d0, %d1}; st.shared.v2.b64 [%d10+16], {%d2, %d3};\n",
    "local": "  mov.u64 %d10, own;\n  st.local.v2.b64 [%d10], {%d0, %d1}; st.local.v2.b64 [own+16], {%d2, %d3};\n",
}
DECLARATIONS = ".shared .align 16 .b8 table[1024];\n"
LOCAL = "  .local .align 16 .b8 own[32];\n"


def registers(type_: str, count: int) -> str:
    names = [registry.register(type_, 20 + k) for k in range(count)]
    return f"{{{', '.join(names)}}}" if count > 1 else names[0]


@pytest.mark.parametrize("form", registry.forms_named("ld"), ids=describe)
def test_load(form: Form) -> None:
    data = random_bytes()
    for opcode, choices in registry.each_choice(form):
        type_, count = choices["TYPE"], int(choices.get("VEC", "")[1:] or 1)
        space, size = choices.get("SPACE", "").removesuffix("::cta"), registry.bits_of(type_) // 8
        policy = ", %d9" if "!b64" in form.operands else ""
        declarations, offset = DECLARATIONS, 0 if count * size > 16 else 16
        if space == "const":
            values = ", ".join(map(str, data))
            declarations += f".const .align 16 .b8 constants[{NUM_BYTES}] = {{{values}}};\n"
            where = "  mov.u64 %d10, constants; add.s64 %d10, %d10, %d31;\n"
        elif space == "param":
            where, offset = "  mov.b64 %d10, test_in;\n", 0
            if count * size > 16:
                continue  # the parameters of this program are 16 bytes
        else:
            where = SPACES[space]
        body = f"{LOCAL}{FILL}{where}  createpolicy.fractional.L2::evict_last.b64 %d9;\n"
        body += f"  {opcode} {registers(type_, count)}, [%d10+{offset}]{policy};\n"
        body += "".join(registry.store(type_, 20 + k, k) for k in range(count))
        if space == "param":
            compare_parameters(registry.program(body, declarations), data, type_, count)
            continue
        got = registry.run(registry.program(body, declarations), words_of(data), count)
        for k in range(count):
            starts = [lane * THREAD_BYTES + offset + k * size for lane in range(LANES)]
            wanted = [int.from_bytes(bytes(data[x : x + size]), "little") for x in starts]
            mask = 2 ** registry.register_bits(type_) - 1
            assert [x & mask for x in got[k]] == [int(decoded(type_, x)) & mask for x in wanted], opcode


def decoded(type_: str, bits: int) -> int:
    value = registry.decode(type_, bits)
    return bits if isinstance(value, float) else value


def compare_parameters(text: str, data: list[int], type_: str, count: int) -> None:
    given = torch.tensor([[x - 2**64 if x >= 2**63 else x for x in row] for row in words_of(data)])
    out = torch.zeros((8, LANES), dtype=torch.int64)
    ptxrun.launch_ptx(text, "test", (1,), (LANES,), 0, [given, out])
    block = given.data_ptr().to_bytes(8, "little") + out.data_ptr().to_bytes(8, "little")
    size, mask = registry.bits_of(type_) // 8, 2 ** registry.register_bits(type_) - 1
    for k in range(count):
        wanted = decoded(type_, int.from_bytes(block[k * size : (k + 1) * size], "little"))
        assert int(out[k, 5]) & mask == wanted & mask


@pytest.mark.parametrize("form", registry.forms_named("st"), ids=describe)
def test_store(form: Form) -> None:
    data = random_bytes()
    for opcode, choices in registry.each_choice(form):
        type_, count = choices["TYPE"], int(choices.get("VEC", "")[1:] or 1)
        space, size = choices.get("SPACE", "").removesuffix("::cta"), registry.bits_of(type_) // 8
        policy = ", %d9" if "!b64" in form.operands else ""
        offset = 0 if count * size > 16 else 16
        # The value's elements come from the start of the thread's own 32 bytes, its other bytes stay.
        elements = "".join(
            f"  ld.global.b{8 * size} {registry.register(type_, 20 + k)}, [%d30+{k * size}];\n" for k in range(count)
        )
        generic = {"": "global"}.get(space, space)
        body = f"{LOCAL}{FILL}{SPACES[space]}{elements}  createpolicy.fractional.L2::evict_last.b64 %d9, 1.0;\n"
        body += f"  {opcode} [%d10+{offset}], {registers(type_, count)}{policy};\n"
        body += "".join(
            f"  ld.{generic}.b64 %d4, [%d10+{8 * k}]; st.global.b64 [%out+{256 * k}], %d4;\n" for k in range(4)
        )
        got = registry.run(registry.program(body, DECLARATIONS), words_of(data), 4)
        for lane in range(LANES):
            own = data[lane * THREAD_BYTES : (lane + 1) * THREAD_BYTES]
            wanted = list(own)
            wanted[offset : offset + count * size] = own[: count * size]
            assert b"".join(row[lane].to_bytes(8, "little") for row in got) == bytes(wanted), opcode


TESTED_AS_TYPED = tuple(
    f"cvta{direction}{space}.u64"
    for direction in ("", ".to")
    for space in ("", ".global", ".shared", ".shared::cta", ".local", ".const")
) + tuple(f"isspacep.{space}" for space in ("global", "shared", "shared::cta", "local"))


@pytest.mark.parametrize("space", ["", "global", "shared", "shared::cta", "local", "const"])
def test_generic_addresses(space: str) -> None:
    """An address made generic reads the same memory, and back again is the same offset."""
    data, plain = random_bytes(), space.removesuffix("::cta")
    declarations = DECLARATIONS + f".const .align 16 .b8 constants[8] = {{{', '.join(map(str, data[:8]))}}};\n"
    where = "  mov.u64 %d10, constants;\n" if space == "const" else SPACES[plain]
    name = f".{space}" if space else ""
    body = f"{LOCAL}{FILL}{where}  cvta{name}.u64 %d11, %d10; cvta.to{name}.u64 %d12, %d11;\n"
    body += (
        "  ld.b64 %d13, [%d11]; st.global.b64 [%out], %d13; sub.s64 %d14, %d12, %d10; st.global.b64 [%out+256], %d14;\n"
    )
    tests = ("global", "shared", "shared::cta", "local")
    for k, tested in enumerate(tests):
        body += f"  isspacep.{tested} %p{k}, %d11;\n" + registry.store("pred", k, 2 + k)
    got = registry.run(registry.program(body, declarations), words_of(data), 6)
    first = 0 if space == "const" else THREAD_BYTES
    starts = [int.from_bytes(bytes(data[lane * first : lane * first + 8]), "little") for lane in range(LANES)]
    assert got[0] == starts and got[1] == [0] * LANES
    held = {"shared": "shared", "local": "local"}.get(plain, "global")
    assert [row[0] for row in got[2:]] == [int(tested.removesuffix("::cta") == held) for tested in tests]


@pytest.mark.parametrize("form", registry.forms_named("prefetch", "prefetchu"), ids=describe)
def test_prefetch_changes_nothing(form: Form) -> None:
    for opcode, _ in registry.each_choice(form):
        body = f"  {opcode} [%in]; ld.global.b64 %d1, [%in]; st.global.b64 [%out], %d1;\n"
        values = registry.inputs("b64", 0)
        assert registry.run(registry.program(body), [values], 1) == [values]


FENCES = ("membar", "fence", "griddepcontrol", "nanosleep", "createpolicy")
TESTED = ("ld", "st", "prefetch", "prefetchu", "cp", "atom", "red", *FENCES)


@pytest.mark.parametrize("form", registry.forms_named(*FENCES), ids=describe)
def test_fence_changes_nothing(form: Form) -> None:
    operands = {"nanosleep": "20", "createpolicy": "%d5"}.get(form.name, "")
    operands += ", 0.5" if "!f32" in form.operands else ""
    for opcode, _ in registry.each_choice(form):
        body = f"  ld.global.b64 %d1, [%in]; {opcode} {operands}; st.global.b64 [%out], %d1;\n"
        values = registry.inputs("b64", 0)
        assert registry.run(registry.program(body), [values], 1) == [values]


COPY = """
  ld.param.u64 %d30, [test_in]; mul.wide.u32 %d31, %t, {size}; add.s64 %d30, %d30, %d31;
  mov.u32 %r9, table; mad.lo.u32 %r10, %t, {size}, %r9;
  and.b32 %r2, %t, 3; setp.eq.u32 %p1, %r2, 1; mov.u64 %d9, 0;
  {opcode} [%r10], [%d30], {size}{operands};
  {wait}
  mad.lo.u32 %r11, %t, {size}, %r9; ld.shared.b32 %r3, [%r11]; st.global.b32 [%out], %r3;
"""


def copied(opcode: str, size: int, operands: str, wait: str, values: list[int]) -> list[int]:
    body = COPY.format(opcode=opcode, size=size, operands=operands, wait=wait)
    (got,) = registry.run(registry.program(body, DECLARATIONS), words_of(values), 1)
    return [x & 0xFFFFFFFF for x in got]


@pytest.mark.parametrize("form", registry.forms_named("cp"), ids=describe)
def test_async_copy(form: Form) -> None:
    commit = "cp.async.commit_group; cp.async.wait_group 0;"
    if "CACHE" not in form.slots:  # commit_group, wait_group and wait_all, with the copy that they are about
        data = random_bytes()
        wanted = [int.from_bytes(bytes(data[4 * k : 4 * k + 4]), "little") for k in range(LANES)]
        for wait in (commit, "cp.async.wait_all;"):
            assert copied("cp.async.ca.shared.global", 4, "", wait, data) == wanted
        for weak in ("cp.async.commit_group; cp.async.wait_group 1;", "cp.async.wait_group 0;", ""):
            assert copied("cp.async.ca.shared.global", 4, "", weak, data) == [2**32 - 1] * LANES  # NaN
        return
    tail = {"u32": ", %r2", "pred": ", %p1"}.get(next((x for x in form.operands if x in ("u32", "pred")), ""), "")
    policy = ", %d9" if "!b64" in form.operands else ""
    for opcode, choices in registry.each_choice(form):
        for size in (4, 8, 16) if choices["CACHE"] == "ca" else (16,):
            data = random_bytes()
            got = copied(opcode, size, tail + policy, commit, data)
            for lane in range(LANES):
                read = lane & 3 if "u32" in form.operands else 0 if tail and lane & 3 == 1 else 4
                own = [*data[lane * size : lane * size + read], 0, 0, 0, 0][:4]
                assert got[lane] == int.from_bytes(bytes(own), "little"), opcode


ATOMIC: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "inc": lambda a, b: 0 if a >= b else a + 1,
    "dec": lambda a, b: b if a == 0 or a > b else a - 1,
    "exch": lambda a, b: b,
    "cas": lambda a, b, c: c if a == b else a,
}


@pytest.mark.parametrize("form", registry.forms_named("atom", "red"), ids=describe)
def test_atomic(form: Form) -> None:
    """All lanes on one word of memory, in the order of the lanes, each told what it found where it asks."""
    name = next(x for x in form.template.split(".") if x in ATOMIC)
    for opcode, choices in registry.each_choice(form):
        type_, space = choices["TYPE"], choices["SPACE"].removesuffix("::cta")
        bits, value = registry.bits_of(type_), registry.register(type_, 1)
        small = [registry.encode(type_, x) for x in (3, 7, 5, 1, 9, 2, 8, 4)] * 4
        other = [registry.encode(type_, x) for x in (7, 2, 1, 4, 8, 3, 5, 9)] * 4
        where = {
            "shared": "  mov.u32 %r9, table; st.shared.b64 [%r9], 0; cvt.u64.u32 %d10, %r9;\n",
            "global": "  ld.param.u64 %d10, [test_out]; add.s64 %d10, %d10, 768;\n"
            "  mov.b64 %d11, 0; st.global.b64 [%d10], %d11;\n",
        }[space or "global"]
        body = where + registry.load(type_, 1, 0) + registry.load(type_, 2, 1)
        operands = f"[%d10], {value}" + (f", {registry.register(type_, 2)}" if name == "cas" else "")
        body += f"  {opcode} {registry.register(type_, 3) + ', ' if form.name == 'atom' else ''}{operands};\n"
        body += registry.store(type_, 3, 0) if form.name == "atom" else ""
        body += f"  ld.{space or 'global'}.b{bits} {registry.register(type_, 4)}, [%d10];\n"
        body += registry.store(type_, 4, 1)
        got = registry.run(registry.program(body, DECLARATIONS), [small, other], 4)
        state: float = 0
        for lane in range(LANES):
            if form.name == "atom":
                assert registry.decode(type_, got[0][lane]) == state, f"{opcode}, lane {lane}"
            arguments = [registry.decode(type_, x[lane]) for x in ((small, other) if name == "cas" else (small,))]
            state = ATOMIC[name](state, *arguments)
        assert [registry.decode(type_, x) for x in got[1]] == [state] * LANES, opcode
