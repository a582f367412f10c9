"""Interrupts, kills, numbers that go bad, hostile files, a bad hub, full disks: what a run survives.

    python -m pytest -q test_robust.py                   # offline, CPU
    XPE_KILLS=30 XPE_FUZZ=100000 python -m pytest ...         # more kills, more hostile files
"""
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import data
import evaluate
import train
import xpe

HERE = Path(__file__).resolve().parent
LANGUAGES = ("aaa_Latn", "bbb_Latn", "ccc_Latn")
WORDS = ("sun star rock boat road hill vote law king ball goal race cure vein dose song film joke lake "
         "land sand").split()


# ---- a tiny world: backbone, tokenizer, corpus, configuration ----------------------------------------------

def write_backbone(folder, seed=0):
    """A random XLM-R of 2 layers and width 32 with a tokenizer that knows WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    vocab = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tok = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                       special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                            pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    XLMRobertaModel(XLMRobertaConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=66, type_vocab_size=1,
        initializer_range=0.2)).save_pretrained(folder)
    return folder


def write_corpus(root, sizes=(("train", 14), ("dev", 14), ("test", 7))):
    """Three languages; most words of a text are among its label's three, so there is something to learn."""
    for n, language in enumerate(LANGUAGES):
        (root / language).mkdir(parents=True)
        for m, (split, count) in enumerate(sizes):
            draw, text = random.Random(100 * n + m), "index_id\tcategory\ttext\n"
            for i in range(count):
                own = WORDS[3 * (i % 7):3 * (i % 7) + 3]
                words = [draw.choice(own if draw.random() < .7 else WORDS) for _ in range(draw.randint(3, 9))]
                text += f"{i}\t{data.LABELS[i % 7]}\t{' '.join(words)}\n"
            (root / language / f"{split}.tsv").write_text(text, "utf-8")
    return root


CONFIG = """
sources: two
groups: {two: [aaa_Latn, bbb_Latn], three: [aaa_Latn, bbb_Latn, ccc_Latn]}
prompt: {length: 4, dropout: 0.2}
train: {batch_size: 4, steps: 24, evaluate_every: 4, checkpoint_every: 4, patience: 0, amp: "off",
        rate: 3.0e-2, standard_rate: 1.0e-1, encoded_rate: 1.0e-1}
full: {epochs: 3, rate: 3.0e-3, accumulate: 1}
evaluate: {after_training: false}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a backbone, a corpus and a configuration."""
    root = tmp_path_factory.mktemp("world")
    write_backbone(root / "backbone"), write_corpus(root / "data")
    (root / "config.yaml").write_text(CONFIG)
    return root


def command(world, out, *more):
    """Arguments of train.py for three seeds; later ones win."""
    return ["--sources", str(world / "config.yaml"), "--data", str(world / "data"), "--backbone",
            str(world / "backbone"), "--out", str(out), "--device", "cpu", "--mode", "xpe",
            "--seeds", "11-13", *map(str, more)]


def bits(out):
    """All that a finished pass leaves, as it must be equal bit for bit: prompt.json without seconds."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "prompt.json":
                content = json.loads(content)
                del content["training"]["seconds"]
            found[str(path.relative_to(out))] = content
    return found


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does: nothing may catch it."""


def at_step(monkeypatch, events):
    """Let things happen after the optimizer's step number n, once each: {n: signal number or exception}."""
    real, left = train.Optimizer.step, dict(events)

    def step(self, number, factor):
        real(self, number, factor)
        event = left.pop(number, None)
        if isinstance(event, signal.Signals):
            os.kill(os.getpid(), event)
        elif event is not None:
            raise event
    monkeypatch.setattr(train.Optimizer, "step", step)


# ---- 1. resume, exactly ------------------------------------------------------------------------------------

EARLY = ("--set", "train.patience=1", "--set", "train.patience_after=0.3")
PASSES = {
    "xpe": (), "patience": EARLY, "per-epoch": ("--set", "train.evaluate_every=0"),
    "dual-bf16-accumulate": ("--mode", "dual", "--set", "train.amp=bf16", "--set", "train.accumulate=3",
                             "--set", "train.evaluate_every=0", *EARLY),
    "spt-autocast": ("--mode", "spt", "--set", "train.amp=bf16", "--set", "train.frozen_weights=float32"),
    "fp16-adamw": ("--set", "train.amp=fp16", "--set", "train.optimizer=adamw", "--set", "train.rate=1.0e-3"),
    "lstm": ("--set", "prompt.encoder=lstm"), "head": ("--mode", "head"),
    "two-at-once": ("--set", "train.learners_at_once=2"), "full": ("--mode", "full", "--seeds", "11-12"),
    "full-bf16-accumulate": ("--mode", "full", "--set", "full.amp=bf16", "--set", "full.accumulate=2",
                             "--seeds", "11"),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_is_interrupted_and_killed_ends_with_the_same_bits(name, world, tmp_path, monkeypatch,
                                                                       capsys):
    """Catches any state a checkpoint forgets: a generator, a moment, the loss since the last evaluation."""
    assert train.main(command(world, tmp_path / "once", *PASSES[name])) == 0
    at_step(monkeypatch, {3: signal.SIGINT, 9: Killed(), 13: signal.SIGTERM, 16: Killed(), 18: signal.SIGINT})
    again, resume, codes = command(world, tmp_path / "often", *PASSES[name]), [], []
    capsys.readouterr()
    while 0 not in codes:
        try:
            codes.append(train.main(again + resume))
        except Killed:
            codes.append(-9)
        resume = ["--resume"]
        assert len(codes) < 7
    assert 130 in codes and -9 in codes and "--resume" in capsys.readouterr().out
    assert bits(tmp_path / "often") == bits(tmp_path / "once")
    if "patience" in name:      # the case is only worth its name if learners leave at different evaluations
        ends = {len((f / "metrics.jsonl").read_text().splitlines()) for f in (tmp_path / "once").iterdir()}
        assert len(ends) > 1


def test_a_run_killed_at_any_write_goes_on_to_the_same_bits(world, tmp_path, monkeypatch):
    """Catches an order of writes and deletes that leaves, at some instant, no step at which all can go on."""
    args = ["--set", "train.steps=12", "--seeds", "11-12", *EARLY]
    train.main(command(world, tmp_path / "once", *args))
    want, real = bits(tmp_path / "once"), {"replace": os.replace, "unlink": Path.unlink}
    killed = 0
    for point in range(1, 200, 3):
        calls = [0]

        def counted(name, calls=calls, point=point):
            def call(*a, **k):
                calls[0] += 1
                if calls[0] == point:
                    raise Killed
                return real[name](*a, **k)
            return call
        monkeypatch.setattr(os, "replace", counted("replace"))
        monkeypatch.setattr(Path, "unlink", counted("unlink"))
        try:
            train.main(command(world, tmp_path / "often", *args))
        except Killed:
            killed += 1
            calls[0] = 1 << 30
            assert train.main(command(world, tmp_path / "often", *args, "--resume")) == 0
        else:
            break
        assert bits(tmp_path / "often") == want, f"killed before write or delete number {point}"
        shutil.rmtree(tmp_path / "often")
    assert killed >= 5


def test_what_a_kill_leaves_of_a_write_is_cleared_away(world, tmp_path, monkeypatch):
    """Catches a temporary file whose name the clean-up does not know: it would lie there for good."""
    args, folder = command(world, tmp_path, "--seeds", "11", "--steps", "8"), tmp_path / "xpe-two-s11"
    at_step(monkeypatch, {6: signal.SIGINT})
    assert train.main(args) == 130
    with monkeypatch.context() as patch:
        def kill(*_, **__):
            raise Killed
        patch.setattr(os, "replace", kill), patch.setattr(Path, "unlink", kill)
        with pytest.raises(Killed):
            xpe.write_atomic(folder / "backbone.safetensors", b"half")
    assert [f for f in folder.iterdir() if f.name.startswith(".")]
    assert train.main([*args, "--resume"]) == 0
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_an_existing_folder_is_not_started_over(world, tmp_path):
    """Catches a second start that overwrites a finished or interrupted run."""
    args = command(world, tmp_path / "runs", "--steps", "4")
    train.main(args)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError,
                       match=r"xpe-two-s11 exists: --resume goes on.*--out starts elsewhere"):
        train.main(args)
    with pytest.raises(FileExistsError, match="xpe-two-s13 exists"):    # one of several is enough
        train.main(command(world, tmp_path / "runs", "--seeds", "9,13"))
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    assert not (tmp_path / "runs" / "xpe-two-s9").exists()


