"""Linears with quantized weights, for a GPU: which kernel, with which partition.

Up to 64 tokens by `skinny`, and more of small weights; else by `gemm` or, on Hopper, by
`gemm_hopper` and `matmul_8bit` (large weights from 33 tokens on). Integers by weights of 4 bits are
multiplied as such up to there, and as float16 beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompiler.backends.edge_group import Group
from qcompiler.backends.edge_integer import Source, scaled
from qcompiler.backends.edge_ops import Op, Ref, Storage, Weight
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.cuda_gemm import Blocks, choose_blocks, gemm
from qcompiler.kernels.cuda_gemm_hopper import gemm_hopper
from qcompiler.kernels.cuda_matmul_8bit import choose_product, matmul_8bit
from qcompiler.kernels.cuda_skinny import choose, skinny
from qcompiler.kernels.cuda_tall import Tall, choose_tall
from qcompiler.kernels.cuda_units import Kind, units
from qcompiler.kernels.cuda_weights import (
    Bytes,
    Form,
    Nibbles,
    Weights,
    Widened,
    pack,
    pack_nibbles,
)

if TYPE_CHECKING:
    from qcompiler.backends.edge_cuda_calls import CudaCalls

GROUPS = (32, 64, 128)
KINDS: dict[torch.dtype, Kind] = {
    torch.int8: "s8", torch.uint8: "u8", torch.float8_e4m3fn: "e4m3",
}  # fmt: skip
FLOAT = "float32"


def packed_linear(calls: CudaCalls, g: Group, op: Op) -> None:
    """A linear with packed weights and float16 activations."""
    weight = op.args[1].storage.weight
    form = weights_form(weight, op.label)
    count = prod(op.out.shape[:-1])
    tall = calls.tall(op)
    x = calls.units(op.args[0], op.label) if tall else calls.half(op.args[0], op.label)
    packed = calls.constant((weight.q, form), lambda: packed_weight(weight, form))
    arguments = [x.storage, packed.storage]
    if not form.group:
        scale = calls.constant(
            (weight.q, "row scales"),
            lambda: row_scales(weight),
        )
        arguments.append(scale.storage)
    if not tall and calls.small(op):
        how = choose(count, form, calls.gpu)
        _multiply(calls, g, op, "skinny", skinny, arguments, count, form, how)
        return
    _many(calls, g, op, arguments, count, form, tall)


def _many(
    calls: CudaCalls, g: Group, op: Op, arguments: list[Storage], count: int,
    form: Weights | Widened, tall: bool, scale: Ref | None = None,
) -> None:  # fmt: skip
    """A product of many tokens; `tall`: by Hopper's warpgroup products."""
    how: Tall | Blocks
    make: Callable[..., Any]
    if tall:
        kind, make, how = "gemm_hopper", gemm_hopper, choose_tall(count, form, stream=True)
    else:
        kind, make, how = "gemm", gemm, choose_blocks(count, form, calls.gpu)
    shared = 0
    if room := how.workspace(count, form):
        held = [calls.temporary(torch.float32, (room,)).storage,
                calls.counters(how.counters(count, form))]  # fmt: skip
        arguments, shared = [*arguments, *held], len(held)
    _multiply(calls, g, op, kind, make, arguments, count, form, how, shared, scale)


def _multiply(
    calls: CudaCalls, g: Group, op: Op, kind: str, make: Callable[..., Any],
    arguments: list[Storage], count: int, form: Weights | Nibbles, how: Any, shared: int = 0,
    scale: Ref | None = None,
) -> None:  # fmt: skip
    """A product and what follows it.

    `shared`: how many of the last arguments are written too. `scale`: of each token, what sums are
    multiplied with.
    """
    bias = op.args[2] if len(op.args) > 2 else None
    also = tuple(range(len(arguments) - shared, len(arguments)))
    writer = calls.writer(op.out.shape, arguments)
    value = writer.step("anchor", FLOAT)
    if scale is not None:
        value = writer.step("mul", FLOAT, value, writer.value(scale, FLOAT))
    if bias is not None:
        value = writer.step("add", FLOAT, value, writer.value(bias, FLOAT))
    writer.keep(op.out, value)
    writer.members(g, calls.stored)
    expression = writer.expression()
    calls.launch(
        kind, op.label, (count, form, how, expression),
        lambda name: make(name, writer.kernel_arguments(), count, form, how, expression),
        writer, also=also,
    )  # fmt: skip


