"""Running in stages gives what running at once gives, within its memory budget."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qcompiler.stages import Stages

aten = torch.ops.aten


@pytest.mark.parametrize("budget", [1 << 30, 0])
@pytest.mark.parametrize("name", ["tiny-gqa-decoder", "tiny-attention-block"])
def test_values_are_those_of_a_whole_run(
    name: str, budget: int, tiny: Callable[[str], Any]
) -> None:
    model = tiny(name)
    program, batches = model.normalized, model.batches[:3]
    linears = [n for n in program.exported.graph.nodes if n.target is aten.linear.default]
    expected: list[dict[str, Any]] = [{} for _ in batches]
    for batch, seen in zip(batches, expected, strict=True):
        program.run(batch, lambda node, value, seen=seen: seen.__setitem__(node.name, value))
    with Stages(program, batches, budget) as stages:
        assert len(stages) == 3
        for linear in linears:
            stages.advance(linear)
            source = linear.args[0]
            for value, seen in zip(stages.values(source), expected, strict=True):
                torch.testing.assert_close(value, seen[source.name], rtol=0, atol=0)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """However many this machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("budget", [1 << 30, 2000, 0])
def test_batches_that_run_side_by_side_keep_their_places(
    budget: int, tiny: Callable[[str], Any]
) -> None:
    program = tiny("tiny-mlp").normalized
    batches = [tuple(t + n for t in tiny("tiny-mlp").batches[0]) for n in range(20)]
    first, _, last = (n for n in program.exported.graph.nodes if n.target is aten.linear.default)
    ran: set[int] = set()

    def counted(*args: Any) -> Any:
        ran.add(threading.get_ident())
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        return first.target(*args)

    with Stages(program, batches, budget) as stages:
        stages.functions = {first: counted}
        stages.advance(last)
        assert threading.get_ident() not in ran
        assert torch.get_num_threads() == 3
        for value, batch in zip(stages.values(last.args[0]), batches, strict=True):
            seen: dict[str, Any] = {}
            program.run(batch, lambda node, value, seen=seen: seen.__setitem__(node.name, value))
            torch.testing.assert_close(value, seen[last.args[0].name])


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_one_batch_ends_the_stage(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-mlp").normalized
    first, second, _ = (n for n in program.exported.graph.nodes if n.target is aten.linear.default)

    def failing(*args: Any) -> Any:
        raise ValueError("of one batch")

    with Stages(program, tiny("tiny-mlp").batches * 3) as stages:
        stages.functions = {first: failing}
        with pytest.raises(ValueError, match="of one batch"):
            stages.advance(second)
        assert torch.get_num_threads() == 3


def test_a_replaced_weight_is_used_downstream(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-mlp").normalized
    batches = tiny("tiny-mlp").batches[:2]
    first, second, third = (
        n for n in program.exported.graph.nodes if n.target is aten.linear.default
    )
    weight = program.constants()[first.args[1].name]
    bias = program.constants()[first.args[2].name]
    with Stages(program, batches) as stages:
        stages.advance(first)
        stages.replaced[first] = lambda: 2 * weight
        stages.advance(second)
        for value, (x,) in zip(stages.values(second.args[0]), batches, strict=True):
            wanted = torch.relu(torch.nn.functional.linear(x, 2 * weight, bias))
            torch.testing.assert_close(value, wanted.detach())
        stages.advance(third)
        with pytest.raises(ValueError, match="was passed already"):
            stages.advance(second)


def test_only_what_is_read_later_is_held(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-mlp").normalized
    *_, last = (n for n in program.exported.graph.nodes if n.target is aten.linear.default)
    with Stages(program, tiny("tiny-mlp").batches) as stages:
        stages.advance(last)
        assert [list(held) for held in stages._held] == [[last.args[0]]] * len(stages)


def test_files_go_with_the_stages(tiny: Callable[[str], Any]) -> None:
    program = tiny("tiny-mlp").normalized
    *_, last = (n for n in program.exported.graph.nodes if n.target is aten.linear.default)
    with Stages(program, tiny("tiny-mlp").batches, budget=0) as stages:
        stages.advance(last)
        paths = list(stages._held)
        assert all(path.is_file() for path in paths)
    assert not any(path.exists() for path in paths)


def test_outputs_are_not_held(tiny: Callable[[str], Any]) -> None:
    """A decoder's present keys and values are outputs of every layer."""
    program = tiny("tiny-gqa-decoder").normalized
    *_, last = (n for n in program.exported.graph.nodes if n.target is aten.linear.default)
    outputs = set(program.exported.graph.output_node().all_input_nodes)
    with Stages(program, tiny("tiny-gqa-decoder").batches[:2], outputs=0) as stages:
        stages.advance(last)
        assert all(not outputs & set(held) for held in stages._held)


def test_the_first_output_alone(tiny: Callable[[str], Any]) -> None:
    """Of a decoder the logits: what a divergence counts."""
    model = tiny("tiny-gqa-decoder")
    program, batches = model.normalized, model.batches[:2]
    linears = [n for n in program.exported.graph.nodes if n.target is aten.linear.default]
    with Stages(program, batches, outputs=1) as stages:
        stages.advance(linears[-2])
        for made, batch in zip(stages.outputs(), batches, strict=True):
            (logits,) = made
            torch.testing.assert_close(logits, program.run(batch)[0], rtol=0, atol=0)
