"""Hydra heads on disk: both layouts there and back, published files by an independent definition, and who is refused.

Shapes: B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import specdec
from drafters.hydra_checkpoint import LAYOUTS, PUBLIC_FILE, load
from drafters.hydra_heads import Hydra
from drafters.hydra_modules import HydraHeads
from specdec.checkpoints import CONFIG, WEIGHTS
from specdec.target import Target
from specdec.training.objectives import same_text
from zoo import untrained

pytestmark = untrained("hydra_heads")

CLOSE = 1e-5
HIDDEN, VOCAB, HEADS, LAYERS = 32, 48, 3, 3


def target_of(dtype: torch.dtype = torch.float32, name: str = "", **overrides: Any) -> Target:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval().to(dtype).requires_grad_(False)
    model.config._name_or_path = name
    return Target(model)


@torch.no_grad()
def drafter_of(target: Target, **options: Any) -> Hydra:
    """Heads with weights that are nobody else's."""
    drafter = Hydra(**options)
    assert drafter.fit(target) is None
    generator = torch.Generator().manual_seed(1)
    for parameter in heads_of(drafter).parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return drafter


def heads_of(drafter: Hydra) -> HydraHeads:
    assert drafter.heads is not None
    return drafter.heads


@torch.no_grad()
def logits_of(heads: HydraHeads, target: Target, states: Tensor, embeddings: Sequence[Tensor]) -> list[Tensor]:
    """``[B, T, V]`` of every head."""
    given = states
    if heads.prefix is not None:
        positions = torch.arange(states.shape[1])[None]
        given = heads.prefix(states, positions, same_text(positions))
    sums, out = heads.open(given, embeddings[0], heads.shape.num_heads), []
    for head in range(heads.shape.num_heads):
        if head > 0:
            sums = heads.extend(head, sums, embeddings[head])
        out.append(heads.logits(head, sums, target))
    return out


def inputs_of(target: Target) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    made = torch.randn(HEADS + 1, 2, 7, HIDDEN, generator=generator).to(target.dtype)
    return made[0], list(made[1:])


class PublishedBlock(nn.Module):
    def __init__(self, hidden: int, vectors: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden * vectors, hidden)
        self.res_connection = nn.Linear(hidden * vectors, hidden) if vectors > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.res_connection(x) + nn.functional.silu(self.linear(x))


class Published(nn.Module):
    """The authors' module by its description: dropouts in front where there is a prefix layer, later blocks tied."""

    def __init__(self, prefix: LlamaModel | None) -> None:
        super().__init__()

        def chain(*modules: nn.Module) -> nn.Sequential:
            return nn.Sequential(*([part for m in modules for part in (nn.Dropout(0.2), m)] if prefix else modules))

        heads = []
        for head in range(HEADS):
            tied = PublishedBlock(HIDDEN, 1)
            heads.append(chain(PublishedBlock(HIDDEN, head + 2), *[tied] * (LAYERS - 1)))
        self.hydra_mlp = nn.ModuleList(heads)
        outputs = [nn.Linear(HIDDEN, VOCAB) for _ in range(HEADS)]
        self.hydra_lm_head = nn.ModuleList([chain(output) for output in outputs] if prefix else outputs)
        self.input_embed_fn = nn.Embedding(VOCAB, HIDDEN)
        if prefix is not None:
            self.prefix_embeding_layer = prefix

    @torch.no_grad()
    def forward(self, states: Tensor, embeddings: Sequence[Tensor]) -> list[Tensor]:
        if hasattr(self, "prefix_embeding_layer"):
            states = self.prefix_embeding_layer(inputs_embeds=states, use_cache=False).last_hidden_state
        out = []
        for head, (blocks, output) in enumerate(zip(self.hydra_mlp, self.hydra_lm_head, strict=True)):
            out.append(output(blocks(torch.cat([states, *embeddings[: head + 1]], dim=-1))))
        return out


