"""Pruning by embeddings: published values, brute force, and what a notebook has no room for."""
import sys
from pathlib import Path

import numpy as np
import pytest

from llmnotes.data import semantic
from llmnotes.data.semantic import (d4, embed_model, embed_tfidf, keep_prototypes, max_margin, prototype_scores,
                                    semdedup, spherical_kmeans, teacher_student, unit_rows)


def at(*degrees: float) -> np.ndarray:
    a = np.radians(degrees)
    return np.stack([np.cos(a), np.sin(a)], 1).astype(np.float32)


def cloud(n: int = 300, c: int = 12, seed: int = 0) -> np.ndarray:
    "Directions around twenty centres, a tenth of them exact copies"
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, c))[rng.integers(20, size=n)] + .4 * rng.standard_normal((n, c))
    x[-n // 10:] = x[:n // 10]
    return unit_rows(x)


FAN, ONE = at(0, 2, 10, 40, 41, 80), np.zeros(6, int)
MIDDLE = FAN.mean(0, keepdims=True)
WORDS = 'return close open file socket sine angle server tensor shape axis mean list tuple error path'.split()


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [' '.join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(n)]


# SemDeDup

@pytest.mark.parametrize('keep, eps, removed', [
    ('hard', .0005, {3}), ('hard', .001, {1, 3}), ('hard', .01, {1, 2, 3}), ('hard', .05, {1, 2, 3}),
    ('hard', .1, {1, 2, 3}), ('hard', .25, {1, 2, 3, 4}), ('easy', .001, {0, 4}), ('easy', .1, {0, 1, 4})])
def test_published_fan(keep: str, eps: float, removed: set[int]) -> None:
    assert {*semdedup(FAN, ONE, MIDDLE, eps, keep=keep).removed.tolist()} == removed


def test_published_order_and_similarity() -> None:
    got, order = semdedup(FAN, ONE, MIDDLE), [5, 0, 1, 2, 4, 3]
    want = [0, .173648, .999391, .990268, .857167, .999848]
    np.testing.assert_allclose(got.similarity[order], want, atol=1e-6)
    distance = prototype_scores(FAN, MIDDLE)
    np.testing.assert_allclose(distance, [.117408, .101538, .049178, .021695, .025459, .383742], atol=1e-6)
    assert semantic._order(distance, 'hard', None).tolist() == order
    assert semantic._order(distance, 'easy', None).tolist() == order[::-1]
    assert got.nearest[5] == -1 and got.nearest[3] == 4


def test_threshold_is_strict_and_antipodes_are_floored() -> None:
    pair = np.array([(1, 0), (.6, .8)])                          # cosine 0.6 in float32
    cosine = float(np.float32(.6))
    assert len(semdedup(pair, ONE[:2], at(0), 1 - cosine).removed) == 0
    assert len(semdedup(pair, ONE[:2], at(0), 1 - cosine + 1e-6).removed) == 1
    assert semdedup(at(0, 180), ONE[:2], at(0)).similarity.tolist() == [0, 0]
    copies = unit_rows(np.random.default_rng(1).standard_normal((1, 300)).repeat(40, 0))
    assert len(semdedup(copies, np.zeros(40, int), copies[:1], 0.).removed) == 0
    assert len(semdedup(copies, np.zeros(40, int), copies[:1], 1e-5).removed) == 39
    pairs = unit_rows(np.random.default_rng(2).standard_normal((200, 64)).repeat(2, 0))
    assert (pairs * pairs).sum(1).max() > 1, 'some products round above 1'
    assert len(semdedup(pairs, np.zeros(400, int), pairs[:1], 0.).removed) == 0


def test_a_chain_loses_its_far_end_unless_compared_with_the_kept() -> None:
    chain = at(0, 20, 40)                                        # in order: 0, 20, 40
    result = semdedup(chain, ONE[:3], at(70), .1)
    np.testing.assert_allclose(result.similarity, [0, .939693, .939693], atol=1e-6)
    assert result.kept.tolist() == [0]
    fixed = semdedup(chain, ONE[:3], at(70), .1, against='kept')
    assert fixed.kept.tolist() == [0, 2] and fixed.nearest.tolist() == [-1, 0, 0]


def oracle(x: np.ndarray, orders: list[list[int]], eps: float, against: str) -> set[int]:
    gone = set()
    for order in orders:
        for n, j in enumerate(order):
            earlier = [i for i in order[:n] if against == 'all' or i not in gone]
            if max([float(x[i] @ x[j]) for i in earlier] + [0.]) > 1 - eps: gone.add(j)
    return gone


@pytest.mark.parametrize('against', ['all', 'kept'])
@pytest.mark.parametrize('keep', ['hard', 'easy'])
@pytest.mark.parametrize('block', [1, 5, 1024])
def test_brute_force(against: str, keep: str, block: int) -> None:
    x = cloud()
    found = spherical_kmeans(x, 7, seed=3)
    orders = []
    for k in range(7):
        members = np.flatnonzero(found.assignment == k)
        far = 1 - x[members] @ found.centroids[k]
        orders.append(members[np.argsort(-far, kind='stable')].tolist()[::1 if keep == 'hard' else -1])
    for eps in (.0503, .2503, 1.2):
        got = semdedup(x, found.assignment, found.centroids, eps, keep=keep, against=against, block=block)
        assert {*got.removed.tolist()} == oracle(x, orders, eps, against)
        assert sorted([*got.kept, *got.removed]) == list(range(len(x)))
        cosines = (x * x[got.nearest]).sum(1)
        np.testing.assert_allclose(got.similarity, np.where(got.nearest < 0, 0, cosines), atol=1e-5)


def test_against_the_kept_every_loss_has_a_survivor_near() -> None:
    x = cloud()
    one = np.zeros(len(x), int), x.mean(0, keepdims=True)
    for keep in ('hard', 'easy', 'random'):
        got = semdedup(x, *one, .2, keep=keep, against='kept', block=16)
        assert {*got.nearest[got.removed].tolist()} <= {*got.kept.tolist()}
        near = x[got.kept] @ x[got.kept].T - 2 * np.eye(len(got.kept))
        assert near.max() <= .8 + 1e-6


def test_random_order_depends_on_the_seed_alone() -> None:
    x = cloud()
    one = np.zeros(len(x), int), x.mean(0, keepdims=True)
    kept = [semdedup(x, *one, .2, keep='random', seed=s).kept.tolist() for s in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]


def test_memory_of_a_large_cluster_is_a_block() -> None:
    import tracemalloc
    x = unit_rows(np.random.default_rng(0).standard_normal((6000, 8)))
    tracemalloc.start()
    semdedup(x, np.zeros(6000, int), x[:1], block=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6, peak                                      # n x n would be 144 MB


# Clusters

def test_objective_never_falls_and_is_what_the_parts_say() -> None:
    for seed in range(5):
        x = cloud(seed=seed)
        found = spherical_kmeans(x, 15, seed=seed)
        assert np.diff(found.objective).min() > -1e-6
        cosines = x @ found.centroids.T
        assert (found.assignment == cosines.argmax(1)).all()
        np.testing.assert_allclose(found.cosine, cosines.max(1), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5)
        sums = np.stack([x[found.assignment == k].sum(0) for k in range(15)])
        np.testing.assert_allclose(unit_rows(sums), found.centroids, atol=1e-5, err_msg='it went on to the end')
        again = spherical_kmeans(x, 15, seed=seed)
        assert (again.assignment == found.assignment).all() and (again.centroids == found.centroids).all()


def test_same_objective_as_faiss() -> None:
    faiss = pytest.importorskip('faiss')
    x = cloud(2000, 16)
    theirs = []
    for seed in range(4):
        means = faiss.Kmeans(16, 20, niter=30, spherical=True, seed=seed)
        means.train(x)
        theirs.append(means.index.search(x, 1)[0].mean())
    ours = [spherical_kmeans(x, 20, seed=s, n_iter=30).objective[-1] for s in range(4)]
    assert abs(np.mean(ours) - np.mean(theirs)) < .03


def test_seeding_spreads_over_the_groups() -> None:
    "Five far groups of very different sizes: k-means++ finds one start in each, uniform draws do not"
    rng = np.random.default_rng(0)
    x = unit_rows(np.repeat(np.eye(5), [900, 50, 30, 10, 10], 0) + .001 * rng.standard_normal((1000, 5)))
    for seed in range(10):
        starts = semantic._plus_plus(x, 5, np.random.default_rng(seed))
        assert sorted(starts.argmax(1)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize('k', [1, 2, 5])
def test_copies_and_as_many_clusters_as_points(k: int) -> None:
    np.testing.assert_allclose(spherical_kmeans(at(*[30] * 5), k).cosine, 1, atol=1e-6)
    found = spherical_kmeans(at(0, 50, 100, 150, 200)[:k], k)
    assert sorted(found.assignment) == list(range(k))


def test_an_empty_cluster_takes_the_worst_fit() -> None:
    points, start = at(0, 5, 90), at(2, -120)
    assignment, cosine = semantic._nearest(points, start)
    assert assignment.tolist() == [0, 0, 0]
    np.testing.assert_allclose(semantic._means(points, assignment, cosine, start), at(2.5, 90), atol=1e-6)
    assert assignment.tolist() == [0, 0, 0], 'the argument stays as it was'


# Prototypes and D4

def test_published_prototypes() -> None:
    e = np.array([(1, 0), (.8, .6), (.6, .8), (0, 1), (-1, 0)])
    scores = prototype_scores(e, np.array([(1, .2), (0, 1)]), np.array([0, 0, 1, 1, 0]))
    np.testing.assert_allclose(scores, [.019419, .097866, .2, 0, 1.980581], atol=1e-6)
    assert keep_prototypes(scores, .6).tolist() == [1, 2, 4]
    assert keep_prototypes(scores, .6, keep='easy').tolist() == [0, 1, 3]
    nearest = prototype_scores(e, np.array([(1, .2), (0, 1)]))
    np.testing.assert_allclose(nearest, [.019419, .097866, .2, 0, 1], atol=1e-6)
    assert keep_prototypes(np.zeros(4), .5).tolist() == [0, 1]


def test_d4_is_its_parts_one_after_the_other() -> None:
    x = cloud(1000)
    got = d4(x, .5, 10, r_dedup=.75, seed=5)
    assert len(got.deduplicated) == 750 and len(got.kept) == 375
    first = spherical_kmeans(x, 10, seed=5)
    assert (semdedup(x, first.assignment, first.centroids, got.eps).kept == got.deduplicated).all()
    rest = x[got.deduplicated]
    second = spherical_kmeans(rest, 10, seed=5)
    scores = prototype_scores(rest, second.centroids, second.assignment)
    assert (got.deduplicated[keep_prototypes(scores, .5)] == got.kept).all()
    everything = d4(x, 1., 10, r_dedup=1.)
    assert everything.kept.tolist() == list(range(1000))


def test_d4_ties_stay_together() -> None:
    x = np.repeat(np.eye(20), 10, 0)                             # M is 1 for nine of ten
    got = d4(x, 1., 3, r_dedup=.5)
    assert len(got.deduplicated) == len(x) and abs(got.eps) < 1e-6


def test_clusters_of_copies_vanish() -> None:
    rng = np.random.default_rng(0)
    base = unit_rows(rng.standard_normal((600, 16)))
    copies = unit_rows(np.repeat(base[:5], 40, 0) + .01 * rng.standard_normal((200, 16)))
    x, planted = np.concatenate([base, copies]), np.arange(800) >= 600
    got = d4(x, .5, 20)
    def mostly(found, of): # clusters of five or more that are mostly copies
        return sum(len(p) > 4 and p.mean() > .5 for k in range(20) for p in [planted[of[found.assignment == k]]])
    assert mostly(got.first, np.arange(800)) >= 4
    assert mostly(got.second, got.deduplicated) == 0


# Embeddings

def test_tfidf_in_batches_and_from_a_sample() -> None:
    texts = sentences(300)
    whole = embed_tfidf(texts, 8)
    np.testing.assert_allclose(embed_tfidf(texts, 8, batch=7), whole, atol=1e-5)
    assert whole.dtype == np.float32 and whole.shape == (300, 8)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    sampled = embed_tfidf(texts, 8, fit_on=100)
    assert (sampled == embed_tfidf(texts, 8, fit_on=100)).all() and sampled.shape == (300, 8)
    same = [i for i, t in enumerate(texts) if sorted(t.split()) == sorted(texts[0].split())]
    np.testing.assert_allclose(sampled[same], sampled[:1].repeat(len(same), 0), atol=1e-5)


def test_a_text_of_unknown_words_is_zero_and_is_refused_later() -> None:
    x = embed_tfidf([*sentences(50), 'Zwölf Boxkämpfer', ''], 4)
    assert (x[-2:] == 0).all() and x[:-2].any(1).all()
    with pytest.raises(ValueError, match='row 50 has length 0, not 1, like 2 in all'):
        spherical_kmeans(x, 3)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'sklearn.feature_extraction.text', None)
    with pytest.raises(ImportError, match='pip install scikit-learn'): embed_tfidf(['a b'])


def test_a_language_model_embeds_the_same_in_any_batch(tmp_path: Path) -> None:
    hub, tokenizers = pytest.importorskip('transformers'), pytest.importorskip('tokenizers')
    torch = pytest.importorskip('torch')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(['<eos>', *WORDS])},
                                                             unk_token='<eos>'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hub.PreTrainedTokenizerFast(tokenizer_object=words, eos_token='<eos>').save_pretrained(tmp_path)
    torch.manual_seed(0)
    hub.LlamaModel(hub.LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                   num_attention_heads=2)).save_pretrained(tmp_path)
    texts = [*sentences(9), '', sentences(1)[0]]
    x = embed_model(texts, str(tmp_path), batch=4, device='cpu')
    single = embed_model(texts, str(tmp_path), batch=1, device='cpu')
    np.testing.assert_allclose(x, single, atol=1e-5)
    np.testing.assert_allclose(x[0], x[-1], atol=1e-5)
    assert (x[9] == 0).all() and x.dtype == np.float32
    net, ids = hub.LlamaModel.from_pretrained(tmp_path), [WORDS.index(w) + 1 for w in texts[1].split()]
    with torch.no_grad(): by_hand = net(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(x[1], by_hand / np.linalg.norm(by_hand), atol=1e-5)


# The perceptron

def test_largest_margin_by_hand() -> None:
    x = np.array([(1., 1.), (2., 0.), (-1., 1.)])
    w = max_margin(x, np.array([1, 1, -1]))                      # the border is the second axis
    np.testing.assert_allclose(w, [1, 0], atol=1e-9)


def test_error_with_much_data_is_known() -> None:
    "Largest margin: 0.5005 / alpha (Opper and others, 1990)"
    got = [20 * teacher_student(20, seed=s) for s in range(12)]
    assert abs(np.mean(got) - .5005) < .06


def test_hard_examples_win_with_much_data_and_easy_ones_with_little() -> None:
    mean = {(a, w): np.mean([teacher_student(a, .25, which=w, n_dim=60, seed=s) for s in range(5)])
            for a in (2, 24) for w in ('hard', 'easy', 'random')}
    assert mean[2, 'easy'] < mean[2, 'random'] < mean[2, 'hard']
    assert mean[24, 'hard'] < mean[24, 'easy'] < mean[24, 'random']
    off = np.mean([teacher_student(24, .25, angle=.8, n_dim=60, seed=s) for s in range(5)])
    assert off > 2 * mean[24, 'hard']
    assert teacher_student(4, seed=1) == teacher_student(4, seed=1, which='easy')     # nothing pruned


# Bad input

BAD = {'NaN': (np.nan, 'row 2 has length nan'), 'zero': (0, 'row 2 has length 0, not 1'),
       'long': (2.5, 'row 2 has length 2.5, not 1'), 'infinite': (np.inf, 'row 2 has length (inf|nan)')}


@pytest.mark.filterwarnings('ignore:invalid value')
@pytest.mark.parametrize('what', BAD)
def test_vectors_without_a_direction_are_refused(what: str) -> None:
    factor, message = BAD[what]
    x = FAN.copy()
    x[2] *= factor
    calls = [lambda: spherical_kmeans(x, 2), lambda: semdedup(x, ONE, MIDDLE),
             lambda: prototype_scores(x, MIDDLE), lambda: d4(x, .5, 2)]
    for call in calls:
        with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize('call, message', [
    (lambda: spherical_kmeans(FAN, 7), 'k is 7; it lies in 1..6'),
    (lambda: spherical_kmeans(FAN, 0), 'k is 0'),
    (lambda: spherical_kmeans(np.empty((0, 3)), 1), r'shape \(0, 3\)'),
    (lambda: spherical_kmeans(FAN[0], 1), r'shape \(2,\)'),
    (lambda: semdedup(FAN, ONE, MIDDLE, -.1), 'eps is -0.1; cosine distance lies in 0..2'),
    (lambda: semdedup(FAN, ONE, MIDDLE, 2.1), 'eps is 2.1'),
    (lambda: semdedup(FAN, ONE, MIDDLE, float('nan')), 'eps is nan'),
    (lambda: semdedup(FAN, ONE - 1, MIDDLE), 'each of 6 vectors one of 1 clusters'),
    (lambda: semdedup(FAN, ONE[:5], MIDDLE), 'each of 6 vectors one of 1 clusters'),
    (lambda: semdedup(FAN, ONE, MIDDLE[:, :1]), 'vectors have 2 numbers, centroids 1'),
    (lambda: semdedup(FAN, ONE, MIDDLE, keep='best'), "'best' is none of hard, easy, random"),
    (lambda: semdedup(FAN, ONE, MIDDLE, against='some'), "'some' is none of all, kept"),
    (lambda: prototype_scores(FAN, MIDDLE, ONE + 1), 'one of 1 clusters'),
    (lambda: keep_prototypes(np.ones(3), 1.5), 'share is 1.5'),
    (lambda: keep_prototypes(np.ones(3), .5, keep='random'), "'random' is none of hard, easy"),
    (lambda: d4(at(*[5] * 6), .5, 3, r_dedup=.2), '1 vectors are left for 3 clusters'),
    (lambda: d4(FAN, .5, 2, r_dedup=0.), 'r_dedup is 0.0'),
    (lambda: embed_tfidf([]), 'at least one text'),
    (lambda: embed_tfidf('one text'), 'a list'),
    (lambda: embed_tfidf(sentences(30), 100), '100 components of 30 texts'),
    (lambda: embed_tfidf(['', '']), 'no word stands in 2 of 2 texts'),
    (lambda: teacher_student(4, which='odd'), "'odd' is none of"),
    (lambda: teacher_student(4, 0.), 'share is 0.0'),
    (lambda: teacher_student(.001), 'are none'),
])
def test_bad_input_is_refused_in_one_sentence(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as e: call()
    assert '\n' not in str(e.value)
