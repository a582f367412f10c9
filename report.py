"""Tables, comparisons and pictures from scored runs: the paper's Table 1, ours beside it.

The paper's section "Results". It works from the files that training and evaluate.py left in each
run folder (prompt.json, config.yaml, test.csv, test_predictions.csv), without backbone or corpus.
Everything is computed anew from the predictions, and what is missing is said.

    python report.py runs/* --compare xpe spt --plot gain.png --out report

gives, for sample/e5.yaml (ten seeds; gain-languages.png is the same with names):

    | method | source | seeds | trainable |    Sources | Low-performing | ...
    | :----- | :----- | ----: | --------: | ---------: | -------------: | ...
    | xpe    | joshi5 |    10 |   241,735 | 84.9 ± 1.5 |     50.3 ± 1.4 | ...

Read downwards: published figures, run folders, means over seeds, comparison, tables, pictures, the
command. Letters: S seeds, I test sentences.
"""
import argparse
import csv
import io
import re
import shlex
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import numpy as np

from config import (HERE, in_reach, read_config, resolve_group, resolve_targets, warn,
                    with_other_targets)
from data import SPLITS, nearest, read_text, run_main
from evaluate import accuracy, group_means, method_name, shorten_list, to_csv, why_no_run
from xpe import read_json, write_atomically

KINDS = ("full", "head", "spt", "dual", "xpe")                  # their order in the tables


# ---- Published figures: accuracy in percent on SIB-200's test split ----

# The columns of the published figures, groups of config.yaml
PAPER_GROUPS = ("low_performing", "unseen", "seen_without_joshi5", "all_without_joshi5")
# paper: XLM-R-large, zero-shot, mean over languages and ten seeds; None: not known here
PUBLISHED = (
    ("spt", "joshi5", (36.0, 56.0, 85.6, 68.7)),
    ("dual30", "joshi5", (36.8, None, None, None)),
    ("dual70", "joshi5", (37.3, None, 86.6, None)),
    ("xpe", "joshi5", (39.1, 57.2, 84.5, 69.0)),
    ("spt", "enarzho", (35.2, None, None, None)),
    ("xpe", "enarzho", (35.3, None, None, None)),
    ("spt", "seen", (39.1, None, None, None)),
    ("xpe", "seen", (41.9, None, None, None)),
)
# The authors' own later runs, ten seeds; the last line is a mean and its deviation over seeds.
# E, the encoded rows' embedding: at the global rate of 5e-5 if nothing else is said
RERUNS = (
    ("spt", "joshi5", (35.8, 56.0, 85.8, 68.8)),
    ("xpe", "joshi5", (37.9, 56.5, 84.9, 68.7)),
    ("xpe, E at 5e-3", "joshi5", (38.9, None, None, None)),
    ("xpe - spt", "joshi5", ("+2.03 ± 1.34", "+0.50 ± 0.98", "-0.85 ± 1.06", "-0.08 ± 0.84")),
)
# Columns of baselines.csv -> method and source as the tables name them
BASELINES = {
    "xlmr_large_full": ("full, supervised", "each itself"),
    "xlmr_large_full_from_eng": ("full", "eng_Latn"),
    "xlmr_large_full_from_arb": ("full", "arb_Arab"),
    "xlmr_large_full_from_zho": ("full", "zho_Hans"),
    "gpt35_zero_shot": ("GPT-3.5, asked", "none"),
    "gpt4_zero_shot": ("GPT-4, asked", "none"),
}


def read_csv(path):
    """The lines of a CSV file as dicts; lines that begin with # are comments."""
    lines = read_text(path).splitlines(keepends=True)
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def read_language_facts():
    """baselines.csv -> {code: its line: code, name, family and published figures, as text}."""
    return {line["code"]: line for line in read_csv(HERE / "baselines.csv")}


def published_lines(published, titles):
    """PUBLISHED or RERUNS as lines of a table; titles: {target group: its title}."""
    lines = []
    for method, source, figures in published:
        line = {"method": method, "source": source, "seeds": 10}
        for group, figure in zip(PAPER_GROUPS, figures):
            if group in titles:
                line[titles[group]] = figure
        lines.append(line)
    return lines


def baseline_lines(config, facts):
    """Means over the target groups of the figures that SIB-200's paper gives for each language."""
    # paper: nqo_Nkoo is missing in the published table, so it is left out of all of them
    complete = [line for line in facts.values() if all(line.values())]
    lines = []
    for column, (method, source) in BASELINES.items():
        scores = {line["code"]: float(line[column]) for line in complete}
        means = group_means(scores, config, sources=[])
        line = {"method": method, "source": source}
        for title in config["targets"]:
            line[title] = means[title][0]
        lines.append(line)
    return lines


# ---- Run folders ----

class LeftOut(Exception):
    """A folder that the report has to do without; the text says why."""


class ScoredRun:
    """A run as its prompt.json has it, and what it got right.

    hits: {language: bool array, the sentences that it got right}; scores: {language: accuracy in
    percent}. Raises LeftOut if prompt.json does not say which method it is.
    """

    def __init__(self, name, meta, config, hits, scores):
        self.name = name
        self.kind = meta["kind"]
        self.method = method_of(meta)                   # as the tables name it: xpe, dual30 ...
        self.sources = meta["sources"]
        self.source = name_sources(self.sources, config)
        self.seed = meta["seed"]
        self.backbone = meta["backbone"]                # name and, if it is known, fingerprint
        self.adapted_from = meta.get("adapted_from")    # the name of a run, or None
        self.adapted_to = meta.get("adapted_to")        # a language, or None
        training = meta.get("training")
        if not isinstance(training, dict):              # the authors' release says nothing of it
            training = {}
        self.trainable = training.get("trainable")
        self.settings = training.get("settings")
        if not isinstance(self.settings, dict):
            self.settings = {}
        self.hits = hits
        self.scores = scores
        self.figures = {}                               # column of the table -> percent
        self.covered = {}                               # group -> (languages scored, of how many)


def find_folders(arguments, notes):
    """The arguments that are folders, each once. Notes what the others are."""
    folders = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            folders.setdefault(path.resolve(), path)
        elif path.exists():
            notes.append(f"{argument}: left out, a file; a run is a folder")
        elif any(letter in argument for letter in "*?["):
            notes.append(f"{argument}: left out, no folder matches this pattern")
        else:
            notes.append(f"{argument}: left out, no such folder")
    return list(folders.values())


