# SPDX-License-Identifier: MIT
"""The dispute about CoordConv as a table of verdicts, then a table of speeds.

    python bench.py             every row, under two minutes on two cores
    python bench.py --quick     shorter trainings and one seed, under 20 seconds
    python bench.py ops         the speed of convolution by shape and by size, against peers

Each row runs one claim of the paper (Liu et al. 2018, arXiv 1807.03247), of its critic
(Piekniewski 2018) or of this project, and says what was measured here and whether the claim holds
in it. A row marked as a check is a promise of coordref itself: the exit status is 1 where one
fails. Nothing is downloaded; the data set is drawn by coordref. Progress goes to stderr on a
terminal.
"""

import argparse
import json
import math
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
        scores, seconds, weights = over_seeds(config, split, data, "relative", steps=60,
                                              batch_size=8, learning_rate=0.01)
        yield Row(f"CoordConv with the relative start is perfect on the {split} split",
                  "coordref", f"test {percent(scores)} (seeds {config.seeds}); 60 steps of 8, "
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


def interleaved(programs, repeats):
    """Seconds of each program, A B A B, as (repeats, programs). Each timed call follows an untimed
    one of its own, so that no program starts while the idle threads of another still spin."""
    seconds = np.empty((repeats, len(programs)))
    for row in seconds:
        for i, program in enumerate(programs):
            program()
            row[i] = timed(program)[1]
    return seconds


class Shape(NamedTuple):
    name: str
    x: tuple
    w: tuple
    options: dict = {}
    op: str = "conv"


SHAPES = [
    Shape("1x1, 64 to 64", (16, 64, 64, 64), (64, 64, 1, 1)),
    Shape("1x1, 4 to 32", (16, 4, 64, 64), (32, 4, 1, 1)),
    Shape("1x1, 256 to 128", (8, 256, 28, 28), (128, 256, 1, 1)),
    Shape("3x3, 64 to 64", (8, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    Shape("3x3, 16 to 16", (16, 16, 64, 64), (16, 16, 3, 3), {"padding": 1}),
    Shape("3x3, 3 to 64", (16, 3, 64, 64), (64, 3, 3, 3), {"padding": 1}),
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


def measure(shape, repeats, coords=False):
    """Forward and backward of one shape, float32, as two records; coords makes it a CoordConv."""
    rng, torch = np.random.default_rng(0), peers()
    options, rank = shape.options, len(shape.x) - 2
    transposed = shape.op == "conv_transpose"
    w_shape = (shape.w[0], shape.w[1] + coords * rank, *shape.w[2:])
    x, w = (rng.standard_normal(s).astype(np.float32) for s in (shape.x, w_shape))
    b = rng.standard_normal(w_shape[transposed]).astype(np.float32)
    op = "coord_conv" if coords else shape.op
    forward, backward = getattr(cr, op), getattr(cr, op + "_backward")
    y = forward(x, w, b, **options)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    dx, dw, _ = backward(dy, x, w, b, **options)

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

    programs = [[lambda: forward(x, w, b, **options)],
                [lambda: backward(dy, x, w, b, **options)]]
    peer = ["coordref"]
    if coords:                          # the same convolution without its coordinates
        plain = np.ascontiguousarray(w[:, :x.shape[1]])
        peer.append("conv")
        programs[0].append(lambda: cr.conv(x, plain, b, **options))
        programs[1].append(lambda: cr.conv_backward(dy, x, plain, b, **options))
    if torch:
        peer.append("torch")
        tensors = [torch.tensor(a, requires_grad=True) for a in (x, w, b)]
        upstream, grid = torch.tensor(dy), torch.tensor(seen[:, x.shape[1]:])
        function = getattr(torch.nn.functional, f"{shape.op}{rank}d")

        def run():
            image = torch.cat([tensors[0], grid], dim=1) if coords else tensors[0]
            return function(image, *tensors[1:], **options)
        output = run()
        programs[0].append(run)
        programs[1].append(lambda: torch.autograd.grad(output, tensors, upstream,
                                                       retain_graph=True))
    macs = w[0].size * (x.size if transposed else dy.size)
    for i, name in enumerate(("forward", "backward")):
        seconds = interleaved(programs[i], repeats)
        record = {"shape": shape.name + (" CoordConv" if coords else ""), "pass": name,
                  "seconds": seconds[:, 0].tolist(), "flops": 2 * (1 + i) * macs,
                  "error": float(error[i])}
        for j in range(1, len(peer)):
            record["over_" + peer[j]] = float(np.median(seconds[:, 0] / seconds[:, j]))
        if not i and not coords and set(options) <= {"padding"}:
            record["over_scipy"] = float(np.median(seconds[:, 0]) / scipy_seconds(x, w, options))
        yield record


def matmul_peak():
    """GFLOP/s of the best of ten products of 2048 x 2048 float32 matrices."""
    a = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)
    return 2 * 2048 ** 3 / min(timed(lambda: a @ a)[1] for _ in range(10)) / 1e9


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


def sweep_records(repeats):
    """Time per multiply-add against size, forward and backward together."""
    for name, values, shapes in SWEEPS:
        for n in values:
            say(f"{name} {n}")
            rng = np.random.default_rng(0)
            x, w = (rng.standard_normal(s).astype(np.float32) for s in shapes(n))
            dy = rng.standard_normal((len(x), len(w), *x.shape[2:])).astype(np.float32)

            def run():
                cr.conv(x, w, padding=1)
                cr.conv_backward(dy, x, w, padding=1)
            seconds = interleaved([run], repeats)[:, 0]
            yield {"sweep": name, "size": n, "seconds": seconds.tolist(),
                   "picoseconds_per_mac": 1e12 * float(np.median(seconds)) / (3 * w[0].size
                                                                              * dy.size)}


def geometric_mean(values):
    return math.exp(np.mean(np.log(values)))


def ops(config):
    """Every shape as convolution and as CoordConv, then cost against size."""
    peak, records = matmul_peak(), []
    print(f"\nmatrix product peak {peak:.0f} GFLOP/s; time over torch, over our own convolution "
          "without coordinates, over SciPy\n\n" + HEADER, flush=True)
    for shape in SHAPES:
        for coords in (False, True):
            if coords and (shape.op != "conv" or "groups" in shape.options):
                continue
            say(f"{shape.name}{' CoordConv' if coords else ''}")
            for record in measure(shape, config.repeats, coords):
                say("")
                print(line(record, peak), flush=True)
                records.append(record)
    print("\ngeometric means over forward and backward:")
    for key, text in (("over_torch", "time over torch"), ("over_conv", "CoordConv over conv")):
        ratios = [r[key] for r in records if key in r]
        if ratios:
            print(f"    {text:22} {geometric_mean(ratios):.2f}, worst {max(ratios):.2f}")
    sweeps = list(sweep_records(config.repeats))
    say("")
    print("\npicoseconds per multiply-add, forward and backward, 3x3 kernels")
    for name, _, _ in SWEEPS:
        found = [r for r in sweeps if r["sweep"] == name]
        best = min(r["picoseconds_per_mac"] for r in found)
        print(f"    {name:12}" + "".join(
            f"{r['size']:6}: {r['picoseconds_per_mac']:5.1f}" for r in found)
            + f"   last / best {found[-1]['picoseconds_per_mac'] / best:.2f}", flush=True)
    return {"peak_gflops": peak, "ops": records, "sweeps": sweeps}


def speed_lines(config):
    """A few shapes of the whole table that ops prints, and the decoder."""
    peak = matmul_peak()
    yield HEADER
    for shape in SHAPES[:1] if config.quick else SHAPES[:1] + SHAPES[3:6:2]:
        say(f"speed, {shape.name}")
        for record in measure(shape, config.repeats):
            yield line(record, peak)
    say("speed, decode")
    images = cr.encode(np.random.default_rng(0).integers(0, 64, (4096, 2)), (64, 64))
    seconds = interleaved([lambda: cr.decode(images), images.sum,
                           lambda: [listing(image[0]) for image in images[:64]]], config.repeats)
    ours, _, scipys = np.median(seconds, axis=0)
    yield (f"decode, 64x64: {1e6 * ours / 4096:.2f} us an image, "
           f"{64 * np.median(seconds[:, 2] / seconds[:, 0]):.0f} times as fast as the critic's "
           f"listing by scipy ({1e6 * scipys / 64:.0f} us), at "
           f"{np.median(seconds[:, 1] / seconds[:, 0]):.2f} of the rate of a sum of the array")


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
    parser.add_argument("what", nargs="?", choices=("dispute", "ops"), default="dispute",
                        help="the table of verdicts, or the speed of convolution")
    parser.add_argument("--quick", action="store_true", help="one seed and short trainings")
    parser.add_argument("--json", metavar="FILE", help="also write what ops measures to a file")
    config = parser.parse_args(arguments)
    for name, quick, full in (
            ("seeds", [0], [0, 1, 2]), ("he_steps", 10, 60), ("patience", 0.3, 10),
            ("centre_steps", 10, 60), ("render_steps", 3, 60), ("regress_steps", 5, 150),
            ("repeats", 3, 5)):
        setattr(config, name, quick if config.quick else full)

    start = time.perf_counter()
    print(environment(), flush=True)
    if config.what == "ops":
        found = {"environment": environment(), **ops(config)}
        if config.json:
            with open(config.json, "w") as file:
                json.dump(found, file, indent=1)
        return 0
    if config.json:
        parser.error("--json goes with ops")
    if config.quick:
        print("shortened trainings: of the verdicts, only those of rows by coordref count")
    failed = 0
    print("\n| claim | source | measured here | verdict |\n| --- | --- | --- | --- |", flush=True)
    for rows in (critic_rows, classification_rows, rendering_rows, regression_rows):
        for row in rows(config):
            say("")
            failed += row.check and row.verdict != "holds"
            print(f"| {row.claim} | {row.source} | {row.measured} | {row.verdict} |", flush=True)
    print("\nmedians of alternating runs; time over torch, over SciPy")
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
