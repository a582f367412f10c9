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
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import xpe
from data import Corpus, collate, encode, fingerprint, length_batches, locate, nearest, run_main
from evaluate import (Run, load_backbone, load_config, method_name, pick_device, place, predict,
                      report_scores, resolve_group, score, tokenizer_fingerprint, warn)


# ---- optimizer and schedule -------------------------------------------------------------------------------

class Optimizer:
    """Clips and steps K learners in one model, each by itself: tensors are (K, ...), slice k is learner k's.

    `adafactor` is transformers.Adafactor with a fixed rate (no relative step, no parameter scaling, clip
    threshold 1, decay -0.8, no momentum), as the authors' runs had it; `adamw` is torch's. A learner whose
    gradient is not finite stands still from then on (`failed_at`: the step); under fp16 that step is left out
    and its loss scale halved. Nothing here waits for the GPU. Not `stacked`: one learner, tensors without K.
    """

    def __init__(self, groups, K, rule, clip, fp16, stacked=True):
        self.of_each = [group for group in groups for _ in group["params"]]     # of each parameter its group
        self.groups, self.rule, self.clip, self.fp16, self.stacked = groups, rule, clip, fp16, stacked
        device = groups[0]["params"][0].device
        self.steps = torch.zeros(K, dtype=torch.float64, device=device)     # taken by each learner
        self.scale = torch.full((K,), 2.0 ** 16 if fp16 else 1.0, device=device)
        self.good = torch.zeros(K, device=device)                           # steps since the scale changed
        self.failed_at = torch.zeros(K, device=device)
        self.loss = torch.zeros(K, device=device)                           # summed since the last evaluation
        self.moments = []
        for p in self.parameters():
            x = self.with_k(p.detach())
            shapes = [x, x] if rule == "adamw" else [x[..., 0], x[..., 0, :]] if x.dim() > 2 else [x]
            self.moments.append([torch.zeros(s.shape, device=device) for s in shapes])

    def parameters(self):
        """All parameters, in a fixed order."""
        return [p for group in self.groups for p in group["params"]]

    def with_k(self, x):
        """`x` as (K, ...)."""
        return x if self.stacked else x[None]

    @torch.no_grad()
    def step(self, number, factor):
        """Step number `number`, counted from 1; factor is the schedule's."""
        parameters = self.parameters()
        grads = [self.with_k(p.grad) for p in parameters]
        norm = torch.stack([g.flatten(1).float().square().sum(1) for g in grads]).sum(0).sqrt() / self.scale
        finite = norm.isfinite() & (self.failed_at == 0)                    # (K,)
        clip = self.clip or math.inf                                        # 0: none
        shrink = (clip / (norm + 1e-6)).clamp(max=1) / self.scale           # torch's clip_grad_norm_, K times
        self.steps += finite
        t = self.steps.clamp(min=1)
        new = (finite * t ** -0.8).float()      # Adafactor: weight of this step in its running means
        for group, p, g, moments in zip(self.of_each, parameters, grads, self.moments):
            x = self.with_k(p)
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
        for p in parameters:
            p.grad = None
        if self.fp16:       # torch's GradScaler, but one scale for each learner
            self.good = torch.where(finite, self.good + 1, 0)
            self.scale *= torch.where(finite, 1 + (self.good >= 2000).float(), 0.5)
            self.good *= self.good < 2000
            finite = finite | (self.scale >= 1)
        self.failed_at = torch.where(~finite & (self.failed_at == 0), float(number), self.failed_at)

    def tensors(self):
        """All tensors of its state, each (K, ...)."""
        return [self.steps, self.scale, self.good, self.failed_at, self.loss, *sum(self.moments, [])]

    def keep(self, ks):
        """Let only these learners go on: the stack becomes smaller."""
        self.steps, self.scale, self.good, self.failed_at, self.loss = (v[ks] for v in self.tensors()[:5])
        self.moments = [[m[ks] for m in some] for some in self.moments]


def schedule(step, steps, warmup, kind, cycles):
    """Factor on every rate at a step (from 0): linear warm-up, then a cosine with hard restarts or a line to
    zero, as transformers' get_cosine_with_hard_restarts_schedule_with_warmup has it."""
    warm = math.ceil(steps * warmup)
    if step < warm:
        return step / max(1, warm)
    progress = (step - warm) / max(1, steps - warm)
    if progress >= 1 or kind == "linear":
        return max(0.0, 1 - progress)
    return 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


