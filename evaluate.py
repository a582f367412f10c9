"""Score prompts on every language: predictions, accuracy and macro-F1, means over the paper's target groups.

The paper's zero-shot evaluation. Runs of one backbone are scored in one pass, for each is, at inference, a
matrix of prompt rows and a head. A RUN is a folder that train.py left, a folder of the authors' release, or
its name on the hub (name@branch).

    python evaluate.py runs/xpe-joshi5-s11                # all languages: table, test.csv, .json, predictions
    python evaluate.py runs/xpe-joshi5-s11 --text "The match was decided in the last minute."
    python evaluate.py runs/* --report                    # methods x groups, mean and std over seeds
    python evaluate.py RUN --export peft DIR              # a folder that stock peft loads

Read downwards: configuration, backbone, predictions and scores, runs, the command line.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

import xpe
from data import (LABELS, Corpus, collate, download, encode, fingerprint, locate, nearest, run_main,
                  token_batches)

# On a CPU oneDNN would keep its code for 1,024 shapes: 3.0 GB after 205 languages instead of 1.4
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

HERE = Path(__file__).resolve().parent
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOICES = {"optimizer": ("adafactor", "adamw"), "schedule": ("cosine", "linear"), "amp": tuple(DTYPES),
           "frozen_weights": ("amp", "float32"), "class_weights": ("none", "balanced"),
           "encoder": xpe.ENCODERS, "reads": xpe.READS, "attention": ("sdpa", "eager")}


def read_yaml(path):
    """A mapping from a YAML file, read safely; ValueError with the path for anything else."""
    try:
        if os.path.getsize(path) > 1 << 18:
            raise ValueError("larger than 256 kB")
        text, depth = Path(path).read_text("utf-8"), 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 20 or isinstance(event, yaml.AliasEvent):    # PyYAML takes minutes for 100 kB of [
                raise ValueError("aliases (*name) are not read, nor more than 20 nested levels")
        value = yaml.safe_load(text)
        if not isinstance(value, dict):
            raise ValueError("holds no mapping of settings")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such configuration file") from None
    except Exception as e:      # PyYAML's own, and Python's for a malformed !!int, !!timestamp and the like
        raise ValueError(f"{path}: not readable as YAML: {e}") from None
    return value


def _merge(base, new, schema, path=""):
    """Lay `new` over `base`; keys and types are those of `schema`."""
    for key, value in new.items():
        name = f"{path}{key}"
        if path in ("groups.", "targets."):         # the user's own keys
            entries = value if isinstance(value, list) else [value]
            if not isinstance(key, str) or not all(isinstance(e, str) for e in entries):
                raise ValueError(f"{name} must be a list of language codes and group names")
            base[key] = value
        elif key not in schema:
            raise ValueError(f"unknown setting {name!r}{nearest(str(key), map(str, schema))}")
        elif isinstance(schema[key], dict):
            if not isinstance(value, dict):
                raise ValueError(f"{name} is a section, not the value {value!r}")
            _merge(base[key], value, schema[key], f"{name}.")
        else:
            base[key] = _typed(value, schema[key], name)


def _typed(value, default, name):
    """`value` if it has the type of `default` (an integer may stand for a float) and is in range."""
    if value is False and type(default) is str:     # YAML takes a bare `off` for false
        value = "off"
    if type(default) is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not type(default):
        number = re.fullmatch(r"(\d{1,9}(?:\.\d{0,9})?)[eE]([+-]?\d{1,2})", str(value))
        hint = f"; YAML takes it for text, write {float(number[1])}e{int(number[2]):+d}" \
            if number and type(default) is float else ""
        raise ValueError(f"{name} must be {type(default).__name__}, not {value!r}{hint}")
    allowed = CHOICES.get(name.rpartition(".")[2])
    if allowed and value not in allowed:
        raise ValueError(f"{name} cannot be {value!r}, only {', '.join(allowed)}")
    if isinstance(value, (int, float)) and not 0 <= value < 1e12:
        raise ValueError(f"{name} cannot be {value}")
    return value


def load_config(path=None, settings=()):
    """config.yaml of this folder, the file at `path` laid over it, then `section.key=value` settings -> dict.

    Every key and type is checked against config.yaml; `adapt` and `full` may hold whatever `train` holds.
    Raises ValueError that names the nearest valid key.
    """
    config = read_yaml(HERE / "config.yaml")
    own = config["train"] | {"prompt_dropout": 0.0}
    layers = [(path, read_yaml(path))] if path else []
    for setting in settings:
        try:
            name, text = setting.split("=", 1)
            value = yaml.safe_load(text)
        except Exception:       # no "=", PyYAML's own, and Python's for a malformed !!int and the like
            raise ValueError(f"--set {setting}: write section.key=value") from None
        for part in reversed(name.strip().split(".")):
            value = {part: value}
        layers.append((f"--set {setting}", value))
    for where, layer in layers:
        if where == path and isinstance(layer.get("targets"), dict):    # a file that names some names all
            config["targets"].clear()
        try:
            _merge(config, layer, {**config, "adapt": own, "full": own})
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
    return config


def resolve_group(config, group, _inside=(), _known=None):
    """A group's name, or a list of codes, groups and -exclusions -> language codes in order, each once."""
    out, known = [], {} if _known is None else _known       # each once, else they could double
    for name in [group] if isinstance(group, str) else group:
        bare = name.removeprefix("-")
        if bare in _inside or len(_inside) > 20:
            raise ValueError(f"groups.{bare} contains itself, or is nested too deeply")
        if bare in config["groups"] and bare not in known:
            known[bare] = resolve_group(config, config["groups"][bare], (*_inside, bare), known)
        codes = known.get(bare, [bare])
        if name.startswith("-"):
            out = [c for c in out if c not in codes]
        else:
            out += [c for c in codes if c not in out]
    return out


