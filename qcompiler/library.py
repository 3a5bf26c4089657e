"""Shared libraries are opened by what they are, not by where they lie.

The dynamic linker knows loaded libraries by the names that they were opened under. Where a folder
is compiled again, it would give a process that ran the old model the old code, for the new one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def under_its_own_name(library: Path) -> Iterator[Path]:
    """A path to the library that was never used before; open it there, then it may go.

    A file that is loaded already is found again by its inode, which is no other file's as long as
    it is loaded. Where no file can be written it is the library's own path.
    """
    name = library
    with ExitStack() as held:
        with suppress(OSError):  # a read-only system, where nothing is compiled again either
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="qcompiler-"))
            link = Path(folder) / library.name
            link.symlink_to(library.resolve())
            name = link
        yield name
