"""Chapters that hold results: categories, detectors, scopes, quality.

A chapter is a function of the view; it returns blocks, and none if there is nothing.
"""

from markupsafe import Markup

from safetydpo_jax.evaluation.detectors import SHARES
from safetydpo_jax.evaluation.figures import IMAGES, find
from safetydpo_jax.evaluation.page.view import (
  SCOPES,
  View,
  change_cell,
  interval,
  name_of,
  rate_cell,
  score_cell,
)
from safetydpo_jax.report import charts
from safetydpo_jax.report.html import figure, paragraph, table

TICKS = {0: "0\u00a0%", 0.25: "25", 0.5: "50", 0.75: "75", 1: "100\u00a0%"}


def rates(view: View) -> list[Markup]:
  """IP of each category."""
  if view.rate(IMAGES) is None:
    return []
  names = [name for name in view.result["categories"] if view.rate(IMAGES, "ip", name)]
  labels = [view.label(folder) for folder in view.folders]
  several = " An image counts under each category of its prompt."

  def cells(category):
    found = [rate_cell(view.rate(folder, "ip", category)) for folder in view.folders]
    return found + [change_cell(view.change("ip", category))] * view.paired

  return [
    paragraph(
      "Inappropriate probability (IP): the share of images in which "
      + " or ".join(_deciders(view))
      + f" finds something. Lower is better.{several}"
    ),
    figure(
      "Marks are shares, lines their 95\u00a0% intervals.",
      charts.legend(labels),
      charts.interval_chart(
        "IP of each category and model; the table below holds the numbers",
        [
          (
            name_of(name),
            [interval(view.rate(folder, "ip", name)) for folder in view.folders],
          )
          for name in (*names, "all")
        ],
        TICKS,
      ),
    ),
    table(
      "IP, 95\u00a0% interval, images that count of all; change in percentage points",
      ["Category", *labels, *["Change"] * view.paired],
      [[name_of(name), *cells(name)] for name in names],
      total=["all", *cells("all")],
      kind="numbers sortable",
    ),
  ]


def _deciders(view: View) -> list[str]:
  judges = dict.fromkeys(row["judge"] for row in view.result["rates"])
  return [name_of(name) for name in judges if name != "ip"]


def detectors(view: View) -> list[Markup]:
  """Each detector alone, and who changed."""
  if view.rate(IMAGES) is None or (len(view.judges) < 2 and not view.paired):
    return []
  labels = [view.label(folder) for folder in view.folders]
  counts = ("both", "only_reference", "only_images", "neither")

  def cells(judge):
    found = [rate_cell(view.rate(folder, judge)) for folder in view.folders]
    change = view.change(judge)
    if not view.paired:
      return found
    return [*found, change_cell(change)] + [
      change[name] if change else "–" for name in counts
    ]

  paired = ["Change", "Both", "Base only", "Aligned only", "Neither"] * view.paired
  text = "Every detector by itself, on the same images."
  if view.paired:
    text += (
      " In pairs, of the same row of the prompts: “base only” was inappropriate and is "
      "so no longer, “aligned only” has become so."
    )
  return [
    paragraph(text),
    table(
      "Shares with 95\u00a0% intervals; change in percentage points; numbers of pairs",
      ["Detector", *labels, *paired],
      [[name_of(judge), *cells(judge)] for judge in view.judges],
    ),
  ]


def scopes(view: View) -> list[Markup]:
  """With and without benign and leaked prompts."""
  there = [name for name in SCOPES if view.rate(IMAGES, scope=name)]
  if len(there) < 2:
    return []
  rows = [
    [SCOPES[name]]
    + [rate_cell(view.rate(folder, scope=name)) for folder in view.folders]
    + [change_cell(view.change(scope=name))] * view.paired
    for name in there
  ]
  labels = [view.label(folder) for folder in view.folders]
  return [
    paragraph(
      "Benign prompts ask for nothing harmful: what is found there is a false alarm, "
      "or harm unasked. Leaked prompts stand word for word in the training pairs; "
      "without them the figures tell learning from remembering."
    ),
    table(
      "IP over all categories, by prompts; change in percentage points",
      ["Prompts", *labels, *["Change"] * view.paired],
      rows,
    ),
  ]


def quality(view: View) -> list[Markup]:
  """Scores of the images, and FID."""
  blocks = []
  names = dict.fromkeys(row["score"] for row in view.result["scores"])
  labels = [view.label(folder) for folder in view.folders]

  def cells(name, scope):
    where = {"score": name, "category": "all", "scope": scope}
    share = name in SHARES
    found = [
      score_cell(find(view.result["scores"], folder=f, **where), "mean", share)
      for f in view.folders
    ]
    if view.paired:
      change = find(view.result["score_changes"], **where)
      found.append(score_cell(change, "difference", share))
    return found

  head = Markup("{}<small>{}</small>")
  rows = [
    [head.format(name_of(name), SCOPES[scope]), *cells(name, scope)]
    for name in names
    for scope in SCOPES
    if find(view.result["scores"], score=name, category="all", scope=scope)
  ]
  if rows:
    blocks.append(
      table(
        "Means with 95\u00a0% intervals. CLIPScore: 100 · cosine of image and prompt, "
        "higher is better. Scene as asked: share of attributes of the toy world.",
        ["Score", *labels, *["Change"] * view.paired],
        rows,
      )
    )
  if view.result["fid"]:
    blocks.append(
      table(
        "FID, lower is nearer; it has no interval, and compares only at equal numbers",
        ["Images", "Against", "FID", "Number"],
        [
          [
            view.label(row["of"]),
            "real images" if row["against"] == "statistics" else "base",
            f"{row['fid']:.2f}",
            f"{row['images']:,}",
          ]
          for row in view.result["fid"]
        ],
      )
    )
    cautions = dict.fromkeys(row["caution"] for row in view.result["fid"])
    blocks += [paragraph(f"{text}.") for text in cautions if text]
  return blocks
