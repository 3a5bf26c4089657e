"""compile(): the only place that knows the order of the passes."""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompiler import artifact as artifacts
from qcompiler import mixed
from qcompiler.artifact import Artifact
from qcompiler.benching import bench
from qcompiler.data import Data
from qcompiler.deliver import Progress, deliver, verify
from qcompiler.distributions import distributions
from qcompiler.errors import UnsupportedError
from qcompiler.lowering import check_installed
from qcompiler.manifest import Compiled
from qcompiler.memory import Sampler, release
from qcompiler.mixer import Mixer
from qcompiler.observe import Statistics, observe
from qcompiler.op_families import CONVS, LINEAR
from qcompiler.passes.allocate import allocate
from qcompiler.passes.correct_bias import correct_bias, measure_bias
from qcompiler.passes.fold_norm import fold_norm
from qcompiler.passes.fuse_attention import fuse_attention
from qcompiler.passes.fuse_cache import fuse_cache
from qcompiler.passes.fuse_rotation import fuse_rotation
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.merge_linears import merge_linears
from qcompiler.passes.normalize import normalize
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.passes.round_products import round_as_told
from qcompiler.passes.search_awq import awq_sites, search_awq
from qcompiler.passes.search_smoothing import search_smoothing, smoothing_sites
from qcompiler.passes.smooth import smooth
from qcompiler.passes.split_columns import split_columns, split_layers
from qcompiler.passes.split_outliers import outlier_layers, split_outliers
from qcompiler.passes.untie_weights import untie_weights
from qcompiler.plan import Factor, Rounded, Site
from qcompiler.program import Program, capture
from qcompiler.recipe import Recipe, load_recipe
from qcompiler.spec import Batches, Inputs, ModelSpec, spec_for
from qcompiler.steps import (
    cached_context,
    checked,
    float_columns,
    learn_rotations,
    over_quantized_cache,
    round_by_recipe,
    same_integers,
    sample,
    static_ranges,
)
from qcompiler.target import Target
from qcompiler.verify import Reference, compare_sites

CHECKED = 2  # batches on which exact passes are proven

__all__ = ["bench", "compile", "quantize", "study", "verify"]


