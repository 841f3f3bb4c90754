"""Digests against exact ranks, measures against scikit-learn, and what bad input is told."""
import json

import numpy as np
import pytest

from llmnotes.data.quality import (ByteProxy, QualityClassifier, SignalNormaliser, TDigest, brier, calibration_error,
                                   choose_threshold, educational_points, fit_educational, fit_logistic, keep_above,
                                   permutation_importance, reliability, roc_auc, transformer_bits)
from llmnotes.data.signals import STOP_WORDS, compute_signals


def digest(x:np.ndarray, delta:int=400, batch:int=1000) -> TDigest:
    d = TDigest(delta)
    for i in range(0, len(x), batch): d.add(x[i:i + batch])
    return d


def exact(data:np.ndarray, x:np.ndarray) -> np.ndarray:
    data = np.sort(data)
    return (np.searchsorted(data, x) + np.searchsorted(data, x, 'right')) / (2 * len(data))


STREAMS = {
    'lognormal': lambda r, n: r.lognormal(0, 2, n),
    'zeros': lambda r, n: np.where(r.random(n) < .9, 0, r.lognormal(0, 1, n)),
    'both signs': lambda r, n: np.where(r.random(n) < .5, 0, r.normal(0, 1e-9, n)),
    'discrete': lambda r, n: r.poisson(40, n) / 7,
    'sorted': lambda r, n: np.sort(r.normal(0, 1, n)),
    'falling': lambda r, n: -np.sort(r.normal(0, 1, n)),
    'constant': lambda r, n: np.full(n, .3),
    'two far clusters': lambda r, n: r.normal(0, 1, n) + 1e12 * (r.random(n) < .3)}


@pytest.mark.parametrize('batch', [50, 7919])
@pytest.mark.parametrize('name', STREAMS)
def test_ranks_are_within_a_hundredth_and_sharper_in_the_tails(name:str, batch:int) -> None:
    data = STREAMS[name](np.random.default_rng(1), 30_000)
    whole = digest(data, batch=batch)
    parts = [digest(p, batch=batch) for p in np.array_split(data, 8)]
    at = np.unique(data)
    at = np.concatenate([at, at[:-1] / 2 + at[1:] / 2, [data.min() - 1, data.max() + 1]])
    true = exact(data, at)
    for d in (whole, parts[0].merge(*parts[1:]), TDigest.from_dict(json.loads(json.dumps(whole.to_dict())))):
        gap = abs(d.cdf(at) - true)
        assert d.n == len(data) and len(d.knots()[0]) <= 401
        assert gap.max() < .01 and gap[(true < .01) | (true > .99)].max() < .001
        assert (np.diff(d.cdf(np.sort(at))) >= 0).all()


def test_few_values_are_exact() -> None:
    r = np.random.default_rng(2)
    data = r.integers(0, 300, 50_000).astype(float)
    d, at = digest(data), np.arange(-1, 301) / 1.
    assert np.allclose(d.cdf(at), exact(data, at), atol=1e-12) and d.resolution == 0
    q = np.arange(129) / 128
    assert np.array_equal(d.quantile(q), np.quantile(data, q, method='inverted_cdf'))
    parts = [digest(p) for p in np.array_split(data, 5)]
    assert np.array_equal(parts[0].merge(*parts[1:]).cdf(at), d.cdf(at))


def test_heavy_atoms_stay_exact_in_a_slope() -> None:
    r = np.random.default_rng(3)
    data = r.permutation(np.concatenate([np.full(3000, .25), np.full(1000, .75), r.random(96_000)]))
    x, below, up_to = digest(data).knots()
    jump = dict(zip(x.tolist(), (up_to - below).tolist()))
    assert abs(jump[.25] - 3000) < 20 and abs(jump[.75] - 1000) < 20


def test_quantile_and_rank_are_each_other_s_inverse() -> None:
    d = digest(np.random.default_rng(4).normal(size=20_000))
    q = np.linspace(.001, .999, 500)
    assert np.allclose(d.cdf(d.quantile(q)), q, atol=1e-3)
    assert d.quantile(0) == d.knots()[0][0] and d.quantile(1) == d.knots()[0][-1]


