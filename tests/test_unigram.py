"""Unigram against a real SentencePiece model and a real book, and properties that no notebook has room for."""
import math
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest

from llmnotes.tokenizers.bpe import train_bpe
from llmnotes.tokenizers.unigram import (UnigramTokenizer, bpe_dropout, fit_pieces, make_trie,
                                         nbest, sample, seed_pieces, train_unigram,
                                         train_wordpiece, viterbi, wordpiece)

spm = pytest.importorskip('sentencepiece')
BOOK = ['It was a bright cold day, and the clocks were striking thirteen.',
        'The clock in the hall strikes; the strikers stroll into the bright hall.'] * 9


@pytest.fixture(scope='module')
def folder(shared:Path) -> Path:
    path = shared/'sentencepiece'
    if not path.is_dir(): pytest.skip('the SentencePiece model is not here')
    return path


@pytest.fixture(scope='module')
def lines(folder:Path) -> list[str]:
    return (folder/'botchan.txt').read_text(encoding='utf-8').splitlines()


@pytest.fixture(scope='module')
def theirs(folder:Path) -> 'spm.SentencePieceProcessor':
    return spm.SentencePieceProcessor(model_file=str(folder/'test_model.model'))


@pytest.fixture(scope='module')
def ours(folder:Path) -> UnigramTokenizer:
    return UnigramTokenizer.from_sentencepiece(folder/'test_model.model')


@pytest.fixture(scope='module')
def small() -> UnigramTokenizer: return train_unigram(BOOK, 340)


def test_the_book_is_cut_as_sentencepiece_cuts_it(ours, theirs, lines) -> None:
    "Every line, ids and text, with the pieces and scores of its file"
    assert len(lines) > 4000
    assert ours.encode_batch(lines) == theirs.encode(lines)
    assert [ours.decode(i) for i in ours.encode_batch(lines)] == theirs.decode(theirs.encode(lines))


def test_the_best_segmentations_have_its_scores(ours, theirs, lines) -> None:
    for line in [line for line in lines if line.strip()][:200]:
        want = [f.score for f in theirs.nbest_encode(line, nbest_size=4, out_type='proto').nbests]
        assert [s for s, _ in ours.nbest(line, 4)] == pytest.approx(want, abs=2e-3)
    known = [line for line in lines if 0 not in ours.encode(line)][:200]
    for line in known: # the sum of the pieces is the score
        assert ours.log_prob(ours.encode(line)) == pytest.approx(ours.nbest(line, 1)[0][0])


def test_a_vocabulary_of_the_book(ours, lines, tmp_path:Path) -> None:
    "2,000 pieces: text comes back, fewer tokens than 1,000 pieces need, the file holds it all"
    tok = train_unigram(lines, 2000)
    assert tok.vocab_size == 2000
    text = '\n'.join(lines)
    ids = tok.encode_batch(lines)
    assert [tok.decode(i) for i in ids] == lines
    assert sum(map(len, ids)) < .95 * sum(map(len, ours.encode_batch(lines)))
    tok.save(tmp_path)
    again = UnigramTokenizer.from_file(tmp_path)
    assert again.encode(text) == tok.encode(text) == tok.pipeline.encode(text).ids
    for model in (tok, ours): # to the last digit, or ties would fall otherwise
        model.save(tmp_path)
        assert UnigramTokenizer.from_file(tmp_path).pieces == model.pieces


def test_likelihood_never_falls_between_prunings(lines) -> None:
    words = {}
    for line in lines[:1500]:
        for word in line.split(): words['▁' + word] = words.get('▁' + word, 0) + 1
    steps = [(len(p), nats) for p, nats in fit_pieces(words, 500, steps=4)]
    same = [(a, b) for (n, a), (m, b) in pairwise(steps) if n == m]
    assert len(same) > 20 and all(b > a - 1e-3 for a, b in same)
    assert sum(b > a + 1 for a, b in same) > 10, 'nothing was learnt'


def test_any_text_comes_back(small:UnigramTokenizer, tmp_path:Path) -> None:
    rng = random.Random(1)
    texts = ['', ' ', '  x', '\0', 'a\0b', '\ufffd', '<unk></s><0x41>', 'e\u0301', '𝔘', '\r\n\t']
    texts += [rng.randbytes(rng.randrange(40)).decode(errors='replace') for _ in range(300)]
    texts += [''.join(rng.choices(' abct\n▁é日', k=rng.randrange(30))) for _ in range(300)]
    for text in texts:
        want = text.replace('▁', ' ')
        assert small.decode(small.encode(text)) == want
        assert small.decode(small.sample(text, .2, rng)) == want
        if text: assert small.nbest(text, 2)[0][1] == small.encode(text)
        if '<' not in text: assert small.encode(text) == small.pipeline.encode(text).ids
        assert min(small.encode(text), default=3) > 2, 'a special token was smuggled in'


