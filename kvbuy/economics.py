"""What a load costs: pure arithmetic over a dated price table. Knows prices and sizes, not artifacts or models.

A gigabyte is 1e9 bytes, as providers bill it. Every price says when it was read and where; the providers' own tables
change, and some could be read at second hand only (`secondary`).
"""

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True, slots=True)
class EgressPrice:
    """What a provider takes for sending a gigabyte to the internet, in US dollars, first paid tier."""

    provider: str
    usd_per_gb: float
    date: str
    source: str
    secondary: bool


@dataclass(frozen=True, slots=True)
class PrefillPrice:
    """What prefilling a million tokens costs, in US dollars, and what that figure is based on."""

    name: str
    usd_per_million_tokens: float
    basis: str


_SURVEYS = "CloudToolStack, cloud egress cost optimization; Akave, what are egress fees"

EGRESS_PRICES = (
    EgressPrice("AWS", 0.09, "2026-05", _SURVEYS, secondary=True),
    EgressPrice("Azure", 0.087, "2026-05", _SURVEYS, secondary=True),
    EgressPrice("GCP premium", 0.12, "2026-05", _SURVEYS, secondary=True),
    EgressPrice("GCP standard", 0.085, "2026-05", _SURVEYS, secondary=True),
    EgressPrice("Cloudflare R2", 0.0, "2026-11", "Cloudflare docs, R2 pricing", secondary=False),
    EgressPrice("Hugging Face", 0.0, "2026-08", "Hugging Face docs, Hub storage (no egress line)", secondary=False),
)

PAPER_TOKENS = 3774
PAPER_PREFILL_USD = 1.5e6 / 80e6  # a document: 80 M loads of one cost $1.5 M to prefill

LIST_PRICE = PrefillPrice(
    "list price",
    PAPER_PREFILL_USD / PAPER_TOKENS * 1e6,
    "arXiv 2606.13361: $1.5 M for 80 M prefills of 3774 tokens; an API's list price, not what computing costs",
)


def gpu_prefill_price(what: str, parameters: float, *, flops: float, usd_per_hour: float) -> PrefillPrice:
    """What a GPU's time costs: 2 FLOP a parameter and token (Kaplan et al. 2020, table 1), attention left out.

    `what` names model and GPU, `flops` is what the GPU reaches in floating-point operations a second.
    """
    usd_per_token = 2 * parameters / flops * usd_per_hour / 3600
    gpu = f"{flops / 1e12:g} TFLOP/s at ${usd_per_hour:.2f} an hour"
    basis = f"{what}: {parameters / 1e9:g} B parameters, 2 FLOP a parameter and token, {gpu}; attention left out"
    return PrefillPrice("GPU cost", usd_per_token * 1e6, basis)


GPU_PRICE = gpu_prefill_price(
    "the paper's Qwen3-4B on an H100 (2026-05, second hand, of a band from $1.99 to $6.88)",
    4e9,
    flops=500e12,
    usd_per_hour=2.50,
)

PREFILL_PRICES = (LIST_PRICE, GPU_PRICE)


def egress_usd(size: float, usd_per_gb: float) -> float:
    """What sending `size` bytes costs, in US dollars."""
    return size / GB * usd_per_gb


def prefill_usd(tokens: int, price: PrefillPrice) -> float:
    """What prefilling so many tokens costs, in US dollars."""
    return tokens / 1e6 * price.usd_per_million_tokens


def break_even_usd_per_gb(prefill: float, size: float) -> float:
    """The egress price, in US dollars a gigabyte, below which sending `size` bytes is cheaper than a prefill.

    `prefill` is the prefill's cost in US dollars.
    """
    return prefill / (size / GB)
