"""Every kind of cache: save, load, one more step on both, every bit equal; what cannot be stored is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TEXT, SaveModel, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from kvbuy.artifact import Artifact
from kvbuy.cache import BufferedLayer, empty_cache
from kvbuy.decode import greedy
from kvbuy.errors import ProfileWarning, UnsupportedCache
from kvbuy.models import Model, load_model
from kvbuy.prefill import Precomputed, precompute, prefill
from kvbuy.reuse import Conversation, load, load_document

COMMON = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "pad_token_id": 256,
    "eos_token_id": 256,
}


def qwen3() -> PreTrainedConfig:
    return transformers.Qwen3Config(**COMMON, num_hidden_layers=2)


def gemma3() -> PreTrainedConfig:
    kinds = ["sliding_attention", "full_attention"]
    return transformers.Gemma3TextConfig(**COMMON, num_hidden_layers=2, layer_types=kinds, sliding_window=32)


def mistral_all_sliding() -> PreTrainedConfig:
    return transformers.MistralConfig(**COMMON, num_hidden_layers=2, sliding_window=48)


def qwen3_next() -> PreTrainedConfig:
    return transformers.Qwen3NextConfig(
        **COMMON,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


def lfm2() -> PreTrainedConfig:
    return transformers.Lfm2Config(**COMMON, num_hidden_layers=2, layer_types=["conv", "full_attention"])


def deepseek_v3() -> PreTrainedConfig:
    return transformers.DeepseekV3Config(
        **({key: value for key, value in COMMON.items() if key != "head_dim"} | {"num_key_value_heads": 4}),
        num_hidden_layers=2,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )


ARCHITECTURES = [tiny_llama, qwen3, gemma3, mistral_all_sliding, qwen3_next, lfm2, deepseek_v3]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.__name__)
@pytest.mark.parametrize("tokens", [20, 128, 200], ids=["one short block", "full blocks", "short last block"])
def test_saved_and_loaded_cache_continues_bit_for_bit(
    config: Callable[[], PreTrainedConfig], tokens: int, save_model: SaveModel, tmp_path: Path
) -> None:
    model = load_model(str(save_model(config())))
    text = TEXT[:tokens]
    ids = model.tokenizer(text)["input_ids"]
    made = precompute(text, tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=64)

    resident = empty_cache(model.model.config, capacity=256)
    prefill(model, ids, resident, block_size=64)
    loaded = load_document(Artifact.open(made.artifact.path), model)

    assert loaded.cached_tokens == tokens == loaded.cache.get_seq_length()
    rows = model.tokenizer("What then?")["input_ids"]
    wanted_tokens, wanted = greedy(model, resident, rows, max_new_tokens=6)
    found_tokens, found = greedy(model, loaded.cache, rows, max_new_tokens=6)
    assert torch.equal(found, wanted)
    assert found_tokens == wanted_tokens


@pytest.mark.parametrize("config", [gemma3, mistral_all_sliding], ids=lambda config: config.__name__)
@pytest.mark.parametrize("tokens", [20, 128, 200])
def test_aligned_reuse_of_sliding_windows_equals_the_schedule(
    config: Callable[[], PreTrainedConfig], tokens: int, save_model: SaveModel, tmp_path: Path
) -> None:
    model = load_model(str(save_model(config())))
    ids = model.tokenizer(TEXT[:tokens])["input_ids"]
    made = precompute(TEXT[:tokens], tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=64)
    aligned = tokens - tokens % 64

    resident = empty_cache(model.model.config, capacity=256)
    prefill(model, ids[:aligned], resident, block_size=64)
    loaded = load_document(Artifact.open(made.artifact.path), model, reuse="align")

    assert loaded.cached_tokens == aligned
    _, wanted = greedy(model, resident, [*ids[aligned:], 65, 66], max_new_tokens=6)
    _, found = greedy(model, loaded.cache, [*loaded.pending_ids, 65, 66], max_new_tokens=6)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.__name__)
def test_prefill_in_blocks_is_the_model_s_own_prefill(
    config: Callable[[], PreTrainedConfig], save_model: SaveModel
) -> None:
    """In float32 block by block and single pass differ by rounding only: no block forgets the ones before it."""
    model = load_model(str(save_model(config(), dtype=torch.float32)))
    ids = model.tokenizer(TEXT[:200])["input_ids"]
    cache = empty_cache(model.model.config, capacity=256)
    prefill(model, ids, cache, block_size=64)
    with torch.no_grad():
        single = model.model(torch.tensor([[*ids, 65]]), cache=DynamicCache(config=model.model.config))
    _, logits = greedy(model, cache, [65], max_new_tokens=1)
    assert (logits[0] - single.logits[0, -1]).abs().max() < 1e-3


@pytest.mark.parametrize("config", [gemma3, lfm2, qwen3_next], ids=lambda config: config.__name__)
@pytest.mark.parametrize("tokens", [50, 64], ids=["nothing cached", "one full block"])
def test_a_rewound_aligned_cache_answers_as_the_first_time(
    config: Callable[[], PreTrainedConfig], tokens: int, save_model: SaveModel, tmp_path: Path
) -> None:
    model = load_model(str(save_model(config())))
    made = precompute(TEXT[:tokens], tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=64)
    conversation = Conversation(model, load_document(made.artifact, model, reuse="align"))
    first = conversation.ask("What then?", max_new_tokens=6)
    conversation.forget()
    again = conversation.ask("What then?", max_new_tokens=6)
    assert (again.token_ids, again.cached_tokens) == (first.token_ids, first.cached_tokens)


def test_appending_within_the_capacity_keeps_the_buffers() -> None:
    layer = BufferedLayer(8)
    layer.lazy_initialization(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 4))
    before = layer.buffers()[0].data_ptr()
    layer.update(torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4))
    assert (layer.buffers()[0].data_ptr(), layer.capacity) == (before, 8)


def test_transformers_generate_takes_a_loaded_cache(llama: Model, made: Precomputed, tmp_path: Path) -> None:
    ids = [*made.artifact.read_tokens(), 65, 66]
    settings = {"max_new_tokens": 8, "do_sample": False}
    found = llama.model.generate(
        torch.tensor([ids]), cache=load(made.artifact, llama), attention_mask=torch.ones(1, 202), **settings
    )
    tokens, _ = greedy(llama, load_document(made.artifact, llama).cache, [65, 66], max_new_tokens=8)
    assert found[0, 202:].tolist() == tokens[: found.shape[1] - 202]


def test_a_cache_of_a_model_loaded_by_transformers_is_accepted(llama_folder: Path, made: Precomputed) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    with pytest.warns(ProfileWarning, match="attention: artifact kvbuy_grouped, here sdpa"):
        assert load(made.artifact, plain).get_seq_length() == 200


def test_decoding_appends_in_place(llama: Model, made: Precomputed) -> None:
    cache = load_document(made.artifact, llama).cache
    before = [layer.keys.data_ptr() for layer in cache.layers]
    greedy(llama, cache, [65], max_new_tokens=4)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before


def test_a_layer_that_outgrows_its_buffers_keeps_every_row() -> None:
    torch.manual_seed(0)
    layer, rows = BufferedLayer(4), torch.randn(1, 2, 11, 8)
    for at in range(11):
        layer.update(rows[:, :, at : at + 1], -rows[:, :, at : at + 1])
    assert torch.equal(layer.keys, rows)
    assert torch.equal(layer.values, -rows)


def test_a_layer_whose_rows_were_replaced_goes_on_from_them() -> None:
    torch.manual_seed(0)
    layer, rows = BufferedLayer(16), torch.randn(1, 2, 5, 8)
    layer.update(rows, rows)
    layer.batch_repeat_interleave(2)
    layer.update(rows[:, :, :1].repeat(2, 1, 1, 1), rows[:, :, :1].repeat(2, 1, 1, 1))
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.crop(-2)
    layer.update(rows[:, :, :1].repeat(2, 1, 1, 1), rows[:, :, :1].repeat(2, 1, 1, 1))
    assert torch.equal(layer.keys, torch.cat([rows[:, :, :4], rows[:, :, :1]], dim=2).repeat(2, 1, 1, 1))


def test_indexed_attention_is_refused_by_name() -> None:
    config = transformers.DeepseekV32Config()
    with pytest.raises(UnsupportedCache, match="deepseek_v32 keeps a DynamicIndexedLayer"):
        empty_cache(config, capacity=8)


def test_an_encoder_decoder_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedCache, match="t5 is an encoder-decoder"):
        empty_cache(transformers.T5Config(), capacity=8)


def test_a_model_that_keeps_its_state_elsewhere_is_refused_by_name(save_model: SaveModel) -> None:
    config = transformers.RecurrentGemmaConfig(
        **(COMMON | {"num_key_value_heads": 1}), num_hidden_layers=3, lru_width=64, attention_window_size=64
    )
    folder = save_model(config)
    with pytest.raises(UnsupportedCache, match="recurrent_gemma left layer 0 of its cache empty"):
        load_model(str(folder))
