"""Byte-level BPE beside tiktoken with its own ranks, splitters beside `regex`, and bad input."""
import json
import os
import random
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken

from llmnotes.tokenizers import bpe, kernels
from llmnotes.tokenizers.bpe import (
    CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, BPETokenizer, as_unicode16, split_words, train_bpe)

# As tiktoken spells them; ours are those that `tokenizers` reads alike
TIKTOKEN = {
    GPT2_PATTERN: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    CL100K_PATTERN: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
                    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    O200K_PATTERN: O200K_PATTERN}
RANKS = {'r50k_base': GPT2_PATTERN, 'cl100k_base': CL100K_PATTERN}
EDGES = [*" \t\n\r\x0b\x1c\x85\xa0\u3000a1é'sldtmrveSLDTMRVE\u017f\u212a.{/-", '\u0301', '\u0903', 'ª', 'ʰ', 'ǅ',
         'A', 'Σ', '中', '١', '½', 'Ⅷ', '🙂', '\u200b', '\u0558', '\u1acf', '\u0295', "''", '\r\n', '\0']


def texts(n: int, seed: int = 0) -> list[str]:
    "Many languages, emoji, control characters, broken UTF-8, and what patterns stumble over"
    rng = random.Random(seed)
    points = lambda: ''.join(chr(c) for c in (rng.randrange(0x110000) for _ in range(20))
                             if not 0xd800 <= c < 0xe000)
    made = [lambda: ''.join(rng.choices(EDGES, k=rng.randrange(60))), points,
            lambda: rng.randbytes(rng.randrange(60)).decode(errors='replace'),
            lambda: rng.choice('a \n1.é🙂中') * rng.randrange(600)]
    fixed = ['', 'Τῇ καλλίστῃ, Здравствуй мир, שלום עולם', 'नमस्ते สวัสดี 你好世界、안녕', '👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 ﬁ Ⅷ ½ ٣',
             '\0\x01\x1b[0m\x7f\x85\ufeff\u2028', '<|endoftext|><|fim_prefix|>', "DON'T I'LL we'Ve it'ſ",
             'Aʕa ʕB aʕB ʕ AʕʕA aʕ', 'A\u0558a a\u1acfb \u1acfA']
    return fixed + [rng.choice(made)() for _ in range(n)]


@pytest.fixture(scope='module', params=RANKS)
def pair(request: pytest.FixtureRequest, shared: Path) -> tuple[BPETokenizer, tiktoken.Encoding]:
    "The same ranks in ours and in tiktoken"
    path, pattern = shared/'tiktoken-ranks'/f'{request.param}.tiktoken', RANKS[request.param]
    if not path.is_file(): pytest.skip(f'{path.name} is not here')
    special = {'<|endoftext|>': 200_000}
    ours = BPETokenizer.from_tiktoken(path, pattern=pattern, special_tokens=special, compiled=True)
    return ours, tiktoken.Encoding('ours', pat_str=TIKTOKEN[pattern], mergeable_ranks=ours.vocab,
                                   special_tokens=special)


def test_ids_equal_tiktoken_with_its_ranks(pair: tuple, shared: Path) -> None:
    ours, tik = pair
    some = texts(10_000) + [(shared/'xquad'/'xquad.es.json').read_text(encoding='utf-8')[:400_000],
                            (shared/'tinyshakespeare'/'input.txt').read_text(encoding='utf-8')]
    want = tik.encode_ordinary_batch(some, num_threads=1)
    assert ours.encode_batch(some) == want
    assert [ours.encode(t) for t in some] == want
    assert [ours.encode_to_numpy(t).tolist() for t in some] == want
    pure = BPETokenizer(ours.vocab, ours.merges, pattern=ours.pattern, compiled=False)
    assert [pure.encode(t) for t in some[:2000]] == want[:2000]
    assert [ours.decode(ids) for ids in want] == some


def test_long_words_equal_tiktoken(pair: tuple) -> None:
    "One word of thousands of bytes: of one letter, of few letters, of random ones, of spaces"
    ours, tik = pair
    rng = random.Random(1)
    for text in ['a' * 5001, 'ab' * 3000, 'x' + ' ' * 4000 + 'y', ''.join(rng.choices('abcdefgh', k=9000)),
                 ''.join(rng.choices('天地玄黃', k=3000)), '=' * 1001 + '\n' * 700]:
        assert ours.encode(text) == tik.encode_ordinary(text)


def test_any_bytes_come_back(pair: tuple) -> None:
    rng = random.Random(2)
    pure = BPETokenizer(pair[0].vocab, pair[0].merges, pattern=pair[0].pattern, compiled=False)
    for _ in range(2000):
        data = rng.randbytes(rng.randrange(50)) + rng.choice(['é中🙂', 'a b', '']).encode()[:rng.randrange(9)]
        ids = pair[0].encode_bytes(data)
        assert pair[0].decode_bytes(ids) == data and pure.encode_bytes(data) == ids


