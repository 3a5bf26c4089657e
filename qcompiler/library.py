"""Shared libraries are opened by what they are, not by where they lie.

The dynamic linker knows loaded libraries by the names that they were opened under. Where a folder
is compiled again, it would give a process that ran the old model the old code, for the new one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def under_its_own_name(library: Path) -> Iterator[Path]:
    """A path to the library that was never used before; open it there, then it may go.

    A file that is loaded already is found again by its inode, which is no other file's as long as
    it is loaded.
    """
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        name = Path(folder) / library.name
        name.symlink_to(library.resolve())
        yield name
