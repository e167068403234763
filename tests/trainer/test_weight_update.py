import sys

import pytest
import torch

from mimicmotion.config import OptimizerConfig
from mimicmotion.optimization import weight_update
from mimicmotion.optimization.moving_average import MovingAverage
from mimicmotion.optimization.optimizer import Optimization
from mimicmotion.optimization.weight_update import WeightUpdate
from mmkernels.costs import modelled_device
from mmkernels.kernels.launch import carried_out_by

SHAPES = {"wide": (64, 24, 3, 3), "bias": (64,), "odd": (63, 67)}  # 8-bit moments; float32 ones: small, no whole blocks
BLOCK_ELEMENTS = 256
CASES = [("adamw", False), ("adamw", True), ("adamw8bit", False), ("adamw8bit", True)]


def _make(kind, *, is_on_host=False, seed=0, shapes=SHAPES, **settings):
    dtype, generator = {"adamw": torch.float32, "adamw8bit": torch.bfloat16}[kind], torch.Generator().manual_seed(0)
    weights = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()
    }
    weights["wide"].data = weights["wide"].data.contiguous(memory_format=torch.channels_last)  # as fused blocks hold it
    config = OptimizerConfig(kind=kind, states_on_host=is_on_host, learning_rate=1e-2, **settings)
    return WeightUpdate(weights, config, seed=seed)


def _step(update, number, one_by_one=False):
    generator = torch.Generator().manual_seed(100 + number)
    for weight in update.weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    if one_by_one:
        for name in reversed(update.weights):
            update.update(name)
    else:
        update.update_all()


def _bits(update):
    return {**{name: weight.detach().clone() for name, weight in update.weights.items()}, **update.tensors()}


def _assert_same_bits(actual, wanted):
    assert actual.keys() == wanted.keys()
    assert [name for name, tensor in actual.items() if not torch.equal(tensor, wanted[name])] == []


@pytest.mark.parametrize(("kind", "is_on_host"), CASES)
def test_bytes_of_a_weight_with_its_states(kind, is_on_host):
    shapes = {"wide": (256, 64, 3, 3)}
    update = _make(kind, is_on_host=is_on_host, shapes=shapes)
    _step(update, 0)
    num = update.weights["wide"].numel()
    weight, moments = {"adamw": (4, 8), "adamw8bit": (2, 2 + 2 * 4 / BLOCK_ELEMENTS)}[kind]
    wanted = num * weight + (0 if is_on_host else num * moments)
    actual = update.weights["wide"].nbytes + sum(state.nbytes for state in update.resident())
    tables = 2 * 256 * 4 if kind == "adamw8bit" and not is_on_host else 0  # the codes' meaning, once a moment
    assert actual == wanted + tables + 4  # and the number of steps


