"""The command line of packs: `kvbuy pack fit`, `add`, `push`, `pull`, `ls`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbuy.options import AdapterOption, DeviceOption, DtypeOption, JsonOption

if TYPE_CHECKING:
    from kvbuy.models import Model

PackOption = Annotated[str | None, typer.Option("--pack", help="The digest, or how it begins.")]

app = typer.Typer(help="Packs: what the codec dense knows of a model.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def fit(
    model: Annotated[
        str | None, typer.Option("--model", help="Hub id or local folder. [default: as for precompute]")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="UTF-8 file to fit to; may be repeated. [default: docstrings]")
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Fit a model's pack, once for all its documents.

    The model runs over the texts, or over 65536 tokens of the default one. Example: kvbuy pack fit
    """
    from kvbuy import render, render_pack
    from kvbuy.codec.load import refuse_without_numba
    from kvbuy.document import read_document

    refuse_without_numba()
    texts = [read_document(name) for name in text or ()]

    from kvbuy.calibrate import fit_pack
    from kvbuy.models import load_model

    loaded = load_model(model, adapter=adapter, device=device, dtype=dtype, say=render.say)
    with render.token_progress() as progress:
        fitted = fit_pack(loaded, texts, progress=progress)
    if json:
        render.print_json(render_pack.fitted_json(fitted))
    else:
        render.print_table(render_pack.fitted_table(fitted))


@app.command()
def add(
    file: Annotated[Path, typer.Argument(help="A pack, as its publisher gives it.")], json: JsonOption = False
) -> None:
    """Put a pack's file into the store, under its digest."""
    from kvbuy import render
    from kvbuy.codec.pack import add_pack, read_pack

    path = add_pack(*read_pack(file))
    if json:
        render.print_json({"path": str(path)})
    else:
        print(path)


@app.command()
def push(
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: USER/NAME.")],
    pack: PackOption = None,
    json: JsonOption = False,
) -> None:
    """Upload a pack to the Hub, beside the artifacts that need it.

    The newest, if none is named. Example: kvbuy pack push me/my-packs
    """
    from kvbuy import render
    from kvbuy.codec.pack import choose_pack
    from kvbuy.hub import push_file

    chosen = choose_pack(pack)
    commit = push_file(chosen.path, repo)
    if json:
        render.print_json({"digest": chosen.digest, "repo": repo, "commit": commit})
    else:
        print(commit)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: USER/NAME.")],
    pack: PackOption = None,
    json: JsonOption = False,
) -> None:
    """Get packs from the Hub into the store.

    All of the repository's packs, if none is named. Example: kvbuy pack pull me/my-packs
    """
    from kvbuy import render
    from kvbuy.codec.pack import add_pack, read_pack, select_packs
    from kvbuy.hub import list_files, pull_file

    paths = [add_pack(*read_pack(pull_file(repo, name))) for name in select_packs(list_files(repo), pack, where=repo)]
    if json:
        render.print_json({"paths": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)


@app.command()
def ls(json: JsonOption = False) -> None:
    """Show the packs in the store, newest first."""
    from kvbuy import render, render_pack
    from kvbuy.codec.pack import list_packs

    packs = list_packs()
    if not packs and not json:
        render.say("there are no packs here; make one: kvbuy pack fit")
    if json:
        render.print_json({"packs": [render_pack.listed_json(one) for one in packs]})
    elif packs:
        render.print_table(render_pack.listed_table(packs))


def offer_pack(model: "Model") -> None:
    """Where a model has no pack and somebody is there to ask, offer to fit one before a document is encoded."""
    from kvbuy import render
    from kvbuy.codec.load import refuse_without_numba
    from kvbuy.codec.pack import find_pack_for

    refuse_without_numba()
    if find_pack_for(model.fingerprint.sha256()) is not None or not somebody_is_there():
        return
    if typer.confirm(f"dense needs a pack for {model.label.name}; there is none. Fit one now?", err=True):
        from kvbuy.calibrate import fit_pack

        with render.token_progress() as progress:
            fit_pack(model, progress=progress)


def somebody_is_there() -> bool:
    """Whether a question would be read and answered."""
    return sys.stdin is not None and sys.stdin.isatty()
