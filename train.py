"""Train soft prompts on source languages with the backbone frozen; several seeds go through it in one pass.

The paper's method and experimental setup; config.yaml holds the recipe, setting by setting.

    python train.py --mode xpe --sources config.yaml                        # the paper: XLM-R-large, Joshi5
    python train.py --mode dual --ratio 0.3 --sources config.yaml --seeds 11-20
    python train.py --mode xpe --sources sample/config.yaml                 # in miniature, offline
    python train.py --sources config.yaml --adapt runs/xpe-joshi5-s11 --group diverse_unseen
    torchrun --nproc_per_node=2 train.py ... --seeds 11-14                  # each process trains its share

Read downwards: optimizer, schedule, learner, checkpoints, `train` (the loop), and the command line.
"""
import argparse
import copy
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import save
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import xpe
from data import Corpus, collate, encode, fingerprint, length_batches, locate, nearest, run_main
from evaluate import (Run, accuracy, load_backbone, load_config, method_name, pick_device, place, predict,
                      report_scores, resolve_group, score, tokenizer_fingerprint, warn)


class Optimizer:
    """Clips and steps K learners in one model, each by itself: tensors are (K, ...), slice k is learner k's.

    `adafactor` is transformers.Adafactor with a fixed rate (no relative step, no parameter scaling, clip
    threshold 1, decay -0.8, no momentum), as the authors' runs had it; `adamw` is torch's. A learner whose
    gradient is not finite stands still from then on (`failed_at`: the step); under fp16 that step is left out
    and its loss scale halved. Nothing here waits for the GPU. Not `stacked`: one learner, tensors without K.
    """

    def __init__(self, groups, K, rule, clip, fp16, stacked=True):
        # each as it is, as (K, ...), and its group
        self.parameters = [(p, p if stacked else p.detach()[None], g) for g in groups for p in g["params"]]
        self.rule, self.clip, self.fp16 = rule, clip or math.inf, fp16      # clip 0: none
        device = groups[0]["params"][0].device
        self.steps = torch.zeros(K, dtype=torch.float64, device=device)     # taken by each learner
        self.scale = torch.full((K,), 2.0 ** 16 if fp16 else 1.0, device=device)
        self.good = torch.zeros(K, device=device)                           # steps since the scale changed
        self.failed_at = torch.zeros(K, device=device)
        self.loss = torch.zeros(K, device=device)                           # summed since the last evaluation
        self.moments = []
        for _, x, _ in self.parameters:
            shapes = [x, x] if rule == "adamw" else [x[..., 0], x[..., 0, :]] if x.dim() > 2 else [x]
            self.moments.append([torch.zeros(s.shape, device=device) for s in shapes])

    @torch.no_grad()
    def step(self, number, factor):
        """Step number `number`, counted from 1; factor is the schedule's."""
        grads = [p.grad.view_as(x) for p, x, _ in self.parameters]
        norm = torch.stack([g.flatten(1).float().square().sum(1) for g in grads]).sum(0).sqrt() / self.scale
        finite = norm.isfinite() & (self.failed_at == 0)                    # (K,)
        shrink = (self.clip / (norm + 1e-6)).clamp(max=1) / self.scale      # torch's clip_grad_norm_, K times
        self.steps += finite
        t = self.steps.clamp(min=1)
        new = (finite * t ** -0.8).float()      # Adafactor: weight of this step in its running means
        for (p, x, group), g, moments in zip(self.parameters, grads, self.moments):
            def k(v, like=x): return v.view(-1, *[1] * (like.dim() - 1))    # (K,) -> (K, 1, ...)
            g = torch.where(k(finite), g * k(shrink), 0)
            if self.rule == "adamw":
                unbiased = []
                for m, now, beta in zip(moments, (g, g * g), (0.9, 0.999)):
                    m.lerp_(now, k(finite * (1 - beta)))
                    unbiased.append(m / k((1 - beta ** t).float()))
                update = unbiased[0] / (unbiased[1].sqrt() + 1e-8)
            else:
                square = g * g + 1e-30
                for m, now in zip(moments, [square.mean(-1), square.mean(-2)] if x.dim() > 2 else [square]):
                    m.lerp_(now, k(new, m))
                root = moments[0].rsqrt()
                if x.dim() > 2:     # the second moment as the outer product of its rows' and columns' means
                    row, column = moments
                    row = row / row.mean(-1, keepdim=True)
                    root = row.rsqrt()[..., None] * column.rsqrt()[..., None, :]
                update = g * root
                update = update / k(update.flatten(1).square().mean(1).sqrt().clamp(min=1))
            rate = k(finite * (factor * group["rate"]))                     # not finite: no rate, no step
            x -= rate * torch.where(k(finite), update, 0) + rate * group["weight_decay"] * x
            p.grad = None
        if self.fp16:       # torch's GradScaler, but one scale for each learner
            self.good = torch.where(finite, self.good + 1, 0)
            self.scale *= torch.where(finite, 1 + (self.good >= 2000).float(), 0.5)
            self.good *= self.good < 2000
            finite = finite | (self.scale >= 1)
        self.failed_at = torch.where(~finite & (self.failed_at == 0), float(number), self.failed_at)

    def tensors(self):
        """All that a step changes, each (K, ...)."""
        return [self.steps, self.scale, self.good, self.failed_at, self.loss, *sum(self.moments, []),
                *(x for _, x, _ in self.parameters)]


