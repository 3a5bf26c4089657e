"""The command line. Heavy imports are inside the commands, so that `--help` is there at once."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.terminal import BROKEN, add_row, guarded, print_json, stdout, steps, table, unwarned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType

    from qcompiler.program import Program
    from qcompiler.spec import ModelSpec

EXIT_CODES = (
    "[bold]Exit codes[/]  0 done · 1 a bound or a promise was broken · 2 bad input or usage · "
    "3 internal error · 130 interrupted"
)


def _examples(*lines: str) -> str:
    """An epilog: one example a line, then the exit codes."""
    return "\n".join(
        ["[bold]Examples[/]", *(f"  [cyan]{line}[/]" for line in lines), "", EXIT_CODES]
    )


app = typer.Typer(
    name="qcompiler",
    help="Compile PyTorch models to integers: captured, rewritten, quantized, lowered, and "
    "measured at every step. Each command has its own --help with examples.",
    epilog=_examples(
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
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that 'compile' wrote.")]


class What(StrEnum):
    """What `inspect` shows."""

    PROGRAM = "program"
    PLAN = "plan"
    SITES = "sites"
    HISTORY = "history"
    AUDIT = "audit"
    ALL = "all"


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


@app.command(
    "compile",
    epilog=_examples(
        "qcompiler compile minilm --recipe w8a8 --out build/minilm",
        "qcompiler compile efficientnet-lite0 --calibration images/ --out build/lite0",
        "qcompiler compile my_model.py:build --calibration data.py:batches --out build/mine",
        "qcompiler compile minilm --set calibration=percentile --set 'keep_float=pooler*' --out d",
        "qcompiler compile hf:models/bert --calibration sentences.txt --recipe mine.yaml --out d",
        "qcompiler compile smollm2 --recipe mixed --bits 3.5 --out build/smollm2-3.5",
    ),
)
def compile_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name from 'qcompiler models'; file.py:function that returns a ModelSpec; a "
            ".pt2 file of torch.export.save; or hf:FOLDER with a Hugging Face model.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    target: Annotated[
        str, typer.Option(metavar="TARGET", help="What will run it: 'qcompiler targets'.")
    ] = "ort:cpu",
    kernels: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="tvm: ort: targets run linears with inputs quantized by token on generated "
            "kernels, as custom operators.",
        ),
    ] = "",
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="Number formats: 'qcompiler recipes', or a .yaml file."
        ),
    ] = "w8a8",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|FUNCTION",
            help="Real inputs: texts (.txt, .jsonl), tensors (.npz, .safetensors, .pt), a folder "
            "of images or tensors, or module:function; the model's own where not given. A quarter "
            "is held out, for verification only.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one field of the recipe; repeatable."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an artifact that is there.")
    ] = False,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            "--bucket",
            metavar="SIZE=N,N,…",
            help="tvm: targets: sizes to generate code for, as sequence=16,64,128; repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep rounded weights in DIR.journal until the end, and go on from there after "
            "an interruption, with the same bits.",
        ),
    ] = False,
    bits: Annotated[
        float | None,
        typer.Option(help="Mixed precision: mean bits of a weight.", rich_help_panel=MIXED),
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(
            metavar="MB", help="Mixed precision: weights, scales included.", rich_help_panel=MIXED
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Mixed precision: time, as 0.6x of the float model's.",
            rich_help_panel=MIXED,
        ),
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Mixed precision: the cheapest formats whose errors have at most this share of "
            "the output's power (language models: by which perplexity grows at most), as 0.5%.",
            rich_help_panel=MIXED,
        ),
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the study of what formats cost is kept; DIR.study beside --out by default.",
            rich_help_panel=MIXED,
        ),
    ] = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile a model to a folder with the model, its manifest and report.html.

    Ends with a summary: what each pass did, error, size and latency, and what was refused.

    Nothing is left behind when it fails or is interrupted, but the journal of `--resume`.
    """
    kept = "; the journal is kept" if resume else ""
    with guarded(debug, f"interrupted; nothing was written{kept}"):
        from qcompiler.artifact import REPORT
        from qcompiler.calibration import load_calibration
        from qcompiler.errors import InputError
        from qcompiler.recipe import load_recipe, parse_buckets, parse_settings
        from qcompiler.summary import summary
        from qcompiler.target import Target

        # The cheap checks come first: they need neither torch's compiler nor the model.
        budget = {"bits": bits, "size": size, "latency": latency, "max_loss": max_loss}
        given = {key: value for key, value in budget.items() if value is not None}
        chosen = load_recipe(recipe, given | parse_settings(settings or []))
        if recipe == "mixed" and not chosen.mixed:
            raise InputError(
                "recipe 'mixed' needs a budget: --bits 3.5, --size MB, --latency 0.6x or "
                "--max-loss 0.5%"
            )
        machine = Target.parse(target)
        machine = machine.with_kernels(kernels) if kernels else machine
        buckets = parse_buckets(bucket or [])
        _check_out(out, force)
        with steps(as_json) as progress, unwarned(debug):
            progress("load the model")
            import qcompiler.compiler as compiler

            source, spec = _load(model)
            batches = load_calibration(calibration, spec) if calibration else None
            artifact = compiler.compile(
                source,
                target=machine,
                recipe=chosen,
                calibration=batches,
                out=out,
                force=force,
                resume=resume,
                buckets=buckets,
                study=study,
                jobs=jobs,
                ray=ray,
                progress=progress,
                command=shlex.join(["qcompiler", *sys.argv[1:]]),
            )
        if as_json:
            print_json(dict(artifact.manifest))
        else:
            console = stdout()
            console.print(summary(artifact.manifest))
            console.print(f"\nwrote {out}; the whole story is in {out / REPORT}", markup=False)


