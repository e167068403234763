"""ptxrun's logic, shifts, bit fields, moves and conversions against literal definitions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ptx_registry as registry
import pytest
from ptxrun.forms import Form

LANES = range(registry.LANES)


def shift_amount(number: int) -> list[int]:
    return [(lane * 5 + number) % 70 if lane else 300 for lane in LANES]


def extract(type_: str, a: int, position: int, length: int) -> int:
    """PTX ISA, bfe: bit by bit."""
    width, position, length = registry.bits_of(type_), position & 255, length & 255
    sign = 0 if type_[0] == "u" or length == 0 else a >> min(position + length - 1, width - 1) & 1
    bits = [a >> (position + k) & 1 if k < length and position + k < width else sign for k in range(width)]
    return sum(bit << k for k, bit in enumerate(bits))


def insert(type_: str, a: int, b: int, position: int, length: int) -> int:
    """PTX ISA, bfi: bit by bit."""
    for k in range(length & 255):
        place = (position & 255) + k
        if place < registry.bits_of(type_):
            b = b & ~(1 << place) | (a >> k & 1) << place
    return b


def permute(_: str, a: int, b: int, selector: int) -> int:
    source, result = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")], 0
    for k in range(4):
        choice = selector >> (4 * k) & 15
        byte = source[choice & 7]
        result |= ((255 if byte & 128 else 0) if choice & 8 else byte) << (8 * k)
    return result


def funnel(form: Form, a: int, b: int, amount: int) -> int:
    amount = min(amount, 32) if "clamp" in form.template else amount & 31
    both = b << 32 | a
    return both << amount >> 32 if ".l." in form.template else both >> amount


def shifted_right(type_: str, a: int, amount: int) -> int:
    return registry.decode(type_, a) >> min(amount, registry.bits_of(type_))  # pyright: ignore[reportOperatorIssue]


LOGIC: dict[str, Callable[[int, int], int]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
DEFINITIONS: dict[str, Callable[..., int]] = {
    **{name: lambda form, t, a, b, name=name: LOGIC[name](a, b) for name in LOGIC},
    "not": lambda form, t, a: ~a,
    "shl": lambda form, t, a, b: a << min(b, 64),
    "shr": lambda form, t, a, b: shifted_right(t, a, b),
    "shf": lambda form, t, a, b, c: funnel(form, a, b, c),
    "bfe": lambda form, t, *x: extract(t, *x),
    "bfi": lambda form, t, *x: insert(t, *x),
    "prmt": lambda form, t, *x: permute(t, *x),
    "popc": lambda form, t, a: a.bit_count(),
    "clz": lambda form, t, a: registry.bits_of(t) - a.bit_length(),
    "brev": lambda form, t, a: int(format(a, f"0{registry.bits_of(t)}b")[::-1], 2),
}


TESTED = (*DEFINITIONS, "mov", "cvt")
TESTED_AS_TYPED = ("lop3.b32",)


@pytest.mark.parametrize("form", registry.forms_named(*DEFINITIONS), ids=lambda form: form.template)
def test_bits(form: Form) -> None:
    for opcode, choices in registry.each_choice(form):
        words = [x for x in form.operands if x != "-"]
        types = [choices.get(x.lstrip(">"), x.lstrip(">")) for x in words]
        is_shift = form.name in ("shl", "shr", "shf", "bfe", "bfi")
        values = []
        for number, type_ in enumerate(types[1:]):
            if is_shift and type_ == "u32" and words[number + 1] == "u32":
                values.append(shift_amount(number))
            elif type_ == "pred":
                values.append([lane >> number & 1 for lane in LANES])
            else:
                values.append(registry.inputs(type_, number))
        (got,) = registry.apply(opcode, [types[0]], types[1:], values)
        mask = 1 if types[0] == "pred" else 2 ** registry.bits_of(types[0]) - 1
        wanted = [DEFINITIONS[form.name](form, types[1], *x) & mask for x in zip(*values, strict=True)]
        assert got == wanted, opcode


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE2, 0x01])
def test_logic_of_three(table: int) -> None:
    a, b, c = (registry.inputs("b32", number) for number in range(3))
    (got,) = registry.apply("lop3.b32", ["b32"], ["b32"] * 3, [a, b, c], f"{{0}}, {{1}}, {{2}}, {{3}}, {table}")
    for x, y, z, result in zip(a, b, c, got, strict=True):
        for k in range(32):
            index = (x >> k & 1) * 4 + (y >> k & 1) * 2 + (z >> k & 1)
            assert result >> k & 1 == table >> index & 1


@pytest.mark.parametrize("form", registry.forms_named("mov"), ids=lambda form: f"{form.template} {form.operands}")
def test_moves(form: Form) -> None:
    for opcode, choices in registry.each_choice(form):
        words = [choices.get(x.lstrip(">"), x.lstrip(">")) for x in form.operands if x != "-"]
        if "{" not in "".join(words):
            type_ = words[0]
            a = [x & 1 for x in LANES] if type_ == "pred" else registry.inputs(type_, 0)
            (got,) = registry.apply(opcode, [type_], [type_], [a])
            assert got == a, opcode
            continue
        is_pack = "{" in words[1]
        whole, (part, count) = words[1 - is_pack], words[is_pack].strip("{}").split("*")
        bits, number = registry.bits_of(part), int(count)
        names = ", ".join(f"{{{k + is_pack}}}" for k in range(number))
        if is_pack:
            values = [registry.inputs(part, k) for k in range(number)]
            (got,) = registry.apply(opcode, [whole], [part] * number, values, f"{{0}}, {{{{{names}}}}}")
            assert got == [sum(x << (bits * k) for k, x in enumerate(lane)) for lane in zip(*values, strict=True)]
        else:
            a = registry.inputs(whole, 0)
            got = registry.apply(opcode, [part] * number, [whole], [a], f"{{{{{names}}}}}, {{{number}}}")
            assert got == [[x >> (bits * k) & (2**bits - 1) for x in a] for k in range(number)]
            names = ", ".join(["_", *(f"{{{k}}}" for k in range(number - 1))])
            rest = registry.apply(opcode, [part] * (number - 1), [whole], [a], f"{{{{{names}}}}}, {{{number - 1}}}")
            assert rest == got[1:], "one element goes to the sink"


INTEGER_ROUNDING: dict[str, Callable[[Fraction], int]] = {
    "rni": round,
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}


def convert(to: str, from_: str, rounding: str, is_saturated: bool, is_relu: bool, value: float) -> float:
    """The value in the other type: integers wrap, or are clamped where saturated or where they come from a float."""
    is_to_float, is_from_float = to in registry.FORMATS, from_ in registry.FORMATS
    width = 0 if is_to_float else registry.bits_of(to)
    least, most = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if to[0] == "s" and width else (0, 2**width - 1)
    if is_from_float and not math.isfinite(value):
        if not is_to_float:
            return 0 if math.isnan(value) else most if value > 0 else least
        if is_saturated:
            return 1.0 if value == math.inf else 0.0
        return max(value, 0.0) if is_relu and not math.isnan(value) else value
    exact: Any = Fraction(value)
    if rounding in INTEGER_ROUNDING:
        exact = Fraction(INTEGER_ROUNDING[rounding](exact))
    if not is_to_float:
        result = int(exact)
        is_clamped = is_saturated or is_from_float
        return min(max(result, least), most) if is_clamped else registry.decode(to, registry.encode(to, result))
    if is_saturated:
        exact = min(max(exact, Fraction(0)), Fraction(1))
    if is_relu:
        exact = max(exact, Fraction(0))
    return registry.rounded(exact, to, rounding if rounding in ("rz", "rm", "rp", "rna") else "rn")


def scaled(type_: str) -> list[int]:
    """Values of a type, floats among them that lie between integers and past the ends of small ones."""
    values = registry.inputs(type_, 0)
    if type_ not in registry.FORMATS:
        return values
    more = [0.5, 1.5, 2.5, -0.5, -1.5, 0.25, 100.75, -100.75, 300.0, -300.0, 40000.0, 1e-3]
    return values[:-12] + [registry.encode(type_, registry.rounded(Fraction(x), type_)) for x in more]


@pytest.mark.parametrize("form", registry.forms_named("cvt"), ids=lambda form: f"{form.template} {form.slots}"[:60])
def test_conversion(form: Form) -> None:
    for opcode, choices in registry.each_choice(form):
        modifiers = (choices.get("ROUND", ""), bool(choices.get("sat")), bool(choices.get("relu")))
        if "TO" not in choices and "tf32" not in opcode:
            half = opcode.split(".")[-2].removesuffix("x2")
            a, b = scaled("f32"), scaled("f32")[::-1]
            (got,) = registry.apply(opcode, ["b32"], ["f32", "f32"], [a, b])
            for shift, source in ((16, a), (0, b)):
                wanted = [convert(half, "f32", *modifiers, registry.decode("f32", x)) for x in source]
                registry.check(half, [x >> shift & 0xFFFF for x in got], wanted, opcode)
            continue
        to, from_ = choices.get("TO", "tf32"), choices.get("FROM", "f32")
        a = scaled(from_)
        wanted = [convert(to, from_, *modifiers, registry.decode(from_, x)) for x in a]
        (got,) = registry.apply(opcode, [to], [from_], [a])
        registry.check(to, got, wanted, opcode)
        if to in ("s8", "s16", "s32", "u8", "u16", "u32"):  # a wider register takes the sign or zeros
            wide = "b64" if to.endswith("32") else "b32"
            (got,) = registry.apply(opcode, [wide], [from_], [a])
            assert got == [int(x) & (2 ** registry.bits_of(wide) - 1) for x in wanted], f"{opcode} to {wide}"
