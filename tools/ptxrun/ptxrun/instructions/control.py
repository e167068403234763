"""Control flow, barriers, and exchange between lanes. PTX ISA, "Control Flow", "Parallel Synchronization"."""

from ptxrun.forms import define

_SHUFFLES = ("up", "down", "bfly", "idx")
_VOTES = ("all", "any", "uni")

define("bra[.uni]", ":", "branch")
define("ret[.uni]", "", "leave")
define("exit", "", "leave")
define("trap", "", "trap")
for _name in ("bar", "barrier[.cta]"):
    _aligned = "" if _name == "bar" else "[.aligned]"
    for _threads in ("-", "u32"):
        define(f"{_name}.sync{_aligned}", f"u32 {_threads}", "arrive", lambda _: (1,))
    define(f"{_name}.arrive{_aligned}", "u32 u32", "arrive", lambda _: (0,))
define("bar.warp.sync", "u32", "synchronize_warp")
define(
    "shfl.sync.MODE.b32", ">b32|pred b32 u32 u32 u32", "shuffle", lambda x: [_SHUFFLES.index(x["MODE"])],
    MODE="up down bfly idx",
)  # fmt: skip
define("vote.sync.MODE.pred", ">pred pred u32", "vote", lambda x: [_VOTES.index(x["MODE"])], MODE="all any uni")
define("vote.sync.ballot.b32", ">b32 pred u32", "vote", lambda _: (3,))
define("activemask.b32", ">b32", "active_lanes")
define("elect.sync", ">b32|pred u32", "elect")
for _name, _operation in (("add", "Add"), ("min", "Minimum"), ("max", "Maximum")):
    define(f"redux.sync.{_name}.TYPE", ">TYPE TYPE u32", f"reduce<{_operation}, {{TYPE}}>", TYPE="u32 s32")
for _name, _operation in (("min", "Minimum"), ("max", "Maximum")):
    define(f"redux.sync.{_name}.TYPE", ">TYPE TYPE u32", f"reduce<{_operation}, {{TYPE}}>", TYPE="f32")
for _name, _operation in (("and", "And"), ("or", "Or"), ("xor", "ExclusiveOr")):
    define(f"redux.sync.{_name}.b32", ">b32 b32 u32", f"reduce<{_operation}, b32>")
