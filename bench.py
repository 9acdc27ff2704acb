# SPDX-License-Identifier: MIT
"""The dispute about CoordConv, claim by claim, and the speed of coordref.

    python bench.py             every claim on three seeds, under two minutes on two cores
    python bench.py --quick     the same rows in 15 seconds: long trainings are cut, not judged
    python bench.py --full      the published lengths; what figures/full.jsonl has is not run again
    python bench.py ops         the speed of convolution by shape and by size, against peers

Experiments make runs, a run is what one experiment found for one seed, and rows judge runs. A row
is a claim of the paper (Liu et al. 2018, arXiv 1807.03247), of its critic (Piekniewski 2018), of
the article that reported both (QbitAI 2018) or of coordref; it holds, holds in part, or fails.
Recipes were chosen on seeds 0 to 4, and the seeds shown chose nothing. Where the outcome depends
on the seed the median decides, and the worst stands in brackets behind it. Seconds are those of
one core. Networks are tested on every fourth test position, squares on every sixteenth, in --full
on all.
"""

import os

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")    # a process a core: run_all

import argparse
import collections
import concurrent.futures
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import platform
import re
import signal
import sys
import threading
import time
from functools import partial
from statistics import fmean, geometric_mean, median
from typing import Any, NamedTuple

import numpy as np

import coordref as cr

HERE = os.path.dirname(os.path.abspath(__file__))
KEPT = os.path.join(HERE, "bench-runs.jsonl")           # runs of a table that is not complete
WORK = os.path.join(HERE, "bench-full")                 # states of the published lengths
FULL = os.path.join(HERE, "figures", "full.jsonl")      # their runs
SPLITS = ("uniform", "quadrant")
MISSING = [name for name in ("torch", "matplotlib") if not importlib.util.find_spec(name)]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
with open(cr.__file__, "rb") as _module, open(__file__, "rb") as _this:
    STAMP = hashlib.sha256(_module.read() + _this.read()).hexdigest()[:16]


class Experiment(NamedTuple):
    run: Any                # run(seed, xp, **recipe) returns a dict that JSON can hold
    recipe: Any
    seeds: Any = None       # its own; or how many of those asked for, None for all
    cut: Any = None         # what --quick changes in the recipe; no verdict survives that
    package: str = ""       # what it needs beyond NumPy and SciPy
    alone: bool = False     # nothing else may run meanwhile


# THE CRITIC --------------------------------------------------------------------------------------

SIZES = (70, 100), (64, 64), (33, 2), (1, 9), (5, 1)


def listing(image):
    """The critic's listing for one image (H, W), its convolutions by scipy: [row, col]."""
    from scipy.signal import convolve2d         # 0.3 s that few processes need to spend

    centre = np.zeros((3, 3), image.dtype)
    centre[1, 1] = 1
    return [float(size - np.maximum(convolve2d(image, size * centre, mode="same") + convolve2d(
        coordinate.astype(image.dtype), -centre, mode="same"), 0).sum())
            for size, coordinate in zip(image.shape, np.indices(image.shape))]


def wired(seed, xp):
    """At how many positions the hand-wired networks, and their closed forms, are right: reading a
    one-hot image, and drawing it."""
    positions, read, drawn = 0, [], []
    for H, W in SIZES:
        reader, drawer = cr.decoder_network((H, W), xp=xp), cr.encoder_network((H, W), xp=xp)
        for row in range(H):
            positions, image = positions + W, np.zeros((W, 1, H, W), np.float32)
            image[range(W), 0, row, range(W)] = 1
            at = np.stack([np.full(W, row), np.arange(W)], axis=1).astype(np.float32)
            image, at = xp.asarray(image), xp.asarray(at)
            read += [(a == at).all() for a in (cr.decode(image), cr.forward(reader, image)[0])]
            drawn += [(a == image).all() for a in (
                cr.encode(at, (H, W)), cr.forward(drawer, at[:, :, None, None])[0])]
    return {"positions": positions, "read": bool(all(read)), "drawn": bool(all(drawn))}


def listed(seed, xp):
    """The listing, and decoder_network, for: two pixels, half a pixel, none, the last, the first;
    and the last position that the listing's own test draws."""
    images = np.zeros((5, 1, 70, 100), np.float32)
    images[0, 0, 10, 20] = images[0, 0, 30, 70] = images[3, 0, 69, 99] = images[4, 0, 0, 0] = 1
    images[1, 0, 10, 20] = 0.5
    read, _ = cr.forward(cr.decoder_network((70, 100), xp=xp), xp.asarray(images))
    rng = np.random.RandomState(0)
    return {"listing": [listing(image[0]) for image in images],
            "network": cr.to_numpy(read).tolist(),
            "last": [int(rng.randint(0, n - 1, 10 ** 6).max()) for n in (70, 100)]}


def as_feature(seed, xp):
    """The largest error of coord_conv and its gradients against conv after add_coords."""
    rng, errors = np.random.default_rng(0), []
    for size in ((40,), (9, 14), (5, 6, 7)):
        shapes = (3, 4, *size), (5, 4 + len(size), *(3,) * len(size)), (5,), (3, 5, *size)
        x, w, b, dy = (xp.asarray(rng.standard_normal(s)) for s in shapes)
        more = cr.add_coords(x)
        dmore, dw, db = cr.conv_backward(dy, more, w, b, padding=1)
        wanted = cr.conv(more, w, b, padding=1), cr.add_coords_backward(dmore, x), dw, db
        found = (cr.coord_conv(x, w, b, padding=1),
                 *cr.coord_conv_backward(dy, x, w, b, padding=1))
        errors += [float(abs(a - a_0).max() / abs(a_0).max()) for a, a_0 in zip(found, wanted)]
    return {"score": max(errors)}


# TRAININGS ---------------------------------------------------------------------------------------

def weights(net):
    """The number of parameters, those of networks among a layer's options included."""
    inner = [part for layer in net for part in layer.options.values() if isinstance(part, list)]
    return sum(p.size for layer in net for p in layer.params) + sum(map(weights, inner))


def tested(net, data, every, **options):
    """The score on every so manieth test position."""
    return cr.evaluate(net, data._replace(test=data.test[::every]), **options)


def trained(net, data, seed, *, task, steps, every=4, curve=24, picture=False, **options):
    """The network after training, and its run: core-seconds without the tests, the score, a curve
    of [step, core-seconds, score on fewer test positions], perhaps all that a painter paints."""
    spent, points, start = 0.0, [], time.process_time()
    for state in cr.train(cr.initial_state(net, seed=seed), data, task=task, steps=steps,
                          **options):
        if state.step in {round(steps / 1.6 ** k) for k in range(1, 6)}:
            spent += time.process_time() - start
            points.append([state.step, spent, tested(state.net, data, curve, task=task)])
            start = time.process_time()
    spent += time.process_time() - start
    score = tested(state.net, data, every, task=task)
    return state.net, {"score": score, "seconds": spent, "picture": picture and pixels(state.net),
                       "curve": [*points, [steps, spent, score]]}


def painted(seed, xp, *, split, start, square, iou_every, **recipe):
    """Coordinate to pixel by CoordConv. And to square, in two parts that are then joined: what
    stands behind the painter's softmax, where all positions are alike, learns to draw the square
    around a pixel on a canvas of 20."""
    net, data = cr.coordconv_renderer(start=start, rng=seed, xp=xp), cr.not_so_clevr(split)
    i = [layer.op for layer in net].index(cr.softmax)
    painter, found = trained(net[:i], data, seed, task="classification", **recipe)
    before, behind = time.process_time(), [cr.Layer(hot_pixel), *net[i + 1:]]
    *_, state = cr.train(cr.initial_state(behind, seed=seed), cr.not_so_clevr(split, canvas=20),
                         task="rendering", scale="pixel", **square)
    found["both parts"] = found["seconds"] + time.process_time() - before
    found["iou"] = tested([*painter, net[i], *state.net[1:]], data, iou_every, task="rendering")
    return found


