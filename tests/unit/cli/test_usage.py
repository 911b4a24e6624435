"""The command line in a process of its own, as a person meets it; nothing here loads a model."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from service import COMMAND

Lorafleet = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def lorafleet(tmp_path: Path) -> Lorafleet:
    """Runs `lorafleet ...` in an empty folder; environment variables by keyword."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [COMMAND, *arguments]
        base = {"PATH": "/usr/bin:/bin", "LORAFLEET_HOME": str(tmp_path / "home")}
        return subprocess.run(
            command, cwd=tmp_path, env=base | environ, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def only_a_sentence(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    assert done.returncode == code, done
    assert words in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("lorafleet: ")
    assert done.stderr.count("\n") == 1


def test_version(lorafleet: Lorafleet) -> None:
    assert lorafleet("version").stdout == f"lorafleet {metadata.version('lorafleet')}\n"
    assert json.loads(lorafleet("version", "--json").stdout) == {"lorafleet": metadata.version("lorafleet")}


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["generate", "--help"], ["serve", "--help"]])
def test_quick_commands_load_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom lorafleet.cli.main import main\n"
        f"sys.argv = ['lorafleet', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'httpx', 'numpy', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert time.monotonic() - start < 3  # 0.18 s on an idle machine


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["generate"],
        ["generate", "x", "--steps", "many"],
        ["generate", "x", "--local", "--url", "http://127.0.0.1:1"],
        ["generate", "x", "--set", "base.id=y"],
        ["generate", "--recipe", "a.png", "-n", "2"],
        ["generate", "x", "--stream", "--local"],
        ["generate", "x", "--preview", "p.png"],
        ["serve", "--bogus"],
    ],
)
def test_bad_usage_is_code_2_and_says_why(lorafleet: Lorafleet, arguments: list[str]) -> None:
    done = lorafleet(*arguments)
    assert done.returncode == 2, done
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--steps", "0"], "steps must be an integer from 1 to 150, not 0."),
        (["x", "--guidance-scale", "nan"], "guidance_scale must be a number from 0 to 30, not nan."),
        (["x", "--scheduler", "pndm"], "scheduler must be one of euler, euler_a"),
        (["x", "-n", "0"], "num_images must be an integer from 1 to 8, not 0."),
        ([""], "prompt must be text of 1 to 2000 characters, not blank, not ''."),
        (["x", "-o", "none/x.png"], "there is no folder none to save x.png in."),
        (["x", "-o", "x.jpg"], "images are saved as PNG: x.jpg should end in .png."),
        (["--recipe", "none.png"], "cannot read none.png: No such file or directory."),
        (["--recipe", "text.png"], "text.png is not a PNG."),
        (["x", "--stream", "--preview", "p.jpg"], "images are saved as PNG: p.jpg should end in .png."),
        (["x", "--url", "localhost"], "the address must look like http://127.0.0.1:8000, not 'localhost'."),
    ],
)
def test_a_wrong_value_is_one_sentence_before_anything_runs(
    lorafleet: Lorafleet, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    only_a_sentence(lorafleet("generate", *arguments), 2, words)


def test_a_folder_as_output_is_refused(lorafleet: Lorafleet, tmp_path: Path) -> None:
    (tmp_path / "x-2.png").mkdir()
    only_a_sentence(lorafleet("generate", "x", "-n", "2", "-o", "x.png"), 2, "x-2.png is a folder")


def test_no_service_is_one_sentence(lorafleet: Lorafleet) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        only_a_sentence(lorafleet("generate", "x", "--url", url), 1, f"no Lorafleet at {url}: is `lorafleet serve`")


def test_printed_settings_can_be_given_back(lorafleet: Lorafleet, tmp_path: Path) -> None:
    first = lorafleet(
        "serve", "--set", "base.id=a/b", "--set", "base.revision=12e4", "--print-config", LORAFLEET_HOST="::1"
    )
    assert first.returncode == 0, first
    (tmp_path / "run.yaml").write_text(first.stdout)
    again = lorafleet("serve", "--config", "run.yaml", "--print-config")
    assert again.stdout == first.stdout
    settings = yaml.safe_load(first.stdout)
    assert (settings["base"]["id"], settings["base"]["revision"], settings["host"]) == ("a/b", "12e4", "::1")


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--port", "99999"], {}, "port must be an integer from 1 to 65535, but the command line says 99999."),
        (["--set", "prot=1"], {}, "unknown setting prot (from the command line); did you mean port?"),
        (["--set", "port"], {}, "--set takes NAME=VALUE"),
        (["--config", "none.yaml"], {}, "cannot read the settings file none.yaml: No such file or directory."),
        ([], {"LORAFLEET_PROT": "1"}, "unknown setting prot (from the environment variable LORAFLEET_PROT)"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    lorafleet: Lorafleet, arguments: list[str], environ: dict[str, str], words: str
) -> None:
    only_a_sentence(lorafleet("serve", *arguments, **environ), 2, words)
    only_a_sentence(lorafleet("serve", *arguments, "--print-config", **environ), 2, words)


def test_ctrl_c_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as silent:  # accepts, never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        command = [COMMAND, "generate", "x", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        connection, _ = silent.accept()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "lorafleet: stopped.\n")
        assert process.returncode == 130
        connection.close()


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([COMMAND, "version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "lorafleet: [Errno 28] No space left on device\n")
