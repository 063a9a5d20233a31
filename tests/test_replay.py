"""Verdicts end to end: the prefill from scratch really runs in a fresh process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, SaveModel, tiny_llama

from kvbuy.artifact import Artifact, content_digest, write_artifact
from kvbuy.errors import ModelError, UsageError
from kvbuy.manifest import Manifest, chain_blocks
from kvbuy.models import Model
from kvbuy.prefill import Precomputed, precompute
from kvbuy.replay import measure_drift, verify
from kvbuy.verdict import Damaged, Exact, Inexact, Misfit, Replayed, Wrong


def forge(made: Precomputed, change: Callable[[bytearray], None], **parts: Any) -> Artifact:
    """The artifact with other KV bytes, and a manifest that vouches for them: digests, chain and id fixed up."""
    manifest = made.artifact.manifest
    raw = bytearray(made.artifact.path.read_bytes()[made.artifact.header_bytes :])
    change(raw)
    spans = [manifest.block_span(index) for index in range(len(manifest.blocks))]
    digests = [content_digest([raw[start:end]]) for start, end in spans]
    manifest = Manifest.model_validate(manifest.model_copy(update=parts).model_dump())
    tokens = made.artifact.read_tokens()
    blocks = chain_blocks(tokens, fingerprint=manifest.fingerprint, profile=manifest.profile, digests=digests)
    return write_artifact(made.artifact.path, manifest.model_copy(update={"blocks": blocks}), [raw], force=True)


def flip_value_sign(raw: bytearray) -> None:
    """The sign of one value vector of the first block's first layer: 64 tokens, 2 heads, 16 dims."""
    for at in range(64 * 2 * 16 * 2 + 1, 64 * 2 * 16 * 2 + 33, 2):
        raw[at] ^= 0x80


def test_an_honest_artifact_is_exact(made: Precomputed, llama_folder: Path) -> None:
    steps: set[str] = set()
    verdict = verify(made.artifact.path, model=str(llama_folder), progress=lambda step, *_: steps.add(step))
    assert isinstance(verdict, Exact)
    assert verdict.exact.holds
    assert (verdict.exact.blocks_equal, verdict.exact.tokens_equal, verdict.exact.max_abs_logit_diff) == (4, 24, 0.0)
    assert set(verdict.drift) == {"continue", "align"}
    assert steps == {"from scratch", "single pass", "aligned reuse"}


def test_a_recurrent_model_is_exact_and_has_no_aligned_reuse(save_model: SaveModel, tmp_path: Path) -> None:
    import transformers
    from test_cache import COMMON

    from kvbuy.models import load_model

    kinds = ["conv", "full_attention"]
    folder = save_model(transformers.Lfm2Config(**COMMON, num_hidden_layers=2, layer_types=kinds))
    made = precompute(
        TEXT[:100], tmp_path / "a.kv.safetensors", model=load_model(str(folder)), name="a.txt", block_size=64
    )
    verdict = verify(made.artifact, model=str(folder), prompt="What then?", max_new_tokens=4)
    assert isinstance(verdict, Exact)
    assert (verdict.exact.state_equal, verdict.exact.tokens) == (1, 4)
    assert set(verdict.drift) == {"continue"}


def test_a_forged_block_with_every_digest_fixed_up_is_wrong(made: Precomputed, llama_folder: Path) -> None:
    verdict = verify(forge(made, flip_value_sign), model=str(llama_folder))
    assert isinstance(verdict, Wrong)
    assert verdict.exact is not None
    assert (verdict.exact.blocks_equal, verdict.exact.blocks, verdict.exit_code) == (3, 4, 3)


def test_a_forged_receipt_is_wrong(made: Precomputed, llama_folder: Path) -> None:
    receipt = made.artifact.manifest.receipt.model_copy(update={"logits": "0" * 64})
    verdict = verify(forge(made, lambda raw: None, receipt=receipt), model=str(llama_folder))
    assert isinstance(verdict, Wrong)
    assert verdict.exact is not None
    assert (verdict.exact.blocks_equal, verdict.exact.receipt_equal) == (4, False)


def test_a_receipt_for_other_rows_than_its_prompt_s_is_wrong(made: Precomputed, llama_folder: Path) -> None:
    receipt = made.artifact.manifest.receipt.model_copy(update={"prompt_tokens": (10**9,)})
    verdict = verify(forge(made, lambda raw: None, receipt=receipt), model=str(llama_folder), quick=True)
    assert verdict == Wrong(reason="its receipt's token ids are not those of its prompt", exact=None, drift={})


@pytest.mark.parametrize("quick", [True, False])
def test_layers_that_the_model_does_not_make_are_wrong(made: Precomputed, llama_folder: Path, quick: bool) -> None:
    """The same bytes said to be one head of twice the width."""
    layers = tuple(layer.model_copy(update={"heads": 1, "key_dim": 32, "value_dim": 32}) for layer in made_layers(made))
    verdict = verify(forge(made, lambda raw: None, layers=layers), model=str(llama_folder), quick=quick)
    assert verdict == Wrong(reason="the artifact's layers are not those that this model makes", exact=None, drift={})


