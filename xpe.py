"""Soft prompts for a frozen encoder: SPT, XPE and DUAL, the method of the paper in plain torch.

"Cross-Prompt Encoder for Low-Performing Languages", Findings of IJCNLP-AACL 2025, arXiv 2508.10352.
Copy this file: it needs torch alone, and as backbone any module with `get_input_embeddings()` that
takes `inputs_embeds` and `attention_mask`. A complete training step, with the paper's rates:

    backbone = AutoModel.from_pretrained("FacebookAI/xlm-roberta-large", add_pooling_layer=False)
    prompt = SoftPrompt(width=1024, ratio=1.0)      # ratio 0.0 is SPT, 1.0 is XPE, between: DUAL
    model = PromptedClassifier(backbone, prompt, ClassificationHead(1024, classes=7))
    model.train()       # also the backbone's dropout: from_pretrained leaves it switched off
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(      # standard rows need a hundred times the rate of the rest
        [dict(params=[p], lr=5e-3 if name.endswith("standard") else 5e-5) for name, p in trained])
    logits = model(input_ids, attention_mask)           # (B, 7)
    nn.functional.cross_entropy(logits, labels).backward()
    nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
    optimizer.step()    # moves 1,668,615 numbers of 560 million
    optimizer.zero_grad()

Letters: B texts of a batch, T tokens of a text, P rows of a prompt (virtual tokens), H width of the
backbone, D width inside the prompt's encoder, C classes, K prompts that share one backbone (a list
of prompts and heads; K = 1 is the paper's case). In an attention mask 1 is a token, 0 is padding.

Read downwards: encoders, SoftPrompt, ClassificationHead, PromptedClassifier.
"""
import copy

import torch
from torch import nn

KINDS = ("spt", "xpe", "dual", "head", "full")      # the methods: three prompts, two baselines
ENCODERS = ("mlp", "lstm", "attention", "none")
READS = ("prompt", "first", "mean", "last")         # what the classification head may look at


def check(condition, message):          # as in data.py: this file stands alone
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


# ---- Encoders: from an embedding to prompt rows, (B, P, H) -> (B, P, H) --------------------------
# Their parameters have the names that the authors' files give them.

def make_mlp(n_in, hidden, n_out, layers, dropout):
    """The paper's encoder: one MLP, shared by all virtual tokens; D is `hidden`.

    paper: Linear(H, D) ReLU Dropout, then (layers - 1) x [Linear(D, D) ReLU Dropout], then
    Linear(D, H). "2 layers" are therefore three Linears.
    """
    modules = []
    for _ in range(layers):
        modules += [nn.Linear(n_in, hidden), nn.ReLU(), nn.Dropout(dropout)]
        n_in = hidden
    return nn.Sequential(*modules, nn.Linear(hidden, n_out))


class LSTMEncoder(nn.Module):
    """authors' code: a bidirectional LSTM over the virtual tokens, then an MLP of one layer."""

    def __init__(self, width, hidden, layers, dropout):
        super().__init__()
        # torch warns of dropout in a single layer
        between_layers = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, hidden, layers, bidirectional=True, batch_first=True,
                            dropout=between_layers)
        self.mlp = make_mlp(2 * hidden, hidden, width, 1, dropout)

    def forward(self, x):
        # ours: always in float32, because not every device has an LSTM in half precision
        with torch.autocast(x.device.type, enabled=False):
            x, _ = self.lstm(x)     # (B, P, 2D)
        return self.mlp(x)          # (B, P, H)


