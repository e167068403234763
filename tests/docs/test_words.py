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
    found = {"mmkernels": set(), "bench": set(), "mimicmotion": set()}
    for *_, last in rows:
        names = re.findall(r"`(\w+)`", last)
        for package, where in (("mmkernels", None), ("bench", " in benches"), ("mimicmotion", " in the trainer")):
            if " in " not in last or (where is not None and last.rstrip().endswith(where)):
                found[package] |= set(names)
    assert {"card_of", "dinner"} <= found["mmkernels"] == found["bench"] & found["mimicmotion"]
    assert found["bench"] - found["mmkernels"] == {"way", "ways"}
    assert found["mimicmotion"] - found["mmkernels"] == {"Placement", "clean"}
    return found


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
