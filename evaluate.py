"""Score prompts on every language: predictions, accuracy, macro-F1, means over target groups.

The paper's zero-shot evaluation: a prompt that was trained on the sources answers for all other
languages, and the figure of a target group is the mean over its languages. A RUN is a folder that
train.py left, a folder of the authors' release, or its name on the hub (name@branch); the scores
of a released prompt go to runs/<name>. Runs of one backbone are scored in one pass: at inference,
each is a matrix of prompt rows and a head.

    python evaluate.py runs/xpe-joshi5-s11      # a table; test.csv, .json and _predictions.csv
    python evaluate.py runs/xpe-joshi5-s11 --text "The match was decided in the last minute."
    python evaluate.py RUN --export peft DIR    # a folder that stock peft loads

and from Python:

    import evaluate
    classifier = evaluate.load("runs/xpe-joshi5-s11")
    labels, probabilities = classifier(["The match was decided in the last minute."])

Read downwards: predictions, metrics, classifier, scoring, the command.
"""
import sys
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import xpe
from backbone import load_backbone, pick_device, pick_precision, place
from config import dump_config, resolve_group, resolve_targets
from data import (check, collate, encode, fingerprint, make_parser, open_corpus, reading, run_main,
                  split_commas, token_batches, warn)
from runs import (Run, method_name, read_json, read_tensors, save_prompt, write_atomically,
                  write_csv, write_json)


# ---- Predictions ---------------------------------------------------------------------------------

@torch.no_grad()
def predict(model, encoded, pad_id, budget=16384, autocast=nullcontext):
    """Logits of texts, in the order given, whatever order they are computed in.

    encoded: for each of the model's K prompts a list of n texts, which are lists of token ids ->
    for each prompt a tensor (n, C), float32 on the CPU. budget: positions of one batch, prompt rows
    and padding counted. The model is left in evaluation mode.
    """
    model.eval()
    last = model.heads[0].out_proj
    device = last.weight.device
    texts = sum(encoded, [])
    sizes = [len(own) for own in encoded]
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    batches = token_batches([len(ids) for ids in texts], budget, model.prompt_length)
    logits = torch.full((len(texts), last.out_features), torch.nan)
    # progress is shown in a terminal, if it takes long
    for indices in tqdm(batches, unit=" batches", leave=False, disable=None, delay=5):
        input_ids, mask = collate([texts[i] for i in indices], pad_id)
        with autocast():
            answer = model(input_ids.to(device), mask.to(device), owner[indices])   # (B, C)
        logits[indices] = answer.float().cpu()
    return logits.split(sizes)


# ---- Metrics, all in percent ---------------------------------------------------------------------

def accuracy(labels, predicted):
    """Percent of the predictions that equal their label."""
    return 100.0 * float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def macro_f1(labels, predicted):
    """Percent: the mean of F1 over the classes that occur as label or as prediction
    (scikit-learn's `macro`)."""
    # F1 of a class is 2 hits / (times that it is the label + times that it is predicted)
    classes, counts = np.unique([labels, predicted], return_counts=True)
    hits = [np.sum(np.equal(labels, c) & np.equal(predicted, c)) for c in classes]
    return 100.0 * float(np.mean(np.multiply(2, hits) / counts))


def majority(labels):
    """Percent of the most frequent label: the accuracy of a classifier that ignores its input."""
    return 100.0 * float(np.bincount(labels).max()) / len(labels)


