"""Calibration data: every kind of source, its order, and what is said of bad ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qcompiler.calibration import check_finite, load_calibration, split_held_out
from qcompiler.errors import InputError
from qcompiler.spec import Inputs, ModelSpec


class Pair(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


DYNAMIC = {"x": {0: "batch"}, "mask": {0: "batch"}}
SPEC = ModelSpec(
    "pair",
    Pair(),
    {"x": torch.zeros(2, 3), "mask": torch.ones(2, 1, dtype=torch.int64)},
    DYNAMIC,
)
POSITIONAL = replace(SPEC, example_inputs=tuple(SPEC.example_inputs.values()))


def samples(count: int) -> dict[str, Tensor]:
    """Every value of sample i is i, so that order and identity can be read off."""
    x = torch.arange(count, dtype=torch.float32)[:, None].expand(count, 3).contiguous()
    return {"mask": torch.ones(count, 1, dtype=torch.int64), "x": x}


def text_spec(calls: list[list[str]] | None = None) -> ModelSpec:
    """A model whose encoder makes the length of each text its input and logs what it was given."""

    def encode(texts: list[str]) -> Inputs:
        if calls is not None:
            calls.append(texts)
        return {"x": torch.tensor([[float(len(text))] for text in texts])}

    module = nn.Identity()
    return ModelSpec("text", module, {"x": torch.zeros(2, 1)}, {"x": {0: "batch"}}, encode=encode)


def first_column(batches: Iterable[Inputs]) -> list[list[float]]:
    found = []
    for batch in batches:
        found.append((batch["x"] if isinstance(batch, dict) else batch[0])[:, 0].tolist())
    return found


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    match path.suffix:
        case ".npz":
            np.savez(path, **{name: value.numpy() for name, value in tensors.items()})
        case ".safetensors":
            save_file(tensors, path)
        case ".pt":
            torch.save(tensors, path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_tensor_file_is_cut_into_batches_twice_alike(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    write_tensors(path, samples(5))
    batches = load_calibration(str(path), SPEC, 2)
    for _ in range(2):
        read = list(batches())
        assert first_column(read) == [[0, 1], [2, 3], [4]]
        # In the order of the model, not of the file.
        assert all(isinstance(b, dict) and list(b) == ["x", "mask"] for b in read)


def test_positional_models_get_tuples_in_the_order_of_forward(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    write_tensors(path, samples(3))
    batch = next(iter(load_calibration(str(path), POSITIONAL)()))
    assert isinstance(batch, tuple)
    assert [value.dtype for value in batch] == [torch.float32, torch.int64]


def test_a_static_batch_size_wins_and_leaves_the_rest_out(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    write_tensors(path, samples(7))
    static = replace(SPEC, dynamic_shapes={})
    assert first_column(load_calibration(str(path), static, 5)()) == [[0, 1], [2, 3], [4, 5]]
    write_tensors(path, samples(1))
    with pytest.raises(InputError, match=r"no complete batch; give at least 2 sample"):
        load_calibration(str(path), static, 5)


def test_a_pt_file_may_hold_a_list_of_batches(tmp_path: Path) -> None:
    path = tmp_path / "data.pt"
    torch.save([samples(2), samples(3)], path)
    assert first_column(load_calibration(str(path), SPEC)()) == [[0, 1], [0, 1, 2]]


def test_a_pt_file_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "data.pt"
    torch.save(Pair(), path)
    with pytest.raises(InputError, match=r"data.pt: cannot be read .*must hold plain tensors"):
        load_calibration(str(path), SPEC)


def test_texts_are_batched_by_length_and_encoded_one_batch_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("four\n\n  a  \nthree\nbb\nlonger text\n", encoding="utf-8")
    calls: list[list[str]] = []
    batches = load_calibration(str(path), text_spec(calls), 2)
    assert calls == [["a", "bb"]]
    reader = iter(batches())
    next(reader)
    assert len(calls) == 2
    assert first_column(batches()) == [[1, 2], [4, 5], [11]]


def test_jsonl_lines_may_hold_any_unicode(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("one\u2028two", "é", "ab")]
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    calls: list[list[str]] = []
    load_calibration(str(path), text_spec(calls))
    assert calls == [["é", "ab", "one\u2028two"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"\n \n", r"t.txt: holds no text"),
        ("t.txt", b"\xff\xfe\x00", r"t.txt: not UTF-8 text"),
        ("t.jsonl", b'{"text": "a"}\n{"txt": "b"}', r't.jsonl:2: not an object with a "text"'),
        ("t.jsonl", b"nonsense", r"t.jsonl:1: not an object"),
        ("t.jsonl", b'["text"]', r"t.jsonl:1: not an object"),
        ("t.jsonl", b'{"text": 3}', r't.jsonl:1: "text" is not a string'),
        ("t.npz", b"nonsense", r"t.npz: cannot be read"),
        ("t.safetensors", b"nonsense", r"t.safetensors: cannot be read"),
        ("t.csv", b"a,b", r"t.csv: calibration data cannot be read from '.csv'; give .txt"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_calibration(str(tmp_path / name), text_spec())
    assert "\n" not in str(caught.value)


def test_missing_sources() -> None:
    with pytest.raises(InputError, match=r"no/such: no such file or folder; calibration data is"):
        load_calibration("no/such", SPEC)
    with pytest.raises(InputError, match="batch size 0"):
        load_calibration("no/such", SPEC, 0)


def test_texts_need_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a text")
    with pytest.raises(InputError, match="'pair' brings no `encode`"):
        load_calibration(str(tmp_path / "t.txt"), SPEC)


def test_a_failing_encoder_is_reported_with_its_text(tmp_path: Path) -> None:
    def encode(texts: list[str]) -> Inputs:
        raise KeyError(texts[0])

    (tmp_path / "t.txt").write_text("a text")
    with pytest.raises(
        InputError, match=r"encoding 'a text' … raised KeyError: .*test_calibration"
    ):
        load_calibration(str(tmp_path / "t.txt"), replace(text_spec(), encode=encode))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"has the inputs mask, the model takes x, mask"),
        ({"y": torch.zeros(4)}, r"has the inputs mask, x, y, the model takes x, mask"),
        ({"x": torch.zeros(4, 3, dtype=torch.float64)}, r"'x' is torch.float64, the model takes"),
        ({"mask": torch.ones(4, 1, dtype=torch.int32)}, r"save it as torch.int64"),
        ({"mask": torch.ones(3, 1, dtype=torch.int64)}, r"different numbers of samples"),
    ],
)
def test_wrong_tensors(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tensors = {k: v for k, v in {**samples(4), **change}.items() if v is not None}
    write_tensors(tmp_path / "data.safetensors", tensors)
    with pytest.raises(InputError, match=message):
        load_calibration(str(tmp_path / "data.safetensors"), SPEC)


def test_images_come_in_natural_order(tmp_path: Path) -> None:
    for name in ("img10.png", "img9.jpg", "img1.WEBP", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    calls: list[list[str]] = []
    load_calibration(str(tmp_path), text_spec(calls))
    assert [Path(path).name for path in calls[0]] == ["img1.WEBP", "img9.jpg", "img10.png"]


def test_images_are_not_taken_for_texts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    tokens = {"x": torch.zeros(2, 1, dtype=torch.int64)}
    with pytest.raises(InputError, match="images, but 'text' takes integers only"):
        load_calibration(str(tmp_path), replace(text_spec(), example_inputs=tokens))


def test_a_folder_of_tensor_files_gives_one_batch_each(tmp_path: Path) -> None:
    for count in (10, 2):
        write_tensors(tmp_path / f"batch{count}.npz", samples(count))
    batches = load_calibration(str(tmp_path), SPEC, 4)
    assert [len(column) for column in first_column(batches())] == [2, 10]
    write_tensors(tmp_path / "batch10.npz", {"x": torch.zeros(2, 3)})
    with pytest.raises(InputError, match=r"batch10.npz: has the inputs x, the model takes x, mask"):
        list(batches())


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no image .* and no .npz"):
        load_calibration(str(tmp_path), SPEC)
    (tmp_path / "a.png").write_bytes(b"")
    write_tensors(tmp_path / "a.npz", samples(2))
    with pytest.raises(InputError, match="holds images and tensor files"):
        load_calibration(str(tmp_path), SPEC)


FUNCTIONS = """
import torch

