"""A training step of LoRA, ours beside peft's: the same model, weights and batch.

    python benchmarks/lora_step.py [--repeats 9] [--quick]

Forward, loss, backward and AdamW of the adapter alone, on transformers' LlamaForCausalLM. Both
adapters begin with the same numbers, and their losses are compared before anything is timed.
Memory is counted twice: the bytes that the forward pass keeps for the backward pass (exact), and
the most that a process of its own has held (as the system counts it).
"""
import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from _table import alternate, markdown, spread, write
from torch import Tensor, nn

from llmnotes.core import cpu_has_bf16, peak_memory, pick_device, set_seed
from llmnotes.finetune.lora import add_lora, save_adapter

SHAPE = dict(vocab_size=4096, num_hidden_layers=6, hidden_size=256, num_attention_heads=4,
             num_key_value_heads=4, intermediate_size=704, max_position_embeddings=512)
BATCH = dict(B=4, T=128)
KINDS = {'LoRA': {}, 'DoRA': dict(use_dora=True)}


def base() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(use_cache=False, attn_implementation='sdpa', **SHAPE))


def ours(**how: bool) -> nn.Module:
    return add_lora(base(), 16, 32, seed=0, **how)


def theirs(**how: bool) -> nn.Module:  # with the numbers of ours, through the file
    from peft import PeftModel
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours(**how), folder)
        return PeftModel.from_pretrained(base(), folder, is_trainable=True)


MAKERS = {'llmnotes': ours, 'peft': theirs}


def step_of(model: nn.Module, ids: Tensor, *, bf16: bool) -> Callable[[], float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step() -> float:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.item()
    return step


def kept_bytes(model: nn.Module, ids: Tensor, *, bf16: bool) -> int:
    "What the graph keeps of one forward pass, each storage once, weights left out"
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in own: seen[s.data_ptr()] = s.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
            torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(seen.values())


def batch(device: str) -> Tensor:
    set_seed(1)
    return torch.randint(SHAPE['vocab_size'], (BATCH['B'], BATCH['T']), device=device)


def resident(name: str, kind: str, quick: bool) -> float:  # GiB, of a process of its own
    command = [sys.executable, __file__, '--peak', name, kind] + ['--quick'] * quick
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(out.split()[-1])


def peak_only(name: str, kind: str) -> None:
    import peft  # noqa: F401  (both processes import the same)
    model = MAKERS[name](**KINDS[kind])
    step = step_of(model, batch('cpu'), bf16=False)
    for _ in range(3): step()
    print(peak_memory())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--quick', action='store_true', help='a small model: does it run?')
    parser.add_argument('--peak', nargs=2, metavar=('WHO', 'KIND'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        SHAPE.update(num_hidden_layers=2, hidden_size=96, intermediate_size=256)
        BATCH.update(B=2, T=64); args.repeats = min(args.repeats, 3)
    if args.peak: return peak_only(*args.peak)
    device = pick_device()
    ids, fast = batch(device), device == 'cuda' or cpu_has_bf16()
    modes = {'float32': False} | ({'bfloat16 autocast': True} if fast else {})
    jobs, kept = {}, {}
    for kind, how in KINDS.items():
        for mode, bf16 in modes.items():
            first = {}
            for name, make in MAKERS.items():
                model = make(**how).to(device).train()
                kept[name, kind, mode] = kept_bytes(model, ids, bf16=bf16)
                jobs[name, kind, mode] = step = step_of(model, ids, bf16=bf16)
                first[name] = [step() for _ in range(3)]
            gap = max(abs(a - b) for a, b in zip(*first.values(), strict=True))
            if gap > (5e-2 if bf16 else 1e-3): sys.exit(f'{kind}, {mode}: the losses differ: {first}')
            print(f'{kind}, {mode}: losses agree within {gap:.1e}', flush=True)
    began = time.perf_counter()
    took = {k: spread(s) for k, s in alternate(jobs, args.repeats).items()}
    peaks = {(n, k): resident(n, k, args.quick) for k in KINDS for n in MAKERS
             } if device == 'cpu' else {}
    rows = []
    for (name, kind, mode), t in took.items():
        peer = took['peft', kind, mode]['median']
        peak = peaks.get((name, kind)) if mode == 'float32' else None
        rows.append([kind, mode, name, f"{1e3 * t['median']:.0f} ms",
                     f"{1e3 * t['least']:.0f} to {1e3 * t['most']:.0f}",
                     f"{t['median'] / peer:.2f}x", f'{kept[name, kind, mode] / 2**20:.1f} MiB',
                     f'{peak:.2f} GiB' if peak else ''])
    head = ['kind', 'products', 'who', 'median', 'range', "of peft's", 'kept for backward', 'peak']
    notes = (f'{BATCH["B"]} x {BATCH["T"]} tokens, {SHAPE["num_hidden_layers"]} layers of width '
             f'{SHAPE["hidden_size"]}, rank 16 on all matrices of the blocks; {args.repeats} '
             f'rounds in turn, {time.perf_counter() - began:.0f} s in all. "Kept": what the forward '
             'pass leaves for the backward pass, each storage once, without weights. "Peak": most '
             'memory of a process that did nothing else, with the libraries it imports.')
    data = dict(steps={' / '.join(k): v for k, v in took.items()},
                kept={' / '.join(k): v for k, v in kept.items()},
                peak_gib={' / '.join(k): v for k, v in peaks.items()})
    name = 'lora_step_quick' if args.quick else 'lora_step'
    if args.quick: return print(markdown(head, rows))
    write(name, 'A step of LoRA', [markdown(head, rows)], notes, data, 'torch', 'peft', 'transformers')


if __name__ == '__main__': main()
