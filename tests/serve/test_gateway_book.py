"""Which experts an engine holds: whatever happens in whatever order, none in use is taken out, and none is loaded twice."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elmwood.records import Seed
from elmwood.serve.gateway.book import Book
from elmwood.serve.gateway.fleet import ABSENT, Fleet
from elmwood.serve.gateway.pick import Pick
from elmwood.serve.gateway.upstream import KINDS, Upstream

NAMES = st.sampled_from("abcdef")


class Requests(RuleBasedStateMachine):
    """Requests, loads that end or fail, and an engine that follows what it is told."""

    def __init__(self):
        super().__init__()
        self.book, self.engine = Book(3), set()
        self.users = []  # (name, entry) of requests at work, or that wait for their expert
        self.loading, self.leaving = {}, set()

    @rule(name=NAMES)
    def ask(self, name):
        step = self.book.want(name)
        if step.do == "go":
            assert name in self.engine
        elif step.do == "load":
            assert name not in self.loading
            assert name not in self.engine
            self.loading[name] = step.entry
        elif step.do == "await":
            assert name in self.loading
        elif step.do == "unload":
            assert not any(other == step.name for other, _ in self.users)
            self.leaving.add(step.name)
        else:
            assert len(self.book.entries) >= 3
        if step.entry:
            self.users.append((name, step.entry))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), works=st.booleans())
    def load_ends(self, data, works):
        name = data.draw(st.sampled_from(sorted(self.loading)))
        entry = self.loading.pop(name)
        if works:
            self.book.loaded(name)
            self.engine.add(name)
        else:
            self.book.gone(name)
            for one in [one for one in self.users if one[1] is entry]:
                self.end(one)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def unload_ends(self, data):
        name = data.draw(st.sampled_from(sorted(self.leaving)))
        self.leaving.discard(name)
        self.engine.discard(name)
        self.book.gone(name)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def request_ends(self, data):
        self.end(data.draw(st.sampled_from(self.users)))

    def end(self, one):
        self.users.remove(one)
        one[1].users -= 1

    @precondition(lambda self: self.engine - self.leaving)
    @rule(data=st.data())
    def engine_loses_one(self, data):
        name = data.draw(st.sampled_from(sorted(self.engine - self.leaving)))
        entry = self.book.entries[name]
        number = entry.number
        self.engine.discard(name)
        assert self.book.lost(name, number)
        assert not self.book.lost(name, number), "once for all who find out"
        self.loading[name] = entry

    @invariant()
    def the_book_is_right(self):
        assert len(self.book.entries) <= 3
        assert {name for name, entry in self.book.entries.items() if entry.state == "ready"} == self.engine - self.leaving
        for name, entry in self.users:
            assert self.book.entries[name] is entry
            assert entry.users == sum(other is entry for _, other in self.users)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_an_engine_that_is_met_says_what_it_holds():
    book = Book(2)
    book.found(["a", "b", "c"])
    assert book.resident == 3
    assert book.want("a").do == "go"
    step = book.want("d")
    assert (step.do, step.name) == ("unload", "c"), "nobody has asked for it, and it came last"
    book.gone("c")
    assert book.want("d").name == "b"
    book.gone("b")
    assert book.want("d").do == "load"
    book.loaded("d")
    book.found(["d"])
    assert book.has("a"), "a request uses it: it finds out by itself"
    book.entries["a"].users = 0
    book.found(["d"])
    assert not book.has("a")


def test_experts_that_are_served_no_more_leave_when_nobody_uses_them():
    book = Book(4)
    book.found("abc")
    used = book.want("b").entry
    assert sorted(book.retire("c")) == ["a"]
    assert book.want("a").do == "unload", "who still wants it loads it again"
    book.gone("a")
    assert book.retire("c") == []
    used.users -= 1
    assert book.retire("c") == ["b"]
    assert book.has("c")


def test_what_a_server_that_loads_by_itself_holds_is_what_it_was_asked_for_last():
    book = Book(2)
    book.touch(["a", "b"])
    book.touch(["c", "b"])
    assert [book.has(name) for name in "abc"] == [False, True, True]


def test_a_request_goes_where_its_experts_are_unless_much_more_is_done_there():
    fleet = Fleet(Seed(name="s", architecture="a", parameters=1, vocabulary=2, context=8, separator=0, files={}), 9)
    first, second = fleet.upstreams = [Upstream(f"http://{n}", n, 2, {}, str, None) for n in range(2)]
    first.up = second.up = True
    first.kind = second.kind = KINDS["vllm"]
    second.book.found("b")
    assert fleet.choose(Pick("b", ("b", "a"))) is second
    assert fleet.choose(Pick("c", ("c",))) is first, "at none: the first of those that are least busy"
    assert fleet.choose(Pick("seed", ("b",))) is first, "the seed is everywhere"
    second.running = 1
    assert fleet.choose(Pick("b", ("b",))) is second
    second.running = ABSENT + 1
    assert fleet.choose(Pick("b", ("b",))) is first
    second.running, first.kind, second.kind = 0, KINDS["elmwood"], KINDS["elmwood"]
    first.book.touch("xa")
    assert fleet.choose(Pick("a", ("a", "b"))) is first
    second.book.touch("ab")
    assert fleet.choose(Pick("a", ("a", "b"))) is second, "both of them"
    second.up, second.retry_at = False, second.clock() + 60
    assert fleet.choose(Pick("b", ("b",))) is first
