"""MiniLM compiled by qcompiler beside its peers: time, fidelity, size, all in one run.

    .venv/bin/python tests/benchmarks/minilm.py

All candidates come from the same weights. Peers that calibrate get the zoo's calibration sentences
one by one, so that there is no padding. Times are ratios to ONNX Runtime fp32 on the graph that its
transformer optimizer makes. Fidelity is judged on STS-B dev: sentence embeddings are the mean of
the token embeddings, normalised. OpenVINO with NNCF, ExecuTorch and torchao take part where they
are installed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peers
from measure import (
    apart,
    compare,
    compiled,
    gather,
    outputs,
    say,
    table,
    timing_table,
)
from numpy.typing import NDArray
from peers import Candidate, Feeds

from qcompiler.manifest import machine
from qcompiler.recipe import load_recipe
from qcompiler.target import Target

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "bench" / "minilm"
STSB = Path("text/stsb/stsb-en-dev.csv")
BATCH = 32  # sentences, sorted by length, as sentence-transformers does
PEERS = {
    "ort-dynamic": peers.ort_dynamic,
    "ort-static": peers.ort_static,
    "openvino": peers.openvino_transformer,
    "openvino-fp32": partial(peers.openvino_float, "f32"),
    "openvino-bf16": partial(peers.openvino_float, "bf16"),
    "executorch": peers.executorch,
    "executorch-fp32": peers.executorch_float,
    "torchao": peers.torchao,
}


def main() -> None:
    options = arguments()
    BUILD.mkdir(parents=True, exist_ok=True)
    host = machine()
    print(f"{host['cpu']}, {host['cores']} cores, {host['feature']}; times in milliseconds")

    folders = {
        (target, recipe): BUILD / f"{recipe}-{target}".replace(":", "-")
        for target in options.target
        for recipe in options.recipe
        if runs(target, recipe)
    }
    buckets = {
        "batch": sorted({1, *(batch for batch, _ in options.shapes)}),
        "sequence": sorted({16, 32, 64, 128, *(sequence for _, sequence in options.shapes)}),
    }
    builds = []
    for (target, recipe), folder in folders.items():
        if options.reuse and (folder / "manifest.json").is_file():
            continue
        say(f"compile {recipe} for {target}")
        entries = buckets if target.startswith("tvm:") else None
        builds.append(apart(compiled, "minilm", recipe, [], str(folder), target, entries))
    cells = [
        [f"{b['recipe']}, {b['target']}", f"{b['seconds']:.0f}", f"{b['peak_mb']:.0f}"]
        for b in builds
    ]
    print(table("Compiling", ["recipe and target", "seconds", "peak memory, MB"], cells))

    say("ORT fp32")
    plain = BUILD / "minilm.onnx"
    apart(peers.export_bert, plain)
    candidates = [
        apart(peers.fused_bert, plain, BUILD, 6, 12, 384),
        *ours(folders),
        *gather({n: PEERS[n] for n in options.peers}, plain, apart(sentences), BUILD),
    ]

    times = []
    for threads in options.threads:
        for batch, sequence in options.shapes:
            say(f"time {batch}x{sequence}, threads: {threads}")
            feeds = apart(text, batch, sequence)
            rows = compare(candidates, feeds, threads, options.seconds, options.realtime)
            title = f"Batch {batch}, sequence {sequence}, threads: {threads}"
            print(timing_table(title, rows), flush=True)
            times.append(
                {"threads": threads, "batch": batch, "sequence": sequence}
                | {"rows": [asdict(row) for row in rows]}
            )

    judged = fidelity(candidates, options.data / STSB)
    if options.json:
        result = {"machine": host, "compile": builds, "times": times, "fidelity": judged}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def runs(target: str, recipe: str) -> bool:
    """Whether the target has kernels for the recipe; those that it refuses are left out."""
    chosen = load_recipe(recipe)
    reason = Target.parse(target).refusal(
        chosen.weight_type, chosen.activation_type, products=chosen.products
    )
    if reason:
        print(f"{recipe}, {target}: {reason}")
    return reason is None


def ours(folders: Mapping[tuple[str, str], Path]) -> list[Candidate]:
    """Our float ONNX, which every artifact brings along, and what was compiled."""
    floating = next(iter(folders.values())) / "reference" / "model.onnx"
    return [
        Candidate.of("our float ONNX", "ort", floating),
        *(
            peers.edge(f"{recipe}, {target}", folder)
            if target.startswith("tvm:")
            else Candidate.of(f"{recipe}, {target}", "ort", folder / "model.onnx")
            for (target, recipe), folder in folders.items()
        ),
    ]


def sentences() -> list[Feeds]:
    """The zoo's calibration sentences, one by one, so that there is no padding."""
    from qcompiler.models.sentences import calibration_texts

    return encoded([[text] for text in calibration_texts()])


