# SPDX-License-Identifier: MIT
"""The dispute about CoordConv as a table of verdicts, then speeds against peers.

    python bench.py             every row with three seeds, under two minutes on two cores
    python bench.py --quick     shorter trainings and one seed, under 20 seconds
    python bench.py --full      the published lengths, hours; goes on where it was stopped
    python bench.py --list      the rows
    python bench.py ops         the speed of convolution by shape and by size, against peers

Each row runs one claim of the paper (Liu et al. 2018, arXiv 1807.03247), of its critic
(Piekniewski 2018), of the article that reported both (QbitAI 2018) or of this project, and says
what was measured here and what the evidence says of the claim. A row marked as a check is a
promise of coordref itself: the exit status is 1 where one fails. Nothing is downloaded; all data
are drawn here.

Contents: measuring; the critic; the paper's tasks; a residual network; the rows and their
verdicts; speed; figures; the command.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import glob
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import scipy
import scipy.signal

import coordref as cr

# MEASURING ---------------------------------------------------------------------------------------

OURS = {"painter": 60, "centre": 60, "tail": 200, "regressor": 120}     # steps of our recipes
MODES = {       # thin: every how manieth test position; patience: see Experiment; others: lengths
    "quick": {"seeds": [0], "patience": 0.2, "he": {"steps": 6}, "render": {"steps": 2},
              "regress": {"steps": 2}, "resnet": 3, "images": 512, "points": 2, "repeats": 2,
              "thin": {"classification": 6, "rendering": 12, "regression": 6},
              **OURS, "centre": 20, "torch": False},
    "default": {"seeds": [0, 1, 2], "patience": 10, "he": {"steps": 24}, "render": {"steps": 4},
                "regress": {"steps": 20}, "resnet": 32, "images": 2048, "points": 4, "repeats": 3,
                "thin": {"rendering": 6, "he": 3}, **OURS, "torch": True},
    "full": {"seeds": list(range(10)), "patience": None, "he": {"epochs": 50},
             "render": {"epochs": 50}, "regress": {"epochs": 100, "batch_size": 256},
             "resnet": 1000, "images": 2 ** 14, "points": 50, "repeats": 9, "thin": {}, **OURS,
             "torch": True},
}


def say(text=""):
    """A line of progress on a terminal, which the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def synchronise(xp):
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def timed(run, xp=np):
    synchronise(xp)
    start = time.perf_counter()
    result = run()
    synchronise(xp)
    return result, time.perf_counter() - start


def parameters(net):
    return sum(p.size for layer in net for p in layer.params if p is not None)


