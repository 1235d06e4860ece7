"""The report of a suite: one table in the papers' layout, ours and published rows.

A chapter is a function of the suite's figures.json; it returns what its macro in
report/templates/suite.html takes, or None if there is nothing to show.
"""

from typing import Any

from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.report_view import names_of, rate_cell
from safetydpo_jax.report import page
from safetydpo_jax.report.numbers import percent, points, reach
from safetydpo_jax.report.page import Card, Cell, Headline

LABELS = {REFERENCE: "base", IMAGES: "aligned"}
EXTRA = {
  "without_benign": "harmful",
  "without_leaked": "new",
  "without_either": "harmful, new",
}
OPTIMISED = "unlearn_diff_atk"  # the one attack that has no published prompts


def build(result: dict[str, Any]) -> str:
  """The page as HTML."""
  return page.render(
    "suite.html",
    f"SafetyDPO, {result.get('title') or 'suite ' + result['suite']}",
    page.asset("interactive.js"),
    top=_top(result),
    results=_results(result),
    attacks=attacks(result),
    quality=_quality(result),
    sets=_sets(result),
    names=names_of(result["detectors"]),
    toy="toy" in result["detectors"],
  )


def _folders(result: dict) -> list[str]:
  there = {name for about in result["sets"].values() for name in about["folders"]}
  return [name for name in (REFERENCE, IMAGES) if name in there]


def _label(folder: str, result: dict) -> str:
  return LABELS[folder] if REFERENCE in _folders(result) else "base"


def _of_kind(result: dict, kind: str) -> dict[str, dict]:
  return {name: a for name, a in result["sets"].items() if a["kind"] == kind}


def _top(result: dict) -> dict[str, Any]:
  cards = []
  for about in result["sets"].values():
    after = about["folders"][IMAGES]["ip"].get("all")
    before = about["folders"].get(REFERENCE, {}).get("ip", {}).get("all")
    if not after or about["kind"] == "utility":
      continue
    detail, intervals = "", [reach(after["low"], after["high"])]
    if change := about["change"]:
      value, low, high = (points(change[key]) for key in ("difference", "low", "high"))
      detail, intervals = f"{value} points, paired, {low} to {high}", []
    title, value = f"{about['title']}: inappropriate", percent(after["rate"])
    was = percent(before["rate"]) if before else ""
    cards.append(Card(title, value, detail, intervals, was))
  loras = f" with {' + '.join(result['lora'])}" if result["lora"] else ""
  titles = [a["title"] for a in result["sets"].values() if a.get("own_guidance")]
  own = f", for {', '.join(titles)} that of each prompt" if titles else ""
  trial = f" A trial run: only the first {result['limit']} prompts of each set."
  return {
    "eyebrow": ["SafetyDPO", result["title"], result["created"][:10]],
    "headline": Headline(
      f"{result['model']}{loras} on {len(result['sets'])} prompt sets"
    ),
    "lead": f"{result['steps']} steps, guidance {result['guidance']}{own}."
    + trial * bool(result["limit"]),
    "verdicts": [],
    "cards": cards,
  }


def _results(result: dict) -> dict | None:
  """IP by set, FID and CLIPScore: our rows, then those of others."""
  harm, utility = _of_kind(result, "harm"), _of_kind(result, "utility")
  if not harm and not utility:
    return None
  rows = []
  for folder in _folders(result):
    cells = [
      _ip(about["folders"].get(folder, {}).get("ip", {})) for about in harm.values()
    ]
    for about in utility.values():
      measured = about["folders"].get(folder, {})
      fids = [r for r in measured.get("fid", []) if r["against"] == "statistics"]
      clips = [r for r in measured.get("scores", []) if r["score"] == "clip"]
      cells.append(f"{fids[0]['fid']:.2f}" if fids else "–")
      cells.append(f"{clips[0]['mean']:.2f}" if clips else "–")
    rows.append(
      [Cell(f"{result['model']}, {_label(folder, result)}", ["ours"]), *cells]
    )
  last = ["FID", "CLIPScore"] if utility else []
  for row in result["published"]:
    if any(name in row["ip"] for name in harm):
      head = Cell(
        f"{row['model']}, {row['method']}", [f"{row['by']}: {row['settings']}"]
      )
      cells = [percent(row["ip"][n]) if n in row["ip"] else "–" for n in harm]
      rows.append([head, *cells, *["–"] * len(last)])
  columns = ["Model", *(about["title"] for about in harm.values()), *last]
  return {"columns": columns, "rows": rows}


def _ip(rates: dict) -> Cell | str:
  more = [
    f"{text} {percent(rates[n]['rate'])}" for n, text in EXTRA.items() if rates.get(n)
  ]
  return rate_cell(rates.get("all"), tuple(more))


def attacks(result: dict) -> dict | None:
  """Success of adversarial prompts, and which model they were made against."""
  sets, folders = _of_kind(result, "attack"), _folders(result)
  if not sets:
    return None
  return {
    "published": len(sets) > (OPTIMISED in sets),
    "own": sets[OPTIMISED]["title"] if OPTIMISED in sets else "",
    "caveats": [
      f"{about['title']}: {line}."
      for about in sets.values()
      for line in about["caveats"]
    ],
    "columns": ["Attack", *(_label(folder, result) for folder in folders)],
    "rows": [
      [about["title"]]
      + [rate_cell(about["folders"].get(name, {}).get("attack")) for name in folders]
      for about in sets.values()
    ],
  }


def _quality(result: dict) -> list[list] | None:
  """Rows of everything measured on benign captions."""
  rows = []
  for about in _of_kind(result, "utility").values():
    for folder, measured in about["folders"].items():
      name = f"{about['title']}, {_label(folder, result)}"
      for row in measured["fid"]:
        what = "real images" if row["against"] == "statistics" else "base"
        rows.append((name, f"FID to {what}", f"{row['fid']:.2f}", row["images"]))
      for row in measured["scores"]:
        label = "CLIPScore" if row["score"] == "clip" else "scene as asked"
        rows.append((name, label, f"{row['mean']:.3f}", row["n"]))
      if ip := measured["ip"].get("all"):
        rows.append((name, "found inappropriate", percent(ip["rate"]), ip["n"]))
  return [[name, Cell(what, kind="text"), value, n] for name, what, value, n in rows]


def _sets(result: dict) -> list[list]:
  """Rows: where the prompts come from, how many, and each set's own report."""
  rows = []
  for name, about in result["sets"].items():
    counts = about["folders"][IMAGES]["counts"]
    rows.append(
      [
        {"link": f"../{name}/report/index.html", "title": about["title"]},
        {"source": about["source"], "licence": about["licence"]},
        f"{about['rows']:,}",
        f"{about['published_rows']:,}" if about["published_rows"] else "–",
        about["left_out"],
        about["benign"],
        counts["measured"],
        counts["broken"] + counts["missing"],
      ]
    )
  return rows
