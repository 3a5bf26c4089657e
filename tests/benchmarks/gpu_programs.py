"""Whole programs for `gpu.py`: kernels that only programs have, and all of them one after another.

Convolutions, running sums, sorting and scattering are those of `test_edge_cuda_loops.py`, language
models those of `test_edge_cuda.py`. Each artifact brings its inputs and the reference executor's
results along, so that `qcompiler verify` says whether a GPU gives them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = "programs"
TOKENS = [1, 16, 20]
LANGUAGES: dict[str, dict[str, Any]] = {
    "language_float16": {},
    "language_int8": {"keys": "int8:channel", "values": "int8:channel"},
    "language_int4": {"keys": "int4:channel", "values": "int4:channel"},
    "language_rotated": {"rotation": "hadamard"},
    "language_fp8": {"weights": "float8_e4m3:channel", "activations": "float8_e4m3:token"},
    "language_w4a8": {"weights": "int4:g32", "activations": "int8:token"},
}


PLAIN = ("block", "filters", "lines", "experts")
NAMES = (*PLAIN, *LANGUAGES)


def build(folder: Path, name: str) -> None:
    """Compile one of them; needs TVM, nvcc and for language models transformers, no GPU."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
    import test_edge_cuda as blocks
    import test_edge_cuda_loops as loops
    import torch

    import qcompiler
    from qcompiler.recipe import load_recipe

    out = folder / FOLDER / name
    shutil.rmtree(out, ignore_errors=True)
    if name in LANGUAGES:
        blocks.language(out, LANGUAGES[name], TOKENS)
        return
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def whole(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=generator)

    module: torch.nn.Module
    match name:
        case "block":
            module, inputs, recipe = blocks.Block(), (normal(5, 64),), "w4a16"
        case "filters":
            module, inputs, recipe = loops.Filters(), (normal(2, 3, 33, 36),), "w4a16"
        case "lines":
            lines = whole(19, 3, 70, 5).float(), whole(2, 4, 300)
            module, inputs, recipe = loops.Lines(), lines, "fp32"
        case _:
            module, inputs, recipe = loops.Experts(), (normal(4, 9, 6), whole(7, 12)), "fp32"
    qcompiler.compile(
        module.eval(), inputs, calibration=[inputs] * 2, target="tvm:cuda:sm_90",
        recipe=load_recipe(recipe, {"min_sqnr": 0.0}), out=out,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    """Those that `build` made."""
    return sorted(path.parent.name for path in (folder / FOLDER).glob("*/manifest.json"))


def command(folder: Path, name: str) -> list[str]:
    """What checks one of them: it ends with 1 where a result is wrong."""
    return [sys.executable, "-m", "qcompiler", "verify", str(folder / FOLDER / name)]


def run(folder: Path) -> dict[str, str]:
    """What `verify` says of each, "ok" where it is right; all at once: most of it is starting."""

    def said(name: str) -> tuple[str, str]:
        done = subprocess.run(command(folder, name), capture_output=True, text=True, check=False)
        return name, (done.stdout + done.stderr)[-1500:] if done.returncode else "ok"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(pool.map(said, names(folder)))
    for name, what in found.items():
        print(f"{name:42} {what}", flush=True)
    return found
