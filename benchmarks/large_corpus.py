"""Memory of the data pipeline on a corpus that does not fit: near copies, then all signals.

    python benchmarks/large_corpus.py [--gigabytes 5] [--workers 1] [--quick]

A process of its own writes a synthetic corpus in eight shards into a temporary folder; another one
runs the recipe over it, and what is stated is the most memory that this one ever held. The folder
needs some three times the size of the corpus. `--quick` is 0.02 GB.
"""
import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _table import markdown, write

from llmnotes.core import peak_memory
from llmnotes.data.pipeline import run_recipe

RECIPE = ['document_minhash_deduplicator', {'quality_rules_filter': {'rules': 'gopher'}}]


def synthetic(folder: Path, gigabytes: float, n_shards: int = 8) -> None:
    "Random texts of some 2,300 characters; a tenth are copies, half of them with a word changed"
    rng, size = np.random.default_rng(0), int(gigabytes * 1e9 / n_shards)
    words = np.array([''.join(rng.choice(list('abcdefghijklmnop'), rng.integers(2, 10))) for _ in range(50_000)])
    words[:4] = 'the', 'and', 'of', 'that'
    kept: list[list[str]] = []
    for k in range(n_shards):
        written = i = 0
        with open(folder/f'{k}.jsonl', 'w') as file:
            while written < size:
                text = words[rng.zipf(1.3, 360) % len(words)].tolist() if rng.random() > .1 or not kept \
                    else list(kept[rng.integers(len(kept))])
                if rng.random() < .05: text[rng.integers(len(text))] = 'changed'
                if rng.random() < .001: kept.append(text)
                line = '{"id": "%d-%d", "text": "%s"}\n' % (k, i, ' '.join(text))
                file.write(line)
                written, i = written + len(line), i + 1


def measure(folder: Path, workers: int, told: Any) -> None:
    "Run the recipe; send what it took through the pipe"
    before, wall = peak_memory(), time.perf_counter()
    report = run_recipe(RECIPE, sorted((folder/'in').glob('*.jsonl')), folder/'out', workers=workers)
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    told.send(dict(peak_gib=peak_memory(), peak_before_gib=before, peak_of_a_worker_gib=child,
                   wall_s=time.perf_counter() - wall, cpu_s=sum(u.ru_utime + u.ru_stime for u in used),
                   steps=[{k: t[k] for k in ('step', 'read', 'kept', 'bytes', 'seconds')} for t in report['steps']]))


def alone(target: Any, *args: Any) -> None:
    "Run a function in a new process, so that its memory is its own"
    process = multiprocessing.get_context('spawn').Process(target=target, args=args)
    process.start(); process.join()
    if process.exitcode: raise SystemExit(process.exitcode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--gigabytes', type=float, default=5)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--quick', action='store_true', help='0.02 GB: does it run?')
    args = parser.parse_args()
    size = .02 if args.quick else args.gigabytes
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp)/'in').mkdir()
        alone(synthetic, Path(tmp)/'in', size)
        listen, tell = multiprocessing.Pipe(duplex=False)
        alone(measure, Path(tmp), args.workers, tell)
        data = listen.recv()
    steps = {t['step']: t for t in data['steps']}
    copies, rules = steps['document_minhash_deduplicator'], steps['quality_rules_filter']
    rows = [[f'{size:g} GB', f"{copies['read']:,}", f"{copies['read'] - copies['kept']:,}", f"{rules['read']:,}",
             f"{data['wall_s'] / 60:.1f}", f"{copies['read'] / data['cpu_s']:,.0f}", f"{data['peak_gib']:.2f}"]]
    table = markdown(['synthetic corpus', 'documents', 'copies dropped', 'given signals', 'wall (min)',
                      'documents/CPU-s, both steps', 'peak (GiB)'], rows)
    worker = f" a worker's peak {data['peak_of_a_worker_gib']:.2f} GiB;" if args.workers > 1 else ''
    notes = (f'Eight shards, {args.workers} process{"es" * (args.workers > 1)}, one recipe: near copies by MinHash, '
             f'then all signals and a set of rules. The peak is of resident memory of the process that runs '
             f'it;{worker} {data["peak_before_gib"]:.2f} GiB were there before the first document.')
    if args.quick: print(table, notes, sep='\n\n')
    else: write('large_corpus', 'A large corpus in little memory', [table], notes,
               dict(gigabytes=size, **data), 'numba', 'numpy')


if __name__ == '__main__': main()
