"""CLIP's tokenizer for checkpoints that come without one.

All Stable Diffusions share the vocabulary of OpenAI's CLIP and differ in the token that
fills up a prompt. A single file has no vocabulary. It is taken from the first of

  1  the folder `tokenizer` (SDXL's second: `tokenizer_2`) beside the file, if it exists
  2  openai/clip-vit-large-patch14, or a preset's repository, in the hub's cache
  3  openai/clip-vit-large-patch14 on the hub, 1.5 MB
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import clip_tokenizer
from safetydpo_jax.formats.base_model import hub_errors
from safetydpo_jax.formats.base_model.hub import PRESETS
from safetydpo_jax.formats.base_model.single_file_families import Encoder

if TYPE_CHECKING:
  from transformers import CLIPTokenizer

REPOSITORY = "openai/clip-vit-large-patch14"
_FILES = (
  "vocab.json",
  "merges.txt",
  "tokenizer_config.json",
  "special_tokens_map.json",
)


class SharedTokenizer:
  """A CLIP tokenizer that is looked up, or downloaded, when it is first used.

  Commands that tokenize nothing (`export`, `plan`) work without it.
  """

  def __init__(self, file: Path, component: str, pad_token: str):
    """Args: the checkpoint, `tokenizer` or `tokenizer_2`, and its padding."""
    self.component = component
    self._file, self._pad_token = file, pad_token
    self._found: CLIPTokenizer | None = None

  def folder(self) -> Path:
    """Where its vocabulary is; see `find_folder`."""
    return find_folder(self._file, self.component)

  def load(self) -> "CLIPTokenizer":
    """The tokenizer.

    Raises:
      InputError: there is none on this machine, and it cannot be downloaded.
    """
    if self._found is None:
      self._found = clip_tokenizer.read(self.folder(), self._pad_token)
    return self._found

  def __call__(self, *texts: Any, **options: Any) -> Any:
    return self.load()(*texts, **options)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):
      raise AttributeError(name)
    return getattr(self.load(), name)

  def __len__(self) -> int:
    return len(self.load())


def find_folder(file: Path, component: str) -> Path:
  """The folder with the vocabulary for a single-file checkpoint.

  Raises:
    InputError: there is none on this machine, and it cannot be downloaded.
  """
  for name in dict.fromkeys((component, "tokenizer")):
    if (file.parent / name).is_dir():
      return file.parent / name
  # Imported here: it takes a second.
  import huggingface_hub

  cached = [(REPOSITORY, "vocab.json")]
  cached += [(name, "tokenizer/vocab.json") for name in PRESETS.values() if "/" in name]
  for repository, vocabulary in cached:
    if Path(repository).is_dir():
      continue
    found = huggingface_hub.try_to_load_from_cache(repository, vocabulary)
    if isinstance(found, str) and Path(found).with_name("merges.txt").is_file():
      return Path(found).parent
  try:
    return Path(
      huggingface_hub.snapshot_download(REPOSITORY, allow_patterns=list(_FILES))
    )
  except Exception as error:  # the library's own, and those of its HTTP client
    why = hub_errors.explain(error, REPOSITORY, None)
    raise InputError(
      f"{file} has no tokenizer in it, and {REPOSITORY} cannot be downloaded: {why}, "
      f"or put CLIP's vocab.json and merges.txt into {file.parent}/tokenizer"
    ) from error


def shared_tokenizers(
  file: Path, encoders: Iterable[Encoder]
) -> tuple["CLIPTokenizer", ...]:
  """A tokenizer for each text encoder of a single file, with its padding."""
  made = (
    SharedTokenizer(file, e.component.replace("text_encoder", "tokenizer"), e.pad_token)
    for e in encoders
  )
  return cast("tuple[CLIPTokenizer, ...]", tuple(made))
