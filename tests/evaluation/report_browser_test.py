"""The report in a real browser: whole, sorted, filtered; nothing else runs."""

import itertools
import re

import pytest

from safetydpo_jax.evaluation.detectors import DetectorOptions
from safetydpo_jax.evaluation.evaluate_folder import EvaluateOptions, evaluate_folder
from tests.support import browser
from tests.support.galleries import write_gallery, write_rows

ATTACK = "<script>window.injected = 1</script>"
IMAGE_ATTACK = '"><img src=x onerror="window.injected = 2">'


@pytest.fixture(scope="module")
def chromium():
  if not browser.find():
    pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
  with browser.Browser() as running:
    yield running


def write_report(folder, change=None, reference=True):
  """The report on drawn images, their prompts changed by `change(row)`."""
  gallery = write_gallery(folder, 6, lambda number: number in (0, 6, 12))
  if change:
    write_rows(gallery.prompts, [{**row, **change(row)} for row in gallery.rows])
  evaluate_folder(
    EvaluateOptions(
      images=gallery.images,
      prompts=gallery.prompts,
      out=folder / "out",
      reference=gallery.reference if reference else None,
      title=f"toy world {ATTACK}" if change else "toy world",
      detectors=DetectorOptions(detector="toy"),
    )
  )
  return folder / "out" / "report" / "index.html"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  return write_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
  """Every text a stranger may write has HTML in it."""

  def change(row):
    return {
      "prompt": f"{row['prompt']} {ATTACK} {IMAGE_ATTACK}",
      "category": f"{row['category']} {ATTACK}{IMAGE_ATTACK}",
    }

  return write_report(tmp_path_factory.mktemp("hostile"), change)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_whole(chromium, file, width, dark):
  background = "getComputedStyle(document.body).backgroundColor"
  view = chromium.visit(file, width, dark=dark, expression=background)
  assert view.problems == []
  assert view.requests == [file.as_uri()]
  assert view.broken == []
  assert view.images > 10
  assert view.content_width <= view.viewport_width == width
  assert view.answer == ("rgb(21, 24, 28)" if dark else "rgb(251, 250, 247)")


def test_nothing_that_strangers_wrote_runs(chromium, hostile):
  view = chromium.visit(hostile, 390)
  assert view.marker == "undefined"
  assert view.scripts == 1
  assert view.problems == []
  assert view.requests == [hostile.as_uri()]
  assert view.broken == []
  assert view.content_width <= view.viewport_width
  assert view.text.count(ATTACK) > 20
  assert IMAGE_ATTACK in view.text


def test_images_are_covered_until_they_are_clicked(chromium, file):
  look = """(() => {
    const covers = [...document.querySelectorAll('.cases details')];
    const seen = () => covers.filter(
      c => c.querySelector(':scope > img').checkVisibility());
    const before = seen().length;
    covers[1].querySelector('summary').click();
    return [covers.length, document.querySelectorAll('.cases img:not(.veil)').length,
            before, seen().length];
  })()"""
  covers, shown, before, after = chromium.visit(file, 1280, expression=look).answer
  assert covers == shown > 10
  assert (before, after) == (0, 1)


def test_a_click_on_a_heading_sorts_by_it(chromium, file):
  look = """(() => {
    const table = document.querySelector('table.sortable');
    const column = () => [...table.tBodies[0].rows].map(r => parseFloat(
      r.cells[2].textContent));
    const button = table.tHead.rows[0].cells[2].querySelector('button');
    const head = button.parentElement;
    const steps = [];
    for (let i = 0; i < 2; i++) {
      button.click();
      steps.push([head.getAttribute('aria-sort'), column()]);
    }
    return [steps, table.tFoot.rows.length];
  })()"""
  (down, up), total = chromium.visit(file, 1280, expression=look).answer
  assert down == ["descending", sorted(down[1], reverse=True)]
  assert up == ["ascending", sorted(down[1])]
  assert down[1][0] != down[1][-1]
  assert total == 1


def test_negative_numbers_sort_below_positive_ones(chromium, file):
  look = """(() => {
    const table = document.querySelector('table.sortable');
    table.tHead.rows[0].cells[3].querySelector('button').click();
    return [...table.tBodies[0].rows].map(r => r.cells[3].textContent);
  })()"""
  texts = chromium.visit(file, 1280, expression=look).answer
  numbers = [float(re.match(r"[−+][\d.]+", t)[0].replace("−", "-")) for t in texts]
  assert numbers == sorted(numbers, reverse=True)
  assert numbers[0] < 0


def test_a_category_and_a_finding_choose_examples_and_rows(chromium, file):
  look = """(() => {
    const shown = () => [...document.querySelectorAll('.listing tbody tr')]
      .filter(r => !r.hidden).map(r => r.cells[2].textContent + r.cells[4].textContent);
    const [category, found] = document.querySelectorAll('.filter select');
    const set = (select, index) => {
      select.selectedIndex = index;
      select.dispatchEvent(new Event('change', {bubbles: true}));
    };
    const all = shown();
    set(category, 1);
    const hate = shown();
    set(found, 1);
    return [all, hate, shown(), document.querySelector('.filter output').textContent,
      [...document.querySelectorAll('.cases li')].filter(li => li.checkVisibility())
        .map(li => li.textContent)];
  })()"""
  answer = chromium.visit(file, 1280, expression=look).answer
  everything, hate, found, said, examples = answer
  assert len(everything) == 24
  assert hate == [text for text in everything if text.startswith("hate")]
  assert found == [text for text in hate if "▲" in text]
  assert 0 < len(found) < len(hate)
  assert said == f"{len(found) + len(examples)} shown"
  assert examples
  assert all("hate" in text and "violence" not in text for text in examples)


def test_headings_are_in_order_and_every_picture_has_words(chromium, file):
  look = """[
    [...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1])),
    [...document.images].filter(i => !i.alt && !i.classList.contains('veil')).length,
    [...document.links].filter(a => !document.querySelector(a.hash)).length,
    document.documentElement.lang,
  ]"""
  levels, silent, lost, language = chromium.visit(file, 390, expression=look).answer
  assert levels[0] == 1
  assert levels.count(1) == 1
  assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
  assert (silent, lost, language) == (0, 0, "en")


def test_without_a_reference_nothing_speaks_of_pairs(chromium, tmp_path):
  view = chromium.visit(write_report(tmp_path, reference=False), 390)
  assert view.problems == []
  assert view.broken == []
  for word in ("Aligned only", "Change", "base model"):
    assert word not in view.text
