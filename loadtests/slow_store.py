"""An S3 whose downloads can be slow: moto's server behind a proxy of TCP connections, both on this machine."""

import asyncio
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BUCKET = "fleet"
PIECE_BYTES = 1 << 14


class SlowProxy:
    """`url`: every answer to a GET of an adapter's file whose path holds `slow` takes `seconds`; all else comes at
    once, as from `origin`."""

    def __init__(self, host: str, port: int, slow: str, seconds: float) -> None:
        self.origin, self.url = f"http://{host}:{port}", ""
        self._address = host, port
        self._slow = re.compile(rf"GET \S*{re.escape(slow)}\S*/adapter\.safetensors".encode())
        self._seconds = seconds
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        listening = asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_origin, to_origin = await asyncio.open_connection(*self._address)
        bytes_per_s: float | None = None
        is_slow = False

        async def forth() -> None:
            nonlocal is_slow, bytes_per_s
            while data := await reader.read(1 << 16):
                is_slow, bytes_per_s = bool(self._slow.match(data)), None
                to_origin.write(data)
                await to_origin.drain()

        async def back() -> None:
            nonlocal bytes_per_s
            while data := await from_origin.read(PIECE_BYTES):
                if is_slow and bytes_per_s is None:
                    length = re.search(rb"(?i)content-length: (\d+)", data)
                    bytes_per_s = int(length[1]) / self._seconds if length else None
                if bytes_per_s:
                    await asyncio.sleep(len(data) / bytes_per_s)
                writer.write(data)
                await writer.drain()

        ways = [asyncio.create_task(forth()), asyncio.create_task(back())]
        with suppress(ConnectionError):
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        writer.close()
        to_origin.close()


@contextmanager
def slow_s3(slow: str, seconds: float) -> Iterator[SlowProxy]:
    """With an empty bucket BUCKET; credentials for it are set for this process and those that it starts."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        os.environ.setdefault(f"AWS_{name}", value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = SlowProxy(*server.get_host_and_port(), slow, seconds)
    boto3.client("s3", endpoint_url=proxy.origin).create_bucket(Bucket=BUCKET)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
        server.stop()
