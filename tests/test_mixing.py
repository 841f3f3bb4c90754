"""Domain mixing: golden values, properties of plans and cuts, and what is refused."""
import itertools
import random
from fractions import Fraction

import numpy as np
import pytest

from llmnotes.corpus import Document
from llmnotes.data.mixing import (
    R_STAR,
    cut_points,
    doge_update,
    domain_excess,
    doremi_update,
    effective_tokens,
    loss_weights,
    sample_plan,
    start_mixture,
    token_histogram,
    trim_documents,
)

# Scores and weights of DoReMi's trainer at commit 7cde52d, float32
BEHIND = [[.5, -.2, .3], [1, 1, 9.9], [-1, -2, -3]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
GOLDEN = {1e-4: ([5.607e-05, 8.741e-05, .99985701], [.1666947, .16671038, .66659516]),
          1e-3: ([.00035604, .00038736, .99925709], [.1668447, .16686036, .66629523])}


def first(smoothing:float, **start):
    return doremi_update(start_mixture(3, **start), BEHIND, np.zeros((3, 3)), [0, 1, 0], mask=MASK,
                         smoothing=smoothing)


@pytest.mark.parametrize('smoothing', GOLDEN)
def test_doremi_equals_the_published_trainer(smoothing:float) -> None:
    one = first(smoothing, unseen='initial', vocab_size=50257)
    assert np.allclose(one.scores, [.13333334, 1, 10.8249054], atol=1e-6)
    assert np.allclose(one.weights, GOLDEN[smoothing][0], atol=1e-6, rtol=0)
    assert np.allclose(one.mean, GOLDEN[smoothing][1], atol=1e-6, rtol=0)


def test_doremi_goes_on_as_the_published_trainer_does() -> None:
    one = first(1e-4, unseen='initial', vocab_size=50257)
    two = doremi_update(one, [[.1], [.2], [.3]], np.zeros((3, 1)), [0, 1, 2], smoothing=1e-4)
    assert np.allclose(two.weights, [7.923e-05, .00011242, .99980825], atol=1e-6, rtol=0)
    assert np.allclose(two.mean, [.11115622, .11117772, .77766615], atol=1e-6, rtol=0)


def test_doremi_by_default_gives_nothing_to_what_was_not_seen() -> None:
    one = first(1e-4)
    assert one.scores[2] == 0 and one.weights[2] < 1 / 3


def test_a_domain_that_is_absent_or_masked_keeps_its_score() -> None:
    zero, previous = np.zeros((2, 2)), np.array([1., 2., 3.])
    assert domain_excess(zero + 5, zero, [0, 0], previous).tolist() == [5, 2, 3]
    masked = domain_excess(zero + 5, zero, [0, 1], previous, [[1, 0], [0, 0]])
    assert masked.tolist() == [5, 2, 3]
    hidden = np.array([[1., np.nan], [1., 1.]])
    assert domain_excess(hidden, zero, [0, 1], previous, [[1, 0], [1, 1]]).tolist() == [1, 1, 3]


def test_weights_stay_a_distribution_for_hundreds_of_steps() -> None:
    rng, state = np.random.default_rng(0), start_mixture(5)
    seen = [state.weights]
    for _ in range(300):
        loss = rng.normal(0, 30, (4, 7))
        state = doremi_update(state, loss, 0 * loss, rng.integers(5, size=4))
        seen.append(state.weights)
        assert np.isfinite(state.weights).all() and abs(state.weights.sum() - 1) < 1e-12
        assert state.weights.min() >= 1e-3 / 5 * (1 - 1e-9)
    assert np.allclose(state.mean, np.mean(seen, 0)) and state.n == 301


G = np.array([[1, 0], [1, 1], [-1, .5]])


@pytest.mark.parametrize(('form', 'mu', 'want'), [
    ('paper', .05, [.3196257, .43144956, .24892474]),
    ('paper', .01, [.17336449, .77696575, .04966976]),
    ('code', .05, [.31908336, .41168043, .26923618]),
    ('code', .01, [.19989033, .71461517, .0854945]),
])
def test_doge_equals_the_arithmetic(form:str, mu:float, want:list[float]) -> None:
    got = doge_update(start_mixture(3), G, .01, mu=mu, form=form)
    assert np.allclose(got.weights, want, atol=1e-7, rtol=0)
    assert got.scores.tolist() == [1, 2.5, -.25]


def test_doge_code_form_is_bounded_on_both_sides() -> None:
    w = doge_update(start_mixture(3), np.array([[100, 0], [0, 1], [-1, 0]]), 1., mu=1., form='code')
    assert np.isclose(w.weights[0] / w.weights[2], np.exp(5))      # 5 at most, 0 at least
    assert w.weights[1] < w.weights[0] and w.weights[1] > w.weights[2]


def test_doge_clips_long_gradients_and_leaves_short_ones() -> None:
    g = np.array([[3., 4.], [.3, .4], [0., 0.]])
    got = doge_update(start_mixture(3), g, .1, clip=1.).scores
    assert np.allclose(got, [1.5, .75, 0])                         # lengths 1, 0.5 and 0
    assert np.isfinite(doge_update(start_mixture(3), 0 * g, .1, form='code').weights).all()


@pytest.mark.parametrize(('call', 'says'), [
    (lambda: start_mixture(0), '0 domains'),
    (lambda: start_mixture([]), 'has shape'),
    (lambda: start_mixture([.5, .4]), 'sum to 0.9'),
    (lambda: start_mixture([float('nan'), 1]), 'hold nan'),
    (lambda: start_mixture([-.5, 1.5]), 'hold -0.5'),
    (lambda: start_mixture(2, unseen='guess'), "'guess' is unknown"),
    (lambda: start_mixture(2, unseen='initial'), 'not None'),
    (lambda: doremi_update(start_mixture(2), [[1.]], [[0.]], [2]), 'domain 2 is unknown'),
    (lambda: doremi_update(start_mixture(2), [[1.]], [[0.]], [-1]), 'domain -1 is unknown'),
    (lambda: doremi_update(start_mixture(2), [[np.inf]], [[0.]], [1]), 'is inf in row 0'),
    (lambda: doremi_update(start_mixture(2), [[1.]], [[0.]], [0, 1]), 'disagree on (B, T)'),
    (lambda: doremi_update(start_mixture(2), [[1.]], [[0.]], [0], eta=0), 'eta 0'),
    (lambda: doremi_update(start_mixture(2), [[1.]], [[0.]], [0], smoothing=2), 'smoothing 2'),
    (lambda: doge_update(start_mixture(3), G, .01, form='both'), "'both'"),
    (lambda: doge_update(start_mixture(3), G, 0), 'lr 0'),
    (lambda: doge_update(start_mixture(2), G, .1), 'not of 2 domains'),
    (lambda: doge_update(start_mixture(3), G * [[1], [np.nan], [1]], .1), 'domain 1 is not finite'),
    (lambda: loss_weights([.5, .5], [0, 1]), 'domain 0 has weight 0.5'),
    (lambda: loss_weights([.5, .5], [1]), '2 weights, 1 sampling'),
    (lambda: sample_plan({'a': .9}, {'a': 1}, 1), 'sum to 0.9'),
    (lambda: sample_plan({}, {}, 1), 'has shape'),
    (lambda: sample_plan({'a': 1}, {'a': -1}, 1), "'a' has -1 tokens"),
    (lambda: sample_plan({'a': 1}, {'a': float('nan')}, 1), "'a' has nan tokens"),
    (lambda: sample_plan({'a': 1}, {'a': 0}, 1), 'weight 1 and no tokens'),
    (lambda: sample_plan({'a': 1}, {'b': 5}, 1), "'a' is not in both weights and available"),
    (lambda: sample_plan({'a': 1}, {'a': 5}, 1, {'b': 1}), "'a' is not in both weights and max"),
    (lambda: sample_plan({'a': 1}, {'a': 5}, 0), 'budget of 0'),
    (lambda: sample_plan({'a': 1}, {'a': 5}, 1, -1), 'read -1 times'),
    (lambda: effective_tokens(-1, 5), '5 tokens from -1'),
])
def test_bad_input_is_refused_in_one_sentence(call, says:str) -> None:
    with pytest.raises(ValueError) as e: call()
    assert says in str(e.value) and '\n' not in str(e.value)


def test_plans_keep_their_promises() -> None:
    rng = random.Random(0)
    for _ in range(500):
        names = [f'd{k}' for k in range(rng.randint(1, 7))]
        raw = [rng.choice([0, 1, 1, 2, 5, 40]) for _ in names]
        if not sum(raw): continue
        w = {d: x / sum(raw) for d, x in zip(names, raw)}
        have = {d: rng.choice([1, 3, 10, 1000, 10**12]) for d in names}
        cap, budget = rng.choice([.5, 1, 1.7, 4]), rng.choice([1, 7, 100, 10**6, 10**13])
        plan = sample_plan(w, have, budget, cap)
        most = {d: int(Fraction(cap) * have[d]) for d in names}
        assert sum(plan.tokens.values()) + plan.unspent == budget and plan.unspent >= 0
        assert all(0 <= plan.tokens[d] <= most[d] for d in names)
        assert all(plan.tokens[d] == most[d] for d in plan.capped)
        assert all(plan.tokens[d] == 0 for d in names if w[d] == 0)
        free = [d for d in names if w[d] and d not in plan.capped]
        if plan.unspent: assert not free
        for a, b in itertools.pairwise(free):                      # proportional, to whole numbers
            assert abs(plan.tokens[a] - plan.tokens[b] * w[a] / w[b]) <= 1 + w[a] / w[b] + 1e-9 * budget
        for a, b in itertools.product(plan.capped, free):          # a cap only ever takes away
            assert plan.tokens[a] / w[a] <= (plan.tokens[b] + 1) / w[b]


@pytest.mark.parametrize(('budget', 'cap', 'want', 'unspent'), [
    (300, 1, [10, 100, 190], 0), (300, 4, [40, 130, 130], 0), (300, 100, [100, 100, 100], 0),
    (5000, 1, [10, 100, 1000], 3890)])
def test_equal_weights_are_unimax(budget:int, cap:int, want:list[int], unspent:int) -> None:
    plan = sample_plan(dict.fromkeys('abc', 1 / 3), {'a': 10, 'b': 100, 'c': 1000}, budget, cap)
    assert (list(plan.tokens.values()), plan.unspent) == (want, unspent)


def corpus(n:int=2000) -> list[Document]:
    rng = random.Random(1)
    return [Document(f'{d}/{k}', 'x' * rng.randint(0, 200), d, '', '')
            for k in range(n) for d in ('a', 'b')]


def size(doc:Document) -> int: return len(doc.text)


@pytest.mark.parametrize('share', [0, .001, .3, .999, 1, 2.4, 3])
def test_cuts_give_what_is_planned_and_never_more(share:float) -> None:
    docs = corpus()
    hist = token_histogram(docs, size, seed=3)
    want = {d: int(share * h.sum()) for d, h in hist.items()}
    cuts = cut_points(hist, want)
    got = dict.fromkeys(want, 0)
    for doc, times in trim_documents(docs, cuts, seed=3):
        assert times >= 1
        got[doc.domain] += times * size(doc)
    for d, cut in cuts.items():
        assert got[d] == cut.tokens and cut.tokens + cut.short == want[d]
        assert 0 <= cut.short <= hist[d].max()


def test_cuts_know_no_order_and_no_shards() -> None:
    docs = corpus()
    hist = token_histogram(docs, size, seed=-1)
    cuts = cut_points(hist, {'a': 50_000, 'b': 250_000})
    one = sorted((d.id, n) for d, n in trim_documents(docs, cuts, seed=-1))
    mixed = random.Random(2).sample(docs, len(docs))
    parts = [token_histogram(mixed[k::3], size, seed=-1) for k in range(3)]
    again = cut_points({d: sum(p[d] for p in parts) for d in hist}, {'a': 50_000, 'b': 250_000})
    three = sorted((d.id, n) for k in range(3) for d, n in trim_documents(mixed[k::3], again, seed=-1))
    assert again == cuts and one == three


def test_cuts_nest_follow_the_seed_and_prefer_no_length() -> None:
    docs = corpus()
    def taken(share, seed):
        hist = token_histogram(docs, size, seed=seed)
        cuts = cut_points(hist, {d: int(share * h.sum()) for d, h in hist.items()})
        return {d.id for d, _ in trim_documents(docs, cuts, seed=seed)}
    assert taken(.2, 0) < taken(.5, 0) and taken(.2, 0) != taken(.2, 1)
    half = taken(.5, 0)
    lengths = [size(d) for d in docs if d.id in half]
    assert abs(np.mean(lengths) - np.mean([size(d) for d in docs])) < 5    # standard error: 0.9


def test_a_stream_is_read_once_and_lazily() -> None:
    hist = token_histogram(corpus(10), size, seed=0)
    cuts = cut_points(hist, {d: int(h.sum()) for d, h in hist.items()})
    endless = itertools.cycle(corpus(10))
    assert len(list(itertools.islice(trim_documents(endless, cuts, seed=0), 50))) == 50


def test_unknown_and_empty_domains_are_refused() -> None:
    hist = token_histogram(corpus(5), size, seed=0)
    with pytest.raises(ValueError, match="domain 'c' is unknown; there are a, b"):
        cut_points(hist, {'c': 1})
    with pytest.raises(ValueError, match='has 0 tokens and cannot give 5'):
        cut_points({'a': np.zeros(4, int)}, {'a': 5})
    with pytest.raises(ValueError, match='cannot give -1'): cut_points(hist, {'a': -1})
    with pytest.raises(ValueError, match="of the unknown domain 'b'"):
        list(trim_documents(corpus(5), cut_points(hist, {'a': 1}), seed=0))


def test_repetition_has_its_limits() -> None:
    assert effective_tokens(7, 7) == 7 and effective_tokens(9, 7) == 7
    assert np.isclose(effective_tokens(2, 2e9), 2 * (1 + R_STAR))
    slope = (effective_tokens(1e6, 1e6 + 1) - 1e6)
    assert np.isclose(slope, 1, atol=1e-3)                         # the first repetition is as new
    worth = [effective_tokens(1, k) for k in range(1, 50)]
    assert all(b - a < 1 for a, b in itertools.pairwise(worth)) and worth == sorted(worth)


def test_real_documents_are_cut_alike(shared) -> None:
    "Ids of real files, unicode included"
    paths = sorted(p for p in shared.rglob('*') if p.is_file())[:3000]
    docs = [Document(str(p.relative_to(shared)) + ' é', 'x' * (p.stat().st_size % 4096), 'file', '', '')
            for p in paths]
    hist = token_histogram(docs, size, seed=5)
    cuts = cut_points(hist, {'file': int(hist['file'].sum()) // 3})
    got = sum(n * size(d) for d, n in trim_documents(reversed(docs), cuts, seed=5))
    assert got == cuts['file'].tokens


def test_doge_code_form_scales_by_the_clipped_lengths() -> None:
    g = np.array([[100., 0], [0, .5]])
    got = doge_update(start_mixture(2), g, .1, mu=.1, form='code', clip=1.).weights
    push = np.array([1, .25]) / (.75 + 1e-6)                       # clipped lengths 1 and 0.5
    assert np.allclose(got, np.exp(push) / np.exp(push).sum(), rtol=0, atol=1e-12)


def test_a_domain_that_is_just_filled_is_not_held_back() -> None:
    plan = sample_plan({'a': .5, 'b': .5}, {'a': 10, 'b': 30}, 20, 1)
    assert (plan.tokens, plan.capped) == ({'a': 10, 'b': 10}, ())


def test_a_plan_that_fits_exactly_is_filled_exactly() -> None:
    hist = {'a': np.array([3, 0, 4, 0, 5])}
    assert cut_points(hist, {'a': 7})['a'][1:] == (4, 5, 7, 0)     # below, buckets, tokens, short
    assert cut_points(hist, {'a': 6})['a'][1:] == (2, 5, 3, 3)
    assert cut_points(hist, {'a': 24})['a'][:1] + cut_points(hist, {'a': 24})['a'][3:] == (2, 24, 0)


def test_the_hash_is_the_same_on_every_machine() -> None:
    docs = [Document(f'doc-{k}', 'x' * 10, 'a', '', '') for k in range(40)]
    cuts = cut_points(token_histogram(docs, size, seed=42), {'a': 60})
    assert [d.id for d, _ in trim_documents(docs, cuts, seed=42)] == \
        ['doc-8', 'doc-11', 'doc-22', 'doc-25', 'doc-30', 'doc-36']
