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

Read downwards: data, rates, the learner, `train` (the loop), checkpoints, the command line.
"""
import signal
if __name__ == "__main__":      # while torch is imported, Ctrl-C is no traceback: see data.run_main
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save
from tqdm import tqdm

import xpe
from backbone import (check_backbone, first_line, load_backbone, pick_attention, pick_device,
                      pick_precision, place, tokenizer_fingerprint)
from config import (dump_config, in_reach, read_config, read_setting, resolve_group,
                    resolve_targets, warn, with_other_targets)
from data import (SPLITS, Corpus, collate, encode, fingerprint, length_batches, locate, nearest,
                  run_main)
from evaluate import Run, accuracy, first_position_only, method_name, predict, score_runs

try:
    import fcntl        # locks a run folder; Windows has none, and there two commands are on trust
except ImportError:
    fcntl = None

# Under fp16 a first step that overflows is left out, as it should be; torch takes it for a mistake
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

# Settings for the memory that there is: --resume may change them, but a pass that has a checkpoint
# keeps its learners. (Other company in a pass means other dropout, but the same recipe.)
MEMORY_SETTINGS = ("learners_at_once", "tokens")
# Encoder -> settings of the section `prompt` that it does not use: see xpe.make_encoder
UNUSED_BY_ENCODER = {"mlp": ("heads",), "lstm": ("heads",), "attention": ("layers",),
                     "none": ("hidden", "layers", "dropout", "heads")}
DIVERGED = "diverged.txt"


# ---- The data of a task --------------------------------------------------------------------------

class Task:
    """Training and dev sentences of some languages, tokenized; all seeds share them."""

    def __init__(self, corpus, languages, tokenizer, max_length, balanced):
        self.languages = languages
        self.ids, self.labels, sentences, cut = {}, {}, [], 0
        for split in ("train", "dev"):
            of_split = []
            for language in languages:
                of_split += corpus.read(language, split)
            self.ids[split], n_cut = encode([s.text for s in of_split], tokenizer, max_length)
            self.labels[split] = np.array([s.label for s in of_split])
            sentences += of_split
            cut += n_cut
        if cut:
            warn(f"{cut:,} of {len(sentences):,} texts cut at {max_length} tokens")
        self.fingerprint = fingerprint(sentences)
        self.lengths = np.array([len(ids) for ids in self.ids["train"]])
        self.class_weights = torch.ones(len(corpus.labels))
        if balanced:    # n / (classes x count), as scikit-learn's "balanced"
            counts = np.bincount(self.labels["train"], minlength=len(corpus.labels))
            weights = len(self.lengths) / (len(counts) * counts.clip(min=1))
            self.class_weights = torch.tensor(weights, dtype=torch.float32)


# ---- Rates: which tensor moves how fast ----------------------------------------------------------

def parameter_groups(modules, cfg):
    """Trainable tensors with their rates, as torch's optimizers take them: [{params, lr, ...}].

    paper: the standard rows have a rate of their own and no decay; biases and norms never decay.
    The embedding of the encoded rows has its own settings, too: see config.yaml.
    """
    groups = {}
    for name, parameter in modules.named_parameters():
        if not parameter.requires_grad:
            continue
        if name == "prompt.standard":
            key = cfg["standard_rate"], cfg["standard_weight_decay"]
        elif name == "prompt.encoded":
            key = cfg["encoded_rate"], cfg["encoded_weight_decay"]
        elif "bias" in name or "norm" in name.lower():      # as transformers' Trainer decides it
            key = cfg["rate"], 0.0
        else:
            key = cfg["rate"], cfg["weight_decay"]
        groups.setdefault(key, []).append(parameter)
    return [dict(params=parameters, lr=rate, weight_decay=decay)
            for (rate, decay), parameters in groups.items()]


def make_optimizer(groups, name):
    """paper: Adafactor at fixed rates, clip threshold 1, decay -0.8, no momentum."""
    if name == "adamw":
        return torch.optim.AdamW(groups)
    return transformers.Adafactor(groups, lr=0.0, relative_step=False, scale_parameter=False,
                                  warmup_init=False, clip_threshold=1.0, decay_rate=-0.8)


def make_schedule(optimizer, steps, cfg):
    """paper: linear warm-up, then a cosine with hard restarts. `linear` falls to zero instead."""
    warmup = math.ceil(steps * cfg["warmup"])
    if cfg["schedule"] == "linear":
        return transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    return transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, warmup, steps, num_cycles=cfg["cycles"])


# ---- The learner ---------------------------------------------------------------------------------

@dataclass
class Progress:
    """Where a learner stands: plain values, so that a checkpoint can hold them."""
    dev_accuracy: float = 0.0       # of the last evaluation, percent
    best_accuracy: float = -1.0     # of all so far
    best_step: int = 0
    best_loss: float = 0.0          # on the dev split, at the best step
    lowest_loss: float = math.inf   # on the dev split, since patience counts
    waited: int = 0                 # evaluations without a lower one
    stopped: str = ""               # why it has ended; empty while it goes on
    seconds: float = 0.0
    log_bytes: int = 0              # length of metrics.jsonl


class OtherSettings(ValueError):
    """A run was begun with other settings than the command that is to go on with it."""


class Learner:
    """One prompt in training: its folder, seed and data; in a pass its modules and optimizer."""

    def __init__(self, folder, seed, languages, meta):
        self.folder, self.seed, self.languages = Path(folder), seed, languages
        self.meta = meta                    # becomes prompt.json
        self.log_path = self.folder / "metrics.jsonl"
        self.log = None                     # metrics.jsonl, open and locked during a pass
        self.task = None                    # see describe_learners
        self.progress = Progress()
        self.best = None                    # tensors of the best step, on the CPU

    # -- its folder

    def check_settings(self, saved, path):
        """Raise ValueError if `saved` settings, found at `path`, are not those of this run."""
        if not isinstance(saved, dict):
            raise ValueError(f"{path}: holds no settings")
        for key, value in self.meta["training"]["settings"].items():
            before = saved.get(key)
            if key in MEMORY_SETTINGS or (type(before) is type(value) and before == value):
                continue
            section = section_of(self.meta["kind"], "adapted_to" in self.meta)
            hint = f"; --set {section}.{key}={before}" if key in ("amp", "frozen_weights") else ""
            raise OtherSettings(f"{path}: {key} was {before!r}, not {value!r}: --resume goes on "
                                f"with the same settings only{hint}")

    def claim_folder(self, resume):
        """Make the folder ours, against all other processes; FileExistsError if it is taken."""
        try:
            self.folder.mkdir(parents=True, exist_ok=resume)
        except FileExistsError:
            raise already_there(self.folder) from None
        self.log = open(self.log_path, "ab")
        if fcntl is not None:
            try:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)    # ends with the process
            except OSError:
                raise FileExistsError(f"{self.folder}: another process is training this run"
                                      ) from None
        for file in self.folder.glob(".*.????????"):
            file.unlink()       # what a killed process was about to rename: xpe.write_atomically

    def release_folder(self):
        """Let other processes train this run."""
        if self.log is not None:
            with suppress(OSError):     # of a full disk, which write_log has told
                self.log.close()

    def release_memory(self):
        """Let go of what only training needs: in full fine-tuning, gigabytes for each seed."""
        self.optimizer = self.schedule = self.parameters = None
        self.backbone = self.best = None

    def write_log(self, **values):
        """Append a line to metrics.jsonl."""
        line = json.dumps(values).encode() + b"\n"
        try:
            self.log.write(line)
            self.log.flush()
        except OSError as error:        # a full disk says no name by itself
            raise OSError(error.errno, error.strerror, str(self.log_path)) from None
        self.progress.log_bytes += len(line)

    def cut_log(self, length):
        """Forget the lines after a checkpoint: their steps will come again."""
        self.log.truncate(length)
        self.progress.log_bytes = length

    # -- its modules

    def build(self, job, backbone):
        """Make prompt and head, from the seed or as the source run left them."""
        torch.manual_seed(self.seed)
        prompt_width, head_width = xpe.widths(backbone)
        self.backbone = backbone if job.mode == "full" else None
        self.prompt = None
        if job.source:
            config = dict(job.source.prompt.config, dropout=job.cfg["prompt_dropout"])
            self.prompt = xpe.SoftPrompt(**config)
            self.prompt.load_state_dict(job.source.prompt.state_dict())
            self.head = copy.deepcopy(job.source.head)
        else:
            if job.mode != "full":
                self.prompt = xpe.SoftPrompt(prompt_width, **job.prompt_arguments())
            self.head = xpe.ClassificationHead(head_width, len(job.corpus.labels),
                                               head_dropout(backbone.config))
        if job.mode == "head":      # the baseline: a random prompt that stays random
            self.prompt.requires_grad_(False)

    def modules(self):
        """Everything of this learner that training may change, by name."""
        named = {"prompt": self.prompt, "head": self.head, "backbone": self.backbone}
        return torch.nn.ModuleDict({name: m for name, m in named.items() if m is not None})

    def prepare(self, cfg, steps, device):
        """Make optimizer, schedule and loss scaling; the modules are on their device by now."""
        modules = self.modules()
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.meta["training"]["trainable"] = sum(p.numel() for p in self.parameters)
        self.optimizer = make_optimizer(parameter_groups(modules, cfg), cfg["optimizer"])
        self.schedule = make_schedule(self.optimizer, steps, cfg)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg["amp"] == "fp16")
        self.class_weights = self.task.class_weights.to(device)
        self.loss_sum = torch.zeros((), device=device)      # since the last evaluation

    def step(self, clip):
        """Clip the gradient of this learner, take one step, move the schedule on."""
        self.scaler.unscale_(self.optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()

    def tensors(self):
        """A copy of its modules' tensors on the CPU, by name of the module."""
        copies = {}
        for name, module in self.modules().items():
            state = module.state_dict()
            copies[name] = {key: tensor.cpu().clone() for key, tensor in state.items()}
        return copies

    def state_dict(self):
        """All that it needs to go on; see save_checkpoint."""
        return dict(settings=self.meta["training"]["settings"], progress=asdict(self.progress),
                    modules=self.tensors(), best=self.best, optimizer=self.optimizer.state_dict(),
                    schedule=self.schedule.state_dict(), scaler=self.scaler.state_dict(),
                    loss_sum=self.loss_sum.cpu())

    def load_state_dict(self, state, path):
        """Go on from `state`, read from `path`; ValueError if it is not a state of this run."""
        self.check_settings(state["settings"], path)
        if state["optimizer"]["state"]:     # empty if under fp16 every step has overflowed so far
            # torch does not check the shapes of an optimizer's state. A step with zero gradients
            # fills ours, so that the two can be compared
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()
        reference = dict(self.state_dict(), settings=state["settings"])
        if state["best"] is not None:
            reference["best"] = self.tensors()
        if layout(reference) != layout(state):
            raise ValueError("does not fit this run")
        self.progress = Progress(**state["progress"])
        self.best = state["best"]
        for name, module in self.modules().items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.loss_sum.copy_(state["loss_sum"])
        log_size = self.log_path.stat().st_size
        if not 0 <= self.progress.log_bytes <= log_size:
            raise ValueError(f"metrics.jsonl has {log_size} bytes, not {self.progress.log_bytes}")

    # -- its results

    def record_evaluation(self, step, steps, logits, train_loss, cfg):
        """Take in logits (n, C) of the dev split: keep the best tensors, log, decide on a stop."""
        progress = self.progress
        labels = self.task.labels["dev"]
        dev_loss = float(F.cross_entropy(logits, torch.from_numpy(labels)))
        if not math.isfinite(dev_loss) or not math.isfinite(train_loss):
            progress.stopped = f"diverged: the loss is no longer finite at step {step}"
            return
        progress.dev_accuracy = accuracy(labels, logits.argmax(dim=1))
        if progress.dev_accuracy > progress.best_accuracy:
            progress.best_accuracy = progress.dev_accuracy
            progress.best_step, progress.best_loss = step, dev_loss
            self.best = self.tensors()
        # paper: patience watches the dev *loss*, and only after half of the steps; what is kept is
        # the best *accuracy*
        if cfg["patience"] and step >= int(steps * cfg["patience_after"]):
            progress.waited += 1
            if dev_loss < progress.lowest_loss:
                progress.lowest_loss, progress.waited = dev_loss, 0
            if progress.waited >= cfg["patience"]:
                progress.stopped = f"no lower dev loss in {progress.waited} evaluations"
        if step == steps:
            progress.stopped = "all steps"
        self.write_log(step=step, loss=round(train_loss, 6),
                       dev_accuracy=round(progress.dev_accuracy, 4), dev_loss=round(dev_loss, 6),
                       best=round(progress.best_accuracy, 4))

    def finish(self):
        """Write the best tensors as a prompt folder; without any, write why there are none."""
        progress = self.progress
        if progress.stopped.startswith("diverged"):
            section = section_of(self.meta["kind"], "adapted_to" in self.meta)
            kept = f"nothing good to keep; lower {section}.rate"
            if self.meta["kind"] not in ("full", "head"):
                kept += " (standard_rate, encoded_rate: of the prompt's rows)"
            if self.best is not None:
                kept = f"kept step {progress.best_step}"
            warn(f"{self.folder}: {progress.stopped}; {kept}")
        if self.best is None:
            xpe.write_atomically(self.folder / DIVERGED, f"{progress.stopped}\n".encode())
            return
        for name, module in self.modules().items():
            if name == "backbone":
                tensors = save(self.best["backbone"], {"format": "pt"})
                xpe.write_atomically(self.folder / "backbone.safetensors", tensors)
            else:
                module.load_state_dict(self.best[name])
        self.meta["training"].update(
            best_step=progress.best_step, dev_accuracy=progress.best_accuracy,
            dev_loss=progress.best_loss, stopped=progress.stopped, finished=True,
            seconds=round(progress.seconds, 1))
        xpe.save_prompt(self.folder, self.prompt, self.head, self.meta)
        tqdm.write(f"{self.folder}: dev accuracy {progress.best_accuracy:.1f} at step "
                   f"{progress.best_step}, {progress.stopped}, {progress.seconds:.0f} s")


