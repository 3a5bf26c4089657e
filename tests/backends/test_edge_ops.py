"""Ops beyond products and norms, as machine code, against torch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler.backends import edge
from qcompiler.errors import UnsupportedError
from qcompiler.passes.normalize import normalize
from qcompiler.program import capture
from qcompiler.target import Target

F = functional
ROWS = torch.arange(2)[:, None]


class Module(nn.Module):
    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(self, x) if y is None else self.function(self, x, y)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X3, X4 = normal(2, 6, 8), normal(1, 8, 6, 6)
PLACES = torch.tensor([[0, 5, 2, 2], [-1, 1, 3, -6]])
WHOLE = torch.tensor([[7, -7, 0, 9], [3, -1, 1 << 40, 2]])
TIES = torch.tensor([[1.0, 3.0, -0.0, 3.0, 0.0, -2.0], [2.0, 2.0, 2.0, float("nan"), -1.0, 5.0]])

# What is compared on one run: function, modules, inputs.
GROUPS: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], tuple[Tensor, ...]]] = {
    "activations": (
        lambda m, x: (F.elu(x), F.selu(x), F.celu(x), F.softplus(x), F.mish(x), F.logsigmoid(x),
                      F.hardshrink(x), F.softsign(x), F.glu(x), F.softmin(x, -1), m.prelu(x)),
        {"prelu": nn.PReLU(6)}, (X3,),
    ),
    "functions": (
        lambda m, x: (x.abs().log1p(), x.expm1(), (x * 1e-4).expm1(), (x * 1e-6).log1p(), x.exp2(),
                      x.abs().log2(), x.sign(), x.trunc(), x.atan(), x.tanh().asin(), x.sinh(),
                      x.tan(), torch.atan2(x, x.flip(0)), x.isnan(), x.log().nan_to_num(0.5)),
        {}, (X3,),
    ),
    "truth": (
        lambda m, x: (((x > 0) + (x > 1)).float(), (x > 0) * (x < 1), torch.maximum(x > 0, x > 1),
                      (x > 1).amax(-1), (x > 0).amin((0, 2)),
                      (1 / x.relu()).isfinite(), x.isclose(x.flip(0)),
                      torch.logaddexp(x, x.flip(0))),
        {}, (X3,),
    ),
    "integers of floats": (
        lambda m, x: ((x * 3).int().sum(1), (x * 3).int().amin(0), (x > 0).to(torch.int32).amax(1),
                      (x > 0).amin(1, keepdim=True), x.long().amax().amin(0), x.int().amax().sum(),
                      (x * 3).long().sum((0, 2)), *(x > 0).max(1)),
        {}, (X3,),
    ),
    "vectors and numbers": (
        lambda m, x: (x[0, 0] @ x[0, 1], x @ x[0, 0], x[0, :, 0] @ x, x[0] @ x[0, 0],
                      x.sum().mean() + x.amax().sum(), torch.quantile(x, 0.3),
                      *(x.quantile(q, -1) for q in (0.5, torch.tensor([0.1, 0.8]))),
                      torch.div(x, x.flip(0) * 0.3, rounding_mode="floor"),
                      F.scaled_dot_product_attention(x, x + 1, x * 2, is_causal=True),
                      F.scaled_dot_product_attention(x[0], key=x[1], value=x[0])),
        {}, (X3,),
    ),
    "inverse hyperbolic": (
        lambda m, x: (x.asinh(), (x * 1e38).asinh(), (x * 1e-30).asinh(), (x * 0).asinh(),
                      (1 + x.abs()).acosh(), x.acosh(), (x * 1e38).acosh(), x.atanh(),
                      (x * 1e-6).atanh(), x.hypot(x.flip(0)), (x * 1e25).hypot(x * 0),
                      (x * 0).hypot(x * 0), (x / 0).hypot(x.flip(0) / 0),
                      x.round().heaviside(x)),
        {}, (X3,),
    ),
    "division with rest": (
        lambda m, x: (x.fmod(0.7), x.remainder(0.7), x.remainder(-0.7), x // 0.3,
                      torch.remainder(x, x.flip(0) + 3)),
        {}, (X3,),
    ),
    "integers": (
        lambda m, i: (i // 3, i % 3, i & 3, i | 8, i ^ 5, i << 1, i >> 1, i.clamp(1, 3), i.sum(-1),
                      i.sum(), i.cumsum(1), i.prod(0), (i > 1).sum(0), (i > 1) ^ (i < 8), i.max(),
                      i.sort(-1, descending=True)[0], (i > 2).any(-1), (i > -9).all()),
        {}, (WHOLE,),
    ),
    "statistics": (
        lambda m, x: (x.var(-1), x.std((1, 2)), x.var(1, correction=0), x.logsumexp(-1),
                      x.softmax(1).view(-1), x.log_softmax(0), F.normalize(x, dim=1),
                      x.amax((0, 2)), x.min(), F.cosine_similarity(x, x.flip(1), dim=-1),
                      *(torch.cdist(x, x.flip(1) * 2, p) for p in (0.0, 2.0, math.inf))),
        {}, (X3,),
    ),
    "along a dimension": (
        lambda m, x: (x.cumsum(1), x.cumsum(-1), x.cumprod(0), x.prod(1), x.argmax(-1), x.argmin(1),
                      x.argmax(), *x.max(1), *x.min(-1, keepdim=True)),
        {}, (X3,),
    ),
    "sorting": (
        lambda m, x: (*x.sort(dim=-1, stable=True), *x.sort(dim=0, descending=True, stable=True),
                      *x.topk(2, -1), x.topk(3, 1, largest=False)[0], x.argmax(1), x.max(1)[0]),
        {}, (TIES,),
    ),
    "lookups": (
        lambda m, x, i: (x.gather(1, (i % 6)[:, :, None].expand(2, 4, 8)), x[:, i[1]],
                         x[ROWS, i], x[ROWS, i, i % 8], x[:, :, i[0]], x.index_select(2, i[0]),
                         x[ROWS[:, 0], i.argmax(-1)], x[ROWS, :, i % 8], F.one_hot(i % 6, 6) * 2,
                         x.flip(1) + x, x.roll(2, 1), x.roll((3, 1), (2, 1)),
                         torch.take_along_dim(x[:, :, 0], i % 6, 1)),
        {}, (X3, PLACES % 6),
    ),
    "from the end": (lambda m, x, i: (x[ROWS, i], x[:, i[1]] + 1), {}, (X3, PLACES)),
    "scattering": (
        lambda m, x, i: (x.scatter(1, i[:, :, None].expand(2, 4, 8), 5.0),
                         x.scatter_add(1, i[:, :, None].expand(2, 4, 8), x[:, 1:5]),
                         x.index_put((ROWS, i), torch.zeros(8)),
                         x.index_put((ROWS, i), x[:, :4], accumulate=True)),
        {}, (X3, torch.tensor([[0, 5, 2, 2], [5, 1, 3, 0]])),
    ),
    "written in place": (
        lambda m, x: (F.pad(x, (2, 1), mode="circular"), F.fold(F.unfold(x[:, None], 2, stride=2),
                      (6, 8), 2, stride=2), torch.select_scatter(x, x[:, 0], 1, 2)),
        {}, (X3,),
    ),
    "padding and parts": (
        lambda m, x: (F.pad(x, (1, 2, 0, 1), mode="reflect"), F.pad(x, (1, 1, 2, 1),
                      mode="replicate"), F.pad(x, (-1, 2, 1, -2)), F.pixel_shuffle(x, 2),
                      x.repeat(1, 2, 1, 3), x.tril(), x.triu(1), F.unfold(x, 3, padding=1)),
        {}, (X4,),
    ),
    "resizing": (
        lambda m, x: (F.interpolate(x, scale_factor=2),
                      F.interpolate(x, size=(9, 13), mode="bilinear"),
                      F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
                      F.interpolate(x, scale_factor=2, mode="bicubic"),
                      F.adaptive_avg_pool2d(x, (4, 5)), F.adaptive_max_pool2d(x, 1)),
        {}, (X4,),
    ),
    "sampling a grid": (
        lambda m, x, g: F.grid_sample(x, g, align_corners=False), {},
        (X4, torch.rand(1, 4, 4, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1),
    ),
    "norms": (
        lambda m, x: (m.group(x), m.instance(x), m.layer(x), m.batch(m.group(x))),
        {"group": nn.GroupNorm(4, 8), "instance": nn.InstanceNorm2d(8, affine=True),
         "layer": nn.LayerNorm((6, 6)), "batch": nn.BatchNorm2d(8)}, (X4 * 3 + 1,),
    ),
    "transposed convolutions": (
        lambda m, x: (m.up(x), m.wide(x), m.line(x[:, :, 0])),
        {"up": nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1),
         "wide": nn.ConvTranspose2d(8, 4, (2, 3), stride=(1, 3), dilation=(2, 1), bias=False),
         "line": nn.ConvTranspose1d(8, 3, 4, stride=2)}, (X4,),
    ),
    "floats that are no real numbers": (
        lambda m, x, y: (x * 0.0, 0.0 / x, x - x, (x + y) - y, (x + y) - x, x - (x + y),
                         y - (y - x), (x + 1e8) - 1e8,
                         torch.where(x == x, x, y), x != x, x != y, x != 0,
                         torch.addr(x[:1], y, y, beta=0, alpha=0),
                         x[1:].expand(3, 5).masked_fill(x[1:] < 1e31, -math.inf)[:, 1:].amax(-1),
                         (x[1:3] * 2).expand(17, 2)[:, 1:].reshape(1, 17).amax(-1),
                         -(x[1:3] * 2).expand(17, 2)[:, :1].amin(0)),
        {}, (torch.tensor([math.nan, math.inf, -math.inf, 1.1, 0.0, 1e30]),
             torch.tensor([1.0, 2.0, math.nan, math.inf, 3.3, 2.5])),
    ),
    "products of integers, truth values compared": (
        lambda m, x, y: ((x.int() @ y.int()).float(), (x.long() @ y.long()[0]).float(),
                         torch.nn.functional.linear(x.int(), y.int().mT[0], y.int()[0, 0]).float(),
                         ((x > 0) == (x > 1)).float(), ((x > 0) != (x > 1)).float(),
                         torch.div((x * 9).int(), 3, rounding_mode="floor").float()),
        {}, (torch.randn(2, 5, 8) * 3, torch.randn(2, 8, 8) * 3),
    ),
    "recurrent": (
        lambda m, x: (m.lstm(x)[0], m.both(x)[0], *m.gru(x), m.rnn(x)[0]),
        {"lstm": nn.LSTM(8, 5, batch_first=True), "gru": nn.GRU(8, 5),
         "both": nn.LSTM(8, 4, 2, bidirectional=True), "rnn": nn.RNN(8, 3)}, (X3,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_ops(tmp_path: Path, name: str) -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    function, parts, inputs = GROUPS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in parts.values():
            for parameter in part.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
    module = Module(function, **parts).eval()
    program = normalize(capture(module, inputs))
    edge.lower(program, Target.parse("tvm:native"), tmp_path)
    with torch.no_grad():
        want = module(*inputs)
    got = edge.load(tmp_path)(*inputs)
    wanted = [want] if isinstance(want, Tensor) else want
    assert len(got) == len(wanted)
    for number, (found, expected) in enumerate(zip(got, wanted, strict=True)):

        def say(text: str, number: int = number) -> str:
            return f"output {number}: {text}"

        # Exponentials and quotients to a few units in the last place, sums of at most 36 of them.
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6, equal_nan=True, msg=say)


class Refused(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: torch.fft.rfft(x).abs(), "_fft_r2c"),
        (lambda x: (x.double() * 2).float(), "_to_copy"),
        (lambda x: x + torch.rand_like(x), "rand_like"),
        (lambda x: x.erfinv(), "erf_inv"),
        (lambda x: x.median(-1)[0], "median"),
        (
            lambda x: F.scaled_dot_product_attention(
                x[:, None, :3], x[:, None], x[:, None], is_causal=True
            ),
            "causal attention of 3 queries over 6 keys",
        ),
    ],
)
def test_what_stays_refused(function: Any, reason: str, tmp_path: Path) -> None:
    program = normalize(capture(Refused(function), (X3,)))
    with pytest.raises(UnsupportedError, match=reason):
        edge.lower(program, Target.parse("tvm:native"), tmp_path)
