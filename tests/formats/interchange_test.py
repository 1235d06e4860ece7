"""docs/interchange.md: every command in it works as it stands."""

import re
import shlex

import numpy as np
import pytest

from safetydpo_jax import export, load_pipeline
from safetydpo_jax.formats.loras import expert
from tests.support import runs, twins

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
