"""A model of `ort.lower` as a session, and what is agreed upon between who writes and who runs it.

Imports no torch and no onnx: running a compiled model needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, UnsupportedError, first_line
from qcompiler.library import under_its_own_name

MODEL = "model.onnx"
CPU = "CPUExecutionProvider"
LIBRARY = "libqcompiler_ort.so"  # of custom operators, beside a model that has some
SHARED = "qcompiler.shared_cache"  # metadata of models whose present may be written over their past
FIRST = "logits_from"  # int64 (1,): the first new token whose logits are computed; default 0


def session(
    path: Path, threads: int | None = None, optimised: Path | None = None, rest: bool = False
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        path: the model.
        threads: of one operator; ONNX Runtime's choice when not given.
        optimised: where to write the graph that the session really runs.
        rest: let idle threads stop at the end of a run, instead of spinning for the next one: for
            several sessions that take turns, whose threads would hold each other's cores.
    """
    options = session_options(path)
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if rest:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return open_session(path, options)


def session_options(path: Path) -> Any:
    """Options for that model, with the library of its own operators where it has one.

    Raises:
        UnsupportedError: if the library is not for this machine.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    library = path.parent / LIBRARY
    if library.is_file():
        try:
            with under_its_own_name(library) as name:
                options.register_custom_ops_library(str(name))
        except Exception as error:  # of a class that onnxruntime does not export
            raise UnsupportedError(f"{library}: {first_line(error)}") from error
    return options


def open_session(path: Path, options: Any, providers: Sequence[Any] = (CPU,)) -> Any:
    """The session.

    Raises:
        InputError: where the library of the model's own operators is missing.
        UnsupportedError: where ONNX Runtime has no kernel for an operator.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[*providers])
    except Exception as error:  # as above
        if "qcompiler" in str(error) and not (path.parent / LIBRARY).is_file():
            missing = path.parent / LIBRARY
            raise InputError(
                f"{missing} is missing, which {path.name} needs; compile it again"
            ) from error
        if LIBRARY in str(error):
            raise InputError(f"{path}: {first_line(error)}") from error
        if "NOT_IMPLEMENTED" in str(error):
            raise UnsupportedError(
                f"ONNX Runtime does not run {path.name}: {first_line(error)}"
            ) from error
        raise
