"""Everything on disk of a run: its prompt, its folder and lock, its checkpoint; finding a run.

No part of the paper. A run folder holds prompt.safetensors (the trained tensors), prompt.json (how
to use them; written last, it makes the folder a finished run), config.yaml (the resolved settings;
its first line is the command), metrics.jsonl, backbone.safetensors (of full fine-tuning), while
training checkpoint.pt, and after scoring test.csv, test.json and test_predictions.csv. A run that
diverged before it had a prompt has diverged.txt instead.

    run = Run("runs/xpe-joshi5-s11")        # .modules, .meta, .config: see Run
    modules, meta = load_prompt("runs/xpe-joshi5-s11")

Read downwards: files, a prompt on disk, a run in training, finding a run.
"""
import csv
import io
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

import xpe
from config import read_config
from data import check, locate, read_text, reading, short_hash, warn

try:
    import fcntl        # locks a run folder; Windows has none: two commands could train one run
except ImportError:
    fcntl = None

FORMAT = 2              # of prompt.json
DIVERGED = "diverged.txt"


# ---- Files ---------------------------------------------------------------------------------------

def write_atomically(path, content):
    """Write bytes, or what content(file) writes: `path` is the old file or the whole new one.

    ValueError with the path if the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid():08}")    # open_log clears away old ones
    try:
        with reading(path), open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)       # there if it failed


def write_json(path, value):
    """Write a value as a JSON file, atomically; ValueError for NaN and infinity."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def read_json(path):
    """The value in a JSON file; ValueError with the path for anything else."""
    with reading(path):
        return json.loads(path.read_bytes())


def read_tensors(path):
    """The tensors of a .safetensors file; ValueError with the path if it is damaged."""
    with reading(path):
        return load(path.read_bytes())


def write_csv(path, columns, rows):
    """Write names of the columns, and rows (lists of fields), as a CSV file, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_atomically(path, text.getvalue().encode())


# ---- A prompt on disk ----------------------------------------------------------------------------

def save_prompt(folder, modules, meta):
    """Write the modules of a run, "prompt" (unless it has none) and "head", to a folder that
    exists; meta: see `load_prompt`."""
    content = save(modules.state_dict(), {"format": "pt"})
    write_atomically(folder / "prompt.safetensors", content)
    configs = {name: module.config for name, module in modules.items()}
    write_json(folder / "prompt.json", {"prompt": None, **meta, "format": FORMAT, **configs})


def load_prompt(folder):
    """Read what save_prompt wrote -> (modules, an nn.ModuleDict; meta).

    meta, from prompt.json: kind, sources, prompt and head (constructor arguments), reads, labels,
    max_length, backbone {name, revision, ...}, training {...}, and whatever else was saved.
    Raises FileNotFoundError, or ValueError with the file and what is wrong in it.
    """
    path = Path(folder) / "prompt.json"
    problem = why_no_run(path.parent)
    if problem:
        raise FileNotFoundError(f"{folder}: {problem}")
    meta = read_json(path)
    tensors = read_tensors(path.with_name("prompt.safetensors"))
    with reading(path):
        check(meta["format"] == FORMAT, f"format {meta['format']}, expected {FORMAT}")
        texts = [meta["kind"], meta["reads"], *meta["labels"], *meta["sources"]]
        for place in (meta["backbone"], meta["data"]):
            texts += place["name"], place["revision"]
        check(all(isinstance(text, str) for text in texts) and type(meta["max_length"]) is int,
              "kind, reads, labels, sources, name, revision or max_length are of another type")
        return restore_prompt(meta, tensors), meta


def restore_prompt(meta, tensors):
    """What prompt.json and prompt.safetensors hold -> modules, an nn.ModuleDict.

    Raises an error for anything that is missing, of another type or shape, or not finite.
    """
    modules = nn.ModuleDict()
    with torch.device("meta"):      # nothing is drawn, and no memory touched
        if meta["prompt"] is not None:
            modules["prompt"] = xpe.SoftPrompt(**meta["prompt"])
        modules["head"] = xpe.ClassificationHead(**meta["head"])
    modules.to_empty(device="cpu").load_state_dict(tensors)         # copies them, in float32
    check(all(tensor.isfinite().all() for tensor in tensors.values()), "numbers are not finite")
    check(len(meta["labels"]) == meta["head"]["classes"],
          f"{len(meta['labels'])} labels, but {meta['head']['classes']} classes")
    return modules


def why_no_run(folder):
    """What is wrong with a folder that does not hold a finished run, or None for one that does."""
    if (folder / "prompt.json").is_file():
        return None
    if (folder / "metrics.jsonl").is_file():
        return outcome(folder) or "its training has not come to an end (--resume goes on)"
    return "has no prompt.json: not a run (a folder of runs? name FOLDER/*)"


# ---- A run in training ---------------------------------------------------------------------------

def open_log(folder):
    """metrics.jsonl of a run, open and locked while the run is trained: nobody else can train it.

    Raises FileExistsError if another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "metrics.jsonl", "a")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # ends with the process
    except BlockingIOError:
        raise FileExistsError(f"{folder}: another process is training this run") from None
    except OSError as error:
        warn(f"{folder}: this file system cannot lock files ({error.strerror}): make sure that no "
             f"other process trains this run")
    for left in folder.glob(".*.????????"):
        left.unlink()           # what a killed process was about to rename: write_atomically
    return file


