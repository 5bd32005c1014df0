"""Medusa heads on disk: every published layout, what is refused and why, and heads inside a whole model.

Shapes: K heads, L blocks, H hidden size, V vocabulary, C mapped tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import specdec
from drafters.medusa import Medusa
from drafters.medusa_heads import MedusaHeads
from specdec import checkpoints
from specdec.loading import demo_target
from test_medusa import heads_of, inputs_of, shake, target_of
from zoo import HIDDEN, VOCAB, build, untrained

pytestmark = untrained("medusa")

Weights = dict[str, Tensor]


@cache
def model_of(dtype: str = "float32") -> Any:
    model = build("llama", dtype=getattr(torch, dtype))
    model.config._name_or_path = "org/tiny-base"
    return model


def fitted(path: Path | str | None = None, dtype: str = "float32", **options: Any) -> Medusa:
    drafter = Medusa(path=None if path is None else str(path), **options)
    assert drafter.fit(target_of(model_of(dtype))) is None
    return drafter


def trained(dtype: str = "float32", **options: Any) -> Medusa:
    drafter = fitted(dtype=dtype, **options)
    shake(heads_of(drafter))
    return drafter


def refusal(path: Path) -> str:
    return str(Medusa(path=str(path)).fit(target_of(model_of())))


def assert_same(a: MedusaHeads, b: MedusaHeads) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def write(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], file: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / file)
    else:
        torch.save(dict(weights), folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_weights(names: Mapping[str, tuple[int, ...]]) -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def published(num_heads: int = 5, num_layers: int = 1, own_head: bool = True) -> Weights:
    """Names and shapes as the authors' own files have them."""
    names: dict[str, tuple[int, ...]] = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            names[f"{head}.{layer}.linear.weight"] = (HIDDEN, HIDDEN)
            names[f"{head}.{layer}.linear.bias"] = (HIDDEN,)
        if own_head:
            names[f"{head}.{num_layers}.weight"] = (VOCAB, HIDDEN)
    return random_weights(names)


FILE_OF = {"specdec": "model.safetensors", "medusa": "medusa_lm_head.pt", "medusa_v2": "medusa_lm_head.safetensors"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("layout", "own_head"), [("specdec", 0), ("specdec", 1), ("medusa", 1), ("medusa_v2", 0)])
def test_round_trips(layout: str, own_head: int, num_layers: int, dtype: str, tmp_path: Path) -> None:
    drafter = trained(dtype, num_heads=3, num_layers=num_layers, own_head=bool(own_head))
    drafter.acceptance = [[0.5, 0.1], [0.3, 0.1], [0.2, 0.1]]
    drafter.save(tmp_path / "heads", layout)
    assert sorted(file.name for file in (tmp_path / "heads").iterdir()) == sorted(["config.json", FILE_OF[layout]])
    for path in (tmp_path / "heads", tmp_path / "heads" / FILE_OF[layout]):
        again = fitted(path, dtype)
        assert_same(heads_of(again), heads_of(drafter))
        assert again.acceptance == drafter.acceptance
        assert again.ignored == []


@pytest.mark.parametrize(
    ("options", "expected", "got"),
    [
        ({"num_heads": 4}, "num_heads=3", "num_heads=4"),
        ({"num_layers": 2, "own_head": True}, "num_layers=1, own_head=false", "num_layers=2, own_head=true"),
    ],
)
def test_options_that_the_loaded_heads_are_not(
    options: dict[str, Any], expected: str, got: str, tmp_path: Path
) -> None:
    drafter = trained(num_heads=3)
    drafter.save(tmp_path)
    said = Medusa(str(tmp_path), **options).fit(target_of(model_of()))
    assert said == (
        f"{expected} (or null), as the weights at {tmp_path} have it; got {got}, which path=new makes new ones with"
    )
    again = fitted(tmp_path, num_heads=3, num_layers=1, own_head=False)
    assert (again.loaded_from, drafter.loaded_from) == (str(tmp_path), None)


def test_output_heads_with_the_targets_bias_round_trip(tmp_path: Path) -> None:
    target = target_of(build("phi"))
    drafter = Medusa("new", num_heads=2, own_head=True)
    assert drafter.fit(target) is None
    shake(heads_of(drafter))
    drafter.save(tmp_path)
    again = Medusa(str(tmp_path))
    assert again.fit(target) is None
    assert heads_of(again).output_bias is not None
    assert_same(heads_of(again), heads_of(drafter))
    with pytest.raises(ValueError, match="layout 'medusa' has no place for the biases"):
        drafter.save(tmp_path, "medusa")