def schedule(step, steps, warmup, kind, cycles):
    """Factor on every rate at a step (from 0): linear warm-up, then a cosine with hard restarts or a line to
    zero, as transformers' get_cosine_with_hard_restarts_schedule_with_warmup has it."""
    warm = math.ceil(steps * warmup)
    if step < warm:
        return step / warm
    progress = (step - warm) / (steps - warm)
    return 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


class Task:
    """Training and dev sentences of some languages, tokenized: shared by all seeds that train on them."""

    def __init__(self, corpus, languages, tokenizer, max_length, balanced):
        read = {s: [x for language in languages for x in corpus.read(language, s)] for s in ("train", "dev")}
        self.languages, self.fingerprint = languages, fingerprint(read["train"] + read["dev"])
        self.ids = {s: encode([x.text for x in read[s]], tokenizer, max_length) for s in read}
        self.labels = {s: np.array([x.label for x in read[s]]) for s in read}
        self.lengths = np.array([len(x) for x in self.ids["train"]])
        counts = np.bincount(self.labels["train"], minlength=len(corpus.labels))
        weights = len(self.lengths) / (len(counts) * counts.clip(1)) if balanced else np.ones(len(counts))
        self.weights = torch.tensor(weights, dtype=torch.float32)           # (C,)


class Learner:
    """One prompt in training: where it stands, its best tensors so far, its folder."""

    def __init__(self, folder, seed, task, meta):
        self.folder, self.seed, self.task, self.meta = Path(folder), seed, task, meta
        self.log = self.folder / "metrics.jsonl"
        self.state = dict(best=-1.0, best_step=0, best_loss=0.0, watched=math.inf, waited=0, stopped="",
                          seconds=0.0, metrics=0, dev=0.0)
        self.tensors = None                 # of the best step: see snapshot

    @property
    def finished(self):
        """What prompt.json says of the training, if this run has ended with something to keep, or {}."""
        try:
            training = xpe.read_json(self.folder / "prompt.json")["training"]
            return training if training["finished"] is True else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def check(self, settings, path):
        """Raise ValueError if `settings`, found at `path`, are not those of this run, memory's aside."""
        for key, mine in self.meta["training"]["settings"].items():
            was = settings.get(key) if isinstance(settings, dict) else None
            if (type(was), was) != (type(mine), mine) and key not in ("learners_at_once", "tokens"):
                raise ValueError(f"{path}: {key} was {was!r}, not {mine!r}: --resume goes on with the same "
                                 f"settings only")

    def checkpoints(self):
        """{step: file}, for the steps at which it can go on."""
        files = self.folder.glob("checkpoint-*.pt")
        return {int(f.stem[11:]): f for f in files if f.stem[11:].isdecimal()}

    def clear(self, but=None):
        """Delete the checkpoints, but for that of one step."""
        for step, file in self.checkpoints().items():
            if step != but:
                file.unlink()

    def ended(self):
        """Whether there is nothing left to train: it then says so. Clears away debris."""
        for file in self.folder.glob(".*.????????"):    # what a killed process was about to rename
            file.unlink()
        lost = self.folder / "diverged.txt"
        if lost.is_file():
            print(f"{self.folder}: {lost.read_text().strip()}; remove the folder to try again")
        elif self.finished:
            print(f"{self.folder}: finished already")
        else:
            return False
        self.clear()
        return True

    def judge(self, step, steps, logits, train_loss, failed, cfg):
        """Take in a dev evaluation, logits (n, C), append it to metrics.jsonl, return whether it is the best.
        failed: the step whose loss or gradient was not finite, or 0."""
        s, labels = self.state, self.task.labels["dev"]
        loss = float(F.cross_entropy(logits, torch.from_numpy(labels)))
        if failed or not math.isfinite(loss):
            s["stopped"] = (f"diverged: loss or gradient not finite at step {failed or step}, "
                            f"seed {self.seed}, {', '.join(self.task.languages[:8])}")
            return False
        s["dev"] = accuracy(labels, logits.argmax(1))
        s["stopped"] = "all steps" if step == steps else ""
        better = s["dev"] > s["best"]
        if better:
            s.update(best=s["dev"], best_step=step, best_loss=loss)
        # authors' code: patience watches the dev *loss*, from half of the steps; kept is the best *accuracy*
        if cfg["patience"] and step >= int(steps * cfg["patience_after"]):
            s["waited"] = 0 if loss < s["watched"] else s["waited"] + 1
            s["watched"] = min(s["watched"], loss)
            if s["waited"] >= cfg["patience"]:
                s["stopped"] = f"no better dev loss in {s['waited']} evaluations"
        line = json.dumps(dict(step=step, loss=round(train_loss, 6), dev_accuracy=round(s["dev"], 4),
                               dev_loss=round(loss, 6), best=round(s["best"], 4))).encode() + b"\n"
        try:
            with open(self.log, "ab") as f:
                f.write(line)
        except OSError as e:        # a full disk says no name by itself
            raise OSError(e.errno, e.strerror, str(self.log)) from None
        s["metrics"] += len(line)
        return better

    def finish(self):
        """Write the best state as a prompt folder, drop the checkpoints, say where it is and how good."""
        s, best = self.state, self.tensors
        if s["stopped"].startswith("diverged"):
            kept = f"kept step {s['best_step']}" if best else "nothing good to keep; lower train.rate"
            warn(f"{self.folder}: {s['stopped']}; {kept}")
        if best is None:
            xpe.write_atomic(self.folder / "diverged.txt", f"{s['stopped']}\n".encode())
        else:
            if "backbone" in best:
                xpe.write_atomic(self.folder / "backbone.safetensors", save(best["backbone"]))
            self.meta["training"] |= {"best_step": s["best_step"], "dev_accuracy": s["best"],
                                      "dev_loss": s["best_loss"], "stopped": s["stopped"], "finished": True,
                                      "seconds": round(s["seconds"], 1)}
            xpe.save_prompt(self.folder, best.get("prompt", {}), best["head"], self.meta)
            tqdm.write(f"{self.folder}: dev accuracy {s['best']:.1f} at step {s['best_step']}, "
                       f"{s['stopped']}, {s['seconds']:.0f} s")
        self.clear()


