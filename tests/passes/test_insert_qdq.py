"""insert_qdq, correct_bias and pack_weights: from a plan to integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler import ops
from qcompiler.errors import RewriteError
from qcompiler.passes.correct_bias import correct_bias, measure_bias
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.pack_weights import pack_weights
from qcompiler.plan import Assignment, Plan, Site
from qcompiler.program import Program
from qcompiler.qtype import QType
from qcompiler.testing import check_contract

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
LOW, HIGH = -2.5, 3.0


def plan_of(*entries: tuple[str, int, str] | tuple[str, int, str, float, float]) -> Plan:
    return Plan({Site(n, o): Assignment(QType.parse(q), *r) for n, o, q, *r in entries})


def quantized(program: Program, plan: Plan, *inputs: Tensor) -> Program:
    return check_contract(insert_qdq, program, [inputs], idempotent=False, plan=plan)


def rounded(x: Tensor, low: float, high: float) -> np.ndarray:
    """uint8, affine, in float64: s = (high − low)/255, z = round(−low/s), x̂ = s (clip(…) − z)."""
    scale = np.float64(np.float32((high - low) / 255))
    zero = np.rint(-low / scale)
    # The division is done in float32, as QuantizeLinear does it.
    q = np.clip(np.rint(x.numpy() / np.float32(scale)).astype(np.float64) + zero, 0, 255)
    return (q - zero) * scale


def rounded_weight(w: Tensor, qmax: int, axes: int | None) -> np.ndarray:
    """Symmetric: s = max|w| / qmax over `axes`."""
    values = w.detach().numpy()
    scale = np.abs(values).max(axis=axes, keepdims=axes is not None) / np.float32(qmax)
    return np.rint(values / scale).astype(np.float64) * scale


def test_linear(captured: Any) -> None:
    linear = nn.Linear(16, 5)
    program = captured(linear, X)
    plan = plan_of(("linear", 0, "uint8:tensor:affine", LOW, HIGH), ("linear", 1, "int8:channel"))
    after = quantized(program, plan, X)
    (got,) = after.run((X,))
    w, b = rounded_weight(linear.weight, 127, 1), linear.bias.detach().double().numpy()
    expected = rounded(X, LOW, HIGH) @ w.T + b
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-6)
    assert after.history[-1].notes == ("2 sites quantized",)


@pytest.mark.parametrize("kind", ["int4:g8", "uint4:g4:affine", "int8:tensor", "int2:g16"])
def test_weights_alone(kind: str, captured: Any) -> None:
    linear = nn.Linear(16, 5)
    after = quantized(captured(linear, X), plan_of(("linear", 1, kind)), X)
    qtype = QType.parse(kind)
    weight = linear.weight.detach().double().numpy()
    blocks = weight.reshape(5, -1, qtype.group) if qtype.group else weight.reshape(1, 1, -1)
    if qtype.symmetric:
        scale = np.abs(blocks).max(-1, keepdims=True) / qtype.qmax
        back = np.clip(np.rint(blocks / scale), qtype.qmin, qtype.qmax) * scale
    else:
        low = np.minimum(blocks.min(-1, keepdims=True), 0)
        scale = (np.maximum(blocks.max(-1, keepdims=True), 0) - low) / 15
        zero = np.rint(-low / scale)
        back = (np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale
    expected = X.double().numpy() @ back.reshape(5, 16).T + linear.bias.detach().double().numpy()
    np.testing.assert_allclose(after.run((X,))[0].numpy(), expected, rtol=0, atol=3e-6)
    packed = check_contract(pack_weights, after, [(X,)])
    assert torch.equal(packed.run((X,))[0], after.run((X,))[0])


def test_dynamic_ranges_are_those_of_the_batch(captured: Any) -> None:
    linear = nn.Linear(16, 5)
    plan = plan_of(("linear", 0, "uint8:tensor:affine:dynamic"), ("linear", 1, "int8:channel"))
    after = quantized(captured(linear, X), plan, X)
    w, b = rounded_weight(linear.weight, 127, 1), linear.bias.detach().double().numpy()
    for x in (X, X * 100, X.abs()):
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        expected = rounded(x, low, high) @ w.T + b
        got = after.run((x,))[0].numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_readers_of_one_value_share_a_pair_where_their_format_is_one(
    tiny: Callable[[str], Any],
) -> None:
    model = tiny("tiny-norm-linear")

    def pairs(*entries: Any) -> int:
        after = quantized(model.normalized, plan_of(*entries), *model.held_out[0])
        return sum(n.target is ops.quantize for n in after.exported.graph.nodes)

    kind = "uint8:tensor:affine"
    assert pairs(("linear", 0, kind, LOW, HIGH), ("linear_1", 0, kind, LOW, HIGH)) == 1
    assert pairs(("linear", 0, kind, LOW, HIGH), ("linear_1", 0, kind, LOW, 2.0)) == 2


def test_a_value_quantized_where_it_is_made_serves_all_readers(formula: Any, captured: Any) -> None:
    module = formula(lambda m, x: (lambda h: h + h.exp())(torch.tanh(x)))  # noqa: PLC3002 - short
    program = captured(module, X)
    after = quantized(program, plan_of(("tanh", -1, "uint8:tensor:affine", -1.0, 1.0)), X)
    h = rounded(torch.tanh(X), -1.0, 1.0)
    np.testing.assert_allclose(after.run((X,))[0].numpy(), h + np.exp(h), rtol=1e-6, atol=1e-6)


def test_embedding_rows_are_looked_up_as_integers(tiny: Callable[[str], Any]) -> None:
    model = tiny("tiny-post-norm-block")
    after = quantized(
        model.normalized, plan_of(("embedding", 0, "int8:channel")), *model.batches[0]
    )
    ids, _ = model.batches[0]
    seen: dict[str, Tensor] = {}
    after.run(model.batches[0], lambda node, value: seen.__setitem__(node.name, value))
    table = rounded_weight(model.spec.module.embedding.weight, 127, 1)
    rows = next(v for k, v in seen.items() if k.startswith("dequantize") and v.ndim == 3)
    np.testing.assert_allclose(rows.numpy(), table[ids.numpy()], rtol=0, atol=1e-6)
    # The whole table is never dequantized: what is gathered are integers.
    gathers = [n for n in after.exported.graph.nodes if "aten.embedding" in str(n.target)]
    assert [n.meta["val"].dtype for n in gathers] == [torch.int8, torch.float32]
    packed = pack_weights(after)
    constants = packed.constants().values()
    assert [v.dtype for v in constants if v.shape == (64, 32)] == [torch.float32, torch.int8]
    weight = model.spec.module.embedding.weight
    assert not any(v.shape == weight.shape and torch.equal(v, weight) for v in constants)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_with_an_integer_bias(groups: int, bias: bool, captured: Any) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=bias)
    x = torch.randn(2, 4, 6, 6)
    plan = plan_of(
        ("conv2d", -1, "uint8:tensor:affine", -3.0, 3.0),
        ("conv2d", 0, "uint8:tensor:affine", LOW, HIGH),
        ("conv2d", 1, "int8:channel"),
    )
    after = quantized(captured(conv, x), plan, x)
    values = conv.weight.detach().numpy()
    scale = np.abs(values).max((1, 2, 3)) / np.float32(127)
    weight = np.rint(values / scale[:, None, None, None]) * scale[:, None, None, None]
    inputs = rounded(x, LOW, HIGH)
    step = np.float32((HIGH - LOW) / 255) * scale
    shift = None
    if bias:
        assert conv.bias is not None
        # b̂ = round(b / (s_x s_w)) · s_x s_w: the accumulator's own grid
        shift = torch.from_numpy(np.rint(conv.bias.detach().double().numpy() / step) * step)
        constants = pack_weights(after).constants()
        assert [v.dtype for k, v in constants.items() if "int32" in k] == [torch.int32]
    expected = F.conv2d(
        torch.from_numpy(inputs),
        torch.from_numpy(weight).double(),
        shift.double() if shift is not None else None,
        padding=1,
        groups=groups,
    )
    expected = rounded(expected.float(), -3.0, 3.0)
    got = after.run((x,))[0].double().numpy()
    # A sum at the middle of a step may fall on either side.
    assert (np.abs(got - expected) > 1e-5).mean() < 1e-3
    assert np.abs(got - expected).max() < 1.01 * 6 / 255


def test_a_plan_for_another_program_is_refused(captured: Any) -> None:
    program = captured(nn.Linear(16, 5), X)
    with pytest.raises(RewriteError, match=r"insert_qdq.*'conv2d_7', which the program does not"):
        insert_qdq(program, plan_of(("conv2d_7", 1, "int8:channel")))


def test_an_empty_plan_changes_nothing(captured: Any) -> None:
    program = captured(nn.Linear(16, 5), X)
    assert insert_qdq(program, Plan()).exported is program.exported
    assert pack_weights(program).exported is program.exported


def coarse(linear: nn.Linear, x: Tensor, captured: Any, kind: str = "int8:tensor") -> Any:
    """A linear quantized so coarsely that its error has a mean, and that mean."""
    program = captured(linear, x)
    plan = plan_of(("linear", 0, "uint8:tensor:affine", -1.0, 1.0), ("linear", 1, kind))
    after = quantized(program, plan, x)
    return after, measure_bias(program, after, [(x,)])


def test_bias_correction_takes_the_mean_error_out(captured: Any) -> None:
    """B' = b + E[x Wᵀ] − E[x̂ Ŵᵀ] over the calibration rows, in numpy."""
    linear = nn.Linear(16, 5)
    x = X * 2 + 0.7  # much is clipped at 1
    program, seen = coarse(linear, x, captured)
    after = check_contract(correct_bias, program, [(x,)], idempotent=False, shifts=seen)
    assert after.history[-1].notes == ("1 biases corrected",)
    rows = x.reshape(-1, 16)
    w = linear.weight.detach()
    exact = rows.double().numpy() @ w.double().numpy().T
    noisy = rounded(rows, -1.0, 1.0) @ rounded_weight(w, 127, None).T
    expected = linear.bias.detach().double().numpy() + (exact - noisy).mean(0)
    (node,) = [n for n in after.exported.graph.nodes if str(n.target) == "aten.linear.default"]
    np.testing.assert_allclose(after.constants()[node.args[2].name].numpy(), expected, rtol=1e-4)

    def mean_error(candidate: Program) -> np.ndarray:
        got = candidate.run((x,))[0].double().reshape(-1, 5).numpy()
        return (got - exact - linear.bias.detach().double().numpy()).mean(0)

    assert np.abs(mean_error(program)).max() > 0.05
    np.testing.assert_allclose(mean_error(after), 0, atol=1e-5)


