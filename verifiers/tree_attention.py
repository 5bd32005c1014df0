"""The verifier: one tree-attention pass of the target, then an acceptance rule and the stop rules.

Owns how a pass becomes a decision. The mask comes from ``specdec.tree`` and ``specdec.visibility``, the rules from
the other modules of ``verifiers``, p and the stops from ``specdec.sampling``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from specdec.interfaces import AcceptanceRule, DecodeState, Tap, Verification
from specdec.routing import FULL, Route
from specdec.sampling import Group, Policy
from specdec.selection import on_host
from specdec.target import PassOutput, Target
from specdec.tree import TokenTree, root_only
from verifiers.acceptance import Greedy, TargetSampling, children_on_host
from verifiers.rejection import RecursiveRejection


class TreeVerifier:
    """Verify a whole tree in one pass of the target.

    Args:
        rule: the acceptance rule under sampling. None picks a lossless one for every tree: recursive rejection where
            the drafter says how it drew the children, else target sampling; the latter also where logits processors
            keep state, since they give p along the walk only. Under greedy decoding every rule is ``greedy``.
    """

    def __init__(self, rule: AcceptanceRule | None = None) -> None:
        self.rule = rule

    def first(self, target: Target, state: DecodeState, logits: Tensor) -> Verification:  # noqa: ARG002 - the protocol
        """The token of the prefill, ``logits [B, V]``: a tree of which only the root has been computed."""
        return self._decide(state, root_only(state.root), PassOutput(logits[:, None]))

    def verify(self, target: Target, state: DecodeState, tree: TokenTree, taps: Sequence[Tap] = ()) -> Verification:
        """One pass over ``tree``, then acceptance and stop rules."""
        assert state.context is not None, "the prompt has not been read"
        layer, states = tree.entry or (0, None)
        route = Route(lo=layer) if tree.entry else FULL
        output = target.run(state.context, tree, route=route, states=states, taps=taps)
        return self._decide(state, tree, output)

    def _decide(self, state: DecodeState, tree: TokenTree, output: PassOutput) -> Verification:
        policy = state.policy
        output.logits = output.logits.float()  # once, for the rule and for whoever learns from them
        rule = self._rule(policy, tree)
        uniforms = policy.draw_ahead(tree.topology.max_depth + 1, tree.token_ids.device)
        # Where nothing waits, a walk that asks for p node by node computes least.
        if policy.vectorised or (policy.by_length and not on_host(output.logits)):
            step = self._vectorised(rule, state, tree, output, uniforms)
        else:
            step = _walk_lazily(rule, state, tree, output.logits, uniforms)
        if any(-1 in tokens for tokens in step.tokens):
            raise RuntimeError("probability tensor contains inf or nan, or no token is left to choose from")
        step.states, step.hidden_states = output.states, output.hidden_states
        return step

    def _rule(self, policy: Policy, tree: TokenTree) -> AcceptanceRule:
        """The rule for this request and tree."""
        rule = self.rule
        if policy.uniforms is None:
            return Greedy() if rule is None or rule.samples else rule
        if rule is None:
            return RecursiveRejection() if tree.draws is not None and policy.vectorised else TargetSampling()
        if not rule.samples:
            raise ValueError(
                f"acceptance rule {rule.name!r} is for greedy decoding, the request is sampled; leave it out to have"
                " the right one"
            )
        if not (policy.vectorised or rule.on_path):
            raise ValueError(
                f"acceptance rule {rule.name!r} needs p off the walk, which "
                f"{policy.needs_ids or 'a stopping criterion'} cannot give; use the default rule with it"
            )
        reason = rule.refuse(tree)
        if reason is not None:
            raise ValueError(
                f"acceptance rule {rule.name!r} does not fit the trees of {', '.join(tree.sources)}: {reason}"
            )
        return rule

    def _vectorised(
        self, rule: AcceptanceRule, state: DecodeState, tree: TokenTree, output: PassOutput, uniforms: Tensor | None
    ) -> Verification:
        policy = state.policy
        with torch.inference_mode():
            scores = policy.score(output.logits, tree)
            coins = policy.draw_coins(rule.num_coins(tree), scores.device)
            walk = rule.accept(tree, scores, uniforms, coins)
            rows = _fetch(walk.path, walk.tokens, tree.candidates_by_depth())
        late = policy.out_of_time()
        paths, tokens, finished, offered = [], [], [], []
        for row, (path, following, counts) in enumerate(rows):
            if state.finished[row]:
                emitted, stop = list[int](), True
            else:
                emitted, stop = policy.cut(row, following[: path.index(-1)] if path[-1] < 0 else following)
            paths.append(path[: len(emitted)])
            tokens.append(emitted)
            finished.append(stop or late)
            offered.append(counts)
        kept = None
        if policy.wants_scores:
            kept = [scores[row, nodes].float() for row, nodes in enumerate(paths)]
        return Verification(paths, tokens, finished, list(state.finished), output.logits, offered, scores=kept)


def _fetch(*parts: Tensor) -> Iterable[tuple[list[int], ...]]:
    """Rows of several ``[B, m]`` as lists: the step's one device-to-host synchronisation."""
    if on_host(parts[0]):
        return zip(*(part.tolist() for part in parts), strict=True)
    whole, ends = torch.cat(parts, dim=1).tolist(), [0, *accumulate(part.shape[1] for part in parts)]
    return [tuple(row[start:end] for start, end in pairwise(ends)) for row in whole]


