"""compile and verify: what an artifact gives back, and what is said of unusable input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import artifact as artifacts
from qcompiler import deliver
from qcompiler.artifact import Artifact
from qcompiler.compiler import compile, quantize, verify
from qcompiler.data import Data
from qcompiler.errors import CaptureError, InputError, QCompilerError, UnsupportedError, VerifyError
from qcompiler.models import ZOO
from qcompiler.observe import observe
from qcompiler.program import capture, load_pt2
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target
from qcompiler.verify import Sqnr

pytestmark = pytest.mark.usefixtures("torchlib_once")
THIS = Path(__file__).name


@pytest.fixture(scope="module", autouse=True)
def _no_waiting() -> Iterator[None]:
    """Timing is the benchmarks' business: here each model runs for an instant."""
    with pytest.MonkeyPatch.context() as patch:
        real = deliver.interleave
        patch.setattr(deliver, "interleave", lambda runs, seconds: real(runs, 0.01))
        yield


def left_behind(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(p.name for p in folder.iterdir())


def sqnr(expected: Tensor, got: Tensor) -> float:
    assert expected.shape == got.shape
    total = Sqnr()
    total.update(expected, got)
    return total.db


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, torchlib_once: None) -> Artifact:
    """tiny-attention-block as w8a8."""
    spec = ZOO["tiny-attention-block"].build()
    return compile(spec, recipe="w8a8", out=tmp_path_factory.mktemp("encoder") / "artifact")


def test_an_artifact_takes_and_gives_what_the_module_does(encoder: Artifact) -> None:
    spec = ZOO["tiny-attention-block"].build()
    assert spec.held_out is not None
    run = encoder.load(threads=1)
    for batch in spec.held_out():
        assert isinstance(batch, dict)
        with torch.no_grad():
            expected = spec.module(**batch)
        by_name = run(**dict(reversed(batch.items())))
        assert isinstance(by_name, Tensor)
        assert sqnr(expected, by_name) > 20
        assert torch.equal(run(*batch.values()), by_name)
        ids, mask = batch.values()
        assert torch.equal(run(ids, attention_mask=mask), by_name)
    for wrong in ({"ids": ids, "attention_mask": mask}, {"input_ids": ids}):
        with pytest.raises(TypeError, match=r"takes (2: )?\['input_ids', 'attention_mask'\]"):
            run(**wrong)


def test_a_manifest_says_what_was_done(encoder: Artifact) -> None:
    manifest = encoder.manifest
    assert [(i["name"], i["dtype"], i["shape"]) for i in manifest["inputs"]] == [
        ("input_ids", "int64", ["batch", "sequence"]),
        ("attention_mask", "int64", ["batch", "sequence"]),
    ]
    assert [(o["name"], o["shape"]) for o in manifest["outputs"]] == [
        ("output", ["batch", "sequence", 32])
    ]
    assert [e["name"] for e in manifest["history"]][:2] == ["normalize", "fold_norm"]
    for entry in manifest["history"]:
        if entry["exact"] and entry["changed"]:
            assert 0 <= entry["residual"] <= entry["bound"], entry["name"]
    assert manifest["audit"]["broken"] == []
    kinds = {(row["data"], row["output"]) for row in manifest["errors"]["quantization"]}
    assert kinds == {("calibration", "output"), ("held-out", "output")}
    assert min(row["sqnr_db"] for row in manifest["errors"]["quantization"]) > 20
    assert min(row["sqnr_db"] for row in manifest["errors"]["lowering"]) > 60
    assert {row["node"] for row in manifest["sites"]} >= {f"linear_{i}" for i in range(3, 6)}
    names = {p.relative_to(encoder.folder).as_posix() for p in encoder.folder.rglob("*")}
    assert {"model.onnx", "manifest.json", "report.html", "reference/model.onnx"} <= names
    files = {n for n in names if (encoder.folder / n).is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}


class Pair(NamedTuple):
    left: Tensor
    right: list[Tensor]


