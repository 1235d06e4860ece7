"""The study's figures as Markdown: means over seeds, with the lowest and highest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from safetydpo_jax.merging import comerge

Results = Mapping[int, Mapping[str, Any]]  # of each seed, {demo, trials}
ALONE = "experts alone, each on its category"
LINEAR = "linear, mean"
# Groups of LoRAs for all categories, and what they are compared with.
WHOLE = ("base", ALONE, "all_single", "merges")


class Figures(NamedTuple):
  """What one LoRA does in one seed."""

  ip: float  # of unsafe prompts of all categories
  utility: float
  distance: float  # of pictures of safe prompts from the base's, grey levels
  unasked: float  # share of safe prompts with a symbol
  by_category: dict[str, float]
  rank: int | None = None
  pairs: int | None = None  # of a data trial


# {(group, name): one `Figures` for each seed}
Table = dict[tuple[str, str], list[Figures]]


def read_figures(results: Results) -> Table:
  """The figures of every LoRA; a group's mean where its trials are of categories."""
  table: Table = {}
  for seed in results.values():
    demo = seed["demo"]
    for contender, group in {"base": "base", "experts": ALONE}.items():
      rates, utility = (
        [row for row in demo[kind] if row["contender"] == contender]
        for kind in ("rates", "utility")
      )
      distance = 0.0 if group == "base" else demo["distance"]
      table.setdefault((group, ""), []).append(_figures(rates, utility, distance))
    parts: dict[str, list[Figures]] = {}
    for trial in seed["trials"]:
      one = _figures(trial["rates"], trial["utility"], trial["distance"])
      one = one._replace(rank=trial["rank"], pairs=trial["pairs"])
      if trial["group"].startswith("data"):  # one trial for each category
        parts.setdefault(trial["group"], []).append(one)
      else:
        table.setdefault((trial["group"], trial["name"]), []).append(one)
    for group, ones in parts.items():
      table.setdefault((group, ""), []).append(_mean(ones))
  return table


def _mean(ones: Sequence[Figures]) -> Figures:
  """Of data trials, each of a category."""
  return Figures(
    ip=float(np.mean([one.ip for one in ones])),
    utility=float(np.mean([one.utility for one in ones])),
    distance=float(np.mean([one.distance for one in ones])),
    unasked=float(np.mean([one.unasked for one in ones])),
    by_category={},
    pairs=round(float(np.mean([one.pairs for one in ones]))),
  )


def _figures(rates: list[dict], utility: list[dict], distance: float) -> Figures:
  by_category = {
    row["category"]: row["count"] / row["n"]
    for row in rates
    if row["phrasing"] == "all"
  }
  safe = next(row for row in utility if row["category"] == "all")
  unasked = safe["symbols"] / safe["n"]
  return Figures(
    by_category.pop("all"), safe["attributes"], distance, unasked, by_category
  )


def cell(values: list[float], form: Callable[[float], str] = "{:.1%}".format) -> str:
  """`mean (lowest to highest)`, or – where there is nothing."""
  if np.isnan(values).any():
    return "–"
  if len(values) == 1:
    return form(values[0])
  return f"{form(float(np.mean(values)))} ({form(min(values))} to {form(max(values))})"


def table(head: list[str], rows: list[list[str]]) -> str:
  """A Markdown table."""
  return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def _row(label: str, seeds: list[Figures]) -> list[str]:
  return [
    label,
    cell([x.ip for x in seeds]),
    cell([x.utility for x in seeds]),
    cell([x.distance for x in seeds], "{:.1f}".format),
    cell([x.unasked for x in seeds]),
    str(seeds[0].rank or "–"),
  ]


def label(group: str, name: str) -> str:
  """What the tables call a trial."""
  if group == "all_single":
    return f"one LoRA on all pairs, {name}"
  default = " (default)" if name == comerge.DEFAULT else ""
  return f"{name}{default}" if name else group


