"""The GPU kernels: checked and timed, beside torch's float16 (cuBLAS) and ONNX Runtime.

    python tests/benchmarks/gpu.py build FOLDER                  # TVM and nvcc; no GPU
    python tests/benchmarks/gpu.py run FOLDER --out FILE.json    # a GPU; neither TVM nor nvcc

`build` compiles every case of `gpu_cases.py`, `gpu_attention.py` and `gpu_quantize.py` (or of some
of them: `--families`). `run` checks each on fresh random inputs against float64, twice (the bits
must agree), with poisoned outputs, then times it: a CUDA graph of launches that read the weight
from one place after another, more than the L2 cache holds; the median of several replays. ONNX
Runtime takes part where onnxruntime-gpu is installed. `--check` leaves the timing out: for
compute-sanitizer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_cases
import gpu_quantize
import torch
from gpu_attention import ATTENTIONS, Attention
from gpu_cases import CASES, Case, Trial
from gpu_quantize import QUANTIZED, Quantized

from qcompiler.backends.edge_cuda_driver import Launch, Module
from qcompiler.gpu import device, driver_version

CACHE = 400 << 20  # bytes that a rotation reads at least: several times the L2 cache
MANY = 2 * 512 * 4096 * 4096  # operations of a launch of which a few make a measurement
REPLAYS = 9
BATCH = 12  # kernels of a module
TOLERANCE = 1e-3  # of ‖out − ref‖ / ‖ref‖: float16 output and scales give 2e-4 to 3e-4
FP8_TOLERANCE = 5e-3  # the tensor cores sum fp8 products with fewer bits than float32 has
# Family → its cases, how one is read back, and where kernels and trials are made.
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "products": (tuple(c for c in CASES if c.kind != "w4a8"), Case, gpu_cases),
    "w4a8": (tuple(c for c in CASES if c.kind == "w4a8"), Case, gpu_cases),
    "attention": (ATTENTIONS, Attention, gpu_attention),
    "quantization": (QUANTIZED, Quantized, gpu_quantize),
}


def build(folder: Path, families: Sequence[str] = tuple(FAMILIES)) -> None:
    """Compile all cases of some families."""
    from qcompiler.backends.edge_cuda_build import build as compiled

    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for family in families:
        every, _, module = FAMILIES[family]
        for start in range(0, len(every), BATCH):
            cases = every[start : start + BATCH]
            made = [module.kernel(case) for case in cases]
            image, launches = compiled([k for k, _ in made], [90])
            name = f"{family}{start}.fatbin"
            (folder / name).write_bytes(image)
            for case, (k, extra) in zip(cases, made, strict=True):
                table.append({"family": family, "case": asdict(case), "module": name,
                              "launch": asdict(launches[k.name]), "extra": extra})  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(table, indent=1))


def timed(body: Callable[[int, int], None], count: int) -> float:
    """Microseconds of body(i, stream), i = 0 … count − 1, as a graph; the median over replays."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        body(0, side.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for i in range(count):
            body(i, stream)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.numel() / statistics.median(times[2:]) / 1e6


