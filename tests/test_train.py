"""train.py: rates, learners, the loop, the command line, and what a run folder holds.

    pytest tests/test_train.py                      (offline, CPU; about half a minute on one core)

What happens to a run that is interrupted or disturbed is in test_robustness.py. Each test says
which mistake it would catch.
"""
import copy
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import data
import evaluate
import train
import xpe
from config import read_config, read_yaml, resolve_group
from helpers import run_script, tiny
from robust_helpers import (HERE, at_step, command, content_of, listen_to_ctrl_c, make_world,
                            read_log, remember_default_config, watch_steps)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a backbone, a corpus and a configuration."""
    remember_default_config()
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def passes(monkeypatch):
    """What each pass trains, filled while it runs: [(learners, model, tensors before)]."""
    seen, real_train = [], train.train

    def spy(learners, model, *rest, **more):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen.append((learners, model, before))
        return real_train(learners, model, *rest, **more)
    monkeypatch.setattr(train, "train", spy)
    return seen


# ---- Rates and schedule -------------------------------------------------------------------------

def rates_by_name(modules, cfg):
    """{parameter: (rate, weight decay)} of what would be trained."""
    groups = {}
    for group in train.parameter_groups(modules, cfg):
        for parameter in group["params"]:
            assert id(parameter) not in groups
            groups[id(parameter)] = group["lr"], group["weight_decay"]
    named = dict(modules.named_parameters())
    return {name: groups[id(p)] for name, p in named.items() if id(p) in groups}


HEAD_RATES = {"head.dense.weight": (5e-5, 0.01), "head.dense.bias": (5e-5, 0),
              "head.out_proj.weight": (5e-5, 0.01), "head.out_proj.bias": (5e-5, 0)}
STANDARD_RATES = {"prompt.standard": (5e-3, 0)}
ENCODED_RATES = {
    "prompt.encoded": (5e-5, 0.01),
    "prompt.encoder.0.weight": (5e-5, 0.01), "prompt.encoder.0.bias": (5e-5, 0),
    "prompt.encoder.3.weight": (5e-5, 0.01), "prompt.encoder.3.bias": (5e-5, 0),
    "prompt.encoder.6.weight": (5e-5, 0.01), "prompt.encoder.6.bias": (5e-5, 0)}


@pytest.mark.parametrize("ratio, prompt_rates", [
    (0.0, STANDARD_RATES), (1.0, ENCODED_RATES), (0.3, {**STANDARD_RATES, **ENCODED_RATES})])
def test_rates_of_the_recipe(ratio, prompt_rates):
    """Catches: the standard rows at the encoder's rate (SPT then hardly learns), decay on
    biases."""
    cfg = train.settings_for(read_config(), "dual", None)
    modules = nn.ModuleDict({"prompt": xpe.SoftPrompt(16, ratio=ratio),
                             "head": xpe.ClassificationHead(16, 7)})
    assert rates_by_name(modules, cfg) == {**prompt_rates, **HEAD_RATES}


@pytest.mark.parametrize("encoder", ["lstm", "attention"])
def test_no_bias_or_norm_decays(encoder):
    """Catches: a bias that a layer of torch names in its own way, as bias_ih_l0 or in_proj_bias."""
    cfg = train.settings_for(read_config(), "xpe", None)
    prompt = xpe.SoftPrompt(16, encoder=encoder)
    rates = rates_by_name(nn.ModuleDict({"prompt": prompt}), cfg)
    assert len(rates) == len(list(prompt.parameters()))
    for name, (rate, decay) in rates.items():
        assert rate == 5e-5
        assert decay == (0 if "bias" in name or "layernorm" in name else 0.01), name


def test_the_open_rates_of_dual_can_be_set():
    """Catches: the rates of the paper-era code, which config.yaml names, out of reach."""
    settings = ["train.encoded_rate=5.0e-3", "train.encoded_weight_decay=0",
                "train.standard_rate=5.0e-5", "train.standard_weight_decay=0.01"]
    cfg = train.settings_for(read_config(None, settings), "dual", None)
    rates = rates_by_name(nn.ModuleDict({"prompt": xpe.SoftPrompt(16, ratio=0.3)}), cfg)
    assert rates["prompt.standard"] == (5e-5, 0.01) and rates["prompt.encoded"] == (5e-3, 0)
    assert rates["prompt.encoder.0.weight"] == (5e-5, 0.01)


def test_adafactor_is_the_papers():
    """Catches: Adafactor's own rates, which transformers takes by default, or a momentum."""
    weights = nn.Parameter(torch.ones(4, 6))
    groups = [dict(params=[weights], lr=0.01, weight_decay=0.0)]
    optimizer = train.make_optimizer(groups, "adafactor")
    group, = optimizer.param_groups
    assert group["lr"] == 0.01 and group["beta1"] is None and group["decay_rate"] == -0.8
    assert group["clip_threshold"] == 1.0 and not group["warmup_init"]
    assert not group["relative_step"] and not group["scale_parameter"]
    weights.grad = torch.full((4, 6), 7.0)      # equal gradients become ones: the step is the rate
    optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.full((4, 6), 0.99))
    assert type(train.make_optimizer(groups, "adamw")) is torch.optim.AdamW


def plain_schedule(step, steps, warmup, kind, cycles):
    """The share of its rate that step number `step`, counted from 0, is taken with."""
    warmup_steps = math.ceil(steps * warmup)
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    if kind == "linear":
        return 1 - progress
    within_cycle = (cycles * progress) % 1
    return (1 + math.cos(math.pi * within_cycle)) / 2


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps, warmup", [(7, 0.1), (100, 0.05), (240, 0.1), (50, 0.0)])
def test_schedule(kind, steps, warmup):
    """Catches: a cosine without restarts or with one cycle too many, a warm-up that is off by one,
    groups that lose their own rates."""
    groups = [dict(params=[nn.Parameter(torch.zeros(1))], lr=rate) for rate in (1.0, 0.01)]
    optimizer = torch.optim.SGD(groups)
    cfg = {"warmup": warmup, "schedule": kind, "cycles": 2}
    schedule = train.make_schedule(optimizer, steps, cfg)
    for step in range(steps):
        share = plain_schedule(step, steps, warmup, kind, 2)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([share, 0.01 * share], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_settings_of_each_kind_of_training():
    """Catches: `adapt` or `full` that are forgotten, layers in the wrong order, --steps beside
    epochs."""
    config = read_config(None, ["adapt.batch_size=4", "full.cycles=3"])
    source = train.settings_for(config, "xpe", None)
    adapted = train.settings_for(config, "xpe", "a run")
    full = train.settings_for(config, "full", None)
    assert (source["steps"], source["patience"], source["optimizer"]) == (24000, 20, "adafactor")
    assert (adapted["steps"], adapted["batch_size"], adapted["rate"]) == (6000, 4, 5e-5)
    assert (adapted["warmup"], adapted["patience"], adapted["prompt_dropout"]) == (0.05, 30, 0.0)
    assert (full["epochs"], full["cycles"], full["rate"]) == (10, 3, 1e-5)
    assert full["optimizer"] == "adamw" and full["schedule"] == "linear"
    config["full"].update(steps=5, epochs=0)         # --steps 5
    shorter = train.settings_for(config, "full", None)
    assert train.count_steps(shorter, 4907) == (5, 77, 154)
    assert train.count_steps(full, 4907) == (770, 77, 154)


@pytest.mark.parametrize("balanced", [False, True])
def test_class_weights(world, balanced):
    """Catches: weights that are not n / (classes x count), or of the wrong class."""
    sentences = []
    for label, count in ((0, 8), (1, 4), (2, 2)):
        sentences += [data.Sentence("", label, "sun")] * count
    corpus = SimpleNamespace(labels=("x", "y", "z"), read=lambda language, split: sentences)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "backbone")
    task = train.Task(corpus, ["aaa_Latn"], tokenizer, 20, balanced)
    wanted = [14 / (3 * 8), 14 / (3 * 4), 14 / (3 * 2)] if balanced else [1, 1, 1]
    assert task.class_weights.tolist() == pytest.approx(wanted)


