"""Copies of a checkpoint with something in its JSON files changed."""

import json
import shutil


def edit(folder, file, **changes):
  """Changes fields of one JSON file of a checkpoint in place; None removes one."""
  content = json.loads((folder / file).read_text()) | changes
  content = {key: value for key, value in content.items() if value is not None}
  (folder / file).write_text(json.dumps(content))
  return folder


def edited_copy(checkpoint, copy, file, **changes):
  """The same in a new folder `copy`, which is returned."""
  shutil.copytree(checkpoint, copy)
  return edit(copy, file, **changes)