def test_blocks_have_biases_all_or_none(tmp_path: Path) -> None:
    weights = published(2)
    del weights["1.0.linear.bias"]
    assert "expected a key 1.0.linear.bias" in refusal(write(tmp_path, weights, {}, "medusa_lm_head.pt"))


def test_what_learns_has_no_rates_until_it_is_judged(tmp_path: Path) -> None:
    drafter = trained(num_heads=2)
    drafter.acceptance = [[0.5], [0.5]]
    drafter.save(tmp_path / "judged")
    again = fitted(tmp_path / "judged")
    assert again.acceptance == [[0.5], [0.5]]
    again.lesson(target_of(model_of()))
    again.save(tmp_path / "learning")
    assert "acceptance" not in json.loads((tmp_path / "learning" / "config.json").read_text())


def test_learning_heads_are_saved_in_the_targets_dtype(tmp_path: Path) -> None:
    drafter = trained("bfloat16")
    drafter.lesson(target_of(model_of("bfloat16")))
    drafter.save(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert {part.dtype for part in heads_of(drafter).parameters()} == {torch.float32}, "and go on learning in float32"


def test_shared_heads_get_copies_of_the_targets_in_the_first_layout(tmp_path: Path) -> None:
    drafter = trained(num_heads=2)
    drafter.save(tmp_path, "medusa")
    saved = torch.load(tmp_path / "medusa_lm_head.pt", weights_only=True)
    assert saved.keys() == {f"{h}.{rest}" for h in (0, 1) for rest in ("0.linear.weight", "0.linear.bias", "1.weight")}
    assert torch.equal(saved["1.1.weight"], model_of().lm_head.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "org/tiny-base"}
    assert config == expected
    again, states = fitted(tmp_path), torch.randn(3, HIDDEN)
    with torch.no_grad():
        for head in range(2):
            ours, theirs = (heads_of(d).logits_of(head, states, target_of(model_of())) for d in (drafter, again))
            assert torch.equal(ours, theirs)


def test_heads_of_the_demo_target_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    target = target_of(demo_target("bfloat16").model)
    drafter = Medusa("new", num_heads=2)
    assert drafter.fit(target) is None
    drafter.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base_model_name_or_path"] == "specdec/demo/target"
    assert Medusa(str(tmp_path)).fit(target) is None
    assert f"is for specdec/demo/target with hidden_size=256, not {HIDDEN}" in refusal(tmp_path)


def test_layouts_that_have_no_place_for_the_heads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown layout 'hydra' .*known: specdec, medusa, medusa_v2"):
        trained().save(tmp_path, "hydra")
    with pytest.raises(ValueError, match="'medusa_v2' shares the target's output head; these heads have their own"):
        trained(own_head=True).save(tmp_path, "medusa_v2")
    with pytest.raises(ValueError, match="bound to no target"):
        Medusa().save(tmp_path)
    biased = Medusa()
    assert biased.fit(target_of(build("phi"))) is None
    with pytest.raises(ValueError, match="output head of PhiForCausalLM has a bias"):
        biased.save(tmp_path, "medusa")
    assert not list(tmp_path.iterdir())


def test_heads_are_counted_from_the_names(tmp_path: Path) -> None:
    """The published config says 2 where the file has 5; a default tree is no deeper than the heads that are there."""
    weights = published(5)
    write(tmp_path, weights, {"medusa_num_heads": 2, "medusa_num_layers": 1}, "medusa_lm_head.pt")
    drafter = fitted(tmp_path, num_nodes=60)
    heads = heads_of(drafter)
    assert (heads.num_heads, heads.num_layers) == (5, 1)
    assert heads.output is not None
    for head in range(5):
        assert torch.equal(heads.blocks[0].get_parameter("weight")[head], weights[f"{head}.0.linear.weight"])
        assert torch.equal(heads.blocks[0].get_parameter("bias")[head], weights[f"{head}.0.linear.bias"])
        assert torch.equal(heads.output[head], weights[f"{head}.1.weight"])
    write(tmp_path / "two", published(2, own_head=False), {"version": "2"}, "medusa_lm_head.safetensors")
    assert fitted(tmp_path / "two", num_nodes=60).template.topology.max_depth == 2
    reason = str(Medusa(str(tmp_path / "two"), tree="mc_sim_7b_63").fit(target_of(model_of())))
    assert "a tree of at most 2 levels" in reason


def test_tied_blocks_and_heads_without_blocks(tmp_path: Path) -> None:
    """The authors' code stores one shared block once per layer, and knows heads that are a linear map alone."""
    weights = published(2, num_layers=2)
    for head in range(2):
        for part in ("weight", "bias"):
            weights[f"{head}.1.linear.{part}"] = weights[f"{head}.0.linear.{part}"]
    write(tmp_path / "tied", weights, {}, "medusa_lm_head.pt")
    blocks = heads_of(fitted(tmp_path / "tied")).blocks
    assert torch.equal(blocks[0].get_parameter("weight"), blocks[1].get_parameter("weight"))
    assert blocks[0].get_parameter("weight").data_ptr() != blocks[1].get_parameter("weight").data_ptr()
    bare = published(3, num_layers=0)
    write(tmp_path / "bare", bare, {}, "medusa_lm_head.pt")
    heads = heads_of(fitted(tmp_path / "bare"))
    assert heads.output is not None
    assert (heads.num_heads, heads.num_layers) == (3, 0)
    assert torch.equal(heads.output[2], bare["2.0.weight"])


def vllm(num_heads: int, choices: int, outputs: int, bias: bool = True) -> Weights:
    names: dict[str, tuple[int, ...]] = {}
    for head in range(num_heads):
        names[f"blocks.{head}.layers.0.weight"] = (HIDDEN, HIDDEN)
        if bias:
            names[f"blocks.{head}.layers.0.bias"] = (HIDDEN,)
    return random_weights(names | {f"lm_heads.{head}.weight": (choices, HIDDEN) for head in range(outputs)})


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_vllms_layout(prefix: str, tmp_path: Path) -> None:
    config = {"model_type": "medusa", "num_heads": 3, "hidden_size": HIDDEN, "vocab_size": VOCAB}
    weights = vllm(3, VOCAB, 3)
    write(tmp_path, {prefix + name: tensor for name, tensor in weights.items()}, config, "model.safetensors")
    drafter = fitted(tmp_path)
    heads = heads_of(drafter)
    assert heads.output is not None
    assert (heads.num_heads, heads.num_layers) == (3, 1)
    for head in range(3):
        assert torch.equal(heads.blocks[0].get_parameter("weight")[head], weights[f"blocks.{head}.layers.0.weight"])
        assert torch.equal(heads.blocks[0].get_parameter("bias")[head], weights[f"blocks.{head}.layers.0.bias"])
        assert torch.equal(heads.output[head], weights[f"lm_heads.{head}.weight"])
    assert drafter.ignored == []


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllms_one_output_head_for_all(name: str, tmp_path: Path) -> None:
    weights = vllm(3, VOCAB, 1, bias=False)
    weights[name] = weights.pop("lm_heads.0.weight")
    write(tmp_path, weights, {"original_lm_head": True}, "model.safetensors")
    heads = heads_of(fitted(tmp_path))
    assert heads.output is not None
    assert all(torch.equal(output, weights[name]) for output in heads.output)
    assert not heads.blocks[0].get_parameter("bias").any(), "no biases in the file"


@pytest.mark.parametrize("whole", [False, True])
def test_a_part_of_the_vocabulary(whole: bool, tmp_path: Path) -> None:
    """vLLM maps the rows of its output heads to tokens; heads over all tokens are cut down to those rows."""
    tokens = torch.tensor([90, 3, 41, 0, 17, 66, 8, 29, 55, 70, 12])
    weights = vllm(3, VOCAB if whole else len(tokens), 3) | {"token_map": tokens}
    write(tmp_path, weights, {"truncated_vocab_size": len(tokens)}, "model.safetensors")
    drafter, model, inputs = fitted(tmp_path), model_of(), inputs_of(2)
    heads = heads_of(drafter)
    assert heads.output is not None
    rows = weights["lm_heads.1.weight"]
    assert torch.equal(heads.output[1], rows[tokens] if whole else rows)
    trees: list[Any] = []
    specdec.speculate(model, drafter)
    try:
        specdec.speculation_of(model).observers.append(lambda _, step: trees.append(step.tree))
        text = model.generate(**inputs, max_new_tokens=12)
    finally:
        specdec.restore(model)
    assert text.tolist() == model.generate(**inputs, max_new_tokens=12).tolist()
    proposed = {token for tree in trees[1:] for token in tree.token_ids[:, 1:].flatten().tolist()}
    assert proposed <= set(tokens.tolist())
    assert len(proposed) > 5
    with pytest.raises(ValueError, match="part of the vocabulary cannot be trained"):
        drafter.lesson(target_of(model))
    with pytest.raises(ValueError, match="11 of the tokens have no place in layout 'medusa'"):
        drafter.save(tmp_path / "out", "medusa")
    drafter.save(tmp_path / "out")
    again = heads_of(fitted(tmp_path / "out"))
    assert_same(again, heads)
    assert again.token_map is not None
    assert torch.equal(again.token_map, tokens)
    weights["token_map"] = torch.tensor([1, 1, VOCAB])
    write(tmp_path / "bad", weights, {}, "model.safetensors")
    assert f"different tokens below {VOCAB}; got 3 entries, 2 of them different, up to {VOCAB}" in refusal(
        tmp_path / "bad"
    )


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    drafter = trained()
    drafter.save(tmp_path / "ours")
    drafter.save(tmp_path / "public", "medusa_v2")
    for folder in ("ours", "public"):
        config = tmp_path / folder / "config.json"
        config.write_text(config.read_text().replace("org/tiny-base", "other/bigger-base"))
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"base_fingerprint": "another's"}))
        reason = refusal(tmp_path / folder)
        assert "a checkpoint for org/tiny-base; this one is for other/bigger-base" in reason
        config.write_text(config.read_text().replace("other/bigger-base", "/moved/to/Tiny-Base/"))
        fitted(tmp_path / folder)
    config = tmp_path / "ours" / "config.json"
    config.write_text(config.read_text().replace(f'"base_vocab_size": {VOCAB}', '"base_vocab_size": 32000'))
    assert f"with vocab_size=32000, not {VOCAB}" in refusal(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"drafter 'medusa' does not fit LlamaForCausalLM: it needs a checkpoint for"):
        specdec.speculate(model_of(), Medusa(str(tmp_path / "ours")))


