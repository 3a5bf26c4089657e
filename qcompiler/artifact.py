"""Artifacts: a folder with the compiled model, its manifest, its report and verification data.

torch is imported where tensors are handled: writing text with a language model needs none, and it
would take more memory than a small model does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.errors import InputError, UnsupportedError, VerifyError

if TYPE_CHECKING:
    from torch import Tensor

    from qcompiler.generation import Generated, Generator
    from qcompiler.program import Batch

    Loader = Callable[[Path, int | None], Callable[..., tuple[Tensor, ...]]]

MANIFEST = "manifest.json"
REPORT = "report.html"
FORMAT = 1  # of the manifest
REFERENCE = "reference"  # folder of the float model
DATA = "verify"  # folder with the verification batches and programs


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk.

    Attributes:
        folder: where it is.
        manifest: inputs and outputs with shapes and dtypes, target, recipe, plan, checksums,
            versions, history, measurements.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Artifact:
        """Read a folder's manifest.

        Raises:
            InputError: if the folder is no artifact, its manifest is corrupt, or a newer version
                wrote it.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise InputError(
                f"{folder}: no {MANIFEST} there; give a folder that 'qcompiler compile' wrote"
            )
        try:
            manifest = json.loads(path.read_text())
            version = int(manifest["format"])
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is corrupt ({error}); compile the model again") from error
        if version > FORMAT:
            raise InputError(
                f"{path} has format {version}, this qcompiler reads up to {FORMAT}; "
                "install a newer qcompiler"
            )
        missing = {"inputs", "outputs", "target", "files"} - set(manifest)
        if missing:
            raise InputError(
                f"{path} is corrupt (no {', '.join(sorted(missing))}); compile the model again"
            )
        return cls(Path(folder), manifest)

    def load(self, threads: int | None = None) -> Callable[..., Any]:
        """The compiled model as a callable that takes and returns what the module did.

        Args:
            threads: of one operator; the runtime's choice when not given.
        """
        from torch.utils import _pytree as pytree

        hazard = self.hazard()
        if hazard:
            warnings.warn(hazard, stacklevel=2)
        run = self.runner(threads)
        names = [i["name"] for i in self.manifest["inputs"]]
        spec = self.manifest.get("out_spec")
        structure = pytree.treespec_loads(spec) if spec else None

        def call(*args: Any, **kwargs: Any) -> Any:
            unknown = set(kwargs) - set(names)
            if unknown:
                raise TypeError(f"unexpected inputs {sorted(unknown)}; the model takes {names}")
            flat = [*pytree.tree_leaves(args), *(kwargs[n] for n in names if n in kwargs)]
            if len(flat) != len(names):
                raise TypeError(f"{len(flat)} inputs given, the model takes {len(names)}: {names}")
            outputs = list(run(*flat))
            if structure is None:
                return outputs[0] if len(outputs) == 1 else tuple(outputs)
            return pytree.tree_unflatten(outputs, structure)

        return call

    def hazard(self) -> str:
        """Why this machine's integer kernels may compute wrongly with this model, or nothing."""
        from qcompiler.qtype import QType
        from qcompiler.target import Target

        formats = [QType.parse(row["qtype"]) for row in self.manifest.get("plan", [])]
        integer = any(kind.element == "uint8" for kind in formats)
        if not integer or any(kind.reduced for kind in formats):
            return ""
        target = Target.parse(str(self.manifest["target"]))
        if not replace(target, feature="").saturates:
            return ""
        return (
            f"{self.folder} was compiled for a CPU with VNNI and this one has none: its products "
            "of 8-bit numbers can overflow silently; compile with --target ort:cpu:avx2"
        )

    def runner(self, threads: int | None = None) -> Callable[..., tuple[Tensor, ...]]:
        """The compiled model as a function of flat inputs, returning flat outputs."""
        from importlib import import_module

        from qcompiler.target import Target

        target = Target.parse(str(self.manifest["target"]))
        match target.runtime:
            case "ort" if target.device == "cuda":
                backend = import_module("qcompiler.backends.ort_cuda")
            case "ort":
                backend = import_module("qcompiler.backends.ort")
            case "tvm":
                backend = import_module("qcompiler.backends.edge_artifact")
            case _:
                raise UnsupportedError(f"no backend loads '{self.manifest['target']}'")
        runner: Callable[..., tuple[Tensor, ...]] = backend.load(self.folder, threads)
        return runner

    def generator(self, threads: int | None = None) -> Generator:
        """The language model, loaded once, for any number of texts.

        Args:
            threads: of one operator; the runtime's choice when not given.
        """
        from qcompiler.generation import Generator

        return Generator(self.folder, self.manifest, threads)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        threads: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generated:
        """Write a text with the language model; it is loaded for this one text.

        Args:
            prompt: at least one token.
            max_new_tokens: tokens to write at most.
            temperature: 0 takes the most likely token each time.
            top_k, top_p: restrict sampling to the most likely tokens; 0 and 1: all.
            seed: of the sampling.
            threads: of one operator; the runtime's choice when not given.
            on_text: called with each piece of text as it comes.

        Raises:
            InputError: the prompt is empty or too long, or this is no language model.
        """
        from qcompiler.generation import Sampling

        sampling = Sampling(temperature, top_k, top_p, seed)
        return self.generator(threads).generate(prompt, max_new_tokens, sampling, on_text)

    def check_files(self) -> None:
        """Raise a `VerifyError` naming the first file that is missing or was changed."""
        for name, digest in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise VerifyError(f"{path} is missing; compile the model again")
            if sha256(path) != digest:
                raise VerifyError(
                    f"{path} is not the file that was written (checksum differs); "
                    "compile the model again"
                )

    def batches(self, kind: str) -> list[Batch]:
        """The verification batches kept with the artifact; kind is "calibration" or "held-out"."""
        from safetensors.torch import load_file

        path = self.folder / DATA / f"{kind}.safetensors"
        if not path.is_file():
            return []
        return unpack_batches(load_file(path), [i["name"] for i in self.manifest["inputs"]])

    def masks(self, batches: list[Batch]) -> list[Tensor] | None:
        """The padding mask of each batch, where the model has one."""
        names = [i["name"] for i in self.manifest["inputs"]]
        mask = self.manifest.get("padding_mask")
        return [b[names.index(mask)] for b in batches] if mask else None


