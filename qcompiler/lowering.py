"""Lowering, by runtime: the model, the float model beside it, the audit, how to run both."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import ops, overflow
from qcompiler.artifact import REFERENCE
from qcompiler.errors import UnsupportedError
from qcompiler.fitting import fitted, texts, within
from qcompiler.generated import Generate
from qcompiler.op_families import MOVES, PADS
from qcompiler.program import Batch, Program
from qcompiler.recipe import Recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target

EMULATED = 2  # samples run under an emulator, which is a hundred times slower

Run = Callable[..., tuple[Tensor, ...]]
Progress = Callable[[str], None]


@dataclass
class Lowered:
    """What a backend made.

    Attributes:
        run: the compiled model on flat inputs.
        run_float: the float model, for ONNX Runtime on this machine; None where this machine is
            not the target's, so that no time means anything, or the model has no ONNX form.
        audit: as the manifest holds it.
        model_bytes, float_bytes: sizes.
        fit: kept batches → batches that the artifact takes.
        view: a program's outputs → those that the artifact has.
        outputs: how many of them it has; all when None.
        ran: whether `run` is the compiled model; False where this machine cannot run it, so that
            `run` is the quantized program in torch.
        notes: for the report's warnings.
        extra: further entries of the manifest.
    """

    run: Run
    run_float: Run | None
    audit: dict[str, Any]
    model_bytes: int
    float_bytes: int
    fit: Callable[[Sequence[Batch]], list[Batch]] = list
    view: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple
    outputs: int | None = None
    ran: bool = True
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What there is to lower.

    Attributes:
        folder: where the model goes, and the float model under `REFERENCE`; must exist.
        spec: brings names and dynamic sizes.
        quantized, plain: the program to lower, and the float one to compare with.
        names: of the outputs.
        planned: the layers with quantized weights: node → module path.
        recipe, target: as asked for.
        buckets: sizes to generate code for; `tvm:` targets alone.
        sample: one held-out batch.
        say: told of each step.
    """

    folder: Path
    spec: ModelSpec
    quantized: Program
    plain: Program
    names: tuple[str, ...]
    planned: Mapping[str, str]
    recipe: Recipe
    target: Target
    buckets: Mapping[str, Sequence[int]]
    sample: Batch
    say: Progress

    @property
    def naming(self) -> dict[str, Any]:
        """What `ort.lower` is told of inputs and outputs."""
        return {
            "input_names": self.spec.input_names,
            "output_names": self.names,
            "dynamic_shapes": self.spec.dynamic_shapes,
        }

    @property
    def integer_layers(self) -> list[str]:
        """The planned layers whose inputs are quantized."""
        return integer_layers(self.quantized, self.planned)


def lower(job: Job) -> Lowered:
    """Write the model and the float model."""
    if job.buckets and job.target.runtime != "tvm":
        raise UnsupportedError(
            f"--bucket: code for fixed sizes is generated for tvm: targets; {job.target} takes any "
            "size"
        )
    match job.target.runtime:
        case "ort" if job.target.device == "cuda":
            return _onnx_cuda(job)
        case "ort":
            return _onnx(job)
        case "tvm":
            return _edge(job)
        case _:
            raise UnsupportedError(f"no backend for '{job.target}'")


def integer_layers(quantized: Program, planned: Collection[str]) -> list[str]:
    """The planned layers whose inputs are quantized, where they are made or on the way."""
    nodes = {node.name: node for node in quantized.exported.graph.nodes}
    found = []
    for name in planned:
        source = nodes[name].args[0] if name in nodes else None
        while isinstance(source, Node) and source.target in (*MOVES, *PADS):
            source = source.args[0]
        if isinstance(source, Node) and source.target is ops.dequantize:
            found.append(name)
    return found


def _reference(job: Job, half: str = "") -> Path:
    from qcompiler.backends import ort

    job.say("lower the float model")
    reference = job.folder / REFERENCE
    reference.mkdir()
    ort.lower(job.plain, reference, half=half, **job.naming)
    return reference


def _later(load: Callable[[], Run]) -> Run:
    """A model that is loaded when it first runs: until it is timed, its memory is others'."""
    loaded = cache(load)

    def run(*batch: Tensor) -> tuple[Any, ...]:
        return loaded()(*batch)

    return run


def _onnx(job: Job) -> Lowered:
    from qcompiler.backends import ort, ort_audit

    folder, quantized = job.folder, job.quantized
    job.say("lower")
    ort.lower(
        quantized, folder, fused=job.recipe.fused, generate=generator(job.target), **job.naming
    )
    reference = _reference(job)
    job.say("audit")
    audit = ort_audit.audit(folder, job.planned, job.integer_layers)
    inputs = list(job.spec.input_names or quantized.inputs)
    given = dict(zip(inputs, (t.numpy() for t in job.sample), strict=True))
    shares = [{"op": op, "share": part} for op, part in ort_audit.profile(folder, given)]
    return Lowered(
        ort.load(folder, 1), _later(partial(ort.load, reference, 1)),
        asdict(audit) | {"time_share": shares},
        model_size(folder / ort.MODEL), model_size(reference / ort.MODEL),
    )  # fmt: skip


