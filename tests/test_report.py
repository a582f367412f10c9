"""Tests of report.py: each is a second, slow, obvious computation of what the report prints.

First small invented runs, then the results in sample/results: run folders are rebuilt from the
answers there, reported again, computed again, and looked for in the two README files: see QUOTES.
"""
import copy
import csv
import itertools
import json
import random
import re
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest

import false_alarms
import report
from config import read_config, resolve_group, resolve_targets

ROOT = Path(report.__file__).parent
SOURCES = ["eng_Latn", "zho_Hans"]
TARGETS = ["mri_Latn", "hat_Latn", "ltz_Latn"]
CONFIG = {"groups": {"here": TARGETS, "two": SOURCES},
          "targets": {"Here": "here", "One": ["mri_Latn"]}}


# ---- Run folders, and the command ----------------------------------------------------------------

def read_table(path):
    """The lines of a CSV file as dicts."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def write_run(folder, kind, seed, right, config=CONFIG, **changes):
    """A scored run folder; right: {language: {index_id: whether the prediction is right}}.

    changes: what is different in prompt.json.
    """
    folder.mkdir(parents=True)
    meta = {"kind": kind, "seed": seed, "sources": SOURCES, "prompt": {"encoder": "mlp"},
            "backbone": {"name": "a/tiny", "fingerprint": "0123"},
            "training": {"trainable": 1234, "settings": {"rate": 0.1}}}
    (folder / "prompt.json").write_text(json.dumps({**meta, **changes}))
    (folder / "prompt.safetensors").touch()
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = {"language,index_id,label,predicted": -1}
    for language, answers in right.items():
        for place, (n, ok) in enumerate(answers.items()):
            lines[f"{language},{n},yes,{'yes' if ok else 'no'}"] = place
    # the languages need not be one after the other
    (folder / "test_predictions.csv").write_text("\n".join(sorted(lines, key=lines.get)))


def write(root, method, seeds, gain=0, **changes):
    """A run folder for each seed, with random answers; in the targets `gain` more are right."""
    for seed in seeds:
        draw = random.Random(f"{seed} {gain}")
        right = {}
        for language in SOURCES + TARGETS:
            share = 0.4 + gain * (language in TARGETS)
            right[language] = {n: draw.random() < share for n in range(40)}
        write_run(root / f"{method}-s{seed}", method, seed, right, **changes)


@pytest.fixture
def tell(tmp_path, capsys):
    """The command over all in tmp_path -> printed text without blanks, warnings, report.csv."""
    def command(*options):
        out = tmp_path.with_name("out")
        report.main([*sorted(map(str, tmp_path.iterdir())), "--out", str(out), *options])
        printed = capsys.readouterr()
        return printed.out.replace(" ", ""), printed.err, read_table(out / "report.csv")
    return command


COMPARE = ("--compare", "xpe", "spt")


# ---- Tables and tests ----------------------------------------------------------------------------

def test_sib200s_published_means_follow_from_its_languages():
    """Would catch: a wrong column or group, nqo_Nkoo averaged in, a figure copied wrongly."""
    languages = [line for line in read_table(ROOT / "baselines.csv") if all(line.values())]
    published = read_table(ROOT / "published.csv")[-6:]
    for title, codes in resolve_targets(read_config()).items():
        for line, column in zip(published, list(languages[0])[3:], strict=True):
            scores = [float(facts[column]) for facts in languages if facts["code"] in codes]
            assert line[title] == f"{mean(scores):.1f}"


def test_adapted_runs_stand_beside_their_source_run(tmp_path, tell):
    """Would catch: an adapted run counted as a seed of its source's line, 'before' of another
    language, languages counted as seeds, a language that one seed lacks averaged over silently."""
    nothing = {code: dict.fromkeys(range(4), False) for code in TARGETS}
    for seed in (1, 2):
        write_run(tmp_path / f"xpe-s{seed}", "xpe", seed, nothing)
    for seed, code, count in ((1, "mri_Latn", 1), (1, "hat_Latn", 3), (2, "mri_Latn", 2),
                              (3, "ltz_Latn", 0)):
        after = {code: {n: n < count for n in range(4)}}
        write_run(tmp_path / f"{seed}-{code}", "xpe", seed, after, adapted_to=code,
                  adapted_from=f"xpe-s{seed}")
    text, said, _ = tell()
    assert "|xpe|two|2|hat_Latn,mri_Latn|0.0±0.0|50.0±0.0|50.0±0.0|" in text
    assert "xpe-two: missing although other runs have them: seeds 2 hat_Latn" in said
    assert "3-ltz_Latn: 'xpe-s3' is not among these runs" in said


def test_students_t():
    """Would catch: a one-sided quantile, a grid too coarse. From a printed table."""
    for freedom, quantile, p_of_5 in ((1, 12.706, 0.12567), (2, 4.3027, 0.03775),
                                      (4, 2.7764, 0.00749), (9, 2.2622, 0.000739)):
        assert report.t_test(0, 2, freedom)["high"] == pytest.approx(2 * quantile, rel=1e-4)
        assert report.t_test(-5.0, 1, freedom)["p"] == pytest.approx(p_of_5, rel=1e-3)


def test_holm():
    """Would catch: no running maximum, or the wrong order. By hand."""
    lines = [{"p": p} for p in (0.01, 0.04, 0.03, 0.005)]
    report.mark_significant(lines)
    assert [line["p"] for line in lines] == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("count", [1, 2, 40])
def test_where_nothing_varies_nothing_is_tested(tmp_path, tell, count):
    """Would catch: p = 0 and an interval that is a point, from runs that are all right."""
    for seed in (1, 2):
        for method, right in (("xpe", True), ("spt", False)):
            write_run(tmp_path / f"{method}{seed}", method, seed,
                      {code: dict.fromkeys(range(count), right) for code in TARGETS})
    text, _, lines = tell(*COMPARE)
    assert {(line["p"], line["note"]) for line in lines if line["language"]} == {("nan", "")}
    assert "|Here|3|100.0|0.0|+100.00|-|-|" in text


def test_equal_methods_are_seldom_called_different():
    """Would catch: an interval that forgets the seeds. All rates: tests/false_alarms.py."""
    ours, fixed = false_alarms.rates(["report", "fixed"], seeds=3, cases=150)
    assert ours < 9 and fixed > 20


# ---- What is missing or wrong is said, and costs no more than it must ----------------------------

def test_missing_seeds_and_parts_of_groups_are_said(tmp_path, tell):
    """Would catch: a mean over part of a group that looks like one over all, runs of two recipes
    averaged silently, a source counted as a target, a language left out of the means alone, one
    run of each method sold as a comparison of methods."""
    write(tmp_path, "xpe", [1, 5], 0.1)
    write(tmp_path, "xpe", [2], 0.1, training={"settings": {"rate": 0.2}})
    write(tmp_path, "spt", [1])
    write(tmp_path, "head", [1], sources=["eng_Latn", "ltz_Latn"])
    text, said, lines = tell("--leave-out", "hat_Latn", *COMPARE)
    assert "spt-two: missing although other runs have them: seeds 2, 5\n" in said
    assert "xpe-s2 is averaged with xpe-s1, although rate was 0.1, not 0.2\n" in said
    assert "left out of all figures but the published ones: hat_Latn\n" in said
    parts = [line["Here languages"] for line in lines if line["method"]]
    assert parts == ["1 of 3", "2 of 3", "2 of 3"] and text.count("(2of3)") == 2
    assert [line["languages"] for line in lines if line["group"]] == ["2", "2", "1"]
    assert "comparestworuns,nottwomethods" in text and "over0languages):none." in text


DAMAGE = [      # what stands in prompt.json or test_predictions.csv, what is said
    ("[]", "list indices must be integers"),
    ('{"kind": "spt", "prompt": null}', "lacks 'seed'"),
    ('{"kind": "spt", "prompt": null, "seed": 1e999}', "infinity"),
    ("language\na\n", "lacks 'index_id'"),
]


@pytest.mark.parametrize("text, reason", DAMAGE)
def test_a_damaged_file_costs_one_run(tmp_path, tell, text, reason):
    """Would catch: a whole report lost to one file, or a line that does not say what is wrong."""
    write(tmp_path, "spt", (1, 2))
    file = "test_predictions.csv" if text.startswith("language") else "prompt.json"
    (tmp_path / "spt-s1" / file).write_text(text)
    printed, said, _ = tell()
    assert said.startswith(f"warning: left out: {tmp_path}/spt-s1") and reason in said
    assert said.count("\n") == 1 and "|spt|two|1|1,234|" in printed


def test_each_backbone_and_corpus_has_its_own_report(tmp_path, tell):
    """Would catch: two backbones of one name in one mean, one of two names apart, a comparison of
    runs that answered other sentences."""
    other = {"name": "a/tiny", "fingerprint": "4567"}
    write(tmp_path, "xpe", [1])
    write(tmp_path, "spt", [1])
    write(tmp_path, "xpe", [2], backbone={"name": "b/c", "fingerprint": "0123"})
    write(tmp_path, "xpe", [3], backbone=other)
    write_run(tmp_path / "xpe-s4", "xpe", 4, {"mri_Latn": {77: True}})
    text, _, _ = tell(*COMPARE)
    titles = re.findall(r"\(test,(tiny\d+)onsib200(\w+)\)", text)
    assert [name for name, _ in titles] == ["tiny0123", "tiny4567", "tiny0123"]
    assert titles[0] != titles[2] and "|xpe|two|2|" in text and text.count("xpeagainstspt") == 1
    write(tmp_path, "spt", [3], backbone=other)
    with pytest.raises(ValueError, match="or several backbones or corpora have both"):
        tell(*COMPARE)


@pytest.mark.parametrize("arguments, message", [
    ("spt-s1 again/spt-s1", ".*/again/spt-s1: spt-two has seed 1 twice"),
    ("spt-s1 --leave-out hat_Lat", "did you mean hat_Latn"),
    ("spt-s1 xpe-s5 --compare xpe spd", "a name fits no method"),
    ("spt-s1 xpe-s5 --compare xpe spt", "no seed, or no language, in common"),
    ("spt-s1 --plot gain.png", "--plot needs --compare"),
    ("nothing-*", r"no scored run; left out: .*nothing-\*: has no prompt.json"),
    ("spt-s2", "no test_predictions.csv; evaluate.py writes it"),
    (".", "has no prompt.json: not a run"),
])
def test_refusals_name_what_was_given(tmp_path, monkeypatch, arguments, message):
    """Would catch: a refusal that leaves the reader guessing."""
    write(tmp_path, "spt", [1, 2])
    write(tmp_path, "xpe", [5])
    monkeypatch.chdir(tmp_path)
    Path("spt-s2/test_predictions.csv").unlink()
    write(tmp_path / "again", "spt", [1])
    with pytest.raises(ValueError, match=message):
        report.main(arguments.split())


def test_picture_and_marks(tmp_path, tell, monkeypatch):
    """Would catch: a picture that depends on a user's own matplotlibrc, a folder called ~, a plain
    effect that is not marked, a source that is."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    write(tmp_path, "xpe", range(5), 0.5)
    write(tmp_path, "spt", range(5))
    _, said, lines = tell(*COMPARE, "--plot", "~/a.png")
    assert not said
    assert {line["language"] for line in lines if line["note"] == "significant"} == set(TARGETS)
    with matplotlib.rc_context({"font.size": 40, "axes.grid": False, "savefig.dpi": 30}):
        tell(*COMPARE, "--plot", "~/b.png")
    a, b = [(tmp_path.parent / f"{name}.png").read_bytes() for name in "ab"]
    assert a == b and a.startswith(b"\x89PNG") and len(a) < 200_000


