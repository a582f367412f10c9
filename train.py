"""Train soft prompts on source languages with the backbone frozen.

The paper's method and experimental setup; config.yaml holds the recipe, setting by setting.

    python train.py --mode xpe --sources config.yaml                # the paper: XLM-R-large, Joshi5
    python train.py --mode dual --ratio 0.3 --sources config.yaml --seeds 11-20
    python train.py --mode xpe --sources sample/config.yaml         # in miniature, offline
    python train.py --sources config.yaml --adapt runs/xpe-joshi5-s11 --group diverse_unseen
    torchrun --nproc_per_node=2 train.py ... --seeds 11-14          # each process trains its share

A *learner* is one prompt in training: its seed, data, prompt, head, optimizer and schedule.
Learners with equally many sentences (ten seeds, say) share a *pass*: their batches go through the
frozen backbone side by side. One learner alone is the paper's case, and the loop reads the same.

Read downwards: data, rates, the learner, `train` (the loop), passes, the command.
"""
import copy
import json
import math
import os
import shlex
import signal
import sys
import warnings
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save
from tqdm import tqdm

import xpe
from backbone import cheap_dropout, load_backbone, pick_device, pick_precision, place
from config import dump_config, read_config, resolve_group, resolve_targets
from data import (HERE, check, collate, encode, find_leaks, fingerprint, length_batches,
                  make_parser, nearest, open_corpus, reading, run_main, shorten_list,
                  split_commas, warn)
from evaluate import accuracy, majority, predict, score_runs
from runs import (DIVERGED, Run, command_of, differences, method_name, open_log, outcome,
                  read_checkpoint, read_json, save_checkpoint, save_prompt, write_atomically)

# What a checkpoint keeps of a learner: plain values, and parts with a state of their own
VALUES = ("best", "best_tensors", "lowest_loss", "waited", "stopped", "log_bytes")
PARTS = ("modules", "optimizer", "schedule", "scaler")

# Under fp16 a first step that overflows is left out, as it should be; torch takes it for a mistake
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")


# ---- The data of a task --------------------------------------------------------------------------

class Task:
    """Training and dev sentences of some languages, tokenized; all seeds share them.

    .ids, .labels: {"train" or "dev": token ids of n texts, tensor (n,)}; .lengths (n,) in training.
    """

    def __init__(self, job, languages):
        cfg = job.cfg
        self.ids = {}
        self.labels = {}
        everything = []
        for split in ("train", "dev"):
            sentences = [s for language in languages for s in job.corpus.read(language, split)]
            texts = [sentence.text for sentence in sentences]
            self.ids[split] = encode(texts, job.tokenizer, job.max_length)
            self.labels[split] = torch.tensor([sentence.label for sentence in sentences])
            everything += sentences
        self.fingerprint = fingerprint(everything)
        self.lengths = np.array([len(ids) for ids in self.ids["train"]])

        ids = np.concatenate(self.ids["train"])
        unknown = np.mean(ids == job.tokenizer.unk_token_id)
        check(unknown < 0.7, f"{unknown:.0%} of the tokens of {', '.join(languages)} are unknown "
                             f"to the tokenizer: its files are missing, or another model's")
        size = len(self.lengths)
        batches = math.ceil(size / cfg["batch_size"])
        self.epoch_steps = math.ceil(batches / cfg["accumulate"])           # of the optimizer
        self.steps = cfg["epochs"] * self.epoch_steps or cfg["steps"]       # of the whole run
        self.evaluate_every = cfg["evaluate_every"] or self.epoch_steps
        if size < cfg["batch_size"]:
            warn(f"{size} training sentences are fewer than train.batch_size")
        counts = np.bincount(self.labels["train"], minlength=len(job.corpus.labels))
        for number in np.flatnonzero(counts == 0):
            warn(f"no training sentence has the label {job.corpus.labels[number]}")
        weights = np.ones(len(counts))
        if cfg["class_weights"] == "balanced":  # n / (classes x count), as in scikit-learn
            weights = size / (len(counts) * counts.clip(min=1))
        self.class_weights = torch.tensor(weights, dtype=torch.float32, device=job.device)


