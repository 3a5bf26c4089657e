"""Perplexity of SmolLM2-135M in number formats and ways of rounding, as a table.

    python tests/benchmarks/language.py --text ../shared/data/text/wikitext-2/valid.txt --json FILE

Formats are simulated in torch on the quantized program (target torch:cpu), so that those are
measured too which no runtime here runs. The model is the zoo's smollm2 without its cache; embedding
and output head stay float in every row. The first windows of the text are judged, each without a
past; the last part of the text calibrates, and is never judged. One row takes one to four minutes
on one core; --json keeps finished rows, so that a later run continues.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler import ops
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.models.hf import TextModel
from qcompiler.models.smollm2 import load
from qcompiler.program import Program, capture
from qcompiler.recipe import Recipe
from qcompiler.rewrite import Draft
from qcompiler.spec import ModelSpec
from qcompiler.target import Target

WINDOW = 1024
LENGTH = 512  # tokens of a calibration batch
CHECKED = 24  # tokens of a batch on which exact passes are proven
KEPT = {"keep_float": ("model.lm_head",), "embeddings": None, "correct_bias": False}

FORMATS = {
    "4-bit per channel": "int4:channel",
    "4-bit g64": "int4:g64",
    "4-bit g32": "int4:g32",
    "3-bit affine g64": "int3:g64:affine",
    "3-bit affine g32": "int3:g32:affine",
    "2-bit affine g32": "int2:g32:affine",
}
ROUNDINGS: dict[str, dict[str, Any]] = {
    "RTN": {},
    "GPTQ": {"rounding": "gptq"},
    "GPTQ + clip": {"rounding": "gptq", "clip": True},
    "AWQ": {"rounding": "awq"},
    "rotation + GPTQ": {"rounding": "gptq", "rotation": "hadamard"},
    "rotation + GPTQ + clip": {"rounding": "gptq", "clip": True, "rotation": "hadamard"},
}
CACHE = {"keys": "uint4:token:affine", "values": "uint4:token:affine"}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "w8a8 static": {"weights": "int8:channel", "activations": "uint8:tensor:affine"},
    "w8a8 per token": {"weights": "int8:channel", "activations": "int8:token"},
    "w8a8 per token, affine": {"weights": "int8:channel", "activations": "uint8:token:affine"},
    "w4a8 (g32)": {"weights": "int4:g32", "activations": "int8:token"},
    "w4a4kv4 (per channel)": {"weights": "int4:channel", "activations": "int4:token", **CACHE},
}
WAYS: dict[str, dict[str, Any]] = {
    "RTN": {},
    "GPTQ": {"rounding": "gptq"},
    "smoothing + GPTQ": {"rounding": "gptq", "smooth": True},
    "rotation + GPTQ": {"rounding": "gptq", "rotation": "hadamard"},
    "rotation + GPTQ + clip": {"rounding": "gptq", "rotation": "hadamard", "clip": True},
    "learned rotation + GPTQ": {"rounding": "gptq", "rotation": "learned"},
}


def rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(format, way, settings) of every row; the cheap and telling ones first."""
    for way in ("RTN", "GPTQ", "rotation + GPTQ", "GPTQ + clip", "AWQ", "rotation + GPTQ + clip"):
        for name, weights in FORMATS.items():
            yield name, way, {"weights": weights, "smooth": False, **ROUNDINGS[way]}
        if way == "rotation + GPTQ":
            for name, formats in ACTIVATIONS.items():
                for own, settings in WAYS.items():
                    yield name, own, {"smooth": False, **formats, **settings}
    for name in ("4-bit g32", "3-bit affine g32", "2-bit affine g32"):
        for way in ("RTN", "GPTQ"):
            settings = {"weights": FORMATS[name], "smooth": False, "keep_moment": True}
            yield name, f"{way} + kept moment", {**settings, **ROUNDINGS[way]}


