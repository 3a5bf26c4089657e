"""A small model as `EdgeModel`, its kernels built by TVM for any target."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.artifact import Artifact
from qcompiler.backends import edge_folder
from qcompiler.backends.edge_model import EdgeModel, Entry, Port, Step, Tensor
from qcompiler.backends.edge_target import host_family, machine
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.models import find
from qcompiler.program import capture
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target

K, N = 8, 16
ROWS = (1, 4, 64)


def place(arrays: dict[str, np.ndarray]) -> tuple[bytes, dict[str, int]]:
    """Arrays one after another at multiples of 64 bytes, and where each lies."""
    content, at = b"", {}
    for name, array in arrays.items():
        at[name] = len(content)
        content += array.tobytes() + b"\0" * (-array.nbytes % 64)
    return content, at


def build(functions: dict[str, Any], target: str) -> bytes:
    """TVM's object file with functions of te expressions, parallel over their first loop."""
    tvm = pytest.importorskip("tvm", reason="the extra tvm is not installed")
    module = {}
    for name, tensors in functions.items():
        function = tvm.te.create_prim_func(tensors).with_attr("global_symbol", name)
        schedule = tvm.s_tir.Schedule(function)
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            loops = schedule.get_loops(block)
            if loops:
                schedule.parallel(loops[0])
        module[name] = schedule.mod["main"].with_attr("global_symbol", name)
    library = tvm.tirx.build(
        tvm.IRModule(module), target=tvm.target.Target(machine(Target.parse(target)).tvm)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        library.write_to_file(str(path), "o")
        return path.read_bytes()


def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "weight": generator.standard_normal((K, N)).astype(np.float32),
        "bias": generator.standard_normal(N).astype(np.float32),
    }


def matmul(rows: int) -> list[Any]:
    """2 (x w); the product is an intermediate result that the kernel takes scratch memory for."""
    from tvm import te

    x, w, k = te.placeholder((rows, K)), te.placeholder((K, N)), te.reduce_axis((0, K))
    product = te.compute((rows, N), lambda i, j: te.sum(x[i, k] * w[k, j], axis=k))
    return [x, w, te.compute((rows, N), lambda i, j: product[i, j] * 2.0)]


def finish(rows: int) -> list[Any]:
    """max(h + b, 0)."""
    from tvm import te

    h, b = te.placeholder((rows, N)), te.placeholder((N,))
    return [h, b, te.compute((rows, N), lambda i, j: te.max(h[i, j] + b[j], 0.0))]


def add(number: int) -> list[Any]:
    """A count of int64 plus a number."""
    from tvm import te

    before = te.placeholder((1,), "int64")
    return [before, te.compute((1,), lambda i: before[i] + number)]