# ---- Rates: which tensor moves how fast ----------------------------------------------------------

def parameter_groups(modules, cfg):
    """Trainable tensors with their rates, as torch's optimizers take them: [{params, lr, ...}].

    paper: the standard rows have a rate of their own and no decay; biases and norms never decay.
    The embedding of the encoded rows has its own settings, too: see config.yaml.
    """
    own = {"prompt.standard": "standard_", "prompt.encoded": "encoded_"}
    groups = defaultdict(list)
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad:
            prefix = own.get(name, "")
            decay = cfg[prefix + "weight_decay"]
            if "bias" in name or "norm" in name.lower():    # as transformers' Trainer decides it
                decay = 0.0
            groups[cfg[prefix + "rate"], decay].append(parameter)
    return [dict(params=parameters, lr=rate, weight_decay=decay)
            for (rate, decay), parameters in groups.items()]


def make_optimizer(groups, name):
    """paper: Adafactor at fixed rates, clip threshold 1, decay -0.8, no momentum."""
    if name == "adamw":
        return torch.optim.AdamW(groups)
    return transformers.Adafactor(groups, relative_step=False, scale_parameter=False,
                                  clip_threshold=1.0, decay_rate=-0.8)


def make_schedule(optimizer, steps, cfg):
    """paper: linear warm-up, then a cosine with hard restarts. `linear` falls to zero instead."""
    warmup = math.ceil(steps * cfg["warmup"])
    if cfg["schedule"] == "linear":
        return transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    return transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, warmup, steps, num_cycles=cfg["cycles"])


# ---- The learner ---------------------------------------------------------------------------------

