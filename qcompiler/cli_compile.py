"""The commands that compile a model, or study what formats cost it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli_app import (
    MIXED,
    Calibration,
    Debug,
    Jobs,
    Json,
    Machine,
    Model,
    Ray,
    Settings,
    app,
    check_out,
    examples,
    load_named,
)
from qcompiler.terminal import guarded, print_json, show, stdout, steps, unwarned


@app.command(
    "compile",
    epilog=examples(
        "qcompiler compile minilm --recipe w8a8 --out build/minilm",
        "qcompiler compile efficientnet-lite0 --calibration images/ --out build/lite0",
        "qcompiler compile my_model.py:build --calibration data.py:batches --out build/mine",
        "qcompiler compile minilm --set calibration=percentile --set 'keep_float=pooler*' --out d",
        "qcompiler compile hf:models/bert --calibration sentences.txt --recipe mine.yaml --out d",
        "qcompiler compile smollm2 --recipe mixed --bits 3.5 --out build/smollm2-3.5",
    ),
)
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    target: Machine = "ort:cpu",
    kernels: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="tvm: ort:cpu runs linears with inputs quantized by token, ort:cuda those with "
            "quantized weights on generated kernels, as custom operators.",
        ),
    ] = "",
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="Number formats: 'qcompiler recipes', or a .yaml file."
        ),
    ] = "w8a8",
    calibration: Calibration = None,
    settings: Settings = None,
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
        check_out(out, force)
        with steps(as_json) as progress, unwarned(debug):
            progress("load the model")
            import qcompiler.compiler as compiler

            source, spec = load_named(model)
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
    epilog=examples(
        "qcompiler sensitivity minilm --out build/minilm-study",
        "qcompiler sensitivity smollm2 --out build/smollm2-study --jobs 2",
        "qcompiler compile smollm2 --recipe mixed --bits 3 --study build/smollm2-study --out d",
    ),
)
def sensitivity(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder of the study; gone on with.")
    ],
    target: Machine = "ort:cpu",
    calibration: Calibration = None,
    settings: Settings = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what each number format of each layer costs the model: table, plots and JSON.

    The recipe is 'mixed'.

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
            source, spec = load_named(model)
            batches = load_calibration(calibration, spec) if calibration else None
            found = cli_mixed.study(source, machine, chosen, batches, out, jobs, ray, progress)
        if as_json:
            print_json(found)
        else:
            show(*cli_mixed.study_table(found))
