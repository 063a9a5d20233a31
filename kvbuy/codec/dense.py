"""The codec `dense`: lossless and small. What is known about a token already is taken off; the surprise is coded.

A block's data, with T tokens; all integers are little-endian:

    u8           the mode, 1 (0: the block's bytes as `fast` codes them follow, because that is smaller)
    u32          the number of words
    u32 [T]      the rANS state of each token
    u16 [words]  the words, in the order in which the decoder wants them
    u16 [R, T]   F32 only: the numbers' lower halves, R rows of all layers' channels in coding order

The decoder walks the layers from the bottom. What features of the layers below say of a layer is one matrix product;
then `kvbuy.codec.walk` decodes the layer tile after tile. A block needs what the blocks before it taught, layer for
layer: blocks can be decoded in parallel, each at least a layer behind the one before. A block in mode 0 is walked
all the same, and teaches what any other does. A block in mode 1 has at least a 64th of its decoded bytes.

It knows no file and no model: its knowledge of the model is a pack.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvbuy.codec import Coder, Encoded
from kvbuy.codec.arrays import Array
from kvbuy.codec.column import CLASSES, RECIPROCALS, SCRATCH, Rules, Stream
from kvbuy.codec.fast import decode_tensors, encode_tensors
from kvbuy.codec.grid import GRIDS, Codes, Format, Halves
from kvbuy.codec.pack import LONGEST, Pack
from kvbuy.codec.record import Symbols, Target, weigh_rows, write_rows
from kvbuy.codec.repeats import TILE, cut_tiles, find_repeats
from kvbuy.codec.single import single_threaded
from kvbuy.codec.walk import STEADY, TURN, Floats, Layer, Memory, Tile, Turns, decode_tile, record_tile
from kvbuy.errors import DamagedError, UsageError
from kvbuy.manifest import DENSEST

Integers = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)
INFORMATION = (16 - np.log2(np.maximum(np.arange(1 << 16), 1))).astype(np.float32)  # bits, by a symbol's size


@dataclass(frozen=True, slots=True)
class Step:
    """A layer of a tile, ready to be walked: its rows and tokens in the block, and what the walk takes first."""

    rows: slice
    tokens: slice
    arguments: tuple[Layer, Tile, Memory, Rules, Codes]


class DenseCoder(Coder):
    """Codes the blocks of one document in one direction: encoding and decoding take a coder each.

    Blocks are begun in order, on as many threads as the caller likes.
    """

    def __init__(self, pack: Pack, token_ids: Sequence[int], *, block_size: int) -> None:
        if len(token_ids) > LONGEST:
            raise UsageError(f"dense codes documents of at most {LONGEST} tokens", hint="use the codec fast")
        facts = pack.facts
        self.pack, self.block_size, self.tokens = pack, block_size, len(token_ids)
        self.grid = GRIDS[facts.dtype]
        self.predictors = [Predictor.of(pack, index) for index in range(len(facts.layers))]
        self.rows = np.cumsum([0] + [layer.channels for layer in facts.layers])
        self.repeats = find_repeats(token_ids, block_size)
        self.rules = _rules(pack, self.grid.format)
        self.memories = [self._memory(index) for index in range(len(facts.layers))]
        self.progress = Progress()

    def encode_block(self, index: int, tensors: Sequence[Array]) -> Encoded:
        """Encode a block's key and value arrays [heads, rows, dim]."""
        upper, lower = self._split(tensors)
        symbols = _symbols(upper.shape)
        with self._in_turn():
            self._record(index, upper, symbols)
        data = b"".join([b"\x01", *self._write(symbols, upper), lower.astype("<u2").tobytes()])
        plain = encode_tensors(tensors)
        if len(plain.data) < len(data) or len(data) * DENSEST < sum(tensor.nbytes for tensor in tensors):
            return Encoded(b"\x00" + plain.data, plain.tensor_bytes)
        return Encoded(data, self._costs(symbols, raw_bytes=lower.nbytes // max(len(lower), 1)))

    def decode_block(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
        """Decode a block into its key and value arrays [heads, rows, dim].

        Raises:
            DamagedError: the data cannot be a block's, or a block before it was damaged.
        """
        with self._in_turn():
            mode = data[0] if len(data) else -1
            if mode == 0:
                decode_tensors(data[1:], tensors)
                upper, _ = self._split(tensors)
                self._record(index, upper, _symbols(upper.shape))
            elif mode == 1:
                self._decode(index, data[1:], tensors)
            else:
                raise DamagedError("a dense block has an unknown mode")

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Where a block is walked, in parallel with others: each on one thread, and if it fails, the later ones do."""
        try:
            with single_threaded:
                yield
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """A block will never be decoded: those that wait for it raise DamagedError."""
        self.progress.fail()

    def _record(self, index: int, upper: Halves, symbols: Symbols) -> None:
        """Walk a block whose bits [rows, tokens] are known."""
        for step in self._steps(index):
            bits = np.ascontiguousarray(upper[step.rows, step.tokens])
            first = Target(int(step.rows.start), int(step.tokens.start), bits.shape[1])
            record_tile(*step.arguments, bits, symbols, first)

    def _write(self, symbols: Symbols, upper: Halves) -> list[bytes]:
        """The recorded symbols as a count of words, states, and words."""
        count = upper.shape[1]
        states, words = np.full(count, 1 << 16, np.uint32), np.empty(3 * upper.size + 2, np.uint16)
        end = len(words)
        for low, high in reversed(list(zip(self.rows[:-1], self.rows[1:], strict=True))):
            for start, stop in reversed(cut_tiles(count, self.block_size)):
                end = write_rows(symbols, (int(low), int(high)), (start, stop), upper, states, words, end)
        used = words[end:].astype("<u2")
        return [len(used).to_bytes(4, "little"), states.astype("<u4").tobytes(), used.tobytes()]

    def _decode(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
        count = tensors[0].shape[1]
        states, words, lower = self._parse(data, count)
        read = np.zeros(1, np.int64)
        upper = np.empty((int(self.rows[-1]), count), np.uint16)
        for step in self._steps(index):
            state, part = _padded(states[step.tokens]), upper[step.rows, step.tokens]
            tile = np.empty(part.shape, np.uint16)
            decode_tile(*step.arguments, Stream(state, words, read), tile)
            part[:] = tile
            states[step.tokens] = state[: part.shape[1]]
        if int(read[0]) != len(words) - TILE:
            raise DamagedError("a dense block does not end where its data ends")
        self._join(upper, lower, tensors)

    def _parse(self, data: memoryview, count: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """States [tokens], words and TILE more, and lower halves [rows, tokens] (no rows where the dtype has none)."""
        rows = int(self.rows[-1]) if self.grid.raw_bits else 0
        words = int.from_bytes(data[:4], "little")
        if len(data) != 4 + 4 * count + 2 * words + 2 * rows * count:
            raise DamagedError("a dense block has another size than its words need")
        states = np.frombuffer(data, "<u4", count, offset=4).astype(np.uint32)
        body = np.frombuffer(data, "<u2", offset=4 + 4 * count).astype(np.uint16)
        last = body[words - 1] if words else np.uint16(0)
        return states, np.append(body[:words], last.repeat(TILE)), body[words:].reshape(rows, count)

    def _steps(self, index: int) -> Iterator[Step]:
        """The block's walk: every layer from the bottom, tile after tile, behind the block before."""
        origin = index * self.block_size
        end = min(origin + self.block_size, self.tokens)
        tiles = [(origin + low, origin + high) for low, high in cut_tiles(end - origin, self.block_size)]
        state = [self._tokens_state(start, stop) for start, stop in tiles]
        below: list[Floats] = []
        scratch = np.zeros(SCRATCH, np.int32)
        for layer, predictor in enumerate(self.predictors):
            self.progress.wait_for(index - 1, layer)
            channels, depth = predictor.layer.chain.shape[0], self.pack.facts.depth
            sums = np.zeros((channels, end - origin), np.float32)
            if below and depth:
                sums = predictor.below @ np.concatenate(below[: -depth - 1 : -1])
            features = np.empty_like(sums)
            for (start, stop), (turns, energy, boost) in zip(tiles, state, strict=True):
                part = slice(start - origin, stop - origin)
                tile = Tile(
                    start,
                    stop - start,
                    _padded(sums[:, part]),
                    np.empty((channels, TILE), np.float32),
                    turns,
                    energy,
                    boost,
                    *self._repeats(layer, start, stop),
                )
                rows = slice(self.rows[layer], self.rows[layer + 1])
                yield Step(rows, part, (predictor.layer, tile, self.memories[layer], self.rules, scratch))
                features[:, part] = tile.features[:, : stop - start]
            below = [*below, features][-max(depth, 1) :]
            self.progress.advance(index)

    def _tokens_state(self, start: int, end: int) -> tuple[Turns, Codes, Codes]:
        """What a tile's tokens carry from layer to layer: turns, energy, boost."""
        return _turns(self.pack, start, end), np.full(TILE, STEADY, np.int32), np.zeros(TILE, np.int32)

    def _repeats(self, layer: int, start: int, end: int) -> tuple[Codes, Codes, Codes, Codes, Codes]:
        """What a tile's repeats are in a layer: gain, narrowing, position, known position, who is heard."""
        gains, order = self.predictors[layer].repeats, self.repeats.order[start:end]
        known = self.repeats.known[start:end] if layer == 0 and self.pack.facts.alone else np.full(end - start, -1)
        gain, narrowing, position = gains[:, order, 0], gains[:, order, 1], self.repeats.position[start:end]
        known, heard = _padded(known.astype(np.int32), -1), _padded((known >= 0).astype(np.int32) - 1)
        return _padded(gain), _padded(narrowing), _padded(position.astype(np.int32)), known, heard

    def _memory(self, index: int) -> Memory:
        count = self.pack.facts.layers[index].channels
        alone = self.tokens if index == 0 and self.pack.facts.alone else 0
        values, codes = np.zeros((count, alone), np.int32), np.zeros((count, alone), np.int32)
        return Memory(np.zeros((count, self.tokens), np.int8), values, codes)

    def _split(self, tensors: Sequence[Array]) -> tuple[Halves, Halves]:
        """A block's bits [rows, tokens] in coding order, and lower halves alike (no rows where there are none)."""
        bits = np.concatenate([_channels(pair)[one.order] for pair, one in self._by_layer(tensors)])
        if self.grid.raw_bits:
            return (bits >> 16).astype(np.uint16), bits.astype(np.uint16)
        return bits, np.empty((0, bits.shape[1]), np.uint16)

    def _join(self, upper: Halves, lower: Halves, tensors: Sequence[Array]) -> None:
        """Undo `_split` into a block's arrays."""
        bits: Array = upper.astype(np.uint32) << 16 | lower if self.grid.raw_bits else upper
        for (pair, one), start in zip(self._by_layer(tensors), self.rows, strict=False):
            natural = np.empty((len(one.order), bits.shape[1]), bits.dtype)
            natural[one.order] = bits[start : start + len(one.order)]
            at = 0
            for tensor in pair:
                heads, tokens, dim = tensor.shape
                np.copyto(tensor, natural[at : at + heads * dim].reshape(heads, dim, tokens).transpose(0, 2, 1))
                at += heads * dim

    def _by_layer(self, tensors: Sequence[Array]) -> Iterator[tuple[tuple[Array, Array], "Predictor"]]:
        return zip(zip(tensors[::2], tensors[1::2], strict=True), self.predictors, strict=True)

    def _costs(self, symbols: Symbols, *, raw_bytes: int) -> tuple[float, ...]:
        """What each tensor costs, in bytes: its symbols' information, and `raw_bytes` a row."""
        rows = np.empty(int(self.rows[-1]))
        weigh_rows(symbols, INFORMATION, rows)
        rows = rows / 8 + raw_bytes
        costs = []
        for start, one in zip(self.rows, self.predictors, strict=False):
            values = one.layer.table.repeat(2) == 1
            layer = rows[start : start + len(values)]
            costs += [float(layer[~values].sum()), float(layer[values].sum())]
        return tuple(costs)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A layer's part of a pack, as the walk wants it.

    `order` are the channels in coding order, `below` the weights of the layers below, nearest first; `repeats` is
    [2, 7, 2].
    """

    layer: Layer
    order: Integers
    below: Floats
    repeats: Codes

    @classmethod
    def of(cls, pack: Pack, index: int) -> "Predictor":
        """Take a layer out of a pack."""
        shape = pack.facts.layers[index]
        pairs, weights = pack.layer(index, "pairs"), pack.layer(index, "weights").astype(np.float32)
        layer = Layer(
            chain=np.ascontiguousarray(weights[:, -shape.channels :]),
            channels=pack.layer(index, "channels"),
            origin=pack.layer(index, "origin").astype(np.int32),
            frequency=np.ascontiguousarray(pairs[:, 2]),
            table=(pairs[:, 0] >= shape.heads * shape.key_dim).astype(np.int32),
            classes=pack.layer(index, "classes").astype(np.int32),
        )
        below = np.ascontiguousarray(weights[:, : -shape.channels])
        return cls(layer, pairs[:, :2].ravel().astype(np.int64), below, pack.layer(index, "repeats").astype(np.int32))


class Progress:
    """How many layers of each block have been walked: a block waits for the one before it."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._failed = False
        self._changed = threading.Condition()

    def wait_for(self, block: int, layer: int) -> None:
        """Wait until a block has finished a layer (DamagedError where it never will)."""
        with self._changed:
            self._changed.wait_for(lambda: block < 0 or self._failed or self._done.get(block, 0) > layer)
            if self._failed and self._done.get(block, 0) <= layer and block >= 0:
                raise DamagedError("a block before this one cannot be decoded")

    def advance(self, block: int) -> None:
        """A block has finished one more layer."""
        with self._changed:
            self._done[block] = self._done.get(block, 0) + 1
            self._changed.notify_all()

    def fail(self) -> None:
        """A block will never finish: whoever waits must not wait for ever."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


def _channels(pair: tuple[Array, Array]) -> Array:
    """A layer's key and value arrays [heads, rows, dim] as channels [channels, tokens], keys first."""
    return np.concatenate([tensor.transpose(0, 2, 1).reshape(-1, tensor.shape[1]) for tensor in pair])


def _turns(pack: Pack, start: int, end: int) -> Turns:
    """The rotation of tokens [start, end): angles of 64s and of ones added, then cut to the walk's precision."""
    position = np.arange(start, end)
    coarse = pack.tensors["rotation.coarse"][position // 64].astype(np.int64).transpose(1, 0, 2)
    fine = pack.tensors["rotation.fine"][position % 64].astype(np.int64).transpose(1, 0, 2)
    cosine = (coarse[..., 0] * fine[..., 0] - coarse[..., 1] * fine[..., 1]) >> (60 - TURN)
    sine = (coarse[..., 1] * fine[..., 0] + coarse[..., 0] * fine[..., 1]) >> (60 - TURN)
    still = np.ones((1, end - start), np.int64)
    cosine, sine = np.concatenate([cosine, still << TURN]), np.concatenate([sine, 0 * still])
    cosine, sine = (np.clip(one, -1 << TURN, 1 << TURN).astype(np.int32) for one in (cosine, sine))
    square = np.minimum((cosine * cosine) >> (2 * TURN - 6), 63)
    return Turns(_padded(cosine), _padded(sine), _padded(square))


def _rules(pack: Pack, form: Format) -> Rules:
    cdf = pack.tensors["distributions"].astype(np.int64)
    slots = np.arange(0, 65537, 64)
    steps = np.arange(1025) * 256 - (1 << 17)
    guess = np.stack([np.interp(slots, *_rising(table, steps)) for table in cdf]).astype(np.int32)
    packed = (cdf[:, :-1] | np.diff(cdf, axis=1) << 16).astype(np.uint32).view(np.int32)
    octaves = [max(scale, CLASSES[0]) // 8 - 5 for scale in range(256)]
    reciprocal = np.array([RECIPROCALS[scale % 8] >> octave for scale, octave in enumerate(octaves)], np.int32)
    known = np.clip(pack.tensors["known"].astype(np.int32), *CLASSES)
    return Rules(form, packed, guess, reciprocal, pack.tensors["energy"].astype(np.int32), known)


def _rising(table: Integers, steps: Integers) -> tuple[Integers, Integers]:
    """A cumulative table without its flat stretches, which cannot be inverted."""
    keep = np.concatenate([[True], np.diff(table) > 0])
    return table[keep], steps[keep]


def _padded(array: npt.NDArray[Number], idle: int = 0) -> npt.NDArray[Number]:
    """A copy, with the last axis made TILE long."""
    padded = np.full((*array.shape[:-1], TILE), idle, array.dtype)
    padded[..., : array.shape[-1]] = array
    return padded


def _symbols(shape: tuple[int, ...]) -> Symbols:
    low, size, second_low, second_size = (np.zeros(shape, np.uint16) for _ in range(4))
    return Symbols(low, size, second_low, second_size)
