# SPDX-License-Identifier: MIT
"""Proof of coordref.py: laws first, then literals, then agreement with other libraries.

Every shape has distinct sizes, so that swapped axes show; every upstream gradient is random, so
that permuted filters show; every random input is signed. Where a GPU answers, the tests that take
xp run on CuPy arrays too.
"""

import ast
import doctest
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.signal

import coordref
from coordref import Layer, affine, conv

HERE = Path(coordref.__file__).parent
CUPY = coordref.best_module()
CUPY = CUPY if CUPY is not np else None


@pytest.fixture(params=["numpy", "cupy"])
def xp(request):
    if request.param == "numpy":
        return np
    if CUPY is None:
        pytest.skip("no GPU answers through CuPy")
    return CUPY


def normal(seed, *shape, dtype=np.float64, xp=np):
    return xp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def close(actual, wanted, terms=1, scale=None):
    """actual equals wanted to the rounding of sums of that many terms; NaN never passes."""
    scalar = isinstance(actual, (float, np.generic))
    actual = np.asarray(actual) if scalar else coordref.to_numpy(actual)
    wanted = np.asarray(wanted)
    eps = np.finfo(actual.dtype).eps
    if scale is None:
        scale = abs(wanted).max(initial=1)
    np.testing.assert_allclose(actual, wanted.astype(actual.dtype), rtol=0, strict=True,
                               atol=8 * eps * math.sqrt(terms) * float(scale))


def dot(a, b):
    return float((coordref.to_numpy(a).astype(float) * coordref.to_numpy(b).astype(float)).sum())


# ORACLES: the definitions as loops ---------------------------------------------------------------

def conv_by_definition(x, w, b, stride, pads, dilation, groups):
    """y[n, f, o] = b[f] + sum_{c, k} x[n, c, o*stride + k*dilation - before] * w[f, c, k]."""
    N, C, *size = x.shape
    F, per_group, *kernel = w.shape
    out = [(n + p + q - (k - 1) * d - 1) // s + 1
           for n, (p, q), k, d, s in zip(size, pads, kernel, dilation, stride)]
    y = np.zeros((N, F, *out), x.dtype)
    for n, f in np.ndindex(N, F):
        first = f // (F // groups) * per_group
        for o in np.ndindex(*out):
            total = 0.0 if b is None else b[f]
            for c in range(per_group):
                for k in np.ndindex(*kernel):
                    i = [o[a] * stride[a] + k[a] * dilation[a] - pads[a][0]
                         for a in range(len(size))]
                    if all(0 <= i[a] < size[a] for a in range(len(size))):
                        total += x[(n, first + c, *i)] * w[(f, c, *k)]
            y[(n, f, *o)] = total
    return y


def random_conv(seed):
    """The arguments of a random convolution of rank 1 to 3."""
    rng = np.random.default_rng(seed)
    rank, G = rng.integers(1, 4), int(rng.integers(1, 3))
    one_to = lambda high: tuple(int(i) for i in rng.integers(1, high + 1, rank))  # noqa: E731
    kernel = (1,) * rank if rng.random() < 0.2 else one_to(3)
    stride = (1,) * rank if rng.random() < 0.4 else one_to(3)
    dilation = one_to(2)
    pads = tuple((int(p), int(q)) for p, q in rng.integers(0, 4, (rank, 2)))
    size = [max(1, (k - 1) * d + 1 - p - q) + int(rng.integers(0, 5))
            for k, d, (p, q) in zip(kernel, dilation, pads)]
    N, C, F = int(rng.integers(0, 4)), G * int(rng.integers(1, 4)), G * int(rng.integers(1, 4))
    x, w = rng.standard_normal((N, C, *size)), rng.standard_normal((F, C // G, *kernel))
    if rng.random() < 0.3:
        x = np.asfortranarray(x)
    if rng.random() < 0.3:
        x, w = x[..., ::-1], w[:, :, ::-1]
    return x, w, rng.standard_normal(F), stride, pads, dilation, G


# LAWS --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block, short", [(1, 16), (320, 1), (2 ** 23, 1), (2 ** 23, 16)])
@pytest.mark.parametrize("seed", range(40))
def test_convolution_is_its_definition_and_its_gradients_are_its_transposes(seed, block, short,
                                                                            monkeypatch):
    """<conv(x, w), g> = <x, dx> = <w, dw>: convolution is linear in x and in w."""
    monkeypatch.setattr(coordref, "_BLOCK", block)          # points, images, and between
    monkeypatch.setattr(coordref, "_SHORT", short)          # rows of pixels, or all in one
    x, w, b, stride, pads, dilation, groups = random_conv(seed)
    options = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}
    before = [a.copy() for a in (x, w, b)]
    y = conv(x, w, b, **options)
    close(y, conv_by_definition(x, w, b, stride, pads, dilation, groups), terms=w[0].size)
    g = normal(seed + 1, *y.shape)
    dx, dw, db = coordref.conv_backward(g, x, w, b, **options)
    assert (dx.shape, dw.shape, db.shape) == (x.shape, w.shape, b.shape)
    linear = dot(conv(x, w, **options), g)
    tolerance = 1e-12 * (1 + np.sqrt(dot(y, y) * dot(g, g)))
    assert abs(dot(x, dx) - linear) <= tolerance
    assert abs(dot(w, dw) - linear) <= tolerance
    close(db, g.sum(axis=(0, *range(2, g.ndim))), terms=g.size)
    for a, kept in zip((x, w, b), before):
        assert np.array_equal(a, kept)


@pytest.mark.parametrize("seed", range(40))
def test_transposed_convolution_is_the_gradient_of_convolution_by_its_input(seed):
    x, w, b, stride, pads, dilation, groups = random_conv(seed)
    options = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}
    y = conv(x, w, **options)
    # output_padding brings back the rows that the stride skipped
    skipped = tuple((n + p + q - (k - 1) * d - 1) % s for n, (p, q), k, d, s in
                    zip(x.shape[2:], pads, w.shape[2:], dilation, stride))
    g = normal(seed, *y.shape)
    dx, _, _ = coordref.conv_backward(g, x, w, **options)
    close(coordref.conv_transpose(g, w, output_padding=skipped, **options), dx, terms=w.size)
    bias = normal(seed + 1, x.shape[1])
    z = coordref.conv_transpose(g, w, bias, output_padding=skipped, **options)
    close(z, dx + bias.reshape(-1, *(1,) * len(stride)), terms=w.size)
    u = normal(seed + 2, *z.shape)
    dg, dw, db = coordref.conv_transpose_backward(u, g, w, bias, output_padding=skipped, **options)
    tolerance = 1e-12 * (1 + np.sqrt(dot(dx, dx) * dot(u, u)))
    assert abs(dot(g, dg) - dot(dx, u)) <= tolerance
    assert abs(dot(w, dw) - dot(dx, u)) <= tolerance
    close(db, u.sum(axis=(0, *range(2, u.ndim))), terms=u.size)


@pytest.mark.parametrize("seed", range(60))
def test_coord_conv_is_conv_after_add_coords(seed):
    rng = np.random.default_rng(seed)
    x, w, b, stride, pads, dilation, _ = random_conv(seed)
    if seed % 3 == 0:
        pads = ((0, 0),) * len(pads)
        w = w[(..., *(slice(0, 1),) * len(pads))]
    rank, size, C = len(stride), x.shape[2:], x.shape[1]
    radius, scale = bool(rng.integers(2)), ["unit", "pixel"][rng.integers(2)]
    coords = {"radius": radius, "scale": scale}
    options = {"stride": stride, "padding": pads, "dilation": dilation}
    w = rng.standard_normal((len(b), C + rank + radius, *w.shape[2:]))
    tiled = {}
    if seed % 2:
        x, tiled = rng.standard_normal((x.shape[0], C, *(1,) * rank)), {"size": size}
    full = np.broadcast_to(x, x.shape[:2] + size)
    joined = coordref.add_coords(full, **coords)
    y = coordref.coord_conv(x, w, b, **tiled, **coords, **options)
    close(y, conv(joined, w, b, **options), terms=w[0].size)
    g = rng.standard_normal(y.shape)
    got = coordref.coord_conv_backward(g, x, w, b, **tiled, **coords, **options)
    djoined, dw, db = coordref.conv_backward(g, joined, w, b, **options)
    dx = coordref.add_coords_backward(djoined, full, **coords)
    if tiled:
        dx = dx.sum(axis=tuple(range(2, x.ndim)), keepdims=True)
    for a, wanted in zip(got, (dx, dw, db)):
        close(a, wanted, terms=max(g.size, 1), scale=10 * abs(wanted).max(initial=1))


def test_shift_equivariance_and_its_loss_with_coordinates():
    x, w, v = normal(0, 2, 3, 9, 11), normal(1, 4, 3, 3, 2), normal(2, 4, 5, 3, 2)
    moved = np.roll(x, (1, 2), axis=(2, 3))
    inside = (..., slice(2, None), slice(3, None))
    close(conv(moved, w)[inside], np.roll(conv(x, w), (1, 2), axis=(2, 3))[inside], terms=18)
    y, z = coordref.coord_conv(x, v), coordref.coord_conv(moved, v)
    assert abs(z[inside] - np.roll(y, (1, 2), axis=(2, 3))[inside]).max() > 0.1


# Each differentiable function with arrays and options that reach all of its branches.
PAIRS = [
    ("add_coords", [(2, 3, 4, 5)], {"radius": True}),
    ("conv", [(2, 4, 6, 5), (6, 2, 3, 2), (6,)], {"stride": (2, 1), "padding": 1, "groups": 2}),
    ("conv", [(2, 3, 7), (4, 3, 1)], {}),
    ("conv_transpose", [(2, 4, 3, 5), (4, 3, 3, 2), (6,)],
     {"stride": 2, "padding": ((1, 0), (0, 1)), "output_padding": (1, 0), "groups": 2}),
    ("coord_conv", [(2, 3, 6, 5), (4, 6, 3, 2), (4,)], {"radius": True, "padding": "same"}),
    ("coord_conv", [(3, 2, 1, 1), (4, 4, 1, 1), (4,)], {"size": (4, 5)}),
    ("coord_conv", [(3, 2, 1, 1), (4, 4, 3, 2), (4,)], {"size": (4, 5), "padding": 1}),
    ("relu", [(3, 4, 5)], {}),
    ("max_pool", [(2, 3, 7, 8)], {"kernel": (3, 2), "stride": 2, "padding": (1, 0)}),
    ("max_pool", [(2, 3, 4, 5)], {}),
    ("mean_pool", [(2, 3, 7, 8)], {"kernel": (3, 2), "stride": 2, "padding": 1}),
    ("mean_pool", [(2, 3, 4, 5)], {}),
    ("sum_pool", [(2, 3, 4, 5)], {}),
    ("affine", [(2, 3, 4, 5), (3,), (3,)], {}),
    ("batch_norm", [(4, 3, 2, 5), (3,), (3,)], {}),
    ("batch_norm", [(4, 3, 2), (3,), (3,)], {"mean": np.array([0.1, -0.2, 0.3]),
                                             "var": np.array([0.5, 1.5, 2.0])}),
    ("softmax", [(3, 2, 4)], {}),
    ("softmax_cross_entropy", [(3, 2, 4), (3, 2, 4)], {}),
    ("sigmoid_cross_entropy", [(3, 2, 4), (3, 2, 4)], {}),
    ("mean_squared_error", [(3, 2, 4), (3, 2, 4)], {}),
]