def test_merging_does_not_depend_on_order_and_leaves_the_parts_alone() -> None:
    r = np.random.default_rng(5)
    a, b, c = (digest(r.normal(i, 1, 4000)) for i in range(3))
    b.add([np.nan, None])
    before = a.to_dict()
    m = a.merge(b, c)
    assert m.to_dict() == c.merge(a, b).to_dict() and a.to_dict() == before
    assert (m.n, m.missing) == (12_000, 2)
    assert TDigest().merge(a).n == a.n and TDigest().merge(TDigest()).n == 0
    m.add(np.zeros(50_000))                                        # goes on after merging
    assert m.n == 62_000 and abs(m.cdf(0.) - .5) < .1


def test_memory_is_bounded_and_adding_one_by_one_is_adding() -> None:
    r = np.random.default_rng(6)
    d = TDigest(50)
    for _ in range(30): d.add(r.normal(size=5000))
    kept = sum(len(x) for x, *_ in d._levels.values()) + d._waiting
    assert kept < 8 * 50 + 51 * 12
    one, data = TDigest(), r.normal(size=3000)
    for v in data: one.add(v)
    assert np.array_equal(one.cdf(data), digest(data, batch=3000).cdf(data))


@pytest.mark.parametrize('do, said', [
    (lambda d: d.add([1, np.inf]), 'infinite value'),
    (lambda d: d.quantile(-.1), 'quantile -0.1 lies outside of 0 to 1'),
    (lambda d: d.quantile([np.nan]), 'outside of 0 to 1'),
    (lambda d: TDigest().cdf(1), 'empty'),
    (lambda d: TDigest().quantile(.5), 'empty'),
    (lambda d: TDigest(np.nan), 'delta is nan'),
    (lambda d: d.merge(TDigest(50)), 'do not merge'),
    (lambda d: TDigest.from_dict(d.to_dict() | dict(x=[1.])), 'do not ascend'),
    (lambda d: TDigest.from_dict(d.to_dict() | dict(up_to=[3., 2, 1])), 'do not ascend')])
def test_what_cannot_be_ranked_is_refused(do:callable, said:str) -> None:
    with pytest.raises(ValueError, match=said): do(digest(np.array([1., 2, 3])))


def rows_of(*texts:str) -> list[dict]: return [compute_signals(t, stop_words=STOP_WORDS['en']) for t in texts]


def test_normaliser_streams_and_treats_missing_as_typical() -> None:
    rows = rows_of('A line.\nAnother', 'No end', '')
    n = SignalNormaliser.fit(iter(rows))
    x = n.transform(iter(rows))
    assert x.shape == (3, len(n.names)) and x.min() >= 0 and x.max() <= 1 and not np.isnan(x).any()
    assert 'ccnet_perplexity' not in n.names and set(n.names) < set(compute_signals(''))
    column = n.names.index('rps_lines_num_words')
    assert x[2, column] == .5 and x[0, column] == .25 and x[1, column] == .75       # no line: typical
    zeros = n.names.index('rps_doc_curly_bracket')
    assert (x[:, zeros] == .5).all()                                           # all alike
    merged = SignalNormaliser.fit(rows[:1]).merge(SignalNormaliser.fit(rows[1:]))
    assert merged.names == n.names and np.array_equal(merged.transform(rows), x)
    few = SignalNormaliser.fit(rows, ['rps_doc_word_count'])
    assert few.transform(rows).shape == (3, 1)


def test_logistic_equals_scikit_learn() -> None:
    linear = pytest.importorskip('sklearn.linear_model')
    r = np.random.default_rng(7)
    for l2 in (1e-3, 1., 300.):
        x = r.normal(0, 3, (200, 6))
        y = (x[:, 0] + r.normal(size=200) > 1).astype(int)
        theirs = linear.LogisticRegression(C=1 / l2, tol=1e-12, max_iter=10_000).fit(x, y)
        w, b = fit_logistic(x, y, l2)
        assert np.allclose(w, theirs.coef_[0], atol=1e-4, rtol=1e-4) and abs(b - theirs.intercept_[0]) < 1e-3
    x = np.array([[-5.], [-4], [40], [5000]])                                  # separable, and far
    w, b = fit_logistic(x, [0, 0, 1, 1], 1e-6)
    assert np.isfinite([*w, b]).all() and ((x @ w + b > 0) == [0, 0, 1, 1]).all()


