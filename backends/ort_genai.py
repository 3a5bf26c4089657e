"""`genai_config.json`: what onnxruntime-genai reads to run a language model from a folder.

The names of inputs and outputs are those of its own model builder already. Its keys are described
at https://onnxruntime.ai/docs/genai/reference/config.html.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from qcompiler.backends.ort_session import LIBRARY, MODEL, SHARED

CONFIG = "genai_config.json"
# Families that its generic decoder class knows by name. Another name is an error there, and the
# name decides nothing else for a model of these inputs, so other families go as the first.
FAMILIES = (
    "llama",
    "gemma",
    "gemma2",
    "granite",
    "mistral",
    "olmo",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
)


def write(
    folder: Path, generation: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]
) -> Path | None:
    """Write the configuration beside the model.

    Args:
        folder: with the lowered model.
        generation: the manifest's part on generation.
        inputs: the manifest's inputs.

    Returns:
        The file; None where the layers' caches differ in size, which it cannot say.
    """
    caches = [i for i in inputs if i["name"].startswith("past_key_values.")]
    sizes = {(i["shape"][1], i["shape"][3]) for i in caches}
    if len(sizes) != 1:
        return None
    ((kv_heads, size),) = sizes
    stop = list(generation["stop"])
    start, pad, context = generation["start"], generation["pad"], generation["context"]
    first = {i["name"]: i["name"] for i in inputs if i not in caches}
    family = generation["family"]
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if (folder / LIBRARY).is_file():
        options["custom_ops_library"] = LIBRARY
    config = {
        "model": {
            "bos_token_id": start if start is not None else (stop or [0])[0],
            "context_length": context,
            "decoder": {
                "session_options": options,
                "filename": MODEL,
                "head_size": size,
                "hidden_size": generation["width"],
                "inputs": {
                    **first,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": generation["heads"],
                "num_hidden_layers": len(caches) // 2,
                "num_key_value_heads": kv_heads,
            },
            "eos_token_id": stop[0] if len(stop) == 1 else stop,
            "pad_token_id": pad if pad is not None else (stop or [0])[0],
            "type": family if family in FAMILIES else FAMILIES[0],
            "vocab_size": generation["vocabulary"],
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": _shares(folder),
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }
    path = folder / CONFIG
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return path


def _shares(folder: Path) -> bool:
    model = onnx.load(folder / MODEL, load_external_data=False)
    return any(entry.key == SHARED for entry in model.metadata_props)
