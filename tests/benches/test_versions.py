"""Which releases `make verify-deep` tries: the oldest with every floor of pyproject.toml, each in its environment."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import versions
from places import ROOT

from mmkernels import version

LEAST = versions.oldest((ROOT / "pyproject.toml").read_text())


def test_floors_are_those_of_every_list_of_pyproject_and_more_with_the_extra() -> None:
    text = 'dependencies = [\n  "torch>=2.6",  # why\n  "numpy",\n]\nsmall = ["a-o>=0.18", "torch>=2.10"]\n"b>=3.6; x",'
    without = {"torch": "2.6", "b": "3.6"}
    assert versions.oldest(text) == {"2.6.0": without, "2.10.0": {"torch": "2.10", "a-o": "0.18", "b": "3.6"}}
    assert all({"torch", "diffusers", "transformers", "hypothesis"} <= set(least) for least in LEAST.values())
    assert ["torchao" in least for least in LEAST.values()] == [False, True]


def test_kernels_refuse_what_pyproject_does_not_allow() -> None:
    least = LEAST[versions.whole(version.LEAST["torch"])]
    assert {name: least[name] for name in version.LEAST} == version.LEAST


def test_only_the_oldest_torch_comes_with_the_oldest_of_the_rest() -> None:
    for release, least in LEAST.items():
        found = versions.requirements(release, LEAST)
        assert found[0] == f"torch=={release}" and f"diffusers=={least['diffusers']}.*" in found
        assert any("torchao" in package for package in found) == ("torchao" in least)
        assert ("huggingface_hub<0.26" in found) == (least["diffusers"] == "0.27")
    assert versions.requirements("2.99.0", LEAST)[0] == "torch==2.99.0"
    assert {"diffusers", "torchao"} < set(versions.requirements("newest", LEAST))
    assert versions.requirements("newest", LEAST)[0] == "torch"


def test_every_test_of_an_op_and_of_a_block_is_run() -> None:
    found = versions.tests()
    assert {"tests/ops/test_every_op.py", "tests/blocks/test_blocks.py", "tests/model/test_unet.py"} <= set(found)
    assert "tests/benches/test_verification.py" not in found  # which holds the mark in a string
    assert all((ROOT / path).exists() for path in found)


def test_an_environment_is_made_once_for_its_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        commands.append(command)
        (tmp_path / "2.10.0").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", run)
    python = versions.environment("2.10.0", tmp_path, {"2.10.0": {"torch": "2.10"}})
    assert python == tmp_path / "2.10.0/bin/python"
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"], ["-m", "pip"]]
    assert "torch==2.10.0" in commands[1]
    versions.environment("2.10.0", tmp_path, {"2.10.0": {"torch": "2.10"}})
    assert len(commands) == 3
    versions.environment("2.10.0", tmp_path, {"2.10.0": {"torch": "2.10", "diffusers": "0.33"}})
    assert len(commands) == 6 and "diffusers==0.33.*" in commands[4]


def test_a_release_that_fails_is_named_and_the_others_run(monkeypatch: Any, capsys: Any) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **settings: Any) -> Any:
        ran.append(command)
        failing = command[0] == "2.11.0" and "pytest" in command
        return SimpleNamespace(returncode=int(failing), stdout="torch x")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(versions, "environment", lambda release, folder, least: Path(release))
    assert versions.main([]) == 1
    assert capsys.readouterr().out.endswith("\nfailed: 2.11.0\n")
    assert [command[0] for command in ran if "pytest" in command] == [
        *LEAST,
        "2.11.0",
        "newest",
    ]
    assert versions.main(["2.14.1"]) == 0


def test_an_older_release_is_refused_with_what_to_do() -> None:
    version.refuse_older()
    with pytest.raises(ImportError, match=r"torch is [0-9.+a-z]+, wanted 9.0 or newer; run pip install --upgrade"):
        version.refuse_older({"torch": "9.0"})
    version.refuse_older({"torch": "1.99", "no-such-package": "3.0"})