def group_means(scores, config, sources):
    """Means over groups of languages: scores {language: percent} -> {title: (mean or None,
    languages scored, languages in the group)}.

    Each language counts alike, whatever its number of sentences. The sources are the first group
    and are taken out of every target group: they are not zero-shot.
    """
    means = {}
    for title, codes in {"Sources": sources, **resolve_targets(config)}.items():
        if title != "Sources":
            codes = [code for code in codes if code not in sources]
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

    def __init__(self, runs, device, amp):
        first = runs[0]
        self.runs = runs
        self.labels = first.meta["labels"]
        self.precision = pick_precision(amp, device)
        reads = first.meta["reads"]
        frozen = first.prompt is not None
        backbone, self.tokenizer, identity = load_backbone(
            first.meta["backbone"], first.config["backbone"], device, self.precision, reads, frozen)
        for run in runs:
            told = run.changes(identity)
            if told:
                warn(f"{run.name}: not the backbone or tokenizer of its training: {told}")
                run.results = None
            run.meta["backbone"] = identity         # what the report reads
        if not frozen:
            path = first.folder / "backbone.safetensors"
            with reading(path):
                backbone.load_state_dict(read_tensors(path))
        prompts = [run.prompt.collapse() for run in runs if run.prompt]
        heads = [run.modules["head"] for run in runs]
        self.model = xpe.PromptedClassifier(backbone, prompts, heads, reads, frozen)
        self.autocast = place(self.model, device, self.precision,
                              first.config["train"]["frozen_weights"])

    def __call__(self, texts):
        """Classify any number of texts, in order -> (labels, a list of str; probabilities (n, C)).

        The classes are in the order of `.labels`. ValueError for one text instead of a list.
        """
        check(not isinstance(texts, str), "give a list of texts, not one text")
        probabilities, = self.answer([list(texts)])
        return [self.labels[label] for label in probabilities.argmax(dim=1)], probabilities

    def answer(self, texts_of_runs):
        """texts_of_runs: for each run its n texts -> for each run its probabilities (n, C).

        Raises ValueError for logits that are not finite."""
        first = self.runs[0]
        distinct = list(dict.fromkeys(sum(texts_of_runs, [])))
        ids = dict(zip(distinct, encode(distinct, self.tokenizer, first.meta["max_length"])))
        encoded = [[ids[text] for text in texts] for texts in texts_of_runs]
        pad_id = self.tokenizer.pad_token_id or 0
        budget = first.config["evaluate"]["tokens"]
        logits = predict(self.model, encoded, pad_id, budget, self.autocast)
        for run, of_run in zip(self.runs, logits):
            check(of_run.isfinite().all(),
                  f"{run.name}: its logits are not finite numbers (computed in precision "
                  f"{self.precision}; --amp off is float32)")
        return [of_run.softmax(dim=1) for of_run in logits]


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


# ---- Scoring on a split --------------------------------------------------------------------------

