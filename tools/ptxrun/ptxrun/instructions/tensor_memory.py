"""Tensor memory, its products, and the barriers in shared memory that they arrive at (sm_100a).

PTX ISA, "TensorCore 5th Generation Family Instructions", "Parallel Synchronization": mbarrier.
"""

from ptxrun.forms import define


def _moves() -> None:
    """Of 32 lanes of tensor memory `count` columns; of 16, twice as many: the shapes of 128 and 64 rows."""
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        shape = f"sync.aligned.32x32b.x{count}.b32"
        define(f"tcgen05.ld.{shape}", f">{{b32*{count}}} @ -", "load_tensor_later")
        define(f"tcgen05.st.{shape}", f"@ - {{b32*{count}}}", "store_tensor_later")
        shape = f"sync.aligned.16x32bx2.x{count}.b32"
        define(f"tcgen05.ld.{shape}", f">{{b32*{count}}} @ #", "load_tensor_later")
        define(f"tcgen05.st.{shape}", f"@ # {{b32*{count}}}", "store_tensor_later")
    define("tcgen05.wait::ld.sync.aligned", "", "wait_for_tensor_loads")
    define("tcgen05.wait::st.sync.aligned", "", "wait_for_tensor_stores")


define("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", "@ u32", "allocate_tensor_memory")
define("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", "", "ignore")
define("tcgen05.dealloc.cta_group::1.sync.aligned.b32", "u32 u32", "free_tensor_memory")
_moves()
define("tcgen05.mma.cta_group::1.kind::f16", "@ b64 b64 u32 pred", "multiply_tensors_later<false>")
define("tcgen05.mma.cta_group::1.kind::f16", "@ @ b64 u32 pred", "multiply_tensors_later<true>")
define("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64", "@", "commit_tensor_products")
define("mbarrier.init[.SPACE].b64", "@ u32", "make_memory_barrier", SPACE="shared shared::cta")
define("mbarrier.inval[.SPACE].b64", "@", "end_memory_barrier", SPACE="shared shared::cta")
define("mbarrier.try_wait.parity[.SPACE].b64", ">pred @ u32", "wait_at_memory_barrier", SPACE="shared shared::cta")
