"""Documents and prompts as token ids. Knows tokenizers and chat templates, not models or caches.

The token boundary: document and prompt are tokenised apart, always, and "from scratch" means the same two runs of
tokens. A tokenizer might have merged across the boundary; kvbuy never does.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbuy.artifact import SUFFIX
from kvbuy.errors import DocumentError

SEPARATOR = "\n\n"  # between document and question inside the user's turn of a chat
MARK = "kvbuy\u2063question\u2063here"  # stands for the question while the head is rendered; no document holds it
PROBE = "\n\nIn one sentence, the text above says that"  # the receipt's prompt after a plain document
CHAT_PROBE = "In one sentence, what does the text above say?"

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised document.

    `text` is what was tokenised: the document itself, or with `chat` the chat template's rendering up to the question.
    """

    name: str
    text: str
    chat: bool
    token_ids: tuple[int, ...]


def read_document(source: str) -> str:
    """The text of a file, or of stdin for "-".

    Raises:
        DocumentError: missing, not UTF-8, or empty.
    """
    if source.endswith(SUFFIX):
        raise DocumentError(
            f"{source} is an artifact already", hint=f"ask it: kvbuy generate --kv {source} --prompt ..."
        )
    try:
        raw = _read_stdin() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        hint = "name UTF-8 text files (for a folder: kvbuy precompute FOLDER/*.md), or - for stdin"
        raise DocumentError(f"cannot read the document {source}: {error.strerror}", hint=hint) from error
    text = _decode(raw, source=source)
    if not text.strip():
        raise DocumentError(f"the document {source} is empty", hint="name a file that holds text")
    return text


def read_prompt(prompt: str) -> str:
    """The prompt itself, or for "-" stdin without its last line break (DocumentError where it is not UTF-8)."""
    return _decode(_read_stdin(), source="stdin").rstrip("\r\n") if prompt == "-" else prompt


def refuse_surrogates(text: str) -> None:
    """Raise DocumentError where a text is not UTF-8: halves of characters, as undecodable arguments become."""
    if any("\ud800" <= symbol <= "\udfff" for symbol in text):
        raise DocumentError("the text is not UTF-8")


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise DocumentError("stdin is closed", hint="pipe the text in, or name a file")
    return sys.stdin.buffer.read()


def _decode(raw: bytes, *, source: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "convert it first, for example: iconv -f latin1 -t utf8 IN > OUT (and a PDF with pdftotext)"
        raise DocumentError(f"{source} is not UTF-8 text (byte {error.start})", hint=hint) from None


def encode_document(tokenizer: Any, text: str, *, name: str, chat: bool) -> Document:
    """Tokenise a document, with `chat` inside the model's chat template.

    Raises:
        DocumentError: the tokenizer has no chat template, or one that does not keep the document in front.
    """
    if chat:
        if not tokenizer.chat_template:
            raise DocumentError("this model has no chat template", hint="precompute without --chat")
        rendered = render_chat(tokenizer, [{"role": "user", "content": text + SEPARATOR + MARK}])
        text, found, _ = rendered.partition(MARK)
        if not found or not text.endswith(SEPARATOR):
            raise DocumentError("this model's chat template changes the question", hint="precompute without --chat")
    refuse_surrogates(text)
    token_ids = tuple(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    if not token_ids:
        raise DocumentError(f"the document {name} is empty")
    return Document(name=name, text=text, chat=chat, token_ids=token_ids)


def encode_prompt(tokenizer: Any, prompt: str, *, document_text: str, chat: bool) -> tuple[int, ...]:
    """The rows that a prompt adds after a document: the prompt as it is, or the rest of the chat rendering.

    Raises:
        DocumentError: the prompt is empty, or the chat template no longer renders the stored head.
    """
    if not chat:
        return encode_text(tokenizer, prompt)
    return encode_text(tokenizer, render_rest(tokenizer, [], prompt, document_text=document_text))


def render_rest(tokenizer: Any, turns: list[tuple[str, str]], prompt: str, *, document_text: str) -> str:
    """What a conversation over a chat document renders to after the stored head.

    `turns` are the questions and answers so far. The document itself is cut out of the head: it stands between the
    template's own opening and the separator.

    Raises:
        DocumentError: the chat template no longer renders the stored head.
    """
    opening = render_chat(tokenizer, [{"role": "user", "content": MARK}]).partition(MARK)[0]
    if not document_text.startswith(opening):
        raise _foreign_template()
    body = document_text[len(opening) :]
    questions = [question for question, _ in turns] + [prompt]
    messages: list[Message] = []
    for at, question in enumerate(questions):
        messages.append({"role": "user", "content": body + question if at == 0 else question})
        if at < len(turns):
            messages.append({"role": "assistant", "content": turns[at][1]})
    rendered = render_chat(tokenizer, messages)
    if not rendered.startswith(document_text):
        raise _foreign_template()
    return rendered[len(document_text) :]


def render_chat(tokenizer: Any, messages: list[Message]) -> str:
    """A conversation as the model's chat template renders it, up to where the assistant speaks."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The token ids of a text that stands after a document: no special tokens are added."""
    refuse_surrogates(text)
    token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not token_ids:
        raise DocumentError("the prompt is empty", hint='ask something: --prompt "..."')
    return token_ids


def _foreign_template() -> DocumentError:
    return DocumentError(
        "this model's chat template does not render the text that the artifact starts with (does it write a date?)",
        hint="precompute the document again, or without --chat",
    )
