"""Which of several kernels of one meaning is the fastest on this GPU: timed when a shape is first seen, remembered.

`fastest` is for the bodies of custom ops. Choices are kept in memory and in one JSON file for each kind of GPU, set of
versions and our kernels' sources, under MMKERNELS_CACHE, else $XDG_CACHE_HOME/mmkernels, else ~/.cache/mmkernels. The
variants differ in their last bits, so it is the remembered choice that makes a rerun bit-identical. `python -m
mmkernels` shows them. What `mmkernels.known_choices` leaves out is neither timed nor, since it never runs, compiled.
Compiled kernels are Triton's to keep, in TRITON_CACHE_DIR, else ~/.triton/cache.

MMKERNELS_VARIANT="temporal_attention=cuda,other_op=triton" forces variants by op, for debugging: nothing is timed.
MMKERNELS_TIME_ALL=1 times what `mmkernels.known_choices` leaves out as well, for another reading.
The logger "mmkernels" says at level INFO what is timed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from mmkernels.allocator import uncounted
from mmkernels.files import atomic_write
from mmkernels.known_choices import worth_timing

Variant = Callable[[], None]
Clock = Callable[[Variant, int], float]  # milliseconds that this many calls took together

# Bytes of an output that variants are timed on: enough to fill a GPU, little beside what a step takes.
SAMPLE_BYTES = 1 << 26
NUM_ROUNDS = 7
LEAST_ROUNDS = 3  # before a variant is given up: a median of three bears one odd time
GIVEN_UP = 1.25  # a variant whose best time is so many times the median of the fastest is not timed any more
LEAST_SAMPLE_MS = 1.0  # calls are repeated up to this: one short kernel would time its own launch
MOST_REPEATS = 50
PACKAGES = ("torch", "triton")
OUT_OF_MEMORY = "out of memory"  # in what torch and CUDA say
_LOG = logging.getLogger("mmkernels")


class NotOfferedError(ValueError):
    """MMKERNELS_VARIANT forces a variant that the op does not offer for this shape."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for one op and key: median milliseconds of each variant, and why others were left out."""

    op: str
    key: str
    chosen: str
    times_ms: Mapping[str, float]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_lasting(self) -> bool:
        """Whether a later process would choose the same: what lacked memory may have room then, and is tried again."""
        return not any(map(_lacked_memory, self.left_out.values()))

    def __str__(self) -> str:
        times = [f"{name} {ms:.3f} ms" for name, ms in sorted(self.times_ms.items(), key=lambda item: item[1])]
        reasons = [f"{name} left out: {reason}" for name, reason in self.left_out.items()]
        return f"{self.op} {self.key}: {self.chosen} ({'; '.join([*times, *reasons])})"


