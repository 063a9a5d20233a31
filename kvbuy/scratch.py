"""The fresh process of verification: `python -m kvbuy.scratch REQUEST LOGITS` prefills a document from scratch.

It takes only token ids and prompt rows from the request, never an artifact's KV, and prints one JSON object a line:
`{"done": tokens}` as it goes, then `{"result": {...}}` or `{"error": ..., "hint": ...}`. Logits go to a file.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from kvbuy.cache import empty_cache, forget_windows, state_tensors
from kvbuy.decode import greedy
from kvbuy.errors import KvbuyError, ModelError
from kvbuy.models import load_model, refuse_too_long
from kvbuy.prefill import prefill


class Request(BaseModel):
    """What to compute: `model` and `adapter` are the folders that the caller has identified."""

    model_config = ConfigDict(frozen=True)

    model: str
    adapter: str | None
    device: str | None
    dtype: str
    block_size: int
    document: tuple[int, ...]
    prompt: tuple[int, ...]
    max_new_tokens: int


class Result(BaseModel):
    """What came out: digests of blocks and state, and the greedy tokens."""

    blocks: tuple[str, ...]
    state: tuple[str, ...]
    tokens: tuple[int, ...]


class Message(BaseModel):
    """A line that the fresh process prints."""

    done: int = 0
    result: Result | None = None
    error: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Scratch:
    """A result, and the logits of its tokens, [tokens, vocabulary] float32."""

    result: Result
    logits: torch.Tensor


def run_from_scratch(request: Request, *, progress: Callable[[int], None] = lambda _: None) -> Scratch:
    """Run the request in a fresh process.

    Raises:
        ModelError: the process failed; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="kvbuy-") as folder:
        asked, logits = Path(folder) / "request.json", Path(folder) / "logits.safetensors"
        asked.write_text(request.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "kvbuy.scratch", str(asked), str(logits)]
        with (Path(folder) / "stderr").open("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
            )
            try:
                last = _follow(process, progress)
            finally:
                process.kill()  # where the caller is interrupted, the fresh process must not go on
                process.wait()
            errors.seek(0)
            complaint = errors.read().strip().splitlines()
        if last.result is None:
            reason = last.error or (complaint[-1] if complaint else "it was killed (out of memory?)")
            raise ModelError(f"the prefill from scratch failed: {reason}", hint=last.hint)
        return Scratch(result=last.result, logits=load_file(logits)["logits"].clone())


def _follow(process: subprocess.Popen[str], progress: Callable[[int], None]) -> Message:
    """Pass on the process's progress; returns its last message."""
    message = Message()
    assert process.stdout is not None  # it was asked for
    with process.stdout as lines:
        for line in lines:
            message = Message.model_validate_json(line)
            progress(message.done)
    return message


@torch.no_grad()
def compute(request: Request, logits_path: Path, tell: Callable[[Message], None]) -> Result:
    """The fresh process's work."""
    model = load_model(request.model, adapter=request.adapter, device=request.device, dtype=request.dtype)
    room = len(request.prompt) + request.max_new_tokens
    refuse_too_long(model, len(request.document), extra=room)
    cache = empty_cache(model.model.config, capacity=len(request.document) + room)
    blocks = prefill(
        model,
        request.document,
        cache,
        block_size=request.block_size,
        progress=lambda done, _: tell(Message(done=done)),
    )
    state = [described.digest for described, _ in state_tensors(cache)]
    forget_windows(cache)
    tokens, logits = greedy(model, cache, request.prompt, max_new_tokens=request.max_new_tokens)
    save_file({"logits": logits}, logits_path)
    return Result(blocks=tuple(blocks), state=tuple(state), tokens=tuple(tokens))


def main() -> None:
    """Entry of the fresh process."""
    asked, logits = map(Path, sys.argv[1:])
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not stand between the messages

    def tell(message: Message) -> None:
        print(message.model_dump_json(), file=out, flush=True)

    request = Request.model_validate_json(asked.read_text(encoding="utf-8"))
    try:
        tell(Message(done=len(request.document), result=compute(request, logits, tell)))
    except KvbuyError as error:
        tell(Message(error=error.message, hint=error.hint))


if __name__ == "__main__":
    main()
