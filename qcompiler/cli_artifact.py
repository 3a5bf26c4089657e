"""The commands that take a compiled folder: check, time, run, judge, explain, show."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.cli_app import Debug, Folder, Json, app, capture_named, examples
from qcompiler.terminal import (
    BROKEN,
    add_row,
    guarded,
    print_json,
    show,
    steps,
    table,
    unwarned,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType


class What(StrEnum):
    """What `inspect` shows."""

    PROGRAM = "program"
    PLAN = "plan"
    SITES = "sites"
    HISTORY = "history"
    AUDIT = "audit"
    ALL = "all"


@app.command(
    epilog=examples("qcompiler verify build/minilm", "qcompiler verify build/minilm --json")
)
def verify(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Check an artifact again: its files, and its errors on the data kept with it.

    Exits with 1 when a file is not the one that was written, or an error is beyond its bound.
    """
    with guarded(debug):
        from rich.text import Text

        from qcompiler.findings import decibels

        with steps(as_json) as progress:
            progress("verify")
            import qcompiler.compiler as compiler

            result = compiler.verify(folder)
        if as_json:
            print_json(result)
        else:
            rows = table("check", "value", "bound", "", numbers=" nn ")
            for check in _grouped(result["checks"]):
                value, bound = check["value"], check["bound"]
                measured = isinstance(bound, (int, float))
                add_row(
                    rows,
                    check["what"],
                    decibels(value) if measured else str(value),
                    decibels(bound) if measured else str(bound),
                    Text("ok", "green") if check["ok"] else Text("BROKEN", "bold red"),
                )
            show(rows)
        if not result["ok"]:
            raise typer.Exit(BROKEN)


@app.command(
    epilog=examples(
        "qcompiler bench build/minilm",
        "qcompiler bench build/minilm --against float,ort-dynamic,ort-static --threads 2",
        "qcompiler bench build/minilm --shape 1x128 --shape 8x128 --seconds 10",
    )
)
def bench(
    folder: Folder,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one operator.")] = 1,
    against: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Any of float, ort-dynamic, ort-static, ort-int4, with commas; ort: the last for "
            "language models, the second for others.",
        ),
    ] = "float",
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time to measure, all candidates together.")
    ] = 3.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZES",
            help="Dynamic sizes of the inputs, such as 8x128; of language models the tokens of a "
            "prompt and those before the written ones; repeatable.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time an artifact beside the float model, and beside ONNX Runtime's own quantizers.

    All take turns in one run, so that a busy machine disturbs them alike. Language models read a
    prompt and write tokens one by one.

    Ratios are to the float model. With several --shape, --json prints a list.
    """
    with guarded(debug):
        from qcompiler.errors import InputError, nearest

        known = ["float", "ort", "ort-dynamic", "ort-static", "ort-int4"]
        peers = [name.strip() for name in against.split(",") if name.strip()]
        for name in peers:
            if name not in known:
                raise InputError(f"--against {name}: {nearest(name, known)}")
        results: list[dict[str, Any]] = []
        with steps(as_json) as progress:
            import qcompiler.compiler as compiler

            for sizes in [*shape] if shape else [None]:
                results.append(
                    compiler.bench(
                        folder,
                        against=peers,
                        threads=threads,
                        seconds=seconds,
                        shape=sizes,
                        progress=progress,
                    )
                )
        if as_json:
            print_json(results if len(results) > 1 else results[0])
        else:
            show(*(part for result in results for part in _bench_table(result)))


@app.command(
    epilog=examples(
        "qcompiler run build/minilm",
        "qcompiler run build/minilm --input input_ids=ids.npy --input attention_mask=mask.npy "
        "--out outputs",
        'qcompiler run build/smollm2-w4 --prompt "The capital of France is" --max-new-tokens 64',
        'qcompiler run build/smollm2-w4 --prompt "Once upon" --temperature 0.8 --top-p 0.95',
    )
)
def run(
    folder: Folder,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=FILE",
            help="An input as .npy; repeatable. Data kept with the artifact where none is given.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the outputs there as .npy.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Let a language model write on from this text."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to write at most; the model's context may end earlier.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits; 0 takes the most likely token each time.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens only; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute; all cores by default.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run an artifact once and describe its outputs, or let a language model write on.

    Code for another machine runs under qemu's user-mode emulator. With --prompt the text is printed
    as it comes; tokens per second of reading the prompt and of writing go to stderr.
    """
    with guarded(debug):
        if prompt is not None:
            from qcompiler.cli_language import write

            sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
            write(folder, prompt, max_new_tokens, sampling, threads, as_json)
            return
        from qcompiler.running import run_once

        with steps(as_json) as progress:
            progress("run")
            result = run_once(folder, given or [], out, threads)
        if as_json:
            print_json(result)
            return
        show(*_run_table(result))


