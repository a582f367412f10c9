"""Tables, comparisons and pictures from scored runs: the paper's Table 1, ours beside it.

The paper's section "Results". It works from the files that training and evaluate.py left in each
run folder (prompt.json, config.yaml, test_predictions.csv), without backbone or corpus. Runs of
several backbones or corpora get a report each.

    python report.py runs/* --compare xpe spt --plot gain.png --out report

gives, for sample/e5.yaml (twenty seeds):

    | method | source | seeds | trainable |    Sources | Low-performing | ...
    | :----- | :----- | ----: | --------: | ---------: | -------------: | ...
    | xpe    | joshi5 |    20 |   241,735 | 85.3 ± 1.2 |     50.1 ± 1.1 | ...

Read downwards: run folders, means over seeds, comparison, tables, the picture, the command.
Published figures are in published.csv, families of languages in baselines.csv. Letters: S seeds,
I test sentences.
"""
import argparse
import csv
import io
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import cycle, dropwhile
from pathlib import Path

import numpy as np

from config import read_config, resolve_group, resolve_targets
from data import (HERE, SPLITS, check, fingerprint, nearest, read_text, reading, run_main,
                  shorten_list, warn)
from evaluate import group_means
from runs import method_name, read_json, why_no_run, write_atomically, write_csv

KINDS = ("full", "head", "spt", "dual", "xpe")                  # their order in the tables
# Settings for the memory that there is, and what each adapted run has of its own
NO_RECIPE = ("learners_at_once", "tokens", "data", "source")


def read_csv(path):
    """The lines of a CSV file as dicts; it may begin with comments (#)."""
    lines = io.StringIO(read_text(path), newline="")
    table = dropwhile(lambda line: line.startswith("#"), lines)
    return list(csv.DictReader(table))


def published_tables(titles):
    """published.csv -> {title of a table: its lines}; titles: {target group: title of its column}.
    """
    tables = {}
    for line in read_csv(HERE / "published.csv"):
        shown = {key: line[key] for key in ("method", "source", "seeds")}
        for group, title in titles.items():
            shown[title] = line.get(group)
        tables.setdefault(line["table"], []).append(shown)
    return tables


# ---- Run folders ---------------------------------------------------------------------------------

class ScoredRun:
    """A run as its folder describes it, and what it got right.

    .hits: {language: bool array (I,), whether each answer is right}; .scores: {language: accuracy
    in percent}, both without the languages to be left out; .sentences: {language: (ids, labels)};
    .recipe: its settings, as texts.
    """

    def __init__(self, folder, split, leave_out):
        predictions = folder / f"{split}_predictions.csv"
        check(predictions.is_file(),
              why_no_run(folder) or f"no {predictions.name}; evaluate.py writes it")
        meta = read_json(folder / "prompt.json")
        check(meta["kind"] in KINDS, f"prompt.json: unknown kind {meta['kind']!r}")
        self.folder = folder
        self.rank = KINDS.index(meta["kind"])
        self.method = method_name(meta["kind"], meta["prompt"])     # xpe, dual30 ...
        self.seed = int(meta["seed"])
        self.sources = [str(code) for code in meta["sources"]]
        name = Path(meta["backbone"]["name"]).name
        fingerprint_of_weights = meta["backbone"].get("fingerprint", "")
        self.weights = fingerprint_of_weights or name               # what tells backbones apart
        self.backbone = f"{name} {fingerprint_of_weights[:8]}".strip()
        self.adapted_from = str(meta.get("adapted_from"))           # the name of a run
        self.adapted_to = str(meta.get("adapted_to", ""))           # a language
        # the authors' release says nothing of its training
        self.trainable = meta["training"].get("trainable")
        settings = meta["training"].get("settings", {})
        self.recipe = {f"{key} {settings[key]}" for key in settings if key not in NO_RECIPE}

        answers = {}
        for line in read_csv(predictions):
            answer = (plain_id(line["index_id"]), line["label"], line["predicted"])
            answers.setdefault(line["language"], []).append(answer)
        self.sentences = {}
        self.hits = {}
        self.scores = {}
        for language, lines in answers.items():
            ids, labels, predicted = zip(*lines)
            check(len(set(ids)) == len(ids), f"{language}: two sentences of the same index_id")
            self.sentences[language] = (ids, labels)
            if language not in leave_out:
                self.hits[language] = np.array(labels) == np.array(predicted)
                self.scores[language] = 100 * self.hits[language].mean()


