"""mypy over every package. It cannot follow the `package-dir` map of pyproject.toml, so it gets it as links."""

import subprocess
import sys
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
tree = root / ".mypy_cache" / "tree"
setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
packages = [name for name in setuptools["packages"] if name.count(".") == 1]  # the others lie inside these
for name in packages:
    link = tree / name.replace(".", "/")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(root / setuptools["package-dir"][name])
arguments = [word for name in packages for word in ("-p", name)]
command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), *arguments]
sys.exit(subprocess.run(command, cwd=tree, check=False).returncode)