# ---- What moves ---------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, amp", [("spt", "off"), ("xpe", "off"), ("dual", "off"),
                                       ("head", "off"), ("dual", "bf16")])
def test_only_prompt_and_head_move(world, passes, tmp_path, mode, amp):
    """Catches: a backbone that trains along, a head or prompt that silently does not (peft's bug of
    2025), a half-precision prompt, a `head` baseline that trains its prompt."""
    arguments = ["--mode", mode, "--steps", "3", "--seeds", "11-12", "--set", f"train.amp={amp}"]
    assert train.main(command(world, tmp_path, *arguments)) == 0
    (_, model, before), = passes
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        moved = not torch.equal(tensor, before[name])
        if name.startswith("backbone."):
            assert not moved, name
            continue
        assert tensor.dtype == torch.float32
        assert moved == (name.startswith("heads.") or mode != "head"), name
        if moved and name.endswith((".standard", ".encoded")):
            assert (tensor != before[name]).any(dim=-1).all()       # every prompt row


def test_full_fine_tuning_moves_the_backbone(world, passes, tmp_path):
    """Catches: the baseline `full` with a frozen backbone or with a prompt in front; a second seed
    that starts from the first one's weights."""
    arguments = ["--mode", "full", "--steps", "3", "--seeds", "11-12"]
    assert train.main(command(world, tmp_path, *arguments)) == 0
    (_, first, first_before), (_, second, second_before) = passes
    for name in first_before:
        if name.startswith("backbone."):
            assert torch.equal(first_before[name], second_before[name])
    for model, before in ((first, first_before), (second, second_before)):
        assert len(model.prompts) == 0
        for name, parameter in model.named_parameters():
            if "position" not in name and "token_type" not in name and "key.bias" not in name:
                assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("mode", ["dual", "spt"])
def test_seeds_trained_together_equal_seeds_trained_alone(world, passes, tmp_path, mode):
    """Catches: anything that learners share by accident: batches, norms, optimizer state, dev
    scores."""
    same = ["--mode", mode, "--steps", "20", "--set", "backbone.dropout=false",
            "--set", "prompt.dropout=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "head_dropout", lambda config: 0.0)
        assert train.main(command(world, tmp_path / "together", *same)) == 0
        for seed in (11, 12, 13):
            arguments = command(world, tmp_path / "alone", *same, "--seeds", seed)
            assert train.main(arguments) == 0
    together, *alone = passes
    start = dict(zip((11, 12, 13), tensors_at_start(together)))
    for k, seed in enumerate((11, 12, 13)):
        learner, single = together[0][k], alone[k][0][0]
        assert learner.seed == single.seed == seed
        for name, module in learner.modules().items():
            other = single.modules()[name].state_dict()
            for key, tensor in module.state_dict().items():
                torch.testing.assert_close(tensor, other[key], rtol=1e-4, atol=1e-4)
        moved = learner.prompt.standard - start[seed]
        assert moved.abs().max() > 1e-2         # they have come far, and each its own way
        logs = [read_log(tmp_path / where / single.folder.name) for where in ("together", "alone")]
        for line, other in zip(*logs, strict=True):
            assert line == pytest.approx(other, abs=1e-3)
    assert (together[0][0].prompt.standard - together[0][1].prompt.standard).abs().max() > 0.1


def tensors_at_start(trained):
    """The standard prompt rows of each learner of a pass before its first step."""
    learners, _, before = trained
    return [before[f"prompts.{k}.standard"] for k in range(len(learners))]


def test_each_seed_has_its_own_start_and_batches(world, passes, tmp_path):
    """Catches: ten seeds that are one seed ten times, or a seed that means another thing
    elsewhere."""
    assert train.main(command(world, tmp_path / "a", "--steps", "1")) == 0
    assert train.main(command(world, tmp_path / "b", "--steps", "1", "--seeds", "12,99")) == 0
    a, b = passes[0][2], passes[1][2]
    assert torch.equal(a["prompts.1.encoded"], b["prompts.0.encoded"])          # both seed 12
    assert torch.equal(a["heads.1.dense.weight"], b["heads.0.dense.weight"])
    assert not torch.equal(a["prompts.0.encoded"], a["prompts.1.encoded"])
    assert not torch.equal(a["heads.0.dense.weight"], a["heads.1.dense.weight"])


# ---- The loop, a second time --------------------------------------------------------------------

def plain_training(learner, backbone, cfg, steps):
    """Train a learner that stands at its start sentence by sentence, by torch alone, no dropout."""
    prompt, head = learner.prompt, learner.head
    parameters = [*prompt.parameters(), *head.parameters()]
    groups = train.parameter_groups(learner.modules(), cfg)
    optimizer = train.make_optimizer(groups, cfg["optimizer"])
    rates = [group["lr"] for group in optimizer.param_groups]
    task, step, epoch = learner.task, 0, 0
    while step < steps:
        batches = data.length_batches(task.lengths, cfg["batch_size"], learner.seed, epoch)
        epoch += 1
        while batches and step < steps:
            parts, batches = batches[:cfg["accumulate"]], batches[cfg["accumulate"]:]
            share = plain_schedule(step, steps, cfg["warmup"], cfg["schedule"], cfg["cycles"])
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = share * rate
            for batch in parts:
                losses = [plain_loss(backbone, prompt, head, task, i) for i in batch]
                (sum(losses) / len(losses) / len(parts)).backward()
            gradients = [p.grad.flatten() for p in parameters]
            norm = torch.cat(gradients).norm()
            for parameter in parameters:
                parameter.grad *= min(1.0, cfg["clip"] / (norm + 1e-6))
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def plain_loss(backbone, prompt, head, task, i):
    """Cross-entropy of one training sentence, without padding."""
    ids = torch.from_numpy(task.ids["train"][i]).long()
    words = backbone.embeddings.word_embeddings(ids)
    states = backbone(inputs_embeds=torch.cat((prompt()[0], words))[None])[0]
    return F.cross_entropy(head(states[:, 0]), torch.tensor([task.labels["train"][i]]))


@pytest.mark.parametrize("accumulate, optimizer", [(1, "adafactor"), (3, "adamw")])
def test_the_loop_against_plain_training(world, monkeypatch, tmp_path, accumulate, optimizer):
    """Catches: a wrong batch, label or norm, accumulation that sums, a rate that is one step
    late."""
    monkeypatch.setattr(train, "head_dropout", lambda config: 0.0)
    made, real_prepare = [], train.Learner.prepare

    def prepare(self, cfg, steps, device):
        plain = train.Learner(self.folder, self.seed, [], {})
        plain.task, plain.backbone = self.task, None
        plain.prompt, plain.head = copy.deepcopy(self.prompt), copy.deepcopy(self.head)
        made.append((plain, self, cfg))
        real_prepare(self, cfg, steps, device)
    monkeypatch.setattr(train.Learner, "prepare", prepare)
    arguments = ["--mode", "dual", "--steps", "10", "--seeds", "11-12", "--set", "prompt.dropout=0",
                 "--set", "backbone.dropout=false", "--set", f"train.accumulate={accumulate}",
                 "--set", f"train.optimizer={optimizer}", "--set", "train.rate=1.0e-3",
                 "--set", "train.evaluate_every=20"]
    assert train.main(command(world, tmp_path, *arguments)) == 0
    backbone = transformers.AutoModel.from_pretrained(world / "backbone").eval()
    for plain, learner, cfg in made:
        plain_training(plain, backbone, cfg, 10)
        for name, module in learner.modules().items():
            expected = dict(plain.modules()[name].named_parameters())
            for key, parameter in module.named_parameters():
                torch.testing.assert_close(parameter, expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("clip, factor", [(1.0, 0.2), (2.5, 0.5), (10.0, 1.0), (0.0, 1.0)])
def test_a_learner_is_clipped_by_the_norm_of_all_its_gradients(tmp_path, clip, factor):
    """Catches: a norm of each tensor by itself or of all learners, a clip of 0 that stops all."""
    learner = train.Learner(tmp_path, 11, [], {})
    learner.parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 1))]
    learner.optimizer = torch.optim.SGD(learner.parameters, lr=1.0)
    learner.schedule = torch.optim.lr_scheduler.ConstantLR(learner.optimizer, factor=1.0)
    learner.scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0], [-4.0], [0.0]])]    # norm 5
    for parameter, gradient in zip(learner.parameters, gradients):
        parameter.grad = gradient.clone()
    learner.step(clip)
    for parameter, gradient in zip(learner.parameters, gradients):
        torch.testing.assert_close(parameter.detach(), -factor * gradient)
        assert parameter.grad is None       # else the next step would add to it


