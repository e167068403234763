"""The registry of instructions: each form says how an opcode is spelled, which operands it takes, and what runs it.

A form's template is the opcode with slots, `add[.ROUND][.ftz].TYPE`: a name in capitals takes one of the choices given
for it, brackets make a part optional, the rest is literal. Nothing else is accepted, so a modifier that changes a
result can never be passed over. A form's operands are words:

    T     a source of exactly the width of T: register, number or symbol. T is a PTX type or the name of a slot
    >T    a destination of that width        >T|U  two of them, p|q; the second may be missing, either may be `_`
    ~T    a source in a register of any width that holds T
    @     an address                         #     a number known when the program is written
    {T}   registers of any width that hold T, one or as many as slot VEC says; >{T} destinations; {T*4} four of them
    :     the label that a branch goes to
    !T    a source that is checked and then ignored: a cache policy
    -     no operand: the runtime finds -1

The runtime finds the fixed operands in this order, then `numbers`, then each vector after its length.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Choices = Mapping[str, str]
_PART = re.compile(r"\[\.([\w:]+)\]|\.([\w:]+)")


@dataclass(frozen=True)
class Form:
    """One row of the registry; `function` is the C++ that runs it, with slots in braces."""

    template: str
    operands: tuple[str, ...]
    function: str
    numbers: Callable[[Choices], Iterable[int]]
    slots: Mapping[str, tuple[str, ...]] = field(hash=False)  # of every part that may vary, the choices

    @property
    def name(self) -> str:
        """The instruction, without modifiers."""
        return self.template.split(".")[0].split("[")[0]

    @property
    def num_operands(self) -> int:
        """Operands in the text."""
        return sum(word != "-" for word in self.operands)

    def match(self, opcode: str) -> dict[str, str] | None:
        """The choice in each slot, or None where the opcode is spelled in another way."""
        found = self.pattern.fullmatch(opcode)
        if found is None:
            return None
        return {name: found[f"_{number}"] or "" for number, name in enumerate(self.slots)}

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """The spellings, a group for each slot."""
        numbers = {name: number for number, name in enumerate(self.slots)}

        def part(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            if name not in self.slots:
                return re.escape(f".{name}")
            choices = "|".join(re.escape(x) for x in self.slots[name] if x)
            return rf"(?:\.(?P<_{numbers[name]}>{choices})){'?' if match[1] else ''}"

        return re.compile(_PART.sub(part, self.template))

    def run_by(self, choices: Choices) -> str:
        """The C++ function for these choices."""
        return re.sub(r"\bb(8|16|32|64)\b", r"u\1", self.function.format(**choices))

    def functions(self) -> set[str]:
        """Every C++ function that the form may need."""
        used = [name for name in self.slots if f"{{{name}}}" in self.function]
        products = itertools.product(*(self.slots[name] for name in used))
        return {self.run_by(dict(zip(used, choices, strict=True))) for choices in products}


FORMS: list[Form] = []


def no_numbers(_: Choices) -> list[int]:
    """Of an instruction that only reads operands."""
    return []


def no_flags(_: Choices) -> list[int]:
    """Of arithmetic without modifiers."""
    return [0]


def define(
    template: str,
    operands: str,
    function: str,
    numbers: Callable[[Choices], Iterable[int]] = no_numbers,
    **slots: str,
) -> None:
    """Add a form to the registry; each slot's choices are words."""
    choices = {name: tuple(words.split()) for name, words in slots.items()}
    for optional, _ in _PART.findall(template):
        if optional:
            choices[optional] = ("", *choices.get(optional, (optional,)))
    FORMS.append(Form(template, tuple(operands.split()), function, numbers, choices))


def flags(choices: Choices) -> list[int]:
    """The modifiers of arithmetic in one number, as runtime/arithmetic.h reads them."""
    rounding = {"": 0, "rn": 0, "rz": 1, "rm": 2, "rp": 3}[choices.get("ROUND", "")]
    bits = {"ftz": 1, "sat": 2, "relu": 4, "NaN": 8}
    return [sum(bit for name, bit in bits.items() if choices.get(name)) + (rounding << 4)]