def snapshot(model, k):
    """The trained tensors of learner k, on the CPU."""
    out = {"head": xpe.take(model.head, k)}
    if model.prompt is not None:
        return out | {"prompt": xpe.take(model.prompt, k)}
    return out | {"backbone": {n: t.detach().cpu().clone() for n, t in model.backbone.state_dict().items()}}


def standing(learners, step, optimizer, generators):
    """All that each learner of a pass needs to go on from `step`: what its checkpoint holds."""
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    for k, (learner, generator) in enumerate(zip(learners, generators)):
        yield dict(step=step, settings=learner.meta["training"]["settings"], state=learner.state,
                   best=learner.tensors, random=random, dropout=generator.get_state(),
                   now=[x.detach()[k].cpu().clone() for x in optimizer.tensors()])


def save_checkpoints(learners, step, optimizer, generators):
    """Write checkpoint-<step>.pt for all learners of a pass, and only then delete the older ones: whenever
    the process dies, there is a step at which all of them can go on together."""
    for learner, state in zip(learners, standing(learners, step, optimizer, generators)):
        xpe.write_atomic(learner.folder / f"checkpoint-{step}.pt", lambda f: torch.save(state, f))
    for learner in learners:
        learner.clear(but=step)


def layout(x):
    """A nest of dicts, lists, tensors and plain values without the values: keys, shapes and types."""
    if isinstance(x, dict):
        return {key: layout(value) for key, value in x.items()}
    if isinstance(x, list):
        return [layout(value) for value in x]
    return (x.shape, x.dtype) if torch.is_tensor(x) else type(x)


