"""Weights from every layout into the model, bit by bit; what differs is refused; the real model's names and shapes."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from tiny import MODEL
from torch import Tensor, nn
from weight_files import header, part, prefixed, to, write_pth, write_safetensors

import mmkernels
from mimicmotion.config import mimicmotion_72
from mimicmotion.model.pose_net import PoseNet
from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.model.weights import Weights, WeightsError, compare, load, read
from mimicmotion.model.weights.writing import cast, write_layout

State = dict[str, Tensor]
HALF = torch.float16
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def state() -> State:
    """A whole model's tensors, by its own names."""
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) * 0.1 for name, tensor in build_model(MODEL).state_dict().items()}


@pytest.fixture(scope="module")
def only_model() -> MimicMotionModel:
    return build_model(MODEL)


@pytest.fixture(scope="module")
def other_heads() -> MimicMotionModel:
    return build_model(dataclasses.replace(MODEL, num_attention_heads=(1, 1, 1, 2)))


@pytest.fixture
def model(only_model: MimicMotionModel) -> Iterator[MimicMotionModel]:
    """Made once; each test has it with nothing but zeros."""
    with torch.no_grad():
        for parameter in only_model.parameters():
            parameter.zero_()
    yield only_model


def _diffusers(folder: Path, state: State, *, kind: str = "safetensors", variant: str = "", shards: int = 0) -> Path:
    """As save_pretrained lays it out; PoseNet beside it as a pickle."""
    unet, write = part(state, "unet."), write_safetensors if kind == "safetensors" else write_pth
    config = {"_class_name": "UNetSpatioTemporalConditionModel", "num_attention_heads": list(MODEL.num_attention_heads)}
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    if shards:
        names = {name: f"{STEM}-{1 + i % shards:05}-of-{shards:05}.{kind}" for i, name in enumerate(unet)}
        for shard in set(names.values()):
            write(folder / "unet" / shard, {name: unet[name] for name in names if names[name] == shard})
        (folder / "unet" / f"{STEM}.{kind}.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        write(folder / "unet" / f"{STEM}.{variant}{kind}", unet)
    write_pth(folder / "pose_net" / f"{STEM}.bin", part(state, "pose_net."))
    return folder


def _whole_pipeline(state: State) -> State:
    """A state_dict of the module that upstream loads into: VAE and CLIP beside the model."""
    return {"vae.quant_conv.weight": torch.ones(8), "image_encoder.visual_projection.weight": torch.ones(4), **state}


def _trainer(state: State) -> dict[str, object]:
    """What trainers save: the weights as one entry among a step, an optimizer and an average."""
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5}]}
    return {"state_dict": prefixed(state, "module."), "epoch": 3, "optimizer": moments, "ema": {"decay": 0.99}}


def _compiled(state: State) -> State:
    """UNet and PoseNet compiled each, within DistributedDataParallel."""
    names = {name: "module." + name.replace("unet.", "unet._orig_mod.", 1) for name in state}
    return {names[name]: tensor for name, tensor in state.items()}


Written = tuple[Path, Path | None]
LAYOUTS: dict[str, tuple[torch.dtype, Callable[[Path, State], Written]]] = {
    "tencent pth": (HALF, lambda f, s: (write_pth(f / "MimicMotion_1-1.pth", s), None)),
    "tencent safetensors": (HALF, lambda f, s: (write_safetensors(f / "a.safetensors", s), None)),
    "a pickle called safetensors": (HALF, lambda f, s: (write_pth(f / "a.safetensors", s), None)),
    "a safetensors called pth": (HALF, lambda f, s: (write_safetensors(f / "a.pth", s), None)),
    "comfyui pair": (
        HALF,
        lambda f, s: (
            write_safetensors(f / "MimicMotionMergedUnet_1-1-fp16.safetensors", part(s, "unet.")),
            write_safetensors(f / "mimic_motion_pose_net.safetensors", part(s, "pose_net.")),
        ),
    ),
    "comfyui unet, pose net as pth": (
        HALF,
        lambda f, s: (
            write_safetensors(f / "u.safetensors", part(s, "unet.")),
            write_pth(f / "p.pth", part(s, "pose_net.")),
        ),
    ),
    "stableanimator files": (
        torch.float32,
        lambda f, s: (
            write_pth(f / "unet-3000.pth", part(s, "unet.")),
            write_pth(f / "pose_net-3000.pth", part(s, "pose_net.")),
        ),
    ),
    "stableanimator folder": (
        torch.float32,
        lambda f, s: (
            write_pth(f / "checkpoint-3000" / "unet-3000.pth", part(s, "unet.")).parent,
            write_pth(f / "checkpoint-3000" / "pose_net-3000.pth", part(s, "pose_net.")) and None,
        ),
    ),
    "diffusers fp16": (HALF, lambda f, s: (_diffusers(f / "d", s, variant="fp16."), None)),
    "diffusers shards": (HALF, lambda f, s: (_diffusers(f / "d", s, shards=3), None)),
    "diffusers bin shards": (HALF, lambda f, s: (_diffusers(f / "d", s, kind="bin", shards=2), None)),
    "unet folder and a PoseNet of Tencent's": (
        HALF,
        lambda f, s: (_diffusers(f / "d", s) / "unet", write_pth(f / "t.pth", s)),
    ),
    "wrappers": (HALF, lambda f, s: (write_pth(f / "c.pth", _compiled(s)), None)),
    "a trainer's": (torch.float32, lambda f, s: (write_pth(f / "t.ckpt", _trainer(s)), None)),
    "nested": (
        HALF,
        lambda f, s: (write_pth(f / "n.pt", {"unet": part(s, "unet."), "pose_net": part(s, "pose_net.")}), None),
    ),
    "a whole pipeline": (HALF, lambda f, s: (write_pth(f / "w.pth", _whole_pipeline(s)), None)),
    "float8": (torch.float8_e5m2, lambda f, s: (write_pth(f / "8.pth", s), None)),
}


