"""PTX text to a `Program`: one entry, its declarations and its instructions. Grammar: PTX ISA, "Syntax"."""

from __future__ import annotations

import bisect
import dataclasses
import re
import struct

from ptxrun.syntax import (
    SPECIAL_REGISTERS,
    WIDTH_BITS,
    Address,
    Immediate,
    Instruction,
    Operand,
    Pair,
    Parameter,
    Program,
    Register,
    Symbol,
    UnsupportedError,
    Vector,
    width_code,
)

_VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+)?(?:\.visible\s+|\.weak\s+)?\.(?P<space>shared|local|global|const)\s+"
    r"(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?P<array>\[(?P<count>\d*)\])?(?:\s*=\s*\{?(?P<values>[^{}]*)\}?)?\s*;?",
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)(?:\s+\.ptr[\w\s.]*?)?\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d+)\])?",
)
_SKIPPED = re.compile(r"\.(?:loc|file)\b[^\n]*|\.pragma\b[^;\n]*;")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_ENTRY = r"\.entry\s+(?P<name>%s)\s*(?=[({])"


def parse(text: str, entry: str | None = None) -> Program:
    """The entry of that name, or the only one. UnsupportedError where the text holds what ptxrun does not know."""
    text = _without_comments(text)
    found = list(re.finditer(_ENTRY % (re.escape(entry) if entry else r"[\w$]+"), text))
    if len(found) != 1:
        names = re.findall(_ENTRY % r"[\w$]+", text)
        raise ValueError(f"got {len(found)} entries called {entry or 'anything'}, wanted one: name one of {names}")
    return _Parser(text, found[0]).program


