# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the coordref authors. The licence text is at the end of this file.
"""CoordConv from first principles, and the answer that needs no training.

A convolution applies the same weights everywhere. So what it makes of a pixel depends on the
pixels around it and, away from the edges, not on where it is. Liu et al. (2018) found that
convolutional networks therefore struggle to turn a position into the pixel that it names, or a
pixel into its position. Their remedy is CoordConv: two more input channels, which hold each
pixel's row and column. Piekniewski (2018), the critic here, answered that there is nothing to
learn: one convolution with such channels, one rectifier, one sum and one subtraction read a
coordinate off an image, with weights that can be written down. So both sides use coordinates; they
dispute whether finding such weights by training proves anything. This file holds the paper's
CoordConv networks and the critic's as plain array code, for NumPy and, given CuPy arrays, for the
GPU.

Sections 1 to 5 are the subject, and can be explained without the others: where they call a helper
of a later section, a comment says what it does. Section 6 carries convolution out, and makes it
fast; 7 to 9 add what the paper's networks and their training need; 10 holds files and the checks
of arguments. Python 3.11 and NumPy 2.0 are enough.

Notation:
N images, C channels in, F filters (channels out), K coordinate channels, G groups; *size, *kernel
and *out stand for the spatial axes, one or more. Images are (N, C, *size): (8, 3, 32, 48) are 8
images of 3 channels, 32 rows and 48 columns. Weights are (F, C/G, *kernel), because a filter sees
the channels of its group: all of them if G is 1, as it mostly is. x is an input, y an output, w
weights, b a bias. dx is the gradient of the loss with respect to x, and so with other names: dw,
db. A position is (row, col), and each of the two is a coordinate. The rank is the number of
spatial axes. xp is numpy or cupy, the module of the arrays; array_module(x) finds it. In formulas
n, c, f and a count images, channels, filters and axes; i is the position of a pixel of an image, k
that of a tap.

Conventions:
"Convolution" is cross-correlation, as in PyTorch: the kernel is not flipped. Coordinate channels
come after the input's: one per axis, in axis order, then the radius, if it is asked for. On the
unit scale an axis runs from -1 to 1, on the pixel scale it counts pixels from 0. The radius is the
distance from where all coordinates are 0.

Below every f(x, *params, **options) that may be a layer or a loss stands its gradient,
f_backward(dy, x, *params, **options). It takes the upstream gradient dy, shaped as f's output (a
number, if f is a loss), and then the same arguments as f. It returns dx and one gradient for each
of params, or just dx if f has none: dx, dw, db = conv_backward(dy, x, w, b, stride=2). The target
of a loss counts as one of its params.

The line above a function, such as @_checked(x="N C *size", w="F C/G *kernel", b="F?"), states the
shapes of its arrays of floats, where they are fixed:

    *size     one or more axes          C+K     C plus the number of coordinate channels
    ...       any number of axes        F?      the array may be None
    1         an axis of length 1

Equal names, "..." too, are equal lengths. These arrays share one module and one dtype, float32 or
float64, and so does the result.

The table _OPTIONS of section 10 says what an option may be. Options are completed before the
function sees them: for images of rank 2 a stride of 2 becomes (2, 2), a padding of 1 becomes
((1, 1), (1, 1)), and an rng that is None or a seed becomes a Generator. An argument of the wrong
kind raises TypeError, one of the wrong value or shape ValueError; what is named _need... raises
one unless something holds. Public functions never write to the arrays that they get.

Example:
>>> coords = np.array([[1, 2], [0, 0]])                 # two pixels, as (row, col)
>>> images = encode(coords, (3, 4))                     # drawn as one-hot images
>>> y, _ = forward(decoder_network((3, 4)), images)     # and read by the critic's network
>>> y.tolist()
[[1.0, 2.0], [0.0, 0.0]]

Differences:
The paper's listing has the channels (col, row, radius), and measures the radius from (0.5, 0.5).
Its repository divides coordinates by the length of the other axis, which matters where the two
differ. PyTorch takes no padding in pairs, before and after, and no stride with "same"; here both
work.

References:
Liu, Lehman, Molino, et al. An intriguing failing of convolutional neural networks and the
CoordConv solution. NeurIPS 2018, arXiv 1807.03247.
Piekniewski. Autopsy of a deep learning paper. Blog post, 14 July 2018.
Dumoulin, Visin. A guide to convolution arithmetic for deep learning. arXiv 1603.07285.
He, Zhang, Ren, Sun. Delving deep into rectifiers. ICCV 2015, arXiv 1502.01852.
Ioffe, Szegedy. Batch normalization. ICML 2015, arXiv 1502.03167.
Kingma, Ba. Adam: a method for stochastic optimization. ICLR 2015, arXiv 1412.6980.
"""

import collections.abc
import concurrent.futures
import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import reprlib
import sys
from numbers import Integral, Real

import numpy as np

__version__ = "0.3.0"

# The public names of sections 1 to 5 and 7 to 10, a row for each; a row that is further indented
# continues the one above.
__all__ = """
  axis_coords coord_channels add_coords add_coords_backward
  decode encode
  conv conv_backward conv_transpose conv_transpose_backward
  coord_conv coord_conv_backward
  relu relu_backward sum_pool sum_pool_backward affine affine_backward
    Layer forward backward decoder_network encoder_network renderer_network
  linear linear_backward max_pool max_pool_backward mean_pool mean_pool_backward
    batch_norm batch_norm_backward
    softmax softmax_backward softmax_cross_entropy softmax_cross_entropy_backward
    sigmoid_cross_entropy sigmoid_cross_entropy_backward
    mean_squared_error mean_squared_error_backward
  he_normal coordconv_painter coordconv_renderer coordconv_regressor
  Examples not_so_clevr adam_step State initial_state train accuracy iou distance evaluate
  save load array_module best_module to_numpy
""".split()


def _checked(**shapes):
    """Decorator: check f's arguments, complete its options, and then call f. Sections 1 to 9 need
    no more than that, so skip the body at first. _arguments of section 10 does the work, and
    returns all arguments by name. For a wrong argument it or f raises _Refused, which becomes an
    error here."""
    # the ? is for readers: an array may be None if that is its default
    axes = {name: shape.removesuffix("?").split() for name, shape in shapes.items()}

    def decorate(f):
        @functools.wraps(f)
        def checked(*args, **options):
            try:
                with np.errstate(under="ignore"):       # exp(-1000) is 0, whatever the caller set
                    y = f(**_arguments(f, axes, args, options))
                # NumPy makes a scalar of an array without axes, such as a loss: an array again
                return _as_array(y) if shapes else y
            except _Refused as refused:
                raise refused.kind(f"{f.__name__}: {refused}") from None
        return checked
    return decorate


# 1 COORDINATES -----------------------------------------------------------------------------------

