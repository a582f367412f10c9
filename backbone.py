"""The frozen backbone: from the hub or a folder, on its device, in its precision; checked once.

The paper's backbone is XLM-R-large. Any encoder of transformers serves that takes `inputs_embeds`,
and the encoder half of an encoder-decoder (mT5, NLLB, mBART). This file needs transformers.

    device = pick_device("auto")
    precision = pick_precision("auto", device)              # bf16, fp16 or off
    attention = pick_attention("auto", device, precision)   # sdpa or eager
    backbone, tokenizer, identity = load_backbone("FacebookAI/xlm-roberta-large", "main", attention)
    check_backbone(backbone, tokenizer, identity, reads="prompt")
    autocast = place(PromptedClassifier(backbone, ...), device, precision)
"""
import hashlib
import os
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from config import HERE, warn
from data import download, shorten

# On a CPU oneDNN keeps its code for every shape that it meets, 1,024 by default: 3.0 GB after the
# test sentences of 205 languages, 1.4 GB with this limit, at the same speed.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- device, precision, attention ----

def pick_device(name="auto"):
    """A name -> torch.device; `auto` is CUDA if there is one. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()                     # the device "meta" holds nothing that could come back
        device = probe.device
    except (RuntimeError, AssertionError, ImportError) as e:
        raise ValueError(f"--device {name}: {first_line(e)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_precision(amp, device):
    """train.amp -> "bf16", "fp16" or "off"; `auto` is bf16 where the device multiplies it natively.

    An AVX2 CPU multiplies bf16 matrices at a twentieth of its float32 speed: asked for by name
    it is used all the same, with a warning.
    """
    if amp == "auto":
        return "bf16" if multiplies_bf16(device) else "off"
    if amp == "bf16" and device.type == "cpu" and not multiplies_bf16(device):
        warn("this CPU has no bf16 instructions and is many times slower in bf16 than in float32: "
             "train.amp=off (or auto) is faster")
    return amp


def multiplies_bf16(device):
    """Whether a device has instructions for bf16 products."""
    if device.type == "cuda":
        # before Ampere CUDA emulates bf16, slowly
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return cpu_multiplies_bf16()
    return False


# Both libraries under torch can be told to act as on an older CPU; these settings rule bf16 out.
# torch.cpu.get_capabilities() names what the chip has whatever they say (torch 2.13).
ATEN_WITHOUT_BF16 = ("default", "avx2")
ONEDNN_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


def cpu_multiplies_bf16():
    """Whether torch may use bf16 instructions on this CPU; False where it cannot say."""
    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ATEN_WITHOUT_BF16:
        return False
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ONEDNN_WITHOUT_BF16:
        return False
    if not hasattr(torch.cpu, "get_capabilities"):      # older than torch 2.10 or so
        return False
    found = torch.cpu.get_capabilities()
    x86 = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    arm = found.get("bf16", False)
    return bool(x86 or arm)


def pick_attention(attention, device, precision):
    """backbone.attention -> "sdpa" or "eager", transformers' implementations; `auto` is the faster.

    ours, measured with XLM-R of 3 layers x 192 and 6 x 256, one thread, 32 texts of 80 positions.
    float32 on an AVX2 CPU: eager takes 0.96 to 1.03 of sdpa's time for a training step with
    dropout (0.91 to 1.00 with speed.py's), 0.94 to 1.23 without, and 1.03 to 1.18 to evaluate.
    bf16 on a CPU that has it (6 x 256): eager makes 4.9 training steps a second and sdpa 4.6 with
    dropout, 7.9 and 5.0 without.
    """
    if attention != "auto":
        return attention
    if device.type == "cpu" and precision == "bf16":
        return "eager"
    return "sdpa"


def place(model, device, precision, frozen_weights="amp"):
    """Put a PromptedClassifier on its device -> a function giving the autocast context for it.

    precision bf16 or fp16 with frozen_weights "amp": the frozen backbone itself is stored in that
    type, so that nothing is cast at each step; prompts and heads stay float32. With frozen_weights
    "float32", and for a backbone that is trained: torch's autocast.
    """
    model.to(device)
    is_trained = any(p.requires_grad for p in model.backbone.parameters())
    if precision == "off":
        model.backbone.to(torch.float32)
        return nullcontext
    if frozen_weights == "amp" and not is_trained:
        model.backbone.to(DTYPES[precision])
        return nullcontext
    model.backbone.to(torch.float32)
    return partial(torch.autocast, device.type, DTYPES[precision])


# ---- loading ----

# What else lies in a repository: other frameworks' weights, training states, folders of exports.
# All other files are small, and any may be the tokenizer's, whatever its name (bpe.codes, say).
NOT_NEEDED = ("*/*", "*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ggml", "*.pt",
              "*.pth", "*.ckpt", "*.pkl", "*.npz", "*.tflite", "*.mlmodel", "*.zip", "*.tar.gz")


def load_backbone(name, revision="main", attention="sdpa", trust_remote_code=False):
    """A folder or a name on the hub -> (backbone in float32, tokenizer, identity).

    identity: {name, revision (the commit, or "local"), type, fingerprint (of the weights)}. The
    pooler is taken away; of an encoder-decoder the encoder is returned, and the type says so. A
    model without sdpa attention gets eager, with a warning. Raises ValueError if weights are
    missing or the tokenizer does not fit, and OSError if the backbone cannot be had.
    """
    import transformers
    transformers.logging.set_verbosity_error()      # or it reports the unused language-model head
    transformers.logging.disable_progress_bar()
    folder, commit = find_backbone(name, revision, trust_remote_code)
    check_files(folder, name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code)
        backbone, missing = load_model(folder, name, attention, trust_remote_code)
    except Exception as e:      # transformers, safetensors and tokenizers raise errors of their own
        raise OSError(f"cannot load backbone {name!r}: {type(e).__name__}: {first_line(e)} "
                      f"({advice(e)})") from None
    kind = backbone.config.model_type
    if getattr(backbone.config, "is_encoder_decoder", False):
        backbone = take_encoder(backbone)
        missing = [key for key in missing if not key.startswith("decoder.")]
        kind = f"{kind}-encoder"
    missing = [key for key in missing if "pooler" not in key]
    if missing:
        raise ValueError(f"backbone {name!r}: its files lack {len(missing)} of its weights, "
                         f"{missing[0]} for one")
    if getattr(backbone, "pooler", None) is not None:
        # nothing here reads it; a few backbones call it without asking whether it is there
        backbone.pooler = torch.nn.Identity()
    identity = {"name": name, "revision": commit, "type": kind}
    identity["fingerprint"] = weights_fingerprint(backbone)
    check_vocabulary(backbone, tokenizer, identity)
    return backbone, tokenizer, identity


def take_encoder(model):
    """An encoder-decoder -> its encoder, with its word embeddings where others have them."""
    encoder = model.get_encoder()
    try:
        encoder.get_input_embeddings()
    except NotImplementedError:     # mBART and NLLB in transformers 4
        encoder.get_input_embeddings = partial(getattr, encoder, "embed_tokens")
    return encoder


def find_backbone(name, revision, with_code=False):
    """-> (folder, commit or "local"); what exists is a folder, anything else is on the hub."""
    for folder in (Path(os.path.expanduser(name)), HERE / name):
        if folder.is_dir():
            return folder.resolve(), "local"
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"backbone.name: no folder {name!r}")
    leave_out = list(NOT_NEEDED)
    if not with_code:
        leave_out.append("*.py")
    folder = download(name, revision, "model", leave_out=leave_out)
    if not any(folder.glob("*.safetensors")):
        # an older repository; transformers reads such files without running what they may contain
        folder = download(name, revision, "model", patterns=["pytorch_model*.bin"])
    return folder, folder.name


def check_files(folder, name):
    """Raise ValueError in plain words for a folder that cannot be a backbone."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"backbone {name!r} is an adapter: name the backbone that it belongs to")
    if (folder / "prompt.json").is_file():
        raise ValueError(f"backbone {name!r} is a run: name the backbone that it was made for")
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return
    if any(folder.glob("*.gguf")):
        raise ValueError(f"backbone {name!r} holds GGUF files only, which are made for llama.cpp; "
                         "take the repository that they were made from, with *.safetensors")
    raise ValueError(f"backbone {name!r} holds no weights: wanted are *.safetensors or "
                     "pytorch_model*.bin (GGUF, TensorFlow and Flax files are not read)")


def load_model(folder, name, attention, trust_remote_code):
    """-> (the whole model in float32, names of the weights that its files lack)."""
    import transformers
    # Always said: transformers 5 would take the type of the file. The keyword was renamed in 4.56.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype_keyword = "dtype" if version >= (4, 56) else "torch_dtype"
    # weights of other sizes are told below: transformers would refer to a report, not shown here
    options = {dtype_keyword: torch.float32, "trust_remote_code": trust_remote_code,
               "output_loading_info": True, "ignore_mismatched_sizes": True}
    load = partial(transformers.AutoModel.from_pretrained, str(folder), **options)
    try:
        model, info = load(attn_implementation=attention)
    except ValueError as e:
        if attention != "sdpa" or not refuses_attention(e):
            raise
        warn(f"backbone {name}: transformers has no sdpa attention for it, eager is used")
        model, info = load(attn_implementation="eager")
    if info["mismatched_keys"]:
        key, in_files, by_config = min(info["mismatched_keys"])
        raise ValueError(f"{key} is {tuple(in_files)} in its files, but {tuple(by_config)} by its "
                         f"config.json")
    return model, sorted(info["missing_keys"])


def refuses_attention(error):
    """Whether an error of transformers says that a model lacks this kind of attention."""
    return "attention implementation" in str(error) or "scaled_dot_product_attention" in str(error)


def first_line(error):
    """The first line of an error's message, about 160 characters at most, cut after a word."""
    text = str(error).strip() or "no reason given"
    if text.startswith("Weights only load failed"):     # torch's own words advise to run the file
        return "it holds more than tensors, which may be code, and is not opened"
    return shorten(text.splitlines()[0], 160)


def advice(error):
    """What to do about an error of transformers."""
    if "trust_remote_code" in str(error):
        return "its own code would run: read it, then say backbone.trust_remote_code=true"
    if refuses_attention(error):
        return "it needs --set backbone.attention=eager"
    return "check the folder"


def weights_fingerprint(backbone):
    """A short hash of names, shapes and first values of all weights: tells two backbones apart."""
    digest = hashlib.sha256()
    for key, weight in backbone.named_parameters():
        digest.update(f"{key} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:64].numpy().tobytes())
    return digest.hexdigest()[:16]


# In several scripts; the last with a no-break and a zero-width space, which normalizers treat
# differently
FINGERPRINT_TEXTS = ("Hello, world! 12,345", "Привет, мир", "你好，世界", "مرحبا", "नमस्ते",
                     "ქართული", "a\u00a0b \u200b")


def token_ids(tokenizer, text):
    """The ids of one text; ValueError for a tokenizer that fails, as one without an unknown token
    does where it would need it."""
    try:
        return tokenizer(text)["input_ids"]
    except Exception as e:      # tokenizers raises plain Exceptions
        raise ValueError(f"the backbone's tokenizer fails on {text!r}: {first_line(e)}") from None


def tokenizer_fingerprint(tokenizer):
    """A short hash of the ids of a few strings: between versions tokenizers changed in silence."""
    ids = [token_ids(tokenizer, text) for text in FINGERPRINT_TEXTS]
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


# ---- does it fit? One trial, before anything is written ----

# Probes for unknown tokens: one short sentence in each of several scripts.
PROBES = ("The river rises slowly in spring, and the old bridge is closed.",
          "Река медленно поднимается.", "河水在春天慢慢上涨。", "يرتفع النهر ببطء في الربيع.",
          "वसंत में नदी धीरे-धीरे बढ़ती है।", "მდინარე ნელა იმატებს.")
MAX_UNKNOWN = 0.9       # share; an English tokenizer still knows the letters of its own probe
MIN_VOCABULARY = 0.5    # share of the embedding rows; most models pad their tables by a few percent

# The trial: two prompt rows before a short text, alone and beside a longer one.
TRIAL_PROMPT = 2
TRIAL_TEXTS = ("The river rises.",
               "A much longer sentence stands beside it in the same batch, and it should not "
               "matter at all for the answer.")
TRIAL_TOKENS = 16       # at most, so that the trial fits any table of positions
# Relative change of what the head reads by a neighbour in the batch. Rounding gives about 1e-6.
PADDING_WARNS = 1e-4
PADDING_REFUSED = 0.05


def check_vocabulary(backbone, tokenizer, identity):
    """Raise ValueError if tokenizer and word embeddings of a backbone do not belong together."""
    name = describe(identity)
    rows = embedding_table(backbone, identity).shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ValueError(f"{name}: the tokenizer has ids up to {largest}, the backbone {rows} rows "
                         "of word embeddings: tokens were added without resize_token_embeddings")
    if len(tokenizer) < MIN_VOCABULARY * rows:
        raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the backbone {rows} "
                         "rows of word embeddings: tokenizer files are missing, or another model's")


def check_backbone(backbone, tokenizer, identity, reads, texts=PROBES):
    """Try a backbone as load_backbone returns it, before place() and before anything is written.

    reads: prompt.reads. texts: what the tokenizer must know, best some of the texts to train on.
    Raises ValueError, one line with the type of the backbone, if the tokenizer knows next to
    nothing, if the backbone cannot be used with a prompt, if the head would see nothing of the
    text, or if padding changes what it sees; warns if padding changes it a little.
    """
    check_unknown(tokenizer, identity, texts)
    name = describe(identity)
    short = token_ids(tokenizer, TRIAL_TEXTS[0])[:TRIAL_TOKENS // 2]
    long = token_ids(tokenizer, TRIAL_TEXTS[1])[:TRIAL_TOKENS]
    was_training = backbone.training
    try:
        backbone.eval()
        with torch.no_grad():
            alone = try_forward(backbone, [short], reads)
            other = try_forward(backbone, [long], reads)
            together = try_forward(backbone, [short, long], reads)
        gradient = try_gradient(backbone, [short, long], reads)
    except Exception as e:      # whatever a backbone raises inside
        raise ValueError(f"{name} fails with a prompt before its word embeddings: "
                         f"{type(e).__name__}: {first_line(e)}") from None
    finally:
        backbone.train(was_training)
    if not (together.isfinite().all() and gradient.isfinite().all()):
        raise ValueError(f"{name}: outputs or gradients that are not finite numbers")
    width = getattr(backbone.config, "hidden_size", together.shape[1])
    if together.shape[1] != width:
        raise ValueError(f"{name}: its states are {together.shape[1]} wide, its configuration says "
                         f"{width}; a head of that width would not fit")
    if not relative_change(alone, other) >= 1e-6:       # 0 / 0 is no number
        raise ValueError(f"{name}: with prompt.reads={reads} the head sees nothing of the text; a "
                         "causal model needs prompt.reads=last")
    report_padding(relative_change(alone, together[:1]), name, reads)


def try_forward(backbone, token_rows, reads, prompt=None):
    """Token ids of B texts -> what a head would read (B, H), behind TRIAL_PROMPT prompt rows."""
    lengths = [len(row) for row in token_rows]
    ids = torch.zeros(len(token_rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(token_rows):
        ids[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = 1
    ids = ids.to(backbone.device)
    mask = mask.to(backbone.device)
    words = backbone.get_input_embeddings()(ids)  # (B, T, H)
    if prompt is None:
        prompt = trial_prompt(backbone)
    prompts = prompt.expand(len(ids), -1, -1)
    prompt_mask = mask.new_ones(len(ids), TRIAL_PROMPT)
    output = backbone(inputs_embeds=torch.cat((prompts, words), dim=1),
                      attention_mask=torch.cat((prompt_mask, mask), dim=1))
    states = output[0]
    expected = (len(ids), TRIAL_PROMPT + max(lengths))
    if states.dim() != 3 or states.shape[:2] != expected:
        raise ValueError(f"its output is {tuple(states.shape)}, not {expected} and a width")
    vectors = [read_state(states[i], lengths[i], reads) for i in range(len(ids))]
    return torch.stack(vectors)


def read_state(states, length, reads):
    """States (P+T, H) of one text of `length` tokens -> the vector (H,) that the head reads."""
    if reads == "prompt":
        return states[0]
    text = states[TRIAL_PROMPT:TRIAL_PROMPT + length]
    if reads == "first":
        return text[0]
    if reads == "last":
        return text[-1]
    return text.mean(dim=0)


def trial_prompt(backbone):
    """Prompt rows (1, TRIAL_PROMPT, H) for the trial: word embeddings that any backbone has."""
    ids = torch.arange(3, 3 + TRIAL_PROMPT, device=backbone.device)
    return backbone.get_input_embeddings()(ids)[None].detach()


def try_gradient(backbone, token_rows, reads):
    """The gradient with respect to the prompt rows, in training mode as the paper trains."""
    backbone.train()
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):    # dropout must not move the run's random state
        prompt = trial_prompt(backbone).requires_grad_()
        vectors = try_forward(backbone, token_rows, reads, prompt)
        return torch.autograd.grad(vectors.sum(), prompt)[0]


def check_unknown(tokenizer, identity, texts):
    """Raise ValueError if nearly all tokens of `texts` are the unknown one."""
    if tokenizer.unk_token_id is None:
        return
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = []
    for text in texts:
        ids += [token for token in token_ids(tokenizer, text) if token not in special]
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown >= MAX_UNKNOWN * len(ids):
        raise ValueError(f"{describe(identity)}: its tokenizer does not know {unknown} of "
                         f"{len(ids)} tokens: tokenizer files are missing, or another model's")


def report_padding(change, name, reads):
    """Refuse a backbone whose answers depend on padding; warn where they do a little."""
    if change > PADDING_REFUSED:
        raise ValueError(f"{name}: padding reaches its output: what the head reads of a text "
                         f"(prompt.reads={reads}) changes by {change:.1%} beside a longer text")
    if change > PADDING_WARNS:
        warn(f"{name}: padding reaches its output a little: what the head reads of a text "
             f"(prompt.reads={reads}) changes by {change:.2%} beside a longer text")


def relative_change(before, after):
    """|after - before| / |before|."""
    return float((after - before).norm() / before.norm())


def embedding_table(backbone, identity):
    """The word embeddings (vocabulary, H); ValueError for a backbone that has none."""
    try:
        table = backbone.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        table = None
    if table is None or table.dim() != 2:
        raise ValueError(f"{describe(identity)} has no table of word embeddings, so no prompt can "
                         "stand before them")
    return table


def describe(identity):
    """How messages name a backbone."""
    return f"backbone {identity['name']} ({identity['type']})"
