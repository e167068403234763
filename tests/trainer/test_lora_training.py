"""Training adapters: what moves, what a checkpoint keeps, every frozen base, and the merged weights' latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file
from tiny import MODEL, NoiseClips, tiny_config
from torch import Tensor

import mmkernels
from mimicmotion import export
from mimicmotion.config import Config, LoraConfig, mimicmotion_16
from mimicmotion.model import weights
from mimicmotion.model.adapters import adapt, is_adapters, merged, own_state, pairs, weight_of
from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.planning.dry_run import dry_run
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history
from mimicmotion.sampling import generation, sampler
from mimicmotion.trainer import Trainer

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to begin with, whose PoseNet does something."""
    torch.manual_seed(11)
    model = build_model(MODEL)
    torch.nn.init.normal_(model.pose_net.final_proj.weight, std=0.1)
    path = tmp_path_factory.mktemp("released") / "MimicMotion.pth"
    torch.save(model.state_dict(), path)
    return path


def lora_config(
    run_dir: Path, released: Path, *, kernels: str = "fused", precision: str = "fp32", **lora: Any
) -> Config:
    config = tiny_config(run_dir, num_frames=3, size=64, precision=precision)
    return dataclasses.replace(
        config,
        kernels=kernels,  # pyright: ignore[reportArgumentType]
        model=dataclasses.replace(config.model, pretrained=released),
        lora=LoraConfig(**{"rank": 4, "alpha": 8.0} | lora),
        data=dataclasses.replace(config.data, prepared=run_dir / "prepared"),
    )


def train(config: Config, **options: Any) -> Trainer:
    trainer = Trainer(config, NoiseClips(config=config), ONE, **options)
    trainer.run()
    return trainer


def test_adapters_and_pose_net_move_and_nothing_else(tmp_path: Path, released: Path) -> None:
    config = lora_config(tmp_path, released)
    trainer = Trainer(config, NoiseClips(config=config), ONE)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    theirs = torch.load(released, weights_only=True)
    frozen = {name.replace(".base_layer.", "."): x for name, x in before.items() if not is_adapters(name)}
    assert frozen.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in frozen.items())
    trainer.run()
    moved = {name for name, x in trainer.model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if is_adapters(name) or name.startswith("pose_net.")}
    # every linear layer of the transformers, but the queries, keys of the cross-attention over one token
    linear = {name for name, x in theirs.items() if "transformer_blocks" in name and x.ndim == 2}
    dead = {name for name in linear if "attn2.to_q" in name or "attn2.to_k" in name}
    assert {f"{name}.weight" for name, _, _ in pairs(before)} == linear - dead and len(dead) == 40
    assert trainer.optimization.live.keys() == moved
    assert all_fused(trainer)


def all_fused(trainer: Trainer) -> bool:
    return {(row.how, row.why) for row in mmkernels.report(trainer.model.unet).rows} == {("fused", "")}


@pytest.mark.parametrize(("target", "wanted"), [
    ("temporal", "temporal_transformer_blocks"), ("spatial", ".transformer_blocks"), (r"attn1\.to_[qv]$", "attn1.to_"),
])  # fmt: skip
def test_target(target: str, wanted: str) -> None:
    model = build_model(MODEL)
    adapt(model, LoraConfig(rank=2, target=target, pose_net=False), "fp32")
    names = [name for name, _, _ in pairs(model.state_dict())]
    assert names and all(wanted in name for name in names)
    assert all(is_adapters(name) for name, x in model.named_parameters() if x.requires_grad)


def test_a_resumed_run_has_the_same_bits_and_its_checkpoint_holds_no_frozen_weights(
    tmp_path: Path, released: Path
) -> None:
    config = lora_config(tmp_path / "whole", released)
    whole = own_state(train(config).model)
    half = lora_config(tmp_path / "half", released)
    short = dataclasses.replace(half, trainer=dataclasses.replace(half.trainer, num_steps=2))
    train(short)
    resumed = own_state(train(half, resume=True).model)
    assert resumed.keys() == whole.keys() and all(torch.equal(x, whole[name]) for name, x in resumed.items())
    folder = checkpoint.newest(half.run_dir)
    assert folder is not None
    kept = checkpoint.load(folder).tensors["model"]
    assert all(is_adapters(name) or name.startswith("pose_net.") for name in kept) and kept.keys() == whole.keys()


ROUNDED = 1e-4  # latents begin at 700, and a float32 of that size is known to 6e-5


