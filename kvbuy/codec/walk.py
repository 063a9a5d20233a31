"""The walk: predicting a layer's channels, pair after pair, from what is already known of the same token.

A tile's channels lie in coding order: pairs of channels, keys first. A key pair is one plane of the rotary embedding.
It is predicted before rotation, the prediction is rotated forward, the two channels are coded, and what was decoded
is rotated back; other pairs turn by no angle. Each known channel becomes a feature of eight bits, for the pairs after
it in this layer (the chain) and for the layers above. All of it is integer arithmetic in 64 bits; feature sums are
carried in float32, where integers below 2**24 are exact (`kvbuy.codec.pack` refuses weights that could exceed it)."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvbuy.codec.column import (
    CERTAIN,
    CLASSES,
    Integers,
    Lanes,
    Symbols,
    Tables,
    decode_column,
    guess_codes,
    record_column,
)
from kvbuy.codec.grid import Codes, Format, centre, compiled

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.int8]

TURN = 14  # cosines and sines are integers over 2**14
STEADY = 13107  # the energy of a token whose residuals have the expected scale
SLOWNESS = 5  # energy is an average over about 2**5 pairs
REMEMBERED = 127
GROUP = 8  # pairs that are chained one by one before the rest of the layer hears of them


class Layer(NamedTuple):
    """A layer's predictor, in coding order ([channels, ...] or [pairs, ...]).

    `channels` are (mean, offset, feature shift, weight shift, memory shift); `origin` the fixed point of each pair;
    `frequency` its row in the turns; `table` its distribution; `classes` [pairs, 2, 64] by squared cosine; `chain`
    [channels, channels] the weights of the layer's own features.
    """

    chain: Floats
    channels: Integers
    origin: Integers
    frequency: Integers
    table: Integers
    classes: Integers


class Turns(NamedTuple):
    """The rotation of each token, [frequencies + 1, tokens]: cosine, sine, and the squared cosine in 64ths."""

    cosine: Integers
    sine: Integers
    square: Integers


class Tokens(NamedTuple):
    """What is known of a tile's tokens before the layer, [tokens] or [tables, tokens].

    `energy` follows how far residuals exceed their scale, `boost` is what that adds to classes; `gain` (in 64ths) and
    `narrowing` (classes) are those of the repeat at position `repeat`; `known` is an earlier position of the same token
    in a layer that depends on the token alone, or -1.
    """

    energy: Integers
    boost: Integers
    gain: Integers
    narrowing: Integers
    repeat: Integers
    known: Integers


class Memory(NamedTuple):
    """What the walk remembers of a layer, [channels, document tokens]: residuals in eight bits.

    `values` (fixed point before rotation) and `codes` are those of a layer that depends on the token alone, else empty.
    """

    residuals: Bytes
    values: Codes
    codes: Codes


class Pair(NamedTuple):
    """Scratch for one pair, [2, tokens] each: plain predictions, predictions that are coded, classes, values, codes."""

    plain: Integers
    prediction: Integers
    classes: Integers
    values: Integers
    codes: Codes


@compiled
def predict_pair(
    k: int, sums: Floats, layer: Layer, turns: Turns, tokens: Tokens, memory: Memory, tables: Tables, pair: Pair
) -> None:
    """Predictions and classes of a pair for each token of the tile."""
    f, table = layer.frequency[k], layer.table[k]
    count = sums.shape[1]
    alone = memory.values.shape[1] > 0
    for side in range(2):
        row = 2 * k + side
        offset, shift, memory_shift = layer.channels[row, 1], layer.channels[row, 3], layer.channels[row, 4]
        up, down = max(shift, 0), max(-shift, 0)
        for t in range(count):
            pair.plain[side, t] = ((np.int64(sums[row, t]) << up) >> down) + offset
        for t in range(count):
            recalled = np.int64(memory.residuals[row, tokens.repeat[t]]) * tokens.gain[table, t]
            pair.values[side, t] = pair.plain[side, t] + ((recalled << memory_shift) >> 6)
        for t in range(count):
            wanted = layer.classes[k, side, turns.square[f, t]] + tokens.boost[t] + tokens.narrowing[table, t]
            pair.classes[side, t] = min(max(wanted, CLASSES[0]), CLASSES[1])
        if alone:
            for t in range(count):
                if tokens.known[t] >= 0:
                    pair.values[side, t] = memory.values[row, tokens.known[t]]
                    pair.classes[side, t] = tables.known[k, side, turns.square[f, t]]
                    if table == 1:
                        pair.classes[side, t] = CERTAIN
    for t in range(count):
        c, s = turns.cosine[f, t], turns.sine[f, t]
        pair.prediction[0, t] = (c * pair.values[0, t] - s * pair.values[1, t]) >> TURN
        pair.prediction[1, t] = (s * pair.values[0, t] + c * pair.values[1, t]) >> TURN


@compiled
def learn_pair(
    k: int,
    start: int,
    sums: Floats,
    features: Floats,
    layer: Layer,
    turns: Turns,
    tokens: Tokens,
    memory: Memory,
    tables: Tables,
    form: Format,
    pair: Pair,
) -> None:
    """What a known pair teaches: features, residuals to remember, the tokens' energy."""
    f, origin = layer.frequency[k], layer.origin[k]
    count = sums.shape[1]
    alone = memory.values.shape[1] > 0
    for side in range(2):
        for t in range(count):
            pair.values[side, t] = centre(pair.codes[side, t], form, origin)
    for t in range(count):
        if pair.classes[0, t] != CERTAIN and (not alone or tokens.known[t] < 0):
            total = 0
            for side in range(2):
                distance = min(abs(pair.values[side, t] - pair.prediction[side, t]), (1 << 21) - 1)
                scale = max(pair.classes[side, t] - tokens.boost[t], 0)
                total += min((distance * tables.reciprocal[scale]) >> 28, 6144)
            tokens.energy[t] += ((total << 3) - tokens.energy[t]) >> SLOWNESS
            tokens.boost[t] = tables.boost[min(tokens.energy[t] >> 8, tables.boost.shape[0] - 1)]
    for t in range(count):
        c, s = turns.cosine[f, t], turns.sine[f, t]
        first = (c * pair.values[0, t] + s * pair.values[1, t]) >> TURN
        pair.values[1, t] = (c * pair.values[1, t] - s * pair.values[0, t]) >> TURN
        pair.values[0, t] = first
    for side in range(2):
        row = 2 * k + side
        mean, feature_shift, memory_shift = layer.channels[row, 0], layer.channels[row, 2], layer.channels[row, 4]
        for t in range(count):
            value = pair.values[side, t]
            features[row, t] = np.float32(min(max((value - mean) >> feature_shift, -127), 127))
            residual = (value - pair.plain[side, t]) >> memory_shift
            memory.residuals[row, start + t] = np.int8(min(max(residual, -REMEMBERED), REMEMBERED))
        if alone:
            for t in range(count):
                memory.values[row, start + t] = np.int32(pair.values[side, t])
                memory.codes[row, start + t] = pair.codes[side, t]


