"""One batch of 16 rows that want 8 LoRA adapters: four ways to answer it.

    python benchmarks/multi_adapter.py [--repeats 9] [--quick]

All ways give the same logits (checked first) for a prompt of `T` tokens a row, and for one token a
row behind a cache of that prompt, which is what a server does most. `LoRABank` holds all adapters
beside the base, gathered or sorted; peft mixes them by `adapter_names`; `one by one` sets peft's
adapter and sends that adapter's rows; `merged, swapped` adds each change into the weights, sends
its rows, and takes it out again.
"""
import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _table import alternate, markdown, spread, write
from torch import Tensor, nn

from llmnotes.core import pick_device, set_seed
from llmnotes.finetune.adapters import LoRABank
from llmnotes.finetune.lora import LoRALinear, add_lora, load_adapter, save_adapter

SHAPE = dict(vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
             num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)
N, B = 8, 16


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None)).eval()


def make_folders(place: Path, ranks: list[int]) -> list[Path]:  # in peft's format
    folders = []
    for n, r in enumerate(ranks):
        model = add_lora(llama(), r=r, alpha=2 * r, seed=n)
        for layer in model.modules():
            if isinstance(layer, LoRALinear): nn.init.normal_(layer.lora_B, std=.02)
        folders.append(save_adapter(model, place/str(n)))
    return folders


def ways(folders: list[Path], wanted: list[int], device: str) -> dict[str, Callable[..., Tensor]]:
    "name: from (ids, cache for a group of rows) to the logits of the last position"
    from peft import PeftModel
    groups = [(i, [b for b, w in enumerate(wanted) if w == i]) for i in sorted(set(wanted))]

    def last(model: Any, ids: Tensor, cache: Any, **how: Any) -> Tensor:
        return model(input_ids=ids, past_key_values=cache, use_cache=cache is not None,
                     logits_to_keep=1, **how).logits[:, -1]

    def banked(path: str) -> Callable[..., Tensor]:
        model = llama().to(device)
        bank = LoRABank(model, folders, path=path)

        def run(ids: Tensor, caches: dict[str, Any]) -> Tensor:
            with bank.rows(wanted): return last(model, ids, caches.get('all'))
        return run

    mixed = PeftModel.from_pretrained(llama(), folders[0], adapter_name='0').to(device).eval()
    for n, f in enumerate(folders[1:], 1): mixed.load_adapter(f, adapter_name=str(n))
    names = [str(i) for i in wanted]

    def in_groups(each: Callable[[int, Tensor, Any], Tensor], ids: Tensor, caches: dict) -> Tensor:
        out = ids.new_zeros(len(ids), SHAPE['vocab_size'], dtype=torch.float32)
        for i, rows in groups: out[rows] = each(i, ids[rows], caches.get(i))
        return out

    def one_by_one(i: int, ids: Tensor, cache: Any) -> Tensor:
        mixed.set_adapter(str(i))
        return last(mixed, ids, cache)

    swap = llama().to(device)                # the deltas are ready; only adding them is timed
    deltas = []
    for f in folders:
        model = load_adapter(llama().to(device), f)
        deltas.append({n: layer.delta().detach() for n, layer in model.named_modules()
                       if isinstance(layer, LoRALinear)})

    def swapped(i: int, ids: Tensor, cache: Any) -> Tensor:
        for n, change in deltas[i].items(): swap.get_submodule(n).weight.data.add_(change)
        out = last(swap, ids, cache)
        for n, change in deltas[i].items(): swap.get_submodule(n).weight.data.sub_(change)
        return out

    return {'LoRABank, gathered': banked('gather'), 'LoRABank, sorted': banked('sorted'),
            'peft, adapter_names': lambda ids, c: last(mixed, ids, c.get('all'), adapter_names=names),
            'peft, one by one': lambda ids, c: in_groups(one_by_one, ids, c),
            'merged, swapped': lambda ids, c: in_groups(swapped, ids, c)}


def cached(prompt: Tensor, wanted: list[int], device: str) -> dict[Any, Any]:
    "Caches of the base model for the whole batch and for each adapter's rows; cropped after use"
    from transformers import DynamicCache
    model, caches = llama().to(device), {}
    for key in ['all', *sorted(set(wanted))]:
        rows = prompt if key == 'all' else prompt[[b for b, w in enumerate(wanted) if w == key]]
        caches[key] = DynamicCache()
        model(input_ids=rows, past_key_values=caches[key], use_cache=True)
    return caches


