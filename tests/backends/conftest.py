"""What makes the backend tests fast."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _read_torchlib_once() -> Iterator[None]:
    """Torch's exporter reads 500 functions of onnxscript anew for every model: once is enough."""
    import onnxscript
    from torch.onnx._internal import _lazy_import

    assert onnxscript
    apis = getattr(_lazy_import, "onnxscript_apis", None)
    if getattr(apis, "get_torchlib_ops", None) is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("onnxscript._framework_apis.torch_"):
                patch.setattr(module, "get_torchlib_ops", functools.cache(module.get_torchlib_ops))
        yield
