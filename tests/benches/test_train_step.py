"""The bench of a whole step: sizes as typed, the largest clip by bisection, resident memory, what has no room."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import measured_step, report
from bench.measured_step import largest, why_no_room
from bench.train_step import Settings
from bench.training_step import high_water_bytes
from mmkernels.tuning import Choice


@pytest.mark.parametrize(("room", "most"), [(0, 10), (1, 10), (7, 10), (10, 10), (30, 10), (72, 288)])
def test_the_largest_clip_is_found_in_few_tries(room: int, most: int) -> None:
    tried = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= room

    assert largest(fits, most) == min(room, most)
    assert len(tried) <= most.bit_length() and all(1 <= count <= most for count in tried)


def test_only_memory_that_ends_is_no_room() -> None:
    def raising(error: Exception) -> Any:
        def step() -> None:
            raise error

        model = SimpleNamespace(zero_grad=lambda set_to_none: None)
        return SimpleNamespace(step=step, running=nullcontext, model=model, device=torch.device("cpu"))

    short = raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    assert why_no_room(short, "torch") == "CUDA out of memory. Tried to allocate 2 GiB."
    assert why_no_room(raising(MemoryError("offload wants 40 GiB")), "torch") == "offload wants 40 GiB"
    with pytest.raises(RuntimeError, match="another"):
        why_no_room(raising(RuntimeError("another")), "torch")
    short.step = lambda: None
    assert why_no_room(short, "torch") is None


def test_resident_memory_is_the_kernels_high_water_mark(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t  1234 kB\nVmRSS:\t 1000 kB\n")
    assert high_water_bytes(status) == 1234 * 1024
    before_bytes = high_water_bytes()
    held = torch.ones(50 << 20, dtype=torch.uint8)
    assert high_water_bytes() >= before_bytes and held.numel() == 50 << 20
    status.write_text("VmRSS:\t 1000 kB\n")
    with pytest.raises(RuntimeError, match="no line VmHWM"):
        high_water_bytes(status)


def test_sizes_as_typed() -> None:
    data = Settings(size="128x64", frames=9, device="cpu").config().data
    assert (data.width, data.height, data.num_frames) == (128, 64, 9)
    assert Settings(device="cpu").config().preset == "demo"
    with pytest.raises(ValueError, match="wanted width x height"):
        Settings(size="1024x500").pixels()


def test_chosen_variants_are_shown_with_their_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(op="conv", key="(3, 3)", chosen="cuda", times_ms={"triton": 4.0, "cuda": 2.5})
    monkeypatch.setattr(measured_step.tuning, "stored", lambda: {"H100, torch 2.13": [choice]})
    console = report.make_console()
    with console.capture() as captured:
        measured_step.print_variants(console)
    assert "chosen on H100, torch 2.13 (measured)" in captured.get()
    assert "cuda 2.500, triton 4.000" in captured.get()
