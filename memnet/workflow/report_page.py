"""Writes one page of HTML after an inference or evaluation: the numbers, the pictures, and how they were made."""

from __future__ import annotations

import base64
import csv
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from torch import nn

from memnet.whole_files import whole_file
from memnet.workflow.processes import rank
from memnet.workflow.provenance import bundle_metadata, provenance
from memnet.workflow.report_panels import ReportedCase
from memnet.workflow.unreadable import PassedOver

__all__ = ["Report", "ReportPage", "Table"]

logger = logging.getLogger("memnet")

Table = tuple[str, Sequence[str], Sequence[Sequence[str | float]]]
"""A caption, the columns' names and the rows."""

_MOST_PARTS = 5  # of a path: data.nii.gz lies four folders deep in HCP's
# a browser fetches nothing for this page, and runs nothing
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
caption { text-align: left; padding: .3rem 0; } tr + tr { border-top: 1px solid var(--line); }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { overflow-wrap: normal; }
thead th { border-bottom: 2px solid var(--line); } .number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; break-inside: avoid; } img { max-width: 100%; display: block; background: #101216; }
figcaption { font-size: .9rem; } .note { background: var(--soft); padding: .5rem .8rem; } code { overflow-wrap: anywhere; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; } table { display: table; } tr { break-inside: avoid; }
  h2, caption { break-after: avoid; } figure { margin: 0 0 .6cm; }
  main > table:last-child { break-inside: avoid; }
  img { max-height: 80vh; } /* of the paper: with its caption no picture is taller than a page */
}
"""


class Report:
    """A page to be: tables, pictures and how it was made.

    Args:
        title: of the page.
        note: what is to be known before it is read.
    """

    def __init__(self, title: str, note: str = "") -> None:
        self.title, self.note = title, note
        self.tables: list[Table] = []
        self.cases: list[tuple[str, ReportedCase]] = []
        self.made: dict[str, str] = {}

    def html(self) -> str:
        """Return the page: no script, nothing fetched, every text escaped."""
        parts = [f"<h1>{_text(self.title)}</h1>"]
        parts += [f'<p class="note">{_text(self.note)}</p>'] if self.note else []
        parts += ["<h2>Numbers</h2>", *map(_table, self.tables)] if self.tables else []
        pictures = [(name, case) for name, case in self.cases if case.picture is not None]
        parts += ["<h2>Pictures</h2>", *(_figure(name, case) for name, case in pictures)] if pictures else []
        parts += ["<h2>How it was made</h2>", "<table><tbody>"]
        parts += [f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in self.made.items()]
        parts += ["</tbody></table>"]
        head = (
            f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(self.title)}</title><style>{_STYLE}</style>"
        )
        body = "\n".join(parts)
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


class ReportPage:
    """Handler that writes a page about a run: numbers of all cases, pictures of the first ones, how it was made.

    Only names of files are shown, and as many of the folders above as tell them apart, apart from the command as it was typed.

    Args:
        file: the HTML file; complete or absent.
        panel: what is reported of a case, see :mod:`memnet.workflow.report_panels`: called with the case and whether to draw.
        bundle_root: the bundle's folder.
        network: the network that is run.
        weights: file of its weights.
        device: where it is run.
        metrics_dir: the folder where MONAI's ``MetricsSaver``, attached before, writes the tables of an evaluation.
        classes: what the metrics' columns are called, where they have one for each class or region.
        units: of metrics, by patterns of their names such as ``"*hausdorff*"``, of which the first that fits counts.
        most_pictures: of how many cases pictures are drawn.
    """

    def __init__(
        self,
        file: str | Path,
        panel: Callable[[Mapping[str, Any], bool], ReportedCase],
        bundle_root: str | Path,
        network: nn.Module,
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
        metrics_dir: str | Path | None = None,
        classes: Sequence[str] = (),
        units: Mapping[str, str] | None = None,
        most_pictures: int = 12,
    ) -> None:
        self.file, self.panel, self.bundle_root = Path(file), panel, Path(bundle_root)
        self.network, self.weights, self.device = network, weights, device
        self.metrics_dir = None if metrics_dir is None else Path(metrics_dir)
        self.classes, self.units, self.most_pictures = tuple(classes), units or {}, most_pictures
        self.cases: list[ReportedCase] = []
        self.started = datetime.now(UTC)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator, after the handlers that write what is reported."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self.cases, self.started, self.clock = [], datetime.now(UTC), time.monotonic()

    def _add(self, engine: Engine) -> None:
        for case in cast(list[dict[str, Any]], engine.state.output):
            try:
                self.cases.append(self.panel(case, len(self.cases) < self.most_pictures))
            except (ValueError, IndexError, OSError) as error:
                # what was asked for is written; a picture of it is not worth the cases that are left
                logger.warning("the report shows no picture of a case (%s)", error)
                self.cases.append(self.panel(case, False))

    def _write(self, engine: Engine) -> None:
        if rank() != 0:
            return
        metadata = bundle_metadata(self.bundle_root)
        title = f"{metadata.get('name', self.bundle_root.name)}: {'inference' if self.metrics_dir is None else 'evaluation'}"
        report = Report(title, str(metadata.get("intended_use", "")))
        names = _short([case.source for case in self.cases])
        report.cases = list(zip(names, self.cases, strict=True))
        if self.metrics_dir is not None:
            report.tables = _metric_tables(self.metrics_dir, engine.state.metrics, self.classes, self.units)
        elif self.cases:
            columns = list(dict.fromkeys(column for case in self.cases for column in case.numbers))
            rows = [[name, *(case.numbers.get(c, "") for c in columns)] for name, case in report.cases]
            report.tables = [("Input by input", ["input", *columns], rows)]
        passed_over = getattr(engine.state, "passed_over", [])
        if passed_over:
            names = _short([one.source for one in passed_over])
            told = [[name, _without_folders(one)] for name, one in zip(names, passed_over, strict=True)]
            report.tables.append(("Passed over", ["input", "why"], told))
        report.made = {
            "begun": self.started.isoformat(sep=" ", timespec="seconds"),
            "took": f"{time.monotonic() - self.clock:.1f} s, this page's pictures included",
            **provenance(self.bundle_root, self.network, self.weights, self.device),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.file) as partial:
            partial.write_text(report.html(), encoding="utf-8")
        logger.info("report: %s", self.file)


def _metric_tables(
    folder: Path, metrics: Mapping[str, Any], classes: Sequence[str], units: Mapping[str, str]
) -> list[Table]:
    """Read what MONAI's ``MetricsSaver`` wrote about these metrics."""

    def with_unit(name: str) -> str:
        unit = next((unit for pattern, unit in units.items() if fnmatchcase(name, pattern)), "")
        return f"{name} [{unit}]" if unit else name

    values = [
        [with_unit(row[0]), _number(row[1])] for row in _read(folder / "metrics.csv") if row and row[0] in metrics
    ]
    tables: list[Table] = [("Over all cases", ["metric", "value"], values)]
    single: dict[str, list[str | float]] = {}
    for name in metrics:
        rows = _read(folder / f"{name}_raw.csv")
        if len(rows) < 2:
            continue
        header, *cases = rows
        names = _short([row[0] for row in cases])
        n_classes = sum(column.startswith("class") for column in header)
        if n_classes <= 1:
            for case, row in zip(names, cases, strict=True):
                single.setdefault(case, [case]).append(_number(row[-1]))
            single.setdefault("", ["case"]).append(with_unit(name))
            continue
        told = {f"class{i}": name for i, name in enumerate(classes)} if len(classes) == n_classes else {}
        columns = ["case", *(told.get(column, column) for column in header[1:])]
        tables.append(
            (with_unit(name), columns, [[case, *map(_number, row[1:])] for case, row in zip(names, cases, strict=True)])
        )
    if single:
        header = [str(column) for column in single.pop("")]
        tables.insert(1, ("Case by case", header, list(single.values())))
    return tables


