"""Interrupts, kills, bad numbers, hostile files, a bad hub, full disks: what a run survives.

    pytest tests/test_robustness.py                        (offline, CPU; about a minute)
    XPE_KILLS=40 pytest tests/test_robustness.py -k "random_moments or any_write or torchrun"
    XPE_FUZZ=100000 pytest tests/test_robustness.py -k hostile_file

What the project promises, and the tests that show it. All of it holds on the CPU; on a GPU the
bits of two runs may differ.

* Resume, exactly. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP end the step, write a checkpoint and print
  the command that goes on; `--resume` ends with the same bits, prompts and metrics.jsonl, as a run
  that was never interrupted: test_a_pass_that_is_interrupted..., test_a_run_killed_at_any_write...,
  test_kills_at_random_moments... It goes on with the same settings, data, precision and company,
  or says which differ: test_resume_refuses..., test_a_part_of_a_pass...
* Nothing lost. Files are written under a temporary name, synced and renamed; a run folder is never
  written over (test_an_existing_folder...), nor trained by two processes at once (test_two_...);
  on a full disk the last checkpoint stays whole (test_a_disk_that..., test_a_full_disk...). A
  learner whose loss is no longer finite stops and says where; the others go on as if nothing had
  been (test_a_learner_whose_loss...).
* Nobody let in. Prompts are safetensors and JSON; checkpoints, and backbones without safetensors,
  are read by torch's restricted unpickler, YAML by a strict loader (test_a_pickle_is_refused...).
  A backbone's own code runs only where the user says so, and a run folder cannot say it for him
  (test_code_that_comes...). Damaged and hostile files are read or refused in one line
  (test_a_hostile_file...).
* The hub. Data and backbones come in one snapshot, with retries on passing trouble, and are
  compared with their hashes; a server that does not answer is left for the cache or for one line
  (test_a_run_from_the_hub... and the three after it; huggingface_hub below 1.0 waits for it).
* Reproducible. The same command gives the same bits (test_the_same_command_twice...).
* Several processes. When one dies, torchrun ends the job; the others write a checkpoint and print
  the command that goes on (test_a_process_that_dies_under_torchrun...).
"""
import errno
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