def test_training_learns(world, tmp_path):
    """Catches: a loop that moves everything and learns nothing (a wrong sign, labels that do not
    match)."""
    arguments = ["--seeds", "11,12", "--steps", "60", "--set", "prompt.reads=mean",
                 "--set", "backbone.dropout=false", "--set", "train.rate=0.05"]
    assert train.main(command(world, tmp_path, *arguments)) == 0
    for folder in tmp_path.iterdir():
        losses = [line["loss"] for line in read_log(folder)]
        assert len(losses) == 15 and losses[-1] < 0.7 * losses[0]


# ---- Early stopping -----------------------------------------------------------------------------

def plain_stopping(accuracies, losses, every, steps, patience, patience_after):
    """-> (best step, its accuracy, step at which it ends), from the definition.

    Kept is the best dev accuracy, the earliest of equals. From a share of the steps on, evaluations
    are counted since the lowest dev loss among them.
    """
    numbers = [(i + 1) * every for i in range(len(losses))]
    end = numbers[-1]
    counted = [i for i, step in enumerate(numbers) if step >= int(steps * patience_after)]
    for last in range(len(counted)):
        lowest = min(range(last + 1), key=lambda j: losses[counted[j]])
        if patience and last - lowest >= patience:
            end = numbers[counted[last]]
            break
    seen = [i for i, step in enumerate(numbers) if step <= end]
    best = max(seen, key=lambda i: (accuracies[i], -i))
    return numbers[best], accuracies[best], end