class Tuner:
    """The choices of one kind of GPU, in memory and in `path`; `clock` takes the times, `scratch` is open meanwhile."""

    def __init__(
        self, path: Path, machine: Mapping[str, str], clock: Clock,
        scratch: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        self.path, self.machine, self.clock, self.scratch = path, dict(machine), clock, scratch
        self.choices = {where: choice for where, choice in _read(path, self.machine).items() if choice.is_lasting}
        self.num_timed = 0
        self._names: dict[tuple[str, Hashable], str] = {}
        self._lock = threading.Lock()  # autograd runs backward in a thread of its own

    def fastest(self, op: str, key: tuple[Hashable, ...], variants: Mapping[str, Variant], kind: str = "") -> str:
        """The name of the fastest variant; timed where this op, key and set of variants were not seen before.

        kind: of work, as `known_choices` names it. Raises RuntimeError where every variant raises, with the reasons:
        torch.OutOfMemoryError where one of them lacked memory, which a run that is fitted to its device bears.
        """
        name = self._names.get((op, key))
        if name is not None and name in variants:
            return name
        names = worth_timing(op, kind, self.machine["capability"], list(variants))
        if len(names) == 1:
            return names[0]
        variants = {name: variants[name] for name in names}
        with self._lock:
            choice = self.choices.get((op, repr(key)))
            if choice is None or {*choice.times_ms, *choice.left_out} != set(variants):
                self.num_timed += 1
                _LOG.info("timing %s %s: %s (shape %d of this run)", op, _words(key), ", ".join(names), self.num_timed)
                with self.scratch():
                    choice = self._choose(op, repr(key), variants)
                self.choices[op, choice.key] = choice
                self._write()
            self._names[op, key] = choice.chosen
        return choice.chosen

    def _choose(self, op: str, key: str, variants: Mapping[str, Variant]) -> Choice:
        left_out: dict[str, str] = {}

        def sample(name: str, repeats: int) -> float | None:
            try:
                return self.clock(variants[name], repeats) / repeats
            except Exception as error:  # whatever a kernel, its compiler or the driver raises is its reason
                left_out[name] = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
                warnings.warn(f"mmkernels: {op} {key}: {name} is left out: {left_out[name]}", stacklevel=5)
                return None

        repeats: dict[str, int] = {}
        for name in variants:
            # The first call compiles and warms up, the second says how long one takes.
            if sample(name, 1) is not None and (once_ms := sample(name, 1)) is not None:
                repeats[name] = min(MOST_REPEATS, max(1, round(LEAST_SAMPLE_MS / max(once_ms, 1e-6))))
        times_ms: dict[str, list[float]] = {name: [] for name in repeats}
        names = list(repeats)
        for index in range(NUM_ROUNDS):
            turn = index % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                if (ms := sample(name, repeats[name])) is not None:
                    times_ms[name].append(ms)
            names = [name for name in names if name not in left_out]
            if index + 1 >= LEAST_ROUNDS and names:
                limit_ms = GIVEN_UP * min(statistics.median(times_ms[name]) for name in names)
                names = [name for name in names if min(times_ms[name]) <= limit_ms]
            if len(names) <= 1:
                break
        medians = {name: statistics.median(times_ms[name]) for name in repeats if name not in left_out}
        if not medians:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in left_out.items())
            lacks_memory = any(map(_lacked_memory, left_out.values()))
            raise (torch.OutOfMemoryError if lacks_memory else RuntimeError)(
                f"mmkernels: every variant of {op} {key} failed on {self.machine['device']}:{reasons}"
            )
        return Choice(op=op, key=key, chosen=min(medians, key=medians.__getitem__), times_ms=medians, left_out=left_out)

    def _write(self) -> None:
        """Replace the file whole, with what other processes have added since it was read."""
        others = _read(self.path, self.machine)
        choices = [dataclasses.asdict(choice) for choice in (others | self.choices).values()]
        text = json.dumps({"machine": self.machine, "choices": choices}, indent=1) + "\n"
        try:
            with atomic_write(self.path) as unfinished:
                unfinished.write_text(text)
        except OSError as error:
            warnings.warn(f"mmkernels: kernel choices are not remembered past this process: {error}", stacklevel=4)


def _lacked_memory(reason: str) -> bool:
    return OUT_OF_MEMORY in reason


