"""The hub is killed ten times in the middle of its work (300 times: `python -m benches.hub.kills`)."""

from benches.hub.kills import kills


def test_no_acknowledged_write_is_lost_and_no_blob_is_torn(tmp_path):
    found = kills(tmp_path, 10, 0.5, 3, 1)
    assert found["acknowledged"] > 0
    assert found["kills"] == 10
