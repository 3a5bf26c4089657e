"""Optional packages: imported on use, and asked for in one line when they are not there."""

from __future__ import annotations

import importlib
from typing import Any

from qcompiler.errors import InputError


def optional(name: str, extra: str, needed_for: str) -> Any:
    """Import an optional package.

    Args:
        name: module name, such as "transformers".
        extra: the extra of this package that installs it, such as "hf".
        needed_for: what the user asked for, to name it in the message.

    Raises:
        InputError: the package, or one that it imports, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{needed_for}: the package '{error.name or name}' is not installed; "
            f"pip install 'qcompiler[{extra}]'"
        ) from error
