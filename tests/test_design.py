"""Choices of a tokenizer: real lists of characters, parallel text, and what must hold for any input."""
import io
import json
import math
import random
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers

from llmnotes.tokenizers.bpe import GPT2_PATTERN, BPETokenizer, split_words, train_bpe
from llmnotes.tokenizers.design import (
    FimTokens, character_merges, codec_characters, control_tokens, embedding_share,
    exemplar_characters, fallback_rate, fim_inverse, fim_join, fim_transform, make_pattern,
    parity_premium, renyi_efficiency, required_coverage, space_merges, take_reserved,
    temperature_sampling, token_statistics, train_with_merges, unimax)

FIM = FimTokens(prefix=1, middle=2, suffix=3)
BYTES = BPETokenizer({bytes([b]): b for b in range(256)}, [])
LANGUAGES = {'English': 'eng', 'Spanish': 'spa', 'Russian': 'rus', 'Greek': 'ell_monotonic',
             'Arabic': 'arb', 'Hindi': 'hin', 'Thai': 'tha', 'Chinese': 'cmn_hans',
             'Japanese': 'jpn', 'Korean': 'kor', 'Vietnamese': 'vie', 'Turkish': 'tur'}


@pytest.fixture(scope='module')
def udhr(shared:Path) -> dict[str, str]:
    "The whole declaration in twelve languages"
    data = zipfile.ZipFile(io.BytesIO((shared/'nltk-corpora/udhr2.zip').read_bytes()))
    return {k: data.read(f'udhr2/{f}.txt').decode() for k, f in LANGUAGES.items()}


@pytest.fixture(scope='module')
def english(shared:Path) -> str:
    return (shared/'gutenberg/alice.txt').read_text(encoding='utf-8')


def fast(tok:BPETokenizer, folder:Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tok.save(folder/'tokenizer.json')))


def wild(rng:random.Random, n:int=40, last:int=0x3000) -> str: # any characters, no surrogates
    return ''.join(chr(c) for c in rng.choices(range(last), k=n) if c >> 11 != 27)


# Required characters

def test_lists_of_the_codecs_are_those_of_the_standards(shared:Path) -> None:
    "Most of the 3,500 common hanzi and of the Jōyō kanji are in the first levels"
    hanzi = codec_characters('gb2312', 0xb0, 0xd7)
    kanji = codec_characters('euc_jp', 0xb0, 0xcf)
    assert (len(hanzi), len(set(hanzi)), len(kanji)) == (3755, 3755, 2965)
    assert hanzi[0] == '啊' and kanji[0] == '亜'
    common = (shared/'hanzi/level-1.txt').read_text(encoding='utf-8').split()
    jouyou = (shared/'kanji/jouyou.txt').read_text(encoding='utf-8').split()
    assert (len(common), len(jouyou)) == (3500, 2136)
    assert len({*common} & {*hanzi}) > .96 * 3500 and len({*jouyou} & {*kanji}) > .9 * 2136
    hebrew = {*map(chr, range(0x5d0, 0x5eb))}
    assert hebrew <= {*codec_characters('iso8859_8')} and len(codec_characters('iso8859_8')) < 30


def test_every_exemplar_set_is_read(shared:Path) -> None:
    sets = json.loads((shared/'cldr-exemplars/exemplars.json').read_text(encoding='utf-8'))
    read = {k: exemplar_characters(v['exemplarCharacters']) for k, v in sets.items()}
    assert len(read) > 300 and all(len(c) == 1 for cs in read.values() for c in cs)
    assert read['en'] == [*'abcdefghijklmnopqrstuvwxyz']
    assert {*'äöüß'} <= {*read['de']} and not {*'[]{}\\ '} & {*''.join(read['de'])}
    assert {*'абвя'} <= {*read['ru']} and len(read['ko']) > 2000
    assert exemplar_characters(r'[a \- \[ {ab\u0301}]') == ['a', '-', '[', 'b', '\u0301']
    assert exemplar_characters('[a-e]') == [*'abcde'] and exemplar_characters('[]') == []


