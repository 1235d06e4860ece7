"""Optional packages are imported when used, and asked for by the extra's name."""

import importlib.abc
import json
import sys

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import extras


class Absent(importlib.abc.MetaPathFinder):
  """Makes a package look as if it were not installed."""

  def __init__(self, package):
    self.package = package

  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] == self.package:
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_an_installed_package_is_imported():
  assert extras.require("json", "report") is json
  assert extras.require("json.decoder", "report") is json.decoder


@pytest.mark.parametrize("module", ["wave", "wave.reader"])
def test_a_missing_package_is_one_line_with_its_extra(module, monkeypatch):
  monkeypatch.delitem(sys.modules, "wave", raising=False)
  monkeypatch.setattr(sys, "meta_path", [Absent("wave"), *sys.meta_path])
  with pytest.raises(InputError) as raised:
    extras.require(module, "report")
  assert str(raised.value) == (
    'this needs wave, which is not installed: pip install "safetydpo-jax[report]"'
  )


def test_a_blocked_module_counts_as_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "wave", None)
  with pytest.raises(InputError, match=r"wave.*safetydpo-jax\[evaluate\]"):
    extras.require("wave", "evaluate")


def test_what_a_package_misses_is_named(tmp_path, monkeypatch):
  (tmp_path / "halfway.py").write_text("import absent_dependency")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(InputError, match="halfway needs absent_dependency"):
    extras.require("halfway", "evaluate")


def test_a_package_that_does_not_load_says_why(tmp_path, monkeypatch):
  (tmp_path / "unlinked.py").write_text("raise ImportError('libGL.so.1: missing')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(InputError, match=r"unlinked .*libGL\.so\.1"):
    extras.require("unlinked", "evaluate")
