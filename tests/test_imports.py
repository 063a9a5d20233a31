"""Heavy imports stay on their side: only what runs a model imports torch, only `hub` huggingface_hub, and on use."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from handmade import handmade

import kvbuy
from kvbuy.artifact import write_artifact

HEAVY = ["torch", "transformers", "numpy", "huggingface_hub"]
LIGHT = [
    "errors",
    "parts",
    "manifest",
    "parallel",
    "codec",
    "artifact",
    "fingerprint",
    "places",
    "keys",
    "records",
    "sign",
    "subject",
    "cli_trust",
    "cli_store",
    "render_trust",
    "render_store",
    "openssf",
    "verdict",
    "hub",
    "render",
    "document",
    "cli",
    "economics",
    "prices",
    "figures",
    "cost",
    "paper",
    "render_cost",
    "render_bench",
    "cli_worth",
    "render_measure",
    "render_pack",
    "cli_pack",
    "options",
    "whole",
    "docstrings",
]
REPORT = f"""
import json, sys
print("\\n" + json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
COMMAND = """
import sys
from kvbuy.cli import main
sys.argv[0] = "kvbuy"
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def heavy_after(script: str, *arguments: str) -> list[str]:
    """The heavy packages that a fresh interpreter holds after a script."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script + REPORT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))},
    )
    assert done.returncode == 0, done.stderr
    heavy: list[str] = json.loads(done.stdout.splitlines()[-1])
    return heavy


@pytest.mark.parametrize("module", ["kvbuy", *(f"kvbuy.{name}" for name in LIGHT)])
def test_a_torch_free_module_imports_nothing_heavy(module: str) -> None:
    assert heavy_after(f"import {module}") == []


def test_help_imports_nothing_heavy() -> None:
    assert heavy_after(COMMAND, "--help") == []


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_inspect_imports_nothing_heavy(flags: list[str], tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "doc.kv.safetensors", *handmade())
    assert heavy_after(COMMAND, "inspect", str(artifact.path), *flags) == []


def test_convert_imports_no_torch(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "doc.kv.safetensors", *handmade())
    assert heavy_after(COMMAND, "convert", str(artifact.path)) == ["numpy"]


@pytest.mark.parametrize("verb", [["put"], ["ls"], ["check"], ["gc"]], ids=" ".join)
def test_the_store_imports_no_torch(verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUY_STORE", str(tmp_path / "store"))
    artifact = write_artifact(tmp_path / "doc.kv.safetensors", *handmade())
    rest = [str(artifact.path)] if verb == ["put"] else []
    assert heavy_after(COMMAND, "store", *verb, *rest) == ["numpy"]


def test_pack_ls_imports_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUY_CACHE", str(tmp_path))
    assert heavy_after(COMMAND, "pack", "ls") == ["numpy"]


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_measure_imports_no_torch(flags: list[str], tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "doc.kv.safetensors", *handmade())
    assert heavy_after(COMMAND, "measure", str(artifact.path), *flags) == ["numpy"]


def test_a_heavy_import_would_be_seen() -> None:
    assert heavy_after("import numpy") == ["numpy"]


def test_every_public_name_is_the_one_of_its_home() -> None:
    found = {name: getattr(kvbuy, name) for name in kvbuy.__all__}
    assert found == {name: getattr(import_module(f"kvbuy.{home}"), name) for name, home in kvbuy._HOMES.items()}


def test_dir_lists_the_public_names_before_they_are_loaded() -> None:
    assert heavy_after("import kvbuy; assert set(kvbuy.__all__) <= set(dir(kvbuy)), dir(kvbuy)") == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kvbuy' has no attribute 'novelty'"):
        _ = kvbuy.novelty


def test_type_checkers_see_exactly_the_public_names() -> None:
    body = ast.parse(Path(kvbuy.__file__).read_text(encoding="utf-8")).body
    (mirror,) = (node for node in body if isinstance(node, ast.If))
    imports = [node for node in mirror.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    assert sorted(seen, key=str) == kvbuy.__all__
    assert seen == {name: (f"kvbuy.{home}", name) for name, home in kvbuy._HOMES.items()}
