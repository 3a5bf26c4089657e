"""The dialect against ONNX: the reference implementation and ONNX Runtime, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompiler import ops
from qcompiler.qtype import QType, pack, unpack

ONNX_TYPES = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}
# (axis, group, shape of the scale) for a tensor of SHAPE.
SHAPE = (4, 6, 8)
USES = [
    pytest.param(0, 0, (), id="tensor"),
    pytest.param(0, 0, (4,), id="axis0"),
    pytest.param(1, 0, (6,), id="axis1"),
    pytest.param(-1, 0, (8,), id="axis-1"),
    pytest.param(1, 3, (4, 2, 8), id="blocked1"),
    pytest.param(2, 4, (4, 6, 2), id="blocked2"),
    pytest.param(-1, 2, (4, 6, 4), id="blocked-1"),
]


def model(op: str, inputs: dict[str, np.ndarray], outputs: list[int], **attributes: int) -> bytes:
    """An opset-21 model of one op."""
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in inputs.items()
    ]
    names = [f"out{i}" for i in range(len(outputs))]
    node = helper.make_node(op, list(inputs), names, **attributes)
    results = [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in zip(names, outputs, strict=True)
    ]
    graph = helper.make_graph([node], op, infos, results)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(proto))
    return proto.SerializeToString()


def run(
    op: str, inputs: dict[str, np.ndarray], outputs: list[int], **attributes: int
) -> dict[str, list[Any]]:
    """What the reference implementation and ONNX Runtime give."""
    proto = model(op, inputs, outputs, **attributes)
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return {
        "reference": ReferenceEvaluator(onnx.load_from_string(proto)).run(None, inputs),
        "runtime": session.run(None, inputs),
    }


def attributes(axis: int, group: int, scale: tuple[int, ...]) -> dict[str, int]:
    return {"axis": axis, **({"block_size": group} if group else {})} if scale else {}


def tensors(element: str, scale_shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Values, some of them exact ties and some out of range, with scales and zero points."""
    rng = np.random.default_rng(7)
    low, high = LIMITS[element]
    scale = np.exp2(rng.integers(-6, 3, scale_shape)).astype(np.float32)
    scale = np.where(rng.random(scale_shape) < 0.5, scale, scale * np.float32(1.1))
    zero = rng.integers(low, high + 1, scale_shape).astype(element)
    x = rng.normal(size=SHAPE).astype(np.float32) * 16
    ties = rng.integers(-9, 9, SHAPE).astype(np.float32) + np.float32(0.5)
    x = np.where(rng.random(SHAPE) < 0.5, x, ties)
    x[0, 0, :4] = [0.0, -0.0, 1e9, -1e9]
    return x, np.asarray(scale, np.float32), np.asarray(zero)


@pytest.mark.parametrize("element", LIMITS)
@pytest.mark.parametrize(("axis", "group", "scale_shape"), USES)
def test_quantize(element: str, axis: int, group: int, scale_shape: tuple[int, ...]) -> None:
    x, scale, zero = tensors(element, scale_shape)
    inputs = {"x": x, "scale": scale, "zero": zero}
    results = run(
        "QuantizeLinear", inputs, [ONNX_TYPES[element]], **attributes(axis, group, scale_shape)
    )
    ours = ops.quantize(*map(torch.from_numpy, (x, scale, zero)), axis, group, *LIMITS[element])
    for name, (want,) in results.items():
        np.testing.assert_array_equal(ours.numpy(), want, err_msg=name)
        assert ours.numpy().dtype == want.dtype


@pytest.mark.parametrize("element", LIMITS)
@pytest.mark.parametrize(("axis", "group", "scale_shape"), USES)
def test_dequantize(element: str, axis: int, group: int, scale_shape: tuple[int, ...]) -> None:
    _, scale, zero = tensors(element, scale_shape)
    low, high = LIMITS[element]
    q = np.random.default_rng(3).integers(low, high + 1, SHAPE).astype(element)
    inputs = {"q": q, "scale": scale, "zero": zero}
    results = run(
        "DequantizeLinear", inputs, [TensorProto.FLOAT], **attributes(axis, group, scale_shape)
    )
    ours = ops.dequantize(*map(torch.from_numpy, (q, scale, zero)), axis, group)
    for name, (want,) in results.items():
        np.testing.assert_array_equal(ours.numpy(), want, err_msg=name)


