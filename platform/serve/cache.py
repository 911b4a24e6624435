"""Images that were made before, by the fingerprint of the work that made them."""

import base64
import json
import logging
from collections import OrderedDict
from typing import Any, Protocol

from lorafleet.serve.config import CacheSettings
from lorafleet.serve.redis import connect
from lorafleet.serve.result import GenerationResult

logger = logging.getLogger(__name__)


class ResultCache(Protocol):
    async def get(self, fingerprint: str) -> GenerationResult | None: ...

    async def put(self, fingerprint: str, result: GenerationResult) -> None: ...

    async def close(self) -> None: ...


def make_cache(settings: CacheSettings) -> ResultCache:
    """Raises ConfigError."""
    return RedisCache(settings) if settings.redis_url else MemoryCache(settings.max_bytes)


class MemoryCache:
    """The results used last, up to so many bytes of images."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._results: OrderedDict[str, GenerationResult] = OrderedDict()

    async def get(self, fingerprint: str) -> GenerationResult | None:
        if fingerprint not in self._results:
            return None
        self._results.move_to_end(fingerprint)
        return self._results[fingerprint]

    async def put(self, fingerprint: str, result: GenerationResult) -> None:
        if fingerprint in self._results or size_of(result) > self._max_bytes:
            return
        self._results[fingerprint] = result
        self._bytes += size_of(result)
        while self._bytes > self._max_bytes:
            _, oldest = self._results.popitem(last=False)
            self._bytes -= size_of(oldest)

    async def close(self) -> None:
        return


class RedisCache:
    """Shared by gateways and kept over restarts. A Redis that fails is a cache without anything in it."""

    def __init__(self, settings: CacheSettings) -> None:
        assert settings.redis_url is not None
        self._redis = connect(settings.redis_url, "cache.redis_url")
        self._max_bytes = settings.max_bytes
        self._ttl_s = settings.ttl_s

    async def get(self, fingerprint: str) -> GenerationResult | None:
        try:
            stored = await self._redis.get(_key(fingerprint))
            return None if stored is None else _from_json(json.loads(stored))
        except Exception:  # whatever it is, the image can be made
            logger.warning("the cache cannot be read", exc_info=True)
            return None

    async def put(self, fingerprint: str, result: GenerationResult) -> None:
        if size_of(result) > self._max_bytes:
            return
        try:
            await self._redis.set(_key(fingerprint), json.dumps(_to_json(result)), ex=round(self._ttl_s))
        except Exception:  # as above
            logger.warning("the cache cannot be written", exc_info=True)

    async def close(self) -> None:
        await self._redis.aclose()


def size_of(result: GenerationResult) -> int:
    return sum(map(len, result.images))


def _key(fingerprint: str) -> str:
    return f"lorafleet:image:{fingerprint}"


def _to_json(result: GenerationResult) -> dict[str, Any]:
    images = [base64.b64encode(png).decode() for png in result.images]
    return {"images": images, "seeds": result.seeds, "timings": result.timings, "warnings": result.warnings}


def _from_json(content: dict[str, Any]) -> GenerationResult:
    return GenerationResult(**{**content, "images": [base64.b64decode(image) for image in content["images"]]})
