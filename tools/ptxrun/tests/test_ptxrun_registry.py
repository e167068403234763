"""Every instruction that ptxrun accepts has a test, and what it does not know is an error with its line."""

from __future__ import annotations

import ptx_registry as registry
import ptxrun
import pytest
import test_ptxrun_arithmetic
import test_ptxrun_bits
import test_ptxrun_control
import test_ptxrun_matrix
import test_ptxrun_memory
import test_ptxrun_tensor_memory
import test_ptxrun_warpgroup
from ptxrun.assembler import find_forms
from ptxrun.forms import FORMS, Form, define

MODULES = (
    test_ptxrun_arithmetic,
    test_ptxrun_bits,
    test_ptxrun_control,
    test_ptxrun_matrix,
    test_ptxrun_memory,
    test_ptxrun_tensor_memory,
    test_ptxrun_warpgroup,
)
# Instructions of which a test runs every form in every choice; opcodes that a test spells out.
BY_CHOICE = {name for module in MODULES for name in module.TESTED}
AS_TYPED = {opcode for module in MODULES for opcode in getattr(module, "TESTED_AS_TYPED", ())}


def without_test(form: Form) -> list[str]:
    if form.name in BY_CHOICE:
        return []
    return [opcode for opcode, _ in registry.each_choice(form) if opcode not in AS_TYPED]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.template} {len(form.operands)}")
def test_every_form_has_a_test(form: Form) -> None:
    assert without_test(form) == []


def test_a_form_without_test_is_seen() -> None:
    define("dp4a.u32.u32", ">u32 b32 b32 u32", "")
    find_forms.cache_clear()
    try:
        assert without_test(FORMS[-1]) == ["dp4a.u32.u32"]
    finally:
        FORMS.pop()
        find_forms.cache_clear()


def test_tested_instructions_exist() -> None:
    assert {form.name for form in FORMS} >= BY_CHOICE
    assert {opcode for form in FORMS for opcode, _ in registry.each_choice(form)} >= AS_TYPED


def test_forms_do_not_overlap() -> None:
    """An opcode with a number of operands is one form's, or of forms that differ in the operands' kinds."""
    for form in FORMS:
        for opcode, _ in registry.each_choice(form):
            found = [x for x, _ in find_forms(opcode, form.num_operands)]
            assert len({x.operands for x in found}) == len(found), opcode


@pytest.mark.parametrize(
    "statement",
    [
        "dp4a.u32.u32 %r0, %r1, %r2, %r3",
        "add.s32 %r0, %r1",
        "add.s32 %r0, %r1, %r2, %r3",
        "add.cc.s32 %r0, %r1, %r2",
        "add.s32 %d0, %r1, %r2",
        "add.s32 %r0, %h1, %r2",
        "add.s32 1, %r1, %r2",
        "add.rn.sat.ftz.f32 %r0, %r1, %r2",
        "mov.b32 %r0, {%h0, %h1, %h2}",
        "ld.global.v2.b32 %r0, [%d0]",
        "ld.global.v4.b32 {%r0, %r1}, [%d0]",
        "ld.global.L3::evict_last.b32 %r0, [%d0]",
        "st.shared.b32 %r0, [%r1]",
        "mov.u64 %d0, nothing",
        "mov.u32 %r0, %clock",
        "bra nowhere",
        "@%r0 add.s32 %r0, %r1",
        "not.pred %r0, %p1",
        "tcgen05.cp.cta_group::1.128x256b [%r0], %d0",
        "call f",
        ".branchtargets",
    ],
)
def test_unknown_is_an_error(statement: str) -> None:
    text = registry.program(f"  mov.u32 %r1, 0;\n  {statement};\n")
    line = text[: text.index(statement)].count("\n") + 1
    with pytest.raises(ptxrun.UnsupportedError, match=rf"line {line}: "):
        registry.run(text, [], 1)


def test_entry_is_chosen_by_name() -> None:
    both = registry.program("") + registry.program("").replace("test", "other")
    with pytest.raises(ValueError, match=r"name one of \['test', 'other'\]"):
        ptxrun.launch_ptx(both, None, (1,), (32,), 0, [0, 0])
    ptxrun.launch_ptx(both, "other", (1,), (32,), 0, [0, 0])
    with pytest.raises(ValueError, match="got 1 arguments, test takes 2"):
        ptxrun.launch_ptx(both, "test", (1,), (32,), 0, [0])
