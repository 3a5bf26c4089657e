"""Models compiled for a GPU: what the artifact holds, and what is said where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tvm", reason="needs the extra [tvm]")

import qcompiler
from qcompiler import gpu
from qcompiler.artifact import Artifact
from qcompiler.backends import edge_cuda_build, edge_cuda_calls, edge_cuda_load
from qcompiler.backends.edge_artifact import load
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.recipe import load_recipe
from qcompiler.target import Target, known_targets

nvcc = pytest.mark.skipif(not edge_cuda_build.installed(), reason="nvcc is not installed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Block(torch.nn.Module):
    """Norm, two linears with an activation between them, a residual sum; one linear stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.gelu(self.up(self.norm(x)))
        return torch.softmax(x + self.down(inner), -1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("cuda") / "block"
    batches = [(torch.randn(5, 64),) for _ in range(2)]
    return qcompiler.compile(
        Block().eval(), batches[0], calibration=batches, target="tvm:cuda:sm_90",
        recipe=load_recipe("w4a16"), out=out,
    )  # fmt: skip


def test_targets_parse_and_print() -> None:
    for name in ("sm_80", "sm_86", "sm_89", "sm_90"):
        assert str(Target.parse(f"tvm:cuda:{name}")) == f"tvm:cuda:{name}"
        assert f"tvm:cuda:{name}" in known_targets()
    with pytest.raises(UnsupportedError, match="sm_90"):
        Target.parse("tvm:cuda:sm_91")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [("w8a8", "float activations"), ("w3a16", "4 or 8 bits"), ("w4a4kv4", "8 bits by token")],
)
def test_what_gpus_do_not_read_is_refused(recipe: str, said: str) -> None:
    chosen = load_recipe(recipe)
    refusal = Target.parse("tvm:cuda:sm_90").refusal(chosen.weight_type, chosen.activation_type)
    assert refusal is not None
    assert said in refusal


