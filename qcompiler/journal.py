"""A journal of rounded weights, so that an interrupted compilation can go on where it stopped.

One file for each layer, written under another name first, so that none is ever half there. A file
holds the fingerprint of all that decides its content; one with another fingerprint is not used.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.plan import Plan, Rounded
from qcompiler.program import Batch, Program

FORMAT = "integers"  # of a file; one of another format is computed again


class Journal:
    """Rounded weights by the name of their node, in a folder.

    Attributes:
        taken: how many were found there.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Make the folder where it is missing.

        Raises:
            InputError: it cannot be made.
        """
        self.folder = folder
        self.fingerprint = fingerprint
        self.taken = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: the journal's folder cannot be made ({error})") from error

    def get(self, name: str) -> Rounded | None:
        """What was kept for that node under the same fingerprint, or None."""
        try:
            found = torch.load(self.folder / f"{name}.pt", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None  # missing or damaged: it is computed again
        if found.pop("fingerprint", None) != self.fingerprint:
            return None
        self.taken += 1
        return Rounded(**found)

    def put(self, name: str, rounded: Rounded) -> None:
        """Keep one node's rounded weight."""
        path = self.folder / f"{name}.pt"
        unfinished = path.with_suffix(".unfinished")
        torch.save({**vars(rounded), "fingerprint": self.fingerprint}, unfinished)
        unfinished.replace(path)


def fingerprint(
    program: Program, plan: Plan, settings: Mapping[str, Any], batches: Iterable[Batch]
) -> str:
    """A digest of the program with its weights, the plan, the settings and the data."""
    digest = hashlib.blake2b(digest_size=16)
    fixed = (FORMAT, torch.__version__)
    for text in (*fixed, str(program), plan.to_json(), repr(sorted(settings.items()))):
        digest.update(text.encode())
    for name, value in sorted(program.constants().items()):
        digest.update(name.encode())
        _update(digest, value)
    for batch in batches:
        for value in batch:
            _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