@dataclass
class Learner:
    """One prompt in training. `build` adds modules, optimizer, schedule, scaler and loss_sum."""

    folder: Path
    seed: int
    meta: dict                  # becomes prompt.json; prepare_learners fills it in
    task: Task = None
    log: object = None          # metrics.jsonl, open and locked
    log_bytes: int = 0          # its length
    best: dict = None           # the line of it with the best dev accuracy
    best_tensors: dict = None   # of this step, on the CPU
    lowest_loss: float = math.inf       # on the dev split, since patience counts
    waited: int = 0             # evaluations without a lower one
    stopped: str = ""           # why it has ended; empty while it goes on

    def build(self, job):
        """Make prompt and head (from the seed, or a copy of the source run's), optimizer, schedule
        and loss scaler. `modules` is everything that may be trained."""
        torch.manual_seed(self.seed)
        self.modules = torch.nn.ModuleDict()
        if job.mode != "full":
            prompt = xpe.SoftPrompt(**job.prompt)
            # the baseline `head`: a random prompt that stays random
            self.modules["prompt"] = prompt.requires_grad_(job.mode != "head")
        self.modules["head"] = xpe.ClassificationHead(**job.head)
        if job.mode == "full":
            # the next learner starts from the same weights
            self.modules["backbone"] = copy.deepcopy(job.backbone)
        if job.source:
            self.modules.load_state_dict(job.source.modules.state_dict())
        self.modules.to(job.device)
        self.meta["training"]["trainable"] = sum(
            p.numel() for p in self.modules.parameters() if p.requires_grad)
        groups = parameter_groups(self.modules, job.cfg)
        self.optimizer = make_optimizer(groups, job.cfg["optimizer"])
        self.schedule = make_schedule(self.optimizer, self.task.steps, job.cfg)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.cfg["amp"] == "fp16")
        self.loss_sum = torch.zeros((), device=job.device)      # since the last evaluation

    def update(self, clip):
        """Clip the gradient of this learner, take one step, move the schedule on."""
        self.scaler.unscale_(self.optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()

    def record_evaluation(self, step, logits, cfg):
        """Take in logits (n, C) of the dev split: keep the best tensors, log, decide on a stop ->
        the accuracy in percent."""
        task = self.task
        labels = task.labels["dev"]
        train_loss = float(self.loss_sum) / ((step - 1) % task.evaluate_every + 1)
        self.loss_sum.zero_()
        dev_loss = float(F.cross_entropy(logits, labels))
        dev_accuracy = accuracy(labels, logits.argmax(dim=1))
        if not math.isfinite(dev_loss + train_loss):
            self.stopped = f"diverged: the loss is no longer finite at step {step}"
            return dev_accuracy         # an earlier best, if there is one, is the result
        line = {"step": step, "loss": round(train_loss, 6), "dev_accuracy": round(dev_accuracy, 4),
                "dev_loss": round(dev_loss, 6)}
        if not self.best or line["dev_accuracy"] > self.best["dev_accuracy"]:
            self.best = line
            self.best_tensors = {name: tensor.cpu().clone()
                                 for name, tensor in self.modules.state_dict().items()}
        # paper: patience watches the dev *loss*, and only after half of the steps; what is kept is
        # the best *accuracy*
        if cfg["patience"] and step >= int(task.steps * cfg["patience_after"]):
            self.waited += 1
            if dev_loss < self.lowest_loss:
                self.lowest_loss = dev_loss
                self.waited = 0
            if self.waited >= cfg["patience"]:
                self.stopped = f"no lower dev loss in {self.waited} evaluations"
        if step == task.steps:
            self.stopped = "all steps"
        with reading(self.log.name):            # names the file of a full disk
            print(json.dumps(line), file=self.log, flush=True)
        self.log_bytes = self.log.tell()
        return dev_accuracy

    def check_settings(self, before):
        """Raise ValueError unless before["settings"] are those of this run."""
        changed = differences(before["settings"], self.meta["training"]["settings"])
        check(not changed, f"{changed}: --resume goes on with the same settings only")

    def state_dict(self):
        """Everything needed to resume."""
        parts = {part: getattr(self, part).state_dict() for part in PARTS}
        values = {name: getattr(self, name) for name in VALUES}
        return dict(parts, **values, settings=self.meta["training"]["settings"],
                    loss_sum=self.loss_sum)

    def load_state_dict(self, state):
        """Go on from what state_dict gave; ValueError if it was begun with other settings."""
        self.check_settings(state)
        for name in VALUES:
            setattr(self, name, state[name])
        for part in PARTS:
            getattr(self, part).load_state_dict(state[part])
        self.loss_sum.copy_(state["loss_sum"])
        # lines after the checkpoint will be written again
        self.log.truncate(self.log_bytes)

    def finish(self):
        """Write the best tensors as a prompt folder; if there are none, the reason."""
        modules = self.modules
        best_tensors = self.best_tensors
        # in full fine-tuning, gigabytes for each seed
        self.optimizer = self.schedule = self.modules = self.best_tensors = None
        rates = "train.rate (and standard_rate, encoded_rate: of the prompt's rows)"
        if best_tensors is None:
            warn(f"{self.folder}: {self.stopped}; nothing to keep: remove the folder and lower "
                 f"{rates}")
            write_atomically(self.folder / DIVERGED, self.stopped.encode())
            return
        modules.load_state_dict(best_tensors)
        if "backbone" in modules:
            tensors = modules.pop("backbone").cpu().state_dict()
            write_atomically(self.folder / "backbone.safetensors", save(tensors, {"format": "pt"}))
        best = self.best
        self.meta["training"].update(best, stopped=self.stopped)
        save_prompt(self.folder, modules, self.meta)
        tqdm.write(f"{self.folder}: dev accuracy {best['dev_accuracy']:.1f} at step "
                   f"{best['step']}, {self.stopped}")
        if best["dev_accuracy"] < majority(self.task.labels["dev"]) + 1:
            warn(f"{self.folder}: no better than the majority class of the dev split: raise "
                 f"{rates}, or train for more steps")


# ---- The loop ------------------------------------------------------------------------------------

def join_batches(learners, parts, job):
    """B sentences of each learner (parts: their indices), side by side -> input_ids, mask (K*B, T),
    labels (K*B,)."""
    rows = []
    labels = []
    for learner, indices in zip(learners, parts):
        rows += [learner.task.ids["train"][i] for i in indices]
        labels.append(learner.task.labels["train"][indices])
    batch = *collate(rows, job.pad_id), torch.cat(labels)
    return [tensor.to(job.device, non_blocking=True) for tensor in batch]


def train(learners, model, job, checkpoint, start=0):
    """Train the K learners of a pass until each has stopped; a signal ends the process.

    `model` holds their prompts and heads; all have equally many sentences. `job`: see read_job;
    `checkpoint`: its path; `start`: its step.
    """
    cfg = job.cfg
    task = learners[0].task
    saved_at = start
    batches = None
    evaluated = True
    for step in tqdm(range(start + 1, task.steps + 1), initial=start, total=task.steps,
                     unit=" steps", disable=job.quiet or None):
        if evaluated:           # it leaves the model in evaluation mode; so does loading it
            model.train()
            # paper: the backbone is frozen, but its dropout is active
            model.backbone.train(cfg["dropout"])

        # each epoch has its own order, a pure function of seed and epoch
        epoch, position = divmod(step - 1, task.epoch_steps)
        if batches is None or position == 0:
            orders = [length_batches(learner.task.lengths, cfg["batch_size"], learner.seed, epoch)
                      for learner in learners]
            batches = list(zip(*orders))            # of each batch the K parts
        first = position * cfg["accumulate"]
        accumulated = batches[first:first + cfg["accumulate"]]

        for parts in accumulated:
            ids, mask, labels = join_batches(learners, parts, job)
            with job.autocast(), cheap_dropout(job.device):
                logits = model(ids, mask)                           # (K*B, C)
            K = len(learners)
            total = 0.0
            for learner, block, wanted in zip(learners, logits.float().chunk(K), labels.chunk(K)):
                # ours: divided by sentences; class weights would cancel in a batch of one
                loss = F.cross_entropy(block, wanted, learner.task.class_weights, reduction="sum")
                loss = loss / len(wanted) / len(accumulated)
                learner.loss_sum += loss.detach()       # reading it would wait for the GPU
                total = total + learner.scaler.scale(loss)
            total.backward()

        for learner in learners:        # paper: each clips and steps by itself
            learner.update(cfg["clip"])
        evaluated = step % task.evaluate_every == 0 or step == task.steps
        if evaluated:
            evaluate_learners(learners, model, step, job)
        stopped = any(learner.stopped for learner in learners)
        due = evaluated and step - saved_at >= cfg["checkpoint_every"]
        if stopped or due or job.arrived:
            save_checkpoint(checkpoint, learners, step)
            saved_at = step
        if job.arrived:
            print("interrupted; the same command with --resume goes on")
            sys.exit(130)
        if stopped:
            learners = finish_stopped(learners)
            if not learners:
                return
            batches = None
            model = join_learners(learners, job)


def evaluate_learners(learners, model, step, job):
    """Evaluate each learner on its own dev split, all in one go."""
    texts = [learner.task.ids["dev"] for learner in learners]
    logits = predict(model, texts, job.pad_id, job.config["evaluate"]["tokens"], job.autocast)
    accuracies = [learner.record_evaluation(step, own_logits, job.cfg)
                  for learner, own_logits in zip(learners, logits)]
    if not job.quiet:
        tqdm.write(f"step {step:>6,} of {learners[0].task.steps:,}: dev accuracy "
                   f"{np.mean(accuracies):.1f}")


def finish_stopped(learners):
    """Write the results of learners that have stopped -> those that go on."""
    for learner in learners:
        if learner.stopped:
            learner.finish()
    return [learner for learner in learners if not learner.stopped]


def join_learners(learners, job):
    """-> the PromptedClassifier that holds the prompts and heads of learners in training."""
    heads = [learner.modules["head"] for learner in learners]
    if job.mode == "full":      # one learner alone, with a backbone of its own
        backbone = learners[0].modules["backbone"]
        return xpe.PromptedClassifier(backbone, None, heads, job.reads, frozen=False)
    prompts = [learner.modules["prompt"] for learner in learners]
    return xpe.PromptedClassifier(job.backbone, prompts, heads, job.reads)


@contextmanager
def catch_signals():
    """Ctrl-C and a scheduler's signals go into a list: the step ends and a checkpoint is written.
    A second one ends the process at once."""
    arrived = []
    with ExitStack() as usual_handlers:         # on closing it puts them back

        def note(number, _):
            arrived.append(number)
            usual_handlers.close()

        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)            # Windows lacks the last two
            # nohup asks for SIGHUP to be ignored
            ignored = name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
            if number and not ignored:
                usual_handlers.callback(signal.signal, number, signal.signal(number, note))
        yield arrived


