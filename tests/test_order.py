"""Order and repetition: published chains, brute force, curricula, splits that do not move, and what is refused."""
from itertools import permutations, product

import numpy as np
import pytest

from llmnotes.corpus import Document
from llmnotes.data.order import (STRATEGIES, compression_difficulty, context_chains, curriculum_order, find_leaks,
                                 greedy_path, in_context_order, merge_chains, nearest_neighbours, path_similarity,
                                 split_parts)


def at(*degrees: float) -> np.ndarray:
    a = np.radians(degrees)
    return np.stack([np.cos(a), np.sin(a)], 1)


def cloud(n: int, c: int = 4, seed: int = 0) -> np.ndarray:
    "Directions, a fourth of them copies of the first"
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, c))
    x[rng.integers(n, size=n // 4)] = x[0]
    return x


SIX = at(0, 1, 1.5, 10, 10.4, 30)


# Neighbours

@pytest.mark.parametrize('n, k, block', [
    (1, 3, 64), (2, 3, 64), (50, 7, 64), (50, 7, 2**20), (50, 49, 999), (50, 80, 999)])
def test_neighbours_are_those_of_a_full_sort(n: int, k: int, block: int) -> None:
    x = cloud(n)
    ids, cosines = nearest_neighbours(x, k, block_bytes=block)
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    s = np.round(unit @ unit.T, 6)
    for i in range(n):
        want = sorted(set(range(n)) - {i}, key=lambda j: (-s[i, j], j))[:k]
        assert ids[i].tolist() == want
        assert np.allclose(cosines[i], s[i, want], atol=1e-6)
    assert ids.shape == (n, min(k, n - 1))


def test_length_of_an_embedding_does_not_count() -> None:
    x = cloud(30)
    scaled = x * np.linspace(.1, 9, 30)[:, None]
    assert (nearest_neighbours(x, 4)[0] == nearest_neighbours(scaled, 4)[0]).all()


# In-context order

def test_published_chains() -> None:
    ids, _ = nearest_neighbours(SIX, 9)
    chains = context_chains(ids, cap=3)
    assert chains == [[0, 1, 2, 3], [4, 5]]
    assert merge_chains(chains, ids, cap=3) == {0: [0, 1, 2, 5, 4, 3]}
    assert chains == [[0, 1, 2, 3], [4, 5]], 'merging leaves its input as it was'
    assert in_context_order(SIX, method='code', cap=3, seed=None).tolist() == [0, 1, 2, 5, 4, 3]


def test_the_first_chain_alone_has_one_document_more() -> None:
    ids, _ = nearest_neighbours(at(*range(0, 40, 2)), 19)
    assert [len(c) for c in context_chains(ids, cap=5)] == [6, 5, 5, 4]


def test_only_chains_below_the_cap_are_dissolved() -> None:
    ids, _ = nearest_neighbours(at(0, 1, 2, 40, 41, 42, 80), 6)
    chains = [[0, 1, 2], [3, 4, 5], [6]]
    assert merge_chains(chains, ids, cap=3) == {0: [0, 1, 2], 1: [3, 4, 6, 5]}
    assert merge_chains(chains, ids, cap=1) == {0: [0, 1, 2], 1: [3, 4, 5], 2: [6]}


def test_a_stray_without_a_neighbour_outside_stays() -> None:
    two = at(0, 1, 90, 91)                         # each knows the other of its pair alone
    ids, _ = nearest_neighbours(two, 1)
    chains = context_chains(ids, cap=5)
    assert merge_chains(chains, ids, cap=5) == {0: [0, 1], 1: [2, 3]}


def test_paper_starts_where_fewest_lead_and_walks_to_the_most_similar() -> None:
    star = np.array([[1, 0, 0, 0], [.8, .6, 0, 0], [.7, 0, .714, 0], [.6, 0, 0, .8]])
    ids, cosines = nearest_neighbours(star, 1)     # all point to 0, which points to 1
    assert ids[:, 0].tolist() == [1, 0, 0, 0]
    assert greedy_path(ids, cosines, seed=None).tolist() == [1, 0, 2, 3]


def by_sets(x: np.ndarray, k: int) -> list[int]:
    n = len(x)
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    s = np.round(unit @ unit.T, 6)
    near = [sorted(set(range(n)) - {i}, key=lambda j: (-s[i, j], j))[:k] for i in range(n)]
    road = [{j for j in range(n) if j in near[i] or i in near[j]} for i in range(n)]
    todo, out = set(range(n)), []
    while todo:
        here = min(todo, key=lambda i: (len(road[i]), i))
        while here is not None:
            todo.remove(here); out.append(here)
            here = min(road[here] & todo, key=lambda j: (-s[here, j], j), default=None)
    return out


@pytest.mark.parametrize('n, k', [(1, 1), (2, 5), (9, 2), (40, 1), (40, 5), (40, 60)])
def test_paper_equals_a_second_writing(n: int, k: int) -> None:
    for s in range(5):
        x = cloud(n, seed=s)
        assert in_context_order(x, n_neighbours=k, seed=None).tolist() == by_sets(x, k)


@pytest.mark.parametrize('method, n, k', list(product(('paper', 'code'), (1, 2, 3, 57, 300), (1, 9, 400))))
def test_every_document_comes_once(method: str, n: int, k: int) -> None:
    x = cloud(n)
    order = in_context_order(x, method=method, n_neighbours=k, cap=5)
    assert np.sort(order).tolist() == list(range(n))
    assert (order == in_context_order(x, method=method, n_neighbours=k, cap=5)).all()


def test_another_seed_is_another_order() -> None:
    x = cloud(300)
    for method in ('paper', 'code'):
        assert (in_context_order(x, method=method) != in_context_order(x, method=method, seed=1)).any()


def test_copies_stand_together() -> None:
    x = np.repeat(np.eye(20), 3, axis=0)
    order = in_context_order(x, n_neighbours=2)
    assert (np.diff((order // 3).reshape(20, 3), axis=1) == 0).all()


def test_no_path_is_better_than_the_best() -> None:
    paths = np.array(list(permutations(range(7))))
    for s in range(10):
        x = np.abs(np.random.default_rng(s).standard_normal((7, 5)))
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        c = unit @ unit.T
        best = c[paths[:, :-1], paths[:, 1:]].sum(1).max() / 6
        assert .8 * best < path_similarity(x, in_context_order(x)) <= best + 1e-6


def test_related_documents_follow_each_other() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 8))[rng.integers(30, size=600)] + .2 * rng.standard_normal((600, 8))
    for method in ('paper', 'code'):
        assert path_similarity(x, in_context_order(x, method=method)) > .8
    assert path_similarity(x, rng.permutation(600)) < .2


@pytest.mark.parametrize('how, said', [
    (dict(method='tsp'), "method 'tsp' is unknown; it is paper or code"),
    (dict(n_neighbours=0), '0 neighbours make no graph'),
    (dict(method='code', cap=0), 'cap is 0')])
def test_settings_that_cannot_be(how: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said): in_context_order(SIX, **how)


@pytest.mark.parametrize('x, said', [
    (np.where(np.arange(6)[:, None] == 4, np.nan, SIX), 'embedding 4 holds NaN or infinity, like 1 in all'),
    (np.where(np.arange(6)[:, None] == 2, np.inf, SIX), 'embedding 2 holds NaN'),
    (SIX[0], r'shape \(2,\)'), (SIX[:0], r'shape \(0, 2\)')])
def test_embeddings_that_cannot_be(x: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said): in_context_order(x)


def test_one_document_has_no_successor() -> None:
    with pytest.raises(ValueError, match='1 document has no successor'): path_similarity(SIX[:1], [0])


# Curricula

RNG = np.random.default_rng(0)
HARD, KIND = RNG.integers(0, 9, 200).astype(float), RNG.choice(5, 200, p=[.6, .2, .1, .07, .03])


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_a_curriculum_is_a_permutation_that_the_seed_decides(strategy: str) -> None:
    def order(seed: int) -> np.ndarray:
        return curriculum_order(200, strategy, difficulty=HARD, clusters=KIND, seed=seed)
    assert np.sort(order(1)).tolist() == list(range(200))
    assert (order(1) == order(1)).all() and (order(1) != order(2)).any()
    one = curriculum_order(1, strategy, difficulty=[2.], clusters=['a'])
    assert one.tolist() == [0]


def test_difficulty_rises_or_falls() -> None:
    assert (np.diff(HARD[curriculum_order(200, 'easy-to-hard', difficulty=HARD)]) >= 0).all()
    assert (np.diff(HARD[curriculum_order(200, 'hard-to-easy', difficulty=HARD)]) <= 0).all()


def test_documents_of_one_difficulty_are_shuffled() -> None:
    order = curriculum_order(50, 'easy-to-hard', difficulty=np.zeros(50))
    assert (order != np.arange(50)).any()


def test_cluster_after_cluster_in_an_order_of_the_seed() -> None:
    firsts = set()
    for s in range(20):
        row = KIND[curriculum_order(200, 'clusters', clusters=KIND, seed=s)]
        assert (np.diff(row) != 0).sum() == 4
        firsts.add(int(row[0]))
    assert len(firsts) > 2


def test_interleaved_keeps_the_proportions_everywhere() -> None:
    row = KIND[curriculum_order(200, 'interleaved', clusters=KIND)]
    so_far = np.eye(5)[row].cumsum(0)
    ideal = np.arange(1, 201)[:, None] * np.bincount(KIND) / 200
    assert np.abs(so_far - ideal).max() < 2


def test_interleaved_puts_members_in_the_middle_of_their_stretch() -> None:
    for row, want in (([0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 1, 0]), ([0, 0, 0, 0, 1], [0, 0, 1, 0, 0])):
        assert np.array(row)[curriculum_order(len(row), 'interleaved', clusters=row)].tolist() == want


def test_names_of_clusters_may_be_words() -> None:
    order = curriculum_order(4, 'clusters', clusters=['b', 'a', 'b', 'a'])
    assert {frozenset(order[:2].tolist()), frozenset(order[2:].tolist())} == {frozenset({0, 2}), frozenset({1, 3})}


@pytest.mark.parametrize('how, said', [
    (dict(strategy='best'), "strategy 'best' is unknown; it is one of"),
    (dict(strategy='clusters'), "strategy 'clusters' needs clusters"),
    (dict(strategy='easy-to-hard'), "strategy 'easy-to-hard' needs difficulty"),
    (dict(strategy='easy-to-hard', difficulty=[1., np.nan, 2.]), 'difficulty of document 1 is NaN'),
    (dict(strategy='interleaved', clusters=[1, 2]), r'clusters of shape \(2,\) for 3 documents')])
def test_curricula_that_cannot_be(how: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said): curriculum_order(3, **how)


def test_compression_knows_what_it_has_seen() -> None:
    texts = ['close the open file and the socket', 'qwxz kvjy plim', '']
    bare, told = compression_difficulty(texts), compression_difficulty(texts, 'first close the open file and then')
    assert told[0] < .6 * bare[0] and np.isfinite(bare).all()
    noise = RNG.bytes(3000).decode('latin1')
    assert compression_difficulty(['a' * 3000])[0] < .1 < 5 < compression_difficulty([noise])[0]


# Splits

STORY = 'once upon a time a parrot learnt to sum the numbers of a long row of tokens'
PARTS = {'train': .8, 'val': .1, 'test': .1}


def docs(*texts: str, start: int = 0) -> list[Document]:
    return [Document(f'd{i}', t, 'web', '', '') for i, t in enumerate(texts, start)]


def unlike(n: int, start: int = 0) -> list[Document]:
    return docs(*(' '.join(f'w{i}x{j}' for j in range(8)) for i in range(start, start + n)), start=start)


def where(documents: list[Document], **how) -> dict[str, str]:
    parts = split_parts(documents, how.pop('fractions', PARTS), **how)
    return {d.id: k for k, v in parts.items() for d in v}


def test_every_document_in_one_part_by_its_share() -> None:
    many = unlike(4000)
    parts = split_parts(many, PARTS)
    assert sorted(d.id for v in parts.values() for d in v) == sorted(d.id for d in many)
    for k, v in parts.items(): assert abs(len(v) / 4000 - PARTS[k]) < .02
    for v in parts.values(): assert [int(d.id[1:]) for d in v] == sorted(int(d.id[1:]) for d in v)


def test_the_seed_decides_and_the_order_does_not() -> None:
    many = unlike(300)
    assert where(many) == where(many[::-1]) != where(many, seed=1)


def test_new_documents_move_no_old_one() -> None:
    old = [*unlike(300), *docs(STORY, STORY + ' too', start=900)]
    new = [*unlike(500, start=300), *docs(STORY + ' again', start=990)]
    before, after = where(old), where(old + new)
    assert all(after[i] == before[i] for i in before)
    assert after['d990'] == after['d900'] == after['d901']


def test_a_document_that_joins_two_groups_moves_one_of_them() -> None:
    many = [Document(f'd{i}', '', 'web', '', '') for i in range(60)]
    def labelled(n: int) -> dict[str, str]:
        label = [f'g{i // 2}' for i in range(60)]
        if n: label[31] = label[0]                # 30 and 31 part, 31 joins 0 and 1
        return where(many, group=label, near_duplicates=None)
    before, after = labelled(0), labelled(1)
    assert {i for i in before if before[i] != after[i]} <= {'d31'} and after['d31'] == after['d0']


@pytest.mark.parametrize('twin', [STORY, STORY.upper(), STORY + ' again', STORY + '!'])
def test_near_copies_stay_together(twin: str) -> None:
    for s in range(12):
        found = where(docs(STORY, twin), seed=s, fractions={'a': .5, 'b': .5})
        assert found['d0'] == found['d1']
    apart = [where(docs(STORY, twin), seed=s, fractions={'a': .5, 'b': .5}, near_duplicates=None) for s in range(12)]
    assert any(f['d0'] != f['d1'] for f in apart), 'without the look they part'


def test_short_copies_stay_together_too() -> None:
    for s in range(12):
        found = where(docs('open the file', 'Open the file.'), seed=s, fractions={'a': .5, 'b': .5})
        assert found['d0'] == found['d1']


def test_labels_and_copies_join_across() -> None:
    three = docs(STORY, STORY + ' again', 'quite another text of more than five words')
    for s in range(12):
        found = where(three, seed=s, group=['x', 'y', 'y'], fractions={'a': .5, 'b': .5})
        assert len(set(found.values())) == 1


def test_time_puts_the_oldest_first() -> None:
    many = unlike(100)
    when = np.random.default_rng(0).permutation(100)
    parts = split_parts(many, PARTS, time=when)
    t = {k: [int(when[int(d.id[1:])]) for d in v] for k, v in parts.items()}
    assert sorted(t['train']) == list(range(80)) and sorted(t['val']) == list(range(80, 90))
    iso = split_parts(many, PARTS, time=[f'2020-01-{w // 4 + 1:02d}T{w % 4:02d}' for w in when])
    assert iso == parts


def test_a_group_goes_where_its_newest_document_belongs() -> None:
    four = docs(STORY, 'a b c d e f', 'g h i j k l', STORY)
    found = where(four, time=[1, 2, 3, 4], fractions={'old': .5, 'new': .5})
    assert found == {'d0': 'new', 'd1': 'old', 'd2': 'new', 'd3': 'new'}


def test_equal_times_and_empty_parts() -> None:
    same = where(unlike(9), time=[5] * 9)
    assert set(same.values()) == {'train'}
    whole = where(unlike(9), time=range(9), fractions={'train': 1., 'test': 0.})
    assert set(whole.values()) == {'train'}
    assert set(where(unlike(99), fractions={'train': 1., 'test': 0.}).values()) == {'train'}


@pytest.mark.parametrize('how, said', [
    (dict(fractions={'a': .5, 'b': .4}), 'fractions sum to 0.9, not to 1'),
    (dict(fractions={'a': 1.5, 'b': -.5}), "fraction 1.5 of 'a' is not in"),
    (dict(fractions={'a': float('nan'), 'b': 1.}), "fraction nan of 'a'"),
    (dict(fractions={}), 'fractions sum to 0, not to 1'),
    (dict(group=['x']), '1 values of group for 2 documents'),
    (dict(time=[1]), '1 values of time for 2 documents'),
    (dict(time=[1., np.nan]), 'time of document 1 is NaN')])
def test_splits_that_cannot_be(how: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said): where(unlike(2), **how)


def test_ids_must_differ_and_documents_be_there() -> None:
    with pytest.raises(ValueError, match="documents 1 and 2 have the same id 'd1'"):
        where([*unlike(2), *unlike(1, start=1)])
    with pytest.raises(ValueError, match='there are no documents to split'): where([])


# Leaks

def test_leaks_are_shares_of_grams() -> None:
    words = [f'w{i}' for i in range(20)]          # 13 grams of 8 words
    held = docs(' '.join(words), 'something that nobody has ever written down before, I hope', start=50)
    train = docs(' '.join(words[:14]), 'and ' + ' '.join(words[10:]))     # 7 grams, and 3 others
    assert find_leaks(train, held) == [('d50', 10 / 13)]
    assert find_leaks(train, held, share=10 / 13) == [('d50', 10 / 13)]
    assert find_leaks(train, held, share=.8) == []
    assert find_leaks(train[:1], held, share=.5) == [('d50', 7 / 13)]
    assert find_leaks(iter(train), held, ngram=20) == []
    assert find_leaks([], held) == []


def test_worst_leaks_come_first_and_short_texts_count_as_one_gram() -> None:
    words = [f'w{i}' for i in range(20)]
    held = docs(' '.join(words) + ' x y', 'open the file', 'the open file', start=50)
    train = docs(' '.join(words), 'Open the file!')
    assert [i for i, _ in find_leaks(train, held)] == ['d51', 'd50']


def test_an_aware_split_does_not_leak() -> None:
    rng = np.random.default_rng(0)
    base = [' '.join(rng.choice([f'w{i}' for i in range(500)], 40)) for _ in range(150)]
    many = docs(*(t + f' end{k}' for t in base for k in range(3)))
    def told(**how) -> int:
        parts = split_parts(many, {'train': .8, 'held': .2}, **how)
        assert parts['held']
        return len(find_leaks(parts['train'], parts['held']))
    assert told() == 0 and told(near_duplicates=None) > 30


def test_detector_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r'share 0 is not in \(0, 1\]'): find_leaks(unlike(1), unlike(1), share=0)
    with pytest.raises(ValueError, match='there are no held-out documents'): find_leaks(unlike(1), [])