class Structured(nn.Module):
    """Nested outputs, one of them an integer, and an input that comes back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.kind = nn.Linear(8, 4), kind

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        best = y.argmax(-1)
        match self.kind:
            case "dict":
                return {"logits": y, "nested": {"best": best}}
            case "list":
                return [y, (best, y * 2)]
            case _:
                return (y,)


@pytest.mark.parametrize("kind", ["dict", "list", "tuple of one"])
def test_outputs_have_the_structure_of_the_module(kind: str, tmp_path: Path) -> None:
    module = Structured(kind)
    batches = [(torch.randn(4, 8, generator=torch.Generator().manual_seed(i)),) for i in range(4)]
    artifact = compile(
        module,
        batches[0],
        recipe="w8a8-dynamic",
        calibration=batches,
        dynamic_shapes={"x": {0: "batch"}},
        out=tmp_path / "a",
    )
    (x,) = batches[3]
    x = x[:1]
    expected, got = module(x), artifact.load()(x)
    flat, structure = torch.utils._pytree.tree_flatten(expected)
    other, found = torch.utils._pytree.tree_flatten(got)
    assert found == structure
    assert [t.dtype for t in other] == [t.dtype for t in flat]
    assert sqnr(flat[0], other[0]) > 25


def test_verify_passes_and_names_its_bounds(encoder: Artifact) -> None:
    result = verify(encoder.folder)
    assert result["ok"] is True
    assert result["checks"][0]["what"] == "files"
    kinds = [c["what"].partition(":")[0] for c in result["checks"][1:]]
    assert (
        kinds
        == [
            "artifact against the quantized program",
            "artifact against the float model",
        ]
        * 2
    )
    for check in result["checks"][1:]:
        assert check["value"] >= check["bound"]
    # The lowering bound is what was measured less 6 dB: far above any wrong weight.
    assert result["checks"][1]["bound"] > 50


def tampered(artifact: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact.folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["model.onnx", "verify/held-out.safetensors", "program.txt"])
def test_verify_names_a_file_that_changed_or_is_missing(
    name: str, encoder: Artifact, tmp_path: Path
) -> None:
    folder = tampered(encoder, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(VerifyError, match=rf"{name} is not the file that was written"):
        verify(folder)
    (folder / name).unlink()
    with pytest.raises(VerifyError, match=rf"{name} is missing"):
        verify(folder)


@pytest.mark.parametrize("what", ["one scale", "one weight"])
def test_verify_sees_a_changed_weight_behind_a_matching_checksum(
    what: str, encoder: Artifact, tmp_path: Path
) -> None:
    folder = tampered(encoder, tmp_path)
    model = onnx.load(folder / "model.onnx")
    (node, *_) = [n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"]
    tensors = {i.name: i for i in model.graph.initializer}
    tensor = tensors[node.input[2 if what == "one scale" else 1]]
    values = onnx.numpy_helper.to_array(tensor).copy()
    if what == "one scale":
        values = (values * 1.01).astype(values.dtype)
    else:
        values[0, 0] = -values[0, 0] if abs(int(values[0, 0])) > 20 else 100
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / "model.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = artifacts.sha256(folder / "model.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = verify(folder)
    assert result["ok"] is False
    broken = [c["what"] for c in result["checks"] if not c["ok"]]
    assert any(text.startswith("artifact against the quantized program") for text in broken)


def test_the_same_model_twice_gives_the_same_file(encoder: Artifact, tmp_path: Path) -> None:
    spec = ZOO["tiny-attention-block"].build()
    again = compile(spec, recipe="w8a8", out=tmp_path / "again")
    assert again.manifest["plan"] == encoder.manifest["plan"]
    assert again.manifest["files"]["model.onnx"] == encoder.manifest["files"]["model.onnx"]


def test_a_saved_program_compiles(tmp_path: Path) -> None:
    spec = ZOO["tiny-norm-linear"].build()
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    path = tmp_path / "model.pt2"
    torch.export.save(program.exported, path)
    assert spec.calibration is not None
    artifact = compile(
        load_pt2(path), recipe="w8a8", calibration=list(spec.calibration()), out=tmp_path / "out"
    )
    assert [i["name"] for i in artifact.manifest["inputs"]] == ["x"]
    run = artifact.load(threads=1)
    for shape in ((1, 5, 32), (3, 20, 32)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = spec.module(x)
        got = run(x=x)
        assert isinstance(got, tuple)
        for r, g in zip(expected, got, strict=True):
            assert sqnr(r, g) > 25


def test_a_program_of_several_inputs_in_any_order(tmp_path: Path) -> None:
    spec = ZOO["tiny-post-norm-block"].build()
    assert spec.calibration is not None
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    path = tmp_path / "model.pt2"
    torch.export.save(program.exported, path)
    batches = [dict(reversed(b.items())) for b in spec.calibration()]  # type: ignore[union-attr]
    artifact = compile(load_pt2(path), recipe="w8", calibration=batches, out=tmp_path / "out")
    with torch.no_grad():
        assert sqnr(spec.module(**batches[0]), artifact.load()(**batches[0])) > 25


def test_one_batch_is_enough_and_said_to_be_little(tmp_path: Path) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    artifact = compile(module, (x,), recipe="w8a8", calibration=[(x,)], out=tmp_path / "a")
    assert any("a single batch" in text for text in artifact.manifest["warnings"])
    assert verify(artifact.folder)["ok"]


class Difference(nn.Module):
    """One layer used twice, and inputs whose order matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(left) - 2 * self.layer(right)


