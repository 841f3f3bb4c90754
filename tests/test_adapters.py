"Bottleneck adapters, IA3, and many LoRA adapters in one batch: edges that the notebook does not show"
import json
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmnotes.finetune.adapters import (
    Adapted, BankedLinear, Bottleneck, IA3Linear, LoRABank, adapter_parameters, add_adapters, add_ia3,
    ia3_parameters, load_adapters, merge_ia3, remove_adapters, save_adapters, unmerge_ia3)
from llmnotes.finetune.lora import LoRALinear, add_lora, save_adapter
from llmnotes.model import Transformer, TransformerConfig

SHAPE = TransformerConfig(vocab_size=40, n_layer=2, n_embd=16, n_head=4, n_kv_head=2, n_hidden=24, max_len=64)
IDS = torch.arange(36).view(4, 9)


def ours(config: TransformerConfig = SHAPE) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for p in model.parameters(): p.data *= 8 if p.dim() == 2 else 1
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return ours().save_pretrained(tmp_path_factory.mktemp('base'))


def llama(folder: Path) -> nn.Module:
    transformers = pytest.importorskip('transformers')
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def stirred(model: nn.Module, std: float = .3) -> nn.Module:
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data += std * torch.randn_like(p)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Bottlenecks

@pytest.mark.parametrize('activation', ['relu', 'gelu', 'silu', 'tanh', 'identity'])
def test_bottleneck_is_the_formula(activation: str) -> None:
    f = dict(relu=torch.relu, gelu=nn.GELU(), silu=nn.SiLU(), tanh=torch.tanh, identity=lambda z: z)[activation]
    b, h = stirred(Bottleneck(7, 3, activation=activation, std=.5)), torch.randn(2, 5, 7)
    z = torch.einsum('btd,md->btm', h, b.down.weight) + b.down.bias
    want = h + torch.einsum('btm,dm->btd', f(z), b.up.weight) + b.up.bias
    torch.testing.assert_close(b(h), want, atol=1e-6, rtol=1e-6)


def test_first_weights() -> None:
    zero, paper, dead = (Bottleneck(64, 32, std=std) for std in (None, .01, 0.))
    assert not zero.up.weight.any()
    assert zero.down.weight.std().item() == pytest.approx(.88 / 8, rel=.1)
    for w in (paper.down.weight, paper.up.weight):
        assert w.std().item() == pytest.approx(.0088, rel=.1) and w.abs().max() <= .02
    assert not any(p.any() for p in dead.parameters())
    assert not any(b.any() for m in (zero, paper) for b in (m.down.bias, m.up.bias))


def test_seed_draws_and_the_global_generator_stays() -> None:
    bases = [ours() for _ in range(3)]
    before = torch.get_rng_state()
    a, b, c = (add_adapters(m, 4, std=.1, seed=s) for m, s in zip(bases, (1, 1, 2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(a), state(b)) and not same(state(a), state(c))
    ups = [m.up.weight for m in a.modules() if isinstance(m, Bottleneck)]
    assert not any(torch.equal(x, y) for x, y in pairwise(ups)), 'each adapter has its own draw'


@pytest.mark.parametrize(('style', 'names'), [
    ('houlsby', ['layers.0.self_attn.o_proj', 'layers.0.mlp.down_proj', 'layers.1.self_attn.o_proj',
                 'layers.1.mlp.down_proj']),
    ('pfeiffer', ['layers.0.mlp.down_proj', 'layers.1.mlp.down_proj'])])
def test_where_adapters_stand_and_what_is_trained(style: str, names: list[str]) -> None:
    model = add_adapters(ours(), 5, style=style)
    assert [n for n, m in model.named_modules() if isinstance(m, Adapted)] == names
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == adapter_parameters(16, 5, len(names))
    assert torch.equal(model(IDS), ours()(IDS))
    loss = stirred(model)(IDS).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert all(p.grad is None for n, p in model.named_parameters() if '.adapter.' not in n)


def test_conv1d_of_gpt2() -> None:
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    make = lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=12, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)).eval()
    base = make()
    model = add_adapters(deepcopy(base), 3, attention='attn.c_proj', feedforward='mlp.c_proj')
    assert sum(isinstance(m, Adapted) for m in model.modules()) == 4
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not torch.equal(stirred(model)(IDS).logits, base(IDS).logits)
    with pytest.raises(ValueError, match='not a Linear'): add_ia3(base, ('c_proj',), ())