SKIPPED = {
    "a whole pipeline": "skipped 1 tensors of {f}/w.pth: VAE, no part of the model\n"
    "skipped 1 tensors of {f}/w.pth: CLIP, no part of the model",
    "a trainer's": "skipped 1 tensors of {f}/t.ckpt: optimizer, no part of the model",
    "unet folder and a PoseNet of Tencent's": "{unet} tensors of {f}/t.pth were skipped: they are of a UNet",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_tensors_that_were_written(layout, state, model, tmp_path):
    dtype, write = LAYOUTS[layout]
    found = read(*write(tmp_path, to(state, dtype)))
    assert found.tensors.keys() == state.keys() and not compare(model, found)
    for name, tensor in found.tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, state[name].to(dtype)), name
    heads = list(MODEL.num_attention_heads) if (tmp_path / "d").exists() else None
    assert (found.config and found.config["num_attention_heads"]) == heads
    skipped = SKIPPED.get(layout, "").format(f=tmp_path, unet=len(state) - 19)
    assert [note for note in found.notes if "skipped" in note] == skipped.splitlines()


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_is_stored_in_less_is_copied_exactly(dtype, state, model, tmp_path):
    notes = load(model, read(write_safetensors(tmp_path / "a.safetensors", to(state, dtype))))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(dtype).float()), name
    assert f"{len(state)} in {str(dtype).removeprefix('torch.')}" in notes[0] and "head counts" in notes[1]


def test_an_older_torch_save_is_read(state, model, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load(model, read(tmp_path / "old.pth"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_unet_alone_leaves_pose_net_as_it_is(state, model, tmp_path):
    """Plain SVD img2vid-xt."""
    torch.nn.init.ones_(model.pose_net.final_proj.weight)
    before = {name: value.clone() for name, value in model.pose_net.state_dict().items()}
    folder = _diffusers(tmp_path / "svd", state) / "unet"
    notes = load(model, read(folder))
    assert all(torch.equal(value, state[f"unet.{name}"]) for name, value in model.unet.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.pose_net.state_dict().items())
    assert any("no PoseNet" in note for note in notes)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("tencent", torch.float32), ("comfyui", torch.float32), ("diffusers", torch.bfloat16), ("tencent", HALF)],
)
def test_round_trip(layout, dtype, state, model, other_heads, tmp_path):
    with torch.no_grad():
        load(model, Weights(source=tmp_path, tensors=state))
    undo = mmkernels.replace(model.unet, plan="fused")  # what is written must not depend on the kernels in place
    written = cast(model.state_dict(), dtype)
    undo()
    paths = write_layout(layout, tmp_path, written, model.unet, num_frames=72, metadata={"run": "demo"})
    found = read(tmp_path) if layout == "diffusers" else read(*paths)
    assert found.tensors.keys() == state.keys()
    for name, tensor in found.tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, state[name].to(dtype)), name
    if layout != "tencent":  # a .pth of tensors alone says nothing else
        with pytest.raises(WeightsError, match="has heads"):
            load(other_heads, found)


def test_diffusers_own_loader_reads_what_is_written(state, model, tmp_path):
    load(model, Weights(source=tmp_path, tensors=state))
    write_layout("diffusers", tmp_path, state, model.unet, num_frames=72, metadata={})
    loaded: Any
    info: Any
    loaded, info = UNetSpatioTemporalConditionModel.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        tmp_path, subfolder="unet", output_loading_info=True
    )
    assert not any(info.values()), info
    assert all(torch.equal(value, state[f"unet.{name}"]) for name, value in loaded.state_dict().items())


def test_upstreams_own_loading_finds_every_key(state, model, tmp_path):
    """Tencent's loader: torch.load to the CPU, load_state_dict that is not strict, over a module of these names."""
    (path,) = write_layout("tencent", tmp_path, to(state, HALF), model.unet, num_frames=72, metadata={})
    upstream = nn.Module()
    upstream.unet, upstream.pose_net = build_model(MODEL).unet, PoseNet(MODEL.block_out_channels[0])
    upstream.vae, upstream.image_encoder = nn.Linear(2, 2), nn.Linear(2, 2)
    found = upstream.load_state_dict(torch.load(path, map_location="cpu"), strict=False)
    assert path.name == "MimicMotion_1-1.pth" and not found.unexpected_keys
    assert {name.split(".")[0] for name in found.missing_keys} == {"vae", "image_encoder"}
    assert torch.equal(upstream.pose_net.scale, state["pose_net.scale"].half().float())