import data
import evaluate
import hostile_files
import train
import xpe
from config import read_config, resolve_group
from robust_helpers import (COMMIT, HERE, Forge, Killed, at_step, command, content_of,
                            listen_to_ctrl_c, make_world, read_log, remember_default_config,
                            serve_hub, wait_for, watch_steps)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a backbone, a corpus and a configuration."""
    remember_default_config()
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def hub(world):
    """The stand-in for the hub, with the data and the backbone of the world."""
    hub = serve_hub(world)
    yield hub
    hub.shutdown()


@pytest.fixture(scope="module")
def forge(tmp_path_factory, hub):
    """Real processes of train.py, whose hub is the stand-in."""
    forge = Forge(tmp_path_factory.mktemp("forge"), hub.server_port)
    yield forge
    forge.close()


def interrupt(monkeypatch, arguments, step=6):
    """Run train.py and end it by Ctrl-C after a step."""
    with monkeypatch.context() as patch:
        at_step(patch, {step: signal.SIGINT})
        assert train.main(arguments) == 130


# ---- Resume, exactly ----------------------------------------------------------------------------

EARLY = ("train.patience=1", "train.patience_after=0.1")
PASSES = {
    "patience": ("--seeds", "11-13", *EARLY),
    "dual, bf16, accumulate": ("--mode", "dual", "train.amp=bf16", "train.accumulate=3",
                               "train.evaluate_every=0", "train.patience=1",
                               "train.patience_after=0.7"),
    "spt, autocast": ("--mode", "spt", "train.amp=bf16", "train.frozen_weights=float32"),
    "fp16, adamw": ("train.amp=fp16", "train.optimizer=adamw", "train.rate=1.0e-3"),
    "lstm": ("prompt.encoder=lstm",),
    "head": ("--mode", "head"),
    "two at once": ("--seeds", "11-13", "train.learners_at_once=2"),
    "full, bf16": ("--mode", "full", "--seeds", "11", "full.amp=bf16", "full.accumulate=2"),
}


def with_set(arguments):
    """Put --set before each setting."""
    complete = []
    for argument in arguments:
        if re.match(r"\w+\.\w+=", argument):
            complete.append("--set")
        complete.append(argument)
    return complete


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_is_interrupted_and_killed_ends_with_the_same_bits(name, world, tmp_path,
                                                                       monkeypatch, capsys):
    """Catches: any state that a checkpoint forgets: random numbers, a moment, the loss since the
    last evaluation."""
    arguments = ["--seeds", "11-12", "--steps", "16", *with_set(PASSES[name])]
    assert train.main(command(world, tmp_path / "once", *arguments)) == 0
    at_step(monkeypatch, {2: signal.SIGINT, 5: Killed(), 9: signal.SIGTERM, 10: Killed(),
                          14: signal.SIGUSR1})
    again = command(world, tmp_path / "often", *arguments)
    statuses = []
    capsys.readouterr()
    while 0 not in statuses:
        try:
            statuses.append(train.main(again))
        except Killed:
            statuses.append("killed")
        again = command(world, tmp_path / "often", *arguments, "--resume")
        assert len(statuses) < 7
    assert 130 in statuses and "killed" in statuses
    assert "--resume" in capsys.readouterr().out
    assert content_of(tmp_path / "often") == content_of(tmp_path / "once")
    if name == "patience":      # worth its name only if learners leave at different evaluations
        assert len({len(read_log(folder)) for folder in (tmp_path / "once").iterdir()}) > 1


@pytest.mark.parametrize("at_once", [2, 1])
def test_a_run_killed_at_any_write_goes_on_to_the_same_bits(world, tmp_path, monkeypatch, at_once):
    """Catches: an order of writes and deletes that leaves, at some instant, no step at which all
    can go on, or files that nobody clears away."""
    arguments = with_set(["train.steps=8", "--seeds", "11-12", *EARLY,
                          f"train.learners_at_once={at_once}"])
    assert train.main(command(world, tmp_path / "once", *arguments)) == 0
    expected = content_of(tmp_path / "once")
    arguments = command(world, tmp_path / "often", *arguments)
    stride = 1 if "XPE_KILLS" in os.environ else 3
    killed = 0
    for point in range(1, 200, stride):
        with monkeypatch.context() as patch:
            kill_at_write(patch, point)
            try:
                train.main(arguments)
                break
            except Killed:
                killed += 1
        assert train.main([*arguments, "--resume"]) == 0
        assert content_of(tmp_path / "often") == expected, f"killed at write or delete {point}"
        shutil.rmtree(tmp_path / "often")
    assert killed >= 5


def kill_at_write(patch, point):
    """Raise Killed instead of rename, delete or new folder number `point`."""
    calls = [0]

    def count_calls(real):
        def call(*arguments, **more):
            calls[0] += 1
            if calls[0] == point:
                raise Killed
            return real(*arguments, **more)
        return call
    patch.setattr(os, "replace", count_calls(os.replace))
    patch.setattr(Path, "unlink", count_calls(Path.unlink))
    patch.setattr(Path, "mkdir", count_calls(Path.mkdir))


def test_what_a_kill_leaves_of_a_write_is_cleared_away(world, tmp_path, monkeypatch):
    """Catches: a temporary file whose name the clean-up does not know, which would lie there for
    good."""
    arguments = command(world, tmp_path, "--seeds", "11", "--steps", "8")
    folder = tmp_path / "xpe-two-s11"
    interrupt(monkeypatch, arguments)

    def kill(*_, **__):
        raise Killed
    for name in ("backbone.safetensors", "checkpoint.pt"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill)
            patch.setattr(Path, "unlink", kill)
            with pytest.raises(Killed):
                xpe.write_atomically(folder / name, b"half")
    assert len([path for path in folder.iterdir() if path.name.startswith(".")]) == 2
    assert train.main([*arguments, "--resume"]) == 0
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_an_interrupt_before_the_first_step_goes_on_from_the_start(world, tmp_path, monkeypatch):
    """Catches: a checkpoint of step 0, at which --resume will not go on."""
    arguments = command(world, tmp_path / "a", "--steps", "4")
    real_enter = train.Interrupts.__enter__

    def enter(self):
        real_enter(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return self
    with monkeypatch.context() as patch:
        patch.setattr(train.Interrupts, "__enter__", enter)
        assert train.main(arguments) == 130
    assert train.main([*arguments, "--resume"]) == 0
    train.main(command(world, tmp_path / "b", "--steps", "4"))
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_an_interrupt_in_the_last_step_of_a_pass_ends_the_job(world, tmp_path, monkeypatch):
    """Catches: Ctrl-C that is forgotten between two passes."""
    arguments = command(world, tmp_path, "--seeds", "11-12", "--steps", "8",
                        "--set", "train.learners_at_once=1")
    interrupt(monkeypatch, arguments, step=8)
    assert not (tmp_path / "xpe-two-s12").exists()
    assert train.main([*arguments, "--resume"]) == 0


def test_the_same_command_twice_gives_the_same_bits(world, tmp_path):
    """Catches: anything that comes from the clock, the order of a set, or unseeded random
    numbers."""
    for out in "ab":
        torch.rand(3)
        random.random()
        train.main(command(world, tmp_path / out, "--mode", "dual", "--steps", "8"))
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_the_command_that_goes_on_can_be_pasted(world, tmp_path, monkeypatch, capsys):
    """Catches: a printed command that a shell takes apart at a blank, or that says --resume
    twice."""
    arguments = command(world, tmp_path / "my runs", "--seeds", "11")
    for step in (2, 4):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        interrupt(monkeypatch, arguments, step)
        line = capsys.readouterr().out.splitlines()[-1].partition("go on with: ")[2]
        python, script, *arguments = shlex.split(line)
        assert (python, script) == ("python", "train.py")
        assert arguments == [*command(world, tmp_path / "my runs", "--seeds", "11"), "--resume"]


# ---- Resume: what it starts, and what it refuses ------------------------------------------------

def test_more_seeds_can_join_a_resume(world, tmp_path, monkeypatch):
    """Catches: "stand at different steps" for seeds that do not exist yet."""
    steps = ["--steps", "8"]
    interrupt(monkeypatch, command(world, tmp_path / "a", *steps, "--seeds", "11"))
    taken = watch_steps(monkeypatch)
    assert train.main(command(world, tmp_path / "a", *steps, "--seeds", "11-13", "--resume")) == 0
    assert taken[:2] == [(11, 7), (11, 8)]
    assert taken[2:] == [(seed, number) for number in range(1, 9) for seed in (12, 13)]
    assert train.main(command(world, tmp_path / "b", *steps, "--seeds", "11")) == 0
    assert train.main(command(world, tmp_path / "b", *steps, "--seeds", "12-13")) == 0
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


@pytest.mark.parametrize("seeds, others", [("11", "xpe-two-s12, xpe-two-s13"),
                                           ("12-13", "xpe-two-s11"),
                                           ("13", "xpe-two-s11, xpe-two-s12")])
def test_a_part_of_a_pass_is_refused_by_name(world, tmp_path, monkeypatch, seeds, others):
    """Catches: seeds that go on without those they share a checkpoint with, which then lose
    theirs."""
    steps = ["--steps", "8"]
    interrupt(monkeypatch, command(world, tmp_path, *steps))
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match=f"is trained together with {others}: --resume them in"):
        train.main(command(world, tmp_path, *steps, "--seeds", seeds, "--resume"))
    assert content_of(tmp_path) == before
    assert train.main(command(world, tmp_path, *steps, "--resume")) == 0


def test_resuming_a_finished_seed_keeps_the_checkpoint_of_its_companions(world, tmp_path,
                                                                         monkeypatch):
    """Catches: a checkpoint that is deleted with the seed in whose folder it lies, while the other
    seeds of its pass still need it."""
    settings = with_set(["train.patience_after=0.1", "train.evaluate_every=2"])
    arguments = command(world, tmp_path / "a", "--steps", "8", *settings)
    record_evaluation = train.Learner.record_evaluation

    def stop_11_early(learner, step, *others):
        record_evaluation(learner, step, *others)
        if learner.seed == 11 and step == 4:
            learner.progress.stopped = "early"
    monkeypatch.setattr(train.Learner, "record_evaluation", stop_11_early)
    interrupt(monkeypatch, arguments)
    first = tmp_path / "a" / "xpe-two-s11"
    assert (first / "prompt.json").is_file()
    assert train.main([*arguments, "--seeds", "11", "--resume"]) == 0
    assert (first / "checkpoint.pt").is_file()
    assert train.main([*arguments, "--seeds", "12-13", "--resume"]) == 0
    assert not list((tmp_path / "a").glob("*/checkpoint.pt"))
    assert not list((tmp_path / "a").glob("*/pass.json"))
    train.main(command(world, tmp_path / "b", "--steps", "8", *settings))
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_a_run_that_another_process_has_finished_meanwhile(world, tmp_path, monkeypatch):
    """Catches: a finished run that is trained over, because it was planned before it was locked."""
    arguments = command(world, tmp_path, "--seeds", "11", "--steps", "4")
    plan_passes = train.plan_passes

    def plan_and_finish(learners, size):
        passes = plan_passes(learners, size)
        monkeypatch.setattr(train, "plan_passes", plan_passes)
        assert train.main(arguments) == 0
        return passes
    monkeypatch.setattr(train, "plan_passes", plan_and_finish)
    with pytest.raises(FileExistsError, match="xpe-two-s11: another process has finished it"):
        train.main([*arguments, "--resume"])
    assert train.main([*arguments, "--resume"]) == 0


def test_scores_of_a_prompt_that_is_gone_go_with_it(world, tmp_path):
    """Catches: the test table of an earlier training beside the prompt of a new one."""
    arguments = command(world, tmp_path, "--seeds", "11", "--steps", "4",
                        "--set", "evaluate.after_training=true")
    assert train.main(arguments) == 0
    run = tmp_path / "xpe-two-s11"
    before = (run / "test.json").read_text()
    (run / "prompt.json").unlink()
    unscored = ["--set", "evaluate.after_training=false", "--resume"]
    assert train.main([*arguments, *unscored]) == 0
    assert not list(run.glob("test*"))
    assert train.main([*arguments, "--resume"]) == 0
    assert (run / "test.json").read_text() == before


def test_an_existing_folder_is_not_started_over(world, tmp_path):
    """Catches: a second start that writes over a finished run, or over one of several."""
    arguments = command(world, tmp_path / "runs", "--steps", "4")
    train.main(arguments)
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match="xpe-two-s11 exists: --resume goes on, --out starts"):
        train.main(arguments)
    with pytest.raises(FileExistsError, match="xpe-two-s13 exists"):
        train.main(command(world, tmp_path / "runs", "--seeds", "9,13"))
    assert content_of(tmp_path) == before
    assert not (tmp_path / "runs" / "xpe-two-s9").exists()


def test_a_prompt_without_its_tensors_is_told(world, tmp_path):
    """Catches: "finished already" for a run whose trained tensors have been deleted."""
    arguments = command(world, tmp_path, "--seeds", "11", "--steps", "4")
    train.main(arguments)
    (tmp_path / "xpe-two-s11" / "prompt.safetensors").unlink()
    message = "xpe-two-s11: .*prompt.safetensors is missing; remove"
    with pytest.raises(FileNotFoundError, match=message):
        train.main([*arguments, "--resume"])


@pytest.mark.parametrize("setting, name", [
    ("train.rate=1.0e-2", "rate"), ("train.steps=48", "steps"),
    ("train.optimizer=adamw", "optimizer"), ("backbone.dropout=false", "dropout"),
    ("data.max_length=20", "max_length"),
    ("train.amp=fp16", "amp"), ("prompt.dropout=0.5", "prompt.dropout"),
    ("prompt.length=5", "(prompt.length|max_length)"), ("prompt.reads=mean", "reads"),
    ("prompt.heads=4", "prompt.heads")])
def test_resume_refuses_other_settings_by_name(setting, name, world, tmp_path, monkeypatch):
    """Catches: a run that goes on under other settings than it began with, a refusal that wrote
    first, or that calls the checkpoint damaged."""
    settings = ["train.steps=8", "prompt.encoder=attention", "prompt.heads=8"]
    arguments = command(world, tmp_path, "--seeds", "11", *with_set(settings))
    interrupt(monkeypatch, arguments)
    for file in ("checkpoint.pt", "prompt.json"):       # the second time it has finished
        before = content_of(tmp_path)
        message = rf"{file}: {name} was .*, not .*: --resume goes on with the same settings only"
        with pytest.raises(ValueError, match=message):
            train.main([*arguments, "--resume", "--set", setting])
        assert content_of(tmp_path) == before
        assert train.main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize("settings", [None, [1], "x", {"rate": [0.03]}])
def test_resume_of_a_finished_run_whose_settings_make_no_sense(settings, world, tmp_path):
    """Catches: a traceback, and a finished run that is started over because prompt.json was
    changed."""
    arguments = command(world, tmp_path, "--seeds", "11", "--steps", "1")
    train.main(arguments)
    path = tmp_path / "xpe-two-s11" / "prompt.json"
    meta = json.loads(path.read_text())
    meta["training"]["settings"] = settings
    del meta["training"]["stopped"]
    path.write_text(json.dumps(meta))
    before = content_of(tmp_path)
    with pytest.raises(ValueError, match="prompt.json: (.* was .*, not .*same settings|holds no)"):
        train.main([*arguments, "--resume"])
    assert content_of(tmp_path) == before


def test_a_pass_that_starts_over_says_under_which_settings(world, tmp_path, monkeypatch):
    """Catches: a config.yaml of the first attempt beside what the second, with other settings, has
    trained."""
    arguments = command(world, tmp_path, "--seeds", "11-12")
    interrupt(monkeypatch, arguments)
    (tmp_path / "xpe-two-s11" / "checkpoint.pt").unlink()   # as if killed in the first save
    assert train.main([*arguments, "--resume", "--set", "train.rate=2.0e-2"]) == 0
    for folder in tmp_path.iterdir():
        assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["rate"] == 2.0e-2
        assert len(read_log(folder)) == 6


def test_resume_refuses_other_data(world, tmp_path, monkeypatch):
    """Catches: a run that goes on with sentences other than those it began with."""
    corpus = shutil.copytree(world / "data", tmp_path / "data")
    arguments = command(world, tmp_path / "runs", "--seeds", "11", "--data", corpus)
    interrupt(monkeypatch, arguments)
    file = corpus / "aaa_Latn" / "train.tsv"
    file.write_text(file.read_text().replace("star", "song", 1))
    with pytest.raises(ValueError, match=r"checkpoint.pt: data was .*same settings only"):
        train.main([*arguments, "--resume"])


# ---- Two processes at once ----------------------------------------------------------------------

def test_two_commands_at_once_do_not_train_one_run(world, tmp_path, monkeypatch):
    """Catches: the same command twice at once, or --resume while another process trains: both would
    write into one folder, with metrics.jsonl doubled."""
    arguments = command(world, tmp_path / "disturbed", "--steps", "12")
    refusals = []
    real_step = train.Learner.step

    def step(self, clip):
        real_step(self, clip)
        if not refusals:
            refusals.append("")
            for more in ([], ["--resume"], ["--resume", "--seeds", "13,12"]):
                with torch.random.fork_rng(), pytest.raises(FileExistsError) as refused:
                    train.main([*arguments, *more])
                refusals.append(str(refused.value))
    monkeypatch.setattr(train.Learner, "step", step)
    assert train.main(arguments) == 0
    assert "xpe-two-s11 exists" in refusals[1]
    assert "xpe-two-s11: another process is training this run" in refusals[2]
    assert "xpe-two-s13: another process is training this run" in refusals[3]
    monkeypatch.undo()
    train.main(command(world, tmp_path / "calm", "--steps", "12"))
    assert content_of(tmp_path / "disturbed") == content_of(tmp_path / "calm")


def test_of_two_commands_that_both_saw_no_folder_one_makes_it(world, tmp_path, monkeypatch):
    """Catches: a folder that is looked for at the start and made, by both, a minute later."""
    monkeypatch.setattr(train, "check_folders", lambda *_: None)
    arguments = command(world, tmp_path)
    interrupt(monkeypatch, arguments)
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match="xpe-two-s11 exists"):
        train.main(arguments)
    assert content_of(tmp_path) == before


def test_processes_that_share_the_seeds_do_not_refuse_each_others_folders(world, tmp_path,
                                                                          monkeypatch):
    """Catches: a torchrun in which the slower process finds the faster one's folder and gives up; a
    seed that is trained twice or by nobody."""
    steps = watch_steps(monkeypatch)
    for rank in "01":
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        assert train.main(command(world, tmp_path, "--steps", "1", "--seeds", "11-13")) == 0
    assert steps == [(11, 1), (13, 1), (12, 1)]
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == ["xpe-two-s11", "xpe-two-s12", "xpe-two-s13"]


# ---- Numbers that go bad ------------------------------------------------------------------------

def spoil_loss(monkeypatch, number, count, steps, factor=float("nan")):
    """Multiply the training loss of learner `number` of `count` by `factor` at some steps."""
    calls = [0]

    def cross_entropy(logits, labels, weight=None):
        loss = torch.nn.functional.cross_entropy(logits, labels, weight)
        if weight is not None:      # in training, not on the dev split
            step, learner = divmod(calls[0], count)
            calls[0] += 1
            if learner == number and step + 1 in steps:
                loss = loss * factor
        return loss
    functions = types.SimpleNamespace(cross_entropy=cross_entropy)
    monkeypatch.setattr(train, "F", functions)


@pytest.mark.parametrize("step, noticed, has_kept", [(10, 12, True), (2, 4, False)])
def test_a_learner_whose_loss_is_not_a_number_stops_alone(step, noticed, has_kept, world, tmp_path,
                                                          monkeypatch, capsys):
    """Catches: a NaN that reaches other learners, overwrites the best state, or ends without a
    word."""
    with monkeypatch.context() as patch:    # the same learner leaves at the same time, unspoilt
        real_record = train.Learner.record_evaluation

        def record_evaluation(self, at, *more):
            real_record(self, at, *more)
            if self.seed == 12 and at == noticed:
                self.progress.stopped = "asked to"
        patch.setattr(train.Learner, "record_evaluation", record_evaluation)
        assert train.main(command(world, tmp_path / "calm")) == 0
    spoil_loss(monkeypatch, 1, 3, [step])
    capsys.readouterr()
    assert train.main(command(world, tmp_path / "bad")) == 2
    errors = capsys.readouterr().err.splitlines()
    line = next(line for line in errors if "diverged" in line)
    assert f"xpe-two-s12: diverged: the loss is no longer finite at step {noticed}" in line
    for seed in (11, 13):
        name = f"xpe-two-s{seed}/prompt.safetensors"
        assert (tmp_path / "bad" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    folder = tmp_path / "bad" / "xpe-two-s12"
    assert (folder / "prompt.json").exists() == has_kept
    if has_kept:
        training = xpe.load_prompt(folder)[2]["training"]
        log = read_log(folder)
        best = max(log, key=lambda entry: entry["dev_accuracy"])
        assert log[-1]["step"] < step and f"kept step {best['step']}" in line
        assert training["best_step"] == best["step"] and training["stopped"].startswith("diverged")
    else:
        assert "nothing good to keep; lower train.rate" in line
    before = content_of(tmp_path / "bad")
    assert train.main(command(world, tmp_path / "bad", "--resume")) == 2    # it stays a failure
    assert content_of(tmp_path / "bad") == before


def test_a_learner_lost_early_does_not_cost_the_others_their_work(world, tmp_path, monkeypatch):
    """Catches: a resume that starts all learners over because one that diverged has no more
    steps."""
    spoil_loss(monkeypatch, 1, 3, [2])
    assert train.main(command(world, tmp_path / "once")) == 2
    spoil_loss(monkeypatch, 1, 3, [2])
    interrupt(monkeypatch, command(world, tmp_path / "often"), step=14)
    monkeypatch.undo()
    steps = watch_steps(monkeypatch)
    assert train.main(command(world, tmp_path / "often", "--resume")) == 2
    assert steps[:2] == [(11, 15), (13, 15)]
    assert content_of(tmp_path / "often") == content_of(tmp_path / "once")


@pytest.mark.filterwarnings("ignore:Detected call")     # as train.py does, but pytest undoes it
def test_an_overflow_in_fp16_halves_the_scale_and_stops_nobody(world, tmp_path, monkeypatch):
    """Catches: a learner thrown out for a gradient that overflowed, a scale that never comes down
    or that learners share, a checkpoint of a learner without one good step that cannot be read."""
    scales = {}
    real_step = train.Learner.step

    def step(self, clip):
        real_step(self, clip)
        scales[self.seed] = self.scaler.get_scale()
    arguments = ["--set", "train.amp=fp16", "--steps", "8"]
    with monkeypatch.context() as patch:
        spoil_loss(patch, 1, 3, [1, 2, 5], factor=1e30)
        patch.setattr(train.Learner, "step", step)
        assert train.main(command(world, tmp_path / "once", *arguments)) == 0
    assert scales == {11: 2.0 ** 16, 12: 2.0 ** 13, 13: 2.0 ** 16}
    for log in (tmp_path / "once").glob("*/metrics.jsonl"):
        assert "NaN" not in log.read_text() and "Infinity" not in log.read_text()
    with monkeypatch.context() as patch:
        spoil_loss(patch, 1, 3, [1, 2, 5], factor=1e30)
        interrupt(patch, command(world, tmp_path / "often", *arguments), step=1)
    with monkeypatch.context() as patch:
        spoil_loss(patch, 1, 3, [1, 4], factor=1e30)     # counted from the second step
        assert train.main(command(world, tmp_path / "often", *arguments, "--resume")) == 0
    assert content_of(tmp_path / "often") == content_of(tmp_path / "once")


@pytest.mark.parametrize("split, content, error", [
    ("dev", None, r"bbb_Latn/dev.tsv: no such split; bbb_Latn has test.tsv, train.tsv"),
    ("dev", "index_id\tcategory\ttext\n", r"bbb_Latn/dev.tsv: no sentence in this split"),
    ("dev", "", r"bbb_Latn/dev.tsv:1: the header must name"),
    ("train", None, r"bbb_Latn/train.tsv: no such split")])
def test_a_split_that_is_missing_or_empty_is_told_before_anything_is_written(split, content, error,
                                                                             world, tmp_path):
    """Catches: a run that trains for hours and then has nothing to choose the best step by."""
    corpus = shutil.copytree(world / "data", tmp_path / "data")
    file = corpus / "bbb_Latn" / f"{split}.tsv"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        train.main(command(world, tmp_path / "runs", "--data", corpus))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")])
def test_too_many_learners_at_once_say_which_setting_to_lower(world, tmp_path, monkeypatch, error):
    """Catches: a traceback when memory runs out; a run that cannot go on after the setting was
    lowered."""
    def forward(self, h):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(xpe.ClassificationHead, "forward", forward)
        message = ("out of memory with 3 learners of 4 sentences: lower train.learners_at_once, "
                   "train.batch_size or evaluate.tokens")
        with pytest.raises(ValueError, match=message):
            train.main(command(world, tmp_path))
    arguments = ["--steps", "4", "--resume", "--set", "train.learners_at_once=2"]
    assert train.main(command(world, tmp_path, *arguments)) == 0


def test_what_to_lower_when_memory_runs_out(tmp_path):
    """Catches: advice that has no effect: one learner, or a pass that its checkpoint holds
    together."""
    learners = [train.Learner(tmp_path / name, 1, [], {}) for name in ("a", "b")]
    names = "train.batch_size or evaluate.tokens"
    assert train.memory_settings(train.Pass(learners[:1])) == names
    assert train.memory_settings(train.Pass(learners)) == f"train.learners_at_once, {names}"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"")
    assert "and remove" in train.memory_settings(train.Pass(learners))


# ---- Real processes: signals and kills ----------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_the_step_and_tells_how_to_go_on(number, world, tmp_path, forge):
    """Catches: a Ctrl-C or a scheduler's signal that ends in a traceback, loses the step or exits
    as if all were well."""
    arguments = command(world, tmp_path / "runs", "--steps", "100000", "--seeds", "11-12")
    pid = forge.start(arguments)
    log = tmp_path / "runs" / "xpe-two-s12" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, pid)
    os.kill(pid, number)
    status, printed = forge.end()
    assert status == 130 and "Traceback" not in printed
    again = f"interrupted; go on with: python train.py {' '.join(arguments)} --resume"
    assert printed.splitlines()[-1] == again
    state = train.read_checkpoint(tmp_path / "runs" / "xpe-two-s11" / "checkpoint.pt")
    assert list(state["learners"]) == ["xpe-two-s11", "xpe-two-s12"] and state["step"] >= 4


def test_nohup_keeps_a_run_alive(world, tmp_path, forge):
    """Catches: a closed terminal that ends a run which was started to survive it."""
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    hang_up = (ignore + "real_step = train.Learner.step\n"
               "def step(self, clip):\n"
               "    real_step(self, clip)\n"
               "    os.kill(os.getpid(), signal.SIGHUP)\n"
               "train.Learner.step = step\n")
    status, printed = forge.run(command(world, tmp_path, "--steps", "4"), hang_up)
    assert status == 0 and "interrupted" not in printed


def test_the_second_signal_ends_at_once(world, tmp_path, forge):
    """Catches: a step or a save that hangs and cannot be ended but by SIGKILL."""
    hang = ("import time, signal\n"
            "def step(self, clip):\n"
            "    for _ in range(2):\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "        time.sleep(0)\n"
            "    print('still here')\n"
            "train.Learner.step = step\n")
    status, printed = forge.run(command(world, tmp_path, "--steps", "4"), hang)
    assert status == -signal.SIGTERM and "still here" not in printed


def test_ctrl_c_outside_the_loop_is_no_traceback(world, tmp_path, forge):
    """Catches: a page of traceback for a Ctrl-C while the data or the backbone is on its way."""
    pid = forge.start(command(world, tmp_path / "runs"),
                      "import time\n"
                      "def load_backbone(*_):\n"
                      "    print('loading', flush=True)\n"
                      "    time.sleep(600)\n"
                      "train.load_backbone = load_backbone\n")
    wait_for(lambda: forge.log.exists() and "loading" in forge.log.read_text(), pid)
    os.kill(pid, signal.SIGINT)
    status, printed = forge.end()
    assert status == 130 and printed.splitlines() == ["loading", "interrupted"]


# In the child: some evaluations later, within about one more of them, it ends as by SIGKILL. The
# moment is a share of the time between two evaluations, so that no machine is too slow or fast.
KILL_LATER = """
import random, signal, time
draw = random.Random({seed})
left, last = draw.randrange(4), time.time()
real_claim, real_evaluate = train.Learner.claim_folder, train.evaluate_learners
def count_down():
    global left, last
    if left == 0:
        seconds = draw.random() * (time.time() - last)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))
    left, last = left - 1, time.time()
