"""`lorafleet adapters` in a process of its own; only `push` loads torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from service import COMMAND

from lorafleet.core.adapter_cache import AdapterCache, sha256
from lorafleet.core.folder_storage import FolderStorage
from lorafleet.core.manifest import AdapterFacts, Manifest
from lorafleet.core.registry import Registry
from lorafleet.sdxl.adapter_file import base_targets
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter

Run = Callable[..., subprocess.CompletedProcess[str]]
FACTS = AdapterFacts(format="kohya", rank=4, alpha=2, modules={"unet": 3}, fits_fingerprint="ba5e" * 16)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `lorafleet adapters ...` in an empty folder; environment variables by keyword."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        base = {"PATH": "/usr/bin:/bin", "LORAFLEET_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [COMMAND, "adapters", *arguments],
            cwd=tmp_path,
            env=base | environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def two(tmp_path: Path) -> list[Manifest]:
    """Two versions of plush in the default registry."""
    fleet = Registry(FolderStorage(tmp_path / "home" / "registry"), AdapterCache(tmp_path / "cache", 1 << 30))
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, file in enumerate(files):
        file.write_text(f"weights {number}")
    return [fleet.push("plush", file, lambda _: FACTS) for file in files]


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def refused(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    assert done.returncode == code, done
    assert words in done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("lorafleet: ")
    assert done.stderr.count("\n") == 1


def test_a_real_file_is_checked_and_pushed(run: Run, tmp_path: Path) -> None:
    adapter = random_adapter(base_targets(BaseConfig()), 0, modules=r"unet\.mid.+attn1.+")
    file = tmp_path / "mine.safetensors"
    write_adapter(adapter, file)
    done = run("push", "plush", "mine.safetensors", "--json")
    pushed = answer(done)
    assert done.stderr == "checking mine.safetensors against emojixl ...\n"
    assert (pushed["name"], pushed["version"], pushed["rank"]) == ("plush", sha256(file), 8)
    done = run("pull", "plush", "-o", "again.safetensors")
    assert (done.returncode, done.stdout) == (0, "again.safetensors\n")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_list_and_show(run: Run, two: list[Manifest]) -> None:
    done = run("list")
    header, row = done.stdout.splitlines()
    assert header.split() == ["NAME", "VERSION", "VERSIONS", "RANK", "MB", "PUSHED", "ALIASES"]
    assert row.split()[:4] == ["plush", two[1].version[:12], "2", "4"]
    (entry,) = answer(run("list", "--json"))["adapters"]  # type: ignore[misc]
    assert (entry["name"], entry["version"]) == ("plush", two[1].version)
    shown = answer(run("show", f"plush@{two[0].version[:8]}", "--json"))
    assert shown["version"] == two[0].version
    assert [each["version"] for each in shown["versions"]] == [two[1].version, two[0].version]  # type: ignore[attr-defined]
    text = run("show", "plush").stdout
    assert f"version           {two[1].version}\n" in text
    assert f"alias latest      {two[1].version[:12]}\n" in text


def test_nothing_there_yet(run: Run, tmp_path: Path) -> None:
    done = run("list")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "no adapters yet: lorafleet adapters push NAME FILE\n"
    assert answer(run("list", "--json")) == {"adapters": []}


def test_aliases(run: Run, two: list[Manifest]) -> None:
    one, other = (manifest.version for manifest in two)
    assert run("promote", f"plush@{one[:8]}").stdout == f"plush@production is {one[:12]}\n"
    assert answer(run("show", "plush", "--json"))["version"] == one
    split = answer(run("alias", "plush", "test", "production=1", "latest=3", "--json"))
    assert split == {"name": "plush", "alias": "test", "versions": {one: 0.25, other: 0.75}}
    assert run("alias", "plush", "test", "latest").stdout == f"plush@test is {other[:12]}\n"
    refused(run("rm", "plush"), 1, "plush is in use by the aliases production, test: remove or repoint")
    assert run("alias", "plush", "test", "--remove").stdout == "plush@test is removed\n"
    assert answer(run("rm", "plush@latest", "--json")) == {"deleted": [f"plush@{other}"]}
    assert answer(run("gc", "--json")) == {"removed": [], "size_bytes": 0}


def test_pull_without_a_name_for_the_file(run: Run, two: list[Manifest], tmp_path: Path) -> None:
    pulled = answer(run("pull", f"plush@{two[0].version}", "--json"))
    assert (pulled["file"], pulled["version"]) == ("plush.safetensors", two[0].version)
    assert (tmp_path / "plush.safetensors").read_text() == "weights 0"


def test_settings_and_flags_say_where(run: Run, two: list[Manifest], tmp_path: Path) -> None:
    elsewhere = f"file://{tmp_path}/elsewhere"
    assert answer(run("list", "--registry", elsewhere, "--json")) == {"adapters": []}
    assert answer(run("list", "--json", LORAFLEET_REGISTRY__URL=elsewhere)) == {"adapters": []}
    here = str(tmp_path / "home" / "registry")
    done = run("list", "--json", "--registry", here, LORAFLEET_REGISTRY__URL=elsewhere, LORAFLEET_PORT="1")
    assert len(answer(done)["adapters"]) == 1  # type: ignore[arg-type]
    (tmp_path / "run.yaml").write_text(f"port: 8001\nregistry: {{url: {elsewhere}}}\n")
    assert answer(run("list", "--config", "run.yaml", "--json")) == {"adapters": []}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["show", "plusch"], 1, "no adapter plusch: did you mean plush?"),
        (["pull", "plush@nightly"], 1, "plush has no alias nightly: it has latest."),
        (["rm", "Plush"], 2, "an adapter's name must match ^[a-z0-9][a-z0-9._-]{0,63}$, not 'Plush'."),
        (["push", "../x", "0.safetensors"], 2, "an adapter's name must match"),
        (["push", "x", "none.safetensors"], 2, "cannot read none.safetensors: there is no such file."),
        (["pull", "plush", "-o", "none/x.safetensors"], 2, "none/x.safetensors is a folder, or in none that is there"),
        (["alias", "plush", "latest", "plush"], 2, "latest is what was pushed last and cannot be set"),
        (["alias", "plush", "test", "latest=0"], 2, "each with a weight above 0"),
        (["list", "--registry", "s4://x"], 2, "registry.url s4://x cannot be used: Protocol not known: s4"),
        (["list", "--registry", "0.safetensors"], 1, "cannot be used (Not a directory): check registry.url"),
        (["list", "--set", "registry.ulr=x"], 2, "unknown setting registry.ulr (from the command line); did you mean"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    run: Run, two: list[Manifest], arguments: list[str], code: int, words: str
) -> None:
    refused(run(*arguments), code, words)


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["push", "x"], ["alias", "plush", "x"], ["alias", "plush", "x", "a=b"], ["gc", "--older-than", "-1"]],
)
def test_bad_usage_is_code_2(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_as_output_is_refused(run: Run, two: list[Manifest], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(run("pull", "plush", "-o", "out"), 2, "out is a folder")


def test_listing_loads_nothing_heavy(two: list[Manifest], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom lorafleet.cli.main import main\n"
        "sys.argv = ['lorafleet', 'adapters', 'list']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'ray', 'diffusers', 'httpx', 'numpy', 'fastapi', 'fsspec', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environ = {"LORAFLEET_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=60, env=environ)
