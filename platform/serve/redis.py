"""A connection to Redis, which is an extra."""

from typing import Any

from lorafleet.core.errors import ConfigError

BLOCK_S = 1.0  # how long a read waits for something new
TIMEOUT_S = 5.0


def connect(url: str, setting: str) -> Any:
    """An asyncio client; nothing is sent before it is used. Raises ConfigError."""
    try:
        from redis.asyncio import Redis
    except ImportError:
        raise ConfigError(f"{setting} needs the extra redis: pip install 'lorafleet[redis]'", param=setting) from None
    try:
        return Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, max_connections=10_000, protocol=2
        )
    except ValueError as error:
        raise ConfigError(
            f"{setting} is no Redis address such as redis://127.0.0.1:6379/0: {error}", param=setting
        ) from None