@pytest.mark.parametrize("patience, after", [(0, 0.5), (1, 0.5), (3, 0.5), (2, 0.0), (2, 0.9)])
def test_early_stopping(tmp_path, patience, after):
    """Catches: patience on accuracy instead of loss, before its time, with a lowest loss from
    before its time; the last or the latest of equal prompts kept instead of the best."""
    cfg = {"patience": patience, "patience_after": after}
    steps, every = 60, 3
    for trial in range(20):
        rng = np.random.default_rng(trial)
        learner = train.Learner(tmp_path, 11, [], {})
        learner.log = open(learner.log_path, "wb")
        labels = rng.integers(0, 3, 12)
        learner.task = SimpleNamespace(labels={"dev": labels})
        version = torch.zeros(1)
        learner.tensors = lambda: version.clone()
        accuracies, losses = [], []
        for step in range(every, steps + 1, every):
            logits = torch.from_numpy(rng.normal(size=(12, 3))).float()
            logits[range(12), labels] += step / steps * rng.random() * 3
            accuracies.append(100 * float(np.mean(logits.argmax(dim=1).numpy() == labels)))
            losses.append(float(F.cross_entropy(logits, torch.from_numpy(labels))))
            version[0] = step
            learner.record_evaluation(step, steps, logits, 1.0, cfg)
            if learner.progress.stopped:
                break
        learner.log.close()
        progress = learner.progress
        kept = plain_stopping(accuracies, losses, every, steps, patience, after)
        assert (progress.best_step, progress.best_accuracy, step) == kept
        assert learner.best.item() == progress.best_step
        assert progress.best_loss == losses[progress.best_step // every - 1]
        lines = read_log(tmp_path)
        assert [line["dev_accuracy"] for line in lines] == pytest.approx(accuracies, abs=1e-4)
        assert [line["dev_loss"] for line in lines] == pytest.approx(losses, abs=1e-6)


def test_what_is_written_is_the_best_step(world, passes, tmp_path):
    """Catches: a prompt folder with the last tensors beside the best accuracy; a dev loss of other
    tensors."""
    arguments = command(world, tmp_path, "--seeds", "11-12", "--set", "train.evaluate_every=2")
    assert train.main(arguments) == 0
    for learner in passes[0][0]:
        prompt, head, meta = xpe.load_prompt(learner.folder)
        lines = read_log(learner.folder)
        best = max(lines, key=lambda line: line["dev_accuracy"])
        training = meta["training"]
        assert training["best_step"] == best["step"] and training["stopped"] == "all steps"
        assert training["dev_accuracy"] == pytest.approx(best["dev_accuracy"], abs=1e-4)
        backbone = transformers.AutoModel.from_pretrained(world / "backbone")
        model = xpe.PromptedClassifier(backbone, prompt, head)
        logits = train.predict(model, learner.task.ids["dev"], 1)
        labels = torch.from_numpy(learner.task.labels["dev"])
        assert float(F.cross_entropy(logits, labels)) == pytest.approx(best["dev_loss"], abs=1e-4)


# ---- The loop on a GPU, without one -------------------------------------------------------------

class Enough(Exception):
    """Ends training where numbers would be looked at."""


@pytest.mark.parametrize("mode, encoder, amp, count", [
    ("spt", "mlp", "bf16", 1), ("dual", "mlp", "bf16", 3), ("xpe", "attention", "off", 3),
    ("dual", "none", "off", 2), ("head", "mlp", "bf16", 2)])
def test_a_step_waits_for_nothing_and_mixes_no_devices(world, monkeypatch, mode, encoder, amp,
                                                       count):
    """Catches: .item() and its like in the training step, a tensor that was left on the CPU. On
    `meta`, a device without numbers, each of them is an error."""
    settings = [f"prompt.encoder={encoder}", f"train.amp={amp}"]
    job = tiny_job(world, mode, settings)
    backbone = tiny(attn_implementation="eager")
    device = torch.device("meta")
    learners = []
    for seed in range(count):
        learner = train.Learner("", seed, [], {"training": {}})
        learner.task = tiny_task()
        learner.build(job, backbone)
        learners.append(learner)
    model = train.join_learners(learners, backbone, "prompt")
    autocast = train.place(model, device, amp, "amp")
    for learner in learners:
        learner.prepare(job.cfg, 3, device)
    steps = watch_steps(monkeypatch)

    def evaluate(*_):
        raise Enough
    monkeypatch.setattr(train, "evaluate_learners", evaluate)
    # transformers looks into the mask, once a forward; in version 4 it does so elsewhere
    pytest.importorskip("transformers.masking_utils")
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa",
                        lambda *_, **__: False, raising=False)
    with pytest.raises(Enough):
        train.train(learners, model, autocast, dict(job.cfg, steps=3), 1, device, quiet=True)
    assert len(steps) == 3 * count
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def tiny_job(world, mode, settings):
    """What build and train need of a Job."""
    section = "full" if mode == "full" else "train"
    config = read_config(world / "config.yaml", [*settings, "train.evaluate_every=3",
                                                 f"{section}.steps=3", f"{section}.epochs=0"])
    cfg = train.settings_for(config, mode, None)
    corpus = SimpleNamespace(labels=data.LABELS)
    return train.Job(config, cfg, mode, None, "two", [], corpus, {}, "prompt", 20)


