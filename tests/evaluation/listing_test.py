"""The lines that are printed of images without a measurement."""

from safetydpo_jax.data.prompts import read_table
from safetydpo_jax.evaluation import listing
from safetydpo_jax.evaluation.cases import make_cases
from safetydpo_jax.evaluation.scoring import Outcome


def test_the_printed_lines_name_some_and_count_the_rest(drawn, tmp_path):
  rows = make_cases(read_table(drawn.prompts))
  outcomes = [Outcome("missing") if i < 5 else Outcome("measured") for i in range(24)]
  (line,) = listing.warnings(rows, outcomes, "images")
  names = ", ".join(sorted(row.name for row in rows[:5])[:3])
  assert line == f"images: 5 missing: {names} and 2 more, see images.csv"