def check_pair(name, shapes, options, backward_of=None, xp=np):
    """<u, f(a + h*v) - f(a - h*v)> / 2h = sum over the arrays of <da, v>, random u and v."""
    f = getattr(coordref, name)
    f_backward = backward_of or getattr(coordref, name + "_backward")
    options = {k: xp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    arrays = [normal(i, *s, xp=xp) for i, s in enumerate(shapes)]
    directions = [normal(i + 50, *s, xp=xp) for i, s in enumerate(shapes)]
    kept = [a.copy() for a in arrays]
    y = f(*arrays, **options)
    u = normal(99, *y.shape, xp=xp) if y.shape else 1.7
    found = f_backward(u, *arrays, **options)
    found = found if isinstance(found, tuple) else (found,)
    assert all(g is None for g in found[len(arrays):])      # a bias that was not given
    h = 1e-6
    up = f(*(a + h * v for a, v in zip(arrays, directions)), **options)
    down = f(*(a - h * v for a, v in zip(arrays, directions)), **options)
    numeric = float(((up - down) * u).sum()) / (2 * h)
    exact = sum(dot(da, v) for da, v in zip(found, directions))
    assert abs(numeric - exact) <= 1e-6 * (1 + abs(exact)), (name, numeric, exact)
    for a, b, da in zip(arrays, kept, found):
        assert da.shape == a.shape and da.dtype == a.dtype and bool((a == b).all())


@pytest.mark.parametrize("name, shapes, options", PAIRS)
def test_every_backward_is_the_derivative_of_its_forward(name, shapes, options, xp):
    check_pair(name, shapes, options, xp=xp)


def test_every_pair_is_checked_and_keeps_the_signature_law():
    backwards = {n for n in coordref.__all__ if n.endswith("_backward")}
    assert backwards == {name + "_backward" for name, _, _ in PAIRS}
    for name in backwards:
        forward_args = list(inspect.signature(getattr(coordref, name[:-9])).parameters.values())
        args = list(inspect.signature(getattr(coordref, name)).parameters.values())
        args = [p for p in args if p.name != "need_dx"]
        assert args[0].name == "dy" and args[1:] == forward_args


def planted(name, change):
    good = getattr(coordref, name + "_backward")

    def bad(*args, **options):
        return tuple(change(list(good(*args, **options))))
    return bad


@pytest.mark.parametrize("change", [
    lambda g: [g[0], g[1][..., ::-1, ::-1], g[2]],                      # a flipped kernel
    lambda g: [g[0], g[1][::-1], g[2]],                                 # permuted filters
    lambda g: [g[0][:, ::-1], *g[1:]],                                  # permuted channels
    lambda g: [g[0], g[1], g[2] * 1.001],                               # a bias off by a bit
    lambda g: [g[0] * np.nan, *g[1:]],                                  # a NaN
])
def test_the_pair_check_rejects_planted_errors(change):
    case = ("conv", [(2, 4, 6, 5), (6, 2, 3, 2), (6,)], {"padding": 1, "groups": 2})
    with pytest.raises(AssertionError):
        check_pair(*case, backward_of=planted("conv", change))


@pytest.mark.parametrize("change", [
    lambda x, w: (x, w[..., ::-1]), lambda x, w: (x, w[::-1]),
    lambda x, w: (x.swapaxes(2, 3), w), lambda x, w: (x + np.nan, w)])
def test_the_oracle_rejects_planted_errors(change):
    x, w = normal(0, 2, 3, 5, 6), normal(1, 4, 3, 3, 2)
    wanted = conv_by_definition(x, w, None, (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    close(conv(x, w), wanted, terms=18)
    with pytest.raises(AssertionError):
        close(conv(*change(x, w)), wanted, terms=18)


# COORDINATES -------------------------------------------------------------------------------------

def test_coordinates_that_a_person_can_check(xp):
    x = xp.asarray(np.full((1, 1, 2, 3), 7, np.float32))
    y = coordref.to_numpy(coordref.add_coords(x, radius=True))
    assert y.dtype == np.float32
    assert y[0, :3].tolist() == [[[7, 7, 7], [7, 7, 7]], [[-1, -1, -1], [1, 1, 1]],
                                 [[-1, 0, 1], [-1, 0, 1]]]
    close(y[0, 3], np.sqrt([[2, 1, 2], [2, 1, 2]]))
    pixel = coordref.coord_channels((2, 3), scale="pixel", xp=xp)
    assert coordref.to_numpy(pixel).tolist() == [[[0, 0, 0], [1, 1, 1]], [[0, 1, 2], [0, 1, 2]]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 49, 64, 65, 1000])
def test_an_axis_is_antisymmetric_to_the_last_bit(n, dtype):
    c = coordref.axis_coords(n, dtype=dtype)
    assert c.dtype == dtype and c.shape == (n,)
    assert np.array_equal(c, -c[::-1])
    assert (c[0], c[-1]) == ((-1, 1) if n > 1 else (0, 0))
    if n > 1:
        close(c, np.linspace(-1, 1, n))


@pytest.mark.parametrize("size", [(5,), (1,), (3, 7), (1, 4), (4, 1), (3, 5, 7), (2, 3, 1, 5)])
def test_channels_follow_the_axes_and_the_radius_is_their_norm(size):
    for scale in ("unit", "pixel"):
        y = coordref.coord_channels(size, radius=True, scale=scale, dtype=np.float64)
        assert y.shape == (len(size) + 1, *size)
        for a, n in enumerate(size):
            line = coordref.axis_coords(n, scale=scale, dtype=np.float64)
            for i in np.ndindex(*size):
                assert y[(a, *i)] == line[i[a]]
        close(y[-1], np.sqrt((y[:-1] ** 2).sum(axis=0)))
    centre = coordref.coord_channels((3, 5), radius=True)[:, 1, 2]
    assert centre.tolist() == [0, 0, 0]


# LITERALS OF CONVOLUTION -------------------------------------------------------------------------

def test_a_delta_kernel_shifts_the_image(xp):
    x = normal(0, 2, 1, 4, 5, xp=xp)
    w = xp.zeros((1, 1, 3, 3))
    w[0, 0, 0, 2] = 1                                       # reads one up, one right
    y = coordref.to_numpy(conv(x, w, padding=1))
    x = coordref.to_numpy(x)
    assert np.array_equal(y[:, :, 1:, :-1], x[:, :, :-1, 1:])
    assert not y[:, :, 0].any() and not y[:, :, :, -1].any()


# The node tests of the ONNX standard, Conv and ConvTranspose (github.com/onnx/onnx, Apache-2.0).
ARANGE = {n: np.arange(float(n)) for n in (3, 9, 25, 35)}
ONES = np.ones((1, 1, 3, 3))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size, options, wanted", [
    ((5, 5), {"padding": 1},
     [[12, 21, 27, 33, 24], [33, 54, 63, 72, 51], [63, 99, 108, 117, 81],
      [93, 144, 153, 162, 111], [72, 111, 117, 123, 84]]),
    ((5, 5), {"padding": "valid"}, [[54, 63, 72], [99, 108, 117], [144, 153, 162]]),
    ((5, 5), {"stride": 2, "padding": "same"}, [[12, 27, 24], [63, 108, 81], [72, 117, 84]]),
    ((7, 5), {"stride": 2, "padding": 1},
     [[12, 27, 24], [63, 108, 81], [123, 198, 141], [112, 177, 124]]),
    ((7, 5), {"stride": 2, "padding": ((1, 1), (0, 0))},
     [[21, 33], [99, 117], [189, 207], [171, 183]]),
])
def test_the_vectors_of_onnx_conv(size, options, wanted, dtype, xp):
    x = xp.asarray(np.arange(math.prod(size)).reshape(1, 1, *size).astype(dtype))
    y = conv(x, xp.asarray(ONES.astype(dtype)), **options)
    assert y.dtype == dtype and coordref.to_numpy(y)[0, 0].tolist() == wanted


