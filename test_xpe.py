"""Offline, on the CPU: what the paper gives is asserted, everything else is computed a second time, plainly.

    python -m pytest -q test_xpe.py

Each test says which mistake it would catch. Backbones are random and tiny, built from transformers' configs.
Tests against other people's packages (micm_nlp: the authors' toolkit; peft) run where these are installed,
the one over all of SIB-200 where SIB200=FOLDER names a copy of it.
"""
import copy
import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from torch import nn

import bench
import data
import evaluate
import train
import xpe

HERE = Path(__file__).resolve().parent
SIB200 = Path(os.environ.get("SIB200", HERE / "sib200"))        # data/<language>/*.tsv and languages.csv
torch.set_num_threads(1)


# ---- tiny backbones ----------------------------------------------------------------------------------------

SIZES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=64, initializer_range=0.3)
ENCODERS = {"xlm-roberta": {}, "xlm-roberta-xl": {}, "roberta": {}, "camembert": {}, "bert": {},
            "distilbert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
            "electra": dict(embedding_size=8),
            "deberta-v2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"],
                               position_biased_input=False, position_buckets=8),
            "modernbert": dict(local_attention=8, global_attn_every_n_layers=2, pad_token_id=1,
                               bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)}
DECODERS = {"qwen2": dict(num_key_value_heads=1), "llama": dict(num_key_value_heads=1)}


def tiny(kind="xlm-roberta", **changes):
    """A random backbone of two layers, 16 wide, loud enough that every part of it shows in the logits."""
    sizes = SIZES | (ENCODERS | DECODERS)[kind] | changes
    if kind == "distilbert":        # names its sizes otherwise
        sizes = {k: v for k, v in sizes.items() if not k.startswith(("hidden_size", "num_", "intermediate"))}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModel.from_config(config).eval()


def loud(module, seed, std=0.3):
    """Fill every parameter with N(0, std), biases and norms too, so that none can be forgotten unseen."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g) * std
    return module


def texts(*lengths, seed=1):
    """Random token ids (5 ... 59), one list for each length."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 60, (n,), generator=g).tolist() for n in lengths]


# ---- the second computation: one prompt, one sentence at a time, torch's own layers ------------------------

def fill(module, tensors):
    """Load (1, ...) tensors into a plain torch module."""
    module.load_state_dict({name: t.detach()[0] for name, t in tensors.items()})
    return module


def plain_linear(ours):
    return fill(nn.Linear(ours.weight.shape[2], ours.weight.shape[1]), dict(ours.named_parameters()))


def plain_mlp(linears, x):
    for i, ours in enumerate(linears):
        x = plain_linear(ours)(x if i == 0 else F.relu(x))
    return x


def plain_prompt(prompt):
    """The P x H matrix of a SoftPrompt of K = 1 without dropout, from torch's own layers."""
    c, rows = prompt.config, []
    if prompt.standard is not None:
        rows += list(prompt.standard[0])
    if prompt.encoded is not None:
        x, e = prompt.encoded[0], getattr(prompt, "encoder")
        if c["encoder"] == "mlp":
            x = plain_mlp(e.linears, x)
        elif c["encoder"] == "lstm":
            lstm = nn.LSTM(c["width"], c["hidden"], c["layers"], bidirectional=True)
            fill(lstm, {n: p for n, p in e.named_parameters() if "_l" in n and "." not in n})
            x = plain_mlp(e.mlp.linears, lstm(x[:, None])[0][:, 0])
        elif c["encoder"] == "attention":
            attention, norm = nn.MultiheadAttention(c["width"], c["heads"]), nn.LayerNorm(c["width"])
            fill(attention, {"in_proj_weight": e.qkv.weight, "in_proj_bias": e.qkv.bias,
                             "out_proj.weight": e.merge.weight, "out_proj.bias": e.merge.bias})
            fill(norm, {"weight": e.norm_weight, "bias": e.norm_bias})
            x = plain_mlp(e.mlp.linears, plain_linear(e.project)(norm(x + attention(x, x, x)[0])))
        rows += list(x)
    return torch.stack(rows).detach()


@torch.no_grad()
def plain_logits(backbone, prompt, head, ids, reads="prompt"):
    """Logits (C,) of one unpadded sentence through XLM-R's own classification head."""
    config = copy.deepcopy(backbone.config)
    config.num_labels = head.config["classes"]
    whole = transformers.XLMRobertaForSequenceClassification(config).eval()
    whole.roberta = backbone
    fill(whole.classifier, {"dense.weight": head.dense.weight, "dense.bias": head.dense.bias,
                            "out_proj.weight": head.out.weight, "out_proj.bias": head.out.bias})
    matrix = plain_prompt(prompt)
    words = backbone.embeddings.word_embeddings.weight[torch.tensor(ids)]
    x = torch.cat((matrix, words))[None]
    if reads == "prompt":
        return whole(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2])).logits[0]
    h = backbone(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2])).last_hidden_state[0]
    text = [h[len(matrix) + i] for i in range(len(ids))]
    vector = {"first": text[0], "last": text[-1], "mean": sum(text) / len(text)}[reads]
    return whole.classifier(vector[None, None])[0]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- 1. the paper's numbers --------------------------------------------------------------------------------

def fresh_model(config, mode, seeds, backbone):
    """What train.py makes of a configuration, before the first step -> (model, groups with their rates)."""
    job = SimpleNamespace(config=config, cfg=train.settings_for(config, mode, False, None), source=None)
    learners = [train.Learner("", s, None, {"labels": list(data.LABELS), "reads": "prompt"}) for s in seeds]
    model = train.make_model(job, learners, backbone)
    return model, train.parameter_groups(model, job.cfg)


@pytest.mark.parametrize("mode, ratio, standard, encoded, encoder, total", [
    ("spt", 0.7, 20, 0, 0, 1_077_255), ("xpe", 0.7, 0, 20, 591_360, 1_668_615),
    ("dual", 0.3, 14, 6, 591_360, 1_668_615), ("dual", 0.7, 6, 14, 591_360, 1_668_615),
    ("head", 0.7, 20, 0, 0, 1_056_775)])
