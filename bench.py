"""Speed of training and evaluation, beside the bare backbone and the authors' toolkit.

No part of the paper: nothing else imports this file. Contenders take turns in one process, because
machines drift: read the ratios, which are of tokens a second (prompt rows counted, padding not) and
medians over the turns. Texts are a corpus's, the sources of sample/config.yaml; the backbone's
weights are random, which changes no speed.

    ours x K      train.py's own loop: XPE, K learners in one pass
    floor x K     the bare backbone on as many texts and tokens, forward, and backward to its input:
                  without padding, mask, prompt, head or optimizer
    toolkit       micm-nlp, the authors' library, on transformers' Trainer, with the batches of
                  ours x 1 (pip install micm-nlp)
    evaluation    evaluate.py's predict() on the sentences of ours x 1; its floor goes forward only

    python bench.py
    python bench.py --size large --data Davlan/sib200 --tokenizer FacebookAI/xlm-roberta-large
    python bench.py --steps 20 --turns 5        # --steps: K x steps of a turn

Measured before evaluation and toolkit took the sentences of ours x 1, and with the seven sources of
Joshi5: torch 2.13, transformers 5.23, micm-nlp 0.5.1; texts of SIB-200; one thread; no other
program running.

    --size tiny --learners 1,10 --steps 20 --turns 5, with a tokenizer of 12,000 word pieces, on a
    CPU without bf16 instructions (AMD EPYC, AVX2): float32, sdpa
                sentences/s  of floor  x toolkit
    ours x 1            101      1.33       1.52
    floor x 1            71         -       1.15
    ours x 10           110      1.56       1.61
    floor x 10           68         -       1.00
    toolkit              71      0.87       1.00
    evaluation          319      1.37          -
    its floor           234         -          -

    --size tiny --learners 1,3,10 --steps 100 --turns 3, with the tokenizer of multilingual-e5-small
    (XLM-R's vocabulary), on a CPU with bf16 instructions (AMD EPYC, AVX512-bf16): bf16, eager (the
    toolkit: sdpa in autocast)
    ours x 1            369      1.32       1.55
    floor x 1           264         -       1.17
    ours x 3            379      1.45       1.74
    floor x 3           261         -       1.32
    ours x 10           318      1.42       1.87
    floor x 10          221         -       1.31
    toolkit             206      0.85       1.00
    evaluation          843      1.21          -
    its floor           656         -          -

Ten learners take a tenth of the steps of a turn, and these happen to be of longer texts: compare
the ratios, not sentences a second. Ours is faster than the bare backbone because its last layer
computes one position and its dropout is cheap: see speed.py. No GPU has been measured.
"""
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
import transformers
from torch.utils.benchmark import timer         # time.perf_counter, which waits for the GPU first

import train
from backbone import first_position_only, pick_attention, pick_device, pick_precision, place
from data import HERE, check, make_parser, run_main, token_batches
from evaluate import predict

SIZES = {               # layers, width, attention heads
    "tiny": (3, 192, 4),                # as sample/backbone
    "small": (6, 256, 4),
    "base": (12, 768, 12),              # XLM-R-base
    "large": (24, 1024, 16),            # XLM-R-large, the paper's
}
BATCH = 32              # sentences
P = 20                  # prompt rows


def read_job(args):
    """What all contenders share -> a namespace as train.read_job's, with a random backbone.

    More in it: tokenizer; task, see train.Task; sizes, the backbone's configuration; whole, the
    backbone before its last layer was cut down to position 0.
    """
    device = pick_device(args.device)
    amp = pick_precision(args.amp, device)
    attention = pick_attention(args.attention, device, amp)
    arguments = ["--mode", "xpe", "--sources", f"{HERE}/sample/config.yaml", "--data", args.data]
    arguments += ["--set", f"train.amp={amp}", "--set", "evaluate.after_training=false"]
    job = train.read_job(train.parse_arguments(arguments))
    job.device = device
    job.quiet = True
    job.tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    job.pad_id = job.tokenizer.pad_token_id
    job.task = train.Task(job.corpus, job.languages, job.tokenizer, job.max_length, job.cfg)
    job.task.ids["dev"] = job.task.ids["dev"][:1]       # the loop ends with an evaluation

    check(args.size in SIZES, f"--size must be one of {', '.join(SIZES)}")
    layers, width, heads = SIZES[args.size]
    classes = len(job.corpus.labels)
    job.prompt["width"] = width
    job.head = {"width": width, "classes": classes}
    job.sizes = transformers.XLMRobertaConfig(
        vocab_size=len(job.tokenizer), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * width, max_position_embeddings=514,
        num_labels=classes)
    job.whole = transformers.AutoModel.from_config(
        job.sizes, add_pooling_layer=False, attn_implementation=attention)
    # before any contender converts the weights: in bf16 the check of equal states would fail
    job.backbone = first_position_only(job.whole)
    print(f"{device}, CPU with {torch.backends.cpu.get_cpu_capability()}, "
          f"{torch.get_num_threads()} threads; torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    print(f"{args.size}, {amp.replace('off', 'float32')}, {attention}; "
          f"{len(job.task.lengths):,} sentences of {job.task.lengths.mean():.0f} tokens")
    return job


