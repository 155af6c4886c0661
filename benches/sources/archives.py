"""Readers of formats that hold many texts in one file: dictionaries, Bible modules, proofs, mail, ontologies, plays."""

import email
import email.policy
import gzip
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from benches.sources.text import Reader, Texts, decode, find, html_text, join, without_tags

DIGITS = {letter: value for value, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def base64_number(text: str) -> int:
    """An offset or a length in the index of a dictd dictionary."""
    value = 0
    for letter in text:
        value = value * 64 + DIGITS[letter]
    return value


def dictionary(name: str) -> Reader:
    """A dictd dictionary: an index of words, offsets and lengths into one gzipped file."""

    def read(folder: Path) -> Texts:
        top = folder / "usr/share/dictd"
        content = gzip.decompress((top / f"{name}.dict.dz").read_bytes())
        seen, rows = set[tuple[int, int]](), []
        for line in (top / f"{name}.index").read_text("utf-8", "replace").split("\n"):
            cells = line.split("\t")
            if len(cells) < 3 or cells[0].startswith("00"):
                continue
            place = base64_number(cells[1]), base64_number(cells[2])
            if place not in seen:
                seen.add(place)
                rows.append((*place, cells[0]))
        entries = ((word, content[start : start + size].decode("utf-8", "replace").strip()) for start, size, word in sorted(rows))
        yield from join(entries)

    return read


def verses(module: Path, testament: str) -> Iterator[tuple[str, str]]:
    """The verses of a SWORD module (zText, zCom, zCom4): an index of blocks, an index of verses, blocks of zlib."""
    kind = "b" if (module / f"{testament}.bzs").exists() else "c"
    if not (module / f"{testament}.{kind}zs").exists():
        return
    block_index, verse_index, content = ((module / f"{testament}.{kind}z{part}").read_bytes() for part in "svz")
    blocks = [struct.unpack_from("<III", block_index, place) for place in range(0, len(block_index) - 11, 12)]

    def wrong(size: int) -> float:
        """Share of records that name no block, if records had this size: 10 bytes, or 12 in newer modules."""
        if len(verse_index) % size:
            return 1.0
        named = [struct.unpack_from("<I", verse_index, place)[0] for place in range(0, len(verse_index), size)]
        return sum(block >= len(blocks) for block in named) / len(named)

    record = "<III" if wrong(12) < wrong(10) else "<IIH"
    size = struct.calcsize(record)
    opened, text, before = -1, b"", None
    for number in range(len(verse_index) // size):
        block, start, length = struct.unpack_from(record, verse_index, number * size)
        if length == 0 or block >= len(blocks) or (block, start) == before:
            continue
        before = block, start
        if block != opened:
            offset, packed, _ = blocks[block]
            opened, text = block, zlib.decompress(content[offset : offset + packed])
        yield f"{testament}/{number}", without_tags(text[start : start + length].decode("utf-8", "replace"))


def scripture(name: str) -> Reader:
    def read(folder: Path) -> Texts:
        for testament in ("ot", "nt"):
            seen, entries = set[str](), []
            for verse, text in verses(folder / "usr/share/sword/modules" / name, testament):
                if text and text not in seen:
                    seen.add(text)
                    entries.append((verse, text))
            yield from join(entries, 3000)

    return read


STATEMENT = re.compile(
    r"\$\(\s((?:(?!\$\)).)*?)\s\$\)\s+((?:\$\{.*?)?(?:[^\s$]+ \$[ae] (?:(?!\$\.).)*\$\.\s+)*)"
    r"([^\s$]+) (\$[ap]) ((?:(?!\$[=.]).)*)\$[=.]",
    re.S,
)


def proofs(path: str) -> Reader:
    """Statements of a Metamath database with their comments and hypotheses, without the proofs."""

    def read(folder: Path) -> Texts:
        def entries() -> Texts:
            for found in STATEMENT.finditer((folder / path).read_text("utf-8", "replace")):
                comment, hypotheses, name, kind, statement = (" ".join(part.split()) for part in found.groups())
                before = f"{hypotheses} " if hypotheses else ""
                yield name, f"{name}: {comment}\n{before}{name} {kind} {statement} $."

        yield from join(entries(), 2500, "\n\n")

    return read


def r_strings(content: bytes) -> list[str] | None:
    """The first character vector of more than 100 strings in serialised R data (XDR)."""
    place = content.find(b"\x00\x00\x00\x10")  # STRSXP
    while 0 <= place < len(content) - 8:
        count = struct.unpack_from(">I", content, place + 4)[0]
        at, strings = place + 8, list[str]()
        while len(strings) < count and at + 8 <= len(content) and content[at + 3] == 9:  # CHARSXP
            length = struct.unpack_from(">i", content, at + 4)[0]
            at += 8
            strings.append(content[at : at + max(0, length)].decode("utf-8", "replace"))
            at += max(0, length)
        if count > 100 and len(strings) == count:
            return strings
        place = content.find(b"\x00\x00\x00\x10", place + 1)
    return None


def r_data(path: str) -> Reader:
    """Books in an R lazy-load database: each chunk is a length of four bytes and a zlib stream."""

    def read(folder: Path) -> Texts:
        content, place, book = (folder / path).read_bytes(), 0, 0
        while place < len(content) - 4:
            stream = zlib.decompressobj()
            try:
                data = stream.decompress(content[place + 4 :])
            except zlib.error:
                place += 1
                continue
            place = len(content) - len(stream.unused_data)
            if lines := r_strings(data):
                book += 1
                yield f"book{book}", "\n".join(lines)

    return read


def mails(folder: Path) -> Texts:
    for path in find(folder, "package/data/*/*.json"):
        record = json.loads(decode(path))
        if "text" not in record:
            continue
        mail = email.message_from_string(record["text"], policy=email.policy.compat32)
        parts = {part.get_content_type(): part for part in reversed(list(mail.walk()))}  # the first of each type
        kind = next((kind for kind in ("text/plain", "text/html") if kind in parts), None)
        if kind is None:
            continue
        try:
            body = parts[kind].get_payload(decode=True).decode("latin-1")
        except (AttributeError, ValueError, LookupError):  # no payload, or one that cannot be decoded
            continue
        body = html_text(body) if kind == "text/html" else body
        yield f"{record['group']}/{record['id']}", f"Subject: {mail.get('Subject', '')}\n\n{body}".replace("\r", "")


def term(block: str) -> tuple[str, str] | None:
    """A term of an OBO ontology as prose; None where it has no definition worth reading."""
    if not block.startswith("[Term]") or "is_obsolete: true" in block:
        return None
    name, definition = re.search(r"^name: (.*)$", block, re.M), re.search(r'^def: "((?:[^"\\]|\\.)*)"', block, re.M)
    if not (name and definition) or len(definition[1]) < 40:
        return None
    text = f"{name[1]}. {definition[1]}".replace('\\"', '"')
    if kinds := re.findall(r"^is_a: \S+ ! (.*)$", block, re.M):
        text += f" It is a kind of {', '.join(kinds[:3])}."
    if comment := re.search(r"^comment: (.*)$", block, re.M):
        text += f" {comment[1]}"
    return name[1], text


def ontologies(*patterns: str) -> Reader:
    def read(folder: Path) -> Texts:
        blocks = (block for path in find(folder, *patterns) for block in decode(path).split("\n\n"))
        yield from join((found for block in blocks if (found := term(block))), 1500)

    return read


def licences(folder: Path) -> Texts:
    """Licence texts without the metadata at the top."""
    for path in find(folder, "licensedcode/data/licenses/*.LICENSE"):
        text = decode(path)
        head = re.match(r"---\n.*?\n---\n", text, re.S)
        yield path.stem, text[head.end() :] if head else text


def plays(folder: Path) -> Texts:
    """Plays and poems without the licence of their transcription."""
    shelf = "shakespeare-*/{}"
    names = ("shksprdata/texts/*_gut.txt", "miltondata/texts/poetical_works_gut.txt", "miltondata/texts/areopagitica_gut.txt")
    for path in find(folder, *(shelf.format(name) for name in names)):
        text = re.split(r"\*\*\*\s*END OF|End of (?:the |this )?Project Gutenberg", decode(path).replace("\r", ""))[0]
        if begin := re.search(r"\*END\*?[^\n]*\n|\*\*\* ?START[^\n]*\n", text):
            text = text[begin.end() :]
        yield path.stem, text[3000:] if "gutenberg" in text[:3000].lower() else text


def quran(language: str) -> Reader:
    def read(folder: Path) -> Texts:
        for chapter in json.loads((folder / f"package/dist/quran_{language}.json").read_text("utf-8")):
            for first, text in join(((verse["id"], verse["translation"]) for verse in chapter["verses"]), 2500):
                yield f"{language}/{chapter['id']}/{first}", text

    return read


def fortunes(folder: Path) -> Texts:
    for path in find(folder, "usr/share/games/fortunes/*"):
        for number, text in enumerate(decode(path).split("\n%\n") if not path.suffix else ()):
            yield f"{path.name}/{number}", text


def zipped_code(path: str, pattern: str, most: int = 6000) -> Reader:
    """Source files in a zip archive, at most so many, chosen at random."""

    def read(folder: Path) -> Texts:
        with zipfile.ZipFile(folder / path) as archive:
            names = sorted(name for name in archive.namelist() if re.search(pattern, name))
            random.Random(0).shuffle(names)
            for name in names[:most]:
                text = archive.read(name).decode("utf-8", "replace")
                yield name, re.sub(r"\A\s*/\*.*?\*/\s*", "", text, flags=re.S)

    return read
