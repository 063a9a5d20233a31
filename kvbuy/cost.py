"""What a document's KV is worth: figures of a bench run, prices and assumptions put together, each with its basis.

A basis is measured (where and when), listed (source and date), given (by whoever asks) or assumed. The arithmetic is
`kvbuy.economics`. It knows no model: what a run measured comes as `kvbuy.figures`.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Literal

from kvbuy.artifact import Artifact
from kvbuy.economics import (
    Case,
    Costs,
    break_even_gbps,
    break_even_loads,
    break_even_tokens,
    count_costs,
    gpu_usd,
    transfer_seconds,
)
from kvbuy.errors import MisfitError, UsageError
from kvbuy.figures import Benchmark, Row, Weights
from kvbuy.parts import CodecName
from kvbuy.prices import GpuPrice, PriceTable, StoragePrice, Tariff, choose_price, choose_tariff

LOADS = (1.0, 1_000.0, 1_000_000.0)


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and what it is based on."""

    value: float
    basis: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is given instead of measured; None where it is not. Sizes in bytes, times in seconds.

    `codec` takes the size that it has in `weights`, what an artifact of the same model weighed.
    """

    tokens: int | None = None
    bytes_per_token: float | None = None
    prefill_seconds: float | None = None
    reuse_seconds: float | None = None
    codec: CodecName | None = None
    weights: Weights | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loads are and at which prices; names are the price table's, None takes its first.

    `usd_per_hour` and `usd_per_gb` replace the GPU's and the egress price. `keep` names where the KV stays between
    loads: an object store or a GPU, for `hours`. `link_gbit` is in gigabits a second.
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
class Subject:
    """A document's KV: how large it is, how long it takes to compute and to reuse, and the run that says so, if any."""

    tokens: Figure
    kv_bytes: Figure
    prefill_seconds: Figure
    reuse_seconds: Figure
    bench: Benchmark | None


@dataclass(frozen=True, slots=True)
class Tier:
    """A place to keep the KV, and what an hour there costs."""

    name: str
    usd_per_hour: float
    basis: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """The answer. `cases` and `costs` are for each number of loads; break-evens are None where there is none.

    `basis` says of every figure what it is based on.
    """

    subject: Subject
    cases: tuple[Case, ...]
    costs: tuple[Costs, ...]
    tiers: tuple[Tier, ...]
    transfer_seconds: float
    break_even_loads: float | None
    break_even_gbps: float
    break_even_tokens: float | None
    basis: dict[str, str] = field(default_factory=dict)


def find_subject(artifact: Artifact | None, bench: Benchmark | None, facts: Facts) -> Subject:
    """What is to be priced: given facts first, then the artifact, then the bench run (its longest document).

    Raises:
        MisfitError: artifact and bench run are of different models.
        UsageError: a figure is missing, or the run does not cover the document's length.
    """
    if artifact and bench and artifact.manifest.fingerprint.sha256() != bench.fingerprint:
        raise MisfitError(
            "the bench run is of another model than the artifact",
            differences=(f"the run is of {bench.model}, the artifact of {artifact.manifest.model.name}",),
            hint="run kvbuy bench with the artifact's model",
        )
    tokens = _tokens(artifact, bench, facts)
    return Subject(
        tokens=tokens,
        kv_bytes=_kv_bytes(artifact, bench, facts, tokens.value),
        prefill_seconds=_seconds("prefill", facts.prefill_seconds, bench, tokens.value),
        reuse_seconds=_seconds("reuse", facts.reuse_seconds, bench, tokens.value),
        bench=bench,
    )


