# SPDX-License-Identifier: MIT
"""Proof of coordref.py: laws first, then literals, then agreement with other libraries.

Every shape has distinct sizes, so that swapped axes show; every upstream gradient is random, so
that permuted filters show; every random input is signed. Tests that take xp run three times: on
NumPy, on a strict stand-in for CuPy, and on CuPy itself where a GPU answers.
"""

import ast
import contextlib
import doctest
import errno
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import operator
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import typing
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.signal

import bench
import coordref
from coordref import Layer, affine, conv

HERE = Path(coordref.__file__).parent
GPU = coordref.best_module()
NO_GPU = ("no device answers through CuPy" if importlib.util.find_spec("cupy")
          else "CuPy is not installed")


# THE STAND-IN: a strict CuPy for machines without a GPU ------------------------------------------
#
# A module of the host that offers what coordref may use of CuPy, names and keywords, and no more.
# Its arrays never turn into NumPy arrays or mix with them, and a transfer is refused unless the
# function that asks for it stands in ASKED. This is stricter than CuPy, which makes some transfers
# without a word. What it cannot show: kernels, speed, the rounding of cuBLAS.

class Leak(AssertionError):
    """A use of a device array that CuPy refuses, or pays for with a transfer nobody asked for."""


ASKED = {           # upload: an array to the device; get: one to the host; read: a number
    "best_module": "read", "coordconv_painter": "upload", "decode": "read",
    "decoder_network": "upload", "encode": "upload read", "encoder_network": "upload",
    "evaluate": "upload read", "he_normal": "upload", "load": "upload", "_log_softmax": "read",
    "save": "get", "train": "upload get", "_contents": "get", "_digest": "get",
    "_finite": "get read", "_join": "upload get",
}
MOVED = []          # the transfers that the module under test asked for
DOUBLES = set()     # the functions of that module that made float64 arrays


def asker():
    """The function of the module under test that led here; None where a test did."""
    frame = sys._getframe(1)
    here = frame.f_code.co_filename
    while frame and frame.f_code.co_filename == here:
        frame = frame.f_back
    while frame and "array_module" in frame.f_globals:
        name = frame.f_code.co_name
        if name in frame.f_globals and name != "to_numpy":      # neither nested nor in between
            return name
        frame = frame.f_back
    return None


def transfer(kind):
    who = asker()
    if who:
        MOVED.append(kind)
        if kind not in ASKED.get(who, ""):
            raise Leak(f"{who}: {kind} of a device array")


def wrap(y):
    """Results stay on the device, single numbers too."""
    if type(y) in (tuple, list):
        return type(y)(map(wrap, y))
    y = np.asarray(y)
    if y.dtype == np.float64:
        DOUBLES.add(asker())
    return DeviceArray(y)


def unwrap(a):
    if type(a) is DeviceArray:
        return a.host
    if isinstance(a, np.ndarray):
        raise Leak("Unsupported type <class 'numpy.ndarray'>")
    return type(a)(map(unwrap, a)) if type(a) in (tuple, list) else a


def call(f, args, options):
    """f of what is behind device arrays. To widen an array to float64 without astype is refused:
    on a GPU that is slow."""
    args = unwrap(args)
    y = f(*args, **{k: unwrap(v) for k, v in options.items()})
    operands = (*args, *(args[0] if type(args[0]) in (tuple, list) else ()))
    kinds = [getattr(a, "dtype", None) for a in (y, *operands)]
    if np.float64 in kinds and (np.float32 in kinds or np.float16 in kinds) and kinds[0] != bool:
        raise Leak(f"{f.__name__}: float64 meets float32 or float16")
    return options["out"] if options.get("out") is not None else wrap(y)


class DeviceArray:
    """An array that only the stand-in can read."""
    __array_ufunc__ = None          # NumPy leaves an operator with a device array to the latter
    __hash__ = None

    def __init__(self, host):
        self.host = host

    def __array__(self, *args, **options):
        raise Leak("Implicit conversion to a NumPy array is not allowed")

    def __array_function__(self, function, *args):
        raise Leak(f"numpy.{function.__name__} of a device array")

    def __repr__(self):
        return f"<device array {self.dtype} {self.shape}>"

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (self[i] for i in range(len(self.host)))

    def get(self):
        transfer("get")
        return self.host.copy()

    def read(self):
        transfer("read")
        return self.host

    def key(self, key):
        """An index: whole numbers, slices and device arrays; those of the host are uploaded."""
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, (np.ndarray, list)) for k in parts):
            raise Leak("an index array of the host")
        return unwrap(key)

    def __getitem__(self, key):
        if any(k.dtype == bool for k in (key if isinstance(key, tuple) else (key,))
               if isinstance(k, DeviceArray)):
            transfer("read")                # of the length of the result
        return wrap(self.host[self.key(key)])

    def __setitem__(self, key, value):
        value, kinds = unwrap(value), (self.dtype, getattr(value, "dtype", self.dtype))
        if kinds[1].kind == "f" and kinds[0] != kinds[1]:
            raise Leak(f"{kinds[1]} is written into {kinds[0]}")
        self.host[self.key(key)] = value

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        return self if self.dtype == dtype and not copy else wrap(self.host.astype(dtype, order))


# Names and keywords as in CuPy 14; a test compares them with the wheel where that is installed.
SURFACE = """
empty zeros ones: shape, dtype=float, order="C"
full: shape, fill_value, dtype=None, order="C"
arange: start, stop=None, step=1, dtype=None
empty_like zeros_like ones_like: a, dtype=None, order="K"
ascontiguousarray asfortranarray: a, dtype=None
sum prod mean argmax argmin: a, axis=None, dtype=None, out=None, keepdims=False
max min any all: a, axis=None, out=None, keepdims=False
var std: a, axis=None, dtype=None, out=None, ddof=0, keepdims=False
cumsum cumprod: a, axis=None, dtype=None, out=None
count_nonzero squeeze flip: a, axis=None
clip: a, a_min, a_max, out=None
where: condition, x, y
concatenate stack: tup, axis=0, out=None, *, dtype=None, casting="same_kind"
broadcast_to: array, shape
moveaxis: a, source, destination
roll: a, shift, axis=None
take: a, indices, axis=None, out=None
repeat: a, repeats, axis=None
tensordot: a, b, axes=2
einsum: *operands
dot: a, b, out=None
unravel_index: indices, dims, order="C"
matmul add subtract multiply divide true_divide floor_divide remainder power maximum minimum \
arctan2 hypot logaddexp bitwise_and bitwise_or bitwise_xor left_shift right_shift logical_and \
logical_or equal not_equal less less_equal greater greater_equal: \
x1, x2, /, out=None, *, dtype=None, casting="same_kind"
absolute negative sqrt square exp expm1 log log1p sin cos tanh floor ceil rint trunc sign \
isfinite isinf isnan invert logical_not reciprocal: \
x, /, out=None, *, dtype=None, casting="same_kind"
"""


def stand_in():
    """The module, and the methods of its arrays, all through the functions of the surface."""
    device = types.ModuleType("cupy")
    device.ndarray = DeviceArray
    device.lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace())

    def offer(place, name, signature, f):
        fits, sequence = eval(f"lambda {signature}: None"), signature.startswith("tup")
        creates = signature.startswith(("shape", "start"))

        def function(*args, **options):
            try:
                fits(*args, **options)
            except TypeError as error:
                raise Leak(f"cupy.{name} has another signature: {error}") from None
            first = args[0] if sequence else args[:2]
            if not creates and not any(type(a) is DeviceArray for a in first):
                raise Leak(f"cupy.{name} got no device array")
            if isinstance(f, np.ufunc) and any(type(a) in (tuple, list) for a in args):
                raise Leak(f"cupy.{name} takes no lists")
            if name == "unravel_index":
                transfer("read")            # it looks for negative indices
            return call(f, args, options)
        setattr(place, name, function)
    for line in SURFACE.strip().splitlines():
        names, signature = line.split(": ")
        for name in names.split():
            offer(device, name, signature, getattr(np, name))
    offer(device.lib.stride_tricks, "as_strided", "x, shape=None, strides=None",
          np.lib.stride_tricks.as_strided)

    def asarray(a, dtype=None, order=None):
        if isinstance(a, DeviceArray):
            return a.astype(a.dtype if dtype is None else dtype, copy=False)
        transfer("upload")
        return wrap(np.array(a, dtype, order=order))
    device.asarray = device.array = asarray

    def methods(names, make):
        for name in names.split():
            setattr(DeviceArray, name, make(name))
    methods("dtype shape ndim size strides itemsize nbytes flags",
            lambda name: property(lambda a: getattr(a.host, name)))
    methods("__float__ __int__ __bool__ __complex__ item tolist",
            lambda name: lambda a: getattr(a.read(), name)())
    methods("reshape transpose swapaxes ravel flatten copy view __neg__ __abs__ __invert__",
            lambda name: lambda a, *args: call(getattr(np.ndarray, name), (a, *args), {}))
    methods("all any argmax argmin clip cumprod cumsum dot max mean min prod repeat squeeze std "
            "sum take var", lambda name: getattr(device, name))
    def operation(name, reflected=False, in_place=False):
        f = getattr(operator, name)

        def operate(a, b):
            if isinstance(b, (tuple, list)):
                raise Leak(f"{name} takes no lists")
            y = call(f, (b, a) if reflected else (a, b), {})
            return a if in_place else y
        return operate
    operators = ("add sub mul truediv floordiv mod pow matmul and or xor lshift rshift "
                 "lt le gt ge eq ne")
    for name in operators.split():
        setattr(DeviceArray, f"__{name}__", operation(f"__{name}__"))
        if hasattr(operator, f"__i{name}__"):
            setattr(DeviceArray, f"__r{name}__", operation(f"__{name}__", reflected=True))
            setattr(DeviceArray, f"__i{name}__", operation(f"__i{name}__", in_place=True))
    return device


STAND_IN = stand_in()


@pytest.fixture(params=["numpy", "stand-in", "cupy"])
def xp(request, monkeypatch):
    """The array module: NumPy, the stand-in for CuPy, and CuPy itself where a device answers."""
    if request.param == "numpy":
        return np
    if request.param == "cupy":
        if GPU is np:
            pytest.skip(NO_GPU)
        return GPU
    monkeypatch.setitem(sys.modules, "cupy", STAND_IN)
    return STAND_IN