def outcome(folder):
    """Why the training of a run has ended: "all steps", "diverged: ..."; "" if it has not."""
    if (folder / DIVERGED).is_file():
        return (folder / DIVERGED).read_text()
    path = folder / "prompt.json"
    if not path.is_file():
        return ""
    meta = read_json(path)
    with reading(path):
        return meta["training"]["stopped"]


def command_of(folder):
    """The command that a run was begun with: the first line of its config.yaml."""
    path = folder / "config.yaml"
    return read_text(path).partition("\n")[0].removeprefix("# ") if path.is_file() else ""


def save_checkpoint(path, learners, step):
    """Write the state of a whole pass: {step, random, learners: {folder name: state}}."""
    random = [torch.get_rng_state()]
    if torch.cuda.is_available():
        random.append(torch.cuda.get_rng_state())
    state = {"step": step, "random": random,
             "learners": {learner.folder.name: learner.state_dict() for learner in learners}}
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path):
    """Read what save_checkpoint wrote; ValueError for a file that is cut, or not a checkpoint."""
    with reading(f"{path}: cut short or not a checkpoint (remove it and the run starts over)"):
        # weights_only: tensors and plain values; no code in a hostile file is run
        state = torch.load(path, map_location="cpu", weights_only=True)
        check(int(state["step"]) > 0 and state["learners"].keys(), "lacks its step or learners")
        return state


def differences(before, now, ignore=()):
    """Two dicts of settings -> "rate was 0.1, not 0.2; ..." for what is not equal."""
    return "; ".join(f"{key} was {before[key]!r}, not {value!r}" for key, value in now.items()
                     if key not in ignore and before.get(key, value) != value)


# ---- Finding a run -------------------------------------------------------------------------------

class Run:
    """A trained prompt and all that is needed to use it.

    where: a run folder, a folder of the authors' release, or a name on the hub (name@branch).
    backbone, data: a folder or hub name instead of the run's own. trust: run the code that comes
    with the backbone. Raises ValueError for what is not there or cannot be used, FileNotFoundError
    for a folder that is not a run.

    .name, .folder; .modules, .meta (see load_prompt); .prompt, or None; .config (see config.yaml);
    .sources, codes of languages; .results: the folder for its scores, None if backbone or data are
    not its own.
    """

    def __init__(self, where, backbone=None, data=None, trust=False):
        where = str(where)
        name, _, branch = where.partition("@")          # the @ of a folder is part of its name
        wanted = {"folder": where, "name": name, "revision": branch or "main"}
        self.folder, place = locate(wanted, "model", ["*.json", "*.safetensors", "config.yaml"])
        on_hub = place["revision"] != "local"
        self.name = where.replace("/", "--") if on_hub else self.folder.name
        path = self.folder / "config.yaml"
        self.config = read_config(path if path.is_file() else None)
        released = (self.folder / "adapter_config.json").is_file()
        if released:
            from formats import read_authors
            self.modules, self.meta = read_authors(self.folder, self.name)
        else:
            self.modules, self.meta = load_prompt(self.folder)
        self.prompt = self.modules["prompt"] if self.meta["prompt"] else None
        # a folder of the authors and the hub's cache are not ours to write to
        self.results = Path("runs") / self.name if released or on_hub else self.folder
        self.sources = self.meta["sources"]
        self.config["backbone"]["trust_remote_code"] = trust    # never the run's own file's to say
        for section, given in (("backbone", backbone), ("data", data)):
            own = self.meta.setdefault(section, dict(self.config[section]))
            if given and given != own["name"]:
                self.results = None
                self.config[section]["name"] = given
                own.update(name=given, revision="main", folder=given)

    def changes(self, identity):
        """Type, weights and tokenizer (see backbone.load_backbone) against those of its training ->
        "fingerprint was ..., not ...", or "" if they are the same or it does not say."""
        own = {**self.meta, **self.meta["backbone"]}
        return differences(own, identity, ("name", "revision", "folder"))

    def fingerprint(self):
        """A short hash of the trained tensors."""
        numbers = nn.utils.parameters_to_vector(self.modules.parameters())
        return short_hash(numbers.detach().numpy().tobytes())


def method_name(kind, prompt_config):
    """The name of a method in tables and folders: spt, xpe, dual30, xpe-lstm ..."""
    name = kind
    if kind == "dual":
        name += str(round(100 * prompt_config["ratio"]))
    if kind in ("dual", "xpe") and prompt_config["encoder"] != "mlp":
        name += "-" + prompt_config["encoder"]
    return name