def latents_of(model: MimicMotionModel, config: Config) -> Tensor:
    """By a model in float64; sampling itself keeps latents in float32."""
    clip = NoiseClips(config=config).sample(0, 0)
    names = ("reference_latent", "image_embedding", "pose")
    conditions = sampler.Conditions(**{name: clip[name].unsqueeze(0).double() for name in names})
    noise = torch.randn(1, *clip["latents"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"guidance": 2.0, "tile": 3, "overlap": 0, "fps": 7, "motion_bucket": 127}
    return sampler.sample(model.double(), conditions, noise, num_steps=2, **settings)


@pytest.mark.parametrize("kernels", [pytest.param("torch", marks=pytest.mark.deep), "fused"])
def test_the_adapter_on_its_base_gives_the_latents_of_the_merged_weights(
    kernels: Any, tmp_path: Path, released: Path
) -> None:
    config = lora_config(tmp_path, released)
    train(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.05)))
    _, adapted, folder = generation.load_averaged(config.run_dir, kernels)
    adapters, theirs = own_state(adapted), torch.load(released, weights_only=True)
    state = merged(theirs, adapters, weight_of(config.lora))
    plain, base = (build_model(MODEL).eval().requires_grad_(False) for _ in range(2))
    plain.load_state_dict(state | {name: x for name, x in adapters.items() if name.startswith("pose_net.")})
    base.load_state_dict(theirs)
    expected = latents_of(plain, config)
    assert (latents_of(adapted, config) - expected).abs().max() < ROUNDED * expected.abs().max()
    assert (latents_of(base, config) - expected).abs().max() > 1e-2 * expected.abs().max()  # they do something
    assert checkpoint.load(folder).documents["base"]["sha256"] == adapted.base_sha256


class UNetWithAdapters(UNetSpatioTemporalConditionModel, PeftAdapterMixin):
    """As the model card has it: diffusers' class for SVD takes no adapters by itself."""


def test_exports_give_the_latents_of_the_run(tmp_path: Path, released: Path) -> None:
    """Merged weights as a start; the adapter alone by diffusers' own loader, on the UNet that it was trained on."""
    config = lora_config(tmp_path / "run", released)
    train(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.05)))
    _, adapted, _ = generation.load_averaged(config.run_dir, "torch")
    expected = latents_of(adapted, config)
    whole = export.run(export.Arguments(run_dir=config.run_dir, dtype="fp32"))
    read = weights.read(whole / "MimicMotion_1.pth").tensors
    model = build_model(MODEL).eval().requires_grad_(False)
    model.load_state_dict(dict(read))
    assert (latents_of(model, config) - expected).abs().max() < ROUNDED * expected.abs().max()

    alone = export.run(export.Arguments(run_dir=config.run_dir, layout="diffusers", lora="adapter", dtype="fp32"))
    model = build_model(MODEL).eval().requires_grad_(False)
    model.load_state_dict(torch.load(released, weights_only=True))
    model.unet.__class__ = UNetWithAdapters
    model.unet.load_lora_adapter(alone, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    pose_net = load_file(alone / "pose_net" / "diffusion_pytorch_model.safetensors")
    model.pose_net.load_state_dict(pose_net)
    assert (latents_of(model, config) - expected).abs().max() < ROUNDED * expected.abs().max()

    theirs = export.run(export.Arguments(run_dir=config.run_dir, layout="comfyui", lora="adapter", dtype="fp32"))
    kohya = load_file(theirs / "models" / "loras" / "MimicMotion_lora.safetensors")
    name = "lora_unet_down_blocks_0_attentions_0_temporal_transformer_blocks_0_attn1_to_q"
    layer: Any = adapted.unet.get_submodule("down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q")
    added = kohya[f"{name}.lora_up.weight"] @ kohya[f"{name}.lora_down.weight"] * kohya[f"{name}.alpha"] / 4
    torch.testing.assert_close(added, layer.get_delta_weight("default").float())
    with pytest.raises(ValueError, match="Tencent's layout has no form for adapters"):
        export.run(export.Arguments(run_dir=config.run_dir, lora="adapter"))


@pytest.fixture(scope="module")
def unnarrowed(tmp_path_factory: pytest.TempPathFactory, released: Path) -> list[float]:
    """Losses of two steps with the frozen weights in float32."""
    return losses(two_steps(tmp_path_factory.mktemp("unnarrowed"), released, "fp32"))


def two_steps(run_dir: Path, released: Path, base: str) -> Trainer:
    config = lora_config(run_dir, released, base=base, precision="bf16")
    return train(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_steps=2, batch_size=1)))


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in read_history(trainer.config.run_dir / "loss.jsonl")]


