"""The OpenAPI document and the page that shows it."""

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from lorafleet.core.errors import NotReady
from lorafleet.serve.openapi import describe
from lorafleet.serve.service import Service


def add(app: FastAPI, service: Service) -> None:
    """FastAPI's own would not know the base, and its page takes Swagger's scripts from other hosts."""
    app.mount("/docs/static", StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        try:
            limits = (await service.model()).limits
        except NotReady:
            limits = None
        return JSONResponse(describe(app, limits))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/docs/static/favicon.png",
        )
