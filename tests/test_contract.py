"""The contract that every drafter keeps, whatever the family of the target and the shape of the batch.

Drafters are found by listing ``conf/drafter``: a new one joins these tests by existing. The families are tiny random
models, and for drafters whose weights are shipped the embedded target, which means something to them. The default run
takes a part of the product drafter x family x batch; all of it runs under the marker ``slow``.

Shapes: B rows, N nodes of a tree, P committed tokens of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hydra.utils import get_object
from torch import Tensor
from transformers import DynamicCache

import specdec
from specdec.build import build_drafter, choices, load
from specdec.decoding import Step
from specdec.interfaces import DecodeState, Drafter
from specdec.loading import Loaded, demo_target
from specdec.metrics import SpeculationStats
from specdec.tree import PADDING
from zoo import PAD, VOCAB, build, untrained
from zoo import prompts as random_prompts

DRAFTERS = choices("drafter")
pytestmark = untrained(*DRAFTERS)  # nobody trained anything for the tiny random models here
FAMILIES = ("llama", "gemma3_text", "gpt2")
DEMO = "demo"
TRAINED = ("medusa", "hydra_heads", "kangaroo")  # for the embedded target
NEW_TOKENS = 24
DEMO_TOKENS = 12  # of a model that is a thousand times as large
CLOSE = 1e-4


def cases(*default: tuple[str, int]) -> list[Any]:
    """Drafter x family x batch; those not in ``default`` are slow."""
    product = [(drafter, family, batch) for drafter in DRAFTERS for family in FAMILIES for batch in (1, 3)]
    product += [(drafter, DEMO, batch) for drafter in TRAINED for batch in (1, 3)]
    return [pytest.param(*case, marks=() if case[1:] in default else pytest.mark.slow) for case in product]


class Trace:
    """Observes a request and keeps what it saw."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.committed: list[list[int]] = []
        self.slots: list[list[list[tuple[Tensor, Tensor]]]] = []
        self.emitted: list[int] = []

    def __call__(self, state: DecodeState, step: Step) -> None:
        self.steps.append(step)
        self.emitted = list(state.emitted)
        if step.tree is None:
            return
        assert state.context is not None
        step.tree.check()
        assert step.tree.token_ids[:, 0].tolist() == [row[-1] for row in _before(state, step)]
        lengths = state.context.lengths
        assert lengths == [len(state.history.row(row)) - 1 for row in range(state.batch_size)]
        self.committed.append(list(lengths))
        layers = state.context.cache.layers
        rows = enumerate(lengths)
        self.slots.append([[(x.keys[b, :, :n].clone(), x.values[b, :, :n].clone()) for x in layers] for b, n in rows])

    @property
    def proposals(self) -> list[tuple[Any, ...]]:
        """The trees in order, as plain values; what padding holds does not matter."""
        trees = []
        for tree in (step.tree for step in self.steps if step.tree is not None):
            known = torch.ones_like(tree.token_ids, dtype=torch.bool) if tree.role is None else tree.role != PADDING
            trees.append((tree.token_ids.where(known, -1).tolist(), tree.parents.tolist(), known.tolist()))
        return trees


def _before(state: DecodeState, step: Step) -> Iterator[list[int]]:
    for row, tokens in enumerate(step.verification.tokens):
        text = state.history.row(row).tolist()
        yield text[: len(text) - len(tokens)]


Inputs = dict[str, Tensor]


def prompts(batch: int, seed: int = 3) -> Inputs:
    """Left-padded prompts that repeat in parts, so that there is something to look up."""
    ids, mask = random_prompts(batch, VOCAB, seed)
    ids[:, -3:] = ids[:, -6:-3]
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


DEMO_TEXTS = (
    "Tom has 3 boxes with 12 apples each. He gives 7 apples to Anna. How many apples does he have left?",
    "Write a Python function `get_name(self)`: Return the name.",
    "Write a Python function `def is_empty(self)`: Return True if the queue is empty.",
    "A train travels 60 miles per hour for 3 hours. How far does it go?",
)