def load_backbone(name, revision="main", attention="sdpa", trust_remote_code=False):
    """-> (backbone in float32 without its pooler, tokenizer, identity): from a folder or the hub.

    identity: {name, revision (the commit, or "local"), type, fingerprint (of the weights)}. Raises
    ValueError if weights are missing, OSError with one line if it cannot be had.
    """
    import transformers
    transformers.logging.set_verbosity_error()      # it reports the unused language-model head at length
    transformers.logging.disable_progress_bar()
    folder = next((p for p in (Path(name).expanduser(), HERE / name) if p.is_dir()), None)
    commit = "local"
    if folder is None:
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise FileNotFoundError(f"backbone.name: no folder {name!r}")
        files = ["*.json", "*.txt", "*.model"] + ["*.py"] * trust_remote_code
        folder = download(name, revision, "model", [*files, "*.safetensors"])
        if not any(folder.glob("*.safetensors")):       # an older repository; read with weights_only
            folder = download(name, revision, "model", [*files, "pytorch_model*.bin"])
        commit = folder.name
    where = dict(pretrained_model_name_or_path=str(folder.resolve()), trust_remote_code=trust_remote_code)
    new = tuple(int(x) for x in transformers.__version__.split(".")[:2]) >= (4, 56)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        # always say the type: transformers 5 takes that of the checkpoint, or of its config, otherwise
        backbone, info = transformers.AutoModel.from_pretrained(
            **where, attn_implementation=attention, output_loading_info=True,
            **{"dtype" if new else "torch_dtype": torch.float32})
    except Exception as e:      # transformers, safetensors and tokenizers raise their own
        line = (str(e).strip() or "no answer").splitlines()[0][:160]
        how = "its own code would run: read it, then say backbone.trust_remote_code=true" \
            if "trust_remote_code" in str(e) else \
            "it needs --set backbone.attention=eager" if "attention implementation" in str(e) else \
            "check the folder"
        raise OSError(f"cannot load backbone {name!r}: {type(e).__name__}: {line} ({how})") from None
    missing = [k for k in info["missing_keys"] if "pooler" not in k]
    if missing:
        raise ValueError(f"backbone {name!r}: its weights lack {missing[0]} and {len(missing) - 1} more")
    if hasattr(backbone, "pooler"):
        backbone.pooler = None
    digest = hashlib.sha256()
    for key, p in backbone.named_parameters():
        digest.update(f"{key} {tuple(p.shape)}".encode() + p.detach().flatten()[:64].numpy().tobytes())
    return backbone, tokenizer, {"name": name, "revision": commit, "type": backbone.config.model_type,
                                 "fingerprint": digest.hexdigest()[:16]}


def tokenizer_fingerprint(tokenizer):
    """A short hash of the ids of a few strings: tokenizers have changed silently between versions."""
    probes = ["Hello, world! 12,345", "Привет, мир", "你好，世界", "مرحبا", "नमस्ते", "ქართული", "a\u00a0b \u200b"]
    return hashlib.sha256(repr([tokenizer(p)["input_ids"] for p in probes]).encode()).hexdigest()[:16]


