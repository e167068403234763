"""The table of words in CONTRIBUTING.md: what it retires is no name in the code any more."""

from __future__ import annotations

import io
import re
import tokenize

from places import ROOT


def retired() -> dict[str, set[str]]:
    """By package, the names that the table's last column rules out there."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Words")[1].split("##")[0]
    rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("|")][2:]
    assert len(rows) >= 15 and all(len(row) == 3 for row in rows)
    places = {"the trainer": "mimicmotion", "benches": "bench", "mmkernels": "mmkernels", "": ""}
    found: dict[str, set[str]] = {package: set() for package in ("mmkernels", "bench", "mimicmotion", "")}
    for *_, last in rows:
        for group in last.split(";"):
            names, _, place = group.strip().partition(" in ")
            found[places[place]] |= set(re.findall(r"`(\w+)`", names))
    everywhere = found.pop("")
    assert {"card_of", "dinner"} <= everywhere and {"way", "trace_way"} <= found["mmkernels"]
    assert found["bench"] == {"way", "ways"} and found["mimicmotion"] == {"Placement", "clean"}
    return {package: names | everywhere for package, names in found.items()}


def names_of(text: str) -> set[str]:
    """Names in a module; words of its strings and comments are none."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def test_no_name_is_a_retired_word() -> None:
    assert names_of("card_of(x)  # dinner\n") == {"card_of", "x"}
    found = {
        str(path.relative_to(ROOT)): names
        for package, words in retired().items()
        for path in sorted((ROOT / package).rglob("*.py"))
        if (names := words & names_of(path.read_text()))
    }
    assert found == {}