def _walk_lazily(
    rule: AcceptanceRule, state: DecodeState, tree: TokenTree, logits: Tensor, uniforms: Tensor | None
) -> Verification:
    """Call processors and criteria once per emitted token, in plain's order, while following the tree."""
    batch = state.batch_size
    step = Verification(
        [[] for _ in range(batch)], [[] for _ in range(batch)], list(state.finished), list(state.finished), logits
    )
    step.offered = tree.candidates_by_depth().tolist()
    if state.policy.wants_scores:
        step.scores = [logits.new_empty(0, logits.shape[-1], dtype=torch.float32) for _ in range(batch)]
    children = children_on_host(tree)
    for group in state.policy.groups:
        if not all(state.finished[row] for row in group.rows):
            _walk_group(rule, state.policy, group, children, uniforms, step)
    return step


def _walk_group(
    rule: AcceptanceRule,
    policy: Policy,
    group: Group,
    children: list[dict[tuple[int, int], int]],
    uniforms: Tensor | None,
    step: Verification,
) -> None:
    rows, nodes = group.rows, [0] * len(group.rows)
    ids = policy.ids(rows)
    stopped = [policy.stopped[row] for row in rows]
    depth = 0
    while True:
        scores = policy.process(group, ids, step.logits[rows, nodes].to(ids.device))
        chosen = rule.select(scores, None if uniforms is None else uniforms[rows, depth].to(ids.device))
        emitted = chosen.tolist()
        if policy.has_eos:
            emitted = [
                policy.pad_token_id or 0 if done else token for token, done in zip(emitted, stopped, strict=True)
            ]
        ids = torch.cat([ids, torch.tensor(emitted, device=ids.device)[:, None]], dim=1)
        now = policy.stops(ids, scores)
        for index, row in enumerate(rows):
            if not step.finished[row]:
                step.path[row].append(nodes[index])
                step.tokens[row].append(emitted[index])
                if step.scores is not None:
                    step.scores[row] = torch.cat([step.scores[row], scores[index : index + 1]])
        stopped = _stop(policy, step, rows, [old or new for old, new in zip(stopped, now, strict=True)])
        following = [children[row].get((node, token)) for row, node, token in zip(rows, nodes, emitted, strict=True)]
        if all(stopped) or any(n is None for n, row in zip(following, rows, strict=True) if not step.finished[row]):
            return
        nodes = [node if following[index] is None else following[index] for index, node in enumerate(nodes)]  # type: ignore[misc]
        depth += 1


def _stop(policy: Policy, step: Verification, rows: list[int], stopped: list[bool]) -> list[bool]:
    # A stopped row pads where there is an EOS criterion; without one it goes on with real
    # tokens until all have stopped.
    for row, done in zip(rows, stopped, strict=True):
        policy.stopped[row] = done
        step.finished[row] = done and (policy.has_eos or all(stopped))
    return stopped
