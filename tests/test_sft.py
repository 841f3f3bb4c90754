"Fine-tuning on a toy: what is refused, what resumes after a kill, and what peft and transformers say"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llmnotes.finetune.formats import encode_chat, pad_batch
from llmnotes.finetune.sft import (METHODS, add_head, answer_nll, check_rows, class_rows, classify,
                                   finetune_memory, pick_nll, plain_nll, plan_batches,
                                   response_loss, train_last, train_sft)
from llmnotes.infer.decoding import tiny_model
from llmnotes.model import Transformer, TransformerConfig
from llmnotes.training.loop import as_batch, scored
from llmnotes.training.losses import token_cross_entropy

TALKS = [[dict(role='user', content=f'What is {n}?'),
          dict(role='assistant', content=f'A number, {n} plus {n}. ' * (1 + n % 3))]
         for n in range(24)]
FAST = dict(dtype=torch.float32, steps=6, batch_size=6)


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp('toy')/'base')


@pytest.fixture(scope='module')
def rows(base) -> list[dict]:
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(base)
    return [encode_chat(t, tok) for t in TALKS]


def opened(folder: Path, **changed):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if not changed: return model
    torch.manual_seed(0)
    config = type(model.config)(**model.config.to_dict() | changed)
    return AutoModelForCausalLM.from_config(config).eval()


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model, nll, batch) -> torch.Tensor:
    model.zero_grad()
    (nll(model, **batch) / scored(batch)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize('tie', [False, True])
def test_short_way_has_the_loss_and_gradient_of_the_long_one(base, rows, tie) -> None:
    model = opened(base, tie_word_embeddings=tie)
    zero = dict(input_ids=[5, 0, 0, 7], labels=[-100, 0, 0, 7])  # id 0 is a token, and learnt
    batch = as_batch(pad_batch([*rows[:5], zero], 0))
    want = token_cross_entropy(model(batch['input_ids'], batch['attention_mask']).logits,
                               batch['labels'])
    torch.testing.assert_close(answer_nll(model, **batch) / scored(batch), want)
    torch.testing.assert_close(gradient(model, answer_nll, batch),
                               gradient(model, plain_nll, batch), atol=1e-6, rtol=1e-5)
    assert pick_nll(model, rows) is answer_nll


def test_a_plain_module_takes_the_long_way_to_equal_losses(base, rows) -> None:
    a, b = opened(base), Transformer.from_pretrained(base)
    assert pick_nll(b, rows) is plain_nll
    got, want = train_sft(b, rows, **FAST), train_sft(a, rows, **FAST)
    np.testing.assert_allclose(got.losses, want.losses, atol=1e-5)


@pytest.mark.parametrize('kind', ['lora', 'prompt', 'prefix'])
def test_adapters_of_peft(base, rows, kind) -> None:
    peft = pytest.importorskip('peft')
    config = dict(lora=lambda: peft.LoraConfig(task_type='CAUSAL_LM', r=4, lora_dropout=.1,
                                               target_modules='all-linear'),
                  prompt=lambda: peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4),
                  prefix=lambda: peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4))
    model = peft.get_peft_model(opened(base), config[kind]())
    assert pick_nll(model, rows) is (answer_nll if kind == 'lora' else plain_nll)
    want = []                                                # peft's own loss, a row at a time
    with torch.no_grad():
        for r in rows[:4]:
            loss = model(torch.tensor([r['input_ids']]), attention_mask=torch.ones(1, len(r['labels'])).long(),
                         labels=torch.tensor([r['labels']])).loss
            want.append(loss.item() * sum(y != -100 for y in r['labels']))
    got = response_loss(model, rows[:4]) * sum(sum(y != -100 for y in r['labels']) for r in rows[:4])
    assert got == pytest.approx(sum(want), rel=1e-4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = train_sft(model, rows, **FAST | dict(lr=1e-2, steps=12), eval_rows=rows)
    assert result.eval_losses[12] < result.eval_losses[0]
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != p.requires_grad, n


def test_accumulation_does_not_change_the_run(base, rows) -> None:
    a, b = opened(base), opened(base)
    one = train_sft(a, rows, **FAST)
    for k in (4, 6):
        many = train_sft(b := opened(base), rows, accumulate=k, **FAST)
        np.testing.assert_allclose(one.losses, many.losses, atol=2e-6)
        np.testing.assert_allclose(flat(a), flat(b), atol=1e-4)
    assert one.tokens == many.tokens


def test_first_loss_is_over_the_learnt_tokens_of_the_whole_step(base, rows) -> None:
    model = opened(base)
    first = plan_batches([len(r['input_ids']) for r in rows], steps=1, batch_size=6)[0]
    want = response_loss(model, [rows[i] for i in first], batch_size=1)
    got = train_sft(model, rows, accumulate=3, **FAST | dict(steps=1))
    assert got.losses[0] == pytest.approx(want, abs=1e-5)
    assert got.tokens == sum(sum(y != -100 for y in rows[i]['labels']) for i in first)


@pytest.mark.parametrize('schedule', ['linear', 'cosine', 'constant'])
def test_schedules_are_those_of_transformers(base, rows, schedule, monkeypatch) -> None:
    from transformers import get_scheduler

    from llmnotes.finetune import sft
    seen, step = [], sft.train_step
    monkeypatch.setattr(sft, 'train_step', lambda *a, share, **kw: seen.append(share) or step(*a, share=share, **kw))
    train_sft(opened(base), rows, schedule=schedule, warmup=.15, **FAST | dict(steps=20))
    name = dict(constant='constant_with_warmup').get(schedule, schedule)
    theirs = get_scheduler(name, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.), 3, 20)
    want = []
    for _ in range(20): want.append(theirs.get_last_lr()[0]); theirs.optimizer.step(); theirs.step()
    np.testing.assert_allclose(seen, want, atol=1e-12)


