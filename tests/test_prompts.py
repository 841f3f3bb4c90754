"Soft prompts: equal to peft's on every shape of model, trained and stored without loss, refused with reasons"
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from llmnotes.finetune.prompts import (PrefixTuning, PromptTuning, PTuning, gated_mixture,
                                       prefix_of, prefix_width, soft_prompt_parameters,
                                       unpack_prefix)
from llmnotes.finetune.sft import train_sft

pytest.importorskip('transformers')
SHAPES = {
    'plain': dict(num_attention_heads=4, num_key_value_heads=4),
    'grouped': dict(num_attention_heads=4, num_key_value_heads=2),
    'one head for all': dict(num_attention_heads=4, num_key_value_heads=1),
    'wide heads': dict(num_attention_heads=4, num_key_value_heads=2, head_dim=12),
    'tied': dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)}
METHODS = {
    'prompt': (PromptTuning, {}), 'mlp': (PTuning, dict(hidden=6)),
    'lstm': (PTuning, dict(encoder='lstm', hidden=6)), 'v2': (PrefixTuning, {}),
    'prefix': (PrefixTuning, dict(reparameterise=True, hidden=6))}


def model(**shape):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    shape = SHAPES['grouped'] | shape
    return LlamaForCausalLM(LlamaConfig(**dict(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        max_position_embeddings=40, initializer_range=.2, pad_token_id=0, bos_token_id=None,
        eos_token_id=None) | shape)).eval()


def made(name: str, base=None, n: int = 3, seed: int = 1):
    cls, how = METHODS[name]
    out = cls(base or model(), n, seed=seed, **how)
    with torch.no_grad(): out.embedding.add_(.3)             # away from where it begins
    return out


def texts(B: int = 2, T: int = 6) -> torch.Tensor:
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(m, x, mask=None): return m(input_ids=x, attention_mask=mask).logits


def theirs(name: str, base):
    peft = pytest.importorskip('peft')
    how = dict(task_type='CAUSAL_LM', num_virtual_tokens=3)
    config = {'prompt': lambda: peft.PromptTuningConfig(**how),
              'mlp': lambda: peft.PromptEncoderConfig(encoder_hidden_size=6, **how),
              'lstm': lambda: peft.PromptEncoderConfig(encoder_hidden_size=6,
                  encoder_reparameterization_type='LSTM', **how),
              'v2': lambda: peft.PrefixTuningConfig(**how),
              'prefix': lambda: peft.PrefixTuningConfig(encoder_hidden_size=6,
                  prefix_projection=True, **how)}[name]()
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('shape', SHAPES)
def test_equal_to_peft_on_copied_weights(name, shape) -> None:
    "Logits, loss, every gradient, and the count, for five shapes of model"
    base = model(**SHAPES[shape])
    ref, ours = theirs(name, deepcopy(base)), made(name, deepcopy(base))
    pairs = list(zip(ref.prompt_encoder.default.parameters(),
                     [ours.embedding, *ours.encoder.parameters()], strict=True))
    with torch.no_grad():
        for a, b in pairs: b.copy_(a)
    x = texts()
    labels = x.masked_fill(torch.arange(6) < 2, -100)
    mask = torch.ones_like(x)
    mask[1, 4:], labels[1, 4:] = 0, -100                     # the second row is shorter
    want = ref(input_ids=x, attention_mask=mask, labels=labels)
    got = ours(x, mask, labels)
    real = mask.bool()
    assert torch.allclose(got.logits[real], want.logits[:, -6:][real], atol=1e-5)
    assert torch.allclose(got.loss, want.loss, atol=1e-5)
    want.loss.backward(); got.loss.backward()
    for a, b in pairs: assert torch.allclose(a.grad, b.grad, atol=1e-5)
    assert any(b.grad.abs().max() > 1e-4 for _, b in pairs)
    assert ref.get_nb_trainable_parameters()[0] == sum(b.numel() for _, b in pairs)