# ---- The results that the README quotes ----------------------------------------------------------

RESULTS = ROOT / "sample" / "results"
OF_SIB200 = 204                         # test sentences of a language; the results have a part
REPORTS = sorted(RESULTS.rglob("report.md"))

# What README.md or sample/README.md say, a line for each sentence; in brackets names of `facts`
QUOTES = """
XPE minus SPT is {xpe against spt Low-performing}, a 95 % interval
XPE minus SPT is {xpe against spt Low-performing}, better in {won} languages, worse in {lost}
of the 46 low-performing languages {won} gain, by up to {largest} points
Over all unseen languages it is {xpe against spt Unseen}, on the seen ones {xpe against spt Seen w/o Joshi5}
the first five seeds alone gave {first 5 seeds}, the first ten {first 10 seeds}
XPE minus head is {xpe against head Low-performing} on the
XPE minus full is {xpe against full Low-performing} on the
is {xpe-enarzho against spt-enarzho Low-performing} with three sources and {xpe-seen against spt-seen Low-performing} with 92
SPT has {long spt joshi5 Low-performing} and XPE {long xpe joshi5 Low-performing}, so XPE minus SPT is {long xpe against spt Low-performing}
Over all unseen languages it is {long xpe against spt Unseen}, on the seen ones {long xpe against spt Seen w/o Joshi5}
after four times the steps, with five seeds, {long xpe against spt Low-performing}
SPT from {spt before} to {spt after}, XPE from {xpe before} to {xpe after}
"""


