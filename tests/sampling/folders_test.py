"""Folders of images: what made them is told from a manifest, of older versions too."""

import numpy as np
import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import adapter as adapters
from safetydpo_jax.formats.loras.adapter import Adapter, Change
from safetydpo_jax.lora import LoraTree
from safetydpo_jax.runtime import manifest
from safetydpo_jax.sampling import folders
from safetydpo_jax.sampling.folders import Folder

TREE = {
  "down_blocks_0": {
    "to_q": {
      "a": np.arange(6, dtype=np.float32).reshape(3, 2),
      "b": np.ones((2, 4), np.float32),
    }
  }
}
# Of `TREE`, by the code of version 0.1.0.
OLD = "8faf7f3321e542a94a16135c1a62ad7944e35edd579338d50eefb8f573fad782"


@pytest.mark.parametrize("name", [folders.MANIFEST, folders.PLAN])
def test_a_lora_is_known_by_the_hash_of_version_0_1(tmp_path, name):
  adapter = adapters.of_lora(LoraTree(TREE))
  settings = {"lora_sha256": adapters.sha256(adapter), "steps": 2}
  folder = Folder(tmp_path, [], adapter, settings)
  assert settings["lora_sha256"] != OLD
  manifest.write_json(tmp_path / name, {**settings, "lora_sha256": OLD})
  folders.check_same_settings(folder)
  manifest.write_json(tmp_path / name, {**settings, "lora_sha256": OLD[::-1]})
  with pytest.raises(InputError, match="lora_sha256"):
    folders.check_same_settings(folder)


REST = {("conv_in", "bias"): (Change({"diff": np.ones(4, np.float32)}, (4,)),)}


@pytest.mark.parametrize("lora", [{}, TREE])
def test_what_a_lora_file_changes_besides_the_lora_counts(tmp_path, lora):
  """Images without it are not those with it, and the reverse, in old folders too."""
  plain, more = adapters.of_lora(lora), Adapter(LoraTree(lora), REST)
  hashes = [adapters.sha256(plain), adapters.sha256(more)]
  for adapter, own, other in ((plain, *hashes), (more, *hashes[::-1])):
    folder = Folder(tmp_path, [], adapter, {"lora_sha256": own})
    for before in {other, OLD} if adapter.rest else {other}:
      manifest.write_json(tmp_path / folders.MANIFEST, {"lora_sha256": before})
      with pytest.raises(InputError, match="lora_sha256"):
        folders.check_same_settings(folder)