def on(xp, value):
    """The arrays in it moved to the module xp."""
    if isinstance(value, np.ndarray):
        return xp.asarray(value)
    if isinstance(value, dict):
        return {k: on(xp, v) for k, v in value.items()}
    if isinstance(value, Layer):
        return Layer(value.op, on(xp, value.params), on(xp, value.options))
    return type(value)(on(xp, v) for v in value) if type(value) in (list, tuple) else value


def host(value):
    """The arrays in it as NumPy arrays."""
    if isinstance(value, (list, tuple)):
        return [host(v) for v in value]
    scalar = isinstance(value, (int, float, np.generic))
    return np.asarray(value) if scalar else coordref.to_numpy(value)


def normal(seed, *shape, dtype=np.float64, xp=np):
    return xp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def close(actual, wanted, terms=1, scale=None):
    """actual equals wanted to the rounding of sums of that many terms; NaN never passes."""
    actual, wanted = host(actual), host(wanted)
    eps = np.finfo(actual.dtype).eps
    if scale is None:
        scale = abs(wanted).max(initial=1)
    np.testing.assert_allclose(actual, wanted.astype(actual.dtype), rtol=0, strict=True,
                               atol=8 * eps * math.sqrt(terms) * float(scale))


def dot(a, b):
    return float((host(a).astype(float) * host(b).astype(float)).sum())


# ORACLES: the definitions as loops ---------------------------------------------------------------

def conv_by_definition(x, w, b, stride, pads, dilation, groups):
    """y[n, f, o] = b[f] + sum_{c, k} x[n, c, o*stride + k*dilation - before] * w[f, c, k]."""
    N, _, *size = x.shape
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


def random_conv(seed, xp=np):
    """The arguments of a random convolution of rank 1 to 3."""
    rng = np.random.default_rng(seed)
    rank, G = rng.integers(1, 4), int(rng.integers(1, 3))

    def one_to(high):
        return tuple(int(i) for i in rng.integers(1, high + 1, rank))
    kernel = (1,) * rank if rng.random() < 0.2 else one_to(3)
    stride = (1,) * rank if rng.random() < 0.4 else one_to(3)
    dilation = one_to(2)
    pads = tuple((int(p), int(q)) for p, q in rng.integers(0, 4, (rank, 2)))
    size = [max(1, (k - 1) * d + 1 - p - q) + int(rng.integers(0, 5))
            for k, d, (p, q) in zip(kernel, dilation, pads)]
    N, C, F = int(rng.integers(0, 4)), G * int(rng.integers(1, 4)), G * int(rng.integers(1, 4))
    x, w, b = (xp.asarray(rng.standard_normal(shape)) for shape in
               ((N, C, *size), (F, C // G, *kernel), F))
    if rng.random() < 0.3:
        x = xp.asfortranarray(x)
    if rng.random() < 0.3:
        x, w = x[..., ::-1], w[:, :, ::-1]
    return x, w, b, stride, pads, dilation, G


# LAWS --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block, short", [(1, 16), (320, 1), (2 ** 23, 1), (2 ** 23, 7),
                                          (2 ** 23, 99)])
@pytest.mark.parametrize("seed", range(40))
def test_convolution_is_its_definition_and_its_gradients_are_its_transposes(seed, block, short, xp,
                                                                            monkeypatch):
    """<conv(x, w), g> = <x, dx> = <w, dw>: convolution is linear in x and in w."""
    monkeypatch.setattr(coordref, "_BLOCK", block)          # points, images, and between
    monkeypatch.setattr(coordref, "_SHORT", short)          # rows, images, or all in one
    x, w, b, stride, pads, dilation, groups = random_conv(seed, xp)
    options = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}
    before = [host(a).copy() for a in (x, w, b)]
    y = conv(x, w, b, **options)
    close(y, conv_by_definition(*before, stride, pads, dilation, groups), terms=w[0].size)
    g = normal(seed + 1, *y.shape, xp=xp)
    dx, dw, db = coordref.conv_backward(g, x, w, b, **options)
    assert (dx.shape, dw.shape, db.shape) == (x.shape, w.shape, b.shape)
    linear = dot(conv(x, w, **options), g)
    tolerance = 1e-12 * (1 + np.sqrt(dot(y, y) * dot(g, g)))
    assert abs(dot(x, dx) - linear) <= tolerance
    assert abs(dot(w, dw) - linear) <= tolerance
    close(db, g.sum(axis=(0, *range(2, g.ndim))), terms=g.size)
    for a, kept in zip((x, w, b), before):
        assert np.array_equal(host(a), kept)


@pytest.mark.parametrize("seed", range(40))
def test_transposed_convolution_is_the_gradient_of_convolution_by_its_input(seed, xp):
    x, w, _, stride, pads, dilation, groups = random_conv(seed, xp)
    options = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}
    y = conv(x, w, **options)
    # output_padding brings back the rows that the stride skipped
    skipped = tuple((n + p + q - (k - 1) * d - 1) % s for n, (p, q), k, d, s in
                    zip(x.shape[2:], pads, w.shape[2:], dilation, stride))
    g = normal(seed, *y.shape, xp=xp)
    dx, _, _ = coordref.conv_backward(g, x, w, **options)
    close(coordref.conv_transpose(g, w, output_padding=skipped, **options), dx, terms=w.size)
    bias = normal(seed + 1, x.shape[1], xp=xp)
    z = coordref.conv_transpose(g, w, bias, output_padding=skipped, **options)
    close(z, dx + bias.reshape(-1, *(1,) * len(stride)), terms=w.size)
    u = normal(seed + 2, *z.shape, xp=xp)
    dg, dw, db = coordref.conv_transpose_backward(u, g, w, bias, output_padding=skipped, **options)
    tolerance = 1e-12 * (1 + np.sqrt(dot(dx, dx) * dot(u, u)))
    assert abs(dot(g, dg) - dot(dx, u)) <= tolerance
    assert abs(dot(w, dw) - dot(dx, u)) <= tolerance
    close(db, u.sum(axis=(0, *range(2, u.ndim))), terms=u.size)


@pytest.mark.parametrize("seed", range(60))
def test_coord_conv_is_conv_after_add_coords(seed, xp):
    rng = np.random.default_rng(seed)
    x, w, b, stride, pads, dilation, _ = random_conv(seed, xp)
    if seed % 3 == 0:
        pads = ((0, 0),) * len(pads)
        w = w[(..., *(slice(0, 1),) * len(pads))]
    rank, size, C = len(stride), x.shape[2:], x.shape[1]
    radius, scale = bool(rng.integers(2)), ["unit", "pixel"][rng.integers(2)]
    coords = {"radius": radius, "scale": scale}
    options = {"stride": stride, "padding": pads, "dilation": dilation}
    w = normal(seed + 1, len(b), C + rank + radius, *w.shape[2:], xp=xp)
    tiled = {}
    if seed % 2:
        x, tiled = normal(seed + 2, x.shape[0], C, *(1,) * rank, xp=xp), {"size": size}
    full = xp.broadcast_to(x, x.shape[:2] + size)
    joined = coordref.add_coords(full, **coords)
    y = coordref.coord_conv(x, w, b, **tiled, **coords, **options)
    close(y, conv(joined, w, b, **options), terms=w[0].size)
    g = normal(seed + 3, *y.shape, xp=xp)
    got = coordref.coord_conv_backward(g, x, w, b, **tiled, **coords, **options)
    djoined, dw, db = coordref.conv_backward(g, joined, w, b, **options)
    dx = coordref.add_coords_backward(djoined, full, **coords)
    if tiled:
        dx = dx.sum(axis=tuple(range(2, x.ndim)), keepdims=True)
    for a, wanted in zip(got, (dx, dw, db)):
        close(a, wanted, terms=max(g.size, 1), scale=10 * abs(host(wanted)).max(initial=1))


def test_shift_equivariance_and_its_loss_with_coordinates(xp):
    x, w, v = (normal(i, *s, xp=xp) for i, s in
               enumerate([(2, 3, 9, 11), (4, 3, 3, 2), (4, 5, 3, 2)]))
    moved = xp.roll(x, (1, 2), axis=(2, 3))
    inside = (..., slice(2, None), slice(3, None))
    close(conv(moved, w)[inside], xp.roll(conv(x, w), (1, 2), axis=(2, 3))[inside], terms=18)
    y, z = coordref.coord_conv(x, v), coordref.coord_conv(moved, v)
    assert abs(z[inside] - xp.roll(y, (1, 2), axis=(2, 3))[inside]).max() > 0.1


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
    options = on(xp, options)
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


# PROPERTIES: random shapes, and whole numbers, so that equality is exact in any order ------------

