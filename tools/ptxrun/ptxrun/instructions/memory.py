"""Memory. PTX ISA, "Data Movement and Conversion Instructions", "Parallel Synchronization": atom, red, fences."""

from ptxrun.forms import Choices, define, no_numbers

_TYPES = "b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64"
_SPACES = {"": 0, "global": 1, "shared": 2, "shared::cta": 2, "local": 3, "const": 4, "param": 5}
_ORDER = {"SEMANTICS": "weak volatile relaxed acquire", "SCOPE": "cta gpu sys cluster"}
_EVICT = "L1::evict_normal L1::evict_first L1::evict_last L1::evict_unchanged L1::no_allocate"
_PREFETCH = "L2::64B L2::128B L2::256B"
_BYTES = {"8": "u8", "16": "u16", "32": "u32", "64": "u64"}


def _bits(type_: str) -> str:
    return type_.lstrip("busf")


def _load(choices: Choices) -> list[int]:
    """Space, is signed: as runtime/memory.h reads them."""
    return [_SPACES[choices.get("SPACE", "")], int(choices["TYPE"].startswith("s"))]


def _space(choices: Choices) -> list[int]:
    return [_SPACES[choices.get("SPACE", "")]]


def _loads_and_stores() -> None:
    spaces = "global shared shared::cta local const param"
    for bits, element in _BYTES.items():
        types = " ".join(x for x in _TYPES.split() if _bits(x) == bits)
        slots = {"TYPE": types, "VEC": "v2 v4 v8" if bits == "32" else "v2 v4", "EVICT": _EVICT, "PREFETCH": _PREFETCH}
        ordered = slots | _ORDER | {"SPACE": spaces, "CACHE": "ca cg cs lu cv"}
        head, tail = "ld[.SEMANTICS][.SCOPE][.SPACE][.CACHE][.EVICT]", "[.PREFETCH][.VEC].TYPE"
        define(f"{head}{tail}", ">{TYPE} @", f"load<{element}>", _load, **ordered)
        define(f"{head}.L2::cache_hint{tail}", ">{TYPE} @ !b64", f"load<{element}>", _load, **ordered)
        cached = slots | {"SPACE": "global", "CACHE": "ca cg cs"}
        define(f"ld.SPACE[.CACHE].nc[.EVICT]{tail}", ">{TYPE} @", f"load<{element}>", _load, **cached)
        hinted = f"ld.SPACE[.CACHE].nc[.EVICT].L2::cache_hint{tail}"
        define(hinted, ">{TYPE} @ !b64", f"load<{element}>", _load, **cached)
        stored = ordered | {"SPACE": "global shared shared::cta local", "CACHE": "wb cg cs wt"}
        stored["SEMANTICS"] = "weak volatile relaxed release"
        del stored["PREFETCH"]
        head, tail = "st[.SEMANTICS][.SCOPE][.SPACE][.CACHE][.EVICT]", "[.VEC].TYPE"
        define(f"{head}{tail}", "@ {TYPE}", f"store<{element}>", _space, **stored)
        define(f"{head}.L2::cache_hint{tail}", "@ {TYPE} !b64", f"store<{element}>", _space, **stored)


def _addresses() -> None:
    spaces = "global shared shared::cta local const"
    define("cvta[.SPACE].u64", ">u64 u64", "convert_address", lambda x: [*_space(x), 1], SPACE=spaces)
    define("cvta.to[.SPACE].u64", ">u64 u64", "convert_address", lambda x: [*_space(x), 0], SPACE=spaces)
    define("isspacep.SPACE", ">pred u64", "is_in_space", _space, SPACE="global shared shared::cta local")


def _hints_and_fences() -> None:
    define("prefetch[.SPACE].LEVEL", "@", "ignore", SPACE="global local", LEVEL="L1 L2")
    define("prefetch.global.LEVEL", "@", "ignore", LEVEL="L2::evict_last L2::evict_normal")
    define("prefetchu.L1", "@", "ignore")
    define("createpolicy.fractional.PRIMARY.b64", ">b64", "make_policy", PRIMARY="L2::evict_last L2::evict_first")
    define("createpolicy.fractional.PRIMARY.b64", ">b64 !f32", "make_policy", PRIMARY="L2::evict_last L2::evict_first")
    define("membar.SCOPE", "", "ignore", SCOPE="cta gl sys")
    define("fence[.SEMANTICS].SCOPE", "", "ignore", SEMANTICS="sc acq_rel", SCOPE="cta gpu sys cluster")
    define("fence.proxy.async[.SPACE]", "", "fence_proxy", SPACE="global shared::cta shared::cluster")
    define("griddepcontrol.WHAT", "", "ignore", WHAT="wait launch_dependents")
    define("nanosleep.u32", "!u32", "ignore")


def _async_copies() -> None:
    slots = {"SPACE": "shared shared::cta", "CACHE": "ca cg", "PREFETCH": _PREFETCH}
    template = "cp.async.CACHE.SPACE.global{}[.PREFETCH]"
    for hint, policy in (("", ""), (".L2::cache_hint", " !b64")):
        opcode = template.format(hint)
        define(opcode, f"@ @ # - -{policy}", "copy_async", no_numbers, **slots)
        define(opcode, f"@ @ # u32 -{policy}", "copy_async", no_numbers, **slots)
        define(opcode, f"@ @ # - pred{policy}", "copy_async", no_numbers, **slots)
    define("cp.async.commit_group", "", "commit_copies")
    define("cp.async.wait_group", "#", "wait_group")
    define("cp.async.wait_all", "", "wait_all")


def _atomics() -> None:
    slots = {"SEMANTICS": "relaxed acquire release acq_rel", "SCOPE": "cta gpu sys"}
    slots["SPACE"] = "global shared shared::cta"
    rows = (("add", "Add", "u32 s32 u64 f32 f64"), ("min", "Minimum", "u32 s32 u64 s64"),
            ("max", "Maximum", "u32 s32 u64 s64"), ("and", "And", "b32 b64"), ("or", "Or", "b32 b64"),
            ("xor", "ExclusiveOr", "b32 b64"), ("inc", "Increment", "u32"), ("dec", "Decrement", "u32"))  # fmt: skip
    for name, operation, types in rows:
        opcode, function = f"[.SEMANTICS][.SCOPE][.SPACE].{name}.TYPE", f"atomic<{operation}, {{TYPE}}>"
        define(f"atom{opcode}", ">TYPE @ TYPE -", function, _space, **slots, TYPE=types)
        define(f"red{opcode}", "- @ TYPE -", function, _space, **slots, TYPE=types)
    opcode = "atom[.SEMANTICS][.SCOPE][.SPACE].{}.TYPE"
    define(opcode.format("exch"), ">TYPE @ TYPE -", "atomic<Exchange, {TYPE}>", _space, **slots, TYPE="b32 b64")
    define(opcode.format("cas"), ">TYPE @ TYPE TYPE", "atomic<CompareAndSwap, {TYPE}>", _space, **slots, TYPE="b32 b64")


_loads_and_stores()
_addresses()
_hints_and_fences()
_async_copies()
_atomics()
