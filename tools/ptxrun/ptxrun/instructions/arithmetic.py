"""Arithmetic and comparison. PTX ISA, "Integer Arithmetic", "Floating Point", "Half Precision", "Comparison"."""

from ptxrun.forms import Choices, define, flags, no_flags

INTEGERS = "u16 s16 u32 s32 u64 s64"
HALVES = "f16 f16x2 bf16 bf16x2"


def _integers() -> None:
    of_two = {"add": "Add", "sub": "Subtract", "mul.lo": "Multiply", "mul.hi": "MultiplyHigh"}
    of_two |= {"div": "Divide", "rem": "Remainder", "min": "Minimum", "max": "Maximum"}
    for name, operation in of_two.items():
        function = f"elementwise<{operation}, {{TYPE}}, 2>"
        define(f"{name}.TYPE", ">TYPE TYPE TYPE", function, no_flags, TYPE=INTEGERS)
    for name, operation in (("mad.lo", "MultiplyAdd"), ("mad.hi", "MultiplyHighAdd")):
        function = f"elementwise<{operation}, {{TYPE}}, 3>"
        define(f"{name}.TYPE", ">TYPE TYPE TYPE TYPE", function, no_flags, TYPE=INTEGERS)
    for sign in "us":
        for width in (16, 32):
            narrow, wide = f"{sign}{width}", f"{sign}{2 * width}"
            define(f"mul.wide.{narrow}", f">{wide} {narrow} {narrow}", f"multiply_wide<{narrow}, {wide}, false>")
            define(f"mad.wide.{narrow}", f">{wide} {narrow} {narrow} {wide}", f"multiply_wide<{narrow}, {wide}, true>")
    for name, operation in (("neg", "Negate"), ("abs", "Absolute")):
        define(f"{name}.TYPE", ">TYPE TYPE", f"elementwise<{operation}, {{TYPE}}, 1>", no_flags, TYPE="s16 s32 s64")


def _floats() -> None:
    for name, operation in (("add", "Add"), ("sub", "Subtract"), ("mul", "Multiply")):
        function = f"elementwise<{operation}, {{TYPE}}, 2>"
        define(f"{name}[.ROUND][.ftz][.sat].TYPE", ">TYPE TYPE TYPE", function, flags, ROUND="rn rz rm rp", TYPE="f32")
        define(f"{name}[.ROUND][.ftz].TYPE", ">TYPE TYPE TYPE", function, flags, ROUND="rn rz rm rp", TYPE="f32x2")
        define(f"{name}[.ROUND].TYPE", ">TYPE TYPE TYPE", function, flags, ROUND="rn rz rm rp", TYPE="f64")
        define(f"{name}[.ROUND].TYPE", ">TYPE TYPE TYPE", function, flags, ROUND="rn", TYPE=HALVES)
    mixed = "elementwise_widening<{}, {{TYPE}}>"  # sm_100
    for name, operation in (("add", "Add"), ("sub", "Subtract")):
        opcode, slots = f"{name}[.ROUND][.sat].f32.TYPE", {"ROUND": "rn rz rm rp", "TYPE": "f16 bf16"}
        define(opcode, ">f32 TYPE f32", mixed.format(operation), flags, **slots)
    fused = "elementwise<FusedMultiplyAdd, {TYPE}, 3>"
    define("fma.ROUND[.ftz][.sat].TYPE", ">TYPE TYPE TYPE TYPE", fused, flags, ROUND="rn rz rm rp", TYPE="f32")
    define("fma.ROUND[.ftz].TYPE", ">TYPE TYPE TYPE TYPE", fused, flags, ROUND="rn rz rm rp", TYPE="f32x2")
    define("fma.ROUND.TYPE", ">TYPE TYPE TYPE TYPE", fused, flags, ROUND="rn rz rm rp", TYPE="f64")
    define("fma.rn[.relu].TYPE", ">TYPE TYPE TYPE TYPE", fused, flags, TYPE=HALVES)
    divide = "elementwise<Divide, {TYPE}, 2>"
    define("div.HOW[.ftz].TYPE", ">TYPE TYPE TYPE", divide, flags, HOW="full approx rn", TYPE="f32")
    define("div.rn.TYPE", ">TYPE TYPE TYPE", divide, flags, TYPE="f64")
    for name, operation in (("min", "Minimum"), ("max", "Maximum")):
        of_two, of_three = f"elementwise<{operation}, {{TYPE}}, 2>", f"elementwise<{operation}OfThree, {{TYPE}}, 3>"
        define(f"{name}[.ftz][.NaN].TYPE", ">TYPE TYPE TYPE", of_two, flags, TYPE="f32")
        define(f"{name}[.ftz][.NaN].TYPE", ">TYPE TYPE TYPE TYPE", of_three, flags, TYPE="f32")
        define(f"{name}.TYPE", ">TYPE TYPE TYPE", of_two, flags, TYPE="f64")
        define(f"{name}[.NaN].TYPE", ">TYPE TYPE TYPE", of_two, flags, TYPE=HALVES)
    for name, operation in (("neg", "NegateFloat"), ("abs", "Absolute")):
        function = f"elementwise<{operation}, {{TYPE}}, 1>"
        define(f"{name}[.ftz].TYPE", ">TYPE TYPE", function, flags, TYPE="f32")
        define(f"{name}.TYPE", ">TYPE TYPE", function, flags, TYPE=f"f64 {HALVES}")
    define("copysign.TYPE", ">TYPE TYPE TYPE", "elementwise<CopySign, {TYPE}, 2>", flags, TYPE="f32 f64")


