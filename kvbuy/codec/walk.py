"""The walk: predicting a layer's channels, pair after pair, from what is already known of the same token.

A tile's channels lie in coding order: pairs of channels, keys first. A key pair is one plane of the rotary embedding.
It is predicted before rotation, the prediction is rotated forward, the two channels are coded, and what was decoded
is rotated back; other pairs turn by no angle. Each known channel becomes a feature of eight bits, for the pairs after
it in this layer (the chain) and for the layers above. All of it is integer arithmetic that 32 bits hold (but for
products, which are of 64 bits until they are shifted); feature sums are carried in float32, where integers below 2**24
are exact. `kvbuy.codec.pack` refuses numbers that could exceed it.

A tile is always TILE tokens wide: a short one is walked with idle lanes, which read and teach nothing.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvbuy.codec.column import (
    CERTAIN,
    CLASS,
    CLASSES,
    CODE,
    FAR,
    LOW,
    PLAIN,
    PREDICTION,
    RECIPROCAL,
    SIDE,
    VALUE,
    WIDER,
    Channel,
    Rules,
    Stream,
    decode_column,
    guess_codes,
)
from kvbuy.codec.compiled import compiled
from kvbuy.codec.grid import (
    Codes,
    Halves,
    centre,
    clip,
    greater,
    lesser,
    narrow,
    shifted_down,
    shifted_up,
    to_bits,
    to_code,
)
from kvbuy.codec.record import Symbols, Target, record_column
from kvbuy.codec.repeats import TILE

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.int8]

TURN = 14  # cosines and sines are integers over 2**14
STEADY = 13107  # the energy of a token whose residuals have the expected scale
SLOWNESS = 5  # energy is an average over about 2**5 pairs
STARTLED = 6144  # the most that a residual counts for, in units of 2**-10 of its scale
REMEMBERED = 127
FARTHEST = 1 << 28  # what features may say of a value, in fixed point
NATURAL = (1 << 62) - 1  # a mask for what is not negative, as a compiler cannot know: vectors need no check then
GROUP = 8  # pairs that are chained one by one before the rest of the layer hears of them


class Layer(NamedTuple):
    """A layer's predictor, in coding order ([channels, ...] or [pairs, ...]).

    `channels` are (mean, offset, feature shift, weight shift, memory shift); `origin` the fixed point of each pair;
    `frequency` its row in the turns; `table` its distribution; `classes` [pairs, 2, 64] by squared cosine; `chain`
    [channels, channels] the weights of the layer's own features.
    """

    chain: Floats
    channels: Codes
    origin: Codes
    frequency: Codes
    table: Codes
    classes: Codes


class Turns(NamedTuple):
    """The rotation of each token, [frequencies + 1, TILE]: cosine, sine, and the squared cosine in 64ths."""

    cosine: Codes
    sine: Codes
    square: Codes


class Tile(NamedTuple):
    """A tile as it comes to a layer: document tokens [start, start + length), and what is known of them.

    `sums` [channels, TILE] hold what the layers below say; `features` [channels, TILE] are filled in. By token, [TILE]
    or [tables, TILE]: `energy` follows how far residuals exceed their scale, `boost` is what that adds to classes;
    `gain` (in 64ths) and `narrowing` (classes) are those of the repeat at position `repeat`; `known` is an earlier
    position of the same token in a layer that depends on the token alone, or -1; `heard` is -1, or 0 where residuals
    do not count for the energy.
    """

    start: int
    length: int
    sums: Floats
    features: Floats
    turns: Turns
    energy: Codes
    boost: Codes
    gain: Codes
    narrowing: Codes
    repeat: Codes
    known: Codes
    heard: Codes


class Memory(NamedTuple):
    """What the walk remembers of a layer, [channels, document tokens]: residuals in eight bits.

    `values` (fixed point before rotation) and `codes` are those of a layer that depends on the token alone, else empty.
    """

    residuals: Bytes
    values: Codes
    codes: Codes


@compiled
def predict_channel(k: int, side: int, layer: Layer, tile: Tile, memory: Memory, work: Codes) -> None:
    """PLAIN, VALUE (both before rotation) and CLASS of a pair's first or second channel."""
    row, at = 2 * k + side, (side * SIDE) & SIDE
    offset, shift, memory_shift = layer.channels[row, 1], layer.channels[row, 3], layer.channels[row, 4]
    up, down = narrow(max(shift, 0)), narrow(max(-shift, 0))
    limit = narrow(FARTHEST >> up)
    sums, residuals, classes = tile.sums[row], memory.residuals[row], layer.classes[k, side]
    square, gain, narrowing = (
        tile.turns.square[layer.frequency[k]],
        tile.gain[layer.table[k]],
        tile.narrowing[layer.table[k]],
    )
    repeat, boost = tile.repeat, tile.boost
    for t in range(TILE):
        said = clip(narrow(sums[t]), -limit, limit)
        work[PLAIN + at + t] = narrow(shifted_down(shifted_up(said, up), down) + offset)
    for t in range(TILE):
        work[VALUE + at + t] = residuals[np.uint32(repeat[t])]
        work[CLASS + at + t] = classes[square[t] & 63]
    for t in range(TILE):
        recalled = shifted_up(narrow(work[VALUE + at + t] * gain[t]), memory_shift)
        work[VALUE + at + t] = narrow(work[PLAIN + at + t] + shifted_down(recalled, 6))
    for t in range(TILE):
        work[CLASS + at + t] = clip(narrow(work[CLASS + at + t] + boost[t] + narrowing[t]), CLASSES[0], CLASSES[1])