# ---- Passes and checkpoints ----------------------------------------------------------------------
# The learners of a command are cut into passes in order. The checkpoint of a pass is one file, in
# the folder of its first learner: whenever the process dies, there is a step at which all of them
# can go on together. A learner leaves it only after its prompt.json or diverged.txt is written.

def plan_passes(learners, size, command):
    """Group unfinished learners into passes -> [(learners, path of the checkpoint, its content or
    None)]: those with a checkpoint as it lists them, the rest from the start."""
    passes = []
    alike = defaultdict(list)
    rest = {learner.folder.name: learner for learner in learners}
    for learner in learners:
        path = learner.folder / "checkpoint.pt"
        if path.is_file():
            state = read_checkpoint(path)
            check(state["learners"].keys() <= rest.keys(),
                  f"{path}: its runs are resumed together: {command_of(learner.folder)}")
            passes.append(([rest.pop(name) for name in state["learners"]], path, state))
    for learner in rest.values():
        if not outcome(learner.folder):
            begun_with = command_of(learner.folder)
            check(begun_with in ("", command),
                  f"{learner.folder}: unfinished, but no run of this command has its checkpoint; "
                  f"remove the folder, or go on with the command that it was begun with: "
                  f"{begun_with}")
            # the learners of a pass have equally many sentences: then their batches are of one size
            alike[len(learner.task.lengths)].append(learner)
    for group in alike.values():
        for i in range(0, len(group), size):
            passes.append((group[i:i + size], group[i].folder / "checkpoint.pt", None))
    return passes


