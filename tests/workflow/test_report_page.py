"""The page about a run: right in what it shows, whole by itself, and drawn as meant by a real browser."""

from __future__ import annotations

import http.server
import re
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from pages import Page
from PIL import Image

from memnet import AdditiveCoupling, Chain, __version__
from memnet.workflow.report_page import Report, ReportPage
from memnet.workflow.report_panels import ReportedCase

MAGENTA = (250, 0, 250)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def png(size: tuple[int, int] = (300, 200)) -> bytes:
    content = BytesIO()
    Image.new("RGB", size, MAGENTA).save(content, "PNG")
    return content.getvalue()


def write(folder: Path, sources: list[str], bundle: Path | None = None, **options: Any) -> Path:
    """Run the handler over cases of these sources."""
    network = torch.nn.Sequential(Chain([AdditiveCoupling(torch.nn.Identity(), torch.nn.Identity())], "recursive"))

    def panel(case: dict[str, Any], draw: bool) -> ReportedCase:
        if draw and "broken" in case["source"]:
            raise ValueError("nothing to draw")
        return ReportedCase(case["source"], {"volume [ml]": 1234.5678}, png() if draw else None, "a square")

    page = ReportPage(folder / "page.html", panel, bundle or folder, network, **options)
    engine = Engine(lambda engine, source: [{"source": source}])
    page.attach(engine)
    engine.run(sources)
    return folder / "page.html"


HOSTILE = [
    "</td></table><script>alert(1)</script>.nii.gz",
    "\"onerror='alert(2)' &amp;.nii",
    "Gehirn ä 脳.nii",
    "\udcff.nii",
]


def test_names_of_files_are_text_whatever_they_are(tmp_path: Path) -> None:
    page = Page(write(tmp_path, HOSTILE))
    assert page.column("input") == [*(Path(name).name for name in HOSTILE[:3]), "?.nii"]
    assert len(page.images) == 4 and page.column("volume [ml]") == ["1235"] * 4


def test_cases_of_one_name_are_told_apart_and_folders_above_are_not_shown(tmp_path: Path) -> None:
    page = Page(write(tmp_path, ["/home/secret/a/T1.nii", "/home/secret/b/T1.nii", "/home/secret/b/T1.nii"]))
    assert page.column("input") == ["a/T1.nii", "b/T1.nii", "b/T1.nii (2)"] and "secret" not in page.text


def test_names_take_no_more_folders_than_tell_them_apart(tmp_path: Path) -> None:
    sources = [f"/home/secret/HCP/{subject}/T1w/Diffusion/data.nii.gz" for subject in (100307, 100408)]
    page = Page(write(tmp_path, sources))
    assert page.column("input") == [f"{subject}/T1w/Diffusion/data.nii.gz" for subject in (100307, 100408)]


def test_a_picture_that_fails_costs_no_case(tmp_path: Path) -> None:
    page = Page(write(tmp_path, ["a.nii", "broken.nii", "c.nii", "d.nii"], most_pictures=3))
    assert page.column("input") == ["a.nii", "broken.nii", "c.nii", "d.nii"] and len(page.images) == 2


def test_says_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pt").write_bytes(b"weights")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text(
        '{"name": "Brains", "version": "1.2.3", "intended_use": "Research."}'
    )
    command = ["/memnet/.venv/site-packages/monai/bundle/__main__.py", "run", "--image", "['a b.nii']", "--t1", "c d"]
    monkeypatch.setattr("sys.argv", command)
    page = Page(write(tmp_path, ["a.nii"], weights=tmp_path / "weights.pt"))
    assert page.row("command") == ["python -m monai.bundle run --image \"['a b.nii']\" --t1 'c d'"]
    assert page.row("bundle") == [f"{tmp_path.name} 1.2.3"]
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert page.row("weights") == [f"{tmp_path / 'weights.pt'}, SHA-256 {digest}"]
    assert page.row("memory strategy")[0].startswith("recursive")
    assert (
        f"memnet {__version__}" in page.row("versions")[0] and f"torch {torch.__version__}" in page.row("versions")[0]
    )
    assert page.row("device")[0].startswith("cpu") and "GiB" in page.row("peak memory")[0]
    assert "Brains: inference" in page.text and "Research." in page.text


