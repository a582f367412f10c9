"""The method once more, as a specification: read it beside the paper and xpe.py, from the top down.

    python -m pytest -q test_xpe.py         (offline, on a CPU, about 5 s)

What the paper gives as a number is asserted. Everything else is computed a second time, slowly and
plainly: one sentence at a time, equations instead of modules, the classification head that
transformers gives XLM-R. Each test says which mistake it would catch. Backbones are random and
tiny. Letters as in xpe.py: B texts, T tokens, P prompt rows, H width of the backbone, K prompts.
"""
import runpy
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaClassificationHead

import config
import xpe

H = 16                      # width of the tiny backbones
torch.set_num_threads(1)


# ---- What the tests share ------------------------------------------------------------------------

def tiny_backbone(kind="xlm-roberta", **more):
    """A random transformer of two layers, 16 wide, loud enough that each part shows in logits."""
    torch.manual_seed(0)
    backbone_config = transformers.AutoConfig.for_model(
        kind, vocab_size=60, hidden_size=H, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.3, **more)
    return transformers.AutoModel.from_config(backbone_config).eval()


def fill(module, seed):
    """Fill every parameter with N(0, 0.3), biases and norms too: none can be forgotten unseen."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def make_prompt(seed=1, width=H, length=6, ratio=0.5, encoder="mlp", layers=2, heads=2):
    """By default a DUAL prompt of three standard and three encoded rows."""
    return fill(xpe.SoftPrompt(width, length, ratio, encoder, 5, layers, heads=heads), seed)


def make_head(seed=2, width=H, classes=7):
    return fill(xpe.ClassificationHead(width, classes), seed)


def make_model(prompts=None, heads=None, **more):
    """A tiny XLM-R with a prompt and a head, in evaluation mode."""
    prompts, heads = prompts or make_prompt(), heads or make_head()
    return xpe.PromptedClassifier(tiny_backbone(), prompts, heads, **more).eval()


def batch(*lengths):
    """Random texts of these lengths -> input_ids, attention_mask (B, T), padded on the right."""
    torch.manual_seed(1)
    input_ids = torch.randint(5, 60, (len(lengths), max(lengths)))
    attention_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return input_ids.where(attention_mask, 1), attention_mask.long()


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- 1. The paper's numbers ----------------------------------------------------------------------

@pytest.mark.parametrize("method, ratio, standard, encoded, total", [
    ("SPT", 0.0, 20, 0, 20_480 + 1_056_775),
    ("XPE", 1.0, 0, 20, 1_668_615),
    ("DUAL-30", 0.3, 14, 6, 1_668_615),
    ("DUAL-70", 0.7, 6, 14, 1_668_615)])
def test_parameter_counts(method, ratio, standard, encoded, total):
    """Catches: a missing layer or bias, "2 layers" as two Linears, a wrong width in config.yaml,
    standard and encoded rows swapped."""
    settings = config.read_config()["prompt"]
    del settings["reads"]
    prompt = xpe.SoftPrompt(1024, **{**settings, "ratio": ratio})
    head = xpe.ClassificationHead(1024, classes=7)

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    rows = [0 if part is None else len(part) for part in (prompt.standard, prompt.encoded)]
    assert rows == [standard, encoded]
    assert count(head) == 1_056_775
    assert count(prompt) == (20_480 + 591_360 if encoded else 20_480)
    assert count(prompt) + count(head) == total


@pytest.mark.parametrize("ratio, rows", [(0, 0), (0.01, 1), (0.34, 6), (0.99, 19), (1, 20)])
def test_encoded_rows(ratio, rows):
    """Catches: rounding instead of int(); a DUAL that is in truth an SPT or an XPE."""
    shapes = xpe.SoftPrompt(8, 20, ratio).state_dict()
    assert len(shapes.get("encoded", ())) == rows == 20 - len(shapes.get("standard", ()))


def test_initialisation():
    """Catches: another start than the authors': rows from N(0, 1), torch's own Linears in the
    encoder, the head from N(0, 0.02) with zero biases."""
    torch.manual_seed(3)
    prompt, head = xpe.SoftPrompt(512, ratio=0.5), xpe.ClassificationHead(512, 7)
    for weights, std in ((prompt.standard, 1), (prompt.encoded, 1), (head.dense.weight, 0.02),
                         (head.out_proj.weight, 0.02), (prompt.encoder[0].weight, 1536 ** -0.5)):
        assert abs(weights.mean()) < 0.05 * std
        assert abs(weights.std() - std) < 0.05 * std
    assert not head.dense.bias.any() and not head.out_proj.bias.any()


# ---- 2. The prompt -------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_prompt_matrix_by_hand(layers):
    """Catches: a slip in the MLP; dropout in evaluation; encoded rows before the standard ones; a
    collapsed prompt that differs, or that leaves the prompt in another mode."""
    prompt = make_prompt(length=20, ratio=0.7, layers=layers)
    *inner, weight, bias = prompt.encoder.parameters()
    x = prompt.encoded
    for i in range(layers):
        x = (x @ inner[2 * i].T + inner[2 * i + 1]).clamp(min=0)
    expected = torch.cat((prompt.standard, x @ weight.T + bias))
    collapsed = prompt.train().collapse()
    assert prompt.training and collapsed.config["ratio"] == 0
    close(collapsed(1)[0], expected)
    close(prompt.eval()(3), expected.expand(3, -1, -1))


@pytest.mark.parametrize("encoder, rows_seen", [
    ("mlp", 1), ("none", 1), ("lstm", 6), ("attention", 6)])
def test_which_rows_an_encoder_sees(encoder, rows_seen):
    """Catches: an LSTM of one direction, attention across the batch instead of the rows, an MLP
    that mixes rows."""
    encode = make_prompt(encoder=encoder).eval().encoder
    rows = torch.randn(2, 6, H)
    for i in range(6):
        other = rows.clone()
        other[0, i] += 1
        changed = (encode(other) != encode(rows)).any(dim=2)        # (2, 6)
        assert changed[0, i] and not changed[1].any()
        assert changed.sum() == rows_seen


def test_each_text_has_its_own_dropout_mask():
    """Catches: one mask for a whole batch, as peft has it; dropout in evaluation, or an encoder
    that runs for each text there."""
    prompt = make_prompt(ratio=1.0)
    batch_sizes = []
    prompt.encoder.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    rows = prompt.train()(50)                                       # (50, 6, H)
    assert len(rows.unique(dim=0)) == 50
    assert len(prompt.eval()(50).unique(dim=0)) == 1
    assert batch_sizes == [50, 1]


# ---- 3. Where the prompt goes, and what the head reads -------------------------------------------

@pytest.mark.parametrize("reads", xpe.READS)
def test_logits_by_hand(reads):
    """Catches: any slip in concatenation, mask, positions, padding or head; `<s>` read where the
    paper reads prompt row 0; a mean over prompt or padding; a last token that is padding."""
    model, lengths = make_model(reads=reads), (9, 4, 1)
    head = XLMRobertaClassificationHead(transformers.XLMRobertaConfig(hidden_size=H, num_labels=7))
    head.eval().load_state_dict(model.heads[0].state_dict())
    logits = model(*batch(*lengths))
    for i, n in enumerate(lengths):
        words = model.backbone.embeddings.word_embeddings.weight[batch(*lengths)[0][i, :n]]
        x = torch.cat((model.prompts[0](1)[0], words))              # (6+n, H), no padding, no mask
        states = model.backbone(inputs_embeds=x[None])[0]           # (1, 6+n, H)
        seen = {"prompt": states[:, :1], "first": states[:, 6:], "last": states[:, -1:],
                "mean": states[:, 6:].mean(dim=1, keepdim=True)}
        close(logits[i], head(seen[reads])[0])
    assert (logits[0] - logits[1]).abs().max() > 1e-2               # the comparison sees something


def test_a_prompt_of_words_is_those_words_in_front():
    """Catches: a prompt behind the text or after `<s>`; positions that count from the text;
    position or type embeddings that the prompt's rows lack, or get twice."""
    model, (input_ids, mask) = make_model(make_prompt(ratio=0)), batch(15)
    words = model.backbone.get_input_embeddings().weight[input_ids[0, :6]]
    model.prompts[0].standard.data = words.data
    states = model.backbone(input_ids=input_ids)[0]
    close(model(input_ids[:, 6:], mask[:, 6:]), model.heads[0](states[:, 0]))


