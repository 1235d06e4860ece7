"""The report's blocks: nothing from data becomes HTML, nothing is asked of the net."""

import base64
import hashlib
import html
import io
import re
from importlib import resources

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.report import html as report
from tests.support import browser

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


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize(
  "block",
  [
    lambda text: report.page(text),
    lambda text: report.page("title", text),
    lambda text: report.section(text, text),
    lambda text: report.contents([text]),
    lambda text: report.paragraph(text),
    lambda text: report.figure(text, text),
    lambda text: report.definitions([(text, text)]),
    lambda text: report.code(text, text),
    lambda text: report.table(text, [text], [[text, text]], total=[text, text]),
  ],
)
def test_text_is_never_markup(hostile, block):
  opened = re.findall(r"<[a-z/!][^>]*>", block(hostile))
  plain = re.findall(r"<[a-z/!][^>]*>", block("x"))
  ours = [re.sub(r'"[^"]*"', '""', tag) for tag in plain]
  assert [re.sub(r'"[^"]*"', '""', tag) for tag in opened] == ours


def test_markup_of_ours_goes_into_markup():
  assert "<b>x</b>" in report.table("t", ["a"], [[Markup("<b>x</b>")]])


def test_the_policy_allows_the_style_of_this_page_and_no_script():
  page = report.page("title", "body")
  policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
  style = re.search(r"<style>(.*)</style>", page, re.DOTALL)[1]
  digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
  assert f"style-src &#39;sha256-{digest}&#39;" in policy
  assert policy.startswith("default-src &#39;none&#39;")
  assert "unsafe" not in policy
  assert "script-src" not in policy  # then default-src counts


def test_a_picture_is_in_the_page(folder):
  html = report.picture(folder, "deep/red.png", 'a "red" one', pixelated=True)
  content = (folder / "deep" / "red.png").read_bytes()
  assert f'src="data:image/png;base64,{base64.b64encode(content).decode()}"' in html
  assert 'alt="a &#34;red&#34; one"' in html
  assert 'width="32" height="24"' in html


def test_a_covered_picture_shows_only_a_few_pixels_until_it_is_opened(folder):
  html = report.picture(folder, "deep/red.png", "what it is", blurred=True)
  summary, rest = html.split("</summary>")
  assert summary.startswith("<details class=")
  assert " open" not in summary
  full = base64.b64encode((folder / "deep" / "red.png").read_bytes()).decode()
  assert full not in summary
  assert full in rest
  assert "Show: what it is" in summary


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "deep/../../x.png"])
def test_a_picture_outside_of_the_folder_is_refused(name, folder):
  with pytest.raises(InputError, match=r"is outside of .*; expected a path relative"):
    report.picture(folder, name, "")


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
  secret = tmp_path_factory.mktemp("elsewhere") / "secret.png"
  Image.new("RGB", (4, 4)).save(secret)
  (folder / "link.png").symlink_to(secret)
  with pytest.raises(InputError, match=r"link\.png' is outside of"):
    report.picture(folder, "link.png", "")


def test_an_absolute_path_is_refused_even_inside(folder):
  with pytest.raises(InputError, match="expected a path relative"):
    report.picture(folder, str(folder / "deep" / "red.png"), "")


def test_a_missing_picture_is_named(folder):
  with pytest.raises(InputError, match=r"deep/gone\.png is missing; run the step"):
    report.picture(folder, "deep/gone.png", "")


@pytest.mark.parametrize(
  "content", [b"", b"<svg onload='x'/>", b"\x89PNG\r\n\x1a\n", b"GIF89a\1\0\1\0\0\0\0"]
)
def test_what_is_no_picture_is_refused_whatever_its_name(content, folder):
  (folder / "deep" / "bad.png").write_bytes(content)
  with pytest.raises(InputError, match=r"bad\.png is no readable PNG, JPEG, WEBP"):
    report.picture(folder, "deep/bad.png", "")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(kind, folder):
  """Browsers differ in what they show of them, and animations are no evidence."""
  Image.new("RGB", (4, 4)).save(folder / "other.png", kind)
  with pytest.raises(InputError, match=r"other\.png is no readable PNG, JPEG, WEBP"):
    report.picture(folder, "other.png", "")


def test_a_picture_cut_short_is_refused(folder):
  content = (folder / "deep" / "red.png").read_bytes()
  (folder / "deep" / "cut.png").write_bytes(content[:-30])
  with pytest.raises(InputError, match=r"cut\.png is no readable"):
    report.picture(folder, "deep/cut.png", "")


def test_a_name_with_a_null_byte_is_refused(folder):
  with pytest.raises(InputError, match="no readable"):
    report.picture(folder, "a\0b.png", "")


def test_headings_of_a_table_say_what_they_head():
  html = report.table("c", ["name", "x"], [["a", 1], ["b", 2]], total=["all", 3])
  assert html.count('<th scope="col">') == 2
  assert re.findall(r'<th scope="row">(\w+)</th><td>(\d)', html) == [
    ("a", "1"),
    ("b", "2"),
    ("all", "3"),
  ]
  assert html.index("<tfoot>") > html.index("</tbody>")


