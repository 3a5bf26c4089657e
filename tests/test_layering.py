"""Who may import whom: the table of the design, checked against the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The core, lowest first. A module imports from its own level or below.
LEVELS = (
    {"errors", "devices", "history"},
    {"qtype", "source", "hadamard", "audit", "generated", "gpu"}
    | {"memory", "library", "export_errors", "acceptance"},
    {"target", "cached", "format"},
    {"ops"},
    {"program"},
    {"rewrite"},
    {"op_families", "in_place"},
    {"integer", "regions", "scaling", "rotatable", "probing", "rotary", "plan", "recipe", "spec"},
    {"calibration", "hessian", "rounding", "stages", "journal", "divergence", "differentiable"},
    {"outliers", "fitting", "overflow"},
    {"data", "bench", "study"},
    {"allocation"},
    {"findings", "page", "charts", "terminal", "generation"},
    {"mixed_report", "figures", "report_formats"},
    {"distributions"},
    {"observe", "verify", "artifact", "report", "summary", "inspection", "running", "testing"},
    {"meeting"},
    {"attribution", "manifest", "sources"},
    {"explaining"},
    {"language", "language_bench"},
)
# They know the order of the passes and the names of the backends; nothing else does.
DRIVERS = {
    "compiler", "steps", "mixed", "mixer", "choosing", "costs", "workers", "deliver", "lowering",
    "cli", "cli_language", "cli_mixed", "cli_app", "cli_compile", "cli_artifact", "cli_lists",
    "benching", "__init__", "__main__",
}  # fmt: skip
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# Folder → the folders beside it that it may import from, its own not among them.
FOLDERS = {
    "qcompiler": set(),
    "passes": {"qcompiler"},
    "backends": {"qcompiler", "kernels"},
    "kernels": {"qcompiler", "kernels"},
    "models": {"qcompiler", "models"},
}
# Folder → the only core modules that it may import; all but the drivers where it is not listed.
CORE_ONLY = {"kernels": {"qtype", "target", "errors"}, "models": {"spec", "errors", "source"}}
DRIVERS_MAY = {"passes", "backends", "models"}

# Third-party runtimes, by the folders that may import them; anything else is free.
RUNTIMES = {
    "onnx": {"backends"},
    "onnx_graphsurgeon": {"backends"},
    "onnx_ir": {"backends"},
    "onnxscript": {"backends"},
    "onnxruntime": {"backends"},
    "tvm": {"backends", "kernels"},
    "transformers": {"models"},
}

FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Every imported name, absolute, with its line: `a.b` for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def place_of(module: str) -> tuple[str, str] | None:
    """Folder and file of one of our modules: `qcompiler.passes.smooth` → ("passes", "smooth")."""
    head, *rest = module.split(".")
    if head != "qcompiler":
        return None
    if rest and rest[0] in FOLDERS and rest[0] != "qcompiler":
        return rest[0], rest[1] if len(rest) > 1 else "__init__"
    return "qcompiler", rest[0] if rest else "__init__"


def violation(folder: str, name: str, module: str) -> str | None:
    """What is wrong with importing `module` in `folder`/`name`.py, or None."""
    head = module.partition(".")[0]
    if head in FOLDERS and head != "qcompiler":
        return f"import qcompiler.{head}, not {head}: that would be a second copy of every class"
    driver = folder == "qcompiler" and name in DRIVERS
    if head in RUNTIMES and folder not in RUNTIMES[head] and not driver:
        return f"{head} belongs to {', '.join(sorted(RUNTIMES[head]))}"
    place = place_of(module)
    if place is None:
        return None
    other_folder, other = place
    if driver:
        return None if other_folder in DRIVERS_MAY | {"qcompiler"} else "not a driver's business"
    if folder == "qcompiler":
        if other_folder != "qcompiler":
            return "the core knows no pass, backend, kernel or model"
        if other in DRIVERS - {"__init__"}:
            return "the core knows no driver"
        if other in LEVEL and LEVEL[other] > LEVEL.get(name, len(LEVELS)):
            return f"{other} stands above {name} in the core's order"
        return None
    if other_folder == folder:
        # One runtime may take several files, named after it: ort.py, ort_surgery.py.
        family = folder == "backends" and name.partition("_")[0] == other.partition("_")[0]
        allowed = name == "__init__" or family or folder in FOLDERS[folder]
        return None if allowed else f"one of {folder} may not know another"
    if other_folder not in FOLDERS[folder]:
        return f"{folder} may not import from {other_folder}"
    if other_folder == "qcompiler":
        if other in DRIVERS - {"__init__"}:
            return "only people and tests call the drivers"
        if folder in CORE_ONLY and other not in CORE_ONLY[folder] | {"__init__"}:
            return f"{folder} may import only {', '.join(sorted(CORE_ONLY[folder]))} of the core"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports(path: Path) -> None:
    folder = path.parent.name
    package = "qcompiler" if folder == "qcompiler" else f"qcompiler.{folder}"
    found = [
        f"{folder}/{path.name}:{line}: {module}: {reason}"
        for module, line in imports(ast.parse(path.read_text()), package)
        if (reason := violation(folder, path.stem, module))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("folder", "name", "module"),
    [
        ("qcompiler", "qtype", "qcompiler.target"),
        ("qcompiler", "program", "qcompiler.rewrite.Draft"),
        ("qcompiler", "verify", "qcompiler.passes"),
        ("qcompiler", "report", "qcompiler.compiler.compile"),
        ("qcompiler", "verify", "onnxruntime"),
        ("passes", "smooth", "qcompiler.passes.fold_norm"),
        ("passes", "smooth", "qcompiler.backends.ort"),
        ("passes", "smooth", "passes.fold_norm"),
        ("passes", "smooth", "onnx"),
        ("backends", "ort", "qcompiler.backends.relax"),
        ("backends", "ort", "qcompiler.passes.smooth"),
        ("models", "minilm", "qcompiler.program.Program"),
        ("kernels", "gemm", "qcompiler.program"),
        ("qcompiler", "cli", "qcompiler.kernels.gemm"),
    ],
)
def test_the_table_refuses(folder: str, name: str, module: str) -> None:
    assert violation(folder, name, module)


def test_every_core_module_has_a_level() -> None:
    """A new module of the core gets its place in LEVELS."""
    names = {path.stem for path in (ROOT / "qcompiler").glob("*.py")}
    assert not names - DRIVERS - LEVEL.keys()


def test_core_has_no_cycles() -> None:
    """Modules of one level may import each other, in one direction, function bodies included."""
    graph = {
        path.stem: {
            place[1]
            for module, _ in imports(ast.parse(path.read_text()), "qcompiler")
            if (place := place_of(module)) and place[0] == "qcompiler" and place[1] in LEVEL
        }
        for path in (ROOT / "qcompiler").glob("*.py")
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_folders_are_flat() -> None:
    """A subfolder would import from an editable install and be missing from the wheel."""
    folders = [path for name in FOLDERS for path in (ROOT / name).glob("*/")]
    assert not [path for path in folders if path.name != "__pycache__"]


def test_import_is_light() -> None:
    """`import qcompiler` loads no runtime and no model library."""
    heavy = sorted({*RUNTIMES, "tokenizers", "sentence_transformers", "scipy", "matplotlib"})
    code = f"import qcompiler, sys; print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
