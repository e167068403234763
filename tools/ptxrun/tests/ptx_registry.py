"""Tests of ptxrun's instructions: tiny PTX programs of one instruction, and numbers as PTX defines them.

A test runs each form of the registry in every choice of every slot (`each_choice`), one instruction on 32 lanes, and
compares with a definition on Python's integers and fractions.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction

import ptxrun
import torch
from ptxrun.assembler import find_forms
from ptxrun.forms import FORMS, Form
from ptxrun.syntax import WIDTH_BITS

LANES = 32
# Bits of exponent and fraction.
FORMATS = {"f16": (5, 10), "bf16": (8, 7), "tf32": (8, 10), "f32": (8, 23), "f64": (11, 52)}
REGISTERS = {"pred": "%p", 16: "%h", 32: "%r", 64: "%d"}


def forms_named(*names: str) -> list[Form]:
    return [form for form in FORMS if form.name in names]


def each_choice(form: Form) -> Iterator[tuple[str, dict[str, str]]]:
    """(opcode, choice in each slot): every choice of every slot once, the other slots at their first choice."""
    first = {name: choices[0] for name, choices in form.slots.items()}
    seen = set()
    for name, choices in {"": ("",), **form.slots}.items():
        for choice in choices:
            picked = first | ({name: choice} if name else {})
            opcode = spelled(form, picked)
            if opcode not in seen:
                seen.add(opcode)
                assert any(x is form for x, _ in find_forms(opcode, form.num_operands)), f"{opcode} is not found"
                yield opcode, picked


def opcodes(*names: str) -> list[str]:
    """Every opcode of these instructions that `each_choice` gives."""
    return list(dict.fromkeys(opcode for form in forms_named(*names) for opcode, _ in each_choice(form)))


def spelled(form: Form, picked: dict[str, str]) -> str:
    opcode = form.template
    for name in form.slots:
        for part in (f"[.{name}]", f".{name}"):
            if part in opcode:
                opcode = opcode.replace(part, f".{picked[name]}" if picked[name] else "", 1)
                break
    return opcode


def bits_of(type_: str) -> int:
    return WIDTH_BITS[type_]


def register_bits(type_: str) -> int:
    return max(16, bits_of(type_))


def decode(type_: str, bits: int) -> int | float:
    """The value of these bits in a type; floats as Python's, which hold them all."""
    width = bits_of(type_)
    bits &= 2**width - 1
    if type_ == "f64":
        return struct.unpack("<d", struct.pack("<Q", bits))[0]
    if type_ in FORMATS:
        exponent_bits, fraction_bits = FORMATS[type_]
        if type_ in ("tf32", "f32"):
            return struct.unpack("<f", struct.pack("<I", bits))[0]
        if type_ == "f16":
            return struct.unpack("<e", struct.pack("<H", bits))[0]
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return bits - 2**width if type_.startswith("s") and bits >> (width - 1) else bits


def encode(type_: str, value: float) -> int:
    """Bits of a value: an integer wraps, a float is one of the type already."""
    if type_ not in FORMATS:
        return int(value) & (2 ** bits_of(type_) - 1)
    if type_ == "f64":
        return struct.unpack("<Q", struct.pack("<d", value))[0]
    if type_ == "f16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    single = struct.unpack("<I", struct.pack("<f", value))[0]
    return single >> 16 if type_ == "bf16" else single


def rounded(value: Fraction | int, type_: str, mode: str = "rn") -> float:
    """The nearest float of a type in a direction: rn ties to even, rna ties away, rz, rm down, rp up."""
    exponent_bits, fraction_bits = FORMATS[type_]
    bias = 2 ** (exponent_bits - 1) - 1
    value = Fraction(value)
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    quantum = Fraction(2) ** (max(exponent, 1 - bias) - fraction_bits)
    steps, rest = divmod(size, quantum)
    steps, rest = int(steps), rest / quantum
    is_up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and steps % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": rest > 0 and value < 0,
        "rp": rest > 0 and value > 0,
    }[mode]
    result = (steps + is_up) * quantum
    largest = (2 - Fraction(1, 2**fraction_bits)) * Fraction(2) ** bias
    if result > largest:
        is_kept = mode == "rz" or (mode == "rm" and value > 0) or (mode == "rp" and value < 0)
        return math.copysign(float(largest) if is_kept else math.inf, value)
    return math.copysign(float(result), value)


def flushed(value: float, type_: str) -> float:
    """Zero in the place of a subnormal, what .ftz means."""
    smallest = 2.0 ** (2 - 2 ** (FORMATS[type_][0] - 1))
    return math.copysign(0.0, value) if 0 < abs(value) < smallest else value


