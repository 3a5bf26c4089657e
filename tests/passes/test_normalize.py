"""normalize: one form for everything that can be spelled in several ways."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.errors import UnsupportedError
from qcompiler.passes.normalize import normalize
from qcompiler.program import Program, capture

SEED = torch.Generator().manual_seed(0)
X = torch.randn(3, 5, 8, generator=SEED)
WEIGHT = torch.rand(8, generator=SEED) + 0.5
SIGN = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0)


def close_to_eager(program: Program, module: nn.Module, x: Tensor, rtol: float = 1e-6) -> None:
    """The program in float64 against the module in float64: only rounded constants may differ."""
    with torch.no_grad():
        expected = copy.deepcopy(module).eval().double()(x.double())
    (got,) = program.run((x.clone(),), double=True)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


RMS = {
    "pow": lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "product": lambda m, x: torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * x * m.w,
    "eps first": lambda m, x: x * torch.rsqrt(1e-5 + torch.mean(x**2, -1, True)) * m.w,
    "quotient": lambda m, x: m.w * (x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)),
    "power": lambda m, x: x * (x.pow(2).mean(2, keepdim=True) + 1e-5).pow(-0.5) * m.w,
    "casts": lambda m, x: m.w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-5)),
    "torch's": lambda m, x: F.rms_norm(x, (8,), m.w, 1e-5),
}


@pytest.mark.parametrize("form", RMS)
def test_rms_norm_is_recognised(
    form: str, formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    module = formula(RMS[form], w=WEIGHT)
    program = captured(module, X)
    assert names(program) == ["rms_norm"]
    (norm,) = (n for n in program.exported.graph.nodes if n.op == "call_function")
    assert list(norm.args[1]) == [8]
    assert norm.args[2].name in program.constants()
    assert norm.args[3] == 1e-5
    x, w = X.double().numpy(), WEIGHT.double().numpy()
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w
    (got,) = program.run((X,), double=True)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_rms_norm_without_weight_and_with_one_plus_weight(
    formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    bare = formula(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    program = captured(bare, X)
    assert names(program) == ["rms_norm"]
    close_to_eager(program, bare, X)
    gemma = formula(
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.w),
        w=WEIGHT,
    )
    program = captured(gemma, X)
    assert names(program) == ["rms_norm"]
    close_to_eager(program, gemma, X)


@pytest.mark.parametrize(
    "other",
    [
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),
        lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),
        lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5),
        lambda m, x: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda m, x: torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) / x,
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 1e-5),
    ],
    ids=["other axis", "sum", "fourth power", "other value", "inverse", "minus"],
)
def test_what_only_looks_like_a_rms_norm_stays(
    other: Any, formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    module = formula(other)
    program = captured(module, X)
    assert "rms_norm" not in names(program)
    close_to_eager(program, module, X)


def test_a_scaled_rms_norm_that_is_read_twice_keeps_its_product(
    formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return scaled * m.w + scaled

    module = formula(function, w=WEIGHT)
    program = captured(module, X)
    assert names(program) == ["rms_norm", "mul", "add"]
    close_to_eager(program, module, X)


ROOT = math.sqrt(2.0 / math.pi)
ACTIVATIONS = {
    "x·½·(1+erf(x/√2))": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "(erf(x·c)+1)·(x/2)": ("gelu", lambda x: (torch.erf(x * 0.7071067811865476) + 1) * (x / 2)),
    "½·erfc(−x/√2)·x": ("gelu", lambda x: 0.5 * torch.erfc(-x / math.sqrt(2.0)) * x),
    "tanh, power": (
        "tanh",
        lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    "tanh, products": (
        "tanh",
        lambda x: (1 + torch.tanh((0.044715 * x * x + 1) * x * 0.7978845608)) * x * 0.5,
    ),
    "tanh as sigmoid": ("tanh", lambda x: x * torch.sigmoid(2 * ROOT * (x + 0.044715 * x**3))),
    "x·σ(x)": ("silu", lambda x: x * torch.sigmoid(x)),
    "σ(x)·x": ("silu", lambda x: torch.sigmoid(x) * x),
    "x/(1+e⁻ˣ)": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "x·(1+e⁻ˣ)⁻¹": ("silu", lambda x: torch.reciprocal(torch.exp(-x) + 1) * x),
}


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations_are_recognised(
    form: str, formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    kind, function = ACTIVATIONS[form]
    linear = nn.Linear(8, 8)
    module = formula(lambda m, x: function(m.linear(x)), linear=linear)
    program = captured(module, X)
    assert names(program) == ["linear", "silu" if kind == "silu" else "gelu"]
    *_, call = (n for n in program.exported.graph.nodes if n.op == "call_function")
    assert call.kwargs.get("approximate", "none") == ("tanh" if kind == "tanh" else "none")
    close_to_eager(program, module, X)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: x * torch.tanh(F.softplus(x)),
        lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.04 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.erf(x)),
        lambda x: x * torch.sigmoid(-x),
        lambda x: x * torch.sigmoid(x.flip(-1)),
    ],
    ids=["quick gelu", "mish", "other constant", "no root", "other sign", "other value"],
)
def test_other_activations_stay(
    other: Any, formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    module = formula(lambda m, x: other(x))
    program = captured(module, X)
    assert not {"gelu", "silu"} & set(names(program))
    close_to_eager(program, module, X)


def test_a_sigmoid_with_another_reader_is_kept_for_it(
    formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate

    module = formula(function)
    program = captured(module, X)
    assert sorted(names(program)) == ["add", "sigmoid", "silu"]
    close_to_eager(program, module, X)


LINEARS = {
    "gpt2": lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.w).view(3, 5, 6),
    "addmm of a matrix": lambda m, x: torch.addmm(m.b, x[0], m.w),
    "mm": lambda m, x: torch.mm(x[1], m.w),
    "matmul": lambda m, x: torch.matmul(x, m.w),
    "transposed": lambda m, x: x @ m.v.t(),
    "matmul and add": lambda m, x: x @ m.w + m.b,
}


@pytest.mark.parametrize("form", LINEARS)
def test_products_with_a_constant_matrix_become_linear(
    form: str, formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    parts = {"w": torch.randn(8, 6), "b": torch.randn(6), "v": torch.randn(6, 8)}
    module = formula(LINEARS[form], **parts)
    program = captured(module, X)
    found = names(program)
    assert "linear" in found
    assert not {"addmm", "mm", "matmul", "t"} & set(found)
    close_to_eager(program, module, X)


def test_products_of_activations_and_scaled_addmm_stay(
    formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    module = formula(lambda m, x: x @ x.transpose(1, 2))
    assert "linear" not in names(captured(module, X))
    module = formula(
        lambda m, x: torch.addmm(m.b, x[0], m.w, beta=0.5), w=torch.randn(8, 6), b=torch.randn(6)
    )
    program = captured(module, X)
    assert "linear" not in names(program)
    close_to_eager(program, module, X)


def trained(norm: nn.Module) -> Any:
    """Statistics and parameters as after training."""
    norm.running_mean.normal_()  # type: ignore[operator,union-attr]
    norm.running_var.uniform_(0.2, 3.0)  # type: ignore[operator,union-attr]
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, -2.0, 2.0)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    return norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_batch_norms_fold_into_convolutions(
    bias: bool, affine: bool, groups: int, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=bias)
    norm = trained(nn.BatchNorm2d(8, affine=affine, eps=1e-3))
    module = nn.Sequential(conv, norm)
    x = torch.randn(2, 4, 6, 6)
    program = captured(module, x)
    assert names(program) == ["conv2d"]
    close_to_eager(program, module, x)

    # W' = W·γ/√(σ²+ε),  b' = (b−μ)·γ/√(σ²+ε) + β  (the docstring's formula, in numpy)
    (node,) = (n for n in program.exported.graph.nodes if n.op == "call_function")
    constants = program.constants()

    def value(tensor: Tensor | None, default: float) -> np.ndarray:
        if tensor is None:
            return np.full(8, default)
        return tensor.detach().double().numpy()

    factor = value(norm.weight, 1.0) / np.sqrt(value(norm.running_var, 1.0) + 1e-3)
    weight = conv.weight.detach().double().numpy() * factor[:, None, None, None]
    shift = (value(conv.bias, 0.0) - value(norm.running_mean, 0.0)) * factor
    np.testing.assert_allclose(constants[node.args[1].name].numpy(), weight, rtol=1e-6)
    np.testing.assert_allclose(
        constants[node.args[2].name].numpy(), shift + value(norm.bias, 0.0), rtol=1e-6, atol=1e-7
    )


PADDED = (torch.ops.aten.conv1d.padding, torch.ops.aten.conv2d.padding)


def test_batch_norms_fold_in_one_dimension_and_with_padding_by_name(
    captured: Any, names: Callable[[Program], list[str]]
) -> None:
    torch.manual_seed(2)
    one = nn.Sequential(nn.Conv1d(4, 6, 3, padding="same"), trained(nn.BatchNorm1d(6)))
    two = nn.Sequential(nn.Conv2d(4, 6, 3, padding="valid"), trained(nn.BatchNorm2d(6)))
    for module, x in ((one, torch.randn(2, 4, 9)), (two, torch.randn(2, 4, 9, 9))):
        program = captured(module, x)
        assert "batch_norm" not in names(program)
        close_to_eager(program, module, x)


@pytest.mark.parametrize("kernel", [3, 4, (2, 5)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_paddings_by_name_become_numbers(
    kernel: Any, padding: str, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    two = nn.Conv2d(4, 6, kernel, padding=padding, dilation=(1, 3), groups=2)
    one = nn.Conv1d(4, 6, kernel if kernel != (2, 5) else 2, padding=padding, bias=False)
    for module, x in ((one, torch.randn(2, 4, 9)), (two, torch.randn(2, 4, 11, 17))):
        program = captured(module, x)
        assert all(node.target not in PADDED for node in program.exported.graph.nodes)
        close_to_eager(program, module, x)


def test_batch_norms_that_cannot_fold_are_refused(
    formula: Any, captured: Any, reasons: Callable[[Program], list[str]]
) -> None:
    x = torch.randn(2, 4, 6, 6)
    alone = nn.Sequential(nn.ReLU(), trained(nn.BatchNorm2d(4)))
    program = captured(alone, x)
    alone_reason = "no convolution feeds this batch normalization alone"
    assert reasons(program) == [f"batch_norm (1): {alone_reason}"]
    close_to_eager(program, alone, x)

    def beside(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norm(y) + y

    read_twice = formula(
        beside,
        conv=nn.Conv2d(4, 4, 1),
        norm=trained(nn.BatchNorm2d(4)),
    )
    program = captured(read_twice, x)
    assert reasons(program)[0].endswith(alone_reason)
    close_to_eager(program, read_twice, x)

    shared = formula(
        lambda m, x: m.conv(m.norm(m.conv(x))),
        conv=nn.Conv2d(4, 4, 1),
        norm=trained(nn.BatchNorm2d(4)),
    )
    program = captured(shared, x)
    assert reasons(program)[0].endswith("weight is computed or has another reader")
    close_to_eager(program, shared, x)

    untracked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    program = captured(untracked, x)
    assert "training mode" in reasons(program)[0]
    close_to_eager(program, untracked, x)


def read_before(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    doubled = h * 2
    return h.relu_() + doubled


def read_after(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h.relu_()
    return h + 1


def part(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h[:, 0].zero_()
    return h


def parts_of_parts(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h[1:, :, ::2] *= 2
    h[0, 1] = h[1, 0] + 1
    h[:, -1].relu_()
    h[:, 2] = torch.ones((), dtype=torch.int64)
    h[:, 3, 1:] = x[:, :1, 0].double()
    return h.transpose(0, 1)[1:] + h[:, 0].sum()


def a_part_twice(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    first = h[:, 0]
    first += 1
    first *= 2
    several = h[:, 1:4, 2:5]
    several[:, 1] = 3
    several -= 1
    counts = torch.arange(4, dtype=torch.int32)
    counts += torch.arange(4)
    return h + counts.sum()


def diagonal(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h[0].diagonal().zero_()
    return h


def a_part_seen_otherwise(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    other = h[1:]
    h[:, 0].zero_()
    return other


def view_of_it(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    view = h.reshape(15, 8)
    h.relu_()
    return view


def base_of_it(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    h.transpose(0, 1).relu_()
    return h * 2


IN_PLACE = {
    "relu_": lambda m, x: m.linear(x).relu_() + 1,
    "functional": lambda m, x: F.relu(m.linear(x), inplace=True) + F.silu(m.linear(x), True),
    "of a view": lambda m, x: m.linear(x).view(15, 8).relu_() + 1,
    "after dropout": lambda m, x: F.relu(F.dropout(m.linear(x), 0.5, m.training), inplace=True),
    "chain": lambda m, x: m.linear(x).add_(1).mul_(2).clamp_(min=0),
    "of the input": lambda m, x: x.relu_() + 1,
    "read before": read_before,
    "read after": read_after,
    "a part": part,
    "parts of parts": parts_of_parts,
    "a part twice": a_part_twice,
}


@pytest.mark.parametrize("form", IN_PLACE)
def test_in_place_ops_become_functional(form: str, formula: Any, captured: Any) -> None:
    module = formula(IN_PLACE[form], linear=nn.Linear(8, 8))
    program = captured(module, X.clone())
    for node in program.exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node
    close_to_eager(program, module, X)


def test_a_run_leaves_its_inputs_as_they_were(formula: Any) -> None:
    program = capture(formula(IN_PLACE["of the input"], linear=nn.Linear(8, 8)), (X.clone(),))
    given = X.clone()
    for double in (False, True):
        program.run((given,), double=double)
        assert torch.equal(given, X)


def test_a_state_that_is_kept_is_refused() -> None:
    module = nn.BatchNorm1d(8)
    module.forward = lambda x: x + module.running_mean[:4].add_(1).sum()
    with pytest.raises(UnsupportedError, match="would keep for its next call"):
        normalize(capture(module, (torch.randn(4, 8),)))


@pytest.mark.parametrize("function", [a_part_seen_otherwise, view_of_it, base_of_it, diagonal])
def test_writing_into_memory_that_another_value_shares_is_refused(
    function: Any, formula: Any
) -> None:
    program = capture(formula(function, linear=nn.Linear(8, 8)), (X.clone(),))
    with pytest.raises(UnsupportedError, match=r"^normalize: .*use the out-of-place operation"):
        normalize(program)


class Wasteful(nn.Module):
    """Everything that does nothing in eval mode, and constants that can be computed now."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.3)
        self.register_buffer("table", torch.arange(16.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x.contiguous()).to(torch.float32)
        x = (x + 0) * 1
        x = x.view(x.shape)[:, :, :].squeeze(-1)
        return self.linear(x.clone()) + (self.table.reshape(2, 8) * 2).sum(0)


def test_no_ops_go_and_constants_are_computed(
    captured: Any, names: Callable[[Program], list[str]]
) -> None:
    module = Wasteful()
    program = captured(module, X)
    assert names(program) == ["linear", "add"]
    with torch.no_grad():
        torch.testing.assert_close(program.run((X,))[0], module(X), rtol=0, atol=0)
    shapes = {name: tuple(value.shape) for name, value in program.constants().items()}
    assert sorted(shapes.values()) == [(8,), (8,), (8, 8)]


def test_parts_of_a_constant_are_constants(
    formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    def split(m: Any, x: Tensor) -> Tensor:
        first, second = torch.cat([m.one.bias, m.two.bias]).chunk(2)
        return F.linear(F.linear(x, m.one.weight, first), m.two.weight, second)

    module = formula(split, one=nn.Linear(8, 8), two=nn.Linear(8, 8))
    program = captured(module, X)
    assert names(program) == ["linear", "linear"]
    close_to_eager(program, module, X)


def test_views_outlive_the_copy_that_made_them_possible() -> None:
    """A view of what was made contiguous becomes a reshape when the copy goes."""

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x.transpose(1, 2).contiguous()).view(3, 40)

    module = Turned()
    program = normalize(capture(module, (X,), {}))
    assert "contiguous" not in str(program)
    close_to_eager(program, module, X)


def test_assertions_and_dropout_go_with_dynamic_sizes(
    names: Callable[[Program], list[str]],
) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Flatten(1, -1))
    program = normalize(capture(module, (torch.randn(4, 8),), {"input": {0: "batch"}}))
    assert names(program) == ["linear"]
    for batch in (1, 7):
        x = torch.randn(batch, 8)
        with torch.no_grad():
            torch.testing.assert_close(program.run((x,))[0], module(x), rtol=0, atol=0)


def test_half_precision_casts_stay(
    formula: Any, captured: Any, names: Callable[[Program], list[str]]
) -> None:
    module = formula(lambda m, x: x.to(torch.float16).to(torch.float32))
    program = captured(module, X)
    assert names(program) == ["to", "to"]
    assert torch.equal(program.run((X,))[0], X.half().float())


class Sampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1, bias=False)
        self.norm = trained(nn.BatchNorm2d(3))
        self.weight = nn.Parameter(torch.rand(4))
        self.project = nn.Parameter(torch.rand(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.dropout(x, 0.1, self.training)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        x = x @ self.project
        return x * torch.sigmoid(x)


def test_golden(golden_pair: Callable[[str, Program, Program], None]) -> None:
    program = capture(Sampler(), (torch.randn(2, 2, 4, 4),), {"x": {0: "batch"}})
    golden_pair("normalize", program, normalize(program))
