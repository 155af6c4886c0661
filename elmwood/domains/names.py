"""Names for domains: two or three terms that tell each domain from the others, as a person would write them.

Terms are read where a word stands alone between spaces and punctuation: words glued to digits, signs or other words are code,
markup or abbreviations. Nouns count more than other words, as far as the English words around them show; in other languages all
words count alike. Two words that mostly stand together are one term. A domain of source code is named by its languages first.

Shapes: N documents, K domains, V terms (singular and plural are one), T tokens of all documents in a row, U different tokens,
C candidates, M terms and P places of one domain.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray
from scipy import sparse

from elmwood.domains.cluster import members
from elmwood.domains.code import PLUMBING, is_code, language
from elmwood.domains.words import words

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Flags = NDArray[np.bool_]

TERMS = 10  # for each domain
NAMED, WORDS = 3, 5  # of these, in its name; and the words of all of them, at most
SHORT = 4  # letters of a word that may be an abbreviation: it counts RARELY unless it has capitals, as SQL has
RARELY = 0.05
LONGEST = 24  # letters of a word
VERBAL = 4  # observations as a verb that a word ending in -ed or -ing starts with
CREDIT = 3  # words that may belong to a person's name, after the first
LEAST = 3  # documents a term must stand in, so that a name reveals no single document
READ = 2000  # characters of each document
CANDIDATES = 40  # terms of one domain among which TERMS are chosen
COVERED = 0.5  # what a document still counts after each chosen term it has, so that further terms describe other documents
TOGETHER = 0.6  # a neighbour at this share of the places of a term belongs to it: both are one phrase
PHRASE = 3  # words in a phrase
CODE = 0.4  # share of documents of code in a domain that is named as code
SPOKEN = 0.2  # share of a language in these documents from which it is named


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("the a an this that these those my your his her its our their each every any some no another which what whose thy")
_BEFORE_VERBS = _words(
    "i you he she it we they who to will would can could may might must shall should not is are was were be been am thou"
)
_FUNCTION_WORDS = _words(
    "of as at by for from in into on onto out over than then there here with within without and or but nor if so because when where "
    "while how why all both either neither few more most much many other others such same own only also very too just even still yet "
    "ever never again once now always often about above after against along among around before behind below beneath beside between "
    "beyond during except through throughout toward towards under until unto upon up down off since though although unless whether "
    "however therefore thus hence else me him us them whom has have had having do does did done doing being himself herself itself "
    "themselves myself yourself ourselves one two three four five first second third last next nothing something anything everything "
    "someone anyone everyone hath doth shalt thee thine ye let make made get got give given take taken see say said says use used using "
    "like well don didn doesn isn wasn wouldn couldn cannot etc via per"
)
_TOKEN = regex.compile(r"""([(\[{“‘"'*_`]*)(\p{L}[\p{L}\p{M}]*)(?:['’]s)?([.,;:!?)\]}”’"'*_`…—-]*)""")
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
_BREAK = "\0"  # a token that is nobody's neighbour
CONTENT, DETERMINER, BEFORE_VERB, FUNCTION, OTHER = range(5)


class Token(NamedTuple):
    """What one spelling is, with its punctuation."""

    term: int  # row of the term, -1 where it is none
    form: int  # as it is written, without punctuation
    kind: int  # CONTENT, DETERMINER, ...
    opens: bool  # punctuation stands before the word
    closes: bool  # or after it
    ends: bool  # a sentence ends with it
    capital: bool  # its first letter is a capital
    by: bool  # the word "by"
    plumbing: bool  # a keyword or the like, where it stands in code


class Reading(NamedTuple):
    """All documents as one row of tokens, each document after a break."""

    terms: list[str]
    forms: list[str]
    languages: list[str | None]  # of each document; None where it is no code, "" where the language is not known
    document_T: Ints
    term_T: Ints  # -1 where a token is no term
    form_T: Ints
    kind_T: Ints
    near_T: Flags  # nothing but a space stands between a token and the one before
    starts_T: Flags  # a sentence begins here
    capital_T: Flags


# ---- read ------------------------------------------------------------------------------------------------------------


def read(texts: Iterable[str]) -> Reading:
    """The beginnings of documents as tokens."""
    tokens = _Tokens()
    rows = [np.zeros(0, np.int32)]
    languages: list[str | None] = []
    for text in texts:
        begin = text[:READ]
        languages.append(language(begin) if is_code(begin) else None)
        begin = _UNSPACED.sub(
            lambda run: "".join(f" {pair} {_BREAK} " for pair in words(run.group())), begin
        )  # pairs of letters, not phrases
        rows.append(np.array([tokens[spelling] for spelling in (_BREAK, *begin.replace("\n\n", f" {_BREAK} ").split())], np.int32))
    u_T = np.concatenate(rows)
    table = np.array(tokens.rows, np.int32).reshape(-1, len(Token._fields))

    def flag(name: str, before: bool = False) -> Flags:
        flag_T = table[u_T, Token._fields.index(name)].astype(bool)
        return _moved(flag_T, 1, True) if before else flag_T

    term_T, form_T, kind_T = table[u_T, 0], table[u_T, 1], table[u_T, 2]
    document_T = np.repeat(np.arange(len(languages)), [len(row) for row in rows[1:]])
    near_T = ~flag("opens") & ~flag("closes", before=True)
    credit_T = _moved(flag("by"), 1, False) & near_T & flag("capital")  # "by Jane Doe": who wrote it, not what it is about
    for _ in range(CREDIT):
        credit_T |= _moved(credit_T, 1, False) & near_T & (kind_T == CONTENT)
    plumbing_T = flag("plumbing") & np.array([one is not None for one in languages], bool)[document_T]
    term_T = np.where(credit_T | plumbing_T, -1, term_T)
    starts_T = flag("ends", before=True) | flag("opens")
    return Reading(list(tokens.term), list(tokens.form), languages, document_T, term_T, form_T, kind_T, near_T, starts_T, flag("capital"))


class _Tokens(dict[str, int]):
    """Spelling -> row of its Token; each is looked at once."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Token] = []
        self.term: dict[str, int] = {}
        self.form: dict[str, int] = {}

    def __missing__(self, spelling: str) -> int:
        self.rows.append(self._token(spelling))
        self[spelling] = row = len(self.rows) - 1
        return row

    def _token(self, spelling: str) -> Token:
        match = _TOKEN.fullmatch(spelling)
        if match is None:
            return Token(-1, -1, OTHER, True, True, spelling == _BREAK or any(sign in spelling for sign in ".!?"), False, False, False)
        opening, word, closing = match.groups()
        lower = word.lower()
        kind = _kind(lower)
        term = self.term.setdefault(_singular(lower), len(self.term)) if kind == CONTENT else -1
        form = self.form.setdefault(word, len(self.form)) if kind == CONTENT else -1
        ends = any(sign in closing for sign in ".!?:")
        plumbing = lower in PLUMBING or not (word.isupper() or word[1:].islower())
        return Token(term, form, kind, bool(opening), bool(closing), ends, word[0].isupper(), lower == "by", plumbing)


def _kind(lower: str) -> int:
    if lower in _DETERMINERS:
        return DETERMINER
    if lower in _BEFORE_VERBS:
        return BEFORE_VERB
    if lower in _FUNCTION_WORDS:
        return FUNCTION
    return CONTENT if 2 <= len(lower) <= LONGEST else OTHER


def _singular(word: str) -> str:
    """Folds English plurals; words of other languages that end alike only share their row."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _moved(x_T: NDArray, by: int, fill: bool | int) -> NDArray:
    """Row t holds what stood `by` places before it."""
    moved_T = np.full_like(x_T, fill)
    if by > 0:
        moved_T[by:] = x_T[:-by]
    else:
        moved_T[:by] = x_T[-by:]
    return moved_T


# ---- choose ----------------------------------------------------------------------------------------------------------


def top_terms(reading: Reading, label_N: Ints, k: int) -> list[tuple[str, ...]]:
    """The TERMS most telling terms of each domain, best first.

    A term tells by the share of the domain's documents that have it, times the log of how many times that of the others it is,
    times how surely it is a noun. Shares start at the whole corpus's (a prior of one document). Each document counts less with
    every chosen term it has: so the next one is of other documents.
    """
    known_T = reading.term_T >= 0
    place_T = (reading.document_T[known_T], reading.term_T[known_T])
    has_NV = sparse.csr_array((np.ones(known_T.sum()), place_T), shape=(len(label_N), len(reading.terms)))
    has_NV.data[:] = 1.0
    documents_K, total = np.bincount(label_N, minlength=k), len(label_N)
    count_KV = sparse.csr_array(members(label_N, k) @ has_NV)
    count_KV.sort_indices()
    count_V, weight_V = np.asarray(count_KV.sum(0)), weights(reading)
    prior_V = count_V / max(total, 1)
    token_T = np.argsort(label_N[reading.document_T], kind="stable")  # domain by domain
    begin_K = np.searchsorted(label_N[reading.document_T][token_T], np.arange(k + 1))
    chosen = []
    for domain in range(k):
        own = slice(count_KV.indptr[domain], count_KV.indptr[domain + 1])
        term_M, count_M = count_KV.indices[own], count_KV.data[own]
        inside_M = (count_M + prior_V[term_M]) / (documents_K[domain] + 1)
        outside_M = (count_V[term_M] - count_M + prior_V[term_M]) / (total - documents_K[domain] + 1)
        ratio_M = np.where(count_V[term_M] >= min(LEAST, total), np.log(inside_M / outside_M), 0.0).clip(0.0) * weight_V[term_M]
        telling_M = inside_M * ratio_M
        candidate_C = np.argsort(-telling_M, kind="stable")[:CANDIDATES]
        candidate_C = candidate_C[telling_M[candidate_C] > 0]
        has_NC = has_NV[np.flatnonzero(label_N == domain)][:, term_M[candidate_C]].toarray()
        inside_P = token_T[begin_K[domain] : begin_K[domain + 1]]
        chosen.append(_spread_out(reading, term_M[candidate_C], has_NC, ratio_M[candidate_C], inside_P))
    return chosen


def _spread_out(reading: Reading, candidate_C: Ints, has_NC: Floats, ratio_C: Floats, inside_P: Ints) -> tuple[str, ...]:
    """Candidates one after another, the most telling for the documents not yet described; as phrases."""
    weight_N = np.ones(len(has_NC))
    left_C = np.ones(len(candidate_C), bool)
    found: list[str] = []
    while len(found) < TERMS and left_C.any():
        best = int(np.where(left_C, (weight_N @ has_NC) * ratio_C, -1.0).argmax())
        weight_N *= np.where(has_NC[:, best] > 0, COVERED, 1.0)
        text, used = phrase(reading, int(candidate_C[best]), inside_P)
        left_C &= ~np.isin(candidate_C, used)
        found.append(text)
    return tuple(found)


def weights(reading: Reading) -> Floats:
    """How surely each term is a noun, as the words around it show, and no abbreviation [V], from 0 to 1.

    A noun follows a determiner, with no other word after it; a verb follows a pronoun, or comes before a determiner. What has
    a capital within a sentence is a name. Without any observation, 0.25; less for words that end as participles do.
    """
    before_T = np.where(reading.near_T, _moved(reading.kind_T, 1, OTHER), OTHER)
    after_T = np.where(_moved(reading.near_T, -1, False), _moved(reading.kind_T, -1, OTHER), OTHER)
    name_T = reading.capital_T & ~reading.starts_T
    noun_T = name_T | ((before_T == DETERMINER) & (after_T != CONTENT) & (after_T != DETERMINER))
    verb_T = ~noun_T & ((before_T == BEFORE_VERB) | (after_T == DETERMINER))
    known_T = reading.term_T >= 0

    def count(flag_T: Flags) -> Floats:
        return np.bincount(reading.term_T[known_T & flag_T], minlength=len(reading.terms)).astype(np.float64)

    noun_V, verb_V, name_V, all_V = count(noun_T), count(verb_T), count(name_T), count(known_T)
    verb_V += VERBAL * np.array([term.endswith(("ed", "ing")) for term in reading.terms], bool)
    short_V = np.array([len(term) < SHORT and not _UNSPACED.search(term) for term in reading.terms], bool) & (name_V < all_V / 2)
    return (noun_V + 0.5) / (noun_V + verb_V + 2) * np.where(short_V, RARELY, 1.0)


def phrase(reading: Reading, term: int, own_P: Ints) -> tuple[str, list[int]]:
    """A term as it is mostly written at the places of a domain, with the neighbours it mostly has; and the terms in it."""
    first_P = last_P = own_P[reading.term_T[own_P] == term]  # places of the phrase: its first and last token
    words_, used = [_form(reading, first_P)], [term]
    many = len(first_P)
    while len(words_) < PHRASE:
        sides = []
        for place_P, near_P in ((last_P + 1, last_P + 1), (first_P - 1, first_P)):
            inside_P = (place_P >= 0) & (near_P < len(reading.term_T))
            term_P = np.full(len(place_P), -1)
            term_P[inside_P] = np.where(reading.near_T[near_P[inside_P]], reading.term_T[place_P[inside_P]], -1)
            sides.append((*_commonest(term_P[term_P >= 0]), term_P))
        side = 0 if sides[0][0] >= sides[1][0] else 1
        count, other, term_P = sides[side]
        kept_P = term_P == other
        place_P = (last_P[kept_P] + 1, first_P[kept_P] - 1)[side]
        if count < TOGETHER * many or other in used or len(np.unique(reading.document_T[place_P])) < LEAST:
            break
        words_.insert(0 if side else len(words_), _form(reading, place_P))
        used.append(other)
        first_P, last_P = (place_P, last_P[kept_P]) if side else (first_P[kept_P], place_P)
    return " ".join(words_), used


def _form(reading: Reading, place_P: Ints) -> str:
    """How the word at these places is mostly written, beginnings of sentences aside if there are others."""
    within_P = place_P[~reading.starts_T[place_P]]
    form = reading.forms[_commonest(reading.form_T[within_P if len(within_P) else place_P])[1]]
    return form if len(within_P) or form.isupper() else form.lower()


def _commonest(number_P: Ints) -> tuple[int, int]:
    """How often the commonest of some numbers stands there, and which it is: of several the least."""
    met, count = np.unique(number_P, return_counts=True)
    return (int(count.max()), int(met[count.argmax()])) if len(met) else (0, 0)


# ---- name ------------------------------------------------------------------------------------------------------------


def code_names(languages: Sequence[str | None], label_N: Ints, k: int) -> list[str]:
    """For each domain of source code "Rust and Go code", say; empty for the others."""
    made = []
    for domain in range(k):
        mine = [languages[n] for n in np.flatnonzero(label_N == domain).tolist()]
        code = Counter(one for one in mine if one is not None)
        spoken = sorted(one for one, count in code.items() if one and count >= SPOKEN * code.total())
        text = ", ".join(spoken[:-1]) + " and " * (len(spoken) > 1) + "".join(spoken[-1:])
        made.append(f"{text} code".strip() if code.total() >= CODE * max(len(mine), 1) else "")
    return made


def names(terms: Sequence[Sequence[str]], codes: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """A name for each domain: its first terms, after its languages if it is code; and a number where that name is taken."""
    used = set(taken)
    made = []
    for place, (found, code) in enumerate(zip(terms, codes, strict=True)):
        parts = [code] if code else []
        for term in found[: NAMED - len(parts)]:
            if not parts or len(" ".join([*parts, term]).split()) <= WORDS:
                parts.append(term)
        name = ": ".join([code, " ".join(parts[1:])]) if code and len(parts) > 1 else " ".join(parts)
        first = name = name or f"domain {place}"
        number = 2
        while name in used:
            name, number = f"{first} {number}", number + 1
        used.add(name)
        made.append(name)
    return made
