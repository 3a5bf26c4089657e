"""Mixed precision: study what formats cost, choose them within a budget, and measure the choice.

A driver: it joins the study and the plans (`mixer`), the integer program (`allocation`) and the
recipe.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from qcompiler import allocation, choosing, costs, figures
from qcompiler.allocation import Choice
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.format import NARROW, Format
from qcompiler.lowering import check_installed
from qcompiler.mixer import Mixer, Point
from qcompiler.recipe import Recipe
from qcompiler.spec import ModelSpec
from qcompiler.study import Study
from qcompiler.target import Target

WEIGHTS_ALONE = ("int2:g32:affine", "int3:g32:affine", "int4:g32", "int6:g32", "int8:g32")
# Runtime, or the generator of its kernels → the formats that it runs fast, where a budget of time
# or loss is given.
FAST = {
    "ort": (
        "int4:g32",
        "int8:channel/uint8:tensor:affine",
        "int8:channel/uint8:tensor:affine:dynamic",
    ),
    "tvm": ("int4:g32/int8:token", "int8:channel/int8:token"),
}


def candidates(recipe: Recipe, target: Target, spec: ModelSpec) -> tuple[str, ...]:
    """The formats to choose from: the recipe's, or those that suit the budget and the target."""
    if recipe.candidates:
        return recipe.candidates
    kernels = target.kernels if target.device == "cpu" else ""  # those read integers by token
    if recipe.latency is None and recipe.max_loss is None:
        texts = [f"{text}/int8:token" if kernels else text for text in WEIGHTS_ALONE]
        return _possible(texts, target)
    found = FAST.get(kernels or target.runtime, WEIGHTS_ALONE)
    found += (NARROW,) if target.runtime == "tvm" and target.multiplies_bfloat16 else ()
    if spec.generation is not None:  # per-tensor ranges of activations ruin decoders
        found = tuple(text for text in found if "tensor" not in text)
        found += ("int8:g32",) if target.runtime == "ort" and not kernels else ()
    return _possible(found, target)


def _possible(texts: Sequence[str], target: Target) -> tuple[str, ...]:
    """Those of our own candidates that the target has kernels for."""
    known = ((text, Format.parse(text)) for text in texts)
    return tuple(
        text for text, f in known if not target.refusal(f.weight, f.activation, products=f.products)
    )


def prepared(recipe: Recipe, target: Target, spec: ModelSpec) -> Recipe:
    """The recipe with its candidates filled in.

    Where some of them quantize activations, the first such becomes the format of the layers outside
    the study, and smoothing prepares for it.

    Raises:
        InputError: budgets that do not go together.
        UnsupportedError: the target has no kernel for a candidate, or cannot be timed here.
    """
    others = [recipe.bits, recipe.size, recipe.latency]
    if recipe.max_loss is not None and any(value is not None for value in others):
        raise InputError("give max_loss alone: it is what is kept, and size what is minimised")
    if recipe.latency is not None:
        check_installed(target)  # kernels are timed, or their instructions counted
    if recipe.latency is not None and not (costs.here(target) or costs.counted(target)):
        raise UnsupportedError(
            f"--latency: this machine is not {target}, so nothing can be timed, and instructions "
            "are counted for tvm: targets of CPUs with fused multiply-add alone; give a budget of "
            "--bits or --size"
        )
    texts = candidates(recipe, target, spec)
    if not texts:
        raise UnsupportedError(
            f"mixed precision on '{target}': it has no kernel for any of "
            f"{', '.join(WEIGHTS_ALONE)}; name candidates that it has (--set candidates=…)"
        )
    chosen = [Format.parse(text) for text in texts]
    for wanted in chosen:
        reason = target.refusal(
            wanted.weight, wanted.activation, products=wanted.products, outliers=wanted.outliers
        )
        if reason:
            raise UnsupportedError(f"candidate {wanted} on target '{target}': {reason}")
    settings: dict[str, Any] = {"candidates": tuple(map(str, chosen))}
    if recipe.activations is None:
        both = next((f for f in chosen if f.activation is not None), None)
        if both is not None:
            settings |= {"weights": str(both.weight), "activations": str(both.activation)}
    return recipe.updated(settings)


def choose(mixer: Mixer) -> tuple[Recipe, dict[str, Any]]:
    """Formats for every unit within the recipe's budget.

    Args:
        mixer: of the program as it is when formats are allocated, its recipe from `prepared`.

    Returns:
        The recipe with `formats` and without a budget, and how it came about: for the manifest.

    Raises:
        InputError: nothing is within the budget; says the nearest that is.
    """
    recipe = mixer.recipe
    study = mixer.study()
    limits = []
    if recipe.latency is not None:
        mixer.time()
        limits.append(mixer.latency_limit(recipe.latency))
    if recipe.bits is not None:
        limits.append(mixer.bits_limit(recipe.bits))
    if recipe.size is not None:
        limits.append(mixer.size_limit(recipe.size))
    if recipe.max_loss is not None:
        allowed = math.log1p(recipe.max_loss) if mixer.settings.logits else 0.5 * recipe.max_loss
        best, tried = choosing.within(mixer, allowed, allocation.size)
    else:
        best, tried = choosing.best(mixer, limits)
    return recipe_of(mixer, best), _finish(mixer, study, tried, best)


