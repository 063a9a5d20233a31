"""The whole job on real weights: SmolLM2-135M in bf16, with a last block that is full and one that is short."""

from pathlib import Path

import pytest

from kvbuy.models import Model
from kvbuy.prefill import precompute
from kvbuy.replay import verify
from kvbuy.verdict import Drift, Exact

NO_DRIFT = Drift(max_abs_logit_diff=0.0, kl=0.0, tokens_equal=24, tokens=24, first_divergence=None)


def cut(model: Model, text: str, tokens: int) -> str:
    """The beginning of a text that has just so many tokens."""
    ids = model.tokenizer(text)["input_ids"][:tokens]
    beginning: str = model.tokenizer.decode(ids)
    assert model.tokenizer(beginning)["input_ids"] == ids
    return beginning


@pytest.mark.real
def test_reuse_is_exact_and_aligned_reuse_is_a_single_pass(smollm2: Model, long_text: str, tmp_path: Path) -> None:
    text = cut(smollm2, long_text, 700)  # a full block and a short one
    made = precompute(text, tmp_path / "doc.kv.safetensors", model=smollm2, name="doc.txt")
    verdict = verify(made.artifact)
    assert isinstance(verdict, Exact)
    assert (verdict.exact.blocks_equal, verdict.exact.blocks) == (2, 2)
    assert (verdict.exact.tokens_equal, verdict.exact.max_abs_logit_diff) == (24, 0.0)
    assert verdict.drift["align"] == NO_DRIFT


@pytest.mark.real
def test_a_chat_document_is_exact(smollm2: Model, long_text: str, tmp_path: Path) -> None:
    text = cut(smollm2, long_text, 100)
    made = precompute(text, tmp_path / "doc.kv.safetensors", model=smollm2, name="doc.txt", chat=True)
    verdict = verify(made.artifact, prompt="What is an assignment?")
    assert isinstance(verdict, Exact)
    assert verdict.drift["align"] == NO_DRIFT
