"""Embeddings that move to another tokenizer, checked on random vocabularies and on GPT-2's own."""
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmnotes.tokenizers.bpe import BYTE_NAMES, BPETokenizer, train_bpe
from llmnotes.tokenizers.transplant import (
    byte_pieces,
    fill_rows,
    token_sources,
    transplant_embeddings,
)

PROSE = ['the cat sat on the mat, and the naïve cat saw the other cat 日本語 ' * 3]
CODE = ['def cat(self, other):\n    return self.mat + other.mat\n    # naïve ' * 3]


@pytest.fixture(scope='module')
def toks() -> tuple[BPETokenizer, BPETokenizer]:
    return (train_bpe(CODE, 285, special_tokens=['<|eot|>']),
            train_bpe(PROSE, 290, special_tokens=['<|pad|>', '<|eot|>']))


def rows_for(tok:BPETokenizer, width:int=7, dtype:str='float32') -> np.ndarray:
    return np.random.default_rng(0).normal(size=(tok.vocab_size, width)).astype(dtype)


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_the_same_vocabulary_gives_the_same_matrix(toks:tuple, dtype:str) -> None:
    rows = rows_for(toks[0], dtype=dtype)
    got, report = transplant_embeddings(rows, toks[0], toks[0])
    assert got.dtype == rows.dtype and np.array_equal(got, rows) and got is not rows
    assert report == dict(copied=285, averaged=0, drawn=0)


def test_each_row_is_the_mean_of_what_encode_gives(toks:tuple) -> None:
    "A token that is a part of a character cannot be encoded; its pieces must still be its bytes"
    old, new = toks
    rows, sources = rows_for(old, dtype='float64'), token_sources(old, new)
    got, report = transplant_embeddings(rows, old, new)
    parts = 0
    for token, i in new.vocab.items():
        text = token.decode(errors='replace')
        whole = text.encode() == token
        ids = old.encode(text) if whole else sources[i]
        assert np.allclose(got[i], rows[ids].mean(0), atol=1e-12), token
        assert old.decode_bytes(ids) == token
        parts += not whole and len(token) > 1
    assert parts > 0
    assert np.array_equal(got[new.special_tokens['<|eot|>']], rows[old.special_tokens['<|eot|>']])
    assert sum(report.values()) == 290 and report['drawn'] == 1 and report['averaged'] > 10


def test_a_mapping_says_the_same_as_a_tokenizer(toks:tuple) -> None:
    old, new = ({**t.vocab, **t.special_tokens} for t in toks)
    assert token_sources(old, new) == token_sources(*toks)


def test_merges_rank_where_ids_do_not() -> None:
    "The merge that was learnt first is applied first, whatever its id"
    single = {bytes([b]): b for b in range(256)}
    old = BPETokenizer(single | {b'bc': 256, b'ab': 257}, [(b'a', b'b'), (b'b', b'c')])
    assert token_sources(old, {b'abc': 0}) == [old.encode('abc')] == [[257, ord('c')]]
    assert token_sources(old.vocab, {b'abc': 0}) == [[ord('a'), 256]]      # ids rank there


def test_pieces_at_the_edge() -> None:
    "Ties go to the left, a piece counts as often as it comes, a missing one spoils the token"
    rows = np.array([[0.], [6.], [12.]])
    old = {b'a': 0, b'b': 1, b'aa': 2}
    sources = token_sources(old, {b'aaa': 0, b'bba': 1, b'bx': 2, b'': 3})
    assert sources == [[2, 0], [1, 1, 0], [], []]
    assert fill_rows(rows, sources[:2]).tolist() == [[6.], [4.]]


def test_permuted_ids_permute_rows(toks:tuple) -> None:
    old, new = toks
    order = np.random.default_rng(2).permutation(290)
    other = {t: int(order[i]) for t, i in {**new.vocab, **new.special_tokens}.items()}
    del other['<|pad|>']                                     # is drawn, by place
    a, _ = transplant_embeddings(rows_for(old), old, new)
    b, _ = transplant_embeddings(rows_for(old), old, other, size=290)
    kept = [i for t, i in {**new.vocab, **new.special_tokens}.items() if t != '<|pad|>']
    assert np.array_equal(b[order[kept]], a[kept])


def test_special_tokens_go_by_name_and_are_never_spelled(toks:tuple) -> None:
    old, new = {b'a': 0, b'b': 1, b'ab': 2, '<x>': 3}, {'ab': 0, b'<x>': 1, '<x>': 2, '<y>': 3}
    assert token_sources(old, new) == [[], [], [3], []]
    assert token_sources({b'a': 0, 'x': 1}, {'xx': 0, 'x': 1}) == [[], [1]]


