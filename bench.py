# SPDX-License-Identifier: MIT
"""The dispute about CoordConv, claim by claim, and the speed of coordref.

    python bench.py                   every claim on three seeds, in two to four minutes
    python bench.py --quick           the same rows in 20 seconds: trainings are cut, not judged
    python bench.py --full            the published lengths, by the runs in figures/full.jsonl
    python bench.py ops               speed by shape and by size, against SciPy and PyTorch
    python bench.py vectors FILE      cases with their results, to check another implementation
    python bench.py check MODULE:NAME [--options JSON]   what your layer's coordinates are

Rows are claims of the paper (Liu et al. 2018), of its critic (Piekniewski 2018), of the article on
both (QbitAI 2018), or of coordref. Recipes were chosen on seeds 0 to 4, and are shown on others.
"""

# To add a row: write a function that makes a run, a dict that JSON can hold, and register it as an
# experiment; write a judge, which gets a list of such runs for each experiment that it needs, and
# register it as a row. Nothing else: the table, the files and the summary's end follow.
#
#   @on_both_splits("blank", steps=50)
#   def blank(seed, xp, *, split, steps):
#       """What the experiment does."""
#       return {"score": 0.5}
#
#   @row("blank", PIXEL, "a blank image will do", "critic", "blank *")
#   def blank_will_do(uniform, quadrant):
#       """What decides."""
#       return does(PAINTS, [uniform, quadrant])

import os

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")  # one process a core

import argparse
import contextlib
import ctypes
import difflib
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import operator
import platform
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections import namedtuple
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from functools import partial
from statistics import fmean, geometric_mean, median

import numpy as np

import coordref as cr
from coordref import Layer

HERE = os.path.dirname(os.path.abspath(cr.__file__))
KEPT = os.path.join(HERE, "bench-runs.jsonl")  # the runs of a call that was interrupted
STATES = os.path.join(HERE, "bench-full")  # the states of published trainings under way
FULL = os.path.join(HERE, "figures", "full.jsonl")  # the runs of published trainings

SPLITS = ("uniform", "quadrant")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# The table's questions.
WITHOUT_TRAINING = "Can it be done without training?"
PIXEL = "Coordinate to pixel: does CoordConv learn what convolution does not?"
SQUARE = "Coordinate to square: the same, with more to draw?"
COORDINATE = "Image to coordinate: the same, the other way?"
FASTER = "Is it 150 times faster, with 10 to 100 times fewer parameters?"
IMAGENET = "Why did ImageNet gain nothing?"
SPEED = "Is this file fast?"


# EXPERIMENTS AND ROWS ----------------------------------------------------------------------------

# function(seed, xp, **recipe) returns a run. seeds: None for those of the command line, else a
# tuple; once: the first of them will do; cost: about how many core-seconds a run takes; quick:
# what --quick changes in the recipe; package: one that it cannot do without; drawn: the panel and
# the network of its curve in the figures.
Experiment = namedtuple("Experiment", "function recipe seeds once cost quick package drawn")

# judge gets a list of runs for each of the experiments named in needs, and returns a Verdict.
Row = namedtuple("Row", "id question claim source needs judge full")

# word: "holds", "in part", "fails", or None if not judged; figure: what it was judged by; note: by
# which bound, and what else was measured.
Verdict = namedtuple("Verdict", "word figure note", defaults=("",))

EXPERIMENTS = {}
ROWS = {}


def experiment(
    name, *, seeds=None, once=False, cost=1, quick=None, package=None, drawn=None, **recipe
):
    """Decorator: register an experiment under this name, with this recipe."""

    def register(function):
        EXPERIMENTS[name] = Experiment(function, recipe, seeds, once, cost, quick, package, drawn)
        return function

    return register


def on_both_splits(name, *, quadrant=None, **options):
    """Decorator: register "name uniform" and "name quadrant", each with its split in the recipe;
    quadrant is what differs in the latter."""

    def register(function):
        experiment(f"{name} uniform", split="uniform", **options)(function)
        experiment(f"{name} quadrant", split="quadrant", **options | (quadrant or {}))(function)
        return function

    return register


def row(id, question, claim, source, *needs, full=False):
    """Decorator: register the judge of a claim, for the default table or for that of --full. It
    needs experiments: "name *" means two, "name uniform" and "name quadrant"."""
    names = [name.replace("*", split) for name in needs for split in SPLITS]

    def register(judge):
        ROWS[id] = Row(id, question, claim, source, list(dict.fromkeys(names)), judge, full)
        return judge

    return register


# JUDGES ------------------------------------------------------------------------------------------


def percent(x, digits=".1f"):
    """Such as 100 %, 99.9 %, 0.4 %; 100 and 0 only where it is all or none."""
    if x in (0, 1):
        return f"{100 * x:.0f} %"
    return f"{min(max(100 * x, 0.1), 99.9):{digits}} %"


def pixels(x, digits=".2f"):
    return f"{x:{digits}} px"


def iou_text(x, digits=".3f"):
    return f"{x:{digits}}"


# A task has the same bounds for both sides. Whoever gets to bound does it; whoever does not get
# past missed does not; between the two it is in part. A network whose training part has not got to
# learnt proves nothing about the test part.
Task = namedtuple("Task", "bound missed learnt form better")

PAINTS = Task(0.95, 0.8, 0.2, percent, operator.ge)
DRAWS = Task(0.9, 0.5, 0.2, iou_text, operator.ge)
READS = Task(1.0, 5.0, 5.0, pixels, operator.le)


def scores(runs):
    return [run["score"] for run in runs]


def best_of(task, values):
    return max(values) if task.better is operator.ge else min(values)


def worst_of(task, values):
    return min(values) if task.better is operator.ge else max(values)


def gets_past_missed(task, x):
    return x != task.missed and task.better(x, task.missed)


def spread(values, form=percent, worst=min):
    """The median and, in brackets, the worst where that reads otherwise."""
    middle = form(median(values))
    last = form(worst(values))
    return middle if middle == last else f"{middle} ({last.split()[0]})"


def spreads(task, groups):
    """The spread of each split."""
    return " / ".join(spread(scores(runs), task.form, partial(worst_of, task)) for runs in groups)


def how_many(good):
    """Such as 2 of 3 runs, with a 95 % interval of the share where there are many."""
    text = f"{sum(good)} of {len(good)} runs"
    if len(good) > 6:
        from scipy.stats import binomtest  # 0.3 s that few calls need to spend

        low, high = binomtest(sum(good), len(good)).proportion_ci()
        text += f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    return text


def not_judged(figure, why):
    return Verdict(None, figure, f"not judged: {why}")


def sentences(*parts):
    """Parts of a note, without those that are empty."""
    return "; ".join(part for part in parts if part)


def word_of(good):
    """Whether all, some or none of several conditions hold."""
    if all(good):
        return "holds"
    return "in part" if any(good) else "fails"


def does(task, groups, *, share=1.0, note=""):
    """Whether runs do a task. It holds if on each split this share of the runs gets to the bound,
    fails if no run gets past the miss, and is in part between."""
    if not all(groups):
        return not_judged("-", "no run on a split")
    good = [[task.better(x, task.bound) for x in scores(runs)] for runs in groups]
    best = best_of(task, [x for runs in groups for x in scores(runs)])
    if all(sum(of_split) >= share * len(of_split) for of_split in good):
        word = "holds"
    else:
        word = "in part" if gets_past_missed(task, best) else "fails"
    fraction = Fraction(share).limit_denominator(9)  # such as 2/3
    most = "every seed" if share == 1 else f"{fraction} of the seeds of a split"
    wanted = f"wanted: {task.form(task.bound, 'g')} for {most}"
    got = f"got by {how_many(sum(good, []))}"
    if any(0 < sum(of_split) < len(of_split) for of_split in good):
        got += ", so the seed decides"
    return Verdict(word, spreads(task, groups), sentences(wanted, got, note))


def does_not(task, groups, *, note=""):
    """Whether rivals fail at a task, by the same bounds. It holds if no run gets past the miss,
    fails if one gets to the bound, and is in part between. Not judged where a run has not learnt
    its training part."""
    runs = sum(groups, [])
    best = best_of(task, scores(runs))
    learnt = " / ".join(task.form(median(run["train"] for run in of_split)) for of_split in groups)
    if not all(task.better(run["train"], task.learnt) for run in runs):
        why = f"the rival has not learnt its training part, {learnt}"
        return not_judged(spreads(task, groups), why)
    if task.better(best, task.bound):
        word = "fails"
    else:
        word = "in part" if gets_past_missed(task, best) else "holds"
    wanted = f"wanted: not past {task.form(task.missed, 'g')}"
    return Verdict(word, spreads(task, groups), sentences(wanted, f"training part {learnt}", note))


def seconds_to(run, level):
    """The core-seconds after which a run first had a score, infinity if it never had."""
    return next((seconds for _, seconds, score in run["curve"] if score >= level), math.inf)


def not_in_time(task, times, rivals, ours):
    """Whether rivals fail at a task in so many times the core-seconds that CoordConv takes. rivals
    and ours are lists of runs for each split. Not judged where CoordConv does not get there, where
    the rival's run is too short, and where the rival learns nothing later either."""
    then = []
    for rival_runs, our_runs in zip(rivals, ours):
        spent = median(run["seconds"] for run in our_runs)
        if not task.better(median(scores(our_runs)), task.bound):
            return not_judged("-", "CoordConv does not get there")
        for run in rival_runs:
            after = [score for _, seconds, score in run["curve"] if seconds >= times * spent]
            if not after:
                return not_judged("-", f"the rival ran less than {times} times as long")
            then.append([{**run, "score": after[0]}])
    ends = " / ".join(task.form(run["score"]) for runs in rivals for run in runs)
    longest = " / ".join(f"{run['seconds']:.0f} s" for runs in rivals for run in runs)
    return does_not(task, then, note=f"in the end {ends}, after {longest}")


def stays_below(form, limits, *groups, recipes, learnt=0.2):
    """Whether rivals stay below the paper's figures, a limit for each split. The runs may be of
    several recipes, and the best counts; recipes says which of the paper's were run. Not judged
    where none has learnt its training part."""
    ends = []
    notes = []
    for split in SPLITS:
        runs = [run for runs in groups for run in runs if run["recipe"]["split"] == split]
        if not runs:
            return not_judged("-", f"no run on the {split} split")
        best = max(runs, key=lambda run: run["score"])
        ends.append(best["score"])
        ever = max(score for run in runs for *_, score in run["curve"])
        notes.append(
            f"{split}: best ever {form(ever)}, training part {form(best['train'])}, "
            f"{best['seconds']:,.0f} s"
        )
        if max(run["train"] for run in runs) <= learnt:
            figure = " / ".join(map(form, ends))
            return not_judged(figure, f"the rival has not learnt its training part; {notes[-1]}")
    word = word_of([x <= limits[split] for x, split in zip(ends, SPLITS)])
    return Verdict(word, " / ".join(map(form, ends)), sentences(recipes, *notes))


LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.86)


def times_faster(rivals, *ours, claimed=150, least=10):
    """How many times sooner CoordConv has each level that both sides reach, by its best recipe. It
    holds if that is what is claimed at the highest of them, fails if it is less than least there,
    and is in part between."""
    ratios = {}
    for level in LEVELS:
        slow = min(seconds_to(run, level) for run in rivals)
        fast = min(median(seconds_to(run, level) for run in runs) for runs in ours if runs)
        if slow < math.inf and fast < math.inf:
            ratios[level] = slow / fast
    if not ratios:
        return not_judged("-", f"no level, from {percent(LEVELS[0], 'g')} on, that both reach")
    last = list(ratios.values())[-1]
    word = "fails" if last < least else "in part" if last < claimed else "holds"
    by_level = ", ".join(f"{ratio:.2g} at {100 * x:.0f} %" for x, ratio in ratios.items())
    figure = f"{min(ratios.values()):.2g} to {max(ratios.values()):.2g} times"
    wanted = f"wanted: {claimed} at the highest level that both reach, in part from {least} on"
    return Verdict(word, figure, sentences(wanted, f"by level: {by_level}"))


def at_most(limit, whose, runs):
    """Whether the geometric mean over the shapes is at most so many times another's time."""
    (run,) = runs
    shapes = f"{run['shapes']} of {len(SHAPES)} shapes"
    note = f"geometric mean of {shapes} on one core; worst {run['worst']:.2f}"
    word = "holds" if run["score"] <= limit else "fails"
    return Verdict(word, f"{run['score']:.2f} of {whose} time", note)


# CAN IT BE DONE WITHOUT TRAINING? ----------------------------------------------------------------


def listing(image):
    """The critic's listing, line by line: [row, col] of the pixel of an image (H, W) that is 1."""
    from scipy.signal import convolve2d  # 0.3 s that few processes need to spend

    height, width = image.shape

    # X and Y hold each pixel's column and row
    X = np.zeros((height, width))
    Y = np.zeros((height, width))
    for x in range(width):
        X[:, x] = x
    for y in range(height):
        Y[y, :] = y

    # three kernels, of which only the centre is not zero
    op1 = np.zeros((3, 3))
    opx = np.zeros((3, 3))
    opy = np.zeros((3, 3))
    op1[1, 1] = -1
    opx[1, 1] = width
    opy[1, 1] = height

    # one convolution over the three channels
    DY = convolve2d(image, opy, mode="same") + convolve2d(Y, op1, mode="same")
    DX = convolve2d(image, opx, mode="same") + convolve2d(X, op1, mode="same")

    # one nonlinearity
    DY[DY < 0] = 0
    DX[DX < 0] = 0

    # one sum, one subtraction
    result_y = height - DY.sum()
    result_x = width - DX.sum()
    return [float(result_y), float(result_x)]


SIZES = ((70, 100), (64, 64), (33, 2), (1, 9), (5, 1))


@experiment("wired", once=True, cost=0.9)
def wired(seed, xp):
    """Whether networks wired by hand, and their closed forms, read and draw every position."""
    read = []
    drawn = []
    for H, W in SIZES:
        reader = cr.decoder_network((H, W), xp=xp)
        drawer = cr.encoder_network((H, W), xp=xp)
        for row in range(H):
            at = np.stack([np.full(W, row), np.arange(W)], axis=1).astype(np.float32)
            image = np.zeros((W, 1, H, W), np.float32)
            image[range(W), 0, row, range(W)] = 1
            at = xp.asarray(at)
            image = xp.asarray(image)
            read.append((cr.decode(image) == at).all())
            read.append((cr.forward(reader, image)[0] == at).all())
            drawn.append((cr.encode(at, (H, W)) == image).all())
            drawn.append((cr.forward(drawer, at[:, :, None, None])[0] == image).all())
    positions = sum(H * W for H, W in SIZES)
    return {"positions": positions, "reads": bool(all(read)), "draws": bool(all(drawn))}


def at_every_position(run, good):
    """The verdict on what must be right at every position."""
    some = "" if good else "not "
    return Verdict("holds" if good else "fails", f"{some}all of {run['positions']:,} positions")


@row("reads", WITHOUT_TRAINING, "wired by hand it reads every pixel", "critic", "wired")
def reads(runs):
    """By the network, and by the closed form of what it computes."""
    (run,) = runs
    return at_every_position(run, run["reads"])


@row("draws", WITHOUT_TRAINING, "wired by hand it draws every pixel", "critic", "wired")
def draws(runs):
    """The other way round."""
    (run,) = runs
    return at_every_position(run, run["draws"])