class Scores:
    """What a run answers on a split.

    .run, .split; .sentences: pairs (language, Sentence); .lines: those of <split>.csv, which an
    earlier call left or `take` computes; .facts: what they are computed with; .folder: where they
    are kept, or None; .told: a line that says where.
    """

    def __init__(self, run, split, languages, out, again):
        corpus, _ = open_corpus(run.meta["data"])
        labels = run.meta["labels"]
        check(list(corpus.labels) == labels,
              f"{corpus.root} has the labels {', '.join(corpus.labels)}; {run.name} was trained on "
              f"{', '.join(labels)}: labels.txt must name these, in this order")
        self.run = run
        self.split = split
        self.folder = None if languages else run.results
        if out:
            self.folder = Path(out).expanduser() / run.name
            check(again or not self.folder.exists(),
                  f"{self.folder} exists; --again writes over it")
        if self.folder and self.folder != run.folder:
            check(not (self.folder / "metrics.jsonl").exists(),
                  f"{self.folder} is another trained run: --out FOLDER writes elsewhere")
        if "adapted_to" in run.meta:
            languages = languages or [run.meta["adapted_to"]]
        read = corpus.read if languages else corpus.read_any
        self.sentences = [(code, sentence) for code in languages or corpus.files
                          for sentence in read(code, split)]
        check(self.sentences, f"{corpus.root}: no language has a file {split}.tsv")
        self.facts = {"prompt": run.fingerprint(), "backbone": run.meta["backbone"],
                      "data": fingerprint(self.sentences)}
        self.lines = []
        self.told = "not written: --out FOLDER keeps the scores"
        if self.folder and not again:
            path = self.folder / f"{split}.json"
            earlier = read_json(path) if path.is_file() else {}
            with reading(path):
                if self.facts.items() <= earlier.items():
                    self.lines = earlier["lines"]
                    precision = earlier["precision"]
                    self.told = (f"{self.folder}: scored already (precision {precision}); --again "
                                 f"scores it again")

    def take(self, probabilities):
        """Compute the lines from the answers (n, C); write them if there is a folder."""
        names = self.run.meta["labels"]
        answers = defaultdict(list)
        rows = []
        for (code, sentence), shares in zip(self.sentences, probabilities.tolist()):
            predicted = shares.index(max(shares))
            answers[code].append((sentence.label, predicted))
            figures = [f"{share:.5f}" for share in shares]
            rows.append([code, sentence.index_id, names[sentence.label], names[predicted],
                         *figures])
        for code, pairs in answers.items():
            labels, predicted = np.array(pairs).T
            self.lines.append({
                "language": code, "n": len(pairs), "accuracy": accuracy(labels, predicted),
                "macro_f1": macro_f1(labels, predicted), "majority": majority(labels)})
        if self.folder:
            self.write(rows)

    def means(self, figure="accuracy"):
        """group_means of one of the figures in the lines."""
        figures = {line["language"]: line[figure] for line in self.lines}
        return group_means(figures, self.run.config, self.run.sources)

    def write(self, predictions):
        """Write <split>_predictions.csv, <split>.csv and <split>.json; elsewhere than in the run's
        own folder also the prompt and its configuration, which the report reads."""
        run = self.run
        path = self.folder / self.split
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder != run.folder:
            save_prompt(self.folder, run.modules, run.meta)
            write_atomically(self.folder / "config.yaml", dump_config(run.config))
        shares = [f"p({name})" for name in run.meta["labels"]]
        columns = ["language", "index_id", "label", "predicted", *shares]
        write_csv(f"{path}_predictions.csv", columns, predictions)
        rows = []
        for code, n, *figures in map(dict.values, self.lines):
            rows.append([code, n, *(f"{figure:.4f}" for figure in figures)])
        write_csv(f"{path}.csv", self.lines[0], rows)
        write_json(f"{path}.json", {            # last: then all three are there
            **self.facts, "groups": self.means(), "lines": self.lines})
        self.told = f"{path}.csv, .json, _predictions.csv"

    def table(self, every_language):
        """The scores as text: means over groups, then every language, the best first."""
        majorities = self.means("majority")
        text = [self.run.name,
                f"  {'mean over languages':<20} accuracy %  majority class %  languages"]
        for title, (mean, scored, of) in self.means().items():
            if scored:
                rest = f" of {of}" if scored < of else ""
                text.append(f"  {title:<20} {mean:10.1f}  {majorities[title][0]:16.1f}  "
                            f"{scored:9}{rest}")
        if every_language:
            cells = []
            for line in sorted(self.lines, key=lambda line: -line["accuracy"]):
                mark = "*" if line["language"] in self.run.sources else " "
                cells.append(f"{line['language']}{mark} {line['accuracy']:5.1f}")
            for start in range(0, len(cells), 6):
                text.append("  " + "   ".join(cells[start:start + 6]))
            text.append("  * source language")
        text.append(f"  {self.told}")
        return "\n".join(text)


def group_scores(scores):
    """Scores without lines -> lists of those whose runs can share one pass through the backbone."""
    groups = defaultdict(list)
    for score in scores:
        if score.lines:
            continue
        run = score.run
        # full fine-tuning has a backbone of its own
        shape = run.prompt.length if run.prompt else run.folder
        alike = [run.meta[key] for key in ("backbone", "reads", "max_length", "labels")]
        groups[str(alike), run.config["train"]["frozen_weights"], shape].append(score)
    return groups.values()


def score_runs(runs, split, languages, device, amp, out=None, again=False):
    """Score runs and print tables -> list of Scores.

    languages: codes, by default all with this split (of an adapted prompt its own). Files go to
    `out`/<name of the run>, by default to each run's own folder. If `languages` are given, or
    backbone or data are not the run's own, nothing is written unless `out` is given. A released
    prompt has its scores in runs/<name>. again=False: a run with scores of the same prompt, data
    and backbone is shown, not computed, and what is in `out` is not written over (ValueError).
    """
    scores = [Scores(run, split, languages, out, again) for run in runs]
    folders = [score.folder for score in scores if score.folder]
    check(len(set(folders)) == len(folders), "two runs would write to the same folder")
    for group in group_scores(scores):
        classifier = Classifier([score.run for score in group], device, amp)
        texts = [[sentence.text for _, sentence in score.sentences] for score in group]
        for score, probabilities in zip(group, classifier.answer(texts)):
            score.facts.update(precision=classifier.precision, device=device.type)
            if out:
                score.facts["backbone"] = score.run.meta["backbone"]
            else:           # not into the run's folder if the backbone turned out to be another
                score.folder = score.folder and score.run.results
            score.take(probabilities)
    for score in scores:
        print(score.table(every_language=len(runs) < 4))
    direct = [score for score in scores if "adapted_to" not in score.run.meta]
    if len(direct) > 1:
        print(method_table(direct))
    return scores