def small_model(target: str) -> EdgeModel:
    """A model: y = max(2 (x w) + b, 0) for 1, 4 or 64 rows x; it keeps in mind how often it ran.

    x float32 (rows, 8), y float32 (rows, 16), runs int64 (1,). Three kernels and an arena.
    """
    functions: dict[str, Any] = {}
    for rows in ROWS:
        functions |= {f"matmul_{rows}": matmul(rows), f"finish_{rows}": finish(rows)}
    functions |= {"add_one": add(1), "keep": add(0)}
    content, at = place(weights())
    entries = []
    for rows in ROWS:
        hidden = rows * N * 4 + 64
        tensors = (
            Tensor("input", 0, "float32", (rows, K)),
            Tensor("weights", at["weight"], "float32", (K, N)),
            Tensor("weights", at["bias"], "float32", (N,)),
            Tensor("arena", 64, "float32", (rows, N)),
            Tensor("output", 0, "float32", (rows, N)),
            Tensor("state", 0, "int64", (1,)),
            Tensor("output", 1, "int64", (1,)),
            Tensor("arena", 0, "int64", (1,)),
        )
        steps = (
            Step(f"matmul_{rows}", 'linear "one"', (0, 1, 3)),
            Step(f"finish_{rows}", "bias and ReLU", (3, 2, 4)),
            Step("add_one", "count", (5, 6)),
            Step("add_one", "count", (5, 7)),
            Step("keep", "keep the count", (6, 5)),
        )
        entries.append(Entry({"rows": rows}, -(-hidden // 64) * 64, tensors, steps))
    return EdgeModel(
        target=target,
        features=machine(Target.parse(target)).features,
        inputs=(Port("x", "float32", ("rows", K)),),
        outputs=(Port("y", "float32", ("rows", N)), Port("runs", "int64", (1,))),
        entries=tuple(entries),
        padded=frozenset({"rows"}),
        state=64,
        objects=(("kernels.o", build(functions, target)),),
        weights=content,
    )


def expected(x: np.ndarray) -> np.ndarray:
    """What `small_model` computes, in float64."""
    held = {name: array.astype(np.float64) for name, array in weights().items()}
    return np.maximum(2 * (x.astype(np.float64) @ held["weight"]) + held["bias"], 0)


@dataclass(frozen=True)
class Edge:
    """The small model for one target.

    Attributes:
        model: what was compiled.
        folder: the artifact made from it.
        expected: what it computes, in float64.
    """

    model: EdgeModel
    folder: Path
    expected: Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Edge]:
    """`edge(target)`: the small model, made once; skips where a compiler is missing."""
    made: dict[str, Edge] = {}

    def make(target: str) -> Edge:
        if target not in made:
            aim = machine(Target.parse(target))
            compiler = "cc" if aim.family == host_family() else aim.compiler
            if shutil.which(compiler) is None:
                pytest.skip(f"{compiler} is not installed")
            folder = tmp_path_factory.mktemp("edge")
            model = small_model(target)
            edge_folder.write(model, folder)
            made[target] = Edge(model, folder, expected)
        return made[target]

    return make


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., tuple[Any, Any, Any, int]]:
    """`compiled(module, shape, recipe, settings)`: program, function, audit, bytes of the weights.

    One float input of that shape, two random batches to calibrate on, code for this machine.
    """
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    from qcompiler.backends import edge

    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    target = Target.parse("tvm:native")

    def make(
        module: nn.Module, shape: tuple[int, ...], recipe: str, settings: dict[str, Any]
    ) -> tuple[Any, Any, Any, int]:
        generator = torch.Generator().manual_seed(0)
        batches = [(torch.randn(shape, generator=generator),) for _ in range(2)]
        program = capture(module.eval(), batches[0])
        spec = ModelSpec("layers", nn.Identity(), batches[0], {}, lambda: batches)
        chosen = load_recipe(recipe, {"rounding": "rtn", **settings})
        made = quantize(program, Data(program, spec, chosen), chosen, target, lambda step: None)
        layers = {n.name: n.name for n in made.quantized.exported.graph.nodes
                  if str(n.target).startswith(("aten.linear", "aten.conv"))}  # fmt: skip
        folder = tmp_path / f"code{len([*tmp_path.iterdir()])}"
        folder.mkdir()
        audit = edge.lower(made.quantized, target, folder, planned=layers)
        held = (folder / "weights.bin").stat().st_size
        return made.quantized, edge.load(folder, 1), audit, held

    return make


@pytest.fixture(scope="session")
def compiled_llama(
    language_folder: Path, tmp_path_factory: pytest.TempPathFactory, torchlib_once: None
) -> Callable[..., Artifact]:
    """`compiled_llama(target, …)`: the random Llama with 4-bit weights, rounded to nearest.

    Settings of the recipe may follow.
    """

    def make(target: str, **settings: Any) -> Artifact:
        spec = find(f"hf:{language_folder}")
        assert not isinstance(spec, Path)
        recipe = load_recipe("w4a16", {"rounding": "rtn", "min_sqnr": 0.0, **settings})
        out = tmp_path_factory.mktemp("language") / "llama"
        return qcompiler.compile(spec, target=target, recipe=recipe, out=out)

    return make
