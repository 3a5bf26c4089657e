"""The command line's application: what its commands have in common.

Heavy imports are inside the commands, so that `--help` is there at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qcompiler.program import Program
    from qcompiler.spec import ModelSpec

EXIT_CODES = (
    "[bold]Exit codes[/]  0 done · 1 a bound or a promise was broken · 2 bad input or usage · "
    "3 internal error · 130 interrupted"
)


def examples(*lines: str) -> str:
    """An epilog: one example a line, then the exit codes."""
    return "\n".join(
        ["[bold]Examples[/]", *(f"  [cyan]{line}[/]" for line in lines), "", EXIT_CODES]
    )


app = typer.Typer(
    name="qcompiler",
    help="Compile PyTorch models to integers: captured, rewritten, quantized, lowered, and "
    "measured at every step. Each command has its own --help with examples.",
    epilog=examples(
        "qcompiler models",
        "qcompiler compile minilm --recipe w8a8 --out build/minilm",
        "qcompiler verify build/minilm",
        "qcompiler bench build/minilm --against float,ort-dynamic",
        "qcompiler inspect build/minilm --what audit",
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and no progress.")]
MIXED = "Mixed precision (with --recipe mixed)"
Jobs = Annotated[int, typer.Option(min=1, help="Processes that measure.", rich_help_panel=MIXED)]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="A Ray cluster that measures instead of this machine; 'local' starts one.",
        rich_help_panel=MIXED,
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name from 'qcompiler models'; file.py:function that returns a ModelSpec; a "
        ".pt2 file of torch.export.save; or hf:FOLDER with a Hugging Face model.",
    ),
]
Machine = Annotated[
    str,
    typer.Option(
        "--target", metavar="TARGET", help="What will run the model: 'qcompiler targets'."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DIR|FUNCTION",
        help="Real inputs: texts (.txt, .jsonl), tensors (.npz, .safetensors, .pt), a folder "
        "of images or tensors, or module:function; the model's own where not given. A quarter "
        "is held out, for verification only.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one field of the recipe; repeatable."),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that 'compile' wrote.")]


def _version(asked: bool) -> None:
    if asked:
        from qcompiler import __version__

        typer.echo(f"qcompiler {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def check_out(out: Path, force: bool) -> None:
    """Refuse an output folder that exists before any work is done; `compile` checks it again."""
    if out.exists() and not force:
        from qcompiler.errors import InputError

        raise InputError(f"{out} exists; give another --out, or --force to replace it")


def load_named(text: str) -> tuple[ModelSpec | Program, ModelSpec]:
    """What to compile, and a spec that says how its calibration data must look."""
    from qcompiler.models import find

    found = find(text)
    if not isinstance(found, Path):
        return found, found
    from qcompiler.inspection import spec_of
    from qcompiler.program import load_pt2

    program = load_pt2(found)
    return program, spec_of(program, found.stem)


def capture_named(text: str) -> Program:
    """The program of a model, as captured."""
    from qcompiler.program import Program, capture

    source, spec = load_named(text)
    if isinstance(source, Program):
        return source
    return capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
