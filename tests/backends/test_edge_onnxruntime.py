"""The integers of generated code beside ONNX Runtime's, where it defines the same operation.

Both get the same quantized tensors. An accumulator below 2²⁴ is the float32 number that a layer
with scales of 1 returns; scales that are powers of two leave nothing but one rounding in a
requantized output, ties included. Shapes have tails in every dimension.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler import ops
from qcompiler.backends import edge
from qcompiler.backends.edge_target import host_family, machine
from qcompiler.program import capture
from qcompiler.target import Target

M, N, K = 21, 53, 131  # no multiple of any kernel's tile
POINT, STEP = 113, 2.0**-5
TARGETS = (
    "tvm:x86-64", "tvm:x86-64-v3", "tvm:x86-64:avx512vnni", "tvm:aarch64:dotprod",
    "tvm:aarch64:i8mm",
)  # fmt: skip
CONVS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "dense": ((19, 13, 3, 3), {"stride": 2, "padding": 1}),
    "points": ((19, 13, 1, 1), {}),
    "depthwise": ((13, 1, 3, 3), {"padding": 1, "groups": 13}),
    "dilated": ((7, 13, 3, 3), {"dilation": 2, "padding": 2}),
}


def drawn(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """Integers, half of them at the ends of their range, where saturation would show."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high, shape, generator=generator)
    end = torch.randint(0, 4, shape, generator=generator)
    return torch.where(end == 0, low, torch.where(end == 1, high - 1, values))


def coarse(q: Tensor, point: int = 0) -> Tensor:
    """Every second row multiples of 16 from `point` on, so that half of their products are ties."""
    made = q.clone()
    made[::2] = q[::2] // 16 * 16 + point % 16
    return made


