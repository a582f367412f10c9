"""What test_train.py and test_robustness.py share: a tiny world to train in, ways to disturb it.

    make_world      a backbone, a corpus and a configuration, for runs that take a second
    at_step         signals and kills at chosen steps
    Forge           real processes that start in milliseconds
    serve_hub       a stand-in for the hub that answers well or badly
"""
import contextlib
import copy
import functools
import hashlib
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import safetensors.torch
import torch

import config
import train
from helpers import write_backbone, write_corpus

HERE = Path(__file__).resolve().parent.parent       # the repository


# ---- A tiny world -------------------------------------------------------------------------------

CONFIG = """
sources: two
groups: {two: [aaa_Latn, bbb_Latn], three: [aaa_Latn, bbb_Latn, ccc_Latn], others: [ccc_Latn]}
targets: {Others: others}
prompt: {length: 4, dropout: 0.2}
train: {batch_size: 4, steps: 24, evaluate_every: 4, checkpoint_every: 4, patience: 0, amp: off,
        rate: 3.0e-2, standard_rate: 1.0e-1, encoded_rate: 1.0e-1}
adapt: {steps: 8, patience: 0}
full: {epochs: 3, rate: 3.0e-3, accumulate: 1}
evaluate: {after_training: false}
"""


def make_world(root):
    """A folder with backbone/, data/ and config.yaml."""
    write_backbone(root / "backbone")
    write_corpus(root / "data", sizes=(14, 14, 7))
    (root / "config.yaml").write_text(CONFIG)
    return root


def remember_default_config():
    """Read config.yaml once: each run reads it twice, and that takes half of a short run."""
    real_read = config.read_yaml
    if hasattr(real_read, "remembers"):
        return
    read_default = functools.cache(lambda: real_read(HERE / "config.yaml"))

    def read_yaml(path):
        if Path(path) == HERE / "config.yaml":
            return copy.deepcopy(read_default())
        return real_read(path)
    read_yaml.remembers = True
    config.read_yaml = read_yaml


def command(world, out, *more):
    """Arguments of train.py: XPE, three seeds, this world. Later arguments win."""
    arguments = ["--sources", world / "config.yaml", "--data", world / "data",
                 "--backbone", world / "backbone", "--out", out, "--device", "cpu",
                 "--mode", "xpe", "--seeds", "11-13", *more]
    return [str(argument) for argument in arguments]


def content_of(out):
    """All files that finished runs leave, as they must be equal bit for bit -> {path: content}.

    Only the seconds in prompt.json are left out.
    """
    found = {}
    for path in sorted(Path(out).rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.name == "prompt.json":
            content = json.loads(content)
            del content["training"]["seconds"]
        found[str(path.relative_to(out))] = content
    return found


def read_log(folder):
    """metrics.jsonl of a run folder -> list of dicts."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- Disturbances -------------------------------------------------------------------------------

class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does: nothing may catch it."""


def at_step(monkeypatch, events):
    """Let things happen once, after a learner's step number n: {n: signal or exception}."""
    real_step = train.Learner.step
    left = dict(events)

    def step(self, clip):
        real_step(self, clip)
        event = left.pop(self.schedule.last_epoch, None)
        if isinstance(event, signal.Signals):
            os.kill(os.getpid(), event)
        elif event is not None:
            raise event
    monkeypatch.setattr(train.Learner, "step", step)


def watch_steps(monkeypatch):
    """-> a list that fills with (seed, number) of every step that is taken."""
    real_step = train.Learner.step
    taken = []

    def step(self, clip):
        real_step(self, clip)
        taken.append((self.seed, self.schedule.last_epoch))
    monkeypatch.setattr(train.Learner, "step", step)
    return taken


# ---- Real processes -----------------------------------------------------------------------------

FORGE = """
import json, os, sys, traceback
sys.path[:0] = [{here!r}, {tests!r}]
import huggingface_hub, train, evaluate, data, config, robust_helpers
import transformers.models.xlm_roberta.modeling_xlm_roberta, safetensors.torch
robust_helpers.remember_default_config()
config.read_config()
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
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print("pid", pid, flush=True)
    print("end", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forge:
    """One interpreter that has imported everything, and forks a child for each job of train.py.

    The children see no GPU, and no hub but the stand-in. Ctrl-C reaches them even where the tests
    themselves run in the background, with SIGINT ignored.
    """

    def __init__(self, folder, hub_port):
        self.folder, self.jobs, self.running = folder, 0, False
        environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
                           PYTHONDONTWRITEBYTECODE="1", HF_HOME=str(folder / "hf"),
                           HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="0",
                           HF_ENDPOINT=f"http://127.0.0.1:{hub_port}")
        program = FORGE.format(here=str(HERE), tests=str(HERE / "tests"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], text=True, env=environment, cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=listen_to_ctrl_c)

    def start(self, argv=(), before=""):
        """-> pid of a child that runs the Python code `before`, then train.py."""
        if self.running:        # of a test that failed before its end
            self.end()
        self.jobs += 1
        self.running = True
        self.log = self.folder / f"job{self.jobs}.log"
        job = {"argv": list(map(str, argv)), "before": before, "log": str(self.log)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline().split()[1])

    def end(self):
        """-> (exit status, what it printed)."""
        self.running = False
        status = int(self.process.stdout.readline().split()[1])
        return status, self.log.read_text("utf-8", "replace")

    def run(self, argv=(), before=""):
        """Start and wait -> (exit status, what it printed)."""
        self.start(argv, before)
        return self.end()

    def close(self):
        """End the interpreter."""
        self.process.stdin.close()
        self.process.wait()


def listen_to_ctrl_c():
    """For preexec_fn: a shell without job control lets its background jobs ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, pid):
    """Wait, however slow the machine is, until condition() or the end of process `pid`."""
    while not condition():
        if Path(f"/proc/{pid}").exists() and is_zombie(pid):
            return
        os.kill(pid, 0)
        time.sleep(0.01)


