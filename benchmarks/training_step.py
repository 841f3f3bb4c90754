"""A training step of a 10M-parameter language model, beside two peers of the same size.

    python benchmarks/training_step.py [--repeats 7] [--quick]

Each step is forward, loss, backward, and AdamW (fused) on the same random tokens. The peers are
transformers' LlamaForCausalLM, of exactly our shape, and a GPT-2-style model written here from its
description, in the small shape that nanoGPT is published with: learned positions, LayerNorm,
fused QKV, a GELU MLP of four times the width, a tied head.
"""
import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _table import alternate, markdown, spread, write
from torch import Tensor, nn

from llmnotes.core import cpu_has_bf16, pick_device, set_seed
from llmnotes.model import Transformer, TransformerConfig
from llmnotes.training.loop import summed_nll

SHAPE = dict(vocab_size=65, n_layer=6, n_embd=384, n_head=6, n_hidden=1024, max_len=256)


class GPTBlock(nn.Module):
    "Pre-norm block as in GPT-2: attention with one fused projection, then a GELU MLP"
    def __init__(self, C: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2)
                   for t in self.qkv(self.norm1(x)).split(C, -1))          # (B, n_head, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    "GPT-2's architecture without dropout or biases"
    def __init__(self, vocab_size: int, n_layer: int, n_embd: int, n_head: int, max_len: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, n_embd), nn.Embedding(max_len, n_embd)
        self.blocks = nn.ModuleList(GPTBlock(n_embd, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        for p in self.parameters():
            if p.dim() == 2: nn.init.normal_(p, std=.02)

    def forward(self, input_ids: Tensor, attention_mask: None = None) -> Tensor:  # (B, T, V)
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks: x = block(x)
        return self.norm(x) @ self.tokens.weight.T


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=SHAPE['vocab_size'], hidden_size=SHAPE['n_embd'], num_hidden_layers=SHAPE['n_layer'],
        num_attention_heads=SHAPE['n_head'], intermediate_size=SHAPE['n_hidden'],
        max_position_embeddings=SHAPE['max_len'], tie_word_embeddings=True, use_cache=False,
        attn_implementation='sdpa'))


def step_of(
    make: Callable[[], nn.Module],
    ids: Tensor,  # (B, T+1)
    *,
    compiled: bool,
    bf16: bool,
) -> tuple[Callable[[], float], int]:  # one training step, parameters
    set_seed(0)
    model = make().to(ids.device)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = torch.compile(summed_nll, dynamic=False) if compiled else summed_nll
    n = ids[:, 1:].numel()

    def step() -> float:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(model, ids, ids) / n
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.item()
    return step, sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--quick', action='store_true', help='a two-layer model, one repeat: does it run?')
    args = parser.parse_args()
    if args.quick: SHAPE.update(n_layer=2, n_embd=64, n_head=2, n_hidden=192); args.repeats = 1
    device = pick_device()
    fast_bf16 = device == 'cuda' or cpu_has_bf16()
    B, T = (64, 256) if device == 'cuda' else (4, 256)
    ids = torch.randint(SHAPE['vocab_size'], (B, T + 1), device=device)
    ours = lambda: Transformer(TransformerConfig(tie_head=True, **SHAPE))
    gpt = lambda: GPT(**{k: v for k, v in SHAPE.items() if k != 'n_hidden'})
    makers = {'llmnotes': ours, 'transformers Llama': llama, 'nanoGPT-like': gpt}
    modes = {'eager, float32': (False, False), 'compiled, float32': (True, False),
             'compiled, bfloat16 autocast': (True, True)}
    jobs, warm, sizes, failed = {}, {}, {}, []
    for mode, (compiled, bf16) in modes.items():
        for name, make in makers.items():
            if bf16 and name == 'transformers Llama': continue
            if bf16 and not fast_bf16 and name == 'llmnotes': continue     # what we would not use
            step, sizes[name] = step_of(make, ids, compiled=compiled, bf16=bf16)
            began = time.perf_counter()
            try: loss = step()
            except Exception as e:                   # no compiler: inductor raises what it meets
                if not compiled: raise
                failed.append(f'{name}, {mode}: {type(e).__name__}')
                continue
            if fast_bf16 or not bf16: step()
            warm[name, mode] = time.perf_counter() - began
            jobs[name, mode] = step
            print(f'{name}, {mode}: ready in {warm[name, mode]:.1f} s, first loss {loss:.2f}', flush=True)
    repeats = {k: 1 if 'bfloat16' in k[1] and not fast_bf16 else args.repeats for k in jobs}
    took = {k: spread(s) for k, s in alternate(jobs, repeats).items()}
    best = min((k for k in took if k[0] == 'llmnotes'), key=lambda k: took[k]['median'])
    rows = []
    for (name, mode), t in took.items():
        mine = took.get(('llmnotes', mode), took[best])
        rows.append([mode, name, f'{sizes[name] / 1e6:.2f} M', f"{1e3 * t['median']:.0f} ms",
                     f"{1e3 * t['least']:.0f} to {1e3 * t['most']:.0f}", f"{B * T / t['median']:,.0f}",
                     f"{t['median'] / mine['median']:.2f}x", f"{t['median'] / took[best]['median']:.2f}x",
                     f'{warm[name, mode]:.0f} s'])
    table = markdown(['mode', 'model', 'parameters', 'step, median', 'spread (ms)', 'tokens/s',
                      'ours in this mode is faster by', 'ours at its best is faster by',
                      'until warm'], rows)
    emulated = '' if fast_bf16 else (' This processor has no instructions for bfloat16: those products '
                                     'are emulated, and the mode is slower than float32 here.')
    notes = (f'One step on {B} sequences of {T} tokens, forward to AdamW, all models in turn, median of '
             f'{args.repeats} rounds ({min(repeats.values())} where products are emulated). "Until warm" '
             f'is the time of compilation and the first steps.{emulated}'
             + (f' Not possible here: {"; ".join(failed)}.' if failed else ''))
    data = dict(batch=[B, T], shape=SHAPE, parameters=sizes, failed=failed, steps=[
        dict(model=n, mode=m, until_warm=warm[n, m], **t) for (n, m), t in took.items()])
    if args.quick: print(table)
    else: write('training_step', 'Training step', [table], notes, data, 'torch', 'transformers')


if __name__ == '__main__':
    main()