def hot_pixel(x):
    """One-hot images on a canvas of 20: what a perfect painter's softmax hands on."""
    return cr.encode(x[:, :, 0, 0], (20, 20), dtype=x.dtype)


def hot_pixel_backward(dy, x):
    return dy                                           # nothing before it is trained


def pixels(net):
    """The pixel, counted row by row, that a painter paints for each position of the data set."""
    xp, found = cr.array_module(net[0].params[0]), []
    for at in np.split(((2 * cr.not_so_clevr().coords - 63) / 63).astype(np.float32), 784):
        y, _ = cr.forward(net, xp.asarray(at[:, :, None, None]))
        found += y.reshape(len(y), -1).argmax(axis=1).tolist()
    return found


def deconvolved(seed, xp, *, split, **recipe):
    """The same by the smallest of the paper's deconvolutions, which learns fastest here."""
    net = cr.deconv_painter(kernel=2, rng=seed, xp=xp)
    return trained(net, cr.not_so_clevr(split), seed, **recipe)[1]


def regressed(seed, xp, *, split, model, **recipe):
    """Image to coordinate by CoordConv, from he_normal or a start of ours, or by convolution; and
    how far off each axis is."""
    net, data = cr.coordconv_regressor(rng=seed, xp=xp), cr.not_so_clevr(split)
    net = (cr.conv_regressor(split, rng=seed, xp=xp) if model == "conv" else
           salient(net, 64, xp) if model == "salient" else net)
    net, found = trained(net, data, seed, task="regression", **recipe)
    at = data.coords[data.test[::16]]
    told, _ = cr.forward(net, cr.encode(xp.asarray(at), (64, 64)))
    return {**found, "axes": abs(64 * cr.to_numpy(told) - at).mean(axis=0).tolist()}


