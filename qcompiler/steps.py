"""Steps of the compiler that are more than a pass: which data they see, and what is noted of them.

Their order is `compiler.quantize`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.data import Data
from qcompiler.errors import UnsupportedError, VerifyError
from qcompiler.history import Entry, Refusal
from qcompiler.journal import Journal, fingerprint
from qcompiler.lowering import Progress
from qcompiler.observe import Statistics, choose_range, observe
from qcompiler.passes.allocate import allocate
from qcompiler.passes.fuse_rotation import fuse_rotation
from qcompiler.passes.learn_rotation import learn_rotation
from qcompiler.passes.quantize_cache import quantize_cache
from qcompiler.passes.round_weights import round_weights, rounding_notes
from qcompiler.passes.store_cache import measure_cache, store_cache
from qcompiler.plan import Assignment, Plan, Rounded, Site
from qcompiler.program import Batch, Program
from qcompiler.recipe import Recipe
from qcompiler.rewrite import module_path, operand
from qcompiler.rounding import outlier_columns
from qcompiler.target import Target
from qcompiler.verify import Reference, check_exact

SAMPLED = 20  # batches at most that are in memory at once


def checked(after: Program, before: Program, reference: Reference) -> Program:
    """`after`, proven against the reference where it is not `before` itself."""
    unchanged = after.exported is before.exported
    return after if unchanged else check_exact(before, after, reference)


def learn_rotations(
    program: Program, data: Data, recipe: Recipe, target: Target, say: Progress, folder: Path | None
) -> Program:
    """The program with learned rotations on top of the Hadamard ones."""
    say("learn_rotation")
    plan = allocate(program, recipe, target)
    batches = list(data.calibration())
    settings = {"recipe": recipe.model_dump_json(), "mask": data.mask}
    mark = fingerprint(program, plan, settings, batches) if folder is not None else ""
    learned = learn_rotation(
        program, plan, batches, *recipe.cache_types, steps=recipe.rotation_steps, mask=data.mask,
        journal=folder, fingerprint=mark, say=say,
    )  # fmt: skip
    after = fuse_rotation(program, learned=learned.matrices)
    first, last = (sum(part) / len(part) for part in (learned.losses[:5], learned.losses[-5:]))
    note = f"{len(learned.losses)} steps, KL {first:.4f} to {last:.4f} nats (mean of five)"
    note += "" if learned.kept else ": no better than the Hadamard rotations, which stay"
    entry = replace(after.history[-1], notes=(*after.history[-1].notes, note))
    return Program(after.exported, (*after.history[:-1], entry))


def float_columns(
    program: Program, split: Mapping[str, int], data: Data, recipe: Recipe
) -> dict[str, Tensor]:
    """Which columns of the layers named in `split` stay in float, by their inputs' power."""
    sources = {name: _node(program, name).args[0] for name in split}
    names = {str(source): -1 for source in sources.values()}
    seen = observe(program, names, data.calibration(), 0, data.mask, binned=False)
    constants = program.constants()
    found = {}
    for name, count in split.items():
        node = _node(program, name)
        weight = constants[operand(node, 1).name]
        kind = recipe.format_of(module_path(node), name).weight
        fits = kind.fitted(weight.shape[1]) if kind is not None else None
        if fits is not None:
            power = seen[str(sources[name])].squares
            found[name] = outlier_columns(weight, power, fits, count)
    return found


def over_quantized_cache(
    program: Program, floating: Program, data: Data, recipe: Recipe, say: Progress
) -> Program:
    """The program over a quantized cache, simulated or as integers that a runtime keeps."""
    keys, values = recipe.cache_types
    if recipe.simulates_cache:
        say("quantize_cache")
        return quantize_cache(program, keys, values, window=recipe.window)
    say("store_cache")
    assert keys is not None  # the target refuses one alone
    assert values is not None
    extremes = measure_cache(floating, sample(data))
    if not extremes:
        raise UnsupportedError(
            f"recipe '{recipe.name}': no attention of this model is one op with its cache, so "
            "nothing can be stored in it; set fused=true, or leave keys and values in float"
        )
    return store_cache(program, keys, values, extremes)


