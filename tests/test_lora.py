"LoRA of our own: equal to peft's, its files, what it refuses, and that a refusal changes nothing"
import copy
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnotes.finetune.lora import (LoRALinear, TokenRows, add_lora, answer_logprobs,
                                    load_adapter, lora_parameters, lora_state, merge_lora,
                                    remove_lora, save_adapter, unmerge_lora)
from llmnotes.model import Transformer, TransformerConfig

V, ROWS = 64, [5, 7]
IDS = torch.arange(18).view(2, 9) * 7 % V
WAYS = [dict(use_rslora=a, use_dora=b) for a, b in itertools.product((False, True), repeat=2)]


def named(how: dict[str, bool]) -> str: return '+'.join(k[4:] for k, v in how.items() if v) or 'plain'


@pytest.fixture(scope='module', params=[False, True], ids=['untied', 'tied'])
def base(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=V, n_layer=2, n_embd=16, n_head=2, n_kv_head=1,
                                          n_hidden=32, max_len=32, tie_head=request.param))
    return model.save_pretrained(tmp_path_factory.mktemp('base')/'model')


def ours(folder: Path) -> nn.Module: return Transformer.from_pretrained(folder).eval()


def theirs(folder: Path, **how) -> nn.Module:
    transformers = pytest.importorskip('transformers')
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def logits(model: nn.Module) -> Tensor:
    out = model(IDS)
    return getattr(out, 'logits', out)


@torch.no_grad()
def filled(model: nn.Module, size: float = .2) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.add_(size * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize('how', WAYS, ids=named)
@pytest.mark.parametrize('load', [ours, theirs])
def test_begins_at_the_base_and_comes_back_to_it(base, load, how) -> None:
    model = load(base)
    names, want = list(model.state_dict()), logits(model)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    add_lora(model, 2, 4, rows=ROWS, **how)
    assert torch.equal(logits(model), want)
    changed = logits(filled(model))
    assert (changed - want).abs().max() > .01
    for turn, expect in ((merge_lora, changed), (merge_lora, changed), (unmerge_lora, changed)):
        assert (logits(turn(model)) - expect).abs().max() < 1e-5
    merged = remove_lora(copy.deepcopy(model))
    assert (logits(merged) - changed).abs().max() < 1e-5
    assert list(remove_lora(model, merge=False).state_dict()) == names
    assert all((p - before[n]).abs().max() < 1e-6 for n, p in model.state_dict().items())


@pytest.mark.parametrize('how', WAYS, ids=named)
@pytest.mark.parametrize('load', [ours, theirs])
def test_peft_reads_it_and_it_reads_peft(base, load, how, tmp_path) -> None:
    peft = pytest.importorskip('peft')
    want = logits(filled(model := add_lora(load(base), 2, 4, rows=ROWS, **how)))
    save_adapter(model, tmp_path/'ours', base='base-model')
    beside = peft.PeftModel.from_pretrained(theirs(base), tmp_path/'ours').eval()
    assert (logits(beside) - want).abs().max() < 1e-5
    beside.save_pretrained(tmp_path/'peft', save_embedding_layers=False)
    for fresh, folder in itertools.product((ours, theirs), ('ours', 'peft')):
        back = load_adapter(fresh(base), tmp_path/folder)
        assert (logits(back) - want).abs().max() < 1e-5, (fresh, folder)
    said = json.loads((tmp_path/'ours'/'adapter_config.json').read_text())
    assert said['base_model_name_or_path'] == 'base-model'


@pytest.mark.parametrize('how', WAYS, ids=named)
def test_steps_are_those_of_peft(base, how, tmp_path) -> None:
    peft = pytest.importorskip('peft')
    mine = add_lora(theirs(base), 2, 4, rows=ROWS, **how)
    save_adapter(mine, tmp_path)
    peer = peft.PeftModel.from_pretrained(theirs(base), tmp_path, is_trainable=True)
    found = {}
    for name, model in (('mine', mine), ('peer', peer)):
        trained = [p for p in model.parameters() if p.requires_grad]
        sgd = torch.optim.SGD(trained, lr=.5)                # linear in the gradient, unlike Adam
        found[name] = []
        for _ in range(4):
            loss = model(IDS, labels=IDS).loss
            sgd.zero_grad(); loss.backward(); sgd.step()
            found[name].append(loss.item())
        found[name].append(sum(p.numel() for p in trained))
    assert found['mine'] == pytest.approx(found['peer'], abs=1e-5)
    assert found['mine'][0] - found['mine'][3] > 1e-3
    assert (logits(mine) - logits(peer)).abs().max() < 1e-5


def test_closed_form_counts(base) -> None:
    model = ours(base)
    shapes = [m.weight.shape for n, m in model.named_modules()
              if isinstance(m, nn.Linear) and n != 'lm_head']
    rows = 2 if model.config.tie_head else 4
    add_lora(model, 3, rows=ROWS)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == lora_parameters(shapes, 3, rows=rows, width=16)
    assert count == sum(p.numel() for p in lora_state(model).values())


def test_gradient_only_where_it_is_needed(base) -> None:
    model = add_lora(ours(base), 2, rows=ROWS)
    logits(filled(model)).square().sum().backward()
    for n, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == ('base_layer' not in n and 'norm' not in n), n


def test_dropout_is_of_the_change_and_of_training_only() -> None:
    torch.manual_seed(0)
    layer, x = filled(LoRALinear(nn.Linear(40, 8), 4, dropout=.5)), torch.randn(6, 40)
    layer.train(); assert not torch.equal(layer(x), layer(x))
    layer.eval(); assert torch.equal(layer(x), layer(x))
    layer.train()
    with torch.no_grad(): layer.lora_B.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize('dora', [False, True])
def test_half_precision(dora) -> None:
    torch.manual_seed(0)
    layer = filled(LoRALinear(nn.Linear(32, 24), 4, use_dora=dora), .1)
    x = torch.randn(2, 5, 32)
    want = layer(x)
    norms = layer.row_norms()
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(layer.row_norms(), norms)         # in full precision all the same
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and (y - want).abs().max() < .05 * want.abs().max()
    assert layer.lora_A.grad.dtype == layer.lora_A.dtype == torch.float32
    half = LoRALinear(copy.deepcopy(layer.base_layer).bfloat16(), 4, use_dora=dora)
    half.load_state_dict({k: v for k, v in layer.state_dict().items() if 'base' not in k}, strict=False)
    assert half.lora_A.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16
    assert (half(x.bfloat16()) - want).abs().max() < .05 * want.abs().max()


def test_dora_by_its_definition() -> None:
    torch.manual_seed(0)
    layer, x = filled(LoRALinear(nn.Linear(7, 5), 2, use_dora=True)), torch.randn(3, 7)
    whole = layer.weight + layer.delta()
    want = F.linear(x, layer.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True), layer.bias)
    assert layer.bias.abs().max() > .01 and torch.allclose(layer(x), want, atol=1e-5)


