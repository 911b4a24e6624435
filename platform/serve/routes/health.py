"""Is anybody there, and can they work."""

from fastapi import FastAPI

from lorafleet.serve.openapi import errors
from lorafleet.serve.schemas import Status
from lorafleet.serve.service import Service


def add(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["health"])
    @app.get("/v2/health/live", tags=["health"])
    async def live() -> Status:
        """This process answers."""
        return Status(status="ok")

    @app.get("/readyz", tags=["health"], responses=errors(503))
    @app.get("/v2/health/ready", tags=["health"], responses=errors(503))
    async def ready() -> Status:
        """A replica has its model loaded and takes requests, or will as soon as somebody asks. `degraded` with reasons
        where it works without the registry or an adapter that was to be preloaded."""
        reasons = await service.health()
        return Status(status="degraded" if reasons else "ready", reasons=reasons)
