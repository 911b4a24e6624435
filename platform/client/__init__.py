"""A typed client for a running Lorafleet. No torch, no Ray."""

from lorafleet.client.http import Client, GenerateResult

__all__ = ["Client", "GenerateResult"]