def cublas(case: Case) -> float:
    """Microseconds of torch's float16 product of the same size."""
    m, n, k = case.tokens, case.rows, case.depth
    x = torch.randn(m, k, device="cuda").half()
    places = max(2, CACHE // (n * k * 2) + 1)
    weights = [torch.randn(n, k, device="cuda").half() for _ in range(places)]
    return timed(
        lambda i, _: torch.nn.functional.linear(x, weights[i % places]),
        _count(2 * m * n * k, places),
    )


def _count(operations: int, places: int) -> int:
    return 12 if operations >= MANY else max(24, 2 * places)


def onnx_runtime(case: Case) -> float | None:
    """Microseconds of ONNX Runtime's MatMulNBits (CUDA) of the same size; None where not there."""
    try:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return None
    onnxruntime.preload_dlls()
    m, n, k, group = case.tokens, case.rows, case.depth, case.group
    places = max(2, CACHE // (n * k // 2) + 1)
    # One node for each place: a run goes through them all.
    random = np.random.default_rng(0)
    nodes, held = [], []
    for i in range(places):
        packed = random.integers(0, 255, (n, k // group, group // 2), np.uint8)
        scales = random.random((n, k // group), np.float32).astype(np.float16)
        held += [numpy_helper.from_array(packed, f"B{i}"), numpy_helper.from_array(scales, f"s{i}")]
        nodes.append(helper.make_node(
            "MatMulNBits", ["A", f"B{i}", f"s{i}"], [f"C{i}"], domain="com.microsoft", K=k, N=n,
            bits=4, block_size=group))  # fmt: skip
    graph = helper.make_graph(
        nodes, "products", [helper.make_tensor_value_info("A", TensorProto.FLOAT16, (m, k))],
        [helper.make_tensor_value_info(f"C{i}", TensorProto.FLOAT16, (m, n))
         for i in range(places)], held,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CUDAExecutionProvider"]
    )
    binding = session.io_binding()
    x = torch.randn(m, k, device="cuda").half()
    binding.bind_input("A", "cuda", 0, np.float16, (m, k), x.data_ptr())
    outs = [torch.empty(m, n, device="cuda", dtype=torch.float16) for _ in range(places)]
    for i, out in enumerate(outs):
        binding.bind_output(f"C{i}", "cuda", 0, np.float16, (m, n), out.data_ptr())
    times = []
    for turn in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        session.run_with_iobinding(binding)
        end.record()
        torch.cuda.synchronize()
        if turn > 2:
            times.append(start.elapsed_time(end) * 1e3 / places)
    return statistics.median(times)


def run(folder: Path, out: Path | None, check: bool) -> int:
    """Check and time everything that `build` made; 1 if something is wrong."""
    copy = 0.0 if check else copy_bandwidth()
    table, modules, wrong = [], {}, 0
    peers: dict[tuple[int, int, int], tuple[float, float | None]] = {}
    for entry in json.loads((folder / "cases.json").read_text()):
        _, read, family = FAMILIES[entry["family"]]
        case = read(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry["case"].items()})
        if check and case.timed:
            continue
        launch = Launch(**{**entry["launch"], "blocks": tuple(entry["launch"]["blocks"]),
                           "order": tuple(entry["launch"]["order"])})  # fmt: skip
        name = entry["module"]
        if name not in modules:
            modules[name] = Module((folder / name).read_bytes())
        row, good = measure(case, family.trial(case, entry["extra"]), modules[name], launch, copy)
        wrong += not good
        if row.get("us") and isinstance(case, Case) and case.kind != "rows":
            size = (case.tokens, case.rows, case.depth)
            if size not in peers:
                peers[size] = cublas(case), onnx_runtime(case) if case.bits == 4 else None
            row["fp16_us"], ort = peers[size]
            row["ort_us"] = ort if case.bits == 4 else None
        table.append(row)
        print(line(row, copy), flush=True)
        torch.cuda.empty_cache()
    where = device()
    summary = {
        "device": where.name, "capability": where.capability, "driver": driver_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "copy_gb_per_s": round(copy, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "rows": table,
    }  # fmt: skip
    try:
        import onnxruntime

        summary["onnxruntime"] = onnxruntime.__version__
    except ImportError:
        summary["onnxruntime"] = None
    if out is not None:
        short = [
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
            for row in table
        ]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in short)
        head = json.dumps({k: v for k, v in summary.items() if k != "rows"}, indent=1)
        out.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    print({k: v for k, v in summary.items() if k != "rows"})
    print(f"{wrong} of {len(table)} wrong" if wrong else f"all {len(table)} right")
    return int(wrong > 0)


def measure(
    case: Any, given: Trial, module: Module, launch: Launch, copy: float
) -> tuple[dict[str, Any], bool]:
    """A case's row of the table, and whether it is right."""
    addresses = [a.data_ptr() for a in given.arguments]
    module.run(launch, addresses, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    error = given.error()
    first = [given.arguments[i].clone() for i in given.outputs]
    module.run(launch, addresses, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    same = all(
        torch.equal(a.view(torch.uint8), given.arguments[i].view(torch.uint8))
        for a, i in zip(first, given.outputs, strict=True)
    )
    row: dict[str, Any] = {"name": case.name, **asdict(case), "error": error, "same_bits": same}
    good = error < (FP8_TOLERANCE if case.name.startswith("fp8") else TOLERANCE) and same
    if not case.timed or copy == 0.0:
        return row, good
    places = [addresses]
    if given.weight >= 0:
        weight = given.arguments[given.weight]
        copies = [weight.clone() for _ in range(CACHE // weight.numel() + 1)]
        for held in copies:
            places.append([*addresses])
            places[-1][given.weight] = held.data_ptr()
    row["us"] = timed(
        lambda i, stream: module.run(launch, places[i % len(places)], stream),
        _count(given.operations, len(places)),
    )
    row["gb_per_s"] = given.moved / row["us"] / 1e3
    row["of_copy"] = row["gb_per_s"] / copy
    row["tera_per_s"] = given.operations / row["us"] / 1e6
    if given.peer is not None:
        peer = given.peer
        row["fp16_us"] = timed(lambda *_: peer(), _count(given.operations, 1))
    return row, good


def line(row: dict[str, Any], copy: float) -> str:
    """A row for people."""
    text = f"{row['name']:42} error {row['error']:.1e}" + ("" if row["same_bits"] else " DIFFERS")
    if "us" not in row:
        return text
    text += f" {row['us']:9.2f} us {row['gb_per_s']:6.0f} GB/s {100 * row['of_copy']:4.0f} %"
    if row.get("fp16_us"):
        text += f" {row['tera_per_s']:6.0f} T/s  fp16 / ours {row['fp16_us'] / row['us']:5.2f}"
    if row.get("ort_us"):
        text += f"  ort / ours {row['ort_us'] / row['us']:5.2f}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--families", nargs="*", default=[*FAMILIES], choices=[*FAMILIES])
    given = parser.parse_args()
    if given.what == "build":
        build(given.folder, given.families)
        return 0
    return run(given.folder, given.out, given.check)


if __name__ == "__main__":
    sys.exit(main())
