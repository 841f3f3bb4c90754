"""Byte-level BPE: training beside rustbpe and tokenizers, encoding beside tiktoken and tokenizers.

    python benchmarks/bpe.py [--repeats 5] [--quick] [--memory]

The corpus is Python's standard library and the installed packages, read by `llmnotes.corpus` and
shuffled: 50 MB to train on, further documents to encode. All sides get the same texts in one
process. Merges are compared with those of tokenizers, ids with those of tiktoken. `--memory` trains
on a stream of 1 GB as well: the documents again and again, where in each round one word in twenty
gets the number of the round, in letters, so that distinct words grow as they do in a corpus.
"""
import argparse
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import rustbpe
import tiktoken
import tokenizers
from _table import alternate, markdown, spread, write

from llmnotes.corpus import python_corpus
from llmnotes.tokenizers.bpe import GPT2_PATTERN, BPETokenizer, train_bpe

VOCAB = 8192
TIKTOKEN_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # its own spelling
PACKAGES = ('torch', 'transformers', 'numpy', 'scipy', 'sklearn', 'pandas', 'matplotlib', 'sympy', 'datasets',
            'huggingface_hub', 'networkx', 'numba')  # those that are installed
COLD = """
import json, sys, time
from llmnotes.tokenizers.bpe import train_bpe
texts = json.load(open(sys.argv[1]))
start = time.perf_counter()
train_bpe(texts, int(sys.argv[2]))
print(time.perf_counter() - start)
"""
MEMORY = """
import itertools, json, random, re, sys, time
from llmnotes.tokenizers import kernels
from llmnotes.tokenizers.bpe import train_bpe
seen, count = {}, kernels.count_words
def counted(*args):
    table = count(*args)
    seen.update(distinct=len(table[1]) - 1, bytes=len(table[0]))
    return table
kernels.count_words = counted
def peak(): # of this process alone; ru_maxrss begins with that of its parent
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) / 2**20
texts, n_bytes = json.load(open(sys.argv[1])), int(sys.argv[3])
def stream():
    left, rng = n_bytes, random.Random(0)
    for k in itertools.count():
        name = ''.join('bcdfghjklm'[int(digit)] for digit in str(k)) # digits would be words of their own
        for text in texts:
            if k: text = re.sub('[a-z]{4,} ', lambda m: m[0] if rng.random() > .05 else f'{m[0][:-1]}{name} ', text)
            yield text
            left -= len(text.encode())
            if left <= 0: return
before, start = peak(), time.process_time()
tok = train_bpe(stream(), int(sys.argv[2]))
print(json.dumps(dict(before_gib=before, peak_gib=peak(), cpu_s=time.process_time() - start,
                      merges=len(tok.merges), **seen)))
"""


def corpus(n_bytes: int) -> Iterator[str]:
    "Shuffled documents of this Python and its packages, all domains"
    there = [name for name in PACKAGES if importlib.util.find_spec(name)]
    docs = [doc.text for doc in python_corpus(there)]
    random.Random(0).shuffle(docs)
    for text in docs:
        if n_bytes <= 0: return
        n_bytes -= len(text.encode())
        yield text


def weight(texts: list[str]) -> float:  # MB
    return sum(len(text.encode()) for text in texts) / 1e6


def train_hf(texts: list[str]) -> tokenizers.Tokenizer:
    ref = tokenizers.Tokenizer(tokenizers.models.BPE())
    ref.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ref.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return ref


def train_rust(texts: list[str]) -> rustbpe.Tokenizer:
    rust = rustbpe.Tokenizer()
    rust.train_from_iterator(iter(texts), VOCAB, pattern=GPT2_PATTERN)
    return rust


def child(code: str, *args: str) -> str:
    return subprocess.run([sys.executable, '-c', code, *args], check=True, capture_output=True, text=True).stdout


def measure_training(texts: list[str], path: str, repeats: int) -> tuple[list[list[str]], dict, BPETokenizer]:
    made, cold, mb = {}, [], weight(texts)
    jobs = {'llmnotes, warm': lambda: made.update(ours=train_bpe(texts, VOCAB)),
            'llmnotes, cold': lambda: cold.append(float(child(COLD, path, str(VOCAB)))),
            'rustbpe': lambda: made.update(rust=train_rust(texts)),
            'tokenizers': lambda: made.update(hf=train_hf(texts))}
    alternate({name: jobs[name] for name in ('llmnotes, warm', 'llmnotes, cold')}, 1)
    cold.clear()
    wall = alternate(jobs, repeats)
    wall['llmnotes, cold'] = cold                        # without reading the texts
    cpu = alternate({name: job for name, job in jobs.items() if 'cold' not in name}, repeats, time.process_time)
    vocab, tok = made['hf'].get_vocab(), made['ours']
    theirs = [(vocab[a], vocab[b]) for a, b in json.loads(made['hf'].to_str())['model']['merges']]
    if [(tok.vocab[a], tok.vocab[b]) for a, b in tok.merges] != theirs: raise SystemExit('merges differ')
    rust = {bytes(t) for t, _ in made['rust'].get_mergeable_ranks()}
    took = {name: spread(s) for name, s in wall.items()}
    cpu = {name: spread(s)['median'] for name, s in cpu.items()}
    best = took['llmnotes, warm']['median']
    rows = [[name, f"{t['median']:.2f} s", f"{t['least']:.2f} to {t['most']:.2f}", f"{mb / t['median']:.1f}",
             f'{cpu[name]:.2f} s' if name in cpu else '', f"{t['median'] / best:.2f}x"] for name, t in took.items()]
    data = dict(wall=took, cpu=cpu, megabytes=mb, merges=len(theirs), merges_equal_tokenizers=True,
                tokens_in_common_with_rustbpe=len(rust & set(tok.vocab)) / len(tok.vocab))
    return rows, data, tok


