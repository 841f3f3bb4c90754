"""A step of full fine-tuning: ours, ours with all logits, and TRL's SFTTrainer with its two losses.

    python benchmarks/sft_step.py [--repeats 5] [--steps 12] [--quick]

Equal batches of conversations of which a third of the tokens is learnt, in float32, forward to
AdamW. Ours is timed by the loop itself; TRL between the begin and the end of each step, so that
reading its data and starting up do not count.
"""
import argparse
import logging
import os
import statistics
import tempfile
import time

import numpy as np
import torch
from _table import markdown, spread, write
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llmnotes.core import pick_device
from llmnotes.finetune import sft
from llmnotes.finetune.sft import plan_batches, train_sft

SHAPES = {'1.9M, vocabulary 4,096': dict(vocab_size=4096, hidden_size=128, num_hidden_layers=4),
          '17M, vocabulary 50,304': dict(vocab_size=50304, hidden_size=160, num_hidden_layers=4)}


def build(shape: dict) -> LlamaForCausalLM:
    torch.manual_seed(0)
    C = shape['hidden_size']
    config = LlamaConfig(**shape, intermediate_size=3 * C, num_attention_heads=4, pad_token_id=0,
                         eos_token_id=1, max_position_embeddings=512)
    return LlamaForCausalLM(config).to(pick_device())


def conversations(n: int, vocab_size: int) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(30, 80, n):
        ids = rng.integers(5, vocab_size, length).tolist()
        learnt = length // 3
        rows.append(dict(input_ids=ids, labels=[-100] * (length - learnt) + ids[-learnt:]))
    return rows


def tokenizer() -> PreTrainedTokenizerFast:  # TRL wants one, although the rows are ids already
    from tokenizers import Tokenizer, models
    words = Tokenizer(models.WordLevel({'<pad>': 0, '<eos>': 1}, unk_token='<pad>'))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='<eos>')


class Clock(TrainerCallback):
    def __init__(self): self.took = []

    def on_step_begin(self, *args, **kw): self.start = time.perf_counter()

    def on_step_end(self, *args, **kw): self.took.append(time.perf_counter() - self.start)


def trl_steps(shape: dict, rows: list[dict], order: list[int], B: int, steps: int, loss: str,
              folder: str) -> tuple[float, list[float]]:  # seconds a step, losses
    config = SFTConfig(output_dir=folder, max_steps=steps, per_device_train_batch_size=B, learning_rate=1e-3,
                       loss_type=loss, lr_scheduler_type='linear', warmup_steps=.03, bf16=False,
                       use_cpu=pick_device() == 'cpu', report_to='none', disable_tqdm=True, logging_steps=1,
                       save_strategy='no', gradient_checkpointing=False, train_sampling_strategy='sequential')
    data = Dataset.from_list([dict(rows[i], assistant_masks=[int(y != -100) for y in rows[i]['labels']])
                              for i in order])
    t = SFTTrainer(model=build(shape), args=config, train_dataset=data, processing_class=tokenizer())
    clock = Clock()
    t.add_callback(clock); t.remove_callback(PrinterCallback)
    t.train()
    return statistics.median(clock.took[2:]), [r['loss'] for r in t.state.log_history if 'loss' in r]


def our_steps(shape: dict, rows: list[dict], B: int, steps: int, short: bool) -> tuple[float, list[float]]:
    took, step = [], sft._Job.step

    def timed(job):
        start = time.perf_counter(); step(job); took.append(time.perf_counter() - start)

    pick = sft.pick_nll
    sft._Job.step = timed
    if not short: sft.pick_nll = lambda *args: sft.plain_nll
    try: done = train_sft(build(shape), rows, steps=steps, batch_size=B, lr=1e-3, dtype=torch.float32)
    finally: sft._Job.step, sft.pick_nll = step, pick
    return statistics.median(took[2:]), done.losses


def jobs_for(shape: dict, rows: list[dict], order: list[int], B: int, steps: int, folder: str) -> dict:
    trl = lambda loss: lambda: trl_steps(shape, rows, order, B, steps, loss, folder)
    return {'ours': lambda: our_steps(shape, rows, B, steps, True),
            'ours, all logits': lambda: our_steps(shape, rows, B, steps, False),
            'TRL, chunked_nll (default)': trl('chunked_nll'), 'TRL, nll': trl('nll')}


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument('--repeats', type=int, default=5)
    args.add_argument('--steps', type=int, default=12)
    args.add_argument('--quick', action='store_true')
    o = args.parse_args()
    if o.quick: o.repeats, o.steps = 1, 4
    os.environ['HF_DATASETS_DISABLE_PROGRESS_BARS'] = '1'
    for name in ('trl', 'transformers', 'datasets'): logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())))
    B, table, data = 16, [], {}
    with tempfile.TemporaryDirectory() as folder:
        for shape_name, shape in SHAPES.items():
            rows = conversations(o.steps * B, shape['vocab_size'])
            plan = plan_batches([len(r['input_ids']) for r in rows], steps=o.steps, batch_size=B)
            order = [i for b in plan for i in b]
            jobs = jobs_for(shape, rows, order, B, o.steps, folder)
            took, losses = {n: [] for n in jobs}, {}
            for _ in range(o.repeats):
                for name, job in jobs.items():
                    seconds, losses[name] = job()
                    took[name].append(seconds)
            for name, some in took.items():
                s = spread(some)
                apart = float(np.abs(np.array(losses[name]) - losses['ours']).max())
                table.append([shape_name, name,
                    f'{1e3 * s["median"]:.0f} ({1e3 * s["least"]:.0f} to {1e3 * s["most"]:.0f})',
                              f'{s["median"] / statistics.median(took["ours"]):.2f}', f'{apart:.0e}'])
                data[f'{shape_name}: {name}'] = dict(s, apart=apart)
    head = ['model', 'step', 'ms (least to most)', 'by ours', 'largest difference of a loss (nats)']
    notes = (f'{o.steps} steps of {B} conversations of 30 to 79 tokens, a third of them learnt; float32, '
             f'{torch.get_num_threads()} thread(s); the median of the steps after the second, and of {o.repeats} runs '
             'in turn. Besides the loss, TRL computes the entropy and the accuracy of the tokens, which it logs.')
    write('sft_step', 'A step of full fine-tuning', [markdown(head, table)], notes, dict(steps=data), 'torch',
        'transformers', 'trl')


if __name__ == '__main__': main()
