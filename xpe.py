"""Soft prompts for a frozen encoder: SPT, XPE and DUAL, one prompt or K of them side by side.

The method of "Cross-Prompt Encoder for Low-Performing Languages" (IJCNLP-AACL Findings 2025, arXiv
2508.10352). This file needs torch alone and stands alone: copy it. Any module with `get_input_embeddings()`
that takes `inputs_embeds` and `attention_mask` can be the backbone.

    backbone = AutoModel.from_pretrained("FacebookAI/xlm-roberta-large")
    model = PromptedClassifier(backbone, SoftPrompt(1024, ratio=1.0), ClassificationHead(1024, 7))
    loss = F.cross_entropy(model(input_ids, attention_mask), labels)   # trains 1,668,615 of 560 million

Letters: B rows of a batch, T text tokens, P prompt rows, H backbone width, D encoder width, C classes, and K
prompts: every trainable tensor has a leading K, so that K prompts (ten seeds, say) train in one pass through
one backbone. K = 1 is the plain case. In an attention mask 1 is a token and 0 is padding.
"""
import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ENCODERS = ("mlp", "lstm", "attention", "none")
KINDS = ("spt", "xpe", "dual", "head", "full")
READS = ("prompt", "first", "mean", "last")
AS_BERT = ("bert", "camembert", "electra", "roberta", "xlm-roberta")


# ---- layers with a leading K -------------------------------------------------------------------------------

def _stackable(tensor):
    """A new parameter (1, ...): one slice of a stack of K."""
    return nn.Parameter(tensor.detach().clone()[None])


class Linears(nn.Module):
    """K linear layers side by side: (K, ..., in) -> (K, ..., out); torch's default initialisation."""

    def __init__(self, n_in, n_out):
        super().__init__()
        layer = nn.Linear(n_in, n_out)
        self.weight, self.bias = _stackable(layer.weight), _stackable(layer.bias)  # (K, out, in), (K, out)

    def forward(self, x):
        y = torch.baddbmm(self.bias[:, None].to(x.dtype), x.flatten(1, -2), self.weight.mT.to(x.dtype))
        return y.unflatten(1, x.shape[1:-1])


class Dropout(nn.Module):
    """Dropout over (K, ...). With `generators` (K of them) slice k draws from the k-th: a prompt that trains
    among others then sees the very masks that it would see alone."""

    def __init__(self, p):
        super().__init__()
        self.p, self.generators = p, None

    def forward(self, x):
        if not self.training or self.p == 0 or self.generators is None:
            return F.dropout(x, self.p, self.training)
        noise = [torch.rand(x.shape[1:], device=x.device, generator=g) for g in self.generators]
        return torch.where(torch.stack(noise) < self.p, 0, x / (1 - self.p))


# ---- the prompt encoders: (K, P, H) embeddings -> (K, rows, P, H) prompt rows ------------------------------

class MLP(nn.Module):
    """paper: Linear(H, D) ReLU Dropout, (layers - 1) x [Linear(D, D) ReLU Dropout], Linear(D, H), one MLP for
    all virtual tokens. "2 layers" are therefore three Linears."""

    def __init__(self, n_in, hidden, n_out, layers, dropout):
        super().__init__()
        sizes = [n_in] + [hidden] * layers + [n_out]
        self.linears = nn.ModuleList(Linears(a, b) for a, b in zip(sizes, sizes[1:]))
        self.dropout = Dropout(dropout)

    def forward(self, x, rows):
        # authors' code: the encoder runs on the prompt expanded to the batch, so each row has its own dropout
        # mask. ours: the first layer comes before any dropout, is the same for every row, and runs once.
        x = F.relu(self.linears[0](x))  # (K, P, D) or (K, rows, P, D)
        if x.dim() == 3:
            x = x[:, None].expand(-1, rows, -1, -1)  # (K, rows, P, D)
        for linear in self.linears[1:-1]:
            x = F.relu(linear(self.dropout(x)))
        return self.linears[-1](self.dropout(x))  # (K, rows, P, H)


