"""What a document's KV is worth: figures of a bench run, prices and assumptions put together, each with its basis.

A basis is measured (where and when), listed (source and date), given (by whoever asks), assumed, or computed from the
others. The arithmetic is `kvbuy.economics`, what given facts lack comes from `kvbuy.subject`. It knows no model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, nan

from kvbuy.economics import (
    MILLION,
    Case,
    Costs,
    break_even_gbps,
    break_even_loads,
    break_even_tokens,
    count_costs,
    gpu_usd,
    transfer_seconds,
)
from kvbuy.errors import UsageError
from kvbuy.prices import PriceTable, Tariff, choose_price, choose_store, choose_tariff, shipped_prices
from kvbuy.subject import Figure, Subject, given, refuse_odd_numbers

LOADS = (1.0, 1_000.0, 1_000_000.0)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loads are and at which prices; names are the price table's, None takes its first.

    `usd_per_hour` and `usd_per_gb` stand for the GPU's and the egress price. `keep` names where the KV stays between
    loads, one of the tiers of an estimate, for `hours`. `link_gbit` is in gigabits a second.
    """

    loads: tuple[float, ...] = LOADS
    gpu: str | None = None
    usd_per_hour: float | None = None
    egress: str | None = None
    usd_per_gb: float | None = None
    keep: str | None = None
    hours: float | None = None
    link_gbit: float | None = None
    tariff: str | None = None
    publisher_share: float | None = None


@dataclass(frozen=True, slots=True)
class Tier:
    """A place to keep the KV: what an hour there costs, and what each load from there costs beside its reuse."""

    name: str
    usd_per_hour: float
    usd_per_fetch: float
    basis: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """The answer. `cases` and `costs` are for each number of loads.

    `inputs` and `computed` are figures by name, each with its basis; a break-even that is never reached is infinite,
    one that cannot be known is not a number. `caveats` say where a price is not that of what was measured.
    """

    subject: Subject
    cases: tuple[Case, ...]
    costs: tuple[Costs, ...]
    tiers: tuple[Tier, ...]
    inputs: dict[str, Figure]
    computed: dict[str, Figure]
    caveats: tuple[str, ...]


def estimate(subject: Subject, terms: Terms, prices: PriceTable) -> Estimate:
    """Price a document's loads.

    Raises:
        UsageError: the table has no price of that name, a price is given twice, or a load is not a whole one.
    """
    refuse_odd_numbers(terms)
    if any(loads != int(loads) for loads in terms.loads):
        raise UsageError("a part of a load cannot be counted", hint="--agents 1000")
    tariff = choose_tariff(prices.tariffs, terms.tariff)
    tiers = _tiers(subject, tariff, prices)
    store = choose_store(choose_price(prices.egress, terms.egress), prices.storage)
    keep = choose_price(tiers, terms.keep or store.name)
    inputs = _inputs(subject, terms, prices, keep=keep, tariff=tariff)
    case = _case(inputs)
    cases = tuple(replace(case, loads=loads) for loads in terms.loads)
    return Estimate(
        subject=subject,
        cases=cases,
        costs=tuple(map(count_costs, cases)),
        tiers=tiers,
        inputs=inputs,
        computed=_computed(case, subject, link_gbit=inputs["link_gbit"].value),
        caveats=tuple(_caveats(subject, terms, prices, tariff)),
    )


def _inputs(subject: Subject, terms: Terms, prices: PriceTable, *, keep: Tier, tariff: Tariff) -> dict[str, Figure]:
    """Everything that goes in."""
    size = subject.kv_bytes.value / 1e9
    gpu, route = choose_price(prices.gpus, terms.gpu), choose_price(prices.egress, terms.egress)
    store = choose_store(route, prices.storage)
    if terms.gpu is not None and terms.usd_per_hour is not None:
        raise UsageError("--gpu and --gpu-usd-per-hour are two prices for one thing", hint="give one of them")
    if terms.egress is not None and terms.usd_per_gb is not None:
        raise UsageError("--egress and --usd-per-gb are two prices for one thing", hint="give one of them")
    return {
        "tokens": subject.tokens,
        "kv_bytes": subject.kv_bytes,
        "prefill_seconds": subject.prefill_seconds,
        "reuse_seconds": subject.reuse_seconds,
        "gpu_usd_per_hour": given(terms.usd_per_hour, "--gpu-usd-per-hour") or Figure(gpu.usd_per_hour, gpu.basis),
        "usd_per_gb": given(terms.usd_per_gb, "--usd-per-gb") or Figure(route.usd_per_gb, route.basis),
        "link_gbit": given(terms.link_gbit, "--link-gbit") or Figure(10.0, "assumed: 10 Gbit/s"),
        "hours": given(terms.hours, "--hours") or Figure(24.0, "assumed: a day"),
        "usd_per_gb_hour": Figure(keep.usd_per_hour / size, keep.basis),
        "usd_per_fetch": Figure(keep.usd_per_fetch, keep.basis),
        "store_usd_per_gb_hour": Figure(store.usd_per_gb_hour, store.basis),
        "store_usd_per_fetch": Figure(store.usd_per_million_reads / MILLION, store.basis),
        "input_usd": Figure(tariff.input, tariff.basis),
        "write_usd": Figure(tariff.write, tariff.basis),
        "read_usd": Figure(tariff.read, tariff.basis),
        "publisher_share": given(terms.publisher_share, "--publisher-share") or Figure(0.5, "assumed: half"),
    }