@cache
def plain_id(index_id):
    """An index_id without what spreadsheets add or drop: 007 and 7.0 are 7."""
    return re.sub(r"^0*(\d+)(\.0*)?$", r"\1", index_id.strip())


class Study:
    """Runs that one table can hold: of one backbone, with the same sentences in each language.

    Groups and columns are those of the first run's config.yaml.
    """

    def __init__(self, run):
        self.config = read_config(run.folder / "config.yaml")
        self.targets = resolve_targets(self.config)     # title -> codes
        self.sentences = {}                             # language -> (ids, labels)
        self.runs = []
        self.add(run)

    def fits(self, run):
        """Whether the run belongs here."""
        parallel = all(self.sentences.get(language, own) == own
                       for language, own in run.sentences.items())
        return parallel and run.weights == self.runs[0].weights

    def add(self, run):
        """Add a run that fits."""
        self.sentences = run.sentences = run.sentences | self.sentences     # each is kept once
        run.source = self.name_sources(run.sources)
        run.label = f"{run.method}-{run.source}"
        self.runs.append(run)

    def name_sources(self, sources):
        """The name of the group that holds just these languages, or else their codes."""
        for name in self.config["groups"]:
            if set(resolve_group(self.config, name)) == set(sources):
                return name
        return "+".join(sources)

    def pick(self, name):
        """The runs of a method, given as xpe or xpe-joshi5; none if several methods fit."""
        picked = [run for run in self.runs
                  if not run.adapted_to and name in (run.method, run.label)]
        return picked if len({run.label for run in picked}) == 1 else []

    def title(self):
        """What identifies backbone and corpus."""
        corpus = Path(self.config["data"]["name"]).name
        sentences = fingerprint(self.sentences.items())[:8]
        return f"{self.runs[0].backbone} on {corpus} {sentences}"


def read_studies(arguments, split, leave_out, notes):
    """Run folders -> list of Study. Notes what is left out.

    Raises ValueError if nothing is left, or for a language to be left out that no run has.
    """
    studies = []
    for argument in arguments:
        folder = Path(argument).expanduser().resolve()
        try:
            with reading(folder):
                run = ScoredRun(folder, split, leave_out)
            fitting = [study for study in studies if study.fits(run)]
            if fitting:
                fitting[0].add(run)
            else:
                studies.append(Study(run))
        except (ValueError, OSError) as error:
            notes.append(f"left out: {error}")
    check(studies, f"no scored run; {'; '.join(notes)}")
    known = set().union(*(study.sentences for study in studies))
    for code in leave_out:
        check(code in known, f"--leave-out: no run is scored on {code!r}{nearest(code, known)}")
        notes.append(f"left out of all figures but the published ones: {code}")
    return studies


# ---- Means over seeds ----------------------------------------------------------------------------

def add_figures(study, notes):
    """Give each run what the tables average: .figures, {column: percent}, and .partial,
    {"<column> languages": of how many languages that is the mean, where it lacks some}.

    That is its mean over each group of languages or, of an adapted run, its accuracy before and
    after; without one of these it has no figures.
    """
    scores_of_run = {run.folder.name: run.scores for run in study.runs if not run.adapted_to}
    for run in study.runs:
        run.figures = {}
        run.partial = {}
        if not run.adapted_to:
            means = group_means(run.scores, study.config, run.sources)
            for title, (mean, scored, _) in means.items():
                run.figures[title] = np.nan if mean is None else mean
                size = len(study.targets.get(title, run.sources))
                if 0 < scored < size:
                    run.partial[f"{title} languages"] = f"{scored} of {size}"
            continue
        try:
            before = scores_of_run[run.adapted_from][run.adapted_to]
            after = run.scores[run.adapted_to]
            run.figures = {"before": before, "after": after, "gain": after - before}
        except KeyError as missing:
            notes.append(f"left out: {run.folder}: {missing} is not among these runs or languages")


