"""The format law, clause by clause: what is written is canonical, what is not is refused, and block ids are a chain."""

import hashlib
import json
import struct

import pytest
from handmade import FINGERPRINT, FULL, PROFILE, RECURRENT, SLIDING, changed, facts_of, handmade

from kvbuy.errors import DamagedError
from kvbuy.manifest import (
    Block,
    Fingerprint,
    Profile,
    canonical_json,
    chain_blocks,
    parse_manifest,
    window_rows,
)

MANIFEST = handmade()[0]
FACTS = facts_of(MANIFEST)
STATE = FACTS["state"]
GOLDEN_ID = "78ced3071400f2269f0db753a10cc9e748a950e7b3ed13887a1c9299aac3022c"  # the tokens 0 to 15


def chain(tokens: list[int], *, fingerprint: Fingerprint = FINGERPRINT, profile: Profile = PROFILE) -> list[str]:
    digests = ["0" * 64] * -(-len(tokens) // 16)
    return [block.id for block in chain_blocks(tokens, fingerprint=fingerprint, profile=profile, digests=digests)]


def test_canonical_json_is_stable_under_key_order() -> None:
    one, other = {"b": 1, "a": {"d": [1, "é"], "c": None}}, {"a": {"c": None, "d": [1, "é"]}, "b": 1}
    assert canonical_json(one) == canonical_json(other) == '{"a":{"c":null,"d":[1,"é"]},"b":1}'.encode()


def test_canonical_json_escapes_as_rfc_8785_does() -> None:
    assert (
        canonical_json('\x00\b\t\n\f\r\x1f"\\/\x7f\u2028€')
        == '"\\u0000\\b\\t\\n\\f\\r\\u001f\\"\\\\/\x7f\u2028€"'.encode()
    )


def test_a_parsed_manifest_writes_the_same_bytes() -> None:
    assert parse_manifest(MANIFEST.canonical()) == MANIFEST
    assert parse_manifest(MANIFEST.canonical()).canonical() == MANIFEST.canonical()


def test_the_id_is_the_sha256_of_the_manifest_s_bytes() -> None:
    assert MANIFEST.sha256() == hashlib.sha256(canonical_json(FACTS)).hexdigest()


def test_a_newer_version_is_refused_with_the_advice_to_upgrade() -> None:
    newer = canonical_json(changed(FACTS, "version", 2) | {"novelty": True})
    with pytest.raises(DamagedError, match="format version 2, this kvbuy reads up to 1") as caught:
        parse_manifest(newer)
    assert caught.value.hint == "upgrade it: pip install -U kvbuy"


def test_a_version_of_five_thousand_digits_is_refused() -> None:
    with pytest.raises(DamagedError, match="the manifest breaks the format law"):
        parse_manifest(b'{"version":' + b"9" * 5000 + b"}")


UNLAWFUL = {
    "version zero": ("version", 0, "at version: Input should be"),
    "another format": ("format", "kvsell", "at format: Input should be 'kvbuy'"),
    "unknown key": ("novelty", 1, "at novelty: Extra inputs are not permitted"),
    "unknown key deep inside": ("blocks.0.novelty", 1, r"at blocks\.0\.novelty: Extra inputs are not permitted"),
    "float instead of int": ("document.tokens", 40.0, r"at document\.tokens: Input should be a valid integer"),
    "true instead of int": ("document.tokens", True, r"at document\.tokens: Input should be a valid integer"),
    "a version with a point": ("version", 1.0, "not canonical JSON"),
    "a version that is true": ("version", True, "not canonical JSON"),
    "int instead of bool": ("document.chat", 0, r"at document\.chat: Input should be a valid boolean"),
    "null instead of text": ("producer", None, "at producer: Input should be a valid string"),
    "unknown codec": ("codec", "zip", 'at codec: a codec must be "raw" or an object'),
    "unknown layer kind": ("layers.2.kind", "magic", r"at layers\.2: .*tag 'magic'"),
    "unknown dtype": ("fingerprint.dtype", "F64", r"at fingerprint\.dtype: Input should be 'F32', 'F16' or 'BF16'"),
    "name with a folder": ("document.name", "a/b.txt", r"at document\.name: String should match pattern"),
    "name with a parent folder": ("document.name", "..\\b.txt", r"at document\.name: String should match pattern"),
    "name with a drive": ("document.name", "C:b.txt", r"at document\.name: String should match pattern"),
    "name ending in a newline": ("document.name", "b.txt\n", r"at document\.name: String should match pattern"),
    "empty name": ("document.name", "", r"at document\.name: String should have at least 1 character"),
    "long name": ("document.name", "b" * 201, r"at document\.name: String should have at most 200 characters"),
    "NUL in a label": ("model.name", "a\0b", r"at model\.name: String should match pattern"),
    "escape sequence in a label": ("producer", "\x1b[2J", "at producer: String should match pattern"),
    "label ending in a newline": ("producer", "hand\n", "at producer: String should match pattern"),
    "digest in capitals": ("receipt.logits", "A" * 64, r"at receipt\.logits: String should match pattern"),
    "digest ending in a newline": ("receipt.logits", "4" * 64 + "\n", r"at receipt\.logits: String should match"),
    "date without a zone": ("created", "2026-01-02T03:04:05", "at created: String should match pattern"),
    "date in other digits": ("created", "\u0662026-01-02T03:04:05Z", "at created: String should match pattern"),
    "block size not aligned": ("profile.block_size", 17, r"at profile\.block_size: .* multiple of 16"),
    "wrong block sizes": ("blocks.0.tokens", 15, "every block but the last must hold 16 tokens"),
    "last block too large": ("blocks.2.tokens", 17, "every block but the last must hold 16 tokens"),
    "blocks that miss a token": ("blocks.2.tokens", 7, "blocks hold 39 tokens, the document 40"),
    "empty block": ("blocks.2.tokens", 0, r"at blocks\.2\.tokens: Input should be greater than or equal to 1"),
    "no blocks": ("blocks", [], "at blocks: Tuple should have at least 1 item"),
    "no layers": ("layers", [], "at layers: Tuple should have at least 1 item"),
    "no tokens in the receipt": ("receipt.tokens", [], r"at receipt\.tokens: Tuple should have at least 1 item"),
    "negative token in the receipt": ("receipt.tokens", [-1], r"at receipt\.tokens\.0: .* greater than or equal to 0"),
    "state of a full layer": ("layers.2", FULL, r"layer 2 \(full\) holds state"),
    "key of a full layer": ("layers.1", FULL, r"layer 1 \(full\) cannot hold 'key'"),
    "key of a recurrent layer": ("layers.1", RECURRENT, r"layer 1 \(recurrent\) cannot hold 'key'"),
    "convolution of a sliding layer": ("layers.2", SLIDING, r"layer 2 \(sliding\) cannot hold 'conv\.0'"),
    "sliding layer without state": ("layers.0", SLIDING, "layer 0 must hold key and value with 11 rows each"),
    "sliding layer without key": ("state", STATE[1:], "layer 1 must hold key and value with 11 rows each"),
    "sliding layer without value": ("state", [STATE[0], *STATE[2:]], "layer 1 must hold key and value with 11 rows"),
    "sliding layer with too few rows": ("state.0.shape", [1, 10, 1], "layer 1 must hold key and value with 11 rows"),
    "sliding layer of two dimensions": ("state.0.shape", [1, 11], "layer 1 must hold key and value with 11 rows each"),
    "recurrent layer without state": ("state", STATE[:2], r"layer 2 \(recurrent\) holds state \[\]"),
    "state of no layer": ("state.3.layer", 3, "state tensor of layer 3, but there are 3 layers"),
    "unsorted state": ("state", [STATE[0], STATE[1], STATE[3], STATE[2]], "state tensors must be unique and sorted"),
    "state twice": ("state", [*STATE, STATE[3]], "state tensors must be unique and sorted"),
    "unknown state": ("state.3.name", "magic.0", r"at state\.3\.name: String should match pattern"),
    "state name ending in a newline": ("state.3.name", "recurrent.0\n", r"at state\.3\.name: String should match"),
    "state name in other digits": (
        "state.3.name",
        "recurrent.\u0663",
        r"at state\.3\.name: String should match pattern",
    ),
    "state of size zero": ("state.3.shape", [0], r"at state\.3\.shape\.0: .* greater than or equal to 1"),
}


SIZES = [95, 96, 24, 22, 22, 6, 10]  # three blocks and four state tensors, of 96, 96, 48, 22, 44, 6 and 10 bytes
FAST = {"name": "fast", "sizes": SIZES}
DENSE = FAST | {"name": "dense", "pack": "5" * 64}
UNLAWFUL |= {
    "a codec without a name": ("codec", {"sizes": SIZES}, "at codec: a codec must be"),
    "a list for a codec": ("codec", ["fast"], "at codec: a codec must be"),
    "raw with sizes": ("codec", FAST | {"name": "raw"}, "at codec: a codec must be"),
    "fast without sizes": ("codec", "fast", "at codec: a codec must be"),
    "fast with a pack": ("codec", DENSE | {"name": "fast"}, r"at codec\.fast\.pack: Extra inputs"),
    "dense without a pack": ("codec", FAST | {"name": "dense"}, r"at codec\.dense\.pack: Field required"),
    "an encoded size missing": ("codec", FAST | {"sizes": SIZES[:-1]}, "6 sizes for 7 blocks and state tensors"),
    "an encoded size too many": ("codec", FAST | {"sizes": [*SIZES, 1]}, "8 sizes for 7 blocks and state tensors"),
    "an encoded size of zero": (
        "codec",
        FAST | {"sizes": [0, *SIZES[1:]]},
        "a piece has no bytes just where it decodes to none",
    ),
    "an encoded size of petabytes": ("codec", FAST | {"sizes": [2**47, *SIZES[1:]]}, "it may have 48 to 160"),
    "an encoded state that grows": ("codec", DENSE | {"sizes": [*SIZES[:-1], 75]}, "it may have 5 to 74"),
    "a fast block below half": ("codec", FAST | {"sizes": [47, *SIZES[1:]]}, "has 47 bytes, it may have 48 to"),
    "a dense block below a 64th": ("codec", DENSE | {"sizes": [1, *SIZES[1:]]}, "has 1 bytes, it may have 2 to"),
    "a dense artifact's state below half": ("codec", DENSE | {"sizes": [*SIZES[:-1], 4]}, "has 4 bytes, it may have 5"),
}


@pytest.mark.parametrize(("path", "value", "message"), UNLAWFUL.values(), ids=UNLAWFUL)
def test_a_manifest_that_breaks_the_law_is_refused(path: str, value: object, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        parse_manifest(canonical_json(changed(FACTS, path, value)))


@pytest.mark.parametrize("key", FACTS)
def test_a_manifest_without_one_of_its_keys_is_refused(key: str) -> None:
    with pytest.raises(DamagedError, match=f"at {key}: Field required"):
        parse_manifest(canonical_json({name: value for name, value in FACTS.items() if name != key}))


OTHER_SPELLINGS = {
    "spaces": json.dumps(FACTS, sort_keys=True).encode(),
    "another order": json.dumps(dict(reversed(FACTS.items())), separators=(",", ":")).encode(),
    "a newline at the end": MANIFEST.canonical() + b"\n",
    "an escaped letter": MANIFEST.canonical().replace(b'"hand"', b'"h\\u0061nd"'),
    "a duplicate key": MANIFEST.canonical().replace(b'"codec":"raw"', b'"codec":"raw","codec":"raw"'),
}


@pytest.mark.parametrize("raw", OTHER_SPELLINGS.values(), ids=OTHER_SPELLINGS)
def test_another_spelling_of_the_same_manifest_is_refused(raw: bytes) -> None:
    assert json.loads(raw) == FACTS
    with pytest.raises(DamagedError, match="not canonical JSON"):
        parse_manifest(raw)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version":1e400}'])
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(DamagedError, match="the manifest breaks the format law at"):
        parse_manifest(raw)


def test_the_header_follows_from_the_manifest() -> None:
    header = MANIFEST.header()
    entries = json.loads(header[8:])
    metadata = {"format": "pt", "kvbuy": MANIFEST.canonical().decode(), "kvbuy_id": MANIFEST.sha256()}
    assert len(header) % 64 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert entries.pop("__metadata__") == metadata
    assert {name: (entry["shape"], *entry["data_offsets"]) for name, entry in entries.items()} == {
        "block.0.layer.0.key": ([1, 16, 1], 0, 32),
        "block.0.layer.0.value": ([1, 16, 2], 32, 96),
        "block.1.layer.0.key": ([1, 16, 1], 96, 128),
        "block.1.layer.0.value": ([1, 16, 2], 128, 192),
        "block.2.layer.0.key": ([1, 8, 1], 192, 208),
        "block.2.layer.0.value": ([1, 8, 2], 208, 240),
        "state.1.key": ([1, 11, 1], 240, 262),
        "state.1.value": ([1, 11, 2], 262, 306),
        "state.2.conv.0": ([1, 3], 306, 312),
        "state.2.recurrent.0": ([5], 312, 322),
        "tokens": ([40], 322, 482),
        "text": ([40], 482, 522),
    }


@pytest.mark.parametrize("codec", [FAST, DENSE], ids=["fast", "dense"])
def test_a_coded_artifact_s_header_has_a_tensor_a_piece(codec: dict[str, object]) -> None:
    manifest = parse_manifest(canonical_json(changed(FACTS, "codec", codec)))
    entries = json.loads(manifest.header()[8:])
    assert manifest.codec_name == codec["name"]
    assert len(entries) - 1 == manifest.count_tensors() == 9
    assert {name: (entry["dtype"], *entry["data_offsets"]) for name, entry in entries.items() if name[0] != "_"} == {
        "block.0": ("U8", 0, 95),
        "block.1": ("U8", 95, 191),
        "block.2": ("U8", 191, 215),
        "state.1.key": ("U8", 215, 237),
        "state.1.value": ("U8", 237, 259),
        "state.2.conv.0": ("U8", 259, 265),
        "state.2.recurrent.0": ("U8", 265, 275),
        "tokens": ("I32", 275, 435),
        "text": ("U8", 435, 475),
    }
    assert (manifest.kv_bytes(), manifest.stored_kv_bytes(), manifest.data_bytes()) == (322, 275, 475)


def test_another_codec_changes_nothing_but_the_codec() -> None:
    coded = parse_manifest(canonical_json(changed(FACTS, "codec", FAST)))
    assert facts_of(coded) == FACTS | {"codec": FAST}
    assert coded.with_codec("raw") == MANIFEST
    assert MANIFEST.with_codec(coded.codec) == coded


def test_the_manifest_knows_how_many_bytes_follow_the_header() -> None:
    assert (MANIFEST.kv_bytes(), MANIFEST.data_bytes()) == (322, 522)
    assert MANIFEST.data_bytes() == sum(map(len, handmade()[1]))


def test_a_block_id_is_the_hash_that_the_law_says() -> None:
    """Recomputed from rule 6 with hashlib alone; the constants pin it for good."""
    fingerprint = b'{"adapters":[],"chat_template":null,"config":"%b","dtype":"BF16","quantization":null,'
    fingerprint += b'"tokenizer":"%b","weights":"%b"}'
    profile = b'{"attention":"sdpa","block_size":16,"device":"cpu","processor":"x86_64","torch":"2.14.1",'
    profile += b'"transformers":"5.23.0"}'
    raw = b"kvbuy block 1\0" + bytes(32)
    raw += hashlib.sha256(fingerprint % (b"2" * 64, b"3" * 64, b"1" * 64)).digest() + hashlib.sha256(profile).digest()
    raw += struct.pack("<16i", *range(16))
    assert chain(list(range(16))) == [hashlib.sha256(raw).hexdigest()] == [GOLDEN_ID]


def test_equal_prefixes_have_equal_block_ids() -> None:
    one, other = chain(list(range(48))), chain([*range(32), *range(100, 140)])
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])


