"""Each group as kernel calls for a GPU.

The grouping, the expressions and the memory plan are those of the CPU targets; kernels are replaced
by those for a GPU, and products with quantized weights read float16 activations on tensor cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_group import Group, Writer
from qcompiler.backends.edge_ops import Op, Ref, Weight
from qcompiler.errors import UnsupportedError
from qcompiler.kernels import cuda_cache, cuda_expressions
from qcompiler.kernels.cuda_skinny import choose, skinny
from qcompiler.kernels.cuda_weights import Weights, pack
from qcompiler.kernels.isa import SCALAR

ISA = SCALAR  # what remains of a CPU: float panels of 16 columns
GROUPS = (32, 64, 128)

# Kernel → how it is built from the name, the arguments and the call's key.
BUILD: dict[str, Callable[..., Any]] = {
    "elementwise": cuda_expressions.elementwise,
    "reduce": lambda name, given, key: cuda_expressions.reduction(name, given, *key),
    "write_cache": lambda name, given, key: cuda_cache.write_cache(name, given, *key),
    "cached_attention": lambda name, given, key: cuda_cache.cached_attention(name, given, *key[:2]),
    "attention": lambda name, given, key: cuda_cache.attention(name, given, *key[:2]),
    "matmul_float": lambda name, given, key: cuda_expressions.matmul_float(
        name, given, key[0], key[1], ISA.panel
    ),
    **{
        kind: lambda name, given, key, kind=kind: cuda_expressions.rows(name, given, kind, *key)
        for kind in ("layer_norm", "rms_norm", "softmax")
    },
}


class CudaCalls(Calls):
    """The calls of a trace, for a GPU."""

    def __init__(self, *given: Any) -> None:
        self.halves: dict[Any, Ref] = {}  # tensors that were rounded to float16
        super().__init__(*given)

    def add(
        self, kind: str, label: str, key: Any, build: Callable[[str], Any], writer: Writer,
        written: int = 0, also: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """As for a CPU, with the GPU's kernel of that kind."""
        if kind != "skinny":
            if kind not in BUILD:
                raise UnsupportedError(f"'{label}': no '{kind}' kernel for a GPU yet")
            made = BUILD[kind]

            def build(name: str) -> Any:
                return made(name, writer.kernel_arguments(), key)

        super().add(kind, label, key, build, writer, written, also)

    def _linear(self, g: Group, op: Op) -> None:
        weight = op.args[1].storage.weight
        if op in self.integer:
            raise UnsupportedError(f"'{op.label}': GPU targets read float activations as yet")
        if weight is None:
            super()._linear(g, op)
            return
        form = weights_form(weight, op)
        bias = op.args[2] if len(op.args) > 2 else None
        count = prod(op.out.shape[:-1])
        x = self._half(op.args[0], op.label)
        self.constants.held.append(weight)
        packed = self.constant((id(weight.q), form), lambda: _packed(weight, form))
        arguments = [x.storage, packed.storage]
        if not form.group:
            scale = self.constant(
                (id(weight.q), "row scales"),
                lambda: weight.scale.reshape(-1).float().expand(form.rows).contiguous(),
            )
            arguments.append(scale.storage)
        writer = self.writer(op.out.shape, arguments)
        value = writer.step("anchor", "float32")
        if bias is not None:
            value = writer.step("add", "float32", value, writer.value(bias, "float32"))
        writer.keep(op.out, value)
        writer.members(g, self.stored)
        expression, how = writer.expression(), choose(count, form)
        self.add(
            "skinny", op.label, (count, form, expression),
            lambda name: skinny(
                name, writer.kernel_arguments(), count, form, how, expression
            ), writer,
        )  # fmt: skip

    def _half(self, x: Ref, label: str) -> Ref:
        """The tensor in float16, contiguous."""
        key = (id(x.storage), x.offset, x.shape, x.strides)
        if key not in self.halves:
            made = self.temporary(torch.float16, x.shape)
            writer = self.writer(x.shape, [])
            writer.store(made, writer.value(x, "float32"))
            self.pointwise(writer, label)
            self.halves[key] = made
        return self.halves[key]


def weights_form(weight: Weight, op: Op) -> Weights:
    """How a linear's weight is stored.

    Raises:
        UnsupportedError: if no kernel reads its format.
    """
    q, group = weight.q, weight.group
    what = ""
    if q.ndim != 2 or q.dtype != torch.int8 or bool(weight.zero_point.any()):
        what = "weights with a zero point"
    elif group and (group not in GROUPS or weight.axis % 2 != 1 or q.shape[1] % group):
        what = f"groups of {group}"
    elif not group and not (weight.axis == 0 or weight.scale.numel() == 1):
        what = "a scale per input"
    elif q.shape[1] % 8:
        what = f"{q.shape[1]} inputs, not a multiple of 8"
    if what:
        raise UnsupportedError(f"'{op.label}': GPU targets have no kernel for {what} as yet")
    four = int(q.min()) >= -8 and int(q.max()) <= 7
    return Weights(q.shape[0], q.shape[1], 4 if four else 8, group)


def _packed(weight: Weight, form: Weights) -> Tensor:
    scale = weight.scale.reshape(form.rows, -1).float() if form.group else None
    return pack(weight.q, scale, form)