@pytest.mark.parametrize("setting, name", [
    ("train.rate=1.0e-2", "rate"), ("train.steps=48", "steps"), ("backbone.dropout=false", "dropout"),
    ("data.max_length=20", "max_length"), ("train.amp=bf16", "amp"),
    ("prompt.dropout=0.5", "prompt.dropout"), ("prompt.length=5", "prompt.length"),
    ("prompt.reads=mean", "reads"), ("prompt.heads=4", "prompt.heads")])
def test_resume_refuses_other_settings_by_name(setting, name, world, tmp_path, monkeypatch):
    """Catches a run that goes on under other settings than it began with, and a refusal that wrote first."""
    args = command(world, tmp_path, "--seeds", "11", "--set", "prompt.encoder=attention",
                   "--set", "prompt.heads=8")
    at_step(monkeypatch, {6: signal.SIGINT})
    assert train.main(args) == 130
    before = bits(tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint-6.pt: .*\b{name}\b.*, not .*same settings only"):
        train.main([*args, "--resume", "--set", setting])
    assert bits(tmp_path) == before
    assert train.main([*args, "--resume"]) == 0
    before = bits(tmp_path)
    with pytest.raises(ValueError, match=name):         # and so is a finished one
        train.main([*args, "--resume", "--set", setting])
    assert bits(tmp_path) == before


@pytest.mark.parametrize("settings", [None, [1], "x", {"rate": [0.03]}])
def test_resume_of_a_finished_run_whose_settings_make_no_sense(settings, world, tmp_path):
    """Catches a traceback, and a finished run that is started over because its prompt.json was changed."""
    args = command(world, tmp_path, "--seeds", "11", "--steps", "4")
    train.main(args)
    path = tmp_path / "xpe-two-s11/prompt.json"
    meta = json.loads(path.read_text())
    meta["training"]["settings"] = settings
    del meta["training"]["stopped"]
    path.write_text(json.dumps(meta))
    before = bits(tmp_path)
    with pytest.raises(ValueError, match="prompt.json: .* was .*, not .*same settings only"):
        train.main([*args, "--resume"])
    assert bits(tmp_path) == before


def test_a_pass_that_starts_over_says_under_which_settings(world, tmp_path, monkeypatch):
    """Catches a config.yaml of the first attempt beside what the second, with other settings, has trained."""
    args = command(world, tmp_path, "--seeds", "11-12")
    folders = [tmp_path / f"xpe-two-s{n}" for n in (11, 12)]
    with monkeypatch.context() as patch:
        at_step(patch, {6: signal.SIGINT})
        assert train.main(args) == 130
    next(folders[1].glob("checkpoint-*")).unlink()          # as if the first save had been killed half-way
    assert train.main([*args, "--resume", "--set", "train.rate=2.0e-2"]) == 0
    for folder in folders:
        assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["rate"] == 2.0e-2
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6


def test_resume_refuses_other_data(world, tmp_path, monkeypatch):
    """Catches a run that goes on with sentences other than those it began with."""
    shutil.copytree(world / "data", tmp_path / "data")
    args = command(world, tmp_path / "runs", "--seeds", "11", "--data", tmp_path / "data")
    at_step(monkeypatch, {6: signal.SIGINT})
    assert train.main(args) == 130
    file = tmp_path / "data/aaa_Latn/train.tsv"
    file.write_text(file.read_text().replace("sun", "song", 1))
    with pytest.raises(ValueError, match=r"checkpoint-6.pt: .*\bdata\b.*same settings only"):
        train.main([*args, "--resume"])


def test_the_command_that_goes_on_can_be_pasted(world, tmp_path, monkeypatch, capsys):
    """Catches a printed command that a shell takes apart at a blank in a folder's name."""
    import shlex
    args = command(world, tmp_path / "my runs", "--seeds", "11")
    at_step(monkeypatch, {2: signal.SIGINT})
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    assert train.main(args) == 130
    line = capsys.readouterr().out.splitlines()[-1].partition("go on with: ")[2]
    assert shlex.split(line) == ["python", "train.py", *args, "--resume"]


def test_the_same_command_twice_gives_the_same_bits(world, tmp_path):
    """Catches anything that comes from the clock, the order of a set, or a generator nobody seeded."""
    for out in "ab":
        torch.rand(3), random.random()
        train.main(command(world, tmp_path / out, "--mode", "dual", "--set", "train.amp=bf16"))
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


# ---- 3. numbers that go bad --------------------------------------------------------------------------------

def spoil(monkeypatch, learner, when, value=float("nan")):
    """Make one learner's loss `value` at the forward passes for which when(count) holds, counted from 1."""
    real, count = train.F.cross_entropy, [0]

    def cross_entropy(logits, labels, reduction="mean", **more):
        loss = real(logits, labels, reduction=reduction, **more)
        if reduction == "none":
            count[0] += 1
            if when(count[0]):
                n = len(labels) // 3
                bad = torch.ones_like(loss)
                bad[learner * n:(learner + 1) * n] = value
                loss = loss * bad
        return loss
    import types
    both = types.SimpleNamespace(cross_entropy=cross_entropy, dropout=train.F.dropout)
    monkeypatch.setattr(train, "F", both)


@pytest.mark.parametrize("step, kept", [(10, 8), (2, 0)])
def test_a_learner_whose_loss_is_not_a_number_stops_alone(step, kept, world, tmp_path, monkeypatch, capsys):
    """Catches a NaN that reaches other learners, overwrites the best state, or ends without a word."""
    with monkeypatch.context() as patch:        # the same learner leaves at the same time, for another reason
        real = train.Learner.judge

        def judge(self, at, *more):
            better = real(self, at, *more)
            if self.seed == 12 and at >= step:
                self.state["stopped"] = "asked to"
            return better
        patch.setattr(train.Learner, "judge", judge)
        assert train.main(command(world, tmp_path / "calm")) == 0
    spoil(monkeypatch, 1, lambda n: n == step)
    capsys.readouterr()
    assert train.main(command(world, tmp_path / "bad")) == 2
    line = next(x for x in capsys.readouterr().err.splitlines() if "diverged" in x)
    assert f"not finite at step {step}, seed 12, aaa_Latn, bbb_Latn" in line and "xpe-two-s12" in line
    for seed in (11, 13):
        name = f"xpe-two-s{seed}/prompt.safetensors"
        assert (tmp_path / "bad" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    folder = tmp_path / "bad/xpe-two-s12"
    if kept:
        meta = xpe.load_prompt(folder)[2]
        steps = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert meta["training"]["best_step"] <= kept and steps[-1]["step"] == kept
        assert meta["training"]["dev_accuracy"] == pytest.approx(max(x["dev_accuracy"] for x in steps),
                                                                 abs=1e-4)
    else:
        assert not (folder / "prompt.json").exists() and "nothing good to keep" in line
    assert train.main(command(world, tmp_path / "bad", "--resume")) == 2    # and it stays a failure


def test_a_learner_lost_early_does_not_cost_the_others_their_work(world, tmp_path, monkeypatch):
    """Catches a resume that starts all learners over because one that diverged has no later checkpoint."""
    spoil(monkeypatch, 1, lambda n: n == 2)
    assert train.main(command(world, tmp_path / "once")) == 2
    monkeypatch.undo()
    spoil(monkeypatch, 1, lambda n: n == 2)
    at_step(monkeypatch, {14: signal.SIGINT})
    assert train.main(command(world, tmp_path / "often")) == 130
    monkeypatch.undo()
    seen = []
    real = train.Optimizer.step
    monkeypatch.setattr(train.Optimizer, "step", lambda self, n, f: (seen.append(n), real(self, n, f)))
    assert train.main(command(world, tmp_path / "often", "--resume")) == 2
    assert seen[0] == 15
    assert bits(tmp_path / "often") == bits(tmp_path / "once")


def test_fp16_overflow_halves_the_scale_and_stops_nobody(world, tmp_path, monkeypatch):
    """Catches a learner thrown out for a gradient that overflowed, and a scale that never comes down."""
    scales, real = [], train.Optimizer.step
    monkeypatch.setattr(train.Optimizer, "step", lambda self, n, f: (real(self, n, f), scales.append(
        (self.scale.tolist(), self.steps.tolist()))))
    spoil(monkeypatch, 1, lambda n: n in (1, 2, 5), value=1e30)
    assert train.main(command(world, tmp_path, "--set", "train.amp=fp16", "--steps", "8")) == 0
    last, steps = scales[-1]
    assert last[1] == 2.0 ** 13 and steps[1] == 5 and last[0] == last[2] == 2.0 ** 16 and steps[0] == 8
    for path in tmp_path.glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=lambda c: pytest.fail(f"{path}: {c} is not JSON"))


@pytest.mark.parametrize("split, content, error", [
    ("dev", None, r"bbb_Latn/dev.tsv: no such split; bbb_Latn has test.tsv, train.tsv"),
    ("dev", "index_id\tcategory\ttext\n", r"bbb_Latn/dev.tsv: no sentence in this split"),
    ("dev", "", r"bbb_Latn/dev.tsv:0: the header must name"),
    ("train", None, r"bbb_Latn/train.tsv: no such split")])
def test_a_split_that_is_missing_or_empty_is_told_before_anything_is_written(split, content, error, world,
                                                                             tmp_path):
    """Catches a run that trains for hours and then has nothing to choose the best step by."""
    shutil.copytree(world / "data", tmp_path / "data")
    file = tmp_path / f"data/bbb_Latn/{split}.tsv"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        train.main(command(world, tmp_path / "runs", "--data", tmp_path / "data"))
    assert not (tmp_path / "runs").exists()


# ---- real processes: one interpreter that has imported everything, and forks a child for each job ----------

FORGE = """
import json, os, resource, sys, traceback
sys.path.insert(0, {here!r})
import huggingface_hub, train, evaluate, data
import transformers.models.xlm_roberta.modeling_xlm_roberta, safetensors.torch
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        os.chdir(os.path.dirname(job["log"]))
        sys.argv = ["train.py", *job["argv"]]
        code = 99
        try:
            exec(job["before"])
            data.run_main(train.main)
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print("pid", pid, flush=True)
    print("end", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forge:
    """Runs train.py in processes that start in milliseconds. Environment: no CUDA, no network, one thread."""

    def __init__(self, folder, **env):
        self.folder, self.n, self.running = folder, 0, False
        env = {**os.environ, "OMP_NUM_THREADS": "1",
               "HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": "",
               "PYTHONDONTWRITEBYTECODE": "1",
               "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", **env}
        self.process = subprocess.Popen([sys.executable, "-c", FORGE.format(here=str(HERE))],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
                                        cwd=folder)

    def start(self, argv=(), before=""):
        """-> pid of a child that runs `before`, then train.py."""
        if self.running:        # of a test that failed before its end: only that one shall
            self.end()
        self.n, self.running = self.n + 1, True
        self.log = self.folder / f"job{self.n}.log"
        job = {"argv": list(map(str, argv)), "before": before, "log": str(self.log)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline().split()[1])

    def end(self):
        """-> (exit status, what it printed)."""
        self.running = False
        return int(self.process.stdout.readline().split()[1]), self.log.read_text("utf-8", "replace")

    def run(self, argv=(), before=""):
        """Start and wait -> (exit status, what it printed)."""
        self.start(argv, before)
        return self.end()


@pytest.fixture(scope="module")
def forge(tmp_path_factory, hub):
    """A Forge whose hub is the stand-in below."""
    forge = Forge(tmp_path_factory.mktemp("forge"), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    yield forge
    forge.process.stdin.close()
    forge.process.wait(20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_tells_how_to_go_on(number, world, tmp_path, forge):
    """Catches a Ctrl-C that ends in a traceback, loses the step or exits as if all were well."""
    args = command(world, tmp_path / "runs", "--steps", "100000", "--seeds", "11-12")
    pid = forge.start(args)
    folder = tmp_path / "runs/xpe-two-s12"
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(pid, number)
    code, log = forge.end()
    assert code == 130 and "Traceback" not in log
    assert log.splitlines()[-1] == f"interrupted; go on with: python train.py {' '.join(args)} --resume"
    assert [f.name for f in folder.glob("checkpoint-*")] == [f.name for f in (
        tmp_path / "runs/xpe-two-s11").glob("checkpoint-*")] and len(list(folder.glob("checkpoint-*"))) == 1


def test_ctrl_c_outside_the_loop_is_no_traceback(world, tmp_path, forge):
    """Catches a page of traceback for a Ctrl-C while the data or the backbone is on its way."""
    pid = forge.start(command(world, tmp_path / "runs"),
                      "import time\n"
                      "train.load_backbone = lambda *a: (print('loading', flush=True), time.sleep(60))")
    while not (forge.log.exists() and "loading" in forge.log.read_text()):
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    code, log = forge.end()
    assert code == 130 and log.splitlines() == ["loading", "interrupted"]


# ---- 2. kills ----------------------------------------------------------------------------------------------

def test_kills_at_random_moments_and_resume_end_with_the_same_bits(world, tmp_path, forge):
    """Catches whatever a real SIGKILL can tear: a half-written file, a rename that came too early, debris."""
    kills = int(os.environ.get("XPE_KILLS", 6))
    args = ["--steps", str(12 * kills), "--mode", "dual", "--set", "train.checkpoint_every=1", "--set",
            "train.evaluate_every=3", "--set", "train.patience=3", "--set", "train.patience_after=0.9"]
    assert forge.run(command(world, tmp_path / "once", *args))[0] == 0
    draw, done, tries = random.Random(kills), 0, 0

    def progress():
        """Evaluations that all seeds together have written down."""
        return sum(f.read_bytes().count(b"\n") for f in (tmp_path / "often").glob("*/metrics.jsonl")) // 3
    code = -9
    while code:
        tries += 1
        pid = forge.start(command(world, tmp_path / "often", *args, *(["--resume"] if tries > 1 else [])))
        if done < kills:        # a few evaluations later than it was, and at any moment of what follows
            goal = progress() + draw.randrange(4)
            with contextlib.suppress(ProcessLookupError):       # it was quicker
                while progress() < goal or not progress():
                    os.kill(pid, 0)
                    time.sleep(0.001)
                time.sleep(draw.random() * 0.03)
                os.kill(pid, signal.SIGKILL)
        code, log = forge.end()
        assert code in (0, -9), log
        done += code == -9
        assert tries < 4 * kills + 4
    print(f"{done} kills in {tries} attempts")
    assert done >= min(kills, 3) and bits(tmp_path / "often") == bits(tmp_path / "once")


# ---- 4. hostile files --------------------------------------------------------------------------------------
# Everything below FUZZ runs in a forked child with a limit on its memory: `fuzz` is called there by name.

ODD = (None, True, False, 0, -1, 1, 7, 2 ** 31, 2 ** 63, 10 ** 30, 10 ** 5000, 0.0, -0.5, 1e308, 5e-324,
       float("nan"), float("inf"), "", "0", "x", "nan", "None", "main", "xpe", "../../etc/passwd",
       "/etc/passwd", "C:\\\\con", "\0", "\n", "\ud800", "\u202e\u0644", "\U0001f600" * 3, "x" * 70000, "*a",
       "!!python/name:os.system", [], {}, [[]],
       {"": ""}, {"x": {}}, [None], ["a", "a"], list(range(50)), [0, 1] * 4)


def mutate_bytes(raw, draw):
    """Flip, cut, double, splice, insert."""
    raw = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        i, j = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
        way = draw.randrange(7)
        if way == 0 and raw:
            raw[min(i, len(raw) - 1)] ^= 1 << draw.randrange(8)
        elif way == 1:
            del raw[i:]
        elif way == 2:
            raw[j:j] = raw[i:j]
        elif way == 3:
            del raw[i:j]
        elif way == 4:
            raw[i:i] = draw.choice((b"\0", b'"', b"\t", b"\r", b"\n", b"\xff", b"\xef\xbb\xbf", b"[" * 3000,
                                    b"{a: " * 2000, b"9" * 5000, b"- " * 500, b"&a [*a]", b"<<: ",
                                    b"!!int ''", b"!!float ''", b"!!bool x", b"!!timestamp x", b"? [a]: ",
                                    b"1:" * 50 + b"1", b"!!python/none", b"%YAML 9\n---\n",
                                    b"\xe2\x80\xa8", b"\xed\xa0\x80", b"0x_", b"1e999", b"9.9e+400"))
        elif way == 5:
            raw[i:i + 8] = bytes(draw.randrange(256) for _ in range(8))
        else:
            raw[i:i + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, b"\xff" * 4 + b"\x7f" * 4))
    return bytes(raw)


def mutate_tree(tree, draw):
    """Exchange, drop, add or nest something, somewhere in dicts, lists and tensors."""
    spots, stack = [], [tree]
    while stack:
        node = stack.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                stack.append(node[key])
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        node, key = draw.choice(spots)
        way = draw.randrange(8)
        try:
            if way < 4:
                node[key] = draw.choice(ODD)
            elif way == 4:
                del node[key]
            elif way == 5 and isinstance(node, dict):
                odd = draw.choice(ODD)
                node[odd if isinstance(odd, (str, int)) else "new"] = node[key]
            elif way == 6:
                node[key] = draw.choice(spots)[0]
                node[key] = json.loads(json.dumps(node[key])) if draw.random() < .5 else str(node[key])[:200]
            else:
                deep = node[key]
                for _ in range(draw.choice((2, 30, 2000))):
                    deep = [deep]
                node[key] = deep
        except (KeyError, IndexError, TypeError, ValueError, RecursionError):
            pass                # gone already, or not to be written as JSON: the others stand
    return tree


def dump_json(tree):
    """JSON with Infinity, lone surrogates and any depth; None where even that cannot be written."""
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError, TypeError):
        return None


def mutate_header(raw, draw):
    """A safetensors file whose header lies."""
    n = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + n]), raw[8 + n:]
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice([k for k in header if k != "__metadata__"])
        entry, way = header[name], draw.randrange(6)
        if not isinstance(entry, dict):
            continue
        if way == 0:
            entry["dtype"] = draw.choice(("F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3",
                                          "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "U64", "F32 ", ""))
        elif way == 1:      # no element, and so no byte, but a huge size: what is made from the shape?
            entry.update(shape=draw.choice(([10 ** 12, 0], [0], [0, 10 ** 9], [2 ** 40, 0, 2 ** 20])),
                         data_offsets=[0, 0])
        elif way == 2:
            entry["shape"] = draw.choice(([], [32], [1, 32], [32, 32, 1], [-1], [2 ** 62, 4], [8, 4]))
        elif way == 3:
            header[draw.choice(("prompt.linears.99999999999.x", "linears." + "9" * 5000 + ".", "__metadata__",
                                "", f"{name}x", "head.out.weight"))] = header.pop(name)
        elif way == 4 and len(body) >= 4:
            i = draw.randrange(len(body) // 4) * 4
            body = body[:i] + draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f",
                                           b"\xff\xff\xff\xff")) + body[i + 4:]
        else:
            mutate_tree(header, draw)
    head = dump_json(header)
    return None if head is None else len(head).to_bytes(8, "little") + head + body


def write_authors(folder, prompt):
    """A folder as the authors' toolkit writes it, from a prompt folder of ours (XPE with an MLP)."""
    from safetensors.torch import load_file, save_file
    theirs = {}
    for name, tensor in load_file(prompt / "prompt.safetensors").items():
        name = name.replace("prompt.encoded", "prompt_encoder.xpe_embedding.weight")
        name = name.replace("head.dense", "base_model.classifier.dense").replace(
            "head.out", "base_model.classifier.out_proj")
        for i in range(3):
            name = name.replace(f"prompt.encoder.linears.{i}", f"prompt_encoder.xpe_head.{3 * i}")
        theirs[name] = tensor
    folder.mkdir()
    save_file(theirs, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(dict(
        peft_type="XPE", encoder_ratio=1.0, token_dim=32, num_virtual_tokens=4,
        encoder_reparameterization_type="MLP", encoder_hidden_size=8, encoder_num_layers=2,
        encoder_dropout=0.1, encoder_num_heads=8, base_model_name_or_path="FacebookAI/xlm-roberta-large")))


def fuzz_kinds(material, folder):
    """{kind: (seed bytes, file, function that reads it, ways to mutate)}: the files that we read, and how."""
    import copy
    import functools
    import io
    base = evaluate.read_yaml
    cached = functools.lru_cache(None)(lambda path: base(path))
    evaluate.read_yaml = lambda path: (copy.deepcopy(cached(path)) if Path(path) == HERE / "config.yaml"
                                       else base(path))
    shutil.copytree(material / "prompt", folder / "prompt"), shutil.copytree(
        material / "authors", folder / "authors")
    learner = train.Learner(folder / "prompt", 11, None, {"training": {"settings": torch.load(
        material / "prompt/checkpoint-4.pt", weights_only=True)["settings"]}})
    meta = xpe.read_json(material / "prompt/prompt.json")
    model = torch.nn.Module()
    model.prompt, model.head = xpe.SoftPrompt(**meta["prompt"]), xpe.ClassificationHead(**meta["head"])

    def config():
        loaded = evaluate.load_config(folder / "config.yaml")
        for group in loaded["groups"]:
            evaluate.resolve_group(loaded, group)

    def checkpoint():
        settings = learner.meta["training"]["settings"]
        optimizer = train.Optimizer(train.parameter_groups(model, settings), 1, settings["optimizer"], 1.0,
                                    False)
        train.load_checkpoints([learner], 4, model, optimizer, [torch.Generator()])
        state, fresh = learner.state, train.Learner(folder, 1, None, {}).state
        assert {k: type(v) for k, v in state.items()} == {
            k: type(v) for k, v in fresh.items()}, "took a wrong state"
        assert learner.tensors is None or train.snapshot(model, 0).keys() == learner.tensors.keys()
        assert (folder / "prompt/metrics.jsonl").stat().st_size < 1 << 20, "metrics.jsonl was blown up"

    def tree(read, write):
        def way(raw, draw):
            try:
                return write(mutate_tree(read(raw), draw))
            except (ValueError, RecursionError, OverflowError, yaml.YAMLError):
                return None
        return way

    def pickled(state):
        out = io.BytesIO()
        torch.save(state, out)
        return out.getvalue()
    as_json, as_yaml = tree(json.loads, dump_json), tree(
        yaml.safe_load, lambda t: yaml.safe_dump(t, allow_unicode=True).encode("utf-8", "surrogatepass"))
    as_state = tree(lambda raw: torch.load(io.BytesIO(raw), weights_only=True), pickled)
    prompt, authors = folder / "prompt", folder / "authors"
    jobs = {"tsv": (folder / "train.tsv", lambda: data.read_tsv(folder / "train.tsv"), ()),
            "config.yaml": (folder / "config.yaml", config, (as_yaml,)),
            "prompt.json": (prompt / "prompt.json", lambda: xpe.load_prompt(prompt), (as_json,)),
            "prompt.safetensors": (prompt / "prompt.safetensors", lambda: xpe.load_prompt(prompt),
                                   (mutate_header,)),
            "adapter_config.json": (authors / "adapter_config.json", lambda: xpe.load_prompt(authors),
                                    (as_json,)),
            "adapter_model.safetensors": (authors / "adapter_model.safetensors",
                                          lambda: xpe.load_prompt(authors), (mutate_header,)),
            "checkpoint": (prompt / "checkpoint-4.pt", checkpoint, (as_state,))}
    raws = {"tsv": material / "train.tsv", "config.yaml": material / "config.yaml"}
    return {kind: ((raws.get(kind) or material / path.relative_to(folder)).read_bytes(), path, read, ways)
            for kind, (path, read, ways) in jobs.items()}


class TooSlow(BaseException):
    """More than its time for one file."""


def fuzz(material, folder, kind, count, seed, result):
    """Read `count` hostile files of one kind -> JSON at `result`: accepted, refused, and what was neither."""
    import re
    import resource
    import warnings
    warnings.simplefilter("ignore")
    material, folder, draw = Path(material), Path(folder), random.Random(f"{kind} {seed}")
    folder.mkdir(parents=True)
    raw, path, read, ways = fuzz_kinds(material, folder)[kind]
    path.write_bytes(raw)
    read()              # untouched it is fine, and everything is imported
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + (768 << 20),) * 2)
    said = {"accepted": 0, "refused": 0, "slowest": 0.0, "wrong": {}}

    def alarm(*_):
        raise TooSlow
    signal.signal(signal.SIGALRM, alarm)
    for n in range(count):
        way = draw.choice((mutate_bytes, *ways))
        content = way(raw, draw)
        if content is None:
            content = mutate_bytes(raw, draw)
        path.write_bytes(content)
        peak, start, wrong = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time(), None
        signal.setitimer(signal.ITIMER_REAL, 10)
        try:
            read()
            said["accepted"] += 1
        except (ValueError, OSError) as e:
            line = " ".join(str(e).split())[:1000]      # as data.run_main prints it
            said["refused"] += 1
            if not (path.name in line or str(path.parent) in line or line.startswith("groups.")):
                wrong = f"message without the file: {type(e).__name__}: {line[:200]}"
            elif "memory" in line.lower():
                wrong = f"memory: {line[:200]}"
        except BaseException as e:
            import traceback
            at = traceback.extract_tb(e.__traceback__)
            ours = [f for f in at if f.filename.startswith(str(HERE)) and "robust" not in f.filename] or at
            wrong = f"{type(e).__name__}: {str(e)[:200]} ({Path(ours[-1].filename).name}:{ours[-1].name})"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10
        said["slowest"] = max(said["slowest"], time.time() - start)
        if not wrong and grown > 100 + (20 * len(content) >> 20):
            wrong = f"took {grown} MB for a file of {len(content)} bytes"
        if wrong:
            group = re.sub(r"[0-9]+|'[^']*'", "#", wrong)[:90]
            entry = said["wrong"].setdefault(group, [0, wrong])
            entry[0] += 1
            if entry[0] == 1:
                Path(f"{result}.{len(said['wrong'])}.bin").write_bytes(content)
    Path(result).write_text(json.dumps(said, indent=1))


