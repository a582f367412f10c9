"""The frozen backbone: from the hub or a folder, on its device, in its precision; checked once.

The paper's backbone is XLM-R-large. Any encoder of transformers serves that takes `inputs_embeds`,
and the encoder half of an encoder-decoder (mT5, NLLB, mBART). A reader of the method may skip this.

    device = pick_device("auto")
    precision = pick_precision("auto", device)              # bf16, fp16 or off
    backbone, tokenizer, identity = load_backbone(
        {"name": "FacebookAI/xlm-roberta-large", "revision": "main"}, device, precision)
    check_backbone(backbone, tokenizer, identity, reads="prompt")
    autocast = place(PromptedClassifier(backbone, ...), device, precision)
"""
import hashlib
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

import xpe
from data import check, collate, locate, reading, shorten, warn, why_not_on_hub

try:
    from speed import cheap_dropout, first_position_only
except ModuleNotFoundError:     # it only makes things faster
    cheap_dropout = nullcontext

    def first_position_only(backbone):
        """The backbone as it is."""
        return backbone

# On a CPU oneDNN keeps its code for every shape that it meets, 1,024 by default: 3.0 GB after the
# test sentences of 205 languages, 1.4 GB with this limit, at the same speed.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- Device, precision, attention ----------------------------------------------------------------