def method_table(scores):
    """Mean ± standard deviation over the runs of each method on the same sources and backbone, as
    text. (Adapted runs, each on a language of its own, have a table in report.py.)"""
    means = defaultdict(list)           # (method, group of languages, setting) -> one mean a run
    for score in scores:
        run = score.run
        method = method_name(run.meta["kind"], run.meta["prompt"])
        setting = f"{run.sources} {run.meta['backbone'].get('fingerprint')}"
        for title, (mean, _, _) in score.means().items():
            if mean is not None:
                means[f"{method}, {len(run.sources)} sources", title, setting].append(mean)
    text = ["mean ± standard deviation over runs"]
    for (method, title, _), values in means.items():
        spread = f"± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        text.append(f"  {method:<20} {title:<20} {np.mean(values):5.1f} {spread:<6} "
                    f"{len(values)} runs")
    return "\n".join(text)


# ---- The command ---------------------------------------------------------------------------------

def read_stdin_texts():
    """The lines of standard input, blank ones included; ValueError with the number of a line that
    is not UTF-8."""
    texts = []
    for number, line in enumerate(sys.stdin.buffer, start=1):
        with reading(f"standard input:{number}"):
            texts.append(line.decode("utf-8-sig").rstrip("\r\n"))
    return texts


def classify(runs, texts, device, amp):
    """Print what each run says of each text: [run,] label, probability, text, with tabs between.

    A line for each text, its whitespace collapsed; for a blank one label and probability are empty.
    """
    with reading("--text"):
        "".join(texts).encode()             # what the shell passed may not be UTF-8
    known = [text for text in texts if text.strip()]
    check(known, "--text: nothing to classify")
    for run in runs:
        name = f"{run.name}\t" if len(runs) > 1 else ""
        labels, probabilities = Classifier([run], device, amp)(known)
        answers = zip(labels, probabilities)
        for text in texts:
            answer = "\t"
            if text.strip():
                label, shares = next(answers)
                answer = f"{label}\t{shares.max():.3f}"
            print(f"{name}{answer}\t{' '.join(text.split())}")


def open_runs(args):
    """Run objects of the RUN arguments. Of several, what is not a run or is damaged is left out
    with a warning, so that `dir/*` works; an error if none is left."""
    runs = []
    for where in args.runs:
        try:
            runs.append(Run(where, args.backbone, args.data, args.trust_remote_code))
        except (ValueError, FileNotFoundError) as error:
            if len(args.runs) == 1:
                raise
            warn(f"left out: {error}")
    check(runs, f"none of the {len(args.runs)} RUN arguments is a run")
    return runs


OPTIONS = """
--split NAME=test  train, dev or test
--languages CODES  only these languages, or groups of them, separated by commas
--again  score again what has been scored
--trust-remote-code  allow code that comes with the backbone to run
--device NAME=auto  cpu, cuda, cuda:1 ...; auto: a GPU if there is one
--amp TYPE=auto  bf16, fp16 or off; auto: what the device is fast at
--data DIR  folder or dataset, instead of the run's own
--backbone NAME  folder or hub name, instead of the run's own
--out DIR  folder for the results, instead of each run's own
"""


def main(argv=None):
    """The command line."""
    parser = make_parser("Score prompts on every language, classify texts, or export.", OPTIONS)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="run folders, or hub names (name@branch); before --text")
    parser.add_argument("--text", nargs="*", help="classify these, or the lines of standard input")
    parser.add_argument("--export", nargs=2, metavar=("peft", "DIR"),
                        help="write a folder that peft loads")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    runs = open_runs(args)
    first = runs[0]
    if args.export:
        from formats import export_peft
        form, folder = args.export
        check(form == "peft" and len(runs) == 1,
              "--export takes one RUN, the word peft and a new folder")
        export_peft(folder, first.prompt, first.modules["head"], first.meta)
        print(f"{folder}: written for peft, with the names of the labels in {folder}/labels.json")
    elif args.text is not None:
        classify(runs, args.text or read_stdin_texts(), device, args.amp)
    else:
        languages = resolve_group(first.config, split_commas(args.languages))
        score_runs(runs, args.split, languages, device, args.amp, args.out, args.again)


if __name__ == "__main__":
    run_main(main)
