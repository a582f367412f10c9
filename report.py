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
Letters: S seeds, I test sentences. All published figures are accuracies in percent on SIB-200's
test split:

    published.csv   means over the paper's target groups; empty: not known here. Of the paper:
                    XLM-R-large, zero-shot, ten seeds. Of its authors' re-runs: ten seeds, too; E is
                    the encoded rows' embedding, at the global rate of 5e-5 if nothing else is said;
                    the last line of these is mean ± deviation over seeds. Of SIB-200's paper: means
                    of the columns of baselines.csv, without nqo_Nkoo, which does not have all.
    baselines.csv   each language's family, and its figures in table 7 of SIB-200's paper (arXiv
                    2309.07445): XLM-R-large with every weight fine-tuned on the language itself, or
                    on English, Arabic, Chinese only; GPT-3.5 and GPT-4 asked for the topic. The two
                    of nqo_Nkoo are counted from the released model outputs.
"""
import csv
import warnings
from collections import Counter, namedtuple
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from config import read_config, resolve_group, resolve_targets
from data import (HERE, check, fingerprint, make_parser, nearest, read_text, reading, run_main,
                  shorten_list, split_commas, warn)
from evaluate import group_means
from runs import differences, method_name, read_json, why_no_run, write_atomically, write_csv

# Settings that differ between adapted runs by design
NO_RECIPE = ("data", "source")


def read_csv(path):
    """The lines of a CSV file as dicts."""
    return list(csv.DictReader(read_text(path).split("\n")))


# ---- Run folders ---------------------------------------------------------------------------------

class ScoredRun:
    """A run as its folder describes it, and what it got right.

    .hits: {language: bool array (I,), whether each answer is right}; .scores: {language: accuracy
    in percent}, both without the languages to be left out; .sentences: {language: (ids, labels)};
    .meta: its prompt.json; .figures and .partial: see add_figures.
    """

    def __init__(self, folder, split, leave_out):
        predictions = folder / f"{split}_predictions.csv"
        check(predictions.is_file(),
              why_no_run(folder) or f"no {predictions.name}; evaluate.py writes it")
        self.folder = folder
        self.meta = meta = read_json(folder / "prompt.json")
        self.method = method_name(meta["kind"], meta["prompt"])     # xpe, dual30 ...
        self.seed = int(meta["seed"])
        self.sources = meta["sources"]
        self.backbone = meta["backbone"]
        training = meta["training"]                         # of the authors' release: {}
        self.trainable = training.get("trainable")
        self.settings = training.get("settings", {})
        self.adapted_to = meta.get("adapted_to", "")        # a language
        self.case = f"{self.seed} {self.adapted_to}".strip()
        self.figures = {}
        self.partial = {}
        self.sentences = {}
        self.hits = {}
        self.scores = {}
        rows = sorted(read_csv(predictions), key=itemgetter("language"))
        for language, lines in groupby(rows, itemgetter("language")):
            answers = map(itemgetter("index_id", "label", "predicted"), lines)
            ids, labels, predicted = zip(*answers)
            self.sentences[language] = (ids, labels)
            if language not in leave_out:
                self.hits[language] = np.array(labels) == predicted
                self.scores[language] = 100 * self.hits[language].mean()


class Study:
    """Runs that one table can hold: of one backbone, with the same sentences in each language.

    .runs, and .adapted: those that were adapted to a target language. Groups and columns are those
    of the first run's config.yaml.
    """

    def __init__(self, run):
        self.config = read_config(run.folder / "config.yaml")
        self.targets = resolve_targets(self.config)     # title -> codes
        self.backbone = run.backbone                    # its name, and what tells it from others
        self.sentences = {}                             # language -> (ids, labels)
        self.runs = []
        self.adapted = []
        self.take(run)

    def take(self, run):
        """Add the run if it belongs here -> whether it does."""
        sentences = run.sentences | self.sentences
        same = run.backbone["fingerprint"] == self.backbone["fingerprint"]
        if not same or sentences != self.sentences | run.sentences:
            return False
        self.sentences = sentences
        run.sentences = sentences                       # each is kept once
        run.source = "+".join(run.sources)
        for group in self.config["groups"]:
            if resolve_group(self.config, group) == run.sources:
                run.source = group
                break
        run.label = f"{run.method}-{run.source}"        # as folders are called: xpe-joshi5
        runs = self.adapted if run.adapted_to else self.runs
        runs.append(run)
        return True

    def pick(self, name):
        """{seed: run} of a method, given as xpe or xpe-joshi5; {} unless exactly one has the name.
        """
        labels = {run.label for run in self.runs if name in (run.method, run.label)}
        return {run.seed: run for run in self.runs if labels == {run.label}}


def read_studies(arguments, split, leave_out, notes):
    """Run folders -> list of Study. Notes what is left out.

    Raises ValueError if nothing is left, or for a language to be left out that no run has.
    """
    studies = []
    known = set()                                       # languages
    for argument in arguments:
        folder = Path(argument).resolve()
        try:
            with reading(folder):
                run = ScoredRun(folder, split, leave_out)
                known.update(run.sentences)
                if not any(study.take(run) for study in studies):
                    studies.append(Study(run))
        except (ValueError, OSError) as error:
            notes.append(f"left out: {error}")
    check(studies, f"no scored run; {'; '.join(notes)}")
    for code in leave_out:
        check(code in known, f"--leave-out: no run is scored on {code!r}{nearest(code, known)}")
        notes.append(f"left out of all figures but the published ones: {code}")
    return studies


# ---- Means over seeds ----------------------------------------------------------------------------

def add_figures(study, notes):
    """Fill in what the tables average: .figures of each run, {column: percent}, and .partial,
    {"<column> languages": of how many languages it is the mean, where the run lacks some}.

    A figure is the mean over a group of languages or, of an adapted run, its accuracy before and
    after; without one of these it has no figures.
    """
    for run in study.runs:
        means = group_means(run.scores, study.config, run.sources)
        for title, (mean, scored, _) in means.items():
            run.figures[title] = np.nan if mean is None else mean
            size = len(study.targets.get(title, run.sources))
            if 0 < scored < size:
                run.partial[f"{title} languages"] = f"{scored} of {size}"
    scores_of_run = {run.folder.name: run.scores for run in study.runs}
    for run in study.adapted:
        try:
            before = scores_of_run[run.meta["adapted_from"]][run.adapted_to]
            after = run.scores[run.adapted_to]
            run.figures = {"before": before, "after": after, "gain": after - before}
        except KeyError as missing:
            notes.append(f"left out: {run.folder}: {missing} is not among these runs or languages")


def average_methods(runs, notes):
    """Runs -> one line of a table for each method and source group, those that train the most last.

    A line has the mean of each figure over the seeds and, as "<name> std", its deviation, which is
    that of a sample (n - 1); one seed has none. Several languages of one seed (adapted runs) are
    averaged first. "<name> languages": how many, where a group lacks some. Notes the seeds (and
    adapted languages) that other lines have, and the settings in which runs that are averaged
    differ. Raises ValueError for a seed that occurs twice.
    """
    expected = {f"{run.seed} {other.adapted_to}".strip() for run in runs for other in runs}
    methods = {}                                        # label -> {seed and language: run}
    for run in runs:
        cases = methods.setdefault(run.label, {})
        check(run.case not in cases, f"{run.folder}: {run.label} has seed {run.case} twice")
        cases[run.case] = run
    lines = []
    for label, cases in methods.items():
        missing = ", ".join(sorted(expected - cases.keys()))
        if missing:
            notes.append(f"{label}: missing although other runs have them: seeds {missing}")
        same_method = list(cases.values())
        first = same_method[0]
        seeds = sorted({run.seed for run in same_method})
        line = {"method": first.method, "source": first.source, "seeds": len(seeds),
                "trainable": first.trainable}
        lines.append(line)
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
            changed = differences(first.settings, run.settings, NO_RECIPE)
            if changed:
                notes.append(f"{label}: {run.folder.name} is averaged with {first.folder.name}, "
                             f"although {changed}")
    return sorted(lines, key=lambda line: (line["source"], line["trainable"] or 0))


# ---- Comparison of two methods: paired hits, intervals, a test for each language -----------------

LEVEL = 0.05                            # of tests; intervals are 95 % ones
ANGLES = np.linspace(0, np.pi / 2, 4_001)               # grid of the integral in t_test


def average_languages(runs, languages):
    """The hits of S runs on I sentences, averaged over languages, in percent: (S, I).

    A sentence has one id in all languages, and its translations are answered alike, so they count
    as one observation. The mean over all is the mean of the languages' accuracies. A sentence that
    a language lacks counts as that language's mean, and the deviations of those that it has are
    enlarged by all / its own, so that its error stays that of its own sentences.
    """
    ids = [runs[0].sentences[language][0] for language in languages]
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
    mean = a.mean() - b.mean()
    both = np.stack([a - a.mean(), b - b.mean()])               # (2, S, I)
    of_seeds = both.mean(axis=2, keepdims=True)
    of_sentences = both.mean(axis=1, keepdims=True)
    rest = both - of_seeds - of_sentences
    paired = of_sentences[0] - of_sentences[1]
    # degrees of freedom; one seed or sentence has none, and sums of squares that are zero
    free_seeds = max(seeds - 1, 1)
    free_sentences = max(sentences - 1, 1)
    free_rest = free_seeds * free_sentences

    square_rest = np.sum(rest ** 2) / free_rest
    square_seeds = max(square_rest, sentences * np.sum(of_seeds ** 2) / free_seeds)
    square_sentences = max(square_rest, seeds * np.sum(paired ** 2) / free_sentences)
    square = square_seeds + square_sentences - square_rest
    if sentences == 1 or square < 1e-12:
        return mean, np.nan, 1.0
    of_runs = (square_seeds ** 2 / free_seeds + square_rest ** 2 / free_rest) / 2
    freedom = square ** 2 / (of_runs + square_sentences ** 2 / free_sentences)
    return mean, np.sqrt(square / (seeds * sentences)), freedom


def t_test(mean, error, freedom):
    """A - B as a table's columns: the difference, its 95 % interval, and the two-sided p-value of
    Student's t, if the truth is zero.

    With t = sqrt(freedom) tan(angle) the density is cos^(freedom - 1); the integral up to each
    angle of the grid is a sum of trapezoids. (numpy has no t distribution.)
    """
    density = np.cos(ANGLES) ** (freedom - 1)
    area = np.append(0, np.cumsum(density[1:] + density[:-1]))
    p_values = 1 - area / area[-1]                              # of ANGLES, from 1 to 0
    angle = np.arctan(abs(mean) / error / np.sqrt(freedom))
    critical_angle = np.interp(-LEVEL, -p_values, ANGLES)
    reach = np.sqrt(freedom) * np.tan(critical_angle) * error
    return {"A - B": mean, "low": mean - reach, "high": mean + reach,
            "p": np.interp(angle, ANGLES, p_values)}


def mark_significant(lines):
    """Replace each p in lines (dicts) by Holm's adjusted one, and note those that are significant
    together at 0.05 -> how many lines have a p."""
    tested = [line for line in lines if not np.isnan(line["p"])]
    tested.sort(key=itemgetter("p"))
    largest = 0.0
    for place, line in enumerate(tested):
        largest = max(largest, line["p"] * (len(tested) - place))
        line["p"] = min(1.0, largest)
        if largest <= LEVEL:
            line["note"] = "significant"
    return len(tested)


def contrast(runs_a, runs_b, languages):
    """A against B over some languages, S runs each -> columns of a table. With one seed p is NaN.
    """
    a = average_languages(runs_a, languages)
    b = average_languages(runs_b, languages)
    columns = t_test(*estimate_difference(a, b))
    if len(a) == 1:
        columns["p"] = np.nan
    return {"A": a.mean(), "B": b.mean(), **columns}


Comparison = namedtuple("Comparison", "names seeds members groups languages tested")


def compare(study, names):
    """Methods A and B of a study, on the seeds and languages that both have -> Comparison.

    .seeds: how many; .members: {title: languages} of the sources of both and the target groups.
    .groups: a line (dict) for each: accuracy of A and B, difference, interval, p of a t test.
    .languages: the same for each language, the largest gain first, with the p of all targets
    (.tested: how many) adjusted together; note is "source", "significant" or "". p is NaN where
    nothing varies, for sources, and with one seed.
    """
    runs_a, runs_b = map(study.pick, names)
    seeds = sorted(runs_a.keys() & runs_b.keys())
    a = [runs_a[seed] for seed in seeds]
    b = [runs_b[seed] for seed in seeds]
    shared = set(study.sentences).intersection(*(run.hits for run in a + b))
    check(seeds and shared, "--compare: the two have no seed, or no language, in common")
    sources = set(a[0].sources + b[0].sources)
    members = {"Sources": sorted(shared.intersection(a[0].sources, b[0].sources))}
    for title, codes in study.targets.items():
        members[title] = sorted(shared.intersection(codes) - sources)
    groups = []
    for title, codes in members.items():
        if codes:
            groups.append({"group": title, "languages": len(codes), **contrast(a, b, codes)})

    languages = []
    for language in sorted(shared):
        line = {"language": language, **contrast(a, b, [language]), "note": ""}
        if language in sources:
            line.update(p=np.nan, note="source")
        languages.append(line)
    languages.sort(key=lambda line: -round(line["A - B"], 6))
    tested = mark_significant(languages)
    return Comparison(names, len(seeds), members, groups, languages, tested)


def comparison_table(comparison):
    """A beside B over the groups; below it how many target languages each of them wins, which of
    these are significant, and what one seed leaves out (tests/false_alarms.py) -> Table."""
    a, b = comparison.names
    won = 0
    lost = 0
    significant = []
    for line in comparison.languages:
        gain = line["A - B"]
        if line["note"] != "source":
            won += gain > 1e-9
            lost += gain < -1e-9
        if line["note"] == "significant":
            significant.append(f"{line['language']} {gain:+.1f}")
    names = ", ".join(significant) or "none"
    remarks = [f"Target languages: {won} won, {lost} lost; significant (t test over seeds and "
               f"paired sentences, by Holm over {comparison.tested} languages): {names}."]
    if comparison.seeds == 1:
        remarks.append("One seed, and so no test: this compares two runs, not two methods. The "
                       "intervals cover the choice of test sentences alone; of two equal methods "
                       "they call one better in about a third of all cases, because runs of one "
                       "method differ, too.")
    columns = {"group": "group", "languages": "languages", "A": a, "B": b,
               "A - B": f"{a} - {b}", "low": "95 % from", "high": "to"}
    title = f"{a} against {b}: accuracy in percent, {comparison.seeds} seeds each"
    return Table(title, columns, comparison.groups, remarks)


# ---- Tables: Markdown that is aligned in a terminal, too -----------------------------------------

TEXT_COLUMNS = ("method", "source", "languages adapted to", "group")
# lines: dicts; columns: {key in the lines: heading}; remarks stand below the table
Table = namedtuple("Table", "title columns lines remarks", defaults=[()])


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
    if isinstance(value, str):
        return value
    if key in ("A - B", "low", "high"):
        return f"{value:+.2f}"
    text = f"{value:.1f}"
    if f"{key} std" in line:
        text += f" ± {line[f'{key} std']:.1f}"
    if f"{key} languages" in line:
        text += f" ({line[f'{key} languages']})"
    return text


def format_tables(tables):
    """Text of all tables; a column is equally wide in all of them. Text stands to the left, numbers
    to the right."""
    lines = []
    parts = []
    for table in tables:
        lines += table.lines
    for table in tables:
        columns = []
        for key, heading in table.columns.items():
            lengths = [len(format_cell(line, key)) for line in lines]
            width = max(3, len(heading), *lengths)
            side = "<" if heading in TEXT_COLUMNS else ">"
            cells = [heading, f"{':':-{side}{width}}"]              # :----- or -----:
            cells += [format_cell(line, key) for line in table.lines]
            columns.append([f"{cell:{side}{width}}" for cell in cells])
        rows = [f"| {' | '.join(cells)} |" for cells in zip(*columns)]
        parts += [table.title, "\n".join(rows), *table.remarks]
    return "\n\n".join(parts)


def study_tables(study, split, notes):
    """Means of a study's methods, the published ones where a target has the name of the paper's,
    and what adaptation gave -> list of Table."""
    add_figures(study, notes)
    names = ["method", "source", "seeds", "trainable", "Sources", *study.targets]
    columns = {name: name for name in names}
    corpus = Path(study.config["data"]["name"]).name
    sentences = fingerprint(sorted(study.sentences.items()))[:8]
    backbone = Path(study.backbone["name"]).name
    title = (f"Accuracy in percent ({split}, {backbone} {study.backbone['fingerprint'][:8]} on "
             f"{corpus} {sentences}), mean ± standard deviation over seeds")
    tables = [Table(title, columns, average_methods(study.runs, notes))]
    if "Low-performing" in columns:
        lines = read_csv(HERE / "published.csv")
        for title, same_table in groupby(lines, itemgetter("table")):
            tables.append(Table(title, columns, list(same_table)))
    adapted = [run for run in study.adapted if run.figures]
    if adapted:
        names = ["method", "source", "seeds", "languages adapted to", "before", "after", "gain"]
        columns = {name: name for name in names}
        title = "Adapted to a target language: accuracy in percent, mean ± deviation over seeds"
        tables.append(Table(title, columns, average_methods(adapted, notes)))
    return tables


# ---- The picture --------------------------------------------------------------------------------

STYLE = {
    "font.size": 7, "axes.grid": True, "axes.grid.axis": "x", "grid.alpha": 0.25,
    "ytick.major.size": 0,
    # grey for the sources, then Okabe and Ito's colours, told apart by the colour-blind, too
    "axes.prop_cycle": "cycler(color=['8c8c8c', 'd55e00', '0072b2', 'e69f00', '009e73', 'cc79a7'])",
}


def plot(path, comparison):
    """Write the picture of a comparison to `path`."""
    with reading("--plot needs matplotlib"):
        from matplotlib import figure, style
    picture = figure.Figure((7.2, 6.2), layout="constrained")
    with style.context(["default", STYLE]), warnings.catch_warnings(record=True) as caught:
        draw(picture, comparison)       # "default": not what a user's own matplotlibrc says
        picture.savefig(path, dpi=150)
    if caught:
        warn(f"--plot: boxes stand for letters that the font lacks: {caught[0].message}")
    print(f"{path}: written")


def draw(figure, comparison):
    """Draw groups with intervals, sorted gains, families and scripts, all on one axis.

    A language has the colour of the first group that holds it, and is black if none does.
    """
    lines = comparison.languages
    languages = [line["language"] for line in lines]
    gains = np.array([line["A - B"] for line in lines])
    panels = figure.subplot_mosaic("lg;lf;ls", sharex=True)

    colours = np.full(len(lines), "black")
    for height, line in reversed(list(enumerate(comparison.groups))):       # the first comes last
        colour = f"C{height}"                                   # C0, C1 ...: those of STYLE
        colours[np.isin(languages, comparison.members[line["group"]])] = colour
        gain = line["A - B"]
        panels["g"].errorbar(gain, height, xerr=line["high"] - gain, fmt="o", color=colour)
    names = [f"{line['group']} ({line['languages']})" for line in comparison.groups]
    name_rows(panels["g"], names,
              f"groups, their colours, 95 % intervals (seeds: {comparison.seeds})")

    marks = ["•" if line["note"] == "significant" else "" for line in lines]
    panels["l"].barh(languages, gains, 0.9, color=colours)
    name_rows(panels["l"], marks, f"{len(lines)} languages (•: significant)")

    family_of = {line["code"]: line["family"] for line in read_csv(HERE / "baselines.csv")}
    families = [family_of.get(language, "unknown") for language in languages]
    scripts = [language.rpartition("_")[2] for language in languages]
    draw_strips(panels["f"], "the largest families, with their means", families, gains, colours)
    draw_strips(panels["s"], "the largest scripts, with their means", scripts, gains, colours)
    figure.suptitle("accuracy of {} minus {} (points)".format(*comparison.names))


def draw_strips(axes, title, values, gains, colours):
    """A row for each of the eight most frequent values: a stroke for each language, and a black one
    for their mean. values, gains, colours: one for each language."""
    names = []
    for height, (value, count) in enumerate(Counter(values).most_common(8)):
        chosen = np.equal(values, value)
        axes.scatter(gains[chosen], [height] * count, marker="|", c=colours[chosen])
        axes.plot(gains[chosen].mean(), height, "k|", markersize=14)
        names.append(f"{value} ({count})")
    name_rows(axes, names, title)


def name_rows(axes, names, title):
    """Names of the rows of a panel, from the top down, its title and its zero line."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title)
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)


