"""Regional torch.compile of a Stable Video Diffusion UNet: what runs fastest today without kernels written for it.

Each residual block and each transformer is a region, compiled whole by inductor with the checkpoints that a placement
puts into it; the UNet around them stays eager. Regions of one kind and shape share a graph. `budget-B` places no
checkpoints: inductor chooses in each region what to keep for backward, at most the share B of what it would keep by
itself (torch._functorch.config.activation_memory_budget; at 0 its inputs alone).

Activations lie channels last from the first convolution to the last; the layout of weights is inductor's to choose, in
the pass that casts them. Attention is torch's choice: cuDNN's is allowed, and torch 2.11 takes it on Hopper by itself.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as functorch_config
from torch._inductor import exc as inductor
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor

from bench.checkpoint_places import Undo, place, place_fine_grained, undo_forward, whole
from mimicmotion.paths import first_line

Compiled = Literal[
    "compiled-checkpoint", "compiled-fine-grained", "compiled-fine-grained-one-token", "budget-0.1", "budget-0.3",
    "budget-0.5",
]  # fmt: skip
COMPILED: tuple[Compiled, ...] = get_args(Compiled)
KINDS = (SpatioTemporalResBlock, TransformerSpatioTemporalModel)
MOST_GRAPHS = 1024  # of one process: a graph for each shape, provider and size of clip; torch's own limit is 8
Compiler = Callable[[Any, Any], Any]  # of a graph and its example inputs
_FAILURES = (
    TorchDynamoException, FailOnRecompileLimitHit, inductor.InvalidCxxCompiler, inductor.CppCompileError,
    inductor.OperatorIssue,
)  # fmt: skip


class CompileError(RuntimeError):
    """torch.compile failed; why, in one line."""


@contextmanager
def compiling() -> Iterator[None]:
    """Raise CompileError where torch cannot compile what runs inside: no C++ compiler, an error of inductor."""
    try:
        yield
    except _FAILURES as error:
        raise CompileError(f"does not compile here: {first_line(error)}") from error


def words_of(provider: Compiled) -> str:
    """What it does."""
    if provider.startswith("budget-"):
        share = provider.removeprefix("budget-")
        return f"residual blocks and transformers under torch.compile, activation_memory_budget {share}, channels last"
    places = provider.removeprefix("compiled-")
    return f"the places of {places}; blocks and transformers under torch.compile, channels last"


def use_compiled(unet: Any, provider: Compiled, compiler: Compiler = compile_fx) -> Undo:
    """Make `unet` run by this provider; returns what undoes it. A graph is made when its shape first comes, and kept.

    compiler: inductor's; another for tests. Raises ValueError on fake tensors: no trace sees what inductor makes.
    """
    if isinstance(next(unet.parameters()), FakeTensor):
        raise ValueError(f"{provider} cannot be modelled, its kernels are inductor's; measure it or leave it out")
    undo = ExitStack()
    undo.enter_context(dynamo_config.patch(recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=MOST_GRAPHS))
    if provider.startswith("compiled-fine-grained"):
        undo.callback(place_fine_grained(unet, is_one_token=provider.endswith("one-token")))
    undo.callback(place(unet, _regions(provider, compiler)))
    undo.callback(_begin_channels_last(unet.conv_in))
    return undo.close


@cache
def _regions(provider: Compiled, compiler: Compiler) -> Mapping[type[nn.Module], Callable[..., Any]]:
    """The compiled forward of each kind, the same in every UNet of a process."""
    if provider.startswith("budget-"):
        compiler = partial(_compile_under_budget, compiler, float(provider.removeprefix("budget-")))
    is_whole = provider == "compiled-checkpoint"
    return {kind: _region(partial(whole, kind.forward) if is_whole else kind.forward, compiler) for kind in KINDS}


def _region(forward: Callable[..., Any], compiler: Compiler) -> Callable[..., Any]:
    """fullgraph: an error where torch would run something uncompiled, or compile no more."""

    def region(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = forward(block, *args, **kwargs)
        # A transformer ends with a copy into the other layout.
        return _channels_last(out) if isinstance(out, Tensor) else (_channels_last(out[0]),)

    return torch.compile(region, backend=compiler, fullgraph=True, dynamic=False)


def _compile_under_budget(compiler: Compiler, budget: float, graph: Any, inputs: Any) -> Any:
    with functorch_config.patch(activation_memory_budget=budget):
        return compiler(graph, inputs)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _begin_channels_last(conv: Any) -> Undo:
    """The first convolution reads channels last; what follows takes its input's layout."""
    forward = conv.forward
    conv.forward = lambda x: forward(_channels_last(x))
    return undo_forward(conv)
