"""The command line: each module of commands puts its own into the application."""

from __future__ import annotations

from qcompiler import cli_artifact, cli_compile, cli_lists
from qcompiler.cli_app import app

__all__ = ["app", "cli_artifact", "cli_compile", "cli_lists", "main"]


def main() -> None:
    """The `qcompiler` command."""
    app(prog_name="qcompiler")
