"""Ops that the code generator does not know, reduced by torch to those that it does.

Torch's own decompositions come first; a few of ours stand where they make less work or where torch
has none. What writes into a tensor is made functional on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qcompiler.backends.edge_formulas import FORMULAS, cut_and_padded, integer_product
from qcompiler.backends.edge_loops import FOLDS, RANKS, SCATTERS
from qcompiler.backends.edge_steps import ELEMENTWISE
from qcompiler.errors import UnsupportedError

aten = torch.ops.aten

# In place, but they only say how the memory is walked.
WALKS = frozenset({
    aten.as_strided_.default, aten.unsqueeze_.default, aten.squeeze_.default, aten.squeeze_.dim,
    aten.squeeze_.dims, aten.transpose_.default, aten.t_.default,
})  # fmt: skip
SUMS = frozenset({aten.sum.dim_IntList, aten.sum.default})
REDUCTIONS = SUMS | {aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default}
EXTREMES = frozenset({aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim})
# Known at the level below: recorded when torch reaches them.
BASIC = ELEMENTWISE | REDUCTIONS | {
    aten._softmax.default, aten.cat.default,
    aten.constant_pad_nd.default, aten.bmm.default, aten.mm.default,
    aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, *FOLDS, *RANKS, *SCATTERS,
}  # fmt: skip
EMPTY = frozenset({aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default})


class Tracer(Protocol):
    """What notes the ops: `edge_trace`."""

    ops: list[Any]

    def record(self, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note an op, unless all that it made are views."""

    def assign(self, target: Tensor, value: Tensor) -> None:
        """From now on the memory of `target` holds `value` there."""


class Recorder(TorchDispatchMode):
    """Records the basic ops that torch reduces an op to."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.tracer = tracer
        # Calls on the way, op and operands: torch's formulas of some ops lead back to themselves.
        self.reducing: list[list[Any]] = []
        self.decompositions = torch._decomp.decomposition_table | FORMULAS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "prim":  # asks for a property
            return func(*args, **kwargs)
        if func in EMPTY:
            return self._zeros(func(*args, **kwargs))
        if not any(isinstance(t, FakeTensor) for t in tensors):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in WALKS:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        if func is aten._softmax.default and args[1] % args[0].ndim != args[0].ndim - 1:
            with self:
                return aten._softmax(args[0].movedim(args[1], -1), -1, False).movedim(-1, args[1])
        if func is aten.index.Tensor:
            moved = self._moved(args)
            if moved is not None:
                return moved
        if func in (aten.bitwise_and.Tensor, aten.__and__.Tensor):
            kept = self._unmasked(*args)
            if kept is not None:
                return kept
        if func in REDUCTIONS and args[0].ndim == 0:
            whole = func in SUMS and not args[0].is_floating_point()
            with self:
                made = kwargs.get("dtype") or (torch.int64 if whole else args[0].dtype)
                return args[0].clone().to(made)
        if func in EXTREMES and args[0].dtype == torch.bool:
            with self:
                found = func(args[0].to(torch.int32), *args[1:], **kwargs)
                return (found[0] != 0, found[1]) if isinstance(found, tuple) else found != 0
        if func in (aten.mm.default, aten.bmm.default) and not args[0].is_floating_point():
            with self:
                return integer_product(*args)
        if func is aten.constant_pad_nd.default and min(args[1], default=0) < 0:
            with self:
                return cut_and_padded(*args)
        call = [func, *pytree.tree_leaves((args, kwargs))]
        reducible = func not in BASIC and not any(_same(call, other) for other in self.reducing)
        if reducible and (not _is_view(func) or func._can_decompose()):
            simpler = self._simpler(func, args)
            if simpler is not None:
                self.reducing.append(call)
                try:
                    with self:
                        result = simpler(*args, **kwargs)
                finally:
                    self.reducing.pop()
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        before = len(self.tracer.ops)
        self.tracer.record(func, args, kwargs, result)
        if len(self.tracer.ops) > before and func not in BASIC and not _copies(func):
            raise UnsupportedError(f"the code generator does not know '{func}'")
        return result

    def _simpler(self, func: Any, args: Any) -> Callable[..., Any] | None:
        """The op in terms of others."""
        known = self.decompositions.get(func)
        if known is None and func.namespace == "prims":  # what torch's own references end in
            packet = getattr(aten, func._schema.name.removeprefix("prims::"), None)
            number = len(args) > 1 and not isinstance(args[1], Tensor)
            names = (*["Scalar"] * number, "self", "Tensor", "default", "Tensor_Tensor")
            known = next((getattr(packet, n) for n in names if hasattr(packet, n)), None)
        if known is None and func._can_decompose():
            known = func.decompose
        found: Callable[..., Any] | None = known
        return found

    def _zeros(self, made: Tensor) -> Tensor:
        """Memory that will be written: zero until then."""
        args = (list(made.shape), 0)
        self.tracer.record(aten.full.default, args, {"dtype": made.dtype}, made)
        return made

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The op computed elsewhere, and its target taken for that from then on."""
        target = args[0]
        name = func._schema.name.removeprefix("aten::")
        if not isinstance(target, FakeTensor) or not name.endswith("_"):
            raise UnsupportedError(f"'{func}' changes a tensor in place")
        with self:
            if name == "copy_":
                value = args[1].to(target.dtype).expand(target.shape)
            elif name in ("fill_", "zero_"):
                number = args[1] if name == "fill_" else 0
                value = torch.full(target.shape, number, dtype=target.dtype)
            else:
                plain = getattr(getattr(aten, name[:-1]), func._overloadname)
                value = plain(*args, **kwargs).to(target.dtype).expand(target.shape)
        self.tracer.assign(target, value)
        return target

    def _unmasked(self, a: Any, b: Any) -> Tensor | None:
        """The other operand, where one is constant and true throughout."""
        for constant, other in ((a, b), (b, a)):
            if isinstance(constant, Tensor) and not isinstance(constant, FakeTensor):
                with _disable_current_modes():
                    true = constant.dtype == torch.bool and bool(constant.all())
                if true and other.dtype == torch.bool:
                    shape = torch.broadcast_shapes(constant.shape, other.shape)
                    kept: Tensor = other.expand(shape)
                    return kept
        return None

    def _moved(self, args: Any) -> Tensor | None:
        """Indexing by constants that is a strided view after all, or None."""
        source, indices = args
        if any(isinstance(i, FakeTensor) for i in indices if i is not None):
            return None
        with _disable_current_modes():
            places = torch.arange(source.numel()).reshape(source.shape)
            taken = places[tuple(slice(None) if i is None else i for i in indices)]
            strides = []
            first = int(taken.flatten()[0]) if taken.numel() else 0
            for dim, size in enumerate(taken.shape):
                step = 0 if size < 2 else int(taken.select(dim, 1).flatten()[0]) - first
                strides.append(step)
            same = torch.full(taken.shape, first)
            for dim, (size, step) in enumerate(zip(taken.shape, strides, strict=True)):
                shape = [1] * taken.ndim
                shape[dim] = size
                same = same + (torch.arange(size) * step).reshape(shape)
            affine = torch.equal(same, taken) and all(s >= 0 for s in strides)
        if not affine or not source.is_contiguous():
            return None
        moved: Tensor = source.as_strided(taken.shape, strides, source.storage_offset() + first)
        return moved


def _same(call: list[Any], other: list[Any]) -> bool:
    """Whether both are of one op and the same operands."""
    return len(call) == len(other) and all(
        a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
        for a, b in zip(call, other, strict=True)
    )


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


def _copies(func: Any) -> bool:
    return func in (aten.clone.default, aten._to_copy.default)
