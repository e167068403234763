"""A run's weights, exported and begun with again: the same bits, whole or not at all, with what they are."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny import MODEL, tiny_config
from torch import Tensor

from mimicmotion import export
from mimicmotion.config import ModelConfig
from mimicmotion.json_values import to_json
from mimicmotion.model.unet import build_model
from mimicmotion.model.weights import read
from mimicmotion.run import checkpoint, pretrained
from mimicmotion.run.checkpoint import Checkpoint, CheckpointError
from mmkernels.choices import Plan, document

STEP = 7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint, as a trainer leaves it, and an evaluation of it."""
    folder = tmp_path_factory.mktemp("runs") / "dance"
    torch.manual_seed(0)
    state = {name: torch.randn(tensor.shape) * 0.1 for name, tensor in build_model(MODEL).state_dict().items()}
    average = {name: tensor + 1 for name, tensor in state.items() if "attn2.to_q" not in name}  # dead ones have none
    config = to_json(tiny_config(folder, num_frames=72))
    config["data"]["prepared"] = (folder.parent / "prepared").as_posix()
    documents = {
        "config": config, "encoder": {"name": "patch-codec (stand-in)", "version": "1", "clips": {"a": "0" * 16}},
        "plan": document(Plan(made_for={"card": "RTX 4090", "budget_gib": 22})),
    }  # fmt: skip
    checkpoint.save(
        folder, Checkpoint(step=STEP, tensors={"model": state, "ema": average}, documents=documents), keep=1
    )
    figures = {
        "checkpoint": f"elsewhere/step-{STEP:08d}",
        "truth": "clips",
        "person": {"psnr_db": 21.25},
        "clips": [{}],
    }
    (folder / "evaluate.json").write_text(json.dumps(figures))
    (folder.parent / "prepared").mkdir()
    return folder


def _tensors(run: Path, kind: str) -> dict[str, Tensor]:
    """Of the checkpoint's files, by safetensors' own reader."""
    raw, average = (
        safetensors.torch.load_file(run / f"step-{STEP:08d}" / f"{name}.safetensors") for name in ("model", "ema")
    )
    return raw if kind == "raw" else {**raw, **average}


def _read(folder: Path, layout: str) -> dict[str, Tensor]:
    if layout == "diffusers":
        return dict(read(folder).tensors)
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".pth", ".safetensors"))
    return dict(read(*reversed(paths)).tensors)


