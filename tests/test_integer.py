"""The integer reference against numpy's integers, and against what backends compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler import integer
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.program import Program, capture
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target


def quantized(
    module: torch.nn.Module, shape: tuple[int, ...], recipe: str, machine: str = "tvm:native"
) -> tuple[Program, ModelSpec]:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(shape, generator=generator),) for _ in range(4)]
    spec = ModelSpec("m", module.eval(), batches[0], calibration=lambda: batches)
    program = capture(spec.module, spec.example_inputs, {})
    chosen = load_recipe(recipe, {"rounding": "rtn", "smooth": False, "correct_bias": False})
    data = Data(program, spec, chosen)
    target = Target.parse(machine)
    return quantize(program, data, chosen, target, lambda step: None).quantized, spec


def linear_by_numpy(program: Program, x: torch.Tensor) -> np.ndarray:
    """The program's only linear, from the constants in it, with int64 sums."""
    constants = program.constants()
    weight = next(v for n, v in constants.items() if v.dtype == torch.int8 and v.ndim == 2).numpy()
    scales = next(v for n, v in constants.items() if n.endswith("weight_scale")).numpy()
    zero = next(v for n, v in constants.items() if v.dtype == torch.uint8 and v.ndim == 0).numpy()
    step = next(v for n, v in constants.items() if v.ndim == 0 and v.dtype == torch.float32).numpy()
    q = np.clip(np.rint(x.numpy() / step) + int(zero), 0, 255).astype(np.int64)
    total = (q - int(zero)) @ weight.astype(np.int64).T
    bias = next(v for n, v in constants.items() if v.ndim == 1 and "bias" in n).numpy()
    factor = (step * scales).astype(np.float32)
    return (total * factor.astype(np.float64) + bias).astype(np.float32)


def test_a_linear_is_exact_in_the_integers() -> None:
    torch.manual_seed(0)
    program, spec = quantized(torch.nn.Linear(40, 24), (5, 40), "w8a8")
    x = next(iter(spec.calibration()))[0]
    found = integer.run(program, (x,))[0]
    assert np.array_equal(found.numpy(), linear_by_numpy(program, x))


def test_sums_of_8_bit_floats_are_exact() -> None:
    torch.manual_seed(0)
    program, spec = quantized(torch.nn.Linear(40, 24), (5, 40), "fp8", "torch:cpu")
    x = next(iter(spec.calibration()))[0]
    held = program.constants()
    weight = next(v for n, v in held.items() if n.endswith("float8_e4m3"))
    steps = next(v for n, v in held.items() if n.endswith("weight_scale"))
    assert weight.dtype == torch.float8_e4m3fn
    scale = x.abs().amax(1, keepdim=True) / 448
    q = (x / scale).to(torch.float8_e4m3fn)
    total = (q.double() @ weight.double().T).float()
    bias = next(v for n, v in held.items() if v.ndim == 1 and "bias" in n)
    want = (total.double() * (scale * steps).double() + bias.double()).float()
    assert torch.equal(integer.run(program, (x,))[0], want)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a8"])
def test_it_computes_what_the_program_means(recipe: str) -> None:
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8))
    program, spec = quantized(module, (6, 64), recipe)
    batch = next(iter(spec.calibration()))
    torch.testing.assert_close(
        integer.run(program, batch)[0], program.run(batch)[0], rtol=1e-3, atol=1e-3
    )


def test_convolutions_too() -> None:
    torch.manual_seed(2)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    program, spec = quantized(module, (2, 3, 16, 16), "w8a8")
    batch = next(iter(spec.calibration()))
    found, meant = integer.run(program, batch)[0], program.run(batch)[0]
    step = float((found - meant).abs().max())
    assert step <= 0.05 * float(meant.abs().max()), "more than a flipped rounding"


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_generated_code_gives_the_same_bits(recipe: str, tmp_path: Path) -> None:
    """Without float ops between the layers, code and reference agree bit for bit."""
    pytest.importorskip("tvm", reason="needs the extra [tvm]")
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 40))
    program, spec = quantized(module, (7, 64), recipe)
    from qcompiler.backends import edge

    edge.lower(program, Target.parse("tvm:native"), tmp_path)
    run = edge.load(tmp_path, 1)
    for batch in spec.calibration():
        assert torch.equal(run(*batch)[0], integer.run(program, batch)[0])


def test_onnx_runtime_computes_the_same_integers(tmp_path: Path) -> None:
    torch.manual_seed(4)
    program, spec = quantized(torch.nn.Linear(64, 48), (7, 64), "w8a8")
    from qcompiler.backends import ort

    ort.lower(program, tmp_path)
    run = ort.load(tmp_path, 1)
    for batch in spec.calibration():
        torch.testing.assert_close(
            run(*batch)[0], integer.run(program, batch)[0], rtol=2e-7, atol=1e-7
        )


def test_an_overflow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    program, spec = quantized(torch.nn.Linear(64, 8), (2, 64), "w8a8")
    batch = next(iter(spec.calibration()))
    monkeypatch.setattr(integer, "INT32", 100.0)
    with pytest.raises(OverflowError, match="int32"):
        integer.run(program, batch)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_what_is_known_already_changes_nothing(recipe: str) -> None:
    torch.manual_seed(6)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8))
    program, spec = quantized(module, (6, 64), recipe)
    known: dict[torch.fx.Node, torch.Tensor] = {}
    for batch in spec.calibration():
        assert torch.equal(integer.run(program, batch, known)[0], integer.run(program, batch)[0])
    assert bool(known) == (recipe == "w4a8")  # unpacked weights
