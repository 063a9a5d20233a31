"""From a cache and rows to tokens: the decoding loop. Knows nothing of artifacts or text.

The loop is our own because its schedule is the contract: the prompt's rows in one forward, then one row a token.
Choosing a token is transformers' own logits processors.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from kvbuy.models import Model


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token: greedy at temperature 0, else at random from the top-p nucleus, reproducible by seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One decoded token: its id, the logits it was chosen from [vocabulary], and when it was there."""

    token: int
    logits: torch.Tensor
    at: float


@torch.no_grad()
def decode(
    model: Model, cache: Cache, rows: Sequence[int], *, max_new_tokens: int, sampling: Sampling | None = None
) -> Iterator[Step]:
    """Run the rows, then decode token after token; the last token's row is not run. Ends nowhere by itself before
    `max_new_tokens`: what ends an answer is the caller's business.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator(device="cpu").manual_seed(sampling.seed)
    for _ in range(max_new_tokens):
        ids = torch.tensor([list(rows)], device=model.device)
        output = model.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[0, -1].float()
        token = choose(logits, sampling, generator)
        yield Step(token=token, logits=logits, at=time.perf_counter())
        rows = [token]


def greedy(model: Model, cache: Cache, rows: Sequence[int], *, max_new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """The greedy continuation: token ids, and every step's logits [max_new_tokens, vocabulary] float32 on the CPU."""
    steps = list(decode(model, cache, rows, max_new_tokens=max_new_tokens))
    return [step.token for step in steps], torch.stack([step.logits for step in steps]).cpu()


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id chosen from logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    none = torch.empty((1, 0), dtype=torch.long)  # the processors' history, which these two do not look at
    scores = TemperatureLogitsWarper(sampling.temperature)(none, (logits - logits.max())[None])  # no overflow
    scores = TopPLogitsWarper(sampling.top_p)(none, scores) if sampling.top_p < 1 else scores
    return int(torch.multinomial(scores.softmax(-1)[0].cpu(), 1, generator=generator))
