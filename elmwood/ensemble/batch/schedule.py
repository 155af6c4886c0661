"""Who is admitted, and who reads how many tokens in a step. Pure functions."""

from collections.abc import Sequence
from typing import NamedTuple

OVERTAKEN = 16  # times that later requests may be admitted before one that does not fit yet


class Job(NamedTuple):
    """A request that waits."""

    number: int
    experts: frozenset[str]  # digests of those it begins with
    rows: int  # at once, at most
    tokens: int  # of keys and values that its rows hold in the end
    overtaken: int = 0


class Sizes(NamedTuple):
    """How much fits."""

    running: int
    rows: int
    tokens: int  # of all rows
    chunk: int  # tokens of longer prompts in one step


class Room(NamedTuple):
    """What is left to give."""

    requests: int
    rows: int
    tokens: int
    slots: int
    seated: frozenset[str]  # experts that take no further slot


def admit(waiting: Sequence[Job], room: Room) -> list[int]:
    """The numbers of those that begin now: first come, first served, but one that fits may overtake one that does not, OVERTAKEN times."""
    found, blocked = [], False
    for job in waiting:
        new = job.experts - room.seated
        fits = room.requests >= 1 and job.rows <= room.rows and job.tokens <= room.tokens and len(new) <= room.slots
        if fits and not (blocked and new):  # the slots that the first of those that wait needs are not taken from it
            found.append(job.number)
            room = Room(room.requests - 1, room.rows - job.rows, room.tokens - job.tokens, room.slots - len(new), room.seated | new)
        elif job.overtaken >= OVERTAKEN or not room.requests:
            break
        else:
            blocked = True
    return found


def divide(left: Sequence[int], budget: int) -> list[int]:
    """Shares of a budget of tokens, no larger than what is left to each; who needs less leaves the rest to the others."""
    share, order = [0] * len(left), sorted(range(len(left)), key=lambda n: left[n])
    for place, n in enumerate(order):
        share[n] = min(left[n], -(-budget // (len(order) - place)))
        budget -= share[n]
    return share
