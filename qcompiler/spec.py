"""ModelSpec: what a user hands to the compiler; and what is made one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.program import Program

Inputs = Mapping[str, Tensor] | Sequence[Tensor]
Batches = Callable[[], Iterable[Inputs]]


@dataclass(frozen=True)
class Generation:
    """What it takes to write text with a language model, beyond the graph.

    Attributes:
        context: tokens that the model can take in all, prompt and answer.
        vocabulary: tokens that it knows.
        stop: tokens that end a text.
        start: token that begins one, and that the tokenizer adds by itself if at all; None: none.
        pad: token that fills up.
        family: transformers' `model_type`.
        heads, width: query heads and channels of the residual stream, for runtimes that ask.
    """

    context: int
    vocabulary: int
    stop: tuple[int, ...] = ()
    start: int | None = None
    pad: int | None = None
    family: str = ""
    heads: int = 0
    width: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """A model with what is needed to capture, calibrate and judge it.

    Attributes:
        name: short name for reports.
        module: the torch module; put into eval mode at capture.
        example_inputs: tensors by input name (the names of `forward`'s parameters), or positional.
            float32, integer or bool.
        dynamic_shapes: input name → {dimension: name of the size}; one name is one size.
        calibration: a factory of batches, each like `example_inputs`; called more than once, so it
            must give the same batches each time. None: the compiler asks for calibration data where
            the recipe needs it.
        held_out: the same, other data, for verification only. None: every fourth calibration batch
            is held out.
        calibration_note: what the user should know of that data, for the report; empty for data
            that are real.
        metric: the task's metric, computed from a callable that takes and returns what the module
            does; higher is better.
        metric_name: its name, such as "Spearman" or "top-1".
        input_names: names of the flat inputs in the artifact; those of the module's parameters
            where not given.
        output_names: names of the flat outputs in the artifact; `output_0`, … where not given.
        padding_mask: name of the input that is 0 where the others hold padding, such as
            "attention_mask". Positions that it masks count neither in calibration nor in error
            measures, for every tensor that begins with the mask's dimensions.
        logits: whether the first output is logits along its last axis: errors are then measured as
            Kullback–Leibler divergence of what it predicts. Language models always are so.
        excerpt: a batch by input name and its number → a small part of it, on which exact rewrites
            are proven and errors are measured, and which is kept with the artifact. None: the whole
            batch. For outputs so large that those of whole batches would fill the memory.
        encode: texts or image paths → one batch, for `--calibration` with a text file or a folder
            of images.
        files: what lies beside the compiled model (tokenizer, configuration), by its relative path
            in the artifact: a file to copy, or the content.
        generation: set for language models that keep their cache outside: inputs
            `past_key_values.N.key`, outputs `present.N.key`.
    """

    name: str
    module: torch.nn.Module
    example_inputs: Inputs
    dynamic_shapes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    calibration: Batches | None = None
    held_out: Batches | None = None
    calibration_note: str = ""
    metric: Callable[[Callable[..., Any]], float] | None = None
    metric_name: str = "metric"
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    padding_mask: str = ""
    logits: bool = False
    excerpt: Callable[[Mapping[str, Tensor], int], Inputs] | None = None
    encode: Callable[[list[str]], Inputs] | None = None
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    generation: Generation | None = None


def spec_for(
    model: ModelSpec | torch.nn.Module | Program,
    example_inputs: Inputs | None,
    calibration: Batches | Iterable[Inputs] | None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None,
) -> ModelSpec:
    """A model, as `compile` takes it, with its data.

    Raises:
        InputError: a module without example inputs, or a saved program that brings none.
    """
    factory: Batches | None = None
    if callable(calibration):
        factory = calibration
    elif calibration is not None:
        kept = list(calibration)
        factory = lambda: kept  # noqa: E731 - a factory is what ModelSpec takes
    if isinstance(model, ModelSpec):
        if factory is None:
            return model
        return replace(model, calibration=factory, held_out=None, calibration_note="")
    if isinstance(model, Program):
        example: Inputs = example_inputs if example_inputs is not None else _examples(model)
        return ModelSpec("program", torch.nn.Identity(), example, dynamic_shapes or {}, factory)
    if example_inputs is None:
        raise InputError(
            "example_inputs are needed to capture a module: a tuple of tensors, or a mapping by "
            "name"
        )
    return ModelSpec(type(model).__name__, model, example_inputs, dynamic_shapes or {}, factory)


def _examples(program: Program) -> Inputs:
    """The example inputs that were saved with an exported program."""
    saved = program.exported.example_inputs
    if saved is None:
        raise InputError("the saved program brings no example inputs; give --calibration")
    args, kwargs = saved
    return tuple(torch.utils._pytree.tree_leaves((args, kwargs)))
