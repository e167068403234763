import dataclasses
import json
import os
import re
import signal

import pytest
import torch
from drawn import lines_of, saved_figures
from numerics import assert_within_budget
from safetensors.torch import load_file
from tiny import NoiseClips, tiny_config

from mimicmotion.data.cache import NotFiniteError
from mimicmotion.execution import use_kernels
from mimicmotion.model.unet import build_model
from mimicmotion.optimization.optimizer import build_optimization
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run.checkpoint import CheckpointError, load, newest
from mimicmotion.run.history import read_history
from mimicmotion.run.stopping import SIGNALS, Stop
from mimicmotion.sampling.generation import load_averaged
from mimicmotion.step import batch_loss, draw_samples, stacked
from mimicmotion.trainer import Trainer, TrainingStoppedError

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def _train(config, resume=False, clips=None, stop=None):
    trainer = Trainer(config, clips or NoiseClips(config=config), ONE, resume=resume, stop=stop)
    return trainer.run(), trainer


def _gradients(config, kernels, dtype, sample_ids):
    """Loss and gradients by name of one micro-batch."""
    torch.manual_seed(0)
    model = build_model(config.model)
    torch.nn.init.normal_(model.pose_net.final_proj.weight, std=0.05)  # all zeros would hide the layers below
    for name, parameter in model.named_parameters():
        if name.endswith("mix_factor"):
            torch.nn.init.normal_(parameter)
    build_optimization(model, config, scales_loss=False)  # for the dead parameters alone
    use_kernels(model, kernels)
    model.to(dtype)
    for parameter in model.unet.parameters():
        if parameter.ndim == 4:  # the layout of the fused blocks, in which oneDNN's error is twice the other's
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    batch = stacked(NoiseClips(config=config), 0, sample_ids).map(lambda tensor: tensor.to(dtype))
    draws = draw_samples(config, 0, sample_ids, batch.frame_shape)
    loss = batch_loss(model, batch, draws, config)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def _by_kind(gradients, fp64):
    """Gradients over their float64 scale, joined over all blocks; single numbers, which have no scale, as they are.

    Each keeps its own relative error. The plain error of one small tensor is luck (two roundings that cancel), that of
    its kind over all blocks is not.
    """
    kinds = {}
    for name, gradient in gradients.items():
        single = gradient.numel() == 1
        kind = "single" if single and name != "loss" else re.sub(r".*(resnets|attentions|conv_layers)\.\d+\.", "", name)
        scale = 1.0 if single else fp64[name].abs().max().to(gradient.dtype)
        kinds.setdefault(kind, []).append((gradient / scale).flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


@pytest.mark.parametrize(("num_frames", "B"), [(3, 2), (16, 1)])
def test_fused_checkpoint_and_torch_give_the_same_loss_and_gradients(num_frames, B, tmp_path):
    config = tiny_config(tmp_path, num_frames=num_frames)
    fp64 = _gradients(config, "torch", torch.float64, range(B))
    plain = _gradients(config, "torch", torch.float32, range(B))
    assert len(plain) > 500 and not any("attn2.to_q" in name or "attn2.to_k" in name for name in plain)
    for kernels in ("checkpoint", "fused"):
        gradients = _gradients(config, kernels, torch.float32, range(B))
        assert gradients.keys() == plain.keys() == fp64.keys()
        assert_within_budget(*(_by_kind(x, fp64) for x in (gradients, plain, fp64)))


def test_bf16_autocast_is_near_float32_with_every_kernel(tmp_path):
    config = tiny_config(tmp_path, precision="bf16")
    wanted = float(_gradients(tiny_config(tmp_path), "torch", torch.float32, range(1))["loss"])
    for kernels in ("torch", "checkpoint", "fused"):
        got = _gradients(config, kernels, torch.float32, range(1))
        assert float(got["loss"]) == pytest.approx(wanted, rel=0.02)
        assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in got.values())


def test_bf16_weights_are_near_float32_with_every_kernel(tmp_path):
    config = tiny_config(tmp_path, precision="bf16")
    wanted = float(_gradients(tiny_config(tmp_path), "torch", torch.float32, range(1))["loss"])
    for kernels in ("torch", "checkpoint", "fused"):
        got = _gradients(config, kernels, torch.bfloat16, range(1))
        assert float(got["loss"]) == pytest.approx(wanted, rel=0.02) and got.pop("loss").dtype == torch.float32
        assert all(gradient.isfinite().all() and gradient.dtype == torch.bfloat16 for gradient in got.values())