def test_the_compiler_of_a_python_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_cuda_build, "NVCC", ("no-such-command",))
    monkeypatch.setattr(edge_cuda_build, "WHEELS", ("cu0/bin/nvcc",))
    with pytest.raises(UnsupportedError, match=r"pip install 'qcompiler\[cuda\]'"):
        edge_cuda_build.compiler()
    command = tmp_path / "nvidia" / "cu0" / "bin" / "nvcc"
    command.parent.mkdir(parents=True)
    command.touch(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    assert edge_cuda_build.compiler() == str(command)


@nvcc
def test_the_artifact_is_code_weights_and_a_description(artifact: Artifact) -> None:
    folder = artifact.folder
    program = json.loads((folder / edge_cuda_load.PROGRAM).read_text())
    assert (folder / edge_cuda_load.KERNELS).read_bytes()[:4] == b"\x50\xed\x55\xba"
    assert (folder / edge_cuda_load.WEIGHTS).stat().st_size == program["weights"]
    assert program["capability"] == 90
    (entry,) = program["entries"]
    for step in entry["steps"]:
        launch = program["launches"][step["symbol"]]
        assert len(step["tensors"]) > max(launch["order"])
    kernels = artifact.manifest["audit"]["kernels"]
    assert kernels["skinny"] == 2
    assert kernels["layer_norm"] == kernels["softmax"] == 1


@nvcc
@no_gpu
def test_without_a_gpu_nothing_is_claimed(artifact: Artifact) -> None:
    assert any(w.startswith("not run: no GPU") for w in artifact.manifest["warnings"])
    assert artifact.manifest["errors"]["lowering"] == []
    quantized = min(row["sqnr_db"] for row in artifact.manifest["errors"]["quantization"])
    bound = artifact.manifest["bounds"]["min_lowering_sqnr"]
    assert bound == pytest.approx(min(quantized, 30) - 6, abs=0.1)
    assert artifact.manifest["latency"] == []


@nvcc
@no_gpu
def test_run_without_a_gpu_is_one_line(artifact: Artifact) -> None:
    command = [sys.executable, "-m", "qcompiler", "run", str(artifact.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU: " in done.stderr
    assert "Traceback" not in done.stderr


@nvcc
def test_a_missing_file_is_named(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / edge_cuda_load.PROGRAM).write_text("{}")
    with pytest.raises(InputError, match=edge_cuda_load.KERNELS):
        load(tmp_path)


@nvcc
@pytest.mark.parametrize(
    ("recipe", "target", "kernels"),
    [
        ("w4a16", "sm_90", {"half_units", "gemm_hopper"}),
        ("w4a16", "sm_90", {"skinny"}),
        ("w4a16", "sm_86", {"gemm"}),
        ("w8a8-token", "sm_90", {"quantize_rows", "matmul_int8"}),
        ("w8a8-token", "sm_80", {"quantize_rows", "skinny_int8"}),
        ("fp8", "sm_90", {"quantize_rows", "matmul_e4m3"}),
        ("fp8", "sm_89", {"quantize_rows", "skinny_e4m3"}),
        ("w4a8", "sm_80", {"quantize_rows", "gemm"}),
        ("w4a8", "sm_90", {"quantize_rows", "gemm_hopper"}),
        ("w4a8", "sm_90", {"quantize_rows", "skinny_int4_int8"}),
    ],
)
def test_many_tokens(
    recipe: str, target: str, kernels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 64 tokens read tensor cores' own layouts; norms join what quantizes their rows."""
    if kernels & {"gemm_hopper", "gemm"}:
        monkeypatch.setattr(edge_cuda_calls, "small_product", lambda gpu: 0)
    torch.manual_seed(0)
    batches = [(torch.randn(100, 64),) for _ in range(2)]
    made = qcompiler.compile(
        Block().eval(), batches[0], calibration=batches, target=f"tvm:cuda:{target}",
        recipe=load_recipe(recipe, {"rounding": "rtn"}), out=tmp_path / "block",
    )  # fmt: skip
    found = made.manifest["audit"]["kernels"]
    assert set(found) - {"elementwise"} == kernels | {"softmax"} | (
        {"layer_norm"} if recipe == "w4a16" else set()
    )
    kind = {"w4a16": "weights only", "fp8": "float8"}.get(recipe, "integer")
    layers = {(layer["op"], layer["kernel"]) for layer in made.manifest["audit"]["layers"]}
    assert layers == {(name, kind) for name in kernels - {"quantize_rows", "half_units"}}
    (entry,) = json.loads((tmp_path / "block" / edge_cuda_load.PROGRAM).read_text())["entries"]
    halves = [t for t in entry["tensors"] if t["dtype"] == "float16"]
    # Rows of float16 are stored by the kernels that make them; Hopper's large products read units.
    rows = recipe == "w4a16" and kernels & {"gemm", "skinny"}
    assert len(halves) == (2 if rows else 0)


class Encoder(torch.nn.Module):
    """Attention as encoders have it, over texts that are filled up at their ends."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (torch.nn.Linear(64, heads * size) for _ in range(3))
        self.out = torch.nn.Linear(heads * size, 64)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        hidden = (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
        made = torch.nn.functional.scaled_dot_product_attention(q, k, v, hidden)
        return x + self.out(made.transpose(1, 2).flatten(2))


@nvcc
@pytest.mark.parametrize(
    ("heads", "size", "kernel"), [(2, 32, "flash_attention"), (1, 24, "attention")]
)
def test_encoders_attend_on_tensor_cores(
    heads: int, size: int, kernel: str, tmp_path: Path
) -> None:
    """Queries, keys and values are stored in float16 by the products that make them."""
    torch.manual_seed(0)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    batches = [(torch.randn(2, 20, 64), mask) for _ in range(2)]
    made = qcompiler.compile(
        Encoder(heads, size).eval(), batches[0], calibration=batches, target="tvm:cuda:sm_80",
        recipe=load_recipe("w8", {"rounding": "rtn"}), out=tmp_path / "encoder",
    )  # fmt: skip
    kernels = made.manifest["audit"]["kernels"]
    assert kernels[kernel] == 1
    program = json.loads((tmp_path / "encoder" / edge_cuda_load.PROGRAM).read_text())
    halves = [
        t["shape"] for t in program["entries"][0]["tensors"] if t["dtype"] == "float16"
    ]  # what linears read, and q, k and v
    assert len(halves) == (5 if kernel == "flash_attention" else 2)


def language(out: Path, settings: dict[str, object], tokens: list[int]) -> Artifact:
    """A tiny Llama; the head of one with weights of 8-bit floats reads the embedding's table."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    from qcompiler.models.hf_decoder import decoder_spec

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, pad_token_id=0,
        tie_word_embeddings="weights" in settings,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 96, (2, 20))

    def texts() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(ids, torch.ones_like(ids))] * 2

    recipe = load_recipe(
        "w8a8-token", {"rounding": "rtn", "smooth": False, "min_sqnr": 1.0, **settings}
    )
    return qcompiler.compile(
        decoder_spec("Llama", model, None, lambda texts: {}, {}, texts, texts),
        target="tvm:cuda:sm_90", recipe=recipe, out=out,
        buckets={"tokens": tokens, "capacity": [64]},
    )  # fmt: skip


STORED = {"keys": "int4:channel", "values": "int4:channel"}
FP8 = {"weights": "float8_e4m3:channel", "activations": "float8_e4m3:token"}


@nvcc
@pytest.mark.parametrize(("settings", "bits", "tokens"), [(FP8, 16, [1]), (STORED, 4, [1, 20])])
def test_a_language_model_keeps_its_cache(
    settings: dict[str, object], bits: int, tokens: list[int], tmp_path: Path
) -> None:
    """Takes a while: a whole model is compiled at one or two sizes."""
    made = language(tmp_path / "a", settings, tokens)
    kernels = made.manifest["audit"]["kernels"]
    assert kernels["prompt_attention" if tokens[-1] > 16 else "cached_attention"] == 2
    assert kernels.get("write_cache", 0) == (2 if tokens[-1] > 16 else 0)
    assert "rms_norm" not in kernels
    program = json.loads((tmp_path / "a" / edge_cuda_load.PROGRAM).read_text())
    # Layers, keys and values, heads · capacity · size.
    assert program["state"] == 2 * 2 * (2 * 64 * 16) * bits // 8
    assert [e["sizes"]["tokens"] for e in program["entries"]] == tokens
    for entry in program["entries"]:
        state = {t["at"] for t in entry["tensors"] if t["space"] == "state"}
        assert len(state) == 4


@nvcc
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["", "int8:channel", "int4:tensor", "fp8"])
def test_a_gpu_reads_its_cache(kind: str, tmp_path: Path) -> None:
    """Chunks and single tokens agree, and both with the quantized program."""
    from safetensors.torch import load_file

    settings: dict[str, object] = {"keys": kind, "values": kind} if kind else {}
    settings = {**FP8} if kind == "fp8" else settings
    made = language(tmp_path / "a", settings, [1, 16, 20])
    run = load(made.folder).run  # type: ignore[attr-defined]
    given = load_file(made.folder / "verify" / "calibration.safetensors")["0/input_ids"][0]
    name = made.folder / "verify" / "calibration-quantized.safetensors"
    want = load_file(name)["0/logits"][0, -1]
    found = []
    for parts in ([len(given)], [1] * len(given)):
        run.reset()
        for part in torch.split(given, parts):
            scores = run.read(part)
        found.append(scores)
        assert (scores - want).norm() / want.norm() < 3e-2  # of a cache's integers, some turn over
    assert (found[0] - found[1]).norm() / want.norm() < 3e-2


def stub(monkeypatch: pytest.MonkeyPatch, capability: int, free: int) -> None:
    """A GPU that is only described."""
    found = gpu.Device(0, "a GPU", capability, free)
    monkeypatch.setattr(edge_cuda_load, "device", lambda: found)
    monkeypatch.setattr(edge_cuda_load, "free_memory", lambda: free)


@nvcc
def test_another_gpu_and_too_little_memory_are_named(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, 89, 1 << 30)
    with pytest.raises(UnsupportedError, match=r"capability 9\.0, and a GPU has 8\.9"):
        load(artifact.folder)
    stub(monkeypatch, 90, 1 << 10)
    with pytest.raises(UnsupportedError, match="0 MiB are free"):
        load(artifact.folder)


@nvcc
def test_kernels_that_wait_for_one_another_are_refused(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions compiled them, for GPUs of so many processors: others never finish."""
    stub(monkeypatch, 90, 1 << 30)
    shutil.copytree(artifact.folder, tmp_path / "old")
    path = tmp_path / "old" / edge_cuda_load.PROGRAM
    program = json.loads(path.read_text())
    next(iter(program["launches"].values()))["together"] = 132
    path.write_text(json.dumps(program))
    with pytest.raises(UnsupportedError, match="compile it again"):
        load(tmp_path / "old")


@nvcc
@pytest.mark.gpu
def test_the_gpu_gives_what_the_quantized_program_gives(artifact: Artifact) -> None:
    from safetensors.torch import load_file

    held = load_file(artifact.folder / "verify" / "held-out.safetensors")
    wanted = load_file(artifact.folder / "verify" / "held-out-quantized.safetensors")
    run = load(artifact.folder)
    (name,) = {key.partition("/")[2] for key in held}
    for key, want in wanted.items():
        (got,) = run(held[f"{key.partition('/')[0]}/{name}"])
        assert (got - want).norm() / want.norm() < 2e-3  # float16 activations


@nvcc
@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "limit"), [(5, 1e-6), (100, 5e-3)])
def test_8_bit_floats_on_the_gpu(tokens: int, limit: float, tmp_path: Path) -> None:
    """Sums of 256 products of more than 64 tokens keep few bits: `cuda_matmul_8bit`."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    batches = [(torch.randn(tokens, 64),) for _ in range(2)]
    made = qcompiler.compile(
        Block().eval(), batches[0], calibration=batches, target="tvm:cuda:sm_90",
        recipe=load_recipe("fp8", {"rounding": "rtn"}), out=tmp_path / "block",
    )  # fmt: skip
    held = load_file(made.folder / "verify" / "held-out.safetensors")
    wanted = load_file(made.folder / "verify" / "held-out-quantized.safetensors")
    (x,), (want,) = held.values(), wanted.values()
    (got,) = load(made.folder)(x)
    assert (got - want).norm() / want.norm() < limit


def test_prompts_are_read_in_few_runs() -> None:
    """A run more costs more than tokens that are read twice; all are read, the last one last."""
    assert edge_cuda_load.runs(1000, [1, 16, 64, 512]) == [(0, 512), (488, 512)]
    assert edge_cuda_load.runs(528, [1, 16, 64, 512]) == [(0, 512), (512, 16)]
    assert edge_cuda_load.runs(17, [16, 1]) == [(0, 16), (16, 1)]
    assert edge_cuda_load.runs(15, [16, 1]) == [(i, 1) for i in range(15)]
    for count in range(1, 200):
        found = edge_cuda_load.runs(count, [1, 4, 32])
        assert {t for first, size in found for t in range(first, first + size)} == {*range(count)}
        assert sum(found[-1]) == count