def publish(folder: Path, arch: str, target: Target, **config: Any) -> Published:
    """A checkpoint in the public layout, written without our code."""
    torch.manual_seed(3)
    prefix = None
    if arch == "prefix-mlp":
        settings = target.model.config.to_dict() | {"num_hidden_layers": 1, "num_key_value_heads": 4}
        prefix = LlamaModel(LlamaConfig(**(settings | {"intermediate_size": 24})))
        nn.init.normal_(prefix.norm.weight, 1.0, 0.1)
    published = Published(prefix).eval()
    folder.mkdir(exist_ok=True)
    weights = published.state_dict()
    if prefix is not None:
        weights["prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(weights, folder / PUBLIC_FILE)
    known = {"hydra_num_heads": 2, "hydra_num_layers": 1, "hydra_head_arch": arch, "grounded_heads": True}
    (folder / CONFIG).write_text(json.dumps(known | config))
    return published


@pytest.mark.parametrize("arch", ["mlp", "prefix-mlp"])
def test_published_heads_say_what_they_said(arch: str, tmp_path: Path) -> None:
    target = target_of()
    published = publish(tmp_path, arch, target)
    drafter = Hydra(path=str(tmp_path))
    assert drafter.fit(target) is None
    heads = heads_of(drafter)
    assert heads.shape.num_heads == HEADS, "counted in the file, not in its config"
    assert heads.shape.num_layers == LAYERS
    states, embeddings = inputs_of(target)
    for got, expected in zip(logits_of(heads, target, states, embeddings), published(states, embeddings), strict=True):
        torch.testing.assert_close(got, expected, atol=CLOSE, rtol=CLOSE)
    ignored = ["input_embed_fn.weight (a copy of the target's own embedding)"]
    if arch == "prefix-mlp":
        assert heads.shape.prefix is not None
        assert heads.shape.prefix.rope_theta == 5000.0
        assert (heads.shape.prefix.kv_heads, heads.shape.prefix.intermediate) == (4, 24)
        ignored.append("prefix_embeding_layer.embed_tokens.weight (the prefix layer reads states, no tokens)")
        place = "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"
        ignored.append(f"{place} (follows from the base of the frequencies)")
    assert sorted(drafter.ignored) == sorted(ignored)
    tied = [dict(block.named_parameters())["weight"] for block in heads.blocks[0].children()]
    assert torch.equal(tied[0], tied[1])
    assert tied[0].data_ptr() != tied[1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("arch", ["mlp", "prefix-mlp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout: str, arch: str, own_head: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    target = target_of(dtype, "somewhere/tiny-1")
    drafter = drafter_of(target, arch=arch, own_head=own_head, num_heads=HEADS, num_layers=LAYERS)
    drafter.acceptance = [[0.5, 0.25]] * HEADS
    states, embeddings = inputs_of(target)
    expected = logits_of(heads_of(drafter), target, states, embeddings)
    drafter.save(tmp_path / "made", layout)
    again = Hydra(path=str(tmp_path / "made"))
    assert again.fit(target) is None
    assert again.acceptance == drafter.acceptance
    assert again.ignored == []
    assert {parameter.dtype for parameter in heads_of(again).parameters()} == {dtype}
    for got, wanted in zip(logits_of(heads_of(again), target, states, embeddings), expected, strict=True):
        assert torch.equal(got, wanted)
    if layout == "specdec":
        assert heads_of(again).shape == heads_of(drafter).shape
    # From a file, and for the same model in another folder.
    file = tmp_path / "made" / (WEIGHTS if layout == "specdec" else PUBLIC_FILE)
    assert Hydra(path=str(file)).fit(target_of(dtype, "/elsewhere/Tiny-1")) is None


def test_our_public_files_are_what_the_authors_would_load(tmp_path: Path) -> None:
    target = target_of(num_key_value_heads=4)
    for arch in ("mlp", "prefix-mlp"):
        ours = tmp_path / arch
        drafter_of(target, arch=arch, num_heads=HEADS, num_layers=LAYERS).save(ours, "hydra")
        publish(tmp_path / "theirs", arch, target)
        saved, theirs = (torch.load(f / PUBLIC_FILE, weights_only=True) for f in (ours, tmp_path / "theirs"))
        extra = ("input_embed_fn.", "prefix_embeding_layer.embed_tokens.", "rotary_emb.inv_freq")
        needed = {key: value.shape for key, value in theirs.items() if not any(part in key for part in extra)}
        for key in [key for key in needed if ".mlp." in key]:
            needed[key] = saved[key].shape  # the other layer was made of another width
        assert {key: value.shape for key, value in saved.items()} == needed
        config = json.loads((ours / CONFIG).read_text())
        assert (config["hydra_num_heads"], config["hydra_num_layers"]) == (HEADS, LAYERS)
        assert (config["hydra_head_arch"], config["grounded_heads"]) == (arch, True)


def test_states_from_before_the_end(tmp_path: Path) -> None:
    target = target_of()
    publish(tmp_path, "mlp", target, hidden_state_offset=1)
    drafter = Hydra(path=str(tmp_path))
    model = specdec.speculate(target.model, drafter)
    assert drafter.needs.taps == (1,)
    ids = torch.arange(2, 9)[None]
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert text.tolist() == specdec.restore(model).generate(ids, max_new_tokens=8, do_sample=False).tolist()
    assert drafter.lesson(Target(target.model)).taps == (1,)


def refusal(path: Path | str, target: Target) -> str:
    with pytest.raises(ValueError, match="drafter 'hydra_heads' does not fit LlamaForCausalLM: it needs") as error:
        specdec.speculate(target.model, "hydra_heads", path=str(path))
    return str(error.value)


def rewrite(folder: Path, change: Any) -> None:
    """Change the weights of a published checkpoint in place."""
    weights = torch.load(folder / PUBLIC_FILE, weights_only=True)
    change(weights)
    torch.save(weights, folder / PUBLIC_FILE)


def test_refusals(tmp_path: Path) -> None:
    target = target_of()
    assert "no checkpoint at ./nowhere" in refusal("./nowhere", target)
    (tmp_path / "empty").mkdir()
    assert f"expected {WEIGHTS} or {PUBLIC_FILE}" in refusal(tmp_path / "empty", target)
    folder = tmp_path / "one"
    for config, said in (
        ({"hydra_head_arch": "eagle-attn"}, "architecture 'eagle-attn'; expected mlp or prefix-mlp"),
        ({"grounded_heads": False}, "use drafter=medusa"),
        ({"hidden_state_offset": 3}, "heads that read one of its 2 layers, got offset 3"),
    ):
        publish(folder, "mlp", target, **config)
        assert said in refusal(folder, target)
    publish(folder, "mlp", target)
    assert "expected hydra_mlp.0.0.linear.weight of shape [64, 128], got [32, 64]" in refusal(
        folder, target_of(hidden_size=64)
    )
    assert "hydra_lm_head.0.weight of shape [50, 32], got [48, 32]" in refusal(folder, target_of(vocab_size=50))
    rewrite(folder, lambda weights: weights.update({"hydra_mlp.0.0.gate.weight": torch.zeros(1)}))
    assert "keys that this drafter does not know: hydra_mlp.0.0.gate.weight" in refusal(folder, target)
    publish(folder, "mlp", target)
    rewrite(folder, lambda weights: weights.pop("hydra_mlp.1.0.res_connection.bias"))
    assert "expected a key hydra_mlp.1.0.res_connection.bias" in refusal(folder, target)
    publish(folder, "prefix-mlp", target)
    odd = "prefix_embeding_layer.layers.0.self_attn.q_proj.weight"
    rewrite(folder, lambda weights: weights.update({odd: torch.zeros(20, HIDDEN)}))
    assert "4 attention heads, of an even size each; got 20 rows" in refusal(folder, target)
    publish(folder, "prefix-mlp", target)
    scaled = target_of(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    assert "which its prefix layer takes over; those of LlamaForCausalLM are of type 'linear'" in refusal(
        folder, scaled
    )


def test_truncated_files(tmp_path: Path) -> None:
    target = target_of()
    publish(tmp_path / "public", "mlp", target)
    drafter_of(target, num_heads=2, num_layers=1).save(tmp_path / "ours")
    for file, said in (
        (tmp_path / "public" / PUBLIC_FILE, "expected a pickle of tensors alone"),
        (tmp_path / "ours" / WEIGHTS, "not a whole safetensors file"),
    ):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert said in refusal(file.parent, target)


def test_another_base(tmp_path: Path) -> None:
    drafter_of(target_of(name="made/by-us-7b"), num_heads=2).save(tmp_path)
    renamed, other_weights = target_of(name="made/by-us-13b"), target_of(name="made/by-us-13b")
    assert Hydra(str(tmp_path)).fit(renamed) is None, "the very weights, whatever their folder is called"
    with torch.no_grad():
        other_weights.router.head.weight.mul_(1.01)
    assert "this one is for made/by-us-7b" in refusal(tmp_path, other_weights)
    other = refusal(tmp_path, target_of(name="made/by-us-7b", hidden_size=64))
    assert "with hidden_size=32, not 64" in other


def test_weights_of_something_else(tmp_path: Path) -> None:
    target = target_of()
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    assert "expected Hydra heads as saved by specdec" in refusal(tmp_path, target)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to save yet"):
        Hydra().save(tmp_path)
    with pytest.raises(ValueError, match="unknown layout 'medusa' of Hydra heads; known: specdec, hydra"):
        drafter_of(target_of()).save(tmp_path, "medusa")
    assert not list(tmp_path.iterdir())


def test_loading_by_hand(tmp_path: Path) -> None:
    target = target_of()
    drafter = drafter_of(target, num_heads=2, num_layers=1)
    drafter.acceptance = [[0.5, 0.25], [0.4, 0.1]]
    drafter.save(tmp_path)
    heads, rates, ignored = load(str(tmp_path), target)
    assert heads.shape == heads_of(drafter).shape
    assert (rates, ignored) == (drafter.acceptance, [])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_heads": "2"}, "expected 'num_heads' in its config.json to be a whole number of at least 1, got '2'"),
        ({"num_heads": 10**9}, "expected num_heads=2, as its weights have them; got 1000000000"),
        ({"num_layers": 7}, "expected num_layers=2, as its weights have them; got 7"),
        ({"own_head": 0}, "expected 'own_head' in its config.json to be true or false, got 0"),
        ({"own_head": True}, "expected a key outputs.0.weight"),
        ({"acceptance": [0.5, 0.4]}, "expected 'acceptance' in its config.json to be a list of lists of numbers"),
        ({"acceptance": [[0.5]]}, "shares between 0 and 1 for each of the 2 heads, got [[0.5]]"),
        ({"hidden_state_offset": -1}, "expected 'hidden_state_offset' in its config.json to be a whole number of at"),
        ({"prefix": [4, 2]}, "expected 'prefix' in its config.json to be an object, got [4, 2]"),
        ({"prefix": {"heads": 4, "width": 3}}, "'prefix' in its config.json has no width"),
        ({"prefix": {"heads": 4}}, "expected 'prefix.kv_heads' in its config.json, a whole number of at least 1; got"),
        (
            {"prefix": {"heads": 4, "kv_heads": 3, "head_dim": 8, "intermediate": 40}},
            "a multiple of kv_heads for heads",
        ),
        (
            {"prefix": {"heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 10**9}},
            "gate_proj.weight of shape [1000",
        ),
    ],
)
def test_wrong_values_in_our_config(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Anybody may have edited it; what does not fit the weights is told before memory is made for it."""
    target = target_of()
    drafter_of(target, num_heads=2, num_layers=2).save(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(written | config))
    assert said in refusal(tmp_path, target)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hydra_head_arch": ["mlp"]}, "expected 'hydra_head_arch' in its config.json to be a text, got ['mlp']"),
        ({"grounded_heads": "yes"}, "expected 'grounded_heads' in its config.json to be true or false, got 'yes'"),
        ({"hidden_state_offset": "1"}, "expected 'hidden_state_offset' in its config.json to be a whole number"),
    ],
)
def test_wrong_values_in_a_published_config(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    target = target_of()
    publish(tmp_path, "mlp", target, **config)
    assert said in refusal(tmp_path, target)


def test_another_model_gets_nothing_of_the_first_ones(tmp_path: Path) -> None:
    target = target_of()
    publish(tmp_path, "mlp", target, acceptance=[[0.5]] * HEADS)
    drafter = Hydra(path=str(tmp_path))
    assert drafter.fit(target) is None
    assert (drafter.acceptance, len(drafter.ignored)) == ([[0.5]] * HEADS, 1)
    drafter_of(target).save(tmp_path / "ours")
    drafter.path = str(tmp_path / "ours")
    assert drafter.fit(target_of()) is None
    assert (drafter.acceptance, drafter.ignored) == (None, [])
