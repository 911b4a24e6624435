"""The registry over HTTP: everybody may look, who has the admin key may change it."""

import hmac
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends, FastAPI, Path, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from lorafleet.core.errors import AdapterTooLarge, AdminKeyUnset, InvalidAdminKey
from lorafleet.core.manifest import ALIAS_PATTERN, NAME_PATTERN, REFERENCE_PATTERN, Entry, Manifest
from lorafleet.serve.body import BodyTooLarge, read_body, read_upload
from lorafleet.serve.openapi import errors, form_body, json_body
from lorafleet.serve.schemas import (
    AdapterAlias,
    AdapterBody,
    AdapterDetails,
    AdapterEntry,
    AdapterList,
    AdaptersDeleted,
    AdapterVersion,
    AliasBody,
)
from lorafleet.serve.service import Service

FORM_BYTES = 64 << 10  # of a push, beside its file
ALIAS_BYTES = 64 << 10
T = TypeVar("T")
# Patterns for the document: the registry checks them itself, with a sentence that helps.
ReferenceInPath = Annotated[str, Path(json_schema_extra={"pattern": REFERENCE_PATTERN})]
NameInPath = Annotated[str, Path(json_schema_extra={"pattern": NAME_PATTERN})]
AliasInPath = Annotated[str, Path(json_schema_extra={"pattern": ALIAS_PATTERN})]


def add(app: FastAPI, service: Service) -> None:
    registry = service.fleet.registry
    admin = [Depends(admin_only(service.settings.admin_key))]

    async def change(name: str, how: Callable[[], T]) -> T:
        """In a thread, for as long as the store takes."""
        try:
            return await service.fleet.ask(how, timeout_s=None)
        finally:
            service.fleet.forget(name)

    @app.get("/v1/adapters", tags=["adapters"], responses=errors(503))
    async def list_adapters() -> AdapterList:
        """All adapters by name, each as the version that its bare name means."""
        return AdapterList(data=[_entry(entry) for entry in await service.fleet.entries()])

    @app.post(
        "/v1/adapters",
        tags=["adapters"],
        status_code=201,
        dependencies=admin,
        responses=errors(400, 401, 403, 409, 413, 415, 422, 503),
        openapi_extra=form_body(AdapterBody),
    )
    async def push_adapter(http: Request) -> Manifest:
        """Stores a file, once it is checked against the base that is loaded, as the newest version of a name."""
        limit = registry.max_adapter_bytes
        try:
            body, file = await read_upload(http, AdapterBody, "file", limit + FORM_BYTES)
        except BodyTooLarge as error:
            raise AdapterTooLarge(
                f"the adapter file is larger than the {limit} bytes that the registry takes: train a lower rank, "
                "store it as float16, or raise registry.max_adapter_bytes.",
                param="file",
            ) from error
        with file:
            return await service.push(body.name, file)

    @app.get("/v1/adapters/{name}", tags=["adapters"], responses=errors(404, 422, 503))
    async def show_adapter(name: ReferenceInPath) -> AdapterDetails:
        """The version that NAME, NAME@ALIAS or NAME@VERSION means, and what else there is of its name."""
        manifest = (await service.fleet.ask(lambda: registry.resolve(name, draw=0.0))).manifest
        record = await service.fleet.ask(lambda: registry.record(manifest.name))
        versions = [AdapterVersion(version=each.version, pushed_at=each.pushed_at) for each in record.manifests]
        return AdapterDetails(**dict(manifest), aliases=record.entry.aliases, versions=versions)

    @app.delete(
        "/v1/adapters/{name}",
        tags=["adapters"],
        dependencies=admin,
        responses=errors(401, 403, 404, 409, 422, 503),
    )
    async def delete_adapter(name: ReferenceInPath) -> AdaptersDeleted:
        """Deletes NAME@VERSION, or of a bare NAME all versions, unless an alias points there."""
        gone = await change(name.partition("@")[0], lambda: registry.delete(name))
        return AdaptersDeleted(deleted=[f"{each.name}@{each.version}" for each in gone])

    @app.put(
        "/v1/adapters/{name}/aliases/{alias}",
        tags=["adapters"],
        dependencies=admin,
        responses=errors(400, 401, 403, 404, 413, 415, 422, 503),
        openapi_extra=json_body(AliasBody),
    )
    async def set_alias(name: NameInPath, alias: AliasInPath, http: Request) -> AdapterAlias:
        """Points an alias at a version, or at several that share the requests; `production` is what a bare name
        means."""
        body = await read_body(http, AliasBody, ALIAS_BYTES)
        shares = await change(name, lambda: registry.alias(name, alias, body.shares()))
        return AdapterAlias(name=name, alias=alias, versions=shares)

    @app.delete(
        "/v1/adapters/{name}/aliases/{alias}",
        tags=["adapters"],
        dependencies=admin,
        responses=errors(401, 403, 404, 422, 503),
    )
    async def delete_alias(name: NameInPath, alias: AliasInPath) -> AdapterAlias:
        """Removes an alias; the versions stay."""
        await change(name, lambda: registry.unalias(name, alias))
        return AdapterAlias(name=name, alias=alias, versions={})


def admin_only(key: SecretStr | None) -> Callable[..., None]:
    """Lets in who has the key."""
    bearer = HTTPBearer(auto_error=False, description="the setting admin_key")

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if key is None:
            raise AdminKeyUnset(
                "the adapters cannot be changed over HTTP here: set admin_key, or use `lorafleet adapters`",
            )
        if given is None or not hmac.compare_digest(given.credentials.encode(), key.get_secret_value().encode()):
            what = "is missing" if given is None else "is a wrong one"
            raise InvalidAdminKey(f"the admin key {what}: send the header Authorization: Bearer KEY")

    return check


def _entry(entry: Entry) -> AdapterEntry:
    return AdapterEntry(**dict(entry.manifest), aliases=entry.aliases, versions=list(entry.versions))
