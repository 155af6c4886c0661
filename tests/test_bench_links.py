"""The links of the benches: a token bucket lets through what its rate allows, and the proxy changes no byte."""

import socket
import threading

from hypothesis import given
from hypothesis import strategies as st

from benches.links.network import Bucket, proxied


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
