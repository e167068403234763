"""ptxrun's arithmetic and comparison against definitions on Python's integers and fractions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ptx_registry as registry
import pytest
from ptxrun.forms import Form


def _quotient(a: Any, b: Any) -> Any:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


INTEGER: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mul.wide": operator.mul,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "min": min,
    "max": max,
    "neg": operator.neg,
    "abs": abs,
}
# On fractions, and on floats where an operand is infinite or NaN.
EXACT: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "fma": lambda a, b, c: a * b + c,
}


def _or_nan(function: Callable[[float], float]) -> Callable[[float], float]:
    def guarded(x: float) -> float:
        try:
            return function(x)
        except ValueError:
            return math.nan

    return guarded


def _divide(a: float, b: float) -> float:
    if b == 0:
        is_undefined = a == 0 or math.isnan(a)
        return math.nan if is_undefined else math.copysign(math.inf, math.copysign(1, a) * math.copysign(1, b))
    return a / b


def _least(*values: float, is_nan_wanted: bool = False, sign: int = 1) -> float:
    numbers = [x for x in values if not math.isnan(x)]
    if not numbers or (is_nan_wanted and len(numbers) < len(values)):
        return math.nan
    return sign * min((sign * x for x in numbers), key=lambda x: (x, math.copysign(1, x)))


# Rounded once where the result is exact in double, else within a tolerance.
FUNCTION: dict[str, Callable[..., float]] = {
    "div": _divide,
    "rcp": lambda x: _divide(1.0, x),
    "sqrt": _or_nan(math.sqrt),
    "rsqrt": _or_nan(lambda x: _divide(1.0, math.sqrt(x))),
    "ex2": lambda x: 2.0**x if x < 1000 else x,
    "lg2": _or_nan(lambda x: math.log2(x) if x != 0 else -math.inf),
    "sin": _or_nan(math.sin),
    "cos": _or_nan(math.cos),
    "tanh": math.tanh,
    "copysign": lambda a, b: math.copysign(b, a),
    "neg": operator.neg,
    "abs": abs,
}
TOLERANCE = {"f32": 2e-6, "f64": 1e-15, "f16": 2**-10, "bf16": 2**-7}


def define_integer(form: Form, type_: str, arguments: tuple[int, ...]) -> int:
    width = registry.bits_of(type_)
    name = ".".join(form.template.split(".")[:2]) if form.name in ("mul", "mad") else form.name
    if name.endswith(".hi"):
        return (arguments[0] * arguments[1] >> width) + sum(arguments[2:])
    return INTEGER[name](*arguments)


def define_float(form: Form, type_: str, choices: dict[str, str], arguments: tuple[float, ...]) -> float:
    if choices.get("ftz") or ".ftz" in form.template.replace("[.ftz]", ""):
        arguments = tuple(registry.flushed(x, type_) for x in arguments)
    if form.name in EXACT:
        is_finite = all(map(math.isfinite, arguments))
        exact = EXACT[form.name](*(map(Fraction, arguments) if is_finite else arguments))
        mode = choices.get("ROUND") or "rn"
        result = registry.rounded(exact, type_, mode) if is_finite else exact
    elif form.name in ("min", "max"):
        result = _least(*arguments, is_nan_wanted=bool(choices.get("NaN")), sign=1 if form.name == "min" else -1)
    else:
        result = FUNCTION[form.name](*arguments)
        result = registry.rounded(Fraction(result), type_) if math.isfinite(result) and result else result
    if choices.get("ftz"):
        result = registry.flushed(result, type_)
    if choices.get("sat"):
        result = 0.0 if math.isnan(result) else min(max(result, 0.0), 1.0)
    if choices.get("relu"):
        result = result if math.isnan(result) else max(result, 0.0)
    return result


def values_of(form: Form, types: list[str]) -> list[list[int]]:
    values = [registry.inputs(type_, number) for number, type_ in enumerate(types)]
    if form.name in ("div", "rem") and types[1] not in registry.FORMATS:
        values[1] = [x or 3 for x in values[1]]  # PTX leaves division by zero open
    return values


ARITHMETIC = (
    "add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "copysign",
    "ex2", "lg2", "sin", "cos", "rsqrt", "rcp", "sqrt", "tanh",
)  # fmt: skip
TESTED = (*ARITHMETIC, "setp", "selp")


def describe(form: Form) -> str:
    return f"{form.template} {len(form.operands)} {form.slots.get('TYPE', ('',))[0]}"


@pytest.mark.parametrize("form", registry.forms_named(*ARITHMETIC), ids=describe)
def test_arithmetic(form: Form) -> None:
    for opcode, choices in registry.each_choice(form):
        types = [choices.get(x.lstrip(">"), x.lstrip(">")) for x in form.operands]
        out, element = types[0], types[1].removesuffix("x2")
        halves = 2 if types[1].endswith("x2") else 1
        width = registry.bits_of(element)
        packed = [[0] * registry.LANES for _ in types[1:]]
        lanes = [[] for _ in types[1:]]
        for half in range(halves):
            source_types = [element] * len(types[1:]) if halves == 2 else types[1:]
            for k, values in enumerate(values_of(form, source_types)):
                values = values[half:] + values[:half]
                packed[k] = [x | y << (width * half) for x, y in zip(packed[k], values, strict=True)]
                lanes[k] += [registry.decode(source_types[k], x) for x in values]
        (got,) = registry.apply(opcode, [out], types[1:], packed)
        if halves == 2:
            got = [x >> (width * half) & (2**width - 1) for half in range(2) for x in got]
        is_float = element in registry.FORMATS
        scalar_out = out.removesuffix("x2") if is_float else out
        arguments = zip(*lanes, strict=True)
        if is_float:
            wanted = [define_float(form, scalar_out, choices, x) for x in arguments]
        else:
            wanted = [define_integer(form, element, x) for x in arguments]
            wanted = [registry.decode(out, registry.encode(out, x)) for x in wanted]
        is_exact = form.name in ("neg", "abs", "copysign", "min", "max", *EXACT) or not is_float
        registry.check(scalar_out, got, wanted, opcode, 0.0 if is_exact else TOLERANCE[element])
        if form.name in ("neg", "abs", "copysign", "min", "max") and is_float:
            signs = [math.copysign(1, registry.decode(scalar_out, x)) for x in got]
            kept = [k for k, x in enumerate(wanted) if not math.isnan(x)]
            assert [signs[k] for k in kept] == [math.copysign(1, wanted[k]) for k in kept], opcode


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def define_comparison(choices: dict[str, str], type_: str, a: float, b: float) -> bool:
    name, is_nan = choices["COMPARE"], math.isnan(a) or math.isnan(b)
    if choices.get("ftz"):
        a, b = registry.flushed(a, type_), registry.flushed(b, type_)
    if name in ("num", "nan"):
        return is_nan == (name == "nan")
    if name.endswith("u") and type_ in registry.FORMATS:
        return is_nan or COMPARE[name[:-1]](a, b)
    return not is_nan and COMPARE[name](a, b)


@pytest.mark.parametrize("form", registry.forms_named("setp"), ids=describe)
def test_comparison(form: Form) -> None:
    for opcode, choices in registry.each_choice(form):
        type_ = choices["TYPE"]
        a, b = registry.inputs(type_, 0), registry.inputs(type_, 1)
        b = [x if lane % 3 else y for lane, (x, y) in enumerate(zip(b, a, strict=True))]  # some equal pairs
        p = [lane % 2 for lane in range(registry.LANES)]
        truth = [
            define_comparison(choices, type_, registry.decode(type_, x), registry.decode(type_, y))
            for x, y in zip(a, b, strict=True)
        ]
        combine = COMBINE.get(choices.get("COMBINE", ""), lambda x, _: x)
        for negated in ("", "!") if "pred" in form.operands else ("",):
            c = [bool(x) ^ bool(negated) for x in p]
            wanted = [[combine(x, y) for x, y in zip(truth, c, strict=True)]]
            wanted += [[combine(not x, y) for x, y in zip(truth, c, strict=True)]]
            tail = f", {negated}{{4}}" if "pred" in form.operands else ""
            ins, values = [type_, type_, "pred"], [a, b, p]
            pair = registry.apply(opcode, ["pred", "pred"], ins, values, "{0}|{1}, {2}, {3}" + tail)
            assert pair == wanted, opcode
            single = registry.apply(opcode, ["pred", "pred"], ins, values, "{0}, {2}, {3}" + tail)
            assert single[0] == wanted[0], opcode


@pytest.mark.parametrize("form", registry.forms_named("selp"), ids=describe)
def test_selection(form: Form) -> None:
    for opcode, choices in registry.each_choice(form):
        type_ = choices["TYPE"]
        a, b, p = registry.inputs(type_, 0), registry.inputs(type_, 1), [lane % 2 for lane in range(registry.LANES)]
        (got,) = registry.apply(opcode, [type_], [type_, type_, "pred"], [a, b, p])
        assert got == [x if choice else y for x, y, choice in zip(a, b, p, strict=True)], opcode