def test_half_precision_and_double() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = add_adapters(ours().to(dtype), 4)
        assert {p.dtype for p in model.parameters()} == {dtype} and model(IDS).dtype == dtype


@pytest.mark.parametrize(('what', 'said'), [
    (dict(m=0), 'm is 0'), (dict(m=17), 'm is 17'), (dict(m=4, style='both'), "style 'both' is none of"),
    (dict(m=4, activation='elu'), "activation 'elu' is none of"), (dict(m=4, std=-.1), 'std is -0.1'),
    (dict(m=4, feedforward='fc2'), "'fc2'; there are down_proj, gate_proj, k_proj")])
def test_refusals_leave_the_model_alone(what: dict, said: str) -> None:
    model = ours()
    before = state(model)
    with pytest.raises(ValueError, match=said): add_adapters(model, **what)
    assert same(state(model), before) and all(p.requires_grad for p in model.parameters())


def test_one_kind_at_a_time() -> None:
    for first in (lambda: add_adapters(ours(), 4), lambda: add_ia3(ours())):
        for second in (lambda m: add_adapters(m, 4), add_ia3):
            with pytest.raises(ValueError, match='carries adapters already'): second(first())
        assert same(state(remove_adapters(first())), state(ours()))


# IA3

def test_ia3_scales_outputs_and_inputs() -> None:
    x, l_out, l_in = torch.randn(6, 4), torch.tensor([[2.], [-1], [.5]]), torch.tensor([[1., 0, 3, -2]])
    for feedforward, l in ((False, l_out), (True, l_in)):
        layer = IA3Linear(nn.Linear(4, 3), feedforward)
        W, b = (p.detach().clone() for p in layer.base_layer.parameters())
        assert torch.equal(layer(x), x @ W.T + b) or torch.allclose(layer(x), x @ W.T + b, atol=1e-6)
        layer.ia3_l.data = l
        want = (x * l) @ W.T + b if feedforward else (x @ W.T + b) * l.T
        torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=1e-6)
        layer.merge(); layer.merge()                             # twice is once
        torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer.base_layer(x), want, atol=1e-6, rtol=1e-6)
        layer.unmerge(); layer.unmerge()
        assert torch.equal(layer.base_layer.weight, W) and torch.equal(layer.base_layer.bias, b)


def test_ia3_count_merge_and_removal() -> None:
    model = add_ia3(ours())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == ia3_parameters(
        [(8, 16)] * 4, [(16, 24)] * 2) == 2 * (8 + 8 + 24)
    stirred(model)
    want = model(IDS)
    plain = remove_adapters(merge_ia3(deepcopy(model)))
    assert state(plain).keys() == state(ours()).keys()
    torch.testing.assert_close(plain(IDS), want, atol=1e-4, rtol=1e-5)
    assert torch.equal(unmerge_ia3(merge_ia3(model))(IDS), want)
    assert same(state(remove_adapters(model)), state(ours()))
    with pytest.raises(ValueError, match='bottlenecks do not merge'): unmerge_ia3(ours())


