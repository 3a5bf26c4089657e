"""A transformers causal language model as one graph for prefill and decode, with its cache outside.

    input_ids         int64 (batch, new)                 the new tokens
    attention_mask    int64 (batch, past + new)          1 for tokens, 0 for padding
    position_ids      int64 (batch, new)                 where the model takes positions
    past_key_values.N.key, .value   float32 (batch, kv_heads, past, size)
      → logits        float32 (batch, new, vocabulary)
        present.N.key, .value       float32 (batch, kv_heads, past + new, size)

These are the names of transformers' exporters and of onnxruntime-genai. `past` may be 0: then it is
a prefill. How many layers keep keys and values, and of which size, is seen by running the model
once; no list of architectures. Layers with a sliding window keep the whole past and mask it.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.models.packages import optional
from qcompiler.spec import Batches, Generation, Inputs, ModelSpec

EXAMPLE = (2, 3, 5)  # batch, new tokens and past of the example inputs: no two sizes alike
SHORT = 24  # tokens of the batches that are kept with an artifact: their logits are large
DEFAULT_CONTEXT = 2048  # where the configuration names none

Tokens = tuple[Tensor, Tensor]  # input_ids and attention_mask, int64 (texts, tokens)


class Decoder(nn.Module):
    """The model with its key-value cache as flat inputs and outputs.

    Attributes:
        caches: (kv_heads, key size, value size) of each layer that has a cache.
        input_names, output_names: those of the artifact, flat.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.positions = "position_ids" in inspect.signature(model.forward).parameters
        self.caches = _caches(model)
        first = ["input_ids", "attention_mask", *(["position_ids"] if self.positions else [])]
        layers = range(len(self.caches))
        kinds = ("key", "value")
        self.input_names = (*first, *(f"past_key_values.{n}.{k}" for n in layers for k in kinds))
        self.output_names = ("logits", *(f"present.{n}.{k}" for n in layers for k in kinds))
        self.parameters_ = [*first, *(f"past_{n}_{k}" for n in layers for k in kinds)]
        # torch.export names the inputs after the parameters, whose number depends on the model.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(n, kind) for n in self.parameters_])

        def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
            return self._step(signature.bind(*args, **kwargs).arguments)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def _step(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        past = [
            (inputs[f"past_{n}_key"], inputs[f"past_{n}_value"]) for n in range(len(self.caches))
        ]
        options = {"position_ids": inputs["position_ids"]} if self.positions else {}
        cache = _cache(past)
        result = self.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        present = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (result.logits, *present)

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, str]]:
        """Input → {dimension: name}."""
        batch, past, new = "batch_size", "past_sequence_length", "sequence_length"
        total = "total_sequence_length"
        shapes = {
            name: {0: batch, 2: past} if name.startswith("past_") else {0: batch, 1: new}
            for name in self.parameters_
        }
        return {**shapes, "attention_mask": {0: batch, 1: total}}

    def prompt(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Inputs without a past; positions count the tokens that are no padding.

        Args:
            input_ids: int64 (batch, tokens).
            attention_mask: the same shape, 0 at padding.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.positions:
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        for n, (heads, *sizes) in enumerate(self.caches):
            for kind, size in zip(("key", "value"), sizes, strict=True):
                inputs[f"past_{n}_{kind}"] = torch.zeros(len(input_ids), heads, 0, size)
        return inputs

    @torch.no_grad()
    def continued(self, inputs: Mapping[str, Tensor], split: int) -> dict[str, Tensor]:
        """A prompt without padding as its first `split` tokens in the cache, and the rest.

        Args:
            inputs: as `prompt` gives them.
            split: tokens of the past.
        """
        first = {
            name: value[:, :split] if value.ndim == 2 else value for name, value in inputs.items()
        }
        _, *present = self(**first)
        rest = {
            name: value if name == "attention_mask" else value[:, split:]
            for name, value in inputs.items()
            if value.ndim == 2
        }
        names = [name for name in inputs if name.startswith("past_")]
        return {**rest, **dict(zip(names, present, strict=True))}

    def example(self, vocabulary: int) -> dict[str, Tensor]:
        """Arbitrary tokens with a past of their own."""
        batch, new, past = EXAMPLE
        tokens = (torch.arange(batch * (new + past)).view(batch, -1) * 7 + 5) % vocabulary
        return self.continued(self.prompt(tokens, torch.ones_like(tokens)), past)


def is_decoder(model: Any) -> bool:
    """Whether the model keeps keys and values of plain attention layers that can be handed over."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    return bool(_caches(model))


@torch.no_grad()
def _caches(model: Any) -> list[tuple[int, int, int]]:
    """(kv_heads, key size, value size) of each cached layer; empty where it is no such cache."""
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    try:
        result = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
        layers = result.past_key_values.layers
        found = [(layer.keys, layer.values) for layer in layers]
    except Exception:  # a state of another kind, such as that of a state-space model
        return []
    if not all(isinstance(t, Tensor) and t.ndim == 4 and t.shape[2] == 2 for p in found for t in p):
        return []
    return [(k.shape[1], k.shape[3], v.shape[3]) for k, v in found]


def _cache(past: list[tuple[Tensor, Tensor]]) -> Any:
    """Transformers' cache filled with these keys and values, one layer each, without a copy."""
    caches = optional("transformers.cache_utils", "hf", "a language model")

    def layer(keys: Tensor, values: Tensor) -> Any:
        made = caches.DynamicLayer()
        made.keys, made.values = keys, values
        made.dtype, made.device, made.is_initialized = keys.dtype, keys.device, True
        return made

    cache = caches.DynamicCache()
    cache.layers = [layer(*pair) for pair in past]
    return cache


def decoder_spec(
    name: str,
    model: Any,
    tokenizer: Any,
    encode: Callable[[list[str]], Inputs],
    files: Mapping[str, Path | bytes],
    calibration: Callable[[], Iterable[Tokens]] | None,
    held_out: Callable[[], Iterable[Tokens]] | None,
    note: str = "",
) -> ModelSpec:
    """A causal language model with its cache outside.

    Args:
        name: for reports.
        model: of transformers, with a cache of plain attention layers; see `is_decoder`.
        tokenizer: of transformers; None: the special tokens are those of the model's configuration.
        encode: texts → `input_ids` and `attention_mask`.
        files: tokenizer and configuration files.
        calibration, held_out: factories of encoded texts; None without a tokenizer.
        note: what the user should know of the calibration data.

    Returns:
        A spec whose excerpts are a few tokens of a text, every other one with a past.
    """
    decoder = Decoder(model)
    config = model.config.get_text_config()

    def prompts(texts: Callable[[], Iterable[Tokens]] | None) -> Batches | None:
        if texts is None:
            return None
        return lambda: (decoder.prompt(ids, mask) for ids, mask in texts())

    def excerpt(batch: Mapping[str, Tensor], index: int) -> Inputs:
        if batch["attention_mask"].shape != batch["input_ids"].shape:  # there is a past already
            return batch
        begin = int(batch["attention_mask"][0].argmax())  # padding may stand before the text
        ids, mask = (
            batch[name][:1, begin : begin + SHORT] for name in ("input_ids", "attention_mask")
        )
        prompt = decoder.prompt(ids, mask)
        count = int(mask.sum())
        alone = index % 2 == 0 or not 3 < count == ids.shape[1]
        return prompt if alone else decoder.continued(prompt, count // 2)

    return ModelSpec(
        name=name,
        module=decoder,
        example_inputs=decoder.example(config.vocab_size),
        dynamic_shapes=decoder.dynamic_shapes,
        calibration=prompts(calibration),
        held_out=prompts(held_out),
        calibration_note=note,
        input_names=decoder.input_names,
        output_names=decoder.output_names,
        padding_mask="attention_mask",
        excerpt=excerpt,
        encode=lambda texts: decoder.prompt(*tokens_of(encode(texts))),
        files=files,
        generation=_generation(model, config, tokenizer),
    )


def _generation(model: Any, config: Any, tokenizer: Any) -> Generation:
    settings = getattr(model, "generation_config", None)
    stop = [getattr(source, "eos_token_id", None) for source in (settings, config, tokenizer)]
    flat = [t for s in stop if s is not None for t in (s if isinstance(s, list) else [s])]
    start = getattr(config, "bos_token_id", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    return Generation(
        context=int(getattr(config, "max_position_embeddings", 0) or DEFAULT_CONTEXT),
        vocabulary=int(config.vocab_size),
        stop=tuple(dict.fromkeys(flat)),
        start=start if isinstance(start, int) else None,
        pad=pad if isinstance(pad, int) else None,
        family=str(model.config.model_type),
        heads=int(config.num_attention_heads),
        width=int(config.hidden_size),
    )


def tokens_of(inputs: Inputs) -> Tokens:
    """`input_ids` and `attention_mask` of an encoded batch, each int64 (texts, tokens)."""
    assert isinstance(inputs, Mapping), "texts are encoded by name"
    return inputs["input_ids"], inputs["attention_mask"]


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that `tokenizer.save_pretrained` writes, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {p.name: p.read_bytes() for p in sorted(Path(scratch).iterdir()) if p.is_file()}
