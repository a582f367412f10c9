"""The method, as tests: read beside the paper and xpe.py, from the top down.

    python -m pytest -q test_xpe.py         (offline, on a CPU, about 15 s)

What the paper gives as a number is asserted. Everything else is computed a second time, plainly:
one sentence at a time, equations instead of modules, XLM-R's own classifier from transformers. Each
test says which mistake it would catch. Backbones are random and tiny. Letters as in xpe.py: B
texts, T tokens, P prompt rows, H width of the backbone, D width inside the encoder, K prompts.
"""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import config
import xpe

HERE = Path(__file__).resolve().parent
H = 16                      # width of the tiny backbones
VOCABULARY = 60
PADDING = 1                 # XLM-R's padding index
torch.set_num_threads(1)


# ---- What the tests share ------------------------------------------------------------------------

def tiny_backbone(kind="xlm-roberta", **sizes):
    """A random transformer of two layers, 16 wide, loud enough that each part shows in logits."""
    torch.manual_seed(0)
    settings = dict(vocab_size=VOCABULARY, hidden_size=H, num_hidden_layers=2,
                    num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
                    initializer_range=0.3)
    settings.update(sizes)
    backbone_config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModel.from_config(backbone_config).eval()


def fill(module, seed, std=0.3):
    """Fill every parameter with N(0, std), biases and norms too: none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return module


def make_prompt(seed=1, length=6, ratio=0.5, encoder="mlp", layers=2, dropout=0.1):
    """A SoftPrompt in the tiny backbone's width, filled with random numbers."""
    prompt = xpe.SoftPrompt(H, length, ratio, encoder, hidden=5, layers=layers, dropout=dropout,
                            heads=2)
    return fill(prompt, seed)


def make_head(seed=2, dropout=0.1):
    """A head of 7 classes, filled with random numbers."""
    return fill(xpe.ClassificationHead(H, 7, dropout), seed)


def random_texts(*lengths):
    """Random token ids, one list for each length."""
    generator = torch.Generator().manual_seed(1)
    texts = []
    for length in lengths:
        texts.append(torch.randint(5, VOCABULARY, (length,), generator=generator).tolist())
    return texts


def collate(texts):
    """-> input_ids, attention_mask (B, T), padded on the right."""
    longest = max(len(text) for text in texts)
    input_ids = torch.full((len(texts), longest), PADDING)
    attention_mask = torch.zeros(len(texts), longest, dtype=torch.long)
    for i, text in enumerate(texts):
        input_ids[i, :len(text)] = torch.tensor(text)
        attention_mask[i, :len(text)] = 1
    return input_ids, attention_mask


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- 1. The paper's numbers: parameters ----------------------------------------------------------

@pytest.mark.parametrize("method, ratio, n_standard, n_encoded, in_encoder, total", [
    ("SPT", 0.0, 20, 0, 0, 1_077_255),
    ("XPE", 1.0, 0, 20, 591_360, 1_668_615),
    ("DUAL-30", 0.3, 14, 6, 591_360, 1_668_615),
    ("DUAL-70", 0.7, 6, 14, 591_360, 1_668_615)])
def test_parameter_counts_of_the_paper(method, ratio, n_standard, n_encoded, in_encoder, total):
    """Catches: a missing layer or bias, "2 layers" as two Linears, a wrong width in config.yaml,
    standard and encoded rows swapped."""
    arguments = dict(config.read_config()["prompt"], ratio=ratio)
    reads = arguments.pop("reads")
    large = transformers.XLMRobertaConfig(
        vocab_size=250_002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):      # shapes without memory
        backbone = transformers.AutoModel.from_config(large)
        prompt = xpe.SoftPrompt(1024, **arguments)
        head = xpe.ClassificationHead(1024, classes=7)
        model = xpe.PromptedClassifier(backbone, prompt, head, reads)

    def count(parameters):
        return sum(parameter.numel() for parameter in parameters)

    def count_rows(matrix):
        return 0 if matrix is None else len(matrix)

    assert count_rows(prompt.standard) == n_standard
    assert count_rows(prompt.encoded) == n_encoded
    assert 1024 * (n_standard + n_encoded) == 20_480
    assert count(prompt.parameters()) == 20_480 + in_encoder
    assert count(head.parameters()) == 1_056_775
    assert count(p for p in model.parameters() if p.requires_grad) == total
    assert 558e6 < count(backbone.parameters()) < 561e6
    assert xpe.positions(backbone) == 512


@pytest.mark.parametrize("ratio, encoded_rows", [
    (0, 0), (0.01, 1), (0.3, 6), (0.34, 6), (0.7, 14), (0.99, 19), (1, 20)])