@pytest.mark.parametrize("options, wanted", [
    ({}, [[0, 1, 3, 3, 2], [3, 8, 15, 12, 7], [9, 21, 36, 27, 15], [9, 20, 33, 24, 13],
          [6, 13, 21, 15, 8]]),
    ({"stride": (3, 2), "output_padding": (1, 1)},
     [[0, 0, 1, 1, 3, 2, 2, 0], [0, 0, 1, 1, 3, 2, 2, 0], [0, 0, 1, 1, 3, 2, 2, 0],
      [3, 3, 7, 4, 9, 5, 5, 0], [3, 3, 7, 4, 9, 5, 5, 0], [3, 3, 7, 4, 9, 5, 5, 0],
      [6, 6, 13, 7, 15, 8, 8, 0], [6, 6, 13, 7, 15, 8, 8, 0], [6, 6, 13, 7, 15, 8, 8, 0],
      [0, 0, 0, 0, 0, 0, 0, 0]]),
    ({"stride": (3, 2), "padding": (1, 2)},
     [[1, 1, 3], [1, 1, 3], [7, 4, 9], [7, 4, 9], [7, 4, 9], [13, 7, 15], [13, 7, 15]]),
    ({"stride": 2, "padding": "same"},
     [[0, 0, 1, 1, 3, 2], [0, 0, 1, 1, 3, 2], [3, 3, 8, 5, 12, 7], [3, 3, 7, 4, 9, 5],
      [9, 9, 20, 11, 24, 13], [6, 6, 13, 7, 15, 8]]),
])
def test_the_vectors_of_onnx_conv_transpose(options, wanted, xp):
    x = xp.asarray(np.arange(9.).reshape(1, 1, 3, 3))
    y = coordref.to_numpy(coordref.conv_transpose(x, xp.ones((1, 2, 3, 3)), **options))
    assert y[0, 0].tolist() == wanted and y[0, 1].tolist() == wanted


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size, dilation", [(1, 1), (4, 1), (5, 2), (6, 2), (7, 1)])
def test_same_divides_the_size_and_puts_the_odd_pixel_after(size, kernel, stride, dilation):
    x, w = normal(0, 1, 1, size), normal(1, 1, 1, kernel)
    y = conv(x, w, stride=stride, dilation=dilation, padding="same")
    out = math.ceil(size / stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    pads = ((total // 2, total - total // 2),)
    assert y.shape == (1, 1, out)
    assert np.array_equal(y, conv(x, w, stride=stride, dilation=dilation, padding=pads))
    z = coordref.conv_transpose(x, w, stride=stride, dilation=dilation, padding="same")
    assert z.shape == (1, 1, size * stride)
    g = normal(2, *z.shape)
    back = conv(g, w, stride=stride, dilation=dilation, padding="same")
    close(dot(back, x), dot(z, g), terms=99)


@pytest.mark.parametrize("dtype, bits", [(np.float16, 11), (np.float32, 24), (np.float64, 53)])
def test_integers_are_exact_and_the_dtype_stays(dtype, bits):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, 3, 6, 7)).astype(dtype)
    w, b = rng.integers(-3, 4, (4, 3, 3, 2)).astype(dtype), np.arange(4).astype(dtype)
    assert 9 * 18 < 2 ** bits
    wanted = conv_by_definition(x.astype(float), w.astype(float), b, (2, 1), ((1, 1), (0, 0)),
                                (1, 1), 1)
    y = conv(x, w, b, stride=(2, 1), padding=(1, 0))
    assert y.dtype == dtype and np.array_equal(y, wanted)
    for g in coordref.conv_backward(y, x, w, b, stride=(2, 1), padding=(1, 0)):
        assert g.dtype == dtype


def test_half_precision_is_accumulated_in_single():
    x, w = np.full((1, 4096, 1), 1, np.float16), np.full((1, 4096, 1), 1, np.float16)
    assert conv(x, w).item() == 4096                # adding ones in float16 stops at 2048
    x[0, 0], w[0, 0] = 60000, 1                     # and 60000 + 4095 * 1 fits, 60000 * 2 does not
    assert conv(x, w).item() == np.float16(64095)


def test_empty_axes_and_special_values_follow_arithmetic():
    w, b = normal(0, 4, 3, 2, 3), normal(1, 4)
    assert conv(np.zeros((0, 3, 5, 6)), w, b).shape == (0, 4, 4, 4)
    dx, dw, db = coordref.conv_backward(np.zeros((0, 4, 4, 4)), np.zeros((0, 3, 5, 6)), w, b)
    assert dx.shape == (0, 3, 5, 6) and not dw.any() and not db.any()
    assert np.array_equal(conv(np.zeros((2, 0, 5)), np.zeros((4, 0, 3)), b)[1, :, 0], b)
    assert np.array_equal(conv(np.zeros((1, 3, 0, 4)), w, b, padding=1)[0, :, 0, 0], b)
    x = normal(2, 1, 3, 6, 7)
    x[0, 1, 3, 3] = np.nan
    y = conv(x, w)
    assert np.isnan(y).sum() == 4 * 2 * 3 and np.isnan(y[:, :, 2:4, 1:4]).all()
    x[0, 1, 3, 3] = np.inf
    assert (np.isinf(conv(x, w))).sum() == 4 * 2 * 3


@pytest.mark.parametrize("bad", [[3], [0, 1, 2, 3], range(8)])
def test_an_error_in_a_thread_reaches_the_caller_and_frees_the_team(bad, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    def task(item):
        time.sleep(0.002)               # so that each thread gets some of the items
        if item in bad:
            raise ArithmeticError(item)
        return -item
    with pytest.raises(ArithmeticError):
        coordref._spread(np, task, range(8))
    assert not coordref._one_team.locked()
    bad = []
    assert coordref._spread(np, task, range(8)) == [0, -1, -2, -3, -4, -5, -6, -7]


def test_the_number_of_threads_does_not_change_a_bit(monkeypatch):
    monkeypatch.setattr(coordref, "_BLOCK", 3000)
    x, w, b = (normal(i, *s, dtype=np.float32) for i, s in
               enumerate([(5, 8, 20, 21), (6, 8, 3, 3), (6,)]))
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        y = conv(x, w, b, padding=1)
        results.append((y, *coordref.conv_backward(y, x, w, b, padding=1)))
    for other in results[1:]:
        assert all(np.array_equal(a, c) for a, c in zip(results[0], other))


# OTHER LIBRARIES ---------------------------------------------------------------------------------

@pytest.mark.parametrize("rank", [1, 2, 3])
def test_agreement_with_scipy(rank):
    x, w = normal(0, 2, 3, *(7, 6, 5)[:rank]), normal(1, 4, 3, *(2, 3, 4)[:rank])
    wanted = np.array([[sum(scipy.signal.correlate(x[n, c], w[f, c], mode="valid")
                            for c in range(3)) for f in range(4)] for n in range(2)])
    close(conv(x, w), wanted, terms=w[0].size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(20))
def test_agreement_with_torch(seed, dtype):
    torch = pytest.importorskip("torch")
    x, w, b, stride, pads, dilation, groups = random_conv(seed)
    x, w, b = (np.array(a, dtype, order="C") for a in (x, w, b))
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, w, b)]
    functional, rank = torch.nn.functional, len(stride)
    wide = functional.pad(tensors[0], [p for pair in reversed(pads) for p in pair])
    wanted = getattr(functional, f"conv{rank}d")(wide, *tensors[1:], stride=stride,
                                                 dilation=dilation, groups=groups)
    options = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}
    y = conv(x, w, b, **options)
    close(y, wanted.detach().numpy(), terms=w[0].size)
    g = normal(seed, *y.shape, dtype=dtype)
    wanted.backward(torch.tensor(g))
    for got, tensor in zip(coordref.conv_backward(g, x, w, b, **options), tensors):
        close(got, tensor.grad.numpy(), terms=max(g.size, 1))


@pytest.mark.parametrize("kernel, stride, padding", [(2, None, 0), (3, 2, 1), ((3, 2), (1, 2), 0)])
def test_pools_agree_with_torch(kernel, stride, padding):
    torch = pytest.importorskip("torch")
    x = normal(0, 2, 3, 7, 8)
    for ours, theirs in ((coordref.max_pool, "max_pool2d"), (coordref.mean_pool, "avg_pool2d")):
        wanted = getattr(torch.nn.functional, theirs)(torch.tensor(x), kernel, stride, padding)
        close(ours(x, kernel=kernel, stride=stride, padding=padding), wanted.numpy(), terms=9)


def test_batch_norm_and_losses_agree_with_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, s, b = normal(0, 4, 3, 2, 5), normal(1, 3), normal(2, 3)
    wanted = functional.batch_norm(torch.tensor(x), None, None, torch.tensor(s), torch.tensor(b),
                                   training=True, eps=1e-5)
    close(coordref.batch_norm(x, s, b), wanted.numpy(), terms=40)
    z, t = 5 * normal(3, 6, 7), np.random.default_rng(4).random((6, 7))
    for ours, theirs in (
            (coordref.sigmoid_cross_entropy(z, t),
             functional.binary_cross_entropy_with_logits(torch.tensor(z), torch.tensor(t))),
            (coordref.mean_squared_error(z, t),
             functional.mse_loss(torch.tensor(z), torch.tensor(t))),
            (coordref.softmax_cross_entropy(z, np.arange(6)),
             functional.cross_entropy(torch.tensor(z), torch.arange(6)))):
        close(np.asarray(ours), theirs.numpy(), terms=42)


# THE OTHER PIECES --------------------------------------------------------------------------------

def test_pieces_that_a_person_can_check(xp):
    x = xp.asarray(np.array([[[-1., 2., 5., 5.]]]))
    get = lambda a: coordref.to_numpy(a).tolist()  # noqa: E731
    assert get(coordref.relu(x)) == [[[0, 2, 5, 5]]]
    assert get(coordref.max_pool(x, kernel=2)) == [[[2, 5]]]
    assert get(coordref.max_pool(x, kernel=3, stride=2, padding=1)) == [[[2, 5]]]
    assert get(coordref.mean_pool(x, kernel=2)) == [[[0.5, 5]]]
    assert get(coordref.mean_pool(x, kernel=3, stride=1, padding=1))[0][0][0] == 1 / 3
    assert get(coordref.max_pool(x)) == [[5]] and get(coordref.mean_pool(x)) == [[2.75]]
    assert get(coordref.sum_pool(x)) == [[11]]
    one = xp.ones((1, 1))
    assert get(coordref.max_pool_backward(one, x)) == [[[0, 0, 1, 0]]]      # the first of equals
    assert get(coordref.max_pool_backward(xp.ones((1, 1, 1)), x, kernel=4)) == [[[0, 0, 1, 0]]]
    assert get(coordref.affine(x, xp.full(1, -1.), xp.full(1, 4.))) == [[[5, 2, -1, -1]]]
    y = coordref.to_numpy(coordref.softmax(xp.asarray(np.array([[0., math.log(3)]]))))
    close(y, np.array([[0.25, 0.75]]))


def test_nothing_overflows_and_nothing_is_hidden():
    z = np.array([[1e4, -1e4, 0.]])
    assert np.isfinite(coordref.softmax(z)).all()
    assert coordref.softmax_cross_entropy(z, np.array([1])) == 2e4
    assert coordref.sigmoid_cross_entropy(z, np.array([[0., 1., 1.]])) > 6e3
    assert np.isfinite(coordref.sigmoid_cross_entropy_backward(1., z, z)[0]).all()
    assert np.isnan(coordref.relu(np.array([np.nan, 1.]))).tolist() == [True, False]
    assert coordref.relu_backward(np.array([np.inf, 2.]), np.array([-1., 1.])).tolist() == [0, 2]
    assert np.isnan(coordref.max_pool(np.array([[[np.nan, 1.]]]), kernel=2)).all()
    half = np.full((1, 1, 5000), 20, np.float16)
    assert coordref.mean_pool(half) == 20               # the sum, 100000, is beyond float16


def test_labels_and_one_hot_targets_mean_the_same():
    z, labels = normal(0, 4, 1, 3, 5), np.array([0, 14, 7, 3])
    hot = np.eye(15)[labels].reshape(z.shape)
    assert coordref.softmax_cross_entropy(z, labels) == coordref.softmax_cross_entropy(z, hot)
    dz, none = coordref.softmax_cross_entropy_backward(1.0, z, labels)
    assert none is None
    assert np.array_equal(dz, coordref.softmax_cross_entropy_backward(1.0, z, hot)[0])


# NETWORKS AND MODELS -----------------------------------------------------------------------------

def count(net):
    return sum(p.size for layer in net for p in layer.params)


@pytest.mark.parametrize("make, wanted", [
    (lambda: coordref.coordconv_painter(), 7553),
    (lambda: coordref.coordconv_painter(start="relative"), 7553),
    (lambda: coordref.coordconv_painter(width=2), 29441),
    (lambda: coordref.deconv_painter(kernel=2), 46465),
    (lambda: coordref.deconv_painter(), 103585),
    (lambda: coordref.deconv_painter(kernel=4), 183553),
    (lambda: coordref.deconv_painter(kernel=2, width=2), 183041),
    (lambda: coordref.deconv_painter(kernel=3, width=2), 409921),
    (lambda: coordref.deconv_painter(kernel=4, width=3), 1632001),
    (lambda: coordref.coordconv_renderer(), 11850),
    (lambda: coordref.coordconv_renderer(width=2), 24210),
    (lambda: coordref.coordconv_renderer(kernel=1), 8074),
    (lambda: coordref.coordconv_regressor(), 906),
    (lambda: coordref.conv_regressor("uniform"), 72850),
    (lambda: coordref.conv_regressor("uniform", width=2), 159330 + 2 * 64 * 16 * 64 + 64 + 128),
    (lambda: coordref.conv_regressor("quadrant"), 12914),
    (lambda: coordref.encoder_network((64, 64)), 25),
])
def test_parameter_counts_of_the_paper(make, wanted):
    assert count(make()) == wanted


