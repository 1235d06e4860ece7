"""LoRAs by name: `L` or `L:scale`, a directory of ours or a file of theirs."""

import fnmatch
import json
import shutil
import types

import chex
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from safetydpo_jax import load_lora, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras import load as loras
from safetydpo_jax.formats.loras.write import write_diffusers

BASE = {"name": "sd15", "fingerprint": "0123"}


def make_tree(value):
  factors = {"a": np.full((6, 3), value, np.float32), "b": np.ones((3, 5), np.float32)}
  return {"mid_block": {"attentions_0": {"to_q": factors}}}


@pytest.mark.parametrize(
  ("text", "name", "scale"),
  [
    ("runs/hate", "runs/hate", 1.0),
    ("runs/hate:0.7", "runs/hate", 0.7),
    ("runs/hate:-1", "runs/hate", -1.0),
    ("runs/hate:0", "runs/hate", 0.0),
    ("C:/runs/hate", "C:/runs/hate", 1.0),
    ("C:/runs/hate:2e-1", "C:/runs/hate", 0.2),
    ("2024", "2024", 1.0),
    ("x.safetensors", "x.safetensors", 1.0),
  ],
)
def test_a_number_after_the_last_colon_is_the_scale(text, name, scale):
  assert loras.split_scale(text) == (name, scale)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e400"])
def test_a_scale_is_finite(scale):
  with pytest.raises(InputError, match=f"the scale is {scale}; expected a finite"):
    loras.split_scale(f"runs/hate:{scale}")


def test_directories_files_and_folders_of_files_are_read(tmp_path):
  expert.write_expert(tmp_path / "run", make_tree(1), {"base": BASE})
  file = write_diffusers(tmp_path / "theirs", make_tree(2), ("to_q",))
  tree, about = loras.load_lora(str(tmp_path / "run"))
  chex.assert_trees_all_equal(tree, make_tree(1))
  assert about["base"] == BASE
  for name in (file, file.parent):
    tree, about = loras.load_lora(str(name))
    chex.assert_trees_all_equal(tree, make_tree(2))
    assert about == {}
  chex.assert_trees_all_equal(load_lora(str(tmp_path / "run")), make_tree(1))


def test_an_export_in_the_expert_s_own_folder_does_not_hide_the_expert(tmp_path):
  """Else a run trained further would still give its old export."""
  write_diffusers(tmp_path, make_tree(2), ("to_q",))
  expert.write_expert(tmp_path, make_tree(1), {"base": BASE})
  tree, about = loras.load_lora(str(tmp_path))
  chex.assert_trees_all_equal(tree, make_tree(1))
  assert about["base"] == BASE


def write_peft(folder, value):
  """A PEFT folder with alpha = 2 r."""
  names = {"down": "lora_A", "up": "lora_B"}
  tensors = load_file(write_diffusers(folder, make_tree(value), ("to_q",)))
  for name in list(tensors):
    *module, _, part, _ = name.split(".")
    peft = ".".join(["base_model", "model", *module[1:], names[part], "weight"])
    tensors[peft] = tensors.pop(name)
  save_file(tensors, folder / "adapter_model.safetensors")
  (folder / "pytorch_lora_weights.safetensors").unlink()
  (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))


@pytest.mark.parametrize("name", ["unet", "default"])
def test_a_folder_above_peft_s_is_read(name, tmp_path):
  write_peft(tmp_path / name, 2)
  expected = lora.scale(make_tree(2), 2.0)
  chex.assert_trees_all_close(load_lora(str(tmp_path)), expected)


def test_of_several_peft_folders_the_unet_s_is_read(tmp_path):
  for n, name in enumerate(("text_encoder", "unet"), 1):
    write_peft(tmp_path / name, n)
  chex.assert_trees_all_close(load_lora(str(tmp_path)), lora.scale(make_tree(2), 2.0))
  (tmp_path / "unet").rename(tmp_path / "other")
  with pytest.raises(InputError, match="2 PEFT adapters, other and text_encoder"):
    load_lora(str(tmp_path))


def test_the_only_lora_file_in_a_folder_may_have_any_name(tmp_path):
  file = write_diffusers(tmp_path, make_tree(2), ("to_q",))
  file.rename(tmp_path / "my style.safetensors")
  (tmp_path / "README.md").touch()
  chex.assert_trees_all_equal(load_lora(str(tmp_path)), make_tree(2))
  write_diffusers(tmp_path, make_tree(3), ("to_q",)).rename(tmp_path / "a.safetensors")
  with pytest.raises(InputError, match=r"2 LoRA files, a\.safetensors and my style"):
    load_lora(str(tmp_path))


