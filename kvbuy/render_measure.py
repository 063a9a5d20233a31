"""How `measure` looks: as JSON, and as tables and a picture on a terminal. Prices loads, but measures nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvbuy.economics import break_even_usd_per_gb, egress_usd, tokens_usd
from kvbuy.paper import PREFILL_PRICES, PrefillPrice
from kvbuy.prices import shipped_prices
from kvbuy.render import Json, bar, dollars, megabytes, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from kvbuy.artifact import Artifact
    from kvbuy.lossy import LossyMeasure
    from kvbuy.measure import CodecMeasure, Measurement

WIDEST_BAR = 30
LOSSY_NOTES = (
    "Greedy tokens equal to the exact cache's, the first that is not, and the largest KL (nats) and logit difference.",
    "one value negated: one token's value vector in one head of one layer; a corruption, to compare encodings with.",
    "Measured for comparison only: kvbuy stores no lossy encoding.",
)
BESIDE_BARS = 29  # columns of the layer table that are no bars


def measure_json(artifact: "Artifact", found: "Measurement", lossy: Sequence["LossyMeasure"]) -> Json:
    """`measure --json`. `lossy` is empty where it was not asked for."""
    return {
        "artifact": str(artifact.path),
        "id": artifact.id,
        "document": artifact.manifest.document.name,
        "model": artifact.manifest.model.name,
        "fingerprint": artifact.manifest.fingerprint.sha256(),
        "dtype": artifact.manifest.fingerprint.dtype,
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tokens": found.tokens,
        "kv_bytes": found.kv_bytes,
        "state_bytes": found.state_bytes,
        "bytes_per_token": found.bytes_per_token,
        "codecs": [_codec_json(codec, found.layers) for codec in found.codecs],
        "absent": [asdict(absent) for absent in found.absent],
        "bounds": [asdict(bound) for bound in found.bounds],
        "lossy": [asdict(one) for one in lossy],
        "egress": [
            {"codec": codec.name, "provider": price.name}
            | price.model_dump(exclude={"name"})
            | {"usd_per_load": egress_usd(codec.bytes, price.usd_per_gb)}
            for codec in found.codecs
            for price in shipped_prices().egress
        ],
        "break_even": [
            {
                "codec": codec.name,
                "prefill": price.name,
                "usd_per_million_tokens": price.usd_per_million_tokens,
                "prefill_usd": tokens_usd(found.tokens, price.usd_per_million_tokens),
                "usd_per_gb": _break_even(found, codec, price),
                "basis": price.basis,
            }
            for codec in found.codecs
            for price in PREFILL_PRICES
        ],
    }


BESIDE_ZSTD_1 = ("zstd-3", "zstd-19")  # they cost the same, and the table is wide enough


def print_measurement(artifact: "Artifact", found: "Measurement", lossy: Sequence["LossyMeasure"]) -> None:
    """Tables and a picture on stdout."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    manifest = artifact.manifest
    shape = f"{found.tokens} tokens, {manifest.fingerprint.dtype}, {found.bytes_per_token:.0f} bytes a token"
    console.print(f"{artifact.path.name}: {shape}, {megabytes(found.kv_bytes)} of KV")
    console.print(codec_table(found))
    for line in codec_notes(found):
        console.print(line)
    if found.bounds:
        console.print(bound_table(found))
        console.print("They bound codecs that look at one value at a time; one that predicts values can pass them.")
        console.print(layer_table(found, width=console.width, ascii_only=console.options.ascii_only))
    console.print(egress_table(found))
    for line in egress_notes(found):
        console.print(line)
    if lossy:
        console.print(lossy_table(lossy))
        for line in LOSSY_NOTES:
            console.print(line)


def codec_table(found: "Measurement") -> "Table":
    """What the artifact weighs under each codec."""
    table = plain_table("codec", "size", "ratio", "bytes/token", "encode GB/s", "decode GB/s")
    for codec in found.codecs:
        about = "~" if codec.sampled else ""
        sizes = (about + megabytes(codec.bytes), f"{about}{codec.ratio:.4f}", f"{codec.bytes / found.tokens:.0f}")
        table.add_row(codec.name, *sizes, f"{codec.encode_gbps:.2g}", f"{codec.decode_gbps:.2g}")
    for absent in found.absent:
        table.add_row(absent.name, *"-----")
    return table