class BiLSTM(nn.Module):
    """authors' code: a bidirectional LSTM over the virtual tokens, then Linear(2D, D) ReLU Dropout
    Linear(D, H)."""

    def __init__(self, n_in, hidden, n_out, layers, dropout):
        super().__init__()
        self.hidden, self.depth = hidden, layers
        for layer in range(layers):
            lstm = nn.LSTM(n_in if layer == 0 else 2 * hidden, hidden, bidirectional=True)
            for name, weight in lstm.named_parameters():
                self.register_parameter(name.replace("l0", f"l{layer}"), _stackable(weight))
        self.dropout, self.mlp = Dropout(dropout), MLP(2 * hidden, hidden, n_out, 1, dropout)

    def forward(self, x, rows):
        x = x[:, None].expand(-1, rows, -1, -1)  # (K, rows, P, H)
        zero = x.new_zeros(2, rows, self.hidden)
        for layer in range(self.depth):
            names = [f"{w}_l{layer}{d}" for d in ("", "_reverse")
                     for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            with torch.autocast(x.device.type, enabled=False):      # there is no half LSTM on every device
                x = torch.stack([torch.lstm(x[k], (zero, zero), [getattr(self, n)[k] for n in names],
                                            True, 1, 0.0, False, True, True)[0] for k in range(len(x))])
            x = self.dropout(x) if layer + 1 < self.depth else x  # (K, rows, P, 2D)
        return self.mlp(x, rows)


class SelfAttention(nn.Module):
    """authors' code: one post-norm self-attention block over the virtual tokens with an output Linear(H, H),
    then Linear(H, D) ReLU Dropout Linear(D, H); that inner dropout is 0.1 there whatever the settings say."""

    def __init__(self, n_in, hidden, n_out, heads, dropout):
        super().__init__()
        if heads < 1 or n_in % heads:
            raise ValueError(f"prompt.heads: {heads} attention heads do not divide a width of {n_in}")
        self.heads, attention = heads, nn.MultiheadAttention(n_in, heads)
        self.qkv, self.merge, self.project = (Linears(n_in, n * n_in) for n in (3, 1, 1))
        self.qkv.weight, self.qkv.bias = map(_stackable, (attention.in_proj_weight, attention.in_proj_bias))
        self.merge.weight, self.merge.bias = map(_stackable, attention.out_proj.parameters())
        self.norm_weight, self.norm_bias = _stackable(torch.ones(n_in)), _stackable(torch.zeros(n_in))
        self.dropout, self.mlp = Dropout(dropout), MLP(n_in, hidden, n_out, 1, 0.1)

    def forward(self, x, rows):
        x = x[:, None]  # (K, 1, P, H)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in self.qkv(x).chunk(3, -1))
        a = self.merge(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(-2))
        x = x + self.dropout(a.expand(-1, rows, -1, -1))  # (K, rows, P, H)
        x = F.layer_norm(x, x.shape[-1:])
        x = x * self.norm_weight[:, None, None] + self.norm_bias[:, None, None]
        return self.mlp(self.project(x), rows)


class NoEncoder(nn.Module):
    """The control: the encoded rows are used as they are."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, x, rows):
        return x[:, None].expand(-1, rows, -1, -1)


# ---- the method --------------------------------------------------------------------------------------------

class SoftPrompt(nn.Module):
    """`length` prompt rows of a backbone `width` wide: standard rows first, then encoded rows.

    ratio 0 is SPT (every row is itself the parameter), 1 is XPE (every row comes out of the encoder), in
    between is DUAL: int(length x ratio) rows, at least 1 and at most length - 1, are encoded. `hidden` is D,
    by default width / 4 (paper: 256 of 1024). paper: all embeddings start from N(0, 1). Raises ValueError for
    impossible sizes.
    """

    def __init__(self, width, length=20, ratio=1.0, encoder="mlp", hidden=0, layers=2, dropout=0.1, heads=8):
        super().__init__()
        if not 0 <= ratio <= 1:
            raise ValueError(f"prompt.ratio: {ratio} is not a share between 0 (SPT) and 1 (XPE)")
        least = 1 if ratio in (0, 1) else 2
        if length < least or min(width, layers, hidden + 1) < 1 or not 0 <= dropout < 1:
            raise ValueError(f"prompt: impossible sizes: length {length}, ratio {ratio}, width {width}, "
                             f"hidden {hidden}, layers {layers}, dropout {dropout}")
        if encoder not in ENCODERS:
            raise ValueError(f"prompt.encoder: {encoder!r} is none of {', '.join(ENCODERS)}")
        hidden = hidden or max(1, width // 4)
        self.config = dict(width=width, length=length, ratio=ratio, encoder=encoder, hidden=hidden,
                           layers=layers, dropout=dropout, heads=heads)
        self.length = length    # P, the number of prompt rows
        encoded = int(length * ratio) if ratio in (0, 1) else max(1, min(length - 1, int(length * ratio)))
        self.standard = nn.Parameter(torch.randn(1, length - encoded, width)) if encoded < length else None
        self.encoded = nn.Parameter(torch.randn(1, encoded, width)) if encoded else None
        if encoded:
            kind = dict(mlp=MLP, lstm=BiLSTM, attention=SelfAttention, none=NoEncoder)[encoder]
            self.encoder = kind(width, hidden, width, heads if encoder == "attention" else layers, dropout)

    def forward(self, rows=1):
        """-> (K, rows, P, H): each of K prompts, for `rows` rows of a batch. While training every row has its
        own dropout mask; in evaluation all are equal and the encoder runs once."""
        parts = [] if self.standard is None else [self.standard[:, None]]
        if self.encoded is not None:
            random = self.training and any(m.p for m in self.modules() if isinstance(m, Dropout))
            parts.append(self.encoder(self.encoded, rows if random else 1))
        return torch.cat([part.expand(-1, rows, -1, -1) for part in parts], 2)

    @torch.no_grad()
    def collapse(self):
        """The SPT with the same rows: at inference any of the three prompts is just a matrix (P, H)."""
        out = SoftPrompt(self.config["width"], self.length, ratio=0.0)
        training, out.standard.data = self.training, self.eval()()[:, 0].clone()
        self.train(training)
        return out


class ClassificationHead(nn.Module):
    """Dropout, Linear, tanh, dropout, Linear: (K, N, H) -> (K, N, C). XLM-R's own head, and the same function
    as BERT's pooler and classifier. transformers starts it from N(0, 0.02) with zero biases; so does this."""

    def __init__(self, width, classes, dropout=0.1):
        super().__init__()
        self.config = dict(width=width, classes=classes, dropout=dropout)
        self.dense, self.out, self.dropout = Linears(width, width), Linears(width, classes), Dropout(dropout)
        for layer in (self.dense, self.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.out(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


class PromptedClassifier(nn.Module):
    """A frozen backbone that reads K prompts with K heads; which of them a row uses is its `owner`.

    `prompt` None is the bare backbone (what `full` fine-tunes). `reads` says what the head sees: `prompt`
    (paper: position 0, which is now the first prompt row), `first` (the text's first token), `mean` (over the
    text's tokens) or `last` (its last token, for decoders). `frozen=False` leaves the backbone trainable.
    """

    def __init__(self, backbone, prompt, head, reads="prompt", frozen=True):
        super().__init__()
        if reads not in READS:
            raise ValueError(f"prompt.reads: {reads!r} is none of {', '.join(READS)}")
        want = widths(backbone)
        have = (prompt.config["width"] if prompt is not None else want[0], head.config["width"])
        if have != want:
            raise ValueError(f"prompt and head of width {have[0]} and {have[1]} do not fit a backbone with "
                             f"embeddings and states of width {want[0]} and {want[1]}")
        self.backbone, self.prompt, self.head, self.reads = backbone, prompt, head, reads
        if frozen:
            backbone.requires_grad_(False)
        self.positions = positions(backbone)

    def forward(self, input_ids, attention_mask, owner=None):
        """-> logits (B, C). input_ids, attention_mask (B, T), padded on the right; owner (B,): which prompt
        each row uses, by default K equal blocks of rows, one block for each prompt in turn."""
        (B, T), K = input_ids.shape, len(self.head.out.weight)
        P = self.check_length(T)
        if owner is None and B % K:
            raise ValueError(f"{B} rows are no {K} equal blocks: say with `owner` which prompt each row uses")
        rows, slot = B // K, slice(None)    # row i of the batch is row i of the K x rows blocks
        if owner is not None:               # row i is the n-th row of its owner: owner * rows + n
            owner = owner.to(input_ids.device)
            nth = F.one_hot(owner, K).cumsum(0).gather(1, owner[:, None])[:, 0] - 1
            rows = int(nth.max()) + 1
            slot = owner * rows + nth  # (B,)

        # Only the *word* embeddings are concatenated: the backbone adds position and type embeddings, and
        # positions count from the first prompt row.
        x = self.backbone.get_input_embeddings()(input_ids)  # (B, T, H)
        if P:
            once = owner is not None and not self.training
            p = self.prompt()[owner, 0] if once else self.prompt(rows).flatten(0, 1)[slot]  # (B, P, H)
            x = torch.cat((p.to(x.dtype), x), 1)  # (B, P+T, H)
        mask = torch.cat((attention_mask.new_ones(B, P), attention_mask), 1)  # (B, P+T)
        with self._only_row_0(P):
            h = self.backbone(inputs_embeds=x, attention_mask=mask)  # (B, P+T, H), or (B, 1, H)
        h = h if torch.is_tensor(h) else h[0]
        if self.reads == "mean":
            text = attention_mask[:, :, None].to(h.dtype)
            h = (h[:, P:] * text).sum(1) / text.sum(1)  # (B, H)
        elif self.reads == "last":
            h = h[torch.arange(B, device=h.device), P + attention_mask.sum(1) - 1]  # (B, H)
        else:
            h = h[:, P if self.reads == "first" else 0]  # (B, H)
        h = h.to(self.head.dense.weight.dtype)
        if owner is not None:
            h = h.new_zeros(K * rows, h.shape[1]).index_copy(0, slot, h)
        return self.head(h.unflatten(0, (K, rows))).flatten(0, 1)[slot]  # (B, C)

    @contextmanager
    def _only_row_0(self, P):
        """ours: a head that reads row 0 needs of the last layer just that row, which looks at all others: the
        same numbers for less work. In encoders that are built as BERT is; elsewhere nothing changes."""
        config = getattr(self.backbone, "config", None)
        if (getattr(config, "model_type", "") not in AS_BERT or self.reads != "prompt" and (self.reads, P) !=
                ("first", 0) or getattr(config, "position_embedding_type", "absolute") != "absolute"):
            yield
            return
        attention = self.backbone.encoder.layer[-1].attention
        attention.forward = lambda x, mask=None, *_, **__: (_attend_from_row_0(attention, x, mask), None)
        try:
            yield
        finally:
            del attention.forward       # the class's own is in force again

    def check_length(self, T):
        """-> P. ValueError if texts of T tokens do not fit behind the prompt: on a GPU the backbone itself
        would only say "device-side assert"."""
        P, limit = 0 if self.prompt is None else self.prompt.length, self.positions
        if P + T > limit:
            raise ValueError(f"{P} prompt rows + {T} text tokens = {P + T} exceed the {limit} positions of "
                             f"the backbone: data.max_length can be {limit - P} at most")
        return P

    def set_generators(self, generators):
        """Let slice k of each dropout in prompts and heads draw from generators[k] (None: the global one)."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generators = generators


def _attend_from_row_0(attention, x, mask):
    """BERT's attention block with row 0 as the only query: x (B, N, H) -> (B, 1, H)."""
    own = attention.self
    q, k, v = (f(y).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)        # (B, heads, 1 or N, .)
               for f, y in ((own.query, x[:, :1]), (own.key, x), (own.value, x)))
    mask = None if mask is None else mask[:, :, :1]     # (B, 1, 1, N)
    a = F.scaled_dot_product_attention(q, k, v, mask, own.dropout.p if own.training else 0.0)
    return attention.output(a.transpose(1, 2).flatten(2), x[:, :1])


def widths(backbone):
    """(width of the word embeddings, width of the last hidden state): equal but in ELECTRA and the like."""
    h_in = backbone.get_input_embeddings().weight.shape[1]
    return h_in, getattr(getattr(backbone, "config", None), "hidden_size", h_in)


def positions(backbone):
    """How many positions a sequence may have; RoBERTa counts from after the padding index (514 are 512)."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    limit = getattr(getattr(backbone, "config", None), "max_position_embeddings", None) or 1 << 30
    return limit if offset is None else limit - offset - 1


def stack(modules):
    """K prompts (or heads) of one shape -> one module that holds them all: (K, ...) in every parameter."""
    first = modules[0]
    if any(m.config != first.config for m in modules):
        raise ValueError("only prompts and heads of one configuration can be stacked")
    tensors = [dict(m.named_parameters()) for m in modules]
    for name, p in first.named_parameters():
        p.data = torch.cat([t[name].data for t in tensors])
    return first


def take(module, k):
    """The tensors of slice k, without the leading K: name -> tensor on the CPU."""
    return {name: p.detach()[k].float().cpu().clone() for name, p in module.named_parameters()}


def put(module, tensors):
    """Fill a module of K = 1 from `take`'s tensors; ValueError on a missing, foreign or misshaped one."""
    want = dict(module.named_parameters())
    if want.keys() != tensors.keys():
        name = min(want.keys() ^ tensors.keys())
        raise ValueError(f"{'lacks the' if name in want else 'has the unknown'} tensor {name!r}")
    for name, p in want.items():
        tensor = tensors[name]
        if tensor.shape != p.shape[1:]:
            raise ValueError(f"tensor {name!r} is {tuple(tensor.shape)}, expected {tuple(p.shape[1:])}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"tensor {name!r} holds something other than finite numbers")
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, _stackable(tensor.float()))
    return module


# ---- one folder for a prompt: prompt.safetensors (the trainable tensors) and prompt.json (how to use them) -

def write_atomic(path, data):
    """Write bytes (or call data(file)) so that `path` is the old file or the whole new one, come what may."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            data(f) if callable(data) else f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as e:
        Path(temporary).unlink(missing_ok=True)
        why = e.__context__ if isinstance(e, RuntimeError) else e      # torch.save hides a full disk in one
        if isinstance(why, OSError):
            raise OSError(why.errno, why.strerror, str(path)) from None
        raise


def save_prompt(folder, prompt_tensors, head_tensors, meta):
    """Write `take`'s tensors and `meta` (see `load_prompt`) to a folder that exists. No pickle anywhere."""
    from safetensors.torch import save
    tensors = {f"prompt.{n}": t.contiguous() for n, t in prompt_tensors.items()}
    tensors |= {f"head.{n}": t.contiguous() for n, t in head_tensors.items()}
    write_atomic(Path(folder) / "prompt.safetensors", save(tensors, {"format": "pt"}))
    text = json.dumps({"format": 1, **meta}, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(Path(folder) / "prompt.json", text.encode() + b"\n")


def read_json(path):
    """A JSON object from a file of at most 4 MB; ValueError with the path for anything else."""
    try:
        if os.path.getsize(path) > 4 << 20:
            raise ValueError("is larger than 4 MB")
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value


def read_tensors(path):
    """The tensors of a .safetensors file; ValueError with the path if it is truncated or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load
    try:
        return load(Path(path).read_bytes())
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as e:
        raise ValueError(f"{path}: no whole safetensors file: {str(e).splitlines()[0]}") from None


SIZES = {"prompt": dict(width=int, length=int, ratio=float, encoder=str, hidden=int, layers=int,
                        dropout=float, heads=int),
         "head": dict(width=int, classes=int, dropout=float)}


def restore(path, meta, tensors):
    """(SoftPrompt or None, ClassificationHead) of the sizes in meta, filled from tensors named prompt.* and
    head.*; ValueError with the path if anything is missing, impossible or does not fit exactly."""
    try:
        sizes = {}
        for section, schema in SIZES.items():
            value = sizes[section] = meta.get(section)
            if section == "prompt" and value is None:
                continue
            if not isinstance(value, dict) or value.keys() != schema.keys():
                raise ValueError(f"{section!r} must hold {', '.join(schema)}")
            for key, kind in schema.items():
                limit = 1 if kind is float else 64 if key == "layers" else 1 << 16
                fits = type(value[key]) in ((int, float) if kind is float else (kind,))
                if not fits or (kind is not str and not 0 <= value[key] <= limit):
                    raise ValueError(f"{section}.{key} cannot be {value[key]!r}")
        with torch.device("meta"):      # takes no memory: the file must show tensors of these shapes first
            both = nn.ModuleDict({"head": ClassificationHead(**sizes["head"])})
            if sizes["prompt"]:
                both["prompt"] = SoftPrompt(**sizes["prompt"])
        put(both, tensors)
    except (ValueError, RuntimeError, ZeroDivisionError) as e:
        raise ValueError(f"{path}: {e}") from None
    return both["prompt"] if sizes["prompt"] else None, both["head"]


def load_prompt(folder):
    """Read a prompt folder -> (SoftPrompt or None, ClassificationHead, meta).

    meta: kind, prompt, head (constructor arguments), reads, backbone {name, revision}, labels, max_length,
    tokenizer (fingerprint), data, training. Reads the authors' PEFT folders too. Raises FileNotFoundError or
    ValueError, naming the file and what is wrong with it; keys and shapes must fit exactly.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file() and not (folder / "prompt.json").is_file():
        return load_authors(folder)
    path = folder / "prompt.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no prompt.json (a run that has not finished? train.py --resume)")
    meta = read_json(path)
    backbone, labels, length = meta.get("backbone"), meta.get("labels"), meta.get("max_length")
    names = [backbone.get("name"), backbone.get("revision")] if isinstance(backbone, dict) else [None]
    for fits, what in (
            (meta.get("format") == 1, "format"), (meta.get("kind") in KINDS, "kind"),
            (all(isinstance(x, str) for x in names), "backbone {name, revision}"),
            (isinstance(labels, list) and all(isinstance(x, str) for x in labels)
             and len(set(labels)) == len(labels), "labels"),
            (meta.get("reads") in READS, "reads"), (isinstance(meta.get("training"), dict), "training"),
            (type(length) is int and 1 < length < 1 << 20, "max_length")):
        if not fits:
            raise ValueError(f"{path}: {what}: missing, or not as this project's format 1 has it")
    prompt, head = restore(path, meta, read_tensors(folder / "prompt.safetensors"))
    if len(labels) != head.config["classes"]:
        raise ValueError(f"{path}: {len(labels)} labels for a head of {head.config['classes']} classes")
    return prompt, head, meta


# ---- other people's formats --------------------------------------------------------------------------------

AUTHORS_ENCODERS = {"MLP": "mlp", "LSTM": "lstm", "ATTN": "attention", "NONE": "none"}
AUTHORS_NAMES = (       # theirs -> ours, in this order
    (r"^base_model\.(?:model\.)?classifier\.dense\.", "head.dense."),
    (r"^base_model\.(?:model\.)?classifier\.out_proj\.", "head.out."),
    (r"^prompt_encoder\.(?:default\.)?", "prompt."),
    (r"^prompt\.embedding\.weight$", "prompt.standard"),
    (r"^prompt\.xpe_embedding\.weight$", "prompt.encoded"),
    (r"^prompt\.xpe_head\.0\.self_attn\.in_proj_", "prompt.encoder.qkv."),
    (r"^prompt\.xpe_head\.0\.self_attn\.out_proj\.", "prompt.encoder.merge."),
    (r"^prompt\.xpe_head\.0\.out_proj\.", "prompt.encoder.project."),
    (r"^prompt\.xpe_head\.0\.layernorm\.", "prompt.encoder.norm_"),
    (r"^prompt\.xpe_head\.lstm\.", "prompt.encoder."),
    (r"^prompt\.xpe_head\.(?:mlp|1)\.(\d+)\.", r"prompt.encoder.mlp.linears.\1."),
    (r"^prompt\.xpe_head\.(\d+)\.", r"prompt.encoder.linears.\1."))


def load_authors(folder):
    """Read a prompt that the authors released, or their toolkit wrote, without peft; as `load_prompt`.

    In paper-era XPE files the name prompt_encoder.embedding.weight holds the *encoded* rows' embedding; later
    files call it xpe_embedding. Their Linears stand at 0, 3, 6 of a Sequential.
    """
    path = Path(folder) / "adapter_config.json"
    theirs = read_json(path)
    if theirs.get("peft_type") not in ("XPE", "P_TUNING") or "encoder_ratio" not in theirs:
        raise ValueError(f"{path}: not by the authors' toolkit: peft_type {theirs.get('peft_type')!r}")
    tensors = {}
    for name, tensor in read_tensors(Path(folder) / "adapter_model.safetensors").items():
        new = name
        for pattern, replacement in AUTHORS_NAMES:
            new = re.sub(pattern, replacement, new)
        linear = re.search(r"linears\.(\d{1,3})\.", new)
        if linear:                                                                  # 0, 3, 6 -> 0, 1, 2
            new = new.replace(linear[0], f"linears.{int(linear[1]) // 3}.")
        tensors[new] = tensor
    ratio, bare = theirs["encoder_ratio"], theirs.get("encoder_reparameterization_type")
    if ratio == 1 and "prompt.standard" in tensors and "prompt.encoded" not in tensors:
        tensors["prompt.encoded"] = tensors.pop("prompt.standard")
    out = tensors.get("head.out.weight")
    if out is None or out.dim() != 2:
        raise ValueError(f"{folder}: adapter_model.safetensors holds no head (base_model.classifier)")
    classes, width = out.shape
    meta = {"kind": "spt" if ratio == 0 else "xpe" if ratio == 1 else "dual", "reads": "prompt",
            "prompt": dict(width=theirs.get("token_dim") or width, length=theirs.get("num_virtual_tokens"),
                           ratio=ratio, encoder=AUTHORS_ENCODERS.get(str(bare), str(bare)),
                           hidden=theirs.get("encoder_hidden_size"),
                           heads=theirs.get("encoder_num_heads") or 8,
                           layers=theirs.get("encoder_num_layers") or 2,
                           dropout=theirs.get("encoder_dropout") or 0.0),
            "head": dict(width=width, classes=classes, dropout=0.1), "max_length": 164,
            "backbone": {"name": str(theirs.get("base_model_name_or_path")), "revision": "main"},
            "training": {}}
    prompt, head = restore(path, meta, tensors)
    meta["labels"] = [str(i) for i in range(classes)]       # their files name no labels
    return prompt, head, meta


def export_peft(folder, prompt, head, meta):
    """Write a folder that *stock* peft loads as prompt tuning (PeftModel.from_pretrained on an
    AutoModelForSequenceClassification); only for heads that read the prompt's first row, as XLM-R's own does.

    Raises ValueError for other heads, FileExistsError for a folder that is not empty.
    """
    from safetensors.torch import save
    if prompt is None or meta["reads"] != "prompt":
        raise ValueError(f"peft has no form for a {meta['kind']!r} run whose head reads {meta['reads']!r}")
    matrix = prompt.collapse().standard[0]  # (P, H)
    tensors = {"base_model.classifier." + name.replace("out.", "out_proj."): p[0]
               for name, p in head.named_parameters()} | {"prompt_embeddings": matrix}
    config = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "prompt_tuning_init": "RANDOM",
              "num_virtual_tokens": prompt.length, "token_dim": matrix.shape[1],
              "num_transformer_submodules": 1, "base_model_name_or_path": meta["backbone"]["name"],
              "modules_to_save": ["classifier"], "inference_mode": True}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; name a new folder")
    tensors = {n: t.detach().float().cpu().contiguous() for n, t in tensors.items()}
    write_atomic(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=1).encode() + b"\n")