@pytest.mark.parametrize("make, x, out", [
    (coordref.coordconv_painter, (2, 2, 1, 1), (2, 1, 64, 64)),
    (lambda **o: coordref.coordconv_painter(size=(5, 6, 7), **o), (2, 3, 1, 1, 1),
     (2, 1, 5, 6, 7)),
    (coordref.deconv_painter, (2, 2, 1, 1), (2, 1, 64, 64)),
    (coordref.coordconv_renderer, (2, 2, 1, 1), (2, 1, 64, 64)),
    (coordref.coordconv_regressor, (2, 1, 64, 64), (2, 2)),
    (lambda **o: coordref.conv_regressor("uniform", **o), (2, 1, 64, 64), (2, 2)),
    (lambda **o: coordref.conv_regressor("quadrant", **o), (2, 1, 64, 64), (2, 2)),
])
def test_models_map_shapes_and_their_gradients_are_derivatives(make, x, out, xp):
    # biases of zero would put dead pixels on the kink of the rectifier, where no slope is right
    net = [layer._replace(params=[p + 0.1 * normal(i, *p.shape, xp=xp) if p.ndim == 1 else p
                                  for p in layer.params])
           for i, layer in enumerate(make(rng=0, dtype=np.float64, xp=xp))]
    x = normal(1, *x, xp=xp)
    y, inputs = coordref.forward(net, x)
    assert y.shape == out and len(inputs) == len(net) and inputs[0] is x
    u = normal(2, *out, xp=xp)
    dx, grads = coordref.backward(net, u, inputs)
    assert dx.shape == x.shape
    h, moved, lost, exact = 1e-7, [], [], 0.0
    for i, layer in enumerate(net):
        v = [normal(j + 10 * i, *p.shape, xp=xp) for j, p in enumerate(layer.params)]
        moved.append(layer._replace(params=[p + h * d for p, d in zip(layer.params, v)]))
        lost.append(layer._replace(params=[p - h * d for p, d in zip(layer.params, v)]))
        exact += sum(dot(g, d) for g, d in zip(grads[i], v))
    numeric = dot(coordref.forward(moved, x)[0] - coordref.forward(lost, x)[0], u) / (2 * h)
    assert abs(numeric - exact) <= 1e-5 * (1 + abs(exact))
    without, same = coordref.backward(net, u, inputs, need_dx=False)
    assert without is None or net[0].op not in (coordref.coord_conv, conv)
    for a, b in zip(itertools.chain(*grads), itertools.chain(*same)):
        assert bool((a == b).all())


def test_he_normal_has_the_variance_and_the_cut():
    w = coordref.he_normal((400, 50, 3), rng=0, dtype=np.float64)
    std = math.sqrt(2 / 150)
    assert abs(w.std() / std - 1) < 0.01 and abs(w.mean()) < 0.01 * std
    assert abs(w).max() <= 2 * std / 0.8796
    assert np.array_equal(w, coordref.he_normal((400, 50, 3), rng=0, dtype=np.float64))


def test_the_relative_start_sees_only_differences():
    net = coordref.coordconv_painter(start="relative", rng=3, size=(9, 9), dtype=np.float64)
    unit = coordref.axis_coords(9, dtype=np.float64)
    maps = [coordref.forward(net, np.array([unit[r], unit[c]]).reshape(1, 2, 1, 1))[0][0, 0]
            for r, c in ((3, 4), (5, 3))]
    close(maps[0][1:7, 2:9], maps[1][3:9, 1:8], terms=64)   # the same picture, moved


# DATA AND TRAINING -------------------------------------------------------------------------------

def test_the_data_set_of_the_paper():
    data = coordref.not_so_clevr()
    assert (len(data.coords), len(data.train), len(data.test)) == (3136, 2368, 768)
    assert data.coords.dtype == np.int64 and data.coords.min() == 4 and data.coords.max() == 59
    assert data.coords[:2].tolist() == [[4, 4], [5, 4]]         # (row, col), columns outside
    assert len({tuple(c) for c in data.coords.tolist()}) == 3136
    data = coordref.not_so_clevr("quadrant")
    assert (len(data.train), len(data.test)) == (2407, 729)
    assert (data.coords[data.test] > 32).all() and not (data.coords[data.train] > 32).all(1).any()
    for d in (data, coordref.not_so_clevr(canvas=20, square=5)):
        both = np.concatenate([d.train, d.test])
        assert np.array_equal(np.sort(both), np.arange(len(d.coords)))


@pytest.mark.parametrize("task", ["classification", "rendering", "regression"])
def test_examples_are_one_hot_images_and_squares(task):
    data = coordref.not_so_clevr(canvas=16, square=5)
    coords = data.coords[[0, 7, -1]]
    x, target = coordref._example(data, coords, task, "unit", np.float32)
    hot = coordref.encode(coords, (16, 16))
    if task == "regression":
        assert np.array_equal(x, hot) and np.array_equal(target, (coords / 16).astype(np.float32))
    else:
        line = coordref.axis_coords(16)
        assert np.array_equal(x[:, :, 0, 0], line[coords])
        square = hot if task == "classification" else conv(hot, np.ones((1, 1, 5, 5), np.float32),
                                                           padding=2)
        assert np.array_equal(target, square)


def test_adam_is_algorithm_one():
    w, m, v = normal(0, 5), np.zeros(5), np.zeros(5)
    wanted, m1, v1 = w.copy(), [0.0] * 5, [0.0] * 5
    for step in range(1, 6):
        g = normal(step, 5)
        w, m, v = coordref.adam_step(w, g, m, v, step, learning_rate=0.1, beta1=0.8, beta2=0.9)
        for i in range(5):
            m1[i] = 0.8 * m1[i] + 0.2 * g[i]
            v1[i] = 0.9 * v1[i] + 0.1 * g[i] ** 2
            wanted[i] -= 0.1 * (m1[i] / (1 - 0.8 ** step)) / (
                math.sqrt(v1[i] / (1 - 0.9 ** step)) + 1e-8)
    close(w, wanted, terms=10)


SMALL = coordref.not_so_clevr(canvas=12, square=3)


def small_painter(**options):
    return coordref.coordconv_painter(size=(12, 12), rng=0, **options)


def train_small(**options):
    options = {"task": "classification", "steps": 7, "rng": 1, **options}
    net = options.pop("net", None) or small_painter()
    return coordref.train(net, SMALL, **options)


def same(a, b):
    return all(np.array_equal(p, q) for m, n in zip(a, b) for p, q in zip(m.params, n.params))


def test_training_is_a_function_of_its_arguments_and_seed(monkeypatch):
    start = small_painter()
    net, history = train_small(net=start)
    assert same(start, small_painter()) and not same(start, net)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    again, _ = train_small()
    assert same(net, again)
    other, _ = train_small(rng=2)
    assert not same(net, other)
    assert history["loss"].shape == history["learning_rate"].shape == (7,)
    assert history["loss"].dtype == np.float32 and np.isfinite(history["loss"]).all()


def test_a_batch_gives_the_gradient_of_its_mean_loss_and_of_l2():
    """The first step of Adam with eps = 1 moves a weight by rate * g / (|g| + 1)."""
    start = small_painter(dtype=np.float64)
    net, history = train_small(net=start, steps=1, l2=0.01, batch_size=13, learning_rate=0.1,
                               eps=1.0)
    order = np.random.default_rng(1).permutation(SMALL.train)[:13]
    x, target = coordref._example(SMALL, SMALL.coords[order], "classification", "unit", float)
    y, inputs = coordref.forward(start, x)
    loss = coordref.softmax_cross_entropy(y, target)
    dy, _ = coordref.softmax_cross_entropy_backward(1.0, y, target)
    _, grads = coordref.backward(start, dy, inputs)
    squares = sum((p ** 2).sum() for layer in start for p in layer.params if p.ndim > 1)
    close(history["loss"], np.array([loss + 0.01 * squares]), terms=1000)
    for layer, new, g in zip(start, net, grads):
        for p, q, d in zip(layer.params, new.params, g):
            d = d + (0.02 * p if p.ndim > 1 else 0)
            close(q, p - 0.1 * d / (abs(d) + 1), terms=1000)


def test_schedules():
    for decay, wanted in (("linear", [1, 0.75, 0.5, 0.25]), ("constant", [1, 1, 1, 1])):
        _, history = train_small(steps=4, decay=decay, learning_rate=1.0)
        assert history["learning_rate"].tolist() == wanted
    rates = [coordref._decayed("step", 1.0, 0, 1, epoch)
             for epoch in (0, 199, 200, 400, 800, 1800)]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.01, 1e-4, 1e-4])
    _, history = train_small(steps=None, epochs=2, batch_size=30)
    assert len(history["loss"]) == 2 * math.ceil(len(SMALL.train) / 30)


def test_the_callback_sees_each_step_and_can_stop():
    seen = []
    net, history = train_small(callback=lambda step, net, loss: seen.append(
        (step, coordref.forward(net, np.zeros((1, 2, 1, 1), np.float32))[0].sum(), float(loss)))
        or step == 3)
    assert [s for s, _, _ in seen] == [1, 2, 3] and len({y for _, y, _ in seen}) == 3
    assert [loss for _, _, loss in seen] == history["loss"].tolist()


@pytest.mark.parametrize("split", ["uniform", "quadrant"])
def test_the_relative_start_learns_both_splits(split):
    data = coordref.not_so_clevr(split)
    start = coordref.coordconv_painter(start="relative", rng=11)
    untrained = coordref.evaluate(start, data, task="classification")
    net, _ = coordref.train(start, data, task="classification", steps=60, learning_rate=0.01,
                            rng=12)
    assert untrained < 0.01 and coordref.evaluate(net, data, task="classification") == 1


@pytest.mark.parametrize("task, make", [
    ("rendering", lambda: coordref.coordconv_renderer(size=(12, 12), rng=0)),
    ("regression", lambda: coordref.coordconv_regressor(size=(12, 12), rng=0))])
def test_the_other_tasks_train(task, make):
    net, history = train_small(net=make(), task=task, steps=60)
    assert history["loss"][-10:].mean() < 0.7 * history["loss"][:10].mean()
    assert np.isfinite(coordref.evaluate(net, SMALL, task=task))


def test_batch_norm_trains_on_batches_and_keeps_running_statistics():
    data = coordref.not_so_clevr()
    start = coordref.deconv_painter(kernel=2, rng=0)
    net, history = coordref.train(start, data, task="classification", steps=30, rng=1)
    assert history["loss"][-5:].mean() < history["loss"][:5].mean()
    norms = [(a, b) for a, b in zip(start, net) if a.op is coordref.batch_norm]
    assert len(norms) == 5
    for a, b in norms:
        assert not a.options["mean"].any() and b.options["mean"].any()
    # after many steps on one batch the statistics are those of that batch
    one = data._replace(train=data.train[:16])
    net, _ = coordref.train(start, one, task="classification", steps=120, learning_rate=0.0, rng=1)
    x = coordref._example(data, data.coords[one.train], "classification", "unit", np.float32)[0]
    z = coordref.forward(start[:1], x)[0]
    close(net[1].options["mean"], z.mean(axis=(0, 2, 3)), terms=1e6)
    close(net[1].options["var"], z.var(axis=(0, 2, 3)), terms=1e6)


@pytest.mark.parametrize("task, make, perfect", [
    ("classification", lambda xp: coordref.encoder_network((64, 64), xp=xp), 1),
    ("rendering", lambda xp: coordref.renderer_network((64, 64), xp=xp), 1),
    ("regression", lambda xp: coordref.decoder_network((64, 64), xp=xp), 0)])
def test_the_analytic_networks_score_perfectly_and_wrong_ones_do_not(task, make, perfect, xp):
    data, net = coordref.not_so_clevr("quadrant"), make(xp)
    for part in ("test", "train"):
        assert coordref.evaluate(net, data, task=task, part=part, scale="pixel") == perfect
    # off by one column, away from the edge: no hit, 8 of 10 columns in common, one pixel away
    data = data._replace(test=np.flatnonzero(data.coords[:, 1] < 59))
    one = Layer(affine, [xp.ones(2, np.float32), xp.asarray(np.array([0, 1], np.float32))])
    shifted = net + [one] if task == "regression" else [one] + net
    wanted = {"classification": 0, "rendering": 72 / 90, "regression": 1}[task]
    close(np.float32(coordref.evaluate(shifted, data, task=task, scale="pixel")), wanted)


