"""The replicas that are up, as this process was last told.

A module of its own: Ray Serve hands the router's class (routing.py) on by value, so that what that class or its module
kept would be another one's than who imports it sees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafleet.serve.channel import Address


@dataclass(frozen=True)
class Known:
    """A replica: where it takes work, and what it last said of itself (`Report`)."""

    address: Address
    stats: Mapping[str, Any]


replicas: Mapping[str, Known] | None = None
"""By their ids, a new mapping whenever anything changes; None before this process was told anything."""


def note(up: Mapping[str, Known]) -> None:
    """These are up. From any thread."""
    global replicas
    replicas = up