def read_groups(folders, split, notes):
    """The configuration whose groups and targets hold: that of the first scored run that has one.
    Notes the runs that lack one, or have other targets in it."""
    saved = [folder / "config.yaml" for folder in folders]
    saved = [path for path in saved if path.is_file()]
    needed = ("prompt.json", f"{split}_predictions.csv")
    scored = [path for path in saved if all((path.parent / name).is_file() for name in needed)]
    origin = HERE / "config.yaml"
    if scored:
        origin = scored[0]
    for folder in folders:
        is_run = (folder / "prompt.json").is_file()
        if is_run and folder / "config.yaml" not in saved:
            notes.append(f"{folder}: config.yaml is missing, so groups of its own are not known; "
                         f"groups and targets are those of {origin}")
    config = read_config(origin)
    others = [str(path.parent) for path in with_other_targets(scored, config)]
    if others:
        notes.append(f"{shorten_list(others)}: config.yaml has other targets there; the columns "
                     f"are those of {origin}")
    return config


def read_meta(folder):
    """prompt.json (of either format), checked as far as the report needs it. Raises LeftOut."""
    problem = why_no_run(folder)
    if problem:
        raise LeftOut(problem)
    path = folder / "prompt.json"
    if not path.is_file():
        raise LeftOut(f"it is in the form of the authors' release: "
                      f"python {in_reach('evaluate.py')} {shlex.quote(str(folder))} scores it, "
                      f"and then the folder in runs/ can be reported")
    try:
        meta = read_json(path)
    except ValueError as error:
        raise LeftOut(str(error)) from None
    needed = {"kind": str, "seed": int, "sources": list, "backbone": dict}
    missing = [key for key in needed if key not in meta]
    if missing:
        raise LeftOut(f"prompt.json lacks {', '.join(missing)}")
    for key, kind in needed.items():
        if type(meta[key]) is not kind:
            raise LeftOut(f"prompt.json: {key} cannot be {meta[key]!r}")
    if meta["kind"] not in KINDS:
        raise LeftOut(f"prompt.json: kind {meta['kind']!r} is not one of {', '.join(KINDS)}")
    if not isinstance(meta["backbone"].get("name"), str):
        raise LeftOut("prompt.json: the backbone has no name")
    if not all(isinstance(code, str) for code in meta["sources"]):
        raise LeftOut("prompt.json: sources must be a list of language codes")
    texts = {key: meta.get(key) for key in ("adapted_from", "adapted_to")}
    texts["the backbone's fingerprint"] = meta["backbone"].get("fingerprint")
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise LeftOut(f"prompt.json: {key} cannot be {value!r}")
    return meta


def read_answers(folder, split):
    """<split>_predictions.csv -> {language: (sentences' ids, labels, predictions)}.

    Raises LeftOut if it is missing or not as evaluate.py writes it.
    """
    path = folder / f"{split}_predictions.csv"
    if not path.is_file():
        command = f"python {in_reach('evaluate.py')} {shlex.quote(str(folder))}"
        if split != "test":
            command += f" --split {split}"
        raise LeftOut(f"no {path.name}; {command} scores it")
    answers = {}
    try:
        for line in read_csv(path):
            ids, labels, predictions = answers.setdefault(line["language"], ([], [], []))
            ids.append(line["index_id"])
            labels.append(line["label"])
            predictions.append(line["predicted"])
    except (KeyError, ValueError, csv.Error) as error:
        raise LeftOut(f"{path.name} is not as evaluate.py writes it: {error!r}") from None
    if not answers:
        raise LeftOut(f"{path.name} holds no predictions")
    for language, (ids, _, _) in answers.items():
        if len(set(ids)) < len(ids):
            raise LeftOut(f"{path.name}: a sentence occurs twice in {language}")
    return answers


def check_scores(folder, split, hits, scores):
    """Raise LeftOut if <split>.csv is not what the predictions beside it give."""
    path = folder / f"{split}.csv"
    if not path.is_file():
        raise LeftOut(f"no {path.name} beside the predictions; score it again")
    computed = {}
    for language in hits:
        computed[language] = (str(len(hits[language])), f"{scores[language]:.4f}")
    written = {}
    try:
        for line in read_csv(path):
            written[line.get("language")] = (line.get("n"), line.get("accuracy"))
    except (ValueError, csv.Error) as error:
        raise LeftOut(f"{path.name} is not as evaluate.py writes it: {error!r}") from None
    if written != computed:
        raise LeftOut(f"{path.name} disagrees with the predictions beside it; score it again")


def name_sources(sources, config):
    """The name of the group that holds just these languages, or else their codes."""
    for name in config["groups"]:
        if re.fullmatch(r"\d+-languages", name):       # of train.py --languages: says too little
            continue
        try:
            codes = resolve_group(config, name)
        except ValueError:      # a group that nobody uses costs no report
            continue
        if set(codes) == set(sources):
            return name
    return "+".join(sources)