def test_measures_equal_scikit_learn() -> None:
    metrics = pytest.importorskip('sklearn.metrics')
    r = np.random.default_rng(8)
    for levels in (2, 11, 10**6):
        p, y = r.integers(0, levels, 500) / (levels - 1), r.random(500) < .2
        assert abs(roc_auc(y, p) - metrics.roc_auc_score(y, p)) < 1e-12
        assert abs(brier(y, p) - metrics.brier_score_loss(y, p)) < 1e-12
    assert np.allclose(reliability([1, 0, 1], [0, 1, .95]), [[0, 1, 1], [.975, .5, 2]])
    assert abs(calibration_error([1, 0, 1], [0, 1, .95]) - (1 / 3 + 2 / 3 * .475)) < 1e-12


def test_importance_is_that_of_the_columns_that_are_used() -> None:
    r = np.random.default_rng(9)
    x = r.random((400, 3))
    y = x[:, 1] > .5
    def predict(a:np.ndarray) -> np.ndarray:
        assert np.array_equal(np.sort(a, 0), np.sort(x, 0))        # each column keeps its own values
        return a[:, 1]
    lost = permutation_importance(predict, x, y, 4)
    assert lost.shape == (3, 4) and (lost[[0, 2]] == 0).all() and (lost[1] > .4).all()


def crawl(n:int=40) -> tuple[list[str], list[int]]:
    r, words = np.random.default_rng(10), 'the list of values is sorted and then the server is closed'.split()
    good = [' '.join(r.choice(words, 30)).capitalize() + '.\nIt ends well. So it does.' for _ in range(n)]
    bad = ['\n'.join(f'{a:.3f}\t{b:d} {{' for a, b in zip(r.random(9), r.integers(0, 99, 9))) for _ in range(n)]
    return good + bad, [1] * n + [0] * n


@pytest.mark.parametrize('kind', ['logistic', 'boosted'])
def test_classifier_tells_prose_from_tables(kind:str) -> None:
    if kind == 'boosted': pytest.importorskip('sklearn')
    texts, y = crawl()
    model = QualityClassifier.fit(texts, y, kind)
    p = model.p_good(texts)
    assert roc_auc(y, p) == 1 and p.shape == (80,) and p.min() >= 0 and p.max() <= 1
    assert np.allclose(model.p_good(iter(rows_of(*texts[:5]))), p[:5], atol=1e-12)
    few = QualityClassifier.fit(texts, y, kind, names=['rps_doc_word_count', 'rps_doc_num_sentences'])
    assert len(few.normaliser.names) == 2


def test_logistic_classifier_is_saved_without_a_pickle(tmp_path:object) -> None:
    texts, y = crawl()
    model = QualityClassifier.fit(texts, y)
    model.save_pretrained(tmp_path/'model')
    assert sorted(f.name for f in (tmp_path/'model').iterdir()) == ['model.safetensors', 'quality.json']
    back = QualityClassifier.from_pretrained(tmp_path/'model')
    assert np.allclose(back.p_good(texts), model.p_good(texts), atol=1e-12)
    saved = json.loads((tmp_path/'model/quality.json').read_text())
    saved.pop('rps_doc_word_count')
    (tmp_path/'model/quality.json').write_text(json.dumps(saved))
    with pytest.raises(ValueError, match='26 signals and 27 weights'):
        QualityClassifier.from_pretrained(tmp_path/'model')


