"""How each op of a Program is written in ONNX: the translations handed to `torch.onnx.export`.

Operators of ONNX Runtime's own domain have no schema in the onnx package; the ones used are
declared here, after ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import ir, opset23
from onnxscript.values import Op, Opset

from qcompiler import cached, ops
from qcompiler.backends import ort_formulas
from qcompiler.qtype import QType

aten = torch.ops.aten
OPSET = 23
op: Any = opset23  # its annotations hold for tensors of one known type; here the type is any
# Domain of nodes that the surgery replaces, and of the operators that it leaves to a library.
INTERNAL = "qcompiler"
_TYPES = ["float", "int8", "uint8", "int32", "int64", "bool"]


def _declare(name: str, inputs: int, outputs: int, attributes: dict[str, OpSchema.AttrType]) -> Op:
    """An operator that the onnx package does not know.

    Any input after the first may be left out.
    """
    parameter, option = OpSchema.FormalParameter, OpSchema.FormalParameterOption
    constraints = [(f"T{i}", [f"tensor({t})" for t in _TYPES], "") for i in range(inputs + outputs)]
    schema = OpSchema(
        name,
        INTERNAL,
        1,
        inputs=[
            parameter(f"input_{i}", f"T{i}", param_option=option.Optional if i else option.Single)
            for i in range(inputs)
        ],
        outputs=[parameter(f"output_{i}", f"T{inputs + i}") for i in range(outputs)],
        type_constraints=constraints,
        attributes=[
            OpSchema.Attribute(key, kind, required=True) for key, kind in attributes.items()
        ],
    )
    return Op(Opset(INTERNAL, 1), name, schema)


_Unpack = _declare(
    "Unpack", 1, 1, {"element": OpSchema.AttrType.STRING, "shape": OpSchema.AttrType.INTS}
)


_CachedAttention = _declare(
    "CachedAttention",
    9,
    3,
    {
        "heads": OpSchema.AttrType.INT,
        "kv_heads": OpSchema.AttrType.INT,
        "scale": OpSchema.AttrType.FLOAT,
        "window": OpSchema.AttrType.INT,
        "interleaved": OpSchema.AttrType.INT,
    },
)


_StoredAttention = _declare(
    "StoredAttention",
    11,
    3,
    {
        "heads": OpSchema.AttrType.INT,
        "kv_heads": OpSchema.AttrType.INT,
        "scale": OpSchema.AttrType.FLOAT,
        "window": OpSchema.AttrType.INT,
        "interleaved": OpSchema.AttrType.INT,
        "bits": OpSchema.AttrType.INT,
    },
)


_QuantizeToken = _declare("QuantizeToken", 1, 3, {"qtype": OpSchema.AttrType.STRING})
_DequantizeToken = _declare("DequantizeToken", 3, 1, {})
_Rotate = _declare("Rotate", 3, 1, {})


def _quantize(
    x: Any, scale: Any, zero_point: Any, axis: int, group: int, qmin: int, qmax: int
) -> Any:
    return op.QuantizeLinear(x, scale, zero_point, axis=axis, block_size=group)


def _dequantize(q: Any, scale: Any, zero_point: Any, axis: int, group: int) -> Any:
    maker = q.producer()
    if maker is not None and maker.op_type == "QuantizeToken":
        return _DequantizeToken(q, scale, zero_point)
    if len(scale.shape) == len(q.shape) and len(q.shape) > 1 and not group:
        # One scale for each row: DequantizeLinear has no such form.
        signed = q.dtype == ir.DataType.INT8  # symmetric, so its zero point is 0
        return op.Mul(op.Cast(q, to=1) if signed else _centred(q, zero_point), scale)
    if group and not len(zero_point.shape):  # ONNX wants a zero point for each scale, or none
        assert q.dtype == ir.DataType.INT8
        return op.DequantizeLinear(q, scale, axis=axis, block_size=group)
    return op.DequantizeLinear(q, scale, zero_point, axis=axis, block_size=group)


def _centred(q: Any, zero_point: Any) -> Any:
    return op.DequantizeLinear(q, op.Constant(value_float=1.0), zero_point)


def _dynamic_quantize(x: Any, qtype: str) -> Any:
    kind = QType.parse(qtype)
    if kind.granularity == "token":
        return _QuantizeToken(x, qtype=qtype)
    assert (kind.element, kind.granularity, kind.symmetric) == ("uint8", "tensor", False)
    return op.DynamicQuantizeLinear(x)


def _unpack(packed: Any, element: str, shape: Any) -> Any:
    return _Unpack(packed, element=element, shape=list(shape))


def _attention(
    q: Any, k: Any, v: Any, mask: Any, heads: int, kv_heads: int, scale: float, causal: bool
) -> Any:
    mask = _full_mask(mask, q, k, 1)
    out, *_ = op.Attention(
        q, k, v, mask, q_num_heads=heads, kv_num_heads=kv_heads, scale=scale, is_causal=int(causal)
    )
    return out


def _cached_attention(
    q: Any, k: Any, v: Any, past_key: Any, past_value: Any, mask: Any, cos: Any, sin: Any,
    positions: Any, heads: int, kv_heads: int, scale: float, window: int, interleaved: bool,
) -> Any:  # fmt: skip
    return _CachedAttention(
        q, k, v, past_key, past_value, mask, cos, sin, positions, heads=heads, kv_heads=kv_heads,
        scale=scale, window=window, interleaved=int(interleaved),
    )  # fmt: skip


def _stored_attention(
    q: Any, k: Any, v: Any, past_key: Any, past_value: Any, mask: Any, cos: Any, sin: Any,
    positions: Any, heads: int, kv_heads: int, scale: float, window: int, interleaved: bool,
    key_scale: Any, value_scale: Any, bits: int,
) -> Any:  # fmt: skip
    return _StoredAttention(
        q, k, v, past_key, past_value, mask, cos, sin, positions, key_scale, value_scale,
        heads=heads, kv_heads=kv_heads, scale=scale, window=window, interleaved=int(interleaved),
        bits=bits,
    )  # fmt: skip


def _full_mask(mask: Any, q: Any, k: Any, axis: int) -> Any:
    """A float mask with a row for each query; the queries are along `axis` of q."""
    if mask is not None and mask.shape[-2] == 1:
        # ONNX Runtime's kernel wants a row of the mask for each query.
        ones = op.Constant(value_ints=[1] * (len(mask.shape) - 2))
        queries, keys = op.Shape(q, start=axis, end=axis + 1), op.Shape(k, start=axis, end=axis + 1)
        mask = op.Expand(mask, op.Concat(ones, queries, keys, axis=0))
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        # Added as floats, the mask costs a tenth of the attention's time less than as booleans.
        low = op.Constant(value_float=torch.finfo(torch.float32).min)
        mask = op.Where(mask, op.Constant(value_float=0.0), low)
    return mask


def _sdpa(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention over (…, sequence, size) tensors, where `fuse_attention` left it as it was."""
    rank = len(q.shape)
    if rank not in (3, 4) or dropout:
        raise NotImplementedError(f"attention of rank {rank} with dropout {dropout}")
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    one = op.Constant(value_ints=[1])
    if rank == 3:  # a batch of single heads
        q, k, v = (op.Unsqueeze(t, one) for t in (q, k, v))
        mask = op.Unsqueeze(mask, one) if mask is not None and len(mask.shape) == 3 else mask
    out, *_ = op.Attention(q, k, v, _full_mask(mask, q, k, 2), scale=scale, is_causal=int(causal))
    return op.Squeeze(out, one) if rank == 3 else out


