"""Moves and conversions. PTX ISA, "Data Movement and Conversion Instructions": mov, cvt."""

from ptxrun.forms import Choices, define, no_flags

_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")
_INTEGER_ROUNDINGS = ("", "rni", "rzi", "rmi", "rpi")
_INTEGERS = "u8 s8 u16 s16 u32 s32 u64 s64"
_DIRECTED = "rn rz rm rp"


def _convert(choices: Choices) -> list[int]:
    """Rounding, rounding to an integer, flags: as runtime/bits.h reads them."""
    rounding, flag_bits = choices.get("ROUND", ""), {"sat": 2, "relu": 4}
    is_integer = rounding in _INTEGER_ROUNDINGS
    return [
        0 if is_integer else _ROUNDINGS.index(rounding),
        _INTEGER_ROUNDINGS.index(rounding) if is_integer else 0,
        sum(bit for name, bit in flag_bits.items() if choices.get(name)),
    ]


def _pair(choices: Choices) -> list[int]:
    rounding, _, flag_bits = _convert(choices)
    return [rounding, flag_bits]


def _rows() -> None:
    function = "convert<{TO}, {FROM}>"

    def cvt(template: str, **slots: str) -> None:
        define(f"cvt{template}.TO.FROM", ">~TO ~FROM", function, _convert, **slots)

    cvt("[.sat]", TO=_INTEGERS, FROM=_INTEGERS)
    cvt(".ROUND[.sat]", ROUND="rni rzi rmi rpi", TO=_INTEGERS, FROM="f16 bf16 f32 f64")
    cvt(".ROUND", ROUND=_DIRECTED, TO="f32 f64", FROM=_INTEGERS)
    cvt(".ROUND", ROUND="rn rz", TO="f16", FROM=_INTEGERS)
    cvt(".ROUND", ROUND="rn rz", TO="bf16", FROM=_INTEGERS)
    cvt("[.sat]", TO="f32", FROM="f16 bf16 f32")
    cvt(".ROUND[.sat]", ROUND="rni rzi rmi rpi", TO="f32", FROM="f32")
    cvt("", TO="f64", FROM="f16 bf16 f32 f64")
    cvt(".ROUND", ROUND="rni rzi rmi rpi", TO="f64", FROM="f64")
    cvt("", TO="f16", FROM="f16")
    cvt(".ROUND", ROUND="rni rzi rmi rpi", TO="f16", FROM="f16")
    cvt(".ROUND[.sat]", ROUND=_DIRECTED, TO="f32", FROM="f64")
    cvt(".ROUND[.sat]", ROUND="rn rz", TO="f16", FROM="f64")
    cvt(".ROUND[.relu]", ROUND="rn rz", TO="f16 bf16", FROM="f32")
    pair = "convert_pair<{HALF}>"
    for half in ("f16", "bf16"):
        template = f"cvt.ROUND[.relu].{half}x2.f32"
        define(template, ">b32 f32 f32", pair.format(HALF=half), _pair, ROUND="rn rz")
    define("cvt.ROUND.tf32.f32", ">b32 f32", "convert_to_tf32", lambda x: _pair(x)[:1], ROUND="rn rna")


_rows()

_MOVES = "b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64"
define("mov.TYPE", ">TYPE TYPE", "elementwise<Copy, {TYPE}, 1>", no_flags, TYPE=_MOVES)
define("mov.pred", ">pred pred -", "combine_predicates<Copy>")
for _parts, _types in ((2, "b32 b64"), (4, "b64")):
    for _type in _types.split():
        _part_bits = int(_type[1:]) // _parts
        define(f"mov.{_type}", f">{_type} {{b{_part_bits}*{_parts}}}", "pack", lambda _, bits=_part_bits: (bits,))
        define(f"mov.{_type}", f">{{b{_part_bits}*{_parts}}} {_type}", "unpack", lambda _, bits=_part_bits: (bits,))
