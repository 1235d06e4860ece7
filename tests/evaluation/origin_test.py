"""Whether a folder was rendered from the rows that it is measured with."""

from safetydpo_jax.data.prompts import read_table
from safetydpo_jax.evaluation import origin
from safetydpo_jax.sampling.folders import hash_of_rows


def test_the_rows_guidance_counts_unless_it_was_left_out(tmp_path):
  (tmp_path / "p.csv").write_text("prompt,sd_guidance_scale\na,9\nb,\n")
  table = read_table(tmp_path / "p.csv")
  own, one = (
    hash_of_rows(rows.in_folder(tmp_path), tmp_path)
    for rows in (table, table.without_guidance())
  )
  made = [
    ({"prompts_sha256": own}, True),
    ({"prompts_sha256": one}, False),
    ({"prompts_sha256": one, "no_row_guidance": True}, True),
    ({"prompts_sha256": own, "no_row_guidance": None}, True),
  ]
  for about, expected in made:
    assert origin.same_prompts(table, tmp_path, about) is expected, about