@pytest.mark.parametrize('shape', [(7,), (0, 7), (2, 3, 7), (2, 2, 3, 7)], ids=str)
def test_any_leading_shape(shape) -> None:
    layer, x = filled(LoRALinear(nn.Linear(7, 5), 2)), torch.randn(shape)
    want = x @ (layer.weight + layer.delta()).T + layer.bias
    assert layer(x).shape == want.shape and torch.allclose(layer(x), want, atol=1e-5)


def test_input_that_is_not_contiguous() -> None:
    layer, x = filled(LoRALinear(nn.Linear(7, 5), 2)), torch.randn(7, 3, 2).transpose(0, 2)
    assert torch.allclose(layer(x), layer(x.contiguous()), atol=1e-6)


def test_targets_by_end_by_path_and_by_regex(base) -> None:
    for wanted, count in ((['q_proj', 'v_proj'], 4), (['layers.1.mlp.up_proj'], 1),
                          (r'model\.layers\.0\..*', 7), (r'.*(q|k)_proj', 4), ('all-linear', 14)):
        model = add_lora(ours(base), 2, target_modules=wanted)
        assert sum(isinstance(m, LoRALinear) for m in model.modules()) == count, wanted


def test_the_head_can_be_a_target_and_its_rows_cannot_then(base) -> None:
    model = ours(base)
    if model.config.tie_head: pytest.skip('the head is the embedding')
    with pytest.raises(ValueError, match='lm_head cannot have trained rows'):
        add_lora(model, 2, target_modules=['lm_head'], rows=ROWS)
    add_lora(model, 2, target_modules=['lm_head'])
    assert isinstance(model.lm_head, LoRALinear)


