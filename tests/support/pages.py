"""Pieces of a report, drawn by its templates as a page would."""

from typing import Any

from markupsafe import Markup

from safetydpo_jax.report import page

MACROS = '{% import "macros.html" as m %}{% import "charts.html" as charts %}'


def draw(source: str, **data: Any) -> Markup:
  """Template text that knows the macros as `m` and `charts`: `{{ m.facts(pairs) }}`."""
  text = page.ENVIRONMENT.from_string(MACROS + source).render(**data)
  return Markup(text.strip())


def document(title: str, *body: Any, script: str = "") -> str:
  """A whole page that holds these blocks."""
  template = page.ENVIRONMENT.from_string(
    '{% extends "page.html" %}'
    "{% block body %}{% for block in body %}{{ block }}{% endfor %}{% endblock %}"
  )
  return page.render(template, title, script, body=body)
