import io
import sys
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from kvbuy.document import encode_document, encode_prompt, read_document, render_rest
from kvbuy.errors import DocumentError

HEAD = "<user>The document.\n\n"


def test_a_missing_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="cannot read the document"):
        read_document(str(tmp_path / "none.txt"))


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_document_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text(text)
    with pytest.raises(DocumentError, match="is empty"):
        read_document(str(tmp_path / "doc.txt"))


def test_a_document_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DocumentError, match=r"is not UTF-8 text \(byte 3\)") as caught:
        read_document(str(tmp_path / "doc.txt"))
    assert "iconv" in str(caught.value.hint)


def test_a_byte_order_mark_is_not_part_of_the_document(tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_bytes(b"\xef\xbb\xbfText")
    assert read_document(str(tmp_path / "doc.txt")) == "Text"


def test_a_dash_reads_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode())))
    assert read_document("-") == "Grüße"


def test_a_plain_document_is_tokenised_as_it_is() -> None:
    document = encode_document(byte_tokenizer(), "Text", name="doc.txt", chat=False)
    assert (document.text, bytes(byte_tokenizer().decode(document.token_ids), "utf8")) == ("Text", b"Text")


def test_a_chat_document_is_the_template_s_head() -> None:
    assert encode_document(byte_tokenizer(), "The document.", name="doc.txt", chat=True).text == HEAD


def test_a_question_completes_the_head_to_the_whole_rendering() -> None:
    tokenizer = byte_tokenizer()
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The document.\n\nWhy?"}], tokenize=False, add_generation_prompt=True
    )
    assert HEAD + render_rest(tokenizer, [], "Why?", document_text=HEAD) == whole


def test_later_turns_come_after_the_first_answer() -> None:
    rest = render_rest(byte_tokenizer(), [("Why?", "So.")], "Really?", document_text=HEAD)
    assert rest == "Why?</user>\n<assistant>So.</assistant>\n<user>Really?</user>\n<assistant>"


def test_head_and_prompt_are_tokenised_apart() -> None:
    prompt = encode_prompt(byte_tokenizer(), "Why?", document_text=HEAD, chat=True)
    assert byte_tokenizer().decode(prompt) == "Why?</user>\n<assistant>"


def test_a_template_that_no_longer_renders_the_head_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "today is another day; " + tokenizer.chat_template
    with pytest.raises(DocumentError, match="does not render the text that the artifact starts with"):
        encode_prompt(tokenizer, "Why?", document_text=HEAD, chat=True)


def test_chat_without_a_template_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DocumentError, match="no chat template"):
        encode_document(tokenizer, "Text", name="doc.txt", chat=True)


def test_a_template_that_drops_the_question_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "nothing"
    with pytest.raises(DocumentError, match="changes the question"):
        encode_document(tokenizer, "Text", name="doc.txt", chat=True)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DocumentError, match="the prompt is empty"):
        encode_prompt(byte_tokenizer(), "", document_text="Text", chat=False)