@pytest.mark.parametrize(("axis", "group", "scale_shape"), USES)
def test_fake_tensors(axis: int, group: int, scale_shape: tuple[int, ...]) -> None:
    """What torch.export sees has the shape and dtype of what runs."""
    x, scale, zero = map(torch.from_numpy, tensors("uint8", scale_shape))
    arguments = (x, scale, zero, axis, group, 0, 255)
    torch.library.opcheck(ops.quantize, arguments, test_utils=("test_schema", "test_faketensor"))
    q = ops.quantize(*arguments)
    torch.library.opcheck(
        ops.dequantize,
        (q, scale, zero, axis, group),
        test_utils=("test_schema", "test_faketensor"),
    )


DYNAMIC = {
    "normal": np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32),
    "positive": np.random.default_rng(1).random((5, 7)).astype(np.float32) + 3,
    "negative": -np.random.default_rng(2).random((5, 7)).astype(np.float32) - 3,
    "zeros": np.zeros((5, 7), np.float32),
    "one value": np.full((5, 7), 2.5, np.float32),
    "one element": np.full((1, 1), -2.5, np.float32),
    "ties": np.linspace(-127.5, 127.5, 256, dtype=np.float32).reshape(4, 64),
    "outlier": np.append(np.ones(40), -1e4).astype(np.float32)[None],
    "tiny": np.array([[0, 1e-30, -2e-30]], np.float32),
    "huge": np.array([[1e38, -1e38, 1.0]], np.float32),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_quantize(name: str) -> None:
    x = DYNAMIC[name]
    results = run(
        "DynamicQuantizeLinear",
        {"x": x},
        [TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8],
    )
    ours = ops.dynamic_quantize(torch.from_numpy(x), "uint8:tensor:affine:dynamic")
    for source, wants in results.items():
        if source == "reference" and not x.any():
            continue  # it divides 0 by 0; ONNX Runtime takes the scale 1
        for part, got, want in zip(("q", "scale", "zero"), ours, wants, strict=True):
            message = f"{part} of {source}"
            np.testing.assert_array_equal(got.numpy(), want, err_msg=message)
            assert got.numpy().dtype == want.dtype, message