@torch.inference_mode()
def measure(T: int, ranks: list[int], args: argparse.Namespace, device: str) -> list[dict]:
    wanted = [n % N for n in range(B)]                       # two rows each, not side by side
    with tempfile.TemporaryDirectory() as place:
        with torch.inference_mode(False): folders = make_folders(Path(place), ranks)
        jobs_of = ways(folders, wanted, device)
        base = llama().to(device)
    prompt = torch.randint(SHAPE['vocab_size'], (B, T), device=device)
    token = prompt[:, :1]
    found = []
    for phase, ids, caches, n in (('prompt', prompt, {}, T), ('decoding', token,
                                                             cached(prompt, wanted, device), 1)):
        def timed(run: Callable[..., Tensor], ids: Tensor = ids, caches: dict = caches) -> Tensor:
            out = run(ids, caches)
            for c in caches.values():
                if (new := c.get_seq_length() - T) > 0: c.crop(-new)
            if device == 'cuda': torch.cuda.synchronize()
            return out
        plain = lambda ids, c: base(input_ids=ids, past_key_values=c.get('all'), logits_to_keep=1,
                                    use_cache=bool(c)).logits[:, -1]
        runs = dict(jobs_of, **{'base alone': plain})
        outs = {name: timed(run).float() for name, run in runs.items()}       # and warm
        want = outs['peft, one by one']
        gaps = {name: (o - want).abs().max().item() for name, o in outs.items()}
        assert max(g for name, g in gaps.items() if name != 'base alone') < 1e-3, gaps
        assert gaps['base alone'] > 1e-2, 'the adapters do nothing'
        jobs = {name: (lambda run=run: timed(run)) for name, run in runs.items()}
        took = {name: spread(t) for name, t in alternate(jobs, args.repeats).items()}
        found += [dict(phase=phase, way=name, T=T, ranks=ranks, tokens=B * n, gap=gaps[name], **t)
                  for name, t in took.items()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--quick', action='store_true', help='a two-layer model, one repeat: does it run?')
    args = parser.parse_args()
    if args.quick:
        SHAPE.update(num_hidden_layers=2, hidden_size=64, intermediate_size=128)
        args.repeats = 1
    device, T = pick_device(), 64
    found, tables = [], []
    for title, ranks in (('All adapters of rank 8', [8] * N),
                         ('Ranks 4 to 64', [4, 4, 8, 8, 16, 16, 32, 64])):
        some = measure(T, ranks, args, device)
        found += [dict(r, setting=title) for r in some]
        for phase in ('prompt', 'decoding'):
            part = [r for r in some if r['phase'] == phase]
            alone = next(r['median'] for r in part if r['way'] == 'base alone')
            rows = [[r['way'], f"{1e3 * r['median']:.1f} ms", f"{1e3 * r['least']:.1f} to {1e3 * r['most']:.1f}",
                     f"{r['tokens'] / r['median']:,.0f}", f"{r['median'] / alone:.2f}x",
                     '' if r['way'] == 'base alone' else f"{r['gap']:.0e}"] for r in part]
            what = f'{T} tokens a row' if phase == 'prompt' else f'one token a row, behind {T}'
            tables.append(f'## {title}: {phase}, {what}\n\n' + markdown(
                ['way', 'batch, median', 'spread (ms)', 'tokens/s', 'time over the base alone',
                 'logits differ from one by one by'], rows))
    notes = (f'A random Llama of {sum(p.numel() for p in llama().parameters()) / 1e6:.0f} million '
             f'weights, float32, on {device}; adapters on all seven matrices of a block; {B} rows, '
             f'{N} adapters, two rows each; all ways in turn, median of {args.repeats} rounds. '
             '"Merged, swapped" has the changes B A ready in memory, as large as the model for each '
             'adapter, and pays only for adding them in and taking them out; without that it would be '
             'slower. After many swaps its weights have drifted by rounding, the others have not.')
    data = dict(shape=SHAPE, batch=B, adapters=N, T=T, runs=found)
    if args.quick: print('\n\n'.join(tables))
    else: write('multi_adapter', 'Many adapters in one batch', tables, notes, data, 'torch', 'transformers', 'peft')


if __name__ == '__main__':
    main()
