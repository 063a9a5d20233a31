"""What is to be priced: a document's KV, its size and its times, from what is given, an artifact, and a bench run.

It knows where each figure is from, and no prices (`kvbuy.prices`).
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isfinite
from typing import TYPE_CHECKING

from kvbuy.artifact import Artifact
from kvbuy.errors import MisfitError, UsageError
from kvbuy.figures import Benchmark, CodecRatio, Row, Weights
from kvbuy.parts import CodecName

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and what it is based on."""

    value: float
    basis: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is given instead of measured; None where it is not. Sizes in bytes, times in seconds.

    `codec` takes the size and the speed that it has in `weights`, what an artifact of the same model weighed.
    """

    tokens: int | None = None
    bytes_per_token: float | None = None
    prefill_seconds: float | None = None
    reuse_seconds: float | None = None
    codec: CodecName | None = None
    weights: Weights | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """A document's KV: how large it is, how long it takes to compute and to reuse, and the run that says so, if any.

    `decode_seconds` are the part of reuse that another codec than the run's adds; `timed`: both times are the run's.
    """

    tokens: Figure
    kv_bytes: Figure
    prefill_seconds: Figure
    reuse_seconds: Figure
    decode_seconds: float
    timed: bool
    bench: Benchmark | None


def find_subject(artifact: Artifact | None, bench: Benchmark | None, facts: Facts) -> Subject:
    """What is to be priced: given facts first, then the artifact, then the bench run (its longest document).

    Raises:
        MisfitError: artifact, bench run and weights are not of one model.
        UsageError: a figure is missing, the run does not cover the document's length, or it timed another codec.
    """
    refuse_odd_numbers(facts)
    _refuse_other_models(artifact, bench, facts.weights)
    if facts.codec is not None and facts.bytes_per_token is not None:
        raise UsageError("--codec and --bytes-per-token are two sizes for one thing", hint="give one of them")
    tokens = _tokens(artifact, bench, facts)
    kv_bytes = _kv_bytes(artifact, bench, facts, tokens.value)
    prefill = _prefill_seconds(bench, facts, tokens.value)
    reuse, decode_seconds = _reuse_seconds(artifact, bench, facts, tokens.value)
    return Subject(
        tokens=tokens,
        kv_bytes=kv_bytes,
        prefill_seconds=prefill,
        reuse_seconds=reuse,
        decode_seconds=decode_seconds,
        timed=facts.prefill_seconds is None and facts.reuse_seconds is None,
        bench=bench,
    )


def given(value: float | None, option: str) -> Figure | None:
    """The figure that an option gave, if it did."""
    return None if value is None else Figure(value, f"given: {option}")


def refuse_odd_numbers(values: "DataclassInstance") -> None:
    """UsageError where a field, or one of its items, is infinite or not a number."""
    for one in fields(values):
        value = getattr(values, one.name)
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, float)]
        if not all(map(isfinite, numbers)):
            raise UsageError(f"{one.name.replace('_', ' ')} must be a finite number")


def _refuse_other_models(artifact: Artifact | None, bench: Benchmark | None, weights: Weights | None) -> None:
    models = [
        *([("the artifact", artifact.manifest.model.name, artifact.manifest.fingerprint.sha256())] if artifact else ()),
        *([("the bench run", bench.model, bench.fingerprint)] if bench else ()),
        *([("the measurement", weights.model, weights.fingerprint)] if weights else ()),
    ]
    if len({fingerprint for _, _, fingerprint in models}) > 1:
        raise MisfitError(
            "what is to be priced together is not of one model",
            differences=tuple(f"{what} is of {name}, fingerprint {digest[:12]}..." for what, name, digest in models),
            hint="run bench and measure with the artifact's model, in its dtype",
        )


def _tokens(artifact: Artifact | None, bench: Benchmark | None, facts: Facts) -> Figure:
    if facts.tokens is not None:
        return Figure(facts.tokens, "given: --tokens")
    if artifact is not None:
        return Figure(artifact.manifest.document.tokens, f"measured: {artifact.path.name}")
    if bench is not None:
        return Figure(bench.rows[-1].tokens, f"{bench.basis}, {bench.document}")
    raise UsageError(
        "nothing says which document is to be priced",
        hint="name an artifact, give --bench FILE (from kvbuy bench --out FILE), or --tokens and --bytes-per-token; "
        "--paper shows the paper's own",
    )


def _kv_bytes(artifact: Artifact | None, bench: Benchmark | None, facts: Facts, tokens: float) -> Figure:
    if facts.codec is not None:
        weighed = _weighed(facts.codec, facts.weights)
        size, measured = weighed.bytes, facts.weights.tokens if facts.weights else 0
        beside = ", its pack beside it" if facts.codec == "dense" else ""
        return Figure(tokens * size / measured, f"measured: {facts.codec}{_scaled(measured, tokens)}{beside}")
    if facts.bytes_per_token is not None:
        return Figure(tokens * facts.bytes_per_token, "given: --bytes-per-token")
    if artifact is not None:
        measured = artifact.manifest.document.tokens
        basis = f"measured: {artifact.path.name}, codec {artifact.manifest.codec_name}{_scaled(measured, tokens)}"
        return Figure(tokens * artifact.path.stat().st_size / measured, basis)
    if bench is not None:
        return _at(bench, tokens, lambda row: row.file_bytes, also=f", codec {bench.codec}")
    raise UsageError("nothing says how large the KV is", hint="give --bytes-per-token, an artifact, or --bench FILE")


def _scaled(measured: int, tokens: float) -> str:
    return "" if measured == tokens else f", scaled from {measured} tokens"


def _weighed(codec: CodecName, weights: Weights | None) -> CodecRatio:
    """What a codec makes of the model's KV."""
    if weights is None:
        raise UsageError(
            f"nothing says what {codec} makes of this model's KV",
            hint="weigh an artifact: kvbuy measure --json > measure.json, then --measure measure.json",
        )
    found = {one.name: one for one in weights.codecs}
    if codec not in found or found[codec].decode_gbps == 0:
        raise UsageError(f"{codec} was not measured", hint=f"measured were: {', '.join(found)}")
    return found[codec]


