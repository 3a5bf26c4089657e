"""Rows on a GPU, step by step, on the way to matrix products: each number is read once.

    x = steps(x_0, x_1, …)      sums, products, activation functions, norms

What comes out is x in float16, as rows or as units (`cuda_units`), or quantized with a range for
each row (`cuda_round`), and what else is read of the steps. A block holds a row in registers, in
float32; what is stored on the way goes on as it was stored, rounded to float16.

    rms_norm: y = x / √(mean x² + ε) · scale                  Zhang and Sennrich 2019, eq. 4
    layer_norm: y = (x − mean) / √(var + ε) · scale + shift   Ba et al. 2016, eq. 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import code
from qcompiler.kernels.code import Argument, Size
from qcompiler.kernels.cuda_code import (
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    tokens_of,
    value,
)
from qcompiler.kernels.cuda_device import DEVICE
from qcompiler.kernels.cuda_round import place_in_units, range_of, store_quantized
from qcompiler.kernels.cuda_units import UNIT_BYTES
from qcompiler.kernels.scalar_ops import binary, unary
from qcompiler.qtype import QType

PIECE = 8  # numbers that a thread reads at once
HELD = 32  # numbers of a value that a thread holds at most
MOST_THREADS = 1024
NORMS = ("rms_norm", "layer_norm")
PLAIN = ("float16", "units")  # outputs that are float16
QUANTIZED = ("int8", "wide")  # units of integers: of 8 bits, and as float16 for `Widened` weights

DEVICE["qc_load8_float"] = (
    "void",
    """__device__ __forceinline__ void qc_load8_float(float* to, const void* from) {
  *(float4*)to = ((const float4*)from)[0];
  *(float4*)(to + 4) = ((const float4*)from)[1];
}""",
)
# As they come back from memory.
DEVICE["qc_round8"] = (
    "void",
    """#include <cuda_fp16.h>