def run_pass(job, learners, path, state):
    """Train the learners of a pass."""
    cfg = job.cfg
    first = learners[0]
    for learner in learners:
        learner.build(job)
    start = 0
    torch.manual_seed(first.seed)           # seeds all dropout
    if state:
        start = state["step"]
        with reading(path):
            for learner in learners:
                learner.load_state_dict(state["learners"][learner.folder.name])
            for set_state, random in zip((torch.set_rng_state, torch.cuda.set_rng_state),
                                         state["random"]):
                set_state(random)
        state.clear()       # gigabytes in full fine-tuning
    else:
        for learner in learners:
            learner.log.truncate(0)
            text = f"# {job.args.command}\n".encode() + dump_config(job.config)
            write_atomically(learner.folder / "config.yaml", text)
    print(f"{job.mode}: {len(learners)} x {first.meta['training']['trainable']:,} trainable "
          f"numbers, {len(first.task.lengths):,} sentences of {job.group}, {first.task.steps:,} "
          f"steps; {job.device.type}, {cfg['amp'].replace('off', 'float32')}", flush=True)
    learners = finish_stopped(learners)     # a crash may have come between checkpoint and result
    if learners:
        model = join_learners(learners, job)
        job.autocast = place(model, job.device, cfg["amp"], cfg["frozen_weights"])
        train(learners, model, job, path, start)
    path.unlink(missing_ok=True)


# ---- The command ---------------------------------------------------------------------------------

