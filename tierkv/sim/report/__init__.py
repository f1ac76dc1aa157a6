"""Report: a study as one HTML file that asks nothing of any network.

Style, script and figures are in the file; a policy in it forbids the browser to load anything.
Names of traces and of policies are untrusted: they are escaped in the page, and the script sets
them as text only. Without a script the table of all cells and the facts are still there.
"""

from __future__ import annotations

import json
import math
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Final

from tierkv import __version__
from tierkv.sim.show import cell, percent, scored, size_words
from tierkv.sim.study import BINS, Outcome, Study
from tierkv.sim.sweep import BASE, OPTIMUM

MINUS: Final = "\N{MINUS SIGN}"


def write_report(study: Study, path: Path) -> None:
    """Write the report of a study."""
    path.write_text(report(study), encoding="utf-8")


def report(study: Study) -> str:
    """The page."""
    page, style, script = (
        files(__name__).joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    )
    trace = study.trace
    return Template(page).substitute(
        title=escape(trace.name),
        style=style,
        script=script,
        data=_in_script(_figures(study)),
        finding=escape(_finding(study)),
        facts=_facts(study),
        rows=_rows(study),
        version=escape(__version__),
    )


def _figures(study: Study) -> dict[str, object]:
    """What the script draws; the figures of timelines in permille."""
    sizes = [
        {"label": size_words(size), "share": size.share, "blocks": size.blocks}
        for size in study.sizes
    ]
    names = [*dict.fromkeys([*study.policies, BASE, OPTIMUM])]
    outcomes = study.outcomes
    return {
        "duration": study.trace.duration,
        "bins": BINS,
        "scored": study.part.bounds,
        "scoredSpan": _span(study),
        "reachable": study.reachable,
        "sizes": sizes,
        "policies": list(study.policies),
        "hits": {name: [outcomes[name, size.blocks].hit for size in study.sizes] for name in names},
        "gaps": [cell(row) for row in study.rows()],
        "timelines": {
            name: [_line(outcomes[name, size.blocks]) for size in study.sizes] for name in names
        },
    }


def _span(study: Study) -> tuple[float, float]:
    """When the requests that are scored came, as shares of the trace's time."""
    trace = study.trace
    low, high = (int(share * trace.requests) for share in study.part.bounds)
    whole = max(1, trace.duration_ns)
    first = float(trace.arrival_ns[min(low, trace.requests - 1)]) / whole
    return first, float(trace.arrival_ns[max(0, high - 1)]) / whole


def _line(outcome: Outcome) -> list[int | None]:
    return [None if math.isnan(v) else round(1000 * v) for v in outcome.timeline.tolist()]


def _in_script(value: object) -> str:
    """JSON that no HTML parser can take for the end of the element that it is in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finding(study: Study) -> str:
    """The one sentence at the top."""
    best = max(study.rows(), key=lambda row: (row.hit - row.lru, -row.size.blocks))
    points = 100 * (best.hit - best.lru)
    where = f"at {100 * best.size.share:.3g} % of the trace's blocks"
    if points < 0.05:
        return f"No policy here hits more than LRU; it is {percent(best.hit)} % {where}."
    return (
        f"{best.policy} finds {percent(best.hit)} % of the prompt tokens {where}, "
        f"{points:.1f} points more than LRU; {percent(best.optimum)} % is the most there is."
    )


def _facts(study: Study) -> str:
    trace, facts = study.trace, study.trace.facts
    rows = [
        ("Trace", trace.name),
        ("Format", facts.format),
        ("Requests", f"{trace.requests:,} in {trace.duration:,.0f} s"),
        ("Blocks", f"{trace.unique_blocks:,} of {trace.block_tokens} tokens"),
        ("References", f"{trace.references:,}"),
        ("Scored", scored(study)),
        ("Hit at most", f"{percent(study.reachable)} %, by a cache that gives nothing up"),
        ("Hints to adaptive", "on" if study.hints else "off"),
        ("Model", study.model or "none given"),
        *(("Made up", text) for text in facts.synthesised),
        ("Settings", " ".join(f"{k}={v}" for k, v in facts.settings.items()) or "none"),
        ("Bad lines", f"{facts.bad_lines:,}"),
        *(("Bad line", text) for text in facts.problems[:10]),
        ("Content", facts.digest or "unknown"),
        ("tierkv", __version__),
    ]
    return "\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)


def _rows(study: Study) -> str:
    """The table's bodies, one for each size."""
    bodies: dict[str, list[str]] = {}
    for row in study.rows():
        numbers = "".join(
            f"<td>{percent(value).replace('-', MINUS)}</td>"
            for value in (row.hit, row.lru, row.optimum, row.gap)
        )
        line = f'<tr><th scope="row">{escape(row.policy)}</th>{numbers}</tr>'
        bodies.setdefault(size_words(row.size), []).append(line)
    return "\n".join(
        f'<tbody><tr><th scope="rowgroup" colspan="5">{escape(size)}</th></tr>\n'
        + "\n".join(lines)
        + "</tbody>"
        for size, lines in bodies.items()
    )
