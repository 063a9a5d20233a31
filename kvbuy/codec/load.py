"""Making `dense` ready: the pack that an artifact or a model needs, found, checked, and put to work.

Free of numba until a coder is made, so that whoever lacks the extra is told so instead of failing on an import.
"""

from collections.abc import Sequence
from functools import lru_cache

from kvbuy.codec import Coder
from kvbuy.codec.pack import LONGEST, Pack, find_pack, find_pack_for
from kvbuy.errors import DamagedError, PackError, UsageError, refuse_without
from kvbuy.manifest import Fingerprint, FullLayer, Manifest
from kvbuy.places import refuse_missing_pack

keep_pack = lru_cache(maxsize=1)(find_pack)  # a pack is named by its digest: what was read once stays right


def plan_dense(fingerprint: Fingerprint, *, tokens: int) -> str:
    """The digest of the pack to encode a document with, for a model.

    Raises:
        UsageError: the extra `dense` is not installed, or the document is too long.
        PackError: the model has no pack here.
        DamagedError: its newest one is no good.
    """
    refuse_without_numba()
    if tokens > LONGEST:
        raise UsageError(f"dense codes documents of at most {LONGEST} tokens, not {tokens}", hint="use the codec fast")
    digest = find_pack_for(fingerprint.sha256())
    if digest is None:
        raise PackError(
            "dense needs a pack for this model and dtype, and there is none here",
            hint="get it: kvbuy pack pull USER/NAME; or fit one, once for all the model's documents: "
            "kvbuy pack fit --model MODEL (minutes); or take --codec fast",
        )
    return keep_pack(digest).digest


def open_dense(manifest: Manifest, tokens: Sequence[int], *, digest: str) -> Coder:
    """The coder of an artifact's blocks; `tokens` are the document's token ids.

    Raises:
        UsageError: the extra `dense` is not installed, or the document is too long for it.
        PackError: the pack is not here.
        DamagedError: the pack belongs to another model than the artifact.
    """
    refuse_missing_pack(manifest.codec)
    refuse_without_numba()
    from kvbuy.codec.dense import DenseCoder

    pack = keep_pack(digest)
    refuse_foreign(pack, manifest)
    return DenseCoder(pack, tokens, block_size=manifest.profile.block_size)


def refuse_foreign(pack: Pack, manifest: Manifest) -> None:
    """Raise DamagedError where an artifact's pack was made for another model or for layers of other shapes."""
    facts = pack.facts
    full = [layer for layer in manifest.layers if isinstance(layer, FullLayer)]
    wanted = [(layer.heads, layer.key_dim, layer.value_dim) for layer in full]
    shapes = [(layer.heads, layer.key_dim, layer.value_dim) for layer in facts.layers]
    same = (facts.fingerprint, facts.dtype) == (manifest.fingerprint.sha256(), manifest.fingerprint.dtype)
    if not same or shapes != wanted or (facts.alone and not isinstance(manifest.layers[0], FullLayer)):
        raise DamagedError(f"the pack {pack.digest[:12]}... belongs to another model than the artifact that names it")


def refuse_without_numba() -> None:
    """Raise UsageError where the extra `dense` is not installed."""
    refuse_without("numba", "threadpoolctl", what="the codec dense", extra="dense")