@pytest.mark.parametrize("kind, width, limit, more", [
    ("xlm-roberta", H, 62, {}), ("bert", H, 64, {}), ("electra", 8, 64, {"embedding_size": 8}),
    ("qwen2", H, 64, {"num_key_value_heads": 1})])
def test_any_backbone(kind, width, limit, more):
    """Catches: padding that reaches the logits, or that is accepted on the left, where it would
    move the text's positions; ELECTRA's narrower embeddings; RoBERTa's 64 positions taken for 64,
    of which it can use 62: on a GPU that ends in a device assert."""
    prompt, backbone = make_prompt(width=width), tiny_backbone(kind, **more)
    model = xpe.PromptedClassifier(backbone, prompt, make_head(), reads="last").eval()
    input_ids, mask = batch(9, 4, 1)
    padded = F.pad(input_ids, (0, 12), value=7), F.pad(mask, (0, 12))
    close(model(*padded), model(input_ids, mask))
    with pytest.raises(ValueError, match="begins with padding: pad on the right"):
        model(input_ids.flip(1), mask.flip(1))
    model(*batch(limit - 6))
    with pytest.raises(ValueError, match=rf"6 prompt rows \+ {limit - 5} text tokens = {limit + 1} "
                                         rf"exceed the {limit} positions .* {limit - 6} tokens"):
        model(*batch(limit - 5))


