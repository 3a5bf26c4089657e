"""Local transformers folders: what they become, and what is said of those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.models import find
from qcompiler.program import capture
from qcompiler.spec import ModelSpec

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
VIT: dict[str, Any] = {**TEXT, "image_size": 32, "patch_size": 8}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
PLAIN = ["input_ids", "attention_mask"]
TYPED = [*PLAIN, "token_type_ids"]
FOLDERS = [
    ("BertModel", TEXT, TYPED, ("last_hidden_state",)),
    ("BertForSequenceClassification", TEXT, TYPED, ("logits",)),
    ("BertForTokenClassification", TEXT, TYPED, ("logits",)),
    ("BertForQuestionAnswering", TEXT, TYPED, ("start_logits", "end_logits")),
    ("DistilBertModel", DISTIL, PLAIN, ("last_hidden_state",)),
    ("RobertaModel", {**TEXT, "type_vocab_size": 1}, PLAIN, ("last_hidden_state",)),
    ("ViTForImageClassification", VIT, ["pixel_values"], ("logits",)),
    (
        "ResNetForImageClassification",
        {**RESNET, "layer_type": "basic"},
        ["pixel_values"],
        ("logits",),
    ),
]


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def folder_spec(text: str) -> ModelSpec:
    spec = find(text)
    assert isinstance(spec, ModelSpec)
    return spec


def save(name: str, settings: dict[str, Any], folder: Path) -> Path:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    model_class = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(model_class.config_class(**settings)).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, **special: str) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [hf]")
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    vocabulary = {"<unk>": 0, "<end>": 1, **{chr(97 + i): 2 + i for i in range(26)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", **special
    ).save_pretrained(folder)


@pytest.mark.parametrize(("name", "settings", "inputs", "names"), FOLDERS)
def test_a_transformers_folder_is_captured(
    name: str, settings: dict[str, Any], inputs: list[str], names: tuple[str, ...], tmp_path: Path
) -> None:
    spec = folder_spec(f"hf:{save(name, settings, tmp_path)}")
    assert isinstance(spec.example_inputs, dict)
    assert list(spec.example_inputs) == inputs
    assert spec.output_names == names
    assert spec.calibration is None
    assert spec.files["config.json"] == tmp_path / "config.json"
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    batch = {"pixel_values": torch.randn(3, *spec.example_inputs[inputs[-1]].shape[1:])}
    if inputs != ["pixel_values"]:
        ids = torch.randint(3, 99, (3, 21))
        # Padding other than in the example, so that a mask that was baked in would show.
        mask = (torch.arange(21) < torch.tensor([[21], [15], [4]])).long()
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
        batch = {key: batch[key] for key in inputs}
    with torch.no_grad():
        expected = outputs(spec.module(**batch))
    for got, want in zip(outputs(program(**batch)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_folder_with_a_tokenizer_brings_calibration(tmp_path: Path) -> None:
    folder = save("LlamaForCausalLM", {**GROUPED, "max_position_embeddings": 64}, tmp_path)
    save_tokenizer(folder)
    spec = folder_spec(f"hf:{folder}")
    assert spec.encode is not None
    batch = spec.encode(["abc", "a" * 200])
    assert isinstance(batch, dict)
    assert batch["input_ids"].shape == (2, 64)
    assert batch["past_1_value"].shape == (2, 2, 0, 8)
    # There is no padding token: the end token fills up, behind the text.
    assert batch["input_ids"][0, :4].tolist() == [2, 3, 4, 1]
    assert batch["attention_mask"].sum(1).tolist() == [3, 64]
    assert spec.calibration is not None
    assert len(list(spec.calibration())) == 19
    assert spec.held_out is not None
    assert spec.excerpt is not None
    parts = [dict(spec.excerpt(dict(batch), n)) for n, batch in enumerate(spec.held_out())]
    assert any(part["past_0_key"].shape[2] for part in parts)
    assert max(part["input_ids"].numel() for part in parts) <= 24
    given = dict(batch)
    left = {n: torch.cat([0 * x[1:, :40], x[1:, :40]], 1) for n, x in given.items() if x.ndim == 2}
    part = dict(spec.excerpt(given | left, 0))  # padding before the text is left out
    assert torch.equal(part["input_ids"], given["input_ids"][1:, :24])
    assert part["attention_mask"].sum() == 24
    assert spec.generation is not None
    assert (spec.generation.context, spec.generation.stop) == (64, (2, 1))
    assert "tokenizer.json" in spec.files
    assert "model.safetensors" not in spec.files


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings.update(changes)
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def test_a_folder_without_tokenizer_says_so_when_texts_are_given(tmp_path: Path) -> None:
    spec = folder_spec(f"hf:{save('BertModel', TEXT, tmp_path)}")
    assert spec.encode is not None
    with pytest.raises(InputError, match="no tokenizer in this folder"):
        spec.encode(["a text"])


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    folder = save("BertModel", TEXT, tmp_path / "bert")
    with pytest.raises(InputError, match=r"no config.json in this folder"):
        find(f"hf:{tmp_path}")
    change_config(folder, architectures=["BertForSequenceClassification"])
    with pytest.raises(InputError, match=r"weights lack 2 tensors of BertForSequenceCl.*classif"):
        find(f"hf:{folder}")
    change_config(folder, architectures=["BertForNextSentencePrediction"])
    with pytest.raises(InputError, match=r"BertForNextSentencePrediction of type 'bert' is not"):
        find(f"hf:{folder}")
    change_config(folder, auto_map={"AutoModel": "code.Model"})
    with pytest.raises(InputError, match=r"needs code from its own folder"):
        find(f"hf:{folder}")
    change_config(folder, auto_map=None, architectures=["BertModel"])
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"transformers cannot load it"):
        find(f"hf:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights"):
        find(f"hf:{folder}")


def test_a_foreign_tokenizer_is_noticed(tmp_path: Path) -> None:
    folder = save("BertModel", {**TEXT, "vocab_size": 20}, tmp_path)
    save_tokenizer(folder, pad_token="<unk>")
    with pytest.raises(InputError, match=r"gives token \d+, the model knows 20"):
        find(f"hf:{folder}")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
    folder = save("T5ForConditionalGeneration", {**sizes, "num_heads": 4}, tmp_path)
    with pytest.raises(InputError, match=r"an encoder-decoder \('t5'\), not read"):
        find(f"hf:{folder}")


def test_an_image_folder_uses_its_own_processor(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow, extra [zoo]")
    folder = save("ViTForImageClassification", VIT, tmp_path / "vit")
    image_module.new("RGB", (50, 40), (255, 255, 255)).save(tmp_path / "white.png")
    spec = folder_spec(f"hf:{folder}")
    assert spec.encode is not None
    with pytest.raises(InputError, match=r"no preprocessor_config.json"):
        spec.encode([str(tmp_path / "white.png")])
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    batch = spec.encode([str(tmp_path / "white.png")])
    assert isinstance(batch, dict)
    torch.testing.assert_close(batch["pixel_values"], torch.ones(1, 3, 32, 32))
