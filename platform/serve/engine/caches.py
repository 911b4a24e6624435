"""What a start leaves on disk for the next one: what was compiled, and what was measured of a base."""

import json
import logging
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from lorafleet.core.config import home

logger = logging.getLogger(__name__)


def directory() -> Path:
    return home() / "cache" / "engine"


def keep_compiled() -> None:
    """Before anything is compiled. PyTorch and Triton have folders of their own else, one of them in /tmp, which a new
    container has lost. What the environment says stays, but for PyTorch's default, which PyTorch itself puts there."""
    if cache_dir() == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory() / "inductor")
    os.environ.setdefault("TRITON_CACHE_DIR", str(directory() / "triton"))


def measured(kind: str, depends_on: object, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """`measure()`, or what it said when it last was called for this `kind` and the same of what it depends on, anything
    that JSON can say. A file that cannot be read or written costs a warning and the time to measure."""
    path = directory() / kind / f"{sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return {name: float(number) for name, number in found.items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("measuring again, %s is of no use: %s", path, error)
    numbers = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(numbers))
        partial.replace(path)
    except OSError as error:
        logger.warning("the next start measures again: %s", error)
    return numbers