def method_of(meta):
    """The method's name in the tables. Raises LeftOut if prompt.json does not say enough."""
    try:
        return method_name(meta["kind"], meta.get("prompt"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise LeftOut(f"prompt.json: its prompt cannot be named ({error!r})") from None


def read_run(folder, split, config, gold):
    """A folder -> ScoredRun. Raises LeftOut if that cannot be had.

    gold: {language: (sentences' ids, labels)} of the runs before, filled here. Raises ValueError if
    this run met other sentences: then the runs cannot stand in one table.
    """
    meta = read_meta(folder)
    hits = {}
    scores = {}
    answers = read_answers(folder, split)
    for language, (ids, labels, predictions) in answers.items():
        hits[language] = np.array(labels) == np.array(predictions)
        scores[language] = accuracy(labels, predictions)
    check_scores(folder, split, hits, scores)
    for language, (ids, labels, _) in answers.items():
        if gold.setdefault(language, (ids, labels)) != (ids, labels):
            raise ValueError(f"{folder}: other sentences or labels in {language} than the runs "
                             f"before it; runs of one corpus can be reported together")

    return ScoredRun(folder.resolve().name, meta, config, hits, scores)


def read_runs(folders, split, config, notes):
    """-> (runs, gold). Notes the folders that are left out. Raises ValueError if none is left."""
    runs = []
    gold = {}
    for folder in folders:
        try:
            runs.append(read_run(folder, split, config, gold))
        except LeftOut as reason:
            notes.append(f"{folder}: left out, {reason}")
    if not runs:
        raise ValueError("none of these is a scored run" + "".join(f"; {note}" for note in notes))
    return runs, gold


def check_one_backbone(runs, notes):
    """The backbone's name. Raises ValueError for several: the weights decide, not the name."""
    name_of = {}                                        # fingerprint -> the first name it has
    names = set()                                       # last parts of all names
    without = []
    for run in runs:
        fingerprint = run.backbone.get("fingerprint")
        if fingerprint is None:
            without.append(run.name)
        else:
            name_of.setdefault(fingerprint, run.backbone["name"])
        names.add(Path(run.backbone["name"]).name)
    if len(name_of) > 1:
        listed = ", ".join(f"{name} ({fingerprint})" for fingerprint, name in name_of.items())
        raise ValueError(f"runs of several backbones, {listed}: report one at a time")
    if without and len(names) > 1:
        listed = ", ".join(sorted(names))
        raise ValueError(f"runs of several backbones, {listed}, and {shorten_list(without)} has no "
                         f"fingerprint: report one at a time")
    if without and name_of:
        notes.append(f"{shorten_list(without)}: without a fingerprint of the backbone, so its name "
                     f"has to do")
    return Path(runs[0].backbone["name"]).name


def leave_languages_out(codes, runs, gold, notes):
    """Take languages out of all runs, and note it. Raises ValueError for one that no run has."""
    for code in codes:
        if code not in gold:
            raise ValueError(f"--leave-out: {code!r} is not among the scored languages"
                             f"{nearest(code, gold)}")
        for run in runs:
            run.hits.pop(code, None)
            run.scores.pop(code, None)
    if codes:
        notes.append(f"left out of all figures but the published ones: {', '.join(codes)}")


# ---- Means over seeds ----

def note_unscored_targets(runs, config, notes):
    """Note, once for all runs alike, which languages of the target groups have no score."""
    scored_somewhere = set().union(*(run.scores for run in runs))
    run_names = {}                                      # (title, languages) -> names of runs
    for title, codes in config["targets"].items():
        absent = [code for code in codes if code not in scored_somewhere]
        if absent:
            notes.append(f"{title}: {len(absent)} of {len(codes)} languages are scored in no run: "
                         f"{shorten_list(absent)} (does the corpus have them?)")
        for run in runs:
            lacking = []
            for code in codes:
                if code in scored_somewhere and code not in run.scores and code not in run.sources:
                    lacking.append(code)
            if lacking:
                run_names.setdefault((title, tuple(lacking)), []).append(run.name)
    for (title, lacking), names in run_names.items():
        total = len(config["targets"][title])
        notes.append(f"{shorten_list(names)}: {title}: {len(lacking)} of {total} languages not "
                     f"scored: {shorten_list(lacking)}")


def note_sources_among_targets(runs, config, notes):
    """Note, once for each source group, which target groups it makes smaller."""
    for run in {run.source: run for run in runs}.values():
        smaller = []
        for title, codes in config["targets"].items():
            left = [code for code in codes if code not in run.sources]
            if len(left) < len(codes):
                smaller.append(f"{title} {len(left)} of {len(codes)}")
        if smaller:
            notes.append(f"trained on {run.source}: a source is no target, so there remain of "
                         f"{', '.join(smaller)}")


def add_group_figures(run, config):
    """What the table averages of a run: its mean over each group of languages, in percent."""
    for title, (mean, scored, size) in group_means(run.scores, config, run.sources).items():
        run.covered[title] = (scored, size)
        run.figures[title] = mean
        if mean is None:                                # no language of the group is scored
            run.figures[title] = np.nan


def add_adaptation_figures(run, scores_of_run, notes):
    """The accuracy of an adapted run before and after; no figures if one of them is missing.

    scores_of_run: {name of a run that is not adapted: its scores}.
    """
    before = scores_of_run.get(run.adapted_from, {}).get(run.adapted_to)
    after = run.scores.get(run.adapted_to)
    if after is None:
        notes.append(f"{run.name}: left out, it is not scored on {run.adapted_to}")
        return
    if before is None:
        notes.append(f"{run.name}: left out, {run.adapted_from}, its source, is not scored on "
                     f"{run.adapted_to} or not among these runs")
        return
    run.figures.update(before=before, after=after, gain=after - before)


def group_by_method(runs):
    """Runs -> lists of runs that differ in seed and language alone, ordered as in the tables."""
    methods = {}
    for run in runs:
        key = (run.source, KINDS.index(run.kind), run.method)
        methods.setdefault(key, []).append(run)
    return [methods[key] for key in sorted(methods)]


def check_seeds(same_method, runs, notes):
    """Note the seeds (and adapted languages) that other methods on the same sources have.

    Raises ValueError if one occurs twice.
    """
    first = same_method[0]
    present = [(run.seed, run.adapted_to or "") for run in same_method]
    if len(set(present)) < len(present):
        names = ", ".join(run.name for run in same_method)
        raise ValueError(f"{first.method} {first.source}: the same seed occurs twice in {names}")
    peers = [run for run in runs if run.source == first.source]
    missing = []
    for seed in sorted({run.seed for run in peers}):
        for language in sorted({run.adapted_to or "" for run in peers}):
            if (seed, language) not in present:
                missing.append(f"{seed} {language}".strip())
    if missing:
        notes.append(f"{first.method} {first.source}: missing although other runs have them: "
                     f"seeds {', '.join(missing)}")


def note_mixed_settings(same_method, notes):
    """Note the settings in which runs that are averaged differ and should not."""
    first = same_method[0]
    mixed = set()
    for run in same_method:
        for key in run.settings.keys() | first.settings.keys():
            if run.settings.get(key) != first.settings.get(key):
                mixed.add(key)
    mixed -= {"learners_at_once", "tokens"}         # for the memory that there is: same recipe
    if first.adapted_to:
        mixed -= {"data", "source"}                 # each has its own language, each seed its start
    if mixed:
        notes.append(f"{first.method} {first.source}: averaged, although its runs differ in "
                     f"{', '.join(sorted(mixed))}")


def average_over_seeds(same_method):
    """Runs of one method -> a line: the mean of each figure and, as "<name> std", its deviation.

    Several languages of one seed (adapted runs) are averaged first. The deviation is that of a
    sample (n - 1); one seed has none. "<name> languages": how many, where a group lacks some.
    """
    first = same_method[0]
    seeds = sorted({run.seed for run in same_method})
    line = {"method": first.method, "source": first.source, "seeds": len(seeds)}
    if first.adapted_to:
        languages = sorted({run.adapted_to for run in same_method})
        line["languages"] = shorten_list(languages)
    else:
        line["trainable"] = first.trainable
    for name in first.figures:
        values = []
        for seed in seeds:
            of_seed = [run.figures[name] for run in same_method if run.seed == seed]
            values.append(np.mean(of_seed))
        line[name] = float(np.mean(values))
        if len(values) > 1:
            line[f"{name} std"] = float(np.std(values, ddof=1))
    for name in first.covered:
        scored, size = min(run.covered[name] for run in same_method)
        if 0 < scored < size:
            line[f"{name} languages"] = f"{scored} of {size}"
    return line


def average_methods(runs, notes):
    """Runs -> one line of a table for each method and source group."""
    lines = []
    for same_method in group_by_method(runs):
        check_seeds(same_method, runs, notes)
        note_mixed_settings(same_method, notes)
        lines.append(average_over_seeds(same_method))
    return lines


# ---- Comparison of two methods: paired hits, intervals, a test for each language ----

ENOUGH_SEEDS = 5                        # with fewer the report says what an interval leaves out
LEVEL = 0.05                            # of tests; intervals are 95 % ones
ANGLES = np.linspace(0, np.pi / 2, 4_001)               # grid of the integral in student_tail


@dataclass
class SharedSentences:
    """The answers of methods A and B to the same sentences, seed by seed."""
    seeds: list
    sources: set            # of either
    sources_title: str
    ids: dict               # language -> ids of its sentences
    a: dict                 # language -> (S, I) floats, 1 where A is right
    b: dict

    def targets(self):
        """The languages that are a source of neither."""
        return [language for language in self.ids if language not in self.sources]


@dataclass
class Comparison:
    """What came out of it: lines of the groups, and of the languages, the largest gain first."""
    names: list             # of A and B, as they were asked for
    seeds: int
    sources: set
    groups: list
    languages: list

    def interval_title(self):
        """What the intervals of a picture are."""
        if self.seeds == 1:
            return "95 % intervals over test sentences alone (one seed)"
        return f"95 % intervals ({self.seeds} seeds)"

    def axis_label(self):
        """What the horizontal axis of a picture is."""
        return f"accuracy of {self.names[0]} minus {self.names[1]} (points)"

    def some_significant(self):
        """Whether at least one language is."""
        return any(line["note"] == "significant" for line in self.languages)


def pick_method(runs, name):
    """The runs of a method, given as xpe or xpe-joshi5. ValueError if no or several methods fit."""
    picked = [run for run in runs if name in (run.method, f"{run.method}-{run.source}")]
    if len({(run.method, run.source) for run in picked}) != 1:
        known = sorted({f"{run.method}-{run.source}" for run in runs})
        raise ValueError(f"--compare {name}: must be one of {', '.join(known)}"
                         f"{nearest(name, known)}")
    return picked


def pair_hits(runs_a, runs_b, gold, notes):
    """Runs of A and of B -> SharedSentences of the seeds and languages that all of them have.

    Notes what is lost. Raises ValueError if nothing is left.
    """
    run_a = {run.seed: run for run in runs_a}
    run_b = {run.seed: run for run in runs_b}
    seeds = sorted(run_a.keys() & run_b.keys())
    paired = [run_a[seed] for seed in seeds] + [run_b[seed] for seed in seeds]
    scored = set().union(*(run.hits for run in paired))
    languages = sorted(scored)
    for run in paired:
        languages = [code for code in languages if code in run.hits]
    if not languages:
        raise ValueError("--compare: the two have no seed and language in common")
    if run_a.keys() != run_b.keys() or len(languages) < len(scored):
        notes.append(f"compare: seeds {', '.join(map(str, seeds))} are those that both have; "
                     f"{len(languages)} of {len(scored)} languages are scored in all of their runs")
    hits_a = {}
    hits_b = {}
    for code in languages:
        hits_a[code] = np.array([run_a[seed].hits[code] for seed in seeds], dtype=float)
        hits_b[code] = np.array([run_b[seed].hits[code] for seed in seeds], dtype=float)
    sources = set().union(*(run.sources for run in paired))
    title = "Sources"
    if any(set(run.sources) != sources for run in paired):
        title = "Sources of either"     # some of them are zero-shot for one of the two
    ids = {code: gold[code][0] for code in languages}
    return SharedSentences(seeds, sources, title, ids, hits_a, hits_b)


def average_languages(hits, ids, languages):
    """The hits of each seed and sentence, averaged over languages: (S, I).

    A sentence has one id in all languages, and its translations are answered alike, so they count
    as one observation. The mean over all is the mean of the languages' accuracies. A sentence that
    a language lacks counts as that language's mean, and the deviations of those that it has are
    enlarged by all / its own, so that its error stays that of its own sentences.
    hits: {language: (S, its I)}; ids: {language: ids of its sentences}.
    """
    known_ids = sorted(set().union(*(ids[language] for language in languages)))
    position = {known_id: number for number, known_id in enumerate(known_ids)}
    seeds = len(hits[languages[0]])
    total = np.zeros((seeds, len(known_ids)))
    for language in languages:
        mean = hits[language].mean(axis=1, keepdims=True)
        positions = [position[known_id] for known_id in ids[language]]
        weight = len(known_ids) / len(positions)
        total += mean
        total[:, positions] += weight * (hits[language] - mean)
    return total / len(languages)


def sum_of_rest(values):
    """What seeds and sentences do not explain of values (S, I), squared and summed."""
    of_seeds = values.mean(axis=1, keepdims=True)
    of_sentences = values.mean(axis=0, keepdims=True)
    return np.sum((values - of_seeds - of_sentences + values.mean()) ** 2)


def estimate_difference(a, b):
    """Mean of a - b, (S, I) each -> (mean, its standard error, the error's degrees of freedom).

    Seeds and sentences are both drawn by chance and crossed: each run answers each sentence. Both
    methods answer the same sentences, so these are paired; the runs are not, because equal seeds
    make runs of two methods no more alike. With mean squares M as in an analysis of variance the
    squared error is (M_seeds + M_sentences - M_rest) / (S I). Satterthwaite's formula gives its
    degrees of freedom: near 2 (S - 1) where the seeds make the differences, near I - 1 where the
    sentences do. Neither can vary less than the rest, so no mean square is below that of the rest.
    With one seed the sentences are all there is: the two runs are held fixed.

    ours: measured in tests/false_alarms.py. Of equal methods a bootstrap over seeds and sentences
    calls too many different with three seeds, and seeds in pairs (S - 1 degrees) too few.
    """
    seeds, sentences = a.shape
    difference = (a - b).mean(axis=0)
    mean = difference.mean()
    if sentences < 2:
        return mean, np.nan, 1.0
    square_sentences = seeds * difference.var(ddof=1)
    if seeds == 1:
        return mean, np.sqrt(square_sentences / sentences), sentences - 1.0

    variance_of_seeds = a.mean(axis=1).var(ddof=1) + b.mean(axis=1).var(ddof=1)
    cells = (seeds - 1) * (sentences - 1)
    square_rest = (sum_of_rest(a) + sum_of_rest(b)) / cells
    square_seeds = max(sentences * variance_of_seeds, square_rest)
    square_sentences = max(square_sentences, square_rest)

    square = square_seeds + square_sentences - square_rest
    if square < 1e-12:          # neither seeds nor sentences differ: nothing to estimate from
        return mean, 0.0, sentences - 1.0
    uncertainty = square_seeds ** 2 / (2 * (seeds - 1))
    uncertainty += square_sentences ** 2 / (sentences - 1)
    uncertainty += square_rest ** 2 / (2 * cells)
    return mean, np.sqrt(square / (seeds * sentences)), square ** 2 / uncertainty


def student_tail(freedom):
    """For t = sqrt(freedom) tan(ANGLES): the two-sided p-values of Student's t, from 1 to 0.

    In the angle its density is cos^(freedom - 1); the integral from each angle on is a sum of
    trapezoids. (numpy has no t distribution.)
    """
    density = np.cos(ANGLES) ** (freedom - 1)
    strips = (density[1:] + density[:-1]) / 2
    tail = np.append(np.cumsum(strips[::-1])[::-1], 0.0)
    return tail / tail[0]


def t_quantile(freedom, level=LEVEL):
    """The t that is exceeded, in either direction, with probability `level`."""
    angle = np.interp(-level, -student_tail(freedom), ANGLES)
    return np.sqrt(freedom) * np.tan(angle)


def t_test(mean, error, freedom):
    """The two-sided p-value of a mean with this standard error, if the truth is zero."""
    if np.isnan(error) or mean == 0:
        return 1.0
    if error == 0:
        return 0.0
    angle = np.arctan(abs(mean) / error / np.sqrt(freedom))
    return float(np.interp(angle, ANGLES, student_tail(freedom)))


def holm(p_values):
    """Holm's adjusted p-values: those up to 0.05 are significant together at 0.05."""
    count = len(p_values)
    order = np.argsort(p_values)
    adjusted = np.sort(p_values) * np.arange(count, 0, -1)
    adjusted = np.minimum(1.0, np.maximum.accumulate(adjusted))
    in_given_order = np.empty(count)
    in_given_order[order] = adjusted
    return in_given_order


def interval(mean, error, freedom):
    """A - B as a table's columns: the difference and the ends of its 95 % interval, in points."""
    reach = t_quantile(freedom) * error
    ends = {"A - B": mean, "low": mean - reach, "high": mean + reach}
    return {name: 100 * float(value) for name, value in ends.items()}


def compare_languages(paired):
    """A line for each language, the largest gain first: accuracy of A and B, difference, interval.

    p: a t test of estimate_difference, the p-values of all targets adjusted together by Holm.
    note: "source", "significant" or "". With one seed there is no test: see seed_lines.
    """
    lines = []
    p_values = []
    targets = paired.targets()
    for language in paired.ids:
        estimate = estimate_difference(paired.a[language], paired.b[language])
        line = {"language": language}
        line["A"] = 100 * float(paired.a[language].mean())
        line["B"] = 100 * float(paired.b[language].mean())
        line.update(interval(*estimate))
        line["p"] = None
        line["note"] = ""
        if language not in targets:
            line["note"] = "source"
        lines.append(line)
        p_values.append(t_test(*estimate))

    if len(paired.seeds) > 1 and targets:
        tested = [n for n, line in enumerate(lines) if line["note"] != "source"]
        adjusted = holm(np.array([p_values[n] for n in tested]))
        for n, p in zip(tested, adjusted):
            lines[n]["p"] = float(p)
            if p <= LEVEL:
                lines[n]["note"] = "significant"
    lines.sort(key=lambda line: -line["A - B"])
    return lines


def compare_groups(paired, config):
    """A line for the sources and each target group: accuracy of A and B, difference, interval."""
    groups = {paired.sources_title: sorted(paired.sources)}
    for title, codes in config["targets"].items():
        groups[title] = [code for code in codes if code not in paired.sources]
    lines = []
    for title, codes in groups.items():
        languages = [code for code in codes if code in paired.ids]
        if languages:
            a = average_languages(paired.a, paired.ids, languages)
            b = average_languages(paired.b, paired.ids, languages)
            line = {"group": title, "languages": len(languages)}
            line["A"] = 100 * float(a.mean())
            line["B"] = 100 * float(b.mean())
            line.update(interval(*estimate_difference(a, b)))
            lines.append(line)
    return lines


def compare_methods(runs, names, config, gold, notes):
    """Method names[0] (A) against names[1] (B) -> Comparison.

    Raises ValueError as pick_method and pair_hits do.
    """
    runs_a = pick_method(runs, names[0])
    runs_b = pick_method(runs, names[1])
    if runs_a == runs_b:
        raise ValueError(f"--compare {names[0]} {names[1]}: name two different methods")
    paired = pair_hits(runs_a, runs_b, gold, notes)
    groups = compare_groups(paired, config)
    languages = compare_languages(paired)
    return Comparison(names, len(paired.seeds), paired.sources, groups, languages)


def verdict(language_lines):
    """How many target languages each method wins, and which of them are significant: a sentence."""
    targets = [line for line in language_lines if line["note"] != "source"]
    if not targets:
        return "No target language is scored in both."
    won = sum(line["A - B"] > 1e-9 for line in targets)
    lost = sum(line["A - B"] < -1e-9 for line in targets)
    text = f"Target languages: {won} won, {lost} lost"
    if all(line["p"] is None for line in targets):
        return f"{text}; with one seed none is tested."
    significant = []
    for line in targets:
        if line["note"] == "significant":
            significant.append(f"{line['language']} {line['A - B']:+.1f}")
    return (f"{text}; significant (t test over seeds and paired sentences, by Holm "
            f"over {len(targets)} languages): {', '.join(significant) or 'none'}.")


def seed_lines(seeds):
    """What an interval of few seeds does not say (tests/false_alarms.py has the rates)."""
    if seeds >= ENOUGH_SEEDS:
        return []
    if seeds == 1:
        return ["One seed: this compares two runs, not two methods. The intervals cover the choice "
                "of test sentences alone; of two equal methods they call one better in about a "
                "third of all cases, because runs of one method differ, too."]
    return [f"{seeds} seeds: how much runs differ by chance is guessed from {seeds} runs of each "
            f"method. The intervals allow for that as far as runs differ like draws from a normal "
            f"distribution; they do not cover a rare bad (or good) run that {seeds} seeds have not "
            f"met. The paper has ten."]


# ---- Tables: Markdown that is aligned in a terminal, too ----

TEXT_COLUMNS = ("method", "source", "languages adapted to", "group")
SIGNED_COLUMNS = ("A - B", "low", "high")


@dataclass
class Table:
    """A title, and lines (dicts); columns: {key in the lines: heading}; remarks stand below it."""
    title: str
    columns: dict
    lines: list
    remarks: list = field(default_factory=list)


def format_number(value, form):
    """The value in this form (".1f", "+.2f"), but zero without a sign."""
    text = format(value, form)
    if float(text) == 0:
        return text.lstrip("+-")
    return text


def format_cell(line, key):
    """A value of a line as text, with what the line has beside it.

    That is its deviation over the seeds, and the languages if it is the mean of a part of a group,
    which would otherwise stand beside the published mean of the whole.
    """
    value = line.get(key)
    if value is None or value != value:                 # None or not a number
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if key in SIGNED_COLUMNS:
        return format_number(value, "+.2f")
    text = format_number(value, ".1f")
    if f"{key} std" in line:
        text += f" ± {line[f'{key} std']:.1f}"
    if f"{key} languages" in line:
        text += f" ({line[f'{key} languages']})"
    return text


def format_table(table, widths):
    """Text of one table, its columns as wide as `widths` say; text to the left, numbers right."""
    is_text = [heading in TEXT_COLUMNS for heading in table.columns.values()]
    rules = []
    for width, left in zip(widths, is_text):
        if left:
            rules.append(":" + "-" * (width - 1))
        else:
            rules.append("-" * (width - 1) + ":")
    headings, *lines = cells_of(table)
    parts = [table.title, ""]
    for cells in (headings, rules, *lines):
        padded = []
        for cell, width, left in zip(cells, widths, is_text):
            padded.append(cell.ljust(width) if left else cell.rjust(width))
        parts.append("| " + " | ".join(padded) + " |")
    for remark in table.remarks:
        parts += ["", remark]
    return "\n".join(parts)


def cells_of(table):
    """The headings, then the lines, as lists of text."""
    rows = [list(table.columns.values())]
    for line in table.lines:
        rows.append([format_cell(line, key) for key in table.columns])
    return rows


def format_tables(tables):
    """Text of all tables; those with the same headings get the same widths."""
    widths = {}
    for table in tables:
        headings = tuple(table.columns.values())
        known = widths.setdefault(headings, [0] * len(headings))
        for cells in cells_of(table):
            for n, cell in enumerate(cells):
                known[n] = max(known[n], len(cell), 3)
    parts = [format_table(table, widths[tuple(table.columns.values())]) for table in tables]
    return "\n\n".join(parts)


def accuracy_tables(direct, config, titles, facts, about, notes):
    """Ours and, where the targets are the paper's groups, the published ones, in the same columns.

    titles: {target group: its title}; about: split and backbone.
    """
    columns = {name: name for name in ("method", "source", "seeds", "trainable", "Sources")}
    for title in config["targets"]:
        columns[title] = title
    tables = []
    if direct:
        title = f"Accuracy in percent ({about}), mean ± standard deviation over seeds"
        tables.append(Table(title, columns, average_methods(direct, notes)))
    if "low_performing" in titles:
        published = {
            "Published (the paper: XLM-R-large)": published_lines(PUBLISHED, titles),
            "The authors' re-runs (not published; XLM-R-large)": published_lines(RERUNS, titles),
            "Published (SIB-200's paper, without nqo_Nkoo)": baseline_lines(config, facts),
        }
        for title, lines in published.items():
            tables.append(Table(title, columns, lines))
    return tables


def adaptation_table(adapted, notes):
    """Accuracy of adapted runs before and after."""
    columns = {name: name for name in ("method", "source", "seeds")}
    columns["languages"] = "languages adapted to"
    for name in ("before", "after", "gain"):
        columns[name] = name
    title = "Adapted to a target language: accuracy in percent, mean ± deviation over seeds"
    return Table(title, columns, average_methods(adapted, notes))


def comparison_table(comparison):
    """Method A beside method B over the groups."""
    name_a, name_b = comparison.names
    columns = {"group": "group", "languages": "languages", "A": name_a, "B": name_b}
    columns.update({"A - B": f"{name_a} - {name_b}", "low": "95 % from", "high": "to"})
    title = f"{name_a} against {name_b}: accuracy in percent, {comparison.seeds} seeds each"
    remarks = [verdict(comparison.languages), *seed_lines(comparison.seeds)]
    return Table(title, columns, comparison.groups, remarks)


# ---- Pictures ----

# Okabe and Ito's colours, told apart by the colour-blind, too; the first for the smallest group
COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")
GREY = "#8c8c8c"
FEW_LANGUAGES = 30                      # up to here their names fit into the overview
MAX_STRIPS = 8                          # families or scripts with a strip of their own
NAMES_IN_COLUMN = 52                    # languages of one column of the long picture
PICTURES = (".png", ".pdf", ".svg")


def assign_groups(languages, sources, config):
    """{language: the smallest target group that holds it, "Sources", or "no target group"}."""
    by_size = sorted(config["targets"].items(), key=lambda item: len(item[1]))
    assigned = {}
    for language in languages:
        assigned[language] = "no target group"
        for title, codes in reversed(by_size):          # so that the smallest comes last
            if language in codes:
                assigned[language] = title
        if language in sources:
            assigned[language] = "Sources"
    return assigned


def lighten(colour):
    """The same colour, nearer to white; unlike transparency it hides the grid."""
    from matplotlib.colors import to_rgb
    return tuple(1 - 0.45 * (1 - part) for part in to_rgb(colour))


def choose_colours(assigned, config):
    """{group: colour} of the groups that occur, smallest target group first."""
    by_size = sorted(config["targets"], key=lambda title: len(config["targets"][title]))
    present = [title for title in by_size if title in assigned.values()]
    colours = {title: COLOURS[n % len(COLOURS)] for n, title in enumerate(present)}
    for title, grey in (("Sources", GREY), ("no target group", "#c8c8c8")):
        if title in assigned.values():
            colours[title] = grey
    return colours


def split_into_strips(values, lines):
    """[(label, lines)] by value, the largest mean gain first; rare values are put together.

    values: a family or script for each line.
    """
    lines_of = {}
    for value, line in zip(values, lines):
        lines_of.setdefault(value, []).append(line)
    by_size = sorted(lines_of, key=lambda value: -len(lines_of[value]))
    frequent = by_size
    if len(by_size) > MAX_STRIPS:
        frequent = by_size[:MAX_STRIPS - 1]
    strips = [(f"{value} ({len(lines_of[value])})", lines_of[value]) for value in frequent]
    strips.sort(key=lambda strip: -np.mean([line["A - B"] for line in strip[1]]))
    rare = by_size[len(frequent):]
    together = []
    for value in rare:
        together += lines_of[value]
    if rare:
        strips.append((f"{len(rare)} others ({len(together)})", together))
    return strips


def draw_groups(axes, comparison, colours):
    """The difference of each group, with its interval."""
    for height, line in enumerate(comparison.groups):
        ends = [line["low"], line["high"]]
        colour = colours.get(line["group"].removesuffix(" of either"), "black")
        axes.plot(ends, [height, height], color=colour, solid_capstyle="butt")
        axes.plot(line["A - B"], height, "o", color=colour, markersize=4)
    labels = [f"{line['group']} ({line['languages']})" for line in comparison.groups]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(f"groups, {comparison.interval_title()}")


def draw_sorted_gains(axes, comparison, colour_of, facts):
    """A bar for each language, the largest gain on top; beside significant ones others are pale."""
    lines = comparison.languages
    for height, line in enumerate(lines):
        colour = colour_of[line["language"]]
        if comparison.some_significant() and line["note"] != "significant":
            colour = lighten(colour)
        axes.barh(height, line["A - B"], height=0.9, color=colour)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    if len(lines) <= FEW_LANGUAGES:
        names = [language_name(line["language"], facts) for line in lines]
        axes.set_yticks(range(len(lines)), names)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(lines)} languages, by gain")
    axes.set_title("languages")
    if comparison.some_significant():
        axes.set_title("languages, the significant ones in full colour")


def draw_strips(axes, strips, colour_of, title):
    """A dot for each language, spread a little up and down, and the mean of several as a stroke."""
    spread = np.random.default_rng(0)                   # the same picture each time
    for height, (_, lines) in enumerate(strips):
        gains = [line["A - B"] for line in lines]
        dots = [colour_of[line["language"]] for line in lines]
        heights = np.full(len(lines), float(height))
        if len(lines) > 1:
            heights += spread.uniform(-0.28, 0.28, len(lines))
            axes.plot(2 * [np.mean(gains)], [height - 0.4, height + 0.4], color="black")
        axes.scatter(gains, heights, s=8, c=dots, alpha=0.8, linewidths=0)
    axes.set_yticks(range(len(strips)), [label for label, _ in strips])
    axes.set_ylim(len(strips) - 0.4, -0.6)
    axes.set_title(title)


def finish_axes(axes, limits):
    """Zero line, grid, and the same limits for all."""
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlim(*limits)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def with_margin(values):
    """Limits of an axis that shows zero and all values that are numbers."""
    numbers = [value for value in values if np.isfinite(value)]
    low, high = min(0, *numbers), max(0, *numbers)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def add_legend(figure, colours, assigned, config, columns, more=()):
    """Colours of the groups, and more handles, below; a language has that of its smallest group."""
    from matplotlib.patches import Patch
    present = list(assigned.values())
    handles = []
    for title, colour in colours.items():
        scored = [code for code in config["targets"].get(title, []) if code in assigned]
        count = present.count(title)
        label = title
        if count < len(scored):                         # a smaller group holds some of them
            label += ", the others"
        handles.append(Patch(color=colour, label=f"{label} ({count})"))
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=columns,
                  frameon=False)