def pick_device(name="auto"):
    """A name -> torch.device; `auto` is CUDA if there is one. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"--device {name}"):
        probe = torch.zeros(1, device=name)
        probe.cpu()                     # the device "meta" holds nothing that could come back
    if probe.device.type == "cuda":
        torch.cuda.set_device(probe.device)
    return probe.device


def pick_precision(amp, device):
    """train.amp -> "bf16", "fp16" or "off"; `auto` is bf16 where the device multiplies it natively.

    An AVX2 CPU multiplies bf16 matrices at a twentieth of its float32 speed: asked for by name
    it is used all the same, with a warning.
    """
    if amp == "auto":
        return "bf16" if multiplies_bf16(device) else "off"
    if amp == "bf16" and device.type == "cpu" and not multiplies_bf16(device):
        warn("this CPU has no bf16 instructions and is many times slower in bf16 than in float32: "
             "off (or auto) is faster")
    return amp


def multiplies_bf16(device):
    """Whether a device has instructions for bf16 products; False where torch cannot say."""
    if device.type == "cuda":
        # before Ampere CUDA emulates bf16, slowly
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.10
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
    return "eager" if device.type == "cpu" and precision == "bf16" else "sdpa"


def place(model, device, precision, frozen_weights="amp"):
    """Put a PromptedClassifier on its device -> a function giving the autocast context for it.

    precision bf16 or fp16 with frozen_weights "amp": the frozen backbone itself is stored in that
    type, so that nothing is cast at each step; prompts and heads stay float32. With frozen_weights
    "float32", and for a backbone that is trained: torch's autocast.
    """
    model.to(device)
    is_trained = any(p.requires_grad for p in model.backbone.parameters())
    if precision == "off" or (frozen_weights == "amp" and not is_trained):
        model.backbone.to(DTYPES[precision])
        return nullcontext
    model.backbone.to(torch.float32)
    return partial(torch.autocast, device.type, DTYPES[precision])


# ---- Loading -------------------------------------------------------------------------------------

def load_backbone(where, device, precision="off", attention="auto", trust_remote_code=False):
    """A folder or a name on the hub, as data.locate takes it -> (backbone in float32, tokenizer,
    identity).

    identity: {name, revision (the commit, or "local"), type, fingerprint (of the weights)}. The
    pooler is taken away; of an encoder-decoder the encoder is returned, and the type says so. A
    model without sdpa attention gets eager, with a warning. Raises ValueError or OSError, in one
    line, for what cannot be loaded, lacks weights, or has a tokenizer that does not fit.
    """
    import transformers
    transformers.logging.set_verbosity_error()      # or it reports the unused language-model head
    transformers.logging.disable_progress_bar()
    source, identity = locate(where)
    name = f"backbone {identity['name']}"
    on_hub = identity["revision"] != "local"
    # The type is always given: transformers 5 would take that of the file. Renamed in 4.56.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options = {"dtype" if version >= (4, 56) else "torch_dtype": torch.float32,
               "trust_remote_code": trust_remote_code}
    attention = pick_attention(attention, device, precision)
    try:
        if on_hub:      # the branch may move between two files: all are taken from one commit
            file = transformers.utils.cached_file(source, "config.json", revision=where["revision"])
            identity["revision"] = options["revision"] = Path(file).parent.name
        load = partial(transformers.AutoModel.from_pretrained, source, output_loading_info=True,
                       ignore_mismatched_sizes=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        try:
            backbone, info = load(attn_implementation=attention)
        except ValueError as error:
            if attention != "sdpa" or "attention" not in str(error):
                raise
            warn(f"{name}: transformers has no sdpa attention for it, so eager is used")
            backbone, info = load(attn_implementation="eager")
    except Exception as error:      # transformers, safetensors and tokenizers have their own kinds
        if "Weights only load failed" in str(error):    # torch's words advise to run the file
            error = "its weights are a pickle that may hold code, and are not opened"
        if on_hub:
            error = why_not_on_hub(error)
        raise OSError(f"{name}: cannot be loaded: {shorten(error, 600)}") from None

    identity["type"] = backbone.config.model_type
    lacking = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    unused = ["pooler"]
    if getattr(backbone.config, "is_encoder_decoder", False):
        backbone = take_encoder(backbone)
        identity["type"] += "-encoder"
        unused.append("decoder.")
    lacking = sorted(key for key in lacking if not any(part in key for part in unused))
    check(not lacking, f"{name}: its files lack {len(lacking)} of its weights, or have them in "
                       f"another size: {', '.join(lacking[:2])}")
    if getattr(backbone, "pooler", None) is not None:
        # nothing here reads it; a few backbones call it without asking whether it is there
        backbone.pooler = torch.nn.Identity()
    identity["fingerprint"] = weights_fingerprint(backbone)
    return backbone, tokenizer, identity


def take_encoder(model):
    """An encoder-decoder -> its encoder, with its word embeddings where others have them."""
    encoder = model.get_encoder()
    try:
        encoder.get_input_embeddings()
    except (NotImplementedError, AttributeError):   # mBART and NLLB in transformers 4, FSMT
        encoder.get_input_embeddings = partial(getattr, encoder, "embed_tokens")
    return encoder


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


def tokenizer_fingerprint(tokenizer):
    """A short hash of the ids of a few strings: between versions tokenizers changed silently."""
    with reading("the backbone's tokenizer fails"):
        ids = [tokenizer(text)["input_ids"] for text in FINGERPRINT_TEXTS]
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


# ---- Does it fit? One trial, before anything is written ------------------------------------------

TRIAL_TEXTS = ("The river rises.",
               "A much longer sentence stands beside it in the same batch, and it should not "
               "matter at all for the answer.")
TRIAL_TOKENS = 16       # at most, so that the trial fits any table of positions
# Relative change of what the head says by a neighbour in the batch. Rounding gives about 1e-6.
PADDING_WARNS = 1e-4
PADDING_REFUSED = 0.05


def check_backbone(backbone, tokenizer, identity, reads):
    """Try a backbone as load_backbone returns it, before place() and before anything is written.

    The trial is the classifier itself, behind a random prompt. reads: prompt.reads. Raises
    ValueError, in one line, if tokenizer and word embeddings do not belong together, if the
    backbone cannot be used behind a prompt, if the head would see nothing of the text, or if
    padding changes what it sees; warns if padding changes it a little.
    """
    name = f"backbone {identity['name']} ({identity['type']})"
    was_training = backbone.training
    # on the CPU; the trial must not move the run's random state
    with reading(name), torch.random.fork_rng(devices=[]):
        rows = backbone.get_input_embeddings().weight.shape[0]
        largest = max(tokenizer.get_vocab().values(), default=-1)
        check(largest < rows, f"the tokenizer has ids up to {largest}, the backbone {rows} rows of "
                              f"word embeddings: tokens were added without resize_token_embeddings")
        # most models pad their tables by a few percent
        check(len(tokenizer) >= rows / 2,
              f"the tokenizer has {len(tokenizer)} tokens, the backbone {rows} rows of word "
              f"embeddings: tokenizer files are missing, or another model's")
        torch.default_generator.manual_seed(0)
        embedding_width, hidden_width = xpe.widths(backbone)
        prompt = xpe.SoftPrompt(embedding_width, length=2, ratio=0.0)
        head = xpe.ClassificationHead(hidden_width, classes=32)
        model = xpe.PromptedClassifier(backbone, prompt, head, reads, frozen=False)
        texts = [tokenizer(text)["input_ids"][:TRIAL_TOKENS] for text in TRIAL_TEXTS]
        change = try_backbone(model, texts, tokenizer.pad_token_id or 0)
        backbone.train(was_training)
        told = (f"padding reaches its output: what the head says of a text (prompt.reads={reads}) "
                f"changes by {change:.2%} beside a longer text")
        check(change <= PADDING_REFUSED, told)
    if change > PADDING_WARNS:
        warn(f"{name}: {told}")


def try_backbone(model, texts, pad_id):
    """Token ids of a short and a long text -> how much the long one beside it changes what the head
    says of the short one. Raises ValueError for what makes the backbone unfit."""
    both = collate(texts, pad_id)
    ids, mask = long = collate(texts[1:], pad_id)
    model.eval()
    with torch.no_grad():
        alone = model(*collate(texts[:1], pad_id))
        other = model(*long)
        together = model(*both)[:1]
        words = model.backbone.get_input_embeddings()(ids)
        from_ids = model.backbone(input_ids=ids, attention_mask=mask)[0]
        from_words = model.backbone(inputs_embeds=words, attention_mask=mask)[0]
    logits = model.train()(*both)
    gradient, = torch.autograd.grad(logits.sum(), model.prompts[0].standard)
    check(together.isfinite().all() and gradient.isfinite().all(),
          "its outputs or gradients are not finite numbers")
    check(from_ids.shape[:2] == ids.shape and relative_change(from_ids, from_words) < 1e-3,
          "its states differ when it is given word embeddings instead of input_ids (it scales only "
          "its own), so a prompt cannot stand before them")
    check(relative_change(alone, other) >= 1e-6,        # 0 / 0 is not a number
          f"with prompt.reads={model.reads} the head sees nothing of the text; a causal model "
          f"needs prompt.reads=last")
    return relative_change(alone, together)


def relative_change(before, after):
    """|after - before| / |before|."""
    return float((after - before).norm() / before.norm())