def test_bias_correction_of_dynamic_and_weight_only_linears(captured: Any) -> None:
    x = X + 1
    for plan in (
        plan_of(("linear", 0, "uint8:tensor:affine:dynamic"), ("linear", 1, "int4:g16")),
        plan_of(("linear", 1, "int2:g16")),
    ):
        linear = nn.Linear(16, 5)
        program = captured(linear, x)
        before = quantized(program, plan, x)
        after = correct_bias(before, measure_bias(program, before, [(x,)]))
        want = program.run((x,))[0].mean((0, 1))
        old, new = (float((p.run((x,))[0].mean((0, 1)) - want).norm()) for p in (before, after))
        assert new < 0.02 * old


def test_bias_correction_refuses_a_bias_that_is_computed(captured: Any) -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, x.mean((0, 1))[:5])

    program, seen = coarse(Shifted(16, 5), X, captured)
    after = correct_bias(program, seen)
    assert after.exported is program.exported
    assert [refusal.reason for refusal in after.history[-1].refusals] == ["its bias is computed"]


def test_bias_correction_leaves_the_rest_alone(captured: Any) -> None:
    bare = nn.Linear(16, 5, bias=False)
    program, seen = coarse(bare, X, captured)
    assert correct_bias(program, seen).exported is program.exported
    program, _ = coarse(nn.Linear(16, 5), X, captured)
    assert correct_bias(program, {}).exported is program.exported
    plain = captured(nn.Linear(16, 5), X)
    assert correct_bias(plain, measure_bias(plain, plain, [(X,)])).exported is plain.exported