def random_case(seed):
    """Sizes, dtype and options of a convolution of rank 1 to 3; axes of no length are among them.
    The image is chosen by what it leaves: N, C, F, G, size, kernel, options, out, dtype."""
    rng = np.random.default_rng(seed)
    rank, G = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 3]))
    kernel, stride, dilation = (tuple(map(int, rng.integers(1, high, rank)))
                                for high in rng.choice([2, 3, 4], 3))
    most = rng.choice([1, 3, 6])
    pads = tuple(tuple(map(int, pair)) for pair in rng.integers(0, most, (rank, 2)))
    out = tuple(map(int, rng.integers(1, (24, 8, 4)[rank - 1], rank)))
    size = tuple(max(int(rng.random() < 0.9),
                     (o - 1) * s + (k - 1) * d + 1 - p - q + int(rng.integers(0, s)))
                 for o, s, k, d, (p, q) in zip(out, stride, kernel, dilation, pads))
    out = tuple((n + p + q - (k - 1) * d - 1) // s + 1
                for n, s, k, d, (p, q) in zip(size, stride, kernel, dilation, pads))
    N, C, F = map(int, rng.choice([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3], 3) * (1, G, G))
    dtype = rng.choice([np.float16, np.float32, np.float64])
    options = {"stride": stride, "padding": pads, "dilation": dilation}
    return rng, (N, C, *size), (F, C // G, *kernel), (N, F, *out), G, options, dtype


def random_array(rng, shape, dtype, xp, special=False):
    """Small whole numbers, some of them NaN or infinite if asked for, in one of five orders of
    memory, read-only where the module knows that."""
    a = rng.integers(-2, 3, shape).astype(dtype)
    if special and a.size:
        a.flat[rng.integers(0, a.size, 2)] = rng.choice([np.nan, np.inf, -np.inf], 2)
    a, order = xp.asarray(a), rng.integers(5)
    if order == 1:
        a = xp.asfortranarray(a)
    elif order == 2:                                                    # reversed in memory
        a = xp.ascontiguousarray(a[..., ::-1])[..., ::-1]
    elif order == 3:                                                    # every other element
        wide = xp.zeros((*shape[:-1], 2 * shape[-1]), dtype)
        wide[..., ::2] = a
        a = wide[..., ::2]
    elif order == 4 and len(shape) > 1:                                 # channels last
        a = xp.moveaxis(xp.ascontiguousarray(xp.moveaxis(a, 1, -1)), -1, 1)
    if xp in (np, STAND_IN):
        getattr(a, "host", a).flags.writeable = False
    return a


def by_taps(x, w, y, G, options):
    """The definition, one tap of the kernel at a time: y, and dx and dw for dy = y, in float64."""
    x, w, dy = (host(a).astype(float) for a in (x, w, y))
    pads = ((0, 0), (0, 0), *options["padding"])
    x = np.pad(x, pads)
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    F, C, axes = w.shape[0] // G, w.shape[1], (0, *range(2, x.ndim))
    for tap in np.ndindex(*w.shape[2:]):
        seen = tuple(slice(k * d, k * d + (n - 1) * s + 1, s) for k, d, n, s in
                     zip(tap, options["dilation"], y.shape[2:], options["stride"]))
        for g in range(G):
            f, c = slice(g * F, (g + 1) * F), slice(g * C, (g + 1) * C)
            part, weights = x[(slice(None), c, *seen)], w[(f, slice(None), *tap)]
            y[:, f] += np.einsum("nc...,fc->nf...", part, weights)
            dx[(slice(None), c, *seen)] += np.einsum("nf...,fc->nc...", dy[:, f], weights)
            dw[(f, slice(None), *tap)] = np.tensordot(dy[:, f], part, (axes, axes))
    inside = tuple(slice(p, n - q) for n, (p, q) in zip(x.shape, pads))
    return y, dx[inside], dw


def exact(found, wanted, dtype):
    for a, b in zip(found, wanted):
        assert a.dtype == dtype and a.shape == b.shape
        assert np.array_equal(host(a), b.astype(dtype), equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value")         # inf - inf is NaN, as it should be
@pytest.mark.parametrize("block", range(10))
def test_properties_of_random_convolutions(block, xp):
    """Definition, gradients, adjoint identity, dtype, any order of memory, no axis too short, NaN
    and infinity as arithmetic has them; and nothing writes to an argument."""
    for seed in range(100 * block, 100 * block + (20 if xp is STAND_IN else 100)):
        rng, x, w, y, G, options, dtype = random_case(seed)
        special = seed % 4 == 0
        x, dy = (random_array(rng, s, dtype, xp, special) for s in (x, y))
        w, b = (random_array(rng, s, dtype, xp) for s in (w, w[:1]))
        kept = [host(a).copy() for a in (x, w, b, dy)]
        y = conv(x, w, b, groups=G, **options)
        dx, dw, db = coordref.conv_backward(dy, x, w, b, groups=G, **options)
        wanted = by_taps(x, w, dy, G, options)
        bias = host(b).astype(float).reshape(-1, *(1,) * (x.ndim - 2))
        sums = host(dy).astype(float).sum(axis=(0, *range(2, x.ndim)))
        exact((y, dx, dw, db), (wanted[0] + bias, *wanted[1:], sums), dtype)
        if not special and dtype != np.float16:
            assert dot(x, dx) == dot(w, dw) == dot(y, dy) - dot(b, db)
        for a, before in zip((x, w, b, dy), kept):
            assert np.array_equal(host(a), before, equal_nan=True)


@pytest.mark.parametrize("block", range(10))
def test_properties_of_random_transposed_and_coordinate_convolutions(block, xp):
    for seed in range(100 * block, 100 * block + (20 if xp is STAND_IN else 100)):
        rng, x, w, y, G, options, dtype = random_case(seed)
        # the gradient of a convolution, so the image takes the place of the output
        if min(x[2:]) and min(y[2:]):
            dy, image, w_ = (random_array(rng, s, dtype, xp) for s in (y, x, w))
            skipped = tuple((n + p + q - (k - 1) * d - 1) % s for n, (p, q), k, d, s in zip(
                x[2:], options["padding"], w[2:], options["dilation"], options["stride"]))
            more = {**options, "groups": G, "output_padding": skipped}
            _, dx, dw = by_taps(image, w_, dy, G, options)
            wanted = by_taps(image, w_, dy, G, options)[0]
            exact([coordref.conv_transpose(dy, w_, **more)], [dx], dtype)
            exact(coordref.conv_transpose_backward(image, dy, w_, **more)[:2], [wanted, dw], dtype)
        if not min(x[2:]):
            continue
        # coordinates in pixels are whole numbers; w takes them after the channels
        tiled, size, rank = seed % 2, x[2:], len(x) - 2
        image = random_array(rng, x[:2] + (1,) * rank if tiled else x, dtype, xp)
        w_ = random_array(rng, (y[1], x[1] + rank, *w[2:]), dtype, xp)
        dy = random_array(rng, y, dtype, xp)
        more = {**options, "scale": "pixel", **({"size": size} if tiled else {})}
        coords = np.broadcast_to(np.indices(size), (x[0], rank, *size))
        joined = np.concatenate([np.broadcast_to(host(image), x), coords], axis=1)
        wanted, dx, dw = by_taps(joined, w_, dy, 1, options)
        dx = dx[:, :x[1]]
        dx = dx.sum(axis=tuple(range(2, rank + 2)), keepdims=True) if tiled else dx
        exact([coordref.coord_conv(image, w_, **more)], [wanted], dtype)
        exact(coordref.coord_conv_backward(dy, image, w_, **more)[:2], [dx, dw], dtype)


def memory_left(x, w, options):
    """Of three times the input, the output and 64 MiB."""
    x, w = np.ones(x, np.float32), np.ones(w, np.float32)
    tracemalloc.start()
    y = conv(x, w, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return 3 * x.nbytes + y.nbytes + 2 ** 26 - peak


@pytest.mark.parametrize("x, w, options", [
    ((8, 16, 256, 256), (4, 16, 3, 3), {"padding": 1}),
    ((8, 16, 256, 256), (16, 1, 7, 7), {"groups": 16}),
    ((4, 3, 512, 800), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    ((4, 8, 400, 512), (2, 8, 5, 5), {"dilation": 3, "padding": "same"}),
    ((2, 4, 2 ** 19), (3, 4, 9), {}),
    ((1, 8, 64, 128, 64), (2, 8, 3, 3, 3), {"padding": 1}),
    ((64, 32, 512, 3), (8, 32, 5, 3), {"padding": 1}),
    ((23, 7, 18, 19, 6), (77, 7, 11, 9, 4), {"stride": (1, 1, 2), "padding": "same"}),
    ((12, 167, 6, 10, 1), (47, 167, 2, 9, 4), {"padding": 3}),
    ((200, 97, 2, 2, 2), (194, 1, 5, 10, 7),
     {"groups": 97, "stride": (2, 4, 4), "dilation": (2, 1, 8), "padding": "same"}),
])
def test_convolution_takes_a_bounded_memory(x, w, options):
    assert memory_left(x, w, options) >= 0


def test_the_bound_of_memory_sees_all_columns_at_once(monkeypatch):
    monkeypatch.setattr(coordref, "_blocks", lambda N, out, *sizes: [
        tuple(slice(0, n) for n in (N, *out))])
    assert memory_left((8, 16, 256, 256), (16, 2, 7, 7), {"groups": 8}) < 0


HUGE = 10 ** 7
PIXEL, KERNEL = np.ones((1, 1, 1, 1), np.float32), np.ones((1, 1, 3, 3), np.float32)


@pytest.mark.parametrize("name, args, options, named", [
    ("axis_coords", [HUGE ** 2], {}, "n"),
    ("coord_channels", [(HUGE, HUGE)], {}, "size"),
    ("coord_channels", [(10 ** 30, 2)], {}, "size"),
    ("conv", [PIXEL, KERNEL], {"padding": HUGE}, "padding"),
    ("conv", [PIXEL, KERNEL], {"padding": HUGE, "stride": HUGE}, "padding"),
    ("conv", [PIXEL, KERNEL], {"padding": "same", "dilation": HUGE}, "padding"),
    ("conv_transpose", [KERNEL, KERNEL], {"stride": HUGE}, "stride"),
    ("conv_transpose", [KERNEL, KERNEL], {"dilation": HUGE}, "dilation"),
    ("coord_conv", [PIXEL, np.ones((1, 3, 1, 1), np.float32)], {"size": (HUGE, HUGE)}, "size"),
    ("max_pool", [PIXEL], {"kernel": HUGE, "padding": HUGE - 1}, "padding"),
    ("encode", [np.array([[1, 2]]), (HUGE, HUGE)], {}, "size"),
    ("he_normal", [(HUGE, HUGE)], {}, "size"),
    # within what a process can address, NumPy says how much it could not have
    ("coord_channels", [(HUGE, 10 ** 6)], {}, None),
    ("conv", [PIXEL, KERNEL], {"padding": 10 ** 6}, None),
    ("conv_transpose", [KERNEL, KERNEL], {"stride": 10 ** 6}, None),
    ("coord_conv", [PIXEL, np.ones((2, 3, 3, 3), np.float32)], {"size": (10 ** 6, 10 ** 7)}, None),
    ("coord_conv", [PIXEL, np.ones((2, 3, 1, 1), np.float32)], {"padding": 10 ** 6}, None),
    ("encode", [np.array([[1, 2]]), (10 ** 6, 10 ** 7)], {}, None),
])
def test_what_no_memory_holds_is_refused_before_work_starts(name, args, options, named,
                                                            monkeypatch):
    for work in ("_spread", "_reads", "_contract"):
        monkeypatch.setattr(coordref, work, lambda *args: pytest.fail("work has started"))
    with pytest.raises(ValueError if named else MemoryError) as caught:
        getattr(coordref, name)(*args, **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and named in message if named else "iB" in message


# COORDINATES -------------------------------------------------------------------------------------

def test_coordinates_that_a_person_can_check(xp):
    x = xp.asarray(np.full((1, 1, 2, 3), 7, np.float32))
    y = host(coordref.add_coords(x, radius=True))
    assert y.dtype == np.float32
    assert y[0, :3].tolist() == [[[7, 7, 7], [7, 7, 7]], [[-1, -1, -1], [1, 1, 1]],
                                 [[-1, 0, 1], [-1, 0, 1]]]
    close(y[0, 3], np.sqrt([[2, 1, 2], [2, 1, 2]]))
    pixel = coordref.coord_channels((2, 3), scale="pixel", xp=xp)
    assert pixel.tolist() == [[[0, 0, 0], [1, 1, 1]], [[0, 1, 2], [0, 1, 2]]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 49, 64, 65, 1000])
def test_an_axis_is_antisymmetric_to_the_last_bit(n, dtype, xp):
    c = host(coordref.axis_coords(n, dtype=dtype, xp=xp))
    assert c.dtype == dtype and c.shape == (n,)
    assert np.array_equal(c, -c[::-1])
    assert (c[0], c[-1]) == ((-1, 1) if n > 1 else (0, 0))
    if n > 1:
        close(c, np.linspace(-1, 1, n))


@pytest.mark.parametrize("size", [(5,), (1,), (3, 7), (1, 4), (4, 1), (3, 5, 7), (2, 3, 1, 5)])
def test_channels_follow_the_axes_and_the_radius_is_their_norm(size, xp):
    options = {"radius": True, "dtype": np.float64, "xp": xp}
    for scale in ("unit", "pixel"):
        y = host(coordref.coord_channels(size, scale=scale, **options))
        assert y.shape == (len(size) + 1, *size)
        for a, n in enumerate(size):
            line = coordref.axis_coords(n, scale=scale, dtype=np.float64)
            for i in np.ndindex(*size):
                assert y[(a, *i)] == line[i[a]]
        close(y[-1], np.sqrt((y[:-1] ** 2).sum(axis=0)))
    centre = coordref.coord_channels((3, 5), **options)[:, 1, 2]
    assert centre.tolist() == [0, 0, 0]


# LITERALS OF CONVOLUTION -------------------------------------------------------------------------

def test_a_delta_kernel_shifts_the_image(xp):
    x = normal(0, 2, 1, 4, 5, xp=xp)
    w = xp.zeros((1, 1, 3, 3))
    w[0, 0, 0, 2] = 1                                       # reads one up, one right
    x, y = host(x), host(conv(x, w, padding=1))
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
    assert y.dtype == dtype and y[0, 0].tolist() == wanted


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
    y = coordref.conv_transpose(x, xp.ones((1, 2, 3, 3)), **options)
    assert y[0, 0].tolist() == wanted and y[0, 1].tolist() == wanted


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size, dilation", [(1, 1), (4, 1), (5, 2), (6, 2), (7, 1)])
def test_same_divides_the_size_and_puts_the_odd_pixel_after(size, kernel, stride, dilation, xp):
    x, w = normal(0, 1, 1, size, xp=xp), normal(1, 1, 1, kernel, xp=xp)
    y = conv(x, w, stride=stride, dilation=dilation, padding="same")
    out = math.ceil(size / stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    pads = ((total // 2, total - total // 2),)
    assert y.shape == (1, 1, out)
    assert (y == conv(x, w, stride=stride, dilation=dilation, padding=pads)).all()
    z = coordref.conv_transpose(x, w, stride=stride, dilation=dilation, padding="same")
    assert z.shape == (1, 1, size * stride)
    g = normal(2, *z.shape, xp=xp)
    back = conv(g, w, stride=stride, dilation=dilation, padding="same")
    close(dot(back, x), dot(z, g), terms=99)


@pytest.mark.parametrize("dtype, bits", [(np.float16, 11), (np.float32, 24), (np.float64, 53)])
def test_integers_are_exact_and_the_dtype_stays(dtype, bits, xp):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, 3, 6, 7)).astype(dtype)
    w, b = rng.integers(-3, 4, (4, 3, 3, 2)).astype(dtype), np.arange(4).astype(dtype)
    assert 9 * 18 < 2 ** bits
    wanted = conv_by_definition(x.astype(float), w.astype(float), b, (2, 1), ((1, 1), (0, 0)),
                                (1, 1), 1)
    x, w, b = on(xp, [x, w, b])
    y = conv(x, w, b, stride=(2, 1), padding=(1, 0))
    assert y.dtype == dtype and np.array_equal(host(y), wanted)
    for g in coordref.conv_backward(y, x, w, b, stride=(2, 1), padding=(1, 0)):
        assert g.dtype == dtype


def test_half_precision_is_accumulated_in_single(xp):
    x, w = xp.full((1, 4096, 1), 1, np.float16), xp.full((1, 4096, 1), 1, np.float16)
    assert conv(x, w).item() == 4096                # adding ones in float16 stops at 2048
    x[0, 0], w[0, 0] = 60000, 1                     # and 60000 + 4095 * 1 fits, 60000 * 2 does not
    assert conv(x, w).item() == np.float16(64095)


def test_empty_axes_and_special_values_follow_arithmetic(xp):
    w, b = normal(0, 4, 3, 2, 3, xp=xp), normal(1, 4, xp=xp)
    assert conv(xp.zeros((0, 3, 5, 6)), w, b).shape == (0, 4, 4, 4)
    dx, dw, db = coordref.conv_backward(xp.zeros((0, 4, 4, 4)), xp.zeros((0, 3, 5, 6)), w, b)
    assert dx.shape == (0, 3, 5, 6) and not dw.any() and not db.any()
    assert (conv(xp.zeros((2, 0, 5)), xp.zeros((4, 0, 3)), b)[1, :, 0] == b).all()
    assert (conv(xp.zeros((1, 3, 0, 4)), w, b, padding=1)[0, :, 0, 0] == b).all()
    x = normal(2, 1, 3, 6, 7, xp=xp)
    x[0, 1, 3, 3] = np.nan
    y = xp.isnan(conv(x, w))
    assert y.sum() == 4 * 2 * 3 and y[:, :, 2:4, 1:4].all()
    x[0, 1, 3, 3] = np.inf
    assert xp.isinf(conv(x, w)).sum() == 4 * 2 * 3


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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
                    reason="threads cannot be kept to cores, or there is but one")
@pytest.mark.parametrize("apart, refused", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("bad", [(), (1, 5)])
def test_threads_are_kept_apart_and_the_caller_is_set_free_again(bad, apart, refused, monkeypatch):
    def refuse(*args):
        raise PermissionError
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cores, caller, both = os.sched_getaffinity(0), threading.get_ident(), threading.Barrier(2)
    seen = {True: set(), False: set()}

    def task(item):
        seen[threading.get_ident() == caller].add(frozenset(os.sched_getaffinity(0)))
        if item < 2:
            both.wait(60)               # each of the two threads takes one of these
        if item in bad:
            raise ArithmeticError(item)
    coordref._spread(np, lambda item: time.sleep(0.001), range(4))          # makes the threads
    if refused:
        monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with pytest.raises(ArithmeticError) if bad else contextlib.nullcontext():
        coordref._spread(np, task, range(8), apart)
    assert os.sched_getaffinity(0) == cores
    (here,), (others,) = seen[True], seen[False]
    if not refused:
        assert len(here) == 1 and others == cores - here if apart else here == others == cores


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
def test_agreement_with_scipy(rank, xp):
    x, w = normal(0, 2, 3, *(7, 6, 5)[:rank]), normal(1, 4, 3, *(2, 3, 4)[:rank])
    wanted = np.array([[sum(scipy.signal.correlate(x[n, c], w[f, c], mode="valid")
                            for c in range(3)) for f in range(4)] for n in range(2)])
    close(conv(*on(xp, (x, w))), wanted, terms=w[0].size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(20))
def test_agreement_with_torch(seed, dtype, xp):
    torch = pytest.importorskip("torch")
    x, w, b, stride, pads, dilation, groups = random_conv(seed)
    x, w, b = (np.array(a, dtype, order="C") for a in (x, w, b))
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, w, b)]
    functional, rank = torch.nn.functional, len(stride)
    wide = functional.pad(tensors[0], [p for pair in reversed(pads) for p in pair])
    wanted = getattr(functional, f"conv{rank}d")(wide, *tensors[1:], stride=stride,
                                                 dilation=dilation, groups=groups)
    options = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}
    x, w, b = on(xp, (x, w, b))
    y = conv(x, w, b, **options)
    close(y, wanted.detach().numpy(), terms=w[0].size)
    g = normal(seed, *y.shape, dtype=dtype, xp=xp)
    wanted.backward(torch.tensor(host(g)))
    for got, tensor in zip(coordref.conv_backward(g, x, w, b, **options), tensors):
        close(got, tensor.grad.numpy(), terms=max(g.size, 1))


@pytest.mark.parametrize("kernel, stride, padding", [(2, None, 0), (3, 2, 1), ((3, 2), (1, 2), 0)])
def test_pools_agree_with_torch(kernel, stride, padding, xp):
    torch = pytest.importorskip("torch")
    x = normal(0, 2, 3, 7, 8)
    for ours, theirs in ((coordref.max_pool, "max_pool2d"), (coordref.mean_pool, "avg_pool2d")):
        wanted = getattr(torch.nn.functional, theirs)(torch.tensor(x), kernel, stride, padding)
        y = ours(xp.asarray(x), kernel=kernel, stride=stride, padding=padding)
        close(y, wanted.numpy(), terms=9)


def test_batch_norm_and_losses_agree_with_torch(xp):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, s, b = normal(0, 4, 3, 2, 5), normal(1, 3), normal(2, 3)
    wanted = functional.batch_norm(torch.tensor(x), None, None, torch.tensor(s), torch.tensor(b),
                                   training=True, eps=1e-5)
    close(coordref.batch_norm(*on(xp, (x, s, b))), wanted.numpy(), terms=40)
    z, t = 5 * normal(3, 6, 7), np.random.default_rng(4).random((6, 7))
    logits, target, labels = on(xp, (z, t, np.arange(6)))
    for ours, theirs in (
            (coordref.sigmoid_cross_entropy(logits, target),
             functional.binary_cross_entropy_with_logits(torch.tensor(z), torch.tensor(t))),
            (coordref.mean_squared_error(logits, target),
             functional.mse_loss(torch.tensor(z), torch.tensor(t))),
            (coordref.softmax_cross_entropy(logits, labels),
             functional.cross_entropy(torch.tensor(z), torch.arange(6)))):
        close(ours, theirs.numpy(), terms=42)


# THE OTHER PIECES --------------------------------------------------------------------------------

def test_pieces_that_a_person_can_check(xp):
    x = xp.asarray(np.array([[[-1., 2., 5., 5.]]]))
    assert coordref.relu(x).tolist() == [[[0, 2, 5, 5]]]
    assert coordref.max_pool(x, kernel=2).tolist() == [[[2, 5]]]
    assert coordref.max_pool(x, kernel=3, stride=2, padding=1).tolist() == [[[2, 5]]]
    assert coordref.mean_pool(x, kernel=2).tolist() == [[[0.5, 5]]]
    assert coordref.mean_pool(x, kernel=3, stride=1, padding=1).tolist()[0][0][0] == 1 / 3
    assert coordref.max_pool(x).tolist() == [[5]] and coordref.mean_pool(x).tolist() == [[2.75]]
    assert coordref.sum_pool(x).tolist() == [[11]]
    first = [[[0, 0, 1, 0]]]                                            # the first of equals
    assert coordref.max_pool_backward(xp.ones((1, 1)), x).tolist() == first
    assert coordref.max_pool_backward(xp.ones((1, 1, 1)), x, kernel=4).tolist() == first
    y = coordref.affine(x, xp.full(1, -1.), xp.full(1, 4.))
    assert y.tolist() == [[[5, 2, -1, -1]]]
    y = coordref.softmax(xp.asarray(np.array([[0., math.log(3)]])))
    close(y, np.array([[0.25, 0.75]]))


def test_nothing_overflows_and_nothing_is_hidden(xp):
    def array(*values):
        return xp.asarray(np.array(values))
    z = array([1e4, -1e4, 0.])
    assert xp.isfinite(coordref.softmax(z)).all()
    assert coordref.softmax_cross_entropy(z, array(1)) == 2e4
    assert coordref.sigmoid_cross_entropy(z, array([0., 1., 1.])) > 6e3
    assert xp.isfinite(coordref.sigmoid_cross_entropy_backward(1., z, z)[0]).all()
    assert xp.isnan(coordref.relu(array(np.nan, 1.))).tolist() == [True, False]
    assert coordref.relu_backward(array(np.inf, 2.), array(-1., 1.)).tolist() == [0, 2]
    assert xp.isnan(coordref.max_pool(array([[np.nan, 1.]]), kernel=2)).all()
    half = xp.full((1, 1, 5000), 20, np.float16)
    assert coordref.mean_pool(half) == 20               # the sum, 100000, is beyond float16


def test_labels_and_one_hot_targets_mean_the_same(xp):
    z, labels = normal(0, 4, 1, 3, 5, xp=xp), np.array([0, 14, 7, 3])
    hot, labels = xp.asarray(np.eye(15)[labels].reshape(z.shape)), xp.asarray(labels)
    assert coordref.softmax_cross_entropy(z, labels) == coordref.softmax_cross_entropy(z, hot)
    dz, none = coordref.softmax_cross_entropy_backward(1.0, z, labels)
    assert none is None
    assert (dz == coordref.softmax_cross_entropy_backward(1.0, z, hot)[0]).all()


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


def test_he_normal_has_the_variance_and_the_cut(xp):
    w = host(coordref.he_normal((400, 50, 3), rng=0, dtype=np.float64, xp=xp))
    std = math.sqrt(2 / 150)
    assert abs(w.std() / std - 1) < 0.01 and abs(w.mean()) < 0.01 * std
    assert abs(w).max() <= 2 * std / 0.8796
    assert np.array_equal(w, coordref.he_normal((400, 50, 3), rng=0, dtype=np.float64))


def test_the_relative_start_sees_only_differences(xp):
    options = {"dtype": np.float64, "xp": xp}
    net = coordref.coordconv_painter(start="relative", rng=3, size=(9, 9), **options)
    unit = coordref.axis_coords(9, **options)
    maps = [coordref.forward(net, unit[xp.asarray(np.array(at))].reshape(1, 2, 1, 1))[0][0, 0]
            for at in ((3, 4), (5, 3))]
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
def test_examples_are_one_hot_images_and_squares(task, xp):
    data = coordref.not_so_clevr(canvas=16, square=5)
    coords = data.coords[[0, 7, -1]]
    x, target = host(coordref._example(data, xp.asarray(coords), task, "unit", np.float32))
    hot = coordref.encode(coords, (16, 16))
    if task == "regression":
        assert np.array_equal(x, hot) and np.array_equal(target, (coords / 16).astype(np.float32))
    else:
        line = coordref.axis_coords(16)
        assert np.array_equal(x[:, :, 0, 0], line[coords])
        square = hot if task == "classification" else conv(hot, np.ones((1, 1, 5, 5), np.float32),
                                                           padding=2)
        assert np.array_equal(target, square)


def test_adam_is_algorithm_one(xp):
    w, m, v = normal(0, 5, xp=xp), xp.zeros(5), xp.zeros(5)
    wanted, m1, v1 = normal(0, 5), [0.0] * 5, [0.0] * 5
    for step in range(1, 6):
        g, rates = normal(step, 5), {"learning_rate": 0.1, "beta1": 0.8, "beta2": 0.9}
        w, m, v = coordref.adam_step(w, xp.asarray(g), m, v, step, **rates)
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
    return all(np.array_equal(host(p), host(q))
               for m, n in zip(a, b) for p, q in zip(m.params, n.params))


def test_training_is_a_function_of_its_arguments_and_seed(xp, monkeypatch):
    start = small_painter(xp=xp)
    net, history = train_small(net=start)
    assert same(start, small_painter(xp=xp)) and not same(start, net)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    again, _ = train_small(net=start)
    assert same(net, again)
    other, _ = train_small(net=start, rng=2)
    assert not same(net, other)
    assert history["loss"].shape == history["learning_rate"].shape == (7,)
    assert history["loss"].dtype == np.float32 and np.isfinite(history["loss"]).all()


def test_a_batch_gives_the_gradient_of_its_mean_loss_and_of_l2(xp):
    """The first step of Adam with eps = 1 moves a weight by rate * g / (|g| + 1)."""
    start = small_painter(dtype=np.float64, xp=xp)
    net, history = train_small(net=start, steps=1, l2=0.01, batch_size=13, learning_rate=0.1,
                               eps=1.0)
    order = np.random.default_rng(1).permutation(SMALL.train)[:13]
    coords = xp.asarray(SMALL.coords[order])
    x, target = coordref._example(SMALL, coords, "classification", "unit", float)
    y, inputs = coordref.forward(start, x)
    loss = coordref.softmax_cross_entropy(y, target)
    dy, _ = coordref.softmax_cross_entropy_backward(1.0, y, target)
    _, grads = coordref.backward(start, dy, inputs)
    squares = sum((p ** 2).sum() for layer in start for p in layer.params if p.ndim > 1)
    close(history["loss"], np.array([float(loss + 0.01 * squares)]), terms=1000)
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


def test_the_callback_sees_each_step_and_can_stop(xp):
    seen, x = [], xp.zeros((1, 2, 1, 1), np.float32)

    def callback(step, net, loss):
        seen.append((step, coordref.forward(net, x)[0].sum(), loss))
        return step == 3
    _, history = train_small(net=small_painter(xp=xp), callback=callback)
    steps, sums, losses = zip(*seen)
    assert steps == (1, 2, 3) and len(set(map(float, sums))) == 3
    assert list(map(float, losses)) == history["loss"].tolist()


@pytest.mark.parametrize("split", ["uniform", "quadrant"])
def test_the_relative_start_learns_both_splits(split, xp):
    canvas = 20 if xp is STAND_IN else 64
    data = coordref.not_so_clevr(split, canvas=canvas)
    start = coordref.coordconv_painter(start="relative", size=(canvas,) * 2, rng=11, xp=xp)
    untrained = coordref.evaluate(start, data, task="classification")
    net, _ = coordref.train(start, data, task="classification", steps=60, learning_rate=0.01,
                            rng=12)
    assert untrained < 0.01 and coordref.evaluate(net, data, task="classification") == 1


@pytest.mark.parametrize("task, make", [
    ("rendering", coordref.coordconv_renderer), ("regression", coordref.coordconv_regressor)])
def test_the_other_tasks_train(task, make, xp):
    net, history = train_small(net=make(size=(12, 12), rng=0, xp=xp), task=task, steps=60,
                               batch_size=4)
    assert history["loss"][-10:].mean() < 0.7 * history["loss"][:10].mean()
    assert np.isfinite(coordref.evaluate(net, SMALL, task=task))


def test_batch_norm_trains_on_batches_and_keeps_running_statistics(xp):
    data = coordref.not_so_clevr()
    start = coordref.deconv_painter(kernel=2, rng=0, xp=xp)
    net, history = coordref.train(start, data, task="classification", steps=12, batch_size=8,
                                  rng=1)
    assert history["loss"][-4:].mean() < history["loss"][:4].mean()
    norms = [(a, b) for a, b in zip(start, net) if a.op is coordref.batch_norm]
    assert len(norms) == 5
    for a, b in norms:
        assert not a.options["mean"].any() and b.options["mean"].any()
    # after some steps on one batch the statistics have come that far from 0 and 1 to the batch's
    one, zeros, ones = SMALL._replace(train=SMALL.train[:16]), xp.zeros(2), xp.ones(2)
    start = [Layer(conv, [normal(0, 2, 1, 3, 2, xp=xp)]),
             Layer(coordref.batch_norm, [ones, zeros], {"mean": zeros, "var": ones}),
             Layer(coordref.max_pool)]
    net, _ = coordref.train(start, one, task="regression", steps=20, learning_rate=0.0, rng=1)
    x = coordref._example(one, xp.asarray(one.coords[one.train]), "regression", "unit", float)[0]
    z, left = coordref.forward(start[:1], x)[0], 0.9 ** 20
    close(net[1].options["mean"], (1 - left) * z.mean(axis=(0, 2, 3)), terms=100)
    close(net[1].options["var"], left + (1 - left) * z.var(axis=(0, 2, 3)), terms=100)


@pytest.mark.parametrize("task, make, perfect", [
    ("classification", coordref.encoder_network, 1), ("rendering", coordref.renderer_network, 1),
    ("regression", coordref.decoder_network, 0)])
def test_the_analytic_networks_score_perfectly_and_wrong_ones_do_not(task, make, perfect, xp):
    data, net = coordref.not_so_clevr("quadrant"), make((64, 64), xp=xp)
    for part in ("test", "train"):
        assert coordref.evaluate(net, data, task=task, part=part, scale="pixel") == perfect
    # off by one column, away from the edge: no hit, 8 of 10 columns in common, one pixel away
    data = data._replace(test=np.flatnonzero(data.coords[:, 1] < 59))
    one = Layer(affine, [xp.ones(2, np.float32), xp.asarray(np.array([0, 1], np.float32))])
    shifted = net + [one] if task == "regression" else [one] + net
    wanted = {"classification": 0, "rendering": 72 / 90, "regression": 1}[task]
    close(np.float32(coordref.evaluate(shifted, data, task=task, scale="pixel")), wanted)


# FILES -------------------------------------------------------------------------------------------

def test_save_and_load_give_back_every_bit(tmp_path, xp):
    for net in (coordref.conv_regressor("quadrant", rng=0, xp=xp),
                coordref.decoder_network((5, 6), xp=xp)):
        path = tmp_path / "net.npz"
        coordref.save(path, net)
        blank = [layer._replace(params=[p * 0 for p in layer.params]) for layer in net]
        found = coordref.load(path, blank)
        assert same(found, net) and not same(blank, net)
        assert all(coordref.array_module(p) is xp for layer in found for p in layer.params)
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
        assert got.dtype == dtype and np.array_equal(host(got), wanted)
    assert coordref.encode(xp.asarray(where), size).dtype == np.float32


def test_the_network_is_the_critics_listing(xp):
    """Piekniewski's listing, by scipy: also off its intended input, where it is wrong."""
    H, W = 7, 10
    X, Y = np.meshgrid(np.arange(W), np.arange(H))
    centre = np.zeros((3, 3))
    centre[1, 1] = 1

    def listing(A):
        def blur(a, k):
            return scipy.signal.convolve2d(a, k * centre, mode="same")
        dy, dx = blur(A, H) + blur(Y, -1), blur(A, W) + blur(X, -1)
        return [H - np.maximum(dy, 0).sum(), W - np.maximum(dx, 0).sum()]
    images = np.zeros((4, 1, H, W))
    images[0, 0, 2, 3] = images[1, 0, 2, 3] = images[1, 0, 4, 5] = 1
    images[2, 0, 2, 3] = 0.5
    net = coordref.decoder_network((H, W), dtype=np.float64, xp=xp)
    got = host(coordref.forward(net, xp.asarray(images))[0])
    assert np.array_equal(got, [listing(a[0]) for a in images])
    assert got[0].tolist() == [2, 3] and got[1].tolist() == [-1, -2] and got[3].tolist() == [H, W]


def test_the_renderer_draws_squares_and_cuts_them_at_the_edge(xp):
    coords = xp.asarray(np.array([[4., 6.], [0., 9.]]))
    net = coordref.renderer_network((8, 10), 5, dtype=np.float64, xp=xp)
    y = host(coordref.forward(net, coords[:, :, None, None])[0])
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
def test_bad_input_gets_a_sentence(name, args, options, error, named, xp):
    args, options = on(xp, args), on(xp, options)
    with pytest.raises(error) as caught:
        getattr(coordref, name)(*args, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    function = "array_module" if name == "to_numpy" else name
    inner = r"conv|axis_coords|coord\w+|encoder_network"
    assert re.match(rf"({function}|{inner}): ", message), message
    assert re.search(rf"\b{re.escape(named)}\b", message) and len(message) > 25, message


# THE DEVICE --------------------------------------------------------------------------------------

def every_pair(dtype, xp=np):
    """Each differentiable function and its gradient, with arguments: name, arrays, options."""
    for name, shapes, options in PAIRS:
        arrays = [normal(i, *s, dtype=dtype) for i, s in enumerate(shapes)]
        options = {k: v.astype(dtype) if isinstance(v, np.ndarray) else v
                   for k, v in options.items()}
        y = np.asarray(getattr(coordref, name)(*arrays, **options))
        yield name, on(xp, arrays), on(xp, options)
        yield name + "_backward", on(xp, [y, *arrays]), on(xp, options)


def test_mixed_arrays_are_refused_with_the_way_out(monkeypatch):
    """Each array in its turn on the other side, of every function that takes two or more."""
    monkeypatch.setitem(sys.modules, "cupy", STAND_IN)
    logits, labels, vector = normal(0, 2, 3), np.array([0, 2]), np.ones(3)
    calls = [*every_pair(np.float64), ("array_module", [vector, vector], {}),
             ("adam_step", [vector, vector, vector, vector, 1], {}),
             ("softmax_cross_entropy", [logits, labels], {}),
             ("softmax_cross_entropy_backward", [1.0, logits, labels], {})]
    for name, args, options in calls:
        named = {**dict(enumerate(args)), **options}
        places = [k for k, v in named.items() if isinstance(v, np.ndarray)]
        for place in places if len(places) > 1 else ():
            moved = {**named, place: STAND_IN.asarray(named[place])}
            with pytest.raises(TypeError, match=name + r": .*cupy\.asarray.*to_numpy"):
                getattr(coordref, name)(*(moved[i] for i in range(len(args))),
                                        **{k: moved[k] for k in options})
    w, b = NET[2].params
    mixed = [*NET[:2], NET[2]._replace(params=[STAND_IN.asarray(w), b]), *NET[3:]]
    for call in (lambda: coordref.train(mixed, SMALL, task="classification"),
                 lambda: coordref.evaluate(mixed, SMALL, task="classification"),
                 lambda: coordref.forward(mixed, np.ones((1, 2, 1, 1), np.float32))):
        with pytest.raises(TypeError, match=r"cupy\.asarray.*to_numpy"):
            call()


def test_scripts_get_a_gpu_only_where_one_answers(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", STAND_IN)
    assert coordref.best_module() is STAND_IN
    broken = types.ModuleType("cupy")
    broken.ones = lambda shape: 1 / 0               # a device that is listed and does not work
    for module in (None, broken, types.ModuleType("cupy")):
        monkeypatch.setitem(sys.modules, "cupy", module)
        assert coordref.best_module() is np


def walk(module):
    """Every public function of the module on the device: no transfer but those in ASKED, nothing
    refused, results on the device and of the input's dtype, float64 for coordinates only."""
    for name, args, options in [*every_pair(np.float16, STAND_IN),
                                *every_pair(np.float32, STAND_IN)]:
        MOVED.clear(), DOUBLES.clear()
        results = getattr(module, name)(*args, **options)
        for y in results if isinstance(results, tuple) else (results,):
            assert y is None or (type(y) is DeviceArray and y.dtype == args[-1].dtype), name
        assert not MOVED and DOUBLES <= {"axis_coords", "coord_channels"}, (name, DOUBLES)
    data = module.not_so_clevr(canvas=12, square=3)
    for task, make in (("classification", module.coordconv_painter),
                       ("rendering", module.coordconv_renderer),
                       ("regression", module.coordconv_regressor)):
        net, moved = make(size=(12, 12), rng=0, xp=STAND_IN), []
        for steps in (2, 4):
            MOVED.clear(), DOUBLES.clear()
            net, _ = module.train(net, data, task=task, steps=steps, batch_size=5, rng=1)
            moved.append(MOVED.copy())
            # the positions and their order go up once, and no step brings anything back
            assert moved[-1] == moved[0] and moved[0].count("upload") == 2, moved
            assert DOUBLES <= {"axis_coords", "coord_channels", "_unit", "_example"}, DOUBLES
        assert all(type(p) is DeviceArray for layer in net for p in layer.params)
        assert isinstance(module.evaluate(net, data, task=task), float)
    MOVED.clear()
    image = module.encode(STAND_IN.asarray(np.array([[1, 2], [0, 3]])), (3, 4))
    assert image.dtype == np.float32 and type(module.decode(image)) is DeviceArray
    logits, labels = STAND_IN.ones((2, 3), np.float32), STAND_IN.asarray(np.array([0, 2]))
    assert type(module.softmax_cross_entropy(logits, labels)) is DeviceArray
    assert MOVED.count("upload") == 2 and "get" not in MOVED, MOVED
    net = module.coordconv_painter(start="relative", size=(5, 6), rng=0, xp=STAND_IN)
    module.forward(net, STAND_IN.ones((3, 2, 1, 1), np.float32))
    net = module.conv_regressor("quadrant", rng=0, xp=STAND_IN)[:6]
    module.forward(net, STAND_IN.ones((1, 1, 12, 12), np.float32))
    net = module.renderer_network((5, 6), 3, xp=STAND_IN)
    module.forward(net, STAND_IN.ones((2, 2, 1, 1), np.float32))
    zeros = STAND_IN.zeros(3, np.float32)
    assert all(a.dtype == np.float32 for a in module.adam_step(zeros, zeros, zeros, zeros, 1))


LEAKS = [       # what goes wrong, the text in the module, the text instead
    ("a NumPy buffer", '_module("coord_channels", xp).empty(', "np.empty("),
    ("a NumPy linspace", "i = xp.arange(n, dtype=np.float64)", "i = np.linspace(0, n - 1, n)"),
    ("where=", "maximum(x, y, out=y)", "maximum(x, y, out=y, where=x > 0)"),
    ("writeable=", "strided(x, *zip(*axes))", "strided(x, *zip(*axes), writeable=False)"),
    ("sliding_window_view", "(x).lib.stride_tricks.as_strided",
     "(x).lib.stride_tricks.sliding_window_view"),
    ("initial=", "_pixels(x).max(axis=2)", "_pixels(x).max(axis=2, initial=-math.inf)"),
    ("float(loss) per step", "adam_step(flat, dw, m, v, step + 1",
     "adam_step(flat, dw, m, v, step + 1 + 0 * int(float(loss))"),
    ("weights to the host per step", "adam_step(flat, dw, m, v, step + 1",
     "adam_step(flat, dw, m, v, step + 1 + 0 * len(to_numpy(flat))"),
    ("the data set uploaded per step", "batch = points[", "batch = xp.asarray(data.coords)["),
    ("a constant uploaded per step", "marks = (abs(xp.arange(n)",
     "marks = (abs(xp.asarray(np.arange(n))"),
    ("a test on an array", "if len(together) <", "if dy.any() and len(together) <"),
    ("a sum on the host", "return _narrow(x.dtype, _pixels(wide).sum(axis=2))[0]",
     "return to_numpy(wide).sum(axis=tuple(range(2, x.ndim)))"),
    ("numpy.asarray", "    pixels = _pixels(dy)\n", "    pixels = np.asarray(_pixels(dy))\n"),
    ("an index of the host", "part[xp.arange(len(part)), hot]",
     "part[np.arange(len(part)), hot]"),
    ("a NumPy ufunc", "y = xp.exp(z - z.max", "y = np.exp(z - z.max"),
    ("a mask for an index", "waiting &= ~wins", "waiting[wins] = False; dy[wins]"),
    ("add.at", "dx[tap] += share", "xp.add.at(dx, tap, share)"),
    ("a name that CuPy lacks", "rstd = 1 / xp.sqrt(var + eps)",
     "rstd = 1 / xp.emath.sqrt(var + eps)"),
    ("float64 by default", "y = xp.full((*x.shape[:2], *geo.out), -math.inf, x.dtype)",
     "y = xp.full((*x.shape[:2], *geo.out), -math.inf)"),
    ("float64 by a NumPy number", "y / math.prod(geo.kernel)",
     "y / np.float64(math.prod(geo.kernel))"),
    ("float64 in between", "astype(np.float32) if a is not None and a.dtype == np.float16 else",
     "astype(np.float64) if a is not None else"),
]


@pytest.mark.parametrize("leak", [None, *LEAKS], ids=lambda leak: leak[0] if leak else "no leak")
def test_the_file_stays_on_the_device_and_every_planted_leak_is_caught(leak, monkeypatch,
                                                                       tmp_path):
    _, old, new = leak or ("", "", "")
    text = Path(coordref.__file__).read_text()
    assert old in text
    (tmp_path / "planted.py").write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", tmp_path / "planted.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planted", module)
    monkeypatch.setitem(sys.modules, "cupy", STAND_IN)
    spec.loader.exec_module(module)
    if leak is None:
        walk(module)                        # the file as it is
    else:
        with pytest.raises((AssertionError, AttributeError, TypeError)):
            walk(module)


def test_the_transfers_of_a_training_do_not_grow_with_its_steps(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", STAND_IN)
    net, moved = small_painter(xp=STAND_IN), {}
    for steps in (3, 30, 75):               # 3 and 30 steps in one epoch, 75 in two
        MOVED.clear()
        train_small(net=net, steps=steps, batch_size=2)
        moved[steps] = MOVED.copy()
    assert moved[3] == moved[30] and moved[3].count("upload") == 2, moved
    assert moved[75] == ["upload", *moved[3]]


def accepted(function):
    """The keywords that a function of CuPy takes, or None where only a call could tell."""
    if type(function).__name__ == "ufunc":
        return {"out", "dtype", "casting"}
    try:
        parameters = inspect.signature(function).parameters.values()
        wild = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return None if wild else {p.name for p in parameters}
    except (TypeError, ValueError):         # compiled: the signature is the first line of the text
        return set(re.findall(r"(\w+)[=,)]", (function.__doc__ or "").partition("\n")[0]))


def unknown_to_cupy(text, cupy):
    """Names of the module and keywords of its functions and methods that CuPy does not have."""
    unknown, tree = [], ast.parse(text)
    imported = {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for a in node.names}
    for node in ast.walk(tree):
        function = getattr(node, "func", node)
        used, names, root = {k.arg for k in getattr(node, "keywords", ())}, [], function
        while isinstance(root, ast.Attribute):
            names.insert(0, root.attr)
            root = root.value
        if not names:
            continue
        root = getattr(getattr(root, "func", root), "id", None)         # _xp(x).exp is xp.exp
        if root in ("xp", "_xp", "_arrays", "_module", "array_module"):
            try:
                found = functools.reduce(getattr, names, cupy)
            except AttributeError:
                unknown.append((node.lineno, ".".join(names)))
                continue
        else:                                                           # perhaps a method
            found = None if root in imported else getattr(cupy.ndarray, names[-1], None)
        if found is not None and used - (accepted(found) or used):
            unknown.append((node.lineno, ".".join(names), used))
    return unknown


def test_every_name_and_keyword_exists_in_cupy():
    """Of the file, and of the stand-in, against the wheel; that needs no device."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    assert unknown_to_cupy(Path(coordref.__file__).read_text(), cupy) == []
    planted = ["xp.block([x])", "xp.sum(x, where=m)", "x.sum(1).max(initial=0)", "xp.emath.sqrt",
               "_xp(x).maximum(x, y, where=m)", "xp.linalg.vecdot", "x.copy(subok=True)",
               "xp.lib.stride_tricks.as_strided(x, writeable=False)"]
    found = {line for line, *_ in unknown_to_cupy("\n".join(planted), cupy)}
    assert found == set(range(1, len(planted) + 1))
    for line in SURFACE.strip().splitlines():
        names, signature = line.split(": ")
        ours = accepted(eval(f"lambda {signature}: None")) - {"a", "x", "x1", "x2", "tup",
                                                                    "operands"}
        for name in names.split():
            theirs = accepted(getattr(cupy, name))
            assert theirs is None or ours <= theirs, (name, ours, theirs)


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
""".strip().splitlines()


@pytest.mark.parametrize("line", SIGNATURES)
def test_signatures_are_fixed(line):
    signature = inspect.signature(getattr(coordref, line[:line.index("(")]))
    found = str(signature.replace(return_annotation=inspect.Signature.empty, parameters=[
        p.replace(annotation=p.empty) for p in signature.parameters.values()]))
    found = re.sub(r"<class 'numpy\.(\w+)'>", r"\1", found)
    found = re.sub(r"<module 'numpy' from '[^']*'>", "numpy", found)
    assert line[line.index("("):] == found


def test_public_signatures_are_typed():
    """Each argument and result; what mypy then finds in them is the business of .ci/run."""
    for name in coordref.__all__:
        f = getattr(coordref, name)
        hints, wanted = typing.get_type_hints(f), list(inspect.signature(f).parameters)
        assert set(wanted) | ({"return"} if inspect.isfunction(f) else set()) == set(hints), name


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


def test_import_loads_no_more_than_numpy_does():
    """Of what takes long: numpy.random alone takes ten milliseconds."""
    late = ["numpy.random", "scipy", "cupy", "matplotlib", "torch", "mpi4py", "concurrent.futures"]
    code = ("import sys, numpy\nbefore = set(sys.modules)\nimport coordref\n"
            f"print([name for name in {late} if name in set(sys.modules) - before])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=HERE) == b"[]\n"


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
    def words(text):
        return " ".join(re.sub(r"^# ?", "", text, flags=re.MULTILINE).split())
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


# THE BENCH ---------------------------------------------------------------------------------------

def test_resnet_50_has_the_published_parameters():
    assert bench.parameters(bench.resnet(50, 64)) == 25_557_032
    assert bench.parameters(bench.resnet(50, 64, coords=True)) == (
        25_557_032 + 8 * 6 + 8 + 64 * 5 * 49)         # six channels into eight, eight into 64


@pytest.mark.parametrize("stride, shortcut", [(1, False), (1, True), (2, True)])
def test_the_gradient_of_a_block_is_its_slope(stride, shortcut):
    rng = np.random.default_rng(0)
    C, inner, F = (5, 3, 7) if shortcut else (5, 3, 5)
    shapes = [(inner, C, 1, 1), (inner,), (inner,), (inner, inner, 3, 3), (inner,), (inner,),
              (F, inner, 1, 1), (F,), (F,), *[(F, C, 1, 1), (F,), (F,)] * shortcut]
    arrays = [rng.standard_normal(shape) for shape in [(4, C, 6, 8), *shapes]]
    along = [rng.standard_normal(a.shape) for a in arrays]
    y = bench.bottleneck(*arrays, stride=stride)
    dy = rng.standard_normal(y.shape)
    found = bench.bottleneck_backward(dy, *arrays, stride=stride)
    assert [g.shape for g in found] == [a.shape for a in arrays]
    h = 1e-6
    ahead, behind = (bench.bottleneck(*(a + s * u for a, u in zip(arrays, along)), stride=stride)
                     for s in (h, -h))
    slope = (dy * (ahead - behind)).sum() / (2 * h)
    assert slope == pytest.approx(sum((g * u).sum() for g, u in zip(found, along)), rel=1e-5)


def torch_resnet(torch, params, x, depth, coords):
    """The published network in torch, with the dense layer behind the mean."""
    f, it = torch.nn.functional, iter(params)

    def norm(x):
        return f.batch_norm(x, None, None, next(it), next(it), training=True)

    if coords:
        H, W = x.shape[2:]
        row, col = torch.meshgrid(torch.linspace(-1, 1, H, dtype=x.dtype),
                                  torch.linspace(-1, 1, W, dtype=x.dtype), indexing="ij")
        grid = torch.stack([row, col, (row ** 2 + col ** 2).sqrt()])
        x = torch.cat([x, grid.expand(len(x), 3, H, W)], dim=1)
        x = f.conv2d(x, next(it), next(it))
    x = f.max_pool2d(norm(f.conv2d(x, next(it), stride=2, padding=3)).relu(), 3, 2, 1)
    for stage, blocks in enumerate({14: (1, 1, 1, 1), 26: (2, 2, 2, 2)}[depth]):
        for block in range(blocks):
            stride = 2 if stage and block == 0 else 1
            y = norm(f.conv2d(x, next(it))).relu()
            y = norm(f.conv2d(y, next(it), stride=stride, padding=1)).relu()
            y = norm(f.conv2d(y, next(it)))
            if block == 0:
                x = norm(f.conv2d(x, next(it), stride=stride))
            x = (x + y).relu()
    w, b = it
    return x.mean(dim=(2, 3)) @ w[:, :, 0, 0].T + b


@pytest.mark.parametrize("depth, coords", [(14, False), (26, True)])
def test_resnet_and_its_gradients_agree_with_torch(depth, coords):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    net = bench.resnet(depth, 4, classes=6, coords=coords, rng=1, dtype=np.float64)
    x, dy = rng.standard_normal((3, 3, 40, 48)), rng.standard_normal((3, 6))
    params = [rng.standard_normal(p.shape) if p.ndim == 1 else p for layer in net
              for p in layer.params]                # scales and shifts that are not 1 and 0
    flat = iter(params)
    net = [layer._replace(params=[next(flat) for _ in layer.params]) for layer in net]
    y, inputs = coordref.forward(net, x)
    dx, grads = coordref.backward(net, dy, inputs)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, *params)]
    wanted = torch_resnet(torch, tensors[1:], tensors[0], depth, coords)
    wanted.backward(torch.tensor(dy))
    close(y, wanted.detach().numpy(), 1e6)
    found = [dx, *(g for layer in grads for g in layer if g is not None)]
    assert len(found) == len(tensors)
    for g, tensor in zip(found, tensors):
        close(g, tensor.grad.numpy(), 1e6)


def test_settled_norms_keep_the_statistics_of_their_images():
    net = bench.resnet(14, 4, classes=3, rng=0, dtype=np.float64)
    x = normal(0, 6, 3, 40, 36)
    settled = bench.settled(net, x)
    close(coordref.forward(settled, x)[0], coordref.forward(net, x)[0], 1e4)
    one = coordref.forward(settled, x[:1])[0]       # does not depend on what else is in the batch
    close(one, coordref.forward(settled, x)[0][:1], 1e4)


def test_shapes_lie_inside_and_in_their_quadrant():
    images, kind, quadrant = bench.shapes(64, np.random.default_rng(0), canvas=40)
    assert images.shape == (64, 3, 40, 40) and set(kind) == set(quadrant) == {0, 1, 2, 3}
    drawn = images.mean(axis=1) > 0.3
    for image, q in zip(drawn, quadrant):
        middle = [(i.min() + i.max()) / 2 for i in np.nonzero(image)]
        assert 2 * (middle[0] > 19.5) + (middle[1] > 19.5) == q


def short_bench(tmp_path, *arguments, start=subprocess.run, **options):
    """bench.py as a process of its own, with trainings of two or three steps."""
    code = ("import sys, bench\n"
            "for mode in bench.MODES.values():\n"
            "    mode.update(seeds=[0, 1], he={'steps': 2}, render={'steps': 2},\n"
            "                regress={'steps': 2}, resnet=3, points=2, repeats=2, images=512,\n"
            "                thin={'classification': 16, 'rendering': 16, 'regression': 16},\n"
            "                painter=2, centre=2, tail=2, regressor=2)\n"
            "sys.exit(bench.main(sys.argv[1:]))\n")
    return start([sys.executable, "-c", code, *arguments], cwd=tmp_path, text=True,
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                 env={**os.environ, "PYTHONPATH": str(HERE)}, **options)


def figures_of(path):
    """Every figure of a file that does not depend on the clock."""
    document = json.loads(path.read_text())
    assert sorted(document) == ["environment", "rows", "schema"]
    return [(row["id"], row["verdict"], run["experiment"], run["seed"], run["score"],
             [point[1:] for point in run["curve"]], run.get("predicted"))
            for row in document["rows"] for run in row["runs"]]


def test_a_killed_bench_goes_on_and_ends_with_the_same_figures(tmp_path):
    wanted, found = tmp_path / "whole.json", tmp_path / "killed.json"
    arguments = ["--full", "--only", "own-test|resnet-s|regress-u", "--json"]
    assert short_bench(tmp_path, *arguments, str(wanted)).returncode == 0
    kills, done = 0, False
    while not done:
        process = short_bench(tmp_path, *arguments, str(found), start=subprocess.Popen)
        try:
            process.communicate(timeout=1.5 * 1.4 ** kills)
            done = True
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            if found.exists():
                json.loads(found.read_text())           # whole at any moment
    assert kills > 0 and process.returncode == 0
    assert figures_of(found) == figures_of(wanted)
    runs = [run["experiment"] for row in json.loads(found.read_text())["rows"]
            for run in row["runs"]]
    assert runs.count("resnet/shape/coords") == 2
    again = short_bench(tmp_path, *arguments, str(found))       # nothing is run a second time
    assert again.returncode == 0 and "estimated time: 0 s" in again.stdout
    assert short_bench(tmp_path, "--full", "--seeds", "3", "--json", str(found)).returncode == 2


def test_a_long_training_of_the_bench_goes_on_from_its_checkpoint(tmp_path):
    data, path = coordref.not_so_clevr(canvas=12, square=3), str(tmp_path / "run.npz")

    def train(checkpoint, tell=lambda done, text: None):
        lab = bench.Lab("regression/uniform/he", 0, {**bench.MODES["full"], "points": 6},
                        checkpoint=checkpoint, tell=tell)
        net = lab.train(coordref.coordconv_regressor(rng=0), data, "regression", steps=600,
                        batch_size=2, rng=0)
        return ([point[1:] for point in lab.record["curve"]], lab.record["steps"],
                coordref.evaluate(net, data, task="regression"))

    def stop(done, text):
        if done > 0.56:
            raise KeyboardInterrupt
    wanted, shares = train(None), []
    with pytest.raises(KeyboardInterrupt):
        train(path, stop)
    assert train(path, lambda done, text: shares.append(done)) == wanted
    assert shares[0] > 0.5              # it did not begin again
    assert [steps for steps, _ in wanted[0]] == [100, 200, 300, 400, 500, 600]


def test_an_interrupted_bench_leaves_its_table_and_file(tmp_path):
    path = tmp_path / "part.json"
    process = short_bench(tmp_path, "--only", "robust|resnet|relative", "--json", str(path),
                          start=subprocess.Popen)
    while process.poll() is None and not (
            path.exists() and json.loads(path.read_text())["rows"][0]["verdict"]):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted after" in out and not err
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 5 and rows[0]["verdict"] and not rows[-1]["verdict"]


def test_every_row_of_the_bench_is_judged_on_record(tmp_path):
    path = tmp_path / "rows.json"
    drawn = importlib.util.find_spec("matplotlib") and ["--figures", str(tmp_path / "drawn")]
    done = short_bench(tmp_path, "--quick", "--only", "^(?!speed)", "--json", str(path),
                       *(drawn or []))
    rows = json.loads(path.read_text())["rows"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(rows) >= 14, done.stderr
    for row, line in zip(rows, lines):
        assert line == f"| {row['claim']} | {row['source']} | {row['measured']} | " \
                       f"{row['verdict']} |"
        assert row["runs"] and all({"experiment", "seed", "seconds", "curve", "score"} <= set(r)
                                   for r in row["runs"])
    for name in ("time", "positions", "predictions", "speed") if drawn else ():
        assert (tmp_path / "drawn" / f"{name}.png").stat().st_size > 10_000
    same = short_bench(tmp_path, "--quick", "--only", "decoder|feature", "--compare", str(path))
    assert same.returncode == 0 and "nothing changed beyond noise" in same.stdout


def test_what_changed_beyond_noise():
    def document(verdict, *scores):
        return {"rows": [{"id": "a", "verdict": verdict, "runs": [
            {"experiment": "x", "seed": i, "score": s, "seconds": [1.0]}
            for i, s in enumerate(scores)]}]}
    old = document("holds", 0.9, 1.0)
    assert list(bench.compare(old, document("holds", 0.8, 0.95))) == []
    assert list(bench.compare(old, document("holds", 0.8, 0.85))) == [
        "a: score of x was 0.95, is 0.825"]
    assert list(bench.compare(old, document("holds", 0.1))) == []       # one run shows no spread
    assert "verdict" in next(bench.compare(old, document("fails", 0.9, 1.0)))


def test_the_judges_of_the_bench():
    def records(*values, name="classification/uniform/x"):
        return [{"experiment": name, "seed": i, "score": s, "seconds": [9.0], "steps": 4,
                 "curve": [[1.0, 1, s / 2], [3.0, 2, s]], "weights": 7, "tested": 5}
                for i, s in enumerate(values)]
    timed = {"patience": 10}
    assert bench.judge_relative({}, records(1.0, 1.0), records(0.5, 1.0))[1] == "holds"
    assert bench.judge_relative({}, records(1.0, 0.999), records(0.5, 1.0))[1] == "fails"
    assert "1 of 2" in bench.judge_relative({}, records(1.0, 1.0), records(0.5, 1.0))[0]
    for score, wanted in ((0.864, "not contradicted"), (0.87, "contradicted")):
        assert bench.judge_limit(0.86, "{:.1f}", 100, timed, [], records(score))[1] == wanted
    assert bench.judge_limit(0.86, "{:.1f}", 100, {"patience": None}, [], records(0.1),
                             records(0.9))[1] == "contradicted"
    gain = bench.judge_resnet({}, records(0.5, 0.6, 0.55), records(0.61, 0.7, 0.66))
    assert gain[1] == "a gain" and "+10.7 points" in gain[0]
    assert bench.judge_resnet({}, records(0.5, 0.6), records(0.6, 0.5))[1] == "no gain shown"
    assert bench.judge_resnet({}, records(0.5), records(0.6))[1] == "no interval"
    _, text = bench.judge_recipes("{:.2f}", lambda s: s < 0.5, "r", {}, records(0.1, 0.2),
                                  records(0.1, 3.0))
    assert text == "holds with our recipe, not for every seed with the paper's"
    slow, fast = records(0.1), records(1.0, 1.0)
    slow[0]["curve"] = [[300.0, 1, 0.1]]
    assert bench.judge_faster({}, fast, fast, slow)[1] == "holds"


def test_what_the_bench_refuses(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for arguments, said in ((["--only", "nothing like it"], "matches none"),
                            (["--only", "("], "unterminated"), (["--seeds", "0"], "--seeds"),
                            (["--compare", str(tmp_path / "other.json")], "no schema"),
                            (["--compare", str(tmp_path / "none.json")], "No such file")):
        with pytest.raises(SystemExit) as stop:
            bench.main(arguments)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    if coordref.best_module() is np:
        with pytest.raises(SystemExit):
            bench.main(["--device", "gpu"])
        assert "no device that answers" in capsys.readouterr().err
