"""Train soft prompts on source languages with the backbone frozen; several seeds go through it in one pass.

The paper's sections "Method" and "Experimental setup". config.yaml holds the recipe, setting by setting.

    python train.py --mode xpe --sources config.yaml                        # XPE, XLM-R-large, Joshi5, from the hub
    python train.py --mode dual --ratio 0.3 --sources config.yaml --seeds 11-20
    python train.py --mode xpe --sources sample/config.yaml                 # offline, on a laptop
    python train.py --sources config.yaml --adapt runs/xpe-joshi5-s11 --group diverse_unseen
    torchrun --nproc_per_node=2 train.py ... --seeds 11-14                  # each process trains its share of the seeds

Read downwards: optimizer, schedule, learner, checkpoints, then `train`, the loop.
"""
import argparse
import json
import math
import os
import platform
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from tqdm import tqdm

import xpe
from data import Corpus, collate, encode, fingerprint, length_batches, locate, nearest, run_main
from evaluate import (Run, load_backbone, load_config, pick_device, place, predict, report_scores, resolve_group,
                      tokenizer_fingerprint, warn)

MODES = ("spt", "xpe", "dual", "head", "full")


# ---- optimizer and schedule -----------------------------------------------------------------------------------------

class Optimizer:
    """Clips and steps K learners in one model, each by itself: every tensor is (K, ...), slice k is learner k's.

    `adafactor` is transformers.Adafactor with a fixed rate (no relative step, no parameter scaling, clip threshold 1,
    decay -0.8, no momentum), as the authors' runs had it; `adamw` is torch's. A learner whose gradient is not finite
    stands still from then on (`failed_at`: the step); under fp16 its loss scale is halved and that step left out. No
    operation here waits for the GPU.
    """

    def __init__(self, groups, K, rule, clip, fp16):
        self.groups, self.rule, self.clip, self.fp16 = groups, rule, clip, fp16
        device = groups[0]["params"][0].device
        self.steps = torch.zeros(K, dtype=torch.float64, device=device)         # steps taken by each learner
        self.scale = torch.full((K,), 2.0 ** 16 if fp16 else 1.0, device=device)
        self.good = torch.zeros(K, device=device)                               # steps since the scale last changed
        self.failed_at = torch.zeros(K, device=device)
        self.moments = []                                                       # two tensors for each parameter
        for p in self.parameters():
            x = self._k(p)
            factored = rule == "adafactor" and x.dim() > 2
            self.moments.append([torch.zeros_like(x.mean(-1) if factored else x, memory_format=torch.contiguous_format),
                                 torch.zeros_like(x.mean(-2) if factored else x[:, :0] if rule == "adafactor" else x)])

    def parameters(self):
        """All parameters, in a fixed order."""
        return [p for group in self.groups for p in group["params"]]

    def _k(self, x):        # `full` trains one learner whose backbone tensors have no K: give them one
        return x if len(self.groups[0]["params"]) and self.stacked else x[None]

    stacked = True

    @torch.no_grad()
    def step(self, number, factor):
        """One step; number counts from 1, factor is the schedule's."""
        parameters = self.parameters()
        grads = [self._k(p.grad) for p in parameters]
        norm = torch.stack([g.flatten(1).float().square().sum(1) for g in grads]).sum(0).sqrt() / self.scale    # (K,)
        finite = norm.isfinite() & (self.failed_at == 0)
        shrink = torch.where(finite, (self.clip / (norm + 1e-6)).clamp(max=1) / self.scale, 0)
        self.steps += finite
        t, rate_of = self.steps.clamp(min=1), finite * factor                   # (K,): no rate, no step
        beta = torch.where(finite, 1 - t ** -0.8, 1).float()                    # Adafactor's running mean
        index = iter(range(len(grads)))
        for group in self.groups:
            for p in group["params"]:
                i = next(index)
                x, (first, second) = self._k(p), self.moments[i]
                def k(v): return v.view(-1, *[1] * (x.dim() - 1))               # (K,) -> (K, 1, ...)
                g = torch.where(k(finite), grads[i] * k(shrink), 0)
                rate = k(rate_of * group["rate"])
                if self.rule == "adafactor":
                    square = g * g + 1e-30
                    if x.dim() > 2:                                             # factored: rows and columns
                        b = beta.view(-1, *[1] * (x.dim() - 2))
                        first.mul_(b).add_(square.mean(-1) * (1 - b))
                        second.mul_(b).add_(square.mean(-2) * (1 - b))
                        row = (first / first.mean(-1, keepdim=True)).rsqrt()[..., None]
                        update = row * second.rsqrt().unsqueeze(-2) * g
                    else:
                        first.mul_(k(beta)).add_(square * (1 - k(beta)))
                        update = first.rsqrt() * g
                    rms = update.flatten(1).square().mean(1).sqrt()
                    update /= k(rms.clamp(min=1))
                else:
                    first.copy_(torch.where(k(finite), 0.9 * first + 0.1 * g, first))
                    second.copy_(torch.where(k(finite), 0.999 * second + 0.001 * g * g, second))
                    update = first / k((1 - 0.9 ** t).float()) / ((second / k((1 - 0.999 ** t).float())).sqrt() + 1e-8)
                x -= rate * (update.nan_to_num(0, 0, 0) + group["weight_decay"] * x)
        for p in parameters:
            p.grad = None
        if self.fp16:       # torch's GradScaler, but one scale for each learner
            self.good = torch.where(finite, self.good + 1, 0)
            self.scale *= torch.where(finite, torch.where(self.good >= 2000, 2.0, 1.0), 0.5)
            self.good *= self.good < 2000
            finite = finite | (self.scale >= 1)
        self.failed_at = torch.where(~finite & (self.failed_at == 0), float(number), self.failed_at)

    def tensors(self, k):
        """Everything that slice k needs to go on."""
        return [x[k].detach().cpu().clone() for x in self._all()]

    def load(self, slices):
        """Put back what `tensors` gave, for all K."""
        for x, *values in zip(self._all(), *slices):
            x.copy_(torch.stack(values))

    def keep(self, indices):
        """Let only these learners go on: the stack becomes smaller."""
        self.moments = [[m[indices] for m in pair] for pair in self.moments]
        self.steps, self.scale, self.good, self.failed_at = (
            v[indices] for v in (self.steps, self.scale, self.good, self.failed_at))
        for p in self.parameters():
            p.data = p.data[indices] if self.stacked else p.data

    def _all(self):
        return [self.steps, self.scale, self.good, self.failed_at, *(m for pair in self.moments for m in pair)]


