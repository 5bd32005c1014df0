"""Acceptance rules against a slow walk, node by node, on random trees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec import tree as tree_module
from specdec.tree import CANDIDATE, FEED_ONLY, PADDING, TokenTree, Topology, chain, root_only
from verifiers import acceptance
from verifiers.acceptance import Greedy, TargetSampling, follow

VOCAB = 3


def random_tree(seed: int, batch: int = 3, shared: bool = False, roles: bool = True) -> TokenTree:
    """Distinct sibling candidates; other roles may repeat their tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 20, (1,), generator=generator))
    shapes: list[list[int]] = []
    tokens, kinds = [], []
    for row in range(batch):
        parents, token, role = [0], [0], [CANDIDATE]
        for node in range(1, count):
            parents.append(int(torch.randint(node, (1,), generator=generator)))
            token.append(int(torch.randint(VOCAB, (1,), generator=generator)))
            kind = int(torch.randint(8, (1,), generator=generator))
            role.append((FEED_ONLY, PADDING)[kind] if kind < 2 else CANDIDATE)
        if shared and row:
            parents = shapes[0]
        taken: set[tuple[int, int]] = set()
        for node in range(1, count):
            if not roles:
                role[node] = CANDIDATE
            if role[node] == CANDIDATE and (parents[node], token[node]) in taken:
                role[node] = PADDING
            if role[node] == CANDIDATE:
                taken.add((parents[node], token[node]))
        shapes.append(parents)
        tokens.append(token)
        kinds.append(role)
    depth = max(max(depths_of(parents)) for parents in shapes)
    topology = Topology(torch.tensor(shapes[:1] if shared else shapes), depth)
    role_tensor = torch.tensor(kinds)
    tree = TokenTree(torch.tensor(tokens), topology, None if bool((role_tensor == CANDIDATE).all()) else role_tensor)
    tree.check()
    return tree


