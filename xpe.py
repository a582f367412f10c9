"""Soft prompts for a frozen encoder: SPT, XPE and DUAL, the method of the paper in plain torch.

"Cross-Prompt Encoder for Low-Performing Languages", Findings of IJCNLP-AACL 2025, arXiv 2508.10352.
Copy this file: it needs torch alone (safetensors to save and load), and as backbone any module with
`get_input_embeddings()` that takes `inputs_embeds` and `attention_mask`.

    backbone = AutoModel.from_pretrained("FacebookAI/xlm-roberta-large", add_pooling_layer=False)
    prompt = SoftPrompt(width=1024, ratio=1.0)      # ratio 0.0 is SPT, 1.0 XPE, between them DUAL
    model = PromptedClassifier(backbone, prompt, ClassificationHead(1024, classes=7))
    logits = model(input_ids, attention_mask)           # trains 1,668,615 numbers of 560 million

Letters: B texts of a batch, T tokens of a text, P rows of a prompt (virtual tokens), H width of the
backbone, D width inside the prompt's encoder, C classes, K prompts that share one backbone (a list
of prompts and heads; K = 1 is the paper's case). In an attention mask 1 is a token, 0 is padding.

Read downwards: encoders, SoftPrompt, ClassificationHead, PromptedClassifier, files.
"""
import json
import os
from pathlib import Path

import torch
from torch import nn

KINDS = ("spt", "xpe", "dual", "head", "full")      # the methods that a saved prompt may come from
ENCODERS = ("mlp", "lstm", "attention", "none")
READS = ("prompt", "first", "mean", "last")         # what the classification head may look at
FORMAT = 2                                          # of prompt.json
LARGEST_SIZE = 65_535           # no encoder is wider; a hostile file could ask for terabytes


def check_size(name, value, smallest=1, largest=LARGEST_SIZE):
    """Raise ValueError unless `value` is a whole number from `smallest` to `largest`."""
    if type(value) is not int or not smallest <= value <= largest:
        raise ValueError(
            f"{name} must be a whole number from {smallest} to {largest}, not {value!r}")


def check_choice(name, value, choices):
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_dropout(name, value):
    """Raise ValueError unless `value` is a share that dropout can drop: at least 0 and below 1."""
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, not {value!r}")


# ---- Encoders: what makes rows of a prompt out of an embedding, (B, P, H) -> (B, P, H) -----------
# Their parameters have the names that the authors' files give them.

def make_mlp(n_in, hidden, n_out, layers, dropout):
    """The paper's encoder: one MLP, shared by all virtual tokens; D is `hidden`.

    paper: Linear(H, D) ReLU Dropout, then (layers - 1) x [Linear(D, D) ReLU Dropout], then
    Linear(D, H). "2 layers" are therefore three Linears.
    """
    modules = [nn.Linear(n_in, hidden), nn.ReLU(), nn.Dropout(dropout)]
    for _ in range(layers - 1):
        modules += [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout)]
    modules += [nn.Linear(hidden, n_out)]
    return nn.Sequential(*modules)


class LSTMEncoder(nn.Module):
    """authors' code: a bidirectional LSTM over the virtual tokens, then an MLP of one layer."""

    def __init__(self, width, hidden, layers, dropout):
        super().__init__()
        between_layers = dropout if layers > 1 else 0.0     # torch warns where there is no between
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
    if kind == "mlp":
        return make_mlp(width, hidden, width, layers, dropout)
    if kind == "lstm":
        return LSTMEncoder(width, hidden, layers, dropout)
    if kind == "attention":
        if width % heads:
            raise ValueError(f"prompt.heads: {heads} attention heads do not divide width {width}")
        # authors' code: the dropout of this MLP is 0.1, whatever the settings say
        mlp = make_mlp(width, hidden, width, 1, 0.1)
        return nn.Sequential(SelfAttentionBlock(width, heads, dropout), mlp)
    return nn.Identity()


# ---- The three prompts ---------------------------------------------------------------------------

def count_encoded_rows(length, ratio):
    """How many of `length` prompt rows are encoded: int(length x ratio), in DUAL at least one and
    not all. paper: of 20 rows 6 in DUAL-30 and 14 in DUAL-70."""
    encoded = int(length * ratio)
    if 0 < ratio < 1:
        encoded = min(max(encoded, 1), length - 1)
    return encoded


