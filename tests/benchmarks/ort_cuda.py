"""A language model on ONNX Runtime's CUDA provider: float16 beside weights of 4 and 8 bits.

    python tests/benchmarks/ort_cuda.py [--layers 8] [--width 2048] …

The model is a decoder as Llama's with random weights, written as `ort:cuda` writes one, and run by
what `qcompiler run` runs it with: a token as a CUDA graph, times by the wall clock with the copy of
the logits. Needs a GPU and onnxruntime-gpu; neither the exporter nor TVM. Batch 1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.ort_cuda_decode import Decoder
from qcompiler.backends.ort_phases import PREFILL, widen_products
from qcompiler.backends.ort_session import FIRST, MODEL, SHARED

PROMPTS, TEXT, TOKENS, ROUNDS = (16, 128, 512), 512, 128, 8
BLOCK = 32
EPSILON = 1e-5
SIZES = {"layers": 8, "width": 2048, "inner": 5632, "vocabulary": 32000}
# Of SmolLM2 135M: heads of 64, a third as many for the cache.
SMOLLM2 = {
    "layers": 30, "width": 576, "inner": 1536, "vocabulary": 49152, "size": 64, "shared": 3,
}  # fmt: skip


def centred(random: Any, shape: tuple[int, ...], bits: int) -> Any:
    """Random packed integers of 4 or 8 bits, their mean the kernel's zero point."""
    if bits == 8:
        return random.integers(1, 256, shape, np.uint8)
    return random.integers(1, 16, shape, np.uint8) | random.integers(1, 16, shape, np.uint8) << 4


