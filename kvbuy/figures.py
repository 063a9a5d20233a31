"""The figures of a bench run, as values and as the JSON file that `bench` writes and `cost` and `report` read.

Torch-free. It knows what was measured and in which unit, not how (`kvbuy.bench`) or what it is worth.
"""

from math import isclose
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvbuy.errors import StoreError, UsageError
from kvbuy.parts import CodecName

Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**30)]
Positive = Annotated[int, Field(gt=0, le=10**18)]
Share = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
M = TypeVar("M", bound=BaseModel)


class Figures(BaseModel):
    """A group of figures; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Flops(Figures):
    """Floating-point operations: of linear layers, and of attention (scores and their sums)."""

    linear: Annotated[int, Field(gt=0, le=10**30)]
    attention: Count

    @property
    def total(self) -> int:
        """Both."""
        return self.linear + self.attention


class Row(Figures):
    """One document length. Times are medians; `spread` has the lowest and highest of each.

    `prefill_seconds` is in blocks, digests included, `single_pass_seconds` by plain transformers. `load_seconds` is
    from a file in the page cache into ready buffers, every digest checked; `cold_load_seconds` from a file that is not
    in it (None where it could not be dropped). `first_token_seconds` runs the prompt's rows on what was loaded,
    `resident_seconds` on a cache that was never away, `decode_seconds` one more token. `reuse_seconds` is load and
    first token, `ratio` the faster prefill over it, `floor_seconds` the KV's bytes over the fastest copy plus the
    resident first token. `exact`: a prefill from scratch gave the artifact's blocks, and continuing from both the same
    logits, bit for bit, in this process. Peaks are of the process (on CUDA of the device), in bytes, None where they
    cannot be had.
    """

    tokens: Positive
    kv_bytes: Positive
    file_bytes: Positive
    prefill_seconds: Seconds
    single_pass_seconds: Seconds
    load_seconds: Seconds
    cold_load_seconds: Seconds | None
    first_token_seconds: Seconds
    reuse_seconds: Seconds
    resident_seconds: Seconds
    decode_seconds: Seconds
    ratio: Rate
    floor_seconds: Seconds
    prefill_flops: Flops
    reuse_flops: Flops
    prefill_peak_bytes: Count | None
    reuse_peak_bytes: Count | None
    exact: bool
    blocks_equal: Count
    blocks: Count
    tokens_equal: Count
    spread: dict[str, tuple[Seconds, Seconds]]

    @property
    def scratch_seconds(self) -> float:
        """Prefill as fast as it was done here: in blocks or in a single pass."""
        return min(self.prefill_seconds, self.single_pass_seconds)

    @model_validator(mode="after")
    def _ratio_is_of_its_times(self) -> "Row":
        if not isclose(self.ratio, self.scratch_seconds / self.reuse_seconds, rel_tol=1e-6):
            raise ValueError(f"the ratio {self.ratio} is not that of the times")
        return self


class Limits(Figures):
    """What this machine could do at best, in gigabytes a second and teraFLOP a second, and how near a load comes.

    A copy of n bytes counts n. `load_gbps` is KV loaded at the longest length, `load_share` what was read of the file
    for it, over the slower of file read and, on a GPU, host-to-device copy.
    """

    memcpy_gbps: Rate
    read_gbps: Rate
    host_to_device_gbps: Rate | None
    matmul_tflops: Rate
    load_gbps: Rate
    load_share: Rate


class Baseline(Figures):
    """Another way to reuse, at the longest length: `bytes` on disk (None where nothing is), times as in `Row`."""

    name: str
    note: str
    tokens: Positive
    bytes: Count | None
    prefill_seconds: Seconds
    load_seconds: Seconds | None
    reuse_seconds: Seconds


class Missing(Figures):
    """A baseline that was not measured here, and why."""

    name: str
    hint: str


class Benchmark(Figures):
    """A whole run. `made` is UTC, `machine` and `software` are labels, `fingerprint` is the model's SHA-256."""

    version: Literal[1] = 1
    producer: str
    made: str
    model: str
    fingerprint: Digest
    dtype: str
    machine: str
    software: str
    document: str
    codec: CodecName
    block_size: Positive
    prompt_tokens: Positive
    repeats: Positive
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    limits: Limits
    baselines: tuple[Baseline, ...]
    missing: tuple[Missing, ...]

    @property
    def basis(self) -> str:
        """Where and when, in words."""
        return f"measured: {self.model} in {self.dtype} on {self.machine}, {self.made[:10]}"

    @model_validator(mode="after")
    def _rows_grow(self) -> "Benchmark":
        tokens = [row.tokens for row in self.rows]
        if tokens != sorted(set(tokens)):
            raise ValueError("its rows are not in the order of their lengths")
        return self


def read_benchmark(file: Path) -> Benchmark:
    """The figures in a file that `kvbuy bench --out` wrote.

    Raises:
        StoreError: it cannot be read.
        UsageError: it holds something else.
    """
    return _read(Benchmark, file, command=f"kvbuy bench --out {file}")


def _read(kind: type[M], file: Path, *, command: str) -> M:
    hint = f"make it: {command}"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}", hint=hint) from error
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        reason = _recognise(data, kind) or f"{where}: {first['msg']}"
        raise UsageError(f"{file} does not hold what it should: {reason}", hint=hint) from error


def _recognise(data: bytes, kind: type[BaseModel]) -> str | None:
    """What a JSON file that does not fit holds instead, where that is something of ours."""
    try:
        found = Anything.model_validate_json(data)
    except ValidationError:
        return None
    if found.error is not None:
        return f"it holds an error: {found.error}"
    if kind is not Benchmark and found.rows is not None:
        return "it is of kvbuy bench: give it as --bench"
    if kind is not Weights and found.codecs is not None:
        return "it is of kvbuy measure: give it as --measure"
    return None


def parse_lengths(text: str | None) -> tuple[int, ...] | None:
    """Document lengths from a text such as "255,512"; None where none is given (UsageError: it is something else)."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--lengths {text} is not a list of numbers", hint="--lengths 255,512,1024") from None


class Anything(BaseModel):
    """By what our JSON files are told apart."""

    error: str | None = None
    rows: list[object] | None = None
    codecs: list[object] | None = None


class Weighed(BaseModel):
    """Part of what `measure --json` prints: more is there, and left alone."""

    model_config = ConfigDict(frozen=True)


class LayerRatio(Weighed):
    """A codec's ratios on a layer."""

    layer: Count
    key_ratio: Share
    value_ratio: Share


class CodecRatio(Weighed):
    """A codec on an artifact, or on a sample of it; speeds are of one core."""

    name: str
    bytes: Positive
    ratio: Rate
    encode_gbps: Share
    decode_gbps: Share
    sampled: bool
    layers: tuple[LayerRatio, ...]


class Weights(Weighed):
    """An artifact on the scales; `made` (UTC) is when it was weighed, `fingerprint` the model's."""

    document: str
    model: str
    fingerprint: Digest
    dtype: str
    made: str
    tokens: Positive
    kv_bytes: Positive
    codecs: Annotated[tuple[CodecRatio, ...], Field(min_length=1)]


def read_weights(file: Path) -> Weights:
    """What `kvbuy measure --json` printed into a file (errors: `read_benchmark`)."""
    return _read(Weights, file, command=f"kvbuy measure --json > {file}")
