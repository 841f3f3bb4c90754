"""ROUGE-L of one instruction with a pool of others: the novelty filter of Self-Instruct.

    python benchmarks/rouge.py [--pool 2000] [--repeats 5] [--quick]
"""
import argparse
import time

import numpy as np
from _table import alternate, markdown, spread, write
from rouge_score import rouge_scorer

from llmnotes.corpus import python_corpus
from llmnotes.finetune.formats import qa_pairs
from llmnotes.finetune.synthesis import RougePool, rouge_l


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--pool', type=int, default=2000)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--quick', action='store_true', help='a pool of 100, one repeat: does it run?')
    args = parser.parse_args()
    n = 100 if args.quick else args.pool
    texts = [r['question'] for r in qa_pairs(python_corpus(domains=('docstring',)))][:n + 5]
    pool, new = RougePool(texts[:-5]), texts[-5:]
    scorer = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=False)
    jobs = {'RougePool': lambda: np.stack([pool.scores(t) for t in new]),
            'rouge_l, one by one': lambda: np.array([[rouge_l(p, t) for p in texts[:-5]] for t in new]),
            'rouge_score': lambda: np.array([[scorer.score(p, t)['rougeL'].fmeasure for p in texts[:-5]] for t in new])}
    want = jobs['rouge_score']()
    if not all(np.allclose(job(), want, atol=1e-12) for job in jobs.values()): raise SystemExit('scores differ')
    took = alternate(jobs, 1 if args.quick else args.repeats, time.process_time)
    ours = spread(took['RougePool'])['median']
    middle = {name: spread(s)['median'] for name, s in took.items()}
    rows = [[name, f'{len(new) * len(pool) / m:,.0f}', f'{m / ours:.1f}'] for name, m in middle.items()]
    table = markdown(['one text against the pool', 'comparisons/CPU-s (median)', 'times ours'], rows)
    notes = (f'{len(new)} questions against a pool of {len(pool):,}, one thread. '
             'All three give the same scores to 1e-12. '
             'The pool keeps its words as bits, and a new text touches only those that share a word.')
    data = dict(pool=len(pool), seconds={name: spread(s) for name, s in took.items()})
    write('rouge', 'ROUGE-L against a pool', [table], notes, data, 'rouge-score', 'numpy')


if __name__ == '__main__': main()