def test_a_full_cache_and_merges_out_of_order_change_no_id() -> None:
    tok, some = train_bpe(texts(300), 500, compiled=False), texts(600, seed=8)
    want = [tok.encode(t) for t in some]
    small = kernels.Encoder(tok, room=8)
    assert [small.to_list(t.encode()) for t in some] == want
    odd = BPETokenizer(tok.vocab, tok.merges[::-1], compiled=True)
    with pytest.warns(UserWarning, match='not in order'): have = [odd.encode(t) for t in some]
    assert have == [BPETokenizer(tok.vocab, tok.merges[::-1], compiled=False).encode(t) for t in some]


def test_special_tokens_are_not_smuggled_in(pair: tuple) -> None:
    ours, tik = pair
    text = 'a<|endoftext|>b'
    assert 200_000 not in ours.encode(text) + ours.encode_batch([text])[0]
    assert ours.encode(text) == tik.encode_ordinary(text)
    allowed = tik.encode(text, allowed_special='all')
    assert ours.encode(text, allowed_special='all') == allowed
    assert ours.encode_to_numpy(text, allowed_special='all').tolist() == allowed


def test_trained_ranks_load_in_tiktoken(tmp_path: Path) -> None:
    for pattern, theirs in TIKTOKEN.items():
        tok = train_bpe(texts(400), 500, pattern=pattern)
        tik = tiktoken.Encoding('t', pat_str=theirs, mergeable_ranks=tok.vocab, special_tokens={})
        some = texts(700, seed=3)
        assert [tok.encode(t) for t in some] == [tik.encode_ordinary(t) for t in some]
        back = BPETokenizer.from_tiktoken(tok.to_tiktoken(tmp_path/'ranks'), pattern=pattern)
        assert (back.vocab, back.merges) == (tok.vocab, tok.merges)


def test_saved_file_gives_the_same_ids_in_tokenizers(tmp_path: Path) -> None:
    import tokenizers
    for pattern in kernels.FAMILIES:
        tok = train_bpe(texts(400), 500, pattern=pattern, special_tokens=['<|endoftext|>'], compiled=True)
        fast = tokenizers.Tokenizer.from_file(str(tok.save(tmp_path/'tokenizer.json')))
        fast.encode_special_tokens = True
        some = texts(400, seed=4)
        assert [tok.encode(t) for t in some] == [fast.encode(t).ids for t in some]


