"""A run's report: one HTML file with its curves, pictures and figures in it, that needs nothing else."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lorafleet.core.config import dump
from lorafleet.core.manifest import Manifest
from lorafleet.train.config import TrainConfig
from lorafleet.train.watch import PROGRESS_FILE, read_progress

REPORT_FILE: Final = "report.html"
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c2330 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .2rem .9rem .2rem 0; text-align: left }
th { font-weight: 600; border-bottom: 1px solid #c8ccd4 } td.n { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: 0 .5rem 1rem 0 } figcaption { font-size: 12px; max-width: 10rem }
.pictures img { width: 10rem; image-rendering: auto } pre { background: #f4f5f7; padding: 1rem; overflow-x: auto }
svg { max-width: 100%; height: auto }
"""


def write_report(folder: Path, config: TrainConfig, summary: Mapping[str, Any], manifest: Manifest | None) -> Path:
    """Writes `report.html` into the run's folder from what lies there."""
    until = summary["progress"]["step"]
    steps = read_progress(folder / PROGRESS_FILE, "step", until_step=until)
    validations = read_progress(folder / PROGRESS_FILE, "validation", until_step=until)
    body = "\n".join(
        [
            f"<h1>{html.escape(summary['name'])}</h1>",
            _table(("what", "value"), _facts(summary, steps, validations, manifest)),
            "<h2>Loss</h2>",
            _curves(steps, validations),
            "<h2>Before and after</h2>" if config.validation.prompts else "",
            _pictures(folder / "samples", config.validation.prompts, until),
            "<h2>Trainable parameters</h2>",
            _parameters(summary["parameters"]),
            "<h2>Settings</h2>",
            f"<pre>{html.escape(dump(config))}</pre>",
        ]
    )
    title = html.escape(f"training of {summary['name']}")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    path = folder / REPORT_FILE
    path.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n', "utf-8")
    return path


def _facts(
    summary: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
    manifest: Manifest | None,
) -> list[tuple[str, ...]]:
    progress = summary["progress"]
    trained = sum(row["trainable"] for row in summary["parameters"])
    unet = next(row["base"] for row in summary["parameters"] if row["part"] == "unet")
    images = sum(step["samples"] for step in steps)
    rows = [
        ("base", f"{summary['base']}, {summary['base_fingerprint'][:12]}, {summary['dtype']}"),
        ("data", f"{summary['images']} images, {summary['held_out']} held out, {summary['data_fingerprint']}"),
        ("steps", f"{progress['step']}" + (" (stopped early)" if progress["stopped_early"] else "")),
        ("wall time", f"{progress['seconds']:.1f} s in steps, {images / max(progress['seconds'], 1e-9):.1f} images/s"),
        ("workers", f"{summary['workers']} on {summary['device']}"),
        ("peak memory", f"{summary['peak_bytes'] / 2**30:.2f} GiB"),
        ("trainable parameters", f"{trained:,}, {trained / unet:.2%} of the UNet's {unet:,}"),
        ("skipped steps", f"{progress['bad_steps']} (loss or gradient not finite)"),
    ]
    losses = [each for each in validations if each["loss"] is not None]
    if losses:
        best = min(losses, key=lambda each: each["loss"])
        rows.append(("validation loss", f"{losses[-1]['loss']:.5f}, best {best['loss']:.5f} at step {best['step']}"))
    if validations and validations[-1]["clip_score"] is not None:
        rows.append(("CLIP score of the samples", f"{validations[-1]['clip_score']:.2f}"))
    if manifest is not None:
        rows.append(("published as", f"{manifest.name}@{manifest.version}"))
    return [tuple(html.escape(text) for text in row) for row in rows]


def _curves(steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> str:
    """Loss of every step with its running mean, validation loss, learning rate: an SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    good = [step for step in steps if step["loss"] is not None]
    x, losses = [step["step"] for step in good], [step["loss"] for step in good]
    left.plot(x, losses, linewidth=0.6, color="#b9c4d6")
    left.plot(x, _smooth(losses), linewidth=1.6, color="#24508f")
    left.set_title("training loss")
    known = [each for each in validations if each["loss"] is not None]
    middle.plot([each["step"] for each in known], [each["loss"] for each in known], marker="o", color="#24508f")
    middle.set_title("validation loss")
    right.plot([step["step"] for step in steps], [step["lr"] for step in steps], color="#24508f")
    right.set_title("learning rate")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """An exponential mean, unbiased at its start."""
    smooth, weight, mean = [], 0.0, 0.0
    for value in values:
        mean = (1 - share) * mean + share * value
        weight = (1 - share) * weight + share
        smooth.append(mean / weight)
    return smooth


def _pictures(folder: Path, prompts: Sequence[str], until_step: int) -> str:
    """A row of pictures for each validation, the first and the last of them always, at most six."""
    found = sorted(path for path in folder.glob("step-*") if int(path.name.removeprefix("step-")) <= until_step)
    chosen = found if len(found) <= 6 else [found[round(i * (len(found) - 1) / 5)] for i in range(6)]
    rows = []
    for path in chosen:
        step = int(path.name.removeprefix("step-"))
        pictures = "".join(
            f"<figure>{_embedded(file)}<figcaption>{html.escape(prompts[i])}</figcaption></figure>"
            for i, file in enumerate(sorted(path.glob("*.png")))
            if i < len(prompts)
        )
        rows.append(f"<h3>{f'step {step}' if step else 'before'}</h3><div class='pictures'>{pictures}</div>")
    return "\n".join(rows)


def _embedded(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


def _parameters(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        (
            row["part"],
            f"{row['linears']}",
            f"{row['trainable']:,}",
            f"{row['base']:,}",
            f"{row['trainable'] / row['base']:.3%}",
        )
        for row in rows
    ]
    return _table(("part", "linears", "trainable", "base", "share"), cells, numeric_from=1)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric_from: int = 99) -> str:
    head = "".join(f"<th>{text}</th>" for text in header)
    lines = [
        "<tr>"
        + "".join(f"<td{' class=n' if i >= numeric_from else ''}>{text}</td>" for i, text in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
