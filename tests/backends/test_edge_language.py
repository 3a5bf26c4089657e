"""Language models as machine code: the cache in place, chunks and single tokens alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompiler
from qcompiler.errors import InputError
from qcompiler.recipe import load_recipe

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
pytest.importorskip("tvm", reason="needs the extra [tvm]")

from qcompiler.backends.edge_decode import Decoder  # noqa: E402 - needs tvm
from qcompiler.models.hf_decoder import decoder_spec  # noqa: E402 - imports transformers
from qcompiler.spec import ModelSpec  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 5},
    "OPT": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "GPT2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
TEXT = torch.randint(3, 96, (37,), generator=torch.Generator().manual_seed(5))


def spec_of(family: str) -> ModelSpec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data.mul_(3)  # so that logits differ from token to token
    ids = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(1))

    def texts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(3):
            yield ids, torch.ones_like(ids)

    return decoder_spec(family, model, None, lambda texts: {}, {}, texts, texts)


def expected(spec: ModelSpec) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = spec.module.model(input_ids=TEXT[None], use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_float_weights_give_the_models_logits(family: str, tmp_path: Path) -> None:
    spec = spec_of(family)
    recipe = load_recipe("w8", {"weights": None, "embeddings": None, "min_sqnr": 60.0})
    qcompiler.compile(
        spec, target="tvm:native", recipe=recipe, out=tmp_path / "a",
        buckets={"tokens": [8], "capacity": [64]},
    )  # fmt: skip
    decoder = Decoder(tmp_path / "a", 1)
    decoder.reset(64)
    logits = decoder.feed(TEXT.numpy(), last=True)[-1]
    torch.testing.assert_close(torch.from_numpy(logits), expected(spec)[-1], rtol=2e-3, atol=2e-3)
    decoder.reset(64)
    steps = np.concatenate([decoder.feed(TEXT[i : i + 1].numpy()) for i in range(len(TEXT))])
    torch.testing.assert_close(torch.from_numpy(steps), expected(spec), rtol=2e-3, atol=2e-3)
    assert np.array_equal(steps[-1], logits), "chunks and single tokens differ"


def test_four_bit_weights_and_eight_bit_activations(tmp_path: Path) -> None:
    spec = spec_of("Llama")
    settings = {"rounding": "rtn", "smooth": False}
    artifact = qcompiler.compile(
        spec, target="tvm:native", recipe=load_recipe("w4a8", settings), out=tmp_path / "a",
        buckets={"tokens": [4, 16], "capacity": [64]},
    )  # fmt: skip
    assert artifact.manifest["audit"]["kernels"]["matmul_packed"] > 10
    lowering = [row["sqnr_db"] for row in artifact.manifest["errors"]["lowering"]]
    assert min(lowering) > 25, lowering
    decoder = Decoder(tmp_path / "a", 1)
    decoder.reset(64)
    chunks = decoder.feed(TEXT.numpy(), last=True)[-1]
    decoder.reset(64)
    for i in range(len(TEXT)):
        single = decoder.feed(TEXT[i : i + 1].numpy())[-1]
    assert np.array_equal(chunks, single)
    two = Decoder(tmp_path / "a", 2)
    two.reset(64)
    assert np.array_equal(two.feed(TEXT.numpy(), last=True)[-1], chunks), "threads change bits"

    assert artifact.manifest["capacity"] == 64
    with pytest.raises(InputError, match="64"):
        decoder.reset(65)


def test_rotated_when_it_runs(tmp_path: Path) -> None:
    """Online rotations (R4) by the Walsh–Hadamard kernel: 96 channels are 12 ⊗ 8."""
    spec = spec_of("Llama")
    settings = {"rotation": "hadamard", "rounding": "rtn", "clip": False, "smooth": False}
    artifact = qcompiler.compile(
        spec, target="tvm:native", recipe=load_recipe("w4a8", settings), out=tmp_path / "a",
        buckets={"tokens": [8], "capacity": [64]},
    )  # fmt: skip
    # What attention gives and what the MLP holds inside, in two layers.
    assert artifact.manifest["audit"]["kernels"]["rotate"] == 4
    lowering = [row["sqnr_db"] for row in artifact.manifest["errors"]["lowering"]]
    assert min(lowering) > 25, lowering
    decoder = Decoder(tmp_path / "a", 1)
    decoder.reset(64)
    chunks = decoder.feed(TEXT.numpy(), last=True)[-1]
    decoder.reset(64)
    for i in range(len(TEXT)):
        single = decoder.feed(TEXT[i : i + 1].numpy())[-1]
    assert np.array_equal(chunks, single)


def test_sizes_that_a_language_model_has_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a language model has tokens="):
        qcompiler.compile(
            spec_of("Llama"), target="tvm:native", recipe=load_recipe("w8", {"rounding": "rtn"}),
            out=tmp_path / "b", buckets={"sequence": [8]},
        )  # fmt: skip
