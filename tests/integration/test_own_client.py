"""Our own client and command line against the service."""

import asyncio
import io
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image as Pictures
from service import COMMAND

from lorafleet.client import AsyncClient, Client, Done, Image, Step
from lorafleet.core.errors import AdapterInUse, AdapterNotFound, InvalidAdminKey, InvalidRequest, JobNotFound
from lorafleet.core.generation import AdapterUse, GenerationRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.recipe import extract

REQUEST = GenerationRequest(prompt="red apple on a blue background", steps=4, seed=7, num_images=2)


def test_the_same_images_by_every_way(service_url: str) -> None:
    with Client(service_url) as client:
        assert client.ready()
        assert client.models()[0] == "emojixl"  # and what other tests pushed
        plain = client.generate(REQUEST)
        events = list(client.stream(REQUEST.model_copy(update={"seed": 8}), previews=1))
        assert sum(isinstance(event, Step) for event in events) == 8
        assert isinstance(events[-1], Done)
        assert [event.seed for event in events if isinstance(event, Image)].count(8) == 1
        job = client.wait(client.submit(REQUEST).id)
        assert [image.png for image in job.images] == plain.images
        recipe = extract(plain.images[0])
        assert client.generate(recipe).images == plain.images[:1]

    async def main() -> list[bytes]:
        async with AsyncClient(service_url) as client:
            found = [event async for event in client.stream(REQUEST)]
            return [event.png for event in found if isinstance(event, Image)]

    assert sorted(asyncio.run(main())) == sorted(plain.images)


def test_pictures_in(service_url: str) -> None:
    buffer = io.BytesIO()
    Pictures.new("RGBA", (128, 128), (0, 0, 0, 0)).save(buffer, "PNG")
    one = REQUEST.model_copy(update={"num_images": 1})
    with Client(service_url) as client:
        star = client.generate(one).images[0]
        assert len(client.edit(one, star, mask=buffer.getvalue())) == 1
        made = client.generate(one, init_image=star, strength=0.5).images[0]
        recipe = extract(made)
        with pytest.raises(InvalidRequest, match="send that as init_image"):
            client.generate(recipe)
        assert client.generate(recipe, init_image=star).images == [made]


def test_adapters_are_named_and_used(service_url: str, admin: Client, adapter: Manifest) -> None:
    assert adapter.version in [entry.version for entry in admin.adapters.entries() if entry.name == "bold"]
    assert admin.adapters.alias("bold", "spring", "latest").versions == {adapter.version: 1.0}
    uses = [AdapterUse(name="bold@spring", weight=0.5)]
    one = REQUEST.model_copy(update={"num_images": 1})
    bold = one.model_copy(update={"adapters": uses})
    with Client(service_url) as client:
        plain, made = client.generate(one).images[0], client.generate(bold).images[0]
        assert pixels(made) != pixels(plain)
        assert extract(made).adapters == [AdapterUse(name=f"bold@{adapter.version}", weight=0.5)]
        assert pixels(client.edit(bold, plain, strength=1.0)[0]) != pixels(client.edit(one, plain, strength=1.0)[0])
        with pytest.raises(InvalidAdminKey):
            client.adapters.delete("bold")
        with pytest.raises(AdapterNotFound, match="bold"):
            client.adapters.show("bald")
    with pytest.raises(AdapterInUse):
        admin.adapters.delete("bold")
    assert admin.adapters.unalias("bold", "spring").versions == {}
    assert "spring" not in admin.adapters.show("bold").aliases


def pixels(png: bytes) -> bytes:
    with Pictures.open(io.BytesIO(png)) as image:
        return image.tobytes()


def test_errors_are_the_service_s(service_url: str) -> None:
    with Client(service_url) as client:
        with pytest.raises(InvalidRequest) as error:
            list(client.stream(REQUEST.model_copy(update={"width": 65})))
        assert error.value.param == "width"
        with pytest.raises(JobNotFound):
            client.job("none")


def test_the_command_line_streams(service_url: str, adapter: Manifest, tmp_path: Path) -> None:
    command = [COMMAND, "generate", "x", "--steps", "8", "--stream", "--preview", "small.png", "--url", service_url]
    command += ["--adapter", "bold:0.7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done
    assert done.stdout.startswith("out.png  seed ")
    with Pictures.open(tmp_path / "small.png") as preview:
        assert preview.size == (16, 16)
    recipe = extract(tmp_path / "out.png")
    assert (recipe.steps, recipe.adapters) == (8, [AdapterUse(name=f"bold@{adapter.version}", weight=0.7)])


def test_ctrl_c_calls_the_work_off(service_url: str, tmp_path: Path) -> None:
    command = [COMMAND, "generate", "x", "-n", "8", "--steps", "150", "--stream", "--preview", "small.png"]
    process = subprocess.Popen([*command, "--url", service_url], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "small.png").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1].endswith("lorafleet: stopped.\n")
    start = time.monotonic()
    with Client(service_url) as client:
        client.generate(GenerationRequest(prompt="y", steps=2))
    assert time.monotonic() - start < 3