def pick_device(name="auto"):
    """A torch device; `auto` takes CUDA where there is one. Raises ValueError if it cannot be used."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def place(model, device, amp, frozen_weights="amp"):
    """Put a classifier on its device -> a function that gives the autocast context to run it in.

    amp bf16 or fp16, frozen_weights `amp`: the frozen backbone itself is of that type, and nothing is cast at
    each step; prompts and heads stay float32. With `float32`, and for a trainable backbone: torch's autocast.
    """
    model.to(device)
    pure = frozen_weights == "amp" and not any(p.requires_grad for p in model.backbone.parameters())
    model.backbone.to(DTYPES[amp] if pure else torch.float32)
    return nullcontext if pure or amp == "off" else lambda: torch.autocast(device.type, DTYPES[amp])


@torch.no_grad()
def predict(model, encoded, pad_id, owner=None, budget=16384, autocast=nullcontext, progress=False):
    """Logits (n, C) in float32 on the CPU, in the order given, whatever order they were computed in.

    encoded: n lists of token ids; owner: the prompt of each (default: all 0); budget: positions of one batch.
    """
    model.eval()
    device = model.head.out.weight.device
    owner = torch.zeros(len(encoded), dtype=torch.long) if owner is None else owner
    logits = torch.full((len(encoded), model.head.config["classes"]), float("nan"))
    P = 0 if model.prompt is None else model.prompt.length
    batches = token_batches([len(x) for x in encoded], budget, P)
    for rows in tqdm(batches, unit=" batches", leave=False, disable=None if progress else True):
        ids, mask = collate([encoded[i] for i in rows], pad_id)
        with autocast():
            logits[rows] = model(ids.to(device), mask.to(device), owner[rows]).float().cpu()
    return logits


def accuracy(labels, predicted):
    """Percent correct."""
    return 100.0 * float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def macro_f1(labels, predicted):
    """Percent: the mean of F1 over the classes that occur as label or prediction (scikit-learn's `macro`)."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    return 100.0 * float(np.mean([
        2 * np.sum((labels == c) & (predicted == c)) / (np.sum(labels == c) + np.sum(predicted == c))
        for c in np.union1d(labels, predicted)]))


def majority(labels):
    """Percent of the most frequent label: what a classifier reaches that looks at nothing."""
    return 100.0 * float(np.bincount(labels).max()) / len(labels)


def group_means(scores, config, sources):
    """language -> accuracy in, {title: (mean over languages, languages scored, languages in the group)} out.

    The sources stand first, on their own; they are taken out of every target group: not zero-shot.
    """
    groups = {"Sources": sources}
    for title, group in config["targets"].items():
        groups[title] = [c for c in resolve_group(config, group) if c not in sources]
    have = {title: [scores[c] for c in codes if c in scores] for title, codes in groups.items()}
    return {t: (float(np.mean(have[t])) if have[t] else None, len(have[t]), len(groups[t])) for t in groups}


def method_name(kind, prompt):
    """The name of a method in tables and folders: xpe, dual30, xpe-lstm ..."""
    name = f"dual{round(100 * prompt['ratio'])}" if kind == "dual" else kind
    return f"{name}-{prompt['encoder']}" if kind in ("dual", "xpe") and prompt["encoder"] != "mlp" else name


