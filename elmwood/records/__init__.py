"""Frozen records. Each is named by the digest of its content, and names its inputs by their digests.

In a record, a bare string of 64 hex digits is the digest of another record; `sha256:…` is the digest of a blob. So the lineage is
a Merkle DAG, and can be followed without knowledge of the kinds.
"""

from elmwood.records.base import FORMAT, Blob, Digest, Files, Frozen, Record, canonical, fingerprint
from elmwood.records.kinds import KINDS, parse, read_record, references
from elmwood.records.merges import Contribution, Gates, Merged, Mixture, Share, State
from elmwood.records.models import Ensemble, Expert, Forest, Point, Portion, Recipe, Seed, Shape, Statistics
from elmwood.records.results import Check, Comparison, Contest, Entry, Ledger, Row, Score, Verdict
from elmwood.records.stars import Diloco, Fate, OuterStep, Star, Version
from elmwood.records.text import Corpus, Domain, Embedder, Packing, Partition, Shard

__all__ = [
    "FORMAT",
    "KINDS",
    "Blob",
    "Check",
    "Comparison",
    "Contest",
    "Contribution",
    "Corpus",
    "Digest",
    "Diloco",
    "Domain",
    "Embedder",
    "Ensemble",
    "Entry",
    "Expert",
    "Fate",
    "Files",
    "Forest",
    "Frozen",
    "Gates",
    "Ledger",
    "Merged",
    "Mixture",
    "OuterStep",
    "Packing",
    "Partition",
    "Point",
    "Portion",
    "Recipe",
    "Record",
    "Row",
    "Score",
    "Seed",
    "Shape",
    "Shard",
    "Share",
    "Star",
    "State",
    "Statistics",
    "Verdict",
    "Version",
    "canonical",
    "fingerprint",
    "parse",
    "read_record",
    "references",
]
