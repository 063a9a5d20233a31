"""Text that is everywhere: READMEs, docstrings and sources of packages that it needs anyway, and Python's own help.

English prose about software, and Python. Whoever serves other documents does better with texts of their own kind. It
imports none of the packages it reads. Whatever speaks of a licence is left out: licences are documents that people
measure codecs with, this project among them.
"""

import ast
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path
from random import Random

from kvbuy.errors import DocumentError

PACKAGES = ("numpy", "transformers", "torch", "huggingface_hub", "typer", "rich", "pydantic")
LENGTH = 4600  # characters of a text: about 1024 tokens
READMES, PROSE, SOURCES = 2, 12, 3  # texts of each package at most


def calibration_texts() -> list[str]:
    """Texts of `LENGTH` characters, packages taking turns: docstrings mostly.

    Raises:
        DocumentError: the packages came without their sources.
    """
    kinds = [kind for package in PACKAGES for kind in _package_texts(package)]
    texts = [text for turn in zip_longest(*kinds) for text in turn if text is not None]
    if not texts:
        raise DocumentError("no package here has sources to make calibration text of", hint="give --text FILES")
    return texts


def help_texts() -> str:
    """Prose that every Python has, more than 100,000 tokens of it: the help topics of the language."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _package_texts(package: str) -> Iterator[list[str]]:
    """A package's texts by kind: its README, its docstrings, its sources."""
    files = _sources(package)
    half = len(files) // 2  # a file gives either its docstrings or its source
    yield list(islice(_pieces(_readme(package)), READMES))
    yield list(islice(filter(None, map(_docstrings, files[:half])), PROSE))
    yield list(islice(filter(None, map(_source, files[half:])), SOURCES))


def _readme(package: str) -> str:
    try:
        return str(metadata(package).json.get("description") or "")
    except PackageNotFoundError:
        return ""


def _sources(package: str) -> list[Path]:
    """A package's Python files without its tests, in an order in which neighbours have little in common."""
    found = find_spec(package)
    folders = found.submodule_search_locations if found and found.submodule_search_locations else []
    found_files = ((Path(folder), path) for folder in folders for path in sorted(Path(folder).rglob("*.py")))
    files = [path for folder, path in found_files if "test" not in path.relative_to(folder).as_posix()]
    Random(0).shuffle(files)
    return files


def _docstrings(path: Path) -> str | None:
    """A file's longer docstrings, as one text; None where there are too few."""
    text = _read(path)
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return None
    return _cut("\n\n".join(_long_docstrings(nodes)))


def _long_docstrings(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            found = ast.get_docstring(node) or ""
            if len(found) >= 200 and "licen" not in found.lower():
                yield found


def _source(path: Path) -> str | None:
    """A file's code from its first definition on."""
    _, _, code = _read(path).partition("\ndef ")
    return _cut("def " + code)


def _cut(text: str) -> str | None:
    return next(_pieces(text), None)


def _pieces(text: str) -> Iterator[str]:
    """A text in whole pieces, but for those that speak of a licence."""
    for start in range(0, len(text) - LENGTH + 1, LENGTH):
        piece = text[start : start + LENGTH]
        if "licen" not in piece.lower():
            yield piece


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return ""