OWN_CACHE = (
    "ONNX Runtime's CUDA kernel lets the tokens of a prompt read each other's keys and values as "
    "they were before rounding, and later tokens the rounded ones of the cache. The program rounds "
    "both: a lowering error that is no loss"
)


def _onnx_cuda(job: Job) -> Lowered:
    from qcompiler.backends import ort, ort_audit, ort_cuda
    from qcompiler.backends.ort_phases import DECODE, NOWHERE, PREFILL, TOKENS

    folder, kind = job.folder, job.recipe.weight_type
    generate = generator(job.target)
    half = "bfloat16" if job.recipe.products == "bfloat16" else "float16"
    job.say("lower")
    bits = 8 if kind is not None and kind.bits > 4 else 4
    one = job.target.share_of_float(bits, 1, _width(job.quantized, job.planned))
    many = job.target.share_of_float(bits, TOKENS)
    ort.lower(
        job.quantized, folder, fused=job.recipe.fused, half=half, generate=generate,
        packed=DECODE if one < 1 and generate is None else NOWHERE, **job.naming,
    )  # fmt: skip
    reference = _reference(job, half)
    job.say("audit")
    writes = (folder / PREFILL).is_file()
    kept = job.planned if writes or generate is not None else {}
    integer = job.integer_layers if generate is not None else ()
    audit = ort_audit.audit(folder, kept, integer, written=True)
    notes = _phases(bits, one, many, writes, half) if job.planned and generate is None else []
    if any(job.recipe.cache_types):
        notes.append(OWN_CACHE)
    if half == "float16":
        too_large = overflow.warning(job.quantized, job.sample, generate is not None)
        notes += [too_large] if too_large else []
    run: Run = partial(_in_torch, job.quantized)
    run_float, absent = None, ""
    try:
        run, run_float = ort_cuda.load(folder), ort_cuda.load(reference)
    except UnsupportedError as error:
        absent = str(error)
        notes.append(_not_run(absent))
    return Lowered(
        run, run_float, asdict(audit) | {"time_share": []},
        model_size(folder / ort.MODEL) + model_size(folder / PREFILL),
        model_size(reference / ort.MODEL), ran=not absent, notes=notes,
    )  # fmt: skip


def _width(quantized: Program, planned: Collection[str]) -> int:
    """The typical size of a weight's sides."""
    nodes = {node.name: node for node in quantized.exported.graph.nodes}
    sizes = [nodes[name].args[1] for name in planned if name in nodes]
    counts = [s.meta["val"].numel() for s in sizes if isinstance(s, Node) and "val" in s.meta]
    return int((sum(counts) / len(counts)) ** 0.5) if counts else 0


def _phases(bits: int, one: float, many: float, writes: bool, half: str) -> list[str]:
    """What multiplies the weights in each phase, and why: for the report."""
    from qcompiler.backends.ort_phases import PREFILL, TOKENS

    measured = (
        f"MatMulNBits with {bits}-bit weights takes {one:g} of their time for a token and {many:g} "
        f"of it from {TOKENS} tokens on, as measured on an H200"
    )
    if not writes:
        return [f"the quantized weights are multiplied as {half} numbers: {measured}"]
    return [
        f"decode reads {bits}-bit weights, prompts of {TOKENS} tokens and more the same weights as "
        f"{half} numbers ({PREFILL}): {measured}"
    ]


def _in_torch(quantized: Program, *batch: Tensor) -> tuple[Tensor, ...]:
    """What stands for an artifact that this machine cannot run."""
    from qcompiler import integer

    return tuple(integer.run(quantized, batch))


def _not_run(reason: str) -> str:
    return (
        f"not run: {reason}; errors are those of the quantized program in torch. Check it on "
        f"the machine that it is for: qcompiler verify"
    )


def generator(target: Target) -> Generate | None:
    """What compiles operators for ONNX Runtime; None where the target wants its own alone.

    Raises:
        UnsupportedError: TVM is not installed.
    """
    if not target.kernels:
        return None
    try:
        if target.device == "cuda":
            from qcompiler.backends.edge_cuda_ort import build
        else:
            from qcompiler.backends.edge_ort import build
    except ImportError as error:
        raise _without_tvm(target, error) from error
    return partial(build, target=target)


