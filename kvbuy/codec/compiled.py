"""Compiling with numba, once a machine: what is kept is of these very sources.

numba looks at the file of a function alone when it decides whether a compiled one is still good; the codec's functions
are inlined across files. So the results lie in kvbuy's cache under the digest of all of them.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

from kvbuy.places import cache_folder

Function = TypeVar("Function", bound=Callable[..., Any])

SETTINGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}
SWITCHES: Any = numba.config


def compiled(function: Function) -> Function:
    """Compile a function of integers. (Its floats are guesses, or integers below 2**24: any order of sums will do.)"""
    before, SWITCHES.CACHE_DIR = SWITCHES.CACHE_DIR, str(_KEPT)
    try:
        return cast(Function, numba.njit(cache=True, **SETTINGS)(function))
    except RuntimeError:  # nowhere to keep it
        return cast(Function, numba.njit(**SETTINGS)(function))
    finally:
        SWITCHES.CACHE_DIR = before


def inlined(function: Function) -> Function:
    """Compile a function into its callers."""
    return cast(Function, numba.njit(forceinline=True, **SETTINGS)(function))


def _folder() -> Path:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return Path(SWITCHES.CACHE_DIR or cache_folder() / "numba") / f"{numba.__version__}-{digest[:16]}"


_KEPT = _folder()
if not _KEPT.is_dir():
    logging.getLogger(__name__).warning("compiling the codec dense for this machine, once: about half a minute")
