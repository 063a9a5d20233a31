"""The encoder's side of `kvbuy.codec.column`: symbols are recorded as the walk meets them, and written last first."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvbuy.codec.column import (
    ABOVE,
    CERTAIN,
    CLASS,
    CODE,
    HIGH,
    KIND,
    LOW,
    PREDICTION,
    RECIPROCAL,
    SIDE,
    VALUE,
    WIDER,
    Channel,
    Rules,
    States,
    Words,
    cumulative,
    look_up_edges,
    place,
    zone_end,
    zone_origin,
)
from kvbuy.codec.compiled import compiled, inlined
from kvbuy.codec.grid import Codes, Halves, edge, narrow, rank, to_code
from kvbuy.codec.pack import TAIL
from kvbuy.codec.repeats import TILE

AT_ONCE = 0xFFFF


class Symbols(NamedTuple):
    """What an encoder writes, [channels, tokens] of uint16 each: first and second symbols as (low, size), size 0: none.

    A second size of AT_ONCE stands for "raw at once": it is no size that a symbol can have.
    """

    low: Words
    size: Words
    second_low: Words
    second_size: Words


class Target(NamedTuple):
    """Where a channel's symbols of a tile are recorded: the row, the tile's first column, and its tokens."""

    row: int
    start: int
    length: int


@compiled
def record_column(channel: Channel, symbols: Symbols, target: Target, rules: Rules, work: Codes) -> None:
    """Record the symbols of one channel's CODE; where a class is CERTAIN, VALUE is the code that is known."""
    at, form, origin = channel.at & SIDE, rules.form, channel.origin
    for t in range(TILE):
        work[RECIPROCAL + at + t] = rules.reciprocal[work[CLASS + at + t] & 255]
    for t in range(TILE):
        code, prediction, reciprocal = work[CODE + at + t], work[PREDICTION + at + t], work[RECIPROCAL + at + t]
        end = zone_end(work[CLASS + at + t], form, origin)
        inside = rank(code) < end
        first, last = narrow(-end if inside else code), narrow(end if inside else code + 1)
        work[LOW + at + t] = place(edge(first, form, origin), prediction, reciprocal)
        work[HIGH + at + t] = place(edge(last, form, origin), prediction, reciprocal)
        work[KIND + at + t] = narrow(inside | (work[CLASS + at + t] < 0))
    look_up_edges(work, rules.cdf[channel.table], at)
    odd = 0
    for t in range(TILE):
        size = narrow(work[HIGH + at + t] - work[LOW + at + t])
        work[ABOVE + at + t] = size
        work[KIND + at + t] = narrow(work[KIND + at + t] | narrow(size <= 0))
        odd |= work[KIND + at + t]
    row, start = target.row, target.start
    for t in range(target.length):
        symbols.low[row, start + t] = np.uint16(work[LOW + at + t])
        symbols.size[row, start + t] = np.uint16(work[ABOVE + at + t])
    if odd:
        for t in range(target.length):
            if work[KIND + at + t]:
                record_odd(t, channel, symbols, row, start + t, rules, work)


@compiled
def record_odd(t: int, channel: Channel, symbols: Symbols, row: int, column: int, rules: Rules, work: Codes) -> None:
    """Record a token's symbols where the first one may not be all: its low and high are there already."""
    at, form, origin, cdf = channel.at & SIDE, rules.form, channel.origin, rules.cdf[channel.table]
    code, scale = work[CODE + at + t], work[CLASS + at + t]
    if scale == CERTAIN:
        right = code == work[VALUE + at + t]
        symbols.low[row, column] = 0 if right else TAIL
        symbols.size[row, column] = TAIL if right else 65536 - TAIL
        symbols.second_size[row, column] = 0 if right else AT_ONCE
        return
    if work[HIGH + at + t] > work[LOW + at + t]:
        finer = zone_origin(scale, form, origin)
        low = edge(code, form, finer)
        high = edge(code + 1, form, finer)
        plain = high > low and (low >= 1 or high <= -1)
        symbols.second_low[row, column] = low + 32768 if plain else 32767
        symbols.second_size[row, column] = high - low if plain else 2
        return
    symbols.low[row, column], symbols.size[row, column] = TAIL, 65536 - TAIL
    prediction, reciprocal = work[PREDICTION + at + t], rules.reciprocal[(scale + WIDER) & 255]
    low = cumulative(edge(code, form, origin), prediction, reciprocal, cdf)
    high = cumulative(edge(code + 1, form, origin), prediction, reciprocal, cdf)
    symbols.second_low[row, column] = low if high > low else TAIL
    symbols.second_size[row, column] = high - low if high > low else 65536 - TAIL


@inlined
def needs_raw(symbols: Symbols, row: int, at: int) -> bool:
    """Whether a code's symbols end in its 16 raw bits."""
    if symbols.second_size[row, at] == AT_ONCE:
        return True
    if symbols.low[row, at] == TAIL:
        return bool(symbols.second_low[row, at] == TAIL)
    return bool(symbols.second_size[row, at] == 2 and symbols.second_low[row, at] == 32767)


@compiled
def weigh_rows(symbols: Symbols, information: npt.NDArray[np.float32], costs: npt.NDArray[np.float64]) -> None:
    """What the symbols of each row cost, in bits: `information` is a symbol's by its size, `costs` are filled in."""
    for row in range(costs.shape[0]):
        total, seconds = np.float32(0), 0
        for t in range(symbols.size.shape[1]):
            total += information[symbols.size[row, t]]
            seconds |= symbols.second_size[row, t]
        if seconds:
            for t in range(symbols.size.shape[1]):
                if symbols.second_size[row, t] not in (0, AT_ONCE):
                    total += information[symbols.second_size[row, t]]
                if symbols.second_size[row, t] and needs_raw(symbols, row, t):
                    total += np.float32(16)
        costs[row] = total


@inlined
def put(states: States, token: int, low: int, size: int, words: Words, end: int) -> int:
    """Put a symbol onto a token's state, a word before `end` where the state would overflow; returns the new end."""
    state = states[token]
    most = np.uint32(size)
    runs_over = int((state >> np.uint32(16)) >= most)  # arithmetic for a branch that nobody can predict
    words[end - 1] = np.uint16(state & np.uint32(0xFFFF))
    state = np.uint32(state >> np.uint32(runs_over << 4))
    whole = np.uint32(state // most)
    rest = np.uint32(state - np.uint32(whole * most))
    states[token] = np.uint32(np.uint32(whole << np.uint32(16)) + np.uint32(rest + np.uint32(low)))
    return end - runs_over


@compiled
def write_rows(
    symbols: Symbols, rows: tuple[int, int], tile: tuple[int, int], bits: Halves, states: States, words: Words, end: int
) -> int:
    """Write rows [first, last) of the tokens [start, stop) before `end`, last symbol first; returns the new end."""
    (first, last), (start, stop) = rows, tile
    for row in range(last - 1, first - 1, -1):
        seconds = 0
        for t in range(start, stop):
            seconds |= symbols.second_size[row, t]
        if seconds:
            for t in range(stop - 1, start - 1, -1):
                if symbols.second_size[row, t] and needs_raw(symbols, row, t):
                    end = put(states, t, to_code(bits[row, t]) + 32768, 1, words, end)
            for t in range(stop - 1, start - 1, -1):
                if symbols.second_size[row, t] not in (0, AT_ONCE):
                    end = put(states, t, symbols.second_low[row, t], symbols.second_size[row, t], words, end)
        for t in range(stop - 1, start - 1, -1):
            end = put(states, t, symbols.low[row, t], symbols.size[row, t], words, end)
    return end
