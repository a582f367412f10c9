"""train.py: rates, the loop, modes, adaptation, and what is said before and after training.

    pytest tests/test_train.py                      (offline, CPU; half a minute on one core)

Interrupted and disturbed runs are in test_robustness.py. Each test says which mistake it would
catch. The small corpus has 28 training and 28 dev sentences in its two source languages.
"""
import contextlib
import importlib
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import evaluate
import runs
import train
import xpe
from config import read_config
from helpers import close, config_file, run, tiny_backbone


def train_tiny(world, out, arguments):
    """Run train.py in the small world -> (status, stdout, stderr). `a.b=c` stands for --set."""
    arguments = re.sub(r"(\w+\.\w+=)", r"--set \1", arguments)
    return run(train.main, "--sources", world / "config.yaml", "--data", world / "data",
               "--backbone", world / "backbone", "--out", out, "--device", "cpu",
               *shlex.split(arguments))


def trained(world, out, arguments):
    """Run train.py as train_tiny does, without errors -> the run folders in `out`."""
    status, _, error = train_tiny(world, out, arguments)
    assert status == 0, error
    return sorted(out.iterdir())


def read_log(folder):
    """metrics.jsonl of a run -> list of dicts."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors_of(folder):
    """prompt.safetensors of a run -> dict of tensors."""
    return runs.read_tensors(folder / "prompt.safetensors")


def results(out):
    """{path: content} of all that must be the same, bit for bit, when a run is repeated."""
    paths = [*out.glob("*/*.safetensors"), *out.glob("*/metrics.jsonl")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@contextlib.contextmanager
def after_steps(number, action):
    """Call action(optimizer) after optimizer step `number`, counted over all learners."""
    count = itertools.count(1)

    def hook(optimizer, *_):
        if next(count) == number:
            action(optimizer)
    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# One step of it writes a run with the tensors that training starts from
AT_REST = "--steps 1 train.rate=0 train.standard_rate=0 train.encoded_rate=0"
SCORED = "evaluate.after_training=true"


@pytest.fixture(scope="module")
def calm(world, tmp_path_factory):
    """The small world without any dropout."""
    root = tmp_path_factory.mktemp("calm")
    shutil.copytree(world / "data", root / "data")
    tiny_backbone(root / "backbone", classifier_dropout=0.0)
    path = config_file(root)
    path.write_text(path.read_text().replace("dropout: 0.2", "dropout: 0.0")
                    + "backbone: {dropout: false}\n")
    return root


# ---- Rates, optimizers, schedule -----------------------------------------------------------------

PLAIN, HIGH = (5e-5, 0.01), (5e-3, 0.0)         # rates and weight decays of the recipe


@pytest.mark.parametrize("standard, encoded, settings", [
    (HIGH, PLAIN, []),
    (PLAIN, HIGH, ["train.encoded_rate=5.0e-3", "train.encoded_weight_decay=0.0",
                   "train.standard_rate=5.0e-5", "train.standard_weight_decay=0.01"])])
@pytest.mark.parametrize("ratio, encoder", [(0.0, "mlp"), (1.0, "mlp"), (0.3, "mlp"),
                                            (1.0, "lstm"), (0.7, "attention")])
def test_the_rate_of_every_tensor(standard, encoded, settings, ratio, encoder):
    """Catches: standard rows at the encoder's rate (SPT then hardly learns), decay on a bias or
    norm, a tensor that is forgotten, the open rates of DUAL out of reach."""
    modules = nn.ModuleDict({"prompt": xpe.SoftPrompt(16, ratio=ratio, encoder=encoder),
                             "head": xpe.ClassificationHead(16, 7)})
    groups = train.parameter_groups(modules, read_config(None, settings)["train"])
    rate_of = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in modules.named_parameters():
        is_plain = "bias" not in name and "layernorm" not in name
        expected = {"prompt.standard": standard, "prompt.encoded": encoded}.get(
            name, PLAIN if is_plain else (5e-5, 0.0))
        assert rate_of.pop(parameter) == expected, name


def test_optimizers():
    """Catches: Adafactor's own rates, which transformers takes by default, its momentum, another
    decay or clip; Adam for AdamW."""
    weights = nn.Parameter(torch.ones(4, 6))
    optimizer = train.make_optimizer([dict(params=[weights], lr=0.01)], "adafactor")
    weights.grad = torch.full((4, 6), 7.0)      # equal gradients become ones: the step is the rate
    optimizer.step()
    close(weights.detach(), torch.full((4, 6), 0.99))
    used = optimizer.param_groups[0]
    papers = dict(lr=0.01, clip_threshold=1.0, decay_rate=-0.8, beta1=None, relative_step=False,
                  scale_parameter=False, warmup_init=False, weight_decay=0.0)
    assert used == {**used, **papers}
    assert type(train.make_optimizer([weights], "adamw")) is torch.optim.AdamW


def share_of_rate(step, steps, warmup, kind):
    """The share of its rate that step number `step`, counted from 0, is taken with."""
    warmup_steps = math.ceil(steps * warmup)
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    if kind == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * (2 * progress % 1))) / 2


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps, warmup", [(7, 0.1), (100, 0.05), (50, 0.0)])
def test_schedule(kind, steps, warmup):
    """Catches: a cosine without restarts or with one too many, a warm-up that is off by one."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    cfg = {"warmup": warmup, "schedule": kind, "cycles": 2}
    schedule = train.make_schedule(optimizer, steps, cfg)
    for step in range(steps):
        share = share_of_rate(step, steps, warmup, kind)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * share, abs=1e-12)
        optimizer.step()
        schedule.step()


