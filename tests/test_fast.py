"""The codec fast: every bit pattern comes back, noise does not grow, and a bad stream is refused, nothing worse."""

import struct
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbuy.codec import Encoded
from kvbuy.codec.arrays import Array, shaped
from kvbuy.codec.fast import SETTINGS, FastCoder, decode_tensors, encode_tensors
from kvbuy.errors import DamagedError

DTYPES = {"BF16": (torch.bfloat16, np.uint16), "F16": (torch.float16, np.uint16), "F32": (torch.float32, np.uint32)}
RANDOM = np.random.default_rng(0)
SPECIAL = {
    np.uint16: [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7C00, 0xFC00, 0x7E55, 0x03FF, 0x3F80],
    np.uint32: [0, 2**31, 1, 2**31 + 1, 0x7F800000, 0xFF800000, 0x7FC00001, 2**32 - 1, 0x007FFFFF, 0x3F800000],
}

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
rarely = settings(max_examples=60, deadline=None, derandomize=True)


def normal(dtype: str, *shape: int) -> Array:
    """Normal numbers whose scale differs from channel to channel, as in a KV cache."""
    scale = torch.from_numpy(RANDOM.lognormal(0, 0.5, shape[-1]))
    numbers = (torch.from_numpy(RANDOM.standard_normal(shape)) * scale).to(DTYPES[dtype][0])
    array: Array = numbers.view(torch.int16 if numbers.itemsize == 2 else torch.int32).numpy().view(DTYPES[dtype][1])
    return array


def noise(dtype: str, *shape: int) -> Array:
    word = DTYPES[dtype][1]
    return RANDOM.integers(0, np.iinfo(word).max, shape, dtype=word, endpoint=True)


def comes_back(tensors: list[Array]) -> Encoded:
    """Encode, decode into fresh arrays, and compare; returns what was encoded."""
    encoded = encode_tensors(tensors)
    again = [np.empty(tensor.shape, tensor.dtype) for tensor in tensors]
    decode_tensors(memoryview(encoded.data), again)
    assert [tensor.tobytes() for tensor in again] == [tensor.tobytes() for tensor in tensors]
    assert sum(encoded.tensor_bytes) == len(encoded.data)
    return encoded


@every_dtype
@rarely
@given(data=st.data())
def test_every_bit_pattern_comes_back(dtype: str, data: st.DataObject) -> None:
    word = DTYPES[dtype][1]
    patterns = st.sampled_from(SPECIAL[word]) | st.integers(0, int(np.iinfo(word).max))
    tensors = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = [data.draw(st.integers(1, most)) for most in (3, 20, 9)]
        few = data.draw(st.lists(patterns, min_size=1, max_size=8))
        tensors.append(np.array(few, word)[RANDOM.integers(0, len(few), shape)])
    comes_back(tensors)


@every_dtype
def test_every_sixteen_bit_word_comes_back(dtype: str) -> None:
    words = np.sort(np.arange(2**16, dtype=np.uint32).reshape(4, 128, 128), axis=1)
    encoded = comes_back([words.astype(np.uint16) if dtype != "F32" else words << 16 | words])
    assert len(encoded.data) < words.size * DTYPES[dtype][1]().itemsize


@pytest.mark.parametrize(("dtype", "most"), {"BF16": 0.72, "F16": 0.88, "F32": 0.86}.items())
def test_numbers_of_one_scale_a_channel_get_smaller(dtype: str, most: float) -> None:
    tensors = [normal(dtype, 3, 512, 64) for _ in range(4)]
    assert len(comes_back(tensors).data) < most * sum(tensor.nbytes for tensor in tensors)


@every_dtype
def test_constant_channels_cost_their_lower_bits_only(dtype: str) -> None:
    tensor = np.broadcast_to(normal(dtype, 2, 1, 64), (2, 256, 64)).copy()
    assert len(comes_back([tensor]).data) < 1.02 * (tensor.nbytes - tensor.size)


@every_dtype
def test_noise_does_not_grow(dtype: str) -> None:
    tensors = [noise(dtype, 3, 100, 64), noise(dtype, 1, 100, 8)]
    assert comes_back(tensors).data == b"".join(tensor.tobytes() for tensor in tensors)


@every_dtype
def test_a_noisy_tensor_stays_raw_beside_one_that_is_not(dtype: str) -> None:
    tensors = [normal(dtype, 3, 100, 64), noise(dtype, 3, 100, 64)]
    assert comes_back(tensors).tensor_bytes[1] == 4 + tensors[1].nbytes


@every_dtype
def test_one_token_comes_back(dtype: str) -> None:
    comes_back([normal(dtype, 2, 1, 64), normal(dtype, 2, 1, 32)])
    comes_back([normal(dtype, 1, 1, 1)])


