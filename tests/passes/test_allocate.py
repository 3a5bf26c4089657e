"""allocate: which tensor gets which format, and what stays float for which reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompiler.errors import UnsupportedError
from qcompiler.passes.allocate import allocate
from qcompiler.plan import Plan
from qcompiler.program import Program
from qcompiler.recipe import load_recipe
from qcompiler.target import Target

VNNI, AVX2 = Target.parse("ort:cpu:vnni"), Target.parse("ort:cpu:avx2")
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
UINT8 = "uint8:tensor:affine"


def formats(plan: Plan) -> dict[str, str]:
    return {str(site): str(assignment.qtype) for site, assignment in plan.items()}


def plan_of(program: Program, recipe: str = "w8a8", target: Target = VNNI, **settings: Any) -> Plan:
    before = str(program)
    plan = allocate(program, load_recipe(recipe, settings), target)
    assert str(program) == before
    return plan


def reasons(plan: Plan) -> list[str]:
    return [f"{r.where}: {r.reason}" for r in plan.refusals]


def as_text(plan: Plan) -> str:
    lines = [f"{site} {site.path}: {a.qtype}" for site, a in plan.items()]
    return "\n".join([*lines, *(f"refused: {r}" for r in reasons(plan))])


@pytest.mark.parametrize("name", ["attention-block", "depthwise", "conv-block", "tied-weights"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w8", "w4a16"])
def test_golden(
    name: str, recipe: str, tiny: Callable[[str], Any], golden: Callable[[str, str], None]
) -> None:
    plan = plan_of(tiny(f"tiny-{name}").normalized, recipe)
    golden(f"passes/allocate-{name}-{recipe}", as_text(plan))


def test_linears_that_share_an_input_share_its_format(tiny: Callable[[str], Any]) -> None:
    plan = plan_of(tiny("tiny-norm-linear").normalized)
    assert formats(plan) == {
        "linear[0]": UINT8,
        "linear[1]": "int8:channel",
        "linear_1[0]": UINT8,
        "linear_1[1]": "int8:channel",
    }
    assert [site.path for site in plan] == ["left", "left", "right", "right"]


def test_weights_keep_to_seven_bits_where_products_saturate(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-mlp").normalized
    weights = {str(a.qtype) for s, a in plan_of(program, target=AVX2).items() if s.operand == 1}
    assert weights == {"int8:channel:reduced"}
    # Weights alone are multiplied in float: no pair of products saturates.
    weights = {str(a.qtype) for a in plan_of(program, "w8", target=AVX2).values()}
    assert weights == {"int8:channel"}


def test_groups_shrink_until_they_divide(captured: Any) -> None:
    module = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 48), nn.Linear(48, 21))
    plan = plan_of(captured(module, X), "w4a16", weights="int4:g64")
    assert formats(plan) == {
        "linear[1]": "int4:g32",
        "linear_1[1]": "int4:g32",
        "linear_2[1]": "int4:g16",
    }
    assert len(plan.refusals) == 3
    assert "int4:g64 does not divide its weight; int4:g16 instead" in reasons(plan)[2]

    module = nn.Sequential(nn.Linear(32, 21), nn.Linear(21, 4))
    plan = plan_of(captured(module, X), "w4a16")
    assert formats(plan) == {"linear[1]": "int4:g32"}
    assert reasons(plan) == ["linear_1 (1): stays float: its weight has no groups for int4:g32"]


def test_affine_groups_stay_affine_when_they_shrink(captured: Any) -> None:
    program = captured(nn.Linear(48, 5), torch.randn(2, 48))
    plan = plan_of(program, "w4a16", weights="uint4:g32:affine")
    assert formats(plan) == {"linear[1]": "uint4:g16:affine"}


def test_layers_that_the_recipe_keeps(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-attention-block").normalized
    plan = plan_of(program, keep_float=("down", "*y"))
    kept = {site.path for site in plan}
    assert kept == {"embedding", "value", "out", "up"}
    assert reasons(plan) == [
        "linear (query): stays float: the recipe keeps it",
        "linear_1 (key): stays float: the recipe keeps it",
        "linear_5 (down): stays float: the recipe keeps it",
    ]


def test_tied_and_computed_weights(formula: Any, captured: Any, tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-tied-weights").normalized
    for weights, head in (("int8:channel", "int8:channel"), ("int4:g32", "int8:channel")):
        plan = plan_of(program, weights=weights, activations=None)
        assert formats(plan)["embedding[0]"] == head
        assert formats(plan)["linear_1[1]"] == head
        assert formats(plan)["linear[1]"] == weights
    assert reasons(plan) == [
        "linear_1 (head): int8:channel instead of int4:g32: its weight is the embedding"
    ]
    plan = plan_of(program, weights="int4:g16", activations=None, embeddings="int4:g32")
    assert formats(plan)["embedding[0]"] == formats(plan)["linear_1[1]"] == "int4:g32"
    plan = plan_of(program, keep_float=("head",))
    assert not {"embedding[0]", "linear_1[1]"} & set(formats(plan))
    assert "embedding (embedding): stays float: its table is tied to linear_1 (head)" in reasons(
        plan
    )

    def computed(m: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, x[0, :, :])

    plan = plan_of(captured(formula(computed), X))
    assert len(plan) == 0
    assert reasons(plan) == ["linear: stays float: its weight is computed"]


def test_embeddings_follow_their_own_format(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-attention-block").normalized
    assert formats(plan_of(program))["embedding[0]"] == "int8:channel"
    assert "embedding[0]" not in formats(plan_of(program, embeddings=None))
    assert formats(plan_of(program, embeddings="int4:g16"))["embedding[0]"] == "int4:g16"
    for bad in ("int8:tensor", "int8:channel:affine", "int4:channel", "int4:g32:affine"):
        with pytest.raises(UnsupportedError, match=r"embeddings are int8:channel or uint8:channel"):
            plan_of(program, embeddings=bad)
    with pytest.raises(UnsupportedError, match=r"embeddings of generated code are int8:channel"):
        plan_of(program, target=Target.parse("tvm:x86-64"), embeddings="int4:g16")


def test_a_group_that_does_not_divide_a_table(captured: Any) -> None:
    """It shrinks, and a row gets one scale in 8 bits where nothing divides it."""
    ids = torch.zeros(1, 3, dtype=torch.int64)
    for width, kind in ((48, "int4:g16"), (21, "int8:channel")):
        program = captured(nn.Embedding(7, width), ids)
        plan = plan_of(program, "w4a16", embeddings="int4:g32")
        assert formats(plan) == {"embedding[0]": kind}


def test_values_between_convolutions_are_quantized_where_they_are_made(
    tiny: Callable[[str], Any],
) -> None:
    """Once for all readers, after the clip; the sum and the pool of a residual block too."""
    program = tiny("tiny-conv-block").normalized
    nodes = {n.name: n for n in program.exported.graph.nodes}
    plan = plan_of(program)
    made = [str(nodes[s.node].target).split(".")[1] for s in plan if s.operand == -1]
    assert made == ["hardtanh", "hardtanh", "conv2d", "relu6", "adaptive_avg_pool2d"]
    first = next(iter(plan))
    assert (nodes[first.node].target, first.operand) == (torch.ops.aten.conv2d.default, 0)
    # What is quantized where it is made is not quantized again where it is read.
    read = [s for s in plan if s.operand == 0]
    assert [s.node for s in read] == [first.node]


def test_convolutions_whose_output_is_float(formula: Any, captured: Any) -> None:
    module = formula(
        lambda m, x: torch.sigmoid(m.b(torch.relu(m.a(x)))),
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(4, 4, 3),
    )
    plan = plan_of(captured(module, torch.randn(1, 3, 8, 8)))
    assert [s.node for s in plan if s.operand == 1] == ["conv2d"]
    assert "integer convolution writes integers" in reasons(plan)[0]
    plan = plan_of(captured(module, torch.randn(1, 3, 8, 8)), "w8")
    assert [s.node for s in plan] == ["conv2d", "conv2d_1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": "int4:tensor"}, "8-bit activations with one scale per tensor"),
        ({"activations": "int4:token"}, "8-bit activations with one scale per tensor"),
        ({"weights": "int4:g32"}, "no kernel for int4:g32 weights with uint8:tensor:affine"),
        ({"weights": None}, "no kernel for None weights"),
        ({"weights": "int32:channel", "activations": None}, "no int32 tensor"),
        ({"weights": "int8:token", "activations": None}, "weights have one scale for the tensor"),
        ({"activations": "int8:tensor:dynamic"}, "dynamic ranges for uint8:tensor:affine"),
        ({"activations": "uint8:tensor:affine:reduced"}, "fills all 8 bits of activations"),
    ],
)
def test_what_the_target_cannot_run(
    settings: dict[str, Any], message: str, tiny: Callable[[str], Any]
) -> None:
    with pytest.raises(UnsupportedError, match=rf"^recipe 'w8a8' on target '.*': .*{message}"):
        plan_of(tiny("tiny-mlp").normalized, **settings)


def test_the_same_program_gives_the_same_plan(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-depthwise").normalized
    plan = plan_of(program)
    assert plan.to_json() == plan_of(program).to_json()
    assert formats(Plan.from_json(plan.to_json())) == formats(plan)
    order = [n.name for n in program.exported.graph.nodes]
    places = [(order.index(s.node), s.operand) for s in plan]
    assert places == sorted(places)
