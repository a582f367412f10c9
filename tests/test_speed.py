"""speed.py: the same numbers for less work. Nothing here looks at a clock.

    python -m pytest tests/test_speed.py
"""
import pytest
import torch
import torch.nn.functional as F

from helpers import close, tiny
from speed import CheapDropout, first_position_only

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(5))
MASK = torch.ones(2, 9)
MASK[1, 4:] = 0


# ---- first_position_only -------------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "electra", "ernie", "roberta", "xlm-roberta"])
def test_position_0_is_the_same_and_the_only_one(kind, attention):
    """Catches: another state or gradient than the whole backbone's, an ignored mask, a last layer
    that still computes every position, copied weights, a backbone changed."""
    backbone = tiny(kind, attn_implementation=attention, embedding_size=16)
    x = X.clone().requires_grad_()
    whole = backbone(inputs_embeds=x, attention_mask=MASK)[0][:, :1]
    shortened = first_position_only(backbone)
    short = shortened(inputs_embeds=x, attention_mask=MASK)[0]
    close(short, whole)
    close(*[torch.autograd.grad(states.logsumexp(2).sum(), x)[0] for states in (short, whole)])
    assert backbone(inputs_embeds=x)[0].shape == x.shape
    shared = dict(shortened.named_parameters())
    assert all(shared[name] is weight for name, weight in backbone.named_parameters())


def test_other_backbones_come_back_as_they_are():
    """Catches: a layer that is built differently computed as BERT's are; trust in names alone."""
    broken = tiny()
    del broken.encoder.layer[-1].attention.self.query
    for backbone in (torch.nn.Linear(2, 2), tiny("distilbert"), tiny("xlm-roberta-xl"),
                     tiny("esm"), tiny("roberta-prelayernorm"), broken):
        assert first_position_only(backbone) is backbone


def test_the_shortened_last_layer_keeps_its_dropout():
    """Catches: attention dropout lost in training."""
    shortened = first_position_only(tiny(num_hidden_layers=1, hidden_dropout_prob=0.0))
    states = shortened(inputs_embeds=X)[0]
    assert not torch.equal(shortened.train()(inputs_embeds=X)[0], states)


# ---- CheapDropout --------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [0.1, 0.9])
def test_cheap_dropout_is_dropout(p):
    """Catches: another share or scale than p says, positions that are dropped more than others, one
    mask twice, a generator that torch's seed does not reset, dropout in evaluation."""
    x = torch.full((1_001, 333), 2.0)       # not a multiple of the four that are drawn at once
    with CheapDropout():
        torch.manual_seed(3)
        first, other = F.dropout(x, p), F.dropout(x, p)
        torch.manual_seed(3)
        assert torch.equal(F.dropout(x, p), first)
        assert torch.equal(F.dropout(x, p, training=False), x)
        assert not F.dropout(x, 1.0).any()
    kept = (first != 0).float()
    close(first, x * kept / (1 - p))
    assert not torch.equal(first, other)
    # six standard deviations of the share in a column, and in all
    assert (kept.mean(dim=0) - (1 - p)).abs().max() < 0.1
    assert abs(kept.mean() - (1 - p)) < 0.005


def test_it_reaches_the_dropout_of_a_backbone(monkeypatch):
    """Catches: a backbone whose dropout goes round it. Two layers have one after the embeddings and
    three in each layer."""
    seen = []
    noting = staticmethod(lambda x, p, **_: seen.append(p) or x)
    monkeypatch.setattr(CheapDropout, "dropout", noting)
    with CheapDropout():
        tiny(attn_implementation="eager").train()(inputs_embeds=X)
    assert seen == [0.1] * 7