# ---- Contenders ----------------------------------------------------------------------------------

@dataclass
class Contender:
    """What takes turns."""
    name: str
    batches: list           # for each batch, the lengths of its texts in tokens
    run: callable           # goes through the first n batches; may return its own seconds
    floor: str = ""         # name of the contender that does the same without any overhead
    trains: bool = True


def make_learners(job, K):
    """-> list of K train.Learner that keep and write nothing."""
    learners = []
    for seed in range(K):
        learner = train.Learner("no folder", seed, job.languages, {"training": {}})
        learner.task = job.task
        learner.record_evaluation = lambda *_: None
        learners.append(learner)
    return learners


def start_training(job, learners, steps):
    """-> the model of learners about to train, its autocast."""
    for learner in learners:
        learner.build(job, None, steps)
    model = train.join_learners(learners, job.backbone, job.reads)
    return model, place(model, job.device, job.cfg["amp"])


def make_ours(job, learners, steps):
    """train.py's loop with K learners in one pass -> Contender.

    steps: of all learners together in a turn, an epoch's at most.
    """
    K = len(learners)

    def run(count):
        job.cfg.update(steps=count, evaluate_every=0, checkpoint_every=count + 1)
        model, autocast = start_training(job, learners, count)
        train.train(learners, model, autocast, job, checkpoint=None)

    orders = [learner.batches(BATCH, epoch=0) for learner in learners]
    batches = [job.task.lengths[np.concatenate(indices)] for indices in zip(*orders)]
    return Contender(f"ours x {K}", batches[:max(2, steps // K)], run, f"floor x {K}")


def make_floor(job, contender, autocast):
    """The backbone alone, on full rectangles of as many texts and (rounded) tokens -> Contender."""
    batches = [np.full_like(lengths, round(lengths.mean())) for lengths in contender.batches]
    weight = job.whole.get_input_embeddings().weight

    def run(count):
        job.whole.train(contender.trains)
        for lengths in batches[:count]:
            x = weight.new_zeros(len(lengths), P + lengths[0], weight.shape[1],
                                 requires_grad=contender.trains)                # (B, P+T, H)
            with autocast():
                h = job.whole(inputs_embeds=x)[0]
            if contender.trains:
                # the plain sum of a LayerNorm's output would have no gradient
                h[:, 0].float().logsumexp(dim=1).sum().backward()

    return Contender(contender.floor, batches, run, trains=contender.trains)


def make_toolkit(job, indices, floor):
    """micm-nlp on batches of sentences, with Adafactor, autocast and no logs -> Contender."""
    from micm_nlp.models.xpe import get_xpe_model
    task = job.task
    # the Trainer cuts 32 by 32, so a smaller batch goes last
    indices = sorted(indices, key=len, reverse=True)
    texts = [{"input_ids": task.ids["train"][i], "labels": task.labels["train"][i]}
             for i in np.concatenate(indices)]
    model = get_xpe_model(transformers.XLMRobertaForSequenceClassification(job.sizes), dict(
        task_type="SEQ_CLS", num_virtual_tokens=P, encoder_ratio=1.0, encoder_dropout=0.1,
        encoder_hidden_size=job.sizes.hidden_size // 4, encoder_freeze=False,
        encoder_embedding_freeze=False))

    def run(count):
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, max_steps=count, per_device_train_batch_size=BATCH, optim="adafactor",
                train_sampling_strategy="sequential", bf16=job.cfg["amp"] == "bf16",
                use_cpu=job.device.type == "cpu", save_strategy="no", disable_tqdm=True)
            collator = transformers.DataCollatorWithPadding(job.tokenizer)
            trainer = transformers.Trainer(model, arguments, collator, texts)
            return trainer.train().metrics["train_runtime"]     # without what comes before step 1

    return Contender("toolkit", [task.lengths[batch] for batch in indices], run, floor)


def make_contenders(job, learner_counts, steps):
    """-> all Contenders, in the order of the table."""
    learners = make_learners(job, max(learner_counts))
    model, autocast = start_training(job, learners[:1], 1)
    contenders = []
    for K in learner_counts:
        ours = make_ours(job, learners[:K], steps)
        contenders += [ours, make_floor(job, ours, autocast)]
    lengths = job.task.lengths
    indices = learners[0].batches(BATCH, epoch=0)[:len(contenders[0].batches)]      # of ours x 1
    if find_spec("micm_nlp"):
        contenders.append(make_toolkit(job, indices, contenders[1].name))
    else:
        print("toolkit: left out, for micm-nlp is not installed (pip install micm-nlp)")
    indices = np.concatenate(indices)
    texts = [job.task.ids["train"][i] for i in indices]

    def evaluate(_):
        predict(model, texts, job.pad_id, autocast=autocast)

    batches = [lengths[indices[batch]] for batch in token_batches(lengths[indices], 16384, P)]
    evaluation = Contender("evaluation", batches, evaluate, "its floor", trains=False)
    return [*contenders, evaluation, make_floor(job, evaluation, autocast)]


# ---- Measuring -----------------------------------------------------------------------------------

def take_turns(contenders, turns):
    """Let all contenders run one after the other, after a warm-up -> {name: seconds of its turns}.
    """
    seconds = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.run(4)
    for _ in range(turns):
        for contender in contenders:
            start = timer()
            own = contender.run(len(contender.batches))
            seconds[contender.name].append(own or timer() - start)
    return seconds


def show_table(contenders, seconds):
    """One line a contender; ratios compare tokens a second, prompt rows counted, padding not."""
    print("\n              sentences/s  of floor  x toolkit")
    rates = {"": np.nan, "toolkit": np.nan}
    for contender in contenders:
        tokens = sum(lengths.sum() + P * len(lengths) for lengths in contender.batches)
        rates[contender.name] = tokens / np.array(seconds[contender.name])
    for contender in contenders:
        rate = rates[contender.name]
        sentences = sum(map(len, contender.batches)) / np.median(seconds[contender.name])
        of_floor = np.median(rate / rates[contender.floor])
        times_toolkit = np.median(rate / rates["toolkit" if contender.trains else ""])
        print(f"{contender.name:<12}{sentences:>13.0f}{of_floor:>10.2f}{times_toolkit:>11.2f}"
              .replace("nan", "  -"))


# ---- The command ---------------------------------------------------------------------------------

OPTIONS = """
--size NAME  tiny, small, base or large (default: tiny)
--device NAME  cpu, cuda (default: what there is)
--amp TYPE  auto, bf16 or off (default: auto)
--attention NAME  auto, sdpa or eager; the toolkit keeps transformers' default (default: auto)
--data DIR  a corpus, as for train.py (default: sample/sib200)
--tokenizer NAME  a folder, or a name on the hub (default: sample/backbone)
--learners LIST  K of ours, separated by commas (default: 1,3,10)
--steps N  K x steps of one turn (default: an epoch's)
--turns N  turns of each contender (default: 3)
"""


def main(argv=None):
    """Set up, take turns, print the table -> exit status."""
    parser = make_parser("Speed beside the bare backbone and the authors' toolkit.", OPTIONS)
    parser.set_defaults(size="tiny", device="auto", amp="auto", attention="auto",
                        data="sample/sib200", tokenizer=f"{HERE}/sample/backbone",
                        learners="1,3,10", steps="999999", turns="3")
    args = parser.parse_args(argv)
    job = read_job(args)
    learner_counts = [int(K) for K in args.learners.split(",")]
    contenders = make_contenders(job, learner_counts, int(args.steps))
    show_table(contenders, take_turns(contenders, int(args.turns)))
    return 0


if __name__ == "__main__":
    run_main(main)
