"""States of the frozen target: packed texts are each text alone, what is on disk is what was computed."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import default_collate

from pupils import LENGTH, Rows, target_of
from specdec.commands._texts import Texts, with_states
from specdec.identity import fingerprint
from specdec.interfaces import Tap
from specdec.training import features
from specdec.training.features import CachedTexts, Frozen, check_packed, size

TAPS: tuple[Tap, ...] = (0, 2, 4, "final")
ROW = len(TAPS) * 32 * 4 * LENGTH  # bytes


def silent(_: int) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_packed_texts_are_each_text_alone(family: str) -> None:
    target = target_of(family)
    check_packed(target)
    frozen = Frozen(target, TAPS)
    row = Rows(1)[0]
    token_ids, positions = row["token_ids"][None], row["positions"][None]
    packed = frozen(token_ids, positions)
    assert packed.keys() == set(TAPS)
    starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), LENGTH]
    assert len(starts) == 5, "three texts and the padding"
    for first, last in zip(starts, starts[1:], strict=False):
        alone = frozen(token_ids[:, first:last], torch.arange(last - first)[None])
        for tap in TAPS:
            torch.testing.assert_close(packed[tap][:, first:last], alone[tap], rtol=1e-4, atol=1e-4)


def test_states_are_those_of_the_model_and_carry_no_gradient() -> None:
    target = target_of()
    ids = torch.arange(1, 11)[None]
    whole = target.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    states = Frozen(target, TAPS)(ids, torch.arange(10)[None])
    torch.testing.assert_close(target.head(states["final"]), whole.logits)
    torch.testing.assert_close(states[2], whole.hidden_states[2])
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in states.values())
    low = Frozen(target, (2,))(ids, torch.arange(10)[None])
    assert torch.equal(low[2], states[2]), "the layers above the last tap are of no consequence"
    assert Frozen(target, ())(ids, torch.arange(10)[None]) == {}


def test_layers_that_nobody_asks_for_do_not_run() -> None:
    target, ran = target_of(), []
    for index, layer in enumerate(target.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))  # type: ignore[union-attr]
    Frozen(target, (0, 2))(torch.ones(1, 4, dtype=torch.int64), torch.arange(4)[None])
    assert ran == [0, 1]


def test_a_model_that_mixes_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of()
    forward = target.model.forward
    mixing = lambda input_ids, position_ids, **options: forward(input_ids=input_ids, **options)  # noqa: ARG005, E731
    monkeypatch.setattr(target.model, "forward", mixing)
    with pytest.raises(ValueError, match="lets texts that are packed into one row see each other"):
        check_packed(target)


def test_cached_states_are_the_computed_ones(tmp_path: Path) -> None:
    frozen, rows, told = Frozen(target_of(), TAPS), Rows(7), list[int]()
    cached = CachedTexts(rows, frozen, tmp_path / "states", shard_bytes=3 * ROW)
    assert cached.row_bytes == ROW
    assert (cached.rows_per_shard, cached.missing, cached.missing_rows) == (3, [0, 1, 2], 7)
    assert cached.num_bytes == cached.missing_bytes == 7 * ROW
    cached.fill(2, told.append)
    assert told == [2, 1, 2, 1, 1]
    assert cached.missing == []
    for first, last in ((0, 2), (2, 3), (3, 5), (5, 6), (6, 7)):
        batch = default_collate([cached[index] for index in range(first, last)])
        computed = frozen(batch["token_ids"], batch["positions"])
        assert batch["states"].keys() == set(TAPS)
        for tap in TAPS:
            assert torch.equal(batch["states"][tap], computed[tap])
    assert torch.equal(cached[4]["wanted"], rows[4]["wanted"])
    index = json.loads((tmp_path / "states" / "index.json").read_text())
    assert index["taps"] == ["0", "2", "4", "final"]
    assert (index["rows"], index["rows_per_shard"], index["dtype"]) == (7, 3, "float32")
    assert sum(file.stat().st_size for file in (tmp_path / "states").glob("shard-*")) == pytest.approx(7 * ROW, rel=0.1)


def test_states_in_half_precision_stay_so(tmp_path: Path) -> None:
    frozen = Frozen(target_of(dtype=torch.bfloat16), ("final",))
    cached = CachedTexts(Rows(2), frozen, tmp_path)
    cached.fill(2, silent)
    assert cached[1]["states"]["final"].dtype == torch.bfloat16
    assert frozen.bytes_per_token == 64


def test_an_interrupted_cache_goes_on(tmp_path: Path) -> None:
    rows, calls = Rows(7), 0

    def interrupted(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    target = target_of()
    with pytest.raises(KeyboardInterrupt):
        CachedTexts(rows, Frozen(target, TAPS), tmp_path, shard_bytes=3 * ROW).fill(3, interrupted)
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    before = (tmp_path / "shard-00001.safetensors").stat().st_mtime_ns
    (tmp_path / "shard-00000.safetensors").write_bytes(b"cut")
    again, made = CachedTexts(rows, Frozen(target, TAPS), tmp_path, shard_bytes=99 * ROW), list[int]()
    assert again.rows_per_shard == 3, "as the folder has it, whatever is asked for"
    assert again.missing == [0, 2]
    again.fill(3, made.append)
    assert made == [3, 1]
    assert (tmp_path / "shard-00001.safetensors").stat().st_mtime_ns == before


def test_a_full_disk_leaves_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = features.write_shard

    def full(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if "00001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    cached = CachedTexts(Rows(7), Frozen(target_of(), TAPS), tmp_path, shard_bytes=3 * ROW)
    monkeypatch.setattr(features, "write_shard", full)
    with pytest.raises(OSError, match=r"disk is full; finished shards in .* are kept: free some space"):
        cached.fill(4, silent)
    monkeypatch.setattr(features, "write_shard", write)
    assert cached.missing == [1, 2]
    cached.fill(4, silent)
    assert cached.missing == []


def test_half_a_shard_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(self: Path, data: Any) -> int:
        write(self, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        features.write_shard(tmp_path / "shard-00000.safetensors", {"a": torch.zeros(9)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [0, 4, 40, -8])
def test_a_shard_that_lost_its_end_is_made_again(left: int, tmp_path: Path) -> None:
    """The file system may give back less than it took: within the header, behind it, a little before the end."""
    frozen = Frozen(target_of(), TAPS)
    cached = CachedTexts(Rows(7), frozen, tmp_path, shard_bytes=3 * ROW)
    cached.fill(4, silent)
    expected = [cached[row]["states"]["final"].clone() for row in range(7)]  # not views of a file about to change
    file = tmp_path / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    again = CachedTexts(Rows(7), frozen, tmp_path, shard_bytes=3 * ROW)
    assert again.missing == [1]
    again.fill(4, silent)
    for row, states in enumerate(expected):
        assert torch.equal(again[row]["states"]["final"], states)


def test_too_little_room_is_said_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, told = CachedTexts(Rows(7), Frozen(target_of(), TAPS), tmp_path), list[int]()
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=f"need {size(7 * ROW)} in .*, where 1 kB are free.*features.mode=online"):
        cached.fill(4, told.append)
    assert told == []


def test_others_states_are_refused(tmp_path: Path) -> None:
    target = target_of()
    CachedTexts(Rows(3), Frozen(target, TAPS), tmp_path).fill(3, silent)
    other = target_of()
    with torch.no_grad():
        other.layers[3].mlp.down_proj.weight.add_(0.1)  # type: ignore[union-attr, operator]
    for rows, frozen, what in (
        (Rows(3, seed=5), Frozen(target, TAPS), "texts: "),
        (Rows(3), Frozen(target, ("final",)), r"taps: \['0', '2', '4', 'final'\] -> \['final'\]"),
        (Rows(3), Frozen(other, TAPS), "target: "),
    ):
        with pytest.raises(ValueError, match=f"states of another run .*{what}.*features.overwrite=true"):
            CachedTexts(rows, frozen, tmp_path)
    assert CachedTexts(Rows(3), Frozen(target, TAPS), tmp_path).missing == []
    anew = CachedTexts(Rows(3, seed=5), Frozen(target, TAPS), tmp_path, overwrite=True)
    assert anew.missing == [0]


def test_what_a_kill_left_half_written_goes_away(tmp_path: Path) -> None:
    left = tmp_path / ".shard-00000.safetensors.4711"
    left.write_bytes(b"half")
    CachedTexts(Rows(3), Frozen(target_of(), TAPS), tmp_path).fill(3, silent)
    assert not left.exists()
    left.write_bytes(b"half")
    CachedTexts(Rows(3, seed=5), Frozen(target_of(), TAPS), tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_both_sides_must_fit_before_the_first_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, console = Texts(Rows(7), Rows(3, seed=1), {}), Console(quiet=True)
    usage = type("usage", (), {"free": 8 * ROW})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    options = {"mode": "cached", "path": str(tmp_path), "shard_mb": 1, "overwrite": False}
    with pytest.raises(ValueError, match=f"need {size(10 * ROW)} in .*, where {size(8 * ROW)} are free"):
        with_states(both, Frozen(target_of(), TAPS), options, 2, console)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows_per_shard": "3"}'])
def test_an_index_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="index.json is no index of states; use another features.path=FOLDER"):
            CachedTexts(Rows(7), Frozen(target_of(), TAPS), tmp_path, overwrite=overwrite)
    assert (tmp_path / "index.json").read_text() == content


def test_a_fingerprint_knows_a_model_from_its_finetune() -> None:
    target = target_of()
    first = fingerprint(target)
    assert fingerprint(target_of()) == first
    with torch.no_grad():
        target.layers[1].self_attn.q_proj.weight.mul_(1.01)  # type: ignore[union-attr, operator]
    assert fingerprint(target) != first


def test_sizes() -> None:
    assert [size(number) for number in (12, 1500, 2_000_000, 3.25e9, 5e12)] == [  # type: ignore[arg-type]
        "12 bytes",
        "1.5 kB",
        "2 MB",
        "3.25 GB",
        "5 TB",
    ]