def test_float32_updates_are_those_of_torch():
    update = _make("adamw", weight_decay=0.1)
    plain = [torch.nn.Parameter(weight.detach().clone()) for weight in update.weights.values()]
    torchs = torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1, fused=True)
    for number in range(3):
        _step(update, number, one_by_one=number == 1)
        for weight, other in zip(update.weights.values(), plain, strict=True):
            other.grad = weight.grad
        torchs.step()
    assert all(torch.equal(weight, other) for weight, other in zip(update.weights.values(), plain, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_order_and_place_of_the_states_change_no_bit(kind):
    ways = [_make(kind), _make(kind), _make(kind, is_on_host=True)]
    torch.manual_seed(7)
    ambient = torch.get_rng_state()
    for number in range(3):
        for way, update in enumerate(ways):
            _step(update, number, one_by_one=way == 1)
    assert torch.equal(torch.get_rng_state(), ambient)
    for update in ways[1:]:
        _assert_same_bits(_bits(update), _bits(ways[0]))
    other = _make(kind, seed=1)
    _step(other, 0)
    first = _make(kind)
    _step(first, 0)
    assert torch.equal(other.weights["wide"], first.weights["wide"]) == (kind == "adamw")


@pytest.mark.parametrize(("kind", "is_on_host"), CASES)
def test_resumed_states_go_on_to_the_bit(kind, is_on_host):
    straight = _make(kind, is_on_host=is_on_host)
    _step(straight, 0)
    resumed = _make(kind, is_on_host=is_on_host)
    for name, weight in resumed.weights.items():
        weight.data.copy_(straight.weights[name])
    resumed.load({name: tensor.clone() for name, tensor in straight.tensors().items()})
    for update in (straight, resumed):
        _step(update, 1)
    _assert_same_bits(_bits(resumed), _bits(straight))


def test_states_of_the_other_kind_are_refused():
    with pytest.raises(ValueError, match=r"other states: 8 differ.*wide/exp_avg.*optimizer.kind"):
        _make("adamw").load(_make("adamw8bit").tensors())


def test_8bit_moments_in_pieces_are_those_of_the_whole(monkeypatch):
    whole, pieces = _make("adamw8bit"), _make("adamw8bit")
    for number in range(3):
        monkeypatch.setattr(weight_update, "PIECE_ELEMENTS", 1 << 21)
        _step(whole, number)
        monkeypatch.setattr(weight_update, "PIECE_ELEMENTS", 7000)  # of rows of 216: 32 rows fill 27 blocks
        _step(pieces, number)
        if number == 0:  # the same up to the rounding, which draws other numbers
            spacing = 2**-7 * whole.weights["wide"].abs()
            assert ((pieces.weights["wide"] - whole.weights["wide"]).abs() <= spacing).all()
    _assert_same_bits(pieces.tensors(), whole.tensors())


def test_8bit_adamw_is_near_float64():
    update = _make("adamw8bit", weight_decay=0.0)
    plain = {name: torch.nn.Parameter(weight.detach().double()) for name, weight in update.weights.items()}
    start = {name: weight.detach().clone() for name, weight in plain.items()}
    exact = torch.optim.AdamW(plain.values(), lr=1e-2, weight_decay=0.0)
    for number in range(20):
        _step(update, number)
        for name, weight in update.weights.items():
            plain[name].grad = None if weight.grad is None else weight.grad.double()
        exact.step()
    for name, wanted in plain.items():
        moved, wanted_moved = update.weights[name].double() - start[name], wanted - start[name]
        error = (moved - wanted_moved).norm() / wanted_moved.norm()
        assert error < 0.25, (name, error)  # rounded 20 times to a spacing as large as an update


@pytest.mark.parametrize("start", [1.5, -1.5])
def test_updates_below_half_a_spacing_are_not_lost_and_unbiased(start):
    """A gradient of ones moves each weight by the learning rate a step: 1e-4, where the spacing is 1/128."""
    num, num_steps, rate, spacing = 1 << 16, 100, 1e-4, 2**-7
    weight = torch.nn.Parameter(torch.full((num,), start, dtype=torch.bfloat16))
    config = OptimizerConfig(kind="adamw8bit", learning_rate=rate, weight_decay=0.0)
    update = WeightUpdate({"weight": weight}, config, seed=3)
    for _ in range(num_steps):
        weight.grad = torch.ones_like(weight)
        update.update_all()
    share = rate / spacing  # of a spacing, the chance to move by a whole one
    deviation = spacing * (share * (1 - share) * num_steps / num) ** 0.5
    moved = start - weight.detach().double()
    assert abs(float(moved.mean()) - num_steps * rate) < 5 * deviation
    assert float(moved.std()) == pytest.approx(deviation * num**0.5, rel=0.05)


def test_second_moment_of_a_small_weight_decays_as_in_float64():
    weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    update = WeightUpdate({"bias": weight}, OptimizerConfig(kind="adamw8bit"), seed=0)
    wanted = 0.0
    for gradient in [1.0] * 50 + [0.0] * 50:
        weight.grad = torch.full_like(weight, gradient)
        update.update_all()
        wanted = 0.999 * wanted + 0.001 * gradient**2
    assert update.tensors()["bias/exp_avg_sq"].tolist() == pytest.approx([wanted] * 8, rel=1e-5)


def test_torchao_that_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ModuleNotFoundError, match=r"adamw8bit needs torchao.*pip install torchao"):
        _make("adamw8bit")


@pytest.mark.parametrize("is_on_host", [False, True])
def test_moving_average_is_that_of_diffusers(is_on_host):
    from diffusers.training_utils import EMAModel

    weights = {"a": torch.nn.Parameter(torch.randn(5, 7)), "b": torch.nn.Parameter(torch.randn(3))}
    own, wanted = MovingAverage(weights, decay=0.3, is_on_host=is_on_host), EMAModel(weights.values(), decay=0.3)
    for _ in range(6):
        for weight in weights.values():
            weight.data.normal_()
        own.step(weights)
        wanted.step(weights.values())
        assert all(torch.equal(*pair) for pair in zip(own.shadows.values(), wanted.shadow_params, strict=True))
    assert own.steps == wanted.optimization_step == 6


def test_moving_average_of_bfloat16_weights_is_float32():
    weights = {"a": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    average = MovingAverage(weights, decay=0.9999, is_on_host=False)
    average.steps = 10**6
    weights["a"].data.fill_(2.0)
    average.step(weights)
    assert average.shadows["a"].tolist() == pytest.approx([1.0001] * 4, rel=1e-6)


@pytest.mark.parametrize("is_on_host", [False, True])
def test_one_kernel_for_each_weight_is_torchaos_update(is_on_host):
    """The emitted PTX in the place of a GPU: the moments of torchao but for ties, weights of other random numbers."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from ptx_group_norm_silu_conv_triton import launcher

    plain, ours = (_make("adamw8bit", is_on_host=is_on_host, weight_decay=0.1) for _ in range(2))
    launched = []

    def launch(kernel, *arguments):
        launched.append(kernel.fn.__name__)
        launcher()(kernel, *arguments)

    for number in range(2):
        _step(plain, number)
        with modelled_device("cuda"), carried_out_by(launch=launch):
            _step(ours, number)
    assert launched == 2 * len(SHAPES) * ["update_kernel"]
    for name, weight in ours.weights.items():
        off = (weight.float() - plain.weights[name].float()).abs()
        # In each of two updates one spacing, of what the weight was before it moved by the learning rate.
        assert (off <= 2 * 2.0**-7 * (weight.abs().float() + 3e-2)).all(), name
        assert (off > 0).any(), "rounded to the nearest"
    wanted = plain.tensors()
    for name, tensor in ours.tensors().items():
        if name.endswith(".codes"):
            assert (tensor != wanted[name]).float().mean() < 1e-3, name
            assert (tensor.int() - wanted[name].int()).abs().max() <= 1, name
        else:
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-9)


def test_the_schedule_knows_of_steps_that_went_round_the_optimizer(recwarn):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    model = torch.nn.Linear(8, 4)
    settings = OptimizerConfig(kind="adamw8bit", ema="off", warmup_steps=0)
    optimization = Optimization(model, settings, num_steps=4, dead=set(), scales_loss=False)
    model.weight.grad, model.bias.grad = torch.ones(4, 8).bfloat16(), torch.ones(4).bfloat16()
    with modelled_device("cuda"), carried_out_by(launch=lambda *launch: None):
        optimization.step(is_finite=True)
    assert [str(each.message) for each in recwarn if "lr_scheduler" in str(each.message)] == []
    assert optimization.weight_update.optimizer.param_groups[0]["params"] == [model.weight, model.bias]


@pytest.mark.parametrize(("kind", "is_on_host"), CASES)
def test_each_pattern_has_its_rate_and_the_first_that_is_found_decides(kind, is_on_host):
    """A weight moves as it does where its rate is everybody's."""
    update = _make(kind, is_on_host=is_on_host, learning_rates={"^wide": 1e-3, "w|bias": 5e-2})
    _step(update, 0)
    for rate, name in ((1e-3, "wide"), (5e-2, "bias"), (1e-2, "odd")):
        alone = _make(kind, is_on_host=is_on_host)
        for group in alone.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
        _step(alone, 0)
        assert torch.equal(update.weights[name], alone.weights[name]), name
    with pytest.raises(ValueError, match=r"'nowhere' is in no name of a parameter that is trained, such as wide"):
        _make(kind, learning_rates={"nowhere": 1e-3})