def claim_folder(self, resume):
    count_down()
    real_claim(self, resume)
def evaluate_learners(*arguments):
    real_evaluate(*arguments)
    count_down()
train.Learner.claim_folder, train.evaluate_learners = claim_folder, evaluate_learners
"""


def test_kills_at_random_moments_and_resume_end_with_the_same_bits(world, tmp_path, forge):
    """Catches: whatever a real kill can tear: a half-written file, a rename that came too early,
    debris."""
    kills = int(os.environ.get("XPE_KILLS", 5))
    settings = ["train.checkpoint_every=1", "train.evaluate_every=2", "train.patience=3",
                "train.patience_after=0.9"]
    arguments = ["--steps", str(4 * kills + 4), "--mode", "dual", *with_set(settings)]
    assert forge.run(command(world, tmp_path / "once", *arguments))[0] == 0
    again = command(world, tmp_path / "often", *arguments)
    killed = 0
    for attempt in range(4 * kills):
        before = KILL_LATER.format(seed=attempt) if killed < kills else ""
        status, printed = forge.run(again, before)
        if status == 0:
            break
        assert status == -signal.SIGALRM, printed
        killed += 1
        again = command(world, tmp_path / "often", *arguments, "--resume")
    print(f"{killed} kills")
    assert killed >= 2 and status == 0
    assert content_of(tmp_path / "often") == content_of(tmp_path / "once")


# ---- Hostile files ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def material(world, tmp_path_factory):
    """One good file of every kind that we read, with a checkpoint beside its finished run."""
    root = tmp_path_factory.mktemp("material")
    arguments = command(world, root, "--seeds", "11", "--steps", "8")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, arguments, step=5)
    folder = root / hostile_files.RUN
    kept = {name: (folder / name).read_bytes() for name in ("checkpoint.pt", "pass.json")}
    train.main([*arguments, "--resume"])
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    hostile_files.write_authors(root / "authors", folder)
    hostile_files.write_format_1(root / "format1", folder)
    shutil.copy(world / "config.yaml", root)
    (root / "train.tsv").write_text(hostile_files.TSV, "utf-8")
    return root


FUZZ = {"tsv": 500, "config": 60, "prompt": 150, "tensors": 150, "format 1": 50,
        "tensors of format 1": 50, "authors": 150, "tensors of the authors": 150, "pass": 100,
        "checkpoint": 60}


@pytest.mark.parametrize("kind", FUZZ)
def test_a_hostile_file_is_read_or_refused_in_one_line(kind, material, forge, tmp_path):
    """Catches: a file that ends in a traceback, a hang, a huge allocation or a message that names
    no file."""
    count = FUZZ[kind]
    if "XPE_FUZZ" in os.environ:
        count = int(os.environ["XPE_FUZZ"]) * count // sum(FUZZ.values())
    result = tmp_path / "result.json"
    status, printed = forge.run(before=f"""
