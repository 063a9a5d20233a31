"""The command line of what KV is worth: `kvbuy measure`, `bench`, `cost`, `report`, a short recipe each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbuy.options import (
    AdapterOption,
    ArtifactArgument,
    BaselinesOption,
    BenchOption,
    BlockSizeOption,
    CodecChoice,
    CodecOption,
    DeviceOption,
    DtypeOption,
    EgressOption,
    ForceOption,
    GpuHourOption,
    JsonOption,
    KeepOption,
    LengthsOption,
    LinkOption,
    LoadsOption,
    MeasureOption,
    ModelOption,
    PricesOption,
    RouteOption,
    ShareOption,
    StartOption,
    TariffOption,
    TextArgument,
)

if TYPE_CHECKING:
    from kvbuy.artifact import Artifact
    from kvbuy.lossy import LossyMeasure
    from kvbuy.parts import CodecName


TYPED = "COMMANDLINE"


def measure(
    artifact: ArtifactArgument = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Compare int8 and fp8 too; runs the model.")] = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Weigh an artifact's KV under each codec, and price a load.

    Without --lossy no model is needed. Example: kvbuy measure
    """
    from kvbuy import render, render_measure
    from kvbuy.artifact import Artifact
    from kvbuy.measure import measure
    from kvbuy.places import find_artifact

    opened = Artifact.open(find_artifact(artifact))
    if artifact is None and not json:
        render.say(f"artifact: {opened.path}")
    with render.token_progress() as progress:
        measured = measure(opened, progress=progress)
    compared = _compare_lossy(opened, model, adapter, device) if lossy else ()
    if json:
        render.print_json(render_measure.measure_json(opened, measured, compared))
    else:
        render_measure.print_measurement(opened, measured, compared)