def _read(file: Path) -> list[list[str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.reader(opened))


def _short(paths: Sequence[str]) -> list[str]:
    """Return the files' names, with as many folders as tell most of them apart, and then a number."""
    tails = [[str(Path(*Path(path).parts[-n:])) for path in paths] for n in range(1, _MOST_PARTS + 1)]
    names = max(tails, key=lambda names: len(set(names)))  # the first of these
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def _without_folders(one: PassedOver) -> str:
    why = one.why
    for folder in {file.parent for file in one.files}:
        why = why.replace(f"{folder}{os.sep}", "")
    return why


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _text(value: str | float) -> str:
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value).encode("utf-8", "replace").decode("utf-8"))


def _table(table: Table) -> str:
    caption, columns, rows = table
    shown = [" class=number" if any(isinstance(v, float) for v in column) else "" for column in zip(*rows, strict=True)]
    head = "".join(f'<th scope="col"{s}>{_text(column)}</th>' for s, column in zip(shown, columns, strict=True))
    lines = []
    for first, *values in rows:
        cells = (f"<td{s}>{_text(value)}</td>" for s, value in zip(shown[1:], values, strict=True))
        lines.append(f'<tr><th scope="row">{_text(first)}</th>{"".join(cells)}</tr>')
    body = "\n".join(lines)
    return f"<table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _figure(name: str, case: ReportedCase) -> str:
    content = base64.b64encode(case.picture or b"").decode("ascii")
    words = f"{_text(name)}: {_text(case.shows)}"
    return f'<figure><img alt="{words}" src="data:image/png;base64,{content}"><figcaption>{words}</figcaption></figure>'