@pytest.mark.parametrize(("base", "most"), [("bf16", 0.51), ("int8", 0.45), ("nf4", 0.41)])
def test_frozen_bases(base: str, most: float, tmp_path: Path, released: Path, unnarrowed: list[float]) -> None:
    """most: bytes of the frozen weights over those of float32; of this model convolutions are the larger part."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    trainer = two_steps(tmp_path, released, base)
    assert all_fused(trainer)
    assert all(x.dtype == torch.float32 for x in trainer.optimization.live.values())
    frozen = [x for name, x in trainer.model.named_parameters() if not x.requires_grad]
    num_bytes, whole = sum(map(num_stored, frozen)), sum(4 * x.numel() for x in map(dense, frozen))
    assert num_bytes < most * whole
    # a quantised base is another model, but nearly the same one
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(unnarrowed), rtol=2e-2, atol=0)


def dense(x: Any) -> Tensor:
    return x if type(x).__name__ != "Params4bit" else torch.empty(x.quant_state.shape, device="meta")


def num_stored(x: Any) -> int:
    if type(x).__name__ == "Params4bit":
        return x.data.nbytes + x.quant_state.absmax.nbytes
    if hasattr(x, "__tensor_flatten__"):
        return sum(getattr(x, part).nbytes for part in x.__tensor_flatten__()[0])
    return x.nbytes


def test_adapters_of_another_base_are_refused(tmp_path: Path, released: Path) -> None:
    config = lora_config(tmp_path / "run", released)
    train(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_steps=1)))
    theirs = torch.load(released, weights_only=True)
    theirs["unet.conv_in.bias"][0] += 1
    other = tmp_path / "other.pth"
    torch.save(theirs, other)
    moved = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=other))
    with pytest.raises(ValueError, match=r"the adapters are for other weights than model.pretrained has now"):
        Trainer(moved, NoiseClips(config=moved), ONE, resume=True)


@pytest.mark.deep
def test_a_dry_run_counts_frozen_weights(released: Path) -> None:
    """The UNet's matrices in two bytes; float32, gradients, two moments and an average of what is trained."""
    preset = mimicmotion_16()
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, pretrained=released),
        lora=LoraConfig(rank=16),
        data=dataclasses.replace(preset.data, height=64, width=64, num_frames=8),
    )
    found = dry_run(config)
    # rank * (inputs + outputs) of each of 16 spatial and 16 temporal transformer blocks' layers, and PoseNet
    assert found.num_trained == 16 * sum(block_sides(C) for C in CHANNELS_OF_ATTENTIONS) + 205_557
    frozen = 1_524_623_082
    assert found.cost.resident_bytes == pytest.approx(2 * frozen + 16 * found.num_trained, rel=2e-3)


@pytest.mark.deep
def test_a_dry_run_counts_quantised_weights(tmp_path: Path, released: Path) -> None:
    """As many bytes, in pieces of 512, as the same weights take that are not fake; nf4 is planned for as int8."""
    resident = {
        base: dry_run(lora_config(tmp_path, released, base=base, precision="bf16")).cost.resident_bytes
        for base in ("bf16", "int8", "nf4")
    }
    model = build_model(MODEL)
    adapt(model, LoraConfig(rank=4, base="bf16"), "bf16")
    narrow = build_model(MODEL)
    adapt(narrow, LoraConfig(rank=4, base="int8"), "bf16")
    saved = sum(map(num_allocated, model.parameters())) - sum(map(num_allocated, narrow.parameters()))
    assert saved > 2**20 and resident["bf16"] - resident["int8"] == saved
    assert resident["nf4"] == resident["int8"]


def num_allocated(x: Any) -> int:
    parts = [getattr(x, part) for part in x.__tensor_flatten__()[0]] if hasattr(x, "__tensor_flatten__") else [x]
    return sum(-(-part.nbytes // 512) * 512 for part in parts)


CHANNELS_OF_ATTENTIONS = [320] * 5 + [640] * 5 + [1280] * 6


def block_sides(C: int) -> int:
    """Sum of inputs and outputs of the adapted layers of a spatial and of a temporal block."""
    attention = 4 * 2 * C + (1024 + C) + 2 * C  # q, k, v, out; over the context only v and out
    feed_forward = (C + 8 * C) + (4 * C + C)
    return 2 * attention + 3 * feed_forward


def test_settings_that_do_not_go_together(released: Path, tmp_path: Path) -> None:
    good = lora_config(tmp_path, released)
    for change, words in [
        ({"model": MODEL}, "model.pretrained is None; give the weights that adapters are for"),
        ({"optimizer": dataclasses.replace(good.optimizer, train="pose_net")}, "lora.target and lora.pose_net"),
        ({"lora": LoraConfig(rank=2, base="int8")}, "trainer.precision bf16 with it"),
    ]:
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(good, **change)
    with pytest.raises(ValueError, match=r"lora.target: 'nothing' is in no name of a linear layer"):
        adapt(build_model(MODEL), LoraConfig(rank=2, target="nothing"), "fp32")
    with pytest.raises(ValueError, match=r"lora.target: '\(' is no pattern"):
        LoraConfig(target="(")