class SoftPrompt(nn.Module):
    """`length` rows in front of a text: standard rows first, then encoded rows.

    ratio 0 is SPT (each row is itself a parameter), 1 is XPE (each row comes out of the encoder),
    between them DUAL. `hidden` is D, by default a quarter of the width. paper: 20 rows, D = 256 of
    H = 1024, 2 layers, dropout 0.1. Raises ValueError for sizes that cannot be.
    """

    def __init__(self, width, length=20, ratio=1.0, encoder="mlp", hidden=0, layers=2, dropout=0.1,
                 heads=8):
        super().__init__()
        check_size("prompt.width", width)
        check_size("prompt.length", length)
        check_size("prompt.hidden", hidden, smallest=0)
        check_size("prompt.layers", layers, largest=64)
        check_size("prompt.heads", heads)
        check_choice("prompt.encoder", encoder, ENCODERS)
        check_dropout("prompt.dropout", dropout)
        if type(ratio) not in (int, float) or not 0 <= ratio <= 1:
            raise ValueError(f"prompt.ratio must be from 0 (SPT) to 1 (XPE), not {ratio!r}")
        if 0 < ratio < 1 and length == 1:
            raise ValueError(f"prompt.ratio {ratio} needs a prompt of two rows or more, not of one")
        if hidden == 0:
            hidden = max(1, width // 4)
        self.config = dict(width=width, length=length, ratio=ratio, encoder=encoder, hidden=hidden,
                           layers=layers, dropout=dropout, heads=heads)
        self.length = length

        # paper: the embeddings start from N(0, 1), torch.nn.Embedding's default
        encoded = count_encoded_rows(length, ratio)
        self.standard = None
        self.encoded = None
        self.encoder = None
        if encoded < length:
            self.standard = nn.Parameter(torch.randn(length - encoded, width))
        if encoded > 0:
            self.encoded = nn.Parameter(torch.randn(encoded, width))
            self.encoder = make_encoder(encoder, width, hidden, layers, dropout, heads)

    def forward(self, batch_size=1):
        """-> (B, P, H), the prompt of each text of a batch. They differ in training only."""
        parts = []
        if self.standard is not None:
            parts.append(self.standard.expand(batch_size, -1, -1))
        if self.encoded is not None:
            parts.append(self.encode(batch_size))
        return torch.cat(parts, dim=1)

    def encode(self, batch_size):
        """-> (B, encoded rows, H)."""
        if self.training:
            # authors' code: the encoder runs on the prompt expanded to the batch, so that each text
            # of it draws its own dropout mask
            return self.encoder(self.encoded.expand(batch_size, -1, -1))
        encoded_once = self.encoder(self.encoded[None])     # (1, encoded rows, H)
        return encoded_once.expand(batch_size, -1, -1)

    @torch.no_grad()
    def collapse(self):
        """The SPT with the same rows: at inference each of the three prompts is a matrix (P, H)."""
        was_training = self.training
        self.eval()
        matrix = self(1)[0]
        self.train(was_training)
        collapsed = SoftPrompt(self.config["width"], self.length, ratio=0.0)
        collapsed.standard = nn.Parameter(matrix.clone())
        return collapsed


class ClassificationHead(nn.Module):
    """Dropout, Linear, tanh, dropout, Linear: (B, H) -> (B, C). XLM-R's own classification head.

    transformers starts it from N(0, 0.02) with zero biases; so does this one.
    """

    def __init__(self, width, classes, dropout=0.1):
        super().__init__()
        check_size("head.width", width)
        check_size("head.classes", classes)
        check_dropout("head.dropout", dropout)
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

class PromptedClassifier(nn.Module):
    """A frozen backbone that reads a prompt in front of each text, and a head that classifies.

    `prompts` and `heads`: one of each, or lists of K, which share the backbone. `prompts=None` is
    the bare backbone, which full fine-tuning trains (with frozen=False). `reads` says what the head
    sees: `prompt` (paper: position 0, now the first prompt row and no longer `<s>`), `first` (the
    text's first token), `mean` (over the text's tokens), `last` (its last token, for decoders).
    Raises ValueError for prompts and heads that do not fit the backbone or each other.
    """

    def __init__(self, backbone, prompts, heads, reads="prompt", frozen=True):
        super().__init__()
        check_choice("prompt.reads", reads, READS)
        if prompts is None:
            prompts = []
        elif isinstance(prompts, SoftPrompt):
            prompts = [prompts]
        if isinstance(heads, ClassificationHead):
            heads = [heads]
        if prompts and len(prompts) != len(heads):
            raise ValueError(f"{len(prompts)} prompts need as many heads, not {len(heads)}")
        if len({prompt.length for prompt in prompts}) > 1:
            raise ValueError("prompts that share a batch must be of equal length")
        if len({head.config["classes"] for head in heads}) > 1:
            raise ValueError("heads that share a batch must have equally many classes")
        embedding_width, hidden_width = widths(backbone)
        for prompt in prompts:
            if prompt.config["width"] != embedding_width:
                raise ValueError(f"a prompt of width {prompt.config['width']} does not fit "
                                 f"embeddings of width {embedding_width}")
        for head in heads:
            if head.config["width"] != hidden_width:
                raise ValueError(f"a head of width {head.config['width']} does not fit "
                                 f"hidden states of width {hidden_width}")
        self.backbone = backbone
        self.prompts = nn.ModuleList(prompts)
        self.heads = nn.ModuleList(heads)
        self.reads = reads
        self.prompt_length = prompts[0].length if prompts else 0
        if frozen:
            backbone.requires_grad_(False)

    def forward(self, input_ids, attention_mask, owner=None):
        """-> logits (B, C). input_ids, attention_mask: (B, T), padded on the right.

        With K prompts, texts come in K equal blocks, one for each prompt in turn; otherwise
        `owner` (B,), on the CPU, says which prompt (0 ... K - 1) each text uses.
        """
        B, T = input_ids.shape
        P = self.prompt_length
        self.check_batch(attention_mask)

        # Texts of one prompt must stand side by side: sizes[k] texts for prompt k.
        K = len(self.heads)
        if owner is None:
            if B % K:
                raise ValueError(f"{B} texts are not {K} equal blocks: say with `owner` which "
                                 f"prompt each text uses")
            sizes = [B // K] * K
        else:
            if owner.min() < 0 or owner.max() >= K:
                raise ValueError(f"owner must name prompts from 0 to {K - 1}")
            order = owner.argsort(stable=True)
            input_ids, attention_mask = input_ids[order], attention_mask[order]
            sizes = owner.bincount(minlength=K).tolist()

        # Only the *word* embeddings are concatenated: the backbone itself adds position and type
        # embeddings, and its positions count from the first prompt row.
        x = self.backbone.get_input_embeddings()(input_ids)             # (B, T, H)
        if P:
            blocks = [prompt(n) for prompt, n in zip(self.prompts, sizes) if n]
            x = torch.cat((torch.cat(blocks).to(x.dtype), x), dim=1)    # (B, P+T, H)
        prompt_mask = attention_mask.new_ones(B, P)
        mask = torch.cat((prompt_mask, attention_mask), dim=1)          # (B, P+T)

        output = self.backbone(inputs_embeds=x, attention_mask=mask)
        h = output if torch.is_tensor(output) else output[0]            # (B, P+T, H)
        h = self.read(h, attention_mask)                                # (B, H)
        h = h.to(self.heads[0].dense.weight.dtype)

        # Each block through its own head, and back into the order of the batch.
        blocks = [head(block) for head, block in zip(self.heads, h.split(sizes)) if len(block)]
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

    def check_batch(self, attention_mask):
        """Raise ValueError for texts that are too long, or padded on the left."""
        T, P = attention_mask.shape[1], self.prompt_length
        limit = positions(self.backbone)
        if P + T > limit:
            # on a GPU the backbone itself would only say "device-side assert"
            raise ValueError(f"{P} prompt rows + {T} text tokens = {P + T} exceed the {limit} "
                             f"positions of the backbone: a text may have {limit - P} tokens")
        # Left padding would shift the positions of the text. Looked for on the CPU only: on a GPU
        # the look would make every step wait.
        if attention_mask.device.type == "cpu" and not attention_mask[:, 0].all():
            raise ValueError("a text of this batch begins with padding: pad on the right")


def widths(backbone):
    """(width of the word embeddings, width of the last hidden state): equal except in ELECTRA and
    the like."""
    embedding_width = backbone.get_input_embeddings().weight.shape[1]
    config = getattr(backbone, "config", None)
    hidden_width = getattr(config, "hidden_size", embedding_width)
    return embedding_width, hidden_width


def positions(backbone):
    """How many positions a sequence may have. RoBERTa's count from after the padding index: its 514
    are 512. A model without a limit says so with none, or with one below 1 (XLNet)."""
    config = getattr(backbone, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return 1 << 30
    embeddings = getattr(backbone, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding_index = getattr(table, "padding_idx", None)
    if padding_index is None:
        return limit
    return limit - padding_index - 1


# ---- A prompt on disk: prompt.safetensors (the trained tensors), prompt.json (how to use them) ---

def write_atomically(path, content):
    """Write bytes, or what content(file) writes: `path` is the old file or the whole new one."""
    path = Path(path)
    # a crash may leave such a file behind; whoever trains the run on clears it away
    temporary = path.with_name(f".{path.name}.{os.getpid():08}")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error
        if isinstance(error, RuntimeError):
            cause = error.__context__       # torch.save hides a full disk in a RuntimeError
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def read_json(path):
    """A JSON object from a file of at most 4 MB; ValueError with the path for anything else."""
    try:
        if os.path.getsize(path) > 4 << 20:
            raise ValueError("larger than 4 MB")
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value


def first_line(error):
    """The first line of an error's message, which may have none."""
    return (str(error).splitlines() or ["no reason given"])[0]


def read_tensors(path):
    """The tensors of a .safetensors file; ValueError with the path if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load
    damage = (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError)
    try:
        return load(Path(path).read_bytes())
    except damage as error:
        reason = first_line(error)
        raise ValueError(f"{path}: cut short, or not a safetensors file: {reason}") from None


def save_prompt(folder, prompt, head, meta):
    """Write a prompt (or None) and its head to a folder that exists; meta: see `load_prompt`."""
    from safetensors.torch import save
    tensors = {}
    for section, module in (("prompt", prompt), ("head", head)):
        if module is not None:
            for name, tensor in module.state_dict().items():
                tensors[f"{section}.{name}"] = tensor.float().cpu().contiguous()
    meta = dict(meta, format=FORMAT, head=head.config, prompt=None)
    if prompt is not None:
        meta["prompt"] = prompt.config
    text = json.dumps(meta, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(Path(folder) / "prompt.safetensors", save(tensors, {"format": "pt"}))
    write_atomically(Path(folder) / "prompt.json", text.encode())


def load_prompt(folder):
    """Read what save_prompt wrote -> (SoftPrompt or None, ClassificationHead, meta).

    meta, from prompt.json: kind, prompt and head (constructor arguments), reads, labels,
    max_length, backbone {name, revision, ...}, training {...}, and whatever else was saved.
    Raises FileNotFoundError, or ValueError with the file and what is wrong in it.
    """
    path = Path(folder) / "prompt.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no prompt.json: not a prompt, or not yet trained")
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {meta.get('format')!r}, expected {FORMAT}")
    tensors = read_tensors(path.with_name("prompt.safetensors"))
    try:
        prompt, head = restore_prompt(meta, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return prompt, head, meta


def restore_prompt(meta, tensors):
    """What prompt.json and prompt.safetensors hold -> (SoftPrompt or None, ClassificationHead).

    Raises ValueError for anything that is missing, of another type or shape, or not finite.
    """
    check_meta(meta)
    modules = nn.ModuleDict()
    for section, module_class in (("prompt", SoftPrompt), ("head", ClassificationHead)):
        arguments = meta.get(section)
        if arguments is None and section == "prompt":
            continue
        try:
            # on the meta device, without memory, until the file has shown tensors of such shapes
            with torch.device("meta"):
                modules[section] = module_class(**arguments)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{section}: {first_line(error)}") from None
        if modules[section].config.keys() != arguments.keys():
            names = ", ".join(modules[section].config)
            raise ValueError(f"{section} must hold {names}")
    check_tensors(modules.state_dict(), tensors)
    # copies: a tensor of the file may lie at an address that a later step cannot use
    copies = {name: tensor.float().clone() for name, tensor in tensors.items()}
    modules.load_state_dict(copies, assign=True)
    if len(meta["labels"]) != meta["head"]["classes"]:
        raise ValueError(f"{len(meta['labels'])} labels, but {meta['head']['classes']} classes")
    return modules["prompt"] if "prompt" in modules else None, modules["head"]


def check_meta(meta):
    """Raise ValueError unless `meta` holds what every user of a prompt relies on."""
    check_choice("kind", meta.get("kind"), KINDS)
    check_choice("reads", meta.get("reads"), READS)
    check_size("max_length", meta.get("max_length"), smallest=2, largest=1 << 20)
    for section in ("backbone", "head", "training"):
        if not isinstance(meta.get(section), dict):
            raise ValueError(f"{section} must be an object, not {meta.get(section)!r}")
    for key in ("name", "revision"):
        if not isinstance(meta["backbone"].get(key), str):
            raise ValueError(f"backbone.{key} must be a text")
    labels = meta.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError("labels must be a list of texts")
    if len(set(labels)) != len(labels):
        raise ValueError("labels must differ from each other")


def check_tensors(expected, tensors):
    """Raise ValueError unless `tensors` has the names and shapes of `expected`, all finite."""
    for name in expected:
        if name not in tensors:
            raise ValueError(f"the tensor {name!r} is missing")
    for name in sorted(tensors):        # safetensors gives them in any order
        tensor = tensors[name]
        if name not in expected:
            raise ValueError(f"the tensor {name!r} is unknown")
        shape = tuple(expected[name].shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name!r} is {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"tensor {name!r} does not hold finite numbers")
