import pytest
import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from tiny import MODEL
from torch._subclasses.fake_tensor import FakeTensorMode

from mimicmotion.config import mimicmotion_72
from mimicmotion.model.unet import build_model, model_input, num_parameters, reference_latents


def _inputs(B=1, F=3):
    torch.manual_seed(1)
    return {
        "sample": torch.randn(B, F, 8, 8, 8),
        "timestep": torch.randn(B),
        "image_embedding": torch.randn(B, 1, 32),
        "time_ids": torch.tensor([[6.0, 127.0, 0.0]]).expand(B, -1),
        "pose": torch.rand(B, F, 3, 64, 64),
    }


def _model():
    torch.manual_seed(0)
    model = build_model(MODEL)
    torch.nn.init.normal_(model.pose_net.final_proj.weight, std=0.1)
    return model


def test_released_configuration_has_the_released_parameters_and_keys():
    with FakeTensorMode():
        model = build_model(mimicmotion_72().model)
    assert num_parameters(model.unet) == 1_524_623_082
    assert len(model.unet.state_dict()) == 1_428
    assert num_parameters(model.pose_net) == 205_557
    assert {key.split(".")[0] for key in model.state_dict()} == {"unet", "pose_net"}
    assert tuple(model.unet.config["num_attention_heads"]) == (5, 10, 20, 20)
    attention = model.unet.get_submodule("down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1")
    assert attention.heads == 5
    assert model.unet.config["projection_class_embeddings_input_dim"] == 768


@torch.no_grad()
def test_pose_features_are_added_once_right_after_the_first_convolution():
    model, inputs = _model(), _inputs()
    features = model.pose_net(inputs["pose"][0])
    with_pose = model(**inputs)
    # the same sum by another way: conv_in's output is the only place where a bias per pixel can be put in
    conv_in, seen = model.unet.conv_in, []

    class Shifted(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return conv_in(x) + features

    model.unet.conv_in = Shifted()  # pyright: ignore[reportAttributeAccessIssue]
    plain = model(**(inputs | {"pose": None}))
    model.unet.conv_in = conv_in
    assert len(seen) == 1
    assert torch.equal(with_pose, plain)
    assert not torch.allclose(with_pose, model(**(inputs | {"pose": None})))


@torch.no_grad()
def test_the_share_of_poses_is_of_the_clips_that_keep_them():
    model, inputs = _model(), _inputs(B=2)
    plain = model(**inputs, pose_keep=torch.tensor([1.0, 0.0]))
    assert model.pose_squares is None
    model.pose_squares = []
    assert torch.equal(model(**inputs, pose_keep=torch.tensor([1.0, 0.0])), plain)
    features = model.pose_net(inputs["pose"][0])
    whole = model.unet.conv_in(inputs["sample"][0]) + features
    wanted = torch.stack([features.square().sum(), whole.square().sum()])
    torch.testing.assert_close(model.pose_squares, [wanted], rtol=1e-5, atol=0)


@torch.no_grad()
def test_hook_is_gone_after_the_call_and_after_an_error():
    model, inputs = _model(), _inputs()
    assert type(model.unet) is UNetSpatioTemporalConditionModel
    model(**inputs)
    with pytest.raises(RuntimeError):
        model(**(inputs | {"time_ids": torch.zeros(1, 5)}))
    assert not model.unet.conv_in._forward_hooks


@torch.no_grad()
def test_dropped_pose_is_no_pose_for_that_clip_only():
    model, inputs = _model(), _inputs(B=2)
    mixed = model(**inputs, pose_keep=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(mixed[0], model(**inputs)[0])
    torch.testing.assert_close(mixed[1], model(**(inputs | {"pose": None}))[1])


def test_pose_of_another_length_is_refused():
    with pytest.raises(ValueError, match="pose is for"):
        _model()(**(_inputs() | {"pose": torch.rand(1, 2, 3, 64, 64)}))


def test_reference_follows_the_noise_on_the_channels():
    noisy, reference = torch.zeros(2, 3, 4, 5, 6), torch.arange(2 * 4 * 5 * 6.0).view(2, 4, 5, 6) + 1
    joined = model_input(noisy, reference_latents(reference, 3))
    assert joined.shape == (2, 3, 8, 5, 6)
    assert not joined[:, :, :4].any()
    for frame in range(3):
        assert torch.equal(joined[:, frame, 4:], reference)