def test_comfyuis_wrapper_finds_its_files(state, model, tmp_path):
    """Its nodes.py: models/mimicmotion/ with two names on offer, and PoseNet in its own folder's models/."""
    for frames, name in ((72, "MimicMotionMergedUnet_1-1-fp16"), (16, "MimicMotionMergedUnet_1-0-fp16")):
        folder = tmp_path / str(frames)
        unet, pose_net = write_layout("comfyui", folder, state, model.unet, num_frames=frames, metadata={})
        assert unet == folder / "models" / "mimicmotion" / f"{name}.safetensors"
        own = folder / "custom_nodes" / "ComfyUI-MimicMotionWrapper" / "models"
        assert pose_net == own / "mimic_motion_pose_net.safetensors"
        # it loads the UNet's file key by key, then the other into UNet and PoseNet alike, not strictly
        unet_state, pose_state = read(unet).own_names.values(), read(unet, pose_net).own_names.values()
        assert set(unet_state) == set(model.unet.state_dict()) and "scale" in set(pose_state) - set(unet_state)
        assert not set(model.pose_net.state_dict()) & set(model.unet.state_dict())


def test_heads_that_no_shape_shows_are_refused_or_said(state, other_heads, tmp_path):
    with pytest.raises(WeightsError, match=r"heads \(2, 2, 4, 4\), and the model \(1, 1, 1, 2\)"):
        load(other_heads, read(_diffusers(tmp_path / "d", state)))
    notes = load(other_heads, read(write_pth(tmp_path / "t.pth", state)))
    assert any("taken as (1, 1, 1, 2)" in note for note in notes)


@pytest.fixture(scope="module")
def real() -> MimicMotionModel:
    with torch.device("meta"):
        return build_model(mimicmotion_72().model)


def _sparse(path: Path, shapes: dict[str, torch.Size]) -> Path:
    """A .safetensors of the real size, all zeros, which takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head, size = header({name: (torch.float8_e4m3fn, tuple(shape)) for name, shape in shapes.items()})
    with path.open("wb") as opened:
        opened.write(head)
        opened.truncate(len(head) + size)
    return path


def test_real_names_and_shapes_in_every_layout(real, tmp_path):
    state = real.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    unet, pose_net = (
        {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        for prefix in ("unet.", "pose_net.")
    )
    assert (len(unet), len(pose_net)) == (1428, 19)
    whole = {name: torch.zeros((), dtype=HALF).expand(shape) for name, shape in shapes.items()}
    files = [
        (write_pth(tmp_path / "MimicMotion_1-1.pth", whole), None),
        (_sparse(tmp_path / "u.safetensors", unet), _sparse(tmp_path / "p.safetensors", pose_net)),
        (write_pth(tmp_path / "unet-5.pth", part(whole, "unet.")), tmp_path / "p.safetensors"),
        (_sparse(tmp_path / "d" / "unet" / f"{STEM}.safetensors", unet).parent, tmp_path / "MimicMotion_1-1.pth"),
    ]
    real.unet.save_config(tmp_path / "d" / "unet")
    for path, beside in files:
        found = read(path, beside)
        assert len(found.tensors) == 1447 and not compare(real, found), path
    off_by_one = dict(whole) | {"pose_net.final_proj.weight": torch.zeros(1, dtype=HALF).expand(320, 64, 1, 1)}
    report = compare(real, read(write_pth(tmp_path / "wrong.pth", off_by_one)))
    assert report.wrong_shape == ["pose_net.final_proj.weight: weights (320, 64, 1, 1), model (320, 128, 1, 1)"]


@pytest.mark.parametrize("layout", ["tencent", "comfyui", "diffusers"])
def test_real_names_are_written(layout, real, tmp_path):
    tensors = {name: torch.zeros(0) for name in real.state_dict()}
    paths = write_layout(layout, tmp_path, tensors, real.unet, num_frames=72, metadata={})
    assert read(*paths).tensors.keys() == tensors.keys() if layout != "diffusers" else True
    assert len(read(tmp_path if layout == "diffusers" else paths[0]).tensors) == (1428 if layout == "comfyui" else 1447)


def test_released_sizes_with_the_class_defaults_heads_are_refused(tmp_path):
    config = dataclasses.replace(mimicmotion_72().model, num_attention_heads=(5, 10, 10, 20))
    with torch.device("meta"):
        model = build_model(config)
    with pytest.raises(WeightsError, match=r"\(5, 10, 20, 20\)"):
        load(model, Weights(source=tmp_path / "MimicMotion_1-1.pth", tensors=model.state_dict()))
