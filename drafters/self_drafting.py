"""What drafters that run a part of the target share: drafting token by token, the comb tree of what they found, and the
hand-over of its lower layers to the verification.

A draft grows in place on the target's own cache: node i of the chain writes its K/V into the i-th slot behind the
committed tokens, where the verification pass, or the next draft, writes over it. Nothing is cloned and nothing has to
be cropped, because committed lengths only ever grow by ``Target.keep``.

Shapes: B rows, N nodes, k steps of a draft, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from specdec.interfaces import DecodeState
from specdec.routing import Route
from specdec.selection import argmax, on_host, top_k
from specdec.target import Target
from specdec.transfer import upload
from specdec.tree import CANDIDATE, PADDING, TokenTree, Topology, chain


@dataclass
class Draft:
    """A chain drafted step by step, with the runners-up of every step.

    Attributes:
        ranked: per step int64 ``[B, w]``, the likeliest successors of the chain so far, best first; the best is the
            next token of the chain.
        confidence: per step and row, the probability of that token under the draft (softmax of the raw logits, no
            temperature); empty where it was not asked for.
        lengths: steps that each row stands by; what it drafted beyond is padding.
        states: per step ``[B, 1, H]``, the tapped state of the node that was run; empty without a tap.
    """

    ranked: list[Tensor]
    confidence: list[list[float]]
    lengths: list[int]
    states: list[Tensor]


@torch.no_grad()
def draft_chain(
    target: Target,
    state: DecodeState,
    route: Route,
    steps: int,
    threshold: float = 0.0,
    width: int = 1,
    head: Callable[[Tensor, int], Tensor] | None = None,
) -> Draft:
    """Draft greedily with a part of the target, one node per pass.

    A row stops after ``steps`` tokens, where its budget ends, after an end-of-text token, and after a token of which
    the draft is less sure than ``threshold``; that token is still proposed. Without a threshold nothing is read back
    from the device; with one, a single small tensor per step is.

    Args:
        target: of the request.
        state: of the request.
        route: what part of the target drafts; the states that enter layer ``route.hi`` are recorded where it is set.
        steps: most tokens to draft.
        threshold: 0 = never stop for want of confidence.
        width: successors to rank at every step.
        head: called with the recorded states ``[B, 1, H]`` of a node and its number, gives the logits ``[B, 1, V]``
            after it; None = those of the route.
    """
    context = state.context
    assert context is not None, "the prompt has not been read"
    limits = [0 if done else min(steps, left - 1) for done, left in zip(state.finished, context.budgets, strict=True)]
    draft = Draft([], [], [0] * state.batch_size, [])
    device = state.root.device
    tokens = torch.zeros(state.batch_size, steps + 1, dtype=torch.int64, device=device)
    tokens[:, 0] = state.root
    # One topology for every draft length: its mask and depths are made once.
    growing = TokenTree(tokens, chain(steps + 1, device))
    taps: tuple[int, ...] = () if route.hi is None else (route.hi,)
    active = [limit > 0 for limit in limits]
    for step in range(max(limits)):
        output = target.run(context, growing, slice(step, step + 1), route, taps=taps)
        logits = (output.logits if head is None else head(output.states[taps[0]], step))[:, -1]
        ranked = argmax(logits)[:, None] if width == 1 else top_k(logits, width)
        tokens[:, step + 1] = ranked[:, 0]
        draft.ranked.append(ranked)
        draft.states.extend(output.states.values())
        draft.lengths = [length + on for length, on in zip(draft.lengths, active, strict=True)]
        active = [on and step + 1 < limit for on, limit in zip(active, limits, strict=True)]
        if threshold > 0:
            best, sure = _read(ranked[:, 0], logits)
            draft.confidence.append(sure)
            ends = state.policy.eos_token_ids
            active = [
                on and p >= threshold and token not in ends for on, p, token in zip(active, sure, best, strict=True)
            ]
        if not any(active):
            break
    return draft


def _read(best: Tensor, logits: Tensor) -> tuple[list[int], list[float]]:
    """The most likely tokens ``[B]`` of ``logits [B, V]`` and their probabilities, in one device-to-host copy."""
    logits = logits.float()
    if on_host(logits):
        scores = logits.numpy()
        # One over the sum of what all others have beside the best.
        return best.tolist(), (1 / np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, dtype=np.float64)).tolist()
    log_probability = logits.gather(1, best[:, None]).squeeze(1) - logits.logsumexp(-1)
    tokens, probabilities = torch.stack((best.double(), log_probability.exp().double())).tolist()
    return [int(token) for token in tokens], probabilities


@dataclass(frozen=True)
class Comb:
    """The shape of a comb: a chain whose every node may have leaf siblings.

    Chain nodes come first, 0..k, then the siblings by depth: where only chain nodes are accepted their K/V need not
    move.

    Attributes:
        topology: ``parents [1, N]``.
        depths, ranks: of every node, ``[N]``, on the host; rank 0 is the chain.
        rank: the same ranks on the device, int64 ``[1, N]``.
    """

    topology: Topology
    depths: np.ndarray
    ranks: np.ndarray
    rank: Tensor


@lru_cache(maxsize=512)
def comb(widths: tuple[int, ...], device: torch.device) -> Comb:
    """The comb with ``widths[d]`` nodes at depth d + 1, the chain's own included."""
    depth, siblings = len(widths), np.array(widths) - 1
    above = np.repeat(np.arange(depth), siblings)
    before = np.repeat(siblings.cumsum() - siblings, siblings)  # siblings at lesser depths
    parents = np.concatenate([[0], np.arange(depth), above])
    depths = np.concatenate([np.arange(depth + 1), above + 1])
    ranks = np.concatenate([np.zeros(depth + 1, np.int64), np.arange(len(above)) - before + 1])
    topology = Topology(torch.tensor(parents[None], device=device), depth)
    return Comb(topology, depths, ranks, torch.tensor(ranks[None], device=device))


