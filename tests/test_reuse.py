from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, SaveModel, tiny_llama

import kvbuy
from kvbuy.cache import empty_cache
from kvbuy.decode import Sampling, greedy
from kvbuy.errors import DamagedError, DocumentError, MisfitError, UsageError
from kvbuy.models import Model, load_model
from kvbuy.prefill import Precomputed, precompute, prefill
from kvbuy.reuse import Conversation, Generation, load_document


def ask(made: Precomputed, llama: Model, prompt: str = "What then?", **settings: Any) -> Generation:
    return kvbuy.generate(made.artifact, prompt, model=llama, **({"max_new_tokens": 12} | settings))


def test_generate_gives_the_tokens_of_a_prefill_from_scratch(made: Precomputed, llama: Model) -> None:
    cache = empty_cache(llama.model.config, capacity=300)
    prefill(llama, made.artifact.read_tokens(), cache, block_size=64)
    tokens, _ = greedy(llama, cache, llama.tokenizer("What then?")["input_ids"], max_new_tokens=12)
    answer = ask(made, llama)
    assert list(answer.token_ids) == tokens[: len(answer.token_ids)]
    assert (answer.cached_tokens, answer.computed_tokens) == (200, 10)


def test_aligned_reuse_runs_the_last_short_block_again(made: Precomputed, llama: Model) -> None:
    answer = ask(made, llama, reuse="align")
    assert (answer.cached_tokens, answer.computed_tokens) == (192, 18)


def test_streamed_pieces_are_the_text(made: Precomputed, llama: Model) -> None:
    pieces: list[str] = []
    answer = ask(made, llama, on_text=pieces.append)
    assert "".join(pieces) == answer.text


def test_sampling_is_reproducible_by_seed(made: Precomputed, llama: Model) -> None:
    answers = [ask(made, llama, sampling=Sampling(temperature=1.5, top_p=0.9, seed=seed)) for seed in (1, 1, 2)]
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids


def test_the_text_ends_before_a_stop_string(made: Precomputed, llama: Model) -> None:
    whole = ask(made, llama, sampling=Sampling(temperature=1.0, seed=3), max_new_tokens=40)
    word = whole.text[8:10]
    pieces: list[str] = []
    answer = ask(
        made,
        llama,
        sampling=Sampling(temperature=1.0, seed=3),
        max_new_tokens=40,
        stop=["never said", word],
        on_text=pieces.append,
    )
    assert answer.text == whole.text[: whole.text.index(word)] == "".join(pieces)
    assert answer.stopped


def test_a_follow_up_question_equals_the_same_rows_in_one_cache(made: Precomputed, llama: Model) -> None:
    conversation = Conversation(llama, load_document(made.artifact, llama))
    first = conversation.ask("One?", max_new_tokens=5)
    second = conversation.ask("Two?", max_new_tokens=5)

    cache = load_document(made.artifact, llama).cache
    tokens, _ = greedy(llama, cache, llama.tokenizer("One?")["input_ids"], max_new_tokens=5)
    assert list(first.token_ids) == tokens
    rows = [tokens[-1], *llama.tokenizer("Two?")["input_ids"]]
    assert list(second.token_ids) == greedy(llama, cache, rows, max_new_tokens=5)[0]
    assert second.computed_tokens == len(rows)


def test_a_forgotten_conversation_answers_as_the_first_time(made: Precomputed, llama: Model) -> None:
    conversation = Conversation(llama, load_document(made.artifact, llama, room=4))  # the buffers must grow
    first = conversation.ask("One?", max_new_tokens=30)
    conversation.forget()
    assert conversation.ask("One?", max_new_tokens=30).token_ids == first.token_ids