import hostile_files
hostile_files.fuzz({str(material)!r}, {str(tmp_path / "files")!r}, {kind!r}, {count}, 1,
                   {str(result)!r})
sys.exit(0)
""")
    assert status == 0, printed
    counts = json.loads(result.read_text())
    print(f"{kind}: {count:,} files, {counts}")
    assert not counts["wrong"] and counts["accepted"] and counts["refused"]


GROUPS_THAT_DOUBLE = ", ".join(f"a{i + 1}: [a{i}, a{i}]" for i in range(60))
GROUPS_IN_A_ROW = ", ".join(f"a{i}: [a{i + 1}]" for i in range(2000))


@pytest.mark.parametrize("name, content, error", [
    ("config.yaml", "train: {steps: !!int ''}", "not readable as YAML"),
    ("config.yaml", "train: {steps: !!float ''}", "not readable as YAML"),
    ("config.yaml", "train: {steps: !!bool maybe}", "not readable as YAML|train.steps"),
    ("config.yaml", "train: {steps: !!timestamp soon}", "not readable as YAML"),
    ("config.yaml", f"train: {{rate: 9{':59' * 200}.5}}", "not readable as YAML|train.rate"),
    ("config.yaml", f"train: {{steps: 0x{'f' * 9000}}}", "config.yaml"),
    ("config.yaml", f"0x{'f' * 9000}: 1", "config.yaml"),
    ("config.yaml", f"groups: {{a0: [x], {GROUPS_THAT_DOUBLE}}}", "groups.[ax]"),
    ("config.yaml", f"groups: {{{GROUPS_IN_A_ROW}}}", "groups.a"),
    ("config.yaml", "train: {steps: !!python/object/apply:os.system ['touch marker']}",
     "not readable as YAML: the tag|could not determine a constructor"),
    ("config.yaml", "a: &a [1]\nb: *a", "alias"),
    ("config.yaml", "[" * 100000, "not readable as YAML"),
    ("config.yaml", "x" * (1 << 20) + "y", "larger than"),
    ("config.yaml", "{a: " * 50000, "not readable as YAML"),
    ("prompt.json", "[" * 100000, "cannot be read as JSON"),
    ("prompt.json", "[]", "no JSON object"),
    ("prompt.json", '{"format": 2' + " " * (4 << 20) + "}", "larger than 4 MB")])
def test_a_file_that_was_made_to_hurt_is_refused(name, content, error, tmp_path):
    """Catches: what chance misses: PyYAML's own exceptions, numbers too long to print, groups that
    double."""
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=error) as refused:
        if name == "prompt.json":
            xpe.load_prompt(tmp_path)
        config = read_config(file)
        for group in config["groups"]:
            resolve_group(config, group)
    assert name in str(refused.value) or str(refused.value).startswith("groups.")


def test_the_script_ends_as_it_should(forge, tmp_path):
    """Catches: a train.py whose entry point does not end errors in one line and status 2."""
    script = (f"import runpy\nsys.argv[1:] = ['--mode', 'xpe', '--sources', 'none.yaml']\n"
              f"runpy.run_path({str(HERE / 'train.py')!r}, run_name='__main__')")
    assert forge.run(before=script) == (2, "error: none.yaml: no such configuration file\n")


def test_an_error_of_any_length_is_one_readable_line(forge, tmp_path):
    """Catches: a terminal that a file floods with its own content."""
    (tmp_path / "long.yaml").write_text("train: {" + "x" * 90000 + ": 1}")
    status, printed = forge.run(["--sources", tmp_path / "long.yaml", "--mode", "xpe"])
    assert status == 2 and printed.startswith("error: ")
    assert len(printed) < 1200 and printed.count("\n") == 1


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_is_refused_wherever_it_stands_and_never_run(wrapped, material, world, tmp_path):
    """Catches: any reader that unpickles: whoever shares a prompt would run code on the reader's
    machine."""
    marker, bomb = tmp_path / "marker", tmp_path / "bomb"
    if wrapped:
        torch.save(Payload(marker), bomb)
    else:
        bomb.write_bytes(pickle.dumps(Payload(marker)))
    run = shutil.copytree(material / hostile_files.RUN, tmp_path / "run")
    authors = shutil.copytree(material / "authors", tmp_path / "authors")
    corpus = shutil.copytree(world / "data", tmp_path / "data")
    arguments = command(world, tmp_path / "runs", "--seeds", "11", "--resume")
    begun = tmp_path / "runs" / "xpe-two-s11"
    begun.mkdir(parents=True)
    readers = {
        run / "prompt.json": lambda: evaluate.Run(run),
        run / "prompt.safetensors": lambda: evaluate.Run(run),
        run / "config.yaml": lambda: evaluate.Run(run),
        run / "backbone.safetensors": lambda: xpe.read_tensors(run / "backbone.safetensors"),
        authors / "adapter_config.json": lambda: evaluate.Run(authors),
        authors / "adapter_model.safetensors": lambda: evaluate.Run(authors),
        corpus / "aaa_Latn" / "train.tsv": lambda: data.Corpus(corpus).read("aaa_Latn", "train"),
        corpus / "labels.txt": lambda: data.Corpus(corpus),
        begun / "pass.json": lambda: train.main(arguments),
        begun / "checkpoint.pt": lambda: train.main(arguments)}
    for path, read in readers.items():
        good = path.read_bytes() if path.exists() else None
        shutil.copy(bomb, path)
        with pytest.raises((ValueError, OSError), match=path.name):
            read()
        path.unlink()
        if good is not None:
            path.write_bytes(good)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()          # so the payload would have worked


EVIL_CODE = """
from pathlib import Path
from transformers import XLMRobertaConfig, XLMRobertaModel
Path({marker!r}).touch()
class EvilConfig(XLMRobertaConfig):
    model_type = "evil"
