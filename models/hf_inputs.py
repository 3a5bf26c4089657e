"""What surrounds a transformers model in its folder: tokenizer, image processor, files to copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qcompiler.errors import InputError, first_line
from qcompiler.models.images import read_image
from qcompiler.models.packages import optional
from qcompiler.spec import Inputs

TEXT_FILES = (".json", ".txt", ".jinja", ".model", ".tiktoken")


def text_encoder(
    folder: Path, tokenizer: Any, inputs: list[str], limit: int, vocabulary: int
) -> Callable[[list[str]], Inputs]:
    """A function from texts to one batch, padded to the longest text.

    Args:
        folder: for messages.
        tokenizer: a transformers tokenizer; None: the function raises an `InputError`.
        inputs: names of the tensors that the model takes, each int64 (texts, tokens).
        limit: longer texts are cut at this number of tokens.
        vocabulary: tokens that the model knows.
    """

    def encode(texts: list[str]) -> Inputs:
        if tokenizer is None:
            raise InputError(
                f"hf:{folder}: no tokenizer in this folder, so texts cannot be encoded; "
                "save it there or give encoded tensors (.npz, .safetensors)"
            )
        longest = min(limit, tokenizer.model_max_length)
        coded = tokenizer(
            texts, padding="longest", truncation=True, max_length=longest, return_tensors="pt"
        )
        if int(coded["input_ids"].max()) >= vocabulary:
            raise InputError(
                f"hf:{folder}: the tokenizer gives token {int(coded['input_ids'].max())}, the "
                f"model knows {vocabulary}; put the tokenizer that belongs to the model there"
            )
        # Not every tokenizer knows of token types; then all tokens are of the first.
        return {
            key: (coded[key] if key in coded else torch.zeros_like(coded["input_ids"])).long()
            for key in inputs
        }

    return encode


def load_tokenizer(folder: Path, vocabulary: int) -> Any:
    """The tokenizer of a folder, padding on the right; None where there is none.

    Args:
        folder: where to look; nothing is downloaded.
        vocabulary: tokens that the model knows.

    Raises:
        InputError: the tokenizer does not load.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        return None
    transformers = optional("transformers", "hf", f"hf:{folder}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"hf:{folder}: the tokenizer cannot be loaded "
            f"({type(error).__name__}: {first_line(error)}); "
            "repair it, or remove its files to go on without"
        ) from error
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= vocabulary:
        # The attention mask hides padding, so any known token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    return tokenizer


def image_encoder(folder: Path) -> Callable[[list[str]], Inputs]:
    """A function from image files to one batch, prepared by the image processor of the folder.

    It needs preprocessor_config.json when it is called, not before; without, it raises
    an `InputError`.
    """

    def encode(paths: list[str]) -> Inputs:
        if not (folder / "preprocessor_config.json").is_file():
            raise InputError(
                f"hf:{folder}: no preprocessor_config.json, so images cannot be prepared; "
                "save the image processor there or give prepared tensors (.npz, .safetensors)"
            )
        transformers = optional("transformers", "hf", "reading images")
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        images = [read_image(path) for path in paths]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    return encode


def processor_size(folder: Path) -> int | tuple[int, int] | None:
    """Size of the images that the processor of a folder makes, in pixels; None: unknown."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    settings = json.loads(path.read_text(encoding="utf-8"))
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if isinstance(size, dict):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        size = size.get("shortest_edge")
    return int(size) if size else None


def companions(folder: Path) -> dict[str, Path]:
    """Tokenizer and configuration files, by their path relative to the folder.

    Files of the sentence-transformers modules that stand beside the model are among them.
    """
    found = [path for path in folder.iterdir() if path.suffix in TEXT_FILES]
    modules = folder / "modules.json"
    if modules.is_file():
        for module in json.loads(modules.read_text(encoding="utf-8")):
            inner = folder / module.get("path", "")
            if inner != folder and inner.is_dir():
                found.extend(inner.iterdir())
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(found)
        if path.is_file() and not path.name.endswith(".index.json")
    }