def _files(config):
    folder = newest(config.run_dir)
    assert folder is not None
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}, json.loads(
        (folder / "state.json").read_text()
    )


def _rows(config):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_history(config.run_dir / "loss.jsonl")]


class Interrupting(NoiseClips):
    """Clips whose loading sends SIGTERM at a step."""

    def sample(self, step, sample_id):
        if step == 2 and sample_id == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().sample(step, sample_id)


RESUMED = {
    "torch": ("torch", {}),
    "fused": ("fused", {}),
    "8-bit, fused, in backward, on the host": (
        "fused",
        {"kind": "adamw8bit", "in_backward": True, "states_on_host": True, "ema": "host"},
    ),
    "in backward, no average": ("checkpoint", {"in_backward": True, "ema": "off", "max_grad_norm": 0.01}),
}


# The plainest that is fused, and the one with most of what can be set.
BOTH = ("fused", "8-bit, fused, in backward, on the host")


@pytest.mark.parametrize("case", [pytest.param(x, marks=() if x in BOTH else pytest.mark.deep) for x in RESUMED])
def test_interrupted_and_resumed_ends_bit_equal(case, tmp_path, monkeypatch):
    figures = saved_figures(monkeypatch)
    kernels, options = RESUMED[case]
    settings = {"num_steps": 3, "precision": "bf16"} if "kind" in options else {}
    straight = tiny_config(tmp_path / "straight", size=64, micro_batch_size=2, **settings)
    model = dataclasses.replace(straight.model, block_out_channels=(32,) * 4, num_attention_heads=(1,) * 4)
    optimizer = dataclasses.replace(straight.optimizer, **options)
    straight = dataclasses.replace(straight, kernels=kernels, model=model, optimizer=optimizer)
    assert _train(straight)[0]
    (steps, losses), _ = lines_of(figures["loss.png"])
    assert list(zip(steps, losses, strict=True)) == [(row["step"], row["loss"]) for row in _rows(straight)]
    broken = dataclasses.replace(straight, run_dir=tmp_path / "broken")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with Stop() as stop:
        is_finished, trainer = _train(broken, clips=Interrupting(config=broken), stop=stop)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not is_finished and 0 < trainer.step < 4
    assert newest(broken.run_dir) == broken.run_dir / f"step-{trainer.step:08d}"
    torch.manual_seed(123)  # ambient random state must not matter
    is_finished, resumed = _train(broken, resume=True)
    assert is_finished and resumed.notes[-1] == f"resumed {newest_name(broken, trainer)} at step {trainer.step}"
    assert [note for note in resumed.notes[:-1] if "CPU" not in note] == []
    (wanted, wanted_state), (got, got_state) = _files(straight), _files(broken)
    assert wanted_state == got_state
    for name, tensors in wanted.items():
        assert tensors.keys() == got[name].keys() and len(tensors) > 300
        assert all(torch.equal(value, got[name][key]) for key, value in tensors.items()), name
    assert _rows(straight) == _rows(broken)


def newest_name(config, trainer):
    return config.run_dir / f"step-{trainer.step:08d}"


def test_every_step_draws_anew_and_the_moving_average_follows(tmp_path):
    config = tiny_config(tmp_path, size=64, log_every=2)
    is_finished, trainer = _train(config)
    rows = _rows(config)
    assert is_finished and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert len({row["loss"] for row in rows}) == 4 == len({row["hand_loss"] for row in rows})
    shares = [row.get("pose_share") for row in rows]  # at logged steps; zeros until a step of rate > 0
    assert shares[0] is shares[2] is None and shares[1] == 0 and 0 < float(shares[3] or 0) < 0.5
    assert trainer.model.pose_squares is None
    assert [row["learning_rate"] for row in rows] == pytest.approx([0, 5e-4, 1e-3, 1e-3])  # two steps of warm-up
    tensors, state = _files(config)
    assert state["average_steps"] == 4
    model, average = tensors["model.safetensors"], tensors["ema.safetensors"]
    initial = Trainer(dataclasses.replace(config, run_dir=tmp_path / "other"), NoiseClips(config=config), ONE).model
    start = initial.state_dict()
    key = "unet.conv_in.weight"
    assert not torch.equal(average[key], model[key]) and not torch.equal(average[key], start[key])
    dead = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert dead and all("attn2.to_q" in name or "attn2.to_k" in name or "norm2" in name for name in dead)
    assert all(torch.equal(model[name], start[name]) for name in dead)  # weight decay leaves them alone too
    assert set(average) == set(model) - dead