def one(i):
    return {"x": torch.full((2, 3), float(i)), "mask": torch.ones(2, 1, dtype=torch.int64)}

def as_list():
    return [one(0), one(1)]

def generator():
    yield one(0)
    yield one(1)

def factory():
    return generator

def tuples():
    return [tuple(one(i).values()) for i in range(2)]

def empty():
    return []

def breaks():
    yield one(0)
    raise RuntimeError("disk gone")

def number():
    return 3

def strings():
    return ["text"]

def single():
    return one(0)

def needs(argument):
    return []
"""


@pytest.mark.parametrize("name", ["as_list", "generator", "factory", "tuples"])
def test_a_function_is_read_twice_alike(name: str, tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(FUNCTIONS)
    batches = load_calibration(f"{tmp_path / 'data.py'}:{name}", SPEC)
    for _ in range(2):
        assert first_column(batches()) == [[0, 0], [1, 1]]


def test_a_function_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calibration_module.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    batches = load_calibration("calibration_module:generator", SPEC)
    assert first_column(batches()) == [[0, 0], [1, 1]]
    monkeypatch.delitem(sys.modules, "calibration_module")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "holds no complete batch"),
        ("number", "the function returned a int; return a list of batches"),
        ("single", "the function returned a dict; return a list of batches"),
        ("strings", "batch 0: a str; a batch is a dict"),
        ("needs", r"the function raised TypeError: needs\(\) missing 1 required"),
        ("absent", "has no 'absent'"),
    ],
)
def test_functions_that_give_no_batches(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(FUNCTIONS)
    with pytest.raises(InputError, match=message):
        load_calibration(f"{tmp_path / 'data.py'}:{name}", SPEC)


def test_a_function_that_breaks_later(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(FUNCTIONS)
    batches = load_calibration(f"{tmp_path / 'data.py'}:breaks", SPEC)
    with pytest.raises(InputError, match=r"raised RuntimeError: disk gone at .*data.py:\d+"):
        list(batches())


def test_check_finite() -> None:
    check_finite(samples(3), "calibration batch 0")
    bad = samples(3)
    bad["x"][1, 2] = float("nan")
    bad["x"][2, 0] = float("-inf")
    with pytest.raises(InputError, match=r"batch 7: input 'x' has 2 NaN or infinite values of 9"):
        check_finite(bad, "calibration batch 7")
    with pytest.raises(InputError, match=r"input '1' has 2"):
        check_finite((bad["mask"], bad["x"]), "calibration batch 7")


@pytest.mark.parametrize(
    ("count", "held"),
    [(0, []), (1, []), (2, [1]), (3, [2]), (4, [3]), (5, [3]), (8, [3, 7]), (10, [3, 7])],
)
def test_every_fourth_batch_is_held_out(count: int, held: list[int]) -> None:
    def batches() -> Iterator[Inputs]:
        return ((torch.tensor([[float(i)]]),) for i in range(count))

    calibration, held_out = split_held_out(batches)
    for _ in range(2):
        assert [int(column[0]) for column in first_column(held_out())] == held
        kept = [int(column[0]) for column in first_column(calibration())]
        assert kept == [i for i in range(count) if i not in held]
