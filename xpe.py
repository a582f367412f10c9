"""Soft prompts for a frozen encoder: SPT, XPE and DUAL, one prompt or K of them side by side.

The method of "Cross-Prompt Encoder for Low-Performing Languages" (IJCNLP-AACL Findings 2025, arXiv
2508.10352). Copy this file: it needs torch alone, and as backbone any module with `get_input_embeddings()`
that takes `inputs_embeds` and `attention_mask`.

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
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ENCODERS = ("mlp", "lstm", "attention", "none")
KINDS = ("spt", "xpe", "dual", "head", "full")
READS = ("prompt", "first", "mean", "last")
AS_BERT = ("bert", "camembert", "electra", "roberta", "xlm-roberta")     # model types: see only_row_0
# What a constructor, or a file from elsewhere, may say; the other values are shares, checked where used
SIZE = range(1, 1 << 16)
ALLOWED = dict(width=SIZE, length=SIZE, classes=SIZE, hidden=range(1 << 16), heads=range(1 << 16),
               layers=range(1, 65), encoder=ENCODERS, kind=KINDS, reads=READS, max_length=range(2, 1 << 20))


def check(section, values):
    """ValueError for the first of the named `values` that is not ALLOWED."""
    for name, value in values.items():
        if isinstance(value, bool) or value not in ALLOWED.get(name, [value]):
            raise ValueError(f"{section}{name} cannot be {value!r}, only {ALLOWED.get(name, 'a share')}")


def _stackable(tensor):
    """A new parameter (1, ...): one slice of a stack of K."""
    return nn.Parameter(tensor.detach()[None])


class Linears(nn.Module):
    """K linear layers side by side: (K, ..., in) -> (K, ..., out); torch's default initialisation."""

    def __init__(self, n_in, n_out):
        super().__init__()
        layer = nn.Linear(n_in, n_out)
        self.weight, self.bias = _stackable(layer.weight), _stackable(layer.bias)  # (K, out, in), (K, out)

    def forward(self, x):
        y = torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight.mT)
        return y.unflatten(1, x.shape[1:-1])


class Dropout(nn.Module):
    """Dropout over (K, ...). With `generators` (K of them) slice k draws from the k-th: a prompt that trains
    among others then sees the very masks that it would see alone."""

    def __init__(self, p):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout cannot be {p}, only a share below 1")
        self.p, self.generators = p, None

    def forward(self, x):
        if not self.training or self.p == 0 or self.generators is None:
            return F.dropout(x, self.p, self.training)
        noise = [torch.rand(x.shape[1:], device=x.device, generator=g) for g in self.generators]
        return torch.where(torch.stack(noise) < self.p, 0, x / (1 - self.p))


class MLP(nn.Module):
    """paper: Linear(H, D) ReLU Dropout, (layers - 1) x [Linear(D, D) ReLU Dropout], Linear(D, H), one MLP for
    all virtual tokens. "2 layers" are therefore three Linears. Encoders: (K, 1, P, H) -> (K, rows, P, H)."""

    def __init__(self, n_in, hidden, n_out, layers, dropout):
        super().__init__()
        sizes = [n_in] + [hidden] * layers + [n_out]
        self.linears = nn.ModuleList(Linears(a, b) for a, b in zip(sizes, sizes[1:]))
        self.dropout = Dropout(dropout)

    def forward(self, x, rows):
        # authors' code: it runs on the prompt expanded to the batch, so each row has its own dropout mask.
        # ours: the first layer comes before any dropout, is the same for every row, and runs once.
        x = F.relu(self.linears[0](x)).expand(-1, rows, -1, -1)  # (K, rows, P, D)
        for linear in self.linears[1:-1]:
            x = F.relu(linear(self.dropout(x)))
        return self.linears[-1](self.dropout(x))  # (K, rows, P, H)


class BiLSTM(nn.Module):
    """authors' code: a bidirectional LSTM over the rows, then Linear(2D, D) ReLU Dropout Linear(D, H)."""

    def __init__(self, n_in, hidden, n_out, layers, dropout):
        super().__init__()
        for name, weight in nn.LSTM(n_in, hidden, layers, bidirectional=True).named_parameters():
            self.register_parameter(name, _stackable(weight))       # 8 for each layer
        self.hidden, self.dropout = hidden, Dropout(dropout)
        self.mlp = MLP(2 * hidden, hidden, n_out, 1, dropout)

    def forward(self, x, rows):
        x, zero = x.expand(-1, rows, -1, -1), x.new_zeros(2, rows, self.hidden)
        weights = list(self.parameters(recurse=False))
        for i in range(0, len(weights), 8):
            x = self.dropout(x) if i else x  # (K, rows, P, H or 2D)
            with torch.autocast(x.device.type, enabled=False):      # there is no half LSTM on every device
                x = torch.stack([torch.lstm(x[k], (zero, zero), [w[k] for w in weights[i:i + 8]], True, 1,
                                            0.0, self.training, True, True)[0] for k in range(len(x))])
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
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in self.qkv(x).chunk(3, -1))
        a = self.merge(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(-2))  # (K, 1, P, H)
        x = F.layer_norm(x + self.dropout(a.expand(-1, rows, -1, -1)), x.shape[-1:])  # (K, rows, P, H)
        x = x * self.norm_weight[:, None, None] + self.norm_bias[:, None, None]
        return self.mlp(self.project(x), rows)


