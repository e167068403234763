import dataclasses
import json

import pytest
import safetensors.torch
import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from tiny import MODEL
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels
from mimicmotion.config import mimicmotion_72
from mimicmotion.model.unet import build_model
from mimicmotion.model.weights import (
    Weights,
    WeightsError,
    load,
    read,
    write_comfyui,
    write_diffusers,
    write_tencent,
)


def _model(seed, **changes):
    torch.manual_seed(seed)
    model = build_model(dataclasses.replace(MODEL, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def _write(model, layout, folder, dtype):
    if layout == "tencent":
        write_tencent(model, folder / "MimicMotion_1-1.pth", dtype)
        return folder / "MimicMotion_1-1.pth", None
    if layout == "comfyui":
        write_comfyui(model, folder / "unet.safetensors", folder / "pose_net.safetensors", dtype)
        return folder / "unet.safetensors", folder / "pose_net.safetensors"
    write_diffusers(model, folder / "released", dtype)
    return folder / "released", None


@pytest.mark.parametrize("layout", ["tencent", "comfyui", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip(layout, dtype, tmp_path):
    model, other = _model(0), _model(1)
    mmkernels.replace(model.unet, plan="fused")  # what is exported must not depend on the kernels in place
    load(other, read(*_write(model, layout, tmp_path, dtype)))
    state = model.state_dict()
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key].to(dtype).float()), key


def test_layouts_are_the_released_ones(tmp_path):
    model = _model(0)
    path, _ = _write(model, "tencent", tmp_path, torch.float16)
    stored = torch.load(path, weights_only=True)
    assert set(stored) == set(model.state_dict()) and "unet.conv_in.weight" in stored and "pose_net.scale" in stored
    assert {value.dtype for value in stored.values()} == {torch.float16}
    unet, pose_net = _write(model, "comfyui", tmp_path, torch.float16)
    assert "conv_in.weight" in safetensors.torch.load_file(unet)
    assert len(safetensors.torch.load_file(pose_net or unet)) == 19
    folder, _ = _write(model, "diffusers", tmp_path, torch.float32)
    loaded = UNetSpatioTemporalConditionModel.from_pretrained(folder, subfolder="unet")
    assert all(torch.equal(value, model.unet.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_sharded_folder_and_unet_alone(tmp_path):
    model, other = _model(0), _model(1)
    before = {key: value.clone() for key, value in other.pose_net.state_dict().items()}
    model.unet.save_pretrained(tmp_path, max_shard_size="500KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    notes = load(other, read(tmp_path))
    assert all(torch.equal(value, model.unet.state_dict()[key]) for key, value in other.unet.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in other.pose_net.state_dict().items())
    assert any("no PoseNet" in note for note in notes)


def test_every_difference_is_reported_and_nothing_is_loaded(tmp_path):
    model = _model(0)
    tensors = dict(_model(1).state_dict())
    tensors["unet.conv_in.weigth"] = tensors.pop("unet.conv_in.weight")
    tensors["unet.conv_in.bias"] = torch.zeros(7)
    torch.save(tensors, tmp_path / "wrong.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load(model, read(tmp_path / "wrong.pth"))
    for line in (
        "missing: 1",
        "unexpected: 1",
        "wrong shape: 1",
        "unet.conv_in.weigth",
        "unet.conv_in.bias: weights (7,)",
    ):
        assert line in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tencent_file_without_pose_net_is_refused(tmp_path):
    model = _model(0)
    torch.save({key: value for key, value in model.state_dict().items() if key.startswith("unet.")}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="missing: 19"):
        load(model, read(tmp_path / "a.pth"))


def test_wrong_head_count_is_refused_though_every_shape_fits(tmp_path):
    folder, _ = _write(_model(0), "diffusers", tmp_path, torch.float32)
    with pytest.raises(WeightsError, match="heads"):
        load(_model(1, num_attention_heads=(1, 1, 1, 2)), read(folder))
    notes = load(
        _model(1, num_attention_heads=(1, 1, 1, 2)), read(*_write(_model(0), "tencent", tmp_path, torch.float32))
    )
    assert any("does not say its head counts" in note for note in notes)


def test_released_sizes_with_the_class_defaults_heads_are_refused(tmp_path):
    config = dataclasses.replace(mimicmotion_72().model, num_attention_heads=(5, 10, 10, 20))
    with FakeTensorMode():
        model = build_model(config)
        weights = Weights(source=tmp_path / "MimicMotion_1-1.pth", tensors=model.state_dict())
        with pytest.raises(WeightsError, match=r"\(5, 10, 20, 20\)"):
            load(model, weights)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"unet.conv_in.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_unknown_layout_says_what_to_give(tmp_path):
    for path in (tmp_path / "weights.bin", tmp_path):
        with pytest.raises(WeightsError, match="give a"):
            read(path)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(WeightsError, match=r"no diffusion_pytorch_model.safetensors"):
        read(tmp_path)
