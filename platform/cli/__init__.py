"""The `lorafleet` command. Every module imports what is heavy (torch, ray, httpx) only when it runs."""
