"""Text out of files: encodings, HTML, man pages, source code; long texts cut, short ones joined.

A reader takes the folder of a package and yields pairs of an id and a text.
"""

import gzip
import html
import re
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

Texts = Iterator[tuple[str, str]]
Reader = Callable[[Path], Texts]
LONGEST = 6000  # characters of a document


def decode(path: Path) -> str:
    """A file as UTF-8, or else Latin-1, unpacked where it is gzipped."""
    content = path.read_bytes()
    if path.suffix == ".gz" or content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def find(folder: Path, *patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.is_symlink())


def clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\x00", "")
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def cut(text: str, size: int = LONGEST) -> Iterator[str]:
    """A long text in pieces of at most `size` characters, cut at blank lines, else at lines, else at spaces, else anywhere."""
    if len(text) <= size:
        yield text
        return
    held: list[str] = []
    length = 0
    for paragraph in re.split(r"(?<=\n)\s*\n", text):
        while len(paragraph) > size:
            place = paragraph.rfind("\n", size // 2, size)
            place = paragraph.rfind(" ", size // 2, size) if place < 0 else place
            place = size if place < 0 else place
            if held:
                yield "\n\n".join(held)
                held, length = [], 0
            yield paragraph[:place]
            paragraph = paragraph[place:]
        if length + len(paragraph) > size and held:
            yield "\n\n".join(held)
            held, length = [], 0
        held.append(paragraph.rstrip("\n"))
        length += len(paragraph) + 2
    if held:
        yield "\n\n".join(held)


def join(entries: Iterable[tuple[str, str]], size: int = 2000, between: str = "\n") -> Texts:
    """Consecutive short entries in documents of about `size` characters, with the id of the first."""
    held: list[str] = []
    length, first = 0, ""
    for name, text in entries:
        first = first if held else name
        held.append(text)
        length += len(text)
        if length >= size:
            yield first, between.join(held)
            held, length = [], 0
    if held:
        yield first, between.join(held)


# ---- HTML


class Prose(HTMLParser):
    """The text of a page without its navigation."""

    SKIPPED = frozenset({"script", "style", "nav", "header", "footer", "head", "button", "svg", "form", "noscript"})
    BLOCKS = frozenset(
        {"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "br", "pre", "dt", "dd", "table", "ul", "ol", "dl"}
        | {"blockquote", "section", "article", "hr", "td", "th"}
    )
    EMPTY = frozenset(["br", "img", "hr", "meta", "link", "input", "col", "area", "base", "wbr", "param", "source"])
    MAYBE = frozenset({"div", "a", "ul", "table", "p", "span", "section", "nav"})
    NAVIGATION = re.compile(
        r"(?i)\b(navheader|navfooter|sphinxsidebar|related|headerlink|breadcrumbs?|toc|TOC|"
        r"shortcontents|contents|index|menu|top|preffooter|topmenu|nav_header|node-?nav)\b"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tag, and whether its text is skipped

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in self.EMPTY:
            self.parts += ["\n"] if tag in ("br", "hr") else []
            return
        classes = " ".join(value or "" for name, value in attributes if name in ("class", "id", "role"))
        skipped = tag in self.SKIPPED or (tag in self.MAYBE and bool(self.NAVIGATION.search(classes)))
        self.open.append((tag, skipped or bool(self.open and self.open[-1][1])))
        self.parts += ["\n"] if tag in self.BLOCKS else []

    def handle_endtag(self, tag: str) -> None:
        if tag in self.EMPTY:
            return
        for place in range(len(self.open) - 1, -1, -1):
            if self.open[place][0] == tag:
                del self.open[place:]
                break
        self.parts += ["\n"] if tag in self.BLOCKS else []

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1][1]):
            self.parts.append(data)


def html_text(page: str) -> str:
    parser = Prose()
    parser.feed(page)
    parser.close()
    text = re.sub(r"[ \t\u00a0]+", " ", "".join(parser.parts))
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def without_tags(text: str) -> str:
    """One line of text out of the markup of a Bible module: notes and titles dropped, words kept."""
    text = re.sub(r"<(note|title)[^>]*>.*?</\1>", " ", text, flags=re.S)
    text = re.sub(r"</?(w|q|seg|hi|transChange|divineName|foreign|reference)\b[^>]*>", "", text)
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip()
    return re.sub(r" ([,.;:!?\u201d\u2019](?:\s|$))", r"\1", text)


# ---- readers of many files


def plain(*patterns: str) -> Reader:
    def read(folder: Path) -> Texts:
        for path in find(folder, *patterns):
            yield path.relative_to(folder).as_posix(), decode(path)

    return read


def pages(*patterns: str) -> Reader:
    def read(folder: Path) -> Texts:
        for path in find(folder, *patterns):
            yield path.relative_to(folder).as_posix(), html_text(decode(path))

    return read


def code(*patterns: str, skip: str = r"/(test|tests|testdata|vendor|zz_|ui)/|_test\.|\.min\.") -> Reader:
    """Source files of at most 400 kB, without the licence comment at the top."""

    def read(folder: Path) -> Texts:
        for path in find(folder, *patterns):
            name = path.relative_to(folder).as_posix()
            if re.search(skip, f"/{name}") or path.stat().st_size > 400_000:
                continue
            text = re.sub(r"\A\s*/\*.*?\*/\s*", "", decode(path), flags=re.S)
            yield name, re.sub(r"\A(\s*(//|#|--|;)[^\n]*\n)+", "", text)

    return read


ESCAPES = [
    (r"\\f\[[^\]]*\]|\\f\([A-Z]{2}|\\f.", ""), (r"\\\[(rs)\]", r"\\"), (r"\\\((aq|dq)", "'"), (r"\\\[(aq|dq)\]", "'"),
    (r"\\(-|\(hy|\(mi|\(em|\(en)", "-"), (r"\\\[[a-z]+\]|\\\([a-z]{2}", ""), (r"\\&|\\c|\\\||\\\^|\\/|\\%|\\:", ""),
    (r"\\e", r"\\"), (r"\\ ", " "),
]  # fmt: skip
TIGHT = {"BR", "IR", "RB", "RI", "BI", "IB"}  # macros whose arguments are set without spaces
SPACED = {"B", "I", "IP", "SM", "SB", "Nm", "Fl", "Ar", "Nd", "Xr", "It", "Sh", "Ss", "Pa", "Dv", "Ev", "Li", "UR", "MT"} | TIGHT


def roff_line(line: str) -> str | None:
    """A line of a man page as text; None where it says nothing."""
    if line.startswith(('.\\"', "'\\\"", ".so ")):
        return None
    if macro := re.match(r"^[.'](\w+)\s?(.*)$", line):
        name, rest = macro.groups()
        if name in ("SH", "SS"):
            line = "\n" + rest.strip('"')
        elif name in ("PP", "P", "LP", "TP", "sp", "RS", "RE"):
            line = "" if name != "TP" else "\n"
        elif name in SPACED:
            line = ("" if name in TIGHT else " ").join(x or y for x, y in re.findall(r'"([^"]*)"|(\S+)', rest))
        else:
            return None
    for pattern, text in ESCAPES:
        line = re.sub(pattern, text, line)
    return line


def man_pages(*patterns: str) -> Reader:
    def read(folder: Path) -> Texts:
        for path in find(folder, *patterns):
            lines = [text for line in decode(path).split("\n") if (text := roff_line(line)) is not None]
            yield path.relative_to(folder).as_posix(), re.sub(r"\n\n+", "\n\n", "\n".join(lines)).strip()

    return read
