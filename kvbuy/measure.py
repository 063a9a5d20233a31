"""What an artifact weighs under each lossless codec, how fast each one is, and where the wall is.

Torch-free. It knows artifacts and coders, not what a codec does inside, what bytes cost (`kvbuy.economics`) or how
results look. Codecs code the blocks; a sliding window's rows and recurrent state are counted as they are.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np

from kvbuy.artifact import Artifact
from kvbuy.bounds import Bound, measure_bounds
from kvbuy.codec import Coder, open_coder, plan_codec
from kvbuy.codec.arrays import Array
from kvbuy.codec.baseline import baselines
from kvbuy.errors import DamagedError, PackError, UsageError
from kvbuy.parts import CodecName, with_sizes
from kvbuy.reader import Reader

SAMPLE_BYTES = 4_000_000  # of keys and values for a codec that encodes a few megabytes a second
SAMPLED = ("zstd-19",)

FEW = 3  # blocks

Progress = Callable[[str, int, int], None]
Opener = Callable[[], Coder]


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
        PackError, UsageError: it cannot be decoded here.
    """
    manifest = artifact.manifest
    blocks = read_arrays(artifact)
    kv_bytes = manifest.kv_bytes()
    state_bytes = kv_bytes - _raw_bytes(blocks)
    openers, absent = find_coders(artifact)
    codecs = []
    for name, opener in openers.items():
        progress(name, 0, 0)
        weigh = measure_sample if name in SAMPLED else measure_codec
        codecs.append(weigh(name, opener, blocks, uncoded=state_bytes))
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


def find_coders(artifact: Artifact) -> tuple[dict[str, Opener], tuple[Absent, ...]]:
    """What opens coders of the lossless codecs for an artifact, by name, and those that are not to be had here.

    A dense artifact is measured with its own pack, any other with its model's newest.
    """
    manifest, tokens = artifact.manifest, artifact.read_tokens()
    openers: dict[str, Opener] = baselines()
    absent: list[Absent] = []
    names: tuple[CodecName, ...] = ("fast", "dense")
    for name in names:
        try:
            own = manifest.codec_name == name
            codec = manifest.codec if own else plan_codec(name, manifest.fingerprint, tokens=len(tokens))
            planned = manifest.with_codec(with_sizes(codec, manifest.decoded_sizes()))
            openers[name] = partial(open_coder, planned, tokens)
            openers[name]()
        except (UsageError, PackError, DamagedError) as error:
            openers.pop(name, None)
            absent.append(Absent(name, "; ".join(filter(None, (error.message, error.hint)))))
    return openers, tuple(absent)


def read_arrays(artifact: Artifact) -> list[list[Array]]:
    """Every block's tensors [heads, rows, dim] as computed, in file order; none where the model has no full layers.

    Raises:
        DamagedError: a digest does not match.
    """
    blocks = list(Reader.open(artifact).load_blocks())
    return blocks if any(map(len, blocks)) else []


def measure_codec(name: str, opener: Opener, blocks: Sequence[Sequence[Array]], *, uncoded: int = 0) -> CodecMeasure:
    """Encode and decode every block in order, with a coder each way, and compare every bit.

    `uncoded` bytes come on top as they are. Time is the process's, on all cores together: what one core does, whoever
    else uses the machine. Speeds are the median block's.

    Raises:
        AssertionError: the codec is not lossless: a bug in it.
    """
    if 0 < len(blocks) < FEW:  # what is compiled at its first use must not be the median
        opener().decode_block(0, memoryview(opener().encode_block(0, blocks[0]).data), [x.copy() for x in blocks[0]])
    encoder, decoder = opener(), opener()
    encoded, encoding = [], []
    for index, block in enumerate(blocks):
        started = time.process_time()
        encoded.append(encoder.encode_block(index, block))
        encoding.append(_gbps(block, started))
    decoding = []
    for index, (block, coded) in enumerate(zip(blocks, encoded, strict=True)):
        fresh = [~tensor for tensor in block]  # every value is wrong until it is decoded
        started = time.process_time()
        decoder.decode_block(index, memoryview(coded.data), fresh)
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


def measure_sample(name: str, opener: Opener, blocks: Sequence[Sequence[Array]], *, uncoded: int = 0) -> CodecMeasure:
    """`measure_codec` on the middle block's first heads, at most `SAMPLE_BYTES`; on everything where that is less.

    Heads rather than rows are left out first: what repeats in a document repeats from row to row.
    """
    raw = _raw_bytes(blocks)
    if raw <= SAMPLE_BYTES:
        return measure_codec(name, opener, blocks, uncoded=uncoded)
    heads = [tensor[:1] for tensor in blocks[len(blocks) // 2]]
    rows = max(1, SAMPLE_BYTES * heads[0].shape[1] // _raw_bytes([heads]))
    sample: list[Array] = [tensor[:, :rows].copy() for tensor in heads]
    found = measure_codec(name, opener, [sample])
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
