"""Preference training on a toy model: a run that was killed ends where an unbroken one does."""
from pathlib import Path

import pytest
import torch

from llmnotes.align.dpo import dpo_loss, win_rate
from llmnotes.finetune.formats import CHAT_TEMPLATE, SPECIALS
from llmnotes.tokenizers.bpe import train_bpe

TEXTS = ['What does it do? Close the file.', 'Open the file. Return a list of names.'] * 4


def toy(folder:Path) -> Path: # a Llama folder of some thousand weights, with its tokenizer
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    train_bpe(TEXTS, 300, special_tokens=SPECIALS).save(folder)
    tok = AutoTokenizer.from_pretrained(folder, eos_token='<|im_end|>', pad_token='<|pad|>')
    tok.chat_template = CHAT_TEMPLATE
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2,
                         pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trainer(folder:Path, out:Path): # eight steps of two pairs, a checkpoint every three
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    say = lambda role, text: [dict(role=role, content=text)]
    rows = [dict(prompt=say('user', f'What does f{i} do?'), rejected=say('assistant', 'No.'),
                 chosen=say('assistant', f'Close {i} files.')) for i in range(16)]
    args = DPOConfig(output_dir=str(out), max_steps=8, per_device_train_batch_size=2,
                     learning_rate=1e-2, save_steps=3, use_cpu=True, bf16=False, gradient_checkpointing=False,
                     report_to='none', disable_tqdm=True, logging_steps=1, seed=1, data_seed=1)
    torch.manual_seed(1)
    return DPOTrainer(AutoModelForCausalLM.from_pretrained(folder), args=args,
                      train_dataset=Dataset.from_list(rows),
                      peft_config=LoraConfig(r=2, task_type='CAUSAL_LM'),
                      processing_class=AutoTokenizer.from_pretrained(folder))


def weights(t) -> dict[str, torch.Tensor]:
    return {n: w.detach().clone() for n, w in t.model.named_parameters() if w.requires_grad}


def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path:Path) -> None:
    from transformers.trainer_utils import get_last_checkpoint
    folder = toy(tmp_path/'model')
    whole = trainer(folder, tmp_path/'whole'); whole.train()
    killed = trainer(folder, tmp_path/'killed')
    step = killed.training_step
    def stops(*args, **kwargs):
        if killed.state.global_step == 4: raise KeyboardInterrupt
        return step(*args, **kwargs)
    killed.training_step = stops
    with pytest.raises(KeyboardInterrupt): killed.train()
    last = get_last_checkpoint(tmp_path/'killed')
    assert Path(last).name == 'checkpoint-3'
    again = trainer(folder, tmp_path/'killed'); again.train(resume_from_checkpoint=last)
    fresh = weights(trainer(folder, tmp_path/'fresh'))
    want, got = weights(whole), weights(again)
    assert all(torch.equal(want[n], got[n]) for n in want)
    assert not all(torch.equal(want[n], fresh[n]) for n in want), 'nothing was trained'


def test_one_pair_and_one_comparison() -> None:
    one = torch.tensor([-3.])
    assert dpo_loss(one, one, one, one).item() == pytest.approx(.6931472)
    rate, low, high = win_rate(0, 1)
    assert rate == low == 0 and .7 < high < 1