def tiny_task():
    """28 random sentences to train on."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(4, 20, length).astype(np.int32) for length in range(2, 30)]
    lengths = np.array([len(row) for row in ids])
    return SimpleNamespace(ids={"train": ids}, labels={"train": np.arange(28) % 7}, lengths=lengths,
                           class_weights=torch.ones(7))


# ---- The command line ---------------------------------------------------------------------------

BAD_COMMAND_LINES = [
    ([], "--mode is missing: spt, xpe"),
    (["--mode", "dual", "--ratio", "1"], "--ratio 1.0: .* share between 0 and 1"),
    (["--mode", "spt", "--ratio", "0.3"], "--ratio 0.3: .* with --mode dual"),
    (["--mode", "xpe", "--steps", "0"], "--steps 0: at least 1"),
    (["--mode", "xpe", "--group", "othrs"], r"no group 'othrs' in .*did you mean others\?"),
    (["--mode", "xpe", "--languages", "aaa_Latin"],
     r"no language 'aaa_Latin' .*did you mean aaa_Latn\?"),
    (["--mode", "xpe", "--languages", "aaa_Latn,aaa_Latn"], "at least one, and each once"),
    (["--mode", "xpe", "--languages", "-aaa_Latn"], "expected one argument"),
    (["--mode", "xpe", "--seeds", "11-"], "--seeds 11-: write 11, 11-20 or 11,15"),
    (["--mode", "xpe", "--seeds", "1..3"], "--seeds 1..3: write 11, 11-20 or 11,15"),
    (["--mode", "xpe", "--seeds", "20-11"], "--seeds 20-11: 20 to 11 "),
    (["--mode", "xpe", "--seeds", "11,11"], "names a seed twice"),
    (["--mode", "xpe", "--data", "/nowhere"], "data.name: '/nowhere' is neither a folder nor"),
    (["--mode", "xpe", "--set", "train.batch_size=0"], "train.batch_size must be at least 1"),
    (["--mode", "xpe", "--set", "train.stepz=5"], r"'train.stepz' \(did you mean steps"),
    (["--mode", "xpe", "--group", "others", "--languages", "aaa_Latn"], "--languages .*: one of"),
    (["--mode", "xpe", "--device", "gpu"], "--device gpu"),
    (["--adapt", "/no/where"], "/no/where: no such run folder")]


# A setting without effect would look like one that makes no difference.
OVERRULED_SETTINGS = [
    (["--mode", "full", "--set", "train.rate=0.1"], "train.rate=0.1: train.rate does nothing here: "
     "full.rate 0.003 has the last word; --set full.rate="),
    (["--mode", "full", "--set", "train.steps=5"], "full.epochs 3 sets the steps"),
    (["--mode", "full", "--set", "full.steps=5"], "full.epochs 3 sets the steps"),
    (["--mode", "xpe", "--set", "train.steps=5", "--set", "train.epochs=1"],
     "train.steps=5: train.steps does nothing here: train.epochs 1 sets the steps"),
    (["--mode", "xpe", "--steps", "5", "--set", "train={epochs: 1}"], "--steps 5 overrides it"),
    (["--mode", "full", "--steps", "5", "--set", "train.steps=6"], "--steps 5 overrides it"),
    (["--mode", "dual", "--ratio", "0.5", "--set", "prompt.ratio=0.3"], "--ratio 0.5 overrides"),
    (["--mode", "xpe", "--set", "prompt.heads=2"], "'mlp' does not use it"),
    (["--mode", "xpe", "--set", "prompt.encoder=attention", "--set", "prompt.layers=6"],
     "prompt.layers does nothing here: the encoder 'attention' does not use it"),
    (["--mode", "xpe", "--set", "prompt.encoder=none", "--set", "prompt.dropout=0.5"],
     "'none' does not use it")]


@pytest.mark.parametrize("argv, message", [*BAD_COMMAND_LINES, *OVERRULED_SETTINGS])
def test_bad_command_lines(world, tmp_path, capsys, monkeypatch, argv, message):
    """Catches: a traceback, a status of 0, a run folder left behind by a run that could not
    start, a wait for the backbone before the error."""
    monkeypatch.setattr(train, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))
    full = ["--sources", world / "config.yaml", "--data", world / "data", "--out", tmp_path / "out",
            "--device", "cpu", *argv]
    status, error = run_script(train.main, full, capsys)
    assert status == 2 and re.search(message, error), error
    lines = error.splitlines()
    assert (len(lines) == 1 and lines[0].startswith("error: ")) or lines[0].startswith("usage: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [
    ["--mode", "full", "--set", "train.optimizer=adamw", "--set", "train.epochs=0", "--steps", "2"],
    ["--mode", "dual", "--ratio", "0.5", "--set", "prompt.ratio=0.5", "--steps", "2", "--set",
     "train.steps=2"],
    ["--mode", "spt", "--set", "prompt.ratio=0.3", "--set", "prompt.encoder=lstm", "--steps", "2"],
    ["--mode", "head", "--set", "full.rate=0.1", "--set", "prompt.layers=1", "--steps", "2"]])
def test_settings_that_a_loop_over_modes_may_give(world, tmp_path, arguments):
    """Catches: a refusal of what agrees with the last word, or is clearly of another mode."""
    assert train.main(command(world, tmp_path, *arguments, "--seeds", "11")) == 0


def test_a_language_that_is_a_group(world, tmp_path, capsys):
    """Catches: another group, in silence, for targets and for the next training."""
    arguments = command(world, tmp_path / "out", "--languages", "aaa_Latn", "--set",
                        "groups.aaa_Latn=[bbb_Latn]")
    status, error = run_script(train.main, arguments, capsys)
    assert status == 2 and "aaa_Latn is a group in" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, message", [
    (["--backbone", "/no/where"], "backbone.name: no folder '/no/where'"),
    (["--set", "prompt.length=0"], "prompt.length must be at least 1"),
    (["--set", "prompt.encoder=attention", "--set", "prompt.heads=5"],
     "5 attention heads do not divide"),
    (["--set", "prompt.length=62"], r"prompt.length 62: .* no room for a text")])
def test_what_does_not_fit_is_told_before_anything_is_written(world, tmp_path, capsys, argv,
                                                              message):
    """Catches: a run folder left behind, for which the next attempt would be refused."""
    status, error = run_script(train.main, command(world, tmp_path / "out", *argv), capsys)
    assert status == 2 and re.fullmatch(f"error: .*({message}).*\n", error), error
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_told_before_the_backbone_is_loaded(world, tmp_path, capsys,
                                                                  monkeypatch):
    """Catches: a refusal after minutes of loading; one folder of several that goes unseen."""
    (tmp_path / "xpe-two-s12").mkdir()
    monkeypatch.setattr(train, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))
    status, error = run_script(train.main, command(world, tmp_path), capsys)
    assert status == 2 and re.search("xpe-two-s12 exists: --resume goes on, --out starts", error)
    assert [path.name for path in tmp_path.iterdir()] == ["xpe-two-s12"]


def test_seeds():
    """Catches: a range without its end, blanks that are refused."""
    assert train.parse_seeds("11") == [11]
    assert train.parse_seeds("11-13, 20") == [11, 12, 13, 20]


def test_languages_may_have_blanks_between_them(world, passes, tmp_path):
    """Catches: the second of "aaa_Latn, ccc_Latn" refused as ' ccc_Latn'; folders with odd
    names."""
    arguments = ["--languages", "aaa_Latn, ccc_Latn", "--steps", "1", "--seeds", "11"]
    assert train.main(command(world, tmp_path, *arguments)) == 0
    assert passes[0][0][0].languages == ["aaa_Latn", "ccc_Latn"]
    assert [path.name for path in tmp_path.iterdir()] == ["xpe-aaa_Latn+ccc_Latn-s11"]


PARTS_OF_TORCHRUN = [("RANK",), ("LOCAL_RANK",), ("WORLD_SIZE",), ("RANK", "WORLD_SIZE"),
                     ("RANK", "LOCAL_RANK"), ("LOCAL_RANK", "WORLD_SIZE")]


@pytest.mark.parametrize("names", PARTS_OF_TORCHRUN)
def test_a_part_of_torchruns_variables_is_refused(world, tmp_path, capsys, monkeypatch, names):
    """Catches: a batch script's export that lets one of four seeds be trained, with status 0."""
    for name in names:
        monkeypatch.setenv(name, "1")
    status, error = run_script(train.main, command(world, tmp_path / "out"), capsys)
    assert status == 2 and f"only {', '.join(names)} is set" in error and "torchrun" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank, size, message", [
    ("x", "2", "must be whole numbers"), ("2", "2", "RANK is 2, WORLD_SIZE 2"),
    ("-1", "2", "RANK is -1")])
def test_variables_of_torchrun_that_make_no_sense(monkeypatch, rank, size, message):
    """Catches: a process that trains nothing, or another's share."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", "0"), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train.read_torchrun()


def test_srun_without_torchrun_gets_a_hint(monkeypatch, capsys):
    """Catches: four tasks of SLURM that all train everything, without a word."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert train.read_torchrun() == (0, 0, 1)
    assert "srun torchrun" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert train.read_torchrun() == (0, 0, 1) and capsys.readouterr().err == ""


def test_texts_that_are_cut_are_counted(world, tmp_path, capsys):
    """Catches: a corpus of long texts of which only the beginnings are read, in silence."""
    assert train.main(command(world, tmp_path / "a", "--steps", "1")) == 0
    assert "cut" not in capsys.readouterr().err
    arguments = ["--steps", "1", "--set", "data.max_length=6"]
    assert train.main(command(world, tmp_path / "b", *arguments)) == 0
    found = re.search(r"(\d+) of 56 texts cut at 6 tokens", capsys.readouterr().err)
    too_long = 0
    for language in ("aaa_Latn", "bbb_Latn"):
        for split in ("train", "dev"):
            for sentence in data.Corpus(world / "data").read(language, split):
                too_long += len(sentence.text.split()) + 2 > 6
    assert int(found[1]) == too_long > 0


