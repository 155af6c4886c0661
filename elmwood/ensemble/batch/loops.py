"""A decoder layer for a few rows, each a single token, compiled: it reads every weight once, whatever the number of rows.

Imported when it is first needed: numba takes most of a CPU second to begin. No flag of fast mathematics but those below: what is not
finite must stay so. What a row gets does not depend on the others, to the last bit.

N rows, I inputs, O outputs, W width of the model; R rank and P numbers of adapters; rows, heads, capacity and width of keys as in keys.py
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from elmwood.compiled import jit
from elmwood.lm.products import processor

# AVX-512 has registers for four outputs times six rows, of sixteen numbers each; others for two times four, of eight
WIDTH, OUTPUTS, MANY = (16, 4, 6) if " avx512f " in processor() else (8, 2, 4)
ROWS = 4  # at once, and MANY of more than SEVERAL
SEVERAL = 16
AHEAD = 576 * OUTPUTS  # numbers of the weights that are fetched before they are used: the distance that was fastest

loop = jit(fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")  # which divides by zero without a branch


def _sums(outputs: int, rows: int):
    """A function of (weights, first output, x, first row): sums over the inputs [outputs * rows], of as many inputs as WIDTH divides.

    numba finds neither the width of the registers nor where to fetch ahead, which is twice as fast (docs/log/serving.md).
    """
    vector, number, index = ir.VectorType(ir.FloatType(), WIDTH), ir.FloatType(), ir.IntType(64)
    fetch_type = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[ir.IntType(32)] * 3])
    for_reading = [ir.Constant(ir.IntType(32), n) for n in (0, 3, 1)]  # of data, to be kept in all caches

    @intrinsic
    def sums(context, w_OI, output, x_NI, row):
        def build(context, builder, signature, arguments):
            w, x = (context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 2))
            inputs = builder.extract_value(w.shape, 1)

            def starts(array, first, count):
                places = [builder.mul(builder.add(first, ir.Constant(index, n)), inputs) for n in range(count)]
                return [builder.gep(array.data, [place]) for place in places]

            def at(start, place):
                return builder.load(builder.bitcast(builder.gep(start, [place]), vector.as_pointer()), align=4)

            zeros = ir.Constant(vector, [ir.Constant(number, 0)] * WIDTH)
            totals = [cgutils.alloca_once_value(builder, zeros) for _ in range(outputs * rows)]
            fetch = cgutils.get_or_insert_function(builder.module, fetch_type, "llvm.prefetch.p0i8")
            w_starts, x_starts = starts(w, arguments[1], outputs), starts(x, arguments[3], rows)
            end = builder.sub(inputs, builder.srem(inputs, ir.Constant(index, WIDTH)))
            with cgutils.for_range_slice(builder, ir.Constant(index, 0), end, ir.Constant(index, WIDTH)) as (place, _):
                ones = [at(start, place) for start in x_starts]
                for o, start in enumerate(w_starts):
                    ahead = builder.gep(start, [builder.add(place, ir.Constant(index, AHEAD))])
                    builder.call(fetch, [builder.bitcast(ahead, ir.IntType(8).as_pointer()), *for_reading])
                    weights = at(start, place)
                    for one, total in zip(ones, totals[o * rows :], strict=False):
                        product = builder.fmul(weights, one, flags=["contract"])
                        builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
            name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
            reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [number, vector]), name)
            found = [builder.call(reduce, [ir.Constant(number, 0), builder.load(total)], fastmath=["reassoc"]) for total in totals]
            return context.make_tuple(builder, signature.return_type, found)

        return types.UniTuple(types.float32, outputs * rows)(w_OI, output, x_NI, row), build

    return sums


_blocks, _block, _column = _sums(OUTPUTS, MANY), _sums(OUTPUTS, ROWS), _sums(OUTPUTS, 1)


@loop
def multiply(x_NI, w_OI, y_NO):
    """y = x Wᵀ."""
    (rows, inputs), outputs = x_NI.shape, w_OI.shape[0]
    many = rows - rows % MANY if rows > SEVERAL else 0
    blocks, whole, vectors = rows - (rows - many) % ROWS, outputs - outputs % OUTPUTS, inputs - inputs % WIDTH
    for o in range(0, whole, OUTPUTS):
        for n in range(0, many, MANY):
            totals = _blocks(w_OI, o, x_NI, n)
            for i in range(OUTPUTS):
                for j in range(MANY):
                    y_NO[n + j, o + i] = totals[i * MANY + j]
        for n in range(many, blocks, ROWS):
            total = _block(w_OI, o, x_NI, n)
            for i in range(OUTPUTS):
                for j in range(ROWS):
                    y_NO[n + j, o + i] = total[i * ROWS + j]
        for n in range(blocks, rows):
            total = _column(w_OI, o, x_NI, n)
            for i in range(OUTPUTS):
                y_NO[n, o + i] = total[i]
        if vectors < inputs:
            for n in range(rows):
                for i in range(o, o + OUTPUTS):
                    y_NO[n, i] += _dot(x_NI[n, vectors:], w_OI[i, vectors:])
    for o in range(whole, outputs):
        for n in range(rows):
            y_NO[n, o] = _dot(x_NI[n], w_OI[o])


@loop
def _dot(x_I, w_I):
    total = np.float32(0)
    for i in range(len(x_I)):
        total += x_I[i] * w_I[i]
    return total


@loop
def _adapt(x_NI, y_NO, product, flat_SP, slot_N, adapted_A6):
    """Add what adapters make of the inputs of a product. `adapted`: of each layer with adapters, which product it is a part of, its first
    output there, where its numbers begin (slots.py), rank, inputs and outputs."""
    for n in range(len(slot_N)):
        if slot_N[n] < 0:
            continue
        flat_P = flat_SP[slot_N[n]]
        for a in range(len(adapted_A6)):
            which, first, start, rank, inputs, outputs = adapted_A6[a]
            if which == product:
                t_1R, middle = np.empty((1, rank), np.float32), start + rank * inputs
                multiply(x_NI[n : n + 1], flat_P[start:middle].reshape((rank, inputs)), t_1R)
                _add(t_1R[0], flat_P[middle : middle + rank * outputs].reshape((rank, outputs)), y_NO[n, first : first + outputs])


@loop
def _add(x_I, w_IO, y_O):
    """y += x W, each row of W once."""
    inputs, fours = len(x_I), len(x_I) - len(x_I) % 4
    for i in range(0, fours, 4):
        a, b, c, d = x_I[i], x_I[i + 1], x_I[i + 2], x_I[i + 3]
        for o in range(len(y_O)):
            y_O[o] += a * w_IO[i, o] + b * w_IO[i + 1, o] + c * w_IO[i + 2, o] + d * w_IO[i + 3, o]
    for i in range(fours, inputs):
        for o in range(len(y_O)):
            y_O[o] += x_I[i] * w_IO[i, o]


@loop
def _exp(x):
    """e^x as Cephes computes it, so that a register does many at once. 0 below e^-87, for denormal numbers are slow; e^88 at most."""
    given, x = x, min(max(x, np.float32(-87)), np.float32(88))
    power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    x = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4) * x + np.float32(1.3981999507e-3)
    y = y * x + np.float32(8.3334519073e-3)
    y = y * x + np.float32(4.1665795894e-2)
    y = y * x + np.float32(1.6666665459e-1)
    y = y * x + np.float32(5.0000001201e-1)
    y = (y * x * x + x + np.float32(1)) * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if given < np.float32(-87) else y


@loop
def _normal(h_NW, weight_W, eps):
    """h / sqrt(mean(h^2) + eps) * weight."""
    y_NW, width = np.empty_like(h_NW), h_NW.shape[1]
    for n in range(h_NW.shape[0]):
        total = np.float32(0)
        for i in range(width):
            total += h_NW[n, i] * h_NW[n, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            y_NW[n, i] = h_NW[n, i] * scale * weight_W[i]
    return y_NW


@loop
def _listen(y_NO, cos_ND, sin_ND, keys_RKCD, values_RKCD, row_N, place_N, scale):
    """Turn queries and keys by their positions, keep keys and values, and attend: each token by itself, over the tokens of its own row."""
    groups, width = keys_RKCD.shape[1], keys_RKCD.shape[3]
    heads, half = y_NO.shape[1] // width - 2 * groups, width // 2
    read_NO = np.zeros((y_NO.shape[0], heads * width), np.float32)
    for n in range(y_NO.shape[0]):
        row, last = row_N[n], place_N[n]
        for h in range(heads + groups):
            x = y_NO[n, h * width : (h + 1) * width]
            for i in range(half):
                a, b = x[i], x[i + half]
                x[i] = a * cos_ND[n, i] - b * sin_ND[n, i]
                x[i + half] = b * cos_ND[n, i + half] + a * sin_ND[n, i + half]
        for k in range(groups):
            for i in range(width):
                keys_RKCD[row, k, last, i] = y_NO[n, (heads + k) * width + i]
                values_RKCD[row, k, last, i] = y_NO[n, (heads + groups + k) * width + i]
        share_GT = np.empty((heads // groups, last + 1), np.float32)
        for k in range(groups):
            first = k * len(share_GT)
            multiply(y_NO[n, first * width : (first + len(share_GT)) * width].reshape((-1, width)), keys_RKCD[row, k, : last + 1], share_GT)
            for g in range(len(share_GT)):
                share_T, most, total = share_GT[g], np.float32(-3e38), np.float32(0)
                for t in range(last + 1):
                    most = max(most, share_T[t])
                for t in range(last + 1):
                    share_T[t] = _exp((share_T[t] - most) * scale)
                    total += share_T[t]
                for t in range(last + 1):
                    share_T[t] /= total
                _add(share_T, values_RKCD[row, k, : last + 1], read_NO[n, (first + g) * width : (first + g + 1) * width])
    return read_NO


@loop
def _gate(both_NO):
    """silu(gate) * up."""
    width = both_NO.shape[1] // 2
    gate_NO = np.empty((both_NO.shape[0], width), np.float32)
    for n in range(both_NO.shape[0]):
        for i in range(width):
            gate = both_NO[n, i]
            gate_NO[n, i] = gate / (np.float32(1) + _exp(-gate)) * both_NO[n, width + i]
    return gate_NO


@loop
def _product(x_NI, product, weights, biases, adapters):
    w_OI, bias_O = weights[product], biases[product]
    y_NO = np.empty((x_NI.shape[0], w_OI.shape[0]), np.float32)
    multiply(x_NI, w_OI, y_NO)
    for n in range(x_NI.shape[0] if len(bias_O) else 0):
        y_NO[n] += bias_O
    _adapt(x_NI, y_NO, product, adapters[0], adapters[1], adapters[2])
    return y_NO


@loop
def read_layer(h_NW, norms, eps, weights, biases, adapters, turns, kept, spots, scale):
    """Let the rows pass a layer, in place.

    `norms`: weights of the two; `weights`, `biases`: of q, k and v, o, gate and up, and down, a bias empty where there is none; `adapters`:
    all slots, the slot of each row, and `adapted` of `_adapt`; `turns`: cosines and sines of the positions; `kept`: keys and values;
    `spots`: the rows there and how many tokens each has read.
    """
    x_NI = _normal(h_NW, norms[0], eps)
    for product in range(4):  # in a loop, so that it is compiled once
        y_NO = _product(x_NI, product, weights, biases, adapters)
        if product == 0:
            x_NI = _listen(y_NO, turns[0], turns[1], kept[0], kept[1], spots[0], spots[1], scale)
        elif product == 1:
            h_NW += y_NO
            x_NI = _normal(h_NW, norms[1], eps)
        elif product == 2:
            x_NI = _gate(y_NO)
        else:
            h_NW += y_NO
