"""The study as a picture: methods, number of experts, share of the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from safetydpo_jax.merging import comerge
from safetydpo_jax.runtime import extras, files
from safetydpo_jax.toyworld.experiments import study_tables
from safetydpo_jax.toyworld.experiments.study_tables import (
  ALONE,
  LINEAR,
  Figures,
  Results,
  Table,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Kind of LoRA → colour and mark. Colour-blind safe (Okabe and Ito).
STYLES = {
  "linear": ("#E69F00", "o"),
  "co_merge": ("#0072B2", "D"),
  "all_single": ("#D55E00", "s"),
  "other": ("#888888", "^"),
}
# Names that are written, and where beside their mark; others would overlap.
NAMES = {
  "linear, mean": (-6, 0, "right"),
  "linear, weights 0.25": (-6, -12, "right"),
  "ties": (0, 16, "center"),
  "dare_ties": (0, 8, "center"),
  "co_merge_factor": (-6, 0, "right"),
  "co_merge_product": (-6, 0, "right"),
  "as many steps as one expert": (8, 4, "left"),
  "as many steps as all experts, a third of the rate": (0, 8, "center"),
}
LEAST = 85  # per cent of utility; what is less useful is in the tables only


def draw(file: Path, results: Results) -> None:
  """Writes the picture.

  Raises:
    InputError: matplotlib is not installed, or the file cannot be written.
  """
  matplotlib = extras.require("matplotlib", extra="report")
  figure_class = extras.require("matplotlib.figure", extra="report").Figure
  figures = study_tables.read_figures(results)
  count = len(next(iter(results.values()))["demo"]["categories"])
  style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
  with matplotlib.rc_context(style):
    figure = figure_class(figsize=(12, 4.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    _methods(panels[0], figures, count)
    _experts(panels[1], figures, count)
    _data(panels[2], figures)
    with files.writing(file) as temporary, files.naming(file):
      figure.savefig(temporary, format="png")


def _mean(seeds: Sequence[Figures]) -> tuple[float, float]:
  """(IP, utility) in per cent."""
  ip, utility = ([x.ip for x in seeds], [x.utility for x in seeds])
  return 100 * float(np.mean(ip)), 100 * float(np.mean(utility))


def _methods(axes: Axes, figures: Table, count: int) -> None:
  """IP against utility: down and to the right is better."""
  curve = []
  for (group, name), seeds in figures.items():
    if group not in ("all_single", "merges"):
      continue
    kind = next((k for k in STYLES if name.startswith(k)), "other")
    colour, mark = STYLES["all_single" if group == "all_single" else kind]
    ip, utility = _mean(seeds)
    if kind == "linear":
      curve.append((utility, ip))
    axes.plot(
      [100 * x.utility for x in seeds],
      [100 * x.ip for x in seeds],
      ".",
      color=colour,
      alpha=0.5,
      ms=4,
    )
    axes.plot(utility, ip, mark, color=colour, ms=7)
    if name in NAMES and utility >= LEAST:
      right, up, side = NAMES[name]
      axes.annotate(
        name if group == "merges" else "one LoRA, " + name.split(", ")[-1],
        (utility, ip),
        (right, up),
        textcoords="offset points",
        size=7,
        ha=side,
      )
  axes.plot(*zip(*sorted(curve)), color=STYLES["linear"][0], lw=1, zorder=0)
  axes.set(xlabel=f"utility from {LEAST} %", ylabel="IP, %", xlim=(LEAST, 103))
  axes.set_title(f"{count} experts in one LoRA")


def _experts(axes: Axes, figures: Table, count: int) -> None:
  """IP over all categories by the number of experts merged."""
  merged = {"linear": LINEAR, "co_merge": comerge.DEFAULT}
  for method, whole in merged.items():
    keys = [(f"experts, {method}", str(n)) for n in range(1, count)]
    keys.append(("merges", whole))
    _band(axes, range(1, count + 1), [figures[key] for key in keys], method)
  axes.legend(["linear, mean", "Co-Merge"], frameon=False)
  axes.set(xlabel="experts merged", ylabel="IP over all categories, %", ylim=(0, None))
  axes.set_title("Number of experts")


def _data(axes: Axes, figures: Table) -> None:
  """IP of single experts by the share of the pairs."""
  shares = study_tables.shares(figures)
  seeds = [figures[f"data, {share:g}", ""] for share in shares] + [figures[ALONE, ""]]
  _band(axes, [100 * share for share in (*shares, 1)], seeds, "co_merge")
  axes.set(xlabel="share of the pairs, %", ylabel="IP, %", ylim=(0, None))
  axes.set_title("Pairs of an expert")


def _band(
  axes: Axes, x: Sequence[float], rows: Sequence[Sequence[Figures]], style: str
) -> None:
  """A line of mean IPs, with the lowest and highest of the seeds."""
  colour, mark = STYLES[style]
  values = 100 * np.array([[figures.ip for figures in seeds] for seeds in rows])
  means = values.mean(1)
  spread = np.abs(np.stack([values.min(1), values.max(1)]) - means[None])
  axes.errorbar(list(x), means, spread, color=colour, marker=mark, ms=5, capsize=3)
