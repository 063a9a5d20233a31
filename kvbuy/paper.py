"""The paper's prices, and its table (arXiv 2606.13361) again from its own inputs, each figure with its basis.

The paper's money is an API's list price. What a GPU's time would cost stands beside it, since the two differ by orders
of magnitude and its conclusions do not: the ratio cancels out of all but the comparison with egress.
"""

from dataclasses import dataclass

from kvbuy.economics import Case, break_even_loads, count_costs, egress_usd, gpu_usd, tokens_usd

PAPER_TOKENS = 3774
PAPER_LOADS = 80e6
PAPER_PREFILL_USD = 0.0188  # a document
PAPER_LIST_USD = 1.5e6 / PAPER_LOADS / PAPER_TOKENS * 1e6  # a million tokens: $4.97
PAPER_RATIO = 49.7
PAPER_BYTES = 0.54e9
PAPER_BYTES_PER_TOKEN = 2 * 36 * 8 * 128 * 2  # Qwen3-4B in fp16: K and V, layers, heads, dims, bytes

LISTED = "listed: $0.0188 a prefill, as the paper has it: an API's list price, about $4.97 a million tokens"
COMPUTED = "computed: from the figures above"
MEASURED = "measured: by the paper, Qwen3-4B in fp16 on one Apple M1 Pro"

PAPER = Case(
    tokens=PAPER_TOKENS,
    kv_bytes=PAPER_BYTES,
    prefill_usd=PAPER_PREFILL_USD,
    ratio=PAPER_RATIO,
    loads=PAPER_LOADS,
    usd_per_gb=0.09,
    usd_per_gb_hour=0.0,
    usd_per_fetch=0.0,
    store_usd_per_gb_hour=0.0,
    store_usd_per_fetch=0.0,
    hours=0.0,
    input_usd=PAPER_LIST_USD,
    write_usd=PAPER_LIST_USD,
    read_usd=0.1 * PAPER_LIST_USD,
    publisher_share=0.0,
)


@dataclass(frozen=True, slots=True)
class PrefillPrice:
    """What prefilling a million tokens costs, in US dollars, and what that figure is based on."""

    name: str
    usd_per_million_tokens: float
    basis: str


def gpu_prefill_price(what: str, parameters: float, *, flops: float, usd_per_hour: float) -> PrefillPrice:
    """What a GPU's time costs: 2 FLOP a parameter and token (Kaplan et al. 2020, table 1), attention left out.

    `what` names model and GPU, `flops` is what the GPU reaches in floating-point operations a second.
    """
    usd_per_token = gpu_usd(2 * parameters / flops, usd_per_hour)
    gpu = f"{flops / 1e12:g} TFLOP/s (assumed) at ${usd_per_hour:.2f} an hour"
    basis = f"{what}: {parameters / 1e9:g} B parameters, 2 FLOP a parameter and token, {gpu}; attention left out"
    return PrefillPrice("GPU cost", usd_per_token * 1e6, basis)


LIST_PRICE = PrefillPrice(
    "list price",
    PAPER_LIST_USD,
    "arXiv 2606.13361: $1.5 M for 80 M prefills of 3774 tokens; an API's list price, not what computing costs",
)
GPU_PRICE = gpu_prefill_price(
    "the paper's Qwen3-4B on an H100 (2026-05, second hand, of a band from $1.99 to $6.88)",
    4e9,
    flops=500e12,
    usd_per_hour=2.50,
)
PREFILL_PRICES = (LIST_PRICE, GPU_PRICE)


@dataclass(frozen=True, slots=True)
class PaperFigure:
    """One figure: as the paper prints it, as its inputs give it (`value`), and on a GPU's cost where that differs."""

    name: str
    unit: str
    printed: str
    value: float
    at_gpu_cost: float | None
    basis: str


def paper_figures() -> tuple[PaperFigure, ...]:
    """The paper's table."""
    costs, ratio = count_costs(PAPER), PAPER_RATIO
    egress, loads = PAPER.egress_usd, PAPER.loads
    at_gpu = tokens_usd(PAPER_TOKENS, GPU_PRICE.usd_per_million_tokens)
    reuse = loads * PAPER.reuse_usd
    return (
        PaperFigure("prefill : reuse", "x", "49.7x", ratio, None, MEASURED),
        PaperFigure("one prefill", "usd", "$0.0188", PAPER.prefill_usd, at_gpu, LISTED),
        PaperFigure("80 M prefills", "million usd", "$1.5 M", costs.prefill, loads * at_gpu, COMPUTED),
        PaperFigure("80 M reuses", "million usd", "$0.03 M", reuse, loads * at_gpu / ratio, COMPUTED),
        PaperFigure("egress of a load", "usd", "$0.049", egress, None, "listed: $0.09 a GB (AWS); 0.54 GB, as it says"),
        PaperFigure(
            "egress : the prefill it saves", "x", "2.6x", egress / PAPER.prefill_usd, egress / at_gpu, COMPUTED
        ),
        PaperFigure("break-even loads N*", "", "about 1", break_even_loads(PAPER) or 0.0, None, COMPUTED),
        PaperFigure(
            "80 M loads at a tariff of 0.1x",
            "million usd",
            "fits inside",
            costs.tariff,
            None,
            "assumed: cached tokens at 0.1x the list price",
        ),
        PaperFigure("left of it after reuse", "million usd", "the rest", costs.tariff - reuse, None, COMPUTED),
        PaperFigure(
            "egress by the model's shape",
            "usd",
            "-",
            egress_usd(PAPER_TOKENS * PAPER_BYTES_PER_TOKEN, PAPER.usd_per_gb),
            None,
            "computed: 147456 bytes a token are 0.557 GB, a little more than it says",
        ),
    )
