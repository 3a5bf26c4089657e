"""Learned rotations: orthogonal, better than where they began, the same after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler.errors import InputError
from qcompiler.passes import learn_rotation as module
from qcompiler.passes.allocate import allocate
from qcompiler.passes.fold_norm import fold_norm
from qcompiler.passes.fuse_rotation import fuse_rotation
from qcompiler.passes.learn_rotation import Learned, cayley, learn_rotation, rounded_through
from qcompiler.passes.untie_weights import untie_weights
from qcompiler.plan import Plan
from qcompiler.program import Program
from qcompiler.qtype import QType
from qcompiler.recipe import load_recipe
from qcompiler.target import Target

TOKEN = QType.parse("uint4:token:affine")


@pytest.fixture
def rotated(tiny: Callable[[str], Any]) -> tuple[Program, Plan, Any]:
    """A tiny decoder with Hadamard rotations folded, its plan and its batches."""
    model = tiny("tiny-gqa-decoder")
    program = fold_norm(untie_weights(model.normalized), center=True)
    program = fuse_rotation(program, inputs=True, keys=True)
    plan = allocate(program, load_recipe("w4a4kv4"), Target.parse("torch:cpu"))
    return program, plan, model.batches


def learn(rotated: tuple[Program, Plan, Any], steps: int = 12, **options: Any) -> Learned:
    program, plan, batches = rotated
    return learn_rotation(program, plan, batches, TOKEN, TOKEN, steps=steps, **options)


def test_a_step_follows_the_gradient_on_the_manifold() -> None:
    """The trace of RᵀA over orthogonal R is largest at the polar factor of A."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(12, 12, generator=g, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(a)
    if torch.linalg.det(u @ vh) < 0:  # the path keeps the determinant
        a = a[[1, 0, *range(2, 12)]]
        u, s, vh = torch.linalg.svd(a)
    r = torch.eye(12, dtype=torch.float64)
    momentum = torch.zeros_like(r)
    for _ in range(400):
        r, momentum = cayley(r, 0.5 * momentum + a, 0.5)
        assert float((r @ r.T - torch.eye(12)).abs().max()) < 1e-10
    assert float((r * a).sum()) == pytest.approx(float(s.sum()), rel=1e-3)


@pytest.mark.parametrize(
    "text", ["int4:token", "uint4:token:affine", "uint8:tensor:affine:dynamic"]
)
def test_rounding_is_that_of_the_format(text: str) -> None:
    kind = QType.parse(text)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    got = rounded_through(x, kind)
    torch.testing.assert_close(got, kind.round_trip(x.detach()), rtol=1e-5, atol=1e-6)
    got.sum().backward()  # as if it did nothing, but for the elements that make the range
    assert x.grad is not None
    assert float((x.grad == 1).float().mean()) > 0.5


def test_the_loss_falls_and_the_function_stays(rotated: tuple[Program, Plan, Any]) -> None:
    program, _, batches = rotated
    learned = learn(rotated, steps=24)
    assert set(learned.matrices) == {"R1.0", "R2.0"}
    for matrix in learned.matrices.values():
        eye = torch.eye(len(matrix), dtype=torch.float64)
        assert float((matrix @ matrix.T - eye).abs().max()) < 1e-5
        assert float((matrix - eye).abs().max()) > 1e-3
    count = len(batches)
    assert sum(learned.losses[-count:]) < 0.9 * sum(learned.losses[:count])
    after = fuse_rotation(program, learned=learned.matrices)
    assert "learned" in str(after.history[-1].notes)
    for batch in batches[:2]:
        (want, *_), (got, *_) = program.run(batch, double=True), after.run(batch, double=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_what_is_no_better_is_not_kept(
    rotated: tuple[Program, Plan, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps up the slope, in place of down."""
    down = module.cayley
    monkeypatch.setattr(module, "cayley", lambda r, m, rate: down(r, -m, rate))
    learned = learn(rotated)
    assert not learned.kept
    assert learned.matrices == {}
    program = rotated[0]
    assert fuse_rotation(program, learned=learned.matrices).exported is program.exported


def test_an_interruption_changes_nothing(
    rotated: tuple[Program, Plan, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(rotated)
    monkeypatch.setattr(module, "SAVED", 4)

    def stop(text: str) -> None:
        if "step 7 " in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(rotated, journal=tmp_path, fingerprint="a", say=stop)
    again = learn(rotated, journal=tmp_path, fingerprint="a")
    assert again.resumed == 4
    assert again.losses == whole.losses
    for name, matrix in whole.matrices.items():
        assert torch.equal(again.matrices[name], matrix)
    assert learn(rotated, journal=tmp_path, fingerprint="b", steps=1).resumed == 0


def test_without_quantized_activations_there_is_nothing_to_learn(
    rotated: tuple[Program, Plan, Any],
) -> None:
    program, _, batches = rotated
    plan = allocate(program, load_recipe("w4a16"), Target.parse("torch:cpu"))
    with pytest.raises(InputError, match="no rotation reaches a quantized activation"):
        learn_rotation(program, plan, batches, steps=1)
