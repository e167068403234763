"""Ways to break a program, as `mutate` of a launch: a test that still passes with one of them proves nothing.

Each takes the number of the place, counted from 0 in the order of the text. ValueError where there is none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from ptxrun.launching import Mutation


def replaced(pattern: str, change: Callable[[re.Match[str]], str], number: int = 0) -> Mutation:
    """Change one match of a regular expression."""

    def mutate(text: str) -> str:
        found = list(re.finditer(pattern, text))
        if number >= len(found):
            raise ValueError(f"got {len(found)} places like {pattern}, wanted number {number}: mutate another program")
        match = found[number]
        return text[: match.start()] + change(match) + text[match.end() :]

    return mutate


def without(beginning: str, number: int = 0) -> Mutation:
    """Take a statement that begins like this regular expression out."""
    return replaced(rf"{beginning}[^;]*;", lambda match: "", number)


def without_barrier(number: int = 0, together: int = 1) -> Mutation:
    """Take a barrier of the block out, or several that follow each other."""
    once = without(r"\bbar(?:rier)?(?:\.cta)?\.sync\b", number)
    return lambda text: functools.reduce(lambda broken, _: once(broken), range(together), text)


def looser_wait(number: int = 0) -> Mutation:
    """Let a wait for asynchronous copies or products leave one more group pending."""
    wait = r"(\b(?:cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned)\s+)(\d+)"
    return replaced(wait, lambda match: f"{match[1]}{int(match[2]) + 1}", number)


def without_fence(number: int = 0) -> Mutation:
    """Take a fence before an asynchronous product out: of memory, fence.proxy.async, or of registers, wgmma.fence."""
    return without(r"\b(?:fence\.proxy\.async|wgmma\.fence)\b", number)


def shifted_comparison(number: int = 0, by: int = 1) -> Mutation:
    """Shift the constant that an integer is compared with: a mask that is off by some."""
    comparison = r"(\bsetp\.\w+\.[us](?:16|32|64)\s+[^;]*,\s*)(-?\d+)(?=\s*;)"
    return replaced(comparison, lambda match: f"{match[1]}{int(match[2]) + by}", number)


def num_barriers(text: str) -> int:
    """Places that `without_barrier` can take."""
    return len(re.findall(r"\bbar(?:rier)?(?:\.cta)?\.sync\b", text))
