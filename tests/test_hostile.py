"""Files that must be refused, and with which words: by DamagedError or StoreError, never by another exception.

`hostile/` is read as it is. `python tests/test_hostile.py` writes it again from the golden artifact `full` and the
table FILES, which says what is wrong with each file; hostile/expected.json holds the words.
"""

import hashlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from handmade import FULL, changed, facts_of, handmade

from kvbuy.artifact import Artifact, content_digest
from kvbuy.errors import DamagedError, StoreError
from kvbuy.manifest import canonical_json, chain_blocks, parse_manifest
from kvbuy.reader import check_contents

FOLDER = Path(__file__).parent / "hostile"
EXPECTED: dict[str, str] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
RAW = (Path(__file__).parent / "golden" / "v1" / "full.kv.safetensors").read_bytes()
START = 8 + int.from_bytes(RAW[:8], "little")
HEADER, DATA = RAW[8:START], RAW[START:]
ENTRIES: dict[str, Any] = json.loads(HEADER)
MANIFEST = ENTRIES["__metadata__"]["kvbuy"]
FACTS: dict[str, Any] = json.loads(MANIFEST)
BLOCK, TAIL = 1024, 2560  # bytes of a full block; where tokens and text begin
TOKENS = struct.unpack("<40i", DATA[TAIL : TAIL + 160])
TEXT = DATA[TAIL + 160 :]
SWAPPED = DATA[BLOCK : 2 * BLOCK] + DATA[:BLOCK] + DATA[2 * BLOCK :]


def packed(header: bytes, data: bytes = DATA) -> bytes:
    """A file of this header, padded as the law wants it."""
    header += b" " * (-(len(header) + 8) % 64)
    return len(header).to_bytes(8, "little") + header + data


def with_entries(change: dict[str, Any], data: bytes = DATA) -> bytes:
    """The golden file with entries of its header replaced, or added at the end."""
    return packed(json.dumps(ENTRIES | change, separators=(",", ":")).encode(), data)


def with_metadata(**change: object) -> bytes:
    return with_entries({"__metadata__": ENTRIES["__metadata__"] | change})


def with_manifest(manifest: str) -> bytes:
    """The golden file with another manifest and its right id."""
    return with_metadata(kvbuy=manifest, kvbuy_id=hashlib.sha256(manifest.encode()).hexdigest())


def with_fact(path: str, value: object, data: bytes = DATA) -> bytes:
    """The golden file with one fact of the manifest replaced, and the header that this manifest implies."""
    raw = canonical_json(changed(FACTS, path, value))
    try:
        return parse_manifest(raw).header() + data
    except DamagedError:
        return with_manifest(raw.decode())


def with_tensor(name: str, **change: object) -> bytes:
    """The golden file with one tensor's entry changed."""
    return with_entries({name: ENTRIES[name] | change})


def with_tokens(tokens: tuple[int, ...], *, chained: bool) -> bytes:
    """The golden file with other token ids, their digest, and with `chained` the right block ids."""
    raw = struct.pack("<40i", *tokens)
    facts = changed(FACTS, "document.tokens_digest", content_digest([raw]))
    if chained:
        manifest = parse_manifest(MANIFEST.encode())
        digests = [block.digest for block in manifest.blocks]
        chain = chain_blocks(tokens, fingerprint=manifest.fingerprint, profile=manifest.profile, digests=digests)
        facts["blocks"] = [block.model_dump() for block in chain]
    return parse_manifest(canonical_json(facts)).header() + DATA[:TAIL] + raw + TEXT


def with_text(text: bytes) -> bytes:
    return with_fact("document.text_digest", content_digest([text]), DATA[: TAIL + 160] + text)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ENTRIES.items() if name != key}