@pytest.mark.parametrize("recipe", ["w8", "w8a8-dynamic"])
def test_a_layer_used_twice_and_a_metric_with_named_inputs(recipe: str, tmp_path: Path) -> None:
    module = Difference()

    def closeness(run: Callable[..., Any]) -> float:
        with torch.no_grad():
            return sqnr(module(X, 3 * X), run(right=3 * X, left=X))

    # Both inputs are one tensor: an artifact keeps its data all the same.
    spec = ModelSpec(
        "difference", module, {"left": X, "right": X}, calibration=lambda: [(X, X)] * 4,
        metric=closeness, metric_name="SQNR",
    )  # fmt: skip
    artifact = compile(spec, recipe=recipe, out=tmp_path / "a")
    assert artifact.manifest["metric"]["float"] > 100
    assert artifact.manifest["metric"]["quantized"] > 25
    stored = [i.name for i in onnx.load(artifact.folder / "model.onnx").graph.initializer]
    assert len(stored) == len(set(stored))
    stored = [
        list(i.dims)
        for i in onnx.load(artifact.folder / "reference" / "model.onnx").graph.initializer
    ]
    assert stored.count([8, 4]) == 1
    assert verify(artifact.folder)["ok"]


@pytest.mark.parametrize("name", ["w8a8-dynamic", "w4a16"])
def test_a_rotated_decoder_compiles(name: str, tmp_path: Path) -> None:
    spec = ZOO["tiny-gqa-decoder"].build()
    recipe = load_recipe(name, {"rotation": "hadamard", "seed": 1})
    artifact = compile(spec, recipe=recipe, out=tmp_path / "artifact")
    steps = {entry["name"]: entry for entry in artifact.manifest["history"]}
    assert any(note.startswith("R1: Hadamard 4 ⊗ 8") for note in steps["fuse_rotation"]["notes"])
    # R4 is computed only where activations are quantized.
    assert ("R4" in " ".join(steps["fuse_rotation"]["notes"])) == (name == "w8a8-dynamic")
    assert spec.held_out is not None
    (batch, *_) = spec.held_out()
    assert isinstance(batch, dict)
    with torch.no_grad():
        expected = spec.module.double()(**batch)
    assert sqnr(expected, artifact.load()(**batch)) > (25.0 if name == "w8a8-dynamic" else 8.0)


