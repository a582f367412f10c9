"""The frozen backbone: from the hub or a folder, on its device, in its precision; checked once.

The paper's backbone is XLM-R-large. Any encoder of transformers serves that takes `inputs_embeds`,
and the encoder half of an encoder-decoder (mT5, NLLB, mBART). A reader of the method may skip this.

    device = pick_device("auto")
    precision = pick_precision("auto", device)              # bf16, fp16 or off
    settings = {"name": "FacebookAI/xlm-roberta-large", "revision": "main", "attention": "auto",
                "trust_remote_code": False}
    backbone, tokenizer, identity = load_backbone(settings, settings, device, precision, "prompt")
    autocast = place(PromptedClassifier(backbone, ...), device, precision)
"""
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

import xpe
from data import check, collate, locate, reading, short_hash, tokenize, warn

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
    """A name -> torch.device; `auto` is CUDA if there is one, of several processes (torchrun) each
    has its own. ValueError if it cannot be used."""
    if name == "auto":
        local_rank = os.environ.get("LOCAL_RANK", 0)
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    with reading(f"--device {name}"):
        device = torch.zeros(1, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_precision(amp, device):
    """train.amp -> "bf16", "fp16" or "off"; `auto` is bf16 where the device multiplies it natively.

    An AVX2 CPU multiplies bf16 matrices at a twentieth of its float32 speed, and before Ampere
    CUDA emulates it, slowly.
    """
    if amp != "auto":
        check(amp in DTYPES, f"precision {amp}: not one of auto, {', '.join(DTYPES)}")
        return amp
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        found = getattr(torch.cpu, "get_capabilities", dict)()      # torch 2.10 and up
        native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if native else "off"


def pick_attention(attention, device, precision):
    """backbone.attention -> "sdpa" or "eager", transformers' implementations; `auto` is eager where
    that is faster, else None: transformers takes sdpa if the model has it.

    ours, measured with XLM-R of 3 layers x 192 and 6 x 256, one thread, 32 texts of 80 positions.
    float32 on an AVX2 CPU: eager takes 0.96 to 1.03 of sdpa's time for a training step with
    dropout (0.91 to 1.00 with speed.py's), 0.94 to 1.23 without, and 1.03 to 1.18 to evaluate.
    bf16 on a CPU that has it (6 x 256): eager makes 4.9 training steps a second and sdpa 4.6 with
    dropout, 7.9 and 5.0 without.
    """
    if attention != "auto":
        return attention
    return "eager" if device.type == "cpu" and precision == "bf16" else None


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
    return partial(torch.autocast, device.type, DTYPES[precision])


# ---- Loading -------------------------------------------------------------------------------------

def load_backbone(where, settings, device, precision, reads, prompted=True):
    """A folder or a name on the hub, as data.locate takes it -> (backbone in float32, tokenizer,
    identity), checked.

    identity: data.locate's {name, revision, folder} and type, fingerprint (of the weights),
    tokenizer (a fingerprint, too). settings: the section `backbone`; reads: prompt.reads;
    prompted: whether a prompt stands before the texts. The pooler is taken away; of an
    encoder-decoder the encoder is returned, and the type says so; a head that reads position 0 gets
    a last layer that computes no other. Raises ValueError or OSError, in one line, for what cannot
    be loaded, lacks weights or is not fit for it.
    """
    import transformers
    transformers.logging.set_verbosity_error()      # or it reports the unused language-model head
    transformers.logging.disable_progress_bar()
    source, identity = locate(where)
    name = f"backbone {identity['name']}"
    options = {"revision": where["revision"], "trust_remote_code": settings["trust_remote_code"]}
    with reading(f"{name}: cannot be loaded"):
        if identity["revision"] != "local":
            # the branch may move between two files: all are taken from one commit
            file = transformers.utils.cached_file(source, "config.json", revision=where["revision"])
            identity["revision"] = options["revision"] = Path(file).parent.name
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        attention = pick_attention(settings["attention"], device, precision)
        backbone, info = transformers.AutoModel.from_pretrained(
            source, output_loading_info=True, attn_implementation=attention, **options)
        backbone.float()                # transformers 5 loads the type of the file

    identity["type"] = backbone.config.model_type
    unused = "pooler"
    if backbone.config.is_encoder_decoder:
        backbone = backbone.get_encoder()
        # in transformers 4 mBART and NLLB have no such method
        backbone.get_input_embeddings = partial(getattr, backbone, "embed_tokens")
        identity["type"] += "-encoder"
        unused = "decoder."
    lacking = sorted(key for key in info["missing_keys"] if unused not in key)
    check(not lacking,
          f"{name}: its files lack {len(lacking)} of its weights: {', '.join(lacking[:2])}")
    # nothing here reads it; a few backbones call it without asking whether it is there
    backbone.pooler = torch.nn.Identity()
    identity["fingerprint"] = weights_fingerprint(backbone)
    identity["tokenizer"] = tokenizer_fingerprint(tokenizer)
    check_backbone(backbone, tokenizer, identity, reads)
    if reads == "prompt" or (reads == "first" and not prompted):        # position 0
        backbone = first_position_only(backbone)
    return backbone, tokenizer, identity


def weights_fingerprint(backbone):
    """A short hash of names, shapes and first values of all weights: tells two backbones apart."""
    content = b""
    for key, weight in backbone.named_parameters():
        content += f"{key} {tuple(weight.shape)}".encode()
        content += weight.detach().flatten()[:64].numpy().tobytes()
    return short_hash(content)


# In several scripts; the last with a no-break and a zero-width space, which normalizers treat
# differently
FINGERPRINT_TEXTS = ("Hello, world! 12,345", "Привет, мир", "你好，世界", "مرحبا", "नमस्ते",
                     "ქართული", "a\u00a0b \u200b")


def tokenizer_fingerprint(tokenizer):
    """A short hash of the ids of a few strings: between versions tokenizers changed silently."""
    ids = [row.tolist() for row in tokenize(FINGERPRINT_TEXTS, tokenizer, 99)]
    return short_hash(repr(ids).encode())


# ---- Does it fit? One trial, before anything is written ------------------------------------------

TRIAL_TEXTS = ("The river rises.",
               "A much longer sentence stands beside it in the same batch, and it should not "
               "matter at all for the answer.")
# Relative change of what the head says by a neighbour in the batch. Rounding gives about 1e-6.
PADDING_WARNS = 1e-4
PADDING_REFUSED = 0.05


def check_backbone(backbone, tokenizer, identity, reads):
    """Try a backbone before place() and before anything is written.

    The trial is the classifier itself, behind a random prompt. reads: prompt.reads. Raises
    ValueError, in one line, if tokenizer and word embeddings do not belong together, if the
    backbone cannot be used behind a prompt, if the head would see nothing of the text, or if
    padding changes what it sees; warns if padding changes it a little.
    """
    name = f"backbone {identity['name']} ({identity['type']})"
    # on the CPU; the trial must not move the run's random state
    with reading(name), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        rows = len(backbone.get_input_embeddings().weight)
        # most models pad their tables by a few percent
        check(rows / 2 <= len(tokenizer) <= rows,
              f"the tokenizer has {len(tokenizer)} tokens, the backbone {rows} rows of word "
              f"embeddings: tokenizer files are missing, another model's, or have added tokens")
        embedding_width, hidden_width = xpe.widths(backbone)
        prompt = xpe.SoftPrompt(embedding_width, length=2, ratio=0.0)
        head = xpe.ClassificationHead(hidden_width, classes=32)
        model = xpe.PromptedClassifier(backbone, prompt, head, reads, frozen=False)
        # 16 tokens at most: that fits any table of positions
        short, long = tokenize(TRIAL_TEXTS, tokenizer, 16)
        both = collate([short, long], tokenizer.pad_token_id or 0)
        model.train()
        model(*both).sum().backward(inputs=prompt.standard)
        check(prompt.standard.grad.isfinite().all(), "its gradients are not finite numbers")
        model.eval()
        with torch.no_grad():
            alone = model(*collate([short], 0))
            beside, other = model(*both)
            ids, _ = collate([long], 0)
            words = backbone.get_input_embeddings()(ids)
            from_ids = backbone(input_ids=ids)[0]
            from_words = backbone(inputs_embeds=words)[0]
        check(relative_change(from_ids, from_words) < 1e-3,
              "its states differ when it is given word embeddings instead of input_ids (it scales "
              "only its own), so a prompt cannot stand before them")
        check(relative_change(beside, other) >= 1e-6,        # 0 / 0 is not a number
              f"with prompt.reads={reads} the head sees nothing of the text; a causal model needs "
              f"prompt.reads=last")
        change = relative_change(alone, beside)
        told = (f"padding reaches its output: what the head says of a text (prompt.reads={reads}) "
                f"changes by {change:.2%} beside a longer text")
        check(change <= PADDING_REFUSED, told)
    if change > PADDING_WARNS:
        warn(f"{name}: {told}")


def relative_change(before, after):
    """|after - before| / |before|."""
    return float((after - before).norm() / before.norm())