def _functions() -> None:
    """Approximations are computed as exactly as the C library does: a GPU's differ in the last bits."""
    approximate = {"ex2": "PowerOfTwo", "lg2": "Logarithm", "sin": "Sine", "cos": "Cosine"}
    for name, operation in (approximate | {"rsqrt": "ReciprocalSquareRoot"}).items():
        define(f"{name}.approx[.ftz].TYPE", ">TYPE TYPE", f"elementwise<{operation}, {{TYPE}}, 1>", flags, TYPE="f32")
    for name, operation in (("rcp", "Reciprocal"), ("sqrt", "SquareRoot")):
        function = f"elementwise<{operation}, {{TYPE}}, 1>"
        define(f"{name}.HOW[.ftz].TYPE", ">TYPE TYPE", function, flags, HOW="approx rn", TYPE="f32")
        define(f"{name}.rn.TYPE", ">TYPE TYPE", function, flags, TYPE="f64")
    define("ex2.approx.TYPE", ">TYPE TYPE", "elementwise<PowerOfTwo, {TYPE}, 1>", flags, TYPE="f16 f16x2")
    define(
        "ex2.approx.ftz.TYPE", ">TYPE TYPE", "elementwise<PowerOfTwo, {TYPE}, 1>", lambda _: (1,), TYPE="bf16 bf16x2"
    )
    tangent = "elementwise<HyperbolicTangent, {TYPE}, 1>"
    define("tanh.approx.TYPE", ">TYPE TYPE", tangent, flags, TYPE=f"f32 {HALVES}")


_COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINATIONS = ("", "and", "or", "xor")


def _comparison(choices: Choices) -> list[int]:
    name = choices["COMPARE"]
    combination = _COMBINATIONS.index(choices.get("COMBINE", ""))
    return [_COMPARISONS.index(_UNSIGNED_NAMES.get(name, name)), combination, *flags(choices)]


def _comparisons() -> None:
    integer, unsigned = "eq ne lt le gt ge", "eq ne lt le gt ge lo ls hi hs"
    kinds = ((unsigned, "u16 u32 u64", ""), (integer, "s16 s32 s64", ""), ("eq ne", "b16 b32 b64", ""),
             (" ".join(_COMPARISONS), "f32", "[.ftz]"), (" ".join(_COMPARISONS), "f64 f16 bf16", ""))  # fmt: skip
    for comparisons, types, flush in kinds:
        function, slots = "set_predicate<{TYPE}>", {"COMPARE": comparisons, "TYPE": types}
        define(f"setp.COMPARE{flush}.TYPE", ">pred|pred TYPE TYPE -", function, _comparison, **slots)
        slots["COMBINE"] = "and or xor"
        define(f"setp.COMPARE.COMBINE{flush}.TYPE", ">pred|pred TYPE TYPE pred", function, _comparison, **slots)
    types = "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64"
    define("selp.TYPE", ">TYPE TYPE TYPE pred", "select<{TYPE}>", TYPE=types)


_integers()
_floats()
_functions()
_comparisons()