@cache
def demo() -> Loaded:
    return demo_target("float32", "cpu")


def left_padded(texts: Sequence[str]) -> Inputs:
    """Prompts for the embedded target."""
    rows = [demo().encode(text)[0] for text in texts]
    width = max(map(len, rows))
    mask = [(torch.arange(width) >= width - len(row)).long() for row in rows]
    padded = [torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(mask)}


@cache
def model_of(family: str) -> Any:
    return demo().model if family == DEMO else build(family)


def prompts_of(family: str, batch: int, other: bool = False) -> Inputs:
    """Left-padded prompts that suit a family; ``other`` ones than at first."""
    if family == DEMO:
        return left_padded(DEMO_TEXTS[-batch:] if other else DEMO_TEXTS[:batch])
    return prompts(batch, 4 if other else 3)


def limit_of(family: str) -> dict[str, Any]:
    """How far its texts go, for ``generate``."""
    return {"max_new_tokens": DEMO_TOKENS if family == DEMO else NEW_TOKENS}


@cache
def plain_text(family: str, batch: int) -> list[list[int]]:
    model = model_of(family)
    return model.generate(**prompts_of(family, batch), **limit_of(family)).tolist()


def generate(
    model: Any, drafter: str | Drafter, inputs: Inputs, seed: int = 0, acceptance: str | None = None, **options: Any
) -> tuple[Any, Trace]:
    """One speculative request, the model plain again after it."""
    trace, settings = Trace(), {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, **options}
    specdec.speculate(model, drafter, acceptance=acceptance)
    try:
        specdec.speculation_of(model).observers.append(trace)
        torch.manual_seed(seed)
        output = model.generate(**inputs, **settings)
    finally:
        specdec.restore(model)
    return output, trace


def fresh_prefill(model: Any, tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
    """K and V ``[Hkv, P, D]`` of every layer after one plain pass over ``tokens``."""
    filled = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), past_key_values=filled, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in filled.layers]


