"""The entropy coder's arithmetic: one channel of a tile of tokens, each token on a rANS state of its own.

A residual's distribution is a static table (a cumulative distribution over -8 to 8 in units of its expected scale), put
at the prediction and stretched by a **class**: the scale is 2**(class / 8) in fixed point. An edge's distance from the
prediction, cut to below 2**21, times a reciprocal of the scale is its place in the table in units of 2**-14; the table
is straight between its steps. A cell's probability is the difference at its edges, in units of 2**-16. Three cases
need a second symbol:

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

from kvbuy.codec.compiled import compiled, inlined
from kvbuy.codec.grid import Codes, Format, clip, edge, float_bits, greater, narrow, rank, shifted_down, shifted_up
from kvbuy.codec.pack import TAIL
from kvbuy.codec.repeats import TILE

Words = npt.NDArray[np.uint16]
States = npt.NDArray[np.uint32]

WIDER = 16  # classes: four times the scale
CLASSES = (40, 144)  # the least and the greatest class
CERTAIN = -1  # not a class: the code is known, but for the tail
FAR = (1 << 21) - 1
REACH = 1 << 17  # 8 scales in units of 2**-14
RECIPROCALS = (1073741824, 984625593, 902905650, 827968132, 759250124, 696235434, 638450708, 585461880)
# A reciprocal is 2**35 over the scale: 2**(30 - class / 8) for the classes from 40 on above, halved after

# A pair's scratch is one array of 32-bit numbers, so that a compiler sees which loops may run in vectors. Each name
# is a row of it: TILE numbers for the pair's first channel, then as many for its second.
SIDE = TILE
PLAIN, VALUE, PREDICTION, CLASS, CODE, RECIPROCAL, LOW, HIGH, BELOW, ABOVE, KIND = range(0, 22 * TILE, 2 * TILE)
SCRATCH = 22 * TILE


class Rules(NamedTuple):
    """What holds for a whole document: its format, and what is looked up.

    `cdf` is [tables, 1024]: 64 steps a scale, 0 to TAIL; the lower 16 bits of an entry are the probability below, the
    upper 16 how much the step adds. `guess` is its inverse [tables, 1025], 64 slots a step, in units of 2**-14: a first
    guess, never trusted. `reciprocal` [256] is 2**35 over a class's scale. `boost` [512] is the change of class by
    energy, `known` [pairs, 2, 64] the classes of a token that repeats itself (both for `kvbuy.codec.walk`).
    """

    form: Format
    cdf: Codes
    guess: Codes
    reciprocal: Codes
    boost: Codes
    known: Codes


class Channel(NamedTuple):
    """A channel of a pair: where its half of each scratch row begins, its distribution, and its fixed point.

    `at` is 0 or SIDE. It is masked with SIDE before use: indices that cannot be negative need no check.
    """

    at: int
    table: int
    origin: int


class Stream(NamedTuple):
    """A tile's rANS states [TILE], the block's words with TILE more of the last one, and how many were read, [1]."""

    states: States
    words: Words
    read: npt.NDArray[np.int64]


@inlined
def place(at: int, prediction: int, reciprocal: int) -> int:
    """Where a point stands in the cumulative table: 0 to 16 scales in units of 2**-14."""
    distance = clip(narrow(at - prediction), -FAR, FAR)
    return narrow(clip(narrow((np.int64(distance) * np.int64(reciprocal)) >> 21), -REACH, REACH - 1) + REACH)


@inlined
def between(step: int, where: int) -> int:
    """The probability at a place, in units of 2**-16, given its step of the table."""
    return narrow((step & 0xFFFF) + shifted_down(narrow((shifted_down(step, 16) & 0xFFFF) * (where & 255)), 8))


@inlined
def cumulative(at: int, prediction: int, reciprocal: int, cdf: Codes) -> int:
    """The probability below a point, in units of 2**-16."""
    where = place(at, prediction, reciprocal)
    return between(cdf[(where >> 8) & 1023], where)


@inlined
def zone_end(scale: int, form: Format, origin: int) -> int:
    """The magnitude code at which the zone of a class ends."""
    octave = greater(narrow(shifted_down(scale, 3) - form.zone), 0)
    return shifted_up(clip(narrow(octave + origin - form.mantissa - 1), 0, 250), form.mantissa)


@inlined
def zone_origin(scale: int, form: Format, origin: int) -> int:
    """The zone's fixed point: the magnitude at its end is below 2**15."""
    return narrow(origin - 15 + greater(narrow(shifted_down(scale, 3) - form.zone), 0))