def codec_notes(found: "Measurement") -> list[str]:
    """What the codec table leaves to be said."""
    notes = ["Lossless: every block was decoded and compared bit for bit. GB/s of KV, one core."]
    if sampled := [codec.name for codec in found.codecs if codec.sampled]:
        notes.append(f"~ {', '.join(sampled)}: measured on a sample of at most 4 MB.")
    if found.state_bytes:
        notes.append(
            f"{megabytes(found.state_bytes)} of state (windows, recurrent) are in no block: counted as they are."
        )
    return notes + [f"{absent.name}: not measured; {absent.hint}" for absent in found.absent]


def bound_table(found: "Measurement") -> "Table":
    """Entropies, in bits a value and as ratios."""
    table = plain_table("entropy of", "K bits", "V bits", "K ratio", "V ratio", "K+V ratio")
    for bound in found.bounds:
        bits = (f"{bound.key_bits:.2f}", f"{bound.value_bits:.2f}")
        table.add_row(bound.name, *bits, *(f"{x:.4f}" for x in (bound.key_ratio, bound.value_ratio, bound.ratio)))
    return table


def layer_table(found: "Measurement", *, width: int, ascii_only: bool) -> "Table":
    """A picture of how compressible each layer is: the smallest codec's ratios as bars, a full bar being 1."""
    codec = min(found.codecs, key=lambda one: one.bytes)
    room = min(WIDEST_BAR, (width - BESIDE_BARS) // 2)
    table = plain_table("layer", f"K, {codec.name}", "", f"V, {codec.name}", "")
    for number, ratios in zip(found.layers, codec.layers, strict=True):
        cells = [(bar(ratio, width=room, ascii_only=ascii_only), f"{ratio:.3f}") for ratio in ratios]
        table.add_row(str(number), *cells[0], *cells[1])
    return table


def egress_table(found: "Measurement") -> "Table":
    """What sending one load costs under each codec, and the egress price below which sending beats a prefill."""
    codecs = [codec for codec in found.codecs if codec.name not in BESIDE_ZSTD_1]
    table = plain_table("a load from", "$/GB", *(codec.name for codec in codecs))
    for price in shipped_prices().egress:
        loads = (dollars(egress_usd(codec.bytes, price.usd_per_gb)) for codec in codecs)
        table.add_row(price.name + ("*" if price.secondary else ""), f"{price.usd_per_gb:g}", *loads)
    table.add_section()
    for basis in PREFILL_PRICES:
        evens = (dollars(_break_even(found, codec, basis)) for codec in codecs)
        table.add_row(f"even, {basis.name}", "", *evens)
    return table


def egress_notes(found: "Measurement") -> list[str]:
    """Where the prices come from, and what break-even means."""
    notes = [f"even: below that price of a GB, shipping is cheaper than a prefill of {found.tokens} tokens at"]
    for basis in PREFILL_PRICES:
        million = basis.usd_per_million_tokens
        usd = f"{dollars(tokens_usd(found.tokens, million))} ({dollars(million)} a million tokens)"
        notes.append(f"  {basis.name}: {usd}; {basis.basis}")
    for source in dict.fromkeys(price.source for price in shipped_prices().egress):
        prices = [price for price in shipped_prices().egress if price.source == source]
        names = ", ".join(price.name + ("*" if price.secondary else "") for price in prices)
        notes.append(f"{names}: {source}, {prices[0].date}")
    return [*notes, "* read at second hand, first paid tier"]


def lossy_table(lossy: Sequence["LossyMeasure"]) -> "Table":
    """What lossy encodings do to the answer."""
    short, long = lossy[0].tokens, lossy[0].tokens_long
    table = plain_table("lossy", "ratio", f"equal/{short}", f"/{long}", "parts", "KL", "logit diff")
    for one in lossy:
        parts = "-" if one.first_divergence is None else str(one.first_divergence)
        equal = (str(one.tokens_equal), str(one.tokens_equal_long), parts)
        table.add_row(one.name, f"{one.ratio:.4f}", *equal, f"{one.kl:.2g}", f"{one.max_abs_logit_diff:.3g}")
    return table


def _break_even(found: "Measurement", codec: "CodecMeasure", price: PrefillPrice) -> float:
    return break_even_usd_per_gb(tokens_usd(found.tokens, price.usd_per_million_tokens), codec.bytes)


def _codec_json(codec: "CodecMeasure", numbers: Sequence[int]) -> Json:
    layers = zip(numbers, codec.layers, strict=True)
    return asdict(codec) | {
        "layers": [{"layer": number, "key_ratio": key, "value_ratio": value} for number, (key, value) in layers]
    }