def comb_tree(root: Tensor, draft: Draft, widths: Sequence[Sequence[int]], name: str) -> TokenTree:
    """The comb of a draft.

    Args:
        root: int64 ``[B]``.
        draft: of at least one step.
        widths: per step and row, how many of the ranked successors that row proposes (at least 1).
        name: of the drafter.

    Returns:
        One shape for all rows, as wide at each depth as the widest row that reaches it; nodes that a row does not
        propose are padding.
    """
    steps, lengths = len(draft.ranked), draft.lengths
    if all(width == 1 for step in widths for width in step) and min(lengths) == steps:
        # A chain that all rows stand by to its end, which is every draft of one row: nothing to lay out.
        shape = comb((1,) * steps, root.device)
        token_ids = torch.cat([root[:, None], *(ranked[:, :1] for ranked in draft.ranked)], dim=1)
        return TokenTree(token_ids, shape.topology, sources=(name,), rank=shape.rank)
    rows = range(len(lengths))
    shape = comb(tuple(max(widths[s][b] for b in rows if lengths[b] > s) for s in range(steps)), root.device)
    columns = [root[:, None], *(ranked[:, :1] for ranked in draft.ranked)]
    counts = np.bincount(shape.depths, minlength=steps + 1)[1:].tolist()
    columns += [ranked[:, 1:count] for ranked, count in zip(draft.ranked, counts, strict=True) if count > 1]
    token_ids = torch.cat(columns, dim=1)
    offered = np.array([[1 << 30] * len(lengths), *widths]).T  # [B, steps + 1], the root first
    alive = (shape.depths <= np.array(lengths)[:, None]) & (shape.ranks < offered[:, shape.depths])
    role = None if alive.all() else upload(np.where(alive, CANDIDATE, PADDING), root.device)
    return TokenTree(token_ids, shape.topology, role, sources=(name,), rank=shape.rank)


def verify_from(layer: int, target: Target, state: DecodeState, tree: TokenTree, states: Sequence[Tensor]) -> TokenTree:
    """The same tree, its verification starting at a layer from states that the draft has computed.

    What the draft has not run yet, the last nodes of the tree, goes through the lower layers now.

    Args:
        layer: where the verification starts.
        target: of the request.
        state: of the request.
        tree: the proposal; K/V of its first nodes below ``layer`` are written.
        states: ``[B, n, H]`` entering ``layer``, of the first nodes in order.
    """
    context = state.context
    assert context is not None, "the prompt has not been read"
    if context.template.get("output_hidden_states"):
        # The caller wants the states of the lower layers too, which only a whole pass returns.
        return tree
    done = sum(part.shape[1] for part in states)
    lower = Route(hi=layer, logits=False)
    rest = target.run(context, tree, slice(done, tree.num_nodes), lower, taps=(layer,))
    tree.entry = (layer, torch.cat([*states, rest.states[layer]], dim=1))
    return tree


@torch.no_grad()
def why_not_split(target: Target, layer: int) -> str | None:
    """Why layers below and from ``layer`` on cannot run one after the other; None where they can.

    A model whose upper layers read more of the lower ones than the residual stream would be verified wrongly, so the
    split is held to an unbroken pass before it is used.
    """
    model, router = target.model, target.router
    ids = torch.linspace(0.1, 0.8, 8, device=target.device).mul(target.vocab_size).long()[None]

    def logits() -> Tensor:
        return model(input_ids=ids, use_cache=False, return_dict=True).logits.float()

    whole = logits()
    with router.route(Route(hi=layer, logits=False)), router.taps((layer,)) as recorded:
        logits()
    try:
        with router.route(Route(lo=layer), recorded[layer][0]):
            split = logits()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return f"layers that can run from stored states; from layer {layer} on {type(error).__name__}: {error}"
    difference, scale = (split - whole).abs().max(), (whole - whole.mean()).abs().max()
    if difference <= 1e-3 * scale:
        return None
    return (
        f"layers that read only the residual stream; split at layer {layer}, logits differ by {float(difference):.1e}"
    )