OPTIONS = """
--sources FILE  settings file over config.yaml; its `sources:` names the group to train on
--mode MODE  spt, xpe, dual, or the baselines head and full
--ratio SHARE  with --mode dual: share of encoded rows
--group NAME  another group of the settings file
--languages CODES  these languages instead, separated by commas
--seeds SEEDS  11, 11-20 or 11,15 (default: 11; with --adapt the seed of RUN)
--data DIR  folder <language>/{train,dev,test}.tsv, or a dataset on the hub
--backbone NAME  folder, or a model on the hub
--steps N  optimizer steps at most
--adapt RUN  a run, to be adapted to each language of the group; its prompt settings stay
--out DIR=runs  where the run folders go
--resume  go on with runs that were interrupted
--device NAME=auto  cpu, cuda, cuda:1 ...; auto: a GPU if there is one
"""

# Options that stand for a setting; of an adaptation, `sources` are its targets
SETTINGS = {"steps": "train.steps", "ratio": "prompt.ratio", "data": "data.name",
            "backbone": "backbone.name", "group": "sources"}


def in_reach(script):
    """A script of this repository as one has to write it in the working directory."""
    return shlex.quote(os.path.relpath(HERE / script))


def parse_arguments(argv):
    """The command line -> argparse's namespace, with `command`: what a run is begun with."""
    parser = make_parser("Train soft prompts, the backbone frozen.", OPTIONS)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value",
                        help="any setting")
    args = parser.parse_args(argv)
    args.out = Path(args.out).expanduser()
    if args.languages:
        codes = split_commas(args.languages)
        check(codes and not args.group, "--languages takes codes, and no --group beside it")
        args.group = "+".join(codes) if len(codes) < 4 else f"{len(codes)}-languages"
        args.set.insert(0, f"groups.{args.group}={json.dumps(codes)}")
    check(args.group or not args.adapt,
          "--adapt needs its target languages: --group NAME or --languages CODES")
    for option, name in SETTINGS.items():
        value = getattr(args, option)
        if value is not None:
            # before the others: --set has the last word; quoted, or YAML would read # and :
            args.set.insert(0, f"{name}={json.dumps(value)}")
    # without --resume: the two are one command to plan_passes
    given = [argument for argument in argv or sys.argv[1:] if argument != "--resume"]
    args.command = f"python {in_reach('train.py')} {shlex.join(given)}"
    return args


def parse_seeds(text):
    """'11-13,20' -> 11, 12, 13, 20, the keys of a dict."""
    seeds = []
    with reading(f"--seeds {text}: write 11, 11-20 or 11,15"):
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
        check(seeds and max(seeds) < 2 ** 63, "no seed, or too large a one")
    return dict.fromkeys(seeds)