def test_what_is_required_is_one_token_everywhere(shared:Path, english:str, tmp_path:Path) -> None:
    "CLDR's exemplars of every language, common hanzi and kanji, forced into one vocabulary"
    sets = json.loads((shared/'cldr-exemplars/exemplars.json').read_text(encoding='utf-8'))
    wanted = {c for v in sets.values() for c in exemplar_characters(v['exemplarCharacters'])}
    for name in ('hanzi/level-1.txt', 'kanji/jouyou.txt'):
        wanted |= {*(shared/name).read_text(encoding='utf-8').split()}
    wanted = sorted(c for c in wanted if not 0xd800 <= ord(c) < 0xe000)
    head = character_merges(wanted)
    size = 256 + len({a + b for a, b in head}) + 500
    tok = train_with_merges([english[:50_000]], size, head, special_tokens=['<|endoftext|>'])
    assert tok.vocab_size == size
    found = required_coverage(tok, wanted)
    assert len(found['one']) == len(wanted) > 10_000
    plain = required_coverage(train_bpe([english[:50_000]], 756), wanted)
    assert len(plain['bytes']) > .95 * len(wanted) and not plain['lost']
    rng, theirs = random.Random(1), fast(tok, tmp_path)
    for _ in range(200): # and inside any text, one token or a part of one, never split
        text = ''.join(rng.choices(wanted, k=30))
        assert tok.encode(text) == theirs.encode(text).ids and fallback_rate(tok, text) == 0
    assert tok.encode(english) == theirs.encode(english).ids


def test_given_merges_change_nothing_else(english:str) -> None:
    text = [english[:60_000]]
    plain = train_bpe(text, 600, special_tokens=['<a>'])
    bare = train_with_merges(text, 600, [], special_tokens=['<a>'])
    assert (bare.vocab, bare.merges) == (plain.vocab, plain.merges)
    head = character_merges('日本語')
    more = train_with_merges(text, 600 + len({a + b for a, b in head}), head,
                             special_tokens=['<a>'])
    assert more.merges[len(head):] == plain.merges, 'characters of other scripts cost no merge'


def test_runs_of_spaces(tmp_path:Path) -> None:
    for longest in range(2, 40):
        tok = train_with_merges(['x'], 256 + longest - 1, space_merges(longest), pattern=r'[\s\S]+')
        n_tokens = [len(tok.encode(' ' * n)) for n in range(1, longest + 1)]
        assert n_tokens == [1] * longest, longest
    tok = train_with_merges(['x y'], 272, space_merges(), pattern=r'[\s\S]+')
    theirs = fast(tok, tmp_path)
    for n in range(70):
        text = 'a' + ' ' * n + 'b'
        assert tok.encode(text) == theirs.encode(text).ids
        assert len(tok.encode(text)) == 2 + -(-n // 16)
    with pytest.raises(ValueError, match='longest 1 is no run'): space_merges(1)


def test_fallback_rate_counts_characters() -> None:
    assert fallback_rate(BYTES, 'aé日👍') == .75 and fallback_rate(BYTES, 'abc') == 0
    tok = train_with_merges(['x'], 256 + 3, character_merges('é日'))
    assert tok.vocab_size == 259 and fallback_rate(tok, 'é日月') == pytest.approx(1 / 3)
    joined = BPETokenizer(BYTES.vocab | {b'a\xc3': 256}, [(b'a', b'\xc3')])
    assert fallback_rate(joined, 'aé') == .5, 'a token that ends inside a character splits it'
    with pytest.raises(ValueError, match='text is empty'): fallback_rate(BYTES, '')


def test_kinds_of_coverage(tmp_path:Path) -> None:
    two = BPETokenizer(BYTES.vocab | {b'\xe6\x97': 256}, [(b'\xe6', b'\x97')])
    kinds = dict(one=['a'], several=['日'], bytes=['é', '月'], lost=[])
    assert required_coverage(two, 'a日é月') == kinds == required_coverage(fast(two, tmp_path), 'a日é月')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, '?': 1}, unk_token='?'))
    assert required_coverage(words, 'aé') == dict(one=['a'], several=[], bytes=[], lost=['é'])


# Patterns

def test_every_pattern_covers_every_character_as_tokenizers_does() -> None:
    rng = random.Random(0)
    old = unicodedata.ucd_3_2_0 # characters that every engine knows
    known = [chr(c) for c in range(0x110000) if old.category(chr(c)) not in ('Cn', 'Cs', 'Co')]
    texts = [''.join(rng.choices(known, k=50)) for _ in range(60)] + [
        ''.join(rng.choices(' \n\t\ra1é\'s-.{ि\u0301', k=40)) for _ in range(200)]
    for digits in ('any', 'up to three', 'single'):
        for punctuation in ('runs', 'single'):
            for marks in ('apart', 'in words'):
                pattern = make_pattern(digits=digits, punctuation=punctuation, marks=marks)
                split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
                for text in texts:
                    words = split_words(text, pattern)
                    assert words == [w for w, _ in split.pre_tokenize_str(text)]
    assert make_pattern() == GPT2_PATTERN
    for _ in range(200): split_words(wild(rng, last=0x110000), pattern) # raises if one is lost