def test_ia3_of_peft_both_ways(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip('peft')
    config = peft.IA3Config(target_modules=r'.*layers\.1\..*(k_proj|up_proj|down_proj)',
                            feedforward_modules=r'.*\.down_proj')
    theirs = stirred(peft.get_peft_model(llama(folder), config)).eval()
    theirs.save_pretrained(tmp_path/'theirs')
    for model in (llama(folder), ours()):
        mine = load_adapters(model, tmp_path/'theirs')
        assert sum(isinstance(m, IA3Linear) for m in mine.modules()) == 3
        out = mine(IDS)
        torch.testing.assert_close(getattr(out, 'logits', out), theirs(IDS).logits, atol=1e-4, rtol=1e-5)
        save_adapters(mine, tmp_path/'mine')
        back = peft.PeftModel.from_pretrained(llama(folder), tmp_path/'mine').eval()
        torch.testing.assert_close(back(IDS).logits, theirs(IDS).logits, atol=1e-6, rtol=1e-6)


# Files

@pytest.mark.parametrize('make', [lambda m: add_adapters(m, 4), add_ia3,
                                  lambda m: add_adapters(m, 3, style='pfeiffer', activation='tanh')])
def test_there_and_back(make, folder: Path, tmp_path: Path) -> None:
    model = stirred(make(ours()))
    save_adapters(model, tmp_path/'a', base='some base')
    again = load_adapters(ours(), tmp_path/'a')
    assert same(state(again), state(model)) and torch.equal(again(IDS), model(IDS))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == \
        [n for n, p in model.named_parameters() if p.requires_grad]
    config = json.loads((tmp_path/'a'/'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == 'some base'
    save_adapters(load_adapters(llama(folder), tmp_path/'a'), tmp_path/'b', base='some base')
    assert same(*(load_file(tmp_path/f/'adapter_model.safetensors') for f in 'ab'))


@pytest.mark.parametrize('make', [lambda m: add_adapters(m, 4), add_ia3])
def test_a_bad_file_changes_nothing(make, tmp_path: Path) -> None:
    save_adapters(stirred(make(ours())), tmp_path)
    weights, about = tmp_path/'adapter_model.safetensors', tmp_path/'adapter_config.json'
    good, tensors = weights.read_bytes(), load_file(weights)
    first = sorted(tensors)[0]

    def refused(model: nn.Module, said: str, kind: type = ValueError) -> None:
        before = state(model)
        with pytest.raises(kind, match=said): load_adapters(model, tmp_path)
        assert same(state(model), before) and all(p.requires_grad for p in model.parameters())

    for cut in (0, 4, 40, len(good) - 1):
        weights.write_bytes(good[:cut]); refused(ours(), 'is damaged')
    save_file({k: t for k, t in tensors.items() if k != first}, weights)
    refused(ours(), 'is absent there')
    save_file(tensors | dict(extra=torch.zeros(2)), weights)
    refused(ours(), r'extra is \(2,\) there and absent here')
    weights.write_bytes(good)
    refused(ours(TransformerConfig(vocab_size=40, n_layer=2, n_embd=32, n_head=4, n_hidden=32)), 'for another base')
    other = ours()
    other.layers[1].mlp.down_proj.weight.data += .2
    refused(other, 'was trained beside other weights: those of layers.1.mlp.down_proj')
    assert load_adapters(other, tmp_path, check_base=False) is other
    near = ours().bfloat16().float()                             # rounding is not another base
    load_adapters(near, tmp_path)
    text = about.read_text()
    about.write_text(text[:-9]); refused(ours(), 'is damaged')
    about.write_text(json.dumps(dict(json.loads(text), peft_type='LOHA', adapter_type='?')))
    refused(ours(), 'holds LOHA')
    about.unlink(); refused(ours(), 'holds no adapter_config.json', FileNotFoundError)


def test_what_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='neither'): save_adapters(ours(), tmp_path)
    model = merge_ia3(stirred(add_ia3(ours())))
    with pytest.raises(ValueError, match='unmerge_ia3'): save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())
    save_adapters(unmerge_ia3(model), tmp_path)


# Many in one batch

def write_lora(folder: Path, n: int, **how) -> Path:
    model = add_lora(ours(), **dict(r=1 + n, alpha=4 + n, seed=n) | how)
    torch.manual_seed(n)
    for layer in model.modules():
        if isinstance(layer, LoRALinear): nn.init.normal_(layer.lora_B, std=.3)
    return save_adapter(model, folder/f'lora{n}')


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write_lora(tmp_path, 0, target_modules=['q_proj', 'down_proj']),
            write_lora(tmp_path, 1, use_rslora=True), write_lora(tmp_path, 4, target_modules=['v_proj', 'lm_head'])]


@pytest.mark.parametrize('path', ['gather', 'sorted'])
@pytest.mark.parametrize('wanted', [[0, 1, 2, -1], [2, 2, 2, 2], [-1] * 4, [1, 0, 1, 0], [2, -1, 0, 2]])
def test_a_mixed_batch_is_each_row_alone(folders: list[Path], path: str, wanted: list[int], folder: Path) -> None:
    from llmnotes.finetune.lora import load_adapter
    for make in (ours, lambda: llama(folder)):
        served = make()
        bank = LoRABank(served, folders, path=path)
        call = lambda m, x: getattr(out := m(x), 'logits', out)
        with torch.no_grad(), bank.rows(wanted): got = call(served, IDS)
        for i, x, logits in zip(wanted, IDS, got):
            alone = make() if i < 0 else load_adapter(make(), folders[i])
            want = call(alone, x[None])[0]
            torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-5)
            if i >= 0: assert (logits - call(make(), x[None])[0]).abs().max() > .1
        assert torch.equal(call(served, IDS), call(make(), IDS))


