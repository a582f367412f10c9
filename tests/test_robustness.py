"""Interrupts, kills, two processes, full disks and hostile files: what a run survives.

    pytest tests/test_robustness.py                 (offline, CPU; half a minute on one core)

What the project promises, and the tests that show it. All of it holds on the CPU with a given
number of threads; on a GPU the bits of two runs may differ.

* Resume, exactly. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP end the step and write a checkpoint; the same
  command with --resume ends with the same bits, prompts and metrics.jsonl, as a run that was
  never interrupted (test_an_interrupted_pass..., test_a_signal...), and so does a run that was
  killed at any write (test_a_kill_at_any_write...). Seeds can be added; other settings, other data
  or a part of a pass are refused by name (test_resume...).
* Nothing lost. Files are written under a temporary name, synced and renamed; a run is never trained
  by two processes at once (test_two_processes...); a full disk costs one line that names the file
  (test_a_full_disk...). test_train.py: a run folder is never written over, and a learner that
  diverges stops alone.
* Nobody let in. Damaged and hostile files end in one line (test_a_damaged..., test_chance...). No
  code in them is run (checkpoints are read by torch's restricted unpickler), and a backbone's own
  code runs only where the user says so, not where a run folder does (test_no_code...).
* Several processes. torchrun deals the learners out; the processes do not need each other
  (test_torchrun...).
"""
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys

import pytest
import torch

import data
import evaluate
import runs
from helpers import run, tiny_backbone
from test_train import after_steps, read_log, results, train_tiny, trained


def interrupted(world, out, arguments, step, number=signal.SIGTERM):
    """Run train.py and send it a signal after an optimizer step -> the command that goes on."""
    with after_steps(step, lambda _: signal.raise_signal(number)):
        status, told, error = train_tiny(world, out, arguments)
    assert status == 130 and not error.count("error"), error
    assert told.endswith("interrupted; the same command with --resume goes on\n")
    return arguments + " --resume"