# ---- The loop, a second time ---------------------------------------------------------------------

def sentences_of(world, split):
    """The sentences of the two source languages."""
    corpus = data.Corpus(world / "data")
    return corpus.read("aaa_Latn", split) + corpus.read("bbb_Latn", split)


def train_plainly(world, start, cfg, seed, steps):
    """Train what a run at rest holds, one sentence after the other -> (tensors, mean loss)."""
    backbone = transformers.AutoModel.from_pretrained(world / "backbone").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "backbone")
    sentences = sentences_of(world, "train")
    ids = [torch.tensor(tokenizer(sentence.text)["input_ids"]) for sentence in sentences]
    labels = torch.tensor([sentence.label for sentence in sentences])
    modules, _ = runs.load_prompt(start)
    prompt, head = modules["prompt"], modules["head"]
    optimizer = train.make_optimizer(train.parameter_groups(modules, cfg), cfg["optimizer"])
    rates = [group["lr"] for group in optimizer.param_groups]

    def loss_of(i):
        words = backbone.embeddings.word_embeddings(ids[i])
        states = backbone(inputs_embeds=torch.cat((prompt()[0], words))[None])[0]
        loss = F.cross_entropy(head(states[:, 0]), labels[i:i + 1])
        if cfg["class_weights"] == "balanced":
            loss = loss * len(ids) / (7 * (labels == labels[i]).sum())
        return loss

    lengths, epochs, batches, losses = np.array([*map(len, ids)]), itertools.count(), [], []
    for step in range(steps):
        batches = batches or data.length_batches(lengths, cfg["batch_size"], seed, next(epochs))
        parts, batches = batches[:cfg["accumulate"]], batches[cfg["accumulate"]:]
        loss = sum(sum(map(loss_of, part)) / len(part) for part in parts) / len(parts)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norm = sum(float((p.grad ** 2).sum()) for p in modules.parameters()) ** 0.5
        for parameter in modules.parameters():
            parameter.grad *= min(1.0, cfg["clip"] / norm)
        share = share_of_rate(step, steps, cfg["warmup"], cfg["schedule"])
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = share * rate
        optimizer.step()
    return dict(modules.state_dict()), sum(losses) / steps


@pytest.mark.parametrize("settings", [
    "train.optimizer=adafactor train.clip=0.5",
    "train.optimizer=adamw train.accumulate=3 train.class_weights=balanced",
    "train.optimizer=adamw train.batch_size=1 train.class_weights=balanced"])
