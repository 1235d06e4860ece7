"""Tiny base models, as directories and as single files, made when they are needed."""

import shutil

import pytest

from tests.support import single_files


class _Made(dict):
  """{name: make(name)}; a value is made once, when it is first asked for."""

  def __init__(self, make):
    super().__init__()
    self.make = make

  def __missing__(self, name):
    self[name] = self.make(name)
    return self[name]


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
  """{name: diffusers directory}, of `FAMILIES` and `DISTILLED`."""
  folder = tmp_path_factory.mktemp("bases")
  makers = {**single_files.FAMILIES, **single_files.DISTILLED}
  return _Made(lambda name: makers[name](folder / name))


@pytest.fixture(scope="session")
def originals(bases):
  """{name: the directory's tensors under the original names}."""
  family_of = single_files.FAMILY_OF
  return _Made(
    lambda name: single_files.original_tensors(bases[name], family_of.get(name, name))
  )


@pytest.fixture
def write(bases, originals, tmp_path):
  """Writes a family's single file, with a tokenizer beside it."""

  def write(
    family="sd1", changes=None, without=(), header=single_files.RESOLUTION, name="m"
  ):
    tensors = {**originals[family], **(changes or {})}
    tensors = {n: x for n, x in tensors.items() if not n.startswith(tuple(without))}
    for folder in bases[family].glob("tokenizer*"):
      shutil.copytree(folder, tmp_path / folder.name, dirs_exist_ok=True)
    return single_files.save(tmp_path / f"{name}.safetensors", tensors, header)

  return write
