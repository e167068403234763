"""mmkernels works where only torch, numpy and diffusers are; what else a command needs, it names."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import ROOT

HERE = ROOT / "tests/docs"
TRAINER = "which is not installed: `pip install -e .` in the checkout installs all of the trainer"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "alone.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_kernels_work_with_torch_numpy_and_diffusers_alone() -> None:
    ran = run(str(HERE / "replaced_alone.py"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "fused {'fused'}",
        "make_plan making a plan needs scipy, which is not installed: pip install scipy",
        "there []",
    ]


@pytest.mark.parametrize(("words", "says"), [
    (("mmkernels.plan",), "python -m mmkernels.plan needs tyro, which is not installed: pip install tyro"),
    (("mmkernels.preview", "x:y"), "python -m mmkernels.preview needs tyro, which is not installed: pip install tyro"),
    (("--but-for", "av", "mimicmotion/train.py", "--help"), "mimicmotion/train.py needs av, " + TRAINER),
    *(
        (("--but-for", "tyro", f"mimicmotion/{name}.py", "--help"), f"mimicmotion/{name}.py needs tyro, " + TRAINER)
        for name in ("prepare", "sample", "evaluate", "export", "app")
    ),
])  # fmt: skip
def test_a_missing_package_is_named_in_one_sentence(words: tuple[str, ...], says: str) -> None:
    ran = run(*words)
    assert (ran.returncode, ran.stderr.strip().splitlines()[-1:]) == (1, [says])
    assert "Traceback" not in ran.stderr


def last_words(code: str) -> str:
    code = "from mmkernels.optional import explain_missing, optional; explain_missing('this'); " + code
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False).stderr


def test_a_reason_is_kept_and_other_errors_keep_their_traceback() -> None:
    assert last_words("optional('nowhere.inside', 'a picture')") == (
        "a picture needs nowhere, which is not installed: pip install nowhere\n"
    )
    assert last_words("optional('nowhere', 'a picture')").startswith("a picture needs nowhere")
    assert "Traceback" in last_words("import mmkernels.nothing")
    assert "Traceback" in last_words("[][0]")
