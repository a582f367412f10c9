"""Score prompts on every language: predictions, accuracy, macro-F1, means over target groups.

The paper's zero-shot evaluation: a prompt that was trained on the sources answers for all other
languages, and the figure of a target group is the mean over its languages. A RUN is a folder that
train.py left, a folder of the authors' release, or its name on the hub (name@branch). Runs of one
backbone are scored in one pass: at inference, each is a matrix of prompt rows and a head.

    python evaluate.py runs/xpe-joshi5-s11      # a table; test.csv, .json and _predictions.csv
    python evaluate.py runs/xpe-joshi5-s11 --text "The match was decided in the last minute."
    python evaluate.py RUN --export peft DIR    # a folder that stock peft loads

and from Python:

    import evaluate
    classifier = evaluate.load("runs/xpe-joshi5-s11")
    labels, probabilities = classifier(["The match was decided in the last minute."])

Read downwards: predictions, metrics, runs, classifier, scoring, files and tables, the command.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import xpe
from backbone import (check_backbone, load_backbone, pick_attention, pick_device, pick_precision,
                      place, tokenizer_fingerprint)
from config import dump_config, read_config, resolve_group, resolve_targets, warn
from data import (LABELS, SPLITS, Corpus, collate, download, encode, fingerprint, locate, nearest,
                  run_main, token_batches)


# ---- Predictions ----

@torch.no_grad()
def predict(model, encoded, pad_id, owner=None, budget=16384, autocast=nullcontext, progress=False):
    """Logits (n, C), float32 on the CPU, in the order given, whatever order they are computed in.

    encoded: n lists of token ids. owner (n,): the prompt (0 ... K - 1) of each text, by default 0.
    budget: positions of one batch, prompt rows and padding counted. The model is left in evaluation
    mode.
    """
    model.eval()
    head = model.heads[0]
    device = head.out_proj.weight.device
    if owner is None:
        owner = torch.zeros(len(encoded), dtype=torch.long)
    lengths = [len(ids) for ids in encoded]
    batches = token_batches(lengths, budget, model.prompt_length)
    hide_progress = None if progress else True          # None: hidden unless stderr is a terminal
    logits = torch.full((len(encoded), head.config["classes"]), float("nan"))
    for indices in tqdm(batches, unit=" batches", leave=False, disable=hide_progress):
        input_ids, mask = collate([encoded[i] for i in indices], pad_id)
        with autocast():
            answer = model(input_ids.to(device), mask.to(device), owner[indices])   # (B, C)
        logits[indices] = answer.float().cpu()
    return logits


# ---- Metrics, all in percent ----

def accuracy(labels, predicted):
    """Percent of the predictions that equal their label."""
    return 100.0 * float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def macro_f1(labels, predicted):
    """Percent: the mean of F1 over the classes that occur as label or as prediction
    (scikit-learn's `macro`)."""
    labels = np.asarray(labels)
    predicted = np.asarray(predicted)
    scores = []
    for label in np.union1d(labels, predicted):
        hits = np.sum((labels == label) & (predicted == label))
        occurrences = np.sum(labels == label) + np.sum(predicted == label)
        scores.append(2 * hits / occurrences)
    return 100.0 * float(np.mean(scores))


def majority(labels):
    """Percent of the most frequent label: what a classifier reaches that looks at nothing."""
    return 100.0 * float(np.bincount(labels).max()) / len(labels)


def group_means(scores, config, sources):
    """Means over groups of languages: scores {language: percent} -> {title: (mean or None,
    languages scored, languages in the group)}.

    Each language counts alike, whatever its number of sentences. The sources are the first group
    and are taken out of every target group: they are not zero-shot.
    """
    groups = {"Sources": sources}
    for title, codes in resolve_targets(config).items():
        groups[title] = [code for code in codes if code not in sources]
    means = {}
    for title, codes in groups.items():
        known = [scores[code] for code in codes if code in scores]
        mean = float(np.mean(known)) if known else None
        means[title] = (mean, len(known), len(codes))
    return means


def method_name(kind, prompt_config):
    """The name of a method in tables and folders: spt, xpe, dual30, xpe-lstm ..."""
    name = kind
    if kind == "dual":
        name += str(round(100 * prompt_config["ratio"]))
    if kind in ("dual", "xpe") and prompt_config["encoder"] != "mlp":
        name += "-" + prompt_config["encoder"]
    return name


# ---- Runs: where a prompt is, and what its files say ----

class Run:
    """A trained prompt and all that is needed to use it.

    where: a run folder or a name on the hub. backbone, data: a folder or hub name instead of the
    run's own. trust: run the code that comes with the backbone. Raises FileNotFoundError for what
    is not there, ValueError for files that cannot be used.

    .name, .folder; .prompt (or None), .head, .meta (see xpe.load_prompt); .config (see
    config.yaml); .sources, codes of languages; .released: in the form of the authors' release;
    .results: the folder for its scores; .changed: what of "backbone" and "data" is not its own.
    """

    def __init__(self, where, backbone=None, data=None, trust=False):
        self.name, self.folder, from_hub = find_run(where)
        self.prompt, self.head, self.meta = read_prompt(self.folder)
        self.released = not (self.folder / "prompt.json").is_file()
        self.config = self.read_own_config()
        if self.released:
            self.complete_release()
        self.sources = self.meta.get("sources")
        is_list = isinstance(self.sources, list)
        if not is_list or not all(isinstance(code, str) for code in self.sources):
            path = self.folder / "prompt.json"
            raise ValueError(f"{path}: 'sources' must be a list of language codes")
        # a folder of the authors and the hub's cache are not ours to write to
        self.results = self.folder
        if self.released or from_hub:
            self.results = Path("runs") / self.name
        self.config["backbone"]["trust_remote_code"] = trust    # never the run's own file's to say
        self.changed = []
        self.choose("backbone", backbone)
        self.choose("data", data)

    def read_own_config(self):
        """The configuration saved with the run; without one, the groups are config.yaml's."""
        path = self.folder / "config.yaml"
        if path.is_file():
            return read_config(path)
        if not self.released:
            warn(f"{path} is missing: the target groups are those of the default config.yaml")
        return read_config()

    def complete_release(self):
        """What the authors' files do not say, the names of their repositories and branches do."""
        if len(self.meta["labels"]) == len(LABELS):
            self.meta["labels"] = list(LABELS)
        group = re.search("-(seen|joshi5)", self.name)
        if not group:
            warn(f"{self.name}: its name says no source group, so joshi5 is assumed")
        self.meta["sources"] = resolve_group(self.config, group[1] if group else "joshi5")
        seed = re.search(r"seed-0*(\d+)", self.name)
        self.meta["seed"] = int(seed[1]) if seed else 1

    def choose(self, section, given):
        """Set name and revision of the run's backbone or data: what was given, or else its own."""
        own = self.meta.get(section)
        if not isinstance(own, dict):
            own = {}
        if given and not same_place(given, own.get("name")):
            self.changed.append(section)
            self.config[section]["name"] = given
            self.config[section]["revision"] = "main"
            return
        for key in ("name", "revision"):
            if isinstance(own.get(key), str):
                self.config[section][key] = own[key]
        if self.config[section]["revision"] == "local":         # what a folder has instead of one
            self.config[section]["revision"] = "main"

    def prompt_fingerprint(self):
        """A short hash of the trained tensors."""
        digest = hashlib.sha256()
        for module in (self.prompt, self.head):
            if module is not None:
                for tensor in module.state_dict().values():
                    digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def find_run(where):
    """A path or hub name -> (name of the run, its folder, whether it came from the hub)."""
    path = Path(os.path.expanduser(where))
    if path.is_dir():
        return path.resolve().name, path, False
    if path.exists():
        raise FileNotFoundError(f"{where}: is a file, and a run is a folder")
    if any(letter in str(where) for letter in "*?["):
        raise FileNotFoundError(f"{where}: no folder matches")
    name, _, revision = str(where).partition("@")
    # a missing folder in one that exists, runs/typo say, is no reason to ask the hub
    is_hub_name = re.fullmatch(r"\w[\w-]*/[\w.-]+", name) and not name.startswith("runs/")
    if not is_hub_name or path.parent.is_dir():
        raise FileNotFoundError(f"{where}: no such run folder")
    patterns = ["*.json", "*.safetensors", "config.yaml"]
    folder = download(name, revision or "main", "model", patterns)
    return str(where).replace("/", "--"), folder, True


def why_no_run(folder):
    """What is wrong with a folder that holds no prompt, or None for one that does."""
    if (folder / "prompt.json").is_file() or (folder / "adapter_config.json").is_file():
        return None
    if (folder / "checkpoint.pt").is_file() or (folder / "pass.json").is_file():
        return "its training has not come to an end (`train.py ... --resume` goes on)"
    if any(folder.glob("*/prompt.json")):
        return f"holds runs, but is none itself: say {shlex.quote(str(folder))}/*"
    return "holds no prompt.json: not a run, or not yet trained"


def read_prompt(folder):
    """-> (prompt or None, head, meta) of a run folder, of an older one, or of the authors'."""
    path = folder / "prompt.json"
    problem = why_no_run(folder)
    if problem:
        raise FileNotFoundError(f"{folder}: {problem}")
    if not path.is_file():
        from formats import read_authors
        return read_authors(folder)
    if not (folder / "prompt.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: prompt.safetensors, the trained tensors, is missing; "
                                f"prompt.json alone is no prompt")
    if xpe.read_json(path).get("format") == 1:
        from formats import read_format_1
        return read_format_1(folder)
    return xpe.load_prompt(folder)


def same_place(a, b):
    """Whether two names of folders or hub repositories mean the same."""
    if not isinstance(b, str):
        return False
    paths = [Path(os.path.expanduser(name)).resolve() for name in (a, b)]
    return a == b or paths[0] == paths[1]


def group_runs(runs):
    """Runs -> lists of runs that can share one pass through the backbone, in order."""
    groups = {}
    for run in runs:
        key = {name: run.meta[name] for name in ("reads", "max_length", "labels")}
        key["prompt length"] = run.prompt.length if run.prompt is not None else 0
        key["backbone"] = run.config["backbone"]
        key["data"] = run.config["data"]
        key["frozen weights"] = run.config["train"]["frozen_weights"]
        if run.meta["kind"] == "full":          # has a backbone of its own
            key["folder"] = str(run.folder)
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return list(groups.values())


# ---- Classifier: runs that share a backbone, ready to answer ----

class Classifier:
    """Prompts of one backbone, ready to classify texts. `load` makes one from a run folder.

    A call changes nothing in it, so that several threads may share one. amp: auto (what the device
    is fast at), bf16, fp16 or off.
    """

    def __init__(self, runs, device, amp="auto"):
        run = runs[0]
        self.runs = runs
        self.labels = run.meta["labels"]
        self.max_length = run.meta["max_length"]
        self.budget = run.config["evaluate"]["tokens"]
        self.device = device
        self.precision = pick_precision(amp, device)

        backbone, self.tokenizer = self.load_backbone()
        prompts = None
        if run.prompt is not None:
            prompts = [run.prompt.collapse() for run in runs]
        heads = [run.head for run in runs]
        frozen = run.meta["kind"] != "full"
        self.model = xpe.PromptedClassifier(backbone, prompts, heads, run.meta["reads"], frozen)
        frozen_weights = run.config["train"]["frozen_weights"]
        self.autocast = place(self.model, device, self.precision, frozen_weights)
        self.model.eval()

    def load_backbone(self):
        """-> (backbone, tokenizer). Warns where they are not those that a run was trained with."""
        first = self.runs[0]
        reads = first.meta["reads"]
        settings = first.config["backbone"]
        attention = pick_attention(settings["attention"], self.device, self.precision)
        backbone, tokenizer, self.identity = load_backbone(
            settings["name"], settings["revision"], attention, settings["trust_remote_code"])
        check_backbone(backbone, tokenizer, self.identity, reads)
        for run in self.runs:
            warn_if_other(run, "backbone's weights", self.identity["fingerprint"],
                          run.meta["backbone"].get("fingerprint"))
            warn_if_other(run, "tokenizer", tokenizer_fingerprint(tokenizer),
                          run.meta.get("tokenizer"))
        if first.meta["kind"] == "full":
            load_tuned_weights(backbone, first.folder / "backbone.safetensors")
        if reads == "prompt" or (reads == "first" and first.prompt is None):
            backbone = first_position_only(backbone)
        return backbone, tokenizer

    def __call__(self, texts):
        """Classify any number of texts, in order -> (labels, a list of str; probabilities (n, C)).

        The classes are in the order of `.labels`. Raises TypeError for what is no list of texts.
        """
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not one text")
        texts = list(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {number} is no text but {text!r}")
        probabilities = self.answer([texts])[0]
        best = probabilities.argmax(dim=1).tolist()
        return [self.labels[label] for label in best], probabilities

    def answer(self, texts_of_runs, progress=False):
        """texts_of_runs: for each run its n texts -> for each run its probabilities (n, C).

        Raises ValueError for logits that are not finite."""
        texts = list(chain.from_iterable(texts_of_runs))
        distinct = list(dict.fromkeys(texts))
        encoded, cut = encode(distinct, self.tokenizer, self.max_length)
        if cut:
            warn(f"{cut:,} of {len(distinct):,} texts cut at {self.max_length} tokens")
        ids_of_text = dict(zip(distinct, encoded))
        ids = [ids_of_text[text] for text in texts]
        sizes = [len(texts_of_run) for texts_of_run in texts_of_runs]
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        pad_id = self.tokenizer.pad_token_id or 0
        logits = predict(self.model, ids, pad_id, owner, self.budget, self.autocast, progress)
        logits_of_runs = logits.split(sizes)
        for run, run_logits in zip(self.runs, logits_of_runs):
            if not run_logits.isfinite().all():
                raise ValueError(f"{run.name}: its logits are not finite numbers "
                                 f"(computed in precision {self.precision}; --amp off is float32)")
        return [run_logits.softmax(dim=1) for run_logits in logits_of_runs]


def load(run, device="auto", backbone=None, amp="auto"):
    """A trained prompt, ready to use -> Classifier.

        classifier = evaluate.load("runs/xpe-joshi5-s11")
        labels, probabilities = classifier(["The match was decided in the last minute.", "..."])

    labels: a list of str, one for each text, in order; probabilities: a tensor (n, C), its classes
    in the order of classifier.labels. Any number of texts, from any number of threads. run: a run
    folder, a folder of the authors' release, or a hub name; backbone: a folder or hub name instead
    of the run's own. Raises FileNotFoundError or ValueError with one line that says what is wrong.
    """
    return Classifier([Run(run, backbone)], pick_device(device), amp)


def warn_if_other(run, what, fingerprint_now, fingerprint_in_training):
    """Warn where a run meets another backbone or tokenizer than it was trained with."""
    if fingerprint_in_training and fingerprint_now != fingerprint_in_training:
        warn(f"{run.name}: the {what} ({fingerprint_now}) are not those that it was trained with "
             f"({fingerprint_in_training})")


def load_tuned_weights(backbone, path):
    """Load the weights that full fine-tuning saved; ValueError if they do not fit the backbone."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the weights of this fully fine-tuned run are missing")
    try:
        backbone.load_state_dict(xpe.read_tensors(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: does not fit the backbone: {reason}") from None


def first_position_only(backbone):
    """The same answers with less work, where speed.py is there and knows the backbone."""
    try:
        import speed
    except ModuleNotFoundError:
        return backbone
    return speed.first_position_only(backbone)


# ---- Scoring on a split ----

class Scores:
    """The sentences of one split that a run answers, and what it reached.

    .sentences: (language, Sentence) pairs, one language after the other. .facts: what computed them
    and on which data. `fill` adds .probabilities (n, C) and .lines, those of <split>.csv: for each
    language a dict of language, n, accuracy, macro_f1 and majority.
    """

    def __init__(self, run, split, sentences, facts):
        self.run = run
        self.split = split
        self.sentences = sentences
        self.facts = facts
        self.identity = None                    # of the backbone: see load_backbone
        self.probabilities = None
        self.lines = []

    def fill(self, probabilities):
        """Add the probabilities of all sentences, (n, C), and compute the lines."""
        self.probabilities = probabilities
        predicted = probabilities.argmax(dim=1).tolist()
        pairs_of = {}                           # language -> [(label, predicted)]
        for (language, sentence), guess in zip(self.sentences, predicted):
            pairs_of.setdefault(language, []).append((sentence.label, guess))
        for language, pairs in pairs_of.items():
            labels, guesses = zip(*pairs)
            self.lines.append({
                "language": language, "n": len(labels), "accuracy": accuracy(labels, guesses),
                "macro_f1": macro_f1(labels, guesses), "majority": majority(labels)})

    def prediction_lines(self):
        """Lines of <split>_predictions.csv, made when written: those of ten runs fill a memory."""
        names = self.run.meta["labels"]
        for (language, sentence), shares in zip(self.sentences, self.probabilities.tolist()):
            predicted = names[shares.index(max(shares))]
            label = names[sentence.label]
            figures = [f"{share:.5f}" for share in shares]
            yield [language, sentence.index_id, label, predicted, *figures]


def open_corpus(run):
    """-> (Corpus, revision) of a run's data; ValueError if its labels are not the run's."""
    settings = run.config["data"]
    folder, revision = locate(settings["name"], settings["revision"])
    corpus = Corpus(folder)
    labels = run.meta["labels"]
    if list(corpus.labels) != labels:
        advice = ""
        if set(corpus.labels) <= set(labels):
            advice = f"; write these, in this order, to {folder / 'labels.txt'}"
        raise ValueError(f"{folder} has the labels {', '.join(corpus.labels)}; {run.name} was "
                         f"trained on {', '.join(labels)}{advice}")
    return corpus, revision


def choose_languages(run, corpus, split, languages):
    """The languages that a run is scored on: those asked for; else, for an adapted prompt, its own;
    else all of the corpus that have the split."""
    if languages:
        return languages
    if "adapted_to" in run.meta:
        return [run.meta["adapted_to"]]
    with_split = [code for code in corpus.languages() if split in corpus.splits(code)]
    if not with_split:
        raise FileNotFoundError(f"{corpus.root}: no language has a file {split}.tsv")
    return with_split


def warn_about_absent(runs, corpus, split):
    """Say which languages cannot be scored: targets that the corpus lacks, and those without the
    split."""
    without = [code for code in corpus.languages() if split not in corpus.splits(code)]
    if without:
        warn(f"{corpus.root}: without {split}.tsv, so not scored: {shorten_list(without)}")
    targets = []
    for run in runs:
        for codes in resolve_targets(run.config).values():
            targets += codes
    absent = [code for code in dict.fromkeys(targets) if code not in corpus.languages()]
    if absent:
        warn(f"{corpus.root}: lacks {len(absent)} of the target languages: {shorten_list(absent)}")


def shorten_list(words):
    """'a, b, c', with no more than six of them written out."""
    if len(words) <= 6:
        return ", ".join(words)
    return f"{', '.join(words[:6])} and {len(words) - 6} more"


def read_sentences(corpus, split, languages, known):
    """(language, Sentence) pairs of a split; known: {language: sentences}, what was read before."""
    pairs = []
    for language in languages:
        if language not in known:
            known[language] = corpus.read(language, split)
        pairs += [(language, sentence) for sentence in known[language]]
    return pairs


def prepare_group(runs, split, languages):
    """Read what the runs of one group are to answer -> Scores of each, not yet filled."""
    corpus, revision = open_corpus(runs[0])
    if not languages and "adapted_to" not in runs[0].meta:
        warn_about_absent(runs, corpus, split)
    known = {}
    prepared = []
    for run in runs:
        codes = choose_languages(run, corpus, split, languages)
        sentences = read_sentences(corpus, split, codes, known)
        backbone = run.config["backbone"]
        facts = {"revision": revision, "data": fingerprint([sentence for _, sentence in sentences]),
                 "prompt": run.prompt_fingerprint(),
                 "backbone": {"name": backbone["name"], "revision": backbone["revision"]}}
        prepared.append(Scores(run, split, sentences, facts))
    return prepared


def fill_group(prepared, device, amp):
    """Compute the scores of the runs of one group, in one pass through their backbone."""
    classifier = Classifier([scores.run for scores in prepared], device, amp)
    texts_of_runs = []
    for scores in prepared:
        texts_of_runs.append([sentence.text for _, sentence in scores.sentences])
    answers = classifier.answer(texts_of_runs, progress=True)
    for scores, probabilities in zip(prepared, answers):
        scores.facts["precision"] = classifier.precision
        scores.facts["device"] = device.type
        scores.identity = classifier.identity
        scores.fill(probabilities)


def score_runs(runs, split="test", languages=None, device=None, amp="auto", out=None, show=True,
               again=True):
    """Score runs -> for each run its lines: dicts of language, n, accuracy, macro_f1, majority.

    languages: codes, by default all (of an adapted prompt its own). Prints tables (show) and writes
    <split>.csv, .json and _predictions.csv to `out`/<name of the run>, by default to each run's own
    folder. If `languages` are given, or backbone or data are not the run's own, nothing is written
    unless `out` is given. again=False: a run with scores of the same prompt, data and backbone
    (and precision, unless `amp` is auto) is shown, not computed. Raises, before anything is
    computed, OSError for a folder that cannot be written to and, with again=False, ValueError where
    scores of other languages would be lost.
    """
    device = device or pick_device()
    if languages and show and not out:
        warn("languages are named, so nothing is written; --out FOLDER keeps the scores")
    folders = {run: result_folder(run, languages, out) for run in runs}
    check_folders([folder for folder in folders.values() if folder])
    groups = group_runs(runs)
    if not again:
        check_nothing_is_lost(groups, folders, split, languages)
    lines_of = {}
    for group in groups:
        start = time.time()
        for run in group:
            warn_about_sources(run, languages)
        prepared = prepare_group(group, split, languages)
        for scores in prepared:
            if amp != "auto":
                scores.facts["precision"] = amp
            if not again and folders[scores.run]:
                scores.lines = read_scores(scores, folders[scores.run])
        to_compute = [scores for scores in prepared if not scores.lines]
        if to_compute:
            fill_group(to_compute, device, amp)
        for scores in prepared:
            run = scores.run
            lines_of[run] = scores.lines
            if show:
                print(table(run, scores.lines, every_language=len(runs) < 4))
            finish_run(scores, folders[run], scores in to_compute, show)
        if to_compute and show:
            print_work_done(to_compute, time.time() - start)
    return [lines_of[run] for run in runs]


def finish_run(scores, folder, computed, show):
    """Write what was computed, and say where the scores are."""
    if folder is None:
        return
    line = f"  {folder}: scored already; --again scores anew"
    if computed:
        write_scores(scores, folder)
        line = f"  {folder}/{scores.split}.csv, .json, _predictions.csv"
    if show:
        print(line)


def print_work_done(computed, seconds):
    """How many sentences of how many languages were scored, in which time."""
    languages = {language for scores in computed for language, _ in scores.sentences}
    sentences = sum(len(scores.sentences) for scores in computed)
    of = f"{len(languages)} languages" if len(languages) > 1 else "one language"
    runs = f", by {len(computed)} runs together" if len(computed) > 1 else ""
    print(f"{sentences:,} sentences of {of}{runs}, in {seconds:.1f} s, loading included\n")


def warn_about_sources(run, languages):
    """Say which of the languages asked for are no zero-shot targets of this run."""
    trained_on = [code for code in languages or () if code in run.sources]
    if trained_on:
        warn(f"{run.name}: {', '.join(trained_on)}: a source of this run, so not zero-shot")


# ---- Files and tables ----

def result_folder(run, languages, out):
    """Where the scores of a run go, or None: they are shown only."""
    if out:
        return Path(out) / run.name
    if languages:
        return None
    if run.changed:
        warn(f"{run.name}: not its own {' and '.join(run.changed)}, so nothing is written; "
             f"--out FOLDER keeps the scores")
        return None
    return run.results


def check_folders(folders):
    """Raise OSError for a folder that cannot be written to, ValueError for one of two runs."""
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"two of the runs would write to {folder}: score them one by one, or "
                             f"with an --out of their own")
        existing = folder
        while not existing.exists():
            existing = existing.parent
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise OSError(f"{folder}: the scores cannot be written there ({error.strerror}); "
                          f"--out names another folder") from None


def to_csv(columns, lines):
    """Names of the columns, and lines (lists of fields) -> CSV as bytes; None is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return text.getvalue().encode()


def write_scores(scores, folder):
    """Write <split>_predictions.csv, <split>.csv and <split>.json; elsewhere than in the run's own
    folder also the prompt and its configuration, which the report reads."""
    run, split = scores.run, scores.split
    folder.mkdir(parents=True, exist_ok=True)
    if run.released or folder.resolve() != run.folder.resolve():
        meta = dict(run.meta)           # what was scored with is what the report reads
        if "backbone" in run.changed:
            meta["backbone"] = scores.identity
        if "data" in run.changed:
            name = run.config["data"]["name"]
            meta["data"] = {"name": name, "revision": scores.facts["revision"]}
        xpe.save_prompt(folder, run.prompt, run.head, meta)
        xpe.write_atomically(folder / "config.yaml", dump_config(run.config))

    columns = ["language", "index_id", "label", "predicted"]
    columns += [f"p({label})" for label in run.meta["labels"]]
    predictions = to_csv(columns, scores.prediction_lines())
    xpe.write_atomically(folder / f"{split}_predictions.csv", predictions)

    lines = []
    for line in scores.lines:
        figures = [f"{line[name]:.4f}" for name in ("accuracy", "macro_f1", "majority")]
        lines.append([line["language"], line["n"], *figures])
    xpe.write_atomically(folder / f"{split}.csv", to_csv(scores.lines[0], lines))

    accuracies = {line["language"]: line["accuracy"] for line in scores.lines}
    groups = {}
    for title, (mean, scored, of) in group_means(accuracies, run.config, run.sources).items():
        groups[title] = {"accuracy": mean, "languages": scored, "of": of}
    summary = {"run": run.name, "kind": run.meta["kind"], "sources": run.sources, "split": split,
               **scores.facts, "groups": groups, "languages": accuracies}
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    xpe.write_atomically(folder / f"{split}.json", text.encode())   # last: then all three are there


def read_scores(scores, folder):
    """The lines that an earlier call left, if its facts were the same; otherwise none."""
    files = [folder / f"{scores.split}{end}" for end in (".json", ".csv", "_predictions.csv")]
    if not all(file.is_file() for file in files):
        return []
    lines = []
    try:
        summary = xpe.read_json(files[0])
        for fact, value in scores.facts.items():
            if summary.get(fact) != value:
                return []
        with open(files[1], encoding="utf-8", newline="") as file:
            for fields in csv.DictReader(file):
                line = {"language": fields["language"], "n": int(fields["n"])}
                for name in ("accuracy", "macro_f1", "majority"):
                    line[name] = float(fields[name])
                lines.append(line)
    except (ValueError, KeyError, TypeError):       # damaged: scored anew
        return []
    return lines


def check_nothing_is_lost(groups, folders, split, languages):
    """Raise ValueError if there are scores of languages that are not to be scored now."""
    for group in groups:
        corpus, _ = open_corpus(group[0])
        for run in group:
            if not folders[run]:
                continue
            path = folders[run] / f"{split}.csv"
            wanted = choose_languages(run, corpus, split, languages)
            lost = sorted(set(read_scored_languages(path)) - set(wanted))
            if lost:
                raise ValueError(f"{path}: has scores of {shorten_list(lost)}, which would be "
                                 f"lost; --out names another folder, --again writes over them")


def read_scored_languages(path):
    """The codes in a <split>.csv; none if it is missing or damaged."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            codes = [fields["language"] for fields in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error):
        return []
    return [code for code in codes if code]         # None in a line that is cut short


def table(run, lines, every_language=True):
    """The scores of one run as text: means over groups beside chance, then every language."""
    scores = {line["language"]: line["accuracy"] for line in lines}
    chances = {line["language"]: line["majority"] for line in lines}
    mean_chances = group_means(chances, run.config, run.sources)
    text = [run.name, f"  {'mean over languages':<20} accuracy %  chance %  languages"]
    for title, (mean, scored, of) in group_means(scores, run.config, run.sources).items():
        figures = f"{'-':>10} {'-':>9}"
        if scored:
            chance = mean_chances[title][0]
            figures = f"{mean:10.1f} {chance:9.1f}"
        rest = ""
        if scored < of:
            rest = f" of {of}: {of - scored} not scored"
        if of:                          # none is left of a group whose languages are all sources
            text.append(f"  {title:<20} {figures}  {scored:9}{rest}")
    if every_language:
        text += language_cells(scores, run.sources)
    return "\n".join(text)


def language_cells(scores, sources):
    """All languages and their accuracies as lines of text, six in a line, the best first."""
    cells = []
    for code in sorted(scores, key=scores.get, reverse=True):
        mark = "*" if code in sources else " "
        cells.append(f"{code}{mark} {scores[code]:5.1f}")
    text = ["  " + "   ".join(cells[start:start + 6]) for start in range(0, len(cells), 6)]
    if any(code in sources for code in scores):
        text.append("  * source language")
    return text


# ---- The command ----

def read_stdin_texts():
    """The lines of standard input, blank ones too; ValueError with the line of what is no UTF-8."""
    if sys.stdin.isatty():
        print("one text on each line; Ctrl-D ends", file=sys.stderr)
    raw = sys.stdin.buffer.read().removeprefix(b"\xef\xbb\xbf")
    texts = []
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            texts.append(line.decode().removesuffix("\r"))
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input:{number}: this is not UTF-8 text (byte "
                             f"0x{line[error.start]:02x})") from None
    return texts


def check_texts(texts):
    """Raise ValueError for arguments that are no UTF-8, and if there is nothing but blanks."""
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"--text: text {number} is not UTF-8") from None
    if not any(text.strip() for text in texts):
        raise ValueError("--text: nothing to classify")


def classify(runs, texts, device, amp="auto"):
    """Print what each run says of each text: [run,] label, probability, text, with tabs between.

    A line (for each run) for each text: to a blank one label and probability are empty.
    """
    distinct = list(dict.fromkeys(text for text in texts if text.strip()))
    answers = {}                                # (run, text) -> [label, probability]
    for group in group_runs(runs):
        classifier = Classifier(group, device, amp)
        probabilities_of_runs = classifier.answer([distinct] * len(group))
        for run, probabilities in zip(group, probabilities_of_runs):
            for text, shares in zip(distinct, probabilities):
                label = run.meta["labels"][shares.argmax()]
                answers[run, text] = [label, f"{shares.max():.3f}"]
    for text in texts:
        for run in runs:
            fields = answers.get((run, text), ["", ""]) + [on_one_line(text)]
            if len(runs) > 1:
                fields.insert(0, run.name)
            print("\t".join(fields))


def on_one_line(text):
    """A text with its line breaks and tabs written as \\n, \\r, \\t."""
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def open_runs(args):
    """Run objects of the RUN arguments. Of several, folders and files that are no run, or a damaged
    one, are left out with a warning, so that `dir/*` works; FileNotFoundError if none is left."""
    runs = []
    for where in args.runs:
        try:
            runs.append(Run(where, args.backbone, args.data, args.trust_remote_code))
        except (ValueError, FileNotFoundError) as error:
            if len(args.runs) == 1 or not os.path.exists(os.path.expanduser(where)):
                raise
            warn(f"left out: {error}")
    if not runs:
        raise FileNotFoundError(f"none of the {len(args.runs)} RUN arguments is a run")
    return runs


def languages_asked_for(args, config):
    """Codes of --languages and --groups, each once; none means all languages."""
    for group in args.groups:
        if group not in config["groups"]:
            raise ValueError(f"--groups: no group {group!r}{nearest(group, config['groups'])}")
    of_groups = resolve_group(config, args.groups)
    if args.groups and not of_groups:
        raise ValueError(f"--groups {','.join(args.groups)}: no language is left of them")
    return list(dict.fromkeys(args.languages + of_groups))


def export(args, runs):
    """Write a run as a folder that stock peft loads."""
    from formats import export_peft
    form, folder = args.export
    if form != "peft" or len(runs) != 1:
        raise ValueError("--export takes one RUN, the word peft and a new folder")
    export_peft(folder, runs[0].prompt, runs[0].head, runs[0].meta)
    print(f"{folder}: written for peft, with the names of the labels in {folder}/labels.json")


def split_commas(text):
    """'a, b' -> ['a', 'b']"""
    return [part.strip() for part in text.split(",") if part.strip()]


def make_parser():
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description="Score prompts on every language, classify texts, or export a prompt.")
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="run folders, or hub names (name@branch)")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--languages", type=split_commas, default=[],
                        help="codes, separated by commas (default: all)")
    parser.add_argument("--groups", type=split_commas, default=[],
                        help="groups of the configuration, separated by commas")
    parser.add_argument("--data", help="folder or dataset, instead of the run's own")
    parser.add_argument("--backbone", help="folder or hub name, instead of the run's own")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run a backbone's own code")
    parser.add_argument("--out", help="folder for the results (default: each run's own folder)")
    parser.add_argument("--again", action="store_true", help="score anew what is scored already")
    parser.add_argument("--text", nargs="*", help="classify these, or the lines of standard input")
    parser.add_argument("--export", nargs=2, metavar=("peft", "DIR"),
                        help="write a folder that peft loads")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"),
                        help="precision (default: auto, what the device is fast at)")
    return parser


def check_arguments(args):
    """Raise ValueError for arguments that cannot be meant."""
    if not args.runs and args.text:
        raise ValueError("RUN is missing: --text takes everything behind it, so the run comes "
                         "first: evaluate.py RUN --text \"Your sentence\"")
    if not args.runs:
        raise ValueError("RUN is missing: name one or more run folders, runs/* say")
    if args.text is not None and args.export:
        raise ValueError("--text and --export: one of them")
    if args.text is None and not args.export:
        return
    given = {"--out": args.out, "--again": args.again, "--languages": args.languages,
             "--groups": args.groups, "--split": args.split != "test",
             "--backbone": args.backbone if args.export else None}
    given = [name for name, value in given.items() if value]
    if given:
        what = "--export, which writes the run as it is"
        if args.text is not None:
            what = "--text, which scores nothing"
        raise ValueError(f"{', '.join(given)}: not with {what}")


def main(argv=None):
    """The command line."""
    args = make_parser().parse_args(argv)
    check_arguments(args)
    if hasattr(sys.stdout, "reconfigure"):
        # a terminal that cannot show a letter must not end the command half-way
        sys.stdout.reconfigure(errors="backslashreplace")
    device = pick_device(args.device)
    runs = open_runs(args)
    if args.export:
        export(args, runs)
    elif args.text is not None:
        texts = args.text or read_stdin_texts()
        check_texts(texts)
        classify(runs, texts, device, args.amp)
    else:
        languages = languages_asked_for(args, runs[0].config)
        score_runs(runs, args.split, languages, device, args.amp, args.out, again=args.again)
    return 0


if __name__ == "__main__":
    run_main(main)
