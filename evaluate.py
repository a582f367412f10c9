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

Read downwards: predictions, metrics, classifier, scoring, tables, the command.
"""
import os
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import xpe
from backbone import (check_backbone, first_position_only, load_backbone, pick_device,
                      pick_precision, place, tokenizer_fingerprint)
from config import CHOICES, dump_config, resolve_group, resolve_targets
from data import (check, collate, decode, encode, fingerprint, make_parser,
                  open_corpus, reading, run_main, shorten_list, tidy, token_batches, warn)
from runs import (Run, method_name, read_json, read_tensors, save_prompt, write_atomically,
                  write_csv, write_json)


# ---- Predictions ---------------------------------------------------------------------------------

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


# ---- Metrics, all in percent ---------------------------------------------------------------------

def accuracy(labels, predicted):
    """Percent of the predictions that equal their label."""
    return 100.0 * float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def macro_f1(labels, predicted):
    """Percent: the mean of F1 over the classes that occur as label or as prediction
    (scikit-learn's `macro`)."""
    scores = []
    for label in np.union1d(labels, predicted):
        is_label = np.equal(labels, label)
        is_predicted = np.equal(predicted, label)
        hits = np.sum(is_label & is_predicted)
        scores.append(2 * hits / (np.sum(is_label) + np.sum(is_predicted)))
    return 100.0 * float(np.mean(scores))


def majority(labels):
    """Percent of the most frequent label: the accuracy of a classifier that ignores its input."""
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


# ---- Classifier: runs that share a backbone, ready to answer -------------------------------------

class Classifier:
    """Prompts of one backbone, ready to classify texts. `load` makes one from a run folder.

    A call changes nothing in it, so that several threads may share one. amp: auto (what the device
    is fast at), bf16, fp16 or off.
    """

    def __init__(self, runs, device, amp="auto"):
        first = runs[0]
        settings = first.config["backbone"]
        self.runs = runs
        self.labels = first.meta["labels"]
        self.max_length = first.meta["max_length"]
        self.budget = first.config["evaluate"]["tokens"]
        self.precision = pick_precision(amp, device)
        backbone, self.tokenizer, self.identity = load_backbone(
            first.meta["backbone"], device, self.precision, settings["attention"],
            settings["trust_remote_code"])
        reads = first.meta["reads"]
        check_backbone(backbone, self.tokenizer, self.identity, reads)
        for run in runs:
            for what, now, then in (
                    ("backbone's weights", self.identity["fingerprint"],
                     run.meta["backbone"].get("fingerprint")),
                    ("tokenizer", tokenizer_fingerprint(self.tokenizer),
                     run.meta.get("tokenizer"))):
                if then and then != now:
                    warn(f"{run.name}: the {what} ({now}) differ from those used in training "
                         f"({then})")
        frozen = first.meta["kind"] != "full"
        if not frozen:
            path = first.folder / "backbone.safetensors"
            with reading(path):
                backbone.load_state_dict(read_tensors(path))
        if reads == "prompt" or (reads == "first" and first.prompt is None):
            backbone = first_position_only(backbone)
        prompts = [run.prompt.collapse() for run in runs if run.prompt is not None]
        heads = [run.head for run in runs]
        self.model = xpe.PromptedClassifier(backbone, prompts, heads, reads, frozen)
        self.autocast = place(self.model, device, self.precision,
                              first.config["train"]["frozen_weights"])
        self.model.eval()

    def __call__(self, texts):
        """Classify any number of texts, in order -> (labels, a list of str; probabilities (n, C)).

        The classes are in the order of `.labels`. Raises TypeError for what is not a list of texts.
        """
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not one text")
        texts = list(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {number} must be a str, got {text!r}")
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
            check(run_logits.isfinite().all(),
                  f"{run.name}: its logits are not finite numbers (computed in precision "
                  f"{self.precision}; --amp off is float32)")
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


def group_runs(runs):
    """Runs -> lists of runs that can share one pass through the backbone, in order."""
    groups = {}
    for run in runs:
        where = [run.meta[section][key] for section in ("backbone", "data")
                 for key in ("name", "revision")]
        how = [run.meta[name] for name in ("reads", "max_length", "labels")]
        # full fine-tuning has a backbone of its own
        rows = run.prompt.length if run.prompt else str(run.folder)
        key = repr([where, how, rows, run.config["train"]["frozen_weights"]])
        groups.setdefault(key, []).append(run)
    return list(groups.values())


# ---- Scoring on a split --------------------------------------------------------------------------
# A run that is scored gets .out, the folder for its scores, or None; .sentences, pairs (language,
# Sentence); .facts, what computes the scores and on which data; .probabilities (n, C); .lines,
# those of <split>.csv.

def score_runs(runs, split="test", languages=None, device=None, amp="auto", out=None, show=True,
               again=True):
    """Score runs -> for each run its lines: dicts of language, n, accuracy, macro_f1, majority.

    languages: codes, by default all (of an adapted prompt its own). Prints tables (show) and writes
    <split>.csv, .json and _predictions.csv to `out`/<name of the run>, by default to each run's own
    folder. If `languages` are given, or backbone or data are not the run's own, nothing is written
    unless `out` is given. again=False: a run with scores of the same prompt, data and backbone
    (and precision, unless `amp` is auto) is shown, not computed. Raises, before anything is
    computed, ValueError where two runs would write to one folder and, with again=False, where
    scores of other languages would be lost.
    """
    start = time.time()
    device = device or pick_device()
    for group in group_runs(runs):
        prepare_group(group, split, languages, amp, out, again)
    folders = [run.out for run in runs if run.out]
    check(len(set(folders)) == len(folders), "two runs would write to the same folder; score "
                                             "them separately, each with its own --out")
    for run in runs:
        trained = run.out and (run.out / "metrics.jsonl").is_file()
        check(not trained or run.out.resolve() == run.folder,
              f"{run.out}: is another trained run; --out names another folder")
    to_compute = [run for run in runs if not run.lines]
    for group in group_runs(to_compute):
        compute(group, device, amp)
        for run in group:
            if run.out:
                write_scores(run, split)
    if show:
        for run in runs:
            print(table(run, every_language=len(runs) < 4))
            told = "not written: --out FOLDER keeps the scores"
            if run.out and run in to_compute:
                told = f"{run.out}/{split}.csv, .json, _predictions.csv"
            elif run.out:
                told = f"{run.out}: scored already; --again scores it again"
            print(f"  {told}")
        count = sum(len(run.sentences) for run in to_compute)
        print(f"{count:,} sentences in {time.time() - start:.1f} s, loading included\n")
        if len(runs) > 1:
            print(method_table(runs))
    return [run.lines for run in runs]


def prepare_group(runs, split, languages, amp, out, again):
    """Read the sentences that runs of one backbone and corpus answer, and any earlier scores."""
    corpus, place_of_data = open_corpus(runs[0].meta["data"])
    labels = runs[0].meta["labels"]
    check(list(corpus.labels) == labels,
          f"{corpus.root} has the labels {', '.join(corpus.labels)}; {runs[0].name} was trained on "
          f"{', '.join(labels)}: labels.txt must name these, in this order")
    able = [code for code in corpus.languages() if split in corpus.splits(code)]
    check(able, f"{corpus.root}: no language has a file {split}.tsv")
    for run in runs:
        run.out = None if languages or run.changed else run.results
        if out:
            run.out = Path(out).expanduser() / run.name
        codes = languages or able
        if "adapted_to" in run.meta and not languages:
            codes = [run.meta["adapted_to"]]
        run.sentences = []
        for code in codes:
            run.sentences += [(code, sentence) for sentence in corpus.read(code, split)]
        backbone = run.meta["backbone"]
        run.facts = {"revision": place_of_data["revision"], "prompt": run.fingerprint(),
                     "data": fingerprint([sentence for _, sentence in run.sentences]),
                     "backbone": {"name": backbone["name"], "revision": backbone["revision"]}}
        if amp != "auto":
            run.facts["precision"] = amp
        run.lines = []
        if run.out and not again:
            run.lines = read_scores(run.out / f"{split}.json", run.facts, codes)


def read_scores(path, facts, codes):
    """The lines of an earlier call if its facts were the same, otherwise none. Raises ValueError if
    scores of languages that are not among `codes` would be lost."""
    if not path.is_file():
        return []
    summary = read_json(path)
    lost = [code for code in summary.get("languages", ()) if code not in codes]
    check(not lost, f"{path}: has scores of {shorten_list(lost)}, which would be lost; --out names "
                    f"another folder, --again writes over them")
    same = all(summary.get(fact) == value for fact, value in facts.items())
    return summary.get("lines", []) if same else []


def compute(runs, device, amp):
    """Score runs of one backbone, in one pass through it."""
    classifier = Classifier(runs, device, amp)
    texts_of_runs = [[sentence.text for _, sentence in run.sentences] for run in runs]
    for run, probabilities in zip(runs, classifier.answer(texts_of_runs, progress=True)):
        run.probabilities = probabilities
        run.facts.update(precision=classifier.precision, device=device.type)
        run.meta["backbone"] = classifier.identity      # what the report reads
        predicted = probabilities.argmax(dim=1).numpy()
        languages = np.array([language for language, _ in run.sentences])
        labels = np.array([sentence.label for _, sentence in run.sentences])
        for language in dict.fromkeys(languages.tolist()):
            own = languages == language
            pair = labels[own], predicted[own]
            run.lines.append({"language": language, "n": int(own.sum()),
                              "accuracy": accuracy(*pair), "macro_f1": macro_f1(*pair),
                              "majority": majority(labels[own])})


def write_scores(run, split):
    """Write <split>_predictions.csv, <split>.csv and <split>.json; elsewhere than in the run's own
    folder also the prompt and its configuration, which the report reads."""
    folder = run.out
    names = run.meta["labels"]
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != run.folder:
        save_prompt(folder, run.prompt, run.head, run.meta)
        write_atomically(folder / "config.yaml", dump_config(run.config))
    columns = ["language", "index_id", "label", "predicted", *(f"p({name})" for name in names)]
    rows = []
    for (language, sentence), shares in zip(run.sentences, run.probabilities.tolist()):
        predicted = names[shares.index(max(shares))]
        figures = [f"{share:.5f}" for share in shares]
        rows.append([language, sentence.index_id, names[sentence.label], predicted, *figures])
    write_csv(folder / f"{split}_predictions.csv", columns, rows)
    rows = []
    for language, n, *figures in map(dict.values, run.lines):
        rows.append([language, n, *(f"{figure:.4f}" for figure in figures)])
    write_csv(folder / f"{split}.csv", run.lines[0], rows)
    accuracies = {line["language"]: line["accuracy"] for line in run.lines}
    groups = {}
    for title, (mean, scored, of) in group_means(accuracies, run.config, run.sources).items():
        groups[title] = {"accuracy": mean, "languages": scored, "of": of}
    write_json(folder / f"{split}.json", {          # last: then all three are there
        "run": run.name, "kind": run.meta["kind"], "sources": run.sources, "split": split,
        **run.facts, "groups": groups, "languages": accuracies, "lines": run.lines})


# ---- Tables --------------------------------------------------------------------------------------

def means_of(run, figure="accuracy"):
    """group_means of one of the figures in a run's lines."""
    figures = {line["language"]: line[figure] for line in run.lines}
    return group_means(figures, run.config, run.sources)


def table(run, every_language=True):
    """The scores of one run as text: means over groups, then every language, the best first."""
    text = [run.name, f"  {'mean over languages':<20} accuracy %  majority class %  languages"]
    majorities = means_of(run, "majority")
    for title, (mean, scored, of) in means_of(run).items():
        if scored:
            rest = f" of {of}" if scored < of else ""
            text.append(f"  {title:<20} {mean:10.1f}  {majorities[title][0]:16.1f}  "
                        f"{scored:9}{rest}")
    if every_language:
        cells = []
        for line in sorted(run.lines, key=lambda line: -line["accuracy"]):
            code = line["language"]
            mark = "*" if code in run.sources else " "
            cells.append(f"{code}{mark} {line['accuracy']:5.1f}")
        text += ["  " + "   ".join(cells[start:start + 6]) for start in range(0, len(cells), 6)]
        text.append("  * source language")
    return "\n".join(text)


def method_table(runs):
    """Mean ± standard deviation over the runs of each method, as text."""
    means = defaultdict(list)               # (method, group of languages) -> a mean for each run
    for run in runs:
        method = method_name(run.meta["kind"], run.meta["prompt"])
        for title, (mean, _, _) in means_of(run).items():
            if mean is not None:
                means[f"{method}, {len(run.sources)} sources", title].append(mean)
    text = ["mean ± standard deviation over runs"]
    for (method, title), values in means.items():
        mean = np.mean(values)
        count = len(values)
        spread = f"± {np.std(values, ddof=1):.1f}" if count > 1 else ""
        text.append(f"  {method:<20} {title:<20} {mean:5.1f} {spread:<6} {count} runs")
    return "\n".join(text)


# ---- The command ---------------------------------------------------------------------------------

def read_stdin_texts():
    """The lines of standard input, blank ones too; ValueError with the line of what is not UTF-8.
    """
    if sys.stdin.isatty():
        print("one text on each line; Ctrl-D ends", file=sys.stderr)
    text = decode(sys.stdin.buffer.read(), "standard input")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def classify(runs, texts, device, amp="auto"):
    """Print what each run says of each text: [run,] label, probability, text, with tabs between.

    A line (for each run) for each text: for a blank one label and probability are empty.
    """
    with reading("--text"):
        known = [text for text in texts if text.strip()]
        check(known, "nothing to classify")
        "".join(known).encode()         # what the shell passed may not be UTF-8
    answers = {}                        # (run, text) -> label and probability
    for group in group_runs(runs):
        classifier = Classifier(group, device, amp)
        for run, probabilities in zip(group, classifier.answer([known] * len(group))):
            for text, shares in zip(known, probabilities):
                answers[run, text] = f"{classifier.labels[shares.argmax()]}\t{shares.max():.3f}"
    for text in texts:
        on_one_line = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
        for run in runs:
            name = f"{run.name}\t" if len(runs) > 1 else ""
            answer = answers.get((run, text), "\t")
            print(f"{name}{answer}\t{on_one_line}")


def open_runs(args):
    """Run objects of the RUN arguments. Of several, folders and files that are not a run, or a
    damaged one, are left out with a warning, so that `dir/*` works; an error if none is left."""
    runs = []
    for where in args.runs:
        try:
            runs.append(Run(where, args.backbone, args.data, args.trust_remote_code))
        except (ValueError, FileNotFoundError) as error:
            if len(args.runs) == 1 or not os.path.exists(os.path.expanduser(where)):
                raise
            warn(f"left out: {error}")
    check(runs, f"none of the {len(args.runs)} RUN arguments is a run")
    return runs


def split_commas(text):
    """'a, b' -> ['a', 'b']"""
    return [tidy(part) for part in text.split(",") if part.strip()]


OPTIONS = """
--split NAME  train, dev or test (default: test)
--languages CODES  only these languages, or groups of them, separated by commas
--groups NAMES  the same
--again  score again what has been scored
--trust-remote-code  allow code that comes with the backbone to run
--device NAME  cpu, cuda, cuda:1 ... (default: what there is)
--amp TYPE  auto (what the device is fast at), bf16, fp16 or off
--data DIR  folder or dataset, instead of the run's own
--backbone NAME  folder or hub name, instead of the run's own
--out DIR  folder for the results (default: each run's own folder)
"""


def parse_arguments(argv):
    """The command line -> argparse's namespace; ValueError for what does not go together."""
    parser = make_parser("Score prompts on every language, classify texts, or export.", OPTIONS)
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="run folders, or hub names (name@branch)")
    parser.add_argument("--text", nargs="*", help="classify these, or the lines of standard input")
    parser.add_argument("--export", nargs=2, metavar=("peft", "DIR"),
                        help="write a folder that peft loads")
    parser.set_defaults(split="test", languages="", groups="", device="auto", amp="auto")
    args = parser.parse_args(argv)
    args.languages = split_commas(args.languages)
    args.groups = split_commas(args.groups)
    check(args.amp in CHOICES["amp"], f"--amp {args.amp}: not one of {', '.join(CHOICES['amp'])}")
    check(args.runs, "RUN is missing: name one or more run folders, runs/* for example, before "
                     "--text: evaluate.py RUN --text \"Your sentence\"")
    scoring = args.out or args.again or args.languages or args.groups or args.split != "test"
    check(not scoring or (args.text is None and not args.export),
          "--out, --again, --languages, --groups and --split cannot go with --text or --export")
    check(args.text is None or not args.export, "--text and --export: only one of them")
    return args


def main(argv=None):
    """The command line."""
    args = parse_arguments(argv)
    device = pick_device(args.device)
    runs = open_runs(args)
    if args.export:
        from formats import export_peft
        form, folder = args.export
        check(form == "peft" and len(runs) == 1,
              "--export takes one RUN, the word peft and a new folder")
        export_peft(folder, runs[0].prompt, runs[0].head, runs[0].meta)
        print(f"{folder}: written for peft, with the names of the labels in {folder}/labels.json")
    elif args.text is not None:
        classify(runs, args.text or read_stdin_texts(), device, args.amp)
    else:
        languages = resolve_group(runs[0].config, args.languages + args.groups)
        score_runs(runs, args.split, languages, device, args.amp, args.out, again=args.again)
    return 0


if __name__ == "__main__":
    run_main(main)
