"""ptxrun's matrix instructions against the fragment tables of the PTX ISA and a plain matrix product."""

from __future__ import annotations

import ptx_registry as registry
import pytest
import torch
from ptxrun.forms import Form

LANES = registry.LANES
TESTED = ("mma", "ldmatrix", "stmatrix")
TESTED_AS_TYPED = ("movmatrix.sync.aligned.m8n8.trans.b16",)


def fragment_a(lane: int, element: int, depth: int, per_register: int) -> tuple[int, int]:
    """Row and column in the 16 x depth matrix A of a lane's element: PTX ISA, figures of mma.m16n8k*."""
    group, thread = divmod(lane, 4)
    number, part = divmod(element, per_register)
    return group + 8 * (number % 2), thread * per_register + part + 4 * per_register * (number // 2)


def fragment_b(lane: int, element: int, per_register: int) -> tuple[int, int]:
    """Row and column in the depth x 8 matrix B."""
    group, thread = divmod(lane, 4)
    number, part = divmod(element, per_register)
    return thread * per_register + part + 4 * per_register * number, group


def fragment_c(lane: int, element: int) -> tuple[int, int]:
    """Row and column in the 16 x 8 matrices C and D."""
    group, thread = divmod(lane, 4)
    return group + 8 * (element // 2), thread * 2 + element % 2


def packed(type_: str, values: list[list[float]]) -> list[list[int]]:
    """Registers of 32 bits from each lane's elements, [register][lane]."""
    width = registry.bits_of(type_)
    per_register = 32 // width
    bits = [[registry.encode(type_, x) for x in lane] for lane in values]
    return [
        [sum(lane[k + part] << (part * width) for part in range(per_register)) for lane in bits]
        for k in range(0, len(bits[0]), per_register)
    ]


@pytest.mark.parametrize("form", registry.forms_named("mma"), ids=lambda form: form.template)
def test_product(form: Form) -> None:
    """Small integers, so that every order of summation gives the same."""
    total, operand = form.template.split(".")[-4:-2]
    depth, width = int(form.template.split("k")[1].split(".")[0]), registry.bits_of(operand)
    per_register = 32 // width
    A = torch.randint(-8, 9, (16, depth)).double()
    B = torch.randint(-8, 9, (depth, 8)).double()
    C = torch.randint(-64, 65, (16, 8)).double()
    D = A @ B + C
    num_a, num_b = 16 * depth // LANES, 8 * depth // LANES
    a = [[float(A[fragment_a(x, k, depth, per_register)]) for k in range(num_a)] for x in range(LANES)]
    b = [[float(B[fragment_b(x, k, per_register)]) for k in range(num_b)] for x in range(LANES)]
    c = [[float(C[fragment_c(x, k)]) for k in range(4)] for x in range(LANES)]
    registers = [packed("f32" if operand == "tf32" else operand, x) for x in (a, b)] + [packed(total, c)]
    names, count = [], len(registers[2])
    for number in (count, *map(len, registers)):
        names.append(", ".join(f"{{{sum(map(len_of, names)) + k}}}" for k in range(number)))
    operands = ", ".join(f"{{{{{x}}}}}" for x in names)
    values = [x for part in registers for x in part]
    got = registry.apply(form.template, ["b32"] * count, ["b32"] * len(values), values, operands)
    assert got == packed(total, [[float(D[fragment_c(x, k)]) for k in range(4)] for x in range(LANES)])


def len_of(names: str) -> int:
    return names.count("{")


def test_product_ignores_what_tf32_has_not() -> None:
    """The lower 13 bits of a tf32 operand are not read."""
    one = [[0x3F800000 | 0x1FFF] * LANES] * 4
    two = [[0x40000000] * LANES] * 2
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    zero = [[0] * LANES] * 4
    operands = "{{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{10}, {11}, {12}, {13}}}"
    got = registry.apply(opcode, ["b32"] * 4, ["b32"] * 10, [*one, *two, *zero], operands)
    assert {registry.decode("f32", x) for row in got for x in row} == {16.0}


TILES = """
  mov.u32 %r8, table;
  mad.lo.u32 %r9, %t, 16, %r8;
"""


@pytest.mark.parametrize("form", registry.forms_named("ldmatrix", "stmatrix"), ids=lambda form: form.template)
def test_tiles(form: Form) -> None:
    """Row r of tile k is at the address of lane 8k + r; lane 4r + c holds its elements 2c and 2c + 1."""
    count = next(number for number in (1, 2, 4) if f".x{number}" in form.template)
    names = ", ".join(f"%r{k}" for k in range(count))
    for opcode, choices in registry.each_choice(form):
        memory = torch.randint(0, 2**15, (4, 8, 8))
        tiles = memory.transpose(1, 2) if choices["trans"] else memory
        in_registers = [
            [int(tiles[k, x // 4, x % 4 * 2]) | int(tiles[k, x // 4, x % 4 * 2 + 1]) << 16 for x in range(LANES)]
            for k in range(count)
        ]
        rows = memory.reshape(LANES, 8).tolist()
        words = [[sum(row[h + k] << (16 * k) for k in range(4)) for row in rows] for h in (0, 4)]
        if form.name == "ldmatrix":
            body = TILES + "  ld.global.b64 %d0, [%in]; ld.global.b64 %d1, [%in+256];\n"
            body += f"  st.shared.v2.b64 [%r9], {{%d0, %d1}};\n  {opcode} {{{names}}}, [%r9];\n"
            body += "".join(registry.store("b32", k, k) for k in range(count))
            got = registry.run(registry.program(body, ".shared .align 16 .b8 table[512];"), words, count)
            assert got == in_registers, opcode
        else:
            body = TILES + "".join(registry.load("b32", k, k) for k in range(count))
            body += f"  mov.b64 %d0, 0; st.shared.v2.b64 [%r9], {{%d0, %d0}};\n  {opcode} [%r9], {{{names}}};\n"
            body += "  ld.shared.v2.b64 {%d0, %d1}, [%r9];\n"
            body += "  st.global.b64 [%out], %d0; st.global.b64 [%out+256], %d1;\n"
            got = registry.run(registry.program(body, ".shared .align 16 .b8 table[512];"), in_registers, 2)
            stored = 8 * count
            assert [x[:stored] for x in got] == [x[:stored] for x in words], opcode
            assert not any(x for row in got for x in row[stored:])


def test_transposition() -> None:
    tile = torch.randint(0, 2**15, (8, 8))
    both = [
        [int(x[lane // 4, lane % 4 * 2]) | int(x[lane // 4, lane % 4 * 2 + 1]) << 16 for lane in range(LANES)]
        for x in (tile, tile.T)
    ]
    (got,) = registry.apply("movmatrix.sync.aligned.m8n8.trans.b16", ["b32"], ["b32"], [both[0]])
    assert got == both[1]
