"""EfficientNet-Lite0 compiled by qcompiler beside its peers: accuracy, time, size, all in one run.

    .venv/bin/python tests/benchmarks/efficientnet.py

Every fifth image of the sample, 100 in all, calibrates; qcompiler keeps a quarter of these to
verify on. Top-1 is counted on all 500 and on the 400 that calibrated nothing. Times are ratios to
our float ONNX model, in which every BatchNorm is folded, on ONNX Runtime. OpenVINO with NNCF takes
part where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peers
from measure import apart, compare, compiled, gather, say, table, timing_table
from minilm import ROOT, numbers
from numpy.typing import NDArray
from peers import Candidate, Feeds

from qcompiler.manifest import machine

BUILD = ROOT / "build" / "bench" / "efficientnet"
IMAGES = Path("vision/imagenet-sample-256")
STRIDE = 5  # every fifth image calibrates
BATCH = 4  # images in a calibration batch
PEERS = {"ort-static": peers.ort_static_unsigned, "openvino": peers.openvino_convolutional}


def main() -> None:
    options = arguments()
    paths = sorted(map(str, (options.data / IMAGES).glob("*.jpg")))
    if not paths:
        print(f"Nothing done: no images in {options.data / IMAGES}; --data names the folder.")
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    host = machine()
    print(f"{host['cpu']}, {host['cores']} cores, {host['feature']}; times in milliseconds")

    given = paths[::STRIDE]
    calibration = apart(read, [given[i : i + BATCH] for i in range(0, len(given), BATCH)])
    folder, native = BUILD / "w8a8", BUILD / "w8a8-tvm"
    targets = {"ort:cpu": folder} | ({"tvm:native": native} if find_spec("tvm") else {})
    buckets = {"batch": sorted({1, *options.batches})}
    builds = []
    for target, out in targets.items():
        if options.reuse and (out / "manifest.json").is_file():
            continue
        say(f"compile w8a8 for {target}")
        entries = buckets if target.startswith("tvm:") else None
        builds.append(
            apart(compiled, "efficientnet-lite0", "w8a8", calibration, str(out), target, entries)
        )
    cells = [[b["target"], f"{b['seconds']:.0f}", f"{b['peak_mb']:.0f}"] for b in builds]
    print(table("Compiling w8a8", ["target", "seconds", "peak memory, MB"], cells))

    floating = folder / "reference" / "model.onnx"
    candidates = [
        Candidate.of("ORT fp32", "ort", floating),
        Candidate.of("w8a8, ort:cpu", "ort", folder / "model.onnx"),
        *([peers.edge("w8a8, tvm:native", native)] if "tvm:native" in targets else []),
        *gather({n: PEERS[n] for n in options.peers}, floating, calibration, BUILD),
    ]

    times = []
    for threads in options.threads:
        for batch in options.batches:
            say(f"time batch {batch}, threads: {threads}")
            feeds = apart(read, [paths[:batch]])[0]
            rows = compare(candidates, feeds, threads, options.seconds, options.realtime)
            print(timing_table(f"Batch {batch}, threads: {threads}", rows), flush=True)
            times.append(
                {"threads": threads, "batch": batch, "rows": [asdict(row) for row in rows]}
            )

    judged = accuracy(candidates, paths)
    if options.json:
        result = {"machine": host, "compile": builds, "times": times, "accuracy": judged}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def crops(paths: list[str]) -> Feeds:
    """Image files as one batch."""
    from qcompiler.models.efficientnet_lite0 import encode

    return {name: pixels.numpy() for name, pixels in encode(paths).items()}


def read(batches: Sequence[list[str]]) -> list[Feeds]:
    """Image files as batches."""
    return [crops(paths) for paths in batches]


def classes(candidate: Candidate, paths: list[str], threads: int) -> NDArray[Any]:
    """The class that the candidate gives each image, read a few at a time."""
    run = peers.load(candidate, threads)
    parts = [paths[i : i + 20] for i in range(0, len(paths), 20)]
    return np.concatenate([run(crops(part)).argmax(1) for part in parts])


def accuracy(candidates: Sequence[Candidate], paths: list[str]) -> list[dict[str, Any]]:
    """Print each candidate's top-1, its agreement with fp32, and its size."""
    truth = np.array([int(Path(path).name.partition("_")[0]) for path in paths])
    unseen = np.arange(len(paths)) % STRIDE != 0
    found: list[dict[str, Any]] = []
    exact = None
    for candidate in candidates:
        say(f"accuracy: {candidate.name}")
        given = apart(classes, candidate, paths, os.cpu_count() or 1)
        exact = given if exact is None else exact
        found.append(
            {
                "name": candidate.name,
                "top1": float((given == truth).mean() * 100),
                "top1_unseen": float((given == truth)[unseen].mean() * 100),
                "same_as_fp32": float((given == exact).mean() * 100),
                "megabytes": candidate.megabytes,
            }
        )
    columns = ["candidate", f"top-1 of {len(paths)}", f"of the {unseen.sum()} unseen"]
    cells = [
        [
            row["name"],
            f"{row['top1']:.1f} %",
            f"{row['top1_unseen']:.1f} %",
            f"{row['same_as_fp32']:.1f} %",
            f"{row['megabytes']:.1f}",
        ]
        for row in found
    ]
    print(table("Accuracy", [*columns, "same class as fp32", "MB"], cells))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="EfficientNet-Lite0 beside its peers: accuracy, time, size"
    )
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="[1,2]")
    parser.add_argument("--batches", type=numbers, default=[1, 8], help="[1,8]")
    parser.add_argument(
        "--peers",
        type=lambda value: [part for part in value.split(",") if part],
        default=list(PEERS),
        help=f"[{','.join(PEERS)}]",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="for each candidate [5]")
    parser.add_argument("--reuse", action="store_true", help="what an earlier run compiled")
    parser.add_argument("--realtime", action="store_true", help="go before all other processes")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
