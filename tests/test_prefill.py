from pathlib import Path

import pytest
import torch
from conftest import TEXT

from kvbuy.artifact import Artifact
from kvbuy.cache import empty_cache
from kvbuy.decode import greedy
from kvbuy.errors import DocumentError, ExistsError
from kvbuy.models import Model
from kvbuy.prefill import RECEIPT_TOKENS, Precomputed, logits_digest, precompute, prefill
from kvbuy.reader import check_contents


def test_the_artifact_holds_the_document(made: Precomputed, llama: Model) -> None:
    artifact = Artifact.open(made.artifact.path)
    check_contents(artifact)
    assert artifact.read_text() == TEXT[:200]
    assert artifact.read_tokens() == tuple(llama.tokenizer(TEXT[:200])["input_ids"])
    assert [block.tokens for block in artifact.manifest.blocks] == [64, 64, 64, 8]


def test_a_block_s_bits_depend_only_on_the_tokens_up_to_its_end(llama: Model) -> None:
    ids = llama.tokenizer(TEXT[:300])["input_ids"]
    digests = []
    for end in (300, 200, 128):
        cache = empty_cache(llama.model.config, capacity=300)
        digests.append(prefill(llama, ids[:end], cache, block_size=64))
    assert digests[0][:3] == digests[1][:3]
    assert digests[0][:2] == digests[2]


def test_equal_prefixes_of_different_documents_have_equal_blocks(llama: Model, tmp_path: Path) -> None:
    made = [
        precompute(text, tmp_path / f"{at}.kv.safetensors", model=llama, name="doc.txt", block_size=64)
        for at, text in enumerate((TEXT[:200], TEXT[:150] + "and so on"))
    ]
    first, second = (one.artifact.manifest.blocks for one in made)
    assert first[:2] == second[:2]
    assert first[2].id != second[2].id


def test_two_runs_give_the_same_artifact_but_for_its_date(made: Precomputed, llama: Model, tmp_path: Path) -> None:
    again = precompute(TEXT[:200], tmp_path / "b.kv.safetensors", model=llama, name="doc.txt", block_size=64)
    dates = {"created": made.artifact.manifest.created}
    assert again.artifact.manifest.model_copy(update=dates) == made.artifact.manifest


def test_the_receipt_is_the_greedy_continuation_of_a_fresh_prefill(made: Precomputed, llama: Model) -> None:
    receipt = made.artifact.manifest.receipt
    cache = empty_cache(llama.model.config, capacity=300)
    prefill(llama, made.artifact.read_tokens(), cache, block_size=64)
    tokens, logits = greedy(llama, cache, receipt.prompt_tokens, max_new_tokens=RECEIPT_TOKENS)
    assert (tuple(tokens), logits_digest(logits)) == (receipt.tokens, receipt.logits)


def test_progress_counts_tokens(llama: Model, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    precompute(
        TEXT[:150],
        tmp_path / "a.kv.safetensors",
        model=llama,
        name="a.txt",
        block_size=64,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(64, 150), (128, 150), (150, 150)]


def test_an_existing_artifact_is_kept_without_force(made: Precomputed, llama: Model) -> None:
    before = made.artifact.path.read_bytes()
    with pytest.raises(ExistsError, match="is there already"):
        precompute(TEXT[:100], made.artifact.path, model=llama, name="doc.txt")
    assert made.artifact.path.read_bytes() == before


def test_force_replaces_an_existing_artifact(made: Precomputed, llama: Model) -> None:
    precompute(TEXT[:100], made.artifact.path, model=llama, name="doc.txt", force=True)
    assert Artifact.open(made.artifact.path).read_text() == TEXT[:100]


def test_a_document_longer_than_the_context_is_refused_before_prefill(llama: Model, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="2048 tokens"):
        precompute("x" * 2048, tmp_path / "a.kv.safetensors", model=llama, name="a.txt")
    assert list(tmp_path.iterdir()) == []


def test_no_local_path_is_written_into_an_artifact(made: Precomputed, llama_folder: Path) -> None:
    raw = made.artifact.path.read_bytes()
    assert str(llama_folder.parent).encode() not in raw
    assert str(made.artifact.path.parent).encode() not in raw


def test_a_document_s_dtype_and_layers_are_described(made: Precomputed) -> None:
    manifest = made.artifact.manifest
    assert manifest.fingerprint.dtype == "BF16"
    assert manifest.layers[0].model_dump() == {"kind": "full", "heads": 2, "key_dim": 16, "value_dim": 16}
    assert manifest.kv_bytes() == 200 * 2 * 2 * (16 + 16) * torch.bfloat16.itemsize


def test_ctrl_c_leaves_nothing_behind(llama: Model, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(
            TEXT[:200],
            tmp_path / "a.kv.safetensors",
            model=llama,
            name="a.txt",
            block_size=64,
            progress=interrupt,
        )
    assert list(tmp_path.iterdir()) == []
