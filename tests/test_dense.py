"""The codec `dense`, coder and fit: bit for bit, whatever the bits."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvbuy.codec import Encoded
from kvbuy.codec.arrays import Array
from kvbuy.codec.column import TAIL
from kvbuy.codec.dense import DenseCoder
from kvbuy.codec.fit import Fit, Rotation, Sample
from kvbuy.codec.pack import Pack, PackFacts, PackLayer, make_pack, parse_pack
from kvbuy.errors import DamagedError
from kvbuy.parts import FloatType

DTYPES: tuple[FloatType, ...] = ("BF16", "F16", "F32")
STILL = Rotation(np.empty((0, 2), np.int64), np.empty(0, np.int64))
LAYERS, HEADS, DIM, BLOCK = 3, 2, 8, 160  # a block is a tile and a short one
ANGLES = 0.1 ** np.arange(DIM // 2)


def bits_of(numbers: Array, dtype: FloatType) -> Array:
    match dtype:
        case "BF16":
            return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        case "F16":
            return numbers.astype(np.float16).view(np.uint16)
        case "F32":
            return numbers.astype(np.float32).view(np.uint32)


def make_sample(tokens: int, dtype: FloatType, *, seed: int) -> Sample:
    """KV with something to predict: keys that turn, values of their keys, layers of the layers below."""
    random = np.random.default_rng(seed)
    ids = tuple(int(one) for one in random.integers(0, 20, tokens))
    below = np.random.default_rng(0).normal(size=(20, HEADS, DIM))[list(ids)].transpose(1, 0, 2)
    turn = np.arange(tokens)[:, None] * ANGLES
    tensors = []
    for _ in range(LAYERS):
        a, b = below[..., : DIM // 2], below[..., DIM // 2 :]
        key = np.concatenate([a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], axis=-1)
        tensors += [bits_of(key, dtype), bits_of(below[..., ::-1] * 0.5 + 0.1, dtype)]
        below = below + random.normal(size=below.shape) * 0.05
    return Sample(ids, tensors)


def make_facts(dtype: FloatType) -> PackFacts:
    return PackFacts(
        format="kvbuy pack",
        version=1,
        producer="test",
        model="none",
        fingerprint="0" * 64,
        dtype=dtype,
        layers=(PackLayer(heads=HEADS, key_dim=DIM, value_dim=DIM),) * LAYERS,
        depth=2,
        frequencies=len(ANGLES),
        alone=True,
        tokens=1000,
    )


@pytest.fixture(scope="module", params=DTYPES)
def pack(request: pytest.FixtureRequest) -> Pack:
    half = DIM // 2
    rotation = Rotation(np.array([(at, at + half) for at in range(half)]), np.arange(half))
    fit = Fit(make_facts(request.param), angles=ANGLES, rotations=[(rotation, STILL)] * LAYERS)
    fit.observe(make_sample(1000, request.param, seed=1))
    made, raw = make_pack(fit.facts, fit.finish([make_sample(500, request.param, seed=2)]))
    assert parse_pack(raw).digest == made.digest
    return made


def cut(sample: Sample) -> list[list[Array]]:
    count = len(sample.token_ids)
    return [[tensor[:, at : at + BLOCK] for tensor in sample.tensors] for at in range(0, count, BLOCK)]


def encode(pack: Pack, sample: Sample) -> list[bytes]:
    coder = DenseCoder(pack, sample.token_ids, block_size=BLOCK)
    return [coder.encode_block(at, block).data for at, block in enumerate(cut(sample))]


def never_smaller(tensors: Sequence[Array]) -> Encoded:
    return Encoded(bytes(4 * sum(tensor.nbytes for tensor in tensors)), ())


def decode(pack: Pack, sample: Sample, encoded: Sequence[bytes], *, threads: int = 1) -> list[list[Array]]:
    coder = DenseCoder(pack, sample.token_ids, block_size=BLOCK)
    blocks = [[np.zeros_like(tensor) for tensor in block] for block in cut(sample)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: coder.decode_block(at, memoryview(encoded[at]), blocks[at]), range(len(blocks))))
    return blocks


def same(blocks: list[list[Array]], sample: Sample) -> bool:
    pairs = zip(blocks, cut(sample), strict=True)
    return all(np.array_equal(a, b) for block, wanted in pairs for a, b in zip(block, wanted, strict=True))


@pytest.mark.parametrize("tokens", [1, 2, BLOCK, 500])
def test_a_document_comes_back_bit_for_bit(pack: Pack, tokens: int) -> None:
    sample = make_sample(tokens, pack.facts.dtype, seed=3)
    assert same(decode(pack, sample, encode(pack, sample)), sample)


def test_a_block_that_fast_codes_smaller_teaches_what_any_other_does(pack: Pack) -> None:
    sample = make_sample(3 * BLOCK, pack.facts.dtype, seed=12)
    random = np.random.default_rng(13)
    for tensor in sample.tensors:
        wild = tensor[:, :BLOCK]
        wild[:] = random.integers(0, 2 ** (8 * tensor.itemsize), wild.shape, dtype=tensor.dtype)
    encoded = encode(pack, sample)
    assert {data[0] for data in encoded} == {0, 1}
    assert same(decode(pack, sample, encoded, threads=3), sample)


def test_what_hardly_says_anything_has_a_64th_of_its_bytes_at_least(pack: Pack) -> None:
    sample = make_sample(3 * BLOCK, pack.facts.dtype, seed=14)
    for tensor in sample.tensors:
        tensor[:] = tensor[:, :1]
    encoded = encode(pack, sample)
    raw = sum(tensor.nbytes for tensor in sample.tensors) / 3
    assert min(map(len, encoded)) * 64 >= raw
    assert same(decode(pack, sample, encoded), sample)


def test_threads_change_no_bit_of_what_is_encoded(pack: Pack) -> None:
    sample = make_sample(900, pack.facts.dtype, seed=4)
    coder, blocks = DenseCoder(pack, sample.token_ids, block_size=BLOCK), cut(sample)
    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(lambda at: coder.encode_block(at, blocks[at]).data, range(len(blocks))))
    assert encoded == encode(pack, sample)


def test_threads_change_no_bit(pack: Pack) -> None:
    sample = make_sample(900, pack.facts.dtype, seed=4)
    assert same(decode(pack, sample, encode(pack, sample), threads=4), sample)


def test_what_is_predictable_gets_smaller_than_exponents_alone(pack: Pack) -> None:
    sample = make_sample(900, pack.facts.dtype, seed=5)
    ratio = sum(map(len, encode(pack, sample))) / sum(tensor.nbytes for tensor in sample.tensors)
    assert ratio < {"BF16": 0.6, "F16": 0.75, "F32": 0.8}[pack.facts.dtype]


@pytest.mark.parametrize("share", [1.0, 0.02], ids=["all", "here and there"])
def test_any_bit_pattern_comes_back(pack: Pack, share: float) -> None:
    sample = make_sample(700, pack.facts.dtype, seed=6)
    random = np.random.default_rng(7)
    for tensor in sample.tensors:
        wild = random.integers(0, 2 ** (8 * tensor.itemsize), tensor.shape, dtype=tensor.dtype)
        np.copyto(tensor, wild, where=random.random(tensor.shape) < share)
    encoded = encode(pack, sample)
    assert same(decode(pack, sample, encoded), sample)
    assert sum(map(len, encoded)) <= sum(tensor.nbytes for tensor in sample.tensors) + len(encoded)


@pytest.mark.parametrize("high", [0x0000, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7FC1, 0x7C00, 0xFFFF, 0x3F80])
def test_constant_channels_come_back(pack: Pack, high: int) -> None:
    sample = make_sample(200, pack.facts.dtype, seed=8)
    for tensor in sample.tensors:
        tensor[:, :, ::3] = high << (8 * tensor.itemsize - 16)
    assert same(decode(pack, sample, encode(pack, sample)), sample)


def test_a_damaged_block_is_refused_or_decodes_to_other_bits(pack: Pack) -> None:
    sample = make_sample(300, pack.facts.dtype, seed=9)
    encoded = encode(pack, sample)
    random = np.random.default_rng(10)
    for _ in range(20):
        broken = bytearray(encoded[0])
        broken[random.integers(len(broken))] ^= 1 << int(random.integers(8))
        try:
            assert not same(decode(pack, sample, [bytes(broken), *encoded[1:]]), sample)
        except DamagedError:
            continue
    for length in (0, 1, 5, len(encoded[0]) - 1):
        with pytest.raises(DamagedError):
            decode(pack, sample, [encoded[0][:length], *encoded[1:]], threads=2)


@pytest.mark.parametrize(("column", "value"), [(0, 2**29 + 1), (1, -(2**28) - 1), (2, 32), (3, 21), (4, 17)])
def test_a_pack_with_numbers_out_of_range_is_refused(pack: Pack, column: int, value: int) -> None:
    tensors = {name: tensor.copy() for name, tensor in pack.tensors.items()}
    tensors["layer.1.channels"][0, column] = value
    with pytest.raises(DamagedError, match="channels are out of range"):
        make_pack(pack.facts, tensors)


@pytest.mark.parametrize(
    ("name", "at", "value", "what"),
    [
        ("energy", 7, -32768, "energy"),
        ("layer.1.channels", (0, 3), -(2**31), "channels"),
        ("layer.1.weights", (0, -1), 1, "weights"),
        ("layer.1.origin", 0, 1025, "origin"),
        ("layer.1.classes", (0, 0, 0), 145, "classes"),
        ("layer.1.repeats", (0, 0, 0), 1, "repeats"),
        ("layer.1.pairs", (0, 0), 1, "pairs"),
        ("layer.1.pairs", (0, 2), DIM // 2 + 1, "pairs"),
        ("distributions", (0, slice(3, 6)), (2**31 - 1, -(2**31), -1), "distributions"),
    ],
)
def test_a_pack_that_could_lead_arithmetic_astray_is_refused(
    pack: Pack, name: str, at: object, value: object, what: str
) -> None:
    tensors = {each: tensor.copy() for each, tensor in pack.tensors.items()}
    tensors[name][at] = value  # type: ignore[index]
    with pytest.raises(DamagedError, match=f"{what} are out of range"):
        make_pack(pack.facts, tensors)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_pack_is_accepted_loses_nothing(pack: Pack, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbuy.codec.dense.encode_tensors", never_smaller)  # also where `fast` would be the better one
    random = np.random.default_rng(seed)
    tensors = {name: tensor.copy() for name, tensor in pack.tensors.items()}

    def fill(name: str, low: int, high: int) -> None:
        tensor = tensors[name]
        tensor[:] = random.choice([low, high, *random.integers(low, high, 20, endpoint=True)], tensor.shape)

    fill("known", 0, 255)
    fill("energy", -64, 64)
    fill("rotation.coarse", -(2**31), 2**31 - 1)
    fill("rotation.fine", -(2**31), 2**31 - 1)
    tensors["distributions"][:, 1:-1] = np.sort(random.integers(0, TAIL, (2, 1023), endpoint=True), axis=1)
    for layer in range(LAYERS):
        fill(f"layer.{layer}.origin", -1024 if seed % 2 else 0, 1024 if seed % 2 else 200)
        fill(f"layer.{layer}.classes", 0, 144)
        fill(f"layer.{layer}.repeats", -64, 64)
        tensors[f"layer.{layer}.repeats"][:, 0] = 0
        for column, (low, high) in enumerate([(-(2**29), 2**29), (-(2**28), 2**28), (0, 31), (-20, 20), (0, 16)]):
            tensors[f"layer.{layer}.channels"][:, column] = random.integers(low, high, HEADS * DIM * 2, endpoint=True)
    odd, _ = make_pack(pack.facts, tensors)
    sample = make_sample(400, pack.facts.dtype, seed=11)
    assert same(decode(odd, sample, encode(odd, sample)), sample)
