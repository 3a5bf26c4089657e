"""Each group as kernel calls for a GPU.

The grouping, the expressions and the memory plan are those of the CPU targets; kernels are replaced
by those for a GPU. Products with quantized weights run on tensor cores (`edge_cuda_linear`). What
they read is stored in float16, by the kernel that makes it where that is possible, or quantized to
units of 8-bit integers where the plan says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from qcompiler import ops
from qcompiler.backends import edge_steps
from qcompiler.backends.edge_attention import ATTENTION, attended
from qcompiler.backends.edge_calls import Calls
from qcompiler.backends.edge_cuda_attention import attention_by_tiles, by_tiles, rows_aligned
from qcompiler.backends.edge_cuda_cache import attention_over_cache
from qcompiler.backends.edge_cuda_linear import integer_linear, packed_linear
from qcompiler.backends.edge_cuda_products import is_tall, small_product
from qcompiler.backends.edge_group import ANCHORS, ROWS, Group, Writer, whole
from qcompiler.backends.edge_integer import Source
from qcompiler.backends.edge_ops import Op, Ref, Storage
from qcompiler.backends.edge_rotate import factors_of
from qcompiler.backends.edge_rows import norm_operands
from qcompiler.backends.edge_trace import OVERWRITE
from qcompiler.cached import CACHED
from qcompiler.errors import UnsupportedError
from qcompiler.kernels import cuda_attention, cuda_expressions, cuda_loops
from qcompiler.kernels.cuda_code import Gpu
from qcompiler.kernels.cuda_hadamard import Rotation, rotate_rows
from qcompiler.kernels.cuda_quantize import Norm, half_units, quantize_units
from qcompiler.kernels.cuda_skinny import FEW
from qcompiler.kernels.cuda_units import unit_bytes
from qcompiler.kernels.isa import SCALAR
from qcompiler.kernels.packing import Packing
from qcompiler.op_families import LINEAR
from qcompiler.qtype import QType

ISA = SCALAR  # what remains of a CPU: float panels of 16 columns
FLOAT = "float32"

# What `edge_loops` folds along a dimension.
FOLDED = (
    "cumsum", "cumprod", "sum", "prod", "argmax", "argmin", "max", "min", "amax", "amin",
)  # fmt: skip
# Kernel → how it is built from the name, the arguments and the call's key.
BUILD: dict[str, Callable[..., Any]] = {
    "elementwise": cuda_expressions.elementwise,
    "depthwise": lambda name, given, key: cuda_expressions.depthwise(name, given, *key[:2]),
    "rotate": lambda name, given, key: rotate_rows(name, given, *key),
    "reduce": lambda name, given, key: cuda_expressions.reduction(name, given, *key),
    "attention": lambda name, given, key: cuda_attention.attention(name, given, *key[:2]),
    "matmul_float": lambda name, given, key: cuda_expressions.matmul_float(
        name, given, key[0], key[1], ISA.panel
    ),
    "pool": lambda name, given, key: cuda_expressions.reduction(
        name, given, key[0], key[1], 4, key[2]
    ),
    "scatter": lambda name, given, key: cuda_loops.scatter(name, given, *key),
    "rank": lambda name, given, key: cuda_loops.rank(name, given, *key[:3], **dict(key[3])),
    **{
        kind: lambda name, given, key, kind=kind: cuda_loops.fold(name, given, kind, *key[:3])
        for kind in FOLDED
    },
    **{
        kind: lambda name, given, key, kind=kind: cuda_expressions.rows(name, given, kind, *key)
        for kind in ("layer_norm", "rms_norm", "softmax")
    },
}


class _HalfWriter(Writer):
    """Stores what products read in float16, beside float32 or instead."""

    halves: dict[Storage, tuple[Ref, bool]]

    def store(self, ref: Ref, index: int) -> None:
        """Write a value to memory."""
        found, maker = self.halves.get(ref.storage), ref.storage.maker
        if found is None or maker is None or not whole(ref, maker.out):
            super().store(ref, index)
            return
        half, alone = found
        super().store(Ref(half.storage, half.dtype, 0, ref.shape, ref.strides), index)
        if not alone:
            super().store(ref, index)


class CudaCalls(Calls):
    """The calls of a trace, for a GPU."""

    def __init__(self, gpu: Gpu, *given: Any) -> None:
        self.gpu = gpu
        self.rounded: dict[Any, Ref] = {}  # tensors that were rounded to float16
        self.halves: dict[Storage, tuple[Ref, bool]] | None = None  # by storage; whether it alone
        # Units of quantized rows, by the storage of the integers and whether they are float16.
        self.quantized: dict[tuple[Storage, bool], Ref] = {}
        self.norms: dict[Storage, Group] = {}  # and rotations, computed where they are quantized
        self.counting: list[Storage] = []  # one at most
        super().__init__(*given)
        for storage in self.counting:
            self.fill(Ref(storage, torch.int32, 0, (storage.size,), (1,)), 0, "counters")
            self.calls.insert(0, self.calls.pop())

    def _layers(self) -> tuple[dict[Op, Source], dict[Op, Packing]]:
        """As for a CPU; filters are multiplied as floats, packed or not."""
        integer, packings = super()._layers()
        return integer, {op: form for op, form in packings.items() if op.target is LINEAR}

    def add(
        self, kind: str, label: str, key: Any, build: Callable[[str], Any], writer: Writer,
        written: int = 0, also: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """As for a CPU, with the GPU's kernel of that kind."""
        if kind not in BUILD:
            raise UnsupportedError(f"'{label}': no '{kind}' kernel for a GPU yet")
        made = BUILD[kind]
        self.launch(
            kind, label, key, lambda name: made(name, writer.kernel_arguments(), key), writer,
            written, also,
        )  # fmt: skip

    def launch(
        self, kind: str, label: str, key: Any, build: Callable[[str], Any], writer: Writer,
        written: int = 0, also: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Note a call of a GPU's kernel; see `Calls.add`."""
        super().add(kind, label, key, build, writer, written, also)

    def writer(
        self, shape: tuple[int, ...], arguments: list[Storage], order: tuple[int, ...] | None = None
    ) -> Writer:
        """A writer of expressions over that shape."""
        made = _HalfWriter(
            shape, self.grouping.inlined, arguments, self.constants, order, self.isa.fused,
            self.moved,
        )  # fmt: skip
        made.halves = self._halves()
        return made

    def counters(self, count: int) -> Storage:
        """int32 numbers that are zero before and after each kernel."""
        if not self.counting:
            self.counting.append(Storage(torch.int32, count))
        self.counting[0].size = max(self.counting[0].size, count)
        return self.counting[0]

    def _halves(self) -> dict[Storage, tuple[Ref, bool]]:
        """Tensors that their kernels store in float16, found once."""
        if self.halves is None:
            self.halves = self._stored_as_halves()
        return self.halves

    def _stored_as_halves(self) -> dict[Storage, tuple[Ref, bool]]:
        found: dict[Storage, tuple[Ref, bool]] = {}
        final = {ref.storage for ref in self.trace.outputs}
        for x in [x for op in self.trace.ops for x in self._as_halves(op)]:
            maker, storage = x.storage.maker, x.storage
            if maker is None or maker in self.grouping.inlined or not maker.out.contiguous:
                continue
            made = edge_steps.writes(maker) or maker.target in ANCHORS
            if storage not in found and made and maker.out.numel == storage.size:
                alone = all(
                    any(read.storage is storage for read in self._as_halves(r))
                    for r in storage.readers
                )
                half = self.temporary(torch.float16, maker.out.shape)
                found[storage] = half, alone and storage not in final
        return found

    def _as_halves(self, op: Op) -> list[Ref]:
        """What it reads as it lies in memory, but in float16."""
        if op.target is LINEAR:
            x, weight = op.args[0], op.args[1].storage.weight
            plain = weight is not None and op not in self.integer and not self.tall(op)
            return [x] if plain and x.contiguous and x.numel == x.storage.size else []
        if op.target in ATTENTION and by_tiles(attended(op)):
            return [x for x in attended(op).tensors if rows_aligned(x)]
        return []

    def tall(self, op: Op) -> bool:
        """Whether Hopper's warpgroup products compute it, which read units."""
        count, size = prod(op.out.shape[:-1]), prod(op.args[1].shape)
        return is_tall(count, size, self.gpu) and (
            op in self.integer or count * size > small_product(self.gpu)
        )

    def widened(self, op: Op) -> bool:
        """Whether integers and weights of 4 bits are multiplied in float16."""
        return op in self.integer and op.args[1].storage.weight.group > 0 and not self.small(op)

    def small(self, op: Op) -> bool:
        """Whether the kernel for few tokens takes it, however many there are."""
        count = prod(op.out.shape[:-1])
        return count <= FEW or count * prod(op.args[1].shape) <= small_product(self.gpu)

    def _group(self, g: Group) -> None:
        op = g.anchor
        if op is not None and op.target in CACHED:
            attention_over_cache(self, g, op)
        elif op is not None and op.target is ops.dynamic_quantize:
            self._quantize(op)
        elif op is not None and self._joins_quantization(g, op):
            self.norms[op.out.storage] = g
        else:
            super()._group(g)

    def _joins_quantization(self, g: Group, op: Op) -> bool:
        """Whether a norm or a rotation is read by nothing but one quantization by token."""
        readers = op.out.storage.readers
        return (
            (op.target is ops.rotate or ROWS.get(op.target) in ("layer_norm", "rms_norm"))
            and not g.members
            and [r.target for r in readers] == [ops.dynamic_quantize]
            and whole(readers[0].args[0], op.out)
            and not any(o.target is OVERWRITE for o in self.trace.ops)
        )

    def _quantize(self, op: Op) -> None:
        """`qc::dynamic_quantize` by token, for integer products alone: units."""
        x, kind = op.args[0], QType.parse(op.args[1])
        q, scale, zero = op.outputs
        layers = [layer for r in q.storage.readers for layer in r.out.storage.readers]
        if kind.granularity != "token" or not all(
            layer in self.integer and layer.args[0].storage.maker in q.storage.readers
            for layer in layers
        ):
            raise UnsupportedError(
                f"'{op.label}': GPU targets quantize activations by token, for linears alone"
            )
        width, rows = x.shape[-1], x.numel // x.shape[-1]
        arguments = []
        kinds = tuple(sorted({self.widened(layer) for layer in layers}))
        for wide in kinds:
            made = self.temporary(torch.uint8, (unit_bytes(rows, width, 1 + wide),))
            self.quantized[q.storage, wide] = made
            arguments.append(made.storage)
        arguments.append(scale.storage)
        if kind.symmetric:
            zero.storage.constant = torch.zeros(zero.storage.size, dtype=zero.dtype)
        else:
            arguments.append(zero.storage)
        joined = self.norms.get(x.storage)
        writer = self.writer(x.shape, arguments)
        maker = joined.anchor if joined is not None else None
        writer.value(x if maker is None else maker.args[0], FLOAT)
        source = writer.expression()
        before: Norm | Rotation | None = None
        if maker is not None and maker.target is ops.rotate:
            before = Rotation(width, *factors_of(self, maker, writer))
        elif joined is not None:
            before = self._norm(joined, arguments)
        self.launch(
            "quantize_rows", op.label, (source, kind, before, kinds),
            lambda name: quantize_units(
                name, writer.kernel_arguments(), source, kind, before, kinds
            ), writer, written=len(kinds) + (1 if kind.symmetric else 2),
        )  # fmt: skip

    def _norm(self, g: Group, arguments: list[Storage]) -> Norm:
        """A norm whose result the quantization computes itself."""
        op = g.anchor
        assert op is not None
        scale, shift, epsilon = norm_operands(op)
        writer = self.writer(op.out.shape, arguments)
        value = writer.step("anchor", FLOAT)
        if scale is not None:
            value = writer.step("mul", FLOAT, value, writer.value(scale, FLOAT))
        if shift is not None:
            writer.step("add", FLOAT, value, writer.value(shift, FLOAT))
        return Norm(ROWS[op.target] == "layer_norm", epsilon, writer.expression())

    def _attention(self, g: Group, op: Op) -> None:
        if by_tiles(attended(op)):
            attention_by_tiles(self, g, op)
        else:
            super()._attention(g, op)

    def stored_half(self, x: Ref) -> Ref | None:
        """The same view of what is stored in float16, where it is."""
        found = self._halves().get(x.storage)
        if found is None:
            return None
        return Ref(found[0].storage, torch.float16, x.offset, x.shape, x.strides)

    def _linear(self, g: Group, op: Op) -> None:
        if op in self.integer:
            integer_linear(self, g, op, self.integer[op])
        elif op.args[1].storage.weight is None:
            super()._linear(g, op)
        else:
            packed_linear(self, g, op)

    def half(self, x: Ref, label: str) -> Ref:
        """The tensor in float16, contiguous."""
        found = self.stored_half(x)
        if found is not None and x.contiguous and x.numel == x.storage.size:
            return found
        key = (x.storage, x.offset, x.shape, x.strides)
        if key not in self.rounded:
            made = self.temporary(torch.float16, x.shape)
            writer = self.writer(x.shape, [])
            writer.store(made, writer.value(x, FLOAT))
            self.pointwise(writer, label)
            self.rounded[key] = made
        return self.rounded[key]

    def units(self, x: Ref, label: str) -> Ref:
        """The tensor's rows as units of float16."""
        key = (x.storage, x.offset, x.shape, x.strides, "units")
        if key not in self.rounded:
            width = x.shape[-1]
            made = self.temporary(torch.uint8, (unit_bytes(x.numel // width, width, 2),))
            writer = self.writer(x.shape, [made.storage])
            writer.value(x, FLOAT)
            source = writer.expression()
            self.launch(
                "half_units", label, source,
                lambda name: half_units(name, writer.kernel_arguments(), source), writer, written=1,
            )  # fmt: skip
            self.rounded[key] = made
        return self.rounded[key]
