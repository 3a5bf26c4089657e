"""Linears inside ONNX Runtime's CUDA provider: generated kernels, MatMulNBits, float16 MatMul.

    python tests/benchmarks/ort_cuda_kernels.py build FOLDER               # TVM, nvcc; no GPU
    python tests/benchmarks/ort_cuda_kernels.py run FOLDER --out FILE.json # a GPU, onnxruntime-gpu

`build` makes the library of custom operators for random weights. `run` checks each against float64,
then times chains of square products as ONNX Runtime's captured graphs: each reads another weight
than the ones before it, more than the L2 cache holds; the median of several runs, divided by the
chain's length. Then decoders (`ort_cuda.py`), and the texts that a compiled language model writes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from ort_cuda import SIZES, SMOLLM2, centred, decoder, timed
from ort_cuda_operators import (
    CHAINS,
    DECODERS,
    TOKENS,
    Operation,
    Own,
    OwnDecoder,
    build,
    decoder_operators,
    described,
    expected,
)

from qcompiler.backends.ort_session import LIBRARY, MODEL

CHECKED = (1, 3, 16, 17, 64, 65, 200, 640, 2048)
CACHE = 256 << 20  # bytes that a chain's weights take at least: several times the L2 cache
RUNS = 15
TOLERANCE = 1e-3


def saved(
    nodes: list[Any], held: list[Any], op: Operation, last: str, folder: Path, inputs: int = 1
) -> Any:
    """A session of a model from x (`x0`, `x1` where there are two) to `last`."""
    from qcompiler.backends.ort_cuda import session

    names = ["x"] if inputs == 1 else [f"x{i}" for i in range(inputs)]
    outputs = op.layers[0].outputs
    graph = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["tokens", op.depth])
         for name in names],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT16, ["tokens", outputs])],
        held,
    )  # fmt: skip
    opsets = [helper.make_opsetid(*d) for d in (("", 23), ("com.microsoft", 1), ("qcompiler", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    onnx.save(model, folder / MODEL)
    return session(folder / MODEL, graphs=True)


def chain(kind: str, op: Operation, own: Own, folder: Path) -> tuple[Any, int]:
    """A session of a chain of products, and its length."""
    layer = op.layers[0]
    bits = {"own": layer.bits, "nbits": layer.bits, "float16": 16}[kind]
    different = -(-CACHE // (layer.outputs * layer.inputs * bits // 8))
    length = max(32, different)
    nodes, held, x = [], [], "x"
    random = np.random.default_rng(0)
    block = layer.group or 128
    for i in range(length):
        out, new = f"y{i}", i < different
        if kind == "own":
            if new:
                node, constant, _ = own.node(op, [x], [out])
                held.append(constant)
            else:
                node = onnx.NodeProto()
                node.CopyFrom(nodes[i % different])
                node.input[1], node.output[0], node.output[1] = x, out, f"{out}_scratch"
        elif kind == "nbits":
            shape = (layer.outputs, layer.inputs // block, block * bits // 8)
            if new:
                size = layer.inputs**-0.5 / (1 << bits - 1) * 1.73
                held += [
                    numpy_helper.from_array(centred(random, shape, bits), f"w{i}"),
                    numpy_helper.from_array(np.full(shape[:2], size, np.float16), f"s{i}"),
                ]
            given = [x, f"w{i % different}", f"s{i % different}"]
            node = helper.make_node(
                "MatMulNBits", given, [out], domain="com.microsoft", K=layer.inputs,
                N=layer.outputs, bits=bits, block_size=block,
            )  # fmt: skip
        else:
            if new:
                weight = random.standard_normal((layer.inputs, layer.outputs), np.float32)
                weight *= layer.inputs**-0.5
                held.append(numpy_helper.from_array(weight.astype(np.float16), f"w{i}"))
            node = helper.make_node("MatMul", [x, f"w{i % different}"], [out])
        nodes.append(node)
        x = out
    return saved(nodes, held, op, x, folder), length


def microseconds(running: Any, op: Operation, tokens: int, length: int) -> float:
    """Of one product."""
    import onnxruntime

    binding = running.io_binding()
    x = np.random.default_rng(1).standard_normal((tokens, op.depth), np.float32)
    given = onnxruntime.OrtValue.ortvalue_from_numpy(x.astype(np.float16), "cuda", 0)
    out = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        [tokens, op.layers[0].outputs], np.float16, "cuda", 0
    )
    binding.bind_ortvalue_input("x", given)
    binding.bind_ortvalue_output(running.get_outputs()[0].name, out)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(tokens))
    times = []
    for _ in range(RUNS + 4):
        since = time.perf_counter()
        running.run_with_iobinding(binding, options)
        times.append(time.perf_counter() - since)
    if not np.isfinite(out.numpy()).all():
        raise SystemExit(f"{op} at {tokens} tokens: numbers that are none")
    return statistics.median(times[4:]) / length * 1e6


def check(own: Own, folder: Path) -> list[dict[str, Any]]:
    """Each operator against float64, twice."""
    rows = []
    for op in own.known:
        outputs = [f"y{i}" for i in range(len(op.layers) + op.kept)]
        names = ["x"] if op.inputs == 1 else [f"x{i}" for i in range(op.inputs)]
        node, held, weights = own.node(op, names, outputs)
        running = saved([node], [held], op, outputs[0], folder, op.inputs)
        q, scale = weights[0]
        wide = q.double() * scale.double().repeat_interleave(q.shape[1] // scale.shape[1], 1)
        errors = {}
        for tokens in CHECKED:
            given = [torch.randn(tokens, op.depth).half() for _ in names]
            feed = {name: x.numpy() for name, x in zip(names, given, strict=True)}
            options = {"gpu_graph_id": "-1"}
            first, again = (run_plain(running, feed, options) for _ in range(2))
            want = expected(op, [x.cuda() for x in given]) @ wide.T
            error = (torch.from_numpy(first).cuda().double() - want).norm() / want.norm()
            errors[tokens] = float(error)
            if not error < TOLERANCE or not np.array_equal(first, again):
                print(f"WRONG {op} at {tokens} tokens: {float(error):.2e}", flush=True)
        print(op, "worst", max(errors.values()), flush=True)
        rows.append({"operator": described(op), "errors": errors})
    return rows


def run_plain(running: Any, feed: dict[str, Any], settings: dict[str, str]) -> Any:
    """Without a captured graph."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    for key, value in settings.items():
        options.add_run_config_entry(key, value)
    return running.run(None, feed, options)[0]


