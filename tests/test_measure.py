"""Weights, entropies and speeds of real small artifacts and of values whose entropy is known."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT, SaveModel
from handmade import handmade
from rich.console import Console
from test_cache import mistral_all_sliding

from kvbuy.artifact import write_artifact
from kvbuy.bounds import LAYOUTS, entropy_bits, gaussian_bits, measure_bounds
from kvbuy.codec import Encoded
from kvbuy.codec.arrays import Array
from kvbuy.codec.baseline import Raw, Zstd, baselines
from kvbuy.errors import DamagedError
from kvbuy.manifest import FloatType
from kvbuy.measure import Absent, measure, measure_codec, measure_sample, read_arrays
from kvbuy.models import load_model
from kvbuy.prefill import Precomputed, precompute
from kvbuy.render_measure import bar, codec_notes, codec_table, layer_table, measure_json, print_measurement

RANDOM = np.random.default_rng(0)


def noise(rows: int, *, dim: int = 32, dtype: type = np.uint16) -> Array:
    """Uniform random bits [2, rows, dim]."""
    return RANDOM.integers(0, np.iinfo(dtype).max, (2, rows, dim), dtype=dtype, endpoint=True)


def gaussian_bf16(rows: int, *, scale: float) -> Array:
    """Gaussian values [2, rows, 32] in bfloat16, rounded to nearest."""
    bits = (RANDOM.standard_normal((2, rows, 32)) * scale).astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def test_blocks_are_read_as_the_bytes_of_the_file(made: Precomputed) -> None:
    blocks = read_arrays(made.artifact)
    manifest = made.artifact.manifest
    raw = made.artifact.path.read_bytes()[made.artifact.header_bytes :]
    assert [[tensor.shape for tensor in block] for block in blocks] == [
        [tensor.shape for tensor in manifest.block_tensors(index)] for index in range(4)
    ]
    assert b"".join(tensor.tobytes() for block in blocks for tensor in block) == raw[: manifest.kv_bytes()]


def test_a_damaged_block_is_not_measured(made: Precomputed) -> None:
    raw = bytearray(made.artifact.path.read_bytes())
    raw[made.artifact.header_bytes + 5] ^= 1
    made.artifact.path.write_bytes(raw)
    with pytest.raises(DamagedError, match="block 0"):
        measure(made.artifact)


def test_an_artifact_is_weighed_under_every_baseline(made: Precomputed) -> None:
    found = measure(made.artifact)
    assert (found.kv_bytes, found.state_bytes, found.tokens, found.bytes_per_token) == (51200, 0, 200, 256)
    assert [codec.name for codec in found.codecs] == ["raw", "zstd-1", "zstd-3", "zstd-19", "fast"]
    assert found.codecs[0].ratio == 1.0
    for codec in found.codecs:
        assert (codec.lossless, codec.sampled, len(codec.layers)) == (True, False, 2)
        assert codec.ratio == codec.bytes / 51200
        assert min(codec.encode_gbps, codec.decode_gbps) > 0


def test_raw_weighs_what_it_codes() -> None:
    found = measure_codec("raw", Raw, [[noise(16), noise(16)], [noise(3), noise(3)]])
    assert (found.bytes, found.ratio, found.layers) == (2 * 2 * 32 * 19 * 2, 1.0, ((1.0, 1.0),))


def test_zstd_finds_repetition_and_says_in_which_tensor() -> None:
    same: Array = np.ones((2, 64, 32), dtype=np.uint16)
    found = measure_codec("zstd-1", lambda: Zstd(1), [[same, noise(64)]] * 2)
    ((key, value),) = found.layers
    assert key < 0.01
    assert 1 <= value < 1.01
    assert found.ratio == pytest.approx((key + value) / 2)


@pytest.mark.parametrize("name", baselines())
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_every_baseline_gives_every_bit_back(name: str, dtype: type) -> None:
    blocks = [[noise(rows, dtype=dtype), noise(rows, dim=16, dtype=dtype)] for rows in (16, 16, 1)]
    assert measure_codec(name, baselines()[name], blocks).lossless


class Forgetful(Raw):
    """Leaves the last tensor as it finds it."""

    def decode_block(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
        super().decode_block(index, data, tensors[:-1])


def test_a_codec_that_loses_a_bit_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="forgetful does not give block 0 back"):
        measure_codec("forgetful", Forgetful, [[np.zeros((1, 4, 4), dtype=np.uint16)] * 2])


def test_blocks_are_coded_in_order() -> None:
    class Ordered(Raw):
        seen: list[int] = []  # noqa: RUF012

        def encode_block(self, index: int, tensors: Sequence[Array]) -> Encoded:
            self.seen.append(index)
            return super().encode_block(index, tensors)

        def decode_block(self, index: int, data: memoryview, tensors: Sequence[Array]) -> None:
            self.seen.append(index)
            super().decode_block(index, data, tensors)

    measure_codec("ordered", Ordered, [[noise(2), noise(2)]] * 3)
    assert Ordered.seen == [0, 1, 2, 0, 1, 2]


def test_a_sample_says_so_and_stands_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [[noise(64), noise(64)] for _ in range(3)]
    raw = sum(tensor.nbytes for block in blocks for tensor in block)
    assert not measure_sample("raw", Raw, blocks).sampled
    monkeypatch.setattr("kvbuy.measure.SAMPLE_BYTES", raw // 10)
    found = measure_sample("raw", Raw, blocks, uncoded=100)
    assert (found.sampled, found.bytes, found.ratio, found.layers) == (True, raw + 100, 1.0, ((1.0, 1.0),))


def test_state_is_counted_as_it_is(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a.kv.safetensors", *handmade())
    found = measure(artifact)
    assert (found.kv_bytes, found.state_bytes, found.layers) == (322, 82, (0,))
    assert (found.codecs[0].bytes, found.codecs[0].ratio) == (322, 1.0)
    assert "0.0 MB of state" in " ".join(codec_notes(found))


def test_a_model_without_full_layers_has_state_alone(save_model: SaveModel, tmp_path: Path) -> None:
    model = load_model(str(save_model(mistral_all_sliding())))
    made = precompute(TEXT[:50], tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=16)
    found = measure(made.artifact)
    assert (found.state_bytes, found.layers, found.bounds) == (found.kv_bytes, (), ())
    assert {(codec.bytes, codec.ratio, codec.layers) for codec in found.codecs} == {(found.kv_bytes, 1.0, ())}
    print_measurement(made.artifact, found, ())


def bits_of(*tensors: Array, dtype: FloatType = "BF16") -> dict[str, tuple[float, float]]:
    """The bounds (keys, values) of one block, by name."""
    return {bound.name: (bound.key_bits, bound.value_bits) for bound in measure_bounds([tensors], dtype=dtype)}


def test_a_constant_has_no_entropy_but_what_is_left_raw() -> None:
    same: Array = np.full((2, 64, 32), 0x3F80, dtype=np.uint16)
    bits = bits_of(same, same)
    assert bits["values"] == (0, 0)
    assert bits["exponents a channel"] == (8, 8)
    assert bits["signs and exponents a channel"] == (7, 7)


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", np.uint16), ("F16", np.uint16), ("F32", np.uint32)])
def test_random_bits_cannot_be_compressed(dtype: FloatType, kind: type) -> None:
    bounds = measure_bounds([[noise(8192, dtype=kind), noise(8192, dtype=kind)]] * 2, dtype=dtype)
    for bound in bounds[:3]:
        assert (bound.key_ratio, bound.value_ratio, bound.ratio) == pytest.approx((1, 1, 1), abs=0.005)


@pytest.mark.parametrize("scale", [0.01, 1.0, 1.3, 50.0])
def test_gaussian_values_stand_at_the_wall_whatever_their_scale(scale: float) -> None:
    bits = bits_of(gaussian_bf16(20_000, scale=scale), gaussian_bf16(20_000, scale=scale))
    wall = gaussian_bits("BF16")
    assert wall == pytest.approx(10.46, abs=0.005)
    for name in ("values", "exponents a channel", "signs and exponents a channel"):
        assert bits[name] == pytest.approx((wall, wall), abs=0.1)
    assert bits["values"][0] == pytest.approx(wall, abs=0.01)


def test_the_wall_is_what_summing_over_all_bfloat16_values_gives() -> None:
    positive = (np.arange(1, 0x7F7F, dtype=np.uint32) << 16).view(np.float32).astype(float)
    edges = [0.0, *((positive[1:] + positive[:-1]) / 2), math.inf]
    shares = np.diff([math.erf(edge / math.sqrt(2)) for edge in edges])
    shares = shares[shares > 0]
    assert gaussian_bits("BF16") == pytest.approx(1 - float((shares * np.log2(shares)).sum()), abs=0.001)


def test_each_mantissa_bit_more_moves_the_wall_by_one() -> None:
    assert gaussian_bits("F16") == pytest.approx(gaussian_bits("BF16") + 3)
    assert gaussian_bits("F32") == pytest.approx(gaussian_bits("BF16") + 16)
    assert [gaussian_bits(dtype) / LAYOUTS[dtype].bits for dtype in ("BF16", "F16")] == pytest.approx(
        [0.654, 0.841], abs=0.0005
    )


def test_channels_of_different_scale_are_seen_apart() -> None:
    scales = 2.0 ** np.arange(-16, 16)
    scaled = (RANDOM.standard_normal((1, 8192, 32)) * scales).astype(np.float32).view(np.uint32) >> 16
    bits = bits_of(scaled.astype(np.uint16), scaled.astype(np.uint16))
    assert bits["values"][0] > bits["exponents a channel"][0] + 2


def test_entropy_of_known_counts() -> None:
    counts = np.array([[1 << 20, 0, 0, 0], [1 << 20] * 4, [1 << 21, 1 << 20, 1 << 19, 1 << 19]])
    assert entropy_bits(counts) == pytest.approx([0, 2, 1.75], abs=1e-5)


def test_json_holds_what_the_design_promises(made: Precomputed) -> None:
    facts = measure_json(made.artifact, measure(made.artifact), ())
    assert set(facts) >= {"kv_bytes", "bytes_per_token", "codecs", "lossy", "egress"}
    assert set(facts["codecs"][0]) >= {"name", "lossless", "bytes", "ratio", "encode_gbps", "decode_gbps"}
    assert [layer["layer"] for layer in facts["codecs"][0]["layers"]] == [0, 1]
    aws = facts["egress"][0]
    assert (aws["codec"], aws["provider"], aws["usd_per_gb"]) == ("raw", "AWS", 0.09)
    assert aws["usd_per_load"] == pytest.approx(51200 / 1e9 * 0.09)
    even = facts["break_even"][0]
    assert even["usd_per_gb"] == pytest.approx(even["prefill_usd"] / (51200 / 1e9))
    assert facts["lossy"] == []
    json.dumps(facts)


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(0.5, width=10, ascii_only=False) == "█████"
    assert bar(0.5625, width=10, ascii_only=False) == "█████▋"
    assert bar(0.5, width=10, ascii_only=True) == "#####"
    assert bar(1.01, width=4, ascii_only=True) == "####"
    assert bar(0.7, width=-3, ascii_only=False) == ""


def test_the_picture_fits_the_terminal(made: Precomputed) -> None:
    found = measure(made.artifact)
    for width, ascii_only in product([40, 60, 80, 200], [True, False]):
        console = Console(file=StringIO(), width=width)
        console.print(layer_table(found, width=width, ascii_only=ascii_only))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        bars = [line for line in lines if ("#" if ascii_only else "█") in line]
        assert len(bars) == 2
        assert max(map(len, lines)) <= width
        assert not ascii_only or all(line.isascii() for line in bars)


def test_a_codec_that_is_not_here_says_what_to_do(made: Precomputed) -> None:
    found = replace(measure(made.artifact), absent=(Absent("dense", "fetch its pack"),))
    assert codec_table(found).row_count == 6
    assert codec_notes(found)[-1] == "dense: not measured; fetch its pack"
