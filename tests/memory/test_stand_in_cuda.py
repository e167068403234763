"""What asks CUDA and no GPU of ours has run yet, with torch.cuda's own Python: devices, caps, peaks, locked memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from stand_in_cuda import GIB, Cuda, stand_in_cuda
from tiny import tiny_config
from torch import Tensor

from bench import report
from bench.verification import memory
from bench.verification.device import Gpu, made_up_plan
from bench.verification.record import Record, failures_of
from mimicmotion import trainer
from mimicmotion.memory_report import MemoryReport
from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.planning import memory_plan
from mimicmotion.ranks.distributed import Ranks
from mmkernels.allocator import CudaAllocator
from mmkernels.cards import card
from mmkernels.memory import measured
from mmkernels.memory.offload import Offload
from mmkernels.memory.transfer import CudaDevice

SETTING = report.Setting(dtype="bfloat16", threads=1, device="x", versions={}, commit="abc", command="x", allocator={})
GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with stand_in_cuda() as cuda:
        yield cuda


class Small(Gpu):
    """The GPU at hand, with the step of a stand-in."""

    is_full_size = False

    def card(self):
        return card("RTX 4090")

    def planner(self, make: Any) -> Any:
        return made_up_plan


def test_torch_refuses_a_gpu_without_an_index_here_as_there(cuda: Cuda) -> None:
    """What ended the first run of part `memory`."""
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))
    with pytest.raises(ValueError, match="wanted one with its index"):
        Ranks(rank=0, world_size=1, device=torch.device("cuda"))


def test_what_a_part_asks_of_the_gpu(cuda: Cuda) -> None:
    gpu, cuda.peak_bytes = Gpu(), 3 * GIB
    assert (gpu.name, gpu.memory_gib(), gpu.usable_gib()) == ("stand-in", 80, pytest.approx((70 + 1 - 0.5) * 0.97))
    with gpu.capped(20.0):
        assert cuda.fractions == [0.25]
    assert cuda.fractions == [0.25, 1.0]
    gpu.reset_peak()
    assert gpu.peak_gib() == (3, 3) and cuda.num_resets == 1
    watched = CudaAllocator(GPU)
    watched.begin()
    assert watched.peak_bytes() == 3 * GIB


def on_host(*arguments: Any) -> MimicMotionModel:
    with torch.device("cpu"):
        return build_model(*arguments)


def test_part_memory_trains_under_a_cap(cuda: Cuda, tmp_path: Path) -> None:
    """The closed loop and plans from files, all but their planning and the kernels."""
    record = Record(path=tmp_path / "h100.json", part="memory", setting=SETTING)

    def plan_within(planner: Any, budget_gib: float) -> Any:
        return made_up_plan(planner._config, card("RTX 4090"), budget_gib)

    cuda.peak_bytes = 23 * GIB
    config = dataclasses.replace(tiny_config(tmp_path, num_frames=3, batch_size=1, num_steps=2), kernels="fused")
    with (
        mock.patch.object(memory, "processes", ThreadPoolExecutor),
        mock.patch.object(memory, "memory_config", lambda gpu: config),
        mock.patch.object(memory_plan.StepPlanner, "plan_within", plan_within),
        mock.patch.object(trainer, "build_model", on_host),
    ):
        memory.run(Small(), record, 100)
    rows = record.rows()
    assert failures_of(rows, ["memory"]) == []
    runs = ["--memory-budget 21.9", "plan for RTX 4090", "plan for this card"]
    measured_rows = [row for row in rows if row["kind"] == "measured" and row["metric"] == "peak_gib"]
    assert [(row["provider"], row["mode"]) for row in measured_rows] == [
        (run, f"step {step}") for run in runs for step in (1, 2)
    ]
    assert {row["median"] for row in measured_rows} == {23.0}
    assert cuda.fractions == pytest.approx([22.577 / 80, 1, 22.577 / 80, 1, 1, 1], rel=1e-4)
    (change,) = [row["includes"] for row in rows if row["bench"] == "memory/closed loop" and row["metric"] == "step_s"]
    assert change.startswith("over the budget, and no plan is smaller: the peak was 23.00 GiB (modelled 1.00, ")


def test_the_reports_allocator_and_its_device(cuda: Cuda) -> None:
    noted: list[Any] = []
    snapshot = {"segments": [{"device": 0}, {"device": 1}], "device_traces": [["ours"], ["other"]]}
    with (
        mock.patch.object(torch.cuda.memory, "_record_memory_history", lambda **settings: noted.append(settings)),
        mock.patch.object(torch.cuda.memory, "_snapshot", lambda: snapshot),
    ):
        allocator = measured.CudaAllocator(GPU)
        allocator.start()
        assert allocator.stop() == ({"segments": [{"device": 0}], "device_traces": [["ours"]]}, GIB)
    assert noted[0] == noted[-1] == {"enabled": None}
    run = mock.Mock(ranks=Ranks(rank=0, world_size=1, device=GPU))
    assert MemoryReport(run).allocator == allocator


def test_locked_memory_is_unlocked_before_it_is_given_back(cuda: Cuda) -> None:
    """Else whoever gets the same addresses next cannot lock them: the next plan of a run, or the next run."""
    for is_closed in (True, False, True):
        device = CudaDevice(GPU, 1 << 20)
        assert list(cuda.locked.values()) == [1 << 20]
        if is_closed:
            device.close()
            assert cuda.locked == {} and device._pinned.numel() == 0
        del device
        gc.collect()
        assert cuda.locked == {}
    with (
        mock.patch.object(cuda.runtime, "cudaHostRegister", lambda *_: 2),
        pytest.raises(MemoryError, match=r"page-lock 1,048,576 bytes of host memory \(error 2\)"),
    ):
        CudaDevice(GPU, 1 << 20)


def test_an_offload_moves_through_the_gpus_own_device(cuda: Cuda) -> None:
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad((x.exp() @ weight).square().sum(), (x, weight))

    expected = gradients()
    device = CudaDevice(GPU, 1 << 20)
    offload = Offload(device, torch.device("cpu"), pinned_bytes=1 << 20, window_bytes=0, least_bytes=1)
    allocate = mock.patch.object(CudaDevice, "allocate", lambda _, size: torch.empty(size, dtype=torch.uint8))
    with allocate, offload.saving([x, weight]):  # backward runs its hooks outside of the stand-in
        found = gradients()
    assert all(map(torch.equal, found, expected)) and offload.mover.moved_in_bytes >= 2 * x.nbytes
    device.close()
