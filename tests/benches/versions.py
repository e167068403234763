"""The tests of ops and blocks under several releases of torch, each in a virtual environment of its own.

    python tests/benches/versions.py [--folder build/versions] [2.8.0 2.11.0 2.14.1]

Without releases: the oldest that pyproject.toml allows, the oldest that its extra `small` does, 2.11.0 (what the first
GPU run had) and the newest that there is. The two oldest run with the oldest series of all else that pyproject.toml
gives a least release of: what is allowed and does not pass here is not allowed, so the floor there is raised. The
others run with the newest of everything.

An environment is made once, with pip, several GB each, and kept in the folder; Triton is the one that a release of
torch brings. The native module is the one built in this checkout: it knows no torch. Ends with 1 where a release fails.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEWEST = "newest"
FIRST_ON_A_GPU = "2.11.0"
# The tests of blocks, beside those marked `op`.
BLOCKS = (
    "blocks/test_exactness", "blocks/test_gradient_checkpointing", "blocks/test_recognition", "blocks/test_replacement",
    "blocks/test_up_block", "model/test_unet", "ops/test_output_head",
)  # fmt: skip
# What those tests import, of all that pyproject.toml lists.
PACKAGES = (
    "torch", "numpy", "diffusers", "transformers", "safetensors", "rich", "scipy", "torchao", "pytest", "hypothesis",
)  # fmt: skip


def oldest(pyproject: str) -> dict[str, dict[str, str]]:
    """By release of torch, the least of each package: without the extra `small`, which asks for more, and with it."""
    small = re.search(r"^small = .*$", pyproject, re.MULTILINE)
    texts = [pyproject.replace(small[0], ""), small[0]] if small else [pyproject]
    found: dict[str, dict[str, str]] = {}
    least: dict[str, str] = {}
    for text in texts:
        least = least | dict(re.findall(r'"([a-z-]+)>=([0-9.]+)["; ,]', text))
        found[whole(least["torch"])] = least
    return found


def whole(release: str) -> str:
    """A release with three numbers, as torch's are written."""
    return ".".join([*release.split("."), "0", "0"][:3])


def requirements(release: str, least: dict[str, dict[str, str]]) -> list[str]:
    """What pip is asked for. A floor of torch comes with every other floor."""
    floors = least.get(release, {})
    names = [name for name in PACKAGES if name != "torch" and (name in floors or name != "torchao" or not floors)]
    found = [f"{name}=={floors[name]}.*" if name in floors else name for name in names]
    # diffusers 0.27 imports what later releases of its hub have not.
    hub = ["huggingface_hub<0.26"] if floors and "torchao" not in floors else []
    return ["torch" if release == NEWEST else f"torch=={release}", *found, *hub]


def marks_op(path: Path) -> bool:
    """Whether a test file marks a test, or all of it, as one of an op; what stands in a string is no mark."""
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.op" for node in ast.walk(tree))


def tests() -> list[str]:
    """Files of the tests of ops and blocks."""
    of_ops = [path for path in (ROOT / "tests").rglob("test_*.py") if marks_op(path)]
    return sorted({str(path.relative_to(ROOT)) for path in of_ops} | {f"tests/{name}.py" for name in BLOCKS})


def environment(release: str, folder: Path, least: dict[str, dict[str, str]]) -> Path:
    """Python of the environment of a release, which is made where it is not there."""
    wanted = requirements(release, least)
    where, python = folder / release, folder / release / "bin/python"
    note = where / "installed"
    if note.exists() and note.read_text().split() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(where)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *wanted], check=True)
    # It runs Triton IR on the CPU, on Python 3.11 as well, whatever its metadata says.
    subprocess.run([*install, "--no-deps", "--ignore-requires-python", "ttsem==0.1.0"], check=True)
    note.write_text("\n".join(wanted))
    return python


def run(release: str, python: Path) -> int:
    """The tests under one release, on this terminal."""
    show = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('torch', 'triton', 'diffusers')))"
    versions = subprocess.run([str(python), "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    print(f"\n== {release}: {versions}", flush=True)
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *tests()]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Run each release and say which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", help="of torch")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/versions", help="where environments are kept")
    asked = parser.parse_args(arguments)
    least = oldest((ROOT / "pyproject.toml").read_text())
    releases = asked.releases or [*least, FIRST_ON_A_GPU, NEWEST]
    failed = [release for release in releases if run(release, environment(release, asked.folder.resolve(), least))]
    print(f"\nfailed: {', '.join(failed)}" if failed else f"\npassed: {', '.join(releases)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