class EvilModel(XLMRobertaModel):
    config_class = EvilConfig
"""


def test_code_that_comes_with_a_backbone_is_not_run(world, material, tmp_path, forge):
    """Catches: trust given by default, or by the config.yaml of a run that someone else wrote."""
    evil, marker = shutil.copytree(world / "backbone", tmp_path / "evil"), tmp_path / "marker"
    config = json.loads((evil / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "code.EvilConfig", "AutoModel": "code.EvilModel"}
    config.pop("architectures", None)
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "code.py").write_text(EVIL_CODE.format(marker=str(marker)))

    run = shutil.copytree(material / hostile_files.RUN, tmp_path / "run")
    meta = json.loads((run / "prompt.json").read_text())
    meta["backbone"]["name"] = str(evil)
    (run / "prompt.json").write_text(json.dumps(meta))
    run_config = yaml.safe_load((run / "config.yaml").read_text())
    run_config["backbone"]["trust_remote_code"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(run_config))

    status, printed = forge.run(command(world, tmp_path / "runs", "--backbone", evil))
    one_line(status, printed, "backbone.trust_remote_code=true")
    assert not (tmp_path / "runs").exists() and not marker.exists()
    score = (f"sys.argv = ['evaluate.py', {str(run)!r}, '--text', 'road']\n"
             "data.run_main(evaluate.main)")
    status, printed = forge.run(before=score)
    assert not marker.exists(), "a run's own config.yaml made us run its code"
    one_line(status, printed)
    arguments = ["--steps", "2", "--seeds", "11", "--set", "backbone.trust_remote_code=true"]
    status, printed = forge.run(command(world, tmp_path / "runs", "--backbone", evil, *arguments))
    assert status == 0 and marker.exists(), printed     # whoever says so gets it


def one_line(status, printed, *words):
    """Assert status 2 and, last, one line of error that holds the words, after whatever the hub's
    client has printed."""
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in printed, printed
    assert printed.splitlines()[-1] == lines[0]
    for word in words:
        assert word in lines[0], lines[0]


# ---- The hub ------------------------------------------------------------------------------------

# No waits between tries. For a hub that does not answer, little patience; for any other the usual.
HURRY = """
import time, huggingface_hub.constants
time.sleep = lambda seconds: None
"""
IMPATIENT = HURRY + """
huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.1
huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT = 0.3
data.HUB_TIMEOUT = 0.3
"""
OFFLINE = "huggingface_hub.constants.HF_HUB_OFFLINE = True\n"
UNANSWERED = ("silent", "mute", "stall")


def hub_command(world, out, data_owner, backbone_owner, *more):
    """Arguments of train.py with hub names; an owner "" is the folder of the world."""
    arguments = ["--steps", "4", "--seeds", "11", "--set", "train.evaluate_every=2"]
    if data_owner:
        arguments += ["--data", f"{data_owner}/sib"]
    if backbone_owner:
        arguments += ["--backbone", f"{backbone_owner}/tiny"]
    return command(world, out, *arguments, *more)


@pytest.mark.parametrize("how", ["ok", "slow", "drop", "busy", "altered-once", "old"])
def test_a_run_from_the_hub_is_the_run_from_disk(how, world, tmp_path, forge, hub):
    """Catches: a wrong download, passing trouble that ends a run, files fetched one by one."""
    assert train.main(hub_command(world, tmp_path / "disk", "", "")) == 0
    hub.seen.clear()
    status, printed = forge.run(hub_command(world, tmp_path / "hub", how, how), HURRY)
    assert status == 0, printed
    from_disk, from_hub = [tmp_path / name / "xpe-two-s11" for name in ("disk", "hub")]
    tensors = xpe.read_tensors(from_disk / "prompt.safetensors")
    others = xpe.read_tensors(from_hub / "prompt.safetensors")
    # weights out of a .bin lie otherwise in memory, which may change the last bit
    tolerance = 1e-5 if how == "old" else 0.0
    torch.testing.assert_close(tensors, others, rtol=0.0, atol=tolerance)
    meta = json.loads((from_hub / "prompt.json").read_text())
    assert meta["backbone"]["revision"] == meta["data"]["revision"] == COMMIT
    if how == "ok":
        assert len([path for path in hub.seen if path.startswith("api/datasets")]) <= 3
        before = HURRY + OFFLINE
        status, printed = forge.run(hub_command(world, tmp_path / "warm", how, how), before)
        assert status == 0, printed
        again = tmp_path / "warm" / "xpe-two-s11" / "prompt.safetensors"
        assert again.read_bytes() == (from_hub / "prompt.safetensors").read_bytes()


@pytest.mark.parametrize("owner, words", [
    ("locked", ["hf auth login"]), ("denied", ["hf auth login"]), ("gone", []), ("broken", []),
    ("dead", []), ("short", []), ("altered", []), ("partly", []), ("silent", ["timed out"]),
    ("mute", ["timed out"]), ("stall", ["timed out"])])
def test_a_dataset_that_cannot_be_had_is_told_in_one_line(owner, words, world, tmp_path, forge):
    """Catches: a traceback, endless retries or silence; a bad download taken for good, now or
    later."""
    arguments = hub_command(world, tmp_path / "runs", owner, "")
    before = IMPATIENT if owner in UNANSWERED else HURRY
    status, printed = forge.run(arguments, before)
    one_line(status, printed, f"{owner}/sib", "--data FOLDER", *words)
    status, printed = forge.run(arguments, before + OFFLINE)
    one_line(status, printed, f"{owner}/sib")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("owner, words", [
    ("locked", ["hf auth login"]), ("gone", []), ("broken", []), ("dead", ["--backbone"]),
    ("short", []), ("altered", []), ("silent", ["timed out"])])
def test_a_backbone_that_cannot_be_had_is_told_in_one_line(owner, words, world, tmp_path, forge):
    """Catches: a traceback, and a gated model that does not say how to log in."""
    before = IMPATIENT if owner in UNANSWERED else HURRY
    status, printed = forge.run(hub_command(world, tmp_path / "runs", "", owner), before)
    one_line(status, printed, f"{owner}/tiny", *words)
    assert not (tmp_path / "runs").exists()


def test_a_hub_that_falls_silent_leaves_what_was_downloaded_in_use(world, tmp_path, forge, hub,
                                                                   monkeypatch):
    """Catches: a wait for ever, or an error, where a whole copy lies in the cache."""
    arguments = hub_command(world, tmp_path / "once", "ok", "")
    assert forge.run(arguments, HURRY)[0] == 0
    hub.seen.clear()
    monkeypatch.setattr(hub, "silent", True)
    status, printed = forge.run([*arguments, "--out", tmp_path / "again"], IMPATIENT)
    assert status == 0 and hub.seen, printed
    assert content_of(tmp_path / "once") == content_of(tmp_path / "again")


# ---- Full disks ---------------------------------------------------------------------------------

@pytest.mark.parametrize("limit", [400, 3000, 9000, 20000])
def test_a_disk_that_fills_up_costs_one_line_and_no_work(limit, world, tmp_path, forge):
    """Catches: a traceback from a failed write, a checkpoint torn by it, debris that keeps a disk
    full."""
    arguments = command(world, tmp_path / "often", "--steps", "6", "--seeds", "11-12",
                        "--set", "train.evaluate_every=1")
    assert train.main([*arguments, "--out", str(tmp_path / "once")]) == 0
    # no file may grow beyond the limit: RLIMIT_FSIZE gives EFBIG where a full disk gives ENOSPC
    fill = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    status, printed = forge.run(arguments, fill)
    one_line(status, printed, "File too large", "xpe-two-s1")
    assert not [path for path in (tmp_path / "often").rglob("*") if path.name.startswith(".")]
    status, printed = forge.run([*arguments, "--resume"])
    assert status == 0, printed
    assert content_of(tmp_path / "often") == content_of(tmp_path / "once")


def test_a_full_disk_leaves_the_last_checkpoint(world, tmp_path, monkeypatch):
    """Catches: a checkpoint that is deleted before the next one is safe."""
    arguments = command(world, tmp_path, "--seeds", "11-12", "--steps", "12")
    real_fsync, saves = os.fsync, []

    def fsync(handle):
        if "checkpoint.pt" in os.readlink(f"/proc/self/fd/{handle}"):
            saves.append(handle)
            if len(saves) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(handle)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device.*xpe-two-s11/checkpoint.pt"):
            train.main(arguments)
    assert train.read_checkpoint(tmp_path / "xpe-two-s11" / "checkpoint.pt")["step"] == 4
    steps = watch_steps(monkeypatch)
    assert train.main([*arguments, "--resume"]) == 0
    assert steps[0] == (11, 5)


def test_a_log_that_cannot_grow_is_named(world, tmp_path, forge):
    """Catches: a bare "No space left on device" from the one file that is appended to, or a second
    message when it is closed."""
    full = ("real_claim = train.Learner.claim_folder\n"
            "def claim_folder(self, resume):\n"
            "    real_claim(self, resume)\n"
            "    self.log = open('/dev/full', 'ab')\n"
            "train.Learner.claim_folder = claim_folder\n"
            "train.Learner.cut_log = lambda self, length: None\n")
    status, printed = forge.run(command(world, tmp_path), full)
    one_line(status, printed, "No space left on device", "xpe-two-s11/metrics.jsonl")
    assert "Exception ignored" not in printed


def test_a_folder_that_cannot_be_written_is_told_in_one_line(world, tmp_path, forge):
    """Catches: a traceback for --out on a file, where even root cannot make a folder."""
    (tmp_path / "file").write_text("")
    status, printed = forge.run(command(world, tmp_path / "file" / "runs", "--steps", "2"))
    one_line(status, printed, "file/runs")


# ---- torchrun -----------------------------------------------------------------------------------

# When a process dies, torchrun sends SIGTERM to the others. Process 1 kills itself at step 6, once
# process 0 has a checkpoint; that one waits at step 8 for the signal.
DYING_PROCESS = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import train
from data import run_main
rank, out = os.environ["RANK"], Path({out!r})
real_step, real_note = train.Learner.step, train.Interrupts.note_arrival
arrived = []
def note_arrival(self, *arguments):
    arrived.append(True)
    real_note(self, *arguments)
def step(self, clip):
    real_step(self, clip)
    if self.schedule.last_epoch == 6 and rank == "1":
        while not (out / "xpe-two-s11" / "checkpoint.pt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    while self.schedule.last_epoch == 8 and rank == "0" and not arrived:
        {wait}
train.Learner.step, train.Interrupts.note_arrival = step, note_arrival
sys.argv[0] = "train.py"
run_main(train.main)
"""
TORCHRUN = Path(sys.executable).parent / "torchrun"