# FILES -------------------------------------------------------------------------------------------

def test_save_and_load_give_back_every_bit(tmp_path):
    for net in (coordref.conv_regressor("quadrant", rng=0), coordref.decoder_network((5, 6))):
        path = tmp_path / "net.npz"
        coordref.save(path, net)
        blank = [layer._replace(params=[p * 0 for p in layer.params]) for layer in net]
        assert same(coordref.load(path, blank), net) and not same(blank, net)
    assert [p.name for p in tmp_path.iterdir()] == ["net.npz"]


def test_a_file_that_is_not_this_network_is_refused(tmp_path):
    net, path = coordref.coordconv_regressor(rng=0), tmp_path / "net.npz"
    coordref.save(path, net)
    whole = path.read_bytes()
    for part in (whole[:0], whole[:50], whole[:len(whole) // 2], whole[:-1],
                 whole.replace("network".encode("utf-32-le"), "notwork".encode("utf-32-le")),
                 b"x" * 500):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="load"):
            coordref.load(path, net)
    path.write_bytes(whole)
    for other in (coordref.coordconv_painter(), coordref.coordconv_regressor(dtype=np.float64),
                  net[:-2], coordref.coordconv_regressor(size=(3,))):
        with pytest.raises(ValueError, match="load"):
            coordref.load(path, other)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    net, path = coordref.coordconv_regressor(rng=0), tmp_path / "net.npz"
    coordref.save(path, net)
    whole = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(coordref.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        coordref.save(path, net)
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


# THE ANALYTIC ANSWER -----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [(1,), (9,), (1, 7), (6, 1), (5, 8), (12, 12), (3, 4, 5)])
def test_decode_and_encode_are_exact_at_every_position(size, dtype, xp):
    where = np.array(list(np.ndindex(*size)))
    images = np.zeros((len(where), 1, *size), dtype)
    for n, i in enumerate(where):
        images[(n, 0, *i)] = 1
    coords, device = xp.asarray(where.astype(dtype)), xp.asarray(images)
    options = {"dtype": dtype, "xp": xp}
    for got, wanted in (
            (coordref.encode(coords, size), images), (coordref.decode(device), where),
            (coordref.forward(coordref.decoder_network(size, **options), device)[0], where),
            (coordref.forward(coordref.encoder_network(size, **options),
                              coords.reshape(*coords.shape, *(1,) * len(size)))[0], images)):
        assert got.dtype == dtype and np.array_equal(coordref.to_numpy(got), wanted)
    assert coordref.encode(xp.asarray(where), size).dtype == np.float32


def test_the_network_is_the_critics_listing():
    """Piekniewski's listing, by scipy: also off its intended input, where it is wrong."""
    H, W = 7, 10
    X, Y = np.meshgrid(np.arange(W), np.arange(H))
    centre = np.zeros((3, 3))
    centre[1, 1] = 1

    def listing(A):
        blur = lambda a, k: scipy.signal.convolve2d(a, k * centre, mode="same")  # noqa: E731
        dy, dx = blur(A, H) + blur(Y, -1), blur(A, W) + blur(X, -1)
        return [H - np.maximum(dy, 0).sum(), W - np.maximum(dx, 0).sum()]
    images = np.zeros((4, 1, H, W))
    images[0, 0, 2, 3] = images[1, 0, 2, 3] = images[1, 0, 4, 5] = 1
    images[2, 0, 2, 3] = 0.5
    got = coordref.forward(coordref.decoder_network((H, W), dtype=np.float64), images)[0]
    assert np.array_equal(got, [listing(a[0]) for a in images])
    assert got[0].tolist() == [2, 3] and got[1].tolist() == [-1, -2] and got[3].tolist() == [H, W]


def test_the_renderer_draws_squares_and_cuts_them_at_the_edge(xp):
    coords = xp.asarray(np.array([[4., 6.], [0., 9.]]))
    net = coordref.renderer_network((8, 10), 5, dtype=np.float64, xp=xp)
    y = coordref.to_numpy(coordref.forward(net, coords[:, :, None, None])[0])
    wanted = np.zeros((2, 1, 8, 10))
    wanted[0, 0, 2:7, 4:9] = wanted[1, 0, :3, 7:] = 1
    assert np.array_equal(y, wanted)


# BAD INPUT ---------------------------------------------------------------------------------------

X, WT, B = normal(0, 2, 3, 5, 6), normal(1, 4, 3, 3, 2), normal(2, 4)
Y = conv(X, WT, B)
HOT = coordref.encode(np.array([[1, 2], [0, 3]]), (3, 4))
NET = small_painter()


def spoiled(value, at=(0, 0, 0, 0)):
    image = HOT.copy()
    image[at] = value
    return image


BAD = [
    # function, arguments, keywords, error, the argument that the sentence must name
    ("array_module", [], {}, TypeError, "array"),
    ("array_module", [[1.0]], {}, TypeError, "list"),
    ("to_numpy", [3.0], {}, TypeError, "float"),
    ("axis_coords", [0], {}, ValueError, "n"),
    ("axis_coords", [2.5], {}, TypeError, "n"),
    ("axis_coords", [True], {}, TypeError, "n"),
    ("axis_coords", [3], {"scale": "percent"}, ValueError, "scale"),
    ("axis_coords", [3], {"scale": 1}, TypeError, "scale"),
    ("axis_coords", [3], {"dtype": np.int32}, TypeError, "dtype"),
    ("axis_coords", [3], {"dtype": "float33"}, TypeError, "dtype"),
    ("axis_coords", [3], {"dtype": None}, TypeError, "dtype"),
    ("axis_coords", [3], {"xp": math}, TypeError, "xp"),
    ("coord_channels", [4], {}, TypeError, "size"),
    ("coord_channels", [()], {}, ValueError, "size"),
    ("coord_channels", [(3, -1)], {}, ValueError, "size"),
    ("coord_channels", [(3, "4")], {}, TypeError, "size"),
    ("coord_channels", [(3, 4)], {"radius": "yes"}, TypeError, "radius"),
    ("add_coords", [X.tolist()], {}, TypeError, "x"),
    ("add_coords", [X.astype(int)], {}, TypeError, "x"),
    ("add_coords", [X > 0], {}, TypeError, "x"),
    ("add_coords", [X.astype(complex)], {}, TypeError, "x"),
    ("add_coords", [X[0, 0]], {}, ValueError, "x"),
    ("add_coords_backward", [X, X], {}, ValueError, "dy"),
    ("conv", [X, WT[:, :2]], {}, ValueError, "x has 3 channels but w takes 2"),
    ("conv", [X, WT.astype(np.float32)], {}, TypeError, "dtype"),
    ("conv", [X, WT[0]], {}, ValueError, "w"),
    ("conv", [X, WT, B[:3]], {}, ValueError, "b"),
    ("conv", [None, WT], {}, TypeError, "x"),
    ("conv", [X, WT], {"stride": 0}, ValueError, "stride"),
    ("conv", [X, WT], {"stride": (1, 2, 3)}, ValueError, "stride"),
    ("conv", [X, WT], {"stride": 1.5}, TypeError, "stride"),
    ("conv", [X, WT], {"stride": "2"}, TypeError, "stride"),
    ("conv", [X, WT], {"dilation": -1}, ValueError, "dilation"),
    ("conv", [X, WT], {"dilation": 9}, ValueError, "dilation"),
    ("conv", [X, WT], {"padding": -1}, ValueError, "padding"),
    ("conv", [X, WT], {"padding": "full"}, ValueError, "padding"),
    ("conv", [X, WT], {"padding": ((1, 2, 3), (1, 1))}, ValueError, "padding"),
    ("conv", [X, WT], {"padding": None}, TypeError, "padding"),
    ("conv", [X, WT], {"groups": 2}, ValueError, "groups"),
    ("conv", [X, WT], {"groups": 0}, ValueError, "groups"),
    ("conv", [X[:, :, :2], WT], {}, ValueError, "kernel"),
    ("conv", [X, WT[:, :, :0]], {}, ValueError, "kernel"),
    ("conv_backward", [Y[:, :, 1:], X, WT, B], {}, ValueError, "dy"),
    ("conv_backward", [Y.astype(np.float32), X, WT, B], {}, TypeError, "dy"),
    ("conv_backward", [Y, X, WT, B], {"need_dx": 1}, TypeError, "need_dx"),
    ("conv_transpose", [X, WT], {}, ValueError, "x has 3 channels but w takes 4"),
    ("conv_transpose", [Y, WT], {"output_padding": 1}, ValueError, "output_padding"),
    ("conv_transpose", [Y, WT], {"padding": 9}, ValueError, "padding"),
    ("conv_transpose", [Y, WT], {"groups": 3}, ValueError, "groups"),
    ("conv_transpose_backward", [Y, Y, WT], {}, ValueError, "dy"),
    ("coord_conv", [X, WT], {}, ValueError, "x has 3 channels and 2 coordinates but w takes 3"),
    ("coord_conv", [X, normal(0, 4, 5, 1, 1)], {"size": (5, 6)}, ValueError, "size"),
    ("coord_conv", [X[:, :, :1, :1], normal(0, 4, 5, 1, 1)], {"size": (5,)}, ValueError, "x"),
    ("coord_conv_backward", [X, X, normal(0, 4, 5, 1, 1)], {}, ValueError, "dy"),
    ("relu", [[1.0]], {}, TypeError, "x"),
    ("relu_backward", [X[:1], X], {}, ValueError, "dy"),
    ("max_pool", [X], {"kernel": 0}, ValueError, "kernel"),
    ("max_pool", [X], {"kernel": 2, "padding": 2}, ValueError, "padding"),
    ("max_pool", [X], {"stride": 2}, ValueError, "stride"),
    ("mean_pool", [X], {"kernel": 9}, ValueError, "kernel"),
    ("sum_pool", [X[0, 0]], {}, ValueError, "x"),
    ("affine", [X, B, B], {}, ValueError, "scale"),
    ("batch_norm", [X, B[:3], B[:3]], {"mean": B[:3]}, ValueError, "var"),
    ("batch_norm", [X, B[:3], B[:3]], {"eps": math.nan}, ValueError, "eps"),
    ("softmax", [B], {}, ValueError, "x"),
    ("softmax_cross_entropy", [X[:, 0, 0], np.array([0, 6])], {}, ValueError, "target"),
    ("softmax_cross_entropy", [X[:, 0, 0], np.array([-1, 2])], {}, ValueError, "target"),
    ("softmax_cross_entropy", [X[:, 0, 0], np.array([1, 2, 3])], {}, ValueError, "target"),
    ("softmax_cross_entropy", [X[:, 0, 0], [1, 2]], {}, TypeError, "target"),
    ("softmax_cross_entropy", [X[:, 0, 0], np.array([1.0, 2.0])], {}, ValueError, "target"),
    ("softmax_cross_entropy_backward", ["1", X[:, 0, 0], np.array([1, 2])], {}, TypeError, "dy"),
    ("sigmoid_cross_entropy", [X, X[:1]], {}, ValueError, "target"),
    ("mean_squared_error", [X[:0], X[:0]], {}, ValueError, "y"),
    ("forward", [conv, X], {}, TypeError, "net"),
    ("backward", [NET, X, []], {}, ValueError, "inputs"),
    ("he_normal", [(3, 4)], {"rng": -1}, ValueError, "rng"),
    ("he_normal", [(3, 4)], {"rng": "seed"}, TypeError, "rng"),
    ("coordconv_painter", [], {"start": "random"}, ValueError, "start"),
    ("coordconv_painter", [], {"size": 64}, TypeError, "size"),
    ("coordconv_painter", [], {"width": 0}, ValueError, "width"),
    ("deconv_painter", [], {"kernel": 0}, ValueError, "kernel"),
    ("coordconv_renderer", [], {"kernel": 2.0}, TypeError, "kernel"),
    ("conv_regressor", ["random"], {}, ValueError, "split"),
    ("not_so_clevr", ["random"], {}, ValueError, "split"),
    ("not_so_clevr", [], {"canvas": 8}, ValueError, "canvas"),
    ("not_so_clevr", [], {"square": 4}, ValueError, "square"),
    ("adam_step", [B, B, B, B[:3], 1], {}, ValueError, "v"),
    ("adam_step", [B, B, B, B, 0], {}, ValueError, "step"),
    ("adam_step", [B, B, B, B, 1], {"beta2": 1.5}, ValueError, "beta2"),
    ("adam_step", [B, B, B, B, 1], {"beta1": 1}, ValueError, "beta1"),
    ("batch_norm_backward", [X, None, B[:3], B[:3]], {}, TypeError, "x"),
    ("backward", [NET, X, None], {}, TypeError, "inputs"),
    ("save", [3, NET], {}, TypeError, "path"),
    ("load", [None, NET], {}, TypeError, "path"),
    ("conv", [X, WT], {"padding": 10 ** 30}, ValueError, "padding"),
    ("encode", [np.array([[np.inf, 2]]), (3, 4)], {}, ValueError, "coords"),
    ("train", [NET, None], {"task": "classification"}, TypeError, "data"),
    ("train", [[], SMALL], {"task": "classification"}, ValueError, "net"),
    ("train", [NET, SMALL], {"task": "painting"}, ValueError, "task"),
    ("train", [NET, SMALL], {"task": "classification", "steps": 0}, ValueError, "steps"),
    ("train", [NET, SMALL], {"task": "classification", "epochs": -1}, ValueError, "epochs"),
    ("train", [NET, SMALL], {"task": "classification", "steps": 1, "epochs": 1}, ValueError,
     "epochs"),
    ("train", [NET, SMALL], {"task": "classification", "batch_size": 0}, ValueError, "batch_size"),
    ("train", [NET, SMALL], {"task": "classification", "learning_rate": math.nan}, ValueError,
     "learning_rate"),
    ("train", [NET, SMALL], {"task": "classification", "l2": -1.0}, ValueError, "l2"),
    ("train", [NET, SMALL], {"task": "classification", "decay": "cosine"}, ValueError, "decay"),
    ("train", [NET, SMALL], {"task": "classification", "callback": 3}, TypeError, "callback"),
    ("evaluate", [NET, SMALL], {"task": "classification", "part": "all"}, ValueError, "part"),
    ("evaluate", [NET, SMALL._replace(canvas=9)], {"task": "classification"}, ValueError, "net"),
    ("decoder_network", [(3, 0)], {}, ValueError, "size"),
    ("renderer_network", [(3, 4), 2], {}, ValueError, "square"),
    ("decode", [HOT[:, 0]], {}, ValueError, "image"),
    ("decode", [spoiled(1)], {}, ValueError, "image"),
    ("decode", [spoiled(-1e-30)], {}, ValueError, "image"),
    ("decode", [spoiled(np.nan)], {}, ValueError, "image"),
    ("decode", [spoiled(0.5, (0, 0, 1, 2))], {}, ValueError, "image"),
    ("decode", [spoiled(0, (1, 0, 0, 3))], {}, ValueError, "image"),
    ("decode", [HOT.astype(int)], {}, TypeError, "image"),
    ("encode", [[[1, 2]], (3, 4)], {}, TypeError, "coords"),
    ("encode", [np.array([[1, 4]]), (3, 4)], {}, ValueError, "coords"),
    ("encode", [np.array([[-1, 2]]), (3, 4)], {}, ValueError, "coords"),
    ("encode", [np.array([[0.5, 2]]), (3, 4)], {}, ValueError, "coords"),
    ("encode", [np.array([[np.nan, 2]]), (3, 4)], {}, ValueError, "coords"),
    ("encode", [np.array([[1, 2, 0]]), (3, 4)], {}, ValueError, "coords"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, args, options, error, named", BAD)
def test_bad_input_gets_a_sentence(name, args, options, error, named):
    with pytest.raises(error) as caught:
        getattr(coordref, name)(*args, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    function = "array_module" if name == "to_numpy" else name
    inner = r"conv|axis_coords|coord\w+|encoder_network"
    assert re.match(rf"({function}|{inner}): ", message), message
    assert re.search(rf"\b{re.escape(named)}\b", message) and len(message) > 25, message


def test_mixed_arrays_are_refused_with_the_way_out(monkeypatch):
    class ndarray:
        dtype, shape, ndim = np.dtype("float64"), (2, 3, 5, 6), 4
    device = type(sys)("cupy")
    device.ndarray = ndarray
    monkeypatch.setitem(sys.modules, "cupy", device)
    assert coordref.array_module(ndarray()) is device
    for call in (lambda: coordref.array_module(X, ndarray()), lambda: conv(ndarray(), WT)):
        with pytest.raises(TypeError, match="cupy.asarray"):
            call()


# THE FILE ITSELF ---------------------------------------------------------------------------------

SIGNATURES = """
array_module(*arrays)
best_module()
to_numpy(a)
axis_coords(n, *, scale='unit', dtype=float32, xp=numpy)
coord_channels(size, *, radius=False, scale='unit', dtype=float32, xp=numpy)
add_coords(x, *, radius=False, scale='unit')
add_coords_backward(dy, x, *, radius=False, scale='unit')
conv(x, w, b=None, *, stride=1, padding=0, dilation=1, groups=1)
conv_transpose(x, w, b=None, *, stride=1, padding=0, output_padding=0, dilation=1, groups=1)
coord_conv(x, w, b=None, *, size=None, radius=False, scale='unit', stride=1, padding=0, dilation=1)
softmax_cross_entropy(logits, target)
sigmoid_cross_entropy(logits, target)
mean_squared_error(y, target)
forward(net, x)
not_so_clevr(split='uniform', *, canvas=64, square=9)
evaluate(net, data, *, task, part='test', scale='unit')
coordconv_painter(*, start='he', size=(64, 64), width=1, rng=None, dtype=float32, xp=numpy)
decode(image)
""".split("\n")[1:-1]


@pytest.mark.parametrize("line", SIGNATURES)
def test_signatures_are_fixed(line):
    found = str(inspect.signature(getattr(coordref, line[:line.index("(")])))
    found = re.sub(r"<class 'numpy\.(\w+)'>", r"\1", found)
    found = re.sub(r"<module 'numpy' from '[^']*'>", "numpy", found)
    assert line[line.index("("):] == found


def test_contents_and_all_follow_the_reading_order():
    doc = coordref.__doc__
    contents = doc[doc.index("Contents"):doc.index("Example\n")]
    names = [n for line in contents.splitlines()[2:] for n in line.split(": ")[-1].split()]
    assert names == coordref.__all__
    tree = ast.parse(Path(coordref.__file__).read_text())
    public = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
              and not n.name.startswith("_")]
    assert public == coordref.__all__
    assert all(inspect.getdoc(getattr(coordref, name)) for name in public)


def test_only_numpy_is_imported_at_the_top():
    tree = ast.parse(Path(coordref.__file__).read_text())
    imported = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import)
                for a in n.names}
    imported |= {n.module.split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_doctests():
    failed, tried = doctest.testmod(coordref)
    assert failed == 0 and tried > 15


def test_a_renamed_copy_runs_alone(tmp_path):
    copy = tmp_path / "vendored.py"
    copy.write_text(Path(coordref.__file__).read_text())
    block = ("import sys\n"
             "class Refuse:\n"
             "    def find_spec(self, name, path=None, target=None):\n"
             "        if name.split('.')[0] in ('scipy', 'cupy', 'torch', 'coordref'):\n"
             "            raise ImportError(name)\n"
             "sys.meta_path.insert(0, Refuse())\n"
             "import doctest, vendored\n"
             "sys.exit(doctest.testmod(vendored).failed)\n")
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "vendored.py"], cwd=tmp_path, check=True)


