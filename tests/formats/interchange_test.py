"""docs/interchange.md: every command in it works as it stands."""

import re
import shlex

import numpy as np
import pytest

from safetydpo_jax import export, load_pipeline
from safetydpo_jax.formats.loras import expert
from tests.support import interchange, runs, twins

PAGE = (runs.ROOT / "docs" / "interchange.md").read_text()


def test_every_command_and_snippet_works(
  tiny_checkpoint, tmp_path, monkeypatch, capsys
):
  """In the page's order, with a tiny model in place of the one it names."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "sd15").symlink_to(tiny_checkpoint)
  pipeline = load_pipeline("sd15", components=("unet",))
  tree = twins.random_lora(pipeline.params["unet"], size=0.05)
  base = {"name": "sd15", "fingerprint": pipeline.fingerprint}
  expert.write_expert(tmp_path / "merged", tree, {"base": base})
  blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)
  assert [kind for kind, _ in blocks].count("bash") == 6
  seen, images = {}, []
  for kind, text in blocks:
    if kind == "bash":
      words = shlex.split(text.replace("\\\n", " "))
      if "single_file" in words or "safetydpo_jax.generate" in words:
        continue  # in single_file_commands_test.py: this tiny model cannot be one
      assert words[:3] == ["python", "-m", "safetydpo_jax.export"]
      export.main(words[3:])
      continue
    text = text.replace("sd-legacy/stable-diffusion-v1-5", "sd15")
    text = text.replace('rain")', 'rain", num_inference_steps=2)')
    text = text.replace("images[0]", "images[0]; images.append(image)")
    exec(text, seen | {"images": images}, seen)
    if "load_lora_weights" in text or "exported/pipeline" in text:
      got = twins.predict_torch(seen["pipeline"].unet, twins.draw_inputs())
      ours = twins.predict_ours(pipeline, tree, twins.draw_inputs())
      np.testing.assert_allclose(got, ours, rtol=0, atol=5e-3)
  assert (
    "largest difference between PyTorch and this package" in capsys.readouterr().out
  )
  assert len(images) == 2
  assert seen["lora"].keys() == tree.keys()


@pytest.mark.parametrize(
  "name", ["--format", "--dtype", "--verify", "--push", "--figures"]
)
def test_every_option_of_the_command_is_on_the_page(name):
  assert name in PAGE


ROWS = list(interchange.rows())


@pytest.mark.parametrize("row", ROWS, ids=[f"{r.tool}, {r.file}" for r in ROWS])
def test_the_table_has_the_rows_that_its_command_prints(row):
  """Counted again are single files of the usual models; others are tested elsewhere."""
  (line,) = [line for line in PAGE.splitlines() if line.startswith(row.start())]
  counts, by, difference = line.removeprefix(row.start()).rstrip(" |").split(" | ")
  assert by == row.by
  assert float(difference) < 1e-5
  found = re.findall(r"([\d,]+) of ([\d,]+)", counts)
  found = [tuple(int(n.replace(",", "")) for n in pair) for pair in found]
  assert len(found) == len(row.families)
  if row.file.startswith("single file") and row.families == interchange.USUAL:
    assert found == [row.count(name) for name in row.families]
  else:
    assert all(read == there for read, there in found if "single" not in row.file)


def test_the_table_has_no_other_rows():
  table = PAGE.split(f"| {interchange.HEADER} |")[1].split("\n\n")[0]
  assert len(table.strip().splitlines()) == 1 + len(ROWS)
