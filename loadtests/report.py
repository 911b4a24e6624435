"""What a bench found: rows printed as they come, kept as JSON and as a Markdown table with machine and versions."""

import datetime
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from lorafleet.core.recipe import versions

RESULTS: Final = Path(__file__).parent / "results"
COLUMNS: Final = {
    "at_once": "at once",
    "samples": "samples",
    "img_s": "img/s",
    "median_ms": "median ms",
    "p95_ms": "p95 ms",
    "peak_gb": "peak GB",
}


@dataclass(frozen=True)
class Row:
    """One line of the table; a figure that is None was not measured. `peak_gb`: of the GPU's memory as torch hands it
    out, without a GPU of the process's since it started. `seconds`: what `img_s` was counted over."""

    part: str
    what: str
    at_once: int | None = None
    samples: int | None = None
    img_s: float | None = None
    median_ms: float | None = None
    p95_ms: float | None = None
    peak_gb: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass
class Report:
    """Rows in order. With `path` they are written there after each one, so that a bench that is stopped leaves what
    it has; beside it the table, as .md."""

    about: dict[str, Any]
    path: Path | None = None
    budget_s: float = float("inf")
    rows: list[Row] = field(default_factory=list)
    failures: int = 0
    _start: float = field(default_factory=time.monotonic)
    _busy_before_s: float | None = field(default_factory=lambda: _busy_elsewhere_s())

    def add(self, row: Row) -> None:
        self.rows.append(row)
        figures = "  ".join(f"{_shown(row, key):>8} {name}" for key, name in COLUMNS.items() if _shown(row, key))
        print(f"[{self.elapsed_s:4.0f} s] {row.part}: {row.what:<44} {figures}  {row.note}".rstrip(), flush=True)
        self._save()

    def attempt(self, part: str, what: str, estimate_s: float, measure: Callable[[], Row | None]) -> None:
        """Adds what `measure` returns, or says why there is nothing: too little time is left, or it failed."""
        if self.elapsed_s + estimate_s > self.budget_s:
            self.add(Row(part, what, note=f"skipped: about {estimate_s:.0f} s do not fit into the budget"))
            return
        try:
            row = measure()
        except Exception as error:  # the other rows are still worth their time
            self.failures += 1
            reason = (str(error).strip().splitlines() or [""])[0]
            row = Row(part, what, note=f"failed: {type(error).__name__}: {reason}")
        if row is not None:
            self.add(row)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def all_about(self) -> dict[str, Any]:
        """`about`, and how quiet the machine was: figures from a CPU that others use too are worth little."""
        busy_s = _busy_elsewhere_s()
        if busy_s is None or self._busy_before_s is None:
            return self.about
        cores = max(0.0, busy_s - self._busy_before_s) / max(self.elapsed_s, 1e-3)
        return {**self.about, "other programs": f"used {cores:.1f} cores meanwhile"}

    def markdown(self) -> str:
        about = [f"- {name}: {_inline(value)}" for name, value in self.all_about().items()]
        heads = ["part", "what", *COLUMNS.values(), "note"]
        lines = [
            [row.part, row.what, *(_shown(row, key) for key in COLUMNS), row.note.replace("|", "\\|")]
            for row in self.rows
        ]
        rule = ["---", "---", *("---:" for _ in COLUMNS), "---"]
        table = ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines)]
        return "\n".join(["# Engine bench", "", *about, "", *table, ""])

    def _save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {**self.all_about(), "rows": [asdict(row) for row in self.rows]}
            self.path.write_text(json.dumps(content, indent=1) + "\n")
            self.path.with_suffix(".md").write_text(self.markdown())


def about(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, day and command; no names of hosts, people or folders."""
    found = {**versions(), "python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(device),
        "versions": found,
        "peak GB": "of GPU memory, as torch hands it out"
        if device.type == "cuda"
        else "of the process since its start",
        "command": " ".join(["python", "loadtests/engine_bench.py", *map(_quoted, arguments)]),
    }


def machine(device: torch.device) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{_cpu_model()}, {cores} cores"
    if device.type != "cuda":
        return f"{cpu}, torch with {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB ({cpu})"


def default_path(about: dict[str, Any]) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r" \(.*|, torch.*|\(R\)", "", about["machine"]).lower()).strip("-")
    return RESULTS / f"{about['date']}-{name}.json"


def _busy_elsewhere_s() -> float | None:
    """Core seconds since the machine's start that neither were idle nor this process's; None where nothing says so."""
    try:
        ticks = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _cpu_model() -> str:
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _quoted(argument: str) -> str:
    return shlex.quote(Path(argument).name if Path(argument).is_absolute() else argument)


def _inline(value: object) -> str:
    return ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else str(value)


def _shown(row: Row, key: str) -> str:
    value = getattr(row, key)
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if key in ("img_s", "peak_gb") or value < 100 else f"{value:.0f}"