@torch.no_grad()
def load_checkpoints(learners, step, model, optimizer, generators):
    """Put a pass back to where it stood at `step`; ValueError for a file that is not such a checkpoint."""
    states = []
    for k, own in enumerate(standing(learners, step, optimizer, generators)):
        learner, path = learners[k], learners[k].folder / f"checkpoint-{step}.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            best = None if state["best"] is None else snapshot(model, k)
            own |= {"settings": state["settings"], "best": best}
            fits = layout(state) == layout(own) and state["step"] == step
            generators[k].set_state(state["dropout"])
            torch.set_rng_state(state["random"][0])
            for random in state["random"][1:]:
                torch.cuda.set_rng_state(random)
        except Exception as e:      # whatever torch.load makes of a broken or hostile file; it runs no code
            raise ValueError(f"{path}: no checkpoint of this run ({type(e).__name__}); without it "
                             f"the run starts over") from None
        learner.check(state["settings"], path)
        logged = learner.log.stat().st_size if learner.log.is_file() else 0
        if not fits or not 0 <= state["state"]["metrics"] <= logged:
            raise ValueError(f"{path}: does not fit this run; without it the run starts over")
        states.append(state)
    for learner, state in zip(learners, states):
        learner.state, learner.tensors = state["state"], state["best"]
        with open(learner.log, "ab") as f:
            f.truncate(learner.state["metrics"])        # the steps after will come again
    for x, *slices in zip(optimizer.tensors(), *(state["now"] for state in states), strict=True):
        x.copy_(torch.stack(slices))


