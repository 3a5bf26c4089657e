"""What exported programs are taken: float32 numbers in, which formats replace, and tensors out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from qcompiler.errors import InputError


def demand_whole_floats(exported: ExportedProgram) -> None:
    """Raise an InputError for parameters or inputs of float16 or bfloat16."""
    found = [(f"parameter '{n}'", v) for n, v in exported.named_parameters()]
    names = set(exported.graph_signature.user_inputs)
    found += [
        (f"input '{node.name}'", node.meta["val"])
        for node in exported.graph.nodes
        if node.name in names and isinstance(node.meta.get("val"), Tensor)
    ]
    for what, value in found:
        if value.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"{what} is {value.dtype}; models are taken in float32, which keeps such numbers "
                "as they are: call model.float() and give float32 inputs (transformers: "
                "from_pretrained(…, dtype=torch.float32)); formats are the recipe's"
            )


def demand_tensors(exported: ExportedProgram) -> None:
    """Raise an InputError for outputs that are numbers or None."""
    specs = [s for s in exported.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    spec = exported.call_spec.out_spec
    paths = pytree.tree_flatten_with_path(pytree.tree_unflatten([*range(len(specs))], spec))[0]
    for (path, _), output in zip(paths, specs, strict=True):
        if not isinstance(output.arg, TensorArgument):
            value = getattr(output.arg, "value", "a number that depends on a size")
            raise InputError(
                f"output{pytree.keystr(path)} is {value}, not a tensor, and compiled models return "
                "tensors alone: leave it out of what forward returns (a small module around this "
                "one can)"
            )


def forget_strides(exported: ExportedProgram) -> None:
    """Let inputs be contiguous, as whoever runs a program gives them.

    Strides of an example that was no whole tensor are symbols, for which a saved program keeps no
    range: exporting it to ONNX fails.
    """
    for node in exported.graph.nodes:
        held = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(held, FakeTensor):
            continue
        if any(isinstance(step, torch.SymInt) for step in held.stride()):
            with held.fake_mode:
                node.meta["val"] = torch.empty(held.shape, dtype=held.dtype)
    kept = [guard for guard in exported._guards_code if ".stride()" not in guard]
    exported._guards_code = kept