@pytest.fixture(scope="module")
def material(world, tmp_path_factory):
    """One good file of every kind that we read."""
    root = tmp_path_factory.mktemp("material")
    patch = pytest.MonkeyPatch()
    at_step(patch, {5: Killed()})
    args = command(world, root / "runs", "--seeds", "11", "--steps", "8")
    with pytest.raises(Killed):
        train.main(args)
    patch.undo()
    shutil.copytree(root / "runs/xpe-two-s11", root / "kept")
    train.main([*args, "--resume"])
    shutil.copytree(root / "runs/xpe-two-s11", root / "prompt")
    shutil.copy(root / "kept/checkpoint-4.pt", root / "prompt")
    write_authors(root / "authors", root / "prompt")
    (root / "config.yaml").write_text(CONFIG)
    (root / "train.tsv").write_text("index_id\tcategory\ttext\n1\ttravel\tA road.\n"
                                    "2\tsports\t\"He said \"\"goal\"\"\"\n"
                                    "3\thealth\t\u00e9t\u00e9 \u4f60\u597d\n", "utf-8")
    return root


FUZZ = {"tsv": 1500, "config.yaml": 200, "prompt.json": 500, "prompt.safetensors": 500,
        "adapter_config.json": 500, "adapter_model.safetensors": 500, "checkpoint": 400}