def test_a_changed_token_changes_its_block_s_id_and_all_later_ones() -> None:
    tokens = list(range(64))
    one, other = chain(tokens), chain([*tokens[:20], 99, *tokens[21:]])
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, False, False]


def test_a_short_block_has_another_id_than_the_full_one() -> None:
    assert chain(list(range(16))) != chain(list(range(15)))


@pytest.mark.parametrize(("part", "value"), {"weights": "9" * 64, "dtype": "F32", "adapters": ("9" * 64,)}.items())
def test_another_fingerprint_changes_every_block_id(part: str, value: object) -> None:
    other = FINGERPRINT.model_copy(update={part: value})
    assert not set(chain(list(range(64)))) & set(chain(list(range(64)), fingerprint=other))


@pytest.mark.parametrize("part", ["attention", "torch", "transformers", "device", "processor"])
def test_another_profile_changes_every_block_id(part: str) -> None:
    other = PROFILE.model_copy(update={part: "other"})
    assert not set(chain(list(range(64)))) & set(chain(list(range(64)), profile=other))


def test_a_block_s_id_does_not_depend_on_its_digest() -> None:
    (one,), (other,) = (
        chain_blocks([1, 2], fingerprint=FINGERPRINT, profile=PROFILE, digests=[digit * 64]) for digit in "01"
    )
    assert one == Block(tokens=2, id=other.id, digest="0" * 64)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (15, 15), (16, 3), (17, 4), (31, 18), (32, 3), (40, 11)], ids=lambda value: str(value)
)
def test_a_window_of_four_keeps_three_rows_before_the_last_full_block_s_end(tokens: int, rows: int) -> None:
    assert window_rows(tokens, 16, 4) == rows
