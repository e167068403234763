"""Logic, shifts and bit fields. PTX ISA, "Logic and Shift Instructions", "Integer Arithmetic Instructions"."""

from ptxrun.forms import define, no_flags

for _name, _operation in (("and", "And"), ("or", "Or"), ("xor", "ExclusiveOr")):
    _function = f"elementwise<{_operation}, {{TYPE}}, 2>"
    define(f"{_name}.TYPE", ">TYPE TYPE TYPE", _function, no_flags, TYPE="b16 b32 b64")
    define(f"{_name}.pred", ">pred pred pred", f"combine_predicates<{_operation}>")
define("not.TYPE", ">TYPE TYPE", "elementwise<Not, {TYPE}, 1>", no_flags, TYPE="b16 b32 b64")
define("not.pred", ">pred pred -", "combine_predicates<Not>")
define("shl.TYPE", ">TYPE TYPE u32", "shift<{TYPE}, true>", TYPE="b16 b32 b64")
define("shr.TYPE", ">TYPE TYPE u32", "shift<{TYPE}, false>", TYPE="b16 b32 b64 u16 u32 u64 s16 s32 s64")
define("shf.l.wrap.b32", ">b32 b32 b32 u32", "funnel_shift<true, false>")
define("shf.r.wrap.b32", ">b32 b32 b32 u32", "funnel_shift<false, false>")
define("shf.l.clamp.b32", ">b32 b32 b32 u32", "funnel_shift<true, true>")
define("shf.r.clamp.b32", ">b32 b32 b32 u32", "funnel_shift<false, true>")
define("bfe.TYPE", ">TYPE TYPE u32 u32", "extract_field<{TYPE}>", TYPE="u32 s32 u64 s64")
define("bfi.TYPE", ">TYPE TYPE TYPE u32 u32", "insert_field<{TYPE}>", TYPE="b32 b64")
define("prmt.b32", ">b32 b32 b32 b32", "permute_bytes")
define("lop3.b32", ">b32 b32 b32 b32 #", "logic_of_three")
define("popc.TYPE", ">u32 TYPE", "count_bits<{TYPE}, ONES>", TYPE="b32 b64")
define("clz.TYPE", ">u32 TYPE", "count_bits<{TYPE}, LEADING_ZEROS>", TYPE="b32 b64")
define("brev.TYPE", ">TYPE TYPE", "reverse_bits<{TYPE}>", TYPE="b32 b64")
