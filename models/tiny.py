"""Tiny models that each show one thing a pass must get right; for tests and for trying the tool.

Every function returns a `ModelSpec` whose weights are seeded, with a dynamic batch (and sequence
where there is one), eight calibration batches of four samples and two held-out batches. They build
in milliseconds. In the zoo they are called `tiny-…`, with dashes.

In `attention_block` and `gqa_decoder` a few channels of the norms, values and feed-forward layers
are amplified, so that activations have the outlier channels that large transformers show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Generator, Tensor, nn

from qcompiler.models.tiny_blocks import (
    VOCABULARY,
    WIDTH,
    ConvNet,
    Decoder,
    Encoder,
    InvertedResidual,
    Mlp,
    NormReaders,
    Residual,
    RmsNorm,
    SpelledActivations,
    TiedHead,
    scaled_norm,
)
from qcompiler.spec import ModelSpec

Draw = Callable[[Generator], dict[str, Tensor]]
TOKENS = {0: "batch", 1: "sequence"}


def mlp() -> ModelSpec:
    """Three linears with ReLU between: x (batch, 32) float32 → (batch, 10)."""
    return _spec("tiny-mlp", Mlp, _vectors, {"x": {0: "batch"}})


def norm_linear() -> ModelSpec:
    """LayerNorm read by two linears: (batch, sequence, 32) → (…, 24) and (…, 16)."""
    outputs = ("left", "right")
    return _spec(
        "tiny-norm-linear", lambda: NormReaders(scaled_norm()), _hidden, {"x": TOKENS}, outputs
    )


def rms_norm_linear() -> ModelSpec:
    """RMSNorm spelled out, read by two linears: (batch, sequence, 32) → (…, 24) and (…, 16)."""
    outputs = ("left", "right")
    return _spec(
        "tiny-rms-norm-linear", lambda: NormReaders(RmsNorm()), _hidden, {"x": TOKENS}, outputs
    )


def attention_block() -> ModelSpec:
    """Pre-norm transformer encoder block with SDPA and a padding mask; it has outlier channels."""
    return _spec(
        "tiny-attention-block",
        lambda: Encoder(pre_norm=True),
        _padded,
        dict.fromkeys(PADDED, TOKENS),
    )


def post_norm_block() -> ModelSpec:
    """Post-norm transformer encoder block as in BERT, with SDPA and a padding mask."""
    return _spec(
        "tiny-post-norm-block",
        lambda: Encoder(pre_norm=False),
        _padded,
        dict.fromkeys(PADDED, TOKENS),
    )


def conv_block() -> ModelSpec:
    """Conv, BatchNorm, ReLU6 with a residual add, pooled: (batch, 3, 16, 16) → (batch, 10)."""
    return _spec("tiny-conv-block", lambda: ConvNet(Residual()), _images, {"x": {0: "batch"}})


def depthwise() -> ModelSpec:
    """Inverted residual with a depthwise conv as in MobileNet: (batch, 3, 16, 16) → (batch, 10)."""
    return _spec(
        "tiny-depthwise", lambda: ConvNet(InvertedResidual()), _images, {"x": {0: "batch"}}
    )


def tied_weights() -> ModelSpec:
    """One matrix used as embedding and as output head: input_ids (batch, sequence) → logits."""
    return _spec("tiny-tied-weights", TiedHead, _tokens, {"input_ids": TOKENS}, ("logits",))


def gqa_decoder() -> ModelSpec:
    """Decoder block as in Llama: RMSNorm, rotary, grouped-query attention, gated SiLU; outliers."""
    return _spec("tiny-gqa-decoder", Decoder, _tokens, {"input_ids": TOKENS}, ("logits",))


def gelu_forms() -> ModelSpec:
    """GELU (tanh and erf) and SiLU, spelled out between linears: (batch, 32) → (batch, 32)."""
    return _spec("tiny-gelu-forms", SpelledActivations, _vectors, {"x": {0: "batch"}})


def _spec(
    name: str,
    build: Callable[[], nn.Module],
    draw: Draw,
    dynamic: Mapping[str, Mapping[int, str]],
    outputs: tuple[str, ...] = ("output",),
) -> ModelSpec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build().eval()

    def batches(first: int, count: int) -> Iterable[dict[str, Tensor]]:
        return (draw(Generator().manual_seed(first + i)) for i in range(count))

    return ModelSpec(
        name=name,
        module=module,
        example_inputs=draw(Generator().manual_seed(0)),
        dynamic_shapes=dynamic,
        calibration=lambda: batches(100, 8),
        held_out=lambda: batches(200, 2),
        output_names=outputs,
        padding_mask="attention_mask" if "attention_mask" in dynamic else "",
    )


PADDED = ("input_ids", "attention_mask")


def _vectors(g: Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(4, WIDTH, generator=g)}


def _length(g: Generator) -> int:
    return int(torch.randint(8, 17, (1,), generator=g))


def _hidden(g: Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(4, _length(g), WIDTH, generator=g) + 0.5}


def _images(g: Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(4, 3, 16, 16, generator=g)}


def _tokens(g: Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (4, _length(g)), generator=g)}


def _padded(g: Generator) -> dict[str, Tensor]:
    """Tokens with a mask of ones and trailing zeros; every sample keeps at least half."""
    longest = _length(g)
    kept = torch.randint(longest // 2, longest + 1, (4, 1), generator=g)
    mask = (torch.arange(longest)[None] < kept).long()
    return {
        "input_ids": torch.randint(1, VOCABULARY, (4, longest), generator=g) * mask,
        "attention_mask": mask,
    }