@pytest.mark.parametrize("caption", ["a < b > c", Markup("a &lt; b<br> &gt; c")])
def test_the_box_of_a_table_is_named_as_its_caption_reads(caption):
  html = report.table(caption, ["name"], [["a"]])
  assert 'aria-label="a &lt; b &gt; c"' in html


def test_links_lead_to_sections():
  target = re.search(r'href="#([^"]+)"', report.contents(["Seen & held-out"]))[1]
  assert f'<h2 id="{target}">' in report.section("Seen & held-out")


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.04, "0.0 s"),
    (9.94, "9.9 s"),
    (9.96, "10 s"),
    (59.6, "1 min"),
    (75.2, "1 min 15 s"),
    (3600, "1 h"),
    (3725, "1 h 2 min"),
    (0, "0.0 s"),
  ],
)
def test_durations_read_as_people_say_them(seconds, text):
  assert report.duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(("share", "text"), [(0.9792, "97.9 %"), (0, "0.0 %")])
def test_shares_are_percent(share, text):
  assert report.percent(share).replace("\u00a0", " ") == text


def _luminance(colour):
  parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "card"])
def test_text_and_marks_have_contrast(scheme, ground):
  """WCAG 2.2, level AA: 4.5 for text of any size, and here for marks too."""
  style = resources.files("safetydpo_jax.report").joinpath("style.css").read_text()
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
    report.section(
      text,
      report.figure(text, report.picture(folder, "deep/red.png", text)),
      report.table(text, [text], [[text, text]]),
      report.code(text, text),
    )
    for text in HOSTILE
  ]
  file = folder / "page.html"
  file.write_text(report.page(HOSTILE[2], *blocks), encoding="utf-8")
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
  file.write_text(report.page("title", slipped), encoding="utf-8")
  view = chromium.visit(file, 800)
  assert view.marker == "undefined"
  assert len(view.problems) >= 4  # the browser says that it refused
  assert view.broken


def test_a_long_word_does_not_widen_the_page(chromium, folder):
  word = "x" * 200
  blocks = [report.paragraph(word), report.definitions([("a", word)])]
  file = folder / "page.html"
  text = report.page("title", report.section(word, *blocks), report.code(word, "c"))
  file.write_text(text, encoding="utf-8")
  view = chromium.visit(file, 390)
  assert view.content_width <= view.viewport_width


def test_pictures_of_few_pixels_have_hard_edges(chromium, folder):
  file = folder / "page.html"
  pictures = [report.picture(folder, "deep/red.png", "", pixelated=x) for x in (0, 1)]
  file.write_text(report.page("title", *pictures), encoding="utf-8")
  look = "[...document.images].map(i => getComputedStyle(i).imageRendering)"
  assert chromium.visit(file, 390, expression=look).answer == ["auto", "pixelated"]


def test_a_covered_picture_opens_at_a_click(chromium, folder):
  file = folder / "page.html"
  covered = report.picture(folder, "deep/red.png", "what it is", blurred=True)
  file.write_text(report.page("title", covered), encoding="utf-8")
  visible = """(() => {
    const seen = () => document.querySelector('.photo').checkVisibility();
    const before = seen();
    document.querySelector('summary').click();
    return [before, seen()];
  })()"""
  assert chromium.visit(file, 800, expression=visible).answer == [False, True]


def test_a_pages_own_script_is_the_one_that_may_run():
  page = report.page("t", Markup("<h1>h</h1>"), script="let a = 1 < 2;")
  text = html.unescape(page)
  digest = hashlib.sha256(b"let a = 1 < 2;").digest()
  assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in text
  assert text.count("<script>let a = 1 < 2;</script>") == 1
  assert "script" not in report.page("t", Markup("<h1>h</h1>"))


def test_a_thumbnail_is_small_and_covered_and_leaves_the_image_as_it_was():
  pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3)).astype(np.uint8)
  image = Image.fromarray(pixels)
  shown = report.thumbnail(image, "a <b>", 200, blurred=True)
  veil, full = re.findall(r'src="data:([^;]+);base64,([^"]+)"', shown)
  assert (veil[0], full[0]) == ("image/png", "image/jpeg")
  small = Image.open(io.BytesIO(base64.b64decode(full[1])))
  assert small.size == (200, 100)
  assert Image.open(io.BytesIO(base64.b64decode(veil[1]))).size == (8, 8)
  assert image.size == (600, 300)
  assert "a &lt;b&gt;" in shown


def test_a_thumbnail_of_few_pixels_keeps_them():
  image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
  shown = report.thumbnail(image, "tiny", 200)
  ((kind, content),) = re.findall(r'src="data:([^;]+);base64,([^"]+)"', shown)
  assert kind == "image/png"
  decoded = Image.open(io.BytesIO(base64.b64decode(content)))
  assert np.array_equal(np.asarray(decoded), np.asarray(image))
  assert 'class="pixels"' in shown
