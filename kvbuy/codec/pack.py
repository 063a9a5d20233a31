"""Packs: what `dense` knows of a model. Fitted once, named by digest, shared by all artifacts of that model.

A pack is a safetensors file of integers. Its metadata holds one key, `kvbuy_pack`: canonical JSON of `PackFacts`. For
each full-attention layer N, with C channels in coding order (pairs of channels, keys first):

    layer.N.pairs     I32 [C/2, 3]      the two channels of a pair, keys [heads, dim] first, then values; their row of
                                        the rotation, one past the last where they do not turn
    layer.N.weights   I8  [C, F + C]    what features say: F of the layers below, nearest first, then the layer's own
                                        (zero from the pair itself on)
    layer.N.channels  I32 [C, 5]        mean and offset in fixed point; feature, weight and memory shift
    layer.N.origin    I16 [C/2]         the exponent field at which a pair's fixed point stands
    layer.N.classes   U8  [C/2, 2, 64]  the expected scale by squared cosine
    layer.N.repeats   I16 [2, 7, 2]     for keys and values, by a repeat's order: gain in 64ths, change of class

and for all of them: `known` U8 [C/2, 2, 64], the scale at which a token repeats itself in a first layer that depends
on the token alone; `distributions` I32 [2, 1025] for keys and values; `energy` I16 [512], the change of class by a
token's energy; `rotation.coarse` I32 [rows, frequencies, 2] and `rotation.fine` I32 [64, frequencies, 2], cosines and
sines over 2**30 of the angles of 64 r and r tokens. Scales are classes of `kvbuy.codec.column`, the nearest where there
is none. `kvbuy.codec.walk` and `kvbuy.codec.column` say what is done with them.

A pack decides how an artifact is decoded, not what is accepted: that is the block digest's work. Its shapes and ranges
are checked when it is opened, so that numbers stay within 32 bits and feature sums below 2**24.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kvbuy.errors import DamagedError, PackError, StoreError, UsageError
from kvbuy.parts import Digest, FloatType, Label, Part
from kvbuy.places import PACK_SUFFIX, pack_folder, pack_path
from kvbuy.whole import write_whole

KEY = "kvbuy_pack"
TAIL = 65536 - 128
LONGEST = 2048 * 64  # tokens that the rotation reaches
LARGEST_HEADER = 100_000_000  # safetensors' own limit
NO_PACK = "this is no kvbuy pack"

Tensor = npt.NDArray[Any]


class PackLayer(Part):
    """The shape of a full-attention layer."""

    heads: Annotated[int, Field(ge=1, lt=2**16)]
    key_dim: Annotated[int, Field(ge=1, lt=2**16)]
    value_dim: Annotated[int, Field(ge=1, lt=2**16)]

    @property
    def channels(self) -> int:
        """Numbers a token has in the layer."""
        return self.heads * (self.key_dim + self.value_dim)


class PackFacts(Part):
    """What a pack says of itself. `depth`: how many layers below predict one; `alone`: the first sees no context."""

    format: Literal["kvbuy pack"]
    version: Literal[1]
    producer: Label
    model: Label
    fingerprint: Digest
    dtype: FloatType
    layers: Annotated[tuple[PackLayer, ...], Field(min_length=1, max_length=10_000)]
    depth: Annotated[int, Field(ge=0, le=16)]
    frequencies: Annotated[int, Field(ge=0, lt=2**16)]
    alone: bool
    tokens: Annotated[int, Field(ge=1, lt=2**48)]


@dataclass(frozen=True)
class Pack:
    """An opened pack."""

    facts: PackFacts
    tensors: Mapping[str, Tensor]
    digest: str
    size: int

    def layer(self, index: int, name: str) -> Tensor:
        """A layer's tensor."""
        return self.tensors[f"layer.{index}.{name}"]


def find_pack(digest: str) -> Pack:
    """The pack with a digest, from the store.

    Raises:
        StoreError: it cannot be read.
        DamagedError: it is not what its name says.
    """
    pack, _ = read_pack(pack_path(digest))
    return pack