def pack_batches(batches: list[Batch], names: list[str]) -> dict[str, Tensor]:
    """Batches as one flat mapping for safetensors: `0/input_ids`, …"""
    return {
        f"{i}/{name}": value.contiguous().clone()  # safetensors takes no two names of one memory
        for i, batch in enumerate(batches)
        for name, value in zip(names, batch, strict=True)
    }


def unpack_batches(tensors: Mapping[str, Tensor], names: list[str]) -> list[Batch]:
    """The inverse of `pack_batches`."""
    count = len({key.partition("/")[0] for key in tensors})
    return [tuple(tensors[f"{i}/{name}"] for name in names) for i in range(count)]


def save_batches(folder: Path, kind: str, batches: list[Batch], names: list[str]) -> None:
    """Keep verification batches with the artifact."""
    from safetensors.torch import save_file

    if batches:
        (folder / DATA).mkdir(exist_ok=True)
        save_file(pack_batches(batches, names), folder / DATA / f"{kind}.safetensors")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def writing(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well.

    When it does not, the folder vanishes.

    Raises:
        InputError: if `out` exists and `force` is not set, or cannot be written.
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists; give another --out, or --force to replace it")
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} exists and is no artifact: --force replaces artifacts only; remove it yourself"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out.parent} cannot be written: {error.strerror}") from error
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            out.rename(old / out.name)
            work.rename(out)
            shutil.rmtree(old)
        else:
            work.rename(out)
    except Exception as error:
        if _disk_is_full(error):
            raise InputError(
                f"the disk of {out.parent} is full; nothing was written to {out}"
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _disk_is_full(error: BaseException) -> bool:
    """Whether that is what happened; libraries in other languages only say so in words."""
    known = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return known or os.strerror(errno.ENOSPC) in str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def describe_tensor(name: str, value: Any, symbols: Mapping[str, str]) -> dict[str, Any]:
    """Name, dtype and shape of an input or output for the manifest; dynamic sizes by name."""
    from torch import Tensor

    if not isinstance(value, Tensor):
        return {"name": name, "dtype": type(value).__name__, "shape": []}
    sizes: Iterable[Any] = value.shape  # symbols where they are dynamic
    shape = [s if isinstance(s, int) else symbols.get(str(s), str(s)) for s in sizes]
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


def versions() -> dict[str, str]:
    """Versions of what made the artifact."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from qcompiler import __version__

    found = {
        "qcompiler": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("onnx", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
