"""Quality signals a CPU second, beside the version that applies each formula by itself.

    python benchmarks/signals.py [--repeats 5] [--quick]

The documents are docstrings of the packages that the notebooks use, joined until they are about
as long as those that the published code was once measured on, 2,292 characters. The slow version
is the notebook's: it cuts each text once, which the published code does several times, and counts
in Python. Filters that return a verdict are no peers, since they stop at the first rule that fails.
"""
import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import regex
from _table import alternate, markdown, spread, write

from llmnotes.corpus import python_corpus
from llmnotes.data.dedup import normalise
from llmnotes.data.signals import STOP_WORDS, compute_signals

NOTEBOOK = Path(__file__).resolve().parent.parent/'nbs/22_quality_signals.ipynb'
PUBLISHED = 290  # docs/CPU-s of RedPajama-Data 6d2cee9, measured once on another, busy machine


def slow_version() -> Callable[..., dict[str, list]]:
    "The cells of the notebook that hold it"
    found: dict[str, Any] = dict(math=math, re=re, regex=regex, Counter=Counter,
                                 normalise=normalise, test_eq=lambda *args: None)
    for cell in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and 'def slow_' in source: exec(source, found)
    return found['slow_signals']


def pages(
    n: int,
    size: int = 2292,  # characters, on average
) -> list[str]:
    "Docstrings, joined until a page is long enough"
    found, page = [], ''
    for doc in python_corpus(['numpy', 'email', 'unittest', 'scipy'], stdlib=True):
        if doc.domain == 'code': continue
        page += doc.text + '\n\n'
        if len(page) < .78 * size: continue
        found.append(page[:3 * size])
        page = ''
        if len(found) == n: break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--quick', action='store_true', help='few documents, one round: does it run?')
    args = parser.parse_args()
    docs = pages(40 if args.quick else 600)
    lists = dict(stop_words=STOP_WORDS['en'], bad_words=frozenset({'ass', 'blow job', 'two girls one cup'}),
                 domain='x.org', blocklist={'example.com': 3})
    slow = slow_version()
    for text in docs[:50]:
        ours = compute_signals(text, **lists)
        assert all(ours[k] == v for k, v in slow(text, **lists).items())

    def over(f: Callable[[str], Any]) -> Callable[[], None]:
        def run() -> None:
            for text in docs: f(text)
        return run
    jobs = {'llmnotes, all in one pass': over(lambda x: compute_signals(x, **lists)),
            'one formula after the other': over(lambda x: slow(x, **lists))}
    took = {k: spread(s) for k, s in alternate(jobs, 1 if args.quick else args.repeats,
                                               time.process_time).items()}
    best = took['llmnotes, all in one pass']['median']
    rows = [[name, f"{len(docs) / t['median']:,.0f}",
             f"{len(docs) / t['most']:,.0f} to {len(docs) / t['least']:,.0f}",
             f"{sum(map(len, docs)) / t['median'] / 1e6:.1f}", f"{t['median'] / best:.1f}x"]
            for name, t in took.items()]
    table = markdown(['signals', 'docs/CPU-s', 'spread', 'million characters/CPU-s', 'ours is faster by'], rows)
    mean = sum(map(len, docs)) / len(docs)
    notes = (f'{len(docs)} documents of {mean:,.0f} characters on average, in turn, median of {args.repeats} '
             'rounds of CPU time in one process. Ours and the slow version return the same values for all '
             'of the 29 signals by rule or list, spans included. The '
             f'published code was measured at {PUBLISHED} such documents on another, busy machine: ours is '
             f'at {len(docs) / best / PUBLISHED:.1f} times that.')
    if args.quick: print(table)
    else: write('signals', 'Quality signals', [table], notes, dict(
        documents=len(docs), characters=mean, published=PUBLISHED,
        runs=[dict(name=n, **t) for n, t in took.items()]), 'numpy', 'regex')


if __name__ == '__main__':
    main()
