"""compile(): the only place that knows the order of the passes."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler import artifact as artifacts
from qcompiler import mixed
from qcompiler.artifact import Artifact
from qcompiler.benching import bench
from qcompiler.data import Data
from qcompiler.deliver import Compiled, Progress, deliver, verify
from qcompiler.distributions import distributions
from qcompiler.errors import InputError, UnsupportedError, VerifyError
from qcompiler.journal import Journal, fingerprint
from qcompiler.memory import release
from qcompiler.mixer import Mixer
from qcompiler.observe import Statistics, choose_range, observe
from qcompiler.passes.allocate import allocate
from qcompiler.passes.correct_bias import correct_bias, measure_bias
from qcompiler.passes.fold_norm import fold_norm
from qcompiler.passes.fuse_attention import fuse_attention
from qcompiler.passes.fuse_cache import fuse_cache
from qcompiler.passes.fuse_rotation import fuse_rotation
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.learn_rotation import learn_rotation
from qcompiler.passes.merge_linears import merge_linears
from qcompiler.passes.normalize import normalize
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.passes.quantize_cache import quantize_cache
from qcompiler.passes.round_products import round_as_told
from qcompiler.passes.round_weights import round_weights, rounding_notes
from qcompiler.passes.search_awq import awq_sites, search_awq
from qcompiler.passes.search_smoothing import search_smoothing, smoothing_sites
from qcompiler.passes.smooth import smooth
from qcompiler.passes.split_columns import split_columns, split_layers
from qcompiler.passes.split_outliers import outlier_layers, split_outliers
from qcompiler.passes.store_cache import measure_cache, store_cache
from qcompiler.passes.untie_weights import untie_weights
from qcompiler.plan import Assignment, Factor, Plan, Rounded, Site
from qcompiler.program import Batch, Entry, Program, Refusal, capture
from qcompiler.recipe import Recipe, load_recipe
from qcompiler.rewrite import module_path, operand
from qcompiler.rounding import outlier_columns
from qcompiler.spec import Batches, Inputs, ModelSpec
from qcompiler.target import Target
from qcompiler.verify import Reference, check_exact, compare_sites

CHECKED = 2  # batches on which exact passes are proven
CORRECTED = 20  # batches at most, in memory at once, over which biases are corrected

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
    spec = _as_spec(model, example_inputs, calibration, dynamic_shapes)
    recipe = mixed.prepared(recipe, target, spec) if recipe.mixed else recipe
    reason = target.refusal(
        recipe.weight_type, recipe.activation_type, recipe.cache_types, recipe.products
    )
    if reason:
        raise UnsupportedError(f"recipe '{recipe.name}' on target '{target}': {reason}")
    out = Path(out)
    with artifacts.writing(out, force) as folder:
        say("capture")
        program = model if isinstance(model, Program) else capture(
            spec.module, spec.example_inputs, spec.dynamic_shapes
        )  # fmt: skip
        data = Data(program, spec, recipe)
        journal = out.with_name(f"{out.name}.journal") if resume else None
        kept = Path(study) if study is not None else out.with_name(f"{out.name}.study")
        compiled = quantize(program, data, recipe, target, say, journal, kept, jobs, ray, buckets)
        compiled.seconds = say.seconds
        deliver(folder, spec, compiled, data, compiled.recipe, target, buckets or {}, say, command)
    if journal is not None:
        shutil.rmtree(journal, ignore_errors=True)
    return Artifact.open(out)


class _Clock:
    """Passes the steps' names on and keeps how long each took, in seconds."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._step, self._since = "start", time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._since
        self._step, self._since = step, now
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
        return _checked(after, before, reference)

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
        program = step(_learn(program, data, recipe, target, say, journal), program)

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

    context = _cached_context(data, recipe, target)
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
        columns = _outlier_columns(program, split, data, recipe)
        program = _checked(split_columns(program, columns), program, reference)
    say("allocate")
    plan = allocate(program, recipe, target)
    floating = program
    taken = {s: a for s, a in plan.items() if _is_activation(program, s)}
    static = {s: a for s, a in taken.items() if not a.qtype.dynamic}
    tensors = {s: _source(program, s) for s in static}
    axes = {name: _axis(program, name) for name in tensors.values()}
    say("calibrate")
    # Their extremes and histograms are all that a range is drawn from: no rows are sampled.
    after = observe(program, axes, data.calibration(), rows=0, mask=data.mask) if axes else {}
    ranges = {}
    for site, assignment in static.items():
        parameter = recipe.p if recipe.calibration == "pnorm" else recipe.percentile
        low, high = choose_range(
            after[tensors[site]], assignment.qtype, recipe.calibration, parameter
        )
        ranges[site] = Assignment(assignment.qtype, low, high)
    plan = plan.with_entries(ranges)

    rounded: Mapping[Site, Rounded] = {}
    outliers = outlier_layers(program, recipe)
    if recipe.rounds_by_data or recipe.keep_moment or outliers:
        say("round_weights")
        rounded, entry = _round(program, plan, data, recipe, journal, outliers)
        program = program.with_entry(entry)
    if outliers:
        say("split_outliers")
        kept = {
            site.node: (r.columns, r.values)
            for site, r in rounded.items()
            if r.columns is not None and r.values is not None
        }
        program = _checked(split_outliers(program, kept), program, reference)
        floating = program

    say("insert_qdq")
    program = insert_qdq(program, plan, rounded)
    if any(recipe.cache_types):
        program = _quantize_cache(program, floating, data, recipe, say)
    if recipe.correct_bias and activation is not None:
        say("correct_bias")
        sample = _spread(list(data.calibration()), CORRECTED)
        program = correct_bias(program, measure_bias(floating, program, sample, data.mask))
    say("pack_weights")
    quantized = _same_integers(program, pack_weights(program), reference)
    say("round_products")
    quantized = round_as_told(quantized, recipe)
    say("compare sites")
    layers = [n.name for n in floating.exported.graph.nodes if _is_layer(n)]
    sites = compare_sites(
        floating, quantized, layers, itertools.islice(data.held_out(), CHECKED), data.mask
    )
    values = distributions(floating, quantized, plan, next(iter(data.held_out())), data.mask)
    plain = normalize(source)
    context = _cached_context(data, recipe, target)
    plain = fuse_attention(fuse_cache(plain, context) if context else plain)
    return Compiled(
        source, plain, floating, quantized, plan, factors, before, after, recipe, sites,
        distributions=values, choice=choice,
    )  # fmt: skip