FIRST, SECOND = "block.0.layer.0.key", "block.0.layer.0.value"
FILES = {
    # The length in front of the header.
    "empty": b"",
    "seven-bytes": RAW[:7],
    "header-length-huge": (2**63).to_bytes(8, "little") + RAW[8:],
    "header-length-zero": bytes(8) + RAW[8:],
    "header-longer-than-the-file": (50_000_000).to_bytes(8, "little") + RAW[8:],
    # The header as JSON.
    "header-not-json": packed(b"x" * 100),
    "header-not-utf-8": packed(b'{"\xff":1}'),
    "header-in-utf-16": packed((HEADER.decode() + " " * 4).encode("utf-16-le")),
    "header-a-list": packed(b"[]"),
    "header-nested-deep": packed(b"[" * 10_000),
    "header-number-of-5000-digits": packed(b'{"a":' + b"1" * 5000 + b"}"),
    "header-with-other-padding": (len(HEADER) + 64).to_bytes(8, "little") + HEADER + b" " * 64 + DATA,
    "header-padded-with-newlines": packed(HEADER.strip() + b"\n"),
    "header-spelled-otherwise": packed(json.dumps(ENTRIES).encode()),
    # Its metadata.
    "no-metadata": packed(json.dumps(without("__metadata__")).encode()),
    "metadata-a-string": with_entries({"__metadata__": "kvbuy"}),
    "metadata-without-kvbuy": with_entries({"__metadata__": {"format": "pt"}}),
    "metadata-with-another-key": with_metadata(novelty="1"),
    "metadata-twice": packed(b'{"__metadata__":{},' + HEADER.strip()[1:]),
    "wrong-id": with_metadata(kvbuy_id="0" * 64),
    "id-missing": with_entries({"__metadata__": {"format": "pt", "kvbuy": MANIFEST}}),
    "wrong-format": with_metadata(format="np"),
    # The tensors in it.
    "extra-tensor": with_entries({"extra": {"dtype": "U8", "shape": [0], "data_offsets": [len(DATA), len(DATA)]}}),
    "missing-tensor": packed(json.dumps(without("text"), separators=(",", ":")).encode()),
    "tensor-twice": packed(HEADER.strip()[:-1] + b',"text":' + json.dumps(ENTRIES["text"]).encode() + b"}"),
    "tensor-named-as-a-parent-folder": packed(HEADER.replace(b'"text":', b'"../t":')),
    "hole": with_tensor("tokens", data_offsets=[2564, 2724]),
    "overlap": with_tensor(SECOND, data_offsets=[0, 256]),
    "swapped-offsets": with_entries({FIRST: ENTRIES[SECOND], SECOND: ENTRIES[FIRST]}),
    "backward-offsets": with_tensor(FIRST, data_offsets=[256, 0]),
    "offsets-beyond-the-file": with_tensor("text", data_offsets=[2720, 2**62]),
    "wrong-shape": with_tensor(FIRST, shape=[1, 8, 16]),
    "wrong-dtype": with_tensor(FIRST, dtype="F16"),
    # The file's length.
    "trailing-bytes": RAW + b"PK",
    "missing-tail": RAW[:-1],
    "header-only": RAW[:START],
    # The manifest as JSON.
    "manifest-a-number": with_metadata(kvbuy=1),
    "manifest-an-object": with_metadata(kvbuy=FACTS),
    "manifest-not-json": with_manifest("x"),
    "manifest-nested-deep": with_manifest("[" * 10_000),
    "manifest-with-half-a-surrogate": packed(HEADER.replace(b"doc.txt", b"\\ud800.txt")),
    "manifest-with-spaces": with_manifest(json.dumps(FACTS, sort_keys=True, ensure_ascii=False)),
    "manifest-key-twice": with_manifest(MANIFEST.replace('"codec":"raw"', '"codec":"raw","codec":"raw"')),
    "manifest-with-another-key": with_fact("novelty", 1),
    "manifest-key-with-an-escape-sequence": with_fact("\x1b]0;owned\x07", 1),
    "manifest-key-of-five-thousand-letters": with_fact("x" * 5000, 1),
    # What the manifest says.
    "unknown-version": with_fact("version", 2),
    "version-zero": with_fact("version", 0),
    "version-true": with_manifest(MANIFEST.replace('"version":1', '"version":true')),
    "version-of-5000-digits": with_manifest(MANIFEST.replace('"version":1', '"version":' + "1" * 5000)),
    "unknown-codec": with_fact("codec", "pickle"),
    "unknown-layer-kind": with_fact("layers.0.kind", "os.system"),
    "layer-kind-with-an-escape-sequence": with_fact("layers.0.kind", "\x1b]0;owned\x07"),
    "layer-kind-of-five-thousand-letters": with_fact("layers.0.kind", "x" * 5000),
    "document-named-as-a-parent-folder": with_fact("document.name", "../doc.txt"),
    "document-name-with-a-newline": with_fact("document.name", "doc.txt\n"),
    "escape-sequence-in-the-model-s-name": with_fact("model.name", "\x1b]0;owned\x07"),
    "digest-with-a-newline": with_fact("receipt.logits", FACTS["receipt"]["logits"] + "\n"),
    "more-tokens-than-blocks": with_fact("document.tokens", 41),
    "layer-of-petabytes": with_fact("layers.0.heads", 2**47),
    "text-of-petabytes": with_fact("document.text_bytes", 2**47),
    "layer-without-heads": with_fact("layers.0.heads", 0),
    "state-of-a-full-layer": with_fact(
        "state", [{"digest": "0" * 64, "dtype": "F32", "layer": 0, "name": "conv.0", "shape": [1]}]
    ),
    # What it says of a codec.
    "codec-without-a-name": with_fact("codec", {"sizes": [1, 1, 1]}),
    "codec-named-as-a-module": with_fact("codec", {"name": "os", "sizes": [1, 1, 1]}),
    "codec-with-a-size-missing": with_fact("codec", {"name": "fast", "sizes": [1, 1]}),
    "codec-with-a-size-of-petabytes": with_fact("codec", {"name": "fast", "sizes": [2**47, 1, 1]}),
    "codec-fast-over-raw-bytes": with_fact("codec", {"name": "fast", "sizes": [900, 1000, 500]}, DATA[160:]),
    # The contents.
    "blocks-swapped": RAW[:START] + SWAPPED,
    "block-entries-swapped": with_fact("blocks", [FACTS["blocks"][1], FACTS["blocks"][0], FACTS["blocks"][2]], SWAPPED),
    "zeroed-block": RAW[:START] + bytes(BLOCK) + DATA[BLOCK:],
    "tokens-off-the-chain": with_tokens((TOKENS[0] + 1, *TOKENS[1:]), chained=False),
    "negative-token": with_tokens((-1, *TOKENS[1:]), chained=True),
    "text-not-utf-8": with_text(b"\xff" + TEXT[1:]),
    "text-exchanged": RAW[: -len(TEXT)] + TEXT[::-1],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_hostile_file_is_refused(name: str) -> None:
    path = FOLDER / f"{name}.kv.safetensors"
    with pytest.raises(DamagedError, match=EXPECTED[name]) as caught:
        check_contents(Artifact.open(path))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_what_the_table_says(name: str) -> None:
    assert (FOLDER / f"{name}.kv.safetensors").read_bytes() == FILES[name]


def test_every_hostile_file_has_its_words() -> None:
    found = {path.name.removesuffix(".kv.safetensors") for path in FOLDER.glob("*.safetensors")}
    assert found == set(EXPECTED) == set(FILES)


def test_the_file_that_they_were_made_from_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "doc.kv.safetensors"
    path.write_bytes(with_entries({}))
    check_contents(Artifact.open(path))
    assert path.read_bytes() == RAW


def test_a_missing_file_is_a_store_error_with_the_advice_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no artifact") as caught:
        Artifact.open(tmp_path / "doc.kv.safetensors")
    assert caught.value.hint == "make one: kvbuy precompute doc.txt"


def test_a_folder_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*: Is a directory"):
        Artifact.open(tmp_path)


def test_a_file_below_a_file_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(RAW)
    with pytest.raises(StoreError, match=r"cannot read .*: Not a directory"):
        Artifact.open(tmp_path / "file" / "doc.kv.safetensors")


def test_a_small_file_that_implies_many_tensors_costs_little(tmp_path: Path) -> None:
    """Layers times blocks: a hundred kilobytes of manifest imply hundreds of thousands of tensors."""
    facts = facts_of(handmade(range(16 * 300), layers=[FULL])[0])
    raw = canonical_json(facts | {"layers": [FULL] * 300})
    path = tmp_path / "doc.kv.safetensors"
    metadata = {"format": "pt", "kvbuy": raw.decode(), "kvbuy_id": hashlib.sha256(raw).hexdigest()}
    path.write_bytes(packed(json.dumps({"__metadata__": metadata}, separators=(",", ":")).encode()))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="header is not the one its manifest implies"):
            Artifact.open(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * path.stat().st_size


if __name__ == "__main__":
    for name, raw in FILES.items():
        (FOLDER / f"{name}.kv.safetensors").write_bytes(raw)
