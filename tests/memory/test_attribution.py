"""Who made what is alive at the peak: counted by hand, adding up to the peak, and alike modelled and measured."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from spatio_temporal import small_unet, unet_inputs
from stand_in_allocator import StandInAllocator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels
from mmkernels.cards import card
from mmkernels.choices import OptimizerChoice
from mmkernels.memory import attribution, measured
from mmkernels.memory import trace as trace_module
from mmkernels.memory.attribution import GRADIENT, Event, History, Origin, Origins, at_peak, marking_gradients
from mmkernels.memory.measured import OTHER, ROUNDED, events_of, measure
from mmkernels.memory.trace import Trace, trace
from mmkernels.planning.svd import svd_workload
from mmkernels.planning.workload import measure_step, trace_step

KIB = 1024


def line(function: Any, text: str) -> str:
    """file:line of the only line of a function that holds the text."""
    lines, first = inspect.getsourcelines(function)
    (index,) = (i for i, each in enumerate(lines) if text in each)
    return f"test_attribution.py:{first + index}"


class Product(nn.Module):
    """exp(x w), whose step is counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(256, 256))  # 256 KiB

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.w
        return torch.exp(h)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = Product()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x).sum()


def step_of(model: nn.Module, x: torch.Tensor) -> None:
    loss = model(x)
    loss.backward()


def modelled(model: nn.Module, step: Any, **resident: list[torch.Tensor]) -> tuple[Trace, dict[Origin, int]]:
    history = History()
    history.begin(model, **resident)
    with marking_gradients(model.parameters(), history.gradient):
        found = trace(step, [x for them in resident.values() for x in them], history=history)
    return found, at_peak(history.events)


def by_hand() -> dict[Origin, int]:
    """While the weight's gradient is made, exp(h) is gone with its node and its own gradient is alive."""
    return {
        Origin(operation="weights"): 256 * KIB,
        Origin(operation="batch"): 16 * KIB,
        Origin(operation=GRADIENT): 256 * KIB,
        Origin(operation="aten::sum", source=line(Whole, ".sum()")): 512,
        Origin(operation="aten::ones_like", source=line(step_of, "backward()")): 512,
        Origin(operation="aten::mul", source=line(Product, "torch.exp(h)"), place="product"): 16 * KIB,
    }


def test_modelled_peak_counted_by_hand():
    model, x = Whole(), torch.ones(16, 256)
    found, origins = modelled(model, lambda: step_of(model, x), weights=list(model.parameters()), batch=[x])
    assert origins == by_hand()
    assert sum(origins.values()) == found.peak_bytes


def test_measured_peak_counted_by_hand():
    model, x = Whole(), torch.ones(16, 256)
    allocator = StandInAllocator([*model.parameters(), x], hidden_bytes=2048)
    resident = {"weights": list(model.parameters()), "batch": [x]}
    found = measure(lambda: step_of(model, x), allocator, model, resident)
    assert found == by_hand() | {ROUNDED: 2048}
    assert sum(found.values()) == allocator.peak_bytes