def salient(net, size, xp, height=3, slope=0.1):
    """A start of ours for the regressor: the hot pixel stands out by height, the rest of the image
    is nearly flat, with a range of at most slope * height, and the maximum is 1/2.

    The network is linear up to its maximum, so that two images show what it does. The first
    layer's weights for the coordinates shrink; the last layer is scaled, sign included."""
    hot = cr.encode(xp.asarray([[size // 2, size // 2]]), (size, size))
    blank, seen = (cr.to_numpy(cr.forward(net[:-1], x)[0]).reshape(2, -1) for x in (0 * hot, hot))
    peaks = (seen - blank)[[0, 1], abs(seen - blank).argmax(axis=1)]
    flatter = slope * min(abs(peaks) / np.ptp(blank, axis=1))
    (w, b), (w_last, b_last) = net[0].params, net[-2].params
    w = w * xp.asarray([[[1]], [[flatter]], [[flatter]]], np.float32)
    w_last = w_last * xp.asarray((height / peaks)[:, None, None, None], np.float32)
    return [net[0]._replace(params=[w, b]), *net[1:-2],
            net[-2]._replace(params=[w_last, b_last + np.float32(0.5 - height)]), net[-1]]


# THE CONTROL: why ImageNet gained nothing --------------------------------------------------------
#
# One textured patch lies on an image of zeros, and the class is the quadrant that it lies in, or
# its texture. A network whose border is out of reach of the patch cannot know where it lies. One
# with coordinates can, and in part so can one that feels the zero padding (Islam et al. 2020).

TEXTURES = np.sign(np.random.RandomState(1).standard_normal((4, 5, 5)))
CORNERS = np.array([0, 1, 2, 5, 6, 7])                  # the quadrant of a patch is never in doubt


def patches(kind, at, margin, rng):
    """Images (N, 1, H, H) of a patch of each kind with its corner at (row, col)."""
    x = np.zeros((len(kind), 1, 12 + 2 * margin, 12 + 2 * margin), np.float32)
    row, col = (margin + at[:, a, None] + np.arange(5) for a in (0, 1))
    patch = TEXTURES[kind] * rng.uniform(1, 2, (len(kind), 1, 1))
    x[np.arange(len(kind))[:, None, None], 0, row[:, :, None], col[:, None, :]] = (
        patch + 0.4 * rng.standard_normal(patch.shape))
    return x


def quadrant(at):
    return (at > 3) @ np.array([2, 1])


def control(seed, xp, *, label, coords, steps, padding="valid", training="anywhere"):
    """In training patches lie "anywhere"; or, "biased", texture k in quadrant k; or, "shifted",
    there and then moved around the image. The score is on 64 patches, each at its four mirrored
    places, so that who is blind to place scores 1/4; after a bias, on those that contradict it."""
    rng, margin, net = np.random.default_rng(seed), 0 if padding == "same" else 4, []
    for F, C, k in ((16, 1, 3), (16, 16, 3), (16, 16, 1), (4, 16, 1)):
        op, K = (cr.coord_conv, 2) if coords and not net else (cr.conv, 0)
        params = cr.he_normal((F, C + K, k, k), rng=rng, xp=xp), xp.zeros(F, np.float32)
        net += [cr.Layer(op, params, {"padding": padding}), cr.Layer(cr.relu)]
    net[-1], start = cr.Layer(cr.mean_pool), time.process_time()
    w = xp.concatenate([p.ravel() for layer in net for p in layer.params])
    m, v, at = 0 * w, 0 * w, 0
    for layer in net:                                   # its params become views of w
        for i, p in enumerate(layer.params):
            layer.params[i], at = w[at:at + p.size].reshape(p.shape), at + p.size
    for step in range(steps):
        kind, at = rng.integers(0, 4, 16), rng.choice(CORNERS, (16, 2))
        if training != "anywhere":
            far = np.stack([kind > 1, kind % 2 > 0], axis=1)
            at = np.where(far, np.maximum(at, 7 - at), np.minimum(at, 7 - at))
        if training == "shifted":
            at = (at + rng.integers(0, 8, at.shape)) % 8
        target = np.eye(4, dtype=np.float32)[quadrant(at) if label == "quadrant" else kind]
        z, inputs = cr.forward(net, xp.asarray(patches(kind, at, margin, rng)))
        dz, _ = cr.softmax_cross_entropy_backward(1.0, z, xp.asarray(target))
        _, grads = cr.backward(net, dz, inputs)
        dw = xp.concatenate([dp.ravel() for layer in grads for dp in layer])
        w[:], m, v = cr.adam_step(w, dw, m, v, step + 1, learning_rate=0.01 * (1 - step / steps))
    seconds, right = time.process_time() - start, []
    kind, at = np.arange(64) % 4, rng.choice(CORNERS, (64, 2))
    for mirror in itertools.product((False, True), repeat=2):
        there = np.where(mirror, 7 - at, at)
        x = xp.asarray(patches(kind, there, margin, np.random.default_rng([seed, 1])))
        told = cr.to_numpy(cr.forward(net, x)[0].argmax(axis=1))
        asked = (training == "anywhere") | (kind != quadrant(there))
        right += (told == (quadrant(there) if label == "quadrant" else kind))[asked].tolist()
    return {"score": fmean(right), "seconds": seconds}


# A RESIDUAL NETWORK, and parameters --------------------------------------------------------------

def residual(x, main, short):
    """Two branches added (He et al. 2015, arXiv 1512.03385), to be run, not trained."""
    return cr.forward(main, x)[0] + cr.forward(short, x)[0]


def resnet_50(rng, xp):
    """ResNet-50 for 1000 classes. The dense layer is a convolution that the mean follows."""
    def conv(C, F, k=1, stride=1):
        w = rng.standard_normal((F, C, k, k), dtype=np.float32) * np.float32((C * k * k) ** -0.5)
        return [cr.Layer(cr.conv, [xp.asarray(w)], {"stride": stride, "padding": k // 2}),
                cr.Layer(cr.batch_norm, [xp.ones(F, np.float32), xp.zeros(F, np.float32)])]

    relu, C = cr.Layer(cr.relu), 64
    net = [*conv(3, C, 7, 2), relu,
           cr.Layer(cr.max_pool, options={"kernel": 3, "stride": 2, "padding": 1})]
    for F, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if F > 64 and block == 0 else 1  # at the 3x3, as in PyTorch
            main = [*conv(C, F), relu, *conv(F, F, 3, stride), relu, *conv(F, 4 * F)]
            short = [] if block else conv(C, 4 * F, 1, stride)
            net += [cr.Layer(residual, options={"main": main, "short": short}), relu]
            C = 4 * F
    dense = conv(C, 1000)[0]
    return [*net, dense._replace(params=[*dense.params, xp.zeros(1000, np.float32)]),
            cr.Layer(cr.mean_pool)]


def counted(seed, xp):
    """Parameters of the painters; and of ResNet-50 without coordinates and with the paper's layer
    below it, a 1x1 CoordConv with radius and 8 filters, and their answers to an image."""
    rng = np.random.default_rng(0)
    plain, x = resnet_50(rng, xp), xp.asarray(rng.standard_normal((1, 3, 64, 64)), np.float32)
    w, more = (cr.he_normal(s, rng=rng, xp=xp) for s in ((8, 6, 1, 1), (64, 8, 7, 7)))
    coords = [cr.Layer(cr.coord_conv, [w, xp.zeros(8, np.float32)], {"radius": True}),
              plain[0]._replace(params=[more]), *plain[1:]]
    ours = weights(cr.coordconv_painter(rng=0))
    ratios = [weights(cr.deconv_painter(kernel=k, width=c, rng=0)) / ours
              for k in (2, 3, 4) for c in (1, 2, 3)]
    return {"ours": ours, "least": min(ratios), "most": max(ratios),
            "inside": sum(10 <= ratio <= 100 for ratio in ratios),
            "plain": weights(plain), "more": weights(coords) - weights(plain),
            "logits": [float(cr.forward(net, x)[0].sum()) for net in (plain, coords)]}


# SPEED -------------------------------------------------------------------------------------------

P1, P2 = {"padding": 1}, {"padding": 2}
SHAPES = {      # images, channels, filters, the size of the image and of the kernel, options
    "1x1 64-64": (8, 64, 64, (64, 64), 1, {}), "3x3 64-64": (8, 64, 64, (56, 56), 3, P1),
    "3x3 3-64": (8, 3, 64, (64, 64), 3, P1), "5x5 32-32": (8, 32, 32, (32, 32), 5, P2),
    "7x7 stride 2, 3-64": (1, 3, 64, (224, 224), 7, {"padding": 3, "stride": 2}),
    "3x3 stride 2, 64-128": (8, 64, 128, (56, 56), 3, {**P1, "stride": 2}),
    "3x3 dilated, 64-64": (8, 64, 64, (56, 56), 3, {**P2, "dilation": 2}),
    "1x1 8-128": (8, 8, 128, (64, 64), 1, {}), "1x1 128-128": (8, 128, 128, (64, 64), 1, {}),
    "1x1 4-32": (8, 4, 32, (64, 64), 1, {}),
    "3x3 depthwise, 64": (8, 64, 64, (56, 56), 3, {**P1, "groups": 64}),
    "9 in 1-D, 64-64": (8, 64, 64, (2048,), 9, {"padding": 4}),
    "3x3x3 in 3-D, 16-16": (2, 16, 16, (24, 24, 24), 3, P1),
    "3x3 128-128, 28x28": (8, 128, 128, (28, 28), 3, P1),
    "3x3 16-16, 16x16": (1, 16, 16, (16, 16), 3, P1), "3x3 8-16": (8, 8, 16, (64, 64), 3, P1),
    "3x3 256-256, 14x14": (4, 256, 256, (14, 14), 3, P1),
    "1x1 256-256, 14x14": (8, 256, 256, (14, 14), 1, {}),
    "4x4 stride 2, 64-64": (8, 64, 64, (32, 32), 4, {**P1, "stride": 2}),
}


def passes(N, C, F, size, k, options, peer=cr.conv):
    """Forward and backward as programs without arguments, and the forward's multiplications; by
    conv, coord_conv or the module torch on one thread."""
    c = C // options.get("groups", 1) + len(size) * (peer is cr.coord_conv)
    x, w, b = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in (
        (N, C, *size), (F, c, *(k,) * len(size)), (F,)))
    if peer in (cr.conv, cr.coord_conv):
        dy, back = peer(x, w, b, **options), getattr(cr, f"{peer.__name__}_backward")
        return (lambda: peer(x, w, b, **options), lambda: back(dy, x, w, b, **options),
                dy.size * w[0].size)
    peer.set_num_threads(1)
    x, w, b = (peer.tensor(a, requires_grad=True) for a in (x, w, b))
    conv = getattr(peer.nn.functional, f"conv{len(size)}d")
    y = conv(x, w, b, **options)
    dy = y.detach().clone()
    return (lambda: conv(x, w, b, **options), lambda: peer.autograd.grad(
        y, (x, w, b), dy, retain_graph=True), dy.numel() * w[0].numel())


def alternating(programs, repeats):
    """The median core-seconds of each program, in turn, an untimed call before each timed one."""
    seconds = np.empty((repeats, len(programs)))
    for row in seconds:
        for i, program in enumerate(programs):
            program()
            start = time.process_time()
            program()
            row[i] = time.process_time() - start
    return np.median(seconds, axis=0)


def conv_speed(seed, xp, shapes, repeats):
    """Time over torch's, forward and backward together, of the first shapes."""
    import torch

    ratios = []
    for case in list(SHAPES.values())[:shapes]:
        pairs = zip(passes(*case)[:2], passes(*case, peer=torch)[:2])
        ours, theirs = sum(alternating(pair, repeats) for pair in pairs)
        ratios.append(float(ours / theirs))
    return {"score": geometric_mean(ratios), "worst": max(ratios), "shapes": shapes}


def step_speed(seed, xp, steps, peer):
    """The median milliseconds of a training step of the painter with 16 images and two threads."""
    start = cr.initial_state(cr.coordconv_painter(rng=0))
    states = cr.train(start, cr.not_so_clevr(), task="classification", steps=steps, workers=2)
    clock = [time.perf_counter() for _ in (torch_steps(steps) if peer == "torch" else states)]
    return {peer: 1e3 * float(np.median(np.diff(clock)))}


def torch_steps(steps):
    """Steps of such a training in torch."""
    import torch

    torch.set_num_threads(2)
    layers = [layer for C, F in itertools.pairwise((4, 32, 32, 64, 64, 1))
              for layer in (torch.nn.Conv2d(C, F, 1), torch.nn.ReLU())]
    net = torch.nn.Sequential(*layers[:-1])
    adam = torch.optim.Adam(net.parameters(), lr=0.005, betas=(0.9, 0.99))
    grid = torch.tensor(cr.coord_channels((64, 64))).expand(16, 2, 64, 64)
    for _ in range(steps):
        at, label = torch.rand(16, 2, 1, 1) * 2 - 1, torch.randint(4096, (16,))
        logits = net(torch.cat([at.expand(16, 2, 64, 64), grid], dim=1)).flatten(1)
        adam.zero_grad()
        torch.nn.functional.cross_entropy(logits, label).backward()
        adam.step()
        yield


def decode_speed(seed, xp, repeats):
    """How many times as fast as the listing decode is, 256 images in a call."""
    images = cr.encode(np.random.default_rng(0).integers(0, 64, (256, 2)), (64, 64))
    ours, theirs = alternating([lambda: [cr.decode(images) for _ in range(9)],
                                lambda: [listing(image[0]) for image in images[:64]]], repeats)
    return {"score": float(36 * theirs / ours)}


# ROWS --------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """A claim. judge takes the runs of each experiment in needs, and returns whether it holds (or
    "in part"), the figure behind that, and perhaps a note: a condition, or how it was found. Where
    figure is given it is a template, as note is, and judge says of facts whether it holds."""
    id: str
    claim: str              # at most 40 characters; the figure 33, the note 89
    source: str
    needs: str              # "a *, b" are the experiments a uniform, a quadrant and b
    judge: Any
    figure: str = ""
    note: str = ""


PART = "in part"
iou, px = "{:.3f}".format, "{:.2f} px".format


def percent(x):
    """100 and 0 only where it is all or none."""
    return f"{100 * x:.0f} %" if x in (0, 1) else f"{min(max(100 * x, 0.1), 99.9):.1f} %"


def scores(runs, key="score"):
    return [run[key] for run in runs]


def spread(runs, form=percent, key="score"):
    """The median and, in brackets, the worst where that is another."""
    found = scores(runs, key)
    middle, worst = form(median(found)), form((max if form is px else min)(found))
    return middle if middle == worst else f"{middle} ({worst.split()[0]})"


def how_many(good):
    """Of more than three seeds with the exact 95 % interval of the share."""
    text = f"{sum(good)} of {len(good)} runs"
    if len(good) <= 6:
        return text
    from scipy.stats import binomtest
    low, high = binomtest(sum(good), len(good)).proportion_ci()
    return f"{text} (95 %: {100 * low:.0f} to {100 * high:.0f} %)"


def facts(groups):
    """What the first runs found, and the scores of all runs."""
    found = {key: value for run, *_ in groups for key, value in run.items()}
    if "score" in found:
        found["all"], mean = [scores(runs) for runs in groups], fmean(scores(groups[0]))
        found.update(mean=mean, percent=percent(mean), spread=[spread(runs) for runs in groups],
                     best=max((x for *_, x in found.get("curve", ())), default=None))
    return found


def by_seed(low, safe, *groups, form=percent, key="score", note=""):
    """It holds if on each split the median reaches low, and no run misses safe. Where safe is None
    the seed decides, and three that pass say nothing of a fourth: at most in part."""
    sign, every = -1 if form is px else 1, [x for runs in groups for x in scores(runs, key)]
    good = all(sign * median(scores(runs, key)) >= sign * low for runs in groups)
    sure = good and safe is not None and all(sign * x >= sign * safe for x in every)
    count = f"{form(low)} or better in {how_many([sign * x >= sign * low for x in every])}"
    return (sure or (PART if good else False),
            " / ".join(spread(runs, form, key) for runs in groups),
            "; ".join([note] * bool(note) + ["in the median"] * (good and not sure)
                      + [count] * (not sure or len(every) > 6)))


def some(*groups):
    """In part if some runs, or some axes, are within half a pixel; ten seeds have to, to show that
    all are."""
    good = [x < 0.5 for runs in groups for x in scores(runs)]
    axes = [x < 0.5 for runs in groups for run in runs for x in run.get("axes", ())]
    note = f"for some seeds, and axes ({sum(axes)} of {len(axes)}); " if axes else "some seeds; "
    return (all(good) and len(groups[0]) > 9 or (PART if any(good + axes) else False),
            f"{sum(good)} of {len(good)} runs within .5 px", note + " / ".join(
                spread(runs, px) for runs in groups) + how_many(good).partition("runs")[2])


def behind(times, whose, key, limits, form, *groups):
    """The rival stays within limits, with at least so many times CoordConv's seconds."""
    points, took = [], []
    for (rival, *_), ours in zip(groups[:2], groups[2:]):
        spent = max(scores(ours, key))
        after = [p for p in rival["curve"] if p[1] >= times * spent] or rival["curve"]
        points.append(after[0 if times == 1 else -1])
        took.append(points[-1][1] / spent)
    return (min(took) >= times and all(p[2] <= limit for p, limit in zip(points, limits)),
            " / ".join(form(p[2]) for p in points),
            "in {:.1f} / {:.1f} times the seconds of {}; one seed".format(*took, whose))


def factor(rivals, ours):
    """How much sooner CoordConv has the level that is the deconvolution's best."""
    level = max(x for *_, x in rivals[0]["curve"])
    slow, fast = (median(next((t for _, t, x in run["curve"] if x >= level), math.inf)
                         for run in runs) for runs in (rivals, ours))
    return (slow / fast >= 150 or (PART if slow / fast >= 5 else False),
            f"{slow / fast:.0f} times at this level", f"{percent(level)} correct took the "
            f"deconvolution {slow:,.0f} s, CoordConv {fast:.2g} s; it grows with the level")


def in_seconds(goal, form, runs):
    """It holds if every run gets there within a minute, and is there at the end."""
    first = [next((t for _, t, x in run["curve"] if x >= goal), math.inf) for run in runs]
    good = [x >= goal for x in scores(runs)]
    return (all(good) and max(first) < 60 or (PART if min(first) < math.inf else False),
            f"{sum(good)} of {len(good)} runs end there", "by seed: first there after "
            + " ".join(f"{t:.0f}".replace("inf", "-") for t in first) + " s; in the end "
            + " ".join(form(x).split()[0] for x in scores(runs)))


# THE DISPUTE -------------------------------------------------------------------------------------

def on_both(name, run, seeds=None, cut=None, **recipe):
    """An experiment on each split."""
    return {f"{name} {split}": Experiment(run, {"split": split, **recipe}, seeds, cut)
            for split in SPLITS}


CUT = {"steps": 6, "every": 32}
PAINT = {       # a short memory of gradients is what the quadrant split needs
    "beta1": 0.7, "beta2": 0.95, "iou_every": 16,
    "square": {"steps": 200, "batch_size": 2, "learning_rate": 0.01}}
DECONV = {"learning_rate": 0.005, "batch_size": 16, "curve": 6}
EXPERIMENTS = {
    **{run.__name__: Experiment(run, {}, 1) for run in (wired, listed, as_feature, counted)},
    **on_both("painter relative", painted, start="relative", steps=80, batch_size=4,
              learning_rate=0.008, **PAINT),
    **{f"painter he {split}": Experiment(painted, {
        "split": split, "start": "he", "steps": steps, "batch_size": batch, "learning_rate": rate,
        **PAINT}, cut={**CUT, "iou_every": 99, "square": {"steps": 5}})
       for split, steps, batch, rate in (
            ("uniform", 300, 2, 0.012), ("quadrant", 600, 1, 0.01))},
    # of the rivals one seed: CoordConv's time, and more
    **{f"deconv {split}": Experiment(deconvolved, {
        "split": split, "task": "classification", "steps": steps, **DECONV}, 1, CUT)
       for split, steps in (("uniform", 500), ("quadrant", 360))},
    **on_both("square deconv", deconvolved, 1, CUT, task="rendering", steps=200, **DECONV),
    **on_both("regressor salient", regressed, model="salient", steps=80, batch_size=4,
              learning_rate=0.008, beta1=0.5),
    **on_both("regressor he", regressed, None, CUT, model="he", steps=500, batch_size=1,
              learning_rate=0.008, beta1=0.5),
    **on_both("regressor conv", regressed, 1, CUT, model="conv", steps=260, batch_size=4,
              learning_rate=0.004),
    **{name: Experiment(control, {"label": label, "coords": "coords" in name, "steps": steps,
                                  **more}, None if " " in name else 1,
                        {"steps": 20} if "texture" in name else None)
       for name, label, steps, more in (
           ("place", "quadrant", 200, {}), ("place coords", "quadrant", 200, {}),
           ("place padding", "quadrant", 300, {"padding": "same"}),
           ("texture", "texture", 300, {}), ("texture coords", "texture", 250, {}),
           ("biased", "texture", 300, {"training": "biased"}),
           ("biased coords", "texture", 200, {"training": "biased"}),
           ("shifted coords", "texture", 300, {"training": "shifted"}))},
    "decode": Experiment(decode_speed, {"repeats": 3}, 1),
    "conv": Experiment(conv_speed, {"shapes": 6, "repeats": 3}, 1, {"shapes": 1}, "torch"),
    "step": Experiment(step_speed, {"steps": 16, "peer": "coordref"}, 1, {"steps": 3}, "torch",
                       True),
    "torch step": Experiment(step_speed, {"steps": 16, "peer": "torch"}, 1, {"steps": 3}, "torch",
                             True),
}
WIRED = "Can it be done without training?"
PIXEL = "Coordinate to pixel: does CoordConv learn what convolution does not?"
SQUARE = "Coordinate to square: the same, with more to draw?"
COORD = "Image to coordinate: the same, the other way?"
FASTER = "Is it 150 times faster, with 10 to 100 times fewer parameters?"
GAIN = "Why did ImageNet gain nothing?"
FAST = "Is this file fast?"
WITH, MEAN = "{spread[0]}, {spread[1]} without", "{percent} in the mean"
ROWS = {
    WIRED: [
        Row("decoder", "wired by hand it reads every pixel", "critic", "wired",
            lambda run: run["read"], "all of {positions:,} positions",
            f"images of {', '.join(f'{H}x{W}' for H, W in SIZES)}; last row and column too"),
        Row("encoder", "wired by hand it draws every pixel", "critic", "wired",
            lambda run: run["drawn"], "all of {positions:,} positions"),
        Row("listing", "the critic's listing reads an image", "critic", "listed",
            lambda run: run["listing"][3:] == [[69, 99], [0, 0]] and PART, "one-hot images only",
            "two pixels: {listing[0]}; half a pixel: {listing[1]}; blank: {listing[2]}"),
        Row("own-test", "its own test reaches every position", "critic", "listed",
            lambda run: run["last"] == [69, 99], "draws end at {last} of [69, 99]",
            "randint(0, size - 1) leaves the last out; there the listing says {listing[3]}"),
        Row("same", "the critic's network is a CoordConv", "coordref", "listed",
            lambda run: run["listing"] == run["network"], "the listing's numbers, 5 images"),
        Row("feature", "CoordConv is conv on 2 added features", "critic", "as_feature",
            lambda run: run["score"] < 1e-12, "to {score:.0e}, gradients too")],
    PIXEL: [
        Row("pixel-uniform", "CoordConv learns it, uniform split", "paper",
            "painter he uniform", partial(by_seed, 0.98, 0.8)),
        Row("pixel-quadrant", "CoordConv learns it, quadrant split", "paper",
            "painter he quadrant", partial(by_seed, 0.8, None, note="the seed decides")),
        Row("pixel-relative", "our relative start, uniform / quadrant", "coordref",
            "painter relative *", partial(by_seed, 0.98, 0.9)),
        Row("pixel-deconv", "a deconvolution does not, in that time", "paper",
            "deconv *, painter he *",
            partial(behind, 1, "CoordConv", "seconds", (0.2, 0.2), percent)),
        Row("pixel-deconv-longer", "nor in several times that time", "paper",
            "deconv *, painter relative *",
            partial(behind, 2, "our start", "seconds", (0.2, 0.2), percent))],
    SQUARE: [
        Row("square-he", "CoordConv learns it, uniform / quadrant", "paper", "painter he *",
            partial(by_seed, 0.8, None, form=iou, key="iou",
                    note="in two parts")),
        Row("square-relative", "our relative start, uniform / quadrant", "coordref",
            "painter relative *", partial(by_seed, 0.98, 0.9, form=iou, key="iou")),
        Row("square-deconv", "a deconvolution: IoU up to .83 / .36", "paper",
            "square deconv *, painter relative *",
            partial(behind, 1.5, "our start", "both parts", (0.83, 0.36), iou))],
    COORD: [
        Row("coord-he", "one CoordConv net learns both splits", "paper", "regressor he *", some),
        Row("coord-salient", "from our salient start every seed does", "coordref",
            "regressor salient *", partial(by_seed, 0.5, 3, form=px)),
        Row("coord-conv", "a convolution learns the uniform split", "paper",
            "regressor conv uniform", lambda run: run["score"] < 5, "{score:.2f} px", "one seed"),
        Row("coord-conv-quadrant", "a convolution fails on the quadrant", "paper",
            "regressor conv quadrant", lambda run: run["score"] > 5, "{score:.2f} px",
            "one seed")],
    FASTER: [
        Row("factor", "CoordConv learns 150 times faster", "paper",
            "deconv uniform, painter he uniform", factor),
        Row("parameters", "with 10 to 100 times fewer parameters", "paper", "counted",
            lambda run: run["inside"] == 9 or PART, "{least:.0f} to {most:.0f} times",
            "for {inside} of the paper's 9 deconvolutions; CoordConv has {ours:,}")],
    GAIN: [
        Row("resnet", "ResNet-50 runs with them and without", "article", "counted",
            lambda run: run["plain"] == 25_557_032 and np.isfinite(run["logits"]).all(),
            "{plain:,} parameters", "{more:,} more with coordinates in a first layer"),
        Row("texture", "no gain where the class is no place", "article",
            "texture coords, texture", lambda run: abs(run["mean"] - run["all"][1][0]) < 0.03,
            WITH),
        Row("place", "coordinates decide where it is one", "coordref", "place coords, place",
            lambda run: median(run["all"][0]) >= 0.98 and run["all"][1] == [0.25], WITH,
            "quadrant of a patch, no border in reach; 25 % is chance, and exact"),
        Row("padding", "zero padding in reach leaks the place", "coordref", "place padding",
            lambda run: 0.6 <= run["mean"] <= 0.85, MEAN),
        Row("bias", "coordinates learn a bias of the data", "coordref", "biased coords",
            lambda run: run["mean"] <= 0.93, MEAN,
            "texture k always in quadrant k; tested where that does not hold"),
        Row("shifts", "random shifts in training wipe it out", "article", "shifted coords",
            lambda run: run["mean"] >= 0.99, MEAN),
        Row("no-bias", "without coordinates it is never learned", "article", "biased",
            lambda run: run["mean"] >= 0.99, "{percent}", "one seed")],
    FAST: [
        Row("conv-speed", "conv takes 1.25 of torch's time at most", "coordref", "conv",
            lambda run: run["score"] <= 1.25, "{score:.2f} of torch's time",
            "one core, geometric mean of {shapes} shapes, worst {worst:.2f}"),
        Row("step-speed", "a training step takes .8 of it at most", "coordref",
            "step, torch step", lambda run: run["coordref"] <= 0.8 * run["torch"],
            "{coordref:.0f} ms, torch {torch:.0f} ms", "16 images, two threads"),
        Row("decode-speed", "decode is 300 times the listing's speed", "coordref", "decode",
            lambda run: run["score"] >= 300, "{score:.0f} times")],
}


# THE PUBLISHED LENGTHS: --full -------------------------------------------------------------------

def published(seed, xp, *, model, task, split, scale, batch_size, epochs, share=1, learning_rate,
              decay, l2, **options):
    """One training of the paper, or a share of it. State and curve are saved at most once a
    minute: killed at any moment it goes on from there, to the same figures."""
    net = getattr(cr, model)(*[split] * (model == "conv_regressor"), rng=seed, xp=xp, **options)
    data, how = cr.not_so_clevr(split), {"task": task, "scale": scale}
    per_epoch = -(-len(data.train) // batch_size)
    steps = math.ceil(epochs * per_epoch * share)
    path = os.path.join(WORK, f"{model}-{task}-{split}-{l2:g}-{seed}-{steps}.npz")
    os.makedirs(WORK, exist_ok=True)
    state, curve, end = cr.initial_state(net, seed=seed), np.zeros((epochs, 3)), "done"
    if os.path.exists(path):
        state, curve = cr.load(path, (state, curve))
    begun, done, spent = state, int((curve[:, 0] > 0).sum()), curve[:, 1].max()
    saved = time.monotonic()
    start = time.process_time()
    try:
        for state in cr.train(begun, data, steps=steps, batch_size=batch_size, decay=decay, l2=l2,
                              learning_rate=learning_rate, **how):
            if state.step % per_epoch == 0 or state.step == steps:
                spent += time.process_time() - start
                curve[done] = state.step / per_epoch, spent, tested(state.net, data, 5, **how)
                done += 1
                if time.monotonic() - saved > 60 * share:
                    cr.save(path, (state, curve))
                    saved = time.monotonic()
                start = time.process_time()
    except FloatingPointError as error:                 # an outcome like others
        end = str(error)
    found = {"score": cr.evaluate(state.net, data, **how), "end": end, "seconds": float(spent),
             "train": cr.evaluate(state.net, data, part="train", **how)}
    if os.path.exists(path):
        os.unlink(path)
    return {**found, "curve": thinned(curve[:done].tolist(), task)}


def thinned(curve, task):
    """About a hundred points [epoch, core-seconds, score], the best and the last among them."""
    best = (min if task == "regression" else max)(curve, key=lambda point: point[2], default=None)
    n = max(len(curve) // 100, 1)
    return [[round(a, 2), round(b, 1), round(c, 4)] for i, (a, b, c) in enumerate(curve)
            if i % n == n - 1 or [a, b, c] == best or i == len(curve) - 1]


HOW = {"batch_size": 16, "epochs": 50, "decay": "constant", "scale": "pixel"}
LONG = {**HOW, "model": "deconv_painter", "kernel": 2, "width": 1, "learning_rate": 0.01,
        "l2": 0.001, "epochs": 1000, "decay": "step"}
REGRESS = {**HOW, "task": "regression", "batch_size": 256, "epochs": 100, "scale": "unit"}
PUBLISHED = {name: experiment for name, seeds, recipe in (
    ("deconv k2 w1", 1, {**LONG, "task": "classification"}),
    *((f"painter l2 {l2:g}", seeds, {
        **HOW, "model": "coordconv_painter", "task": "classification", "learning_rate": 0.005,
        "l2": l2}) for l2, seeds in ((0.001, 5), (0.0, 2))),
    ("coordconv regressor", 10, {**REGRESS, "model": "coordconv_regressor", "learning_rate": 0.01,
                                 "l2": 1e-5}),
    ("conv regressor", 5, {**REGRESS, "model": "conv_regressor", "learning_rate": 0.001,
                           "l2": 1e-4}),
    ("renderer", 3, {**HOW, "model": "coordconv_renderer", "task": "rendering", "l2": 0.001,
                     "learning_rate": 0.005, "kernel": 3}),
    ("square deconv k2 w1", 1, {**LONG, "task": "rendering"}),
) for name, experiment in on_both(name, published, range(seeds), {"share": 0.01},
                                  **recipe).items()}
LONGEST = "best on the way {best:.2f}, training part {train:.2f}; {seconds:,.0f} s of a core"
FULL_ROWS = {
    PIXEL: [
        *(Row(f"full-deconv-{split}", f"deconvolution: up to {100 * top:g} %, {split}", "paper",
              f"deconv k2 w1 {split}", lambda run, top=top: run["score"] < top + 0.005,
              "{percent}", LONGEST) for split, top in zip(SPLITS, (0.86, 0))),
        *(Row(f"full-painter-l2-{l2}-{split}", f"100 % in seconds, {split}, l2 {l2}", "paper",
              f"painter l2 {l2} {split}", partial(in_seconds, 1, percent))
          for l2 in ("0.001", "0") for split in SPLITS)],
    SQUARE: [
        *(Row(f"full-renderer-{split}", f"CoordConv reaches IoU 1, {split}", "paper",
              f"renderer {split}", partial(in_seconds, 0.99, iou)) for split in SPLITS),
        *(Row(f"full-square-deconv-{split}", f"deconvolution: IoU up to {top}, {split}",
              "paper", f"square deconv k2 w1 {split}", lambda run, top=top: run["score"] < top
              + 0.005, "{score:.3f}", LONGEST) for split, top in zip(SPLITS, (0.83, 0.36)))],
    COORD: [
        Row("full-coord", "one CoordConv net learns both splits", "paper",
            "coordconv regressor *", some),
        Row("full-conv-uniform", "a convolution learns the uniform split", "paper",
            "conv regressor uniform", partial(by_seed, 1, 1, form=px)),
        Row("full-conv-quadrant", "a convolution fails on the quadrant", "paper",
            "conv regressor quadrant", lambda run: min(run["all"][0]) > 2, "{mean:.2f} px")],
    FASTER: [
        Row("full-factor", "CoordConv learns 150 times faster", "paper",
            "deconv k2 w1 uniform, painter l2 0.001 uniform", factor)],
}


# OPS, VECTORS, FIGURES ---------------------------------------------------------------------------

def ops(repeats=5):
    """A line a shape, then the cost against size: one thread a side, by processor time."""
    from scipy.signal import correlate

    torch = None if "torch" in MISSING else importlib.import_module("torch")
    a, ratios = np.ones((1024, 1024), np.float32), {"/torch": {}, "CoordConv/conv": {}}
    peak = float(2 * len(a) ** 3 / alternating([lambda: a @ a], 9)[0])
    print(f"float32; the peak is a matrix product's, {peak / 1e9:.0f} GFLOP/s\n{'':21}"
          f"{'forward':>11}{'backward':>11}{'of peak':>9}{'/torch':>8}{'backward':>10}"
          f"{'CoordConv/conv':>16}{'/scipy':>9}")
    for name, (N, C, F, size, k, options) in SHAPES.items():
        peers = [cr.conv] + [cr.coord_conv] * ("groups" not in options) + [torch] * bool(torch)
        sides = [passes(N, C, F, size, k, options, peer) for peer in peers]
        spent = np.array([alternating(programs, repeats) for programs in list(zip(*sides))[:2]]).T
        both, nan = spent.sum(axis=1), math.nan
        over = [*spent[0] / spent[-1], both[0] / both[-1]] if torch else [nan] * 3
        coords = both[1] / both[0] if cr.coord_conv in peers else nan
        ratios["/torch"][name], ratios["CoordConv/conv"][name] = over[2], coords
        # one image under one filter, times both: scipy has no batch, no stride and no gaps
        x = np.ones((C // options.get("groups", 1), *size), np.float32)
        w = x[(..., *[slice(k)] * len(size))]
        scipy = alternating([partial(correlate, x, w, "same")], 1)[0] * N * F
        print(f"{name:21}{1e3 * spent[0, 0]:8.2f} ms{1e3 * spent[0, 1]:8.2f} ms"
              f"{6 * sides[0][2] / both[0] / peak:9.2f}{over[0]:8.2f}{over[1]:10.2f}{coords:16.2f}"
              f"{spent[0, 0] / scipy:9.2g}".replace("nan", "  -"), flush=True)
    for what, found in ratios.items():
        values = {name: float(x) for name, x in found.items() if x == x} or {"none": nan}
        print(f"{what}, both passes: geometric mean {geometric_mean(values.values()):.2f}, worst "
              "{1:.2f} ({0})".format(*max(values.items(), key=lambda item: item[1])))
    print("ns a multiplication, both passes, 3x3; N = 2, C = F = 16, H = W = 32, and one doubled:")
    for axis, name in enumerate(("N", "C", "H W")):
        for n in range(5):
            N, C, H = (m * 2 ** (n * (i == axis)) for i, m in enumerate((2, 16, 32)))
            *pair, count = passes(N, C, C, (H, H), 3, {"padding": 1})
            print(f"{name * (n == 0):4}{(N, C, H)[axis]:6}: "
                  f"{1e9 * sum(alternating(pair, repeats)) / 3 / count:.3f}",
                  end="\n" if n == 4 else "", flush=True)


def vectors(path):
    fail(f"vectors {path}: nothing here checks them yet")


PICTURES = ("deconv quadrant", "painter he quadrant", "painter relative quadrant")


def draw_positions(plt, runs):
    """What each network paints right over all positions."""
    data, coords = cr.not_so_clevr("quadrant"), cr.not_so_clevr().coords
    hot, _ = cr.forward(cr.encoder_network((64, 64)), coords.astype(np.float32)[:, :, None, None])
    told = [next(run["picture"] for name, run in runs if name == wanted) for wanted in PICTURES]
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.9), sharey=True, layout="constrained")
    for ax, found, title in zip(
            axes, [*told, hot.reshape(len(hot), -1).argmax(axis=1)],
            ("deconvolution", "CoordConv, he_normal", "CoordConv, our start", "wired by hand")):
        right, picture = np.array(found) == coords @ [64, 1], np.full((64, 64), np.nan)
        picture[tuple(coords.T)] = right
        ax.imshow(picture, plt.matplotlib.colors.ListedColormap(["0.82", "#0072b2"]),
                  interpolation="nearest", vmin=0, vmax=1)
        ax.plot([32.5, 59.5, 59.5, 32.5, 32.5], [32.5, 32.5, 59.5, 59.5, 32.5], color="#d55e00")
        ax.set(xlim=(3.5, 59.5), ylim=(59.5, 3.5), xlabel="column")
        ax.set_title(f"{title}\ntrain {percent(right[data.train].mean())}, "
                     f"test {percent(right[data.test].mean())}", fontsize=9)
    axes[0].set_ylabel("row")
    figure.suptitle("Positions painted right (blue) and wrong (grey); trained outside the frame, "
                    "tested inside", fontsize=10)
    return figure


def draw_time(plt, runs):
    """Score against core-seconds, a line for every run."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="row", sharey="row",
                                layout="constrained")
    lines = {"relative": ("#0072b2", "o"), "salient": ("#0072b2", "o"), "he": ("#e69f00", "s"),
             "conv": ("black", "^")}
    for name, run in runs:
        kind, start, split = (name.replace("deconv", "painter conv").split() + ["", ""])[:3]
        if kind in ("painter", "regressor"):
            (color, marker), (_, spent, found) = lines[start], np.transpose(run["curve"])
            axes[int(kind == "regressor"), SPLITS.index(split)].plot(
                spent, found * (100 if kind == "painter" else 1), color=color, marker=marker,
                markersize=4, linewidth=1)
    for (i, j), ax in np.ndenumerate(axes):
        ax.set(xscale="log", xlabel="core-seconds of training",
               title=f"{('coordinate to pixel', 'image to coordinate')[i]}, {SPLITS[j]} split",
               ylabel=("test positions right (%)", "mean distance (pixels)")[i] * (j == 0))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    figure.legend([plt.Line2D([], [], color=c, marker=m) for c, m in [*lines.values()][1:]],
                  ["CoordConv, our start", "CoordConv, he_normal", "without coordinates"],
                  loc="outside lower center", ncols=3)
    return figure


# THE COMMAND -------------------------------------------------------------------------------------

class Job(NamedTuple):
    name: str
    seed: int
    recipe: str             # JSON, so that a job is its own key


def start_worker():
    """Ctrl-C is for the process that gave the work; when that is gone, nobody waits for this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1),
                     daemon=True).start()


def make_run(run, job, device):
    start, recipe = time.process_time(), json.loads(job.recipe)
    return {"recipe": recipe, **run(job.seed, cr.best_module() if device == "gpu" else np,
                                    **recipe), "core_seconds": time.process_time() - start}


def run_all(jobs, experiments, device):
    """Yield (job, run, error) as jobs end. Each core has a pool of one process, so that one that
    dies takes only its own job along; what runs alone comes last, each in a new process."""
    context = multiprocessing.get_context("spawn")
    fresh = partial(concurrent.futures.ProcessPoolExecutor, 1, context, start_worker)
    waiting = sorted(jobs, key=lambda job: experiments[job.name].alone)
    free, active = [fresh() for _ in jobs[:CORES]], {}
    try:
        while waiting or active:
            while waiting and free and not (active and experiments[waiting[0].name].alone):
                job, pool = waiting.pop(0), free.pop()
                if experiments[job.name].alone:
                    free, pool = [], fresh()
                active[pool.submit(make_run, experiments[job.name].run, job, device)] = pool, job
            show(f"{len(waiting) + len(active)} of {len(jobs)} runs to go; now "
                 + ", ".join(f"{job.name} seed {job.seed}" for _, job in active.values()))
            for task in concurrent.futures.wait(active, 0.5, "FIRST_COMPLETED").done:
                (pool, job), error = active.pop(task), task.exception()
                died = isinstance(error, concurrent.futures.process.BrokenProcessPool)
                free.append(fresh() if died else pool)
                yield job, None if error else task.result(), error and (
                    "its process died" if died else f"{type(error).__name__}: {error}")
    finally:
        for child in multiprocessing.active_children():
            child.terminate()


def show(text=""):
    """A line of progress, on a terminal, that the next line replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{clip(text)}", end="", file=sys.stderr, flush=True)


def clip(text):
    return text if len(text) <= 99 else text[:96] + "..."


def jobs_of(row, experiments, options):
    """The jobs of each experiment that a row needs."""
    found = []
    for name in [need.replace("*", split) for need in row.needs.split(", ")
                 for split in SPLITS[:1 + ("*" in need)]]:
        _, recipe, own, cut, *_ = experiments[name]
        recipe = {**recipe, **(cut if options.quick and cut else {})}
        found.append([Job(name, seed, json.dumps(recipe, sort_keys=True)) for seed in (
            own if isinstance(own, range) else options.seeds[:own])])
        if options.figures and name in PICTURES:
            found[-1][0] = found[-1][0]._replace(
                recipe=json.dumps({**recipe, "picture": True}, sort_keys=True))
    return found


def judged(question, row, jobs, done, errors, experiments, quick):
    """A row as --json has it, but with a figure and a note for measured."""
    groups = [[{**job._asdict(), **done[job]} for job in group if job in done] for group in jobs]
    runs, every, verdict = sum(groups, []), sum(jobs, []), None
    needs = [experiments[job.name] for job in every]
    missing = next((need.package for need in needs if need.package in MISSING), None)
    if missing:
        figure, note = f"needs {missing}", f"pip install {missing}"
    elif len(runs) < len(every):
        figure, note = f"{len(runs)} of {len(every)} runs", next((
            f"{job.name}, seed {job.seed}: {errors[job]}" for job in every if job in errors), "")
    else:
        known = row.figure and facts(groups)
        found, figure, note = (row.judge(known), row.figure.format(**known), row.note.format(
            **known)) if known else row.judge(*groups)
        verdict = PART if found == PART else "holds" if found else "fails"
        if quick and any(need.cut for need in needs):
            verdict, note = None, "not judged: trainings were cut short"
    return {"id": row.id, "question": question, "claim": row.claim, "source": row.source,
            "verdict": verdict, "figure": figure, "note": note, "runs": runs,
            "seconds": sum(run.get("core_seconds", run.get("seconds")) for run in runs)}


def lines_of(row, markdown):
    verdict, figure, note = row["verdict"] or "-", row["figure"], row["note"]
    if markdown:
        return [f"| {verdict} | {row['claim']} | {figure} | {row['source']} |",
                *[f"| | | {note} | |"] * bool(note)]
    if len(figure) > 33:
        figure, note = "", "; ".join(filter(None, (figure, note)))
    spent = row["seconds"]
    spent = f"{spent:.0f} s" if spent < 999 else f"{spent / 3600:.2g} h"
    return [f"  {verdict:7} {row['claim']:40} {figure:33} {row['source']:8} {spent:>5}",
            *[f"{'':10}{note}"] * bool(note)]


def table(rows, experiments, options):
    """Print the rows as their runs come in; return the exit status."""
    start, told, errors, status = time.monotonic(), [], {}, 0
    stamp, path = STAMP + options.device, KEPT
    if options.full:        # these runs are kept for good, whatever version they are of
        stamp, path = None, os.path.join(WORK, "quick.jsonl") if options.quick else FULL
    os.makedirs(os.path.dirname(path), exist_ok=True)
    done = read_runs(path, stamp)
    plan = [(question, row, jobs_of(row, experiments, options)) for question, row, _ in rows]
    every = list(dict.fromkeys(job for *_, groups in plan for job in sum(groups, [])))
    waiting = [job for job in every
               if job not in done and experiments[job.name].package not in MISSING]
    where = {"date": time.strftime("%Y-%m-%d"), "coordref": cr.__version__, "numpy":
             np.__version__, "python": platform.python_version(), "cores": CORES,
             "device": options.device, "missing": MISSING,
             "seeds": "as published" if options.full else options.seeds}

    def tell():
        """Print the next rows whose runs are not waited for."""
        for question, row, jobs in plan[len(told):]:
            if any(job in waiting for job in sum(jobs, [])):
                break
            lines = [f"| | **{question}** | | |"] if options.markdown else ["", question]
            lines = lines if not told or told[-1]["question"] != question else []
            told.append(judged(question, row, jobs, done, errors, experiments, options.quick))
            show()
            print("\n".join(map(clip, lines + lines_of(told[-1], options.markdown))), flush=True)

    print("| verdict | claim | measured | source |\n| --- | --- | --- | --- |" if options.markdown
          else clip(", ".join(f"{name} {value}" for name, value in where.items()))
          + "\nmedian (worst) of the seeds, uniform / quadrant split; seconds of one core")
    runs = run_all(list(waiting), experiments, options.device)
    try:
        tell()
        for job, run, error in runs:
            waiting.remove(job)
            if error:
                errors[job], status = error, 1
            else:
                done[job] = {**run, **({"stamp": stamp} if stamp else {})}
                with open(path, "a") as file:
                    file.write(json.dumps([job.name, job.seed, done[job]]) + "\n")
            tell()
    except KeyboardInterrupt:
        runs.close()
        status = 130
        waiting.clear()
        tell()
    show()
    if not options.markdown:
        counts = collections.Counter(row["verdict"] or "not judged" for row in told)
        spent = sum(done[job].get("core_seconds", 0) for job in every if job in done)
        print(f"\n{len(told)} rows: " + ", ".join(f"{n} {v}" for v, n in counts.items())
              + f"; {time.monotonic() - start:.0f} s, {spent:.0f} core-seconds")
    if options.json:
        for row in told:
            row["measured"] = "; ".join(filter(None, (row.pop("figure"), row.pop("note"))))
        with open(options.json, "w") as file:
            json.dump({"environment": where, "rows": told}, file, indent=1)
    if options.figures and not status:
        from matplotlib import pyplot as plt

        os.makedirs(options.figures, exist_ok=True)
        for name, draw in (("positions", draw_positions), ("time", draw_time)):
            draw(plt, [(job.name, done[job]) for job in every if job in done]).savefig(
                os.path.join(options.figures, f"{name}.png"), dpi=100)
    if not status and not options.full and os.path.exists(path):
        os.unlink(path)
    return status


def read_runs(path, stamp):
    """The runs by job of a file of lines [name, seed, run]; the last may have been cut off."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    return {Job(name, seed, json.dumps(run["recipe"], sort_keys=True)): run
            for name, seed, run in lines if run.get("stamp") == stamp}


def seeds(text):
    """N as the seeds from 10 to 9 + N, A:B as those from A to B - 1."""
    first, last = re.fullmatch(r"(?:(\d{1,6}):)?(\d{1,6})", text).groups()
    return list(range(int(first or 10), int(last) + (0 if first else 10))) or seeds("")


def fail(message):
    print(clip(f"bench.py: {' '.join(message.split())}"), file=sys.stderr)
    sys.exit(2)


def parsed():
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("what", nargs="?", choices=("dispute", "ops", "vectors"),
                        default="dispute", help="the table, or the speed, or a check of a file")
    parser.add_argument("file", nargs="?", metavar="FILE.npz")
    for name, text in (("quick", "cut long trainings"), ("full", "the published lengths"),
                       ("list", "show the rows only"), ("markdown", "for a README")):
        parser.add_argument(f"--{name}", action="store_true", help=text)
    for name, value, text in (("only", "REGEX", "rows whose line in --list fits"),
                              ("seeds", "N", "the seeds 10 to 9 + N; or A:B"),
                              ("json", "FILE", "write rows and runs"),
                              ("figures", "DIR", "draw two figures")):
        parser.add_argument(f"--{name}", metavar=value, help=text)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    options = parser.parse_args()
    for name, read in (("only", re.compile), ("seeds", seeds)):
        text = getattr(options, name)
        try:
            setattr(options, name, text and read(text))
        except (AttributeError, re.error):
            fail(f"--{name} {text}: not understood")
    return options


def main():
    options = parsed()
    rows = [(question, row, f"{row.id:29} {row.source:9} {row.claim}") for question, group in (
        FULL_ROWS if options.full else ROWS).items() for row in group]
    rows = [row for row in rows if not options.only or options.only.search(row[2])]
    given = [f"--{name}" for name, value in vars(options).items()
             if value and name not in ("what", "file", "device")]
    out, folder = os.path.abspath(options.json or KEPT), options.figures
    for wrong, message in (
            (options.what == "vectors" and not options.file, "vectors: FILE.npz is missing"),
            (options.what != "vectors" and options.file, f"{options.file}: unexpected"),
            (options.what != "dispute" and given, f"{options.what} takes no {' '.join(given)}"),
            (options.full and options.seeds, f"--seeds {options.seeds}: --full has its own"),
            (folder and (options.full or options.only), f"--figures {folder}: needs every row of "
             "the dispute, not --full or --only"),
            (not rows, f"--only {options.only and options.only.pattern}: no row fits"),
            (os.path.isdir(out) or not os.access(os.path.dirname(out), os.W_OK),
             f"--json {options.json}: cannot be written"),
            (folder and os.path.isfile(folder), f"--figures {folder}: is a file"),
            (folder and "matplotlib" in MISSING, f"--figures {folder}: needs matplotlib"),
            (options.device == "gpu" and cr.best_module() is np,
             "--device gpu: no GPU answers to CuPy")):
        if wrong:
            fail(message)
    if options.list:
        return print("\n".join(clip(line) for *_, line in rows))
    if options.what == "dispute":
        options.seeds = (options.seeds or seeds("3"))[:1 if options.quick else None]
        return table(rows, PUBLISHED if options.full else EXPERIMENTS, options)
    return ops() if options.what == "ops" else vectors(options.file)


if __name__ == "__main__":
    sys.exit(main())
