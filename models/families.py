"""Tiny, randomly initialised models of the transformers families, each as a `ModelSpec`.

Two layers, 48 channels, 4 heads; every scale, shift and bias is moved off its initial 1 or 0. For
tests of generality, and for the table of families that `tests/benchmarks/families.py` makes.
"""

# ruff: noqa: D102  `forward` is described by its class

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.models.packages import optional
from qcompiler.spec import ModelSpec

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 128, 48, 4, 2, 64

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": LENGTH,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_CLASSIC = {"vocab_size": VOCABULARY, "n_layer": LAYERS, "n_head": HEADS}
# Family → (its configuration class, its fields, what its module is given).
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2Config", _GROUPED),
    "Qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "Mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 8}),
    "Gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "Gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "GPT-2": ("GPT2Config", {**_CLASSIC, "n_embd": WIDTH, "n_positions": LENGTH}),
    "OPT": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "ffn_dim": 96, "pad_token_id": 0,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "max_position_embeddings": LENGTH, "word_embed_proj_dim": WIDTH,
        },
    ),
    "Phi": ("PhiConfig", _COMMON),
    "GPT-NeoX": ("GPTNeoXConfig", _COMMON),
    "BLOOM": ("BloomConfig", {**_CLASSIC, "hidden_size": WIDTH, "pad_token_id": 0}),
    "Mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertConfig", _COMMON),
    "DistilBERT": (
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 96, "n_layers": LAYERS,
            "n_heads": HEADS, "max_position_embeddings": LENGTH,
        },
    ),
    "RoBERTa": ("RobertaConfig", _COMMON),
}  # fmt: skip
FAMILIES = (*DECODERS, *ENCODERS, "ViT", "T5", "Whisper")


class Given(nn.Module):
    """A transformers model that takes tensors by name and gives one tensor."""

    def __init__(self, model: Any, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field


class Text(Given):
    """Encoders, and decoders without their cache."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.field]


class Image(Given):
    """Image classifiers."""

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values=pixel_values)[self.field]


class Translator(Given):
    """Encoder-decoders of text, both halves at once."""

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Any:
        result = self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids)
        return result[self.field]


class Listener(Given):
    """Encoder-decoders of speech, both halves at once."""

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Any:
        result = self.model(input_features=input_features, decoder_input_ids=decoder_input_ids)
        return result[self.field]


def _text(g: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(g: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}


def _translation(g: torch.Generator) -> dict[str, Tensor]:
    first, second = (torch.randint(3, VOCABULARY, (2, n), generator=g) for n in (9, 7))
    return {"input_ids": first, "decoder_input_ids": second}


def _speech(g: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=g)
    return {"input_features": torch.randn(2, 8, 32, generator=g), "decoder_input_ids": ids}


def _sizes(name: str, value: Tensor) -> dict[int, str]:
    """The dynamic sizes of an input."""
    if value.ndim != 2:
        return {0: "batch"}
    return {0: "batch", 1: "target" if name.startswith("decoder") else "sequence"}


def build(family: str) -> ModelSpec:
    """The tiny model of a family, with eight calibration batches and two held-out ones."""
    hf = optional("transformers", "hf", f"the tiny {family}")
    torch.manual_seed(0)
    draw: Callable[[torch.Generator], dict[str, Tensor]] = _text
    module: nn.Module
    if family in DECODERS:
        kind, fields = DECODERS[family]
        config = getattr(hf, kind)(**fields)
        config.use_cache = False
        # Other ways to run experts choose them in Python, or by an operator without ONNX form.
        options = {"experts_implementation": "batched_mm"} if family == "Mixtral" else {}
        module = Text(hf.AutoModelForCausalLM.from_config(config, **options), "logits")
    elif family in ENCODERS:
        kind, fields = ENCODERS[family]
        module = Text(hf.AutoModel.from_config(getattr(hf, kind)(**fields)), "last_hidden_state")
    elif family == "ViT":
        vit = hf.ViTConfig(
            hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, image_size=16, patch_size=4,
        )  # fmt: skip
        module, draw = Image(hf.ViTForImageClassification(vit), "logits"), _image
    elif family == "T5":
        t5 = hf.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=12, d_ff=96, num_layers=LAYERS,
            num_heads=HEADS, use_cache=False,
        )  # fmt: skip
        module, draw = Translator(hf.T5ForConditionalGeneration(t5), "logits"), _translation
    else:
        whisper = hf.WhisperConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=96,
            decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=16, use_cache=False,
            max_target_positions=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )  # fmt: skip
        module, draw = Listener(hf.WhisperForConditionalGeneration(whisper), "logits"), _speech
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))

    def batches(first: int, count: int) -> Iterator[dict[str, Tensor]]:
        return (draw(torch.Generator().manual_seed(first + i)) for i in range(count))

    example = draw(torch.Generator().manual_seed(0))
    return ModelSpec(
        name=family,
        module=module.eval(),
        example_inputs=example,
        dynamic_shapes={name: _sizes(name, value) for name, value in example.items()},
        calibration=lambda: batches(10, 8),
        held_out=lambda: batches(50, 2),
        output_names=(getattr(module, "field", "output"),),
    )
