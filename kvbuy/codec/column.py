"""The entropy coder: one channel of a tile of tokens, each token on a rANS state of its own.

A residual's distribution is a static table (a cumulative distribution over -8 to 8 in units of its expected scale), put
at the prediction and stretched by a **class**: the scale is 2**(class / 8) in fixed point. A cell's probability is the
difference of the table at its edges, in units of 2**-16. Three cases need a second symbol:

- the **zone** around zero, where cells are too fine for 16 bits: its codes share one symbol, and a second one says
  where in the zone the value is, uniformly (the fixed point there is 15 bits below the zone's end, so the edges
  themselves are the probabilities); the two slots at zero mean "raw";
- the **tail**, where a cell has no probability left: a symbol of its own, then the same table with four times the
  scale; its tail means "raw";
- **raw**: the code in 16 bits.

States are 32-bit, words 16-bit, so a token takes at most one word a symbol. Tokens' words are interleaved: for each
channel first symbols in token order, then second ones, then raw codes. The decoder reads forward, the encoder writes
backward. Reading beyond the stream gives its last word again: what is decoded from a damaged stream is bounded, and
wrong, and fails the block's digest.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvbuy.codec.grid import Codes, Format, compiled, edge, inlined

Integers = npt.NDArray[np.int64]

TAIL = 65536 - 128  # slots from here on are the tail's
WIDER = 16  # classes: four times the scale
CLASSES = (40, 144)  # the least and the greatest class
RECIPROCALS = (
    274877906944,
    252064152055,
    231143846582,
    211959841877,
    194368031998,
    178236271212,
    163443381347,
    149878241531,
)  # 2**(38 - class / 8) for the first octave
CERTAIN = -1  # not a class: the code is known, but for the tail
CLIP = (1 << 21) - 1
REACH = 1 << 17  # 8 scales in units of 2**-14


class Tables(NamedTuple):
    """What is looked up.

    `cdf` is [tables, 1025]: 64 steps a scale, 0 to TAIL. `guess` is its inverse [tables, 1025], 64 slots a step, in
    units of 2**-14: a first guess, never trusted. `reciprocal` is 2**38 over a class's scale. `boost` is the change of
    class by energy, `known` [pairs, 2, 64] the classes of a token that repeats itself (both for `kvbuy.codec.walk`).
    """

    cdf: Integers
    guess: Integers
    reciprocal: Integers
    boost: Integers
    known: Integers


class Lanes(NamedTuple):
    """A tile at work: rANS states [tokens], the words and how many were read, scratch [tokens] for one channel."""

    states: npt.NDArray[np.uint32]
    words: npt.NDArray[np.uint16]
    read: Integers
    low: Integers
    high: Integers
    kind: Integers
    floats: npt.NDArray[np.float32]
    patterns: Codes


@inlined
def cumulative(at: int, prediction: int, reciprocal: int, cdf: Integers) -> int:
    """The probability below a point, in units of 2**-16."""
    distance = min(max(at - prediction, -CLIP), CLIP)
    z = min(max((distance * reciprocal) >> 24, -REACH), REACH - 1) + REACH
    below = cdf[z >> 8]
    return below + (((cdf[(z >> 8) + 1] - below) * (z & 255)) >> 8)


@inlined
def zone(scale: int, form: Format, origin: int) -> tuple[int, int]:
    """How many octaves the zone's fixed point is finer, and the magnitude code at its end."""
    octave = max((scale >> 3) - form.zone, 0)
    return 15 - octave, min(max(octave + origin - form.mantissa - 1, 0), 250) << form.mantissa


@compiled
def find(slot: int, near: int, prediction: int, reciprocal: int, cdf: Integers, form: Format, origin: int) -> int:
    """The code whose cell holds a slot: tried near a guess, then by bisection over all codes."""
    low, high = -32768, 32767
    code = near
    for _ in range(6):
        if code < low or code > high:
            break
        if slot < cumulative(edge(code, form, origin), prediction, reciprocal, cdf):
            code = high = code - 1
        elif slot >= cumulative(edge(code + 1, form, origin), prediction, reciprocal, cdf):
            code = low = code + 1
        else:
            return code
    while low < high:
        middle = (low + high + 1) >> 1
        if cumulative(edge(middle, form, origin), prediction, reciprocal, cdf) <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@compiled
def find_in_zone(slot: int, end: int, form: Format, origin: int) -> int:
    """The code in the zone whose edges hold a slot."""
    low, high = -end, end - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if edge(middle, form, origin) <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@inlined
def advance(lanes: Lanes, token: int, low: int, size: int) -> None:
    """Take a symbol off a token's state, and a word from the stream where the state ran low."""
    state = lanes.states[token]
    state = np.uint32(np.uint32(size) * (state >> np.uint32(16)) + (state & np.uint32(65535)) - np.uint32(low))
    if state < np.uint32(65536):
        word = lanes.words[min(lanes.read[0], lanes.words.shape[0] - 1)]
        state = np.uint32((state << np.uint32(16)) | np.uint32(word))
        lanes.read[0] += 1
    lanes.states[token] = state


