"""The report: one file that loads nothing, escapes what is untrusted, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tierkv import __version__
from tierkv.sim import Trace, open_trace
from tierkv.sim.report import report, write_report
from tierkv.sim.study import BINS, PARTS, Kind, Size, Study, run_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BYTES_MAX = 3_000_000
EVIL = (
    "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">$x"
)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


def study_of(trace: Trace, names: tuple[str, ...], shares: tuple[float, ...]) -> Study:
    counts = [max(1, int(share * trace.unique_blocks)) for share in shares]
    sizes = [Size(n, n / trace.unique_blocks, n << 20) for n in counts]
    kinds = [Kind(name) for name in names]
    return run_study(trace, kinds, sizes, PARTS["second"], model="gpt2", processes=1)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return open_trace("builtin:agents?hours=0.5&sessions=8")


@pytest.fixture(scope="module")
def study(trace: Trace) -> Study:
    return study_of(trace, ("fifo", "ttl", "s3fifo"), (0.01, 0.05, 0.1))


def evil_study(study: Study) -> Study:
    facts = replace(study.trace.facts, synthesised=(EVIL,), problems=(EVIL,), bad_lines=1)
    named = replace(study.trace, name=EVIL, facts=facts)
    outcomes = {
        (EVIL if name == "ttl" else name, blocks): replace(one, policy=EVIL)
        for (name, blocks), one in study.outcomes.items()
    }
    return replace(study, trace=named, policies=("fifo", EVIL), outcomes=outcomes)


def in_browser(path: Path, *, script: str = "", width: int = 1000) -> tuple[str, str]:
    """The document after its script ran, and what the console got.

    script: run after the page's own, in a copy of the page.
    """
    assert CHROMIUM is not None
    if script:
        text = path.read_text(encoding="utf-8")
        path = path.with_name("driven.html")
        path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    profile = path.with_name("profile")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"),
            *(f"--window-size={width},2000", "--enable-logging=stderr", "--v=0"),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


def test_the_report_has_every_figure_without_a_script(study: Study) -> None:
    page = report(study)
    for row in study.rows():
        assert f"<td>{100 * row.hit:.2f}</td>" in page
    assert page.count('<th scope="row">') == 9
    assert page.count('<th scope="rowgroup"') == 3
    for word in (study.trace.name, "fitted to the agent sessions", __version__, "seed=1"):
        assert word in page


def test_the_report_loads_nothing_from_anywhere(study: Study) -> None:
    page = report(study)
    assert "default-src 'none'" in page
    assert not re.search(r"""\b(src|href)=(?!"data:)""", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket", page)
    addresses = set(re.findall(r"https?://[^\"'\s<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_the_figures_in_the_page_are_the_study(study: Study) -> None:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', report(study))
    data = json.loads(text)
    assert data["policies"] == list(study.policies)
    assert len(data["timelines"]["ttl"][0]) == BINS
    assert data["hits"]["lru"] == [study.outcomes["lru", s.blocks].hit for s in study.sizes]


def test_untrusted_names_are_text(study: Study) -> None:
    page = report(evil_study(study))
    assert "<img" not in page
    assert page.count("<script") == 2
    assert "&lt;/script&gt;" in page


def test_the_template_is_in_the_package() -> None:
    folder = Path(__file__).resolve().parent.parent / "tierkv" / "sim" / "report"
    assert {path.name for path in folder.glob("page.*")} == {"page.html", "page.css", "page.js"}


def test_a_study_of_everything_is_a_small_file(trace: Trace, tmp_path: Path) -> None:
    shares = tuple(0.01 * n for n in range(1, 33))
    many = study_of(trace, ("lru", "fifo"), shares)
    names = tuple(f"policy{n}" for n in range(12))
    outcomes = dict(many.outcomes)
    for name in names:
        for size in many.sizes:
            outcomes[name, size.blocks] = replace(many.outcomes["fifo", size.blocks], policy=name)
    write_report(replace(many, policies=names, outcomes=outcomes), tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < BYTES_MAX


@needs_chromium
@pytest.mark.parametrize("width", [1000, 390])
def test_the_charts_are_drawn_and_the_console_is_silent(
    study: Study, tmp_path: Path, width: int
) -> None:
    write_report(study, tmp_path / "report.html")
    wide = "document.title = document.documentElement.scrollWidth <= innerWidth ? 'fits' : 'wide'"
    page, console = in_browser(tmp_path / "report.html", script=wide, width=width)
    assert console == ""
    assert "<title>fits</title>" in page
    sizes, time = (part.split("</section>")[0] for part in page.split('class="chart"')[1:])
    lines = len(study.policies) + 2
    assert len(re.findall(r'<path class="series" stroke=', sizes)) == lines
    assert len(re.findall(r'<path class="series" d="M\d[^"]*L', time)) == lines
    assert page.count('class="fill"') == 9
    assert page.count('class="one"') == lines
    assert "NaN" not in page.split("<script")[0]
    assert "undefined" not in page.split("<script")[0]


@needs_chromium
def test_the_timeline_is_scrubbed_by_keys_pointer_and_size(study: Study, tmp_path: Path) -> None:
    write_report(study, tmp_path / "report.html")
    bin_ = 30
    script = f"""
      const scrub = document.getElementById("scrub"), size = document.getElementById("size");
      size.value = 1; size.dispatchEvent(new Event("change"));
      scrub.value = {bin_}; scrub.dispatchEvent(new Event("input"));
      const first = document.getElementById("reading").textContent;
      const chart = document.querySelector("#time > svg"), box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", {{ clientX: box.right }}));
      document.title = first + "|" + scrub.value + "|" + scrub.tabIndex;
    """
    page, console = in_browser(tmp_path / "report.html", script=script)
    assert console == ""
    title = re.search(r"<title>(.*?)</title>", page)
    assert title is not None
    first, value, tab = title[1].split("|")
    hit = study.outcomes["ttl", study.sizes[1].blocks].timeline[bin_]
    assert f"ttl{100 * round(hit, 3):.1f} %" in first
    assert value == str(BINS - 1)
    assert tab == "0"


@needs_chromium
def test_untrusted_names_do_not_run_in_a_browser(study: Study, tmp_path: Path) -> None:
    write_report(evil_study(study), tmp_path / "report.html")
    page, console = in_browser(tmp_path / "report.html")
    assert console == ""
    assert "<title>ran</title>" not in page
    assert "<img" not in page


@needs_chromium
def test_one_size_of_a_trace_of_one_request_is_drawn(tmp_path: Path) -> None:
    short = open_trace("builtin:chat?hours=0.1").cut(0, 1)
    write_report(study_of(short, ("lru",), (1.0,)), tmp_path / "report.html")
    page, console = in_browser(tmp_path / "report.html")
    assert console == ""
    assert "NaN" not in page.split("<script")[0]
