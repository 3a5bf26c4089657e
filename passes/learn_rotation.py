"""Learn rotations that suit the data: an analysis, Program × Plan × batches → orthogonal matrices.

SpinQuant (Liu 2024, section 3): all rotations that `fuse_rotation` may fold leave the float model
what it is, but not the quantized one, so R is chosen to minimise the quantized model's loss

    min  KL(softmax f(x) ‖ softmax f_Q(x; R))   over  R Rᵀ = I

where f_Q rounds activations and the cache with straight-through gradients (Bengio 2013) and keeps
weights in float: GPTQ rounds them afterwards (section 4.3 there). A linear that reads x then
gets Q(x R) Rᵀ, so no weight is touched while learning. It starts from the Hadamard rotations that
were folded already: the matrices found here come on top of those, and begin as identities.

A step is one batch, by gradient descent on the Stiefel manifold (Li 2020, "Efficient Riemannian
optimization on the Stiefel manifold via the Cayley transform", algorithm 1):

    M ← β M − ∂L/∂R,   W = M Rᵀ − ½ R (Rᵀ M Rᵀ),   Y = W − Wᵀ,   R ← (I − t/2 Y)⁻¹ (I + t/2 Y) R

with t falling linearly and never above 1/‖Y‖. Y is skew, so R stays orthogonal; the inverse is
computed, where the paper iterates.

Memory: the activations of one text for the backward pass, about 5 MB a token for a model of 30
layers that are 576 wide. Streams and heads that `fuse_rotation` refuses are left alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.differentiable import differentiable
from qcompiler.errors import InputError
from qcompiler.op_families import SDPA
from qcompiler.plan import Plan
from qcompiler.program import Batch, Program, unpadded
from qcompiler.qtype import QType
from qcompiler.regions import before_repeat, find_regions
from qcompiler.rewrite import Draft, operand
from qcompiler.rotatable import heads_obstacle, stream_obstacle, stream_readers

RATE = 0.5  # of the first step; SpinQuant takes 1.5 with larger batches
MOMENTUM = 0.9
COMPARED = 4  # texts at most over which the matrices found are compared with none
SAVED = 10  # steps between two states in the journal
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes:
        matrices: "R1.0", "R2.3", …: (n, n) float64, orthogonal; see `fuse_rotation`.
        losses: KL in nats of each step, before it.
        resumed: steps that were taken from a journal.
        kept: whether they beat the rotations that were there, over the last texts; else there are
            no matrices.
    """

    matrices: Mapping[str, Tensor]
    losses: tuple[float, ...]
    resumed: int = 0
    kept: bool = True