def unet_step(unet: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    unet(**inputs).sample.square().mean().backward()


@pytest.mark.parametrize("way", ["torch", "checkpoint", "fused"])
def test_the_whole_peak_of_a_unet_has_an_origin(way: str):
    with FakeTensorMode():
        unet, inputs = small_unet(), unet_inputs()
        if way != "torch":
            mmkernels.replace(unet, way)
        resident = {"weights": list(unet.parameters()), "batch": list(inputs.values())}
        found, origins = modelled(unet, lambda: unet_step(unet, inputs), **resident)
    assert sum(origins.values()) == found.peak_bytes
    made = [origin for origin in origins if origin.source]
    assert {origin.operation for origin in origins if not origin.source} <= {"weights", "batch", GRADIENT}
    assert all(origin.source.rpartition(":")[2].isdigit() for origin in made), "autograd's nodes all have their line"
    step_line = line(unet_step, "unet(**inputs)")
    assert [x for x in made if not x.place and x.source != step_line and "unet_spatio" not in x.source] == []
    units = {origin.place for origin in made if "/" in origin.place}
    assert bool(units) == (way == "fused")


def test_both_halves_say_the_same_of_a_unet(monkeypatch):
    """The same step on fake tensors by the trace, and on real ones by an allocator's history.

    What a GPU's libraries take is in the model, and not on this CPU.
    """
    monkeypatch.setattr(trace_module, "workspace_bytes", lambda *_: ())
    config: dict[str, Any] = {
        "block_out_channels": (32, 64), "num_attention_heads": (2, 4), "layers_per_block": 1, "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    }  # fmt: skip
    optimizer, history = OptimizerChoice(kind="adamw8bit"), History()
    workload = svd_workload("adamw8bit", frames=2, height=64, width=64, **config)
    traced = trace_step(workload, "checkpoint", card("H200"), optimizer, history=history)
    real = svd_workload("adamw8bit", frames=2, height=64, width=64, **config, device=torch.device("cpu"))
    allocator = StandInAllocator(list(real.resident))
    found, expected = measure_step(real, "checkpoint", optimizer, allocator), at_peak(history.events)
    assert sum(expected.values()) == traced.trace.peak_bytes
    assert expected.pop(Origin(operation="moments")) > 0, "made where the stand-in does not look"
    assert expected.pop(Origin(operation="cuBLAS workspaces")) == 2 * card("H200").workspace_bytes
    assert found == expected
    assert sum(found.values()) == allocator.peak_bytes


def test_a_snapshot_replayed_by_hand():
    """A block there before and freed, one that stays, an address given twice; three ways to be asked for."""

    def entry(action: str, addr: int, size: int, *frames: tuple[str, str, int]) -> dict[str, Any]:
        named = [{"name": name, "filename": filename, "line": number} for name, filename, number in frames]
        return {"action": action, "addr": addr, "size": size, "frames": named}

    package = "/usr/lib/python3/site-packages"
    snapshot = {
        "device_traces": [
            [
                entry("segment_alloc", 0, 1 << 21),
                entry("alloc", 8192, 1000, ("mmkernels_operator_1", "x.py", 1), ("f", "/a/own.py", 3)),
                entry("free_requested", 0, 100),
                entry("free_completed", 0, 100),
                entry("alloc", 0, 512, ("g", f"{package}/torch/nn.py", 9), ("f", f"{package}/theirs/model.py", 4)),
                entry("alloc", 4096, 100),  # the peak: 1024 + 512 + 512, and 2048 that stay
                entry("free_requested", 4096, 100),
                entry("alloc", 4096, 300, ("mmkernels_operator_0", "x.py", 1)),
                entry("free_requested", 8192, 1000),
            ]
        ],
        "segments": [
            {
                "address": 0,
                "blocks": [
                    {"size": 512, "requested_size": 512, "state": "active_allocated"},
                    {"size": 1536, "requested_size": 0, "state": "inactive"},
                    {"size": 2048, "requested_size": 1900, "state": "active_allocated"},
                    {"size": 512, "requested_size": 300, "state": "active_allocated"},
                ],
            }
        ],
    }
    origins = [Origin(operation="aten::mm", source="m.py:1"), Origin(operation="aten::add", source="m.py:2")]
    found = at_peak(events_of(snapshot, origins, {2048: "weights"}))
    outside = "outside of any operator"
    assert found == {
        origins[1]: 1024,
        Origin(operation="weights"): 2048,
        Origin(operation=outside, source="theirs/model.py:4"): 512,
        Origin(operation=outside): 512,
    }
    gradient = at_peak(events_of(snapshot, origins, {2048: "weights"}, {(1, 8192)}))
    assert gradient[Origin(operation=GRADIENT)] == 1024 and origins[1] not in gradient
    assert at_peak(events_of(snapshot, origins))[OTHER] == 2048


def test_a_history_with_a_gap_is_refused():
    a = Origin(operation="a")
    assert at_peak([Event(1, 512, a), Event(1), Event(1, 512, a), Event(2, 512, a)]) == {a: 1024}
    assert at_peak([]) == {}
    with pytest.raises(ValueError, match="event 1: the storage at 2 is not alive and ends"):
        at_peak([Event(1, 512, a), Event(2)])
    with pytest.raises(ValueError, match="event 1: the storage at 1 is alive and is allocated again"):
        at_peak([Event(1, 512, a), Event(1, 512, a)])
    with pytest.raises(ValueError, match="512 bytes more than the allocator's peak"):
        model = Whole()
        measure(lambda: model(torch.ones(16, 256)), StandInAllocator(list(model.parameters()), -512), model, {})


def test_backward_on_a_thread_of_its_own_belongs_to_lines_of_forward(monkeypatch):
    """As on a GPU: the thread that runs backward has neither the step's frames nor the call of autograd's engine."""
    monkeypatch.setattr(attribution, "_ENGINE_CALL", by_hand.__code__)
    model = Whole()
    operators = measured._Operators(Origins(model))
    with operators:
        loss = model(torch.ones(16, 256))
    count = len(operators.origins)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(operators.__enter__).result()
        thread.submit(loss.backward).result()
        thread.submit(operators.__exit__, None, None, None).result()
    found = operators.origins[count:]
    assert Origin(operation="aten::mul", source=line(Product, "torch.exp(h)"), place="product") in found
    assert Origin(operation="aten::mm", source=line(Product, "x @ self"), place="product") in found
