"""The repository's frame: what is packaged, who may import whom, what the Makefile and README promise."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

# What is allowed to stand in the folder of models/ that an archive copy leaves out: 30 MiB that no test here needs.
LEAVE_OUT = shutil.ignore_patterns("__pycache__", "emojixl", "work", "*.egg-info")


@pytest.fixture(scope="module")
def project(repo: Path) -> dict[str, Any]:
    return tomllib.loads((repo / "pyproject.toml").read_text())


def copy_of(repo: Path, to: Path) -> Path:
    for name in ("platform", "models"):
        shutil.copytree(repo / name, to / name, ignore=LEAVE_OUT)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, to)
    return to


def test_platform_is_the_standard_library_s_from_the_root(repo: Path) -> None:
    script = "import platform, lorafleet.core.errors as e; print(platform.__file__); print(e.__file__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=repo, capture_output=True, text=True, check=True)
    standard, ours = done.stdout.splitlines()
    assert not standard.startswith(str(repo))
    assert ours == str(repo / "platform" / "core" / "errors.py")
    assert not (repo / "platform" / "__init__.py").exists()


def test_every_package_folder_is_mapped(repo: Path, project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    folders = {
        str(file.parent.relative_to(repo))
        for top in ("platform", "models")
        for file in (repo / top).rglob("__init__.py")
        if "emojixl" not in file.parts
    }
    assert set(setuptools["package-dir"].values()) == folders
    assert set(setuptools["package-dir"]) == set(setuptools["packages"])


def test_the_wheel_holds_code_data_and_the_command(repo: Path, tmp_path: Path) -> None:
    source = copy_of(repo, tmp_path / "source")
    model = source / "models" / "emojixl" / "unet"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model.parent / "samples.png").write_bytes(b"x")
    aliases = source / "models" / "registry" / "adapters" / "plush" / "aliases"
    aliases.mkdir(parents=True)
    (aliases / "latest").write_text("{}")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("lorafleet-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "lorafleet/core/py.typed",
        "lorafleet/cli/main.py",
        "lorafleet/serve/app.py",
        "lorafleet/models/emojixl/unet/config.json",
        "lorafleet/models/emojixl/samples.png",
        "lorafleet/models/registry/adapters/plush/aliases/latest",
    } <= names
    assert "lorafleet/__init__.py" not in names
    assert not [name for name in names if name.startswith(("platform/", "models/", "tests/"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    script = "import sys; sys.path.insert(0, sys.argv[1]); import lorafleet.cli.main as m, platform; print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, "installed"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == f"{tmp_path}/installed/lorafleet/cli/main.py\n"


@pytest.fixture(scope="module")
def linked(repo: Path, tmp_path_factory: pytest.TempPathFactory, project: dict[str, Any]) -> Path:
    """A copy of all packages laid out as `lorafleet/...`, to break on purpose."""
    root = tmp_path_factory.mktemp("imports")
    for name, folder in project["tool"]["setuptools"]["package-dir"].items():
        if name.count(".") == 1:
            shutil.copytree(repo / folder, root / name.replace(".", "/"), ignore=LEAVE_OUT)
    return root


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        ("", "", None),
        ("core", "import torch", "lorafleet.core is not allowed to import torch"),
        ("core", "import lorafleet.sdxl.base", "lorafleet.core is not allowed to import lorafleet.sdxl"),
        ("client", "import ray", "lorafleet.client is not allowed to import ray"),
        ("sdxl", "from ray import serve", "lorafleet.sdxl is not allowed to import ray"),
        ("sdxl", "import lorafleet.serve.app", "lorafleet.sdxl is not allowed to import lorafleet.serve"),
        ("serve", "import lorafleet.cli.main", "lorafleet.serve is not allowed to import lorafleet.cli"),
        (
            "serve",
            "from lorafleet.client import Client",
            "lorafleet.serve is not allowed to import lorafleet.client",
        ),
    ],
)
def test_imports_point_inward_and_a_wrong_one_is_caught(
    repo: Path, linked: Path, module: str, line: str, words: str | None
) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(linked)!r})\n"
        "from importlinter.cli import lint_imports\n"
        f"sys.exit(lint_imports(config_filename={str(repo / 'pyproject.toml')!r}, no_cache=True))"
    )
    added = linked / "lorafleet" / module / "wrong.py"
    if module:
        added.write_text(line + "\n")
    try:
        done = subprocess.run([sys.executable, "-c", script], cwd=linked, capture_output=True, text=True, check=False)
    finally:
        added.unlink(missing_ok=True)
    assert done.returncode == (1 if words else 0), done.stdout + done.stderr
    assert (words or "0 broken") in done.stdout


def test_only_the_settings_read_the_environment(repo: Path) -> None:
    """Others may set a variable for a library, and look whether they must not."""
    reads = []
    for file in sorted((repo / "platform").rglob("*.py")):
        if file == repo / "platform" / "core" / "config.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript) else ""
            if re.match(r"os\.getenv\(|os\.environ\.get\(", text) or (
                isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and text.startswith("os.environ[")
            ):
                reads.append(f"{file.relative_to(repo)}:{node.lineno}: {text}")
    assert reads == []


def test_constraints_satisfy_every_requirement(repo: Path, project: dict[str, Any]) -> None:
    lines = [line for line in (repo / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    exact = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(requirement for extra in extras for requirement in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name == "lorafleet":  # an extra of its own
            continue
        version = exact[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), requirement
    assert not [name for name in exact if name.startswith(("nvidia", "cuda"))]
    torch = next(Requirement(text) for text in wanted if text.startswith("torch"))
    assert all(torch.specifier.contains(version) for version in ("2.11.0", "2.13.0", "2.15.1"))


def test_the_readme_names_only_what_is_there(repo: Path) -> None:
    readme = (repo / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (repo / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (repo / link).exists(), link
    help_ = {}
    called = re.findall(
        r"\.venv/bin/lorafleet ((?:adapters |train (?=inspect|merge)|eval (?:arena )?)?\w+)([^#\n]*)", readme
    )
    for command in {command for command, _ in called}:
        name = str(Path(sys.executable).with_name("lorafleet"))
        words = ["train", "run"] if command == "train" else command.split()  # `train DATA` is short for it
        done = subprocess.run([name, *words, "--help"], capture_output=True, text=True, check=True)
        help_[command] = done.stdout
    for command, rest in called:
        for flag in re.findall(r"(?<!\S)(--?[a-z-]+)", rest):
            assert flag in help_[command], (command, flag)


def test_the_version_has_one_home(repo: Path, project: dict[str, Any]) -> None:
    assert metadata.version("lorafleet") == project["project"]["version"]
    assert "## [Unreleased]" in (repo / "CHANGELOG.md").read_text()