def text(batch: int, sequence: int) -> Feeds:
    """Full rows of real tokens: held-out sentences one after the other, cut to the shape."""
    from qcompiler.models.sentences import held_out_texts

    rows = encoded([[text] for text in held_out_texts()])
    tokens = np.concatenate([row["input_ids"][0] for row in rows])
    ids = np.resize(tokens, (batch, sequence))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def encoded(batches: Sequence[list[str]]) -> list[Feeds]:
    """Texts → inputs, padded to the longest of each batch."""
    from qcompiler.models import ZOO

    encode = ZOO["minilm"].build().encode
    assert encode is not None
    found = [dict(encode(texts)) for texts in batches]  # type: ignore[arg-type]
    return [{name: x.numpy() for name, x in inputs.items()} for inputs in found]


def eager(batches: Sequence[Feeds]) -> list[NDArray[Any]]:
    """What torch computes in fp32."""
    import torch

    from qcompiler.models import ZOO

    module = ZOO["minilm"].build().module
    with torch.inference_mode():
        return [module(*map(torch.from_numpy, feeds.values())).numpy() for feeds in batches]


def fidelity(candidates: Sequence[Candidate], path: Path) -> list[dict[str, Any]]:
    """Print how near each candidate comes to torch in fp32, and its size."""
    from scipy.stats import spearmanr

    columns = ["candidate", "MB"]
    if not path.is_file():
        rows = [[c.name, f"{c.megabytes:.1f}"] for c in candidates]
        print(table("Size", columns, rows))
        print(f"\nNo fidelity: {path} is not there; --data names the folder with the data.")
        return []
    with path.open(encoding="utf-8", newline="") as file:
        pairs = [(one, two, float(score)) for one, two, score in csv.reader(file)]
    texts = sorted({text for one, two, _ in pairs for text in (one, two)}, key=len)
    index = {text: position for position, text in enumerate(texts)}
    left, right = ([index[pair[side]] for pair in pairs] for side in (0, 1))
    scores = [score for _, _, score in pairs]
    batches = apart(encoded, [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)])

    def spearman(vectors: NDArray[Any]) -> float:
        return float(spearmanr((vectors[left] * vectors[right]).sum(1), scores).statistic)

    say("fidelity: torch fp32")
    exact = embeddings(apart(eager, batches), batches)
    found: list[dict[str, Any]] = [{"name": "torch fp32", "spearman": spearman(exact)}]
    for candidate in candidates:
        say(f"fidelity: {candidate.name}")
        raw = apart(outputs, candidate, batches, os.cpu_count() or 1)
        vectors = embeddings(raw, batches)
        cosine = (vectors * exact).sum(1)
        found.append(
            {
                "name": candidate.name,
                "spearman": spearman(vectors),
                "mean_cosine": float(cosine.mean()),
                "lowest_cosine": float(cosine.min()),
                "megabytes": candidate.megabytes,
            }
        )
    cells = [
        [
            row["name"],
            f"{row['spearman']:.4f}",
            *(f"{row[k]:.5f}" if k in row else "" for k in ("mean_cosine", "lowest_cosine")),
            f"{row['megabytes']:.1f}" if "megabytes" in row else "",
        ]
        for row in found
    ]
    title = f"STS-B dev: {len(pairs)} pairs, {len(texts)} sentences in batches of {BATCH}"
    print(table(title, ["candidate", "Spearman", "mean cosine", "lowest", "MB"], cells))
    return found


def embeddings(raw: Sequence[NDArray[Any]], batches: Sequence[Feeds]) -> NDArray[Any]:
    """Mean of the token embeddings that the mask keeps, at length one: (sentences, width)."""
    means = []
    for tokens, feeds in zip(raw, batches, strict=True):
        mask = feeds["attention_mask"][..., None]
        means.append((tokens.astype(np.float64) * mask).sum(1) / mask.sum(1))
    vectors = np.concatenate(means)
    unit: NDArray[Any] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MiniLM beside its peers: time, fidelity, size")
    parser.add_argument("--recipe", action="append", help="repeatable [w8a8 w8a8-dynamic]")
    parser.add_argument("--target", action="append", help="repeatable [ort:cpu, tvm:native]")
    parser.add_argument("--reuse", action="store_true", help="what an earlier run compiled")
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="[1,2]")
    parser.add_argument("--shapes", type=sizes, default=[(1, 128), (8, 128)], help="[1x128,8x128]")
    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"[{','.join(PEERS)}]")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each candidate [5]")
    parser.add_argument(
        "--realtime", action="store_true", help="go before all else on a busy machine; as root"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    options.recipe = options.recipe or ["w8a8", "w8a8-dynamic"]
    native = ["tvm:native"] if find_spec("tvm") else []
    options.target = options.target or ["ort:cpu", *native]
    return options


def numbers(value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


def sizes(value: str) -> list[tuple[int, int]]:
    return [(int(b), int(s)) for b, s in (part.split("x") for part in value.split(","))]


def names(value: str) -> list[str]:
    chosen = [part for part in value.split(",") if part]
    unknown = set(chosen) - set(PEERS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no peer {', '.join(sorted(unknown))}")
    return chosen


if __name__ == "__main__":
    main()