@every_dtype
def test_arrays_that_are_views_of_a_larger_buffer_are_read_and_filled_in_place(dtype: str) -> None:
    source, target = normal(dtype, 70, 90, 32), np.zeros((70, 90, 32), DTYPES[dtype][1])
    encoded = encode_tensors([source[:, 10:74]])
    decode_tensors(memoryview(encoded.data), [target[:, 10:74]])
    assert encoded == encode_tensors([source[:, 10:74].copy()])
    assert np.array_equal(target[:, 10:74], source[:, 10:74])
    assert not target[:, :10].any()
    assert not target[:, 74:].any()


def test_planes_of_many_zstandard_blocks_come_back() -> None:
    comes_back([normal("BF16", 8, 512, 128)])


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)], ids=str)
def test_a_tensor_of_any_shape_is_taken_as_three_dimensional(shape: tuple[int, ...]) -> None:
    raw = noise("F32", *shape).tobytes()
    array = shaped(raw, "F32", shape)
    assert (array.ndim, array.shape[-1], array.tobytes()) == (3, 5, raw)


def test_the_stream_is_what_its_description_says() -> None:
    """Decoded by the description alone, number by number, without a line of the codec."""
    (key, value) = tensors = [normal("BF16", 2, 40, 16), normal("BF16", 2, 40, 8)]
    data = encode_tensors(tensors).data
    lengths, rest = struct.unpack("<2I", data[:8]), data[8:]
    for tensor, length in zip((key, value), lengths, strict=True):
        _, rows, dim = tensor.shape
        upper = zstandard.ZstdDecompressor().decompress(rest[:length], max_output_size=tensor.size)
        lower, rest = rest[length : length + tensor.size], rest[length + tensor.size :]
        for head, row, at in [(0, 0, 0), (1, 0, 3), (0, 39, 7), (1, 17, 5)]:
            high, low = upper[(head * dim + at) * rows + row], lower[(head * rows + row) * dim + at]
            assert tensor[head, row, at] == (low >> 7) << 15 | high << 7 | low & 0x7F
    assert rest == b""


TENSOR = normal("BF16", 1, 64, 16)
GOOD = encode_tensors([TENSOR]).data
LENGTH = struct.unpack("<I", GOOD[:4])[0]
FRAME, LOWER = GOOD[4 : 4 + LENGTH], GOOD[4 + LENGTH :]


def stream(frame: bytes, lower: bytes = LOWER) -> bytes:
    return struct.pack("<I", len(frame)) + frame + lower


def compressed(content: bytes, **options: Any) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(**(SETTINGS | options))
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


HOSTILE = {
    "empty": b"",
    "no table": b"\0\0\0",
    "longer than what it decodes to": GOOD + bytes(TENSOR.nbytes),
    "a frame of four gigabytes": b"\xff" * 4 + GOOD[4:],
    "a raw tensor cut off": bytes(4) + GOOD[4:],
    "a frame one byte too long in the table": struct.pack("<I", LENGTH + 1) + GOOD[4:],
    "not a frame": stream(b"x" * LENGTH),
    "a byte after": GOOD + b"\0",
    "a byte after the frame": stream(FRAME + b"\0"),
    "a frame cut off": stream(FRAME[:-1]),
    "two frames": stream(compressed(bytes(512)) + compressed(bytes(512))),
    "an empty frame before": stream(compressed(b"") + FRAME),
    "a frame too long": stream(compressed(bytes(1025))),
    "a frame too short": stream(compressed(bytes(1023))),
    "a frame of a gigabyte": stream(compressed(bytes(2**30), write_content_size=1)[:900]),
    "a frame that states its size": stream(compressed(bytes(1024), write_content_size=1)),
    "a frame with a checksum": stream(compressed(bytes(1024), write_checksum=1)),
    "a window too large": stream(b"\x28\xb5\x2f\xfd\x00\xa8" + FRAME[6:]),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_stream_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedError):
        decode_tensors(memoryview(data), [np.empty_like(TENSOR)])


def test_every_truncation_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(DamagedError):
            decode_tensors(memoryview(GOOD[:length]), [np.empty_like(TENSOR)])


def test_a_flipped_bit_is_refused_or_gives_other_bits() -> None:
    """Other bits are for the block's digest to find. A few bits that say nothing may be: then all is as it was."""
    found = np.empty_like(TENSOR)
    silent = 0
    for at in range(0, 8 * len(GOOD), 3):
        flipped = bytearray(GOOD)
        flipped[at // 8] ^= 1 << at % 8
        try:
            decode_tensors(memoryview(flipped), [found])
        except DamagedError:
            continue
        silent += np.array_equal(found, TENSOR)
    assert silent <= 8


def test_a_coder_decodes_blocks_in_any_order() -> None:
    coder, blocks = FastCoder(), [[normal("BF16", 1, 16, 8)] for _ in range(3)]
    encoded = [coder.encode_block(index, block) for index, block in enumerate(blocks)]
    for index in (2, 0, 1):
        found = [np.empty_like(tensor) for tensor in blocks[index]]
        coder.decode_block(index, memoryview(encoded[index].data), found)
        assert np.array_equal(found[0], blocks[index][0])
