"""Bring a captured graph into the form that the other passes match on.

- In-place ops become their functional form (`in_place`); dropout, assertions, full slices and
  other no-ops go.
- What depends on constants alone is computed now, when the result is no larger than what it was
  made from.
- `addmm`, `mm` and `matmul` with a constant matrix become `linear`.
- Batch normalization after a convolution is folded into it:
  W' = W·γ/√(σ²+ε),  b' = (b−μ)·γ/√(σ²+ε) + β.
- RMSNorm spelled out (x · rsqrt(mean(x²) + ε) · γ, or as a quotient) becomes `aten.rms_norm`.
- GELU (erf and tanh) and SiLU become one op each, however they are spelled: an elementwise subgraph
  with one input is evaluated on a grid and compared with the function itself.

Refused, with the reason: batch normalization that no convolution feeds alone.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.in_place import make_functional
from qcompiler.rewrite import Draft, evaluate, operand, rewrite

aten = torch.ops.aten

_DROP = (
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async",
    "sym_constrain_range", "sym_constrain_range_for_size",
)  # fmt: skip
_ELEMENTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar,
    aten.erf.default, aten.tanh.default, aten.sigmoid.default, aten.exp.default, aten.neg.default,
    aten.reciprocal.default, aten.square.default, aten.erfc.default, aten.rsub.Scalar,
    aten.add.Scalar, aten.mul.Scalar,
}  # fmt: skip
_CURVED = {
    aten.erf.default,
    aten.erfc.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.exp.default,
}
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_NAMED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)  # "same" and "valid"
_POOLS = (aten.avg_pool2d.default, aten.avg_pool3d.default)
_LAST = 9223372036854775807


@rewrite(exact=True)
def normalize(draft: Draft) -> None:
    """Functional form, no no-ops, one op for each norm and activation."""
    make_functional(draft)
    _drop_no_ops(draft)
    _fold_constants(draft)
    _make_linears(draft)
    _spell_paddings(draft)
    _spell_divisors(draft)
    _fold_batch_norms(draft)
    _recognise_rms_norms(draft)
    _recognise_activations(draft)


def _drop_no_ops(draft: Draft) -> None:
    count, moved = 0, False
    for node in draft.calls():
        name = str(node.target).removeprefix("aten.").split(".")[0]
        if name in _DROP:
            draft.graph.erase_node(node)
            draft.changed = True
            count += 1
        elif node.args and isinstance(node.args[0], Node) and _is_no_op(node, name):
            moved = moved or _moves(node.meta["val"], node.args[0].meta["val"])
            draft.swap(node, node.args[0])
            # Dropout counts as impure: dead-code elimination would keep it.
            draft.graph.erase_node(node)
            count += 1
    if count:
        draft.note(f"{count} no-ops dropped")
    if moved:  # a view takes only some arrangements in memory, which are no longer ensured
        for node in draft.calls(aten.view.default):
            node.target = aten.reshape.default


def _moves(after: Tensor, before: Tensor) -> bool:
    """Whether the elements lie in another order, dynamic sizes compared as symbols."""
    return [str(s) for s in after.stride()] != [str(s) for s in before.stride()]


def _is_no_op(node: Node, name: str) -> bool:
    value, before = node.meta.get("val"), operand(node, 0).meta.get("val")
    if (
        not isinstance(value, Tensor)
        or not isinstance(before, Tensor)
        or value.dtype != before.dtype
    ):
        return False
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        return operand(node, 2) is False or bool(operand(node, 1) == 0)
    if name in (
        "to",
        "type_as",
        "contiguous",
        "alias",
        "clone",
        "detach",
        "lift_fresh_copy",
        "_to_copy",
        "detach_",
    ):
        return value.device == before.device
    if name == "slice":
        start, end, step = (operand(node, i) for i in (2, 3, 4))
        return start in (None, 0) and end in (None, _LAST) and step in (None, 1)
    if name in ("add", "sub", "mul", "div") and not node.kwargs:
        other, neutral = operand(node, 1), 0 if name in ("add", "sub") else 1
        return len(node.args) == 2 and type(other) in (int, float) and bool(other == neutral)
    if name in ("view", "reshape", "expand", "flatten", "squeeze"):
        return _same_shape(value, before)
    return False


def _same_shape(left: Tensor, right: Tensor) -> bool:
    """Equal shapes, dynamic sizes compared as symbols."""
    return left.ndim == right.ndim and all(
        str(a) == str(b) for a, b in zip(left.shape, right.shape, strict=True)
    )


def _fold_constants(draft: Draft) -> None:
    count = 0
    for node in draft.calls():
        made = operand(node, 0) if node.target is operator.getitem else node
        inputs = made.all_input_nodes
        value = node.meta.get("val")
        if (
            not inputs
            or not isinstance(value, Tensor)
            or not all(draft.is_constant(n) for n in inputs)
        ):
            continue
        if not str(made.target).startswith("aten.") or not all(type(s) is int for s in value.shape):
            continue
        if value.numel() > sum(draft.constant(n).numel() for n in inputs) or str(made.target) in (
            "aten.rand_like.default", "aten.bernoulli.p",
        ):  # fmt: skip
            continue
        args = torch.fx.node.map_arg(made.args, draft.constant)
        kwargs = torch.fx.node.map_arg(made.kwargs, draft.constant)
        with torch.no_grad():
            folded = evaluate(made, args, kwargs)
        folded = folded if made is node else folded[operand(node, 1)]
        draft.swap(node, draft.add_constant(f"{node.name}_folded", folded.contiguous()))
        count += 1
    if count:
        draft.note(f"{count} constant expressions computed")


def _make_linears(draft: Draft) -> None:
    for node in draft.calls(aten.addmm.default, aten.mm.default, aten.matmul.default):
        bias = node.args[0] if node.target is aten.addmm.default else None
        x, weight = node.args[-2:]
        if not draft.is_constant(weight) or draft.constant(weight).ndim != 2 or node.kwargs:
            continue
        if not isinstance(x, Node) or x.meta["val"].ndim < 2:
            continue
        if bias is not None and (not draft.is_constant(bias) or draft.constant(bias).ndim != 1):
            continue
        turned = draft.add_constant(f"{node.name}_weight", draft.constant(weight).t().contiguous())
        draft.swap(node, draft.call(aten.linear.default, x, turned, bias, before=node))


def _spell_paddings(draft: Draft) -> None:
    """Paddings "same" and "valid" as numbers; the odd one goes behind, as in torch."""
    for conv in draft.calls(*_NAMED):
        op: Any = conv.target
        given = {a.name: a.default_value for a in op._schema.arguments} | dict(conv.kwargs)
        given |= dict(zip(given, conv.args, strict=False))
        x, weight, bias, stride, padding, dilation, groups = given.values()
        kernel = weight.meta["val"].shape[2:]
        steps = [*dilation] * (len(kernel) if len(dilation) == 1 else 1)
        total = [d * (k - 1) * (padding == "same") for d, k in zip(steps, kernel, strict=True)]
        if any(n % 2 for n in total):
            behind = [side for n in reversed(total) for side in (0, n % 2)]
            x = draft.call(aten.pad.default, x, behind, before=conv)
        plain, halves = _CONVS[_NAMED.index(op)], [n // 2 for n in total]
        args = (x, weight, bias, stride, halves, dilation, groups)
        draft.swap(conv, draft.call(plain, *args, before=conv))
        draft.graph.erase_node(conv)


def _spell_divisors(draft: Draft) -> None:
    """Sums of windows divided by a number of the user's own, as a multiple of their means."""
    for pool in draft.calls(*_POOLS):
        schema: Any = pool.target
        given = {a.name: a.default_value for a in schema._schema.arguments}
        given |= dict(pool.kwargs) | dict(zip(given, pool.args, strict=False))
        values: Any = given.values()
        x, kernel, stride, padding, beyond, _, divisor = values
        if divisor is None or beyond:  # windows beyond the border have fewer elements
            continue
        dims = 2 + _POOLS.index(schema)
        elements = math.prod([*kernel] * (dims if len(kernel) == 1 else 1))
        mean = draft.call(pool.target, x, kernel, stride, padding, False, True, before=pool)
        draft.swap(pool, draft.call(aten.mul.Tensor, mean, elements / divisor, before=pool))
        draft.graph.erase_node(pool)


