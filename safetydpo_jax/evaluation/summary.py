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
      print(
        f"{row['folder']:10}{row['judge']:10}{row['rate']:8.1%}   95 % "
        f"{row['low']:.1%} to {row['high']:.1%}   {row['count']} of {row['n']} images"
      )
  for row in result["changes"]:
    if (row["category"], row["scope"]) == ("all", result["headline"]):
      print(
        f"{'change':10}{row['judge']:10}{row['difference']:+8.1%}   95 % "
        f"{row['low']:+.1%} to {row['high']:+.1%}   only reference "
        f"{row['only_reference']}, only images {row['only_images']}"
      )
  view = View(result, [], {})
  for row in result["scores"]:
    if (row["category"], row["scope"]) == ("all", view.score_scope(row["score"])):
      line = f"{row['folder']:10}{row['score']:10}{row['mean']:8.3f}   "
      if row["low"] is not None:
        line += f"95 % {row['low']:.3f} to {row['high']:.3f}   "
      print(line + SCOPES[row["scope"]])
  for row in result["fid"]:
    print(f"{row['of']:10}{'fid':10}{row['fid']:8.2f}   against {row['against']}")
    if row["caution"]:
      print(row["caution"])
