"""Loading targets: the embedded one, a folder, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdec.loading import DEMO_FOLDER, Loaded, demo_target, hf_target


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return demo_target("float32")


def test_the_embedded_target(demo: Loaded) -> None:
    assert demo.name == "demo"
    assert demo.model.dtype == torch.float32
    assert not demo.model.training
    assert demo_target().model.dtype == torch.bfloat16


def test_a_local_folder_loads_as_any_model_would(demo: Loaded) -> None:
    other = hf_target(str(DEMO_FOLDER), dtype="float32", attn_implementation="eager")
    assert other.model.config._attn_implementation == "eager"
    assert other.name == "target"
    ids = other.encode("What is 2 + 3?")
    assert torch.equal(ids, demo.encode("What is 2 + 3?"))
    with torch.no_grad():
        torch.testing.assert_close(other.model(ids).logits, demo.model(ids).logits, atol=1e-3, rtol=1e-3)


def test_chat_template_or_plain_text(demo: Loaded) -> None:
    text = "def f(x):"
    plain, chat = demo.encode(text, chat=False)[0].tolist(), demo.encode(text)[0].tolist()
    assert demo.tokenizer.decode(plain) == text
    assert len(chat) > len(plain)
    assert text in demo.tokenizer.decode(chat)


def test_without_a_chat_template(demo: Loaded) -> None:
    bare = Loaded(demo.model, hf_target(str(DEMO_FOLDER)).tokenizer, "bare")
    bare.tokenizer.chat_template = None
    assert torch.equal(bare.encode("x + 1"), demo.encode("x + 1", chat=False))
    with pytest.raises(ValueError, match="no chat template"):
        bare.encode("x", chat=True)


def test_prompts_that_are_refused(demo: Loaded) -> None:
    with pytest.raises(ValueError, match="empty"):
        demo.encode("", chat=False)
    with pytest.raises(ValueError, match=f"reads at most {demo.context_length}"):
        demo.encode("word " * 3000)


@pytest.mark.parametrize("dtype", ["float99", "Tensor"])
def test_unknown_dtypes(dtype: str) -> None:
    with pytest.raises(ValueError, match="expected auto, float32"):
        demo_target(dtype)


def test_missing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="names no folder"):
        hf_target(str(tmp_path / "nothing"))
    monkeypatch.setattr("specdec.loading.DEMO_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="train_demo_target"):
        demo_target()
