"""Files made to hurt: good files of every kind that we read, changed at random, and their reading.

test_robustness.py runs `fuzz` in forked children with a limit on their memory. Whatever a file
holds, it must be read, or refused in one line that names it, in little time and memory.
"""
import io
import json
import random
import re
import resource
import shutil
import signal
import traceback
import types
import warnings
from pathlib import Path

import safetensors.torch
import torch
import yaml

import config
import data
import formats
import train
import xpe
from robust_helpers import HERE, remember_default_config

ODD_VALUES = (
    None, True, False, 0, -1, 1, 7, 2 ** 31, 2 ** 63, 10 ** 30, 10 ** 5000, 0.0, -0.5, 1e308,
    5e-324, float("nan"), float("inf"), "", "0", "x", "nan", "None", "main", "xpe",
    "../../etc/passwd", "/etc/passwd", "C:\\\\con", "\0", "\n", "\ud800", "\u202e\u0644",
    "\U0001f600" * 3, "x" * 70000, "*a", "!!python/name:os.system", [], {}, [[]], {"": ""},
    {"x": {}}, [None], ["a", "a"], list(range(50)), [0, 1] * 4)
ODD_BYTES = (
    b"\0", b'"', b"\t", b"\r", b"\n", b"\xff", b"\xef\xbb\xbf", b"[" * 3000, b"{a: " * 2000,
    b"9" * 5000, b"- " * 500, b"&a [*a]", b"<<: ", b"!!int ''", b"!!float ''", b"!!bool x",
    b"!!timestamp x", b"? [a]: ", b"1:" * 50 + b"1", b"!!python/none", b"%YAML 9\n---\n",
    b"\xe2\x80\xa8", b"\xed\xa0\x80", b"0x_", b"1e999", b"9.9e+400")


# ---- Ways to change a file ----------------------------------------------------------------------

def change_bytes(raw, draw):
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
            raw[i:i] = draw.choice(ODD_BYTES)
        elif way == 5:
            raw[i:i + 8] = draw.randbytes(8)
        else:
            raw[i:i + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, b"\xff" * 4 + b"\x7f" * 4))
    return bytes(raw)


def find_places(tree):
    """-> (dict or list, key) of everything that dicts and lists hold, at any depth."""
    places, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                waiting.append(node[key])
    return places


def change_tree(tree, draw):
    """Exchange, drop, rename or nest something, somewhere in dicts, lists and tensors."""
    places = find_places(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        try:
            change_place(*draw.choice(places), draw, places)
        except (KeyError, IndexError, TypeError, ValueError, RecursionError):
            pass        # gone already, or not to be written as JSON: the other changes stand
    return tree


def change_place(node, key, draw, places):
    """One change at node[key]."""
    way = draw.randrange(8)
    if way < 4:
        node[key] = draw.choice(ODD_VALUES)
    elif way == 4:
        del node[key]
    elif way == 5 and isinstance(node, dict):
        odd = draw.choice(ODD_VALUES)
        node[odd if isinstance(odd, (str, int)) else "new"] = node[key]
    elif way == 6:
        other = draw.choice(places)[0]
        as_json = draw.random() < 0.5
        node[key] = json.loads(json.dumps(other)) if as_json else str(other)[:200]
    else:
        deep = node[key]
        for _ in range(draw.choice((2, 30, 2000))):
            deep = [deep]
        node[key] = deep


def dump_json(tree):
    """JSON with Infinity, lone surrogates and any depth; None where even that cannot be written."""
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError, TypeError):
        return None


