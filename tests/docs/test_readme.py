"""The documents are run: every command in a bash block, every python block, every path in a file map or a link."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import started
from places import ROOT

from bench.environment import QUIET_PROFILER, TUNED_ALLOCATOR
from mimicmotion.train import parse

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")))
BIN = Path(sys.executable).parent

# How each command is run here: "as typed", with words added that make it short, or only read where it would set up a
# virtual environment of its own or needs eight GPUs.
SHORT_STEP = "--preset demo --frames 8 --size 64x64 --rounds 1 --threads 1 --providers checkpoint fused --out {tmp}"
BENCH = "--help"  # tests/benches/test_bench.py runs each of them small
PLAN = 'python -m mmkernels.plan --frames 72 --size 1024x576 --card "RTX 4090" --optimizer adamw8bit'
HOW = {
    "make demo": "dry run of make",
    "make test": "dry run of make",
    "make lint": "dry run of make",
    "make format": "dry run of make",
    "make verify-gpu": "dry run of make",
    "make verify-deep": "dry run of make",
    "python bench/modelled.py": "--help",
    "pip install -e .": "--dry-run --no-deps --no-build-isolation",
    "pip install -e . --no-deps": "--dry-run --no-build-isolation",
    "make docs": "dry run of make",
    "python -m mmkernels": "as typed",
    "python -m mmkernels.preview diffusers:UNetSpatioTemporalConditionModel": "--help",
    "torchrun mimicmotion/train.py --kernels fused": "--trainer.num-steps 2 --run-dir {tmp}/run",
    "python mimicmotion/sample.py --check-pose-order": "--run-dir {tmp}/run --num-steps 2",
    "python mimicmotion/evaluate.py": "--run-dir {tmp}/run --num-clips 1",
    "python bench/attn72.py": BENCH,
    "python bench/group_norm_silu_conv.py": BENCH,
    "python bench/geglu_feed_forward.py": BENCH,
    "python bench/spatial_attention.py": BENCH,
    "python bench/temporal_transformer_block.py": BENCH,
    "python bench/unet_cost.py": "--providers fused --frames 2 --height 64 --width 64",
    PLAN: "--help",
    'pip install -e ".[small]"': "--dry-run --no-deps --no-build-isolation",
    "python mimicmotion/sample.py --run-dir runs/mimicmotion-72": "--help",
    "make modelled": "dry run of make",
    "python bench/budgets.py": "--help",
    "python bench/train_step.py": "--help",
    "python bench/train_step.py --measure": SHORT_STEP,
    "python bench/train_step.py --measure --providers checkpoint fused compiled-fine-grained-one-token": "--help",
    "python bench/predicted_step.py": "--help",
    "python bench/parallel.py": "--help",
    "python bench/parallel.py --measure": "--help",
    "python mimicmotion/train.py --preset mimicmotion-72 --dry-run": "--help",  # tests/trainer/test_dry_run.py types it
    # tests/trainer/test_parallel_choice.py has it choose
    "python mimicmotion/train.py --preset mimicmotion-72 --dry-run --card H100 --ranks 8 --parallel auto": "--help",
    "python mimicmotion/prepare.py --preset mimicmotion-72 --videos my_videos --report": "--help",
    "python mimicmotion/prepare.py --preset mimicmotion-72 --videos my_videos --dry-run": "--help",
    "python mimicmotion/prepare.py --preset mimicmotion-72 --videos my_videos more/*.mov": "--help",
    "python mimicmotion/prepare.py --preset mimicmotion-72 --report": "--help",
    "python mimicmotion/prepare.py --preset mimicmotion-72 --verify": "--help",
}
PICTURE = "python mimicmotion/sample.py --image me.png --video dance.mp4"
HOW[f"{PICTURE} --weights MimicMotion_1-1.pth --out out.mp4"] = "--help"
HOW[f"{PICTURE} --run-dir runs/mimicmotion-72 --seeds 0 1 2 --fps 15 --sound"] = "--help"
HOW[f"torchrun --nproc-per-node 2 {PICTURE.removeprefix('python ')} --run-dir runs/mimicmotion-72"] = "--help"
HOW['pip install -e ".[app]"'] = "--dry-run --no-deps --no-build-isolation"
HOW["python mimicmotion/app.py --run-dir runs/demo"] = "--help"
HOW['pip install -e ".[lora]"'] = "--dry-run --no-deps --no-build-isolation"
for lora in ("", " --lora adapter --layout diffusers"):
    HOW[f"python mimicmotion/export.py --run-dir runs/lora-72{lora}"] = "--help"
HOW["python mimicmotion/export.py --run-dir runs/mimicmotion-72 --layout comfyui"] = "--help"
HOW["python mimicmotion/evaluate.py --run-dir runs/mimicmotion-72 --against runs/mimicmotion-16"] = "--help"
# What `make verify-deep` runs of benches whose parts have tests of their own, instead of --help.
DEEP = {
    "python bench/modelled.py": "as typed",
    "python bench/train_step.py": "--providers checkpoint fused --frames 2 --size 64x64 --out {tmp}",
    "python bench/predicted_step.py": "as typed",
    "python bench/parallel.py": "--counts 1 --cards H100 --frames 2 --size 64x64 --out {tmp}",
    "python bench/parallel.py --measure": "--rounds 1 --out {tmp}",
}
PARSED = ("torchrun --nproc-per-node 8 mimicmotion/train.py", "torchrun --nproc-per-node 1 mimicmotion/train.py")


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, text) of every fenced block of a language."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(name, text) for name in DOCUMENTS for text in pattern.findall((ROOT / name).read_text())]


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for _, text in blocks("bash") for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one command leaves what the next one reads."""
    return tmp_path_factory.mktemp("readme")


