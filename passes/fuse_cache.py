"""Join rotary embedding, key-value cache and causal attention into one `qc::cached_attention`.

    k' = cat(past_k, R(p) split(k)),   v' = cat(past_v, split(v))
    merge(sdpa(R(p) split(q), repeat(k'), repeat(v'), mask))  =  cached_attention(q, k, v, …)

with k' and v' outputs of the program. Runtimes have one kernel for the whole, which writes the new
keys and values into the cache in place and never forms the mask.

How a model spells its mask and its rotation is not matched but *evaluated*: the subgraphs are run
on small inputs and compared with the definitions. A mask must be "not padding, not later, and at
most `window` tokens back"; a rotation must turn pairs of channels by an angle that depends on the
position alone (RoPE, Su 2021, equation 34), over all or the first channels, in halves or
interleaved. Its cosines and sines become tables over the model's context.

Refused, the attention then stays as it is: masks that add something else (ALiBi), dropout, keys
that are not a graph input joined with new ones, head sizes that the kernel does not take. Where the
rotation is not recognised (an online Hadamard follows it), it stays outside of the fused op.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler import cached
from qcompiler.op_families import RESHAPES, SDPA, concrete_shape
from qcompiler.rewrite import Draft, evaluate, operand, rewrite

aten = torch.ops.aten
FAR = 1 << 15  # tokens of the past, at most, with which a window is looked for
LOW = -1e4  # what an additive mask has at most where nothing may be read
PROBES = (0, 1, 2, 5, 11)  # positions at which a rotation's matrix is looked at, and the last one


@dataclass(frozen=True)
class Rotation:
    """Tables of a rotary embedding.

    Attributes:
        cos, sin: constants, float32 (positions, pairs).
        positions: the input with the positions.
        interleaved: pairs are neighbours; else one from each half.
    """

    cos: Node
    sin: Node
    positions: Node
    interleaved: bool


Turned = tuple[Node, Node, Rotation]  # query and key before their rotation


@dataclass
class Sizes:
    """The program's inputs, given values of chosen sizes.

    Attributes:
        draft: the program.
        pasts: the inputs that are caches, (batch, heads, past, size) each.
        rotations: those found so far.
        windows: masks found so far.
    """

    draft: Draft
    pasts: set[Node] = field(default_factory=set)
    rotations: list[Rotation] = field(default_factory=list)
    windows: dict[Node, tuple[Node, int] | str] = field(default_factory=dict)

    def inputs(self, batch: int, new: int, past: int) -> dict[Node, Tensor]:
        """Values for the inputs: zeros for integer matrices, NaN for all that is float.

        So that a mask or a rotation which reads an activation is noticed.
        """
        found: dict[Node, Tensor] = {}
        for node in self.draft.graph.nodes:
            if node.op != "placeholder" or self.draft.is_constant(node):
                continue
            value = node.meta["val"]
            if node in self.pasts:
                heads, size = concrete_shape(node)[1], concrete_shape(node)[3]
                # One number seen as many: a far past of all layers would take gigabytes.
                found[node] = torch.full((1, 1, 1, 1), math.nan).expand(batch, heads, past, size)
            elif isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
                found[node] = torch.zeros(batch, new, dtype=value.dtype)
            elif isinstance(value, Tensor) and value.ndim == 3:
                found[node] = torch.full((batch, new, concrete_shape(node)[2]), math.nan)
        return found

    @property
    def matrices(self) -> list[Node]:
        """The inputs that are integer matrices: tokens, their mask, their positions."""
        found = self.inputs(1, 1, 1)
        return [n for n, value in found.items() if value.ndim == 2]

    def compute(self, target: Node, given: Mapping[Node, Tensor]) -> Tensor | None:
        """The value of a node from given ones; None where it depends on something else."""
        values: dict[Node, Any] = dict(given)
        for node in self.cone(target, given):
            if node.op == "placeholder":
                if not self.draft.is_constant(node):
                    return None
                values[node] = self.draft.constant(node)
                continue
            if node.op != "call_function":
                return None
            args = torch.fx.node.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
            try:
                values[node] = evaluate(node, args, kwargs)
            except (
                RuntimeError,
                ValueError,
                TypeError,
                IndexError,
            ):  # sizes that do not go together
                return None
        result = values[target]
        return result if isinstance(result, Tensor) else None

    def cone(self, target: Node, given: Mapping[Node, Tensor]) -> list[Node]:
        """What a node depends on, up to what is given, in order of computation."""
        seen: set[Node] = set()
        queue = [target]
        while queue:
            node = queue.pop()
            if node in seen or node in given:
                continue
            seen.add(node)
            queue += node.all_input_nodes
        return sorted(seen)


@rewrite(exact=True)
def fuse_cache(draft: Draft, context: int, multiple: int = 16) -> None:
    """Replace attentions over a cache by `qc::cached_attention`.

    Args:
        draft: a language model whose caches are inputs and outputs.
        context: positions that the tables hold.
        multiple: head sizes, and channels that are turned, are multiples of this in the runtime's
            kernel.
    """
    nodes = list(draft.calls(SDPA))
    sizes = Sizes(draft)
    for node in nodes:
        sizes.pasts |= {past for i in (1, 2) if (past := _joined(draft, node, i)[0]) is not None}
    rotated = fused = 0
    for node in nodes:
        result = _fuse(draft, node, sizes, context, multiple)
        if isinstance(result, str):
            draft.refuse(node, result)
        else:
            fused += 1
            rotated += result
    if not nodes:
        draft.refuse(draft.graph.output_node(), "its attention is spelled out, not one op")
    if fused:
        draft.note(f"{fused} attentions joined with their caches, {rotated} with their rotation")


def _fuse(draft: Draft, node: Node, sizes: Sizes, context: int, multiple: int) -> str | bool:
    """Fuse one attention; whether its rotation went along, or why not."""
    names = ("attn_mask", "dropout_p", "is_causal")
    options = dict(zip(names, node.args[3:], strict=False)) | dict(node.kwargs)
    mask = options.get("attn_mask")
    if options.get("dropout_p"):
        return "it has dropout"
    past_key, new_key, whole_key = _joined(draft, node, 1)
    past_value, new_value, whole_value = _joined(draft, node, 2)
    if past_key is None or past_value is None:
        return "its keys and values are no cache joined with new ones"
    assert new_key is not None
    assert new_value is not None
    query = operand(node, 0)
    heads, size = concrete_shape(query)[1], concrete_shape(query)[3]
    kv_heads, value_size = concrete_shape(new_value)[1], concrete_shape(new_value)[3]
    if concrete_shape(new_key)[1] != kv_heads or heads % kv_heads or size != value_size:
        return f"{heads} query and {kv_heads} value heads of sizes {size} and {value_size}"
    if size % multiple:
        return f"its head size {size} is no multiple of {multiple}"
    if not isinstance(mask, Node) or options.get("is_causal"):
        return "it has no mask that is computed from the inputs"
    if mask not in sizes.windows:
        # Some models compute a mask of far × far.
        sizes.windows[mask] = _window(sizes, mask, min(FAR, context))
    window = sizes.windows[mask]
    if isinstance(window, str):
        return window
    final = _merged(node)
    if final is None:
        return "its heads are read by something else than their merge"
    turned = _rotation(sizes, query, new_key, context, multiple)
    query, new_key, rotation = turned or (query, new_key, None)
    tables = (rotation.cos, rotation.sin, rotation.positions) if rotation else (None, None, None)
    scale = options.get("scale")
    fused = draft.call(
        cached.cached_attention, *(_flat(draft, n, node) for n in (query, new_key, new_value)),
        past_key, past_value, window[0], *tables, heads, kv_heads,
        1 / math.sqrt(size) if scale is None else scale, window[1],
        rotation.interleaved if rotation else False, before=node,
    )  # fmt: skip
    parts = [draft.call(getitem, fused, index, before=node) for index in range(3)]
    draft.swap(final, parts[0])
    _erase(draft, final)  # what repeats the heads read the caches before the fused op
    for old, part in zip((whole_key, whole_value), parts[1:], strict=True):
        draft.swap(old, part)
        _erase(draft, old)
    return rotation is not None


def _erase(draft: Draft, node: Node) -> None:
    """Remove a call that nothing reads, and those that only it read."""
    if node.users or node.op != "call_function" or node._erased:
        return
    sources = node.all_input_nodes
    draft.graph.erase_node(node)
    for source in sources:
        _erase(draft, source)


def _joined(draft: Draft, node: Node, index: int) -> tuple[Node | None, Node | None, Node]:
    """Past and new keys (or values) of an attention and their join, (batch, heads, …, size)."""
    whole = _before_repeat(operand(node, index))
    if whole.target is aten.cat.default and operand(whole, 1) in (2, -2):
        parts = list(operand(whole, 0))
        if len(parts) == 2:
            past, new = parts
            if past.op == "placeholder" and not draft.is_constant(past):
                return past, new, whole
    return None, None, whole


def _before_repeat(node: Node) -> Node:
    """The keys or values before their heads are repeated for the queries."""
    if node.target is aten.repeat_interleave.self_int and operand(node, 2) in (1, -3):
        return operand(node, 0)  # type: ignore[no-any-return]
    wide = operand(node, 0) if node.target in RESHAPES else None
    if isinstance(wide, Node) and wide.target is aten.expand.default:
        single = operand(wide, 0)
        if single.target is aten.unsqueeze.default and operand(single, 1) in (2, -3):
            sizes, joined = concrete_shape(wide), concrete_shape(node)
            if len(sizes) == 5 and joined[1] == sizes[1] * sizes[2]:
                return operand(single, 0)  # type: ignore[no-any-return]
    return node


def _is_swap(node: Any) -> bool:
    """Whether the node exchanges heads and sequence."""
    if not isinstance(node, Node) or node.target not in (aten.transpose.int, aten.permute.default):
        return False
    if node.target is aten.permute.default:
        return list(operand(node, 1)) == [0, 2, 1, 3]
    return sorted(int(operand(node, i)) % 4 for i in (1, 2)) == [1, 2]


def _merged(node: Node) -> Node | None:
    """The (batch, sequence, channels) tensor that the attention's heads become."""
    current = node
    turned = False
    while len(current.users) == 1:
        current = next(iter(current.users))
        if _is_swap(current) and not turned:
            turned = True
        elif current.target in RESHAPES and current.meta["val"].ndim == 3:
            return current if turned else None
        elif current.target in RESHAPES and not turned:
            if concrete_shape(current) != concrete_shape(node):
                return None
        elif current.target not in (aten.contiguous.default, aten.clone.default):
            return None
    return None


