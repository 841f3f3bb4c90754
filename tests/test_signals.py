"""Quality signals against values of RedPajama's own code, which lie beside a clone on some machines."""
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmnotes.data.signals import (
    GOPHER,
    SIGNALS,
    STOP_WORDS,
    Importance,
    broken_rules,
    compute_signals,
    feature_counts,
    signals_of_batch,
    string_hash,
)

PIECES = ['a', 'b', 'the', 'The', 'na', 'É', 'İ', 'Σ', 'ΑΣ', 'ǅ', 'ᾳ', '½', '五', '١', '𝔘', '한글', 'क्षि',
          '\u0301', '\ud800', '\udc00', '\0', '\x1c', '\x1f', '\x0b', '\x85', '\xa0', '\u2028', '\u3000', '\r',
          '\n', '\n', '\n', ' ', ' ', ' ', '\t', '.', '...', '…', '!', '?', '”', '"', '#', '{', '_', '-', "'",
          '•', '–', 'javascript', 'JavaScript', 'lorem ipsum', 'dolorem ipsum', 'ass', 'blow job', '≠', 'ſ',
          '23', 'ﬁ', '\u200d', 'ª', 'Å', 'Ⅷ', '\u00ad', '·', ':']
SAME: dict[str, Any] = dict(stop_words={'the', 'a', '...', "a's"}, bad_words={'ass', 'blow job', 'a a', ' b'},
                            domain='x.org', blocklist={'x.org': 3})


