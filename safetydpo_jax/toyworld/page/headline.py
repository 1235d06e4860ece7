"""The top of the demo's report: what was done and whether it worked.

Sentences that judge follow the intervals.
"""

from pathlib import Path

from markupsafe import Markup

from safetydpo_jax.report.charts import Interval
from safetydpo_jax.report.html import duration, join, paragraph, percent
from safetydpo_jax.toyworld.page import gallery
from safetydpo_jax.toyworld.page.figures import before_after, reach


def masthead(folder: Path, figures: dict) -> Markup:
  """The result in a sentence, the verdicts, three numbers, one strip of pictures."""
  rates = before_after(figures, "rates")
  eyebrow = ("SafetyDPO", figures.get("title"), figures.get("date"))
  signs = [
    Markup('<li class="{}"><b>{} {}:</b> {}</li>').format(
      "good" if good else "bad", "✓" if good else "✗", short, reason
    )
    for good, short, reason in verdicts(figures)
  ]
  cards = [
    Markup("<div><dt>{}</dt><dd>{} <small>{}</small></dd></div>").format(*card)
    for card in _cards(figures)
  ]
  return Markup(
    '<header><p class="eyebrow">{}</p><h1>Asked for a forbidden symbol, the model drew '
    'one in {} of its pictures. <em class="{}">After training: {}.</em></h1>'
    '<p class="lead">A small image model learned from pairs of its own pictures to '
    "leave out abstract symbols that stand for {} categories of harm, and to draw "
    'everything else as before.</p><ul class="verdicts">{}</ul>'
    '<dl class="headline">{}</dl>{}</header>'
  ).format(
    " · ".join(str(part) for part in eyebrow if part),
    _round(rates[0].value),
    "good" if verdicts(figures)[0][0] else "bad",
    _round(rates[1].value),
    len(figures["categories"]),
    join(signs),
    join(cards),
    gallery.strip(folder, figures),
  )


def verdicts(figures: dict) -> list[tuple[bool, str, str]]:
  """(good or not, in two words, why) on safety and on utility."""
  before, after = before_after(figures, "rates")
  apart = after.high < before.low
  how = "do not overlap" if apart else "overlap"
  found = [
    (apart, "Safer" if apart else "Not safer", f"the intervals before and after {how}")
  ]
  if ends := before_after(figures, "utility"):
    before, after = ends
    if after.high >= before.low:
      points = 100 * (after.value - before.value)
      reason = f"attributes of safe prompts right: {points:+.1f} points; the intervals "
      reason += "before and after overlap"
      found.append((True, "No loss shown", reason))
    else:
      points = 100 * (before.value - after.value)
      reason = f"attributes of safe prompts are right {points:.1f} points less often"
      found.append((False, "Less useful", reason))
  return found


def _cards(figures: dict) -> list[tuple[str, Markup | str, str]]:
  """(what, number, detail)."""
  cards = [
    (what, _change(*ends), _intervals(*ends))
    for what, ends in (
      ("Unsafe prompts: pictures with a symbol", before_after(figures, "rates")),
      ("Safe prompts: attributes drawn right", before_after(figures, "utility")),
    )
    if ends
  ]
  if timings := figures.get("timings"):
    machine = figures.get("machine", {})
    cores = [f"{machine['cores']} cores"] if machine.get("cores") else []
    where = [machine[key] for key in ("platform", "architecture") if machine.get(key)]
    seconds = sum(row["seconds"] for row in timings)
    if seconds >= 600:  # then minutes are enough
      seconds = 60 * round(seconds / 60)
    what, rest = "Time for all of it", []
    if figures.get("resumed"):
      what, rest = "Time of the last run", ["the rest after an earlier run"]
    on = [f"on {', '.join([*where, *cores])}"] if where or cores else []
    cards.append((what, duration(seconds), ", ".join(rest + on)))
  return cards


def _change(before: Interval, after: Interval) -> Markup:
  return Markup('<span class="before">{} →</span> {}').format(
    percent(before.value), percent(after.value)
  )


def _intervals(before: Interval, after: Interval) -> Markup:
  return Markup("95\u00a0% intervals <b>{}</b> and <b>{}</b>").format(
    reach(before), reach(after)
  )


def _round(share: float) -> str:
  """Whole percent in a headline, one digit where that would say 0 or 100 falsely."""
  return percent(share, 0 if 0.01 <= share <= 0.99 or share in (0, 1) else 1)


def what_you_see(folder: Path, figures: dict) -> list[Markup]:
  """Three sentences and the training pairs."""
  count = len(figures["categories"])
  training = figures.get("training", {})
  pairs = f"{training['pairs']} pairs" if training.get("pairs") else "pairs"
  rank = f" of rank {training['rank']}" if training.get("rank") else ""
  return [
    paragraph(
      f"A small image model draws coloured shapes, and {count} families of invented "
      "words make it add a symbol: each family plays a category of harm. For each "
      f"category it was shown {pairs} of its own pictures, with and without the "
      f"symbol, and an expert, a small addition to its weights (LoRA{rank}), learned "
      "to prefer those without; then the experts were merged into one. Below, "
      "prompts it never saw are drawn from the same noise before and after, and a "
      "detector looks for symbols.",
    ),
    gallery.pairs(folder, figures),
  ]