@pytest.mark.parametrize("kind", FUZZ)
def test_a_hostile_file_is_read_or_refused_in_one_line(kind, material, forge, tmp_path):
    """Catches a file that ends in a traceback, a hang, a huge allocation or a message that names no file."""
    count = int(os.environ.get("XPE_FUZZ", 0)) * FUZZ[kind] // sum(FUZZ.values()) or FUZZ[kind]
    call = f"import sys; import {Path(__file__).stem} as t; " \
           f"t.fuzz({str(material)!r}, {str(tmp_path / 'f')!r}, {kind!r}, " \
           f"{count}, 1, {str(tmp_path / 'said.json')!r}); sys.exit(0)"
    code, log = forge.run(before=call)
    assert code == 0, log
    said = json.loads((tmp_path / "said.json").read_text())
    print(f"{kind}: {count:,} files, accepted {said['accepted']:,}, refused {said['refused']:,}, "
          f"slowest {said['slowest']:.2f} s, wrong {said['wrong']}")
    assert not said["wrong"] and said["accepted"] and said["refused"]


@pytest.mark.parametrize("kind, content, error", [
    ("config.yaml", "train: {steps: !!int ''}", "not readable as YAML"),
    ("config.yaml", "train: {steps: !!float ''}", "not readable as YAML"),
    ("config.yaml", "train: {steps: !!bool maybe}", "not readable as YAML"),
    ("config.yaml", "train: {steps: !!timestamp soon}", "not readable as YAML"),
    ("config.yaml", f"train: {{rate: 9{':59' * 200}.5}}", "not readable as YAML|train.rate"),
    ("config.yaml", f"train: {{steps: 0x{'f' * 9000}}}", "config.yaml"),
    ("config.yaml", f"0x{'f' * 9000}: 1", "config.yaml"),
    ("config.yaml", "groups: {a0: [x], " + ", ".join(f"a{i + 1}: [a{i}, a{i}]" for i in range(60)) + "}",
     "groups.[ax]"),
    ("config.yaml", "groups: {" + ", ".join(f"a{i}: [a{i + 1}]" for i in range(2000)) + "}", "groups.a"),
    ("config.yaml", "train: {steps: !!python/object/apply:os.system ['touch marker']}",
     "could not determine a constructor"),
    ("config.yaml", "a: &a [1]\nb: *a", "aliases"),
    ("config.yaml", "[" * 100000, "not readable as YAML"),
    ("config.yaml", "x" * (1 << 20) + "y", "larger than"),
    ("config.yaml", "{a: " * 50000, "not readable as YAML"),
    ("prompt.json", "[" * 100000, "not readable as JSON"), ("prompt.json", "[]", "no JSON object"),
    ("prompt.json", '{"format": 1' + " " * (4 << 20) + "}", "larger than 4 MB")])
