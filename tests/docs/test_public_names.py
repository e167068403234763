"""The public names of mmkernels: each is there when it is asked for, says what it is, and its example runs."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from places import ROOT

import mmkernels

# What a trainer writes; pyright has to know every type in it.
TYPED = """
from pathlib import Path
from typing import assert_type
from collections.abc import Callable
import torch
import mmkernels

def f(unet: torch.nn.Module, x: torch.Tensor) -> None:
    assert_type(mmkernels.replace(unet, plan=mmkernels.read_plan(Path("plan.json"))), mmkernels.Replacement)
    undo: Callable[[], None] = mmkernels.replace(unet)
    assert_type(mmkernels.report(unet), mmkernels.Report)
    assert_type(mmkernels.dead_parameters(unet), set[str])
    assert_type(mmkernels.temporal_attention(x, x, x), torch.Tensor)
    mmkernels.replace(unet, plan=3)
"""


@pytest.fixture(scope="module")
def unet() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), num_attention_heads=(2, 4), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip


@pytest.mark.parametrize("name", mmkernels.__all__)
def test_example_of_a_public_name_runs(name: str, unet: UNetSpatioTemporalConditionModel, tmp_path: Path) -> None:
    known = {"mmkernels": mmkernels, "torch": torch, "unet": unet, "folder": tmp_path}
    tests = doctest.DocTestFinder(recurse=False).find(getattr(mmkernels, name), name, globs=known)
    (example,) = (test for test in tests if test.examples)
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert results.failed == 0, "".join(said)


def test_public_names_are_listed_and_no_others_are_there() -> None:
    assert set(mmkernels.__all__) <= set(dir(mmkernels))
    with pytest.raises(AttributeError, match="no attribute 'temporal'"):
        _ = mmkernels.temporal


def test_import_brings_neither_torch_nor_diffusers() -> None:
    code = "import sys, mmkernels; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_types_are_there_for_others(tmp_path: Path) -> None:
    assert (ROOT / "mmkernels/py.typed").exists()
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.exists():
        pytest.skip("pyright comes with the extra lint")
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}"], "pythonVersion": "3.11"}}')
    words = [pyright, "--pythonpath", sys.executable, "-p", tmp_path]
    checked = subprocess.run(words, capture_output=True, text=True, check=False)
    errors = [line for line in checked.stdout.splitlines() if " - error: " in line]
    assert len(errors) == 1 and "typed.py:14" in errors[0] and '"plan"' in errors[0], checked.stdout