def test_seed_decides_and_nothing_else_is_drawn(base) -> None:
    state = torch.get_rng_state()
    a, b, c = (lora_state(add_lora(ours(base), 2, seed=s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = 'layers.0.self_attn.q_proj.lora_A'
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    assert a[name].abs().max() <= 1 / 16**.5 < 1.2 * a[name].abs().max()


REFUSED = {
    'unknown target': (dict(target_modules=['q_proj', 'query']), "'query' matches no .* down_proj, gate"),
    'unknown regex': (dict(target_modules='query'), "'query' matches no"),
    'no target': (dict(target_modules=[]), 'matches no'),
    'rank above': (dict(r=17), 'rank 17: layers.0.* is 16 x 16, its rank can be 1 to 16'),
    'rank above the second': (dict(r=9), 'rank 9: layers.0.*k_proj is 8 x 16'),
    'rank zero': (dict(r=0), 'rank 0'), 'dropout': (dict(dropout=1.), r'dropout 1.0 is not in \[0, 1\)'),
    'row outside': (dict(rows=[V]), f'row {V} is outside'), 'row twice': (dict(rows=[1, 1]), 'twice')}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_before_anything_changes(base, case) -> None:
    how, said = REFUSED[case]
    model = ours(base)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=said): add_lora(model, **dict(r=2) | how)
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_second_adapter_is_refused(base) -> None:
    with pytest.raises(ValueError, match='remove_lora first'): add_lora(add_lora(ours(base), 2), 2)


def test_no_linear_layer_and_no_embedding() -> None:
    with pytest.raises(ValueError, match='ReLU has no linear layer'): add_lora(nn.ReLU())
    with pytest.raises(ValueError, match='no token embedding'):
        add_lora(nn.Sequential(nn.Linear(9, 9)), 2, rows=[1])


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return save_adapter(filled(add_lora(ours(base), 2, 4, rows=ROWS)), tmp_path/'adapter')


def refused(base: Path, adapter: Path, said: str, model: nn.Module | None = None,
            kind: type = ValueError) -> None:
    model = ours(base) if model is None else model
    want, names = logits(model), list(model.state_dict())
    with pytest.raises(kind, match=said): load_adapter(model, adapter)
    assert list(model.state_dict()) == names and torch.equal(logits(model), want)
    assert all(p.requires_grad for p in model.parameters()), 'half loaded'


def config(adapter: Path, **changed) -> None:
    path = adapter/'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize('left', [0, 7, 100, -1], ids=str)
def test_truncated_weights(base, adapter, left) -> None:
    path = adapter/'adapter_model.safetensors'
    path.write_bytes(path.read_bytes()[:left])
    refused(base, adapter, 'is damaged')


def test_truncated_config(base, adapter) -> None:
    path = adapter/'adapter_config.json'
    path.write_text(path.read_text()[:-9])
    refused(base, adapter, 'is damaged')


def test_missing_files(base, adapter) -> None:
    for name in ('adapter_model.safetensors', 'adapter_config.json'):
        shutil.move(adapter/name, adapter/'away')
        refused(base, adapter, f'holds no {name}', kind=FileNotFoundError)
        shutil.move(adapter/'away', adapter/name)


@pytest.mark.parametrize('changed, said', [
    (dict(peft_type='IA3'), 'type IA3'), (dict(rank_pattern={'q_proj': 4}), 'rank_pattern'),
    (dict(bias='all'), "bias 'all'"), (dict(init_lora_weights='pissa'), 'init_lora_weights'),
    (dict(r=3), 'is for another base'), (dict(target_modules=['q_proj']), 'is for another base'),
    (dict(target_modules=['query']), 'matches no'), (dict(use_dora=True), 'is for another base'),
    (dict(trainable_token_indices=None), 'is for another base')], ids=str)
def test_config_that_does_not_fit(base, adapter, changed, said) -> None:
    config(adapter, **changed)
    refused(base, adapter, said)


def test_another_base(base, adapter) -> None:
    mine = ours(base).config
    wide = Transformer(TransformerConfig(vocab_size=V, n_layer=2, n_embd=24, n_head=2, n_kv_head=1,
                                         n_hidden=32, max_len=32, tie_head=mine.tie_head)).eval()
    refused(base, adapter, 'is for another base', wide)
    torch.manual_seed(5)
    alike = Transformer(mine).eval()
    refused(base, adapter, 'trained beside other weights', alike)
    load_adapter(alike, adapter, check_base=False)


def test_applied_twice(base, adapter) -> None:
    refused(base, adapter, 'trained beside other weights',
            remove_lora(load_adapter(ours(base), adapter)).requires_grad_(True))


def test_a_rounded_base_is_the_same_base(base, adapter) -> None:
    load_adapter(ours(base).bfloat16(), adapter)


def test_a_folder_without_its_config_is_no_adapter(base, adapter, monkeypatch) -> None:
    "Cut off between the two files, old settings must not stand beside new weights"
    import llmnotes.finetune.lora as module
    write, written = module.write_atomic, []

    def dies(path, data):
        if written: raise KeyboardInterrupt
        written.append(write(path, data))
    monkeypatch.setattr(module, 'write_atomic', dies)
    with pytest.raises(KeyboardInterrupt): save_adapter(add_lora(ours(base), 2, 4), adapter)
    assert not (adapter/'adapter_config.json').exists()


def test_file_is_whole_or_as_it_was(base, adapter, monkeypatch) -> None:
    import llmnotes.finetune.lora as module
    model, old = add_lora(ours(base), 2, 4), (adapter/'adapter_model.safetensors').read_bytes()

    def full(path, data): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, 'write_atomic', full)
    with pytest.raises(OSError): save_adapter(model, adapter)
    assert (adapter/'adapter_model.safetensors').read_bytes() == old


def test_saved_while_merged_is_the_same_adapter(base, adapter, tmp_path) -> None:
    from safetensors.torch import load_file
    model = merge_lora(load_adapter(ours(base), adapter))
    save_adapter(model, tmp_path/'merged')
    a, b = (load_file(f/'adapter_model.safetensors') for f in (adapter, tmp_path/'merged'))
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 1e-6 for k in a)


