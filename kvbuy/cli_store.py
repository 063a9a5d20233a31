"""The command line of the store: `kvbuy store put`, `get`, `ls`, `rm`, `gc`, `check`."""

from pathlib import Path
from typing import Annotated

import typer

from kvbuy.options import ArtifactArgument, ForceOption, JsonOption

NameArgument = Annotated[str, typer.Argument(help="Its name, or how its id begins.")]

app = typer.Typer(help="A folder that keeps equal blocks once.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def put(artifact: ArtifactArgument = None, json: JsonOption = False) -> None:
    """Keep an artifact, its blocks shared with those that begin as it does."""
    from kvbuy import render_store
    from kvbuy.artifact import Artifact
    from kvbuy.places import find_artifact
    from kvbuy.store import Store

    store = Store.here()
    render_store.show_entries(store, [store.put(Artifact.open(find_artifact(artifact)))], as_json=json)


@app.command()
def get(
    name: NameArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Folder, or NAME.kv.safetensors. [default: here]")] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write an artifact of the store as a file, every byte checked."""
    from kvbuy import render
    from kvbuy.places import refuse_name
    from kvbuy.store import Store

    store = Store.here()
    entry = store.find(name)
    path = Path(entry.name) if out is None else out / entry.name if out.is_dir() else out
    refuse_name(path)
    artifact = store.get(entry, path, force=force)
    if json:
        render.print_json({"artifact": str(artifact.path), "id": artifact.id})
    else:
        print(artifact.path)


@app.command("ls")
def list_entries(json: JsonOption = False) -> None:
    """Show what the store keeps."""
    from kvbuy import render_store
    from kvbuy.store import Store

    store = Store.here()
    render_store.show_entries(store, store.entries(), as_json=json)


@app.command("rm")
def remove(name: NameArgument, json: JsonOption = False) -> None:
    """Keep an artifact no more; kvbuy store gc frees its space."""
    from kvbuy import render
    from kvbuy.store import Store

    store = Store.here()
    found = store.find_id(name)
    store.remove(found)
    if json:
        render.print_json({"removed": found})
    else:
        print(f"{found} removed; its space is free after: kvbuy store gc")


@app.command("gc")
def collect(json: JsonOption = False) -> None:
    """Free the space of what no artifact needs any more."""
    from kvbuy import render_store
    from kvbuy.store import Store

    render_store.show_freed(Store.here().collect(), as_json=json)


@app.command()
def check(
    sample: Annotated[str, typer.Option("--sample", help="How much to read, such as 5%.")] = "100%",
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", min=0.0, help="Stop reading then.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Chooses the sample.")] = 0,
    json: JsonOption = False,
) -> None:
    """Look whether everything is there, and read it or a sample of it.

    Exit 3 where something is wrong.
    """
    from kvbuy import render_store
    from kvbuy.store import Store, parse_share

    found = Store.here().check(sample=parse_share(sample), max_seconds=max_seconds, seed=seed)
    render_store.show_checked(found, as_json=json)
    raise typer.Exit(0 if found.sound else 3)
