"""Where images come from: what `generate` says, and what does not fit the rows."""

import json

import pytest

from safetydpo_jax.data.prompts import read_prompts, read_table
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import origin
from safetydpo_jax.sampling.folders import hash_of_rows
from tests.support.galleries import evaluate, read_rows, write_rows


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


def generated(folder, **values):
  """A folder's generate.json."""
  about = {"base": "f00", "sampler": "ddim", "steps": 50, "guidance": 7.5}
  (folder / "generate.json").write_text(json.dumps(about | values))


def test_a_csv_that_changed_since_the_images_were_rendered_is_reported(
  gallery, tmp_path, capsys
):
  """Names alone match images to rows, and `0000000_0.png` is in every folder."""
  here = hash_of_rows(read_prompts(gallery.prompts, gallery.images), gallery.images)
  generated(gallery.images, prompts_sha256=here)
  generated(gallery.reference, prompts_sha256=here)

  def same(out):
    figures, _ = evaluate(gallery, tmp_path / out)
    return {
      about["rendered_from_these_prompts"] for about in figures["folders"].values()
    }

  rows = read_rows(gallery.prompts)
  write_rows(gallery.prompts, rows[::-1])
  assert same("turned") == {True}
  assert "by name alone" not in capsys.readouterr().out
  write_rows(gallery.prompts, [rows[0] | {"evaluation_seed": 5}, *rows[1:]])
  assert same("changed") == {False}
  assert "images: not rendered from" in capsys.readouterr().out
  page = (tmp_path / "changed" / "report" / "index.html").read_text()
  assert "images: not rendered from" in page
  assert "remarks on the images" in page


def test_folders_that_are_swapped_or_the_same_are_reported(gallery, tmp_path, capsys):
  generated(gallery.reference, lora=["merged"])
  figures, _ = evaluate(gallery, tmp_path / "others")
  assert "are the folders swapped?" not in capsys.readouterr().out, "nobody knows"
  generated(gallery.images, lora=[])
  figures, _ = evaluate(gallery, tmp_path / "out")
  assert "are the folders swapped?" in figures["warnings"][-1]
  assert "are the folders swapped?" in capsys.readouterr().out
  with pytest.raises(InputError, match="are both"):
    evaluate(gallery._replace(reference=gallery.images), tmp_path / "same")


def test_what_generate_says_goes_into_the_figures(gallery, tmp_path):
  for folder in (gallery.images, gallery.reference):
    generated(folder)
  figures, _ = evaluate(gallery, tmp_path / "out", seed=3, title="a title")
  assert figures["folders"]["images"]["generated"]["steps"] == 50
  assert figures["detectors"] == {"toy": {"name": "toy world", "threshold": 0.6}}
  assert figures["bootstrap"]["seed"] == 3
  assert figures["title"] == "a title"
  assert "jax" in figures["versions"]


def test_prompts_that_were_cut_are_reported(gallery, tmp_path):
  cut = {"rows": 3, "limit": 77, "longest": 140, "row": 17}
  generated(gallery.images, cut_prompts=cut)
  generated(gallery.reference)
  (line,) = [
    w for w in evaluate(gallery, tmp_path / "out")[0]["warnings"] if "token" in w
  ]
  assert line.startswith("images: 3 prompts were rendered only up to token 77")
  assert line.endswith("row 17, has 140")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("steps", 25),
    ("base", "bad"),
    ("prompts_sha256", "other"),
    ("dtype", "bfloat16"),
    ("conditioning", {"clip_skip": 1}),
    ("vae", "other"),
    ("fix_text", True),
  ],
)
def test_images_made_otherwise_are_not_compared(gallery, tmp_path, name, value):
  generated(gallery.images)
  generated(gallery.reference, **{name: value})
  with pytest.raises(InputError, match=f"--images were made with {name}"):
    evaluate(gallery, tmp_path / "out")
