"""Programs as machine code: what the artifact computes, on which sizes, what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner, Result

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from qcompiler.backends import edge, edge_artifact, edge_load
from qcompiler.backends.edge_entries import Weights
from qcompiler.backends.edge_group import Constants
from qcompiler.backends.edge_memory import ALIGN, plan
from qcompiler.backends.edge_ops import Ref, Storage, Weight
from qcompiler.backends.edge_target import host_family, machine
from qcompiler.cli import app
from qcompiler.compiler import quantize
from qcompiler.data import Data
from qcompiler.errors import InputError, UnsupportedError
from qcompiler.models import ZOO
from qcompiler.passes.normalize import normalize
from qcompiler.program import Batch, Program, capture
from qcompiler.recipe import load_recipe
from qcompiler.spec import ModelSpec
from qcompiler.target import Target
from qcompiler.verify import Sqnr

NATIVE = "tvm:native"
TINY = [name for name in ZOO if name.startswith("tiny-")]
# Rounding of float32 alone; a level of an activation that falls the other way would be 40 to 60 dB.
EXACT_DB = 100.0


@pytest.fixture(autouse=True)
def _linker() -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")


def quantized(program: Program, spec: ModelSpec, recipe: str, target: str = NATIVE) -> Program:
    """The program under a recipe; normalized only for "float"."""
    if recipe == "float":
        return normalize(program)
    chosen = load_recipe(recipe)
    data = Data(program, spec, chosen)
    return quantize(program, data, chosen, Target.parse(target), lambda step: None).quantized


def lowered(
    program: Program, spec: ModelSpec, folder: Path, target: str = NATIVE, threads: int = 1,
    **more: Any,
) -> tuple[Callable[..., tuple[Tensor, ...]], edge.Audit]:  # fmt: skip
    folder.mkdir(parents=True)
    audit = edge.lower(
        program, Target.parse(target), folder, dynamic_shapes=spec.dynamic_shapes,
        padding_mask=spec.padding_mask, **more,
    )  # fmt: skip
    return edge.load(folder, threads), audit


def agree(want: Sequence[Any], got: Sequence[Tensor], bound: float = EXACT_DB) -> None:
    for expected, found in zip(want, got, strict=True):
        assert expected.shape == found.shape
        assert expected.dtype == found.dtype
        if not expected.is_floating_point():
            assert torch.equal(expected, found)
            continue
        total = Sqnr()
        total.update(expected, found)
        assert total.db >= bound


def sizes(batch: Batch, spec: ModelSpec) -> dict[str, list[int]]:
    """The batch's own length as the only one to generate code for."""
    names = {n for dims in spec.dynamic_shapes.values() for n in dims.values()}
    return {"sequence": [batch[0].shape[1]]} if "sequence" in names else {}


def whole(batch: Batch, spec: ModelSpec) -> dict[str, list[int]]:
    """The batch's own sizes: one range for all of it, where ranges are taken at run time."""
    return sizes(batch, spec) | {"batch": [len(batch[0])]}


@pytest.mark.parametrize("recipe", ["float", "w8a8"])
@pytest.mark.parametrize("name", TINY)
def test_tiny_models(tiny: Callable[[str], Any], tmp_path: Path, name: str, recipe: str) -> None:
    """The artifact against the program that it was made from, sample by sample."""
    made = tiny(name)
    program = quantized(made.captured, made.spec, recipe)
    batch = made.held_out[0]
    run, audit = lowered(
        program,
        made.spec,
        tmp_path / "a",
        buckets=sizes(batch, made.spec),
    )
    agree(program.run(batch), run(*batch))  # a batch of 4 on code for 1
    if recipe == "w8a8":
        assert "integer" in {layer.kernel for layer in audit.layers}
    else:
        assert {layer.kernel for layer in audit.layers} <= {"float"}


@pytest.mark.parametrize("recipe", ["w8", "w8a8-dynamic"])
@pytest.mark.parametrize("name", ["tiny-post-norm-block", "tiny-depthwise", "tiny-gqa-decoder"])
def test_other_recipes(tiny: Callable[[str], Any], tmp_path: Path, name: str, recipe: str) -> None:
    made = tiny(name)
    program = quantized(made.captured, made.spec, recipe)
    batch = made.held_out[1]
    run, _ = lowered(program, made.spec, tmp_path / "a", buckets=whole(batch, made.spec))
    agree(program.run(batch), run(*batch))