def test_a_chat_s_follow_up_runs_only_what_is_new(llama: Model, tmp_path: Path) -> None:
    made = precompute(TEXT[:100], tmp_path / "a.kv.safetensors", model=llama, name="a.txt", chat=True, block_size=64)
    conversation = Conversation(llama, load_document(made.artifact, llama))
    for seed in range(50):  # a random model seldom says whole characters; what is not text cannot be rendered again
        conversation.forget()
        first = conversation.ask("One?", max_new_tokens=2, sampling=Sampling(temperature=1.0, seed=seed))
        if "\ufffd" not in first.text and not first.stopped:
            break
    assert first.text.isascii()
    assert first.computed_tokens == len("One?</user>\n<assistant>")
    second = conversation.ask("Two?", max_new_tokens=2)
    last_token = 1  # chosen, not yet run
    assert second.computed_tokens == last_token + len("</assistant>\n<user>Two?</user>\n<assistant>")


def test_an_answer_cut_at_a_stop_string_is_run_again_as_it_stands(llama: Model, tmp_path: Path) -> None:
    made = precompute(TEXT[:100], tmp_path / "a.kv.safetensors", model=llama, name="a.txt", chat=True, block_size=64)
    sampling = Sampling(temperature=1.0, seed=5)
    whole = Conversation(llama, load_document(made.artifact, llama)).ask("One?", max_new_tokens=30, sampling=sampling)
    conversation = Conversation(llama, load_document(made.artifact, llama))
    first = conversation.ask("One?", max_new_tokens=30, sampling=sampling, stop=[whole.text[5:7]])
    second = conversation.ask("Two?", max_new_tokens=2)
    cut = len(f"One?</user>\n<assistant>{first.text}</assistant>\n<user>Two?</user>\n<assistant>".encode())
    assert second.cached_tokens == made.artifact.manifest.document.tokens
    assert second.computed_tokens == cut


def test_another_model_is_refused_with_the_parts_that_differ(made: Precomputed, save_model: SaveModel) -> None:
    other = load_model(str(save_model(tiny_llama(), seed=1)))
    with pytest.raises(MisfitError) as caught:
        ask(made, other)
    assert [difference.split(":")[0] for difference in caught.value.differences] == ["weights"]


def test_a_flipped_bit_never_reaches_attention(made: Precomputed, llama: Model) -> None:
    raw = bytearray(made.artifact.path.read_bytes())
    raw[made.artifact.header_bytes + 1000] ^= 1
    made.artifact.path.write_bytes(raw)
    with pytest.raises(DamagedError, match="block 0 does not match its digest"):
        ask(made, llama)


def test_a_prompt_beyond_the_context_is_refused(made: Precomputed, llama: Model) -> None:
    with pytest.raises(DocumentError, match="do not fit into the 2048 tokens of context"):
        ask(made, llama, "x" * 1900)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own, where the test makes an adapter
def test_an_adapter_is_part_of_the_identity(made: Precomputed, llama_folder: Path, tmp_path: Path) -> None:
    import peft

    torch.manual_seed(1)
    base = load_model(str(llama_folder)).model
    settings = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    adapted = load_model(str(llama_folder), adapter=str(tmp_path / "adapter"))

    with pytest.raises(MisfitError) as caught:
        ask(made, adapted)
    assert [difference.split(":")[0] for difference in caught.value.differences] == ["adapters"]
    again = precompute(TEXT[:200], tmp_path / "b.kv.safetensors", model=adapted, name="doc.txt", block_size=64)
    assert again.artifact.manifest.blocks[0].digest != made.artifact.manifest.blocks[0].digest
    assert ask(again, adapted).cached_tokens == 200


def test_an_interrupted_answer_leaves_no_rows_behind(made: Precomputed, llama: Model) -> None:
    conversation = Conversation(llama, load_document(made.artifact, llama))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("One?", max_new_tokens=20, on_text=interrupt)
    after = conversation.ask("One?", max_new_tokens=20)
    assert after == replace(ask(made, llama, "One?", max_new_tokens=20), **times(after))


def times(answer: Generation) -> dict[str, float]:
    names = ("load_seconds", "first_token_seconds", "decode_tokens_per_second")
    return {name: getattr(answer, name) for name in names}


def test_an_empty_stop_string_is_refused(made: Precomputed, llama: Model) -> None:
    with pytest.raises(UsageError, match="must not be empty"):
        ask(made, llama, stop=[""])