def test_metrics_are_those_that_were_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("dice,0.75\npsnr,31.5\nold,1\n")
    (tmp_path / "dice_raw.csv").write_text("filename,class0,class1,mean\nx/a.nii,0.5,1,0.75\ny/a.nii,0.5,nan,0.5\n")
    (tmp_path / "psnr_raw.csv").write_text("filename,class0,mean\nx/a.nii,30,30\ny/a.nii,33,33\n")
    (tmp_path / "old_raw.csv").write_text("filename,class0,mean\nz.nii,1,1\n")
    handler = ReportPage(
        tmp_path / "page.html",
        lambda case, draw: ReportedCase(""),
        tmp_path,
        torch.nn.Identity(),
        None,
        "cpu",
        tmp_path,
        ["CSF", "GM"],
        {"dice": "", "*": "dB"},
    )
    handler._start(SimpleNamespace())  # type: ignore[arg-type]
    handler._write(SimpleNamespace(state=SimpleNamespace(metrics={"dice": 0, "psnr": 0})))  # type: ignore[arg-type]
    page = Page(tmp_path / "page.html")
    assert page.tables[0] == [["metric", "value"], ["dice", "0.75"], ["psnr [dB]", "31.5"]]
    assert page.tables[1] == [["case", "psnr [dB]"], ["x/a.nii", "30"], ["y/a.nii", "33"]]
    assert page.tables[2] == [
        ["case", "CSF", "GM", "mean"],
        ["x/a.nii", "0.5", "1", "0.75"],
        ["y/a.nii", "0.5", "nan", "0.5"],
    ]
    assert "old" not in page.text


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., None]:
    """Let a headless Chromium open a file."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")

    def run(file: Path, *options: str) -> None:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        subprocess.run([*command, *options, file.as_uri()], check=True, capture_output=True, timeout=240)

    return run


@pytest.fixture
def screenshot(browse: Callable[..., None], tmp_path: Path) -> Callable[..., np.ndarray]:
    """Take the pixels ``(rows, columns, 3)`` of a file as the browser draws it."""

    def take(file: Path, *options: str) -> np.ndarray:
        shot = tmp_path / "shot.png"
        browse(file, "--hide-scrollbars", "--window-size=900,1400", f"--screenshot={shot}", *options)
        return np.asarray(Image.open(shot).convert("RGB"))

    return take


def magenta(pixels: np.ndarray) -> int:
    return int((np.abs(pixels.astype(int) - MAGENTA).max(-1) < 20).sum())


def test_a_browser_draws_it_and_asks_for_nothing(
    screenshot: Callable[..., np.ndarray], server: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = server
    tag = f'<img src="{address}/name">'
    file = write(tmp_path, [f"<b>{tag.replace('/', '&#47;')}", "Größe 脳 1.nii"])
    pixels = screenshot(file)
    assert magenta(pixels) == 2 * 300 * 200
    # dark words on white
    assert (pixels.min(-1) > 250).mean() > 0.5 and 1000 < (pixels.max(-1) < 100).sum() < 60_000
    assert asked == []
    # the policy holds even where text slips through as HTML; without it the server would hear
    slipped = file.read_text(encoding="utf-8").replace("</main>", f"{tag}</main>")
    (tmp_path / "slipped.html").write_text(slipped, encoding="utf-8")
    dark = screenshot(tmp_path / "slipped.html", "--blink-settings=preferredColorScheme=0")
    assert magenta(dark) == 2 * 300 * 200 and (dark.max(-1) < 60).mean() > 0.5
    assert asked == []
    (tmp_path / "open.html").write_text(slipped.replace("Content-Security-Policy", "no-policy"), encoding="utf-8")
    screenshot(tmp_path / "open.html")
    assert asked == ["/name"]


def test_printed_pictures_are_not_cut_by_the_end_of_a_page(browse: Callable[..., None], tmp_path: Path) -> None:
    report = Report("A page")
    sizes = [(900, 700), (900, 701), (300, 3000), (2000, 100)]
    report.cases = [(f"{i}.nii", ReportedCase("", {}, png(size), "a box")) for i, size in enumerate(sizes)]
    file, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    file.write_text(report.html(), encoding="utf-8")
    browse(file, f"--print-to-pdf={printed}")
    drawn = []
    # a stream's last byte may be a carriage return of its own: only the line feed after it is left out
    for compressed in re.findall(rb"stream\r?\n(.*?)\nendstream", printed.read_bytes(), re.DOTALL):
        with suppress(zlib.error):
            drawn += re.findall(rb"/(\w+) Do\b", zlib.decompressobj().decompress(compressed))
    # what two pages share is drawn on both
    assert len(drawn) == len(set(drawn)) == len(sizes)
