"""The options and arguments that several verbs share, each described once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ReuseMode(StrEnum):
    """How to reuse a document's KV."""

    CONTINUE = "continue"
    ALIGN = "align"


class Dtype(StrEnum):
    """What to compute in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class CodecChoice(StrEnum):
    """How an artifact stores its KV: always lossless."""

    RAW = "raw"
    FAST = "fast"
    DENSE = "dense"


ModelOption = Annotated[str | None, typer.Option("--model", help="Hub id (with optional @revision) or local folder.")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="PEFT adapter: folder or Hub id.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cuda, mps or cpu. [default: the first there is]")]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="[default: the model's own]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
KvOption = Annotated[str | None, typer.Option("--kv", help="Artifact, or hf://USER/NAME. [default: the newest here]")]
ArtifactArgument = Annotated[
    str | None, typer.Argument(metavar="[ARTIFACT]", help="File, or hf://USER/NAME. [default: the newest here]")
]
ReuseOption = Annotated[ReuseMode, typer.Option("--reuse", help="continue: fastest. align: as one single pass.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option("--top-p", min=0.01, max=1.0, help="Sample from this nucleus.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")]
StopOption = Annotated[list[str] | None, typer.Option("--stop", help="Stop before this text; may be repeated.")]
BenchOption = Annotated[
    Path | None, typer.Option("--bench", help="The figures of a run: kvbuy bench --out FILE makes them.")
]
MeasureOption = Annotated[
    Path | None, typer.Option("--measure", help="What an artifact weighs: kvbuy measure --json > FILE makes it.")
]
GpuHourOption = Annotated[
    float | None, typer.Option("--gpu-usd-per-hour", min=0.0, max=1e6, help="What the machine costs that was measured.")
]
EgressOption = Annotated[float | None, typer.Option("--usd-per-gb", min=0.0, max=1e6, help="Price of egress.")]
RequireOption = Annotated[
    bool, typer.Option("--require-signature", help="Refuse what nobody whom you trust has signed.")
]
PricesOption = Annotated[Path | None, typer.Option("--prices", help="JSON file of prices that go first.")]
BlockSizeOption = Annotated[int, typer.Option("--block-size", help="Tokens a block; a multiple of 16.")]
CodecOption = Annotated[CodecChoice, typer.Option("--codec", help="Lossless: raw, fast or dense.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
LoadsOption = Annotated[
    list[float] | None,
    typer.Option("--agents", min=1, max=1e12, help="Loads in all; repeatable. [default: 1, 1000, 1e6]"),
]
TextArgument = Annotated[str | None, typer.Argument(metavar="[DOC]", help="UTF-8 text. [default: Python's help texts]")]
LengthsOption = Annotated[
    str | None, typer.Option("--lengths", help="Tokens, with commas. [default: 255,512,1024,2048,3774]")
]
BaselinesOption = Annotated[bool, typer.Option("--baselines/--no-baselines", help="Measure other ways to reuse too.")]
LinkOption = Annotated[float | None, typer.Option("--link-gbit", min=1e-6, max=1e6, help="Gbit/s. [default: 10]")]
ShareOption = Annotated[
    float | None, typer.Option("--publisher-share", min=0.0, max=1.0, help="Of the margin. [default: 0.5]")
]
StartOption = Annotated[float, typer.Option("--agents", min=1, max=1e12, help="Where the slider of loads starts.")]
RouteOption = Annotated[str | None, typer.Option("--egress", help="Who ships, from the table.")]
KeepOption = Annotated[
    str | None,
    typer.Option("--keep", help="Where hosted KV stays, from the table. [default: what ships]"),
]
TariffOption = Annotated[str | None, typer.Option("--tariff", help="What users pay, from the table.")]
