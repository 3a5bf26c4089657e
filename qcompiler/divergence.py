"""How far outputs moved, as one number that adds up: a Kullback–Leibler divergence.

    logits:          KL(softmax(r) ‖ softmax(g)), nats, mean over the rows
    anything else:   ½ ‖r − g‖² / ‖r‖², the divergence for each element of two Gaussians with means
                     r and g and the variance mean(r²); −3 dB of SQNR more double it

Both are zero where nothing moved, and quadratic in small errors, so that the divergences of errors
that do not interact add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.program import unpadded

ROWS = 8  # whose probabilities are computed at a time, in the cache: a row is a vocabulary long


def counting(logits: bool) -> int | None:
    """How many of a model's outputs a divergence looks at, from the first; None for all."""
    return 1 if logits else None


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
            values = _floats(out)
            self._reference.append(
                [part.float().log_softmax(-1) for part in _parts(values[0], mask)]
                if logits
                else [unpadded(t, mask).float() for t in values]
            )
        count = len(self._reference[0]) if self._reference and not logits else 0
        self._power = [sum(_power(r[i]) for r in self._reference) for i in range(count)]

    def __call__(self, outputs: Iterable[Sequence[Any]]) -> float:
        """The divergence of the same batches' outputs, 0 or more; infinite where one is NaN."""
        if self.logits:
            total, rows = 0.0, 0
            for out, reference, mask in zip(outputs, self._reference, self._masks, strict=True):
                for g, r in zip(_parts(_floats(out)[0], mask), reference, strict=True):
                    total += _kl(g, r)
                    rows += len(r)
            return _finite(total / max(1, rows))
        noise = [0.0] * len(self._power)
        for out, references, mask in zip(outputs, self._reference, self._masks, strict=True):
            for i, (r, got) in enumerate(zip(references, _floats(out), strict=True)):
                noise[i] += _power(unpadded(got, mask).float() - r)
        shares = [n / max(p, 1e-300) for n, p in zip(noise, self._power, strict=True)]
        return _finite(0.5 * sum(shares) / max(1, len(shares)))


def sampled_gradient(output: Tensor, mask: Tensor | None, logits: bool, seed: int) -> Tensor:
    """∇ of −log p(y) along the output, with y drawn from what the model itself predicts.

    E[g] = 0 and E[g gᵀ] = F, the Fisher information, which is the Hessian of `Divergence` at zero
    error (times the number of rows): one backward pass is one probe of it, as Hutchinson's
    estimator wants (Yao 2020, "PyHessian"; HAWQ, Dong 2019).

        logits:    softmax(z) − onehot(y)                 anything else:   −ε / σ,  y = r + σ ε

    Args:
        output: the model's output.
        mask: 0 at padding, whose gradient is 0.
        logits: whether the last axis is logits; else a Gaussian with the variance mean(output²).
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    output = output.detach()
    found = torch.zeros_like(output)
    if logits:
        rows, flat = output.flatten(0, -2), found.flatten(0, -2)
        for places in _places(output, mask):
            share = rows[places].softmax(-1)
            drawn = torch.multinomial(share, 1, generator=generator)
            flat[places] = share.scatter_add_(1, drawn, -torch.ones_like(share[:, :1]))
        return found
    rows = unpadded(output, mask)
    deviation = rows.square().mean().sqrt().clamp(min=1e-30)
    noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    if rows is output:
        return -noise / deviation
    assert mask is not None
    found[mask != 0] = -noise / deviation
    return found


def _places(value: Tensor, mask: Tensor | None) -> Iterator[Tensor | slice]:
    """Which rows of a flattened output are looked at together: `ROWS` of them, less padding."""
    count = value.numel() // value.shape[-1]
    kept = unpadded(torch.arange(count).view(*value.shape[:-1], 1), mask).flatten()
    if len(kept) < count:
        yield from kept.split(ROWS)
    else:
        for start in range(0, count, ROWS):
            yield slice(start, start + ROWS)


def _parts(value: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """Some rows of an output at a time, without padding; copies only where there is some."""
    flat = value.flatten(0, -2)
    return (flat[places] for places in _places(value, mask))


def _floats(outputs: Sequence[Any]) -> list[Tensor]:
    return [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]


def _power(x: Tensor) -> float:
    return float(x.double().square().sum())


def _kl(logits: Tensor, reference: Tensor) -> float:
    """Σ over rows of KL(reference ‖ softmax(logits)); the reference is of logarithms."""
    got = logits.float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(got, reference, log_target=True, reduction="sum")
    return float(kl)


def _finite(value: float) -> float:
    return value if value == value else float("inf")
