"""What the parser makes of PTX: operands, instructions, one entry with what it declares.

Shapes of storage: a register is 32 lanes; its reference is a byte offset in the warp's registers plus a code of its
width. PTX ISA, "Operand Types" and "State Spaces".
"""

from __future__ import annotations

from dataclasses import dataclass, field

LANES = 32
WIDTH_BITS = {
    "b8": 8, "u8": 8, "s8": 8,
    "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32, "pred": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f32x2": 64,
}  # fmt: skip
SPECIAL_REGISTERS = (
    *(f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("laneid", "warpid", "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge"),
    "dynamic_smem_size",
)
_NEGATED = 4


class UnsupportedError(Exception):
    """PTX that ptxrun does not know; the message names the line and the instruction."""


def width_code(type_: str) -> int:
    """How a reference says a register's width: 0 for 16 bits, 1 for 32, 2 for 64, 3 for a predicate."""
    return 3 if type_ == "pred" else {8: 0, 16: 0, 32: 1, 64: 2}[WIDTH_BITS[type_]]


@dataclass(frozen=True)
class Register:
    """32 lanes at a byte offset of the warp's registers."""

    name: str
    offset: int
    code: int
    is_negated: bool = False

    @property
    def reference(self) -> int:
        """What the runtime reads: offset, width and negation in one number."""
        return self.offset | self.code | (_NEGATED if self.is_negated else 0)


@dataclass(frozen=True)
class Immediate:
    """A number in the text; `float_type` where it was written as a float."""

    bits: int
    float_type: str | None = None


@dataclass(frozen=True)
class Symbol:
    """A name: a variable in memory, a parameter, or the target of a branch. `_` is the sink."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}."""

    elements: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """p|q: two destinations."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    """One statement: the guard is the predicate after @, the line counts from 1."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    line: int
    text: str


@dataclass(frozen=True)
class Parameter:
    """A parameter of the entry, at a byte offset of the parameter block."""

    name: str
    offset: int
    num_bytes: int


@dataclass
class Program:
    """One entry. Labels give the number of the instruction they stand before; offsets and sizes are bytes."""

    entry: str
    parameters: list[Parameter] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    module_data: dict[str, bytes] = field(default_factory=dict)
    shared_bytes: int = 0
    local_bytes: int = 0
    dynamic_shared: str | None = None
    register_bytes: int = len(SPECIAL_REGISTERS) * LANES * 4

    def new_register(self, name: str, code: int) -> Register:
        """A register of that width after the ones there are."""
        offset = self.register_bytes
        self.register_bytes += LANES * {0: 2, 1: 4, 2: 8, 3: 4}[code]
        return Register(name, offset, code)

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameter block."""
        return max((x.offset + x.num_bytes for x in self.parameters), default=0)