def explore(mixer: Mixer) -> dict[str, Any]:
    """The study alone, with the plans of the Pareto front."""
    study = mixer.study()
    if mixer.recipe.latency is not None:
        mixer.time()
    return _finish(mixer, study, [])


def _finish(
    mixer: Mixer, study: Study, tried: Sequence[Point], best: Point | None = None
) -> dict[str, Any]:
    """Measure the fronts, write them and their figures; what the manifest says."""
    uniform, front = mixer.measure(choosing.uniform_choices(mixer)), choosing.front(mixer)
    of_time = choosing.front_of_time(mixer) if mixer.timed is not None else []
    write(mixer, front, best, of_time)
    described = describe(mixer, study, tried, uniform, front, best)
    described["front_of_time"] = [_row(point) for point in of_time]
    described["timed"] = mixer.timed or {}
    if mixer.timed is not None and costs.counted(mixer.target):
        described["estimate"] = costs.estimate_of(mixer.target)
        described["notes"].append(f"time is an estimate: {described['estimate']}")
    others = [*uniform, *front, *of_time]
    beaten = best and _beaten(best, others, mixer.target, mixer.recipe.size is not None)
    described["warnings"] = [beaten] if beaten else []
    figures.write(described, mixer.folder)
    return described


def _beaten(best: Point, others: Sequence[Point], target: Target, sized: bool) -> str | None:
    """Says which measured plan is no worse in anything that the target feels, and loses less.

    A budget of bits is none of size where a target stores weights in more bits than they have;
    `sized`: whether one of size was given.
    """
    better = [
        p for p in others
        if p.loss < best.loss and p.bytes <= best.bytes
        and (p.time is None or best.time is None or p.time <= best.time)
    ]  # fmt: skip
    if not better:
        return None
    least = min(better, key=lambda p: p.loss)
    return (
        f"'{least.label}' loses less than the chosen plan ({least.loss:.3g} beside "
        f"{best.loss:.3g}) and takes no more room on {target} ({least.bytes / 1e6:.1f} MB of "
        f"weights beside {best.bytes / 1e6:.1f}, as they are stored there)"
        + ("" if sized else ": a budget of --size would find it")
    )


def _row(point: Point) -> dict[str, Any]:
    return {k: v for k, v in asdict(point).items() if k != "choice"}


def recipe_of(mixer: Mixer, point: Point) -> Recipe:
    """A recipe that gives every unit its format, and has no budget."""
    no_budget = {"bits": None, "size": None, "latency": None, "max_loss": None}
    formats = {**mixer.recipe.formats, **formats_of(mixer, point.choice)}
    return mixer.recipe.updated({"formats": formats, "candidates": (), **no_budget})


def describe(
    mixer: Mixer,
    study: Study,
    tried: Sequence[Point],
    uniform: Sequence[Point],
    front: Sequence[Point],
    best: Point | None = None,
) -> dict[str, Any]:
    """Everything for the manifest and the report but the front of time."""
    units = []
    for index, unit in enumerate(mixer.units):
        row = {"name": unit.name, "weights": unit.weights, "shapes": unit.shapes,
               "options": [asdict(option) for option in unit.options]}  # fmt: skip
        if best is not None:
            row["format"] = unit.options[best.choice[index]].format
        units.append(row)
    return {
        "loss": "KL divergence, nats" if mixer.settings.logits else "half of noise ÷ signal",
        "candidates": list(mixer.recipe.candidates),
        "chosen": _row(best) if best is not None else None,
        "tried": [_row(p) for p in tried],
        "uniform": [_row(p) for p in uniform],
        "front": [_row(p) for p in front],
        "units": units,
        "notes": list(study.notes),
        "seconds": study.seconds,
        "folder": str(mixer.folder),
    }


def write(
    mixer: Mixer,
    front: Sequence[Point],
    best: Point | None = None,
    of_time: Sequence[Point] = (),
) -> None:
    """The fronts as JSON and CSV, and each of their plans as a recipe that `compile` takes."""
    named = {f"{i:02d}": point for i, point in enumerate(front)}
    named |= {f"time-{i:02d}": point for i, point in enumerate(of_time)}
    if best is not None:
        named["chosen"] = best
    share = "time_estimate" if costs.counted(mixer.target) else "time"
    rows = [
        {"point": name, "bits": p.bits, "bytes": p.bytes, "loss": p.loss,
         "additive": p.additive, share: p.time}
        for name, p in named.items()
    ]  # fmt: skip
    (mixer.folder / "front.json").write_text(json.dumps(rows, indent=1) + "\n")
    with (mixer.folder / "front.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    plans = mixer.folder / "points"
    plans.mkdir(exist_ok=True)
    for stale in plans.glob("*.yaml"):  # of an earlier run with other budgets
        stale.unlink()
    for name, point in named.items():
        fields = recipe_of(mixer, point).model_dump(mode="json", exclude_defaults=True)
        fields["name"] = f"{mixer.recipe.name}-{name}"
        (plans / f"{name}.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))


def formats_of(mixer: Mixer, choice: Choice) -> dict[str, str]:
    """A choice as the recipe's `formats`: module path, or the node where that is shared."""
    paths = [p for u in mixer.units for p in u.paths]
    found = {}
    for unit, i in zip(mixer.units, choice, strict=True):
        for node, path in zip(unit.nodes, unit.paths, strict=True):
            key = path if path and paths.count(path) == 1 else node
            found[key] = unit.options[i].format
    return found