@_checked()
def axis_coords(n, *, scale="unit", dtype=np.float32, xp=np):
    """The coordinates of the n pixels along an axis, (n,).

    "unit":  c[i] = (2i - (n-1)) / (n-1), from -1 to 1, and c = [0] for n = 1
    "pixel": c[i] = i

    >>> axis_coords(5).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    _need_exact((n,), dtype)                            # float32 tells at most 2^24 pixels apart
    return _axis(n, scale, xp).astype(dtype)


def _axis(n, scale, xp):
    """The coordinates of an axis in float64."""
    i = xp.arange(n, dtype=np.float64)
    return (2 * i - (n - 1)) / max(n - 1, 1) if scale == "unit" else i


@_checked()
def coord_channels(size, *, radius=False, scale="unit", dtype=np.float32, xp=np):
    """The coordinate channels of an image, (K, *size): K = len(size), or one more with radius.

    y[a, i_0, i_1, ...] = axis_coords(size[a], scale=scale)[i_a]    for each axis a
    y[-1, i_0, i_1, ...] = sqrt(sum_a y[a, i_0, i_1, ...]^2)        only with radius

    size : tuple of integers, one per axis
    scale : "unit" or "pixel", as in axis_coords

    >>> coord_channels((2, 3)).tolist()
    [[[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]], [[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]]
    """
    return _coords(size, radius, scale, dtype, xp)


def _coords(size, radius, scale, dtype, xp):
    """Like coord_channels, but an axis may have length 0."""
    _need_exact(size, dtype)
    # one array for each axis, of length 1 along the others
    channels = list(xp.meshgrid(*(_axis(n, scale, xp) for n in size), indexing="ij", sparse=True))
    if radius:
        channels.append(xp.sqrt(sum(c * c for c in channels)))
    y = xp.empty((len(channels), *size), dtype)
    for a, c in enumerate(channels):
        y[a] = c                                        # repeated along the others
    return y


@_checked(x="N C *size")
def add_coords(x, *, radius=False, scale="unit"):
    """The images with the coordinate channels appended to their own, (N, C+K, *size).

    >>> add_coords(np.ones((1, 1, 2))).tolist()
    [[[1.0, 1.0], [-1.0, 1.0]]]
    """
    xp = array_module(x)
    coords = _coords(x.shape[2:], radius, scale, x.dtype, xp)
    return xp.concatenate([x, xp.broadcast_to(coords, (len(x), *coords.shape))], axis=1)


@_checked(x="N C *size", dy="N C+K *size")
def add_coords_backward(dy, x, *, radius=False, scale="unit"):
    """dx = dy[:, :C]: the coordinates are constants."""
    return dy[:, :x.shape[1]].copy()


# 2 THE CRITIC'S ANSWER ---------------------------------------------------------------------------
#
# Let A be a one-hot image: 1 at one pixel, the hot one, and 0 elsewhere. Take one axis at a time,
# in the critic's letters: W is its length (not weights), X holds each pixel's coordinate along it,
# from 0 to W - 1, and p is the coordinate of the hot pixel. The critic reads p off the image as
#
#   p = W - sum_pixels relu(W * A - X)                          where relu(x) = max(x, 0)
#
# At the hot pixel the rectifier gets W - p, which is above 0. Elsewhere it gets -X, at most 0, and
# gives 0. With W = 4 and p = 1:
#
#   A              0   1   0   0
#   X              0   1   2   3
#   W * A - X      0   3  -2  -3
#   relu           0   3   0   0        the sum is 3, and 4 - 3 = 1
#
# The other direction is ours. To draw the one-hot image of the position p, give each pixel i
#
#   relu(1 - sum_a |i_a - p_a|)                                 summed over the axes a
#
# That is 1 at p and 0 elsewhere, since coordinates are whole numbers. On one axis, with the same W
# and p:
#
#   i              0   1   2   3
#   |i - p|        1   0   1   2
#   1 - |i - p|    0   1   0  -1
#   relu           0   1   0   0
#
# Section 5 wires both as networks. decode and encode get the same results directly, to check those
# networks against: decode looks for the hot pixel, the only one that adds to the sum, and encode
# sets it.

@_checked(image="N 1 *size")
def decode(image):
    """The position of the hot pixel of each image, (N, len(size)). An image that is not one-hot
    raises ValueError, as the formula would give a meaningless position.

    >>> decode(np.array([[[[0., 0., 0.], [0., 0., 1.]]]])).tolist()
    [[1.0, 2.0]]
    """
    xp = array_module(image)
    size = image.shape[2:]
    _need_exact(size, image.dtype)
    # _flat makes it (N, pixels); hot (N,) is the index of the 1 among them, if all else is 0
    hot = _hot_pixels(_flat(image))
    return xp.stack(xp.unravel_index(hot, size), axis=1).astype(image.dtype)


@_checked()
def encode(coords, size, *, dtype=np.float32):
    """The one-hot images (N, 1, *size) of the positions coords (N, len(size)): the inverse of
    decode. coords are whole numbers, in an array of integers or of floats.

    >>> encode(np.array([[1]]), (3,)).tolist()
    [[[0.0, 1.0, 0.0]]]
    """
    positions = _positions(coords, size)                # integers, checked to lie in the image
    xp = array_module(positions)
    N = len(positions)
    y = xp.zeros((N, 1, *size), dtype)
    y[xp.arange(N), 0, *positions.T] = 1                # y[n, 0, row, col] for each n
    return y


# 3 CONVOLUTION -----------------------------------------------------------------------------------
#
# A kernel is a small grid of weights; each place in it is a tap. A convolution moves the kernel
# over an image. At each stop it multiplies every weight by the pixel under its tap and adds up the
# products. With two taps over four pixels:
#
#   x = [1 2 4 7]     w = [-1 1]      y = [-1*1 + 1*2, -1*2 + 1*4, -1*4 + 1*7] = [1 2 3]
#
# In general, with o for the position of an output pixel and k for that of a tap, each with one
# index per spatial axis:
#
#   y[n, f, o] = sum_{c, k} w[f, c, k] * x[n, c, i]      where i = o*stride + k*dilation - before
#
# stride is the step from one output pixel to the next, dilation that from one tap to the next, and
# before is the number of zeros in front of the image: outside of it x counts as 0.
#
# This sum is a matrix product. To unfold x is to fill a matrix u with all that is read: a row for
# each channel and tap, (c, k), and a column for each image and output pixel, (n, o).
#
#   u[(c, k), (n, o)] = x[n, c, i]          u = [1 2 4]  what tap 0 reads, the pixels 0 to 2
#                                               [2 4 7]  what tap 1 reads, the pixels 1 to 3
#
# With w as a matrix of F rows and (c, k) columns, y is a matrix of F rows and (n, o) columns:
#
#   y = w @ u                               y = [1 2 3]
#
# So the gradients are those of a matrix product. With r for a row of u and j for a column,
# y[f, j] = sum_r w[f, r] * u[r, j], and therefore dw[f, r] = sum_j dy[f, j] * u[r, j], which is
# dw = dy @ u.T, and likewise du = w.T @ dy. And u only copies pixels, so a pixel's gradient is the
# sum of its copies' gradients: to fold du is to add each of its rows to the pixels that the same
# row of u was copied from. Say that dy = [1 10 100]:
#
#   dw = dy @ u.T                           dw = [1 + 20 + 400, 2 + 40 + 700] = [421 742]
#   du = w.T @ dy                           du = [-1 -10 -100]  to the pixels 0 to 2
#                                                [ 1  10  100]  to the pixels 1 to 3
#   dx = fold(du)                           dx = [-1, 1 - 10, 10 - 100, 100] = [-1 -9 -90 100]
#
# For one image and one axis, with a stride and a dilation of 1 and without padding, unfold and
# fold are a slice for each tap:
#
#   unfold:   u[:, k] = x[:, k:k + out]         x and dx are (C, pixels), u and du (C, taps, out)
#   fold:     dx[:, k:k + out] += du[:, k]      dx is zeros to begin with
#
# Section 6 does so for any number of axes, and for a block of the columns at a time, since u is
# large: with a stride of 1 it has about one copy of x for each tap. With G groups the filters of a
# group see the channels of that group alone, and w, u and y are stacks of G such matrices:
#
#   y (G, F/G, columns) = w (G, F/G, C/G * taps) @ u (G, C/G * taps, columns)

# How a kernel moves over an image: five tuples with an entry for each spatial axis. out is the
# number of stops that the kernel makes, so the zeros behind the image need no entry.
_Window = collections.namedtuple("_Window", "kernel stride dilation before out")


def _window(size, kernel, stride, padding, dilation):
    """The window of a kernel over an image of this size. padding is "same" or has a (before,
    after) pair for each axis."""
    before = []
    out = []
    for axis, (n, taps, s, d) in enumerate(zip(size, kernel, stride, dilation)):
        span = (taps - 1) * d + 1                       # from the first tap to the last
        if padding == "same":
            # ceil(n / s) stops, and just so many zeros that the last one fits. For n = 6, s = 2
            # and a span of 3: 3 stops, which take 7 pixels, so one zero, and none of it in front
            stops = -(-n // s)                          # n / s, rounded up
            zeros = max((stops - 1) * s + span - n, 0)
            before.append(zeros // 2)
        else:
            stops = (n + sum(padding[axis]) - span) // s + 1
            before.append(padding[axis][0])
        out.append(stops)
    _need_output(size, kernel, padding, out)
    return _Window(kernel, stride, dilation, tuple(before), tuple(out))


# The three products, block by block. What they call stands in section 6:
#
#   _blocks(x, y, win)            yields the blocks of y, as slices; y need not be filled yet
#   _unfold(x, y, win, groups)    the same, each with its columns of u, (G, rows, columns)
#   _columns(y, block, groups)    the columns of a block of y
#   _set_columns(y, block, cols)  writes columns to a block of y
#   _fold(du, dx, block, win)     adds the columns of du for a block to the pixels of dx
#
# _matrices makes a stack of G matrices of w, _product is @, and _add_product adds one to an array.
# On a first reading skip both ifs: they lead to shortcuts.

def _correlate(x, w, win, groups=1):
    """y = w @ unfold(x), (N, F, *out)."""
    if _is_pointwise(x, w, win):
        return _pointwise(x, w, groups)
    y = array_module(x).empty((len(x), len(w), *win.out), x.dtype)
    w = _matrices(w, groups)
    for block, u in _unfold(x, y, win, groups):
        _set_columns(y, block, _product(w, u))          # w @ u
    return y


def _correlate_dw(dy, x, win, groups=1):
    """dw = dy @ unfold(x).T, (F, C/G, *kernel)."""
    shape = (dy.shape[1], x.shape[1] // groups, *win.kernel)
    dw = array_module(x).zeros(shape, x.dtype)
    total = _matrices(dw, groups)                       # a view, as dw is contiguous
    for block, u in _unfold(x, dy, win, groups):
        _add_product(total, _columns(dy, block, groups), u.swapaxes(1, 2))      # += dy @ u.T
    return dw


def _correlate_dx(dy, w, win, size, groups=1):
    """dx = fold(w.T @ dy), (N, C, *size)."""
    if _is_mirroring_faster(dy, w, win, size, groups):
        mirrored, window = _mirrored(w, win, size, groups)
        return _correlate(dy, mirrored, window, groups)
    C = w.shape[1] * groups
    dx = array_module(dy).zeros((len(dy), C, *size), dy.dtype)
    w = _matrices(w, groups)
    for block in _blocks(dx, dy, win):
        du = _product(w.swapaxes(1, 2), _columns(dy, block, groups))            # w.T @ dy
        _fold(du, dx, block, win)
    return dx


def _add_bias(y, b):
    """y + b[f] for each filter f, in place."""
    if b is not None:
        y += _over(b, y)                                # _over makes b (F, 1, ...)
    return y


@_checked(x="N C *size", w="F C/G *kernel", b="F?")
def conv(x, w, b=None, *, stride=1, padding=0, dilation=1, groups=1):
    """Convolution (cross-correlation), y (N, F, *out).

    y[n, f, o] = b[f] + sum_{c, k} w[f, c, k] * x[n, c, o*stride + k*dilation - before]
    out = floor((size + before + after - (kernel-1)*dilation - 1) / stride) + 1

    stride, dilation : an integer, or one per axis
    padding : an integer; one per axis, as (1, 2); a (before, after) pair per axis, as
        ((0, 1), (2, 2)), or ((1, 2),) for one axis; "valid" for none; or "same" for an output of
        ceil(size / stride), with the odd pixel, if any, after the image
    groups : an integer G that divides C and F; each filter sees the C/G channels of its own group,
        and the formula holds within a group

    >>> conv(np.array([[[1., 2., 4., 7.]]]), np.array([[[-1., 1.]]])).tolist()
    [[[1.0, 2.0, 3.0]]]
    """
    win = _window(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return _add_bias(_correlate(x, w, win, groups), b)


@_checked(dy="N F *out", x="N C *size", w="F C/G *kernel", b="F?")
def conv_backward(dy, x, w, b=None, *, stride=1, padding=0, dilation=1, groups=1):
    """dx, dw and db of conv; db is None without b.

    dx[n, c, i] = sum_{f, o, k} dy[n, f, o] * w[f, c, k]
                  over those o and k for which o*stride + k*dilation - before = i
    dw[f, c, k] = sum_{n, o} dy[n, f, o] * x[n, c, o*stride + k*dilation - before]
    db[f] = sum_{n, o} dy[n, f, o]
    """
    win = _window(x.shape[2:], w.shape[2:], stride, padding, dilation)
    _need_shape(dy, (len(x), len(w), *win.out))
    dx = _correlate_dx(dy, w, win, x.shape[2:], groups)
    dw = _correlate_dw(dy, x, win, groups)
    return dx, dw, None if b is None else _channel_sum(dy)          # over all axes but the filters


# A transposed convolution is the step from dy to dx, used as a layer. With a stride above 1 it
# makes images larger: each pixel of x adds a copy of the kernel, times its value, to y, and the
# copies of neighbours begin stride pixels apart. The paper's network without coordinates draws in
# this way: six doublings take one pixel to 64x64. For x = [1 10], w = [1 2 3] and a stride of 2:
#
#   1 * w          1   2   3
#   10 * w                10  20  30
#   y              1   2  13  20  30
#
# Padding then cuts off pixels before and after. The three products are those of a convolution, in
# which x and dy have changed places, and so have y and dx:
#
#   convolution     y = w @ unfold(x)       dw = dy @ unfold(x).T       dx = fold(w.T @ dy)
#   transposed      dx = w @ unfold(dy)     dw = x @ unfold(dy).T       y = fold(w.T @ x)
#   made by         _correlate              _correlate_dw               _correlate_dx
#
# x stands where dy stood, so its channels are the first axis of w, and in the formulas below o is
# a pixel of x, and i one of y. The window moves over y, and has a stop for each pixel of x, so its
# out is the size of x. _transpose_window of section 6 returns it and the size of y.

@_checked(x="N C *size", w="C F/G *kernel", b="F?")
def conv_transpose(x, w, b=None, *, stride=1, padding=0, output_padding=0, dilation=1, groups=1):
    """The transposed convolution, y (N, F, *out): dx of conv_backward, with x in place of dy.

    y[n, f, i] = b[f] + sum_{c, o, k} x[n, c, o] * w[c, f, k]
                        over those o and k for which o*stride + k*dilation - before = i
    out = (size-1)*stride + (kernel-1)*dilation + 1 + output_padding - before - after

    w : the channels of x come first
    stride, padding, dilation, groups : as in conv, but "same" gives an output of size * stride
    output_padding : an integer, or one per axis, below the larger of stride and dilation, as in
        PyTorch: so many extra pixels at the end of y. With 3 taps and a stride of 2, conv turns 5
        pixels, and also 6, into 2; so 2 become 5, or 6 with an output_padding of 1. With "same"
        the output is of size * stride all the same.

    >>> conv_transpose(np.array([[[1., 10.]]]), np.array([[[1., 2., 3.]]]), stride=2).tolist()
    [[[1.0, 2.0, 13.0, 20.0, 30.0]]]
    """
    win, y_size = _transpose_window(x, w, stride, padding, output_padding, dilation)
    return _add_bias(_correlate_dx(x, w, win, y_size, groups), b)           # fold(w.T @ x)


@_checked(dy="N F *out", x="N C *size", w="C F/G *kernel", b="F?")
def conv_transpose_backward(dy, x, w, b=None, *, stride=1, padding=0, output_padding=0, dilation=1,
                            groups=1):
    """dx, dw and db of conv_transpose.

    dx[n, c, o] = sum_{f, k} w[c, f, k] * dy[n, f, o*stride + k*dilation - before]
    dw[c, f, k] = sum_{n, o} x[n, c, o] * dy[n, f, o*stride + k*dilation - before]
    db[f] = sum_{n, i} dy[n, f, i]
    """
    win, y_size = _transpose_window(x, w, stride, padding, output_padding, dilation)
    _need_shape(dy, (len(x), w.shape[1] * groups, *y_size))
    dx = _correlate(dy, w, win, groups)                 # w @ unfold(dy)
    dw = _correlate_dw(x, dy, win, groups)              # x @ unfold(dy).T
    return dx, dw, None if b is None else _channel_sum(dy)


# 4 COORDCONV -------------------------------------------------------------------------------------
#
# CoordConv is add_coords followed by a convolution. A convolution sums over its input channels,
# so it splits into a part that sees the images and a part that sees the coordinates:
#
#   conv(add_coords(x), w, b) = conv(x, w[:, :C]) + conv(coords, w[:, C:], b)
#
# The second part is the same for every image. So CoordConv adds to a convolution a bias that
# depends on the position; w[:, C:] decides how. Outside of the image, coordinates count as 0, as
# pixels do.

def _images_and_coords(x, size, radius, scale):
    """The images, repeated over size if a size is given; and their coordinate channels as a batch
    of one, (1, K, *size)."""
    xp = array_module(x)
    if size is not None:
        _need(all(n == 1 for n in x.shape[2:]),
              f"x must be single pixels, (N, C, 1, ...), to be repeated over size={size}", x.shape)
        x = xp.broadcast_to(x, (*x.shape[:2], *size))
    coords = _coords(x.shape[2:], radius, scale, x.dtype, xp)
    return x, coords[None]


@_checked(x="N C *image", w="F C+K *kernel", b="F?")
def coord_conv(x, w, b=None, *, size=None, radius=False, scale="unit", stride=1, padding=0,
               dilation=1):
    """CoordConv: conv(add_coords(x), w, b), without building add_coords(x); y (N, F, *out). There
    are no groups: each filter sees the coordinates.

    size : None, or a tuple of integers such as (64, 64). Then x must be single pixels, (N, C, 1,
        ...), and each is first repeated over that size. This is how a network gets a position to
        draw.
    radius, scale : as in coord_channels
    stride, padding, dilation : as in conv

    >>> x, w = np.array([[[7., 7., 9.]]]), np.array([[[1.], [10.]]])
    >>> coord_conv(x, w).tolist()               # each pixel plus ten times its coordinate
    [[[-3.0, 7.0, 19.0]]]
    """
    C = x.shape[1]
    images, coords = _images_and_coords(x, size, radius, scale)
    win = _window(images.shape[2:], w.shape[2:], stride, padding, dilation)
    y = _correlate(images, w[:, :C], win)
    y += _add_bias(_correlate(coords, w[:, C:], win), b)            # the same for all images
    return y


@_checked(dy="N F *out", x="N C *image", w="F C+K *kernel", b="F?")
def coord_conv_backward(dy, x, w, b=None, *, size=None, radius=False, scale="unit", stride=1,
                        padding=0, dilation=1):
    """dx, dw and db of coord_conv. All images share the u of the coordinates, so the gradient with
    respect to the weights of coordinates, sum_n dy[n] @ u.T, is (sum_n dy[n]) @ u.T."""
    C = x.shape[1]
    images, coords = _images_and_coords(x, size, radius, scale)
    win = _window(images.shape[2:], w.shape[2:], stride, padding, dilation)
    _need_shape(dy, (len(x), len(w), *win.out))
    dx = _correlate_dx(dy, w[:, :C], win, images.shape[2:])
    if size is not None:
        # the gradient of a pixel is the sum over its copies; _pixels makes them one axis
        dx = _pixels(dx).sum(axis=2).reshape(x.shape)
    dy_sum = _image_sum(dy)[None]                       # over the images, (1, F, *out)
    dw = array_module(x).concatenate(
        [_correlate_dw(dy, images, win), _correlate_dw(dy_sum, coords, win)], axis=1)
    return dx, dw, None if b is None else _channel_sum(dy_sum)


# 5 NETWORKS, WIRED BY HAND -----------------------------------------------------------------------
#
# The critic's formula as a network, with a channel for each of the K axes:
#
#   coord_conv    W * A - X, by a 1x1 kernel        (N, 1, *size) to (N, K, *size)
#   relu
#   sum_pool      the sum over the pixels           to (N, K)
#   affine        W minus that sum
#
# The formula for the other direction takes two 1x1 convolutions, each followed by a relu, since
# |d| = relu(d) + relu(-d).

@_checked(x="...")
def relu(x):
    """The rectifier max(x, 0), elementwise; of NaN it is NaN, with a gradient of 0."""
    return array_module(x).maximum(x, 0)


@_checked(dy="...", x="...")
def relu_backward(dy, x):
    """dx = dy where x > 0, else 0."""
    return _where(x > 0, dy)                            # where(x > 0, dy, 0)


@_checked(x="N C *size")
def sum_pool(x):
    """The sum over the pixels of each image, y (N, C): y[n, c] = sum_i x[n, c, i]."""
    return _pixels(x).sum(axis=2)                       # _pixels(x) is (N, C, pixels)


@_checked(dy="N C", x="N C *size")
def sum_pool_backward(dy, x):
    """dx[n, c, i] = dy[n, c]."""
    return array_module(x).broadcast_to(_over(dy, x), x.shape).copy()


@_checked(x="N C ...", scale="C", shift="C")
def affine(x, scale, shift):
    """A scale and a shift for each channel: y[n, c, i] = scale[c] * x[n, c, i] + shift[c]."""
    return x * _over(scale, x) + _over(shift, x)


@_checked(dy="N C ...", x="N C ...", scale="C", shift="C")
def affine_backward(dy, x, scale, shift):
    """dx = scale * dy, dscale[c] = sum_{n, i} dy * x, dshift[c] = sum_{n, i} dy."""
    return dy * _over(scale, x), _channel_sum(dy * x), _channel_sum(dy)


class Layer(collections.namedtuple("Layer", "op params options")):
    """One step of a network: it computes op(x, *params, **options). A network is a list of Layers.

    op : a function with a gradient, of this file or of another module. The gradient must stand in
        the same module, under the same name with "_backward" appended. Do not wrap op in a
        decorator of another module: the gradient would be looked for there.
    params : the list of arrays that training changes; None stands for one that is left out
    options : a dict of all the rest, including arrays that get no gradient
    """

    def __new__(cls, op, params=(), options=()):
        _need_parts_of_layer(op, params, options)
        # the list and the dict are copied, the arrays in them are not
        return super().__new__(cls, op, list(params), dict(options))


@_checked()
def forward(net, x):
    """Run a network. Returns its output (a copy of x if there are no layers) and the list of the
    layers' inputs, for backward: x itself is the first of them."""
    _need(_is_array(x), "x must be a NumPy or CuPy array", x, kind=TypeError)
    inputs = []
    y = x
    for op, params, options in net:
        inputs.append(y)
        y = op(y, *params, **options)
    return y.copy() if y is x else y, inputs


@_checked()
def backward(net, dy, inputs):
    """The gradients of forward, for the upstream gradient dy and the inputs that forward returned.
    Returns dx for the network's input, and for each layer a list of the gradients of its params.
    """
    _need_inputs(net, dy, inputs)
    grads = []
    dx = dy
    for layer, x in zip(reversed(net), reversed(inputs)):
        op_backward = _gradient(layer.op)               # conv_backward for conv
        # dy of a layer is dx of the layer after it
        found = op_backward(dx, x, *layer.params, **layer.options)
        dx, dparams = _split(found, layer)              # dparams: a list of the others
        grads.insert(0, dparams)
    return dx.copy() if dx is dy else dx, grads


def _weights(matrix, rank, dtype, xp):
    """The weights (F, C, 1, ...) of a 1x1 convolution over rank axes, from a matrix (F, C)."""
    w = np.array(matrix, dtype)
    ones = (1,) * rank
    return xp.asarray(w.reshape(*w.shape, *ones))


@_checked()
def decoder_network(size, *, dtype=np.float32, xp=np):
    """The critic's network, from a one-hot image (N, 1, *size) to its position (N, len(size)).

    p[n, a] = size[a] - sum_i relu(size[a] * x[n, 0, i] - i_a)

    for each axis a, where i_a is the coordinate of pixel i along it. The CoordConv has a filter
    for each axis; for an image of 3 rows and 4 columns, its weights for the channels image, row
    and col are [[3 -1 0], [4 0 -1]]. An image that is not one-hot gets what the formula gives.
    """
    K = len(size)
    w = np.column_stack([size, -np.eye(K)])             # (K, 1+K)
    minus_ones = xp.full(K, -1, dtype)
    sizes = xp.asarray(size, dtype)
    return [Layer(coord_conv, [_weights(w, K, dtype, xp)], {"scale": "pixel"}),
            Layer(relu),
            Layer(sum_pool),
            Layer(affine, [minus_ones, sizes])]


@_checked()
def encoder_network(size, *, dtype=np.float32, xp=np):
    """The network from a position in pixels to its one-hot image (N, 1, *size): two 1x1
    convolutions. For two axes it has 25 parameters; four are biases of 0, which training may
    change. The position comes as an image of one pixel, (N, len(size), 1, ...), which coord_conv
    repeats.

    y[n, 0, i] = relu(1 - sum_a (relu(i_a - p_a) + relu(p_a - i_a)))       with p = x[n]

    For two axes the weights of the first convolution, for the channels p_0, p_1, i_0 and i_1, are
    [[-1 0 1 0] [0 -1 0 1] [1 0 -1 0] [0 1 0 -1]], and those of the second [[-1 -1 -1 -1]], with a
    bias of 1.

    >>> forward(encoder_network((2, 3)), np.array([[[[1.]], [[2.]]]], np.float32))[0].tolist()
    [[[[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]]
    """
    K = len(size)
    eye = np.eye(K)                                     # each axis has weights for itself alone
    w = np.block([[-eye, eye], [eye, -eye]])
    minus_ones = -np.ones((1, 2 * K))
    return [Layer(coord_conv, [_weights(w, K, dtype, xp), xp.zeros(2 * K, dtype)],
                  {"size": size, "scale": "pixel"}),
            Layer(relu),
            Layer(conv, [_weights(minus_ones, K, dtype, xp), xp.ones(1, dtype)]),
            Layer(relu)]


@_checked()
def renderer_network(size, square=9, *, dtype=np.float32, xp=np):
    """The network from a position in pixels (N, len(size), 1, ...) to the square around it, cut
    off at the edge, (N, 1, *size): encoder_network, then a convolution with ones. The network that
    learns the like, with logits as its output, is coordconv_renderer.

    square : the side of the square, an odd number of pixels
    """
    net = encoder_network(size, dtype=dtype, xp=xp)
    kernel = (square,) * len(size)
    ones = xp.ones((1, 1, *kernel), dtype)
    return [*net, Layer(conv, [ones], {"padding": square // 2})]


# Here the subject ends.


# 6 HOW CONVOLUTION IS MADE FAST ------------------------------------------------------------------
#
# The columns of u are cut into blocks that about fit in a cache. unfold and fold move slices, not
# single pixels. Then there are two shortcuts, a faster where, and a sum that keeps float32
# accurate.

_BLOCK = 2 ** 20                # numbers of u that exist at a time on a CPU, in each thread


def _blocks(x, y, win):
    """Cut the output y into blocks, each a tuple of slices: of the images, then of each axis of
    pixels. In a block there are at most _BLOCK numbers of u, of y, and of the images that u is
    made from (on a GPU 128 times as many), but always at least a column and an image.

    With 64 channels, 3x3 taps and an output of 56x56 pixels u has 576 rows, and so 1820 columns at
    a time: the steps are (32, 56), which is 1792 pixels of one image.
    """
    rows = max(x.shape[1] * math.prod(win.kernel), y.shape[1], 1)       # of u, or of y if more
    on_cpu = array_module(x) is np
    # each call costs a GPU more; by how much its blocks should be larger was not measured
    budget = _BLOCK if on_cpu else 128 * _BLOCK
    columns = max(budget // rows, 1)
    steps = []                                          # a block's length along each axis
    for n in reversed(win.out):                         # the last axis whole, if there is room
        steps.insert(0, min(n, columns // math.prod(steps)))
    # Small images share a block: with a block for each, 64 of 12x12 took four times as long. They
    # share 4096 columns at most, since dw sums over the columns, and BLAS may add up in turn, with
    # a rounding each time. A large image may have more: else one of 2048x2048 with one channel
    # took four times as long.
    shared = min(columns, 4096) if on_cpu else columns
    images = min(shared // math.prod(steps), budget // max(math.prod(x.shape[1:]), 1))
    cuts = [[slice(i, min(i + step, n)) for i in range(0, n, step)]
            for n, step in zip((len(x), *win.out), (max(images, 1), *steps))]
    return itertools.product(*cuts)


# y is an array (N, F, *out). To make it a matrix of F rows and (n, o) columns, F goes first and
# the other axes become one.

def _part(y, block):
    """A view of a block of y, (F, images, *out)."""
    images, *pixels = block
    return y[images, :, *pixels].swapaxes(0, 1)


def _columns(y, block, groups):
    """The columns of y for a block, (G, F/G, columns)."""
    part = _part(y, block)
    return part.reshape(groups, len(part) // groups, math.prod(part.shape[1:]))


def _set_columns(y, block, columns):
    """Write the columns of a block to y."""
    part = _part(y, block)
    part[...] = columns.reshape(part.shape)


# A tap reads every stride-th pixel of an image, which is a slice, and it does so for a slice of
# the outputs: those for which the pixel lies inside. For three pixels and three taps, at a stride
# of 1, with a zero in front and one behind:
#
#   x = [1 2 4]     tap 0 reads [0 1 2]     pixels 0 and 1, for outputs 1 and 2
#                   tap 1 reads [1 2 4]     pixels 0 to 2, for outputs 0 to 2
#                   tap 2 reads [2 4 0]     pixels 1 and 2, for outputs 0 and 1
#
# A kernel may be as large as the image, with many taps and few outputs. Then the outputs are taken
# one by one: an output reads every dilation-th pixel, for a slice of the taps. Above, output 0
# reads the pixels 0 and 1, for taps 1 and 2. So along each axis t counts the taps or the outputs,
# whichever are fewer, and rest is a slice of the others.

def _inside(first, step, count, n):
    """Which of the positions first, first + step, ..., count of them, lie on an axis of n pixels:
    as a slice of these positions, and as a slice of the pixels. For tap 0 above, _inside(-1, 1, 3,
    3), these are 1:3, the outputs, and 0:2, the pixels."""
    low = max(-(first // step), 0)                      # from here positions are 0 or more
    high = min((n - 1 - first) // step + 1, count)      # from here n or more, or there are no more
    high = max(high, low)                               # there may be none between
    return slice(low, high), slice(first + low * step, first + high * step, step)


def _reads(u, x, block, win):
    """What a block reads of its images x (C, images, *size). Returns u (C, *kernel, images, *out)
    with its axes in another order, for two axes of pixels (C, images, t1, rest1, t2, rest2). And
    for each axis of pixels a list of (t, rest, pixels), in which rest and pixels are slices."""
    rank = x.ndim - 2
    order = [0, 1 + rank]
    reads = []
    for a, n in enumerate(x.shape[2:]):
        outputs = block[1 + a]
        # the pixel that tap 0 reads for the first output of the block
        first = outputs.start * win.stride[a] - win.before[a]
        # each with its number, the step from one to the next, and its axis of u
        taps = (win.kernel[a], win.dilation[a], 1 + a)
        stops = (outputs.stop - outputs.start, win.stride[a], 2 + rank + a)
        fewer, others = (taps, stops) if taps[0] <= stops[0] else (stops, taps)
        count_t, step_t, axis_t = fewer
        count_rest, step_rest, axis_rest = others
        order += [axis_t, axis_rest]
        reads.append([(t, *_inside(first + t * step_t, step_rest, count_rest, n))
                      for t in range(count_t)])
    return u.transpose(*order), reads


def _views(u, x, reads):
    """Pairs of views of the same shape: of a part of u, and of the pixels of x that this part has
    copies of: for two axes, u[:, :, t1, rest1, t2, rest2] and x[:, :, pixels1, pixels2]."""
    for one_of_each in itertools.product(*reads):
        places = [place for t, rest, _ in one_of_each for place in (t, rest)]
        pixels = [some for _, _, some in one_of_each]
        yield u[:, :, *places], x[:, :, *pixels]


def _shape_of_u(x, block, win):
    """(C, *kernel, images, *out), for the images of a block x (C, images, *size)."""
    _, *out = block
    return (len(x), *win.kernel, x.shape[1], *(o.stop - o.start for o in out))


def _unfold(x, y, win, groups):
    """Yields each block of the output y and its columns of u, (G, rows, columns). Where an output
    reads its own pixel alone, u is x. Else all blocks share the memory of the first, which is the
    largest, so each must be used before the next is made: new memory took up to three times as
    long as all the rest."""
    if _reads_own_pixel(win, x.shape[2:]):
        for block in _blocks(x, y, win):
            yield block, _columns(x, block, groups)
        return
    memory = None
    written = None
    for block in _blocks(x, y, win):
        images = x[block[0]].swapaxes(0, 1)             # (C, images, *size)
        shape = _shape_of_u(images, block, win)
        if memory is None:
            memory = array_module(x).empty(math.prod(shape), x.dtype)
        u = memory[:math.prod(shape)].reshape(shape)
        by_axis, reads = _reads(u, images, block, win)
        # Outside of the image u is 0. If the block before wrote to the same places, it still is.
        places = (shape, [rest for along in reads for _, rest, _ in along])
        if places != written:
            u[...] = 0
            written = places
        for part, pixels in _views(by_axis, images, reads):
            part[...] = pixels
        rows = x.shape[1] // groups * math.prod(win.kernel)
        columns = math.prod(shape[1 + len(win.kernel):])            # images and outputs
        yield block, u.reshape(groups, rows, columns)


def _fold(du, dx, block, win):
    """Add the columns of a block to the pixels of dx that _unfold reads them from."""
    dx = dx[block[0]].swapaxes(0, 1)                    # a view, so dx changes
    du = du.reshape(_shape_of_u(dx, block, win))
    by_axis, reads = _reads(du, dx, block, win)
    for part, pixels in _views(by_axis, dx, reads):
        pixels += part


def _transpose_window(x, w, stride, padding, output_padding, dilation):
    """The window of a transposed convolution, which has a stop for each pixel of x; and the size
    of y."""
    size = x.shape[2:]
    kernel = w.shape[2:]
    _need(all(e < max(s, d) for e, s, d in zip(output_padding, stride, dilation)),
          "output_padding must be smaller than stride or dilation", output_padding)
    before = []
    y_size = []
    for axis, (n, taps, s, d) in enumerate(zip(size, kernel, stride, dilation)):
        painted = (n - 1) * s + (taps - 1) * d + 1 + output_padding[axis]
        if padding == "same":
            kept = n * s
            before.append(max(painted - kept, 0) // 2)  # half of what is cut off
        else:
            kept = painted - sum(padding[axis])
            before.append(padding[axis][0])
        y_size.append(kept)
    _need_output(size, kernel, padding, y_size)
    return _Window(kernel, stride, dilation, tuple(before), size), tuple(y_size)


def _matrices(w, groups):
    """Weights (F, C/G, *kernel) as a stack of matrices, (G, F/G, rows of u): a view, if w is
    contiguous. .swapaxes(1, 2) transposes them."""
    return w.reshape(groups, len(w) // groups, math.prod(w.shape[1:]))


def _product(a, b):
    """a @ b for stacks of matrices; a column times a row is broadcast, which is faster."""
    return a * b if a.shape[-1] == 1 else a @ b


def _add_product(total, a, b):
    """total += a @ b, some rows at a time, so that a large total is not held twice."""
    rows = max(2 * _BLOCK // max(len(total) * total.shape[2], 1), 1)
    for i in range(0, total.shape[1], rows):
        total[:, i:i + rows] += _product(a[:, i:i + rows], b)


# The first shortcut: in a 1x1 convolution with a stride of 1 and without padding u is x, in
# another order. Unless images are small, _pointwise does without blocks. With blocks nine shapes
# took 9 % longer in the mean, and one 30 %, gradients included (2026-12-01).

def _reads_own_pixel(win, size):
    """Whether each output pixel reads the one input pixel at its own position."""
    return set(win.kernel + win.stride) == {1} and not any(win.before) and win.out == size


def _is_pointwise(x, w, win):
    """Whether y = w @ x goes image by image. Each output must read its own pixel; an image must
    have 64 or more of them; and w, which is read again for each image, must not be larger than
    the image and its output."""
    pixels = math.prod(win.out)
    return _reads_own_pixel(win, x.shape[2:]) and pixels >= 64 and (
        w.size <= (x.shape[1] + len(w)) * pixels)


def _pointwise(x, w, groups):
    """y = w @ x, image by image."""
    N, C, *size = x.shape
    u = x.reshape(N, groups, C // groups, math.prod(size))
    return _product(_matrices(w, groups), u).reshape(N, len(w), *size)


# The second: at a stride of 1, dx is a convolution of dy with the mirrored kernel. In section 3,
# w = [-1 1], dy = [1 10 100] and dx = [-1 -9 -90 100]. That dx is also the convolution of
# [0 1 10 100 0] with [1 -1]. By fold fourteen shapes took 8 % longer in the mean, and one with a
# filter for each channel 56 %, all gradients included (2026-12-01).

def _is_mirroring_faster(dy, w, win, size, groups):
    """Whether dx is found faster as that convolution."""
    F = dy.shape[1]
    C = w.shape[1] * groups
    outputs = math.prod(win.out)
    # the copy of w must not have more numbers than du, F/G * C * taps against C * taps * N * out,
    # nor take more than 16 MiB; for all beside inputs and outputs the limit of this file is 32
    if set(win.stride) != {1} or F // groups > len(dy) * outputs or w.nbytes > 2 ** 24:
        return False
    if _reads_own_pixel(win, size):                     # its u is dy
        return True
    # Else its u has F * size numbers for each tap, where du has C * out. To fill in a number of u
    # takes half as long as to add a number of du to dx.
    faster = F * math.prod(size) < 2 * C * outputs
    # Mirrored, all of w meets the zeros around dy (own pixels have none), and infinity * 0 is NaN.
    # So w must be finite. To ask a GPU would be a wait, so there the answer is no.
    return faster and array_module(w) is np and np.isfinite(w).all()


def _mirrored(w, win, size, groups):
    """The weights and the window of the convolution from dy to dx at a stride of 1.

    dx[n, c, i] = sum_{f, k} w[f, c, k] * dy[n, f, i - k*dilation + before]

    Put kernel-1-k in place of k: this is a convolution of dy, with the kernel mirrored, with C and
    F exchanged, and with (kernel-1) * dilation - before zeros in front, or so many pixels skipped
    if that is negative.
    """
    F, channels = w.shape[:2]                           # channels of a group
    mirrored = array_module(w).flip(w, tuple(range(2, w.ndim)))
    mirrored = mirrored.reshape(groups, F // groups, channels, *win.kernel)
    mirrored = array_module(w).ascontiguousarray(mirrored.swapaxes(1, 2))   # (G, C/G, F/G, ...)
    before = tuple((k - 1) * d - p for k, d, p in zip(win.kernel, win.dilation, win.before))
    window = win._replace(before=before, out=tuple(size))
    return mirrored.reshape(channels * groups, F // groups, *win.kernel), window


def _where(mask, a):
    """a where mask holds, else 0."""
    # The bits of a, as integers, times 1 or 0: up to ten times as fast as where(mask, a, 0). And
    # a * mask would be NaN for an infinity.
    bits = a.view(f"i{a.itemsize}")
    return (bits * mask).view(a.dtype)


def _image_sum(x, pixels=False):
    """The sum of x (N, ...) over the images, and over the pixels first if that is asked for. To
    keep float32 accurate, images are summed 256 at a time, and these sums are added up in float64;
    along the pixels, a contiguous axis, NumPy sums pairwise."""
    sums = []
    for n in range(0, max(len(x), 1), 256):
        part = x[n:n + 256]
        sums.append((_pixels(part).sum(axis=2) if pixels else part).sum(axis=0))
    if len(sums) == 1:
        return sums[0]
    return array_module(x).stack(sums).sum(axis=0, dtype=np.float64).astype(x.dtype)


def _channel_sum(x):
    """The sum of x (N, C, ...) over all axes but the channels, (C,)."""
    return _image_sum(x, pixels=x.ndim > 2)


# 7 THE OTHER PIECES ------------------------------------------------------------------------------
#
# The layers and losses that the paper's networks, or yours, need besides.

@_checked(x="N C", w="F C", b="F?")
def linear(x, w, b=None):
    """A dense layer: y[n, f] = b[f] + sum_c x[n, c] * w[f, c]."""
    return _add_bias(x @ w.T, b)


@_checked(dy="N F", x="N C", w="F C", b="F?")
def linear_backward(dy, x, w, b=None):
    """dx = dy @ w, dw = dy.T @ x, db[f] = sum_n dy[n, f]."""
    return dy @ w, dy.T @ x, None if b is None else _channel_sum(dy)


def _pool_window(x, kernel, stride, padding):
    """The window of a pool; None without a kernel, where the whole image is pooled."""
    size = x.shape[2:]
    _need(math.prod(size), "x must have pixels", x.shape)
    if kernel is None:
        _need(stride is None and padding == ((0, 0),) * len(size),
              "stride and padding must be left out without a kernel", stride, padding)
        return None
    # a window of nothing but padding has no largest pixel
    if padding != "same" and any(max(pair) >= k for pair, k in zip(padding, kernel)):
        raise _Refused(f"padding must be smaller than the kernel {_shown(kernel)}, got "
                       f"{_shown(padding)}")
    return _window(size, kernel, stride or kernel, padding, (1,) * len(size))


def _pooled_shape(x, win):
    """(N, C, *out), or (N, C) for the whole image."""
    return (*x.shape[:2], *(win.out if win else ()))


# The largest pixel of a window is the largest among the largest of its rows, and so it is with
# sums. So a pool goes along one axis after the other, the last one first, and a window of 7x7
# takes 7 + 7 taps.

def _pool_taps(x, y, axis, win):
    """For each tap of a pool along a spatial axis of x (N, C, *size): the pixels that it reads,
    and the outputs for which it does, as views of x and of y. In place of x and y may stand
    gradients of their shapes."""
    axes_before = (slice(None),) * (2 + axis)
    n = x.shape[2 + axis]
    stride = win.stride[axis]
    before = win.before[axis]
    count = win.out[axis]
    # Tap k reads o*stride + k - before. Taps below low read in front of the image for every
    # output, and those from high on behind it.
    low = max(before - (count - 1) * stride, 0)
    high = min(before + n, win.kernel[axis])
    for k in range(low, high):
        outputs, pixels = _inside(k - before, stride, count, n)
        yield x[*axes_before, pixels], y[*axes_before, outputs]


def _pool_steps(x, win, combine, start):
    """Pool x (N, C, *size) with combine, maximum or add. Returns a list with a pair for each axis,
    the last axis first: what is pooled along it, and the result."""
    steps = []
    for axis in reversed(range(len(win.out))):
        y = array_module(x).full((*x.shape[:2 + axis], *win.out[axis:]), start, x.dtype)
        for read, outputs in _pool_taps(x, y, axis, win):
            combine(outputs, read, out=outputs)
        steps.append((x, y))
        x = y
    return steps


@_checked(x="N C *size")
def max_pool(x, *, kernel=None, stride=None, padding=0):
    """The largest pixel in each window, y (N, C, *out), or in the whole image, y (N, C).

    y[n, c, o] = max_k x[n, c, o*stride + k - before]

    kernel : an integer, one per axis, or None for the whole image
    stride : as in conv; None means kernel
    padding : as in conv, smaller than the kernel; padded pixels never win

    Of a window with a NaN the maximum is NaN.
    """
    win = _pool_window(x, kernel, stride, padding)
    if win is None:
        return _pixels(x).max(axis=2)
    _, y = _pool_steps(x, win, array_module(x).maximum, -math.inf)[-1]
    return y


@_checked(dy="N C ...", x="N C *size")
def max_pool_backward(dy, x, *, kernel=None, stride=None, padding=0):
    """dx of max_pool: each window passes its dy to the first of its largest pixels, in the order
    of rows."""
    xp = array_module(x)
    win = _pool_window(x, kernel, stride, padding)
    _need_shape(dy, _pooled_shape(x, win))
    if win is None:
        dx = xp.zeros(_pixels(x).shape, x.dtype)
        xp.put_along_axis(dx, _pixels(x).argmax(axis=2)[:, :, None], dy[:, :, None], axis=2)
        return dx.reshape(x.shape)
    steps = _pool_steps(x, win, xp.maximum, -math.inf)
    for axis, (pixels, y) in enumerate(reversed(steps)):                # the last step first
        dx = xp.zeros(pixels.shape, x.dtype)
        left = dy.copy()                                # what no pixel has won so far
        for (read, largest), (dread, unwon) in zip(
                _pool_taps(pixels, y, axis, win), _pool_taps(dx, left, axis, win)):
            wins = (read == largest) | xp.isnan(read)   # NaN equals nothing
            dread += _where(wins, unwon)
            unwon[...] = _where(~wins, unwon)           # a part of left: no later pixel gets it
        dy = dx
    return dy


@_checked(x="N C *size")
def mean_pool(x, *, kernel=None, stride=None, padding=0):
    """The mean of each window, padded zeros included, or of the whole image; options as max_pool.
    """
    win = _pool_window(x, kernel, stride, padding)
    if win is None:
        return _pixels(x).sum(axis=2) / math.prod(x.shape[2:])
    _, total = _pool_steps(x, win, array_module(x).add, 0)[-1]
    return total / math.prod(win.kernel)


@_checked(dy="N C ...", x="N C *size")
def mean_pool_backward(dy, x, *, kernel=None, stride=None, padding=0):
    """dx of mean_pool: each window shares its dy out evenly."""
    xp = array_module(x)
    win = _pool_window(x, kernel, stride, padding)
    _need_shape(dy, _pooled_shape(x, win))
    if win is None:
        return xp.broadcast_to(_over(dy / math.prod(x.shape[2:]), x), x.shape).copy()
    dy = dy / math.prod(win.kernel)
    for axis in range(len(win.out)):
        dx = xp.zeros((*x.shape[:3 + axis], *dy.shape[3 + axis:]), x.dtype)
        for dread, doutputs in _pool_taps(dx, dy, axis, win):
            dread += doutputs
        dy = dx
    return dy


def _statistics(x):
    """The mean and the (biased) variance of each channel, and x without its mean."""
    count = x.size // x.shape[1]
    mean = _channel_sum(x) / count
    mean = mean + _channel_sum(x - _over(mean, x)) / count          # what rounding has left out
    centred = x - _over(mean, x)
    return mean, _channel_sum(centred * centred) / count, centred


def _normalised(x, mean, var, eps):
    """(x - mean) / sqrt(var + eps), and 1 / sqrt(var + eps)."""
    _need_both(mean, var)
    if mean is None:
        _need(x.size, "x must not be empty", x.shape)
        _, var, xhat = _statistics(x)
    else:
        xhat = x - _over(mean, x)
    rstd = 1 / array_module(x).sqrt(var + eps)
    xhat *= _over(rstd, x)
    return xhat, rstd


@_checked(x="N C ...", scale="C", shift="C", mean="C?", var="C?")
def batch_norm(x, scale, shift, *, mean=None, var=None, eps=1e-5):
    """Batch normalisation: y = scale * (x - mean) / sqrt(var + eps) + shift, per channel.

    mean, var : (C,) arrays to normalise by, as after training; or None for the mean and the
        (biased) variance of this batch, as in training: then the gradient runs through them

    PyTorch keeps unbiased variances for later, train keeps biased ones.
    """
    xhat, _ = _normalised(x, mean, var, eps)
    return affine(xhat, scale, shift)


@_checked(dy="N C ...", x="N C ...", scale="C", shift="C", mean="C?", var="C?")
def batch_norm_backward(dy, x, scale, shift, *, mean=None, var=None, eps=1e-5):
    """With xhat = (x - mean) / sqrt(var + eps) and E[...] for the mean over a channel:

    dscale = sum dy * xhat, dshift = sum dy
    dx = scale / sqrt(var + eps) * dy                                   for a given mean and var
    dx = scale / sqrt(var + eps) * (dy - E[dy] - xhat * E[dy * xhat])   for those of the batch

    With those of the batch, y stays as it is when a constant is added to x, or (but for eps) a
    multiple of xhat. So the loss has no slope along either: both parts are taken out of dy.
    """
    xhat, rstd = _normalised(x, mean, var, eps)
    dscale = _channel_sum(dy * xhat)
    dshift = _channel_sum(dy)
    if mean is None:
        count = x.size // x.shape[1]
        dy = dy - (_over(dshift, x) + xhat * _over(dscale, x)) / count
    return dy * _over(scale * rstd, x), dscale, dshift


def _log_softmax(z):
    """log softmax of z (N, classes), accurate also where the softmax is almost 1.

    log softmax(z) = z - log sum_j exp(z[j]), and a constant may be added to all z. Here the
    largest becomes 0, and its term in the sum 1. The sum of the others may be so small that
    rounding would lose it beside that 1, so log1p adds it.
    """
    xp = array_module(z)
    of_largest = (xp.arange(len(z)), z.argmax(axis=1))
    z = z - z.max(axis=1, keepdims=True)
    others = xp.exp(z)
    others[of_largest] = 0
    return z - xp.log1p(others.sum(axis=1, keepdims=True))


@_checked(x="N C ...")
def softmax(x):
    """Softmax over all axes but the first: y[n, i] = exp(x[n, i]) / sum_j exp(x[n, j])."""
    return array_module(x).exp(_log_softmax(_flat(x))).reshape(x.shape)


@_checked(dy="N C ...", x="N C ...")
def softmax_backward(dy, x):
    """dx[n, i] = y[n, i] * (dy[n, i] - sum_j dy[n, j] * y[n, j])."""
    y = array_module(x).exp(_log_softmax(_flat(x)))
    dy = _flat(dy)
    return (y * (dy - (dy * y).sum(axis=1, keepdims=True))).reshape(x.shape)


# A loss is a single number, the mean over the batch or over all elements; so its dy is a number
# too. A loss has two arguments that it may be differentiated by, the network's output and the
# target, and its gradient returns both, by the rule of all gradients here.

def _times(factor, a):
    """factor * a, or 0 where the factor is 0, whatever a is there: 0 * log 0 counts as 0."""
    return factor * array_module(a).where(factor != 0, a, a.dtype.type(0))


@_checked(logits="N C ...", target="N C ...")
def softmax_cross_entropy(logits, target):
    """The mean over the batch of -sum_i target[n, i] * log softmax(logits)[n, i].

    Every axis but the first counts as classes: for (N, 1, *size) the pixels are the classes. For
    integer labels, target = numpy.eye(classes, dtype=logits.dtype)[labels].
    """
    _need_examples(logits)
    return -_times(_flat(target), _log_softmax(_flat(logits))).sum(axis=1).mean()


@_checked(logits="N C ...", target="N C ...")
def softmax_cross_entropy_backward(dy, logits, target):
    """With p = softmax(logits):
    dlogits[n, i] = dy / N * (p[n, i] * sum_j target[n, j] - target[n, i])
    dtarget[n, i] = -dy / N * log p[n, i]

    With others for the sum of the other targets the bracket is p * (others + target) - target. It
    is computed as p * others - (1 - p) * target, which is accurate also where p is almost 1.
    """
    _need_examples(logits)
    xp = array_module(logits)
    share = _loss_dy(dy) / len(logits)
    t = _flat(target)
    others = t.sum(axis=1, keepdims=True) - t
    log_p = _log_softmax(_flat(logits))
    p = xp.exp(log_p)
    q = -xp.expm1(log_p)                                # 1 - p, which might round to 0
    dlogits = _times(others, p) - _times(t, q)          # if all logits are -inf, p and q are NaN
    return (dlogits * share).reshape(logits.shape), (log_p * -share).reshape(logits.shape)


def _softplus(z):
    """log(1 + exp(z)) without overflow. softplus(-z) = -log sigmoid(z), and
    softplus(z) = -log(1 - sigmoid(z))."""
    xp = array_module(z)
    return xp.maximum(z, 0) + xp.log1p(xp.exp(-abs(z)))


@_checked(logits="...", target="...")
def sigmoid_cross_entropy(logits, target):
    """The mean over all elements of -target * log p - (1 - target) * log(1 - p), where
    p = sigmoid(logits) = 1 / (1 + exp(-logits))."""
    _need_examples(logits)
    of_p = _times(target, _softplus(-logits))           # -log p is softplus(-logits)
    of_q = _times(1 - target, _softplus(logits))        # and -log(1 - p) is softplus(logits)
    return (of_p + of_q).mean()


@_checked(logits="...", target="...")
def sigmoid_cross_entropy_backward(dy, logits, target):
    """dlogits = dy / size * (sigmoid(logits) - target), dtarget = -dy / size * logits."""
    _need_examples(logits)
    xp = array_module(logits)
    share = _loss_dy(dy) / logits.size
    p = xp.exp(-_softplus(-logits))
    q = xp.exp(-_softplus(logits))                      # 1 - p, which might round to 0
    return ((1 - target) * p - target * q) * share, logits * -share


@_checked(y="...", target="...")
def mean_squared_error(y, target):
    """The mean over all elements of (y - target)^2."""
    _need_examples(y)
    return ((y - target) ** 2).mean()


@_checked(y="...", target="...")
def mean_squared_error_backward(dy, y, target):
    """The gradient of y is 2 * dy / size * (y - target), and dtarget is minus that."""
    _need_examples(y)
    slope = (y - target) * (2 * _loss_dy(dy) / y.size)
    return slope, -slope


# 8 THE PAPER'S COORDCONV NETWORKS ----------------------------------------------------------------
#
# Each coordconv_ function returns a network, a list of Layers. rng is a numpy.random.Generator,
# which moves on, or a seed for one, or None. Weights are drawn on the host, so that a CPU and a
# GPU start from the same bits. The paper's networks without coordinates are in the repository's
# bench.py.

@_checked()
def he_normal(shape, *, rng=None, dtype=np.float32, xp=np):
    """Weights from a normal distribution cut off at two sigma, with variance 2 / fan_in.

    fan_in = prod(shape[1:]), the number of inputs of one filter. The cut shrinks the standard
    deviation to 0.8796 of what it was, which is made up for, as in TensorFlow.
    """
    w = rng.standard_normal(shape)
    outside = abs(w) > 2
    while outside.any():
        w[outside] = rng.standard_normal(int(outside.sum()))
        outside = abs(w) > 2
    w *= math.sqrt(2 / math.prod(shape[1:])) / 0.87962566103423978
    return xp.asarray(w.astype(dtype))


def _conv_layer(C, F, kernel, *, op=conv, rng, dtype, xp, **options):
    """A convolution with He weights and zero biases."""
    w = he_normal((F, C, *kernel), rng=rng, dtype=dtype, xp=xp)
    return Layer(op, [w, xp.zeros(F, dtype)], options)


@_checked()
def coordconv_painter(*, start="he", size=(64, 64), width=1, rng=None, dtype=np.float32, xp=np):
    """The paper's CoordConv network from a position (N, len(size), 1, ...) to the logits of a
    pixel map (N, 1, *size).

    The position repeated over the grid, coordinate channels, and five 1x1 convolutions with 32,
    32, 64, 64 and 1 filters and rectifiers between them: 7,553 parameters.

    start : "he", the paper's, or "relative", which is coordref's own. In a relative start the
        first layer's weights for the position that comes in are from U(-1, 1), those for the
        coordinate channels are their negatives, and its biases are from U(-0.5, 0.5). So before
        training, what is drawn at a pixel depends only on that position less the pixel's, on the
        unit scale: for another position the same image comes out, moved. The weights of the last
        layer, which no rectifier follows, have the variance 1 / fan_in.
    width : multiplies the filters of the hidden layers
    """
    K = len(size)
    pixel = (1,) * K
    filters = [32 * width, 32 * width, 64 * width, 64 * width, 1]
    layer = functools.partial(_conv_layer, kernel=pixel, rng=rng, dtype=dtype, xp=xp)
    net = [layer(2 * K, filters[0], op=coord_conv, size=size)]
    for C, F in itertools.pairwise(filters):
        net += [Layer(relu), layer(C, F)]
    if start == "relative":
        w = rng.uniform(-1, 1, (filters[0], K, *pixel))
        b = rng.uniform(-0.5, 0.5, filters[0])
        net[0].params[0] = xp.asarray(np.concatenate([w, -w], axis=1).astype(dtype))
        net[0].params[1] = xp.asarray(b.astype(dtype))
        net[-1].params[0] *= math.sqrt(0.5)
    return net


@_checked()
def coordconv_renderer(*, start="he", size=(64, 64), kernel=3, width=1, rng=None, dtype=np.float32,
                       xp=np):
    """The paper's CoordConv network from a position (N, len(size), 1, ...) to the logits of a
    square (N, 1, *size).

    coordconv_painter, a softmax over the pixels, then five convolutions with 8, 8, 16, 16 and 1
    filters and rectifiers between them. width multiplies these filters, not the painter's. 11,850
    parameters by default.
    """
    net = coordconv_painter(start=start, size=size, rng=rng, dtype=dtype, xp=xp)
    layer = functools.partial(_conv_layer, kernel=(kernel,) * len(size), padding="same", rng=rng,
                              dtype=dtype, xp=xp)
    filters = [8 * width, 8 * width, 16 * width, 16 * width, 1]
    net += [Layer(softmax), layer(1, filters[0])]
    for C, F in itertools.pairwise(filters):
        net += [Layer(relu), layer(C, F)]
    return net


@_checked()
def coordconv_regressor(*, size=(64, 64), rng=None, dtype=np.float32, xp=np):
    """The paper's CoordConv network from a one-hot image (N, 1, *size) to its position
    (N, len(size)); 906 parameters for two axes. They depend on the number of axes in size alone.

    A CoordConv of 1x1, convolutions of 1x1, 1x1 and 3x3, 8 filters each, one of 3x3 with a filter
    for each axis, and the maximum over the image. There is no rectifier, as in the paper's code:
    the network is linear up to its maximum.
    """
    K = len(size)
    pixel = (1,) * K
    square = (3,) * K
    layer = functools.partial(_conv_layer, rng=rng, dtype=dtype, xp=xp)
    return [layer(1 + K, 8, pixel, op=coord_conv), layer(8, 8, pixel), layer(8, 8, pixel),
            layer(8, 8, square, padding="same"), layer(8, K, square, padding="same"),
            Layer(max_pool)]


# 9 DATA AND TRAINING -----------------------------------------------------------------------------
#
# In this order: the paper's data, Adam, the State of a training, train and its parts, scores of
# outputs, and evaluate.

class Examples(collections.namedtuple("Examples", "x target coords")):
    """M examples, each an array with M entries.

    x : what a network gets
    target : what it should give
    coords : the positions that both were made from, (M, 2), integers in a NumPy array
    """


@_checked()
def not_so_clevr(split="uniform", task="classification", *, canvas=64, square=9, scale="unit",
                 dtype=np.float32, xp=np):
    """The paper's data set: a square at every position where all of it is visible. Returns the
    Examples to train on and those to test on. The paper's canvas of 64 and square of 9 give 3136.

    split : "uniform" tests about a quarter of the positions, as the paper's repository drew: 2368
        train and 768 test (the paper says 80/20). "quadrant" tests the positions beyond the
        middle of both axes, row > canvas/2 and col > canvas/2: 2407 train and 729 test.
    task : "classification": from a position (M, 2, 1, 1) to the image of its pixel
        (M, 1, canvas, canvas); "rendering": to the square around it, of ones (in the paper's
        code 128/255); "regression": from the image of a pixel to its position (M, 2)
    scale : of positions. "unit": from -1 to 1 where a network gets them; divided by canvas, from 0
        to below 1, where it should give them (regression). "pixel": in pixels. The paper's code
        has "pixel", but "unit" for regression.

    >>> data, test = not_so_clevr("quadrant")
    >>> data.x.shape, test.target.shape
    ((2407, 2, 1, 1), (729, 1, 64, 64))
    """
    _need(square < canvas, f"canvas must be larger than square={square}", canvas)
    half = square // 2
    # the paper's order, in which its split was drawn: the row varies fastest
    col, row = (i.ravel() for i in np.mgrid[half:canvas - half, half:canvas - half])
    if split == "uniform":
        test = np.random.RandomState(20202).random_sample(len(row)) < 0.25
    else:
        test = (2 * row > canvas) & (2 * col > canvas)
    _need(test.any() and not test.all(), f"canvas must leave a square of {square} positions to "
          "train and to test", canvas)

    def examples(coords):
        reach = half if task == "rendering" else 0
        near = abs(np.arange(canvas) - coords[:, :, None]) <= reach         # (M, 2, canvas)
        rows = near[:, :1, :, None]                     # (M, 1, canvas, 1)
        cols = near[:, 1:, None, :]                     # (M, 1, 1, canvas)
        image = (rows & cols).astype(dtype)             # (M, 1, canvas, canvas)
        if task == "regression":
            x = image
            target = coords / (canvas if scale == "unit" else 1)
        else:
            x = axis_coords(canvas, scale=scale, dtype=np.float64)[coords][:, :, None, None]
            target = image
        return Examples(xp.asarray(x.astype(dtype)), xp.asarray(target.astype(dtype)), coords)

    coords = np.stack([row, col], axis=1)
    return examples(coords[~test]), examples(coords[test])


@_checked(w="...", dw="...", m="...", v="...")
def adam_step(w, dw, m, v, step, *, learning_rate=0.005, beta1=0.9, beta2=0.99, eps=1e-8):
    """One step of Adam (Kingma and Ba, algorithm 1), elementwise; returns the new w, m and v.

    m' = beta1 * m + (1 - beta1) * dw
    v' = beta2 * v + (1 - beta2) * dw^2
    w' = w - learning_rate * (m' / (1 - beta1^step)) / (sqrt(v' / (1 - beta2^step)) + eps)

    step counts from 1, where the moments m and v are zeros. beta2 is 0.99 as in Liu et al.,
    elsewhere 0.999.
    """
    _need(not callable(learning_rate), "learning_rate must be a number (train takes functions)",
          learning_rate, kind=TypeError)
    m = beta1 * m + (1 - beta1) * dw
    v = beta2 * v + (1 - beta2) * dw * dw
    root = array_module(w).sqrt(v / (1 - beta2 ** step))
    return w - learning_rate / (1 - beta1 ** step) * m / (root + eps), m, v


class State(collections.namedtuple("State", "net m v step seed loss")):
    """All that train needs to go on. A State that was saved and loaded gives the same results, to
    the last bit, if train gets the same arguments (workers and comm may differ).

    net : list of Layer
    m, v : Adam's moments, a list with an array for each parameter
    step : the steps done
    seed : in epoch e the order of the M examples is default_rng([seed, e]).permutation(M)
    loss : of the last batch, with what l2 adds; NaN before the first
    """


def _params(net):
    """The parameters of a network in the order of its layers."""
    return [p for layer in net for p in layer.params if p is not None]


@_checked()
def initial_state(net, *, seed=0):
    """The State of a training that has not begun. seed is an integer."""
    xp = _params_module(net)
    m = [xp.zeros_like(p) for p in _params(net)]
    v = [xp.zeros_like(p) for p in _params(net)]
    return State(net, m, v, step=0, seed=seed, loss=math.nan)


@_checked()
def train(state, x, target, *, loss=softmax_cross_entropy, steps, batch_size=16,
          learning_rate=0.005, l2=0.0, beta1=0.9, beta2=0.99, eps=1e-8, workers=1, comm=None):
    """Train a network with Adam. Returns an iterator over the States after the steps state.step +
    1, state.step + 2, ..., steps, counted from the beginning of the training. A step takes
    batch_size examples, the last step of an epoch those that are left. Each epoch has a random
    order of its own.

    x, target : arrays with an entry for each example along their first axis
    loss : a function of the network's output and the target, a mean over the examples:
        softmax_cross_entropy, sigmoid_cross_entropy, mean_squared_error, or one of yours, with its
        gradient beside it
    l2 : l2 * sum(w^2) is added to the loss, over all weights with more than one axis
    learning_rate : a number, or a function of the number of steps done, such as
        lambda step: 0.01 * (1 - step / 60)
    beta1, beta2, eps : as in adam_step
    workers : threads that share the work; OPENBLAS_NUM_THREADS=1 keeps BLAS from using more
    comm : processes that share the work, as mpi4py's COMM_WORLD: rank, size and allgather. All
        must begin with the same State, else ValueError

    A batch goes through the network in shards of a sixteenth, rounded down, but of at least four
    examples (64 on a GPU): 18 examples as 4, 4, 4, 4 and 2. The gradients of the shards are always
    added in the same order. So the States do not depend, to the last bit, on the number of workers
    or processes, nor on whether training was interrupted and resumed from a saved State.

    A network with batch_norm takes a batch whole, so workers do not help; a mean and a variance
    that its layer is given become 0.9 of the old plus 0.1 of the batch's.

    Raises FloatingPointError once the loss or a weight is no longer finite.

    >>> data, _ = not_so_clevr()
    >>> state = initial_state(coordconv_painter(start="relative", rng=0))
    >>> [state.step for state in train(state, data.x, data.target, steps=2)]
    [1, 2]
    """
    xp = _examples_module(state.net, x, target)
    _gradient(loss)                                     # TypeError if it has none
    adam = functools.partial(adam_step, beta1=beta1, beta2=beta2, eps=eps)
    norms = [layer.options for layer in state.net if layer.op is batch_norm]
    for options in norms:
        _need_both(options.get("mean"), options.get("var"))
    steps_per_epoch = math.ceil(len(x) / batch_size)

    # a generator of its own, so that the checks above run when train is called
    def states(state):
        first = state.step
        with _team(workers, comm, xp) as run:
            _need_same_state(state, comm)
            for step in range(first, steps):
                epoch, at = divmod(step, steps_per_epoch)
                if at == 0 or step == first:
                    order = np.random.default_rng([state.seed, epoch]).permutation(len(x))
                batch = xp.asarray(order[at * batch_size:(at + 1) * batch_size])
                size = len(batch) if norms else max(_shard(xp), len(batch) // 16)
                work = functools.partial(
                    _shard_gradients, state.net, loss, x, target, len(batch))
                rate = learning_rate(step) if callable(learning_rate) else learning_rate
                with np.errstate(under="ignore"):       # as in _checked, which has returned by now
                    by_shard = run(work, _cut(batch, size))         # a list of arrays for each
                    sums = [_as_array(sum(arrays)) for arrays in zip(*by_shard)]
                    state = _next_state(state, sums, adam, rate, l2)
                yield state

    _keep_freed_memory()
    return states(state)


def _keep_freed_memory():
    """Almost 32 MiB, allocated and freed at once: from then on glibc keeps freed memory up to this
    size. To return it to the system would take a fifth of the time of a step."""
    np.empty(2 ** 25 - 2 ** 16, np.uint8)


def _shard_gradients(net, loss, x, target, count, index):
    """What one shard, the examples at index, adds to a batch of count examples: a list of the
    loss, the gradient of each parameter, and the mean and the variance of what each batch_norm
    gets."""
    # in training a batch_norm takes the statistics of its batch, even if it keeps some
    net = [layer._replace(options=layer.options | {"mean": None, "var": None})
           if layer.op is batch_norm else layer for layer in net]
    target = target[index]
    # means over shards, times their shares, add up to the mean over the batch
    share = len(index) / count
    y, inputs = forward(net, x[index])
    value = array_module(y).asarray(loss(y, target) * share)
    dy, _ = _gradient(loss)(share, y, target)           # share is the upstream gradient
    _, by_layer = backward(net, dy, inputs)
    grads = [dp for layer in by_layer for dp in layer if dp is not None]
    # of the whole batch, since with a batch_norm there is one shard
    statistics = [a for layer, given in zip(net, inputs) if layer.op is batch_norm
                  for a in _statistics(given)[:2]]
    return [value, *grads, *statistics]


def _next_state(state, sums, adam, learning_rate, l2):
    """The State after one more step of train; sums are of what _shard_gradients lists."""
    params = _params(state.net)
    value = sums[0]
    grads = sums[1:1 + len(params)]
    statistics = iter(sums[1 + len(params):])           # a mean and a variance for each batch_norm
    step = state.step + 1
    updates = []
    for p, dp, m, v in zip(params, grads, state.m, state.v):
        if p.ndim > 1:
            value = value + l2 * (p * p).sum()
            dp = dp + 2 * l2 * p
        updates.append(adam(p, dp, m, v, step, learning_rate=learning_rate))
    new_params, m, v = (list(arrays) for arrays in zip(*updates))
    value = float(value)
    xp = array_module(*new_params)
    if not (math.isfinite(value) and xp.stack([xp.isfinite(p).all() for p in new_params]).all()):
        raise FloatingPointError(f"train: step {step} gave a loss of {value} or weights that are "
                                 "not finite; learning_rate may be too large")

    new_params = iter(new_params)
    net = []
    for op, params, options in state.net:
        if op is batch_norm:
            mean = next(statistics)
            var = next(statistics)
            if options.get("mean") is not None:
                options = options | {"mean": 0.9 * options["mean"] + 0.1 * mean,
                                     "var": 0.9 * options["var"] + 0.1 * var}
        net.append(Layer(op, [None if p is None else next(new_params) for p in params], options))
    return State(net, m, v, step, state.seed, value)


def _shard(xp):
    """How many examples go through a network together, at least: few stay in a CPU's cache, and
    many save calls to a GPU, but how many it should get was not measured."""
    return 4 if xp is np else 64


def _cut(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


@contextlib.contextmanager
def _team(workers, comm, xp):
    """Yields run(work, items), which returns [work(item) for item in items], where work returns a
    list of arrays of xp. Threads share the items, and so do the processes of comm; each process
    gets the results of all."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        def run(work, items):
            # process r of comm takes the items r, r + size, r + 2 * size, ...
            mine = items if comm is None else items[comm.rank::comm.size]
            results = list(map(work, mine) if workers == 1 else pool.map(work, mine))
            if comm is None:
                return results
            everyone = comm.allgather([[to_numpy(a) for a in arrays] for arrays in results])
            # item i went to process i % size, as the one with number i // size there
            in_order = [everyone[i % comm.size][i // comm.size] for i in range(len(items))]
            return [[xp.asarray(a) for a in arrays] for arrays in in_order]
        yield run


# Scores of the outputs y against the targets: one number for each example, (N,).

@_checked(y="N ...", target="N ...")
def accuracy(y, target):
    """1 where the largest output is where the largest target is, else 0; NaN is never right."""
    y = _flat(y)
    right = y.argmax(axis=1) == _flat(target).argmax(axis=1)
    right &= ~array_module(y).isnan(y).any(axis=1)
    return right.astype(y.dtype)


@_checked(y="N ...", target="N ...")
def iou(y, target):
    """The intersection over the union of the entries above 0; 1 where neither has any."""
    xp = array_module(y)
    on = _flat(y) > 0
    wanted = _flat(target) > 0
    union = (on | wanted).sum(axis=1)
    shared = (on & wanted).sum(axis=1)
    return xp.where(union > 0, shared / xp.maximum(union, 1), 1).astype(y.dtype)


@_checked(y="N ...", target="N ...")
def distance(y, target):
    """sqrt(sum_i (y[n, i] - target[n, i])^2), in units of the target."""
    error = (_flat(y) - _flat(target)).astype(np.float64)
    return array_module(y).sqrt((error ** 2).sum(axis=1)).astype(y.dtype)


@_checked()
def evaluate(net, x, target, *, score=accuracy, workers=1):
    """The mean over the examples of a score of the network's outputs, a float.

    x, target, workers : as in train
    score : accuracy, iou, distance, or a function of yours of the outputs and the targets of some
        examples, which returns an array with a number for each of them

    A batch_norm without statistics of its own takes those of all the examples.
    """
    xp = _examples_module(net, x, target)
    whole = any(layer.op is batch_norm and layer.options.get("mean") is None for layer in net)

    def part(index):
        wanted = target[index]
        y, _ = forward(net, x[index])
        _need(y.shape == wanted.shape,
              f"the network's output must have the target's shape {wanted.shape}", y.shape)
        found = score(y, wanted)
        _need(getattr(found, "shape", None) == (len(wanted),),
              f"score must return an array of {len(wanted)} numbers, one for each example", found)
        return [found]
    with _team(workers, None, xp) as run:
        scores = run(part, _cut(xp.arange(len(x)), len(x) if whole else _shard(xp)))
    return float(xp.concatenate([found for (found,) in scores]).mean(dtype=np.float64))


# 10 FILES, MODULES AND CHECKS --------------------------------------------------------------------
#
# In this order: save and load, the modules of arrays, errors, the checks that _checked makes, of
# shapes and of options, and then small helpers of the sections before.

def _map_leaves(f, argument, value, name=""):
    """A copy of value, a nest of lists, tuples and dicts, with each leaf (an array, a number or a
    string) replaced by f(name, leaf). Its name is its place, as in .net.0.options['kernel'], and
    argument is what the whole is called in an error."""
    if isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", range(len(value)))
        parts = [_map_leaves(f, argument, v, f"{name}.{i}") for i, v in zip(names, value)]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    if isinstance(value, dict):
        return {k: _map_leaves(f, argument, v, f"{name}[{k!r}]") for k, v in value.items()}
    if value is None or callable(value):
        return value                                    # such as an op: it is not saved
    numbers = _is_array(value) and value.dtype.kind in "biufc"
    numbers |= isinstance(value, (bool, int, float, str, np.bool_, np.integer, np.floating))
    _need(numbers, f"{argument}{name} must be an array of numbers, a number or a string",
          type(value), kind=TypeError)
    return f(name, value)


@_checked()
def save(path, value):
    """Write a network or a State (any nest of lists, tuples and dicts of arrays, numbers and
    strings) to an npz file, whole or not at all: if a save is interrupted, the old file stays.
    Functions, such as the ops of a network, are left out. A process that is killed may leave a
    hidden file .*.part beside it, which may be deleted."""
    leaves = {}

    def leaf(name, a):
        _need(name not in leaves, "value must have one entry of a name", name)
        leaves[name] = a
    _map_leaves(leaf, "value", value)
    _need(leaves, "value must hold arrays or numbers", value, kind=TypeError)
    arrays = {name: to_numpy(a) for name, a in leaves.items() if _is_array(a)}
    others = {name: a.item() if isinstance(a, np.generic) else a
              for name, a in leaves.items() if not _is_array(a)}
    try:
        text = json.dumps(others)
    except (TypeError, ValueError) as error:            # a long double; more than 4300 digits
        raise _Refused(f"value holds a number that cannot be written: {error}") from None
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise _Refused(f"path must be of a file, not {path}")
    part = os.path.join(os.path.dirname(path), f".{os.urandom(4).hex()}.part")
    try:
        with open(part, "wb") as file:
            np.savez(file, json=text, **arrays)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):              # no old file, or no right to set the mode
            os.chmod(part, os.stat(path).st_mode & 0o7777)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


@_checked()
def load(path, like):
    """Read what save wrote: a copy of like, such as a network of the same layers, with the arrays,
    numbers and strings of the file. ValueError if the file is damaged, or its names, shapes or
    dtypes are not those of like; OSError if it cannot be read."""
    with open(path, "rb") as stream:
        try:
            with np.load(stream, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            found |= json.loads(str(found.pop("json")))
        except Exception as error:                      # damage shows as an error of any kind
            kind = type(error).__name__
            raise _Refused(f"{path} is damaged or not from save ({kind})") from error
    names = []

    def leaf(name, a):
        names.append(name)
        if name not in found:
            raise _Refused(f"{path} has nothing for like{name}")
        got = found[name]
        if _is_array(a):
            fits = isinstance(got, np.ndarray) and (got.dtype, got.shape) == (a.dtype, a.shape)
        elif isinstance(a, (float, np.floating)):
            fits = type(got) in (int, float)
        else:
            fits = type(got) is type(np.asarray(a).item())          # bool, int or str
        if not fits:
            raise _Refused(f"like{name} is {_shown(a)}, but in {path} it is {_shown(got)}")
        return array_module(a).asarray(got) if _is_array(a) else type(a)(got)
    value = _map_leaves(leaf, "like", like)
    more = sorted(found.keys() - set(names))
    if more:
        raise _Refused(f"{path} has {_shown(more)}, which like has not")
    return value


def _is_array(a):
    # exact types, as the operators of numpy.matrix and of masked arrays mean something else
    return type(a) in (np.ndarray, np.memmap) or (
        type(a) is getattr(sys.modules.get("cupy"), "ndarray", None))


def array_module(*arrays):
    """The module, numpy or cupy, whose arrays these are; TypeError if they are of neither or mix.
    CuPy is recognised only if the caller has imported it."""
    names = set()
    for a in arrays:
        module = "numpy" if isinstance(a, np.ndarray) else "cupy"
        names.add(module if _is_array(a) else f"a {type(a).__name__}")
    if names not in ({"numpy"}, {"cupy"}):
        raise TypeError("array_module: wants one or more arrays, all of NumPy or all of CuPy "
                        "(cupy.asarray and to_numpy move them), got "
                        f"{', '.join(sorted(names)) or 'none'}")
    return np if "numpy" in names else sys.modules["cupy"]


def best_module():
    """cupy if a GPU answers a small matrix product, else numpy. For scripts; never raises."""
    # a missing wheel, driver or kernel image each raise a different kind of error
    with contextlib.suppress(Exception):
        import cupy
        if float((cupy.ones((2, 2)) @ cupy.ones((2, 2))).sum()) == 8:
            return cupy
    return np


@_checked()
def to_numpy(a):
    """The array on the host: a itself if it is a NumPy array, else a copy of the CuPy array."""
    _need(_is_array(a), "a must be a NumPy or CuPy array", type(a), kind=TypeError)
    return a if array_module(a) is np else a.get()


class _Refused(Exception):
    """What is wrong with an argument; _checked raises it as kind, with the function's name."""

    def __init__(self, message, kind=ValueError):
        super().__init__(message)
        self.kind = kind


def _need(condition, wanted, *got, kind=ValueError):
    """Raise _Refused unless the condition holds: with what was wanted, and what came."""
    if not condition:
        raise _Refused(f"{wanted}, got {', '.join(map(_shown, got))}", kind)


def _shown(value):
    """A value in a message, shortened. This takes time: only once a message is needed."""
    # of all that has a length, and may be long, reprlib shortens only these types
    if hasattr(type(value), "__len__") and type(value) not in (str, tuple, list, dict):
        more = f" of {value.dtype} and shape {value.shape}" if hasattr(value, "dtype") else ""
        return f"a {type(value).__name__}{more}"
    try:
        return reprlib.repr(value)[:80]
    except Exception:                                   # such as an integer of 5,000 digits
        return f"a {type(value).__name__} that cannot be shown"


def _as_array(y):
    """A result as an array, also where NumPy has turned an array without axes into a scalar."""
    if type(y) is tuple:
        return tuple(map(_as_array, y))
    return np.asarray(y) if isinstance(y, np.generic) else y


@functools.cache
def _parameters(f):
    """The names of all that f takes, of what it takes by position, and its defaults by name."""
    parameters = inspect.signature(f).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return set(parameters), positional, defaults


def _arguments(f, axes, args, options):
    """The arguments of a call by name, defaults included, checked and completed: first the ranks
    of the arrays, then the options, which are completed by the rank, and then the lengths of axes,
    which depend on groups and radius."""
    names, positional, defaults = _parameters(f)
    given = defaults | dict(zip(positional, args)) | options
    twice = options.keys() & set(positional[:len(args)])
    if given.keys() != names or twice or len(args) > len(positional):
        f(*args, **options)                             # which raises Python's own TypeError
    # an array may be None where that is its default
    arrays = {name: given[name] for name in axes
              if given[name] is not None or name not in defaults}
    if arrays:
        _same(arrays)
    rank = _rank(arrays, axes)
    for name, value in given.items():
        # not in axes: scale is an option of coord_channels, but an array of affine
        if name in _OPTIONS and name not in axes:
            # None is left as it is, except that rng=None becomes a Generator
            may_be_none = name in defaults and defaults[name] is None
            if name == "rng" or not (may_be_none and value is None):
                given[name] = _option(name, value, rank)
    G = given.get("groups", 1)
    K = (rank or 0) + given.get("radius", False)        # a coordinate for each axis, the radius
    _check_lengths(arrays, axes, G, K)
    return given


_DTYPES = np.dtype(np.float32), np.dtype(np.float64)


def _same(arrays):
    """Check that arrays, a dict by name, share a dtype and a module; return the module."""
    for name, a in arrays.items():
        _need(_is_array(a), f"{name} must be a NumPy or CuPy array (numpy.asarray makes one, and "
              "numpy.ma.filled of a masked one)", a, kind=TypeError)
        if a.dtype not in _DTYPES:
            raise _Refused(f"{name} must be float32 or float64, got {a.dtype}; astype converts, "
                           "and numpy.eye(classes, dtype=...)[labels] makes a target of labels",
                           TypeError)
    if len({(isinstance(a, np.ndarray), a.dtype) for a in arrays.values()}) > 1:
        each = [f"{name} {array_module(a).__name__} {a.dtype}" for name, a in arrays.items()]
        raise _Refused("arrays must share a module (cupy.asarray and to_numpy move them) and a "
                       f"dtype (astype converts), got {', '.join(each)}", TypeError)
    return array_module(*arrays.values())


# The shapes of _checked are explained at the head of the file.

def _rank(arrays, axes):
    """Check that each array has as many axes as its shape. Returns the rank, None without a *."""
    rank = None
    for name, a in arrays.items():
        *named, last = axes[name]
        more = a.ndim - len(named)                      # the axes that the last name stands for
        if last[0] == "*":
            rank = more if rank is None else rank
            fits = more == rank > 0
        else:
            fits = more >= 0 if last == "..." else more == 1
        if not fits:
            raise _wrong_shape(name, arrays, axes, {})
    return rank


def _check_lengths(arrays, axes, G, K):
    """Check that each name stands for the same length in all arrays."""
    known = {"1": 1, "G": G, "K": K}
    for name, a in arrays.items():
        *named, last = axes[name]
        lengths = a.shape
        if last[0] in "*.":                             # it stands for all the axes that are left
            lengths = *a.shape[:len(named)], a.shape[len(named):]
        for axis, n in zip(axes[name], lengths):
            if axis == "C/G":
                axis, n = "C", n * G
            if axis == "F/G":
                axis, n = "F", n * G
            if axis == "C+K":
                axis, n = "C", n - K
            # the first array with this name says what it stands for, the others must agree
            if known.setdefault(axis, n) != n:
                raise _wrong_shape(name, arrays, axes, known)
    if G > 1:
        C = known["C"]
        F = known["F"]
        if C % G or F % G:
            raise _Refused(f"groups={_shown(G)} must divide {_shown(C)} channels and {_shown(F)} "
                           "filters")


def _wrong_shape(name, arrays, axes, known):
    shape = ", ".join(axes[name])
    words = {"N": "images", "C": "channels", "F": "filters", "G": "groups", "K": "coordinates"}
    parts = [f"{axis} = {_shown(n)} {words.get(axis, '')}".rstrip() for axis, n in known.items()
             if axis in shape and axis != "1"]
    where = ", ".join(parts) or "equal names are equal lengths"
    got = ", ".join(f"{other}.shape={a.shape}" for other, a in arrays.items())
    return _Refused(f"{name} must be ({shape}), where {where}, got {got}")


_HUGE = 2 ** 48                 # more pixels, or examples, than a memory holds


# The checks of options. Each takes a value and the rank of the images, None where there are none,
# and returns what the function gets. It raises TypeError for a value of the wrong kind, and any
# other error for a wrong one; _option makes the message.

def _of(kind, value):
    """The value, if it is of that kind. True is no number."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError
    return value


def _integer(low, below=math.inf, odd=False):
    def check(value, rank):
        n = int(_of(Integral, value))
        if not low <= n < below or odd and n % 2 == 0:
            raise ValueError
        return n
    return check


def _each(value, rank):
    """An entry for each axis."""
    return value if isinstance(value, (tuple, list)) else (value,) * rank


def _integers(low, below=math.inf):
    integer = _integer(low, below)

    def check(value, rank):
        each = _each(value, rank)
        if len(each) != rank:
            raise ValueError
        return tuple(integer(n, rank) for n in each)
    return check


def _size(value, rank):
    return _integers(1, _HUGE)(_of((tuple, list), value), rank or max(len(value), 1))


def _kernel(value, rank):
    check = _integer(1) if rank is None else _integers(1)
    return check(value, rank)


def _padding(value, rank):
    if isinstance(value, str):                          # of any other the KeyError refuses it
        return {"same": "same", "valid": ((0, 0),) * rank}[value]
    each = _each(value, rank)
    if len(each) != rank:
        raise ValueError
    pair = _integers(0)
    return tuple(pair(entry, 2) for entry in each)


def _number(below=sys.float_info.max):
    def check(value, rank):
        number = float(_of(Real, value))                # OverflowError for 10**400
        if not 0 <= number < below:
            raise ValueError
        return number
    return check


def _rate(value, rank):
    return value if callable(value) else _number()(value, rank)


def _choice(*allowed):
    def check(value, rank):
        if _of(str, value) not in allowed:
            raise ValueError
        return value
    return check


def _flag(value, rank):
    if not isinstance(value, (Integral, np.bool_)) or value not in (0, 1):
        raise TypeError
    return bool(value)


def _dtype(value, rank):
    with contextlib.suppress(Exception):                # NumPy has many for what is no dtype
        # np.dtype(None) is float64
        if value is not None and np.dtype(value) in _DTYPES:
            return np.dtype(value)
    raise TypeError


def _module(value, rank):
    if value is not np and (value is None or value is not sys.modules.get("cupy")):
        raise TypeError
    return value


def _path(value, rank):
    path = os.fsdecode(value)
    if "\0" in path:
        raise ValueError
    return path


def _generator(value, rank):
    if isinstance(value, np.random.Generator):
        return value
    return np.random.default_rng(None if value is None else _integer(0)(value, rank))


def _function(value, rank):
    return _of(collections.abc.Callable, value)


def _processes(value, rank):
    with contextlib.suppress(Exception):                # MPI.COMM_NULL raises one of its own
        if value.size > value.rank >= 0 and callable(value.allgather):
            return value
    raise TypeError


def _network(value, rank, name="net"):
    _need(isinstance(value, (list, tuple)) and not hasattr(value, "_fields"),
          f"{name} must be a list of Layer", type(value), kind=TypeError)
    for i, layer in enumerate(value):
        _need_own(f"{name}[{i}]", layer, Layer)
    return value


def _state(value, rank):
    _need_own("state", value, State)
    _network(value.net, rank, "state.net")
    shapes = [getattr(p, "shape", None) for p in _params(value.net)]
    for key in ("m", "v"):
        moments = getattr(value, key)
        _need(isinstance(moments, (list, tuple))
              and [getattr(a, "shape", None) for a in moments] == shapes,
              f"state.{key} must be a list with an array for each parameter of state.net", moments)
    for key in ("step", "seed"):                        # each an integer of 0 or more
        _option("seed", getattr(value, key), rank, f"state.{key}")
    return value


def _need_own(name, value, kind):
    """Check that value is a Layer or a State of this file."""
    if not isinstance(value, kind):
        found = type(value)
        twin = f" of another copy of this file, {found.__module__}; this one is {__name__}"
        raise _Refused(f"{name} must be a {kind.__name__}, got a {found.__name__}"
                       f"{twin if found.__name__ == kind.__name__ else ''}", TypeError)


# What an option of a name is, wherever it occurs.
_OPTIONS = {name: (wanted, check) for names, wanted, check in [
    ("n groups step steps workers", "an integer of 1 or more", _integer(1)),
    ("width canvas batch_size", "an integer from 1 to below 2^48", _integer(1, _HUGE)),
    ("square", "an odd integer from 1 to below 2^48", _integer(1, _HUGE, odd=True)),
    ("size shape", "a tuple or list of integers, one for each axis, from 1 to below 2^48, or for "
     "coordinates in float32 to 2^24", _size),
    ("seed", "an integer of 0 or more", _integer(0)),
    ("stride dilation", "an integer of 1 or more, or one for each axis", _integers(1)),
    ("output_padding", "an integer of 0 or more, or one for each axis", _integers(0)),
    ("padding", "an integer of 0 or more, one or a (before, after) pair for each axis, 'valid' or "
     "'same'", _padding),
    ("kernel", "an integer of 1 or more, or, for a pool, one for each axis", _kernel),
    ("l2 eps", "a finite number of 0 or more", _number()),
    ("beta1 beta2", "a number from 0 to below 1", _number(below=1)),
    ("learning_rate", "a finite number of 0 or more, or a function of the steps done", _rate),
    ("radius", "True or False", _flag),
    ("scale", "'unit' or 'pixel'", _choice("unit", "pixel")),
    ("split", "'uniform' or 'quadrant'", _choice("uniform", "quadrant")),
    ("task", "'classification', 'rendering' or 'regression'",
     _choice("classification", "rendering", "regression")),
    ("start", "'he' or 'relative'", _choice("he", "relative")),
    ("dtype", "float32 or float64", _dtype),
    ("xp", "the module numpy or cupy", _module),
    ("rng", "a numpy.random.Generator, an integer of 0 or more, or None", _generator),
    ("path", "a path without a null", _path),
    ("loss score", "a function", _function),
    ("comm", "None, or have rank, size and allgather, as MPI.COMM_WORLD has", _processes),
    ("net", "a list of Layer", _network),
    ("state", "a State", _state),
] for name in names.split()}


def _option(name, value, rank, called=None):
    """The value of an option, checked and completed. called is its name in a message."""
    wanted, check = _OPTIONS[name]
    try:
        return check(value, rank)
    except _Refused:                                    # it has a message of its own
        raise
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
    if rank:
        wanted = wanted.replace("each axis", f"each of {rank} axes")
    raise _Refused(f"{called or name} must be {wanted}, got {_shown(value)}", kind)


def _need_output(size, kernel, padding, out):
    """Check that a window leaves an output, and one that a memory can hold."""
    if min(*size, *kernel, *out) < 1 or math.prod(out) >= _HUGE:
        raise _Refused(f"kernel {_shown(kernel)}, dilation, stride and padding {_shown(padding)} "
                       f"must fit an image of {size}, got an output of {_shown(tuple(out))}")


def _pixels(x):
    """x (N, C, ...) as (N, C, pixels), contiguous."""
    return array_module(x).ascontiguousarray(x).reshape(*x.shape[:2], math.prod(x.shape[2:]))


def _flat(x):
    """x (N, ...) as (N, entries), contiguous; there must be at least one entry."""
    _need(math.prod(x.shape[1:]), "x (or image, logits, y) must have one or more entries for each "
          "of N", x.shape)
    return array_module(x).ascontiguousarray(x).reshape(len(x), math.prod(x.shape[1:]))


def _over(p, x):
    """p (C,) or (N, C), reshaped so that it broadcasts over x (N, C, ...)."""
    return p.reshape(*p.shape, *(1,) * (x.ndim - 2))


def _hot_pixels(pixels):
    """The index of the 1 in each of the one-hot rows (N, pixels)."""
    xp = array_module(pixels)
    hot = pixels.argmax(axis=1)
    # all are one-hot if each has a 1, and as many pixels are set as there are images
    ones = pixels[xp.arange(len(pixels)), hot] == 1
    if not (ones.all() and xp.count_nonzero(pixels != 0) == len(pixels)):
        one_hot = ones & ((pixels != 0).sum(axis=1) == 1)
        raise _Refused("image must be one-hot, a pixel of 1 and else zeros, and image"
                       f"[{int(one_hot.argmin())}] is not")
    return hot


def _positions(coords, size):
    """The positions coords (N, len(size)) as integers, checked to lie in the image."""
    _need(_is_array(coords) and coords.dtype.kind in "iuf",
          "coords must be an array of whole numbers", coords, kind=TypeError)
    _need(coords.shape[1:] == (len(size),), f"coords must be (N, {len(size)})", coords.shape)
    xp = array_module(coords)
    at = coords.astype(np.float64)
    right = ((at >= 0) & (at < xp.asarray(size)) & (at == xp.floor(at))).all(axis=1)
    if not right.all():
        raise _Refused(f"coords must be whole numbers from 0 to below {size}, got "
                       f"{coords[int(right.argmin())].tolist()}")
    return at.astype(np.int64)


def _need_exact(size, dtype):
    most = int(2 / np.finfo(dtype).eps)                 # up to here the dtype holds every integer
    _need(max(size) <= most, "n, size or x.shape must have at most 2^24 pixels on an axis for "
          "float32, 2^53 for float64, which cannot tell more apart", size)


def _need_shape(dy, shape):
    _need(dy.shape == shape, f"dy must have the output's shape {shape}", dy.shape)


def _need_both(mean, var):
    _need((mean is None) == (var is None), "mean and var must be given together or not at all",
          mean, var)


def _need_examples(y):
    _need(y.size, "logits, or y, must not be empty", y.shape)


def _loss_dy(dy):
    """The upstream gradient of a loss, a number or an array without axes, as a float."""
    number = isinstance(dy, Real) and not isinstance(dy, bool)
    if number or _is_array(dy) and dy.shape == () and dy.dtype.kind in "iuf":
        with contextlib.suppress(OverflowError):        # of 10**400, say
            return float(dy)
    raise _Refused(f"dy must be a number or an array of shape (), got {_shown(dy)}",
                   ValueError if number else TypeError)


def _need_parts_of_layer(op, params, options):
    if not (callable(op) and isinstance(params, (list, tuple))
            and isinstance(options, (dict, tuple))):
        raise TypeError("Layer: op must be a function, params a list and options a dict, got "
                        f"{_shown(op)}, {_shown(params)}, {_shown(options)}")


def _need_inputs(net, dy, inputs):
    # with layers the last op checks dy: of a loss it is a number
    _need(net or _is_array(dy), "dy must be an array", dy, kind=TypeError)
    _need(isinstance(inputs, (list, tuple)), "inputs must be the list that forward returns",
          type(inputs), kind=TypeError)
    _need(len(inputs) == len(net), f"inputs must be an array for each of {len(net)} layers",
          len(inputs))


def _gradient(op):
    """The gradient of op: the function of its module that has its name with "_backward"."""
    # __globals__ holds the names of the module that the function, or its decorator, was written
    # in: a copy of this file need not be in sys.modules. The gradient must have been written there
    # too, as a module that decorates conv may have imported conv_backward.
    name = getattr(op, "__name__", "") + "_backward"
    beside = getattr(op, "__globals__", {})
    found = beside.get(name)
    _need(getattr(found, "__globals__", None) is beside,
          f"op and loss must have a function {name} beside them", op, kind=TypeError)
    return found


def _split(found, layer):
    """What the gradient of a layer's op returned, as dx and the gradients of the params."""
    dx, *dparams = found if isinstance(found, (tuple, list)) else (found,)
    want = [None if p is None else p.shape for p in layer.params]
    got = [None if dp is None else getattr(dp, "shape", type(dp)) for dp in dparams]
    # a gradient may end in None for each of the op's parameters that the layer does not give
    fits = hasattr(dx, "shape") and got == want + [None] * (len(got) - len(want))
    _need(fits, f"the gradient of {layer.op.__name__} must be arrays, by its input and by params "
          f"of shape {want}", getattr(dx, "shape", type(dx)), *got)
    return dx, dparams[:len(want)]


def _params_module(net, **examples):
    """The module of a network's parameters, and of examples, which share it."""
    params = {f"net[{i}].params[{j}]": p for i, layer in enumerate(net)
              for j, p in enumerate(layer.params) if p is not None}
    _need(params, "net must have parameters", net)
    return _same(params | examples)


def _examples_module(net, x, target):
    """The same for the arrays that a network is to learn, or to be scored on."""
    xp = _params_module(net, x=x, target=target)
    _need(x.ndim and target.ndim and len(x) == len(target) > 0,
          "x and target must hold as many examples, one or more", x.shape, target.shape)
    return xp


def _need_same_state(state, comm):
    """Check that all processes of a training begin with the same State."""
    if comm is not None:
        mine = [to_numpy(a).tobytes() for a in (*_params(state.net), *state.m, *state.v)]
        mine += [state.step, state.seed]
        if any(theirs != mine for theirs in comm.allgather(mine)):
            raise ValueError("train: state must be the same in all processes of comm, with the "
                             f"same weights, moments, step and seed; process {comm.rank} has step "
                             f"{state.step} and seed {_shown(state.seed)}")


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