@compiled
def guess_codes(
    lanes: Lanes, predictions: Integers, classes: Integers, guess: Integers, form: Format, origin: int, codes: Codes
) -> None:
    """A code for each token that is most often the right one. (Floats are welcome here: `find` corrects.)"""
    count = predictions.shape[0]
    for t in range(count):
        slot = np.int64(lanes.states[t] & np.uint32(65535))
        z = guess[slot >> 6] + (((guess[(slot >> 6) + 1] - guess[slot >> 6]) * (slot & 63)) >> 6)
        scale = classes[t]
        step = (z * (256 + 32 * (scale & 7))) >> 8
        octave = (scale >> 3) - 14
        lanes.floats[t] = np.float32(predictions[t] + ((step << max(octave, 0)) >> max(-octave, 0)))
    unit = (origin - form.bias - form.mantissa - 1) << 23
    rounding = form.centred << (22 - form.mantissa)
    for t in range(count):
        pattern = np.int64(lanes.patterns[t])
        size = ((pattern & 0x7FFFFFFF) + unit + rounding) >> (23 - form.mantissa)
        size = min(max(size - ((127 - form.bias) << form.mantissa), 0), 32767)
        codes[t] = np.int32(size if pattern >= 0 else -1 - size)


@compiled
def decode_column(
    lanes: Lanes,
    predictions: Integers,
    classes: Integers,
    table: int,
    tables: Tables,
    form: Format,
    origin: int,
    codes: Codes,
) -> None:
    """Decode one channel: `codes` [tokens] are filled in; where a class is CERTAIN they hold the known code before."""
    count = predictions.shape[0]
    cdf = tables.cdf[table]
    low, high, kind = lanes.low, lanes.high, lanes.kind
    for t in range(count):
        reciprocal = tables.reciprocal[classes[t]]
        low[t] = cumulative(edge(codes[t], form, origin), predictions[t], reciprocal, cdf)
        high[t] = cumulative(edge(codes[t] + 1, form, origin), predictions[t], reciprocal, cdf)
    seconds = 0
    for t in range(count):
        slot = np.int64(lanes.states[t] & np.uint32(65535))
        kind[t] = 0
        if classes[t] == CERTAIN:
            low[t], high[t] = 0, TAIL
        end = zone(classes[t], form, origin)[1]
        code = codes[t]
        if slot < low[t] or slot >= high[t] or (classes[t] != CERTAIN and (code if code >= 0 else -1 - code) < end):
            reciprocal = tables.reciprocal[classes[t]]
            if slot >= TAIL:
                kind[t], low[t], high[t] = 2, TAIL, 65536
                seconds += 1
                continue
            low[t] = cumulative(edge(-end, form, origin), predictions[t], reciprocal, cdf)
            high[t] = cumulative(edge(end, form, origin), predictions[t], reciprocal, cdf)
            if slot >= low[t] and slot < high[t]:
                kind[t] = 1
                seconds += 1
                continue
            codes[t] = find(slot, code, predictions[t], reciprocal, cdf, form, origin)
            low[t] = cumulative(edge(codes[t], form, origin), predictions[t], reciprocal, cdf)
            high[t] = cumulative(edge(codes[t] + 1, form, origin), predictions[t], reciprocal, cdf)
    for t in range(count):
        advance(lanes, t, low[t], high[t] - low[t])
    if seconds:
        decode_seconds(lanes, predictions, classes, cdf, tables, form, origin, codes)


@compiled
def decode_seconds(
    lanes: Lanes,
    predictions: Integers,
    classes: Integers,
    cdf: Integers,
    tables: Tables,
    form: Format,
    origin: int,
    codes: Codes,
) -> None:
    """Decode the second symbols of a channel, then its raw codes."""
    for t in range(predictions.shape[0]):
        slot = np.int64(lanes.states[t] & np.uint32(65535))
        if lanes.kind[t] == 1:
            finer, end = zone(classes[t], form, origin)
            if slot == 32767 or slot == 32768:
                lanes.kind[t] = 3
                advance(lanes, t, 32767, 2)
            else:
                codes[t] = find_in_zone(slot - 32768, end, form, origin - finer)
                low = edge(codes[t], form, origin - finer)
                advance(lanes, t, low + 32768, edge(codes[t] + 1, form, origin - finer) - low)
        elif lanes.kind[t] == 2:
            if slot >= TAIL or classes[t] == CERTAIN:
                lanes.kind[t] = 3
                if classes[t] != CERTAIN:
                    advance(lanes, t, TAIL, 65536 - TAIL)
            else:
                reciprocal = tables.reciprocal[classes[t] + WIDER]
                codes[t] = find(slot, codes[t], predictions[t], reciprocal, cdf, form, origin)
                low = cumulative(edge(codes[t], form, origin), predictions[t], reciprocal, cdf)
                high = cumulative(edge(codes[t] + 1, form, origin), predictions[t], reciprocal, cdf)
                advance(lanes, t, low, high - low)
    for t in range(predictions.shape[0]):
        if lanes.kind[t] == 3:
            slot = np.int64(lanes.states[t] & np.uint32(65535))
            codes[t] = np.int32(slot - 32768)
            advance(lanes, t, slot, 1)


