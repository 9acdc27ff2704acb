# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the coordref authors. The licence text is at the end of this file.
"""CoordConv from first principles, and the answer that needs no training.

A convolution gives the same answer wherever its input lies, so it cannot say where that is.
CoordConv (Liu et al. 2018) adds input channels that hold each pixel's coordinates. Its critic
(Piekniewski 2018) replied that one convolution, one rectifier, one sum and one subtraction read
a coordinate off an image without any training. This file holds both: coordinate channels,
convolution with its gradients, the paper's networks and their training, and the critic's decoder
with its inverse, all of it as plain array code for NumPy and, when given CuPy arrays, the GPU.

Notation
--------
N batch, C channels in, F filters (channels out), K coordinate channels, G groups; H W image,
KH KW kernel, OH OW output. ``*size``, ``*kernel`` and ``*out`` stand for any number of spatial
axes. x is an input, y an output, w weights, b a bias; dx is the gradient of the loss by x, and
no other name begins with d and a letter that names an array. Positions are (row, col), never
(x, y).

Conventions
-----------
Images are (N, C, *size), weights (F, C/G, *kernel), as in PyTorch and ONNX; "convolution" is
cross-correlation. Coordinate channels follow the input channels: one per axis in axis order, then
the radius. On the unit scale an axis runs from -1 to 1; an axis of length 1 gets 0.
For every differentiable ``f(x, *params, **options)`` the next function is its gradient,
``f_backward(dy, x, *params, **options)``: the upstream gradient first, then exactly f's arrays and
keywords. It returns one gradient per array in f's order (None for an array that has none; a bare
array where f takes one). Functions return new arrays, keep the dtype (float16 is computed in
float32) and never write to their arguments. TypeError is for a wrong kind, ValueError for a wrong
value or shape.

Differs
-------
From the paper's code: channels are (row, col, radius), there (col, row, radius); each axis is
scaled by its own length, there by the other's; squares are binary, there 128/255, which caps the
IoU at 0.502; input coordinates are scaled to [-1, 1] unless asked otherwise, there raw pixels;
dense layers are convolutions over all of their input and take part in the l2 term.
From PyTorch: padding may differ before and after; "same" works at any stride; global pools return
(N, C); softmax runs over everything but the batch; batch_norm has no mode: it uses the statistics
it is given, or else those of the batch.

Contents
--------
Arrays: array_module best_module to_numpy
Coordinates: axis_coords coord_channels add_coords add_coords_backward
Convolution: conv conv_backward conv_transpose conv_transpose_backward coord_conv
coord_conv_backward
Pieces: relu relu_backward max_pool max_pool_backward mean_pool mean_pool_backward sum_pool
sum_pool_backward affine affine_backward batch_norm batch_norm_backward softmax softmax_backward
softmax_cross_entropy softmax_cross_entropy_backward sigmoid_cross_entropy
sigmoid_cross_entropy_backward mean_squared_error mean_squared_error_backward
Networks: Layer forward backward he_normal
Models: coordconv_painter deconv_painter coordconv_renderer coordconv_regressor conv_regressor
Training: Dataset not_so_clevr adam_step train evaluate save load
The analytic answer: decoder_network encoder_network renderer_network decode encode

Example
-------
>>> coords = np.array([[1, 2], [0, 0]])             # two pixels as (row, col)
>>> images = encode(coords, (3, 4))                 # drawn as one-hot images
>>> images[0, 0].tolist()
[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
>>> decode(images).tolist()                         # and read back, in closed form
[[1.0, 2.0], [0.0, 0.0]]
>>> forward(decoder_network((3, 4)), images)[0].tolist()     # or by the critic's network
[[1.0, 2.0], [0.0, 0.0]]

References
----------
Liu, Lehman, Molino, Petroski Such, Frank, Sergeev, Yosinski. An intriguing failing of
convolutional neural networks and the CoordConv solution. NeurIPS 2018, arXiv 1807.03247.
Piekniewski. Autopsy of a deep learning paper. Blog post, 14 July 2018.
Kingma, Ba. Adam: a method for stochastic optimization. ICLR 2015, arXiv 1412.6980.
He, Zhang, Ren, Sun. Delving deep into rectifiers. ICCV 2015, arXiv 1502.01852.
Ioffe, Szegedy. Batch normalization. ICML 2015, arXiv 1502.03167.
Dumoulin, Visin. A guide to convolution arithmetic for deep learning. arXiv 1603.07285.
"""

import contextlib
import ctypes
import functools
import io
import itertools
import math
import operator
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

__version__ = "0.1.0"

__all__ = [                                                 # noqa: RUF022 (in reading order)
    "array_module", "best_module", "to_numpy", "axis_coords", "coord_channels", "add_coords",
    "add_coords_backward", "conv", "conv_backward", "conv_transpose", "conv_transpose_backward",
    "coord_conv", "coord_conv_backward", "relu", "relu_backward", "max_pool", "max_pool_backward",
    "mean_pool", "mean_pool_backward", "sum_pool", "sum_pool_backward", "affine",
    "affine_backward", "batch_norm", "batch_norm_backward", "softmax", "softmax_backward",
    "softmax_cross_entropy", "softmax_cross_entropy_backward", "sigmoid_cross_entropy",
    "sigmoid_cross_entropy_backward", "mean_squared_error", "mean_squared_error_backward", "Layer",
    "forward", "backward", "he_normal", "coordconv_painter", "deconv_painter",
    "coordconv_renderer", "coordconv_regressor", "conv_regressor", "Dataset", "not_so_clevr",
    "adam_step", "train", "evaluate", "save", "load", "decoder_network", "encoder_network",
    "renderer_network", "decode", "encode",
]


# Types of arguments. An array is a numpy.ndarray or a cupy.ndarray; as CuPy may not be installed,
# a type checker takes it on trust, and the functions check it themselves.
Array = Any
Size = Sequence[int]
PerAxis = int | Sequence[int]
Padding = int | str | Sequence[int | Sequence[int]]
Seed: TypeAlias = "np.random.Generator | int | None"     # numpy.random loads when it is used
Path = str | os.PathLike[str]


# 1 ARRAYS: the arrays that come in choose the module ---------------------------------------------

def array_module(*arrays: Array) -> ModuleType:
    """The module, numpy or cupy, whose arrays these are.

    Parameters
    ----------
    *arrays : arrays
        At least one. CuPy is recognised only if the caller has imported it.

    Returns
    -------
    module

    Raises
    ------
    TypeError
        If there is no array, something is not an array, or the two kinds are mixed.
    """
    cupy = sys.modules.get("cupy")
    device_array = getattr(cupy, "ndarray", ())     # () while cupy is absent or half imported
    for a in arrays:
        if not isinstance(a, (np.ndarray, device_array)):
            raise TypeError(f"array_module: wants NumPy or CuPy arrays, got {_kind(a)}; "
                            "numpy.asarray converts")
    if not arrays:
        raise TypeError("array_module: wants at least one array, got none")
    return _one_module("array_module", **{f"array {i}": a for i, a in enumerate(arrays)})


def _xp(a):
    """The module of an array that was checked before."""
    return np if isinstance(a, np.ndarray) else sys.modules["cupy"]


def _one_module(fn, **arrays):
    modules = {name: _xp(a) for name, a in arrays.items()}
    first, *others = modules.values()
    if any(module is not first for module in others):
        raise TypeError(f"{fn}: NumPy and CuPy arrays do not mix, got "
                        + ", ".join(f"{name} {m.__name__}" for name, m in modules.items())
                        + "; cupy.asarray(a) moves one to the GPU, to_numpy(a) to the host")
    return first


def best_module() -> ModuleType:
    """cupy if a GPU answers a small matrix product, else numpy. For scripts; never raises."""
    # a missing wheel, driver or kernel image each raise a different kind of error
    with contextlib.suppress(Exception):
        import cupy  # type: ignore
        if float((cupy.ones((2, 2)) @ cupy.ones((2, 2))).sum()) == 8:
            return cupy
    return np


def to_numpy(a: Array) -> np.ndarray[Any, Any]:
    """The array on the host: a itself if it is a NumPy array, else a copy of the CuPy array."""
    return a if array_module(a) is np else a.get()


def _kind(value):
    return "None" if value is None else f"a {type(value).__name__}"