# ---- The command ---------------------------------------------------------------------------------

OPTIONS = """
--plot FILE  with --compare: the picture, gain.png, .pdf or .svg (needs matplotlib)
--out DIR  write report.md and report.csv to this folder
--split NAME=test  train, dev or test
--leave-out CODES  languages not to count, separated by commas: ars_Arab, say
"""


def write_report(folder, text, notes, tables):
    """Write report.md and report.csv, the same in full precision, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"* {note}\n" for note in notes)
    write_atomically(folder / "report.md", f"{text}\n\n{listed}".encode())
    lines = [{"table": table.title, **line} for table in tables for line in table.lines]
    columns = dict.fromkeys(chain(*lines))              # a set that keeps its order
    write_csv(folder / "report.csv", columns, [map(line.get, columns) for line in lines])
    print(f"{folder}/report.md, report.csv: written")


def main(argv=None):
    """Read the runs, print the tables, write what was asked for."""
    parser = make_parser("Tables and comparisons of scored run folders.", OPTIONS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that evaluate.py scored")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"),
                        help="methods: xpe spt, or xpe-joshi5 xpe-seen; is A better?")
    args = parser.parse_args(argv)
    check(args.compare or not args.plot,
          "--plot needs --compare A B: it shows the gain of A over B")
    notes = []
    studies = read_studies(args.runs, args.split, split_commas(args.leave_out), notes)
    tables = []
    for study in studies:
        if any("ars_Arab" in run.hits and "arb_Arab" in run.sources for run in study.runs):
            notes.append("ars_Arab shares 138 of SIB-200's 204 test sentences with arb_Arab, a "
                         "source; --leave-out ars_Arab counts without it")
        tables += study_tables(study, args.split, notes)
    for note in notes:
        warn(note)
    if args.compare:
        having_both = [study for study in studies if all(map(study.pick, args.compare))]
        check(len(having_both) == 1,
              "--compare: a name fits no method, or several (write it with its source: "
              "xpe-joshi5), or several backbones or corpora have both")
        comparison = compare(*having_both, args.compare)
        tables.append(comparison_table(comparison))
    text = format_tables(tables)
    print(text)
    if args.compare:
        tables.append(Table("languages", {}, comparison.languages))
    if args.out:
        write_report(Path(args.out).expanduser(), text, notes, tables)
    if args.plot:
        plot(Path(args.plot).expanduser(), comparison)


if __name__ == "__main__":
    run_main(main)