def find_pack_for(fingerprint: str) -> str | None:
    """The digest of the newest pack in the store that belongs to a fingerprint (its SHA-256), if there is one."""
    for listed in list_packs():
        if listed.facts.fingerprint == fingerprint:
            return listed.digest
    return None


@dataclass(frozen=True)
class Listed:
    """A pack in the store, by what its header says."""

    path: Path
    facts: PackFacts

    @property
    def digest(self) -> str:
        """The digest that its name says."""
        return self.path.name.removesuffix(PACK_SUFFIX)


def list_packs() -> list[Listed]:
    """The packs in the store, newest first. Only headers are read; what has none is no pack, and is left out."""
    packs = []
    for path in pack_folder().glob(f"*{PACK_SUFFIX}"):
        if re.fullmatch("[0-9a-f]{64}", path.name.removesuffix(PACK_SUFFIX)):
            with suppress(DamagedError, OSError):
                packs.append((path.stat().st_mtime_ns, Listed(path, _read_facts(path))))
    return [listed for _, listed in sorted(packs, key=lambda pack: pack[0], reverse=True)]


def make_pack(facts: PackFacts, tensors: Mapping[str, Tensor]) -> tuple[Pack, bytes]:
    """A pack and its file's bytes."""
    raw = save(dict(tensors), metadata={KEY: facts.canonical().decode()})
    return parse_pack(raw), raw


def choose_pack(digest: str | None) -> Listed:
    """The pack in the store whose digest is or begins so, the newest where none is named.

    Raises:
        PackError: there is none.
        UsageError: the beginning fits several.
    """
    packs = list_packs()
    if not packs:
        raise PackError("there are no packs here", hint="make one: kvbuy pack fit")
    names = select_packs([one.path.name for one in packs], digest, where="the store")
    if digest is not None and len(names) > 1:
        raise UsageError(f"{digest} begins the digests of {len(names)} packs", hint="give more of it")
    return next(one for one in packs if one.path.name == names[0])


def select_packs(names: Sequence[str], digest: str | None, *, where: str) -> list[str]:
    """Of files' names, those of packs, whose digest is or begins so where one is named (PackError: none is)."""
    packs = [name for name in names if re.fullmatch(rf"[0-9a-f]{{64}}{re.escape(PACK_SUFFIX)}", name)]
    found = [name for name in packs if name.startswith(digest or "")]
    if not found:
        raise PackError(f"there is no pack {digest or ''} in {where}", hint=f"it has {len(packs)} packs")
    return found


