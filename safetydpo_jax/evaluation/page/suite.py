"""The report of a suite: one table in the papers' layout, ours and published rows."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.page import script
from safetydpo_jax.evaluation.page.view import name_of, points, rate_cell, toy_caution
from safetydpo_jax.report.html import (
  contents,
  join,
  page,
  paragraph,
  percent,
  section,
  table,
)

LABELS = {REFERENCE: "base", IMAGES: "aligned"}
EXTRA = {
  "without_benign": "harmful",
  "without_leaked": "new",
  "without_either": "harmful, new",
}
OPTIMISED = "unlearn_diff_atk"  # the one attack that has no published prompts


def build(result: dict[str, Any]) -> str:
  """The page as HTML."""
  bodies = {
    "Results": _results(result),
    "Attacks": _attacks(result),
    "Quality on COCO": _quality(result),
    "The sets": _sets(result),
    "Before you quote a number": _note(result),
  }
  bodies = {name: body for name, body in bodies.items() if body}
  return page(
    f"SafetyDPO, {result.get('title') or 'suite ' + result['suite']}",
    _masthead(result),
    contents(list(bodies)),
    *(section(name, *body) for name, body in bodies.items()),
    script=script.SCRIPT,
  )


def _folders(result: dict) -> list[str]:
  there = {name for about in result["sets"].values() for name in about["folders"]}
  return [name for name in (REFERENCE, IMAGES) if name in there]


def _label(folder: str, result: dict) -> str:
  return LABELS[folder] if REFERENCE in _folders(result) else "base"


def _of_kind(result: dict, kind: str) -> dict[str, dict]:
  return {name: a for name, a in result["sets"].items() if a["kind"] == kind}


def _masthead(result: dict) -> Markup:
  eyebrow = ("SafetyDPO", result["title"], result["created"][:10])
  cards = []
  for about in result["sets"].values():
    after = about["folders"][IMAGES]["ip"].get("all")
    before = about["folders"].get(REFERENCE, {}).get("ip", {}).get("all")
    if after and about["kind"] != "utility":
      value = (
        Markup('<span class="before">{} →</span> ').format(percent(before["rate"]))
        if before
        else Markup("")
      )
      change = about["change"]
      detail = f"95\u00a0% interval {100 * after['low']:.1f}–{percent(after['high'])}"
      if change:
        detail = (
          f"{points(change['difference'])} points in pairs, {points(change['low'])} to "
          f"{points(change['high'])}"
        )
      cards.append(
        Markup("<div><dt>{}</dt><dd>{}{} <small>{}</small></dd></div>").format(
          f"{about['title']}: inappropriate", value, percent(after["rate"]), detail
        )
      )
  loras = f" with {' + '.join(result['lora'])}" if result["lora"] else ""
  trial = f" Only the first {result['limit']} prompts of each: a trial."
  return Markup(
    '<header><p class="eyebrow">{}</p><h1>{} on {} prompt sets</h1>'
    '<p class="lead">{}</p><dl class="headline">{}</dl></header>'
  ).format(
    " · ".join(str(part) for part in eyebrow if part),
    f"{result['model']}{loras}",
    len(result["sets"]),
    f"{result['steps']} steps, guidance {result['guidance']}."
    + trial * bool(result["limit"]),
    join(cards),
  )


def _results(result: dict) -> list[Markup]:
  """IP by set, FID and CLIPScore: our rows, then those of others."""
  harm, utility = _of_kind(result, "harm"), _of_kind(result, "utility")
  columns = [about["title"] for about in harm.values()]
  last = ["FID", "CLIPScore"] if utility else []

  def ours(folder):
    cells = [_ip(about, folder) for about in harm.values()]
    for about in utility.values():
      told = about["folders"].get(folder, {})
      fids = [row for row in told.get("fid", []) if row["against"] == "statistics"]
      clips = [row for row in told.get("scores", []) if row["score"] == "clip"]
      cells.append(f"{fids[0]['fid']:.2f}" if fids else "–")
      cells.append(f"{clips[0]['mean']:.2f}" if clips else "–")
    return cells

  mark = Markup("{}<small>{}</small>")
  rows = [
    [mark.format(f"{result['model']}, {_label(folder, result)}", "ours"), *ours(folder)]
    for folder in _folders(result)
  ]
  for row in result["published"]:
    head = mark.format(
      f"{row['model']}, {row['method']}", f"{row['by']}: {row['settings']}"
    )
    cells = [percent(row["ip"][n]) if n in row["ip"] else "–" for n in harm]
    if any(cell != "–" for cell in cells):
      rows.append([head, *cells, *["–"] * len(last)])
  if not columns and not last:
    return []
  return [
    paragraph(
      "Inappropriate probability by set, of all its prompts, as published figures are; "
      "below ours, the same without benign prompts (harmful) and without prompts that "
      "training has seen (new). Published rows were measured by others."
    ),
    table(
      "IP with 95\u00a0% intervals, lower is better; FID lower, CLIPScore higher",
      ["Model", *columns, *last],
      rows,
    ),
  ]


def _ip(about: dict, folder: str) -> Markup | str:
  told = about["folders"].get(folder, {}).get("ip", {})
  if not told.get("all"):
    return "–"
  more = [
    Markup("<small>{} {}</small>").format(text, percent(told[scope]["rate"]))
    for scope, text in EXTRA.items()
    if told.get(scope)
  ]
  return rate_cell(told["all"]) + Markup('<span class="detail">{}</span>').format(
    join(more)
  )


def _attacks(result: dict) -> list[Markup]:
  """Success of adversarial prompts."""
  rows = []
  sets = _of_kind(result, "attack")
  for about in sets.values():
    cells = [
      rate_cell(about["folders"].get(folder, {}).get("attack"))
      for folder in _folders(result)
    ]
    rows.append([about["title"], *cells])
  if not rows:
    return []
  text = (
    "Attack success rate: the share of adversarial prompts of which at least one image "
    "is found inappropriate."
  )
  if len(sets) > (OPTIMISED in sets):
    text += (
      " Published prompts were made against other models; an attacker who knows this "
      "one may do better."
    )
  if OPTIMISED in sets:
    text += (
      f" Those of {sets[OPTIMISED]['title']} are the user’s own and count for the "
      "model that they were optimised against."
    )
  return [
    paragraph(text),
    table(
      "Attack success rate, 95\u00a0% interval, prompts that succeed of all",
      ["Attack", *(_label(folder, result) for folder in _folders(result))],
      rows,
    ),
  ]


def _quality(result: dict) -> list[Markup]:
  """Everything measured on benign captions."""
  rows: list[Sequence[Any]] = []
  for about in _of_kind(result, "utility").values():
    for folder, told in about["folders"].items():
      name = f"{about['title']}, {_label(folder, result)}"
      for row in told["fid"]:
        what = "real images" if row["against"] == "statistics" else "base"
        rows.append([name, f"FID to {what}", f"{row['fid']:.2f}", row["images"]])
      for row in told["scores"]:
        label = {"clip": "CLIPScore"}.get(row["score"], "scene as asked")
        rows.append([name, label, f"{row['mean']:.3f}", row["n"]])
      if ip := told["ip"].get("all"):
        rows.append([name, "found inappropriate", percent(ip["rate"]), ip["n"]])
  if not rows:
    return []
  text = Markup('<span class="text">{}</span>')
  return [
    table(
      "Captions that ask for nothing harmful",
      ["Images", text.format("Measure"), "Value", "Images"],
      [[name, text.format(what), value, n] for name, what, value, n in rows],
    )
  ]


def _sets(result: dict) -> list[Markup]:
  """Where the prompts come from, how many, and each set's own report."""
  rows = []
  for name, about in result["sets"].items():
    link = Markup('<a href="../{}/report/index.html">{}</a>').format(
      name, about["title"]
    )
    counts = about["folders"][IMAGES]["counts"]
    lost = counts["broken"] + counts["missing"]
    rows.append(
      [
        link,
        Markup('<span class="text">{}<br><small>{}</small></span>').format(
          about["source"], about["licence"]
        ),
        f"{about['rows']:,}",
        f"{about['published_rows']:,}" if about["published_rows"] else "–",
        about["left_out"],
        about["benign"],
        counts["measured"],
        lost,
      ]
    )
  columns = ["Set", Markup('<span class="text">Source</span>'), "Prompts", "Published"]
  return [
    table(
      "The sets, each with its own report of categories, pairs and images",
      [*columns, "Left out", "Benign", "Measured", "Lost"],
      rows,
    )
  ]


def _note(result: dict) -> list[Markup]:
  names = [name_of(name) for name in result["detectors"]]
  return [
    *toy_caution(result["detectors"]),
    paragraph(
      f"Ours are found by {', '.join(names)}, published rows by Q16 or NudeNet. "
      "Ours and published rows differ in the sampler, its steps, the seeds and perhaps "
      "in the detectors’ versions. Compare our base with the published base first: as "
      "far as these two are apart, so far the others may be too."
    ),
  ]
