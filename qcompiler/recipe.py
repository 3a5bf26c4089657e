"""Recipes: what the user wants, never how.

Presets by name, from a YAML file, or in Python; every field can be set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qcompiler.errors import InputError, nearest
from qcompiler.format import Format
from qcompiler.qtype import QType


class Recipe(BaseModel):
    """Number formats, calibration and bounds.

    A field exists only if exactly one place reads it. `None` as a format means float.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: str = Field("custom", description="the preset's name, or the user's own")
    weights: str | None = Field(
        "int8:channel", description="format of linear and convolution weights"
    )
    activations: str | None = Field(
        None, description="format of what linears and convolutions read"
    )
    embeddings: str | None = Field(
        "int8:channel", description="format of embedding tables, a scale for each row"
    )
    formats: dict[str, str] = Field(
        {},
        description="formats of single layers, by module path or node name (globs; the last that "
        "matches counts): 'int4:g32', 'int8:channel/uint8:tensor:affine' or 'float'",
    )
    candidates: tuple[str, ...] = Field(
        (),
        description="formats that mixed precision chooses from, as in `formats`; when not given, "
        "those that suit the budget and that the target runs fast",
    )
    bits: float | None = Field(
        None, gt=0, description="budget of mixed precision: mean bits of a weight, scales left out"
    )
    size: float | None = Field(
        None, gt=0, description="budget of mixed precision: MB of the weights, scales included"
    )
    latency: float | None = Field(
        None, gt=0, description="budget of mixed precision: time as a share of the float model's"
    )
    max_loss: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="budget of mixed precision: share of the output's power that errors may have "
        "(language models: growth of perplexity); the cheapest formats within it are taken",
    )
    calibration: Literal["minmax", "percentile", "kl", "mse", "pnorm"] = Field(
        "minmax", description="how a static range is drawn from the calibration data"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="central share kept by `percentile`, in percent"
    )
    p: float = Field(2.4, gt=0.5, le=16, description="exponent of `pnorm`")
    batches: int | None = Field(
        None, ge=1, description="calibration batches to use; all when not given"
    )
    smooth: bool = Field(
        True, description="move activation outliers into the weights (SmoothQuant, alpha searched)"
    )
    insert_scale: bool = Field(
        True,
        description="smooth also where no layer can take the factor, by one multiplication more",
    )
    rotation: Literal["none", "hadamard", "learned"] = Field(
        "none",
        description="rotate hidden tensors by Hadamard matrices, so that no channel stands out, or "
        "by matrices learned on the calibration data (needs a format of activations); a tied "
        "output head gets a weight of its own",
    )
    rotation_steps: int = Field(100, ge=1, description="steps of learning, one text each")
    seed: int = Field(0, ge=0, description="of the rotations' signs")
    rounding: Literal["rtn", "gptq", "awq"] = Field(
        "rtn",
        description="how linear weights are rounded: to nearest, by GPTQ, or to nearest after "
        "AWQ's scaling and clipping; weight-only recipes without data round to nearest and say so",
    )
    clip: bool = Field(
        False,
        description="search how far each weight scale's range may be cut (needs data; AWQ always)",
    )
    keys: str | None = Field(
        None,
        description="format of cached keys: one measured scale for each channel of a head "
        "(int8:channel, int4:channel) or for all (int8:tensor); in simulation also per token and "
        "head (uint4:token:affine) or per channel over n tokens (uint4:g32:affine)",
    )
    values: str | None = Field(
        None, description="format of cached values: that of the keys; in simulation also per token"
    )
    window: int = Field(
        0, ge=0, description="newest tokens whose keys and values each query reads in float"
    )
    keep_moment: bool = Field(
        False,
        description="correct weight scales so that the weights keep their second moment",
    )
    correct_bias: bool = Field(
        True, description="take the mean quantization error out of the biases"
    )
    keep_float: tuple[str, ...] = Field((), description="module paths (globs) that stay float")
    fused: bool = Field(
        True, description="ONNX Runtime's own fused attention; off: standard ONNX operators only"
    )
    products: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="arithmetic of matrix products and attention that stay float; bfloat16 rounds "
        "their operands and sums in float32, on ort:cuda all of the model is bfloat16, not float16",
    )
    merge_linears: bool = Field(
        False, description="linears that share an input become one product and slices of it"
    )
    promise: Literal["error", "warn"] = Field(
        "warn", description="what happens where a layer planned as integer does not run as integer"
    )
    keep_reference: bool = Field(
        True, description="keep the float model in the artifact, for `verify` and `bench`"
    )
    explain: bool = Field(
        False,
        description="say in the report where the error comes from; takes a run of the model "
        "for each place that rounds (`qcompiler explain` does it later)",
    )
    min_sqnr: float = Field(
        0.0, description="fail when an output's SQNR against the float model is lower, in dB"
    )

    @field_validator("weights", "activations", "embeddings", "keys", "values")
    @classmethod
    def _is_format(cls, value: str | None) -> str | None:
        return None if value in (None, "none", "float", "None") else str(QType.parse(value))

    @field_validator("candidates", mode="before")
    @classmethod
    def _are_candidates(cls, value: Any) -> Any:
        texts = value.split(",") if isinstance(value, str) else value
        return tuple(str(Format.parse(text)) for text in texts)

    @field_validator("latency", "max_loss", mode="before")
    @classmethod
    def _is_share(cls, value: Any) -> Any:
        """`0.6x` and `0.5%` as numbers."""
        if isinstance(value, str):
            text = value.strip()
            if text.endswith("%"):
                return float(text[:-1]) / 100
            return float(text.removesuffix("x"))
        return value

    @field_validator("formats")
    @classmethod
    def _are_formats(cls, value: dict[str, str]) -> dict[str, str]:
        return {pattern: str(Format.parse(text)) for pattern, text in value.items()}

    @field_validator("keep_float", mode="before")
    @classmethod
    def _is_list(cls, value: Any) -> Any:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @property
    def weight_type(self) -> QType | None:
        """The parsed weight format."""
        return QType.parse(self.weights) if self.weights else None

    @property
    def activation_type(self) -> QType | None:
        """The parsed activation format."""
        return QType.parse(self.activations) if self.activations else None

    @property
    def embedding_type(self) -> QType | None:
        """The parsed embedding format."""
        return QType.parse(self.embeddings) if self.embeddings else None

    @property
    def mixed(self) -> bool:
        """Whether formats are to be chosen within a budget."""
        return not (self.bits is self.size is self.latency is self.max_loss is None)

    @property
    def format(self) -> Format:
        """What layers have that `formats` does not name."""
        return Format(self.weight_type, self.activation_type if self.weights else None)

    def format_of(self, *names: str) -> Format:
        """The format of the layer with these names (its module path, its node)."""
        found = self.format
        for pattern, text in self.formats.items():
            if any(name and fnmatchcase(name, pattern) for name in names):
                found = Format.parse(text)
        return found

    @property
    def cache_types(self) -> tuple[QType | None, QType | None]:
        """The parsed formats of cached keys and values."""
        keys, values = (QType.parse(text) if text else None for text in (self.keys, self.values))
        return keys, values

    @property
    def stores_cache(self) -> bool:
        """Whether keys and values are cached as integers with measured scales."""
        return any(kind and kind.granularity in ("tensor", "channel") for kind in self.cache_types)

    @property
    def simulates_cache(self) -> bool:
        """Whether keys and values are rounded in formats that no runtime keeps."""
        return any(self.cache_types) and not self.stores_cache

    @property
    def needs_data(self) -> bool:
        """Whether compiling reads calibration batches for more than checks."""
        kind = self.activation_type
        smoothed = kind is not None and (not kind.dynamic or self.smooth)
        return smoothed or self.stores_cache or (kind is not None and self.rounding != "rtn")

    @property
    def rounds_by_data(self) -> bool:
        """Whether weights are rounded with the help of calibration data, where there are any."""
        return self.rounding != "rtn" or self.clip

    def updated(self, settings: Mapping[str, Any]) -> Recipe:
        """This recipe with some fields set; unknown keys and bad values give an `InputError`."""
        for key in settings:
            if key not in Recipe.model_fields:
                raise InputError(f"recipe: no key '{key}'; {nearest(key, [*Recipe.model_fields])}")
        try:
            return Recipe.model_validate({**self.model_dump(), **settings})
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            given, allowed = settings.get(key), first.get("ctx", {}).get("expected", "")
            known = allowed.replace("'", "").replace(" or ", ", ").split(", ")
            hint = f"; {nearest(str(given), known)}" if allowed else ""
            raise InputError(f"recipe: {key}={given!r}: {first['msg']}{hint}") from error


