"""Executes an entry of PTX on CPU tensors: argument block, grid, checks, counts."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ptxrun.assembler import Assembled, assemble
from ptxrun.building import runtime
from ptxrun.parser import parse
from ptxrun.syntax import LANES, Parameter

SHARED_RACES, GLOBAL_RACES, BOUNDS, COUNTS = 1, 2, 4, 8
ALL_CHECKS = SHARED_RACES | GLOBAL_RACES | BOUNDS | COUNTS

Mutation = Callable[[str], str]


class FaultError(RuntimeError):
    """The program did what it may not: a race, an access out of bounds, a deadlock; names block, warp and line."""


@dataclass
class Counts:
    """What a launch did, over all blocks.

    Loads, stores, mma, barriers and async_copies are instructions of a warp; sectors are of 32 bytes; waves are passes
    over the banks of shared memory, conflicts those past the fewest possible; mma_products are multiply-adds. executed
    and lanes count each instruction's name, by warps and by active threads.
    """

    global_loads: int = 0
    global_load_sectors: int = 0
    global_load_bytes: int = 0
    global_stores: int = 0
    global_store_sectors: int = 0
    global_store_bytes: int = 0
    shared_loads: int = 0
    shared_load_waves: int = 0
    shared_load_conflicts: int = 0
    shared_stores: int = 0
    shared_store_waves: int = 0
    shared_store_conflicts: int = 0
    mma: int = 0
    mma_products: int = 0
    barriers: int = 0
    async_copies: int = 0
    executed: Counter[str] = field(default_factory=Counter)
    lanes: Counter[str] = field(default_factory=Counter)

    @property
    def sectors(self) -> int:
        """32-byte sectors of global memory, loaded and stored."""
        return self.global_load_sectors + self.global_store_sectors

    @property
    def bank_conflicts(self) -> int:
        """Passes over the banks of shared memory past the fewest possible."""
        return self.shared_load_conflicts + self.shared_store_conflicts


_NUMBERS = tuple(x.name for x in fields(Counts) if x.type == "int")


class _Counts(ctypes.Structure):
    """As in runtime/machine.h, which has the same fields in the same order."""

    _fields_ = [(name, ctypes.c_uint64) for name in _NUMBERS]


class _Launch(ctypes.Structure):
    """As in runtime/launch.h."""

    _fields_ = [
        ("instructions", ctypes.c_void_p), ("arguments", ctypes.c_void_p), ("num_instructions", ctypes.c_uint64),
        ("parameters", ctypes.c_void_p), ("parameter_bytes", ctypes.c_uint64),
        ("constants", ctypes.c_void_p), ("num_constants", ctypes.c_uint64), ("register_bytes", ctypes.c_uint64),
        ("shared_bytes", ctypes.c_uint64), ("dynamic_shared_bytes", ctypes.c_uint64), ("local_bytes", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32 * 3),
        ("blocks", ctypes.c_void_p), ("num_blocks", ctypes.c_uint64),
        ("buffers", ctypes.c_void_p), ("num_buffers", ctypes.c_uint64),
        ("order", ctypes.c_int64), ("flags", ctypes.c_int32), ("num_warps", ctypes.c_int32),
        ("counts", ctypes.c_void_p), ("executed", ctypes.c_void_p), ("lanes", ctypes.c_void_p),
    ]  # fmt: skip


def launch_ptx(
    ptx_text: str,
    entry: str | None,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    args: Sequence[Any],
    *,
    order: int = 0,
    flags: int = ALL_CHECKS,
    mutate: Mutation | None = None,
    blocks: Iterable[int] | None = None,
    buffers: Sequence[Any] = (),
) -> Counts:
    """Run an entry (None: the only one) on CPU tensors, in place.

    shared_bytes is the dynamic shared memory. args: tensors (as pointers), int, float, bytes (a struct), None (zeros).
    order: 0 warps forward, 1 in reverse, else shuffled by that seed. mutate changes the text first. blocks: run only
    these numbers of the grid. buffers: tensors that the program reaches without their being arguments.
    Raises FaultError where a check fires, UnsupportedError where the text holds what ptxrun does not know.
    """
    assembled = _assembled(mutate(ptx_text) if mutate else ptx_text, entry)
    grid_3, block_3 = ((*sizes, 1, 1)[:3] for sizes in (tuple(grid), tuple(block)))
    parameters, spans = _pack(assembled, args)
    spans += [_span(tensor) for tensor in buffers]
    for name, data in assembled.module_data.items():
        ctypes.memmove(data, assembled.program.module_data[name], len(data))
        spans.append((ctypes.addressof(data), ctypes.addressof(data) + len(data)))
    spans = sorted(set(spans))
    numbers = range(grid_3[0] * grid_3[1] * grid_3[2]) if blocks is None else tuple(blocks)
    size, raw_counts = len(assembled.rows) // 5, _Counts()
    executed, lanes = _array([0] * size), _array([0] * size)
    rows, arguments = _array(assembled.rows), _array(assembled.arguments)
    constants = _array(x for pair in assembled.constants.items() for x in pair)
    block_numbers, bounds = _array(numbers), _array(x for span in spans for x in span)
    address = ctypes.addressof
    launch = _Launch(
        address(rows), address(arguments), size, address(parameters), len(parameters),
        address(constants), len(assembled.constants), assembled.program.register_bytes,
        assembled.static_shared_bytes + shared_bytes, shared_bytes, assembled.program.local_bytes,
        (ctypes.c_uint32 * 3)(*grid_3), (ctypes.c_uint32 * 3)(*block_3),
        address(block_numbers), len(numbers), address(bounds), len(spans),
        order, flags, -(-block_3[0] * block_3[1] * block_3[2] // LANES),
        address(raw_counts), address(executed), address(lanes),
    )  # fmt: skip
    message = ctypes.create_string_buffer(512)
    if runtime().ptxrun_run(ctypes.byref(launch), message):
        raise FaultError(message.value.decode())
    counts = Counts(**{name: getattr(raw_counts, name) for name in _NUMBERS})
    for instruction, warps, threads in zip(assembled.program.instructions, executed, lanes, strict=False):
        name = instruction.opcode.split(".")[0]
        counts.executed[name] += warps
        counts.lanes[name] += threads
    return counts


@functools.lru_cache(maxsize=64)
def _assembled(text: str, entry: str | None) -> Assembled:
    return assemble(parse(text, entry))


def _pack(assembled: Assembled, args: Sequence[Any]) -> tuple[Any, list[tuple[int, int]]]:
    """The parameter block, and the memory that tensors among the arguments span."""
    parameters = assembled.program.parameters
    if len(args) != len(parameters):
        raise ValueError(f"got {len(args)} arguments, {assembled.program.entry} takes {len(parameters)}: pass as many")
    block = (ctypes.c_char * assembled.program.parameter_bytes)()
    spans = []
    for parameter, value in zip(parameters, args, strict=True):
        if hasattr(value, "data_ptr"):
            spans.append(_span(value))
        block[parameter.offset : parameter.offset + parameter.num_bytes] = _packed(parameter, value)
    return block, spans


def _packed(parameter: Parameter, value: Any) -> bytes:
    size = parameter.num_bytes
    if value is None:
        return bytes(size)
    if isinstance(value, bytes):
        packed = value
    elif isinstance(value, float):
        packed = struct.pack({4: "<f", 8: "<d"}[size], value)
    else:
        number = value.data_ptr() if hasattr(value, "data_ptr") else int(value)
        packed = (number & (256**size - 1)).to_bytes(size, "little")
    if len(packed) != size:
        raise ValueError(f"got {len(packed)} bytes for {parameter.name}, which takes {size}: pass that many")
    return packed


def _span(tensor: Any) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _array(values: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    """64-bit numbers in memory; one at least, so that it has an address."""
    numbers = [value - 2**64 if value >= 2**63 else value for value in values] or [0]
    return (ctypes.c_int64 * len(numbers))(*numbers)
