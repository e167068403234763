import math

import pytest
import torch

from mimicmotion.config import OptimizerConfig
from mimicmotion.optimization.in_backward import InBackward
from mimicmotion.optimization.optimizer import Optimization
from mmkernels.kernels.adamw8bit.step import TEMPORARY_BYTES
from mmkernels.memory.trace import trace

LIMIT = 2.0


class Recorded:
    """Parameters whose gradients are given, and the gradients that reach the update."""

    def __init__(self, num):
        self.parameters = {str(i): torch.nn.Parameter(torch.zeros(3)) for i in range(num)}
        self.used = {}
        self.in_backward = InBackward(self.parameters, self._update, max_grad_norm=LIMIT)

    def _update(self, name):
        gradient = self.parameters[name].grad
        assert gradient is not None
        self.used[name] = gradient.clone()

    def step(self, gradients):
        """A backward whose gradients are these; returns the norm that was applied."""
        self.used = {}
        torch.stack([(p * g).sum() for p, g in zip(self.parameters.values(), gradients, strict=True)]).sum().backward()
        assert all(parameter.grad is None for parameter in self.parameters.values())
        norm = self.in_backward.norm()
        self.in_backward.finish()
        return norm

    def applied(self):
        return float(torch.stack([gradient.norm() for gradient in self.used.values()]).norm())


def _of_norm(num, norm, seed=0):
    gradients = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))
    return list(gradients * (norm / gradients.norm()))


@pytest.mark.parametrize("norm", [0.5, 2.0, 30.0])
def test_a_constant_norm_is_clipped_as_ever_from_the_second_step_on(norm):
    recorded = Recorded(6)
    for seed in range(4):
        gradients = _of_norm(6, norm, seed)
        assert recorded.step(gradients) == pytest.approx(norm, rel=1e-6)
        if seed > 0:
            for name, gradient in zip(recorded.parameters, gradients, strict=True):
                torch.testing.assert_close(recorded.used[name], gradient * min(1.0, LIMIT / norm), rtol=1e-5, atol=0)


@pytest.mark.parametrize("before", [0.1, 4.0, 1e4])
@pytest.mark.parametrize("growth", [1.0, 10.0, 1e3])
def test_a_blow_up_is_bounded(before, growth):
    for num in (1, 7, 40):
        recorded = Recorded(num)
        recorded.step(_of_norm(num, before))
        norm = growth * before
        recorded.step(_of_norm(num, norm, seed=1))
        most = LIMIT * math.sqrt(1 + 2 * math.log(max(1.0, norm / max(LIMIT, before))))
        assert recorded.applied() <= most * (1 + 1e-5)
        assert recorded.applied() >= 0.99 * min(norm, LIMIT) * min(1.0, norm / before)
    recorded = Recorded(60)  # the worst order: each gradient as long as all before it together
    recorded.step(_of_norm(60, LIMIT))
    arriving = list(reversed(range(60)))  # the last used is the first to have its gradient
    lengths = {place: LIMIT * 2 ** (place / 8) for place in range(60)}
    recorded.step([torch.tensor([lengths[arriving[i]], 0, 0]) for i in range(60)])
    total = math.sqrt(sum(length**2 for length in lengths.values()))
    assert LIMIT < recorded.applied() <= LIMIT * math.sqrt(1 + 2 * math.log(total / LIMIT))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_no_weight(bad):
    recorded = Recorded(5)
    recorded.step(_of_norm(5, 3.0))
    order = list(recorded.used)
    gradients = _of_norm(5, 1.0, seed=1)
    gradients[int(order[2])][1] = bad
    assert not math.isfinite(recorded.step(gradients))
    assert list(recorded.used) == order[:2]  # those that came before it
    assert recorded.in_backward.last_norm == pytest.approx(3.0)  # the bad step is forgotten
    recorded.step(_of_norm(5, 3.0, seed=2))
    assert list(recorded.used) == order and recorded.applied() == pytest.approx(LIMIT, rel=1e-5)


def test_a_gradient_in_two_parts_is_refused():
    recorded = Recorded(1)
    parameter = recorded.parameters["0"]
    with pytest.raises(RuntimeError, match="gradient of 0 came in two parts"):
        for _ in range(2):  # a second backward in one step
            parameter.sum().backward()


def _network():
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(256, 256, bias=False) for _ in range(12)])


def _optimization(model, **settings):
    config = OptimizerConfig(ema="off", warmup_steps=0, learning_rate=1e-3, **settings)
    return Optimization(model, config, num_steps=10, dead=set(), scales_loss=False)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_gradients_are_not_all_there_at_once_and_the_weights_are_the_same(kind):
    one = 256 * 256 * {"adamw": 4, "adamw8bit": 2}[kind]
    peaks, weights = [], []
    for is_in_backward in (False, True):
        model = _network()
        optimization = _optimization(model, kind=kind, in_backward=is_in_backward, max_grad_norm=1e9)
        dtype = next(model.parameters()).dtype

        def step(model=model, optimization=optimization, dtype=dtype):
            optimization.backward(model(torch.ones(1, 256, dtype=dtype)).square().mean())
            assert optimization.gradient_norm().isfinite()
            optimization.step(is_finite=True)

        step()
        cost = trace(step, [*model.parameters(), *optimization.resident()])
        peaks.append(cost.peak_bytes - cost.resident_bytes)
        weights.append([weight.detach().clone() for weight in model.parameters()])
    temporaries = 0 if kind == "adamw" else TEMPORARY_BYTES * 256 * 256
    assert 12 * one + temporaries <= peaks[0] < 12 * one + temporaries + 64 * 1024
    assert peaks[1] < 3 * one + temporaries + 64 * 1024  # of 12 gradients one, the next being made, and small change
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_a_loss_that_is_not_finite_moves_nothing():
    model = _network()
    optimization = _optimization(model, in_backward=True)
    before = [weight.detach().clone() for weight in model.parameters()]
    optimization.backward(model(torch.full((1, 256), torch.inf)).sum())
    assert not optimization.gradient_norm().isfinite()
    optimization.step(is_finite=False)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert optimization.gradient_norm() == 0  # and the next step starts anew


def test_a_scaled_loss_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.in_backward .*fp16"):
        Optimization(_network(), OptimizerConfig(in_backward=True), num_steps=1, dead=set(), scales_loss=True)