def _fold_batch_norms(draft: Draft) -> None:
    folded = 0
    for norm in draft.calls(aten.batch_norm.default):
        operands: tuple[Any, ...] = norm.args
        conv, gamma, beta, mean, variance, training, _, eps, *_ = operands
        if training:
            draft.refuse(
                norm, "the batch normalization is in training mode: call eval() on the module"
            )
            continue
        if not isinstance(conv, Node) or conv.target not in _CONVS or len(conv.users) > 1:
            draft.refuse(norm, "no convolution feeds this batch normalization alone")
            continue
        weight_node = operand(conv, 1)
        if not draft.is_constant(weight_node) or len(weight_node.users) > 1:
            draft.refuse(norm, "the convolution's weight is computed or has another reader")
            continue
        weight = draft.constant(weight_node).double()

        def value(node: Any, default: float, like: Tensor = weight) -> Tensor:
            if node is None:
                return torch.full((like.shape[0],), default, dtype=torch.float64)
            return draft.constant(node).double()

        scale = value(gamma, 1.0) / (value(variance, 1.0) + eps).sqrt()
        old_bias = value(operand(conv, 2), 0.0)
        bias = (old_bias - value(mean, 0.0)) * scale + value(beta, 0.0)
        folded_weight = weight * scale.reshape([-1] + [1] * (weight.ndim - 1))
        dtype = draft.constant(weight_node).dtype
        new_weight = draft.add_constant(f"{conv.name}_weight", folded_weight.to(dtype))
        new_bias = draft.add_constant(f"{conv.name}_bias", bias.to(dtype))
        args = (conv.args[0], new_weight, new_bias, *conv.args[3:])
        options: dict[str, Any] = dict(conv.kwargs)
        draft.swap(norm, draft.call(conv.target, *args, before=conv, **options))
        folded += 1
    if folded:
        draft.note(f"{folded} batch normalizations folded")