def _prefill_seconds(bench: Benchmark | None, facts: Facts, tokens: float) -> Figure:
    if facts.prefill_seconds is not None:
        return Figure(facts.prefill_seconds, "given: --prefill-seconds")
    return _at(_timed(bench, "prefill"), tokens, lambda row: row.scratch_seconds)


def _reuse_seconds(
    artifact: Artifact | None, bench: Benchmark | None, facts: Facts, tokens: float
) -> tuple[Figure, float]:
    """As the run timed it; where that was raw and the KV is coded, with its decoding on one core on top: both."""
    if facts.reuse_seconds is not None:
        return Figure(facts.reuse_seconds, "given: --reuse-seconds"), 0.0
    bench = _timed(bench, "reuse")
    timed = _at(bench, tokens, lambda row: row.reuse_seconds)
    codec = facts.codec or (artifact.manifest.codec_name if artifact else bench.codec)
    if codec == bench.codec:
        return timed, 0.0
    if bench.codec != "raw" or facts.weights is None:
        raise UsageError(
            f"the bench run timed {bench.codec}, not {codec}",
            hint=f"kvbuy bench --codec {codec}; or beside a run of raw, --measure FILE, which says how fast it decodes",
        )
    gbps = _weighed(codec, facts.weights).decode_gbps
    decoding = _at(bench, tokens, lambda row: row.kv_bytes).value / gbps / 1e9
    basis = f"{timed.basis}; and {codec} decoded on one core, {gbps:.2g} GB/s"
    return Figure(timed.value + decoding, basis), decoding


def _timed(bench: Benchmark | None, what: str) -> Benchmark:
    if bench is None:
        raise UsageError(
            f"nothing says how long a {what} takes",
            hint=f"measure it: kvbuy bench --out bench.json, then --bench bench.json; or give --{what}-seconds",
        )
    return bench


def _at(bench: Benchmark, tokens: float, pick: Callable[[Row], float], *, also: str = "") -> Figure:
    """What a run measured at a length, on a straight line between two that it has."""
    lengths = [row.tokens for row in bench.rows]
    if not lengths[0] <= tokens <= lengths[-1]:
        wanted = ",".join(str(length) for length in sorted({*lengths, round(tokens)}))
        raise UsageError(
            f"the bench run covers {lengths[0]} to {lengths[-1]} tokens, not {tokens:.0f}",
            hint=f"kvbuy bench DOC --lengths {wanted} --out FILE, of a document and a model that are long enough",
        )
    after = bisect_left(lengths, tokens)
    high = bench.rows[after]
    if high.tokens == tokens:
        return Figure(pick(high), bench.basis + also)
    low = bench.rows[after - 1]
    share = (tokens - low.tokens) / (high.tokens - low.tokens)
    value = pick(low) + share * (pick(high) - pick(low))
    return Figure(value, f"{bench.basis}{also}, interpolated between {low.tokens} and {high.tokens} tokens")
