import math

import torch
from torch.nn import functional as F_

from mimicmotion.model.pose_net import PoseNet


def test_tensors_and_parameters_are_the_released_ones():
    state = PoseNet().state_dict()
    shapes = {
        0: (3, 3, 3, 3), 2: (16, 3, 4, 4), 4: (16, 16, 3, 3), 6: (32, 16, 4, 4), 8: (32, 32, 3, 3),
        10: (64, 32, 4, 4), 12: (64, 64, 3, 3), 14: (128, 64, 3, 3),
    }  # fmt: skip
    wanted = {f"conv_layers.{i}.weight": shape for i, shape in shapes.items()}
    wanted |= {f"conv_layers.{i}.bias": shape[:1] for i, shape in shapes.items()}
    wanted |= {"final_proj.weight": (320, 128, 1, 1), "final_proj.bias": (320,), "scale": (1,)}
    assert {key: tuple(value.shape) for key, value in state.items()} == wanted
    assert len(state) == 19 and sum(value.numel() for value in state.values()) == 205_557


def test_initial_values():
    torch.manual_seed(0)
    state = PoseNet().state_dict()
    assert float(state["scale"]) == 2.0
    assert not state["final_proj.weight"].any() and not state["final_proj.bias"].any()
    for i, (kernel, channels) in {12: (3, 64), 14: (3, 64), 10: (4, 32)}.items():
        wanted = math.sqrt(2 / (kernel * kernel * channels))
        assert abs(float(state[f"conv_layers.{i}.weight"].std()) / wanted - 1) < 0.03
        assert not state[f"conv_layers.{i}.bias"].any()


def test_output_is_the_convolutions_times_the_scale():
    torch.manual_seed(0)
    net = PoseNet(32)
    torch.nn.init.normal_(net.final_proj.weight)
    state, x = net.state_dict(), torch.rand(2, 3, 64, 48) * 2 - 1
    wanted = x
    for i, stride in zip(range(0, 16, 2), (1, 2, 1, 2, 1, 2, 1, 1), strict=True):
        wanted = F_.conv2d(wanted, state[f"conv_layers.{i}.weight"], state[f"conv_layers.{i}.bias"], stride, padding=1)
        wanted = wanted * torch.sigmoid(wanted)
    wanted = 2.0 * F_.conv2d(wanted, state["final_proj.weight"])
    assert net(x).shape == (2, 32, 8, 6)
    torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-5)


def test_features_keep_the_dtype_of_the_products_under_autocast():
    """In float32 they would make every residual of the UNet's first level float32: 9 GiB at 72 frames."""
    with torch.autocast("cpu", torch.bfloat16):
        assert PoseNet(32)(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16


def test_recomputed_activations_give_the_same_bits_and_halve_what_is_kept():
    torch.manual_seed(0)
    net, x = PoseNet(32), torch.rand(2, 3, 64, 48) * 2 - 1
    torch.nn.init.normal_(net.final_proj.weight)
    results, kept = [], []
    for net.recomputes_activations in (False, True):
        saved = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
        )
        with hooks:
            y = net(x)
        kept.append(sum(t.numel() for t in saved.values() if t.ndim == 4 and t.shape[0] == 2))
        results.append([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    outputs = 2 * 64 * 48 * (3 + 3 + 16 / 4 + 16 / 4 + 32 / 16 + 32 / 16 + 64 / 64 + 64 / 64 + 128 / 64)
    assert kept[1] <= outputs + 2 * 8 * 6 * 32  # the picture, each convolution's output once, and the features
    assert kept[0] > 1.7 * outputs