def test_weight_decay_and_clipping_are_those_of_torch(base, rows) -> None:
    model, other = opened(base), opened(base)
    some = [rows[i] for i in plan_batches([len(r['input_ids']) for r in rows], steps=1, batch_size=6)[0]]
    train_sft(model, rows, weight_decay=.1, max_norm=.5, lr=.01, warmup=0, betas=(.8, .9), **FAST | dict(steps=1))
    groups = [dict(params=[p for p in other.parameters() if p.dim() > 1], weight_decay=.1),
              dict(params=[p for p in other.parameters() if p.dim() < 2], weight_decay=0.)]
    adam = torch.optim.AdamW(groups, lr=.01, betas=(.8, .9))
    batch = as_batch(pad_batch(some, 0))
    gradient(other, plain_nll, batch)
    nn.utils.clip_grad_norm_(other.parameters(), .5)
    adam.step()
    moved = (flat(model) - flat(other)).abs()
    assert (moved > 1e-4).float().mean() < .01                   # the sign of a zero gradient is noise


def test_plan_is_a_function_of_the_seed_and_covers_each_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 37).tolist()
    for bucket in (True, False):
        plan = plan_batches(lengths, steps=15, batch_size=8, bucket=bucket)
        assert len(plan) == 15
        for e in range(3): assert sorted(i for b in plan[5 * e:5 * e + 5] for i in b) == list(range(37))
        assert plan[:5] != plan[5:10]
        assert plan[:7] == plan_batches(lengths, steps=7, batch_size=8, bucket=bucket)
    spans = lambda p: sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in p)
    assert spans(plan_batches(lengths, steps=5, batch_size=8)) < .5 * spans(plan[:5])


CHILD = '''
import sys, torch
from transformers import AutoModelForCausalLM
from llmnotes.finetune import sft
import json, time
torch.set_num_threads(1)
base, folder, rows = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(base)
slow = sft.train_step
def train_step(*a, **kw): time.sleep(.1); return slow(*a, **kw)
sft.train_step = train_step
sft.train_sft(model, rows, steps=60, batch_size=6, dtype=torch.float32, folder=folder, save_every=3)
'''


