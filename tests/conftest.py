"""What every test needs: the same random numbers each time, and for the tests of ops the device that they run on.

`pytest -m op --device cuda` runs every op's tests on the GPU. An op's test module says `pytestmark = pytest.mark.op`;
tensors and modules it makes are then made on the device, and `device` names it where a test must know. There float32
means float32 and the same input gives the same bits, as on a CPU: see `exact_libraries`.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from matplotlib.figure import Figure
from stand_in_device import StandInDevice
from unrendered import savefig

from mmkernels import tuning


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the tests marked `op` run; default: cpu"
    )
    parser.addoption(
        "--draws", default=0, type=int, help="other random numbers for each N: a test that holds for 0 alone is chance"
    )


# The files that take longest, longest first: the workers of `make test` begin with these and so end together.
LONGEST = (
    "test_readme", "test_cuda_route", "test_dry_run", "test_trainer", "test_lora_training", "test_sharding",
    "test_faults", "test_native", "test_frames_group", "test_memory_plan", "test_plan", "test_memory_report",
    "test_fitting", "test_app", "test_wrapped", "test_frames", "test_buckets", "test_verification", "test_lost_ranks",
    "test_planned_ranks", "test_distributed", "test_precision", "test_stopping", "test_ray_engine", "test_replacement",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files in LONGEST first, in that order."""
    place = {f"{stem}.py": number for number, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays: `gc.collect()` then has half a million objects less to look at, a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by a shell's background, and so by what tests start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        raise pytest.UsageError(f"--device cuda: torch {torch.__version__} {built}; see `python -m mmkernels`")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(str(request.config.getoption("--device")))


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """An op's tests make their tensors on `device`; one marked `only("cpu" or "cuda", why)` runs there alone."""
    only = request.node.get_closest_marker("only")
    if only is not None and only.args[0] != device.type:
        pytest.skip(f"{only.args[1]} (runs with --device {only.args[0]})")
    if request.node.get_closest_marker("op") is None:
        yield
        return
    if device.type != "cpu":
        with device, exact_libraries():
            yield
    elif only is not None:
        yield
    else:
        with StandInDevice():
            yield


# What a GPU's libraries do otherwise by default, for one shape and not for another: round a convolution's float32 to 10
# bits, an error of 1e-3; take a way whose bits differ from run to run; add up parts of a product in its narrow dtype.
EXACT = (
    (torch.backends.cudnn, "allow_tf32", False),
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
)


@contextmanager
def exact_libraries() -> Iterator[None]:
    """Inside, what plain torch and ours are held to each other by does not hang on which kernel a library picks."""
    before = [getattr(place, name) for place, name, _ in EXACT]
    try:
        for place, name, value in EXACT:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(EXACT, before, strict=True):
            setattr(place, name, value)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test sets of our variables, or has code set, is gone after it: another may run in the same process."""

    def ours() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("MMKERNELS_")}

    before = ours()
    yield
    for name in ours():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are rendered only for a test marked `pictures`."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers each time; with --draws others, as a GPU draws others than a CPU from the same seed."""
    own, shift = torch.manual_seed, 1000 * int(str(request.config.getoption("--draws")))
    if shift:
        monkeypatch.setattr(torch, "manual_seed", lambda seed: own(seed + shift))
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Under MMKERNELS_VARIANT a case that the forced kernel does not take says so and is skipped."""
    try:
        yield
    except tuning.NotOfferedError as reason:
        pytest.skip(str(reason))