class SoftPrompt(nn.Module):
    """`length` prompt rows of a backbone `width` wide: standard rows first, then encoded rows.

    ratio 0 is SPT (every row is itself the parameter), 1 is XPE (every row comes out of the encoder), between
    them DUAL: int(length x ratio) rows, at least 1 and at most length - 1, are encoded. `hidden` is D, by
    default width / 4. paper: 256 of 1024; embeddings start from N(0, 1). ValueError for impossible sizes.
    """

    def __init__(self, width, length=20, ratio=1.0, encoder="mlp", hidden=0, layers=2, dropout=0.1, heads=8):
        super().__init__()
        self.config = dict(width=width, length=length, ratio=ratio, encoder=encoder, hidden=hidden,
                           layers=layers, dropout=dropout, heads=heads)
        check("prompt.", self.config)
        if not 0 <= ratio <= 1 or 0 < ratio < 1 == length:
            raise ValueError(f"prompt.ratio: {ratio} of {length} rows is no share from 0 (SPT) to 1 (XPE)")
        self.config["hidden"] = hidden = hidden or max(1, width // 4)
        self.length = length    # P, the number of prompt rows
        encoded = int(length * ratio) if ratio in (0, 1) else max(1, min(length - 1, int(length * ratio)))
        self.standard = nn.Parameter(torch.randn(1, length - encoded, width)) if encoded < length else None
        self.encoded = nn.Parameter(torch.randn(1, encoded, width)) if encoded else None
        self.encoder = None
        if encoded and encoder != "none":       # none, the control: the encoded rows are used as they are
            kind = dict(mlp=MLP, lstm=BiLSTM, attention=SelfAttention)[encoder]
            self.encoder = kind(width, hidden, width, heads if encoder == "attention" else layers, dropout)

    def forward(self, rows=1):
        """-> (K, rows, P, H): each of K prompts, for `rows` rows of a batch. While training every row has its
        own dropout mask; in evaluation all are equal and the encoder runs once."""
        random = self.training and any(m.p for m in self.modules() if isinstance(m, Dropout))
        own = rows if random else 1
        parts = [p[:, None] for p in (self.standard, self.encoded) if p is not None]  # (K, 1, ., H)
        if self.encoder is not None:
            parts[-1] = self.encoder(parts[-1], own)
        return torch.cat([p.expand(-1, own, -1, -1) for p in parts], 2).expand(-1, rows, -1, -1)

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
        check("head.", self.config)
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
        check("prompt.", {"reads": reads})
        want = widths(backbone)
        have = (prompt.config["width"] if prompt is not None else want[0], head.config["width"])
        if have != want:
            raise ValueError(f"prompt and head of width {have[0]} and {have[1]} do not fit a backbone with "
                             f"embeddings and states of width {want[0]} and {want[1]}")
        self.backbone, self.prompt, self.head, self.reads = backbone, prompt, head, reads
        if frozen:
            backbone.requires_grad_(False)

    def forward(self, input_ids, attention_mask, owner=None):
        """-> logits (B, C). input_ids, attention_mask (B, T), padded on the right; owner (B,): which prompt
        each row uses, by default K equal blocks of rows, one block for each prompt in turn."""
        (B, T), K = input_ids.shape, len(self.head.out.weight)
        P = self.check_length(T)
        if owner is None and B % K:
            raise ValueError(f"{B} rows are no {K} equal blocks: say with `owner` which prompt each row uses")
        rows, mine = B // K, None
        if owner is not None:       # row i is the nth row of its owner; on the CPU, where nothing must wait
            nth = F.one_hot(owner.cpu(), K).cumsum(0).gather(1, owner.cpu()[:, None])[:, 0] - 1  # (B,)
            rows, mine = int(nth.max()) + 1, (owner.to(input_ids.device), nth.to(input_ids.device))

        def in_order(x):            # (K, rows, ...) -> (B, ...), as the rows of the batch stand
            return x.flatten(0, 1) if mine is None else x[mine]

        # Only the *word* embeddings are concatenated: the backbone adds position and type embeddings, and
        # positions count from the first prompt row.
        x = self.backbone.get_input_embeddings()(input_ids)  # (B, T, H)
        if P:
            x = torch.cat((in_order(self.prompt(rows)).to(x.dtype), x), 1)  # (B, P+T, H)
        mask = torch.cat((attention_mask.new_ones(B, P), attention_mask), 1)  # (B, P+T)
        row = {"prompt": 0, "first": P}.get(self.reads)
        with only_row_0(self.backbone, row == 0):
            h = self.backbone(inputs_embeds=x, attention_mask=mask)  # (B, P+T, H), or (B, 1, H)
        h = h if torch.is_tensor(h) else h[0]
        if self.reads == "mean":        # in float32: bf16 cannot count beyond 256
            text = attention_mask[:, :, None].float()
            h = (h[:, P:] * text).sum(1) / text.sum(1)  # (B, H)
        elif self.reads == "last":
            h = h[torch.arange(B, device=h.device), P + attention_mask.sum(1) - 1]  # (B, H)
        else:
            h = h[:, row]  # (B, H)
        h = h.to(self.head.dense.weight.dtype)
        h = h.view(K, rows, -1) if mine is None else h.new_zeros(K, rows, h.shape[1]).index_put(mine, h)
        return in_order(self.head(h))  # (B, C)

    def check_length(self, T):
        """-> P. ValueError if texts of T tokens do not fit behind the prompt: on a GPU the backbone itself
        would only say "device-side assert"."""
        P, limit = 0 if self.prompt is None else self.prompt.length, positions(self.backbone)
        if P + T > limit:
            raise ValueError(f"{P} prompt rows + {T} text tokens = {P + T} exceed the {limit} positions of "
                             f"the backbone: data.max_length can be {limit - P} at most")
        return P

    def set_generators(self, generators):
        """Let slice k of each dropout in prompts and heads draw from generators[k] (None: the global one)."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generators = generators


@contextmanager
def only_row_0(backbone, wanted=True):
    """ours: a head that reads row 0 needs of the last layer just that row, which looks at all others: the
    same numbers for less work. In encoders that are built as BERT is; elsewhere nothing changes."""
    config = getattr(backbone, "config", None)
    wanted = (wanted and getattr(config, "model_type", "") in AS_BERT
              and not getattr(config, "is_decoder", False)
              and getattr(config, "_attn_implementation", "") in ("eager", "sdpa")
              and getattr(config, "position_embedding_type", "absolute") == "absolute")
    parts = (backbone.encoder, backbone.encoder.layer[-1]) if wanted else ()
    # gradient checkpointing runs layers a second time, in the backward pass
    if not parts or any(getattr(part, "gradient_checkpointing", False) for part in parts):
        yield
        return
    attention = parts[-1].attention
    own = attention.self

    def forward(x, mask=None, *_, **__):
        q, k, v = (project(rows).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
                   for project, rows in ((own.query, x[:, :1]), (own.key, x), (own.value, x)))
        mask = None if mask is None else mask[:, :, :1]     # (B, 1, 1, N)
        a = F.scaled_dot_product_attention(q, k, v, mask, own.dropout.p if own.training else 0.0)
        return attention.output(a.transpose(1, 2).flatten(2), x[:, :1]), None  # (B, 1, H)

    attention.forward = forward
    try:
        yield
    finally:
        del attention.forward       # the class's own is in force again


def widths(backbone):
    """(width of the word embeddings, width of the last hidden state): equal but in ELECTRA and the like."""
    h_in = backbone.get_input_embeddings().weight.shape[1]
    return h_in, getattr(getattr(backbone, "config", None), "hidden_size", h_in)


def positions(backbone):
    """How many positions a sequence may have; RoBERTa counts from after the padding index (514 are 512)."""
    limit = getattr(getattr(backbone, "config", None), "max_position_embeddings", None) or 1 << 30
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return limit if offset is None else limit - offset - 1


def stack(modules):
    """K prompts (or heads) of one shape -> the first, which now holds them all: (K, ...) everywhere."""
    first = modules[0]
    if any(m.config != first.config for m in modules):
        raise ValueError("only prompts and heads of one configuration can be stacked")
    for name, p in first.named_parameters():
        p.data = torch.cat([m.get_parameter(name).data for m in modules])
    return first


def take(module, k):
    """The tensors of slice k, without the leading K: name -> tensor on the CPU."""
    return {name: p.detach()[k].float().cpu().clone() for name, p in module.named_parameters()}


def put(module, tensors):
    """Fill a module of K = 1 from `take`'s tensors; ValueError on a missing, foreign or misshaped one."""
    want = {name: p.shape[1:] for name, p in module.named_parameters()}
    if want.keys() != tensors.keys():
        name = min(want.keys() ^ tensors.keys())
        raise ValueError(f"{'lacks the' if name in want else 'has the unknown'} tensor {name!r}")
    for name, shape in want.items():
        t = tensors[name]
        if t.shape != shape:
            raise ValueError(f"tensor {name!r} is {tuple(t.shape)}, expected {tuple(shape)}")
        if not t.is_floating_point() or not t.isfinite().all():
            raise ValueError(f"tensor {name!r} holds something other than finite numbers")
    module.load_state_dict({name: t.float()[None].clone() for name, t in tensors.items()}, assign=True)
    return module


# A prompt is a folder: prompt.safetensors (the trainable tensors) and prompt.json (how to use them).

def write_atomic(path, data):
    """Write bytes (or call data(file)) so that `path` is the old file or the whole new one, come what may."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid():08}")       # train.py knows such names as debris
    try:
        with open(temporary, "wb") as f:
            data(f) if callable(data) else f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        why = e.__context__ if isinstance(e, RuntimeError) else e      # torch.save hides a full disk in one
        if isinstance(why, OSError):
            raise OSError(why.errno, why.strerror, str(path)) from None
        raise


def save_prompt(folder, prompt_tensors, head_tensors, meta):
    """Write `take`'s tensors and `meta` (see `load_prompt`) to a folder that exists. No pickle anywhere."""
    from safetensors.torch import save
    tensors = {f"prompt.{name}": t for name, t in prompt_tensors.items()}
    tensors |= {f"head.{name}": t for name, t in head_tensors.items()}
    text = json.dumps({"format": 1, **meta}, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(Path(folder) / "prompt.safetensors", save(tensors, {"format": "pt"}))
    write_atomic(Path(folder) / "prompt.json", text.encode() + b"\n")


def read_json(path):
    """A JSON object from a file of at most 4 MB; ValueError with the path for anything else."""
    try:
        if os.path.getsize(path) > 4 << 20:
            raise ValueError("larger than 4 MB")
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON: {e}") from None
    return value


def read_tensors(path):
    """The tensors of a .safetensors file; ValueError with the path if it is truncated or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load
    try:
        return load(Path(path).read_bytes())
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as e:
        raise ValueError(f"{path}: no whole safetensors file: {str(e).splitlines()[0]}") from None


def load_prompt(folder):
    """Read a prompt folder, or one of the authors' -> (SoftPrompt or None, ClassificationHead, meta).

    meta: kind, prompt, head (constructor arguments), reads, backbone {name, revision, type}, labels,
    max_length, tokenizer (fingerprint), data, training. FileNotFoundError, or ValueError with the file.
    """
    path, theirs, both = Path(folder) / "prompt.json", Path(folder) / "adapter_config.json", {}
    if path.is_file():
        meta, tensors = read_json(path), read_tensors(path.with_name("prompt.safetensors"))
    elif theirs.is_file():
        path, (meta, tensors) = theirs, read_authors(theirs)
    else:
        raise FileNotFoundError(f"{folder}: no prompt.json (a run that has not finished? train.py --resume)")
    labels, backbone = meta.get("labels"), meta.get("backbone")
    if not (meta.get("format") == 1 and isinstance(labels, list)
            and all(isinstance(meta.get(x), dict) for x in ("backbone", "head", "training"))
            and all(isinstance(x, str) for x in (*labels, backbone.get("name"), backbone.get("revision")))):
        raise ValueError(f"{path}: format, labels, backbone, head or training are not as format 1 has them")
    try:
        check("", {name: meta.get(name) for name in ("kind", "reads", "max_length")})
        for section, module in ("head", ClassificationHead), ("prompt", SoftPrompt):
            if meta.get(section) is not None:
                with torch.device("meta"):      # no memory: the file must show tensors of these shapes first
                    both[section] = module(**meta[section])
                if meta[section].keys() != both[section].config.keys():
                    raise ValueError(f"{section!r} must hold {', '.join(both[section].config)}")
        put(nn.ModuleDict(both), tensors)
        if not len(labels) == len(set(labels)) == meta["head"]["classes"]:
            raise ValueError(f"{len(set(labels))} labels for a head of {meta['head']['classes']} classes")
    except (ValueError, TypeError, RuntimeError) as e:
        raise ValueError(f"{path}: {e}") from None
    return both.get("prompt"), both["head"], meta


AUTHORS_NAMES = {       # theirs: ours, to be replaced in this order
    "base_model.model.": "base_model.", "prompt_encoder.default.": "prompt_encoder.",
    "base_model.classifier.": "head.", "head.out_proj.": "head.out.",
    "prompt_encoder.embedding.weight": "prompt.standard",
    "prompt_encoder.xpe_embedding.weight": "prompt.encoded",
    "prompt_encoder.xpe_head.": "prompt.encoder.", "encoder.lstm.": "encoder.", "encoder.1.": "encoder.mlp.",
    "encoder.0.self_attn.in_proj_": "encoder.qkv.", "encoder.0.self_attn.out_proj.": "encoder.merge.",
    "encoder.0.out_proj.": "encoder.project.", "encoder.0.layernorm.": "encoder.norm_"}


def read_authors(path):
    """adapter_config.json, of the authors' release or by their toolkit, and the tensors beside it -> meta and
    tensors as in a folder of ours, without peft. ValueError with the path."""
    theirs, tensors = read_json(path), {}
    if theirs.get("peft_type") not in ("XPE", "P_TUNING") or "encoder_ratio" not in theirs:
        raise ValueError(f"{path}: not by the authors' toolkit: peft_type {theirs.get('peft_type')!r}")
    for name, tensor in read_tensors(path.with_name("adapter_model.safetensors")).items():
        for old, new in AUTHORS_NAMES.items():
            name = name.replace(old, new)
        # Linears 0, 3, 6 of their Sequential are our 0, 1, 2
        name = re.sub(r"(encoder|mlp)\.(\d{1,3})\.", lambda m: f"{m[1]}.linears.{int(m[2]) / 3:g}.", name)
        tensors[name] = tensor
    ratio, out, get = theirs["encoder_ratio"], tensors.get("head.out.weight"), theirs.get
    # in paper-era XPE files the name prompt_encoder.embedding holds the *encoded* rows' embedding
    if ratio == 1 and "prompt.encoded" not in tensors and "prompt.standard" in tensors:
        tensors["prompt.encoded"] = tensors.pop("prompt.standard")
    if out is None or out.dim() != 2 or len(out) not in SIZE:
        raise ValueError(f"{path}: adapter_model.safetensors holds no head (base_model.classifier)")
    encoder = str(get("encoder_reparameterization_type")).lower().replace("attn", "attention")
    meta = {"format": 1, "kind": "spt" if ratio == 0 else "xpe" if ratio == 1 else "dual", "reads": "prompt",
            "prompt": dict(width=get("token_dim") or out.shape[1], length=get("num_virtual_tokens"),
                           ratio=ratio, encoder=encoder, hidden=get("encoder_hidden_size"),
                           layers=get("encoder_num_layers") or 2, heads=get("encoder_num_heads") or 8,
                           dropout=get("encoder_dropout") or 0.0),
            "head": dict(width=out.shape[1], classes=len(out), dropout=0.1), "max_length": 164,
            "backbone": {"name": str(get("base_model_name_or_path")), "revision": "main",
                         "type": "xlm-roberta"}, "training": {},
            "labels": [str(i) for i in range(len(out))]}        # their files name none
    return meta, tensors


def export_peft(folder, prompt, head, meta):
    """Write a folder that *stock* peft loads as prompt tuning (PeftModel.from_pretrained on an
    AutoModelForSequenceClassification). ValueError for a head that does not read the prompt's first row, or
    a backbone whose own head is not RoBERTa's; FileExistsError for a folder that is not empty."""
    from safetensors.torch import save
    if prompt is None or meta["reads"] != "prompt":
        raise ValueError(f"peft has no form for a {meta['kind']!r} run whose head reads {meta['reads']!r}")
    own = str(meta["backbone"].get("type"))
    if "roberta" not in own and own != "camembert":
        raise ValueError(f"peft would put this head into that of a {own!r} model, which is not built like it")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; name a new folder")
    tensors = {"base_model.classifier." + name.replace("out.", "out_proj."): t
               for name, t in take(head, 0).items()}
    tensors["prompt_embeddings"] = take(prompt.collapse(), 0)["standard"]  # (P, H)
    config = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "prompt_tuning_init": "RANDOM",
              "num_virtual_tokens": prompt.length, "token_dim": prompt.config["width"],
              "num_transformer_submodules": 1, "base_model_name_or_path": meta["backbone"]["name"],
              "modules_to_save": ["classifier"], "inference_mode": True}
    write_atomic(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=1).encode() + b"\n")