def test_unknown_without_bytes() -> None:
    tok = train_unigram(BOOK, 80, byte_fallback=False)
    ids = tok.encode('the日本日clock')
    assert ids.count(tok.unk_id) == 1 and ids == tok.pipeline.encode('the日本日clock').ids
    assert tok.decode(ids) == 'the ⁇ clock'
    assert tok.log_prob([tok.unk_id]) == tok.unk_score < min(s for _, s in tok.pieces)


def test_space_is_at_the_beginning_of_a_piece_only() -> None:
    found = seed_pieces({'▁▁▁ab▁▁ab': 5, '▁ab': 2}, 99)
    assert found['▁'] == 27 and found['▁ab'] == 12 and found['ab'] == 12
    assert not [p for p in found if '▁' in p[1:]]


def test_long_strings_take_linear_time(small:UnigramTokenizer) -> None:
    "Eight times the text takes about eight times as long: quadratic would be 64"
    bpe = train_bpe(BOOK, 300)
    rng = random.Random(1)
    jobs = {'encode': small.encode, 'sample': lambda t: small.sample(t, .5, rng),
            'dropout': bpe_dropout(bpe, .1, rng), 'train': lambda t: train_unigram([t], 300)}
    for name, job in jobs.items():
        took = []
        for n in (2000, 16_000):
            text = ''.join(rng.choices('abc', k=n))
            start = time.process_time(); job(text)
            took.append(time.process_time() - start)
        assert took[1] < 30 * took[0] + .05, (name, took)


def test_equal_scores_take_the_longer_last_piece() -> None:
    trie = make_trie({'a': -1., 'aa': -2., 'aaa': -3.})
    assert viterbi('aaaa', trie) == (-4., ['a', 'aaa'])
    assert viterbi('b', trie) == (-math.inf, ['b'])
    assert viterbi('ab', make_trie({'ab': -9., 'b': -1.}), -2.) == (-3., ['a', 'b'])
    assert len(nbest('aaaa', trie, 99)) == 7 and nbest('', trie, 3) == [(0., [])]
    assert sample('', trie, 1., random.Random(1)) == []


def test_wordpiece_names_a_piece_once() -> None:
    "abc can be made of ab + ##c and of a + ##bc; it is one piece"
    words = {'abc': 50, 'ab': 40, 'xbc': 40, 'aab': 3, 'bcb': 9, 'abcabc': 5, 'cab': 7}
    for score in ('gain', 'ratio'):
        names = train_wordpiece(words, 40, score=score)
        assert len(set(names)) == len(names)
        assert all(wordpiece(w, set(names)) != ['[UNK]'] for w in words)
    assert wordpiece('a' * 101, {'a', '##a'}) == ['[UNK]']
    assert len(wordpiece('a' * 100, {'a', '##a'})) == 100


def test_bad_input_is_refused_in_one_sentence(small, folder:Path, tmp_path:Path) -> None:
    model = (folder/'test_model.model').read_bytes()
    (tmp_path/'empty.model').write_bytes(b'')
    (tmp_path/'text.model').write_text('no model at all')
    for n in (10, 1000, len(model) // 2, len(model) - 3):
        (tmp_path/f'{n}.model').write_bytes(model[:n])
    for path in sorted(tmp_path.glob('*.model')):
        with pytest.raises(ValueError, match='is no whole SentencePiece model'):
            UnigramTokenizer.from_sentencepiece(path)
    for name, text in [('a', ''), ('b', '[]'), ('c', '{"model": {"type": "Unigram"}}')]:
        (tmp_path/f'{name}.json').write_text(text)
        with pytest.raises(ValueError, match='is no whole Unigram tokenizer.json'):
            UnigramTokenizer.from_file(tmp_path/f'{name}.json')
    with pytest.raises(FileNotFoundError): UnigramTokenizer.from_file(tmp_path/'none.json')
    for call, said in [(lambda: small.decode([340]), 'id 340 is outside the vocabulary of 340'),
                       (lambda: small.encode('a\udc00'), 'lone surrogate U\\+DC00 at position 1'),
                       (lambda: small.nbest('a', 0), 'n must be at least 1'),
                       (lambda: small.sample('a', math.nan, random.Random()), 'alpha must be'),
                       (lambda: train_unigram(['', ''], 300), 'texts hold no characters'),
                       (lambda: train_unigram(BOOK, 261), 'vocab_size 261 is below'),
                       (lambda: train_wordpiece({}, 30), 'words hold no characters')]:
        with pytest.raises(ValueError, match=said): call()
