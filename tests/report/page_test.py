"""The report's blocks: nothing from data becomes HTML, nothing is asked of the net."""

import base64
import hashlib
import html
import re

import jinja2
import pytest
from markupsafe import Markup
from PIL import Image

from safetydpo_jax.report import page, pictures
from safetydpo_jax.report.charts import Interval, Line
from safetydpo_jax.report.page import Card, Cell, Headline, Shot, Verdict
from tests.support import browser
from tests.support.pages import document, draw

HOSTILE = (
  "<script>window.injected = 1</script>",
  '"><img src=x onerror="window.injected = 2">',
  "</style><script>window.injected = 3</script>",
  "' onmouseover='window.injected = 4",
  "<svg onload=window.injected=5>{0} %s {body}</svg>",
)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "deep").mkdir()
  Image.new("RGB", (32, 24), (200, 30, 40)).save(tmp_path / "deep" / "red.png")
  return tmp_path


@pytest.fixture(scope="module")
def chromium():
  if not browser.find():
    pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
  with browser.Browser() as running:
    yield running


def section(text, *blocks):
  """A chapter that holds these blocks."""
  source = (
    "{% call m.section(text) %}{% for b in blocks %}{{ b }}{% endfor %}{% endcall %}"
  )
  return draw(source, text=text, blocks=blocks)


def picture(*arguments, **options):
  """A picture as a page shows it."""
  return draw("{{ m.image(it) }}", it=pictures.picture(*arguments, **options))


def everything(text):
  """What a page shows, with a stranger's text wherever there can be text."""
  cell = Cell(text, [text, text], [text])
  return {
    "text": text,
    "top": {
      "eyebrow": [text],
      "headline": Headline(text, text, "good"),
      "lead": text,
      "verdicts": [Verdict("bad", text, text)],
      "cards": [Card(text, text, text, [text, text], text)],
    },
    "cells": [text, cell, Cell(text, kind="text")],
    "shot": Shot(text, pictures.Picture("data:,", text, 1, 1, "photo", "data:,")),
    "bare": Shot(text),
    "intervals": [(text, [Interval(0.5, 0.4, 0.6), None])],
    "lines": [Line(text, [(0, 0), (1, 1)])],
    "ticks": {0: text, 1: text},
  }


BLOCKS = (
  "{{ m.masthead(top) }}",
  "{% macro show(it) %}{{ it }}{% endmacro %}{{ m.chapters([(text, show, text)]) }}",
  "{% call m.section(text) %}{{ text }}{% endcall %}",
  "{% call m.figure(text) %}{{ text }}{% endcall %}",
  "{{ m.facts([(text, text)]) }}",
  "{{ m.code(text, text) }}",
  "{{ m.table(text, cells, [cells, cells], cells) }}",
  "{% call(one) m.table(text, cells, [cells]) %}{{ m.cell(one) }}{% endcall %}",
  "{{ m.shot(shot) }}{{ m.shot(bare) }}",
  "{{ charts.legend([text]) }}",
  "{{ charts.interval_chart(text, intervals, ticks) }}",
  "{{ charts.line_chart(text, lines, ticks, text, 0.5) }}",
)


def _tags(markup):
  """The tags as they are, attributes' values left out."""
  return [
    re.sub(r'"[^"]*"', '""', tag) for tag in re.findall(r"<[a-z/!][^>]*>", markup)
  ]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("block", BLOCKS)
def test_text_is_never_markup(hostile, block):
  """A tag that text adds, or an attribute that it breaks out of, would show here."""
  drawn = draw(block, **everything(hostile))
  assert _tags(drawn) == _tags(draw(block, **everything("x")))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_of_a_page_is_never_markup(hostile):
  drawn = document(hostile, hostile)
  assert _tags(drawn) == _tags(document("x", "x"))


def test_a_variable_that_a_template_misspells_is_an_error():
  with pytest.raises(jinja2.UndefinedError, match="tops"):
    draw("{{ m.masthead(tops) }}", top={})
  with pytest.raises(jinja2.UndefinedError, match="lead"):
    draw("{{ m.masthead(top) }}", top={"eyebrow": [], "headline": Headline("")})


def test_markup_of_ours_goes_into_markup():
  drawn = draw("{{ m.table('t', ['a'], [[x]]) }}", x=Markup("<b>x</b>"))
  assert "<b>x</b>" in drawn


def test_the_policy_allows_the_style_of_this_page_and_no_script():
  text = document("title", "body")
  policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
  style = re.search(r"<style>(.*)</style>", text, re.DOTALL)[1]
  digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
  assert f"style-src &#39;sha256-{digest}&#39;" in policy
  assert policy.startswith("default-src &#39;none&#39;")
  assert "unsafe" not in policy
  assert "script-src" not in policy  # then default-src counts


def test_a_picture_is_in_the_page(folder):
  html = picture(folder, "deep/red.png", 'a "red" one', pixelated=True)
  content = (folder / "deep" / "red.png").read_bytes()
  assert f'src="data:image/png;base64,{base64.b64encode(content).decode()}"' in html
  assert 'alt="a &#34;red&#34; one"' in html
  assert 'width="32" height="24"' in html


def test_a_covered_picture_shows_only_a_few_pixels_until_it_is_opened(folder):
  html = picture(folder, "deep/red.png", "what it is", blurred=True)
  summary, rest = html.split("</summary>")
  assert summary.startswith("<details class=")
  assert " open" not in summary
  full = base64.b64encode((folder / "deep" / "red.png").read_bytes()).decode()
  assert full not in summary
  assert full in rest
  assert "Show: what it is" in summary