def _rotate(x: Any, left: Any, right: Any) -> Any:
    """Two products with the Kronecker factors; ONNX has no Hadamard operator."""
    rows, columns = (int(factor.shape[0]) for factor in (left, right))
    shape = op.Shape(x)
    blocked = op.Concat(op.Shape(x, end=-1), op.Constant(value_ints=[rows, columns]), axis=0)
    turned = op.MatMul(op.Reshape(x, blocked), right)
    if rows > 1:
        turned = op.MatMul(op.Transpose(left, perm=[1, 0]), turned)
    return op.Reshape(turned, shape)


def _rotate_whole(x: Any, left: Any, right: Any) -> Any:
    return _Rotate(x, left, right)


def _sparse_linear(x: Any, values: Any, columns: Any) -> Any:
    """Rows of the transposed input times a factor each, k of them added up.

    Measured at 128 rows: a fifth to a third of a float product's time for k = 2 to 4; picking
    single elements takes twelve times as long. What is computed of constants alone, the runtime
    folds when it starts.
    """
    outputs, each = (int(size) for size in columns.shape)
    flat = op.Reshape(x, op.Constant(value_ints=[-1, int(x.shape[-1])]))
    table = op.Transpose(flat, perm=[1, 0])
    numbers, factors = op.Cast(columns, to=6), op.Cast(values, to=1)  # int32, float32
    parts = []
    for k in range(each):
        picked = op.Gather(table, op.Gather(numbers, op.Constant(value_int=k), axis=1), axis=0)
        factor = op.Gather(factors, op.Constant(value_ints=[k]), axis=1)
        parts.append(op.Mul(picked, factor))
    made = op.Transpose(op.Sum(*parts), perm=[1, 0])
    leading = op.Shape(x, end=-1)
    return op.Reshape(made, op.Concat(leading, op.Constant(value_ints=[outputs]), axis=0))


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _layer_norm(
    x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = False
) -> Any:
    scale = weight if weight is not None else op.Constant(value_floats=[1.0] * _product(shape))
    out, *_ = op.LayerNormalization(x, scale, bias, axis=-len(shape), epsilon=eps)
    return out