def test_the_licence_travels_in_the_file():
    words = lambda text: " ".join(re.sub(r"^# ?", "", text, flags=re.M).split())  # noqa: E731
    licence = words((HERE / "LICENSE").read_text())
    grant = licence[licence.index("Permission is hereby granted"):]
    assert grant in words(Path(coordref.__file__).read_text())


# CHECKPOINTS -------------------------------------------------------------------------------------

def digest(net, history):
    """SHA-256 of everything that a training changes."""
    arrays = [a for layer in net for a in (*layer.params, *layer.options.values())
              if hasattr(a, "dtype")] + [history["loss"], history["learning_rate"]]
    return hashlib.sha256(b"".join(coordref.to_numpy(a).tobytes() for a in arrays)).hexdigest()


RUNS = {    # batches that do not divide the epoch, more than one epoch, running statistics
    "painter": {"steps": 10, "batch_size": 17},
    "batch norm": {"net": lambda: [*coordref.deconv_painter(kernel=2, rng=0)], "steps": 4,
                   "data": coordref.not_so_clevr(), "batch_size": 5},
    "regressor": {"net": lambda: coordref.coordconv_regressor(size=(12, 12), dtype=np.float64,
                                                              rng=3),
                  "task": "regression", "steps": 8, "batch_size": 26, "decay": "step", "l2": 1e-3},
    "half precision": {"net": lambda: small_painter(dtype=np.float16), "steps": 6, "eps": 1e-4},
}


def run(name, **options):
    options = {"task": "classification", "rng": 1, "data": SMALL, "net": small_painter,
               **RUNS[name], **options}
    return coordref.train(options.pop("net")(), options.pop("data"), **options)


@pytest.mark.parametrize("name", RUNS)
def test_a_training_goes_on_bit_for_bit_where_its_checkpoint_ends(name, tmp_path):
    path, whole = tmp_path / "run.npz", digest(*run(name))
    half = RUNS[name]["steps"] // 2
    net, history = run(name, checkpoint=path, callback=lambda step, net, loss: step == half)
    assert len(history["loss"]) == half and digest(net, history) != whole
    blank = [a._replace(params=[p * 0 for p in a.params]) for a in net]
    assert same(coordref.load(path, blank), net)            # the network alone
    code = ("import sys, test_coordref as test\n"
            "print(test.digest(*test.run(sys.argv[1], checkpoint=sys.argv[2])))")
    new = subprocess.run([sys.executable, "-c", code, name, path], cwd=HERE, text=True, check=True,
                         env={**os.environ, "PYTHONHASHSEED": "random"}, stdout=subprocess.PIPE)
    assert new.stdout.strip() == whole
    assert digest(*run(name, checkpoint=path, callback=lambda *a: pytest.fail("a step"))) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_array_module_goes_on_and_adds_up_over_processes(xp, tmp_path):
    path = tmp_path / "run.npz"

    def go(**options):
        net, history = train_small(net=small_painter(xp=xp), **options)
        assert all(type(p) is xp.ndarray for layer in net for p in layer.params)
        return digest(net, history)
    whole = go()
    go(checkpoint=path, checkpoint_every=2, callback=lambda step, net, loss: step == 3)
    assert go(checkpoint=path) == go(checkpoint=path) == go(all_reduce=lambda a: a + 0) == whole
    assert coordref.load(path, small_painter())[0].params[0].dtype == np.float32
    with pytest.raises(FloatingPointError, match="step"):
        go(learning_rate=1e30, steps=2)


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.MT19937, np.random.Philox,
                                  np.random.SFC64])