def draw_overview(comparison, assigned, config, facts):
    """Groups with intervals, sorted gains, families and scripts, all on one axis -> Figure."""
    from matplotlib.figure import Figure
    colours = choose_colours(assigned, config)
    colour_of = {language: colours[title] for language, title in assigned.items()}
    lines = comparison.languages
    families = [facts.get(line["language"], {}).get("family", "unknown") for line in lines]
    scripts = [line["language"].rpartition("_")[2] for line in lines]
    family_strips = split_into_strips(families, lines)
    script_strips = split_into_strips(scripts, lines)
    heights = [len(comparison.groups) + 1, len(family_strips) + 1, len(script_strips) + 1]

    figure = Figure((7.2, 1.6 + 0.19 * sum(heights)), layout="constrained")
    mosaic = [["languages", "groups"], ["languages", "families"], ["languages", "scripts"]]
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights, width_ratios=(1, 1.1))
    draw_sorted_gains(axes["languages"], comparison, colour_of, facts)
    draw_groups(axes["groups"], comparison, colours)
    draw_strips(axes["families"], family_strips, colour_of, "families, with their means")
    draw_strips(axes["scripts"], script_strips, colour_of, "scripts, with their means")
    gains = [line["A - B"] for line in lines]
    lows = [line["low"] for line in comparison.groups]
    highs = [line["high"] for line in comparison.groups]
    limits = with_margin(gains + lows + highs)
    for panel in axes.values():
        finish_axes(panel, limits)
    for title in ("groups", "families"):                # numbers and name stand at the bottom
        axes[title].tick_params(axis="x", labelbottom=False)
    for title in ("languages", "scripts"):
        axes[title].set_xlabel(comparison.axis_label())
    add_legend(figure, colours, assigned, config, columns=4)
    return figure