def test_ranges_taken_at_run_time_are_not_observed_but_smoothing_is_shown(tmp_path: Path) -> None:
    spec = ZOO["tiny-gqa-decoder"].build()
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    recipe = load_recipe("w8a8-dynamic")
    data = Data(program, spec, recipe)
    made = quantize(program, data, recipe, Target.parse("ort:cpu"), lambda step: None)
    assert not made.ranges_after
    artifact = compile(spec, recipe=recipe, out=tmp_path / "artifact")
    rows = {row["tensor"]: row["after"] for row in artifact.manifest["ranges"]}
    assert "were not measured" in (artifact.folder / "report.html").read_text()
    assert set(rows) == set(made.factors)
    kept = {n.name: -1 for n in made.floating.exported.graph.nodes if n.name in rows}
    assert len(kept) >= 3
    # What is computed from the factors is what the smoothed program has.
    for name, stats in observe(made.floating, kept, data.calibration(), mask=data.mask).items():
        measured = [float(stats.low.min()), float(stats.high.max())]
        assert [rows[name]["low"], rows[name]["high"]] == pytest.approx(measured, rel=1e-4)


def test_weight_only_recipes_need_no_data_and_say_so(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    artifact = compile(module, (torch.randn(4, 32),), recipe="w4a16", out=tmp_path / "artifact")
    (entry,) = (e for e in artifact.manifest["history"] if e["name"] == "round_weights")
    assert "gptq needs calibration data; weights are rounded to nearest" in str(entry["refusals"])


@pytest.mark.parametrize("settings", [{}, {"window": 4, "keys": "uint4:g4:affine"}], ids=str)
def test_formats_are_simulated_in_torch(settings: dict[str, Any]) -> None:
    spec = ZOO["tiny-gqa-decoder"].build()
    program = capture(spec.module, spec.example_inputs, spec.dynamic_shapes)
    recipe = load_recipe("w4a4kv4", settings)
    compiled = quantize(
        program, Data(program, spec, recipe), recipe, Target.parse("torch:cpu"), lambda step: None
    )
    names = [str(node.target) for node in compiled.quantized.exported.graph.nodes]
    assert sum("dynamic_quantize" in name for name in names) == 5  # one for each tensor
    assert sum("cache_round_trip" in name for name in names) == 2
    assert "quantize_cache" in [entry.name for entry in compiled.quantized.history]
    (batch, *_) = Data(program, spec, recipe).held_out()
    db = sqnr(program.run(batch)[0], compiled.quantized.run(batch)[0])
    assert 4.0 < db < 25.0


def test_four_bit_weights_with_eight_bit_activations_on_onnx_runtime(tmp_path: Path) -> None:
    spec = ZOO["tiny-gqa-decoder"].build()
    recipe = load_recipe("w4a8", {"weights": "int4:g16"})
    artifact = compile(spec, recipe=recipe, out=tmp_path / "artifact")
    assert "quantizes what int4:g16 weights read to int8 itself" in str(
        artifact.manifest["refusals"]
    )


@pytest.mark.parametrize(
    ("recipe", "target", "message"),
    [
        ("w4a4kv4", "ort:cpu", "a cache is kept as int8:channel, int4:channel, int8:tensor"),
        ("w4a8kv8", "tvm:x86-64", "generated code keeps its key-value cache in float"),
        ("w8", "torch:cpu", "simulates formats for measuring and writes no artifact"),
    ],
)
def test_what_is_only_simulated(recipe: str, target: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        compile(LINEAR, (X,), recipe=recipe, target=target, out=tmp_path / "artifact")


def test_three_bits_are_said_to_be_stored_in_four(tmp_path: Path) -> None:
    spec = ZOO["tiny-mlp"].build()
    artifact = compile(spec, recipe="w3a16", out=tmp_path / "artifact")
    assert "stores each weight in 4 bits" in json.dumps(artifact.manifest)


def test_an_interrupted_compilation_resumes_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ZOO["tiny-gqa-decoder"].build()
    recipe = load_recipe("w4a16", {"weights": "int4:g16"})
    compile(spec, recipe=recipe, out=tmp_path / "whole")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qcompiler.compiler.deliver", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compile(spec, recipe=recipe, out=tmp_path / "later", resume=True)
    assert left_behind(tmp_path) == ["later.journal", "whole"]
    artifact = compile(spec, recipe=recipe, out=tmp_path / "later", resume=True)
    assert left_behind(tmp_path) == ["later", "whole"]
    assert "8 weights taken from the journal" in json.dumps(artifact.manifest["history"])
    models = [(tmp_path / name / "model.onnx").read_bytes() for name in ("whole", "later")]
    assert models[0] == models[1]


def test_force_replaces_artifacts_alone(encoder: Artifact, tmp_path: Path) -> None:
    spec = ZOO["tiny-mlp"].build()
    out = tampered(encoder, tmp_path)
    with pytest.raises(InputError, match=r"copy exists; give another --out, or --force"):
        compile(spec, recipe="w8", out=out)
    assert Artifact.open(out).manifest["name"] == "tiny-attention-block"
    assert compile(spec, recipe="w8", out=out, force=True).manifest["name"] == "tiny-mlp"
    assert left_behind(tmp_path) == ["copy"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"mine exists and is no artifact"):
        compile(spec, recipe="w8", out=mine, force=True)
    assert (mine / "thesis.txt").read_text() == "years of work"


# Bad input: one clear line, and nothing left behind.


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the message names
            return x
        return -x


def fails(
    kind: type[QCompilerError], message: str, tmp_path: Path, *args: Any, **kwargs: Any
) -> str:
    """Compile raises `kind` with one line that matches, and leaves nothing in the folder."""
    with pytest.raises(kind, match=message) as caught:
        compile(*args, out=tmp_path / "out", **kwargs)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path) == []
    return str(caught.value)


LINEAR = nn.Linear(8, 2)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_a_module_that_does_not_export(tmp_path: Path) -> None:
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, t in enumerate(lines, 1) if "the line that the message names" in t)
    message = fails(CaptureError, r"^Branching does not export", tmp_path, Branching(), (X,))
    assert f"{THIS}:{line}" in message
    assert "torch.where" in message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(4, 9),), "do not fit the model: check their shapes and dtypes"),
        ((X.double(),), "do not fit the model: check their shapes and dtypes"),
        ((X.long(),), "do not fit the model: check their shapes and dtypes"),
        ((X, X), "2 example inputs given, forward takes 1: input"),
        ({"y": X}, "check their number and names"),
        (([1.0, 2.0],), "example input 'input' is a list, not a tensor"),
        (None, "example_inputs are needed"),
    ],
    ids=["shape", "double", "long", "two", "name", "list", "none"],
)
def test_wrong_example_inputs(inputs: Any, message: str, tmp_path: Path) -> None:
    kind = CaptureError if "check" in message else InputError
    fails(kind, message, tmp_path, LINEAR, inputs, recipe="w8")