def test_the_loop_against_plain_training(calm, tmp_path, settings):
    """Catches: a wrong batch, label or norm, accumulation that sums, a rate that is one step late,
    learners that share a clip, class weights that cancel in a batch of one sentence."""
    settings += " train.rate=1.0e-3 train.evaluate_every=10"
    both = "--mode dual --seeds 11-12 "
    folders = trained(calm, tmp_path / "run", both + "--steps 10 " + settings)
    starts = trained(calm, tmp_path / "start", both + AT_REST)
    cfg = read_config(calm / "config.yaml", settings.split())["train"]
    for seed, folder, start in zip((11, 12), folders, starts):
        tensors, loss = train_plainly(calm, start, cfg, seed, 10)
        torch.testing.assert_close(tensors_of(folder), tensors, rtol=1e-3, atol=1e-4)
        assert read_log(folder)[0]["loss"] == pytest.approx(loss, abs=1e-4)


def test_seeds_together_are_the_seeds_alone(calm, tmp_path):
    """Catches: anything that learners share by accident: batches, norms, optimizer state, dev
    scores; ten seeds that are one seed ten times."""
    together = trained(calm, tmp_path / "all", "--mode dual --seeds 11-13")
    for seed in (11, 12, 13):
        alone = trained(calm, tmp_path / "one", f"--mode dual --seeds {seed}")
    for folder, other in zip(together, alone, strict=True):
        close(tensors_of(folder), tensors_of(other), 1e-3)
    for a, b in itertools.combinations(map(tensors_of, together), 2):
        assert all((a[key] - b[key]).abs().max() > 0.01 for key in a)


@pytest.mark.parametrize("mode, amp", [("spt", "off"), ("xpe", "off"), ("dual", "bf16"),
                                       ("head", "off")])
def test_what_moves(world, tmp_path, mode, amp):
    """Catches: a head or prompt that silently stays (peft's bug of 2025), a half-precision prompt
    (small steps do not move it), a `head` baseline that trains its prompt."""
    start, = trained(world, tmp_path / "start", f"--mode {mode} {AT_REST}")
    small = AT_REST.replace("=0", "=1.0e-4").replace("--steps 1", "--steps 3")
    end, = trained(world, tmp_path / "end", f"--mode {mode} {small} train.amp={amp}")
    before, trainable = tensors_of(start), 0
    for name, tensor in tensors_of(end).items():
        moved = (tensor != before[name]).view(len(tensor), -1).any(dim=1)
        if mode == "head" and name.startswith("prompt."):
            assert not moved.any(), name
            continue
        trainable += tensor.numel()
        assert moved.all() if name in ("prompt.standard", "prompt.encoded") else moved.any(), name
    assert runs.load_prompt(end)[1]["training"]["trainable"] == trainable


@pytest.mark.parametrize("mode, reads", [("dual", "prompt"), ("xpe", "mean"), ("full", "prompt"),
                                         ("full", "mean")])
def test_the_best_step_is_kept(world, tmp_path, mode, reads):
    """Catches: the last tensors beside the best accuracy; a frozen backbone that trained along, or
    a tuned one that was not saved: the kept run is loaded and its dev scores computed again."""
    folder, = trained(world, tmp_path, f"--mode {mode} prompt.reads={reads}"
                                       f" train.evaluate_every=1")
    best = max(read_log(folder), key=lambda line: line["dev_accuracy"])     # the first of equals
    sentences = sentences_of(world, "dev")
    labels = torch.tensor([sentence.label for sentence in sentences])
    texts = [sentence.text for sentence in sentences]
    _, probabilities = evaluate.load(folder, "cpu", amp="off")(texts)
    accuracy = 100 * float((probabilities.argmax(dim=1) == labels).double().mean())
    loss = float(F.nll_loss(probabilities.log(), labels))
    training = runs.load_prompt(folder)[1]["training"]
    expected = pytest.approx([best["step"], accuracy, loss], abs=1e-4)
    assert [best[key] for key in ("step", "dev_accuracy", "dev_loss")] == expected
    assert [training[key] for key in ("step", "dev_accuracy", "dev_loss")] == expected