def depths_of(parents: list[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def slow_walk(tree: TokenTree, row: int, chosen: list[int]) -> tuple[list[int], list[int]]:
    """By the definition: the nodes visited, and the token emitted after each of them."""
    parents, tokens = tree.parents[row].tolist(), tree.token_ids[row].tolist()
    roles = [CANDIDATE] * tree.num_nodes if tree.role is None else tree.role[row].tolist()
    path = [0]
    while True:
        wanted = chosen[path[-1]]
        children = [n for n in range(1, tree.num_nodes) if parents[n] == path[-1] and roles[n] == CANDIDATE]
        following = [child for child in children if tokens[child] == wanted]
        if not following:
            return path, [chosen[node] for node in path]
        path.append(following[0])


def assert_walk(tree: TokenTree, path: Tensor, tokens: Tensor, chosen: Tensor) -> int:
    """Compare with the slow walk; returns the longest path."""
    longest = 0
    assert path.shape == tokens.shape == (tree.batch_size, tree.topology.max_depth + 1)
    for row in range(tree.batch_size):
        nodes, emitted = slow_walk(tree, row, chosen[row].tolist())
        filled = nodes + [-1] * (path.shape[1] - len(nodes))
        assert path[row].tolist() == filled
        assert tokens[row, : len(nodes)].tolist() == emitted
        longest = max(longest, len(nodes))
    return longest


@pytest.fixture(params=["on the host", "on a device"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, by look-ups and numpy; and as on an accelerator, by torch alone."""
    for module in (acceptance, tree_module):
        monkeypatch.setattr(module, "on_host", lambda _: request.param == "on the host")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("roles", [False, True])
def test_follow(shared: bool, roles: bool) -> None:
    longest = 0
    for seed in range(30):
        tree = random_tree(seed, shared=shared, roles=roles)
        chosen = torch.randint(VOCAB, tree.token_ids.shape, generator=torch.Generator().manual_seed(seed))
        walk = follow(tree, chosen)
        longest = max(longest, assert_walk(tree, walk.path, walk.tokens, chosen))
    assert longest > 2, "the walks go somewhere"


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    for seed in range(30):
        tree = random_tree(seed)
        # Few distinct values, so that most nodes have a tie, as plain argmax breaks it.
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(2, (*tree.token_ids.shape, VOCAB), generator=generator).float()
        walk = Greedy().accept(tree, scores, None)
        first = torch.tensor([[row.index(max(row)) for row in rows] for rows in scores.tolist()])
        assert_walk(tree, walk.path, walk.tokens, first)


def slow_draw(scores: list[float], uniform: float) -> int:
    """Inverse CDF in token order, token by token."""
    p = torch.tensor(scores).softmax(-1).double()
    bar, total = uniform * float(p.sum()), 0.0
    for token, value in enumerate(p.tolist()):
        total += value
        if bar < total:
            return token
    raise AssertionError("the sum is above every uniform below one")


def test_target_sampling_draws_by_depth() -> None:
    longest = 0
    for seed in range(25):
        tree = random_tree(seed)
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(*tree.token_ids.shape, VOCAB, generator=generator)
        scores[torch.rand(scores.shape, generator=generator) < 0.3] = -torch.inf
        scores[..., seed % VOCAB] = 0.0
        uniforms = torch.rand(tree.batch_size, tree.topology.max_depth + 1, generator=generator, dtype=torch.float64)
        walk = TargetSampling().accept(tree, scores, uniforms)
        depths = tree.topology.depths.expand(tree.batch_size, -1)
        drawn = uniforms.gather(1, depths).tolist()
        rows = zip(scores.tolist(), drawn, strict=True)
        chosen = [[slow_draw(*pair) for pair in zip(*row, strict=True)] for row in rows]
        longest = max(longest, assert_walk(tree, walk.path, walk.tokens, torch.tensor(chosen)))
    assert longest >= 3


@pytest.mark.parametrize("size", [3, 1000, 50_000])
def test_impossible_tokens_are_never_drawn(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(64, size, generator=generator) * 4
    scores[torch.rand(scores.shape, generator=generator) < 0.5] = -torch.inf
    scores[:, size // 2] = 1.0
    scores[::2, 0] = scores[::3, -1] = -torch.inf
    possible = scores.softmax(-1) > 0
    for uniform in (0.0, 5e-324, 1e-300, 1e-16, 0.5, 1 - 2**-24, 1 - 2**-53):
        drawn = TargetSampling().select(scores, torch.full((64,), uniform, dtype=torch.float64))
        assert bool(possible.gather(1, drawn[:, None]).all()), uniform
    lowest = TargetSampling().select(scores, torch.zeros(64, dtype=torch.float64))
    assert lowest.tolist() == [row.index(True) for row in possible.tolist()]
    assert bool((drawn > lowest).any()), "the last uniform tried is nearly one"


def test_one_possible_token_is_always_drawn() -> None:
    scores = torch.full((5, 7), -torch.inf)
    scores[torch.arange(5), torch.tensor([0, 6, 3, 6, 0])] = torch.tensor([-50.0, 80.0, 0.0, -3.0, 1.0])
    for uniform in (0.0, 0.3, 1 - 2**-53):
        drawn = TargetSampling().select(scores, torch.full((5,), uniform, dtype=torch.float64))
        assert drawn.tolist() == [0, 6, 3, 6, 0]


def test_equal_uniforms_give_equal_tokens_whatever_the_tree() -> None:
    scores = torch.randn(2, 1, VOCAB, generator=torch.Generator().manual_seed(0))
    uniforms = torch.tensor([[0.2, 0.9], [0.7, 0.1]], dtype=torch.float64)
    alone = TargetSampling().accept(root_only(torch.tensor([1, 2])), scores, uniforms[:, :1])
    tree = TokenTree(torch.tensor([[1, 0], [2, 0]]), chain(2))
    walk = TargetSampling().accept(tree, scores.expand(-1, 2, -1), uniforms)
    assert walk.tokens[:, 0].tolist() == alone.tokens[:, 0].tolist()


@pytest.mark.usefixtures("either_way")
def test_candidates_are_counted_by_depth() -> None:
    for seed in range(30):
        tree = random_tree(seed, shared=seed % 2 > 0)
        counts = [[0] * tree.topology.max_depth for _ in range(tree.batch_size)]
        assert tree.role is not None
        for row, roles in enumerate(tree.role.tolist()):
            for node, role in enumerate(roles[1:], start=1):
                if role == CANDIDATE:
                    counts[row][depths_of(tree.parents[row].tolist())[node] - 1] += 1
        assert tree.candidates_by_depth().tolist() == counts


@pytest.mark.usefixtures("either_way")
def test_a_candidate_below_padding_is_out_of_reach() -> None:
    for hidden in (PADDING, FEED_ONLY):
        role = torch.tensor([[CANDIDATE, hidden, CANDIDATE]])
        tree = TokenTree(torch.tensor([[3, 0, 0]]), chain(3), role)
        walk = follow(tree, torch.zeros(1, 3, dtype=torch.int64))
        assert walk.path.tolist() == [[0, -1, -1]]
        assert walk.tokens[0, 0] == 0