# ---- 4. What is trained --------------------------------------------------------------------------

@pytest.mark.parametrize("encoder", xpe.ENCODERS)
def test_only_prompt_and_head_learn(encoder):
    """Catches: a backbone that learns; a part of the prompt or a head that does not; a backbone in
    bf16 that makes them half-precise, so that small steps are lost."""
    model = make_model(make_prompt(encoder=encoder))
    model.backbone.bfloat16()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    model.train()(*batch(9, 4)).logsumexp(dim=1).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    for name, tensor in model.named_parameters():
        assert tensor.equal(before[name]) == name.startswith("backbone."), name


def test_full_fine_tuning_trains_the_bare_backbone():
    """Catches: a backbone that stays frozen where it is to be trained."""
    model = xpe.PromptedClassifier(tiny_backbone(), None, make_head(), frozen=False).eval()
    input_ids, mask = batch(9)
    logits = model(input_ids, mask)
    close(logits, model.heads[0](model.backbone(input_ids)[0][:, 0]))
    logits.sum().backward()
    assert model.backbone.get_input_embeddings().weight.grad.any()


# ---- 5. K prompts, one backbone ------------------------------------------------------------------

@pytest.mark.parametrize("owner", [None, [2, 0, 2, 1, 0, 2], [1, 1, 1, 1, 2, 1]])
def test_prompts_side_by_side(owner):
    """Catches: a text behind another's prompt or head, logits in another order than the texts,
    gradients that leak from one prompt to another, a prompt without texts."""
    together = make_model([make_prompt(k) for k in range(3)], [make_head(k) for k in range(3)])
    input_ids, mask = batch(9, 4, 1, 7, 7, 3)
    logits = together(input_ids, mask, owner and torch.tensor(owner))
    logits.logsumexp(dim=1).sum().backward()
    owners = torch.tensor(owner or [0, 0, 1, 1, 2, 2])
    for k in owners.unique().tolist():
        alone = make_model(make_prompt(k), make_head(k))
        expected = alone(input_ids[owners == k], mask[owners == k])
        expected.logsumexp(dim=1).sum().backward()
        close(logits[owners == k], expected)
        for name, tensor in alone.named_parameters():
            if tensor.requires_grad:
                same = together.get_parameter(name.replace("s.0.", f"s.{k}.", 1))
                close(same.grad, tensor.grad, 1e-4)


