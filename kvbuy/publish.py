"""What an artifact's repository on the Hub holds: the artifact, its manifest, its signatures, a card that tells people.

    README.md               the card: what it is, how large, what exact means, how to use it
    config.json             what is here, for programs (and the file by which the Hub counts downloads)
    NAME.kv.safetensors     an artifact
    NAME.kv.json            its manifest, canonical: read without the artifact
    NAME.kv.sig.json        its signatures, where it has some

Torch-free. It knows what is said, not how it is sent (`kvbuy.hub`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbuy.artifact import SUFFIX, Artifact
from kvbuy.errors import DamagedError, StoreError
from kvbuy.hub import Pinned, card_metadata, card_text, download, make_repository, pin, publish
from kvbuy.keys import KeyRing
from kvbuy.manifest import Manifest, parse_manifest
from kvbuy.parts import canonical_json
from kvbuy.reader import check_contents
from kvbuy.sign import SIGNATURE_SUFFIX, find_signers, signature_path

MANIFEST_SUFFIX = ".kv.json"


@dataclass(frozen=True, slots=True)
class Terms:
    """Who may have it: a private repository, a gate, and the licences of the document and of the model (SPDX ids)."""

    private: bool = False
    gated: bool = False
    document_license: str | None = None
    model_license: str | None = None
    base_model: str | None = None


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was pushed, and the address of the commit that shows it."""

    url: str
    files: tuple[str, ...]
    signed: bool


def push_artifact(artifact: Artifact, repo: str, terms: Terms) -> Pushed:
    """Show an artifact to the world, beside those that the repository has already.

    Raises:
        DamagedError: it is not intact.
        PackError, UsageError: it cannot be decoded here, and so not be checked.
        StoreError: the Hub refuses or is out of reach; nothing is to be seen of it then.
    """
    check_contents(artifact)
    make_repository(repo, private=terms.private, gated=terms.gated)
    before = pin(repo)
    if before.offline:
        raise StoreError(f"{repo} cannot be reached", hint="pushing needs the Hub: check the connection")
    stem = artifact.path.name.removesuffix(SUFFIX)
    shown = read_manifests(before, besides=stem) | {stem: artifact.manifest}
    files: dict[str, bytes | Path] = {
        artifact.path.name: artifact.path,
        stem + MANIFEST_SUFFIX: artifact.manifest.canonical(),
        "config.json": canonical_json(describe(shown)),
        "README.md": write_card(repo, shown, terms, before=_card_facts(before)).encode(),
    }
    signatures = stem + SIGNATURE_SUFFIX
    signed = bool(find_signers(artifact, KeyRing.here()))  # a file that signs something else is left behind
    if signed:
        files[signatures] = signature_path(artifact.path)
    stale = () if signed or signatures not in before.files else (signatures,)
    url = publish(repo, files, message=f"Add {artifact.path.name}", parent=before.commit, stale=stale)
    return Pushed(url=url, files=tuple(files), signed=signed)


def read_manifests(pinned: Pinned, *, besides: str) -> dict[str, Manifest]:
    """The manifests of a repository's artifacts but one, by name; what is none is left out."""
    found = {}
    for name in pinned.files:
        stem = name.removesuffix(MANIFEST_SUFFIX)
        if stem not in (name, besides) and stem + SUFFIX in pinned.files:
            try:
                found[stem] = parse_manifest(download(pinned, name).read_bytes())
            except DamagedError:
                continue  # somebody's other file: it does not stop a new artifact
    return found


def describe(manifests: dict[str, Manifest]) -> dict[str, Any]:
    """config.json: a repository's artifacts."""
    artifacts = [
        {
            "name": name + SUFFIX,
            "id": manifest.sha256(),
            "model": manifest.model.name,
            "fingerprint": manifest.fingerprint.sha256(),
            "tokens": manifest.document.tokens,
            "codec": manifest.codec_name,
            "bytes": len(manifest.header()) + manifest.data_bytes(),
        }
        for name, manifest in sorted(manifests.items())
    ]
    return {"library_name": "kvbuy", "format": "kvbuy", "version": 1, "artifacts": artifacts}


def _card_facts(pinned: Pinned) -> dict[str, Any]:
    """What the card says that is there, so that a later push does not take it back."""
    return card_metadata(download(pinned, "README.md")) if "README.md" in pinned.files else {}


def write_card(repo: str, manifests: dict[str, Manifest], terms: Terms, *, before: Mapping[str, Any]) -> str:
    """README.md: the model card; what `terms` leave open stays as it was `before`."""
    first = next(iter(manifests.values()))
    base = terms.base_model or before.get("base_model") or (first.model.name if "/" in first.model.name else None)
    license = terms.document_license or before.get("license")
    model_license = terms.model_license or before.get("kvbuy_model_license")
    metadata: dict[str, Any] = {
        "library_name": "kvbuy",
        "tags": ["kvbuy", "kv-cache", "prefill"],
        "license": license or "other",
    }
    if model_license is not None:
        metadata["kvbuy_model_license"] = model_license
    if base is not None:
        metadata |= {"base_model": base, "base_model_relation": "adapter"}
    rows = "\n".join(_row(name, manifest) for name, manifest in sorted(manifests.items()))
    name = sorted(manifests)[0]
    stated = "not stated" if license in (None, "other") else license
    licences = f"The document: {stated}. The model: {model_license or 'its own'}."
    return card_text(metadata, CARD.format(repo=repo, rows=rows, name=name + SUFFIX, licences=licences))


def _row(name: str, manifest: Manifest) -> str:
    size = (len(manifest.header()) + manifest.data_bytes()) / 1e6
    facts = (
        name + SUFFIX,
        manifest.document.name,
        f"{manifest.document.tokens}",
        f"{size:.1f} MB, {manifest.codec_name}",
        f"{manifest.model.name}, {manifest.fingerprint.dtype}",
        manifest.fingerprint.sha256()[:12],
    )
    return "| " + " | ".join(fact.replace("|", "\\|").replace("<", "&lt;") for fact in facts) + " |"


CARD = """# {repo}

Documents' KV caches, computed once: whoever has the same model loads one and skips prefill, with [kvbuy](https://pypi.org/project/kvbuy).

    pip install kvbuy
    kvbuy generate --kv hf://{repo}/{name} --prompt "..."

| artifact | document | tokens | size | model | fingerprint |
|---|---|---|---|---|---|
{rows}

**Exact** means: a prefill from scratch in a fresh process gives the same bits of every block, and continuing gives the
same logits and tokens. `kvbuy verify` measures that, `kvbuy audit` checks a few blocks for less. Every block has a
digest; an artifact that does not fit the model's fingerprint is refused.

**An artifact discloses its document**: the text is inside, and KV can be inverted (arXiv 2508.09442).

{licences}
"""
