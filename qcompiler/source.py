"""Functions named on the command line: `module:function` and `file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, QCompilerError, nearest

HERE = Path(__file__).parent


def names_function(text: str) -> bool:
    """Whether `text` has the form `module:function` or `file.py:function`."""
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        return False
    return place.endswith(".py") or all(part.isidentifier() for part in place.split("."))


def load_function(text: str) -> Callable[[], Any]:
    """The function that `text` names; calling it turns its failures into `InputError`s.

    The folder of a file is put at the end of `sys.path`, so that the file can import what lies
    beside it.

    Args:
        text: `file.py:function`, or `module:function` for a module that Python can import.

    Raises:
        InputError: no such file or module, it fails to import, or it has no such function.
    """
    place, _, name = text.rpartition(":")
    module = (
        _import_file(Path(place), text) if place.endswith(".py") else _import_module(place, text)
    )
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise InputError(f"{text}: {place} has no '{name}'; {nearest(name, known)}")
    if not callable(function):
        raise InputError(
            f"{text}: '{name}' is a {type(function).__name__}, not a function; "
            "name a function that takes no arguments"
        )

    def call() -> Any:
        try:
            return function()
        except QCompilerError:
            raise
        except Exception as error:
            raise InputError(f"{text}: the function raised {explain(error)}") from error

    return call


def explain(error: BaseException) -> str:
    """Type, first line and innermost place in the user's code of an exception, on one line."""
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    if isinstance(error, SyntaxError):
        return message
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(HERE), "<")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries)
    ]
    return f"{message} at {frames[-1].filename}:{frames[-1].lineno}" if frames else message


def _import_file(path: Path, text: str) -> Any:
    if not path.is_file():
        raise InputError(f"{text}: no file '{path}' in {Path.cwd()}; check the path")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    # A name of its own: the file must not replace an installed module that is called the same.
    name = f"qcompiler_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file always has a spec"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, QCompilerError):
            raise
        raise InputError(f"{text}: importing {path} raised {explain(error)}") from error
    return module


def _import_module(name: str, text: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"{text}: no module '{error.name}' on Python's path; install it, or give "
                "file.py:function"
            ) from error
        raise InputError(f"{text}: importing {name} raised {explain(error)}") from error
    except Exception as error:
        raise InputError(f"{text}: importing {name} raised {explain(error)}") from error
