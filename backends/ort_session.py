"""A model of `ort.lower` as a session, and what is agreed upon between who writes and who runs it.

Imports no torch and no onnx: running a compiled model needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL = "model.onnx"
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
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if rest:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
