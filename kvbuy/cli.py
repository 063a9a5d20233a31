"""The command line: a short recipe a verb. Errors, exit codes and JSON meet in `main`, the one place that catches."""

import io
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbuy.cli_pack import app as pack_app
from kvbuy.cli_pack import offer_pack
from kvbuy.cli_store import app as store_app
from kvbuy.cli_trust import audit, keys_app, pull, push, sign
from kvbuy.cli_worth import bench, cost, measure, report
from kvbuy.options import (
    AdapterOption,
    ArtifactArgument,
    BlockSizeOption,
    CodecChoice,
    CodecOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    KvOption,
    ModelOption,
    RequireOption,
    ReuseMode,
    ReuseOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TokensOption,
    TopPOption,
)

if TYPE_CHECKING:
    from kvbuy.artifact import Artifact
    from kvbuy.reuse import Conversation
    from kvbuy.sign import Signer

app = typer.Typer(
    help="A document's KV cache, computed once, verified, and loaded instead of prefilled.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from kvbuy import __version__

        print(f"kvbuy {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A document's KV cache, computed once, verified, and loaded instead of prefilled."""


@app.command()
def precompute(
    documents: Annotated[list[str], typer.Argument(metavar="DOC...", help="UTF-8 text files, or - for stdin.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Hub id or local folder. [default: KVBUY_MODEL, else by machine]")
    ] = None,
    adapter: AdapterOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder, or NAME.kv.safetensors. [default: here]")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the document into the model's chat template.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    block_size: BlockSizeOption = 512,
    codec: CodecOption = CodecChoice.RAW,
    force: Annotated[bool, typer.Option("--force", help="Replace existing artifacts.")] = False,
    json: JsonOption = False,
) -> None:
    """Compute documents' KV, an artifact for each.

    Example: kvbuy precompute doc.txt
    """
    from kvbuy import render
    from kvbuy.artifact import refuse_unwritable
    from kvbuy.document import read_document
    from kvbuy.manifest import refuse_block_size
    from kvbuy.places import name_artifacts

    refuse_block_size(block_size)
    paths = name_artifacts(documents, out)
    for folder in {path.parent for path in paths if out and path != out}:
        folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        refuse_unwritable(path, force=force)
    texts = [read_document(document) for document in documents]

    from kvbuy.models import load_model
    from kvbuy.prefill import precompute

    loaded = load_model(model, adapter=adapter, device=device, dtype=dtype, say=render.say)
    if codec is CodecChoice.DENSE:
        offer_pack(loaded)
    made = []
    with render.token_progress() as progress:
        for document, text, path in zip(documents, texts, paths, strict=True):
            one = precompute(
                text,
                path,
                model=loaded,
                name="stdin" if document == "-" else Path(document).name,
                chat=chat,
                block_size=block_size,
                codec=codec.value,
                force=force,
                progress=partial(progress, path.name),
            )
            made.append(one)
    if json:
        render.print_json({"artifacts": [render.precomputed_json(one) for one in made]})
    else:
        render.print_table(render.precomputed_table(made))


@app.command()
def convert(
    artifact: ArtifactArgument = None,
    codec: CodecOption = CodecChoice.FAST,
    out: Annotated[Path | None, typer.Option("--out", help="[default: NAME.CODEC.kv.safetensors beside it]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    json: JsonOption = False,
) -> None:
    """Write an artifact in another codec, bit for bit the same.

    Example: kvbuy convert doc.kv.safetensors --codec fast
    """
    from kvbuy import render
    from kvbuy.places import find_artifact, refuse_name
    from kvbuy.recode import convert

    if out is not None:
        refuse_name(out)
    path = find_artifact(artifact)
    if artifact is None and not json:
        render.say(f"artifact: {path}")
    converted = convert(path, out, codec=codec.value, force=force)
    if json:
        render.print_json(render.converted_json(converted))
    else:
        render.print_table(render.converted_table(converted))


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Option("--prompt", "-p", help="Question; - for stdin; may be repeated.")],
    kv: KvOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    reuse: ReuseOption = ReuseMode.CONTINUE,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    require_signature: RequireOption = False,
    json: JsonOption = False,
) -> None:
    """Answer prompts without prefilling the document.

    Example: kvbuy generate --kv doc.kv.safetensors --prompt "What does it say?"
    """
    from kvbuy import render
    from kvbuy.document import read_prompt
    from kvbuy.render_trust import signer_json

    texts = [read_prompt(prompt) for prompt in prompts]
    artifact, signers = _choose(kv, require_signature, quiet=json)
    conversation = _open(artifact, model, adapter, device, reuse, room=max_new_tokens, quiet=json)

    from kvbuy.decode import Sampling

    answers = []
    for at, text in enumerate(texts):
        if at:
            conversation.forget()
        if len(texts) > 1 and not json:
            render.say(f"> {text}")
        answer = conversation.ask(
            text,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            stop=stop or (),
            on_text=(lambda _: None) if json else render.stream,
        )
        answers.append(answer)
        if not json:
            render.stream("\n")
            render.say(render.generation_line(answer))
    if json:
        objects = [{"prompt": text} | render.generation_json(one) for text, one in zip(texts, answers, strict=True)]
        signed = {"signatures": signer_json(signers)}
        render.print_json((objects[0] if len(objects) == 1 else {"answers": objects}) | signed)


@app.command()
def chat(
    kv: KvOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    reuse: ReuseOption = ReuseMode.CONTINUE,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    require_signature: RequireOption = False,
) -> None:
    """Ask follow-up questions over one load.

    /forget starts over, Ctrl-D ends.
    """
    from kvbuy import render
    from kvbuy.errors import DocumentError

    artifact, _ = _choose(kv, require_signature)
    conversation = _open(artifact, model, adapter, device, reuse, room=max_new_tokens)

    from kvbuy.decode import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    render.say("ask; /forget starts over, Ctrl-D ends")
    while (question := render.ask()) is not None:
        if question == "/forget":
            conversation.forget()
        elif question.strip():
            try:
                answer = conversation.ask(
                    question, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or (), on_text=render.stream
                )
            except DocumentError as error:  # a question too long must not end the conversation
                render.print_error(error, as_json=False)
                continue
            render.stream("\n")
            render.say(render.generation_line(answer))


@app.command()
def verify(
    artifact: ArtifactArgument = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="[default: the receipt's]")] = None,
    max_new_tokens: TokensOption = 24,
    quick: Annotated[bool, typer.Option("--quick", help="Intact, fits and the receipt; no prefill.")] = False,
    allow_inexact: Annotated[bool, typer.Option("--allow-inexact", help="Exit 0 for the verdict inexact.")] = False,
    require_signature: RequireOption = False,
    openssf: Annotated[
        Path | None, typer.Option("--openssf", help="PEM key that its OpenSSF bundle must be of.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check that an artifact is intact, fits, is exact.

    A prefill from scratch runs in a fresh process; the drift from one single pass is measured. Example: kvbuy verify
    """
    from kvbuy import render
    from kvbuy.render_trust import signer_json

    opened, signers = _choose(artifact, require_signature, quiet=json)
    if openssf is not None:
        from kvbuy.openssf import verify_openssf

        verify_openssf(opened if isinstance(opened, Path) else opened.path, openssf)

    from kvbuy.replay import verify

    with render.token_progress() as progress:
        verdict = verify(
            opened,
            model=model,
            adapter=adapter,
            device=device,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            quick=quick,
            say=render.say,
            progress=progress,
        )
    if json:
        render.print_json(render.verdict_json(verdict) | {"signatures": signer_json(signers)})
    else:
        render.print_table(render.verdict_table(verdict))
    raise typer.Exit(0 if allow_inexact and verdict.name == "inexact" else verdict.exit_code)


def _choose(
    name: str | None, require_signature: bool, *, quiet: bool = False
) -> "tuple[Artifact | Path, tuple[Signer, ...]]":
    """An artifact (its path, where that is none), and who signed it."""
    from kvbuy import render
    from kvbuy.places import find_artifact
    from kvbuy.render_trust import signer_words
    from kvbuy.sign import check_signers

    path = find_artifact(name)
    if name is None and not quiet:
        render.say(f"artifact: {path}")
    artifact, signers = check_signers(path, required=require_signature)
    if signers and not quiet:
        render.say(signer_words(signers))
    return artifact or path, signers


def _open(
    chosen: "Artifact | Path",
    model: str | None,
    adapter: str | None,
    device: str | None,
    reuse: ReuseMode,
    *,
    room: int,
    quiet: bool = False,
) -> "Conversation":
    """Load an artifact and its model for questions."""
    from kvbuy import render
    from kvbuy.artifact import Artifact
    from kvbuy.places import refuse_missing_pack

    artifact = Artifact.open(chosen) if isinstance(chosen, Path) else chosen
    refuse_missing_pack(artifact.manifest.codec)
    if reuse is ReuseMode.ALIGN and len(artifact.manifest.blocks) == 1 and not quiet:
        render.say("note: the document has no block before its last one; aligned reuse saves little or nothing")

    from kvbuy.models import find_model_for
    from kvbuy.reuse import ROOM, open_conversation

    found = find_model_for(artifact.manifest, model, adapter=adapter, say=render.say)
    return open_conversation(artifact, found, device=device, reuse=reuse.value, room=room + ROOM)


@app.command()
def inspect(artifact: ArtifactArgument = None, json: JsonOption = False) -> None:
    """Show what an artifact says about itself.

    Only its header is read and checked, not its bytes. Example: kvbuy inspect
    """
    from kvbuy import render
    from kvbuy.artifact import Artifact
    from kvbuy.places import find_artifact

    opened = Artifact.open(find_artifact(artifact))
    if json:
        render.print_json(render.inspect_json(opened))
    else:
        render.print_table(render.inspect_table(opened))


for _verb in (measure, bench, cost, report, sign, audit, push, pull):
    app.command()(_verb)
for _group, _name in ((keys_app, "keys"), (store_app, "store"), (pack_app, "pack")):
    app.add_typer(_group, name=_name)


def main() -> None:
    """Entry of the `kvbuy` command."""
    from kvbuy.errors import KvbuyError
    from kvbuy.render import print_error, say

    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding does not
    try:
        app()
    except KvbuyError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