def test_bias_correction_is_sequential_and_reaches_convolutions(captured: Any) -> None:
    """Each mean is right given the corrected layers before; int32 biases move by steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(8, 3, 9, 9) + 0.5
    program = captured(model, x)
    plan = plan_of(
        ("conv2d", 0, "uint8:tensor:affine", -1.0, 2.0),
        ("conv2d", 1, "int4:channel"),
        ("relu", -1, "uint8:tensor:affine", 0.0, 1.5),
        ("conv2d_1", 1, "int4:channel"),
        ("conv2d_1", -1, "uint8:tensor:affine", -4.0, 4.0),
    )
    before = insert_qdq(program, plan)
    after = correct_bias(before, measure_bias(program, before, [(x[:4],), (x[4:],)]))
    assert after.history[-1].notes == ("2 biases corrected",)

    def means(candidate: Program) -> dict[str, Tensor]:
        found = {}

        def watch(node: Any, value: Any) -> None:
            if node.name in ("conv2d", "conv2d_1"):
                found[node.name] = value.mean((0, 2, 3))

        candidate.run((x,), watch)
        return found

    want, old, new = means(program), means(before), means(after)
    for name in want:
        assert float((old[name] - want[name]).abs().max()) > 0.02
        torch.testing.assert_close(new[name], want[name], rtol=0, atol=2e-3)


def test_the_bias_of_a_dead_filter_fits_into_int32(captured: Any) -> None:
    """Weights of 1e-10 with a bias of 1: s_x · s_w alone would need 10^12 steps."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight[1] *= 1e-9
        conv.bias[1] = 1.2
    x = torch.randn(2, 3, 6, 6)
    plan = plan_of(
        ("conv2d", 0, "uint8:tensor:affine", -4.0, 4.0),
        ("conv2d", 1, "int8:channel"),
        ("conv2d", -1, "uint8:tensor:affine", -4.0, 4.0),
    )
    got = insert_qdq(captured(conv, x), plan).run((x,))[0]
    error = (got - conv(x).detach()).abs().amax((0, 2, 3))
    assert float(error.max()) < 0.06
    assert float(error[1]) < 8.0 / 255  # one step of the output