@compiled
def chain_pairs(first: int, last: int, stop: int, sums: Floats, features: Floats, chain: Floats) -> None:
    """Add what rows [first, last) say about rows [last, stop)."""
    count = sums.shape[1]
    for row in range(last, stop):
        for source in range(first, last, 2):
            a, b = chain[row, source], chain[row, source + 1]
            for t in range(count):
                sums[row, t] += a * features[source, t] + b * features[source + 1, t]


@compiled
def chain_group(first: int, last: int, sums: Floats, features: Floats, chain: Floats) -> None:
    """Add what a group of 16 rows says about all rows after it, eight of its rows at a time."""
    count = sums.shape[1]
    for row in range(last, sums.shape[0]):
        for s in range(first, last, 8):
            w0, w1, w2, w3 = chain[row, s], chain[row, s + 1], chain[row, s + 2], chain[row, s + 3]
            w4, w5, w6, w7 = chain[row, s + 4], chain[row, s + 5], chain[row, s + 6], chain[row, s + 7]
            for t in range(count):
                sums[row, t] += (
                    (w0 * features[s, t] + w1 * features[s + 1, t])
                    + (w2 * features[s + 2, t] + w3 * features[s + 3, t])
                    + (w4 * features[s + 4, t] + w5 * features[s + 5, t])
                    + (w6 * features[s + 6, t] + w7 * features[s + 7, t])
                )


