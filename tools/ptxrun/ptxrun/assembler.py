"""A parsed program to what the runtime executes: function numbers and references, by the registry of forms."""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ptxrun import instructions
from ptxrun.forms import FORMS, Choices, Form
from ptxrun.syntax import (
    WIDTH_BITS,
    Address,
    Immediate,
    Instruction,
    Operand,
    Pair,
    Program,
    Register,
    Symbol,
    UnsupportedError,
    Vector,
    width_code,
)

__all__ = ["Assembled", "assemble", "find_forms", "functions", "instructions"]

_ENDS_BLOCK = ("bra", "ret", "exit", "bar", "barrier")
_VECTOR = re.compile(r"\{(\w+)(?:\*(\d+))?\}")


class _MismatchError(Exception):
    """An operand is not what a form's word asks for."""


@functools.cache
def functions() -> tuple[str, ...]:
    """Every C++ function of the registry; an instruction holds its number in this order."""
    return tuple(sorted({name for form in FORMS for name in form.functions()}))


@functools.cache
def _function_numbers() -> dict[str, int]:
    return {name: number for number, name in enumerate(functions())}


@functools.cache
def find_forms(opcode: str, num_operands: int) -> list[tuple[Form, Choices]]:
    """The forms of that spelling and number of operands, with the choice in each slot."""
    named = (form for form in FORMS if form.name == opcode.split(".")[0] and form.num_operands == num_operands)
    return [(form, choices) for form in named if (choices := form.match(opcode)) is not None]


@dataclass(frozen=True)
class Assembled:
    """Rows of five numbers (function, line, guard, ends block, first argument), arguments, constants by reference."""

    program: Program
    rows: list[int]
    arguments: list[int]
    constants: dict[int, int]
    register_bytes: int
    static_shared_bytes: int
    module_data: dict[str, ctypes.Array[ctypes.c_char]]


def assemble(program: Program) -> Assembled:
    """Look every instruction up in the registry. UnsupportedError names the line where one is not there."""
    return _Assembler(program).assembled()