def bench(
    document: TextArgument = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    lengths: LengthsOption = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of each load; of each prefill at most 3.")] = 5,
    block_size: BlockSizeOption = 512,
    codec: CodecOption = CodecChoice.RAW,
    baselines: BaselinesOption = True,
    gguf: Annotated[Path | None, typer.Option("--gguf", help="The model for llama.cpp.")] = None,
    vllm: Annotated[Path | None, typer.Option("--vllm", help="A Python that has vllm.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the figures there too, as JSON.")] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Measure prefill against reuse on this machine.

    Takes minutes. Example: kvbuy bench --out bench.json
    """
    from kvbuy import render, render_bench
    from kvbuy.artifact import refuse_unwritable
    from kvbuy.docstrings import help_texts
    from kvbuy.document import read_document
    from kvbuy.figures import parse_lengths
    from kvbuy.whole import write_whole

    wanted = parse_lengths(lengths)
    if out is not None:
        refuse_unwritable(out, force=force)
    text = help_texts() if document is None else read_document(document)

    from kvbuy.bench import Plan, run_bench
    from kvbuy.models import load_model

    loaded = load_model(model, adapter=adapter, device=device, dtype=dtype, say=render.say)
    plan = Plan(
        lengths=wanted,
        repeats=repeats,
        block_size=block_size,
        codec=codec.value,
        baselines=baselines,
        gguf=gguf,
        vllm=vllm,
    )
    name = "Python's help texts" if document is None else Path(document).name
    with render.token_progress("lengths") as progress:
        found = run_bench(loaded, text, plan, name=name, progress=progress)
    if out is not None:
        with write_whole(out) as file:
            file.write(found.model_dump_json(indent=2).encode())
    if json:
        render.print_json(found.model_dump())
    else:
        render_bench.print_benchmark(found)


def cost(
    context: typer.Context,
    artifact: Annotated[Path | None, typer.Argument(metavar="[ARTIFACT]", help="What is shipped or hosted.")] = None,
    bench: BenchOption = None,
    agents: LoadsOption = None,
    measure: MeasureOption = None,
    codec: Annotated[CodecChoice | None, typer.Option("--codec", help="With its size from --measure.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, max=10**9, help="[default: the artifact's]")] = None,
    bytes_per_token: Annotated[float | None, typer.Option("--bytes-per-token", min=1, max=1e9)] = None,
    prefill_seconds: Annotated[float | None, typer.Option("--prefill-seconds", min=1e-6, max=1e9)] = None,
    reuse_seconds: Annotated[float | None, typer.Option("--reuse-seconds", min=1e-6, max=1e9)] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Its price from the table.")] = None,
    gpu_usd_per_hour: GpuHourOption = None,
    egress: RouteOption = None,
    usd_per_gb: EgressOption = None,
    keep: KeepOption = None,
    hours: Annotated[float | None, typer.Option("--hours", min=0.0, max=1e6, help="How long. [default: 24]")] = None,
    link_gbit: LinkOption = None,
    tariff: TariffOption = None,
    publisher_share: ShareOption = None,
    prices: PricesOption = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's table from its own inputs.")] = False,
    json: JsonOption = False,
) -> None:
    """Say what loads cost: prefilled, shipped or hosted.

    Example: kvbuy cost --bench bench.json --agents 1000
    """
    if paper:
        _print_paper(context, json)
        return
    from kvbuy import render, render_cost
    from kvbuy.artifact import Artifact
    from kvbuy.cost import LOADS, Terms, estimate
    from kvbuy.figures import read_benchmark, read_weights
    from kvbuy.prices import read_prices
    from kvbuy.subject import Facts, find_subject

    opened = None if artifact is None else Artifact.open(artifact)
    run = None if bench is None else read_benchmark(bench)
    weights = None if measure is None else read_weights(measure)
    coded: CodecName | None = None if codec is None else codec.value
    facts = Facts(tokens, bytes_per_token, prefill_seconds, reuse_seconds, codec=coded, weights=weights)
    terms = Terms(
        loads=tuple(agents) if agents else LOADS,
        gpu=gpu,
        usd_per_hour=gpu_usd_per_hour,
        egress=egress,
        usd_per_gb=usd_per_gb,
        keep=keep,
        hours=hours,
        link_gbit=link_gbit,
        tariff=tariff,
        publisher_share=publisher_share,
    )
    found = estimate(find_subject(opened, run, facts), terms, read_prices(prices))
    if json:
        render.print_json(render_cost.cost_json(found))
    else:
        render_cost.print_cost(found)


def _print_paper(context: typer.Context, json: bool) -> None:
    """The paper's table: it has its own inputs, so no other option goes with it."""
    from kvbuy import render, render_cost
    from kvbuy.errors import UsageError
    from kvbuy.paper import paper_figures

    typed = [name for name in context.params if (source := context.get_parameter_source(name)) and source.name == TYPED]
    if others := [name.replace("_", "-") for name in typed if name not in ("paper", "json")]:
        raise UsageError(f"--paper has its own inputs, and takes no {others[0]}", hint="kvbuy cost --paper")

    figures = paper_figures()
    if json:
        render.print_json(render_cost.paper_json(figures))
    else:
        render_cost.print_paper(figures)


def report(
    bench: BenchOption = None,
    measure: MeasureOption = None,
    agents: StartOption = 1e6,
    egress: RouteOption = None,
    keep: KeepOption = None,
    tariff: TariffOption = None,
    gpu_usd_per_hour: GpuHourOption = None,
    usd_per_gb: EgressOption = None,
    prices: PricesOption = None,
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("report.html"),
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Show bench, measure and cost on one HTML page.

    Example: kvbuy report --bench bench.json --measure measure.json
    """
    from kvbuy import render
    from kvbuy.artifact import refuse_unwritable
    from kvbuy.cost import Terms, estimate
    from kvbuy.errors import UsageError, refuse_without
    from kvbuy.figures import read_benchmark, read_weights
    from kvbuy.prices import read_prices
    from kvbuy.subject import Facts, find_subject
    from kvbuy.whole import write_whole

    if bench is None and measure is None:
        raise UsageError("there is nothing to report", hint="kvbuy bench --out bench.json, then --bench bench.json")
    refuse_without("matplotlib", what="the report", extra="report")
    refuse_unwritable(out, force=force)
    run = None if bench is None else read_benchmark(bench)
    weights = None if measure is None else read_weights(measure)
    terms = Terms(
        loads=(agents,),
        egress=egress,
        keep=keep,
        tariff=tariff,
        usd_per_hour=gpu_usd_per_hour,
        usd_per_gb=usd_per_gb,
    )
    table = read_prices(prices)
    found = None if run is None else estimate(find_subject(None, run, Facts(weights=weights)), terms, table)

    from kvbuy.report import make_report

    page = make_report(run, weights, found)
    with write_whole(out) as file:
        file.write(page.encode())
    if json:
        render.print_json({"report": str(out), "bytes": len(page.encode())})
    else:
        print(out)


def _compare_lossy(
    artifact: "Artifact", model: str | None, adapter: str | None, device: str | None
) -> "tuple[LossyMeasure, ...]":
    """Run an artifact's model on lossy encodings of it."""
    from kvbuy import render
    from kvbuy.lossy import measure_lossy
    from kvbuy.models import find_model_for

    loaded = find_model_for(artifact.manifest, model, adapter=adapter, say=render.say).load(device)
    with render.token_progress() as progress:
        return measure_lossy(artifact, loaded, progress=progress)
