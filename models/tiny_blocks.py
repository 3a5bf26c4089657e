"""The modules of the tiny models; see `tiny.py` for what each is for."""

# mypy: disable-error-code="no-any-return"
# (calling a module gives Any for mypy)
# ruff: noqa: D102  `forward` is described by its class
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32
VOCABULARY = 64


@torch.no_grad()
def _amplify(weights: Iterable[Tensor], channels: tuple[int, ...], factor: float) -> None:
    """Scale a few output channels (dimension 0) of weights and biases."""
    for weight in weights:
        weight[list(channels)] *= factor


class Mlp(nn.Module):
    """Linear, ReLU, linear, ReLU, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 64)
        self.second = nn.Linear(64, 48)
        self.last = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def scaled_norm() -> nn.LayerNorm:
    """A LayerNorm whose scale and shift do something."""
    norm = nn.LayerNorm(WIDTH)
    nn.init.uniform_(norm.weight, 0.25, 2.0)
    nn.init.normal_(norm.bias, std=0.3)
    return norm


class RmsNorm(nn.Module):
    """weight · x / sqrt(mean(x²) + ε), in the operations that transformers writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH).uniform_(0.25, 2.0))

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        x = x.float()
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        return self.weight * x.to(given)


class NormReaders(nn.Module):
    """A norm and two linears that read it, one without a bias."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.left = nn.Linear(WIDTH, 24)
        self.right = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.left(x), self.right(x)


class Encoder(nn.Module):
    """Embedding and one transformer encoder block; the norms come before or after the branches."""

    def __init__(self, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.norm_1, self.norm_2 = scaled_norm(), scaled_norm()
        if pre_norm:
            _amplify([self.norm_1.weight, self.norm_1.bias], (3, 17), 12.0)
            _amplify([self.norm_2.weight, self.norm_2.bias], (3, 21), 12.0)
            _amplify([self.value.weight, self.up.weight], (5, 30), 6.0)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, 4, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        return self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.pre_norm:
            x = x + self.attend(self.norm_1(x), attention_mask)
            return x + self.feed(self.norm_2(x))
        x = self.norm_1(x + self.attend(x, attention_mask))
        return self.norm_2(x + self.feed(x))


class _ConvNorm(nn.Sequential):
    """Conv, BatchNorm with statistics as after training; then ReLU6 unless told otherwise."""

    def __init__(
        self, inner: int, outer: int, kernel: int, groups: int = 1, act: bool = True
    ) -> None:
        conv = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(outer)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias, std=0.5)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.1, 1.0)
        super().__init__(conv, norm, *([nn.ReLU6()] if act else []))


class Residual(nn.Module):
    """Two convs; the input is added before the last ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _ConvNorm(16, 16, 3), _ConvNorm(16, 16, 3, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + self.second(self.first(x)))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = _ConvNorm(16, 48, 1)
        self.depthwise = _ConvNorm(48, 48, 3, groups=48)
        self.project = _ConvNorm(48, 16, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class ConvNet(nn.Module):
    """Stem, a block, global average pool, linear."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = _ConvNorm(3, 16, 3), block, nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class TiedHead(nn.Module):
    """Embedding, linear, tanh, and the embedding again as output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(input_ids))))


class Decoder(nn.Module):
    """Embedding, a Llama-like block with 4 query and 2 key-value heads, norm, output head."""

    heads, kv_heads, head_dim = 4, 2, 8
    frequency: Tensor

    def __init__(self) -> None:
        super().__init__()
        narrow = self.kv_heads * self.head_dim
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, narrow, bias=False)
        self.value = nn.Linear(WIDTH, narrow, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 64, bias=False)
        self.up = nn.Linear(WIDTH, 64, bias=False)
        self.down = nn.Linear(64, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.norm_1, self.norm_2, self.norm_3 = RmsNorm(), RmsNorm(), RmsNorm()
        exponents = torch.arange(0, self.head_dim, 2) / self.head_dim
        self.register_buffer("frequency", 10000.0**-exponents, persistent=False)
        _amplify([self.norm_1.weight, self.norm_2.weight], (3, 17), 12.0)
        _amplify([self.value.weight, self.up.weight], (5, 11), 6.0)

    def rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position: (batch, 1, sequence, head_dim) each."""
        batch, length, _ = x.shape
        positions = torch.arange(length, device=x.device)[None].expand(batch, -1)
        columns = self.frequency[None, :, None].float().expand(batch, -1, 1)
        angles = (columns @ positions[:, None, :].float()).transpose(1, 2)
        both = torch.cat((angles, angles), dim=-1)[:, None]
        return both.cos(), both.sin()

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.query(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.key(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = self.rotation(x)
        q = q * cos + _rotate_half(q) * sin
        k = k * cos + _rotate_half(k) * sin
        repeat = self.heads // self.kv_heads
        mixed = F.scaled_dot_product_attention(
            q, _repeat_heads(k, repeat), _repeat_heads(v, repeat), is_causal=True
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.attend(self.norm_1(x))
        hidden = self.norm_2(x)
        x = x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))
        return self.head(self.norm_3(x))


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _repeat_heads(x: Tensor, repeat: int) -> Tensor:
    batch, heads, length, size = x.shape
    wide = x[:, :, None].expand(batch, heads, repeat, length, size)
    return wide.reshape(batch, heads * repeat, length, size)


class SpelledActivations(nn.Module):
    """GELU by tanh, GELU by erf and SiLU, each after a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = 3 * self.first(x)
        x = (
            0.5
            * x
            * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))
        )
        x = 3 * self.second(x)
        x = x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
        x = 3 * self.third(x)
        return self.last(x * torch.sigmoid(x))