def _rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    scale = weight if weight is not None else op.Constant(value_floats=[1.0] * _product(shape))
    return op.RMSNormalization(
        x, scale, axis=-len(shape), epsilon=torch.finfo(torch.float32).eps if eps is None else eps
    )


def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    def bound(value: Any) -> Any:
        if value is None:
            return None
        if x.dtype == 1:  # a plain constant: ONNX Runtime fuses no Clip whose limits are computed
            return op.Constant(value_float=float(value))
        return op.CastLike(op.Constant(value_float=float(value)), x)

    return op.Clip(x, bound(low), bound(high))


def _relu6(x: Any) -> Any:
    return _clamp(x, 0.0, 6.0)


def _log_sigmoid(x: Any) -> Any:
    """−log(1 + e^−x): the exporter's log of a sigmoid is −∞ from −18 on."""
    return op.Neg(op.Softplus(op.Neg(x)))


def _logaddexp(a: Any, b: Any) -> Any:
    """The larger and what the other adds, log(1 + e^−|a − b|); log 2 where both are the same."""
    same = op.Add(a, op.CastLike(op.Constant(value_float=math.log(2)), a))
    apart = op.Add(op.Max(a, b), op.Softplus(op.Neg(op.Abs(op.Sub(a, b)))))
    return op.Where(op.Equal(a, b), same, apart)


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    def bound(value: Any, default: int) -> Any:
        if value is None or isinstance(value, int):
            return op.Constant(value_ints=[default if value is None else value])
        return op.Reshape(op.Cast(value, to=7), op.Constant(value_ints=[1]))

    axes, steps = op.Constant(value_ints=[dim]), op.Constant(value_ints=[step])
    return op.Slice(x, bound(start, 0), bound(end, 2**63 - 1), axes, steps)


def _product(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total


def translations(generated: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Op overload → function that writes it in ONNX.

    `generated` keeps rotations whole, for kernels that compute them.
    """
    return {
        ops.quantize: _quantize,
        ops.dequantize: _dequantize,
        ops.dynamic_quantize: _dynamic_quantize,
        ops.unpack: _unpack,
        ops.attention: _attention,
        cached.cached_attention: _cached_attention,
        cached.stored_attention: _stored_attention,
        ops.rotate: _rotate_whole if generated else _rotate,
        ops.sparse_linear: _sparse_linear,
        aten.scaled_dot_product_attention.default: _sdpa,
        aten.linear.default: _linear,
        aten.slice.Tensor: _slice,
        aten.layer_norm.default: _layer_norm,
        aten.rms_norm.default: _rms_norm,
        aten.clamp.default: _clamp,
        aten.hardtanh.default: lambda x, low=-1.0, high=1.0: _clamp(x, low, high),
        aten.relu6.default: _relu6,
        aten.log_sigmoid.default: _log_sigmoid,
        aten.logaddexp.default: _logaddexp,
        aten.atan2.default: ort_formulas.atan2,
        aten.conv3d.default: ort_formulas.conv3d,
        aten.native_batch_norm.default: ort_formulas.batch_norm,
        aten._native_batch_norm_legit.default: ort_formulas.batch_norm,
        aten._native_batch_norm_legit.no_stats: ort_formulas.batch_norm_of_batch,
        aten._native_batch_norm_legit_functional.default: ort_formulas.batch_norm_functional,
    }