def test_shares_of_encoded_rows(ratio, encoded_rows):
    """Catches: rounding instead of int(), a DUAL that is in truth an SPT or XPE, rows in the wrong
    order: the standard rows come first."""
    prompt = make_prompt(length=20, ratio=ratio, encoder="none")     # encoded rows as they are
    rows = []
    if prompt.standard is not None:
        rows += list(prompt.standard)
    if prompt.encoded is not None:
        rows += list(prompt.encoded)
        assert len(prompt.encoded) == encoded_rows
    else:
        assert encoded_rows == 0
    assert torch.equal(prompt(1)[0], torch.stack(rows))


# ---- 2. Where training starts --------------------------------------------------------------------

def test_initialisation():
    """Catches: another start than the authors': embeddings from N(0, 1), torch's own Linears in the
    encoder, the head from N(0, 0.02) with zero biases."""
    torch.manual_seed(3)
    prompt = xpe.SoftPrompt(512, ratio=0.5)
    head = xpe.ClassificationHead(512, 7)
    for rows in (prompt.standard, prompt.encoded):
        assert abs(rows.mean()) < 0.03
        assert abs(rows.std() - 1) < 0.03
    for layer in prompt.encoder:
        if isinstance(layer, nn.Linear):
            bound = layer.in_features ** -0.5
            assert 0.98 * bound < layer.weight.abs().max() <= bound
            assert layer.bias.abs().max() <= bound
    assert abs(head.dense.weight.std() - 0.02) < 1e-3
    assert abs(head.out_proj.weight.std() - 0.02) < 1e-3
    assert not head.dense.bias.any() and not head.out_proj.bias.any()


# ---- 3. The encoders, as equations ---------------------------------------------------------------
# A second computation of the prompt matrix (P, H). `weights` are the parameters of an encoder by
# the names that the authors' files, too, give them.

def mlp_by_hand(weights, beginning, x):
    """Linear, then ReLU and Linear as often as there are more; (P, .) -> (P, H)."""
    numbers = []
    for name in weights:
        if name.startswith(beginning) and name.endswith(".weight"):
            numbers.append(int(name[len(beginning):].split(".")[0]))
    for number in sorted(numbers):
        if number > 0:
            x = x.clamp(min=0)
        x = x @ weights[f"{beginning}{number}.weight"].T + weights[f"{beginning}{number}.bias"]
    return x


def lstm_by_hand(weights, x, layers):
    """A bidirectional LSTM over the rows; (P, H) -> (P, 2D)."""
    for layer in range(layers):
        directions = []
        for suffix in ("", "_reverse"):
            def weight(name):
                return weights[f"lstm.{name}_l{layer}{suffix}"]
            rows = x.flip(0) if suffix else x
            h = c = torch.zeros(weight("weight_hh").shape[1])
            states = []
            for row in rows:
                gates = weight("weight_ih") @ row + weight("bias_ih")
                gates = gates + weight("weight_hh") @ h + weight("bias_hh")
                i, f, g, o = gates.chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                states.append(h)
            states = torch.stack(states)
            directions.append(states.flip(0) if suffix else states)
        x = torch.cat(directions, dim=1)
    return x


def attention_by_hand(weights, x, heads):
    """Each row looks at all rows; a layer norm over the sum; a Linear. (P, H) -> (P, H)."""
    qkv = x @ weights["0.self_attn.in_proj_weight"].T + weights["0.self_attn.in_proj_bias"]
    seen = []
    for q, k, v in zip(*[part.chunk(heads, dim=1) for part in qkv.chunk(3, dim=1)]):
        scores = q @ k.T / math.sqrt(q.shape[1])
        seen.append(scores.softmax(dim=1) @ v)
    merge = weights["0.self_attn.out_proj.weight"], weights["0.self_attn.out_proj.bias"]
    x = x + torch.cat(seen, dim=1) @ merge[0].T + merge[1]
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    x = (x - mean) / (variance + 1e-5).sqrt()
    x = x * weights["0.layernorm.weight"] + weights["0.layernorm.bias"]
    return x @ weights["0.out_proj.weight"].T + weights["0.out_proj.bias"]


def encode_by_hand(kind, weights, x, layers, heads):
    """The encoded rows (P, H) of the embedding x (P, H), by an encoder of one of xpe.ENCODERS."""
    if kind == "mlp":
        return mlp_by_hand(weights, "", x)
    if kind == "lstm":
        return mlp_by_hand(weights, "mlp.", lstm_by_hand(weights, x, layers))
    if kind == "attention":
        return mlp_by_hand(weights, "1.", attention_by_hand(weights, x, heads))
    return x