@pytest.mark.parametrize('name', METHODS)
def test_padding_does_not_matter(name) -> None:
    m, x = made(name), texts()
    want, pad = logits(m, x), torch.zeros(2, 4).long()
    ones = torch.ones_like(x)
    assert torch.allclose(logits(m, torch.cat((pad, x), 1), torch.cat((pad, ones), 1))[:, 4:],
                          want, atol=2e-5)
    assert torch.allclose(logits(m, torch.cat((x, pad), 1), torch.cat((ones, pad), 1))[:, :6],
                          want, atol=2e-5)
    rows = torch.cat([logits(m, row[None]) for row in x])
    assert torch.allclose(rows, want, atol=2e-5)


@pytest.mark.parametrize('name', METHODS)
def test_generates_what_a_loop_without_cache_generates(name) -> None:
    m, x = made(name), texts()
    ids = x
    for _ in range(5): ids = torch.cat((ids, logits(m, ids)[:, -1:].argmax(-1)), 1)
    assert torch.equal(m.generate(x, max_new_tokens=5, do_sample=False), ids)
    assert torch.equal(m.generate(x, max_length=11, do_sample=False), ids)
    pad = torch.zeros(2, 3).long()
    left = m.generate(torch.cat((pad, x), 1), torch.cat((pad, torch.ones_like(x)), 1),
                      max_new_tokens=5, do_sample=False)
    assert torch.equal(left[:, 3:], ids)


@pytest.mark.parametrize('name', METHODS)
def test_trains_the_prompt_and_nothing_else(name) -> None:
    base = model()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    m = made(name, base)
    start = m.prompt().detach().clone()
    rows = [dict(input_ids=r.tolist(), labels=[-100, -100, *r[2:].tolist()]) for r in texts(8)]
    result = train_sft(m, rows, steps=30, lr=.1, batch_size=8, dtype=torch.float32)
    assert result.losses[-1] < result.losses[0] - .1
    assert not torch.equal(m.prompt(), start)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


@pytest.mark.parametrize('name', METHODS)
def test_trains_with_products_in_bfloat16(name) -> None:
    "The prompt is kept in float32 and cast where it is used"
    rows = [dict(input_ids=r.tolist(), labels=r.tolist()) for r in texts(4)]
    result = train_sft(made(name), rows, steps=2, dtype=torch.bfloat16)
    assert torch.tensor(result.losses).isfinite().all() and len(result.losses) == 2
    half = made(name, model().bfloat16())
    assert half.embedding.dtype == torch.float32
    assert logits(half, texts()).dtype == torch.bfloat16


@pytest.mark.parametrize('name', METHODS)
def test_files_go_both_ways(name, tmp_path: Path) -> None:
    peft = pytest.importorskip('peft')
    base, x = model(), texts()
    ours = made(name, deepcopy(base))
    want = logits(ours, x)
    ours.save_pretrained(tmp_path/'ours')
    opened = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path/'ours')
    assert torch.allclose(logits(opened, x)[:, -6:], want, atol=1e-5)
    ref = theirs(name, deepcopy(base))
    ref.save_pretrained(tmp_path/'peft')
    cls = METHODS[name][0]
    read = cls.from_pretrained(deepcopy(base), tmp_path/'peft')
    assert torch.allclose(logits(read, x), logits(ref, x)[:, -6:], atol=1e-5)
    again = cls.from_pretrained(deepcopy(base), tmp_path/'ours')
    assert torch.equal(logits(again, x), logits(ours.bake(), x))
    again.save_pretrained(tmp_path/'again')
    for file in ('adapter_config.json', 'adapter_model.safetensors'):
        assert (tmp_path/'again'/file).read_bytes() == (tmp_path/'ours'/file).read_bytes()


def test_words_are_words() -> None:
    base, x, words = model(), texts(), [7, 8, 9]
    want = logits(base, torch.cat((torch.tensor([words] * 2), x), 1))[:, 3:]
    for cls in (PromptTuning, PrefixTuning):
        assert torch.allclose(logits(cls(base, 3, init=words), x), want, atol=2e-5)
    cut = PromptTuning(base, 2, init=words).embedding.data
    assert torch.equal(cut, base.get_input_embeddings().weight[[7, 8]])
    long = PromptTuning(base, 5, init=words).embedding.data
    assert torch.equal(long, base.get_input_embeddings().weight[[7, 8, 9, 7, 8]])
    drawn = PromptTuning(base, 5, init='vocab', seed=4).embedding.data
    table = base.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in drawn)


