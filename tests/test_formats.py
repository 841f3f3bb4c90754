"Instruction data of other people: formats there and back, what is malformed, packing, filtering"
import copy
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from llmnotes.finetune import conversion, packing, synthesis
from llmnotes.finetune.conversion import FORMATS, Conversation, convert, read_format, read_rows, write_format


def user(text: str) -> dict: return dict(role='user', content=text)
def bot(text: str) -> dict: return dict(role='assistant', content=text)


ADD = dict(name='add', parameters=dict(type='object', required=['a']))
CALL = dict(role='assistant', content='', tool_calls=[dict(name='add', arguments=dict(a=1, b='</tool_call>'))])
USES = Conversation([user('1 + 2?'), CALL, dict(role='tool', content='3'), bot('3')], tools=[ADD], system='Be brief.')
ROWS = {'alpaca': dict(instruction='a', input='b', output='c', system='s', history=[['d', 'e']], id=1),
        'alpaca ranking': dict(instruction='a', input='', chosen='c', rejected='d'),
        'alpaca kto': dict(instruction='a', input='', output='c', kto_tag=False),
        'sharegpt': dict(conversations=[{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}], system='s'),
        'sharegpt ranking': dict(conversations=[{'from': 'human', 'value': 'a'}], chosen={'from': 'gpt', 'value': 'b'},
                                 rejected={'from': 'gpt', 'value': 'c'}),
        'sharegpt tools': write_format(USES, 'sharegpt'), 'messages tools': write_format(USES, 'messages'),
        'messages': dict(messages=[dict(role='system', content='s'), user('a'), bot('b')], id=3),
        'messages ranking': dict(prompt=[user('a')], chosen=[bot('b')], rejected=[bot('c')]),
        'messages kto': dict(prompt=[user('a')], completion=[bot('b')], label=True),
        'chatml': dict(text='<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n')}


@pytest.mark.parametrize('name', ROWS)
def test_a_row_comes_back_as_it_was(name: str) -> None:
    row = ROWS[name]
    talk = read_format(json.loads(json.dumps(row)))
    assert write_format(talk, name.split()[0]) == row
    for other in FORMATS:
        try: there = write_format(talk, other)
        except ValueError as e: assert 'has no place for' in str(e); continue
        assert read_format(json.loads(json.dumps(there))) == talk


STRANGE = [None, 5, '', 'x', [], {}, [1], ['x'], {'a': 1}, True, '{', '[1]', [[]], [None]]


def spoilt(row: object, rng: random.Random) -> object:
    "The row with one value somewhere in it replaced, or a key taken away"
    row = copy.deepcopy(row)
    places, todo = [], [row]
    while todo:
        x = todo.pop()
        keys = list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else []
        for k in keys: places.append((x, k)); todo.append(x[k])
    where, k = rng.choice(places)
    if isinstance(where, dict) and rng.random() < .3: del where[k]
    else: where[k] = copy.deepcopy(rng.choice(STRANGE))
    return row


@pytest.mark.parametrize('name', ROWS)
def test_what_is_malformed_is_a_sentence_and_not_a_crash(name: str) -> None:
    rng, refused = random.Random(name), 0
    for _ in range(1500):
        row = spoilt(ROWS[name], rng)
        for format in ('', name.split()[0]):
            try: talk = read_format(row, format)
            except ValueError as e: refused += 1; assert str(e); continue
            for other in FORMATS:
                try: write_format(talk, other)
                except ValueError as e: assert str(e)
    assert refused > 300


@pytest.mark.parametrize('row', [None, 5, 'x', [], {}, {'a': 1}, {5: 1}])
@pytest.mark.parametrize('format', ['', *FORMATS])
def test_what_is_no_row_is_refused(row: object, format: str) -> None:
    with pytest.raises(ValueError): read_format(row, format)
    with pytest.raises(ValueError, match='is unknown; it is one of alpaca'): read_format({}, 'dolly')