def schedule(step, steps, warmup, kind, cycles):
    """Factor on every rate at a step (from 0): linear warm-up, then a cosine with hard restarts, or a line to zero.
    The formula is that of transformers' get_cosine_with_hard_restarts_schedule_with_warmup."""
    warm = math.ceil(steps * warmup)
    if step < warm:
        return step / max(1, warm)
    progress = (step - warm) / max(1, steps - warm)
    if progress >= 1 or kind == "linear":
        return max(0.0, 1 - progress)
    return 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


# ---- what is trained ------------------------------------------------------------------------------------------------

class Task:
    """Training and dev sentences of some languages, tokenized: shared by all seeds that train on them."""

    def __init__(self, corpus, languages, tokenizer, max_length, balanced):
        read = {split: [s for language in languages for s in corpus.read(language, split)] for split in ("train", "dev")}
        self.languages, self.fingerprint = languages, fingerprint(read["train"] + read["dev"])
        self.ids = {split: encode([s.text for s in read[split]], tokenizer, max_length) for split in read}
        self.labels = {split: np.array([s.label for s in read[split]]) for split in read}
        self.lengths = np.array([len(x) for x in self.ids["train"]])
        counts = np.bincount(self.labels["train"], minlength=len(corpus.labels))
        self.weights = torch.tensor(len(self.lengths) / (len(counts) * counts.clip(1)) if balanced else
                                    np.ones(len(counts)), dtype=torch.float32)