def language_name(language, facts):
    """Its English name and code; the code alone where the name is not known."""
    name = facts.get(language, {}).get("name", "")
    return f"{name} {language}".strip()


def draw_languages(comparison, assigned, config, facts):
    """Every language with its name, gain and 95 % interval, in columns on one axis -> Figure."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    colours = choose_colours(assigned, config)
    lines = comparison.languages
    columns = ceil(len(lines) / NAMES_IN_COLUMN)
    in_column = ceil(len(lines) / columns)
    size = (max(4.5, 3.3 * columns), 1.6 + 0.155 * in_column)
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    lows = [line["low"] for line in lines]
    highs = [line["high"] for line in lines]
    limits = with_margin(lows + highs)
    for column, axes in enumerate(panels):
        part = lines[column * in_column:(column + 1) * in_column]
        for height, line in enumerate(part):
            colour = colours[assigned[line["language"]]]
            fill = "white"
            if line["note"] == "significant":
                fill = colour
            axes.plot([line["low"], line["high"]], [height, height], color=colour, linewidth=1)
            axes.plot(line["A - B"], height, "o", color=colour, markerfacecolor=fill, markersize=4)
        labels = [language_name(line["language"], facts) for line in part]
        axes.set_yticks(range(len(part)), labels)
        axes.set_ylim(in_column - 0.4, -0.6)
        axes.set_xlabel("points")
        finish_axes(axes, limits)
    dots = []
    if comparison.some_significant():
        dot = {"marker": "o", "color": "black", "linewidth": 1, "markersize": 4}
        dots.append(Line2D([], [], label="significant", **dot))
        dots.append(Line2D([], [], label="not significant", markerfacecolor="white", **dot))
    add_legend(figure, colours, assigned, config, columns=2 * columns, more=dots)
    figure.suptitle(f"{comparison.axis_label()} by language\n{comparison.interval_title()}")
    return figure


def save_figure(figure, path):
    """Write a figure in the format that the name ends in."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=150)
    write_atomically(path, picture.getvalue())
    print(f"{path}: written")