def average_over_seeds(same_method):
    """Runs of one method -> a line: the mean of each figure and, as "<name> std", its deviation.

    Several languages of one seed (adapted runs) are averaged first. The deviation is that of a
    sample (n - 1); one seed has none. "<name> languages": how many, where a group lacks some.
    """
    first = same_method[0]
    seeds = sorted({run.seed for run in same_method})
    line = {"method": first.method, "source": first.source, "seeds": len(seeds),
            "trainable": first.trainable}
    if first.adapted_to:
        languages = {run.adapted_to for run in same_method}
        line["languages adapted to"] = shorten_list(sorted(languages))
    for name in first.figures:
        values = []
        for seed in seeds:
            of_seed = [run.figures[name] for run in same_method if run.seed == seed]
            values.append(np.mean(of_seed))
        line[name] = np.mean(values)
        if len(values) > 1:
            line[f"{name} std"] = np.std(values, ddof=1)
    for run in same_method:
        line.update(run.partial)
    return line


def average_methods(runs, notes):
    """Runs -> one line of a table for each method and source group.

    Notes the seeds (and adapted languages) that other methods on the same sources have, and the
    settings in which runs that are averaged differ. Raises ValueError for a seed that occurs twice.
    """
    methods = {}
    for run in sorted(runs, key=lambda run: (run.source, run.rank, run.method)):
        methods.setdefault(run.label, []).append(run)
    lines = []
    for label, same_method in methods.items():
        present = {f"{run.seed} {run.adapted_to}".strip() for run in same_method}
        folders = ", ".join(str(run.folder) for run in same_method)
        check(len(present) == len(same_method), f"{label}: a seed occurs twice in {folders}")
        peers = [run for run in runs if run.source == same_method[0].source]
        expected = {f"{run.seed} {other.adapted_to}".strip() for run in peers for other in peers}
        missing = sorted(expected - present)
        if missing:
            notes.append(f"{label}: missing although other runs have them: seeds "
                         f"{', '.join(missing)}")
        recipes = [run.recipe for run in same_method]
        mixed = set.union(*recipes) - set.intersection(*recipes)
        if mixed:
            notes.append(f"{label}: averaged, although its runs differ: "
                         f"{', '.join(sorted(mixed))}")
        lines.append(average_over_seeds(same_method))
    return lines


# ---- Comparison of two methods: paired hits, intervals, a test for each language -----------------

ENOUGH_SEEDS = 5                        # with fewer the report says what an interval leaves out
LEVEL = 0.05                            # of tests; intervals are 95 % ones
ANGLES = np.linspace(0, np.pi / 2, 4_001)               # grid of the integral in student_tail


def average_languages(runs, languages):
    """The hits of S runs on I sentences, averaged over languages, in percent: (S, I).

    A sentence has one id in all languages, and its translations are answered alike, so they count
    as one observation. The mean over all is the mean of the languages' accuracies. A sentence that
    a language lacks counts as that language's mean, and the deviations of those that it has are
    enlarged by all / its own, so that its error stays that of its own sentences.
    """
    ids = [np.array(runs[0].sentences[language][0]) for language in languages]
    known_ids = np.unique(np.concatenate(ids))
    total = np.zeros((len(runs), len(known_ids)))
    for language, own_ids in zip(languages, ids):
        hits = 100.0 * np.array([run.hits[language] for run in runs])
        mean = hits.mean(axis=1, keepdims=True)
        positions = np.searchsorted(known_ids, own_ids)
        weight = len(known_ids) / len(own_ids)
        total += mean
        total[:, positions] += weight * (hits - mean)
    return total / len(languages)


def estimate_difference(a, b):
    """Mean of a - b, (S, I) each -> (mean, its standard error, the error's degrees of freedom).

    Seeds and sentences are both drawn by chance and crossed: each run answers each sentence. Both
    methods answer the same sentences, so these are paired; the runs are not, because equal seeds
    make runs of two methods no more alike. With mean squares M as in an analysis of variance the
    squared error is (M_seeds + M_sentences - M_rest) / (S I). Satterthwaite's formula gives its
    degrees of freedom: near 2 (S - 1) where the seeds make the differences, near I - 1 where the
    sentences do. Neither can vary less than the rest, so no mean square is below that of the rest.
    With one seed the sentences are all there is: the two runs are held fixed. Where nothing varies
    there is nothing to estimate an error from, and it is NaN.

    ours: of equal methods it calls about 5 % different, and a third if the seeds are held fixed;
    measured in tests/false_alarms.py.
    """
    seeds, sentences = a.shape
    both = np.stack([a, b])                                     # (2, S, I)
    overall = both.mean(axis=(1, 2), keepdims=True)
    of_seeds = both.mean(axis=2, keepdims=True)
    of_sentences = both.mean(axis=1, keepdims=True)
    difference = of_sentences[0] - of_sentences[1]
    mean = difference.mean()
    # degrees of freedom; one seed or sentence has none, and sums of squares that are zero
    free_seeds = max(seeds - 1, 1)
    free_sentences = max(sentences - 1, 1)
    free_rest = free_seeds * free_sentences

    rest = both - of_seeds - of_sentences + overall
    square_rest = np.sum(rest ** 2) / free_rest
    square_seeds = sentences * np.sum((of_seeds - overall) ** 2) / free_seeds
    square_sentences = seeds * np.sum((difference - mean) ** 2) / free_sentences
    square_seeds = max(square_seeds, square_rest)
    square_sentences = max(square_sentences, square_rest)
    square = square_seeds + square_sentences - square_rest
    if sentences == 1 or square < 1e-12:
        return mean, np.nan, 1.0
    uncertainty = (square_seeds ** 2 / free_seeds + square_rest ** 2 / free_rest) / 2
    uncertainty += square_sentences ** 2 / free_sentences
    error = np.sqrt(square / (seeds * sentences))
    return mean, error, square ** 2 / uncertainty