def estimate(subject: Subject, terms: Terms, prices: PriceTable) -> Estimate:
    """Price a document's loads.

    Raises:
        UsageError: the table has no price of that name.
    """
    gpu = choose_price(prices.gpus, terms.gpu)
    hourly = _given(terms.usd_per_hour, "--gpu-usd-per-hour") or Figure(gpu.usd_per_hour, _hour_basis(gpu, subject))
    route = choose_price(prices.egress, terms.egress)
    egress = _given(terms.usd_per_gb, "--usd-per-gb") or Figure(route.usd_per_gb, route.basis)
    places: tuple[StoragePrice | GpuPrice, ...] = (*prices.storage, *prices.gpus)
    keep = choose_price(places, terms.keep)
    hours = _given(terms.hours, "--hours") or Figure(24.0, "assumed: a day")
    link = _given(terms.link_gbit, "--link-gbit") or Figure(10.0, "assumed: 10 Gbit/s")
    share = _given(terms.publisher_share, "--publisher-share") or Figure(0.5, "assumed: half")
    tariff = choose_tariff(prices.tariffs, terms.tariff)
    case = Case(
        tokens=round(subject.tokens.value),
        kv_bytes=subject.kv_bytes.value,
        prefill_usd=gpu_usd(subject.prefill_seconds.value, hourly.value),
        ratio=subject.prefill_seconds.value / subject.reuse_seconds.value,
        loads=1,
        usd_per_gb=egress.value,
        usd_per_gb_hour=keep.usd_per_gb_hour,
        store_usd_per_gb_hour=prices.storage[0].usd_per_gb_hour,
        hours=hours.value,
        input_usd=tariff.input,
        read_usd=tariff.read,
        publisher_share=share.value,
    )
    cases = tuple(replace(case, loads=loads) for loads in terms.loads)
    transfer = transfer_seconds(case.kv_bytes, link.value)
    figures = {
        "tokens": subject.tokens,
        "kv_bytes": subject.kv_bytes,
        "prefill_seconds": subject.prefill_seconds,
        "reuse_seconds": subject.reuse_seconds,
        "gpu_usd_per_hour": hourly,
        "egress_usd_per_gb": egress,
        "hours": hours,
        "link_gbit": link,
        "publisher_share": share,
    }
    return Estimate(
        subject=subject,
        cases=cases,
        costs=tuple(map(count_costs, cases)),
        tiers=_tiers(case, tariff, prices),
        transfer_seconds=transfer,
        break_even_loads=break_even_loads(case),
        break_even_gbps=break_even_gbps(case.kv_bytes, subject.prefill_seconds.value),
        break_even_tokens=_break_even_tokens(subject, transfer / case.tokens),
        basis={name: figure.basis for name, figure in figures.items()}
        | {
            "usd_per_gb_hour": keep.basis,
            "store_usd_per_gb_hour": prices.storage[0].basis,
            "tariff": tariff.basis,
            "break_even_tokens": _tokens_basis(subject),
        },
    )


def _tokens(artifact: Artifact | None, bench: Benchmark | None, facts: Facts) -> Figure:
    if facts.tokens is not None:
        return Figure(facts.tokens, "given: --tokens")
    if artifact is not None:
        return Figure(artifact.manifest.document.tokens, f"measured: {artifact.path.name}")
    if bench is not None:
        return Figure(bench.rows[-1].tokens, bench.basis)
    raise UsageError(
        "nothing says which document is to be priced",
        hint="name an artifact, give --bench FILE (from kvbuy bench --out FILE), or --tokens and --bytes-per-token; "
        "--paper shows the paper's own",
    )


def _kv_bytes(artifact: Artifact | None, bench: Benchmark | None, facts: Facts, tokens: float) -> Figure:
    if facts.codec is not None:
        return _coded_bytes(facts.codec, facts.weights, tokens)
    if facts.bytes_per_token is not None:
        return Figure(tokens * facts.bytes_per_token, "given: --bytes-per-token")
    if artifact is not None:
        size = tokens * artifact.path.stat().st_size / artifact.manifest.document.tokens
        return Figure(size, f"measured: {artifact.path.name}, codec {artifact.manifest.codec_name}")
    if bench is not None:
        return Figure(_at(bench, tokens, lambda row: row.file_bytes), f"{bench.basis}, codec {bench.codec}")
    raise UsageError("nothing says how large the KV is", hint="give --bytes-per-token, an artifact, or --bench FILE")


