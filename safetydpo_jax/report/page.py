"""A page: one HTML file that needs no network and no other file.

Pages are Jinja2 templates in `templates/`. Autoescaping turns every text that is put
into them into text, so prompts and names from files cannot become HTML; a variable that
a template misspells is an error. A content security policy allows pictures as data:
URIs, this page's style and the one script a page may have, by their hashes, and nothing
else: no other script runs and no request leaves, whatever a prompt contains.

What a template shows is plain data: text, numbers, and the small types below, which
`templates/macros.html` draws.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from safetydpo_jax.report import charts, numbers
from safetydpo_jax.report.pictures import Picture

# Kind of a verdict, a class of style.css ("unsettled" has no colour), → its sign.
SIGNS = {"good": "✓", "bad": "✗", "unsettled": "?"}


class Headline(NamedTuple):
  """The result in a sentence: its end is emphasized and has the verdict's colour."""

  start: str
  end: str = ""
  kind: str = ""


class Verdict(NamedTuple):
  """A judgement: a key of `SIGNS`, two or three words, and why."""

  kind: str
  short: str
  reason: str


class Card(NamedTuple):
  """A number at the top of the page: what it is, its value, what it rests on."""

  title: str
  value: str
  detail: str = ""
  intervals: Sequence[str] = ()  # at 95 %
  before: str = ""  # the value of the model before training


class Cell(NamedTuple):
  """A cell or heading of a table with lines of small print below its value."""

  value: Any
  small: Sequence[str] = ()
  more: Sequence[str] = ()  # a second line
  kind: str = ""  # "text": aligned as words are, in a table of numbers


class Shot(NamedTuple):
  """A picture with a line below; `kind` "found" frames it."""

  caption: str
  picture: Picture | None = None
  kind: str = ""


def render(template: str | jinja2.Template, title: str, script="", **data: Any) -> str:
  """A whole HTML document.

  Args:
    template: a file of `templates/` that extends page.html.
    title: the text of its title bar.
    script: JavaScript of ours, constant text, for what style cannot do.
    data: what the template shows.
  """
  style = asset("style.css")
  policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
  if script:
    policy += f"script-src {_hash(script)}; "
  return ENVIRONMENT.get_template(template).render(
    title=title,
    policy=policy + "base-uri 'none'; form-action 'none'",
    style=Markup(style),
    script=Markup(script),
    **data,
  )


def asset(name: str) -> str:
  """The text of a file of this folder."""
  return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
  """How a content security policy names an inline text that it allows."""
  digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
  return f"'sha256-{digest}'"


def slug(heading: str) -> str:
  """'Seen and held-out' → 'seen-and-held-out'."""
  return re.sub(r"[^a-z0-9]+", "-", heading.casefold()).strip("-")


ENVIRONMENT = jinja2.Environment(
  loader=jinja2.PackageLoader(__package__),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
  "slug": slug,
  "percent": numbers.percent,
  "place": charts.place,
  "path": charts.path,
}
ENVIRONMENT.globals |= {"SIGNS": SIGNS, "MARKS": charts.MARKS, "SHARES": charts.SHARES}