def test_gradients_are_clipped_and_the_norm_is_the_one_before(tmp_path):
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, max_grad_norm=1e-3))
    trainer = Trainer(config, NoiseClips(config=config), ONE)
    trainer._backward(trainer._load(0))
    before = torch.cat([p.grad.flatten() for p in trainer.optimization.live.values() if p.grad is not None]).norm()
    norm = trainer.optimization.gradient_norm()
    after = torch.cat([p.grad.flatten() for p in trainer.optimization.live.values() if p.grad is not None]).norm()
    torch.testing.assert_close(norm, before, rtol=1e-3, atol=0)
    assert float(after) == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_micro_batches_give_the_gradients_of_the_batch(tmp_path):
    both = []
    for micro in (1, 2):
        config = tiny_config(tmp_path, micro_batch_size=micro)
        trainer = Trainer(config, NoiseClips(config=config), ONE)
        loss = trainer._backward(trainer._load(0))
        gradients = [p.grad for p in trainer.optimization.live.values() if p.grad is not None]
        both.append((loss, torch.cat([gradient.flatten() for gradient in gradients])))
    assert both[0][0] == pytest.approx(both[1][0], rel=1e-5)
    torch.testing.assert_close(both[0][1], both[1][1], rtol=1e-3, atol=1e-5 * float(both[1][1].abs().max()))


def test_bad_step_is_skipped_and_counted_and_weights_stay(tmp_path):
    config = tiny_config(tmp_path, size=64, num_steps=3)
    is_finished, trainer = _train(config, clips=NoiseClips(config=config, bad_steps=(1,)))
    assert is_finished and trainer.skips.total == 1 and trainer.skips.in_a_row == 0
    rows = _rows(config)
    assert [row["is_skipped"] for row in rows] == [False, True, False]
    assert rows[1]["clips"] == ["noise 1000", "noise 1001"] and "clips" not in rows[0]
    assert rows[1]["loss"] is None and "NaN" not in (tmp_path / "loss.jsonl").read_text()
    tensors, state = _files(config)
    assert state["skipped"] == 1 and state["average_steps"] == 2
    assert all(value.isfinite().all() for group in tensors.values() for value in group.values())


def test_training_stops_with_the_reason_after_too_many_bad_steps(tmp_path):
    config = tiny_config(tmp_path, size=64, num_steps=9, max_skipped_in_a_row=2)
    trainer = Trainer(config, NoiseClips(config=config, bad_steps=(0, 2, 3)), ONE)
    with pytest.raises(
        TrainingStoppedError,
        match=r"^2 steps in a row, up to step 4 \(3 skipped in all\), .*: loss or gradient not finite. Each took "
        r"samples 0 to 1, of clips noise 2000, noise 2001, noise 3000, noise 3001. The weights of step 2 are saved",
    ):
        trainer.run()
    assert trainer.step == 4 and newest(tmp_path) == tmp_path / "step-00000004"


class UnreadableClips(NoiseClips):
    """Raises at bad samples, as a cached file with a NaN does."""

    def sample(self, step, sample_id):
        if step in self.bad_steps and sample_id in self.bad_sample_ids:
            raise NotFiniteError(f"clip {self.clip_of(step, sample_id)} is not finite")
        return super().sample(step, sample_id)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_clip_that_cannot_be_used_costs_its_step_alone(in_backward, tmp_path):
    """The second of two micro-batches, after the first has left gradients; updates in backward take a single one."""
    config = tiny_config(tmp_path, size=64, num_steps=3, micro_batch_size=2 if in_backward else 1, save_every=1)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, in_backward=in_backward))
    clips = UnreadableClips(config=config, bad_steps=(1,), bad_sample_ids=(1,))
    is_finished, trainer = _train(config, clips=clips)
    assert is_finished and trainer.skips.total == 1
    assert _rows(config)[1]["why"] == "clip noise 1001 is not finite"
    kept = [load(tmp_path / f"step-{step:08d}").tensors for step in (1, 2, 3)]
    assert all(torch.equal(value, kept[1][group][key]) for group in kept[0] for key, value in kept[0][group].items())
    name = "unet.conv_in.weight"
    assert not torch.equal(kept[1]["model"][name], kept[2]["model"][name]), "the step after it is a step again"


