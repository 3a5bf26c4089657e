"""What went wrong in `torch.export`, for people: where in their model, and the known remedy."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from qcompiler.errors import first_line

_REMEDIES = (
    (
        ("data-dependent", "GuardOnDataDependent", "Could not guard",
         "Could not extract specialized integer"),
        "the model branches on the values of a tensor: compute both sides and choose with "
        "torch.where, or use torch.cond",
    ),
    (
        ("specialized", "Constraints violated", "ConstraintViolation", "marked as dynamic but"),
        "the model fixes a size that was asked to be dynamic: leave that dimension out of "
        "dynamic_shapes",
    ),
    (
        ("shapes cannot be multiplied", "size mismatch", "must match the size", "same dtype",
         "expected scalar type", "Expected input", "normalized_shape", "channels, but got",
         "same reduction dim"),
        "the example inputs do not fit the model: check their shapes and dtypes",
    ),
    (
        ("missing a required argument", "positional argument", "unexpected keyword"),
        "the example inputs are not the arguments of forward: check their number and names",
    ),
)  # fmt: skip


def explain_export(error: BaseException, module: torch.nn.Module) -> str:
    """Why a module does not export: torch's first line, where in the model, and the remedy."""
    text = f"{type(error).__name__}: {error}"
    remedy = next(
        (hint for words, hint in _REMEDIES if any(word in text for word in words)),
        "try torch.export.export(model, inputs, strict=False) alone; "
        "parts that it cannot capture must be rewritten in plain tensor operations",
    )
    where = _source_line(error)
    return f"{type(module).__name__} does not export: {first_line(error)}{where}; {remedy}"


def _source_line(error: BaseException) -> str:
    """The innermost frame of the user's model: outside torch and outside this package."""
    frames: list[traceback.FrameSummary] = []
    current: BaseException | None = error
    while current is not None and not frames:
        frames = [
            frame
            for frame in traceback.extract_tb(current.__traceback__)
            if "/torch/" not in frame.filename
            and not frame.filename.startswith((str(Path(__file__).parent), "<"))
        ]
        current = current.__cause__ or current.__context__
    if not frames:
        return ""
    frame = frames[-1]
    return f" at {frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
