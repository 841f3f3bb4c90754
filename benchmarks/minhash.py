"""MinHash signatures from raw text beside the peers.

    python benchmarks/minhash.py [--repeats 5] [--quick]

Signatures: 128 permutations of 5-word shingles, one thread, docstrings of whatever is installed.
Peers that are not installed are named as missing. What a large deduplication holds in memory is
measured by large_corpus.py.
"""
import argparse
import importlib
import importlib.util
import random
import time
from collections.abc import Callable

import numpy as np
from _table import alternate, markdown, spread, write

from llmnotes.corpus import python_corpus
from llmnotes.data.dedup import minhash_signature, normalise

PACKAGES = ['numpy', 'torch', 'matplotlib', 'pandas', 'sklearn', 'scipy']


def documents(n: int) -> list[str]:
    "Docstrings of 500 to 20,000 characters"
    there = [p for p in PACKAGES if importlib.util.find_spec(p)]
    texts = [d.body for d in python_corpus(there, domains=['docstring'])]
    texts = [t for t in texts if 500 < len(t) < 20_000]
    return random.Random(0).sample(texts, min(n, len(texts)))


def shingled(text: str) -> list[str]:
    words = normalise(text).split()
    return list({' '.join(words[i:i + 5]) for i in range(len(words) - 4)})


def peers(texts: list[str]) -> dict[str, Callable[[], object]]:
    from datasketch import MinHash
    def sketch(scheme: str) -> Callable[[], object]:
        base = MinHash(128, seed=42, scheme=scheme)
        def job() -> list:
            made = []
            for t in texts:
                m = MinHash(128, seed=42, scheme=scheme, permutations=base.permutations)
                m.update_batch([s.encode() for s in shingled(t)])
                made.append(m.hashvalues)
            return made
        return job
    jobs = {'llmnotes': lambda: [minhash_signature(t) for t in texts],
            'datasketch, legacy': sketch('legacy'), 'datasketch, default': sketch('affine32')}
    if importlib.util.find_spec('rensa'):
        RMinHash = importlib.import_module('rensa').RMinHash
        def rensa() -> list:
            made = []
            for t in texts:
                m = RMinHash(num_perm=128, seed=42)
                m.update(shingled(t))
                made.append(m.digest())
            return made
        jobs['rensa RMinHash'] = rensa
    if importlib.util.find_spec('daft'):
        daft = importlib.import_module('daft')
        def minhash() -> object:
            frame = daft.from_pydict({'text': texts})
            clean = frame['text'].normalize(remove_punct=True, lowercase=True, nfd_unicode=True, white_space=True)
            return frame.select(clean.minhash(num_hashes=128, ngram_size=5)).collect()
        jobs['daft'] = minhash
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--quick', action='store_true', help='200 documents, one repeat: does it run?')
    args = parser.parse_args()
    texts = documents(200 if args.quick else 2000)
    jobs = peers(texts)
    same = np.array_equal(np.stack(jobs['llmnotes']()), np.stack(jobs['datasketch, legacy']()))
    if not same: raise SystemExit('signatures differ from datasketch legacy')
    took = alternate(jobs, 1 if args.quick else args.repeats, time.process_time)
    mean = sum(map(len, texts)) / len(texts)
    ours = spread(took['llmnotes'])['median']
    rows = [[name, f"{len(texts) / (s := spread(t))['median']:,.0f}", f"{len(texts) / s['most']:,.0f} to "
             f"{len(texts) / s['least']:,.0f}", f"{s['median'] / ours:.2f}"] for name, t in took.items()]
    tables = [markdown(['from raw text', 'documents/CPU-s (median)', 'range', "times ours"], rows)]
    data: dict = dict(documents=len(texts), characters=mean, seconds={k: spread(t) for k, t in took.items()})
    missing = [p for p in ('rensa', 'daft') if not importlib.util.find_spec(p)]
    notes = (f'{len(texts):,} docstrings of {mean:,.0f} characters on average, 128 permutations, shingles of five '
             'words. Seconds are those of the process on all its threads. Ours equals datasketch\'s legacy scheme '
             'bit for bit on all of them; rensa and daft use other hash functions. '
             + (f'Not installed: {", ".join(missing)}.' if missing else ''))
    write('minhash', 'MinHash signatures', tables, notes, data, 'datasketch', 'rensa', 'daft', 'numba')


if __name__ == '__main__': main()