def test_dynamic_quantize_at_random() -> None:
    """Many magnitudes and offsets, so that the scale's and the zero point's own rounding is met."""
    rng = np.random.default_rng(11)
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    kinds = {"q": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    outs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    node = helper.make_node("DynamicQuantizeLinear", ["x"], [*kinds])
    graph = helper.make_graph([node], "dynamic", [info], outs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for _ in range(300):
        x = rng.normal(rng.normal(), 1, 33) * 10.0 ** rng.integers(-9, 9)
        x = x.astype(np.float32)
        ours = ops.dynamic_quantize(torch.from_numpy(x), "uint8:tensor:affine:dynamic")
        for got, want in zip(ours, session.run(None, {"x": x}), strict=True):
            np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize(
    "text",
    [
        "uint8:tensor:affine:dynamic",
        "int8:tensor:affine:dynamic",
        "int8:tensor:dynamic",
        "uint8:tensor:dynamic",
        "int8:token",
        "uint8:token:affine",
        "int4:token",
    ],
)
@pytest.mark.parametrize("name", [*DYNAMIC, "subnormal"])
def test_dynamic_quantize_gives_what_its_format_promises(name: str, text: str) -> None:
    """Zeros stay exact, all-zero tensors too; everything else within half a step."""
    x = torch.from_numpy(DYNAMIC.get(name, np.array([[0, 1e-45, -1e-44]], np.float32)))
    kind = QType.parse(text)
    q, scale, zero = ops.dynamic_quantize(x, text)
    assert scale.shape == zero.shape == ((*x.shape[:-1], 1) if ":token" in text else ())
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert kind.qmin <= int(q.min())
    assert int(q.max()) <= kind.qmax
    back = ops.dequantize(q, scale, zero, 0, 0)
    assert (back[x == 0] == 0).all()
    assert ((back.double() - x.double()).abs() <= 0.5001 * scale.double()).all()


def test_quantize_to_int32_saturates() -> None:
    """As QType does: a bias with a tiny scale must not wrap around."""
    x, scale, zero = torch.tensor([3.0, -3.0]), torch.tensor(1e-9), torch.tensor(0).int()
    q = ops.quantize(x, scale, zero, 0, 0, -(2**31), 2**31 - 1)
    assert q.tolist() == [2**31 - 1, -(2**31)]


@pytest.mark.parametrize("value", [1e-45, -1e-45])
def test_dynamic_quantize_where_the_scale_underflows(value: float) -> None:
    """(high − low) / 255 is 0 in float32 here, and must not become a zero point of NaN."""
    x = torch.tensor([0.0, value])
    q, scale, zero = ops.dynamic_quantize(x, "uint8:tensor:affine:dynamic")
    assert scale == 1
    assert q.tolist() == [int(zero)] * 2


@pytest.mark.parametrize("text", ["uint8:tensor:affine:dynamic", "int8:token"])
def test_dynamic_fake_tensors(text: str) -> None:
    torch.library.opcheck(
        ops.dynamic_quantize,
        (torch.randn(3, 4, 5), text),
        test_utils=("test_schema", "test_faketensor"),
    )


SUBBYTE = [
    ("int4", "INT4", "int4"),
    ("uint4", "UINT4", "uint4"),
    ("int2", "INT2", "int2"),
    ("uint2", "UINT2", "uint2"),
]


@pytest.mark.parametrize(("element", "onnx_name", "numpy_name"), SUBBYTE)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_pack_is_the_raw_data_of_onnx(
    element: str, onnx_name: str, numpy_name: str, count: int
) -> None:
    if not hasattr(TensorProto, onnx_name):
        pytest.skip(f"this onnx has no {onnx_name}")
    bits = QType(element).bits
    low = -(1 << (bits - 1)) if QType(element).signed else 0
    values = np.random.default_rng(count).integers(low, low + (1 << bits), count)
    proto = numpy_helper.from_array(values.astype(getattr(ml_dtypes, numpy_name)))
    assert proto.data_type == getattr(TensorProto, onnx_name)

    tensor = torch.from_numpy(values.astype(np.int8 if low else np.uint8))
    packed = pack(tensor, element)
    assert packed.numpy().tobytes() == proto.raw_data

    assert torch.equal(unpack(packed, element, (count,)), tensor)
    assert torch.equal(ops.unpack(packed, element, [count]), tensor)


def test_packed_int4_runs() -> None:
    """ONNX Runtime reads our bytes, blocked along axis 0, and gives our numbers."""
    kind = QType.parse("int4:g4")
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    scale, zero = kind.scale_for(*kind.ranges(weight, 0))
    q = kind.quantize(weight, scale, zero, 0)
    initialisers = [
        helper.make_tensor("q", TensorProto.INT4, [8, 6], pack(q, "int4").numpy().tobytes(), True),
        numpy_helper.from_array(scale.numpy(), "scale"),
    ]
    node = helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=0, block_size=4)
    out = helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 6])
    graph = helper.make_graph([node], "packed", [], [out], initialisers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {})
    np.testing.assert_array_equal(ops.dequantize(q, scale, zero, 0, 4).numpy(), want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention(causal: bool, kv_heads: int) -> None:
    """softmax(q kᵀ · scale + mask) v, written out in float64."""
    batch, length, heads, size, scale = 2, 5, 4, 3, 0.7
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch, length, heads * size, generator=generator)
    k = torch.randn(batch, length, kv_heads * size, generator=generator)
    v = torch.randn(batch, length, kv_heads * size, generator=generator)
    mask = None if causal else torch.randn(batch, 1, length, length, generator=generator)
    got = ops.attention(q, k, v, mask, heads, kv_heads, scale, causal)

    want = torch.zeros(batch, length, heads * size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            mine, theirs = slice(h * size, (h + 1) * size), slice(g * size, (g + 1) * size)
            scores = q[b, :, mine].double() @ k[b, :, theirs].double().T * scale
            if mask is not None:
                scores = scores + mask[b, 0].double()
            if causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            want[b, :, mine] = torch.softmax(scores, -1) @ v[b, :, theirs].double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    arguments = (q, k, v, mask, heads, kv_heads, scale, causal)
    torch.library.opcheck(ops.attention, arguments, test_utils=("test_schema", "test_faketensor"))
