"""Accepted paths in place: moved on the host as on a device, and the same text either way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import DynamicCache

import specdec
from specdec import cache
from specdec.cache import TreeCache
from test_contract import model_of, plain_text, prompts
from verifiers import tree_attention

NEW_TOKENS = 24
PATHS = {
    "one row": [[0, 3, 7, 8]],
    "several rows": [[0, 2, 5], [0, 1], [], [0, 4, 6, 9]],
    "nothing to move": [[0, 1, 2]],
}


def filled(rows: int, dtype: torch.dtype) -> TreeCache:
    """Two layers of random K/V, 12 committed tokens in each row."""
    prefilled, generator = DynamicCache(), torch.Generator().manual_seed(3)
    for layer in range(2):
        keys, values = torch.randn(2, rows, 2, 12, 4, generator=generator).to(dtype)
        prefilled.update(keys, values, layer)
    made = TreeCache(prefilled, None, 40)
    for layer in made.layers:
        for store in (layer.keys, layer.values):
            store.copy_(torch.randn(store.shape, generator=generator))
    return made


def moved(paths: Sequence[Sequence[int]], on_host: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """All of a cache after the nodes of each path have moved to the slots behind the committed ones."""
    made = filled(len(paths), dtype)
    if on_host:
        moves = [(row, 12 + node, 12 + i) for row, path in enumerate(paths) for i, node in enumerate(path)]
        assert made.move_on_host(moves)
    else:
        longest = max(map(len, paths))
        source = torch.tensor([[12 + n for n in path] + [*range(12 + len(path), 12 + longest)] for path in paths])
        made.move(source, torch.arange(12, 12 + longest).expand(len(paths), -1))
    return [store for layer in made.layers for store in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", PATHS)
def test_moves_on_the_host_are_those_of_a_device(case: str, dtype: torch.dtype) -> None:
    for ours, theirs in zip(moved(PATHS[case], True, dtype), moved(PATHS[case], False, dtype), strict=True):
        assert torch.equal(ours, theirs)


def test_a_slab_that_grew_is_moved_in_its_new_storage() -> None:
    made = filled(1, torch.float32)
    made.reserve(made.capacity + 1)
    before = made.layers[1].values.clone()
    assert made.move_on_host([(0, 15, 13)])
    assert torch.equal(made.layers[1].values[0, :, 13], before[0, :, 15])


@pytest.mark.parametrize("batch", [1, 3])
def test_the_way_of_a_device_gives_the_same_text(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "on_host", lambda _: False)
    monkeypatch.setattr(tree_attention, "on_host", lambda _: False)
    model, moves = model_of("llama"), list[int]()
    move = TreeCache.move

    def counted(self: TreeCache, source: torch.Tensor, target: torch.Tensor) -> None:
        moves.append(1)
        move(self, source, target)

    monkeypatch.setattr(TreeCache, "move", counted)
    specdec.speculate(model, "token_recycling", num_nodes=20)
    try:
        for _ in range(2):  # the second knows the text, so that paths are accepted that lie apart
            text = model.generate(**prompts(batch), max_new_tokens=NEW_TOKENS).tolist()
            assert text == plain_text("llama", batch)
    finally:
        specdec.restore(model)
    assert moves
