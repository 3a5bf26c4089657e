"""Attention on a GPU over keys and values that are tensors.

    out = softmax(q K · scale + mask) V

A block computes one query of one head: each warp takes keys in turn, its lanes along the head;
scores stay in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcompiler.errors import UnsupportedError
from qcompiler.kernels import code
from qcompiler.kernels.code import Argument
from qcompiler.kernels.cuda_code import (
    HOPPER,
    WARP,
    CudaKernel,
    address,
    call,
    cuda_kernel,
    registers,
    value,
)
from qcompiler.kernels.cuda_expressions import SCRATCH
from qcompiler.kernels.expression import Access, Emitter, Expression
from qcompiler.kernels.heads import NEVER, Heads, place

THREADS = 256
WARPS = THREADS // WARP


def attention(
    name: str, arguments: Sequence[Argument], heads: Heads, expression: Expression
) -> CudaKernel:
    """Attention over tensors; see `attention.attention`."""
    group = heads.heads // heads.kv_heads
    shared = SCRATCH + (heads.size + heads.value_size * WARPS + heads.keys) * 4
    _demand(shared, heads.keys)
    blocks = (heads.queries, heads.heads, heads.batch)
    with cuda_kernel(name, arguments, blocks, THREADS, shared) as (
        made, buffers, (query, head, member), thread, memory,
    ):  # fmt: skip
        emitter = Emitter(expression, buffers)
        call("qc_after_previous")
        call("qc_let_next")

        def read(access: Access, of: Any, position: Any, element: Any) -> Any:
            at = place(access, member, of, position) + element * access.strides[3]
            return buffers[access.argument][at]

        mask = heads.mask

        def hidden(score: Any, t: Any) -> Any:
            if mask is None:
                return score
            a, b, c, d = mask.strides
            held = buffers[mask.argument]
            found = held[mask.offset + member * a + head * b + query * c + t * d]
            if mask.dtype == "bool":
                return T.Select(found != 0, score, T.float32(NEVER))
            return score + found

        def finish(element: Any, result: Any) -> None:
            if heads.merged:
                emitter.vector([member, query], head * heads.value_size + element, 1, result)
            else:
                emitter.vector([member, head, query], element, 1, result)

        end = T.min(query + (heads.keys - heads.queries + 1), heads.keys)
        _one_query(
            thread, memory, shared, heads.size, heads.value_size, heads.scale, T.int32(0),
            T.Bind(end) if heads.causal else T.int32(heads.keys),
            lambda d: read(heads.q, head, query, d),
            lambda t, d: read(heads.k, head // group, t, d),
            lambda t, d: read(heads.v, head // group, t, d), hidden, finish,
        )  # fmt: skip
    return made


def _demand(shared: int, keys: int) -> None:
    if shared > HOPPER.shared:
        raise UnsupportedError(
            f"attention over {keys} keys: the scores of a query don't fit into a GPU's shared "
            f"memory ({shared} of {HOPPER.shared} bytes); ask for a smaller capacity (--bucket)"
        )


def _one_query(
    thread: Any, memory: Any, shared: int, size: int, value_size: int, scale: float, first: Any,
    end: Any, q: Callable[[Any], Any], k: Callable[[Any, Any], Any], v: Callable[[Any, Any], Any],
    hidden: Callable[[Any, Any], Any] | None, finish: Callable[[Any, Any], None],
) -> None:  # fmt: skip
    """One query over keys first … end − 1.

    Args:
        thread: index in the block.
        memory, shared: shared memory and its bytes.
        size, value_size: of a head.
        scale: of scores.
        first, end: keys that are seen.
        q: element → number.
        k, v: key, element → number.
        hidden: score, key → the score with the mask.
        finish: element, result → stores it.
    """
    floats = T.decl_buffer((shared // 4,), "float32", data=memory.data, scope="shared.dyn")
    query, parts = SCRATCH // 4, SCRATCH // 4 + size
    scores = parts + value_size * WARPS
    lane, warp = T.Bind(thread % WARP), T.Bind(thread // WARP)
    for start in range(0, size, THREADS):
        with T.If(thread + start < size), T.Then():
            call("qc_put", address(floats, query + start + thread), q(thread + start))
    call("qc_sync")
    top = registers(1, "float32")
    T.buffer_store(top, T.float32(-3.4e38), [0])
    with T.serial(0, (end - first + (WARPS - 1)) // WARPS) as turn:
        t = T.Bind(first + turn * WARPS + warp)
        with T.If(t < end), T.Then():
            dot = registers(1, "float32")
            T.buffer_store(dot, T.float32(0), [0])
            for start in range(0, size, WARP):
                element = lane + start
                with T.If(element < size), T.Then():
                    given = value("qc_get", address(floats, query + element))
                    T.buffer_store(dot, code.fma(given, k(t, element), dot[0], 1), [0])
            score: Any = value("qc_warp_sum", dot[0]) * code.number(scale, 1)
            score = T.Bind(hidden(score, t) if hidden is not None else score)
            T.buffer_store(top, code.maximum(top[0], score), [0])
            with T.If(lane == 0), T.Then():
                call("qc_put", address(floats, scores + t - first), score)
    highest = T.Bind(value("qc_block_max", top[0], address(memory), WARPS))
    total = registers(1, "float32")
    T.buffer_store(total, T.float32(0), [0])
    with T.serial(0, (end - first + (THREADS - 1)) // THREADS) as turn:
        index = T.Bind(turn * THREADS + thread)
        with T.If(index < end - first), T.Then():
            spot = address(floats, scores + index)
            power = code.exp(value("qc_get", spot) - highest, 1)
            call("qc_put", spot, power)
            T.buffer_store(total, total[0] + power, [0])
    factor = T.Bind(T.float32(1) / value("qc_block_sum", total[0], address(memory), WARPS))
    # Each warp adds up the values of its own keys; then the warps' sums are added in order.
    wide = -(-value_size // WARP)
    sums = registers(wide, "float32")
    for i in range(wide):
        T.buffer_store(sums, T.float32(0), [i])
    with T.serial(0, (end - first + (WARPS - 1)) // WARPS) as turn:
        index = T.Bind(turn * WARPS + warp)
        with T.If(index < end - first), T.Then():
            weight = T.Bind(value("qc_get", address(floats, scores + index)))
            for i in range(wide):
                element = lane + i * WARP
                with T.If(element < value_size), T.Then():
                    T.buffer_store(
                        sums, code.fma(weight, v(first + index, element), sums[i], 1), [i]
                    )
    for i in range(wide):
        element = lane + i * WARP
        with T.If(element < value_size), T.Then():
            call("qc_put", address(floats, parts + warp * value_size + element), sums[i])
    call("qc_sync")
    for start in range(0, value_size, THREADS):
        element = T.Bind(thread + start)
        with T.If(element < value_size), T.Then():
            result: Any = T.float32(0)
            for w in range(WARPS):
                result = result + value("qc_get", address(floats, parts + w * value_size + element))
            finish(element, T.Bind(result * factor))
