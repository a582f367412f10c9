"""Speed of training and evaluation, beside the bare backbone and the authors' toolkit.

No part of the paper: nothing else imports this file. Contenders take turns in one process, because
machines drift: read the ratios, which are of tokens a second and medians over the turns. Texts are
a corpus's; the backbone's weights are random, which changes no speed.

    ours x K      train.py's own loop: XPE on Joshi5, K learners in one pass
    floor x K     the bare backbone on as many texts and tokens, forward, and backward to a prompt:
                  without padding, mask, encoder, head or optimizer
    toolkit       micm-nlp, the authors' library, on transformers' Trainer (pip install micm-nlp)
    evaluation    evaluate.py's predict() on test sentences; its floor goes forward only

    python bench.py
    python bench.py --size large --data Davlan/sib200 --tokenizer FacebookAI/xlm-roberta-large

A CPU without bf16 instructions (AMD EPYC, AVX2), one thread, float32, sdpa; torch 2.13,
transformers 5.23, micm-nlp 0.5.1. With the options shown and `--data sib200/data --tokenizer DIR`:
texts of SIB-200 in 12,000 word pieces (a tokenizer that is not shipped). A step is one of one
learner, padding a share of the texts' positions. On a machine with nothing else to do:

    --size tiny --learners 1,10 --steps 20 --turns 5
                  steps/s  sentences/s  of floor  x toolkit  padding
    ours x 1         3.14          101      1.33       1.52     6.0%
    floor x 1        2.23           71         -       1.15     0.0%
    ours x 10        3.44          110      1.56       1.61     5.1%
    floor x 10       2.13           68         -       1.00     0.0%
    toolkit          2.22           71      0.87       1.00     4.8%
    evaluation          -          319      1.37          -     0.5%
    its floor           -          234         -          -     0.0%

While other programs were running (tiny x 1 was then 1.26 of floor and 1.41 x toolkit, tiny x 10
1.44 and 1.37):

    --size small --learners 1,10 --steps 10 --turns 5
    ours x 1         0.69           22      1.10       1.21     6.3%
    floor x 1        0.60           19         -       1.09     0.0%
    ours x 10        0.84           27      1.18       1.24     5.1%
    floor x 10       0.69           22         -       1.05     0.0%
    toolkit          0.74           24      0.91       1.00     8.0%
    evaluation          -           73      1.13          -     0.5%
    its floor           -           65         -          -     0.0%

A CPU with bf16 instructions (AMD EPYC, AVX512-bf16), one thread, bf16, eager (the toolkit: sdpa in
autocast), the tokenizer of multilingual-e5-small, which has XLM-R's vocabulary; nothing else to do:

    --size tiny --learners 1,3,10 --steps 100 --turns 3
                  steps/s  sentences/s  of floor  x toolkit  padding
    ours x 1        11.53          369      1.32       1.55     5.3%
    floor x 1        8.26          264         -       1.17     0.0%
    ours x 3        11.84          379      1.45       1.74     5.7%
    floor x 3        8.14          261         -       1.32     0.0%
    ours x 10        9.94          318      1.42       1.87     7.1%
    floor x 10       6.92          221         -       1.31     0.0%
    toolkit          6.44          206      0.85       1.00     3.6%
    evaluation          -          843      1.21          -     0.8%
    its floor           -          656         -          -     0.0%

    --size small --learners 1,10 --steps 60 --turns 3
    ours x 1         3.74          120      1.22       1.52     5.4%
    floor x 1        2.98           95         -       1.25     0.0%
    ours x 10        2.94           94      1.17       1.42     8.5%
    floor x 10       2.50           80         -       1.21     0.0%
    toolkit          2.50           80      0.80       1.00     5.2%
    evaluation          -          248      1.12          -     0.8%
    its floor           -          222         -          -     0.0%

Ten learners take a tenth of the steps of a turn, and these happen to be of longer texts: compare
the ratios, not sentences a second.

Ours is faster than the bare backbone because its last layer computes one position and its dropout
is cheap: see speed.py. No GPU has been measured.
"""
import argparse
import io
import math
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
import transformers
from torch.utils.benchmark import timer         # time.perf_counter, which waits for the GPU first
from tqdm import tqdm
from transformers.trainer_pt_utils import get_length_grouped_indices

import train
from backbone import pick_attention, pick_device, pick_precision, place
from config import HERE, read_config, resolve_group
from data import Corpus, encode, length_batches, locate, run_main, token_batches
from evaluate import predict
from speed import first_position_only