def _flat(draft: Draft, node: Node, before: Node) -> Node:
    """(batch, heads, sequence, size) → (batch, sequence, channels); a split is undone."""
    if _is_swap(node):
        split = operand(node, 0)
        if split.target in RESHAPES and operand(split, 0).meta["val"].ndim == 3:
            return operand(split, 0)  # type: ignore[no-any-return]
    else:
        split = draft.call(aten.transpose.int, node, 1, 2, before=before)
    return draft.call(aten.flatten.using_ints, split, 2, before=before)


def _window(sizes: Sizes, mask: Node, most: int) -> tuple[Node, int] | str:
    """The padding input that a mask reads and its window (−1: none), or why it is another mask."""
    for candidate in sizes.matrices:
        far = _allowed(sizes, mask, candidate, torch.ones(1, most + 1), 1)
        if far is None:
            continue
        seen = int(far.sum())
        window = -1 if seen == most + 1 else seen
        past = 4 if window < 0 else window + 2
        padding = torch.ones(3, past + 3)
        padding[1, -2:], padding[2, :3] = 0, 0  # behind and before the text
        got = _allowed(sizes, mask, candidate, padding, 3)
        if got is not None and torch.equal(got, cached.visible(padding, 3, window)):
            return candidate, window
    return "its mask is not that of a causal language model with padding"


