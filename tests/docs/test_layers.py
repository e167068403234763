"""Arrows of import point one way: a module imports only what lies in a lower layer (lazy imports included)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from places import ROOT

# Where each package lies.
PACKAGES = {"mmkernels": ROOT, "mimicmotion": ROOT, "ptxrun": ROOT / "tools/ptxrun", "bench": ROOT}

# The first prefix that matches a module's dotted name gives its layer.
LAYERS = [
    ("mmkernels.extension", 1),
    ("mmkernels.known_choices", 1.4),
    ("mmkernels.version", 1),
    ("mmkernels.tuning", 1.5),
    ("mmkernels.allocator", 1.2),
    ("mmkernels.costs", 1.2),
    ("mmkernels.scratch", 1.2),
    ("mmkernels.rows", 1.5),
    ("mmkernels.frames", 1.5),
    ("mmkernels.matrices", 1.6),
    ("mmkernels.cards", 1.5),
    ("mmkernels.kernels.__init__", 1.8),
    ("mmkernels.kernels.launch", 1.8),
    ("mmkernels.kernels.installed", 1.8),
    ("mmkernels.kernels.call", 1.82),
    ("mmkernels.kernels.registry", 1.84),
    ("mmkernels.kernels.dispatch", 1.85),
    ("mmkernels.kernels.convolution", 1.95),
    ("mmkernels.kernels.temporal_attention", 1.95),
    ("mmkernels.kernels.adamw8bit.step", 1.86),
    ("mmkernels.kernels", 1.9),
    ("mmkernels.ops", 2),
    ("mmkernels.memory.__main__", 4.4),
    ("mmkernels.memory", 2),
    ("mmkernels.blocks", 3),
    ("mmkernels.planning.__init__", 3.5),
    ("mmkernels.planning.choices", 3.5),
    ("mmkernels.shares", 3.5),
    ("mmkernels.sites", 3.5),
    ("mmkernels.reporting", 3.6),
    ("mmkernels.replacement", 4),
    ("mmkernels.planning", 4.2),
    ("mmkernels.plan", 4.4),
    ("mmkernels.preview", 4.4),
    ("mmkernels.__main__", 4.1),
    ("mmkernels.__init__", 4.1),
    ("mimicmotion.__init__", 5),
    ("mimicmotion.shapes", 4.9),
    ("mimicmotion.pixels", 4.9),
    ("mimicmotion.optional", 4.9),
    ("mimicmotion.parallel", 4.9),
    ("mimicmotion.config", 5),
    ("mimicmotion.json_values", 5.05),
    ("mimicmotion.paths", 5),
    ("mimicmotion.tensor_file", 5),
    ("mimicmotion.page", 5.1),
    ("mimicmotion.charts", 5.15),
    ("mimicmotion.diffusion", 5.1),
    ("mimicmotion.model", 5.1),
    ("mimicmotion.loss", 5.2),
    ("mimicmotion.lost_ranks", 5.25),
    ("mimicmotion.distributed", 5.3),
    ("mimicmotion.sharding", 5.4),
    ("mimicmotion.frames_group", 5.4),
    ("mimicmotion.data", 5.2),
    ("mimicmotion.in_backward", 5.5),
    ("mimicmotion.moving_average", 5.5),
    ("mimicmotion.weight_update", 5.5),
    ("mimicmotion.generation", 6.5),
    ("mimicmotion.resumption", 6.55),
    ("mimicmotion.pretrained", 6.4),
    ("mimicmotion.model_card", 6.6),
    ("mimicmotion.run_page", 6.2),
    ("mimicmotion.settings_file", 6.5),
    ("mimicmotion.record", 6.5),
    ("mimicmotion.run_folder", 6.5),
    ("mimicmotion.fitting", 6.5),
    ("mimicmotion.micro_batch", 6.5),
    ("mimicmotion.planned_blocks", 6.6),
    ("mimicmotion.figures", 6.6),
    ("mimicmotion.animation", 6.6),
    ("mimicmotion.sampling_memory", 6.7),
    ("mimicmotion.picture_arguments", 6.7),
    ("mimicmotion.picture_to_video", 7.8),
    ("mimicmotion.pipeline", 7.8),
    ("mimicmotion.sound", 5.9),
    ("mimicmotion.person_metrics", 6.1),
    ("mimicmotion.compared", 6.6),
    ("mimicmotion.evaluation_tools", 6.6),
    ("mimicmotion.evaluation_words", 6.8),
    ("mimicmotion.evaluation_page", 6.9),
    ("mimicmotion.evaluation", 6.7),
    ("mimicmotion.trainer", 7),
    ("mimicmotion.commands", 7.5),
    ("mimicmotion.dry_run", 7.5),
    ("mimicmotion.memory_plan", 7.6),
    ("mimicmotion.dry_stages", 7.7),
    ("mimicmotion.memory_report", 7.6),
    ("mimicmotion.validation", 7.6),
    ("mimicmotion.train", 8),
    ("mimicmotion.prepare", 8),
    ("mimicmotion.sample", 8),
    ("mimicmotion.evaluate", 8),
    ("mimicmotion.export", 8),
    ("mimicmotion.app", 8),
    ("mimicmotion.gate", 6),
    ("mimicmotion.", 6),
    ("ptxrun.__init__", 8.9),
    ("ptxrun.triton_launching", 8.8),
    ("ptxrun.mutations", 8.8),
    ("ptxrun.launching", 8.7),
    ("ptxrun.building", 8.6),
    ("ptxrun.assembler", 8.5),
    ("ptxrun.instructions", 8.4),
    ("ptxrun.", 8.3),
    ("bench", 9),
]
# Within one layer these may import each other: parts of one subject. Ops and memory are not among them.
SUBJECTS = (
    "mmkernels.kernels.geglu",
    "mmkernels.kernels.layer_norm",
    "mmkernels.kernels.attention",
    "mmkernels.kernels.temporal_attention",
    "mmkernels.kernels.convolution",
    "mmkernels.kernels.blend",
    "mmkernels.kernels.column_sums",
    "mmkernels.kernels.epilogue",
    "mmkernels.kernels.group_norm",
    "mmkernels.blocks",
    "mmkernels.memory",
    "mmkernels.planning",
    "mimicmotion.model",
    "mimicmotion.data",
    "ptxrun",
    "bench",
)


def layer(module: str) -> float:
    for prefix, number in LAYERS:
        if module == prefix or module.startswith(prefix if prefix.endswith(".") else prefix + "."):
            return number
    raise AssertionError(f"{module} is in no layer: add it to LAYERS where it belongs")


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
    if imported.endswith("__init__") and importer.startswith(imported.removesuffix("__init__")):
        return None if importer == imported else f"{importer} imports its own package"
    if importer.endswith("__init__") and imported.startswith(importer.removesuffix("__init__")):
        return None  # a package's __init__ names its public parts
    if importer.startswith("ptxrun.") and not imported.startswith("ptxrun."):
        return "ptxrun stands alone"
    if layer(imported) < layer(importer):
        return None
    if any(imported.endswith(x) and importer.startswith(imported.removesuffix(x)) for x in ("_triton", "_cuda")):
        return None  # one op in several files
    if op_of(imported) is not None and op_of(imported) == op_of(importer):
        return None  # an op and the parts that bear its name
    same_subject = any(importer.startswith(s) and imported.startswith(s) for s in SUBJECTS)
    if layer(imported) == layer(importer) and same_subject:
        return None
    return f"{importer} (layer {layer(importer)}) imports {imported} (layer {layer(imported)})"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    importer = module_name(path)
    arrows = imports(ast.parse(path.read_text()))
    assert [why for imported in sorted(arrows) if (why := forbidden(importer, imported))] == []


def test_no_cycles_within_a_subject() -> None:
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
    assert forbidden("mmkernels.ops.a", "mmkernels.ops.b") is not None
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