def student_tail(freedom):
    """For t = sqrt(freedom) tan(ANGLES): the two-sided p-values of Student's t, from 1 to 0.

    In the angle its density is cos^(freedom - 1); the integral up to each angle is a sum of
    trapezoids. (numpy has no t distribution.)
    """
    density = np.cos(ANGLES) ** (freedom - 1)
    area = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return 1 - area / area[-1]


def t_test(mean, error, freedom):
    """The two-sided p-value of a mean with this standard error, if the truth is zero."""
    angle = np.arctan(abs(mean) / error / np.sqrt(freedom))
    return np.interp(angle, ANGLES, student_tail(freedom))


def interval(mean, error, freedom):
    """A - B as a table's columns: the difference and the ends of its 95 % interval."""
    angle = np.interp(-LEVEL, -student_tail(freedom), ANGLES)
    reach = np.sqrt(freedom) * np.tan(angle) * error
    return {"A - B": mean, "low": mean - reach, "high": mean + reach}


def holm(p_values):
    """Holm's adjusted p-values: those up to 0.05 are significant together at 0.05."""
    order = np.argsort(p_values)
    adjusted = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    in_given_order = np.empty(len(p_values))
    in_given_order[order] = np.minimum(1.0, np.maximum.accumulate(adjusted))
    return in_given_order


class Comparison:
    """Methods A and B of a study, on the seeds and languages that both have.

    .members: {title: languages} of the sources of both and the target groups. .groups: a line
    (dict) for each: accuracy of A and B, difference, interval, p of a t test. .languages: the same
    for each language, the largest gain first, with the p of all targets adjusted together by Holm;
    note is "source", "significant" or "". p is NaN where nothing varies, for sources, and with one
    seed: see seed_remarks.
    """

    def __init__(self, study, names):
        self.names = names
        runs_a, runs_b = [{run.seed: run for run in study.pick(name)} for name in names]
        seeds = sorted(runs_a.keys() & runs_b.keys())
        check(seeds, "--compare: the two have no seed in common")
        self.seeds = len(seeds)
        self.a = [runs_a[seed] for seed in seeds]
        self.b = [runs_b[seed] for seed in seeds]
        paired = self.a + self.b
        shared = set.intersection(*(set(run.hits) for run in paired))
        sources = set().union(*(run.sources for run in paired))
        of_both = set.intersection(*(set(run.sources) for run in paired))
        self.members = {"Sources": of_both}
        for title, codes in study.targets.items():
            self.members[title] = set(codes) - sources
        self.groups = []
        for title, codes in self.members.items():
            self.members[title] = codes = sorted(codes & shared)
            if codes:
                line = {"group": title, "languages": len(codes), **self.contrast(codes)}
                self.groups.append(line)

        self.languages = []
        for language in sorted(shared):
            line = {"language": language, **self.contrast([language]), "note": ""}
            if language in sources:
                line.update(p=np.nan, note="source")
            self.languages.append(line)
        self.languages.sort(key=lambda line: -round(line["A - B"], 6))
        tested = [line for line in self.languages if not np.isnan(line["p"])]
        self.tested = len(tested)
        p_values = [line["p"] for line in tested]
        for line, p in zip(tested, holm(p_values)):
            line["p"] = p
            if p <= LEVEL:
                line["note"] = "significant"
        self.significant = [line for line in tested if line["note"]]

    def contrast(self, languages):
        """A against B over some languages -> columns of a table."""
        a = average_languages(self.a, languages)
        b = average_languages(self.b, languages)
        estimate = estimate_difference(a, b)
        p = t_test(*estimate) if self.seeds > 1 else np.nan
        ends = interval(*estimate)
        return {"A": a.mean(), "B": b.mean(), **ends, "p": p}

    def table(self):
        """A beside B over the groups; below it how many target languages each of them wins, which
        of these are significant, and what the intervals leave out."""
        gains = [line["A - B"] for line in self.languages if line["note"] != "source"]
        won = sum(gain > 1e-9 for gain in gains)
        lost = sum(gain < -1e-9 for gain in gains)
        significant = []
        for line in self.significant:
            significant.append(f"{line['language']} {line['A - B']:+.1f}")
        names = ", ".join(significant) or "none"
        remarks = [f"Target languages: {won} won, {lost} lost; significant (t test over seeds and "
                   f"paired sentences, by Holm over {self.tested} languages): {names}."]
        if any(np.isnan(line["low"]) for line in self.groups + self.languages):
            remarks.append("Where nothing varies between seeds or sentences there is no interval "
                           "and no test.")
        remarks += seed_remarks(self.seeds)
        a, b = self.names
        columns = {"group": "group", "languages": "languages", "A": a, "B": b}
        columns.update({"A - B": f"{a} - {b}", "low": "95 % from", "high": "to"})
        title = f"{a} against {b}: accuracy in percent, {self.seeds} seeds each"
        return Table(title, columns, self.groups, tuple(remarks))


