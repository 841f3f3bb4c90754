"NF4: bits equal to bitsandbytes' and to plain torch, layers that train above them, files, pages"
import copy
import itertools
import json
import struct

import pytest
import torch
from torch import nn

from llmnotes.finetune import qlora
from llmnotes.finetune.lora import add_lora
from llmnotes.finetune.qlora import (
    LLAMAS,
    NF4Linear,
    PackedAbsmax,
    PackedNF4,
    PagedMemory,
    dequantize_nf4,
    finetuning_bytes,
    load_nf4,
    nf4_bytes,
    nf4_code,
    quantize_model,
    quantize_nf4,
    save_nf4,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edges() -> torch.Tensor:
    "Blocks of 64 at the ends of what a float32 can be"
    code, x = nf4_code(), normal(64)
    middle = torch.cat([(code[:-1] + code[1:]) / 2, torch.ones(1)]).repeat(4)
    one = torch.ones(64)
    return torch.stack([
        0 * one, -0. * one, x * 1e-40, x * 1e-44, x * 5e37, middle, -middle, 3 * middle,
        torch.nextafter(middle, one), torch.nextafter(middle, -one), 1e-38 * one, -2e-38 * one,
        torch.cat([x[1:] * 1e-30, one[:1]]), torch.full((64,), torch.finfo(torch.float32).max)])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def against_torch(x: torch.Tensor, size: int) -> PackedNF4:
    "The compiled pair, held against the pair in torch"
    packed, (codes, absmax) = quantize_nf4(x, size), qlora._pack_torch(x.flatten(), size)
    assert torch.equal(packed.codes, codes) and same_bits(packed.absmax, absmax)
    slow = qlora._unpack_torch(codes, absmax, size, x.numel()).view(x.shape)
    for dtype in FLOATS: assert same_bits(dequantize_nf4(packed, dtype), slow.to(dtype)), dtype
    return packed


@pytest.mark.parametrize('size', [2, 32, 64, 96, 4096])
@pytest.mark.parametrize('dtype', FLOATS)
def test_compiled_equals_torch(size, dtype):
    against_torch((normal(300, 1111) / 30).to(dtype), size)
    against_torch(normal(7, 64).to(dtype).t(), size)                       # not contiguous


@pytest.mark.parametrize('size', [2, 64, 128, 640])
def test_compiled_equals_torch_at_the_edges(size): against_torch(edges(), size)


@pytest.mark.parametrize('n', [1, 2, 3, 63, 64, 65, 127, 1000, 2**18 + 64, 2**18 + 65])
def test_compiled_equals_torch_at_any_length(n):
    for dtype in FLOATS: against_torch(normal(n).to(dtype), 64)


@pytest.mark.parametrize('size', [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize('dtype', FLOATS)
def test_bits_are_those_of_bitsandbytes(size, dtype):
    bnb = pytest.importorskip('bitsandbytes.functional')
    x = (normal(64, 4096, seed=size) / 30).to(dtype)
    codes, state = bnb.quantize_4bit(x, blocksize=size, quant_type='nf4')
    ours = quantize_nf4(x, size)
    assert torch.equal(ours.codes, codes.flatten()) and same_bits(ours.absmax, state.absmax)
    assert same_bits(dequantize_nf4(ours, dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize('n', [3 * 64, 255 * 64, 256 * 64, 257 * 64, 700 * 64, 65, 1000])
def test_double_quantisation_is_that_of_bitsandbytes(n):
    bnb = pytest.importorskip('bitsandbytes.functional')
    x = normal(n) * (1 + normal(n, seed=1).abs())
    codes, state = bnb.quantize_4bit(x, blocksize=64, quant_type='nf4', compress_statistics=True)
    ours = quantize_nf4(x, double=True)
    assert torch.equal(ours.absmax.codes, state.absmax) and torch.equal(ours.absmax.offset, state.offset)
    assert same_bits(ours.absmax.absmax, state.state2.absmax)
    assert nf4_bytes(n) + 4 == ours.nbytes
    if n % 2 == 0: assert same_bits(dequantize_nf4(ours), bnb.dequantize_4bit(codes, state).view(-1))


def test_edges_are_those_of_bitsandbytes():
    bnb = pytest.importorskip('bitsandbytes.functional')
    codes, state = bnb.quantize_4bit(edges(), blocksize=64, quant_type='nf4')
    ours = quantize_nf4(edges())
    assert torch.equal(ours.codes, codes.flatten()) and same_bits(ours.absmax, state.absmax)
    assert same_bits(dequantize_nf4(ours), bnb.dequantize_4bit(codes, state))


def test_short_last_blocks_are_those_of_bitsandbytes():
    bnb = pytest.importorskip('bitsandbytes.functional')
    middle = torch.cat([(nf4_code()[:-1] + nf4_code()[1:]) / 2, torch.ones(1)])
    ends = [middle * s for s in normal(300).abs()] + [0 * middle, 1e-41 * middle]
    for end in ends:                      # on a midpoint it shows who divides and who multiplies
        x = torch.cat([torch.ones(64), end])
        codes, state = bnb.quantize_4bit(x, blocksize=64, quant_type='nf4')
        ours = quantize_nf4(x)
        assert torch.equal(ours.codes, codes.flatten()) and same_bits(ours.absmax, state.absmax)


def test_float64_is_rounded_first_and_out_is_filled():
    x = normal(128).double()
    assert torch.equal(quantize_nf4(x).codes, quantize_nf4(x.float()).codes)
    packed, out = quantize_nf4(normal(3, 100)), torch.empty(3, 100, dtype=torch.bfloat16)
    back = dequantize_nf4(packed, torch.bfloat16, out=out)
    assert back.data_ptr() == out.data_ptr() and torch.equal(out, dequantize_nf4(packed).bfloat16())


@pytest.mark.parametrize('make, said', [
    (lambda: quantize_nf4(torch.ones(64, dtype=torch.int8)), 'int8, not floats'),
    (lambda: quantize_nf4(torch.ones(64), 7), 'blocks of 7'),
    (lambda: quantize_nf4(torch.ones(64), 0), 'blocks of 0'),
    (lambda: quantize_nf4(torch.ones(0)), '0 weights'),
    (lambda: quantize_nf4(torch.tensor([1., torch.nan] * 64)), 'not finite'),
    (lambda: quantize_nf4(torch.tensor([1.] * 64 + [-torch.inf])), 'not finite'),
    (lambda: quantize_nf4(torch.full((64,), 1e300, dtype=torch.float64)), 'not finite'),
    (lambda: quantize_nf4(torch.full((64,), torch.inf, dtype=torch.bfloat16)), 'not finite'),
    (lambda: dequantize_nf4(quantize_nf4(torch.ones(64)), torch.uint8), 'not one of floats'),
    (lambda: dequantize_nf4(quantize_nf4(torch.ones(64)), out=torch.empty(63)), r'out is \(63,\)'),
    (lambda: finetuning_bytes(LLAMAS['Llama 2 7B'], 'half'), "method 'half'")])
def test_bad_input_is_refused(make, said):
    with pytest.raises(ValueError, match=said): make()


@pytest.mark.parametrize('double', [False, True])
def test_lengths_that_disagree_are_refused(double):
    good = quantize_nf4(normal(4, 128), double=double)
    short = PackedAbsmax(good.absmax.codes[1:], good.absmax.absmax, good.absmax.offset) \
        if double else good.absmax[1:]
    bad = [PackedNF4(good.codes[:-1], good.absmax, good.shape, 64),
           PackedNF4(good.codes, short, good.shape, 64),
           PackedNF4(good.codes, good.absmax, torch.Size((4, 127)), 64),
           PackedNF4(good.codes, good.absmax, good.shape, 32),
           PackedNF4(good.codes.float(), good.absmax, good.shape, 64)]
    if double: bad.append(PackedNF4(good.codes, PackedAbsmax(
        good.absmax.codes, good.absmax.absmax[:0], good.absmax.offset), good.shape, 64))
    for packed in bad:
        with pytest.raises(ValueError, match='8 weights|512 weights'): dequantize_nf4(packed)


class Small(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.embed, self.up = nn.Embedding(9, 20), nn.Linear(20, 33, bias=bias)
        self.down, self.lm_head = nn.Linear(33, 20, bias=bias), nn.Linear(20, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(torch.relu(self.up(self.embed(ids)))))


def small(bias: bool = True) -> Small:
    torch.manual_seed(0)
    return Small(bias)


def unpacked(model: nn.Module) -> nn.Module:
    "The same model with plain layers that hold what the four bits say"
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight.data = dequantize_nf4(layer.packed)
            if layer.bias is not None: plain.bias.data = layer.bias
            qlora._put(model, name, plain)
    return model


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('double', [True, False])
def test_a_layer_gives_what_its_unpacked_weight_gives_and_so_does_its_gradient(bias, double):
    model = quantize_model(small(bias), double=double)
    plain, ids = unpacked(model), torch.arange(9).view(1, 9)
    models = [add_lora(m, r=2, alpha=4, target_modules=['up', 'down']) for m in (model, plain)]
    for m in models:
        for layer in (m.up, m.down): nn.init.constant_(layer.lora_B, .1)
        m(ids).square().sum().backward()
    plain_ones = dict(models[1].named_parameters())
    trained = {n: p for n, p in models[0].named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all('lora' in n for n in trained)
    for n, p in trained.items():
        assert p.grad.abs().max() > 0
        assert torch.allclose(p.grad, plain_ones[n].grad, atol=1e-6)
    assert torch.allclose(models[0](ids), models[1](ids), atol=1e-6)


def test_head_and_embedding_stay_and_only_named_layers_change():
    model = quantize_model(small())
    assert {n for n, m in model.named_modules() if isinstance(m, NF4Linear)} == {'up', 'down'}
    assert not any(p.requires_grad for p in model.parameters()) and not model.up.weight.is_floating_point()
    one = quantize_model(small(), ['up'])
    assert isinstance(one.up, NF4Linear) and not isinstance(one.down, NF4Linear)
    assert isinstance(quantize_model(small(), 'lm_head').lm_head, NF4Linear)
    for wanted in (['own'], 'p', []):
        with pytest.raises(ValueError, match='no linear layer'): quantize_model(small(), wanted)
    with pytest.raises(ValueError, match='no linear layer'): quantize_model(model)


def test_casting_a_model_leaves_the_four_bits_alone():
    model = quantize_model(small())
    before = dequantize_nf4(model.up.packed)
    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
        assert torch.equal(dequantize_nf4(cast(model).up.packed), before)
    model.bfloat16()
    assert model.up.bias.dtype == torch.bfloat16 and model.up.offset.dtype == torch.float32
    assert model(torch.arange(3)[None]).dtype == torch.bfloat16
    wide = quantize_model(small(), compute_dtype=torch.bfloat16)
    assert wide(torch.arange(3)[None]).dtype == torch.float32


def test_the_backward_pass_keeps_no_unpacked_weight():
    model, kept = quantize_model(small(False)), []
    x = torch.randn(4, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        model.up(x).sum()
    assert 20 * 33 not in kept
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        torch.nn.functional.linear(x, dequantize_nf4(model.up.packed)).sum()
    assert 20 * 33 in kept


@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_saved_and_loaded(tmp_path, double, bias):
    model = quantize_model(small(bias), double=double)
    path = save_nf4(model, tmp_path/'model.safetensors')
    assert [p.name for p in tmp_path.iterdir()] == ['model.safetensors']
    with torch.no_grad(): fresh = load_nf4(Small(bias), path)
    ids = torch.arange(9)[None]
    assert torch.equal(fresh(ids), model(ids)) and fresh.lm_head.weight is fresh.embed.weight
    assert not any(p.requires_grad for p in fresh.parameters())


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = save_nf4(quantize_model(small()), tmp_path/'model.safetensors')
    whole = path.read_bytes()
    for said, data in {'not what': whole[:-5], 'is not': b'', 'not what ': whole[:40]}.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=said): load_nf4(small(), path)
    size, = struct.unpack('<Q', whole[:8])
    header = json.loads(whole[8:8 + size])
    layers = json.loads(header['__metadata__']['nf4'])
    layers['up'][0] = [33, 22]                                            # another shape
    header['__metadata__']['nf4'] = json.dumps(layers)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + whole[8 + size:])
    with pytest.raises(ValueError, match='726 weights'): load_nf4(small(), path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='not what Sequential needs'):
        load_nf4(nn.Sequential(nn.Linear(20, 33)), path)
    with pytest.raises(ValueError, match='no layer in four bits'): save_nf4(small(), path)
    from safetensors.torch import save_file
    save_file({'x': torch.ones(1)}, path)
    with pytest.raises(ValueError, match='holds no layer'): load_nf4(small(), path)


def test_shapes_give_the_published_sizes():
    sizes = {n: s.in_blocks + s.others for n, s in LLAMAS.items()}
    assert sizes == {'Llama 2 7B': 6_738_415_616, 'Llama 2 13B': 13_015_864_320,
                     'LLaMA 65B': 65_285_660_672, 'Llama 2 70B': 68_976_648_192}
    need = {m: finetuning_bytes(LLAMAS['LLaMA 65B'], m) for m in ('full', 'lora', 'qlora')}
    assert sum(need['full'].values()) == 12 * sizes['LLaMA 65B']
    trained = 80 * 64 * (4 * 2 * 8192 + 3 * (8192 + 22_016))
    assert need['lora']['optimizer'] == need['qlora']['optimizer'] == 8 * trained
    assert need['lora']['weights'] - 2 * sizes['LLaMA 65B'] == 2 * trained == need['qlora']['gradients']
    assert sum(need['full'].values()) > 780e9 and 40e9 < sum(need['qlora'].values()) < 48e9


def by_hand(capacity: int, use: list[int]) -> tuple[int, int]:
    "LRU with a list: pages moved in and out"
    here, host, moved = [], set(), [0, 0]
    for page in use:
        if page in here: here.remove(page)
        elif page in host: host.remove(page); moved[0] += 1
        here.append(page)
        if len(here) > capacity: host.add(here.pop(0)); moved[1] += 1
    return tuple(moved)


@pytest.mark.parametrize('capacity, seed', [*itertools.product([1, 2, 5, 11], range(3))])
def test_pages_leave_in_the_order_of_use(capacity, seed):
    use = torch.randint(0, 12, (300,), generator=torch.Generator().manual_seed(seed)).tolist()
    card = PagedMemory(capacity)
    card.touch(use)
    assert (card.moved_in, card.moved_out) == by_hand(capacity, use)
    assert card.on_host.isdisjoint(card.here) and card.on_host | set(card.here) == set(use)


def test_pinned_memory_pushes_pages_out_and_only_use_brings_them_back():
    card = PagedMemory(10)
    card.touch(range(8)); card.pin(5)
    assert (card.moved_out, card.moved_in, list(card.here)) == (3, 0, [3, 4, 5, 6, 7])
    card.pin(2)
    assert (card.moved_in, card.on_host) == (0, {0, 1, 2})
    card.touch([1]); card.pin(10)
    assert (card.moved_in, card.moved_out, len(card.here)) == (1, 9, 0)
    with pytest.raises(ValueError, match='all of the card'): card.touch([1])
    with pytest.raises(ValueError, match='11 pages'): card.pin(11)
    with pytest.raises(ValueError, match='-1 pages'): card.pin(-1)
