"""A local folder of Hugging Face transformers (config.json, weights, tokenizer) as a `ModelSpec`.

What the model takes and gives follows from `architectures` in its configuration, looked up in
transformers' own tables of what each class is for. Nothing is ever downloaded and no code from the
folder is run.

    encoder                      input_ids, attention_mask [, token_type_ids] → last_hidden_state
    sequence, token classifier   the same                                     → logits
    masked language model        the same                                     → logits
    question answering           the same                           → start_logits, end_logits
    decoder                      input_ids, attention_mask, position_ids, past_key_values.N.key …
                                                                      → logits, present.N.key …
    image model                  pixel_values                       → last_hidden_state or logits

Decoders whose state is no cache of keys and values (state-space models) take the first two alone.
Encoder-decoders, audio and models that need remote code are refused.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.errors import InputError, first_line
from qcompiler.models.hf_decoder import (
    Tokens,
    decoder_spec,
    is_decoder,
    tokenizer_files,
    tokens_of,
)
from qcompiler.models.hf_inputs import (
    companions,
    image_encoder,
    load_tokenizer,
    processor_size,
    text_encoder,
)
from qcompiler.models.packages import optional
from qcompiler.models.sentences import (
    calibration_texts,
    grouped_by_length,
    held_out_texts,
    paragraphs,
)
from qcompiler.spec import Inputs, ModelSpec

BATCH = 8
MAX_TOKENS = 128


@dataclass(frozen=True)
class Task:
    """What a class of models is for.

    Attributes:
        table: transformers' table of these classes, in `models.auto.modeling_auto`.
        loader: the auto class that loads them.
        outputs: the fields of their result that the captured model returns.
    """

    table: str
    loader: str
    outputs: tuple[str, ...]


TASKS = (
    Task("MODEL_MAPPING_NAMES", "AutoModel", ("last_hidden_state",)),
    Task(
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForSequenceClassification",
        ("logits",),
    ),
    Task(
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForTokenClassification",
        ("logits",),
    ),
    Task(
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        "AutoModelForQuestionAnswering",
        ("start_logits", "end_logits"),
    ),
    Task("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM", ("logits",)),
    Task("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM", ("logits",)),
    Task(
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForImageClassification",
        ("logits",),
    ),
)


def from_folder(folder: Path, extra: str = "hf") -> ModelSpec:
    """Load a local transformers folder in float32.

    Args:
        folder: holds config.json and weights; a tokenizer or an image processor where data is to
            be encoded.
        extra: the extra of this package that the user is told to install for transformers.

    Returns:
        A spec with dynamic batch and, for text, dynamic sequence. Text models with a tokenizer
        bring calibration and held-out sentences; others bring none.

    Raises:
        InputError: the folder, its configuration, weights or task cannot be used, or transformers
            is not installed.
    """
    transformers = optional("transformers", extra, f"hf:{folder}")
    settings = _settings(folder)
    task = _task(folder, settings)
    model = _load(folder, getattr(transformers, task.loader), task)
    name = folder.resolve().name
    if model.main_input_name == "pixel_values":
        return _image_spec(name, folder, model, task)
    # Models of texts and images together have no vocabulary of their own, only one of each part.
    if model.main_input_name == "input_ids" and hasattr(model.config, "vocab_size"):
        return _text_spec(name, folder, model, task)
    raise InputError(
        f"{folder}: a {type(model).__name__} with the main input '{model.main_input_name}'; "
        "only text encoders, text decoders and image models are read from a folder. Write a "
        "function that returns a ModelSpec and give file.py:function"
    )


class TextModel(nn.Module):
    """A transformers text model that returns plain tensors."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Both int64 (batch, sequence), the mask 1 for tokens and 0 for padding."""
        result = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return _plain(result, self.outputs)


