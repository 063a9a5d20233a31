"""The command line of trust: `kvbuy sign`, `audit`, `push`, `pull`, and the group `keys`, a short recipe each."""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbuy.options import (
    AdapterOption,
    ArtifactArgument,
    DeviceOption,
    ForceOption,
    JsonOption,
    ModelOption,
    RequireOption,
)

if TYPE_CHECKING:
    from kvbuy.pull import Pulled
    from kvbuy.sign import Signer

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="How its id begins.")]
RepoArgument = Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME[@REVISION][/ARTIFACT] on the Hub.")]

BlockSeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Chooses them. [default: at random]")
]
CalibrateOption = Annotated[
    bool, typer.Option("--calibrate", help="This one, of another profile, is honest: measure how far it is off.")
]
AuditForceOption = Annotated[
    bool, typer.Option("--force", help="Replace the evidence; calibrate on what nobody signed whom you trust.")
]
EvidenceOption = Annotated[
    Path | None, typer.Option("--out", help="Evidence file. [default: ARTIFACT.audit-SEED.json]")
]

keys_app = typer.Typer(help="Keys: who may sign, and whom you trust.", no_args_is_help=True, rich_markup_mode=None)


def sign(
    artifact: ArtifactArgument = None,
    key: Annotated[str | None, typer.Option("--key", help="Id or owner. [default: your newest]")] = None,
    openssf: Annotated[
        Path | None, typer.Option("--openssf", help="Write an OpenSSF bundle with this PEM key instead.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Sign an artifact: its manifest, which holds every digest.

    The signatures lie beside it, in NAME.kv.sig.json. Example: kvbuy sign
    """
    from kvbuy import render
    from kvbuy.artifact import Artifact
    from kvbuy.keys import KeyRing
    from kvbuy.places import find_artifact
    from kvbuy.reader import check_contents
    from kvbuy.sign import sign_artifact

    opened = Artifact.open(find_artifact(artifact))
    if openssf is not None:
        from kvbuy.openssf import sign_openssf

        check_contents(opened)
        bundle = sign_openssf(opened.path, openssf)
        render.print_json({"bundle": str(bundle), "artifact": opened.id}) if json else print(bundle)
        return
    own = KeyRing.here().choose(key)
    check_contents(opened)
    path = sign_artifact(opened, own)
    if json:
        render.print_json({"signatures": str(path), "artifact": opened.id, "key": own.key.id, "owner": own.key.owner})
    else:
        render.say(f"{opened.path.name}, signed with {own.key.id[:12]} ({own.key.owner})")
        print(path)


def audit(
    artifact: ArtifactArgument = None,
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="How many to compute again.")] = 1,
    seed: BlockSeedOption = None,
    replay: Annotated[Path | None, typer.Option("--replay", help="Run this evidence again.")] = None,
    calibrate: CalibrateOption = False,
    force: AuditForceOption = False,
    out: EvidenceOption = None,
    require_signature: RequireOption = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Compute a few blocks again: is it really that document's KV?

    Exit 3 unless it is. Example: kvbuy audit --blocks 2
    """
    from kvbuy import render, render_trust
    from kvbuy.artifact import Artifact, refuse_unwritable
    from kvbuy.evidence import read_evidence, refuse_foreign_evidence, write_evidence
    from kvbuy.keys import KeyRing
    from kvbuy.places import find_artifact
    from kvbuy.sign import find_signers
    from kvbuy.sign import require_signature as require

    opened = Artifact.open(find_artifact(artifact))
    signers = find_signers(opened, KeyRing.here())
    if require_signature or (calibrate and not force):
        require(opened.path.name, signers)
    if signers:
        render.say(render_trust.signer_words(signers))
    given = None if replay is None else read_evidence(replay)
    if given is not None:
        refuse_foreign_evidence(given, opened)
    chosen = given.seed if given else secrets.randbits(62) if seed is None else seed  # nobody knew it before
    where = out or (None if given else opened.path.with_name(f"{opened.path.name}.audit-{chosen}.json"))
    if where is not None and not calibrate:
        refuse_unwritable(where, force=force)

    from kvbuy.audit import audit
    from kvbuy.audit import calibrate as measure_envelope
    from kvbuy.models import find_model_for

    loaded = find_model_for(opened.manifest, model, adapter=adapter, say=render.say).load(device)
    with render.token_progress("blocks") as progress:
        if calibrate:
            envelope, path = measure_envelope(opened, loaded, force=force, progress=progress)
            render_trust.show_envelope(envelope, path, as_json=json)
            return
        count = blocks if given is None else len(given.blocks)
        found = audit(opened, loaded, blocks=count, seed=chosen, progress=progress)
    if where is not None:
        write_evidence(where, found)
    raise typer.Exit(render_trust.show_evidence(found, given, where, as_json=json))


def push(
    artifact: Annotated[Path, typer.Argument(help="What to publish.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME on the Hub; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    gated: Annotated[bool, typer.Option("--gated", help="Who downloads it accepts terms first.")] = False,
    license: Annotated[str | None, typer.Option("--license", help="The document's, as the Hub knows it.")] = None,
    model_license: Annotated[str | None, typer.Option("--model-license", help="The model's.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", help="Its Hub id. [default: the label]")] = None,
    json: JsonOption = False,
) -> None:
    """Publish an artifact on the Hub, card and signatures too.

    Whoever has it can read the document. Example: kvbuy push doc.kv.safetensors me/my-documents
    """
    from kvbuy import render
    from kvbuy.artifact import Artifact
    from kvbuy.errors import UsageError
    from kvbuy.hub import parse_address
    from kvbuy.publish import Terms, push_artifact

    address = parse_address(repo)
    if address.revision or address.name:
        raise UsageError(f"{repo} names more than a repository", hint=f"kvbuy push {artifact} {address.repo}")
    terms = Terms(
        private=private,
        gated=gated,
        document_license=license,
        model_license=model_license,
        base_model=base_model,
    )
    pushed = push_artifact(Artifact.open(artifact), address.repo, terms)
    if json:
        render.print_json({"url": pushed.url, "files": list(pushed.files), "signed": pushed.signed})
    else:
        print(pushed.url)


def pull(
    repo: RepoArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder.")] = Path(),
    blocks: Annotated[str | None, typer.Option("--blocks", help="Only these, as FROM:TO, into a .part file.")] = None,
    require_signature: RequireOption = False,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Fetch artifacts from the Hub, every block checked.

    Example: kvbuy pull someone/their-documents
    """
    from kvbuy import render, render_trust
    from kvbuy.artifact import Artifact
    from kvbuy.errors import UsageError
    from kvbuy.hub import parse_address
    from kvbuy.keys import KeyRing
    from kvbuy.places import make_folder
    from kvbuy.pull import find_remote, parse_blocks, pull_artifact, pull_blocks
    from kvbuy.sign import find_signers

    wanted = parse_blocks(blocks)
    if wanted is not None and require_signature:
        raise UsageError("a part has no signature yet", hint="leave out --blocks, or --require-signature")
    pinned, names = find_remote(parse_address(repo))
    make_folder(out)
    found: list[tuple[Pulled, tuple[Signer, ...]]] = []
    with render.token_progress("blocks") as progress:
        for name in names:
            if wanted is not None:
                found.append((pull_blocks(pinned, name, out / name, wanted, progress=progress), ()))
                continue
            ring = KeyRing.here() if require_signature else None
            pulled = pull_artifact(pinned, name, out / name, force=force, ring=ring)
            found.append((pulled, find_signers(Artifact.open(pulled.path), KeyRing.here())))
    render_trust.show_pulled(found, as_json=json)


@keys_app.command("new")
def new_key(
    owner: Annotated[str, typer.Option("--owner", help="Who you are, to others.")],
    days: Annotated[int, typer.Option("--days", min=1, max=36500, help="Until it expires.")] = 730,
    rotate: Annotated[str | None, typer.Option("--rotate", help="Your key whose place it takes.")] = None,
    json: JsonOption = False,
) -> None:
    """Make a key to sign with.

    Example: kvbuy keys new --owner "Ann, ann@example.org"
    """
    from kvbuy import render, render_trust
    from kvbuy.keys import KeyRing

    ring = KeyRing.here()
    if rotate is None and (before := [own.key.id[:12] for own in ring.own() if own.key.owner == owner]):
        render.say(f"note: {owner} has {', '.join(before)} already; --rotate makes a successor")
    made = ring.make(owner, days=days, rotate=None if rotate is None else ring.choose(rotate))
    render_trust.show_keys(ring, [made.key], as_json=json)


@keys_app.command("ls")
def list_keys(json: JsonOption = False) -> None:
    """Show your keys and those that you trust."""
    from kvbuy import render_trust
    from kvbuy.keys import KeyRing

    ring = KeyRing.here()
    render_trust.show_keys(ring, ring.known(), as_json=json)


@keys_app.command("export")
def export_key(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Id or owner. [default: your newest]")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="[default: KEY.key.json]")] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write the public half of a key of yours, for those who should trust it."""
    from kvbuy import render
    from kvbuy.keys import KeyRing, write_record

    own = KeyRing.here().choose(key)
    path = out or Path(f"{own.key.id[:12]}.key.json")
    write_record(own.key, path, force=force)
    render.print_json({"key": own.key.id, "file": str(path)}) if json else print(path)


@keys_app.command("trust")
def trust_key(
    file: Annotated[Path, typer.Argument(help="A key's public half, or a revocation.")], json: JsonOption = False
) -> None:
    """Trust a key, or believe a key's revocation.

    Compare the id with what its owner tells you elsewhere.
    """
    from kvbuy import render_trust
    from kvbuy.keys import KeyRing, read_record

    ring = KeyRing.here()
    render_trust.show_keys(ring, [ring.accept(read_record(file))], as_json=json)


@keys_app.command("distrust")
def distrust_key(key: KeyArgument, json: JsonOption = False) -> None:
    """Trust a key no more."""
    from kvbuy import render_trust
    from kvbuy.keys import KeyRing

    ring = KeyRing.here()
    render_trust.show_keys(ring, [ring.distrust(key)], as_json=json)


@keys_app.command("revoke")
def revoke_key(
    key: KeyArgument,
    reason: Annotated[str, typer.Option("--reason", help="For those who trusted it.")],
    out: Annotated[Path | None, typer.Option("--out", help="[default: KEY.revoked.json]")] = None,
    json: JsonOption = False,
) -> None:
    """Revoke a key of yours, for good; hand out the file that this writes."""
    from kvbuy import render
    from kvbuy.keys import KeyRing, write_record

    ring = KeyRing.here()
    own = ring.own_by_id(key)
    record = ring.revoke(own, reason)
    path = out or Path(f"{own.key.id[:12]}.revoked.json")
    write_record(record, path, force=True)
    render.print_json({"key": own.key.id, "file": str(path)}) if json else print(path)
