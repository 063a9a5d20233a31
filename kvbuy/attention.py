"""The attention that kvbuy runs models with: stock where nothing is gained, grouped queries where it is.

On a CPU, transformers' `sdpa` runs few query rows slowly: it either repeats every key and value for each query head
that shares it, or asks the kernel for grouped queries one row at a time. `kvbuy_grouped` folds the query heads of a KV
head into rows of one head instead, so that each key and value is read once. README, "Measured", has the table behind
the choice. The name is part of the profile; rows beyond `MANY_ROWS`, and single rows in float32, run stock.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

STOCK = "sdpa"
GROUPED = "kvbuy_grouped"
MANY_ROWS = 64


def use_best_attention(model: PreTrainedModel) -> str:
    """Switch a freshly loaded model to the fastest attention for its device; returns the name."""
    stock: str = model.config._attn_implementation
    if stock == STOCK and model.device.type == "cpu":
        model.set_attn_implementation(GROUPED)
        return GROUPED
    return stock


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the model with plain transformers' own attention: what drift is measured against."""
    chosen: str = model.config._attn_implementation
    if chosen == GROUPED:
        model.set_attn_implementation(STOCK)
    try:
        yield
    finally:
        if chosen == GROUPED:
            model.set_attn_implementation(chosen)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [batch, heads, rows, dim]
    key: torch.Tensor,  # [batch, kv heads, tokens, dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # [batch, 1, rows, tokens]
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature of transformers' AttentionInterface."""
    groups = getattr(module, "num_key_value_groups", 1)
    batch, heads, rows, dim = query.shape
    nothing_gained = groups == 1 or rows > MANY_ROWS or (rows == 1 and query.dtype == torch.float32)
    needs_stock = (rows > 1 and attention_mask is None) or options.get("position_bias") is not None
    if nothing_gained or needs_stock or (attention_mask is not None and attention_mask.shape[1] != 1):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    if options.get("softcap") is not None:
        raise ValueError("kvbuy_grouped does not support softcap")  # as sdpa, whose place it takes
    folded = query.reshape(batch, heads // groups, groups * rows, dim)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, dropout_p=options.get("dropout", 0.0), scale=options.get("scaling")
    )
    return output.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