def check_cache(model: Any, inputs: Inputs, sequences: Tensor, trace: Trace) -> None:
    """After every step each row's committed slots hold what a plain pass over its text would put there."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", ["full_attention"] * config.num_hidden_layers)
    for row, sequence in enumerate(sequences.tolist()):
        padding = int((inputs["attention_mask"][row] == 0).sum())
        reference = fresh_prefill(model, sequence[padding:])
        for lengths, slots in zip(trace.committed, trace.slots, strict=True):
            for kind, expected, got in zip(kinds, reference, slots[row], strict=True):
                # What no window can see any more need not be there.
                first = max(0, lengths[row] - config.sliding_window + 1) if kind == "sliding_attention" else 0
                for whole, part in zip(expected, got, strict=True):
                    torch.testing.assert_close(part[:, first:], whole[:, first : lengths[row]], atol=CLOSE, rtol=CLOSE)


def check_statistics(stats: SpeculationStats, trace: Trace) -> None:
    steps = [step for step in trace.steps if step.tree is not None]
    rows = len(trace.emitted)
    assert stats.rows == rows
    assert stats.passes == len(steps)
    assert stats.emitted_tokens == sum(trace.emitted)
    assert stats.verifications == sum(not done for step in steps for done in step.verification.was_finished)
    assert stats.verifications == stats.accepted_lengths.total()
    assert stats.emitted_tokens == rows + sum((k + 1) * count for k, count in stats.accepted_lengths.items())
    assert stats.mean_accepted_tokens == (stats.emitted_tokens - rows) / stats.verifications
    assert stats.computed_nodes >= stats.drafted_nodes + stats.verifications
    assert all(seconds > 0 for seconds in stats.seconds.values())


@pytest.mark.parametrize(
    ("drafter", "family", "batch"), cases(("llama", 3), ("gemma3_text", 3), ("gpt2", 1), (DEMO, 3))
)
def test_greedy_text_cache_and_statistics(drafter: str, family: str, batch: int) -> None:
    model, limit = model_of(family), limit_of(family)
    inputs = prompts_of(family, batch)
    built = build_drafter(drafter)
    for _ in range(2):  # the second time with what was learnt the first time
        output, trace = generate(model, built, inputs, **limit)
        assert output.sequences.tolist() == plain_text(family, batch)
        check_cache(model, inputs, output.sequences, trace)
        check_statistics(output.speculation, trace)
        assert family != DEMO or output.speculation.mean_accepted_tokens > 1.1, "what is shipped was trained for this"
    again = model.generate(**inputs, **limit)
    assert again.tolist() == plain_text(family, batch), "restore() gives the plain model back"
    assert type(again) is Tensor


@pytest.mark.parametrize(("drafter", "family", "batch"), cases(("llama", 3), ("gpt2", 3), (DEMO, 3)))
def test_sampled_text_equals_plain_decoding_with_the_same_seed(drafter: str, family: str, batch: int) -> None:
    # Whatever a tree looks like and however it was drawn, this rule takes position t of the text from uniform t. (The
    # default rule for drawn trees, rejection, keeps the law and not the text: tests/test_sampled_drafters.py.)
    rule = "target_sampling"
    model, inputs = model_of(family), prompts_of(family, batch)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 6, **limit_of(family)}
    for seed in range(2):
        reference, _ = generate(model, "none", inputs, seed, **settings)
        output, trace = generate(model, drafter, inputs, seed, rule, **settings)
        assert output.sequences.tolist() == reference.sequences.tolist()
        check_statistics(output.speculation, trace)


def test_seeds_matter() -> None:
    model = model_of("llama")
    texts = [generate(model, "none", prompts(1), seed=seed, do_sample=True)[0].sequences.tolist() for seed in range(2)]
    assert texts[0] != texts[1]
    assert texts[0] != plain_text("llama", 1)


@pytest.mark.parametrize(("drafter", "family", "batch"), cases(("llama", 3), (DEMO, 1)))
def test_reset_makes_a_drafter_as_new(drafter: str, family: str, batch: int) -> None:
    model, limit = model_of(family), limit_of(family)
    inputs, other = prompts_of(family, batch), prompts_of(family, 1, other=True)
    built = build_drafter(drafter)
    _, first = generate(model, built, inputs, **limit)
    generate(model, built, other, **limit)
    built.reset()
    _, again = generate(model, built, inputs, **limit)
    assert again.proposals == first.proposals


@pytest.mark.parametrize(("drafter", "family", "batch"), cases(("llama", 3), (DEMO, 1)))
def test_saved_state_proposes_the_same(drafter: str, family: str, batch: int) -> None:
    model, limit = model_of(family), limit_of(family)
    inputs, other = prompts_of(family, batch), prompts_of(family, 1, other=True)
    built = build_drafter(drafter)
    generate(model, built, other, **limit)
    saved = built.state_dict()
    _, expected = generate(model, built, inputs, **limit)
    restored = build_drafter(drafter)
    restored.load_state_dict(saved)
    _, got = generate(model, restored, inputs, **limit)
    assert got.proposals == expected.proposals, "and what was saved is a copy, untouched by later requests"


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_refuses_the_state_of_another(drafter: str) -> None:
    model = model_of("llama")
    built = build_drafter(drafter)
    specdec.restore(specdec.speculate(model, built))
    with pytest.raises(ValueError, match="state|expected"):
        built.load_state_dict({"foreign": torch.zeros(1)})


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_recipe_shows_every_option_at_its_default(drafter: str) -> None:
    recipe = load("drafter", drafter)
    options = inspect.signature(get_object(recipe.pop("_target_"))).parameters
    assert recipe.keys() == options.keys()
    for name, value in recipe.items():
        default = options[name].default
        if not isinstance(value, dict):  # a part of its own, held to its defaults by the drafter's tests
            assert value == (list(default) if isinstance(default, tuple) else default), name