PRESETS: Mapping[str, tuple[str, Recipe]] = {
    "w8a8": (
        "int8 weights, int8 activations with static ranges: fastest; needs calibration data",
        Recipe(name="w8a8", activations="uint8:tensor:affine", rounding="gptq", min_sqnr=10.0),
    ),
    "w8a8-dynamic": (
        "int8 weights, int8 activations with ranges taken at run time: accurate, no static ranges",
        Recipe(
            name="w8a8-dynamic",
            activations="uint8:tensor:affine:dynamic",
            rounding="gptq",
            min_sqnr=10.0,
        ),
    ),
    "w8a8-token": (
        "int8 weights, int8 activations with a range for each token: for language models, whose "
        "static ranges lose too much",
        Recipe(
            name="w8a8-token",
            activations="uint8:token:affine",
            rounding="gptq",
            min_sqnr=10.0,
        ),
    ),
    "fp8": (
        "8-bit floats (e4m3): weights with a scale per output channel, activations per token; for "
        "GPUs of compute capability 8.9 and 9.0",
        Recipe(
            name="fp8",
            weights="float8_e4m3:channel",
            activations="float8_e4m3:token",
            rounding="gptq",
            smooth=False,  # the error is relative: a large channel takes nothing from the others
            min_sqnr=10.0,
        ),
    ),
    "w8": (
        "int8 weights, float arithmetic: a quarter of the size, nearly no error",
        Recipe(name="w8", min_sqnr=20.0),
    ),
    "w8a16": (
        "int8 weights rounded by GPTQ, float arithmetic: as w8, a little closer to float",
        Recipe(name="w8a16", rounding="gptq", min_sqnr=20.0),
    ),
    "w4a16": (
        "4-bit weights in groups of 32 rounded by GPTQ, float activations: an eighth of the size",
        Recipe(name="w4a16", weights="int4:g32", rounding="gptq", clip=True, min_sqnr=5.0),
    ),
    "w3a16": (
        "3-bit affine weights in groups of 32 by GPTQ; ONNX Runtime stores them in 4 bits",
        Recipe(name="w3a16", weights="int3:g32:affine", rounding="gptq", clip=True),
    ),
    "w2a16": (
        "2-bit affine weights in groups of 32 by GPTQ: a trial; ONNX Runtime stores them in 4 bits",
        Recipe(name="w2a16", weights="int2:g32:affine", rounding="gptq", clip=True),
    ),
    "w4a8": (
        "int4 weights by GPTQ, int8 activations with a scale for each token",
        Recipe(
            name="w4a8", weights="int4:g32", activations="int8:token", rounding="gptq", clip=True
        ),
    ),
    "w4a8kv8": (
        "w4a8 with 8-bit keys and values in the cache, a scale for each channel of a head",
        Recipe(
            name="w4a8kv8", weights="int4:g32", activations="int8:token", rounding="gptq",
            clip=True, keys="int8:channel", values="int8:channel",
        ),
    ),
    "w4a4kv4": (
        "4-bit weights, activations, keys and values, all rotated by Hadamard matrices (QuaRot)",
        Recipe(
            name="w4a4kv4", weights="int4:channel", activations="int4:token", rounding="gptq",
            clip=True, keys="uint4:token:affine", values="uint4:token:affine", rotation="hadamard",
            smooth=False,
        ),
    ),
    "fp32": (
        "float32 throughout: what the passes and the backend make of the model as it is",
        Recipe(name="fp32", weights=None, embeddings=None, min_sqnr=60.0),
    ),
    "bf16": (
        "bfloat16 operands, float32 sums: half the time of fp32 where the CPU has such products",
        Recipe(
            name="bf16", weights=None, embeddings=None, products="bfloat16", min_sqnr=20.0
        ),
    ),
    "mixed": (
        "a format for each layer, chosen by measured sensitivity within --bits, --size, --latency "
        "or --max-loss",
        Recipe(name="mixed", weights="int4:g32", rounding="gptq", clip=True),
    ),
}  # fmt: skip


