"""What goes wrong between this machine and the hub is one line with the way out.

The library's exceptions come from a hub on this machine, which answers as the real one.
"""

import errno
import shutil

import huggingface_hub
import pytest
from diffusers import StableDiffusionPipeline

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from tests.support import hub_server

NAME = "someone/painter"
NOWHERE = "http://127.0.0.1:9"  # the port of discarded data, which nobody serves


@pytest.fixture
def hub(tiny_checkpoint, tmp_path, monkeypatch):
  with hub_server.serve() as hub:
    hub.folders[NAME] = tmp_path / "repository"
    shutil.copytree(tiny_checkpoint, hub.folders[NAME])
    hub.tokens = {"friend": True, "stranger": False}
    hub_server.use(monkeypatch, hub.url, tmp_path / "cache")
    yield hub


def refusal(model=NAME, **options):
  """The line that a user sees."""
  with pytest.raises(InputError) as caught:
    load_pipeline(model, components=("vae",), **options)
  (line,) = str(caught.value).splitlines()
  return line


def test_a_model_of_the_hub_is_fetched_and_then_found_without_a_network(
  hub, tmp_path, monkeypatch
):
  fetched = load_pipeline(NAME, components=("vae",))
  assert set(fetched.params) == {"vae"}
  assert not [path for path in hub.asked if "text_encoder/model" in path]
  for offline in (True, False):
    hub_server.use(monkeypatch, NOWHERE, tmp_path / "cache", offline=offline)
    again = load_pipeline(NAME, components=("vae",))
    assert again.fingerprint == fetched.fingerprint


@pytest.mark.parametrize(
  ("kind", "token", "parts"),
  [
    ("gated", None, ("gated", "no account", f"huggingface.co/{NAME}", "hf auth login")),
    ("gated", "stranger", ("gated", "has no access", f"huggingface.co/{NAME}")),
    ("private", None, ("does not exist, or is private", "spelling", "hf auth login")),
    ("private", "stranger", ("does not exist, or is private", "has no access")),
    ("none", "wrong", ("token", "hf auth login", "HF_TOKEN")),
  ],
)
def test_who_may_not_have_it_is_told_why(hub, kind, token, parts, monkeypatch):
  setattr(hub, kind, {NAME})
  if token:
    monkeypatch.setenv("HF_TOKEN", token)
  line = refusal()
  assert NAME in line
  for part in parts:
    assert part in line


def test_who_may_have_it_gets_it(hub, monkeypatch):
  hub.gated = hub.private = {NAME}
  monkeypatch.setenv("HF_TOKEN", "friend")
  load_pipeline(NAME, components=())


def test_what_the_hub_does_not_have(hub):
  for hub.missing in ("RepoNotFound", None):  # the hub, and a mirror of it
    assert "does not exist, or is private" in refusal("someone/panter")
  line = refusal(revision="v9")
  assert "has no revision 'v9'" in line
  assert f"huggingface.co/{NAME}/tree/main" in line


@pytest.mark.parametrize("model", ["no such/id at all", "/data/modles/sd", "a/b/c"])
def test_a_misspelled_path_is_not_taken_for_a_repository(hub, model):
  assert model in refusal(model)
  assert not hub.asked


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_without_a_network_it_says_what_cuts_it_off(
  hub, variant, tmp_path, monkeypatch
):
  hub_server.use(monkeypatch, hub.url, tmp_path / "cache", offline=True)
  line = refusal(variant=variant)
  assert "not in the cache" in line
  assert "HF_HUB_OFFLINE" in line
  hub_server.use(monkeypatch, NOWHERE, tmp_path / "cache")
  line = refusal(variant=variant)
  assert "not in the cache" in line
  assert "cannot be reached" in line


def test_a_hub_that_is_down(hub):
  hub.status = 500
  assert "status 500" in refusal()


def test_half_a_snapshot_is_not_taken_for_a_model(hub, tmp_path, monkeypatch):
  """With the library's list of what should be there, and as older ones left it."""
  load_pipeline(NAME, components=("vae",))
  cache = tmp_path / "cache"
  (weights,) = cache.glob("*/snapshots/*/vae/*.safetensors")
  weights.resolve().unlink()
  weights.unlink()
  hub_server.use(monkeypatch, NOWHERE, cache)
  assert "only a part of it" in refusal()
  old = shutil.copytree(
    cache, tmp_path / "old", symlinks=True, ignore=shutil.ignore_patterns("trees")
  )
  hub_server.use(monkeypatch, NOWHERE, old)
  line = refusal()
  assert "was not finished" in line
  assert f"hf download {NAME}" in line
  hub_server.use(monkeypatch, hub.url, old)
  load_pipeline(NAME, components=("vae",))  # with a network it is completed


def rename(hub, old, new, *components):
  for name in components:
    for file in (hub.folders[NAME] / name).glob(f"*{old}"):
      file.rename(file.with_name(file.name.removesuffix(old) + new))


def test_a_repository_of_pickles_says_how_to_convert(hub):
  rename(hub, ".safetensors", ".bin", "unet")
  line = refusal()
  assert f"{NAME}/unet has only diffusion_pytorch_model.bin" in line
  assert "convert" in line


def test_a_repository_of_one_variant_says_which(hub):
  rename(hub, ".safetensors", ".fp16.safetensors", "unet", "vae", "text_encoder")
  line = refusal()
  assert f"{NAME}/unet has no weights without a variant" in line
  assert "--variant fp16" in line
  assert load_pipeline(NAME, components=("vae",), variant="fp16").variant == "fp16"
  assert "of variant 'ema', only fp16" in refusal(variant="ema")


@pytest.mark.parametrize("at", ["hub", "folder"])
def test_a_variant_is_taken_where_a_component_has_it(hub, at, tmp_path, capsys):
  """As diffusers does: it warns of the mixture, and we print a line."""
  rename(hub, ".safetensors", ".fp16.safetensors", "vae")
  folder = hub.folders[NAME]
  theirs = StableDiffusionPipeline.from_pretrained(folder, variant="fp16")
  model = NAME if at == "hub" else folder
  capsys.readouterr()
  ours = load_pipeline(model, components=("unet", "vae"), variant="fp16")
  (line,) = capsys.readouterr().err.splitlines()[-1:]
  assert "no files of variant 'fp16' in unet" in line
  assert ours.variant is None
  assert [file.name for file in ours.vae_files] == [
    "diffusion_pytorch_model.fp16.safetensors"
  ]
  kernel = ours.params["unet"]["conv_in"]["kernel"].transpose(3, 2, 0, 1)
  assert (kernel == theirs.unet.conv_in.weight.detach().numpy()).all()
  rename(hub, ".fp16.safetensors", ".safetensors", "vae")
  with pytest.raises(ValueError, match="no such modeling files"):
    StableDiffusionPipeline.from_pretrained(folder, variant="fp16")
  assert "no weights of variant 'fp16'" in refusal(folder, variant="fp16")


@pytest.mark.parametrize(
  ("error", "part"),
  [
    (OSError(errno.ENOSPC, "No space left on device"), "HF_HOME"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "HF_HOME"),
    (RuntimeError("the stream broke off\nat byte 7"), "the stream broke off"),
  ],
)
def test_a_cache_that_cannot_be_written(error, part, monkeypatch):
  def snapshot_download(*_, **__):
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  assert part in refusal()
