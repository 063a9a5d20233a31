"""What a document's KV is worth: pure arithmetic over sizes, times and prices.

It knows formulas, not where a figure is from (`kvbuy.cost` says that), nor artifacts, models or tables of prices.
Money is US dollars, a gigabyte 1e9 bytes. `kvbuy/report/page.js` repeats the formulas for the report's sliders; a test
holds the two together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GB = 1e9
MILLION = 1e6

Way = Literal["prefill", "ship", "host"]


@dataclass(frozen=True, slots=True)
class Case:
    """A document that is loaded many times, and what things cost.

    `prefill_usd` is one prefill, `ratio` prefill over reuse (load and first token), `loads` how many there are in all,
    `hours` how long the KV is kept for them, `usd_per_gb_hour` what keeping a gigabyte costs where it is hosted and
    `usd_per_fetch` one load from there; `store_usd_per_gb_hour` and `store_usd_per_fetch` the same where it is shipped
    from. `input_usd`, `write_usd` and `read_usd` are what users pay for a million tokens: uncached, cached for the
    first time and cached; `publisher_share` is the part of the margin that goes to the publisher.
    """

    tokens: int
    kv_bytes: float
    prefill_usd: float
    ratio: float
    loads: float
    usd_per_gb: float
    usd_per_gb_hour: float
    usd_per_fetch: float
    store_usd_per_gb_hour: float
    store_usd_per_fetch: float
    hours: float
    input_usd: float
    write_usd: float
    read_usd: float
    publisher_share: float

    @property
    def reuse_usd(self) -> float:
        """One reuse, on the machine that prefills: its share of the prefill's time."""
        return self.prefill_usd / self.ratio

    @property
    def egress_usd(self) -> float:
        """Fetching the KV once from where it is shipped from: the request, and its bytes."""
        return self.store_usd_per_fetch + egress_usd(self.kv_bytes, self.usd_per_gb)

    @property
    def residency_usd(self) -> float:
        """Keeping the KV for all the hours where it is hosted."""
        return self.kv_bytes / GB * self.usd_per_gb_hour * self.hours

    @property
    def store_usd(self) -> float:
        """Keeping it for as long where it is shipped from."""
        return self.kv_bytes / GB * self.store_usd_per_gb_hour * self.hours


@dataclass(frozen=True, slots=True)
class Costs:
    """What all loads of a case cost in each way, and what the tariff leaves.

    `prefill`: every load computes the document. `ship`: every load fetches the KV and reuses it. `ship_once`: it is
    fetched once and reused where it is. `host`: the provider keeps it and every load reuses it. Each of the last three
    computes it once. `tariff` is what users pay for cached tokens, the first load at the price of a write, `uncached`
    what they would pay without; `margin` is
    the tariff less hosting, and `publisher` and `provider` are its parts.
    """

    prefill: float
    ship: float
    ship_once: float
    host: float
    uncached: float
    tariff: float
    margin: float
    publisher: float
    provider: float

    @property
    def cheapest(self) -> Way:
        """The cheapest way for loads at many places: prefill, unless another one is cheaper."""
        ways: dict[Way, float] = {"prefill": self.prefill, "host": self.host, "ship": self.ship}
        return min(ways, key=lambda way: ways[way])


def count_costs(case: Case) -> Costs:
    """What all loads cost."""
    once, reuse = case.prefill_usd, case.loads * case.reuse_usd
    host = once + reuse + case.residency_usd + case.loads * case.usd_per_fetch
    tariff = tokens_usd(case.tokens, case.write_usd + (case.loads - 1) * case.read_usd)
    margin = tariff - host
    publisher = case.publisher_share * max(margin, 0.0)
    return Costs(
        prefill=case.loads * once,
        ship=once + reuse + case.store_usd + case.loads * case.egress_usd,
        ship_once=once + reuse + case.store_usd + case.egress_usd,
        host=host,
        uncached=case.loads * tokens_usd(case.tokens, case.input_usd),
        tariff=tariff,
        margin=margin,
        publisher=publisher,
        provider=margin - publisher,
    )


