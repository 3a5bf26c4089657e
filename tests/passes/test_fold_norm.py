"""fold_norm: γ and β into the readers, the mean subtraction into the writers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompiler.passes.fold_norm import fold_norm
from qcompiler.program import Program
from qcompiler.testing import check_contract

WIDTH = 8
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def norm_of(width: int = WIDTH, bias: bool = True, seed: int = 0) -> nn.LayerNorm:
    """A LayerNorm with scales of both signs and a shift."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.LayerNorm(width, bias=bias)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=generator) + 0.3)
        if bias:
            norm.bias.copy_(torch.randn(width, generator=generator))
    return norm


def rms_of(width: int = WIDTH) -> nn.RMSNorm:
    norm = nn.RMSNorm(width, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1.5, 2.0, width))
    return norm


def folded(program: Program, module: nn.Module, *inputs: Tensor, center: bool = False) -> Program:
    """Fold under the contract, and compare with the module in float64."""
    after = check_contract(fold_norm, program, [inputs], center=center)
    wide = copy.deepcopy(module).double()
    with torch.no_grad():
        expected = wide(*(x.double() if x.is_floating_point() else x for x in inputs))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, want in zip(after.run(inputs, double=True), expected, strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * scale)
    return after


def calls(program: Program, name: str) -> list[torch.fx.Node]:
    return [n for n in program.exported.graph.nodes if str(n.target) == f"aten.{name}.default"]


def is_plain(program: Program) -> bool:
    """Whether every norm has γ = 1 and β = 0."""
    constants = program.constants()
    for norm in (*calls(program, "layer_norm"), *calls(program, "rms_norm")):
        gamma, *rest = (constants[a.name] for a in norm.args[2:] if isinstance(a, torch.fx.Node))
        if not bool((gamma == 1).all()) or any(bool((beta != 0).any()) for beta in rest):
            return False
    return True


def test_the_formula(captured: Any) -> None:
    """W' = W·diag(γ), b' = b + W β, in numpy."""
    norm, linear = norm_of(), nn.Linear(WIDTH, 6)
    module = nn.Sequential(norm, linear)
    after = folded(captured(module, X), module, X)
    (reader,) = calls(after, "linear")
    weight, bias = (after.constants()[a.name].double().numpy() for a in reader.args[1:])
    w, b = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
    gamma, beta = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    np.testing.assert_allclose(weight, w * gamma, rtol=1e-7)
    np.testing.assert_allclose(bias, b + w @ beta, rtol=1e-6)
    assert is_plain(after)
    assert after.history[-1].notes == ("1 norms folded into their readers",)


def test_readers_without_bias_get_one_only_where_there_is_a_shift(
    formula: Any, captured: Any
) -> None:
    for norm, arguments in ((norm_of(), 3), (norm_of(bias=False), 2), (rms_of(), 2)):
        module = nn.Sequential(norm, nn.Linear(WIDTH, 6, bias=False))
        after = folded(captured(module, X), module, X)
        (reader,) = calls(after, "linear")
        assert len(reader.args) == arguments
        assert is_plain(after)


def test_heads_split_before_the_reader(formula: Any, captured: Any) -> None:
    """The channels are followed through view and transpose."""

    def function(m: Any, x: Tensor) -> Tensor:
        x = m.norm(x).view(2, 5, 2, 4).transpose(1, 2)
        return m.linear(x.transpose(1, 2).reshape(2, 5, WIDTH))

    module = formula(function, norm=norm_of(), linear=nn.Linear(WIDTH, 3))
    assert is_plain(folded(captured(module, X), module, X))


def test_a_reader_of_permuted_channels(formula: Any, captured: Any) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        x = m.norm(x).view(2, 5, 2, 4).transpose(2, 3).reshape(2, 5, WIDTH)
        return m.linear(x)

    module = formula(function, norm=norm_of(), linear=nn.Linear(WIDTH, 3))
    assert is_plain(folded(captured(module, X), module, X))


def test_norms_that_share_parameters_are_folded_each_into_its_readers(
    formula: Any, captured: Any
) -> None:
    module = formula(
        lambda m, x: m.b(m.norm(m.a(m.norm(x)))),
        norm=norm_of(),
        a=nn.Linear(WIDTH, WIDTH),
        b=nn.Linear(WIDTH, 4),
    )
    after = folded(captured(module, X), module, X)
    assert is_plain(after)
    assert len(calls(after, "layer_norm")) == 2


