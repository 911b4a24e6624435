"""Writes Grafana's dashboards, which dashboard_panels.py describes, to deploy/helm/lorafleet/files/dashboards: `make
dashboards`. The chart ships them as they are, and a test holds them to it. Edit there, not in Grafana."""

import json
import sys
from pathlib import Path
from typing import Any, Final

from dashboard_panels import ALL, EVALUATION, Dashboard, Panel, S
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, VisibilityMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    GridPos,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER: Final = Path(__file__).parent.parent / "deploy/helm/lorafleet/files/dashboards"
RUNBOOK: Final = "deploy/RUNBOOK.md"  # the chart puts monitoring.prometheusRule.runbookBaseUrl in its place
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS: Final = 24


def build(spec: Dashboard) -> str:
    """A dashboard as the JSON that Grafana imports."""
    board = (
        dashboard.Dashboard(f"Lorafleet / {spec.title}")
        .uid(spec.uid)
        .description(spec.description)
        .tags(["lorafleet"])
        .timezone("browser")
        .refresh("30s")
        .time("now-3h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard.DashboardLink("Lorafleet")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["lorafleet"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .link(dashboard.DashboardLink("Runbook").type(DashboardLinkType.LINK).url(_runbook(spec.anchor)))
    )
    for variable in _variables(spec):
        board = board.with_variable(variable)
    top = number = 0
    for title, panels in spec.rows:
        board = board.with_row(dashboard.Row(title).id(number := number + 1).grid_pos(GridPos(1, COLUMNS, 0, top)))
        top, left, height = top + 1, 0, 0
        for panel in panels:
            if left + panel.width > COLUMNS:
                top, left = top + height, 0
            height = 4 if panel.kind == "number" else 8
            place = GridPos(height, panel.width, left, top)
            board = board.with_panel(_panel(panel).id(number := number + 1).grid_pos(place))
            left += panel.width
        top += height
    return json.dumps(board.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _variables(spec: Dashboard) -> list[Any]:
    def choice(name: str, label: str, query: str) -> Any:
        return (
            dashboard.QueryVariable(name)
            .label(label)
            .datasource(SOURCE)
            .query(query)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )

    up = 'up{app="lorafleet"}'
    variables: list[Any] = [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        choice("namespace", "Namespace", f"label_values({up}, namespace)"),
        choice("service", "Service", f'label_values({up[:-1]}, namespace=~"$namespace"}}, service)'),
    ]
    if spec is EVALUATION:
        score = f"lorafleet:clip_score:last1d{{{S}}}"
        variables += [choice(name, name.title(), f"label_values({score}, {name})") for name in ("suite", "adapter")]
    return variables


def _panel(panel: Panel) -> Any:
    builder: Any
    match panel.kind:
        case "number":
            options = common.ReduceDataOptions().calcs(["lastNotNull"])
            builder = stat.Panel().reduce_options(options).graph_mode(BigValueGraphMode.AREA)
        case "table":
            builder = table.Panel().with_transformation(
                DataTransformerConfig(
                    id_val="organize",
                    options={"excludeByName": {"Time": True, "__name__": True, "namespace": True, "service": True}},
                )
            )
        case "graph":
            legend = common.VizLegendOptions().show_legend(True)
            builder = timeseries.Panel().legend(legend).fill_opacity(10).show_points(VisibilityMode.NEVER)
    builder = builder.title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
    for place, (expr, legend_format) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expr).ref_id(chr(ord("A") + place)).legend_format(legend_format)
        builder = builder.with_target(
            query.instant().format(PromQueryFormat.TABLE) if panel.kind == "table" else query.range()
        )
    if panel.runbook is not None:
        link = dashboard.DashboardLink("Runbook").type(DashboardLinkType.LINK).url(_runbook(panel.runbook))
        builder = builder.links([link])
    return builder


def _runbook(anchor: str) -> str:
    return f"{RUNBOOK}#{anchor}" if anchor else RUNBOOK


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for spec in ALL:
        (folder / f"{spec.uid.removeprefix('lorafleet-')}.json").write_text(build(spec), encoding="utf-8")


if __name__ == "__main__":
    main()