def write_json(path, content):
    """Whole or not at all: beside the old file first, then in its place."""
    part = f"{path}.part"
    with open(part, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Experiment(NamedTuple):
    """run(lab, seed) makes one run and returns what it found, its score among it.

    rival : the experiment that a baseline is compared with. A baseline has one seed and, unless
        the published lengths are asked for, trains some times as long as its rival took to reach
        its goal
    seeded : False for what is the same every time
    """
    run: Callable
    rival: str | None = None
    seeded: bool = True


def reached(name):
    """The test that a score of an experiment has to pass."""
    return {"classification": lambda s: s == 1, "rendering": lambda s: s > 0.99,
            "regression": lambda s: s < 0.5}[name.split("/")[0]]


def first_time(record, test):
    """Seconds of training until the score passed a test, or all of them where it never did."""
    return next((spent for spent, _, score in record["curve"] if test(score)),
                record["seconds"][0])


class Lab:
    """One run: a training under the clock, its curve and its progress, and what is found."""

    def __init__(self, name, seed, settings, limit=None, checkpoint=None, xp=np,
                 tell=lambda *progress: None):
        self.settings, self.xp, self.limit, self.tell = settings, xp, limit, tell
        self.checkpoint = checkpoint
        self.record = {"experiment": name, "seed": seed, "seconds": [0.0], "curve": [],
                       "steps": 0}

    def data(self, split):
        data, kinds = cr.not_so_clevr(split), self.record["experiment"].split("/")
        return data._replace(test=data.test[::max(self.settings["thin"].get(kind, 1)
                                                  for kind in kinds)])

    def few(self, data):
        """A part of the test set, on which the points of a curve are scored."""
        return data._replace(test=data.test[::16 if self.settings["patience"] else 1])

    def watch(self, steps, per_epoch, score=None, keep=lambda: None):
        """A callback that times a training without its tests, keeps its curve as [seconds, steps,
        score], tells its progress, and ends it at the time limit where there is one."""
        record, limit = self.record, self.limit
        before, steps_before, curve = record["seconds"][0], record["steps"], record["curve"]
        start, paused = time.perf_counter(), 0.0

        def callback(step, net, loss):
            nonlocal before, paused
            if step > 1 and record["steps"] == steps_before:    # goes on from its checkpoint
                curve[:] = [point for point in curve if point[1] < step]
                before = curve[-1][0] if curve else 0.0
            spent = time.perf_counter() - start - paused
            done = spent / limit if limit else step / steps
            if score and done >= (len(curve) + 1) / self.settings["points"]:
                synchronise(self.xp)
                spent = time.perf_counter() - start - paused
                value, pause = timed(lambda: score(net))
                curve.append([before + spent, steps_before + step, value])
                keep()
                paused += pause
            record["seconds"], record["steps"] = [before + spent], steps_before + step
            self.tell(min(done, 1), f"epoch {step / per_epoch:.1f}"
                      + (f", {curve[-1][2]:.3f}" if curve else ""))
            return limit is not None and spent >= limit
        return callback

    def train(self, net, data, task, score="test", **options):
        """cr.train under watch; score may be another function of the network, or None. A training
        of an hour goes on from its last checkpoint."""
        if score == "test":
            def score(net):
                return cr.evaluate(net, self.few(data), task=task)
        per_epoch = -(-len(data.train) // options.get("batch_size", 16))
        steps = options.get("steps") or options["epochs"] * per_epoch
        kept = f"{self.checkpoint}.json" if self.checkpoint and steps >= 500 else None
        if kept:
            options.update(checkpoint=self.checkpoint, checkpoint_every=-(-steps // 100))
            if os.path.exists(kept):
                with open(kept) as file:
                    self.record["curve"] = json.load(file)

        def keep():
            if kept:
                write_json(kept, self.record["curve"])
        return cr.train(net, data, task=task, callback=self.watch(steps, per_epoch, score, keep),
                        **options)[0]

    def scored(self, score):
        return score()

    def finish(self, net, data, task):
        """What a record says of a trained network; of the first seed also the positions."""
        found = {"weights": parameters(net), "tested": len(data.test),
                 "score": self.scored(lambda: cr.evaluate(net, data, task=task))}
        if task != "rendering" and self.record["seed"] == self.settings["seeds"][0]:
            found["predicted"] = predictions(net, data, task, self.xp).round(2).tolist()
        return found


class Rehearsal(Lab):
    """Makes three steps of each training to estimate what all of them take."""

    def watch(self, steps, per_epoch, score=None, keep=None):
        times = []

        def callback(step, net, loss):
            synchronise(self.xp)
            times.append(time.perf_counter())
            if step == min(3, steps):
                self.record["seconds"][0] += (times[-1] - times[0]) / max(step - 1, 1) * steps
            return step == 3
        return callback

    def scored(self, score):
        return 0.0

    def finish(self, net, data, task):
        return {}


def make_run(name, seed, settings, limit=None, checkpoint=None, xp=np, kind=Lab):
    """The record of one run of an experiment."""
    lab = kind(name, seed, settings, limit, checkpoint, xp, functools.partial(tell, name, seed))
    found = EXPERIMENTS[name].run(lab, seed)
    return {**lab.record, **found}


WORKER = {}         # what a process that makes runs for another shares with it


def start_worker(queue, stop, parent):
    """Ctrl-C is for the process that gave the work, which tells this one by stop. Where that is
    gone, killed perhaps, nobody waits for this one any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    WORKER.update(queue=queue, next=0.0)

    def end():
        while os.getppid() == parent and not stop.is_set():
            time.sleep(0.1)
        os._exit(1)
    threading.Thread(target=end, daemon=True).start()


def tell(name, seed, done, text):
    """Pass on how far a run is, now and then."""
    if not WORKER:
        say(f"{name}, seed {seed}: {100 * done:.0f} %, {text}")
    elif time.perf_counter() > WORKER["next"]:
        WORKER["queue"].put((name, seed, done, text))
        WORKER["next"] = time.perf_counter() + 0.2


@contextlib.contextmanager
def one_core():
    """OMP_NUM_THREADS=1 for what runs or is started meanwhile."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


class Runs:
    """The records of all runs by name and seed, and how to make those that are missing: one run
    on each core at a time, as most of these networks are too small for more cores to pay."""

    def __init__(self, settings, xp=np, records=(), path=None):
        self.settings, self.xp, self.path = settings, xp, path
        self.records = {(r["experiment"], r["seed"]): r for r in records}
        self.workers = min(8, cores()) if xp is np else 1
        self.costs, self.progress = {}, {}      # estimated seconds of a run; share done and text

    def seeds(self, name):
        seeds = self.settings["seeds"] if EXPERIMENTS[name].seeded else [None]
        return seeds[:1] if EXPERIMENTS[name].rival else seeds

    def jobs(self, names):
        return [(name, seed) for name in names for seed in self.seeds(name)]

    def have(self, names):
        return all(job in self.records for job in self.jobs(names))

    def of(self, name):
        return [self.records[job] for job in self.jobs([name])]

    def arguments(self, name, seed):
        """What make_run wants for a job, or None while its rival's time is not known."""
        rival, limit, checkpoint = EXPERIMENTS[name].rival, None, None
        if rival and self.settings["patience"]:
            if not self.have([rival]):
                return None
            limit = self.settings["patience"] * float(np.median(
                [first_time(r, reached(rival)) for r in self.of(rival)]))
        if not self.settings["patience"]:
            checkpoint = f"{self.path}.{re.sub(r'[^a-z0-9]+', '-', name)}-{seed}.npz"
        return name, seed, self.settings, limit, checkpoint

    def estimate(self, names):
        """Seconds until what is missing will have been made."""
        with one_core() if self.workers > 1 else contextlib.nullcontext():
            for name, seed in self.jobs(names):         # a rival stands before its baseline
                rival, patience = EXPERIMENTS[name].rival, self.settings["patience"]
                if ((name, seed) in self.records or name in self.costs
                        or not EXPERIMENTS[name].seeded):
                    continue
                say(f"estimating the time of {name}")
                self.costs[name] = (
                    patience * self.costs[rival] if rival and patience else make_run(
                        name, seed, self.settings, xp=self.xp, kind=Rehearsal)["seconds"][0])
        return self.left(self.jobs(names))

    def left(self, jobs):
        return sum(self.costs.get(job[0], 0) * (1 - self.progress.get(job, (0,))[0])
                   for job in jobs if job not in self.records) / self.workers

    def show(self, jobs, rows):
        """The bar: how much is done, where the runs at work stand, and the time left."""
        made = sum(job in self.records for job in jobs)
        say(f"[{'#' * (20 * made // len(jobs)):.<20}] " + "; ".join(
            f"{rows[name]} seed {seed} {text}" for (name, seed), (_, text) in
            self.progress.items()) + (f"  {duration(self.left(jobs))} left" if self.costs else ""))

    def add(self, job, record):
        self.records[job] = record
        self.progress.pop(job, None)
        for file in glob.glob(glob.escape(f"{self.arguments(*job)[-1]}") + "*"):
            os.unlink(file)

    def make(self, names, rows):
        """Make the missing runs of these experiments, and yield whenever one is there."""
        jobs = self.jobs(names)
        waiting = [job for job in jobs if job not in self.records]
        alone = [job for job in waiting if self.workers == 1 or job[0].startswith("speed")]
        waiting = [job for job in waiting if job not in alone]
        if waiting:
            context = multiprocessing.get_context("spawn")
            queue, stop, active = context.SimpleQueue(), context.Event(), {}
            with one_core():
                pool = concurrent.futures.ProcessPoolExecutor(
                    self.workers, context, start_worker, (queue, stop, os.getpid()))
                try:
                    while waiting or active:
                        ready = [job for job in waiting if self.arguments(*job)]
                        for job in ready[:self.workers - len(active)]:
                            waiting.remove(job)
                            self.progress[job] = 0.0, ""
                            active[pool.submit(make_run, *self.arguments(*job))] = job
                        done, _ = concurrent.futures.wait(
                            active, 0.2, concurrent.futures.FIRST_COMPLETED)
                        for future in done:
                            self.add(active.pop(future), future.result())
                        while not queue.empty():
                            name, seed, share, text = queue.get()
                            if (name, seed) in self.progress:
                                self.progress[name, seed] = share, text
                        self.show(jobs, rows)
                        if done:
                            yield
                except BaseException:
                    stop.set()
                    raise
                finally:
                    pool.shutdown(cancel_futures=True)
        for job in alone:
            self.add(job, make_run(*self.arguments(*job), self.xp))
            yield


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else (
        f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s")


def predictions(net, data, task, xp):
    """The positions (row, col) that a network gives for the test positions."""
    told = []
    for coords in np.array_split(data.coords[data.test], -(-len(data.test) // 16)):
        if task == "regression":
            x = cr.encode(coords, (data.canvas,) * 2)
            told.append(cr.to_numpy(cr.forward(net, xp.asarray(x))[0]) * data.canvas)
        else:
            x = (2 * coords - (data.canvas - 1)) / (data.canvas - 1)
            y = cr.forward(net, xp.asarray(x.astype(np.float32)[:, :, None, None]))[0]
            best = cr.to_numpy(y.reshape(len(y), -1).argmax(axis=1))
            told.append(np.stack(np.unravel_index(best, y.shape[2:]), axis=1))
    return np.concatenate(told)


# THE CRITIC --------------------------------------------------------------------------------------

def listing(image):
    """The critic's listing for one image (H, W), convolutions by scipy: (row, col)."""
    H, W = image.shape
    col, row = np.meshgrid(np.arange(W, dtype=image.dtype), np.arange(H, dtype=image.dtype))
    centre = np.zeros((3, 3), image.dtype)
    centre[1, 1] = 1
    found = []
    for size, coordinate in ((H, row), (W, col)):
        z = (scipy.signal.convolve2d(image, size * centre, mode="same")
             + scipy.signal.convolve2d(coordinate, -centre, mode="same"))
        found.append(float(size - np.maximum(z, 0).sum()))
    return found


def both_ways(lab, seed):
    """Positions of which decoder and encoder are not exact, as networks and as closed forms."""
    record = {"positions": 0, "decoder_wrong": 0, "encoder_wrong": 0}
    for size in ((70, 100), (64, 64), (1, 9), (5, 1)):
        where = np.array(list(np.ndindex(*size)))
        decoder, encoder = (f(size, xp=lab.xp) for f in (cr.decoder_network, cr.encoder_network))
        record["encoder_weights"] = parameters(encoder)
        for part in np.array_split(where, -(-len(where) // 256)):
            images = np.zeros((len(part), 1, *size), np.float32)
            images[(np.arange(len(part)), 0, *part.T)] = 1
            coords, hot = lab.xp.asarray(part.astype(np.float32)), lab.xp.asarray(images)
            read = [cr.decode(hot), cr.forward(decoder, hot)[0]]
            drawn = [cr.encode(coords, size), cr.forward(encoder, coords[:, :, None, None])[0]]
            record["positions"] += len(part)
            for key, found, wanted in (("decoder_wrong", read, part),
                                       ("encoder_wrong", drawn, images)):
                wrong = [(cr.to_numpy(a) != wanted).reshape(len(part), -1).any(axis=1)
                         for a in found]
                record[key] += int((wrong[0] | wrong[1]).sum())
    return {**record, "score": 1 - (record["decoder_wrong"] + record["encoder_wrong"])
            / (2 * record["positions"])}


def odd_images(lab, seed):
    """What the decoder and the listing give for images that are not one-hot, and at the corner."""
    H, W = 70, 100
    images = np.zeros((4, 1, H, W), np.float32)
    images[0, 0, 10, 20] = images[0, 0, 30, 70] = 1
    images[1, 0, 10, 20] = 0.5
    images[3, 0, H - 1, W - 1] = 1
    net = cr.decoder_network((H, W), xp=lab.xp)
    by_network = cr.to_numpy(cr.forward(net, lab.xp.asarray(images))[0]).tolist()
    by_listing = [listing(image[0]) for image in images]
    return {"network": by_network, "listing": by_listing,
            "score": float(by_network == by_listing)}


def own_test(lab, seed):
    """The largest positions that the listing's own test draws: randint has an exclusive end."""
    H, W, draws = 70, 100, 10 ** 6
    rng = np.random.RandomState(0)
    return {"draws": draws, "row": int(rng.randint(0, H - 1, draws).max()),
            "col": int(rng.randint(0, W - 1, draws).max()), "score": 1.0}


def as_feature(lab, seed):
    """coord_conv and its gradients against a convolution of an image with two more channels."""
    rng, errors = np.random.default_rng(0), []
    for size in ((9, 14), (32, 21), (5, 6, 7), (40,)):
        K = len(size)
        x = rng.standard_normal((3, 4, *size))
        w = rng.standard_normal((5, 4 + K, *(3,) * K))
        x, w = lab.xp.asarray(x), lab.xp.asarray(w)
        y = cr.coord_conv(x, w, padding=1)
        channels = cr.add_coords(x)
        dx, dw, _ = cr.conv_backward(y, channels, w, padding=1)
        pairs = zip((y, *cr.coord_conv_backward(y, x, w, padding=1)[:2]),
                    (cr.conv(channels, w, padding=1), cr.add_coords_backward(dx, x), dw))
        errors += [float(abs(a - b).max() / abs(b).max()) for a, b in pairs]
    return {"score": max(errors)}


# THE PAPER'S TASKS -------------------------------------------------------------------------------

DECONVS = {     # the deconvolution networks of the paper's sweep that stand for it
    "k2 w1": {"kernel": 2, "width": 1, "learning_rate": 0.005, "l2": 0.0},
    "k3 w2": {"kernel": 3, "width": 2, "learning_rate": 0.01, "l2": 1e-3},
    "k2 w2": {"kernel": 2, "width": 2, "learning_rate": 0.01, "l2": 0.0},
}


# Adam with a shorter memory than usual: with beta1 0.9, the paper's beta2 of 0.99 and rate 0.01
# about one seed in fifty missed some pixels of the quadrant (2026-11-24).
PAINTER = {"batch_size": 8, "learning_rate": 0.008, "beta1": 0.7, "beta2": 0.95}


def painted(split, start, lab, seed):
    """Coordinate classification by CoordConv, from our start or with the paper's settings."""
    net, data = cr.coordconv_painter(start=start, rng=seed, xp=lab.xp), lab.data(split)
    options = ({**PAINTER, "steps": lab.settings["painter"]} if start == "relative" else
               {**lab.settings["he"], "learning_rate": 0.005, "l2": 1e-3})
    net = lab.train(net, data, "classification", rng=seed, **options)
    return lab.finish(net, data, "classification")


def deconvolved(task, split, setting, lab, seed):
    """Coordinate classification or rendering by the paper's network without coordinates."""
    options = dict(DECONVS[setting])
    net = cr.deconv_painter(kernel=options.pop("kernel"), width=options.pop("width"), rng=seed,
                            xp=lab.xp)
    data = lab.data(split)
    net = lab.train(net, data, task, epochs=1000, rng=seed,
                    decay="constant" if lab.settings["patience"] else "step", **options)
    return lab.finish(net, data, task)


def rendered(split, start, lab, seed):
    """Rendering by CoordConv. Ours comes in two parts that are then joined: the painter learns the
    centre, and the convolutions behind its softmax, to which all positions are alike, learn to
    draw the square around a pixel on a canvas of 20."""
    net, data = cr.coordconv_renderer(start=start, rng=seed, xp=lab.xp), lab.data(split)
    if start == "he":
        net = lab.train(net, data, "rendering", rng=seed, learning_rate=0.005, decay="constant",
                        **lab.settings["render"])
        return lab.finish(net, data, "rendering")
    tail = [layer.op for layer in net].index(cr.softmax) + 1
    painter = lab.train(net[:tail - 1], data, "classification", score=None, rng=seed,
                        steps=lab.settings["centre"], **PAINTER)
    joined = [*painter, net[tail - 1]]
    pixel = cr.Layer(hot_pixel, [lab.xp.ones(1, np.float32)])
    squares = lab.train([pixel, *net[tail:]], cr.not_so_clevr(split, canvas=20), "rendering",
                        score=lambda squares: cr.evaluate(
                            joined + squares[1:], lab.few(data), task="rendering"),
                        steps=lab.settings["tail"], batch_size=4, learning_rate=0.01, rng=seed,
                        scale="pixel")
    return lab.finish(joined + squares[1:], data, "rendering")


def hot_pixel(x, peak):
    """Images on a canvas of 20 with a pixel of peak at x: what a trained painter hands on."""
    return peak * cr.encode(x[:, :, 0, 0], (20, 20))


def hot_pixel_backward(dy, x, peak):
    return dy, 0 * peak                 # nothing of it is to be trained


def salient(net, size, height=3, slope=0.1):
    """A start for the regressor that is ours: a hot pixel stands out, by height, and the rest of
    the image is nearly flat, its range slope * height or less; the maximum starts at 1/2.

    The network is linear up to its maximum, so two images show what it does. The first layer's
    weights for the coordinates become smaller, and the last filters and biases are scaled, sign
    included."""
    asarray = functools.partial(cr.array_module(net[0].params[0]).asarray, dtype=np.float32)
    hot = asarray(cr.encode(np.array([[size // 2, size // 2]]), (size, size)))
    blank = cr.to_numpy(cr.forward(net[:-1], 0 * hot)[0]).reshape(2, -1)
    peaks = cr.to_numpy(cr.forward(net[:-1], hot)[0]).reshape(2, -1) - blank
    peaks = peaks[[0, 1], abs(peaks).argmax(axis=1)]
    flatter = slope * min(abs(peaks) / np.ptp(blank, axis=1))
    w, b = net[0].params
    first = [w * asarray([1, flatter, flatter])[:, None, None], b]
    w, b = net[-2].params
    last = [w * asarray(height / peaks)[:, None, None, None], b + 0.5 - height]
    return [net[0]._replace(params=first), *net[1:-2], net[-2]._replace(params=last), net[-1]]


def regressed(split, start, lab, seed):
    """Regression by CoordConv."""
    net, data = cr.coordconv_regressor(rng=seed, xp=lab.xp), lab.data(split)
    if start == "salient":
        net = lab.train(salient(net, data.canvas), data, "regression",
                        steps=lab.settings["regressor"], batch_size=4, learning_rate=0.008,
                        beta1=0.5, rng=seed)
    else:
        net = lab.train(net, data, "regression", decay="constant", learning_rate=0.01, l2=1e-5,
                        rng=seed, **lab.settings["regress"])
    return lab.finish(net, data, "regression")


def convolved(split, lab, seed):
    """Regression by the paper's convolution for a split; at the published length when asked."""
    net, data = cr.conv_regressor(split, rng=seed, xp=lab.xp), lab.data(split)
    options = {"epochs": 10 ** 4} if lab.settings["patience"] else lab.settings["regress"]
    net = lab.train(net, data, "regression", rng=seed, learning_rate=0.001, l2=1e-5,
                    decay="constant", **options)
    return lab.finish(net, data, "regression")


# A RESIDUAL NETWORK ------------------------------------------------------------------------------
#
# The article's point is about a residual network on ImageNet. These are such networks, built from
# coordref's operations: a block is an operation like any other, with its gradient below it.

BLOCKS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
          152: (3, 8, 36, 3)}


def branches(params, stride, norms):
    """The two networks whose sum a block rectifies: three convolutions with batch norm, and
    nothing at all, or one of them where the block changes the shape."""
    layers = [cr.Layer(cr.conv, [w], options) if i % 2 == 0 else
              cr.Layer(cr.batch_norm, list(w), options)
              for j, stage in enumerate(({}, {"stride": stride, "padding": 1}, {},
                                         {"stride": stride})[:len(params) // 3])
              for i, (w, options) in enumerate(((params[3 * j], stage),
                                                (params[3 * j + 1:3 * j + 3], norms[j])))]
    relu = cr.Layer(cr.relu)
    return [*layers[:2], relu, *layers[2:4], relu, *layers[4:6]], layers[6:]


def bottleneck(x, *params, stride=1, norms=({},) * 4):
    """A block of a residual network (He et al. 2015, arXiv 1512.03385): relu(main(x) + short(x)).

    x : (N, C, H, W) array
    params : w, scale, shift of a 1x1, a 3x3 and a 1x1 convolution, then those of the 1x1
        convolution of the shortcut where it has one
    stride : int, of the 3x3 convolution, where PyTorch has it, and of the shortcut
    norms : one dict per convolution, the options of its batch_norm
    """
    main, short = branches(params, stride, norms)
    return cr.relu(cr.forward(main, x)[0] + cr.forward(short, x)[0])


def bottleneck_backward(dy, x, *params, stride=1, norms=({},) * 4):
    """Gradient of bottleneck: dx, then one gradient for each of params."""
    nets = branches(params, stride, norms)
    (a, kept), (b, kept_short) = (cr.forward(net, x) for net in nets)
    dy = cr.relu_backward(dy, a + b)
    dx, grads = cr.backward(nets[0], dy, kept)
    dshort, more = cr.backward(nets[1], dy, kept_short)
    return dx + dshort, *(g for layer in grads + more for g in layer if g is not None)


def resnet(depth=50, width=64, *, classes=1000, channels=3, coords=False, rng=None,
           dtype=np.float32, xp=np):
    """A residual network: 25,557,032 parameters at depth 50 and width 64.

    depth : 14, 26, 50, 101 or 152 layers
    width : filters of the first convolution
    coords : puts the paper's extra layer at the bottom, a 1x1 CoordConv with radius, 8 filters

    The last layer is a 1x1 convolution and then the mean, which is the dense layer of the mean.
    """
    rng = np.random.default_rng(rng)

    def norm(F):
        return [xp.ones(F, dtype), xp.zeros(F, dtype)]

    def he(*shape):
        return cr.he_normal(shape, rng=rng, dtype=dtype, xp=xp)

    net, C = [], channels
    if coords:
        net, C = [cr.Layer(cr.coord_conv, [he(8, C + 3, 1, 1), xp.zeros(8, dtype)],
                           {"radius": True})], 8
    net += [cr.Layer(cr.conv, [he(width, C, 7, 7)], {"stride": 2, "padding": 3}),
            cr.Layer(cr.batch_norm, norm(width)), cr.Layer(cr.relu),
            cr.Layer(cr.max_pool, [], {"kernel": 3, "stride": 2, "padding": 1})]
    C = width
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner = width * 2 ** stage
        for block in range(blocks):
            params = [he(inner, C, 1, 1), *norm(inner), he(inner, inner, 3, 3), *norm(inner),
                      he(4 * inner, inner, 1, 1), *norm(4 * inner)]
            if block == 0:
                params += [he(4 * inner, C, 1, 1), *norm(4 * inner)]
            net.append(cr.Layer(bottleneck, params,
                                {"stride": 2 if stage and block == 0 else 1}))
            C = 4 * inner
    last = xp.asarray((rng.standard_normal((classes, C, 1, 1)) / math.sqrt(C)).astype(dtype))
    return [*net, cr.Layer(cr.conv, [last, xp.zeros(classes, dtype)]), cr.Layer(cr.mean_pool)]


def settled(net, x):
    """The network with the statistics of these images as constants of its norms."""
    layers = []
    for layer in net:
        if layer.op is cr.batch_norm:
            layer = layer._replace(options={"mean": x.mean(axis=(0, 2, 3)),
                                            "var": x.var(axis=(0, 2, 3))})
        elif layer.op is bottleneck:
            parts = branches(layer.params, layer.options["stride"], ({},) * 4)
            norms = [a.options for part in parts for a in settled(part, x)
                     if a.op is cr.batch_norm]
            layer = layer._replace(options={**layer.options, "norms": norms})
        x = layer.op(x, *layer.params, **layer.options)
        layers.append(layer)
    return layers


def shapes(n, rng, canvas=32):
    """Images (n, 3, canvas, canvas) of a square, a ring, a plus or a cross of any colour anywhere,
    a little noise on them; the kind of each, and the quadrant of its centre."""
    kind, half = rng.integers(0, 4, n), rng.integers(4, 8, n)
    centre = half[:, None] + rng.integers(0, canvas - 2 * half[:, None], (n, 2))
    row, col = (abs(np.arange(canvas) - centre[:, a, None]) for a in (0, 1))
    row, col, size = row[:, :, None], col[:, None, :], half[:, None, None]
    far, near = np.maximum(row, col), np.minimum(row, col)
    drawn = np.stack([far <= size, (far <= size) & (far > size - 2), (far <= size) & (near < 2),
                      (far <= size) & (abs(row - col) < 2)])[kind, np.arange(n)]
    images = (drawn[:, None] * rng.uniform(0.5, 1, (n, 3, 1, 1))
              + 0.1 * rng.standard_normal((n, 3, canvas, canvas)))
    return images.astype(np.float32), kind, (2 * centre > canvas - 1) @ [2, 1]


def classified(labels, coords, lab, seed):
    """A residual network on images of shapes: the class is the shape, or the quadrant it is in."""
    xp, batch, steps = lab.xp, 16, lab.settings["resnet"]
    rng = np.random.default_rng([seed, 1])          # the same images with and without coordinates
    images, *found = shapes(lab.settings["images"], rng)
    train = len(images) * 3 // 4
    images, target = xp.asarray(images), xp.asarray(np.eye(4, dtype=np.float32)[
        found[labels == "quadrant"]])
    net = resnet(14, 8, classes=4, coords=coords, rng=seed, xp=xp)
    moments = [[(xp.zeros_like(p), xp.zeros_like(p)) for p in layer.params] for layer in net]

    def score(net, test):
        net = settled(net, images[:256])
        right = [(cr.forward(net, images[i:i + 128])[0].argmax(axis=1)
                  == target[i:i + 128].argmax(axis=1)).sum()
                 for i in range(train, train + test, 128)]
        return float(sum(right)) / test

    watch = lab.watch(steps, train // batch, lambda net: score(net, 128))
    for step in range(1, steps + 1):
        at = xp.asarray(rng.choice(train, batch, replace=False))
        y, inputs = cr.forward(net, images[at])
        dy = cr.softmax_cross_entropy_backward(xp.ones((), xp.float32), y, target[at])[0]
        _, grads = cr.backward(net, dy, inputs, need_dx=False)
        rate, layers = 0.01 * (1 - (step - 1) / steps), []
        for i, (layer, dparams) in enumerate(zip(net, grads)):
            new = [cr.adam_step(p, g, *mv, step, learning_rate=rate)
                   for p, g, mv in zip(layer.params, dparams, moments[i])]
            moments[i] = [(m, v) for _, m, v in new]
            layers.append(layer._replace(params=[p for p, _, _ in new]))
        net = layers
        if watch(step, net, None):
            break
    return {"weights": parameters(net), "tested": len(images) - train,
            "score": lab.scored(lambda: score(net, len(images) - train))}


# THE ROWS ----------------------------------------------------------------------------------------

SPLITS = ("uniform", "quadrant")
RENDER_RECIPE = "the centre, and apart from it the square"
REGRESS_RECIPE = "a start in which the hot pixel stands out, beta1 0.5"


def experiments():
    found = {"critic/both ways": Experiment(both_ways, seeded=False),
             "critic/odd images": Experiment(odd_images, seeded=False),
             "critic/own test": Experiment(own_test, seeded=False),
             "critic/feature": Experiment(as_feature, seeded=False),
             "speed/convolution": Experiment(convolution_speed, seeded=False),
             "speed/step": Experiment(step_speed, seeded=False),
             "speed/decode": Experiment(decode_speed, seeded=False)}
    partial = functools.partial
    for split in SPLITS:
        for task, run, starts in (("classification", painted, ("relative", "he")),
                                  ("rendering", rendered, ("relative", "he")),
                                  ("regression", regressed, ("salient", "he"))):
            for start in starts:
                found[f"{task}/{split}/{start}"] = Experiment(partial(run, split, start))
        for task in ("classification", "rendering"):
            for setting in DECONVS:
                found[f"{task}/{split}/deconv {setting}"] = Experiment(
                    partial(deconvolved, task, split, setting), f"{task}/{split}/relative")
        found[f"regression/{split}/conv"] = Experiment(
            partial(convolved, split), f"regression/{split}/salient")
    for labels in ("shape", "quadrant"):
        for coords in (False, True):
            found[f"resnet/{labels}/{'coords' if coords else 'plain'}"] = Experiment(
                partial(classified, labels, coords))
    return found


class Row(NamedTuple):
    """A claim and how it is judged: judge(settings, *records of each experiment in needs) returns
    what was measured and the verdict. A check is a promise of coordref."""
    id: str
    claim: str
    source: str
    needs: tuple
    judge: Callable
    check: bool = False


def holds(truth):
    return "holds" if truth else "fails"


def scores(records, form="{:.1f} %", scale=100):
    """Every score, in the order of the seeds."""
    seeds = ", ".join(str(r["seed"]) for r in records)
    return (", ".join(form.format(scale * r["score"]) for r in records)
            + f" (seed{'s' * (len(records) > 1)} {seeds})")


def length(records):
    """What the runs took, the same for all of them but for the time."""
    return (f"{records[0]['steps']} steps, {np.median([r['seconds'][0] for r in records]):.1f} s, "
            f"{records[0]['weights']} weights, {records[0]['tested']} tests")


def success(records, reached):
    """How many runs got there, with the exact 95 % interval of that share."""
    import scipy.stats
    k, n = sum(reached(r["score"]) for r in records), len(records)
    low, high = scipy.stats.binomtest(k, n).proportion_ci()
    return f"{k} of {n} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


def judge_ways(key, settings, records):
    r, = records
    more = (f"{r['encoder_weights']} weights" if key == "encoder_wrong" else
            "last row and column included; 0 trained weights")
    measured = (f"{r['positions'] - r[key]} of {r['positions']} positions in 4 sizes exact, as a "
                f"network and in closed form; {more}")
    return measured, holds(not r[key])


def judge_same(settings, records):
    same = records[0]["score"] == 1
    measured = ("coord_conv, relu, sum_pool and affine with weights (size, -1) give the very "
                f"numbers of his listing on {len(records[0]['listing'])} images: {same}")
    return measured, holds(same)


def judge_odd(settings, records):
    two, half, none, _ = (tuple(map(int, pair)) for pair in records[0]["listing"])
    measured = (f"(70, 100) image as (row, col): pixels at (10, 20) and (30, 70) give {two}; half "
                f"a pixel at (10, 20) gives {half}; none gives {none}")
    return measured, "one-hot images only"


def judge_own_test(settings, draws, odd):
    r, last = draws[0], tuple(map(int, odd[0]["listing"][-1]))
    measured = (f"{r['draws']} draws as the listing makes them reach row {r['row']} of 69 and "
                f"column {r['col']} of 99; a pixel at (69, 99) gives {last}")
    return measured, "never tested there, " + ("but right" if last == (69, 99) else "and wrong")


def judge_feature(settings, records):
    measured = ("coord_conv and a convolution after add_coords: outputs and gradients within "
                f"{records[0]['score']:.0e} of each other in 1-D, 2-D and 3-D")
    return measured, holds(records[0]["score"] < 1e-12)


def judge_relative(settings, ours, he):
    measured = (f"test {scores(ours)}: {success(ours, lambda s: s == 1)}; he_normal over the same "
                f"seeds {success(he, lambda s: s == 1)}; {length(ours)}")
    return measured, holds(all(r["score"] == 1 for r in ours))


def judge_he(settings, records):
    right, steps = sum(r["score"] == 1 for r in records), records[0]["steps"]
    measured = f"he_normal start: test {scores(records)}; {length(records)}"
    return measured, ("holds" if right == len(records) else f"not within {steps} steps"
                      if not right else f"for {right} of {len(records)} seeds")


def judge_limit(limit, form, scale, settings, ours, *groups):
    top = max(r["score"] for records in groups for r in records)
    runs = "; ".join(f"{records[0]['experiment'].split('/')[2]} {scores(records, form, scale)}, "
                     f"{length(records)}" for records in groups)
    budget = (f"{settings['patience']:g} times CoordConv's time" if settings["patience"] else
              "the published length")
    measured = f"best {form.format(scale * top)} in {budget}, of {runs}"
    return measured, ("contradicted" if round(top, 2) > limit else      # claimed to two digits
                      "not contradicted" if settings["patience"] else "holds")


def judge_faster(settings, he, ours, *groups):
    slow = max((r for records in groups for r in records), key=lambda r: r["score"])
    if slow["score"] == 0:
        return "the deconvolution never had a pixel right", "no ratio"
    spent, *others = (float(np.median([first_time(r, lambda s: s >= slow["score"])
                                       for r in records])) for records in ([slow], he, ours))
    ratios = [spent / other for other in others]
    measured = (f"to the deconvolution's {100 * slow['score']:.1f} % after {spent:.1f} s (seed "
                f"{slow['seed']}) the he_normal start was {ratios[0]:.0f} times faster, the "
                f"relative start {ratios[1]:.0f} times")
    return measured, "holds" if ratios[0] >= 150 else "faster, not by 150 at this length"


@functools.cache
def deconv_weights():
    return [parameters(cr.deconv_painter(kernel=k, width=w, rng=0))
            for k in (2, 3, 4) for w in (1, 2, 3)]


def judge_parameters(settings, records):
    ours = records[0]["weights"]
    ratios = [weights / ours for weights in deconv_weights()]
    measured = (f"{ours} weights, in the paper's nine deconvolutions {min(ratios):.0f} to "
                f"{max(ratios):.0f} times as many")
    return measured, ("holds" if 10 <= min(ratios) and max(ratios) <= 100 else
                      f"for {sum(10 <= a <= 100 for a in ratios)} of {len(ratios)}")


def judge_recipes(form, reached, recipe, settings, ours, he):
    measured = "; ".join(f"{name}: {scores(records, form, 1)}, {success(records, reached)}, "
                         f"{length(records)}" for name, records in (
                             (f"our recipe ({recipe})", ours), ("the paper's recipe", he)))
    verdicts = ["holds" if all(reached(r["score"]) for r in records) else "not for every seed"
                if any(reached(r["score"]) for r in records) else "not reached"
                for records in (ours, he)]
    return measured, f"{verdicts[0]} with our recipe, {verdicts[1]} with the paper's"


def judge_conv(split, settings, ours, records):
    good = min(r["score"] for r in records) < 0.5
    measured = f"pixels off: {scores(records, '{:.2f}', 1)}; {length(records)}"
    if split == "uniform":
        return measured, "holds" if good else "not within this length"
    return measured, ("contradicted" if good else
                      "not contradicted" if settings["patience"] else "holds")


def judge_resnet(settings, plain, coords):
    import scipy.stats
    gain = np.array([100 * (b["score"] - a["score"]) for a, b in zip(plain, coords)])
    measured = (f"without {scores(plain)}; with {scores(coords)}; {length(coords)}; mean "
                f"difference {gain.mean():+.1f} points")
    if len(gain) < 2 or gain.std() == 0:
        return f"{measured}, no interval from one value", "no interval"
    test = scipy.stats.ttest_1samp(gain, 0)
    low, high = test.confidence_interval()
    measured += f", 95 % interval {low:+.1f} to {high:+.1f}, p = {test.pvalue:.2f}"
    return measured, "a gain" if low > 0 else "a loss" if high < 0 else "no gain shown"


def judge_speed(settings, records):
    r, = records
    if "score" not in r:
        return "not compared with torch", "not compared"
    measured = (f"time over torch's: geometric mean of {len(r['lines'])} passes {r['score']:.2f}, "
                f"worst {max(a['over_torch'] for a in r['lines']):.2f}")
    return measured, ("as fast" if 0.9 <= r["score"] <= 1.1 else
                      "faster than torch" if r["score"] < 1 else "slower than torch")


def judge_step(settings, records):
    r, = records
    measured = f"{1e3 * np.median(r['seconds']):.0f} ms with 16 images, "
    if "score" not in r:
        return measured + "not compared with torch", "not compared"
    return f"{measured}{r['score']:.2f} of torch's time", holds(r["score"] <= 0.5)


def judge_decode(settings, records):
    r, = records
    measured = (f"64x64: {1e6 * np.median(r['seconds']) / 4096:.2f} us an image, {r['score']:.0f} "
                "times as fast as the critic's listing by scipy, at "
                f"{r['of_sum']:.2f} of the rate of a sum of the array")
    return measured, holds(r["score"] >= 300 and r["of_sum"] >= 0.7)


def rows(settings):
    """Every row of the table, in its order."""
    partial, deconvs = functools.partial, list(DECONVS)[:1 if settings["patience"] else None]
    found = [
        Row("decoder", "no training needed: a convolution, a rectifier, a sum and a subtraction "
            "read the pixel off the image", "Piekniewski", ("critic/both ways",),
            partial(judge_ways, "decoder_wrong"), True),
        Row("encoder", "nor for the other way: a network that draws the pixel can be wired by "
            "hand", "Piekniewski", ("critic/both ways",), partial(judge_ways, "encoder_wrong"),
            True),
        Row("same", "his network is itself a CoordConv: coordinates enter as input channels",
            "coordref", ("critic/odd images",), judge_same, True),
        Row("feature", "CoordConv is a convolution of an image to which two features were added",
            "Piekniewski", ("critic/feature",), judge_feature, True),
        Row("robust", "the listing reads coordinates off an image", "Piekniewski (implied)",
            ("critic/odd images",), judge_odd),
        Row("own-test", "the listing's own test covers the image", "Piekniewski (implied)",
            ("critic/own test", "critic/odd images"), judge_own_test)]
    for split in SPLITS:
        task = f"classification/{split}"
        rivals = tuple(f"{task}/deconv {name}" for name in deconvs)
        found += [
            Row(f"relative-{split}", f"CoordConv with the relative start is perfect on the "
                f"{split} split, every seed", "coordref", (f"{task}/relative", f"{task}/he"),
                judge_relative, True),
            Row(f"coordconv-{split}", f"CoordConv is perfect on the {split} split in seconds",
                "Liu et al.", (f"{task}/he",), judge_he),
            Row(f"deconv-{split}", "a deconvolution network gets at most "
                f"{'86' if split == 'uniform' else '0'} % on the {split} split", "Liu et al.",
                (f"{task}/relative", *rivals), partial(
                    judge_limit, 0.86 if split == "uniform" else 0.0, "{:.1f} %", 100))]
        if split == "uniform":
            found += [
                Row("faster", "CoordConv learns it 150 times faster", "Liu et al.",
                    (f"{task}/he", f"{task}/relative", *rivals), judge_faster),
                Row("parameters", "with 10 to 100 times fewer parameters", "Liu et al.",
                    (f"{task}/relative",), judge_parameters)]
    for split in SPLITS:
        task = f"rendering/{split}"
        found += [
            Row(f"render-{split}", f"CoordConv renders squares perfectly on the {split} split: "
                "IoU above 0.99", "Liu et al.", (f"{task}/relative", f"{task}/he"),
                partial(judge_recipes, "{:.3f}", lambda s: s > 0.99, RENDER_RECIPE)),
            Row(f"deconv-render-{split}", "a deconvolution network gets an IoU of at most "
                f"{'0.83' if split == 'uniform' else '0.36'} on the {split} split", "Liu et al.",
                (f"{task}/relative", *(f"{task}/deconv {name}" for name in deconvs)), partial(
                    judge_limit, 0.83 if split == "uniform" else 0.36, "{:.3f}", 1))]
    for split in SPLITS:
        task = f"regression/{split}"
        found += [
            Row(f"regress-{split}", "one CoordConv net regresses coordinates on both splits, here "
                f"{split}: within half a pixel", "Liu et al.", (f"{task}/salient", f"{task}/he"),
                partial(judge_recipes, "{:.2f}", lambda s: s < 0.5, REGRESS_RECIPE)),
            Row(f"conv-regress-{split}", "a convolution without coordinates "
                + ("regresses" if split == "uniform" else "does not regress")
                + f" them on the {split} split", "Liu et al.", (f"{task}/salient", f"{task}/conv"),
                partial(judge_conv, split))]
    found += [
        Row("resnet-shape", "coordinates at the bottom of a residual network gain nothing that "
            "matters where the class is not a function of position (+0.04 % on ImageNet)",
            "QbitAI", ("resnet/shape/plain", "resnet/shape/coords"), judge_resnet),
        Row("resnet-quadrant", "the control: they gain where the class is the quadrant",
            "coordref", ("resnet/quadrant/plain", "resnet/quadrant/coords"), judge_resnet),
        Row("speed-convolution", "convolution in NumPy is as fast as in torch", "coordref",
            ("speed/convolution",), judge_speed),
        Row("speed-step", "a training step of the painter takes at most half of torch's time",
            "coordref", ("speed/step",), judge_step),
        Row("speed-decode", "the closed form of the critic's network runs at memory speed, 300 "
            "times the listing's", "coordref", ("speed/decode",), judge_decode)]
    return found


# SPEED -------------------------------------------------------------------------------------------

def peers():
    """torch, if it is there, with as many threads as coordref uses."""
    try:
        import torch
        return torch
    except ImportError:
        return None


def interleaved(programs, repeats, xp=np):
    """Seconds of each program, A B A B, as (repeats, programs). The threads of torch spin for some
    ten milliseconds after its work, and a program that starts before they sleep lacks their core;
    hence the pause, and an untimed call to warm up again."""
    seconds = np.empty((repeats, len(programs)))
    for row in seconds:
        for i, program in enumerate(programs):
            time.sleep(0.02)
            program()
            row[i] = timed(program, xp)[1]
    return seconds


class Shape(NamedTuple):
    name: str
    x: tuple
    w: tuple
    options: Mapping = MappingProxyType({})
    op: str = "conv"


SHAPES = [
    Shape("1x1, 64 to 64", (16, 64, 64, 64), (64, 64, 1, 1)),
    Shape("1x1, 4 to 32", (16, 4, 64, 64), (32, 4, 1, 1)),
    Shape("1x1, 256 to 128", (8, 256, 28, 28), (128, 256, 1, 1)),
    Shape("3x3, 64 to 64", (8, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    Shape("3x3, 16 to 16", (16, 16, 64, 64), (16, 16, 3, 3), {"padding": 1}),
    Shape("3x3, 3 to 64", (16, 3, 64, 64), (64, 3, 3, 3), {"padding": 1}),
    Shape("3x3, 256 to 256, 14 x 14", (8, 256, 14, 14), (256, 256, 3, 3), {"padding": 1}),
    Shape("5x5, 32 to 32", (16, 32, 32, 32), (32, 32, 5, 5), {"padding": 2}),
    Shape("7x7 stride 2, 3 to 64", (2, 3, 224, 224), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    Shape("3x3 stride 2, 64 to 128", (8, 64, 56, 56), (128, 64, 3, 3),
          {"padding": 1, "stride": 2}),
    Shape("3x3 dilation 2, 64 to 64", (8, 64, 56, 56), (64, 64, 3, 3),
          {"padding": 2, "dilation": 2}),
    Shape("3x3 depthwise, 64", (8, 64, 56, 56), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    Shape("4x4 transposed, stride 2", (8, 64, 32, 32), (64, 32, 4, 4),
          {"padding": 1, "stride": 2}, "conv_transpose"),
    Shape("5 in 1-D, 64 to 64", (16, 64, 4096), (64, 64, 5), {"padding": 2}),
    Shape("3x3x3 in 3-D, 16 to 16", (2, 16, 24, 24, 24), (16, 16, 3, 3, 3), {"padding": 1}),
]


def by_definition(dy, x, w, stride=1, padding=0, dilation=1, groups=1):
    """y, dx and dw of a convolution in float64, one kernel tap at a time."""
    dy, x, w = (a.astype(np.float64) for a in (dy, x, w))
    N, G, out, rank = len(x), groups, dy.shape[2:], x.ndim - 2
    x = np.pad(x, ((0, 0),) * 2 + ((padding, padding),) * rank)
    dx, dw, y = np.zeros_like(x), np.zeros_like(w), np.zeros((N, G, len(w) // G, math.prod(out)))
    dy = dy.reshape(y.shape)
    for tap in np.ndindex(*w.shape[2:]):
        seen = (slice(None),) * 2 + tuple(slice(k * dilation, k * dilation + (n - 1) * stride + 1,
                                                stride) for k, n in zip(tap, out))
        pixels = x[seen].reshape(N, G, -1, y.shape[3])
        at = (slice(None),) * 2 + tap
        weights = w[at].reshape(G, len(w) // G, -1)
        y += weights @ pixels
        dx[seen] += (weights.swapaxes(1, 2) @ dy).reshape(x[seen].shape)
        dw[at] = (dy @ pixels.swapaxes(2, 3)).sum(axis=0).reshape(w[at].shape)
    inside = (slice(None),) * 2 + (slice(padding, -padding or None),) * rank
    return y.reshape(N, len(w), *out), dx[inside], dw


def largest_error(got, wanted):
    """The largest error over the largest value, the worst of some arrays."""
    return max(abs(a - b).max() / abs(b).max() for a, b in zip(got, wanted))


def scipy_seconds(x, w, options):
    """One image under one filter by scipy.signal.correlate, times images and filters."""
    p = options.get("padding", 0)
    image = np.pad(x[0], ((0, 0),) + ((p, p),) * (x.ndim - 2))
    return timed(lambda: scipy.signal.correlate(image, w[0], "valid"))[1] * len(x) * len(w)


def measure(shape, repeats, xp=np, coords=False, against_torch=True):
    """Forward and backward of one shape, float32, as two records; coords makes it a CoordConv."""
    rng, torch = np.random.default_rng(0), peers() if against_torch else None
    options, rank = shape.options, len(shape.x) - 2
    transposed = shape.op == "conv_transpose"
    w_shape = (shape.w[0], shape.w[1] + coords * rank, *shape.w[2:])
    x, w = (rng.standard_normal(s).astype(np.float32) for s in (shape.x, w_shape))
    b = rng.standard_normal(w_shape[transposed]).astype(np.float32)
    op = "coord_conv" if coords else shape.op
    forward, backward = getattr(cr, op), getattr(cr, op + "_backward")
    ours = [xp.asarray(a) for a in (x, w, b)]
    y = cr.to_numpy(forward(*ours, **options))
    dy = rng.standard_normal(y.shape).astype(np.float32)
    upstream = xp.asarray(dy)
    dx, dw = map(cr.to_numpy, backward(upstream, *ours, **options)[:2])

    seen = cr.add_coords(x) if coords else x
    if transposed:                      # the gradient by x of a convolution, run forward
        exact = by_definition(x, dy, w, **options)
        error = [largest_error([y - b.reshape(-1, *(1,) * rank)],
                               [by_definition(x, y, w, **options)[1]]),
                 largest_error([dx, dw], [exact[0], exact[2]])]
    else:
        exact = by_definition(dy, seen, w, **options)
        error = [largest_error([y - b.reshape(-1, *(1,) * rank)], exact[:1]),
                 largest_error([dx, dw], [exact[1][:, :x.shape[1]], exact[2]])]

    programs = [[lambda: forward(*ours, **options)],
                [lambda: backward(upstream, *ours, **options)]]
    peer = ["coordref"]
    if coords:                          # the same convolution without its coordinates
        plain = [ours[0], xp.asarray(np.ascontiguousarray(w[:, :x.shape[1]])), ours[2]]
        peer.append("conv")
        programs[0].append(lambda: cr.conv(*plain, **options))
        programs[1].append(lambda: cr.conv_backward(upstream, *plain, **options))
    if torch:
        peer.append("torch")
        device = "cpu" if xp is np else "cuda"
        tensors = [torch.tensor(a, device=device, requires_grad=True) for a in (x, w, b)]
        gradient, grid = (torch.tensor(a, device=device) for a in (dy, seen[:, x.shape[1]:]))
        function = getattr(torch.nn.functional, f"{shape.op}{rank}d")

        def run():
            image = torch.cat([tensors[0], grid], dim=1) if coords else tensors[0]
            return function(image, *tensors[1:], **options)
        output = run()
        programs[0].append(run)
        programs[1].append(lambda: torch.autograd.grad(output, tensors, gradient,
                                                       retain_graph=True))
    macs, both = w[0].size * (x.size if transposed else dy.size), 0
    for i, name in enumerate(("forward", "backward")):
        seconds = interleaved(programs[i], repeats, xp)
        both = both + seconds
        record = {"shape": shape.name + (" CoordConv" if coords else ""), "pass": name,
                  "seconds": seconds[:, 0].tolist(), "flops": 2 * (1 + i) * macs,
                  "error": float(error[i])}
        for j in range(1, len(peer)):
            record["over_" + peer[j]] = float(np.median(seconds[:, 0] / seconds[:, j]))
            if i:
                record["both_over_" + peer[j]] = float(np.median(both[:, 0] / both[:, j]))
        if not i and not coords and set(options) <= {"padding"}:
            record["over_scipy"] = float(np.median(seconds[:, 0]) / scipy_seconds(x, w, options))
        yield record


def matmul_peak(xp=np):
    """GFLOP/s of the best of ten products of 2048 x 2048 float32 matrices."""
    a = xp.asarray(np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32))
    return 2 * 2048 ** 3 / min(timed(lambda: a @ a, xp)[1] for _ in range(10)) / 1e9


def line(record, peak):
    seconds = np.median(record["seconds"])
    rate = record["flops"] / seconds / 1e9
    ratios = "".join(f"{record[key]:9.2g}" if key in record else f"{'-':>9}"
                     for key in ("over_torch", "over_conv", "over_scipy"))
    return (f"{record['shape']:36} {record['pass']:8} {1e3 * seconds:8.2f} {rate:8.0f} "
            f"{rate / peak:7.2f} {record['error']:9.1e}{ratios}")


HEADER = (f"{'float32':36} {'pass':8} {'ms':>8} {'GFLOP/s':>8} {'of peak':>7} {'max error':>9}"
          f"{'/torch':>9}{'/conv':>9}{'/SciPy':>9}")

SWEEPS = [
    ("image side", (16, 32, 64, 128, 256, 512), lambda n: ((2, 16, n, n), (16, 16, 3, 3))),
    ("batch", (1, 4, 16, 64, 256), lambda n: ((n, 16, 32, 32), (16, 16, 3, 3))),
    ("channels", (1, 8, 32, 128, 512), lambda n: ((4, n, 28, 28), (n, n, 3, 3))),
]


def both_passes(dy, x, w):
    cr.conv(x, w, padding=1)
    cr.conv_backward(dy, x, w, padding=1)


def sweep_records(repeats, xp):
    """Time per multiply-add against size, forward and backward together."""
    for name, values, shapes in SWEEPS:
        for n in values:
            say(f"{name} {n}")
            rng = np.random.default_rng(0)
            x, w = (xp.asarray(rng.standard_normal(s).astype(np.float32)) for s in shapes(n))
            dy = xp.asarray(rng.standard_normal((len(x), len(w), *x.shape[2:])).astype(
                np.float32))
            run = functools.partial(both_passes, dy, x, w)
            seconds = interleaved([run], repeats, xp)[:, 0]
            yield {"sweep": name, "size": n, "seconds": seconds.tolist(),
                   "picoseconds_per_mac": 1e12 * float(np.median(seconds)) / (3 * w[0].size
                                                                              * dy.size)}


def geometric_mean(values):
    return math.exp(np.mean(np.log(values)))


def ops(repeats, xp):
    """Every shape as convolution and as CoordConv, then cost against size."""
    peak, records = matmul_peak(xp), []
    print(f"\nmatrix product peak {peak:.0f} GFLOP/s; time over torch, over our own convolution "
          "without coordinates, over SciPy\n\n" + HEADER, flush=True)
    for shape in SHAPES:
        for coords in (False, True):
            if coords and (shape.op != "conv" or "groups" in shape.options):
                continue
            say(f"{shape.name}{' CoordConv' if coords else ''}")
            for record in measure(shape, repeats, xp, coords):
                say("")
                print(line(record, peak), flush=True)
                records.append(record)
    print("\nforward plus backward, geometric mean of the shapes:")
    for peer, text in (("torch", "time over torch"), ("conv", "CoordConv over conv")):
        key = "both_over_" + peer
        ratios = {r["shape"]: r[key] for r in records if key in r}
        if ratios:
            worst = max(ratios, key=ratios.get)
            print(f"    {text:22} {geometric_mean(list(ratios.values())):.2f}, "
                  f"worst {ratios[worst]:.2f} ({worst})")
    sweeps = list(sweep_records(repeats, xp))
    say("")
    print("\npicoseconds per multiply-add, forward and backward, 3x3 kernels")
    for name, _, _ in SWEEPS:
        found = [r for r in sweeps if r["sweep"] == name]
        best = min(r["picoseconds_per_mac"] for r in found)
        print(f"    {name:12}" + "".join(
            f"{r['size']:6}: {r['picoseconds_per_mac']:5.1f}" for r in found)
            + f"   last / best {found[-1]['picoseconds_per_mac'] / best:.2f}", flush=True)
    return {"peak_gflops": peak, "ops": records, "sweeps": sweeps}


def convolution_speed(lab, seed):
    """Some of the shapes that ops measures."""
    peak, lines = matmul_peak(lab.xp), []
    for shape in SHAPES[:1] + (SHAPES[3:6:2] if lab.settings["torch"] else []):
        lines += measure(shape, lab.settings["repeats"], lab.xp,
                         against_torch=lab.settings["torch"])
    ratios = [line["over_torch"] for line in lines if "over_torch" in line]
    return {"peak_gflops": peak, "lines": lines, "seconds": [s for a in lines
                                                             for s in a["seconds"]],
            **({"score": geometric_mean(ratios)} if ratios else {})}


def step_speed(lab, seed):
    """Training steps of the painter, and the same in torch in a process of its own, as its users
    run it: coordref tells the allocator to keep memory, which makes torch faster too."""
    net, data, steps = cr.coordconv_painter(rng=0, xp=lab.xp), lab.data("uniform"), 5

    def ours():
        cr.train(net, data, task="classification", steps=steps, rng=0)
    ours()
    if not lab.settings["torch"] or not peers():
        return {"seconds": [timed(ours, lab.xp)[1] / steps
                            for _ in range(lab.settings["repeats"])]}
    device = "cpu" if lab.xp is np else "cuda"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
            1, context, start_worker, (None, context.Event(), os.getpid())) as process:
        process.submit(torch_seconds, steps, device).result()
        pairs = [(timed(ours, lab.xp)[1] / steps,
                  process.submit(torch_seconds, steps, device).result() / steps)
                 for _ in range(lab.settings["repeats"])]
    return {"seconds": [a for a, _ in pairs], "score": float(np.median([a / b for a, b in pairs]))}


def torch_seconds(steps, device):
    """How long torch takes for training steps of the painter with 16 images."""
    network, adam, coords, grid, labels = torch_painter(device)

    def run():
        for _ in range(steps):
            adam.zero_grad()
            image = torch.cat([coords.expand(16, 2, 64, 64), grid], dim=1)
            torch.nn.functional.cross_entropy(network(image).flatten(1), labels).backward()
            adam.step()
        return network[0].bias.tolist()         # waits for the device
    torch = peers()
    return timed(run)[1]


@functools.cache
def torch_painter(device):
    torch, layers = peers(), []
    for C, F in itertools.pairwise((4, 32, 32, 64, 64, 1)):
        layers += [torch.nn.Conv2d(C, F, 1), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1]).to(device)
    grid = torch.tensor(cr.coord_channels((64, 64)), device=device).expand(16, 2, 64, 64)
    return (network, torch.optim.Adam(network.parameters(), lr=0.005, betas=(0.9, 0.99)),
            torch.rand(16, 2, 1, 1, device=device) * 2 - 1, grid,
            torch.arange(16, device=device))


def decode_speed(lab, seed):
    coords = np.random.default_rng(0).integers(0, 64, (4096, 2))
    images = cr.encode(lab.xp.asarray(coords), (64, 64))
    few = cr.to_numpy(images[:64])
    spent = interleaved([lambda: cr.decode(images), images.sum,
                         lambda: [listing(image[0]) for image in few]],
                        lab.settings["repeats"], lab.xp)
    return {"seconds": spent[:, 0].tolist(), "of_sum": float(np.median(spent[:, 1] / spent[:, 0])),
            "score": float(64 * np.median(spent[:, 2] / spent[:, 0]))}


# FIGURES -----------------------------------------------------------------------------------------

STYLES = {"relative": ("-", "o", "CoordConv, our start"), "he": ("--", "s", "CoordConv, paper's"),
          "deconv": (":", "^", "deconvolution"), "salient": ("-", "o", "CoordConv, our start"),
          "conv": (":", "^", "convolution")}


def of_kind(records, *start):
    """The records of experiments of which the names start so, by name and seed."""
    return [records[job] for job in sorted(records, key=str) if job[0].startswith("/".join(start))]


def figure_time(plt, records):
    """Test accuracy and IoU against training time, a line for every run."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, sharey="row",
                                layout="constrained")
    for line, (task, label) in zip(axes, (("classification", "test accuracy (%)"),
                                          ("rendering", "test IoU"))):
        for ax, split in zip(line, SPLITS):
            seen = set()
            for r in of_kind(records, task, split):
                dash, marker, name = STYLES[r["experiment"].split("/")[2].split()[0]]
                spent, _, values = zip(*r["curve"], (r["seconds"][0], 0, r["score"]))
                scale = 100 if task == "classification" else 1
                ax.plot(spent, [scale * v for v in values], dash, marker=marker, color="black",
                        markersize=4, markerfacecolor="white", linewidth=1,
                        label=None if name in seen else name)
                seen.add(name)
            ax.set(title=f"{task}, {split} split", xscale="log", xlabel="training time (s)")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
            ax.grid(alpha=0.3)
        line[0].set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Score on the test part against training time, every run")
    return figure


def figure_positions(plt, records):
    """Which test positions are right, for a deconvolution, CoordConv and the wired network."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.6), layout="constrained")
    for line, split in zip(axes, SPLITS):
        data = cr.not_so_clevr(split)
        coords = data.coords[data.test]
        encoder = cr.encoder_network((data.canvas,) * 2)
        drawn = cr.forward(encoder, coords.astype(np.float32)[:, :, None, None])[0]
        for ax, name, runs in zip(
                line, ("deconvolution", "CoordConv, our start", "wired by hand"), (
                    of_kind(records, "classification", split, "deconv"),
                    of_kind(records, "classification", split, "relative"),
                    [{"predicted": cr.decode(drawn)}])):
            told = next((np.array(r["predicted"]) for r in runs if "predicted" in r), None)
            if told is None:
                ax.set_title(f"{name}\nnot run")
                continue
            test = coords[::-(-len(coords) // len(told))]
            right = (told == test).all(axis=1)
            for seen, style in ((right, {"color": "black"}),
                                (~right, {"facecolor": "white", "edgecolor": "black",
                                          "linewidth": 0.4})):
                ax.scatter(*test[seen, ::-1].T, marker="s", s=6, **style)
            ax.set(title=f"{name}\n{100 * right.mean():.1f} % right", aspect="equal",
                   xlim=(-1, data.canvas), ylim=(data.canvas, -1), xlabel="column (pixels)",
                   ylabel=f"{split} split\nrow (pixels)")
    figure.suptitle("Pixel from coordinate: test positions that are right (black) and wrong "
                    "(white), first seed")
    return figure


def figure_predictions(plt, records):
    """Predicted positions of the regression at some test positions, first seed."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.6), layout="constrained")
    for line, split in zip(axes, SPLITS):
        for ax, kind in zip(line, ("conv", "he", "salient")):
            ax.set(title=STYLES[kind][2], xlim=(-1, 64), ylim=(64, -1), aspect="equal",
                   xlabel="column (pixels)", ylabel=f"{split} split\nrow (pixels)")
            for r in [r for r in of_kind(records, "regression", split, kind)
                      if "predicted" in r]:
                data = cr.not_so_clevr(split)
                told = np.array(r["predicted"])
                test = data.coords[data.test][::-(-len(data.test) // len(told))]
                for (row, col), (row_told, col_told) in zip(test[::9], told[::9]):
                    ax.plot([col, col_told], [row, row_told], "-", color="0.6", linewidth=0.8)
                ax.plot(*told[::9, ::-1].T, "x", color="black", markersize=4, label="predicted")
                ax.plot(*test[::9, ::-1].T, "o", color="black", markersize=3, label="true",
                        markerfacecolor="white")
                ax.set_title(f"{STYLES[kind][2]}\n{r['score']:.2f} pixels off, seed {r['seed']}")
    figure.legend(*axes[0, 2].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Regression: where every ninth test position is and where it was predicted")
    return figure


def figure_speed(plt, records):
    """Time over torch, for shapes of convolution and for the training step."""
    bars = [(f"{a['shape']}, {a['pass']}", a["over_torch"])
            for r in of_kind(records, "speed", "convolution") for a in r["lines"]
            if "over_torch" in a]
    bars += [("training step of the painter", r["score"])
             for r in of_kind(records, "speed", "step") if "score" in r]
    figure, ax = plt.subplots(figsize=(9, 1.5 + 0.4 * len(bars)), layout="constrained")
    if bars:
        names, ratios = zip(*bars[::-1])
        ax.barh(names, ratios, color="0.75", edgecolor="black", hatch="//")
        ax.axvline(1, color="black", linestyle="--")
    ax.set(title="Time over torch's (1 is as fast; lower is faster)", xlabel="time / torch's time")
    return figure


def draw(folder, records):
    """Write every figure to a folder as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    os.makedirs(folder, exist_ok=True)
    for make in (figure_time, figure_positions, figure_predictions, figure_speed):
        figure = make(plt, records)
        path = os.path.join(folder, make.__name__.removeprefix("figure_") + ".png")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(path)


# THE COMMAND -------------------------------------------------------------------------------------

SCHEMA = "coordref bench 1"


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file
                        if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(mode, seeds, xp):
    try:
        torch = importlib.metadata.version("torch")     # its import takes seconds
    except importlib.metadata.PackageNotFoundError:
        torch = None
    return {"date": time.strftime("%Y-%m-%d"), "processor": processor(), "cores": os.cpu_count(),
            "python": platform.python_version(), "numpy": np.__version__,
            "scipy": scipy.__version__, "torch": torch,
            "coordref": cr.__version__, "device": "cpu" if xp is np else "gpu", "mode": mode,
            "seeds": seeds}


def judged(row, runs):
    """What was measured and the verdict, or None for both while a run is missing."""
    if not runs.have(row.needs):
        return None, None
    return row.judge(runs.settings, *map(runs.of, row.needs))


def document(where, table, runs, others=()):
    """What the file holds: finished rows whole, others with the runs that they have so far."""
    found = []
    for row in table:
        measured, verdict = judged(row, runs)
        found.append({"id": row.id, "claim": row.claim, "source": row.source,
                      "measured": measured, "verdict": verdict,
                      "runs": [runs.records[job] for job in runs.jobs(row.needs)
                               if job in runs.records]})
    return {"schema": SCHEMA, "environment": where, "rows": [*found, *others]}


def read_json(path):
    with open(path) as file:
        found = json.load(file)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a file of this command: no schema {SCHEMA!r}")
    return found


def compare(old, new):
    """Lines that tell what changed: verdicts, and figures of which the ranges over the runs do
    not overlap, where both sides have two runs or more."""
    before = {row["id"]: row for row in old["rows"]}
    for row in new["rows"]:
        was = before.get(row["id"])
        if was is None or None in (was["verdict"], row["verdict"]):
            continue
        if was["verdict"] != row["verdict"]:
            yield f"{row['id']}: the verdict was {was['verdict']!r}, is {row['verdict']!r}"
        for name in dict.fromkeys(r["experiment"] for r in row["runs"]):
            sides = [[r for r in side["runs"] if r["experiment"] == name] for side in (was, row)]
            for what in ("score", "seconds"):
                a, b = ([v for r in side for v in np.atleast_1d(r.get(what, []))]
                        for side in sides)
                if min(len(a), len(b)) > 1 and (min(a) > max(b) or min(b) > max(a)):
                    yield (f"{row['id']}: {what} of {name} was {np.median(a):.4g}, is "
                           f"{np.median(b):.4g}")


def seeds(text):
    """N as the seeds from 0 to N - 1, or FROM:TO as a range."""
    first, last = re.fullmatch(r"(?:(\d+):)?(\d+)", text).groups()
    found = list(range(int(first or 0), int(last)))
    if not found:
        raise ValueError(text)
    return found


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("dispute", "ops"), default="dispute",
                        help="the table of verdicts, or the speed of convolution")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="one seed and short trainings")
    mode.add_argument("--full", action="store_true", help="the published lengths, ten seeds; "
                      "keeps its runs in the JSON file (bench-full.json) and goes on from there")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    parser.add_argument("--only", metavar="REGEX", default="", help="rows of which the id matches")
    parser.add_argument("--seeds", type=seeds, metavar="N", help="seeds 0 to N-1, or FROM:TO")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--json", metavar="FILE", help="write every figure to a file")
    parser.add_argument("--compare", metavar="OLD.json", help="tell what changed since OLD.json")
    parser.add_argument("--figures", metavar="DIR", help="draw the figures (needs matplotlib)")
    return parser


def main(arguments=None):
    parser = options()
    config = parser.parse_args(arguments)
    mode = "quick" if config.quick else "full" if config.full else "default"
    settings = {**MODES[mode], **({"seeds": config.seeds} if config.seeds else {})}
    try:
        every = rows(settings)
        table = [row for row in every if re.search(config.only, row.id)]
        old = read_json(config.compare) if config.compare else None
    except (re.error, OSError, ValueError) as error:
        parser.error(str(error))
    if config.figures and not importlib.util.find_spec("matplotlib"):
        parser.error("--figures needs matplotlib: pip install matplotlib")
    if config.list or not table:
        print("\n".join(f"{row.id:24} {row.source}: {row.claim}" for row in table or every))
        return 0 if table else parser.error(f"--only {config.only!r} matches none of these rows")
    xp = np if config.device == "cpu" else cr.best_module()
    if config.device == "gpu" and xp is np:
        parser.error("--device gpu: CuPy finds no device that answers")

    where = environment(mode, settings["seeds"], xp)
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    if config.what == "ops":
        found = ops(settings["repeats"], xp)
        if config.json:
            write_json(config.json, {"environment": where, **found})
        return 0

    path, others, records = config.json or ("bench-full.json" if config.full else None), [], []
    if path and os.path.exists(path):
        try:
            found = read_json(path)
        except ValueError as error:
            parser.error(f"--json: {error}")
        changed = [key for key in where if key != "date"
                   and found["environment"].get(key) != where[key]]
        if config.full and changed or not config.full and found["environment"]["mode"] == "full":
            parser.error(f"--json: {path} holds a run with another "
                         + ", ".join(changed or ["mode"]) + "; name another file")
        if config.full:
            others = [row for row in found["rows"] if row["id"] not in {r.id for r in table}]
            records = [r for row in found["rows"] for r in row["runs"]]

    runs = Runs(settings, xp, records, path)
    names = list(dict.fromkeys(name for row in table for name in row.needs))
    rows_of = {name: row.id for row in reversed(table) for name in row.needs}

    def keep():
        if path:
            write_json(path, document(where, table, runs, others))
    start, told, failed = time.perf_counter(), 0, 0
    try:
        if config.full or sys.stderr.isatty():
            left = runs.estimate(names)
            say()
        if config.full:
            print(f"estimated time: {duration(left)}; stop it at any moment and start it again, "
                  f"{path} keeps the runs", flush=True)
        if config.quick:
            print("shortened trainings: of the verdicts, only those of checks count")
        if runs.workers > 1:
            print(f"{runs.workers} runs at a time, each training on one core")
        print("\n| claim | source | measured here | verdict |\n| --- | --- | --- | --- |",
              flush=True)
        for _ in itertools.chain([None], runs.make(names, rows_of)):
            keep()
            while told < len(table) and runs.have(table[told].needs):
                row = table[told]
                measured, verdict = judged(row, runs)
                failed += row.check and verdict != "holds"
                told += 1
                say()
                print(f"| {row.claim} | {row.source} | {measured} | {verdict} |", flush=True)
    except KeyboardInterrupt:
        keep()
        say()
        print(f"\ninterrupted after {told} of {len(table)} rows"
              + (f"; {path} keeps the runs" if path else ""), flush=True)
        return 130
    for r in of_kind(runs.records, "speed", "convolution"):
        print("\nmedians of alternating runs; time over torch, over SciPy\n" + HEADER)
        print("\n".join(line(a, r["peak_gflops"]) for a in r["lines"]))
    if old:
        changes = list(compare(old, document(where, table, runs)))
        print("\n" + "\n".join(changes or ["nothing changed beyond noise since "
                                           + config.compare]))
    if config.figures:
        draw(config.figures, runs.records)
    print(f"\n{time.perf_counter() - start:.0f} s in all; "
          + (f"{failed} checks of coordref failed" if failed else "all checks of coordref passed"))
    return 1 if failed else 0


EXPERIMENTS = experiments()

if __name__ == "__main__":
    sys.exit(main())