class Learner:
    """One prompt in training: where it stands, its best state so far, its patience, its folder."""

    def __init__(self, name, out, seed, task, meta):
        self.name, self.folder, self.seed, self.task, self.meta = name, Path(out) / name, seed, task, meta
        self.state = dict(best=-1.0, best_step=0, best_loss=0.0, watched=math.inf, waited=0, stopped="", seconds=0.0,
                          metrics=0)
        self.tensors = None                 # of the best step: {"prompt": ..., "head": ..., "backbone": ...}

    @property
    def finished(self):
        """Whether an earlier process has brought this run to its end."""
        try:
            return bool(xpe.read_json(self.folder / "prompt.json")["training"]["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def judge(self, step, steps, accuracy, loss, train_loss, rate, settings):
        """Take in a dev evaluation: append to metrics.jsonl, return whether it is the best so far."""
        s, better = self.state, accuracy > self.state["best"]
        if better:
            s.update(best=accuracy, best_step=step, best_loss=loss)
        # authors' code: patience looks at the dev *loss*, from half of the steps on; the best is the best *accuracy*.
        if settings["patience"] and step >= int(steps * settings["patience_after"]):
            s["waited"] = 0 if loss < s["watched"] else s["waited"] + 1
            s["watched"] = min(s["watched"], loss)
            if s["waited"] >= settings["patience"]:
                s["stopped"] = f"no better dev loss in {s['waited']} evaluations"
        line = json.dumps(dict(step=step, loss=round(train_loss, 6), rate=rate, dev_accuracy=round(accuracy, 4),
                               dev_loss=round(loss, 6), best=round(s["best"], 4))).encode() + b"\n"
        with open(self.folder / "metrics.jsonl", "ab") as f:
            f.write(line)
        s["metrics"] += len(line)
        return better

    def write(self, finished):
        """Write the best state as a prompt folder."""
        s = self.state
        training = {"steps": self.meta["steps"], "best_step": s["best_step"], "dev_accuracy": s["best"],
                    "dev_loss": s["best_loss"], "stopped": s["stopped"], "finished": finished,
                    "seconds": round(s["seconds"], 1), "trainable": self.meta["trainable"]}
        if "backbone" in self.tensors:
            from safetensors.torch import save
            xpe.write_atomic(self.folder / "backbone.safetensors", save(self.tensors["backbone"]))
        xpe.save_prompt(self.folder, self.tensors.get("prompt", {}), self.tensors["head"],
                        {k: v for k, v in self.meta.items() if k not in ("steps", "trainable")} | {"training": training})


def snapshot(model, k, full):
    """The trained tensors of learner k, on the CPU."""
    out = {"head": xpe.take(model.head, k)}
    if model.prompt is not None:
        out["prompt"] = xpe.take(model.prompt, k)
    if full:
        out["backbone"] = {n: t.detach().cpu().clone() for n, t in model.backbone.state_dict().items()}
    return out


# ---- checkpoints: everything to go on, exactly ----------------------------------------------------------------------

def save_checkpoints(learners, step, model, optimizer, generators, full):
    """Write checkpoint-<step>.pt for all learners of a pass, and only then delete the older ones: whenever the process
    dies, there is one step at which all of them can go on together."""
    random = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    for k, learner in enumerate(learners):
        state = dict(format=1, step=step, state=learner.state, best=learner.tensors, random=random,
                     now=snapshot(model, k, full), optimizer=optimizer.tensors(k), dropout=generators[k].get_state())
        xpe.write_atomic(learner.folder / f"checkpoint-{step}.pt", lambda f: torch.save(state, f))
    for learner in learners:
        for old in learner.folder.glob("checkpoint-*.pt"):
            if old.name != f"checkpoint-{step}.pt":
                old.unlink()


def checkpoint_steps(learner):
    """The steps at which this learner can go on; 0, the start, is always one."""
    found = (re.fullmatch(r"checkpoint-(\d{1,12})\.pt", p.name) for p in learner.folder.glob("checkpoint-*.pt"))
    return {0} | {int(m[1]) for m in found if m}


def load_checkpoints(learners, step, model, optimizer, generators):
    """Put a pass back to where it stood at `step`. Raises ValueError for a file that is not such a checkpoint."""
    states = []
    for learner in learners:
        path = learner.folder / f"checkpoint-{step}.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["format"] != 1 or state["step"] != step or state["state"].keys() != learner.state.keys():
                raise ValueError("other contents")
            states.append(state)
        except Exception as e:      # whatever torch.load makes of a broken or hostile file; it never runs code
            raise ValueError(f"{path}: no checkpoint of this project: {type(e).__name__}: "
                             f"{(str(e) or 'unreadable').splitlines()[0][:100]}; remove it to start over") from None
    try:
        for part in ("prompt", "head"):
            module = getattr(model, part)
            for name, p in () if module is None else module.named_parameters():
                p.data.copy_(torch.stack([s["now"][part][name] for s in states]))
        if "backbone" in states[0]["now"]:
            model.backbone.load_state_dict(states[0]["now"]["backbone"])
        optimizer.load([s["optimizer"] for s in states])
        for learner, generator, state in zip(learners, generators, states):
            generator.set_state(state["dropout"])
            learner.state, learner.tensors = state["state"], state["best"]
            with open(learner.folder / "metrics.jsonl", "ab") as f:
                f.truncate(learner.state["metrics"])
        torch.set_rng_state(states[0]["random"][0])
        if states[0]["random"][1] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[0]["random"][1])
    except (KeyError, RuntimeError, TypeError) as e:
        raise ValueError(f"{learners[0].folder}: the checkpoint of step {step} does not fit this run: {e}") from None


# ---- the loop -------------------------------------------------------------------------------------------------------

def train(learners, model, autocast, groups, cfg, pad_id, device, resume=False, full=False, quiet=False):
    """Train K learners through one backbone until each has stopped. Returns False if it was interrupted.

    learners: K of them with equally many sentences; model: holds their K prompts and heads; groups: the optimizer's;
    cfg: the settings of `train`. Every evaluation, best state, patience and file is each learner's own.
    """
    generators = [torch.Generator(device).manual_seed(learner.seed) for learner in learners]
    model.set_generators(generators)
    model.train()
    model.backbone.train(cfg["dropout"])
    torch.manual_seed(learners[0].seed)                     # of the backbone's dropout
    Optimizer.stacked = not full
    optimizer = Optimizer(groups, len(learners), cfg["optimizer"], cfg["clip"], cfg["amp"] == "fp16")
    n, B, accumulate = len(learners[0].task.lengths), cfg["batch_size"], max(1, cfg["accumulate"])
    batches = -(-n // B)
    per_epoch = -(-batches // accumulate)
    steps = cfg["epochs"] * per_epoch or cfg["steps"]
    every = cfg["evaluate_every"] or per_epoch
    step = 0
    if resume and (step := max(set.intersection(*(checkpoint_steps(x) for x in learners)))):
        load_checkpoints(learners, step, model, optimizer, generators)
    for learner in learners:
        learner.meta["steps"] = steps
        if not step:
            for old in (*learner.folder.glob("checkpoint-*.pt"), learner.folder / "metrics.jsonl"):
                old.unlink(missing_ok=True)
    saved, last, loss_sum, since, epoch, orders = step, time.time(), 0, 0, None, None
    bar = tqdm(total=steps, initial=step, unit=" steps", disable=quiet, dynamic_ncols=True)
    with Interrupts() as interrupts:
        while step < steps and learners:
            if epoch != step // per_epoch:
                epoch = step // per_epoch
                orders = [length_batches(x.task.lengths, B, x.seed, epoch) for x in learners]
            micro = range(step % per_epoch * accumulate, min((step % per_epoch + 1) * accumulate, batches))
            for i in micro:
                rows = [(x, j) for x, order in zip(learners, orders) for j in order[i]]
                ids, mask = collate([x.task.ids["train"][j] for x, j in rows], pad_id, 8 if device.type == "cuda" else 1)
                labels = torch.tensor([x.task.labels["train"][j] for x, j in rows])
                ids, mask, labels = (t.to(device, non_blocking=True) for t in (ids, mask, labels))
                with autocast():
                    logits = model(ids, mask)                                           # (K * B, C)
                K = len(learners)
                weights = torch.stack([x.task.weights for x in learners]).to(device)    # (K, C)
                weights = weights.gather(1, labels.view(K, -1))                         # (K, B)
                loss = F.cross_entropy(logits.float(), labels, reduction="none").view(K, -1)
                loss = (loss * weights).sum(1) / weights.sum(1) / len(micro)            # (K,)
                (loss * optimizer.scale).sum().backward()
                loss_sum = loss_sum + loss.detach()
            rate = schedule(step, steps, cfg["warmup"], cfg["schedule"], cfg["cycles"])
            optimizer.step(step + 1, rate)
            step, since = step + 1, since + 1
            bar.update()
            if step % 25 == 0 and not quiet:
                bar.set_postfix_str(f"loss {float(loss_sum.mean()) / since:.3f}{best_of(learners)}")
            if step % every == 0 or step == steps:
                judge_all(learners, model, optimizer, step, steps, loss_sum / since, rate, cfg, pad_id, autocast, full)
                loss_sum, since = 0, 0
                if not quiet:
                    bar.set_postfix_str(f"dev {' '.join(f'{x.last:.1f}' for x in learners[:5])}{best_of(learners)}")
                now = time.time()
                for learner in learners:
                    learner.state["seconds"] += now - last
                last = now
                for learner in learners if step == steps else ():
                    learner.state["stopped"] = learner.state["stopped"] or "all steps"
                ended = [k for k, x in enumerate(learners) if x.state["stopped"]]
                if ended or step - saved >= cfg["checkpoint_every"]:
                    save_checkpoints(learners, step, model, optimizer, generators, full)
                    saved = step
                for k in ended:
                    finish(learners[k])
                if ended:       # the others go on in a smaller stack
                    stay = [k for k in range(K) if k not in ended]
                    learners, generators, orders = ([x[k] for k in stay] for x in (learners, generators, orders))
                    if stay:
                        for p in (*model.head.parameters(), *(model.prompt.parameters() if model.prompt else ())):
                            if not p.requires_grad:
                                p.data = p.data[stay]
                        optimizer.keep(stay)
                        model.set_generators(generators)
            if interrupts.got and learners:
                save_checkpoints(learners, step, model, optimizer, generators, full)
                break
    bar.close()
    return not learners


def best_of(learners):
    """' | best dev 61.2': the mean over learners of their best so far."""
    have = [x.state["best"] for x in learners if x.state["best"] >= 0]
    return f" | best dev {np.mean(have):.1f}" if have else ""


def judge_all(learners, model, optimizer, step, steps, train_loss, rate, cfg, pad_id, autocast, full):
    """Evaluate every learner on its own dev split, all in one pass, and let each judge itself."""
    sizes = [len(x.task.labels["dev"]) for x in learners]
    owner = torch.arange(len(learners)).repeat_interleave(torch.tensor(sizes))
    logits = predict(model, [ids for x in learners for ids in x.task.ids["dev"]], pad_id, owner, cfg["tokens"], autocast)
    model.backbone.train(cfg["dropout"])
    failed = optimizer.failed_at.tolist()
    for k, (learner, part) in enumerate(zip(learners, logits.split(sizes))):
        labels = torch.from_numpy(learner.task.labels["dev"])
        learner.last = 100.0 * float((part.argmax(1) == labels).double().mean())
        loss = float(F.cross_entropy(part, labels))
        if failed[k] or not math.isfinite(loss):
            at = f"step {int(failed[k])}" if failed[k] else f"the evaluation at step {step}"
            learner.state["stopped"] = (f"diverged: not a finite number at {at} (seed {learner.seed}, "
                                        f"{', '.join(learner.task.languages[:8])})")
        elif learner.judge(step, steps, learner.last, loss, float(train_loss[k]), rate, cfg):
            learner.tensors = snapshot(model, k, full)


def finish(learner):
    """Write what a learner that has stopped leaves, and say where it is and how good."""
    if learner.tensors is None:
        warn(f"{learner.name}: {learner.state['stopped']}; no good state before that, lower train.rate")
        return
    learner.write(finished=True)
    for old in learner.folder.glob("checkpoint-*.pt"):
        old.unlink()
    s = learner.state
    if s["stopped"].startswith("diverged"):
        warn(f"{learner.name}: {s['stopped']}; kept step {s['best_step']}")
    tqdm.write(f"{learner.folder}: dev accuracy {s['best']:.1f} at step {s['best_step']}, {s['stopped']}, "
               f"{s['seconds']:.0f} s")


class Interrupts:
    """Turns Ctrl-C and SIGTERM into a flag, so that the step ends and the checkpoint is written; the second one ends
    the program at once."""

    def __enter__(self):
        self.got, self.old = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):      # not in the main thread
                self.old[number] = signal.signal(number, self._flag)
        return self

    def _flag(self, number, frame):
        self.got = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


# ---- the command line -----------------------------------------------------------------------------------------------

def parse_seeds(text):
    """'11-13,20' -> [11, 12, 13, 20]."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]) or int(match[2] or match[1]) - int(match[1]) > 999:
            raise ValueError(f"--seeds {text}: write 11, 11-20 or 11,15")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds {text}: a seed stands twice")
    return seeds


def settings_for(config, mode, adapt, steps):
    """The `train` section as this mode has it, with the few values of other sections that the loop needs."""
    cfg = config["train"] | (config["full"] if mode == "full" else {}) | (config["adapt"] if adapt else {})
    if steps is not None:
        cfg |= {"steps": steps, "epochs": 0}
    if cfg["batch_size"] < 1 or not (cfg["steps"] or cfg["epochs"]) or config["train"]["learners_at_once"] < 1:
        raise ValueError("train: steps, batch_size and learners_at_once must be at least 1")
    return cfg | {"dropout": config["backbone"]["dropout"], "tokens": config["evaluate"]["tokens"]}


def parameter_groups(model, cfg, mode):
    """Every trainable tensor in a group with its rate: [{params, rate, weight_decay}]."""
    groups = {}
    for name, p in model.named_parameters():
        if mode == "head" and name.startswith("prompt."):
            p.requires_grad_(False)
        if not p.requires_grad:
            continue
        kind = "standard_" if name == "prompt.standard" else "encoded_" if name == "prompt.encoded" else ""
        bias = not kind and ("bias" in name or "norm" in name.lower())      # transformers' rule: no decay on these
        key = cfg[f"{kind}rate"], 0.0 if bias else cfg[f"{kind}weight_decay"]
        groups.setdefault(key, []).append(p)
    return [dict(params=params, rate=rate, weight_decay=decay) for (rate, decay), params in groups.items()]


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Train soft prompts on source languages with the backbone frozen.")
    parser.add_argument("--mode", choices=MODES, help="spt, xpe, dual, or the baselines head and full")
    parser.add_argument("--ratio", type=float, help="with --mode dual: share of encoded rows (0.3 and 0.7 in the paper)")
    parser.add_argument("--sources", required=True, metavar="FILE", help="the configuration; it names the source group")
    parser.add_argument("--group", help="another group of that file")
    parser.add_argument("--languages", help="these languages instead, separated by commas")
    parser.add_argument("--seeds", help="11, 11-20 or 11,15 (default: 11)")
    parser.add_argument("--data", help="folder <language>/{train,dev,test}.tsv, or a dataset on the hub")
    parser.add_argument("--backbone", help="folder, or a model on the hub")
    parser.add_argument("--steps", type=int, help="optimizer steps at most")
    parser.add_argument("--adapt", metavar="RUN", help="adapt this run to each language of the group, fully supervised")
    parser.add_argument("--out", default="runs", help="where the run folders go (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on with runs that were interrupted")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="any setting")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    args = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # torchrun sets them

    # what to train on
    config = load_config(args.sources, args.set)
    for section, value in (("data", args.data), ("backbone", args.backbone)):
        if value:
            config[section]["name"] = value
    source = Run(args.adapt, args.backbone, args.data) if args.adapt else None
    if source and args.mode not in (None, source.meta["kind"]):
        raise ValueError(f"--mode {args.mode}: {args.adapt} is a {source.meta['kind']} run")
    if source and source.meta["kind"] == "full":
        raise ValueError(f"--adapt {args.adapt}: a fully fine-tuned run has no prompt to adapt")
    mode = source.meta["kind"] if source else args.mode
    if not mode:
        raise ValueError(f"--mode is missing: {', '.join(MODES)}")
    if args.ratio is not None:
        if mode != "dual" or not 0 < args.ratio < 1:
            raise ValueError(f"--ratio {args.ratio}: a share between 0 and 1, with --mode dual")
        config["prompt"]["ratio"] = args.ratio
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}: at least 1")
    cfg = settings_for(config, mode, source, args.steps)
    group = args.group or ("" if source else config["sources"])
    if args.languages:
        languages = args.languages.split(",")
    elif group in config["groups"]:
        languages = resolve_group(config, group)
    else:
        raise ValueError(f"no group {group!r} in {args.sources}{nearest(group, config['groups'])}" if group else
                         "--adapt needs the target languages: --group NAME or --languages CODES")
    if len(set(languages)) != len(languages) or not languages:
        raise ValueError(f"languages: {', '.join(languages) or 'none'}: name each once")
    folder, revision = locate(config["data"]["name"], config["data"]["revision"])
    corpus = Corpus(folder)
    corpus.check(languages)
    if source and list(corpus.labels) != source.meta["labels"]:
        raise ValueError(f"{folder}: labels {', '.join(corpus.labels)}; {args.adapt} knows "
                         f"{', '.join(source.meta['labels'])}")
    seeds = parse_seeds(args.seeds or str((source.meta.get("seed") if source else None) or 11))

    # the learners: one for each seed, or for each seed and target language
    b = config["backbone"]
    backbone, tokenizer, identity = load_backbone(b["name"], b["revision"], b["attention"], b["trust_remote_code"])
    if source and source.meta["backbone"].get("fingerprint", identity["fingerprint"]) != identity["fingerprint"]:
        raise ValueError(f"--adapt {args.adapt}: was trained on another backbone than {b['name']}")
    h_in, h_out = xpe.widths(backbone)
    p = config["prompt"]
    ratio = {"spt": 0.0, "xpe": 1.0, "dual": p["ratio"], "head": 0.0}.get(mode)
    label = f"dual{round(100 * p['ratio'])}" if mode == "dual" else mode
    place_name = ("+".join(languages) if len(languages) < 4 else f"{len(languages)}-languages") if args.languages else group
    max_length = source.meta["max_length"] if source else config["data"]["max_length"]
    balanced = cfg["class_weights"] == "balanced"
    tasks = [Task(corpus, [x], tokenizer, max_length, balanced) for x in languages] if source else \
        [Task(corpus, languages, tokenizer, max_length, balanced)]
    learners = []
    for seed in seeds:
        for task in tasks:
            meta = {"kind": mode, "prompt": None, "head": None, "reads": "first" if mode == "full" else p["reads"],
                    "backbone": identity, "labels": list(corpus.labels), "max_length": max_length,
                    "tokenizer": tokenizer_fingerprint(tokenizer), "sources": languages, "seed": seed,
                    "data": {"name": config["data"]["name"], "revision": revision, "fingerprint": task.fingerprint},
                    "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                 "transformers": transformers.__version__}}
            name = f"{label}-{place_name}-s{seed}"
            if source:
                meta |= {"sources": source.sources, "adapted_to": task.languages[0], "adapted_from": source.name,
                         "reads": source.meta["reads"]}
                name = f"{re.sub(r'-s[0-9]+$', '', source.name)}-to-{task.languages[0]}-s{seed}"
            learners.append(Learner(name, args.out, seed, task, meta))
    for learner in learners:
        if not args.resume and learner.folder.exists():
            raise FileExistsError(f"{learner.folder}: exists already; --resume goes on with it, --out starts elsewhere")
    size = 1 if mode == "full" else config["train"]["learners_at_once"]
    by_size = {}                        # learners that share a pass have equally many sentences, so equal blocks
    for learner in learners:
        by_size.setdefault(len(learner.task.lengths), []).append(learner)
    passes = [same[i:i + size] for same in by_size.values() for i in range(0, len(same), size)]
    if world > 1:                       # torchrun: each process takes its share, and none needs to hear of another
        mine = learners[rank::world]
        passes = [mine[i:i + size] for i in range(0, len(mine), size)]
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and args.device == "auto"
                         and torch.cuda.is_available() else args.device)
    if config["backbone"]["name"] == "" or (mode != "full" and p["length"] < 1):
        raise ValueError("prompt.length must be at least 1")

    # train
    fresh = {k: v.clone() for k, v in backbone.state_dict().items()} if mode == "full" else None
    start, failed = time.time(), []
    for chunk in passes:
        todo = [x for x in chunk if not (args.resume and x.finished)]
        for learner in chunk:
            if learner not in todo:
                print(f"{learner.folder}: finished already")
        if not todo:
            continue
        prompts, heads = [], []
        for learner in todo:
            torch.manual_seed(learner.seed)
            if source:
                sizes = source.prompt.config | {"dropout": cfg.get("prompt_dropout", source.prompt.config["dropout"])}
                prompts.append(xpe.put(xpe.SoftPrompt(**sizes), xpe.take(source.prompt, 0)))
                heads.append(xpe.put(xpe.ClassificationHead(**source.head.config), xpe.take(source.head, 0)))
            else:
                if mode != "full":
                    prompts.append(xpe.SoftPrompt(h_in, p["length"], ratio, p["encoder"], p["hidden"], p["layers"],
                                                  p["dropout"], p["heads"]))
                drop = getattr(backbone.config, "classifier_dropout", None)
                drop = getattr(backbone.config, "hidden_dropout_prob", 0.1) if drop is None else drop
                heads.append(xpe.ClassificationHead(h_out, len(corpus.labels), float(drop)))
            learner.meta |= {"prompt": prompts[-1].config if prompts else None, "head": heads[-1].config}
        if fresh:
            backbone.load_state_dict(fresh)
            backbone.requires_grad_(True)
        model = xpe.PromptedClassifier(backbone, xpe.stack(prompts) if prompts else None, xpe.stack(heads),
                                       todo[0].meta["reads"], frozen=mode != "full")
        autocast = place(model, device, cfg["amp"], cfg["frozen_weights"])
        groups = parameter_groups(model, cfg, mode)
        trainable = sum(q.numel() for g in groups for q in g["params"]) // len(todo)
        for learner in todo:
            learner.meta["trainable"] = trainable
            learner.folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)
            xpe.write_atomic(learner.folder / "config.yaml", text.encode())
        if rank == 0:
            print(f"{mode}: {len(todo)} learner{'s' * (len(todo) > 1)} x {trainable:,} trainable numbers on "
                  f"{', '.join(languages[:8])}{' ...' * (len(languages) > 8)}; {len(todo[0].task.lengths):,} sentences, "
                  f"{device.type}, {cfg['amp']}", flush=True)
        try:
            done = train(todo, model, autocast, groups, cfg, tokenizer.pad_token_id or 0, device, args.resume,
                         mode == "full", quiet=rank > 0)
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
                raise
            raise ValueError(f"out of memory with {len(todo)} learners x {cfg['batch_size']} sentences: lower "
                             f"train.learners_at_once (now {size}), train.batch_size or evaluate.tokens") from None
        failed += [x for x in todo if x.tensors is None or x.state["stopped"].startswith("diverged")]
        if not done:
            print(f"interrupted; go on with: {' '.join(['python', *sys.argv])}{'' if args.resume else ' --resume'}")
            return 130
    if rank == 0 and world == 1:
        print(f"trained in {time.time() - start:.0f} s")
    finish_line(learners if world == 1 else learners[rank::world], failed, source, config, args, device)
    return 2 if failed else 0


def finish_line(learners, failed, source, config, args, device):
    """Score what was trained, and say what to do next."""
    good = [x for x in learners if x not in failed]
    if config["evaluate"]["after_training"] and good:
        runs = [Run(x.folder, args.backbone, args.data) for x in good]
        targets = [x.meta["adapted_to"] for x in good] if source else []
        if source:
            print("\nbefore, zero-shot:")
            source.folder = source.folder.resolve()
            report_scores([source], "test", targets, device, whole=False)
            print("after adaptation, each to its own language:")
        report_scores(runs, "test", None, device)
    if good:
        names = " ".join(str(x.folder) for x in good[:2]) + (" ..." if len(good) > 2 else "")
        print(f"next:\n  python evaluate.py {names} --text \"Your sentence\"\n  python evaluate.py {args.out}/* --report")


if __name__ == "__main__":
    run_main(main)
