"""Ops that go along one dimension element by element: running sums, positions of extremes, sorting.

Their kernels are plain loops over a contiguous (outer, count, inner) copy of the tensor.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.backends.edge_steps import NAMES, REDUCE
from qcompiler.errors import UnsupportedError
from qcompiler.kernels.loops import fold, rank, scatter

if TYPE_CHECKING:
    from qcompiler.backends.edge_calls import Calls
    from qcompiler.backends.edge_ops import Op, Ref, Storage

aten = torch.ops.aten

FOLDS = {
    aten.cumsum.default: "cumsum", aten.cumprod.default: "cumprod", aten.prod.dim_int: "prod",
    aten.prod.default: "prod", aten.argmax.default: "argmax", aten.argmin.default: "argmin",
    aten.max.dim: "max", aten.min.dim: "min",
}  # fmt: skip
SCATTERS = frozenset(
    {
        aten.scatter.value, aten.scatter.src, aten.scatter_add.default, aten.index_put.default,
    }
)  # fmt: skip
RANKS = frozenset({aten.sort.default, aten.sort.stable, aten.topk.default})
LONGEST = 1 << 16  # elements of a row that is sorted: each is compared with all others


def _given(op: Op) -> dict[str, Any]:
    schema = op.target._schema.arguments
    found = {a.name: a.default_value for a in schema} | dict(op.kwargs)
    return found | {a.name: v for a, v in zip(schema, op.args, strict=False)}


def _source(calls: Calls, op: Op, dim: int | None) -> tuple[Ref, tuple[int, int, int]]:
    """The input in order, and (outer, count, inner); all of it in a row where `dim` is None."""
    x: Ref = calls.contiguous(op.args[0], op.label)
    if dim is None or not x.shape:
        return x, (1, x.numel, 1)
    dim %= len(x.shape)
    return x, (prod(x.shape[:dim]), x.shape[dim], prod(x.shape[dim + 1 :]))


def folded(calls: Calls, op: Op) -> None:
    """One op of `FOLDS`."""
    kind, given = FOLDS[op.target], _given(op)
    whole = given.get("dim") is None
    x, sizes = _source(calls, op, None if whole else given["dim"])
    made = op.outputs[0].dtype
    if x.dtype != made and kind in ("cumsum", "cumprod", "prod"):  # of bool, int32: int64
        wide = calls.temporary(made, x.shape)
        calls.copy(x, wide, op.label)
        x = wide
    _add(calls, op, kind, x, sizes, {})


def reduced(calls: Calls, op: Op) -> None:
    """A sum or an extreme of integers, exactly."""
    x, made = op.args[0], op.out.dtype
    given = _given(op).get("dim")
    rank = len(x.shape)
    dims = sorted(d % rank for d in given) if given else list(range(rank))
    kept = [d for d in range(rank) if d not in dims]
    order = (*kept, *dims)
    turned = type(x)(x.storage, x.dtype, x.offset, tuple(x.shape[d] for d in order),
                     tuple(x.strides[d] for d in order))  # fmt: skip
    wide = calls.temporary(made, turned.shape)
    calls.copy(turned, wide, op.label)
    sizes = (prod(x.shape[d] for d in kept), prod(x.shape[d] for d in dims), 1)
    kind = {"sum": "sum", "max": "amax", "min": "amin"}[REDUCE[op.target]]
    _add(calls, op, kind, wide, sizes, {})


def ranked(calls: Calls, op: Op) -> None:
    """One op of `RANKS`."""
    given = _given(op)
    x, sizes = _source(calls, op, given["dim"])
    if sizes[1] > LONGEST:
        raise UnsupportedError(f"sorting rows of {sizes[1]} elements; at most {LONGEST}")
    if x.dtype == torch.bool:
        raise UnsupportedError("sorting truth values")
    top = given.get("k", sizes[1])
    down = given["largest"] if "largest" in given else given["descending"]
    _add(calls, op, "rank", x, sizes, {"top": int(top), "descending": bool(down)})


def scattered(calls: Calls, op: Op) -> None:
    """One op of `SCATTERS`."""
    given = _given(op)
    out: Ref = op.out
    calls.copy(op.args[0], out, op.label)
    if op.target is aten.index_put.default:
        found = {d: ref for d, ref in enumerate(given["indices"]) if ref is not None}
        dims, same, add = [*found], False, bool(given["accumulate"])
        first = dims[0] if dims == [*range(dims[0], dims[0] + len(dims))] else 0
        wide = torch.broadcast_shapes(*(ref.shape for ref in found.values()))
        rest = [n for d, n in enumerate(out.shape) if d not in found]
        shape, values = (*rest[:first], *wide, *rest[first:]), given["values"]
    else:
        dim = given["dim"] % max(len(out.shape), 1)
        found, first, same, shape = {dim: given["index"]}, 0, True, given["index"].shape
        add = op.target is aten.scatter_add.default
        values = given["value"] if "value" in given else given["src"]
    if add and out.dtype not in (torch.float32, torch.int64, torch.int32):
        raise UnsupportedError(f"'{op.target}' on {out.dtype}")
    if not isinstance(values, bool | int | float) and same:  # what is beyond the index is not read
        values = type(values)(values.storage, values.dtype, values.offset, shape, values.strides)
    writer = calls.writer(tuple(shape), [])
    writer.value(values, NAMES[out.dtype])
    place, indices, numbers = writer.spots(out, found, first, same)
    source = writer.expression()
    calls.add(
        "scatter", op.label, (source, place, indices, numbers, add),
        lambda name: scatter(
            name, writer.kernel_arguments(), source, place, indices, numbers, add
        ), writer, also=(place.argument,),
    )  # fmt: skip


def _add(
    calls: Calls, op: Op, kind: str, x: Ref, sizes: tuple[int, int, int], more: dict[str, Any]
) -> None:
    """The call; outputs that are not contiguous are copied into place."""
    outputs: list[Storage] = []
    late = []
    for ref in op.outputs:
        if ref.contiguous and ref.offset == 0:
            outputs.append(ref.storage)
        else:
            made = calls.temporary(ref.dtype, ref.shape)
            outputs.append(made.storage)
            late.append((made, ref))
    writer = calls.writer((1,), [*outputs, x.storage])
    start, dtype = x.offset, NAMES[x.dtype]
    key = (sizes, dtype, start, tuple(more.items()))
    if kind == "rank":
        build = lambda name: rank(  # noqa: E731 - named as the other case
            name, writer.kernel_arguments(), sizes, start, dtype, **more
        )
    else:
        build = lambda name: fold(  # noqa: E731 - named as the other case
            name, writer.kernel_arguments(), kind, sizes, start, dtype
        )
    calls.add(kind, op.label, key, build, writer, written=len(outputs))
    for made, ref in late:
        calls.copy(made, ref, op.label)