def test_progress_of_several_seeds_is_named_as_means(world, tmp_path, capsys):
    """Catches: a mean of three seeds that reads like the accuracy of one; lines without end."""
    assert train.main(command(world, tmp_path, "--set", "train.evaluate_every=1")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 8 and all(line.endswith("(means of 3)") for line in lines)
    logs = [read_log(folder) for folder in sorted(tmp_path.iterdir())]
    for line in lines:
        found = re.search(r"step +(\d+) of 24: dev accuracy (.*), best (.*) \(", line)
        step, dev, best = found.groups()
        of_step = [log[int(step) - 1] for log in logs]
        assert float(dev) == pytest.approx(np.mean([e["dev_accuracy"] for e in of_step]), abs=0.051)
        assert float(best) == pytest.approx(np.mean([e["best"] for e in of_step]), abs=0.051)
    assert train.main(command(world, tmp_path, "--seeds", "21", "--steps", "4")) == 0
    assert "means" not in capsys.readouterr().out


@pytest.mark.parametrize("mode, expected", [
    (["--mode", "full"], "steps of 4 sentences, adamw, linear; rate 0.003$"),
    (["--mode", "spt", "--set", "train.accumulate=2", "--steps", "2"],
     "2 steps of 2 x 4 sentences, adafactor, cosine; rates: standard rows .*, the rest 0.03$"),
    (["--mode", "dual", "--steps", "2"], "2 steps of 4 .*rates: standard .*, encoded .*, the rest"),
    (["--mode", "head", "--steps", "2"], "; rate 0.03$")])
def test_the_recipe_in_use_is_told(world, tmp_path, capsys, mode, expected):
    """Catches: hours with a rate, a schedule or steps of a section that one did not think of."""
    assert train.main(command(world, tmp_path, *mode, "--seeds", "11")) == 0
    assert re.search(expected, capsys.readouterr().out, re.MULTILINE)


def test_a_full_run_reads_what_is_asked_for(world, tmp_path):
    """Catches: prompt.reads=mean without effect in one of the modes that are compared."""
    for reads, kept in (("prompt", "first"), ("first", "first"), ("mean", "mean")):
        arguments = command(world, tmp_path / reads, "--mode", "full", "--seeds", "11", "--steps",
                            "2", "--set", f"prompt.reads={reads}", "--set",
                            "evaluate.after_training=true")
        assert train.main(arguments) == 0
        folder = tmp_path / reads / "full-two-s11"
        assert json.loads((folder / "prompt.json").read_text())["reads"] == kept
    logs = [read_log(tmp_path / reads / "full-two-s11") for reads in ("prompt", "first", "mean")]
    assert logs[0] == logs[1] != logs[2]


def test_a_ratio_that_is_rounded_is_told(world, tmp_path, capsys):
    """Catches: a sweep over ratios, some of which are the same prompt."""
    assert train.main(command(world, tmp_path, "--mode", "dual", "--ratio", "0.6")) == 0
    assert "--ratio 0.6: 2 of 4 prompt rows are encoded" in capsys.readouterr().err
    assert train.main(command(world, tmp_path, "--mode", "dual", "--ratio", "0.5")) == 0
    assert "prompt rows" not in capsys.readouterr().err


def test_other_targets_with_resume_are_told(world, tmp_path, capsys):
    """Catches: edited columns that the finished run does not get, in silence."""
    arguments = ["--seeds", "11", "--steps", "2"]
    assert train.main(command(world, tmp_path, *arguments)) == 0
    assert train.main(command(world, tmp_path, *arguments, "--resume")) == 0
    assert "other targets" not in capsys.readouterr().err
    assert train.main(command(world, tmp_path, *arguments, "--resume", "--set",
                              "targets.More=[ccc_Latn]")) == 0
    assert "config.yaml: has other targets or groups, and keeps them" in capsys.readouterr().err
    (tmp_path / "xpe-two-s11" / "config.yaml").write_text("train: {clop: 1}")     # damaged
    assert train.main(command(world, tmp_path, *arguments, "--resume")) == 0
    assert "finished already" in capsys.readouterr().out


def test_precision_is_resolved_told_and_stored(world, tmp_path, capsys, monkeypatch):
    """Catches: a prompt.json that says `auto`; a run that goes on in another precision on another
    machine, or a refusal that does not say how to go on."""
    arguments = command(world, tmp_path, "--seeds", "11", "--steps", "12",
                        "--set", "train.amp=auto")
    with monkeypatch.context() as patch:
        patch.setattr(train, "pick_precision", lambda amp, device: "off")
        at_step(patch, {6: signal.SIGINT})
        assert train.main(arguments) == 130
        assert "cpu, float32" in capsys.readouterr().out
    with monkeypatch.context() as patch:        # --resume on a machine that has bf16
        patch.setattr(train, "pick_precision", lambda amp, device: "bf16" if amp == "auto" else amp)
        with pytest.raises(ValueError, match="amp was 'off', not 'bf16'.*--set train.amp=off"):
            train.main([*arguments, "--resume"])
        assert train.main([*arguments, "--resume", "--set", "train.amp=off"]) == 0
    meta = xpe.load_prompt(tmp_path / "xpe-two-s11")[2]
    assert meta["training"]["settings"]["amp"] == "off"


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    """Catches: half a page of traceback for Ctrl-C in the seconds before torch is there."""
    slow_import = "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    (tmp_path / "numpy.py").write_text(slow_import)
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    process = subprocess.Popen([sys.executable, HERE / "train.py", "--help"], env=environment,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=listen_to_ctrl_c)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode in (130, -signal.SIGINT)


# ---- Run folders and what comes after -----------------------------------------------------------

def test_a_run_folder_says_what_was_done(world, tmp_path):
    """Catches: a prompt that cannot be used or explained a year later; files of the pass
    left behind."""
    arguments = ["--mode", "dual", "--ratio", "0.3", "--seeds", "11-12", "--steps", "4"]
    assert train.main(command(world, tmp_path, *arguments)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dual30-two-s11", "dual30-two-s12"]
    folder = tmp_path / "dual30-two-s12"
    files = ["config.yaml", "metrics.jsonl", "prompt.json", "prompt.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    prompt, _, meta = xpe.load_prompt(folder)
    assert meta["kind"] == "dual" and meta["seed"] == 12 and meta["reads"] == "prompt"
    assert meta["sources"] == ["aaa_Latn", "bbb_Latn"] and meta["labels"] == list(data.LABELS)
    assert meta["backbone"]["name"] == str(world / "backbone")
    assert meta["max_length"] == 62 - prompt.length     # all that the tiny backbone has room for
    assert len(meta["backbone"]["fingerprint"]) == len(meta["tokenizer"]) == 16
    sentences = []
    for split in ("train", "dev"):
        for language in meta["sources"]:
            sentences += data.Corpus(world / "data").read(language, split)
    assert meta["data"] == {"name": str(world / "data"), "revision": "local",
                            "fingerprint": data.fingerprint(sentences)}
    training = meta["training"]
    assert training["finished"] is True and training["stopped"] == "all steps"
    assert training["trainable"] == sum(p.numel() for p in prompt.parameters()) + 16 * 17 + 7 * 17
    assert training["versions"]["torch"] == torch.__version__
    assert training["settings"]["rate"] == 0.03 and training["settings"]["steps"] == 4
    assert training["settings"]["prompt.ratio"] == 0.3
    config = read_config(folder / "config.yaml")
    assert config["train"]["batch_size"] == 4 and config["prompt"]["ratio"] == 0.3
    assert config["data"]["name"] == str(world / "data")


@pytest.fixture(scope="module")
def source_run(world, tmp_path_factory):
    """The folder of a finished XPE run."""
    out = tmp_path_factory.mktemp("source")
    assert train.main(command(world, out, "--seeds", "12", "--steps", "8")) == 0
    return out / "xpe-two-s12"


def test_an_adaptation_knows_its_source_by_its_tensors(world, source_run, tmp_path):
    """Catches: an adaptation of a source run that has been trained anew taken for finished."""
    source = shutil.copytree(source_run, tmp_path / "sources" / source_run.name)
    arguments = ["--adapt", source, "--languages", "ccc_Latn", "--steps", "2"]
    assert train.main(command(world, tmp_path / "out", *arguments)) == 0
    prompt, head, meta = xpe.load_prompt(source)
    head.out_proj.bias.data += 1.0
    xpe.save_prompt(source, prompt, head, meta)
    with pytest.raises(ValueError, match="source was"):
        train.main(command(world, tmp_path / "out", *arguments, "--resume"))


def test_a_run_whose_backbone_has_no_fingerprint_can_be_adapted(world, source_run, tmp_path):
    """Catches: a released prompt, whose files do not say on which weights, refused."""
    source = shutil.copytree(source_run, tmp_path / "sources" / source_run.name)
    prompt, head, meta = xpe.load_prompt(source)
    del meta["backbone"]["fingerprint"]
    xpe.save_prompt(source, prompt, head, meta)
    arguments = ["--adapt", source, "--languages", "ccc_Latn", "--steps", "2"]
    assert train.main(command(world, tmp_path / "out", *arguments)) == 0
    meta["backbone"]["fingerprint"] = "0" * 16
    xpe.save_prompt(source, prompt, head, meta)
    with pytest.raises(ValueError, match="trained on another backbone"):
        train.main(command(world, tmp_path / "other", *arguments))


def test_a_finished_learner_holds_no_weights(world, tmp_path, monkeypatch):
    """Catches: ten seeds of full fine-tuning whose backbones and optimizers all stay on one GPU."""
    learners = []
    finish = train.Learner.finish

    def finish_and_remember(learner):
        learners.append(learner)
        finish(learner)
    monkeypatch.setattr(train.Learner, "finish", finish_and_remember)
    assert train.main(command(world, tmp_path, "--mode", "full", "--seeds", "11-12")) == 0
    for learner in learners:
        assert learner.backbone is None and learner.optimizer is None and learner.best is None


def test_a_run_whose_checkpoint_is_gone_says_that_it_starts_over(world, tmp_path, capsys):
    """Catches: hours of training that begin again without a word."""
    folder = tmp_path / "xpe-two-s11"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 4}\n')
    assert train.main(command(world, tmp_path, "--seeds", "11", "--resume")) == 0
    assert "so it starts over" in capsys.readouterr().err
    assert '{"step": 4}' not in (folder / "metrics.jsonl").read_text()


def test_a_long_test_text_costs_no_finished_training(world, tmp_path):
    """Catches: hours of training, then an error over a text so long that only scoring meets it."""
    root = shutil.copytree(world / "data", tmp_path / "data")
    path = root / "ccc_Latn" / "test.tsv"
    lines = path.read_text().splitlines(keepends=True)
    first_text = lines[1].rsplit("\t", 1)[1].strip()
    lines[1] = lines[1].replace(first_text, " ".join([first_text] * 60))
    path.write_text("".join(lines))
    arguments = ["--data", root, "--steps", "4", "--set", "evaluate.after_training=true"]
    assert train.main(command(world, tmp_path / "out", *arguments)) == 0


def test_an_adapted_prompt_starts_from_its_source(world, source_run, tmp_path):
    """Catches: a prompt or head that starts anew, dropout that the paper takes away, a folder or
    prompt.json that forgets the source."""
    arguments = ["--adapt", source_run, "--languages", "ccc_Latn,bbb_Latn", "--seeds", "12",
                 "--set", "adapt.rate=0.0", "--set", "adapt.encoded_rate=0.0"]
    assert train.main(command(world, tmp_path, *arguments)) == 0
    source_prompt, source_head, _ = xpe.load_prompt(source_run)
    fingerprint = evaluate.Run(source_run).prompt_fingerprint()
    for language in ("ccc_Latn", "bbb_Latn"):
        prompt, head, meta = xpe.load_prompt(tmp_path / f"xpe-two-s12-to-{language}-s12")
        assert (meta["adapted_to"], meta["adapted_from"]) == (language, "xpe-two-s12")
        assert meta["sources"] == ["aaa_Latn", "bbb_Latn"]
        assert meta["training"]["settings"]["source"] == fingerprint
        assert prompt.config["dropout"] == 0.0
        for module, source in ((prompt, source_prompt), (head, source_head)):
            for parameter, other in zip(module.parameters(), source.parameters(), strict=True):
                assert torch.equal(parameter, other)    # at a rate of zero it stays where it starts


def test_adaptation_takes_the_seed_and_kind_of_its_source(world, source_run, passes, tmp_path):
    """Catches: a seed or a mode that has to be said again; a source run that is changed."""
    before = content_of(source_run)
    arguments = command(world, tmp_path, "--adapt", source_run, "--group", "others")
    for option in ("--mode", "--seeds"):
        at = arguments.index(option)
        del arguments[at:at + 2]
    assert train.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["xpe-two-s12-to-ccc_Latn-s12"]
    meta = xpe.load_prompt(tmp_path / "xpe-two-s12-to-ccc_Latn-s12")[2]
    assert meta["kind"] == "xpe" and meta["seed"] == 12
    start, trained = passes[0][2]["prompts.0.encoded"], passes[0][0][0].prompt.encoded
    assert not torch.equal(start, trained)
    assert content_of(source_run) == before


@pytest.mark.parametrize("name", ["a b@seed-03", "12:30", ".r"])
def test_a_run_of_any_name_can_be_adapted(world, source_run, tmp_path, name):
    """Catches: a folder's name, as the hub's branches make it, that the run's own pass.json may not
    hold, so that training dies at its first checkpoint."""
    source = tmp_path / name
    shutil.copytree(source_run, source)
    arguments = command(world, tmp_path / "out", "--adapt", source, "--languages", "ccc_Latn",
                        "--set", "adapt.steps=2")
    assert train.main(arguments) == 0
    meta = xpe.load_prompt(tmp_path / "out" / f"{name}-to-ccc_Latn-s12")[2]
    assert meta["training"]["stopped"] == "all steps"


def test_the_saved_configuration_is_that_of_the_command(world, tmp_path):
    """Catches: a config.yaml from which another training would follow."""
    train.main(command(world, tmp_path, "--group", "others", "--seeds", "11", "--steps", "2"))
    saved = read_config(tmp_path / "xpe-others-s11" / "config.yaml")
    assert saved["train"]["steps"] == 2 and saved["sources"] == "others"
    for codes in ("ccc_Latn", "aaa_Latn,ccc_Latn"):
        train.main(command(world, tmp_path, "--languages", codes, "--seeds", "11", "--steps", "2"))
        name = codes.replace(",", "+")
        saved = read_config(tmp_path / f"xpe-{name}-s11" / "config.yaml")
        assert saved["sources"] == name
        assert resolve_group(saved, saved["sources"]) == codes.split(",")
    train.main(command(world, tmp_path, "--mode", "full", "--seeds", "11", "--steps", "1"))
    saved = read_config(tmp_path / "full-two-s11" / "config.yaml")
    assert train.settings_for(saved, "full", None)["steps"] == 1 and saved["full"]["epochs"] == 0


def test_targets_that_contain_themselves_are_told_before_training(world, tmp_path, capsys):
    """Catches: hours of training, and then a run that cannot be scored."""
    arguments = command(world, tmp_path / "out", "--seeds", "11", "--steps", "2", "--set",
                        "groups.ccc_Latn=[aaa_Latn, ccc_Latn]", "--set",
                        "targets.C=ccc_Latn")
    status, error = run_script(train.main, arguments, capsys)
    assert status == 2 and "groups.ccc_Latn lists 'ccc_Latn', which is the group itself" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    (["--languages", ""], "--adapt needs its target languages"),
    (["--set", "train.patience=3"], "adapt.patience 0 has the last word; --set adapt.patience="),
    (["--set", "prompt.dropout=0.5"], "as it was trained; --set adapt.prompt_dropout"),
    (["--set", "prompt.reads=mean"], "prompt.reads does nothing .* --adapt .* as it was trained"),
    (["--set", "data.max_length=8"], "data.max_length does nothing .* --adapt .* as it was"),
    (["--mode", "spt"], "is a xpe run and cannot be adapted as spt"),
    (["--mode", "dual", "--ratio", "0.3"], "cannot be adapted as dual")])
