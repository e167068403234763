import dataclasses
import json

import pytest

from mimicmotion.config import (
    PRESETS,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainerConfig,
    demo,
    mimicmotion_16,
    mimicmotion_72,
)
from mimicmotion.json_values import from_json, to_json
from mimicmotion.train import parse


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name):
    config = PRESETS[name]()
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert config.preset == name


def test_presets_hold_the_released_shape_and_the_papers_batch():
    for config, frames in ((mimicmotion_72(), 72), (mimicmotion_16(), 16)):
        assert config.model.block_out_channels == (320, 640, 1280, 1280)
        assert config.model.num_attention_heads == (5, 10, 20, 20)
        assert (config.data.height, config.data.width, config.data.num_frames) == (1024, 576, frames)
        assert (config.trainer.batch_size, config.optimizer.learning_rate) == (8, 1e-5)
    assert demo().data.num_frames == 72


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: DataConfig(height=100), "data.height"),
        (lambda: DataConfig(num_frames=1), "data.num_frames"),
        (lambda: ModelConfig(block_out_channels=(48, 64, 64, 64)), "block_out_channels"),
        (lambda: ModelConfig(num_attention_heads=(5, 10, 20)), "num_attention_heads"),
        (lambda: ModelConfig(num_attention_heads=(7, 10, 20, 20)), "num_attention_heads"),
        (lambda: DiffusionConfig(condition_dropout=1.5), "condition_dropout"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "betas"),
        (lambda: OptimizerConfig(kind="adam"), "optimizer.kind"),  # pyright: ignore[reportArgumentType]
        (lambda: TrainerConfig(batch_size=3, micro_batch_size=2), "batch_size"),
        (lambda: SamplingConfig(num_steps=0), "num_steps"),
        (lambda: Config(data=DataConfig(num_frames=7)), "tile_overlap"),
        (lambda: Config(kernels="fast"), "kernels"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_bad_value_is_named_with_what_was_wanted(make, field):
    with pytest.raises(ValueError, match=rf"{field} is .*; give "):
        make()


@pytest.mark.parametrize("optimizer", [OptimizerConfig(kind="adamw8bit"), OptimizerConfig(in_backward=True)])
def test_optimizers_that_need_bf16_refuse_fp16(optimizer):
    with pytest.raises(ValueError, match=r"trainer.precision is 'fp16'; give bf16: optimizer\."):
        Config(optimizer=optimizer, trainer=TrainerConfig(precision="fp16"))


def test_unknown_field_in_a_stored_config_is_named():
    with pytest.raises(ValueError, match="has no colour"):
        from_json(to_json(demo()) | {"colour": 1})


def test_command_line_takes_the_presets_values_and_overrides_them():
    words = ["--kernels", "checkpoint", "--preset", "mimicmotion-16", "--resume", "--run-dir", "runs/mine"]
    arguments = parse([*words, "--data.height", "512", "--trainer.seed", "7"])
    wanted = mimicmotion_16()
    wanted = dataclasses.replace(
        wanted,
        kernels="checkpoint",
        run_dir=arguments.config.run_dir,
        data=dataclasses.replace(wanted.data, height=512),
        trainer=dataclasses.replace(wanted.trainer, seed=7),
    )
    assert arguments.config == wanted
    assert (arguments.resume, arguments.dry_run, str(arguments.config.run_dir)) == (True, False, "runs/mine")
    assert parse(["--preset=mimicmotion-72", "--dry-run"]).dry_run
    assert parse([]).config == demo()
    with pytest.raises(SystemExit, match="mimicmotion-73"):
        parse(["--preset", "mimicmotion-73"])
