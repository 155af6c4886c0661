"""The compiled layer beside the same written with numpy, at sizes that no register divides."""

import numpy as np
import pytest

from elmwood.ensemble.batch import loops

WIDTH, HEAD, HEADS, GROUPS, FEED, RANK = 38, 6, 4, 2, 21, 5
PRODUCTS = [(WIDTH, (HEADS + 2 * GROUPS) * HEAD), (HEADS * HEAD, WIDTH), (WIDTH, 2 * FEED), (FEED, WIDTH)]  # inputs, outputs


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 3, 9, 29])
def test_products(rows):
    x_NI, w_OI = numbers(rows, 53), numbers(15, 53, seed=1)
    y_NO, alone_1O = np.empty((rows, 15), np.float32), np.empty((1, 15), np.float32)
    loops.multiply(x_NI, w_OI, y_NO)
    np.testing.assert_allclose(y_NO, x_NI @ w_OI.T, atol=1e-5)
    for n in range(rows):  # whoever is beside it
        loops.multiply(x_NI[n : n + 1], w_OI, alone_1O)
        assert (alone_1O[0] == y_NO[n]).all()


def test_a_layer():
    rows, read = 6, [3, 0, 7, 1, 2, 5]
    h_NW = numbers(rows, WIDTH)
    norms = numbers(WIDTH, seed=1), numbers(WIDTH, seed=2)
    weights = tuple(numbers(outputs, inputs, seed=3 + n) / 4 for n, (inputs, outputs) in enumerate(PRODUCTS))
    biases = numbers(PRODUCTS[0][1], seed=8), *[np.zeros(0, np.float32)] * 3
    turns = numbers(rows, HEAD, seed=9), numbers(rows, HEAD, seed=10)
    kept = numbers(8, GROUPS, 9, HEAD, seed=11), numbers(8, GROUPS, 9, HEAD, seed=12)
    spots = np.array([4, 0, 7, 2, 1, 6]), np.array(read)
    places = [(0, 6, HEAD * HEADS - 6), (2, 0, 2 * FEED), (3, 2, WIDTH - 2)]  # product, first output, outputs
    adapted, end = [], 0
    for product, first, outputs in places:
        inputs = PRODUCTS[product][0]
        adapted.append((product, first, end, RANK, inputs, outputs))
        end += RANK * (inputs + outputs)
    slots = numbers(3, end, seed=13) / 4, np.array([2, -1, 0, 0, 1, -1]), np.array(adapted)
    expected = [plain(n, h_NW[n], norms, weights, biases, slots, turns, [one.copy() for one in kept], spots) for n in range(rows)]
    loops.read_layer(h_NW, norms, np.float32(1e-5), weights, biases, slots, turns, kept, spots, np.float32(0.3))
    np.testing.assert_allclose(h_NW, expected, atol=2e-5)


def plain(n, h, norms, weights, biases, slots, turns, kept, spots):
    """What one row is after the layer."""
    flat, slot = slots[0].astype(float), slots[1][n]

    def product(x, number):
        y = weights[number] @ x + (biases[number] if len(biases[number]) else 0)
        for which, first, start, rank, inputs, outputs in slots[2]:
            if which == number and slot >= 0:
                a, b = np.split(flat[slot, start : start + rank * (inputs + outputs)], [rank * inputs])
                y[first : first + outputs] += b.reshape(rank, outputs).T @ (a.reshape(rank, inputs) @ x)
        return y

    def normal(x, weight):
        return x / np.sqrt((x**2).mean() + 1e-5) * weight

    def turn(x):
        other = np.concatenate([-x[HEAD // 2 :], x[: HEAD // 2]])
        return x * turns[0][n] + other * turns[1][n]

    h = h.astype(float)
    parts = product(normal(h, norms[0]), 0).reshape(-1, HEAD)
    row, place = spots[0][n], spots[1][n]
    for k in range(GROUPS):
        kept[0][row, k, place], kept[1][row, k, place] = turn(parts[HEADS + k]), parts[HEADS + GROUPS + k]
    read = []
    for query in range(HEADS):
        keys, values = (one[row, query // (HEADS // GROUPS), : place + 1] for one in kept)
        share = np.exp(0.3 * keys @ turn(parts[query]))
        read.append(share / share.sum() @ values)
    h += product(np.concatenate(read), 1)
    gate, up = np.split(product(normal(h, norms[1]), 2), 2)
    return h + product(gate / (1 + np.exp(-gate)) * up, 3)