def is_zombie(pid):
    """Whether a process has ended and waits for its parent to look."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "Z"


# ---- A stand-in for the hub ---------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"locked": (401, "GatedRepo"), "denied": (403, "GatedRepo"),
            "gone": (404, "RepoNotFound"), "broken": (500, "")}


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the hub does, or as it should not: the owner's name in a repository's says how.

    ok; slow; drop: each file breaks off half-way once; busy: each path answers 429 once; short,
    altered: the content is cut, or changed at equal size (altered-once: only at first); locked
    401, denied 403, gone 404, broken 500; partly: files of the third language are never served;
    dead: the connection ends; old: a backbone without safetensors; silent: nothing is answered;
    mute: only the list of files is not; stall: files stop half-way for good.
    """

    daemon_threads = True

    def __init__(self, world):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.world = world
        self.silent = False
        self.seen = []              # paths, in the order they were asked for
        self.asked_before = set()
        weights = safetensors.torch.load_file(world / "backbone" / "model.safetensors")
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        self.pickled_weights = buffer.getvalue()

    def files_of(self, kind, how):
        """{name in the repository: content} of "data" or "backbone"."""
        folder = self.world / kind
        files = {}
        for path in folder.rglob("*"):
            if path.is_file():
                files[str(path.relative_to(folder))] = path.read_bytes()
        if how == "old" and kind == "backbone":
            del files["model.safetensors"]
            files["pytorch_model.bin"] = self.pickled_weights
        if kind == "data":
            files = {f"data/{name}": content for name, content in files.items()}
        return files


class HubHandler(http.server.BaseHTTPRequestHandler):
    """One connection to the Hub."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        self.server.seen.append(path)
        asked = self.command, path
        self.first = asked not in self.server.asked_before
        self.server.asked_before.add(asked)

        parts = path.split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = "data" if parts[0] == "datasets" else "backbone"
        if parts[0] in ("datasets", "models"):
            parts = parts[1:]
        self.how, name, rest = parts[0], "/".join(parts[:2]), parts[2:]
        asks_for_list = is_api and rest[:1] == ["tree"]

        if self.how == "dead":
            return self.close()
        if self.server.silent or self.how == "silent" or (self.how == "mute" and asks_for_list):
            return self.hold()
        if self.how in REFUSALS:
            status, code = REFUSALS[self.how]
            return self.answer(status, b"{}", X_Error_Code=code, X_Error_Message="by the test")
        if self.how == "busy" and self.first:
            return self.answer(429, b"too many requests")
        if self.how == "slow":
            time.sleep(0.15)
        files = self.server.files_of(kind, self.how)
        if asks_for_list:
            return self.answer_list(files)
        if is_api:
            return self.answer_info(name, files)
        file = "/".join(rest[2:])
        if rest[:1] != ["resolve"] or file not in files:
            return self.answer_no_such_file()
        self.answer_file(file, files[file])

    def answer(self, status, content=b"", length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer_list(self, files):
        entries = []
        for name, content in files.items():
            entries.append({"type": "file", "path": name, "size": len(content),
                            "oid": git_hash(content)})
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def answer_info(self, name, files):
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                "tags": [], "siblings": siblings}
        self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def answer_no_such_file(self):
        self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    def answer_file(self, file, content):
        headers = {"ETag": f'"{git_hash(content)}"', "X_Repo_Commit": COMMIT,
                   "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, content, **headers)
        if self.how == "partly" and "ccc_Latn" in file:
            return self.answer_no_such_file()
        if self.how == "altered" or (self.how == "altered-once" and self.first):
            content = content.replace(b"road", b"goal").replace(b"travel", b"health")
        if self.how == "short":
            content = content[:len(content) // 2]
        wanted = self.headers.get("Range")
        if wanted:
            start = int(wanted.partition("=")[2].partition("-")[0])
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[start:], Content_Range=span, **headers)
        if self.how == "stall" or (self.how == "drop" and self.first):
            self.answer(200, content[:len(content) // 2], length=len(content), **headers)
            return self.hold() if self.how == "stall" else self.close()
        self.answer(200, content, **headers)

    def hold(self):
        """Say nothing until the client has gone."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(60)
            self.connection.recv(1)
            self.close()

    def close(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def git_hash(content):
    """The name that the hub gives a small file: git's hash of it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def serve_hub(world):
    """A running Hub with the data and the backbone of a world."""
    hub = Hub(world)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub
