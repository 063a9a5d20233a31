"""How many floating-point operations prefill and reuse take, counted from a model's shape.

Linear layers take 2 FLOP a weight and row (Kaplan et al. 2020, table 1, without its approximation of the weights);
attention takes 2 for each dim of a key and of a value, query head, row and earlier token (Hoffmann et al. 2022,
appendix F, halved by causality). Embeddings, norms, softmax and the recurrence of recurrent layers are small and left
out. It counts what the mathematics needs, not what a kernel does on top (masked halves of tiles).
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvbuy.errors import ModelError
from kvbuy.figures import Flops
from kvbuy.manifest import FullLayer, SlidingLayer
from kvbuy.models import Model

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")


def count_flops(model: Model, *, rows: int, cached: int, logits: bool) -> Flops:
    """FLOP to run `rows` tokens after `cached` ones; `logits` for the last of them, or for none.

    Raises:
        ModelError: the model mixes experts, and its config does not say how many a token takes.
    """
    linear = 2 * rows * sum(_body_weights(model.model))
    if logits and (head := model.model.get_output_embeddings()) is not None:
        linear += 2 * head.weight.numel()
    return Flops(linear=linear, attention=sum(_attention(model, rows=rows, cached=cached)))


def _body_weights(model: PreTrainedModel) -> Iterator[int]:
    """Weights that each token meets: all of a linear layer, of stacked experts the part that is routed to."""
    config = model.config.get_text_config(decoder=True)
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield module.weight.numel()
        elif name.endswith("experts"):
            stacked = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
            share = _experts_per_token(config) / stacked[0].shape[0] if stacked else 0
            yield from (round(weight.numel() * share) for weight in stacked)


def _experts_per_token(config: PreTrainedConfig) -> int:
    for name in EXPERTS_PER_TOKEN:
        if isinstance(number := getattr(config, name, None), int):
            return number
    raise ModelError("the model's config does not say how many experts a token takes")


def _attention(model: Model, *, rows: int, cached: int) -> Iterator[int]:
    heads = model.model.config.get_text_config(decoder=True).num_attention_heads
    windows = {(tensor.layer, tensor.name): tensor.shape[-1] for tensor in model.state}
    seen = torch.arange(cached + 1, cached + rows + 1)  # tokens that each row attends to, itself among them
    for index, layer in enumerate(model.layers):
        match layer:
            case FullLayer():
                yield 2 * heads * (layer.key_dim + layer.value_dim) * int(seen.sum())
            case SlidingLayer():
                width = windows[index, "key"] + windows[index, "value"]
                yield 2 * heads * width * int(seen.clamp(max=layer.window).sum())