def test_readers_that_share_one_weight_even_where_gamma_is_zero(
    formula: Any, captured: Any
) -> None:
    norm = norm_of()
    with torch.no_grad():
        norm.weight[2] = 0.0
    first, second = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6)
    second.weight = first.weight
    module = formula(
        lambda m, x: (lambda h: m.first(h) * m.second(h))(m.norm(x)),  # noqa: PLC3002 - short
        norm=norm,
        first=first,
        second=second,
    )
    after = folded(captured(module, X), module, X)
    assert is_plain(after)
    assert after.history[-1].refusals == ()
    readers = calls(after, "linear")
    assert readers[0].args[1] is readers[1].args[1]


def refused(program: Program, module: nn.Module, x: Tensor) -> str:
    """Nothing is folded, and the one reason for it."""
    after = folded(program, module, x)
    assert after.exported is program.exported
    (refusal,) = after.history[-1].refusals
    return f"{refusal.where}: {refusal.reason}"


def test_a_norm_that_the_residual_reads_is_refused(formula: Any, captured: Any) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        return h + torch.tanh(m.linear(h))

    module = formula(function, norm=norm_of(), linear=nn.Linear(WIDTH, WIDTH))
    reason = refused(captured(module, X), module, X)
    assert reason.startswith("layer_norm (norm): add")
    assert "cannot be scaled" in reason


def test_a_post_norm_block_is_refused(formula: Any, captured: Any) -> None:
    """The residual of a post-norm block has the linear's output as a second writer."""

    def function(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        return m.last(h + m.linear(h))

    module = formula(
        function, norm=norm_of(), linear=nn.Linear(WIDTH, WIDTH), last=nn.Linear(WIDTH, 3)
    )
    reason = refused(captured(module, X), module, X)
    assert reason == "layer_norm (norm): linear (linear) writes into the same stream"


def test_other_refusals(formula: Any, captured: Any) -> None:
    output = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm_of())
    assert "it is an output of the model" in refused(captured(output, X), output, X)

    shared = formula(
        lambda m, x: m.linear(m.norm(x)) + m.linear(x),
        norm=norm_of(),
        linear=nn.Linear(WIDTH, WIDTH),
    )
    assert "the weight of linear (linear) has another reader" in refused(
        captured(shared, X), shared, X
    )

    curved = formula(
        lambda m, x: m.linear(torch.nn.functional.gelu(m.norm(x))),
        norm=norm_of(),
        linear=nn.Linear(WIDTH, 4),
    )
    assert "gelu.default reads it, which does not commute with scaling" in refused(
        captured(curved, X), curved, X
    )

    padded = formula(
        lambda m, x: m.conv(m.norm(x).transpose(1, 2)),
        norm=norm_of(),
        conv=nn.Conv1d(WIDTH, 4, 3, padding=1),
    )
    assert "padding is zero before the shift" in refused(captured(padded, X), padded, X)


def test_convolutions_take_a_scale_without_shift(formula: Any, captured: Any) -> None:
    module = formula(
        lambda m, x: m.conv(m.norm(x).transpose(1, 2)),
        norm=rms_of(),
        conv=nn.Conv1d(WIDTH, 4, 3, padding=1),
    )
    assert is_plain(folded(captured(module, X), module, X))


def test_relu_commutes_with_positive_factors_only(formula: Any, captured: Any) -> None:
    def module_with(norm: nn.Module) -> nn.Module:
        linear = nn.Linear(WIDTH, 4)
        return formula(lambda m, x: m.linear(torch.relu(m.norm(x))), norm=norm, linear=linear)

    negative = module_with(rms_of())
    assert "commutes with positive factors only" in refused(captured(negative, X), negative, X)
    positive = module_with(nn.RMSNorm(WIDTH))
    with torch.no_grad():
        positive.norm.weight.uniform_(0.5, 2.0)
    assert is_plain(folded(captured(positive, X), positive, X))
    shifting = module_with(nn.LayerNorm(WIDTH))
    with torch.no_grad():
        shifting.norm.weight.uniform_(0.5, 2.0)
        shifting.norm.bias.normal_()
    assert "but not with the shift" in refused(captured(shifting, X), shifting, X)


def test_norms_without_parameters_are_left_alone(captured: Any) -> None:
    for norm in (
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.RMSNorm(WIDTH, elementwise_affine=False),
    ):
        module = nn.Sequential(norm, nn.Linear(WIDTH, 4))
        program = captured(module, X)
        after = folded(program, module, X)
        assert after.exported is program.exported
        assert after.history[-1].refusals == ()