def compile(
    model: ModelSpec | torch.nn.Module | Program,
    example_inputs: Inputs | None = None,
    *,
    target: str | Target = "ort:cpu",
    recipe: str | Recipe = "w8a8",
    calibration: Batches | Iterable[Inputs] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    out: str | Path,
    force: bool = False,
    resume: bool = False,
    buckets: Mapping[str, Sequence[int]] | None = None,
    study: str | Path | None = None,
    jobs: int = 1,
    ray: str | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Artifact:
    """Compile a model to a folder.

    Args:
        model: a torch module, a `ModelSpec`, or a captured `Program`.
        example_inputs: tensors by name or position; not needed with a `ModelSpec` or `Program`.
        target: what will run it, such as `ort:cpu`.
        recipe: a preset's name, a YAML file, or a `Recipe`.
        calibration: batches like the example inputs, or a function that gives them; real data. A
            quarter of them is held out and used for verification only.
        dynamic_shapes: input → {dimension: name}.
        out: the folder to write.
        force: replace an artifact that is there.
        resume: keep a journal of rounded weights beside `out` (`<out>.journal`) until the artifact
            is written, and take from it what an interrupted run left there.
        buckets: size's name → the sizes to generate code for, of `tvm:` targets. Where not given: a
            batch of 1; 16 to 256 for sizes that a mask lets it pad; the example's size otherwise.
        study: of recipes with a budget: where the study of what formats cost is kept, and taken
            from by later compilations of the same model; `<out>.study` when not given.
        jobs: processes that make the study.
        ray: address of a Ray cluster that makes it instead; "local" starts one with `jobs` workers.
        progress: called with the name of each step.
        command: what reproduces this, for the report.

    Returns:
        The artifact; `artifact.load()` gives a callable.

    Raises:
        QCompilerError: one of its kinds, with a message that says what, where and what to do.
            Nothing is left half-written.
    """
    say = _Clock(progress)
    target = Target.parse(target) if isinstance(target, str) else target
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if target.runtime == "torch":
        raise UnsupportedError(
            f"target '{target}' simulates formats for measuring and writes no artifact; name what "
            "shall run the model, such as ort:cpu"
        )
    spec = spec_for(model, example_inputs, calibration, dynamic_shapes)
    recipe = mixed.prepared(recipe, target, spec) if recipe.mixed else recipe
    products = target.products_apart(recipe.products)
    reason = target.refusal(
        recipe.weight_type, recipe.activation_type, recipe.cache_types, products
    )
    if reason:
        raise UnsupportedError(f"recipe '{recipe.name}' on target '{target}': {reason}")
    check_installed(target)
    out = Path(out)
    with artifacts.writing(out, force) as folder, say:
        say("capture")
        program = model if isinstance(model, Program) else capture(
            spec.module, spec.example_inputs, spec.dynamic_shapes
        )  # fmt: skip
        data = Data(program, spec, recipe)
        journal = out.with_name(f"{out.name}.journal") if resume else None
        kept = Path(study) if study is not None else out.with_name(f"{out.name}.study")
        compiled = quantize(program, data, recipe, target, say, journal, kept, jobs, ray, buckets)
        compiled.seconds, compiled.memory = say.seconds, say.memory
        deliver(folder, spec, compiled, data, compiled.recipe, target, buckets or {}, say, command)
    if journal is not None:
        shutil.rmtree(journal, ignore_errors=True)
    return Artifact.open(out)


class _Clock:
    """Passes the steps' names on; keeps how long each took, in seconds, and its most bytes held.

    What is told of as 1/24, 2/24, … is one step.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self._sampler = Sampler()
        self._step, self._since = "start", time.perf_counter()

    def __enter__(self) -> _Clock:
        self._sampler.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._sampler.__exit__()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._since
        self.memory[self._step] = max(self.memory.get(self._step, 0), self._sampler.take())
        self._step, self._since = re.sub(r" \d+/\d+.*", "", step), now
        release()
        if self.progress is not None:
            self.progress(step)


@dataclass(frozen=True)
class Prepared:
    """A program in which formats can be allocated.

    Attributes:
        program: after the rewrites that keep the function.
        reference: outputs that exact passes were checked against.
        factors: how tensors were smoothed.
        observed: statistics from before that.
    """

    program: Program
    reference: Reference
    factors: Mapping[str, Factor]
    observed: Mapping[str, Statistics]


def prepare(
    program: Program,
    data: Data,
    recipe: Recipe,
    target: Target,
    say: Progress,
    journal: Path | None = None,
) -> Prepared:
    """The rewrites before formats are allocated; learned rotations go on from the `journal`."""
    say("reference")
    reference = Reference.of(program, data.excerpts(CHECKED))

    def step(after: Program, before: Program) -> Program:
        return checked(after, before, reference)

    weight, activation = recipe.weight_type, recipe.activation_type
    rotates = recipe.rotation != "none"
    say("normalize")
    program = step(normalize(program), program)
    if rotates:
        say("untie_weights")
        program = step(untie_weights(program), program)
    fine = weight is not None and weight.bits >= 8
    if rotates or activation is not None or fine:
        # Not for few-bit weights alone: a norm's scale in a weight makes its columns uneven, and
        # the shared scale of a row or group serves them worse. At 8 bits that is far below what
        # ONNX Runtime adds when it quantizes the activations, which folding makes even.
        say("fold_norm")
        program = step(fold_norm(program, center=rotates), program)
    if rotates:
        say("fuse_rotation")
        rotated = fuse_rotation(
            program, recipe.seed, inputs=activation is not None, keys=recipe.keys is not None
        )
        program = step(rotated, program)
    if recipe.rotation == "learned":
        program = step(learn_rotations(program, data, recipe, target, say, journal), program)

    factors: Mapping[str, Factor] = {}
    before: dict[str, Statistics] = {}
    if recipe.smooth and weight is not None and activation is not None:
        say("observe")
        names = smoothing_sites(program, recipe.insert_scale)
        if names:
            before = observe(program, names, data.calibration(), mask=data.mask, binned=False)
        say("search_smoothing")
        factors = search_smoothing(program, before, weight, activation, recipe.insert_scale)
        say("smooth")
        program = step(smooth(program, factors, recipe.insert_scale), program)

    if recipe.rounding == "awq" and data.real:
        say("search_awq")
        names = awq_sites(program)
        calibration = data.calibration()
        seen = observe(program, names, calibration, mask=data.mask, binned=False) if names else {}
        scales = search_awq(program, seen, allocate(program, recipe, target))
        program = step(smooth(program, scales, insert=False), program)

    context = cached_context(data, recipe, target)
    if not recipe.simulates_cache:  # such a cache is quantized where the heads are apart
        if context:
            say("fuse_cache")
            program = step(fuse_cache(program, context), program)
        say("fuse_attention")
        program = step(fuse_attention(program), program)
    if recipe.merge_linears:
        say("merge_linears")
        program = step(merge_linears(program), program)

    return Prepared(program, reference, factors, before)


def quantize(
    program: Program,
    data: Data,
    recipe: Recipe,
    target: Target,
    say: Progress,
    journal: Path | None = None,
    study: Path | None = None,
    jobs: int = 1,
    ray: str | None = None,
    buckets: Mapping[str, Sequence[int]] | None = None,
) -> Compiled:
    """The order of the passes, from the captured program to the quantized one.

    Rounded weights are kept in the folder `journal` and taken from it, where it is given; `study`
    is the folder of a study of what formats cost, for recipes with a budget.
    """
    prepared = prepare(program, data, recipe, target, say, journal)
    source, reference = program, prepared.reference
    program, factors, before = prepared.program, prepared.factors, prepared.observed
    activation = recipe.activation_type
    choice: dict[str, Any] = {}
    if recipe.mixed:
        assert study is not None
        mixer = Mixer(program, data, recipe, target, study, say, jobs, ray, buckets)
        recipe, choice = mixed.choose(mixer)
    split = split_layers(program, recipe)
    if split:
        say("split_columns")
        columns = float_columns(program, split, data, recipe)
        program = checked(split_columns(program, columns), program, reference)
    say("allocate")
    plan = allocate(program, recipe, target)
    floating = program
    say("calibrate")
    ranges, after = static_ranges(program, plan, data, recipe)
    plan = plan.with_entries(ranges)

    rounded: Mapping[Site, Rounded] = {}
    outliers = outlier_layers(program, recipe)
    if recipe.rounds_by_data or recipe.keep_moment or outliers:
        say("round_weights")
        rounded, entry = round_by_recipe(program, plan, data, recipe, journal, outliers)
        program = program.with_entry(entry)
    if outliers:
        say("split_outliers")
        kept = {
            site.node: (r.columns, r.values)
            for site, r in rounded.items()
            if r.columns is not None and r.values is not None
        }
        program = checked(split_outliers(program, kept), program, reference)
        floating = program

    say("insert_qdq")
    program = insert_qdq(program, plan, rounded)
    if any(recipe.cache_types):
        program = over_quantized_cache(program, floating, data, recipe, say)
    if recipe.correct_bias and activation is not None:
        say("correct_bias")
        shifts = measure_bias(floating, program, sample(data), data.mask)
        program = correct_bias(program, shifts)
    say("pack_weights")
    quantized = same_integers(program, pack_weights(program), reference)
    if not target.narrows_all:  # there the whole is written so, as it is in float16
        say("round_products")
        quantized = round_as_told(quantized, recipe)
    say("compare sites")
    layers = [n.name for n in floating.exported.graph.nodes if n.target in (LINEAR, *CONVS)]
    sites = compare_sites(
        floating, quantized, layers, itertools.islice(data.held_out(), CHECKED), data.mask
    )
    values = distributions(floating, quantized, plan, next(iter(data.held_out())), data.mask)
    plain = normalize(source)
    context = cached_context(data, recipe, target)
    plain = fuse_attention(fuse_cache(plain, context) if context else plain)
    return Compiled(
        source, plain, floating, quantized, plan, factors, before, after, recipe, sites,
        distributions=values, choice=choice,
    )  # fmt: skip


def study(
    model: ModelSpec | torch.nn.Module | Program,
    example_inputs: Inputs | None = None,
    *,
    target: str | Target = "ort:cpu",
    recipe: str | Recipe = "mixed",
    calibration: Batches | Iterable[Inputs] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    out: str | Path,
    jobs: int = 1,
    ray: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what each number format of each layer costs a model.

    Args:
        model, example_inputs, target, calibration, dynamic_shapes, progress: as for `compile`.
        recipe: its candidates are studied.
        out: the folder of the study: `study.json`, the Pareto front as JSON and CSV, and each of
            its points as a recipe. A study that is there is gone on with.
        jobs: processes that measure.
        ray: address of a Ray cluster that measures instead; "local" starts one with `jobs` workers.

    Returns:
        What `study.json` and the front hold.
    """
    say = _Clock(progress)
    target = Target.parse(target) if isinstance(target, str) else target
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    spec = spec_for(model, example_inputs, calibration, dynamic_shapes)
    recipe = mixed.prepared(recipe, target, spec)
    say("capture")
    program = model if isinstance(model, Program) else capture(
        spec.module, spec.example_inputs, spec.dynamic_shapes
    )  # fmt: skip
    data = Data(program, spec, recipe)
    ready = prepare(program, data, recipe, target, say)
    return mixed.explore(Mixer(ready.program, data, recipe, target, Path(out), say, jobs, ray))
