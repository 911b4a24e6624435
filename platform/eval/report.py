"""A run's report: one HTML file with its plots and pictures in it, that needs nothing else; the plots as PNGs too."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from lorafleet.eval import plots
from lorafleet.eval.images import read_picture, write_atomically
from lorafleet.eval.results import Results, SystemResult, sweeps
from lorafleet.eval.run import Run
from lorafleet.eval.statistics import Array, Comparison

REPORT_FILE: Final = "report.html"
PLOTS_FOLDER: Final = "plots"
SHOWN: Final = 6
"""Prompts of each kind, for each system."""
MAX_COLUMNS: Final = 8
THUMBNAIL_PX: Final = 256
TITLES: Final = {
    "clip": "CLIP score",
    "r1": "R@1, %",
    "diversity": "diversity",
    "similarity": "similarity",
    "cmmd": "CMMD",
    "fid": "FID",
}

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2330 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .25rem 1rem .25rem 0; text-align: left }
th { font-weight: 600; border-bottom: 1px solid #c8ccd4 } td { font-variant-numeric: tabular-nums }
td.n { white-space: nowrap }
tr.baseline td { color: #667 } .evidence { font-weight: 600 } .warning { background: #fff4d6; padding: .5rem .8rem }
img.plot { max-width: 100%; height: auto } .grid { display: grid; gap: .6rem 1.2rem; margin: .5rem 0 1.5rem }
.row { display: flex; gap: .5rem; align-items: flex-start } .row p { width: 14rem; margin: 0; font-size: 13px }
figure { margin: 0 } figure img { width: 8rem; height: auto; display: block }
figcaption { font-size: 12px; color: #445 }
.wide { overflow-x: auto } details { margin: .5rem 0 } code { background: #f1f2f5; padding: 0 .25rem }
"""


def write_report(run: Run, results: Results, baseline: str) -> Path:
    """Writes `report.html` and `plots/*.png` into the run's folder; the path of the former."""
    against = results.against(baseline)
    heading = f"{results.suite.name}: {len(results.names)} systems, {len(results.suite.prompts)} prompts"
    body = "\n".join(
        [
            f"<h1>{html.escape(heading)}</h1>",
            _intro(results, baseline),
            _warnings(results),
            "<h2>Systems</h2>",
            _main_table(results, baseline, against),
            _reading(results, against),
            *_drawn(run.folder, results, baseline, against),
            "<h2>By category</h2>",
            _category_table(results, baseline),
            "<h2>Other scores</h2>",
            _other_scores(results, baseline),
            _overfit(results, baseline),
            "<h2>Pictures</h2>",
            *_pictures(run, results, baseline),
            "<h2>How it was measured</h2>",
            _method(results),
        ]
    )
    title = html.escape(f"evaluation of {', '.join(results.names)}")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    document = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    write_atomically(run.folder / REPORT_FILE, document.encode())
    return run.folder / REPORT_FILE


def _intro(results: Results, baseline: str) -> str:
    scorer = results.about["scorer"]
    seeds = f"{results.seeds} pictures a prompt" if results.seeds > 1 else "One picture a prompt"
    return (
        f"<p>{html.escape(results.suite.description)} {seeds}, averaged within the prompt; the same prompts and "
        f"initial noise for all systems drawn here. Scored by <code>{html.escape(str(scorer['model']))}</code>; every "
        f"system is compared with <b>{html.escape(baseline)}</b>.</p>"
    )


def _warnings(results: Results) -> str:
    lines = [f"{name}: {warning}" for name, each in results.systems.items() for warning in each.warnings]
    scorer, prompts = results.about["scorer"], results.about["prompts"]
    if scorer["is_own_text_encoder"]:
        lines.insert(0, f"The scorer {scorer['model']} is a text encoder of the base itself: it flatters what it drew.")
    if prompts.get("cut"):
        lines.append(f"{len(prompts['cut'])} prompts are longer than the base's {prompts['window']} tokens: cut off.")
    if len(results.suite.prompts) < 30:
        lines.append(f"{len(results.suite.prompts)} prompts are few: expect wide intervals, and believe them.")
    return "".join(f'<p class="warning">{html.escape(line)}</p>' for line in dict.fromkeys(lines))