# ---- what is trained --------------------------------------------------------------------------------------

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
            if settings.get(key) != mine and key not in ("learners_at_once", "tokens"):
                raise ValueError(f"{path}: {key} was {settings.get(key)!r}, not {mine!r}: --resume goes on "
                                 f"with the same settings only")

    def judge(self, step, steps, accuracy, loss, train_loss, cfg):
        """Take in a dev evaluation, append it to metrics.jsonl, return whether it is the best so far."""
        s, better = self.state, accuracy > self.state["best"]
        s["dev"] = accuracy
        if better:
            s.update(best=accuracy, best_step=step, best_loss=loss)
        # authors' code: patience watches the dev *loss*, from half of the steps; kept is the best *accuracy*
        if cfg["patience"] and step >= int(steps * cfg["patience_after"]):
            s["waited"] = 0 if loss < s["watched"] else s["waited"] + 1
            s["watched"] = min(s["watched"], loss)
            if s["waited"] >= cfg["patience"]:
                s["stopped"] = f"no better dev loss in {s['waited']} evaluations"
        line = json.dumps(dict(step=step, loss=round(train_loss, 6), dev_accuracy=round(accuracy, 4),
                               dev_loss=round(loss, 6), best=round(s["best"], 4))).encode() + b"\n"
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "ab") as f:
                f.write(line)
        except OSError as e:        # a full disk says no name by itself
            raise OSError(e.errno, e.strerror, str(path)) from None
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
                from safetensors.torch import save
                xpe.write_atomic(self.folder / "backbone.safetensors", save(best["backbone"]))
            self.meta["training"] |= {"best_step": s["best_step"], "dev_accuracy": s["best"],
                                      "dev_loss": s["best_loss"], "stopped": s["stopped"], "finished": True,
                                      "seconds": round(s["seconds"], 1)}
            xpe.save_prompt(self.folder, best.get("prompt", {}), best["head"], self.meta)
            tqdm.write(f"{self.folder}: dev accuracy {s['best']:.1f} at step {s['best_step']}, "
                       f"{s['stopped']}, {s['seconds']:.0f} s")
        for old in self.folder.glob("checkpoint-*.pt"):
            old.unlink()


def snapshot(model, k, full):
    """The trained tensors of learner k, on the CPU."""
    out = {"head": xpe.take(model.head, k)}
    if model.prompt:
        out["prompt"] = xpe.take(model.prompt, k)
    if full:
        out["backbone"] = {n: t.detach().cpu().clone() for n, t in model.backbone.state_dict().items()}
    return out


# ---- checkpoints: everything to go on, exactly ------------------------------------------------------------

def standing(learner, k, step, model, optimizer, generator):
    """All that learner k of a pass needs to go on from `step`: what its checkpoint holds."""
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    return dict(step=step, settings=learner.meta["training"]["settings"], state=learner.state,
                best=learner.tensors, now=snapshot(model, k, not optimizer.stacked), random=random,
                dropout=generator.get_state(), optimizer=[x[k].cpu().clone() for x in optimizer.tensors()])


def save_checkpoints(learners, step, model, optimizer, generators):
    """Write checkpoint-<step>.pt for all learners of a pass, and only then delete the older ones: whenever
    the process dies, there is a step at which all of them can go on together."""
    for k, learner in enumerate(learners):
        state = standing(learner, k, step, model, optimizer, generators[k])
        xpe.write_atomic(learner.folder / f"checkpoint-{step}.pt", lambda f: torch.save(state, f))
    for learner in learners:
        for old in learner.folder.glob("checkpoint-*.pt"):
            if old.name != f"checkpoint-{step}.pt":
                old.unlink()


def checkpoint_steps(learner):
    """The steps at which this learner can go on; 0, the start, is always one."""
    names = (re.fullmatch(r"checkpoint-(\d{1,12})\.pt", p.name) for p in learner.folder.glob("checkpoint-*"))
    return {0} | {int(m[1]) for m in names if m}


