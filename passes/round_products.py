"""Round the operands of float products to bfloat16; their sums stay float32.

    linear(x, W, b)  →  linear(float(bf16(x)), float(W₁₆), b)           W₁₆ = bf16(W), stored so
    a @ b            →  float(bf16(a)) @ float(bf16(b))
    attention(q, k, v, …)  →  attention(bf16(q), bf16(k), bf16(v), …)    float32 result

A product of two bfloat16 numbers is exact in float32, so this is what machines with bfloat16
products compute, but for the order of the sums (Kalamkar 2019, A Study of BFLOAT16 for Deep
Learning Training, section 2). bf16() rounds half to even.

Left in float32, with the reason: layers with quantized weights or inputs, convolutions, attention
that is not fused, attention over a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from qcompiler import ops
from qcompiler.cached import cached_attention
from qcompiler.format import Format
from qcompiler.op_families import CONVS, LINEAR, SDPA
from qcompiler.program import Program
from qcompiler.recipe import Recipe
from qcompiler.rewrite import Draft, following, module_path, operand, rewrite

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
NARROW = torch.bfloat16


def round_as_told(program: Program, recipe: Recipe) -> Program:
    """What the recipe has in bfloat16: every float product, or the linears that it names."""
    if recipe.products == "bfloat16":
        return round_products(program)
    if not any(Format.parse(text).narrow for text in recipe.formats.values()):
        return program
    return round_products(
        program, lambda node: recipe.format_of(module_path(node), node.name).narrow
    )


@rewrite(exact=False)
def round_products(draft: Draft, only: Callable[[Node], bool] | None = None) -> None:
    """Round what linears, matrix products and attentions read.

    Args:
        draft: with or without quantized layers.
        only: which linears, where the rest and all other products shall stay float32.
    """
    rounding = _Rounding(draft)
    count = {"linears": 0, "products": 0, "attentions": 0}
    for node in draft.calls(LINEAR):
        if only is not None and not only(node):
            continue
        weight, source = operand(node, 1), operand(node, 0)
        quantized = [n for n in (source, weight) if n.target is ops.dequantize]
        if rounding.done(source):
            continue
        if quantized:
            if source.target is not ops.dequantize:
                draft.refuse(node, "stays float32: its weight is quantized")
        elif not draft.is_constant(weight):
            draft.refuse(node, "stays float32: its weight is computed")
        else:
            draft.set_input(node, 0, rounding.wide(source))
            draft.set_input(node, 1, rounding.wide(weight))
            count["linears"] += 1
    if only is None:
        _round_the_rest(draft, rounding, count)
    made = ", ".join(f"{number} {what}" for what, number in count.items() if number)
    if made:
        draft.note(f"{made} in bfloat16")


def _round_the_rest(draft: Draft, rounding: _Rounding, count: dict[str, int]) -> None:
    """All products but linears."""
    for node in draft.calls(*PRODUCTS):
        if any(rounding.done(operand(node, i)) for i in (0, 1)):
            continue
        for i in (0, 1):
            draft.set_input(node, i, rounding.wide(operand(node, i)))
        count["products"] += 1
    for node in draft.calls(ops.attention):
        if operand(node, 0).meta["val"].dtype == NARROW:
            continue
        for i in range(3):
            draft.set_input(node, i, rounding.narrow(operand(node, i)))
        count["attentions"] += 1
    for node in draft.calls(*CONVS):
        if operand(node, 1).target is not ops.dequantize:
            draft.refuse(node, "stays float32: no convolution multiplies bfloat16")
    for node in draft.calls(SDPA, cached_attention):
        why = "is over a cache" if node.target is cached_attention else "is not fused"
        draft.refuse(node, f"stays float32: this attention {why}")


class _Rounding:
    """Roundings of values, one for all readers."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.narrowed: dict[Node, Node] = {}
        self.widened: dict[Node, Node] = {}

    def done(self, value: Node) -> bool:
        """Whether a value comes from bfloat16 already."""
        source = operand(value, 0)
        return (
            value.target is aten.to.dtype
            and isinstance(source, Node)
            and source.meta["val"].dtype == NARROW
        )

    def narrow(self, value: Node) -> Node:
        """The value in bfloat16."""
        if value not in self.narrowed:
            if self.draft.is_constant(value):
                rounded = self.draft.constant(value).to(NARROW)
                made = self.draft.add_constant(f"{value.name}_bf16", rounded)
            else:
                made = self.draft.call(
                    aten.to.dtype, value, NARROW, before=following(value), like=value
                )
            self.narrowed[value] = made
        return self.narrowed[value]

    def wide(self, value: Node) -> Node:
        """The value, rounded, in float32."""
        if value not in self.widened:
            narrow = self.narrow(value)
            before = following(narrow)
            self.widened[value] = self.draft.call(
                aten.to.dtype, narrow, torch.float32, before=before, like=value
            )
        return self.widened[value]