def made_layers(made: Precomputed) -> tuple[Any, ...]:
    return made.artifact.manifest.layers


def test_files_of_the_current_folder_are_not_run(
    made: Precomputed, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "safetensors.py").write_text("raise SystemExit('run')")
    assert isinstance(verify(made.artifact, model=str(llama_folder)), Exact)


def test_another_document_s_blocks_under_this_text_are_wrong(
    made: Precomputed, llama: Model, llama_folder: Path, tmp_path: Path
) -> None:
    other = precompute(TEXT[200:400], tmp_path / "other.kv.safetensors", model=llama, name="o.txt", block_size=64)
    kv = other.artifact.path.read_bytes()[other.artifact.header_bytes :][: other.artifact.manifest.kv_bytes()]

    def swap(raw: bytearray) -> None:
        raw[: len(kv)] = kv

    verdict = verify(forge(made, swap), model=str(llama_folder))
    assert isinstance(verdict, Wrong)
    assert verdict.exact is not None
    assert verdict.exact.blocks_equal == 0


def test_token_ids_that_are_not_the_text_s_are_wrong(made: Precomputed, llama_folder: Path) -> None:
    manifest = made.artifact.manifest
    text = TEXT[1:201].encode()
    document = manifest.document.model_copy(update={"text_digest": content_digest([text])})

    def rewrite(raw: bytearray) -> None:
        raw[-200:] = text

    verdict = verify(forge(made, rewrite, document=document), model=str(llama_folder))
    assert verdict == Wrong(reason="its token ids are not those of its text", exact=None, drift={})


def test_other_bits_under_another_profile_are_inexact(made: Precomputed, llama_folder: Path) -> None:
    profile = made.artifact.manifest.profile.model_copy(update={"processor": "another"})
    verdict = verify(forge(made, flip_value_sign, profile=profile), model=str(llama_folder))
    assert isinstance(verdict, Inexact)
    assert verdict.profile[0].startswith("processor: artifact another, here ")
    assert verdict.exit_code == 3


def test_equal_bits_under_another_profile_are_exact(made: Precomputed, llama_folder: Path) -> None:
    profile = made.artifact.manifest.profile.model_copy(update={"processor": "another"})
    assert isinstance(verify(forge(made, lambda raw: None, profile=profile), model=str(llama_folder)), Exact)


def test_quick_replays_the_receipt_and_says_only_that(made: Precomputed, llama_folder: Path) -> None:
    assert verify(made.artifact, model=str(llama_folder), quick=True) == Replayed(tokens=24)


def test_quick_takes_no_prompt_of_one_s_own(made: Precomputed) -> None:
    with pytest.raises(UsageError, match="replays the receipt's own prompt"):
        verify(made.artifact, quick=True, prompt="What then?")


def test_quick_on_a_forged_receipt_is_wrong(made: Precomputed, llama_folder: Path) -> None:
    receipt = made.artifact.manifest.receipt.model_copy(update={"logits": "0" * 64})
    verdict = verify(forge(made, lambda raw: None, receipt=receipt), model=str(llama_folder), quick=True)
    assert isinstance(verdict, Wrong)


def test_a_damaged_artifact_needs_no_model(made: Precomputed) -> None:
    raw = bytearray(made.artifact.path.read_bytes())
    raw[-1] ^= 1
    made.artifact.path.write_bytes(raw)
    verdict = verify(made.artifact.path, model="no/such-model")
    assert verdict == Damaged(reason="doc.kv.safetensors: text does not match its digest")


def test_another_model_is_a_misfit(made: Precomputed, save_model: SaveModel) -> None:
    verdict = verify(made.artifact, model=str(save_model(tiny_llama(rope_theta=5000.0))))
    assert isinstance(verdict, Misfit)
    assert [difference.split(":")[0] for difference in verdict.differences] == ["config"]


def test_a_model_that_cannot_be_found_is_an_error_not_a_verdict(made: Precomputed, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        verify(made.artifact)
    assert "give --model the folder or Hub id" in str(caught.value.hint)


def test_drift_of_equal_logits_is_zero() -> None:
    logits = torch.randn(3, 10)
    drift = measure_drift(([1, 2, 3], logits), ([1, 2, 3], logits))
    assert (drift.max_abs_logit_diff, drift.kl, drift.tokens_equal, drift.first_divergence) == (0.0, 0.0, 3, None)


def test_drift_counts_steps_up_to_the_first_divergence() -> None:
    wanted, found = torch.zeros(3, 4), torch.zeros(3, 4)
    found[1, 0], found[2, 0] = 0.5, 9.0  # the third step had another context: it does not count
    drift = measure_drift(([1, 2, 3], wanted), ([1, 0, 3], found))
    assert (drift.max_abs_logit_diff, drift.tokens_equal, drift.first_divergence) == (0.5, 2, 1)
    p, q = wanted[1].log_softmax(-1).double(), found[1].double().log_softmax(-1)
    assert drift.kl == pytest.approx(float((p.exp() * (p - q)).sum()))