class SegmentedTextModel(TextModel):
    """The same with segment numbers, for models with more than one token type."""

    def forward(  # type: ignore[override]  # one input more; only `torch.export` calls it
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Any:
        """All int64 (batch, sequence)."""
        result = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        return _plain(result, self.outputs)


class ImageModel(nn.Module):
    """A transformers image model that returns plain tensors."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, pixel_values: Tensor) -> Any:
        """float32 (batch, channels, height, width)."""
        return _plain(self.model(pixel_values=pixel_values), self.outputs)


def _plain(result: Any, outputs: tuple[str, ...]) -> Any:
    values = tuple(result[name] for name in outputs)
    return values if len(values) > 1 else values[0]


def _settings(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"hf:{folder}: no such folder; "
            "models are never downloaded, give the path of a local one"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"hf:{folder}: no config.json in this folder; give one written by save_pretrained"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise InputError(f"{path}: no 'model_type', so not a transformers configuration")
    if "auto_map" in settings:
        raise InputError(
            f"{path}: the model needs code from its own folder ('auto_map'), not run here; "
            "load it in a function that returns a ModelSpec and give file.py:function"
        )
    if settings.get("is_encoder_decoder"):
        raise InputError(
            f"{path}: an encoder-decoder ('{settings['model_type']}'), not read from a folder; "
            "give its halves, each by a function that returns a ModelSpec: file.py:function"
        )
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        raise InputError(
            f"hf:{folder}: no weights (*.safetensors or pytorch_model*.bin) in this folder"
        )
    return settings


def _task(folder: Path, settings: dict[str, Any]) -> Task:
    tables = optional("transformers.models.auto.modeling_auto", "hf", f"hf:{folder}")
    kind = settings["model_type"]
    architectures = settings.get("architectures") or []
    found: list[str] = []
    for task in TASKS:
        entry = getattr(tables, task.table).get(kind)
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        found.extend(names)
        if set(names) & set(architectures[:1]):
            return task
        if names and not architectures:
            return task
    raise InputError(
        f"{folder / 'config.json'}: the architecture {', '.join(architectures[:1]) or '(none)'} "
        f"of type '{kind}' is not read from a folder ({', '.join(found) or 'none'} would be); "
        "load it in a function that returns a ModelSpec and give file.py:function"
    )


def _load(folder: Path, loader: Any, task: Task) -> Any:
    logging = optional("transformers.utils.logging", "hf", f"hf:{folder}")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = loader.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except ImportError as error:
        raise InputError(
            f"hf:{folder}: transformers needs another package: {first_line(error)}"
        ) from error
    except Exception as error:
        raise InputError(
            f"hf:{folder}: transformers cannot load it "
            f"({type(error).__name__}: {first_line(error)}); check that the folder is complete"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    # Transformers fills missing weights with random numbers. A missing pooler is harmless: it does
    # not enter last_hidden_state.
    missing = sorted(
        key
        for key in info["missing_keys"]
        if not (task.outputs == ("last_hidden_state",) and key.split(".")[0] == "pooler")
    )
    if missing:
        raise InputError(
            f"hf:{folder}: the weights lack {len(missing)} tensors of {type(model).__name__}, "
            f"first '{missing[0]}'; correct 'architectures' in config.json or save them again"
        )
    # The returned key-value cache would be further outputs of the graph.
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.eval()


def _text_spec(name: str, folder: Path, model: Any, task: Task) -> ModelSpec:
    inputs = ["input_ids", "attention_mask"]
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs.append("token_type_ids")
    wrapper = SegmentedTextModel if len(inputs) == 3 else TextModel
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    if task.loader == "AutoModelForCausalLM" and is_decoder(model):
        return _decoder_spec(name, folder, model, tokenizer)
    limit = _limit(model)
    encode = text_encoder(folder, tokenizer, inputs, limit, model.config.vocab_size)
    # Without a tokenizer: two rows of sixteen arbitrary tokens.
    arbitrary = (torch.arange(32).view(2, 16) + 5) % model.config.vocab_size
    plain = {"input_ids": arbitrary, "attention_mask": torch.ones_like(arbitrary)}
    if len(inputs) == 3:
        plain["token_type_ids"] = torch.zeros_like(arbitrary)
    own = calibration_texts()

    def batches(texts: tuple[str, ...]) -> Callable[[], Iterable[Inputs]]:
        def read() -> Iterator[Inputs]:
            for group in grouped_by_length((*texts, *paragraphs(texts)), BATCH):
                yield encode(group)

        return read

    return ModelSpec(
        name=name,
        module=wrapper(model, task.outputs),
        example_inputs=encode(list(own[:2])) if tokenizer is not None else plain,
        dynamic_shapes={key: {0: "batch", 1: "sequence"} for key in inputs},
        calibration=batches(own) if tokenizer is not None else None,
        held_out=batches(held_out_texts()) if tokenizer is not None else None,
        output_names=task.outputs,
        padding_mask="attention_mask" if "attention_mask" in inputs else "",
        encode=encode,
        files=companions(folder),
    )


def _limit(model: Any) -> int:
    """Tokens of a calibration text at most."""
    return min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS)


def _decoder_spec(name: str, folder: Path, model: Any, tokenizer: Any) -> ModelSpec:
    vocabulary = model.config.get_text_config().vocab_size
    names = ["input_ids", "attention_mask"]
    encode = text_encoder(folder, tokenizer, names, _limit(model), vocabulary)

    def batches(texts: tuple[str, ...]) -> Callable[[], Iterable[Tokens]] | None:
        if tokenizer is None:
            return None
        groups = list(grouped_by_length((*texts, *paragraphs(texts)), BATCH))
        return lambda: (tokens_of(encode(group)) for group in groups)

    files: dict[str, Path | bytes] = dict(companions(folder))
    if tokenizer is not None and "tokenizer.json" not in files and tokenizer.is_fast:
        files |= tokenizer_files(tokenizer)
    return decoder_spec(
        name, model, tokenizer, encode, files, batches(calibration_texts()),
        batches(held_out_texts()),
    )  # fmt: skip


def _image_spec(name: str, folder: Path, model: Any, task: Task) -> ModelSpec:
    # The size is fixed at capture: position embeddings and pooling depend on it.
    size = getattr(model.config, "image_size", None) or processor_size(folder) or 224
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(model.config, "num_channels", 3)
    return ModelSpec(
        name=name,
        module=ImageModel(model, task.outputs),
        example_inputs={"pixel_values": torch.zeros(2, channels, height, width)},
        dynamic_shapes={"pixel_values": {0: "batch"}},
        output_names=task.outputs,
        encode=image_encoder(folder),
        files=companions(folder),
    )