def integer_linear(calls: CudaCalls, g: Group, op: Op, source: Source) -> None:
    """A linear with an input quantized by token: 8-bit weights by channel, or 4 bits in groups."""
    weight, bias = op.args[1].storage.weight, op.args[2] if len(op.args) > 2 else None
    x = calls.quantized.get((source.ref.storage, calls.widened(op)))
    if x is None:
        raise UnsupportedError(
            f"'{op.label}': GPU targets multiply integers where a token has a scale of its own"
        )
    count = prod(op.out.shape[:-1])
    form = integer_form(weight, source.ref.dtype, op.label)
    if isinstance(form, Nibbles):
        _grouped(calls, g, op, source, x, form)
        return
    packed = calls.constant((weight.q, "units"), lambda: packed_weight(weight, form))
    writer = calls.writer(op.out.shape, [x.storage, packed.storage])
    zero = source.zero.storage.constant
    plain = zero is not None and not bool(zero.any())  # nothing to take off for zero points
    writer.keep(op.out, scaled(calls, writer, weight, bias, source, 0, plain))
    writer.members(g, calls.stored)
    expression = writer.expression()
    name = "int8" if form.kind != "e4m3" else form.kind
    if calls.tall(op):
        product = choose_product(count, form.rows, form.depth, form.kind)
        calls.launch(
            f"matmul_{name}", op.label, (product, expression),
            lambda name: matmul_8bit(name, writer.kernel_arguments(), product, expression),
            writer,
        )  # fmt: skip
        return
    how = choose(count, form, calls.gpu)
    calls.launch(
        f"skinny_{name}", op.label, (count, form, how, expression),
        lambda name: skinny(name, writer.kernel_arguments(), count, form, how, expression),
        writer,
    )  # fmt: skip


def _grouped(calls: CudaCalls, g: Group, op: Op, source: Source, x: Ref, form: Nibbles) -> None:
    """A product with 4-bit weights in groups: see `cuda_sums`, and of many tokens `Widened`."""
    weight, count = op.args[1].storage.weight, prod(op.out.shape[:-1])
    packed = calls.constant((weight.q, form), lambda: packed_weight(weight, form))
    arguments = [x.storage, packed.storage]
    if calls.small(op):
        how = choose(count, form, calls.gpu)
        _multiply(calls, g, op, "skinny_int4_int8", skinny, arguments, count, form, how,
                  scale=source.scale)  # fmt: skip
        return
    wide = widened_form(weight, form, op.label)
    _many(calls, g, op, arguments, count, wide, calls.tall(op), source.scale)


def weights_form(weight: Weight, label: str) -> Weights:
    """How a linear's weight is stored; `label`: the linear's name.

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
        raise UnsupportedError(f"'{label}': GPU targets have no kernel for {what} as yet")
    four = int(q.min()) >= -8 and int(q.max()) <= 7
    return Weights(q.shape[0], q.shape[1], 4 if four else 8, group)


def row_scales(weight: Weight) -> Tensor:
    """float32 (N,): the scales of a weight without groups."""
    return weight.scale.reshape(-1).float().expand(len(weight.q)).contiguous()


def packed_weight(weight: Weight, form: Form) -> Tensor:
    """The weight as kernels read it: flat uint8."""
    if isinstance(form, Bytes):
        return units(weight.q)
    scale = weight.scale.reshape(form.rows, -1).float() if form.group else None
    if isinstance(form, Nibbles):
        assert scale is not None
        return pack_nibbles(weight.q, scale, form)
    return pack(weight.q, scale, form)


def integer_form(weight: Weight, activation: torch.dtype, label: str) -> Bytes | Nibbles:
    """How a linear's weight is stored that is multiplied by integers or 8-bit floats.

    Args:
        weight: of 8 bits by channel, or 4 bits in groups.
        activation: dtype of what it is multiplied with.
        label: the linear's name.

    Raises:
        UnsupportedError: if no kernel multiplies them.
    """
    if not weight.group:
        return Bytes(weight.q.shape[0], weight.q.shape[1], KINDS[activation])
    found = weights_form(weight, label)
    if found.bits != 4 or activation != torch.int8:
        raise UnsupportedError(
            f"'{label}': GPU targets multiply weights in groups by integers where they have 4 "
            "bits, and activations are int8"
        )
    return Nibbles(found.rows, found.depth, found.group)


def widened_form(weight: Weight, form: Nibbles, label: str) -> Widened:
    """The form in which many tokens are multiplied with such a weight.

    Raises:
        UnsupportedError: if its scales are too large for that.
    """
    wide = Widened(form.rows, form.depth, form.group)
    if float(weight.scale.max()) > wide.largest:
        raise UnsupportedError(
            f"'{label}': steps of weights above {wide.largest:.0f} have no room in float16, in "
            "which more than 64 tokens are multiplied; keep it in float (--set keep_float=…), or "
            "compile for fewer on tvm: targets (--bucket tokens=1,16,64)"
        )
    return wide
