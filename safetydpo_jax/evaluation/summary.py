"""The headline figures of an evaluation, as printed lines."""

from typing import Any

import jax

from safetydpo_jax.evaluation.report_view import SCOPES, View


def print_summary(result: dict[str, Any]) -> None:
  """Prints the headline figures of figures.json's content, on host 0."""
  if jax.process_index() > 0:
    return
  if result["rates"] and result["headline"] != "all":
    benign = result["prompts"]["benign"]
    print(f"rates are without {benign} rows whose prompts ask for no harm")
  for row in result["rates"]:
    if (row["category"], row["scope"]) == ("all", result["headline"]):
      print(_rate(row["folder"], row["judge"], row, "images"))
  for row in result["changes"]:
    if (row["category"], row["scope"]) == ("all", result["headline"]):
      print(_change(row))
  view = View(result, [], {})
  for row in result["scores"]:
    if (row["category"], row["scope"]) == ("all", view.score_scope(row["score"])):
      print(_score(row))
  for row in result["fid"]:
    print(_fid(row))
    if row["caution"]:
      print(row["caution"])


def print_suite(result: dict[str, Any]) -> None:
  """Prints the same of each set of a suite's figures.json, over all its prompts.

  Of an attack's set, the rate is its success, over prompts.
  """
  if jax.process_index() > 0:
    return
  for about in result["sets"].values():
    for line in _of_set(about):
      print(f"{about['title']:16}{line}")
  for about in result["sets"].values():
    for line in [*about["caveats"], *_cautions(about)]:
      print(f"{about['title']}: {line}")


def _of_set(about: dict[str, Any]) -> list[str]:
  rates, others = [], []
  for folder, measured in about["folders"].items():
    if attack := measured.get("attack"):
      rates.append(_rate(folder, "attack", attack, "prompts"))
    elif row := measured["ip"].get("all"):
      rates.append(_rate(folder, "ip", row, "images"))
    others += [_score(row) for row in measured["scores"]]
    others += [_fid(row) for row in measured["fid"]]
  change = [_change(about["change"])] if about["change"] else []
  return rates + change + others


def _cautions(about: dict[str, Any]) -> list[str]:
  """Of FID: the same line for every folder."""
  rows = [row for measured in about["folders"].values() for row in measured["fid"]]
  return list(dict.fromkeys(row["caution"] for row in rows if row["caution"]))


def _rate(folder: str, judge: str, row: dict[str, Any], unit: str) -> str:
  return (
    f"{folder:10}{judge:10}{row['rate']:8.1%}   95 % "
    f"{row['low']:.1%} to {row['high']:.1%}   {row['count']} of {row['n']} {unit}"
  )


def _change(row: dict[str, Any]) -> str:
  return (
    f"{'change':10}{row['judge']:10}{row['difference']:+8.1%}   95 % "
    f"{row['low']:+.1%} to {row['high']:+.1%}   only reference "
    f"{row['only_reference']}, only images {row['only_images']}"
  )


def _score(row: dict[str, Any]) -> str:
  line = f"{row['folder']:10}{row['score']:10}{row['mean']:8.3f}   "
  if row["low"] is not None:
    line += f"95 % {row['low']:.3f} to {row['high']:.3f}   "
  return line + SCOPES[row["scope"]]


def _fid(row: dict[str, Any]) -> str:
  return f"{row['of']:10}{'fid':10}{row['fid']:8.2f}   against {row['against']}"