class Interrupts:
    """Ctrl-C and SIGTERM become a flag: the step ends, a checkpoint is written. A second one ends at once."""

    def __enter__(self):
        self.got, self.old = False, {n: signal.signal(n, self._flag) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _flag(self, *_):
        self.got = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def train(learners, model, autocast, cfg, pad_id, device, step=0, quiet=False):
    """Train K learners through one backbone until each has stopped; False if the user interrupted that.

    They have equally many sentences, and model holds their K prompts and heads; cfg: see settings_for; step:
    that of the checkpoints to go on from.
    """
    optimizer = Optimizer(parameter_groups(model, cfg), len(learners), cfg["optimizer"], cfg["clip"],
                          cfg["amp"] == "fp16", stacked=model.prompt is not None)
    generators = [torch.Generator(device).manual_seed(x.seed) for x in learners]    # of each prompt's dropout
    torch.manual_seed(learners[0].seed)                                             # of the backbone's
    model.set_generators(generators)
    n, B, accumulate = len(learners[0].task.lengths), cfg["batch_size"], cfg["accumulate"]
    batches = -(-n // B)                                # of one epoch
    per_epoch = -(-batches // accumulate)               # steps
    steps = cfg["epochs"] * per_epoch or cfg["steps"]
    every = cfg["evaluate_every"] or per_epoch
    if step:
        load_checkpoints(learners, step, model, optimizer, generators)
    saved, clock, epoch, orders = step, time.time(), None, None
    weights = torch.stack([x.task.weights for x in learners]).to(device)                    # (K, C)
    model.eval()
    dropout = CheapDropout() if device.type == "cpu" else nullcontext()
    bar = tqdm(total=steps, initial=step, unit=" steps", disable=quiet or None, dynamic_ncols=True)
    with bar, Interrupts() as interrupts:
        while True:
            for x in learners:
                x.state["seconds"] += time.time() - clock
                if x.state["stopped"]:
                    x.finish()
            clock = time.time()
            stay = [k for k, x in enumerate(learners) if not x.state["stopped"]]
            if not stay:
                break
            if len(stay) < len(learners):               # the others go on in a smaller stack
                learners, generators, epoch = [learners[k] for k in stay], [generators[k] for k in stay], None
                for x in {*model.prompt.parameters(), weights, *optimizer.tensors()}:       # each once
                    x.data = x.data[stay]
                model.set_generators(generators)
            if interrupts.got:
                save_checkpoints(learners, step, optimizer, generators)
                break

            # one step: every learner's own batch, side by side
            K = len(learners)
            if not model.training:              # paper: the backbone is frozen, but its dropout is active
                model.train()
                model.backbone.train(cfg["dropout"])
            if epoch != step // per_epoch:
                epoch = step // per_epoch
                orders = [length_batches(x.task.lengths, B, x.seed, epoch) for x in learners]
            micro = range(batches)[step % per_epoch * accumulate:][:accumulate]
            for i in micro:
                rows = [(x.task, j) for x, order in zip(learners, orders) for j in order[i]]
                ids, mask = collate([t.ids["train"][j] for t, j in rows], pad_id)
                labels = torch.tensor([t.labels["train"][j] for t, j in rows])
                ids, mask, labels = (t.to(device, non_blocking=True) for t in (ids, mask, labels))
                with autocast(), dropout:
                    logits = model(ids, mask)                                               # (K * B, C)
                loss = F.cross_entropy(logits.float(), labels, reduction="none").view(K, -1)    # (K, B)
                w = weights.gather(1, labels.view(K, -1))
                loss = (loss * w).sum(1) / w.sum(1) / len(micro)                            # (K,)
                (loss * optimizer.scale).sum().backward()
                optimizer.loss += loss.detach()         # stays on the device: reading it would wait
            del logits, loss        # the graph goes: it would expect gradients of the size of a larger stack
            optimizer.step(step + 1, schedule(step, steps, cfg["warmup"], cfg["schedule"], cfg["cycles"]))
            step += 1
            bar.update()

            if step % every == 0 or step == steps:
                train_loss = optimizer.loss / ((step - 1) % every + 1)
                judge_all(learners, model, optimizer, step, steps, train_loss, cfg, pad_id, autocast)
                optimizer.loss.zero_()
                dev, best = (np.mean([x.state[key] for x in learners]) for key in ("dev", "best"))
                bar.set_postfix_str(f"loss {train_loss.mean():.3f}, dev accuracy {dev:.1f}, best {best:.1f}")
                if not quiet and step * 8 // steps > (step - every) * 8 // steps:     # a few lines that stay
                    tqdm.write(f"step {step:>6,} of {steps:,}: dev accuracy {dev:.1f}, best {best:.1f}")
                if step - saved >= cfg["checkpoint_every"] or any(x.state["stopped"] for x in learners):
                    save_checkpoints(learners, step, optimizer, generators)
                    saved = step
    return not interrupts.got


class CheapDropout(TorchFunctionMode):
    """ours: F.dropout by 16 random bits an element: on a CPU torch's own, which computes a double for each,
    takes a fifth of a step. (p = 0.1 becomes 0.100006.) Not for what is drawn in C++, as in SDPA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        own = self.dropout if function is F.dropout else function
        return own(*args, **(kwargs or {}))

    @staticmethod
    def dropout(input, p=0.5, training=True, inplace=False):
        """F.dropout's arguments and result."""
        if not training or not 0 < p < 0.999:
            return F.dropout(input, p, training, inplace)
        n = input.numel()
        bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        keep = bits[:n].view(input.shape).ge_(round(65536 * p) - 32768)         # 0 or 1
        return input * keep.to(input.dtype).mul_(1 / (1 - p))


def judge_all(learners, model, optimizer, step, steps, train_loss, cfg, pad_id, autocast):
    """Evaluate every learner on its own dev split, all in one pass, and let each judge itself."""
    sizes = [len(x.task.labels["dev"]) for x in learners]
    owner = torch.arange(len(learners)).repeat_interleave(torch.tensor(sizes))
    encoded = [ids for x in learners for ids in x.task.ids["dev"]]
    logits = predict(model, encoded, pad_id, owner, cfg["tokens"], autocast)
    for k, (learner, own) in enumerate(zip(learners, logits.split(sizes))):
        if learner.judge(step, steps, own, float(train_loss[k]), int(optimizer.failed_at[k]), cfg):
            learner.tensors = snapshot(model, k)


def parse_seeds(text):
    """'11-13,20' -> [11, 12, 13, 20]."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not low <= high <= low + 999:
            raise ValueError(f"--seeds {text}: write 11, 11-20 or 11,15")
        seeds += range(low, high + 1)
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds {text}: a seed stands twice")
    return seeds


def settings_for(config, mode, adapt, steps):
    """The `train` section as this mode has it, with the few values of other sections that the loop needs."""
    cfg = config["train"] | (config["full"] if mode == "full" else {}) | (config["adapt"] if adapt else {})
    cfg |= {} if steps is None else {"steps": steps, "epochs": 0}
    for key in ("batch_size", "accumulate", "learners_at_once"):
        if cfg[key] < 1:
            raise ValueError(f"train.{key} must be at least 1, not {cfg[key]}")
    if max(cfg["steps"], cfg["epochs"]) < 1:
        raise ValueError(f"--steps {cfg['steps']}: at least 1, or train.epochs")
    return cfg | {"mode": mode, "dropout": config["backbone"]["dropout"],
                  "tokens": config["evaluate"]["tokens"]}


def parameter_groups(model, cfg):
    """Every trainable tensor in a group with its rate: [{params, rate, weight_decay}]."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            own = {"prompt.standard": "standard_", "prompt.encoded": "encoded_"}.get(name, "")
            bias = not own and ("bias" in name or "norm" in name.lower())   # transformers: no decay there
            key = cfg[f"{own}rate"], 0.0 if bias else cfg[f"{own}weight_decay"]
            groups.setdefault(key, []).append(p)
    return [dict(params=params, rate=rate, weight_decay=decay) for (rate, decay), params in groups.items()]


def plan(args):
    """Read configuration, source run and data, and check what can be checked before anything is written
    -> config, cfg (settings_for), source (a Run to adapt, or None), group, languages, corpus, data."""
    config = load_config(args.sources, args.set)
    for section in ("data", "backbone"):
        config[section]["name"] = getattr(args, section) or config[section]["name"]
    if args.ratio is not None:
        config["prompt"]["ratio"] = args.ratio
    ratio, source = config["prompt"]["ratio"], Run(args.adapt) if args.adapt else None
    xpe.check("data.", {"max_length": config["data"]["max_length"]})
    if source:
        source.config = config      # it is scored on the data, and with the backbone, of its adaptations
    mode = args.mode or (source and source.meta["kind"])
    for wrong, message in (
            (not mode, f"--mode is missing: {', '.join(xpe.KINDS)}"),
            (source and (source.meta["kind"] != mode or mode == "full"),
             f"--adapt {args.adapt}: a {source and source.meta['kind']} run cannot be adapted as {mode}"),
            (args.ratio is not None and (mode != "dual" or source),
             f"--ratio {args.ratio}: goes with --mode dual, and not with --adapt"),
            (mode == "dual" and not 0 < ratio < 1,
             f"--ratio {ratio}: a share between 0 and 1 (prompt.ratio)"),
            (source and not args.group and not args.languages,
             "--adapt needs its target languages: --group NAME or --languages CODES")):
        if wrong:
            raise ValueError(message)
    group = args.group or config["sources"]
    if args.languages:
        languages = args.languages.split(",")
        group = "+".join(languages) if len(languages) < 4 else f"{len(languages)}-languages"
    elif group not in config["groups"]:
        raise ValueError(f"no group {group!r} in {args.sources}{nearest(group, config['groups'])}")
    else:
        languages = resolve_group(config, group)
    if not re.fullmatch(r"[\w+-][\w.+-]*", group):
        raise ValueError(f"group {group!r}: its name becomes a folder's: letters, digits, _ + - . only")
    cfg = settings_for(config, mode, source, args.steps)
    folder, revision = locate(config["data"]["name"], config["data"]["revision"])
    corpus = Corpus(folder)
    corpus.check(languages)
    if len(set(languages)) != len(languages) or not languages:
        raise ValueError(f"languages {', '.join(languages)}: at least one, and each once")
    if source and list(corpus.labels) != source.meta["labels"]:
        raise ValueError(f"{folder}: has the labels {', '.join(corpus.labels)}; {args.adapt} knows "
                         f"{', '.join(source.meta['labels'])}")
    if config["evaluate"]["after_training"]:        # what is wrong with these files is not told afterwards
        try:
            for language in languages if source else corpus.languages():
                corpus.read(language, "test")
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{e}; without scoring: --set evaluate.after_training=false") from None
    return SimpleNamespace(config=config, cfg=cfg, source=source, group=group, languages=languages,
                           corpus=corpus, data={"name": config["data"]["name"], "revision": revision})


def make_learners(job, args, tokenizer, identity):
    """One learner for each seed; with a source run, one for each seed and target language."""
    cfg, source, prompt, full = job.cfg, job.source, job.config["prompt"], job.cfg["mode"] == "full"
    given = source.meta if source else {"reads": "first" if full else prompt["reads"],
                                        "max_length": job.config["data"]["max_length"]}
    read = {key: given[key] for key in ("reads", "max_length")}
    settings = cfg | {"backbone": identity["fingerprint"]} | read
    if source:
        settings["source"] = source.name
        parts = [([x], f"{source.name}-to-{x}", {"sources": source.sources, "adapted_from": source.name,
                                                 "adapted_to": x}) for x in job.languages]
    else:
        settings |= {} if full else {f"prompt.{key}": value for key, value in prompt.items()}
        parts = [(job.languages, f"{method_name(cfg['mode'], prompt)}-{job.group}",
                  {"sources": job.languages})]
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    tasks = [Task(job.corpus, languages, tokenizer, read["max_length"], cfg["class_weights"] == "balanced")
             for languages, _, _ in parts]
    learners = []
    for seed in parse_seeds(args.seeds or str(given.get("seed", 11))):
        for task, (_, name, sources) in zip(tasks, parts):
            meta = {"kind": cfg["mode"], "backbone": identity, "tokenizer": tokenizer_fingerprint(tokenizer),
                    "labels": list(job.corpus.labels), **read, **sources, "seed": seed,
                    "data": job.data | {"fingerprint": task.fingerprint},
                    "training": {"settings": settings | {"data": task.fingerprint}, "versions": versions}}
            learners.append(Learner(Path(args.out) / f"{name}-s{seed}", seed, task, meta))
    return learners


def make_model(job, learners, backbone):
    """K prompts and heads around the backbone, each started from its own seed (or from the source run)."""
    full, source, prompts, heads = job.cfg["mode"] == "full", job.source, [], []
    h_in, h_out = xpe.widths(backbone)
    sizes = {k: v for k, v in job.config["prompt"].items() if k != "reads"}
    sizes["ratio"] = {"xpe": 1.0, "dual": sizes["ratio"]}.get(job.cfg["mode"], 0.0)
    drop = [getattr(backbone.config, x, None) for x in ("classifier_dropout", "hidden_dropout_prob")]
    drop = next((x for x in drop if x is not None), 0.1)            # as XLM-R's own head takes it
    for learner in learners:
        torch.manual_seed(learner.seed)
        if source:
            sizes = source.prompt.config | {"dropout": job.cfg["prompt_dropout"]}
            prompts.append(xpe.put(xpe.SoftPrompt(**sizes), xpe.take(source.prompt, 0)))
            heads.append(xpe.put(xpe.ClassificationHead(**source.head.config), xpe.take(source.head, 0)))
        else:
            prompts.append(None if full else xpe.SoftPrompt(h_in, **sizes))
            heads.append(xpe.ClassificationHead(h_out, len(learner.meta["labels"]), float(drop)))
        learner.meta |= {"prompt": None if full else prompts[-1].config, "head": heads[-1].config}
    if full:        # the next pass starts from the same weights
        backbone = copy.deepcopy(backbone)
    model = xpe.PromptedClassifier(backbone, None if full else xpe.stack(prompts), xpe.stack(heads),
                                   learners[0].meta["reads"], frozen=not full)
    if job.cfg["mode"] == "head":       # the baseline: a random prompt that stays random
        model.prompt.requires_grad_(False)
    return model


def run_pass(learners, job, backbone, tokenizer, device, quiet):
    """Train some learners in one pass; False if the user interrupted it. ValueError if it cannot."""
    cfg, pad_id, task = job.cfg, tokenizer.pad_token_id or 0, learners[0].task
    have = [set(x.checkpoints()) - {0} for x in learners]
    step = max(set.intersection(*have), default=0)      # 0: the start; again, if the first save was cut short
    if not step and any(have) and (all(have) or not all(x.folder.exists() for x in learners)):
        raise ValueError(f"{', '.join(x.folder.name for x in learners)}: stand at different steps: "
                         f"--resume them apart")
    model = make_model(job, learners, backbone)
    autocast = place(model, device, cfg["amp"], cfg["frozen_weights"])
    texts = [ids for x in learners for split in x.task.ids.values() for ids in split]
    ends = [min(texts, key=len), max(texts, key=len)]       # this also refuses texts that are too long
    if torch.equal(*predict(model, ends, pad_id, autocast=autocast)) and len(ends[0]) < len(ends[1]):
        raise ValueError("the head sees nothing of the text: a decoder needs --set prompt.reads=last")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad) // len(learners)
    for learner in learners:
        learner.meta["training"]["trainable"] = count
        if not step:
            learner.folder.mkdir(parents=True, exist_ok=True)
            learner.clear()
            learner.log.unlink(missing_ok=True)
            text = yaml.safe_dump(job.config, sort_keys=False, allow_unicode=True, width=110)
            xpe.write_atomic(learner.folder / "config.yaml", text.encode())
    print(f"{cfg['mode']}: {len(learners)} x {count:,} trainable numbers; {len(task.lengths):,} sentences of "
          f"{job.group}; {device.type}, {cfg['amp']}", flush=True)
    return train(learners, model, autocast, cfg, pad_id, device, step, quiet)


def main(argv=None):
    """Plan, train pass by pass, score -> exit status."""
    parser = argparse.ArgumentParser(description="Train soft prompts, the backbone frozen.")
    parser.add_argument("--mode", choices=xpe.KINDS, help="spt, xpe, dual, or the baselines head and full")
    parser.add_argument("--ratio", type=float, help="with --mode dual: share of encoded rows")
    parser.add_argument("--sources", required=True, metavar="FILE", help="settings; name the source group")
    parser.add_argument("--group", help="another group of that file")
    parser.add_argument("--languages", help="these languages instead, separated by commas")
    parser.add_argument("--seeds", help="11, 11-20 or 11,15 (default: 11)")
    parser.add_argument("--data", help="folder <language>/{train,dev,test}.tsv, or a dataset on the hub")
    parser.add_argument("--backbone", help="folder, or a model on the hub")
    parser.add_argument("--steps", type=int, help="optimizer steps at most")
    parser.add_argument("--adapt", metavar="RUN", help="adapt this run to each language of the group")
    parser.add_argument("--out", default="runs", help="where the run folders go (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on with runs that were interrupted")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="any setting")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    args = parser.parse_args(argv)
    rank, local, world = (int(os.environ.get(x) or 0) for x in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    job = plan(args)
    cfg, source, b = job.cfg, job.source, job.config["backbone"]
    backbone, tokenizer, identity = load_backbone(b["name"], b["revision"], b["attention"],
                                                  b["trust_remote_code"])
    if source and source.meta["backbone"].get("fingerprint") not in (None, identity["fingerprint"]):
        raise ValueError(f"--adapt {args.adapt}: was trained on another backbone than {b['name']}")
    # torchrun: each process trains its share, none needs the others
    learners = make_learners(job, args, tokenizer, identity)[rank::world or 1]
    for learner in learners:
        if learner.folder.exists() and not args.resume:
            raise FileExistsError(f"{learner.folder} exists: --resume goes on, --out starts elsewhere")
        if learner.finished:
            learner.check(learner.finished.get("settings"), learner.folder / "prompt.json")
    on_gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
    device = pick_device(f"cuda:{local}" if on_gpu else args.device)
    size = 1 if cfg["mode"] == "full" else cfg["learners_at_once"]
    alike = {}      # a pass has equal blocks of rows, so its learners have equally many sentences
    for learner in learners:
        alike.setdefault(len(learner.task.lengths), []).append(learner)
    for some in (some[i:i + size] for some in alike.values() for i in range(0, len(some), size)):
        todo = [x for x in some if not x.ended()]
        try:
            if todo and not run_pass(todo, job, backbone, tokenizer, device, quiet=rank > 0):
                by = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}" if world else "python"
                more = [] if args.resume else ["--resume"]
                print(f"interrupted; go on with: {by} {shlex.join(sys.argv + more)}")
                return 130
        except RuntimeError as e:
            if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
                raise
            raise ValueError(f"out of memory with {len(todo)} learners of {cfg['batch_size']} sentences: "
                             f"lower train.learners_at_once, train.batch_size or evaluate.tokens") from None
    good = [x for x in learners if x.finished]
    unscored = [x.folder for x in good if not (x.folder / "test.json").is_file()]
    if job.config["evaluate"]["after_training"] and unscored:
        runs = [Run(folder, args.backbone, args.data, b["trust_remote_code"]) for folder in unscored]
        before = score([source], "test", [job.languages], device)[source.name][0] if source else ()
        before = {row["language"]: row["accuracy"] for row in before}
        for run, (row, *_) in zip(runs, report_scores(runs, "test", None, device, show=not source)):
            if source:
                print(f"{run.name}: zero-shot {before[row['language']]:.1f} %, "
                      f"adapted {row['accuracy']:.1f} % on {row['language']}")
    if good and rank == 0:
        print(f"next:\n  python evaluate.py {good[0].folder} --text \"Your sentence\"\n"
              f"  python evaluate.py {args.out}/* --report")
    diverged = [x for x in good if str(x.finished.get("stopped")).startswith("diverged")]
    return 0 if len(good) == len(learners) and not diverged else 2


if __name__ == "__main__":
    run_main(main)