def test_packing_is_the_inverse_of_unpacking() -> None:
    base = model(head_dim=12)
    packed = torch.arange(2. * prefix_width(base.config)).view(2, -1)
    cache = unpack_prefix(packed, base.config, 3)
    assert cache.layers[1].values.shape == (3, 2, 2, 12)
    assert cache.layers[0].keys[0, 0, 0, 1] == 1             # keys of layer 0 come first
    assert cache.layers[0].values[0, 0, 0, 0] == 24          # then its values
    assert cache.layers[1].keys[2, 1, 1, 0] == prefix_width(base.config) + 48 + 12
    words = base.get_input_embeddings().weight.detach()[[5, 6, 9]]
    with torch.no_grad(): short, long = prefix_of(base, words[:2]), prefix_of(base, words)
    assert torch.allclose(short, long[:2], atol=1e-5)        # nothing looks ahead
    with torch.no_grad(): cache = base(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    for mine, layer in zip(unpack_prefix(short, base.config).layers, cache.layers, strict=True):
        assert torch.allclose(mine.keys, layer.keys, atol=1e-5)
        assert torch.allclose(mine.values, layer.values, atol=1e-5)


def test_gate_at_its_edges() -> None:
    q, P = torch.ones(1, 2), (torch.zeros(1, 2), torch.full((1, 2), 5.))
    for score, want in ((-1e3, 1.), (1e3, 0.), (0., .5)):    # of the only token of the text
        text = torch.full((1, 2), score / 2), torch.zeros(1, 2)
        mixed, lam = gated_mixture(q, P, text)
        assert lam.item() == pytest.approx(want) and mixed[0, 0].item() == pytest.approx(5 * want)


def test_seeds_are_kept_apart_from_the_world() -> None:
    "The same seed draws the same prompt, and no other draw is disturbed"
    for name in METHODS:
        torch.manual_seed(5)
        a = made(name, seed=1).prompt()
        after = torch.rand(1)
        torch.manual_seed(9)
        b = made(name, seed=1).prompt()
        assert torch.equal(a, b) and not torch.equal(a, made(name, seed=2).prompt())
        torch.manual_seed(0); model()                        # the base draws, the prompt does not
        assert torch.equal(after, torch.rand(1))


@pytest.fixture
def stored(tmp_path: Path) -> Path: return made('v2').save_pretrained(tmp_path/'p')


def refused(folder, said: str, cls=PrefixTuning, **shape) -> None:
    base = model(**shape)
    with pytest.raises(ValueError, match=said): cls.from_pretrained(base, folder)
    assert all(p.requires_grad for p in base.parameters())   # not even frozen


def test_refuses_other_bases_with_their_sizes(stored, tmp_path) -> None:
    refused(stored, r'another base: num_layers 2 \(here 3\)', num_hidden_layers=3)
    refused(stored, r'num_attention_heads 2 \(here 1\), token_dim 16 \(here 8\)',
            num_key_value_heads=1)
    made('prompt').save_pretrained(tmp_path/'q')
    refused(tmp_path/'q', r'token_dim 32 \(here 64\)', PromptTuning, hidden_size=64)
    refused(tmp_path/'q', 'an adapter PROMPT_TUNING, not PREFIX_TUNING')


def test_refuses_damaged_files_at_every_length(stored) -> None:
    file = stored/'adapter_model.safetensors'
    whole = file.read_bytes()
    for n in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        refused(stored, 'adapter_model.safetensors is damaged')
    file.write_bytes(whole)
    config = stored/'adapter_config.json'
    text = config.read_text()
    config.write_text(text[:-9]); refused(stored, 'adapter_config.json is damaged')
    config.write_text('[]'); refused(stored, 'an adapter None')
    config.write_text(json.dumps(json.loads(text) | dict(num_virtual_tokens=4)))
    refused(stored, r'prompt_embeddings of \(3, 64\), not \(4, 64\)')
    config.write_text(text)
    from safetensors.torch import save_file
    save_file({'lora_A': torch.zeros(2)}, file)
    refused(stored, 'has no prompt_embeddings, but lora_A')
    file.unlink()
    with pytest.raises(FileNotFoundError): PrefixTuning.from_pretrained(model(), stored)


def test_a_write_that_fails_leaves_no_pair_that_loads_wrongly(stored, monkeypatch) -> None:
    "Without a config there is no adapter: old weights never meet a new config"
    from llmnotes.finetune import prompts
    def full(path, data): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(prompts, 'write_atomic', full)
    with pytest.raises(OSError, match='No space'): made('v2', n=5).save_pretrained(stored)
    with pytest.raises(FileNotFoundError): PrefixTuning.from_pretrained(model(), stored)


def test_refuses_what_cannot_be() -> None:
    base = model()
    for cls, n, how, said in [
            (PromptTuning, 0, {}, 'n_tokens is 0; it is 1 to 39'),
            (PrefixTuning, -1, {}, 'n_tokens is -1'), (PTuning, 40, {}, 'n_tokens is 40'),
            (PromptTuning, 2, dict(init=[61]), r'0 to 60, not at \[61\]'),
            (PrefixTuning, 2, dict(init=[-1]), r'not at \[-1\]'),
            (PrefixTuning, 2, dict(init=[3], reparameterise=True), 'begin at words'),
            (PTuning, 2, dict(encoder='rnn'), 'mlp or lstm'),
            (PTuning, 2, dict(hidden=0), '0 hidden units'),
            (PrefixTuning, 2, dict(reparameterise=True, hidden=-2), '-2 hidden units')]:
        with pytest.raises(ValueError, match=said): cls(base, n, **how)
    m = made('v2', n=35)
    assert logits(m, texts(T=5)).shape == (2, 5, 61)
    with pytest.raises(ValueError, match='35 positions of prompt and 6 of text'): m(texts())
    with pytest.raises(ValueError, match='7 of text'): m.generate(texts(T=5), max_new_tokens=2)


def test_counts() -> None:
    config = model().config
    for name, (cls, _) in METHODS.items():
        said = dict(deep=cls is PrefixTuning, hidden=6,
                    encoder=dict(mlp='mlp', lstm='lstm', prefix='mlp').get(name, ''))
        have = sum(p.numel() for p in made(name).parameters() if p.requires_grad)
        assert have == soft_prompt_parameters(config, 3, **said), name
    assert soft_prompt_parameters(config, 3) == 3 * 32
    assert soft_prompt_parameters(config, 3, deep=True) == 3 * 2 * 2 * 2 * 8


def test_on_our_own_model(tmp_path: Path) -> None:
    "A Transformer of these notebooks is a Llama folder, and takes a prompt as such"
    from transformers import AutoModelForCausalLM

    from llmnotes.model import Transformer, TransformerConfig
    torch.manual_seed(0)
    own = Transformer(TransformerConfig(vocab_size=61, n_layer=2, n_embd=32, n_head=4, n_kv_head=2))
    base = AutoModelForCausalLM.from_pretrained(own.save_pretrained(tmp_path/'own'))
    with torch.no_grad(): want = own(torch.cat((torch.tensor([[7, 8, 9]] * 2), texts()), 1))[:, 3:]
    assert torch.allclose(logits(PrefixTuning(base, 3, init=[7, 8, 9]), texts()), want, atol=2e-5)


def test_learns_the_names_of_banking_intents(shared) -> None:
    "Two intents of real questions, by bytes: a prefix steers even a random toy towards their names"
    import csv
    file = next((shared/'banking77').rglob('*train*.csv'), None)
    if file is None: pytest.skip('banking77 has no train.csv here')
    with open(file, encoding='utf-8') as f: rows = list(csv.DictReader(f))
    names = sorted({r['category'] for r in rows})[:2]
    some = [[r for r in rows if r['category'] == name][:8] for name in names]
    data = [dict(input_ids=[*r['text'].encode()[:20], 300 + k], labels=[-100] * len(
        r['text'].encode()[:20]) + [300 + k]) for k, group in enumerate(some) for r in group]
    m = PrefixTuning(model(vocab_size=310), 8)
    result = train_sft(m, data, steps=40, batch_size=16, lr=.1, dtype=torch.float32)
    assert result.losses[-1] < result.losses[0] - 1, result.losses