def test_patterns_do_what_they_say() -> None:
    text = 'ab 12345 !?;; हिन्दी'
    cut = {k: split_words(text, make_pattern(**v)) for k, v in {
        'digits': dict(digits='single'), 'three': dict(digits='up to three'),
        'signs': dict(punctuation='single'), 'marks': dict(marks='in words')}.items()}
    assert cut['digits'] == ['ab', ' ', '1', '2', '3', '4', '5', ' !?;;'] + cut['digits'][8:]
    assert cut['three'][2:4] == ['123', '45'] and cut['signs'][2:6] == [' !', '?', ';', ';']
    assert cut['marks'] == ['ab', ' 12345', ' !?;;', ' हिन्दी'] and len(cut['three']) > 8
    for bad in (dict(digits='two'), dict(punctuation='none'), dict(marks='')):
        with pytest.raises(ValueError, match='is not one of'): make_pattern(**bad)


def test_marks_in_words_shorten_real_hindi(udhr:dict[str, str]) -> None:
    "Trained on half of the declaration, read on the other"
    half = len(udhr['Hindi']) // 2
    tokens = {m: len(train_bpe([udhr['Hindi'][:half]], 600, pattern=make_pattern(marks=m)
                               ).encode(udhr['Hindi'][half:])) for m in ('apart', 'in words')}
    assert tokens['in words'] < .85 * tokens['apart']


# Control tokens

def test_control_tokens_never_come_from_text() -> None:
    tok = train_bpe(['some text'] * 3, 465, special_tokens=control_tokens())
    assert len(control_tokens()) == 205 == len({*control_tokens()})
    rng, names = random.Random(0), list(tok.special_tokens)
    for _ in range(100):
        text = wild(rng, 5).join(rng.choices(names, k=4))
        ids = tok.encode(text)
        assert not {*ids} & {*tok.special_tokens.values()} and tok.decode(ids) == text


def test_reserved_tokens_are_used_up_in_order() -> None:
    tok = train_bpe(['ab'] * 2, 263, special_tokens=control_tokens(['<|a|>', '<|b|>'], 4))
    ids = dict(tok.special_tokens)
    for k in range(4):
        tok = take_reserved(tok, f'<|new_{k}|>')
        assert tok.special_tokens[f'<|new_{k}|>'] == ids[f'<|reserved_{k}|>']
    assert tok.special_tokens['<|a|>'] == ids['<|a|>'] and tok.vocab_size == 263
    with pytest.raises(ValueError, match='no reserved token is left'): take_reserved(tok, '<|x|>')
    with pytest.raises(ValueError, match='already'): take_reserved(tok, '<|a|>')
    with pytest.raises(ValueError, match='n_reserved -1'): control_tokens([], -1)


@pytest.mark.parametrize('mode', ['psm', 'spm', 'either'])
def test_fim_comes_back(mode:str) -> None:
    rng = random.Random(3)
    for _ in range(3000):
        doc = rng.choices(range(10, 20), k=rng.randrange(30))
        out = fim_transform(doc, rng, mode, specials=FIM, rate=.8)
        assert fim_inverse(out, FIM) == doc
        assert sorted(out) == sorted(doc + [*FIM] * (len(out) != len(doc)))
        assert len(doc) > 1 or out == doc


def test_fim_orders_and_rates() -> None:
    assert fim_join([10], [11], [12], FIM) == [1, 10, 3, 12, 2, 11]
    assert fim_join([10], [11], [12], FIM, 'spm') == [1, 3, 12, 2, 10, 11]
    rng, doc = random.Random(0), list(range(10, 60))
    outs = [fim_transform(doc, rng, 'either', specials=FIM, rate=.5) for _ in range(4000)]
    moved = [o for o in outs if o != doc]
    assert .46 < len(moved) / 4000 < .54, 'half of them are transformed'
    assert .44 < sum(o[1] == 3 for o in moved) / len(moved) < .58, 'half of these in each order'
    lengths = [len(o) - o.index(2) - 1 for o in moved if o[1] != 3]
    assert 14 < np.mean(lengths) < 20, 'the middle is a third on average'
    assert fim_transform(doc, rng, specials=FIM, rate=0) == doc
    cuts = [tuple(fim_transform([10, 11], rng, specials=FIM)) for _ in range(900)]
    assert (1, 3, 2, 10, 11) in cuts and (1, 10, 11, 3, 2) in cuts, 'both ends can be cut at'
    assert .28 < sum(c[-1] == 2 for c in cuts) / 900 < .39, 'a third has an empty middle'