@dataclass
class _Uses:
    """Where values are rounded on the way.

    Attributes:
        sites: reader and operand → the format, and the matrix that turns the value before that.
        sizes: matrix → its order.
    """

    sites: dict[tuple[Node, int], tuple[QType, str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def learn_rotation(
    program: Program,
    plan: Plan,
    batches: Sequence[Batch],
    keys: QType | None = None,
    values: QType | None = None,
    *,
    steps: int,
    mask: str = "",
    journal: Path | None = None,
    fingerprint: str = "",
    say: Progress | None = None,
) -> Learned:
    """Learn the rotations of residual streams (R1) and value heads (R2).

    Args:
        program: after `fuse_rotation`; its first output is compared.
        plan: the formats of what linears read (operand 0).
        batches: calibration data; step n takes batch n modulo their number, its first text alone.
        keys, values: formats of the cache, as `quantize_cache` takes them.
        steps: at least 1.
        mask: name of the input that is 0 at padding.
        journal: a folder that keeps the state every few steps; a later run with the same
            `fingerprint` goes on from it to the same matrices.
        say: told of each step.

    Raises:
        InputError: nothing that a rotation reaches is quantized, or the loss is not finite.
    """
    uses = _find(program, plan, keys, values)
    if not uses.sizes:
        raise InputError(
            "rotation=learned: no rotation reaches a quantized activation; give activations a "
            "format, or take rotation=hadamard"
        )
    state = _State({n: torch.eye(s, dtype=torch.float64) for n, s in uses.sizes.items()})
    path = journal / "rotation.pt" if journal is not None else None
    if path is not None:
        state.load(path, fingerprint)
    resumed = len(state.losses)
    for step in range(resumed, steps):
        batch = _first_text(program, batches[step % len(batches)])
        rate = RATE * (1 - step / steps)
        state.losses.append(_step(program, uses, state, batch, mask, rate))
        if say is not None:
            say(f"learn_rotation: step {step + 1} of {steps}, KL {state.losses[-1]:.4f}")
        if path is not None and ((step + 1) % SAVED == 0 or step + 1 == steps):
            state.save(path, fingerprint)
    # Steps see one text each and may lead astray: both ends are compared on the same texts.
    start = {name: torch.eye(size) for name, size in uses.sizes.items()}
    ends = {name: matrix.float() for name, matrix in state.matrices.items()}
    before, after = 0.0, 0.0
    with torch.no_grad():
        for batch in batches[-COMPARED:]:
            text = _first_text(program, batch)
            before += float(_divergence(program, uses, start, text, mask))
            after += float(_divergence(program, uses, ends, text, mask))
    kept = after < before
    return Learned(state.matrices if kept else {}, tuple(state.losses), resumed, kept)


class _State:
    """Matrices, their momenta and the losses so far."""

    def __init__(self, matrices: dict[str, Tensor]) -> None:
        self.matrices = matrices
        self.momenta = {name: torch.zeros_like(m) for name, m in matrices.items()}
        self.losses: list[float] = []

    def save(self, path: Path, fingerprint: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save({"fingerprint": fingerprint, **vars(self)}, unfinished)
        unfinished.replace(path)

    def load(self, path: Path, fingerprint: str) -> None:
        try:
            found = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            # Missing or damaged: it is learned again.
            return
        if found.pop("fingerprint", None) == fingerprint:
            vars(self).update(found)


def _find(program: Program, plan: Plan, keys: QType | None, values: QType | None) -> _Uses:
    draft = Draft(program)
    own = {n.name: n for n in program.exported.graph.nodes}  # the draft's are copies
    formats = {s.node: a.qtype for s, a in plan.items() if s.operand == 0}
    uses = _Uses()
    turned: dict[str, str] = {}
    regions = find_regions(draft)
    of_writer = {region.writers[0]: region for region in regions}
    for number, stream in enumerate(r for r in regions if r.norms):
        readers = [
            r.node.name for r in stream_readers(stream, of_writer) if r.node.name in formats
        ] if not stream_obstacle(draft, stream, of_writer) else []  # fmt: skip
        if readers:
            uses.sizes[f"R1.{number}"] = stream.size
            turned |= dict.fromkeys(readers, f"R1.{number}")
    of_attention: dict[str, str] = {}
    for number, region in enumerate(r for r in regions if r.attentions):
        if heads_obstacle(draft, region):
            continue
        name = f"R2.{number}"
        readers = [r.node.name for r in region.readers if r.node.name in formats]
        if readers or values is not None:
            uses.sizes[name] = region.attentions[0].heads.shape[1]
            turned |= dict.fromkeys(readers, name)
            of_attention |= {a.node.name: name for a in region.attentions}
    for node, kind in formats.items():
        uses.sites[own[node], 0] = (kind, turned.get(node, ""))
    for attention in (n for n in program.exported.graph.nodes if n.target is SDPA):
        for index, cache in ((1, keys), (2, values)):
            if cache is not None:
                kind = QType(cache.element, "token", symmetric=cache.symmetric)
                name = of_attention.get(attention.name, "") if index == 2 else ""
                uses.sites[before_repeat(attention, index)] = (kind, name)
    return uses


def _first_text(program: Program, batch: Batch) -> Batch:
    """The first sample, where all inputs have the samples first."""
    values = [program.placeholder(name).meta["val"] for name in program.inputs]
    leading = {str(v.shape[0]) if v.ndim else "" for v in values}
    alone = len(leading) == 1 and not next(iter(leading)).isdigit()
    return tuple(x[:1] for x in batch) if alone else batch


def _step(
    program: Program, uses: _Uses, state: _State, batch: Batch, mask: str, rate: float
) -> float:
    """One step; the loss before it."""
    leaves = {n: m.float().requires_grad_(True) for n, m in state.matrices.items()}
    with torch.enable_grad():
        loss = _divergence(program, uses, leaves, batch, mask)
        if not bool(torch.isfinite(loss)):
            raise InputError(
                "rotation=learned: the quantized model's loss is not finite; check the data, or "
                "take rotation=hadamard"
            )
        loss.backward()
    for name, leaf in leaves.items():
        if leaf.grad is None:
            continue
        momentum = MOMENTUM * state.momenta[name] - leaf.grad.double()
        state.matrices[name], state.momenta[name] = cayley(state.matrices[name], momentum, rate)
    return float(loss.detach())


def _divergence(
    program: Program, uses: _Uses, matrices: Mapping[str, Tensor], batch: Batch, mask: str
) -> Tensor:
    """KL(float ‖ quantized) of the first output, in nats a row."""
    seen = dict(zip(program.inputs, batch, strict=True)).get(mask)
    with torch.no_grad():
        wanted = unpadded(program.run(batch)[0], seen).flatten(0, -2).log_softmax(-1)
    got = unpadded(_run(program, uses, matrices, batch), seen).flatten(0, -2).log_softmax(-1)
    return torch.nn.functional.kl_div(got, wanted, reduction="batchmean", log_target=True)


def cayley(r: Tensor, momentum: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """One step on the Stiefel manifold.

    Args:
        r: orthogonal, (n, n) float64.
        momentum: the direction, (n, n).
        rate: t at most.

    Returns:
        R after the step, and the momentum's part that is tangent at the old R.
    """
    w = momentum @ r.T - 0.5 * r @ (r.T @ momentum @ r.T)
    y = w - w.T
    size = float(torch.linalg.matrix_norm(y))
    if size == 0:
        return r, torch.zeros_like(r)
    t = min(rate, 1 / size)
    eye = torch.eye(len(r), dtype=r.dtype)
    return torch.linalg.solve(eye - t / 2 * y, (eye + t / 2 * y) @ r), y @ r


def _run(program: Program, uses: _Uses, leaves: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The first output, with values rounded at the sites; gradients reach the matrices."""
    rounded: dict[tuple[Node, str, str], Tensor] = {}

    def change(node: Node, args: list[Any]) -> list[Any]:
        for index in range(3):
            kind, name = uses.sites.get((node, index), (None, ""))
            if kind is not None:
                key = (operand(node, index), str(kind), name)
                if key not in rounded:
                    rounded[key] = _turned(args[index], kind, leaves.get(name))
                args[index] = rounded[key]
        return args

    result: Tensor = differentiable(program, batch, change=change, outputs=1)[0]
    return result


def _turned(x: Tensor, kind: QType, matrix: Tensor | None) -> Tensor:
    """Q(x R) Rᵀ along the last axis, in blocks of R's order."""
    if matrix is None:
        return rounded_through(x, kind)
    blocks = x.unflatten(-1, (-1, len(matrix)))
    # The blocks of a row have one scale together.
    rounded = rounded_through((blocks @ matrix).flatten(-2), kind)
    result: Tensor = (rounded.unflatten(-1, (-1, len(matrix))) @ matrix.T).flatten(-2)
    return result


def rounded_through(x: Tensor, kind: QType) -> Tensor:
    """X quantized and dequantized; rounding passes gradients on as if it did nothing.

    The scale keeps its gradient, which is what makes ranges shrink.
    """
    if kind.granularity == "tensor":
        low, high = x.amin(), x.amax()
    else:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if kind.symmetric:
        scale = torch.maximum(high, -low) / (kind.qmax - kind.middle)
        zero = torch.full_like(scale, float(kind.middle))
    else:
        scale = (high - low) / (kind.qmax - kind.qmin)
        zero = kind.qmin - low / scale.clamp(min=1e-12)
    scale = scale.clamp(min=1e-12)

    def straight(v: Tensor) -> Tensor:
        return v + (kind.round(v) - v).detach()

    zero = straight(zero).clamp(kind.qmin, kind.qmax)
    return ((straight(x / scale) + zero).clamp(kind.qmin, kind.qmax) - zero) * scale
