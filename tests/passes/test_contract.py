"""What every pass promises, over all tiny models; and that the check of it can fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler.errors import RewriteError
from qcompiler.history import Entry
from qcompiler.models import ZOO
from qcompiler.observe import observe
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
from qcompiler.passes.quantize_cache import quantize_cache
from qcompiler.passes.round_products import round_products
from qcompiler.passes.search_smoothing import smoothing_sites
from qcompiler.passes.smooth import smooth
from qcompiler.passes.split_columns import split_columns, split_layers
from qcompiler.passes.split_outliers import split_outliers
from qcompiler.passes.store_cache import store_cache
from qcompiler.passes.untie_weights import untie_weights
from qcompiler.plan import Assignment, Factor, Plan
from qcompiler.program import Program
from qcompiler.qtype import QType
from qcompiler.recipe import load_recipe
from qcompiler.rewrite import Draft, operand, rewrite
from qcompiler.target import Target
from qcompiler.testing import check_contract, compact

aten = torch.ops.aten
TINY = [name for name in ZOO if name.startswith("tiny-")]
ANALYSES = {
    "allocate",
    "learn_rotation",
    "measure_gradients",
    "measure_sensitivity",
    "round_weights",
    "search_awq",
    "search_smoothing",
}  # Program → data: no rewrites


def plan_for(program: Program, recipe: str, batches: Any) -> tuple[Plan, Mapping[str, Any]]:
    """A complete plan with min-max ranges, and the statistics of what it quantizes."""
    plan = allocate(program, load_recipe(recipe), Target.parse("ort:cpu:vnni"))
    nodes = {n.name: n for n in program.exported.graph.nodes}
    constants = program.constants()
    names = {}
    for site in plan:
        node = nodes[site.node]
        name = node.name if site.operand == -1 else node.args[site.operand].name
        if name not in constants:
            names[site] = name
    axes = {name: 1 if nodes[name].meta["val"].ndim == 4 else -1 for name in names.values()}
    seen = observe(program, axes, batches) if axes else {}
    ranges = {
        site: Assignment(plan[site].qtype, float(seen[n].low.min()), float(seen[n].high.max()))
        for site, n in names.items()
    }
    return plan.with_entries(ranges), seen


def random_factors(program: Program) -> dict[str, Factor]:
    """A factor for every tensor that linears read; what the search would choose takes longer."""
    merged = smoothing_sites(program, insert=False)
    found = {}
    for node in program.exported.graph.nodes:
        if node.name in smoothing_sites(program, insert=True) and any(
            u.target is aten.linear.default and u.args[0] is node for u in node.users
        ):
            size = node.meta["val"].shape[-1]
            scale = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.5
            found[node.name] = Factor(scale, torch.zeros(size), node.name in merged, "random", 0.0)
    return found


@pytest.mark.parametrize("name", TINY)
def test_every_pass_keeps_the_contract(name: str, tiny: Callable[[str], Any]) -> None:
    model = tiny(name)
    checks = model.held_out
    program = check_contract(normalize, model.captured, checks)
    assert str(program) == str(model.normalized)

    # Passes must do no harm to programs in other forms than those they expect, either.
    for early in (fold_norm, fuse_attention, merge_linears):
        check_contract(early, model.captured, checks[:1])

    check_contract(fuse_cache, program, checks, context=64)  # none of these has a cache
    stored = QType.parse("int8:channel")
    check_contract(store_cache, program, checks, keys=stored, values=stored, extremes={})
    untied = check_contract(untie_weights, program, checks)
    centred = check_contract(fold_norm, untied, checks, center=True)
    for ready in (program, centred):
        check_contract(fuse_rotation, ready, checks, idempotent=False, inputs=True, keys=True)
    program = check_contract(fold_norm, program, checks)
    factors = random_factors(program)
    for insert in (True, False):
        check_contract(smooth, program, checks, idempotent=False, factors=factors, insert=insert)
    program = smooth(program, factors)
    program = check_contract(fuse_attention, program, checks)
    program = check_contract(merge_linears, program, checks)
    split = split_layers(program, load_recipe("w4a16", {"formats": {"*": "int4:g16+2"}}))
    columns = {name: torch.tensor([0, 3]) for name in split}
    check_contract(split_columns, program, checks, idempotent=False, columns=columns)
    kept, nodes = {}, {n.name: n for n in program.exported.graph.nodes}
    for name in split:
        weight = program.constants()[operand(nodes[name], 1).name]
        places = weight.abs().topk(2, 1).indices
        kept[name] = places.to(torch.int16), weight.gather(1, places).half()
    check_contract(split_outliers, program, checks, idempotent=False, outliers=kept)

    plan, _ = plan_for(program, "w8a8", model.batches)
    quantized = check_contract(insert_qdq, program, checks, idempotent=False, plan=plan)
    shifts = measure_bias(program, quantized, checks)
    corrected = check_contract(correct_bias, quantized, checks, idempotent=False, shifts=shifts)
    packed = check_contract(pack_weights, corrected, checks)
    for batch in checks:
        for old, new in zip(corrected.run(batch), packed.run(batch), strict=True):
            assert torch.equal(old, new)

    kind = QType.parse("int8:token")
    for window in (0, 4):
        check_contract(
            quantize_cache, model.normalized, checks, idempotent=False,
            keys=kind, values=kind, window=window,
        )  # fmt: skip

    plan, _ = plan_for(program, "w4a16", model.batches)
    quantized = check_contract(insert_qdq, program, checks, idempotent=False, plan=plan)
    check_contract(pack_weights, quantized, checks)

    check_contract(round_products, program, checks)


def test_every_pass_is_checked_here() -> None:
    """A new file in passes/ joins this contract, or is named as an analysis."""
    folder = Path(__file__).parents[2] / "passes"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    rewrites = {name for name in files if getattr(globals().get(name), "exact", None) is not None}
    assert rewrites == files - ANALYSES
    assert all(globals()[name].__name__ == name for name in rewrites)


# What the check itself must notice: passes that break one promise each.


@rewrite(exact=True)
def wrong(draft: Draft) -> None:
    for node in draft.calls(aten.relu.default):
        draft.swap(node, draft.call(aten.tanh.default, *node.args, before=node))


@rewrite(exact=True)
def restless(draft: Draft) -> None:
    """Adds a no-op each time it runs."""
    node = next(draft.calls(aten.relu.default))
    draft.set_input(node, 0, draft.call(aten.clone.default, node.args[0], before=node))


@rewrite(exact=True)
def liar(draft: Draft) -> None:
    draft.changed = True


def writing_into_tensors(program: Program) -> Program:
    with torch.no_grad():
        next(iter(program.exported.state_dict.values())).mul_(2)
    return program.with_entry(Entry("writing_into_tensors", False, False))


writing_into_tensors.exact = False  # type: ignore[attr-defined]


def silent(program: Program) -> Program:
    return program


silent.exact = False  # type: ignore[attr-defined]


RUNS: list[int] = []


@rewrite(exact=False)
def fickle(draft: Draft) -> None:
    RUNS.append(1)
    node = next(draft.calls(aten.linear.default))
    shift = draft.add_constant("shift", torch.full((1,), float(len(RUNS))))
    draft.set_input(node, 0, draft.call(aten.add.Tensor, node.args[0], shift, before=node))


@rewrite(exact=False)
def poisonous(draft: Draft) -> None:
    node = next(draft.calls(aten.relu.default))
    if node.args[0].target is not aten.log.default:
        draft.set_input(node, 0, draft.call(aten.log.default, node.args[0], before=node))


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (wrong, RewriteError, "wrong claims to keep the function.*first node that differs"),
        (restless, AssertionError, "restless: its own result is changed again"),
        (liar, AssertionError, "liar: nothing changed, so the ExportedProgram must be the same"),
        (writing_into_tensors, AssertionError, "the tensors of its input changed"),
        (silent, AssertionError, "silent: the history must grow by one entry"),
        (fickle, AssertionError, "fickle: two runs give different tensors"),
        (poisonous, AssertionError, "poisonous: an output has NaN or Inf"),
    ],
)
def test_the_contract_can_be_broken(
    broken: Any, error: type[Exception], message: str, tiny: Callable[[str], Any]
) -> None:
    model = tiny("tiny-mlp")
    program = model.normalized
    exported = Draft(program).finish()
    for key, value in exported.state_dict.items():  # tensors of its own, which a pass may spoil
        exported.state_dict[key] = torch.nn.Parameter(value.detach().clone(), requires_grad=False)
    with pytest.raises(error, match=message):
        check_contract(broken, replace(program, exported=exported), model.held_out)


def test_compact_text(tiny: Callable[[str], Any], golden: Callable[[str, str], None]) -> None:
    golden("compact", compact(tiny("tiny-norm-linear").captured))


def test_compact_text_names_every_node(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-gqa-decoder").captured
    lines = compact(program).splitlines()
    nodes = [n.name for n in program.exported.graph.nodes if n.op != "output"]
    assert [line.partition(" = ")[0] for line in lines[:-1]] == nodes
    assert lines[-1] == "return [linear_7]"
