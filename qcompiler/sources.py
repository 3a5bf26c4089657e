"""Every place of a quantized program that rounds, and what undoes it.

A source is a weight, an activation or a cached key or value that goes through a quantize/dequantize
pair; with the pair bypassed its reader gets the float value.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops
from qcompiler.op_families import CONVS, LINEAR
from qcompiler.program import Program
from qcompiler.qtype import FLOATS, QType
from qcompiler.rewrite import module_path, operand
from qcompiler.stages import Function

aten = torch.ops.aten


@dataclass(frozen=True)
class Source:
    """One place that rounds.

    Attributes:
        node: the dequantize or round trip that its readers see.
        path: module path of the first reader; of the attention for caches.
        kind: "weight", "activation" or "kv cache".
        format: of the integers.
        readers: module paths of the layers that read it.
    """

    node: str
    path: str
    kind: str
    format: str
    readers: tuple[str, ...] = ()


@dataclass
class Site:
    """A source with what bypasses it.

    Attributes:
        source: what rounds.
        start: the first node that is bypassed.
        bypass: node → what is computed in its place.
        readers: layers that read it.
        weight: in float, of weights.
    """

    source: Source
    start: Node
    bypass: dict[Node, Function]
    readers: list[Node] = field(default_factory=list)
    weight: Tensor | None = None


def op_of(node: Node) -> Function:
    """What a call computes."""
    function: Any = node.target
    return function  # type: ignore[no-any-return]  # a call's target is its op


def find_sources(floating: Program, quantized: Program) -> list[Site]:
    """Every place in `quantized` that rounds, in graph order."""
    exact = {n.name: n for n in floating.exported.graph.nodes}
    constants = floating.constants()
    packed = quantized.constants()
    tables = {
        module_path(n): n for n in floating.exported.graph.nodes
        if n.target is aten.embedding.default
    }  # fmt: skip
    found = []
    for node in quantized.exported.graph.nodes:
        if node.target is ops.cache_round_trip:
            reader = next(iter(node.users), node)
            source = Source(node.name, module_path(reader), "kv cache", str(node.args[1]))
            found.append(Site(source, node, {node: lambda x, _: x}))
            continue
        if node.target is not ops.dequantize:
            continue
        q = operand(node, 0)
        readers = [n for n in node.users if n.target in (LINEAR, *CONVS) and n.name in exact]
        paths = tuple(module_path(n) for n in readers)
        if q.target is ops.quantize and q.name not in packed:
            source = Source(node.name, _place(node, readers), "activation", _kind(q, packed), paths)
            bypass: dict[Node, Function] = {q: lambda x, *_: x, node: lambda x, *_: x}
            found.append(Site(source, q, bypass, readers))
        elif q.target is operator.getitem and q.args[0].target is ops.dynamic_quantize:
            made = q.args[0]
            source = Source(
                node.name, _place(node, readers), "activation", str(made.args[1]), paths
            )
            bypass = {made: lambda x, _: (x, x, x), node: lambda x, *_: x}
            found.append(Site(source, made, bypass, readers))
        elif q.target is aten.embedding.default:
            table = tables.get(module_path(q))
            if table is None or operand(table, 0).name not in constants:
                continue
            weight = constants[operand(table, 0).name]
            element = _element(packed.get(operand(q, 0).name))
            source = Source(node.name, module_path(q), "weight", f"{element}:channel", ())
            bypass = {
                q: lambda _, i, *rest, w=weight: aten.embedding.default(w, i),
                node: lambda x, *_: x,
            }
            found.append(Site(source, q, bypass))
        else:
            layer = next((n for n in readers if operand(n, 1) is node), None)
            bias = next((n for n in readers if operand(n, 2) is node), None)
            if bias is not None or layer is None:
                continue  # an int32 bias is rounded a thousand times finer than what it is added to
            weight = constants[operand(exact[layer.name], 1).name]
            source = Source(
                node.name, module_path(layer), "weight", _weight_kind(node, q, packed), paths
            )
            site = Site(source, node, {node: lambda *_, w=weight: w}, [layer], weight)
            found.append(site)
    return found


def _place(node: Node, readers: Sequence[Node]) -> str:
    return module_path(readers[0]) if readers else module_path(node)


def _element(stored: Any) -> str:
    """The element of a constant that is stored unpacked; int8 where it is no float."""
    dtype = getattr(stored, "dtype", None)
    return next((name for name, known in FLOATS.items() if known == dtype), "int8")


def _kind(q: Node, constants: Mapping[str, Any]) -> str:
    """A static activation's format from its bounds, or that of its zero point."""
    element = _element(constants.get(operand(q, 2).name))
    if element in FLOATS:
        return f"{element}:tensor"
    low, high = int(q.args[5]), int(q.args[6])  # type: ignore[arg-type]  # integers by the schema
    bits = (high - low + 1).bit_length() - (0 if low + high in (0,) else 1)
    return f"{'uint' if low == 0 else 'int'}{bits}:tensor" + (":affine" if low == 0 else "")


def _weight_kind(node: Node, q: Node, constants: Mapping[str, Any]) -> str:
    element = str(q.args[1]) if q.target is ops.unpack else _element(constants.get(q.name))
    group = int(operand(node, 4) or 0)
    zero = constants.get(operand(node, 2).name)
    affine = zero is not None and bool((zero != QType(element).middle).any())
    return f"{element}:{f'g{group}' if group else 'channel'}{':affine' if affine else ''}"


def float_biases(floating: Program, layers: Sequence[Node]) -> dict[Node, Function]:
    """Layers with the biases that they had before these were corrected."""
    exact = {n.name: n for n in floating.exported.graph.nodes}
    constants = floating.constants()
    found: dict[Node, Function] = {}
    for node in layers:
        bias = operand(exact[node.name], 2)
        value = constants.get(bias.name) if isinstance(bias, Node) else None
        function: Any = node.target

        def call(
            x: Tensor, w: Tensor, b: Any = None, *rest: Any, f: Any = function, v: Any = value
        ) -> Any:
            return f(x, w, v, *rest)

        found[node] = call
    return found


def relative_error(site: Site | None, quantized: Program) -> float:
    """‖Ŵ − W‖ / ‖W‖ of a layer's weight; 0 where it is float."""
    if site is None or site.weight is None:
        return 0.0
    got = _dequantized(site.start, quantized)
    return float((got - site.weight).double().norm() / site.weight.double().norm().clamp(min=1e-30))


def _dequantized(node: Node, program: Program) -> Tensor:
    """The weight that a dequantize of constants gives."""
    constants = program.constants()

    def value(source: Any) -> Any:
        if not isinstance(source, Node):
            return source
        if source.name in constants:
            return constants[source.name]
        return op_of(source)(*map(value, source.args))

    result: Tensor = value(node)
    return result