def in_child(action):
    """Run action() in another process -> its exit status, or minus the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    return process.exitcode


# ---- Resume, exactly -----------------------------------------------------------------------------

# With these the learners leave at different evaluations
EARLY = "train.evaluate_every=1 train.patience=2 train.patience_after=0.1"


@pytest.mark.parametrize("arguments", [
    f"--mode xpe --seeds 11-13 {EARLY}",
    "--mode dual train.amp=bf16 train.accumulate=3 train.evaluate_every=0",
    "--mode spt train.amp=bf16 train.frozen_weights=float32",
    "--mode xpe train.amp=fp16 train.optimizer=adamw train.rate=1.0e-3",
    "--mode xpe prompt.encoder=lstm --seeds 11-13 train.learners_at_once=2",
    "--mode full full.amp=bf16 full.accumulate=2"])
def test_an_interrupted_pass_ends_with_the_same_bits(world, tmp_path, arguments):
    """Catches: any state that a checkpoint forgets (random numbers, a moment, the loss since the
    last evaluation)."""
    arguments = "--seeds 11-12 --steps 12 " + arguments
    folders = trained(world, tmp_path / "once", arguments)
    resume = interrupted(world, tmp_path / "of ten", arguments, step=5, number=signal.SIGINT)
    interrupted(world, tmp_path / "of ten", resume, step=6)
    trained(world, tmp_path / "of ten", resume)
    assert results(tmp_path / "of ten") == results(tmp_path / "once")
    if EARLY in arguments:
        assert len({len(read_log(folder)) for folder in folders}) == 3


def kill_at_write(number):
    """From now on: SIGKILL instead of file operation `number`."""
    count = itertools.count(1)

    def watch(real):
        def call(*arguments, **more):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)
        return call
    for name in ("replace", "unlink", "mkdir", "fsync"):
        setattr(os, name, watch(getattr(os, name)))


def test_a_kill_at_any_write_ends_with_the_same_bits(world, tmp_path):
    """Catches: an order of writes and deletes that leaves, at some instant, no step at which all
    can go on (one learner has finished, others have not), or files that nobody clears away."""
    arguments = f"--mode xpe --steps 8 --seeds 11-13 {EARLY} train.learners_at_once=2"
    trained(world, tmp_path / "once", arguments)
    expected = results(tmp_path / "once")
    for number in itertools.count(2, 4):
        out = tmp_path / str(number)

        def train_and_die():
            kill_at_write(number)
            sys.exit(train_tiny(world, out, arguments)[0])
        ended = in_child(train_and_die)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        trained(world, out, arguments + " --resume")
        assert results(out) == expected, f"killed at file operation {number}"
        assert not list(out.glob("*/.*"))
    assert number > 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint(world, tmp_path, number):
    """Catches: a scheduler's signal that loses the step; a second one that waits for a save that
    hangs; a closed terminal that ends what nohup was to keep alive."""
    interrupted(world, tmp_path, "--mode xpe --seeds 11-12", 3, number)
    assert (tmp_path / "xpe-two-s11/checkpoint.pt").is_file()

    def signal_twice():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with after_steps(3, lambda _: [signal.raise_signal(number) for _ in range(2)]):
            train_tiny(world, tmp_path / "twice", "--mode xpe")
    assert in_child(signal_twice) == -number
    if number == signal.SIGHUP:
        usual = signal.signal(number, signal.SIG_IGN)
        with after_steps(3, lambda _: signal.raise_signal(number)):
            trained(world, tmp_path / "nohup", "--mode xpe")
        signal.signal(number, usual)


# ---- What resume starts, and what it refuses -----------------------------------------------------

def test_resume_takes_more_seeds(world, tmp_path):
    """Catches: seeds that cannot join; memory settings that cannot change on the way."""
    interrupted(world, tmp_path / "a", "--mode xpe --seeds 11", 3)
    trained(world, tmp_path / "a", "--mode xpe --seeds 11-13 --resume train.learners_at_once=2")
    trained(world, tmp_path / "b", "--mode xpe --seeds 11")
    trained(world, tmp_path / "b", "--mode xpe --seeds 12-13")
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_resume_refuses_a_part_of_a_pass(world, tmp_path):
    """Catches: seeds that go on without those they share a checkpoint with, which lose theirs."""
    interrupted(world, tmp_path, "--mode xpe --seeds 11-13", 3)
    before = results(tmp_path)
    for seeds in ("11", "12-13", "13"):
        status, _, error = train_tiny(world, tmp_path, f"--mode xpe --seeds {seeds} --resume")
        assert status == 2 and re.search("error: .*xpe-two-s.*--seeds 11-13\n", error), error
        assert results(tmp_path) == before
    trained(world, tmp_path, "--mode xpe --seeds 11-13 --resume")


def test_resume_refuses_other_settings_by_name(world, tmp_path):
    """Catches: a run that goes on under other settings or data than it began with, or a refusal
    that wrote first."""
    corpus = shutil.copytree(world / "data", tmp_path / "data")
    arguments = f"--mode xpe --data {corpus} prompt.encoder=attention"
    out, path = tmp_path / "out", corpus / "aaa_Latn/train.tsv"
    text = path.read_text()
    interrupted(world, out, arguments, 3)
    before = results(out)
    for setting, name in (
            ("train.rate=1.0e-2", "rate"), ("train.steps=48", "steps"),
            ("backbone.dropout=false", "dropout"), ("train.amp=fp16", "amp"),
            ("prompt.length=5", "(prompt.length|max_length)"), ("prompt.reads=mean", "reads"),
            ("prompt.heads=4", "prompt.heads"), ("", "data")):
        if name == "data":
            path.write_text(text.replace("star", "song", 1))
            data.read_tsv.cache_clear()         # as in another process
        status, _, error = train_tiny(world, out, f"{arguments} --resume {setting}")
        assert status == 2
        assert re.search(f"checkpoint.pt: {name} was .*, not .*same settings", error)
        assert results(out) == before
    path.write_text(text)
    data.read_tsv.cache_clear()
    trained(world, out, f"{arguments} --resume")
    status, _, error = train_tiny(world, out, f"{arguments} --resume train.rate=1.0e-2")
    assert status == 2 and "prompt.json: rate was" in error     # of a finished run, too


# ---- Two processes, full disks -------------------------------------------------------------------

def test_two_processes_do_not_train_one_run(world, tmp_path):
    """Catches: the same command twice at once: both would write into one folder."""
    refusals = []

    def start_again(_):
        for arguments in ("--seeds 11", "--seeds 11 --resume", "--seeds 12 --resume"):
            refusals.append(train_tiny(world, tmp_path, f"--mode xpe {arguments}"))
    with after_steps(3, start_again):
        trained(world, tmp_path, "--mode xpe --seeds 11-12")
    for (status, _, error), told in zip(refusals, ("s11 exists", "s11: another process is training",
                                                   "s12: another process is training")):
        assert status == 2 and told in error
    assert [len(read_log(folder)) for folder in tmp_path.iterdir()] == [6, 6]


def test_a_file_system_without_locks(world, tmp_path, monkeypatch):
    """Catches: a lock that is not supported taken for another process."""
    def flock(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", flock)
    status, _, error = train_tiny(world, tmp_path, "--mode xpe")
    assert status == 0 and "cannot lock files (Operation not supported)" in error


@pytest.mark.parametrize("begun, limit, file", [
    (False, 50, "config.yaml"), (True, 50, "metrics.jsonl"), (True, 20000, "checkpoint.pt")])
def test_a_full_disk_costs_one_line_and_no_work(world, tmp_path, begun, limit, file):
    """Catches: a traceback from a failed write, an error without its file, a checkpoint torn by it,
    temporary files that keep a disk full."""
    arguments = "--mode xpe --steps 6 --seeds 11-12 train.evaluate_every=1"
    trained(world, tmp_path / "once", arguments)
    if begun:
        interrupted(world, tmp_path / "often", arguments, 3)
    # no file may grow beyond the limit: this gives EFBIG where a full disk gives ENOSPC
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    status, _, error = train_tiny(world, tmp_path / "often", arguments + " --resume")
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert status == 2
    assert re.search(f"^error: .*s1[12]/{file}: .*(File too large|write failed)", error, re.M)
    assert not list(tmp_path.glob("often/*/.*"))
    trained(world, tmp_path / "often", arguments + " --resume")
    assert results(tmp_path / "often") == results(tmp_path / "once")


def test_torchrun_deals_the_learners_out(world, tmp_path, monkeypatch):
    """Catches: a seed that is trained twice or by nobody; a process that refuses the folders of a
    faster one."""
    arguments = "--mode xpe --steps 8 --seeds "
    for seeds in ("11,13", "12,14"):
        trained(world, tmp_path / "once", arguments + seeds)
    arguments += "11-14"
    for step in (3, 0):
        for rank in (0, 1):
            for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2).items():
                monkeypatch.setenv(name, str(value))
            if step:
                interrupted(world, tmp_path / "two", arguments, step)
            else:
                trained(world, tmp_path / "two", arguments + " --resume")
    assert results(tmp_path / "two") == results(tmp_path / "once")


# ---- Hostile files -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run folder with a prompt, the checkpoint of an interrupted pass, and some sentences."""
    out = tmp_path_factory.mktemp("stopped")
    interrupted(world, out, "--mode xpe", 9)
    checkpoint = (out / "xpe-two-s11/checkpoint.pt").read_bytes()
    folder, = trained(world, out, "--mode xpe --resume")
    (folder / "checkpoint.pt").write_bytes(checkpoint)
    shutil.copy(world / "data/aaa_Latn/train.tsv", folder)
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    """Such a folder to damage."""
    return shutil.copytree(stopped, tmp_path / "xpe-two-s11")


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def saved(value):
    """What torch.save writes -> bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read_in_one_line(world, path):
    """Use a run folder whose file at `path` is damaged; it must be read, or refused in one line."""
    if path.name == "checkpoint.pt":
        (path.parent / "prompt.json").unlink(missing_ok=True)
        status, told, error = train_tiny(world, path.parent.parent, "--mode xpe --resume")
    elif path.name == "train.tsv":      # the run folder is then a language of a corpus
        status, told, error = run(data.main, "--data", path.parent.parent)
    else:
        status, told, error = run(evaluate.main, path.parent, "--text", "star")
    *_, line = ["", *error.splitlines()]
    assert len(line) < 1200 and (status == 0 or line.startswith("error: ") or "diverged" in told)
    return status, line


DAMAGED = {
    "train.tsv": [b"", b"\xff", b"text\n", b"category\ttext\n", b"category\ttext\nfood\ta\n",
                  b"category\ttext\ntravel\n", b'category\ttext\ntravel\t"a'],
    "prompt.json": [b"", b"[]", b"[" * 100000, b"{}", b'{"format": 1}', b"\xff\xfe{"],
    "prompt.safetensors": [b"", b"\xff" * 100, b"\2\0\0\0\0\0\0\0{}"],
    "config.yaml": [b"train: {", b"train: {rate: fast}", b"train: {stepz: 1}", b"- 1", b"train: 1",
                    b"train: {rate: 1, rate: 2}", b"\0", b"a\xff: 1", b"[" * 1500,
                    b"train: !!python/object/apply:os.system [exit]"],
    "checkpoint.pt": [b"", b"garbage", saved([1]), saved({"step": 1}),
                      saved({"step": 4, "random": [], "learners": {"xpe-two-s11": {}}})]}


@pytest.mark.parametrize("name, content", [(name, content) for name, contents in DAMAGED.items()
                                           for content in contents], ids=str)
def test_a_damaged_file_is_named(world, copy, name, content):
    """Catches: a traceback, or an error that does not say which file is meant."""
    (copy / name).write_bytes(content)
    status, line = read_in_one_line(world, copy / name)
    assert status == 2 and f"{copy}/{name.partition('.')[0]}." in line


@pytest.mark.parametrize("change", [
    {"labels": 7}, {"labels": ["a"]}, {"sources": [1]}, {"kind": 1},
    {"max_length": "9"}, {"reads": "x"}, {"head": {}}, {"head": None}, {"backbone": []}, {"data": 7},
    {"prompt": {"width": 10 ** 9}}, {"prompt": {"width": -1}}, {"prompt": None}],
    ids=str)
def test_a_damaged_prompt_json(world, copy, change):
    """Catches: facts of another type or size that end in a traceback or a huge allocation."""
    meta = runs.read_json(copy / "prompt.json")
    (copy / "prompt.json").write_text(json.dumps({**meta, **change}))
    assert read_in_one_line(world, copy / "prompt.json")[0] == 2


@pytest.mark.parametrize("name", DAMAGED)
def test_chance_damage_is_read_or_refused_in_one_line(world, copy, name):
    """Catches: what a bit flip, a cut or a doubled part turns into a traceback."""
    draw, path = random.Random(name), copy / name
    good, refusals = path.read_bytes(), 0
    for _ in range(15):
        raw = bytearray(good)
        for _ in range(draw.choice((1, 2, 8))):
            i, j = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
            raw[i:i + draw.randrange(9)] = draw.choice((draw.randbytes(8), b"\xff" * 8, raw[i:j]))
        if draw.random() < 0.3:
            del raw[draw.randrange(len(raw)):]
        path.write_bytes(raw)
        refusals += read_in_one_line(world, path)[0] == 2
    assert refusals > 3


def test_no_code_of_a_file_is_run(world, copy, tmp_path):
    """Catches: any reader that unpickles, and trust in a backbone that a run folder from elsewhere
    asks for: whoever shares a prompt would run code on the reader's machine."""
    marker = tmp_path / "marker"
    for number, bomb in enumerate((saved(Payload(marker)), pickle.dumps(Payload(marker), 2))):
        for name in DAMAGED:
            folder = shutil.copytree(copy, tmp_path / f"{number}{name}" / copy.name)
            (folder / name).write_bytes(bomb)
            assert read_in_one_line(world, folder / name)[0] == 2
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    marker.rmdir()              # so the payload would have worked