def _without_comments(text: str) -> str:
    """Blanks in the place of comments, so that lines keep their numbers."""
    blank = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    return blank.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def split(text: str) -> list[str]:
    """Parts between commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


class _Parser:
    """Walks through one entry; `scopes` holds the registers of the blocks in braces around the current place."""

    def __init__(self, text: str, entry: re.Match[str]) -> None:
        self.text = text
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.program = Program(entry["name"])
        self.scopes: list[dict[str, Register]] = []
        # Of the same blocks: names for the labels in them, and the number of the first instruction.
        self.labels: list[tuple[dict[str, str], int]] = []
        special = enumerate(SPECIAL_REGISTERS)
        self.special = {f"%{name}": Register(name, 128 * number, width_code("b32")) for number, name in special}
        start = text.index("{", entry.end())
        head = text[entry.end() : start]
        if head.lstrip().startswith("("):
            self._parameters(head[head.index("(") + 1 : head.index(")")])
        for match in _VARIABLE.finditer(text[: entry.start()]):
            self._variable(match, self._line(match.start()))
        self._body(start)

    def _line(self, position: int) -> int:
        return bisect.bisect_left(self.newlines, position) + 1

    def _parameters(self, text: str) -> None:
        offset = 0
        for declaration in split(text):
            match = _PARAMETER.fullmatch(declaration)
            if match is None:
                raise UnsupportedError(f"parameter {declaration}")
            element = WIDTH_BITS[match["type"]] // 8
            num_bytes, align = element * int(match["count"] or 1), int(match["align"] or element)
            offset = -(-offset // align) * align
            self.program.parameters.append(Parameter(match["name"], offset, num_bytes))
            offset += num_bytes

    def _variable(self, match: re.Match[str], line: int) -> None:
        program, name = self.program, match["name"]
        element, align = WIDTH_BITS[match["type"]] // 8, int(match["align"] or WIDTH_BITS[match["type"]] // 8)
        is_open = match["array"] is not None and not match["count"]
        num_bytes = 0 if is_open else element * int(match["count"] or 1)
        if match["space"] == "shared" and is_open:
            program.dynamic_shared = name
        elif match["space"] == "shared":
            program.shared[name] = -(-program.shared_bytes // align) * align
            program.shared_bytes = program.shared[name] + num_bytes
        elif match["space"] == "local":
            program.local[name] = -(-program.local_bytes // align) * align
            program.local_bytes = -(-(program.local[name] + num_bytes) // 16) * 16
        else:
            values = split(match["values"] or "")
            if is_open or not all(re.fullmatch(r"-?(0x)?[0-9a-fA-F]+U?", x) for x in values):
                raise UnsupportedError(f"line {line}: {match.group()}")
            numbers = (int(x.rstrip("U"), 0) & (256**element - 1) for x in values)
            data = b"".join(x.to_bytes(element, "little") for x in numbers)
            program.module_data[name] = data.ljust(num_bytes, b"\0")

    def _body(self, position: int) -> None:
        text = self.text
        while True:
            while text[position].isspace():
                position += 1
            if text[position] == "{":
                self.scopes.append({})
                self.labels.append(({}, len(self.program.instructions)))
                position += 1
            elif text[position] == "}":
                self.scopes.pop()
                self._end_labels()
                position += 1
                if not self.scopes:
                    return
            elif match := _SKIPPED.match(text, position):
                position = match.end()
            elif match := _LABEL.match(text, position):
                self._label(match[1], self._line(position))
                position = match.end()
            else:
                end = text.index(";", position)
                self._statement(" ".join(text[position:end].split()), self._line(position))
                position = end + 1

    def _label(self, name: str, line: int) -> None:
        """A label of an inner block is known there only, so that another block may have one of the same name."""
        unique = name if len(self.scopes) == 1 else f"{name} of line {line}"
        self.labels[-1][0][name] = unique
        self.program.labels[unique] = len(self.program.instructions)

    def _end_labels(self) -> None:
        """Let the branches of a block that ends go to its own labels."""
        names, first = self.labels.pop()
        instructions = self.program.instructions
        for number in range(first, len(instructions) if names else first):
            operands = instructions[number].operands
            named = tuple(Symbol(names.get(x.name, x.name)) if isinstance(x, Symbol) else x for x in operands)
            instructions[number] = dataclasses.replace(instructions[number], operands=named)

    def _statement(self, text: str, line: int) -> None:
        if match := re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text):
            self._registers(match[1], match[2], line)
        elif match := _VARIABLE.fullmatch(text):
            self._variable(match, line)
        elif match := re.fullmatch(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text):
            guard = self._operand(match[1] + match[2], line) if match[2] else None
            if guard is not None and not isinstance(guard, Register):
                raise UnsupportedError(f"line {line}: {text}: its guard is no register")
            operands = tuple(self._operand(x, line) for x in split(match[4]))
            self.program.instructions.append(Instruction(match[3], operands, guard, line, text))
        elif text:
            raise UnsupportedError(f"line {line}: {text}")

    def _registers(self, type_: str, names: str, line: int) -> None:
        if type_ not in WIDTH_BITS:
            raise UnsupportedError(f"line {line}: registers of type .{type_}")
        for name in split(names):
            ranged = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            expanded = [f"{ranged[1]}{number}" for number in range(int(ranged[2]))] if ranged else [name]
            for each in expanded:
                self.scopes[-1][each] = self.program.new_register(each, width_code(type_))

    def _operand(self, text: str, line: int) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(x, line) for x in split(text[1:-1])))
        if text.startswith("["):
            match = re.fullmatch(r"(.+?)\s*(?:\+\s*(-?\w+))?", text[1:-1].strip())
            assert match is not None
            return Address(self._operand(match[1], line), int(match[2] or "0", 0))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip(), line), self._operand(second.strip(), line))
        name = text.removeprefix("!").strip()
        for scope in reversed(self.scopes):
            if register := scope.get(name):
                return Register(name, register.offset, register.code, text.startswith("!"))
        if name in self.special:
            return self.special[name]
        if name.startswith("%"):
            raise UnsupportedError(f"line {line}: register {name}")
        return _number(text) or Symbol(text)


def _number(text: str) -> Immediate | None:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Immediate(int(match[1], 16), "f32")
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match[1], 16), "f64")
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
        return Immediate(int.from_bytes(struct.pack("<d", float(text)), "little"), "f64")
    if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return None
