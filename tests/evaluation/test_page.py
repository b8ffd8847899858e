from __future__ import annotations

import builtins
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fastlvm.evaluation.page import page, write_page
from fastlvm.evaluation.plots import plots

VOID = {"meta", "br", "hr", "img", "input", "link"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Elements(HTMLParser):
    """Every element with its attributes, and all text; fails where an end tag does not close the last one open."""

    def __init__(self, html):
        super().__init__()
        self.open, self.all, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.all if name == tag]


@pytest.fixture(scope="module")
def html(full_report):
    pytest.importorskip("matplotlib")
    return page(full_report)


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr("fastlvm.evaluation.page.plots", lambda report: [])


@pytest.fixture
def no_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def section(html, key):
    return re.search(rf'<section id="{key}">(.*?)</section>', html, re.DOTALL)[1]


def test_every_tag_is_closed_and_every_id_stands_once_and_is_found(html):
    found = Elements(html)
    assert html.startswith("<!DOCTYPE html>")
    ids = [attributes["id"] for _, attributes in found.all if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="|url\()#([\w-]+)', html)
    assert referred and set(referred) <= set(ids)


def test_nothing_is_loaded_and_nothing_runs(html):
    found = Elements(html)
    assert not re.search(r"https?://|@import|\ssrc=|javascript:|\son\w+=", html)
    assert not {tag for tag, _ in found.all} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert all(attributes["href"].startswith("#") for _, attributes in found.all if "href" in attributes)


def test_names_and_notes_are_text_whatever_they_hold(html, hostile):
    assert "\x00" not in html and "\x1b" not in html
    assert """<script>alert("x")</script> & $a_b$ |_[u](v)'""" in Elements(section(html, "rankers")).text
    assert hostile.split()[1] in Elements(section(html, "latency")).text


def test_titles_and_findings_are_escaped_too(full_report, hostile, no_plots):
    wrong = [{"code": "x", "level": "fault", "sentence": hostile, "figures": {}}]
    payload = {**full_report.payload, "name": hostile, "encoder": "</main>"}
    Elements(page(replace(full_report, findings=wrong, payload=payload)))


def test_a_fault_stands_before_everything_else(full_report, no_plots):
    wrong = [
        {"code": "b", "level": "warning", "sentence": "this is odd", "figures": {}},
        {"code": "a", "level": "fault", "sentence": "the model returns the truth", "figures": {}},
    ]
    text = page(replace(full_report, findings=wrong))
    places = [text.index(said) for said in ("the model returns", "this is odd", "The best model", "<section")]
    assert places == sorted(places)


def test_rankers_that_use_keys_have_a_table_of_their_own_with_its_ceiling(html):
    keys, others = section(html, "keys"), section(html, "rankers") + section(html, "articles")
    assert "next by key (ceiling)" in keys and "near + by key" in keys
    assert '<th scope="row">next by key' not in others and '<th scope="row">near + by key' not in others
    assert "target as query (ceiling)" in others and "whitened mixture" not in keys


def test_every_plot_is_told_in_words_and_takes_its_colours_from_the_page(html):
    drawn = Elements(html).of("svg")
    assert len(drawn) == 9  # intervals, recall, latency; histogram, articles and impostors of both models
    assert all(one["role"] == "img" and len(one["aria-label"]) > 40 for one in drawn)
    assert not re.findall(r": ?#\w+", html[html.index("<main>") :])
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= set(re.findall(r"(--[\w-]+):", html))


def test_the_same_report_gives_the_same_page_whatever_matplotlib_is_set_to(html, full_report, tmp_path):
    import matplotlib

    path = tmp_path / "deep" / "report.html"
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "text.color": "red"}):
        write_page(full_report, path)
        assert matplotlib.rcParams["font.size"] == 30
    assert path.read_text(encoding="utf-8") == html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_without_matplotlib_there_is_a_page_that_says_so(full_report, no_matplotlib):
    text = page(full_report)
    found = Elements(text)
    assert "There are no plots: matplotlib is not installed (pip install fastlvm[plot])." in text
    assert not found.of("svg") and found.of("table")


def test_figures_that_were_not_measured_draw_nothing(full_report):
    pytest.importorskip("matplotlib")
    without = ("curve", "histogram", "impostors", "per_article")
    rows = [replace(row, **dict.fromkeys(without)) for row in full_report.rows]
    drawn = plots(replace(full_report, rows=rows, articles=None, latency={}))
    assert [plot.key for plot in drawn] == ["rankers"]


def test_more_models_than_can_be_told_apart_are_counted(full_report):
    pytest.importorskip("matplotlib")
    rows = [replace(full_report.rows[0], name=f"model {at}", histogram=None, impostors=None) for at in range(8)]
    drawn = plots(replace(full_report, rows=rows, differences=[], latency={}))
    assert "Drawn are the 6 best of 8 models" in next(plot.caption for plot in drawn if plot.title == "Recall curve")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_on_a_phone_tables_scroll_in_their_own_box_and_the_page_does_not(html, tmp_path):
    """In frames as wide as phones, because a browser's window has a least width."""
    opened = html.replace("<details>", "<details open>")
    (tmp_path / "page.html").write_text(re.sub(r"<meta http-equiv=[^>]*>", "", opened), encoding="utf-8")
    frame = '<iframe src="page.html" style="width:{}px;height:800px;border:0"></iframe>'
    probe = """<p id="said"></p><script>
      onload = () => { for (const frame of document.querySelectorAll("iframe")) {
        const page = frame.contentDocument, boxes = [...page.querySelectorAll(".scroll")];
        const scrolled = boxes.filter(box => box.scrollWidth > box.clientWidth).length;
        const plot = Math.round(page.querySelector("svg").getBoundingClientRect().width);
        said.textContent += `[${frame.clientWidth} ${page.documentElement.scrollWidth} ${scrolled} ${plot}]`; } }
    </script>"""
    (tmp_path / "probe.html").write_text(frame.format(360) + frame.format(390) + probe, encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
    done = subprocess.run(
        [
            *(BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files"),
            *(
                "--disable-background-networking",
                "--virtual-time-budget=5000",
                "--dump-dom",
                (tmp_path / "probe.html").as_uri(),
            ),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = [tuple(map(int, one)) for one in re.findall(r"\[(\d+) (\d+) (\d+) (\d+)\]", done.stdout)]
    assert [frame for frame, *_ in said] == [360, 390], done.stderr[-2000:]
    for frame_width, page_width, scrolled, plot in said:
        assert page_width == frame_width
        assert scrolled >= 3
        assert 300 <= plot <= frame_width
