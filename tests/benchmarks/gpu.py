"""The GPU kernels: checked and timed, beside torch's float16 (cuBLAS) and ONNX Runtime.

    python tests/benchmarks/gpu.py all FOLDER --out FILE.json      # a GPU, TVM and nvcc: both below
    python tests/benchmarks/gpu.py build FOLDER                    # TVM and nvcc; no GPU
    python tests/benchmarks/gpu.py run FOLDER --out FILE.json      # a GPU; neither TVM nor nvcc
    python tests/benchmarks/gpu.py sanitize FOLDER --out FILE.json # compute-sanitizer too

`build` compiles every case of `gpu_cases.py`, `gpu_attention.py`, `gpu_encoder.py` and
`gpu_quantize.py` (or of some of them: `--parts`), on all processors. `run` checks each on
fresh random inputs against float64, twice (the bits must agree), with poisoned outputs, then times
it: a CUDA graph of launches that read the weight from one place after another, more than the L2
cache holds; the median of several replays. ONNX Runtime takes part where onnxruntime-gpu is
installed. Then whole programs (`gpu_programs.py`), a decoder of Llama-2-7B's shape (`decoder.py`),
and the tests marked `gpu`, which want TVM and nvcc too and say that they are skipped without. What
it prints is a table; FILE.json has all of it, each test's outcome too, and is written after each of
these. `--small` leaves out what is timed, the decoder and the tests: the small cases and the
programs, which are what `sanitize` puts under memcheck and racecheck (`gpu_sanitize.py`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import decoder
import gpu_attention
import gpu_cases
import gpu_encoder
import gpu_programs
import gpu_quantize
import gpu_sanitize
import gpu_tests
import torch
from gpu_attention import ATTENTIONS, Attention
from gpu_cases import CASES, Case, Trial
from gpu_encoder import ENCODERS, Encoder
from gpu_quantize import QUANTIZED, Quantized
from gpu_timing import CACHE, copy_bandwidth, count_of, cublas, onnx_runtime, timed

from qcompiler.backends.edge_cuda_driver import Launch, Module
from qcompiler.gpu import device, driver_version

BATCH = 4  # kernels of a module; a small case has its own, which a sanitizer rewrites quickly
TOLERANCE = 1e-3  # of ‖out − ref‖ / ‖ref‖: float16 output and scales give 2e-4 to 3e-4
# Family → its cases, how one is read back, and where kernels and trials are made.
FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "products": (tuple(c for c in CASES if not c.kind.startswith("w4a8")), Case, gpu_cases),
    "w4a8": (tuple(c for c in CASES if c.kind.startswith("w4a8")), Case, gpu_cases),
    "attention": (ATTENTIONS, Attention, gpu_attention),
    "encoders": (ENCODERS, Encoder, gpu_encoder),
    "quantization": (QUANTIZED, Quantized, gpu_quantize),
}
CAPABILITY = 90
DECODER = "decoder"  # its folder
PARTS = (*FAMILIES, gpu_programs.FOLDER, DECODER)  # of `build`


def build(folder: Path, parts: Sequence[str], small: bool) -> None:
    """Compile some of `PARTS`, each family and each program in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(gpu_sanitize.build, folder, CAPABILITY)]
        tables = [pool.submit(build_family, folder, p, small) for p in parts if p in FAMILIES]
        if gpu_programs.FOLDER in parts:
            jobs += [pool.submit(gpu_programs.build, folder, p) for p in gpu_programs.NAMES]
        if DECODER in parts and not small:
            jobs.append(pool.submit(decoder.build, folder / DECODER))
        table = [row for family in tables for row in family.result()]
        for job in jobs:
            job.result()
    (folder / "cases.json").write_text(json.dumps(table, indent=1))


def build_family(folder: Path, family: str, small: bool) -> list[dict[str, Any]]:
    """Compile all cases of a family; what `run` must know of each."""
    from qcompiler.backends.edge_cuda_build import architecture, compiled, launch
    from qcompiler.kernels.cuda_code import generate

    every, _, module = FAMILIES[family]
    timed = [] if small else [case for case in every if case.timed]
    batches = [timed[i : i + BATCH] for i in range(0, len(timed), BATCH)]
    options = gpu_sanitize.OPTIONS if small else ()
    table, images = [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for cases in [*batches, *([case] for case in every if not case.timed)]:
            made = [module.kernel(case) for case in cases]
            name = f"{family}{len(table)}.fatbin"
            source = generate([k for k, _ in made], f"sm_{architecture(CAPABILITY)}")
            images[name] = pool.submit(compiled, source, [CAPABILITY], *options)
            for case, (k, extra) in zip(cases, made, strict=True):
                table.append({"family": family, "case": asdict(case), "module": name,
                              "launch": asdict(launch(k)), "extra": extra})  # fmt: skip
        for name, image in images.items():
            (folder / name).write_bytes(image.result())
    return table


def run(folder: Path, out: Path | None, small: bool, only: str) -> int:
    """Check and time everything that `build` made; 1 if something is wrong."""
    copy = 0.0 if small else copy_bandwidth()
    table, modules, wrong = [], {}, 0
    peers: dict[tuple[int, int, int], tuple[float, float | None]] = {}
    for entry in json.loads((folder / "cases.json").read_text()):
        _, read, family = FAMILIES[entry["family"]]
        case = read(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry["case"].items()})
        if (small and case.timed) or only not in ("", case.name):
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
    parts: list[tuple[str, Callable[[], Any]]] = []
    if not only:
        parts.append(("programs", lambda: gpu_programs.run(folder)))
    if not small:
        if (folder / DECODER).is_dir():
            parts.append(("decoder", lambda: decoder.run(folder / DECODER)))
        parts.append(("tests", gpu_tests.run))
    save(summary, out)  # what is known is kept, whatever becomes of the rest
    for name, part in parts:
        summary[name] = part()
        save(summary, out)
    wrong += sum(said != "ok" for said in summary.get("programs", {}).values())
    wrong += sum(test["outcome"] == "failed" for test in summary.get("tests", ()))
    print({k: v for k, v in summary.items() if k not in ("rows", "tests")})
    print(f"{wrong} wrong, of {len(table)} and the tests" if wrong else f"all {len(table)} right")
    return int(wrong > 0 or not table)


def save(summary: dict[str, Any], out: Path | None) -> None:
    """Write what has been found so far, a line a case, in place of what was written before."""
    if out is None:
        return
    short = [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in summary["rows"]
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in short)
    head = json.dumps({k: v for k, v in summary.items() if k != "rows"}, indent=1)
    part = out.with_name(f"{out.name}.part")
    part.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    part.replace(out)


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
    parser.add_argument("what", choices=("all", "build", "run", "sanitize"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="", metavar="NAME", help="of `run`: this case alone")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    given = parser.parse_args()
    if given.what != "build" and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} sees no GPU. In an environment of its own: "
              "pip install torch, its build for CUDA, and -e '.[cuda,hf,test]'")  # fmt: skip
        return 2
    if given.what in ("all", "build"):
        build(given.folder, given.parts, given.small)
    if given.only in gpu_sanitize.PLANTED.values():
        return gpu_sanitize.plant(given.folder, given.only)
    if given.what in ("all", "run"):
        return run(given.folder, given.out, given.small, given.only)
    if given.what == "sanitize":
        return gpu_sanitize.sanitize(given.folder, given.out, Path(__file__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
