"""Writing an artifact's contents in a codec: encoded, decoded again and compared before a file gets its name."""

import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

from kvbuy.artifact import Artifact, Buffer, content_digest, write_artifact
from kvbuy.codec import open_coder
from kvbuy.codec.arrays import Array, head_views, shaped, shaped_block
from kvbuy.errors import StoreError
from kvbuy.manifest import Manifest
from kvbuy.parallel import in_order
from kvbuy.parts import Codec, with_sizes

CHUNK = 2**20


def write_contents(
    path: Path,
    manifest: Manifest,
    *,
    codec: Codec,
    blocks: Iterable[Sequence[Array]],
    state: Sequence[Buffer],
    side: tuple[bytes, bytes],
    force: bool,
) -> Artifact:
    """Write decoded contents as an artifact in `codec`; all else of it is as the manifest says.

    `codec` comes without sizes, of `kvbuy.codec.plan_codec`. `blocks` are arrays [heads, rows, dim] in file order and
    are taken one by one, `state` the bytes of the state tensors, `side` those of `tokens` and `text`.

    Raises:
        ExistsError, StoreError: `path` cannot be written; nothing is left behind.
    """
    if codec == "raw":
        buffers = chain.from_iterable(map(head_views, blocks))
        return write_artifact(path, manifest.with_codec("raw"), chain(buffers, state, side), force=force)
    # The sizes stand in the header, before the pieces: these wait in a nameless file until all are known.
    try:
        with tempfile.TemporaryFile(dir=path.parent) as spool:
            sizes = []
            for piece in chain(_encode_blocks(manifest, codec, blocks, side[0]), _encode_state(manifest, state)):
                sizes.append(spool.write(piece))
            spool.seek(0)
            coded = manifest.with_codec(with_sizes(codec, sizes))
            return write_artifact(path, coded, chain(_chunks(spool), side), force=force)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


def _encode_blocks(
    manifest: Manifest, codec: Codec, blocks: Iterable[Sequence[Array]], raw_tokens: bytes
) -> Iterator[bytes]:
    """The blocks' encoded bytes, each decoded again by a second coder and held against the block's digest."""
    planned = manifest.with_codec(with_sizes(codec, manifest.decoded_sizes()))  # the true ones are not known yet
    tokens = struct.unpack(f"<{len(raw_tokens) // 4}i", raw_tokens)
    encoder, decoder = open_coder(planned, tokens), open_coder(planned, tokens)

    def encode(item: tuple[int, Sequence[Array]]) -> bytes:
        index, tensors = item
        try:
            data = encoder.encode_block(index, tensors).data
            start, end = manifest.block_span(index)
            again = shaped_block(bytearray(end - start), manifest.block_tensors(index))
            decoder.decode_block(index, memoryview(data), again)
        except BaseException:
            encoder.abandon()
            decoder.abandon()
            raise
        if content_digest(head_views(again)) != manifest.blocks[index].digest:
            raise AssertionError(f"the codec {planned.codec_name} does not give block {index} back")
        return data

    return in_order(encode, enumerate(blocks))


def _encode_state(manifest: Manifest, state: Sequence[Buffer]) -> Iterator[bytes]:
    from kvbuy.codec.fast import decode_tensors, encode_tensors  # the law: state is coded so in every codec

    for stored, raw in zip(manifest.state, state, strict=True):
        data = encode_tensors([shaped(raw, stored.dtype, stored.shape)]).data
        again = bytearray(len(memoryview(raw)))
        decode_tensors(memoryview(data), [shaped(again, stored.dtype, stored.shape)])
        if content_digest([again]) != stored.digest:
            raise AssertionError(f"the codec does not give state {stored.layer}.{stored.name} back")
        yield data


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk
