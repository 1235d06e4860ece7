"""How a report writes numbers, with spaces that do not break, and settings."""

from typing import Any


def percent(share: float, digits: int = 1) -> str:
  """0.979 → '97.9 %'."""
  return f"{100 * share:.{digits}f}\u00a0%"


def rounded(share: float) -> str:
  """Whole percent, with one digit where none would say 0 or 100 falsely."""
  return percent(share, 0 if 0.01 <= share <= 0.99 or share in (0, 1) else 1)


def reach(low: float, high: float) -> str:
  """An interval of shares: '97.2–99.1 %'."""
  return f"{100 * low:.1f}–{percent(high)}"


def points(difference: float) -> str:
  """A difference of shares in percentage points: '−80.0'."""
  return signed(100 * difference, 1)


def signed(value: float, digits: int) -> str:
  """'+0.25', with a minus sign as long as the plus."""
  return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
  """75.2 → '1 min 15 s'; parts that are zero at the end are left out."""
  if seconds < 9.95:
    return f"{seconds:.1f}\u00a0s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  parts = [(hours, "h"), (minutes, "min"), (rest if not hours else 0, "s")]
  return " ".join(f"{count}\u00a0{unit}" for count, unit in parts if count)


def words(value: Any) -> str:
  """Nested settings in one line: {'a_b': [1, None]} → 'a b 1 + –'."""
  if isinstance(value, dict):
    return ", ".join(f"{k.replace('_', ' ')} {words(v)}" for k, v in value.items())
  if isinstance(value, list):
    return " + ".join(map(words, value))
  return "–" if value is None else str(value)