SIZES = {               # layers, width, attention heads
    "tiny": (3, 192, 4),                # as sample/backbone
    "small": (6, 256, 4),
    "base": (12, 768, 12),              # XLM-R-base
    "large": (24, 1024, 16),            # XLM-R-large, the paper's
}
WARM_UP_STEPS = 4
CPU_EVALUATION_BATCHES = 6          # all 205 languages would take a CPU minutes in each turn


@dataclass
class Setup:
    """What all contenders share."""
    job: train.Job
    task: train.Task
    test: list              # token ids of the test sentences
    backbone: torch.nn.Module
    shortened: torch.nn.Module      # the same weights, the last layer for position 0 alone
    sizes: transformers.XLMRobertaConfig
    tokenizer: object
    device: torch.device

    @property
    def prompt_length(self):
        return self.job.config["prompt"]["length"]


# ---- The contenders ------------------------------------------------------------------------------

class Contender:
    """Takes turns. `batches` holds, for each batch, the lengths of its texts in tokens."""
    trains = True
    floor = None            # the contender that does the same without any overhead

    def __init__(self, name, batches):
        self.name = name
        self.batches = batches
        self.seconds = []           # of each turn
        self.gigabytes = 0.0        # a turn's peak on the GPU, beyond what was held before it

    def run(self, steps):
        """Go through the first batches -> seconds."""
        raise NotImplementedError

    def count_texts(self):
        return sum(len(lengths) for lengths in self.batches)

    def count_tokens(self, prompt_length):
        """Tokens and prompt rows; padding is no work that anybody wants."""
        return sum(lengths.sum() + prompt_length * len(lengths) for lengths in self.batches)

    def padding(self):
        """Share of the text positions that are padding."""
        positions = sum(len(lengths) * lengths.max() for lengths in self.batches)
        return 1 - sum(lengths.sum() for lengths in self.batches) / positions


class TimedLearner(train.Learner):
    """A learner that keeps and writes nothing."""

    def record_evaluation(self, *_):
        pass


class Ours(Contender):
    """train.py's loop with K learners in one pass."""

    def __init__(self, setup, K, batches):
        super().__init__(f"ours x {K}", batches)
        self.setup = setup
        job = setup.job
        self.learners = []
        for seed in range(K):
            learner = TimedLearner("no folder", seed, job.languages, {"training": {}})
            learner.task = setup.task
            learner.build(job, setup.backbone)
            self.learners.append(learner)
        self.model = train.join_learners(self.learners, setup.shortened, job.reads)
        self.autocast = place(self.model, setup.device, job.cfg["amp"], job.cfg["frozen_weights"])

    def run(self, steps):
        device, pad_id = self.setup.device, self.setup.tokenizer.pad_token_id
        # one evaluation, at the end, and of one sentence (see read_setup); no checkpoint
        cfg = dict(self.setup.job.cfg)
        cfg.update(steps=steps, evaluate_every=steps, checkpoint_every=steps + 1)
        for learner in self.learners:
            learner.prepare(cfg, steps, device)
        start = timer()
        train.train(self.learners, self.model, self.autocast, cfg, pad_id, device, quiet=True)
        return timer() - start


class Floor(Contender):
    """The backbone alone, on full rectangles of as many texts and (rounded) tokens as `batches`."""

    def __init__(self, name, setup, autocast, batches, trains=True):
        super().__init__(name, batches)
        self.trains = trains
        self.backbone = setup.backbone
        self.autocast = autocast
        self.words = setup.backbone.get_input_embeddings()
        prompt = torch.randn_like(self.words.weight[None, :setup.prompt_length])
        self.prompt = prompt.requires_grad_()                                   # (1, P, H)
        # what is differentiated: the plain sum of a LayerNorm's output has no gradient
        self.direction = torch.randn(setup.sizes.hidden_size, device=setup.device)
        self.input_ids = []
        for lengths in batches:
            shape = len(lengths), round(lengths.mean())
            random_ids = torch.randint(5, len(self.words.weight), shape, device=setup.device)
            self.input_ids.append(random_ids)

    def padding(self):
        return 0.0

    def run(self, steps):
        self.backbone.train(self.trains)
        start = timer()
        for input_ids in self.input_ids[:steps]:
            prompt = self.prompt.expand(len(input_ids), -1, -1)                 # (B, P, H)
            with torch.set_grad_enabled(self.trains), self.autocast():
                x = torch.cat((prompt, self.words(input_ids)), dim=1)           # (B, P+T, H)
                h = self.backbone(inputs_embeds=x)[0]
            if self.trains:
                (h[:, 0].float() @ self.direction).sum().backward()
        return timer() - start