def test_wrong_shapes_and_names_are_told(tmp_path: Path) -> None:
    narrow = published(2) | {"1.0.linear.weight": torch.zeros(8, 8)}
    small = published(2) | {"0.1.weight": torch.zeros(VOCAB - 1, HIDDEN)}
    unknown = published(2) | {"1.0.gate.weight": torch.zeros(2)}
    hole = {name: tensor for name, tensor in published(3).items() if not name.startswith("1.")}
    no_head = {name: tensor for name, tensor in published(2).items() if name != "1.1.weight"}
    foreign = {"fc.weight": torch.zeros(2)}
    for name, weights, said in (
        ("narrow", narrow, f"expected 1.0.linear.weight of shape [{HIDDEN}, {HIDDEN}], got [8, 8]"),
        ("small", small, f"expected 0.1.weight of shape [{VOCAB}, {HIDDEN}], got [{VOCAB - 1}, {HIDDEN}]"),
        ("unknown", unknown, "does not know: 1.0.gate.weight"),
        ("hole", hole, "expected a key 1.0.linear.weight"),
        ("no_head", no_head, "expected a key 1.1.weight"),
        ("foreign", foreign, "expected names of Medusa heads such as 0.0.linear.weight; found fc.weight"),
        ("neither", {"0.0.weights": torch.zeros(2)}, "expected blocks or output heads; found neither"),
    ):
        write(tmp_path / name, weights, {}, "medusa_lm_head.pt")
        reason = refusal(tmp_path / name)
        assert reason.startswith("heads that can be read")
        assert said in reason