def _allowed(sizes: Sizes, mask: Node, candidate: Node, padding: Tensor, new: int) -> Tensor | None:
    """What the mask lets each of `new` queries read, bool (batch, 1, new, total)."""
    batch, total = padding.shape
    given = sizes.inputs(batch, new, total - new)
    given[candidate] = padding.to(candidate.meta["val"].dtype)
    value = sizes.compute(mask, given)
    if value is None or value.ndim != 4 or value.shape[-2:] != (new, total):
        return None
    if value.dtype != torch.bool:
        if not bool(((value == 0) | (value <= LOW)).all()):
            return None
        value = value == 0
    return value.expand(batch, -1, -1, -1)[:, :1] if value.shape[1] == 1 else None


def _rotation(sizes: Sizes, query: Node, key: Node, context: int, multiple: int) -> Turned | None:
    """The rotation of both, if it is one and the same."""
    found = [_turned(sizes, node, context, multiple) for node in (query, key)]
    if found[0] is None or found[1] is None or found[0][1] is not found[1][1]:
        return None
    return found[0][0], found[1][0], found[0][1]


def _turned(sizes: Sizes, node: Node, context: int, multiple: int) -> tuple[Node, Rotation] | None:
    """The tensor of which `node` is a rotation, the earliest one."""
    shape = concrete_shape(node)
    for start in sizes.cone(node, {}):
        value = start.meta.get("val")
        if start is node or not isinstance(value, Tensor) or concrete_shape(start) != shape:
            continue
        rotation = _rotation_of(sizes, node, start, context, multiple)
        if rotation is not None:
            return start, rotation
    return None


