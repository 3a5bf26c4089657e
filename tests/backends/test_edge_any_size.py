"""Code for any size: the bits of code for fixed sizes, at sizes that nothing was compiled for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler.backends import edge, edge_any_size
from qcompiler.backends.edge_artifact import load
from qcompiler.backends.edge_sizes import Formula, formula, generalized, probes
from qcompiler.compiler import compile, quantize, verify
from qcompiler.data import Data
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.models import ZOO
from qcompiler.program import capture
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target

ANY, FIXED = Target.parse("tvm:native:dynamic"), Target.parse("tvm:native")
SIZES = [(1, 1), (2, 16), (3, 33)]


def lowered(spec: ModelSpec, recipe: str, folder: Path) -> tuple[Any, Callable[..., Any]]:
    """The quantized program, and its code for any size."""
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    chosen = load_recipe(recipe, {"rounding": "rtn", "smooth": False})
    data = Data(program, spec, chosen)
    made = quantize(program, data, chosen, ANY, lambda step: None).quantized
    folder.mkdir()
    edge_any_size.lower(made, ANY, folder, dynamic_shapes=spec.dynamic_shapes)
    return made, load(folder, 1)


@pytest.mark.parametrize("recipe", ["fp32", "w8a8", "w8a8-dynamic", "w4a8"])
def test_the_bits_of_code_for_fixed_sizes(recipe: str, tmp_path: Path) -> None:
    spec = ZOO["tiny-attention-block"].build()
    program, run = lowered(spec, recipe, tmp_path / "any")
    two = load(tmp_path / "any", 2)
    assert isinstance(spec.example_inputs, dict)
    vocabulary = int(spec.module.embedding.weight.shape[0])  # type: ignore[union-attr]
    for number, (batch, length) in enumerate(SIZES):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, length - length // 3 :] = 0
        fixed = tmp_path / f"fixed-{number}"
        fixed.mkdir()
        sizes = {"batch": [batch], "sequence": [length]}
        edge.lower(program, FIXED, fixed, dynamic_shapes=spec.dynamic_shapes, buckets=sizes)
        want = load(fixed, 1)(ids, mask)[0]
        assert torch.equal(run(ids, mask)[0], want), (batch, length)
        assert torch.equal(two(ids, mask)[0], want), "with two threads"


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 20, 3, stride=2, padding=1)
        self.each = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.last = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.each(nn.functional.relu6(self.first(x))))
        return self.last(x.mean((2, 3)))


def test_convolutions_with_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 14, 14),) for _ in range(3)]
    spec = ModelSpec(
        "convolutions", Convolutions().eval(), batches[0], {"x": {0: "batch"}}, lambda: batches
    )
    program, run = lowered(spec, "w8a8", tmp_path / "any")
    for batch in (1, 3, 6):
        fixed = tmp_path / f"fixed-{batch}"
        fixed.mkdir()
        sizes = {"batch": [batch]}
        edge.lower(program, FIXED, fixed, dynamic_shapes=spec.dynamic_shapes, buckets=sizes)
        x = torch.randn(batch, 3, 14, 14)
        assert torch.equal(run(x)[0], load(fixed, 1)(x)[0])


def test_an_artifact(tmp_path: Path) -> None:
    """Compiled, loaded, verified; what it does not take is an input error."""
    spec = ZOO["tiny-attention-block"].build()
    recipe = load_recipe("w8a8", {"rounding": "rtn", "keep_reference": False})
    artifact = compile(spec, target=ANY, recipe=recipe, out=tmp_path / "artifact")
    assert verify(artifact.folder)["ok"]
    assert not artifact.manifest["audit"]["broken"]
    run = artifact.runner(1)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert run(ids, torch.ones_like(ids))[0].shape[:2] == (2, 5)
    for given, message in (
        ((ids,), "the model takes input_ids, attention_mask"),
        ((ids, torch.ones(2, 6, dtype=torch.int64)), "the model takes"),
        ((ids.float(), ids), "the model takes int64"),
        ((ids + 10**6, ids), "numbers outside 0 to"),
    ):
        with pytest.raises(InputError, match=message):
            run(*given)


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(x.shape[1], x.shape[1]).triu(1).sum(0)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2] * 2


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


def test_refusals_say_why(tmp_path: Path) -> None:
    x = (torch.randn(2, 12),)
    dynamic = {"x": {1: "length"}}
    for module, reason in (
        (Halved(), "no polynomial"),
        (Sorted(), "the kernel rank has fixed sizes"),
        (nn.Linear(12, 3), "all sizes of this model are fixed"),
    ):
        shapes = {} if isinstance(module, nn.Linear) else dynamic
        program = capture(module, x, shapes)
        with pytest.raises(UnsupportedError, match=reason):
            edge_any_size.lower(program, ANY, tmp_path, dynamic_shapes=shapes)
    program = capture(Masked(), x, dynamic)
    with pytest.raises(InputError, match="its dynamic sizes are length"):
        edge_any_size.lower(
            program, ANY, tmp_path, dynamic_shapes=dynamic, buckets={"width": [3]}
        )  # fmt: skip


def test_formulas() -> None:
    points = probes({"batch": 512, "sequence": 100})
    found = formula([3 * p["batch"] * p["sequence"] ** 2 - p["batch"] + 7 for p in points], points)
    assert found is not None
    assert found.at({"batch": 2, "sequence": 11}) == 3 * 2 * 121 - 2 + 7
    assert formula([p["sequence"] // 2 for p in points], points) is None
    assert formula([min(p["sequence"], 64) for p in points], points) is None
    assert formula([-(-p["batch"] // 16) for p in points], points) is None
    whole = generalized([("a", 4, (p["batch"], 2.5)) for p in points], points)
    assert whole == ("a", 4, (Formula(("batch", "sequence"), (((1, 0), 1),)), 2.5))
    with pytest.raises(UnsupportedError, match="computes with a value"):
        generalized([1 / p["batch"] for p in points], points)
    with pytest.raises(UnsupportedError, match="more or fewer"):
        generalized([(1,) * p["batch"] for p in points], points)