def test_quantised_base_trains_and_does_not_merge(base) -> None:
    bnb = pytest.importorskip('bitsandbytes')
    model, want = theirs(base), logits(theirs(base))
    for name, m in list(model.named_modules()):
        if not isinstance(m, nn.Linear) or name == 'lm_head': continue
        eight = bnb.nn.Linear8bitLt(m.in_features, m.out_features, bias=False, has_fp16_weights=False)
        eight.weight = bnb.nn.Int8Params(m.weight.data, requires_grad=False, has_fp16_weights=False)
        parent, _, last = name.rpartition('.')
        setattr(model.get_submodule(parent), last, eight.to('cpu'))
    add_lora(model, 2, rows=ROWS)
    assert (logits(model) - want).abs().max() < .1 * want.abs().max()
    logits(filled(model)).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert model.model.layers[0].self_attn.q_proj.lora_A.grad.abs().max() > 0
    with pytest.raises(ValueError, match='neither DoRA nor merging'): merge_lora(model)
    with pytest.raises(ValueError, match='neither DoRA nor merging'):
        LoRALinear(model.model.layers[0].mlp.up_proj.base_layer, 2, use_dora=True)


def test_packed_weight_of_a_floating_type() -> None:
    layer = nn.Linear(8, 6)                                  # as bitsandbytes' quant_storage packs
    layer.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.bfloat16), requires_grad=False)
    with pytest.raises(ValueError, match='neither DoRA nor merging'): LoRALinear(layer, 2).merge()


def test_scores_of_our_model_are_those_of_transformers(base) -> None:
    rows = [dict(input_ids=list(range(1, n)), labels=[-100] * (n // 2) + list(range(n // 2 + 1, n)))
            for n in (9, 4, 12)]
    for a, b in zip(*(answer_logprobs(load(base), rows, batch_size=2) for load in (ours, theirs))):
        assert len(a) == len(b) > 0 and abs(a - b).max() < 1e-5


def test_rows_of_a_tied_head_are_changed_once(base) -> None:
    model = filled(add_lora(theirs(base), 2, rows=ROWS))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, TokenRows) and isinstance(head, TokenRows)
    want = table.weight.detach().clone()
    merge_lora(model)
    assert torch.equal(table.base_layer.weight, want)
    assert (head.base_layer.weight is table.base_layer.weight) == model.config.tie_word_embeddings