def stopping_point(log, patience, after):
    """How many lines of a log without patience remain with it, from the definition."""
    counted = [i for i, line in enumerate(log) if line["step"] >= int(len(log) * after)]
    for number, i in enumerate(counted):
        losses = [log[j]["dev_loss"] for j in counted[:number + 1]]
        if number - losses.index(min(losses)) >= patience:
            return i + 1
    return len(log)


def test_early_stopping(calm, tmp_path):
    """Catches: patience on accuracy instead of loss, before its time, or with a lowest loss from
    before its time."""
    arguments = "--mode xpe --steps 30 train.evaluate_every=1 train.rate=0.3"
    folder, = trained(calm, tmp_path / "all", arguments)
    log, lengths = read_log(folder), set()
    for patience, after in ((1, 0.4), (3, 0.6), (5, 0.1), (40, 0.5)):
        folder, = trained(calm, tmp_path / f"{patience}-{after}", arguments
                          + f" train.patience={patience} train.patience_after={after}")
        stopped = read_log(folder)
        assert stopped == log[:stopping_point(log, patience, after)]
        lengths.add(len(stopped))
        training = runs.load_prompt(folder)[1]["training"]
        assert ("no lower dev loss" in training["stopped"]) == (len(stopped) < 30)
    assert len(lengths) == 4, "this test would see nothing"


EFFECTS = """backbone.dropout=false prompt.dropout=0 prompt.length=5 prompt.hidden=3 prompt.layers=1
prompt.encoder=lstm prompt.encoder=attention prompt.encoder=none prompt.reads=first
prompt.reads=mean prompt.reads=last data.max_length=6 train.batch_size=5 train.accumulate=2
train.optimizer=adamw train.rate=0.2 train.weight_decay=0.9 train.encoded_rate=0.2
train.encoded_weight_decay=0.9 train.schedule=linear train.cycles=3 train.warmup=0.5 train.clip=0.01
train.amp=bf16 train.class_weights=balanced""".split()


@pytest.fixture(scope="module")
def usual(world, tmp_path_factory):
    """The folder of a run of the small world's own settings."""
    return trained(world, tmp_path_factory.mktemp("usual"), "--mode xpe --seeds 12 --steps 4")[0]


@pytest.mark.parametrize("setting", EFFECTS)
def test_no_setting_is_without_effect(world, usual, tmp_path, setting):
    """Catches: a setting that is read, saved and not used; a control encoder that is the MLP."""
    folder, = trained(world, tmp_path, f"--mode xpe --seeds 12 --steps 4 {setting}")
    losses, usual_losses = [[line["loss"] for line in read_log(run)] for run in (folder, usual)]
    assert losses != usual_losses


# ---- Commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, name, evaluated_at, settings", [
    ("--mode xpe", "xpe-two-s11", [4, 8, 12, 16, 20, 24], dict(rate=0.03, optimizer="adafactor")),
    ("--mode spt train.evaluate_every=0 --steps 16", "spt-two-s11", [7, 14, 16], dict(steps=16)),
    ("--mode dual --ratio 0.3 train.accumulate=3 train.evaluate_every=0 --steps 7",
     "dual30-two-s11", [3, 6, 7], {"prompt.ratio": 0.3}),
    ("--mode dual train.epochs=2 prompt.encoder=none", "dual70-none-two-s11", [4, 8, 12, 14], {}),
    ("--mode xpe prompt.encoder=lstm --group others --seeds 7 --steps 2", "xpe-lstm-others-s7",
     [2], {}),
    ("--mode head --languages 'aaa_Latn, ccc_Latn' --steps 1", "head-aaa_Latn+ccc_Latn-s11", [1],
     {}),
    ("--mode full", "full-two-s11", [4, 8, 12, 16, 20, 21], dict(rate=3e-3, optimizer="adamw")),
    ("--mode full --steps 5 train.rate=0.5", "full-two-s11", [4, 5], dict(rate=0.5, epochs=0))])
