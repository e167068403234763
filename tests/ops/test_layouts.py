"""No convolution of the model is handed to cuDNN in a layout that it has to copy, and weights may lie as they like.

A step of the real model runs on fake CPU tensors that stand for a GPU's (fake CUDA tensors run no backward without a
driver, and do not exist in torch for CPU). Every convolution is seen, those inside fused operations included: what it
is given, forward and backward, and by cuDNN's rule in what layout it answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import _maybe_get_opdef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimicmotion.config import Kernels, OptimizerConfig, mimicmotion_72
from mimicmotion.execution import use_kernels
from mimicmotion.model.pose_net import PoseNet
from mimicmotion.optimization.optimizer import Optimization
from mimicmotion.planning.dry_run import fake_step
from mimicmotion.run.checkpoint import Checkpoint, load, save
from mmkernels.costs import modelled_device, noting
from mmkernels.memory.cuda_autocast import norms_in_float32

_aten = torch.ops.aten


class Convolutions(TorchDispatchMode):
    """Names what cuDNN would copy, as "name, forward or backward: what shape", and counts convolutions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.copied: set[str] = set()
        self.num_seen = {"forward": 0, "backward": 0}
        self.relaid: set[str] = set()  # copies into another layout by the model itself, outside of any operation
        self._names = {id(module): name or "model" for name, module in model.named_modules()}
        self._inside: list[str] = ["autograd"]
        self._by_weight: dict[int, str] = {}  # a convolution's name by the storage of its weight or of a copy of that
        self._known: set[Any] = set()  # operations seen from inside, each with the same tensors once
        self._kept: list[Tensor] = []  # so that no address is used twice
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                self._note(module.weight, name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            self._inside.append(self._names.get(id(module), self._inside[-1]))

        def leave(*_: Any) -> None:
            self._inside.pop()

        # what is computed again in backward stops midway: left all the same
        before, after = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            with modelled_device("cuda"), norms_in_float32(), self:
                yield
        finally:
            before.remove()
            after.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:  # inside an operation nothing is under autograd, and conv2d comes whole
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        if func.namespace == "mmkernels" and (definition := _maybe_get_opdef(func)) is not None:
            self._look_inside(func, definition, args, kwargs)
        out = func(*args, **kwargs)
        if func is _aten.convolution.default:
            self._see("forward", {"input": args[0], "weight": args[1]})
            return _as_cudnn(out, *args[:2])
        if func is _aten.convolution_backward.default:
            self._see("backward", {"gradient": args[0], "input": args[1], "weight": args[2]})
            return tuple(x if x is None or x.ndim < 4 else _as_cudnn(x, *args[1:3]) for x in out)
        self._see_copy(func, args, out)
        return out

    def _look_inside(self, func: Any, definition: Any, args: tuple, kwargs: dict) -> None:
        leaves = tree_leaves((args, kwargs))
        signature = (func.name(), *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        if signature in self._known:
            return
        self._known.add(signature)
        where = self._name_of(*(x for x in leaves if isinstance(x, Tensor) and x.ndim == 4))
        self._inside.append(f"{where} {func.name().removeprefix('mmkernels::')}")
        with self, noting(lambda *_: None), torch.no_grad(), torch.autocast("cpu", enabled=False):
            definition._init_fn(*args, **kwargs)
        self._inside.pop()

    def _note(self, weight: Tensor, name: str) -> None:
        self._by_weight[weight.untyped_storage()._cdata] = name
        self._kept.append(weight)

    def _name_of(self, *weights: Tensor) -> str:
        """The convolution that one of these belongs to, else where the model is now."""
        keys = [x.untyped_storage()._cdata for x in weights]
        return next((self._by_weight[key] for key in keys if key in self._by_weight), self._inside[-1])

    def _see(self, direction: str, given: dict[str, Tensor]) -> None:
        self.num_seen[direction] += 1
        name = self._inside[-1] if " " in self._inside[-1] else self._name_of(given["weight"])
        for what, x in given.items():
            if not x.is_contiguous(memory_format=_channels_last(x)):
                self.copied.add(f"{name}, {direction}: {what} {tuple(x.shape)}")

    def _see_copy(self, func: Any, args: tuple, out: Any) -> None:
        if func not in (_aten.clone.default, _aten.copy_.default, _aten._to_copy.default):
            return
        source, target = (args[1], args[0]) if func is _aten.copy_.default else (args[0], out)
        if name := self._by_weight.get(source.untyped_storage()._cdata):
            self._note(target, name)
        is_relaid = source.shape == target.shape and 0 not in source.stride() and _order(source) != _order(target)
        if is_relaid and " " not in self._inside[-1]:
            self.relaid.add(f"{self._inside[-1]}: {tuple(source.shape)}")


def _channels_last(x: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


def _as_cudnn(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """As ATen has cuDNN lay it out: channels last where input or weight lies so and in no other way (ConvUtils.h)."""
    is_last = any(v.is_contiguous(memory_format=_channels_last(v)) and not v.is_contiguous() for v in (x, weight))
    return torch.empty_like(out, memory_format=_channels_last(out) if is_last else torch.contiguous_format)


def _order(x: Tensor) -> list[int]:
    """The axes longer than one, from the widest stride to the closest."""
    return sorted((axis for axis in range(x.ndim) if x.shape[axis] > 1), key=lambda axis: -x.stride(axis))


def walk(model: nn.Module, loss: Callable[[], Tensor]) -> Convolutions:
    convolutions = Convolutions(model)
    with convolutions.watching():
        loss().backward()
    return convolutions


@pytest.mark.parametrize("kernels", ["fused", "checkpoint", "torch"])
def test_nothing_is_copied_for_a_convolution(kernels: Kernels) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = fake_step(dataclasses.replace(mimicmotion_72(), kernels=kernels))
        use_kernels(step.model, kernels)
        seen = walk(step.model, step.loss)
    if kernels == "fused":
        assert seen.copied == set()
        inputs = {"pose_net: (72, 3, 1024, 576)", "model: (1, 72, 128, 72, 8)"}
        assert seen.relaid == inputs | {"unet.conv_out: (72, 4, 128, 72)", "autograd: (72, 128, 72, 4)"}
        assert min(seen.num_seen.values()) > 50
        return
    # What diffusers' norms do decides for its own blocks: told, and not judged. PoseNet is ours.
    print("\n".join(sorted(seen.copied)))
    assert {x for x in seen.copied if "pose_net" in x} == {"pose_net.final_proj, backward: gradient (72, 320, 128, 72)"}
    assert seen.num_seen["backward"] == 119


def test_the_walk_names_what_would_be_copied() -> None:
    with FakeTensorMode():
        net: Any = PoseNet(32)
        picture = torch.empty(2, 3, 64, 64)
        assert walk(net, lambda: net(picture).square().sum()).copied == set()
        for parameter in net.parameters():
            parameter.data = parameter.data.contiguous()
        net.conv_layers[2].register_forward_hook(lambda *found: found[-1].contiguous())
        copied = walk(net, lambda: net(picture).square().sum()).copied
    assert {"conv_layers.0, forward: weight (3, 3, 3, 3)", "conv_layers.4, forward: input (2, 16, 32, 32)"} <= copied
    assert "conv_layers.2, backward: gradient (2, 16, 32, 32)" in copied


@pytest.mark.parametrize("kernel", [(3, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_an_update_does_not_see_how_weights_lie(kind: Any, kernel: Any, tmp_path: Path) -> None:
    """Weights, moments and average of four steps, with a checkpoint between, channels last against contiguous."""
    last_format = torch.channels_last if len(kernel) == 2 else torch.channels_last_3d
    plain, last = (_trained(kind, kernel, layout, tmp_path) for layout in (torch.contiguous_format, last_format))
    assert [name for name in plain if not torch.equal(plain[name], last[name])] == []


def _trained(kind: Any, kernel: Any, layout: torch.memory_format, folder: Path) -> dict[str, Tensor]:
    def made() -> tuple[nn.Conv2d | nn.Conv3d, Optimization]:
        torch.manual_seed(0)
        conv = nn.Conv2d(64, 64, kernel) if len(kernel) == 2 else nn.Conv3d(64, 64, kernel)
        conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
        # nothing is clipped: a norm is a sum in the order of memory
        config = OptimizerConfig(kind=kind, learning_rate=1e-2, warmup_steps=0, max_grad_norm=1e9)
        return conv, Optimization(conv, config, num_steps=9, dead=set(), scales_loss=False)

    conv, optimization = made()
    for step in range(4):
        if step == 2:
            tensors = {"model": conv.state_dict(), **optimization.tensors()}
            save(folder, Checkpoint(step=step, tensors=tensors, documents=optimization.document()), keep=1)
            saved = load(folder / "step-00000002")
            conv, optimization = made()
            conv.load_state_dict(saved.tensors["model"])
            optimization.load(saved.tensors, saved.documents)
        weight_gradient = torch.randn(conv.weight.shape, dtype=conv.weight.dtype)
        conv.weight.grad = weight_gradient.contiguous(memory_format=layout)
        optimization.gradient_norm()
        optimization.step(is_finite=True)
    assert conv.weight.is_contiguous(memory_format=layout)
    groups = optimization.tensors()
    return {"weight": conv.weight, **groups["ema"], **groups["optimizer"]}
