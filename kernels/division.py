"""Division by a known scale as two multiplications, proven to round to the same integers.

A division takes ten times as long as a product. With 1/s = hi + lo, both float32,

    fma(x, hi, x · lo)

is x/s but for a rounding now and then. Both it and the rounded quotient grow with x, so they give
the same integers everywhere if they do so on both sides of each step from one integer to the next;
`factors` looks at the floats around each step, and gives nothing where one differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

AROUND = 6  # floats on each side of a step that are looked at


def factors(scale: Tensor, low: int, high: int) -> tuple[float, float] | None:
    """(hi, lo) for a scale, or None.

    Args:
        scale: one float32, positive.
        low, high: the quotients' smallest and largest integer; beyond them they are clamped.

    Returns:
        Two positive float32: rint(fma(x, hi, x · lo)) = rint(x / scale) for every float32 x whose
        quotient is in that range, and on the same side of it where it is not.
    """
    s = scale.reshape(()).float()
    inverse = 1 / s.double()
    hi = inverse.float()
    if float(hi) > float(inverse):
        hi = torch.nextafter(hi, torch.tensor(0.0))
    # Not 0: infinity times it must stay infinity.
    lo = (inverse - hi.double()).clamp(min=float(inverse) * 2.0**-60).float()
    tiny, huge = torch.finfo(torch.float32).tiny, 1e30
    if not (tiny * 1e6 < float(lo) and float(hi) < huge and tiny * 1e6 < float(s) < huge):
        return None
    steps = torch.arange(low, high, dtype=torch.float64) + 0.5
    near = (steps * s.double()).float()[:, None].contiguous().view(torch.int32)
    x = (near + torch.arange(-AROUND, AROUND + 1, dtype=torch.int32)).view(torch.float32)
    whole = torch.round(x / s)
    if bool((whole[:, 0] == whole[:, -1]).any()):  # the step is elsewhere
        return None
    exact = x.double() * hi.double() + (x * lo).double()
    # Rounded twice, to float64 and to float32: not where that could differ from once.
    above, below = (torch.nextafter(exact, torch.full_like(exact, e)) for e in (1e300, -1e300))
    if not torch.equal(above.float(), below.float()):
        return None
    return (float(hi), float(lo)) if torch.equal(torch.round(exact.float()), whole) else None
