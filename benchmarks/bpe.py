"""Byte-level BPE beside its compiled peers: training, encoding, and the memory of a large training.

    python benchmarks/bpe.py [--repeats 3] [--quick] [--gigabytes 1]

Texts are Python source and documentation of what is installed. Ours and tokenizers run on one thread, rustbpe
as it is, on all cores. Training is timed warm (second call in a process) and cold (a new process, with compiled
code on disk); merges are compared with those of tokenizers. Encoding is timed on texts that the tokenizer was
not trained on, and ids are compared.
"""
import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain

import rustbpe
import tiktoken
import tokenizers
from _table import alternate, markdown, spread, write

from llmnotes.core import peak_memory
from llmnotes.corpus import python_corpus
from llmnotes.tokenizers.bpe import BYTE_NAMES, GPT2_PATTERN, BPETokenizer, train_bpe

PACKAGES = ['torch', 'transformers', 'scipy', 'sklearn', 'pandas', 'numpy', 'matplotlib', 'sympy', 'datasets', 'peft',
            'trl', 'lm_eval', 'IPython', 'jupyterlab', 'accelerate', 'huggingface_hub', 'networkx', 'nltk', 'numba']


def texts(megabytes: float) -> tuple[list[str], list[str]]:
    "So much to train on, and a tenth as much beside it"
    there = [p for p in PACKAGES if importlib.util.find_spec(p)]
    train, held, size = [], [], 0
    for k, document in enumerate(python_corpus(there, domains=['manual', 'docstring', 'code'])):
        (held if k % 11 == 10 else train).append(document.text)
        size += len(document.text.encode()) * (k % 11 != 10)
        if size > megabytes * 1e6: break
    return train, held