def _coded_bytes(codec: CodecName, weights: Weights | None, tokens: float) -> Figure:
    """What so many tokens weigh in a codec, by what another document of the model weighed."""
    if weights is None:
        raise UsageError(
            f"nothing says what {codec} makes of this model's KV",
            hint="weigh an artifact: kvbuy measure --json > measure.json, then --measure measure.json",
        )
    sizes = {one.name: one.bytes for one in weights.codecs}
    if codec not in sizes:
        raise UsageError(f"{codec} was not measured", hint=f"measured were: {', '.join(sizes)}")
    return Figure(tokens * sizes[codec] / weights.tokens, f"measured: {codec} on {weights.tokens} tokens of the model")


def _seconds(what: Literal["prefill", "reuse"], given: float | None, bench: Benchmark | None, tokens: float) -> Figure:
    if given is not None:
        return Figure(given, f"given: --{what}-seconds")
    if bench is None:
        raise UsageError(
            f"nothing says how long a {what} takes",
            hint=f"measure it: kvbuy bench --out bench.json, then --bench bench.json; or give --{what}-seconds",
        )
    pick: Callable[[Row], float] = attrgetter(f"{what}_seconds")
    return Figure(_at(bench, tokens, pick), bench.basis)


def _at(bench: Benchmark, tokens: float, pick: Callable[[Row], float]) -> float:
    """A figure at a length, on the line between the measured ones beside it."""
    lengths = [row.tokens for row in bench.rows]
    if not lengths[0] <= tokens <= lengths[-1]:
        raise UsageError(
            f"the bench run covers {lengths[0]} to {lengths[-1]} tokens, not {tokens:.0f}",
            hint=f"kvbuy bench --lengths {tokens:.0f}",
        )
    after = max(1, bisect_left(lengths, tokens)) if len(lengths) > 1 else 0
    low, high = bench.rows[max(0, after - 1)], bench.rows[after]
    share = (tokens - low.tokens) / (high.tokens - low.tokens) if after else 0.0
    return pick(low) + share * (pick(high) - pick(low))


def _hour_basis(gpu: GpuPrice, subject: Subject) -> str:
    """A GPU's price, and whether it is the price of what was measured."""
    if subject.bench is None or not subject.bench.machine.startswith("cpu"):
        return gpu.basis
    return f"{gpu.basis}; but a CPU was measured: --gpu-usd-per-hour gives what that machine costs"


def _given(value: float | None, option: str) -> Figure | None:
    return None if value is None else Figure(value, f"given: {option}")


def _tiers(case: Case, tariff: Tariff, prices: PriceTable) -> tuple[Tier, ...]:
    """What an hour of residency costs, in an object store, in a GPU's memory, and at an API's price for it."""
    kept: tuple[StoragePrice | GpuPrice, ...] = (*prices.storage, *prices.gpus)
    size = case.kv_bytes / 1e9
    tiers = [Tier(price.name, size * price.usd_per_gb_hour, price.basis) for price in kept]
    charged = [price for price in dict.fromkeys((tariff, *prices.tariffs)) if price.hour is not None]
    return (*tiers, *(Tier(one.name, case.tokens / 1e6 * (one.hour or 0), one.basis) for one in charged))


def _break_even_tokens(subject: Subject, seconds_per_token: float) -> float | None:
    rows = subject.bench.rows if subject.bench else ()
    return break_even_tokens(
        [row.tokens for row in rows],
        [row.prefill_seconds for row in rows],
        [row.reuse_seconds for row in rows],
        seconds_per_token=seconds_per_token,
    )


def _tokens_basis(subject: Subject) -> str:
    if subject.bench is None or len(subject.bench.rows) < 2:
        return "unknown: it takes a bench run of two lengths"
    return f"curves through the {len(subject.bench.rows)} lengths of the bench run, and the link"