def test_a_file_that_was_made_to_hurt_is_refused(kind, content, error, tmp_path):
    """Catches what chance misses: PyYAML's own exceptions, numbers too long to print, groups that double."""
    file = tmp_path / kind
    file.write_text(content)
    start = time.time()
    with pytest.raises(ValueError, match=error) as refused:
        if kind == "prompt.json":
            xpe.load_prompt(tmp_path)
        else:
            config = evaluate.load_config(file)
            for group in config["groups"]:
                evaluate.resolve_group(config, group)
    assert time.time() - start < 20
    assert kind in str(refused.value) or str(refused.value).startswith("groups.")


@pytest.mark.parametrize("change, error", [
    (dict(encoder_reparameterization_type=["MLP"]), "adapter_config.json"),
    (dict(encoder_ratio="1"), "adapter_config.json"),
    (dict(token_dim=10 ** 9), "adapter_config.json"),
    (dict(encoder_num_layers=10 ** 9), "adapter_config.json"),
    ("huge", "adapter_config.json|adapter_model"), ("index", "adapter_config.json|adapter_model")])
def test_a_released_prompt_that_was_made_to_hurt_is_refused(change, error, material, tmp_path):
    """Catches a list of 10^12 labels from a tensor without a byte, and a type that cannot be looked up."""
    from safetensors.torch import load_file, save_file
    folder = tmp_path / "authors"
    shutil.copytree(material / "authors", folder)
    if isinstance(change, dict):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
    else:
        tensors = load_file(folder / "adapter_model.safetensors")
        if change == "huge":
            tensors["base_model.classifier.out_proj.weight"] = torch.empty(10 ** 12, 0)
        else:
            tensors["prompt_encoder.linears." + "9" * 5000 + ".weight"] = torch.zeros(1)
        save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=error):
        xpe.load_prompt(folder)