def runtime(
    op: str, inputs: dict[str, Tensor], outputs: dict[str, int], **attributes: Any
) -> list[Tensor]:
    """One ONNX op as ONNX Runtime computes it, all inputs but the first constant."""
    names = [*inputs]
    kinds = {torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6}
    first = inputs[names[0]]
    graph = helper.make_graph(
        [helper.make_node(op, names, [*outputs], **attributes)], "one",
        [helper.make_tensor_value_info(names[0], kinds[first.dtype], first.shape)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(inputs[name].numpy(), name) for name in names[1:]],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return [torch.from_numpy(np.array(y)) for y in session.run(None, {names[0]: first.numpy()})]


class Integers(nn.Module):
    """Everything that is compared, as one program: floats and quantized tensors in."""

    def __init__(self, linear: Tensor, convolutions: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("step", torch.tensor(STEP))
        self.register_buffer("third", torch.tensor(0.3))
        self.register_buffer("point", torch.tensor(POINT, dtype=torch.uint8))
        self.register_buffer("middle", torch.tensor(0, dtype=torch.int8))
        self.register_buffer("broad", torch.tensor(2.0**9))
        self.register_buffer("linear", linear)
        for name, weight in convolutions.items():
            self.register_buffer(f"conv_{name}", weight)

    def forward(self, x: Tensor, q: Tensor, signed: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        def dequantized(weight: Tensor) -> Tensor:
            scale = self.one.repeat(weight.shape[0])
            zero = self.middle.repeat(weight.shape[0])
            return ops.dequantize(weight, scale, zero, 0, 0)

        weight = dequantized(self.linear)
        sums = nn.functional.linear(ops.dequantize(q, self.one, self.point, 0, 0), weight)
        found = [
            ops.quantize(x, self.step, self.point, 0, 0, 0, 255),
            ops.quantize(x, self.third, self.middle, 0, 0, -128, 127),
            *ops.dynamic_quantize(x, "uint8:tensor:affine:dynamic"),
            sums,
            nn.functional.linear(ops.dequantize(signed, self.one, self.middle, 0, 0), weight),
            ops.quantize(sums, self.broad, self.point, 0, 0, 0, 255),
        ]
        read = ops.dequantize(image, self.one, self.point, 0, 0)
        for name, (_, settings) in CONVS.items():
            filters = dequantized(getattr(self, f"conv_{name}"))
            y = nn.functional.conv2d(read, filters, **settings)
            found += [y, ops.quantize(y, self.broad, self.point, 0, 0, 0, 255)]
        return tuple(found)


def given() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and its inputs; half of the floats are ties of a quantization."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=generator) * 4
    ties = (torch.randint(-160, 160, x.shape, generator=generator) + 0.5) * STEP
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, ties, x)
    convolutions = {
        name: coarse(drawn(20 + i, -128, 128, *shape)).to(torch.int8)
        for i, (name, (shape, _)) in enumerate(CONVS.items())
    }
    module = Integers(coarse(drawn(2, -128, 128, N, K)).to(torch.int8), convolutions)
    quantized = (
        coarse(drawn(3, 0, 256, M, K), POINT).to(torch.uint8),
        drawn(4, -128, 128, M, K).to(torch.int8),
        coarse(drawn(5, 0, 256, 2, 13, 11, 9), POINT).to(torch.uint8),
    )
    return module.eval(), (x, *quantized)


def wanted(module: Any, x: Tensor, q: Tensor, signed: Tensor, image: Tensor) -> dict[str, Tensor]:
    """What ONNX Runtime makes of the same tensors."""
    byte, sbyte, whole, real = (
        TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, TensorProto.FLOAT,
    )  # fmt: skip
    point, middle, one = module.point, module.middle, module.one
    rows = {"w": module.linear.T.contiguous(), "zx": point}
    quantize = {"s": module.step, "z": point}
    dynamic = runtime("DynamicQuantizeLinear", {"x": x}, {"q": byte, "s": real, "z": byte})
    found = {
        "quantized": runtime("QuantizeLinear", {"x": x, **quantize}, {"y": byte})[0],
        "quantized, signed": runtime(
            "QuantizeLinear", {"x": x, "s": module.third, "z": middle}, {"y": sbyte}
        )[0],
        "dynamic": dynamic[0], "dynamic scale": dynamic[1], "dynamic zero point": dynamic[2],
        "product": runtime("MatMulInteger", {"x": q, **rows}, {"y": whole})[0],
        "product, signed": runtime("MatMulInteger", {"x": signed, "w": rows["w"]}, {"y": whole})[0],
        "product, requantized": runtime(
            "QLinearMatMul",
            {"x": q, "sx": one, "zx": point, "w": rows["w"], "sw": one, "zw": middle,
             "sy": module.broad, "zy": point},
            {"y": byte},
        )[0],
    }  # fmt: skip
    for name, (_, settings) in CONVS.items():
        weight = getattr(module, f"conv_{name}")
        written: dict[str, Any] = {
            "strides": [settings.get("stride", 1)] * 2, "pads": [settings.get("padding", 0)] * 4,
            "dilations": [settings.get("dilation", 1)] * 2, "group": settings.get("groups", 1),
        }  # fmt: skip
        (sums,) = runtime(
            "ConvInteger", {"x": image, "w": weight, "zx": point}, {"y": whole}, **written
        )
        (levels,) = runtime(
            "QLinearConv",
            {"x": image, "sx": one, "zx": point, "w": weight, "sw": one, "zw": middle,
             "sy": module.broad, "zy": point},
            {"y": byte}, **written,
        )  # fmt: skip
        found |= {f"{name} convolution": sums, f"{name} convolution, requantized": levels}
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    module, inputs = given()
    return wanted(module, *inputs)


def test_the_cases_reach_what_they_are_for(expected: dict[str, Tensor]) -> None:
    """Exact in float32, and with ties among what is requantized."""
    for name, value in expected.items():
        if value.dtype == torch.int32:
            assert int(value.abs().max()) < 1 << 24
            assert "signed" in name or int((value % 512 == 256).sum()) > 20, f"no tie in {name}"
        if value.dtype == torch.uint8 and value.ndim:
            assert {0, 255} <= set(value.unique().tolist()), f"nothing is clipped in {name}"


@pytest.mark.parametrize("target", TARGETS)
def test_integers(expected: dict[str, Tensor], target: str, tmp_path: Path) -> None:
    aim = machine(Target.parse(target))
    tools = ["cc"] if aim.family == host_family() else [aim.compiler, aim.qemu[0]]
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    module, inputs = given()
    program = capture(module, inputs)
    layers = {
        n.name: n.name for n in program.exported.graph.nodes
        if str(n.target).startswith(("aten.linear", "aten.conv"))
    }  # fmt: skip
    audit = edge.lower(program, Target.parse(target), tmp_path, planned=layers, integer=layers)
    assert {layer.kernel for layer in audit.layers} == {"integer"}, audit.layers
    run: Callable[..., tuple[Tensor, ...]] = edge.load(tmp_path, 1)
    for (name, want), got in zip(expected.items(), run(*inputs), strict=True):
        assert torch.equal(got.to(want.dtype), want), name
        assert torch.equal(got, want.to(got.dtype)), name