def plot(path, comparison, config, facts):
    """Write the overview to `path`, and the long version with all names beside it."""
    import matplotlib
    languages = [line["language"] for line in comparison.languages]
    assigned = assign_groups(languages, comparison.sources, config)
    style = {"font.size": 7, "axes.titlesize": 7, "axes.titlelocation": "left"}
    style["figure.titlesize"] = 8
    with matplotlib.rc_context(style):
        overview = draw_overview(comparison, assigned, config, facts)
        save_figure(overview, path)
        long_version = draw_languages(comparison, assigned, config, facts)
        save_figure(long_version, path.with_name(f"{path.stem}-languages{path.suffix}"))


# ---- The command ----

def check_plot(args):
    """Raise ValueError for a picture that could not be drawn or written in the end."""
    if not args.plot:
        return
    if not args.compare:
        raise ValueError("--plot needs --compare A B: it shows the gain of A over B")
    path = Path(args.plot)
    if path.suffix not in PICTURES:
        raise ValueError(f"--plot {args.plot}: the name must end in {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot {args.plot}: no folder {path.parent}")
    if not find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def write_targets_out(config, leave_out):
    """Write each target group in `config` as its list of languages -> {group: its title}."""
    titles = {names: title for title, names in config["targets"].items() if isinstance(names, str)}
    for title, codes in resolve_targets(config).items():
        config["targets"][title] = [code for code in codes if code not in leave_out]
    return titles