class Toolkit(Contender):
    """micm-nlp as its authors ran it: Adafactor, sentences grouped by length, autocast, no logs."""

    def __init__(self, setup, n_batches):
        size, lengths = setup.job.cfg["batch_size"], setup.task.lengths
        order = get_length_grouped_indices(lengths.tolist(), size)  # the Trainer's, of one epoch
        batches = np.split(order, range(size, len(order), size))
        # they come sorted in parts: take them evenly from the epoch
        batches = batches[::max(1, len(batches) // n_batches)][:n_batches]
        super().__init__("toolkit", [lengths[indices] for indices in batches])
        self.setup = setup
        self.texts = []
        for i in np.concatenate(batches):
            ids = setup.task.ids["train"][i].tolist()
            label = int(setup.task.labels["train"][i])
            self.texts.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label})
        self.model = self.make_model(setup)

    @staticmethod
    def make_model(setup):
        from micm_nlp.models.xpe import get_xpe_model
        prompt = setup.job.config["prompt"]
        arguments = dict(
            peft_type="XPE", task_type="SEQ_CLS", num_virtual_tokens=prompt["length"],
            encoder_reparameterization_type="MLP", encoder_ratio=1.0,
            encoder_hidden_size=setup.sizes.hidden_size // 4, encoder_num_layers=prompt["layers"],
            encoder_dropout=prompt["dropout"], encoder_freeze=False, encoder_embedding_freeze=False)
        classifier = transformers.XLMRobertaForSequenceClassification(setup.sizes)
        with redirect_stdout(io.StringIO()):        # it prints its layers
            return get_xpe_model(classifier, arguments).to(setup.device)

    def run(self, steps):
        cfg, device = self.setup.job.cfg, self.setup.device
        collator = transformers.DataCollatorWithPadding(self.setup.tokenizer)
        with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=cfg["batch_size"],
                optim="adafactor", train_sampling_strategy="sequential", bf16=cfg["amp"] == "bf16",
                use_cpu=device.type == "cpu", save_strategy="no", logging_strategy="no",
                report_to="none", disable_tqdm=True)
            trainer = transformers.Trainer(self.model, arguments, collator, self.texts)
            return trainer.train().metrics["train_runtime"]     # without what comes before step 1