def test_a_run_that_was_killed_ends_with_the_same_bits(base, rows, tmp_path) -> None:
    (tmp_path/'rows.json').write_text(json.dumps(rows))
    folder = tmp_path/'run'
    child = subprocess.Popen([sys.executable, '-c', CHILD, base, folder, tmp_path/'rows.json'],
                             env=os.environ | {'OMP_NUM_THREADS': '1'})
    try:
        until = time.monotonic() + 120
        while not list(folder.glob('step-*')) and time.monotonic() < until: time.sleep(.02)
    finally:
        child.send_signal(signal.SIGKILL); child.wait()
    at, = [int(p.stem.split('-')[1]) for p in folder.glob('step-*.safetensors')]
    assert 0 < at < 60
    how = dict(steps=60, batch_size=6, dtype=torch.float32)
    whole, again = opened(base), opened(base)
    want = train_sft(whole, rows, **how)
    got = train_sft(again, rows, folder=folder, save_every=3, **how)
    assert got.losses == want.losses and got.tokens == want.tokens
    assert torch.equal(flat(whole), flat(again))
    once_more = opened(base)                                     # a finished run is only read
    assert train_sft(once_more, rows, folder=folder, **how).losses == want.losses
    assert torch.equal(flat(once_more), flat(whole))


def test_dropout_goes_on_with_the_same_draws(base, rows, tmp_path) -> None:
    peft = pytest.importorskip('peft')

    def model():
        torch.manual_seed(3)
        return peft.get_peft_model(opened(base), peft.LoraConfig(task_type='CAUSAL_LM', r=4, lora_dropout=.5,
                                                                 target_modules='all-linear'))

    class Ends(list):
        left = 26

        def __getitem__(self, i):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            return super().__getitem__(i)

    want = train_sft(a := model(), rows, **FAST)
    with pytest.raises(KeyboardInterrupt):
        train_sft(model(), Ends(rows), folder=tmp_path, save_every=2, **FAST)
    saved, = tmp_path.glob('*')
    assert 0 < int(saved.stem.split('-')[1]) < 6
    torch.manual_seed(99)
    got = train_sft(b := model(), rows, folder=tmp_path, **FAST)
    assert got.losses == want.losses and torch.equal(flat(a), flat(b))


def test_only_trained_weights_are_in_the_checkpoint(base, rows, tmp_path) -> None:
    from safetensors import safe_open
    model = opened(base)
    n = train_last(model, 1)
    train_sft(model, rows, folder=tmp_path, **FAST)
    path, = tmp_path.glob('*')
    with safe_open(path, 'pt') as f:
        sizes = [f.get_tensor(k).numel() for k in f.keys() if k.startswith('weight.')]
        assert sum(sizes) == n
        means = [f.get_tensor(k).numel() for k in f.keys() if 'exp_avg' in k]
        assert sum(means) == 2 * n


BAD = {
    'has no learnt token': lambda r: dict(r, labels=[-100] * len(r['labels'])),
    'all labels after the first': lambda r: dict(r, labels=[5] + [-100] * (len(r['labels']) - 1)),
    'input_ids, ': lambda r: dict(r, labels=r['labels'][1:]),
    'holds id 99999': lambda r: dict(r, input_ids=[99999, *r['input_ids'][1:]]),
    'holds id -1': lambda r: dict(r, input_ids=[-1, *r['input_ids'][1:]]),
    'holds label 512': lambda r: dict(r, labels=[*r['labels'][:-1], 512]),
    'the model reads': lambda r: dict(input_ids=[1] * 5000, labels=[1] * 5000)}


@pytest.mark.parametrize('message', BAD)
@pytest.mark.parametrize('where', ['rows', 'eval_rows'])
def test_bad_rows_are_refused_before_anything_happens(base, rows, tmp_path, message, where) -> None:
    model = opened(base)
    bad = [*rows[:5], BAD[message](rows[5])]
    given = dict(rows=bad) if where == 'rows' else dict(rows=rows, eval_rows=bad)
    with pytest.raises(ValueError, match=message) as e:
        train_sft(model, folder=tmp_path/'run', **given, **FAST)
    assert ' 5 ' in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path/'run').exists() and torch.equal(flat(model), flat(opened(base)))


@pytest.mark.parametrize('how, message', [
    (dict(schedule='polynomial'), "'polynomial' is unknown"), (dict(warmup=3), 'warmup 3 is not a share'),
    (dict(accumulate=7), 'accumulate 7'), (dict(accumulate=0), 'accumulate 0'), (dict(steps=0), 'steps 0'),
    (dict(rows=[]), 'there is no row'), (dict(steps=None, epochs=0), 'steps 0'), (dict(batch_size=0), 'batch_size 0')])
def test_bad_settings_are_refused(base, rows, tmp_path, how, message) -> None:
    model = opened(base)
    with pytest.raises(ValueError, match=message):
        train_sft(model, folder=tmp_path/'run', **dict(rows=rows) | FAST | how)
    assert not (tmp_path/'run').exists() and torch.equal(flat(model), flat(opened(base)))


