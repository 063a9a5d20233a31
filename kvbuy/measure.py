"""What an artifact weighs under each lossless codec, how fast each one is, and where the wall is.

Torch-free. It knows artifacts and coders, not what a codec does inside, what bytes cost (`kvbuy.economics`) or how
results look. Codecs code the blocks; a sliding window's rows and recurrent state are counted as they are.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from kvbuy.artifact import Artifact
from kvbuy.bounds import Bound, measure_bounds
from kvbuy.codec import Coder, open_coder, plan_codec
from kvbuy.codec.arrays import Array
from kvbuy.codec.baseline import baselines
from kvbuy.errors import PackError, UsageError
from kvbuy.parts import CodecName, with_sizes
from kvbuy.reader import Reader

SAMPLE_BYTES = 4_000_000  # of keys and values for a codec that encodes a few megabytes a second
SAMPLED = ("zstd-19",)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CodecMeasure:
    """A codec on an artifact's keys, values and state.

    `bytes` and `ratio` (to the bytes as computed) count what is not in blocks as it is. Speeds are decoded gigabytes a
    second of one core. `layers` has the (key, value) ratios of each full layer. `sampled`: measured on part of the
    blocks, `bytes` and `ratio` extrapolated from it.
    """

    name: str
    lossless: bool
    bytes: int
    ratio: float
    encode_gbps: float
    decode_gbps: float
    layers: tuple[tuple[float, float], ...]
    sampled: bool


@dataclass(frozen=True, slots=True)
class Absent:
    """A codec that cannot be measured here, and what to do about it."""

    name: str
    hint: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """An artifact on the scales: sizes in bytes, `layers` the numbers of its full layers."""

    kv_bytes: int
    state_bytes: int
    tokens: int
    layers: tuple[int, ...]
    codecs: tuple[CodecMeasure, ...]
    absent: tuple[Absent, ...]
    bounds: tuple[Bound, ...]

    @property
    def bytes_per_token(self) -> float:
        """Of keys, values and state as computed."""
        return self.kv_bytes / self.tokens


def measure(artifact: Artifact, *, progress: Progress = lambda _, __, ___: None) -> Measurement:
    """Weigh an artifact. `progress` is told what is being measured.

    Raises:
        DamagedError: a digest does not match.
    """
    manifest = artifact.manifest
    blocks = read_arrays(artifact)
    kv_bytes = manifest.kv_bytes()
    state_bytes = kv_bytes - _raw_bytes(blocks)
    coders, absent = find_coders(artifact)
    codecs = []
    for name, coder in coders.items():
        progress(name, 0, 0)
        weigh = measure_sample if name in SAMPLED else measure_codec
        codecs.append(weigh(name, coder, blocks, uncoded=state_bytes))
    progress("entropies", 0, 0)
    return Measurement(
        kv_bytes=kv_bytes,
        state_bytes=state_bytes,
        tokens=manifest.document.tokens,
        layers=tuple(at for at, layer in enumerate(manifest.layers) if layer.kind == "full"),
        codecs=tuple(codecs),
        absent=absent,
        bounds=measure_bounds(blocks, dtype=manifest.fingerprint.dtype),
    )


def find_coders(artifact: Artifact) -> tuple[dict[str, Coder], tuple[Absent, ...]]:
    """The lossless codecs to measure on an artifact, by name, and those that are not to be had here."""
    manifest = artifact.manifest
    coders: dict[str, Coder] = baselines()
    absent: list[Absent] = []
    names: tuple[CodecName, ...] = ("fast", "dense")
    for name in names:
        try:
            codec = with_sizes(plan_codec(name, manifest.fingerprint), manifest.decoded_sizes())
            coders[name] = open_coder(manifest.with_codec(codec), artifact.read_tokens())
        except (UsageError, PackError) as error:
            absent.append(Absent(name, f"{error.message}; {error.hint}"))
    return coders, tuple(absent)


def read_arrays(artifact: Artifact) -> list[list[Array]]:
    """Every block's tensors [heads, rows, dim] as computed, in file order; none where the model has no full layers.

    Raises:
        DamagedError: a digest does not match.
    """
    blocks = list(Reader.open(artifact).load_blocks())
    return blocks if any(map(len, blocks)) else []


def measure_codec(name: str, coder: Coder, blocks: Sequence[Sequence[Array]], *, uncoded: int = 0) -> CodecMeasure:
    """Encode and decode every block in order, and compare every bit.

    `uncoded` bytes come on top as they are. Time is the process's, on all cores together: what one core does, whoever
    else uses the machine. Speeds are the median block's.

    Raises:
        AssertionError: the codec is not lossless: a bug in it.
    """
    encoded, encoding = [], []
    for index, block in enumerate(blocks):
        started = time.process_time()
        encoded.append(coder.encode_block(index, block))
        encoding.append(_gbps(block, started))
    decoding = []
    for index, (block, coded) in enumerate(zip(blocks, encoded, strict=True)):
        fresh = [~tensor for tensor in block]  # every value is wrong until it is decoded
        started = time.process_time()
        coder.decode_block(index, memoryview(coded.data), fresh)
        decoding.append(_gbps(block, started))
        if not all(map(np.array_equal, block, fresh)):
            raise AssertionError(f"{name} does not give block {index} back")
    raw, size = _raw_bytes(blocks), sum(len(one.data) for one in encoded)
    ratios = _tensor_ratios(blocks, [one.tensor_bytes for one in encoded])
    return CodecMeasure(
        name=name,
        lossless=True,
        bytes=size + uncoded,
        ratio=(size + uncoded) / (raw + uncoded),
        encode_gbps=median(encoding or [0.0]),
        decode_gbps=median(decoding or [0.0]),
        layers=tuple(zip(ratios[0::2], ratios[1::2], strict=True)),
        sampled=False,
    )


def measure_sample(name: str, coder: Coder, blocks: Sequence[Sequence[Array]], *, uncoded: int = 0) -> CodecMeasure:
    """`measure_codec` on the middle block's first heads, at most `SAMPLE_BYTES`; on everything where that is less.

    Heads rather than rows are left out first: what repeats in a document repeats from row to row.
    """
    raw = _raw_bytes(blocks)
    if raw <= SAMPLE_BYTES:
        return measure_codec(name, coder, blocks, uncoded=uncoded)
    heads = [tensor[:1] for tensor in blocks[len(blocks) // 2]]
    rows = max(1, SAMPLE_BYTES * heads[0].shape[1] // _raw_bytes([heads]))
    sample: list[Array] = [tensor[:, :rows].copy() for tensor in heads]
    found = measure_codec(name, coder, [sample])
    size = round(found.ratio * raw) + uncoded
    return replace(found, bytes=size, ratio=size / (raw + uncoded), sampled=True)


def _tensor_ratios(blocks: Sequence[Sequence[Array]], costs: Sequence[Sequence[float]]) -> list[float]:
    """The ratio of each tensor over all blocks, in file order."""
    coded = [sum(cost) for cost in zip(*costs, strict=True)]
    raw = [sum(tensor.nbytes for tensor in tensors) for tensors in zip(*blocks, strict=True)]
    return [cost / size for cost, size in zip(coded, raw, strict=True)]


def _raw_bytes(blocks: Sequence[Sequence[Array]]) -> int:
    return sum(tensor.nbytes for block in blocks for tensor in block)


def _gbps(block: Sequence[Array], started: float) -> float:
    """Gigabytes of a block a second of processor time since `started`."""
    seconds = max(time.process_time() - started, time.get_clock_info("process_time").resolution)
    return _raw_bytes([block]) / seconds / 1e9