__device__ __forceinline__ void qc_round8(float* x) {
  for (int i = 0; i < 8; ++i) x[i] = __half2float(__float2half_rn(x[i]));
}""",
)


@dataclass(frozen=True)
class RowStep:
    """One step.

    Attributes:
        kind: as in `generated.Step`, but no rotation.
        operands: numbers of values: inputs first, then steps.
        constants: sizes of its constants: 1, or the width.
        epsilon: of norms.
    """

    kind: str
    operands: tuple[int, ...]
    constants: tuple[int, ...] = ()
    epsilon: float = 0.0


@dataclass(frozen=True)
class Steps:
    """What is computed of each row.

    Attributes:
        width: numbers of a row, a multiple of 8.
        inputs: matrices that are read.
        steps: the last one's value is what comes out; without any, the first input.
        kept: values that are stored as float16 rows too.
        outputs: forms that come out, of `PLAIN` or of `QUANTIZED`.
        kind: the format of the latter: 8 bits by token.
    """

    width: int
    inputs: int
    steps: tuple[RowStep, ...]
    kept: tuple[int, ...]
    outputs: tuple[str, ...]
    kind: QType | None = None

    @property
    def shifted(self) -> bool:
        """Whether each row has a zero point, not always zero."""
        kind = self.kind
        return kind is not None and not kind.floating and not (kind.symmetric and not kind.middle)

    @property
    def padded(self) -> int:
        """Columns that are written: units are filled up with zeros."""
        sizes = {"float16": PIECE, "int8": UNIT_BYTES}
        size = max(sizes.get(output, UNIT_BYTES // 2) for output in self.outputs)
        return -(-self.width // size) * size

    @property
    def offsets(self) -> list[list[int]]:
        """Where each step's constants begin, in float32 numbers, 32 bytes aligned."""
        found, end = list[list[int]](), 0
        for step in self.steps:
            found.append([])
            for size in step.constants:
                found[-1].append(end)
                end += -(-size // PIECE) * PIECE
        return found

    def arguments(self, tokens: int = 0) -> list[Argument]:
        """What the kernel is given, in order, before the number of tokens."""

        def rows(name: str) -> Argument:
            return Argument(name, "float16", tokens * self.width)

        given = [rows(f"input_{i}") for i in range(self.inputs)]
        if any(step.constants for step in self.steps):
            given.append(Argument("constants", "float32", 1))
        given += [rows(f"kept_{i}") for i in range(len(self.kept))]
        for output in self.outputs:
            given.append(rows("x") if output == "float16" else Argument(output, "uint8", 1))
        if self.kind is not None:
            given.append(Argument("token_scales", "float32", tokens))
        if self.shifted:
            given.append(Argument("token_zeros", "int32", tokens))
        return given


def steps(name: str, arguments: Sequence[Argument | Size], what: Steps, rows: int) -> CudaKernel:
    """The kernel.

    Args:
        name: of the function.
        arguments: `what.arguments`; the last may be the number of rows, given by the call.
        what: is computed.
        rows: of the matrices, where the call does not say.

    Raises:
        UnsupportedError: if a row is too long for a block's registers.
    """
    pieces = what.padded // PIECE
    each = max(1, min(HELD // PIECE, pieces // 128), -(-pieces // MOST_THREADS))
    threads = -(-pieces // each // WARP) * WARP
    if each * PIECE > HELD or what.width % PIECE:
        raise UnsupportedError(f"GPU targets compute no steps on rows of {what.width} numbers")
    memory_bytes = threads // WARP * 4 + 16
    grid = (tokens_of(arguments, rows),)
    with cuda_kernel(name, arguments, grid, threads, memory_bytes) as (
        made, buffers, (row,), thread, memory,
    ):  # fmt: skip
        held = {a.name: buffer for a, buffer in zip(arguments, buffers, strict=False)}
        body = _Row(what, held, row, thread, memory, threads, each)
        call("qc_after_previous")
        call("qc_let_next")
        body.compute()
        (body.quantize if what.kind is not None else body.store)()
    return made


class _Row:
    """The row of a block: each thread holds `each` pieces of eight numbers of every value."""

    def __init__(
        self, what: Steps, buffers: dict[str, Any], row: Any, thread: Any, memory: Any,
        threads: int, each: int,
    ) -> None:  # fmt: skip
        self.what, self.buffers, self.row, self.memory = what, buffers, row, memory
        self.thread, self.threads, self.each = thread, threads, each
        self.start = T.Bind(T.cast(row, "int64") * what.width)
        self.values: dict[int, Any] = {}

    def column(self, i: int) -> Any:
        """The first of piece i."""
        return (i * self.threads + self.thread) * PIECE

    def compute(self) -> None:
        """All steps; those between norms piece by piece, so that few numbers live at once."""
        what, first = self.what, 0
        norms = [n for n, step in enumerate(what.steps) if step.kind in NORMS]
        for norm in norms:
            self._elementwise(first, norm)
            self._norm(norm)
            first = norm + 1
        self._elementwise(first, len(what.steps))

    def _value(self, number: int) -> Any:
        """A value's registers: zero beyond the row."""
        if number not in self.values:
            self.values[number] = made = registers(self.each * PIECE, "float32")
            for i in range(self.each * PIECE):
                T.buffer_store(made, T.float32(0), [i])
        return self.values[number]

    def _elementwise(self, first: int, end: int) -> None:
        """The steps from `first` up to `end`, and inputs where nothing has read them before."""
        what = self.what
        needed = {n for step in what.steps[first : end + 1] for n in step.operands}
        if not what.steps:
            needed = {0}
        fresh = [n for n in sorted(needed) if n < what.inputs and n not in self.values]
        made = [n + what.inputs for n in range(first, end)]
        for number in (*fresh, *made):
            self._value(number)
        for i in range(self.each):
            with T.If(self.column(i) < what.width), T.Then():
                for number in fresh:
                    source = self.buffers[f"input_{number}"]
                    call("qc_load8", self._piece(number, i),
                         address(source, self.start + self.column(i)))  # fmt: skip
                for number in made:
                    self._step(number - what.inputs, i)
                    self._keep(number, i)

    def _piece(self, number: int, i: int) -> Any:
        return address(self.values[number], i * PIECE, PIECE)

    def _constant(self, step: int, which: int, i: int) -> Any:
        """Eight numbers of a step's constant."""
        found = registers(PIECE, "float32")
        buffer, at = self.buffers["constants"], self.what.offsets[step][which]
        if self.what.steps[step].constants[which] == 1:
            for j in range(PIECE):
                T.buffer_store(found, buffer[at], [j])
        else:
            call("qc_load8_float", address(found, 0, PIECE), address(buffer, at + self.column(i)))
        return found

    def _step(self, number: int, i: int) -> None:
        step = self.what.steps[number]
        to = self.values[number + self.what.inputs]
        given = [self.values[n] for n in step.operands]
        constant = self._constant(number, 0, i) if step.constants else None
        for j in range(PIECE):
            x = [T.Bind(buffer[i * PIECE + j]) for buffer in given]
            x += [constant[j]] if constant is not None else []
            made = (
                binary(step.kind, 1, "float32", *x)
                if len(x) > 1
                else unary(step.kind, 1, "float32", x[0], ())
            )
            T.buffer_store(to, made, [i * PIECE + j])

    def _keep(self, number: int, i: int) -> None:
        if number in self.what.kept:
            to = self.buffers[f"kept_{self.what.kept.index(number)}"]
            call("qc_round8", self._piece(number, i))
            call("qc_store8", address(to, self.start + self.column(i)), self._piece(number, i))

    def _over(self, start: float, step: Any, x: Any, over: str) -> Any:
        """step(total, number) over the row; each thread gets the result."""
        total = registers(1, "float32")
        T.buffer_store(total, T.float32(start), [0])
        for i in range(self.each):
            with T.If(self.column(i) < self.what.width), T.Then():
                for j in range(PIECE):
                    T.buffer_store(total, step(total[0], x[i * PIECE + j]), [0])
        warps = self.threads // WARP
        return T.Bind(value(f"qc_block_{over}", total[0], address(self.memory), warps))

    def _norm(self, number: int) -> None:
        what, step = self.what, self.what.steps[number]
        x, to = self.values[step.operands[0]], self._value(number + what.inputs)
        part = code.number(1 / what.width, 1)
        mean: Any = T.float32(0)
        if step.kind == "layer_norm":
            mean = T.Bind(self._over(0.0, lambda t, v: t + v, x, "sum") * part)
        power = self._over(0.0, lambda t, v: code.fma(v - mean, v - mean, t, 1), x, "sum")
        power = code.fma(power, part, code.number(step.epsilon, 1), 1)
        factor = T.Bind(T.float32(1) / code.intrinsic("llvm.sqrt", "float32", power))
        for i in range(self.each):
            with T.If(self.column(i) < what.width), T.Then():
                constants = [self._constant(number, n, i) for n in range(len(step.constants))]
                for j in range(PIECE):
                    made = (x[i * PIECE + j] - mean) * factor
                    made = made * constants[0][j] if constants else made
                    made = made + constants[1][j] if len(constants) > 1 else made
                    T.buffer_store(to, made, [i * PIECE + j])
                self._keep(number + what.inputs, i)

    @property
    def _last(self) -> int:
        return self.what.inputs + len(self.what.steps) - 1 if self.what.steps else 0

    def store(self) -> None:
        """The result in float16."""
        across = -(-self.what.width * 2 // UNIT_BYTES)
        for i in range(self.each):
            mine = self._piece(self._last, i)
            for output in self.what.outputs:
                rows = output == "float16"
                inside = self.what.width if rows else across * UNIT_BYTES // 2
                with T.If(self.column(i) < inside), T.Then():
                    at = self.start + self.column(i)
                    if not rows:
                        at = place_in_units(self.row, self.column(i) * 2, across)
                    to = self.buffers["x" if rows else output]
                    call("qc_store8", address(to, at), mine)

    def quantize(self) -> None:
        """The result as integers, or 8-bit floats, with its range."""
        what, kind, x = self.what, self.what.kind, self.values[self._last]
        assert kind is not None

        found = range_of(kind, lambda step: self._over(0.0, step, x, "max"))
        with T.If(self.thread == 0), T.Then():
            T.buffer_store(self.buffers["token_scales"], found.scale, [self.row])
            if what.shifted:
                T.buffer_store(self.buffers["token_zeros"], T.Cast("int32", found.zero), [self.row])
        for output in what.outputs:
            wide = output == "wide"
            across = -(-what.width * (1 + wide) // UNIT_BYTES)
            for i in range(self.each):
                with T.If(self.column(i) * (1 + wide) < across * UNIT_BYTES), T.Then():
                    mine, column = address(x, i * PIECE, PIECE), self.column(i)
                    store_quantized(self.buffers[output], self.row, column, across, wide, mine,
                                    PIECE, kind, found)  # fmt: skip