def chains(own: Own, folder: Path) -> list[dict[str, Any]]:
    """Microseconds of each kind at each number of tokens."""
    rows = []
    for op in (*CHAINS, decoder_operators("own", **SIZES)[2]):
        found: dict[str, list[float]] = {}
        for kind in ("own",) if op.activation else ("own", "nbits", "float16"):
            running, length = chain(kind, op, own, folder)
            found[kind] = [microseconds(running, op, tokens, length) for tokens in TOKENS]
            del running
            text = " ".join(f"{x:8.2f}" for x in found[kind])
            layer = op.layers[0]
            print(
                f"{layer.outputs:6} {layer.bits} bits {op.activation} {kind:8} {text}", flush=True
            )
        rows.append({**described(op), "tokens": TOKENS, "microseconds": found})
    return rows


def decoders(own: Own) -> list[dict[str, Any]]:
    """Milliseconds of a token and of prompts, and how far graphs are from one long run."""
    import shutil

    from qcompiler.backends.ort_phases import PREFILL, widen_products

    rows = []
    print("weights      | a token | prompts of 16, 128, 512 | graphs' error", flush=True)
    for sizes in (SIZES, SMOLLM2):
        for kind in ("float16", *DECODERS, "nbits", "both"):
            with tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch:
                folder = Path(scratch)
                operators = OwnDecoder(own, kind, sizes) if kind in DECODERS else None
                model = decoder(16 if kind == "float16" else 4, operators, **sizes)
                onnx.save(model, folder / MODEL)
                if kind in DECODERS:
                    shutil.copy(own.folder / LIBRARY, folder / LIBRARY)
                if kind == "both":
                    widen_products(model)
                    onnx.save(model, folder / PREFILL)
                *times, error = timed(folder, sizes["vocabulary"])
            text = " | ".join(f"{ms:7.3f}" for ms in times)
            print(f"{sizes['width']:5} {kind:12} | {text} | {error:.1e}", flush=True)
            rows.append({"width": sizes["width"], "weights": kind, "milliseconds": times,
                         "error": error})  # fmt: skip
    return rows


def texts(folder: Path, prompts: Path) -> dict[str, Any]:
    """What a compiled language model writes greedily, and how long a token takes."""
    from qcompiler.backends.ort_cuda_decode import Decoder

    running, found = Decoder(folder), {}
    for name, ids in json.loads(prompts.read_text()).items():
        running.reset(1100)
        scores, new = running.feed(np.array(ids, np.int64), last=True), list[int]()
        times = []
        for _ in range(48):
            new.append(int(scores[-1].argmax()))
            since = time.perf_counter()
            scores = running.feed(np.array(new[-1:], np.int64), last=True)
            times.append(time.perf_counter() - since)
        found[name] = {"tokens": new, "ms": statistics.median(times[4:]) * 1e3}
        print(name, f"{found[name]['ms']:.3f} ms a token", new[:12], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, help="a compiled language model's folder")
    parser.add_argument("--prompts", type=Path, help="JSON: name → token ids")
    given = parser.parse_args()
    if given.what == "build":
        build(given.folder)
        return
    import onnxruntime

    from qcompiler.gpu import device, driver_version

    own = Own(given.folder)
    result: dict[str, Any] = {
        "device": device().name, "driver": driver_version(),
        "onnxruntime": onnxruntime.__version__, "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(result), flush=True)

    def keep(name: str, value: Any) -> None:
        result[name] = value
        if given.out is not None:
            given.out.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="qcompiler-") as scratch:
        folder = Path(scratch)
        (folder / LIBRARY).write_bytes((given.folder / LIBRARY).read_bytes())
        keep("checks", check(own, folder))
        if given.model is not None and given.prompts is not None:
            keep("texts", texts(given.model, given.prompts))
        keep("decoders", decoders(own))
        keep("chains", chains(own, folder))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