def test_a_generator_goes_on_too(kind, tmp_path):
    path, batches = tmp_path / "run.npz", -(-len(SMALL.train) // 30)

    def go(rng, stop=None, **options):
        return digest(*train_small(steps=2 * batches + 1, batch_size=30, rng=rng, **options,
                                   callback=lambda step, net, loss: step == stop))
    undisturbed = np.random.Generator(kind(5))
    whole, after = go(undisturbed), undisturbed.integers(2 ** 60)
    for stop in (batches - 1, batches, batches + 1):        # at the end of an epoch and beside it
        go(np.random.Generator(kind(5)), stop, checkpoint=path)
        again = np.random.Generator(kind(5))
        assert go(again, checkpoint=path) == whole and again.integers(2 ** 60) == after
        path.unlink()
    assert go(None, batches, checkpoint=path) != whole
    assert go(None, checkpoint=path) == go(None, checkpoint=path) != whole


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    train_small(checkpoint=path)
    before = path.read_bytes()
    for named, options in {
            "steps 7, here 8": {"steps": 8}, "batch_size 16, here 4": {"batch_size": 4},
            "learning_rate": {"learning_rate": 0.1}, "l2": {"l2": 1e-3}, "beta1": {"beta1": 0.5},
            "beta2": {"beta2": 0.5}, "eps": {"eps": 1e-3}, "rng 1, here 2": {"rng": 2},
            "rng 1, here 'a Generator'": {"rng": np.random.default_rng(1)},
            "rng 1, here None": {"rng": None}, "decay 'linear'": {"decay": "constant"},
            "scale": {"scale": "pixel"}, "task": {"task": "rendering"},
            "start": {"net": [a._replace(params=[-p for p in a.params]) for a in
                              small_painter()]},
            "float32": {"net": small_painter(dtype=np.float64)},
            "lacks 1.conv.0": {"net": coordref.coordconv_regressor(size=(12, 12)),
                               "task": "regression"}}.items():
        with pytest.raises(ValueError, match=named):
            train_small(checkpoint=path, **options)
    for data in (SMALL._replace(train=SMALL.train[::-1]), coordref.not_so_clevr("quadrant",
                                                                               canvas=12)):
        with pytest.raises(ValueError, match="data"):
            coordref.train(small_painter(), data, task="classification", steps=7, rng=1,
                           checkpoint=path)
    assert path.read_bytes() == before
    coordref.save(path, small_painter())
    with pytest.raises(ValueError, match="lacks state"):
        train_small(checkpoint=path)


def test_a_state_keeps_names_shapes_and_dtypes(tmp_path):
    net, path = small_painter(), tmp_path / "net.npz"
    state = {"m": normal(0, 2, 3), "step": 7, "file": np.array("text"), "bits": b"\0a", "x": 1.5}
    coordref.save(path, net, state)
    again, found = coordref.load(path, net, {key: a * 0 if key == "m" else a
                                             for key, a in state.items()})
    assert same(net, again) and list(found) == list(state)
    assert all(np.array_equal(found[key], a) for key, a in state.items())
    assert np.load(path)["state.m"].dtype == np.float64 and "0.coord_conv.0" in np.load(path)
    assert list(coordref.load(path, net, {"m": state["m"]})[1]) == ["m"]
    for other in ({"n": 1}, {"m": np.zeros((3, 2))}, {"m": normal(0, 2, 3).astype("f4")}):
        with pytest.raises(ValueError, match="state"):
            coordref.load(path, net, other)
    for bad in ([1], {"a": np.array([None])}, {"a": object()}):
        with pytest.raises(TypeError, match="save: state"):
            coordref.save(path, net, bad)


# FAULTS ------------------------------------------------------------------------------------------

def refuse(path, content, net, state=None):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^load: {re.escape(str(path))} is not a file of this "
                                         "network: .{9}"):
        coordref.load(path, net, state)


def test_no_damage_goes_unseen(tmp_path):
    """Every file cut at a hundredth of its length, 500 files with flipped bytes, and each byte of
    the zip format's own records flipped, which the checksums of the members do not cover."""
    net, path = coordref.coordconv_regressor(size=(12, 12), rng=0), tmp_path / "net.npz"
    coordref.save(path, net, {"m": normal(0, 50)})
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for cut in [len(whole) * i // 100 for i in range(100)] + [len(whole) - i for i in (1, 64, 65)]:
        refuse(path, whole[:cut], net)
    for i in range(500):
        spoiled = np.frombuffer(whole, np.uint8).copy()
        at = rng.choice(len(whole), rng.integers(1, 9), replace=False)
        spoiled[at] ^= rng.integers(1, 256, len(at), np.uint8)
        refuse(path, spoiled.tobytes(), net, {"m": np.zeros(50)} if i % 2 else None)
    records = whole.index(b"PK\1\2")
    for at in [*range(80), *range(records, len(whole), 3)]:
        refuse(path, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:], net)
    for foreign in (b"", b"x" * 500, whole + b"\n", whole * 2, b"\x89PNG\r\n" + whole,
                    b"PK\5\6" + bytes(18)):
        refuse(path, foreign, net)
    path.write_bytes(whole)
    assert same(coordref.load(path, net), net)


def sealed(members, compression=zipfile.ZIP_STORED):
    """A zip file of these members with a right checksum: what a forger would hand over."""
    content = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(content, "w", compression) as archive:
        warnings.simplefilter("ignore")             # a name may come twice
        for name, part in members:
            archive.writestr(name, part)
    whole = content.getvalue()[:-2] + b"\x40\0"
    return whole + hashlib.sha256(whole).hexdigest().encode()


def npy(header, content=b"", version=b"\1\0"):
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2 if version == b"\1\0" else 4,
                                                         "little") + header + content


def test_no_forged_file_takes_memory_or_runs_code(tmp_path):
    net, path = coordref.coordconv_regressor(size=(12, 12), rng=0), tmp_path / "net.npz"
    coordref.save(path, net)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path.write_bytes(sealed(members.items()))
    assert same(coordref.load(path, net), net)      # so that what follows is refused for cause
    name = "0.coord_conv.0.npy"
    right, megabyte = members[name][128:], bytes(10 ** 6)
    shape = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"
    assert members[name] == npy(shape % ("<f4", net[0].params[0].shape), right)
    huge = npy(shape % ("<f4", (2 ** 28,)), megabyte)
    bomb = npy(shape % ("<f4", net[0].params[0].shape), bytes(2 ** 25))
    forged = [huge, npy(shape % ("<f4", (2 ** 60, 2 ** 60)), right), bomb,
              npy(shape % ("<f4", (-8, -3, 1, 1)), right), npy(shape % ("|O", (1,)), megabyte),
              npy(shape % ("<f4", "(" * 9999), right), npy("{'descr': '<f4'", right),
              npy(shape % ("<f4", net[0].params[0].shape), right, b"\3\0"),
              npy(shape % (">f4", net[0].params[0].shape), right),
              npy(shape % ("<f4", net[0].params[0].shape), right[:-1]), b"", megabyte,
              pickle.dumps(forge)]
    files = [sealed({**members, name: part}.items()) for part in forged]
    # a directory that declares a gigabyte where there is a megabyte
    at = files[0].rindex(b"PK\1\2", 0, files[0].index(name.encode(), len(huge)))
    declared = files[0][:at + 20] + (2 ** 30).to_bytes(4, "little") * 2 + files[0][at + 28:-64]
    files.append(declared + hashlib.sha256(declared).hexdigest().encode())
    files += [sealed({**members, name: bomb}.items(), kind) for kind in (
        zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)]
    files += [sealed([*members.items(), (name, members[name])]),
              sealed({**members, "more.npy": huge}.items()),
              sealed({"x" * 60000 + str(i): b"" for i in range(20)}.items()),
              sealed({**members, "format.npy": members["format.npy"].replace(
                  "2".encode("utf-32-le"), "3".encode("utf-32-le"))}.items())]
    for content in files:
        path.write_bytes(content)
        tracemalloc.start()
        refuse(path, content, net)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 ** 22 + 2 * min(len(content), 2 ** 21)
    assert not forge.ran
    path.write_bytes(files[0])
    start = time.perf_counter()
    refuse(path, files[0], net)
    assert time.perf_counter() - start < 0.1        # the promise is a time


class Forge:
    ran = False

    def __reduce__(self):
        return setattr, (Forge, "ran", True)


forge = Forge()


def test_a_forged_state_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    rng = np.random.Generator(np.random.MT19937(1))
    net, history = train_small(checkpoint=path, rng=rng)
    names = {k[6:]: a for k, a in np.load(path).items() if k.startswith("state.")}
    saved = json.loads(names["rng"].item())
    spoil = [{"step": np.int64(8)}, {"step": np.int64(0)}, {"step": np.int64(-1)}]
    for key, value in (("pos", 10 ** 9), ("pos", -1), ("key", [1, 2]), ("key", None)):
        spoil.append({"rng": {**saved, "state": {**saved["state"], key: value}}})
    spoil += [{"rng": {}}, {"rng": [1]}, {"rng": {**saved, "bit_generator": "PCG64"}},
              {"arguments": [1]}, {"arguments": {}}, {"arguments": "}"}]
    for bad in spoil:
        bad = {k: a if k == "step" else np.array(json.dumps(a).encode(), names[k].dtype)
               for k, a in bad.items()}
        coordref.save(path, net, {**names, **bad})
        with pytest.raises(ValueError, match="^train: checkpoint .*run.npz is not of"):
            train_small(checkpoint=path, rng=np.random.Generator(np.random.MT19937(1)))
    coordref.save(path, net, names)
    assert digest(*train_small(checkpoint=path, rng=rng)) == digest(net, history)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(tmp_path):
    path, seen, whole = tmp_path / "run.npz", [], digest(*train_small(steps=20))

    def poison(step, net, loss):
        seen.append(step)
        if step == 5:
            net[0].params[0][0] = np.nan    # as a bad batch would: the next loss is not a number
    for every, left in ((1, 4), (2, 4), (3, 3), (6, None), (100, None)):
        seen.clear()
        found = "weights after step 5" if every == 1 else "loss of step 6 is nan"
        with pytest.raises(FloatingPointError, match=found):
            train_small(checkpoint=path, checkpoint_every=every, callback=poison, steps=20)
        assert seen[-1] == 6 - (every == 1)
        assert path.exists() == (left is not None)
        if left:
            assert np.load(path)["state.step"] == left
            assert all(np.isfinite(p).all() for layer in coordref.load(path, small_painter())
                       for p in layer.params)
            assert digest(*train_small(checkpoint=path, steps=20)) == whole
            path.unlink()
    with pytest.raises(FloatingPointError, match="weights after step 1"):
        train_small(learning_rate=1e300, steps=1)
    with pytest.raises(FloatingPointError, match="loss of step 2 is"):
        train_small(learning_rate=1e30, steps=2)