def test_steps_and_names(world, tmp_path, arguments, name, evaluated_at, settings):
    """Catches: a section that overrules --set or --steps, an epoch of the wrong length, two methods
    that share a folder."""
    folder, = trained(world, tmp_path, arguments)
    assert folder.name == name
    assert [line["step"] for line in read_log(folder)] == evaluated_at
    used = runs.load_prompt(folder)[1]["training"]["settings"]
    assert used == {**used, **settings}


@pytest.mark.parametrize("arguments", [
    "--mode xpe --languages ccc_Latn,aaa_Latn --steps 3 train.warmup=0",
    "--mode dual --ratio 0.5 --group others --steps 3 prompt.encoder=none",
    "--mode full --steps 3 --seeds 11-12"])
def test_the_saved_configuration_trains_the_same_again(world, tmp_path, arguments):
    """Catches: a config.yaml from which another training follows; a second seed of full
    fine-tuning that starts from the first one's weights; anything unseeded."""
    for folder in trained(world, tmp_path / "a", arguments):
        assert run(train.main, "--sources", folder / "config.yaml", "--out", tmp_path / "b",
                   "--mode", arguments.split()[1], "--seeds", folder.name[-2:])[0] == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_what_prompt_json_says(world, tmp_path):
    """Catches: a prompt that cannot be used or explained a year later, two ratios in one file, a
    head without the dropout of the backbone's configuration."""
    backbone = tiny_backbone(tmp_path / "backbone", classifier_dropout=0.25)
    folder, = trained(world, tmp_path / "runs", f"--mode xpe --seeds 12 --backbone {backbone}")
    files = "config.yaml", "metrics.jsonl", "prompt.json", "prompt.safetensors"
    assert {path.name for path in folder.iterdir()} == {*files}
    text = (folder / "prompt.json").read_text()
    assert set(re.findall(r'ratio": ([\d.]+)', text)) == {"1.0"}
    meta = json.loads(text)
    assert meta == {**meta, "kind": "xpe", "seed": 12, "reads": "prompt",
                    "sources": ["aaa_Latn", "bbb_Latn"], "labels": list(data.LABELS),
                    "max_length": 62 - 4}       # all that the tiny backbone has room for
    assert meta["backbone"]["name"] == str(backbone) and meta["head"]["dropout"] == 0.25
    sentences = sentences_of(world, "train") + sentences_of(world, "dev")
    assert meta["data"]["fingerprint"] == data.fingerprint(sentences)
    assert meta["training"]["stopped"] == "all steps"


@pytest.mark.parametrize("change", ["", "train.rate=0.5", "--seeds 9-12"])
def test_an_existing_folder_is_not_written_over(world, usual, change):
    """Catches: a finished run trained over; a refusal that does not say how it was trained."""
    before = results(usual.parent)
    status, _, error = train_tiny(world, usual.parent, f"--mode xpe --seeds 12 --steps 4 {change}")
    assert status == 2
    assert re.search("s12 exists: --resume .*started with: .*--seeds 12 --steps", error)
    assert results(usual.parent) == before


# ---- Told before and after training --------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    ("", "--mode .*spt, xpe"),
    ("--mode dual --ratio 1", "DUAL needs 0 < ratio < 1"),
    ("--mode spt --ratio 0.3", "--ratio goes with --mode dual"),
    ("--mode xpe --steps 0", "train.steps must be at least 1"),
    ("--mode xpe --group othrs", r"no group 'othrs' .did you mean others"),
    ("--mode xpe --languages aaa_Latin", r"no language 'aaa_Latin' .*did you mean aaa_Latn\?"),
    ("--mode xpe --languages two", "no language 'two'"),
    ("--mode xpe --seeds 1..3", "--seeds 1..3: write 11, 11-20 or 11,15"),
    ("--mode xpe --seeds 12-11", "--seeds 12-11: .* no seed"),
    ("--mode xpe --data /no/where", "/no/where: no such folder"),
    ("--mode xpe --backbone /no/where", "/no/where: no such folder"),
    ("--mode xpe --set lr=1", "write section.key=value"),
    ("--mode xpe train.batch_size=0", "at least 1"),
    ("--mode xpe prompt.encoder=attention prompt.heads=5", "prompt.heads.* divide"),
    ("--mode xpe prompt.length=62", "no room for a text")])