@compiled
def find(slot: int, near: int, prediction: int, reciprocal: int, cdf: Codes, form: Format, origin: int) -> int:
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
def look_up_edges(work: Codes, cdf: Codes, at: int) -> None:
    """Turn the places in LOW and HIGH into probabilities."""
    for t in range(TILE):
        work[BELOW + at + t] = cdf[(work[LOW + at + t] >> 8) & 1023]
        work[ABOVE + at + t] = cdf[(work[HIGH + at + t] >> 8) & 1023]
    for t in range(TILE):
        work[LOW + at + t] = between(work[BELOW + at + t], work[LOW + at + t])
        work[HIGH + at + t] = between(work[ABOVE + at + t], work[HIGH + at + t])


@compiled
def guess_codes(channel: Channel, states: States, rules: Rules, work: Codes) -> None:
    """A code for each token that is most often the right one. (Floats are welcome here: `find` corrects.)"""
    at, form = channel.at & SIDE, rules.form
    guess = rules.guess[channel.table]
    for t in range(TILE):
        slot = np.int64(states[t] & np.uint32(0xFFFF))
        work[BELOW + at + t] = guess[slot >> 6]
        work[ABOVE + at + t] = guess[(slot >> 6) + 1]
        work[RECIPROCAL + at + t] = rules.reciprocal[work[CLASS + at + t] & 255]
    unit = narrow(clip(channel.origin - form.mantissa - 128, -255, 255) << 23)
    rounding = narrow(form.centred << ((22 - form.mantissa) & 31))
    shift = 23 - form.mantissa
    for t in range(TILE):
        part = np.float32(narrow(states[t] & np.uint32(63))) * np.float32(1 / 64)
        low = np.float32(work[BELOW + at + t])
        z = low + (np.float32(work[ABOVE + at + t]) - low) * part
        scale = np.float32(1 << 21) / np.float32(work[RECIPROCAL + at + t])
        number = np.float32(work[PREDICTION + at + t]) + z * scale
        pattern = narrow(float_bits(np.float32(number)))
        size = narrow((pattern & 0x7FFFFFFF) + unit + rounding)
        size = clip(shifted_down(size, shift), 0, 32767)
        work[CODE + at + t] = size if pattern >= 0 else narrow(-1 - size)


@compiled
def decode_column(channel: Channel, count: int, stream: Stream, rules: Rules, work: Codes) -> None:
    """Decode `count` tokens of one channel: CODE is filled in, from guesses (or where CERTAIN, known codes)."""
    at, form, origin = channel.at & SIDE, rules.form, channel.origin
    states = stream.states
    for t in range(TILE):
        code, prediction, reciprocal = work[CODE + at + t], work[PREDICTION + at + t], work[RECIPROCAL + at + t]
        work[LOW + at + t] = place(edge(code, form, origin), prediction, reciprocal)
        work[HIGH + at + t] = place(edge(narrow(code + 1), form, origin), prediction, reciprocal)
    look_up_edges(work, rules.cdf[channel.table], at)
    for t in range(TILE):
        slot = narrow(states[t] & np.uint32(0xFFFF))
        inside = rank(work[CODE + at + t]) < zone_end(work[CLASS + at + t], form, origin)
        missed = (slot < work[LOW + at + t]) | (slot >= work[HIGH + at + t]) | inside | (work[CLASS + at + t] < 0)
        work[KIND + at + t] = narrow(missed)
    seconds = 0
    for t in range(count):
        if work[KIND + at + t]:
            seconds += correct(t, channel, narrow(states[t] & np.uint32(0xFFFF)), rules, work)
    advance_all(at, count, stream, work)
    if seconds:
        decode_seconds(channel, count, stream, rules, work)


PLAIN_SYMBOL, ZONE_SYMBOL, TAIL_SYMBOL, RAW_SYMBOL = range(4)


