"""Byte-level BPE: training beside rustbpe and tokenizers, encoding beside tiktoken and tokenizers.

    python benchmarks/bpe.py [--repeats 5] [--quick] [--memory]

The corpus is Python's standard library and the installed packages, read by `llmnotes.corpus` and
shuffled: 50 MB to train on, further documents to encode. All sides get the same texts in one
process. Merges are compared with those of tokenizers, ids with those of tiktoken. `--memory` trains
on a stream of 1 GB instead: the documents again and again, where each time one word in twenty gets
a number of that round, so that distinct words grow as they do in a corpus.
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import regex
import rustbpe
import tiktoken
import tokenizers
from _table import alternate, markdown, spread, write

from llmnotes.corpus import python_corpus
from llmnotes.tokenizers.bpe import GPT2_PATTERN, BPETokenizer, train_bpe

VOCAB = 8192
COLD = """
import json, sys, time
start = time.perf_counter()
from llmnotes.tokenizers.bpe import train_bpe
texts = json.load(open(sys.argv[1]))
start = time.perf_counter()
train_bpe(texts, 8192)
print(time.perf_counter() - start)
"""


def corpus(n_bytes: int) -> Iterator[str]:
    "Shuffled documents of this Python and its packages, all domains"
    docs = [doc.text for doc in python_corpus(packages=True)]
    random.Random(0).shuffle(docs)
    for text in docs:
        if n_bytes <= 0: return
        n_bytes -= len(text.encode())
        yield text