def test_adaptations_that_make_no_sense(world, source_run, tmp_path, capsys, change, message):
    """Catches: a target left open, a kind that the source is not."""
    arguments = command(world, tmp_path / "out", "--adapt", source_run, "--languages", "ccc_Latn",
                        *change)
    status, error = run_script(train.main, arguments, capsys)
    assert status == 2 and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_full_run_is_not_adapted(world, tmp_path, capsys):
    """Catches: "a full run cannot be adapted as full", which helps nobody."""
    arguments = command(world, tmp_path, "--mode", "full", "--seeds", "11", "--steps", "1")
    assert train.main(arguments) == 0
    arguments = command(world, tmp_path, "--mode", "full", "--adapt", tmp_path / "full-two-s11",
                        "--languages", "ccc_Latn")
    status, error = run_script(train.main, arguments, capsys)
    assert status == 2 and "a full run has no prompt that could be adapted" in error


def test_an_adaptation_is_refused_over_another_backbone(world, source_run, tmp_path, capsys):
    """Catches: a prompt that goes on in front of weights that it has never met."""
    other = shutil.copytree(world / "backbone", tmp_path / "other")
    model = transformers.AutoModel.from_pretrained(other)
    model.embeddings.word_embeddings.weight.data += 1
    model.save_pretrained(other)
    arguments = command(world, tmp_path / "out", "--adapt", source_run, "--languages", "ccc_Latn",
                        "--backbone", other)
    status, error = run_script(train.main, arguments, capsys)
    assert status == 2 and "was trained on another backbone" in error