def test_an_error_of_any_length_is_one_readable_line(forge, tmp_path):
    """Catches a terminal that a file floods with its own content."""
    (tmp_path / "long.yaml").write_text("train: {" + "x" * 90000 + ": 1}")
    code, log = forge.run(["--sources", tmp_path / "long.yaml", "--mode", "xpe"])
    assert code == 2 and log.startswith("error: ") and len(log) < 1200 and log.count("\n") == 1


# ---- 5. code in files --------------------------------------------------------------------------------------

class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_is_refused_wherever_it_stands_and_never_run(wrapped, material, world, tmp_path):
    """Catches any reader that unpickles: whoever shares a prompt would run code on the reader's machine."""
    import pickle
    marker, bomb = tmp_path / "marker", tmp_path / "bomb"
    if wrapped:
        torch.save(Payload(marker), bomb)
    else:
        bomb.write_bytes(pickle.dumps(Payload(marker)))
    copies = [tmp_path / n for n in ("run", "authors", "data", "full")]
    shutil.copytree(material / "prompt", copies[0]), shutil.copytree(material / "authors", copies[1])
    shutil.copytree(world / "data", copies[2]), shutil.copytree(material / "prompt", copies[3])
    run, authors, corpus, _ = copies
    read = {run / "prompt.json": lambda: xpe.load_prompt(run),
            run / "prompt.safetensors": lambda: xpe.load_prompt(run),
            run / "config.yaml": lambda: evaluate.Run(run),
            authors / "adapter_config.json": lambda: xpe.load_prompt(authors),
            authors / "adapter_model.safetensors": lambda: xpe.load_prompt(authors),
            run / "backbone.safetensors": lambda: xpe.read_tensors(run / "backbone.safetensors"),
            corpus / "aaa_Latn/train.tsv": lambda: data.Corpus(corpus).read("aaa_Latn", "train"),
            corpus / "labels.txt": lambda: data.Corpus(corpus)}
    for path, reader in read.items():
        good = path.read_bytes() if path.exists() else None
        shutil.copy(bomb, path)
        with pytest.raises((ValueError, OSError), match=path.name):
            reader()
        path.unlink() if good is None else path.write_bytes(good)
    args = command(world, tmp_path / "runs", "--seeds", "11")
    folder = tmp_path / "runs/xpe-two-s11"
    folder.mkdir(parents=True)
    shutil.copy(bomb, folder / "checkpoint-5.pt")
    with pytest.raises(ValueError, match="checkpoint-5.pt: no checkpoint of this"):
        train.main([*args, "--resume"])
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()          # so the payload would have worked


def test_code_that_comes_with_a_backbone_is_not_run(world, material, tmp_path, forge):
    """Catches trust given by default, or by the config.yaml of a run that someone else wrote."""
    evil = tmp_path / "evil"
    shutil.copytree(world / "backbone", evil)
    marker, config = tmp_path / "marker", json.loads((evil / "config.json").read_text())
    config |= {"model_type": "evil",
               "auto_map": {"AutoConfig": "code.EvilConfig", "AutoModel": "code.EvilModel"}}
    config.pop("architectures", None)
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "code.py").write_text(f"""
from pathlib import Path
from transformers import XLMRobertaConfig, XLMRobertaModel
Path({str(marker)!r}).touch()
class EvilConfig(XLMRobertaConfig):
    model_type = "evil"
class EvilModel(XLMRobertaModel):
    config_class = EvilConfig
""")
    shutil.copytree(material / "prompt", tmp_path / "run")
    meta = json.loads((tmp_path / "run/prompt.json").read_text())
    (tmp_path / "run/prompt.json").write_text(json.dumps(
        meta | {"backbone": meta["backbone"] | {"name": str(evil)}}))
    own = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    own["backbone"]["trust_remote_code"] = True
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(own))
    code, log = forge.run(command(world, tmp_path / "runs", "--backbone", evil))
    assert code == 2 and log.startswith("error: ") and log.count("\n") == 1, log
    assert "backbone.trust_remote_code=true" in log, log
    assert not (tmp_path / "runs").exists() and not marker.exists()
    code, log = forge.run(before=f"sys.argv = ['evaluate.py', {str(tmp_path / 'run')!r}, '--text', 'road']\n"
                                 "data.run_main(evaluate.main)")
    assert not marker.exists(), "a run's own config.yaml made us run its code"
    assert code == 2 and "Traceback" not in log, log
    code, log = forge.run(command(world, tmp_path / "runs", "--backbone", evil, "--steps", "2",
                                  "--seeds", "11", "--set", "backbone.trust_remote_code=true"))
    assert code == 0 and marker.exists(), log       # and whoever says so gets it