def test_refused_before_anything_is_written(world, tmp_path, arguments, message):
    """Catches: a traceback, a status of 0, a folder left behind for which the next try is
    refused."""
    status, _, error = train_tiny(world, tmp_path / "out", arguments)
    assert status == 2 and re.match(f"error: .*{message}", error.splitlines()[-1]), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, arguments, status, message", [
    ("", "targets.X=[aaa_Latn,cccc_Latn]", 0, r"cccc_Latn \(did you mean ccc_Latn\?\)"),
    ("", "data.max_length=8", 0, r"\d+ of 28 texts fill or exceed data.max_length, 8 tokens"),
    ("", "train.batch_size=30", 0, "28 training sentences are fewer than train.batch_size"),
    ("", AT_REST, 0, "no better than the majority class .* raise train.rate .*standard_rate"),
    ("perl -i -ne 'print unless /travel/' [ab]*/train.tsv", "", 0, "has the label .*travel"),
    ("cp aaa_Latn/train.tsv ccc_Latn/test.tsv", SCORED, 0,
     "14 of 14 test sentences of ccc_Latn are also in train of aaa_Latn"),
    ("cp aaa_Latn/train.tsv ccc_Latn/test.tsv", SCORED + " --adapt {usual} --languages ccc_Latn", 0,
     "14 of 14 test sentences of ccc_Latn are also in train of aaa_Latn"),
    ("cp aaa_Latn/train.tsv aaa_Latn/dev.tsv", "", 0, "14 of 14 dev sentences of aaa_Latn"),
    ("rm bbb_Latn/dev.tsv", "", 2, "bbb_Latn/dev.tsv: no such split"),
    ("rm */test.tsv", SCORED, 2, "no test.tsv.*after_training=false"),
    ("perl -i -ne 'print if /text/' bbb_Latn/dev.tsv", "", 2, "dev.tsv.*no sentence")])
def test_told_of_a_corpus(world, usual, tmp_path, change, arguments, status, message):
    """Catches: hours of training that end in an error, or in figures that are not honest."""
    corpus = shutil.copytree(world / "data", tmp_path / "data")
    subprocess.run(change, shell=True, cwd=corpus, check=True)
    found, _, error = train_tiny(world, tmp_path / "out",
                                 f"--mode xpe --data {corpus} --steps 4 "
                                 f"{arguments.format(usual=usual)}")
    assert found == status and re.search(message, error), error
    assert (tmp_path / "out").exists() == (status == 0)


def test_training_learns_and_the_next_command_works(calm, tmp_path, monkeypatch):
    """Catches: a loop that moves everything and learns nothing; a printed command that a shell
    takes apart, or that names what was not trained."""
    shutil.copytree(calm, tmp_path / "my runs" / "no run")
    monkeypatch.chdir(tmp_path)
    status, told, errors = train_tiny(calm, "my runs", "--mode xpe --steps 60 --seeds 11-12"
                                      f" prompt.reads=mean train.rate=0.05 {SCORED}")
    assert status == 0 and "majority" not in errors
    for folder in Path("my runs").glob("xpe*"):
        losses = [line["loss"] for line in read_log(folder)]
        assert len(losses) == 15 and losses[-1] < 0.7 * losses[0]
    commands = told.partition("next:\n")[2].splitlines()
    assert len(commands) == 2
    for command in commands:
        _, script, *arguments = shlex.split(command)
        assert run(importlib.import_module(Path(script).stem).main, *arguments)[0] == 0