def check_installed(target: Target) -> None:
    """Say before anything is computed that what generates the target's code is missing.

    Raises:
        UnsupportedError: TVM is not installed.
    """
    if (target.runtime == "tvm" or target.kernels) and find_spec("tvm") is None:
        raise _without_tvm(target, ModuleNotFoundError("No module named 'tvm'"))


def _without_tvm(target: Target, error: ImportError) -> UnsupportedError:
    return UnsupportedError(
        f"{target} needs TVM, which is not installed ({error}): pip install 'qcompiler[tvm]'"
    )


def _edge(job: Job) -> Lowered:
    folder, target = job.folder, job.target
    try:
        from qcompiler.backends import edge, edge_any_size, edge_artifact
    except ImportError as error:
        raise _without_tvm(target, error) from error
    from qcompiler.backends import ort

    since = time.perf_counter()
    dynamic = target.any_size
    given: dict[str, Any] = {} if dynamic else {
        "padding_mask": job.spec.padding_mask, "tried": (job.plain, job.sample),
    }  # fmt: skip
    backend: Any = edge_any_size if dynamic else edge
    audit = backend.lower(
        job.quantized, target, folder, buckets=job.buckets, planned=job.planned,
        integer=job.integer_layers, say=job.say, **job.naming, **given,
    )  # fmt: skip
    seconds = time.perf_counter() - since
    gpu = target.device == "cuda"
    run, absent = _edge_run(folder, target, job.quantized)
    emulator = " ".join(getattr(run, "emulator", ()))
    notes = []
    timed, reference = not (emulator or absent), folder / REFERENCE
    try:
        _reference(job, "float16" if gpu else "")  # peers run it on the GPU too
        float_bytes = model_size(reference / ort.MODEL)
    except UnsupportedError as error:
        timed = False
        shutil.rmtree(reference)  # what there is of it
        reference.mkdir()
        float_bytes = sum(x.numel() * x.element_size() for x in job.plain.constants().values())
        notes.append(f"not timed beside its float model, which ONNX Runtime would run: {error}")
    if absent:
        notes.append(_not_run(absent))
    if gpu:
        too_large = overflow.warning_of_products(job.quantized, job.sample)
        notes += [too_large] if too_large else []
    if emulator:
        notes.append(
            f"compiled for {target}; on this machine it ran under {emulator}: "
            "its results were checked, its speed was not measured"
        )
    limits = edge_artifact.limits(folder)
    notes += limits.get("exact", {}).values()
    kind = job.recipe.activation_type
    if limits["padded"] and kind is not None and kind.dynamic and kind.granularity == "tensor":
        notes.append(
            "ranges taken at run time are of the whole tensor, and positions of padding count: "
            "give sizes that need none (--bucket), or a range for each token "
            "(--set activations=int8:token)"
        )
    extra = {"entries": limits["entries"], "code_seconds": seconds, "emulator": emulator}
    sizes = (
        sum((folder / name).stat().st_size for name in edge_artifact.files(target)), float_bytes,
    )  # fmt: skip
    run_float = _later(partial(_float, job.plain, reference, gpu)) if timed else None
    described = asdict(audit) | {"time_share": []}
    if "capacity" in limits:
        extra["capacity"] = limits["capacity"]
        return Lowered(
            run, run_float, described, *sizes, lambda batches: texts(batches, limits),
            lambda outputs: (outputs[0][:, -1:],), 1, not absent, notes, extra,
        )  # fmt: skip

    def fit(batches: Sequence[Batch]) -> list[Batch]:
        """Batches cut to what there is code for: single samples, none longer than the longest."""
        if dynamic:
            return within(batches, limits)
        return fitted(batches, limits, EMULATED if emulator else None)

    return Lowered(run, run_float, described, *sizes, fit, ran=not absent, extra=extra, notes=notes)


def _float(plain: Program, reference: Path, gpu: bool) -> Run:
    """The float model on this machine: where the artifact runs on a GPU, in float16 there."""
    from qcompiler.backends import ort, torch_half

    if gpu and torch.cuda.is_available():
        return torch_half.load_program(plain)
    return ort.load(reference, 1)


def _edge_run(folder: Path, target: Target, quantized: Program) -> tuple[Run, str]:
    """What runs the model; or the quantized program in torch, and why."""
    from qcompiler.backends.edge_artifact import load

    if target.device != "cuda":
        return load(folder, 1), ""
    try:
        return load(folder, 1), ""
    except UnsupportedError as error:
        return partial(_in_torch, quantized), str(error)


def model_size(model: Path) -> int:
    """Bytes of a model file, its external data and the library of its operators."""
    from qcompiler.backends.ort_session import LIBRARY, MODEL

    files = [*model.parent.glob(f"{model.name}*")]
    files += model.parent.glob(LIBRARY) if model.name == MODEL else []
    return sum(path.stat().st_size for path in files)
