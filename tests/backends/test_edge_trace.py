"""Programs as ops on memory: views, constants, decompositions, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import ops
from qcompiler.backends.edge_ops import Ref, Storage, Trace, dense_order
from qcompiler.backends.edge_trace import trace
from qcompiler.errors import UnsupportedError
from qcompiler.program import Program, capture

aten = torch.ops.aten


class Formula(nn.Module):
    def __init__(self, formula: Callable[..., Any]) -> None:
        super().__init__()
        self.formula = formula
        self.table = nn.Parameter(torch.arange(12.0).reshape(3, 4))

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def traced(formula: Callable[..., Any], x: Tensor) -> Trace:
    program = capture(Formula(formula).eval(), (x,), {})
    return trace(program, {name: tuple(x.shape) for name in program.inputs})


def test_views_are_offsets_and_strides() -> None:
    found = traced(lambda m, x: x[:, 1:].transpose(1, 2).unsqueeze(0)[..., 2], torch.ones(2, 4, 5))
    assert not found.ops
    (out,) = found.outputs
    assert out.storage is found.inputs[0].storage
    assert (out.offset, out.shape, out.strides) == (5 + 10, (1, 2, 5), (0, 20, 1))


def test_what_depends_on_constants_alone_is_computed() -> None:
    found = traced(
        lambda m, x: x + (m.table * 2).sum() + torch.arange(x.shape[1]), torch.ones(2, 4)
    )
    assert [op.target for op in found.ops] == [aten.add.Tensor, aten.add.Tensor]
    held = [
        r.storage.constant for op in found.ops for r in op.refs() if r.storage.constant is not None
    ]
    assert [t.flatten().tolist() for t in held] == [[132.0], [0, 1, 2, 3]]


def test_what_depends_on_constants_alone_is_computed_once_for_all_sizes() -> None:
    """So that a weight is unpacked, and packed for its kernels, once."""

    def formula(m: Formula, x: Tensor) -> Tensor:
        q = ops.unpack(torch.ops.aten.view.dtype(m.table, torch.uint8).flatten(), "int4", [24, 4])
        weight = ops.dequantize(q, m.table[0, :1].expand(24), torch.zeros(24).to(torch.int8), 0, 0)
        return torch.nn.functional.linear(x, weight) + torch.arange(x.shape[0])[:, None]

    program = capture(Formula(formula).eval(), (torch.ones(2, 4),), {"x": {0: "rows"}})
    known: dict[str, Any] = {}
    weights, counts = [], []
    for rows in (2, 5):
        linear, add = trace(program, {"x": (rows, 4)}, known=known).ops
        weights.append(linear.args[1].storage.weight)
        counts.append(add.args[1].storage.constant.numel())
    assert weights[0].q is weights[1].q
    assert counts == [2, 5]


def test_unknown_ops_are_decomposed() -> None:
    found = traced(lambda m, x: torch.nn.functional.softsign(x), torch.ones(2, 4))
    assert {op.target for op in found.ops} == {aten.abs.default, aten.add.Tensor, aten.div.Tensor}


def test_readers_and_makers() -> None:
    found = traced(lambda m, x: (x.exp() + 1) * x, torch.ones(2, 4))
    exp, add, mul = found.ops
    assert exp.out.storage.maker is exp
    assert exp.out.storage.readers == [add]
    assert found.inputs[0].storage.readers == [exp, mul]
    assert found.inputs[0].storage.port


def test_convolutions_run_channels_last() -> None:
    module = nn.Conv2d(3, 8, 3).eval()
    x = torch.ones(2, 3, 6, 6)
    program = capture(module, (x,), {})
    found = trace(program, {program.inputs[0]: x.shape})
    assert [op.target for op in found.ops] == [aten.clone.default, aten.conv2d.default]
    assert dense_order(found.ops[1].out) == (0, 2, 3, 1)


def test_quantized_weights_stay_integers() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.ones(4, 6, dtype=torch.int8))
            self.register_buffer("scale", torch.full((4,), 0.5))
            self.register_buffer("zero", torch.zeros(4, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            weight = ops.dequantize(self.q, self.scale, self.zero, 0, 0)
            return torch.nn.functional.linear(x, weight)

    x = torch.ones(2, 6)
    program = capture(Layer(), (x,), {})
    (linear,) = trace(program, {program.inputs[0]: x.shape}).ops
    weight = linear.args[1].storage.weight
    assert weight is not None
    assert weight.q.dtype == torch.int8
    assert torch.equal(weight.dequantized(), torch.full((4, 6), 0.5))


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        (lambda m, x: x.median(-1)[0], "does not know 'aten.median.dim'"),
        (lambda m, x: x.erfinv(), "does not know 'prims.erf_inv"),
        # torch's own formula of it is itself.
        (lambda m, x: x.lgamma(), "does not know 'aten.lgamma.default'"),
        (lambda m, x: torch.fft.rfft(x).abs(), "does not know 'aten._fft_r2c"),
    ],
)
def test_refusals_name_the_op_and_the_line(formula: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said) as caught:
        traced(formula, torch.ones(2, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "strides", "order"),
    [
        ((2, 3, 4), (12, 4, 1), (0, 1, 2)),
        ((2, 3, 4), (12, 1, 3), (0, 2, 1)),
        ((2, 1, 4), (4, 0, 1), (0, 1, 2)),
        ((2, 3, 4), (24, 4, 1), None),
        ((2, 3), (0, 1), None),
    ],
)
def test_dense_order(shape: Any, strides: Any, order: Any) -> None:
    assert dense_order(Ref(Storage(torch.float32, 24), torch.float32, 0, shape, strides)) == order


def test_sizes_are_those_asked_for(tiny: Callable[[str], Any]) -> None:
    program: Program = tiny("tiny-mlp").captured
    assert trace(program, {"x": (7, 32)}).outputs[0].shape == (7, 10)
    with pytest.raises(UnsupportedError):
        trace(program, {"x": (7, 31)})
