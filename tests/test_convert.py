"""Artifacts in other codecs: the same contents bit for bit, refused with the same words, found under other names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TEXT, SaveModel
from handmade import FULL, altered_file, facts_of, handmade

from kvbuy.artifact import Artifact, write_artifact
from kvbuy.decode import greedy
from kvbuy.errors import DamagedError, ExistsError, PackError, StoreError, UsageError
from kvbuy.manifest import canonical_json, parse_manifest
from kvbuy.models import Model, load_model
from kvbuy.prefill import Precomputed, precompute
from kvbuy.reader import Reader, check_contents, load_state
from kvbuy.recode import convert
from kvbuy.reuse import Conversation, load_document


@pytest.fixture
def raw(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "doc.kv.safetensors", *handmade())


@pytest.fixture
def fast(raw: Artifact) -> Artifact:
    return convert(raw, codec="fast").artifact


def damage(artifact: Artifact, piece: int) -> None:
    """Flip a bit in the middle of an encoded piece."""
    tensor = artifact.manifest.pieces()[piece]
    altered_file(artifact.path, artifact.header_bytes + (tensor.start + tensor.end) // 2)


def test_a_fast_artifact_holds_the_same_contents(raw: Artifact, fast: Artifact) -> None:
    found = Artifact.open(fast.path)
    check_contents(found)
    assert found == fast
    assert found.id != raw.id
    assert found.manifest.with_codec("raw") == raw.manifest
    assert (found.read_tokens(), found.read_text()) == (raw.read_tokens(), raw.read_text())
    blocks = [b"".join(array.tobytes() for array in arrays) for arrays in Reader.open(found).load_blocks()]
    state = [load_state(found, index) for index in range(len(found.manifest.state))]
    assert [*blocks, *state] == handmade()[1][:-2]


def test_raw_again_it_is_the_file_that_it_was(raw: Artifact, fast: Artifact, tmp_path: Path) -> None:
    again = convert(fast, tmp_path / "again.kv.safetensors", codec="raw").artifact
    assert again.path.read_bytes() == raw.path.read_bytes()


def test_the_sizes_say_what_the_file_holds(fast: Artifact) -> None:
    manifest = fast.manifest
    assert fast.path.stat().st_size == fast.header_bytes + manifest.data_bytes()
    assert manifest.data_bytes() == manifest.stored_kv_bytes() + 40 * 4 + 40
    assert manifest.kv_bytes() == 322


def test_the_name_tells_the_codec(raw: Artifact, fast: Artifact) -> None:
    assert fast.path == raw.path.with_name("doc.fast.kv.safetensors")
    assert convert(fast, codec="raw").artifact.path == raw.path.with_name("doc.raw.kv.safetensors")


@pytest.mark.parametrize("piece", [0, 4])
def test_a_piece_too_small_for_what_it_decodes_to_is_refused(fast: Artifact, piece: int) -> None:
    facts = facts_of(fast.manifest)
    least = -(-fast.manifest.decoded_sizes()[piece] // 2)
    facts["codec"]["sizes"][piece] = least - 1
    with pytest.raises(DamagedError, match=f"has {least - 1} bytes, it may have {least} to"):
        parse_manifest(canonical_json(facts))


def test_the_codec_that_it_has_already_is_refused(raw: Artifact, fast: Artifact) -> None:
    for artifact, codec in ((raw, "raw"), (fast, "fast")):
        with pytest.raises(UsageError, match=f"has the codec {codec} already"):
            convert(artifact, codec=codec)  # type: ignore[arg-type]


def test_an_existing_file_is_not_replaced_but_with_force(raw: Artifact, fast: Artifact) -> None:
    with pytest.raises(ExistsError):
        convert(raw, codec="fast")
    assert convert(raw, codec="fast", force=True).artifact == fast


def test_it_may_take_its_own_source_s_place(raw: Artifact) -> None:
    converted = convert(raw, raw.path, codec="fast", force=True).artifact
    check_contents(converted)
    assert list(raw.path.parent.iterdir()) == [raw.path]


@pytest.mark.parametrize("at", [0, 330, 520], ids=["block", "tokens", "text"])
def test_a_damaged_artifact_is_not_converted(at: int, raw: Artifact) -> None:
    altered_file(raw.path, raw.header_bytes + at)
    with pytest.raises(DamagedError, match="does not match its digest"):
        convert(raw, codec="fast")
    assert list(raw.path.parent.iterdir()) == [raw.path]


def test_a_folder_that_is_missing_is_a_store_error(raw: Artifact, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder"):
        convert(raw, tmp_path / "missing" / "doc.kv.safetensors", codec="fast")


@pytest.mark.parametrize(("piece", "what"), [(0, "block 0"), (2, "block 2"), (6, r"state\.2\.recurrent\.0")])
def test_damage_in_a_piece_is_named(piece: int, what: str, fast: Artifact) -> None:
    damage(fast, piece)
    with pytest.raises(DamagedError, match=rf"^doc\.fast\.kv\.safetensors: {what}") as caught:
        check_contents(fast)
    assert caught.value.hint == "fetch it again"


def test_every_flipped_byte_of_a_fast_artifact_is_damage(tmp_path: Path) -> None:
    raw = write_artifact(tmp_path / "doc.kv.safetensors", *handmade(range(2), layers=[FULL]))
    fast = convert(raw, codec="fast").artifact
    silent = []
    for at in range(fast.path.stat().st_size):
        altered_file(fast.path, at)
        try:
            check_contents(Artifact.open(fast.path))
            silent.append(at)
        except DamagedError:
            altered_file(fast.path, at)
    assert silent == []


def test_a_model_s_blocks_get_smaller(llama: Model, tmp_path: Path) -> None:
    made = precompute(TEXT[:200], tmp_path / "a.kv.safetensors", model=llama, name="a.txt", block_size=64, codec="fast")
    manifest = made.artifact.manifest
    assert manifest.codec_name == "fast"
    assert manifest.stored_kv_bytes() < 0.85 * manifest.kv_bytes()


def test_precompute_writes_what_convert_would(made: Precomputed, llama: Model, tmp_path: Path) -> None:
    path = tmp_path / "fast.kv.safetensors"
    fast = precompute(TEXT[:200], path, model=llama, name="doc.txt", block_size=64, codec="fast").artifact
    converted = convert(made.artifact, codec="fast").artifact
    assert fast.manifest.blocks == converted.manifest.blocks
    assert fast.manifest.codec == converted.manifest.codec
    assert fast.path.read_bytes()[fast.header_bytes :] == converted.path.read_bytes()[converted.header_bytes :]


def test_a_codec_that_cannot_be_written_is_refused_before_the_prefill(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBUY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PackError, match="dense needs a pack"):
        precompute(TEXT[:200], tmp_path / "a.kv.safetensors", model=llama, name="a.txt", codec="dense")
    assert list(tmp_path.iterdir()) == []


def sliding() -> transformers.PreTrainedConfig:
    from test_cache import gemma3

    return gemma3()


def recurrent() -> transformers.PreTrainedConfig:
    from test_cache import qwen3_next

    return qwen3_next()


@pytest.mark.parametrize("config", [sliding, recurrent], ids=lambda config: config.__name__)
def test_a_fast_artifact_loads_bit_for_bit(
    config: Callable[[], transformers.PreTrainedConfig], save_model: SaveModel, tmp_path: Path
) -> None:
    model = load_model(str(save_model(config())))
    made = precompute(TEXT[:150], tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=64)
    fast = convert(made.artifact, codec="fast").artifact
    one, other = load_document(made.artifact, model), load_document(fast, model)
    for layer, again in zip(one.cache.layers, other.cache.layers, strict=True):
        if hasattr(layer, "keys"):
            assert torch.equal(layer.keys, again.keys)
            assert torch.equal(layer.values, again.values)
    tokens, logits = greedy(model, one.cache, [65, 66], max_new_tokens=4)
    again_tokens, again_logits = greedy(model, other.cache, [65, 66], max_new_tokens=4)
    assert tokens == again_tokens
    assert torch.equal(logits, again_logits)


def test_a_fast_artifact_in_float32_loads_bit_for_bit(llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(llama_folder), dtype="float32")
    made = precompute(TEXT[:150], tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=64)
    fast = convert(made.artifact, codec="fast").artifact
    for reuse in ("continue", "align"):
        one, other = (load_document(artifact, model, reuse=reuse) for artifact in (made.artifact, fast))  # type: ignore[arg-type]
        assert one.cached_tokens == other.cached_tokens
        for layer, again in zip(one.cache.layers, other.cache.layers, strict=True):
            assert torch.equal(layer.keys, again.keys)
            assert torch.equal(layer.values, again.values)


def test_a_conversation_over_a_fast_artifact_forgets(made: Precomputed, llama: Model) -> None:
    conversation = Conversation(llama, load_document(convert(made.artifact, codec="fast").artifact, llama))
    first = conversation.ask("What then?", max_new_tokens=4)
    conversation.forget()
    assert conversation.ask("What then?", max_new_tokens=4).token_ids == first.token_ids


def test_a_damaged_fast_artifact_does_not_load(made: Precomputed, llama: Model) -> None:
    fast = convert(made.artifact, codec="fast").artifact
    damage(fast, 1)
    with pytest.raises(DamagedError, match="block 1"):
        load_document(fast, llama)
