"""The zoo: models that the command line knows by name, and how its MODEL argument is read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from qcompiler.errors import InputError, nearest
from qcompiler.source import load_function, names_function
from qcompiler.spec import ModelSpec

FORMS = "a name from the zoo, file.py:function, a program.pt2, or hf:FOLDER"


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        description: one line for the list.
        module: where its builder is; imported when the model is built.
        function: the builder's name.
    """

    description: str
    module: str
    function: str

    def build(self) -> ModelSpec:
        """Import the builder and call it.

        Raises:
            InputError: a package that the model needs is not installed.
        """
        spec = getattr(importlib.import_module(f"qcompiler.models.{self.module}"), self.function)()
        assert isinstance(spec, ModelSpec), f"{self.module}.{self.function} gives no ModelSpec"
        return spec


def _tiny(function: str, description: str) -> tuple[str, Entry]:
    return f"tiny-{function.replace('_', '-')}", Entry(description, "tiny", function)


ZOO: Mapping[str, Entry] = MappingProxyType(
    {
        "minilm": Entry(
            "all-MiniLM-L6-v2, sentence embeddings, 22.7 M weights", "minilm", "minilm"
        ),
        "efficientnet-lite0": Entry(
            "EfficientNet-Lite0, ImageNet classifier, 4.7 M weights; needs --calibration FOLDER",
            "efficientnet_lite0",
            "efficientnet_lite0",
        ),
        "smollm2": Entry(
            "SmolLM2-135M-Instruct, language model with its cache, weights off their 4-bit grid",
            "smollm2",
            "smollm2",
        ),
        **dict(
            [
                _tiny("mlp", "three linears with ReLU"),
                _tiny("norm_linear", "LayerNorm read by two linears"),
                _tiny("rms_norm_linear", "RMSNorm, spelled out, read by two linears"),
                _tiny("attention_block", "pre-norm encoder block with padding mask and outliers"),
                _tiny("post_norm_block", "post-norm encoder block as in BERT"),
                _tiny("conv_block", "conv, BatchNorm, ReLU6, residual add, pooling"),
                _tiny("depthwise", "inverted residual with a depthwise conv as in MobileNet"),
                _tiny("tied_weights", "one matrix as embedding and output head"),
                _tiny("gqa_decoder", "decoder block as in Llama with grouped-query attention"),
                _tiny("gelu_forms", "GELU and SiLU spelled out"),
            ]
        ),
    }
)


def zoo() -> dict[str, Callable[[], ModelSpec]]:
    """Name → builder of every model in the zoo; nothing is imported before a builder is called."""
    return {name: entry.build for name, entry in ZOO.items()}


def find(text: str) -> ModelSpec | Path:
    """The model that a MODEL argument means.

    Args:
        text: a zoo name, `file.py:function` (or `module:function`) giving a `ModelSpec`, the path
            of a `.pt2` program, or `hf:FOLDER` with a local transformers folder.

    Returns:
        A `ModelSpec`; for a `.pt2` file its path, which exists.

    Raises:
        InputError: the argument names nothing usable.
    """
    if text in ZOO:
        return ZOO[text].build()
    if text.startswith("hf:"):
        from qcompiler.models.hf import from_folder

        return from_folder(Path(text.removeprefix("hf:")).expanduser())
    if text.endswith(".pt2"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise InputError(f"{text}: no such file; save one with torch.export.save")
        return path
    if names_function(text):
        return _from_function(text)
    raise InputError(_hint(text))


def _from_function(text: str) -> ModelSpec:
    spec = load_function(text)()
    if not isinstance(spec, ModelSpec):
        raise InputError(
            f"{text}: the function returned {_article(spec)}, not a ModelSpec; return "
            "qcompiler.ModelSpec(name=…, module=…, example_inputs=…)"
        )
    return spec


def _article(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _hint(text: str) -> str:
    path = Path(text).expanduser()
    if text.endswith(".py"):
        return f"{text}: which function gives the model? Write {text}:function"
    if (path / "config.json").is_file():
        return f"{text}: a transformers folder is written hf:{text}"
    if path.exists():
        return f"{text}: not a model that can be read; MODEL is {FORMS}"
    return f"unknown model '{text}'; {nearest(text, list(ZOO))}. MODEL is {FORMS}"