# ---- 6. the hub --------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_hub(root):
    """A server that answers as huggingface.co does, or as it should not: the owner's name says how.

    ok, slow; drop: each file breaks off half-way once; busy: each path answers 429 once; short, altered: the
    content is cut, or changed at equal size (altered-once: only at first); locked 401 gated, denied 403,
    gone 404, broken 500; partly: files of the third language are never served; dead: a connection that ends;
    old: a backbone without safetensors; silent: nothing is answered, mute: only the list of files is not,
    stall: files stop half-way for good.
    """
    import hashlib
    import http.server
    import io
    import threading
    import urllib.parse

    import safetensors.torch
    weights = io.BytesIO()
    torch.save(safetensors.torch.load_file(root / "backbone" / "model.safetensors"), weights)

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, content=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(headers.pop("length", len(content))))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
            self.server.seen.append(path)
            parts = path.split("/")
            api, parts = parts[0] == "api", parts[parts[0] == "api":]
            kind = "data" if parts[0] == "datasets" else "backbone"
            parts = parts[parts[0] in ("datasets", "models"):]
            how, name, rest = parts[0], "/".join(parts[:2]), parts[2:]
            first = (self.command, path) not in self.server.count
            self.server.count.add((self.command, path))
            refuse = {"locked": (401, "GatedRepo"), "denied": (403, "GatedRepo"),
                      "gone": (404, "RepoNotFound"), "broken": (500, "")}
            if how == "dead":
                return self.close()
            if self.server.silent or how == "silent" or (how == "mute" and api and rest[:1] == ["tree"]):
                return self.hold()
            if how in refuse:
                return self.answer(refuse[how][0], b"{}", X_Error_Code=refuse[how][1],
                                   X_Error_Message=f"{how} by the test")
            if how == "busy" and first:
                return self.answer(429, b"too many requests")
            if how == "slow":
                time.sleep(0.15)
            folder = root / kind
            files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
            if how == "old" and kind == "backbone":
                del files["model.safetensors"]
                files["pytorch_model.bin"] = weights.getvalue()
            if kind == "data":
                files = {f"data/{n}": c for n, c in files.items()}
            oid = {n: hashlib.sha1(b"blob %d\0" % len(c) + c).hexdigest() for n, c in files.items()}
            if api and rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": n, "size": len(c), "oid": oid[n]} for n, c in files.items()]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if api:
                info = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                        "tags": [], "siblings": [{"rfilename": n} for n in files]}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            file = "/".join(rest[2:])
            if rest[:1] != ["resolve"] or file not in files:
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            content, head = files[file], {"ETag": f'"{oid[file]}"', "X_Repo_Commit": COMMIT,
                                          "Accept_Ranges": "bytes"}
            if self.command == "GET":
                if how == "partly" and "ccc_Latn" in file:
                    return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                if how == "altered" or (how == "altered-once" and first):
                    content = content.replace(b"road", b"goal").replace(b"travel", b"health")
                if how == "short":
                    content = content[:len(content) // 2]
                start = self.headers.get("Range")
                if start:
                    start = int(start.partition("=")[2].partition("-")[0])
                    return self.answer(206, content[start:], **head,
                                       Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
                if how == "stall" or (how == "drop" and first):
                    self.answer(200, content[:len(content) // 2], length=len(content), **head)
                    return self.hold() if how == "stall" else self.close()
            self.answer(200, content, **head)

        def hold(self):
            time.sleep(30)      # whoever waits that long is told otherwise
            with contextlib.suppress(OSError):
                self.close()

        def close(self):
            import socket
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads, server.silent, server.seen, server.count = True, False, [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def hub(world):
    """The stand-in for huggingface.co, with the dataset of this world and its backbone."""
    server = make_hub(world)
    yield server
    server.shutdown()


QUICK = """
import time, huggingface_hub.constants
slept = []
time.sleep = slept.append
import atexit
huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT = 2
data.HUB_TIMEOUT = 0.5
"""


def from_hub(world, out, data, backbone, *more):
    """Arguments of train.py with hub names."""
    return command(world, out, "--data", f"{data}/sib", "--backbone", f"{backbone}/tiny", "--steps", "4",
                   "--seeds", "11", "--set", "train.evaluate_every=2", *more)


def one_line(code, log, *words):
    """Status 2 and one line of error that holds the words, whatever the hub's client printed before it."""
    lines = [x for x in log.splitlines() if x.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and log.splitlines()[-1] == lines[0] and "Traceback" not in log, log
    assert all(w in lines[0] for w in words), lines[0]


@pytest.mark.parametrize("how", ["ok", "slow", "drop", "busy", "altered-once", "old"])
def test_a_run_from_the_hub_is_the_run_from_disk(how, world, tmp_path, forge, hub):
    """Catches a wrong download, passing trouble that ends a run, and files fetched one by one."""
    local = command(world, tmp_path / "disk", "--steps", "4", "--seeds", "11",
                    "--set", "train.evaluate_every=2")
    assert train.main(local) == 0
    hub.seen.clear()
    code, log = forge.run(from_hub(world, tmp_path / "hub", how, how), QUICK)
    assert code == 0, log
    a, b = (tmp_path / n / "xpe-two-s11" for n in ("disk", "hub"))
    ours, theirs = (xpe.read_tensors(f / "prompt.safetensors") for f in (a, b))
    assert ours.keys() == theirs.keys()
    for name in ours:           # weights from a .bin lie otherwise in memory, which may change the last bit
        assert (ours[name] - theirs[name]).abs().max() <= (1e-5 if how == "old" else 0)
    assert how == "old" or (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    meta = json.loads((b / "prompt.json").read_text())
    assert meta["backbone"]["revision"] == meta["data"]["revision"] == COMMIT
    if how == "ok":
        assert len([x for x in hub.seen if x.startswith("api/datasets")]) <= 3
        code, log = forge.run(from_hub(world, tmp_path / "warm", how, how),
                              "import huggingface_hub.constants as c\nc.HF_HUB_OFFLINE = True")
        assert code == 0, log
        assert (tmp_path / "warm/xpe-two-s11/prompt.safetensors").read_bytes() == (
            a / "prompt.safetensors").read_bytes()


@pytest.mark.parametrize("data, words", [
    ("locked", ["locked/sib", "hf auth login"]), ("denied", ["denied/sib", "hf auth login"]),
    ("gone", ["gone/sib"]), ("broken", ["broken/sib"]), ("dead", ["dead/sib"]), ("short", ["short/sib"]),
    ("altered", ["altered/sib"]),
    ("partly", ["partly/sib"]), ("silent", ["silent/sib", "timed out"]), ("mute", ["mute/sib", "timed out"]),
    ("stall", ["stall/sib", "timed out"])])
def test_a_dataset_that_cannot_be_had_is_told_in_one_line(data, words, world, tmp_path, forge, hub):
    """Catches a traceback, endless retries or silence, and a bad download taken for good, now or later."""
    hasty = "huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.05" if data == "stall" else ""
    code, log = forge.run(from_hub(world, tmp_path / "runs", data, "ok"), QUICK + hasty)
    one_line(code, log, *words, "--data FOLDER")
    offline = QUICK + "huggingface_hub.constants.HF_HUB_OFFLINE = True"
    code, log = forge.run(from_hub(world, tmp_path / "runs", data, "ok"), offline)
    one_line(code, log, *words[:1])
    assert not (tmp_path / "runs").exists()


def test_a_hub_that_falls_silent_leaves_what_was_downloaded_in_use(world, tmp_path, forge, hub, monkeypatch):
    """Catches a wait for ever, or an error, where a whole copy lies in the cache."""
    args = from_hub(world, tmp_path / "once", "ok", "ok", "--backbone", world / "backbone")
    assert forge.run(args, QUICK)[0] == 0
    hub.seen.clear()
    monkeypatch.setattr(hub, "silent", True)
    code, log = forge.run([*args, "--out", tmp_path / "again"], QUICK)
    assert code == 0 and hub.seen, log
    assert bits(tmp_path / "once") == bits(tmp_path / "again")


@pytest.mark.parametrize("backbone, words", [
    ("locked", ["hf auth login"]), ("denied", ["hf auth login"]),
    ("gone", ["gone/tiny"]), ("broken", ["broken/tiny"]),
    ("dead", ["dead/tiny", "--backbone"]), ("short", ["short/tiny"]), ("altered", ["altered/tiny"]),
    ("silent", ["silent/tiny", "timed out"]), ("mute", ["mute/tiny", "timed out"])])
def test_a_backbone_that_cannot_be_had_is_told_in_one_line(backbone, words, world, tmp_path, forge, hub):
    """Catches a traceback, and a gated model that does not say how to log in."""
    code, log = forge.run(from_hub(world, tmp_path / "runs", "ok", backbone), QUICK)
    one_line(code, log, *words)
    assert not (tmp_path / "runs").exists()


# ---- 7. full disks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("limit", [3000, 9000, 20000, 60000])
def test_a_disk_that_fills_up_costs_one_line_and_no_work(limit, world, tmp_path, forge):
    """Catches a traceback from a failed write, a checkpoint torn by it, and debris that keeps a disk full."""
    args = command(world, tmp_path / "often", "--steps", "12", "--seeds", "11-12",
                   "--set", "train.evaluate_every=1")
    if not (world / "once").exists():
        assert train.main([*args, "--out", str(world / "once")]) == 0
    # no file may grow beyond the limit: RLIMIT_FSIZE gives EFBIG where a full disk gives ENOSPC
    code, log = forge.run(args,
                          f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))")
    if code:
        one_line(code, log, "File too large")
        assert "xpe-two-s1" in log.splitlines()[-1]     # which file
        assert not [f for f in (tmp_path / "often").rglob("*") if f.name.startswith(".")]
        code, log = forge.run([*args, "--resume"])
    assert code == 0, log
    assert bits(tmp_path / "often") == bits(world / "once")
    assert limit > 9000 or "File too large" in (forge.folder / f"job{forge.n - 1}.log").read_text()


@pytest.mark.parametrize("step", [4, 8])
def test_a_full_disk_leaves_the_last_checkpoint(step, world, tmp_path, monkeypatch):
    """Catches a checkpoint that is deleted before the next one is safe."""
    import errno
    real, args = os.fsync, command(world, tmp_path, "--seeds", "11-12", "--steps", "12")

    def full(handle):
        if f"checkpoint-{step}" in os.readlink(f"/proc/self/fd/{handle}") and "s12" in os.readlink(
                f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError,
                       match=rf"checkpoint-{step}.pt.*No space left|No space left.*checkpoint-{step}.pt"):
        train.main(args)
    monkeypatch.undo()
    left = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*checkpoint*"))
    assert left == ["xpe-two-s11/checkpoint-4.pt"] + (
        ["xpe-two-s11/checkpoint-8.pt", "xpe-two-s12/checkpoint-4.pt"] * (step == 8))
    seen = []
    real_step = train.Optimizer.step
    monkeypatch.setattr(train.Optimizer, "step", lambda self, n, f: (seen.append(n), real_step(self, n, f)))
    assert train.main([*args, "--resume"]) == 0
    assert seen[0] == (1 if step == 4 else 5)


def test_a_log_that_cannot_grow_is_named(world, tmp_path, monkeypatch):
    """Catches a bare "No space left on device" from the one file that is appended to."""
    real = train.judge_all

    def judge_all(learners, *more):
        (learners[0].folder / "metrics.jsonl").symlink_to("/dev/full")
        real(learners, *more)
    monkeypatch.setattr(train, "judge_all", judge_all)
    with pytest.raises(OSError, match="No space left on device.*xpe-two-s11/metrics.jsonl"):
        train.main(command(world, tmp_path))


def test_a_folder_that_cannot_be_written_is_told_in_one_line(world, tmp_path, forge):
    """Catches a traceback for --out on a file, where even root cannot make a folder."""
    (tmp_path / "file").write_text("")
    code, log = forge.run(command(world, tmp_path / "file" / "runs", "--steps", "2"))
    one_line(code, log, "file/runs")


def test_processes_that_share_the_seeds_do_not_refuse_each_others_folders(world, tmp_path, monkeypatch):
    """Catches a torchrun in which the slower process finds the faster one's folder and gives up."""
    for rank in "01":
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        assert train.main(command(world, tmp_path / "runs", "--steps", "2", "--seeds", "11-13")) == 0
    assert sorted(f.name for f in (tmp_path / "runs").iterdir()) == [f"xpe-two-s{n}" for n in (11, 12, 13)]


@pytest.mark.skipif(not shutil.which("torchrun", path=str(Path(sys.executable).parent)), reason="no torchrun")
def test_a_process_that_dies_under_torchrun_costs_nothing(world, tmp_path):
    """Catches a job that goes on without the dead process's learners, siblings without a checkpoint, a
    command to go on with that deals the learners otherwise."""
    args = command(world, tmp_path / "often", "--seeds", "11-14", "--steps", "300",
                   "--set", "train.evaluate_every=20", "--set", "train.checkpoint_every=20")
    job = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", str(HERE / "train.py"), *args]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    with subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as p:
        deadline = time.time() + 120
        while len(list((tmp_path / "often").glob("*/checkpoint-*.pt"))) < 4 and time.time() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{p.pid}/task/{p.pid}/children")
        if not children.is_file():
            p.kill()
            pytest.skip("this system does not list a process's children")
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        log = p.communicate(timeout=120)[0]
    assert p.returncode != 0 and "exitcode  : -9" in log
    assert len(list((tmp_path / "often").glob("*/checkpoint-*.pt"))) == 4
    again = re.search(r"interrupted; go on with: (torchrun --nproc_per_node=2 .* --resume)\n", log)[1]
    done = subprocess.run([str(Path(sys.executable).parent / "torchrun"), *shlex.split(again)[1:]], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(2):       # what each process trains is what one process trains with these seeds
        seeds = f"{11 + rank},{13 + rank}"
        train.main([*args, "--seeds", seeds, "--out", str(tmp_path / "once")])
    assert bits(tmp_path / "often") == bits(tmp_path / "once")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")])
def test_too_many_learners_at_once_say_which_setting_to_lower(world, tmp_path, monkeypatch, error):
    """Catches a traceback when memory runs out; a run that cannot go on after the setting was lowered."""
    with monkeypatch.context() as patch:
        patch.setattr(xpe.ClassificationHead, "forward", lambda self, x: (_ for _ in ()).throw(error)
                      if self.training else torch.randn(len(x), x.shape[1], self.config["classes"]))
        with pytest.raises(ValueError,
                           match="out of memory with 3 learners of 4 sentences: lower train.learners_at"):
            train.main(command(world, tmp_path / "runs"))
    at_step(monkeypatch, {10: signal.SIGINT})
    assert train.main(command(world, tmp_path / "runs", "--resume")) == 130         # three again, then two
    assert train.main(command(world, tmp_path / "runs", "--resume", "--set", "train.learners_at_once=2")) == 0


def test_an_adaptation_is_scored_on_its_own_data(world, tmp_path, capsys):
    """Catches a zero-shot figure from the source run's data, an error only after all the training."""
    train.main(command(world, tmp_path / "runs", "--seeds", "11", "--steps", "4"))
    shutil.copytree(world / "data", tmp_path / "new")
    (tmp_path / "new" / "ccc_Latn").rename(tmp_path / "new" / "ddd_Latn")
    code = train.main(command(world, tmp_path / "runs", "--adapt", tmp_path / "runs/xpe-two-s11",
                              "--seeds", "11", "--languages", "ddd_Latn", "--data", tmp_path / "new",
                              "--steps", "4", "--set", "evaluate.after_training=true"))
    assert code == 0 and re.search(r"to-ddd_Latn-s11: zero-shot [\d.]+ %, adapted [\d.]+ % on ddd_Latn",
                                   capsys.readouterr().out)


def test_an_interrupt_before_the_first_step_goes_on_from_the_start(world, tmp_path, monkeypatch):
    """Catches a checkpoint of step 0 at which --resume will not go on."""
    args, enter = command(world, tmp_path / "a", "--steps", "4"), train.Interrupts.__enter__

    def interrupted(self):
        enter(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return self
    with monkeypatch.context() as patch:
        patch.setattr(train.Interrupts, "__enter__", interrupted)
        assert train.main(args) == 130
    assert train.main([*args, "--resume"]) == 0
    train.main(command(world, tmp_path / "b", "--steps", "4"))
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def test_an_interrupt_in_the_last_step_of_a_pass_ends_the_job(world, tmp_path, monkeypatch):
    """Catches Ctrl-C that is forgotten between two passes; scores computed again for runs that have them."""
    args = command(world, tmp_path / "runs", "--seeds", "11-12", "--steps", "8",
                   "--set", "train.learners_at_once=1", "--set", "evaluate.after_training=true")
    with monkeypatch.context() as patch:
        at_step(patch, {8: signal.SIGINT})
        assert train.main(args) == 130 and not (tmp_path / "runs/xpe-two-s12").exists()
    assert train.main([*args, "--resume"]) == 0
    monkeypatch.setattr(train, "report_scores", None)           # all is scored: nothing is left to do
    assert train.main([*args, "--resume"]) == 0


@pytest.mark.parametrize("settings, error", [([1], "'settings' must be an object"),
                                             ({"amp": "bf17"}, "train.amp cannot be 'bf17'"),
                                             ({"frozen_weights": 3}, "train.frozen_weights must be str")])
def test_numerics_of_a_run_that_make_no_sense_are_refused(material, tmp_path, settings, error):
    """Catches a traceback from prompt.json's training settings."""
    shutil.copytree(material / "prompt", tmp_path / "run")
    meta = json.loads((tmp_path / "run/prompt.json").read_text())
    meta["training"]["settings"] = settings
    (tmp_path / "run/prompt.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=error):
        evaluate.Run(tmp_path / "run")


def test_only_files_that_were_asked_for_are_compared_with_their_hashes(tmp_path):
    """Catches a cache that one damaged or pruned file, wanted by nobody, makes unusable for good."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, snapshot / "data/eng_Latn", snapshot / "onnx"):
        folder.mkdir(parents=True)
    for i, name in enumerate(("data/labels.txt", "data/eng_Latn/train.tsv", "onnx/model.onnx")):
        (blobs / (str(i) * 40)).write_text("damaged")
        (snapshot / name).symlink_to(blobs / (str(i) * 40))
    with pytest.raises(ConnectionError, match="2 files"):
        data.verify(snapshot, ["data/*.tsv", "data/*labels.txt"])
    assert [p.name for p in blobs.iterdir()] == ["2" * 40]
    with pytest.raises(FileNotFoundError):                      # what was asked for and is gone stays refused
        data.verify(snapshot, ["data/*.tsv"])
    data.verify(snapshot, ["*.json"])


def test_a_head_that_sees_no_text_is_told_before_anything_is_written(world, tmp_path, monkeypatch):
    """Catches a folder left behind by a run that cannot start: the next attempt would be refused for it."""
    monkeypatch.setattr(train, "predict", lambda *_, **__: torch.zeros(2, 7))
    with pytest.raises(ValueError, match="sees nothing of the text"):
        train.main(command(world, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