class SelfAttentionBlock(nn.Module):
    """authors' code: post-norm multi-head self-attention over the virtual tokens, Linear(H, H)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        attended, _ = self.self_attn(x, x, x, need_weights=False)
        x = self.layernorm(x + self.dropout(attended))
        return self.out_proj(x)     # (B, P, H)


def make_encoder(kind, width, hidden, layers, dropout, heads):
    """The encoder of one of the ENCODERS; `none` uses the embedding as it is (a control)."""
    check(kind in ENCODERS, f"prompt.encoder {kind!r} must be one of {', '.join(ENCODERS)}")
    if kind == "mlp":
        return make_mlp(width, hidden, width, layers, dropout)
    if kind == "lstm":
        return LSTMEncoder(width, hidden, layers, dropout)
    if kind == "attention":
        check(heads and width % heads == 0, f"prompt.heads {heads} does not divide width {width}")
        # authors' code: the dropout of this MLP is 0.1, whatever the settings say
        mlp = make_mlp(width, hidden, width, 1, 0.1)
        return nn.Sequential(SelfAttentionBlock(width, heads, dropout), mlp)
    return nn.Identity()


# ---- The three prompts ---------------------------------------------------------------------------

class SoftPrompt(nn.Module):
    """`length` rows in front of a text: standard rows first, then encoded rows.

    ratio 0 is SPT (each row is itself a parameter), 1 is XPE (each row comes out of the encoder),
    between them DUAL. `hidden` is D, by default a quarter of the width. paper: 20 rows, D = 256 of
    H = 1024, 2 layers, dropout 0.1. Raises ValueError for sizes that do not make a prompt.
    """

    def __init__(self, width, length=20, ratio=1.0, encoder="mlp", hidden=0, layers=2, dropout=0.1,
                 heads=8):
        super().__init__()
        check(0 <= ratio <= 1, f"prompt.ratio must be from 0 (SPT) to 1 (XPE), not {ratio}")
        least = 1
        n_encoded = int(length * ratio)     # paper: of 20 rows 6 in DUAL-30 and 14 in DUAL-70
        if 0 < ratio < 1:
            least = 2                       # DUAL has rows of both kinds
            n_encoded = min(max(n_encoded, 1), length - 1)
        check(length >= least, f"prompt.length must be at least {least}, not {length}")
        check(1 <= layers <= 64, f"prompt.layers must be from 1 to 64, not {layers}")
        hidden = hidden or width // 4
        self.config = dict(width=width, length=length, ratio=ratio, encoder=encoder, hidden=hidden,
                           layers=layers, dropout=dropout, heads=heads)
        self.length = length

        # paper: the embeddings start from N(0, 1), torch.nn.Embedding's default
        self.standard = None
        self.encoded = None
        if n_encoded < length:
            self.standard = nn.Parameter(torch.randn(length - n_encoded, width))
        if n_encoded > 0:
            self.encoded = nn.Parameter(torch.randn(n_encoded, width))
            self.encoder = make_encoder(encoder, width, hidden, layers, dropout, heads)

    def forward(self, batch_size=1):
        """-> (B, P, H), the prompt of each text of a batch. They differ in training only."""
        parts = []
        if self.standard is not None:
            parts.append(self.standard.expand(batch_size, -1, -1))
        if self.encoded is not None:
            # authors' code: in training the encoder runs on the prompt expanded to the batch, so
            # that each text draws its own dropout mask. In evaluation once is enough
            copies = batch_size if self.training else 1
            rows = self.encoder(self.encoded.expand(copies, -1, -1))    # (copies, encoded rows, H)
            parts.append(rows.expand(batch_size, -1, -1))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def collapse(self):
        """The SPT with the same rows: at inference each of the three prompts is a matrix (P, H)."""
        rows = copy.deepcopy(self).eval()(1)[0]         # (P, H)
        collapsed = SoftPrompt(self.config["width"], self.length, ratio=0.0)
        collapsed.standard = nn.Parameter(rows)
        return collapsed


class ClassificationHead(nn.Module):
    """Dropout, Linear, tanh, dropout, Linear: (B, H) -> (B, C). XLM-R's own classification head.

    transformers starts it from N(0, 0.02) with zero biases; so does this one.
    """

    def __init__(self, width, classes, dropout=0.1):
        super().__init__()
        self.config = dict(width=width, classes=classes, dropout=dropout)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(width, classes)
        for layer in (self.dense, self.out_proj):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, h):
        h = torch.tanh(self.dense(self.dropout(h)))
        return self.out_proj(self.dropout(h))


# ---- Where the prompt goes, and what the head reads ----------------------------------------------

def widths(backbone):
    """(width of the word embeddings, width of the last hidden state): equal except in ELECTRA and
    the like."""
    embedding_width = backbone.get_input_embeddings().weight.shape[1]
    config = getattr(backbone, "config", None)
    return embedding_width, getattr(config, "hidden_size", embedding_width)


def positions(backbone):
    """How many positions a sequence may have. RoBERTa's count from after the padding index: its 514
    are 512. A model without a limit states none, or one below 1 (XLNet)."""
    config = getattr(backbone, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return 1 << 30
    embeddings = getattr(backbone, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding_index = getattr(table, "padding_idx", None)
    if padding_index is not None:
        limit -= padding_index + 1
    return limit


class PromptedClassifier(nn.Module):
    """A frozen backbone that reads a prompt in front of each text, and a head that classifies.

    `prompts` and `heads`: one of each, or lists of K, which share the backbone. `prompts=None` is
    the bare backbone, which full fine-tuning trains (with frozen=False). `reads` says what the head
    sees: `prompt` (paper: position 0, now the first prompt row and no longer `<s>`), `first` (the
    text's first token), `mean` (over the text's tokens), `last` (its last token, for decoders).
    Raises ValueError for heads that do not fit the backbone.
    """

    def __init__(self, backbone, prompts, heads, reads="prompt", frozen=True):
        super().__init__()
        if isinstance(prompts, SoftPrompt):
            prompts = [prompts]
        if isinstance(heads, ClassificationHead):
            heads = [heads]
        prompts = prompts or []
        check(reads in READS, f"prompt.reads {reads!r} must be one of {', '.join(READS)}")
        _, width = widths(backbone)
        for head in heads:
            check(head.config["width"] == width,
                  f"the head has width {head.config['width']}, the backbone {width}")
        self.backbone = backbone
        self.prompts = nn.ModuleList(prompts)
        self.heads = nn.ModuleList(heads)
        self.reads = reads
        self.prompt_length = prompts[0].length if prompts else 0
        if frozen:
            backbone.requires_grad_(False)

    def forward(self, input_ids, attention_mask, owner=None):
        """-> logits (B, C). input_ids, attention_mask: (B, T), padded on the right.

        With K prompts, texts come in K equal blocks, one for each prompt in turn, as in training;
        otherwise, as in evaluation, `owner` (B,), on the CPU, says which prompt (0 ... K - 1) each
        text uses.
        """
        B, T = input_ids.shape
        P = self.prompt_length
        K = len(self.heads)
        limit = positions(self.backbone)
        # on a GPU the backbone itself would only say "device-side assert"
        check(P + T <= limit, f"{P} prompt rows + {T} text tokens = {P + T} exceed the {limit} "
                              f"positions of the backbone: a text may have {limit - P} tokens")
        # Left padding would shift the positions of the text. Looked for on the CPU only: on a GPU
        # reading the mask would make every step wait.
        if attention_mask.device.type == "cpu":
            check(attention_mask[:, 0].all(),
                  "a text of this batch begins with padding: pad on the right")

        # Texts of one prompt must stand side by side: sizes[k] texts for prompt k.
        if owner is None:
            check(B % K == 0, f"{B} texts are not {K} equal blocks: say with `owner` which prompt "
                              f"each text uses")
            sizes = [B // K] * K
        else:
            order = owner.argsort(stable=True)
            input_ids, attention_mask = input_ids[order], attention_mask[order]
            sizes = owner.bincount(minlength=K).tolist()

        # Only the *word* embeddings are concatenated: the backbone itself adds position and type
        # embeddings, and its positions count from the first prompt row.
        x = self.backbone.get_input_embeddings()(input_ids)             # (B, T, H)
        if P:
            blocks = [prompt(n) for prompt, n in zip(self.prompts, sizes, strict=True)]
            x = torch.cat((torch.cat(blocks).to(x.dtype), x), dim=1)    # (B, P+T, H)
        mask = nn.functional.pad(attention_mask, (P, 0), value=1)       # (B, P+T)

        output = self.backbone(inputs_embeds=x, attention_mask=mask)
        h = output if torch.is_tensor(output) else output[0]            # (B, P+T, H)
        h = self.read(h, attention_mask)                                # (B, H)
        h = h.to(self.heads[0].dense.weight.dtype)

        # Each block through its own head, and back into the order of the batch.
        blocks = [head(own) for head, own in zip(self.heads, h.split(sizes), strict=True)]
        logits = torch.cat(blocks)                                      # (B, C)
        if owner is not None:
            logits = logits[order.argsort()]
        return logits

    def read(self, h, attention_mask):
        """What the head sees of the hidden states (B, P+T, H) -> (B, H)."""
        P = self.prompt_length
        if self.reads == "prompt":
            return h[:, 0]
        if self.reads == "first":
            return h[:, P]
        if self.reads == "last":
            last = P + attention_mask.sum(dim=1) - 1                    # (B,)
            return h[torch.arange(len(h), device=h.device), last]
        weights = attention_mask[:, :, None].float()    # in float32: bf16 cannot count beyond 256
        return (h[:, P:] * weights).sum(dim=1) / weights.sum(dim=1)
