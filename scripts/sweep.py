"""Every truncation and every flipped bit of small files in each format, and what kvbuy makes of it.

    python scripts/sweep.py [--stride N]

Silent is a file that is accepted and holds something else. There must be none.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kvbuy import render
from kvbuy.artifact import Artifact
from kvbuy.codec.pack import read_pack
from kvbuy.errors import KvbuyError
from kvbuy.keys import KeyRing, read_key, write_record
from kvbuy.models import load_model
from kvbuy.prefill import precompute
from kvbuy.reader import Reader, check_contents, load_state
from kvbuy.recode import convert
from kvbuy.sign import find_signers, require_signature, sign_artifact
from kvbuy.store import Store

Look = Callable[[Path], object]  # what a file holds, or a KvbuyError


@dataclass
class Count:
    """Outcomes of a sweep."""

    refused: int = 0
    same: int = 0
    silent: int = 0


def contents(path: Path) -> object:
    """All that an artifact holds, checked."""
    artifact = Artifact.open(path)
    check_contents(artifact)
    blocks = [[tensor.tobytes() for tensor in block] for block in Reader.open(artifact).load_blocks()]
    state = [bytes(load_state(artifact, index)) for index in range(len(artifact.manifest.state))]
    return artifact.id, artifact.read_tokens(), artifact.read_text(), blocks, state


def signed(artifact: Artifact, ring: KeyRing) -> list[str]:
    """Who signed; a file of signatures that are not its own is refused as --require-signature refuses it."""
    signers = find_signers(artifact, ring)
    require_signature(artifact.path.name, signers)
    return list(map(str, signers))


def sweep(path: Path, look: Look, damages: Iterator[bytes]) -> Count:
    """Look at a file in each of its damages, and put it back."""
    honest_bytes, honest, count = path.read_bytes(), look(path), Count()
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            found = look(path)
        except KvbuyError:
            count.refused += 1
        else:
            count.same += found == honest
            count.silent += found != honest
    path.write_bytes(honest_bytes)
    return count


def truncations(raw: bytes, stride: int) -> Iterator[bytes]:
    yield from (raw[:length] for length in range(0, len(raw), stride))


def flips(raw: bytes, stride: int) -> Iterator[bytes]:
    for bit in range(0, 8 * len(raw), stride):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def subjects(folder: Path) -> Iterator[tuple[str, Path, Look, int]]:
    """What is swept: a name, a file, how to look at it, and how many bits to go on by where all would take hours."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from conftest import byte_tokenizer, tiny_llama
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_llama(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    model = load_model(str(folder / "model"))
    raw = precompute(
        "A small text of forty signs, or so it is.",
        folder / "doc.kv.safetensors",
        model=model,
        name="doc",
        block_size=16,
    )
    yield "artifact, raw", raw.artifact.path, contents, 1
    yield "artifact, fast", convert(raw.artifact, codec="fast").artifact.path, contents, 1
    fitted = fit_small_pack(model)
    yield "artifact, dense", convert(raw.artifact, codec="dense").artifact.path, contents, 1
    yield "pack", fitted, lambda path: read_pack(path), 977
    ring = KeyRing(folder / "keys")
    own = ring.make("Ann", days=30)
    signatures = sign_artifact(raw.artifact, own)
    yield "signatures", signatures, lambda _: signed(raw.artifact, ring), 1
    write_record(own.key, folder / "key.json")
    yield "public key", folder / "key.json", read_key, 1
    store = Store(folder / "store")
    entry = store.put(raw.artifact)
    out = folder / "got.kv.safetensors"
    got = lambda _: store.get(store.find("doc"), out, force=True).path.read_bytes()  # noqa: E731
    yield "store, entry", store.entries_folder / f"{entry.id}.json", got, 1
    yield "store, object", store.objects / entry.pieces[1].digest, got, 1


def fit_small_pack(model: object) -> Path:
    from kvbuy.calibrate import fit_pack
    from kvbuy.docstrings import help_texts

    fit_pack(model, [help_texts()[:8000]])  # type: ignore[arg-type]
    from kvbuy.places import pack_folder

    return next(pack_folder().glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=1, help="look at every Nth only")
    parser.add_argument("--only", default="", help="files whose name holds this")
    options = parser.parse_args()
    stride = options.stride
    table = render.plain_table("file", "bytes", "damage", "cases", "refused", "the same", "silent")
    silent = 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["KVBUY_CACHE"] = f"{name}/cache"
        for what, path, look, own in subjects(Path(name)):
            if options.only not in what:
                continue
            raw = path.read_bytes()
            for damage, cases in (("cut off", truncations), ("a bit flipped", flips)):
                step = stride * own * (1 if damage != "cut off" or own == 1 else 8)
                count = sweep(path, look, cases(raw, step))
                total = count.refused + count.same + count.silent
                silent += count.silent
                table.add_row(what, str(len(raw)), damage, *map(str, (total, count.refused, count.same, count.silent)))
    render.print_table(table)
    sys.exit(bool(silent))


if __name__ == "__main__":
    main()
