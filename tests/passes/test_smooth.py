"""smooth and search_smoothing: outliers move from activations into weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompiler.observe import observe
from qcompiler.passes.search_smoothing import (
    ALPHAS,
    INSERT_GAIN,
    MERGE_GAIN,
    search_smoothing,
    smoothing_sites,
)
from qcompiler.passes.smooth import smooth
from qcompiler.plan import Factor
from qcompiler.program import Program
from qcompiler.qtype import QType
from qcompiler.testing import check_contract

WIDTH = 16
INT8, UINT8 = QType.parse("int8:channel"), QType.parse("uint8:tensor:affine")
X = torch.randn(4, 9, WIDTH, generator=torch.Generator().manual_seed(0))


def outliers(linear: nn.Linear, channels: tuple[int, ...] = (2, 7), factor: float = 30.0) -> Any:
    """A linear with a few large output channels."""
    with torch.no_grad():
        linear.weight[list(channels)] *= factor
    return linear


def some_factor(size: int, merged: bool, shift: bool = False, seed: int = 3) -> Factor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(size, generator=generator) * 4 + 0.1
    offset = torch.randn(size, generator=generator) if shift else torch.zeros(size)
    return Factor(scale, offset, merged, "test", 0.0)


def smoothed(program: Program, module: nn.Module, factors: Any, insert: bool = True) -> Program:
    """Smooth under the contract, and compare with the module in float64."""
    after = check_contract(
        smooth, program, [(X,)], idempotent=False, factors=factors, insert=insert
    )
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(X.double())
    (got,) = after.run((X,), double=True)
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * scale)
    return after


def value_of(program: Program, name: str) -> Tensor:
    found: dict[str, Tensor] = {}
    program.run((X,), lambda node, value: found.__setitem__(node.name, value), double=True)
    return found[name]


class Pair(nn.Module):
    """linear → linear, with nothing between that changes the channels."""

    def __init__(self, between: Callable[[Tensor], Tensor] = nn.Identity()) -> None:  # noqa: B008
        super().__init__()
        self.first = outliers(nn.Linear(WIDTH, WIDTH))
        self.second = nn.Linear(WIDTH, 6)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize("shift", [False, True])
def test_a_factor_is_merged_into_the_writer(shift: bool, captured: Any) -> None:
    """X ↦ (x − z)/s in the tensor itself, W ↦ W diag(s) and b ↦ b + W z in its reader."""
    module = Pair()
    program = captured(module, X)
    factor = some_factor(WIDTH, merged=True, shift=shift)
    after = smoothed(program, module, {"linear": factor})
    old, new = value_of(program, "linear"), value_of(after, "linear")
    torch.testing.assert_close(
        new, (old - factor.shift.double()) / factor.scale.double(), rtol=1e-5, atol=1e-5
    )
    (reader,) = [n for n in after.exported.graph.nodes if n.name == "linear_1"]
    weight, bias = (after.constants()[a.name].double().numpy() for a in reader.args[1:])
    w = module.second.weight.detach().double().numpy()
    b = module.second.bias.detach().double().numpy()
    np.testing.assert_allclose(weight, w * factor.scale.double().numpy(), rtol=1e-6)
    np.testing.assert_allclose(bias, b + w @ factor.shift.double().numpy(), rtol=1e-5, atol=1e-6)
    assert after.history[-1].notes == ("1 factors merged into the layers before",)
    assert len(after.exported.graph.nodes) == len(program.exported.graph.nodes)


def test_a_factor_is_inserted_where_no_writer_can_take_it(captured: Any) -> None:
    module = Pair(torch.nn.functional.gelu)
    program = captured(module, X)
    factor = some_factor(WIDTH, merged=False)
    after = smoothed(program, module, {"gelu": factor})
    assert after.history[-1].notes == ("1 multiplications inserted",)
    torch.testing.assert_close(value_of(after, "gelu"), value_of(program, "gelu"))
    (product,) = [n for n in after.exported.graph.nodes if str(n.target) == "aten.mul.Tensor"]
    torch.testing.assert_close(
        value_of(after, product.name), value_of(program, "gelu") / factor.scale, rtol=1e-6, atol=0
    )
    after = check_contract(
        smooth, program, [(X,)], idempotent=False, factors={"gelu": factor}, insert=False
    )
    assert after.exported is program.exported
    (refusal,) = after.history[-1].refusals
    assert refusal.where.startswith("gelu")
    assert "gelu.default does not commute" in refusal.reason or "weights" in refusal.reason


def test_relu_takes_a_scale(captured: Any) -> None:
    module = Pair(torch.relu)
    program = captured(module, X)
    smoothed(program, module, {"relu": some_factor(WIDTH, merged=True)})


def test_values_through_attention_with_grouped_heads(formula: Any, captured: Any) -> None:
    """V → O: 2 value heads serve 4 query heads, so channels of O share the factor of one of V."""

    def function(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).view(4, 9, 4, 4).transpose(1, 2)
        k, v = (layer(x).view(4, 9, 2, 4).transpose(1, 2) for layer in (m.k, m.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.o(y.transpose(1, 2).reshape(4, 9, WIDTH))

    module = formula(
        function,
        q=nn.Linear(WIDTH, WIDTH),
        k=nn.Linear(WIDTH, 8),
        v=outliers(nn.Linear(WIDTH, 8)),
        o=nn.Linear(WIDTH, WIDTH),
    )
    program = captured(module, X)
    (output,) = [n for n in program.exported.graph.nodes if n.name == "linear_3"]
    source = output.args[0].name
    seen = observe(program, smoothing_sites(program, insert=False), [(X,)])
    factors = search_smoothing(program, seen, INT8, UINT8, insert=False)
    assert factors[source].merged
    heads = factors[source].scale.reshape(4, 4)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert not torch.equal(heads[0], heads[2])
    smoothed(program, module, {source: factors[source]}, insert=False)


def search(program: Program, insert: bool = True, activation: QType = UINT8) -> Any:
    seen = observe(program, smoothing_sites(program, insert), [(X,)])
    return seen, search_smoothing(program, seen, INT8, activation, insert)


def reader_error(x: Tensor, weight: Tensor, factor: Factor | None) -> float:
    """‖x Wᵀ − Q(x') Q(W')ᵀ‖² with min-max ranges, in numpy float64."""
    a, w = x.reshape(-1, x.shape[-1]).double().numpy(), weight.detach().double().numpy()
    expected = a @ w.T
    if factor is not None:
        z, s = factor.shift.double().numpy(), factor.scale.double().numpy()
        expected = (a - z) @ w.T
        a, w = (a - z) / s, w * s
    low, high = min(a.min(), 0.0), max(a.max(), 0.0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    a = (np.clip(np.rint(a / step) + zero, 0, 255) - zero) * step
    steps = np.abs(w).max(1, keepdims=True) / 127
    return float(((a @ (np.rint(w / steps) * steps).T - expected) ** 2).sum())


@pytest.mark.parametrize("between", [nn.Identity(), nn.functional.gelu], ids=["merged", "inserted"])
def test_the_search_lowers_the_error_of_the_readers(between: Any, captured: Any) -> None:
    module = Pair(between)
    program = captured(module, X)
    _, factors = search(program)
    name = "gelu" if between is nn.functional.gelu else "linear"
    factor = factors[name]
    assert factor.merged == (name == "linear")
    x = value_of(program, name).float()
    plain, better = (reader_error(x, module.second.weight, f) for f in (None, factor))
    assert better < plain / 4  # 6 dB
    assert factor.gain > 6
    after = smoothed(program, module, factors)
    assert after.exported is not program.exported


def test_smoothquant_formula_is_among_the_candidates(captured: Any) -> None:
    """With the refinement worth nothing, s = max|X|^α / max|W|^(1−α), up to a common factor."""
    module = Pair()
    program = captured(module, X)
    seen, factors = search(program, insert=False)
    factor = factors["linear"]
    assert factor.method.startswith(("alpha", "refined"))
    stats = seen["linear"]
    low = np.minimum(stats.low.numpy(), (stats.mean - 6 * stats.deviation).numpy())
    high = np.maximum(stats.high.numpy(), (stats.mean + 6 * stats.deviation).numpy())
    top = np.maximum(high, -low) if "shift" not in factor.method else (high - low) / 2
    w = module.second.weight.detach().double().abs().amax(0).numpy()
    formula = [top**a / w ** (1 - a) for a in ALPHAS]
    formula = [f / np.exp(np.log(f).mean()) for f in formula]
    x = value_of(program, "linear").float()
    chosen = reader_error(x, module.second.weight, factor)
    for scale in formula:
        by_formula = Factor(torch.from_numpy(scale), factor.shift, True, "formula", 0.0)
        assert chosen < 1.5 * reader_error(x, module.second.weight, by_formula)


def test_nothing_is_moved_where_nothing_is_gained(captured: Any) -> None:
    """Channels of one size: no factor is worth a multiplication."""
    module = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        module[1].weight.copy_(torch.where(torch.rand(WIDTH, WIDTH) < 0.5, 1.0, -1.0))
    program = captured(module, X)
    _, factors = search(program)
    assert all(f.gain >= (MERGE_GAIN if f.merged else INSERT_GAIN) for f in factors.values())
    assert "tanh" not in factors


def test_tied_weights_have_no_factor(tiny: Callable[[str], Any]) -> None:
    model = tiny("tiny-tied-weights")
    assert set(smoothing_sites(model.normalized, insert=True)) == {"embedding"}


def test_the_search_is_deterministic(captured: Any) -> None:
    program = captured(Pair(), X)
    (_, first), (_, second) = search(program), search(program)
    assert first.keys() == second.keys()
    for name, factor in first.items():
        assert torch.equal(factor.scale, second[name].scale)
        assert torch.equal(factor.shift, second[name].shift)


def test_a_shift_is_never_merged_past_what_only_scales(formula: Any, captured: Any) -> None:
    """Gated layers, ReLU and unnormalised mixing commute with a scale, not with a shift."""

    def gated(m: Any, x: Tensor) -> Tensor:
        return m.down(torch.sigmoid(m.gate(x)) * m.up(x))

    def mixed(m: Any, x: Tensor) -> Tensor:
        return m.down(torch.tanh(m.gate(x)[:, :, :9]) @ m.up(x))

    for function in (gated, mixed):
        up = outliers(nn.Linear(WIDTH, WIDTH))
        with torch.no_grad():
            up.bias += 20.0  # makes a shift attractive
        module = formula(
            function, gate=nn.Linear(WIDTH, WIDTH), up=up, down=nn.Linear(WIDTH, WIDTH)
        )
        program = captured(module, X)
        _, factors = search(program, insert=False)
        assert factors
        assert all(bool((f.shift == 0).all()) for f in factors.values())
        smoothed(program, module, factors, insert=False)


def test_a_shift_is_found_where_it_can_be_merged(captured: Any) -> None:
    module = Pair()
    with torch.no_grad():
        module.first.bias += torch.linspace(-40, 40, WIDTH)
    program = captured(module, X)
    _, factors = search(program, insert=False)
    assert "shift" in factors["linear"].method
    assert bool((factors["linear"].shift != 0).any())
    smoothed(program, module, factors, insert=False)


def test_golden(
    formula: Any, captured: Any, golden_pair: Callable[[str, Program, Program], None]
) -> None:
    module = formula(
        lambda m, x: m.c(torch.nn.functional.gelu(m.b(m.a(x)))) + m.d(x),
        a=nn.Linear(WIDTH, WIDTH, bias=False),
        b=nn.Linear(WIDTH, WIDTH),
        c=nn.Linear(WIDTH, 4),
        d=nn.Linear(WIDTH, 4),
    )
    program = captured(module, X)
    names = {n.name for n in program.exported.graph.nodes}
    assert {"linear", "gelu"} <= names
    factors = {
        "linear": some_factor(WIDTH, merged=True, shift=True),
        "gelu": some_factor(WIDTH, merged=False),
    }
    golden_pair("smooth", program, smooth(program, factors))
    golden_pair("smooth-refused", program, smooth(program, factors, insert=False))


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("int8:channel", "uint8:token:affine"), ("int4:g8", "int8:token"), ("int4:g12", "int8:token")],
)
def test_the_gain_is_that_of_the_formats_used(
    weights: str, activations: str, captured: Any
) -> None:
    """A range for each token, groups along the inputs; a row where the group does not divide."""
    module = Pair(nn.functional.gelu)
    program = captured(module, X)
    names = smoothing_sites(program, insert=True)
    found = observe(program, names, [(X,)])
    kind, activation = QType.parse(weights), QType.parse(activations)
    factor = search_smoothing(program, found, kind, activation, insert=True)["gelu"]
    if weights == "int4:g12":
        kind = QType.parse("int4:channel")
    rows, weight = found["gelu"].rows, module.second.weight.detach()

    def error(scale: Tensor) -> float:
        noisy = activation.round_trip(rows / scale)
        noisy = noisy @ kind.round_trip(weight * scale, 1 if kind.group else 0).T
        return float((noisy - rows @ weight.T).double().square().sum())

    gain = 10 * np.log10(error(torch.ones(WIDTH)) / error(factor.scale))
    assert gain == pytest.approx(factor.gain, abs=0.01)
    assert gain > INSERT_GAIN
