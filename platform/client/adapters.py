"""The adapters of a service's registry, for both clients. Whoever changes them needs the service's admin key.

with Client("http://127.0.0.1:8000", api_key=ADMIN_KEY) as client:
    client.adapters.push("plush", Path("plush.safetensors"))
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from lorafleet.client.exchange import Call, Interpreter
from lorafleet.client.results import AdapterAlias, AdapterDetails, AdapterEntry, AdapterList, AdaptersDeleted
from lorafleet.core.errors import InvalidRequest
from lorafleet.core.manifest import Manifest

ROUTE: Final = "/v1/adapters"


class Adapters:
    """For threads. Every method raises what the service answers: AdapterNotFound, InvalidAdminKey, ..."""

    def __init__(self, ask: Callable[[Call], Any], interpreter: Interpreter) -> None:
        self._ask = ask
        self._interpreter = interpreter

    def entries(self) -> list[AdapterEntry]:
        """All of them by name, each as the version that its bare name means."""
        return self._interpreter.parse(AdapterList, self._ask(Call("GET", ROUTE)), f"GET {ROUTE}").data

    def show(self, reference: str) -> AdapterDetails:
        """The version that NAME, NAME@ALIAS or NAME@VERSION means, and what else there is of its name."""
        call = _call("GET", reference)
        return self._interpreter.parse(AdapterDetails, self._ask(call), f"GET {ROUTE}/NAME")

    def push(self, name: str, file: Path) -> Manifest:
        """Sends a safetensors file, which becomes the newest version of `name` once the service has checked it.

        Raises InvalidRequest for a file that cannot be read, AdapterUnreadable, AdapterIncompatible, AdapterTooLarge.
        """
        with _push_call(name, file) as call:
            return self._interpreter.parse(Manifest, self._ask(call), f"POST {ROUTE}")

    def alias(self, name: str, alias: str, versions: str | Mapping[str, float]) -> AdapterAlias:
        """Points an alias at a version, or at several with the weights by which they share requests."""
        call = _alias_call(name, alias, versions)
        return self._interpreter.parse(AdapterAlias, self._ask(call), f"PUT {ROUTE}/NAME/aliases/ALIAS")

    def unalias(self, name: str, alias: str) -> AdapterAlias:
        """Removes an alias; the versions stay."""
        call = _call("DELETE", name, "aliases", alias)
        return self._interpreter.parse(AdapterAlias, self._ask(call), f"DELETE {ROUTE}/NAME/aliases/ALIAS")

    def delete(self, reference: str) -> list[str]:
        """Deletes NAME@VERSION, or of a bare NAME all versions, unless an alias points there; what is gone."""
        call = _call("DELETE", reference)
        return self._interpreter.parse(AdaptersDeleted, self._ask(call), f"DELETE {ROUTE}/NAME").deleted


class AsyncAdapters:
    """`Adapters`, method by method, for an event loop."""

    def __init__(self, ask: Callable[[Call], Awaitable[Any]], interpreter: Interpreter) -> None:
        self._ask = ask
        self._interpreter = interpreter

    async def entries(self) -> list[AdapterEntry]:
        """All of them by name, each as the version that its bare name means."""
        return self._interpreter.parse(AdapterList, await self._ask(Call("GET", ROUTE)), f"GET {ROUTE}").data

    async def show(self, reference: str) -> AdapterDetails:
        """The version that NAME, NAME@ALIAS or NAME@VERSION means, and what else there is of its name."""
        call = _call("GET", reference)
        return self._interpreter.parse(AdapterDetails, await self._ask(call), f"GET {ROUTE}/NAME")

    async def push(self, name: str, file: Path) -> Manifest:
        """Sends a safetensors file, which becomes the newest version of `name` once the service has checked it.

        Raises InvalidRequest for a file that cannot be read, AdapterUnreadable, AdapterIncompatible, AdapterTooLarge.
        """
        with _push_call(name, file) as call:
            return self._interpreter.parse(Manifest, await self._ask(call), f"POST {ROUTE}")

    async def alias(self, name: str, alias: str, versions: str | Mapping[str, float]) -> AdapterAlias:
        """Points an alias at a version, or at several with the weights by which they share requests."""
        call = _alias_call(name, alias, versions)
        return self._interpreter.parse(AdapterAlias, await self._ask(call), f"PUT {ROUTE}/NAME/aliases/ALIAS")

    async def unalias(self, name: str, alias: str) -> AdapterAlias:
        """Removes an alias; the versions stay."""
        call = _call("DELETE", name, "aliases", alias)
        return self._interpreter.parse(AdapterAlias, await self._ask(call), f"DELETE {ROUTE}/NAME/aliases/ALIAS")

    async def delete(self, reference: str) -> list[str]:
        """Deletes NAME@VERSION, or of a bare NAME all versions, unless an alias points there; what is gone."""
        call = _call("DELETE", reference)
        return self._interpreter.parse(AdaptersDeleted, await self._ask(call), f"DELETE {ROUTE}/NAME").deleted


def _call(method: str, *parts: str, json: Any = None) -> Call:
    return Call(method, "/".join((ROUTE, *(quote(part, safe="@") for part in parts))), json=json)


def _alias_call(name: str, alias: str, versions: str | Mapping[str, float]) -> Call:
    body = {"version": versions} if isinstance(versions, str) else {"versions": dict(versions)}
    return _call("PUT", name, "aliases", alias, json=body)


@contextmanager
def _push_call(name: str, file: Path) -> Iterator[Call]:
    """The file is read while it is sent, from its start at every try."""
    try:
        stream = file.open("rb")
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}.", param="file") from None
    with stream:
        yield Call("POST", ROUTE, data={"name": name}, files={"file": (file.name, stream)})