def add_pack(pack: Pack, raw: bytes) -> Path:
    """Put a pack into the store; `raw` are its file's bytes. Returns where it lies.

    Raises:
        StoreError: it cannot be written; nothing is left behind.
    """
    path = pack_path(pack.digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    with write_whole(path) as file:
        file.write(raw)
    return path


def read_pack(path: Path) -> tuple[Pack, bytes]:
    """A pack and its file's bytes (StoreError where they cannot be read, DamagedError where they are no pack's)."""
    try:
        raw = path.read_bytes()
        pack = parse_pack(raw)
    except OSError as error:
        hint = "kvbuy pack add takes the file NAME.pack.safetensors that the publisher gave you"
        raise StoreError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except DamagedError as error:
        raise DamagedError(
            f"{path.name}: {error.message}", hint="get it again; is it NAME.pack.safetensors?"
        ) from error
    if re.fullmatch("[0-9a-f]{64}", name := path.name.removesuffix(PACK_SUFFIX)) and name != pack.digest:
        raise DamagedError(f"{path.name} is not the pack that its name says", hint="get it again: kvbuy pack add FILE")
    return pack, raw


def parse_pack(raw: bytes) -> Pack:
    """Parse a pack strictly.

    Raises:
        DamagedError: it breaks the layout above, or a number is out of its range.
    """
    header = int.from_bytes(raw[:8], "little")
    facts = _parse_facts(raw[8 : 8 + header])
    try:
        tensors = load(raw)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # numpy has not every dtype
        raise DamagedError(f"{NO_PACK}: {str(error)[:200]}") from error
    pack = Pack(facts=facts, tensors=tensors, digest=hashlib.sha256(raw).hexdigest(), size=len(raw))
    _check(pack)
    return pack


def _read_facts(path: Path) -> PackFacts:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        return _parse_facts(file.read(min(header, LARGEST_HEADER)))


def _parse_facts(header: bytes) -> PackFacts:
    try:
        metadata = json.loads(header)["__metadata__"]
        facts = PackFacts.model_validate_json(metadata[KEY])
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{NO_PACK}: {str(error).splitlines()[0][:200]}") from error
    if metadata != {KEY: facts.canonical().decode()}:
        raise DamagedError(f"{NO_PACK}: its metadata is not canonical, or holds something else")
    return facts


def _check(pack: Pack) -> None:
    facts, tensors = pack.facts, pack.tensors
    numbers = [layer.heads * dim for layer in facts.layers for dim in (layer.key_dim, layer.value_dim)]
    _demand(not any(count % 2 for count in numbers), "shapes")
    pairs = facts.layers[0].channels // 2
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "known": (np.uint8, (pairs, 2, 64)),
        "distributions": (np.int32, (2, 1025)),
        "energy": (np.int16, (512,)),
        "rotation.coarse": (np.int32, (LONGEST // 64, facts.frequencies, 2)),
        "rotation.fine": (np.int32, (64, facts.frequencies, 2)),
    }
    for index, layer in enumerate(facts.layers):
        count = layer.channels
        below = sum(lower.channels for lower in facts.layers[max(0, index - facts.depth) : index])
        wanted |= {
            f"layer.{index}.pairs": (np.int32, (count // 2, 3)),
            f"layer.{index}.weights": (np.int8, (count, below + count)),
            f"layer.{index}.channels": (np.int32, (count, 5)),
            f"layer.{index}.origin": (np.int16, (count // 2,)),
            f"layer.{index}.classes": (np.uint8, (count // 2, 2, 64)),
            f"layer.{index}.repeats": (np.int16, (2, 7, 2)),
        }
    found = {name: (tensor.dtype.type, tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise DamagedError(f"the pack's tensor {odd[0][:80]!r} is missing, unknown or has another shape")
    steps = np.diff(tensors["distributions"].astype(np.int64), axis=1)
    _demand((steps >= 0).all() and (tensors["distributions"][:, [0, -1]] == (0, TAIL)).all(), "distributions")
    _demand((np.abs(tensors["energy"].astype(np.int64)) <= 64).all(), "energy")
    for index in range(len(facts.layers)):
        _check_layer(pack, index)


def _check_layer(pack: Pack, index: int) -> None:
    facts = pack.facts
    pairs, weights, channels = (pack.layer(index, name) for name in ("pairs", "weights", "channels"))
    count = facts.layers[index].channels
    _demand((np.sort(pairs[:, :2].ravel()) == np.arange(count)).all(), "pairs")
    _demand(((pairs[:, 2] >= 0) & (pairs[:, 2] <= facts.frequencies)).all(), "pairs")
    _demand((np.abs(weights.astype(np.int32)).sum(axis=1) * 127 < 2**24).all(), "weights")
    chain = weights[:, -count:].reshape(count // 2, 2, count // 2, 2)
    later = np.triu(np.ones((count // 2, count // 2), bool))
    _demand(not chain.transpose(0, 2, 1, 3)[later].any(), "weights")
    _demand(((channels[:, 2] >= 0) & (channels[:, 2] <= 31)).all(), "channels")
    _demand((np.abs(channels[:, 3].astype(np.int64)) <= 20).all(), "channels")
    _demand(((channels[:, 4] >= 0) & (channels[:, 4] <= 16)).all(), "channels")
    _demand((np.abs(channels[:, :2].astype(np.int64)) <= (2**29, 2**28)).all(), "channels")
    _demand((np.abs(pack.layer(index, "origin").astype(np.int32)) <= 1024).all(), "origin")
    _demand((pack.layer(index, "classes") <= 144).all(), "classes")
    repeats = pack.layer(index, "repeats").astype(np.int32)
    _demand((np.abs(repeats) <= 64).all() and not repeats[:, 0].any(), "repeats")


def _demand(holds: Any, what: str) -> None:
    if not holds:
        raise DamagedError(f"the pack's {what} are out of range")