def break_even_loads(case: Case) -> float | None:
    """N*: after how many loads one prefill and reuse cost less than prefilling each time; None where they never do.

    P + n P/r < n P gives n > r / (r - 1) for any price P and ratio r: a bit over one, for a high ratio.
    """
    return None if case.ratio <= 1 else case.ratio / (case.ratio - 1)


def hosting_pays_from(case: Case) -> float | None:
    """From how many loads hosting costs less than prefilling, residency counted; None where it never does."""
    saving = case.prefill_usd - case.reuse_usd - case.usd_per_fetch
    return None if saving <= 0 else (case.prefill_usd + case.residency_usd) / saving


def shipping_beats_prefill_below(case: Case) -> float:
    """The price of a gigabyte below which shipping every load beats prefilling; 0 where none is low enough."""
    once = case.prefill_usd + case.store_usd
    saving = case.prefill_usd - case.reuse_usd - case.store_usd_per_fetch - once / case.loads
    return max(saving, 0.0) / (case.kv_bytes / GB)


def shipping_beats_hosting_below(case: Case) -> float:
    """The price of a gigabyte below which shipping every load beats hosting; 0 where none is low enough."""
    saving = (case.residency_usd - case.store_usd) / case.loads + case.usd_per_fetch - case.store_usd_per_fetch
    return max(saving, 0.0) / (case.kv_bytes / GB)


def break_even_gbps(kv_bytes: float, prefill_seconds: float) -> float:
    """The link, in gigabytes a second, on which fetching the KV takes as long as computing it."""
    return kv_bytes / prefill_seconds / GB


def transfer_seconds(size: float, link_gbit: float) -> float:
    """How long `size` bytes take on a link of so many gigabits a second."""
    return size * 8 / (link_gbit * 1e9)


def break_even_tokens(
    tokens: Sequence[int],
    prefill_seconds: Sequence[float],
    reuse_seconds: Sequence[float],
    *,
    seconds_per_token: float = 0.0,
) -> float | None:
    """The length from which reuse is faster than prefill, by curves through measured rows; None where it never is.

    Prefill is a n + b n^2 (linear layers and attention), reuse c + d n (the prompt's rows and the bytes), each fitted
    to least squares of relative errors; `seconds_per_token` comes on top of reuse, for a link. Needs two lengths (else
    None). Below the shortest length it is an extrapolation.
    """
    if len(set(tokens)) < 2:
        return None
    a, b = _fit([(n, n * n) for n in tokens], prefill_seconds)
    c, d = _fit([(1.0, n) for n in tokens], reuse_seconds)
    gain = a - d - seconds_per_token  # b n^2 + gain n = c
    if b == 0:
        return None if gain <= 0 else c / gain
    return (math.sqrt(gain**2 + 4 * b * c) - gain) / (2 * b)


def egress_usd(size: float, usd_per_gb: float) -> float:
    """What sending `size` bytes costs."""
    return size / GB * usd_per_gb


def gpu_usd(seconds: float, usd_per_hour: float) -> float:
    """What a GPU's time costs."""
    return seconds / 3600 * usd_per_hour


def tokens_usd(tokens: float, usd_per_million: float) -> float:
    """What tokens cost at a price a million."""
    return tokens / MILLION * usd_per_million


def break_even_usd_per_gb(prefill_usd: float, size: float) -> float:
    """The price of a gigabyte below which sending `size` bytes is cheaper than a prefill."""
    return prefill_usd / (size / GB)


def _fit(terms: Sequence[tuple[float, float]], values: Sequence[float]) -> tuple[float, float]:
    """Factors x, y >= 0 of least squared relative error of x u + y v over the terms (u, v)."""
    u, v = zip(*((u / value, v / value) for (u, v), value in zip(terms, values, strict=True)), strict=True)
    uu, uv, vv = _dot(u, u), _dot(u, v), _dot(v, v)
    x = (sum(u) * vv - sum(v) * uv) / (uu * vv - uv * uv)
    y = (sum(v) * uu - sum(u) * uv) / (uu * vv - uv * uv)
    if y < 0:
        return sum(u) / uu, 0.0
    return (x, y) if x >= 0 else (0.0, sum(v) / vv)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
