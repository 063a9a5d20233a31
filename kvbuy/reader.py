"""Reading an artifact's contents whatever its codec: decoded into arrays, every digest checked.

Files and codecs meet here and in `kvbuy.writer`; neither knows the other. It does not know what a cache is.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from kvbuy.artifact import Artifact, content_digest
from kvbuy.codec import Coder, open_coder
from kvbuy.codec.arrays import Array, head_views, shaped, shaped_block
from kvbuy.errors import DamagedError
from kvbuy.manifest import Tensor, chain_blocks
from kvbuy.parallel import in_order


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads an artifact's blocks, from several threads at once, submitted in order. Opened once a load.

    `coder` is None and `pieces` are empty where the artifact is raw.
    """

    artifact: Artifact
    coder: Coder | None
    pieces: list[Tensor]

    @classmethod
    def open(cls, artifact: Artifact) -> Self:
        """Make the artifact's coder ready.

        Raises:
            DamagedError: its token ids do not match their digest.
            UsageError: its codec needs an extra that is not installed.
            PackError: its codec needs a pack that is not here.
        """
        manifest = artifact.manifest
        coder = None if manifest.codec == "raw" else open_coder(manifest, artifact.read_tokens())
        return cls(artifact=artifact, coder=coder, pieces=manifest.pieces())

    def read_block(self, index: int, tensors: Sequence[Array]) -> None:
        """Fill a block's key and value arrays [heads, rows, dim], whose heads may be strided.

        Raises:
            DamagedError: the bytes cannot be decoded, or do not match the block's digest.
        """
        if self.coder is None:
            self.artifact.read_block(index, list(head_views(tensors)))
            return
        with self.in_turn():
            data = self.artifact.read_piece(self.pieces[index])
            digest = self.artifact.manifest.blocks[index].digest
            with _checking(self.artifact, f"block {index}", head_views(tensors), digest=digest):
                self.coder.decode_block(index, data, tensors)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Where a block is read: if that fails, blocks that wait for it are told instead of waiting for ever."""
        try:
            yield
        except BaseException:
            if self.coder is not None:
                self.coder.abandon()
            raise

    def load_blocks(self) -> Iterator[list[Array]]:
        """All blocks' arrays in order, read ahead on threads (errors: `read_block`)."""
        return in_order(self.load_block, range(len(self.artifact.manifest.blocks)))

    def load_block(self, index: int) -> list[Array]:
        """A block's arrays, freshly allocated (errors: `read_block`)."""
        with self.in_turn():
            start, end = self.artifact.manifest.block_span(index)
            tensors = shaped_block(bytearray(end - start), self.artifact.manifest.block_tensors(index))
            self.read_block(index, tensors)
        return tensors


def check_contents(artifact: Artifact) -> None:
    """Check that an artifact is intact: every digest, decoded where it is coded, and that block ids are its tokens'.

    Raises:
        DamagedError: it is not; the message says where.
        UsageError: its codec needs an extra that is not installed.
        PackError: its codec needs a pack that is not here.
    """
    tokens = artifact.read_tokens()
    artifact.read_text()
    if min(tokens) < 0:
        raise DamagedError(f"{artifact.path.name}: a token id is negative")
    manifest = artifact.manifest
    digests = [block.digest for block in manifest.blocks]
    chain = chain_blocks(tokens, fingerprint=manifest.fingerprint, profile=manifest.profile, digests=digests)
    if chain != manifest.blocks:
        raise DamagedError(f"{artifact.path.name}: the block ids are not the chain of its tokens")
    for _ in Reader.open(artifact).load_blocks():
        pass
    for index in range(len(manifest.state)):
        load_state(artifact, index)


def read_state(artifact: Artifact, index: int, view: memoryview) -> None:
    """Fill `view` with the bytes of `manifest.state[index]`.

    Raises:
        DamagedError: they cannot be decoded, or do not match their digest.
    """
    manifest = artifact.manifest
    stored = manifest.state[index]
    if manifest.codec == "raw":
        artifact.read_state(stored, manifest.state_tensors()[index], view)
        return
    from kvbuy.codec.fast import decode_tensors  # the law: state is coded so in every codec

    piece = manifest.pieces()[len(manifest.blocks) + index]
    data = artifact.read_piece(piece)
    with _checking(artifact, piece.name, [view], digest=stored.digest):
        decode_tensors(data, [shaped(view, stored.dtype, stored.shape)])


def load_state(artifact: Artifact, index: int) -> bytearray:
    """The bytes of `manifest.state[index]`, freshly allocated (errors: `read_state`)."""
    raw = bytearray(artifact.manifest.state_tensors()[index].size)
    read_state(artifact, index, memoryview(raw))
    return raw


@contextmanager
def _checking(artifact: Artifact, what: str, decoded: Iterable[memoryview], *, digest: str) -> Iterator[None]:
    """Check what a decoder has filled, and say of which part of which file a damage is."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{artifact.path.name}: {what}: {error.message}", hint="fetch it again") from error
    if content_digest(decoded) != digest:
        raise DamagedError(f"{artifact.path.name}: {what} does not match its digest", hint="fetch it again")