def _main_table(results: Results, baseline: str, against: Mapping[str, Comparison]) -> str:
    percent = f"{100 * results.statistics.confidence:g} % interval"
    score = _title(results.primary)
    header = (
        "model",
        f"{score} mean",
        "std",
        percent,
        f"change to {baseline}",
        percent,
        "p (Holm)",
        "better on",
        "training time",
        "trainable parameters",
        "latency",
    )
    rows = []
    for name, system in results.systems.items():
        found = system.scores[results.primary]
        cells = [html.escape(name), f"{found.mean:.2f}", f"{found.std or 0:.2f}", _interval(found.low, found.high)]
        cells += _versus(against.get(name))
        rows.append((name == baseline, [*cells, *_cost(system)]))
    return _table(header, rows)


def _versus(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["", "", "", ""]
    found = comparison.difference
    change = f"{found.mean:+.2f}"
    return [
        f'<span class="evidence">{change}</span>' if comparison.is_evidence else change,
        _interval(found.low, found.high, sign=True),
        _p(comparison.p_holm),
        f"{100 * comparison.win_rate:.0f} %",
    ]


def _cost(system: SystemResult) -> list[str]:
    training = system.training
    seconds, parameters = training.get("seconds"), training.get("parameters")
    latency = "" if system.latency_s is None else f"{system.latency_s:.2f} s"
    share = f"{parameters:,} ({training['share']:.2%})" if parameters else ""
    return ["" if seconds is None else _duration(seconds), share, latency]


def _reading(results: Results, against: Mapping[str, Comparison]) -> str:
    """The table in words."""
    level = 1 - results.statistics.confidence
    lines = []
    for name, comparison in against.items():
        found = comparison.difference
        if comparison.is_evidence and comparison.p_holm <= level:
            verdict = "is better" if found.mean > 0 else "is worse"
            lines.append(f"<b>{html.escape(name)}</b> {verdict} than the baseline by {abs(found.mean):.2f}.")
        else:
            lines.append(
                f"<b>{html.escape(name)}</b> cannot be told from the baseline: with this spread, a difference of "
                f"{results.statistics.wanted_difference:g} needs {comparison.prompts_needed} prompts "
                f"({100 * results.statistics.power:g} % power); there are {found.n}."
            )
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _drawn(folder: Path, results: Results, baseline: str, against: Mapping[str, Comparison]) -> list[str]:
    """Plots, each kept as a PNG too."""
    drawn: dict[str, bytes] = {}
    title = _title(results.primary)
    if against:
        drawn["forest"] = plots.forest(against, f"change of {title} to {baseline}")
    drawn["categories"] = plots.categories(
        {name: results.category_estimates(name) for name in results.names[:MAX_COLUMNS]}, title
    )
    for label, points in sweeps(results).items():
        shown = [(weight, results.systems[name].scores[results.primary]) for weight, name in points]
        level = results.systems[baseline].scores[results.primary].mean
        drawn[f"sweep-{label}"] = plots.sweep(shown, title, label, baseline, level)
    for name, png in drawn.items():
        write_atomically(folder / PLOTS_FOLDER / f"{name}.png", png)
    return [f'<p><img class="plot" alt="{html.escape(name)}" src="{_data(png)}"></p>' for name, png in drawn.items()]


def _category_table(results: Results, baseline: str) -> str:
    others = [name for name in results.names if name != baseline]
    header = ("category", "prompts", baseline, *(f"{name}, change" for name in others))
    rows = []
    base = results.category_estimates(baseline)
    for category in results.suite.categories:
        cells = [html.escape(category), str(base[category].n), f"{base[category].mean:.2f}"]
        for name in others:
            found = results.versus(name, baseline, category=category).difference
            cells.append(f"{found.mean:+.2f} {_interval(found.low, found.high, sign=True)}")
        rows.append((False, cells))
    return _table(header, rows) + "<p>Intervals of categories are each for itself, without correction.</p>"


def _other_scores(results: Results, baseline: str) -> str:
    names = dict.fromkeys(name for each in results.systems.values() for name in each.scores if name != results.primary)
    rows = []
    for score in names:
        for system in results.systems.values():
            if score not in system.scores:
                continue
            found = system.scores[score]
            both = found.per_prompt is not None and score in results.systems[baseline].scores
            versus = results.versus(system.name, baseline, score) if both and system.name != baseline else None
            change = (
                ""
                if versus is None
                else f"{versus.difference.mean if found.higher_is_better else -versus.difference.mean:+.2f}"
            )
            interval = "" if found.low is None or found.high is None else _interval(found.low, found.high)
            direction = "" if found.higher_is_better else " (less is better)"
            cells = [_title(score) + direction, html.escape(system.name), f"{found.mean:.2f}", interval, change]
            rows.append((system.name == baseline, cells))
    return _table(("score", "model", "value", "interval", f"change to {baseline}"), rows) if rows else "<p>None.</p>"


def _overfit(results: Results, baseline: str) -> str:
    rows = []
    for name in results.names:
        found = None if name == baseline else results.overfit(name, baseline)
        if found is not None:
            verdict = "held-out prompts gain less" if found.low > 0 else "no sign that held-out prompts gain less"
            rows.append(
                (False, [html.escape(name), f"{found.mean:+.2f}", _interval(found.low, found.high, sign=True), verdict])
            )
    if not rows:
        return ""
    training = html.escape(results.suite.training)
    about = f"<p>The change on prompts that {training} showed, less the change on held-out ones.</p>"
    return f"<h2>Overfitting</h2>{about}" + _table(("model", "difference", "interval", ""), rows)


def _pictures(run: Run, results: Results, baseline: str) -> list[str]:
    """For each system: its best, worst and most changed prompts, beside all other systems' pictures of them."""
    parts = []
    first = {
        name: {picture.prompt: picture.file for picture in reversed(pictures)}
        for name, pictures in run.pictures.items()
    }
    columns = results.names[:MAX_COLUMNS]
    reference = results.values(results.primary, baseline)
    for name in [each for each in columns if each != baseline] or [baseline]:
        own = results.values(results.primary, name)
        orders: dict[str, Array] = {"best": -own, "worst": own}
        if name != baseline:
            orders["most changed"] = -np.abs(own - reference)
        for label, order in orders.items():
            shown = np.argsort(order, kind="stable")[:SHOWN]
            rows = [_prompt_row(results, first, columns, int(number)) for number in shown]
            parts.append(f"<h3>{html.escape(name)}: {label} prompts</h3><div class='grid wide'>{''.join(rows)}</div>")
    return parts


def _prompt_row(results: Results, first: Mapping[str, Mapping[int, Path]], columns: Sequence[str], number: int) -> str:
    prompt = results.suite.prompts[number]
    figures = []
    for name in columns:
        score = results.values(results.primary, name)[number]
        picture = f'<img alt="" src="{_data(_thumbnail(first[name][number]))}">'
        figures.append(f"<figure>{picture}<figcaption>{html.escape(name)}<br>{score:.1f}</figcaption></figure>")
    about = f"<p>{html.escape(prompt.text)}<br><small>{html.escape(prompt.id)}</small></p>"
    return f"<div class='row'>{about}{''.join(figures)}</div>"


def _method(results: Results) -> str:
    statistics = results.statistics
    about = results.systems[results.names[0]].scores[results.primary].about
    rows: list[tuple[str, Any]] = [
        (
            "suite",
            f"{results.suite.name} version {results.suite.version}, sha256 of its prompts {results.suite_digest}",
        ),
        *((f"{_title(results.primary)}, {key}", value) for key, value in about.items() if key != "truncated"),
        (
            "intervals",
            f"{statistics.interval} bootstrap of {statistics.resamples} resamples of prompts, "
            f"{100 * statistics.confidence:g} %, seed {statistics.seed}",
        ),
        ("p", "two-sided sign-flip permutation test over prompts, Holm's correction over all systems"),
        *(
            (f"system {name}", _described(system, results.about["sampling"][name]))
            for name, system in results.systems.items()
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in results.about["versions"].items())),
        ("drawn on", results.about["device"]),
        ("latency", "mean seconds a picture: its share of its batch's time, or a request's for endpoints"),
    ]
    return _table(("what", "value"), [(False, [html.escape(str(key)), html.escape(str(value))]) for key, value in rows])


def _described(system: SystemResult, sampling: Mapping[str, Any]) -> str:
    drawn = ", ".join(f"{key} {value}" for key, value in sampling.items() if value is not None)
    return f"{system.kind} {system.target}, fingerprint {system.fingerprint[:16]}, {drawn}"


def _table(header: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]]) -> str:
    """Cells are HTML; rows say whether they are the baseline's."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    lines = [
        f"<tr{' class=baseline' if is_baseline else ''}>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
        for is_baseline, cells in rows
    ]
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _thumbnail(file: Path) -> bytes:
    image = read_picture(file)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _interval(low: float | None, high: float | None, *, sign: bool = False) -> str:
    if low is None or high is None or not math.isfinite(high - low):
        return ""
    return f"[{low:+.2f}, {high:+.2f}]" if sign else f"[{low:.2f}, {high:.2f}]"


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "&lt; 0.0001"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _title(score: str) -> str:
    return TITLES.get(score, score)