class Run:
    """A trained prompt with everything needed to use it. Raises as xpe.load_prompt and load_config do."""

    def __init__(self, where, backbone=None, data=None, trust=False):
        folder, self.name = Path(where), Path(where).resolve().name
        if not folder.is_dir():
            name, _, revision = str(where).partition("@")
            if not re.fullmatch(r"\w[\w-]*/[\w.-]+", name) or name.startswith("runs/"):
                raise FileNotFoundError(f"{where}: no such run folder")
            folder = download(name, revision or "main", "model", ["*.json", "*.safetensors", "config.yaml"])
            self.name = str(where).replace("/", "--")
        self.folder, saved = folder, folder / "config.yaml"
        self.prompt, self.head, self.meta = xpe.load_prompt(folder)
        self.config = load_config(saved if saved.is_file() else None)
        self.released = not (folder / "prompt.json").is_file()          # by the paper's authors
        if self.released:       # what their files do not say, the names of their repositories and branches do
            if len(self.meta["labels"]) == len(LABELS):
                self.meta["labels"] = list(LABELS)
            seed, group = (re.search(x, self.name) for x in (r"seed-0*(\d+)", "-(seen|joshi5)"))
            self.meta |= {"sources": resolve_group(self.config, group[1] if group else "joshi5"),
                          "seed": int(seed[1]) if seed else 1}
            if not group:
                warn(f"{self.name}: its name says no source group, taken as joshi5")
        # a released prompt and the hub's cache are not ours to write to
        self.results = Path("runs") / self.name if self.released or not Path(where).is_dir() else folder
        self.sources = self.meta.get("sources")
        if not isinstance(self.sources, list) or not all(isinstance(s, str) for s in self.sources):
            raise ValueError(f"{folder / 'prompt.json'}: 'sources' must be a list of language codes")
        self.config["backbone"]["trust_remote_code"] = trust    # ours to say, never the run's own file's
        own = self.meta["training"].get("settings") or {}
        if not isinstance(own, dict):
            raise ValueError(f"{folder / 'prompt.json'}: 'settings' must be an object")
        self.numerics = tuple(_typed(own.get(key, self.config["train"][key]), "", f"{folder}: train.{key}")
                              for key in ("amp", "frozen_weights"))
        met = self.meta.get("data") if isinstance(self.meta.get("data"), dict) else {}
        for section, name, then in ("backbone", backbone, self.meta["backbone"]), ("data", data, met):
            self.config[section] |= {"name": name, "revision": "main"} if name else {
                k: "main" if (k, v) == ("revision", "local") else v
                for k, v in then.items() if k in ("name", "revision") and isinstance(v, str)}


