"""Code for any size: the bits of code for fixed sizes, at sizes that nothing was compiled for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
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


def compiled(
    module: nn.Module, inputs: tuple[Tensor, ...], shapes: Mapping[str, Mapping[int, str]],
    folder: Path, **buckets: Sequence[int],
) -> Callable[..., Any]:  # fmt: skip
    """Float code of a module for any size."""
    program = capture(module, inputs, shapes)
    edge_any_size.lower(program, ANY, folder, dynamic_shapes=shapes, buckets=buckets)
    return load(folder, 2)


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


class Means(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.mean(1), x.mean((1, 2)), x.amin(1), x.mean(-1)


def test_means_over_any_size(tmp_path: Path) -> None:
    shapes = {"x": {0: "batch", 1: "length"}}
    example = (torch.randn(2, 6, 24),)
    run = compiled(Means(), example, shapes, tmp_path, batch=[4], length=[64])
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    sizes = {"batch": [3], "length": [7, 49]}
    program = capture(Means(), example, shapes)
    edge.lower(program, FIXED, fixed, dynamic_shapes=shapes, buckets=sizes)
    for length in sizes["length"]:
        x = torch.randn(3, length, 24)
        for found, bits, exact in zip(run(x), load(fixed, 1)(x), Means()(x), strict=True):
            assert torch.equal(found, bits)
            torch.testing.assert_close(found, exact)


def test_an_artifact(tmp_path: Path) -> None:
    """Compiled with limits, loaded, verified within them; what it does not take is an error."""
    spec = ZOO["tiny-attention-block"].build()
    recipe = load_recipe("w8a8", {"rounding": "rtn", "keep_reference": False})
    limits = {"batch": [2], "sequence": [16]}
    out = tmp_path / "artifact"
    artifact = compile(spec, target=ANY, recipe=recipe, out=out, buckets=limits)
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
        ((ids.repeat(2, 1), ids), "batch at most 2"),
        ((ids.repeat(1, 4), ids), "sequence at most 16"),
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


class Outer(nn.Module):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (x[:, None, :] * x[:, :, None]) * z[:, None, None]


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


@pytest.mark.parametrize("limit", [4, 18])
def test_small_limits(limit: int, tmp_path: Path) -> None:
    """Squares of a size are found where it has few values, and the limit is checked."""
    shapes = {"x": {0: "batch", 1: "length"}, "z": {0: "batch"}}
    run = compiled(
        Outer(), (torch.randn(3, 12), torch.randn(3)), shapes, tmp_path, length=[limit]
    )  # fmt: skip
    for batch, length in ((2, limit - 1), (5, limit), (2, 10)):
        x, z = torch.randn(batch, length), torch.randn(batch)
        if length > limit:
            with pytest.raises(InputError, match=f"length at most {limit}"):
                run(x, z)
        else:
            assert torch.equal(run(x, z)[0], Outer()(x, z))


@pytest.mark.parametrize("limit", [1, 3])
def test_batches_of_a_few(limit: int, tmp_path: Path) -> None:
    """A size that is looked at where it is 1 alone, or above its limit."""
    module = nn.Linear(8, 4).eval()
    run = compiled(module, (torch.randn(2, 8),), {"input": {0: "batch"}}, tmp_path, batch=[limit])
    for batch in range(1, limit + 1):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(run(x)[0], module(x))
    with pytest.raises(InputError, match=f"batch at most {limit}"):
        run(torch.randn(5, 8))


def test_threads_share_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their results are right, and no two calls are in the virtual machine at once."""
    module = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    run: Any = compiled(module, (torch.randn(2, 64),), {"input": {0: "batch"}}, tmp_path)
    given = [torch.randn(1 + i % 7, 64) for i in range(60)]
    want = [run(x)[0] for x in given]
    entered, machine = Lock(), run._run

    def alone(*tensors: Any) -> Any:
        assert entered.acquire(blocking=False), "two calls at once"
        try:
            time.sleep(0.001)  # lets another thread come
            return machine(*tensors)
        finally:
            entered.release()

    monkeypatch.setattr(run, "_run", alone)
    with ThreadPoolExecutor(3) as pool:
        for have, known in zip(pool.map(run, given), want, strict=True):
            assert torch.equal(have[0], known)


def test_a_folder_that_is_written_again(tmp_path: Path) -> None:
    x, found = torch.randn(3, 8), []
    for _ in range(2):  # the first is still loaded when the second is
        module = nn.Linear(8, 4)
        run = compiled(module, (x,), {"input": {0: "batch"}}, tmp_path)
        found.append((run, module(x)))
        (tmp_path / "model.so").rename(tmp_path / f"{len(found)}.so")
    for run, expected in found:
        torch.testing.assert_close(run(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_buffer_larger_than_kernels_count(tmp_path: Path) -> None:
    shapes = {"x": {1: "length"}}
    run = compiled(Outer(), (torch.randn(3, 12), torch.randn(3)), shapes, tmp_path)
    x, z = torch.randn(3, 30000), torch.randn(3)
    with pytest.raises(InputError, match="a buffer of 2700000000 elements for length 30000"):
        run(x, z)


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
    for bucket in (0, -3):
        with pytest.raises(InputError, match="positive"):
            compiled(Halved(), x, dynamic, tmp_path, length=[bucket])
    with pytest.raises(UnsupportedError, match="needs a fixed size: the number of a product's"):
        compiled(Products(), (torch.randn(2, 12, 8),), dynamic, tmp_path, length=[5])
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
    few = probes({"batch": 512, "sequence": 18})
    found = formula([p["batch"] * p["sequence"] ** 2 for p in few], few)
    assert found is not None
    assert found.at({"batch": 2, "sequence": 10}) == 200
    for most in range(1, 60):
        for number in range(3):
            limits = {f"other{i}": 512 for i in range(number)} | {"size": most}
            values = {point["size"] for point in probes(limits)}
            assert len(values) >= (3 if most == 4 else min(4, most))
            assert values <= set(range(1, most + 1))
    assert formula([p["sequence"] // 2 for p in points], points) is None
    assert formula([min(p["sequence"], 64) for p in points], points) is None
    assert formula([-(-p["batch"] // 16) for p in points], points) is None
    whole = generalized([("a", 4, (p["batch"], 2.5)) for p in points], points)
    assert whole == ("a", 4, (Formula(("batch", "sequence"), (((1, 0), 1),)), 2.5))
    short = probes({"batch": 512, "sequence": 4})
    assert formula([p["batch"] * p["sequence"] for p in short], short) is not None
    with pytest.raises(UnsupportedError, match="limit 4 of the size 'sequence' is too small"):
        generalized([p["batch"] * p["sequence"] ** 2 for p in short], short)
    with pytest.raises(UnsupportedError, match="computes with a value"):
        generalized([1 / p["batch"] for p in points], points)
    with pytest.raises(UnsupportedError, match="more or fewer"):
        generalized([(1,) * p["batch"] for p in points], points)
