"""The device that the tests of ops run on without a GPU: it raises where a GPU would, and only there."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from conftest import EXACT, exact_libraries
from diffusers.models.resnet import AlphaBlender
from placed import placed
from places import TESTS
from stand_in_device import StandInDevice
from torch import nn
from versions import marks_op

from mmkernels.ops.blend import blend

AT_IMPORT = torch.ones(2, 3, 4)
DEVICE = torch.device("cpu")


def blended(blender: Any) -> torch.Tensor:
    x = torch.randn(2, 4, 3, 5, 5)
    return blender(x, x, image_only_indicator=torch.zeros(2, 3))


# As they raised on an H200: a parameter that no default device moves, and what else lies on the host.
FAULTS: dict[str, Callable[[], Any]] = {
    "diffusers' mix factor": lambda: blended(AlphaBlender(0.5, "learned_with_images")),
    "the legacy constructor": lambda: torch.ones(2) + torch.Tensor([1.0, 2.0]),
    "numpy's memory": lambda: torch.ones(2) * torch.from_numpy(numpy.ones(2)),
    "made at import": lambda: blend(torch.ones(2, 3, 4), AT_IMPORT, torch.ones(2)),
    "one that names the CPU": lambda: blend(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, device="cpu")),
    "one moved away": lambda: torch.equal(torch.ones(2).cpu(), torch.ones(2)),
    "one in a list": lambda: torch.cat([torch.ones(2), torch.ones(2).to("cpu")]),
    "a comparison": lambda: torch.testing.assert_close(torch.ones(2), AT_IMPORT[0, 0, :2]),
    "a module of the host": lambda: nn.Linear(4, 4, device="cpu")(torch.ones(2, 4)),
    "a generator": lambda: torch.randn(2, generator=torch.Generator()),
    "as numpy": lambda: torch.ones(2).numpy(),
    "as an array": lambda: numpy.asarray(torch.ones(2)),
    "the result of an op": lambda: AT_IMPORT + blend(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2)),
    "a gradient": lambda: _gradient() + torch.ones(2, device="cpu"),
}


def _gradient() -> Any:
    x = torch.ones(2, requires_grad=True)
    x.square().sum().backward()
    return x.grad


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_raises_where_a_gpu_would(fault: Callable[[], Any]) -> None:
    with StandInDevice(), pytest.raises(RuntimeError, match="device"):
        fault()


# What a GPU takes.
FINE: dict[str, Callable[[], Any]] = {
    "a module moved whole": lambda: blended(placed(AlphaBlender(0.5, "learned_with_images"))),
    "a copy of it, in float64": lambda: copy.deepcopy(placed(nn.Linear(2, 2, device="cpu"))).double()(
        torch.ones(2).double()
    ),
    "numbers": lambda: torch.ones(2) * torch.tensor(3.0, device="cpu") + 1.0,
    "moved there": lambda: torch.ones(2) + torch.Tensor([1.0, 2.0]).to(DEVICE),
    "as another": lambda: torch.ones(2, 3, 4) + AT_IMPORT.to(torch.ones(2)),
    "an index of the host": lambda: torch.ones(3)[torch.tensor([0, 2], device="cpu")],
    "a copy into": lambda: torch.ones(2, 3, 4).copy_(AT_IMPORT),
    "the host alone": lambda: (AT_IMPORT + torch.ones(4, device="cpu")).numpy(),
    "numpy of a copy": lambda: torch.ones(2).cpu().numpy(),
    "factories that follow another tensor": lambda: torch.ones(2) + torch.zeros(2, device=torch.ones(1).device),
    "the result of an op": lambda: blend(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2)) + torch.ones(4),
    "a gradient": lambda: _gradient() + torch.ones(2),
    "a compiled function": lambda: torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)) + torch.ones(2),
}


@pytest.mark.parametrize("program", FINE.values(), ids=FINE)
def test_what_a_gpu_takes(program: Callable[[], Any]) -> None:
    with StandInDevice():
        program()


def test_a_move_copies_and_memory_that_is_freed_is_not_taken_for_the_device() -> None:
    with StandInDevice() as device:
        x = torch.Tensor([1.0, 2.0])
        moved = x.to(DEVICE)
        assert (device.holds(x), device.holds(moved), device.holds(moved.cpu())) == (False, True, False)
        for _ in range(100):
            torch.ones(1000)
            assert not device.holds(torch.Tensor(1000))
        compile_before = torch.compile
    assert torch.compile is not compile_before, "what was looked past is put back"


def test_autocast_in_tests_of_ops_names_the_device_of_the_test() -> None:
    """autocast of the CPU does nothing to tensors of a GPU; the stand-in is a CPU and would not tell."""
    modules = [path for path in TESTS.rglob("test_*.py") if marks_op(path)]
    assert len(modules) >= 15
    assert [path.name for path in modules if re.search(r"autocast\(\s*[\"']", path.read_text())] == []


def test_on_a_gpu_libraries_are_exact_and_afterwards_as_they_were() -> None:
    def switches() -> list[bool]:
        return [getattr(place, name) for place, name, _ in EXACT]

    before = switches()
    with pytest.raises(RuntimeError, match="made up"), exact_libraries():
        assert switches() == [False, True, False, False] != before
        raise RuntimeError("made up")
    assert switches() == before