def inputs(type_: str, number: int) -> list[int]:
    """32 values as bits: corners first, then random ones; another order for each operand."""
    generator = torch.Generator().manual_seed(1000 + number)
    random = [int(x) for x in torch.randint(-(2**31), 2**31, (2 * LANES,), generator=generator)]
    if type_ in FORMATS:
        corners = [0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan, 3.0, -2.5, 1.5, 2.5]
        tiny = 2.0 ** (1 - 2 ** (FORMATS[type_][0] - 1))
        values = [encode(type_, x) for x in (*corners, tiny, -tiny / 2)]
        values += [encode(type_, rounded(Fraction(x, 2**29), type_)) for x in random]
    else:
        width = bits_of(type_)
        values = [0, 1, 2, 2 ** (width - 1), 2 ** (width - 1) - 1, 2**width - 1, 7, 2**width - 3]
        values += [(x << 32 ^ y) & (2**width - 1) for x, y in zip(random, reversed(random), strict=True)]
    values = values[:LANES]
    order = torch.randperm(LANES, generator=generator).tolist() if number else range(LANES)
    return [values[place] for place in order]


def program(body: str, declarations: str = "") -> str:
    """An entry with pointers to inputs in %in and outputs in %out, both moved on by 8 bytes a thread."""
    return f"""
.version 8.5
.target sm_90
.address_size 64
{declarations}
.visible .entry test(.param .u64 test_in, .param .u64 test_out)
{{
  .reg .pred %p<40>; .reg .b16 %h<40>; .reg .b32 %r<40>; .reg .b64 %d<40>;
  .reg .b32 %t; .reg .b64 %in; .reg .b64 %out; .reg .b64 %off;
  ld.param.u64 %in, [test_in];
  ld.param.u64 %out, [test_out];
  mov.u32 %t, %tid.x;
  mul.wide.u32 %off, %t, 8;
  add.s64 %in, %in, %off;
  add.s64 %out, %out, %off;
{body}
  ret;
}}
"""


def run(text: str, slots: Sequence[Sequence[int]], num_outputs: int, **options: object) -> list[list[int]]:
    """Outputs of a `program`, 64-bit slots of each lane."""
    signed = [[x - 2**64 if x >= 2**63 else x for x in slot] for slot in slots] or [[0] * LANES]
    given = torch.tensor(signed, dtype=torch.int64)
    out = torch.full((max(1, num_outputs), LANES), 0x5A5A5A5A5A5A5A5A, dtype=torch.int64)
    ptxrun.launch_ptx(text, "test", (1,), (LANES,), 0, [given, out], **options)  # pyright: ignore[reportArgumentType]
    return [[x & (2**64 - 1) for x in row] for row in out.tolist()]


def register(type_: str, number: int) -> str:
    return f"{REGISTERS['pred' if type_ == 'pred' else register_bits(type_)]}{number}"


def load(type_: str, number: int, slot: int) -> str:
    """Put a slot of the input into a register of the type's width."""
    if type_ == "pred":
        return f"  ld.global.b32 %r{number}, [%in+{256 * slot}]; setp.ne.b32 %p{number}, %r{number}, 0;\n"
    return f"  ld.global.b{register_bits(type_)} {register(type_, number)}, [%in+{256 * slot}];\n"


def store(type_: str, number: int, slot: int) -> str:
    """Put a register into a slot of the output, the slot's other bytes zero."""
    zero = f"  mov.b64 %d39, 0; st.global.b64 [%out+{256 * slot}], %d39;\n"
    if type_ == "pred":
        return zero + f"  selp.b32 %r39, 1, 0, %p{number}; st.global.b32 [%out+{256 * slot}], %r39;\n"
    return zero + f"  st.global.b{register_bits(type_)} [%out+{256 * slot}], {register(type_, number)};\n"


def apply(opcode: str, outs: Sequence[str], ins: Sequence[str], values: Sequence[Sequence[int]], operands: str = "",
          old: Sequence[Sequence[int]] = ()) -> list[list[int]]:  # fmt: skip
    """One instruction from registers to registers: outs and ins are types, `operands` a text where they do not follow.

    Registers are numbered outs first; `old` is what the outs hold before.
    """
    numbered = [*enumerate(outs), *((len(outs) + k, x) for k, x in enumerate(ins))]
    names = [register(type_, number) for number, type_ in numbered]
    body = "".join(load(type_, len(outs) + k, k) for k, type_ in enumerate(ins))
    body += "".join(load(type_, k, len(ins) + k) for k, type_ in enumerate(outs) if old)
    body += f"  {opcode} {operands.format(*names) if operands else ', '.join(names)};\n"
    body += "".join(store(type_, k, k) for k, type_ in enumerate(outs))
    results = run(program(body), [*values, *old], len(outs))
    masks = [1 if x == "pred" else 2 ** register_bits(x) - 1 for x in outs]
    return [[x & mask for x in row] for row, mask in zip(results, masks, strict=True)]


def check(type_: str, got: Sequence[int], wanted: Sequence[float], what: str, tolerance: float = 0.0) -> None:
    """Lane by lane: integers by bits, floats by value with a relative tolerance, NaN as NaN; zeros of both signs."""
    for lane, (bits, value) in enumerate(zip(got, wanted, strict=True)):
        x = decode(type_, bits)
        if isinstance(value, float) and math.isnan(value):
            assert math.isnan(x), f"{what}, lane {lane}: got {x}, wanted NaN"
        elif math.isinf(value) or tolerance == 0:
            assert x == value, f"{what}, lane {lane}: got {x!r}, wanted {value!r}"
        else:
            assert abs(x - value) <= tolerance * max(abs(value), 1e-30), f"{what}, lane {lane}: {x!r} not {value!r}"
