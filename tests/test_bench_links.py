"""The links of the benches: a token bucket lets through what its rate allows, the proxy changes no byte, and hours are as modelled."""

import json
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benches.links.network import Bucket, proxied
from benches.links.table import Setting, read_curves, read_exchanges, rows_of


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 0.5)), min_size=1, max_size=30), st.sampled_from([1e5, 2e7, 1e9]))
def test_a_bucket_passes_no_more_than_its_rate_and_a_burst(pieces, rate):
    clock = [0.0]
    bucket, passed = Bucket(rate, lambda: clock[0], burst=1000), 0
    for size, pause in pieces:
        clock[0] += bucket.wait(size)  # who asks waits
        passed += size
        assert passed <= (clock[0] * rate / 8 + 1000) * (1 + 1e-9) + 1e-3
        clock[0] += pause


def test_a_bucket_does_not_wait_where_the_rate_allows():
    clock = [0.0]
    bucket = Bucket(8000, lambda: clock[0], burst=0)  # 1,000 bytes a second
    assert bucket.wait(500) == 0.5
    clock[0] = 2.0
    assert bucket.wait(1000) == 1.0


def test_a_proxy_passes_what_it_gets_both_ways():
    sent, answer, got = b"up" * 50_000, b"down" * 30_000, []

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            data = bytearray()
            while piece := connection.recv(65536):
                data += piece
            got.append(bytes(data))
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with proxied(server.getsockname(), 1e9) as address, socket.create_connection(address) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            back = bytearray()
            while piece := client.recv(65536):
                back += piece
        thread.join()
    assert got == [sent]
    assert bytes(back) == answer


def curve(method: str, ratio: float, rng_seed: int, **more: object) -> str:
    """A curve of two points, the last of them `ratio` x that of ddp."""
    facts = {"method": method, "workers": 4, "rng_seed": rng_seed, "parameters": 10, "warm": 100, "steps": 20, "learning_rate": 1e-3} | more
    return "".join(json.dumps(facts | {"tokens": tokens, "loss": loss}) + "\n" for tokens, loss in ((0, 4.0), (800, 2.0 * ratio)))


def table(tmp_path, lines: str, steps: int = 0) -> dict[str, dict]:
    """Rows of a table of four workers whose links take 1.5 times what the bytes do, and a second for each exchange."""
    path, exchanges = tmp_path / "curves.jsonl", tmp_path / "exchanges.jsonl"
    path.write_text(lines)
    exchanges.write_text("".join(
        json.dumps({"method": method, "workers": 4, "rate": 1e6, "seconds": 1 + 1.5 * ideal, "ideal": ideal}) + "\n"
        for method in ("ddp", "diloco") for ideal in (1.0, 3.0)
    ))  # fmt: skip
    setting = Setting(10**6, 4, 1e6, steps, 6e9, 1000, 2e6, read_exchanges([exchanges]), 1.0)  # a step: 1 s; a sum: 1 + 72 s; 500 steps
    return {row["method"]: row for row in rows_of(setting, read_curves([path], 4, []))}


def test_hours_are_those_of_the_model(tmp_path):
    streaming = curve("streaming 0.4/0.9", 1.1, 0, fragments=2, delay=5)
    rows = table(tmp_path, curve("ddp", 1.0, 0) + curve("diloco 0.7/0.9", 1.05, 0) + streaming)
    assert rows["ddp"]["hours"] * 3600 == pytest.approx(500 * (1 + 73))
    assert rows["diloco 0.7/0.9"]["hours"] * 3600 == pytest.approx(500 + 25 * 73)
    assert rows["streaming 0.4/0.9"]["hours"] * 3600 == pytest.approx(500 + 50 * (1 + 36 - 5))
    assert rows["diloco 0.7/0.9"]["loss"] == pytest.approx(0.05)
    assert rows["diloco 0.7/0.9"]["to its loss"] == pytest.approx(0.95 * 500 * 74 / (500 + 25 * 73))  # ddp falls from 2 to 1 x its end
    assert table(tmp_path, curve("ddp", 1.0, 0) + streaming, 100)["streaming 0.4/0.9"]["hours"] * 3600 == pytest.approx(500 + 10 * 32)


def test_ddp_may_stop_earlier_by_plan(tmp_path):
    """Then its learning rate comes down earlier: what a method is compared to is the earlier of both."""
    short = "".join(line.replace("800", "400") + "\n" for line in curve("ddp", 1.02, 0, planned=400).splitlines())
    rows = table(tmp_path, curve("ddp", 1.0, 0, planned=800) + short + curve("diloco 0.7/0.9", 1.02, 0))
    assert rows["diloco 0.7/0.9"]["to its loss"] == pytest.approx(0.5 * 500 * 74 / (500 + 25 * 73))
    assert rows["ddp"]["to its loss"] == pytest.approx(1)


def test_a_learning_rate_is_chosen_on_one_rng_seed_and_kept_on_the_others(tmp_path):
    tried = curve("ddp", 1.1, 0) + curve("ddp", 1.0, 0, learning_rate=2e-3) + curve("ddp", 1.0, 1, learning_rate=2e-3)
    rows = table(tmp_path, tried + curve("diloco 0.7/0.9", 1.02, 0) + curve("diloco 0.7/0.9", 1.04, 1))
    assert rows["ddp"]["seeds"] == 2
    assert (rows["diloco 0.7/0.9"]["loss"], rows["diloco 0.7/0.9"]["error"]) == (pytest.approx(0.03), pytest.approx(0.01))