@torch.no_grad()
def prompt_by_hand(prompt):
    """The matrix (P, H) of a SoftPrompt: standard rows, then encoded rows."""
    rows = []
    if prompt.standard is not None:
        rows += list(prompt.standard)
    if prompt.encoded is not None:
        weights = dict(prompt.encoder.named_parameters())
        rows += list(encode_by_hand(prompt.config["encoder"], weights, prompt.encoded,
                                    prompt.config["layers"], prompt.config["heads"]))
    return torch.stack(rows)


@torch.no_grad()
def logits_by_hand(backbone, prompt, head, text, reads="prompt"):
    """Logits (C,) of one sentence without padding, by XLM-R's own classifier of transformers."""
    classifier_config = copy.deepcopy(backbone.config)
    classifier_config.num_labels = head.config["classes"]
    whole = transformers.XLMRobertaForSequenceClassification(classifier_config).eval()
    whole.roberta = backbone
    whole.classifier.load_state_dict(head.state_dict())
    matrix = prompt_by_hand(prompt)
    words = backbone.embeddings.word_embeddings.weight[torch.tensor(text)]
    x = torch.cat((matrix, words))[None]            # (1, P+T, H)
    if reads == "prompt":
        return whole(inputs_embeds=x).logits[0]
    states = backbone(inputs_embeds=x).last_hidden_state[0]
    states = states[len(matrix):]                   # (T, H), of the text alone
    seen = {"first": states[0], "last": states[-1], "mean": states.mean(dim=0)}[reads]
    return whole.classifier(seen[None, None])[0]


ENCODERS = [("mlp", 1), ("mlp", 2), ("mlp", 3), ("lstm", 1), ("lstm", 2), ("attention", 2),
            ("none", 2)]


@pytest.mark.parametrize("ratio", [0, 0.3, 0.99, 1])
@pytest.mark.parametrize("encoder, layers", ENCODERS)
def test_the_prompt_matrix(encoder, layers, ratio):
    """Catches: any slip in an encoder; dropout in evaluation; a collapsed prompt that holds the
    encoder's input, or that leaves the prompt in another mode."""
    prompt = make_prompt(1, 20, ratio, encoder, layers)
    expected = prompt_by_hand(prompt)
    assert_close(prompt.eval()(3), expected.expand(3, -1, -1))
    collapsed = prompt.train().collapse()
    assert_close(collapsed(1)[0], expected)
    assert prompt.training and collapsed.encoder is None
    assert collapsed.config["ratio"] == 0


# ---- 4. The logits -------------------------------------------------------------------------------