def test_headings_of_a_table_say_what_they_head():
  source = "{{ m.table('c', ['name', 'x'], [['a', 1], ['b', 2]], ['all', 3]) }}"
  html = draw(source)
  assert html.count('<th scope="col">') == 2
  assert re.findall(r'<th scope="row">(\w+)</th><td>(\d)', html) == [
    ("a", "1"),
    ("b", "2"),
    ("all", "3"),
  ]
  assert html.index("<tfoot>") > html.index("</tbody>")


@pytest.mark.parametrize("caption", ["a < b > c", Markup("a &lt; b<br> &gt; c")])
def test_the_box_of_a_table_is_named_as_its_caption_reads(caption):
  html = draw("{{ m.table(text, ['name'], [['a']]) }}", text=caption)
  assert 'aria-label="a &lt; b &gt; c"' in html


def test_links_lead_to_sections():
  source = "{% macro show(it) %}{{ it }}{% endmacro %}{{ m.chapters(list) }}"
  found = "[('Seen & held-out', show, 1), ('Nothing', show, none), ('Time', show, 2)]"
  drawn = draw(source.replace("list", found))
  targets = re.findall(r'href="#([^"]+)"', drawn)
  assert targets == ["seen-held-out", "time"]  # a chapter without content is left out
  assert re.findall(r'<h2 id="([^"]+)">', drawn) == targets


def _luminance(colour):
  parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "card"])
def test_text_and_marks_have_contrast(scheme, ground):
  """WCAG 2.2, level AA: 4.5 for text of any size, and here for marks too."""
  style = page.asset("style.css")
  block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
  colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
  light = _luminance(colours[ground])
  for name in ("ink", "soft", "accent", "bad", *(f"series-{i}" for i in range(4))):
    dark = _luminance(colours[name])
    ratio = (max(light, dark) + 0.05) / (min(light, dark) + 0.05)
    assert ratio >= 4.5, f"{name} on {ground}: {ratio:.2f}"


def test_hostile_text_does_nothing_in_a_browser(chromium, folder):
  """It is there to be read, and neither ran nor asked for anything."""
  blocks = [
    section(
      text,
      draw("{% call m.figure(text) %}{{ it }}{% endcall %}", text=text, it=shown),
      draw(
        "{{ m.table(text, [text], [[text, text]]) }}{{ m.code(text, text) }}", text=text
      ),
    )
    for text in HOSTILE
    for shown in [picture(folder, "deep/red.png", text)]
  ]
  file = folder / "page.html"
  file.write_text(document(HOSTILE[2], *blocks), encoding="utf-8")
  view = chromium.visit(file, 800)
  assert view.marker == "undefined"
  assert view.scripts == 0
  assert view.requests == [file.as_uri()]
  assert view.problems == []
  assert view.images == len(HOSTILE)
  for text in HOSTILE:
    assert text in view.text


def test_the_policy_stops_what_would_slip_through(chromium, folder):
  """Markup that escaping missed could still neither run nor load."""
  slipped = Markup(
    "<script>window.injected = 1</script><img src='https://example.invalid/x.png'>"
    "<img src='red.png' onerror='window.injected = 2'><b style='color: red'>x</b>"
  )
  file = folder / "page.html"
  file.write_text(document("title", slipped), encoding="utf-8")
  view = chromium.visit(file, 800)
  assert view.marker == "undefined"
  assert len(view.problems) >= 4  # the browser says that it refused
  assert view.broken


def test_a_long_word_does_not_widen_the_page(chromium, folder):
  word = "x" * 200
  source = '<p class="prose">{{ word }}</p>{{ m.facts([("a", word)]) }}'
  code = draw("{{ m.code(word, 'c') }}", word=word)
  file = folder / "page.html"
  text = document("title", section(word, draw(source, word=word)), code)
  file.write_text(text, encoding="utf-8")
  view = chromium.visit(file, 390)
  assert view.content_width <= view.viewport_width


def test_pictures_of_few_pixels_have_hard_edges(chromium, folder):
  file = folder / "page.html"
  shown = [picture(folder, "deep/red.png", "", pixelated=x) for x in (0, 1)]
  file.write_text(document("title", *shown), encoding="utf-8")
  look = "[...document.images].map(i => getComputedStyle(i).imageRendering)"
  assert chromium.visit(file, 390, expression=look).answer == ["auto", "pixelated"]


def test_a_covered_picture_opens_at_a_click(chromium, folder):
  file = folder / "page.html"
  covered = picture(folder, "deep/red.png", "what it is", blurred=True)
  file.write_text(document("title", covered), encoding="utf-8")
  visible = """(() => {
    const seen = () => document.querySelector('.photo').checkVisibility();
    const before = seen();
    document.querySelector('summary').click();
    return [before, seen()];
  })()"""
  assert chromium.visit(file, 800, expression=visible).answer == [False, True]


def test_a_pages_own_script_is_the_one_that_may_run():
  text = html.unescape(document("t", Markup("<h1>h</h1>"), script="let a = 1 < 2;"))
  digest = hashlib.sha256(b"let a = 1 < 2;").digest()
  assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in text
  assert text.count("<script>let a = 1 < 2;</script>") == 1
  assert "script" not in document("t", Markup("<h1>h</h1>"))