@pytest.mark.parametrize('ids', [[1, 10, 3, 11], [1, 3, 2, 1], [3, 1, 2], [10, 1, 3, 2],
                                 [1, 2, 3], [1, 3, 2, 2]])
def test_broken_fim_is_refused(ids:list[int]) -> None:
    with pytest.raises(ValueError, match='are not prefix, suffix, middle'): fim_inverse(ids, FIM)


def test_fim_refuses() -> None:
    rng = random.Random(0)
    for bad in (dict(rate=1.5), dict(rate=math.nan), dict(mode='ps')):
        with pytest.raises(ValueError, match='rate|mode'):
            fim_transform([10, 11], rng, specials=FIM, **bad)
    with pytest.raises(ValueError, match=r'holds the control tokens \[2\]'):
        fim_transform([10, 2], rng, specials=FIM)


# Shares of languages

def test_golden_shares() -> None:
    n = [1000, 10, 100] # not in order
    np.testing.assert_allclose(temperature_sampling(n, .3), [.57065383, .14334176, .28600441],
                               atol=1e-8)
    assert unimax(n, 300, 1).amounts == [190, 10, 100]
    assert unimax(n, 300, 4).amounts == [130, 40, 130] and unimax(n, 300, 4).epochs[1] == 4
    np.testing.assert_allclose(unimax(n, 300, 1).shares, [.63333333, .03333333, .33333333], 1e-6)
    with pytest.warns(UserWarning, match='3,890 of the budget 5,000 is unspent'):
        assert unimax(n, 5000).unspent == 3890
    with warnings.catch_warnings(action='error'): assert unimax(n, 1110).unspent == 0


def test_unimax_for_any_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        n = rng.lognormal(2, 3, rng.integers(1, 12))
        budget, N = float(rng.lognormal(4, 3)), float(rng.uniform(.1, 9))
        with warnings.catch_warnings(action='ignore'): u = unimax(n.tolist(), budget, N)
        assert sum(u.amounts) + u.unspent == pytest.approx(budget)
        assert (np.array(u.amounts) <= N * n * (1 + 1e-9)).all() and u.unspent >= 0
        assert sum(u.shares) == pytest.approx(1)
        if N * n.min() * len(n) > budget * (1 + 1e-9):
            np.testing.assert_allclose(u.shares, 1 / len(n), rtol=1e-9)
        level = min(max(u.amounts), budget) # water filling: everybody is at the cap or the level
        capped = np.isclose(u.amounts, N * n, rtol=1e-9)
        assert capped.all() or np.allclose(np.array(u.amounts)[~capped], level, rtol=1e-9)
    p = temperature_sampling([1e-300, 1e300], 2.)
    assert p == [0, 1] and temperature_sampling([5], 0) == [1]


@pytest.mark.parametrize('sizes', [[], [0], [1, -1], [1, math.nan], [math.inf], [[1, 2]]])
def test_sizes_that_mean_nothing(sizes:list) -> None:
    for f in (temperature_sampling, lambda s: unimax(s, 10)):
        with pytest.raises(ValueError, match='sizes'): f(sizes)


@pytest.mark.parametrize('x', [0, -1, math.nan, math.inf])
def test_budgets_that_mean_nothing(x:float) -> None:
    with pytest.raises(ValueError, match='budget'): unimax([1, 2], x)
    with pytest.raises(ValueError, match='max_epochs'): unimax([1, 2], 1, x)
    if x != 0:
        with pytest.raises(ValueError, match='alpha'): temperature_sampling([1, 2], x)