def _rotation_of(
    sizes: Sizes, node: Node, start: Node, context: int, multiple: int
) -> Rotation | None:
    size, heads = concrete_shape(node)[3], concrete_shape(node)[1]
    probes = torch.tensor([*PROBES, context - 1])
    for candidate in sizes.matrices:
        basis = torch.eye(size)[:, None, None].expand(size, heads, len(probes), size)
        given = sizes.inputs(size, len(probes), 0)
        given[candidate] = probes.expand(size, -1).to(candidate.meta["val"].dtype)
        turned = sizes.compute(node, {**given, start: basis})
        if turned is None or turned.shape != basis.shape:
            continue
        matrices = turned[:, 0].permute(1, 2, 0)  # (probes, out, in)
        form = _form(matrices)
        if form is None or not torch.equal(turned, turned[:, :1].expand_as(turned)):
            continue
        pairs, interleaved = form
        if 2 * pairs % multiple:
            continue
        tables = _tables(sizes, node, start, candidate, context, form)
        if tables is None:
            continue
        rotation = _shared(sizes, *tables, candidate, interleaved)
        cos, sin = (sizes.draft.constant(t)[probes] for t in (rotation.cos, rotation.sin))
        expected = cached.turn(basis[:, :1], cos, sin, interleaved)
        if pairs == cos.shape[1] and torch.allclose(expected, turned[:, :1], atol=1e-6):
            return rotation
    return None


def _shared(sizes: Sizes, cos: Tensor, sin: Tensor, positions: Node, interleaved: bool) -> Rotation:
    """A rotation by these tables, one for all layers that have the same."""
    draft = sizes.draft
    for known in sizes.rotations:
        same = (known.positions, known.interleaved) == (positions, interleaved)
        if same and all(
            torch.equal(draft.constant(a), b) for a, b in ((known.cos, cos), (known.sin, sin))
        ):
            return known
    nodes = [draft.add_constant(n, t) for n, t in (("rotary_cos", cos), ("rotary_sin", sin))]
    sizes.rotations.append(Rotation(nodes[0], nodes[1], positions, interleaved))
    return sizes.rotations[-1]


def _form(matrices: Tensor) -> tuple[int, bool] | None:
    """Number of pairs and whether they are interleaved, from (positions, out, in) matrices."""
    size = matrices.shape[-1]
    moved = ~torch.isclose(matrices, torch.eye(size)).all(0)
    channels = moved.any(0) | moved.any(1)
    count = int(channels.sum())
    if not count or count % 2 or not bool(channels[:count].all()):
        return None
    for interleaved in (False, True):
        first, second = _pairs(count // 2, interleaved)
        allowed = torch.eye(size, dtype=torch.bool)
        allowed[first, second] = allowed[second, first] = True
        if bool((matrices[:, ~allowed] == 0).all()):
            return count // 2, interleaved
    return None


def _pairs(count: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second channel of each pair."""
    index = torch.arange(count)
    return (2 * index, 2 * index + 1) if interleaved else (index, index + count)


def _tables(
    sizes: Sizes, node: Node, start: Node, positions: Node, context: int, form: tuple[int, bool]
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines over the context: what the first channels of each pair become."""
    first, second = _pairs(*form)
    heads, size = concrete_shape(node)[1], concrete_shape(node)[3]
    one = torch.zeros(1, heads, context, size)
    one[..., first] = 1.0
    given = sizes.inputs(1, context, 0)
    given[positions] = torch.arange(context)[None].to(positions.meta["val"].dtype)
    turned = sizes.compute(node, {**given, start: one})
    if turned is None:
        return None
    row = turned[0, 0]
    return row[:, first].contiguous(), row[:, second].contiguous()