@app.command(epilog=examples("qcompiler explain build/minilm", "qcompiler explain d --json"))
def explain(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Say where the error of an artifact comes from, and what to change.

    Every place that rounds is measured alone, on the data kept with the artifact; the changes that
    would buy the most are tried.
    """
    with guarded(debug):
        from qcompiler import cli_mixed

        with steps(as_json) as progress:
            progress("explain")
            found = cli_mixed.explain(folder, progress)
        if as_json:
            print_json(found)
        else:
            show(*cli_mixed.explanation(found))


@app.command(
    "eval",
    epilog=examples(
        "qcompiler eval build/smollm2-w4 --perplexity text.txt --tokens 20000",
        "qcompiler eval build/smollm2-w4 --lambada lambada.jsonl --texts 500",
    ),
)
def evaluate(
    folder: Folder,
    perplexity: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text; non-overlapping windows of 1,024 tokens."),
    ] = None,
    lambada: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='JSON lines with "text": predict the last word of each.'),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the text to read; all by default.")
    ] = None,
    texts: Annotated[
        int | None, typer.Option(min=1, help="Texts of the file to take; all by default.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one operator; all cores by default.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how well a compiled language model predicts text, beside its float model.

    Perplexity with a 95 % interval, KL divergence and top-1 agreement with the float model,
    accuracy of the last word: all of the artifact as it runs.
    """
    with guarded(debug):
        from qcompiler.cli_language import evaluate as measure
        from qcompiler.errors import InputError

        if perplexity is None and lambada is None:
            raise InputError("nothing to measure: give --perplexity FILE or --lambada FILE")
        measure(folder, perplexity, lambada, tokens, texts, threads, as_json)


@app.command(
    epilog=examples(
        "qcompiler inspect build/minilm --what history",
        "qcompiler inspect build/minilm --what plan --json",
        "qcompiler inspect my_model.py:build",
    )
)
def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="DIR|MODEL", help="An artifact's folder, or a model as for compile."
        ),
    ],
    part: Annotated[
        What, typer.Option("--what", help="Which part; a model has its program only.")
    ] = (What.ALL),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show an artifact's program, plan, sites, history and audit, or the program of a model."""
    with guarded(debug):
        from qcompiler.inspection import inspected, shown

        with steps(as_json) as progress, unwarned(debug):
            progress("read")
            parts = inspected(what, part.value, capture_named)
        if as_json:
            print_json(parts)
        else:
            show(*shown(parts))


def _grouped(checks: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The checks, of a language model's caches the worst alone for each set of data."""
    from qcompiler.findings import INNER

    found: list[Mapping[str, Any]] = []
    caches: dict[str, tuple[int, int, Mapping[str, Any]]] = {}
    for check in checks:
        what, _, rest = check["what"].partition(": ")
        if not rest.startswith(INNER):
            found.append(check)
            continue
        name = f"{what}: caches, {rest.rpartition(', ')[2]}"
        place, count, worst = caches.get(name, (len(found), 0, check))
        if not count:
            found.append(check)
        bad = (check["ok"], check["value"] - check["bound"])
        worst = check if bad < (worst["ok"], worst["value"] - worst["bound"]) else worst
        caches[name] = place, count + 1, worst
        found[place] = {**worst, "what": f"{name} (the worst of {count + 1})"}
    return found


def _bench_table(result: Mapping[str, Any]) -> Iterable[RenderableType]:
    from qcompiler.findings import count, decibels, milliseconds, number, size

    language = any("phase" in row for row in result["rows"])
    first = ("model", "phase", "tokens/s") if language else ("model", "time")
    last = () if language else ("SQNR",)
    rows = table(
        *first, "ratio to float", "quartiles", "size", *last, "note",
        numbers=f"{' ' * (len(first) - 1)}nnnn{'n' * len(last)} ",
    )  # fmt: skip
    for row in result["rows"]:
        spread = "" if row.get("low") is None else f"{number(row['low'])}–{number(row['high'])}"
        speed = (row["phase"], number(row.get("rate"))) if language else (milliseconds(row["ms"]),)
        add_row(
            rows,
            row["name"],
            *speed,
            number(row.get("ratio")),
            spread,
            size(row.get("size_bytes")),
            *(() if language else (decibels(row["sqnr_db"]),)),
            row.get("note", ""),
        )
    rounds = max((int(row.get("rounds") or 0) for row in result["rows"]), default=0)
    machine = result.get("machine", {})
    cpu = machine.get("cpu", "") if isinstance(machine, dict) else str(machine)
    if isinstance(machine, dict) and "gpu" in machine:
        cpu = f"{machine['gpu']}, {cpu}"
    yield rows
    yield (
        f"{result['shape']}, {count(result['threads'], 'thread')}; interleaved, median of "
        f"{rounds or 'many'} rounds; {cpu}\n"
    )


def _run_table(result: Mapping[str, Any]) -> Iterable[RenderableType]:
    from qcompiler.findings import number
    from qcompiler.findings import shape as sizes

    where = result["emulator"]
    yield (
        f"{result['target']}, not this machine: run by {where}, so its speed means nothing"
        if where
        else f"{result['target']}, on this machine"
    )
    yield f"inputs: {result['source']}\n"
    rows = table("output", "dtype", "shape", "min", "mean", "max", "", numbers="   nnn ")
    for row in result["outputs"]:
        note = f"{row['not_finite']} not finite " if row["not_finite"] else ""
        values = [number(row[key]) for key in ("min", "mean", "max")]
        add_row(rows, row["name"], row["dtype"], sizes(row["shape"]), *values, note + row["file"])
    yield rows