def test_overflow_of_the_scaled_loss_lowers_the_scale(tmp_path):
    """The bookkeeping of fp16, with float32 arithmetic."""
    config = tiny_config(tmp_path)
    model = build_model(config.model)
    optimization = build_optimization(model, config, scales_loss=True)
    before = model.unet.conv_in.weight.detach().clone()
    for parameter in optimization.live.values():
        parameter.grad = torch.full_like(parameter, torch.inf)
    optimization.scaler.scale(torch.ones(()))  # makes the scale
    scale = optimization.scaler.get_scale()
    assert not optimization.gradient_norm().isfinite()
    optimization.step(is_finite=False)
    assert optimization.scaler.get_scale() == scale / 2
    assert torch.equal(model.unet.conv_in.weight, before) and model.unet.conv_in.weight.grad is None


def test_resume_with_nothing_there_starts_and_says_so(tmp_path):
    config = tiny_config(tmp_path / "empty", size=64, num_steps=1)
    is_finished, trainer = _train(config, resume=True)
    assert is_finished and "nothing to resume" in trainer.notes[0]


def test_resume_refuses_a_flipped_bit_and_another_model(tmp_path):
    config = tiny_config(tmp_path, size=64, num_steps=2, save_every=1)
    _train(config)
    for field, value in (("layers_per_block", 2), ("num_attention_heads", (4, 2, 4, 4))):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, **{field: value}))
        with pytest.raises(ValueError, match=rf"model.{field} was .* and is .* now: the checkpoint's weights are of"):
            Trainer(other, NoiseClips(config=config), ONE, resume=True)
    path = tmp_path / "step-00000002" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged: optimizer.safetensors.*step-00000001"):
        Trainer(config, NoiseClips(config=config), ONE, resume=True)


def test_history_is_cut_back_to_the_checkpoint(tmp_path):
    config = tiny_config(tmp_path, size=64, num_steps=2)
    _train(config)
    with (tmp_path / "loss.jsonl").open("a") as file:  # a run that went on and was killed in the middle of a line
        file.write(json.dumps({"step": 3, "loss": 1.0}) + '\n{"step": 4, "lo')
    longer = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_steps=3))
    _, trainer = _train(longer, resume=True)
    assert trainer.notes[1:] == ["trainer.num_steps was 2 in the checkpoint and is 3 now"]
    assert [row["step"] for row in _rows(config)] == [1, 2, 3]


def test_updates_in_backward_refuse_accumulation_and_ranks(tmp_path):
    config = tiny_config(tmp_path, batch_size=2, micro_batch_size=1)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, in_backward=True))
    for ranks in (ONE, dataclasses.replace(ONE, world_size=2)):
        with pytest.raises(ValueError, match=r"optimizer.in_backward .* trainer.batch_size 2 and .*micro_batch_size 1"):
            Trainer(config, NoiseClips(config=config), ranks)


def test_without_an_average_a_checkpoint_gives_the_weights(tmp_path):
    config = tiny_config(tmp_path, size=64, num_steps=1, precision="bf16")
    optimizer = dataclasses.replace(config.optimizer, kind="adamw8bit", ema="off", warmup_steps=0)
    config = dataclasses.replace(config, optimizer=optimizer)
    _, trainer = _train(config)
    _, model, _ = load_averaged(tmp_path)
    trained = trainer.model.state_dict()
    assert all(value.dtype == torch.bfloat16 for value in trained.values())
    assert all(torch.equal(value, trained[name].float()) for name, value in model.state_dict().items())
    averaging = dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, ema="host"))
    with pytest.raises(ValueError, match=r"no moving average of the weights; resume with optimizer.ema off"):
        Trainer(averaging, NoiseClips(config=config), ONE, resume=True)


def test_an_error_of_the_dataset_reaches_the_caller(tmp_path):
    class Broken(NoiseClips):
        def sample(self, step, sample_id):
            raise ValueError(f"cannot read the clip of step {step}")

    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match="clip of step 0"):
        _train(config, clips=Broken(config=config))
