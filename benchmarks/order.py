"""In-context order: exact neighbours beside faiss, and the two walks.

    OMP_NUM_THREADS=1 python benchmarks/order.py [--repeats 5] [--documents 5000]
"""
import argparse
import os

import numpy as np
from _table import alternate, markdown, spread, write

from llmnotes.data.order import context_chains, greedy_path, merge_chains, nearest_neighbours
from llmnotes.data.semantic import unit_rows

C, K = 128, 9


def clustered(n: int) -> np.ndarray:
    "Directions around n / 50 centres, about as related as documents of a library"
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(2, n // 50), C))
    return unit_rows(centres[rng.integers(len(centres), size=n)] + rng.standard_normal((n, C)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--documents', type=int, default=5_000)
    args = parser.parse_args()
    import faiss
    threads = os.environ.get('OMP_NUM_THREADS', 'as many as there are')
    x = clustered(args.documents)
    ids, cosines = nearest_neighbours(x, K)

    def by_faiss() -> np.ndarray:
        index = faiss.IndexFlatIP(C)
        index.add(x)
        return index.search(x, K + 1)[0]

    jobs = {'nearest_neighbours': lambda: nearest_neighbours(x, K), 'faiss, IndexFlatIP': by_faiss,
            'greedy_path': lambda: greedy_path(ids, cosines),
            'context_chains, merge_chains': lambda: merge_chains(context_chains(ids), ids)}
    same = float(np.abs(by_faiss()[:, 1:] - cosines).max())
    took = {name: spread(s) for name, s in alternate(jobs, args.repeats).items()}
    rows = [[name, f"{t['median']:.2f} s", f"{t['least']:.2f} to {t['most']:.2f}",
             f"{args.documents / t['median']:,.0f}"] for name, t in took.items()]
    notes = (f'{args.documents:,} directions of {C} numbers, {K} neighbours, threads: {threads}, all sides in turn, '
             f'median of {args.repeats}. The cosines of both searches agree to {same:.0e}. '
             'The walks start from the neighbours.')
    write('order', 'In-context order', [markdown(['step', 'time', 'spread (s)', 'documents/s'], rows)], notes,
          dict(times=took, documents=args.documents, difference=same), 'numpy', 'faiss-cpu')


if __name__ == '__main__': main()