def layout(x):
    """A nest of dicts, lists, tensors and plain values without the values: keys, shapes and types."""
    if isinstance(x, dict):
        return {key: layout(value) for key, value in x.items()}
    if isinstance(x, list):
        return [layout(value) for value in x]
    return (x.shape, x.dtype) if torch.is_tensor(x) else type(x)


def load_checkpoints(learners, step, model, optimizer, generators):
    """Put a pass back to where it stood at `step`; ValueError for a file that is not such a checkpoint."""
    states = []
    for k, learner in enumerate(learners):
        path = learner.folder / f"checkpoint-{step}.pt"
        own = standing(learner, k, step, model, optimizer, generators[k])
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = dict(state["settings"])
            own |= {"settings": settings, "best": None if state["best"] is None else own["now"]}
            fits = layout(state) == layout(own) and state["step"] == step
            here = (learner.folder / "metrics.jsonl").stat().st_size if state["state"]["metrics"] else 0
            fits = fits and 0 <= state["state"]["metrics"] <= here
        except Exception as e:      # whatever torch.load makes of a broken or hostile file; it runs no code
            raise ValueError(f"{path}: no checkpoint of this run ({type(e).__name__}); without it "
                             f"the run starts over") from None
        learner.check(settings, path)
        if not fits:
            raise ValueError(f"{path}: does not fit this run; without it the run starts over")
        states.append(state)
    for part, module in ("prompt", model.prompt), ("head", model.head):
        for name, p in module.named_parameters() if module else ():
            p.data.copy_(torch.stack([s["now"][part][name] for s in states]))
    if not optimizer.stacked:
        model.backbone.load_state_dict(states[0]["now"]["backbone"])
    for x, *slices in zip(optimizer.tensors(), *(s["optimizer"] for s in states), strict=True):
        x.copy_(torch.stack(slices))
    for learner, generator, state in zip(learners, generators, states):
        learner.state, learner.tensors = state["state"], state["best"]
        with open(learner.folder / "metrics.jsonl", "ab") as f:     # the steps after will come again
            f.truncate(learner.state["metrics"])
        try:
            generator.set_state(state["dropout"])
            torch.set_rng_state(states[0]["random"][0])
            for random in states[0]["random"][1:]:
                torch.cuda.set_rng_state(random)
        except RuntimeError as e:
            raise ValueError(f"{learner.folder}: checkpoint-{step}.pt does not fit this run: {e}") from None


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


# ---- the loop ---------------------------------------------------------------------------------------------

