"""Building blocks of a report: one HTML file that needs nothing else.

Every function returns `markupsafe.Markup`, which escapes whatever text is put into it:
prompts and names from files cannot become HTML. Pictures are data: URIs, charts inline
SVG, the style `style.css`; the page's content security policy allows these and the one
script that a page may be given, by their hashes, and nothing else: no other script runs
and no request leaves, whatever a prompt holds.

The blocks: `page`, `section`, `table`, `figure`, `picture`, `thumbnail`; the charts:
`charts.py`.
"""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from PIL import Image

from safetydpo_jax.errors import InputError

MIME_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
VEIL = 8  # pixels of a side of what a covered picture shows

_PAGE = Markup("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
{script}</body>
</html>
""")


def join(blocks: Sequence[Any], separator: str = "\n") -> Markup:
  """Blocks one after the other; what is no Markup is escaped."""
  return Markup(separator).join(blocks)


def page(title: str, *body: Any, script: str = "") -> str:
  """A whole HTML document.

  Args:
    title: the text of its title bar.
    body: blocks, in order; the first holds the h1, the others are `section`s.
    script: JavaScript of ours, constant text, for what style cannot do.
  """
  style = resources.files(__package__).joinpath("style.css").read_text("utf-8")
  policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
  if script:
    policy += f"script-src {_hash(script)}; "
    script = Markup("<script>{}</script>\n").format(Markup(script))
  return str(
    _PAGE.format(
      policy=policy + "base-uri 'none'; form-action 'none'",
      title=title,
      style=Markup(style),
      body=join(body),
      script=script,
    )
  )


def _hash(text: str) -> str:
  """As a content security policy names an inline text it allows."""
  digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
  return f"'sha256-{digest}'"


def section(heading: str, *body: Any) -> Markup:
  """A chapter of the page, with an h2 that `contents` can lead to."""
  return Markup(
    '<section aria-labelledby="{0}"><h2 id="{0}">{1}</h2>{2}</section>'
  ).format(slug(heading), heading, join(body))


def slug(heading: str) -> str:
  """'Seen and held-out' → 'seen-and-held-out'."""
  return re.sub(r"[^a-z0-9]+", "-", heading.casefold()).strip("-")


def contents(headings: Sequence[str]) -> Markup:
  """Links to sections."""
  links = [
    Markup('<li><a href="#{}">{}</a></li>').format(slug(heading), heading)
    for heading in headings
  ]
  return Markup('<nav aria-label="Contents"><ul>{}</ul></nav>').format(join(links))


def paragraph(text: Any) -> Markup:
  """Running text."""
  return Markup('<p class="prose">{}</p>').format(text)


def figure(caption: Any, *body: Any, kind: str = "plain") -> Markup:
  """Anything with a caption below; `kind` is a class of style.css."""
  return Markup('<figure class="{}">{}<figcaption>{}</figcaption></figure>').format(
    kind, join(body), caption
  )


def definitions(pairs: Sequence[tuple[Any, Any]]) -> Markup:
  """Names and their values."""
  rows = [Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(*pair) for pair in pairs]
  return Markup('<dl class="facts">{}</dl>').format(join(rows))


def code(text: str, label: str) -> Markup:
  """Lines to copy: one click selects them all. `label` names the block."""
  return Markup('<pre class="code" aria-label="{}"><code>{}</code></pre>').format(
    label, text
  )


def table(
  caption: Any,
  columns: Sequence[Any],
  rows: Sequence[Sequence[Any]],
  *,
  total: Sequence[Any] | None = None,
  kind: str = "numbers",
) -> Markup:
  """A table that scrolls inside its box where it is too wide for the page.

  Args:
    caption: what the numbers are; also the name of the box.
    columns: headings of all columns, the first of the row headings.
    rows: cells; the first of each row is its heading.
    total: a last row, set off.
    kind: class of style.css: "numbers" are aligned at the right; "gallery" holds
      pictures in columns of equal width.
  """

  def line(cells):
    heading, *values = cells
    values = join([Markup("<td>{}</td>").format(value) for value in values], "")
    return Markup('<tr><th scope="row">{}</th>{}</tr>').format(heading, values)

  head = join([Markup('<th scope="col">{}</th>').format(name) for name in columns], "")
  foot = Markup("<tfoot>{}</tfoot>").format(line(total)) if total else ""
  return Markup(
    '<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    '<table class="{kind}"><caption><span>{caption}</span></caption>'
    "<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div>"
  ).format(
    label=escape(caption).striptags(),
    kind=kind,
    caption=caption,
    head=head,
    body=join([line(row) for row in rows]),
    foot=foot,
  )


def picture(
  folder: Path, name: str, alt: str, *, pixelated: bool = False, blurred: bool = False
) -> Markup:
  """A picture of `folder` inside the page.

  Args:
    folder: which the file must not leave.
    name: path of a PNG, JPEG or WebP file, relative to the folder.
    alt: what a reader who does not see it should know.
    pixelated: enlarge with hard edges, for pictures of few pixels.
    blurred: covered until the reader asks for it: `VEIL` × `VEIL` pixels stand for it,
      so that nothing shows without style or on paper either.

  Raises:
    InputError: if the file is missing, outside of the folder, or no such picture.
  """
  content, image = _read(folder, name)
  uri = _uri(content, image.format)
  return _shown(image, uri, alt, "pixels" if pixelated else "photo", blurred)


def thumbnail(
  image: Image.Image, alt: str, longest: int, *, blurred: bool = False
) -> Markup:
  """A picture as JPEG of at most `longest` pixels a side, smaller ones as they are.

  Args:
    image: RGB.
    alt: what a reader who does not see it should know.
    longest: pixels; an image of a quarter of it or less is shown with hard edges.
    blurred: see `picture`.
  """
  kind = "pixels" if max(image.size) * 4 <= longest else "photo"
  if max(image.size) > longest:
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
  content, form = io.BytesIO(), "PNG" if kind == "pixels" else "JPEG"
  image.save(content, form, quality=82)
  return _shown(image, _uri(content.getvalue(), form), alt, kind, blurred)


def _shown(image: Image.Image, uri: str, alt: str, kind: str, blurred: bool) -> Markup:
  width, height = image.size
  shown = Markup(
    '<img src="{}" alt="{}" width="{}" height="{}" loading="lazy" class="{}">'
  )
  full = shown.format(uri, alt, width, height, kind)
  if not blurred:
    return full
  veil = io.BytesIO()
  image.convert("RGB").resize((VEIL, VEIL), Image.Resampling.BOX).save(veil, "PNG")
  cover = shown.format(_uri(veil.getvalue(), "PNG"), "", width, height, "veil")
  return Markup(
    '<details class="covered"><summary>{}<span>Show: {}</span></summary>{}</details>'
  ).format(cover, alt, full)


def _read(folder: Path, name: str) -> tuple[bytes, Image.Image]:
  """The bytes of a picture and the picture, decoded once to see that it is whole."""
  file = Path(folder, name)
  try:
    inside = file.resolve().is_relative_to(Path(folder).resolve())
    if not inside or Path(name).is_absolute():
      raise InputError(
        f"picture {name!r} is outside of {folder}; expected a path relative to it"
      )
    content = file.read_bytes()
    image = Image.open(io.BytesIO(content), formats=tuple(MIME_TYPES))
    image.load()
  except FileNotFoundError:
    raise InputError(
      f"picture {file} is missing; run the step that makes it again"
    ) from None
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise InputError(
      f"{file} is no readable {', '.join(MIME_TYPES)} picture: {error}"
    ) from error
  return content, image


def _uri(content: bytes, kind: str) -> str:
  return f"data:{MIME_TYPES[kind]};base64,{base64.b64encode(content).decode()}"


def percent(share: float, digits: int = 1) -> str:
  """0.979 → '97.9 %', with a space that does not break."""
  return f"{100 * share:.{digits}f}\u00a0%"


def duration(seconds: float) -> str:
  """75.2 → '1 min 15 s'; parts that are zero at the end are left out."""
  if seconds < 9.95:
    return f"{seconds:.1f}\u00a0s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  parts = [(hours, "h"), (minutes, "min"), (rest if not hours else 0, "s")]
  return " ".join(f"{count}\u00a0{unit}" for count, unit in parts if count)
