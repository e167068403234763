"""Asynchronous matrix products of four warps (sm_90a). PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"."""

from ptxrun.forms import define


def _products() -> None:
    """D of 64 x columns in registers, A of 64 x 16 there or in shared memory, B of 16 x columns in shared memory."""
    for columns in range(8, 257, 8):
        for type_ in ("bf16", "f16"):
            opcode = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{type_}.{type_}"
            total, function = f">{{b32*{columns // 2}}}", f"multiply_later<{type_}>"
            numbers = (columns,)
            define(opcode, f"{total} b64 b64 pred # # # #", function, lambda _, numbers=numbers: numbers)
            define(opcode, f"{total} {{b32*4}} - b64 pred # # - #", function, lambda _, numbers=numbers: numbers)


_products()
define("wgmma.fence.sync.aligned", "", "fence_registers")
define("wgmma.commit_group.sync.aligned", "", "commit_products")
define("wgmma.wait_group.sync.aligned", "#", "wait_for_products")