def seed_remarks(seeds):
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


def find_study(studies, names):
    """The one study that has both methods of --compare; ValueError if none or several have."""
    fitting = [study for study in studies if all(study.pick(name) for name in names)]
    known = sorted({run.label for study in studies for run in study.runs})
    check(len(fitting) == 1, f"--compare {' '.join(names)}: must be two methods of exactly one "
                             f"backbone and corpus; there are {', '.join(known)}")
    return fitting[0]


# ---- Tables: Markdown that is aligned in a terminal, too -----------------------------------------

TEXT_COLUMNS = ("method", "source", "languages adapted to", "group")
SIGNED_COLUMNS = ("A - B", "low", "high")


@dataclass
class Table:
    """A title, and lines (dicts); columns: {key in the lines: heading}; remarks stand below it."""
    title: str
    columns: dict
    lines: list
    remarks: tuple = ()

    def cells(self):
        """The headings, then the lines, as lists of text."""
        rows = [list(self.columns.values())]
        for line in self.lines:
            rows.append([format_cell(line, key) for key in self.columns])
        return rows


def format_cell(line, key):
    """A value of a line as text, with what the line has beside it.

    That is its deviation over the seeds, and the languages if it is the mean of a part of a group,
    which would otherwise stand beside the published mean of the whole.
    """
    value = line.get(key)
    if value in (None, "") or value != value:           # missing, or not a number
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if key in SIGNED_COLUMNS:
        return f"{value:+.2f}"
    text = f"{value:.1f}"
    if f"{key} std" in line:
        text += f" ± {line[f'{key} std']:.1f}"
    if f"{key} languages" in line:
        text += f" ({line[f'{key} languages']})"
    return text


def format_tables(tables):
    """Text of all tables; those with the same headings get the same widths. Text stands to the
    left, numbers to the right."""
    parts = []
    for table in tables:
        rows = []
        for other in tables:
            if other.columns == table.columns:
                rows += other.cells()
        widths = [max(3, *map(len, column)) for column in zip(*rows)]
        pads = [str.ljust if heading in TEXT_COLUMNS else str.rjust
                for heading in table.columns.values()]
        headings, *rows = table.cells()
        rules = [pad(":", width, "-") for pad, width in zip(pads, widths)]
        lines = []
        for cells in (headings, rules, *rows):
            padded = [pad(cell, width) for pad, cell, width in zip(pads, cells, widths)]
            lines.append(f"| {' | '.join(padded)} |")
        parts += [table.title, "\n".join(lines), *table.remarks]
    return "\n\n".join(parts)