# ---- A learner that diverges ---------------------------------------------------------------------

def test_a_learner_that_diverges_stops_alone(calm, tmp_path):
    """Catches: a NaN that reaches other learners or overwrites the best state, and ends without a
    word or as a success when resumed."""
    def spoil(optimizer):
        optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))
    arguments = "--mode xpe --seeds 11-13"
    good = trained(calm, tmp_path / "good", arguments)
    with after_steps(3 * 9 + 2, spoil):         # the second learner at step 10
        assert train_tiny(calm, tmp_path / "bad", arguments)[0] == 2
    folders = sorted((tmp_path / "bad").iterdir())
    for i in (0, 2):
        close(tensors_of(folders[i]), tensors_of(good[i]), 1e-3)
    log, training = read_log(folders[1]), runs.load_prompt(folders[1])[1]["training"]
    assert log == read_log(good[1])[:2] and training["stopped"].startswith("diverged")
    assert training["step"] == max(log, key=lambda line: line["dev_accuracy"])["step"]
    assert train_tiny(calm, tmp_path / "bad", arguments + " --resume")[0] == 2


def test_a_rate_that_is_far_too_high(world, tmp_path):
    """Catches: a loss that is not a number taken for a result, now or on --resume."""
    for resume in ("", " --resume"):
        status, *told = train_tiny(world, tmp_path, "--mode xpe train.rate=9.0e11"
                                   " train.optimizer=adamw" + resume)
        assert status == 2 and "diverged" in str(told)
    assert not list(tmp_path.glob("*/prompt.json"))


# ---- Adaptation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("rates", [AT_REST, ""])
def test_an_adapted_prompt_starts_from_its_source(world, usual, tmp_path, rates):
    """Catches: a prompt or head that starts anew or is not trained, dropout that the paper takes
    away, a seed or kind that has to be said again, a source run that is changed."""
    before, tensors = results(usual.parent), tensors_of(usual)
    status, told, _ = train_tiny(world, tmp_path, f"--adapt {usual} {SCORED} {rates}"
                                                  " --languages ccc_Latn,bbb_Latn")
    assert status == 0 and results(usual.parent) == before
    for language in ("ccc_Latn", "bbb_Latn"):
        folder = tmp_path / f"xpe-two-s12-to-{language}-s12"
        modules, meta = runs.load_prompt(folder)
        assert meta == {**meta, "adapted_to": language, "adapted_from": usual.name, "seed": 12,
                        "kind": "xpe", "sources": ["aaa_Latn", "bbb_Latn"]}
        assert modules["prompt"].config["dropout"] == 0.0
        for name, tensor in tensors_of(folder).items():
            assert torch.equal(tensor, tensors[name]) == bool(rates)
        scored, = runs.read_json(folder / "test.json")["lines"]
        assert scored["language"] == language
    assert f"report.py {usual} {tmp_path}/" in told         # before and after, side by side
    assert "mean ±" not in told         # of languages that have nothing in common but their group


@pytest.mark.parametrize("arguments, message", [
    ("", "--adapt needs its target languages"),
    ("--group others --mode spt", "a run of mode xpe cannot be adapted as spt"),
    ("--group others --ratio 0.3", "not with --adapt"),
    ("--group others --backbone {other}", "trained on another backbone"),
    ("--group others --adapt {full}", "a run of mode full cannot be adapted")])
def test_adaptations_that_make_no_sense(world, usual, tmp_path, arguments, message):
    """Catches: a target left open, a prompt in front of weights that it has never met."""
    full = shutil.copytree(usual, tmp_path / "full")
    path = full / "prompt.json"
    path.write_text(path.read_text().replace('"kind": "xpe"', '"kind": "full"'))
    other = tiny_backbone(tmp_path / "other", initializer_range=0.2)
    status, _, error = train_tiny(world, tmp_path / "out", f"--adapt {usual} "
                                  + arguments.format(full=full, other=other))
    assert status == 2 and message in error and not (tmp_path / "out").exists()
