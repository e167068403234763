"""Matrix instructions of a warp. PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions"."""

from ptxrun.forms import Choices, define


def _products() -> None:
    """Rows: depth, operand type, accumulator, registers of d (and c), a and b."""
    rows = (
        (16, "bf16", "f32", 4, 4, 2),
        (16, "f16", "f32", 4, 4, 2),
        (16, "f16", "f16", 2, 4, 2),
        (8, "bf16", "f32", 4, 2, 1),
        (8, "f16", "f32", 4, 2, 1),
        (8, "f16", "f16", 2, 2, 1),
        (8, "tf32", "f32", 4, 4, 2),
        (4, "tf32", "f32", 4, 2, 1),
    )
    for depth, operand, total, num_d, num_a, num_b in rows:
        opcode = f"mma.sync.aligned.m16n8k{depth}.row.col.{total}.{operand}.{operand}.{total}"
        vectors = f">{{b32*{num_d}}} {{b32*{num_a}}} {{b32*{num_b}}} {{b32*{num_d}}}"
        define(opcode, vectors, f"multiply_matrices<{operand}, {depth}, {total}>")


def _is_transposed(choices: Choices) -> list[int]:
    return [int(choices["trans"] != "")]


_products()
for _count in (1, 2, 4):
    _slots = {"SPACE": "shared shared::cta"}
    _opcode = f"matrix.sync.aligned.m8n8.x{_count}[.trans].SPACE.b16"
    define(f"ld{_opcode}", f">{{b32*{_count}}} @", "move_tiles<false>", _is_transposed, **_slots)
    define(f"st{_opcode}", f"@ {{b32*{_count}}}", "move_tiles<true>", _is_transposed, **_slots)
define("movmatrix.sync.aligned.m8n8.trans.b16", ">b32 b32", "transpose_tile")
