"""Optional packages: imported where they are, one line where they are not."""

import json
import sys

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import extras


def test_a_package_that_is_there_is_imported():
  assert extras.require("json", extra="report") is json
  assert extras.require("json.decoder", extra="report").JSONDecoder


@pytest.mark.parametrize("module", ["not_there_at_all", "not_there_at_all.part"])
def test_a_missing_package_is_named_with_what_installs_it(module):
  with pytest.raises(InputError) as caught:
    extras.require(module, extra="report")
  message = str(caught.value)
  assert "not_there_at_all is not installed" in message
  assert 'pip install "safetydpo-jax[report]"' in message
  assert "\n" not in message


def test_a_package_that_is_broken_keeps_its_traceback(tmp_path, monkeypatch):
  (tmp_path / "half_installed.py").write_text("import not_there_at_all")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
    extras.require("half_installed", extra="report")
  sys.modules.pop("half_installed", None)