def by_tokenizers(some: list[str], vocab_size: int) -> list[tuple[str, str]]:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(GPT2_PATTERN), 'isolated'),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.train_from_iterator(some, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return [tuple(m) for m in json.loads(made.to_str())['model']['merges']]


def by_rustbpe(some: list[str], vocab_size: int) -> object:
    made = rustbpe.Tokenizer()
    made.train_from_iterator(iter(some), vocab_size, pattern=GPT2_PATTERN)
    return made


def cold(megabytes: float, vocab_size: int, name: str) -> float:
    "Seconds of a training in a process of its own, imports included, reading the texts not"
    code = (f'import sys, time, json; sys.path.insert(0, "benchmarks"); import bpe\n'
            f'some = json.load(sys.stdin); start = time.perf_counter()\n'
            f'bpe.TRAINERS[{name!r}](some, {vocab_size}); print(time.perf_counter() - start)')
    some = json.dumps(texts(megabytes)[0])
    done = subprocess.run([sys.executable, '-c', code], input=some, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def by_us(some: list[str], vocab_size: int) -> BPETokenizer:
    return train_bpe(some, vocab_size, compiled=True)


TRAINERS: dict[str, Callable] = {'llmnotes': by_us, 'tokenizers': by_tokenizers, 'rustbpe': by_rustbpe}


def training(megabytes: float, vocab_size: int, repeats: int) -> tuple[str, dict]:
    some, _ = texts(megabytes)
    size = sum(len(t.encode()) for t in some) / 1e6
    ours, theirs = by_us(some, vocab_size), by_tokenizers(some, vocab_size)
    shown = [tuple(''.join(BYTE_NAMES[b] for b in part) for part in m) for m in ours.merges]
    if shown != theirs: raise SystemExit('merges differ from those of tokenizers')
    jobs = {name: (lambda f=f: f(some, vocab_size)) for name, f in TRAINERS.items()}
    warm = alternate(jobs, {'llmnotes': repeats, 'rustbpe': repeats, 'tokenizers': min(repeats, 2)})
    first = {name: cold(megabytes, vocab_size, name) for name in ('llmnotes', 'tokenizers')}
    own = spread(warm['llmnotes'])['median']
    rows = [[name, f"{(s := spread(t))['median']:.2f}", f"{s['least']:.2f} to {s['most']:.2f}",
             f"{size / s['median']:.1f}", f"{s['median'] / own:.2f}", f'{first[name]:.2f}' if name in first else '']
            for name, t in warm.items()]
    head = [f'training, {size:.0f} MB, {vocab_size:,} tokens', 'warm, wall (s)', 'range', 'MB/s', 'times ours',
            'cold (s)']
    return markdown(head, rows), dict(megabytes=size, merges_equal=len(theirs), cold_s=first,
                                      warm_s={k: spread(t) for k, t in warm.items()})


def encoding(megabytes: float, repeats: int) -> tuple[str, dict]:
    some, held = texts(megabytes)
    held = held[:max(1, len(held) * 5_000_000 // max(5_000_000, sum(map(len, held))))]
    tok = train_bpe(some[::10], 8192)
    tok = BPETokenizer(tok.vocab, tok.merges, compiled=True)
    tik = tiktoken.Encoding('own', pat_str=tok.pattern, mergeable_ranks=tok.vocab, special_tokens={})
    fast = tokenizers.Tokenizer.from_str(json.dumps(json.loads(save(tok))))
    want = tik.encode_ordinary_batch(held, num_threads=1)
    if tok.encode_batch(held) != want or [fast.encode(t).ids for t in held] != want:
        raise SystemExit('ids differ')
    size, whole = sum(len(t.encode()) for t in held) / 1e6, '\n'.join(held)
    def each(f: Callable) -> Callable: return lambda: [f(t) for t in held]
    def array(t: str) -> object: return tik.encode_to_numpy(t, disallowed_special=())
    kinds = {
        'each text to a list': {'llmnotes': each(tok.encode), 'tiktoken': each(tik.encode_ordinary),
                                'tokenizers': each(fast.encode)},
        'each text to an array': {'llmnotes': each(tok.encode_to_numpy), 'tiktoken': each(array)},
        'all texts in one call': {'llmnotes': lambda: tok.encode_batch(held),
                                  'tiktoken': lambda: tik.encode_ordinary_batch(held, num_threads=1)},
        'one text of all, to an array': {'llmnotes': lambda: tok.encode_to_numpy(whole),
                                         'tiktoken': lambda: array(whole)}}
    rows, data = [], dict(megabytes=size, texts=len(held))
    for kind, jobs in kinds.items():
        took = alternate(jobs, {n: 2 if n == 'tokenizers' else 2 * repeats + 1 for n in jobs}, time.process_time)
        data[kind] = {n: spread(t) for n, t in took.items()}
        own = data[kind]['llmnotes']['median']
        rows += [[kind, n, f"{size / s['median']:.1f}", f"{s['median'] / own:.2f}"] for n, s in data[kind].items()]
    head = [f'encoding, {size:.1f} MB in {len(held):,} texts', '', 'MB per CPU second', 'times ours']
    return markdown(head, rows), data


def save(tok: BPETokenizer) -> str:
    import tempfile
    with tempfile.TemporaryDirectory() as tmp: return tok.save(f'{tmp}/tokenizer.json').read_text()


def stream(gigabytes: float, some: list[str]) -> Iterator[str]:
    "Texts over and over, with words that never came before, until they weigh so much"
    size, k = 0, 0
    for text in chain.from_iterable(some for _ in range(10**6)):
        text = f'{text}\nname_{k:x} = value_{k * 7919:x}'
        size, k = size + len(text), k + 1
        if size > gigabytes * 1e9: return
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--quick', action='store_true', help='two megabytes, one repeat: does it run?')
    parser.add_argument('--gigabytes', type=float, default=0, help='size of a stream to train on as well')
    args = parser.parse_args()
    megabytes, repeats = (2, 1) if args.quick else (50, args.repeats)
    data, tables = {}, []
    if args.gigabytes:                                 # first: peak memory never falls
        some = texts(5 if args.quick else 20)[0]
        before, start = peak_memory(), time.perf_counter()
        tok = train_bpe(stream(args.gigabytes, some), 32_768, compiled=True)
        data['large'] = dict(gigabytes=args.gigabytes, wall_s=time.perf_counter() - start, peak_gib=peak_memory(),
                             before_gib=before, tokens=tok.vocab_size)
        tables.append(markdown(['stream', 'tokens', 'wall (s)', 'peak (GiB)', 'before (GiB)'], [[
            f'{args.gigabytes:g} GB', f'{tok.vocab_size:,}', f"{data['large']['wall_s']:.0f}",
            f"{data['large']['peak_gib']:.2f}", f'{before:.2f}']]))
    for name, (table, found) in dict(training=training(megabytes, 8192, repeats),
                                     encoding=encoding(megabytes, repeats)).items():
        tables.insert(len(tables) if name == 'encoding' else 0, table); data[name] = found
    notes = ('All merges equal those of tokenizers, all ids those of tiktoken and tokenizers. Warm: the second and '
             'later calls in one process, wall time; rustbpe uses all cores, the others one. Cold: the first call in a '
             'new process, with compiled code on disk (the very first compilation on a machine takes ten seconds and '
             'more). Encoding is on texts beside the training set, one thread, caches warm.')
    write('bpe', 'Byte-level BPE', tables, notes, data, 'tokenizers', 'tiktoken', 'rustbpe', 'numba')


if __name__ == '__main__': main()