def load_recipe(text: str, settings: Mapping[str, Any] | None = None) -> Recipe:
    """A preset by name or a YAML file (`base: PRESET` and fields), with settings on top."""
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise InputError(f"recipe: {path}: no such file")
        try:
            fields = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise InputError(f"recipe: {path} is not YAML: {error}") from error
        if not isinstance(fields, dict):
            raise InputError(f"recipe: {path} must hold keys and values")
        base = load_recipe(fields.pop("base")) if "base" in fields else Recipe(name=path.stem)
        recipe = base.updated({"name": path.stem, **fields})
    elif text in PRESETS:
        recipe = PRESETS[text][1]
    else:
        raise InputError(f"recipe '{text}': {nearest(text, [*PRESETS])}, or a .yaml file")
    return recipe.updated(settings or {})


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """`key=value` strings as a mapping, values read as YAML."""
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set {item}: write key=value")
        found[key.strip()] = yaml.safe_load(value) if value else None
    return found


def parse_buckets(items: Iterable[str]) -> dict[str, list[int]]:
    """`size=16,64` strings as a mapping from size to numbers."""
    found: dict[str, list[int]] = {}
    for item in items:
        name, equals, values = item.partition("=")
        numbers = [part.strip() for part in values.split(",")]
        if not equals or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise InputError(f"--bucket {item}: write size=16,64,128, with sizes of at least 1")
        found[name.strip()] = [int(n) for n in numbers]
    return found
