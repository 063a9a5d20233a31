"""Operations counted from a model's shape, against PyTorch's own counter of what a forward runs."""

import pytest
import torch
from conftest import SaveModel, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3TextConfig, MixtralConfig, PreTrainedConfig

from kvbuy.flops import count_flops
from kvbuy.models import Model, load_model

ROWS = 24
SMALL = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "eos_token_id": 256,
}


def counted(model: Model, *, logits: bool) -> int:
    """What a forward over `ROWS` tokens runs with attention written out."""
    ids = torch.arange(ROWS)[None]
    attention = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if logits:
            model.model(input_ids=ids, logits_to_keep=1)
        else:
            model.model.base_model(input_ids=ids)
    model.model.set_attn_implementation(attention)
    return counter.get_total_flops()


@pytest.mark.parametrize("logits", [True, False])
def test_linear_layers_count_what_pytorch_counts(llama: Model, logits: bool) -> None:
    found = count_flops(llama, rows=ROWS, cached=0, logits=logits)
    whole_squares = 2 * 4 * (16 + 16) * ROWS**2 * 2  # it counts the masked half of each of 2 layers too
    assert found.linear == counted(llama, logits=logits) - whole_squares


def test_attention_counts_each_row_s_own_past(llama: Model) -> None:
    found = count_flops(llama, rows=3, cached=10, logits=False)
    assert found.attention == 2 * (2 * 4 * (16 + 16)) * (11 + 12 + 13)


def test_rows_after_a_cache_cost_what_they_cost_in_one_prefill(llama: Model) -> None:
    whole = count_flops(llama, rows=100, cached=0, logits=False)
    parts = [count_flops(llama, rows=rows, cached=cached, logits=False) for rows, cached in ((70, 0), (30, 70))]
    assert sum(part.total for part in parts) == whole.total


def test_a_window_bounds_attention(save_model: SaveModel) -> None:
    config = Gemma3TextConfig(**SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    model = load_model(str(save_model(config)))
    found = count_flops(model, rows=1, cached=99, logits=False)
    assert found.attention == 2 * 4 * 32 * (8 + 100)


@pytest.mark.parametrize(
    ("config", "experts"),
    [(tiny_llama(), 1), (MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2), 2)],
)
def test_a_token_meets_the_experts_that_it_is_routed_to(
    save_model: SaveModel, config: PreTrainedConfig, experts: int
) -> None:
    model = load_model(str(save_model(config)))
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    gate = 64 * 4 if experts > 1 else 0
    body = 2 * (attention + experts * 3 * 64 * 96 + gate)
    found = count_flops(model, rows=5, cached=0, logits=False)
    assert found.linear in (2 * 5 * body, 2 * 5 * (body - 2 * gate))  # a router may be a bare weight