def test_threads():
    """Catches: a service's threads that disturb each other."""
    model, texts = make_model(), batch(9, 4, 1)
    with ThreadPoolExecutor(4) as pool:
        for logits in pool.map(lambda _: model(*texts), range(16)):
            assert logits.equal(model(*texts))


# ---- 6. What does not fit is refused -------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda: make_prompt(ratio=1.5), r"prompt.ratio must be from 0 \(SPT\) to 1 \(XPE\), not 1.5"),
    (lambda: make_prompt(length=1), "prompt.length must be at least 2, not 1"),
    (lambda: make_prompt(layers=0), "prompt.layers must be from 1 to 64, not 0"),
    (lambda: make_prompt(encoder="mpl"), "prompt.encoder 'mpl' must be one of mlp, lstm"),
    (lambda: make_prompt(encoder="attention", heads=5), "prompt.heads 5 does not divide width"),
    (lambda: make_model(reads="cls"), "prompt.reads 'cls' must be one of prompt, first"),
    (lambda: make_model(heads=make_head(width=8)), "the head has width 8, the backbone 16"),
    (lambda: make_model([make_prompt()] * 2)(*batch(3)), "shorter"),    # with one head
    (lambda: make_model([make_prompt()] * 2, [make_head()] * 2)(*batch(3)),
     "1 texts are not 2 equal blocks: say with `owner` which prompt each text uses"),
    (lambda: make_model()(*batch(3), torch.tensor([1])), "longer")])
def test_what_does_not_fit(make, message):
    """Catches: wrong sizes that give wrong answers, or surface deep inside torch."""
    with pytest.raises(ValueError, match=message):
        make()


# ---- 7. The file is a gift -----------------------------------------------------------------------

class Plain(nn.Module):
    """A backbone that is not one of transformers: each word beside the sum of all."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(60, 1024)

    @classmethod
    def from_pretrained(cls, name, **_):
        return cls().eval()         # as transformers does

    def get_input_embeddings(self):
        return self.words

    def forward(self, inputs_embeds, attention_mask):
        x = inputs_embeds * attention_mask[:, :, None]
        return x + x.sum(dim=1, keepdim=True)       # the states themselves, not a tuple


def test_the_example_of_the_docstring(monkeypatch):
    """Catches: an example that does not run as it stands, or leaves out a step; an import that
    makes the file useless to whoever copies it; a backbone that must be one of transformers."""
    for name in ("transformers", "safetensors", "numpy", "yaml", "data", "config"):
        monkeypatch.setitem(sys.modules, name, None)        # an import of it fails
    names = runpy.run_path(xpe.__file__)
    input_ids, attention_mask = batch(9, 4, 1)
    names.update(AutoModel=Plain, input_ids=input_ids, attention_mask=attention_mask,
                 labels=torch.tensor([1, 2, 3]))
    example = xpe.__doc__.split("rates:\n")[1].split("\nLetters:")[0]
    preparation, line, step = textwrap.dedent(example).partition("logits =")
    exec(preparation, names)
    before = {name: tensor.clone() for name, tensor in names["model"].named_parameters()}
    exec(line + step, names)
    moved = [tensor for name, tensor in names["model"].named_parameters()
             if not tensor.equal(before[name])]
    assert sum(tensor.numel() for tensor in moved) == 1_668_615
    assert names["backbone"].training
