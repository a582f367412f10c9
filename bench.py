"""Speed of training and evaluation, beside the bare backbone and the authors' toolkit.

No part of the paper: nothing else imports this file. Contenders take turns in one process, because
machines drift: read the ratios, which are of tokens a second (prompt rows counted, padding not) and
medians over the turns. All options but its own are train.py's; texts, backbone and sizes are those
of the job that they describe, by default sample/config.yaml's.

    ours x K      train.py's own loop: XPE, K learners in one pass
    floor         the bare backbone on as many texts of equal length, forward, and in training
                  backward to its input: without padding, mask, prompt, head or optimizer; its
                  weights are random, which changes no speed
    toolkit       micm-nlp, the authors' library, on transformers' Trainer, with the batches of
                  ours x 1 (pip install micm-nlp)
    evaluation    evaluate.py's predict() on the sentences of ours x 1; its floor goes forward only

    python bench.py --learners 1,10,toolkit
    python bench.py --data Davlan/sib200 --backbone FacebookAI/xlm-roberta-large
    python bench.py --steps 20 --turns 5 --set train.amp=off    # --steps: K x steps of a turn

A backbone of another size, without its weights:

    config = transformers.XLMRobertaConfig(vocab_size=250002, hidden_size=1024,
                                           num_hidden_layers=24, num_attention_heads=16,
                                           intermediate_size=4096)
    transformers.XLMRobertaModel(config).save_pretrained("large")
    transformers.AutoTokenizer.from_pretrained(NAME_OR_FOLDER).save_pretrained("large")

Measured on one thread of a CPU with bf16 instructions (AMD EPYC, AVX512-bf16), no other program
running; torch 2.13, transformers 5.23, micm-nlp 0.5.1; 3 layers x 192, the seven sources of Joshi5:

    python bench.py --sources config.yaml --backbone sample/backbone --data SIB200
        --learners 1,10,toolkit, and

                  --steps 60 --turns 3       --steps 40 --turns 2 --set train.amp=off
                  bf16, eager (the toolkit:  float32, sdpa
                  sdpa in autocast)
                  sentences/s  of floor      sentences/s  of floor
    floor                 175      1.00              113      1.00
    ours x 1              224      1.25              151      1.34
    ours x 10             142      1.04               63      0.66
    toolkit               145      0.85               95      0.84
    evaluation: floor     542      1.00              295      1.00
    evaluation: ours      703      1.25              388      1.32

Ten learners take a tenth of the steps of a turn, four to six, and these happen to be of longer
texts. With --steps 20, two steps, they reached 1.10 in float32 (beside another program), so on a
CPU their ratio depends on the texts; how much of that is length and how much memory is not known.
Ours x 1 is faster than the bare backbone because its last layer computes one position and its
dropout is cheap: see speed.py. No GPU has been measured.
"""
import tempfile

import numpy as np
import transformers
from torch.utils.benchmark import timer         # time.perf_counter, which waits for the GPU first

import train
from backbone import place
from data import HERE, length_batches, make_parser, reading, run_main
from evaluate import predict

BATCH = 32              # sentences
P = 20                  # prompt rows
FIXED = ("--mode=xpe", "--set=evaluate.after_training=false", "--set=train.evaluate_every=0",
         "--set=train.checkpoint_every=999999", "--set=train.epochs=0", "--set=train.accumulate=1",
         f"--set=train.batch_size={BATCH}", f"--set=prompt.length={P}")


def read_job(options):
    """What all contenders share -> the namespace of train.read_job and train.prepare_backbone.

    More in it: task, see train.Task.
    """
    args = train.parse_arguments(["--sources", f"{HERE}/sample/config.yaml", *options, *FIXED])
    job = train.read_job(args)
    job.quiet = True
    job.arrived = []
    train.prepare_backbone(job)
    job.task = train.Task(job, job.languages)
    job.task.ids["dev"] = job.task.ids["dev"][:1]       # the loop ends with an evaluation
    return job


# ---- Contenders: each is the lengths of its texts in tokens, and a function that runs a turn -----

