"""From an artifact and a prompt to text, without prefill: load, generate, and conversations.

Two modes of reuse: "continue" takes the whole document from the artifact and is exact to the schedule of
`kvbuy.prefill`; "align" takes its full blocks, runs the rows of the last short block again together with the prompt
under stock attention, and is exact to a single pass wherever `verify` says so.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvbuy.artifact import Artifact
from kvbuy.attention import stock_attention
from kvbuy.cache import Reuse, load_artifact, reserve_cache, rewind_cache
from kvbuy.decode import Sampling, Step, decode
from kvbuy.document import encode_text, render_rest
from kvbuy.errors import ProfileWarning, UsageError
from kvbuy.fingerprint import profile_differences
from kvbuy.models import (
    FoundModel,
    Model,
    adopt_model,
    choose_device,
    context_length,
    refuse_foreign_shapes,
    refuse_misfit,
    refuse_too_long,
)

ROOM = 1024  # tokens after the document that a loaded cache holds before it grows


@dataclass(frozen=True, slots=True)
class Loaded:
    """An artifact's KV in memory, ready for a prompt.

    `cache` holds `cached_tokens` of the document's `token_ids`; the rest of them runs again with the prompt.
    """

    artifact: Artifact
    cache: Cache
    cached_tokens: int
    token_ids: tuple[int, ...]
    text: str
    reuse: Reuse
    seconds: float

    @property
    def pending_ids(self) -> tuple[int, ...]:
        """Document tokens that run again with the prompt: none in "continue"."""
        return self.token_ids[self.cached_tokens :]


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer and what it took: times in seconds, `first_token_seconds` from the loaded cache to the first token."""

    text: str
    token_ids: tuple[int, ...]
    stopped: bool
    cached_tokens: int
    computed_tokens: int
    load_seconds: float
    first_token_seconds: float
    decode_tokens_per_second: float


def load(
    artifact: Artifact | Path | str,
    model: Model | PreTrainedModel,
    *,
    reuse: Reuse = "continue",
    room: int = ROOM,
) -> Cache:
    """An artifact's KV as a transformers cache for `model.generate(ids, cache=...)`.

    `ids` are the document's token ids (`kvbuy.Artifact.read_tokens`) followed by the prompt's.

    Raises:
        DamagedError: the file or a digest is wrong.
        MisfitError: it was made with another model.
    """
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(Path(artifact))
    known = model if isinstance(model, Model) else adopt_model(model)
    loaded = load_document(opened, known, reuse=reuse, room=room)
    warn_of_profile(opened, known)
    return loaded.cache


@torch.no_grad()
def load_document(
    artifact: Artifact, model: Model, *, reuse: Reuse = "continue", room: int = ROOM, cache: Cache | None = None
) -> Loaded:
    """Load an artifact's KV, into a new cache with `room` for tokens after the document or a reserved one.

    `seconds` counts the allocation of a new one. Errors: `load`.
    """
    manifest = artifact.manifest
    refuse_misfit(manifest, model.fingerprint)
    refuse_foreign_shapes(manifest, model)
    started = time.perf_counter()
    if cache is None:
        capacity = manifest.document.tokens + room
        cache = reserve_cache(model.model.config, manifest, capacity=capacity, device=model.device)
    cached = load_artifact(artifact, cache, reuse=reuse, device=model.device)
    return Loaded(
        artifact=artifact,
        cache=cache,
        cached_tokens=cached,
        token_ids=artifact.read_tokens(),
        text=artifact.read_text(),
        reuse=reuse,
        seconds=time.perf_counter() - started,
    )


def open_conversation(
    artifact: Artifact, found: FoundModel, *, device: str | None, reuse: Reuse, room: int
) -> "Conversation":
    """Load a model and an artifact for questions; the cache's buffers are made ready while the weights load."""
    manifest, config, place = artifact.manifest, found.config(), choose_device(device)
    tokens = manifest.document.tokens
    capacity = min(tokens + room, max(tokens, context_length(config)))
    with ThreadPoolExecutor(max_workers=1) as pool:
        reserved = pool.submit(reserve_cache, config, manifest, capacity=capacity, device=place, touch=True)
        model = found.load(device)
        loaded = load_document(artifact, model, reuse=reuse, cache=reserved.result())
    warn_of_profile(artifact, model)
    return Conversation(model, loaded)


def reuse_attention(model: Model, reuse: Reuse) -> AbstractContextManager[None]:
    """The attention of a mode of reuse: "align" runs stock, rows and decoding alike, to have a single pass's bits."""
    return stock_attention(model.model) if reuse == "align" else nullcontext()


def warn_of_profile(artifact: Artifact, model: Model) -> None:
    """Warn, once a load, where the artifact was made on another profile than this one."""
    profile = artifact.manifest.profile
    if differences := profile_differences(profile, model.profile(profile.block_size)):
        promise = "bit-exactness is not promised here; `kvbuy verify` measures it"
        warnings.warn(f"another profile ({'; '.join(differences)}): {promise}", ProfileWarning, stacklevel=3)