def _integer(fn, name, value, low):
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{fn}: {name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{fn}: {name} must be at least {low}, got {value}")
    return int(value)


def _per_axis(fn, name, value, rank, low):
    """An int, or one int per axis, as a tuple of rank ints that are at least low."""
    if isinstance(value, Integral):
        value = (value,) * rank
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{fn}: {name} must be an integer or one per axis, got {value!r}")
    if len(value) != rank:
        raise ValueError(f"{fn}: {name} must have one entry for each of {rank} axes, "
                         f"got {value!r}")
    return tuple(_integer(fn, name, v, low) for v in value)


def _real(fn, name, value, low, high=math.inf):
    """A finite number in [low, high]."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{fn}: {name} must be a number, got {value!r}")
    if not low <= value <= high or math.isinf(value):       # written so that NaN fails
        raise ValueError(f"{fn}: {name} must be a finite number from {low} to {high}, got {value}")
    return float(value)


def _one_of(fn, name, value, allowed):
    if not isinstance(value, str):
        raise TypeError(f"{fn}: {name} must be one of {allowed}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{fn}: {name} must be one of {allowed}, got {value!r}")
    return value


def _flag(fn, name, value):
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{fn}: {name} must be True or False, got {value!r}")
    return bool(value)


_MOST = 2 ** 46         # float16 numbers in all the memory that a process can address


def _possible(fn, name, size):
    if math.prod(size) > _MOST:
        raise ValueError(f"{fn}: {name} asks for {size}, more than any memory holds")
    return size


def _size(fn, size):
    if not isinstance(size, (tuple, list)):
        raise TypeError(f"{fn}: size must be a tuple of integers, got {size!r}")
    if not size:
        raise ValueError(f"{fn}: size must name at least one axis, got {size!r}")
    return _possible(fn, "size", _per_axis(fn, "size", size, len(size), 1))


def _float_dtype(fn, dtype):
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found not in (np.float16, np.float32, np.float64):
        raise TypeError(f"{fn}: dtype must be float16, float32 or float64, got {dtype!r}")
    return found


def _module(fn, xp):
    if xp is not np and (xp is None or xp is not sys.modules.get("cupy")):
        raise TypeError(f"{fn}: xp must be the module numpy or cupy, got {xp!r}")
    return xp


def _generator(fn: str, rng: Seed) -> "np.random.Generator":
    """A Generator, a seed or None as a Generator; draws are made on the host, so that a CPU and
    a GPU start from the same bits."""
    if isinstance(rng, np.random.Generator):
        return rng
    return np.random.default_rng(None if rng is None else _integer(fn, "rng (a seed)", rng, 0))


_COMMON = {(np.ndarray, np.dtype(np.float32)), (np.ndarray, np.dtype(np.float64))}


def _arrays(fn, optional=(), **arrays):
    """The module of the arrays, once they are arrays of one module and one floating dtype."""
    arrays = {k: a for k, a in arrays.items() if a is not None or k not in optional}
    kinds = {(type(a), getattr(a, "dtype", None)) for a in arrays.values()}
    if len(kinds) == 1 and kinds <= _COMMON:                # the rest is for the error messages
        return np
    for name, a in arrays.items():
        try:
            array_module(a)
        except TypeError:
            raise TypeError(f"{fn}: {name} must be a NumPy or CuPy array, got {_kind(a)}; "
                            "numpy.asarray converts") from None
        if a.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"{fn}: {name} must be float16, float32 or float64, got {a.dtype}; "
                            f"{name}.astype(numpy.float32) converts")
    if len({a.dtype for a in arrays.values()}) > 1:
        raise TypeError(f"{fn}: arrays must share a dtype, got "
                        + ", ".join(f"{k} {a.dtype}" for k, a in arrays.items()))
    return _one_module(fn, **arrays)


def _same_shape(fn, name, a, shape, what):
    if a.shape != tuple(shape):
        raise ValueError(f"{fn}: {name} must have the shape of {what}, {tuple(shape)}, "
                         f"got {name}.shape={a.shape}")


def _wide(*arrays):
    """float16 as float32, the rest as they are: half precision is storage, not arithmetic."""
    return [a.astype(np.float32) if a is not None and a.dtype == np.float16 else a for a in arrays]


def _narrow(dtype, *arrays):
    return tuple(a if a is None else a.astype(dtype, copy=False) for a in arrays)


# 2 COORDINATES -----------------------------------------------------------------------------------

def axis_coords(n: int, *, scale: str = "unit", dtype: DTypeLike = np.float32,
                xp: ModuleType = np) -> Array:
    """The coordinates of the n pixels along an axis.

    "unit":  c[i] = (2i - (n-1)) / (n-1), from -1 to 1, and c = [0] for n = 1
    "pixel": c[i] = i

    Parameters
    ----------
    n : int, at least 1
    scale : "unit" or "pixel"
    dtype : floating dtype
    xp : module, numpy or cupy

    Returns
    -------
    (n,) array

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind; if n < 1 or scale is another word.

    Notes
    -----
    The unit formula divides an exact integer once, so c[i] == -c[n-1-i] to the last bit.
    ``linspace(-1, 1, n)`` and ``2i/(n-1) - 1`` round twice and are not antisymmetric.

    Examples
    --------
    >>> axis_coords(5).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    >>> axis_coords(3, scale="pixel").tolist()
    [0.0, 1.0, 2.0]
    """
    n, = _possible("axis_coords", "n", (_integer("axis_coords", "n", n, 1),))
    _one_of("axis_coords", "scale", scale, ("unit", "pixel"))
    _module("axis_coords", xp)
    dtype = _float_dtype("axis_coords", dtype)
    i = xp.arange(n, dtype=np.float64)
    return (i if scale == "pixel" else (2 * i - (n - 1)) / max(n - 1, 1)).astype(dtype)


def coord_channels(size: Size, *, radius: bool = False, scale: str = "unit",
                   dtype: DTypeLike = np.float32, xp: ModuleType = np) -> Array:
    """The coordinate channels of an image: one per axis, then the radius if asked for.

    y[a, i_0, i_1, ...] = axis_coords(size[a])[i_a]     for each axis a
    y[len(size), ...]   = sqrt(sum_a y[a]^2)            the radius

    Parameters
    ----------
    size : tuple of ints, (length,) or (H, W) or (depth, H, W) or any other rank
    radius : bool
    scale : "unit" or "pixel"
        On the unit scale the radius is 0 at the centre, on the pixel scale at pixel (0, ..., 0).
    dtype : floating dtype
    xp : module, numpy or cupy

    Returns
    -------
    (K, *size) array, where K = len(size), plus 1 with radius

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.

    Notes
    -----
    Differs: the paper's code has the column first and divides each axis by the other's length;
    its printed listing centres the radius at (0.5, 0.5) of the unit scale.

    Examples
    --------
    >>> coord_channels((2, 3)).tolist()
    [[[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]], [[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]]
    """
    size = _size("coord_channels", size)
    radius = _flag("coord_channels", "radius", radius)
    dtype = _float_dtype("coord_channels", dtype)
    rank = len(size)
    y = _module("coord_channels", xp).empty((rank + radius, *size), np.float64)
    for a, n in enumerate(size):
        y[a] = axis_coords(n, scale=scale, dtype=np.float64, xp=xp).reshape(
            (n,) + (1,) * (rank - a - 1))
    if radius:
        y[rank] = xp.sqrt((y[:rank] ** 2).sum(axis=0))
    return y.astype(dtype)


def add_coords(x: Array, *, radius: bool = False, scale: str = "unit") -> Array:
    """The images with coordinate channels behind their own: concatenate(x, coord_channels).

    Parameters
    ----------
    x : (N, C, *size) array
    radius, scale : as in coord_channels

    Returns
    -------
    (N, C+K, *size) array

    Raises
    ------
    TypeError, ValueError
        If x is not such an array or an option is wrong.

    Examples
    --------
    >>> add_coords(np.ones((1, 1, 2), np.float32)).tolist()
    [[[1.0, 1.0], [-1.0, 1.0]]]
    """
    xp = _arrays("add_coords", x=x)
    _spatial("add_coords", x)
    N, C = x.shape[:2]
    coords = coord_channels(x.shape[2:], radius=radius, scale=scale, dtype=x.dtype, xp=xp)
    y = xp.empty((N, C + len(coords), *x.shape[2:]), x.dtype)
    y[:, :C], y[:, C:] = x, coords
    return y


def add_coords_backward(dy: Array, x: Array, *, radius: bool = False, scale: str = "unit"
                        ) -> Array:
    """Gradient of add_coords: dx = dy[:, :C], since the coordinates are constants.

    Parameters
    ----------
    dy : (N, C+K, *size) array
    x, radius, scale : as in add_coords

    Returns
    -------
    dx : (N, C, *size) array

    Raises
    ------
    TypeError, ValueError
        As add_coords, and if dy has not the shape of its output.
    """
    _arrays("add_coords_backward", dy=dy, x=x)
    _spatial("add_coords_backward", x)
    _one_of("add_coords_backward", "scale", scale, ("unit", "pixel"))
    N, C, *size = x.shape
    K = len(size) + _flag("add_coords_backward", "radius", radius)
    _same_shape("add_coords_backward", "dy", dy, (N, C + K, *size), "the output")
    return dy[:, :C].copy()


def _spatial(fn, x, rank=None, name="x"):
    if x.ndim < 3 or rank not in (None, x.ndim - 2):
        wanted = "(N, C, *size)" if rank is None else f"(N, C, *size) with {rank} spatial axes"
        raise ValueError(f"{fn}: {name} must be {wanted}, got {name}.shape={x.shape}")


# 3 CONVOLUTION -----------------------------------------------------------------------------------
#
#   y[n, f, o] = b[f] + sum_{c, k} x[n, c, o*stride + k*dilation - before] * w[f, c, k]
#
# where o and k run over output pixels and kernel taps, one index per spatial axis, x is 0 outside
# the image, and with G groups filter f sees only the C/G channels of its own group. The output
# size of each axis is floor((size + before + after - (kernel-1)*dilation - 1) / stride) + 1.
#
# The formula is linear in x and in w, so three private functions serve all that is public here:
# _correlate is the formula, _correlate_dx its transpose by x, _correlate_dw its transpose by w.
# A transposed convolution is _correlate_dx run forward; its gradients are the other two.
# Each is a batch of products with columns, matrices that hold at [(c, k), o] the pixel that tap k
# of output o reads: w @ columns, the same with the mirrored kernel, and columns @ dy.T. Each
# returns its plan, for _run: blocks of work, and what makes one array of their results.
#
# Decided on numbers (one core, float32, 2026-11-24): no Winograd. F(2x2, 3x3) in NumPy took 1.4 of
# the time of the columns for 32 to 32 filters on 64 x 64 pixels, 0.9 for 64 on 56 x 56, 0.65 for
# 128 on 28 x 28 and 256 on 14 x 14. It would serve one kernel at stride 1, forward and for dx, and
# a NaN or an infinity spreads to the tile around it, so that it would stand beside the columns
# and not in their place.

class _Geometry(NamedTuple):
    """What a convolution does to the spatial axes; one entry of each tuple per axis."""
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]       # (before, after); negative crops
    groups: int
    out: tuple[int, ...]


def _span(kernel, dilation):
    return tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation))


def _pad_pairs(fn, padding, rank, same):
    """Every form of padding as (before, after) pairs; same is the total that "same" needs."""
    if isinstance(padding, str):
        if _one_of(fn, "padding", padding, ("same", "valid")) == "valid":
            same = (0,) * rank
        # the odd pixel goes after, as in TensorFlow, PyTorch and ONNX SAME_UPPER
        return tuple((max(p, 0) // 2, p - max(p, 0) // 2) for p in same)
    if isinstance(padding, (tuple, list)) and len(padding) == rank:
        return tuple(_per_axis(fn, "padding", p, 2, 0) for p in padding)
    return tuple((p, p) for p in _per_axis(fn, "padding", padding, rank, 0))


def _window_geometry(fn, size, kernel, stride, padding, dilation=1, groups=1):
    """The geometry of a kernel that moves over an image of the given size."""
    rank = len(size)
    stride = _per_axis(fn, "stride", stride, rank, 1)
    dilation = _per_axis(fn, "dilation", dilation, rank, 1)
    span = _span(kernel, dilation)
    same = tuple(max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(size, stride, span))
    pads = _pad_pairs(fn, padding, rank, same)
    out = tuple((n + p + q - k) // s + 1 for n, (p, q), k, s in zip(size, pads, span, stride))
    _possible(fn, "padding", tuple(n + p + q for n, (p, q) in zip(size, pads)))
    if min(kernel) < 1 or min(out) < 1:
        raise ValueError(f"{fn}: a kernel of {tuple(kernel)} with dilation {dilation} does not "
                         f"fit into an image of {tuple(size)} with padding {pads}")
    return _Geometry(tuple(kernel), stride, dilation, pads, groups, out)


def _check_operands(fn, x, w, b, groups):
    """Check what a convolution and its transpose ask alike; groups, and the shapes in words."""
    _arrays(fn, optional=("b",), x=x, w=w, b=b)
    _spatial(fn, x)
    shapes = f"(x.shape={x.shape}, w.shape={w.shape})"
    if w.ndim != x.ndim:
        raise ValueError(f"{fn}: x and w must have the same number of axes {shapes}")
    return _integer(fn, "groups", groups, 1), shapes


def _conv_geometry(fn, x, w, b, stride, padding, dilation, groups, coords=0, size=None):
    """Check the arguments of a convolution of x with coords more channels, of size if given."""
    groups, shapes = _check_operands(fn, x, w, b, groups)
    C = x.shape[1]
    if w.shape[1] * groups != C + coords:
        extra = f" and {coords} coordinates" if coords else ""
        per_group = f" in each of {groups} groups" if groups > 1 else ""
        raise ValueError(f"{fn}: x has {C} channels{extra} but w takes {w.shape[1]}{per_group} "
                         f"{shapes}")
    if w.shape[0] % groups:
        raise ValueError(f"{fn}: groups={groups} must divide the {w.shape[0]} filters {shapes}")
    if b is not None:
        _same_shape(fn, "b", b, w.shape[:1], "the filters")
    return _window_geometry(fn, x.shape[2:] if size is None else size, w.shape[2:], stride,
                            padding, dilation, groups)


def _deconv_geometry(fn, x, w, b, stride, padding, output_padding, dilation, groups):
    """Check the arguments of a transposed convolution. Returns the geometry of the convolution
    whose gradient it is, and its own output size."""
    groups, shapes = _check_operands(fn, x, w, b, groups)
    rank, C = x.ndim - 2, x.shape[1]
    if w.shape[0] != C:
        raise ValueError(f"{fn}: x has {C} channels but w takes {w.shape[0]} {shapes}")
    if C % groups:
        raise ValueError(f"{fn}: groups={groups} must divide the {C} channels of x {shapes}")
    if b is not None:
        _same_shape(fn, "b", b, (w.shape[1] * groups,), "the filters")
    size, kernel = x.shape[2:], w.shape[2:]
    stride = _per_axis(fn, "stride", stride, rank, 1)
    dilation = _per_axis(fn, "dilation", dilation, rank, 1)
    extra = _per_axis(fn, "output_padding", output_padding, rank, 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation)):
        raise ValueError(f"{fn}: output_padding must be smaller than stride or dilation, got "
                         f"{extra} with stride {stride} and dilation {dilation}")
    full = tuple((n - 1) * s + k for n, s, k in zip(size, stride, _span(kernel, dilation)))
    same = tuple(f + e - n * s for f, e, n, s in zip(full, extra, size, stride))
    pads = _pad_pairs(fn, padding, rank, same)
    out = tuple(f + e - p - q for f, e, (p, q) in zip(full, extra, pads))
    _possible(fn, f"stride {stride} and dilation {dilation}", full)
    if min(kernel) < 1 or min(size) < 1 or min(out) < 1:
        raise ValueError(f"{fn}: a kernel of {kernel} with dilation {dilation} and padding {pads} "
                         f"leaves nothing of an image of {size} {shapes}")
    return _Geometry(kernel, stride, dilation, pads, groups, size), out


@functools.cache
def _blas():
    """How to get and set the threads of NumPy's OpenBLAS, or None where NumPy has another BLAS."""
    extension = getattr(sys.modules.get("numpy._core._multiarray_umath"), "__file__", None)
    for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
        try:
            library = ctypes.CDLL(extension)        # symbols of what it links to count too
            return tuple(getattr(library, f"{prefix}openblas_{verb}_num_threads{suffix}")
                         for verb in ("get", "set"))
        except (AttributeError, OSError):
            continue
    return None


@functools.cache
def _pool(process, threads):
    """Threads that stay for the next call, and for each by its id the cores that it was told to
    use; a forked process has none of them and makes its own."""
    from concurrent.futures import ThreadPoolExecutor

    pool, all_here = ThreadPoolExecutor(threads), threading.Barrier(threads)
    ids = pool.map(lambda _: (all_here.wait(), threading.get_native_id())[1], range(threads))
    return pool, dict.fromkeys(ids)


@functools.cache
def _core():
    """A function that says on which core its caller runs, or None where the system has none."""
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


@contextlib.contextmanager
def _apart(threads, apart):
    """Keep this thread where it runs, and the other threads off its core. Linux wakes a thread
    beside the one that woke it, and leaves both on one core for milliseconds while the next is
    idle: 16 to 16 filters of 3x3 took 4.8 ms after a pause, and 2.8 ms apart (2026-11-24)."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") and _core() else set()
    if len(threads) >= len(cores):
        yield
        return
    here = {_core()()} if apart else set()
    try:
        for thread in (t for t, told in threads.items() if told != cores - here):
            os.sched_setaffinity(thread, cores - here)
            threads[thread] = cores - here
        os.sched_setaffinity(0, here or cores)
    except OSError:                             # a system that refuses only costs time
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)


@functools.cache
def _keep_memory():
    """Ask glibc to keep freed memory. It gives pieces larger than any freed before back to the
    system, up to 32 MiB, and gets them back page by page; to have freed one such piece, never
    touched, makes it keep what is smaller. Halves the time of a training step (2026-11-24)."""
    np.empty(2 ** 25 - 2 ** 16, np.uint8)


def _cores():
    """OMP_NUM_THREADS if that is a number, else the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_one_team, _this_thread = threading.Lock(), threading.local()
_counting = threading.Lock()
_calls: list[int] = []                  # for each call at work, the BLAS threads before it


@contextlib.contextmanager
def _one_blas_thread():
    """Products by one BLAS thread, whose bits depend neither on the number of cores nor on what
    other threads of the program do: the first call to come sets it, the last to go restores."""
    get_threads, set_threads = _blas() or (lambda: 1, lambda threads: None)
    with _counting:
        _calls.append(_calls[0] if _calls else get_threads())
        set_threads(1)
    try:
        yield
    finally:
        with _counting:
            before = _calls.pop()
            if not _calls:
                set_threads(before)


def _in_a_task():
    """Whether this thread is at work for _spread."""
    return getattr(_this_thread, "in_a_task", False)


def _spread(xp, task, items, apart=True):
    """[task(item) for item in items], on all cores: one thread per core, one BLAS thread in each.

    The calling thread is one of them. Items do not depend on the number of threads and results
    keep their order, so that sums are the same on one core. OMP_NUM_THREADS sets the number. A
    task that comes here in its turn does its own items one by one, and so does another thread of
    the program while the team is at work. Tasks that run code of the user are not kept apart, as
    threads that it starts would inherit the cores.
    """
    if xp is not np or _in_a_task():
        return [task(item) for item in items]
    results, queue, workers = [None] * len(items), enumerate(items), 1
    if len(items) > 1 and not _one_team.locked():
        _keep_memory()
        workers = min(_cores(), len(items))

    def work():
        _this_thread.in_a_task = True
        try:
            for i, item in queue:       # threads take items from one iterator, one at a time
                results[i] = task(item)
        finally:
            _this_thread.in_a_task = False
    with _one_blas_thread():
        if workers < 2 or _blas() is None or not _one_team.acquire(blocking=False):
            work()
            return results
        helpers = []
        try:
            pool, threads = _pool(os.getpid(), _cores() - 1)
            with _apart(threads, apart):
                helpers = [pool.submit(work) for _ in range(workers - 1)]
                work()                  # this thread is one of the team
        finally:
            try:
                helpers = [h for h in helpers if not h.cancel()]
                errors = [h.exception() for h in helpers]       # waits for them
            finally:
                _one_team.release()
    for error in filter(None, errors):
        raise error
    return results


def _run(xp, *plans):
    """The results of plans, pairs (jobs, finish) where finish takes what the jobs returned. All
    jobs stand in one queue, so that threads wait for each other only at its end."""
    done = iter(_spread(xp, lambda job: job(), [job for jobs, _ in plans for job in jobs]))
    return [finish([next(done) for _ in jobs]) for jobs, finish in plans]


_NOTHING: tuple[Any, Any] = ([], lambda done: None)         # the plan of what nobody wants


_BLOCK = 2 ** 22        # most bytes of columns in a block
_SHORT = 16             # rows, or images, of fewer pixels make products that are too small


def _blocks(N, out, per_point, row=128):
    """Cut N images of output points, of so many bytes of columns each, into tiles: tuples of
    slices (images, *out) of nearly equal lengths, at most row points on the last axis.

    Four tiles if they make no more than _BLOCK bytes each, and one in a task that has a core of
    its own: threads wait for each other at every call of NumPy, so few large calls beat blocks
    that would stay in a core's own cache (16 to 16 filters of 3x3: 7.1 ms in 32 blocks, 3.6 ms in
    5; a step of the painter, which trains 4 images in a task, 0.87 of its time; 2026-11-24)."""
    tiles: list[list[slice]] = []
    total = N * math.prod(out) * per_point
    share = total // (1 if _in_a_task() else 4)
    room = max(1, min(_BLOCK, max(share, 2 ** 19)) // max(1, per_point))
    for n, most in zip((*reversed(out), N), (row, *(math.inf,) * len(out))):
        parts = -(-n // max(1, min(n, room, most))) if n else 0
        tiles.insert(0, [slice(i * n // parts, (i + 1) * n // parts) for i in range(parts)])
        room = max(1, room * parts // max(1, n))
    return list(itertools.product(*tiles))


def _padded(x, pads, value=0):
    """x with pads[a] = (before, after) pixels of value on spatial axis a; negative pads crop.

    It is x itself from index -before to size + after, wherever those lie, as a view if inside."""
    spans = [(-p, n + q, n) for n, (p, q) in zip(x.shape[2:], pads)]
    inside = [(max(lo, 0), max(min(hi, n), lo, 0)) for lo, hi, n in spans]
    x = x[(slice(None), slice(None), *(slice(*ends) for ends in inside))]
    if all(lo >= 0 and hi <= n for lo, hi, n in spans):
        return x
    y = _xp(x).full(x.shape[:2] + tuple(hi - lo for lo, hi, _ in spans), value, x.dtype)
    y[(slice(None), slice(None), *(slice(i - lo, i - lo + n) for (lo, _, _), (i, _), n in
                                   zip(spans, inside, x.shape[2:])))] = x
    return y


def _channels_last(x):
    """Whether x (N, C, *size) lies in memory as (N, *size, C)."""
    return x.ndim > 2 and x.shape[1] > 1 and x.strides[1] == x.itemsize < x.strides[-1]


def _empty(xp, shape, dtype, last):
    """An array of shape (N, C, *size), in memory as (N, *size, C) if last is set."""
    if last:
        return xp.moveaxis(xp.empty((shape[0], *shape[2:], shape[1]), dtype), -1, 1)
    return xp.empty(shape, dtype)


def _planes(geo, *arrays):
    """The geometry and arrays (N, C, *size) with at least two spatial axes."""
    if len(geo.out) > 1:
        return geo, *arrays
    geo = geo._replace(**{k: (v, getattr(geo, k)[0]) for k, v in zip(
        ("kernel", "stride", "dilation", "pads", "out"), (1, 1, 1, (0, 0), 1))})
    return geo, *(a[:, :, None] for a in arrays)


def _seen(x, geo, block):
    """The part of the padded images that a block of outputs reads."""
    return _padded(x[block[0]], tuple(
        (p - o.start * s, (o.stop - 1) * s - p + k - n) for o, s, k, (p, _), n in
        zip(block[1:], geo.stride, _span(geo.kernel, geo.dilation), geo.pads, x.shape[2:])))


def _columns(x, geo, block, layout):
    """The columns that a block of outputs reads: matrices (..., taps of a group, pixels).

    "rows":   (G, N, ..., rows, taps, pixels of a row), for rows of taps one line apart
    "images": (G, N, ..., KH or 1, taps, pixels of an image), to be summed over KH
    "points": (G, 1, taps, pixels of the block), the taps side by side in memory

    Small matrices make the fastest products: OpenBLAS does not pack those of up to a million
    multiply-adds, and runs at 95 to 115 GFLOP/s a core where it gets 40 to 100 in one large
    product, the less the fewer the filters. It loses as much on rows of 8 to 28 pixels, which
    "images" joins (3x3, 256 to 256 on 14 x 14 pixels: 12.8 ms for 19; 2026-11-24). Taps are
    ordered (kh, ..., c, kw). The pixels that one row of outputs reads at kh are those that the
    row before it reads at kh + 1, so KW copies of the image serve KH * KW taps: the matrices
    overlap.
    """
    x, places, G, h = _seen(x, geo, block), block[1:], geo.groups, len(geo.out) - 2
    # every axis of the columns as (length, stride in x)
    steps, C = x.strides[2:], x.shape[1] // G
    n, g, c = (x.shape[0], x.strides[0]), (G, C * x.strides[1]), (C, x.strides[1])
    o = [(p.stop - p.start, t * s) for p, t, s in zip(places, steps, geo.stride)]
    k = [(K, t * d) for K, t, d in zip(geo.kernel, steps, geo.dilation)]
    taps, KH, K = [*k[:h], c, k[-1]], geo.kernel[h], math.prod(geo.kernel) * C
    (rows, _), (row, _), lines = *o[h:], (x.shape[2 + h], steps[h])
    outer = (G, n[0], *(length for length, _ in o[:h]))
    strided = _xp(x).lib.stride_tricks.as_strided

    def view(*axes):
        return strided(x, *zip(*axes))
    if layout == "points":
        points = math.prod(outer[1:]) * rows * row
        return view(g, n, *o, k[h], *taps).reshape(G, 1, points, K).swapaxes(2, 3)
    if layout == "rows":
        copies = view(g, n, *o[:h], lines, *taps, o[-1]).copy()
        line = copies.strides[h + 2]
        return strided(copies, (*outer, rows, K, row), (
            *copies.strides[:h + 2], line * geo.stride[h], row * x.itemsize, x.itemsize))
    if KH == 1 or geo.stride[h] > 1:
        return view(g, n, *o[:h], k[h], *taps, *o[h:]).reshape(*outer, 1, K, rows * row)
    copies = view(g, n, *o[:h], *taps, lines, o[-1]).copy()
    line = row * x.itemsize
    return strided(copies, (*outer, KH, K // KH, rows * row), (
        *copies.strides[:h + 2], line * geo.dilation[h], line * lines[0], x.itemsize))


def _per_point(x, geo, shared, lines=False):
    """Numbers per output point in the columns of x, where so many rows of taps share one copy, or
    in the padded image, if that is more; of the latter _filter_lines holds three at a time."""
    padded = math.prod(n + p + q for n, (p, q) in zip(x.shape[2:], geo.pads))
    padded //= max(1, math.prod(geo.out))
    return x.shape[1] * max(math.prod(geo.kernel) // shared * (not lines),
                            padded * any(map(any, geo.pads)), 3 * max(1, padded) * lines)


def _weight_matrix(w, geo):
    """(F, C/G, *kernel) as (G, F/G, taps), the taps in the order of _columns."""
    order = (0, w.ndim - 2, *range(2, w.ndim - 2), 1, w.ndim - 1)
    return w.transpose(order).reshape(geo.groups, w.shape[0] // geo.groups,
                                      math.prod(w.shape[1:]))


def _points(y, groups):
    """y (N, F, *out) as (G, N, *out, F/G), a view."""
    y = y.reshape(y.shape[0], groups, y.shape[1] // groups, *y.shape[2:])
    return _xp(y).moveaxis(y, (1, 2), (0, -1))


def _at(block):
    """The index of a block of outputs, all filters."""
    return block[0], slice(None), *block[1:]


def _product(w, columns, y):
    """y = w @ columns, w being (G, F/G, taps) and y (G, ..., pixels, F/G)."""
    xp, (G, F, K) = _xp(w), w.shape
    w = w.reshape(G, *(1,) * (columns.ndim - 3), F, K)
    if K == 1:                          # an outer product: numpy's matmul would not go to BLAS
        xp.multiply(w.swapaxes(-1, -2), columns.swapaxes(-1, -2), out=y)
    elif y.strides[-1] == y.itemsize:
        xp.matmul(columns.swapaxes(-1, -2), xp.ascontiguousarray(w.swapaxes(-1, -2)), out=y)
    else:
        part = next((F // i for i in range(1, F // 16 + 1)
                     if F % i == 0 and F // i * K * columns.shape[-1] <= 10 ** 6), max(1, F))
        # rows that do not end with a vector register go better by filters (3x3 on 28 x 28 pixels,
        # 128 to 128: 12.0 ms for 13.7; 2026-11-24); turning more weights costs more than it gains
        if columns.shape[-1] % 16 and F <= 128:
            w = xp.ascontiguousarray(w.swapaxes(-1, -2)).swapaxes(-1, -2)
        y = y.swapaxes(-1, -2)
        xp.matmul(w.reshape(*w.shape[:-2], F // part, part, K), columns[..., None, :, :],
                  out=y.reshape(*y.shape[:-2], F // part, part, y.shape[-1]))


def _pieces(columns, most):
    """columns (..., taps, points) as (..., pieces, taps, points of a piece): the longest pieces of
    equal length up to most, or one where these would be short."""
    *outer, K, points = columns.shape
    run = next(i for i in range(min(most, points), 0, -1) if points % i == 0)
    run = run if run >= _SHORT else points
    return columns.reshape(*outer, K, points // run, run).swapaxes(-2, -3)


def _sum_products(w, columns, y):
    """y = w @ columns summed over the rows of the kernel: columns (..., KH, taps, points of an
    image)."""
    columns = _pieces(columns, 128)
    *outer, KH, pieces, K, run = columns.shape
    y = y.reshape(*outer, pieces, run, y.shape[-1])
    part = _xp(y).empty_like(y) if KH > 1 else None
    for k in range(KH):
        _product(w[:, :, k * K:(k + 1) * K], columns[..., k, :, :, :], part if k else y)
        if k:
            y += part


def _filter_lines(x, w, geo, block):
    """A block of outputs (N, C, *out) of one filter per channel, w (C, *kernel). There is no sum
    over channels for a matrix product, but sums over the rows of a kernel are fast on long lines:
    the image in one line reads, for each tap, one run of itself. What such a run holds between
    the outputs is left out (64 channels of 3x3: 9.2 ms, 5.2 ms so; 2026-11-24)."""
    xp = _xp(x)
    x, strided = xp.ascontiguousarray(_seen(x, geo, block)), xp.lib.stride_tricks.as_strided
    steps, out = x.strides[2:], [o.stop - o.start for o in block[1:]]
    apart = [s * t for s, t in zip(geo.stride, steps)]
    length = sum((n - 1) * t for n, t in zip(out, apart)) // x.itemsize + 1
    runs = strided(x, (*x.shape[:2], *geo.kernel, length), (
        *x.strides[:2], *(d * t for d, t in zip(geo.dilation, steps)), x.itemsize))
    rows = range(3, 2 + len(out))               # numbers for all axes of the kernel but the last
    y = functools.reduce(operator.iadd, (
        xp.einsum(runs[..., tap, :], [0, 1, *rows, 2], w[..., tap], [1, *rows], [0, 1, 2])
        for tap in range(geo.kernel[-1])))
    return strided(y, (*y.shape[:2], *out), (*y.strides[:2], *apart))


def _correlate(x, w, geo, base=None, last=False, result=None):
    """The plan of y = w @ columns + base, where base (F, *out) or (F, 1, ...) holds bias and
    coordinates."""
    xp, F, G = _xp(x), len(w), geo.groups
    if result is None:
        result = _empty(xp, (len(x), F, *geo.out), x.dtype, last)
    base = None if base is None else xp.broadcast_to(base, (F, *geo.out))
    geo, x, y = _planes(geo, x, result)
    base = None if base is None else base.reshape(F, *geo.out)
    w = w.reshape(*w.shape[:2], *geo.kernel)
    lines, merge = w.shape[1] == 1 and F == G, math.prod(geo.out[-2:]) < _SHORT
    runs = not merge and (geo.out[-1] < _SHORT or geo.dilation[-2] > 1 or geo.kernel[-2] == 1)
    matrix = _weight_matrix(w, geo)
    whole = any(a.flags.c_contiguous for a in (result, xp.moveaxis(result, 1, -1)))

    def fill(block):
        target = y[_at(block)]
        part = target if whole else xp.empty(target.shape, x.dtype)
        if lines:
            part[...] = _filter_lines(x, w[:, 0], geo, block)
        elif merge:
            columns, points = _columns(x, geo, block, "points"), _points(part, G)
            merged = xp.empty(points.shape, x.dtype)
            _product(matrix, columns, merged.reshape(G, 1, columns.shape[-1], F // G))
            points[...] = merged
        elif runs:
            _sum_products(matrix, _columns(x, geo, block, "images"), _points(part, G))
        else:
            _product(matrix, _columns(x, geo, block, "rows"), _points(part, G))
        if base is not None:
            part += base[(slice(None), *block[1:])]
        if not whole:
            target[...] = part
    shared = 1 if merge or runs and geo.stride[-2] > 1 else -(-geo.kernel[-2] // geo.stride[-2])
    blocks = _blocks(len(x), geo.out, x.itemsize * max(
        _per_point(x, geo, shared, lines), F * (1 + runs)), math.inf if runs else 128)
    return [functools.partial(fill, block) for block in blocks], lambda done: result


def _taps(geo):
    """For each kernel tap, the slices of a padded image that it reads, one per output pixel."""
    for tap in np.ndindex(*geo.kernel):
        yield (slice(None), slice(None), *(
            slice(k * d, k * d + (n - 1) * s + 1, s)
            for k, d, n, s in zip(tap, geo.dilation, geo.out, geo.stride)))


def _correlate_dx(dy, w, geo, size, base=None, last=False):
    """The plan of dx[n, c, o*stride + k*dilation - before] += sum_f w[f, c, k] * dy[n, f, o],
    plus base.

    The transpose of a correlation of stride 1 is the correlation with the mirrored kernel. With
    a stride s, pixels that lie s apart read the same taps, those with (pixel + before - tap *
    dilation) divisible by s: each such phase of dx is a correlation of stride 1 of its own."""
    xp, G, rank = _xp(dy), geo.groups, len(size)
    F, C = w.shape[0], w.shape[1] * G
    w = w.reshape(G, F // G, C // G, *geo.kernel).swapaxes(1, 2).reshape(C, F // G, *geo.kernel)
    base = None if base is None else xp.broadcast_to(base, (C, *size))
    phases, steps = [], [s // math.gcd(s, d) for s, d in zip(geo.stride, geo.dilation)]
    for n, m, K, s, d, (before, _), step in zip(size, geo.out, geo.kernel, geo.stride,
                                                geo.dilation, geo.pads, steps):
        found = []
        for p in sorted({(k * d - before) % s for k in range(K)}):
            taps = [k for k in reversed(range(K)) if (p + before - k * d) % s == 0]
            lead, out = (taps[0] * d - p - before) // s, len(range(p, n, s))
            apart = d * step // s               # of the taps in this phase
            found.append((slice(p, None, s), slice(taps[0], None, -step), len(taps), apart, out,
                          (lead, out + (len(taps) - 1) * apart - m - lead)))
        phases.append(found)

    def plan(phase):
        places, mirror, kernel, dilation, out, pads = zip(*phase)
        part = None if base is None else base[(slice(None), *places)]
        return _correlate(dy, w[(slice(None), slice(None), *mirror)], geo._replace(
            kernel=kernel, stride=(1,) * rank, dilation=dilation, pads=pads, out=out), part,
            result=dx[(slice(None), slice(None), *places)])[0]
    together = list(itertools.product(*phases))
    dx = _empty(xp, (len(dy), C, *size), dy.dtype, last)
    if len(together) < math.prod(geo.stride):           # no tap reads the other phases
        dx[...] = 0 if base is None else base
    return [job for phase in together for job in plan(phase)], lambda done: dx


def _correlate_dw(dy, x, geo, shape):
    """The plan of dw[f, c, k] = sum_{n, o} dy[n, f, o] * x[n, c, o*stride + k*dilation - before],
    in a few sums of blocks."""
    xp, (F, C, *kernel), G = _xp(dy), shape, geo.groups
    geo, x, dy = _planes(geo, x, dy)
    F, K, plane = F // G, C * math.prod(kernel), math.prod(geo.out[-2:])
    merge = plane < max(_SHORT, F // 4)     # else each image would add a dw of its own to the sum

    def add(blocks):
        dw = xp.zeros((G, K, F), dy.dtype)
        for block in blocks:
            columns = _columns(x, geo, block, "points" if merge else "images")
            most = 10 ** 6 // max(1, columns.shape[-2] * F)
            columns = _pieces(columns, most if 128 <= most < 512 else 512)
            *outer, _, pieces, _, run = columns.shape
            part = columns @ _points(dy[_at(block)], G).reshape(*outer, 1, pieces, run, F)
            dw += part.sum(axis=(*range(1, len(outer)), -3)).reshape(G, K, F)
        return dw
    shared = 1 if merge or geo.stride[-2] > 1 else geo.kernel[-2]
    blocks = _blocks(len(x), geo.out, x.itemsize * max(
        _per_point(x, geo, shared), F * G,
        K * F * G // max(1, min(512, plane * (len(x) if merge else 1)))), math.inf)
    # two to eight sums, whatever the number of cores, so that the rounding does not depend on it
    sums = min(len(blocks), max(2, min(8, _BLOCK // max(1, x.itemsize * K * F * G))))

    def finish(parts):
        outer, row = (geo.kernel[-2], *geo.kernel[:-2]), geo.kernel[-1:]
        dw = sum(parts, xp.zeros((G, K, F), dy.dtype)).swapaxes(1, 2)
        dw = dw.reshape(F * G, *outer, C, *row)                         # (F, kh, ..., c, kw)
        return xp.moveaxis(dw, (-2, 1), (1, -2)).reshape(shape)
    return [functools.partial(add, blocks[i::sums]) for i in range(sums)], finish


def _pixels(x):
    """(N, C, *size) as (N, C, pixels)."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


def _sum_by_filter(dy, b):
    """The plan of db[f] = sum over images and pixels of dy[n, f], if there is a b."""
    def add():
        pixels = _pixels(dy)
        return (pixels @ _xp(dy).ones(pixels.shape[2], dy.dtype)).sum(axis=0)
    return _NOTHING if b is None else ([add], lambda done: done[0])


def _column(b, rank):
    """b (F,) as (F, 1, ...), which broadcasts over rank spatial axes."""
    return None if b is None else b.reshape(-1, *(1,) * rank)


def conv(x: Array, w: Array, b: Array | None = None, *, stride: PerAxis = 1, padding: Padding = 0,
         dilation: PerAxis = 1, groups: int = 1) -> Array:
    """Convolution over any number of spatial axes (cross-correlation, as in PyTorch and ONNX).

    y[n, f, o] = b[f] + sum_{c, k} x[n, c, o*stride + k*dilation - before] * w[f, c, k]

    Parameters
    ----------
    x : (N, C, *size) array
    w : (F, C/groups, *kernel) array
    b : (F,) array or None
    stride, dilation : int or one int per axis, at least 1
    padding : int, one int per axis, one (before, after) pair per axis, "valid" or "same"
        Zeros around the image. "same" pads to *out = ceil(size / stride), the odd pixel after.
    groups : int
        Divides C and F; filter f sees only the channels of its own group.

    Returns
    -------
    (N, F, *out) array, out = floor((size + before + after - (kernel-1)*dilation - 1) / stride) + 1

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, dtypes differ, or shapes do not fit together.

    Examples
    --------
    >>> x = np.array([[[1., 2., 4.]]])
    >>> w = np.array([[[-1., 1.]]])
    >>> conv(x, w).tolist()
    [[[1.0, 2.0]]]
    >>> conv(x, w, np.array([10.]), padding="same").tolist()
    [[[11.0, 12.0, 6.0]]]
    """
    geo = _conv_geometry("conv", x, w, b, stride, padding, dilation, groups)
    x_, w_, b_ = _wide(x, w, b)
    return _narrow(x.dtype, *_run(_xp(x), _correlate(x_, w_, geo, _column(b_, len(geo.out)),
                                                     _channels_last(x))))[0]


def conv_backward(dy: Array, x: Array, w: Array, b: Array | None = None, *, stride: PerAxis = 1,
                  padding: Padding = 0, dilation: PerAxis = 1, groups: int = 1,
                  need_dx: bool = True) -> tuple[Array | None, Array, Array | None]:
    """Gradient of conv.

    dx[n, c, i] = sum over the (f, o, k) with o*stride + k*dilation - before = i
                  of dy[n, f, o] * w[f, c, k]
    dw[f, c, k] = sum_{n, o} dy[n, f, o] * x[n, c, o*stride + k*dilation - before]
    db[f]       = sum_{n, o} dy[n, f, o]

    Parameters
    ----------
    dy : (N, F, *out) array
    x, w, b, stride, padding, dilation, groups : as in conv
    need_dx : bool
        False leaves out dx, which the first layer of a network has no use for.

    Returns
    -------
    dx : (N, C, *size) array, or None without need_dx
    dw : (F, C/groups, *kernel) array
    db : (F,) array, or None where b is None

    Raises
    ------
    TypeError, ValueError
        As conv, and if dy has not the shape of its output.
    """
    fn = "conv_backward"
    geo = _conv_geometry(fn, x, w, b, stride, padding, dilation, groups)
    _arrays(fn, dy=dy, x=x)
    _same_shape(fn, "dy", dy, (x.shape[0], w.shape[0], *geo.out), "the output")
    dy, x_, w_ = _wide(dy, x, w)
    dx = _NOTHING
    if _flag(fn, "need_dx", need_dx):
        dx = _correlate_dx(dy, w_, geo, x.shape[2:], last=_channels_last(x))
    return _narrow(x.dtype, *_run(_xp(x), dx, _correlate_dw(dy, x_, geo, w.shape),
                                  _sum_by_filter(dy, b)))


def conv_transpose(x: Array, w: Array, b: Array | None = None, *, stride: PerAxis = 1,
                   padding: Padding = 0, output_padding: PerAxis = 0, dilation: PerAxis = 1,
                   groups: int = 1) -> Array:
    """Transposed convolution: the gradient by x of a convolution, run as a forward pass.

    y[n, f, i] = b[f] + sum over the (c, o, k) with o*stride + k*dilation - before = i
                 of x[n, c, o] * w[c, f, k]

    Parameters
    ----------
    x : (N, C, *size) array
    w : (C, F/groups, *kernel) array
    b : (F,) array or None
    stride, dilation : int or one int per axis, at least 1
    padding : as in conv
        Here it crops the output. "same" gives *out = size * stride, as TensorFlow and ONNX do.
    output_padding : int or one int per axis, smaller than stride or dilation
        Rows added after the output, which a strided convolution would have skipped.
    groups : int

    Returns
    -------
    (N, F, *out) array,
    out = (size-1)*stride - before - after + (kernel-1)*dilation + output_padding + 1

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, dtypes differ, or shapes do not fit together.

    Examples
    --------
    >>> x = np.array([[[1., 2.]]])
    >>> conv_transpose(x, np.array([[[1., 1., 1.]]]), stride=2).tolist()
    [[[1.0, 1.0, 3.0, 2.0, 2.0]]]
    """
    geo, size = _deconv_geometry("conv_transpose", x, w, b, stride, padding, output_padding,
                                 dilation, groups)
    x_, w_, b_ = _wide(x, w, b)
    return _narrow(x.dtype, *_run(_xp(x), _correlate_dx(x_, w_, geo, size,
                                                        _column(b_, len(size)))))[0]


def conv_transpose_backward(dy: Array, x: Array, w: Array, b: Array | None = None, *,
                            stride: PerAxis = 1, padding: Padding = 0, output_padding: PerAxis = 0,
                            dilation: PerAxis = 1, groups: int = 1, need_dx: bool = True
                            ) -> tuple[Array | None, Array, Array | None]:
    """Gradient of conv_transpose: dx is a convolution of dy by w, and dw is the dw of that
    convolution with x in the place of its upstream gradient.

    Parameters
    ----------
    dy : (N, F, *out) array
    x, w, b, stride, padding, output_padding, dilation, groups : as in conv_transpose
    need_dx : bool

    Returns
    -------
    dx : (N, C, *size) array, or None without need_dx
    dw : (C, F/groups, *kernel) array
    db : (F,) array, or None where b is None

    Raises
    ------
    TypeError, ValueError
        As conv_transpose, and if dy has not the shape of its output.
    """
    fn = "conv_transpose_backward"
    geo, size = _deconv_geometry(fn, x, w, b, stride, padding, output_padding, dilation, groups)
    _arrays(fn, dy=dy, x=x)
    _same_shape(fn, "dy", dy, (x.shape[0], w.shape[1] * groups, *size), "the output")
    dy, x_, w_ = _wide(dy, x, w)
    dx = _correlate(dy, w_, geo) if _flag(fn, "need_dx", need_dx) else _NOTHING
    return _narrow(x.dtype, *_run(_xp(x), dx, _correlate_dw(x_, dy, geo, w.shape),
                                  _sum_by_filter(dy, b)))


def _coord_geometry(fn, x, w, b, size, radius, scale, stride, padding, dilation):
    """Check the arguments of coord_conv; the geometry and the size of the image."""
    _arrays(fn, optional=("b",), x=x, w=w, b=b)
    _spatial(fn, x)
    if size is not None:
        size = _size(fn, size)
        _spatial(fn, x, len(size))
        _same_shape(fn, "x", x, (*x.shape[:2], *(1,) * len(size)),
                    "single pixels, which size tiles")
    _one_of(fn, "scale", scale, ("unit", "pixel"))
    K = x.ndim - 2 + _flag(fn, "radius", radius)
    return (_conv_geometry(fn, x, w, b, stride, padding, dilation, 1, K, size),
            x.shape[2:] if size is None else size)


def _tensordot(a, b, *axes):
    with _one_blas_thread():
        return _xp(a).tensordot(a, b, axes=axes)


# The coordinate along axis a is c(i_a) times 1 on every other axis, inside the image, so that its
# convolution is one small matrix product per axis: contract the kernel's axis b with the matrix
# that holds at [o, k] what tap k of output o reads, the coordinate for b = a and else a 1.

def _reads(geo, size, scale, dtype, xp):
    """For each axis the matrices (out, kernel) of the coordinate and of the 1 that a tap reads."""
    pairs = []
    for n, m, K, s, d, (before, _) in zip(size, geo.out, geo.kernel, geo.stride, geo.dilation,
                                          geo.pads):
        i = xp.arange(m)[:, None] * s + xp.arange(K) * d - before
        inside = ((i >= 0) & (i < n)).astype(dtype)
        c = axis_coords(n, scale=scale, dtype=dtype, xp=xp)[xp.clip(i, 0, n - 1)]
        pairs.append((c * inside, inside))
    return pairs


def _contract(t, matrices, side):
    """t (..., *kernel) to (..., *out) for side 1, and back for side 0: an axis per matrix."""
    for matrix in matrices:
        t = _tensordot(t, matrix, (t.ndim - len(matrices),), (side,))
    return t


def _tile(geo, reads):
    """A tiled image is x[n, c] times an image of ones, so its share of the output is
    sum_c x[n, c] * reach[f, c], where reach[f, c] is the image of ones under the kernel w[f, c]:
    nothing is tiled. Returns the matrices that take w to reach. Under a kernel of 1 all pixels
    are alike, and one stands for all of them."""
    alike = math.prod(geo.kernel) == 1 and not any(map(any, geo.pads))
    return alike, [ones[:1] if alike else ones for _, ones in reads]


def coord_conv(x: Array, w: Array, b: Array | None = None, *, size: Size | None = None,
               radius: bool = False, scale: str = "unit", stride: PerAxis = 1,
               padding: Padding = 0, dilation: PerAxis = 1) -> Array:
    """CoordConv: conv(add_coords(x), w, b) without building add_coords(x).

    y = conv(x, w[:, :C]) + (conv(coords, w[:, C:]) + b), since convolution is linear.

    The coordinates are the same for every image, so their share is computed once for the batch
    and added in the place of the bias.

    Parameters
    ----------
    x : (N, C, *size) array, or (N, C, 1, ...) array with the keyword size
    w : (F, C+K, *kernel) array
        The input channels first, then one channel per axis, then the radius.
    b : (F,) array or None
    size : tuple of ints or None
        Tiles the single pixels of x over a grid of this size: the paper's input for turning
        coordinates into images. The tiles are never built.
    radius, scale : as in coord_channels
    stride, padding, dilation : as in conv

    Returns
    -------
    (N, F, *out) array, out as in conv

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, dtypes differ, or shapes do not fit together.

    Examples
    --------
    >>> x = np.array([[[7., 7., 9.]]])
    >>> w = np.array([[[1.], [10.]]])                   # the pixel plus ten times its coordinate
    >>> coord_conv(x, w).tolist()
    [[[-3.0, 7.0, 19.0]]]
    """
    geo, grid = _coord_geometry("coord_conv", x, w, b, size, radius, scale, stride, padding,
                                dilation)
    x_, w_, b_ = _wide(x, w, b)
    xp, C, rank = _xp(x), x.shape[1], len(grid)
    # first of all, so that what memory cannot hold is refused before work starts. Channels last
    # for tiles: matrix products with one pixel per row run at full speed for every size, those
    # with one pixel per column at two thirds of it for 64 x 64 pixels (2026-11-24)
    last = size is not None or _channels_last(x)
    y = _empty(xp, (x.shape[0], w.shape[0], *geo.out), x_.dtype, last)
    reads = _reads(geo, grid, scale, x_.dtype, xp)
    base = 0 if b is None else _column(b_, rank)
    for a in range(rank):
        base = base + _contract(w_[:, C + a], [pair[a != j] for j, pair in enumerate(reads)], 1)
    if radius:
        r = coord_channels(grid, radius=True, scale=scale, dtype=x_.dtype, xp=xp)[None, rank:]
        base += _run(xp, _correlate(r, w_[:, C + rank:], geo))[0][0]
    if size is None:
        _run(xp, _correlate(x_, w_[:, :C], geo, base, result=y))
    else:
        reach = _contract(w_[:, :C], _tile(geo, reads)[1], 1)
        base = xp.moveaxis(xp.ascontiguousarray(xp.moveaxis(base, 0, -1)), -1, 0)
        xp.add(_tensordot(x_.reshape(x.shape[:2]), reach, (1,), (1,)), base, out=y)
    return _narrow(x.dtype, y)[0]


def coord_conv_backward(dy: Array, x: Array, w: Array, b: Array | None = None, *,
                        size: Size | None = None, radius: bool = False, scale: str = "unit",
                        stride: PerAxis = 1, padding: Padding = 0, dilation: PerAxis = 1,
                        need_dx: bool = True) -> tuple[Array | None, Array, Array | None]:
    """Gradient of coord_conv. The coordinates' part of dw needs only dy summed over the batch.

    Parameters
    ----------
    dy : (N, F, *out) array
    x, w, b, size, radius, scale, stride, padding, dilation : as in coord_conv
    need_dx : bool

    Returns
    -------
    dx : array of x's shape, or None without need_dx
    dw : (F, C+K, *kernel) array
    db : (F,) array, or None where b is None

    Raises
    ------
    TypeError, ValueError
        As coord_conv, and if dy has not the shape of its output.
    """
    fn = "coord_conv_backward"
    geo, grid = _coord_geometry(fn, x, w, b, size, radius, scale, stride, padding, dilation)
    xp = _arrays(fn, dy=dy, x=x)
    (N, C, *_), F, rank = x.shape, w.shape[0], len(grid)
    _same_shape(fn, "dy", dy, (N, F, *geo.out), "the output")
    _flag(fn, "need_dx", need_dx)
    dy, x_, w_ = _wide(dy, x, w)
    reads, dw = _reads(geo, grid, scale, dy.dtype, xp), xp.empty(w.shape, dy.dtype)
    dx, add_up = None, ([lambda: xp.ascontiguousarray(dy.sum(axis=0))], lambda done: done[0])
    if size is None:
        dx, dw[:, :C], total = _run(
            xp, _correlate_dx(dy, w_[:, :C], geo, grid, last=_channels_last(x)) if need_dx
            else _NOTHING, _correlate_dw(dy, x_, geo, (F, C, *geo.kernel)), add_up)
    else:
        total, = _run(xp, add_up)
        (alike, ones), axes = _tile(geo, reads), tuple(range(2, x.ndim))
        seen = dy.sum(axis=axes, keepdims=True) if alike else dy
        per_pixel = _tensordot(seen, x_.reshape(N, C), (0,), (0,))      # (F, *out, C)
        dw[:, :C] = _contract(xp.moveaxis(per_pixel, -1, 1), ones, 0)
        if need_dx:
            reach = _contract(w_[:, :C], ones, 1)
            dx = _tensordot(seen, reach, (1, *axes), (0, *axes)).reshape(x.shape)
    for a in range(rank):
        dw[:, C + a] = _contract(total, [pair[a != j] for j, pair in enumerate(reads)], 0)
    if radius:
        r = coord_channels(grid, radius=True, scale=scale, dtype=dy.dtype, xp=xp)[None, rank:]
        dw[:, C + rank:], = _run(xp, _correlate_dw(total[None], r, geo, (F, 1, *geo.kernel)))
    return _narrow(x.dtype, dx, dw, *_run(xp, _sum_by_filter(total[None], b)))


# 4 THE OTHER PIECES ------------------------------------------------------------------------------

def relu(x: Array) -> Array:
    """max(x, 0), elementwise; NaN stays NaN. x : array of any shape."""
    y = _arrays("relu", x=x).zeros_like(x)
    return _xp(x).maximum(x, y, out=y)         # twice as fast as against one number


def relu_backward(dy: Array, x: Array) -> Array:
    """dx = dy where x > 0, else 0. dy, x : arrays of one shape."""
    _arrays("relu_backward", dy=dy, x=x)
    _same_shape("relu_backward", "dy", dy, x.shape, "x")
    # dy under a mask of bits, all or none: exact for infinities, where dy * (x > 0) is not, and
    # ten times as fast as where(x > 0, dy, 0) on random signs (measured 2026-11-24)
    return (dy.view(f"i{dy.itemsize}") & -(x > 0).view("i1")).view(dy.dtype)


def _pool_geometry(fn, x, kernel, stride, padding):
    """The geometry of a pooling of x, or None where it is global."""
    _spatial(fn, x)
    if kernel is None:
        if stride is not None or padding != 0:
            raise ValueError(f"{fn}: a global pool (kernel=None) takes no stride and no padding, "
                             f"got stride={stride!r}, padding={padding!r}")
        if not math.prod(x.shape[2:]):
            raise ValueError(f"{fn}: x must have at least one pixel, got x.shape={x.shape}")
        return None
    kernel = _per_axis(fn, "kernel", kernel, x.ndim - 2, 1)
    geo = _window_geometry(fn, x.shape[2:], kernel, kernel if stride is None else stride, padding)
    if any(max(pair) >= k for pair, k in zip(geo.pads, kernel)):
        raise ValueError(f"{fn}: padding must be smaller than the kernel {kernel}, got {geo.pads}")
    return geo


def max_pool(x: Array, *, kernel: PerAxis | None = None, stride: PerAxis | None = None,
             padding: Padding = 0) -> Array:
    """The largest pixel of each window, or of the whole image.

    y[n, c, o] = max_k x[n, c, o*stride + k - before]

    Parameters
    ----------
    x : (N, C, *size) array
    kernel : int, one int per axis, or None for the whole image
    stride : as in conv; None means kernel
    padding : as in conv, smaller than the kernel; padded pixels never win

    Returns
    -------
    (N, C, *out) array, or (N, C) for the whole image

    Raises
    ------
    TypeError, ValueError
        If x is not such an array or an option is wrong.

    Examples
    --------
    >>> max_pool(np.array([[[1., 5., 2., 3.]]]), kernel=2).tolist()
    [[[5.0, 3.0]]]
    """
    xp = _arrays("max_pool", x=x)
    geo = _pool_geometry("max_pool", x, kernel, stride, padding)
    if geo is None:
        return _pixels(x).max(axis=2)
    x = _padded(x, geo.pads, -math.inf)
    y = xp.full((*x.shape[:2], *geo.out), -math.inf, x.dtype)
    for tap in _taps(geo):
        y = xp.maximum(y, x[tap])
    return y


def max_pool_backward(dy: Array, x: Array, *, kernel: PerAxis | None = None,
                      stride: PerAxis | None = None, padding: Padding = 0) -> Array:
    """Gradient of max_pool: each window passes its dy to its first largest pixel.

    dy : array of the output's shape; x and options as in max_pool. Returns dx, of x's shape.
    """
    xp = _arrays("max_pool_backward", dy=dy, x=x)
    geo = _pool_geometry("max_pool_backward", x, kernel, stride, padding)
    y = max_pool(x, kernel=kernel, stride=stride, padding=padding)
    _same_shape("max_pool_backward", "dy", dy, y.shape, "the output")
    if geo is None:
        pixels = _pixels(x)
        first = xp.arange(pixels.shape[2]) == pixels.argmax(axis=2)[:, :, None]
        return xp.where(first, dy[:, :, None], dy.dtype.type(0)).reshape(x.shape)
    padded = _padded(x, geo.pads, -math.inf)
    dx = xp.zeros(padded.shape, x.dtype)
    waiting = xp.ones(y.shape, bool)
    for tap in _taps(geo):
        wins = waiting & (padded[tap] == y)
        dx[tap] += xp.where(wins, dy, dy.dtype.type(0))
        waiting &= ~wins
    return _padded(dx, tuple((-p, -q) for p, q in geo.pads)).copy()


def mean_pool(x: Array, *, kernel: PerAxis | None = None, stride: PerAxis | None = None,
              padding: Padding = 0) -> Array:
    """The mean of each window, padded zeros included, or of the whole image.

    y[n, c, o] = sum_k x[n, c, o*stride + k - before] / taps

    Parameters
    ----------
    x, kernel, stride, padding : as in max_pool

    Returns
    -------
    (N, C, *out) array, or (N, C) for the whole image

    Raises
    ------
    TypeError, ValueError
        If x is not such an array or an option is wrong.
    """
    xp = _arrays("mean_pool", x=x)
    geo = _pool_geometry("mean_pool", x, kernel, stride, padding)
    dtype, (x,) = x.dtype, _wide(x)
    if geo is None:
        return _narrow(dtype, _pixels(x).mean(axis=2))[0]
    x = _padded(x, geo.pads)
    y = xp.zeros((*x.shape[:2], *geo.out), x.dtype)
    for tap in _taps(geo):
        y += x[tap]
    return _narrow(dtype, y / math.prod(geo.kernel))[0]


def mean_pool_backward(dy: Array, x: Array, *, kernel: PerAxis | None = None,
                       stride: PerAxis | None = None, padding: Padding = 0) -> Array:
    """Gradient of mean_pool: each window shares its dy out evenly.

    dy : array of the output's shape; x and options as in mean_pool. Returns dx, of x's shape.
    """
    xp = _arrays("mean_pool_backward", dy=dy, x=x)
    geo = _pool_geometry("mean_pool_backward", x, kernel, stride, padding)
    _same_shape("mean_pool_backward", "dy", dy,
                x.shape[:2] + (() if geo is None else geo.out), "the output")
    if geo is None:
        return xp.broadcast_to(dy.reshape(*dy.shape, *(1,) * (x.ndim - 2))
                               / math.prod(x.shape[2:]), x.shape).astype(x.dtype)
    wide, = _wide(dy)
    share = wide / math.prod(geo.kernel)
    dx = xp.zeros((*x.shape[:2], *(n + p + q for n, (p, q) in zip(x.shape[2:], geo.pads))),
                  wide.dtype)
    for tap in _taps(geo):
        dx[tap] += share
    return _padded(dx, tuple((-p, -q) for p, q in geo.pads)).astype(x.dtype)


def sum_pool(x: Array) -> Array:
    """y[n, c] = sum over the pixels of x[n, c]. x : (N, C, *size) array."""
    _arrays("sum_pool", x=x)
    _spatial("sum_pool", x)
    wide, = _wide(x)
    return _narrow(x.dtype, _pixels(wide).sum(axis=2))[0]


def sum_pool_backward(dy: Array, x: Array) -> Array:
    """dx[n, c, i] = dy[n, c]. dy : (N, C) array; x as in sum_pool."""
    xp = _arrays("sum_pool_backward", dy=dy, x=x)
    _spatial("sum_pool_backward", x)
    _same_shape("sum_pool_backward", "dy", dy, x.shape[:2], "the output")
    return xp.broadcast_to(dy.reshape(*dy.shape, *(1,) * (x.ndim - 2)), x.shape).copy()


def _channels(fn, x, **params):
    """Check (N, C, ...) against parameters (C,); how to reshape those to broadcast over x."""
    if x.ndim < 2:
        raise ValueError(f"{fn}: x must be (N, C, ...), got x.shape={x.shape}")
    for name, p in params.items():
        if p is not None:
            _same_shape(fn, name, p, x.shape[1:2], "the channels of x")
    return (-1,) + (1,) * (x.ndim - 2), (0, *range(2, x.ndim))


def affine(x: Array, scale: Array, shift: Array) -> Array:
    """y[n, c, i] = scale[c] * x[n, c, i] + shift[c].

    Parameters
    ----------
    x : (N, C, ...) array
    scale, shift : (C,) arrays

    Returns
    -------
    array of x's shape

    Raises
    ------
    TypeError, ValueError
        If the arrays are not such arrays of one dtype.
    """
    _arrays("affine", x=x, scale=scale, shift=shift)
    wide, _ = _channels("affine", x, scale=scale, shift=shift)
    return x * scale.reshape(wide) + shift.reshape(wide)


def affine_backward(dy: Array, x: Array, scale: Array, shift: Array) -> tuple[Array, Array, Array]:
    """Gradient of affine: dx = scale * dy, dscale[c] = sum_{n, i} dy * x, dshift[c] = sum dy.

    dy : array of x's shape; the rest as in affine. Returns dx, dscale, dshift.
    """
    _arrays("affine_backward", dy=dy, x=x, scale=scale, shift=shift)
    wide, axes = _channels("affine_backward", x, scale=scale, shift=shift)
    _same_shape("affine_backward", "dy", dy, x.shape, "x")
    dtype, (dy, x, scale) = x.dtype, _wide(dy, x, scale)
    return _narrow(dtype, dy * scale.reshape(wide), (dy * x).sum(axis=axes), dy.sum(axis=axes))


def _normalised(fn, x, scale, shift, mean, var, eps):
    """Check the arguments of batch_norm; xhat and 1 / standard deviation."""
    xp = _arrays(fn, optional=("mean", "var"), x=x, scale=scale, shift=shift, mean=mean, var=var)
    wide, axes = _channels(fn, x, scale=scale, shift=shift, mean=mean, var=var)
    eps = _real(fn, "eps", eps, 0)
    if (mean is None) != (var is None):
        raise ValueError(f"{fn}: mean and var must be given together or not at all, got "
                         f"mean={mean!r}, var={var!r}")
    if mean is None and x.size == 0:
        raise ValueError(f"{fn}: x must have at least one value per channel, got "
                         f"x.shape={x.shape}")
    x, mean, var = _wide(x, mean, var)
    if mean is None:
        mean, var = x.mean(axis=axes), x.var(axis=axes)
    rstd = 1 / xp.sqrt(var + eps)
    return (x - mean.reshape(wide)) * rstd.reshape(wide), rstd, wide, axes


def batch_norm(x: Array, scale: Array, shift: Array, *, mean: Array | None = None,
               var: Array | None = None, eps: float = 1e-5) -> Array:
    """Batch normalisation: y = scale * (x - mean) / sqrt(var + eps) + shift, per channel.

    Parameters
    ----------
    x : (N, C, ...) array
    scale, shift : (C,) arrays
    mean, var : (C,) arrays or None
        Constants to normalise by, as after training. None takes the mean and the (biased)
        variance of this batch, as during training; the gradient runs through them.
    eps : float

    Returns
    -------
    array of x's shape

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or shape, or only one of mean and var is given.
    """
    xhat, _, wide, _ = _normalised("batch_norm", x, scale, shift, mean, var, eps)
    return _narrow(x.dtype, xhat * scale.reshape(wide) + shift.reshape(wide))[0]


def batch_norm_backward(dy: Array, x: Array, scale: Array, shift: Array, *,
                        mean: Array | None = None, var: Array | None = None, eps: float = 1e-5
                        ) -> tuple[Array, Array, Array]:
    """Gradient of batch_norm, with xhat = (x - mean) / sqrt(var + eps) and means per channel:

    dscale = sum dy * xhat,  dshift = sum dy
    dx = scale / sqrt(var + eps) * dy                                          given statistics
    dx = scale / sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat))    of this batch

    dy : array of x's shape; the rest as in batch_norm. Returns dx, dscale, dshift.
    """
    fn = "batch_norm_backward"
    _arrays(fn, dy=dy, x=x)
    _same_shape(fn, "dy", dy, x.shape, "x")
    xhat, rstd, wide, axes = _normalised(fn, x, scale, shift, mean, var, eps)
    dy, scale = _wide(dy, scale)
    dscale, dshift = (dy * xhat).sum(axis=axes), dy.sum(axis=axes)
    dx = dy
    if mean is None:
        count = x.size // x.shape[1]
        dx = dy - (dshift.reshape(wide) + xhat * dscale.reshape(wide)) / count
    return _narrow(x.dtype, dx * (scale * rstd).reshape(wide), dscale, dshift)


def _flat(fn, x, name="x"):
    """(N, ...) as (N, classes)."""
    if x.ndim < 2 or not math.prod(x.shape[1:]):
        raise ValueError(f"{fn}: {name} must be (N, classes) or (N, ...) with at least one class, "
                         f"got {name}.shape={x.shape}")
    return _wide(x.reshape(x.shape[0], math.prod(x.shape[1:])))[0]


def softmax(x: Array) -> Array:
    """Softmax over everything but the batch: y[n, i] = exp(x[n, i]) / sum_j exp(x[n, j]).

    x : (N, ...) array. Returns an array of its shape. Turns an image into a map of where.
    """
    xp = _arrays("softmax", x=x)
    z = _flat("softmax", x)
    y = xp.exp(z - z.max(axis=1, keepdims=True))
    return _narrow(x.dtype, (y / y.sum(axis=1, keepdims=True)).reshape(x.shape))[0]


def softmax_backward(dy: Array, x: Array) -> Array:
    """dx[n, i] = y[n, i] * (dy[n, i] - sum_j dy[n, j] * y[n, j]). dy, x : arrays of one shape."""
    _arrays("softmax_backward", dy=dy, x=x)
    _same_shape("softmax_backward", "dy", dy, x.shape, "x")
    flat, y = _flat("softmax_backward", dy, "dy"), _flat("softmax_backward", softmax(x))
    dx = y * (flat - (flat * y).sum(axis=1, keepdims=True))
    return _narrow(x.dtype, dx.reshape(x.shape))[0]


def _scalar(fn, dy, **array):
    """The gradient by a loss of the array: a number, or an array of no dimensions beside it."""
    if not isinstance(dy, Real):
        if getattr(dy, "shape", None) != ():
            raise TypeError(f"{fn}: dy, the gradient by the loss, must be a number, got {dy!r}")
        _one_module(fn, dy=dy, **array)
    return dy


def _log_softmax(fn, logits, target):
    """Check the arguments of softmax_cross_entropy; log-probabilities and target, (N, classes)."""
    xp = _arrays(fn, logits=logits)
    z = _flat(fn, logits, "logits")
    N, classes = z.shape
    if not N:
        raise ValueError(f"{fn}: logits must hold at least one example, got {logits.shape}")
    if getattr(target, "dtype", np.dtype(float)).kind in "iu":
        _one_module(fn, logits=logits, target=target)
        if target.shape != (N,):
            raise ValueError(f"{fn}: target must hold one label for each of {N} examples, got "
                             f"target.shape={target.shape}")
        # an out-of-range label would match no class without a word; on a GPU the check waits
        if bool((target < 0).any()) or bool((target >= classes).any()):
            raise ValueError(f"{fn}: target must hold labels from 0 to {classes - 1}, got labels "
                             f"from {int(target.min())} to {int(target.max())}")
        target = (xp.arange(classes) == target[:, None]).astype(z.dtype)
    else:
        _arrays(fn, logits=logits, target=target)
        _same_shape(fn, "target", target, logits.shape, "logits")
        target = _flat(fn, target, "target")
    z = z - z.max(axis=1, keepdims=True)
    return z - xp.log(xp.exp(z).sum(axis=1, keepdims=True)), target


def softmax_cross_entropy(logits: Array, target: Array) -> Array:
    """Mean over the batch of -sum_i target[n, i] * log softmax(logits)[n, i].

    Parameters
    ----------
    logits : (N, ...) array
        Every axis but the first counts as classes: (N, 1, H, W) are H*W classes, the pixels.
    target : (N,) integer array or array of logits' shape
        Labels, as positions in the flattened classes; or probabilities.

    Returns
    -------
    loss : scalar of logits' dtype

    Raises
    ------
    TypeError, ValueError
        If target is of another kind or shape, or a label is out of range.
    """
    log_p, target = _log_softmax("softmax_cross_entropy", logits, target)
    return -(log_p * target).sum(axis=1).mean().astype(logits.dtype)


def softmax_cross_entropy_backward(dy: Array | float, logits: Array, target: Array
                                   ) -> tuple[Array, Array | None]:
    """Gradient of softmax_cross_entropy:

    dlogits[n, i] = dy / N * (softmax(logits)[n, i] * sum_j target[n, j] - target[n, i])
    dtarget[n, i] = -dy / N * log softmax(logits)[n, i], or None where target holds labels

    dy : number; the rest as in softmax_cross_entropy. Returns dlogits, dtarget.
    """
    fn = "softmax_cross_entropy_backward"
    dy = _scalar(fn, dy, logits=logits)
    log_p, t = _log_softmax(fn, logits, target)
    xp, N = _xp(logits), logits.shape[0]
    dlogits = (xp.exp(log_p) * t.sum(axis=1, keepdims=True) - t) * (dy / N)
    dtarget = (log_p * (-dy / N)).reshape(logits.shape) if target.shape == logits.shape else None
    return _narrow(logits.dtype, dlogits.reshape(logits.shape), dtarget)


def _pair(fn, y, target, name):
    xp = _arrays(fn, **{name: y}, target=target)
    _same_shape(fn, "target", target, y.shape, name)
    if not y.size:
        raise ValueError(f"{fn}: {name} must not be empty, got {name}.shape={y.shape}")
    return xp, *_wide(y, target)


def sigmoid_cross_entropy(logits: Array, target: Array) -> Array:
    """Mean over all elements of -target * log p - (1 - target) * log(1 - p), p = sigmoid(logits),

    computed as max(z, 0) - z * target + log(1 + exp(-|z|)), which does not overflow.

    Parameters
    ----------
    logits, target : arrays of one shape

    Returns
    -------
    loss : scalar of logits' dtype

    Raises
    ------
    TypeError, ValueError
        If they are not floating arrays of one dtype and shape.
    """
    xp, z, t = _pair("sigmoid_cross_entropy", logits, target, "logits")
    loss = xp.maximum(z, z.dtype.type(0)) - z * t + xp.log1p(xp.exp(-abs(z)))
    return loss.mean().astype(logits.dtype)


def sigmoid_cross_entropy_backward(dy: Array | float, logits: Array, target: Array
                                   ) -> tuple[Array, Array]:
    """dlogits = dy / size * (sigmoid(logits) - target), dtarget = -dy / size * logits.

    dy : number; the rest as in sigmoid_cross_entropy. Returns dlogits, dtarget.
    """
    fn = "sigmoid_cross_entropy_backward"
    xp, z, t = _pair(fn, logits, target, "logits")
    dy = _scalar(fn, dy, logits=logits) / z.size
    sigmoid = (1 + xp.tanh(z / 2)) / 2                  # overflows on neither side
    return _narrow(logits.dtype, (sigmoid - t) * dy, z * -dy)


def mean_squared_error(y: Array, target: Array) -> Array:
    """Mean over all elements of (y - target)^2. y, target : arrays of one shape."""
    _, a, t = _pair("mean_squared_error", y, target, "y")
    return ((a - t) ** 2).mean().astype(y.dtype)


def mean_squared_error_backward(dy: Array | float, y: Array, target: Array
                                ) -> tuple[Array, Array]:
    """dy_ = 2 * dy / size * (y - target), dtarget = -dy_. dy : number. Returns dy_, dtarget."""
    fn = "mean_squared_error_backward"
    _, a, t = _pair(fn, y, target, "y")
    slope = (a - t) * (2 * _scalar(fn, dy, y=y) / a.size)
    return _narrow(y.dtype, slope, -slope)


# 5 NETWORKS --------------------------------------------------------------------------------------

class Layer(NamedTuple):
    """One step of a network: op(x, *params, **options). A network is a list of these.

    op is a function of this file, or of any module where its gradient stands beside it under the
    same name with "_backward"; params are the arrays that training changes.
    """
    op: Callable[..., Array]
    params: Sequence[Array] = []
    options: Mapping[str, Any] = {}


Net = Sequence[Layer]


def forward(net: Net, x: Array) -> tuple[Array, list[Array]]:
    """Run a network.

    Parameters
    ----------
    net : list of Layer
    x : array that the first layer takes

    Returns
    -------
    y : array, the output of the last layer
    inputs : list with the input of each layer, which is all that backward needs

    Raises
    ------
    TypeError, ValueError
        If net is not such a list, or as the layers raise.
    """
    inputs = []
    for op, params, options in _layers("forward", net):
        inputs.append(x)
        x = op(x, *params, **options)
    return x, inputs


def backward(net: Net, dy: Array, inputs: Sequence[Array], *, need_dx: bool = True
             ) -> tuple[Array | None, list[list[Array | None]]]:
    """Gradient of forward, layer by layer from the last.

    Parameters
    ----------
    net : list of Layer
    dy : array, the gradient by the output
    inputs : list, as forward returned it
    need_dx : bool
        False leaves out dx where the first layer is a convolution, which can save that work.

    Returns
    -------
    dx : gradient by the network's input, or None
    grads : list with one list per layer, one gradient per entry of its params

    Raises
    ------
    TypeError, ValueError
        If net is not such a list, inputs are not one per layer, or as the layers raise.
    """
    if not isinstance(inputs, (list, tuple)):
        raise TypeError("backward: inputs must be a list, as forward returns, got "
                        + _kind(inputs))
    if len(_layers("backward", net)) != len(inputs):
        raise ValueError(f"backward: inputs must hold one array for each of {len(net)} layers, "
                         f"got {len(inputs)}")
    grads: list[list[Array | None]] = []
    for i in reversed(range(len(net))):
        op, params, options = net[i]
        if i == 0 and not need_dx and op in (conv, conv_transpose, coord_conv):
            options = {**options, "need_dx": False}
        gradient = getattr(sys.modules[op.__module__], op.__name__ + "_backward")
        found = gradient(dy, inputs[i], *params, **options)
        dy, *dparams = found if isinstance(found, tuple) else (found,)
        grads.insert(0, dparams)
    return dy, grads


def _layers(fn, net):
    if not isinstance(net, (list, tuple)) or not all(isinstance(a, Layer) for a in net):
        raise TypeError(f"{fn}: net must be a list of Layer, got {_kind(net)}")
    return net


def he_normal(shape: Size, *, rng: Seed = None, dtype: DTypeLike = np.float32,
              xp: ModuleType = np) -> Array:
    """Weights from a normal distribution cut off at two sigma, with variance 2 / fan_in.

    fan_in = prod(shape[1:]), the inputs of one filter; for a transposed convolution, whose
    weights are (C, F, *kernel), the same product, as in the paper's code. The cut is TensorFlow's:
    the normal before it is wider, by 1 / 0.8796, so that the variance comes out after it.

    Parameters
    ----------
    shape : tuple of ints
    rng : Generator, seed or None
        Draws are made on the host.
    dtype : floating dtype
    xp : module, numpy or cupy

    Returns
    -------
    array of the given shape

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.
    """
    shape, rng = _size("he_normal", shape), _generator("he_normal", rng)
    dtype, xp = _float_dtype("he_normal", dtype), _module("he_normal", xp)
    w = rng.standard_normal(shape)
    while (outside := abs(w) > 2).any():
        w[outside] = rng.standard_normal(int(outside.sum()))
    w *= math.sqrt(2 / math.prod(shape[1:])) / 0.87962566103423978
    return xp.asarray(w.astype(dtype))


# 6 MODELS OF THE PAPER ---------------------------------------------------------------------------

def _conv_layer(draw, shape, op=conv, **options):
    """A convolution with He weights and zero biases; shape as the op wants its weights."""
    w = he_normal(shape, **draw)
    filters = shape[1] if op is conv_transpose else shape[0]
    return Layer(op, [w, draw["xp"].zeros(filters, w.dtype)], options)


def _norm_layer(draw, channels):
    """Batch norm that, until training sets its statistics, normalises by mean 0, variance 1."""
    ones, zeros = (f(channels, draw["dtype"]) for f in (draw["xp"].ones, draw["xp"].zeros))
    return Layer(batch_norm, [ones, zeros], {"mean": zeros, "var": ones})


def _draw(fn, rng, dtype, xp):
    return {"rng": _generator(fn, rng), "dtype": _float_dtype(fn, dtype), "xp": _module(fn, xp)}


def coordconv_painter(*, start: str = "he", size: Size = (64, 64), width: int = 1,
                      rng: Seed = None, dtype: DTypeLike = np.float32, xp: ModuleType = np
                      ) -> list[Layer]:
    """The paper's CoordConv network from a coordinate to the logits of a pixel map.

    The coordinate is tiled over the image, coordinate channels join it, and five 1x1 convolutions
    with 32, 32, 64, 64 and 1 filters and rectifiers between them do the rest: 7,553 parameters.

    Parameters
    ----------
    start : "he" or "relative"
        "he" is the paper's start. On the quadrant split what it comes to depends on the seed: in
        trial runs the test accuracy ended anywhere between 26 % and 100 %.
        "relative" is a finding of this project and cures that: draw the first layer's weights for
        the input coordinates from U(-1, 1), set those for the coordinate channels to their
        negatives, and draw its biases from U(-0.5, 0.5). Every first-layer unit then starts as a
        function of the differences (row - r, col - c) alone, so the untrained network is
        translation-equivariant. That is a prior on the start and not the paper's set-up: the
        equivariance is given, the peak is learned (untrained accuracy is 0).
    size : tuple of ints
    width : int, multiplies the hidden filters
    rng : Generator, seed or None
    dtype : floating dtype
    xp : module, numpy or cupy

    Returns
    -------
    net : (N, len(size), 1, ...) -> (N, 1, *size) logits

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.
    """
    fn = "coordconv_painter"
    size, draw = _size(fn, size), _draw(fn, rng, dtype, xp)
    width = _integer(fn, "width", width, 1)
    start = _one_of(fn, "start", start, ("he", "relative"))
    K, ones = len(size), (1,) * len(size)
    filters = [32 * width, 32 * width, 64 * width, 64 * width, 1]
    net = [_conv_layer(draw, (filters[0], 2 * K, *ones), coord_conv, size=size)]
    for C, F in itertools.pairwise(filters):
        net += [Layer(relu), _conv_layer(draw, (F, C, *ones))]
    if start == "relative":
        w = draw["rng"].uniform(-1, 1, (filters[0], K, *ones))
        b = draw["rng"].uniform(-0.5, 0.5, filters[0])
        first = [np.concatenate([w, -w], axis=1), b]
        net[0] = net[0]._replace(params=[xp.asarray(p.astype(draw["dtype"])) for p in first])
        w, b = net[-1].params
        net[-1] = net[-1]._replace(params=[w * w.dtype.type(math.sqrt(0.5)), b])
    return net


def deconv_painter(*, kernel: int = 3, width: int = 1, rng: Seed = None,
                   dtype: DTypeLike = np.float32, xp: ModuleType = np) -> list[Layer]:
    """The paper's baseline without coordinates, from a coordinate to the logits of a 64x64 map.

    Six transposed convolutions of stride 2 with 64, 64, 64, 32, 32 and 1 filters, batch norm and
    a rectifier after each but the last. 103,585 parameters at kernel 3 and width 1.

    Parameters
    ----------
    kernel : int, the paper tries 2, 3 and 4
    width : int, multiplies the hidden filters
    rng, dtype, xp : as in coordconv_painter

    Returns
    -------
    net : (N, 2, 1, 1) -> (N, 1, 64, 64) logits

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.
    """
    fn = "deconv_painter"
    draw, k = _draw(fn, rng, dtype, xp), _integer(fn, "kernel", kernel, 1)
    width = _integer(fn, "width", width, 1)
    channels = [2, *(width * c for c in (64, 64, 64, 32, 32)), 1]
    net = []
    for C, F in itertools.pairwise(channels):
        net += [_conv_layer(draw, (C, F, k, k), conv_transpose, stride=2, padding="same"),
                _norm_layer(draw, F), Layer(relu)]
    return net[:-2]


def coordconv_renderer(*, start: str = "he", size: Size = (64, 64), kernel: int = 3,
                       width: int = 1, rng: Seed = None, dtype: DTypeLike = np.float32,
                       xp: ModuleType = np) -> list[Layer]:
    """The paper's CoordConv network from a coordinate to the logits of a square.

    A painter, a softmax over the pixels, then five convolutions with 8, 8, 16, 16 and 1 filters
    and rectifiers between them. 11,850 parameters at kernel 3 and width 1.

    Parameters
    ----------
    start, size, rng, dtype, xp : as in coordconv_painter
    kernel : int
    width : int, multiplies the hidden filters behind the softmax

    Returns
    -------
    net : (N, len(size), 1, ...) -> (N, 1, *size) logits

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.
    """
    fn = "coordconv_renderer"
    draw, k = _draw(fn, rng, dtype, xp), _integer(fn, "kernel", kernel, 1)
    width = _integer(fn, "width", width, 1)
    net = coordconv_painter(start=start, size=size, **draw) + [Layer(softmax)]
    channels = [1, *(width * c for c in (8, 8, 16, 16)), 1]
    for C, F in itertools.pairwise(channels):
        net += [_conv_layer(draw, (F, C, *(k,) * len(size)), padding="same"), Layer(relu)]
    return net[:-1]


def coordconv_regressor(*, size: Size = (64, 64), rng: Seed = None, dtype: DTypeLike = np.float32,
                        xp: ModuleType = np) -> list[Layer]:
    """The paper's CoordConv network from a one-hot image to its coordinate, 906 parameters.

    Coordinate channels and a 1x1 convolution, two more of 1x1 and one of 3x3, 8 filters each, a
    3x3 convolution with one filter per axis, and the maximum over the image. There is no
    rectifier, as in the paper's code: the network is linear up to its maximum.

    Parameters
    ----------
    size : tuple of ints
        Sets the number of axes only: the weights fit any size.
    rng, dtype, xp : as in coordconv_painter

    Returns
    -------
    net : (N, 1, *size) -> (N, len(size))

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.
    """
    fn = "coordconv_regressor"
    K, draw = len(_size(fn, size)), _draw(fn, rng, dtype, xp)
    one, three = (1,) * K, (3,) * K
    return [_conv_layer(draw, (8, 1 + K, *one), coord_conv),
            _conv_layer(draw, (8, 8, *one)),
            _conv_layer(draw, (8, 8, *one)),
            _conv_layer(draw, (8, 8, *three), padding="same"),
            _conv_layer(draw, (K, 8, *three), padding="same"),
            Layer(max_pool)]


def conv_regressor(split: str, *, width: int = 1, rng: Seed = None, dtype: DTypeLike = np.float32,
                   xp: ModuleType = np) -> list[Layer]:
    """The paper's baselines without coordinates, from a 64x64 one-hot image to its coordinate.

    "uniform": four 3x3 convolutions with 16 filters and two dense layers, 72,850 parameters.
    "quadrant": nine convolutions, two of them with batch norm, and a global mean, 12,914.

    Parameters
    ----------
    split : "uniform" or "quadrant"
        The paper uses a network of its own for each split.
    width : int, multiplies the hidden filters
    rng, dtype, xp : as in coordconv_painter

    Returns
    -------
    net : (N, 1, 64, 64) -> (N, 2)

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.
    """
    fn = "conv_regressor"
    split = _one_of(fn, "split", split, ("uniform", "quadrant"))
    draw, width = _draw(fn, rng, dtype, xp), _integer(fn, "width", width, 1)
    c = 16 * width
    if split == "uniform":
        net = []
        for C in (1, c, c, c):
            net += [_conv_layer(draw, (c, C, 3, 3), padding="same"), Layer(relu),
                    Layer(max_pool, options={"kernel": 2})]
        return net[:-1] + [_conv_layer(draw, (64 * width, c, 8, 8)), Layer(relu),
                           _conv_layer(draw, (2, 64 * width, 1, 1)), Layer(sum_pool)]
    net, C = [], 1
    for F, k, stride, norm in ((c, 5, 2, 0), (c, 1, 1, 1), (c, 3, 1, 0),
                               (c, 3, 2, 0), (c, 3, 2, 1), (c, 3, 2, 0),
                               (c, 1, 1, 0), (c, 3, 2, 0), (2, 3, 1, 0)):
        net += [_conv_layer(draw, (F, C, k, k), stride=stride, padding="same")]
        # the second layer's rectifier comes before its norm, the fifth's after: as published
        after = [_norm_layer(draw, F)] * norm
        net += [Layer(relu), *after] if k == 1 else [*after, Layer(relu)]
        C = F
    return net + [Layer(mean_pool)]


# 7 DATA AND TRAINING -----------------------------------------------------------------------------

class Dataset(NamedTuple):
    """Every position of a square on a canvas, and which of them train and which test.

    coords : (M, 2) int64 array, the centres as (row, col)
    train, test : int64 arrays, indices into coords
    canvas, square : ints, the side of the image and of the square
    """
    coords: np.ndarray[Any, Any]
    train: np.ndarray[Any, Any]
    test: np.ndarray[Any, Any]
    canvas: int
    square: int


def not_so_clevr(split: str = "uniform", *, canvas: int = 64, square: int = 9) -> Dataset:
    """The paper's data set: a square at every position where all of it is visible.

    Parameters
    ----------
    split : "uniform" or "quadrant"
        "uniform" tests a random quarter of the positions, the draw of the paper's repository: 2368
        train and 768 test (its text says 80/20). "quadrant" tests the positions beyond the middle
        of both axes, row > canvas/2 and col > canvas/2: 2407 train and 729 test.
    canvas, square : ints, square odd and no larger than canvas

    Returns
    -------
    Dataset
        3136 positions for the paper's canvas of 64 and square of 9, columns in the outer loop.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range, or leaves a part without positions.

    Examples
    --------
    >>> data = not_so_clevr("quadrant")
    >>> data.coords.shape, len(data.train), len(data.test)
    ((3136, 2), 2407, 729)
    """
    fn = "not_so_clevr"
    split = _one_of(fn, "split", split, ("uniform", "quadrant"))
    canvas, square = _integer(fn, "canvas", canvas, 1), _integer(fn, "square", square, 1)
    if square % 2 == 0 or square > canvas:
        raise ValueError(f"{fn}: square must be odd and at most canvas={canvas}, got {square}")
    half = square // 2
    col, row = (i.ravel() for i in np.mgrid[half:canvas - half, half:canvas - half])
    if split == "uniform":
        test = np.random.RandomState(20202).random_sample(len(row)) < 0.25
    else:
        test = (2 * row > canvas) & (2 * col > canvas)
    if test.all() or not test.any():
        raise ValueError(f"{fn}: canvas={canvas} with square={square} leaves no position to train "
                         "or to test")
    return Dataset(np.stack([row, col], axis=1).astype(np.int64), np.flatnonzero(~test),
                   np.flatnonzero(test), canvas, square)


def _boxes(coords, size, half, dtype):
    """Images (N, 1, *size) that are 1 up to half pixels from coords (N, K) on each axis, else 0:
    the outer product of one row of marks per axis."""
    xp, (N, K) = _xp(coords), coords.shape
    y = xp.ones((N, 1, *(1,) * K), dtype)
    for a, n in enumerate(size):
        marks = (abs(xp.arange(n) - coords[:, a, None]) <= half).astype(dtype)
        y = y * marks.reshape(N, 1, *(n if b == a else 1 for b in range(K)))
    return y


def _unit(coords, canvas, dtype):
    """Pixel positions on the unit scale, the very numbers that axis_coords gives these pixels."""
    return ((2 * coords - (canvas - 1)) / max(canvas - 1, 1)).astype(dtype)


def _example(data, coords, task, scale, dtype):
    """The network's input and its target for centres coords (N, 2)."""
    size = (data.canvas,) * 2
    if task == "regression":
        target = coords.astype(dtype) if scale == "pixel" else (coords / data.canvas).astype(dtype)
        return _boxes(coords, size, 0, dtype), target
    x = coords.astype(dtype) if scale == "pixel" else _unit(coords, data.canvas, dtype)
    half = 0 if task == "classification" else data.square // 2
    return x[:, :, None, None], _boxes(coords, size, half, dtype)


_LOSSES = {"classification": (softmax_cross_entropy, softmax_cross_entropy_backward),
           "rendering": (sigmoid_cross_entropy, sigmoid_cross_entropy_backward),
           "regression": (mean_squared_error, mean_squared_error_backward)}


def _train_arguments(fn, net, data, task, scale):
    """Check what train and evaluate share; the module and dtype of the network's parameters."""
    params = {f"net[{i}].params[{j}]": p for i, layer in enumerate(_layers(fn, net))
              for j, p in enumerate(layer.params) if p is not None}
    if not params:
        raise ValueError(f"{fn}: net must have parameters, got none in {len(net)} layers")
    if not isinstance(data, Dataset):
        raise TypeError(f"{fn}: data must be a Dataset, as not_so_clevr returns, "
                        f"got {_kind(data)}")
    _one_of(fn, "task", task, tuple(_LOSSES))
    _one_of(fn, "scale", scale, ("unit", "pixel"))
    return _arrays(fn, **params), next(iter(params.values())).dtype


def adam_step(w: Array, dw: Array, m: Array, v: Array, step: int, *, learning_rate: float = 0.005,
              beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-8
              ) -> tuple[Array, Array, Array]:
    """One step of Adam (Kingma and Ba, algorithm 1), elementwise.

    m' = beta1 * m + (1 - beta1) * dw
    v' = beta2 * v + (1 - beta2) * dw^2
    w' = w - learning_rate * (m' / (1 - beta1^step)) / (sqrt(v' / (1 - beta2^step)) + eps)

    Parameters
    ----------
    w, dw, m, v : arrays of one shape
        Parameters, gradient, first and second moment; zeros for the moments before step 1.
    step : int, from 1
    learning_rate, beta1, beta2, eps : floats
        Differs: beta2 is 0.99 as in the paper, elsewhere 0.999.

    Returns
    -------
    w, m, v : arrays of that shape

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or shape or out of range.
    """
    fn = "adam_step"
    xp = _arrays(fn, w=w, dw=dw, m=m, v=v)
    for name, a in (("dw", dw), ("m", m), ("v", v)):
        _same_shape(fn, name, a, w.shape, "w")
    step = _integer(fn, "step", step, 1)
    rate, eps = _real(fn, "learning_rate", learning_rate, 0), _real(fn, "eps", eps, 0)
    below_1 = math.nextafter(1, 0)
    beta1 = _real(fn, "beta1", beta1, 0, below_1)
    beta2 = _real(fn, "beta2", beta2, 0, below_1)
    m = beta1 * m + (1 - beta1) * dw
    v = beta2 * v + (1 - beta2) * dw * dw
    correction = math.sqrt(1 - beta2 ** step)
    rate *= correction / (1 - beta1 ** step)
    return w - rate * m / (xp.sqrt(v) + eps * correction), m, v


def _decayed(decay, rate, step, steps, epoch):
    """The learning rate of a step: linear to 0; or a tenth after every 200 epochs, four times."""
    if decay == "linear":
        return rate * (1 - step / steps)
    return rate * 0.1 ** min(4, epoch // 200) if decay == "step" else rate


def _flatten(net):
    """All parameters of a network as one vector, so that an optimiser step is one expression."""
    params = [p.ravel() for layer in net for p in layer.params if p is not None]
    return _xp(params[0]).concatenate(params)


def _unflatten(net, flat):
    """The network with its parameters cut out of flat; views, nothing is copied."""
    start, layers = 0, []
    for layer in net:
        params = []
        for p in layer.params:
            if p is not None:
                start, p = start + p.size, flat[start:start + p.size].reshape(p.shape)
            params.append(p)
        layers.append(layer._replace(params=params))
    return layers


def _frozen(net, statistics):
    """The network with these, a mean and a variance each, in the layers that keep statistics."""
    found = iter(statistics)
    return [layer._replace(options={**layer.options, "mean": next(found), "var": next(found)})
            if _keeps_statistics(layer) else layer for layer in net]


def _keeps_statistics(layer):
    return layer.op is batch_norm and layer.options.get("mean") is not None


_SHARD = 4              # images that go through a network together while it trains


def _shard(net, data, task, scale, norms, N, coords):
    """What the images of coords add to the sums of a batch of N, as one vector: their share of the
    loss and the gradient; the mean and variance of what enters the layers that norms lists."""
    share = len(coords) / N
    x, target = _example(data, coords, task, scale, net[0].params[0].dtype)
    loss, loss_backward = _LOSSES[task]
    y, inputs = forward(net, x)
    _, grads = backward(net, loss_backward(share, y, target)[0], inputs, need_dx=False)
    parts = [_xp(y).asarray(loss(y, target) * share)]
    parts += [g for layer in grads for g in layer if g is not None]
    for a in (inputs[i] for i in norms):
        axes = (0, *range(2, a.ndim))
        parts += [a.mean(axis=axes), a.var(axis=axes)]
    return _xp(y).concatenate([p.ravel() for p in parts])


def _total(all_reduce, a):
    """The sum of a over the processes, from the caller's function, which may be wrong."""
    total = all_reduce(a)
    if type(total) is not type(a) or (total.shape, total.dtype) != (a.shape, a.dtype):
        raise TypeError("train: all_reduce must return the sum over the processes, an array of "
                        f"the kind, dtype and shape that it gets, {a.dtype} {a.shape}, got "
                        + (f"{total.dtype} {total.shape}" if type(total) is type(a)
                           else _kind(total)))
    return total


def _sum_of_shards(work, shards, vector, all_reduce, rank, ranks):
    """sum(work(shard) for shard in shards), in this order, the work divided among processes.

    Each shard has a row of its own, a vector of a length and dtype, to which all processes but
    one add zeros: their sum is exact."""
    xp, (length, dtype) = _xp(shards[0]), vector
    parts = _spread(xp, work, shards[rank::ranks], apart=False)
    if all_reduce is not None:
        rows = xp.zeros((len(shards), length), dtype)
        for i, part in enumerate(parts):
            rows[rank + i * ranks] = part
        rows = _total(all_reduce, rows.ravel()).reshape(rows.shape)
        parts = [rows[i] for i in range(len(shards))]
    return sum(parts)


def _join(all_reduce, xp, dtype, digest):
    """The number of this process and how many there are, found by nothing but sums.

    Every process marks a slot drawn at random, and the sum shows all marks to all; where two
    drew the same slot, all draw again. This chance decides who computes what and changes no
    result. Then each shows its digest, and all must be the same."""
    for _ in range(20):
        slot = int.from_bytes(os.urandom(4), "little") % 2 ** 20
        marks = xp.zeros(2 ** 20, dtype)
        marks[slot] = 1
        marks = to_numpy(_total(all_reduce, marks))
        if marks.max() == marks[slot] == 1:
            break
    else:
        raise ValueError("train: all_reduce must return the sum over the processes, got "
                         f"{marks[slot]} where this process gave 1")
    rank, ranks = np.count_nonzero(marks[:slot]), np.count_nonzero(marks)
    letters = list(digest.encode())
    shown = np.zeros((ranks, len(letters)), dtype)
    shown[rank] = letters
    shown = to_numpy(_total(all_reduce, xp.asarray(shown.ravel()))).reshape(shown.shape)
    if not (shown == letters).all():
        raise ValueError(f"train: {ranks} processes must train the same network on the same data "
                         "with the same arguments, seed and checkpoint; these differ")
    return rank, ranks


def _text(value):
    """A value as JSON, in an array whose dtype does not depend on the digits of its numbers."""
    import json

    text = json.JSONEncoder(default=np.ndarray.tolist).encode(value).encode()
    return np.array(text, f"S{-(-len(text) // 4096) * 4096}")


def _digest(*values):
    """SHA-256 of the bits of arrays and of the text of everything else."""
    import hashlib

    digest = hashlib.sha256()
    for value in values:
        bits = to_numpy(value).tobytes() if hasattr(value, "shape") else repr(value).encode()
        digest.update(b"%d:" % len(bits) + bits)
    return digest.hexdigest()


def _resumed(path, net, state, rng):
    """The network and the state in a checkpoint, and its generator's state in rng; or those that
    are given, where there is no such file yet."""
    import json

    folder, name = os.path.split(os.path.realpath(_path("train", path, "checkpoint")))
    for part in os.listdir(folder):     # what a run that was killed while it wrote has left
        if part.startswith(name + ".") and part.endswith(".part"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, part))
    if not os.path.exists(path):
        return net, state
    _, found = load(path, net, {key: state[key] for key in ("arguments", "step")})
    now = json.loads(state["arguments"].item())
    try:
        was = dict(json.loads(found["arguments"].item()))
        if was != now:
            raise ValueError(", ".join(f"{key} {was.get(key)!r}, here {now.get(key)!r}" for key in
                                       {**was, **now} if was.get(key) != now.get(key)))
        if not 0 < found["step"] <= now["steps"]:
            raise ValueError(f"{found['step']} of {now['steps']} steps are done")
        loss = _xp(state["loss"]).zeros(int(found["step"]), state["loss"].dtype)
        net, state = load(path, net, {**state, "loss": loss})
        generator = json.loads(state["rng"].item())
        # numpy takes any position in a buffer, and would read there
        if (not 0 <= generator.get("buffer_pos", 0) <= 4
                or not 0 <= generator["state"].get("pos", 0) <= 624):
            raise ValueError("its generator's state is impossible")
        rng.bit_generator.state = generator
    except Exception as error:
        raise ValueError(f"train: checkpoint {path} is not of this training: "
                         f"{str(error) or repr(error)}") from error
    return net, state


def _finite(step, losses, *arrays):
    """Raise if one of the last losses, up to this step, or of the arrays is not finite."""
    xp, first = _xp(losses), step - len(losses)
    bad = np.flatnonzero(~np.isfinite(to_numpy(losses)))
    if len(bad):
        raise FloatingPointError(f"train: the loss of step {first + bad[0] + 1} is "
                                 f"{losses[bad[0]]}; a smaller learning_rate may help")
    if not all(xp.isfinite(a).all() for a in arrays):
        raise FloatingPointError(f"train: the weights after step {step}, or their moments, are "
                                 "not finite; a smaller learning_rate may help")


def train(net: Net, data: Dataset, *, task: str, steps: int | None = None,
          epochs: int | None = None, batch_size: int = 16, learning_rate: float = 0.005,
          decay: str = "linear", l2: float = 0.0, beta1: float = 0.9, beta2: float = 0.99,
          eps: float = 1e-8, scale: str = "unit", rng: Seed = None,
          callback: Callable[[int, list[Layer], Array], Any] | None = None,
          checkpoint: Path | None = None, checkpoint_every: int = 100,
          all_reduce: Callable[[Array], Array] | None = None
          ) -> tuple[list[Layer], dict[str, np.ndarray[Any, Any]]]:
    """Train a network on one of the paper's tasks with Adam.

    "classification": coordinate to pixel; softmax cross-entropy over the pixels
    "rendering":      coordinate to square; sigmoid cross-entropy per pixel
    "regression":     one-hot image to coordinate; mean squared error of coords / canvas

    The loss that is reported and differentiated has l2 * sum(w^2) added to it, over all weights
    with more than one axis (biases and norms are left out).

    On one kind of machine the result is a function of the arguments and the seed, to the last bit:
    the number of processes does not change it, nor an interruption after which a checkpoint goes
    on, nor, where NumPy has OpenBLAS, the number of cores.

    Parameters
    ----------
    net : list of Layer
    data : Dataset
    task : str, as above
    steps, epochs : int
        The length of the training, in one way or the other; by default one epoch.
    batch_size : int
        The last batch of an epoch may be smaller.
    learning_rate, l2, beta1, beta2, eps : floats
    decay : "linear", "constant" or "step"
        The learning rate falls to 0 over the training, stays, or is divided by 10 after every 200
        epochs, at most four times.
    scale : "unit" or "pixel"
        How coordinates enter: from -1 to 1, where they equal the coordinate channel of their
        pixel, or in pixels as in the paper's code. For regression "pixel" makes them the target.
    rng : Generator, seed or None
        Shuffles the data, each epoch anew.
    callback : function of (step, net, loss), or None
        Called after each step with the number of steps done, the network so far and the loss of
        its last batch. A true answer ends the training.
    checkpoint : str, path or None
        A file that holds all of the training: save(checkpoint, net, state) writes it, whole or not
        at all, every checkpoint_every steps and at the end, also if callback brings that about.
        Where the file exists the training goes on from it, so that after an interruption the same
        call does the rest; a finished training is given back as it was. The file belongs to one
        training. One with other arguments, data, seed or start is refused, except that without a
        seed, rng=None, the start is not compared. The generator's state is set from the file.
        load(checkpoint, net) reads the network alone.
    checkpoint_every : int
    all_reduce : function of an array, or None
        Takes one flat array and returns its sum over all processes that run this same call. They
        share the work: shards of a batch go through the network apart and are added in their
        order, whoever computed them. A network with batch_norm is one shard and gains nothing.
        Every process gets the result and writes the checkpoint; callback must give all the same
        answer. The array holds one gradient for each shard of 4 images; for a GPU it lies there.

    Returns
    -------
    net : list of Layer, new; the given one is unchanged
    history : dict with the arrays "loss" and "learning_rate", one entry per step

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range, both steps and epochs are given, the
        checkpoint is damaged or of another training, processes differ in their arguments, or
        all_reduce is given without rng.
    FloatingPointError
        If the loss or the weights are no longer finite; the checkpoint stays the last good one.
        On a GPU, where to look means to wait, this is found at the checkpoints and at the end.
    OSError
        If the checkpoint cannot be read or written; the old one is untouched.
    """
    fn = "train"
    xp, dtype = _train_arguments(fn, net, data, task, scale)
    batch_size = _integer(fn, "batch_size", batch_size, 1)
    _one_of(fn, "decay", decay, ("linear", "constant", "step"))
    rate, l2 = _real(fn, "learning_rate", learning_rate, 0), _real(fn, "l2", l2, 0)
    every = _integer(fn, "checkpoint_every", checkpoint_every, 1)
    seed, rng = rng, _generator(fn, rng)
    if steps is not None and epochs is not None:
        raise ValueError(f"{fn}: give steps or epochs, not both, got steps={steps!r}, "
                         f"epochs={epochs!r}")
    for name, function in (("callback", callback), ("all_reduce", all_reduce)):
        if function is not None and not callable(function):
            raise TypeError(f"{fn}: {name} must be a function or None, got {function!r}")
    if all_reduce is not None and seed is None:
        raise ValueError(f"{fn}: all_reduce needs rng, the same seed in every process, got None")
    per_epoch = -(-len(data.train) // batch_size)
    if steps is None:
        steps = per_epoch * _integer(fn, "epochs", 1 if epochs is None else epochs, 1)
    steps = _integer(fn, "steps", steps, 1)
    adam = {"beta1": _real(fn, "beta1", beta1, 0, math.nextafter(1, 0)),
            "beta2": _real(fn, "beta2", beta2, 0, math.nextafter(1, 0)),
            "eps": _real(fn, "eps", eps, 0)}

    flat = _flatten(net)
    state = {"step": np.zeros((), np.int64), "m": xp.zeros_like(flat), "v": xp.zeros_like(flat),
             "loss": xp.zeros(0, dtype)}
    if checkpoint is not None or all_reduce is not None:
        start = [a for op, params, options in net
                 for a in (op.__name__, *params, *itertools.chain(*options.items()))]
        state["rng"] = _text(rng.bit_generator.state)
        state["arguments"] = _text({
            "task": task, "steps": steps, "batch_size": batch_size, "learning_rate": rate,
            "decay": decay, "l2": l2, **adam, "scale": scale,
            "rng": "a Generator" if isinstance(seed, np.random.Generator) else
                   seed if seed is None else int(seed),
            "data": _digest(data.coords, data.train, data.canvas, data.square),
            "start": None if seed is None else _digest(*start)})
    if checkpoint is not None:
        net, state = _resumed(checkpoint, net, state, rng)
    group = None, 0, 1
    if all_reduce is not None:
        group = all_reduce, *_join(all_reduce, xp, dtype, _digest(_flatten(net), *state.values()))

    trained, flat, m, v = list(net), _flatten(net), state["m"], state["v"]
    losses, recent = state["loss"], []
    done, shuffle = int(state["step"]), rng.bit_generator.state
    if done:                            # draw the order of the epoch at work again
        order = xp.asarray(rng.permutation(data.train))
    points = xp.asarray(data.coords)
    weights = xp.concatenate([xp.full(p.size, p.ndim > 1, dtype) for layer in net
                              for p in layer.params if p is not None])
    norms = [i for i, layer in enumerate(net) if _keeps_statistics(layer)]
    statistics = [net[i].options[key] for i in norms for key in ("mean", "var")]
    ends = [*itertools.accumulate([1, flat.size, *(a.size for a in statistics)])]
    mixes_images = any(layer.op is batch_norm for layer in net)
    for step in range(done, steps):
        at = step % per_epoch * batch_size
        if at == 0:
            shuffle = rng.bit_generator.state
            order = xp.asarray(rng.permutation(data.train))
        batch = points[order[at:at + batch_size]]
        size = len(batch) if mixes_images else _SHARD
        live = _unflatten(_frozen(net, [None] * len(statistics)), flat)
        shards = [batch[i:i + size] for i in range(0, len(batch), size)]
        total = _sum_of_shards(
            functools.partial(_shard, live, data, task, scale, norms, len(batch)), shards,
            (ends[-1], dtype), *group)
        loss, dw = total[0].copy(), total[1:ends[1]]
        if l2:
            loss, dw = loss + l2 * (weights * flat * flat).sum(), dw + 2 * l2 * weights * flat
        statistics = [0.9 * a + 0.1 * total[i:j] for a, i, j in
                      zip(statistics, ends[1:], ends[2:])]
        flat, m, v = adam_step(flat, dw, m, v, step + 1, **adam, learning_rate=_decayed(
            decay, rate, step, steps, step // per_epoch))
        done = step + 1
        recent.append(loss)
        trained = _unflatten(_frozen(net, statistics), flat)
        stop = callback is not None and callback(done, trained, loss)
        due = stop or done == steps or checkpoint is not None and done % every == 0
        if due:
            losses = xp.concatenate([losses, xp.stack(recent)])
            _finite(done, losses[-len(recent):], flat, m, v)
            recent = []
        elif xp is np:                  # elsewhere to look is to wait
            _finite(done, loss[None])
        if due and checkpoint is not None:
            save(checkpoint, trained, {**state, "rng": _text(shuffle), "step": np.int64(done),
                                       "m": m, "v": v, "loss": losses})
        if stop:
            break
    return list(trained), {"loss": to_numpy(losses), "learning_rate": np.array(
        [_decayed(decay, rate, step, steps, step // per_epoch) for step in range(done)])}


def evaluate(net: Net, data: Dataset, *, task: str, part: str = "test", scale: str = "unit"
             ) -> float:
    """Score a network on a part of the data set.

    "classification": the fraction of images whose largest output is the right pixel
    "rendering":      the mean over images of intersection / union, outputs above 0 being painted
    "regression":     the mean distance from the right position, in pixels

    Parameters
    ----------
    net, data, task, scale : as in train
    part : "test" or "train"

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range, or the network's output does not fit
        the task.
    """
    fn = "evaluate"
    xp, dtype = _train_arguments(fn, net, data, task, scale)
    index = getattr(data, _one_of(fn, "part", part, ("test", "train")))
    points = xp.asarray(data.coords[index])

    def score(i):
        coords = points[i:i + _SHARD]
        x, target = _example(data, coords, task, scale, dtype)
        y, _ = forward(net, x)
        _same_shape(fn, "net's output", y, target.shape, "the target")
        if task == "classification":
            return _flat(fn, y).argmax(axis=1) == _flat(fn, target).argmax(axis=1)
        if task == "rendering":
            painted, wanted = _flat(fn, y) > 0, _flat(fn, target) > 0
            return (painted & wanted).sum(axis=1) / (painted | wanted).sum(axis=1)
        error = (y - target) * (1 if scale == "pixel" else data.canvas)
        return xp.sqrt((error ** 2).sum(axis=1))
    scores = _spread(xp, score, range(0, len(points), _SHARD), apart=False)
    return float(xp.concatenate(scores).mean())


_FORMAT = "CoordConv network 2"


def _entries(net):
    """The arrays of a network by name: parameters by position, statistics by keyword."""
    for i, (op, params, options) in enumerate(net):
        for key, a in [*enumerate(params), *options.items()]:
            if hasattr(a, "dtype") and not np.isscalar(a):
                yield f"{i}.{op.__name__}.{key}", a


def _contents(fn, net, state):
    """All arrays of a file by name: its format, the network's and those of a state."""
    found = {"format": np.array(_FORMAT), **dict(_entries(_layers(fn, net)))}
    if not isinstance(state, (dict, type(None))):
        raise TypeError(f"{fn}: state must be a dict of arrays or None, got {_kind(state)}")
    for key, a in (state or {}).items():
        found[f"state.{key}"] = (a if hasattr(a, "dtype") and not np.isscalar(a)
                                 else np.asarray(a))
    for name, a in found.items():
        if a.dtype.kind not in "biufcSU":
            raise TypeError(f"{fn}: {name} must be an array of numbers or text, got {a.dtype}")
    return found


def _path(fn, path, name="path"):
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{fn}: {name} must be a string or a path, got {path!r}")
    return os.fspath(path)


def save(path: Path, net: Net, state: Mapping[str, Array] | None = None) -> None:
    """Write the arrays of a network, and of a state if there is one, to an npz file.

    It is written whole or not at all: beside its target, and moved there once it is on the disk,
    so that an interrupted save leaves the old file as it was. (A process that is killed meanwhile
    leaves a file that ends in ".part".) numpy.load reads it too. Its last 64 bytes, to the zip
    format a comment, are the SHA-256 of all before them, by which load tells damage.

    Parameters
    ----------
    path : str or path
    net : list of Layer
    state : dict of arrays, numbers or strings, or None
        What else is to be kept, such as the moments of an optimiser.

    Raises
    ------
    TypeError
        If net is not such a list, or state not such a dict.
    OSError
        If the file cannot be written; the old one is untouched.
    """
    # imports that few callers need stand where they are used
    import hashlib

    arrays: dict[str, Any] = {name: to_numpy(a)
                              for name, a in _contents("save", net, state).items()}
    path, content = os.path.realpath(_path("save", path)), io.BytesIO()
    np.savez(content, **arrays)
    whole = content.getvalue()[:-2] + b"\x40\x00"         # the length of the comment, 64
    part = f"{path}.{os.urandom(4).hex()}.part"
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"save: {path} must be a file, or the name of a new one")
    try:
        with open(part, "xb") as file:
            file.write(whole)
            file.write(hashlib.sha256(whole).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"save: {path} could not be written and is as it was "
                          f"before: {error.strerror}") from error
        raise


def _read(file, expected):
    """The expected arrays out of a file; an exception of whatever kind if that is not possible.

    Names, shapes and dtypes are compared first, before memory is spent on something else."""
    import hashlib
    import zipfile

    with zipfile.ZipFile(file) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        names = [n for n in names if n in expected or not n.startswith("state.")]
        lacks, extra = set(expected).difference(names), set(names).difference(expected)
        if lacks or extra or len(names) > len(expected):
            raise ValueError("it " + (" and ".join(
                f"{verb} {', '.join(sorted(some)[:3])[:200]}" for verb, some in
                (("lacks", lacks), ("has", extra)) if some) or "has a name twice"))
        for name, a in expected.items():
            info = archive.getinfo(name + ".npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            with archive.open(info) as member:
                np.lib.format.read_magic(member)
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                if (shape, dtype) != (a.shape, a.dtype):
                    raise ValueError(f"{name} is {dtype} {shape}, expected {a.dtype} {a.shape}")
                if info.file_size - member.tell() != a.nbytes:
                    raise ValueError(f"{name} has {info.file_size - member.tell()} bytes, "
                                     f"expected {a.nbytes}")

        def read(name):
            with archive.open(name + ".npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False)
        if read("format") != _FORMAT:
            raise ValueError(f"its format is {str(read('format'))!r}, expected {_FORMAT!r}")
        end, digest = file.seek(-64, os.SEEK_END), hashlib.sha256()
        file.seek(0)
        while piece := file.read(min(2 ** 20, end - file.tell())):
            digest.update(piece)
        if file.read() != digest.hexdigest().encode():
            raise ValueError("its checksum is wrong, so it is damaged or was not written by save")
        return {name: read(name) for name in expected}


def load(path: Path, net: Net, state: Mapping[str, Array] | None = None) -> Any:
    """Read back what save wrote, into a network of the same layers.

    Parameters
    ----------
    path : str or path
    net : list of Layer
        Gives the layers, and which arrays of which shape, dtype and module to expect.
    state : dict of arrays, numbers or strings, or None
        The same for the state; what the file has beyond it is left alone.

    Returns
    -------
    net : list of Layer, new, with the arrays of the file
    state : dict of arrays, only if state was given

    Raises
    ------
    TypeError
        If net is not such a list, or state not such a dict.
    ValueError
        If the file is damaged in any byte or foreign, or holds another network or state. Names,
        shapes and dtypes are compared before memory is spent on them.
    OSError
        If the file cannot be opened.
    """
    expected, path = _contents("load", net, state), _path("load", path)
    with open(path, "rb") as file:
        try:
            found = _read(file, expected)
        except Exception as error:      # damage may show anywhere, as an error of any kind
            raise ValueError(f"load: {path} is not a file of this network: "
                             f"{str(error) or repr(error)}") from error
    found = {name: _xp(a).asarray(found[name]) for name, a in expected.items()}
    net = [Layer(op, [found.get(f"{i}.{op.__name__}.{j}", p) for j, p in enumerate(params)],
                 {key: found.get(f"{i}.{op.__name__}.{key}", a) for key, a in options.items()})
           for i, (op, params, options) in enumerate(net)]
    return net if state is None else (net, {key: found[f"state.{key}"] for key in state})


# 8 THE ANALYTIC ANSWER ---------------------------------------------------------------------------
#
# Nothing below is trained. On the pixel scale let X hold each pixel's coordinate on one axis of
# length W, and A the image. The critic reads the coordinate off a one-hot A as
#
#   W - sum_pixels relu(W * A - X)
#
# The rectifier leaves W - x at the hot pixel, where A = 1 and X = x < W, and 0 elsewhere. It is
# one convolution with a kernel of 1 over the channels [A, Y, X], one rectifier, one sum and one
# subtraction: a CoordConv layer with weights W and -1. The inverse is a layer that computes
# relu(X - x) + relu(x - X) = |X - x| on each axis, and a layer that computes relu(1 - their sum),
# which is 1 at the pixel itself and 0 at a distance of 1 or more.

def _analytic(fn, size, dtype, xp):
    size, dtype = _size(fn, size), _float_dtype(fn, dtype)
    K = len(size)
    xp = _module(fn, xp)

    def weights(rows):
        return xp.asarray(np.array(rows, dtype).reshape(len(rows), -1, *(1,) * K))

    def vector(values):
        return xp.asarray(np.array(values, dtype))
    return size, np.eye(K), weights, vector


def decoder_network(size: Size, *, dtype: DTypeLike = np.float32, xp: ModuleType = np
                    ) -> list[Layer]:
    """The critic's network from a one-hot image to its coordinate, for images of any size.

    coord[n, a] = size[a] - sum_i relu(size[a] * x[n, 0, i] - i_a), i_a the coordinate of pixel i

    Parameters
    ----------
    size : tuple of ints
    dtype : floating dtype
    xp : module, numpy or cupy

    Returns
    -------
    net : (N, 1, *size) -> (N, len(size)), the position of the hot pixel on each axis

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.

    Notes
    -----
    Unlike decode it takes any image, and is wrong where that is not one-hot: two hot pixels,
    half a one or none give what the formula says.
    """
    size, eye, weights, vector = _analytic("decoder_network", size, dtype, xp)
    w = weights(np.concatenate([np.array(size)[:, None], -eye], axis=1))
    return [Layer(coord_conv, [w], {"scale": "pixel"}), Layer(relu), Layer(sum_pool),
            Layer(affine, [vector([-1] * len(size)), vector(size)])]


def encoder_network(size: Size, *, dtype: DTypeLike = np.float32, xp: ModuleType = np
                    ) -> list[Layer]:
    """The inverse of decoder_network: from a coordinate to its one-hot image.

    y[n, 0, i] = relu(1 - sum_a (relu(i_a - x[n, a]) + relu(x[n, a] - i_a)))

    Two convolutions with a kernel of 1, the first a CoordConv: 25 parameters for an image.

    Parameters
    ----------
    size : tuple of ints
    dtype : floating dtype
    xp : module, numpy or cupy

    Returns
    -------
    net : (N, len(size), 1, ...) positions in pixels -> (N, 1, *size)

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range.
    """
    size, eye, weights, vector = _analytic("encoder_network", size, dtype, xp)
    K = len(size)
    w = weights(np.block([[-eye, eye], [eye, -eye]]))
    return [Layer(coord_conv, [w, vector([0] * (2 * K))], {"size": size, "scale": "pixel"}),
            Layer(relu), Layer(conv, [weights([[-1] * (2 * K)]), vector([1])]), Layer(relu)]


def renderer_network(size: Size, square: int = 9, *, dtype: DTypeLike = np.float32,
                     xp: ModuleType = np) -> list[Layer]:
    """From a coordinate to the square around it: the encoder and a convolution with ones.

    Parameters
    ----------
    size : tuple of ints
    square : int, odd, the side of the square
    dtype : floating dtype
    xp : module, numpy or cupy

    Returns
    -------
    net : (N, len(size), 1, ...) positions in pixels -> (N, 1, *size), squares cut off at the edge

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or out of range, or square is even.
    """
    net = encoder_network(size, dtype=dtype, xp=xp)
    if _integer("renderer_network", "square", square, 1) % 2 == 0:
        raise ValueError(f"renderer_network: square must be odd, got {square}")
    ones = xp.ones((1, 1, *(square,) * len(size)), dtype)
    return net + [Layer(conv, [ones], {"padding": square // 2})]


def decode(image: Array) -> Array:
    """The coordinate of the hot pixel of each one-hot image: decoder_network in closed form.

    On a one-hot image the decoder's formula leaves W - (W - x) = x, the position of the 1.

    Parameters
    ----------
    image : (N, 1, *size) array
        Each image has one pixel of 1 and else zeros.

    Returns
    -------
    (N, len(size)) array, one position per axis, of the image's dtype

    Raises
    ------
    TypeError, ValueError
        If image is not such an array, or an image is not one-hot.

    Examples
    --------
    >>> decode(np.array([[[[0., 0., 0.], [0., 0., 1.]]]])).tolist()
    [[1.0, 2.0]]
    """
    xp = _arrays("decode", image=image)
    _spatial("decode", image, name="image")
    N, C, *size = image.shape
    if C != 1 or not math.prod(size):
        raise ValueError("decode: image must be (N, 1, *size) with at least one pixel, got "
                         f"image.shape={image.shape}")
    pixels = image.reshape(N, math.prod(size))

    def read(start):
        part = pixels[start:start + 256]
        hot = part.argmax(axis=1)
        # each image has its 1, and no more pixels are set than there are images
        return hot, ((part[xp.arange(len(part)), hot] == 1).all()
                     & (xp.count_nonzero(part != 0) == len(part)))
    parts = _spread(xp, read, range(0, N, 256))
    if not all(bool(fine) for _, fine in parts):
        counts = (pixels != 0).sum(axis=1)
        wrong = (counts != 1) | (pixels.max(axis=1) != 1)
        n = int(wrong.argmax())
        raise ValueError("decode: image must be one-hot, one pixel of 1 and else zeros, but "
                         f"image[{n}] has {int(counts[n])} pixels that are not 0, the largest "
                         f"pixel being {float(pixels[n].max())}")
    hot = xp.concatenate([xp.zeros(0, np.int64), *(hot for hot, _ in parts)])
    return xp.stack(xp.unravel_index(hot, tuple(size)), axis=1).astype(image.dtype)


def encode(coords: Array, size: Size, *, dtype: DTypeLike | None = None) -> Array:
    """One-hot images of positions: encoder_network in closed form, the inverse of decode.

    Parameters
    ----------
    coords : (N, len(size)) array of whole numbers, integer or floating
    size : tuple of ints
    dtype : floating dtype or None
        None keeps the dtype of floating coords and is float32 for integers.

    Returns
    -------
    (N, 1, *size) array

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, or a position is no pixel of the image.

    Examples
    --------
    >>> encode(np.array([[1.]]), (3,)).tolist()
    [[[0.0, 1.0, 0.0]]]
    """
    size = _size("encode", size)
    try:
        xp = array_module(coords)
    except TypeError:
        raise TypeError(f"encode: coords must be a NumPy or CuPy array, got {_kind(coords)}; "
                        "numpy.asarray converts") from None
    if coords.dtype.kind not in "iu":
        _arrays("encode", coords=coords)
    if coords.ndim != 2 or coords.shape[1] != len(size):
        raise ValueError(f"encode: coords must be (N, {len(size)}) for size={size}, got "
                         f"coords.shape={coords.shape}")
    if dtype is None:
        dtype = np.float32 if coords.dtype.kind in "iu" else coords.dtype
    dtype, N = _float_dtype("encode", dtype), len(coords)
    end = xp.asarray(np.array(size))
    wrong = ~((coords >= 0) & (coords < end) & (coords == xp.floor(coords))).all(axis=1)
    if wrong.any():
        raise ValueError(f"encode: coords must be whole numbers from 0 to below {size}, got "
                         f"{coords[int(wrong.argmax())].tolist()}")
    y = xp.zeros((N, 1, *size), dtype)
    hot = coords.astype(np.int64) @ xp.asarray(np.cumprod((1, *size[:0:-1]))[::-1])
    y.reshape(N, math.prod(size))[xp.arange(N), hot] = 1
    return y


# MIT License
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
# OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

if __name__ == "__main__":
    import doctest

    failed, _ = doctest.testmod()
    sys.exit(failed > 0)