def test_holes_and_padding_are_drawn() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4))
    got, report = transplant_embeddings(rows, {b'a': 0, b'b': 1}, {b'b': 0, b'a': 2}, size=5)
    assert report == dict(copied=2, averaged=0, drawn=3)
    assert np.array_equal(got[[0, 2]], rows[[1, 0]]) and np.isfinite(got).all()
    again = transplant_embeddings(rows, {b'a': 0, b'b': 1}, {b'b': 0, b'a': 2}, size=5)[0]
    assert np.array_equal(got, again)
    other = transplant_embeddings(rows, {b'a': 0, b'b': 1}, {b'b': 0, b'a': 2}, size=5, seed=1)[0]
    assert not np.array_equal(got[1], other[1]) and np.array_equal(got[0], other[0])


def test_drawn_rows_have_the_moments_of_the_old_ones() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(500, 5)) @ rng.normal(size=(5, 5)) + 3
    got = fill_rows(rows, [[]] * 200_000)
    assert np.abs(got.mean(0) - rows.mean(0)).max() < .05
    assert np.abs(np.cov(got.T) - np.cov(rows.T, bias=True)).max() < .02 * rows.var(0).max()
    half = fill_rows(rows, [[]] * 200_000, spread=.5)
    assert np.allclose(half.std(0) / got.std(0), .5, atol=.01)
    assert np.allclose(fill_rows(rows, [[]], spread=0), rows.mean(0))
    assert np.allclose(fill_rows(rows[:1], [[], []]), rows[0])      # one row has no spread


def test_pieces_are_those_of_encode_on_random_words(toks:tuple) -> None:
    rng, tok = random.Random(0), toks[1]
    ranks = {a + b: k for k, (a, b) in enumerate(tok.merges)}
    for _ in range(500):
        word = ''.join(rng.choices('thecasmon日', k=rng.randrange(1, 12)))
        want = [tok.decode_bytes([i]) for i in tok.encode(word)]
        assert byte_pieces(word.encode(), ranks) == want, word


@pytest.mark.parametrize('call, says', [
    (lambda r: transplant_embeddings(r, {}, {b'a': 0}), 'the old vocabulary is empty'),
    (lambda r: transplant_embeddings(r, {b'a': 0}, {}), 'the new vocabulary is empty'),
    (lambda r: transplant_embeddings(r[:2], {b'a': 2}, {b'a': 0}), 'has id 2, the matrix 2 rows'),
    (lambda r: transplant_embeddings(r, {b'a': 0, b'b': 0}, {b'a': 0}), 'gives id 0 to 2 tokens'),
    (lambda r: transplant_embeddings(r, {b'a': -1}, {b'a': 0}), "gives b'a' the id -1"),
    (lambda r: transplant_embeddings(r, {b'a': 0}, {b'a': 4}, size=4), 'size 4 is below 5'),
    (lambda r: fill_rows(r[0], [[0]]), r'floats \(V, C\), got float64 \(4,\)'),
    (lambda r: fill_rows(r.astype(int), [[0]]), r'got int64 \(3, 4\)'),
    (lambda r: fill_rows(r[:0], [[]]), r'got float64 \(0, 4\)'),
    (lambda r: fill_rows(r, [[0, -1]]), 'sources name id -1, rows are 3'),
])
def test_bad_input_is_refused_in_one_sentence(call:Callable, says:str) -> None:
    with pytest.raises(ValueError, match=says): call(np.ones((3, 4)))


def test_gpt2_in_pieces_of_its_own_first_tokens(shared:Path) -> None:
    "Ids are ranks there: the first 5,000 tokens keep their rows, and the others are their pieces"
    path = shared/'gpt2-vocab'/'gpt2_vocab.json'
    if not path.is_file(): pytest.skip(f'{path.name} is not here')
    names = {name: b for b, name in BYTE_NAMES.items()}
    entries = json.loads(path.read_text(encoding='utf-8')).items()
    vocab = {bytes(names[c] for c in t): i for t, i in entries if t != '<|endoftext|>'}
    small = {t: i for t, i in vocab.items() if i < 5000}
    sources = token_sources(small, vocab)
    by_id = {i: t for t, i in vocab.items()}
    for i in range(0, 50_000, 97):
        assert b''.join(by_id[j] for j in sources[i]) == by_id[i]
        assert (sources[i] == [i]) == (i < 5000)
