"""Who computes a call: each backend's reason why it does not, and one choice among the rest.

A family's backends stand in `mmkernels.kernels.registry`. Among those that take a call, what decides is, in this order:
MMKERNELS_VARIANT, a reading that `mmkernels.known_choices` knows, the clock of a GPU (`mmkernels.tuning`), the order of
the registry. What a modelled run asks for is decided without a clock. A walk over chunks asks inside of `asked_once`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

from mmkernels import tuning
from mmkernels.costs import device_of, is_noting
from mmkernels.kernels.call import Call
from mmkernels.kernels.registry import FAMILIES, FORMULA, Backend
from mmkernels.known_choices import worth_timing

# What a walk over chunks has found, by what was asked; of each thread, since backward has threads of its own.
_asked: ContextVar[dict[Any, Any] | None] = ContextVar("asked", default=None)


def reasons(call: Call) -> dict[str, str | None]:
    """Why each backend of the call's family does not take it; None where it does. Of the formula: never."""
    return {name: backend.why_unsupported(call) for name, backend in FAMILIES[call.op].items() if name != FORMULA}


def why_nobody(call: Call) -> str | None:
    """Every kernel's reason in one line where none takes the call, or None. Plain torch computes it then."""
    found = reasons(call)
    if any(why is None for why in found.values()):  # torch 2.6 compiles no `in` of values
        return None
    # The reasons of backends for this device; of those for others only that there is none for this one.
    own = [str(why) for name, why in found.items() if FAMILIES[call.op][name].device in ("", call.device)]
    return "; ".join(dict.fromkeys(own)) or f"no kernel for device {call.device}"


def takers(call: Call) -> list[str]:
    """The backends that take a call, in the registry's order; the formula where none does, or ValueError without it."""
    able = [name for name, reason in reasons(call).items() if reason is None]
    if not able and FORMULA not in FAMILIES[call.op]:
        raise ValueError(f"nothing computes {call.op}: {why_nobody(call)}")
    return able or [FORMULA]


def preferred(call: Call) -> str:
    """The backend that a call is given to where nothing is timed: what readings of timings say, else the first."""
    return _candidates(call, takers(call))[0]


def _candidates(call: Call, able: list[str]) -> list[str]:
    if len(able) == 1:
        return able
    if (name := tuning.forced(call.op)) in able:
        return [str(name)]
    return worth_timing(call.op, call.work, "{}.{}".format(*call.capability), able)


def named(call: Call) -> str:
    """Who computes a call, for people: a backend, those that will be timed, or plain torch and why no kernel does."""
    if (why := why_nobody(call)) is not None:
        return f"plain torch ({why})"
    names = _candidates(call, takers(call))
    return names[0] if call.is_modelled or call.device != "cuda" else " or ".join(names)


def dispatch(call: Call, x: Tensor, trial: Callable[[Any], None] | None = None) -> Any:
    """The backend, a module, that computes a call.

    trial: runs one on scratch, to be timed where several take the call on a GPU; without it nothing is timed.
    Raises ValueError where none takes it, and as `mmkernels.tuning.fastest`.
    """
    backends, able = FAMILIES[call.op], takers(call)
    is_forced = tuning.forced(call.op) is not None
    if trial is None or is_noting() or (not is_forced and (call.is_modelled or len(able) == 1)):
        return backends[_candidates(call, able)[0]].loaded
    trials = {name: partial(_try, trial, backends[name]) for name in able}
    return backends[tuning.fastest(call.op, call.key, trials, device_of(x), call.work)].loaded


def _try(trial: Callable[[Any], None], backend: Backend) -> None:
    trial(backend.loaded)


@contextmanager
def asked_once() -> Iterator[None]:
    """Inside, a walk over chunks, those that lie alike are described once: all but the last, which may be shorter."""
    token = _asked.set({})
    try:
        yield
    finally:
        _asked.reset(token)


def chosen(
    call_of: Callable[..., Call], x: Tensor, *others: Any, trial: Callable[[Any], None] | None = None, **named: Any
) -> Any:
    """`dispatch` for the call that `call_of` makes of x and the rest."""
    known = _asked.get()
    if known is None:
        return dispatch(call_of(x, *others, **named), x, trial)
    asked = (x, *others, *named.values())
    key = (call_of, *[_layout(value) if isinstance(value, Tensor) else value for value in asked])
    if key not in known:
        known[key] = dispatch(call_of(x, *others, **named), x, trial)
    return known[key]


def _layout(x: Tensor) -> tuple[Any, ...]:
    """What a description may depend on; of where x begins only whether that is at whole 16 bytes."""
    return x.shape, x.stride(), x.dtype, x.storage_offset() % 16