def with_float_weights(program: Program) -> Program:
    """The same program with each quantized weight dequantized once, which is what takes time."""
    draft = Draft(program)
    for node in draft.calls(ops.dequantize):
        q, scale, zero = node.args[:3]
        if not draft.is_constant(scale):
            continue
        if draft.is_constant(q):
            integers = draft.constant(q)
        elif isinstance(q, torch.fx.Node) and q.target is ops.unpack:
            packed: Any = q.args[0]
            integers = ops.unpack(draft.constant(packed), *q.args[1:])
        else:
            continue
        value = ops.dequantize(
            integers, draft.constant(scale), draft.constant(zero), *node.args[3:]
        )
        draft.swap(node, draft.add_constant(f"{node.name}_float", value))
    return Program(draft.finish(), program.history)


@torch.no_grad()
def perplexity(program: Program, windows: Tensor) -> float:
    """Over non-overlapping windows, the first token of each not scored."""
    light = with_float_weights(program)
    total = 0.0
    for window in windows:
        logits = light.run((window[None], torch.ones(1, len(window)).long()))[0][0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum")
        total += float(loss)
    return math.exp(total / (windows.numel() - len(windows)))


def model(text: Path, batches: int, windows: int) -> tuple[ModelSpec, Tensor]:
    """The model with its calibration data, and the windows that are judged."""
    module, tokenizer = load()
    module.config.use_cache = False
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    judged, tail = ids[: windows * WINDOW], ids[-batches * LENGTH :]
    assert len(judged) + len(tail) <= len(ids), "the text is too short"
    calibration = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in tail.view(batches, 1, LENGTH)
    ]
    example = {"input_ids": ids[:32].view(2, 16), "attention_mask": torch.ones(2, 16).long()}
    spec = ModelSpec(
        "smollm2",
        TextModel(module, ("logits",)),
        example,
        {name: {0: "batch", 1: "sequence"} for name in example},
        lambda: calibration,
        held_out=lambda: calibration[:2],
        output_names=("logits",),
        excerpt=lambda batch, index: {name: value[:, :CHECKED] for name, value in batch.items()},
    )
    return spec, judged.view(windows, WINDOW)


def table(results: dict[str, float]) -> str:
    """The finished rows as a Markdown table: formats down, ways across."""
    ways = list(dict.fromkeys(way for _, way, _ in rows()))
    lines = ["| | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for name in [*FORMATS, *ACTIVATIONS]:
        cells = [results.get(f"{name} / {way}") for way in ways]
        texts = ["" if c is None else f"{c:.2f}" if c < 1000 else f"{c:.0f}" for c in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--batches", type=int, default=16, help="of 512 tokens, for calibration")
    parser.add_argument("--json", type=Path, default=Path("build/language.json"))
    parser.add_argument(
        "--only", action="append", default=[], help="rows whose names have this part; repeatable"
    )
    parser.add_argument("--steps", type=int, default=100, help="of learned rotations")
    options = parser.parse_args()
    results: dict[str, float] = (
        json.loads(options.json.read_text()) if options.json.is_file() else {}
    )
    spec, windows = model(options.text, options.batches, options.windows)
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    target = Target.parse("torch:cpu")
    wanted = [("float", "", {}), *rows()]
    for name, way, settings in wanted:
        key = f"{name} / {way}" if way else name
        if key in results or not any(part in key for part in options.only or [""]):
            continue
        began = time.perf_counter()
        quantized = program
        if way:
            steps = {"rotation_steps": options.steps}
            recipe = Recipe(name="row").updated({**KEPT, **steps, **settings})
            data = Data(program, spec, recipe)
            quantized = quantize(program, data, recipe, target, lambda step: None).quantized
        results[key] = perplexity(quantized, windows)
        print(f"{key}: {results[key]:.3f} ({time.perf_counter() - began:.0f} s)", flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nfp32: {results.get('float', math.nan):.2f}\n\n{table(results)}")


if __name__ == "__main__":
    main()