def study_tables(study, split, notes):
    """Means of a study's methods, the published ones where the targets are the paper's groups, and
    what adaptation gave -> list of Table."""
    add_figures(study, notes)
    direct = [run for run in study.runs if not run.adapted_to]
    adapted = [run for run in study.runs if run.adapted_to and run.figures]
    lines_of = {}
    if direct:
        title = f"Accuracy in percent ({split}, {study.title()}), mean ± standard deviation"
        lines_of[f"{title} over seeds"] = average_methods(direct, notes)
    titles = {str(names): title for title, names in study.config["targets"].items()}
    if "low_performing" in titles:
        lines_of.update(published_tables(titles))
    columns = ["method", "source", "seeds", "trainable", "Sources", *study.targets]
    tables = []
    for title, lines in lines_of.items():
        tables.append(Table(title, dict(zip(columns, columns)), lines))
    if adapted:
        columns = ["method", "source", "seeds", "languages adapted to", "before", "after", "gain"]
        title = "Adapted to a target language: accuracy in percent, mean ± deviation over seeds"
        lines = average_methods(adapted, notes)
        tables.append(Table(title, dict(zip(columns, columns)), lines))
    return tables


# ---- The picture --------------------------------------------------------------------------------

# Grey for the sources, then Okabe and Ito's colours, told apart by the colour-blind, too
COLOURS = ("#8c8c8c", "#d55e00", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
FREQUENT = 7                            # families or scripts with a strip of their own
STYLE = {"font.size": 7, "axes.titlesize": 7, "figure.titlesize": 8, "lines.markersize": 4,
         "axes.grid": True, "axes.grid.axis": "x", "grid.alpha": 0.25, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.left": False, "axes.spines.right": False,
         "ytick.major.size": 0, "legend.frameon": False}


def plot(path, comparison):
    """Write the picture of a comparison to `path`."""
    from matplotlib import style
    from matplotlib.figure import Figure
    # "default": not what a user's own matplotlibrc says
    with style.context(["default", STYLE]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = Figure((7.2, 6.2), layout="constrained")
        draw(figure, comparison)
        form = path.suffix[1:]
        write_atomically(path, lambda file: figure.savefig(file, format=form, dpi=150))
    print(f"{path}: written")
    text = " ".join(str(warning.message) for warning in caught)
    glyphs = dict.fromkeys(re.findall(r"Glyph (\d+)", text))
    letters = "".join(chr(int(glyph)) for glyph in glyphs)
    if letters:
        warn(f"--plot: boxes stand for the letters that the font lacks: {letters}")


def draw(figure, comparison):
    """Draw groups with intervals, sorted gains, families and scripts, all on one axis."""
    lines = comparison.languages
    groups = comparison.groups
    languages = [line["language"] for line in lines]
    gains = np.array([line["A - B"] for line in lines])
    members = {**comparison.members, "all languages": languages}
    colour_of_group, colour_of, legend = choose_colours(members)
    colours = np.array([colour_of[language] for language in languages])
    heights = (len(groups) + 1, FREQUENT + 2, FREQUENT + 2)
    panels = figure.subplot_mosaic("lg;lf;ls", sharex=True, height_ratios=heights)

    significant = [line["note"] == "significant" for line in lines]
    title = f"{len(lines)} languages"
    bars = colours
    if any(significant):
        title += ", the significant ones in full colour"
        opacities = np.where(significant, 1, 0.45)
        bars = list(zip(colours, opacities))
    panels["l"].barh(range(len(lines)), gains, 0.9, color=bars)
    name_rows(panels["l"], [""] * len(lines), title)

    names = [f"{line['group']} ({line['languages']})" for line in groups]
    name_rows(panels["g"], names, f"groups, 95 % intervals (seeds: {comparison.seeds})")
    for height, line in enumerate(groups):
        colour = colour_of_group[line["group"]]
        panels["g"].plot([line["low"], line["high"]], [height, height], color=colour)
        panels["g"].plot(line["A - B"], height, "o", color=colour)

    family_of = {line["code"]: line["family"] for line in read_csv(HERE / "baselines.csv")}
    families = [family_of.get(language, "unknown") for language in languages]
    scripts = [language.rpartition("_")[2] for language in languages]
    draw_strips(panels["f"], "families, with their means", families, gains, colours)
    draw_strips(panels["s"], "scripts, with their means", scripts, gains, colours)
    figure.suptitle("accuracy of {} minus {} (points)".format(*comparison.names))
    figure.legend(handles=legend, loc="outside lower center", ncols=4)


def choose_colours(members):
    """{group: languages} -> ({group: colour}, {language: colour}, handles of the legend).

    A language has the colour of the first group that holds it; a group is black if earlier ones
    hold all of its languages.
    """
    from matplotlib.patches import Patch
    colour_of_group = {}
    colour_of = {}
    legend = []
    for colour, (title, codes) in zip(cycle(COLOURS), members.items()):
        own = [code for code in codes if code not in colour_of]
        colour_of_group[title] = colour if own else "black"
        if own:
            colour_of.update(dict.fromkeys(own, colour))
            others = ", the others" if len(own) < len(codes) else ""
            legend.append(Patch(color=colour, label=f"{title}{others} ({len(own)})"))
    return colour_of_group, colour_of, legend


def draw_strips(axes, title, values, gains, colours):
    """A row for each frequent value, the largest mean gain on top: a dot for each language, spread
    a little up and down, and a stroke for their mean. values, gains, colours: one for each
    language."""
    frequent = dict(Counter(values).most_common(FREQUENT))
    values = np.array([value if value in frequent else "others" for value in values])
    counts = Counter(values)
    order = sorted(counts, key=lambda value: -gains[values == value].mean())
    names = [f"{value} ({counts[value]})" for value in order]
    name_rows(axes, names, title)
    spread = np.random.default_rng(0)                   # the same picture each time
    for height, value in enumerate(order):
        chosen = values == value
        mean = gains[chosen].mean()
        heights = height + spread.uniform(-0.28, 0.28, counts[value])
        axes.plot([mean, mean], [height - 0.4, height + 0.4], color="black")
        axes.scatter(gains[chosen], heights, s=3, c=colours[chosen], zorder=3)


def name_rows(axes, names, title):
    """Names of the rows of a panel, from the top down, its title and its zero line."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title)
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)


# ---- The command ---------------------------------------------------------------------------------

def write_report(folder, text, notes, tables):
    """Write report.md and report.csv, the same in full precision, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"* {note}\n" for note in notes)
    write_atomically(folder / "report.md", f"{text}\n\n{listed}".encode())
    lines = []
    for table in tables:
        lines += [{"table": table.title, **line} for line in table.lines]
    columns = {}                                        # used as a set that keeps its order
    for line in lines:
        columns.update(line)
    fields = [[line.get(column) for column in columns] for line in lines]
    write_csv(folder / "report.csv", columns, fields)
    print(f"{folder}/report.md, report.csv: written")


def main(argv=None):
    """Read the runs, print the tables, write what was asked for."""
    parser = argparse.ArgumentParser(description="Tables and comparisons of scored run folders.")
    add = parser.add_argument
    add("runs", nargs="+", help="folders that evaluate.py scored")
    add("--compare", nargs=2, help="methods: xpe spt, or xpe-joshi5 xpe-seen; is the first better?")
    add("--plot", type=Path, help="with --compare: gain.png (or .pdf, .svg; needs matplotlib)")
    add("--out", type=Path, help="write report.md and report.csv to this folder")
    add("--split", default="test", choices=SPLITS)
    add("--leave-out", default="", help="languages not to count, separated by commas: ars_Arab, "
        "say")
    args = parser.parse_args(argv)
    if args.plot:
        check(args.compare, "--plot needs --compare A B: it shows the gain of A over B")
        check(find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib")
    notes = []
    leave_out = re.findall(r"[^,\s]+", args.leave_out)
    studies = read_studies(args.runs, args.split, leave_out, notes)
    chosen = find_study(studies, args.compare) if args.compare else None
    tables = []
    comparison = None
    for study in studies:
        if any("ars_Arab" in run.scores and "arb_Arab" in run.sources for run in study.runs):
            notes.append("ars_Arab shares 138 of SIB-200's 204 test sentences with arb_Arab, a "
                         "source; --leave-out ars_Arab counts without it")
        tables += study_tables(study, args.split, notes)
        if study is chosen:
            comparison = Comparison(study, args.compare)
            tables.append(comparison.table())
    for note in notes:
        warn(note)
    text = format_tables(tables)
    print(text)
    if args.out:
        if comparison:
            tables.append(Table("languages", {}, comparison.languages))
        write_report(args.out.expanduser(), text, notes, tables)
    if args.plot:
        plot(args.plot.expanduser(), comparison)


if __name__ == "__main__":
    run_main(main)
