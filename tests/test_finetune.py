"LoRA on a toy: an interrupted training goes on as if nothing had been, and what is saved loads"
import logging
from pathlib import Path

import pytest
import torch

from llmnotes.finetune.formats import CHAT_TEMPLATE, encode_chat
from llmnotes.finetune.lora import answer_logprobs, lora_model, lora_parameters, save_chat_model
from llmnotes.infer.decoding import tiny_model

pytest.importorskip('peft'); pytest.importorskip('trl')
TALKS = [[dict(role='user', content=f'What is {n}?'),
          dict(role='assistant', content=f'A number, {n} plus {n}.')] for n in range(24)]


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp('toy')/'base')


def opened(folder: Path, tie: bool = False):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if tie:
        config = type(model.config)(**model.config.to_dict() | dict(tie_word_embeddings=True))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    tok = AutoTokenizer.from_pretrained(folder)
    tok.chat_template, tok.eos_token = CHAT_TEMPLATE, '<|im_end|>'
    return model, tok


def trainer(base: Path, folder: Path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    for name in ('trl', 'transformers', 'datasets'): logging.getLogger(name).setLevel(logging.ERROR)
    model, tok = opened(base)
    config = SFTConfig(output_dir=str(folder), assistant_only_loss=True, eos_token='<|im_end|>',
                       bf16=False, use_cpu=True, report_to='none', disable_tqdm=True, max_steps=6,
                       save_strategy='steps', save_steps=3, per_device_train_batch_size=4,
                       learning_rate=1e-2, gradient_checkpointing=False)
    rows = Dataset.from_list([dict(messages=t) for t in TALKS])
    return SFTTrainer(model=lora_model(model, tok, r=4, alpha=8), args=config, train_dataset=rows,
                      processing_class=tok)


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope='module')
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    t = trainer(base, folder)
    before = trained(t.model)
    t.train()
    return t, before, folder


def test_every_trained_weight_moves_and_no_other(base, finished) -> None:
    t, before, _ = finished
    after = trained(t.model)
    assert len(after) == 2 * 7 * 2 + 2, sorted(after)
    assert all(not torch.equal(after[n], before[n]) for n in after)
    plain = opened(base)[0].state_dict()
    kept = {n.replace('base_model.model.', '').replace('.base_layer', '')
            .replace('.token_adapter', ''): p for n, p in t.model.state_dict().items()}
    assert all(torch.equal(kept[n], p) for n, p in plain.items())


def test_resumes_with_equal_weights(base, finished) -> None:
    t, _, folder = finished
    again = trainer(base, folder)
    again.train(resume_from_checkpoint=str(folder/'checkpoint-3'))
    want, got = trained(t.model), trained(again.model)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)


def test_what_is_saved_loads(base, finished, tmp_path) -> None:
    from peft import PeftModel
    t, _, _ = finished
    model, tok = opened(base)
    from transformers import AutoTokenizer
    plain = AutoTokenizer.from_pretrained(base)              # with the template it came with
    assert plain.chat_template != CHAT_TEMPLATE and plain.eos_token != '<|im_end|>'
    save_chat_model(t.model, plain, tmp_path/'out', base)
    merged, tok2 = opened(tmp_path/'out')[0], AutoTokenizer.from_pretrained(tmp_path/'out')
    ids = tok2.apply_chat_template(TALKS[0], return_tensors='pt')['input_ids']
    assert ids[0].tolist() == encode_chat(TALKS[0], tok)['input_ids']
    beside = PeftModel.from_pretrained(model, tmp_path/'out'/'adapter').eval()
    with torch.no_grad():
        got = merged(ids).logits
        for other in (beside, t.model.eval()):
            assert (got - other(ids).logits).abs().max() < 1e-4
        assert (got - opened(base)[0](ids).logits).abs().max() > 1e-2
    end = tok.convert_tokens_to_ids('<|im_end|>')
    assert merged.generation_config.eos_token_id[0] == merged.config.eos_token_id == end
    assert (tok2.eos_token, tok2.chat_template) == ('<|im_end|>', CHAT_TEMPLATE)
    said = ''.join(p.read_text() for p in (tmp_path/'out').rglob('*.json'))
    assert str(base.parent) not in said, 'a path of this machine is in the artifact'


def test_tied_head_trains_its_rows_once(base) -> None:
    model, tok = opened(base, tie=True)
    shapes = [m.weight.shape for n, m in model.named_modules()
              if isinstance(m, torch.nn.Linear) and n != 'lm_head']
    x = torch.tensor([encode_chat(TALKS[0], tok)['input_ids']])
    with torch.no_grad():
        want = model(x).logits
        pupil = lora_model(model, tok, r=4)
        assert torch.equal(pupil(x).logits, want)
    count = lora_parameters(shapes, 4, rows=2, width=model.config.hidden_size)
    assert pupil.get_nb_trainable_parameters()[0] == count


def test_scores_are_those_of_transformers_in_any_batch(base) -> None:
    model, tok = opened(base)
    longest_first = [[t[0], dict(t[1], content=t[1]['content'] * (1 + i % 3))]
                     for i, t in reversed(list(enumerate(TALKS)))]
    rows = [encode_chat(t, tok) for t in longest_first]
    one, many = (answer_logprobs(model, rows, batch_size=b) for b in (1, 7))
    for row, a, b in zip(rows, one, many):
        n = sum(y != -100 for y in row['labels'])
        ids, labels = (torch.tensor([row[k]]) for k in ('input_ids', 'labels'))
        with torch.no_grad(): want = -model(ids, labels=labels).loss.item() * n
        assert len(a) == len(b) == n and abs(a - b).max() < 1e-5
        assert abs(a.sum() - want) < 1e-3


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ValueError, match='the rank is 0'): lora_parameters([(2, 3)], 0)