def rebuild(folder, out):
    """Run folders in `out` from sample/results/<folder>/*/right.csv.

    right.csv has a 1 for each right answer, of every second or every sixth sentence. Labels are not
    there and do not count.
    """
    config = read_config()
    shipped = read_table(RESULTS / "joshi5/report.csv")
    trainable = {line["method"]: line["trainable"] for line in shipped if line["trainable"]}
    for path in (RESULTS / folder).glob("*/right.csv"):
        method, source, seed = path.parent.name.split("-")
        right = {}
        for line in read_table(path):
            digits = line["right"]
            ids = range(0, OF_SIB200, OF_SIB200 // len(digits))
            right[line["language"]] = {n: digit == "1" for n, digit in zip(ids, digits)}
        targets = config["targets"]
        if len(right) < len(resolve_group(config, "all")):
            targets = {"Low-performing": "low_performing"}
        write_run(out / path.parent.name, method.rstrip("0123456789"), int(seed[1:]), right,
                  {"targets": targets}, sources=resolve_group(config, source),
                  backbone={"name": "multilingual-e5-small", "fingerprint": "(4 bits)"},
                  prompt={"encoder": "mlp", "ratio": int(method[4:] or 0) / 100},
                  training={"trainable": int(trainable[method])})


@pytest.fixture(scope="module")
def study_of(tmp_path_factory):
    """{folder of runs in sample/results, or in one of these: the Study of the runs}."""
    studies = {}
    for folder in {path.parent.parent for path in RESULTS.rglob("right.csv")}:
        out = tmp_path_factory.mktemp("runs")
        rebuild(folder, out)
        [study] = report.read_studies(sorted(out.iterdir()), "test", [], [])
        studies.update(dict.fromkeys([folder, *folder.iterdir()], study))
    return studies


@pytest.mark.parametrize("path", REPORTS, ids=str)
def test_the_shipped_reports_are_what_the_command_prints(study_of, path, tmp_path, monkeypatch):
    """Would catch: a report that cannot be had again from what is in the repository."""
    monkeypatch.setattr(report, "read_studies", lambda *_: [study_of[path.parent]])
    text = path.read_text()
    methods = re.findall(r"^(\S+) against (\S+):", text, re.MULTILINE)
    compare = ["--compare", *methods[0]] if methods else []
    report.main(["runs", "--out", str(tmp_path), *compare])
    assert (tmp_path / "report.md").read_text() == text


def test_shipped_means_and_an_interval_by_sums_of_squares(study_of):
    """Would catch: n for n - 1, unpaired sentences, languages taken for independent, a wrong error.
    """
    codes = resolve_group(read_config(), "low_performing")
    study = study_of[RESULTS / "joshi5"]
    comparison = report.compare(study, ("xpe", "spt"))
    hits = [[[run.hits[code] for code in codes] for run in study.pick(name).values()]
            for name in comparison.names]
    both = 100 * np.mean(hits, axis=2)                  # (2, S, I)
    text = (RESULTS / "joshi5/report.md").read_text()
    for method, of_seeds in zip(comparison.names, both.mean(axis=2)):
        figure = f"{of_seeds.mean():.1f} ± {of_seeds.std(ddof=1):.1f}"
        assert re.search(rf"\| {method} .* {figure} ", text)
    difference = both[0].mean(axis=0) - both[1].mean(axis=0)
    _, seeds, sentences = both.shape
    of_seeds = both.mean(axis=2).var(axis=1).sum()
    rest = both.var(axis=(1, 2)).sum() - of_seeds - both.mean(axis=1).var(axis=1).sum()
    free = np.array([2 * (seeds - 1), sentences - 1, 2 * (seeds - 1) * (sentences - 1)])
    squares = seeds * sentences * np.array([2 * of_seeds, difference.var(), 2 * rest]) / free
    squares = np.maximum(squares, squares[2])
    square = squares @ [1, 1, -1]
    error = (square / seeds / sentences) ** 0.5
    freedom = square ** 2 / sum(squares ** 2 / free)
    expected = report.t_test(difference.mean(), error, freedom)
    line = comparison.groups[1]
    assert {key: line[key] for key in expected} == pytest.approx(expected)


@pytest.fixture(scope="module")
def facts(study_of):
    """{name: figure as it is quoted}."""
    found = {}
    for path in RESULTS.rglob("report.csv"):
        of = "long " * (path.parent.name == "long")
        for line in read_table(path):
            for key in line:
                if line.get(f"{key} std"):
                    deviation = float(line[f"{key} std"])
                    found[f"{of}{line['method']} {line['source']} {key}"] = (
                        f"{float(line[key]):.1f} ± {deviation:.1f}")
            if line.get("group"):
                found[f"{of}{line['table'].partition(':')[0]} {line['group']}"] = quote(line)
    for count in (5, 10):
        few = copy.copy(study_of[RESULTS / "joshi5"])
        few.runs = [run for run in few.runs if run.seed <= 10 + count]
        first = report.compare(few, ("xpe", "spt")).groups[1]
        found[f"first {count} seeds"] = quote(first)

    codes = resolve_group(read_config(), "low_performing")
    gains = [float(line["A - B"]) for line in read_table(RESULTS / "joshi5/report.csv")
             if line["language"] in codes]
    found["won"] = sum(gain > 1e-9 for gain in gains)
    found["lost"] = sum(gain < -1e-9 for gain in gains)
    found["largest"] = f"{max(gains):.1f}"
    adapted = {}
    for line in read_table(RESULTS / "adapted.csv"):
        for key in ("before", "after"):
            of_seeds = adapted.setdefault(f"{line['method']} {key}", {})
            of_seeds.setdefault(line["seed"], []).append(float(line[key]))
    for name, of_seeds in adapted.items():
        means = [mean(values) for values in of_seeds.values()]
        found[name] = f"{mean(means):.1f} ± {stdev(means):.1f}"
    return found


def quote(line):
    """A difference and its interval as they are quoted."""
    gain, low, high = [float(line[key]) for key in ("A - B", "low", "high")]
    return f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"


def test_neither_dual_is_told_from_others(study_of):
    """Would catch: that sentence of the README after results that say otherwise."""
    for a, b in itertools.product(("dual30", "dual70"), ("spt", "xpe")):
        for line in report.compare(study_of[RESULTS / "joshi5"], (a, b)).groups:
            assert line["low"] < 0 < line["high"]


@pytest.mark.parametrize("file", ["README.md", "sample/README.md"])
@pytest.mark.parametrize("method", ["head", "spt", "dual30", "dual70", "xpe", "full"])
def test_the_tables_of_both_files(facts, file, method):
    """Would catch: a row that is right in one of the files only."""
    columns = "Low-performing", "Unseen", "Seen w/o Joshi5", "Sources"
    row = " | ".join(facts[f"{method} joshi5 {column}"] for column in columns)
    assert f"| {row} |" in (ROOT / file).read_text(encoding="utf-8").replace("*", "")


@pytest.mark.parametrize("sentence", QUOTES.strip().splitlines())
def test_the_readme_quotes_the_results(facts, sentence):
    """Would catch: a figure that is no longer that of the results."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md",
                                                                ROOT / "sample/README.md"))
    assert sentence.format_map(facts) in " ".join(text.replace("*", "").split())
