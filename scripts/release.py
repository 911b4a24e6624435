"""One version in pyproject.toml, Chart.yaml and CHANGELOG.md: checked, and moved on together. Standard library only.

release.py check [VERSION]   they agree (and are VERSION); the changelog's sections are in order
release.py bump VERSION      sets it, and makes the changelog's Unreleased section its own; commit and tag are yours
release.py notes VERSION     the changelog's section, for a release's page
release.py noted COMMIT      what changed since is in the changelog, if users can see it
"""

import argparse
import datetime
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
UNRELEASED: Final = "Unreleased"
VERSION: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:-([0-9A-Za-z.]+))?")
SECTION: Final = re.compile(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?[ \t]*$", re.MULTILINE)
SEEN_BY_USERS: Final = re.compile(r"^(platform|ui|deploy|models)/|^(Dockerfile|pyproject\.toml)$")


class ReleaseError(Exception):
    """What is wrong, in a sentence that names the file."""


def versions(root: Path) -> dict[str, str]:
    """By the place that tells it."""
    chart = (root / "deploy/helm/lorafleet/Chart.yaml").read_text("utf-8")
    found = {"pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]}
    for key in ("version", "appVersion"):
        match = re.search(rf'^{key}: "?([^"\s]+)"?$', chart, re.MULTILINE)
        if match is None:
            raise ReleaseError(f"deploy/helm/lorafleet/Chart.yaml has no {key}: add `{key}: X.Y.Z`")
        found[f"Chart.yaml's {key}"] = match[1]
    return found


def sections(changelog: str) -> dict[str, str]:
    """The text of each version of the changelog, newest first."""
    heads = list(SECTION.finditer(changelog))
    ends = [*(head.start() for head in heads[1:]), len(changelog)]
    return {head[1]: changelog[head.end() : end].strip() for head, end in zip(heads, ends, strict=True)}


def check(root: Path, wanted: str | None = None) -> str:
    """The one version. Raises ReleaseError.

    The changelog may lack it only while it has never been released: then everything is under Unreleased.
    """
    told = versions(root)
    if len(set(told.values())) != 1:
        places = ", ".join(f"{place} is {version}" for place, version in told.items())
        raise ReleaseError(f"versions differ: {places}; set them with scripts/release.py bump")
    (version,) = set(told.values())
    if not VERSION.fullmatch(version):
        raise ReleaseError(f"pyproject.toml's version {version} is none: write MAJOR.MINOR.PATCH")
    if wanted is not None and wanted != version:
        raise ReleaseError(
            f"{wanted} is to be released, but pyproject.toml is {version}: tag v{version}, or bump first"
        )
    changelog = (root / "CHANGELOG.md").read_text("utf-8")
    known = sections(changelog)
    if next(iter(known), None) != UNRELEASED:
        raise ReleaseError(f"CHANGELOG.md does not begin with ## [{UNRELEASED}]: put that section on top")
    released = [name for name in known if name != UNRELEASED]
    if released != sorted(released, key=_key, reverse=True):
        raise ReleaseError(f"CHANGELOG.md's sections are not newest first: {', '.join(released)}")
    if version not in known and (wanted is not None or released):
        raise ReleaseError(
            f"CHANGELOG.md has no section ## [{version}] - DATE: write one, or use scripts/release.py bump"
        )
    if undated := [head[1] for head in SECTION.finditer(changelog) if head[1] != UNRELEASED and head[2] is None]:
        raise ReleaseError(f"CHANGELOG.md's section {undated[0]} has no date: write ## [{undated[0]}] - YYYY-MM-DD")
    return version


def bump(root: Path, version: str, today: datetime.date) -> None:
    """Raises ReleaseError for one that is not newer than the last, or has nothing in the changelog."""
    if not VERSION.fullmatch(version):
        raise ReleaseError(f"{version} is no version: write MAJOR.MINOR.PATCH")
    file = root / "CHANGELOG.md"
    changelog = file.read_text("utf-8")
    known = sections(changelog)
    released = [name for name in known if name != UNRELEASED]
    if released and _key(version) <= _key(released[0]):
        raise ReleaseError(f"{version} is not newer than {released[0]}, the last in CHANGELOG.md: take a higher one")
    if not known.get(UNRELEASED):
        raise ReleaseError(f"CHANGELOG.md has nothing under ## [{UNRELEASED}]: what is released? Write it down first")
    head = f"## [{UNRELEASED}]"
    file.write_text(changelog.replace(head, f"{head}\n\n## [{version}] - {today.isoformat()}", 1), encoding="utf-8")
    _replace(root / "pyproject.toml", r'^version = "[^"]+"$', f'version = "{version}"')
    chart = root / "deploy/helm/lorafleet/Chart.yaml"
    _replace(chart, r"^version: .+$", f"version: {version}")
    _replace(chart, r"^appVersion: .+$", f"appVersion: {version}")


def notes(root: Path, version: str) -> str:
    """Raises ReleaseError for a version that the changelog does not know."""
    known = sections((root / "CHANGELOG.md").read_text("utf-8"))
    if not known.get(version):
        raise ReleaseError(f"CHANGELOG.md says nothing of {version}: it knows {', '.join(known)}")
    return known[version]


def check_noted(changed: Sequence[str]) -> None:
    """Raises ReleaseError if there are changes that users see, and none of the changelog."""
    seen = [path for path in changed if SEEN_BY_USERS.match(path)]
    if seen and "CHANGELOG.md" not in changed:
        raise ReleaseError(f"{seen[0]} changed, CHANGELOG.md did not: add a line under ## [{UNRELEASED}]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("version", nargs="?")
    for name in ("bump", "notes"):
        commands.add_parser(name).add_argument("version")
    commands.add_parser("noted").add_argument("commit")
    asked = parser.parse_args()
    try:
        match asked.command:
            case "check":
                print(check(ROOT, asked.version))
            case "bump":
                bump(ROOT, asked.version, datetime.datetime.now(datetime.UTC).date())
            case "notes":
                print(notes(ROOT, asked.version))
            case "noted":
                command = ["git", "-C", str(ROOT), "diff", "--name-only", f"{asked.commit}...HEAD"]
                check_noted(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def _key(version: str) -> tuple[int, int, int, bool, str]:
    match = VERSION.fullmatch(version)
    if match is None:
        raise ReleaseError(f"CHANGELOG.md's section {version} is no version: write MAJOR.MINOR.PATCH")
    return int(match[1]), int(match[2]), int(match[3]), match[4] is None, match[4] or ""


def _replace(file: Path, pattern: str, line: str) -> None:
    text, found = re.subn(pattern, line, file.read_text("utf-8"), count=1, flags=re.MULTILINE)
    if not found:
        raise ReleaseError(f"{file.name} has no line like {line}: add it")
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