def _read(path: Path, machine: Mapping[str, str] | None) -> dict[tuple[str, str], Choice]:
    """The choices in a file; none, with a warning that names it, where it is damaged or of another machine."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        if machine is not None and content["machine"] != machine:
            raise ValueError(f"it is of {content['machine']}, this machine is {dict(machine)}")
        choices = [Choice(**row) for row in content["choices"]]
        for choice in choices:
            if not isinstance(choice.left_out, dict) or not isinstance(choice.times_ms[choice.chosen], float):
                raise ValueError(f"{choice.op} {choice.key} is not a choice with its times")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"mmkernels: {path} is ignored and will be replaced: {reason}", stacklevel=2)
        return {}
    return {(choice.op, choice.key): choice for choice in choices}


def fastest(
    op: str, key: tuple[Hashable, ...], variants: Mapping[str, Variant], device: torch.device, kind: str = ""
) -> str:
    """The name of the variant of `op` to run for `key` (shapes, dtype, ...) on `device`.

    variants: name -> a call that runs it on scratch outputs, of SAMPLE_BYTES about; every call must do the same work.
    kind: of work, as `known_choices` names it. One variant, and any on the CPU, is returned untimed: the first. On CUDA
    what `known_choices` decides is, else the fastest by events, timed when first seen. Raises
    NotOfferedError for a forced variant that is not offered, RuntimeError where all fail, inside a trace, and where a
    CUDA graph is being captured before the shape was seen.
    """
    if not variants:
        raise ValueError(f"{op} {key} offers no variant, wanted at least one; check its why_unsupported first")
    if torch.compiler.is_compiling():
        raise RuntimeError(f"mmkernels: {op} asks for the fastest kernel inside a trace; ask in the custom op's body")
    first = next(iter(variants))
    if device.type != "cuda":
        return first
    if (name := forced(op)) is not None:
        if name not in variants:
            raise NotOfferedError(f"MMKERNELS_VARIANT has {op}={name}, wanted {' or '.join(variants)} for {key}")
        return name
    if len(variants) == 1:
        return first
    if os.environ.get("MMKERNELS_TIME_ALL"):
        kind = ""
    with torch.cuda.device(device):
        return _tuner(torch.cuda.current_device()).fastest(op, key, variants, kind)


def forced(op: str) -> str | None:
    """The variant that MMKERNELS_VARIANT names for an op."""
    return _forced(os.environ.get("MMKERNELS_VARIANT", "")).get(op)


@cache
def _forced(text: str) -> dict[str, str]:
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if any(not (op and name) for op, _, name in pairs):
        raise ValueError(f"MMKERNELS_VARIANT is {text!r}, wanted op=variant,op=variant")
    return {op: name for op, _, name in pairs}


def folder() -> Path:
    """Where choices are kept between runs."""
    if own := os.environ.get("MMKERNELS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkernels"


def stored(where: Path | None = None) -> dict[str, list[Choice]]:
    """Every choice on disk, in `where` or else in `folder()`, by GPU and versions."""
    found: dict[str, list[Choice]] = {}
    for path in sorted((where or folder()).glob("variants-*.json")):
        if choices := _read(path, None):
            machine = json.loads(path.read_text())["machine"]
            found[", ".join(f"{name} {value}" for name, value in machine.items())] = list(choices.values())
    return found


@cache
def _tuner(index: int) -> Tuner:
    """The tuner of the GPU with this number; one for all GPUs of a kind."""
    properties = torch.cuda.get_device_properties(index)
    machine = {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    for package in PACKAGES:
        try:
            machine[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return _tuner_of((*machine.items(), ("kernels", kernels_digest())))


@cache
def kernels_digest() -> str:
    """Names the sources of our kernels and the native module: a change of either may change what is fastest."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("ops/*.py"), *here.glob("kernels/**/*.py"), *here.glob("_native*")]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


@cache
def _tuner_of(machine: tuple[tuple[str, str], ...]) -> Tuner:
    digest = hashlib.sha256(repr(machine).encode()).hexdigest()[:12]
    return Tuner(folder() / f"variants-{digest}.json", dict(machine), _cuda_ms, _returned_scratch)


@contextmanager
def _returned_scratch() -> Iterator[None]:
    """What torch's allocator takes from the driver inside goes back, so that neither peak nor cache holds it."""
    reserved_bytes = torch.cuda.memory_reserved()
    try:
        yield
    finally:
        if torch.cuda.memory_reserved() > reserved_bytes:
            torch.cuda.empty_cache()


def _words(key: tuple[Hashable, ...]) -> str:
    """A key for people: its numbers by x."""
    first, *rest = map(str, key) if key else ("",)
    return f"{first} {'x'.join(rest)}"


def _cuda_ms(variant: Variant, repeats: int) -> float:
    """Milliseconds between CUDA events around the calls, on the current stream."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel cannot be timed while a CUDA graph is captured; run the step once before capture")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with uncounted():
        start.record()
        for _ in range(repeats):
            variant()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)