def write_report(folder, text, notes, tables):
    """Write report.md and report.csv, the same in full precision, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"* {note}\n" for note in notes)
    write_atomically(folder / "report.md", f"{text}\n\n{listed}".encode())
    lines = []
    for table in tables:
        for line in table.lines:
            lines.append({"table": table.title, **line})
    columns = {}                                        # used as a set that keeps its order
    for line in lines:
        columns.update(line)
    fields = []
    for line in lines:
        fields.append([line.get(column) for column in columns])
    write_atomically(folder / "report.csv", to_csv(columns, fields))
    print(f"{folder}/report.md, report.csv: written")


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description="Tables and comparisons of scored run folders.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that evaluate.py scored")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="methods: xpe spt, or "
                        "xpe-joshi5 xpe-seen; is A better than B?")
    parser.add_argument("--plot", metavar="FILE", help="with --compare: gain.png (.pdf, .svg) and "
                        "gain-languages.png (needs matplotlib)")
    parser.add_argument("--out", metavar="DIR", help="write report.md and report.csv there")
    parser.add_argument("--split", default="test", choices=SPLITS, help="default: test")
    parser.add_argument("--leave-out", default="", metavar="CODES", help="languages not to count, "
                        "separated by commas: ars_Arab, say")
    return parser


def main(argv=None):
    """Read the runs, print the tables, write what was asked for."""
    args = make_parser().parse_args(argv)
    check_plot(args)
    notes = []
    folders = find_folders(args.runs, notes)
    config = read_groups(folders, args.split, notes)
    runs, gold = read_runs(folders, args.split, config, notes)
    backbone = check_one_backbone(runs, notes)
    leave_out = [code.strip() for code in args.leave_out.split(",") if code.strip()]
    leave_languages_out(leave_out, runs, gold, notes)
    titles = write_targets_out(config, leave_out)
    trained_on_arabic = any("arb_Arab" in run.sources for run in runs)
    present = "ars_Arab" in gold and "ars_Arab" not in leave_out
    if trained_on_arabic and present and args.split == "test":
        notes.append("ars_Arab shares 138 of SIB-200's 204 test sentences with arb_Arab, a source; "
                     "--leave-out ars_Arab counts without it")

    direct = [run for run in runs if not run.adapted_to]
    adapted = [run for run in runs if run.adapted_to]
    if direct:
        note_unscored_targets(direct, config, notes)
        note_sources_among_targets(direct, config, notes)
    for run in direct:
        add_group_figures(run, config)
    scores_of_run = {run.name: run.scores for run in direct}
    for run in adapted:
        add_adaptation_figures(run, scores_of_run, notes)
    adapted = [run for run in adapted if run.figures]

    facts = read_language_facts()
    about = f"{args.split}, {backbone}"
    tables = accuracy_tables(direct, config, titles, facts, about, notes)
    if adapted:
        tables.append(adaptation_table(adapted, notes))
    everything = tables
    if args.compare:
        comparison = compare_methods(direct, args.compare, config, gold, notes)
        tables.append(comparison_table(comparison))
        everything = [*tables, Table("languages", {}, comparison.languages)]

    for note in notes:
        warn(note)
    text = format_tables(tables)
    print(text)
    if args.out:
        write_report(Path(args.out), text, notes, everything)
    if args.plot:
        plot(Path(args.plot), comparison, config, facts)


if __name__ == "__main__":
    run_main(main)