def test_a_pickle_instead_of_the_file_says_how_to_convert(tmp_path):
  (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
  for settings in (False, True):
    if settings:
      (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_model\.bin.*save_file"):
      load_lora(str(tmp_path))


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A hub whose repositories are folders; → their root, and what was asked of it."""
  asked = []

  def snapshot_download(repository, *, revision, allow_patterns):
    asked.append((repository, allow_patterns))
    if not (tmp_path / repository).is_dir():
      raise ValueError("not found")
    local = tmp_path / "cache" / repository
    for file in (tmp_path / repository).rglob("*.*"):
      name = str(file.relative_to(tmp_path / repository))
      if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, local / name)
    return str(local)

  def model_info(self, repository, *, revision):
    files = [f for f in (tmp_path / repository).rglob("*") if f.is_file()]
    names = sorted(str(f.relative_to(tmp_path / repository)) for f in files)
    siblings = [types.SimpleNamespace(rfilename=name) for name in names]
    return types.SimpleNamespace(siblings=siblings)

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
  monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
  return types.SimpleNamespace(root=tmp_path, asked=asked)


def test_a_lora_of_the_hub_is_fetched_without_the_model_beside_it(hub):
  write_diffusers(hub.root / "me" / "safe", make_tree(2), ("to_q",))
  (hub.root / "me" / "safe" / "unet").mkdir()
  (hub.root / "me" / "safe" / "unet" / "model.safetensors").touch()
  (hub.root / "me" / "safe" / "lora.bin").touch()
  chex.assert_trees_all_equal(load_lora("me/safe"), make_tree(2))
  there = {file.name for file in (hub.root / "cache").rglob("*.*")}
  assert there == {"pytorch_lora_weights.safetensors"}


def test_a_lora_of_the_hub_may_have_any_name_and_be_peft_s(hub):
  file = write_diffusers(hub.root / "me" / "style", make_tree(2), ("to_q",))
  file.rename(file.with_name("style [v2].safetensors"))
  write_peft(hub.root / "me" / "peft" / "unet", 3)
  scaled = lora.scale(make_tree(3), 2.0)
  for name, tree in {
    "me/style": make_tree(2),
    "me/style/style [v2].safetensors": make_tree(2),
    "me/peft": scaled,
    "me/peft/unet/adapter_model.safetensors": scaled,
  }.items():
    chex.assert_trees_all_close(load_lora(name), tree)
  assert hub.asked[2][1][0] == "style [[]v2].safetensors"


def test_of_several_files_on_the_hub_none_is_fetched(hub):
  for name in ("b.safetensors", "a.safetensors", "old/a.safetensors"):
    (hub.root / "me" / "many" / name).parent.mkdir(parents=True, exist_ok=True)
    (hub.root / "me" / "many" / name).touch()
  with pytest.raises(InputError, match=r"holds 2 .*by name: me/many/a\.safetensors$"):
    load_lora("me/many")
  assert not list((hub.root / "cache").rglob("*.safetensors"))


def test_without_a_network_the_cache_is_enough(hub, monkeypatch):
  file = write_diffusers(hub.root / "me" / "style", make_tree(2), ("to_q",))
  file.rename(file.with_name("style.safetensors"))
  monkeypatch.delattr("huggingface_hub.HfApi.model_info")
  chex.assert_trees_all_close(load_lora("me/style"), make_tree(2))


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("me/nothing", "'me/nothing' .*cannot be downloaded"),
    ("me/model", "me/model is a whole model, not a LoRA"),
    ("me/pickle", r"me/pickle on the hub has no \.safetensors file"),
    ("me/model/x.safetensors", "me/model on the hub has no file x"),
  ],
)
def test_what_is_no_lora_on_the_hub_is_named(name, message, hub):
  (hub.root / "me" / "model").mkdir(parents=True)
  (hub.root / "me" / "model" / "model_index.json").touch()
  (hub.root / "me" / "pickle").mkdir()
  (hub.root / "me" / "pickle" / "lora.bin").touch()
  with pytest.raises(InputError, match=message):
    load_lora(name)


def test_a_name_that_leads_nowhere_is_named(tmp_path, monkeypatch):
  with pytest.raises(InputError, match=f"no LoRA at {tmp_path / 'nothing'}"):
    loras.load_lora(str(tmp_path / "nothing"))
  with pytest.raises(InputError, match=f"{tmp_path} is not a LoRA: .*expert.json"):
    loras.load_lora(str(tmp_path))
  with pytest.raises(InputError, match=r"no LoRA at runs/x\.safetensors"):
    loras.load_lora("runs/x.safetensors")  # not a repository's name
  (tmp_path / "runs" / "a").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=r"no LoRA at runs/a/x\.safetensors"):
    loras.load_lora("runs/a/x.safetensors")  # nor one of the repository runs/a


def test_a_model_is_not_searched_for_a_lora(tmp_path):
  """Published folders have single files beside model_index.json."""
  (tmp_path / "model_index.json").touch()
  (tmp_path / "v1-5-pruned.safetensors").touch()
  with pytest.raises(InputError, match=f"{tmp_path} is a whole model"):
    loras.load_lora(str(tmp_path))


def test_the_fingerprint_decides_whether_a_lora_fits_not_the_name():
  about = {"base": BASE}
  loras.check_fits("hate", about, "0123")
  loras.check_fits("foreign.safetensors", {}, "4567")
  wrong = r"hate was trained on sd15 .*0123.*has .*4567.*fine-tune.*"
  with pytest.raises(InputError, match=wrong) as error:
    loras.check_fits("hate", about, "4567")
  assert "--any_base" not in str(error.value), "the command has no such option"
  with pytest.raises(InputError, match=f"{wrong}--any_base, or export"):
    loras.check_fits("hate", about, "4567", any_base=False)


def test_a_fine_tune_of_the_base_is_used_knowingly(capsys):
  loras.check_fits("hate", {"base": BASE}, "4567", any_base=True)
  (line,) = capsys.readouterr().err.splitlines()
  assert "hate was trained on sd15" in line
  loras.check_fits("hate", {"base": BASE}, "0123", any_base=True)
  assert capsys.readouterr().err == ""


def test_loras_add_up_each_with_its_scale(pipeline, tree, exported):
  names = [str(exported.parent), f"{exported}:0.5", f"{exported}:-0.25"]
  total = flatten_dict(loras.load_loras(names, pipeline))
  for path, a in flatten_dict(tree).items():
    if path[-1] == "a":
      product = a @ flatten_dict(tree)[(*path[:-1], "b")]
      np.testing.assert_allclose(
        total[path] @ total[(*path[:-1], "b")], 1.25 * product, atol=1e-4
      )
  assert loras.load_loras([], pipeline) == {}