def test_an_adaptation_is_scored_beside_its_source(world, source_run, tmp_path, capsys):
    """Catches: a zero-shot figure from the source run's data; an error only after all the
    training."""
    new_data = shutil.copytree(world / "data", tmp_path / "new")
    (new_data / "ccc_Latn").rename(new_data / "ddd_Latn")
    arguments = command(world, tmp_path / "runs", "--adapt", source_run, "--seeds", "11",
                        "--languages", "ddd_Latn", "--data", new_data,
                        "--set", "evaluate.after_training=true")
    assert train.main(arguments) == 0
    assert re.search(r"to-ddd_Latn-s11: zero-shot [\d.]+ %, adapted [\d.]+ % on ddd_Latn",
                     capsys.readouterr().out)


def test_a_run_is_scored_after_training(world, tmp_path, capsys):
    """Catches: results without a test table; scored runs that --resume scores once more; a hint
    that a shell takes apart."""
    out = tmp_path / "my runs"
    arguments = command(world, out, "--seeds", "11", "--steps", "4",
                        "--set", "evaluate.after_training=true")
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    folder = out / "xpe-two-s11"
    for name in ("test.csv", "test.json", "test_predictions.csv"):
        assert (folder / name).is_file()
    assert "Others" in printed and f"python report.py {shlex.quote(str(out))}/*" in printed
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert train.main([*arguments, "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_corpus_without_a_test_split_is_told_before_training(world, tmp_path, capsys):
    """Catches: hours of training that end in an error, instead of the way to train without
    scoring."""
    new_data = shutil.copytree(world / "data", tmp_path / "data")
    for path in new_data.glob("*/test.tsv"):
        path.unlink()
    arguments = command(world, tmp_path / "out", "--data", new_data,
                        "--set", "evaluate.after_training=true")
    status, error = run_script(train.main, arguments, capsys)
    assert status == 2 and "aaa_Latn/test.tsv" in error and "evaluate.after_training=false" in error
    assert not (tmp_path / "out").exists()


def test_the_sample_beats_chance(tmp_path, capsys):
    """Catches: a sample that no longer learns, labels that do not carry over to languages
    without any."""
    argv = ["--mode", "xpe", "--sources", HERE / "sample/config.yaml", "--out", tmp_path,
            "--data", HERE / "sample/sib200", "--backbone", HERE / "sample/backbone",
            "--steps", "20", "--device", "cpu"]
    assert train.main([str(argument) for argument in argv]) == 0
    summary = json.loads((tmp_path / "xpe-sources-s11" / "test.json").read_text())
    chance = 100 / 7
    for title, gain in (("Sources", 30), ("Seen targets", 25), ("Unseen targets", 10)):
        assert summary["groups"][title]["accuracy"] > chance + gain
    assert "Unseen targets" in capsys.readouterr().out
    assert read_yaml(tmp_path / "xpe-sources-s11" / "config.yaml")["train"]["amp"] == "auto"