@pytest.mark.parametrize("reads", xpe.READS)
@pytest.mark.parametrize("encoder, layers", ENCODERS)
def test_logits_against_a_plain_computation(encoder, layers, reads):
    """Catches: any slip in concatenation, mask, positions, padding, read-out or head."""
    backbone, texts = tiny_backbone(), random_texts(9, 4, 1)
    prompt, head = make_prompt(1, 20, 0.7, encoder, layers), make_head()
    model = xpe.PromptedClassifier(backbone, prompt, head, reads).eval()
    expected = [logits_by_hand(backbone, prompt, head, text, reads) for text in texts]
    expected = torch.stack(expected)
    assert_close(model(*collate(texts)), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-2       # the comparison sees something


def test_a_prompt_of_words_is_those_words_in_front():
    """Catches: a prompt after `<s>` or behind the text, positions that count from the text,
    position or type embeddings that the prompt's rows do not get."""
    backbone, texts = tiny_backbone(), random_texts(6, 9, 4)
    words, texts = texts[0], texts[1:]
    prompt = xpe.SoftPrompt(H, length=6, ratio=0.0)
    prompt.standard.data = backbone.get_input_embeddings().weight[words].detach().clone()
    model = xpe.PromptedClassifier(backbone, prompt, make_head()).eval()
    bare = xpe.PromptedClassifier(backbone, None, make_head()).eval()
    with_words = [words + text for text in texts]
    assert_close(model(*collate(texts)), bare(*collate(with_words)))
    assert (model.prompt_length, bare.prompt_length) == (6, 0)


@pytest.mark.parametrize("reads", xpe.READS)
def test_what_the_head_reads(reads):
    """Catches: `<s>` read where the paper reads prompt row 0; a mean over prompt or padding; a last
    token that is padding."""
    backbone, texts = tiny_backbone(), random_texts(5, 3)
    model = xpe.PromptedClassifier(backbone, make_prompt(), make_head(), reads).eval()
    input_ids, attention_mask = collate(texts)
    seen = []
    model.heads[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    states = []
    backbone.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    model(input_ids, attention_mask)
    states = states[0]                                          # (B, P+T, H)
    assert states.shape == (2, 6 + 5, H)
    expected = {
        "prompt": states[:, 0],
        "first": states[:, 6],
        "last": torch.stack([states[0, 6 + 4], states[1, 6 + 2]]),
        "mean": torch.stack([states[0, 6:6 + 5].mean(dim=0), states[1, 6:6 + 3].mean(dim=0)]),
    }
    assert_close(seen[0], expected[reads])


def test_the_mean_counts_beyond_256_in_bf16():
    """Catches: a mean of long texts in bf16, which counts to 256 only."""
    model = xpe.PromptedClassifier(tiny_backbone(), make_prompt(), make_head(), "mean")
    states = torch.ones(1, 6 + 400, H, dtype=torch.bfloat16)
    assert_close(model.read(states, torch.ones(1, 400, dtype=torch.long)), torch.ones(1, H))


def test_padding():
    """Catches: padding that reaches the logits; left padding, which moves the text's positions,
    taken in silence."""
    model = xpe.PromptedClassifier(tiny_backbone(), make_prompt(), make_head()).eval()
    input_ids, attention_mask = collate(random_texts(9, 4, 1))
    logits = model(input_ids, attention_mask)
    for n, value in ((12, PADDING), (2, 7)):        # whatever the padding holds
        longer = F.pad(input_ids, (0, n), value=value), F.pad(attention_mask, (0, n))
        assert_close(model(*longer), logits)
    on_the_left = F.pad(input_ids, (1, 0), value=PADDING), F.pad(attention_mask, (1, 0))
    with pytest.raises(ValueError, match="begins with padding: pad on the right"):
        model(*on_the_left)


# ---- 5. Dropout: training and evaluation ---------------------------------------------------------

def test_each_text_has_its_own_dropout_mask():
    """Catches: one mask for a whole batch (peft's way), a mask without its scale, dropout in
    evaluation."""
    prompt = xpe.SoftPrompt(64, 10, ratio=1.0, hidden=64, layers=1, dropout=0.25)
    for layer in (prompt.encoder[0], prompt.encoder[3]):        # now it only adds 5 before dropout
        layer.weight.data, layer.bias.data = torch.eye(64), torch.zeros(64)
    prompt.encoder[0].bias.data += 5
    plus_5 = (prompt.encoded + 5).detach()
    torch.manual_seed(1)
    rows = prompt.train()(40)                                   # (40, 10, 64)
    kept = rows != 0
    assert_close(rows, torch.where(kept, plus_5 / 0.75, 0))
    assert abs(kept.float().mean() - 0.75) < 0.02
    masks = {str(mask.flatten().tolist()) for mask in kept}
    assert len(masks) == 40
    assert_close(prompt.eval()(40), plus_5.expand(40, -1, -1))


def test_evaluation_encodes_once():
    """Catches: an encoder that runs for every text of a test batch, or once in training, where each
    text needs its own mask."""
    model = xpe.PromptedClassifier(tiny_backbone(), make_prompt(), make_head())
    batches = []
    model.prompts[0].encoder.register_forward_pre_hook(
        lambda module, inputs: batches.append(len(inputs[0])))
    batch = collate(random_texts(3, 3, 3, 3, 3))
    model.eval()(*batch)
    model(*batch, owner=torch.zeros(5, dtype=torch.long))
    model.train()(*batch)
    assert batches == [1, 1, 5]


# ---- 6. What is trained --------------------------------------------------------------------------

@pytest.mark.parametrize("encoder", xpe.ENCODERS)
def test_only_prompt_and_head_get_gradients(encoder):
    """Catches: a backbone that learns; a part of the prompt or head that does not."""
    backbone, prompt, head = tiny_backbone(), make_prompt(encoder=encoder), make_head()
    model = xpe.PromptedClassifier(backbone, prompt, head).train()
    loss = F.cross_entropy(model(*collate(random_texts(9, 4))), torch.tensor([1, 2]))
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_full_fine_tuning_trains_the_bare_backbone():
    """Catches: a backbone that stays frozen where it is to be trained."""
    model = xpe.PromptedClassifier(tiny_backbone(), None, make_head(), frozen=False)
    model(*collate(random_texts(9, 4))).logsumexp(dim=1).sum().backward()
    words = model.backbone.get_input_embeddings().weight
    assert words.grad.any() and len(model.prompts) == 0


def test_a_backbone_in_bf16():
    """Catches: a prompt or head that a half-precision backbone makes half-precise, which would lose
    small steps."""
    backbone = tiny_backbone().bfloat16()
    model = xpe.PromptedClassifier(backbone, make_prompt(), make_head())
    logits = model(*collate(random_texts(9, 4)))
    logits.logsumexp(dim=1).sum().backward()
    assert logits.dtype == torch.float32
    for parameter in [*model.prompts.parameters(), *model.heads.parameters()]:
        assert parameter.dtype == parameter.grad.dtype == torch.float32


# ---- 7. K prompts, one backbone ------------------------------------------------------------------

@pytest.mark.parametrize("encoder", xpe.ENCODERS)
@pytest.mark.parametrize("training", [False, True])
def test_three_prompts_in_one_batch(encoder, training):
    """Catches: a text that gets another's prompt or head, in equal blocks and in any mixture; a
    prompt without texts that is in the way."""
    backbone, texts = tiny_backbone(), random_texts(5, 3, 8, 8, 1, 6, 2)
    prompts = [make_prompt(k, encoder=encoder, dropout=0.0) for k in range(3)]
    heads = [make_head(10 + k, dropout=0.0) for k in range(3)]
    for module in nn.ModuleList(prompts).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0          # that in the MLP of `attention` is no setting
    model = xpe.PromptedClassifier(backbone, prompts, heads).train(training)
    backbone.eval()

    def by_hand(owner):
        logits = []
        for text, k in zip(texts, owner):
            logits.append(logits_by_hand(backbone, prompts[k], heads[k], text))
        return torch.stack(logits)

    for owner in ([2, 0, 0, 1, 2, 2, 0], [0, 2, 2, 2, 0, 0, 2], [1] * 7, [0, 0, 1, 1, 1, 2, 2]):
        assert_close(model(*collate(texts), owner=torch.tensor(owner)), by_hand(owner))
    assert_close(model(*collate(texts[:6])), by_hand([0, 0, 1, 1, 2, 2]))
    with pytest.raises(ValueError, match="7 texts are not 3 equal blocks: say with `owner`"):
        model(*collate(texts))


def test_gradients_stay_with_their_owner():
    """Catches: prompts that train each other; a prompt without texts that gets a gradient."""
    backbone, texts = tiny_backbone(), random_texts(5, 3, 8, 6)
    labels, owner = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 0, 2, 0])
    prompts = [make_prompt(k, dropout=0.0) for k in range(3)]
    heads = [make_head(10 + k, dropout=0.0) for k in range(3)]

    alone = copy.deepcopy(list(zip(prompts, heads)))
    for k in (0, 2):
        model = xpe.PromptedClassifier(backbone, *alone[k])
        mine = [i for i in range(4) if owner[i] == k]
        logits = model(*collate([texts[i] for i in mine]))
        F.cross_entropy(logits, labels[mine], reduction="sum").backward()

    model = xpe.PromptedClassifier(backbone, prompts, heads)
    logits = model(*collate(texts), owner=owner)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    for k in range(3):
        together = [*prompts[k].parameters(), *heads[k].parameters()]
        expected = [*alone[k][0].parameters(), *alone[k][1].parameters()]
        for parameter, parameter_alone in zip(together, expected):
            if k == 1:
                assert parameter.grad is None
            else:
                assert_close(parameter.grad, parameter_alone.grad)