def test_order_and_format_are_not_guessed() -> None:
    for talk, said in [([bot('a')], 'message 0 is of the assistant'), ([user('a'), user('b'), bot('c')], 'message 1'),
                       ([user('a'), bot('b'), bot('c')], 'message 2')]:
        with pytest.raises(ValueError, match=said): conversion.validate(Conversation(talk))
    with pytest.raises(ValueError, match='are of alpaca and chatml'): read_format(ROWS['alpaca'] | ROWS['chatml'])


@pytest.mark.parametrize('piece', [8, 9, 13, 64, 1000])
def test_a_list_is_read_in_pieces_of_any_size(tmp_path: Path, piece: int) -> None:
    rows = [dict(a='[{"'), 'é世👋\\"', 12345, -1.5e-7, None, True, [], {}, [[1], '],']]
    path = tmp_path/'list.json'
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), '\n ' + json.dumps(rows) + '\n'):
        path.write_text(text)
        assert list(conversion._elements(path, piece)) == rows
    for cut in range(1, len(text.rstrip()) - 1, 7):
        path.write_text(text.rstrip()[:cut + 1])
        with pytest.raises(ValueError, match='list.json, row'): list(conversion._elements(path, piece))
    path.write_text('[1, nonsense, 2]')
    with pytest.raises(ValueError, match='row 2 has no end'): list(read_rows(path))


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    empty = json.dumps(dict(instruction='a', output=''))
    lines = [json.dumps(ROWS['alpaca']), '', '{', empty, '[1]', json.dumps(ROWS['chatml'])]
    (tmp_path/'in.jsonl').write_text('\ufeff' + '\r\n'.join(lines))
    report = convert(tmp_path/'in.jsonl', tmp_path/'out.jsonl', 'messages', skip_bad=True, show=2)
    assert (report['read'], report['written'], report['skipped'], len(report['bad'])) == (5, 2, 3, 2)
    assert report['bad'][0].startswith('row 3: is no JSON') and 'row 4: message 1' in report['bad'][1]
    assert len(list(read_rows(tmp_path/'out.jsonl'))) == 2
    before = (tmp_path/'out.jsonl').read_bytes()
    with pytest.raises(ValueError, match=r'in\.jsonl, row 3'):
        convert(tmp_path/'in.jsonl', tmp_path/'out.jsonl', 'alpaca')
    assert (tmp_path/'out.jsonl').read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in.jsonl', 'out.jsonl']


def test_tools_in_words_come_back() -> None:
    rng = random.Random(0)
    bits = ['<tool_call>', '</tool_call>', '\n', '"', '\\', '{', '世', '<|im_end|>', 'x']
    for _ in range(300):
        words = [''.join(rng.choices(bits, k=5)) for _ in range(rng.randint(2, 4))]
        calls = [dict(name='f', arguments={w: words[0], 'n': rng.random()}) for w in words[1:]]
        assert conversion.parse_calls('Well. ' + conversion.call_text(calls)) == ('Well.', calls)
    plain = conversion.plain_messages(USES)
    assert [m['role'] for m in plain] == ['system', 'user', 'assistant', 'user', 'assistant']
    asks, says = CALL | dict(tool_calls=2 * CALL['tool_calls']), dict(role='tool', content='<x>')
    two = Conversation([user('?'), asks, says, says, bot('3')], tools=[ADD])
    assert conversion.plain_messages(two)[3]['content'].count('<tool_response>') == 2
    with pytest.raises(ValueError, match='writes a mark of tools'):
        conversion.plain_messages(Conversation([user('</tool_response>'), bot('a')], tools=[ADD]))


# Files that others wrote

