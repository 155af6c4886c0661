"""Room for keys and values: on a CPU a row that grows moves nothing, and more rows move what was written alone."""

import pytest
import torch

from elmwood.ensemble.batch.keys import KeyValues

LIKE = torch.zeros(1, 2, 1, 4)


def test_rows_grow_without_a_copy_and_more_rows_keep_what_was_written():
    store = KeyValues(torch.device("cpu"))
    keys, values = store.layer(0, LIKE, LIKE)
    keys[1, :, :3], values[1, :, :3] = 1.0, 2.0
    store.wrote(1, 3)
    store.reserve(4, 5000)
    assert store.layer(0, LIKE, LIKE)[0] is keys
    store.reserve(5, 5000)
    more, others = store.layer(0, LIKE, LIKE)
    assert more.shape == others.shape == (8, 2, store.capacity, 4)
    assert (more[1, :, :3].min(), others[1, :, :3].min(), more.sum(), others.sum()) == (1, 2, 24, 48)


def test_too_many_rows_are_out_of_memory():
    store = KeyValues(torch.device("cpu"))
    store.rows = 1 << 40
    with pytest.raises(MemoryError, match="keys and values"):
        store.layer(0, LIKE, LIKE)