def test_no_code_of_a_backbone_is_run_unasked(world, copy, tmp_path, monkeypatch):
    """Catches: trust given by default, or by the config.yaml of a run that someone else wrote."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    marker, evil = tmp_path / "marker", tiny_backbone(tmp_path / "evil")
    (evil / "code.py").write_text(f"""
import os
from transformers import XLMRobertaConfig as EvilConfig, XLMRobertaModel as EvilModel
os.makedirs({str(marker)!r}, exist_ok=True)
""")
    settings = runs.read_json(evil / "config.json")
    settings.update(model_type="evil", auto_map={"AutoConfig": "code.EvilConfig",
                                                 "AutoModel": "code.EvilModel"})
    (evil / "config.json").write_text(json.dumps(settings))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("trust_remote_code: false",
                                                 "trust_remote_code: true"))
    assert run(evaluate.main, copy, "--text", "star", "--backbone", evil)[0] == 2
    arguments = f"--mode xpe --steps 2 --backbone {evil}"
    status, _, error = train_tiny(world, tmp_path / "out", arguments)
    assert status == 2 and "trust_remote_code" in error and not marker.exists()
    trust = " backbone.trust_remote_code=true"      # whoever says so gets it
    in_child(lambda: train_tiny(world, tmp_path / "out", arguments + trust))
    assert marker.exists()


def test_a_terminal_that_cannot_show_a_letter(copy, monkeypatch):
    """Catches: output that ends halfway at the first letter that its encoding does not have."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit) as end:
        data.run_main(lambda: evaluate.main([str(copy), "--text", "star", "Привет", "beach"]))
    lines = raw.getvalue().decode("ascii").splitlines()
    assert not end.value.code and len(lines) == 3 and lines[1].endswith(r"\u0432\u0435\u0442")
