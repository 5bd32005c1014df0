"""The kernels against their definitions, and these against a softmax written out: in Triton's interpreter, or on a GPU.

The interpreter runs programs one after the other and knows no bfloat16: races and bfloat16 are for the tests marked
``gpu``. Shapes: B rows, n nodes of a pass, N nodes, P_b committed tokens, Hq and Hkv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

pytest.importorskip("triton", reason="the kernels need Triton (extra 'kernels')")

from specdec.cache import TreeCache
from specdec.tree import Topology, chain
from specdec.visibility import CHUNKED, FULL, SLIDING, AttentionKinds, packed_masks, packed_visibility
from test_attention import random_topology
from verifiers.kernels import compaction, plain, tree_attention
from verifiers.kernels.backend import TritonAttention
from verifiers.kernels.tree_attention import Launch, num_splits

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAN = float("nan")


class Case(NamedTuple):
    """What attention is given; ``dense`` says what is to come out."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    scaling: float = 0.3

    def dense(self, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
        """The definition once more, row by row and head by head in float64."""
        visible = packed_visibility(self.mask, self.key.shape[2])
        batch, heads, nodes, dim = self.query.shape
        shared = heads // self.key.shape[1]
        result = torch.zeros(batch, nodes, heads, dim, dtype=torch.float64)
        for row in range(batch):
            for head in range(heads):
                for node in range(nodes):
                    seen = visible[row, node].cpu()
                    keys = self.key[row, head // shared].cpu().double()[seen]
                    scores = keys @ self.query[row, head, node].cpu().double() * self.scaling
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sinks is not None:
                        scores = torch.cat([scores, sinks[head].cpu().double()[None]])
                    values = self.value[row, head // shared].cpu().double()[seen]
                    result[row, node, head] = scores.softmax(0)[: len(keys)] @ values
        return result

    def poisoned(self) -> Case:
        """With NaN in every slot that no node sees."""
        unseen = ~packed_visibility(self.mask, self.key.shape[2]).any(1)[:, None, :, None]
        return self._replace(key=self.key.masked_fill(unseen, NAN), value=self.value.masked_fill(unseen, NAN))


def case(
    lengths: Sequence[int] = (37, 5),
    nodes: int = 6,
    heads: tuple[int, int] = (2, 1),
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    kind: tuple[str, int] = (FULL, 0),
    part: slice | None = None,
    room: int = 9,
    topology: Topology | None = None,
) -> Case:
    """Random numbers; ``room`` slots lie behind the nodes of the longest row."""
    device = torch.device("cpu" if tree_attention.INTERPRETED else "cuda")
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + nodes * 10 + dim)
    topology = random_topology(nodes, len(lengths)) if topology is None else topology
    part = part or slice(0, nodes)
    mask = packed_masks(AttentionKinds(dict([kind]), False), topology.to(device), part, lengths)
    slots = max(lengths) + part.stop + room

    def numbers(count: int, length: int) -> Tensor:
        return torch.randn(len(lengths), count, length, dim, generator=generator).to(device, dtype)

    return Case(numbers(heads[0], part.stop - part.start), numbers(heads[1], slots), numbers(heads[1], slots), mask)


def check(
    given: Case,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    splits: int | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Kernel and definition agree with the dense softmax; returns what the kernel said."""
    expected = given.dense(softcap, sinks)
    defined = plain.tree_attention(*given, softcap=softcap, sinks=sinks)
    got = tree_attention.tree_attention(*given, softcap=softcap, sinks=sinks, splits=splits, launch=launch)
    assert got.dtype == defined.dtype == given.query.dtype
    assert got.shape == defined.shape == expected.shape
    bound = TOLERANCE[given.query.dtype] * max(1.0, softcap)
    for result in (got, defined):
        assert float((result.cpu().double() - expected).abs().max()) <= bound
    return got


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_head_size(dim: int, dtype: torch.dtype) -> None:
    given = case((37,), dim=dim, dtype=dtype)
    check(given._replace(scaling=dim**-0.5))


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (7, 1), (10, 2)], ids=["all their own", "one", "seven", "five"])
def test_heads_that_share_keys(heads: tuple[int, int]) -> None:
    check(case(heads=heads))


@pytest.mark.parametrize("lengths", [(0,), (0, 3, 70), (1,), (64,), (65,), (127, 128)])
def test_committed_tokens_of_any_number(lengths: tuple[int, ...]) -> None:
    check(case(lengths))


@pytest.mark.parametrize("nodes", [1, 2, 33, 64, 65, 130])
def test_trees_of_any_size(nodes: int) -> None:
    check(case((11,), nodes, heads=(1, 1), dim=16))


@pytest.mark.parametrize("part", [slice(0, 4), slice(4, 5), slice(60, 70)])
def test_a_stretch_of_a_tree(part: slice) -> None:
    check(case((11, 3), 70, dim=16, part=part))


@pytest.mark.parametrize("kind", [(SLIDING, 3), (SLIDING, 20), (SLIDING, 500), (CHUNKED, 4), (CHUNKED, 32)])
def test_windows_and_chunks(kind: tuple[str, int]) -> None:
    given = case((90, 7), kind=kind)
    check(given, splits=2)


def test_a_window_narrower_than_the_tree_is_deep() -> None:
    check(case((70, 2), 9, kind=(SLIDING, 4), topology=chain(9)))


@pytest.mark.parametrize(
    ("splits", "launch"),
    [
        (1, Launch(16, 16, 4, 2)),
        (2, Launch(16, 64, 4, 2)),
        (5, Launch(32, 32, 4, 2)),
        (9, Launch(16, 16, 4, 2)),
        (9, Launch(32, 64, 4, 2)),
    ],
)
def test_splits_and_tiles_change_nothing(splits: int, launch: Launch) -> None:
    """Nine splits of 70 slots leave some of them empty; 24 packed rows take two tiles of 16."""
    check(case((70,), 12, dim=16), splits=splits, launch=launch)


def test_softcap() -> None:
    given = case((40, 3))._replace(scaling=2.0)  # scores far beyond the cap
    got = check(given, softcap=5.0)
    assert float((got - tree_attention.tree_attention(*given)).abs().max()) > 0.1


def test_sinks() -> None:
    given = case((40,), heads=(4, 2))
    sinks = torch.tensor([-30.0, 0.0, 2.0, 40.0], device=given.query.device)
    got = check(given, sinks=sinks)
    assert float(got[:, :, 3].abs().max()) < 1e-6, "a sink that outweighs all keys leaves nothing"


def test_the_scaling_is_the_one_given() -> None:
    check(case((20,))._replace(scaling=1.7))


@pytest.mark.parametrize("kind", [(FULL, 0), (SLIDING, 20)], ids=["full", "window"])
def test_what_no_node_sees_does_not_leak(kind: tuple[str, int]) -> None:
    """NaN behind the nodes, in the longer row's slots, and below the window."""
    given = case((90, 7), kind=kind)
    clean = tree_attention.tree_attention(*given, splits=2)
    got = tree_attention.tree_attention(*given.poisoned(), splits=2)
    assert torch.equal(got, clean)
    assert torch.equal(plain.tree_attention(*given.poisoned()), plain.tree_attention(*given))


def test_the_last_slot_may_be_taken() -> None:
    check(case((58,), 6, room=0))


def test_a_node_that_sees_nothing_is_finite() -> None:
    given = case((0,), 4)
    given.mask[:, :, 2, 3:] = 0
    for attend in (tree_attention.tree_attention, plain.tree_attention):
        got = attend(*given)
        assert bool(got.isfinite().all())
        assert not got[:, 2].any()
        assert got[:, 3].any()


def test_strides_of_keys_and_values_may_differ() -> None:
    """Views of a slab, values as [B, S, H, D] underneath, and queries as the projection leaves them."""
    given = case((37, 5), heads=(4, 2))
    slab = torch.full((3, 2, 2, 128, 32), NAN, device=given.key.device)
    slab[1, :, :, : given.key.shape[2]] = given.key
    key = slab[1][:, :, : given.key.shape[2]]
    value = given.value.transpose(1, 2).contiguous().transpose(1, 2)
    query = given.query.transpose(1, 2).contiguous().transpose(1, 2)
    expected = tree_attention.tree_attention(*given)
    assert torch.equal(tree_attention.tree_attention(query, key, value, *given[3:]), expected)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    topology = random_topology(6)
    together = case((37, 5), topology=topology)
    result = tree_attention.tree_attention(*together, splits=2)
    for row, length in enumerate((37, 5)):
        query, key, value, mask = (tensor[row : row + 1] for tensor in together[:4])
        alone = Case(query, key, value, mask, together.scaling)
        assert int(alone.mask[0, 0, 0, 0]) == length
        assert torch.equal(tree_attention.tree_attention(*alone, splits=2), result[row : row + 1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float64}, "float32, float16 or bfloat16"),
        ({"dim": 257}, "up to 256"),
        ({"heads": (3, 2)}, "Hq a multiple of Hkv"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tree_attention.tree_attention(*case((3,), **change))  # type: ignore[arg-type]


def test_the_compiler_sees_one_operation() -> None:
    given = case((9,), 3, dim=16)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return tree_attention.tree_attention(query * 2, key, value, mask, 0.3) + 1

    expected = attend(*given[:4])
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given[:4]), expected)
    arguments = (*given, 0.0, None, None)
    torch.library.opcheck(tree_attention._op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("programs", "rows", "span", "units", "expected"),
    [
        (8, 4, 32768, 132, 25),  # one node, 8 key heads: a wave and a half
        (8, 64, 32768, 132, 25),
        (16, 256, 8192, 132, 8),  # partial results would outweigh the keys
        (8, 4, 300, 132, 2),  # too short to be split further
        (512, 64, 32768, 132, 1),  # a batch fills the device by itself
        (1, 1, 10**6, 132, 32),
        (8, 64, 0, 132, 1),
    ],
)
def test_number_of_splits(programs: int, rows: int, span: int, units: int, expected: int) -> None:
    assert num_splits(programs, rows, span, units) == expected


class Slab(NamedTuple):
    """``[groups, B, heads, slots, dim]`` of a dtype."""

    groups: int
    heads: int
    dim: int
    dtype: torch.dtype = torch.float16
    slots: int = 160

    def numbers(self, batch: int, generator: torch.Generator) -> Tensor:
        size = (self.groups, batch, self.heads, self.slots, self.dim)
        return torch.randn(size, generator=generator).to(device_of_kernels(), self.dtype)


def device_of_kernels() -> torch.device:
    return torch.device("cpu" if tree_attention.INTERPRETED else "cuda")


def moved(path: Sequence[Sequence[int]], lengths: Sequence[int], *slabs: Slab) -> tuple[list[Tensor], Tensor, Tensor]:
    """Slabs of random numbers, and the move of each row's path to the slots behind its committed tokens."""
    generator, device = torch.Generator().manual_seed(len(slabs)), device_of_kernels()
    source = torch.tensor([[length + node for node in row] for row, length in zip(path, lengths, strict=True)])
    target = torch.tensor([[length + node for node in range(len(path[0]))] for length in lengths])
    return [slab.numbers(len(lengths), generator) for slab in slabs], source.to(device), target.to(device)


def check_move(storages: list[Tensor], source: Tensor, target: Tensor) -> bool:
    """Kernel and definition leave what a copy row by row leaves; whether anything moved."""
    expected = [storage.clone() for storage in storages]
    for storage, old in zip(expected, storages, strict=True):
        for row in range(storage.shape[1]):
            storage[:, row, :, target[row]] = old[:, row, :, source[row]]
    for move in (plain.move, lambda slabs, *path: compaction.move(compaction.table_of(slabs), *path)):
        got = [storage.clone() for storage in storages]
        move(got, source, target)
        assert all(map(torch.equal, got, expected))
    return not all(map(torch.equal, storages, expected))


PATHS = {
    "one slot": ([[3]], [5]),
    "ragged, padded with moves onto themselves": ([[0, 2, 5], [1, 1, 2]], [7, 90]),
    "overlapping": ([[1, 2, 3, 4, 5, 6, 7]], [30]),
    "nothing moves": ([[0, 1, 2, 3]], [30]),
    "long": ([[2 * node for node in range(64)]], [20]),
}


@pytest.mark.parametrize("dim", [16, 80])
@pytest.mark.parametrize("path", PATHS)
def test_move_is_its_definition(path: str, dim: int) -> None:
    storages, source, target = moved(*PATHS[path], Slab(4, 2, dim))
    if path == "ragged, padded with moves onto themselves":
        target[1, 0] = 91  # slots 91, 91, 92 -> 91, 91, 92: what is written twice is the same
    assert check_move(storages, source, target) == (path != "nothing moves")


UNLIKE = {
    "a slab for every layer": ([Slab(1, 2, 16)] * 6, 4, True),
    "head numbers": ([Slab(1, 1, 32), Slab(3, 4, 32), Slab(2, 2, 32)], 4, True),
    "head sizes": ([Slab(2, 2, 64), Slab(2, 2, 8), Slab(1, 2, 72)], 4, True),
    "sizes that fill no whole access": ([Slab(2, 2, 64), Slab(1, 2, 6)], 4, False),
    "dtypes": ([Slab(1, 2, 16, torch.float32), Slab(1, 2, 16, torch.bfloat16), Slab(1, 2, 16, torch.float64)], 4, True),
    "an odd number of halves": ([Slab(1, 2, 5), Slab(1, 2, 16)], 2, False),
    "bytes": ([Slab(1, 2, 7, torch.int8), Slab(1, 2, 16)], 1, False),
    "slots": ([Slab(1, 2, 16, slots=160), Slab(2, 2, 16, slots=224)], 4, True),
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_slabs_that_differ_are_moved_in_one_launch(unlike: str) -> None:
    slabs, word, whole = UNLIKE[unlike]
    storages, source, target = moved([[0, 2, 5], [3, 4, 9]], [7, 90], *slabs)
    table = compaction.table_of(storages)
    assert (table.word_bytes, table.whole, table.entries.shape) == (word, whole, (len(slabs), 5))
    assert check_move(storages, source, target)


def test_bits_that_are_no_numbers_are_moved_as_they_are() -> None:
    """A NaN with a payload stays that NaN."""
    storages, source, target = moved([[3]], [5], Slab(1, 1, 16, torch.float32))
    bits = torch.arange(0x7FC00001, 0x7FC00011, dtype=torch.int32, device=source.device)
    storages[0][0, 0, 0, 8] = bits.view(torch.float32)
    compaction.move(compaction.table_of(storages), source, target)
    assert torch.equal(storages[0][0, 0, 0, 5].view(torch.int32), bits)


@pytest.mark.parametrize("for_graphs", [False, True])
def test_a_cache_is_moved_in_one_launch_however_it_is_cut(for_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after its slabs have grown, and by the same backend when another request's cache comes."""
    launches = list[int]()
    launch = compaction.move

    def counted(*args: Any) -> None:
        launches.append(len(args[0].entries))
        launch(*args)

    monkeypatch.setattr(compaction, "move", counted)
    backend = TritonAttention()
    backend._kernel, backend._compaction = tree_attention, compaction
    source, target = torch.tensor([[9, 12], [8, 9]]), torch.tensor([[8, 9], [8, 9]])
    for seed in range(2):
        made, expected = cut_cache(for_graphs, seed), cut_cache(for_graphs, seed)
        made.mover = backend.move
        for rounds in range(2):
            made.move(source, target)
            expected.move(source, target)
            for layer, other in zip(made.layers, expected.layers, strict=True):
                assert torch.equal(layer.keys, other.keys)
                assert torch.equal(layer.values, other.values)
            if rounds == 0:
                made.reserve(made.capacity + 1)
                expected.reserve(expected.capacity + 1)
    assert launches == [6 if for_graphs else 2] * 4  # keys and values differ in size


def cut_cache(for_graphs: bool, seed: int) -> TreeCache:
    """Three layers, two rows of 8 committed tokens, random numbers; keys of another head size than values."""
    generator, prefilled = torch.Generator().manual_seed(seed), DynamicCache()
    for layer in range(3):
        keys, values = (torch.zeros(2, 2, 8, size, device=device_of_kernels()) for size in (16, 24))
        prefilled.update(keys, values, layer)
    made = TreeCache(prefilled, None, 40, for_graphs=for_graphs)
    for entry in made.layers:
        for store in (entry.keys, entry.values):
            store.copy_(torch.randn(store.shape, generator=generator))
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("nodes", [1, 8, 16, 64])
def test_every_tile_on_a_gpu(nodes: int, dtype: torch.dtype, dim: int) -> None:
    """4, 32, 64 and 256 packed rows: every line of the launch table."""
    for lengths in ((700,), (0, 1300, 65)):
        given = case(lengths, nodes, heads=(8, 2), dim=dim, dtype=dtype)._replace(scaling=dim**-0.5)
        check(given)
        clean, poisoned = (tree_attention.tree_attention(*c) for c in (given, given.poisoned()))
        assert torch.equal(clean, poisoned)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [(SLIDING, 100), (CHUNKED, 256)])
def test_windows_on_a_gpu(kind: tuple[str, int]) -> None:
    check(case((700, 31), 32, heads=(8, 2), dim=128, dtype=torch.bfloat16, kind=kind)._replace(scaling=0.09))


@pytest.mark.gpu
def test_a_graph_is_replayed_while_the_text_grows() -> None:
    """One capture, other committed lengths and other trees in the same buffers."""
    given = case((2000, 900), 32, heads=(8, 2), dim=128, dtype=torch.bfloat16)._replace(scaling=0.09)
    tree_attention.tree_attention(*given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = tree_attention.tree_attention(*given)
    for lengths, seed in (((2000, 900), 0), ((1999, 0), 1), ((64, 1500), 2)):
        topology = random_topology(32, 2, seed).to(given.mask.device)
        given.mask.copy_(packed_masks(AttentionKinds({FULL: 0}, False), topology, slice(0, 32), lengths))
        graph.replay()
        assert torch.equal(result, tree_attention.tree_attention(*given))
        assert float((result.cpu().double() - given.dense()).abs().max()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_many_moves_on_a_gpu(dtype: torch.dtype) -> None:
    """Races would show: paths that overlap their own targets, over and over, in many programs."""
    generator = torch.Generator().manual_seed(0)
    slabs = [Slab(1, 2, 128, dtype), Slab(3, 4, 64, dtype), Slab(1, 2, 128, torch.float16)]
    for _ in range(50):
        nodes = torch.randperm(60, generator=generator)[:30].sort().values.tolist()
        assert check_move(*moved([nodes, nodes], [10, 70], *slabs))