def test_parameter_counts_of_the_paper(mode, ratio, standard, encoded, encoder, total):
    """Catches: a missing layer or bias, a wrong width in config.yaml, standard and encoded rows swapped."""
    config = evaluate.load_config(settings=[f"prompt.ratio={ratio}"])
    large = transformers.XLMRobertaConfig(vocab_size=250_002, hidden_size=1024, num_hidden_layers=24,
                                          num_attention_heads=16, intermediate_size=4096,
                                          max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        backbone = transformers.AutoModel.from_config(large)
        model, groups = fresh_model(config, mode, (11, 12), backbone)

    def count(parameters):
        return sum(p.numel() for p in parameters) // 2          # two seeds, each with its own

    rows = [(p.shape[1] if p is not None else 0) for p in (model.prompt.standard, model.prompt.encoded)]
    assert rows == [standard, encoded] and 1024 * sum(rows) == 20_480
    assert count(model.prompt.encoder.parameters() if encoded else []) == encoder
    assert count(model.head.parameters()) == 1_056_775
    assert count(p for g in groups for p in g["params"]) == total
    assert count(p for p in model.parameters() if p.requires_grad) == total
    assert 558e6 < sum(p.numel() for p in backbone.parameters()) < 561e6
    assert xpe.positions(backbone) == 512


def test_rates_of_the_recipe():
    """Catches: the standard rows at the encoder's rate (SPT then hardly learns), weight decay on biases."""
    config, want = evaluate.load_config(), {}
    model, groups = fresh_model(config, "dual", [11], tiny())
    found = {id(p): (g["rate"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0 if name.endswith("bias") else 0.01
            want[id(p)] = (5e-3, 0) if name == "prompt.standard" else (5e-5, decay)
    assert found == want and len(want) == 12


@pytest.mark.parametrize("ratio, encoded", [(0, 0), (0.01, 1), (0.3, 6), (0.7, 14), (0.99, 19), (1, 20),
                                            (0.34, 6)])
def test_shares_of_encoded_rows(ratio, encoded):
    """Catches: rounding instead of int(), DUAL that degenerates into SPT or XPE, rows in the wrong order."""
    prompt = loud(xpe.SoftPrompt(8, ratio=ratio, encoder="none"), 1)
    parts = [p[0] for p in (prompt.standard, prompt.encoded) if p is not None]
    assert (0 if prompt.encoded is None else prompt.encoded.shape[1]) == encoded
    assert torch.equal(prompt()[0, 0], torch.cat(parts)) and prompt().shape == (1, 1, 20, 8)


def test_initialisation():
    """Catches: another start than the authors' (embeddings N(0, 1), head N(0, 0.02), torch's Linears)."""
    torch.manual_seed(3)
    prompt, head = xpe.SoftPrompt(512, ratio=0.5, encoder="mlp"), xpe.ClassificationHead(512, 7)
    for p in (prompt.standard, prompt.encoded):
        assert abs(p.std() - 1) < 0.03 and abs(p.mean()) < 0.03
    for linear in prompt.encoder.linears:
        bound = linear.weight.shape[2] ** -0.5
        assert 0.98 * bound < linear.weight.abs().max() <= bound and linear.bias.abs().max() <= bound
    assert abs(head.dense.weight.std() - 0.02) < 1e-3
    assert not head.dense.bias.any() and not head.out.bias.any()


# ---- 2. the logits, computed twice -------------------------------------------------------------------------

@pytest.mark.parametrize("reads", xpe.READS)
@pytest.mark.parametrize("encoder, layers", [("mlp", 1), ("mlp", 2), ("mlp", 3), ("lstm", 1), ("lstm", 2),
                                             ("attention", 2), ("none", 2)])
def test_logits_against_plain_torch(encoder, layers, reads):
    """Catches: any slip in the encoders, in concatenation, mask, positions, read-out or head."""
    backbone, ids = tiny(), texts(9, 4, 1)
    for ratio in (0, 0.3, 0.7, 0.99, 1):
        prompt = loud(xpe.SoftPrompt(16, 20, ratio, encoder, 6, layers, 0.1, heads=4), 5)
        head = loud(xpe.ClassificationHead(16, 7), 6)
        model = xpe.PromptedClassifier(backbone, prompt, head, reads).eval()
        want = torch.stack([plain_logits(backbone, prompt, head, x, reads) for x in ids])
        close(model(*data.collate(ids, 1)), want)
        close(prompt.collapse().standard[0], plain_prompt(prompt))
    assert (want[0] - want[1]).abs().max() > 1e-2           # the comparison sees something


@pytest.mark.parametrize("encoder", xpe.ENCODERS)
@pytest.mark.parametrize("training", [False, True])
def test_three_prompts_in_one_batch(encoder, training):
    """Catches: a row that gets another row's prompt or head, in any mixture of owners and in blocks."""
    backbone, ids = tiny(), texts(5, 3, 8, 8, 1, 6, 2)
    prompts = [loud(xpe.SoftPrompt(16, 6, 0.5, encoder, 6, 2, 0.0, heads=2), k) for k in range(3)]
    heads = [loud(xpe.ClassificationHead(16, 7, 0.0), 10 + k) for k in range(3)]
    for prompt in prompts:
        for dropout in (m for m in prompt.modules() if isinstance(m, xpe.Dropout)):
            dropout.p = 0.0         # that of the attention encoder is fixed
    want = [[plain_logits(backbone, p, h, x) for p, h in zip(prompts, heads)] for x in ids]     # [row][owner]
    model = xpe.PromptedClassifier(backbone, xpe.stack(prompts), xpe.stack(heads))
    model.train(training).backbone.eval()
    for owner in ([2, 0, 0, 1, 2, 2, 0], [0, 2, 2, 2, 0, 0, 2], [1] * 7, [0, 0, 1, 1, 1, 2, 2]):
        got = model(*data.collate(ids, 1), torch.tensor(owner))
        close(got, torch.stack([want[i][k] for i, k in enumerate(owner)]))
    got = model(*data.collate(ids[:6], 1))
    close(got, torch.stack([want[i][i // 2] for i in range(6)]))
    with pytest.raises(ValueError, match="7 rows are no 3 equal blocks"):
        model(*data.collate(ids, 1))


def test_gradients_of_a_mixed_batch_stay_with_their_owner():
    """Catches: learners that train each other's prompts; a prompt without rows that gets a gradient."""
    backbone, ids = tiny(), texts(5, 3, 8, 6)
    singles = [(loud(xpe.SoftPrompt(16, 4, 0.5, hidden=6, dropout=0.0), k),
                loud(xpe.ClassificationHead(16, 7, 0.0), 10 + k)) for k in range(3)]
    owner, y = torch.tensor([2, 0, 2, 0]), torch.tensor([1, 2, 3, 4])
    want = []
    for k, (p, h) in enumerate(copy.deepcopy(singles)):
        rows = [i for i in range(4) if owner[i] == k]
        if rows:
            alone = xpe.PromptedClassifier(backbone, p, h)
            logits = alone(*data.collate([ids[i] for i in rows], 1))
            F.cross_entropy(logits, y[rows], reduction="sum").backward()
        want.append({n: q.grad for m in (p, h) for n, q in m.named_parameters()})
    model = xpe.PromptedClassifier(backbone, *(xpe.stack(list(m)) for m in zip(*singles)))
    F.cross_entropy(model(*data.collate(ids, 1), owner), y, reduction="sum").backward()
    for m in (model.prompt, model.head):
        for name, p in m.named_parameters():
            for k in (0, 2):
                close(p.grad[k], want[k][name][0])
            assert not p.grad[1].any()


# ---- 3. dropout --------------------------------------------------------------------------------------------

def test_each_row_has_its_own_dropout_mask():
    """Catches: one mask for the whole batch (peft's way), a mask without its scale, dropout in evaluation."""
    prompt = xpe.SoftPrompt(64, 10, 1.0, "mlp", 64, 1, 0.25)
    for linear in prompt.encoder.linears:       # an encoder that only adds 5 before its dropout
        linear.weight.data, linear.bias.data = torch.eye(64)[None], torch.zeros(1, 64)
    prompt.encoder.linears[0].bias.data += 5
    e = prompt.encoded[0] + 5
    for generators in (None, [torch.Generator().manual_seed(1)]):
        for dropout in (m for m in prompt.modules() if isinstance(m, xpe.Dropout)):
            dropout.generators = generators
        x = prompt.train()(40)[0]               # (40, 10, 64)
        kept = x != 0
        close(x, torch.where(kept, e / 0.75, 0).expand(40, -1, -1))
        assert abs(kept.float().mean() - 0.75) < 0.02
        assert len({tuple(row.flatten().tolist()) for row in kept}) == 40
    close(prompt.eval()(40)[0], e.expand(40, -1, -1))


def test_evaluation_encodes_once(monkeypatch):
    """Catches: an encoder that runs for every row of a test batch, or once where training needs own masks."""
    seen, original = [], xpe.MLP.forward
    monkeypatch.setattr(xpe.MLP, "forward", lambda self, x, n: seen.append(n) or original(self, x, n))
    model = xpe.PromptedClassifier(tiny(), xpe.SoftPrompt(16, 4, 0.5), xpe.ClassificationHead(16, 7))
    batch = data.collate(texts(3, 3, 3, 3, 3), 1)
    model.eval()(*batch), model(*batch, torch.zeros(5, dtype=torch.long)), model.train()(*batch)
    assert seen == [1, 1, 5]


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "attention"])
def test_generators_make_a_prompt_independent_of_its_neighbours(encoder):
    """Catches: seeds that change their dropout masks because other seeds train beside them."""
    backbone, batch = tiny(), data.collate(texts(5, 3, 8, 6), 1)
    made = [(loud(xpe.SoftPrompt(16, 6, 0.5, encoder, 6, 2, 0.4, heads=2), k),
             loud(xpe.ClassificationHead(16, 7, 0.4), 10 + k)) for k in range(3)]
    alone = []
    for k, (prompt, head) in enumerate(copy.deepcopy(made)):
        model = xpe.PromptedClassifier(backbone, prompt, head).train()
        backbone.eval()
        model.set_generators([torch.Generator().manual_seed(k)])
        alone.append([model(*batch) for _ in range(2)])
    model = xpe.PromptedClassifier(backbone, *(xpe.stack(list(m)) for m in zip(*made))).train()
    backbone.eval()
    model.set_generators([torch.Generator().manual_seed(k) for k in range(3)])
    for step in range(2):
        got = model(*(t.repeat(3, 1) for t in batch)).chunk(3)
        for k in range(3):
            close(got[k], alone[k][step])
    assert (alone[0][0] - alone[0][1]).abs().max() > 1e-3       # dropout was at work


def test_cheap_dropout_is_dropout():
    """Catches: another share or scale than p, a gradient through another mask, dropout in evaluation, the
    same mask twice, a real backbone that is not reached."""
    x = torch.full((1_001, 333), 2.0, requires_grad=True)
    torch.manual_seed(3)
    with train.CheapDropout():
        for p in (0.1, 0.5, 0.9):
            y = F.dropout(x, p, training=True)
            kept = y != 0
            close(y, torch.where(kept, 2 / (1 - p), 0.0))
            spread = 6 * (p * (1 - p) / x.numel()) ** 0.5
            assert abs(kept.float().mean() - (1 - p)) < spread + 2 ** -16
            assert (kept.float().mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 1_001) ** 0.5
            close(torch.autograd.grad(y.sum(), x)[0], torch.where(kept, 1 / (1 - p), 0.0))
            assert not torch.equal(kept, F.dropout(x, p) != 0)
        assert torch.equal(F.dropout(x, 0.5, training=False), x) and torch.equal(F.dropout(x, 0.0), x)
        assert not F.dropout(x, 1.0).any()
        assert F.dropout(x.bfloat16(), 0.1).dtype == torch.bfloat16
        torch.manual_seed(4)
        y = F.dropout(x, 0.1)
        torch.manual_seed(4)
        assert torch.equal(F.dropout(x, 0.1), y)
    torch.manual_seed(4)
    assert not torch.equal(F.dropout(x, 0.1), y)                # outside all is as ever
    seen = []
    with pytest.MonkeyPatch.context() as m, train.CheapDropout():
        m.setattr(train.CheapDropout, "dropout", staticmethod(lambda x, p, *_, **__: seen.append(p) or x))
        tiny(attn_implementation="eager").train()(*data.collate(texts(5, 3), 1))
    assert seen == [0.1] * 7            # two layers: after the embeddings, and three in each


# ---- 4. every backbone -------------------------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_shortened_last_layer_keeps_its_dropout(attention):
    """Catches: attention dropout lost or active in evaluation, a backbone left changed by a forward."""
    backbone = tiny(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5,
                    attn_implementation=attention)
    model = xpe.PromptedClassifier(backbone, loud(xpe.SoftPrompt(16, 6, 0.0), 1),
                                   loud(xpe.ClassificationHead(16, 7, 0.0), 2))
    batch = data.collate(texts(9, 4), 1)
    plain = backbone(*batch)[0]
    assert torch.equal(model.eval()(*batch), model(*batch))
    runs = torch.stack([model.train()(*batch) for _ in range(400)]).detach()        # (400, 2, 7)
    assert (runs.std(0) > 0.01).all() and "forward" not in vars(backbone.encoder.layer[-1].attention)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(xpe, "AS_BERT", ())                       # the backbone's own attention
        whole = torch.stack([model(*batch) for _ in range(400)]).detach()
    assert ((runs.mean(0) - whole.mean(0)).abs() < 6 * (runs.std(0) / 20)).all()
    assert ((runs.std(0) / whole.std(0)).log().abs() < 0.4).all()
    assert torch.equal(backbone.eval()(*batch)[0], plain)
    model.train()
    backbone.eval()
    grads = []
    for _ in range(2):          # second time with gradient checkpointing, which runs layers again in backward
        grads.append(torch.autograd.grad(model(*batch).logsumexp(1).sum(), [*model.prompt.parameters()])[0])
        backbone.gradient_checkpointing_enable()
    close(grads[0], grads[1])
    backbone.train()
    model(*batch).sum().backward()


def test_causal_layers_are_not_shortened():
    """Catches: row 0 of a causal encoder, which may look at itself alone, shown the whole text."""
    model = xpe.PromptedClassifier(tiny("roberta", is_decoder=True), loud(xpe.SoftPrompt(16, 6, 0.0), 1),
                                   loud(xpe.ClassificationHead(16, 7, 0.0), 2)).eval()
    batch = data.collate(texts(9, 4), 1)
    got = model(*batch)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(xpe, "AS_BERT", ())
        close(got, model(*batch))


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_any_backbone(kind):
    """Catches: prompt or mask without effect, padding that leaks into logits, wrong widths or positions."""
    backbone = tiny(kind)
    width, states = xpe.widths(backbone)
    assert (width, states) == (8 if kind == "electra" else 16, 16)
    prompt = loud(xpe.SoftPrompt(width, 6, 0.5, hidden=5), 1, 0.5)
    head = loud(xpe.ClassificationHead(states, 7), 2)
    model = xpe.PromptedClassifier(backbone, prompt, head, "last" if kind in DECODERS else "prompt").eval()
    ids = texts(9, 4, 1)
    batch = data.collate(ids, 1)
    logits = model(*batch)
    for more, value in ((12, 1), (2, 7)):       # more padding, and whatever it is padded with
        close(model(F.pad(batch[0], (0, more), value=value), F.pad(batch[1], (0, more))), logits, 1e-4)
    close(torch.cat([model(*data.collate([x], 1)) for x in ids]), logits, 1e-4)     # no padding
    if kind not in DECODERS:                    # no row that the head reads may miss anything of the backbone
        x = torch.cat((prompt()[0].expand(3, -1, -1), backbone.get_input_embeddings()(batch[0])), 1)
        h = backbone(inputs_embeds=x, attention_mask=F.pad(batch[1], (6, 0), value=1))[0]
        assert h.shape[1] == 6 + 9
        plain = head(h[None, :, 0])[0]
        close(plain, logits, 1e-5)
        mine = [*prompt.parameters()]
        close(torch.cat([g.flatten() for g in torch.autograd.grad(plain.logsumexp(1).sum(), mine)]),
              torch.cat([g.flatten() for g in torch.autograd.grad(model(*batch).logsumexp(1).sum(), mine)]),
              1e-4)
    other = model(batch[0].roll(1, 0), batch[1].roll(1, 0))
    assert (other - logits).abs().min(1).values.max() > 1e-4    # the text matters
    model.train()(*batch).logsumexp(1).sum().backward()
    for name, p in [*prompt.named_parameters(), *head.named_parameters()]:
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in backbone.parameters())

    limit = xpe.positions(backbone)
    roberta = kind in ("xlm-roberta", "xlm-roberta-xl", "roberta", "camembert")
    assert limit == (62 if roberta else 64)
    model.eval()(*data.collate(texts(limit - 6), 1))
    message = f"6 prompt rows . {limit - 5} text tokens = {limit + 1} exceed the {limit} .*be {limit - 6} "
    with pytest.raises(ValueError, match=message):
        model(*data.collate(texts(limit - 5), 1))
    if roberta or kind in ("bert", "electra", "distilbert"):        # and the limit is the backbone's own
        with pytest.raises((IndexError, RuntimeError)):
            backbone(input_ids=torch.tensor(texts(limit + 1)))


def test_what_does_not_fit_is_refused():
    """Catches: wrong sizes that surface as a matmul error deep in the backbone, or not at all."""
    backbone, head = tiny(), xpe.ClassificationHead(16, 7)
    for make, message in [
            (lambda: xpe.SoftPrompt(16, ratio=1.5), "ratio: 1.5 of 20 rows is no share"),
            (lambda: xpe.SoftPrompt(16, ratio=-0.1), "ratio: -0.1 of 20"),
            (lambda: xpe.SoftPrompt(16, layers=0), "layers cannot be 0"),
            (lambda: xpe.SoftPrompt(16, layers=65), "layers cannot be 65, only range.1, 65."),
            (lambda: xpe.SoftPrompt(0), "width cannot be 0"),
            (lambda: xpe.SoftPrompt(16, hidden=-1), "hidden cannot"),
            (lambda: xpe.ClassificationHead(16, 0), "head.classes cannot be 0"),
            (lambda: xpe.ClassificationHead(16, 7, 1.5), "dropout cannot be 1.5"),
            (lambda: xpe.SoftPrompt(16, length=1, ratio=0.5), "ratio: 0.5 of 1 rows is no share"),
            (lambda: xpe.SoftPrompt(16, length=0, ratio=0), "length cannot be 0"),
            (lambda: xpe.SoftPrompt(16, dropout=1.0), "dropout cannot be 1.0"),
            (lambda: xpe.SoftPrompt(16, encoder="mpl"), "encoder cannot be 'mpl', only .'mlp', 'lstm', 'att"),
            (lambda: xpe.SoftPrompt(16, encoder="attention", heads=5), "5 attention heads do not divide a"),
            (lambda: xpe.SoftPrompt(16, encoder="attention", heads=0), "0 attention heads do not divide"),
            (lambda: xpe.PromptedClassifier(backbone, None, head, "cls"),
             "reads cannot be 'cls', only .'prompt', 'first'"),
            (lambda: xpe.PromptedClassifier(backbone, xpe.SoftPrompt(8), head), "8 and 16 do .* 16 and 16"),
            (lambda: xpe.stack([xpe.SoftPrompt(16), xpe.SoftPrompt(16, 10)]), "of one configuration")]:
        with pytest.raises(ValueError, match=message):
            make()


# ---- 5. torch alone ----------------------------------------------------------------------------------------

ALONE = """
import sys
for name in "transformers safetensors numpy yaml tqdm huggingface_hub tokenizers".split():
    sys.modules[name] = None
import torch, torch.nn.functional as F, xpe

class Toy(torch.nn.Module):                     # the mean of its input through one layer
    def __init__(self):
        super().__init__()
        self.words, self.layer = torch.nn.Embedding(30, 8), torch.nn.Linear(8, 8)
    def get_input_embeddings(self):
        return self.words
    def forward(self, inputs_embeds, attention_mask):
        x = inputs_embeds * attention_mask[:, :, None]
        return torch.tanh(self.layer(x + x.sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]))

torch.manual_seed(0)
model = xpe.PromptedClassifier(Toy(), xpe.SoftPrompt(8, 4, 0.5), xpe.ClassificationHead(8, 3), "first")
mine = [p for p in model.parameters() if p.requires_grad]
adam, ids = torch.optim.Adam(mine, 3e-2), torch.randint(0, 30, (24, 5))
for step in range(60):
    loss = F.cross_entropy(model(ids, torch.ones_like(ids)), ids[:, 0] % 3)
    print(float(loss))
    adam.zero_grad(); loss.backward(); adam.step()
"""


def test_xpe_needs_torch_alone(tmp_path):
    """Catches: an import that makes xpe.py useless to whoever copies that one file."""
    shutil.copy(HERE / "xpe.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in done.stdout.split()]
    assert abs(losses[0] - math.log(3)) < 0.2 and losses[-1] < 0.5 * losses[0]


# ---- 6, 8, 14. training, through train.main ----------------------------------------------------------------

WORDS = "star atom cell beach hotel road vote law party goal team match doctor virus sleep film song stage " \
        "river mountain coast the a of in and new old was has after near".split()


def write_corpus(root, languages=("aaa_Latn", "bbb_Latn", "ccc_Latn"), sizes=(40, 21, 17)):
    """Parallel sentences: three words give the topic away, the others are a cipher of each language."""
    rng = np.random.default_rng(0)
    plan = {s: [(i, int(rng.integers(7)), rng.integers(21, 32, int(rng.integers(0, 6)))) for i in range(n)]
            for s, n in zip(data.SPLITS, sizes)}
    for k, language in enumerate(languages):
        (root / language).mkdir(parents=True)
        for split, rows in plan.items():
            lines = ["index_id\tcategory\ttext"]
            for i, label, filler in rows:
                words = [*WORDS[3 * label:3 * label + 3], *(WORDS[21 + (j + k) % 11] for j in filler)]
                lines.append(f"{split}{i}\t{data.LABELS[label]}\t{' '.join(words)}")
            (root / language / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


def write_backbone(root):
    """A tiny random XLM-R with a word-level tokenizer, saved as AutoModel and AutoTokenizer read them."""
    import tokenizers
    vocabulary = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        unk_token="<unk>", pad_token="<pad>").save_pretrained(root)
    tiny(vocab_size=len(vocabulary)).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with corpus, backbone and configuration, for everything that trains."""
    root = tmp_path_factory.mktemp("world")
    write_corpus(root / "corpus")
    write_backbone(root / "backbone")
    (root / "config.yaml").write_text(yaml.safe_dump({
        "sources": "two", "groups": {"two": ["aaa_Latn", "bbb_Latn"], "others": ["ccc_Latn", "bbb_Latn"]},
        "targets": {"Others": "others"}, "backbone": {"name": str(root / "backbone")},
        "data": {"name": str(root / "corpus"), "max_length": 20}, "prompt": {"length": 4, "hidden": 6},
        "train": {"batch_size": 8, "rate": 0.01, "standard_rate": 0.02, "encoded_rate": 0.01, "amp": "off",
                  "steps": 20},
        "full": {"epochs": 1, "rate": 0.001, "accumulate": 2}, "evaluate": {"after_training": False}}))
    return root


def run(world, out, *argv):
    """train.main with the tiny configuration; the exit status must be 0."""
    common = ["--sources", str(world / "config.yaml"), "--out", str(out), "--device", "cpu"]
    assert train.main([*common, *argv]) == 0


@pytest.fixture
def passes(monkeypatch):
    """What each pass trained: [(learners, model, tensors before)], filled while it runs."""
    seen, original = [], train.train

    def spy(learners, model, *rest, **more):
        seen.append((learners, model, {n: p.detach().clone() for n, p in model.state_dict().items()}))
        return original(learners, model, *rest, **more)
    monkeypatch.setattr(train, "train", spy)
    return seen


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("mode", ["spt", "xpe", "dual", "head"])
def test_only_prompt_and_head_move(world, passes, tmp_path, mode, amp):
    """Catches: a backbone that trains along, a head or prompt that silently does not (peft's bug of 2025), a
    half-precision prompt, a `head` baseline that trains its prompt."""
    run(world, tmp_path, "--mode", mode, "--steps", "3", "--set", f"train.amp='{amp}'")
    (_, model, before), = passes
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("backbone."):
            assert tensor.dtype == (torch.bfloat16 if amp == "bf16" and tensor.is_floating_point()
                                    else before[name].dtype)
            assert torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype == torch.float32
            moved = not torch.equal(tensor, before[name])
            assert moved == (name.startswith("head.") or mode != "head"), name
            # not just somewhere: every row of the prompt
            if name in ("prompt.standard", "prompt.encoded") and moved:
                assert (tensor != before[name]).any(-1).all()


def test_full_fine_tuning_moves_the_backbone(world, passes, tmp_path):
    """Catches: the baseline `full` run with a frozen backbone, or with a prompt in front."""
    run(world, tmp_path, "--mode", "full")
    (_, model, before), = passes
    assert model.prompt is None
    still = [n for n, p in model.backbone.named_parameters() if torch.equal(p, before[f"backbone.{n}"])]
    assert all("position" in n for n in still), still


@pytest.mark.parametrize("mode", ["dual", "spt"])
def test_seeds_trained_together_equal_seeds_trained_alone(world, passes, tmp_path, mode):
    """Catches: anything that learners share by accident: dropout masks, batches, norms, optimizer state."""
    same = ["--mode", mode, "--set", "backbone.dropout=false", "--set", "prompt.dropout=0.3", "--steps", "30"]
    run(world, tmp_path / "together", "--seeds", "11-13", *same)
    for seed in (11, 12, 13):
        run(world, tmp_path / "alone", "--seeds", str(seed), *same)
    together, *alone = ([xpe.take(m, k) for m in (model.prompt, model.head)]
                        for _, model, _ in passes for k in range(len(model.head.out.weight)))
    together = [together, alone.pop(0), alone.pop(0)]
    before = passes[0][2]
    for k in range(3):
        for part, one, other in zip(("prompt", "head"), together[k], alone[k]):
            for name in one:
                close(one[name], other[name], 1e-4)
                assert (one[name] - before[f"{part}.{name}"][k]).abs().max() > 1e-2     # it has come far
    dropout = next(m for m in passes[0][1].modules() if isinstance(m, xpe.Dropout))
    assert [g.initial_seed() for g in dropout.generators] == [11, 12, 13]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (together[a][0]["standard"] - together[b][0]["standard"]).abs().max() > 0.1
    for seed in (11, 12, 13):
        meta = [xpe.load_prompt(tmp_path / w / next(p.name for p in (tmp_path / w).glob(f"*-s{seed}")))[2]
                for w in ("together", "alone")]
        assert meta[0]["training"]["best_step"] == meta[1]["training"]["best_step"]


def test_training_learns(world, tmp_path):
    """Catches: a loop that moves everything and learns nothing (a wrong sign, labels that do not match)."""
    run(world, tmp_path, "--mode", "xpe", "--seeds", "11,12", "--steps", "60", "--set", "prompt.reads=mean",
        "--set", "backbone.dropout=false", "--set", "train.rate=0.05")
    for log in tmp_path.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(lines) == 6 and lines[-1]["loss"] < 0.7 * lines[0]["loss"]


# ---- 7. optimizer and schedule -----------------------------------------------------------------------------

SHAPES = {"vector": (5,), "matrix": (4, 6), "rows": (3, 5), "cube": (2, 3, 4)}


def reference(rule, tensors, clip, kind):
    """One learner: torch's clipping, transformers' Adafactor or torch's AdamW, transformers' schedule."""
    parameters = {n: nn.Parameter(t.clone()) for n, t in tensors.items()}
    groups = [dict(params=[parameters[n] for n in names], lr=lr, weight_decay=decay)
              for names, lr, decay in ((("vector", "cube"), 1e-2, 0.0), (("matrix", "rows"), 3e-2, 0.1))]
    made = torch.optim.AdamW(groups) if rule == "adamw" else transformers.Adafactor(
        groups, lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False)
    cosine = transformers.get_cosine_with_hard_restarts_schedule_with_warmup
    linear = transformers.get_linear_schedule_with_warmup
    plan = cosine(made, 3, 20, 2) if kind == "cosine" else linear(made, 3, 20)

    def step(grads):
        for n, g in grads.items():
            parameters[n].grad = g.clone()
        nn.utils.clip_grad_norm_(parameters.values(), clip)
        made.step()

    return parameters, step, plan


@pytest.mark.parametrize("rule, kind, fp16", [("adafactor", "cosine", False), ("adamw", "linear", False),
                                              ("adafactor", "linear", True), ("adamw", "cosine", True)])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_optimizer_slice_by_slice(rule, kind, fp16, bad):
    """Catches: moments or clipping norms mixed over learners, decay on the wrong group, a learner with a bad
    gradient that stops or moves the others; under fp16 a step that is taken, a scale that is not halved."""
    g = torch.Generator().manual_seed(4)
    start = {n: torch.randn(3, *s, generator=g) for n, s in SHAPES.items()}
    references = [reference(rule, {n: t[k] for n, t in start.items()}, 1.0, kind) for k in range(3)]
    stacked = {n: nn.Parameter(t.clone()) for n, t in start.items()}
    groups = [dict(params=[stacked["vector"], stacked["cube"]], rate=1e-2, weight_decay=0.0),
              dict(params=[stacked["matrix"], stacked["rows"]], rate=3e-2, weight_decay=0.1)]
    ours = train.Optimizer(groups, 3, rule, 1.0, fp16)
    for step in range(20):
        size = (0.02, 1.0, 5.0)[step % 3]           # clipped or not
        grads = {n: torch.randn(3, *s, generator=g) * size for n, s in SHAPES.items()}
        for n, p in stacked.items():
            scale = ours.scale.view(-1, *[1] * len(SHAPES[n]))
            p.grad = grads[n] * scale
        if bad is not None and step == 7:
            stacked["matrix"].grad[1, 2, 3] = bad
        for k, (_, take_step, plan) in enumerate(references):
            stands = bad is not None and k == 1 and (step == 7 if fp16 else step >= 7)
            if not stands:
                take_step({n: t[k] for n, t in grads.items()})
            plan.step()
        ours.step(step + 1, train.schedule(step, 20, 0.15, kind, 2))
        for k in range(3):
            for n in SHAPES:
                close(stacked[n][k].detach(), references[k][0][n].detach(), 2e-6)
    assert ours.failed_at.tolist() == ([0, 8, 0] if bad is not None and not fp16 else [0, 0, 0])
    full = 65536.0 if fp16 else 1.0
    assert ours.scale.tolist() == [full, full / 2 if bad is not None and fp16 else full, full]
    assert all(p.grad is None for p in stacked.values())


@pytest.mark.parametrize("rule", ["adafactor", "adamw"])
def test_optimizer_of_a_single_unstacked_learner(rule):
    """Catches: `full` fine-tuning whose vectors and matrices are taken for stacks of learners."""
    g = torch.Generator().manual_seed(4)
    start = {n: torch.randn(*s, generator=g) for n, s in SHAPES.items()}
    parameters, take_step, plan = reference(rule, start, 1.0, "linear")
    mine = {n: nn.Parameter(t.clone()) for n, t in start.items()}
    ours = train.Optimizer([dict(params=[mine["vector"], mine["cube"]], rate=1e-2, weight_decay=0.0),
                            dict(params=[mine["matrix"], mine["rows"]], rate=3e-2, weight_decay=0.1)],
                           1, rule, 1.0, False, stacked=False)
    for step in range(20):
        grads = {n: torch.randn(*s, generator=g) for n, s in SHAPES.items()}
        for n, p in mine.items():
            p.grad = grads[n].clone()
        take_step(grads), plan.step()
        ours.step(step + 1, train.schedule(step, 20, 0.15, "linear", 2))
        for n in SHAPES:
            close(mine[n].detach(), parameters[n].detach(), 2e-6)


def test_loss_scale_doubles_and_gives_up():
    """Catches: a scale that never recovers, and a learner that halves its scale for ever without a word."""
    p = nn.Parameter(torch.ones(2, 3))
    ours = train.Optimizer([dict(params=[p], rate=0.0, weight_decay=0.0)], 2, "adamw", 1.0, True)
    ours.good[:] = 1998
    for step in range(1, 25):
        p.grad = torch.ones(2, 3)
        p.grad[1, 0] = math.nan
        ours.step(step, 1.0)
        if step == 2:
            assert ours.scale.tolist() == [2.0 ** 17, 2.0 ** 14] and not ours.failed_at.any()
    assert ours.failed_at.tolist() == [0, 17]               # 2 ** 16 halved seventeen times is below one


@pytest.mark.parametrize("steps, warmup", [(1, 0.1), (7, 0.1), (100, 0.05), (240, 0.1), (50, 0.0)])
def test_schedule_equals_that_of_transformers(steps, warmup):
    """Catches: a cosine without restarts or with one cycle too many, a warm-up that is off by one."""
    def theirs(make, *more):
        made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        plan, out = make(made, math.ceil(steps * warmup), steps, *more), []
        for _ in range(steps):
            out.append(made.param_groups[0]["lr"])
            made.step(), plan.step()
        return out
    for kind, make, *more in (("cosine", transformers.get_cosine_with_hard_restarts_schedule_with_warmup, 2),
                              ("linear", transformers.get_linear_schedule_with_warmup)):
        assert [train.schedule(s, steps, warmup, kind, 2) for s in range(steps)] == pytest.approx(
            theirs(make, *more), abs=1e-12)


# ---- 8. the loop on a GPU, without one ---------------------------------------------------------------------

@pytest.mark.parametrize("mode, encoder, amp, K", [
    ("spt", "mlp", "bf16", 1), ("dual", "mlp", "bf16", 3), ("xpe", "attention", "fp16", 3),
    ("dual", "none", "off", 2), ("head", "mlp", "bf16", 2)])
def test_a_step_waits_for_nothing_and_mixes_no_devices(monkeypatch, mode, encoder, amp, K):
    """Catches: .item() and its like in the training step, a tensor that was left on the CPU. On `meta`, a
    device without numbers, each of them is an error."""
    config = evaluate.load_config(settings=[f"prompt.encoder={encoder}", "train.batch_size=4"])
    cfg = train.settings_for(config, mode, None, None) | {"amp": amp}
    backbone = tiny(attn_implementation="eager")
    if find_spec("transformers.masking_utils"):         # transformers looks into the mask, once a forward
        monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_: False)
    generator, rand = torch.Generator, torch.rand       # of which there are none on `meta`
    ids, labels = texts(*range(2, 30)), np.arange(28) % 7
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch, "rand", lambda *size, generator, device: rand(*size, device=device))
    model, _, run = bench.ours(backbone, ids, labels, K, config, cfg, torch.device("meta"))
    run(9)
    assert all(p.device.type == "meta" for p in model.parameters())


def test_bench_runs(capsys):
    """Catches: a benchmark that no longer fits the code that it times."""
    bench.main(["--seeds", "2", "--steps", "4", "--repeats", "1", "--device", "cpu"])
    rows = {line[:13].strip(): line[13:].split() for line in capsys.readouterr().out.splitlines()}
    assert float(rows["ours x 2"][0]) > 0 and float(rows["evaluation"][2]) > 0


# ---- 9. data -----------------------------------------------------------------------------------------------

def tsv(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_tricky_but_valid_tsv(tmp_path):
    """Catches: splitting at tabs or lines (7,688 rows of SIB-200 hold quotes), strip, normalisation."""
    texts_ = ['He said "no"', 'two\nlines\tand a tab', " blanks \u00a0at the edges ",
              "e\u0301 NFD, \u0958 too", "a\u2028b\u0085c\x0bd\x1ce", '"', "\ufeffinside",
              "it's 5'' long", "\u200b\u0627\u200f"]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\r\n")
    writer.writerow(["index_id", "category", "text"])
    writer.writerows([i, data.LABELS[i % 7], t] for i, t in enumerate(texts_))
    assert 'He said ""no""' in buffer.getvalue()
    for prefix in ("", "\ufeff"):
        for end in ("\r\n", "\n"):
            content = prefix + buffer.getvalue().replace("\r\n", end) + end    # an empty line at its end
            rows = data.read_tsv(tsv(tmp_path / "x.tsv", content))
            assert rows == [(str(i), i % 7, t) for i, t in enumerate(texts_)]
    other = "text\tnote\tcategory\nHallo\tx\tb\n"       # columns by name; no index_id: the row's number
    assert data.read_tsv(tsv(tmp_path / "x.tsv", other), ("a", "b")) == [("0", 1, "Hallo")]


HEAD = "index_id\tcategory\ttext\n"


@pytest.mark.parametrize("content, message", [
    ("", r"x\.tsv:0: the header must name a column 'category' once, it is \[\]"),
    ("\n\n", r"x\.tsv:2: the header must name a column 'category' once, it is \[\]"),
    (HEAD, r"x\.tsv: no sentence in this split"),
    ("index_id\tcategory\n1\ttravel\n", r"x\.tsv:1: the header must name a column 'text' once"),
    ("1\ttravel\tHello\n", r"x\.tsv:1: the header must name a column 'category' once, it is \['1', 'travel'"),
    ("category\ttext\ttext\n", r"x\.tsv:1: .*'text' once"),
    (HEAD + "1\ttravel\tHello\n2\ttravels\tHello\n", r"x\.tsv:3: unknown category 'travels', known are"),
    (HEAD + "1\tTravel\tHello\n", r"x\.tsv:2: unknown category 'Travel'"),
    (HEAD + "1\ttravel\n", r"x\.tsv:2: 2 fields, the header has 3"),
    (HEAD + "1\ttravel\ta\tb\n", r"x\.tsv:2: 4 fields, the header has 3"),
    (HEAD + "1\ttravel\t \u00a0\n", r"x\.tsv:2: empty text"),
    (HEAD + '1\ttravel\t"a\n2\ttravel\tb\n', r"x\.tsv:3: .*\(an unclosed or stray quote"),
    (HEAD + '1\ttravel\t"a"b\n', r"x\.tsv:2: .*\(an unclosed or stray quote"),
    (HEAD + "1\ttravel\ta\n1\ttravel\tb\n", r"x\.tsv:3: index_id '1' stands twice"),
    (HEAD + "1\ttravel\ta\n2\ttravel\tb\0\n", r"x\.tsv:3: no UTF-8 text \(byte 0x00\)"),
    (HEAD.encode() + b"1\ttravel\ta\n2\ttravel\t\xff\n", r"x\.tsv:3: no UTF-8 text \(byte 0xff\)"),
    ("\ufeff".encode() + HEAD.encode() + b"1\ttravel\t\xe4\n", r"x\.tsv:2: no UTF-8 text \(byte 0xe4\)"),
    (HEAD.encode("utf-16"), r"x\.tsv:1: no UTF-8"),
    (HEAD + "1\ttravel\t" + "a" * 200_000, r"x\.tsv:2: field larger"),
])
def test_bad_tsv_is_refused(tmp_path, content, message):
    """Catches: bad rows that are skipped or read wrongly; messages without file and line."""
    with pytest.raises(ValueError, match=message):
        data.read_tsv(tsv(tmp_path / "x.tsv", content))


def test_corpus(tmp_path):
    """Catches: alphabetical labels (they permute the head), codes that leave the folder, splits guessed."""
    one = HEAD + "1\ttravel\ta\n2\tgeography\tb\n"
    for name in ("train", "validation", "test"):
        tsv(tmp_path / "eng_Latn" / f"{name}.tsv", one)
    tsv(tmp_path / "arb_Arab" / "train.tsv", one)
    tsv(tmp_path / "arb_Arab" / "test.tsv", HEAD)
    tsv(tmp_path / "notes" / "readme.txt", "not a language")
    corpus = data.Corpus(tmp_path)
    assert corpus.languages() == ["arb_Arab", "eng_Latn"] and corpus.labels == data.LABELS
    assert [s.label for s in corpus.read("eng_Latn", "train")] == [1, 6]
    for split in ("dev", "validation"):
        assert corpus.read("eng_Latn", split) == [("1", 1, "a"), ("2", 6, "b")]
    for language, split, message in [
            ("eng_Lat", "test", r"no language 'eng_Lat' in .*did you mean eng_Latn\?"),
            ("../eng_Latn", "test", "no language '../eng_Latn'"), (".", "test", "no language"),
            ("notes", "test", "no language 'notes'"), ("/etc", "test", "no language"),
            ("arb_Arab", "dev", r"arb_Arab.dev\.tsv: no such split; arb_Arab has test\.tsv, train\.tsv"),
            ("arb_Arab", "test", r"test\.tsv: no sentence in this split")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            corpus.read(language, split)
    for folder in ("none", "notes"):
        with pytest.raises(FileNotFoundError, match=f"{folder}: no folder <language>"):
            data.Corpus(tmp_path / folder)
    with pytest.raises(FileNotFoundError, match="No such file"):
        data.read_tsv(tmp_path / "none.tsv")


def test_labels_file(tmp_path):
    """Catches: a labels.txt that is ignored, sorted, or contradicted by another one."""
    tsv(tmp_path / "eng_Latn" / "train.tsv", HEAD + "1\tzebra\ta\n2\tant\tb\n")
    with pytest.raises(ValueError, match="train.tsv:2: unknown category 'zebra'.*labels.txt beside"):
        data.Corpus(tmp_path).read("eng_Latn", "train")
    tsv(tmp_path / "eng_Latn" / "labels.txt", "\ufeffzebra\r\nant\r\n")
    corpus = data.Corpus(tmp_path)
    assert corpus.labels == ("zebra", "ant") and [s.label for s in corpus.read("eng_Latn", "train")] == [0, 1]
    for content, message in [("ant\nzebra\n", r"eng_Latn.labels\.txt: other labels than .*labels\.txt"),
                             ("ant\nant\n", r"labels\.txt: must name two or more labels, each once"),
                             ("ant\n", "two or more"),
                             (b"ok\n\xff\n", r"labels\.txt:2: no UTF-8 text \(byte 0xff\)")]:
        tsv(tmp_path / "labels.txt", content)
        with pytest.raises(ValueError, match=message):
            data.Corpus(tmp_path)


# lengths of 7 languages x 701 sentences
REALISTIC = np.clip(np.random.default_rng(5).gamma(8.0, 5.0, 4907).astype(int) + 5, 7, 164)


def test_length_batches():
    """Catches: sentences left out or doubled, batches that depend on a global seed, padding of a third."""
    joint, order = np.zeros(2), []
    for epoch in (0, 1):
        several = [data.length_batches(REALISTIC, 32, seed, epoch) for seed in (11, 12, 13)]
        for batches in several:
            assert sorted(i for b in batches for i in b) == list(range(4907))
            assert sorted(map(len, batches)) == [4907 % 32] + [32] * (4907 // 32)
            padded = sum(len(b) * max(REALISTIC[i] for i in b) for b in batches)
            assert 1 - REALISTIC.sum() / padded < 0.05
        for step in zip(*several):      # joined, three seeds need hardly more
            assert len({len(b) for b in step}) == 1
            longest = max(REALISTIC[i] for b in step for i in b)
            joint += sum(REALISTIC[i] for b in step for i in b), sum(map(len, step)) * longest
        again = data.length_batches(list(REALISTIC), 32, 11, epoch)
        assert all((a == b).all() for a, b in zip(several[0], again, strict=True))
        assert {frozenset(b) for b in several[0]} != {frozenset(b) for b in several[1]}
        order.append([int(b[0]) for b in several[0]])
    assert order[0] != order[1] and 1 - joint[0] / joint[1] < 0.06
    lengths = [REALISTIC[b].mean() for b in several[0]]
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.3     # shuffled, not sorted


def test_token_batches():
    """Catches: a budget that is overrun, rows lost at the end, an endless loop at a row above the budget."""
    for budget, extra in ((4096, 20), (1000, 0), (100, 20), (1, 0)):
        batches = data.token_batches(REALISTIC.tolist(), budget, extra)
        assert sorted(i for b in batches for i in b) == list(range(4907))
        for b, after in zip(batches, [*batches[1:], []]):
            longest = max(int(REALISTIC[i]) for i in b)
            assert len(b) == 1 or len(b) * (longest + extra) <= budget
    assert data.token_batches([], 100) == []


def test_collate():
    """Catches: left padding (it shifts XLM-R's positions), a pad id inside a text taken for padding."""
    rows = [[5, 1, 7], [8], [9, 9, 9, 9]]
    ids, mask = data.collate(rows, 1)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [[5, 1, 7, 1], [8, 1, 1, 1], [9, 9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_fingerprint():
    """Catches: a fingerprint that does not see an id, a label, a text, their order."""
    rows = [data.Sentence("1", 2, "a"), data.Sentence("2", 3, "b")]
    changes = dict(label=3), dict(text="a "), dict(text="\ud800"), dict(index_id="3")
    others = [rows[::-1], rows[:1], *([rows[0]._replace(**change), rows[1]] for change in changes)]
    assert len({data.fingerprint(x) for x in [rows, *others]}) == 7
    assert data.fingerprint(list(rows)) == data.fingerprint(rows)


@pytest.mark.skipif(not (SIB200 / "data").is_dir(), reason="no copy of SIB-200: SIB200=FOLDER pytest")
def test_the_whole_of_sib200():
    """Catches: any sentence of the real files that is read wrongly, a wrong code in config.yaml's groups."""
    corpus, counts, quoted, total = data.Corpus(SIB200 / "data"), set(), 0, 0
    for language in corpus.languages():
        for split, n in (("train", 701), ("dev", 99), ("test", 204)):
            with open(SIB200 / "data" / language / f"{split}.tsv", encoding="utf-8", newline="") as f:
                want = [(r["index_id"], r["category"], r["text"]) for r in csv.DictReader(f, delimiter="\t")]
            rows = corpus.read(language, split)
            assert [(s.index_id, corpus.labels[s.label], s.text) for s in rows] == want and len(rows) == n
            counts.add((split, tuple(sum(s.label == c for s in rows) for c in range(7))))
            quoted += sum('"' in s.text for s in rows)
            total += n
    assert (len(corpus.languages()), total, quoted, len(counts)) == (205, 205_820, 7_688, 3)
    sizes = dict(counts)
    assert (max(sizes["train"]), min(sizes["train"]), max(sizes["test"])) == (176, 58, 51)
    config = evaluate.load_config()
    groups = {g: evaluate.resolve_group(config, g) for g in config["groups"]}
    assert {g: len(set(codes)) for g, codes in groups.items()} == dict(
        low_performing=46, unseen=113, seen=92, seen_without_joshi5=85, all_without_joshi5=198,
        diverse_seen=23, diverse_unseen=24, joshi5=7, enarzho=3, all=205)
    assert all(len(set(codes)) == len(codes) for codes in groups.values())
    assert sorted(groups["all"]) == corpus.languages()
    with open(SIB200 / "languages.csv", encoding="utf-8") as f:
        table = list(csv.DictReader(f))
    for group, column, value in (("low_performing", "low_performing", "1"), ("seen", "xlmr_seen", "1"),
                                 ("unseen", "xlmr_seen", "0"), ("joshi5", "joshi_class", "5")):
        assert set(groups[group]) == {r["code"] for r in table if r[column] == value}
    assert set(groups["diverse_seen"] + groups["diverse_unseen"]) <= set(groups["all_without_joshi5"])


# ---- 10. predictions and scores ----------------------------------------------------------------------------

def test_predict_restores_the_order():
    """Catches: scores credited to the wrong sentence after sorting by length, as in the authors' toolkit."""
    encoded = texts(3, 14, 1, 9, 9, 2, 30, 5, 7, 7, 1, 12)
    prompts = [loud(xpe.SoftPrompt(16, 4, 0.5, hidden=6), k) for k in range(2)]
    heads = [loud(xpe.ClassificationHead(16, 7), 5 + k) for k in range(2)]
    owner = [0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1]
    backbone = tiny()
    want = torch.stack([plain_logits(backbone, prompts[k], heads[k], x) for x, k in zip(encoded, owner)])
    model = xpe.PromptedClassifier(backbone, xpe.stack(prompts), xpe.stack(heads)).train()
    for budget in (1, 40, 10_000):
        close(evaluate.predict(model, encoded, 1, torch.tensor(owner), budget), want)
    assert not evaluate.predict(model, encoded, 1).requires_grad


def test_accuracy_and_macro_f1():
    """Catches: macro-F1 over classes that do not occur, or weighted; shares instead of percent."""
    rng = np.random.default_rng(2)
    for n, classes in ((1, 7), (5, 7), (50, 3), (204, 7)):
        labels, predicted = rng.integers(0, classes, n), rng.integers(0, classes, n)
        right = sum(1 for a, b in zip(labels, predicted) if a == b)
        f1 = []
        for c in range(7):
            tp = sum(1 for a, b in zip(labels, predicted) if a == c and b == c)
            fp = sum(1 for a, b in zip(labels, predicted) if a != c and b == c)
            fn = sum(1 for a, b in zip(labels, predicted) if a == c and b != c)
            if tp + fp + fn:
                precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
                f1.append(2 * precision * recall / (precision + recall) if tp else 0)
        assert evaluate.accuracy(labels, predicted) == pytest.approx(100 * right / n)
        assert evaluate.macro_f1(labels, predicted) == pytest.approx(100 * sum(f1) / len(f1))
        most = max(list(labels).count(c) for c in range(7))
        assert evaluate.majority(labels) == pytest.approx(100 * most / n)


def test_group_means_leave_sources_out():
    """Catches: a mean over sentences, sources inside a zero-shot mean, languages not scored counted as 0."""
    config = {"groups": {"a": ["x", "y", "z"], "b": ["a", "w", "-y"]},
              "targets": {"A": "a", "B": "b", "C": ["v"]}}
    scores = {"x": 10.0, "y": 20.0, "z": 60.0}
    means = evaluate.group_means(scores, config, ["x"])
    assert means == {"Sources": (10.0, 1, 1), "A": (40.0, 2, 2), "B": (60.0, 1, 2), "C": (None, 0, 1)}
    assert evaluate.resolve_group(config, "b") == ["x", "z", "w"]
    config["groups"]["a"] = ["b"]
    with pytest.raises(ValueError, match="groups.b contains itself|groups.a contains itself"):
        evaluate.resolve_group(config, "b")


# ---- 11. configuration and command lines -------------------------------------------------------------------

@pytest.mark.parametrize("text, message", [
    ("train: {rates: 1.0}", r"unknown setting 'train.rates' \(did you mean rate\?\)"),
    ("trian: {rate: 1.0}", r"unknown setting 'trian' \(did you mean train\?\)"),
    ("train: {rate: 5e-5}", r"train.rate must be float, not '5e-5'; YAML takes it for text, write 5.0e-5"),
    ("train: {steps: 1.5}", "train.steps must be int, not 1.5"),
    ("train: {steps: true}", "train.steps must be int, not True"),
    ("train: {rate: -1}", "train.rate cannot be -1.0"), ("train: {rate: .nan}", "train.rate cannot be nan"),
    ("train: 3", "train is a section, not the value 3"),
    ("backbone: {dropout: 0.1}", "backbone.dropout must be bool, not 0.1"),
    ("prompt: {encoder: mpl}", "prompt.encoder cannot be 'mpl', only mlp, lstm, attention, none"),
    ("adapt: {optimizer: sgd}", "adapt.optimizer cannot be 'sgd', only adafactor, adamw"),
    ("full: {prompt_droput: 0.1}", r"unknown setting 'full.prompt_droput' \(did you mean prompt_dropout\?\)"),
    ("groups: {mine: [1, 2]}", "groups.mine must be a list of language codes"),
    ("- a\n- b", "holds no mapping"), ("", "holds no mapping"), ("a: [1", "not readable as YAML"),
    ("a: &x 1\nb: *x", "aliases"),
    ("sources: !!python/object/apply:os.system [ls]", "not readable as YAML"),
])
def test_bad_configuration(tmp_path, text, message):
    """Catches: a misspelt or mistyped setting that is silently ignored; a message without the file's name."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as e:
        evaluate.load_config(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in str(e.value)


def test_good_configuration(tmp_path):
    """Catches: layers in the wrong order, `adapt` and `full` that cannot hold every training setting."""
    default = evaluate.load_config()
    (tmp_path / "c.yaml").write_text("train: {rate: 1, steps: 7}\nadapt: {batch_size: 4}\n"
                                     "groups: {mine: [aaa_Latn]}")
    settings = ["train.steps=9", "full.cycles=3", "prompt.reads=mean"]
    config = evaluate.load_config(tmp_path / "c.yaml", settings)
    assert (config["train"]["rate"], config["train"]["steps"], config["prompt"]["reads"]) == (1.0, 9, "mean")
    assert type(config["train"]["rate"]) is float and config["groups"]["mine"] == ["aaa_Latn"]
    adapt = train.settings_for(config, "xpe", True, None)
    full = train.settings_for(config, "full", False, None)
    assert (adapt["batch_size"], adapt["steps"], adapt["rate"], adapt["patience"]) == (4, 6000, 1.0, 30)
    assert (full["cycles"], full["epochs"], full["batch_size"], full["optimizer"]) == (3, 10, 32, "adamw")
    assert train.settings_for(config, "xpe", False, 5)["steps"] == 5
    assert default == evaluate.load_config() and default["train"]["rate"] == 5e-5
    assert evaluate.load_config(HERE / "config.yaml") == default
    for setting, message in [("train.rate", "write section.key=value"), ("rate=1", "unknown setting 'rate'"),
                             ("train.rate=5e-5", "write 5.0e-5"), ("train=1", "train is a section"),
                             ("train.rate=[1", "--set train.rate=")]:
        with pytest.raises(ValueError, match=message):
            evaluate.load_config(None, [setting])


def status(main, argv, capsys):
    """A script's main as its command line runs it -> (exit status, standard error)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        data.run_main(lambda: main([str(a) for a in argv]))
    return e.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    ([], "--mode is missing: spt, xpe"),
    (["--mode", "dual", "--ratio", "1"], "--ratio 1.0: a share between 0 and 1"),
    (["--mode", "spt", "--ratio", "0.3"], "--ratio 0.3: .* with --mode dual"),
    (["--mode", "xpe", "--steps", "0"], "--steps 0: at least 1"),
    (["--mode", "xpe", "--group", "othrs"], r"no group 'othrs' in .*did you mean others\?"),
    (["--mode", "xpe", "--languages", "aaa_Latin"], r"no language 'aaa_Latin' .*did you mean aaa_Latn\?"),
    (["--mode", "xpe", "--languages", "aaa_Latn,aaa_Latn"], "at least one, and each once"),
    (["--mode", "xpe", "--seeds", "11-"], "--seeds 11-: write 11, 11-20 or 11,15"),
    (["--mode", "xpe", "--seeds", "11,11"], "a seed stands twice"),
    (["--mode", "xpe", "--data", "/nowhere"], "data.name: '/nowhere' is neither a folder nor"),
    (["--mode", "xpe", "--backbone", "/no/where"], "backbone.name: no folder '/no/where'"),
    (["--mode", "xpe", "--set", "train.batch_size=0"], "train.batch_size must be at least 1"),
    (["--mode", "xpe", "--set", "train.stepz=5"], r"unknown setting 'train.stepz' \(did you mean steps"),
    (["--mode", "xpe", "--set", "prompt.length=0"], "prompt.length cannot be 0"),
    (["--mode", "xpe", "--set", "prompt.encoder=attention", "--set", "prompt.heads=0"], "0 attention heads"),
    (["--mode", "xpe", "--set", "prompt.length=60"], "60 prompt rows . .* exceed the 62"),
    (["--mode", "xpe", "--device", "gpu"], "--device gpu"),
    (["--adapt", "/no/where"], "/no/where: no such run folder"),
])
def test_bad_command_lines_of_train(world, tmp_path, capsys, argv, message):
    """Catches: a traceback, a status of 0, a run folder left behind by a run that could not start."""
    full = ["--sources", world / "config.yaml", "--out", tmp_path / "out", "--device", "cpu", *argv]
    code, err = status(train.main, full, capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_command_line_as_a_process(tmp_path):
    """Catches: a script whose entry point does not end errors in one line and status 2."""
    argv = [sys.executable, HERE / "train.py", "--mode", "xpe", "--sources", tmp_path / "none.yaml"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert re.fullmatch(r"error: .*none\.yaml: no such configuration file\n", done.stderr)


def test_counts_of_a_corpus(world, tmp_path, capsys):
    """Catches: data.py saying that all is well over files that a run cannot read."""
    assert data.main(["--data", str(world / "corpus")]) == 0
    out = capsys.readouterr().out
    assert "3 languages, 234 sentences: train 40, dev 21, test 17 in every language" in out
    shutil.copytree(world / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "ccc_Latn" / "dev.tsv").unlink()
    tsv(tmp_path / "corpus" / "aaa_Latn" / "test.tsv", HEAD + "1\tsport\ta\n")
    code, err = status(data.main, ["--data", tmp_path / "corpus"], capsys)
    assert code == 2 and "test.tsv:2: unknown category 'sport'" in err
    assert "ccc_Latn/dev.tsv: no such split" in err


def test_a_backbone_is_loaded_in_float32(world, tmp_path):
    """Catches: a checkpoint in half precision that stays in it, as transformers 5 would have it."""
    shutil.copytree(world / "backbone", tmp_path / "half")
    half = transformers.AutoModel.from_pretrained(world / "backbone").bfloat16()
    half.save_pretrained(tmp_path / "half")
    backbone, _, identity = evaluate.load_backbone(str(tmp_path / "half"))
    assert all(torch.equal(p, half.get_parameter(n).float()) and p.dtype == torch.float32
               for n, p in backbone.named_parameters())
    whole = evaluate.load_backbone(str(world / "backbone"))[2]["fingerprint"]
    assert identity["fingerprint"] != whole         # and below: the weights are whole, the config says half
    shutil.copy(world / "backbone/model.safetensors", tmp_path / "half")
    assert evaluate.load_backbone(str(tmp_path / "half"))[2]["fingerprint"] == whole


# ---- 12. one folder for a prompt ---------------------------------------------------------------------------

def saved(folder, ratio=0.5, encoder="mlp"):
    """A prompt folder -> (prompt, head, meta) that were written to it."""
    prompt = loud(xpe.SoftPrompt(16, 6, ratio, encoder, 5, 2, 0.1, heads=2), 1)
    head = loud(xpe.ClassificationHead(16, 3), 2)
    meta = {"kind": "dual", "prompt": prompt.config, "head": head.config, "reads": "prompt", "max_length": 20,
            "backbone": {"name": "b", "revision": "r", "type": "camembert"},
            "labels": ["x", "y", "\u00e9"], "training": {"a": 1}}
    folder.mkdir(exist_ok=True)
    xpe.save_prompt(folder, xpe.take(prompt, 0), xpe.take(head, 0), meta)
    return prompt, head, meta


@pytest.mark.parametrize("ratio, encoder", [(0, "mlp"), (1, "mlp"), (0.5, "mlp"), (0.5, "lstm"),
                                            (1, "attention"), (0.5, "none")])
def test_save_and_load(tmp_path, ratio, encoder):
    """Catches: a tensor lost or cast on the way, a head that does not come back, frozen tensors."""
    prompt, head, meta = saved(tmp_path, ratio, encoder)
    loaded = xpe.load_prompt(tmp_path)
    for a, b in zip((prompt, head), loaded):
        assert {n: p.shape for n, p in a.named_parameters()} == {n: p.shape for n, p in b.named_parameters()}
        assert all(torch.equal(p, q) and q.requires_grad for p, q in zip(a.parameters(), b.parameters()))
        assert a.config == b.config
    assert loaded[2] == meta | {"format": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompt.json", "prompt.safetensors"]
    assert torch.equal(prompt.eval()(), loaded[0].eval()())


def test_take_and_put_pick_one_of_a_stack():
    """Catches: seeds mixed up when a stack of learners is saved."""
    singles = [loud(xpe.SoftPrompt(16, 6, 0.5, hidden=5), k) for k in range(3)]
    want = [{n: p[0].detach().clone() for n, p in s.named_parameters()} for s in singles]
    both = xpe.stack(singles)
    for k in range(3):
        got = xpe.put(xpe.SoftPrompt(16, 6, 0.5, hidden=5), xpe.take(both, k))
        assert all(torch.equal(p[0], want[k][n]) for n, p in got.named_parameters())


def edit(change):
    """A change of prompt.json, as a function of the folder."""
    def apply(folder):
        meta = json.loads((folder / "prompt.json").read_text())
        change(meta)
        (folder / "prompt.json").write_text(json.dumps(meta))
    return apply


def retensor(change):
    """A change of the tensors, as a function of the folder."""
    def apply(folder):
        from safetensors.torch import load_file, save_file
        tensors = load_file(folder / "prompt.safetensors")
        change(tensors)
        save_file(tensors, folder / "prompt.safetensors")
    return apply


@pytest.mark.parametrize("damage, message", [
    (retensor(lambda t: t.pop("prompt.standard")), "prompt.json: lacks the tensor 'prompt.standard'"),
    (retensor(lambda t: t.pop("head.out.bias")), "lacks the tensor 'head.out.bias'"),
    (retensor(lambda t: t.update({"prompt.more": torch.ones(2)})), "has the unknown tensor 'prompt.more'"),
    (retensor(lambda t: t.update({"prompt.standard": torch.ones(4, 16)})), r"'prompt.standard' is \(4, 16\), "
                                                                           r"expected \(3, 16\)"),
    (retensor(lambda t: t.update({"head.out.bias": torch.tensor([1, math.nan, 1])})), "other than finite"),
    (retensor(lambda t: t.update({"head.out.bias": torch.ones(3, dtype=torch.int32)})), "other than finite"),
    (edit(lambda m: m["prompt"].update(ratio=0.9)), r"'prompt.standard' is \(3, 16\), expected \(1, 16\)"),
    (edit(lambda m: m["prompt"].update(ratio=1)), "has the unknown tensor 'prompt.standard'"),
    (edit(lambda m: m["prompt"].update(encoder="lstm")), "tensor 'prompt.encoder"),
    (edit(lambda m: m["prompt"].update(encoder="gru")), "prompt.encoder cannot be 'gru', only"),
    (edit(lambda m: m["prompt"].update(width="16")), "prompt.width cannot be '16'"),
    (edit(lambda m: m["prompt"].update(length=10 ** 9)), "prompt.length cannot be 1000000000"),
    (edit(lambda m: m["prompt"].pop("heads")), "'prompt' must hold width, length"),
    (edit(lambda m: m.update(prompt=None)), "has the unknown tensor 'prompt"),
    (edit(lambda m: m["head"].update(classes=4)), r"'head.out.weight' is \(3, 16\), expected \(4, 16\)"),
    (edit(lambda m: m.update(labels=["a", "b"])), "2 labels for a head of 3 classes"),
    (edit(lambda m: m.update(labels=["a", "b", "b"])), "2 labels for a head of 3 classes"),
    (edit(lambda m: m.update(format=2)), "format, labels.* are not as"),
    (edit(lambda m: m.update(kind="lora")), "kind cannot be 'lora', only"),
    (edit(lambda m: m.pop("reads")), "reads cannot be None, only"),
    (edit(lambda m: m.update(max_length=True)), "max_length cannot be True"),
    (edit(lambda m: m.update(backbone="x")), "prompt.json: .*backbone, .* are not as"),
    (edit(lambda m: m["backbone"].pop("revision")), "prompt.json: .*backbone, .* are not as"),
    (edit(lambda m: m.pop("head")), "prompt.json: .*head .* are not as"),
    (edit(lambda m: m.update(head=3)), "prompt.json: .*head .* are not as"),
    (edit(lambda m: m.update(prompt=[1])), "prompt.json: .*mapping"),
    (edit(lambda m: m.update(training=None)), "prompt.json: .*training are not as"),
    (edit(lambda m: m.update(labels="xyz")), "prompt.json: .*labels, .* are not as"),
    (edit(lambda m: m["prompt"].update(more=1)), "prompt.json: .*unexpected keyword argument 'more'"),
    (lambda d: (d / "prompt.json").write_text("[1]"), "prompt.json: .*no JSON object"),
    (lambda d: (d / "prompt.json").write_text("{"), "prompt.json: not readable as JSON"),
    (lambda d: (d / "prompt.safetensors").write_bytes(b"\x80\x04pickle"), "prompt.safetensors: no whole"),
    (lambda d: os.truncate(d / "prompt.safetensors", 2000), "prompt.safetensors: no whole safetensors file"),
    (lambda d: (d / "prompt.json").unlink(), r"no prompt.json \(a run that has not finished"),
    (lambda d: (d / "prompt.safetensors").unlink(), "prompt.safetensors"),
])
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    """Catches: lenient loading: a head that stays random, tensors that are dropped, shapes that broadcast."""
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        xpe.load_prompt(tmp_path)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    """Catches: half a file after a full disk or Ctrl-C, temporary files left behind."""
    xpe.write_atomic(tmp_path / "a", b"old")

    def broken(f):
        f.write(b"new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        xpe.write_atomic(tmp_path / "a", broken)
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_export_for_peft(tmp_path, ratio):
    """Catches: an export with the encoder's input instead of its output, or without the head."""
    from safetensors.torch import load_file
    prompt, head, meta = saved(tmp_path / "run", ratio)
    prompt.train()
    xpe.export_peft(tmp_path / "peft", prompt, head, meta)
    tensors, config = load_file(tmp_path / "peft" / "adapter_model.safetensors"), xpe.read_json(
        tmp_path / "peft" / "adapter_config.json")
    close(tensors.pop("prompt_embeddings"), plain_prompt(prompt))
    assert {n.removeprefix("base_model.classifier."): t.shape for n, t in tensors.items()} == {
        "dense.weight": (16, 16), "dense.bias": (16,), "out_proj.weight": (3, 16), "out_proj.bias": (3,)}
    assert torch.equal(tensors["base_model.classifier.out_proj.weight"], head.out.weight[0])
    assert config["num_virtual_tokens"] == 6 and config["token_dim"] == 16 and prompt.training
    with pytest.raises(FileExistsError, match="is not empty"):
        xpe.export_peft(tmp_path / "peft", prompt, head, meta)
    for bad in ((prompt, head, meta | {"reads": "mean"}), (None, head, meta)):
        with pytest.raises(ValueError, match="peft has no form"):
            xpe.export_peft(tmp_path / "none", *bad)
    with pytest.raises(ValueError, match="into that of a 'bert' model"):
        xpe.export_peft(tmp_path / "none", prompt, head, meta | {"backbone": {"name": "b", "type": "bert"}})
    assert not (tmp_path / "none").exists()


# ---- 13. the authors' toolkit, and peft --------------------------------------------------------------------

def as_theirs(prompt):
    """The authors' modules in the sizes of a SoftPrompt, random, built from torch's own layers: what their
    files name, and a function that gives their prompt matrix."""
    c, names = prompt.config, nn.ModuleDict()
    h, d = c["width"], c["hidden"]

    def mlp(n_in, layers):
        hidden = [m for _ in range(layers - 1) for m in (nn.Linear(d, d), nn.ReLU(), nn.Dropout(0.1))]
        return nn.Sequential(nn.Linear(n_in, d), nn.ReLU(), nn.Dropout(0.1), *hidden, nn.Linear(d, h))

    if c["encoder"] == "mlp":
        head = mlp(h, c["layers"])
        run_head = head
    elif c["encoder"] == "lstm":
        head = nn.ModuleDict({"lstm": nn.LSTM(h, d, c["layers"], bidirectional=True, batch_first=True),
                              "mlp": mlp(2 * d, 1)})
        def run_head(x): return head["mlp"](head["lstm"](x)[0])
    elif c["encoder"] == "attention":
        block = nn.ModuleDict({"self_attn": nn.MultiheadAttention(h, c["heads"], batch_first=True),
                               "layernorm": nn.LayerNorm(h), "out_proj": nn.Linear(h, h)})
        head = nn.ModuleList([block, mlp(h, 1)])
        def run_head(x):
            x = block["layernorm"](x + block["self_attn"](x, x, x)[0])
            return head[1](block["out_proj"](x))
    else:
        head = run_head = nn.Identity()
    for name, p in (("embedding", prompt.standard), ("xpe_embedding", prompt.encoded)):
        if p is not None:
            names[name] = nn.Embedding(p.shape[1], h)
    if prompt.encoded is not None:
        names["xpe_head"] = head
    loud(names, 7).eval()

    def matrix():
        parts = [names["embedding"].weight] if "embedding" in names else []
        parts += [run_head(names["xpe_embedding"].weight[None])[0]] if "xpe_head" in names else []
        return torch.cat(parts).detach()
    return names.state_dict(), matrix


THEIR_KINDS = [(0, "mlp", 2), (0.3, "mlp", 2), (0.7, "mlp", 2), (1, "mlp", 2), (1, "mlp", 1), (0.7, "mlp", 3),
               (1, "lstm", 1), (0.7, "lstm", 2), (1, "attention", 2), (0.3, "attention", 2), (0.7, "none", 2)]
THEIR_NAMES = {"mlp": "MLP", "lstm": "LSTM", "attention": "ATTN", "none": "NONE"}


def paper_era(folder):
    """Rewrite a folder of the authors' toolkit as those that came with the paper."""
    from safetensors.torch import load_file, save_file
    config = json.loads((folder / "adapter_config.json").read_text()) | {"peft_type": "P_TUNING"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    if config["encoder_ratio"] == 1:
        tensors["prompt_encoder.embedding.weight"] = tensors.pop("prompt_encoder.xpe_embedding.weight")
    save_file(tensors, folder / "adapter_model.safetensors")


def wrapped(folder):
    """Rewrite the names of its tensors as a PeftModel's own state has them."""
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "adapter_model.safetensors")
    for theirs, longer in (("base_model.", "base_model.model."),
                           ("prompt_encoder.", "prompt_encoder.default.")):
        tensors = {name.replace(theirs, longer): t for name, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("ratio, encoder, layers", THEIR_KINDS)
def test_folders_of_the_authors(tmp_path, ratio, encoder, layers):
    """Catches: a Linear of theirs at the wrong place, E taken for standard rows in the paper-era files."""
    from safetensors.torch import save_file
    ours = xpe.SoftPrompt(16, 10, ratio, encoder, 6, layers, 0.1, heads=4)
    tensors, matrix = as_theirs(ours)
    classifier = loud(nn.ModuleDict({"dense": nn.Linear(16, 16), "out_proj": nn.Linear(16, 7)}), 8)
    save_file({**{f"prompt_encoder.{n}": t for n, t in tensors.items()},
               **{f"base_model.classifier.{n}": t for n, t in classifier.state_dict().items()}},
              tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "peft_type": "XPE", "num_virtual_tokens": 10, "encoder_ratio": ratio, "encoder_hidden_size": 6,
        "encoder_num_layers": layers, "encoder_dropout": 0.1, "token_dim": 16, "encoder_num_heads": 4,
        "encoder_reparameterization_type": THEIR_NAMES[encoder], "base_model_name_or_path": "somewhere"}))
    for rewrite in (lambda folder: None, paper_era, wrapped):
        rewrite(tmp_path)
        prompt, head, meta = xpe.load_prompt(tmp_path)
        close(prompt.eval()()[0, 0], matrix())
        x = torch.randn(4, 16)
        close(head.eval()(x[None])[0], classifier["out_proj"](torch.tanh(classifier["dense"](x))))
        assert (meta["kind"], meta["backbone"]["name"], prompt.config | {"ratio": 0}) == (
            "spt" if ratio == 0 else "xpe" if ratio == 1 else "dual", "somewhere", ours.config | {"ratio": 0})
    for change, message in [({"peft_type": "LORA"}, "not by the authors' toolkit: peft_type 'LORA'"),
                            ({"num_virtual_tokens": 11}, r"adapter_config.json: .*expected \(|is \("),
                            ({"encoder_hidden_size": None}, "prompt.hidden cannot be None")]:
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config | change))
        shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "bad")
        with pytest.raises(ValueError, match=message):
            xpe.load_prompt(tmp_path / "bad")


def classifier_model():
    """XLM-R's own sequence classifier, random: (whole, its backbone)."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("xlm-roberta", **SIZES)
    config.num_labels = 7
    whole = loud(transformers.XLMRobertaForSequenceClassification(config), 3).eval()
    return whole, copy.deepcopy(whole.roberta)


@pytest.mark.parametrize("ratio, encoder, layers", THEIR_KINDS)
def test_parity_with_the_authors_toolkit(tmp_path, ratio, encoder, layers, record_property):
    """Catches: any difference between this file and the authors' code, in evaluation."""
    theirs = pytest.importorskip("micm_nlp.models.xpe", reason="the authors' toolkit is not installed")
    whole, backbone = classifier_model()
    model = theirs.get_xpe_model(whole, dict(
        task_type="SEQ_CLS", num_virtual_tokens=10, encoder_ratio=ratio, encoder_hidden_size=6,
        encoder_num_layers=layers, encoder_dropout=0.1, encoder_reparameterization_type=THEIR_NAMES[encoder],
        encoder_num_heads=4, encoder_freeze=False, encoder_embedding_freeze=False))
    loud(nn.ParameterList(p for p in model.parameters() if p.requires_grad), 9)
    ids, mask = data.collate(texts(9, 4, 1), 1)
    with torch.no_grad():
        want = model.eval()(input_ids=ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path)
    for rewrite in (lambda folder: None, paper_era):
        rewrite(tmp_path)
        prompt, head, _ = xpe.load_prompt(tmp_path)
        got = xpe.PromptedClassifier(backbone, prompt, head).eval()(ids, mask)
        print(f"{ratio} {encoder} {layers}: differs by {(got - want).abs().max():.1e} of {want.std():.2f}")
        close(got, want)
        other = xpe.PromptedClassifier(backbone, loud(prompt, 99), head).eval()(ids, mask)
        assert (other - want).abs().max() > 1e-4        # the prompt matters


@pytest.mark.parametrize("ratio", [0, 0.3, 1])
def test_stock_peft_loads_our_export(tmp_path, ratio):
    """Catches: an export that peft refuses, loads without the head, or turns into other logits."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    whole, backbone = classifier_model()
    prompt, head = loud(xpe.SoftPrompt(16, 10, ratio, hidden=6), 1), loud(xpe.ClassificationHead(16, 7), 2)
    meta = {"kind": "dual", "reads": "prompt", "backbone": {"name": "b", "type": "xlm-roberta"}}
    xpe.export_peft(tmp_path / "out", prompt, head, meta)
    ids, mask = data.collate(texts(9, 4, 1), 1)
    want = xpe.PromptedClassifier(backbone, prompt, head).eval()(ids, mask)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(whole, tmp_path / "out").eval()
        got = theirs(input_ids=ids, attention_mask=mask).logits
    print(f"{ratio}: differs by {(got - want).abs().max():.1e} of {want.std():.2f}")
    close(got, want.detach())


# ---- 14. from sentences to tables --------------------------------------------------------------------------

def test_train_evaluate_adapt_export(world, tmp_path, capsys):
    """Catches: scores that are not those of the predictions, a run folder that lacks something, modes that do
    not run, runs whose scores depend on their company, an adapted prompt that forgot its source."""
    for argv in (["spt"], ["xpe", "--seeds", "11,12"], ["dual", "--ratio", "0.3"], ["head"], ["full"]):
        run(world, tmp_path, "--steps", "8", "--mode", *argv)
    folders = sorted(tmp_path.iterdir())
    names = [f.name for f in folders]
    assert names == [f"{m}-two-s{s}" for m, s in (("dual30", 11), ("full", 11), ("head", 11), ("spt", 11),
                                                  ("xpe", 11), ("xpe", 12))]
    for folder in folders:
        files = {"config.yaml", "metrics.jsonl", "prompt.json", "prompt.safetensors"}
        more = {"backbone.safetensors"} if "full" in folder.name else set()
        assert {p.name for p in folder.iterdir()} == files | more
        meta = xpe.load_prompt(folder)[2]
        assert meta["sources"] == ["aaa_Latn", "bbb_Latn"] and meta["labels"] == list(data.LABELS)
        assert meta["training"]["finished"] and meta["training"]["best_step"] <= 8
        assert evaluate.load_config(folder / "config.yaml")["train"]["batch_size"] == 8
    with pytest.raises(FileExistsError, match="--resume goes on.*--out starts elsewhere"):
        run(world, tmp_path, "--mode", "spt")

    evaluate.main([*map(str, folders), "--device", "cpu"])
    corpus = data.Corpus(world / "corpus")
    for folder in folders:
        with open(folder / "test_predictions.csv", encoding="utf-8", newline="") as f:
            predictions = list(csv.DictReader(f))
        assert [(r["language"], r["index_id"], r["label"]) for r in predictions] == [
            (c, s.index_id, data.LABELS[s.label]) for c in corpus.languages() for s in corpus.read(c, "test")]
        with open(folder / "test.csv", encoding="utf-8", newline="") as f:
            scores = {r["language"]: float(r["accuracy"]) for r in csv.DictReader(f)}
        for c in corpus.languages():
            rows = [r for r in predictions if r["language"] == c]
            right = sum(r["label"] == r["predicted"] for r in rows)
            assert len(rows) == 17 and scores[c] == pytest.approx(100 * right / 17, abs=1e-3)
        summary = json.loads((folder / "test.json").read_text())
        sources = (scores["aaa_Latn"] + scores["bbb_Latn"]) / 2
        assert summary["groups"]["Sources"]["accuracy"] == pytest.approx(sources, abs=1e-3)
        assert summary["groups"]["Others"]["accuracy"] == pytest.approx(scores["ccc_Latn"], abs=1e-3)
        assert summary["groups"]["Others"]["languages"] == 1        # bbb_Latn is a source
        together = (folder / "test_predictions.csv").read_bytes(), scores
        if folder.name in ("xpe-two-s12", "full-two-s11"):
            evaluate.main([str(folder), "--device", "cpu", "--out", str(tmp_path / "alone")])
            with open(tmp_path / "alone" / folder.name / "test_predictions.csv", encoding="utf-8") as f:
                alone = list(csv.DictReader(f))
            for a, b in zip(predictions, alone, strict=True):
                assert a.keys() == b.keys() and all(
                    float(a[k]) == pytest.approx(float(b[k]), abs=2e-5) if k[:2] == "p(" else a[k] == b[k]
                    for k in a)
    text = corpus.read("ccc_Latn", "test")[5].text
    capsys.readouterr()
    evaluate.main([str(folders[-1]), "--device", "cpu", "--text", text])
    label, share, back = capsys.readouterr().out.rstrip("\n").split("\t")
    row = next(r for r in predictions if (r["language"], r["index_id"]) == ("ccc_Latn", "test5"))
    assert (label, back) == (row["predicted"], text) and float(share) == pytest.approx(
        max(float(row[f"p({n})"]) for n in data.LABELS), abs=1e-3)

    run(world, tmp_path / "adapted", "--adapt", str(folders[-1]), "--group", "others", "--steps", "6",
        "--set", "adapt.rate=0.0", "--set", "adapt.encoded_rate=0.0")
    source = xpe.load_prompt(folders[-1])
    for language in ("ccc_Latn", "bbb_Latn"):
        prompt, head, meta = xpe.load_prompt(tmp_path / "adapted" / f"xpe-two-s12-to-{language}-s12")
        assert (meta["adapted_to"], meta["adapted_from"]) == (language, "xpe-two-s12")
        assert prompt.config["dropout"] == 0.0
        for a, b in zip((prompt, head), source):        # at a rate of zero they are where they started
            assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    for nothing in "-ccc_Latn", "ccc_Lat", "others":
        with pytest.raises(ValueError, match=f"no language '{nothing}'"):
            evaluate.main([str(folders[-1]), "--device", "cpu", f"--languages={nothing}"])
    evaluate.main([str(folders[-1]), "--export", "peft", str(tmp_path / "peft")])
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


def test_the_sample_beats_chance(tmp_path, capsys):
    """Catches: a sample that no longer learns, labels that do not carry over to languages without any."""
    argv = ["--mode", "xpe", "--sources", str(HERE / "sample/config.yaml"), "--out", str(tmp_path),
            "--data", str(HERE / "sample/sib200"), "--backbone", str(HERE / "sample/backbone"),
            "--steps", "60", "--device", "cpu"]
    assert train.main(argv) == 0
    groups = xpe.read_json(tmp_path / "xpe-sources-s11/test.json")["groups"]
    assert groups["Sources"]["accuracy"] > 100 / 7 + 30 and groups["Seen targets"]["accuracy"] > 100 / 7 + 25
    assert groups["Unseen targets"]["accuracy"] > 100 / 7 + 10 and "Unseen targets" in capsys.readouterr().out
