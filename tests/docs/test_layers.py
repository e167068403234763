"""Arrows of import point one way: a module imports only what lies in a lower layer (lazy imports included)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from places import ROOT

# Where each package lies.
PACKAGES = {"mmkernels": ROOT, "mimicmotion": ROOT, "ptxrun": ROOT / "tools/ptxrun", "bench": ROOT}

# Of each layer, what lies in it; the longest name that a module begins with says where it belongs.
LAYERS: dict[str, tuple[str, ...]] = {
    "L1": tuple(
        f"mmkernels.{name}"
        for name in (
            "allocator", "cards", "costs", "extension", "files", "frames", "known_choices", "matrices", "optional",
            "rows", "scratch", "tuning", "version", "weight_parts",
        )
    ),
    "L2": ("mmkernels.kernels",),
    "L3": ("mmkernels.ops", "mmkernels.memory"),
    "L4": ("mmkernels.blocks",),
    "L5": ("mmkernels", "mmkernels.memory.__main__"),
    "L6": tuple(
        f"mimicmotion.{name}"
        for name in (
            "__init__", "charts", "config", "data", "diffusion", "json_values", "loss", "model", "page", "parallel",
            "paths", "pixels", "shapes", "tensor_file",
        )
    ),
    "L7": ("mimicmotion",),
    "L8": ("mimicmotion.memory_report", "mimicmotion.trainer", "mimicmotion.validation"),
    "L9": tuple(
        f"mimicmotion.{name}"
        for name in ("app", "commands", "evaluate", "export", "gate", "prepare", "sample", "train")
    ),
}  # fmt: skip
NUMBERS = {name: int(layer[1:]) for layer, names in LAYERS.items() for name in names}


def layer(module: str) -> int:
    names = (".".join(module.split(".")[:length]) for length in range(module.count(".") + 1, 0, -1))
    found = next((NUMBERS[name] for name in names if name in NUMBERS), None)
    assert found is not None, f"{module} is in no layer: add it to LAYERS where it belongs"
    return found


def module_name(path: Path) -> str:
    root = next((root for name, root in PACKAGES.items() if path.is_relative_to(root / name)), ROOT)
    return ".".join(path.relative_to(root).with_suffix("").parts)


def sources() -> list[Path]:
    return sorted(path for package, root in PACKAGES.items() for path in (root / package).rglob("*.py"))


def resolve(name: str) -> str | None:
    """The project's module that `import name` runs, or None for anything else."""
    root = PACKAGES.get(name.split(".")[0])
    if root is None:
        return None
    path = root.joinpath(*name.split("."))
    if path.with_suffix(".py").exists():
        return name
    return f"{name}.__init__" if (path / "__init__.py").exists() else None


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if resolve(name) else str(node.module) for name in names]
        else:
            continue
        found.update(module for name in names if (module := resolve(name)))
    return found


def op_of(module: str) -> str | None:
    """The op that a module of mmkernels.ops is, or bears the name of."""
    stems = sorted((path.stem for path in (ROOT / "mmkernels/ops").glob("[a-z]*.py")), key=len)
    name = module.removeprefix("mmkernels.ops.")
    return next((s for s in stems if name == s or name.startswith(f"{s}_")), None) if name != module else None


def forbidden(importer: str, imported: str) -> str | None:
    """Why this arrow may not be, or None."""
    package, from_package = imported.split(".")[0], importer.split(".")[0]
    if package == from_package and package in ("bench", "ptxrun"):
        return None
    if package == "bench" or from_package == "ptxrun":
        return f"{importer} imports {imported}: ptxrun stands alone, and nobody imports the benches"
    if package == "ptxrun" and from_package != "bench":
        return f"{importer} imports {imported}, a tool of tests and benches"
    if from_package == "bench":
        return None
    ops = op_of(importer), op_of(imported)
    if None not in ops and ops[0] != ops[1]:
        return f"{importer} imports {imported}, another op"
    if layer(imported) <= layer(importer):
        return None
    return f"{importer} (layer {layer(importer)}) imports {imported} (layer {layer(imported)})"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    importer = module_name(path)
    arrows = imports(ast.parse(path.read_text()))
    assert [why for imported in sorted(arrows) if (why := forbidden(importer, imported))] == []


def test_no_cycles() -> None:
    graph = {module_name(p): {i for i in imports(ast.parse(p.read_text())) if i != module_name(p)} for p in sources()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join([*trail, module])}"
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_rule_can_fail() -> None:
    assert forbidden("mmkernels.ops.blend", "mmkernels.ops.spatial_attention") is not None
    assert forbidden("mmkernels.blocks.a", "mimicmotion.config") is not None
    assert forbidden("mimicmotion.loss", "mimicmotion.trainer") is not None
    assert forbidden("mimicmotion.trainer", "ptxrun.launching") is not None
    assert forbidden("ptxrun.launching", "mmkernels.extension") is not None
    assert forbidden("mimicmotion.trainer", "mimicmotion.loss") is None


@pytest.mark.parametrize(
    "path",
    [*sources(), *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "tools/ptxrun/tests").rglob("*.py"))],
    ids=module_name,
)
def test_file_is_short(path: Path) -> None:
    most = 250 if path.parent == ROOT / "mmkernels" / "ops" else 350
    assert len(path.read_text().splitlines()) <= most, "split it by concept"


def test_ops_stand_in_no_script_folder_with_a_library_name() -> None:
    """torchrun puts mimicmotion/ first on sys.path: no module there may shadow another."""
    import sys

    names = {path.stem for path in (ROOT / "mimicmotion").glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)