def test_halves_are_refused(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        narrow = nn.Linear(8, 2).to(dtype)
        said = f"parameter 'weight' is {dtype}.*model.float()"
        fails(InputError, said, tmp_path, narrow, (X.to(dtype),), recipe="w8")


class Told(nn.Module):
    """A linear that also says something of its input."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(8, 2), what

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.linear(x), "told": self.what(x)}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda x: None, r"output\['told'\] is None, not a tensor"),
        (lambda x: 3, r"output\['told'\] is 3, not a tensor"),
        (lambda x: x.shape[0], r"output\['told'\] is a number that depends on a size"),
    ],
)
def test_outputs_that_are_no_tensors(
    what: Callable[[Tensor], Any], said: str, tmp_path: Path
) -> None:
    shapes = {"x": {0: "batch"}}
    fails(InputError, said, tmp_path, Told(what), (X,), recipe="w8", dynamic_shapes=shapes)


def test_dynamic_shapes_that_the_model_cannot_have(tmp_path: Path) -> None:
    shapes = {"input": {1: "features"}}
    fails(CaptureError, "leave that dimension out of dynamic_shapes", tmp_path, LINEAR, (X,),
          recipe="w8", dynamic_shapes=shapes)  # fmt: skip
    shapes = {"inputs": {0: "batch"}}
    fails(InputError, r"unknown inputs \['inputs'\]; the inputs are \['input'\]", tmp_path,
          LINEAR, (X,), recipe="w8", dynamic_shapes=shapes)  # fmt: skip
    shapes = {"input": {2: "batch"}}
    fails(InputError, "has no dimension 2", tmp_path, LINEAR, (X,), recipe="w8",
          dynamic_shapes=shapes)  # fmt: skip
    batch = torch.export.Dim("batch")
    for sizes in ({0: batch}, {0: 2 * batch}, {0: torch.export.Dim.AUTO}, (batch, None), None):
        fails(InputError, "the name of its size", tmp_path, LINEAR, (X,), recipe="w8",
              dynamic_shapes={"input": sizes})  # fmt: skip


def spoiled(value: float) -> Tensor:
    x = X.clone()
    x[1, 2] = value
    return x


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there is no data; give at least one batch"),
        ([(X,), (spoiled(float("nan")),), (X,)], r"calibration batch 1: input 'input' has 1 NaN"),
        ([(X,), (X,), (spoiled(float("inf")),)], r"held-out data batch 0: input 'input' has 1 NaN"),
        ([(X.double(),)], r"batch 0: 'input' is torch.float64, the model takes torch.float32"),
        ([(X[:, :5],)], r"batch 0: 'input' has the shape \(4, 5\), the model takes \(4, 8\)"),
        ([(X, X)], "batch 0: 2 tensors given, the model takes 1: input"),
        ([{"x": X}], r"batch 0: inputs \['x'\] given, the model takes \['input'\]"),
        ([("text",)], "batch 0: 'input' is a str, not a tensor"),
        (None, r"needs calibration data and Linear brings none"),
    ],
    ids=["empty", "nan", "inf", "dtype", "shape", "number", "name", "type", "none"],
)
def test_calibration_that_cannot_be_used(batches: Any, message: str, tmp_path: Path) -> None:
    fails(InputError, message, tmp_path, LINEAR, (X,), calibration=batches)


def test_values_that_overflow_inside_the_model(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        module[0].weight.mul_(1e30)
    huge = X * 1e30
    fails(InputError, r"has NaN or Inf", tmp_path, module, (huge,), calibration=[(huge,)] * 4)


@pytest.mark.parametrize(
    ("recipe", "kind", "message"),
    [
        ("w8a9", InputError, r"recipe 'w8a9': did you mean 'w8a8'"),
        ("none.yaml", InputError, r"none.yaml: no such file"),
        ({"weigths": "int8"}, InputError, r"no key 'weigths'; did you mean 'weights'"),
        ({"calibration": "minmx"}, InputError, r"calibration='minmx'.*did you mean 'minmax'"),
        ({"percentile": 12}, InputError, r"percentile=12"),
        ({"weights": "int9:channel"}, InputError, r"unknown number format 'int9'"),
        ({"activations": "int4:tensor"}, UnsupportedError, r"multiplies 8-bit activations"),
        ({"weights": "int4:g32"}, UnsupportedError, r"no kernel for int4:g32 weights"),
        ({"embeddings": "int8:tensor"}, UnsupportedError, r"embeddings are int8:channel"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_used(
    recipe: Any, kind: type[QCompilerError], message: str, tmp_path: Path
) -> None:
    from qcompiler.recipe import load_recipe

    if isinstance(recipe, str):
        fails(kind, message, tmp_path, LINEAR, (X,), recipe=recipe, calibration=[(X,)] * 4)
        return
    with pytest.raises(kind, match=message) as caught:
        compile(
            LINEAR,
            (X,),
            recipe=load_recipe("w8a8", recipe),
            calibration=[(X,)] * 4,
            out=tmp_path / "out",
        )
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path) == []


def test_a_target_that_nobody_knows(tmp_path: Path) -> None:
    fails(UnsupportedError, r"target 'ort:gpu'", tmp_path, LINEAR, (X,), target="ort:gpu")


def test_a_padding_mask_that_is_no_input(tmp_path: Path) -> None:
    spec = replace(ZOO["tiny-mlp"].build(), padding_mask="mask")
    fails(InputError, r"padding_mask 'mask' is no input of the model: x", tmp_path, spec)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 not really a zip"])
def test_a_corrupt_program_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model.pt2: not a program that torch .* can read") as e:
        load_pt2(path)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"absent.pt2: no such file"):
        load_pt2(tmp_path / "absent.pt2")


def test_a_truncated_program_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(capture(LINEAR, (X,)).exported, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"not a program that torch"):
        load_pt2(path)


@pytest.mark.parametrize("step", ["capture", "calibrate", "lower", "verify"])
def test_an_interruption_leaves_nothing_behind(step: str, tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        if name == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile(
            LINEAR,
            (X,),
            recipe="w8a8",
            calibration=[(X,)] * 4,
            out=tmp_path / "out",
            progress=interrupt,
        )
    assert left_behind(tmp_path) == []


def test_an_interruption_keeps_what_was_there(encoder: Artifact, tmp_path: Path) -> None:
    out = tampered(encoder, tmp_path)

    def interrupt(name: str) -> None:
        if name == "lower":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile(LINEAR, (X,), recipe="w8", out=out, force=True, progress=interrupt)
    assert left_behind(tmp_path) == ["copy"]
    assert verify(out)["ok"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler.backends import ort

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ort, "lower", full)
    fails(InputError, r"the disk of .* is full; nothing was written", tmp_path, LINEAR, (X,),
          recipe="w8")  # fmt: skip


def test_a_bound_that_is_not_reached(tmp_path: Path) -> None:
    from qcompiler.recipe import load_recipe

    recipe = load_recipe("w4a16", {"min_sqnr": 90.0, "weights": "int4:g16"})
    module = nn.Linear(32, 4)
    x = torch.randn(4, 32)
    fails(VerifyError, r"SQNR on held-out data is .* dB, recipe 'w4a16' demands 90.0", tmp_path,
          module, (x,), recipe=recipe)  # fmt: skip


class Roots(nn.Module):
    """NaN for what a linear makes negative, and a constant as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 4)
        self.table = nn.Buffer(torch.arange(3.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x).sqrt(), self.table


def test_a_float_model_that_gives_nan(tmp_path: Path) -> None:
    module, good = Roots(), torch.rand(4, 32) + 1
    nn.init.ones_(module.linear.weight)
    batches = [(good,), (-good,), (good,), (-good,)]  # the fourth is held out
    fails(VerifyError, "the float model itself gives NaN", tmp_path, module, (good,),
          calibration=batches, recipe="w8")  # fmt: skip
    made = compile(module, (good,), calibration=batches[:2] + [(good,)] * 2, recipe="w8",
                   out=tmp_path / "out")  # fmt: skip
    assert bool(made.load()(-good)[0].isnan().all())


def test_a_constant_that_is_returned(tmp_path: Path) -> None:
    module = Roots()
    nn.init.ones_(module.linear.weight)
    x = torch.rand(4, 32) + 1
    made = compile(module, (x,), recipe="w8", out=tmp_path / "out")
    torch.testing.assert_close(made.load()(x)[1], module.table)


def test_a_model_of_one_vector(tmp_path: Path) -> None:
    data = [(torch.randn(32),) for _ in range(8)]
    module = nn.Linear(32, 4)
    made = compile(module, data[0], calibration=data, recipe="w8a8", out=tmp_path / "out")
    assert (made.load()(*data[0]) - module(*data[0])).norm() < 0.05 * module(*data[0]).norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", r"manifest.json is corrupt"),
        (lambda text: text[:-100], r"manifest.json is corrupt"),
        (lambda text: text.replace('"format": 1', '"format": 99'), r"format 99.*newer qcompiler"),
        (lambda text: '{"format": 1}', r"is corrupt \(no files, inputs, outputs, target\)"),
        (lambda text: "[1, 2]", r"manifest.json is corrupt"),
    ],
    ids=["empty", "cut", "newer", "missing", "list"],
)
def test_manifests_that_cannot_be_read(
    change: Callable[[str], str], message: str, encoder: Artifact, tmp_path: Path
) -> None:
    folder = tampered(encoder, tmp_path)
    path = folder / "manifest.json"
    path.write_text(change(path.read_text()))
    for use in (Artifact.open, verify):
        with pytest.raises(InputError, match=message):
            use(folder)
    with pytest.raises(InputError, match=r"no manifest.json there"):
        Artifact.open(tmp_path)


def test_public_names() -> None:
    for name in qcompiler.__all__:
        assert getattr(qcompiler, name) is not None
    assert qcompiler.compile is compile
    assert qcompiler.ModelSpec is ModelSpec
