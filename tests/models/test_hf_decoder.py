"""Decoders with their cache outside: one graph that continues what it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.program import Program, capture

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")

from qcompiler.models.hf_decoder import Decoder, is_decoder  # noqa: E402 - imports transformers

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Mistral": {**GROUPED, "sliding_window": 4},
    "Gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "Phi": {**SIZES, "pad_token_id": 0},
    "GPTNeoX": SIZES,
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPT": {
        **SIZES,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
    },
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def build(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def flat(program: Program, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    return program.run(tuple(inputs[name] for name in program.inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_continuation_equal_the_model_without_a_cache(family: str) -> None:
    model = build(family)
    assert is_decoder(model)
    decoder = Decoder(model)
    program = capture(decoder, decoder.example(64), decoder.dynamic_shapes)
    ids = torch.randint(3, 64, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(13) < torch.tensor([[13], [9], [13]])).long()
    prompt = decoder.prompt(ids, mask)
    positions = {"position_ids": prompt["position_ids"]} if decoder.positions else {}
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    valid = mask.bool()
    logits, *present = flat(program, prompt)
    torch.testing.assert_close(logits[valid], expected[valid], rtol=1e-4, atol=1e-5)
    assert len(present) == 4
    assert present[0].shape == (3, decoder.caches[0][0], 13, decoder.caches[0][1])
    # The padded row's prompt ends at 9: all rows go on from there, token by token.
    past = {name: value[:, :9] if value.ndim == 2 else value for name, value in prompt.items()}
    _, *present = flat(program, past)
    whole = torch.ones_like(mask)
    full = decoder.prompt(ids, whole)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=whole, use_cache=False).logits
    for place in range(9, 13):
        step = {
            name: value[:, : place + 1] if name == "attention_mask" else value[:, place : place + 1]
            for name, value in full.items()
            if value.ndim == 2
        }
        names = [n for n in program.inputs if n.startswith("past_")]
        logits, *present = flat(program, {**step, **dict(zip(names, present, strict=True))})
        torch.testing.assert_close(logits[:, 0], expected[:, place], rtol=1e-4, atol=1e-5)


def test_names_are_those_of_the_exporters() -> None:
    decoder = Decoder(build("Llama"))
    assert decoder.input_names == (
        "input_ids", "attention_mask", "position_ids",
        "past_key_values.0.key", "past_key_values.0.value",
        "past_key_values.1.key", "past_key_values.1.value",
    )  # fmt: skip
    assert decoder.output_names == (
        "logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value",
    )  # fmt: skip


def test_a_state_space_model_has_no_such_cache() -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4
    )
    assert not is_decoder(transformers.AutoModelForCausalLM.from_config(config).eval())
