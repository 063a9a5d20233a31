"""The README is true: its commands run, its outputs have the shape shown, its Python runs, its help is the help."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SaveModel, tiny_llama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SCRIPTS = {"scripts/quickstart", "scripts/test"}  # the first has a test of its own below, the second is running this


def commands() -> list[tuple[str, str]]:
    """Every command of the README and the output shown after it, in order."""
    found = []
    for block in CONSOLE:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip("\n")))
    return [(command, output) for command, output in found if command not in SCRIPTS]


def shell(command: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a newcomer would, with this environment's programs first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = os.environ | {"PATH": path, "COLUMNS": "80"} | environment
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=settings, capture_output=True, text=True, check=False
    )


def labels(table: str) -> list[str]:
    """The first column of a table."""
    return [line[1:20].split("  ")[0].strip() for line in table.splitlines() if line[:2].strip() and line[0] == " "]


@pytest.mark.real
def test_the_readme_s_commands_and_python_run_in_order(tmp_path: Path) -> None:
    for command, shown in commands():
        ran = shell(command, tmp_path, KVBUY_KEYS=str(tmp_path / "keys"))
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
        if "--json" in command:
            assert json.loads(ran.stdout).keys() == json.loads(shown).keys(), command
        elif command == "kvbuy --help":
            assert ran.stdout.strip("\n") == shown
        elif command.startswith(("kvbuy verify", "kvbuy inspect")):
            assert labels(ran.stdout) == labels(shown), command
    script = tmp_path / "readme.py"
    script.write_text("\n".join(PYTHON), encoding="utf-8")
    ran = shell("python readme.py", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "exact" in ran.stdout.splitlines()


def test_every_verb_is_in_the_readme() -> None:
    from kvbuy.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert verbs == {verb for verb in verbs if f"kvbuy {verb}" in README}
    assert verbs


def test_every_relative_file_that_the_readme_names_exists() -> None:
    names = set(re.findall(r"`((?:kvbuy|scripts|tests)/[\w./]+)`", README))
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.real
@pytest.mark.parametrize("program", ["scripts/bench.py", "scripts/bench_codecs.py"])
def test_a_benchmark_that_the_readme_names_starts(program: str) -> None:
    """It takes minutes, so only its imports and options are tried here."""
    assert program in README
    ran = shell(f"python {program} --help", ROOT)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.real
def test_gpu_check_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    """On a tiny model, so that it runs the first time where there is one."""
    assert "scripts/gpu_check.py" in README
    ran = shell(f"python scripts/gpu_check.py --lengths 64 --repeats 1 --out {tmp_path}/check.json", ROOT)
    assert ran.returncode == 0, ran.stderr
    facts = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    found = next(value for name, value in facts.items() if name.startswith("random "))
    assert [(row["tokens"], row["exact"]) for row in found["bench"]["rows"]] == [(64, True)]
    assert found["verify"]["verdict"] == "exact"
    assert {one["name"] for one in found["measure"]} >= {"raw", "fast"}
    assert ran.stdout.splitlines()[-1].startswith(facts["device"])


@pytest.mark.real
def test_quickstart_runs_to_the_verdict_exact(save_model: SaveModel, tmp_path: Path) -> None:
    """With a tiny model in the place of the default: the script and its commands are what is tested here."""
    model = save_model(tiny_llama(max_position_embeddings=16384))
    ran = shell("scripts/quickstart", ROOT, KVBUY_MODEL=str(model))
    (ROOT / "LICENSE.kv.safetensors").unlink(missing_ok=True)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[1] for line in ran.stdout.splitlines() if line.startswith(" verdict")] == ["exact"]
    assert ran.stdout.count("\n$ kvbuy ") == 4