def compare(ours: list[Figures], theirs: list[Figures]) -> str:
  """Whether two LoRAs differ by more than the spread of seeds, in words."""
  words = []
  for what, a, b in (
    ("IP", [x.ip for x in ours], [x.ip for x in theirs]),
    ("utility", [-x.utility for x in ours], [-x.utility for x in theirs]),
  ):
    if max(a) < min(b):
      words.append(f"{what} better, beyond the spread")
    elif min(a) > max(b):
      words.append(f"{what} worse, beyond the spread")
    else:
      words.append(f"{what} within the spread")
  return "; ".join(words)


def write(results: Results) -> str:
  """All tables, with a line above each."""
  figures = read_figures(results)
  demo = next(iter(results.values()))["demo"]
  return "\n\n".join(
    [
      _header(len(results), demo),
      *_methods(figures, len(results)),
      *_categories(figures, list(demo["categories"])),
      *_experts(figures, len(demo["categories"])),
      *_data(figures),
    ]
  )


def _header(seeds: int, demo: Mapping[str, Any]) -> str:
  """What was counted, how it was drawn, and how well the detector sees."""
  unsafe, safe = (
    max(row["n"] for row in demo[kind] if row["category"] == "all")
    for kind in ("rates", "utility")  # of all phrasings
  )
  what = "1 seed" if seeds == 1 else f"{seeds} seeds: mean (lowest to highest)"
  found, sampler = demo["detector"], demo["sampler"]
  return (
    f"{what}. {unsafe} unsafe and {safe} safe test prompts for each; "
    f"{sampler['steps']} steps of DDIM, guidance {sampler['guidance']:g}. "
    f"The detector misses {found['missed']:.1%} of symbols and sees "
    f"{found['false_alarms']:.1%} that are not there."
  )


def _methods(figures: Table, seeds: int) -> list[str]:
  rows = [
    _row(label(group, name), seeds)
    for (group, name), seeds in figures.items()
    if group in WHOLE
  ]
  head = ["LoRA", "IP", "utility", "distance to base, of 255", "symbols unasked"]
  blocks = [table([*head, "rank"], rows)]
  if seeds > 1:
    ours = figures["merges", comerge.DEFAULT]
    verdicts = [
      f"- against {label(*key)}: {compare(ours, figures[key])}"
      for key in figures
      if key[0] in ("all_single", "merges") and key != ("merges", comerge.DEFAULT)
    ]
    blocks.append(f"{comerge.DEFAULT}\n" + "\n".join(verdicts))
  return blocks


def _categories(figures: Table, names: list[str]) -> list[str]:
  rows = []
  for (group, name), seeds in figures.items():
    if group in WHOLE:
      means = [np.mean([x.by_category[category] for x in seeds]) for category in names]
      cells = map("{:.1%}".format, [*means, np.mean(means)])
      rows.append([label(group, name), *cells])
  head = ["LoRA", *names, "mean"]
  return ["IP by category, mean of the seeds.", table(head, rows)]


def _experts(figures: Table, count: int) -> list[str]:
  merged = {"linear": LINEAR, "co_merge": comerge.DEFAULT}
  rows = []
  for n in range(1, count + 1):
    cells = [str(n)]
    for method, all_of_them in merged.items():
      key = (f"experts, {method}", str(n)) if n < count else ("merges", all_of_them)
      cells += _row("", figures[key])[1:3]
    rows.append(cells)
  head = ["experts merged", "linear, mean: IP", "utility", "Co-Merge: IP", "utility"]
  return ["IP over all categories, by the number of experts merged.", table(head, rows)]


def shares(figures: Table) -> list[float]:
  """The shares of the pairs that trials trained on."""
  groups = {group for group, _ in figures if group.startswith("data")}
  return sorted(float(group.split(", ")[1]) for group in groups)


def _data(figures: Table) -> list[str]:
  rows = []
  for share in shares(figures):
    seeds = figures[f"data, {share:g}", ""]
    pairs = np.mean([x.pairs for x in seeds])
    rows.append([f"{pairs:.0f} ({share:.0%})", *_row("", seeds)[1:3]])
  rows.append(["all", *_row("", figures[ALONE, ""])[1:3]])
  return [
    "Experts alone, each on its category, by the pairs they saw, in equally many "
    "steps; the share is chosen by a hash.",
    table(["pairs of a category", "IP", "utility"], rows),
  ]
