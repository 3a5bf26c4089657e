"""qcompiler: a quantizing model compiler. `compile` a model, `Artifact.load` it; see the README."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "ModelSpec",
    "Program",
    "QCompilerError",
    "QType",
    "Recipe",
    "Target",
    "capture",
    "compile",
]

_HOMES = {
    "Artifact": "artifact",
    "ModelSpec": "spec",
    "Program": "program",
    "QCompilerError": "errors",
    "QType": "qtype",
    "Recipe": "recipe",
    "Target": "target",
    "capture": "program",
    "compile": "compiler",
}

if TYPE_CHECKING:
    from qcompiler.artifact import Artifact
    from qcompiler.compiler import compile
    from qcompiler.errors import QCompilerError
    from qcompiler.program import Program, capture
    from qcompiler.qtype import QType
    from qcompiler.recipe import Recipe
    from qcompiler.spec import ModelSpec
    from qcompiler.target import Target


def __getattr__(name: str) -> Any:
    """Public names are loaded on first use, so that `qcompiler --help` does not wait for torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"qcompiler.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qcompiler' has no attribute '{name}'")
