"""From a document to an artifact: prefill block by block, the receipt, and the file.

The schedule is the contract: the document runs in blocks of `block_size` tokens from its start, the prompt as rows of
its own afterwards. Whoever repeats it on the same profile gets the same bits.
"""

import hashlib
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers.cache_utils import Cache

import kvbuy
from kvbuy.artifact import Artifact, content_digest, refuse_unwritable
from kvbuy.cache import (
    block_arrays,
    block_digest,
    describe_layers,
    empty_cache,
    forget_windows,
    record_windows,
    refuse_unfilled,
    state_tensors,
)
from kvbuy.codec import plan_codec
from kvbuy.decode import greedy
from kvbuy.document import CHAT_PROBE, PROBE, Document, encode_document, encode_prompt
from kvbuy.manifest import Document as DocumentPart
from kvbuy.manifest import Layer, Manifest, Receipt, StateTensor, as_label, chain_blocks, refuse_block_size
from kvbuy.models import Model, refuse_too_long
from kvbuy.parts import CodecName
from kvbuy.writer import write_contents

BLOCK_SIZE = 512  # README, "Measured": the smallest that is aligned, and as fast as one pass
RECEIPT_TOKENS = 24

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Precomputed:
    """An artifact just made, and what it took."""

    artifact: Artifact
    prefill_seconds: float


@torch.no_grad()
def precompute(
    text: str,
    out: Path | str,
    *,
    model: Model,
    name: str,
    chat: bool = False,
    block_size: int = BLOCK_SIZE,
    codec: CodecName = "raw",
    force: bool = False,
    progress: Progress = lambda _, __: None,
) -> Precomputed:
    """Precompute a document's KV and write it as an artifact to `out`.

    `name` is the document's label in the manifest; `progress` is told the tokens done, and how many there are.

    Raises:
        DocumentError: too long for the model, or its chat template cannot hold it.
        UnsupportedCache: the model's cache cannot be stored.
        UsageError: no block can have `block_size` tokens, or `codec` needs an extra that is not installed.
        PackError: `codec` needs a pack, and the model has none here.
        ExistsError, StoreError: `out` cannot be written; nothing is left behind.
    """
    out = Path(out)
    refuse_block_size(block_size)
    refuse_unwritable(out, force=force)
    document = encode_document(model.tokenizer, text, name=name, chat=chat)
    probe = CHAT_PROBE if chat else PROBE
    prompt = encode_prompt(model.tokenizer, probe, document_text=document.text, chat=chat)
    extra = len(prompt) + RECEIPT_TOKENS
    refuse_too_long(model, len(document.token_ids), extra=extra)
    plan = plan_codec(codec, model.fingerprint, tokens=len(document.token_ids))  # refused before the long prefill

    started = time.perf_counter()
    cache = empty_cache(model.model.config, capacity=len(document.token_ids) + extra)
    digests = prefill(model, document.token_ids, cache, block_size=block_size, progress=progress)
    seconds = time.perf_counter() - started
    state = list(state_tensors(cache))
    forget_windows(cache)
    manifest = _manifest(
        document,
        model,
        block_size=block_size,
        digests=digests,
        layers=describe_layers(cache),
        state=tuple(described for described, _ in state),
        receipt=make_receipt(model, cache, probe, prompt),
    )
    artifact = write_contents(
        out,
        manifest,
        codec=plan,
        blocks=(block_arrays(cache, start, end) for start, end in _cuts(len(document.token_ids), block_size)),
        state=[raw for _, raw in state],
        side=_side(document),
        force=force,
    )
    return Precomputed(artifact=artifact, prefill_seconds=seconds)


@torch.no_grad()
def prefill(
    model: Model,
    token_ids: Sequence[int],
    cache: Cache,
    *,
    block_size: int,
    progress: Progress = lambda _, __: None,
) -> list[str]:
    """Run a document through the model block by block into an empty cache; returns the blocks' digests.

    A last short block leaves sliding windows recording (`kvbuy.cache.record_windows`); no logits are computed.
    """
    digests: list[str] = []
    for start, end in _cuts(len(token_ids), block_size):
        if end - start < block_size:
            record_windows(cache)
        rows = torch.tensor([token_ids[start:end]], device=model.device)
        model.model.base_model(input_ids=rows, cache=cache, use_cache=True)
        if not digests:
            refuse_unfilled(cache, model_type=model.model.config.model_type)
        digests.append(block_digest(cache, start, end))
        progress(end, len(token_ids))
    return digests


def make_receipt(model: Model, cache: Cache, probe: str, prompt: Sequence[int]) -> Receipt:
    """Continue from a document's cache with the probe's rows and record what comes out."""
    tokens, logits = greedy(model, cache, prompt, max_new_tokens=RECEIPT_TOKENS)
    return Receipt(prompt=probe, prompt_tokens=tuple(prompt), tokens=tuple(tokens), logits=logits_digest(logits))


def logits_digest(logits: torch.Tensor) -> str:
    """The hex SHA-256 of logits [tokens, vocabulary] as little-endian float32."""
    return hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()


def _cuts(tokens: int, block_size: int) -> list[tuple[int, int]]:
    return [(start, min(start + block_size, tokens)) for start in range(0, tokens, block_size)]


def _manifest(
    document: Document,
    model: Model,
    *,
    block_size: int,
    digests: Sequence[str],
    layers: tuple[Layer, ...],
    state: tuple[StateTensor, ...],
    receipt: Receipt,
) -> Manifest:
    """What there is to say of an artifact, its codec being raw."""
    profile = model.profile(block_size)
    return Manifest(
        format="kvbuy",
        version=1,
        producer=f"kvbuy {kvbuy.__version__}",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=model.label,
        fingerprint=model.fingerprint,
        profile=profile,
        document=_describe(document),
        codec="raw",
        layers=layers,
        blocks=chain_blocks(document.token_ids, fingerprint=model.fingerprint, profile=profile, digests=digests),
        state=state,
        receipt=receipt,
    )


def _side(document: Document) -> tuple[bytes, bytes]:
    """The bytes of the tensors `tokens` and `text`."""
    ids = document.token_ids
    return struct.pack(f"<{len(ids)}i", *ids), document.text.encode()


def _describe(document: Document) -> DocumentPart:
    tokens, text = _side(document)
    return DocumentPart(
        name=as_label(document.name),
        chat=document.chat,
        text_bytes=len(text),
        text_digest=content_digest([text]),
        tokens=len(document.token_ids),
        tokens_digest=content_digest([tokens]),
    )