@compiled
def correct(t: int, channel: Channel, slot: int, rules: Rules, work: Codes) -> int:
    """Find a token's symbol where the guess was no good; returns 1 where it takes a second symbol."""
    at, form, origin, cdf = channel.at & SIDE, rules.form, channel.origin, rules.cdf[channel.table]
    if slot >= TAIL:
        work[KIND + at + t], work[LOW + at + t], work[HIGH + at + t] = TAIL_SYMBOL, TAIL, 65536
        return 1
    if work[CLASS + at + t] == CERTAIN:
        work[KIND + at + t], work[LOW + at + t], work[HIGH + at + t] = PLAIN_SYMBOL, 0, TAIL
        return 0
    prediction, reciprocal = work[PREDICTION + at + t], work[RECIPROCAL + at + t]
    end = zone_end(work[CLASS + at + t], form, origin)
    low = cumulative(edge(-end, form, origin), prediction, reciprocal, cdf)
    high = cumulative(edge(end, form, origin), prediction, reciprocal, cdf)
    kind = ZONE_SYMBOL
    if slot < low or slot >= high:
        kind = PLAIN_SYMBOL
        code = find(slot, work[CODE + at + t], prediction, reciprocal, cdf, form, origin)
        low = cumulative(edge(code, form, origin), prediction, reciprocal, cdf)
        high = cumulative(edge(code + 1, form, origin), prediction, reciprocal, cdf)
        work[CODE + at + t] = code
    work[KIND + at + t], work[LOW + at + t], work[HIGH + at + t] = kind, low, high
    return kind


@compiled
def advance_all(at: int, count: int, stream: Stream, work: Codes) -> None:
    """Take each token's symbol off its state, and a word from the stream where the state ran low."""
    at, states, words = at & SIDE, stream.states, stream.words
    first = min(stream.read[0], words.shape[0] - TILE)
    taken = 0
    for t in range(TILE):
        size = np.uint32(narrow(work[HIGH + at + t] - work[LOW + at + t]))
        state = states[t]
        rest = np.uint32((state & np.uint32(0xFFFF)) - np.uint32(work[LOW + at + t]))
        states[t] = np.uint32(np.uint32(size * (state >> np.uint32(16))) + rest)
    for t in range(count):
        state = states[t]
        runs_low = int(state < np.uint32(65536))  # arithmetic for a branch that nobody can predict
        word = np.uint32(words[first + taken]) * np.uint32(runs_low)
        states[t] = np.uint32(np.uint32(state << np.uint32(runs_low << 4)) | word)
        taken += runs_low
    stream.read[0] += taken


@inlined
def advance(stream: Stream, token: int, low: int, size: int) -> None:
    """Take one symbol off one token's state, as `advance_all` does."""
    state = stream.states[token]
    state = np.uint32(np.uint32(size) * (state >> np.uint32(16)) + (state & np.uint32(65535)) - np.uint32(low))
    if state < np.uint32(65536):
        word = stream.words[min(stream.read[0], stream.words.shape[0] - 1)]
        state = np.uint32((state << np.uint32(16)) | np.uint32(word))
        stream.read[0] += 1
    stream.states[token] = state


@compiled
def decode_seconds(channel: Channel, count: int, stream: Stream, rules: Rules, work: Codes) -> None:
    """Decode the second symbols of a channel, then its raw codes."""
    at, form, origin, cdf = channel.at & SIDE, rules.form, channel.origin, rules.cdf[channel.table]
    for t in range(count):
        slot = narrow(stream.states[t] & np.uint32(0xFFFF))
        scale = work[CLASS + at + t]
        if work[KIND + at + t] == ZONE_SYMBOL:
            if slot == 32767 or slot == 32768:
                work[KIND + at + t] = RAW_SYMBOL
                advance(stream, t, 32767, 2)
            else:
                finer = zone_origin(scale, form, origin)
                code = find_in_zone(slot - 32768, zone_end(scale, form, origin), form, finer)
                low = edge(code, form, finer)
                advance(stream, t, low + 32768, edge(code + 1, form, finer) - low)
                work[CODE + at + t] = code
        elif work[KIND + at + t] == TAIL_SYMBOL:
            if slot >= TAIL or scale == CERTAIN:
                work[KIND + at + t] = RAW_SYMBOL
                if scale != CERTAIN:
                    advance(stream, t, TAIL, 65536 - TAIL)
            else:
                prediction, reciprocal = work[PREDICTION + at + t], rules.reciprocal[(scale + WIDER) & 255]
                code = find(slot, work[CODE + at + t], prediction, reciprocal, cdf, form, origin)
                low = cumulative(edge(code, form, origin), prediction, reciprocal, cdf)
                high = cumulative(edge(code + 1, form, origin), prediction, reciprocal, cdf)
                advance(stream, t, low, high - low)
                work[CODE + at + t] = code
    for t in range(count):
        if work[KIND + at + t] == RAW_SYMBOL:
            slot = narrow(stream.states[t] & np.uint32(0xFFFF))
            work[CODE + at + t] = slot - 32768
            advance(stream, t, slot, 1)