@experiment("listed", once=True, cost=0.9)
def listed(seed, xp):
    """What the listing gives: for one-hot images, for two pixels, half a one and none. Beside it
    what decoder_network gives for the latter, and the last position that its demo draws."""
    H, W = 70, 100
    asked = [(y, x) for y in range(0, H, 7) for x in range(0, W, 7)]
    asked += [(y, W - 1) for y in range(H)] + [(H - 1, x) for x in range(W)]
    right = [listing(cr.encode(np.array([at]), (H, W))[0, 0]) == [*at] for at in asked]

    others = np.zeros((3, 1, H, W), np.float32)
    others[0, 0, 10, 20] = others[0, 0, 30, 70] = 1
    others[1, 0, 10, 20] = 0.5
    network, _ = cr.forward(cr.decoder_network((H, W), xp=xp), xp.asarray(others))
    draw = np.random.RandomState(0).randint  # as in the demo, randint(0, size - 1)
    return {
        "asked": len(asked),
        "right": sum(right),
        "others": [listing(image[0]) for image in others],
        "network": cr.to_numpy(network).tolist(),
        "last drawn": [int(draw(0, n - 1, 10**6).max()) for n in (H, W)],
        "last": [H - 1, W - 1],
    }


@row("listing", WITHOUT_TRAINING, "the critic's listing reads one-hot images", "critic", "listed")
def listing_reads(runs):
    """He claimed no more; the note says what it does beyond that."""
    (run,) = runs
    two, half, blank = run["others"]
    return Verdict(
        "holds" if run["right"] == run["asked"] else "fails",
        "one-hot images only",
        f"right at {run['right']} of {run['asked']} positions, the last row and column too, "
        f"which its demo never draws (it ends at {run['last drawn']} of {run['last']}); gives "
        f"{two} for two pixels, {half} for one of .5, {blank} for none",
    )


@row("same", WITHOUT_TRAINING, "the critic's network is a CoordConv", "coordref", "listed")
def same_network(runs):
    """A coord_conv, a rectifier, a sum and an affine map give the listing's numbers."""
    (run,) = runs
    word = "holds" if run["others"] == run["network"] else "fails"
    return Verdict(word, "the listing's numbers", "for images that are not one-hot, too")


@experiment("as feature", once=True, cost=0.1)
def as_feature(seed, xp):
    """The largest error of coord_conv and its gradients against conv after add_coords."""
    rng = np.random.default_rng(0)
    errors = []
    for size in ((40,), (9, 14), (5, 6, 7)):
        K = len(size)
        x = xp.asarray(rng.standard_normal((3, 4, *size)))
        w = xp.asarray(rng.standard_normal((5, 4 + K, *(3,) * K)))
        b = xp.asarray(rng.standard_normal(5))
        dy = xp.asarray(rng.standard_normal((3, 5, *size)))
        more = cr.add_coords(x)
        dmore, dw, db = cr.conv_backward(dy, more, w, b, padding=1)
        wanted = [cr.conv(more, w, b, padding=1), cr.add_coords_backward(dmore, x), dw, db]
        found = [cr.coord_conv(x, w, b, padding=1)]
        found += cr.coord_conv_backward(dy, x, w, b, padding=1)
        errors += [float(abs(a - a_0).max() / abs(a_0).max()) for a, a_0 in zip(found, wanted)]
    return {"score": max(errors)}


@row("feature", WITHOUT_TRAINING, "CoordConv is conv on 2 added features", "critic", "as feature")
def only_features(runs):
    """Up to rounding, in float64."""
    (run,) = runs
    word = "holds" if run["score"] < 1e-12 else "fails"
    return Verdict(word, f"to {run['score']:.0e}, gradients too")


# THE RIVALS: the paper's networks without coordinates --------------------------------------------
# Parameters as published or counted: 103,585 for deconv_painter at a kernel of 3, 72,850 and
# 12,914 for the two of conv_regressor.


def conv_layer(C, F, kernel, *, op=cr.conv, rng, xp=np, **options):
    """A convolution with He weights and zero biases."""
    channels = (C, F) if op is cr.conv_transpose else (F, C)
    w = cr.he_normal((*channels, kernel, kernel), rng=rng, xp=xp)
    return Layer(op, [w, xp.zeros(F, np.float32)], {"padding": "same"} | options)


def norm_layer(C, xp=np):
    """A batch_norm that keeps a mean and a variance, 0 and 1 until training updates them."""
    scale = xp.ones(C, np.float32)
    shift = xp.zeros(C, np.float32)
    kept = {"mean": xp.zeros(C, np.float32), "var": xp.ones(C, np.float32)}
    return Layer(cr.batch_norm, [scale, shift], kept)


def deconv_painter(*, kernel=3, width=1, rng=None, xp=np):
    """From a coordinate (N, 2, 1, 1) to the logits of a pixel map (N, 1, 64, 64).

    Six transposed convolutions of stride 2 with 64, 64, 64, 32, 32 and 1 filters, batch norm and a
    rectifier after each but the last. The paper tries kernels of 2, 3, 4 and widths of 1, 2, 3.
    """
    rng = np.random.default_rng(rng)
    width = int(width)  # a number of 8 bits would overflow
    channels = [2, *(width * c for c in (64, 64, 64, 32, 32)), 1]
    net = []
    for C, F in itertools.pairwise(channels):
        net.append(conv_layer(C, F, kernel, op=cr.conv_transpose, stride=2, rng=rng, xp=xp))
        net += [norm_layer(F, xp), Layer(cr.relu)]
    return net[:-2]


def conv_regressor(split, *, width=1, rng=None, xp=np):
    """From a one-hot image (N, 1, 64, 64) to its coordinate (N, 2). For "uniform" four 3x3
    convolutions of 16 filters, pools between them, and two dense layers; for "quadrant" nine
    convolutions and rectifiers, two norms and a global mean."""
    c = 16 * int(width)
    layer = partial(conv_layer, rng=np.random.default_rng(rng), xp=xp)
    relu = Layer(cr.relu)
    if split == "uniform":
        pool = Layer(cr.max_pool, options={"kernel": 2})
        net = [layer(1, c, 3), relu, pool, layer(c, c, 3), relu, pool, layer(c, c, 3), relu, pool]
        net += [layer(c, c, 3), relu]
        net += [layer(c, 4 * c, 8, padding=0), relu]  # dense, as the kernel covers all of 8x8
        return [*net, layer(4 * c, 2, 1), Layer(cr.sum_pool)]  # of one pixel, to (N, 2)
    net = [layer(1, c, 5, stride=2), relu]
    net += [layer(c, c, 1), relu, norm_layer(c, xp)]  # the rectifier first
    net += [layer(c, c, 3), relu]
    net += [layer(c, c, 3, stride=2), relu]
    net += [layer(c, c, 3, stride=2), norm_layer(c, xp), relu]  # the norm first, as published
    net += [layer(c, c, 3, stride=2), relu]
    net += [layer(c, c, 1), relu]
    net += [layer(c, c, 3, stride=2), relu]
    return [*net, layer(c, 2, 3), relu, Layer(cr.mean_pool)]


# TRAININGS ---------------------------------------------------------------------------------------

LOSSES = {
    "classification": cr.softmax_cross_entropy,
    "rendering": cr.sigmoid_cross_entropy,
    "regression": cr.mean_squared_error,
}
SCORES = {"classification": cr.accuracy, "rendering": cr.iou, "regression": cr.distance}


def tested(net, part, every, task):
    """The score on some examples of a part of the data; a distance is in pixels."""
    score = cr.evaluate(net, part.x[::every], part.target[::every], score=SCORES[task])
    return 64 * score if task == "regression" else score


def trained(net, data, seed, *, task, steps, learning_rate, test_every=4, **options):
    """The network after a training with a rate that falls to 0, and its run. Some of the test
    examples count; the points of the curve, [step, core-seconds, score], are of every 24th."""
    train, test = data
    marks = {round(steps / 1.6**k) for k in range(6)}
    curve = []
    testing = 0.0
    start = time.process_time()
    for state in cr.train(
        cr.initial_state(net, seed=seed),
        train.x,
        train.target,
        loss=LOSSES[task],
        steps=steps,
        learning_rate=lambda step: learning_rate * (1 - step / steps),
        **options,
    ):
        if state.step in marks:
            now = time.process_time()
            seconds = now - start - testing
            every = test_every if state.step == steps else 24
            curve.append([state.step, seconds, tested(state.net, test, every, task)])
            testing += time.process_time() - now
    run = {"score": curve[-1][2], "seconds": seconds, "curve": curve}
    return state.net, run


def painted_right(net, xp, scale="unit"):
    """Which of the data set's positions, in the order of all_positions, a painter paints right, as
    hexadecimal digits of a bit for each."""
    at = all_positions()
    x = at if scale == "pixel" else (2 * at - 63) / 63
    right = []
    for few, image in zip(np.split(x, 784), np.split(cr.encode(at, (64, 64)), 784)):
        y, _ = cr.forward(net, xp.asarray(few.astype(np.float32)[:, :, None, None]))
        right += cr.to_numpy(cr.accuracy(y, xp.asarray(image))).tolist()
    return np.packbits(np.array(right) > 0).tobytes().hex()


def all_positions():
    """The positions of the data set, both parts, (3136, 2)."""
    return np.concatenate([part.coords for part in cr.not_so_clevr("quadrant")])


# COORDINATE TO PIXEL, COORDINATE TO SQUARE -------------------------------------------------------

SHORT_MEMORY = {"beta1": 0.7, "beta2": 0.95}  # of Adam's moments: most of these trainings need it
PAINTER = {"task": "classification", "test_every": 6} | SHORT_MEMORY
RELATIVE = PAINTER | {"start": "relative", "steps": 80, "batch_size": 4, "learning_rate": 0.008}
HE_NORMAL = PAINTER | {"start": "he", "steps": 300, "batch_size": 4, "learning_rate": 0.015}
CUT = {"steps": 6, "test_every": 32}

OURS = ("pixel", "CoordConv, our start")
HE = ("pixel", "CoordConv, he_normal")


@on_both_splits("relative", cost=5, drawn=OURS, **RELATIVE)
@on_both_splits("he", cost=10, drawn=HE, quick=CUT, quadrant={"steps": 500}, **HE_NORMAL)
def painted(seed, xp, *, split, start, picture=False, **recipe):
    """Coordinate to pixel by CoordConv; and to square, by the same painter with the renderer's
    tail behind it. The tail, whose work is the same everywhere, is trained alone on a canvas of
    20, and the two are joined."""
    renderer = cr.coordconv_renderer(start=start, rng=seed, xp=xp)
    ops = [layer.op for layer in renderer]
    joint = ops.index(cr.softmax)
    painter, run = trained(renderer[:joint], cr.not_so_clevr(split, xp=xp), seed, **recipe)

    start_of_tail = time.process_time()
    tail = trained_tail(renderer[joint + 1 :], seed, xp)
    run["square seconds"] = run["seconds"] + time.process_time() - start_of_tail
    _, test = cr.not_so_clevr(split, "rendering", xp=xp)
    run["iou"] = tested([*painter, renderer[joint], *tail], test, 16, "rendering")
    if picture:
        run["painted right"] = painted_right(painter, xp)
    return run


def trained_tail(tail, seed, xp, steps=200):
    """Five convolutions that have learnt to draw a square around a hot pixel."""
    train, _ = cr.not_so_clevr("uniform", "rendering", canvas=20, xp=xp)
    hot_pixels = cr.encode(xp.asarray(train.coords), (20, 20))
    for state in cr.train(  # noqa: B007
        cr.initial_state(tail, seed=seed),
        hot_pixels,
        train.target,
        loss=cr.sigmoid_cross_entropy,
        steps=steps,
        batch_size=4,
        learning_rate=lambda step: 0.01 * (1 - step / steps),
    ):
        pass
    return state.net


DECONV = {"task": "classification", "steps": 1000, "batch_size": 24, "learning_rate": 0.02}
DECONV |= SHORT_MEMORY
SQUARE_DECONV = {"task": "rendering", "steps": 360, "batch_size": 16, "learning_rate": 0.005}
SQUARE_DECONV |= SHORT_MEMORY
RIVAL = {"once": True, "quick": CUT}
PIXEL_RIVAL = ("pixel", "without coordinates")
SQUARE_RIVAL = ("square", "without coordinates")


@on_both_splits("deconv", cost=25, drawn=PIXEL_RIVAL, quadrant={"steps": 800}, **RIVAL, **DECONV)
@on_both_splits("square deconv", cost=7, drawn=SQUARE_RIVAL, **RIVAL, **SQUARE_DECONV)
def deconvolved(seed, xp, *, split, task, picture=False, **recipe):
    """Coordinate to pixel, or to square, by the rival."""
    data = cr.not_so_clevr(split, task, xp=xp)
    net = deconv_painter(kernel=2, rng=seed, xp=xp)
    net, run = trained(net, data, seed, task=task, **recipe)
    run["train"] = tested(net, data[0], 12, task)
    if picture:
        run["painted right"] = painted_right(net, xp)
    return run


def squares(runs):
    """Runs of a painter, with the IoU of the squares that its renderer draws as their score."""
    return [{**run, "score": run["iou"], "seconds": run["square seconds"]} for run in runs]


@row("pixel-uniform", PIXEL, "CoordConv paints the pixel, uniform", "paper", "he uniform")
def paints_uniform(runs):
    """From the paper's start."""
    return does(PAINTS, [runs])


@row("pixel-quadrant", PIXEL, "CoordConv paints the pixel, quadrant", "paper", "he quadrant")
def paints_quadrant(runs):
    """On this split not every seed gets there, whatever the recipe."""
    return does(PAINTS, [runs], share=2 / 3)


@row("pixel-relative", PIXEL, "our relative start does on both splits", "coordref", "relative *")
def relative_paints(uniform, quadrant):
    """For every seed."""
    return does(PAINTS, [uniform, quadrant])


@row("pixel-deconv", PIXEL, "a deconvolution does not in that time", "paper", "deconv *", "he *")
def deconv_is_late(deconv_uniform, deconv_quadrant, he_uniform, he_quadrant):
    """In the time of CoordConv from the paper's start."""
    rivals = [deconv_uniform, deconv_quadrant]
    return not_in_time(PAINTS, 1, rivals, [he_uniform, he_quadrant])


@row(
    "pixel-deconv-longer",
    PIXEL,
    "nor in ten times our start's time",
    "paper",
    "deconv *",
    "relative *",
)
def deconv_is_later(deconv_uniform, deconv_quadrant, our_uniform, our_quadrant):
    """In ten times the time of CoordConv from the relative start."""
    rivals = [deconv_uniform, deconv_quadrant]
    return not_in_time(PAINTS, 10, rivals, [our_uniform, our_quadrant])


@row("square-he", SQUARE, "CoordConv draws the square, both splits", "paper", "he *")
def he_draws(uniform, quadrant):
    """As far as its painter paints."""
    apart = "by IoU; painter and tail trained apart, then joined"
    return does(DRAWS, [squares(uniform), squares(quadrant)], share=2 / 3, note=apart)


@row(
    "square-relative", SQUARE, "our relative start draws it, both splits", "coordref", "relative *"
)
def relative_draws(uniform, quadrant):
    """For every seed."""
    apart = "by IoU; painter and tail trained apart, then joined"
    return does(DRAWS, [squares(uniform), squares(quadrant)], note=apart)


PAPERS_IOU = {"uniform": 0.835, "quadrant": 0.365}  # .83 and .36 are rounded


@row("square-deconv", SQUARE, "a deconvolution stays below .83 / .36", "paper", "square deconv *")
def deconv_draws_less(uniform, quadrant):
    """The paper's figures are the best of 648 trainings."""
    short = "by IoU; a short training, none of the paper's 648"
    return stays_below(iou_text, PAPERS_IOU, uniform, quadrant, recipes=short)