# ---- 8. Any backbone -----------------------------------------------------------------------------

BACKBONES = {
    "xlm-roberta": {}, "xlm-roberta-xl": {}, "roberta": {}, "camembert": {}, "bert": {},
    "distilbert": dict(dim=H, n_layers=2, n_heads=2, hidden_dim=32),
    "electra": dict(embedding_size=8),
    "deberta-v2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"],
                       position_biased_input=False, position_buckets=8),
    "modernbert": dict(local_attention=8, global_attn_every_n_layers=2, pad_token_id=1,
                       bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2),
    "qwen2": dict(num_key_value_heads=1),       # decoders: the head reads the last token
    "llama": dict(num_key_value_heads=1)}
DECODERS = ("qwen2", "llama")
COUNT_FROM_PADDING = ("xlm-roberta", "xlm-roberta-xl", "roberta", "camembert")


@pytest.mark.parametrize("kind", BACKBONES)
def test_any_backbone(kind):
    """Catches: prompt, mask or text without effect, padding that leaks into the logits, wrong
    widths or a wrong limit of positions."""
    backbone = tiny_backbone(kind, **BACKBONES[kind])
    width, hidden_width = xpe.widths(backbone)
    assert (width, hidden_width) == (8 if kind == "electra" else H, H)
    prompt = fill(xpe.SoftPrompt(width, 6, 0.5, hidden=5), seed=1, std=0.5)
    reads = "last" if kind in DECODERS else "prompt"
    model = xpe.PromptedClassifier(backbone, prompt, make_head(), reads).eval()

    texts = random_texts(9, 4, 1)
    input_ids, attention_mask = collate(texts)
    logits = model(input_ids, attention_mask)
    longer = F.pad(input_ids, (0, 12), value=7), F.pad(attention_mask, (0, 12))
    assert_close(model(*longer), logits, 1e-4)
    one_by_one = [model(*collate([text])) for text in texts]
    assert_close(torch.cat(one_by_one), logits, 1e-4)
    assert (logits[0] - logits[1]).abs().max() > 1e-4           # the text matters

    model.train()(input_ids, attention_mask).logsumexp(dim=1).sum().backward()
    for name, parameter in [*prompt.named_parameters(), *model.heads.named_parameters()]:
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name

    limit = 62 if kind in COUNT_FROM_PADDING else 64
    assert xpe.positions(backbone) == limit
    model.eval()(*collate(random_texts(limit - 6)))
    message = (rf"6 prompt rows \+ {limit - 5} text tokens = {limit + 1} exceed the {limit} "
               rf"positions of the backbone: a text may have {limit - 6} tokens")
    with pytest.raises(ValueError, match=message):
        model(*collate(random_texts(limit - 5)))
    if kind in COUNT_FROM_PADDING + ("bert", "electra", "distilbert"):
        with pytest.raises((IndexError, RuntimeError)):         # the limit is the backbone's own
            backbone(input_ids=torch.tensor(random_texts(limit + 1)))


