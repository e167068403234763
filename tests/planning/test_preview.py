"""`python -m mmkernels.preview` on factories of this file: its figures against real runs, and an error in one line."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import started
import torch
from diffusers.models.attention_processor import AttnProcessor
from spatio_temporal import CONTEXT_CHANNELS, small_unet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.memory.trace import Trace
from mmkernels.preview import Preview, Settings, main

FRAMES, WIDTH, HEIGHT = 5, 128, 64


class Renamed(nn.Module):
    """Called in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = small_unet()

    def forward(self, *, noisy: Tensor, embedding: Tensor) -> Tensor:
        B = len(noisy)
        return self.unet(noisy, torch.ones(B), embedding, torch.ones(B, 3), return_dict=False)[0]


def inputs(module: nn.Module, frames: int, height: int, width: int) -> dict[str, Any]:
    return {
        "noisy": torch.empty(1, frames, 8, height // 8, width // 8),
        "embedding": torch.empty(1, 1, CONTEXT_CHANNELS),
    }


def written_out() -> nn.Module:
    """Whose attention torch's own counter of FLOPs counts on a CPU: products and a softmax."""
    unet = small_unet()
    unet.set_attn_processor(AttnProcessor())
    return unet


def frozen() -> nn.Module:
    return small_unet().requires_grad_(False)


def failing() -> nn.Module:
    raise OSError("no such weights\nand more")


def number() -> int:
    return 3


def settings(factory: str = "small_unet", **more: Any) -> Settings:
    named = {"dtype": "float32", "size": f"{WIDTH}x{HEIGHT}", "frames": FRAMES} | more
    return Settings(factory=f"test_preview:{factory}", **named)


def test_as_a_command() -> None:
    words = ["-m", "mmkernels.preview", "test_preview:Renamed", "--inputs", "test_preview:inputs"]
    words += ["--frames", str(FRAMES), "--size", f"{WIDTH}x{HEIGHT}"]
    done = started.python(words, environment=os.environ | {"COLUMNS": "150"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^unet\.mid_block\.attentions\.0 +TransformerSpatioTemporalModel +fused$", done.stdout, re.M)
    shares = {
        way: [float(x) for x in re.findall(r"\(([\d.]+)x\)", done.stdout.split(way)[-1].splitlines()[0])]
        for way in ("plain ", "replaced ")
    }
    assert shares["plain "] == [1, 1, 1] and shares["replaced "][0] < 0.4 and 1 <= shares["replaced "][2] < 1.2
    assert "has no attribute 'enable_gradient_checkpointing'" in done.stdout


def test_bytes_and_flops_of_the_plain_step_are_those_of_a_real_one() -> None:
    costs, unet = Preview(settings("written_out")).costs(), written_out()
    assert all(isinstance(cost, Trace) for cost in costs.values())
    plain, checkpointed, fused = costs.values()
    assert isinstance(plain, Trace) and isinstance(checkpointed, Trace) and isinstance(fused, Trace)
    held: dict[int, Tensor] = {}
    arguments = (
        torch.randn(1, FRAMES, 8, HEIGHT // 8, WIDTH // 8),
        torch.ones(1),
        torch.randn(1, 1, 24),
        torch.ones(1, 3),
    )

    def hold(x: Tensor) -> Tensor:
        held[x.untyped_storage()._cdata] = x
        return x

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            loss = unet(*arguments).sample.square().mean()
        loss.backward()
    known = {x.untyped_storage()._cdata for x in (*unet.parameters(), *arguments)}
    saved_bytes = sum(x.untyped_storage().nbytes() for key, x in held.items() if key not in known)
    assert plain.saved_bytes == pytest.approx(saved_bytes, rel=0.02)
    assert plain.flops == counter.get_total_flops()
    parameters_bytes = 4 * sum(x.numel() for x in unet.parameters())
    assert plain.peak_bytes > saved_bytes + 3 * parameters_bytes  # weights and two moments
    assert fused.saved_bytes < checkpointed.saved_bytes < plain.saved_bytes and fused.peak_bytes < plain.peak_bytes


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Settings(factory="no_such_module:f"), "no_such_module cannot be imported: ModuleNotFoundError: No"),
        (Settings(factory="test_preview"), "FACTORY is 'test_preview', wanted MODULE:NAME"),
        (settings("nothing"), "test_preview has no nothing; give the name of a function or a class in it"),
        (settings("FRAMES"), "test_preview:FRAMES is a int, which cannot be called; give a function or a class"),
        (settings("number"), "test_preview:number gives a int, wanted a torch.nn.Module"),
        (settings("failing"), "test_preview:failing raised: OSError: no such weights; build the module from a config"),
        (Settings(factory="torch.nn:ReLU", inputs="test_preview:inputs"), "ReLU holds no SpatioTemporalResBlock or"),
        (settings("Renamed"), "the inputs cannot be made: AttributeError: 'Renamed' object has no attribute 'config'"),
        (settings(inputs="test_preview:inputs"), "a step of the module (plain) raised: TypeError: UNetSpatioTemporal"),
        (settings("frozen"), "(plain) raised: ValueError: no output requires a gradient; leave a parameter unfrozen"),
        (settings(size="100x64"), "got size '100x64', wanted width x height, sides by 64 pixels"),
        (settings(card="RTX 9"), "RTX 9"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(asked: Settings, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no preview: ") and said in line
