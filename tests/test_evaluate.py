"""The scorer of the evaluation harness: odd shapes, another route to the same nats, and lm-eval."""
import contextlib
import io
import logging
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmnotes.evaluate.harness import (choice_logprobs, choice_priors, encode_pair, mark_choices,
                                       multiple_choice_accuracy, neutral_queries, paired_difference,
                                       wilson_interval)
from llmnotes.finetune.formats import SPECIALS, benchmark_manager, write_benchmark
from llmnotes.tokenizers.bpe import train_bpe

VERBS = ('Open', 'Close', 'Read', 'Write', 'Parse', 'Format')
THINGS = ('the file.', 'a socket of the server.', 'all lines.', 'the header and its fields.')


@pytest.fixture(scope='module')
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256)).eval()


@pytest.fixture(scope='module')
def questions() -> list[dict]:
    choices = [f'{v} {t}' for v in VERBS for t in THINGS]
    out = []
    for k in range(12):
        name, four = f'mod.f{k}(x)', [choices[(5 * k + 7 * j) % 24] for j in range(4)]
        chat = f'<|im_start|>user\nWhat does `{name}` do?<|im_end|>\n<|im_start|>assistant\n'
        out.append(dict(id=name, query_document=f'{name}\n\n', query_chat=chat, choices=four,
                        gold=k % 4, overlap=.25))
    return out


@pytest.fixture(scope='module')
def tokenizer(questions:list[dict], tmp_path_factory:pytest.TempPathFactory) -> AutoTokenizer:
    folder = tmp_path_factory.mktemp('tokenizer')
    texts = [q['query_document'] + c for q in questions for c in q['choices']]
    train_bpe(texts, 300, special_tokens=SPECIALS).save(folder)
    return AutoTokenizer.from_pretrained(folder)


def by_loss(model:LlamaForCausalLM, context:list[int], choice:list[int]) -> float:
    "The same price from the loss that the model itself computes"
    ids = torch.tensor([[*context, *choice]])
    labels = ids.clone()
    labels[:, :len(context)] = -100
    with torch.no_grad(): return -model(ids, labels=labels).loss.item() * len(choice)


@pytest.mark.parametrize('longest', [0, 5, 12, 40, 500])
@pytest.mark.parametrize('tokens', [1, 30, 4096])
def test_any_rows_and_batches_give_the_same_nats(model, longest:int, tokens:int) -> None:
    "One-token contexts and choices, a context that returns later, a choice that stands twice"
    a, b, c = [7], [3, 4, 5, 6], list(range(10, 40))
    pairs = [(a, [1]), (b, [2, 3]), (a, [9, 9, 9]), (c, [5]), (b, [2, 3]), (b, [8]), (a, c)]
    got = choice_logprobs(model, pairs, tokens=tokens, longest=longest)
    np.testing.assert_allclose(got, [by_loss(model, x, y) for x, y in pairs], atol=1e-4)


def test_what_cannot_be_scored_is_refused(model) -> None:
    assert choice_logprobs(model, []).shape == (0,)
    with pytest.raises(ValueError, match='pair 1 of 2 has no context or no choice'):
        choice_logprobs(model, [([1], [2]), ([1], [])])
    with pytest.raises(ValueError, match='there is no neutral question'):
        choice_priors(model, list, ['a'], [])
    with pytest.raises(ValueError, match='2 rows of scores, 1 right places'):
        mark_choices([[0.], [1.]], [0])
    with pytest.raises(ValueError, match='1 values have no spread'): paired_difference([1], [0])
    with pytest.raises(ValueError, match='1.5 of 3 questions'): wilson_interval(1.5, 3)


def test_length_divides_and_the_first_of_equals_counts() -> None:
    nats, lengths = [[-4., -6., -6.], [-1., -1., -9.]], [[2, 6, 5], [1, 1, 90]]
    assert mark_choices(nats, [0, 1]).tolist() == [1, 0]
    assert mark_choices(nats, [1, 2], lengths).tolist() == [1, 1]


def test_white_space_goes_with_the_word(tokenizer) -> None:
    def encode(text:str) -> list[int]: return tokenizer.encode(text, add_special_tokens=False)
    for context in ('mod.f1(x)\n\n', 'Read: ', 'Read:', 'Read:\t \n'):
        ids, choice = encode_pair(encode, context, 'the file.')
        assert ids == encode(context.rstrip()) and ids + choice == encode(context + 'the file.')


@pytest.mark.parametrize('form', ['document', 'chat'])
def test_marks_are_those_of_lm_eval(model, tokenizer, questions, tmp_path, form:str,
                                    monkeypatch:pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    lm_eval = pytest.importorskip('lm_eval')
    from lm_eval.models.huggingface import HFLM
    for name in ('lm_eval', 'datasets'): logging.getLogger(name).setLevel(logging.ERROR)
    write_benchmark(dict(easy=questions, hard=questions[::-1]), tmp_path)
    common = (tmp_path/'_common').read_text()
    (tmp_path/'_common').write_text(common.replace('acc_norm', 'acc_mutual_info'))
    lm, task = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), f'pydoc_{form}_easy'
    with contextlib.redirect_stderr(io.StringIO()):
        said = lm_eval.evaluate(lm, benchmark_manager(tmp_path).load([task]), bootstrap_iters=100)
    rows = sorted(said['samples'][task], key=lambda r: r['doc_id'])
    nothing = [tokenizer.decode([lm.prefix_token_id])]
    for score in ('acc', 'acc_mutual_info'):
        for longest in (0, 200):
            share, error, marks = multiple_choice_accuracy(
                model, tokenizer, questions, query=f'query_{form}', score=score, neutral=nothing,
                longest=longest)
            assert marks.tolist() == [r[score] for r in rows]
            assert math.isclose(share, said['results'][task][f'{score},none'])
            assert math.isclose(error, said['results'][task][f'{score}_stderr,none'])


def test_a_planted_answer_is_found_by_every_score(tokenizer, questions) -> None:
    "A model that likes the right sentence after its own question, and nothing else"
    planted = {}
    for q in questions:
        ids = tokenizer.encode(q['query_chat'] + q['choices'][q['gold']], add_special_tokens=False)
        for n in range(1, len(ids)): planted[tuple(ids[:n])] = ids[n]
    def knows(x:torch.Tensor) -> torch.Tensor:
        z = torch.zeros(*x.shape, 400)
        for b, row in enumerate(x.tolist()):
            for t in range(len(row)):
                if (y := planted.get(tuple(row[:t + 1]))) is not None: z[b, t, y] = 20.
        return z
    for score in ('acc', 'acc_norm', 'acc_mutual_info'):
        assert multiple_choice_accuracy(knows, tokenizer, questions, score=score)[0] == 1.
    assert all(q.endswith('assistant\n') for q in neutral_queries())