# ---- 9. What does not fit is refused -------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    (dict(ratio=1.5), r"prompt.ratio must be from 0 \(SPT\) to 1 \(XPE\), not 1.5"),
    (dict(ratio=-0.1), "prompt.ratio must be from 0 .* not -0.1"),
    (dict(ratio=math.nan), "prompt.ratio must be from 0 .* not nan"),
    (dict(ratio="0.3"), "prompt.ratio must be from 0 .* not '0.3'"),
    (dict(ratio=0.5, length=1), "prompt.ratio 0.5 needs a prompt of two rows or more, not of one"),
    (dict(length=0), "prompt.length must be a whole number from 1 to 65535, not 0"),
    (dict(length=True), "prompt.length must be a whole number .* not True"),
    (dict(layers=0), "prompt.layers must be a whole number from 1 to 64, not 0"),
    (dict(layers=65), "prompt.layers must be a whole number from 1 to 64, not 65"),
    (dict(width=0), "prompt.width must be a whole number from 1 to 65535, not 0"),
    (dict(hidden=-1), "prompt.hidden must be a whole number from 0 to 65535, not -1"),
    (dict(dropout=1.0), "prompt.dropout must be at least 0 and below 1, not 1.0"),
    (dict(encoder="mpl"), "prompt.encoder must be one of mlp, lstm, attention, none, not 'mpl'"),
    (dict(encoder="attention", heads=5), "prompt.heads: 5 attention heads do not divide width 16"),
    (dict(encoder="attention", heads=0), "prompt.heads must be a whole number from 1"),
])
def test_a_prompt_that_cannot_be(arguments, message):
    """Catches: wrong sizes that surface as an error deep inside torch, or not at all."""
    with pytest.raises(ValueError, match=message):
        xpe.SoftPrompt(**dict(dict(width=H), **arguments))


def test_heads_and_prompts_that_do_not_fit():
    """Catches: wrong widths that surface as a matmul error deep in the backbone, or not at all."""
    backbone, prompt, head = tiny_backbone(), make_prompt(), make_head()
    with pytest.raises(ValueError, match="head.classes must be a whole number from 1 .* not 0"):
        xpe.ClassificationHead(H, 0)
    with pytest.raises(ValueError, match="head.dropout must be at least 0 and below 1, not 1.5"):
        xpe.ClassificationHead(H, 7, 1.5)
    with pytest.raises(ValueError, match="reads must be one of prompt, first, .* not 'cls'"):
        xpe.PromptedClassifier(backbone, None, head, "cls")
    with pytest.raises(ValueError, match="prompt of width 8 does not fit embeddings of width 16"):
        xpe.PromptedClassifier(backbone, xpe.SoftPrompt(8), head)
    with pytest.raises(ValueError, match="head of width 8 does not fit hidden states of width 16"):
        xpe.PromptedClassifier(backbone, prompt, xpe.ClassificationHead(8, 7))
    with pytest.raises(ValueError, match="2 prompts need as many heads, not 1"):
        xpe.PromptedClassifier(backbone, [prompt, make_prompt()], [head])
    with pytest.raises(ValueError, match="must be of equal length"):
        xpe.PromptedClassifier(backbone, [prompt, xpe.SoftPrompt(H, 5)], [head, make_head()])
    other_head = xpe.ClassificationHead(H, head.config["classes"] + 1)
    with pytest.raises(ValueError, match="must have equally many classes"):
        xpe.PromptedClassifier(backbone, [prompt, make_prompt()], [head, other_head])
    ids, mask = torch.full((2, 3), 5), torch.ones(2, 3, dtype=torch.long)
    for owner in ([0, 1], [-1, 0]):
        with pytest.raises(ValueError, match="owner must name prompts from 0 to 0"):
            xpe.PromptedClassifier(backbone, prompt, head)(ids, mask, torch.tensor(owner))