def read_job(args):
    """Work out what the command asks for, and check it before anything is written -> a namespace:

    args, mode, device, reads, trust (in the backbone's code); config: all settings, resolved; cfg:
    the section `train` as this mode has it, and what else the loop needs; source: the Run to adapt,
    or None; group: the name of `languages`; corpus, and data, where it is (see data.locate);
    prompt: arguments of SoftPrompt. Added later: by prepare_backbone backbone, tokenizer, identity,
    head (arguments of ClassificationHead), max_length and pad_id, by main quiet and arrived
    (signals), by run_pass autocast.
    """
    config = read_config(args.sources, args.set)
    trust = config["backbone"]["trust_remote_code"]
    source = Run(args.adapt, trust=trust) if args.adapt else None
    mode = args.mode or (source and source.meta["kind"])
    check(mode in xpe.KINDS, f"--mode {mode or 'is missing'}: one of {', '.join(xpe.KINDS)}")
    check(args.ratio is None or (mode == "dual" and not source),
          "--ratio goes with --mode dual, and not with --adapt")
    # the other modes have no section of their own
    changes = config.get("adapt" if source else mode, {})
    cfg = {**config["train"], **changes, "mode": mode,
           "dropout": config["backbone"]["dropout"]}
    check(cfg["steps"] or cfg["epochs"], "train.steps must be at least 1")
    device = pick_device(args.device)
    cfg["amp"] = pick_precision(cfg["amp"], device)
    corpus, data = open_corpus(config["data"])
    group = config["sources"]
    check(group in config["groups"], f"no group {group!r}{nearest(group, config['groups'])}")
    languages = resolve_group(config, group)
    check_corpus(corpus, languages, config, source)

    prompt = config["prompt"]
    if source:          # goes on with the prompt as it is
        check(mode == source.meta["kind"] != "full",
              f"--adapt {args.adapt}: a run of mode {source.meta['kind']} cannot be adapted as "
              f"{mode}")
        check(list(corpus.labels) == source.meta["labels"],
              f"{corpus.root}: its labels are not those of {args.adapt}")
        own = {**source.prompt.config, "reads": source.meta["reads"],
               "dropout": cfg["prompt_dropout"]}
        prompt.update({key: own[key] for key in prompt})
        config["data"]["max_length"] = source.meta["max_length"]
    elif mode != "dual":
        prompt["ratio"] = float(mode == "xpe")
    check(mode != "dual" or 0 < prompt["ratio"] < 1, "prompt.ratio: DUAL needs 0 < ratio < 1")
    if mode == "full" and prompt["reads"] == "prompt":
        prompt["reads"] = "first"           # there is no prompt: position 0 is <s>
    prompt = dict(prompt)                   # SoftPrompt's arguments, but for the width
    reads = prompt.pop("reads")
    return SimpleNamespace(args=args, config=config, cfg=cfg, mode=mode, source=source,
                           device=device, corpus=corpus, data=data, group=group,
                           languages=languages, prompt=prompt, reads=reads, trust=trust)


def check_corpus(corpus, languages, config, source):
    """Warn before training of target languages that are unknown and sentences that are not new."""
    known = corpus.files
    wanted = dict.fromkeys(sum(resolve_targets(config).values(), []))
    absent = [code + nearest(code, known) for code in wanted if code not in known]
    if absent and not source:
        warn(f"{corpus.root} lacks {len(absent)} of the target languages: {shorten_list(absent)}")
    targets = []
    if config["evaluate"]["after_training"]:
        targets = languages if source else known
        enough = all if source else any
        check(enough(corpus.read_any(code, "test") for code in targets),
              f"{corpus.root}: no test.tsv; without scoring: --set evaluate.after_training=false")
    pairs = [(languages, targets)]
    if source:      # each target has a run of its own, which goes on from the sources
        before = [code for code in source.sources if code in known]
        pairs = [([*before, code], [code]) for code in languages]
    lines = sum((find_leaks(corpus, trained, scored) for trained, scored in pairs), [])
    for line in dict.fromkeys(lines):
        warn(line)


def plan_learners(job):
    """-> a Learner for each seed; with a source run, for each seed and target language."""
    source = job.source
    if source:
        plans = [(f"{source.name}-to-{code}", {
            "sources": source.sources, "adapted_from": source.name, "adapted_to": code})
            for code in job.languages]
    else:
        name = f"{method_name(job.mode, job.prompt)}-{job.group}"
        plans = [(name, {"sources": job.languages})]
    args = job.args
    seeds = parse_seeds(args.seeds or str(source.meta.get("seed", 11) if source else 11))
    return [Learner(args.out / f"{name}-s{seed}", seed, {"seed": seed, **facts})
            for seed in seeds for name, facts in plans]


