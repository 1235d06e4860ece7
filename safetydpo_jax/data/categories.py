"""The seven harm categories, and the spellings CoProV2 uses for them."""

from safetydpo_jax.errors import InputError

# Our name → other spellings in published files, after `_key`.
ALIASES = {
  "hate": (),
  "sexual": (),
  "violence": (),
  "shocking": (),
  "illegal_activity": (),
  "harassment": ("harrasment", "harrassment", "harasment"),
  "self_harm": (),
}
CATEGORIES = tuple(ALIASES)


def _key(name: str) -> str:
  """Upper and lower case, spaces, hyphens and underscores make no difference."""
  return "".join(letter for letter in name.casefold() if letter not in " -_\t")


_NAMES = {
  _key(spelling): name
  for name, aliases in ALIASES.items()
  for spelling in (name, *aliases)
}


def normalise(name: str) -> str:
  """Our name of a category in any published spelling: 'Harrasment' → 'harassment'.

  Raises:
    InputError: there is no such category.
  """
  try:
    return _NAMES[_key(name)]
  except (KeyError, AttributeError):
    raise InputError(
      f"unknown category {name!r}; expected one of {', '.join(CATEGORIES)}"
    ) from None


def selection(name: str | None) -> str | None:
  """Our name of a category to select; None for None, "" and "all": every pair."""
  return None if name in (None, "", "all") else normalise(name)