# ---- 10. A prompt is a folder --------------------------------------------------------------------

def save_example(folder, ratio=0.5, encoder="mlp"):
    """Write a prompt folder -> (prompt, head, meta) as they were written."""
    prompt = make_prompt(1, 6, ratio, encoder)
    head = fill(xpe.ClassificationHead(H, 3), seed=2)
    meta = {"kind": "dual", "reads": "prompt", "max_length": 20, "labels": ["x", "y", "\u00e9"],
            "backbone": {"name": "b", "revision": "r", "type": "camembert"}, "training": {"a": 1}}
    xpe.save_prompt(folder, prompt, head, meta)
    return prompt, head, meta


@pytest.mark.parametrize("ratio, encoder", [(0, "mlp"), (1, "mlp"), (0.5, "mlp"), (0.5, "lstm"),
                                            (1, "attention"), (0.5, "none")])
def test_save_and_load(tmp_path, ratio, encoder):
    """Catches: a tensor lost or cast on the way, a head that stays random, tensors that come back
    frozen."""
    prompt, head, meta = save_example(tmp_path, ratio, encoder)
    loaded_prompt, loaded_head, loaded_meta = xpe.load_prompt(tmp_path)
    for saved, loaded in ((prompt, loaded_prompt), (head, loaded_head)):
        assert saved.config == loaded.config
        before, after = dict(saved.named_parameters()), dict(loaded.named_parameters())
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]) and after[name].requires_grad
    assert loaded_meta == dict(meta, format=2, prompt=prompt.config, head=head.config)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["prompt.json", "prompt.safetensors"]


def test_a_head_without_a_prompt(tmp_path):
    """Catches: a run of full fine-tuning, which has no prompt, that cannot be saved or loaded."""
    head = xpe.ClassificationHead(H, 3)
    meta = dict(save_example(tmp_path)[2], kind="full")
    xpe.save_prompt(tmp_path, None, head, meta)
    prompt, loaded, meta = xpe.load_prompt(tmp_path)
    assert prompt is None and meta["prompt"] is None
    assert torch.equal(loaded.dense.weight, head.dense.weight)


def change_json(*keys_and_value):
    """A damage: set prompt.json's value at these keys; None removes it."""
    *keys, last, value = keys_and_value

    def damage(folder):
        meta = section = json.loads((folder / "prompt.json").read_text())
        for key in keys:
            section = section[key]
        section[last] = value
        if value is None:
            del section[last]
        (folder / "prompt.json").write_text(json.dumps(meta))
    return damage


def change_tensor(name, value):
    """A damage: set this tensor of prompt.safetensors; None removes it."""
    def damage(folder):
        from safetensors.torch import load_file, save_file
        tensors = load_file(folder / "prompt.safetensors")
        tensors[name] = value
        if value is None:
            del tensors[name]
        save_file(tensors, folder / "prompt.safetensors")
    return damage