def test_missing_and_broken_files(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "expected medusa_lm_head.safetensors or medusa_lm_head.pt" in refusal(empty)
    for layout, said in (("medusa", "expected a pickle of tensors alone, whole"), ("medusa_v2", "not a whole safe")):
        trained().save(tmp_path / layout, layout)
        file = tmp_path / layout / FILE_OF[layout]
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
        assert said in refusal(tmp_path / layout)
    old = write(tmp_path / "old", {}, {}, "medusa_lm_head.pt") / "medusa_lm_head.pt"
    torch.save({"0.0.linear.weight": torch.ones(8, 8)}, old, _use_new_zipfile_serialization=False)
    whole = old.read_bytes()
    for length in range(1, len(whole), 7):
        old.write_bytes(whole[:length])
        assert "expected a pickle of tensors alone, whole" in refusal(tmp_path / "old"), length
    evil = write(tmp_path / "evil", {}, {}, "medusa_lm_head.pt")
    torch.save({"0.0.linear.weight": torch.zeros(2), "code": Path("x")}, evil / "medusa_lm_head.pt")
    assert "what needs more is not loaded" in refusal(evil)


@pytest.mark.parametrize("rates", [0.5, [], [[0.5], []], [["0.5"]] * 4, [[0.5]] * 3, [[0.5], [1.5], [0.5], [0.5]]])
def test_accuracies_of_another_shape(rates: Any, tmp_path: Path) -> None:
    trained().save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"acceptance": rates}))
    reason = refusal(tmp_path)
    assert reason.startswith(f"heads that can be read; path={str(tmp_path)!r}: {tmp_path}: expected 'acceptance'")
    assert repr(rates) in reason


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    trained().save(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    assert "config.json: expected a JSON object, got list" in refusal(tmp_path)


def whole_model(folder: Path, suffix: str) -> tuple[Path, Weights]:
    """A sharded Medusa-2 model whose first shard must not be opened: it is not there."""
    heads = {f"medusa_head.{name}": tensor for name, tensor in published(3).items()}
    index = {name: f"model-00002-of-00002{suffix}" for name in heads} | {
        "model.embed_tokens.weight": f"model-00001-of-00002{suffix}",
        "model.norm.weight": f"model-00002-of-00002{suffix}",
    }
    shard = {**heads, "model.norm.weight": torch.ones(HIDDEN)}
    write(folder, shard, {"model_type": "llama", "medusa_num_heads": 5}, f"model-00002-of-00002{suffix}")
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder, heads


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_heads_within_a_whole_model(suffix: str, tmp_path: Path) -> None:
    folder, weights = whole_model(tmp_path / "tiny-base", suffix)
    drafter = fitted(folder)
    heads = heads_of(drafter)
    assert heads.output is not None
    assert heads.num_heads == 3
    assert torch.equal(heads.output[2], weights["medusa_head.2.1.weight"])
    assert sorted(drafter.ignored) == [
        "model.embed_tokens.weight (of the whole model, not of the drafter)",
        "model.norm.weight (of the whole model, not of the drafter)",
    ]
    other, _ = whole_model(tmp_path / "other-model", suffix)
    assert f"those at {other} are part of the model there" in refusal(other)
    assert f"target.path={other}); got org/tiny-base" in refusal(other)


def test_heads_within_a_model_are_not_for_what_it_was_made_from(tmp_path: Path) -> None:
    """A config may go on naming the base of the fine-tuned model; its heads are for what the base has become."""
    folder, _ = whole_model(tmp_path / "tuned", ".safetensors")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/tiny-base"}))
    assert "those at" in refusal(folder)
    model = build("llama")
    model.config._name_or_path = str(folder)
    assert Medusa(str(folder)).fit(target_of(model)) is None


def test_other_drafters_read_all_of_a_folder(tmp_path: Path) -> None:
    folder, weights = whole_model(tmp_path / "tiny-base", ".safetensors")
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002.safetensors is missing"):
        checkpoints.read(str(folder))
    whole = write(tmp_path / "one", weights | {"model.norm.weight": torch.ones(HIDDEN)}, {}, "model.safetensors")
    assert len(checkpoints.read(str(whole)).keys) == len(weights) + 1
    assert not checkpoints.read(str(whole)).in_whole_model
    part = checkpoints.read(str(whole), within_model="medusa_head.")
    assert sorted(part.keys) == sorted(weights)
    assert part.in_whole_model


def test_of_a_hub_model_only_what_is_needed_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, weights = whole_model(tmp_path / "tiny-base", ".safetensors")
    shard = folder / "model-00002-of-00002.safetensors"
    kept = shard.rename(tmp_path / "kept")
    asked: list[list[str]] = []

    def fetch(path: str, allow_patterns: list[str]) -> str:
        assert path == "org/tiny-base"
        asked.append(allow_patterns)
        if shard.name in allow_patterns:
            kept.rename(shard)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    drafter = fitted("org/tiny-base")
    assert heads_of(drafter).num_heads == 3
    assert asked[1:] == [[shard.name]]
    assert set(asked[0]) >= {"config.json", "medusa_lm_head.pt", "model.safetensors.index.json"}
    assert not any("*" in pattern for pattern in asked[0])
    assert len(weights) == 9
