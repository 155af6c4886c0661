"""The lineage as a tree. A record that is used again is named there, and not drawn again."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from elmwood.report.data import Ancestor

SHOWN = 6  # records of one kind on one level; the others are folded
DEEPEST = 20  # levels; what is deeper is listed on the last one


class Node(NamedTuple):
    """A record, its inputs, and those inputs that are elsewhere in the tree."""

    record: Ancestor
    below: list["Node"]
    again: list[Ancestor]


def tree(lineage: Sequence[Ancestor]) -> list[Node]:
    """Depth-first records -> roots. A record that is used again has no inputs there."""
    roots: list[Node] = []
    path: list[Node] = []
    seen: set[str] = set()
    for record in lineage:
        del path[min(record.depth, DEEPEST) :]
        if record.digest in seen and path:
            path[-1].again.append(record)
            continue
        seen.add(record.digest)
        node = Node(record, [], [])
        (path[-1].below if path else roots).append(node)
        path.append(node)
    return roots


def draw(nodes: Sequence[Node]) -> Markup:
    """Nested HTML lists; the style sheet draws the branches."""
    if not nodes:
        return Markup()
    counted: Counter[str] = Counter()
    shown: list[Node] = []
    hidden: list[Node] = []
    for node in nodes:
        counted[node.record.kind] += 1
        (shown if counted[node.record.kind] <= SHOWN else hidden).append(node)
    more = Markup()
    if hidden:
        more = Markup("<li><details><summary>{} more</summary><ul>{}</ul></details></li>").format(len(hidden), _items(hidden))
    return Markup("<ul>{}{}</ul>").format(_items(shown), more)


def _items(nodes: Sequence[Node]) -> Markup:
    return Markup("").join(
        Markup('<li><span class="kind">{}</span> <code>{}</code> <span class="about">{}</span>{}{}</li>').format(
            node.record.kind, node.record.digest[:10], node.record.summary, _again(node.again), draw(node.below)
        )
        for node in nodes
    )


def _again(records: Sequence[Ancestor]) -> Markup:
    if not records:
        return Markup()
    words = ", ".join(f"{record.kind} {record.digest[:6]}" for record in records)
    return Markup(' <span class="again">from {}</span>').format(words)