def write(name, content):
    """A damage: replace a file of the folder."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    """A damage: keep this many bytes of a file."""
    return lambda folder: os.truncate(folder / name, size)


def remove(name):
    """A damage: remove a file of the folder."""
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize("damage, message", [
    (change_tensor("prompt.standard", None), "json: the tensor 'prompt.standard' is missing"),
    (change_tensor("head.out_proj.bias", None), "the tensor 'head.out_proj.bias' is missing"),
    (change_tensor("prompt.more", torch.ones(2)), "the tensor 'prompt.more' is unknown"),
    (change_json("prompt", "ratio", 0), "the tensor 'prompt.encoded' is unknown"),
    (change_tensor("prompt.standard", torch.ones(4, H)), r"is \(4, 16\), expected \(3, 16\)"),
    (change_tensor("head.out_proj.bias", torch.tensor([1, math.nan, 1])), "hold finite numbers"),
    (change_tensor("head.out_proj.bias", torch.ones(3, dtype=torch.int32)), "hold finite numbers"),
    (change_json("prompt", "ratio", 0.9), r"'prompt.encoded' is \(3, 16\), expected \(5, 16\)"),
    (change_json("prompt", "ratio", 1), r"'prompt.encoded' is \(3, 16\), expected \(6, 16\)"),
    (change_json("prompt", "encoder", "lstm"), "the tensor 'prompt.encoder.* is missing"),
    (change_json("prompt", "encoder", "gru"), "prompt.encoder must be one of .* not 'gru'"),
    (change_json("prompt", "width", "16"), "prompt.width must be a whole number .* not '16'"),
    (change_json("prompt", "length", 10 ** 9), "prompt.length must be .* not 1000000000"),
    (change_json("prompt", "heads", None), "prompt must hold width, length"),
    (change_json("prompt", "more", 1), "prompt: .*unexpected keyword argument 'more'"),
    (change_json("prompt", None), "the tensor 'prompt.* is unknown"),
    (change_json("prompt", [1]), "prompt.json: prompt"),
    (change_json("head", "classes", 4), r"'head.out_proj.bias' is \(3,\), expected \(4,\)"),
    (change_json("head", None), "head must be an object, not None"),
    (change_json("head", 3), "head must be an object, not 3"),
    (change_json("labels", ["a", "b"]), "2 labels, but 3 classes"),
    (change_json("labels", ["a", "b", "b"]), "labels must differ from each other"),
    (change_json("labels", "xyz"), "labels must be a list of texts"),
    (change_json("format", 3), "format is 3, expected 2"),
    (change_json("kind", "lora"), "kind must be one of .* not 'lora'"),
    (change_json("reads", None), "reads must be one of .* not None"),
    (change_json("max_length", True), "max_length must be a whole number .* not True"),
    (change_json("backbone", "x"), "backbone must be an object, not 'x'"),
    (change_json("backbone", "revision", None), "backbone.revision must be a text"),
    (change_json("training", None), "training must be an object, not None"),
    (write("prompt.json", b"[1]"), "prompt.json: holds no JSON object"),
    (write("prompt.json", b"{"), "prompt.json: cannot be read as JSON"),
    (write("prompt.json", b"\xff{}"), "prompt.json: cannot be read as JSON"),
    (write("prompt.json", b"[" * 100_000), "prompt.json: cannot be read as JSON"),
    (write("prompt.json", b" " * (5 << 20)), "prompt.json: .* larger than 4 MB"),
    (write("prompt.safetensors", b"\x80\x04pickle"), "prompt.safetensors: .* not a safetensors"),
    (cut("prompt.safetensors", 2000), "prompt.safetensors: cut short, or not a safetensors file"),
    (remove("prompt.json"), "no prompt.json: not a prompt, or not yet trained"),
    (remove("prompt.safetensors"), "prompt.safetensors"),
])
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    """Catches: lenient loading: a head that stays random, tensors that are dropped, shapes that
    broadcast, memory taken on a file's word."""
    save_example(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        xpe.load_prompt(tmp_path)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    """Catches: half a file after a full disk or Ctrl-C, temporary files left behind, a full disk
    that is told without the path."""
    path = tmp_path / "a"
    xpe.write_atomically(path, b"old")

    def interrupted(file):
        file.write(b"new")
        raise KeyboardInterrupt

    def on_a_full_disk(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        xpe.write_atomically(path, interrupted)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        xpe.write_atomically(path, on_a_full_disk)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


# ---- 11. The file is a gift ----------------------------------------------------------------------

ALONE = """
import sys
for name in "transformers safetensors numpy yaml tqdm huggingface_hub tokenizers".split():
    sys.modules[name] = None                # an import of it fails
import torch
import torch.nn.functional as F
from xpe import ClassificationHead, PromptedClassifier, SoftPrompt

class Toy(torch.nn.Module):                 # each word beside the mean of all, through one layer
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(30, 8)
        self.layer = torch.nn.Linear(8, 8)

    def get_input_embeddings(self):
        return self.words

    def forward(self, inputs_embeds, attention_mask):
        x = inputs_embeds * attention_mask[:, :, None]
        mean = x.sum(dim=1, keepdim=True) / attention_mask.sum(dim=1)[:, None, None]
        return torch.tanh(self.layer(x + mean))

torch.set_num_threads(1)
torch.manual_seed(0)
prompt, head = SoftPrompt(8, 4, ratio=0.5), ClassificationHead(8, 3)
model = PromptedClassifier(Toy(), prompt, head, reads="first")
input_ids = torch.randint(30, (24, 5))
labels = input_ids[:, 0] % 3
for step in range(150):
    loss = F.cross_entropy(model(input_ids, torch.ones_like(input_ids)), labels)
    loss.backward()
    for parameter in [*prompt.parameters(), *head.parameters()]:
        parameter.data -= 0.5 * parameter.grad
        parameter.grad = None
    print(loss.item())
"""


def test_xpe_needs_torch_alone(tmp_path):
    """Catches: an import that makes xpe.py useless to whoever copies that one file."""
    shutil.copy(HERE / "xpe.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert abs(losses[0] - math.log(3)) < 0.3
    assert losses[-1] < 0.5 * losses[0]
