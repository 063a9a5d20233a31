"""Where a token's context has occurred before in its document: the nearest thing to a copy of its KV.

Repeats depend on the token ids alone, which an artifact holds, so they cost nothing in the stream. A tile of tokens is
coded at once, so a repeat lies in an earlier tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LENGTHS = (8, 5, 4, 3, 2, 1)  # tokens of shared context, longest first; a repeat's order is 6 for the longest, 1, or 0
TILE = 128

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Repeats:
    """For each token, [tokens]: the order of its repeat (0: none), its position, and that of the same token (or -1)."""

    order: Integers
    position: Integers
    known: Integers


def cut_tiles(tokens: int, block_size: int) -> list[tuple[int, int]]:
    """A document's tiles: [start, end) of tokens, none across a block's boundary."""
    tiles = []
    for block in range(0, tokens, block_size):
        end = min(block + block_size, tokens)
        tiles += [(start, min(start + TILE, end)) for start in range(block, end, TILE)]
    return tiles


def find_repeats(token_ids: Sequence[int], block_size: int) -> Repeats:
    """The latest repeat of the longest context, for each token."""
    count = len(token_ids)
    order, position, known = np.zeros(count, np.int64), np.zeros(count, np.int64), np.full(count, -1, np.int64)
    last: dict[tuple[int, ...], int] = {}
    for start, end in cut_tiles(count, block_size):
        for at in range(start, end):
            contexts = [tuple(token_ids[at + 1 - length : at + 1]) for length in LENGTHS if at + 1 >= length]
            for context in contexts:
                if context in last:
                    order[at], position[at] = len(LENGTHS) - LENGTHS.index(len(context)), last[context]
                    break
            known[at] = last.get((token_ids[at],), -1)
        for at in range(start, end):
            last.update({tuple(token_ids[at + 1 - n : at + 1]): at for n in LENGTHS if at + 1 >= n})
    return Repeats(order, position, known)