def rows(path:Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


@pytest.fixture(scope='module')
def slow(root:Path) -> Any:
    "The notebook's version that can be read, which the library does not hold"
    cells = json.loads((root/'nbs/22_quality_signals.ipynb').read_text(encoding='utf-8'))['cells']
    cells = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    found: dict[str, Any] = {}
    exec('import math, re, regex\nfrom collections import Counter\n'
         'from fastcore.test import test_eq\nfrom llmnotes.data.dedup import normalise', found)
    for source in cells:
        if 'def slow_' in source: exec(source, found)
    return found['slow_signals']


def test_signals_of_edge_documents_equal_the_reference(shared:Path) -> None:
    "Values, their types and spans, `None` included, to the last digit; all 38 columns"
    golden, words = shared.parent/'facts'/'golden', shared/'stopwords-json'/'en.json'
    bad = shared/'badwords'/'en'
    if not (golden.is_dir() and words.is_file() and bad.is_file()): pytest.skip('the values are not here')
    want = {r['id']: r['quality_signals'] for r in rows(golden/'rp2_edge_expected.jsonl')}
    lists = dict(stop_words=set(json.loads(words.read_text(encoding='utf-8'))),
                 bad_words=set(bad.read_text(encoding='utf-8').splitlines()))
    for d in rows(golden/'rp2_edge_docs.jsonl'):
        have = compute_signals(d['text'], domain=d['domain'], blocklist={'example.com': 3}, **lists)
        expected = {k: [tuple(s) for s in v] for k, v in want[d['id']].items()}
        assert {k: have[k] for k in expected} == expected, d['id']
        assert all(type(a[2]) is type(b[2]) for k, v in expected.items()
                   for a, b in zip(have[k], v)), d['id']
        assert set(SIGNALS) - set(expected) == {k for k in SIGNALS if k.startswith('ccnet_')}
    assert len(SIGNALS) == 45


def test_fast_equals_slow_on_awkward_texts(slow:Any) -> None:
    rng = random.Random(0)
    for i in range(3000):
        some = rng.sample(PIECES, rng.randint(1, 8)) if i % 2 else PIECES
        text = ''.join(rng.choices(some, k=rng.randint(0, 60)))
        if i % 5 == 0: text = ''.join(chr(rng.choice([rng.randrange(0x3000), rng.randrange(0x110000)]))
                                      for _ in range(rng.randint(0, 40)))
        ours, want = compute_signals(text, **SAME), slow(text, **SAME)
        assert {k: ours[k] for k in want} == want, text
        assert json.loads(json.dumps(ours)).keys() == ours.keys()             # plain numbers


def test_every_character_is_described_as_python_and_regex_have_it(slow:Any) -> None:
    for first in range(0, 0x110000, 64):
        if first % 0x2000 and first > 0x3000: continue
        text = ' '.join(chr(c) + 'x' * (c % 2) for c in range(first, min(first + 64, 0x110000)))
        ours, want = compute_signals(text, **SAME), slow(text, **SAME)
        assert {k: ours[k] for k in want} == want, hex(first)


@pytest.mark.parametrize('name', ['stop_word_fraction', 'frac_chars_top_3gram', 'frac_chars_dupe_5grams'])
def test_fixed_shares_stay_within_one(name:str) -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = ' '.join(rng.choices(['a', 'b', 'cc', 'The'], k=rng.randint(0, 40)))
        plain, fixed = (compute_signals(text, fixed=x, **SAME)[f'rps_doc_{name}'][0][2] for x in (False, True))
        assert 0 <= fixed <= 1
        if name == 'frac_chars_dupe_5grams': assert fixed <= plain


def test_fixed_duplicates_by_hand() -> None:
    "A word counts if a run of five around it has been seen before"
    rng = random.Random(2)
    for _ in range(200):
        words = rng.choices('ab' if rng.random() < .5 else 'abcd', k=rng.randint(0, 30))
        seen: set[tuple[str, ...]] = set()
        marked: set[int] = set()
        for i in range(len(words) - 4):
            run = tuple(words[i:i + 5])
            if run in seen: marked |= set(range(i, i + 5))
            seen.add(run)
        have = compute_signals(' '.join(words), fixed=True, **SAME)['rps_doc_frac_chars_dupe_5grams']
        assert have[0][2] == round(len(marked) / max(1, len(words)), 8)


def test_hash_is_pythons_under_any_seed() -> None:
    words = ['', 'the', 'The', 'naïve', '中文', '𝔘x', '#', *('x' * n for n in range(1, 40)), 'y' * 300, 'é' * 255]
    code = 'import json, sys; w = json.load(sys.stdin); print(json.dumps([hash(x) for x in w]))'
    for seed in (0, 1, 42):
        done = subprocess.run([sys.executable, '-c', code], input=json.dumps(words), text=True, check=True,
                              capture_output=True, env=os.environ | dict(PYTHONHASHSEED=str(seed)))
        assert [string_hash(w, seed) for w in words] == json.loads(done.stdout), seed
    assert abs(string_hash('the')) % 10_000 == 2820                           # RedPajama-v2's bucket
    assert feature_counts(['the'] * 3).sum() == 5 and feature_counts([]).sum() == 0


def test_importance_equals_its_formula() -> None:
    stats = pytest.importorskip('scipy.stats')
    rng = np.random.default_rng(0)
    target, source = rng.integers(0, 50, (2, 64))
    text = 'The cat and the dog.'
    words = ['The', 'cat', 'and', 'the', 'dog', '.']
    f = np.zeros(64)
    for h in map(string_hash, words): f[abs(h) % 64] += 1
    pairs = feature_counts(words, 64) - f
    assert pairs.sum() == 5 and pairs.min() >= 0
    x = (feature_counts(words, 64) * (np.log(target / target.sum() + 1e-8)
                                      - np.log(source / source.sum() + 1e-8))).sum()
    by = np.log(stats.poisson.pmf(20, 12.5) + 1e-8) - np.log(stats.poisson.pmf(20, 30) + 1e-8)
    model = Importance(target, source, 12.5, 30.)
    have = compute_signals(text, importance={'books': model}, **SAME)
    assert math.isclose(have['rps_doc_books_importance'][0][2], x, abs_tol=1e-7)
    assert math.isclose(have['rps_doc_books_importance_length_correction'][0][2], x + by, abs_tol=1e-7)
    logs = stats.poisson.logpmf(6, 12.5) - stats.poisson.logpmf(6, 30)
    assert math.isclose(model.correction(6, 20, fixed=True), logs, abs_tol=1e-9)
    assert compute_signals('', importance={'books': model}, **SAME)['rps_doc_books_importance'] == [(0, 0, None)]


def test_classifier_sees_one_line() -> None:
    said = []
    def classify(text:str) -> tuple[str, float]: return said.append(text) or '__label__wiki', .75
    have = compute_signals(' a\nb\r\nc ', classifiers={'palm': classify}, **SAME)
    assert said == ['a b c'] and have['rps_doc_ml_palm_score'] == [(0, 8, .75)]
    assert compute_signals('', classifiers={'palm': classify}, **SAME)['rps_doc_ml_palm_score'][0][2] is None
    assert said == ['a b c']
    have = compute_signals('x', classifiers={'palm': lambda text: ('__label__cc', .75)}, **SAME)
    assert have['rps_doc_ml_palm_score'] == [(0, 1, .25)]


def test_batches_fit_datasets() -> None:
    datasets = pytest.importorskip('datasets')
    data = datasets.Dataset.from_dict({'text': ['One. Two\nThree.', '', 'x'], 'host': ['a.org', None, 'b.org']})
    lists = dict(stop_words=STOP_WORDS['en'], blocklist={'a.org': 4})
    out = data.map(lambda b: signals_of_batch(b, domain_column='host', **lists), batched=True, batch_size=2)
    assert out['rps_doc_ut1_blacklist'][:] == [[[0, 15, 4]], [[0, 0, None]], [[0, 1, None]]]
    assert out['rps_lines_num_words'][0] == [[0, 9, 2], [9, 15, 1]]
    with pytest.raises(ValueError, match="no column 'host', only text"):
        signals_of_batch({'text': []}, domain_column='host')


def test_ten_megabytes_in_one_line_take_linear_time() -> None:
    took = []
    for n in (20_000, 325_000):
        text = 'one two, three four; five six! ' * n
        start = time.process_time()
        value = compute_signals(text, **SAME)
        took.append(time.process_time() - start)
    assert value['rps_doc_frac_chars_dupe_10grams'][0][2] == 1 and took[1] < 60 * took[0], took


@pytest.mark.parametrize('text', [None, b'bytes', 3, ['a']])
def test_what_is_no_text_is_refused(text:Any) -> None:
    with pytest.raises(ValueError, match=f'of {type(text).__name__}, and not a str'): compute_signals(text)


def test_stop_words_come_from_a_package_or_a_sentence(monkeypatch:pytest.MonkeyPatch, shared:Path) -> None:
    iso = pytest.importorskip('stopwordsiso')
    for path in (shared/'stopwords-json').glob('*.json'):
        own = set(json.loads(path.read_text(encoding='utf-8')))
        assert len(own - iso.stopwords(path.stem)) <= .03 * len(own), path.stem
    with pytest.raises(ValueError, match=r"language 'xx', only for af, ar, .*, zu; give stop_words"):
        compute_signals('a', language='xx')
    monkeypatch.setitem(sys.modules, 'stopwordsiso', None)
    with pytest.raises(ImportError, match=r"'sw' need stopwordsiso: pip install 'llmnotes\[data\]', or give"):
        compute_signals('a', language='sw')
    assert compute_signals('a', language='sw', stop_words={'a'})['rps_doc_stop_word_fraction'] == [(0, 1, 1.)]


def test_gophers_bounds() -> None:
    bounds = {r.signal: r.high for r in GOPHER}
    assert [round(bounds[f'rps_doc_frac_chars_top_{k}gram'], 9) for k in (2, 3, 4)] == [.2, .18, .16]
    assert [round(bounds[f'rps_doc_frac_chars_dupe_{k}grams'], 9) for k in range(5, 11)] == [
        .15, .14, .13, .12, .11, .10]
    assert 'rps_doc_word_count' in broken_rules(compute_signals('Hash.', **SAME), GOPHER)