def test_small_languages_gain_from_small_alpha(udhr:dict[str, str]) -> None:
    "Whole declarations: Greek has a fiftieth of the English text that is there"
    first, second = ({k: udhr[k][:len(udhr[k]) // 2] for k in udhr},
                     {k: udhr[k][len(udhr[k]) // 2:] for k in udhr})
    cost = []
    for alpha in (1, .3, 0):
        shares = temperature_sampling([50, 1], alpha)
        mix = [t for k, s in zip(('English', 'Greek'), shares) for t in [first[k]] * round(51 * s)]
        cost.append(len(train_bpe(mix, 900).encode(second['Greek'])))
    assert cost[0] > 1.15 * cost[1] and cost[1] >= .95 * cost[2]


# Numbers for a tokenizer

def test_renyi() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = rng.integers(0, 50, 20).tolist() + [1, 2]
        values = [renyi_efficiency(n, a) for a in (0, .5, 1, 2, 2.5, 9)]
        assert values == sorted(values, reverse=True) and values[0] == pytest.approx(1)
        assert renyi_efficiency(n, 1 + 1e-6) == pytest.approx(values[2], abs=1e-5)
        assert renyi_efficiency(n, vocab_size=1000) < values[4]
    assert renyi_efficiency([1, 0, 1], 2.5) == pytest.approx(1)
    for bad in ([], [3], [1, -1], [1, math.nan]):
        with pytest.raises(ValueError, match='no efficiency'): renyi_efficiency(bad)
    with pytest.raises(ValueError, match='alpha -1'): renyi_efficiency([1, 2], -1)


def test_statistics_of_other_libraries(english:str, tmp_path:Path) -> None:
    "The same text, counted through tiktoken's and tokenizers' own interfaces"
    tok = train_bpe([english], 1000)
    text = english[:5000]
    assert token_statistics(tok, [text]) == token_statistics(fast(tok, tmp_path), [text])
    ranked = tiktoken.Encoding('x', pat_str=tok.pattern, mergeable_ranks=tok.vocab,
                               special_tokens={})
    assert token_statistics(tok, [text]) == token_statistics(ranked, [text])
    s = token_statistics(BYTES, ['ab ab c'])
    assert (s['tokens'], s['bytes_per_token'], s['tokens_per_character']) == (7, 1, 1)
    with pytest.raises(ValueError, match='no words'): token_statistics(BYTES, [' '])


def test_premiums_of_whole_declarations(udhr:dict[str, str], english:str) -> None:
    "Required letters take back more than half of what is paid over English"
    code = codec_characters
    hindi = regex.findall(r'[\p{L}\p{M}]', ''.join(map(chr, range(0x900, 0x964))))
    letters = {*code('iso8859_5'), *code('iso8859_7'), *code('iso8859_6'), *code('tis_620'), *hindi}
    head = character_merges(sorted(letters))
    extra = len({a + b for a, b in head})
    plain, more = train_bpe([english], 2000), train_with_merges([english], 2000 + extra, head)
    before, after = parity_premium(plain, udhr), parity_premium(more, udhr)
    assert len(plain.encode(udhr['English'])) == len(more.encode(udhr['English']))
    for k in ('Thai', 'Hindi'): assert after[k] < .5 * before[k] and before[k] > 4
    for k in ('Russian', 'Greek', 'Arabic'): assert after[k] < .65 * before[k] and before[k] > 3
    for k in ('Chinese', 'Korean', 'Spanish'): assert after[k] == pytest.approx(before[k], rel=.05)
    with pytest.raises(ValueError, match="base 'German'"): parity_premium(plain, udhr, 'German')
    with pytest.raises(ValueError, match="'Latin'"):
        parity_premium(plain, {'English': 'x', 'Latin': ''})


def test_fertility_of_xquad(shared:Path) -> None:
    "The same questions in English and Spanish: each is cheaper with its own tokenizer"
    questions = {}
    for k, name in [('English', 'en'), ('Spanish', 'es')]:
        data = json.loads((shared/f'xquad/xquad.{name}.json').read_text(encoding='utf-8'))['data']
        questions[k] = [p['context'] for d in data for p in d['paragraphs']]
    half = len(questions['English']) // 2
    toks = {k: train_bpe(t[:half], 2000) for k, t in questions.items()}
    rest = {k: '\n'.join(t[half:]) for k, t in questions.items()}
    premium = {k: parity_premium(tok, rest)['Spanish'] for k, tok in toks.items()}
    assert premium['English'] > 1.4 > 1 > premium['Spanish']


def test_share_of_the_vocabulary() -> None:
    assert embedding_share(50_257, 768, 124_439_808, True) == pytest.approx(.3102, abs=1e-4)
    assert embedding_share(32_000, 4096, 6_738_415_616, False) == pytest.approx(.0389, abs=1e-4)
    for bad in ((100, 10, 999, True), (100, 10, 1999, False), (1, 1, math.nan, True)):
        with pytest.raises(ValueError, match='do not fit'): embedding_share(*bad)
    with pytest.raises(ValueError, match='must be positive'): embedding_share(0, 8, 100, True)