def run_torchrun(world, out, arguments, forge):
    """Two processes of torchrun, the second of which dies -> what they print."""
    script = out.with_suffix(".py")
    script.write_text(DYING_PROCESS.format(here=str(HERE), out=str(out), wait="time.sleep(0.01)"))
    job = subprocess.run([TORCHRUN, "--nproc_per_node=2", script, *arguments], text=True,
                         capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"),
                         preexec_fn=listen_to_ctrl_c)
    assert job.returncode != 0 and "exitcode  : -9" in job.stderr, job.stderr
    return job.stdout


def imitate_torchrun(world, out, arguments, forge):
    """The same two processes one after the other, the first with a SIGTERM of its own."""
    printed = ""
    for rank, expected in ((0, 130), (1, -signal.SIGKILL)):
        variables = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        wait = "os.kill(os.getpid(), signal.SIGTERM)"
        before = DYING_PROCESS.format(here=str(HERE), out=str(out), wait=wait)
        status, text = forge.run(arguments, f"os.environ.update({variables})\n{before}")
        assert status == expected, text
        printed += text
    return printed


@pytest.mark.parametrize("run_both", [
    imitate_torchrun,
    pytest.param(run_torchrun, marks=pytest.mark.skipif(
        "XPE_KILLS" not in os.environ or not TORCHRUN.exists(),
        reason="a real torchrun takes 20 s: XPE_KILLS=5 runs it"))])