def test_demo_files_come_back(shared: Path, tmp_path: Path) -> None:
    "Every row of three real files, through every format that holds it"
    for name, kind in [('instruction-rasbt/instruction-data.json', 'sft'),
                       ('preference-rasbt/instruction-data-with-preference.json', 'ranking'),
                       ('fastchat/dummy_conversation.json', 'sft')]:
        rows, ways = [row for _, row in read_rows(shared/name)], 0
        assert rows == json.loads((shared/name).read_text())
        same = [row for row in rows if kind == 'ranking' and row['chosen'] == row['rejected']]
        for row in same:
            with pytest.raises(ValueError, match='chosen and rejected are the same'): read_format(row)
        n, rows = len(rows), [row for row in rows if row not in same]
        for row in rows:
            talk = read_format(row)
            assert talk.kind == kind and write_format(talk, conversion.detect_format(row)) == row
            for a, b in itertools.permutations(('alpaca', 'sharegpt', 'messages'), 2):
                there = write_format(read_format(write_format(talk, a), a), b)
                assert read_format(there, b) == talk
                ways += 1
        assert ways == 6 * len(rows) > 2000
        report = convert(shared/name, tmp_path/'out.jsonl', 'sharegpt', skip_bad=True)
        assert (report['read'], report['written'], report['skipped']) == (n, len(rows), len(same))
        assert len(same) < 10


def test_seed_tasks_of_self_instruct(shared: Path) -> None:
    "The 175 tasks read as tasks, and are continued"
    lines = [row for _, row in read_rows(shared/'self-instruct/seed_tasks.jsonl')]
    seeds = [synthesis.Task(r['instruction'], *(r['instances'][0][k] for k in ('input', 'output'))) for r in lines]
    assert len(seeds) == 175
    text = synthesis.task_prompt(seeds[:8]).partition('Instruction:')[2].removesuffix('Task 9\nInstruction:')
    assert [t.instruction for t in synthesis.parse_tasks(text)] == [s.instruction.strip() for s in seeds[:8]]
    pool = synthesis.RougePool((s.instruction for s in seeds), most=320)
    scores = np.stack([pool.scores(s.instruction) for s in seeds])
    assert np.allclose(scores, scores.T) and np.allclose(scores.diagonal(), 1)
    alike = (np.sort(scores, 1)[:, -2] >= .7).sum()
    assert 0 < alike < 10, 'people wrote a few that the filter would not take from a model'


# Packing