def test_interrupts_leave_the_last_checkpoint_whole(tmp_path, monkeypatch):
    path, whole = tmp_path / "run.npz", digest(*train_small())

    def interrupt(step, net, loss):
        if step == 5:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train_small(checkpoint=path, checkpoint_every=2, callback=interrupt)
    before = path.read_bytes()
    assert np.load(path)["state.step"] == 4
    for name in ("fsync", "replace"):               # while the next one is written
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(coordref.os, name, lambda *args: interrupt(5, None, None))
            train_small(checkpoint=path, checkpoint_every=2)
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert digest(*train_small(checkpoint=path)) == whole


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    path, whole = tmp_path / "run.npz", digest(*train_small())
    train_small(checkpoint=path, callback=lambda step, net, loss: step == 3)
    before = path.read_bytes()
    for limit in (0, 5000, len(before) - 1):        # no file may grow beyond this
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            with pytest.raises(OSError, match="save: .*run.npz .* as it was") as caught:
                train_small(checkpoint=path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert caught.value.errno == errno.EFBIG
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="as it was.*No space"):
            patch.setattr(coordref.os, name, full)
            train_small(checkpoint=path)
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert digest(*train_small(checkpoint=path)) == whole
    absent = tmp_path / "absent" / "run.npz"
    os.mkfifo(tmp_path / "pipe")
    for place in (absent, tmp_path, tmp_path / "pipe"):     # a device is no place for a file
        with pytest.raises(OSError, match="save: "):
            coordref.save(place, small_painter())
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(FileNotFoundError):
        train_small(checkpoint=absent)


KILLED = """
import sys
import coordref as cr
print("ready", flush=True)
cr.train(cr.coordconv_painter(size=(12, 12), rng=0), cr.not_so_clevr(canvas=12, square=3), rng=1,
         task="classification", steps=40, checkpoint=sys.argv[1], checkpoint_every=1)
"""


def killed(path, delay):
    """Whether a training, gone on with in a new process, was killed so many seconds later."""
    with subprocess.Popen([sys.executable, "-c", KILLED, path], cwd=HERE, text=True,
                          stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        return process.wait() != 0


def test_a_killed_training_resumes_and_ends_with_the_same_bits(tmp_path):
    path, delays = tmp_path / "run.npz", np.random.default_rng().uniform(0, 0.1, 6)
    whole = digest(*train_small(steps=40))
    (tmp_path / "run.npz.0123abcd.part").write_bytes(b"left by a killed run")
    (tmp_path / "other.npz.0123abcd.part").write_bytes(b"of another")
    assert sum(killed(path, delay) for delay in delays)
    assert digest(*train_small(steps=40, checkpoint=path)) == whole, delays
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.npz.0123abcd.part", "run.npz"]


def test_a_link_is_followed_and_rights_are_those_of_a_new_file(tmp_path):
    net, path = small_painter(), tmp_path / "net.npz"
    (tmp_path / "store").mkdir()
    path.symlink_to(tmp_path / "store" / "real.npz")
    coordref.save(path, net)
    assert path.is_symlink() and same(coordref.load(path, net), net)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


# THREADS AND PROCESSES ---------------------------------------------------------------------------

def test_threads_may_call_every_function_at_once(tmp_path):
    """Eight threads, every function, the bits of one thread; and nothing is left behind."""
    jobs, data = [], coordref.not_so_clevr(canvas=12, square=3)
    for i, (name, shapes, options) in enumerate(PAIRS):
        arrays = [normal(i + j, *s) if isinstance(s, tuple) else s for j, s in enumerate(shapes)]
        try:
            y = getattr(coordref, name)(*arrays, **options)
        except (TypeError, ValueError):
            continue
        jobs.append((getattr(coordref, name), arrays, options))
        jobs.append((getattr(coordref, name + "_backward"), [np.ones_like(y), *arrays], options))
    large = [normal(i, *s, dtype=np.float32) for i, s in
             enumerate([(4, 16, 64, 60), (24, 18, 3, 3), (24,), (4, 24, 64, 60)])]
    jobs.append((coordref.coord_conv, large[:3], {"padding": 1}))
    jobs.append((coordref.coord_conv_backward, [large[3], *large[:3]], {"padding": 1}))
    jobs.append((coordref.conv_backward, [large[3], large[0], large[1][:, :16], large[2]],
                 {"padding": 1}))
    hot = coordref.encode(np.random.default_rng(0).integers(0, 40, (900, 2)), (40, 50))
    jobs += [(coordref.decode, [hot], {}), (coordref.not_so_clevr, [], {"canvas": 12}),
             (coordref.he_normal, [(3, 4)], {"rng": 0}), (coordref.axis_coords, [7], {}),
             (coordref.coord_channels, [(5, 7)], {"radius": True}),
             (train_small, [], {"steps": 2}),
             (coordref.forward, [coordref.decoder_network((40, 50)), hot], {}),
             (coordref.evaluate, [small_painter(), data], {"task": "classification"}),
             (lambda: coordref.save(tmp_path / "net.npz", small_painter()), [], {}),
             (lambda: coordref.load(tmp_path / "net.npz", small_painter()), [], {})]
    assert len(jobs) > 50
    wanted = [leaves(f(*a, **o)) for f, a, o in jobs]
    blas, barrier = coordref._blas(), threading.Barrier(8)
    before = blas and blas[0]()

    def wrong(seed):
        barrier.wait()
        return [jobs[i] for i in np.random.default_rng(seed).permutation(len(jobs))
                if leaves(jobs[i][0](*jobs[i][1], **jobs[i][2])) != wanted[i]]
    with ThreadPoolExecutor(8) as pool:
        assert [*itertools.chain(*pool.map(wrong, range(8)))] == []
    assert coordref._calls == [] and not coordref._one_team.locked()
    assert before == (blas and blas[0]())


def test_the_number_of_blas_threads_does_not_change_a_bit():
    if coordref._blas() is None:
        pytest.skip("numpy has another BLAS than OpenBLAS")
    get_threads, set_threads = coordref._blas()
    before = get_threads()
    for H, W in ((511, 509), (700, 300), (512, 512)):       # sums long enough to be shared out
        x, w, dy = (normal(i, *s, dtype=np.float32) for i, s in
                    enumerate([(1, 1, H, W), (64, 3, 3, 3), (1, 64, H - 2, W - 2)]))
        found = []
        try:
            for threads in (1, 2):
                set_threads(threads)
                found.append(leaves([coordref.coord_conv(x, w), coordref.coord_conv_backward(
                    dy, x, w, need_dx=False)]))
                assert get_threads() == threads
        finally:
            set_threads(before)
        assert found[0] == found[1]


def leaves(value):
    """The bits of a result of any nesting."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaves(v) for v in value]
    return value.tobytes() if hasattr(value, "tobytes") else value


def in_processes(ranks, job):
    """job(rank, all_reduce) in as many threads, as processes with a common sum would run it; the
    sum is taken in an order that changes from call to call."""
    parts, barrier, sums = [None] * ranks, threading.Barrier(ranks), itertools.count()

    def all_reduce(rank, a):
        assert a.ndim == 1
        parts[rank] = a
        if barrier.wait(60) == 0:
            order = np.random.default_rng(next(sums)).permutation(ranks)
            all_reduce.total = sum(parts[i] for i in order)
        barrier.wait(60)
        return all_reduce.total.copy()

    with ThreadPoolExecutor(ranks) as pool:
        jobs = [pool.submit(job, rank, functools.partial(all_reduce, rank))
                for rank in range(ranks)]
        return [j.exception() or j.result() for j in jobs]


def digests(name, ranks, **options):
    found = in_processes(ranks, lambda rank, all_reduce: run(name, all_reduce=all_reduce,
                                                             **options))
    return [f if isinstance(f, Exception) else digest(*f) for f in found]


@pytest.mark.parametrize("name", RUNS)
def test_the_number_of_processes_does_not_change_a_bit(name, tmp_path):
    whole, path = digest(*run(name)), tmp_path / "run.npz"
    for ranks in (1, 2, 4, 7) if name == "painter" else (3,):   # 7: more than there are shards
        assert digests(name, ranks) == [whole] * ranks
    half = RUNS[name]["steps"] // 2
    digests(name, 2, checkpoint=path, callback=lambda step, net, loss: step == half)
    assert digests(name, 3, checkpoint=path) == [whole] * 3     # nor does a change of it


def test_a_sum_in_another_order_is_seen(monkeypatch):
    def add_first(work, shards, vector, all_reduce, rank, ranks):
        return all_reduce(sum((work(s) for s in shards[rank::ranks]), np.zeros(*vector)))
    whole = digest(*run("painter"))
    monkeypatch.setattr(coordref, "_sum_of_shards", add_first)
    assert digests("painter", 3)[0] != whole


def test_processes_that_differ_are_refused(tmp_path):
    def differ(**options):
        return in_processes(2, lambda rank, all_reduce: train_small(
            all_reduce=all_reduce, **{k: v[rank] for k, v in options.items()}))
    other = coordref.coordconv_painter(size=(12, 12), rng=9)
    train_small(checkpoint=tmp_path / "run.npz")
    for options in ({"rng": (1, 2)}, {"steps": (7, 8)}, {"net": (small_painter(), other)},
                    {"l2": (0, 1e-3)}, {"checkpoint": (tmp_path / "run.npz", tmp_path / "b.npz")},
                    {"rng": (np.random.default_rng(1), np.random.default_rng(2))}):
        for error in differ(**options):
            assert isinstance(error, ValueError) and "2 processes" in str(error)
    for wrong, kind in ((lambda a: None, TypeError), (lambda a: a[:-1], TypeError),
                        (lambda a: a.astype(float), TypeError), (lambda a: a.tolist(), TypeError),
                        (lambda a: 2 * a, ValueError), (lambda a: 0 * a, ValueError),
                        (lambda a: a * np.nan, ValueError)):
        with pytest.raises(kind, match="all_reduce must return the sum"):
            train_small(all_reduce=wrong)


@pytest.mark.parametrize("options, error, named", [
    ({"checkpoint": 7}, TypeError, "checkpoint"), ({"checkpoint_every": 0}, ValueError, "every"),
    ({"checkpoint_every": 1.5}, TypeError, "every"), ({"all_reduce": 3}, TypeError, "all_reduce"),
    ({"all_reduce": abs, "rng": None}, ValueError, "rng"), ({"beta1": 1.0}, ValueError, "beta1"),
    ({"beta2": "x"}, TypeError, "beta2"), ({"eps": -1}, ValueError, "eps")])
def test_bad_arguments_of_a_run_get_a_sentence(options, error, named):
    with pytest.raises(error, match=f"^train: .*{named}"):
        train_small(**options)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_example_with_mpi_of_the_readme(ranks, tmp_path):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]))
    if mpiexec is None:
        pytest.skip("there is no mpiexec (pip install mpich)")
    readme = (HERE / "README.md").read_text()
    code, = re.findall(r"```python\n(from mpi4py.*?)```", readme, re.DOTALL)
    assert len(code.splitlines()) <= 10
    (tmp_path / "example.py").write_text(code.replace("steps=60", "steps=3"))
    subprocess.run([mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", "example.py"],
                   cwd=tmp_path, check=True, timeout=300,
                   env={**os.environ, "PYTHONPATH": str(HERE)})
    start = coordref.coordconv_painter(start="relative", rng=0)
    net, _ = coordref.train(start, coordref.not_so_clevr(), task="classification", steps=3,
                            learning_rate=0.01, rng=0)
    assert same(coordref.load(tmp_path / "painter.npz", start), net)