@compiled
def spread_chain(k: int, sums: Floats, features: Floats, chain: Floats) -> None:
    """Tell the pairs after a known pair: the rest of its group at once, the rest of the layer after each group."""
    pairs = sums.shape[0] // 2
    group_end = min((k // GROUP + 1) * GROUP, pairs)
    chain_pairs(2 * k, 2 * k + 2, 2 * group_end, sums, features, chain)
    if k + 1 == group_end and group_end < pairs:
        chain_group(2 * (group_end - GROUP), 2 * group_end, sums, features, chain)


@compiled
def decode_tile(
    start: int,
    sums: Floats,
    features: Floats,
    layer: Layer,
    turns: Turns,
    tokens: Tokens,
    memory: Memory,
    tables: Tables,
    form: Format,
    pair: Pair,
    lanes: Lanes,
    codes: Codes,
) -> None:
    """Decode a layer of a tile that begins at document token `start` into `codes` [channels, tokens].

    `sums` [channels, tokens] hold the layers below; `features` [channels, tokens] are filled in.
    """
    alone = memory.values.shape[1] > 0
    for k in range(layer.origin.shape[0]):
        predict_pair(k, sums, layer, turns, tokens, memory, tables, pair)
        for side in range(2):
            guess = tables.guess[layer.table[k]]
            column = pair.codes[side]
            guess_codes(lanes, pair.prediction[side], pair.classes[side], guess, form, layer.origin[k], column)
            if alone:
                for t in range(column.shape[0]):
                    if pair.classes[side, t] == CERTAIN:
                        column[t] = memory.codes[2 * k + side, tokens.known[t]]
            decode_column(
                lanes, pair.prediction[side], pair.classes[side], layer.table[k], tables, form, layer.origin[k], column
            )
            codes[2 * k + side] = column
        learn_pair(k, start, sums, features, layer, turns, tokens, memory, tables, form, pair)
        spread_chain(k, sums, features, layer.chain)


@compiled
def record_tile(
    start: int,
    sums: Floats,
    features: Floats,
    layer: Layer,
    turns: Turns,
    tokens: Tokens,
    memory: Memory,
    tables: Tables,
    form: Format,
    pair: Pair,
    codes: Codes,
    symbols: Symbols,
    first_row: int,
    at: int,
) -> None:
    """The encoder's walk over the same layer: records symbols in rows from `first_row`, columns from `at`."""
    alone = memory.values.shape[1] > 0
    known = np.zeros(codes.shape[1], np.int32)
    for k in range(layer.origin.shape[0]):
        predict_pair(k, sums, layer, turns, tokens, memory, tables, pair)
        for side in range(2):
            row = 2 * k + side
            pair.codes[side] = codes[row]
            if alone:
                for t in range(known.shape[0]):
                    known[t] = memory.codes[row, max(tokens.known[t], 0)]
            record_column(
                symbols,
                first_row + row,
                at,
                pair.prediction[side],
                pair.classes[side],
                known,
                layer.table[k],
                tables,
                form,
                layer.origin[k],
                pair.codes[side],
            )
        learn_pair(k, start, sums, features, layer, turns, tokens, memory, tables, form, pair)
        spread_chain(k, sums, features, layer.chain)