def make_ours(job, K, steps, trains=True):
    """train.py's loop with K learners in one pass, or evaluate.py's predict() with one; steps: of
    all learners together. Puts the backbone on its device."""
    learners = []
    batches = []
    for seed in range(K):
        learner = train.Learner("no folder", seed, {"training": {}}, job.task)
        learner.record_evaluation = lambda *_: None     # it keeps and writes nothing
        learner.build(job)
        learners.append(learner)
        order = length_batches(job.task.lengths, BATCH, seed, epoch=0)
        batches += order[:max(1, steps // K)]
    model = train.join_learners(learners, job)
    job.autocast = place(model, job.device, job.cfg["amp"], job.cfg["frozen_weights"])
    indices = np.concatenate(batches)
    texts = [job.task.ids["train"][i] for i in indices]

    def run():
        if trains:
            job.task.steps = len(batches) // K
            train.train(learners, model, job, checkpoint=None)
        else:
            predict(model, [texts], job.pad_id, autocast=job.autocast)

    return job.task.lengths[indices], run


def make_floor(job, lengths, trains):
    """The backbone alone, on batches of texts that are all of the mean length: no padding."""
    T = round(lengths.mean())
    count = -(-len(lengths) // BATCH)
    whole = transformers.AutoModel.from_config(job.backbone.config)     # not shortened
    whole.to(job.device, job.backbone.dtype).requires_grad_(False)
    weight = whole.get_input_embeddings().weight

    def run():
        whole.train(trains)
        for _ in range(count):
            x = weight.new_zeros(BATCH, P + T, weight.shape[1], requires_grad=trains)
            with job.autocast():
                h = whole(inputs_embeds=x)[0]       # (B, P+T, H)
            if trains:
                h[:, 0].exp().sum().backward()      # a LayerNorm's sum alone has no gradient

    return np.full(count * BATCH, T), run


def make_toolkit(job, steps):
    """micm-nlp on the batches of ours x 1, with Adafactor, autocast and no logs."""
    with reading("toolkit: pip install micm-nlp"):
        from micm_nlp.models.xpe import get_xpe_model
    task = job.task
    batches = length_batches(task.lengths, BATCH, seed=0, epoch=0)[:steps]
    # the Trainer cuts 32 by 32, so a smaller batch goes last
    indices = np.concatenate(sorted(batches, key=len, reverse=True))
    texts = [{"input_ids": task.ids["train"][i], "labels": task.labels["train"][i]}
             for i in indices]
    config = job.backbone.config
    config.num_labels = len(job.corpus.labels)
    model = get_xpe_model(transformers.XLMRobertaForSequenceClassification(config), dict(
        task_type="SEQ_CLS", num_virtual_tokens=P, encoder_ratio=1.0, encoder_dropout=0.1,
        encoder_hidden_size=config.hidden_size // 4, encoder_freeze=False,
        encoder_embedding_freeze=False))

    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=BATCH,
        optim="adafactor", train_sampling_strategy="sequential", bf16=job.cfg["amp"] == "bf16",
        use_cpu=job.device.type == "cpu", save_strategy="no", disable_tqdm=True)
    collator = transformers.DataCollatorWithPadding(job.tokenizer)
    trainer = transformers.Trainer(model, arguments, collator, texts)
    return task.lengths[indices], trainer.train


# ---- Measuring -----------------------------------------------------------------------------------

def measure(title, contenders, turns):
    """Let all contenders run one after the other, and print the medians over the turns. Ratios
    compare tokens a second, prompt rows counted, padding not."""
    rates = {name: [] for name in contenders}
    for _ in range(1 + turns):
        for name, (lengths, run) in contenders.items():
            start = timer()
            run()
            seconds = timer() - start
            rates[name].append((P + lengths).sum() / seconds)
    print(f"\n{title:<12}  sentences/s  of floor")
    for name, (lengths, _) in contenders.items():
        rate = np.array(rates[name][1:])            # the first turn warms up
        sentences = np.median(rate) / (P + lengths.mean())
        of_floor = np.median(rate / rates["floor"][1:])
        print(f"{name:<12}{sentences:>13.0f}{of_floor:>10.2f}")


# ---- The command ---------------------------------------------------------------------------------

OPTIONS = """
--learners LIST=1,3,10  K of ours, and toolkit, separated by commas
--steps N=999999  K x steps of one turn; an epoch's at most
--turns N=3  turns of each contender
"""


def main(argv=None):
    """Set up the contenders and let them run."""
    parser = make_parser("Speed beside the bare backbone and the authors' toolkit.", OPTIONS)
    args, options = parser.parse_known_args(argv)
    steps = int(args.steps)
    turns = int(args.turns)
    job = read_job(options)
    print(job.device, job.cfg["amp"], job.backbone.config._attn_implementation)

    lengths, evaluate = make_ours(job, 1, steps, trains=False)
    training = {"floor": make_floor(job, lengths, trains=True)}
    for name in args.learners.split(","):
        if name == "toolkit":
            training[name] = make_toolkit(job, steps)
        else:
            training[f"ours x {name}"] = make_ours(job, int(name), steps)
    measure("training", training, turns)
    evaluation = {"floor": make_floor(job, lengths, trains=False), "ours": (lengths, evaluate)}
    measure("evaluation", evaluation, turns)


if __name__ == "__main__":
    run_main(main)