def _case(inputs: dict[str, Figure]) -> Case:
    """One load of what goes in."""
    value = {name: figure.value for name, figure in inputs.items()}
    return Case(
        tokens=round(value["tokens"]),
        kv_bytes=value["kv_bytes"],
        prefill_usd=gpu_usd(value["prefill_seconds"], value["gpu_usd_per_hour"]),
        ratio=value["prefill_seconds"] / value["reuse_seconds"],
        loads=1,
        usd_per_gb=value["usd_per_gb"],
        usd_per_gb_hour=value["usd_per_gb_hour"],
        usd_per_fetch=value["usd_per_fetch"],
        store_usd_per_gb_hour=value["store_usd_per_gb_hour"],
        store_usd_per_fetch=value["store_usd_per_fetch"],
        hours=value["hours"],
        input_usd=value["input_usd"],
        write_usd=value["write_usd"],
        read_usd=value["read_usd"],
        publisher_share=value["publisher_share"],
    )


def _computed(case: Case, subject: Subject, *, link_gbit: float) -> dict[str, Figure]:
    """What follows for any number of loads."""
    transfer = transfer_seconds(case.kv_bytes, link_gbit)
    loads = break_even_loads(case)
    more = transfer + subject.decode_seconds
    tokens, tokens_basis = _break_even_tokens(subject, seconds_per_token=more / case.tokens)
    return {
        "ratio": Figure(case.ratio, "computed: prefill_seconds / reuse_seconds"),
        "transfer_seconds": Figure(transfer, "computed: kv_bytes / link_gbit"),
        "break_even_loads": Figure(inf if loads is None else loads, "computed: ratio / (ratio - 1)"),
        "break_even_gbps": Figure(
            break_even_gbps(case.kv_bytes, subject.prefill_seconds.value), "computed: kv_bytes / prefill_seconds"
        ),
        "break_even_tokens": Figure(tokens, tokens_basis),
    }


def _break_even_tokens(subject: Subject, *, seconds_per_token: float) -> tuple[float, str]:
    """The length from which fetching and reuse is faster, and what it is based on."""
    rows = subject.bench.rows if subject.bench and subject.timed else ()
    if len(rows) < 2:
        return nan, "unknown: it takes times of a bench run, of two lengths"
    found = break_even_tokens(
        [row.tokens for row in rows],
        [row.scratch_seconds for row in rows],
        [row.reuse_seconds for row in rows],
        seconds_per_token=seconds_per_token,
    )
    basis = f"computed: curves through the {len(rows)} lengths of the bench run, and the link"
    if found is not None and found < rows[0].tokens:
        basis += f", extrapolated below {rows[0].tokens} tokens"
    return inf if found is None else found, basis


def _tiers(subject: Subject, tariff: Tariff, prices: PriceTable) -> tuple[Tier, ...]:
    """What an hour of residency costs, in an object store, in a GPU's memory, and at an API's price for it."""
    size, tokens = subject.kv_bytes.value / 1e9, subject.tokens.value
    stores = (
        Tier(one.name, size * one.usd_per_gb_hour, one.usd_per_million_reads / MILLION, one.basis)
        for one in prices.storage
    )
    memories = (Tier(one.name, size * one.usd_per_gb_hour, 0.0, one.basis) for one in prices.gpus)
    charged = (one for one in dict.fromkeys((tariff, *prices.tariffs)) if one.hour is not None)
    apis = (Tier(one.name, tokens / MILLION * (one.hour or 0.0), 0.0, one.basis) for one in charged)
    return (*stores, *memories, *apis)


def _caveats(subject: Subject, terms: Terms, prices: PriceTable, tariff: Tariff) -> Iterator[str]:
    """Where a price was taken for want of another, and is not that of what was measured."""
    gpu = choose_price(prices.gpus, terms.gpu)
    if subject.bench is None and terms.usd_per_hour is None and terms.gpu is None:
        yield f"The machine is taken to cost as an {gpu.name}: give what it costs with --gpu-usd-per-hour."
    if subject.bench is not None and terms.usd_per_hour is None and gpu in shipped_prices().gpus:
        machine = subject.bench.machine
        if gpu.name.split()[0].casefold() not in machine.casefold():
            yield (
                f"An hour is priced as that of {gpu.name}, but it was measured on {machine}: "
                "give what that costs with --gpu-usd-per-hour."
            )
    if terms.tariff is None and tariff in shipped_prices().tariffs:
        yield f"Users are taken to pay as for {tariff.name}, whatever the model: give a tariff with --tariff."