@pytest.mark.parametrize(
    ("layout", "kind", "dtype"),
    [
        ("tencent", "ema", "fp16"),
        ("tencent", "raw", "fp32"),
        ("comfyui", "ema", "fp32"),
        ("diffusers", "raw", "bf16"),
    ],
)
def test_what_is_exported_is_read_again_bit_by_bit(layout, kind, dtype, run, tmp_path):
    made = export.run(export.Arguments(run_dir=run, layout=layout, weights=kind, dtype=dtype, output=tmp_path / "out"))
    found, wanted = _read(made, layout), _tensors(run, kind)
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == kinds[dtype] and torch.equal(tensor, wanted[name].to(kinds[dtype])), name
    for path in made.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {
                "format": "pt", "run": "dance", "step": "7", "weights": kind, "dtype": dtype,
                "num_attention_heads": "[2, 2, 4, 4]",
            }  # fmt: skip


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_rights_of_any_new_file(mask, rights, run, umask, tmp_path):
    os.umask(mask)
    for layout in ("tencent", "comfyui"):
        made = export.run(export.Arguments(run_dir=run, layout=layout, output=tmp_path / layout))
        assert {stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*") if path.is_file()} == {rights}
    state = {"model": {"a": torch.zeros(1)}}
    folder = checkpoint.save(tmp_path / "run", Checkpoint(step=1, tensors=state, documents={}), keep=1)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {rights}


def test_the_card_says_what_they_are_and_no_path_of_this_machine(run, tmp_path):
    made = export.run(export.Arguments(run_dir=run, layout="comfyui", output=tmp_path / "out"))
    card = (made / "README.md").read_text()
    for line in (
        "# dance, step 7",
        "tensors in fp16: the moving average of the weights. The run began with fresh weights.",
        "copy `models` and `custom_nodes`",
        "Its sizes (channels (64, 64, 64, 64), heads (2, 2, 4, 4)) are not the released model's",
        "1 clips of 72 frames, latents of patch-codec (stand-in) 1.",
        "The prepared folder was not at hand",
        "| person.psnr_db | 21.25 |",
        "- plan: plan for RTX 4090, 22 GiB: keeps the inside of 0 units",
        '"learning_rate": 0.001',
        '"prepared": "prepared"',
    ):
        assert line in card, line
    assert str(run.parent) not in card and str(tmp_path) not in card
    for path in made.rglob("*.safetensors"):
        assert f"| `{path.relative_to(made)}` | {path.stat().st_size:,} | `{_sha256(path)}` |" in card


def test_a_prepared_folder_of_another_version_keeps_nothing_from_being_exported(run, tmp_path):
    manifest = run.parent / "prepared" / "manifest.json"
    manifest.write_text('{"version": 1}')
    try:
        card = (export.run(export.Arguments(run_dir=run, output=tmp_path / "out")) / "README.md").read_text()
    finally:
        manifest.unlink()
    digest = hashlib.sha256(b'{"version": 1}').hexdigest()
    assert f"manifest.json: `{digest}`. It could not be read when this was exported" in card


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_figures_of_another_checkpoint_are_said_to_be(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"step-{STEP:08d}").symlink_to(run / f"step-{STEP:08d}")
    card = (export.run(export.Arguments(run_dir=tmp_path / "run")) / "README.md").read_text()
    assert "Not evaluated (`python mimicmotion/evaluate.py`)." in card
    (tmp_path / "run" / "evaluate.json").write_text('{"checkpoint": "step-00000003", "ssim": 0.5}')
    again = export.run(export.Arguments(run_dir=tmp_path / "run", weights="raw"))
    assert again == tmp_path / "run" / "export" / "tencent-7-raw-fp16"
    card = (again / "README.md").read_text()
    assert "These figures are of step-00000003, not of step-00000007, which was exported." in card
    assert "These figures are of the averaged weights (evaluate.py takes those), and raw ones were exported." in card
    (tmp_path / "run" / "evaluate.json").write_text('{"checkpoint": ')
    cut = export.run(export.Arguments(run_dir=tmp_path / "run", dtype="bf16"))
    assert "evaluate.json could not be read when this was exported." in (cut / "README.md").read_text()


def test_it_is_there_whole_or_not_at_all(run, tmp_path, monkeypatch):
    arguments = export.Arguments(run_dir=run, output=tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(export, "model_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ValueError, match=r"could not be written \(.*No space left.* GiB are free; make room"):
            export.run(arguments)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/out could not be written \(.*\); give another --output$"):
        export.run(replace(arguments, output=tmp_path / "file" / "out"))
    export.run(arguments)
    before = _sha256(tmp_path / "out" / "MimicMotion_1-1.pth")
    with pytest.raises(ValueError, match=r"out is there already; move it away, or give another --output"):
        export.run(arguments)
    assert _sha256(tmp_path / "out" / "MimicMotion_1-1.pth") == before
    with pytest.raises(ValueError, match=r"holds no checkpoint \(runs .*: dance\)"):
        export.run(export.Arguments(run_dir=run.parent / "dnace"))


def test_a_run_of_our_own_begins_another(run, tmp_path):
    folder = run / f"step-{STEP:08d}"
    cases: list[tuple[Path, Any, str]] = [
        (run, "ema", "ema"), (folder, "raw", "raw"), (folder / "model.safetensors", "ema", "raw"),
        (folder / "ema.safetensors", "raw", "ema"),
    ]  # fmt: skip
    for path, asked, kind in cases:
        found, wanted = pretrained.read(ModelConfig(pretrained=path, pretrained_weights=asked)), _tensors(run, kind)
        assert found.tensors.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.tensors.items()), path
        assert found.config is not None and found.config["num_attention_heads"] == [2, 2, 4, 4]
        assert f"the {'averaged' if kind == 'ema' else 'raw'} weights of step 7" in found.notes[0]
    damaged = tmp_path / f"step-{STEP:08d}"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).write_bytes(
            path.read_bytes()[:-1] if path.name == "model.safetensors" else path.read_bytes()
        )
    with pytest.raises(CheckpointError, match=r"is damaged: model.safetensors has SHA-256"):
        pretrained.read(ModelConfig(pretrained=damaged))