def _operands(node: Node, *ops: Any) -> list[Any]:
    return list(node.args[:2]) if node.op == "call_function" and node.target in ops else []


def _recognise_rms_norms(draft: Draft) -> None:
    count = 0
    for root in draft.calls(aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar):
        if root.target is aten.pow.Tensor_Scalar and root.args[1] != -0.5:
            continue
        summands = _operands(operand(root, 0), aten.add.Tensor)
        eps = next((a for a in summands if isinstance(a, float)), None)
        mean = next((a for a in summands if isinstance(a, Node)), None)
        if eps is None or mean is None or mean.target is not aten.mean.dim:
            continue
        square = operand(mean, 0)
        if mean.args[1] not in ([-1], [square.meta["val"].ndim - 1]) or mean.args[2:] != (True,):
            continue
        if (
            square.target is aten.square.default
            or (square.target is aten.pow.Tensor_Scalar and square.args[1] == 2)
            or (square.target is aten.mul.Tensor and square.args[0] is square.args[1])
        ):
            x = square.args[0]
        else:
            continue
        for scaled in [u for u in root.users if _scales(u, x, root)]:
            weight, final = _gain(draft, scaled)
            size = [x.meta["val"].shape[-1]]
            fused = draft.call(aten.rms_norm.default, x, size, weight, eps, before=final, like=root)
            draft.swap(final, fused)
            count += 1
    if count:
        draft.note(f"{count} RMSNorms recognised")


def _scales(user: Node, x: Node, root: Node) -> bool:
    """Whether `user` is x / √(…), as a product with the reciprocal root or as a quotient."""
    if root.target is aten.sqrt.default:
        return _operands(user, aten.div.Tensor) == [x, root]
    return set(_operands(user, aten.mul.Tensor)) == {x, root}


def _gain(draft: Draft, scaled: Node) -> tuple[Node | None, Node]:
    """The constant weight that the only reader multiplies by, and the node where the norm ends."""
    reader = next(iter(scaled.users)) if len(scaled.users) == 1 else None
    for factor in _operands(reader, aten.mul.Tensor) if reader else []:
        if draft.is_constant(factor) and draft.constant(factor).ndim == 1:
            assert reader is not None
            if draft.constant(factor).shape[0] == scaled.meta["val"].shape[-1]:
                return factor, reader
    return None, scaled


_GRID = torch.linspace(-12.0, 12.0, 4097, dtype=torch.float64)
_ACTIVATIONS: tuple[tuple[str, Any, dict[str, Any], Tensor], ...] = tuple(
    (name, op, options, op(_GRID, **options))
    for name, op, options in (
        ("gelu", aten.gelu.default, {}),
        ("tanh-gelu", aten.gelu.default, {"approximate": "tanh"}),
        ("silu", aten.silu.default, {}),
    )
)


def _recognise_activations(draft: Draft) -> None:
    found: dict[str, int] = {}
    for node in reversed(list(draft.calls(aten.mul.Tensor, aten.div.Tensor))):
        if node._erased or not node.users:
            continue
        for source in _cuts(node):
            values = _on_grid(node, source)
            if values is None:
                continue
            match = next(
                (a for a in _ACTIVATIONS if torch.allclose(values, a[3], rtol=1e-6, atol=1e-6)),
                None,
            )
            if match is not None:
                name, op, kwargs, _ = match
                draft.swap(node, draft.call(op, source, before=node, **kwargs))
                draft.graph.eliminate_dead_code()
                found[name] = found.get(name, 0) + 1
                break
    for name, count in found.items():
        draft.note(f"{count} × {name} recognised")


def _cuts(node: Node, limit: int = 14) -> list[Node]:
    """Nodes upstream of `node` that two or more paths of elementwise ops lead to, nearest first."""
    cone: list[Node] = []
    queue, curved = [node], False
    while queue and len(cone) < limit:
        current = queue.pop(0)
        curved = curved or current.target in _CURVED
        for source in current.all_input_nodes:
            if source not in cone:
                cone.append(source)
                if source.target in _ELEMENTWISE:
                    queue.append(source)
    return [c for c in cone if len(c.users) > 1 and c.op != "get_attr"] if curved else []


def _on_grid(node: Node, source: Node) -> Tensor | None:
    """The subgraph from `source` to `node` on the grid, or None if it has another input."""
    values: dict[Node, Tensor] = {source: _GRID}

    def visit(current: Node, depth: int) -> bool:
        if current in values:
            return True
        if current.target not in _ELEMENTWISE or depth > 12:
            return False
        if not all(visit(s, depth + 1) for s in current.all_input_nodes):
            return False
        args = torch.fx.node.map_arg(current.args, values.__getitem__)
        values[current] = evaluate(current, args, current.kwargs)
        return True

    return values[node] if visit(node, 0) and not math.isnan(float(values[node].sum())) else None
