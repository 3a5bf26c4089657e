"""AWQ's factors: found where they help, merged exactly, and tied over repeated heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qcompiler.observe import observe
from qcompiler.passes.allocate import allocate
from qcompiler.passes.fold_norm import fold_norm
from qcompiler.passes.search_awq import ALPHAS, awq_sites, search_awq
from qcompiler.passes.smooth import smooth
from qcompiler.plan import Assignment, Plan, Site
from qcompiler.program import capture
from qcompiler.qtype import QType
from qcompiler.recipe import load_recipe
from qcompiler.target import Target
from qcompiler.testing import check_contract

KIND = QType.parse("int3:channel")


def test_the_factor_minimises_the_error_of_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24)).eval()
    with torch.no_grad():
        model[0].weight[5] *= 30
        model[0].bias[5] += 20
    batches = [(torch.randn(200, 16),) for _ in range(3)]
    program = capture(model, batches[0])
    first, second = (n.name for n in program.exported.graph.nodes if "linear" in str(n.target))
    plan = Plan({Site(first, 1): Assignment(KIND), Site(second, 1): Assignment(KIND)})
    seen = observe(program, awq_sites(program), batches)
    found = search_awq(program, seen, plan)
    assert list(found) == ["relu"]
    factor = found["relu"]
    assert factor.merged
    assert factor.gain > 3
    weight, rows = model[2].weight.detach(), seen["relu"].rows

    def error(alpha: float) -> float:
        scale = rows.abs().mean(0).clamp(min=1e-8).pow(alpha)
        scale = scale / (scale.max() * scale.min()).sqrt()
        noisy = KIND.round_trip(weight * scale, 0) / scale
        return float((rows.double() @ (noisy - weight).double().T).square().sum())

    best = min(ALPHAS, key=error)
    assert factor.method == f"AWQ {best:g}"
    after = check_contract(smooth, program, batches[:1], idempotent=False, factors=found)
    (got,) = after.run(batches[0])
    torch.testing.assert_close(got, model(batches[0][0]).detach(), rtol=1e-4, atol=1e-3)


def test_a_decoder_takes_all_its_factors(tiny: Callable[[str], Any]) -> None:
    model = tiny("tiny-gqa-decoder")
    program = fold_norm(model.normalized)
    recipe = load_recipe("w4a16", {"weights": "int4:g16"})
    plan = allocate(program, recipe, Target.parse("ort:cpu"))
    sites = awq_sites(program)
    found = search_awq(program, observe(program, sites, model.batches), plan)
    assert set(found) <= set(sites)
    assert len(sites) == 5  # norm → q, k, v; v → out; norm → gate, up; up → down; norm → head
    assert found
    check_contract(
        smooth, program, model.held_out, idempotent=False, factors=found, insert=False
    )  # proves that it is exact


def test_eight_bit_weights_are_left_alone(tiny: Callable[[str], Any]) -> None:
    model = tiny("tiny-gqa-decoder")
    program = fold_norm(model.normalized)
    plan = allocate(program, load_recipe("w8"), Target.parse("ort:cpu"))
    assert not search_awq(program, observe(program, awq_sites(program), model.batches), plan)