def prepare_backbone(job):
    """Load and check the backbone, and work out what depends on it."""
    settings = job.config["backbone"]
    job.backbone, job.tokenizer, job.identity = load_backbone(     # the section says where, too
        settings, settings, job.device, job.cfg["amp"], job.reads, job.mode != "full")
    job.prompt["width"], width = xpe.widths(job.backbone)
    if job.source:
        told = job.source.changes(job.identity)
        check(not told, f"--adapt {job.source.folder}: was trained on another backbone: {told}")
        # a released prompt does not say on which weights it was trained
        check(job.source.prompt.config["width"] == job.prompt["width"],
              "--adapt: was trained on a backbone of another width")
    # XLM-R's own classification head takes its dropout from the backbone's configuration
    config = job.backbone.config.to_dict()
    dropout = config.get("classifier_dropout")
    if dropout is None:
        dropout = config.get("hidden_dropout_prob", 0.1)
    job.head = {"width": width, "classes": len(job.corpus.labels), "dropout": dropout}
    room = xpe.positions(job.backbone) - (0 if job.mode == "full" else job.prompt["length"])
    job.max_length = min(job.config["data"]["max_length"], room)
    check(job.max_length > 2, "data.max_length and the backbone's positions leave no room for a "
                              "text beside <s>, </s> and the prompt")
    with torch.device("meta"):          # invalid prompt settings fail here, before training
        xpe.SoftPrompt(**job.prompt)
    job.pad_id = job.tokenizer.pad_token_id or 0


def prepare_learners(job, learners):
    """Read and tokenize their data, complete their meta, and check what has finished."""
    settings = {**job.cfg, "backbone": job.identity["fingerprint"], "reads": job.reads,
                "source": job.source and job.source.fingerprint(), "max_length": job.max_length}
    settings.update({f"prompt.{key}": value for key, value in job.prompt.items()})
    settings.pop("learners_at_once")        # only saves memory: the next passes may have another
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    tasks = {}
    for learner in learners:
        target = learner.meta.get("adapted_to")
        if target not in tasks:
            tasks[target] = Task(job, [target] if target else job.languages)
        learner.task = tasks[target]
        data = learner.task.fingerprint
        learner.meta = {"kind": job.mode, **learner.meta, "backbone": job.identity,
                        "labels": list(job.corpus.labels), "reads": job.reads,
                        "max_length": job.max_length, "data": {**job.data, "fingerprint": data},
                        "training": {"settings": {**settings, "data": data}, "versions": versions}}
        path = learner.folder / "prompt.json"
        if path.is_file():
            finished = read_json(path)
            with reading(path):
                learner.check_settings(finished["training"])


def main(argv=None):
    """Read the job, train pass by pass, score -> exit status."""
    args = parse_arguments(argv)
    job = read_job(args)
    # torchrun: each process trains its share, and none needs the others
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    job.quiet = rank > 0
    learners = plan_learners(job)[rank::world_size]
    for learner in learners:
        folder = learner.folder
        check(args.resume or not folder.exists(),
              f"{folder} exists: --resume goes on with the same settings, --out FOLDER starts "
              f"elsewhere. It was started with: {command_of(folder)}")
        if outcome(folder):
            print(f"{folder}: finished already, {outcome(folder)}")
    prepare_backbone(job)
    prepare_learners(job, learners)
    for learner in learners:            # from here on, nobody else can train these runs
        learner.log = open_log(learner.folder)
    size = 1 if job.mode == "full" else job.cfg["learners_at_once"]
    with catch_signals() as job.arrived:
        for work in plan_passes(learners, size, args.command):
            run_pass(job, *work)
    job.backbone = None
    return report_results(learners, job)


def report_results(learners, job):
    """Score what was trained and say what to do next -> exit status: 2 if a learner diverged."""
    folders = [learner.folder for learner in learners]
    trained = [folder for folder in folders if (folder / "prompt.json").is_file()]
    if job.config["evaluate"]["after_training"]:
        runs = [Run(folder, trust=job.trust) for folder in trained]
        score_runs(runs, "test", None, job.device, job.cfg["amp"])
    if trained and not job.quiet:
        first = shlex.quote(str(trained[0]))
        before = [job.source.folder] if job.source else []
        scored = shlex.join(map(str, before + trained))
        print(f"next:\n"
              f"  python {in_reach('evaluate.py')} {first} --text \"Your sentence\"\n"
              f"  python {in_reach('report.py')} {scored}")
    diverged = any(outcome(folder).startswith("diverged") for folder in folders)
    # torchrun would take a status for a crash and end the other processes
    return 2 if diverged and "RANK" not in os.environ else 0


if __name__ == "__main__":
    run_main(main)