def train(learners, model, autocast, cfg, pad_id, device, resume=False, quiet=False):
    """Train K learners through one backbone until each has stopped; False if the user interrupted that.

    They have equally many sentences, and model holds their K prompts and heads; cfg: see settings_for.
    """
    optimizer = Optimizer(parameter_groups(model, cfg), len(learners), cfg["optimizer"], cfg["clip"],
                          cfg["amp"] == "fp16", stacked=cfg["mode"] != "full")
    generators = [torch.Generator(device).manual_seed(x.seed) for x in learners]    # of each prompt's dropout
    torch.manual_seed(learners[0].seed)                                             # of the backbone's
    model.set_generators(generators)
    n, B, accumulate = len(learners[0].task.lengths), cfg["batch_size"], cfg["accumulate"]
    batches = -(-n // B)                                # of one epoch
    per_epoch = -(-batches // accumulate)               # steps
    steps = cfg["epochs"] * per_epoch or cfg["steps"]
    every = cfg["evaluate_every"] or per_epoch
    have = [checkpoint_steps(x) for x in learners]
    step = max(set.intersection(*have)) if resume else 0
    if resume and not step and all(len(some) > 1 for some in have):
        raise ValueError(f"{learners[0].folder} and others stand at different steps: --resume them apart")
    if step:
        load_checkpoints(learners, step, model, optimizer, generators)
    else:
        for x in learners:
            for stale in (*x.folder.glob("checkpoint-*"), x.folder / "metrics.jsonl"):
                stale.unlink(missing_ok=True)
    saved, clock, epoch, orders = step, time.time(), None, None
    weights = torch.stack([x.task.weights for x in learners]).to(device)                    # (K, C)
    waken(model, cfg)
    dropout = CheapDropout() if device.type == "cpu" else nullcontext()
    bar = tqdm(total=steps, initial=step, unit=" steps", disable=quiet or None, dynamic_ncols=True)
    with bar, Interrupts() as interrupts:
        while True:
            ended = [k for k, x in enumerate(learners) if x.state["stopped"]]
            for k in ended:
                learners[k].finish()
            if ended:                                   # the others go on in a smaller stack
                stay = [k for k in range(len(learners)) if k not in ended]
                learners, generators, epoch = [learners[k] for k in stay], [generators[k] for k in stay], None
                if not learners:
                    break
                for p in (*model.prompt.parameters(), *model.head.parameters()):
                    p.data = p.data[stay]
                optimizer.keep(stay)
                model.set_generators(generators)
                weights = weights[stay]
            if interrupts.got:
                for x in learners:
                    x.state["seconds"] += time.time() - clock
                save_checkpoints(learners, step, model, optimizer, generators)
                break

            # one step: every learner's own batch, side by side
            K = len(learners)
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
                waken(model, cfg)
                dev, best = (np.mean([x.state[key] for x in learners]) for key in ("dev", "best"))
                bar.set_postfix_str(f"loss {train_loss.mean():.3f}, dev accuracy {dev:.1f}, best {best:.1f}")
                if not quiet and step * 8 // steps > (step - every) * 8 // steps:     # a few lines that stay
                    tqdm.write(f"step {step:>6,} of {steps:,}: dev accuracy {dev:.1f}, best {best:.1f}")
                for x in learners:
                    x.state["seconds"] += time.time() - clock
                    x.state["stopped"] = x.state["stopped"] or ("all steps" if step == steps else "")
                clock = time.time()
                if step - saved >= cfg["checkpoint_every"] or any(x.state["stopped"] for x in learners):
                    save_checkpoints(learners, step, model, optimizer, generators)
                    saved = step
    return not interrupts.got


class CheapDropout(TorchFunctionMode):
    """ours: F.dropout as ever, but by 16 random bits an element: on a CPU torch's own, which computes a double
    for each, takes a fifth of a step. (p = 0.1 becomes 0.100006.) Not for what is drawn in C++, as in SDPA."""

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


def waken(model, cfg):
    """Training mode. paper: the backbone is frozen, but its dropout is active."""
    model.train()
    model.backbone.train(cfg["dropout"])


def judge_all(learners, model, optimizer, step, steps, train_loss, cfg, pad_id, autocast):
    """Evaluate every learner on its own dev split, all in one pass, and let each judge itself."""
    sizes = [len(x.task.labels["dev"]) for x in learners]
    owner = torch.arange(len(learners)).repeat_interleave(torch.tensor(sizes))
    encoded = [ids for x in learners for ids in x.task.ids["dev"]]
    logits = predict(model, encoded, pad_id, owner, cfg["tokens"], autocast)
    for k, (learner, part) in enumerate(zip(learners, logits.split(sizes))):
        labels, failed = torch.from_numpy(learner.task.labels["dev"]), int(optimizer.failed_at[k])
        loss = float(F.cross_entropy(part, labels))
        if failed or not math.isfinite(loss):
            learner.state["stopped"] = (f"diverged: loss or gradient not finite at step {failed or step}, "
                                        f"seed {learner.seed}, {', '.join(learner.task.languages[:8])}")
        elif learner.judge(step, steps, 100.0 * float((part.argmax(1) == labels).double().mean()), loss,
                           float(train_loss[k]), cfg):
            learner.tensors = snapshot(model, k, not optimizer.stacked)


# ---- the command line -------------------------------------------------------------------------------------

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
    cfg |= {"steps": steps, "epochs": 0} if steps else {}
    for key in ("batch_size", "accumulate", "learners_at_once"):
        if cfg[key] < 1:
            raise ValueError(f"train.{key} must be at least 1, not {cfg[key]}")
    if not cfg["steps"] and not cfg["epochs"]:
        raise ValueError("train.steps or train.epochs must be at least 1")
    return cfg | {"mode": mode, "dropout": config["backbone"]["dropout"],
                  "tokens": config["evaluate"]["tokens"]}


def parameter_groups(model, cfg):
    """Every trainable tensor in a group with its rate: [{params, rate, weight_decay}]."""
    groups = {}
    for name, p in model.named_parameters():
        if cfg["mode"] == "head" and name.startswith("prompt."):
            p.requires_grad_(False)     # the baseline: a random prompt that stays random
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
    trust, ratio = config["backbone"]["trust_remote_code"], config["prompt"]["ratio"]
    xpe.check("data.", {"max_length": config["data"]["max_length"]})
    source = Run(args.adapt, trust=trust) if args.adapt else None
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
            (args.steps is not None and args.steps < 1, f"--steps {args.steps}: at least 1"),
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
    folder, revision = locate(config["data"]["name"], config["data"]["revision"])
    corpus = Corpus(folder)
    corpus.check(languages)
    if len(set(languages)) != len(languages) or not languages:
        raise ValueError(f"languages {', '.join(languages)}: at least one, and each once")
    if source and list(corpus.labels) != source.meta["labels"]:
        raise ValueError(f"{folder}: has the labels {', '.join(corpus.labels)}; {args.adapt} knows "
                         f"{', '.join(source.meta['labels'])}")
    for c in (languages if source else corpus.languages()) if config["evaluate"]["after_training"] else ():
        if not (folder / c / "test.tsv").is_file():
            raise FileNotFoundError(f"{folder / c}: no test.tsv to score afterwards; without scoring: "
                                    f"--set evaluate.after_training=false")
    return SimpleNamespace(config=config, cfg=settings_for(config, mode, source, args.steps), source=source,
                           group=group, languages=languages, corpus=corpus,
                           data={"name": config["data"]["name"], "revision": revision})


def make_learners(job, args, tokenizer, identity):
    """One learner for each seed; with a source run, one for each seed and target language."""
    cfg, source, prompt = job.cfg, job.source, job.config["prompt"]
    max_length = source.meta["max_length"] if source else job.config["data"]["max_length"]
    reads = source.meta["reads"] if source else "first" if cfg["mode"] == "full" else prompt["reads"]
    each = [[x] for x in job.languages] if source else [job.languages]
    tasks = [Task(job.corpus, x, tokenizer, max_length, cfg["class_weights"] == "balanced") for x in each]
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    settings = cfg | {"backbone": identity["fingerprint"], "reads": reads, "max_length": max_length}
    if source:
        settings["source"] = source.name
    elif cfg["mode"] != "full":
        settings |= {f"prompt.{key}": value for key, value in prompt.items()}
    learners = []
    for seed in parse_seeds(args.seeds or str(source.meta.get("seed", 11) if source else 11)):
        for task in tasks:
            name = f"{method_name(cfg['mode'], prompt)}-{job.group}-s{seed}"
            sources = {"sources": job.languages}
            if source:
                name = f"{source.name}-to-{task.languages[0]}-s{seed}"
                sources = {"sources": source.sources, "adapted_from": source.name,
                           "adapted_to": task.languages[0]}
            meta = {"kind": cfg["mode"], "backbone": identity, "tokenizer": tokenizer_fingerprint(tokenizer),
                    "reads": reads, "labels": list(job.corpus.labels), "max_length": max_length, **sources,
                    "seed": seed, "data": job.data | {"fingerprint": task.fingerprint},
                    "training": {"settings": settings | {"data": task.fingerprint}, "versions": versions}}
            learners.append(Learner(Path(args.out) / name, seed, task, meta))
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
    return xpe.PromptedClassifier(backbone, None if full else xpe.stack(prompts), xpe.stack(heads),
                                  learners[0].meta["reads"], frozen=not full)


def unfinished(learners):
    """Those of a pass that have yet to train; says which have ended, and clears away debris. ValueError if
    some would begin where others go on."""
    todo = []
    for learner in learners:
        lost, debris = learner.folder / "diverged.txt", [*learner.folder.glob(".*.????????")]
        if learner.finished or lost.is_file():
            failed = lost.is_file() and f"{lost.read_text().strip()}; remove the folder to try again"
            print(f"{learner.folder}: {failed or 'finished already'}")
            debris += learner.folder.glob("checkpoint-*.pt")
        else:
            todo.append(learner)
        for file in debris:         # what a killed process was about to rename or to remove
            file.unlink()
    new = [x.folder.name for x in todo if not x.folder.exists()]
    if new and any(len(checkpoint_steps(x)) > 1 for x in todo):
        raise ValueError(f"--resume: {', '.join(new)} would begin where others go on: run them apart")
    return todo


def run_pass(learners, job, backbone, tokenizer, device, args, quiet):
    """Train some learners in one pass; False if the user interrupted it."""
    cfg, pad_id = job.cfg, tokenizer.pad_token_id or 0
    model = make_model(job, learners, backbone)
    model.check_length(max(len(ids) for x in learners for split in x.task.ids.values() for ids in split))
    autocast = place(model, device, cfg["amp"], cfg["frozen_weights"])
    by_length = sorted(learners[0].task.ids["train"], key=len)
    ends = [by_length[0], by_length[-1]]
    if ends[0] is not ends[1] and torch.equal(*predict(model, ends, pad_id, autocast=autocast)):
        raise ValueError("the head sees nothing of the text: a decoder needs --set prompt.reads=last")
    count = sum(p.numel() for g in parameter_groups(model, cfg) for p in g["params"]) // len(learners)
    for learner in learners:
        learner.meta["training"]["trainable"] = count
        learner.folder.mkdir(parents=True, exist_ok=True)
        if checkpoint_steps(learner) == {0}:        # else it goes on, and only with the same settings
            text = yaml.safe_dump(job.config, sort_keys=False, allow_unicode=True, width=110)
            xpe.write_atomic(learner.folder / "config.yaml", text.encode())
    print(f"{cfg['mode']}: {len(learners)} x {count:,} trainable numbers; {len(by_length):,} sentences of "
          f"{job.group}; {device.type}, {cfg['amp']}", flush=True)
    return train(learners, model, autocast, cfg, pad_id, device, args.resume, quiet)


def arguments(argv):
    """The command line."""
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
    return parser.parse_args(argv)


def main(argv=None):
    """Plan, train pass by pass, score -> exit status."""
    args = arguments(argv)
    rank, local, world = (int(os.environ.get(x) or 0) for x in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    job = plan(args)
    cfg, source, b = job.cfg, job.source, job.config["backbone"]
    backbone, tokenizer, identity = load_backbone(b["name"], b["revision"], b["attention"],
                                                  b["trust_remote_code"])
    if source and source.meta["backbone"].get("fingerprint") not in (None, identity["fingerprint"]):
        raise ValueError(f"--adapt {args.adapt}: was trained on another backbone than {b['name']}")
    learners = make_learners(job, args, tokenizer, identity)
    learners = learners[rank::world or 1]   # torchrun: each process trains its share, none needs the others
    for learner in learners:
        if learner.folder.exists() and not args.resume:
            raise FileExistsError(f"{learner.folder} exists: --resume goes on, --out starts elsewhere")
        if learner.finished:
            learner.check(learner.finished.get("settings") or {}, learner.folder / "prompt.json")
    on_gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
    device = pick_device(f"cuda:{local}" if on_gpu else args.device)
    size = 1 if cfg["mode"] == "full" else cfg["learners_at_once"]
    # a pass has equal blocks of rows, so its learners have equally many sentences
    alike = [[x for x in learners if len(x.task.lengths) == n]
             for n in dict.fromkeys(len(x.task.lengths) for x in learners)]
    fresh = {k: v.clone() for k, v in backbone.state_dict().items()} if cfg["mode"] == "full" else None
    for todo in (unfinished(some[i:i + size]) for some in alike for i in range(0, len(some), size)):
        if fresh:
            backbone.float().load_state_dict(fresh)
        try:
            ended = not todo or run_pass(todo, job, backbone, tokenizer, device, args, quiet=rank > 0)
        except RuntimeError as e:
            if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
                raise
            raise ValueError(f"out of memory with {len(todo)} learners of {cfg['batch_size']} sentences: "
                             f"lower train.learners_at_once, train.batch_size or evaluate.tokens") from None
        if not ended:
            by = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}" if world else "python"
            print(f"interrupted; go on with: {by} {shlex.join(sys.argv + ['--resume'] * (not args.resume))}")
            return 130
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
    diverged = [x for x in good if x.finished["stopped"].startswith("diverged")]
    return 0 if len(good) == len(learners) and not diverged else 2


if __name__ == "__main__":
    run_main(main)
