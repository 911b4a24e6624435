"""What a caller says about a request in its headers."""

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from fastapi import Request

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.ranges import short

KEY_HEADER: Final = "idempotency-key"
MAX_KEY_CHARS: Final = 255
_VALID_KEY: Final = re.compile(rf"^[\x21-\x7e]{{1,{MAX_KEY_CHARS}}}$")


@dataclass(frozen=True)
class Terms:
    """`key`: requests with the same one are one request; None: each is its own."""

    key: str | None = None
    uses_cache: bool = True


def terms_of(http: Request) -> Terms:
    """Raises InvalidRequest. A key belongs to one route and one API key."""
    uses_cache = "no-cache" not in http.headers.get("cache-control", "").lower()
    given = http.headers.get(KEY_HEADER)
    if given is None:
        return Terms(uses_cache=uses_cache)
    if not _VALID_KEY.match(given):
        raise InvalidRequest(
            f"{KEY_HEADER} must be 1 to {MAX_KEY_CHARS} visible ASCII characters, got {short(given)}", param=KEY_HEADER
        )
    scope = "\n".join([http.url.path, http.headers.get("authorization", ""), given])
    return Terms(hashlib.sha256(scope.encode()).hexdigest(), uses_cache)
