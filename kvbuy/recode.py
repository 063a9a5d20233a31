"""The same contents in another codec: block ids, digests and receipt stay, the file gets smaller, or raw again."""

import time
from dataclasses import dataclass
from pathlib import Path

from kvbuy.artifact import Artifact, refuse_unwritable
from kvbuy.codec import plan_codec
from kvbuy.errors import UsageError
from kvbuy.parts import CodecName
from kvbuy.places import name_converted
from kvbuy.reader import Reader, load_state
from kvbuy.writer import write_contents


@dataclass(frozen=True, slots=True)
class Converted:
    """An artifact just written in another codec, and how long reading, coding and writing took."""

    artifact: Artifact
    seconds: float


def convert(
    artifact: Artifact | Path | str, out: Path | str | None = None, *, codec: CodecName, force: bool = False
) -> Converted:
    """Write an artifact's contents in another codec, to `out` or beside it as NAME.CODEC.kv.safetensors.

    Every digest is checked while reading, and what is written has been decoded again and compared.

    Raises:
        UsageError: it has that codec already, or one of the codecs needs an extra that is not installed.
        PackError: one of the codecs needs a pack that is not here.
        DamagedError: the artifact is not intact.
        ExistsError, StoreError: `out` cannot be written; nothing is left behind.
    """
    started = time.perf_counter()
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(Path(artifact))
    if opened.manifest.codec_name == codec:
        raise UsageError(f"{opened.path} has the codec {codec} already", hint="use it as it is, or name another codec")
    plan = plan_codec(codec, opened.manifest.fingerprint, tokens=opened.manifest.document.tokens)
    path = name_converted(opened.path, codec) if out is None else Path(out)
    refuse_unwritable(path, force=force)
    written = write_contents(
        path,
        opened.manifest,
        codec=plan,
        blocks=Reader.open(opened).load_blocks(),
        state=[load_state(opened, index) for index in range(len(opened.manifest.state))],
        side=(opened.read_side("tokens"), opened.read_side("text")),
        force=force,
    )
    return Converted(artifact=written, seconds=time.perf_counter() - started)
