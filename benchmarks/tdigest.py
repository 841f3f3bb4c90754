"""Rank error and speed of our digest beside crick and fastdigest.

    python benchmarks/tdigest.py [--repeats 5] [--quick] [--peers FOLDER]

Each digest is fed 100,000 values in batches of 10,000. The peers rank a value as they define it; their
error is measured against the nearer of the two ends of the exact jump, so that ties are no disadvantage
to them, and once more against the mid-rank, which is what a classifier needs. A peer that is not
installed is left out, with a line that says so; `--peers` names a folder to look in as well.
"""
import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _table import alternate, markdown, spread, write

from llmnotes.data.quality import TDigest


def streams(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tail, ends = rng.lognormal(0, 1, n), np.arange(n) - n / 2
    return {'lognormal': tail, 'sorted': np.sort(tail), '90 % zeros': np.where(rng.random(n) < .9, 0, tail),
            'dice': rng.integers(1, 7, n).astype(float),
            'from both ends': ends[np.argsort(-abs(ends), kind='stable')],
            '300 decades': 10 ** rng.uniform(-150, 150, n)}


def ours(delta: int) -> Callable[[np.ndarray], tuple[Any, Callable, int]]:
    def build(data: np.ndarray) -> tuple[Any, Callable, int]:
        d = TDigest(delta)
        for i in range(0, len(data), 10_000): d.add(data[i:i + 10_000])
        return d, d.cdf, len(d.knots()[0])
    return build


def crick(module: Any, delta: int) -> Callable[[np.ndarray], tuple[Any, Callable, int]]:
    def build(data: np.ndarray) -> tuple[Any, Callable, int]:
        d = module.TDigest(delta)
        for i in range(0, len(data), 10_000): d.update(data[i:i + 10_000])
        return d, lambda x: np.asarray(d.cdf(x)), len(d.centroids())
    return build


def fastdigest(module: Any, size: int) -> Callable[[np.ndarray], tuple[Any, Callable, int]]:
    def build(data: np.ndarray) -> tuple[Any, Callable, int]:
        d = module.TDigest(max_centroids=size)
        for i in range(0, len(data), 10_000): d.batch_update(data[i:i + 10_000])
        return d, lambda x: np.array([d.cdf(v) for v in x.tolist()]), d.n_centroids
    return build


def engines() -> tuple[dict[str, Callable], list[str]]:
    found, missing = {'llmnotes, delta 100': ours(100), 'llmnotes, delta 400': ours(400)}, []
    for name, make, sizes in (('crick', crick, (100, 400)), ('fastdigest', fastdigest, (100, 400))):
        try: module = importlib.import_module(name)
        except ImportError: missing.append(name); continue
        found |= {f'{name}, {size}': make(module, size) for size in sizes}
    return found, missing


def errors(data: np.ndarray, cdf: Callable) -> tuple[float, float, float]:
    "Largest error in %, to the jump and to its middle; and in the tails, to the middle"
    data = np.sort(data)
    at = np.unique(data[::97])
    at = np.unique(np.concatenate([at, at[:-1] / 2 + at[1:] / 2]))
    below, up_to = (np.searchsorted(data, at, side) / len(data) for side in ('left', 'right'))
    got, middle = np.asarray(cdf(at)), (below + up_to) / 2
    jump = np.maximum(np.maximum(below - got, got - up_to), 0)
    tail = (middle < .01) | (middle > .99)
    gap = abs(got - middle)
    return tuple(100 * float(g.max(initial=0)) for g in (jump, gap, gap[tail]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--quick', action='store_true', help='few values, one round: does it run?')
    parser.add_argument('--peers', default='', help='a folder with packages, besides those installed')
    args = parser.parse_args()
    if args.peers: sys.path.append(args.peers)
    n, (found, missing) = 20_000 if args.quick else 100_000, engines()
    for name in missing: print(f'skipped: {name} is not installed; pip install {name}')
    data = streams(n, np.random.default_rng(0))
    took = {k: spread(s) for k, s in alternate({k: lambda b=b: b(data['lognormal']) for k, b in found.items()},
                                               1 if args.quick else args.repeats, time.process_time).items()}
    rows, record = [], []
    for name, build in found.items():
        cells = {}
        for stream, x in data.items():
            digest, cdf, size = build(x)
            cells[stream] = (*errors(x, cdf), size)
        record.append(dict(name=name, seconds=took[name], errors=cells))
        rows.append([name, f"{1e3 * took[name]['median']:.0f}",
                     *(f'{a:.3f} / {b:.3f} / {t:.3f}' for a, b, t, _ in cells.values()),
                     str(max(c[3] for c in cells.values()))])
    parts = {}
    for name, build in {k: b for k, b in found.items() if 'fastdigest' not in k}.items():
        pieces = [build(p)[0] for p in np.array_split(data['lognormal'], 8)]
        merged = pieces[0]
        if isinstance(merged, TDigest): merged = merged.merge(*pieces[1:])
        else: merged.merge(*pieces[1:])
        parts[name] = errors(data['lognormal'], lambda x, m=merged: np.asarray(m.cdf(x)))
    table = markdown(['digest', 'ms', *data, 'kept, at most'], rows)
    merges = markdown(['8 parts merged, lognormal', 'error (%), to jump / middle / tails'],
                      [[k, ' / '.join(f'{e:.3f}' for e in v)] for k, v in parts.items()])
    notes = (f'{n:,} values each. Errors are the largest of any rank, in %: to the nearer end of the exact jump, '
             'to its middle, and beyond the 1st and 99th percentile. The time is CPU time for lognormal values, '
             f'median of {args.repeats} rounds in turn. The peers are compiled, ours is numpy. '
             + (f'Not installed, and so left out: {", ".join(missing)}.' if missing else ''))
    if args.quick: print(table, merges, sep='\n\n')
    else: write('tdigest', 'Digests of ranks', [table, merges], notes,
                dict(values=n, engines=record, merged=json.loads(json.dumps(parts))),
                'numpy', 'crick', 'fastdigest')


if __name__ == '__main__':
    main()