def cached_context(data: Data, recipe: Recipe, target: Target) -> int:
    """Tokens that attention over a cache is fused for; 0 where it is not."""
    context = data.spec.generation.context if data.spec.generation else 0
    # Generated code keeps a cache in place only where the attention over it is one op.
    return context if recipe.fused or target.runtime == "tvm" else 0


def static_ranges(
    program: Program, plan: Plan, data: Data, recipe: Recipe
) -> tuple[dict[Site, Assignment], dict[str, Statistics]]:
    """The plan's static activations with the ranges that the recipe draws from the data.

    Second: the statistics that they were drawn from, by the tensors' names.
    """
    static = {s: a for s, a in plan.items() if _is_activation(program, s) and not a.qtype.dynamic}
    tensors = {s: _source(program, s) for s in static}
    axes = {name: _axis(program, name) for name in tensors.values()}
    # Their extremes and histograms are all that a range is drawn from: no rows are sampled.
    seen = observe(program, axes, data.calibration(), rows=0, mask=data.mask) if axes else {}
    ranges = {}
    for site, assignment in static.items():
        parameter = recipe.p if recipe.calibration == "pnorm" else recipe.percentile
        low, high = choose_range(
            seen[tensors[site]], assignment.qtype, recipe.calibration, parameter
        )
        ranges[site] = Assignment(assignment.qtype, low, high)
    return ranges, seen


def round_by_recipe(
    program: Program,
    plan: Plan,
    data: Data,
    recipe: Recipe,
    folder: Path | None,
    outliers: Mapping[str, int],
) -> tuple[Mapping[Site, Rounded], Entry]:
    """The rounded weights, and what the report says of them."""
    began = time.perf_counter()
    method = "gptq" if recipe.rounding == "gptq" and data.real else "rtn"
    clip = (recipe.clip or recipe.rounding == "awq") and data.real
    batches = list(data.calibration())
    journal = None
    if folder is not None:
        settings: dict[str, Any] = {
            "method": method, "clip": clip, "moment": recipe.keep_moment, "mask": data.mask,
            "outliers": outliers,
        }  # fmt: skip
        journal = Journal(folder, fingerprint(program, plan, settings, batches))
    rounded = round_weights(
        program, plan, batches, data.mask,
        method=method, clip=clip, moment=recipe.keep_moment, journal=journal, outliers=outliers,
    )  # fmt: skip
    notes = tuple(rounding_notes(rounded))
    if journal is not None and journal.taken:
        notes = (*notes, f"{journal.taken} weights taken from the journal of an earlier run")
    refusals: tuple[Refusal, ...] = ()
    if recipe.rounds_by_data and not data.real:
        reason = f"{recipe.rounding} needs calibration data; weights are rounded to nearest"
        refusals = (Refusal("all weights", reason),)
    seconds = time.perf_counter() - began
    return rounded, Entry("round_weights", False, False, None, None, notes, refusals, seconds)


def same_integers(before: Program, after: Program, reference: Reference) -> Program:
    """Packing must not change a bit: checked, and noted in the history."""
    for batch in reference.batches[:1]:
        for old, new in zip(before.run(batch), after.run(batch), strict=True):
            if isinstance(old, Tensor) and not bool(
                old.eq(new).logical_or(old.isnan() & new.isnan()).all()
            ):
                raise VerifyError("pack_weights changed the outputs; please report this model")
    entry = replace(after.history[-1], residual=0.0, bound=0.0)
    return Program(after.exported, (*after.history[:-1], entry))


def sample(data: Data) -> list[Batch]:
    """Some calibration batches, evenly spaced, because the data may be sorted."""
    batches = list(data.calibration())
    return batches[:: -(-len(batches) // SAMPLED)]


def _node(program: Program, name: str) -> torch.fx.Node:
    nodes: Iterable[torch.fx.Node] = program.exported.graph.nodes
    return next(n for n in nodes if n.name == name)


def _source(program: Program, site: Any) -> str:
    node = _node(program, site.node)
    return node.name if site.operand == -1 else str(operand(node, site.operand).name)


def _is_activation(program: Program, site: Any) -> bool:
    return site.operand == -1 or _source(program, site) not in program.constants()


def _axis(program: Program, name: str) -> int:
    value = _node(program, name).meta["val"]
    return 1 if value.ndim == 4 else -1
