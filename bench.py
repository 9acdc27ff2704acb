# SPDX-License-Identifier: MIT
"""The dispute about CoordConv as a table of verdicts, then a table of speeds.

    python bench.py             every row, under two minutes on two cores
    python bench.py --quick     shorter trainings and one seed, under 20 seconds

Each row runs one claim of the paper (Liu et al. 2018, arXiv 1807.03247), of its critic
(Piekniewski 2018) or of this project, and says what was measured here and whether the claim holds
in it. A row marked as a check is a promise of coordref itself: the exit status is 1 where one
fails. Nothing is downloaded; the data set is drawn by coordref. Progress goes to stderr on a
terminal.
"""

import argparse
import os
import platform
import sys
import time
from typing import NamedTuple

import numpy as np
import scipy
import scipy.signal

import coordref as cr


class Row(NamedTuple):
    claim: str
    source: str
    measured: str
    verdict: str            # "holds", "fails here" or what else the evidence says
    check: bool = False     # a promise of coordref, whose failure is an error


def say(text):
    """A line of progress that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def holds(truth):
    return "holds" if truth else "fails"


def timed(run):
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def parameters(net):
    return sum(p.size for layer in net for p in layer.params)


def percent(values):
    return ", ".join(f"{100 * v:.1f}" for v in values) + " %"


# THE DISPUTE -------------------------------------------------------------------------------------

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
        found.append(size - np.maximum(z, 0).sum())
    return found


def critic_rows(config):
    say("the critic's decoder and encoder")
    tried, wrong = 0, 0
    for size in ((70, 100), (64, 64), (1, 9), (5, 1)):
        where = np.array(list(np.ndindex(*size)))
        decoder, encoder = cr.decoder_network(size), cr.encoder_network(size)
        for part in np.array_split(where, -(-len(where) // 256)):
            images = cr.encode(part, size)
            coords = part.astype(np.float32)
            right = ((cr.decode(images) == coords).all()
                     and (cr.forward(decoder, images)[0] == coords).all()
                     and (cr.forward(encoder, coords[:, :, None, None])[0] == images).all())
            tried, wrong = tried + len(part), wrong + (not right) * len(part)
    yield Row("no training needed: convolution, rectifier, sum and subtraction read the pixel off "
              "the image, and a net can be wired the other way", "Piekniewski",
              f"{tried - wrong} of {tried} positions in 4 sizes exact both ways, as closed form "
              f"and as network, last row and column included; 0 trained weights; encoder "
              f"{parameters(cr.encoder_network((64, 64)))} weights", holds(not wrong), True)

    H, W = 70, 100
    images = np.zeros((4, 1, H, W), np.float32)
    images[0, 0, 10, 20] = images[0, 0, 30, 70] = 1
    images[1, 0, 10, 20] = 0.5
    images[3, 0, 69, 99] = 1
    by_network = cr.forward(cr.decoder_network((H, W)), images)[0]
    by_listing = np.array([listing(image[0]) for image in images])
    same = np.array_equal(by_network, by_listing)
    two, half, blank, last = ([int(v) for v in pair] for pair in by_network)
    yield Row("his network is itself a CoordConv: coordinates enter as input channels", "coordref",
              "coord_conv, relu, sum_pool and affine with weights (size, -1) give his listing's "
              f"numbers on 4 images: {same}", holds(same), True)
    yield Row("the listing reads coordinates off any image", "Piekniewski (implied)",
              f"(70, 100) image as (row, col): one pixel at (69, 99) gives {tuple(last)}; two at "
              f"(10, 20), (30, 70) give {tuple(two)}; half a pixel at (10, 20) gives "
              f"{tuple(half)}; none gives {tuple(blank)}", "one-hot images only")


def over_seeds(config, text, data, start, **options):
    """Train a painter from one start with each seed: test accuracies, median seconds, weights."""
    runs = []
    for seed in config.seeds:
        say(f"classification, {text}, {start} start, seed {seed}")
        net = cr.coordconv_painter(start=start, rng=seed)
        runs.append(classify(net, data, rng=seed, **options))
    return [r[0] for r in runs], np.median([r[1] for r in runs]), parameters(net)


def classify(net, data, **options):
    """Train and test a painter: test accuracy, seconds of training, steps."""
    (net, history), seconds = timed(lambda: cr.train(net, data, task="classification", **options))
    return cr.evaluate(net, data, task="classification"), seconds, len(history["loss"])


def classification_rows(config):
    for split in ("uniform", "quadrant"):
        data = cr.not_so_clevr(split)
        scores, seconds, weights = over_seeds(config, split, data, "relative", steps=40,
                                              batch_size=8, learning_rate=0.01)
        yield Row(f"CoordConv with the relative start is perfect on the {split} split",
                  "coordref", f"test {percent(scores)} (seeds {config.seeds}); 40 steps of 8, "
                  f"{seconds:.1f} s, {weights} weights", holds(min(scores) == 1), True)

        he, he_seconds, _ = over_seeds(config, split, data, "he", steps=config.he_steps, l2=1e-3)
        yield Row(f"CoordConv is perfect on the {split} split in seconds", "Liu et al.",
                  f"he_normal start: test {percent(he)} (seeds {config.seeds}); {config.he_steps} "
                  f"steps, {he_seconds:.1f} s",
                  "holds" if min(he) == 1 else f"not within {config.he_steps} steps")

        say(f"classification, {split}, deconvolution")
        deadline = time.perf_counter() + config.patience * seconds
        net = cr.deconv_painter(kernel=2, rng=config.seeds[0])
        score, spent, steps = classify(
            net, data, epochs=1000, learning_rate=0.005, decay="constant",
            rng=config.seeds[0], callback=lambda *_: time.perf_counter() > deadline)
        limit = {"uniform": 0.86, "quadrant": 0.0}[split]
        yield Row(f"a deconvolution network gets at most {100 * limit:.0f} % on the {split} split",
                  "Liu et al.", f"test {percent([score])} (seed {config.seeds[0]}); {steps} "
                  f"steps, {spent:.0f} s, {config.patience:g} times CoordConv's; "
                  f"{parameters(net)} weights",
                  "not contradicted" if score <= limit else "contradicted")


def rendering_rows(config):
    """Our recipe: the painter inside the renderer first learns the centre, then all of it the
    square. The official code has an option like it, an intermediate loss on the centre map."""
    for split in ("uniform", "quadrant"):
        data, seed = cr.not_so_clevr(split), config.seeds[0]
        say(f"rendering, {split}")

        def run():
            net = cr.coordconv_renderer(start="relative", rng=seed)
            painter = [layer.op for layer in net].index(cr.softmax)
            centre, _ = cr.train(net[:painter], data, task="classification", learning_rate=0.01,
                                 steps=config.centre_steps, rng=seed)
            return cr.train(centre + net[painter:], data, task="rendering", learning_rate=0.01,
                            steps=config.render_steps, rng=seed)[0]
        net, seconds = timed(run)
        iou = cr.evaluate(net, data, task="rendering")
        yield Row(f"CoordConv renders squares perfectly on the {split} split", "Liu et al.",
                  f"test IoU {iou:.3f} (seed {seed}); relative start, {config.centre_steps} "
                  f"steps on the centre then {config.render_steps} on the square, "
                  f"{seconds:.0f} s, {parameters(net)} weights",
                  ("holds" if iou > 0.99 else "not reached") + " with our recipe")


def loud(net, size):
    """A start for the regressor that is ours: the image channel's first weights 30 times as large,
    so that the hot pixel and not the largest coordinate wins the maximum, and the last bias such
    that the mean output over the image is the middle of the range."""
    w, b = net[0].params
    net = [net[0]._replace(params=[w * np.where(np.arange(w.shape[1]) == 0, 30, 1).astype(
        w.dtype)[None, :, None, None], b]), *net[1:]]
    grid = np.stack(np.mgrid[4:size - 4:14, 4:size - 4:14], axis=-1).reshape(-1, 2)
    y, _ = cr.forward(net, cr.encode(grid, (size, size)))
    w, b = net[-2].params
    return [*net[:-2], net[-2]._replace(params=[w, b + 0.5 - y.mean(axis=0)]), net[-1]]


def regression_rows(config):
    for split in ("uniform", "quadrant"):
        data, seed, found = cr.not_so_clevr(split), config.seeds[0], []
        for start in (lambda net: net, lambda net: loud(net, data.canvas)):
            say(f"regression, {split}")
            net = start(cr.coordconv_regressor(rng=seed))
            (net, _), seconds = timed(lambda: cr.train(
                net, data, task="regression", steps=config.regress_steps, learning_rate=0.01,
                l2=1e-5, rng=seed))
            found.append((cr.evaluate(net, data, task="regression"), seconds))
        (paper, seconds), (ours, _) = found
        yield Row(f"one CoordConv net regresses coordinates, {split} split", "Liu et al.",
                  f"he_normal start: {paper:.2f} pixels off; loud start (ours): {ours:.2f} (seed "
                  f"{seed}); {config.regress_steps} steps, {seconds:.0f} s, {parameters(net)} "
                  "weights", " and ".join(
                      f"{'holds' if pixels < 0.5 else 'not reached'} with {whose} start"
                      for pixels, whose in ((paper, "the paper's"), (ours, "our"))))


# SPEED -------------------------------------------------------------------------------------------

def peers():
    """torch, if it is there, with as many threads as coordref uses."""
    try:
        import torch
        return torch
    except ImportError:
        return None


def paired(ours, theirs, repeats):
    """Median seconds of both, A B A B, and the median of the ratios pair by pair."""
    ours(), theirs()
    pairs = [(timed(ours)[1], timed(theirs)[1]) for _ in range(repeats)]
    a, b = np.median(pairs, axis=0)
    return a, b, np.median([x / y for x, y in pairs])


SHAPES = [  # name, x, w, options
    ("1x1, 64 to 64", (16, 64, 64, 64), (64, 64, 1, 1), {}),
    ("3x3, 64 to 64", (8, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    ("3x3, 3 to 64", (16, 3, 64, 64), (64, 3, 3, 3), {"padding": 1}),
    ("5x5, 32 to 32", (8, 32, 32, 32), (32, 32, 5, 5), {"padding": 2}),
    ("3x3 stride 2, 64 to 128", (8, 64, 56, 56), (128, 64, 3, 3), {"padding": 1, "stride": 2}),
]


def speed_lines(config):
    """A first table of speeds: each line pairs two programs that do the same, in turn."""
    rng, torch = np.random.default_rng(0), peers()
    normal = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    for name, x, w, options in SHAPES[:None if not config.quick else 1]:
        say(f"speed, {name}")
        x, w, b = normal(x), normal(w), normal(w[0])
        dy = normal(cr.conv(x, w, b, **options).shape)
        work = 6 * w[0].size * dy.size

        def ours():
            cr.conv(x, w, b, **options)
            cr.conv_backward(dy, x, w, b, **options)
        if torch is None:
            ours()
            seconds = np.median([timed(ours)[1] for _ in range(config.repeats)])
            yield f"{name:32} {work / seconds / 1e9:8.0f} GFLOP/s"
            continue
        tensors = [torch.tensor(a, requires_grad=True) for a in (x, w, b)]
        upstream = torch.tensor(dy)

        def theirs():
            torch.nn.functional.conv2d(*tensors, **options).backward(upstream)
        a, c, ratio = paired(ours, theirs, config.repeats)
        yield (f"{name:32} {work / a / 1e9:8.0f} GFLOP/s, torch {work / c / 1e9:8.0f}; "
               f"time / torch {ratio:.2f}")
    say("speed, decode")
    images = cr.encode(rng.integers(0, 64, (512, 2)), (64, 64))
    a, b, ratio = paired(lambda: cr.decode(images),
                         lambda: [listing(image[0]) for image in images[:64]], config.repeats)
    yield (f"{'decode 64x64':32} {1e6 * a / 512:8.2f} us an image, the critic's listing by scipy "
           f"{1e6 * b / 64:.0f}; {8 / ratio:.0f} times as fast")


# THE TABLE ---------------------------------------------------------------------------------------

def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file
                        if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment():
    torch = peers()
    return (f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores; "
            f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy "
            f"{scipy.__version__}, torch {torch.__version__ if torch else 'not installed'}, "
            f"coordref {cr.__version__}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed and short trainings")
    config = parser.parse_args(arguments)
    for name, quick, full in (
            ("seeds", [0], [0, 1, 2]), ("he_steps", 10, 60), ("patience", 0.3, 10),
            ("centre_steps", 10, 60), ("render_steps", 3, 60), ("regress_steps", 5, 150),
            ("repeats", 3, 5)):
        setattr(config, name, quick if config.quick else full)

    start = time.perf_counter()
    print(environment(), flush=True)
    if config.quick:
        print("shortened trainings: of the verdicts, only those of rows by coordref count")
    failed = 0
    print("\n| claim | source | measured here | verdict |\n| --- | --- | --- | --- |", flush=True)
    for rows in (critic_rows, classification_rows, rendering_rows, regression_rows):
        for row in rows(config):
            say("")
            failed += row.check and row.verdict != "holds"
            print(f"| {row.claim} | {row.source} | {row.measured} | {row.verdict} |", flush=True)
    print("\nforward and backward, float32, medians of alternating runs")
    for line in speed_lines(config):
        say("")
        print(line, flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s in all; "
          + (f"{failed} checks of coordref failed" if failed else "all checks of coordref passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
