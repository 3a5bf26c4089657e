"""The GPU kernels: checked and timed, beside torch's float16 (cuBLAS) and ONNX Runtime.

    python tests/benchmarks/gpu.py build FOLDER                  # TVM and nvcc; no GPU
    python tests/benchmarks/gpu.py run FOLDER --out FILE.json    # a GPU; neither TVM nor nvcc

`build` compiles every case of `gpu_cases.py`, `gpu_attention.py`, `gpu_encoder.py` and
`gpu_quantize.py` (or of some of them: `--families`). `run` checks each on fresh random inputs
against float64, twice (the bits must agree), with poisoned outputs, then times it: a CUDA graph of
launches that read the weight from one place after another, more than the L2 cache holds; the median
of several replays. ONNX Runtime takes part where onnxruntime-gpu is installed. Then a decoder of
Llama-2-7B's shape (`decoder.py`), and the tests marked `gpu`, which want TVM and nvcc too and are
skipped without. `--check` leaves out all but the checks of small cases: for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import decoder
import gpu_attention
import gpu_cases
import gpu_encoder
import gpu_quantize
import torch
from gpu_attention import ATTENTIONS, Attention
from gpu_cases import CASES, Case, Trial
from gpu_encoder import ENCODERS, Encoder
from gpu_quantize import QUANTIZED, Quantized
from gpu_timing import CACHE, copy_bandwidth, count_of, cublas, onnx_runtime, timed

from qcompiler.backends.edge_cuda_driver import Launch, Module
from qcompiler.gpu import device, driver_version

BATCH = 12  # kernels of a module
TOLERANCE = 1e-3  # of ‖out − ref‖ / ‖ref‖: float16 output and scales give 2e-4 to 3e-4
# Family → its cases, how one is read back, and where kernels and trials are made.
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "products": (tuple(c for c in CASES if not c.kind.startswith("w4a8")), Case, gpu_cases),
    "w4a8": (tuple(c for c in CASES if c.kind.startswith("w4a8")), Case, gpu_cases),
    "attention": (ATTENTIONS, Attention, gpu_attention),
    "encoders": (ENCODERS, Encoder, gpu_encoder),
    "quantization": (QUANTIZED, Quantized, gpu_quantize),
}
DECODER = "decoder"  # of `build`, beside the families; its folder
TESTS = Path(__file__).parents[1]


def build(folder: Path, families: Sequence[str]) -> None:
    """Compile all cases of some families, and the decoder where it is among them."""
    from qcompiler.backends.edge_cuda_build import build as compiled

    folder.mkdir(parents=True, exist_ok=True)
    table = []
    if DECODER in families:
        decoder.build(folder / DECODER)
    for family in (name for name in families if name in FAMILIES):
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
    if not check:
        if (folder / DECODER).is_dir():
            summary["decoder"] = decoder.run(folder / DECODER)
        summary["tests"] = told = tests()
        wrong += bool(re.search(r"\d+ (failed|error)", told))
    if out is not None:
        short = [
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
            for row in table
        ]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in short)
        head = json.dumps({k: v for k, v in summary.items() if k != "rows"}, indent=1)
        out.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    print({k: v for k, v in summary.items() if k != "rows"})
    print(f"{wrong} wrong, of {len(table)} and the tests" if wrong else f"all {len(table)} right")
    return int(wrong > 0)


def tests() -> str:
    """What pytest says at the end of the tests marked `gpu`."""
    files = [str(f) for f in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


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
    good = error < TOLERANCE and same
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
        count_of(given.operations, len(places)),
    )
    row["gb_per_s"] = given.moved / row["us"] / 1e3
    row["of_copy"] = row["gb_per_s"] / copy
    row["tera_per_s"] = given.operations / row["us"] / 1e6
    if given.peer is not None:
        peer = given.peer
        row["fp16_us"] = timed(lambda *_: peer(), count_of(given.operations, 1))
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
    parser.add_argument("--families", nargs="*", default=[*FAMILIES, DECODER],
                        choices=[*FAMILIES, DECODER])  # fmt: skip
    given = parser.parse_args()
    if given.what == "build":
        build(given.folder, given.families)
        return 0
    return run(given.folder, given.out, given.check)


if __name__ == "__main__":
    sys.exit(main())
