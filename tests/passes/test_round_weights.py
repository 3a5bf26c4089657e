"""GPTQ against an unblocked reference that inverts the Hessian anew for every column."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qcompiler import hessian
from qcompiler.errors import InputError
from qcompiler.passes import round_weights as module
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.passes.round_weights import round_weights
from qcompiler.plan import Assignment, Plan, Site
from qcompiler.program import capture
from qcompiler.qtype import QType
from qcompiler.rounding import DAMPING, gptq

KINDS = ["int4:channel", "int4:g16", "int3:g16", "int2:g16:affine", "int8:channel", "int4:tensor"]


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=g) / features**0.5 + 0.3
    return torch.randn(rows, features, generator=g) @ mixing


def hessian_of(x: Tensor) -> Tensor:
    return 2 * (x.double().T @ x.double())


def reference(weight: Tensor, hessian: Tensor, kind: QType) -> Tensor:
    """Frantar 2022, equation 3, one column at a time, the inverse computed afresh for the rest."""
    axis, group = (1, kind.group) if kind.group else (0, 1)
    scale, zero = kind.scale_for(*kind.ranges(weight, axis))
    s, z = scale.double(), zero.double()
    if kind.group:
        s, z = s.repeat_interleave(group, 1), z.repeat_interleave(group, 1)
    elif kind.granularity == "channel":
        s, z = s[:, None].expand_as(weight), z[:, None].expand_as(weight)
    else:
        s, z = s.expand_as(weight), z.expand_as(weight)
    rest = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    eye = torch.eye(len(hessian), dtype=torch.float64)
    damped = hessian + DAMPING * hessian.diagonal().mean() * eye
    w, out = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    while rest:
        inverse = torch.linalg.inv(damped[rest][:, rest])
        j = rest[0]
        q = ((w[:, j] / s[:, j]).round() + z[:, j]).clamp(kind.qmin, kind.qmax)
        out[:, j] = (q - z[:, j]) * s[:, j]
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0][None, :]
        rest = rest[1:]
    return out


def output_error(x: Tensor, weight: Tensor, rounded: Tensor) -> float:
    return float((x.double() @ (weight - rounded).double().T).square().sum())


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("block", [7, 128])
def test_matches_the_unblocked_reference(text: str, block: int) -> None:
    kind, x = QType.parse(text), correlated(300, 48)
    weight = torch.randn(12, 48, generator=torch.Generator().manual_seed(1))
    got = gptq(weight, hessian_of(x), kind, block=block).weight
    torch.testing.assert_close(
        got.double(), reference(weight, hessian_of(x), kind), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("text", [*KINDS[:4], "float8_e4m3:channel"])
def test_loses_less_output_than_nearest_rounding(text: str) -> None:
    kind, x = QType.parse(text), correlated(500, 64)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    got = gptq(weight, hessian_of(x), kind).weight
    nearest = kind.round_trip(weight, 1 if kind.group else 0)
    assert output_error(x, weight, got) < 0.7 * output_error(x, weight, nearest)


def test_equals_nearest_rounding_for_uncorrelated_inputs() -> None:
    kind = QType.parse("int4:channel")
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    got = gptq(weight, torch.eye(32, dtype=torch.float64), kind).weight
    torch.testing.assert_close(got, kind.round_trip(weight, 0))


def test_silent_channels_and_a_singular_hessian() -> None:
    kind, x = QType.parse("int4:g16"), correlated(5, 32)  # fewer rows than features: rank 5
    x[:, 3] = 0
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(4))
    got = gptq(weight, hessian_of(x), kind).weight
    assert bool(torch.isfinite(got).all())
    torch.testing.assert_close(got[:, 3], kind.round_trip(weight, 1)[:, 3])


def test_nan_in_the_hessian_is_named() -> None:
    with pytest.raises(InputError, match="NaN or Inf in the Hessian"):
        gptq(torch.ones(2, 4), torch.full((4, 4), torch.nan).double(), QType.parse("int4:channel"))


def test_the_layer_with_nan_is_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    batch = (correlated(8, 16),)
    program = capture(model, batch)
    _, second = (n.name for n in program.exported.graph.nodes if "linear" in str(n.target))
    plan = Plan({Site(second, 1): Assignment(QType.parse("int4:channel"))})
    bad = batch[0].index_fill(0, torch.tensor([2, 3, 7]), torch.nan)
    with pytest.raises(InputError, match=rf"{second} .*: calibration: 3 of 8 tokens have NaN or I"):
        round_weights(program, plan, [(bad,)])
    huge = batch[0] * 1e25  # finite, and their squares are not
    for method in ("gptq", "rtn"):
        with pytest.raises(InputError, match=rf"{second} .*: calibration: the squares of .* overf"):
            round_weights(program, plan, [(huge,)], method=method, clip=True)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_left_out(spoil: float, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    clean = [correlated(40, 32, seed) for seed in range(3)]
    bad = clean[1].clone()
    bad[[3, 39], [0, 31]] = spoil
    kept = [i for i in range(40) if i not in (3, 39)]
    program = capture(model, (clean[0],), {"input": {0: "rows"}})
    nodes = [n.name for n in program.exported.graph.nodes if "linear" in str(n.target)]
    plan = Plan({Site(n, 1, n): Assignment(QType.parse("int4:g16")) for n in nodes})
    spoiled = round_weights(
        program, plan, [(clean[0],), (bad,), (clean[2],)], method=method, clip=True
    )
    without = round_weights(
        program, plan, [(clean[0],), (clean[1][kept],), (clean[2],)], method=method, clip=True
    )
    for site, rounded in spoiled.items():
        assert torch.equal(rounded.stored, without[site].stored), site
        assert torch.equal(rounded.scale, without[site].scale), site
        assert (rounded.rows, rounded.left_out) == (120, 2)
    assert module.rounding_notes(without) == ["2 weights rounded"]
    assert module.rounding_notes(spoiled)[1] == (
        f"NaN or Inf in the inputs of 2 layers, the first of them {nodes[0]}; these tokens were "
        f"left out, most in {nodes[0]} (2 of 120)"
    )


def test_each_layer_sees_the_rounded_layers_before_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    batches = [(correlated(40, 32, seed),) for seed in range(3)]
    program = capture(model, batches[0])
    kind = QType.parse("int4:g16")
    first, second = (n.name for n in program.exported.graph.nodes if "linear" in str(n.target))
    plan = Plan({Site(first, 1): Assignment(kind), Site(second, 1): Assignment(kind)})
    rounded = round_weights(program, plan, batches)
    x = torch.cat([b[0] for b in batches])
    one = gptq(model[0].weight.detach(), hessian_of(x), kind)
    torch.testing.assert_close(rounded[Site(first, 1)].weight, one.weight)
    middle = torch.relu(nn.functional.linear(x, one.weight, model[0].bias)).detach()
    two = gptq(model[2].weight.detach(), hessian_of(middle), kind)
    torch.testing.assert_close(rounded[Site(second, 1)].weight, two.weight)
    # The quantized program multiplies exactly these weights.
    quantized = pack_weights(insert_qdq(program, plan, rounded))
    expected = nn.functional.linear(middle, two.weight, model[2].bias).detach()
    got = torch.cat([quantized.run(b)[0] for b in batches])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_same_data_give_the_same_bits() -> None:
    kind, x = QType.parse("int4:g16"), correlated(100, 32)
    weight = torch.randn(8, 32)
    first, second = (gptq(weight, hessian_of(x), kind).weight for _ in range(2))
    assert torch.equal(first, second)


def test_too_little_memory_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 48)).eval()
    batch = (correlated(40, 32),)
    program = capture(model, batch)
    (name,) = (n.name for n in program.exported.graph.nodes if "linear" in str(n.target))
    plan = Plan({Site(name, 1): Assignment(QType.parse("int4:g16"))})
    monkeypatch.setattr(module, "free_memory", lambda: 2 * 10**8)
    with pytest.raises(InputError, match=r"GPTQ needs about 0\.3 GB beside the model, and 0\.2 GB"):
        round_weights(program, plan, [batch])
    round_weights(program, plan, [batch], method="rtn")
    monkeypatch.setattr(module, "free_memory", lambda: None)
    round_weights(program, plan, [batch])


def test_free_memory_is_read_from_the_system() -> None:
    free = module.free_memory()
    assert free is None or 1e6 < free < 1e14


def test_notes_name_singular_layers_and_silent_inputs() -> None:
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    x = correlated(40, 32)
    x[:, 3] = 0
    program = capture(model, (x,))
    (name,) = (n.name for n in program.exported.graph.nodes if "linear" in str(n.target))
    site = Site(name, 1, "layer")
    rounded = round_weights(program, Plan({site: Assignment(QType.parse("int4:g16"))}), [(x,)])
    assert module.rounding_notes(rounded) == [
        "1 weights rounded",
        "1 inputs of 1 layers never fired in calibration and keep nearest rounding, most in "
        "layer (1)",
    ]
    raised = {site: replace(rounded[site], damping=0.1)}
    assert (
        "damping raised, up to 0.1 of the mean diagonal in layer"
        in module.rounding_notes(raised)[1]
    )


def test_a_hessian_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(50, 37)
    monkeypatch.setattr(hessian, "STRIP", 8)
    got = hessian.Hessian.of([x], [None]).matrix
    torch.testing.assert_close(got, hessian_of(x), rtol=1e-5, atol=1e-5)