# IMAGE TO COORDINATE -----------------------------------------------------------------------------

SALIENT = {"steps": 80, "batch_size": 4, "learning_rate": 0.008, "beta1": 0.5, "start": "salient"}
READER_HE = {"steps": 500, "batch_size": 1, "learning_rate": 0.008, "beta1": 0.5, "start": "he"}
OUR_READER = ("coordinate", "CoordConv, our start")
HE_READER = ("coordinate", "CoordConv, he_normal")


@on_both_splits("salient", drawn=OUR_READER, **SALIENT)
@on_both_splits("reader", cost=3, drawn=HE_READER, quick=CUT, **READER_HE)
def read(seed, xp, *, split, start, **recipe):
    """Image to coordinate by CoordConv."""
    net = cr.coordconv_regressor(rng=seed, xp=xp)
    if start == "salient":
        net = salient(net, xp)
    data = cr.not_so_clevr(split, "regression", xp=xp)
    _, run = trained(net, data, seed, task="regression", **recipe)
    return run


def salient(net, xp, size=64, height=3, slope=0.1):
    """A start of ours for the regressor: the hot pixel stands out by height, and the rest is
    nearly flat. The network is linear up to its maximum, so two images, one blank and one with a
    hot pixel, show all that it does. Its first and its last convolution are scaled."""
    hot = cr.encode(xp.asarray([[size // 2, size // 2]]), (size, size))
    linear = net[:-1]
    blank = cr.to_numpy(cr.forward(linear, 0 * hot)[0]).reshape(2, -1)
    seen = cr.to_numpy(cr.forward(linear, hot)[0]).reshape(2, -1)
    stamp = seen - blank
    peaks = stamp[[0, 1], abs(stamp).argmax(axis=1)]
    flatter = slope * min(abs(peaks) / np.ptp(blank, axis=1))

    w, b = net[0].params
    w = w * xp.asarray([[[1]], [[flatter]], [[flatter]]], np.float32)
    w_last, b_last = net[-2].params
    w_last = w_last * xp.asarray((height / peaks)[:, None, None, None], np.float32)
    b_last = b_last + np.float32(0.5 - height)
    first = net[0]._replace(params=[w, b])
    last = net[-2]._replace(params=[w_last, b_last])
    return [first, *net[1:-2], last, net[-1]]


RIVAL_READER = {"steps": 400, "batch_size": 4, "learning_rate": 0.004}
LONGER = {"steps": 650}
READER_RIVAL = ("coordinate", "without coordinates")


@on_both_splits(
    "conv reader", cost=6, drawn=READER_RIVAL, quadrant=LONGER, **RIVAL, **RIVAL_READER
)
def read_by_rival(seed, xp, *, split, **recipe):
    """Image to coordinate by the convolutional network that the paper has for this split."""
    data = cr.not_so_clevr(split, "regression", xp=xp)
    net = conv_regressor(split, rng=seed, xp=xp)
    net, run = trained(net, data, seed, task="regression", **recipe)
    run["train"] = tested(net, data[0], 12, "regression")
    return run


@row("coord-he", COORDINATE, "one CoordConv net reads the coordinate", "paper", "reader *")
def he_reads(uniform, quadrant):
    """From the paper's start."""
    return does(READS, [uniform, quadrant], note="above 5 px counts as a miss")


@row("coord-salient", COORDINATE, "from our salient start for every seed", "coordref", "salient *")
def salient_reads(uniform, quadrant):
    """By the same bounds."""
    return does(READS, [uniform, quadrant])


@row(
    "coord-conv-uniform",
    COORDINATE,
    "a convolution reads it, uniform split",
    "paper",
    "conv reader uniform",
)
def conv_reads_uniform(runs):
    """By the same bounds; the published length is in --full."""
    return does(READS, [runs], note="--full has the published length")


@row(
    "coord-conv-quadrant",
    COORDINATE,
    "a convolution does not, quadrant split",
    "paper",
    "conv reader quadrant",
)
def conv_misses_quadrant(runs):
    """By the same bounds."""
    return does_not(READS, [runs])


# IS IT FASTER, AND SMALLER? ----------------------------------------------------------------------


@row(
    "factor", FASTER, "CoordConv learns 150 times faster", "paper", "deconv uniform", "he uniform"
)
def faster(rivals, ours):
    """From the curves of the default table."""
    return times_faster(rivals, ours)


def weights(net):
    """The number of parameters, those of networks among a layer's options included."""
    count = 0
    for layer in net:
        count += sum(p.size for p in layer.params)
        count += sum(weights(part) for part in layer.options.values() if isinstance(part, list))
    return count


@experiment("sizes", once=True, cost=0.5)
def sizes(seed, xp):
    """Parameters of CoordConv's painter, and of the paper's nine deconvolutions."""
    rivals = [
        weights(deconv_painter(kernel=kernel, width=width, rng=0))
        for kernel in (2, 3, 4)
        for width in (1, 2, 3)
    ]
    return {"ours": weights(cr.coordconv_painter(rng=0)), "rivals": rivals}


@row("parameters", FASTER, "with 10 to 100 times fewer parameters", "paper", "sizes")
def fewer_parameters(runs):
    """More than a hundred times is no objection; fewer than ten times is one."""
    (run,) = runs
    ratios = [rival / run["ours"] for rival in run["rivals"]]
    ten = [ratio >= 10 for ratio in ratios]
    hundred = sum(ratio > 100 for ratio in ratios)
    return Verdict(
        word_of(ten),
        f"{min(ratios):.0f} to {max(ratios):.0f} times",
        f"at least ten times in {sum(ten)} of {len(ten)} of the paper's deconvolutions, above a "
        f"hundred in {hundred}; CoordConv has {run['ours']:,} parameters",
    )


# WHY DID IMAGENET GAIN NOTHING? ------------------------------------------------------------------


def residual(x, main, short):
    """The op of a residual block; it is only used forward."""
    return cr.forward(main, x)[0] + cr.forward(short, x)[0]


def resnet_50(rng, xp):
    """ResNet-50 for 1000 classes. The dense layer is a convolution that the mean follows."""

    def conv(C, F, k=1, stride=1):
        w = rng.standard_normal((F, C, k, k), dtype=np.float32) * np.float32((C * k * k) ** -0.5)
        return Layer(cr.conv, [xp.asarray(w)], {"stride": stride, "padding": k // 2})

    def norm(F):
        return Layer(cr.batch_norm, [xp.ones(F, np.float32), xp.zeros(F, np.float32)])

    relu = Layer(cr.relu)
    pool = Layer(cr.max_pool, options={"kernel": 3, "stride": 2, "padding": 1})
    net = [conv(3, 64, 7, 2), norm(64), relu, pool]
    C = 64
    for F, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if F > 64 and block == 0 else 1  # at the 3x3, as in PyTorch
            main = [conv(C, F), norm(F), relu]
            main += [conv(F, F, 3, stride), norm(F), relu]
            main += [conv(F, 4 * F), norm(4 * F)]
            short = [conv(C, 4 * F, 1, stride), norm(4 * F)] if block == 0 else []
            net += [Layer(residual, options={"main": main, "short": short}), relu]
            C = 4 * F
    dense = Layer(cr.conv, [*conv(C, 1000).params, xp.zeros(1000, np.float32)])
    return [*net, dense, Layer(cr.mean_pool)]


@experiment("resnet", once=True, cost=2)
def resnet(seed, xp):
    """ResNet-50, and with the paper's layer of 8 filters and a radius before its first layer."""
    rng = np.random.default_rng(0)
    plain = resnet_50(rng, xp)
    w = cr.he_normal((8, 3 + 3, 1, 1), rng=rng, xp=xp)
    coords = Layer(cr.coord_conv, [w, xp.zeros(8, np.float32)], {"radius": True})
    first = plain[0]._replace(params=[cr.he_normal((64, 8, 7, 7), rng=rng, xp=xp)])
    more = [coords, first, *plain[1:]]
    x = xp.asarray(rng.standard_normal((1, 3, 64, 64)), np.float32)
    ends = [float(cr.forward(net, x)[0].sum()) for net in (plain, more)]
    return {
        "plain": weights(plain),
        "more": weights(more) - weights(plain),
        "finite": all(math.isfinite(end) for end in ends),
    }


@row("resnet", IMAGENET, "ResNet-50 runs with them and without", "article", "resnet")
def resnet_runs(runs):
    """That it can be built is all that is shown here; what ImageNet says stands in the note."""
    (run,) = runs
    return Verdict(
        "holds" if run["plain"] == 25_557_032 and run["finite"] else "fails",
        f"{run['plain']:,} parameters",
        f"{run['more']:,} more with coordinates before the first layer, as in the paper, which "
        "reports a top-5 gain of 0.04 % over five runs, not significant; here it is built and run "
        "forward, not trained",
    )


# The control: a textured patch on an image of zeros. Its class is its quadrant or its texture. Out
# of reach of the border only coordinates tell where it is; zero padding does in part (Islam et al.
# 2020).
TEXTURES = np.sign(np.random.RandomState(1).standard_normal((4, 5, 5)))
CORNERS = np.array([0, 1, 2, 5, 6, 7])  # the quadrant of a patch is never in doubt
AREA = 12
TESTED = 64 * 4  # patches, each at its four mirrored places


def patches(kind, at, margin, rng):
    """Images of a patch each, of these textures at these corners, with noise on the patch."""
    N = len(kind)
    side = AREA + 2 * margin
    x = np.zeros((N, 1, side, side), np.float32)
    rows = margin + at[:, :1, None] + np.arange(5)[:, None]
    cols = margin + at[:, 1:, None] + np.arange(5)
    patch = TEXTURES[kind] * rng.uniform(1, 2, (N, 1, 1))
    x[np.arange(N)[:, None, None], 0, rows, cols] = patch + 0.4 * rng.standard_normal(patch.shape)
    return x


def quadrant_of(at):
    """0 to 3 for the corners (N, 2) of patches."""
    return (at > 3) @ [2, 1]


def corners(kind, training, rng):
    """Corners for patches to train on. They lie "anywhere"; or, "biased", texture k lies in
    quadrant k; or they are then "shifted" around the area by a random amount."""
    at = rng.choice(CORNERS, (len(kind), 2))
    if training != "anywhere":
        far = np.stack([kind > 1, kind % 2 > 0], axis=1)
        at = np.where(far, np.maximum(at, 7 - at), np.minimum(at, 7 - at))
    if training == "shifted":
        at = (at + rng.integers(0, 8, at.shape)) % 8
    return at


def control_network(coords, padding, rng, xp):
    """Four convolutions and a mean over the image; with coordinates the first is a CoordConv."""
    net = []
    for F, C, k in ((16, 1, 3), (16, 16, 3), (16, 16, 1), (4, 16, 1)):
        op = cr.coord_conv if coords and not net else cr.conv
        K = 2 if op is cr.coord_conv else 0
        w = cr.he_normal((F, C + K, k, k), rng=rng, xp=xp)
        net += [Layer(op, [w, xp.zeros(F, np.float32)], {"padding": padding}), Layer(cr.relu)]
    return [*net[:-1], Layer(cr.mean_pool)]


PLACE = {"label": "quadrant", "coords": False}
TEXTURE = {"label": "texture", "coords": False}
COORDS = {"coords": True}
BIASED = {"training": "biased"}


@experiment("place", once=True, **PLACE)
@experiment("place coords", **PLACE | COORDS)
@experiment("place padding", padding="same", steps=700, **PLACE)
@experiment("texture", cost=2, quick={"steps": 20}, steps=700, **TEXTURE)
@experiment("texture coords", cost=2, quick={"steps": 20}, steps=700, **TEXTURE | COORDS)
@experiment("biased", once=True, **TEXTURE | BIASED)
@experiment("biased coords", **TEXTURE | COORDS | BIASED)
@experiment("shifted coords", steps=700, training="shifted", **TEXTURE | COORDS)
def control(seed, xp, *, label, coords, padding="valid", training="anywhere", steps=500):
    """How often a network tells the class of patches at places mirrored to all quadrants; after a
    training with a bias, of those patches for which it does not hold."""
    margin = 0 if padding == "same" else 4
    rng = np.random.default_rng(seed)
    net = control_network(coords, padding, rng, xp)
    kind = rng.integers(0, 4, 4 * steps)
    at = corners(kind, training, rng)
    wanted = quadrant_of(at) if label == "quadrant" else kind
    start = time.process_time()
    for state in cr.train(  # noqa: B007
        cr.initial_state(net, seed=seed),
        xp.asarray(patches(kind, at, margin, rng)),
        xp.eye(4, dtype=np.float32)[xp.asarray(wanted)],
        steps=steps,
        batch_size=4,
        learning_rate=lambda step: 0.006 * (1 - step / steps),
    ):
        pass
    seconds = time.process_time() - start

    right = []
    kind = np.arange(64) % 4
    at = rng.choice(CORNERS, (64, 2))
    for mirror in itertools.product((False, True), repeat=2):
        there = np.where(mirror, 7 - at, at)
        x = patches(kind, there, margin, np.random.default_rng([seed, 1]))
        y, _ = cr.forward(state.net, xp.asarray(x))
        wanted = quadrant_of(there) if label == "quadrant" else kind
        told = cr.to_numpy(y).argmax(axis=1) == wanted
        asked = (kind != quadrant_of(there)) | (training == "anywhere")
        right += told[asked].tolist()
    return {"score": fmean(right), "seconds": seconds}


CHANCE = 0.25
# Three standard deviations of a score on the test images: of guesses, and of a network that is
# right in 98 of 100.
ABOVE_CHANCE = CHANCE + 3 * math.sqrt(CHANCE * (1 - CHANCE) / TESTED)
BELOW_ALL = 3 * math.sqrt(0.98 * 0.02 / (TESTED * 3 // 4))
ALL = 1 - BELOW_ALL


@row(
    "texture",
    IMAGENET,
    "no gain where the class is no place",
    "article",
    "texture coords",
    "texture",
)
def no_gain(with_coords, without):
    """The difference of the means, against the seeds' spread."""
    ours = scores(with_coords)
    theirs = scores(without)
    figure = f"{spread(ours)}, {spread(theirs)} without"
    if min(fmean(ours), fmean(theirs)) < ABOVE_CHANCE:
        return not_judged(figure, "a network that guesses shows no gain")
    gain = fmean(ours) - fmean(theirs)
    noise = max(2 * math.sqrt((np.var(ours) + np.var(theirs)) / len(ours)), 1 / TESTED)
    word = "holds" if gain <= noise else "fails"
    note = (
        f"wanted: no more than {100 * noise:.1f} % better, two standard errors of the seeds or a"
    )
    return Verdict(word, figure, f"{note} test image; it is {100 * gain:.1f} %")


@row("place", IMAGENET, "coordinates decide where it is one", "coordref", "place coords", "place")
def place_decides(with_coords, without):
    """A network that cannot know the place is at chance to the last image."""
    figure = f"{spread(scores(with_coords))}, {spread(scores(without))} without"
    good = [x >= ALL for x in scores(with_coords)]
    blind = [x == CHANCE for x in scores(without)]
    word = word_of(good) if all(blind) else "fails"
    note = f"wanted: {percent(ALL, '.0f')} for every seed; without, 25 % exactly, which is chance"
    return Verdict(word, figure, f"{note}; no border is in reach")


@row("padding", IMAGENET, "zero padding in reach leaks the place", "coordref", "place padding")
def padding_leaks(runs):
    """Above chance by more than guesses are."""
    word = word_of([x > ABOVE_CHANCE for x in scores(runs)])
    note = (
        f"wanted: above {percent(ABOVE_CHANCE, '.0f')}, chance and three standard deviations of it"
    )
    return Verdict(word, spread(scores(runs)), note)


@row("bias", IMAGENET, "coordinates learn a bias of the data", "coordref", "biased coords")
def bias_is_learnt(runs):
    """Tested where the bias does not hold."""
    word = word_of([x < ALL for x in scores(runs)])
    note = (
        f"wanted: below {percent(ALL, '.0f')} for every seed, three standard deviations from 98 %"
    )
    return Verdict(word, spread(scores(runs), worst=max), f"{note}; where the bias does not hold")


@row("shifts", IMAGENET, "random shifts in training wipe it out", "article", "shifted coords")
def shifts_help(runs):
    """The same training with its patches shifted."""
    note = f"wanted: {percent(ALL, '.0f')} for every seed"
    return Verdict(word_of([x >= ALL for x in scores(runs)]), spread(scores(runs)), note)


@row("no-bias", IMAGENET, "without coordinates it is never learned", "article", "biased")
def nothing_to_learn(runs):
    """The same training without coordinates."""
    note = f"wanted: {percent(ALL, '.0f')}"
    return Verdict(word_of([x >= ALL for x in scores(runs)]), spread(scores(runs)), note)


# IS THIS FILE FAST? ------------------------------------------------------------------------------

# A case of speed: images, channels, filters, the size of the image and of the kernel, options.
Shape = namedtuple("Shape", "N C F size k options")

PADDED = {"padding": 1}
SHAPES = [
    Shape(8, 64, 64, (64, 64), 1, {}),
    Shape(8, 64, 64, (56, 56), 3, PADDED),
    Shape(8, 3, 64, (64, 64), 3, PADDED),
    Shape(8, 32, 32, (32, 32), 5, {"padding": 2}),
    Shape(1, 3, 64, (224, 224), 7, {"padding": 3, "stride": 2}),
    Shape(8, 64, 128, (56, 56), 3, {"padding": 1, "stride": 2}),
    Shape(8, 64, 64, (56, 56), 3, {"padding": 2, "dilation": 2}),
    Shape(8, 8, 128, (64, 64), 1, {}),
    Shape(8, 128, 128, (64, 64), 1, {}),
    Shape(8, 4, 32, (64, 64), 1, {}),
    Shape(8, 128, 128, (28, 28), 3, PADDED),
    Shape(8, 64, 64, (56, 56), 3, {"padding": 1, "groups": 64}),
    Shape(8, 64, 64, (2048,), 9, {"padding": 4}),
    Shape(2, 16, 16, (24, 24, 24), 3, PADDED),
    Shape(8, 8, 16, (64, 64), 3, PADDED),
    Shape(4, 256, 256, (14, 14), 3, PADDED),
    Shape(8, 64, 64, (32, 32), 4, {"padding": 1, "stride": 2}),
]


def arrays_of(shape, more_channels=0):
    """x, w and b of a shape."""
    rng = np.random.default_rng(0)
    channels = shape.C // shape.options.get("groups", 1) + more_channels
    kernel = (shape.k,) * len(shape.size)
    x = rng.standard_normal((shape.N, shape.C, *shape.size), np.float32)
    w = rng.standard_normal((shape.F, channels, *kernel), np.float32)
    b = rng.standard_normal(shape.F, np.float32)
    return x, w, b


def conv_passes(shape):
    """Functions that do conv's forward and backward pass."""
    x, w, b = arrays_of(shape)
    dy = cr.conv(x, w, b, **shape.options)
    forward = partial(cr.conv, x, w, b, **shape.options)
    return forward, partial(cr.conv_backward, dy, x, w, b, **shape.options)


def coord_conv_passes(shape):
    """The same by coord_conv, with coordinates as further channels; it has no groups."""
    x, w, b = arrays_of(shape, len(shape.size))
    dy = cr.coord_conv(x, w, b, **shape.options)
    forward = partial(cr.coord_conv, x, w, b, **shape.options)
    return forward, partial(cr.coord_conv_backward, dy, x, w, b, **shape.options)


def torch_passes(shape):
    """The same by PyTorch, on one thread."""
    import torch

    torch.set_num_threads(1)
    arrays = [torch.tensor(a, requires_grad=True) for a in arrays_of(shape)]
    conv = getattr(torch.nn.functional, f"conv{len(shape.size)}d")
    y = conv(*arrays, **shape.options)
    dy = y.detach().clone()
    backward = partial(torch.autograd.grad, y, arrays, dy, retain_graph=True)
    return partial(conv, *arrays, **shape.options), backward


def multiplications(shape):
    """Of one pass."""
    x, w, b = arrays_of(shape)
    return cr.conv(x, w, b, **shape.options).size * w[0].size


def timed(program):
    """The core-seconds of a call after an untimed one."""
    program()
    start = time.process_time()
    program()
    return time.process_time() - start


def alternating(programs, repeats):
    """The median core-seconds of each program; they take turns."""
    return np.median([[timed(program) for program in programs] for _ in range(repeats)], axis=0)


PASSES = {"conv": conv_passes, "coord_conv": coord_conv_passes, "torch": torch_passes}


@experiment(
    "conv", once=True, cost=20, quick={"shapes": 1}, package="torch", peers=["conv", "torch"]
)
@experiment("coord conv", once=True, cost=20, quick={"shapes": 1}, peers=["coord_conv", "conv"])
def conv_speed(seed, xp, peers, shapes=17, repeats=2):
    """The time of one peer over the other's, forward and backward, for each shape."""
    ratios = []
    for shape in SHAPES[:shapes]:
        if "coord_conv" in peers and "groups" in shape.options:
            continue
        ours, theirs = (PASSES[peer](shape) for peer in peers)
        forward = alternating([ours[0], theirs[0]], repeats)
        backward = alternating([ours[1], theirs[1]], repeats)
        spent = forward + backward
        ratios.append(float(spent[0] / spent[1]))
    return {"score": geometric_mean(ratios), "worst": max(ratios), "shapes": len(ratios)}


@experiment("decode", once=True, cost=2)
def decode_speed(seed, xp, repeats=3):
    """How many times as many images decode reads as the listing, in the same time."""
    images = cr.encode(np.random.default_rng(0).integers(0, 64, (256, 2)), (64, 64))

    def ours():
        for _ in range(9):
            cr.decode(images)

    def theirs():
        for image in images[:64]:
            listing(image[0])

    our_time, their_time = alternating([ours, theirs], repeats)
    return {"score": float(9 * 256 / 64 * their_time / our_time)}


@row("conv-speed", SPEED, "conv: 1.5 of torch's, in the mean", "coordref", "conv")
def conv_is_fast(runs):
    """Forward and backward together."""
    return at_most(1.5, "torch's", runs)


@row("coord-speed", SPEED, "CoordConv: 1.2 of conv's, in the mean", "coordref", "coord conv")
def coord_conv_is_fast(runs):
    """Forward and backward together, of the shapes without groups, which coord_conv has not."""
    return at_most(1.2, "conv's", runs)


@row("decode-speed", SPEED, "decode is 300 times the listing's speed", "coordref", "decode")
def decode_is_fast(runs):
    """For images of 64x64."""
    (run,) = runs
    return Verdict("holds" if run["score"] >= 300 else "fails", f"{run['score']:.0f} times")


# THE PUBLISHED LENGTHS: --full -------------------------------------------------------------------
# Trainings of the paper at its lengths, hours of them. Their runs are kept in figures/full.jsonl;
# --full judges those, and --full --run makes those that are missing.

MODELS = {
    "coordconv_painter": cr.coordconv_painter,
    "coordconv_renderer": cr.coordconv_renderer,
    "coordconv_regressor": cr.coordconv_regressor,
    "deconv_painter": deconv_painter,
    "conv_regressor": conv_regressor,
}


def state_path(seed, recipe):
    """Where a published training keeps its state until it is done."""
    text = json.dumps([seed, recipe, cr.__version__], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return os.path.join(STATES, f"{recipe['model']}-{recipe['split']}-{digest[:12]}.npz")


def progress(job):
    """How far a published training has come of which a state is kept."""
    path = state_path(job.seed, EXPERIMENTS[job.name].recipe)
    if not os.path.exists(path):
        return ""
    with np.load(path) as state:
        curve = state[".1"]
    done = curve[curve[:, 0] > 0]
    return f" (at epoch {len(done)} of {len(curve)}, best score {done[:, 2].max():.3f})"


def published(
    seed, xp, *, model, task, split, scale, batch_size, epochs, learning_rate, decay, l2, **options
):
    """One training of the paper. The score after every epoch is of every fifth test example, that
    at the end of all. If it is killed, the next call goes on from the state that was saved last.

    scale : of coordinates, "unit", from -1 to 1, or "pixel", as in the paper's code
    decay : of the rate, "constant", "step", a tenth every 200 epochs, up to 4 times, or "late", a
        tenth in the last fifth of the epochs
    """
    more = [split] if model == "conv_regressor" else []
    net = MODELS[model](*more, rng=seed, xp=xp, **options)
    train, test = cr.not_so_clevr(split, task, scale=scale, xp=xp)
    per_epoch = -(-len(train.x) // batch_size)

    def rate(step):
        epoch = step // per_epoch
        late = epoch >= 0.8 * epochs
        tenths = {"constant": 0, "step": min(4, epoch // 200), "late": int(late)}[decay]
        return learning_rate * 0.1**tenths

    recipe = options | {
        "model": model,
        "task": task,
        "split": split,
        "scale": scale,
        "batch_size": batch_size,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "decay": decay,
        "l2": l2,
    }
    path = state_path(seed, recipe)
    os.makedirs(STATES, exist_ok=True)
    state = cr.initial_state(net, seed=seed)
    curve = np.zeros((epochs, 3))  # epochs, core-seconds, score
    if os.path.exists(path):
        state, curve = cr.load(path, (state, curve))

    done = int((curve[:, 0] > 0).sum())
    spent = float(curve[:, 1].max())
    saved = time.monotonic()
    start = time.process_time()
    for state in cr.train(
        state,
        train.x,
        train.target,
        loss=LOSSES[task],
        steps=epochs * per_epoch,
        batch_size=batch_size,
        learning_rate=rate,
        l2=l2,
    ):
        if state.step % per_epoch == 0:
            spent += time.process_time() - start
            curve[done] = done + 1, spent, tested(state.net, test, 5, task)
            done += 1
            if time.monotonic() - saved > 60:
                cr.save(path, (state, curve))
                saved = time.monotonic()
            start = time.process_time()

    run = {
        "score": tested(state.net, test, 1, task),
        "train": tested(state.net, train, 1, task),
        "seconds": spent,
        "curve": [[round(a), round(b, 1), round(c, 4)] for a, b, c in curve.tolist()],
    }
    if task == "classification":
        run["painted right"] = painted_right(state.net, xp, scale)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return run | environment()


def publish(name, seeds, seconds_per_epoch, drawn, **recipe):
    """Register a published training on both splits."""
    for split in SPLITS:
        cost = seconds_per_epoch * recipe["epochs"]
        register = experiment(
            f"{name} {split}", seeds=seeds, cost=cost, drawn=drawn, split=split, **recipe
        )
        register(published)


PAPER = {"scale": "pixel", "batch_size": 16, "l2": 0.001, "decay": "constant", "epochs": 50}
RAW = ("pixel", "CoordConv, raw pixels")
UNIT = ("pixel", "CoordConv, unit coordinates")

LONG_PAINT = PAPER | {
    "model": "coordconv_painter",
    "task": "classification",
    "learning_rate": 0.005,
}
publish("painter l2 0.001", (0, 1, 2, 3, 4), 8, RAW, **LONG_PAINT)
publish("painter l2 0", (0, 1), 8, RAW, **LONG_PAINT | {"l2": 0.0})
publish("painter unit", (0, 1, 2), 8, UNIT, **LONG_PAINT | {"scale": "unit"})

LONG_DECONV = PAPER | {
    "model": "deconv_painter",
    "task": "classification",
    "epochs": 1000,
    "learning_rate": 0.01,
    "decay": "step",
}
publish("deconv k2 w1", (0,), 2, PIXEL_RIVAL, kernel=2, width=1, **LONG_DECONV)
# not drawn: a curve is a median over seeds, not over networks
publish("deconv k2 w2", (0,), 3, None, kernel=2, width=2, **LONG_DECONV)
publish("deconv k3 w2", (0,), 11, None, kernel=3, width=2, **LONG_DECONV)
LONG_SQUARE_DECONV = LONG_DECONV | {"task": "rendering"}
publish("square deconv k2 w1", (0,), 2, SQUARE_RIVAL, kernel=2, width=1, **LONG_SQUARE_DECONV)

# The paper's eight recipes for rendering, with its raw pixels and with unit coordinates: all of
# them for 10 epochs, and then the best of each scale for 30.
LONG_RENDER = PAPER | {"model": "coordconv_renderer", "task": "rendering", "kernel": 3}
RENDERERS = {"pixel": [], "unit": []}
SCALE_NAMES = {"pixel": "raw", "unit": "unit"}
BEST_RENDERERS = [("unit", 0.005, 0.0, 1), ("pixel", 0.005, 0.0, 2)]


def publish_renderer(scale, learning_rate, l2, width, epochs, seeds):
    """Register a recipe for rendering, and note its name for the rows."""
    name = f"renderer {SCALE_NAMES[scale]} lr {learning_rate:g} l2 {l2:g} mul {width} for {epochs}"
    drawn = ("square", RAW[1] if scale == "pixel" else UNIT[1])
    how = {"scale": scale, "learning_rate": learning_rate, "l2": l2, "epochs": epochs}
    publish(name, seeds, 12, drawn, **LONG_RENDER | how | {"width": width})
    RENDERERS[scale].append(f"{name} *")


for scale, rate, l2, width in itertools.product(
    ("pixel", "unit"), (0.001, 0.005), (0.0, 0.001), (1, 2)
):
    publish_renderer(scale, rate, l2, width, 10, (0,))
for best in BEST_RENDERERS:
    publish_renderer(*best, 30, (0, 1))
publish("renderer", (0, 1, 2), 12, ("square", RAW[1]), **LONG_RENDER | {"learning_rate": 0.005})
RENDERERS["pixel"].append("renderer *")

LONG_READ = PAPER | {
    "scale": "unit",
    "task": "regression",
    "epochs": 100,
    "batch_size": 256,
}
LONG_COORD_READER = {"model": "coordconv_regressor", "learning_rate": 0.01, "l2": 1e-5}
publish(
    "coordconv regressor",
    tuple(range(10)),
    2,
    ("coordinate", UNIT[1]),
    **LONG_READ | LONG_COORD_READER,
)
publish(
    "late regressor", (0, 1, 2, 3), 2, None, **LONG_READ | LONG_COORD_READER | {"decay": "late"}
)
publish(
    "conv regressor",
    (0, 1, 2, 3, 4),
    3,
    READER_RIVAL,
    **LONG_READ | {"model": "conv_regressor", "learning_rate": 0.001, "l2": 1e-4},
)


def by_split(groups):
    """The runs of all recipes on each split, in the order of SPLITS."""
    runs = sum(groups, [])
    return [[run for run in runs if run["recipe"]["split"] == split] for split in SPLITS]


def recipes_run(form, groups, count):
    """Which of the paper's recipes were run, on one split or both, and how each run ended."""
    ends = {}
    for run in (run for runs in groups for run in runs):
        text = "kernel {kernel} width {width} lr {learning_rate:g} l2 {l2:g} epochs {epochs}"
        ends.setdefault(text.format(**run["recipe"]), []).append(form(run["score"]))
    listed = ", ".join(f"{text}: {' / '.join(found)}" for text, found in ends.items())
    return f"{len(ends)} of the paper's {count} recipes ({listed})"


def in_seconds(task, *groups):
    """Whether CoordConv does a task in seconds. It holds if every run does it at its end and did
    it within a minute before, fails if no run ever does it, and is in part between."""
    ends = []
    ever = []
    notes = []
    quick = True
    for split, runs in zip(SPLITS, by_split(groups)):
        times = [seconds_to(run, task.bound) for run in runs]
        ends.append(sum(x >= task.bound for x in scores(runs)))
        ever.append(sum(seconds < math.inf for seconds in times))
        quick = quick and len(runs) == ends[-1] and max(times, default=math.inf) < 60
        at_the_end = " ".join(task.form(x).removesuffix(" %") for x in scores(runs))
        first = f"after {min(times):.0f} s at best" if ever[-1] else "never"
        notes.append(f"{split}: {first}, at the end by seed {at_the_end}")
    word = "holds" if quick else "in part" if any(ever) else "fails"
    runs = " / ".join(str(len(runs)) for runs in by_split(groups))
    figure = "{} / {} at the end, {} / {} ever".format(*ends, *ever)
    wanted = f"wanted: {task.form(task.bound, 'g')} within 60 s; {runs} runs"
    return Verdict(word, figure, sentences(wanted, *notes))


def best_in_seconds(task, *groups):
    """The same for the best run of several recipes on each split, as the paper reports it. Not
    judged where no run does it while recipes are left to be run."""
    found = []
    notes = []
    for split, runs in zip(SPLITS, by_split(groups)):
        if not runs:
            return not_judged("-", f"no run on the {split} split")
        best = max(runs, key=lambda run: max(score for *_, score in run["curve"]))
        highest = max(score for *_, score in best["curve"])
        seconds = seconds_to(best, task.bound)
        found.append((highest, seconds))
        recipe = best["recipe"]
        when = f"there after {seconds:.0f} s" if seconds < math.inf else "not there"
        notes.append(
            f"{split}: best of {len(runs)} runs lr {recipe['learning_rate']:g}, "
            f"l2 {recipe['l2']:g}, mul {recipe.get('width', 1)}, {when}"
        )
    if all(seconds < 60 for _, seconds in found):
        word = "holds"
    else:
        word = "in part" if any(gets_past_missed(task, x) for x, _ in found) else "fails"
    wanted = f"wanted: {task.form(task.bound, 'g')} within 60 s"
    figure = " / ".join(task.form(x) for x, _ in found)
    if word == "fails" and not all(groups):
        return not_judged(figure, sentences("recipes are left to be run", *notes))
    return Verdict(word, figure, sentences(wanted, *notes))


PAPERS_ACCURACY = {"uniform": 0.865, "quadrant": 0.005}  # 86 and 0 are rounded


@row(
    "full-deconv",
    PIXEL,
    "a deconvolution stays below 86 % / 0 %",
    "paper",
    "deconv k2 w1 *",
    "deconv k2 w2 *",
    "deconv k3 w2 *",
    full=True,
)
def long_deconv(*groups):
    """The paper's figures are the best of 324 trainings."""
    return stays_below(
        percent, PAPERS_ACCURACY, *groups, recipes=recipes_run(percent, groups, 324)
    )


@row(
    "full-painter-l2-0.001",
    PIXEL,
    "CoordConv: 100 % in seconds, l2 0.001",
    "paper",
    "painter l2 0.001 *",
    full=True,
)
def long_painter(*groups):
    """From raw pixels, the paper's input."""
    return in_seconds(PAINTS, *groups)


@row(
    "full-painter-l2-0",
    PIXEL,
    "CoordConv: 100 % in seconds, l2 0",
    "paper",
    "painter l2 0 *",
    full=True,
)
def long_painter_without_l2(*groups):
    """From raw pixels, the paper's input."""
    return in_seconds(PAINTS, *groups)


@row(
    "full-painter-unit",
    PIXEL,
    "CoordConv: the same, unit coordinates",
    "paper",
    "painter unit *",
    full=True,
)
def long_painter_unit(*groups):
    """From coordinates from -1 to 1, which everyone uses."""
    return in_seconds(PAINTS, *groups)


@row(
    "full-renderer",
    SQUARE,
    "CoordConv: IoU 1 in seconds, raw",
    "paper",
    *RENDERERS["pixel"],
    full=True,
)
def long_renderer(*groups):
    """From raw pixels, the paper's input."""
    return best_in_seconds(DRAWS, *groups)


@row(
    "full-renderer-unit",
    SQUARE,
    "CoordConv: the same, unit coordinates",
    "paper",
    *RENDERERS["unit"],
    full=True,
)
def long_renderer_unit(*groups):
    """From coordinates from -1 to 1, which everyone uses."""
    return best_in_seconds(DRAWS, *groups)


@row(
    "full-square-deconv",
    SQUARE,
    "a deconvolution stays below .83 / .36",
    "paper",
    "square deconv k2 w1 *",
    full=True,
)
def long_square_deconv(*groups):
    """The paper's figures are the best of 648 trainings."""
    return stays_below(iou_text, PAPERS_IOU, *groups, recipes=recipes_run(iou_text, groups, 648))


@row(
    "full-coord",
    COORDINATE,
    "one CoordConv on both splits",
    "paper",
    "coordconv regressor *",
    full=True,
)
def long_reader(uniform, quadrant):
    """By the bounds of the default table."""
    return does(READS, [uniform, quadrant])


@row(
    "full-coord-late",
    COORDINATE,
    "the same, a tenth of the rate at the end",
    "coordref",
    "late regressor *",
    "coordconv regressor *",
    full=True,
)
def long_late_reader(*groups):
    """Whether the misses above come from the constant rate, on the splits that were run: each seed
    with either rate."""
    late = groups[:2]
    constant = groups[2:]
    notes = []
    for split, ours, before in zip(SPLITS, late, constant):
        pairs = zip(scores(before), scores(ours))  # of the seeds from 0 on
        each = [f"{READS.form(old)} to {READS.form(new)}" for old, new in pairs]
        if each:
            notes.append(f"{split}, from the constant rate, by seed: {', '.join(each)}")
    return does(READS, [runs for runs in late if runs], note=sentences(*notes))


@row(
    "full-conv",
    COORDINATE,
    "a convolution: uniform yes, quadrant no",
    "paper",
    "conv regressor *",
    full=True,
)
def long_rival_reader(uniform, quadrant):
    """By the bounds of the default table."""
    yes = does(READS, [uniform])
    no = does_not(READS, [quadrant])
    if None in (yes.word, no.word):
        word = None
    else:
        word = yes.word if yes.word == no.word else "in part"
    figure = f"{yes.figure} / {no.figure}"
    return Verdict(word, figure, f"uniform: {yes.note}; quadrant: {no.note}")


@row(
    "full-factor",
    FASTER,
    "CoordConv learns 150 times faster",
    "paper",
    "deconv k2 w1 uniform",
    "painter l2 0.001 uniform",
    "painter l2 0 uniform",
    "painter unit uniform",
    full=True,
)
def long_factor(rivals, *ours):
    """The rival is the smallest of those above, the fastest in seconds."""
    return times_faster(rivals, *ours)


# THE SUMMARY -------------------------------------------------------------------------------------

# A sentence says whether someone is right that something is so, by the verdicts of these rows.
Sentence = namedtuple("Sentence", "who clause rows")

SUMMARY = [
    Sentence("The critic", "no training is needed", "reads draws listing feature"),
    Sentence(
        "The paper",
        "CoordConv learns pixels and squares",
        "pixel-uniform pixel-quadrant square-he",
    ),
    Sentence(
        "The paper",
        "deconvolution learns neither in that time",
        "pixel-deconv pixel-deconv-longer square-deconv",
    ),
    Sentence(
        "The paper",
        "CoordConv reads coordinates, convolution not",
        "coord-he coord-conv-uniform coord-conv-quadrant",
    ),
    Sentence("The paper", "it is 150 times faster, and far smaller", "factor parameters"),
    Sentence(
        "The article",
        "coordinates gain nothing where a class is no place",
        "resnet texture place shifts no-bias",
    ),
    Sentence(
        "coordref",
        "its own starts learn each task for every seed",
        "pixel-relative square-relative coord-salient",
    ),
    Sentence(
        "The paper",
        "CoordConv gets to 100 % in seconds",
        "full-painter-l2-0.001 full-painter-l2-0 full-painter-unit",
    ),
    Sentence("The paper", "it draws squares in seconds", "full-renderer full-renderer-unit"),
    Sentence(
        "The paper", "deconvolution stays below its figures", "full-deconv full-square-deconv"
    ),
    Sentence("The paper", "one CoordConv reads coordinates", "full-coord"),
    Sentence("The paper", "convolution does so on one split alone", "full-conv"),
    Sentence("The paper", "it is 150 times faster", "full-factor"),
]
NEVER_TRIED = "GAN, VAE, detection, reinforcement learning, ImageNet itself"


def summary(verdicts):
    """Who is right about what, from a dict of the verdicts by row, a sentence a line."""
    lines = []
    for who, clause, rows in SUMMARY:
        if not verdicts.keys() >= set(rows.split()):
            continue  # this table has not all of the rows
        known = {id: verdicts[id].word for id in rows.split() if verdicts[id].word}
        if not known:
            continue
        right = {"holds": "right", "in part": "right in part", "fails": "wrong"}[
            word_of_words(known.values())
        ]
        lines.append(f"{who} is {right} that {clause}.")
    missing = [id for id, verdict in verdicts.items() if verdict.word is None]
    rows = f"{len(missing)} rows" if len(missing) > 1 else "".join(missing)
    lines.append(f"Not judged: {', '.join(filter(None, [NEVER_TRIED, rows]))}.")
    return lines


def word_of_words(words):
    """ "holds" if all hold, "fails" if all fail, else "in part"."""
    different = set(words)
    return different.pop() if len(different) == 1 else "in part"


# THE RUNS ----------------------------------------------------------------------------------------
# A job is an experiment's name, a seed and a recipe. Jobs run in processes, one a core.

Job = namedtuple("Job", "name seed recipe")  # the recipe is text, in JSON


def job_of(name, seed, options):
    """The job of an experiment for a seed, under the options of the command line."""
    chosen = EXPERIMENTS[name]
    recipe = chosen.recipe
    if options.quick and chosen.quick:
        recipe = recipe | chosen.quick
    if options.figures and not options.full and name in PICTURES and seed == options.seeds[0]:
        recipe = recipe | {"picture": True}
    return Job(name, seed, json.dumps(recipe, sort_keys=True))


def jobs_of(row, options):
    """The jobs of a row, a list for each of its experiments."""
    groups = []
    for name in row.needs:
        seeds = EXPERIMENTS[name].seeds or options.seeds
        if EXPERIMENTS[name].once:
            seeds = seeds[:1]
        groups.append([job_of(name, seed, options) for seed in seeds])
    return groups


def all_jobs(rows, options):
    """The jobs of rows, each once: those of a moment first, then the longest, then the others in
    the order of the rows, so that no long one is left for the end."""

    def turn(job):
        cost = EXPERIMENTS[job.name].cost
        return 0 if cost < 1 else 1 if cost >= 10 else 2

    jobs = [job for row in rows for group in jobs_of(row, options) for job in group]
    return sorted(dict.fromkeys(jobs), key=turn)


def missing_package(name):
    """The package that an experiment cannot do without and that is not there, or None."""
    package = EXPERIMENTS[name].package
    return package if package and not importlib.util.find_spec(package) else None


def start_worker():
    """Ctrl-C is for the process that gave the work; when that is gone, nobody waits for this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def make_run(job, device):
    """What a process does for a job."""
    start = time.process_time()
    recipe = json.loads(job.recipe)
    xp = cr.best_module() if device == "gpu" else np
    run = EXPERIMENTS[job.name].function(job.seed, xp, **recipe)
    spent = time.process_time() - start
    # a training that went on from a saved state has spent more, in processes before this one
    return {"recipe": recipe, **run, "core_seconds": max(spent, run.get("seconds", 0))}


class ProcessDied(Exception):
    """A process of the pool died; names the jobs that were under way."""


def run_jobs(jobs, device):
    """Run jobs, as many at a time as there are cores. Yields, as soon as it knows and twice a
    second, the jobs that run and a list of (job, run or exception) for those that have ended."""
    waiting = list(reversed(jobs))
    running = {}
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(CORES, spawn, start_worker)
    try:
        while waiting or running:
            while waiting and len(running) < CORES:
                job = waiting.pop()
                running[pool.submit(make_run, job, device)] = job
            yield list(running.values()), []
            ended, _ = wait(running, 0.5, FIRST_COMPLETED)
            if any(isinstance(future.exception(), BrokenProcessPool) for future in ended):
                under_way = (f"{job.name}, seed {job.seed}" for job in running.values())
                raise ProcessDied(" or ".join(under_way))
            found = []
            for future in ended:
                job = running.pop(future)
                found.append((job, future.exception() or future.result()))
            yield list(running.values()), found
    finally:
        pool.shutdown(wait=not running, cancel_futures=True)
        if running:  # the call was interrupted
            for child in multiprocessing.active_children():
                child.terminate()


# FILES -------------------------------------------------------------------------------------------


def blas_kernels():
    """The name of the kernels that OpenBLAS has chosen for this processor, such as Zen."""
    beside = os.path.join(os.path.dirname(np.__file__), os.pardir, "numpy.libs")
    for path in glob.glob(os.path.join(beside, "*openblas*")):
        with contextlib.suppress(OSError, AttributeError):
            name = ctypes.CDLL(path).scipy_openblas_get_corename64_
            name.restype = ctypes.c_char_p
            return name().decode()
    return "unknown"


def machine():
    """The processor's name."""
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment():
    """What a run depends on and comes from."""
    return {
        "coordref": cr.__version__,
        "numpy": np.__version__,
        "kernels": blas_kernels(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def stamp(device):
    """What kept runs must share with a call to be used in it: versions, kernels, device, text."""
    text = b""
    for path in (cr.__file__, __file__):
        with open(path, "rb") as file:
            text += file.read()
    digest = hashlib.sha256(text).hexdigest()[:16]
    return [cr.__version__, np.__version__, blas_kernels(), device, digest]


class Runs:
    """The runs of jobs, kept line by line in a file, so that nothing is lost and two calls may
    write to it at a time. In KEPT a line bears a stamp; in FULL it has none, and is for good."""

    def __init__(self, path, stamp=None):
        self.path = path
        self.stamp = stamp
        self.runs = {}
        self.kept = True
        for line in self.lines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # such as half a line
                name, seed, run, *stamped = json.loads(line)
                if stamp is None or stamped == [stamp]:
                    self.runs[Job(name, seed, json.dumps(run["recipe"], sort_keys=True))] = run

    def lines(self):
        with contextlib.suppress(OSError):
            with open(self.path, errors="replace") as file:
                return file.readlines()
        return []

    def keep(self, job, run):
        """Note a run, and write it down; where that cannot be done say so once and go on."""
        self.runs[job] = run
        line = [job.name, job.seed, run] + ([self.stamp] if self.stamp else [])
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a") as file:
                file.write("\n" + json.dumps(line) + "\n")  # the last line may be half of one
        except OSError as error:
            if self.kept:
                say(f"runs are not kept: {error}")
            self.kept = False

    def forget(self, jobs):
        """Remove the file once a call is complete, if it holds nothing but that call's runs."""
        if set(Runs(self.path, self.stamp).runs) <= set(jobs):
            with contextlib.suppress(OSError):
                os.unlink(self.path)


# THE TABLE ---------------------------------------------------------------------------------------


def say(text):
    """A line for the user that is not part of the table."""
    print(f"bench.py: {text}", file=sys.stderr, flush=True)


def columns_of_stderr():
    """The width of the terminal that progress is written to, and where there is none 99."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns
    return 99


def width_of_table():
    """From 60 to 120 columns."""
    columns = shutil.get_terminal_size((columns_of_stderr(), 24)).columns
    return max(60, min(columns, 120))


class Progress:
    """One line on a terminal: what runs, the time that has passed, and the time it may take."""

    def __init__(self, jobs):
        self.left = {job: EXPERIMENTS[job.name].cost for job in jobs}
        self.start = time.monotonic()
        self.shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def elapsed(self):
        return time.monotonic() - self.start

    def update(self, running, ended):
        for job, _ in ended:
            del self.left[job]
        expected = self.elapsed() + sum(self.left.values()) / CORES
        now = ", ".join(f"{job.name} {job.seed}" for job in running)
        self.write(
            f"{self.elapsed():.0f} of about {expected:.0f} s, {len(self.left)} runs to go; "
            f"now {now}"
        )

    def write(self, text):
        if self.shown:
            width = columns_of_stderr() - 1
            print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)


def judged(row, groups, runs, errors, options):
    """The verdict on a row, from what there is of the runs of its jobs."""
    jobs = sum(groups, [])
    missing = [job for job in jobs if job not in runs]
    failed = [job for job in jobs if job in errors]
    packages = {missing_package(job.name) for job in missing} - {None}
    if failed:
        job = failed[0]
        return not_judged("-", f"{job.name}, seed {job.seed}: {errors[job]}")
    if packages:
        return not_judged("-", f"it needs {', '.join(packages)}")
    if missing and (not row.full or len(missing) == len(jobs)):
        return not_judged("-", "not run")
    if options.quick and any(EXPERIMENTS[name].quick for name in row.needs):
        return not_judged("-", "trainings were cut short")
    verdict = row.judge(*([runs[job] for job in group if job in runs] for group in groups))
    begun = {job.name for job in jobs if job in runs}
    absent = dict.fromkeys(
        (f"{job.name} seed {job.seed}" if job.name in begun else job.name) + progress(job)
        for job in missing
    )
    if not absent:
        return verdict
    text = ", ".join(absent) if len(absent) < 5 else f"{len(absent)} of {len(groups)} trainings"
    return verdict._replace(note=sentences(verdict.note, f"not run: {text}"))


def core_time(runs):
    seconds = sum(run["core_seconds"] for run in runs)
    return f"{seconds:.0f} s" if seconds < 999 else f"{seconds / 3600:.1f} h"


def wrapped(text, width, first="", rest=""):
    """Text in lines of this width; figures keep their units, and a path is never cut."""
    wrapper = textwrap.TextWrapper(
        width=width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    whole = re.sub(r"(?<=\d) (?=%|px|s\b)", "\0", text)
    return [line.replace("\0", " ") for line in wrapper.wrap(whole)]


def row_lines(row, verdict, runs, width):
    """A row of the table: verdict, claim, figure, source and core-seconds in a line, the note
    below; where that is too wide the figure has a line of its own."""
    indent = " " * 11
    first = f"  {verdict.word or '-':7}  {row.claim:41}"
    last = f"{row.source:8} {core_time(runs):>5}"
    if len(first) + 2 + max(len(verdict.figure), 30) + 1 + len(last) <= width:
        lines = [f"{first}  {verdict.figure:30} {last}"]
    else:
        lines = [f"{first}  {last}"]
        if verdict.figure != "-":
            lines.append(indent + verdict.figure)
    return lines + wrapped(verdict.note, width, indent, indent)


class Text:
    """The table for people."""

    def __init__(self):
        self.width = width_of_table()
        self.asked = None  # the question whose rows are being printed

    def paragraph(self, text):
        print("\n".join(wrapped(text, self.width)))

    def question(self, text):
        self.asked = text
        print(f"\n{text}")

    def row(self, row, verdict, runs):
        print("\n".join(row_lines(row, verdict, runs, self.width)), flush=True)

    def end(self, lines, facts):
        print()
        for line in lines:
            print("\n".join(wrapped(line, self.width, rest="  ")))
        print(f"\n{facts}", flush=True)


class Markdown(Text):
    """The table for a README."""

    def paragraph(self, text):
        print(f"{text}\n")

    def question(self, text):
        self.asked = text
        print(f"\n**{text}**\n\n| verdict | claim | measured | source |")
        print("| --- | --- | --- | --- |")

    def row(self, row, verdict, runs):
        figure = sentences(verdict.figure.strip("-"), verdict.note)
        print(f"| {verdict.word or '-'} | {row.claim} | {figure} | {row.source} |", flush=True)

    def end(self, lines, facts):
        print()
        for line in lines:
            print(f"- {line}")


BRACKETS = (
    "A verdict is on the claim beside it; figures are the median of the seeds, in brackets the "
    "worst, uniform / quadrant split; at the right the core-seconds of a row's runs."
)


def table(rows, options):
    """Make the runs that rows need, print each row as soon as it can be judged, and write what
    was asked for. Returns the exit status."""
    page = Markdown() if options.markdown else Text()
    kept = Runs(FULL) if options.full else Runs(KEPT, stamp(options.device))
    jobs = all_jobs(rows, options)
    todo = jobs_to_run(jobs, kept, options)
    here = environment() | {"cores": CORES, "device": options.device, "seeds": [*options.seeds]}
    page.paragraph(BRACKETS)
    page.paragraph(whose(kept, jobs, todo) if options.full else text_of(here))

    progress = Progress(todo)
    errors = {}
    verdicts = {}
    try:
        for row in rows_in_time(rows, todo, kept, errors, progress, options):
            if row.question != page.asked:
                page.question(row.question)
            verdict = judged(row, jobs_of(row, options), kept.runs, errors, options)
            verdicts[row.id] = verdict
            page.row(row, verdict, runs_of(row, kept, options))
    except KeyboardInterrupt:
        progress.write("")
        on = "; the next call goes on from here" if kept.kept else ""
        say(f"stopped, with {len(progress.left)} runs to go{on}")
        return 130
    except ProcessDied as died:
        progress.write("")
        say(f"a process died, perhaps for want of memory, at {died}; what was done is kept")
        return 1

    spent = core_time([kept.runs[job] for job in todo if job in kept.runs]).removesuffix(" s")
    page.end(
        summary(verdicts), f"{len(rows)} rows; {progress.elapsed():.0f} s, {spent} core-seconds"
    )
    if options.json:
        write_json(options.json, here, rows, verdicts, kept, options)
    if options.figures:
        found = {job: kept.runs[job] for job in jobs if job in kept.runs}
        draw_figures(options.figures, found, options)
    if not options.full and not errors:
        kept.forget(jobs)
    return 1 if errors else 0


def text_of(here):
    """An environment in a line."""
    facts = here | {"seeds": " ".join(map(str, here["seeds"]))}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def jobs_to_run(jobs, kept, options):
    """The jobs that are not kept and can be run; of the published ones those that --run names."""
    todo = [job for job in jobs if job not in kept.runs and not missing_package(job.name)]
    if not options.full:
        return todo
    if options.run is None:
        return []
    return [job for job in todo if re.search(options.run, job.name)]


def runs_of(row, kept, options):
    """What there is of a row's runs, for people and for files."""
    jobs = sum(jobs_of(row, options), [])
    found = [job for job in jobs if job in kept.runs]
    return [{"name": job.name, "seed": job.seed, **kept.runs[job]} for job in found]


def rows_in_time(rows, todo, kept, errors, progress, options):
    """Run the jobs, keep their runs and note their errors; yield each row, in turn, as soon as all
    of its jobs have ended."""
    awaited = set(todo)
    waiting = list(rows)
    steps = itertools.chain([([], [])], run_jobs(todo, options.device))
    for running, ended in steps:
        for job, run in ended:
            awaited.discard(job)
            if isinstance(run, Exception):
                errors[job] = " ".join(repr(run).split())
            else:
                kept.keep(job, run)
        while waiting and not awaited & set(sum(jobs_of(waiting[0], options), [])):
            progress.write("")
            yield waiting.pop(0)
        progress.update(running, ended)
    progress.write("")


def write_json(path, here, rows, verdicts, kept, options):
    """The table as JSON, with all runs; the verdict is null where a row was not judged."""
    found = []
    for row in rows:
        verdict = verdicts[row.id]
        runs = runs_of(row, kept, options)
        one = {"id": row.id, "question": row.question, "claim": row.claim, "source": row.source}
        one["verdict"] = verdict.word
        one["measured"] = sentences(verdict.figure.strip("-"), verdict.note)
        one["seconds"] = sum(run["core_seconds"] for run in runs)
        one["runs"] = runs
        found.append(one)
    with open(path, "w") as file:
        json.dump({"environment": here, "rows": found}, file, indent=1)


def whose(kept, jobs, todo):
    """Whose runs the table of --full judges, and how long a rerun takes."""
    runs = [kept.runs[job] for job in jobs if job in kept.runs]
    groups = {}
    for run in runs:
        key = run["coordref"], run.get("machine", "on a machine not recorded")
        groups.setdefault(key, []).append(run.get("date"))
    parts = []
    for (version, where), dates in groups.items():
        known = sorted(date for date in dates if date)
        when = " to ".join(dict.fromkeys([known[0], known[-1]])) if known else "date not recorded"
        parts.append(f"{len(dates)} by coordref {version} ({where}, {when})")
    hours = sum(run["core_seconds"] for run in runs) / 3600
    return (
        f"Runs stored in figures/full.jsonl: {', '.join(parts)}. They took {hours:.1f} "
        "core-hours, and a rerun takes as long; --again ID repeats one. "
        f"{len(jobs) - len(runs)} more are registered, which --run makes; "
        f"{len(todo) or 'none'} of them are run now."
    )


def stored_ids():
    """The stored runs by the ids that --again takes, such as deconv-k2-w1-uniform-0."""
    return {f"{job.name.replace(' ', '-')}-{job.seed}": job for job in Runs(FULL).runs}


# What two runs must share to have the same bits.
SHARED = ("coordref", "numpy", "kernels")


def run_again(id, options):
    """Make a stored run once more and say how its scores compare. Returns the exit status."""
    runs = Runs(FULL).runs
    job = stored_ids()[id]
    old = runs[job]
    print(f"{id}, by coordref {old['coordref']}, took {core_time([old])}; running", flush=True)
    for _, ended in run_jobs([job], options.device):
        for _, new in ended:
            if isinstance(new, Exception):
                raise new
    seeds = [run for other, run in runs.items() if other.name == job.name]
    text, status = compared(old, new, seeds)
    print("\n".join(wrapped(text, 99)))
    return status


def compared(old, new, seeds):
    """How the scores of a new run compare with those of the stored one: all of them exactly, where
    versions and kernels are the same, else the last one with the stored runs of all seeds. Returns
    a sentence and the exit status."""
    then = [old["score"], old["train"], *(point[2] for point in old["curve"])]
    now = [new["score"], new["train"], *(point[2] for point in new["curve"])]
    if all(old.get(key) == new[key] for key in SHARED):
        if then == now:
            return f"the same scores, at the end {new['score']:.4f} and after each epoch", 0
        return f"other scores, where they should be the same: {now}, not {then}", 1
    low, *_, high = sorted([run["score"] for run in seeds] * 2)
    inside = low <= new["score"] <= high
    text = (
        f"by coordref {new['coordref']}: {new['score']:.4f}, stored {old['score']:.4f}; the "
        f"{len(seeds)} stored seeds are from {low:.4f} to {high:.4f}, and this is "
        f"{'within' if inside else 'beyond'}. Other versions or kernels: no bits are compared."
    )
    return text, 0 if inside or len(seeds) == 1 else 1


# FIGURES -----------------------------------------------------------------------------------------

PICTURES = ("deconv quadrant", "he quadrant", "relative quadrant")

# The title of a panel, what its axis shows and how far, and the paper's best for deconvolution.
Panel = namedtuple("Panel", "title unit high papers")

PANELS = {
    "pixel": Panel("Coordinate to pixel", "part right", 1.05, {"uniform": 0.86, "quadrant": 0}),
    "square": Panel("Coordinate to square", "IoU", 1.05, {"uniform": 0.83, "quadrant": 0.36}),
    "coordinate": Panel("Image to coordinate", "distance (px)", 40, {}),
}
COLORS = {
    "without coordinates": "black",
    "CoordConv, he_normal": "#e69f00",
    "CoordConv, our start": "#0072b2",
    "CoordConv, raw pixels": "#e69f00",
    "CoordConv, unit coordinates": "#009e73",
}


def draw_positions(path, runs):
    """Which positions each network paints right. The deconvolution is the one of the published
    lengths that has learnt most of its training part, if there is one that tells."""
    from matplotlib import pyplot as plt

    told = []
    for job, run in Runs(FULL).runs.items():
        rival = job.name in EXPERIMENTS and EXPERIMENTS[job.name].drawn == PIXEL_RIVAL
        if rival and run["recipe"]["split"] == "quadrant" and "painted right" in run:
            told.append(run)
    by_name = {job.name: run for job, run in runs.items() if "painted right" in run}
    pictures = {
        "deconvolution": max([by_name["deconv quadrant"], *told], key=lambda run: run["train"]),
        "CoordConv, he_normal": by_name["he quadrant"],
        "CoordConv, our start": by_name["relative quadrant"],
    }
    coords = all_positions()
    right = {
        title: np.unpackbits(np.frombuffer(bytes.fromhex(run["painted right"]), np.uint8))
        for title, run in pictures.items()
    }
    hot, _ = cr.forward(cr.encoder_network((64, 64)), coords.astype(np.float32)[:, :, None, None])
    right["wired by hand"] = cr.accuracy(hot, cr.encode(coords, (64, 64)))

    train = len(cr.not_so_clevr("quadrant")[0].coords)
    colors = plt.matplotlib.colors.ListedColormap(["0.8", "#0072b2"])
    figure, axes = plt.subplots(1, 4, figsize=(9, 3.2), sharey=True, layout="constrained")
    for ax, (title, good) in zip(axes, right.items()):
        picture = np.full((64, 64), np.nan)
        picture[tuple(coords.T)] = good
        ax.imshow(picture, colors, vmin=0, vmax=1)
        ax.plot([32.5, 59.5, 59.5, 32.5, 32.5], [32.5, 32.5, 59.5, 59.5, 32.5], color="#d55e00")
        ax.set(xlim=(3.5, 59.5), ylim=(59.5, 3.5), xlabel="column")
        ends = [percent(float(part.mean())) for part in (good[:train], good[train:])]
        ax.set_title("{}\ntrain {}, test {}".format(title, *ends), fontsize=9)
    axes[0].set_ylabel("row")
    figure.suptitle("Painted right: blue; trained outside the frame, tested inside", fontsize=10)
    figure.savefig(path, dpi=100)


def points_of(run, panel):
    """The points of a run's curve in a panel. A painter's square is one point, at its end."""
    if panel == "square" and "iou" in run:
        return [[0, run["square seconds"], run["iou"]]]
    return run["curve"]


def draw_paper(ax, best):
    """A dotted line at the paper's best deconvolution."""
    ax.axhline(best, color="black", linestyle=":", linewidth=0.8)
    ax.annotate(
        f"the paper's best without coordinates, {best}",
        (0.02, best),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        fontsize=7,
    )


def draw_curve(ax, curves, color):
    """The median of several curves against core-seconds, and a band from the least to the most.
    Returns the line."""
    longest = max(map(len, curves))
    at = [[curve[i] for curve in curves if i < len(curve)] for i in range(longest)]
    seconds = [median(point[1] for point in points) for points in at]
    middle = [median(point[2] for point in points) for points in at]
    least = [min(point[2] for point in points) for points in at]
    most = [max(point[2] for point in points) for points in at]
    marker = "o" if longest == 1 else None
    ax.fill_between(seconds, least, most, color=color, alpha=0.15, linewidth=0)
    (line,) = ax.plot(seconds, middle, color=color, linewidth=1.2, marker=marker)
    return line


def draw_curves(path, runs, title):
    """A column for each task, a row for each split, a colour for each network."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, 3, figsize=(11, 6), sharex="col", sharey="col", layout="constrained"
    )
    lines = {}
    for (i, j), ax in np.ndenumerate(axes):
        split = SPLITS[i]
        name = list(PANELS)[j]
        panel = PANELS[name]
        curves = {}
        for job, run in runs.items():
            of, network = EXPERIMENTS[job.name].drawn or (None, None)
            fits = of == name or (name == "square" and "iou" in run)
            if fits and run["recipe"]["split"] == split:
                curves.setdefault(network, []).append(points_of(run, name))
        for network, found in curves.items():
            lines[network] = draw_curve(ax, found, COLORS[network])
        if split in panel.papers:
            draw_paper(ax, panel.papers[split])
        ax.set(xscale="log", ylabel=panel.unit, title=f"{panel.title}, {split} split")
        ax.set_ylim(-0.03 * panel.high, panel.high)
    for ax in axes[1]:
        ax.set_xlabel("core-seconds")
    figure.suptitle(f"{title}: the median of the seeds, and a band from the worst to the best")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def draw_figures(folder, runs, options):
    """positions.png and time.png of the default table, full.png of the other."""
    if options.full:
        draw_curves(os.path.join(folder, "full.png"), runs, "The published lengths")
    else:
        draw_positions(os.path.join(folder, "positions.png"), runs)
        draw_curves(os.path.join(folder, "time.png"), runs, "This project's recipes")


# OPS: speed by shape and by size -----------------------------------------------------------------

OPS_LEGEND = """\
One core a side, float32, the median of {repeats} calls. forward, backward: time of conv's passes;
of peak: of a matrix product's speed, {peak:.0f} GFLOP/s; /torch, backward: conv's time over
PyTorch's, forward and backward; coords: coord_conv's time over conv's, both passes; /scipy: conv's
time over scipy.signal.correlate's, forward, which has no batch, no stride and no dilation: it gets
one image and one filter, times both. Shapes: kernel, images*channels-filters, size of the images,
then s stride, p padding, d dilation, g groups.
"""


def name_of(shape):
    """Such as 3x3 8*64-128 56x56 p1 s2."""
    kernel = "x".join(str(shape.k) for _ in shape.size)
    size = "x".join(map(str, shape.size))
    options = [f"{key[0]}{value}" for key, value in shape.options.items()]
    return " ".join([kernel, f"{shape.N}*{shape.C}-{shape.F}", size, *options])


def passes_time(peer, shape, repeats):
    """The core-seconds of a peer's forward and backward pass."""
    forward, backward = PASSES[peer](shape)
    return alternating([forward], repeats)[0], alternating([backward], repeats)[0]


def scipy_time(shape):
    """What scipy's correlate would take for a shape, by one image and one filter."""
    from scipy.signal import correlate

    x, w, _ = arrays_of(shape)
    one = x[0, : w.shape[1]]
    program = partial(correlate, one, w[0], "same")
    return alternating([program], 1)[0] * shape.N * shape.F


def column(x, form, width):
    """A number, or a dash where there is none."""
    return f"{'-' if x is None else format(x, form):>{width}}"


def ops(arguments, repeats=5):
    """Print a line for each shape, then the cost against size."""
    command_parser("ops", "Speed by shape and by size, against SciPy and PyTorch.").parse_args(
        arguments
    )
    has_torch = importlib.util.find_spec("torch") is not None
    a = np.ones((1024, 1024), np.float32)
    peak = float(2 * len(a) ** 3 / alternating([lambda: a @ a], 9)[0])
    print(OPS_LEGEND.format(repeats=repeats, peak=peak / 1e9))
    print(f"{'':26}   forward   backward of peak /torch backward coords  /scipy")
    of_torch = []
    of_conv = []
    for shape in SHAPES:
        ours = passes_time("conv", shape, repeats)
        torch = passes_time("torch", shape, repeats) if has_torch else None
        with_coords = None
        if "groups" not in shape.options:
            with_coords = sum(passes_time("coord_conv", shape, repeats)) / sum(ours)
            of_conv.append(with_coords)
        if torch:
            of_torch.append(sum(ours) / sum(torch))
        print(
            f"{name_of(shape):26}{1e3 * ours[0]:7.2f} ms{1e3 * ours[1]:8.2f} ms"
            + column(6 * multiplications(shape) / sum(ours) / peak, ".2f", 8)
            + column(ours[0] / torch[0] if torch else None, ".2f", 7)
            + column(ours[1] / torch[1] if torch else None, ".2f", 9)
            + column(with_coords, ".2f", 7)
            + column(ours[0] / scipy_time(shape), ".2g", 8),
            flush=True,
        )
    for name, ratios in (("of torch's time", of_torch), ("CoordConv over conv", of_conv)):
        if ratios:
            mean = geometric_mean(ratios)
            print(f"{name}: geometric mean {mean:.2f}, worst {max(ratios):.2f}")
    print(
        "\nns a multiplication, both passes, 3x3; N = 2, C = F = 16, H = W = 32, and one doubled:"
    )
    for axis in ("N", "C", "H"):
        found = []
        for doubled in (1, 2, 4, 8, 16):
            size = {"N": 2, "C": 16, "H": 32}
            size[axis] *= doubled
            N, C, H = size.values()
            shape = Shape(N, C, C, (H, H), 3, PADDED)
            spent = sum(passes_time("conv", shape, repeats))
            found.append(f"{size[axis]:6}: {1e9 * spent / 3 / multiplications(shape):.3f}")
        print(f"{axis:2}" + "".join(found), flush=True)
    return 0


# VECTORS: cases to check others ------------------------------------------------------------------
# The cases are computed by loops over the definitions alone, in float64.

# One case: the op; the shape of x, None for coord_channels; that of w without the channels of the
# coordinates, None where there is no w; whether it has a bias; the options.
Case = namedtuple("Case", "op x w bias options")

RADIUS = {"radius": True}
SAME = {"padding": "same"}
PIXELS = {"scale": "pixel"}
STRIDE_2 = {"stride": 2}

# The images whose coordinates are in the vectors.
COORD_SIZES = ((5, 5), (3, 4), (7, 2), (1, 6), (5,), (2, 3, 4))

COORD_CASES = [
    Case("coord_channels", None, None, False, {"size": size, **more})
    for size in COORD_SIZES
    for more in ({}, RADIUS)
]
CASES = [
    *COORD_CASES,
    Case("coord_channels", None, None, False, {"size": (4, 3), **PIXELS}),
    Case("add_coords", (2, 3, 4), None, False, {}),
    Case("add_coords", (2, 3, 4, 5), None, False, {}),
    Case("add_coords", (2, 1, 3, 5), None, False, RADIUS),
    Case("add_coords", (1, 2, 1, 4), None, False, PIXELS),
    Case("add_coords", (2, 3, 2, 3, 4), None, False, RADIUS),
    Case("conv", (2, 3, 8), (4, 3, 3), True, {}),
    Case("conv", (2, 3, 9), (4, 3, 4), False, STRIDE_2 | {"padding": ((0, 3),)}),
    Case("conv", (1, 2, 10), (3, 2, 3), True, {"dilation": 3} | SAME),
    Case("conv", (2, 3, 6, 7), (4, 3, 1, 1), True, {}),
    Case("conv", (2, 4, 5, 6), (6, 2, 3, 2), True, {"groups": 2} | PADDED),
    Case("conv", (3, 2, 1, 5), (4, 2, 1, 3), True, SAME),
    Case(
        "conv",
        (2, 3, 6, 9),
        (2, 3, 2, 3),
        True,
        {"stride": (1, 3), "padding": ((0, 1), (2, 0))},
    ),
    Case("conv", (1, 3, 9, 8), (3, 1, 3, 3), True, {"groups": 3, "dilation": (2, 1)}),
    Case("conv", (2, 2, 7, 6), (3, 2, 4, 4), True, STRIDE_2 | SAME),
    Case("conv", (1, 2, 4, 3, 5), (3, 2, 2, 3, 2), True, PADDED),
    Case("conv", (2, 2, 5, 4, 3), (2, 1, 3, 2, 1), False, {"groups": 2} | STRIDE_2 | SAME),
    Case("conv_transpose", (2, 3, 5), (3, 4, 3), True, {}),
    Case("conv_transpose", (2, 4, 6), (4, 3, 4), True, STRIDE_2 | SAME | {"groups": 2}),
    Case(
        "conv_transpose",
        (2, 3, 3, 4),
        (3, 2, 2, 3),
        False,
        STRIDE_2 | {"padding": ((0, 1), (1, 0))},
    ),
    Case(
        "conv_transpose",
        (1, 3, 4, 3),
        (3, 5, 3, 2),
        True,
        {"stride": (3, 2), "output_padding": (2, 1)},
    ),
    Case("conv_transpose", (2, 2, 4, 5), (2, 3, 2, 2), True, {"dilation": 2} | PADDED),
    Case("conv_transpose", (2, 2, 3, 2), (2, 3, 3, 3), True, STRIDE_2 | SAME),
    Case("conv_transpose", (1, 2, 2, 3, 2), (2, 2, 2, 1, 3), True, STRIDE_2),
    Case("coord_conv", (2, 3, 6), (4, 3, 3), True, SAME),
    Case("coord_conv", (2, 3, 4, 7), (4, 3, 1, 1), True, {}),
    Case("coord_conv", (2, 3, 5, 6), (4, 3, 3, 3), True, PADDED),
    Case("coord_conv", (2, 3, 5, 6), (4, 3, 3, 3), True, PADDED | RADIUS),
    Case(
        "coord_conv",
        (1, 2, 6, 9),
        (3, 2, 3, 2),
        False,
        {"stride": (2, 3), "padding": ((0, 2), (1, 0))},
    ),
    Case("coord_conv", (2, 1, 7, 3), (3, 1, 2, 3), True, PIXELS | {"dilation": (3, 1)}),
    Case("coord_conv", (2, 3, 5, 4), (2, 3, 3, 3), True, SAME | RADIUS),
    Case("coord_conv", (2, 2, 1, 5), (3, 2, 1, 3), True, RADIUS | PADDED),
    Case("coord_conv", (2, 2, 3, 4, 2), (2, 2, 2, 2, 2), True, RADIUS),
    Case("coord_conv", (3, 2, 1, 1), (4, 2, 1, 1), True, {"size": (3, 5)}),
    Case(
        "coord_conv",
        (2, 2, 1, 1),
        (3, 2, 3, 2),
        True,
        {"size": (4, 6)} | SAME | RADIUS | STRIDE_2,
    ),
    Case("coord_conv", (2, 3, 1), (2, 3, 2), False, {"size": (5,)} | PIXELS),
]


def coords_by_definition(size, radius=False, scale="unit"):
    """coord_channels, pixel by pixel."""
    y = np.zeros((len(size) + radius, *size))
    for i in np.ndindex(*size):
        at = list(i)
        if scale == "unit":
            at = [2 * k / (n - 1) - 1 if n > 1 else 0 for k, n in zip(i, size)]
        if radius:
            at.append(math.hypot(*at))
        y[:, *i] = at
    return y


def each_axis(value, rank):
    """An option as an array with an entry for each axis."""
    return np.array([value] * rank if isinstance(value, int) else value)


def pads_by_definition(padding, size, kernel, stride, dilation, output_padding):
    """A (before, after) pair for each axis; output_padding is None but for a transposed one."""
    pairs = []
    for a, (n, k, s, d) in enumerate(zip(size, kernel, stride, dilation)):
        if padding == "same" and output_padding is None:
            outputs = math.ceil(n / s)
            total = max((outputs - 1) * s + (k - 1) * d + 1 - n, 0)
            pairs.append((total // 2, total - total // 2))
        elif padding == "same":
            total = (n - 1) * s + (k - 1) * d + 1 + output_padding[a] - n * s
            pairs.append((total // 2, total - total // 2))
        elif isinstance(padding, int):
            pairs.append((padding, padding))
        else:
            pairs.append(padding[a])
    return np.array(pairs)


def conv_by_definition(
    x, w, bias, draw, *, stride=1, padding=0, dilation=1, groups=1, output_padding=None
):
    """y, dy, dx, dw, b and db. Output pixel o of the convolution reads pixel i through tap k; the
    transposed one, which output_padding stands for, has x where the other has y."""
    transposed = output_padding is not None
    rank = x.ndim - 2
    size = np.array(x.shape[2:])
    kernel = np.array(w.shape[2:])
    stride = each_axis(stride, rank)
    dilation = each_axis(dilation, rank)
    extra = each_axis(output_padding, rank) if transposed else None
    pads = pads_by_definition(padding, size, kernel, stride, dilation, extra)
    before = pads[:, 0]
    span = (kernel - 1) * dilation + 1
    if transposed:
        small = size
        large = (size - 1) * stride + span + extra - pads.sum(axis=1)
    else:
        large = size
        small = (size + pads.sum(axis=1) - span) // stride + 1
    C = x.shape[1]
    F = w.shape[1] * groups if transposed else len(w)
    y = np.zeros((len(x), F, *(large if transposed else small)))
    b = draw(F) * bias
    dy = draw(y.shape)
    dx = np.zeros_like(x)
    dw = np.zeros_like(w)
    for o, k in itertools.product(np.ndindex(*small), np.ndindex(*kernel)):
        i = tuple(o * stride + k * dilation - before)
        if not all(0 <= a < n for a, n in zip(i, large)):
            continue
        at_x, at_y = (o, i) if transposed else (i, o)
        for n, c, f in np.ndindex(len(x), C, F):
            if c // (C // groups) != f // (F // groups):
                continue
            tap = (c, f % (F // groups), *k) if transposed else (f, c % (C // groups), *k)
            y[n, f, *at_y] += x[n, c, *at_x] * w[tap]
            dx[n, c, *at_x] += dy[n, f, *at_y] * w[tap]
            dw[tap] += dy[n, f, *at_y] * x[n, c, *at_x]
    y += b.reshape(-1, *(1,) * rank)
    return y, dy, dx, dw, b, dy.sum(axis=(0, *range(2, y.ndim)))


def case_name(case):
    """Such as conv-6x9-stride-padding."""
    size = case.options.get("size") or case.x[2:]
    more = [key for key in case.options if key != "size"]
    return "-".join([case.op, "x".join(map(str, size)), *more])


def arrays_of_case(case, rng):
    """The arrays of a case, by name."""
    of_coords = {k: v for k, v in case.options.items() if k in ("radius", "scale")}
    of_conv = {k: v for k, v in case.options.items() if k not in ("size", *of_coords)}
    if case.x is None:
        return {"y": coords_by_definition(case.options["size"], **of_coords)}
    C = case.x[1]
    size = case.options.get("size") or case.x[2:]
    x = rng.standard_normal(case.x)
    read = x  # what the convolution reads: x, tiled, with coordinates
    if "coord" in case.op:
        coords = coords_by_definition(size, **of_coords)
        tiled = np.broadcast_to(x, (*case.x[:2], *size))
        read = np.concatenate([tiled, np.stack([coords] * len(x))], axis=1)
    if case.w is None:
        dy = rng.standard_normal(read.shape)
        return {"x": x, "y": read, "dy": dy, "dx": dy[:, :C]}
    F, c, *kernel = case.w
    w = rng.standard_normal((F, c + read.shape[1] - C, *kernel))
    if case.op == "conv_transpose":
        of_conv = {"output_padding": 0} | of_conv
    y, dy, dx, dw, b, db = conv_by_definition(read, w, case.bias, rng.standard_normal, **of_conv)
    dx = dx[:, :C]
    if "size" in case.options:
        dx = dx.sum(axis=tuple(range(2, dx.ndim)), keepdims=True)
    arrays = {"x": x, "w": w, "y": y, "dy": dy, "dx": dx, "dw": dw}
    return arrays | ({"b": b, "db": db} if case.bias else {})


def write_vectors(path):
    """Write the cases, in float64 and the same bytes each time, as arrays case/x, case/w, ..."""
    rng = np.random.default_rng(0)
    arrays = {}
    for case in CASES:
        name = case_name(case)
        arrays[f"{name}/options"] = json.dumps({"op": case.op, **case.options})
        arrays |= {f"{name}/{key}": a for key, a in arrays_of_case(case, rng).items()}
    with open(path, "wb") as file:  # the very name that was given
        np.savez(file, **arrays)


def vectors(arguments):
    """The command that writes the cases."""
    parser = command_parser("vectors", write_vectors.__doc__)
    parser.add_argument("file", type=target, help="an npz file, written under this very name")
    write_vectors(parser.parse_args(arguments).file)
    return 0


# CHECK: what another implementation of the coordinates does differently --------------------------

CHECK_TEXT = """\
Run a layer that adds coordinates, or a CoordConv layer, on images of several sizes, and say
image by image what its coordinates are where they are not those of coordref.

MODULE is a file, or a module that Python finds from this folder. NAME is a function of a NumPy
array (N, C, *size), or a class of PyTorch, which is made with --options. Of a class that ends in
a convolution, what this convolution gets is looked at. Channels come first."""


# No two of these scales agree on all axes of such images, as they do where one length is another
# less one, or is 2.
CHECKED_SIZES = ((5, 5), (4, 7), (7, 3), (1, 6), (6,), (3, 4, 6))


def scalings(i, n, m):
    """The pixels i of n on the scales that others use, where the other axis has m."""
    return {
        "divided by the other's length": 2 * i / (m - 1) - 1,
        "from 0 to 1": i / (n - 1),
        "from -1/2 to 1/2": i / (n - 1) - 0.5,
        "in pixels": i,
        "divided by the length, not by one less": 2 * i / n - 1,
        "at the centres of pixels": (2 * i + 1) / n - 1,
    }


def same(a, b):
    """Whether two arrays are equal to the rounding of float32, NaN where NaN is."""
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def of_short_axis(channel, size):
    """The axis of length 1 that a constant channel stands for, and what it has instead of 0; None
    if there is no such axis."""
    value = channel.flat[0]
    if 1 not in size or not same(channel, np.full(size, value)):
        return None
    told = "NaN" if np.isnan(value) else f"{value:.3g}, not 0,"
    return size.index(1), f"{told} on an axis of length 1"


def explained_axis(channel, size):
    """The axis that a channel is the coordinate of, and how it is scaled; None if not known."""
    right = coords_by_definition(size)
    for axis, want in enumerate(right):
        if same(channel, want):
            return axis, ""
    if of_short_axis(channel, size):
        return of_short_axis(channel, size)
    for axis, n in enumerate(size):
        i = np.indices(size)[axis].astype(np.float64)
        with np.errstate(all="ignore"):
            known = scalings(i, np.float64(n), np.float64(size[axis - 1]))
        for name, scaled in known.items():
            if n > 1 and same(channel, scaled):
                return axis, name
    for axis, want in enumerate(right):
        shift = channel.flat[0] - want.flat[0]
        if np.isfinite(shift) and same(channel - shift, want):
            return axis, f"shifted by {shift:.3g}"
        if same(-channel, want):
            return axis, "from 1 to -1"
    return None


def explained_radius(channel, coords):
    """What is wrong with a radius, beside the coordinates it is made of; "" if nothing is."""
    for centre in (0, 0.5, -0.5):
        if same(channel, np.sqrt(sum((c - centre) ** 2 for c in coords))):
            return "radius off centre" if centre else ""
    most = np.nanmax(channel) if np.isfinite(channel).any() else math.nan
    right = np.sqrt(sum(c**2 for c in coords))
    if same(channel * right.max(), right * most):
        return f"radius scaled to at most {most:.3g}"
    return "radius not known"


def explained(added, size):
    """What is different about the coordinate channels (K, *size) that a layer adds: phrases."""
    names = "row col".split() if len(size) == 2 else [f"axis {a}" for a in range(len(size))]
    rank = len(size)
    if len(added) not in (rank, rank + 1):
        return [f"{len(added)} channels are added, not {rank} or, with radius, {rank + 1}"]
    found = [explained_axis(channel, size) for channel in added[:rank]]
    axes = [known[0] if known else None for known in found]
    for a, axis in enumerate(axes):
        if axes.count(axis) > 1 and axis != a:  # another channel is the coordinate of that axis
            found[a] = None
    phrases = []
    order = [axis for axis, _ in filter(None, found)]
    if None not in found and order != list(range(rank)):
        phrases.append(f"channels swapped: ({', '.join(names[a] for a in order)})")
    for name, channel, known in zip(names, added, found):
        if known is None:
            phrases.append(f"{name} {'not known' if np.isfinite(channel).all() else 'NaN'}")
        elif known[1]:
            phrases.append(f"{names[known[0]]} {known[1]}")
    if len(added) == rank + 1:
        phrases.append(explained_radius(added[rank], added[:rank]))
    if not np.isfinite(added).all() and not any("NaN" in phrase for phrase in phrases):
        phrases.append("NaN or infinite on an axis of length 1" if 1 in size else "not finite")
    return [phrase for phrase in phrases if phrase]


def load_layer(text, options):
    """The function or the class that MODULE:NAME names, and a class as an object."""
    module, _, name = text.rpartition(":")
    if not module or not name:
        raise ValueError(f"{text} is not MODULE:NAME, such as layers.py:AddCoords")
    if module.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(module)))  # for what it imports
        spec = importlib.util.spec_from_file_location("checked_layer", module)
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    else:
        sys.path.insert(0, os.getcwd())
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found(**options) if isinstance(found, type) else partial(found, **options)


def inner_convolution(layer):
    """The convolution that a PyTorch layer ends in, perhaps the layer itself, or None."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(layer, torch.nn.Module):
        return None
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    found = [part for part in layer.modules() if isinstance(part, kinds)]
    # a layer that inherits from a convolution may hold the one that it uses
    return found[-1] if found else None


class Noted(Exception):
    """Ends a layer once its convolution was called."""


def read_by(layer, x):
    """What a layer makes of x before its convolution, if it has one, as a NumPy array."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(layer, torch.nn.Module):
        return np.asarray(layer(x))
    seen = []
    conv = inner_convolution(layer)

    def note(given, *others):
        """In place of the convolution itself, whose kernel may be larger than the image."""
        seen.append(given)
        raise Noted

    if conv is not None:
        conv._conv_forward = note  # what the forward of PyTorch's convolutions calls
    try:
        with torch.no_grad():
            seen.append(layer(torch.tensor(x, dtype=torch.float32)))
    except Noted:
        pass
    finally:
        if conv is not None:
            del conv._conv_forward
    return seen[0].detach().numpy()


def channels_for(layer, rank):
    """How many channels x may have: any, or what a convolution leaves beside the coordinates."""
    conv = inner_convolution(layer)
    if conv is None or conv.in_channels == 0:  # as those of PyTorch that wait for the first input
        return [3]
    return [conv.in_channels - rank, conv.in_channels - rank - 1]


def check_size(layer, size):
    """The phrases of what differs for images of a size; raises what the layer raises."""
    error = None
    for C in channels_for(layer, len(size)):
        x = np.random.default_rng(0).standard_normal((2, max(C, 1), *size)).astype(np.float32)
        try:
            read = read_by(layer, x)
            break
        except Exception as refused:  # whatever someone's code raises is an answer
            error = error or refused
    else:
        raise error
    C = x.shape[1]
    if read.ndim != x.ndim or len(read) != 2 or read.shape[2:] != size or read.shape[1] <= C:
        return [f"its shape is {read.shape} for x of {x.shape}"]
    if same(read[:, -C:], x) and not same(read[:, :C], x):
        read = np.roll(read, C, axis=1)
        phrases = ["coordinates before the channels of x"]
    elif same(read[:, :C], x):
        phrases = []
    else:
        return ["the channels of x are changed"]
    added = read[:, C:].astype(np.float64)
    if not same(added[0], added[1]):
        phrases.append("the images have different coordinates")
    return phrases + explained(added[0], size)


def check_layer(layer):
    """The phrases of what differs by the size of an image. None stands for images of a rank that
    the layer does not take at all."""
    conv = inner_convolution(layer)
    results = {}
    for size in CHECKED_SIZES:
        if conv is not None and len(conv.kernel_size) != len(size):
            results[size] = None
            continue
        try:
            with np.errstate(all="ignore"):
                results[size] = check_size(layer, size)
        except Exception as error:  # whatever someone's code raises is an answer
            results[size] = error
    ranks = {len(size) for size, found in results.items() if isinstance(found, list)}
    for size, found in results.items():
        if isinstance(found, Exception):
            phrase = textwrap.shorten(f"raises {type(found).__name__}: {found}", 90)
            results[size] = [phrase] if len(size) in ranks else None
    return results


def check(arguments):
    """The command that runs someone's layer on the vectors' images."""
    parser = command_parser("check", CHECK_TEXT)
    parser.add_argument("layer", metavar="MODULE:NAME", help="such as layers.py:AddCoords")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="for it")
    options = parser.parse_args(arguments)
    try:
        results = check_layer(load_layer(options.layer, options.options))
    except Exception as error:
        parser.error(f"{options.layer}: {type(error).__name__}: {error}")
    width = width_of_table()
    different = 0
    for size, phrases in results.items():
        name = "x".join(map(str, size))
        word = "-" if phrases is None else "differs" if phrases else "same"
        note = "takes no images of this rank" if phrases is None else "; ".join(phrases)
        different += word == "differs"
        head = f"  {word:8}{name:8}"
        print("\n".join(wrapped(note, width, head, " " * 18)) if note else head)
    judged = [phrases for phrases in results.values() if phrases is not None]
    if not judged:
        parser.error(f"{options.layer} takes no image of any rank as (N, C, *size)")
    in_all = [phrase for phrase in judged[0] if all(phrase in phrases for phrases in judged)]
    print(f"\n{different} of {len(judged)} images differ; {len(results) - len(judged)} not judged")
    if in_all:
        print("\n".join(wrapped(f"in all of them: {'; '.join(in_all)}", width)))
    return 1 if different else 0


# THE COMMAND -------------------------------------------------------------------------------------


def nearest(text, known):
    """The end of a sentence that names what was meant, if anything is near."""
    near = difflib.get_close_matches(text, known, 1, 0.4)
    return f"; the nearest is {near[0]}" if near else ""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and which names a wrong option and its nearest."""

    def error(self, message):
        lines = wrapped(f"bench.py: {message}", width_of_table())
        print("\n".join(lines), file=sys.stderr)
        sys.exit(2)

    def parse_args(self, arguments):
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            hint = nearest(unknown[0], self._option_string_actions)
            self.error(f"there is no {unknown[0]}{hint}; --help names all options and commands")
        return options


def command_parser(name, text):
    return Parser(prog=f"bench.py {name}", description=text, allow_abbrev=False)


def line_of(row):
    """A row as --list shows it; --only looks for its patterns here."""
    return f"{row.id:22} {row.source:9} {row.claim}"


def chosen_rows(text, rows):
    """The rows that --only names, by ids or patterns separated by commas."""
    found = []
    for part in text.split(","):
        fitting = [row for row in rows if row.id == part]
        if not fitting:
            with contextlib.suppress(re.error):
                fitting = [row for row in rows if re.search(part, line_of(row))]
        if not fitting:
            hint = nearest(part, [row.id for row in rows])
            short = part if len(part) < 40 else f"{part[:36]} ..."
            raise ValueError(f"--only: {short} fits no row{hint}; --list names them")
        found += fitting
    return [row for row in rows if row in found]


def seed_range(text):
    """Seeds of the command line: N are those from 10 on, A:B those from A to B - 1."""
    first, _, last = text.rpartition(":")
    found = range(int(first), int(last)) if first else range(10, 10 + int(text))
    if not found or found[0] < 0:
        raise ValueError
    return found


def target(path):
    """A file that can be written; where it cannot, that is known now and not after minutes."""
    try:
        open(path, "ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(error) from None
    return path


def target_folder(path):
    """A folder that can be written to."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(error) from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"no files can be made in {path}")
    return path


def pattern(text):
    re.compile(text)
    return text


COMMANDS = {"ops": ops, "vectors": vectors, "check": check}


def options_of(arguments):
    """The options of a call without a command, and its rows."""
    parser = Parser(
        prog="bench.py",
        description=__doc__,
        allow_abbrev=False,
        usage="bench.py [options] | ops | vectors FILE | check MODULE:NAME",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=22),
    )
    add = parser.add_argument
    add("--only", metavar="ROWS", help="these rows alone: ids or patterns, separated by commas")
    add("--list", action="store_true", help="the ids and claims of the rows")
    add(
        "--seeds", type=seed_range, metavar="N", help="N seeds from 10 on, or A:B, from A to B - 1"
    )
    add("--quick", action="store_true", help="one seed, and the long trainings cut, not judged")
    add("--json", type=target, metavar="FILE", help="write verdicts and runs to this file as well")
    add("--figures", type=target_folder, metavar="DIR", help="draw the figures into this folder")
    add("--markdown", action="store_true", help="print the table for a README")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: train with CuPy")
    add("--full", action="store_true", help="the published lengths, by their stored runs")
    add(
        "--run",
        nargs="?",
        const="",
        type=pattern,
        metavar="NAMES",
        help="with --full: make the runs that are missing, or those whose names fit a pattern",
    )
    add("--again", metavar="ID", help="with --full: make a stored run again and compare the two")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS.values() if row.full == options.full]
    if options.only:
        try:
            rows = chosen_rows(options.only, rows)
        except ValueError as error:
            parser.error(str(error))
    if options.full and (options.seeds or options.quick):
        parser.error("--full has its own seeds and lengths: it takes no --seeds and no --quick")
    if not options.full and (options.run is not None or options.again):
        parser.error("--run and --again are for --full")
    ids = stored_ids() if options.again else {}
    if options.again and options.again not in ids:
        parser.error(f"--again: there is no run {options.again}{nearest(options.again, ids)}")
    if options.figures and (options.only or options.quick):
        parser.error("--figures needs every row, and whole trainings")
    if options.figures and not importlib.util.find_spec("matplotlib"):
        parser.error("--figures needs matplotlib")
    if options.device == "gpu" and cr.best_module() is np:
        parser.error("--device gpu: no GPU answers to CuPy")
    options.seeds = options.seeds or seed_range("1" if options.quick else "3")
    return options, rows


def main(arguments=None):
    """Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not os.path.isfile(__file__):
        say("processes cannot be started from standard input: run it as a file, python bench.py")
        return 2
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    options, rows = options_of(arguments)
    if options.list:
        print("\n".join(map(line_of, rows)))
        return 0
    if options.again:
        return run_again(options.again, options)
    return table(rows, options)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has gone, as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