class _Assembler:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: dict[tuple[int, int], Register] = {}
        self.module_data = {name: ctypes.create_string_buffer(x, len(x)) for name, x in program.module_data.items()}
        align = 128 if program.dynamic_shared else 1
        self.static_shared_bytes = -(-program.shared_bytes // align) * align

    def assembled(self) -> Assembled:
        rows, arguments = [], []
        # Whoever runs past the end meets a trap.
        end = Instruction("trap", (), None, 0, "end of the program")
        targets = set(self.program.labels.values())
        for number, instruction in enumerate([*self.program.instructions, end]):
            function, encoded = self._encode(instruction)
            ends_block = number + 1 in targets or instruction.opcode.split(".")[0] in _ENDS_BLOCK
            guard = instruction.guard.reference if instruction.guard else -1
            rows += [function, instruction.line, guard, int(ends_block), len(arguments)]
            arguments += encoded
        constants = {register.reference: bits for (_, bits), register in self.constants.items()}
        return Assembled(
            self.program, rows, arguments, constants, self.program.register_bytes,
            self.static_shared_bytes, self.module_data,
        )  # fmt: skip

    def _encode(self, instruction: Instruction) -> tuple[int, list[int]]:
        reasons = []
        for form, choices in find_forms(instruction.opcode, len(instruction.operands)):
            try:
                encoded = list(self._arguments(form, choices, instruction.operands))
            except _MismatchError as mismatch:
                reasons.append(str(mismatch))
            else:
                return _function_numbers()[form.run_by(choices)], encoded
        why = "; ".join(reasons) or f"no form {instruction.opcode} with {len(instruction.operands)} operands"
        raise UnsupportedError(f"line {instruction.line}: {instruction.text}: {why}")

    def _arguments(self, form: Form, choices: Choices, operands: Iterable[Operand]) -> Iterable[int]:
        left, vectors = iter(operands), []
        for word in form.operands:
            if word == "-":
                yield -1
            elif "{" in word:
                vectors += self._vector(word, choices, next(left))
            else:
                yield from self._fixed(word, choices, next(left))
        yield from form.numbers(choices)
        yield from vectors

    def _fixed(self, word: str, choices: Choices, operand: Operand) -> Iterable[int]:
        """References and numbers of one operand that is no vector."""
        if word == "@":
            if not isinstance(operand, Address):
                raise _MismatchError(f"wanted an address, got {operand}")
            yield self._source("~b32", operand.base)
            yield operand.offset
        elif word == "#":
            if not isinstance(operand, Immediate):
                raise _MismatchError(f"wanted a number, got {operand}")
            yield operand.bits
        elif word == ":":
            if not isinstance(operand, Symbol) or operand.name not in self.program.labels:
                raise _MismatchError(f"wanted a label, got {operand}")
            yield self.program.labels[operand.name]
        elif word.startswith(">"):
            yield from self._destinations(word[1:], choices, operand)
        else:
            ignored, word = word.startswith("!"), word.removeprefix("!")
            reference = self._source(_resolve(word, choices), operand)
            if not ignored:
                yield reference

    def _vector(self, word: str, choices: Choices, operand: Operand) -> list[int]:
        match = _VECTOR.fullmatch(word.removeprefix(">"))
        assert match is not None, word
        type_ = choices.get(match[1], match[1])
        elements = operand.elements if isinstance(operand, Vector) else (operand,)
        wanted = int(match[2] or (choices.get("VEC") or "v1")[1:])
        if len(elements) != wanted:
            raise _MismatchError(f"wanted a vector of {wanted}, got {len(elements)}")
        read = self._element if word.startswith(">") else self._source
        return [len(elements), *(read(f"~{type_}", x) for x in elements)]

    def _destinations(self, word: str, choices: Choices, operand: Operand) -> Iterable[int]:
        first, _, second = word.partition("|")
        if not second:
            yield self._destination(_resolve(first, choices), operand)
            return
        pair = operand if isinstance(operand, Pair) else Pair(operand, Symbol("_"))
        yield self._destination(_resolve(first, choices), pair.first, may_sink=True)
        yield self._destination(_resolve(second, choices), pair.second, may_sink=True)

    def _element(self, type_: str, operand: Operand) -> int:
        """A destination within a vector; what is written to the sink goes to a register that nobody reads."""
        if operand == Symbol("_"):
            return self.program.new_register("_", width_code(type_.removeprefix("~"))).reference
        return self._destination(type_, operand)

    def _destination(self, type_: str, operand: Operand, may_sink: bool = False) -> int:
        if may_sink and operand == Symbol("_"):
            return -1
        if not isinstance(operand, Register) or operand.is_negated:
            raise _MismatchError(f"wanted a register to write to, got {operand}")
        return _checked(type_, operand)

    def _source(self, type_: str, operand: Operand) -> int:
        if isinstance(operand, Register):
            if operand.is_negated and operand.code != width_code("pred"):
                raise _MismatchError(f"got {operand.name} negated, which is no predicate")
            return _checked(type_, operand)
        plain = type_.removeprefix("~")
        if isinstance(operand, Immediate):
            return self._constant(width_code(plain), _bits(operand, plain)).reference
        if isinstance(operand, Symbol):
            return self._constant(width_code("b64" if type_.startswith("~") else plain), self._value(operand)).reference
        raise _MismatchError(f"wanted a value, got {operand}")

    def _constant(self, code: int, bits: int) -> Register:
        key = (code, bits)
        if key not in self.constants:
            self.constants[key] = self.program.new_register(f"constant {bits:#x}", code)
        return self.constants[key]

    def _value(self, symbol: Symbol) -> int:
        """An offset in shared memory, local memory or the parameters, or the address of a variable of the module."""
        name, program = symbol.name, self.program
        if name == program.dynamic_shared:
            return self.static_shared_bytes
        offsets = program.shared | program.local | {x.name: x.offset for x in program.parameters}
        if name in offsets:
            return offsets[name]
        if name in self.module_data:
            return ctypes.addressof(self.module_data[name])
        raise _MismatchError(f"no variable called {name}")


def _resolve(word: str, choices: Choices) -> str:
    mark = "~" if word.startswith("~") else ""
    name = word.removeprefix("~")
    return mark + choices.get(name, name)


def _checked(type_: str, register: Register) -> int:
    """The register's reference, where its width is right for the type: exactly, or at least after ~."""
    code, plain = register.code, type_.removeprefix("~")
    is_right = code == width_code(plain) or (type_.startswith("~") and code != 3 and code > width_code(plain))
    if not is_right:
        raise _MismatchError(f"{register.name} is not of the width of {type_}")
    return register.reference


def _bits(immediate: Immediate, type_: str) -> int:
    """The number's bits as that type: floats written as decimals or of another width are converted."""
    if type_ == "pred":
        return 0xFFFFFFFF if immediate.bits else 0
    width = WIDTH_BITS[type_]
    if immediate.float_type is None:
        return immediate.bits & (2**width - 1)
    if WIDTH_BITS[immediate.float_type] == width:
        return immediate.bits
    formats = {"f32": ("<I", "<f"), "f64": ("<Q", "<d")}
    if type_ not in formats:
        raise _MismatchError(f"a float where {type_} is wanted")
    integer, number = formats[immediate.float_type]
    value = struct.unpack(number, struct.pack(integer, immediate.bits))[0]
    integer, number = formats[type_]
    return struct.unpack(integer, struct.pack(number, value))[0]