def measure_encoding(tok: BPETokenizer, texts: list[str], repeats: int) -> tuple[list[list[str]], dict]:
    tik = tiktoken.Encoding('ours', pat_str=TIKTOKEN_GPT2, mergeable_ranks=tok.vocab, special_tokens={})
    with tempfile.TemporaryDirectory() as folder:
        fast = tokenizers.Tokenizer.from_file(str(tok.save(f'{folder}/tokenizer.json')))
    short = [line for text in texts for line in text.splitlines()][:50_000]
    sides = {'each text, array': (texts, lambda x: [tok.encode_to_numpy(t) for t in x],
                                  lambda x: [tik.encode_to_numpy(t) for t in x], None),
             'each text, list': (texts, lambda x: [tok.encode(t) for t in x],
                                 lambda x: [tik.encode_ordinary(t) for t in x],
                                 lambda x: [fast.encode(t).ids for t in x]),
             'batch': (texts, tok.encode_batch, lambda x: tik.encode_ordinary_batch(x, num_threads=1), None),
             'each line, list': (short, lambda x: [tok.encode(t) for t in x],
                                 lambda x: [tik.encode_ordinary(t) for t in x], None)}
    rows, data = [], {}
    for way, (some, *fs) in sides.items():
        names = 'llmnotes', 'tiktoken', 'tokenizers'
        jobs = {name: lambda f=f, some=some: f(some) for name, f in zip(names, fs) if f}
        ids = {name: [list(map(int, t)) for t in job()] for name, job in jobs.items()}
        if any(i != ids['llmnotes'] for i in ids.values()): raise SystemExit(f'ids differ: {way}')
        n_ids = sum(map(len, ids.pop('llmnotes')))
        ids.clear()
        times = {name: 1 if name == 'tokenizers' else repeats for name in jobs}
        took = {name: spread(s) for name, s in alternate(jobs, times, time.process_time).items()}
        for name, t in took.items():
            rows.append([way, name, f"{weight(some) / t['median']:.1f}", f"{1e6 * t['median'] / len(some):.1f} µs",
                         f"{t['median'] / took['llmnotes']['median']:.2f}x"])
        data[way] = dict(took=took, megabytes=weight(some), texts=len(some), ids=n_ids, ids_equal=True)
    return rows, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--quick', action='store_true', help='3 MB, one repeat: does it run?')
    parser.add_argument('--memory', action='store_true', help='also train on a stream of 1 GB')
    args = parser.parse_args()
    size, repeats = (3e6, 1) if args.quick else (50e6, args.repeats)
    texts, train = list(corpus(size * 1.2)), []
    n = 0
    while n < size and texts:
        train.append(texts.pop())
        n += len(train[-1].encode())
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        json.dump(train, file)
        file.flush()
        rows, trained, tok = measure_training(train, file.name, repeats)
        print(f'{weight(train):.1f} MB trained on, {weight(texts):.1f} MB held out', flush=True)
        memory = json.loads(child(MEMORY, file.name, '32768', str(3e7 if args.quick else 1e9).split('.')[0])
                            ) if args.memory else None
    encode_rows, encoded = measure_encoding(tok, texts, repeats)
    head = ['training', 'wall time, median', 'spread (s)', 'MB/s', 'CPU time', 'llmnotes warm is faster by']
    tables = [markdown(head, rows),
              markdown(['encoding, one thread', 'by', 'MB per CPU second', 'a text', 'llmnotes is faster by'],
                       encode_rows)]
    common = trained['tokens_in_common_with_rustbpe']
    notes = (f'Training: {weight(train):.1f} MB of this Python and its packages, {VOCAB:,} tokens, pattern of GPT-2, '
             f'all sides in turn, median of {repeats}. Ours runs in one thread, the others in as many as they take. '
             f'"Cold" is a fresh process in which the compiled code is read from disk. All {trained["merges"]:,} '
             f'merges equal those of tokenizers; {common:.2%} of the tokens are in common with rustbpe. Encoding: '
             f'{weight(texts):.1f} MB that were not trained on, CPU time, caches warm, all ids equal.')
    if memory:
        notes += (f' A stream of 1 GB, in which words of each round get new names, to {memory["merges"] + 256:,} '
                  f'tokens: {memory["distinct"]:,} distinct words of {memory["bytes"] / 1e6:.0f} MB, '
                  f'{memory["cpu_s"]:.0f} s of CPU time with the making of the stream, peak '
                  f'{memory["peak_gib"]:.2f} GiB, of which {memory["before_gib"]:.2f} GiB, mostly the 50 MB of '
                  'documents, were there before.')
    data = dict(training=trained, encoding=encoded, memory=memory)
    if args.quick: print(*tables, notes, sep='\n\n')
    else: write('bpe', 'Byte-level BPE', tables, notes, data, 'numba', 'rustbpe', 'tiktoken', 'tokenizers')


if __name__ == '__main__':
    main()