@pytest.mark.parametrize('how', [dict(lr=1e-3), dict(seed=1), dict(batch_size=5), dict(bucket=False),
                                 dict(schedule='cosine'), dict(accumulate=2), dict(steps=7),
                                 dict(weight_decay=.1), dict(max_norm=2.), dict(betas=(.9, .99)),
                                 dict(pad_id=1), dict(dtype=torch.bfloat16), dict(warmup=.5)])
def test_a_folder_of_other_settings_is_refused_and_kept(base, rows, tmp_path, how) -> None:
    train_sft(opened(base), rows, folder=tmp_path, **FAST)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = opened(base)
    with pytest.raises(ValueError, match='was made with'):
        train_sft(model, rows, folder=tmp_path, **FAST | how)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert torch.equal(flat(model), flat(opened(base)))


def test_a_folder_of_other_rows_or_weights_or_of_rubbish_is_refused(base, rows, tmp_path) -> None:
    train_sft(opened(base), rows, folder=tmp_path, **FAST)
    with pytest.raises(ValueError, match='was made with data'):
        train_sft(opened(base), rows[::-1], folder=tmp_path, **FAST)
    model = opened(base); train_last(model, 1)
    with pytest.raises(ValueError, match='was made with trained'):
        train_sft(model, rows, folder=tmp_path, **FAST)
    path, = tmp_path.glob('*')
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match='is damaged'):
        train_sft(opened(base), rows, folder=tmp_path, **FAST)


def test_a_loss_that_is_no_number_ends_the_run(base, rows, tmp_path) -> None:
    model = opened(base)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match='step 0: loss nan'):
        train_sft(model, rows, folder=tmp_path/'run', **FAST)
    assert not (tmp_path/'run').exists()


def test_epochs_and_mode(base, rows) -> None:
    model = opened(base).train()
    done = train_sft(model, rows, epochs=1.5, batch_size=10, dtype=torch.float32, eval_rows=rows[:3], eval_every=2)
    assert len(done.losses) == 5 and list(done.eval_losses) == [0, 2, 4, 5]    # 3 batches an epoch
    assert done.tokens == sum(sum(y != -100 for y in rows[i]['labels']) for b in
                              plan_batches([len(r['input_ids']) for r in rows], steps=5, batch_size=10) for i in b)
    assert not model.training
    model.train(); response_loss(model, rows[:2]); assert model.training


def test_last_layers_only(base, rows) -> None:
    model = opened(base)
    L = model.config.num_hidden_layers
    for k in range(L + 1):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train_last(model, k)
        train_sft(model, rows, **FAST | dict(steps=2, warmup=0))
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        want = {n for n in before if n.startswith(('lm_head', 'model.norm'))
                or any(n.startswith(f'model.layers.{i}.') for i in range(L - k, L))}
        assert moved == want
    with pytest.raises(ValueError, match=f'layers {L + 1} is not in 0 to {L}'): train_last(model, L + 1)


def test_a_new_head_is_that_of_transformers(base, rows) -> None:
    from transformers import AutoModelForSequenceClassification
    texts = [r['input_ids'][:n] for r, n in zip(rows, (1, 9, 4, 13, 2))]
    for tie in (False, True):
        source = opened(base, tie_word_embeddings=tie)
        model = add_head(opened(base, tie_word_embeddings=tie), 3).eval()
        theirs = AutoModelForSequenceClassification.from_config(
            type(source.config)(**source.config.to_dict() | dict(num_labels=3, pad_token_id=0))).eval()
        theirs.model.load_state_dict(source.model.state_dict())
        theirs.score.weight.data = model.get_output_embeddings().weight.data.clone()
        batch = pad_batch([dict(input_ids=[i or 1 for i in t]) for t in texts], 0)
        got = classify(model, class_rows([[i or 1 for i in t] for t in texts]), batch_size=2)
        with torch.no_grad(): torch.testing.assert_close(got, theirs(**batch).logits, atol=1e-5, rtol=1e-4)