def test_a_mixed_batch_is_that_of_peft(folders: list[Path], folder: Path) -> None:
    peft = pytest.importorskip('peft')
    mixed = peft.PeftModel.from_pretrained(llama(folder), folders[0], adapter_name='0').eval()
    for n, f in enumerate(folders[1:], 1): mixed.load_adapter(f, adapter_name=str(n))
    wanted, names = [2, -1, 1, 0], ['2', '__base__', '1', '0']
    for path in ('gather', 'sorted'):
        served = llama(folder)
        with torch.no_grad(), LoRABank(served, folders, path=path).rows(wanted):
            torch.testing.assert_close(served(IDS).logits, mixed(input_ids=IDS, adapter_names=names).logits,
                                       atol=1e-5, rtol=1e-5)


def test_sorted_keeps_to_each_rank(folders: list[Path]) -> None:
    "Whatever stands in the padding is not read where rows are sorted, and is zero where they are gathered"
    served = ours()
    bank = LoRABank(served, folders, path='sorted')
    layer = served.layers[0].self_attn.v_proj
    assert isinstance(layer, BankedLinear) and layer.ranks == [0, 2, 5] and layer.A.shape == (4, 5, 16)
    assert not layer.A[0].any() and not layer.A[1, 2:].any() and not layer.B[1, :, 2:].any()
    assert not any(t[3].any() for t in (layer.A, layer.B, layer.scaling))
    with bank.rows([1, 1, 0, 2]): want = served(IDS)
    layer.A[1, 2:] = 7; layer.B[1, :, 2:] = 7
    with bank.rows([1, 1, 0, 2]): assert torch.equal(served(IDS), want)


def test_generation_in_one_batch(folders: list[Path]) -> None:
    served = ours()
    bank, prompts, wanted = LoRABank(served, folders), IDS[:, :3], [0, -1, 2, 1]
    with bank.rows(wanted): together = served.generate(prompts, max_new_tokens=8, temperature=0)
    for i, x, row in zip(wanted, prompts, together):
        with bank.rows([i]): assert torch.equal(served.generate(x[None], max_new_tokens=8, temperature=0)[0], row)
    base = ours().generate(prompts, max_new_tokens=8, temperature=0)
    assert torch.equal(together[1], base[1]) and not torch.equal(together, base)


def test_ids_are_checked_and_forgotten(folders: list[Path]) -> None:
    served = ours()
    bank = LoRABank(served, folders)
    for wrong, said in (([0, 1, 3, 0], 'adapter 3 is not in a bank of 3'), ([-2] * 4, 'adapter -2 is not'),
                        ([0] * 3, '3 adapter ids do not fit a batch of 4 rows'), ([], '0 adapter ids')):
        with pytest.raises(ValueError, match=said), bank.rows(wrong): served(IDS)
        assert bank.ids is None and torch.equal(served(IDS), ours()(IDS))
    with bank.rows([0] * 4):
        with bank.rows([1] * 4): inner = served(IDS)
        outer = served(IDS)                                      # the outer ids are back
    for i, want in ((0, outer), (1, inner)):
        with bank.rows([i] * 4): assert torch.equal(want, served(IDS))
    assert not torch.equal(inner, outer)
    assert len(bank) == 3 and same(state(remove_adapters(served)), state(ours()))


def test_what_a_bank_refuses(folders: list[Path], tmp_path: Path) -> None:
    config = TransformerConfig(vocab_size=40, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, n_hidden=24)
    for make, files, said in (
            (ours, [], 'one adapter at least'),
            (lambda: ours(config), folders, r'is a matrix of \(16, \d+\) there, and of \(32,'),
            (ours, [write_lora(tmp_path/'d', 1, use_dora=True)], 'no plain LoRA'),
            (ours, [write_lora(tmp_path/'t', 1, rows=[3])], 'merge this one'),
            (ours, [save_adapters(add_ia3(ours()), tmp_path/'i')], 'no plain LoRA: IA3')):
        model = make()
        before = state(model)
        with pytest.raises(ValueError, match=said): LoRABank(model, files)
        assert same(state(model), before)
    with pytest.raises(ValueError, match="path 'bmm' is neither"): LoRABank(ours(), folders, path='bmm')
    with pytest.raises(FileNotFoundError): LoRABank(ours(), [tmp_path/'none'])
    weights = folders[0]/'adapter_model.safetensors'
    tensors = load_file(weights)
    tensors.pop(lost := next(k for k in tensors if 'lora_A' in k))
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=f'{lost} is missing'): LoRABank(ours(), folders)