def test_a_process_that_dies_under_torchrun_costs_nothing(run_both, world, tmp_path, monkeypatch,
                                                          forge):
    """Catches: a job that goes on without the dead process's learners, siblings without a
    checkpoint, a command to go on with that deals the learners otherwise."""
    arguments = command(world, tmp_path / "often", "--seeds", "11-14", "--steps", "12")
    printed = run_both(world, tmp_path / "often", arguments, forge)
    line = re.search("interrupted; go on with: (torchrun .*)", printed)[1]
    again = ["torchrun", "--nproc_per_node=2", "train.py", *arguments, "--resume"]
    assert shlex.split(line) == again
    for rank, latest in ((0, 8), (1, 4)):
        checkpoint = tmp_path / "often" / f"xpe-two-s{11 + rank}" / "checkpoint.pt"
        assert 4 <= train.read_checkpoint(checkpoint)["step"] <= latest
    # what each process trains is what one process trains with these seeds
    for rank in range(2):
        with monkeypatch.context() as patch:
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
                patch.setenv(name, str(value))
            assert train.main([*arguments, "--resume"]) == 0
        seeds = f"{11 + rank},{13 + rank}"
        train.main([*arguments, "--seeds", seeds, "--out", str(tmp_path / "once")])
    assert content_of(tmp_path / "often") == content_of(tmp_path / "once")
