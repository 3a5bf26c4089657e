"""Choose the smoothing factor of each tensor that quantized linears read.

An analysis, Program × Observations → factors. Dividing channel c of x by s_c and multiplying column
c of W by s_c keeps x Wᵀ. SmoothQuant (Xiao 2023, eq. 4) takes s_c = max|x_c|^α / max|w_c|^(1−α).
Here α is searched for each tensor, and s is then refined by gradient descent on the expected error
of the layer's output under uniform rounding noise:

    L_a = (R/n_a)²/12 · Σ_c s_c² ‖w_c‖²  with  R = max_c hi_c/s_c − min_c lo_c/s_c
    L_w = Σ_o (max_c |w_oc| s_c / n_w)²/12 · Σ_c E[x_c²]/s_c²

where n_a and n_w are the numbers of steps of the activation's and weight's formats. The candidate
with the smallest true error on the sampled rows wins, "no smoothing" being one of them.

The extremes hi and lo are not those of the sample alone: a channel that fires rarely would look
harmless and overflow on other text. They are widened to μ ± 6σ, and for the output of an activation
function f to the range of f over μ ± 5σ of its input.

Where the layers that write the tensor can take the factor, Outlier Suppression+'s shift
z_c = (hi_c + lo_c)/2 (Wei 2023, eq. 4) is a candidate as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.observe import Observations, Statistics
from qcompiler.op_families import LINEAR
from qcompiler.plan import Factor
from qcompiler.program import Program
from qcompiler.qtype import QType
from qcompiler.regions import Region, find_regions
from qcompiler.rewrite import Draft, operand
from qcompiler.rounding import weight_axis
from qcompiler.scaling import merge_obstacle

aten = torch.ops.aten
ACTIVATIONS = (
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.tanh.default,
    aten.sigmoid.default,
)
# Above, channels that fired rarely in calibration overflow on other data.
ALPHAS = (0.4, 0.5, 0.6, 0.7)
MERGE_GAIN = 0.1  # dB below which a merged factor is not worth having
SHARPNESS = 24.0  # of the soft maxima that are descended on
INSERT_GAIN = 1.0  # dB below which a multiplication at run time is not


def smoothing_sites(program: Program, insert: bool) -> dict[str, int]:
    """The tensors to observe before `search_smoothing`: node → channel axis."""
    draft = Draft(program)
    names: dict[str, int] = {}
    for source, _, merged in _candidates(draft):
        if merged or insert:
            names[source.name] = -1
            if source.target in ACTIVATIONS:
                names[operand(source, 0).name] = -1
    return names


def search_smoothing(
    program: Program, observations: Observations, weight: QType, activation: QType, insert: bool
) -> dict[str, Factor]:
    """Factors by the name of the tensor; tensors that gain too little are left out.

    Args:
        program: before Q/DQ.
        observations: of `smoothing_sites`.
        weight, activation: the formats that the readers will have.
        insert: whether a multiplication may be inserted where no writer can take the factor.
    """
    draft = Draft(program)
    found = {}
    for source, region, merged in _candidates(draft):
        if not merged and not insert:
            continue
        readers = [u for u in source.users if u.target is LINEAR and u.args[0] is source]
        weights = torch.cat([draft.constant(r.args[1]) for r in readers]).double()
        stats = observations[source.name]
        low, high = _extremes(source, stats, observations)
        tie = region.readers[0].channels if merged and region is not None else None
        may_shift = merged and region is not None and _takes_shift(region)
        kind = weight
        if weight.group and weights.shape[1] % weight.group:  # `allocate` finds what divides it
            kind = QType(weight.element, "channel", symmetric=weight.symmetric)
        factor = _search(weights, stats, low, high, kind, activation, tie, may_shift, merged)
        if factor.gain >= (MERGE_GAIN if merged else INSERT_GAIN):
            found[source.name] = factor
    return found


def _candidates(draft: Draft) -> list[tuple[Node, Region | None, bool]]:
    """Tensors read by linears with constant weights, each with its region.

    Last in each triple: whether the region's writers can take a factor.
    """
    regions = {reader.node: region for region in find_regions(draft) for reader in region.readers}
    found: list[tuple[Node, Region | None, bool]] = []
    seen = set()
    for node in draft.calls(LINEAR):
        source = node.args[0]
        if source in seen or not draft.is_constant(node.args[1]) or not isinstance(source, Node):
            continue
        seen.add(source)
        readers = [u for u in source.users if u.target is LINEAR and u.args[0] is source]
        if any(len(operand(r, 1).users) > 1 for r in readers):
            continue  # a tied weight cannot be scaled for one of its readers
        region = regions.get(node)
        merged = region is not None and merge_obstacle(draft, region) is None
        if merged and region is not None:
            merged = {r.node for r in region.readers} == set(readers)
        if source.op == "call_function":
            found.append((source, region, merged))
    return found


def _takes_shift(region: Region) -> bool:
    """Whether a shift may be merged.

    One writer with a bias, and no op on the way that scaling alone commutes with.
    """
    return (
        not region.only_scale
        and len(region.writers) == 1
        and region.writers[0].target is not aten.rms_norm.default
        and all(reader.node.target is LINEAR for reader in region.readers)
    )


def _extremes(source: Node, stats: Statistics, observations: Observations) -> tuple[Tensor, Tensor]:
    """Lowest and highest value to expect of each channel, (channels,) float64."""
    if source.target in ACTIVATIONS:
        before = observations[operand(source, 0).name]
        ends = torch.linspace(-5.0, 5.0, 41, dtype=torch.float64)[:, None]
        grid = source.target(before.mean + ends * before.deviation, **source.kwargs)
        low, high = torch.minimum(stats.low, grid.amin(0)), torch.maximum(stats.high, grid.amax(0))
    else:
        low = torch.minimum(stats.low, stats.mean - 6 * stats.deviation)
        high = torch.maximum(stats.high, stats.mean + 6 * stats.deviation)
    floor = 0.05 * torch.maximum(high, -low).mean()
    narrow = torch.maximum(high, -low) < floor
    return torch.where(narrow, torch.minimum(low, -0.0 * floor), low), torch.where(
        narrow, floor, high
    )


def _search(
    weights: Tensor,
    stats: Statistics,
    low: Tensor,
    high: Tensor,
    weight: QType,
    activation: QType,
    tie: Tensor | None,
    may_shift: bool,
    merged: bool,
) -> Factor:
    rows = stats.rows.double()
    ones, zeros = torch.ones_like(low), torch.zeros_like(low)
    largest = weights.abs().amax(0).clamp(min=1e-5)
    trials: list[tuple[str, Tensor, Tensor]] = [("none", ones, zeros)]
    shifts = [("", zeros)]
    if may_shift and bool((low < high).all()):
        shifts.append((" + shift", _tied((high + low) / 2, tie)))
    for suffix, shift in shifts:
        terms = _Terms(weights, rows, low, high, shift)
        absmax = torch.maximum(high - shift, shift - low).clamp(min=1e-5)
        grid = []
        for alpha in ALPHAS:
            scale = _tied(absmax.pow(alpha) / largest.pow(1 - alpha), tie)
            grid.append((f"alpha {alpha}{suffix}", scale / scale.log().mean().exp(), shift))
        trials += grid
        expected = [float(_noise(s.log(), terms, weight, activation, False)) for _, s, _ in grid]
        start = grid[min(range(len(grid)), key=expected.__getitem__)]
        refined = _refine(start[1], terms, weight, activation)
        trials.append((f"refined{suffix}", _tied(refined, tie), shift))
    errors = [_true_error(s, z, weights, rows, low, high, weight, activation) for _, s, z in trials]
    best = min(range(len(trials)), key=errors.__getitem__)
    method, scale, shift = trials[best]
    gain = 10 * math.log10(max(errors[0], 1e-300) / max(errors[best], 1e-300))
    return Factor(scale.float(), shift.float(), merged, method, gain)


def _tied(value: Tensor, tie: Tensor | None) -> Tensor:
    """One value for all channels that carry the same channel of the writer: their mean.

    Such channels are those of repeated key/value heads.
    """
    if tie is None:
        return value
    count = int(tie.max()) + 1
    sums = torch.zeros(count, dtype=value.dtype).index_add_(0, tie, value)
    sizes = torch.zeros(count, dtype=value.dtype).index_add_(0, tie, torch.ones_like(value))
    return (sums / sizes.clamp(min=1))[tie]


def _steps(kind: QType) -> int:
    return kind.qmax - kind.qmin


@dataclass
class _Terms:
    """What the noise model needs of one tensor, computed once."""

    weights: Tensor
    rows: Tensor
    low: Tensor
    high: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        self.power = (self.rows - self.shift).square().mean(0)
        self.columns = self.weights.square().sum(0)
        self.logs = self.weights.abs().clamp(min=1e-12).double().log()
        self.peaks = self.logs.amax(1)
        # A soft maximum over a row of w s is then a product with a vector, for any s.
        self.powers = (SHARPNESS * (self.logs - self.peaks[:, None])).exp()
        self.top = (self.high - self.shift).clamp(min=1e-4).log()
        self.bottom = (self.shift - self.low).clamp(min=1e-4).log()


def _noise(t: Tensor, terms: _Terms, weight: QType, activation: QType, soft: bool) -> Tensor:
    """log(L_a + L_w) at s = exp(t); maxima are p-norms with p = `SHARPNESS` where soft."""

    def peak(logs: Tensor) -> Tensor:
        if not soft:
            return logs.amax().exp()
        return (torch.logsumexp(SHARPNESS * logs, 0) / SHARPNESS).exp()

    span = peak(terms.top - t) + peak(terms.bottom - t)
    of_activation = (span / _steps(activation)) ** 2 / 12 * ((2 * t).exp() * terms.columns).sum()
    if soft:
        largest = t.max().detach()
        sums = terms.powers @ (SHARPNESS * (t - largest)).exp()
        rows = sums.clamp(min=1e-300).log() / SHARPNESS + terms.peaks + largest
    else:
        rows = (terms.logs + t).amax(1)
    steps = rows.exp() / weight.qmax
    of_weight = steps.square().sum() / 12 * (terms.power * (-2 * t).exp()).sum()
    return (of_activation + of_weight).log()


def _refine(
    start: Tensor, terms: _Terms, weight: QType, activation: QType, iterations: int = 60
) -> Tensor:
    """Adam on log s from the best grid point.

    The mean of log s is fixed, because only ratios matter.
    """
    with torch.enable_grad():
        t = start.log().clone().requires_grad_(True)
        optimiser = torch.optim.Adam([t], lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, iterations)
        for _ in range(iterations):
            optimiser.zero_grad()
            _noise(t, terms, weight, activation, True).backward()
            optimiser.step()
            schedule.step()
    t = t.detach()
    return (t - t.mean()).exp()


def _true_error(
    scale: Tensor, shift: Tensor, weights: Tensor, rows: Tensor, low: Tensor, high: Tensor,
    weight: QType, activation: QType,
) -> float:  # fmt: skip
    """Squared error of the readers' output on the sampled rows.

    The activation's range is that of each row where it has a scale for each token, else the one
    that the extremes ask for.
    """
    x = ((rows - shift) / scale).float()
    w = (weights * scale).float()
    if activation.granularity == "token":
        rounded = activation.round_trip(x)
    else:
        bottom, top = ((low - shift) / scale).min(), ((high - shift) / scale).max()
        s, z = activation.scale_for(bottom, top)
        q = activation.round(x / s) + z.to(x.dtype)
        rounded = (q.clamp(activation.qmin, activation.qmax) - z.to(x.dtype)) * s
    noisy = rounded @ weight.round_trip(w, weight_axis(weight)).T
    return float((noisy - x @ w.T).double().square().sum())