def test_a_packed_row_is_its_rows() -> None:
    rng = random.Random(1)
    for _ in range(60):
        rows = [dict(input_ids=[rng.randint(1, 9) for _ in range(n)], labels=[rng.choice([-100, 5]) for _ in range(n)])
                for n in (rng.randint(1, 20) for _ in range(rng.randint(1, 30)))]
        T = rng.randint(20, 50)
        p = packing.pack_rows(rows, T, pad_id=0)
        assert len({v.shape for v in p.values()}) == 1 and p['labels'].shape[1] == T
        for i, row in enumerate(rows):
            here = p['document_ids'] == i
            assert p['input_ids'][here].tolist() == row['input_ids']
            assert p['labels'][here].tolist() == [-100, *row['labels'][1:]]
            assert p['position_ids'][here].tolist() == list(range(len(row['input_ids'])))
        free = p['document_ids'] == -1
        assert (p['labels'][free] == -100).all() and (p['input_ids'][free] == 0).all()
        bound = -(-sum(len(r['input_ids']) for r in rows) // T)
        assert bound <= len(p['labels']) <= 11 / 9 * max(bound, 1) * 1.5 + 1
        allowed = packing.block_mask(p['document_ids'])[:, 0] == 0
        b, t, s = rng.randrange(len(allowed)), rng.randrange(T), rng.randrange(T)
        assert bool(allowed[b, t, s]) == (s <= t and bool(p['document_ids'][b, t] == p['document_ids'][b, s]))
        assert allowed.diagonal(dim1=1, dim2=2).all()
    assert packing.cu_seqlens(torch.tensor([[0, 0, 1], [1, 1, -1]])).tolist() == [0, 2, 3, 5, 6]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_the_mask_is_finite_in_its_own_type(dtype: torch.dtype) -> None:
    mask = packing.block_mask(torch.tensor([[0, 0, 1]]), dtype)
    assert mask.dtype == dtype and torch.isfinite(mask).all() and mask.min() == torch.finfo(dtype).min


def test_turns_that_touch_the_end() -> None:
    row = dict(input_ids=[1, 2, 3, 4, 5], labels=[1, -100, 3, 4, -100])
    assert packing.keep_turns(row, [0])['labels'] == [1, -100, -100, -100, -100]
    assert packing.keep_turns(row, [-1])['labels'] == [-100, -100, 3, 4, -100]
    assert packing.keep_turns(row, iter([0, 1])) == row
    assert row['labels'] == [1, -100, 3, 4, -100]
    for bad in (2, -3):
        with pytest.raises(ValueError, match=f'no answer {bad}: the conversation has 2'): packing.keep_turns(row, [bad])


# Making and filtering

def test_rouge_of_long_texts_carries() -> None:
    rng = random.Random(2)
    texts = [' '.join(rng.choices('abc', k=rng.randint(0, 190))) for _ in range(60)]
    pool = synthesis.RougePool(texts)
    for text in texts:
        want = [synthesis.rouge_l(t, text) for t in texts]
        assert np.allclose(pool.scores(text), want, atol=1e-12)
    far = 'x ' + 'y ' * 129 + 'x'                       # the carry crosses a whole integer
    assert synthesis.RougePool([far]).scores('x')[0] == synthesis.rouge_l(far, 'x') == 2 / 132
    pool.add('a new one')
    assert pool.scores('a new one')[-1] == 1 and len(pool) == 61


def test_filters_at_their_edges() -> None:
    angle = np.arange(4) * .3
    chain = np.stack([np.cos(angle), np.sin(angle)], 1)
    for block in (1, 2, 512):
        assert synthesis.keep_distinct(np.eye(3), 0., block=block).tolist() == [0]
        assert synthesis.keep_distinct(np.eye(3), 1e-6, block=block).tolist() == [0, 1, 2]
        assert synthesis.keep_distinct(np.ones((3, 1)), 1., block=block).tolist() == [0]
        assert synthesis.keep_distinct(chain, np.cos(.4), block=block).tolist() == [0, 2]
    for bad in (float('nan'), 2.):
        with pytest.raises(ValueError): synthesis.keep_distinct(np.eye(2), bad)
    rows = [dict(question='q', answer='As an AI language model, no.')] * 3
    assert synthesis.curate(rows, pytest.fail, count=len) == ([], {'refusal: as a model': 3})
    assert synthesis.curate([], pytest.fail, count=len)[0] == []


def test_refusals_are_no_questions_about_them() -> None:
    for answer in ('Return True if the file cannot be read.', 'The word is "sorry".', 'None', 'No'):
        assert bool(synthesis.why_refusal(answer)) == (answer == 'None')


def test_only_whole_tasks_are_taken() -> None:
    assert synthesis.parse_tasks('') == [None]
    assert synthesis.parse_tasks(' a b c\nInput: <none>\nOutput: x', whole=False) == []
    task = synthesis.Task('Do this now', '', 'x')
    for change, why in [(dict(instruction='Do this'), 'too short'), (dict(instruction='a ' * 151), 'too long'),
                        (dict(instruction='1. Do this'), 'no letter'),
                        (dict(instruction='Draw me a map'), 'more than text'),
                        (dict(output=''), 'no output'), (dict(input='x'), 'copies'), (dict(output='N/A'), 'refusal')]:
        assert why in synthesis.why_bad_task(task._replace(**change))
    assert synthesis.why_bad_task(task) == synthesis.why_bad_task(task._replace(instruction='a ' * 150)) == ''
