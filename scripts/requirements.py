"""Prints what the extras of pyproject.toml that are named need, so that an image has them in a layer of their own."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def needed(extra: str) -> Iterator[str]:
    for line in project["optional-dependencies"][extra]:
        if own := re.fullmatch(rf"{project['name']}\[(.+)\]", line):
            for other in own[1].split(","):
                yield from needed(other.strip())
        else:
            yield line


wanted = [*project["dependencies"], *(line for name in sys.argv[1:] for line in needed(name))]
print(*dict.fromkeys(wanted), sep="\n")