class Stream(nn.Module):
    """Embeddings of tokens and positions, a branch, and a norm after each: the stream of BERT."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, WIDTH), nn.Embedding(5, WIDTH)
        self.branch, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.first, self.last = first, last

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(5))
        x = x + self.branch(self.first(x))
        return self.head(self.last(x))


IDS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))


def test_center_turns_layer_norms_into_rms_norms(captured: Any) -> None:
    module = Stream(norm_of(seed=1), norm_of(seed=2))
    program = captured(module, IDS)
    after = folded(program, module, IDS, center=True)
    assert calls(after, "layer_norm") == []
    assert len(calls(after, "rms_norm")) == 2
    assert is_plain(after)
    assert after.history[-1].notes[-1] == "2 mean subtractions folded into 3 writers"
    # C W with C = I − 11ᵀ/n: what each writer adds to the stream has mean 0.
    constants = after.constants()
    tables = [constants[n.args[0].name] for n in calls(after, "embedding")]
    branch = next(n for n in calls(after, "linear") if n.name == "linear")
    weight, bias = (constants[a.name] for a in branch.args[1:])
    for value in (tables[0], tables[1], weight.T, bias[None]):
        np.testing.assert_allclose(value.double().mean(1).numpy(), 0, atol=1e-7)
    w = module.branch.weight.detach().double().numpy()
    gamma = module.first.weight.detach().double().numpy()
    centre = np.eye(WIDTH) - 1 / WIDTH
    np.testing.assert_allclose(weight.double().numpy(), centre @ w * gamma, atol=1e-6)


def test_center_keeps_a_shift_that_could_not_be_folded(formula: Any, captured: Any) -> None:
    module = formula(
        lambda m, x: torch.tanh(m.norm(m.linear(x))),
        linear=nn.Linear(WIDTH, WIDTH),
        norm=norm_of(),
    )
    after = folded(captured(module, X), module, X, center=True)
    assert len(calls(after, "rms_norm")) == 1
    assert calls(after, "layer_norm") == []


def test_center_without_parameters(captured: Any) -> None:
    module = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Tanh()
    )
    after = folded(captured(module, X), module, X, center=True)
    assert len(calls(after, "rms_norm")) == 1


def heads_apart(m: Any, x: Tensor) -> Tensor:
    """Each head has its own mean: not that of the writer."""
    return torch.tanh(m.norm(m.linear(x).view(2, 5, 2, 4)))


@pytest.mark.parametrize(
    ("function", "parts", "reason"),
    [
        (
            lambda m, x: torch.tanh(m.norm(torch.relu(m.linear(x)))),
            {"norm": norm_of()},
            "does not commute with it",
        ),
        (heads_apart, {"norm": norm_of(4)}, "channels move between the writers and the norm"),
        (
            lambda m, x: torch.tanh(m.norm(m.linear(x) + m.other(x))),
            {"norm": norm_of(), "other": norm_of(seed=3)},
            "layer_norm (other) writes into the stream",
        ),
        (
            lambda m, x: m.norm(m.linear(x) + x).tanh(),
            {"norm": norm_of()},
            "not all that it reads is written by weights",
        ),
        (
            lambda m, x: torch.tanh(m.norm(m.linear(x)) + m.linear(x * 2)),
            {"norm": norm_of()},
            "has another reader",
        ),
    ],
    ids=["relu", "heads", "a norm writes", "input", "shared weight"],
)
def test_center_refuses(
    function: Any, parts: dict[str, nn.Module], reason: str, formula: Any, captured: Any
) -> None:
    module = formula(function, linear=nn.Linear(WIDTH, WIDTH), **parts)
    program = captured(module, X)
    after = folded(program, module, X, center=True)
    assert len(calls(after, "layer_norm")) == len(calls(program, "layer_norm"))
    assert any(reason in r.reason for r in after.history[-1].refusals), after.history[-1].refusals


def test_tied_head_is_not_touched(tiny: Callable[[str], Any]) -> None:
    """The output head of a tied model cannot take γ: the embedding reads the same matrix."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(11, WIDTH), norm_of()
            self.head = nn.Linear(WIDTH, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.table(ids)))

    from qcompiler.passes.normalize import normalize
    from qcompiler.program import capture

    module = Tied()
    program = normalize(capture(module, (IDS,)))
    assert "the weight of linear (head) has another reader" in refused(program, module, IDS)


def test_golden(captured: Any, golden_pair: Callable[[str, Program, Program], None]) -> None:
    program = captured(Stream(norm_of(), nn.RMSNorm(WIDTH)), IDS)
    with torch.no_grad():
        golden_pair("fold_norm", program, fold_norm(program))
        module = Stream(norm_of(), norm_of(bias=False))
        program = captured(module, IDS)
        golden_pair("fold_norm-center", program, fold_norm(program, center=True))