class Network(nn.Module):
    """BatchNorm, both pools, branches that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 20, 3, padding=1, stride=2), nn.BatchNorm2d(20)
        self.left, self.right = nn.Conv2d(20, 7, 1), nn.Conv2d(20, 9, 3, padding=1)
        self.head = nn.Linear(16 * 4, 10)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]  # not None
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = functional.silu(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(functional.avg_pool2d(x, 2).flatten(1))


class Patches(nn.Module):
    """A vision transformer's block: patches, class token, fused qkv, the token taken out again."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 17, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        parts = self.qkv(self.first(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in parts)
        x = x + self.out(
            functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        x = x + self.down(functional.gelu(self.up(self.second(x))))
        return self.head(x[:, 0])


class Spelled(nn.Module):
    """Attention written out, which no pass recognises, with a mask from the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / 24**0.5
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ x


class Results(nn.Module):
    """Several outputs: a view of an input, single numbers, integers, the same value twice."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        return x[:, 1:], total, (x * y).sum(), y.mean(), (x > y).long(), total


class Pools(nn.Module):
    """Windows that overlap, reach over the edge, or have gaps."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            functional.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            functional.avg_pool2d(x, 2, 2, 1),
            functional.max_pool2d(x, (2, 3), 1, (0, 1), 2).relu() + 1,
        )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(21, 33), nn.Tanh(), nn.Linear(33, 1)), ((3, 21),),
    ),
    "convolutions": (Network, ((2, 3, 16, 16),)),
    "patches": (Patches, ((2, 3, 16, 16),)),
    "spelled attention": (Spelled, ((2, 9, 24),)),
    "torch's encoder layer": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), ((2, 7, 32),),
    ),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(6, 10, 3, padding=1), nn.GELU(), nn.Conv1d(10, 4, 5, stride=2)
        ), ((2, 6, 20),),
    ),
    "depthwise, strided": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2), nn.Hardswish(), nn.Conv2d(24, 24, 5, 2, 2, groups=24),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
        ), ((2, 3, 17, 15),),
    ),
    "pools": (Pools, ((2, 20, 9, 9),)),
    "results": (Results, ((3, 20), (3, 20))),
}  # fmt: skip


def general(name: str) -> tuple[Program, ModelSpec, Batch]:
    build, shapes = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build().eval()
        batches = [tuple(torch.randn(*s) for s in shapes) for _ in range(4)]
    spec = ModelSpec(name, module, batches[0], {}, lambda: batches)
    return capture(module, batches[0], {}), spec, batches[1]


@pytest.mark.parametrize("recipe", ["float", "w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_torch(tmp_path: Path, name: str, recipe: str) -> None:
    if recipe == "w8a8-dynamic" and name not in ("torch's encoder layer", "convolutions"):
        pytest.skip("two of them are enough")
    program, spec, batch = general(name)
    program = quantized(program, spec, recipe)
    run, _ = lowered(program, spec, tmp_path / "a")
    agree(program.run(batch), run(*batch))
    if recipe == "float":  # and what the module itself says
        with torch.no_grad():
            want = spec.module(*batch)
        agree(want if isinstance(want, tuple) else (want,), run(*batch))


def test_sizes_that_kernels_cannot_count_are_refused(tmp_path: Path) -> None:
    program = capture(nn.Linear(16, 64), (torch.randn(4, 16),), {"input": {0: "rows"}})
    with pytest.raises(UnsupportedError, match=r"4294967296 numbers at the sizes .*--bucket"):
        edge.lower(
            program, Target.parse("tvm:native"), tmp_path,
            dynamic_shapes={"input": {0: "rows"}}, buckets={"rows": [1 << 26]},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [
        (nn.Sequential(nn.Conv3d(3, 4, 3)), (1, 3, 5, 5, 5), "does not know 'aten.convolution"),
        (nn.Sequential(nn.LocalResponseNorm(3)), (1, 4, 8, 8), "does not know 'aten.avg_pool3d"),
        (
            nn.Sequential(nn.AvgPool2d(2, 2, 1, count_include_pad=False)), (1, 4, 8, 8),
            "a pool whose windows count different numbers",
        ),
    ],
    ids=["three dimensions", "local response", "pool"],
)  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, module: nn.Module, shape: tuple[int, ...], said: str
) -> None:
    """One line that names the op and where it stands."""
    x = torch.randn(shape)
    program = normalize(capture(module.eval(), (x,), {}))
    with pytest.raises(UnsupportedError, match=said) as caught:
        edge.lower(program, Target.parse(NATIVE), tmp_path)
    assert "\n" not in str(caught.value)


def test_padding_is_masked(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """Lengths between the compiled ones: padded up, masked, and cut again."""
    made = tiny("tiny-attention-block")
    program = quantized(made.captured, made.spec, "w8a8")
    run, _ = lowered(program, made.spec, tmp_path / "a", buckets={"sequence": [8, 16]})
    for length in (3, 8, 9, 16):
        ids = torch.arange(length).expand(2, length) + torch.tensor([[1], [7]])
        batch = (ids, torch.ones_like(ids))
        agree(program.run(batch), run(*batch))
    with pytest.raises(InputError, match="sequence=17"):
        run(torch.ones(1, 17, dtype=torch.long), torch.ones(1, 17, dtype=torch.long))


def test_entries_share_their_weights(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    made = tiny("tiny-mlp")
    program = quantized(made.captured, made.spec, "w8a8")
    one, _ = lowered(program, made.spec, tmp_path / "one", buckets={"batch": [4]})
    run, _ = lowered(program, made.spec, tmp_path / "many", buckets={"batch": [1, 4, 7]})
    assert edge_artifact.limits(tmp_path / "many")["entries"] == [{"batch": n} for n in (1, 4, 7)]
    sizes = [(tmp_path / name / "weights.bin").stat().st_size for name in ("one", "many")]
    assert sizes[0] == sizes[1]
    x = torch.randn(14, 32)
    rows = torch.cat([run(part)[0] for part in x.split([7, 4, 1, 1, 1])])
    assert torch.equal(run(x)[0], rows)  # two pieces of 7
    assert torch.equal(one(x[:4])[0], rows[:4])  # the same bits in every entry


def test_a_leading_size_that_is_no_batch(tmp_path: Path) -> None:
    class Between(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.T).softmax(-1) @ x

    x = torch.randn(8, 16)
    program = capture(Between(), (x,), {"x": {0: "tokens"}})
    edge.lower(
        program, Target.parse("tvm:native"), tmp_path, dynamic_shapes={"x": {0: "tokens"}},
        buckets={"tokens": [2, 4]}, tried=(program, (x,)),
    )  # fmt: skip
    run = edge.load(tmp_path, 1)
    torch.testing.assert_close(run(x[:4])[0], Between()(x[:4]), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="fit none"):
        run(x)  # twice four rows give other numbers


def test_integers_behind_one_branch_or_the_other(tmp_path: Path) -> None:
    """PReLU before an integer layer: TVM's analyzer fails on bounds of such values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(32, 32), nn.PReLU(), nn.Linear(32, 8))
        x = torch.randn(64, 32)
    spec = ModelSpec("prelu", module, (x,), {}, lambda: [(x,)])
    program = quantized(capture(module, (x,), {}), spec, "w8a8")
    run, _ = lowered(program, spec, tmp_path / "a")
    total = Sqnr()
    total.update(module(x).detach(), run(x)[0])
    assert total.db > 25


def test_constants_are_told_apart_by_themselves_not_their_ids() -> None:
    weights, constants = Weights(), Constants()
    for value in range(64):  # each gone before the next is made, to which Python gives the same id
        assert (
            weights.place(Storage(torch.float32, 16, torch.full((16,), value + 0.0)))
            == value * ALIGN
        )
    for value in range(64):
        q = torch.tensor([value], dtype=torch.int8)
        weight = Weight(q, torch.ones(1), torch.zeros(1), 0, 0)
        ref = Ref(Storage(torch.float32, 1, weight=weight), torch.float32, 0, (1,), (1,))
        assert constants.known(ref).storage.constant == value


@pytest.mark.parametrize(
    ("buckets", "said"),
    [
        ({"width": [8]}, "the model has no such size; its dynamic sizes are batch"),
        ({"batch": [0, 4]}, "sizes are positive"),
        ({"batch": []}, "sizes are positive"),
    ],
)
def test_sizes_that_make_no_sense(
    tiny: Callable[[str], Any], tmp_path: Path, buckets: Mapping[str, list[int]], said: str
) -> None:
    made = tiny("tiny-mlp")
    with pytest.raises(InputError, match=said):
        lowered(made.normalized, made.spec, tmp_path / "a", buckets=buckets)


def test_sizes_of_a_model_without_any(tmp_path: Path) -> None:
    program, spec, _ = general("mlp")
    with pytest.raises(InputError, match="all its sizes are fixed"):
        lowered(normalize(program), spec, tmp_path / "a", buckets={"batch": [4]})


MACHINES = ["tvm:x86-64-v3", "tvm:x86-64:avx512vnni", "tvm:aarch64", "tvm:aarch64:dotprod"]


@pytest.mark.parametrize("name", ["tiny-attention-block", "tiny-depthwise"])
def test_machines_agree_to_the_bit(tiny: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    """Floats too: every sum has one order, and every machine here has fused multiply-add."""
    made = tiny(name)
    program = quantized(made.captured, made.spec, "w8a8")
    batch = tuple(x[:1] for x in made.held_out[0])
    results = {}
    for target in MACHINES:
        aim = machine(Target.parse(target))
        tool = "cc" if aim.family == host_family() else aim.compiler
        emulated = not aim.here
        if shutil.which(tool) is None or (emulated and shutil.which(aim.qemu[0]) is None):
            continue
        run, _ = lowered(
            program, made.spec, tmp_path / target.replace(":", "-"), target,
            buckets=sizes(batch, made.spec),
        )  # fmt: skip
        results[target] = run(*batch)
    if len(results) < 2:
        pytest.skip("code runs for one machine alone")
    first, *others = results.values()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_threads_give_equal_bits(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    made = tiny("tiny-attention-block")
    program = quantized(made.captured, made.spec, "w8a8-dynamic")
    run, _ = lowered(program, made.spec, tmp_path / "a", buckets={"sequence": [16], "batch": [4]})
    batch = made.held_out[0]
    want = run(*batch)
    for threads in (2, 3):
        assert torch.equal(edge_load.load(tmp_path / "a", threads)(*batch)[0], want[0])


def calls() -> Any:
    """Calls of one to four storages each; a storage lives from its first to its last call."""
    return st.integers(1, 12).flatmap(
        lambda count: st.tuples(
            st.lists(st.integers(0, 3000), min_size=count, max_size=count),
            st.lists(
                st.lists(st.integers(0, count - 1), min_size=1, max_size=4), min_size=1, max_size=9
            ),
            st.sets(st.integers(0, count - 1)),
        )
    )


@settings(deadline=None, max_examples=200, derandomize=True)
@given(calls())
def test_the_memory_plan(drawn: tuple[list[int], list[list[int]], set[int]]) -> None:
    """What lives at the same time never overlaps; the arena is as large as what it holds."""
    lengths, used, elsewhere = drawn
    storages = [Storage(torch.float32, n) for n in lengths]
    made: Any = [SimpleNamespace(arguments=[storages[i] for i in call]) for call in used]
    offsets, size = plan(made, {id(storages[i]) for i in elsewhere})
    placed = {i for call in used for i in call} - elsewhere
    assert set(offsets) == {id(storages[i]) for i in placed}
    spans = []
    for i in placed:
        begin = offsets[id(storages[i])]
        assert begin % ALIGN == 0
        numbers = [n for n, call in enumerate(used) if i in call]
        spans.append((begin, begin + lengths[i] * 4, min(numbers), max(numbers)))
    for number, (low, high, first, last) in enumerate(spans):
        assert high <= size
        for other_low, other_high, begin, end in spans[:number]:
            if begin <= last and first <= end:  # both alive
                assert high <= other_low or other_high <= low


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, torchlib_once: None) -> Path:
    """tiny-mlp, compiled for this machine on the command line."""
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    out = tmp_path_factory.mktemp("edge") / "artifact"
    done = command(
        "compile", "tiny-mlp", "--target", NATIVE, "--recipe", "w8a8", "--out", out,
        "--bucket", "batch=1,4",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_line(compiled: Path) -> None:
    report = (compiled / "report.html").read_text()
    assert "matmul_int8" in report
    for words in (("verify",), ("bench", "--threads", "1"), ("inspect", "--what", "audit")):
        done = command(words[0], compiled, *words[1:])
        assert done.exit_code == 0, done.output
    outputs = compiled.parent / "outputs"
    done = command("run", compiled, "--out", outputs)
    assert done.exit_code == 0, done.output
    assert list(outputs.glob("**/*.np[yz]"))


def test_bucket_is_for_generated_code(tmp_path: Path) -> None:
    done = command(
        "compile", "tiny-mlp", "--target", "ort:cpu", "--out", tmp_path / "a", "--bucket", "batch=4"
    )
    assert done.exit_code == 2
    assert "tvm: targets" in done.stderr


@pytest.mark.parametrize(
    "given",
    [(NATIVE, "w8"), (NATIVE, "mixed", "--latency", "0.5x"),
     ("tvm:armv7", "mixed", "--latency", "0.5x"), ("tvm:cuda:sm_90", "mixed", "--latency", "0.5x")],
)  # fmt: skip
def test_without_tvm(given: tuple[str, ...], tmp_path: Path) -> None:
    """One line that says what to install; nothing is computed first, nothing left behind."""
    code = (
        "import sys; sys.modules['tvm'] = None; sys.argv[0] = 'qcompiler';"
        "from qcompiler.cli import main; sys.exit(main())"
    )
    out = tmp_path / "a"
    done = subprocess.run(
        [sys.executable, "-c", code, "compile", "tiny-mlp", "--out", str(out), "--target", given[0],
         "--recipe", *given[1:]],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "pip install 'qcompiler[tvm]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]
