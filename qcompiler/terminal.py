"""The command line's manners: where output goes, progress, and one clear line for each error."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qcompiler.errors import QCompilerError, VerifyError

BROKEN, BAD_INPUT, INTERNAL, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 130, 141
PIPED_WIDTH = 120  # columns of output that goes to a file or a pipe
RECENT = 6  # steps that stay in view while the next ones run


def stdout() -> Console:
    """The console of results."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def say(message: str) -> None:
    """One line on stderr, with the program's name."""
    Console(stderr=True, highlight=False).print(Text(f"qcompiler: {message}"), soft_wrap=True)


def print_json(value: Any) -> None:
    """JSON on stdout, and nothing else."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def table(*titles: str, numbers: str = "") -> Table:
    """An unboxed table; `numbers` has an `n` for each column that is aligned as numbers."""
    result = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for title, kind in zip(titles, numbers.ljust(len(titles)), strict=True):
        result.add_column(title, justify="right" if kind == "n" else "left", overflow="fold")
    return result


def add_row(rows: Table, *cells: str | Text) -> None:
    """A row whose strings are text, never markup: names may hold brackets."""
    rows.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


@contextlib.contextmanager
def steps(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that names the step which begins; a terminal shows it with its elapsed time.

    What the steps themselves print goes to stderr, so that stdout holds results only.
    """
    console = Console(file=sys.stderr)  # this file, also while sys.stderr is something else
    if quiet or not console.is_terminal:
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda step: None
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    tasks: list[TaskID] = []
    with Progress(*columns, console=console, transient=True) as progress:

        def begin(step: str) -> None:
            if tasks:
                progress.update(tasks[-1], completed=1)
            if len(tasks) >= RECENT:
                progress.update(tasks[-RECENT], visible=False)
            tasks.append(progress.add_task(step.replace("_", " "), total=1))

        with contextlib.redirect_stdout(sys.stderr):
            yield begin


@contextlib.contextmanager
def unwarned(debug: bool) -> Iterator[None]:
    """Without `debug`, no warnings of libraries about themselves, which the user cannot answer."""
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def guarded(debug: bool, interrupted: str = "interrupted") -> Iterator[None]:
    """Turn exceptions into one line on stderr and an exit code; `debug` adds the traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError as error:
        _close_stdout()
        raise typer.Exit(PIPE_CLOSED) from error
    except KeyboardInterrupt as error:
        say(interrupted)
        raise typer.Exit(INTERRUPTED) from error
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        say(f"error: {message}")
        raise typer.Exit(code) from error


def explain(error: Exception) -> tuple[str, int]:
    """One line for people, and the exit code."""
    text = " ".join(str(error).split())
    match error:
        case VerifyError():
            return text, BROKEN
        case QCompilerError():
            return text, BAD_INPUT
        case OSError(errno=errno.ENOSPC):
            where = f" ({error.filename})" if error.filename else ""
            advice = "nothing was written; free some space, or give another --out"
            return f"the disk is full{where}: {advice}", BAD_INPUT
        case OSError(strerror=str() as reason):
            return f"{error.filename}: {reason}" if error.filename else reason, BAD_INPUT
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return (
            "out of memory; use smaller or fewer calibration batches (--set batches=…)",
            BAD_INPUT,
        )
    kind = type(error).__name__
    what = f"{kind}: {text}" if text else kind
    return f"internal error: {what}; run again with --debug and report it", INTERNAL


def _close_stdout() -> None:
    """The reader has gone: what is still buffered goes nowhere, without a complaint at exit."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(*parts: RenderableType) -> None:
    """Print to stdout; strings are wrapped by the terminal and mean nothing but themselves."""
    console = stdout()
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)