def test_every_command_has_a_way_to_run() -> None:
    assert {line for line in commands() if not line.startswith(PARSED)} == set(HOW)


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith(PARSED)])
def test_command_for_many_gpus_parses(command: str) -> None:
    words = shlex.split(command)[4:]
    assert parse(words).config.preset == "mimicmotion-72"


@pytest.mark.parametrize(
    ("command", "how"),
    [*HOW.items(), *(pytest.param(command, how, marks=pytest.mark.deep) for command, how in DEEP.items())],
)
def test_command(command: str, how: str, folder: Path) -> None:
    words = shlex.split(command)
    if how == "dry run of make":
        words.insert(1, "-n")
    elif how != "as typed":
        words += shlex.split(how.format(tmp=folder))
    if how == "--help" and words[0] == "torchrun":  # it would be that of two ranks
        words = ["python", *words[3:]]
    if words[0] == "python":
        ran = started.python(words[1:], environment=QUIET_PROFILER | os.environ | TUNED_ALLOCATOR)
    else:
        environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    printed = ran.stdout + ran.stderr
    if "--check-pose-order" in words and "pose check failed" in printed:
        return  # two steps of training cannot follow poses; that it is refused is what is asked of it here
    assert ran.returncode == 0, printed[-3000:]


@pytest.mark.parametrize(("document", "text"), blocks("python"))
def test_python_block_runs(document: str, text: str) -> None:
    exec(compile(text, document, "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    quoted = re.findall(r"`((?:csrc|mmkernels|mimicmotion|bench|tests|docs|presets|\.ci)/[\w./-]*)`", text)
    assert [path for path in quoted if not (ROOT / path).exists() and "<op>" not in path] == []


def test_file_map_is_true() -> None:
    text = (ROOT / "docs/design.md").read_text()
    (tree,) = re.findall(r"## Files\n\n```\n(.*?)```", text, re.DOTALL)
    folder = ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
        for name in re.findall(r"(?<![\w<>.])([a-z_]\w*(?:/|\.py|\.cpp))", line):
            assert (ROOT / folder / name).exists() or (ROOT / name).exists(), f"{folder}{name}"


def test_no_figure_is_left_open() -> None:
    assert not re.findall(r"@[A-Z_]+@", "".join((ROOT / name).read_text() for name in DOCUMENTS))