@app.command(
    epilog=_examples("qcompiler verify build/minilm", "qcompiler verify build/minilm --json")
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
            for check in result["checks"]:
                value, bound = check["value"], check["bound"]
                measured = isinstance(bound, (int, float))
                add_row(
                    rows,
                    check["what"],
                    decibels(value) if measured else str(value),
                    decibels(bound) if measured else str(bound),
                    Text("ok", "green") if check["ok"] else Text("BROKEN", "bold red"),
                )
            _show(rows)
        if not result["ok"]:
            raise typer.Exit(BROKEN)


@app.command(
    epilog=_examples(
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
        typer.Option(metavar="NAMES", help="Any of float, ort-dynamic, ort-static, with commas."),
    ] = "float",
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time to measure, all candidates together.")
    ] = 3.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZES", help="Dynamic sizes of the inputs, such as 8x128; repeatable."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time an artifact beside the float model, and beside ONNX Runtime's own quantizers.

    All take turns in one run, so that a busy machine disturbs them alike.

    Ratios are to the float model. With several --shape, --json prints a list.
    """
    with guarded(debug):
        from qcompiler.errors import InputError, nearest

        known = ["float", "ort-dynamic", "ort-static"]
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
            _show(*(part for result in results for part in _bench_table(result)))


@app.command(
    epilog=_examples(
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
        _show(*_run_table(result))


@app.command(
    epilog=_examples(
        "qcompiler sensitivity minilm --out build/minilm-study",
        "qcompiler sensitivity smollm2 --out build/smollm2-study --jobs 2",
        "qcompiler compile smollm2 --recipe mixed --bits 3 --study build/smollm2-study --out d",
    ),
)
def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for compile.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder of the study; gone on with.")
    ],
    target: Annotated[
        str, typer.Option(metavar="TARGET", help="What will run the model: 'qcompiler targets'.")
    ] = "ort:cpu",
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|DIR|FUNCTION", help="As for compile.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one field of the recipe 'mixed'; repeatable."
        ),
    ] = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what each number format of each layer costs the model: table, plots and JSON.

    An interrupted study goes on where it stopped when the command is given again.
    """
    with guarded(debug, f"interrupted; what was measured is kept in {out}"):
        from qcompiler import cli_mixed
        from qcompiler.calibration import load_calibration
        from qcompiler.recipe import load_recipe, parse_settings
        from qcompiler.target import Target

        chosen = load_recipe("mixed", parse_settings(settings or []))
        machine = Target.parse(target)
        with steps(as_json) as progress, unwarned(debug):
            progress("load the model")
            source, spec = _load(model)
            batches = load_calibration(calibration, spec) if calibration else None
            found = cli_mixed.study(source, machine, chosen, batches, out, jobs, ray, progress)
        if as_json:
            print_json(found)
        else:
            _show(*cli_mixed.study_table(found))


@app.command(epilog=_examples("qcompiler explain build/minilm", "qcompiler explain d --json"))
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
            _show(*cli_mixed.explanation(found))


@app.command(
    "eval",
    epilog=_examples(
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
    epilog=_examples(
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
            parts = inspected(what, part.value, _capture)
        if as_json:
            print_json(parts)
        else:
            _show(*shown(parts))


@app.command(epilog=_examples("qcompiler targets", "qcompiler targets --json"))
def targets(as_json: Json = False, debug: Debug = False) -> None:
    """List the targets and the recipes that each can run."""
    with guarded(debug):
        from qcompiler.recipe import PRESETS
        from qcompiler.target import Target, known_targets

        found = []
        for name in known_targets():
            target = Target.parse(name)
            fitting = [
                preset
                for preset, (_, recipe) in PRESETS.items()
                if target.refusal(
                    recipe.weight_type, recipe.activation_type, products=recipe.products
                )
                is None
            ]
            found.append({"name": name, "description": target.meaning, "recipes": fitting})
        _list(found, as_json, ("name", "description", "recipes"))


@app.command(
    epilog=_examples("qcompiler recipes", "qcompiler recipes w8a8", "qcompiler recipes --json")
)
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE", help="A recipe, to see all its fields.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or show one with all its fields and what they mean."""
    with guarded(debug):
        from qcompiler.recipe import PRESETS, Recipe, load_recipe

        if name is None:
            rows = [
                {
                    "name": key,
                    "description": text,
                    **({"fields": r.model_dump()} if as_json else {}),
                }
                for key, (text, r) in PRESETS.items()
            ]
            _list(rows, as_json, ("name", "description"))
            if not as_json:
                _show("\nChange a field with --set KEY=VALUE; 'qcompiler recipes NAME' lists them.")
            return
        values = load_recipe(name).model_dump()
        fields = [
            {"field": key, "value": values[key], "meaning": info.description or ""}
            for key, info in Recipe.model_fields.items()
        ]
        _list(fields, as_json, ("field", "value", "meaning"))


@app.command(epilog=_examples("qcompiler models", "qcompiler compile tiny-mlp --out build/mlp"))
def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the models that are known by name."""
    with guarded(debug):
        from qcompiler.models import FORMS, ZOO

        rows = [{"name": name, "description": entry.description} for name, entry in ZOO.items()]
        _list(rows, as_json, ("name", "description"))
        if not as_json:
            _show(f"\nMODEL is {FORMS}.")


def main() -> None:
    """The `qcompiler` command."""
    app(prog_name="qcompiler")


def _check_out(out: Path, force: bool) -> None:
    """Refuse an output folder that exists before any work is done; `compile` checks it again."""
    if out.exists() and not force:
        from qcompiler.errors import InputError

        raise InputError(f"{out} exists; give another --out, or --force to replace it")


def _load(text: str) -> tuple[ModelSpec | Program, ModelSpec]:
    """What to compile, and a spec that says how its calibration data must look."""
    from qcompiler.models import find

    found = find(text)
    if not isinstance(found, Path):
        return found, found
    from qcompiler.inspection import spec_of
    from qcompiler.program import load_pt2

    program = load_pt2(found)
    return program, spec_of(program, found.stem)


def _capture(text: str) -> Program:
    from qcompiler.program import Program, capture

    source, spec = _load(text)
    if isinstance(source, Program):
        return source
    return capture(spec.module, spec.example_inputs, spec.dynamic_shapes)


def _bench_table(result: Mapping[str, Any]) -> Iterable[RenderableType]:
    from qcompiler.findings import count, decibels, milliseconds, number, size

    rows = table(
        "model", "time", "ratio to float", "quartiles", "size", "SQNR", "note", numbers=" nnnnn "
    )
    for row in result["rows"]:
        spread = "" if row["low"] is None else f"{number(row['low'])}–{number(row['high'])}"
        add_row(
            rows,
            row["name"],
            milliseconds(row["ms"]),
            number(row["ratio"]),
            spread,
            size(row["size_bytes"]),
            decibels(row["sqnr_db"]),
            row.get("note", ""),
        )
    rounds = max((int(row.get("rounds") or 0) for row in result["rows"]), default=0)
    machine = result.get("machine", {})
    cpu = machine.get("cpu", "") if isinstance(machine, dict) else str(machine)
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


def _list(rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print_json(rows)
        return
    shown = table(*columns)
    for row in rows:
        add_row(shown, *(_cell(row[column]) for column in columns))
    _show(shown)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _show(*parts: RenderableType) -> None:
    console = stdout()
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)
