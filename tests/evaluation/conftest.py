"""The drawn images that the room's tests measure."""

import shutil

import pytest

from tests.support.galleries import write_gallery


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
  return write_gallery(tmp_path_factory.mktemp("drawn"), 6)


@pytest.fixture
def gallery(drawn, tmp_path):
  """A copy of `drawn` that a test may spoil."""
  folder = tmp_path / "gallery"
  shutil.copytree(drawn.prompts.parent, folder)
  names = (drawn.prompts, drawn.images, drawn.reference)
  return drawn._replace(
    **dict(zip(("prompts", "images", "reference"), (folder / n.name for n in names)))
  )
