"""Versions, changelog and workflows."""

import datetime
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import release
import yaml

TODAY = datetime.date(2026, 12, 1)


@pytest.fixture
def tree(repo: Path, tmp_path: Path) -> Path:
    """The files of this checkout that tell the version."""
    for name in ("pyproject.toml", "CHANGELOG.md", "deploy/helm/lorafleet/Chart.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repo / name, tmp_path / name)
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_this_checkout_tells_one_version(repo: Path) -> None:
    assert release.VERSION.fullmatch(release.check(repo))


def test_a_bump_moves_everything_together(tree: Path) -> None:
    unreleased = release.sections((tree / "CHANGELOG.md").read_text())["Unreleased"]
    release.bump(tree, "1.2.3", TODAY)
    assert set(release.versions(tree).values()) == {"1.2.3"}
    assert release.check(tree, "1.2.3") == "1.2.3"
    assert release.notes(tree, "1.2.3") == unreleased
    assert "## [Unreleased]\n\n## [1.2.3] - 2026-12-01\n" in (tree / "CHANGELOG.md").read_text()
    with pytest.raises(release.ReleaseError, match="1.2.3 is not newer than 1.2.3"):
        release.bump(tree, "1.2.3", TODAY)
    with pytest.raises(release.ReleaseError, match=r"nothing under ## \[Unreleased\]"):
        release.bump(tree, "1.3.0", TODAY)
    edit(tree / "CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n- more\n")
    release.bump(tree, "1.3.0-rc.1", TODAY)
    edit(tree / "CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n- still more\n")
    release.bump(tree, "1.3.0", TODAY)
    assert list(release.sections((tree / "CHANGELOG.md").read_text())) == ["Unreleased", "1.3.0", "1.3.0-rc.1", "1.2.3"]


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        (
            "deploy/helm/lorafleet/Chart.yaml",
            "appVersion: 1.2.3",
            "appVersion: 1.2.2",
            "Chart.yaml's appVersion is 1.2.2",
        ),
        ("deploy/helm/lorafleet/Chart.yaml", "appVersion: 1.2.3", "", "Chart.yaml has no appVersion"),
        ("pyproject.toml", 'version = "1.2.3"', 'version = "1.2.4"', "versions differ: pyproject.toml is 1.2.4"),
        ("CHANGELOG.md", "## [1.2.3] - 2026-12-01", "## [1.2.2] - 2026-12-01", r"no section ## \[1.2.3\] - DATE"),
        ("CHANGELOG.md", "## [1.2.3] - 2026-12-01", "## [1.2.3]", "section 1.2.3 has no date"),
        ("CHANGELOG.md", "## [1.2.3]", "## [1.2.3] - 2026-12-01\n\n## [1.10.0]", "not newest first: 1.2.3, 1.10.0"),
        ("CHANGELOG.md", "## [Unreleased]\n", "", r"does not begin with ## \[Unreleased\]"),
    ],
)
def test_what_does_not_agree_is_named(tree: Path, file: str, old: str, new: str, sentence: str) -> None:
    release.bump(tree, "1.2.3", TODAY)
    edit(tree / file, old, new)
    with pytest.raises(release.ReleaseError, match=sentence):
        release.check(tree)


def test_a_tag_must_be_the_version(tree: Path) -> None:
    release.bump(tree, "1.2.3", TODAY)
    with pytest.raises(release.ReleaseError, match=r"9\.9\.9 is to be released, but pyproject.toml is 1\.2\.3"):
        release.check(tree, "9.9.9")


def test_what_users_see_has_a_line_in_the_changelog() -> None:
    release.check_noted(["platform/serve/app.py", "CHANGELOG.md"])
    release.check_noted(["tests/deploy/test_release.py", "loadtests/fleet.py"])
    with pytest.raises(release.ReleaseError, match="ui/app.py changed"):
        release.check_noted(["tests/x.py", "ui/app.py"])


def test_workflows_are_sound(repo: Path, require: Callable[[str], str]) -> None:
    files = sorted((repo / ".github/workflows").glob("*.yaml"))
    assert files
    done = subprocess.run([require("actionlint"), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_may_little_and_run_what_was_pinned(repo: Path) -> None:
    for file in (repo / ".github/workflows").glob("*.yaml"):
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert workflow["concurrency"]["group"]
        for name, job in workflow["jobs"].items():
            writes = {scope for scope, right in job.get("permissions", {}).items() if right == "write"}
            assert writes <= {"packages"} or name == "notes"
            for step in job.get("steps", []):
                if "uses" in step:
                    assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"])
                assert "${{" not in step.get("run", "")  # what it says would be run