def _checked(after: Program, before: Program, reference: Reference) -> Program:
    """`after`, proven against the reference where it is not `before` itself."""
    unchanged = after.exported is before.exported
    return after if unchanged else check_exact(before, after, reference)


def _outlier_columns(
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


def _quantize_cache(
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
    extremes = measure_cache(floating, _spread(list(data.calibration()), CORRECTED))
    if not extremes:
        raise UnsupportedError(
            f"recipe '{recipe.name}': no attention of this model is one op with its cache, so "
            "nothing can be stored in it; set fused=true, or leave keys and values in float"
        )
    return store_cache(program, keys, values, extremes)


def _cached_context(data: Data, recipe: Recipe, target: Target) -> int:
    """Tokens that attention over a cache is fused for; 0 where it is not."""
    context = data.spec.generation.context if data.spec.generation else 0
    # Generated code keeps a cache in place only where the attention over it is one op.
    return context if recipe.fused or target.runtime == "tvm" else 0


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
    spec = _as_spec(model, example_inputs, calibration, dynamic_shapes)
    recipe = mixed.prepared(recipe, target, spec)
    say("capture")
    program = model if isinstance(model, Program) else capture(
        spec.module, spec.example_inputs, spec.dynamic_shapes
    )  # fmt: skip
    data = Data(program, spec, recipe)
    ready = prepare(program, data, recipe, target, say)
    return mixed.explore(Mixer(ready.program, data, recipe, target, Path(out), say, jobs, ray))


def _learn(
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


def _round(
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


def _spread(batches: list[Batch], most: int) -> list[Batch]:
    """At most that many batches, evenly spaced: calibration data may be sorted."""
    return batches[:: -(-len(batches) // most)]


def _is_layer(node: torch.fx.Node) -> bool:
    return str(node.target) in ("aten.linear.default", "aten.conv2d.default", "aten.conv1d.default")


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


def _same_integers(before: Program, after: Program, reference: Reference) -> Program:
    """Packing must not change a bit: checked, and noted in the history."""
    for batch in reference.batches[:1]:
        for old, new in zip(before.run(batch), after.run(batch), strict=True):
            if isinstance(old, Tensor) and not bool(
                old.eq(new).logical_or(old.isnan() & new.isnan()).all()
            ):
                raise VerifyError("pack_weights changed the outputs; please report this model")
    entry = replace(after.history[-1], residual=0.0, bound=0.0)
    return Program(after.exported, (*after.history[:-1], entry))


def _as_spec(
    model: ModelSpec | torch.nn.Module | Program,
    example_inputs: Inputs | None,
    calibration: Batches | Iterable[Inputs] | None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None,
) -> ModelSpec:
    factory: Batches | None = None
    if callable(calibration):
        factory = calibration
    elif calibration is not None:
        kept = list(calibration)
        factory = lambda: kept  # noqa: E731 - a factory is what ModelSpec takes
    if isinstance(model, ModelSpec):
        if factory is None:
            return model
        return replace(model, calibration=factory, held_out=None, calibration_note="")
    if isinstance(model, Program):
        example: Inputs = example_inputs if example_inputs is not None else _examples(model)
        return ModelSpec("program", torch.nn.Identity(), example, dynamic_shapes or {}, factory)
    if example_inputs is None:
        raise InputError(
            "example_inputs are needed to capture a module: a tuple of tensors, or a mapping by "
            "name"
        )
    return ModelSpec(type(model).__name__, model, example_inputs, dynamic_shapes or {}, factory)


def _examples(program: Program) -> Inputs:
    """The example inputs that were saved with an exported program."""
    saved = program.exported.example_inputs
    if saved is None:
        raise InputError("the saved program brings no example inputs; give --calibration")
    args, kwargs = saved
    return tuple(torch.utils._pytree.tree_leaves((args, kwargs)))