@pytest.mark.parametrize(
    ("kind", "size"), [("int8:channel", 80), ("int4:g8", 40), ("uint2:g8:affine", 20)]
)
def test_packed_bytes(kind: str, size: int, captured: Any) -> None:
    linear = nn.Linear(16, 5)
    program = quantized(captured(linear, X), plan_of(("linear", 1, kind)), X)
    packed = check_contract(pack_weights, program, [(X,)])
    largest = max(packed.constants().values(), key=torch.numel)
    assert largest.numel() * largest.element_size() == size
    assert all(v.shape != linear.weight.shape or v.dtype != torch.float32
               for v in packed.constants().values())  # fmt: skip
    assert packed.history[-1].notes == ("0.0 MB of weights became 0.0 MB",)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 8)
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, 0, 0] > 0).long()
        return self.linear(self.conv(x).mean((2, 3))[:, None] + self.table(ids))


def test_golden(captured: Any, golden_pair: Callable[[str, Program, Program], None]) -> None:
    program = captured(Small(), torch.randn(2, 3, 5, 5))
    plan = plan_of(
        ("conv2d", -1, "uint8:tensor:affine", -3.0, 3.0),
        ("conv2d", 0, "uint8:tensor:affine", -3.0, 3.0),
        ("conv2d", 1, "int8:channel"),
        ("embedding", 0, "int8:channel"),
        ("linear", 0, "uint8:tensor:affine:dynamic"),
        ("linear", 1, "int4:g4"),
    )
    after = insert_qdq(program, plan)
    golden_pair("insert_qdq", program, after)
    golden_pair("pack_weights", after, pack_weights(after))
    shifts = measure_bias(program, after, [(torch.randn(2, 3, 5, 5),)])
    golden_pair("correct_bias", after, correct_bias(after, shifts))
