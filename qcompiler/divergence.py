"""How far outputs moved, as one number that adds up: a Kullback–Leibler divergence.

    logits:          KL(softmax(r) ‖ softmax(g)), nats, mean over the rows
    anything else:   ½ ‖r − g‖² / ‖r‖², the divergence for each element of two Gaussians with means
                     r and g and the variance mean(r²); −3 dB of SQNR more double it

Both are zero where nothing moved, and quadratic in small errors, so that the divergences of errors
that do not interact add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qcompiler.program import unpadded

ROWS = 64  # whose probabilities are computed at a time: a row of logits is as long as a vocabulary


class Divergence:
    """Reference outputs of some batches, and the divergence of others from them.

    Attributes:
        logits: whether the first output is logits, along its last axis; it alone counts then.
    """

    def __init__(
        self,
        outputs: Iterable[Sequence[Any]],
        masks: Sequence[Tensor | None],
        logits: bool = False,
    ) -> None:
        """Keep what the float model gives for each batch; `masks` are 0 at padding.

        Outputs are read one batch at a time here and below: they need not exist together.
        """
        self.logits = logits
        self._masks = list(masks)
        self._reference: list[list[Tensor]] = []
        for out, mask in zip(outputs, masks, strict=True):
            kept = [unpadded(t, mask).float() for t in _floats(out)]
            self._reference.append([kept[0].flatten(0, -2).log_softmax(-1)] if logits else kept)
        count = len(self._reference[0]) if self._reference else 0
        self._power = [sum(_power(r[i]) for r in self._reference) for i in range(count)]

    def __call__(self, outputs: Iterable[Sequence[Any]]) -> float:
        """The divergence of the same batches' outputs, 0 or more; infinite where one is NaN."""
        if self.logits:
            total, rows = 0.0, 0
            for out, (reference,), mask in zip(outputs, self._reference, self._masks, strict=True):
                got = unpadded(_floats(out)[0], mask).flatten(0, -2)
                for g, r in zip(got.split(ROWS), reference.split(ROWS), strict=True):
                    total += _kl(g, r)
                rows += len(reference)
            return _finite(total / max(1, rows))
        noise = [0.0] * len(self._power)
        for out, references, mask in zip(outputs, self._reference, self._masks, strict=True):
            for i, (r, got) in enumerate(zip(references, _floats(out), strict=True)):
                noise[i] += _power(unpadded(got, mask).float() - r)
        shares = [n / max(p, 1e-300) for n, p in zip(noise, self._power, strict=True)]
        return _finite(0.5 * sum(shares) / max(1, len(shares)))


def sampled_loss(output: Tensor, mask: Tensor | None, logits: bool, seed: int) -> Tensor:
    """−log p(y), summed over the rows, with y drawn from what the model itself predicts.

    Its gradient g has E[g] = 0 and E[g gᵀ] = F, the Fisher information, which is the Hessian of
    `Divergence` at zero error (times the number of rows): one backward pass is one probe of it, as
    Hutchinson's estimator wants (Yao 2020, "PyHessian"; HAWQ, Dong 2019).

    Args:
        output: the model's output, with a graph behind it.
        mask: 0 at padding.
        logits: whether the last axis is logits; else a Gaussian with the variance mean(output²).
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = unpadded(output, mask)
    if logits:
        total = rows.new_zeros(())
        for part in rows.flatten(0, -2).split(ROWS):
            drawn = torch.multinomial(part.detach().softmax(-1), 1, generator=generator)
            total = total + checkpoint(_surprise, part, drawn, use_reentrant=False)
        return total
    deviation = rows.detach().square().mean().sqrt().clamp(min=1e-30)
    noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    # −log p is ½ ((y − r) / σ)² and y − r = σ ε: its gradient along r is −ε / σ.
    return -(rows * noise).sum() / deviation


def _floats(outputs: Sequence[Any]) -> list[Tensor]:
    return [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]


def _power(x: Tensor) -> float:
    return float(x.double().square().sum())


def _surprise(logits: Tensor, drawn: Tensor) -> Tensor:
    """−log p of what was drawn, summed; its probabilities are not kept for the way back."""
    return -logits.log_softmax(-1).gather(1, drawn).sum()


def _kl(logits: Tensor, reference: Tensor) -> float:
    """Σ over rows of KL(reference ‖ softmax(logits)); the reference is of logarithms."""
    got = logits.float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(got, reference, log_target=True, reduction="sum")
    return float(kl)


def _finite(value: float) -> float:
    return value if value == value else float("inf")