@compiled
def predict_known(k: int, layer: Layer, tile: Tile, memory: Memory, rules: Rules, work: Codes) -> None:
    """Replace VALUE and CLASS by what an earlier position of the same token says of a pair."""
    square = tile.turns.square[layer.frequency[k]]
    for side in range(2):
        at = side * SIDE
        for t in range(tile.length):
            if tile.known[t] >= 0:
                work[VALUE + at + t] = memory.values[2 * k + side, tile.known[t]]
                work[CLASS + at + t] = rules.known[k, side, square[t] & 63]
                if layer.table[k] == 1:
                    work[CLASS + at + t] = CERTAIN


@compiled
def recall_codes(k: int, side: int, row: int, tile: Tile, memory: Memory, work: Codes) -> None:
    """Put the known codes into a row of the scratch where a class is CERTAIN."""
    for t in range(tile.length):
        if work[CLASS + side * SIDE + t] == CERTAIN:
            work[row + side * SIDE + t] = memory.codes[2 * k + side, tile.known[t]]


@compiled
def predict_pair(k: int, layer: Layer, tile: Tile, memory: Memory, rules: Rules, work: Codes) -> None:
    """PREDICTION and CLASS of a pair for each token of the tile."""
    predict_channel(k, 0, layer, tile, memory, work)
    predict_channel(k, 1, layer, tile, memory, work)
    if memory.values.shape[1] > 0:
        predict_known(k, layer, tile, memory, rules, work)
    cosine, sine = tile.turns.cosine[layer.frequency[k]], tile.turns.sine[layer.frequency[k]]
    for t in range(TILE):
        c, s = np.int64(cosine[t]), np.int64(sine[t])
        first, second = np.int64(work[VALUE + t]), np.int64(work[VALUE + SIDE + t])
        work[PREDICTION + t] = narrow((c * first - s * second) >> TURN)
        work[PREDICTION + SIDE + t] = narrow((s * first + c * second) >> TURN)


@compiled
def learn_energy(layer: Layer, tile: Tile, rules: Rules, work: Codes) -> None:
    """Let the tokens' energy follow the residuals of the pair in VALUE."""
    energy, boost, heard = tile.energy, tile.boost, tile.heard
    for at in (0, SIDE):
        for t in range(TILE):
            scale = clip(narrow(work[CLASS + at + t] - boost[t]), CLASSES[0], CLASSES[1] + WIDER)
            work[RECIPROCAL + at + t] = rules.reciprocal[scale & 255]
        for t in range(TILE):
            apart = narrow(work[VALUE + at + t] - work[PREDICTION + at + t])
            distance = lesser(greater(apart, narrow(-apart)), FAR)
            startle = narrow((np.int64(distance) * np.int64(work[RECIPROCAL + at + t])) >> 25)
            work[LOW + at + t] = lesser(startle, STARTLED)
    for t in range(TILE):
        total = shifted_up(narrow(work[LOW + t] + work[LOW + SIDE + t]), 3)
        energy[t] = narrow(energy[t] + (shifted_down(narrow(total - energy[t]), SLOWNESS) & heard[t]))
    for t in range(TILE):
        at_most = rules.boost.shape[0] - 1
        boost[t] = rules.boost[max(min(energy[t] >> 8, at_most), 0)]


@compiled
def learn_pair(k: int, layer: Layer, tile: Tile, memory: Memory, rules: Rules, work: Codes) -> None:
    """What a known pair teaches: features, residuals to remember, the tokens' energy."""
    form, origin = rules.form, layer.origin[k]
    for t in range(2 * SIDE):
        work[VALUE + t] = centre(work[CODE + t], form, origin)
    learn_energy(layer, tile, rules, work)
    cosine, sine = tile.turns.cosine[layer.frequency[k]], tile.turns.sine[layer.frequency[k]]
    for t in range(TILE):
        c, s = np.int64(cosine[t]), np.int64(sine[t])
        first, second = np.int64(work[VALUE + t]), np.int64(work[VALUE + SIDE + t])
        work[VALUE + t] = narrow((c * first + s * second) >> TURN)
        work[VALUE + SIDE + t] = narrow((c * second - s * first) >> TURN)
    for side in range(2):
        row, at = 2 * k + side, (side * SIDE) & SIDE
        mean, feature_shift, memory_shift = layer.channels[row, 0], layer.channels[row, 2], layer.channels[row, 4]
        features, residuals = tile.features[row], memory.residuals[row, tile.start : tile.start + tile.length]
        for t in range(TILE):
            step = shifted_down(narrow(work[VALUE + at + t] - mean), feature_shift)
            features[t] = np.float32(clip(step, -127, 127))
        for t in range(tile.length):
            residual = shifted_down(narrow(work[VALUE + at + t] - work[PLAIN + at + t]), memory_shift)
            residuals[t] = np.int8(clip(residual, -REMEMBERED, REMEMBERED))
    if memory.values.shape[1] > 0:
        for side in range(2):
            for t in range(tile.length):
                memory.values[2 * k + side, tile.start + t] = clip(
                    work[VALUE + side * SIDE + t], -2 * FARTHEST, 2 * FARTHEST
                )
                memory.codes[2 * k + side, tile.start + t] = work[CODE + side * SIDE + t]