@pytest.mark.parametrize('alphabet', ['ab', 'aab ', 'abc é'])
def test_merges_equal_tokenizers_ties_included(alphabet: str) -> None:
    "Short words of few letters: nearly every choice is a tie"
    import tokenizers
    rng = random.Random(5)
    for _ in range(40):
        some = [''.join(rng.choices(alphabet, k=rng.randrange(1, 30))) for _ in range(8)]
        ref = tokenizers.Tokenizer(tokenizers.models.BPE())
        ref.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        ref.train_from_iterator(some, tokenizers.trainers.BpeTrainer(
            vocab_size=290, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        vocab = ref.get_vocab()
        want = [(vocab[a], vocab[b]) for a, b in json.loads(ref.to_str())['model']['merges']]
        for compiled in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                tok = train_bpe(some, 290, compiled=compiled)
            assert [(tok.vocab[a], tok.vocab[b]) for a, b in tok.merges] == want


@pytest.mark.parametrize('pattern', kernels.FAMILIES, ids=['gpt2', 'cl100k', 'llama3', 'o200k'])
def test_compiled_splitters_equal_regex(pattern: str) -> None:
    "Random strings of edge characters, also of bytes that are no UTF-8"
    rng = random.Random(6)
    for _ in range(40_000):
        some = rng.sample([*EDGES, '\udc80', '\udcff', '\udce4', '\udced\udca4\udc80'], rng.randrange(2, 12))
        text = ''.join(rng.choices(some, k=rng.randrange(14)))
        data = text.encode(errors='surrogateescape')
        text = data.decode(errors='surrogateescape')     # three such bytes may be a character
        ends = [0, *kernels.word_ends(data, pattern).tolist()]
        want = [w.encode(errors='surrogateescape') for w in split_words(text, pattern)]
        assert [data[a:b] for a, b in pairwise(ends)] == want, repr(text)


@pytest.mark.parametrize('pattern', kernels.FAMILIES, ids=['gpt2', 'cl100k', 'llama3', 'o200k'])
def test_words_are_those_of_tokenizers(pattern: str) -> None:
    "Also for letters and marks that came after Unicode 16, and for one whose case changed"
    import tokenizers
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
    rng = random.Random(9)
    for _ in range(3000):
        some = rng.sample([*EDGES, '\u0295Ba', 'a\u1acfb', '\u0558A', '\U00016ea0a'], rng.randrange(2, 12))
        text = ''.join(rng.choices(some, k=rng.randrange(14)))
        assert split_words(text, pattern) == [word for word, _ in split.pre_tokenize_str(text)], repr(text)


def test_character_kinds_equal_regex_everywhere() -> None:
    shown = as_unicode16(''.join(map(chr, range(0x110000))))
    kinds = kernels.character_kinds()
    for bit, kind in enumerate(kernels._KINDS):
        found = {i for m in regex.finditer(kind, shown) for i in (m.start(),)}
        assert found == set((kinds >> bit & 1).nonzero()[0].tolist()), kind


def test_a_long_string_without_a_space_takes_linear_time() -> None:
    "50 MB in one word, trained on and encoded; what would be quadratic would take years"
    tok = train_bpe(texts(300) + ['abcdefgh' * 40], 600, compiled=True)
    text = ''.join(random.Random(7).choices('abcdefgh', k=5_000_000)) * 10
    ids = tok.encode_to_numpy(text)
    assert tok.decode(ids[:1000]) == text[:len(tok.decode(ids[:1000]))]
    assert sum(len(t) * n for t, n in zip(tok._tokens, _counts(ids, tok.vocab_size))) == len(text)
    assert len(train_bpe([text], 260, compiled=True).merges) == 4


def _counts(ids, size: int) -> list[int]:
    import numpy as np
    return np.bincount(ids, minlength=size).tolist()


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    tok = train_bpe(['the cat and the dog'] * 3, 265, special_tokens=['<|x|>'])
    whole, ranks = tok.save(tmp_path/'t.json').read_text(), tok.to_tiktoken(tmp_path/'t.tiktoken').read_text()
    (tmp_path/'cut.json').write_text(whole[:900])
    cuts = {'middle': ranks[:700], 'rank': ranks.rstrip()[:-1], 'bytes': ranks.split('\n', 5)[5], 'noise': '\0\1 x\n'}
    for name, text in cuts.items(): (tmp_path/name).write_text(text)
    (tmp_path/'gap').write_text(''.join(line + '\n' for line in ranks.splitlines() if 'dGhl ' not in line))
    bad = {
        'texts hold no characters': [lambda: train_bpe([], 300), lambda: train_bpe(['', ''], 300, compiled=True)],
        'vocab_size 255 is below 256': [lambda: train_bpe(['a'], 255)],
        'vocab_size 256 is below 257': [lambda: train_bpe(['a'], 256, special_tokens=['<x>'])],
        'is one string': [lambda: train_bpe('abc', 300), lambda: tok.encode_batch('abc')],
        'lone surrogate U+D800': [lambda: tok.encode('a\ud800'), lambda: tok.encode_batch(['\ud800']),
                                  lambda: train_bpe(['a\ud800'], 300), lambda: tok.encode_to_numpy('\ud800'),
                                  lambda: train_bpe(['a\ud800'], 300, compiled=True)],
        'lone surrogate U+DC80': [lambda: tok.encode('\udc80')],
        'outside the vocabulary of 265': [lambda: tok.decode([265]), lambda: tok.decode([-1])],
        'covers 2 of 3 characters': [lambda c=c: train_bpe(['a b'], 300, pattern=r'\w+', compiled=c)
                                     for c in (False, True)],
        'is no regex': [lambda: train_bpe(['a b'], 300, pattern='(')],
        'not whole JSON': [lambda: BPETokenizer.from_file(tmp_path/'cut.json')],
        'is the file whole': [lambda n=n: BPETokenizer.from_tiktoken(tmp_path/n) for n in ('middle', 'rank', 'noise')],
        'tokens of lower rank': [lambda: BPETokenizer.from_tiktoken(tmp_path/'gap')],
        'of 256 bytes': [lambda: BPETokenizer.from_tiktoken(tmp_path/'bytes')]}
    for said, calls in bad.items():
        for call in calls:
            with pytest.raises(ValueError, match=regex.escape(said)) as e: call()
            assert '\n' not in str(e.value) and len(str(e.value)) < 300
    assert tok.decode(tok.encode('\0a\0\0')) == '\0a\0\0'
    with_nul = train_bpe(['a\0b a\0b'] * 2, 258, compiled=True)
    assert with_nul.merges == train_bpe(['a\0b a\0b'] * 2, 258, compiled=False).merges


def test_importing_compiles_nothing_and_pure_python_is_enough(tmp_path: Path) -> None:
    "numba stays out until there is much to do; without it one warning, where it was asked for"
    code = '''
import sys, warnings
from llmnotes.tokenizers.bpe import train_bpe
tok = train_bpe(['the cat'] * 9, 260)
tok.encode('the cat')
assert not {'numba', 'torch'} & set(sys.modules)
sys.modules['numba'] = None
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    big = train_bpe(['the cat '] * 200_000, 260)
    assert big.merges == tok.merges[:4] or len(big.merges) == 4
    assert not seen, seen
    asked = train_bpe(['the cat'] * 9, 260, compiled=True)
    assert asked.merges == tok.merges and len(seen) == 1, seen
    assert 'no compiled code' in str(seen[0].message)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_a_text_beyond_a_million_characters_goes_to_compiled_code() -> None:
    tok = train_bpe(['the cat and the dog'], 262)
    assert tok._encoder is None
    text = 'the cat ' * 130_000
    assert tok.encode(text) == BPETokenizer(tok.vocab, tok.merges, compiled=False).encode(text)
    assert tok._encoder is not None and bpe.ENOUGH < len(text)
