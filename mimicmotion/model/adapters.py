"""LoRA in the UNet's transformers, through peft: W stays frozen and narrow, adapters and PoseNet train in float32.

y = x (W + alpha / rank * B A)^T + b (arXiv 2106.09685), with A of small random numbers and B of zeros at first, so
that training begins at the weights that the adapters are for. With W of int8 or nf4 it is QLoRA (arXiv 2305.14314).
"""

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily

import mmkernels
from mimicmotion.config import FrozenWeights, LoraConfig, Precision
from mimicmotion.model.unet import MimicMotionModel, num_parameters
from mmkernels.optional import optional

NAME = "default"  # peft's own for a model's only adapter
_TARGETS = {
    "all": r"\.(temporal_)?transformer_blocks\.",
    "temporal": r"\.temporal_transformer_blocks\.",
    "spatial": r"\.transformer_blocks\.",
}
_IN_TRANSFORMERS = _TARGETS["all"]
_FACTOR = re.compile(rf"\.lora_[AB]\.{NAME}\.weight$")


def adapt(model: MimicMotionModel, config: LoraConfig, precision: Precision) -> list[str]:
    """Freeze the UNet, bring it into `config.base` and put adapters into it, in place; returns what to say of it.

    Nothing where the rank is 0. Call it once the weights are there, before the blocks are replaced. Layers that no
    gradient reaches with one token of context get no adapter. Raises ValueError where the target names no layer, and
    ModuleNotFoundError where a package is missing.
    """
    if not config.rank:
        return []
    layers = _layers(model.unet, config.target)
    if not is_fake(next(model.unet.parameters())):
        model.base_sha256 = sha256_of(model.state_dict())
    model.unet.requires_grad_(False)
    model.pose_net.requires_grad_(config.pose_net)
    whole = num_parameters(model)  # before quantised ones are packed
    base = config.base if config.base != "precision" else "bf16" if precision == "bf16" else "fp32"
    _narrow(model.unet, base)
    _inject(model.unet, layers, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return [
        f"LoRA of rank {config.rank} on {len(layers)} layers of the UNet (lora.target {config.target}), its own "
        f"weights frozen in {base}; PoseNet is {'trained' if config.pose_net else 'frozen'}: {trained:,} "
        f"parameters are trained beside {whole:,} of its own"
    ]


def is_adapters(name: str) -> bool:
    """Whether a tensor of a model is a factor of an adapter, by its name."""
    return _FACTOR.search(name) is not None


def own_state(model: MimicMotionModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint keeps: all of them, or those of adapters and PoseNet where there are adapters."""
    state = model.state_dict()
    if model.base_sha256 is None:
        return state
    return {name: x for name, x in state.items() if is_adapters(name) or name.startswith("pose_net.")}


def load_own(model: MimicMotionModel, tensors: Mapping[str, Tensor]) -> None:
    """Take up what `own_state` gave. Raises ValueError where names differ."""
    if differing := sorted(own_state(model).keys() ^ tensors.keys()):
        raise ValueError(
            f"the checkpoint holds other tensors: {len(differing)} differ, first {differing[:3]}; use the model and "
            "the lora settings it was saved with."
        )
    model.load_state_dict(tensors, strict=False)  # what is not its own is frozen


def check_base(found_sha256: str | None, saved_sha256: str | None) -> None:
    """Raise ValueError where adapters were trained for other weights than there are."""
    if saved_sha256 != found_sha256:
        raise ValueError(
            f"the adapters are for other weights than model.pretrained has now (SHA-256 {str(saved_sha256)[:12]}, now "
            f"{str(found_sha256)[:12]}); give the weights that they were trained on."
        )


def sha256_of(state: Mapping[str, Tensor]) -> str:
    """Of the UNet's tensors, by the model's own names, in float32: what adapters are for."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if name.startswith("unet."):
            found.update(name.encode())
            found.update(tensor.detach().to("cpu", torch.float32).contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def merged(state: Mapping[str, Tensor], adapters: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """W + weight * B A in the place of each W that has an adapter, in float32; `state` by the model's own names."""
    whole = dict(state)
    for name, a, b in pairs(adapters):
        key = f"{name}.weight"
        whole[key] = state[key].float() + weight * (b.float() @ a.float())
    return whole


def pairs(adapters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name of a layer, A (rank, C) and B (K, rank) of each adapter."""
    marker = f".lora_A.{NAME}.weight"
    for key in sorted(adapters):
        if key.endswith(marker):
            name = key.removesuffix(marker)
            yield name, adapters[key], adapters[f"{name}.lora_B.{NAME}.weight"]


def weight_of(config: LoraConfig) -> float:
    """alpha / rank."""
    return 1.0 if config.alpha is None else config.alpha / config.rank


def _layers(unet: nn.Module, target: str) -> list[str]:
    """Names of the linear layers that get an adapter."""
    pattern = re.compile(_TARGETS.get(target, target))
    dead = {name.removesuffix(".weight") for name in mmkernels.dead_parameters(unet)}
    linear = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear) and name not in dead]
    found = [name for name in linear if pattern.search(name)]
    if not found:
        raise ValueError(
            f"lora.target: {target!r} is in no name of a linear layer of the UNet, such as {linear[-1]}; give all, "
            "temporal, spatial or a pattern that is."
        )
    return found


def _narrow(unet: nn.Module, base: FrozenWeights) -> None:
    """Matrices and kernels of convolutions in `base`, in place; vectors (of norms, biases) stay float32.

    int8 and nf4 are for the linear layers of transformers, which hold most of the parameters; the rest is bfloat16.
    Among fake tensors, of which bitsandbytes can make none, int8 stands for nf4: plans are for a little more.
    """
    if base == "nf4" and is_fake(next(unet.parameters())):
        base = "int8"
    if base == "fp32":
        return
    for module in unet.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim > 1:
                setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
    if base == "int8":
        quantization = optional("torchao.quantization", "lora.base int8")
        kind = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(unet, kind, filter_fn=lambda module, name: _is_in_transformers(module, name))
    elif base == "nf4":
        _quantise_nf4(unet)


def _is_in_transformers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and re.search(_IN_TRANSFORMERS, name) is not None


def _quantise_nf4(unet: nn.Module) -> None:
    """By bitsandbytes, whose layers hold the numbers in blocks of 64 with a scale each."""
    layers = optional("bitsandbytes.nn", "lora.base nf4")
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and _is_in_transformers(module, name):
            narrow = layers.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.bfloat16
            )
            narrow.weight = layers.Params4bit(module.weight.detach(), requires_grad=False, quant_type="nf4")
            narrow.bias = module.bias
            unet.set_submodule(name, narrow.to(module.weight.device))  # which is when it is quantised


def _inject(unet: nn.Module, layers: list[str], config: LoraConfig) -> None:
    """Adapters as peft has them, in float32 whatever the layer is of: A as nn.Linear begins, B of zeros."""
    device = next(unet.parameters()).device
    peft = optional("peft", "lora.rank")
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=layers, lora_dropout=0.0, bias="none"
    )
    # peft makes them without memory, and could not move them among fake ones
    with unset_fake_temporarily(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TorchaoLoraLinear")  # of its own merging, which is not used
        peft.inject_adapter_in_model(settings, unet, adapter_name=NAME, low_cpu_mem_usage=True)
    for module in unet.modules():
        if not hasattr(module, "lora_A"):
            continue
        for group in ("lora_A", "lora_B"):
            factor = getattr(module, group)[NAME]
            factor.weight = nn.Parameter(torch.zeros(factor.weight.shape, device=device))
        nn.init.kaiming_uniform_(module.lora_A[NAME].weight, a=math.sqrt(5))  # pyright: ignore
