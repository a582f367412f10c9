"""speed.py: the same numbers for less work. Nothing here looks at a clock.

    python -m pytest tests/test_speed.py
"""
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers

import speed

BERT_LIKE = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
OTHERS = ("distilbert", "xlm-roberta-xl")


def make_backbone(kind="xlm-roberta", **changes):
    """A random backbone, two layers of width 16, with large weights: what is left out shows."""
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=32, max_position_embeddings=64, initializer_range=0.3)
    if kind == "distilbert":
        sizes = dict(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    sizes.update(changes)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModel.from_config(config).eval()


def make_batch(width=16):
    """Embeddings (3, 9, H) and a mask: texts of 9, 4 and 1 positions."""
    embeddings = torch.randn(3, 9, width, generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([9, 4, 1])[:, None] > torch.arange(9)
    return dict(inputs_embeds=embeddings, attention_mask=mask.long())


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- first_position_only -------------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", BERT_LIKE)
def test_position_0_is_the_same_and_the_only_one(kind, attention):
    """Catches: another state or gradient than the whole backbone's, a mask that is not looked at, a
    last layer that still computes every position."""
    backbone = make_backbone(kind, attn_implementation=attention)
    batch = make_batch(backbone.get_input_embeddings().weight.shape[1])
    shortened = speed.first_position_only(backbone)
    assert shortened is not backbone
    batch["inputs_embeds"].requires_grad_()
    gradients = []
    for model in (backbone, shortened):
        state = model(**batch)[0][:, 0]
        gradients.append(torch.autograd.grad(state.logsumexp(1).sum(), batch["inputs_embeds"])[0])
    close(shortened(**batch)[0], backbone(**batch)[0][:, :1])
    close(*gradients)
    assert gradients[0][:, 1:].abs().sum() > 0


def test_it_shares_all_weights_and_leaves_the_original_alone():
    """Catches: weights copied (twice the memory, and trained apart), a backbone changed by it."""
    backbone = make_backbone()
    before = backbone(**make_batch())[0]
    modules = list(backbone.modules())
    shortened = speed.first_position_only(backbone)
    assert list(backbone.modules()) == modules
    assert not any(module.training for module in modules)
    assert torch.equal(backbone(**make_batch())[0], before)
    shared = dict(shortened.named_parameters())
    for name, parameter in backbone.named_parameters():
        assert shared[name] is parameter, name
    backbone.train()
    assert not shortened.training
    assert speed.first_position_only(backbone).training, "the mode is taken over"


def test_threads_may_use_both_at_once():
    """Catches: a forward that swaps something in the backbone while it runs."""
    backbone = make_backbone()
    shortened = speed.first_position_only(backbone)
    wanted = {backbone: backbone(**make_batch())[0], shortened: shortened(**make_batch())[0]}
    wrong = []

    def go(model):
        for _ in range(20):
            if not torch.equal(model(**make_batch())[0], wanted[model]):
                wrong.append(model)

    threads = [threading.Thread(target=go, args=(model,)) for model in [backbone, shortened] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", OTHERS)
def test_other_backbones_come_back_as_they_are(kind):
    """Catches: a layer that is built otherwise, computed as BERT's are."""
    backbone = make_backbone(kind)
    assert speed.first_position_only(backbone) is backbone


def test_causal_layers_are_not_shortened():
    """Catches: position 0 of a decoder, which may look at itself alone, shown the whole text."""
    backbone = make_backbone("roberta", is_decoder=True)
    assert speed.first_position_only(backbone) is backbone


def test_a_disguised_backbone_is_not_shortened():
    """Catches: trust in the name alone, where a layer computes something else."""
    backbone = make_backbone()
    attention = backbone.encoder.layer[-1].attention
    attention.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))
    assert speed.first_position_only(backbone) is backbone
    backbone = make_backbone()
    del backbone.encoder.layer[-1].attention.self.query
    backbone.train()
    assert speed.first_position_only(backbone) is backbone
    assert backbone.training        # although the trial failed in evaluation mode
    assert speed.first_position_only(torch.nn.Linear(2, 2)).in_features == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_shortened_last_layer_keeps_its_dropout(attention):
    """Catches: attention dropout lost in training, or active in evaluation."""
    backbone = make_backbone(num_hidden_layers=1, hidden_dropout_prob=0.0,
                             attention_probs_dropout_prob=0.5, attn_implementation=attention)
    shortened = speed.first_position_only(backbone)
    n = 1_000
    batch = make_batch()
    for name, tensor in batch.items():
        batch[name] = tensor[1:2].expand(n, *tensor.shape[1:])
    torch.manual_seed(1)
    with torch.no_grad():
        states = shortened(**batch)[0][:, 0]                    # n times one text: (n, H)
        assert (states.std(dim=0) < 1e-5).all()
        whole = backbone.train()(**batch)[0][:, 0]
        states = shortened.train()(**batch)[0][:, 0]
    error = (whole.var(dim=0) + states.var(dim=0)).div(n).sqrt()
    assert (states.std(dim=0) > 0.01).all()
    assert ((whole.mean(dim=0) - states.mean(dim=0)).abs() < 6 * error).all()
    assert ((whole.std(dim=0) / states.std(dim=0)).log().abs() < 0.3).all()


# ---- CheapDropout --------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_cheap_dropout_is_dropout(p):
    """Catches: another share or scale than p says, positions that are dropped more than others, a
    gradient through another mask, one mask twice."""
    n, m = 1_001, 333           # no multiple of the four elements that are drawn at once
    x = torch.full((n, m), 2.0, requires_grad=True)
    torch.manual_seed(3)
    with speed.CheapDropout():
        y = F.dropout(x, p, training=True)
        kept = y != 0
        again = F.dropout(x, p) != 0
    close(y, torch.where(kept, 2 / (1 - p), 0.0))
    close(torch.autograd.grad(y.sum(), x)[0], torch.where(kept, 1 / (1 - p), 0.0))
    deviation = (p * (1 - p)) ** 0.5
    rounding = 2 ** -16         # of p to 16 bits
    assert abs(kept.float().mean() - (1 - p)) < 6 * deviation / (n * m) ** 0.5 + rounding
    assert (kept.float().mean(0) - (1 - p)).abs().max() < 6 * deviation / n ** 0.5
    assert abs((kept & again).float().mean() - (1 - p) ** 2) < 6 / (n * m) ** 0.5, "independent"


def test_where_nothing_is_drawn_it_is_torch():
    """Catches: dropout in evaluation, at p = 0 or outside the context; a division by 0 at p = 1."""
    x = torch.randn(7, 5)
    with speed.CheapDropout():
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert torch.equal(F.dropout(x, 0.0), x)
        assert not F.dropout(x, 1.0).any()
        assert F.dropout(x.bfloat16(), 0.1).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="between 0 and 1"):
            F.dropout(x, 1.5)
    x = torch.randn(100, 100)
    torch.manual_seed(4)
    plain = F.dropout(x, 0.3)
    torch.manual_seed(4)
    with speed.CheapDropout():
        cheap = F.dropout(x, 0.3)
    torch.manual_seed(4)
    assert torch.equal(F.dropout(x, 0.3), plain)
    assert not torch.equal(cheap, plain)


def test_torchs_seed_decides():
    """Catches: a generator of its own, which a resumed run would not restore."""
    x = torch.ones(50, 50)
    masks = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        with speed.CheapDropout():
            masks.append(F.dropout(x, 0.1))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_it_reaches_the_dropout_of_a_backbone(monkeypatch):
    """Catches: a backbone whose dropout goes round it. Two layers have one after the embeddings and
    three in each layer."""
    seen = []

    def count(input, p, *_, **__):
        seen.append(p)
        return input

    monkeypatch.setattr(speed.CheapDropout, "dropout", staticmethod(count))
    backbone = make_backbone(attn_implementation="eager").train()
    with speed.CheapDropout():
        backbone(**make_batch())
    assert seen == [0.1] * 7