def saved_training(folder):
    """What prompt.json says of the training, or None if the run has not ended with a prompt."""
    try:
        training = xpe.read_json(folder / "prompt.json")["training"]
    except (OSError, ValueError, KeyError):
        return None
    if not isinstance(training, dict) or training.get("finished") is not True:
        return None
    if not (folder / "prompt.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: has prompt.json, but prompt.safetensors is missing; "
                                f"remove the folder to train it again")
    return training


def is_over(folder):
    """Whether nothing is left to train: the run has a prompt, or diverged before it had one."""
    return saved_training(folder) is not None or (folder / DIVERGED).is_file()


def already_there(folder):
    """The error for a run folder that would be written over."""
    return FileExistsError(f"{folder} exists: --resume goes on, --out starts elsewhere")


def head_dropout(config):
    """The dropout that XLM-R's own classification head takes from the backbone's configuration."""
    for name in ("classifier_dropout", "hidden_dropout_prob"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    return 0.1


# ---- The loop ------------------------------------------------------------------------------------

def count_steps(cfg, n_sentences):
    """-> (steps of the whole run, steps of an epoch, batches of an epoch)."""
    batches = math.ceil(n_sentences / cfg["batch_size"])
    per_epoch = math.ceil(batches / cfg["accumulate"])
    steps = cfg["steps"]
    if cfg["epochs"]:
        steps = cfg["epochs"] * per_epoch
    return steps, per_epoch, batches


def join_batches(learners, orders, number, pad_id, device):
    """Batch `number` of each learner, side by side -> input_ids, mask (K*B, T), labels (K*B,)."""
    rows, labels = [], []
    for learner, order in zip(learners, orders):
        for i in order[number]:
            rows.append(learner.task.ids["train"][i])
            labels.append(learner.task.labels["train"][i])
    input_ids, attention_mask = collate(rows, pad_id)
    batch = input_ids, attention_mask, torch.tensor(labels)
    return [tensor.to(device, non_blocking=True) for tensor in batch]


def train(learners, model, autocast, cfg, pad_id, device, start=0, quiet=False):
    """Train the K learners of a pass until each has stopped; False if a signal came before that.

    `model` holds their K prompts and heads. All have equally many sentences, so that step i has
    batches of one size and of like lengths for all. `start`: the step that a checkpoint stands at.
    """
    steps, per_epoch, batches = count_steps(cfg, len(learners[0].task.lengths))
    evaluate_every = cfg["evaluate_every"] or per_epoch
    dropout = cheap_dropout(device)
    orders, saved_at, clock = None, start, time.time()
    progress_bar = tqdm(total=steps, initial=start, unit=" steps", disable=quiet or None,
                        dynamic_ncols=True)
    model.eval()
    with progress_bar, Interrupts() as interrupts:
        for step in range(start + 1, steps + 1):
            if not model.training:          # at the start, and after each evaluation
                model.train()
                # paper: the backbone is frozen, but its dropout is active
                model.backbone.train(cfg["dropout"])

            # each epoch has its own order, a pure function of seed and epoch
            epoch, position = divmod(step - 1, per_epoch)
            if orders is None or position == 0:
                orders = []
                for learner in learners:
                    lengths = learner.task.lengths
                    orders.append(length_batches(lengths, cfg["batch_size"], learner.seed, epoch))
            first = position * cfg["accumulate"]
            numbers = range(first, min(first + cfg["accumulate"], batches))

            for number in numbers:
                input_ids, mask, labels = join_batches(learners, orders, number, pad_id, device)
                with autocast(), dropout:
                    logits = model(input_ids, mask)                     # (K*B, C)
                total = 0.0
                blocks = zip(learners, logits.float().chunk(len(learners)),
                             labels.chunk(len(learners)))
                for learner, block, wanted in blocks:                   # (B, C), (B,)
                    loss = F.cross_entropy(block, wanted, learner.class_weights) / len(numbers)
                    learner.loss_sum += loss.detach()       # stays on the device: a look would wait
                    total = total + learner.scaler.scale(loss)
                total.backward()

            for learner in learners:        # paper: each clips and steps by itself
                learner.step(cfg["clip"])
            progress_bar.update()

            if step % evaluate_every == 0 or step == steps:
                since = (step - 1) % evaluate_every + 1
                evaluate_learners(learners, model, step, steps, since, cfg, pad_id, autocast)
                now = time.time()
                for learner in learners:
                    learner.progress.seconds += now - clock
                clock = now
                if not quiet:
                    show_progress(learners, progress_bar, step, steps, evaluate_every)
                someone_stopped = any(learner.progress.stopped for learner in learners)
                if someone_stopped or step - saved_at >= cfg["checkpoint_every"]:
                    save_checkpoint(learners, step)
                    saved_at = step
                if someone_stopped:
                    learners = finish_stopped(learners)
                    if not learners:
                        return not interrupts.arrived
                    model = join_learners(learners, model.backbone, model.reads).eval()
                    orders = None
            if interrupts.arrived:
                now = time.time()
                for learner in learners:
                    learner.progress.seconds += now - clock
                save_checkpoint(learners, step)
                return False
    return True


def cheap_dropout(device):
    """speed.py's dropout on a CPU; torch's own elsewhere, or if that file has been deleted."""
    if device.type == "cpu":
        try:
            from speed import CheapDropout
            return CheapDropout()
        except ImportError:
            pass
    return nullcontext()


def evaluate_learners(learners, model, step, steps, since, cfg, pad_id, autocast):
    """Evaluate each learner on its own dev split, all in one go; since: steps since the last."""
    encoded, owner, sizes = [], [], []
    for k, learner in enumerate(learners):
        texts = learner.task.ids["dev"]
        encoded += texts
        owner += [k] * len(texts)
        sizes.append(len(texts))
    logits = predict(model, encoded, pad_id, torch.tensor(owner), cfg["tokens"], autocast)
    for learner, own_logits in zip(learners, logits.split(sizes)):
        train_loss = float(learner.loss_sum) / since
        learner.loss_sum.zero_()
        learner.record_evaluation(step, steps, own_logits, train_loss, cfg)


def show_progress(learners, progress_bar, step, steps, evaluate_every):
    """About eight lines that stay, and the bar; of several learners the means."""
    dev = np.mean([learner.progress.dev_accuracy for learner in learners])
    best = np.mean([learner.progress.best_accuracy for learner in learners])
    progress_bar.set_postfix_str(f"dev accuracy {dev:.1f}, best {best:.1f}")
    if step * 8 // steps > (step - evaluate_every) * 8 // steps:
        of_several = f" (means of {len(learners)})" if len(learners) > 1 else ""
        tqdm.write(f"step {step:>6,} of {steps:,}: dev accuracy {dev:.1f}, best {best:.1f}"
                   f"{of_several}")


def finish_stopped(learners):
    """Write the results of learners that have stopped -> those that go on."""
    for learner in learners:
        if learner.progress.stopped:
            learner.finish()
            learner.release_memory()
    return [learner for learner in learners if not learner.progress.stopped]


def join_learners(learners, backbone, reads):
    """-> the PromptedClassifier that holds the prompts and heads of learners in training."""
    heads = [learner.head for learner in learners]
    if learners[0].prompt is None:      # full fine-tuning
        return xpe.PromptedClassifier(backbone, None, heads, reads, frozen=False)
    prompts = [learner.prompt for learner in learners]
    return xpe.PromptedClassifier(backbone, prompts, heads, reads)


# ---- Checkpoints: one file for each pass ---------------------------------------------------------
# pass.json says who began a pass together, so that each folder leads to the checkpoint, which lies
# in the first one's. The checkpoint's own list says who goes on: not those that had ended before.

def save_checkpoint(learners, step):
    """Write the state of a whole pass as one file: whenever the process dies, there is a step at
    which all of its learners can go on together."""
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    state = {"step": step, "random": random,
             "learners": {learner.folder.name: learner.state_dict() for learner in learners}}
    path = checkpoint_path(learners[0].folder)
    xpe.write_atomically(path, lambda file: torch.save(state, file))


def checkpoint_path(folder):
    """The checkpoint of the pass that `folder` belongs to, in the folder of its first learner.
    Raises ValueError for a pass.json that names none."""
    return folder.parent / names_in_pass(folder)[0] / "checkpoint.pt"


def names_in_pass(folder):
    """The folders that began a pass together with `folder`, itself included. Raises ValueError for
    a pass.json that does not say so."""
    path = folder / "pass.json"
    if not path.is_file():
        return [folder.name]
    names = xpe.read_json(path).get("learners")
    if not isinstance(names, list) or not names or not all(map(is_folder_name, names)):
        raise ValueError(f"{path}: must name the learners of a pass; without it the run starts "
                         f"over")
    return names


def is_folder_name(name):
    """Whether `name`, out of a file, is the bare name of a folder and no path to elsewhere."""
    is_name = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
    return is_name and Path(name).name == name


def read_checkpoint(path):
    """-> {step, random, learners: {folder name: state}}; ValueError for a file that is none."""
    try:
        # weights_only: tensors and plain values; no code in a hostile file is run
        state = torch.load(path, map_location="cpu", weights_only=True)
        fits = type(state["step"]) is int and state["step"] > 0 and len(state["learners"]) > 0
        if not fits or not all(map(is_folder_name, state["learners"])):
            raise ValueError("lacks its step or learners")
    except Exception as error:      # whatever torch.load makes of a damaged or hostile file
        if isinstance(error, OSError) and error.filename:
            raise                   # it could not be opened
        raise damaged_checkpoint(path, error) from None
    return state


def restore_checkpoint(learners, state, path):
    """Put learners back to where `state`, of read_checkpoint, has them -> the step it is of."""
    for learner in learners:
        try:
            learner.load_state_dict(state["learners"][learner.folder.name], path)
        except OtherSettings:
            raise
        except Exception as error:      # whatever a damaged or hostile state makes torch raise
            raise damaged_checkpoint(path, error) from None
    try:
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available() and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"])
    except Exception as error:
        raise damaged_checkpoint(path, error) from None
    for learner in learners:
        learner.cut_log(learner.progress.log_bytes)
    return state["step"]


def damaged_checkpoint(path, error):
    """The error for a checkpoint that cannot be used."""
    reason = first_line(error)
    return ValueError(f"{path}: not a checkpoint of this run ({type(error).__name__}: {reason}); "
                      f"remove it and the run starts over")


def layout(value):
    """A nest of dicts, lists, tensors and plain values -> the same of keys, shapes and types."""
    if isinstance(value, dict):
        return {key: layout(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [layout(item) for item in value]
    if torch.is_tensor(value):
        return value.shape, value.dtype
    return type(value)


class Interrupts:
    """Ctrl-C and a scheduler's signals become a flag: the step ends and a checkpoint is written.
    The second one ends the process at once."""

    def __enter__(self):
        self.arrived = False
        self.handlers = {}
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)        # Windows lacks the last two
            if number is None:
                continue
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue        # nohup: it asked for this signal to be ignored
            self.handlers[number] = signal.signal(number, self.note_arrival)
        return self

    def note_arrival(self, *_):
        self.arrived = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# ---- The command line ----------------------------------------------------------------------------

@dataclass
class Job:
    """What one command is to do."""
    config: dict            # all settings, resolved: see config.yaml
    cfg: dict               # the `train` section as this mode has it, and what else the loop needs
    mode: str
    source: Run             # the run to adapt, or None
    group: str              # name of the languages, part of the folder's name
    languages: list
    corpus: Corpus
    data: dict              # {name, revision}
    reads: str
    max_length: int

    def prompt_arguments(self):
        """SoftPrompt's arguments but for the width, from the configuration."""
        arguments = dict(self.config["prompt"])
        del arguments["reads"]
        if self.mode == "xpe":
            arguments["ratio"] = 1.0
        elif self.mode != "dual":
            arguments["ratio"] = 0.0
        return arguments


def parse_arguments(argv):
    """The command line -> argparse's namespace."""
    parser = argparse.ArgumentParser(description="Train soft prompts, the backbone frozen.")
    add = parser.add_argument
    add("--mode", choices=xpe.KINDS, help="spt, xpe, dual, or the baselines head and full")
    add("--ratio", type=float, help="with --mode dual: share of encoded rows")
    add("--sources", required=True, metavar="FILE",
        help="settings file; its `sources:` names the group to train on")
    add("--group", help="another group of that file")
    add("--languages", help="these languages instead, separated by commas")
    add("--seeds", help="11, 11-20 or 11,15 (default: 11; with --adapt the seed of RUN)")
    add("--data", help="folder <language>/{train,dev,test}.tsv, or a dataset on the hub")
    add("--backbone", help="folder, or a model on the hub")
    add("--steps", type=int, help="optimizer steps at most")
    add("--adapt", metavar="RUN", help="adapt this run to each language of the group")
    add("--out", default="runs", help="where the run folders go (default: runs)")
    add("--resume", action="store_true", help="go on with runs that were interrupted")
    add("--set", action="append", default=[], metavar="section.key=value", help="any setting")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    return parser.parse_args(argv)


def parse_seeds(text):
    """'11-13,20' -> [11, 12, 13, 20]."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if not match:
            raise ValueError(f"--seeds {text}: write 11, 11-20 or 11,15")
        low = int(match[1])
        high = int(match[2] or low)
        if not low <= high <= low + 999:
            raise ValueError(f"--seeds {text}: {low} to {high} are not 1 to 1,000 seeds")
        seeds += range(low, high + 1)
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds {text}: names a seed twice")
    return seeds


def read_torchrun():
    """-> (rank, local rank, number of processes) as torchrun sets them, or (0, 0, 1)."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = [name for name in names if os.environ.get(name)]
    if not given:
        if os.environ.get("SLURM_PROCID", "0") != "0":
            warn("SLURM started several tasks, and each would train everything: one task a node, "
                 "`srun torchrun ... train.py ...`, shares the work")
        return 0, 0, 1
    if len(given) < len(names):
        raise ValueError(f"of RANK, LOCAL_RANK and WORLD_SIZE only {', '.join(given)} is set: this "
                         f"process would train a part of the seeds; use torchrun, or unset it")
    try:
        rank, local_rank, world_size = [int(os.environ[name]) for name in names]
    except ValueError:
        raise ValueError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers") from None
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK is {rank}, WORLD_SIZE {world_size}: a rank must be below that size")
    return rank, local_rank, world_size


def section_of(mode, adapt):
    """The section of the configuration that has the last word on how a mode is trained."""
    if adapt:
        return "adapt"
    return "full" if mode == "full" else "train"


def check_overruled(args, config, mode, source):
    """Raise ValueError for a `--set` whose value another one overrules: what was meant to be tried
    would look as if it made no difference. Files may hold such settings, for other modes."""
    own = section_of(mode, source)
    for setting in args.set:
        for section, values in read_setting(setting).items():
            if not isinstance(values, dict):
                continue
            for key, value in values.items():
                reason = None
                if section in ("train", own):
                    reason = what_overrules_training(section, key, value, args, config, own)
                elif section == "prompt" or (section, key) == ("data", "max_length"):
                    reason = what_overrules_prompt(key, value, args, config, mode)
                if reason:
                    raise ValueError(f"--set {setting}: {section}.{key} does nothing here: "
                                     f"{reason}")


def what_overrules_training(section, key, value, args, config, own):
    """Why section.key = value is not what this run is trained with, or None.

    own: the section that has the last word, train itself, adapt or full.
    """
    decides = config[own]       # steps and epochs as --steps, if given, has set them
    if key in ("steps", "epochs") and args.steps is not None:
        return f"--steps {args.steps} overrides it" if value != decides[key] else None
    if key == "steps" and decides.get("epochs"):
        return f"{own}.epochs {decides['epochs']} sets the steps; --steps overrides that"
    if section != own and key in decides and value != decides[key]:
        return f"{own}.{key} {decides[key]} has the last word; --set {own}.{key}=... changes it"
    return None


def what_overrules_prompt(key, value, args, config, mode):
    """Why prompt.key = value, or data.max_length, has no effect on this run, or None."""
    if args.adapt:
        instead = "; --set adapt.prompt_dropout=... while adapting" if key == "dropout" else ""
        return f"--adapt {args.adapt} goes on with the prompt as it was trained{instead}"
    if key == "ratio" and args.ratio is not None and value != args.ratio:
        return f"--ratio {args.ratio} overrides it"
    encoder = config["prompt"]["encoder"]
    if mode in ("xpe", "dual") and key in UNUSED_BY_ENCODER[encoder]:
        return f"the encoder {encoder!r} does not use it"
    return None


def settings_for(config, mode, adapt):
    """The `train` section as this mode has it, with the few values of other sections that the loop
    needs. Raises ValueError for numbers with which no step can be taken."""
    cfg = {**config["train"], **config[section_of(mode, adapt)]}
    if cfg["steps"] < 1 and cfg["epochs"] < 1:
        raise ValueError(f"--steps {cfg['steps']}: at least 1, or train.epochs")
    cfg["mode"] = mode
    cfg["dropout"] = config["backbone"]["dropout"]
    cfg["tokens"] = config["evaluate"]["tokens"]
    return cfg


def pick_languages(args, config):
    """-> (name of the group, its languages), from --languages, --group or the configuration."""
    if args.languages:
        languages = [code.strip() for code in args.languages.split(",")]
        group = "+".join(languages) if len(languages) < 4 else f"{len(languages)}-languages"
        for code in languages:
            if config["groups"].get(code, [code]) != [code]:
                raise ValueError(f"--languages {args.languages}: {code} is a group in "
                                 f"{args.sources}; --group {code}")
    else:
        group = args.group or config["sources"]
        if group not in config["groups"]:
            hint = nearest(group, config["groups"])
            raise ValueError(f"no group {group!r} in {args.sources}{hint}")
        languages = resolve_group(config, group)
    if not languages or len(set(languages)) != len(languages):
        raise ValueError(f"languages {', '.join(languages)}: at least one, and each once")
    if not re.fullmatch(r"[\w+-][\w.+-]*", group):
        raise ValueError(f"group {group!r}: its name becomes part of a folder's name: letters, "
                         f"digits, _ + - . only")
    return group, languages


def check_mode(args, config, mode, source):
    """Raise ValueError for options that do not go together; warn of a ratio that is rounded."""
    ratio = config["prompt"]["ratio"]
    if not mode:
        raise ValueError(f"--mode is missing: {', '.join(xpe.KINDS)}")
    if source and source.meta["kind"] == "full":
        raise ValueError(f"--adapt {args.adapt}: a full run has no prompt that could be adapted")
    if source and source.meta["kind"] != mode:
        raise ValueError(f"--adapt {args.adapt}: it is a {source.meta['kind']} run and cannot be "
                         f"adapted as {mode}")
    if source and not args.group and not args.languages:
        raise ValueError("--adapt needs its target languages: --group NAME or --languages CODES")
    if args.group and args.languages:
        raise ValueError(f"--group {args.group} and --languages {args.languages}: one of them")
    if args.ratio is not None and (mode != "dual" or source):
        raise ValueError(f"--ratio {args.ratio}: goes with --mode dual, and not with --adapt")
    if mode == "dual" and not 0 < ratio < 1:
        raise ValueError(f"--ratio {ratio}: DUAL needs a share between 0 and 1 (prompt.ratio)")
    length = config["prompt"]["length"]
    if mode == "dual" and not source:
        rows = xpe.count_encoded_rows(length, ratio)
        if abs(rows - ratio * length) > 0.01:
            warn(f"--ratio {ratio}: {rows} of {length} prompt rows are encoded")


def read_job(args):
    """Read configuration, source run and data -> Job, checked before anything is written."""
    config = read_config(args.sources, args.set)
    config["data"]["name"] = args.data or config["data"]["name"]
    config["backbone"]["name"] = args.backbone or config["backbone"]["name"]
    if args.ratio is not None:
        config["prompt"]["ratio"] = args.ratio
    source = Run(args.adapt) if args.adapt else None
    mode = args.mode
    if source:
        source.config = config      # it is scored with the data and backbone of this command
        mode = mode or source.meta["kind"]
    check_mode(args, config, mode, source)
    group, languages = pick_languages(args, config)
    if args.steps is not None:
        config[section_of(mode, source)].update(steps=args.steps, epochs=0)
    check_overruled(args, config, mode, source)
    cfg = settings_for(config, mode, source)
    for name in config["groups"]:       # what is wrong with them is not to be told afterwards
        resolve_group(config, name)
    resolve_targets(config)
    xpe.check_size("data.max_length", config["data"]["max_length"], smallest=2, largest=1 << 20)

    folder, revision = locate(config["data"]["name"], config["data"]["revision"])
    corpus = Corpus(folder)
    corpus.check(languages)
    if not source:                      # so that the run's config.yaml trains the same again
        config["sources"] = group
        if args.languages:
            config["groups"][group] = languages
    if source and list(corpus.labels) != source.meta["labels"]:
        raise ValueError(f"{folder}: has the labels {', '.join(corpus.labels)}; {args.adapt} knows "
                         f"{', '.join(source.meta['labels'])}")
    if config["evaluate"]["after_training"]:
        check_test_split(corpus, languages if source else with_test_split(corpus))

    reads, max_length = config["prompt"]["reads"], config["data"]["max_length"]
    if mode == "full" and reads == "prompt":
        reads = "first"             # there is no prompt: position 0 is <s>
    if source:
        reads, max_length = source.meta["reads"], source.meta["max_length"]
    data = {"name": config["data"]["name"], "revision": revision}
    return Job(config, cfg, mode, source, group, languages, corpus, data, reads, max_length)


def with_test_split(corpus):
    """The languages that can be scored; if none can, all, so that the error names a file."""
    able = [language for language in corpus.languages() if "test" in corpus.splits(language)]
    return able or corpus.languages()


def check_test_split(corpus, languages):
    """Read what will be scored: what is wrong with it is not to be told after hours of training."""
    for language in languages:
        try:
            corpus.read(language, "test")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; without scoring: --set evaluate.after_training=false"
                                    ) from None


def make_learners(job, seeds, out):
    """One learner for each seed; with a source run, one for each seed and target language."""
    learners = []
    for seed in seeds:
        if not job.source:
            name = f"{method_name(job.mode, job.config['prompt'])}-{job.group}-s{seed}"
            meta = {"sources": job.languages, "seed": seed}
            learners.append(Learner(Path(out) / name, seed, job.languages, meta))
            continue
        for language in job.languages:
            name = f"{job.source.name}-to-{language}-s{seed}"
            meta = {"sources": job.source.sources, "seed": seed,
                    "adapted_from": job.source.name, "adapted_to": language}
            learners.append(Learner(Path(out) / name, seed, [language], meta))
    return learners


def check_source_backbone(job, identity):
    """Raise ValueError if the run to adapt was trained on another backbone; released ones do not
    say on which weights."""
    if not job.source:
        return
    trained_on = job.source.meta["backbone"].get("fingerprint")
    if trained_on and trained_on != identity["fingerprint"]:
        raise ValueError(f"--adapt {job.source.folder}: was trained on another backbone than "
                         f"{identity['name']}")


def fit_max_length(job, backbone):
    """Cut texts where the positions of the backbone end, if data.max_length does not do so before.
    Raises ValueError if the prompt leaves no room for a text."""
    P = 0
    if job.source:
        P = job.source.prompt.length
    elif job.mode != "full":
        P = job.config["prompt"]["length"]
    room = xpe.positions(backbone) - P
    if room < 3:        # one token between <s> and </s>
        raise ValueError(f"prompt.length {P}: the backbone has {room + P} positions, which leaves "
                         f"no room for a text")
    job.max_length = min(job.max_length, room)


def describe_learners(learners, job, tokenizer, identity):
    """Read and tokenize the learners' data, and fill in what prompt.json is to say of them."""
    settings = dict(job.cfg, backbone=identity["fingerprint"], reads=job.reads)
    if job.source:
        settings["source"] = job.source.prompt_fingerprint()
    elif job.mode != "full":
        settings.update({f"prompt.{key}": value for key, value in job.config["prompt"].items()})
    settings["max_length"] = job.max_length     # may follow from prompt.length: named after it
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    tasks = {}
    for learner in learners:
        key = tuple(learner.languages)
        if key not in tasks:
            tasks[key] = Task(job.corpus, learner.languages, tokenizer, job.max_length,
                              job.cfg["class_weights"] == "balanced")
        learner.task = tasks[key]
        data_fingerprint = learner.task.fingerprint
        learner.meta.update(
            kind=job.mode, backbone=identity, tokenizer=tokenizer_fingerprint(tokenizer),
            labels=list(job.corpus.labels), reads=job.reads, max_length=job.max_length,
            data=dict(job.data, fingerprint=data_fingerprint),
            training={"settings": dict(settings, data=data_fingerprint), "versions": versions})


@dataclass
class Pass:
    """Learners that go through the backbone side by side, and the checkpoint they go on from."""
    learners: list
    checkpoint: dict = None
    path: Path = None       # of the checkpoint


def plan_passes(learners, size):
    """Learners that are not over -> list of Pass: as checkpoints have them, the others anew."""
    passes, fresh, placed = [], {}, set()
    by_name = {learner.folder.name: learner for learner in learners}
    for learner in learners:
        if learner.folder.name in placed or is_over(learner.folder):
            continue
        path = checkpoint_path(learner.folder)
        if path.is_file():
            checkpoint = read_checkpoint(path)
            names = list(checkpoint["learners"])
            lacking = [name for name in names if name not in by_name]
            if lacking:
                advice = ""
                if "WORLD_SIZE" in os.environ:
                    advice = ", with as many processes as before"
                raise ValueError(f"{learner.folder.name} is trained together with "
                                 f"{', '.join(lacking)}: --resume them in one command{advice}")
            if learner.folder.name in names:
                passes.append(Pass([by_name[name] for name in names], checkpoint, path))
                placed.update(names)
                continue
        elif learner.log_path.is_file() and learner.log_path.stat().st_size:
            warn(f"{learner.folder}: there is no checkpoint {path}, so it starts over")
        # the learners of a pass have equally many sentences: then their batches are of one size
        fresh.setdefault(len(learner.task.lengths), []).append(learner)
    for alike in fresh.values():
        for i in range(0, len(alike), size):
            passes.append(Pass(alike[i:i + size]))
    return passes


def run_pass(work, job, backbone, tokenizer, device, resume, quiet):
    """Train the learners of a Pass; False if a signal interrupted it."""
    learners, cfg, pad_id = work.learners, job.cfg, tokenizer.pad_token_id or 0
    if job.mode == "full":
        backbone = copy.deepcopy(backbone)      # the next pass starts from the same weights
    for learner in learners:
        learner.build(job, backbone)
    model = join_learners(learners, backbone, job.reads)
    autocast = place(model, device, cfg["amp"], cfg["frozen_weights"])

    steps, _, _ = count_steps(cfg, len(learners[0].task.lengths))
    for learner in learners:
        learner.claim_folder(resume)
        learner.prepare(cfg, steps, device)
    over = [learner.folder for learner in learners if is_over(learner.folder)]
    if len(over) == len(learners) or (over and not work.checkpoint):
        raise FileExistsError(f"{over[0]}: another process has finished it meanwhile; --resume "
                              f"again")
    start = 0
    if work.checkpoint:
        start = restore_checkpoint(learners, work.checkpoint, work.path)
        work.checkpoint = None      # of full fine-tuning: gigabytes that nobody needs any more
    else:
        start_folders(learners, job)
        torch.manual_seed(learners[0].seed)     # of all dropout
    count = learners[0].meta["training"]["trainable"]
    precision = "float32" if cfg["amp"] == "off" else cfg["amp"]
    print(f"{job.mode}: {len(learners)} x {count:,} trainable numbers; "
          f"{len(learners[0].task.lengths):,} sentences of {job.group}; {device.type}, "
          f"{precision}", flush=True)
    print(describe_recipe(learners[0], cfg, steps), flush=True)
    finished = True
    learners = finish_stopped(learners)     # a crash may have come between checkpoint and result
    if learners:
        model = join_learners(learners, model.backbone, job.reads)
        finished = train(learners, model, autocast, cfg, pad_id, device, start, quiet)
    clear_passes(work.learners)
    return finished


def describe_recipe(learner, cfg, steps):
    """Steps, optimizer and the rates in use, as one line: which section of the configuration has
    the last word depends on the mode."""
    batch = str(cfg["batch_size"])
    if cfg["accumulate"] > 1:
        batch = f"{cfg['accumulate']} x {batch}"
    moving = [name for name, p in learner.modules().named_parameters() if p.requires_grad]
    rates = []
    if "prompt.standard" in moving:
        rates.append(f"standard rows {cfg['standard_rate']:g}")
    if "prompt.encoded" in moving:
        rates.append(f"encoded rows {cfg['encoded_rate']:g}")
    text = f"rate {cfg['rate']:g}"
    if rates:
        text = f"rates: {', '.join(rates)}, the rest {cfg['rate']:g}"
    return f"{steps:,} steps of {batch} sentences, {cfg['optimizer']}, {cfg['schedule']}; {text}"


def clear_passes(learners):
    """Delete the files that only a pass in progress needs, where all that began it are over: a
    companion that this command does not train may go on from the checkpoint in our folder."""
    for learner in learners:
        if not (learner.folder / "pass.json").is_file():
            continue
        # damaged files and incomplete runs are no reason to delete, nor to fail here
        with suppress(ValueError, FileNotFoundError):
            names = names_in_pass(learner.folder)
            folders = [learner.folder.parent / name for name in names]
            folders = [folder for folder in folders if folder.exists()]
            # a companion may have started over with others since
            same_pass = all(names_in_pass(folder) in (names, [folder.name]) for folder in folders)
            if same_pass and all(is_over(folder) for folder in folders):
                for folder in folders:          # pass.json last: after a kill it leads here again
                    (folder / "checkpoint.pt").unlink(missing_ok=True)
                    (folder / "pass.json").unlink(missing_ok=True)


def start_folders(learners, job):
    """Write into each new run folder what will be trained, and with whom."""
    names = [learner.folder.name for learner in learners]
    for learner in learners:
        (learner.folder / "checkpoint.pt").unlink(missing_ok=True)      # of a pass that is no more
        for split in SPLITS:                    # scores of a prompt that is no more
            for end in (".json", ".csv", "_predictions.csv"):
                (learner.folder / f"{split}{end}").unlink(missing_ok=True)
        learner.cut_log(0)
        xpe.write_atomically(learner.folder / "config.yaml", dump_config(job.config))
        together = json.dumps({"learners": names}).encode() + b"\n"
        xpe.write_atomically(learner.folder / "pass.json", together)


def train_passes(passes, job, backbone, tokenizer, device, args, quiet):
    """Train pass after pass; False if a signal interrupted one: then says how to go on."""
    for work in passes:
        try:
            finished = run_pass(work, job, backbone, tokenizer, device, args.resume, quiet)
        except RuntimeError as error:
            on_cpu = "allocate memory" in str(error)
            if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
                raise
            raise ValueError(f"out of memory with {len(work.learners)} learners of "
                             f"{job.cfg['batch_size']} sentences: lower {memory_settings(work)}"
                             ) from None
        finally:
            for learner in work.learners:
                learner.release_folder()
        if not finished:
            command = ["python"]
            if "LOCAL_WORLD_SIZE" in os.environ:
                command = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
            if not args.resume:
                command = [*command, *sys.argv, "--resume"]
            else:
                command = [*command, *sys.argv]
            print(f"interrupted; go on with: {shlex.join(command)}")
            return False
    return True


def memory_settings(work):
    """What to lower when memory runs out in a pass, as words."""
    names = "train.batch_size or evaluate.tokens"
    if len(work.learners) == 1:
        return names
    advice = f"train.learners_at_once, {names}"
    path = checkpoint_path(work.learners[0].folder)
    if path.is_file():
        advice += f" (and remove {path}, which holds the pass together: then it starts over)"
    return advice


def check_folders(learners, config, resume):
    """Say what is over already. Raises FileExistsError for a folder that would be written over."""
    kept = []               # config.yaml files that stay as they are
    for learner in learners:
        if learner.folder.exists() and not resume:
            raise already_there(learner.folder)
        diverged = learner.folder / DIVERGED
        if saved_training(learner.folder) is not None:
            print(f"{learner.folder}: finished already")
        elif diverged.is_file():
            reason = diverged.read_text().strip()
            print(f"{learner.folder}: {reason}; remove the folder to try again")
        if is_over(learner.folder) or checkpoint_path(learner.folder).is_file():
            kept.append(learner.folder / "config.yaml")
    for path in with_other_targets(kept, config):
        warn(f"{path}: has other targets or groups, and keeps them; edit that file")


def main(argv=None):
    """Read the job, train pass by pass, score -> exit status."""
    args = parse_arguments(argv)
    rank, local_rank, world_size = read_torchrun()
    job = read_job(args)
    default_seed = job.source.meta.get("seed", 11) if job.source else 11
    seeds = parse_seeds(args.seeds or str(default_seed))
    on_gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
    device = pick_device(f"cuda:{local_rank}" if on_gpu else args.device)
    job.cfg["amp"] = pick_precision(job.cfg["amp"], device)
    # torchrun: each process trains its share, and none needs the others
    learners = make_learners(job, seeds, args.out)[rank::world_size]
    check_folders(learners, job.config, args.resume)

    settings = job.config["backbone"]
    attention = pick_attention(settings["attention"], device, job.cfg["amp"])
    backbone, tokenizer, identity = load_backbone(settings["name"], settings["revision"], attention,
                                                  settings["trust_remote_code"])
    texts = [job.corpus.read(language, "train")[0].text for language in job.languages]
    check_backbone(backbone, tokenizer, identity, job.reads, texts)
    check_source_backbone(job, identity)
    fit_max_length(job, backbone)
    describe_learners(learners, job, tokenizer, identity)
    if job.reads == "prompt" or (job.reads == "first" and job.mode == "full"):    # position 0
        backbone = first_position_only(backbone)
    for learner in learners:
        training = saved_training(learner.folder)
        if training is not None:
            learner.check_settings(training.get("settings"), learner.folder / "prompt.json")
    size = 1 if job.mode == "full" else job.cfg["learners_at_once"]
    passes = plan_passes(learners, size)
    if not train_passes(passes, job, backbone, tokenizer, device, args, quiet=rank > 0):
        return 130
    clear_passes(learners)      # a learner that ended early is in no pass, a crash may have come
    del backbone
    return report_results(learners, job, device, args, first=rank == 0)


def score_trained(folders, job, device, args):
    """Score new runs on all languages; adapted ones on their own, beside the source run's score."""
    trust = job.config["backbone"]["trust_remote_code"]
    runs = [Run(folder, trust=trust) for folder in folders]
    if not job.source:
        score_runs(runs, device=device, amp=job.cfg["amp"])
        return
    languages = [run.meta["adapted_to"] for run in runs]
    source_lines = score_runs([job.source], languages=list(dict.fromkeys(languages)), device=device,
                              amp=job.cfg["amp"], show=False)[0]
    before = {line["language"]: line["accuracy"] for line in source_lines}
    adapted_lines = score_runs(runs, device=device, amp=job.cfg["amp"], show=False)
    for run, (line,) in zip(runs, adapted_lines):
        language = line["language"]
        print(f"{run.name}: zero-shot {before[language]:.1f} %, adapted {line['accuracy']:.1f} % "
              f"on {language}")


def report_results(learners, job, device, args, first):
    """Score what was trained and say what to do next -> exit status: 2 if a learner diverged."""
    trained = [learner for learner in learners if saved_training(learner.folder) is not None]
    unscored = [learner.folder for learner in trained
                if not (learner.folder / "test.json").is_file()]
    if job.config["evaluate"]["after_training"] and unscored:
        score_trained(unscored, job, device, args)
    if trained and first:
        print(f"next:\n  python {in_reach('evaluate.py')} {shlex.quote(str(trained[0].folder))} "
              f"--text \"Your sentence\"\n  python {in_reach('report.py')} "
              f"{shlex.quote(args.out)}/*")
    diverged = [learner for learner in trained
                if str(saved_training(learner.folder).get("stopped")).startswith("diverged")]
    return 0 if len(trained) == len(learners) and not diverged else 2


if __name__ == "__main__":
    run_main(main)