def groups_of(runs):
    """Runs -> groups, lists of runs that can share one pass through the backbone, in order."""
    groups = {}
    for run in runs:
        own = str(run.folder) if run.meta["kind"] == "full" else ""
        key = json.dumps([own, run.prompt and run.prompt.length, run.head.config, run.numerics,
                          *(run.meta[x] for x in ("reads", "max_length", "labels")),
                          *(run.config[x] for x in ("backbone", "data"))], sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def warn(line):
    """One line on standard error that does not end the program."""
    tqdm.write(f"warning: {line}", file=sys.stderr)


def join(runs, device):
    """Runs of one group -> (PromptedClassifier with K prompts, tokenizer, autocast). Warns when backbone or
    tokenizer are not those that the runs were trained with; raises ValueError if it cannot fit."""
    config, meta = runs[0].config, runs[0].meta
    b = config["backbone"]
    backbone, tokenizer, identity = load_backbone(b["name"], b["revision"], b["attention"],
                                                  b["trust_remote_code"])
    for run in runs:
        for what, now, then in (
                ("backbone's weights", identity["fingerprint"], run.meta["backbone"].get("fingerprint")),
                ("tokenizer", tokenizer_fingerprint(tokenizer), run.meta.get("tokenizer"))):
            if then and now != then:
                warn(f"{run.name}: the {what} ({now}) are not what it was trained with ({then})")
    if meta["kind"] == "full":
        path = runs[0].folder / "backbone.safetensors"
        try:
            backbone.load_state_dict(xpe.read_tensors(path))
        except RuntimeError as e:
            raise ValueError(f"{path}: {' '.join(str(e).split())[:200]}") from None
    prompt = xpe.stack([r.prompt.collapse() for r in runs]) if runs[0].prompt is not None else None
    model = xpe.PromptedClassifier(backbone, prompt, xpe.stack([r.head for r in runs]), meta["reads"],
                                   frozen=meta["kind"] != "full")       # as it was trained, so it is scored
    return model, tokenizer, place(model, device, *runs[0].numerics)


def ask(runs, texts, device):
    """Probabilities, a tensor (n, C) for each run of a group; texts: for each run a list of n.
    Raises ValueError for what is no finite number, and as join does."""
    model, tokenizer, autocast = join(runs, device)
    sizes, texts = [len(own) for own in texts], sum(texts, [])
    different = list(dict.fromkeys(texts))
    ids = dict(zip(different, encode(different, tokenizer, runs[0].meta["max_length"])))
    owner = torch.arange(len(runs)).repeat_interleave(torch.tensor(sizes))
    logits = predict(model, [ids[text] for text in texts], tokenizer.pad_token_id or 0, owner,
                     runs[0].config["evaluate"]["tokens"], autocast, progress=True)
    if not logits.isfinite().all():
        raise ValueError(f"{', '.join(r.name for r in runs)}: logits that are not finite numbers")
    return logits.softmax(1).split(sizes)


def score(runs, split, languages, device):
    """Score runs of one group on a split -> {run name: (rows, predictions, identity)}.

    languages: for each run the list of its languages, or None for all. rows: a dict for each language
    (language, n, accuracy, macro_f1, majority); predictions: see prediction_rows.
    """
    data, names = runs[0].config["data"], runs[0].meta["labels"]
    folder, revision = locate(data["name"], data["revision"])
    corpus, out = Corpus(folder), {}
    if list(corpus.labels) != names:
        raise ValueError(f"{folder} has the labels {', '.join(corpus.labels)}; {runs[0].name} was trained on "
                         f"{', '.join(names)}")
    wanted = [list(dict.fromkeys(own or corpus.languages())) for own in languages]
    read = {c: corpus.read(c, split) for c in dict.fromkeys(sum(wanted, []))}
    answers = ask(runs, [[s.text for c in own for s in read[c]] for own in wanted], device)
    for run, own, p in zip(runs, wanted, answers):
        rows, sentences = [], [(c, s) for c in own for s in read[c]]
        for c, part in zip(own, p.split([len(read[c]) for c in own])):
            labels, predicted = np.array([s.label for s in read[c]]), part.argmax(1).numpy()
            rows.append(dict(language=c, n=len(labels), accuracy=accuracy(labels, predicted),
                             macro_f1=macro_f1(labels, predicted), majority=majority(labels)))
        identity = {"revision": revision, "data": fingerprint([s for _, s in sentences])}
        out[run.name] = rows, prediction_rows(sentences, p, names), identity
    return out


def prediction_rows(sentences, probabilities, names):
    """Rows of <split>_predictions.csv, made as they are written: those of ten runs would fill the memory."""
    for (language, s), p in zip(sentences, probabilities.tolist()):
        yield (language, s.index_id, names[s.label], names[p.index(max(p))], *(f"{x:.5f}" for x in p))


def to_csv(columns, rows):
    """Names of the columns, and rows -> CSV as bytes; None is an empty field."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue().encode()


def write_scores(run, split, rows, predictions, identity, folder):
    """Write <split>.csv, <split>.json and <split>_predictions.csv to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if run.released or folder.resolve() != run.folder.resolve():    # then with the prompt, for the report
        prompt = xpe.take(run.prompt, 0) if run.prompt is not None else {}
        xpe.save_prompt(folder, prompt, xpe.take(run.head, 0), run.meta)
        xpe.write_atomic(folder / "config.yaml", yaml.safe_dump(run.config, sort_keys=False).encode())
    scores = {r["language"]: r["accuracy"] for r in rows}
    means = group_means(scores, run.config, run.sources)
    summary = {"run": run.name, "kind": run.meta["kind"], "sources": run.sources, "split": split, **identity,
               "groups": {t: {"accuracy": m, "languages": n, "of": of} for t, (m, n, of) in means.items()},
               "languages": scores}
    rounded = ([f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows)
    columns = ["language", "index_id", "label", "predicted", *(f"p({x})" for x in run.meta["labels"])]
    xpe.write_atomic(folder / f"{split}_predictions.csv", to_csv(columns, predictions))
    xpe.write_atomic(folder / f"{split}.csv", to_csv(rows[0], rounded))
    xpe.write_atomic(folder / f"{split}.json", json.dumps(summary, indent=1).encode() + b"\n")


def table(run, rows, every_language=True):
    """The scores of one run as text: means over groups beside chance, then every language."""
    scores, chance = ({r["language"]: r[key] for r in rows} for key in ("accuracy", "majority"))
    means, chances = (group_means(x, run.config, run.sources) for x in (scores, chance))
    lines = [run.name, f"  {'mean over languages':<20} accuracy %  chance %  languages"]
    for title, (mean, n, of) in means.items():
        if n:
            part = f" of {of}: the others were not scored" if n < of else ""
            lines.append(f"  {title:<20} {mean:10.1f} {chances[title][0]:9.1f}  {n:9}{part}")
    if every_language:
        cells = [f"{c}{'*' if c in run.sources else ' '} {a:5.1f}"
                 for c, a in sorted(scores.items(), key=lambda x: -x[1])]
        lines += ["  " + "   ".join(cells[i:i + 6]) for i in range(0, len(cells), 6)]
        lines += ["  * source language"] * any(c in run.sources for c in scores)
    return "\n".join(lines)


def report_scores(runs, split, languages, device, out=None, show=True):
    """Score runs -> rows of each; print tables; write files, of a part of the languages only with `out`."""
    done = {}
    for run in runs:
        both = [c for c in languages or () if c in run.sources]
        if both:
            warn(f"{run.name}: {', '.join(both)}: a source of this run, so not zero-shot")
    for group in groups_of(runs):
        start = time.time()
        # an adapted prompt answers for its own language
        own = [languages or ([r.meta["adapted_to"]] if "adapted_to" in r.meta else None) for r in group]
        results = score(group, split, own, device)
        seconds = time.time() - start
        for run in group:
            done[run.name], predictions, identity = results[run.name]
            if show:
                print(table(run, done[run.name], every_language=len(runs) < 4))
            if out or not languages:
                folder = Path(out) / run.name if out else run.results
                write_scores(run, split, done[run.name], predictions, identity, folder)
                if show:
                    print(f"  {folder}/{split}.csv, .json, _predictions.csv")
        n = sum(row["n"] for rows, *_ in results.values() for row in rows)
        print(f"{n:,} sentences in {seconds:.1f} s, loading included\n")
    return [done[run.name] for run in runs]


def classify(runs, texts, device):
    """Print what each run says of each text; runs of one backbone answer in one forward pass."""
    for group in groups_of(runs):
        for text, *answers in zip(texts, *ask(group, [texts] * len(group), device)):
            for run, p in zip(group, answers):
                who = f"{run.name}\t" if len(runs) > 1 else ""
                print(f"{who}{run.meta['labels'][p.argmax()]}\t{p.max():.3f}\t{text}")


def main(argv=None):
    """The command line."""
    codes = {"type": lambda text: text.split(","), "default": []}
    parser = argparse.ArgumentParser(description="Score prompts on every language; report; export.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or hub names (name@branch)")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"))
    parser.add_argument("--languages", **codes, help="codes, separated by commas (default: all)")
    parser.add_argument("--groups", **codes, help="groups of the configuration, separated by commas")
    parser.add_argument("--data", help="folder or dataset, instead of the run's own")
    parser.add_argument("--backbone", help="folder or hub name, instead of the run's own")
    parser.add_argument("--trust-remote-code", action="store_true", help="run a backbone's own code")
    parser.add_argument("--out", help="folder for the results (default: each run's own folder)")
    parser.add_argument("--text", nargs="*", help="classify these, or the lines of standard input")
    parser.add_argument("--export", nargs=2, metavar=("peft", "DIR"), help="write a folder that peft loads")
    parser.add_argument("--report", action="store_true", help="methods x groups, from scored run folders")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="is method A better than method B?")
    parser.add_argument("--plot", metavar="FILE.png", help="with --compare: gain per language (matplotlib)")
    parser.add_argument("--leave-out", default="", metavar="CODES", help="of the report: ars_Arab, say")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    args = parser.parse_args(argv)
    if args.report or args.compare or args.plot:
        import report
        return report.main(args)
    device = pick_device(args.device)
    runs = [Run(r, args.backbone, args.data, args.trust_remote_code) for r in args.runs]
    if len({r.name for r in runs}) < len(runs):
        raise ValueError("two of the runs have the same folder name")
    if args.export:
        if args.export[0] != "peft" or len(runs) != 1:
            raise ValueError("--export takes one RUN, the word peft and a new folder")
        xpe.export_peft(args.export[1], runs[0].prompt, runs[0].head, runs[0].meta)
        print(f"{args.export[1]}: for peft.PeftModel.from_pretrained(model, {args.export[1]!r})")
    elif args.text is not None:
        texts = args.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not texts or not all(t.strip() for t in texts):
            raise ValueError("--text: nothing to classify")
        classify(runs, texts, device)
    else:
        config = runs[0].config
        for group in args.groups:
            if group not in config["groups"]:
                raise ValueError(f"--groups: no group {group!r}{nearest(group, config['groups'])}")
        languages = list(dict.fromkeys(args.languages + resolve_group(config, args.groups)))
        if args.groups and not languages:
            raise ValueError(f"--groups {','.join(args.groups)}: no language is left of them")
        report_scores(runs, args.split, languages, device, args.out)
    return 0


if __name__ == "__main__":
    run_main(main)