class Writer:
    """A random decoder, node by node."""

    def __init__(self, bits: int, own: Any = None) -> None:
        self.bits, self.own, self.random = bits, own, np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []

    def constant(self, name: str, values: Any) -> str:
        self.held.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(
        self, op: str, inputs: list[str], *outputs: str, domain: str = "", **attrs: Any
    ) -> str:
        self.nodes.append(helper.make_node(op, inputs, list(outputs), domain=domain, **attrs))
        return outputs[0]

    def linears(
        self, before: str, given: list[str], outputs: int, inputs: int, *names: str,
        total: str = "",
    ) -> tuple[str, ...]:  # fmt: skip
        """Linears of what is computed of some tensors: an operator of `own`, where there is that.

        `before`: "norm" of their sum, "gate" (silu of the first times the second), or nothing.
        `total`: name of the sum, where it is read later; last of the results.
        """
        if self.own is not None and self.own.fused:
            self._own(before, given, outputs, inputs, names, total)
            return (*names, total) if total else names
        x = given[0]
        if before == "norm":
            if len(given) > 1:
                x = self.node("Add", given, total or f"{names[0]}_sum")
            total = x
            x = self.node("RMSNormalization", [x, "gain"], f"{names[0]}_norm", axis=-1,
                          epsilon=EPSILON)  # fmt: skip
        elif before == "gate":
            swish = self.node("Sigmoid", [x], f"{names[0]}_sigmoid")
            swish = self.node("Mul", [x, swish], f"{names[0]}_silu")
            x = self.node("Mul", [swish, given[1]], f"{names[0]}_gated")
        if self.own is not None:
            self._own("", [x], outputs, inputs, names, "")
        else:
            for name in names:
                self._linear(x, outputs, inputs, name)
        return (*names, total) if total else names

    def _own(
        self, before: str, given: list[str], outputs: int, inputs: int, names: tuple[str, ...],
        total: str,
    ) -> None:  # fmt: skip
        node, held = self.own.linears(before, given, (outputs, inputs), [*names], total)
        self.nodes.append(node)
        self.held.append(held)

    def _linear(self, x: str, outputs: int, inputs: int, name: str) -> str:
        spread = inputs**-0.5
        if self.bits == 16:
            weight = self.random.standard_normal((inputs, outputs), np.float32) * spread
            held = self.constant(f"{name}_weight", weight.astype(np.float16))
            return self.node("MatMul", [x, held], name)
        shape = (outputs, inputs // BLOCK, BLOCK * self.bits // 8)
        packed = self.constant(f"{name}_weight", centred(self.random, shape, self.bits))
        size = spread / (1 << (self.bits - 1)) * 1.7  # the spread of uniform integers
        scales = self.constant(f"{name}_scales", np.full(shape[:2], size, np.float16))
        return self.node(
            "MatMulNBits", [x, packed, scales], name, domain="com.microsoft", K=inputs, N=outputs,
            bits=self.bits, block_size=BLOCK,
        )  # fmt: skip


def decoder(
    bits: int, own: Any = None, *, layers: int, width: int, inner: int, vocabulary: int,
    size: int = 128, shared: int = 2,
) -> onnx.ModelProto:  # fmt: skip
    """The model with weights of 4, 8 or 16 bits.

    Heads are `size` wide, and `shared` of them read one of the cache's. `own`: operators of
    `ort_cuda_kernels`, which then multiply.
    """
    context = 4096
    heads, kv_heads = width // size, max(1, width // size // shared)
    w = Writer(bits, own)
    one = w.constant("one", np.array([1], np.int64))
    w.node("ReduceSum", ["attention_mask", one], "counts", keepdims=0)
    w.node("Cast", [w.node("Sub", ["counts", one], "last")], "seqlens", to=TensorProto.INT32)
    w.node("Shape", ["attention_mask"], "shape")
    w.node("Gather", ["shape", w.constant("second", np.int64(1))], "length", axis=0)
    w.node("Cast", ["length"], "total", to=TensorProto.INT32)
    angles = np.arange(context)[:, None] * 10000.0 ** (-np.arange(size // 2) / (size // 2))
    tables = [
        w.constant(n, f(angles).astype(np.float16)) for n, f in (("cos", np.cos), ("sin", np.sin))
    ]
    table = w.random.standard_normal((vocabulary, width), np.float32) * 0.02
    x = w.node("Gather", [w.constant("table", table.astype(np.float16)), "input_ids"], "x", axis=0)
    w.constant("gain", np.ones(width, np.float16))
    given = [x]  # of which the sum goes on

    ports: list[list[onnx.ValueInfoProto]] = [[], []]
    for i in range(layers):
        names = [
            f"{kind}.{i}.{part}"
            for kind in ("past_key_values", "present")
            for part in ("key", "value")
        ]
        for k, name in enumerate(names):
            shape = ["batch", kv_heads, "past" if k < 2 else "all", size]
            ports[k // 2].append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape))
        qkv, x = w.linears("norm", given, (heads + 2 * kv_heads) * size, width, f"qkv{i}",
                           total=f"x{i}a" if len(given) > 1 else given[0])  # fmt: skip
        attended = w.node(
            "GroupQueryAttention", [qkv, "", "", *names[:2], "seqlens", "total", *tables], f"a{i}",
            *names[2:], domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads,
            do_rotary=1, scale=size**-0.5,
        )  # fmt: skip
        given = [x, *w.linears("", [attended], width, width, f"o{i}")]
        gate, up, x = w.linears("norm", given, inner, width, f"gate{i}", f"up{i}", total=f"x{i}b")
        given = [x, *w.linears("gate", [gate, up], width, inner, f"down{i}")]
    ends = [w.constant(FIRST, np.zeros(1, np.int64)),
            w.constant("end", np.array([1 << 62], np.int64)), one]  # fmt: skip
    kept = [w.node("Slice", [x, *ends], f"kept{i}") for i, x in enumerate(given)]
    head, *_ = w.linears("norm", kept, vocabulary, width, "head")
    w.node("Cast", [head], "logits", to=TensorProto.FLOAT)
    ids = [("input_ids", ["batch", "new"]), ("attention_mask", ["batch", "all"]), (FIRST, [1])]
    whole = [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in ids]
    logits = helper.make_tensor_value_info(
        "logits", TensorProto.FLOAT, ["batch", "rows", vocabulary]
    )
    graph = helper.make_graph(
        w.nodes, "decoder", [*whole[:2], *ports[0], whole[2]], [logits, *ports[1]], w.held
    )
    domains = (("", 23), ("com.microsoft", 1), ("qcompiler", 1))
    opsets = [helper.make_opsetid(*domain) for domain in domains]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    helper.set_model_props(model, {SHARED: "1"})
    return model


def median(run: Callable[[], None], before: Callable[[], None], rounds: int) -> float:
    """Milliseconds; the first round is left out."""
    times = []
    for _ in range(rounds + 1):
        before()
        since = time.perf_counter()
        run()
        times.append(time.perf_counter() - since)
    return statistics.median(times[1:]) * 1e3


def timed(folder: Path, vocabulary: int) -> list[float]:
    """Milliseconds of a token and of each prompt; and how far graphs are from one long run."""
    text = np.random.default_rng(1).integers(0, vocabulary, TEXT + TOKENS).astype(np.int64)
    running, room = Decoder(folder), TEXT + TOKENS

    def prompt(count: int) -> float:
        return median(
            lambda: void(running.feed(text[:count], last=True)), lambda: running.reset(room), ROUNDS
        )

    prompts = [prompt(count) for count in PROMPTS]
    running.reset(room)
    running.feed(text[:TEXT], last=True)
    places = iter(range(TEXT, TEXT + TOKENS))
    found: list[np.ndarray] = []

    def step() -> None:
        at = next(places)
        found.append(running.feed(text[at : at + 1], last=True)[0])

    token = median(step, lambda: None, TOKENS - 1)
    running.reset(room)
    whole = running.feed(text)[TEXT:]
    error = np.linalg.norm(np.stack(found) - whole) / np.linalg.norm(whole)
    return [token, *prompts, float(error)]


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=SIZES["layers"])
    parser.add_argument("--width", type=int, default=SIZES["width"], help="a multiple of 256")
    parser.add_argument("--inner", type=int, default=SIZES["inner"])
    parser.add_argument("--vocabulary", type=int, default=SIZES["vocabulary"])
    given = parser.parse_args()
    print("weights      | a token |", " | ".join(f"prompt {n}" for n in PROMPTS), "| graphs' error")
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch:
        for bits in (16, 4, 8):
            folder = Path(scratch) / str(bits)
            folder.mkdir()
            model = decoder(bits, **vars(given))
            onnx.save(model, folder / MODEL)
            forms = ["packed", "both"] if bits < 16 else ["float16"]
            for form in forms:
                if form == "both":
                    widen_products(model)
                    onnx.save(model, folder / PREFILL)
                *times, error = timed(folder, given.vocabulary)
                row = " | ".join(f"{ms:7.3f}" for ms in times)
                print(f"{bits:2} {form:9} | {row} | {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