def generate(
    artifact: Artifact | Path | str,
    prompt: str,
    *,
    model: Model,
    reuse: Reuse = "continue",
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Answer one prompt over an artifact's document. `on_text` is given the text as it is made.

    Raises:
        DamagedError, MisfitError: the artifact cannot be used (`load`).
        DocumentError: the prompt is empty or too long, or the chat template has changed.
    """
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(Path(artifact))
    conversation = Conversation(model, load_document(opened, model, reuse=reuse, room=ROOM))
    warn_of_profile(opened, model)
    return conversation.ask(prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, on_text=on_text)


class Conversation:
    """Questions over one loaded document. What a question and its answer ran stays in the cache for the next one."""

    def __init__(self, model: Model, loaded: Loaded) -> None:
        self.model = model
        self.loaded = loaded
        self.turns: list[tuple[str, str]] = []
        self._ran = ""  # the text after the document whose rows the cache holds, the pending rows' text included
        self._pending: tuple[int, ...] = loaded.pending_ids

    def ask(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] = lambda _: None,
    ) -> Generation:
        """Answer a question that follows the turns so far (errors: `generate`)."""
        if max_new_tokens < 1 or "" in stop:
            raise UsageError("an answer needs room for a token, and stop strings must not be empty")
        rest = self._render(prompt)
        if not rest.startswith(self._ran):  # the template writes earlier turns anew: run them again
            self.rewind()
        new_ids = encode_text(self.model.tokenizer, rest[len(self._ran) :])
        rows = self._pending + new_ids
        cached = self.loaded.cache.get_seq_length()
        refuse_too_long(self.model, cached, extra=len(rows) + max_new_tokens)
        started = time.perf_counter()
        try:
            with reuse_attention(self.model, self.loaded.reuse):
                steps = decode(self.model, self.loaded.cache, rows, max_new_tokens=max_new_tokens, sampling=sampling)
                answer = _collect(self.model, steps, stop=stop, on_text=on_text)
        except BaseException:  # rows of half an answer must not stand before the next question
            self.rewind()
            raise
        self.turns.append((prompt, answer.text))
        self._ran = rest + answer.spoken
        self._pending = () if answer.ended else answer.token_ids[-1:]
        return Generation(
            text=answer.text,
            token_ids=answer.token_ids,
            stopped=answer.ended or answer.text != answer.spoken,
            cached_tokens=cached,
            computed_tokens=len(rows),
            load_seconds=self.loaded.seconds,
            first_token_seconds=answer.times[0] - started,
            decode_tokens_per_second=_rate(answer.times),
        )

    def rewind(self) -> None:
        """Put the cache back to the document; the turns stay, and run again with the next question."""
        artifact, cached = self.loaded.artifact, self.loaded.cached_tokens
        rewind_cache(artifact, self.loaded.cache, tokens=cached, device=self.model.device)
        self._ran, self._pending = "", self.loaded.pending_ids

    def forget(self) -> None:
        """Rewind and drop the turns: the next question is the first."""
        self.turns.clear()
        self.rewind()

    def _render(self, prompt: str) -> str:
        if self.loaded.artifact.manifest.document.chat:
            return render_rest(self.model.tokenizer, self.turns, prompt, document_text=self.loaded.text)
        return "".join(question + answer for question, answer in self.turns) + prompt


@dataclass(frozen=True, slots=True)
class _Answer:
    """`spoken` is all text of `token_ids`, `text` the part before a stop string; `ended` by an end token."""

    text: str
    spoken: str
    token_ids: tuple[int, ...]
    ended: bool
    times: tuple[float, ...]


def _collect(model: Model, steps: Iterator[Step], *, stop: Sequence[str], on_text: Callable[[str], None]) -> _Answer:
    """Take steps until an end token, a stop string or the last step, handing out text that can no longer change."""
    ends = end_tokens(model)
    token_ids: list[int] = []
    times: list[float] = []
    spoken, shown, ended, cut = "", 0, False, None
    for step in steps:
        times.append(step.at)
        if step.token in ends:
            ended = True
            break
        token_ids.append(step.token)
        spoken = model.tokenizer.decode(token_ids, skip_special_tokens=True)
        found = [at for at in (spoken.find(word) for word in stop) if at >= 0]
        if found:
            cut = min(found)
            break
        ready = _settled(spoken, stop)
        if ready > shown:
            on_text(spoken[shown:ready])
            shown = ready
    text = spoken[:cut]
    on_text(text[shown:])
    return _Answer(text=text, spoken=spoken, token_ids=tuple(token_ids), ended=ended, times=tuple(times))


def end_tokens(model: Model) -> set[int]:
    """The token ids that end an answer."""
    ends = model.model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {end for end in (*listed, model.tokenizer.eos_token_id) if end is not None}


def _settled(text: str, stop: Sequence[str]) -> int:
    """How much of a growing text can be shown: not half a character, not the beginning of a stop string."""
    if text.endswith("\ufffd"):
        return 0
    held = max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
    return len(text) - held


def _rate(times: Sequence[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
