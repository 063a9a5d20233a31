"""Fuzz an artifact's header with atheris (pip install '.[fuzz]'): python scripts/fuzz.py [-runs=N] [-max_total_time=S]

Whatever bytes come, an artifact is refused with a KvbuyError or is intact. Anything else stops the run.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvbuy"]):
    from kvbuy.artifact import Artifact
    from kvbuy.errors import KvbuyError
    from kvbuy.reader import check_contents

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "v1"
scratch = Path(tempfile.mkdtemp()) / "fuzzed.kv.safetensors"


def look(data: bytes) -> None:
    scratch.write_bytes(data)
    with suppress(KvbuyError):
        check_contents(Artifact.open(scratch))


def main() -> None:
    atheris.Setup([*sys.argv, "-rss_limit_mb=2000", "-timeout=5", str(GOLDEN)], look)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