def test_a_probe_moves_the_head_alone_and_learns(base) -> None:
    rng = np.random.default_rng(0)
    texts = [[int(i) for i in rng.integers(5, 200, 6)] + [300 + n % 3] for n in range(60)]
    data = class_rows(texts, [n % 3 for n in range(60)])
    model = add_head(opened(base), 3)
    body = flat(model.model).clone()
    train_sft(model, data, epochs=20, batch_size=20, lr=3e-2, dtype=torch.float32)
    assert torch.equal(flat(model.model), body)
    assert (classify(model, data).argmax(1) == torch.arange(60) % 3).float().mean() > .9
    free = add_head(opened(base), 3, freeze=False)
    assert all(p.requires_grad for p in free.parameters())


def test_bad_classes_are_refused(base) -> None:
    with pytest.raises(ValueError, match='1 classes leave no choice'): add_head(opened(base), 1)
    with pytest.raises(ValueError, match='2 texts and 1 classes'): class_rows([[1], [2]], [0])
    with pytest.raises(ValueError, match='text 1 is empty'): class_rows([[1], []], [0, 1])
    model = add_head(opened(base), 3)
    with pytest.raises(ValueError, match='row 0 holds label 3'):
        train_sft(model, class_rows([[1, 2]], [3]), **FAST)


def test_memory_is_what_tensors_hold() -> None:
    config = TransformerConfig(vocab_size=97, n_layer=3, n_embd=32, n_head=4, n_kv_head=2, n_hidden=48)
    model = Transformer(config)
    parts = finetune_memory(config, 'full, float32')
    assert parts['weights'] == sum(p.nbytes for p in model.parameters())
    assert parts['optimizer'] == 2 * parts['gradients'] == 2 * parts['weights']
    mixed, lora = finetune_memory(config, 'full, mixed'), finetune_memory(config, 'LoRA', r=2)
    assert mixed['weights'] == 1.5 * parts['weights']
    pairs = 3 * 2 * sum(sum(m.weight.shape) for m in model.layers[0].modules() if isinstance(m, nn.Linear))
    assert lora['gradients'] == 4 * pairs
    assert lora['weights'] == sum(p.numel() for p in model.parameters()) * 2 + 4 * pairs
    sizes = [sum(finetune_memory(config, m, r=1, T=1).values()) for m in METHODS]
    assert sizes[4] > sizes[5]
    one, two = (finetune_memory(config, 'LoRA', B=b)['activations'] for b in (1, 2))
    assert two == 2 * one
    with pytest.raises(ValueError, match="'lora' is unknown"): finetune_memory(config, 'lora')
    with pytest.raises(ValueError, match='rank is 0'): finetune_memory(config, 'LoRA', r=0)


def test_check_rows_looks_at_all() -> None:
    good = dict(input_ids=[1, 2], labels=[-100, 2])
    check_rows([good] * 3, vocab_size=3, max_len=2)
    with pytest.raises(ValueError, match='question 2 has 2 input_ids, 1 labels'):
        check_rows([good, good, dict(good, labels=[1])], name='question')
    check_rows([dict(good, labels=[9, 2])], vocab_size=3, n_labels=3)    # never predicted
    with pytest.raises(ValueError, match='row 0 holds label 2; the model has 0 to 1'):
        check_rows([good], vocab_size=3, n_labels=2)


def test_banking77_probe_and_all_weights(shared, base) -> None:
    "On a body that knows nothing: the probe is above chance, and training all weights above the probe"
    import csv

    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(base)
    with open(shared/'banking77'/'train.csv') as f: table = list(csv.DictReader(f))
    names = sorted({r['category'] for r in table})[:10]
    table = [r for r in table if r['category'] in names]
    order = np.random.default_rng(0).permutation(len(table))
    texts = [tok.encode(table[i]['text'], add_special_tokens=False)[:48] for i in order]
    classes = [names.index(table[i]['category']) for i in order]
    train, test = class_rows(texts[200:], classes[200:]), class_rows(texts[:200], classes[:200])
    share = {}
    for freeze, lr in ((True, 3e-2), (False, 2e-3)):
        model = add_head(opened(base), 10, freeze=freeze)
        train_sft(model, train, epochs=6, batch_size=32, lr=lr, dtype=torch.float32)
        share[freeze] = float((classify(model, test).argmax(1) == torch.tensor(classes[:200])).float().mean())
    most = max(np.bincount(classes[:200])) / 200
    assert share[True] > most + .1, (share, most)
    assert share[False] > share[True] + .1, share
