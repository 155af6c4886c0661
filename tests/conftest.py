"""What several files share, and in which order they run."""

import gc
import os

import forked as copies
import pytest

from elmwood.store import Store

gc.disable()  # until all is imported: nothing of it is garbage, and looking takes a sixth of the time
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads for such small products only wait for one another
os.environ.setdefault("ELMWOOD_DEVICE", "cpu")  # the same tests on a machine with a GPU: many compare bytes, which a CPU repeats


# the files that take longest, longest first: then those that run side by side end at about the same time
LONGEST = """
    story package community tutorial replicas demo rehearsal train_verbs export comparison ensemble fit partition sites pull judge
    house harness_parity seeds together examples harness volunteer merge_parts benches train importing follow kills pages serve_page
    decode build gateway store mixture embed hub_races resume processes sequential sketch openapi machine_kills contest machine
"""


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    gc.enable()  # the process that hands tests to others imports nothing of ours


def pytest_collection_finish():
    gc.freeze()  # libraries and tests stay: no later collection looks at them
    gc.enable()
    if "PYTEST_XDIST_WORKER" in os.environ:  # of many tests some need it
        copies.prepare()


@pytest.fixture(scope="session")
def forked():
    """Runs a script in a process of its own, without the seconds that torch takes to import."""
    return copies.Forked()


@pytest.fixture
def float32():
    """CPUs with AMX train in bf16: what compares sums more closely than that asks for float32."""
    from elmwood.train.card import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "uses_bf16", lambda device: device.type != "cpu")
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def seed(store):
    from tiny_models import tiny_seed  # torch, which the process that only hands tests to others never needs

    return tiny_seed(store)