@compiled
def chain_pair(source: int, stop: int, sums: Floats, features: Floats, chain: Floats) -> None:
    """Add what rows source and source + 1 say about the rows from there to `stop`; arrays are flat, TILE a row."""
    at = (source * TILE) & NATURAL
    for row in range(source + 2, stop):
        to = (row * TILE) & NATURAL
        a, b = chain[row, source], chain[row, source + 1]
        for t in range(TILE):
            sums[to + t] += a * features[at + t] + b * features[at + TILE + t]


@compiled
def chain_group(first: int, last: int, sums: Floats, features: Floats, chain: Floats) -> None:
    """Add what a group of 16 rows says about all rows after it: four of its rows at a time, to two."""
    for row in range(last, chain.shape[0], 2):
        to = (row * TILE) & NATURAL
        for s in range(first, last, 4):
            at = (s * TILE) & NATURAL
            a0, a1, a2, a3 = chain[row, s], chain[row, s + 1], chain[row, s + 2], chain[row, s + 3]
            b0, b1, b2, b3 = chain[row + 1, s], chain[row + 1, s + 1], chain[row + 1, s + 2], chain[row + 1, s + 3]
            for t in range(TILE):
                f0, f1 = features[at + t], features[at + TILE + t]
                f2, f3 = features[at + 2 * TILE + t], features[at + 3 * TILE + t]
                sums[to + t] += (a0 * f0 + a1 * f1) + (a2 * f2 + a3 * f3)
                sums[to + TILE + t] += (b0 * f0 + b1 * f1) + (b2 * f2 + b3 * f3)


@compiled
def spread_chain(k: int, layer: Layer, tile: Tile) -> None:
    """Tell the pairs after a known pair: the rest of its group at once, the rest of the layer after each group."""
    sums, features = tile.sums.reshape(-1), tile.features.reshape(-1)
    pairs = layer.origin.shape[0]
    group_end = min((k // GROUP + 1) * GROUP, pairs)
    chain_pair(2 * k, 2 * group_end, sums, features, layer.chain)
    if k + 1 == group_end and group_end < pairs:
        chain_group(2 * (group_end - GROUP), 2 * group_end, sums, features, layer.chain)


@compiled
def decode_tile(
    layer: Layer, tile: Tile, memory: Memory, rules: Rules, work: Codes, stream: Stream, bits: Halves
) -> None:
    """Decode a layer of a tile into `bits` [channels, length]; `work` is scratch."""
    for k in range(layer.origin.shape[0]):
        predict_pair(k, layer, tile, memory, rules, work)
        for side in range(2):
            channel = Channel(side * SIDE, layer.table[k], layer.origin[k])
            guess_codes(channel, stream.states, rules, work)
            if memory.values.shape[1] > 0:
                recall_codes(k, side, CODE, tile, memory, work)
            decode_column(channel, tile.length, stream, rules, work)
            for t in range(tile.length):
                bits[2 * k + side, t] = np.uint16(to_bits(work[CODE + side * SIDE + t]))
        learn_pair(k, layer, tile, memory, rules, work)
        spread_chain(k, layer, tile)


@compiled
def record_tile(
    layer: Layer, tile: Tile, memory: Memory, rules: Rules, work: Codes, bits: Halves, symbols: Symbols, first: Target
) -> None:
    """The encoder's walk over the same layer, whose `bits` [channels, length] are recorded from `first` on."""
    for k in range(layer.origin.shape[0]):
        predict_pair(k, layer, tile, memory, rules, work)
        for side in range(2):
            for t in range(tile.length):
                work[CODE + side * SIDE + t] = to_code(bits[2 * k + side, t])
            if memory.values.shape[1] > 0:
                recall_codes(k, side, VALUE, tile, memory, work)
            channel = Channel(side * SIDE, layer.table[k], layer.origin[k])
            target = Target(first.row + 2 * k + side, first.start, first.length)
            record_column(channel, symbols, target, rules, work)
        learn_pair(k, layer, tile, memory, rules, work)
        spread_chain(k, layer, tile)