class Evaluation(Contender):
    """predict() over test sentences."""
    trains = False

    def __init__(self, setup, ours, budget):
        lengths = np.array([len(ids) for ids in setup.test])
        batches = token_batches(lengths, budget, setup.prompt_length)
        if setup.device.type == "cpu":
            every = math.ceil(len(batches) / CPU_EVALUATION_BATCHES)
            batches = batches[every // 2::every]        # they come longest first
        super().__init__("evaluation", [lengths[indices] for indices in batches])
        self.setup = setup
        self.ours = ours
        self.budget = budget
        self.texts = [setup.test[i] for i in np.concatenate(batches)]

    def run(self, steps):
        pad_id = self.setup.tokenizer.pad_token_id
        start = timer()
        predict(self.ours.model, self.texts, pad_id, budget=self.budget,
                autocast=self.ours.autocast)
        return timer() - start


# ---- Setting up ----------------------------------------------------------------------------------

def read_setup(args, device):
    """Read corpus and tokenizer, make a random backbone -> Setup."""
    config = read_config()
    corpus = Corpus(locate(args.data)[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    max_length = config["data"]["max_length"]
    present = corpus.languages()
    sources = [code for code in resolve_group(config, "joshi5") if code in present]
    task = train.Task(corpus, sources, tokenizer, max_length, balanced=False)
    task.ids["dev"] = task.ids["dev"][:1]       # train.py ends with an evaluation: a short one here
    texts = []
    for language in present:
        texts += [sentence.text for sentence in corpus.read(language, "test")]
    test, _ = encode(texts, tokenizer, max_length)
    print(f"training: {len(task.lengths):,} sentences of {task.lengths.mean():.0f} tokens in "
          f"{len(sources)} languages; test: {len(test):,} sentences in {len(present)}")

    amp = pick_precision(args.amp, device)
    attention = pick_attention(args.attention, device, amp)
    layers, width, heads = SIZES[args.size]
    sizes = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * width, max_position_embeddings=514,
        type_vocab_size=1, num_labels=len(corpus.labels), pad_token_id=tokenizer.pad_token_id)
    backbone = transformers.AutoModel.from_config(sizes, attn_implementation=attention)
    backbone.pooler = None
    print(f"{args.size}, {'float32' if amp == 'off' else amp}, {attention}")
    cfg = dict(train.settings_for(config, "xpe", None), amp=amp)
    job = train.Job(config, cfg, "xpe", None, "joshi5", sources, corpus, {}, "prompt", max_length)
    # before any contender converts the weights: in bf16 the check of equal states would fail
    shortened = first_position_only(backbone)
    return Setup(job, task, test, backbone, shortened, sizes, tokenizer, device)


def first_epoch(task, batch_size, K):
    """-> the lengths of the texts in each joint batch of train.py's first epoch with K learners."""
    orders = [length_batches(task.lengths, batch_size, seed, epoch=0) for seed in range(K)]
    return [task.lengths[np.concatenate(indices)] for indices in zip(*orders)]


def make_contenders(setup, learner_counts, steps):
    """-> all Contenders, in the order of the table. `steps`: K x steps of a turn; 0: an epoch's."""
    contenders = []
    for K in learner_counts:
        batches = first_epoch(setup.task, setup.job.cfg["batch_size"], K)
        batches = batches[:max(2, (steps or len(batches)) // K)]
        ours = Ours(setup, K, batches)
        ours.floor = Floor(f"floor x {K}", setup, ours.autocast, batches)
        contenders += [ours, ours.floor]
    first = contenders[0]
    if find_spec("micm_nlp"):
        toolkit = Toolkit(setup, len(first.batches))
        toolkit.floor = first.floor
        contenders.append(toolkit)
    else:
        print("toolkit: left out, for micm-nlp is not installed (pip install micm-nlp)")
    evaluation = Evaluation(setup, first, setup.job.cfg["tokens"])
    evaluation.floor = Floor("its floor", setup, first.autocast, evaluation.batches, trains=False)
    return contenders + [evaluation, evaluation.floor]


# ---- Measuring -----------------------------------------------------------------------------------

def take_turns(contenders, turns, on_gpu):
    """Let all contenders run one after the other, `turns` times, after a warm-up."""
    for contender in contenders:
        contender.run(WARM_UP_STEPS)
    for _ in tqdm(range(turns), unit=" turns", leave=False, disable=None):
        for contender in contenders:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            contender.seconds.append(contender.run(len(contender.batches)))
            if on_gpu:
                contender.gigabytes = (torch.cuda.max_memory_allocated() - held) / 1e9


def show_table(contenders, batch_size, prompt_length):
    """One line a contender. A step is one of one learner; ratios compare tokens a second."""
    rates = {}
    for contender in contenders:
        rates[contender.name] = contender.count_tokens(prompt_length) / np.array(contender.seconds)
    print(f"\n{'':<12}{'steps/s':>9}{'sentences/s':>13}{'of floor':>10}{'x toolkit':>11}"
          f"{'padding':>9}{'GB':>7}")
    for contender in contenders:
        rate = rates[contender.name]
        sentences = contender.count_texts() / np.median(contender.seconds)
        steps = of_floor = times_toolkit = gigabytes = "-"
        if contender.trains:
            steps = f"{sentences / batch_size:.2f}"
        if contender.floor:
            of_floor = f"{np.median(rate / rates[contender.floor.name]):.2f}"
        if contender.trains and "toolkit" in rates:
            times_toolkit = f"{np.median(rate / rates['toolkit']):.2f}"
        if contender.gigabytes:
            gigabytes = f"{contender.gigabytes:.2f}"
        print(f"{contender.name:<12}{steps:>9}{sentences:>13.0f}{of_floor:>10}{times_toolkit:>11}"
              f"{contender.padding():>9.1%}{gigabytes:>7}")


def describe_machine(device):
    """What the figures were measured on."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
        machine = f"CPU with {instructions}, {torch.get_num_threads()} threads"
    return f"{machine}; torch {torch.__version__}, transformers {transformers.__version__}"


def main(argv=None):
    """Set up, take turns, print the table -> exit status."""
    parser = argparse.ArgumentParser(description="Speed beside the authors' toolkit.")
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny")
    add("--device", default="auto", help="cpu, cuda (default: auto)")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="precision (default: auto)")
    add("--attention", choices=("auto", "sdpa", "eager"), default="auto",
        help="the backbone's; the toolkit keeps transformers' default (default: auto)")
    add("--data", default=str(HERE / "sample" / "sib200"), help="a corpus, as for train.py")
    add("--tokenizer", default=str(HERE / "sample" / "backbone"), help="a folder, or on the hub")
    add("--learners", default="1,3,10", metavar="K", help="learners in a pass (default: 1,3,10)")
    add("--steps", type=int, default=0, help="K x steps of one turn (default: an epoch's)")
    add("--turns", type=int, default=3, help="turns of each contender (default: 3)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    print(describe_machine(device))
    setup = read_setup(args, device)
    learner_counts = [int(K) for K in args.learners.split(",")]
    contenders = make_contenders(setup, learner_counts, args.steps)
    take_turns(contenders, args.turns, device.type == "cuda")
    show_table(contenders, setup.job.cfg["batch_size"], setup.prompt_length)
    return 0


if __name__ == "__main__":
    run_main(main)
