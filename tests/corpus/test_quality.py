"""Filters of quality and language, each on texts that it leaves out and one that it keeps."""

from collections import Counter

import fsspec
import numpy as np
import pytest
from sources import lines

from elmwood.corpus.build import build
from elmwood.corpus.quality import FILTERS, parse_filters, unfit
from elmwood.corpus.read import Reading, read
from elmwood.errors import BadCorpus, BadInput, MissingExtra
from elmwood.store import Store

PROSE = (
    "The harbour keeps its ropes dry while a sloop tacks past the buoy, and the mast leans over the swell of the bay.\n"
    "Bakers knead dough with flour and yeast. They let the loaf rise near the oven until its crust turns brown!\n"
    "A telescope gathers faint light from distant galaxies; their spectra show hydrogen lines that have moved to the red.\n"
    "Would anybody have thought that such sentences belong together? Nobody would, to be honest, and that is the point.\n"
    "So here ends a page that every filter keeps, since it has words, sentences and nothing that comes twice.\n"
)


@pytest.mark.parametrize("name", FILTERS)
def test_prose_is_kept(name):
    assert unfit(name, PROSE) == ""


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("gopher", "too few words", "not 50 to 100,000 words"),
        ("gopher", "w " * 60, "mean length of words"),
        ("gopher", PROSE + "# " * 20, "a symbol in ten words"),
        ("gopher", "".join(f"- another point of the list: {n}\n" for n in range(12)), "begin with a bullet"),
        ("gopher", PROSE + "12345 " * 40, "without a letter"),
        ("gopher", " ".join(f"wort{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10]}" for n in range(99)), "stop words"),
        ("gopher", PROSE * 2, "repeated"),
        ("c4", "lorem ipsum " + PROSE, "lorem ipsum"),
        ("c4", "int main() { return 0; } " + PROSE, "curly bracket"),
        ("c4", PROSE[:100], "fewer than five sentences"),
        ("c4", PROSE + "\nWe care about your privacy policy.", "a policy"),
        ("fineweb", PROSE.replace(".\n", "\n").replace("!\n", "\n"), "few lines end a sentence"),
        ("fineweb", PROSE + PROSE[:110] + "\n" + PROSE[:113], "repeated lines"),
        ("fineweb", "Short.\n" * 3 + PROSE[:40], "most lines are short"),
    ],
)
def test_what_filters_leave_out(name, text, why):
    assert why in unfit(name, text)


def test_filters_are_named_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": PROSE}, {"text": "too short"}))
    rejected = Counter()
    assert len(list(read(str(tmp_path), rejected, reading=Reading.of(filters="gopher, c4")))) == 1
    assert rejected == {"gopher: not 50 to 100,000 words": 1}
    with pytest.raises(BadInput, match="no filter 'nonsense': have gopher, c4, fineweb, language=CODE"):
        parse_filters("c4,nonsense")


def test_languages():
    pytest.importorskip("py3langid")
    assert parse_filters("language=en+de") == ("language=en+de",)
    assert unfit("language=en+de", PROSE) == ""
    assert unfit("language=de+fr", PROSE) == "another language"
    assert unfit("language=de", "Der Hafen hält seine Taue trocken, während ein Boot an der Boje vorbeizieht.") == ""
    with pytest.raises(BadInput, match="no language 'xx'"):
        parse_filters("language=xx")


def test_object_stores(tmp_path):
    """fsspec's store in memory, with its own copy of the files."""
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(f"w{n}" for n in rng.integers(0, 5000, 20)), "source": "s"} for _ in range(30)]
    store = fsspec.filesystem("memory")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name, some in {"a.jsonl": rows[:20], "deep/b.jsonl.gz": rows[20:], ".hidden": rows[:1]}.items():
        with fsspec.open(f"file://{tmp_path}/texts/{name}", "wb", compression="infer") as file:
            file.write(lines(*some))
        store.put_file(str(tmp_path / "texts" / name), f"/bucket/{name}")
    local = build([str(tmp_path / "texts")], Store(tmp_path / "local"))
    for source in ("memory://bucket", "memory://bucket/"):
        assert build([source], Store(tmp_path / "far")) == local
    assert build(["memory://bucket/a.jsonl", "memory://bucket/deep/*.gz"], Store(tmp_path / "far")) == local
    for wrong, why in (("memory://nowhere", "no such file"), ("nonsense://a", "no store of this kind")):
        with pytest.raises(BadCorpus, match=why):
            list(read(wrong, Counter()))
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match=r"elmwood\[s3\]"):
            list(read("s3://bucket/a", Counter()))
