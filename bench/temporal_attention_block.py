"""Ways to run the temporal attention sub-block: y = x + proj(attention(LN(x))), x and y (B, F, P, C).

The torch ways run diffusers' own LayerNorm and Attention modules as its TemporalBasicTransformerBlock runs them,
its permutes to (B*P, F, C) and back included. diffusers permutes once for the whole transformer block, which has
three more sub-blocks; so the `-no-permute` ways start and end in (B*P, F, C) and pay for none of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench import harness
from bench.attention_libraries import libraries
from bench.harness import Outputs, Provider
from bench.shapes import TemporalShape
from mmkernels.ops.temporal_attention_block import Keep, default_chunk_pixels, temporal_attention_block

Function = Callable[[torch.Tensor], torch.Tensor]


class DiffusersSubBlock(nn.Module):
    """norm1, attn1 and the residual of diffusers' temporal block, on (B, F, P, C) or on (B*P, F, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(query_dim=channels, heads=heads, dim_head=channels // heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As TemporalBasicTransformerBlock.forward: permute copy, sub-block, permute copy."""
        if x.ndim == 3:
            return self.attn1(self.norm1(x), encoder_hidden_states=None) + x
        B, F, P, C = x.shape
        tokens = x.permute(0, 2, 1, 3).reshape(B * P, F, C)
        tokens = self.attn1(self.norm1(tokens), encoder_hidden_states=None) + tokens
        return tokens.reshape(B, P, F, C).permute(0, 2, 1, 3).reshape(B * F, P, C).view(B, F, P, C)


class SubBlock:
    """Inputs and weights of one run, and its providers in the two modes."""

    def __init__(self, shape: TemporalShape, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.device, self.dtype = shape, device, dtype
        self.module = DiffusersSubBlock(shape.channels, shape.heads)
        for parameter in self.module.parameters():  # a module's own to() refuses fake tensors
            parameter.data = parameter.data.to(device, dtype)
        size = (shape.batch, shape.frames, shape.pixels, shape.channels)
        self.x = torch.randn(size).to(device, dtype).requires_grad_()
        self.dy = torch.randn(size).to(device, dtype)
        self.skipped: dict[str, str] = {}
        self.compiled: tuple[Function, float] | None = None  # and the seconds it took

    def plain(self, mode: str) -> Outputs:
        """Plain torch in the dtype of the run: its error is the budget of the gate."""
        return self._run(self.module, mode)

    def exact(self, mode: str) -> Outputs:
        """The same in float64."""
        module = DiffusersSubBlock(self.shape.channels, self.shape.heads).to(self.device).double()
        module.load_state_dict({name: value.double() for name, value in self.module.state_dict().items()})
        x = self.x.detach().double().requires_grad_()
        return self._gradients(module(x), x, dict(module.named_parameters()), self.dy.double(), mode)

    def providers(
        self, mode: str, *, chunk_pixels: Sequence[int], eager_chunk_pixels: int, compile_limit_s: float
    ) -> list[Provider]:
        """Every way that this device and installation have; the reasons for the others are in `skipped`."""

        def provider(name: str, function: Function, includes: str) -> Provider:
            return Provider(name=name, step=lambda: self._run(function, mode), includes=includes)

        found = [
            provider("torch", self.module, "diffusers' modules, its two permute copies"),
            provider("checkpoint", self._checkpointed, "torch under torch.utils.checkpoint"),
            provider("checkpoint-chunked", self._chunked(eager_chunk_pixels),
                     f"a checkpoint per {eager_chunk_pixels} pixels, split and cat"),
            self._no_permute("torch-no-permute", self.module, mode, "torch from (B*P, F, C), permutes not charged"),
            self._no_permute("checkpoint-no-permute", self._checkpointed, mode,
                             "checkpoint from (B*P, F, C), permutes not charged"),
        ]  # fmt: skip
        if self.compiled is None and "compile" not in self.skipped:
            self.compiled = self._compile(compile_limit_s)
        if self.compiled is not None:
            function, compile_s = self.compiled
            found.append(provider("compile", function, f"torch.compile of torch; compiled in {compile_s:.0f} s"))
        others, left_out = libraries(self.module, self.device, self.dtype)
        found += [provider(name, function, includes) for name, (function, includes) in others.items()]
        self.skipped |= left_out
        for chunk in chunk_pixels or (default_chunk_pixels(self.x),):
            saving = self._fused(keep="input", chunk_pixels=chunk)
            name = f"fused-{chunk}" if chunk_pixels else "fused"
            found.append(provider(name, saving, f"saves its input only, {chunk} pixels a chunk"))
        keeping = self._fused(keep="qkv", chunk_pixels=None)
        return [*found, provider("fused-keep-qkv", keeping, "keeps q, k, v for backward")]

    def _checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.module, x, use_reentrant=False)  # pyright: ignore[reportReturnType]

    def _chunked(self, pixels: int) -> Function:
        def function(x: torch.Tensor) -> torch.Tensor:
            # split, not slices: its backward is one cat where slices would each fill a tensor of zeros
            return torch.cat([self._checkpointed(part) for part in x.split(pixels, dim=2)], dim=2)

        return function

    def _fused(self, *, keep: Keep, chunk_pixels: int | None) -> Function:
        norm, attention = self.module.norm1, self.module.attn1
        out: Any = cast(nn.ModuleList, attention.to_out)[0]
        to_q, to_k, to_v = (
            cast(nn.Linear, module).weight for module in (attention.to_q, attention.to_k, attention.to_v)
        )
        return lambda x: temporal_attention_block(
            x, norm.weight, norm.bias, to_q, to_k, to_v, out.weight, out.bias, attention.heads,
            eps=norm.eps, chunk_pixels=chunk_pixels, keep=keep,
        )  # fmt: skip

    def _no_permute(self, name: str, function: Function, mode: str, includes: str) -> Provider:
        B, F, P, C = self.x.shape

        def to_rows(x: torch.Tensor) -> torch.Tensor:
            return x.detach().permute(0, 2, 1, 3).reshape(B * P, F, C)

        x, dy = to_rows(self.x).requires_grad_(), to_rows(self.dy)

        def step() -> Outputs:
            outputs = dict(self._gradients(function(x), x, dict(self.module.named_parameters()), dy, mode))
            for key in outputs.keys() & {"y", "dx"}:
                outputs[key] = outputs[key].view(B, P, F, C).permute(0, 2, 1, 3)  # a view, for the gate
            return outputs

        return Provider(name=name, step=step, includes=includes)

    def _compile(self, limit_s: float) -> tuple[Function, float] | None:
        function = torch.compile(self.module)
        took_s, reason = harness.compile_time_s(lambda: self._run(function, "both"), limit_s)
        if reason is not None:
            self.skipped["compile"] = reason
            return None
        return function, took_s

    def _run(self, function: Function, mode: str) -> Outputs:
        return self._gradients(function(self.x), self.x, dict(self.module.named_parameters()), self.dy, mode)

    @staticmethod
    def _gradients(
        y: torch.Tensor, x: torch.Tensor, parameters: dict[str, nn.Parameter], dy: torch.Tensor, mode: str
    ) -> Outputs:
        if mode == "forward":
            return {"y": y.detach()}
        gradients = torch.autograd.grad(y, (x, *parameters.values()), dy)
        return {"y": y.detach(), **dict(zip(("dx", *(f"d {name}" for name in parameters)), gradients, strict=True))}
