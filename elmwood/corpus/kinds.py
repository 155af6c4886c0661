"""What a file is: its name says it, in upper or lower case, and its first bytes are compared with that.

Bytes decide about compression, Parquet, Arrow, and what is no text at all. A file whose bytes contradict its name is read as what it
is, or left out with the reason. So raw syntax is never taken for a document.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from elmwood.corpus.sources import Reason
from elmwood.corpus.unpack import PACKED, byte_order_mark, first_bytes, packing


class Kind(NamedTuple):
    """How the files of a kind are named, and what a document of theirs is."""

    endings: tuple[str, ...]
    document: str


KINDS = {
    "JSON": Kind((".jsonl", ".ndjson", ".json"), "each line, or each object of an array, or the one object of the file"),
    "table": Kind((".csv", ".tsv"), "each row; the first row names the columns"),
    "Parquet": Kind((".parquet",), "each row"),
    "Arrow": Kind((".arrow", ".feather"), "each row; folders of `Dataset.save_to_disk` consist of these"),
    "text": Kind((".txt", ".md", ".rst", ".html", ".py"), "the whole file: these, source code, and any other text"),
}

# kind -> endings, and first bytes as a pattern; matched against our own patterns only
NOT_TEXT = {
    "an image": (
        "png jpg jpeg gif webp bmp tif tiff ico psd heic avif",
        rb"\x89PNG|GIF8[79]a|\xff\xd8\xff|II\*\0|MM\0\*|RIFF....WEBP|8BPS\0",
    ),
    "sound or video": (
        "mp3 mp4 m4a wav flac ogg avi mov mkv webm",
        rb"ID3[\x02-\x04]|OggS\0|fLaC\0|RIFF....(WAVE|AVI )|\0\0..ftyp|\x1a\x45\xdf\xa3",
    ),
    "a PDF": ("pdf", rb"%PDF-"),
    "an archive": (
        "zip tar tgz 7z rar jar whl iso dmg deb rpm",
        rb"PK(\x03\x04|\x05\x06)|7z\xbc\xaf|Rar!\x1a\x07|!<arch>\n|.{257}ustar[\0 ]",
    ),
    "an office document": ("doc docx xls xlsx ppt pptx odt ods odp epub", rb"\xd0\xcf\x11\xe0"),
    "a pickle": ("pkl pickle pt pth joblib", rb"\x80[\x02-\x05]"),
    "arrays": ("npy npz h5 hdf5 mat", rb"\x93NUMPY|\x89HDF\r\n"),
    "weights": ("safetensors gguf ggml onnx", rb"GGUF[\x01-\x0f]\0|.{3}\0{5}\{\""),
    "a program": ("exe dll so dylib pyc pyo class wasm", rb"\x7fELF|MZ.{60,}?PE\0\0|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe|\0asm"),
    "a data base": ("sqlite sqlite3", rb"SQLite format 3\0"),
    "a font": ("ttf otf woff woff2", rb"\0\x01\0\0\0|OTTO\0|wOF[F2]"),
}
_ENDING = {f".{ending}": what for what, (endings, _) in NOT_TEXT.items() for ending in endings.split()}
_BYTES = {what: re.compile(pattern, re.S) for what, (_, pattern) in NOT_TEXT.items()}
_ROWS = {"Parquet": b"PAR1", "Arrow": b"ARROW1"}
_STREAM = b"\xff\xff\xff\xff"  # begins an Arrow stream


def kind(path: Path, encoding: str = "utf-8") -> str | Reason:
    """A key of KINDS, or the Reason why the file is left out. Raises OSError and the like for a damaged file."""
    ending, packed = _endings(path.name.lower())
    if ending in _ENDING:
        return Reason(f"{_ENDING[ending]}, not text")
    raw = first_bytes(path, unpack=False)
    found = packing(raw)
    if packed and not found and raw:
        return Reason(f"named {packed}, and not compressed so")
    head = first_bytes(path) if found else raw
    named = next((name for name, one in KINDS.items() if ending in one.endings), "text")
    rows = next((name for name, magic in _ROWS.items() if head.startswith(magic)), "Arrow" if head.startswith(_STREAM) else "")
    if rows:
        return Reason(f"{rows}, compressed as a whole: unpack it") if found else rows
    if named in _ROWS:
        return Reason(f"named {ending}, and not {named}")
    mark = byte_order_mark(head)
    if not mark:
        if other := next((what for what, pattern in _BYTES.items() if pattern.match(head)), ""):
            return Reason(f"{other}, not text")
        if b"\0" in head and not encoding.startswith(("utf-16", "utf-32")):
            return Reason("not text")
    if named != "JSON" and looks_like_json(head.decode(mark or encoding, errors="replace").lstrip("\ufeff")):
        return "JSON"
    return named


def looks_like_json(head: str) -> bool:
    """Whether a text that begins so is JSON: each of its first lines is an object, or all of it is an object or array of objects."""
    text = head.lstrip()
    if not text.startswith(("{", "[")):
        return False
    whole = [line for line in text.splitlines()[:3] if line.strip()]
    if text.startswith("{") and len(whole) > 1 and all(_object(line) for line in whole[:2]):
        return True
    if _object(text.strip()):
        return True
    # longer than what is seen here: the syntax of a key, which prose and code do not begin with
    return bool(re.match(r'(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:\s*["\d\[{tfn-]', text))


def _object(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) or (isinstance(found, list) and bool(found) and isinstance(found[0], dict))


def _endings(name: str) -> tuple[str, str]:
    """'a.jsonl.gz' -> ('.jsonl', '.gz')."""
    packed = next((ending for one in PACKED.values() for ending in one.endings if name.endswith(ending)), "")
    return Path(name.removesuffix(packed)).suffix, packed