class Symbols(NamedTuple):
    """What an encoder writes, [channels, tokens] of uint16 each: first and second symbols as (low, size), size 0: none.

    A second size of 0xFFFF stands for "raw at once": it is no size that a symbol can have.
    """

    low: npt.NDArray[np.uint16]
    size: npt.NDArray[np.uint16]
    second_low: npt.NDArray[np.uint16]
    second_size: npt.NDArray[np.uint16]


AT_ONCE = 0xFFFF


@compiled
def record_column(
    symbols: Symbols,
    row: int,
    start: int,
    predictions: Integers,
    classes: Integers,
    known: Codes,
    table: int,
    tables: Tables,
    form: Format,
    origin: int,
    codes: Codes,
) -> None:
    """Record the symbols of one channel's codes [tokens]. `known` are the codes where a class is CERTAIN."""
    cdf = tables.cdf[table]
    for t in range(predictions.shape[0]):
        code, at, scale = codes[t], start + t, classes[t]
        symbols.second_size[row, at] = 0
        if scale == CERTAIN:
            right = code == known[t]
            symbols.low[row, at] = 0 if right else TAIL
            symbols.size[row, at] = TAIL if right else 65536 - TAIL
            symbols.second_size[row, at] = 0 if right else AT_ONCE
            continue
        reciprocal = tables.reciprocal[scale]
        finer, end = zone(scale, form, origin)
        inside = (code if code >= 0 else -1 - code) < end
        first = -end if inside else code
        last = end if inside else code + 1
        low = cumulative(edge(first, form, origin), predictions[t], reciprocal, cdf)
        high = cumulative(edge(last, form, origin), predictions[t], reciprocal, cdf)
        if high > low:
            symbols.low[row, at], symbols.size[row, at] = low, high - low
            if inside:
                low = edge(code, form, origin - finer)
                high = edge(code + 1, form, origin - finer)
                plain = high > low and (low >= 1 or high <= -1)
                symbols.second_low[row, at] = low + 32768 if plain else 32767
                symbols.second_size[row, at] = high - low if plain else 2
            continue
        symbols.low[row, at], symbols.size[row, at] = TAIL, 65536 - TAIL
        reciprocal = tables.reciprocal[scale + WIDER]
        low = cumulative(edge(code, form, origin), predictions[t], reciprocal, cdf)
        high = cumulative(edge(code + 1, form, origin), predictions[t], reciprocal, cdf)
        symbols.second_low[row, at] = low if high > low else TAIL
        symbols.second_size[row, at] = high - low if high > low else 65536 - TAIL


@inlined
def needs_raw(symbols: Symbols, row: int, at: int) -> bool:
    """Whether a code's symbols end in its 16 raw bits."""
    if symbols.second_size[row, at] == AT_ONCE:
        return True
    if symbols.low[row, at] == TAIL:
        return bool(symbols.second_low[row, at] == TAIL)
    return bool(symbols.second_size[row, at] == 2 and symbols.second_low[row, at] == 32767)


@inlined
def put(
    states: npt.NDArray[np.uint32], token: int, low: int, size: int, words: npt.NDArray[np.uint16], end: int
) -> int:
    """Put a symbol onto a token's state, a word before `end` where the state would overflow; returns the new end."""
    state = np.uint64(states[token])
    if state >= np.uint64(size) << np.uint64(16):
        end -= 1
        words[end] = np.uint16(state & np.uint64(65535))
        state >>= np.uint64(16)
    states[token] = np.uint32(((state // np.uint64(size)) << np.uint64(16)) + state % np.uint64(size) + np.uint64(low))
    return end


@compiled
def write_rows(
    symbols: Symbols,
    first: int,
    last: int,
    start: int,
    stop: int,
    codes: Codes,
    states: npt.NDArray[np.uint32],
    words: npt.NDArray[np.uint16],
    end: int,
) -> int:
    """Write the rows [first, last) of tokens [start, stop) before `end`, last symbol first; returns the new end."""
    for row in range(last - 1, first - 1, -1):
        for t in range(stop - 1, start - 1, -1):
            if needs_raw(symbols, row, t):
                end = put(states, t, np.int64(codes[row, t]) + 32768, 1, words, end)
        for t in range(stop - 1, start - 1, -1):
            if symbols.second_size[row, t] not in (0, AT_ONCE):
                end = put(states, t, symbols.second_low[row, t], symbols.second_size[row, t], words, end)
        for t in range(stop - 1, start - 1, -1):
            end = put(states, t, symbols.low[row, t], symbols.size[row, t], words, end)
    return end