@pytest.mark.parametrize('do, said', [
    (lambda t, y: QualityClassifier.fit(t, [1] * 80), 'both 0 and 1'),
    (lambda t, y: QualityClassifier.fit(t[:5], y[:5]), '5 documents are too few'),
    (lambda t, y: QualityClassifier.fit(t, y[:9]), r'\(80, 27\) and y \(9,\)'),
    (lambda t, y: QualityClassifier.fit(t, y, 'forest'), "'forest' is unknown"),
    (lambda t, y: QualityClassifier.fit(t, y, names=['rps_doc_taste']), "'rps_doc_taste' is unknown"),
    (lambda t, y: QualityClassifier.fit(t, y).p_good([{}]), 'no signal'),
    (lambda t, y: QualityClassifier.fit(t, y).p_good('text'), 'one string'),
    (lambda t, y: SignalNormaliser.fit([]), 'no documents'),
    (lambda t, y: fit_logistic([[1.], [np.nan]], [0, 1]), 'NaN'),
    (lambda t, y: fit_logistic([[1.], [2.]], [0, 1], -1), 'l2 is -1'),
    (lambda t, y: fit_logistic([[1.], [2.]], [0, 1], max_steps=1), 'no minimum after 1 steps'),
    (lambda t, y: roc_auc([0, 0], [.1, .2]), 'both 0 and 1'),
    (lambda t, y: roc_auc([0, 1], [.1, np.nan]), 'NaN'),
    (lambda t, y: reliability([0, 1], [-.1, .2]), 'must lie in 0 to 1'),
    (lambda t, y: keep_above([.1, .2], .5), 'keeps nothing of 2 documents'),
    (lambda t, y: keep_above([.1, np.nan], .5), 'document 1 is NaN'),
    (lambda t, y: keep_above([], .5), 'keeps nothing of 0'),
    (lambda t, y: choose_threshold({}), 'at least one threshold'),
    (lambda t, y: choose_threshold({.1: [2.]}), 'two seeds'),
    (lambda t, y: choose_threshold({.1: [2., np.inf]}), 'not finite'),
    (lambda t, y: fit_educational(t[:4], y[:4]), '4 labelled texts are too few'),
    (lambda t, y: fit_educational(t[:20], [1] * 20), 'both 0 and 1'),
    (lambda t, y: ByteProxy(b'abc', 6), '3 bytes are too few'),
    (lambda t, y: ByteProxy(b'abc', 0), 'order is 0')])
def test_bad_input_gets_one_sentence(do:callable, said:str) -> None:
    texts, y = crawl()
    with pytest.raises(ValueError, match=said) as e: do(texts, y)
    assert '\n' not in str(e.value)


def test_threshold_is_the_loosest_of_those_that_cannot_be_told_apart() -> None:
    losses = {0.: [2.4, 2.5, 2.6], .3: [2.05, 2.1, 2.15], .6: [2.0, 2.1, 2.12], .9: [2.3, 2.3, 2.3]}
    assert choose_threshold(losses) == .3
    assert choose_threshold(losses | {.6: [2.0, 2.0, 2.0]}) == .6
    assert keep_above([.3, .2, .3], .3).tolist() == [0, 2]


def slow_bits(data:bytes, exam:bytes, order:int) -> list[float]:
    "Witten-Bell by dictionary; a run of n is the head of one of the longest"
    runs, out = [data[i:i + order] for i in range(len(data) - order + 1)], []
    for i in range(order - 1, len(exam)):
        p = 1 / 256
        for n in range(1, order + 1):
            context, byte = exam[i - n + 1:i], exam[i]
            after = [r[n - 1] for r in runs if r[:n - 1] == context]
            if after: p = (after.count(byte) + len(set(after)) * p) / (len(after) + len(set(after)))
        out.append(-np.log2(p))
    return out


@pytest.mark.parametrize('order', [1, 3, 6])
def test_proxy_equals_the_definition(order:int) -> None:
    data, exam = b'abracadabra, she said \xff\xfe abracadabra', b'a braca dabra \xff\xfe she'
    assert np.allclose(ByteProxy(data, order).bits(exam), slow_bits(data, exam, order), atol=1e-12)


def test_rubric_reads_what_it_says() -> None:
    marks = educational_points('Note that sine is a function. For example, sin(0) is 0, because it is odd.')
    assert marks == dict(example=True, reason=True, definition=True, advice=True, explanation=False)
    long = 'This sentence has some more than eight words in it. '
    assert educational_points(long * 3)['explanation'] and not educational_points(long * 2)['explanation']
    assert not any(educational_points('').values())


def test_forest_learns_from_a_few_labels() -> None:
    pytest.importorskip('sklearn')
    texts, y = crawl()
    value = fit_educational(texts[::2], y[::2], texts, n_components=8)
    assert roc_auc(y[1::2], value(texts[1::2])) > .95
    again = fit_educational(texts[::2], y[::2], texts, n_components=8)
    assert np.array_equal(value(texts), again(texts))


def test_small_transformer_learns() -> None:
    tiny = dict(n_embd=32, n_layer=1, T=16, batch=8, device='cpu')
    line = b'to be or not to be. '
    assert transformer_bits(line * 30, line * 5, steps=150, **tiny) < 2
    assert transformer_bits(line * 30, line * 5, steps=1, **tiny) > 4
