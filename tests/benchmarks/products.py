"""Our matrix products beside ONNX Runtime's: int8 × int8 and few-bit weights × int8, one thread.

    python tests/benchmarks/products.py [--realtime]

Both candidates of a shape take turns in one process; a ratio is the median over the rounds of the
peer's time divided by ours in the same round. Ours write float32 through scales, as MatMulNBits
does; MatMulInteger writes int32 alone, so it does less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "1")

import measure
import numpy as np
import onnx
import onnxruntime
import torch
import tvm
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.edge import choose_isa
from qcompiler.backends.edge_target import machine
from qcompiler.kernels.code import Argument, Kernel
from qcompiler.kernels.expression import Access, Expression, Step
from qcompiler.kernels.matmul_int8 import matmul_int8
from qcompiler.kernels.matmul_int8 import pack as pack8
from qcompiler.kernels.matmul_packed import matmul_packed
from qcompiler.kernels.packing import pack, pack_groups, packing
from qcompiler.kernels.tiles import Product
from qcompiler.target import Target

MINILM = [(128, 384, 384), (128, 1536, 384), (128, 384, 1536)]
SMOLLM2 = [(1, 576, 576), (1, 1536, 576), (1, 576, 1536), (128, 1536, 576), (1, 49152, 576)]
INT8 = [*MINILM, *SMOLLM2[:4], (1024, 1024, 1024)]
PACKED = [(m, n, k) for n, k in ((1536, 576), (576, 1536), (4096, 4096)) for m in (1, 16, 128, 512)]
LARGE = (1, 16384, 8192)  # 84 MB in 4 bits
GROUP = 32
SECONDS = 1.0  # for each shape
NATIVE = machine(Target.parse("tvm:native"))
ISA = choose_isa(NATIVE)


def session(nodes: list[Any], inputs: dict[str, Any], output: Any, held: dict[str, Any]) -> Any:
    """A one-operator model on one thread."""
    graph = helper.make_graph(
        nodes, "product",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info("C", *output)],
        [numpy_helper.from_array(v, n) for n, v in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def built(kernel: Kernel, *tensors: torch.Tensor) -> Callable[[], Any]:
    """The kernel as a call on fixed tensors."""
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        library = tvm.tirx.build(
            tvm.IRModule({kernel.name: kernel.function}), target=tvm.target.Target(NATIVE.tvm)
        )
    function, held = library[kernel.name], [tvm.runtime.tensor(t.numpy()) for t in tensors]
    return lambda: function(*held)


def arguments(*tensors: torch.Tensor) -> list[Argument]:
    return [
        Argument(f"a{i}", str(t.dtype).removeprefix("torch."), t.numel())
        for i, t in enumerate(tensors)
    ]


def int8(m: int, n: int, k: int) -> dict[str, Callable[[], Any]]:
    x = torch.randint(0, 256, (m, k)).to(torch.uint8)
    w = torch.randint(-127, 128, (n, k)).to(torch.int8)
    scale, out = torch.rand(n), torch.zeros(m * n)
    given = (x.reshape(-1), pack8(w, ISA), scale, out)
    steps = (
        Step("anchor", "int32"), Step("cast", "float32", (0,)),
        Step("load", "float32", access=Access(2, "float32", 0, (0, 1))),
        Step("mul", "float32", (1, 2)),
    )  # fmt: skip
    expression = Expression((m, n), steps, ((3, Access(3, "float32", 0, (n, 1))),))
    ours = matmul_int8("g", arguments(*given), Product(m, n, k, k), False, expression, ISA)
    peer = session(
        [helper.make_node("MatMulInteger", ["A", "B"], ["C"])],
        {"A": (TensorProto.UINT8, [m, k])}, (TensorProto.INT32, [m, n]),
        {"B": w.T.contiguous().numpy()},
    )  # fmt: skip
    feed = {"A": x.numpy()}
    return {"ours": built(ours, *given), "MatMulInteger": lambda: peer.run(None, feed)}


def packed(
    m: int, n: int, k: int, bits: int = 4, integer: bool = True
) -> dict[str, Callable[[], Any]]:
    x = torch.randint(-127, 128, (m, k)).to(torch.int8 if integer else torch.float32)
    w = torch.randint(0, 1 << bits, (n, k))
    scale, out = torch.rand(n, k // GROUP), torch.zeros(m * n)
    form = packing(bits, GROUP, 1 << (bits - 1), integer, ISA)
    more = []
    if form.needs_sums:
        more.append(x.reshape(m, -1, GROUP).int().sum(-1).int().reshape(-1))
    given = (x.reshape(-1), pack(w, form), pack_groups(scale), *more, out)
    store = Access(len(given) - 1, "float32", 0, (n, 1))
    expression = Expression((m, n), (Step("anchor", "float32"),), ((0, store),))
    product = Product(m, n, k, k)
    ours = matmul_packed("g", arguments(*given), product, form, expression, ISA)
    # ONNX Runtime has 4-bit blocks for the formats below.
    stored = w.numpy().astype(np.uint8).reshape(n, k // GROUP, GROUP)
    peer_bits = max(bits, 4)
    blob = stored if bits == 8 else stored[..., 0::2] | stored[..., 1::2] << 4
    nbits = helper.make_node(
        "MatMulNBits", ["A", "B", "S"], ["C"], domain="com.microsoft", K=k, N=n, bits=peer_bits,
        block_size=GROUP, accuracy_level=4,
    )  # fmt: skip
    kind = {"A": (TensorProto.FLOAT, [m, k])}
    peer = session([nbits], kind, (TensorProto.FLOAT, [m, n]), {"B": blob, "S": scale.numpy()})
    feed = {"A": np.random.default_rng(0).standard_normal((m, k), np.float32)}
    return {"ours": built(ours, *given), "MatMulNBits": lambda: peer.run(None, feed)}


def measured(calls: dict[str, Callable[[], Any]]) -> tuple[float, float, float, float]:
    """Our median in ms; the median and quartiles of the peer's time divided by ours."""
    ours, peer = calls.values()
    times, ratios = [], []
    for call in (ours, peer, ours, peer):
        call()
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(ratios) < 9:
        taken = []
        for call in (ours, peer):
            since = time.perf_counter()
            call()
            taken.append(time.perf_counter() - since)
        times.append(taken[0])
        ratios.append(taken[1] / taken[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return statistics.median(times) * 1e3, middle, low, high


def bandwidth() -> str:
    """Weights read by one row, too many for any cache, beside what a copy moves."""
    _, n, k = LARGE
    ours, peer = packed(*LARGE).values()
    source = np.ones(n * k // 4, np.float32)
    target = np.empty_like(source)
    calls = {"ours": ours, "peer": peer, "copy": lambda: np.copyto(target, source)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(13):
        for name, call in calls.items():
            since = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - since)
    median = {name: statistics.median(found[1:]) for name, found in times.items()}
    moved = {"ours": n * k * (0.5 + 4 / GROUP), "copy": 2 * source.nbytes}
    speed = {name: size / median[name] / 1e9 for name, size in moved.items()}
    return (
        f"{n} × {k} in 4 bits by one row: {speed['ours']:.1f} GB/s of weights and scales, "
        f"{speed['ours'] / speed['copy']:.0%} of what a copy reads and writes "
        f"({speed['copy']:.1f} GB/s); {median['peer'] / median['ours']:.2f} times MatMulNBits"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--realtime", action="store_true", help="go before all other processes")
    realtime = parser.parse_args().realtime
    torch.manual_seed(0)
    with measure.ahead(realtime):
        print(bandwidth())
    few = [
        (
            f"{bits}-bit weights × {'int8' if integer else 'float'}, group 32, against MatMulNBits"
            f" ({max(bits, 4)} bits, level 4)",
            PACKED if bits == 4 and integer else PACKED[-4:],
            partial(packed, bits=bits, integer=integer),
        )
        for integer in (True, False)
        for bits in (4, 3, 2, 8)
    ]
    for title, shapes, make in (("int8 × int8 against MatMulInteger", INT8, int8), *few):
        rows = []
        for m, n, k in shapes:
            calls = make(m, n, k)
            with measure.ahead(realtime):
                ms, ratio, low, high = measured(calls)
            speed = m * n * k / ms / 1e6
            rows.append([f"{m} × {n} × {k}", f"{ms:.3f}", f"{speed:.0f}", f"{ratio:.2f}",
                         f"{low:.2f} to {high:.2f}"])  # fmt: skip
        columns = ["M × N × K", "ms", "GMAC/s", "times as fast", "quartiles"]
        print(measure.table(f"{title}; {ISA.name}, one thread", columns, rows))


if __name__ == "__main__":
    main()