def dump_yaml(tree):
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def dump_state(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_state(raw):
    return torch.load(io.BytesIO(raw), weights_only=True)


def change_parsed(load, dump):
    """-> a way to change a file: what it holds is read, changed and written again."""
    def change(raw, draw):
        try:
            return dump(change_tree(load(raw), draw))
        except (ValueError, RecursionError, OverflowError, yaml.YAMLError):
            return None
    return change


ODD_DTYPES = ("F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2",
              "F8_E8M0", "F4", "F6_E2M3", "U64", "F32 ", "")
# no element, and so no byte, but a huge size: what is made from the shape?
EMPTY_SHAPES = ([10 ** 12, 0], [0], [0, 10 ** 9], [2 ** 40, 0, 2 ** 20])
ODD_SHAPES = ([], [32], [1, 32], [32, 32, 1], [-1], [2 ** 62, 4], [8, 4])
ODD_NAMES = ("prompt.linears.99999999999.x", "linears." + "9" * 5000 + ".", "__metadata__", "",
             "head.out.weight")
ODD_FLOATS = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff")       # NaN, infinity, NaN


def change_header(raw, draw):
    """A safetensors file whose header lies."""
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + size]), raw[8 + size:]
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice([key for key in header if key != "__metadata__"])
        entry, way = header[name], draw.randrange(6)
        if not isinstance(entry, dict):
            continue
        if way == 0:
            entry["dtype"] = draw.choice(ODD_DTYPES)
        elif way == 1:
            entry.update(shape=draw.choice(EMPTY_SHAPES), data_offsets=[0, 0])
        elif way == 2:
            entry["shape"] = draw.choice(ODD_SHAPES)
        elif way == 3:
            header[draw.choice((*ODD_NAMES, f"{name}x"))] = header.pop(name)
        elif way == 4 and len(body) >= 4:
            i = draw.randrange(len(body) // 4) * 4
            body = body[:i] + draw.choice(ODD_FLOATS) + body[i + 4:]
        else:
            change_tree(header, draw)
    head = dump_json(header)
    return None if head is None else len(head).to_bytes(8, "little") + head + body


# ---- Good files of every kind, and how they are read --------------------------------------------

AUTHORS_CONFIG = {
    "peft_type": "XPE", "encoder_ratio": 1.0, "token_dim": 16, "num_virtual_tokens": 4,
    "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 4, "encoder_num_layers": 2,
    "encoder_dropout": 0.1, "encoder_num_heads": 8, "base_model_name_or_path": "some/backbone"}


def write_authors(folder, run_folder):
    """A folder as the authors' toolkit writes it, from a run folder of ours (XPE with an MLP)."""
    theirs = {}
    for name, tensor in xpe.read_tensors(run_folder / "prompt.safetensors").items():
        section, _, rest = name.partition(".")
        if section == "head":
            name = f"base_model.classifier.{rest}"
        elif rest == "encoded":
            name = "prompt_encoder.xpe_embedding.weight"
        else:
            name = f"prompt_encoder.xpe_head.{rest.removeprefix('encoder.')}"
        theirs[name] = tensor
    folder.mkdir()
    safetensors.torch.save_file(theirs, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(AUTHORS_CONFIG))


def write_format_1(folder, run_folder):
    """A run folder of the version before, from one of ours (XPE with an MLP)."""
    old = {}
    for name, tensor in xpe.read_tensors(run_folder / "prompt.safetensors").items():
        for i in range(3):
            name = name.replace(f"prompt.encoder.{3 * i}.", f"prompt.encoder.linears.{i}.")
        old[name.replace("head.out_proj", "head.out")] = tensor
    folder.mkdir()
    safetensors.torch.save_file(old, folder / "prompt.safetensors")
    meta = xpe.read_json(run_folder / "prompt.json")
    (folder / "prompt.json").write_text(json.dumps(dict(meta, format=1)))


TSV = ('index_id\tcategory\ttext\n1\ttravel\tA road.\n2\tsports\t"He said ""goal"""\n'
       '3\thealth\t\u00e9t\u00e9 \u4f60\u597d\n')


RUN = "xpe-two-s11"


class Readers:
    """Good files of every kind in a folder of their own, and the functions that read them."""

    def __init__(self, material, folder):
        for name in (RUN, "authors", "format1"):
            shutil.copytree(material / name, folder / name)
        shutil.copytree(material / RUN, folder / "good")        # what is not changed
        for name in ("train.tsv", "config.yaml"):
            shutil.copy(material / name, folder)
        remember_default_config()

    def kinds(self):
        """{kind: (file, function that reads it, ways to change it beside change_bytes)}."""
        as_json = change_parsed(json.loads, dump_json)
        as_yaml = change_parsed(yaml.safe_load, dump_yaml)
        as_state = change_parsed(load_state, dump_state)
        return {
            "tsv": ("train.tsv", data.read_tsv, ()),
            "config": ("config.yaml", self.read_config, (as_yaml,)),
            "prompt": (f"{RUN}/prompt.json", self.read_prompt, (as_json,)),
            "tensors": (f"{RUN}/prompt.safetensors", self.read_prompt, (change_header,)),
            "format 1": ("format1/prompt.json", self.read_format_1, (as_json,)),
            "tensors of format 1": ("format1/prompt.safetensors", self.read_format_1,
                                    (change_header,)),
            "authors": ("authors/adapter_config.json", self.read_authors, (as_json,)),
            "tensors of the authors": ("authors/adapter_model.safetensors", self.read_authors,
                                       (change_header,)),
            "pass": (f"{RUN}/pass.json", self.read_pass, (as_json,)),
            "checkpoint": (f"{RUN}/checkpoint.pt", self.read_checkpoint, (as_state,))}

    def read_prompt(self, path):
        xpe.load_prompt(path.parent)

    def read_format_1(self, path):
        formats.read_format_1(path.parent)

    def read_authors(self, path):
        formats.read_authors(path.parent)

    def read_config(self, path):
        loaded = config.read_config(path)
        for group in loaded["groups"]:
            config.resolve_group(loaded, group)

    def read_pass(self, path):
        found = train.checkpoint_path(path.parent)
        assert found.parent.parent == path.parent.parent, f"led elsewhere: {found}"

    def read_checkpoint(self, path):
        learner = make_learner(path.parent)
        state = train.read_checkpoint(path)
        train.restore_checkpoint([learner], state, path)
        for name, value in vars(learner.progress).items():
            assert type(value) is type(getattr(train.Progress(), name)), "took a wrong state"
        assert learner.log_path.stat().st_size < 1 << 20, "metrics.jsonl was blown up"
        learner.release_folder()


def make_learner(folder):
    """A learner that stands before its first step, as --resume makes it for a run folder."""
    prompt, head, meta = xpe.load_prompt(folder.parent / "good")
    settings = meta["training"]["settings"]
    learner = train.Learner(folder, 11, [], {"training": {"settings": settings}})
    learner.log = open(learner.log_path, "ab")
    learner.prompt, learner.head, learner.backbone = prompt, head, None
    learner.task = types.SimpleNamespace(class_weights=torch.ones(head.config["classes"]))
    learner.prepare(settings, 8, torch.device("cpu"))
    return learner


# ---- The run of it ------------------------------------------------------------------------------

class TooSlow(BaseException):
    """More than its time for one file."""


SECONDS = 10        # of computing, not of waiting: other programs do not count
MEMORY = 768 << 20


def fuzz(material, folder, kind, count, seed, result):
    """Read `count` hostile files of one kind -> JSON at `result`: accepted, refused, and what was
    neither. The files that went wrong lie beside it."""
    warnings.simplefilter("ignore")
    folder, draw = Path(folder), random.Random(f"{kind} {seed}")
    folder.mkdir(parents=True)
    readers = Readers(Path(material), folder)
    name, read, ways = readers.kinds()[kind]
    path = folder / name
    raw = path.read_bytes()
    read(path)          # untouched it is fine, and everything is imported
    limit_memory()
    signal.signal(signal.SIGVTALRM, stop_reading)
    counts = {"accepted": 0, "refused": 0, "wrong": {}}
    for _ in range(count):
        content = draw.choice((change_bytes, *ways))(raw, draw)
        if content is None:
            content = change_bytes(raw, draw)
        path.write_bytes(content)
        outcome = read_hostile(read, path, len(content))
        if outcome in ("accepted", "refused"):
            counts[outcome] += 1
            continue
        group = re.sub(r"[0-9]+|'[^']*'", "#", outcome)[:90]
        if group not in counts["wrong"]:
            counts["wrong"][group] = outcome
            Path(f"{result}.{len(counts['wrong'])}.bin").write_bytes(content)
    Path(result).write_text(json.dumps(counts, indent=1))


def limit_memory():
    """Let this process have MEMORY more than it has now."""
    status = Path("/proc/self/status").read_text()
    size = int(re.search(r"VmSize:\s+(\d+)", status)[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def stop_reading(*_):
    raise TooSlow


def read_hostile(read, path, size):
    """Read one file -> "accepted", "refused", or what went wrong."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    outcome = "accepted"
    try:
        read(path)
    except (ValueError, OSError) as error:
        outcome = judge_message(error, path)
    except BaseException as error:
        ours = [frame for frame in traceback.extract_tb(error.__traceback__)
                if Path(frame.filename).parent == HERE]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "not in our files"
        outcome = f"{type(error).__name__}: {str(error)[:200]} ({where})"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if outcome in ("accepted", "refused") and grown > 100 + (20 * size >> 20):
        return f"took {grown} MB for a file of {size} bytes"
    return outcome


def judge_message(error, path):
    """ "refused" if the line that a user would see names the file and is no accident."""
    line = data.shorten(str(error), data.ERROR_LENGTH)
    named = path.name in line or str(path.parent) in line or line.startswith("groups.")
    if not named:
        return f"message without the file: {type(error).__name__}: {line[:200]}"
    if "memory" in line.lower():
        return f"memory: {line[:200]}"
    return "refused"
