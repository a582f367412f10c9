"""Tests of report.py: each is a second, slow, obvious computation of what the report prints."""
import csv
import itertools
import json
import math
import random
import subprocess
import sys
from statistics import mean, stdev

import numpy as np
import pytest

import false_alarms
import report

SOURCES = ["eng_Latn", "zho_Hans"]
TARGETS = ["mri_Latn", "hat_Latn", "ltz_Latn"]
CONFIG = f"""
groups: {{here: {TARGETS}, two: {SOURCES}}}
targets: {{Here: here, One: [mri_Latn]}}
"""


def write_run(root, method, seed, right, name=None, **changes):
    """A scored run folder; right: {language: [(index_id, whether the prediction is right)]}.

    changes: what is different in prompt.json.
    """
    folder = root / (name or f"{method}-s{seed}")
    folder.mkdir(parents=True)
    meta = {
        "format": 2, "kind": method, "seed": seed, "sources": SOURCES,
        "prompt": {"encoder": "mlp", "ratio": 1.0},
        "backbone": {"name": "tiny", "fingerprint": "0123"},
        "training": {"trainable": 1234, "settings": {"rate": 0.1}},
    }
    meta.update(changes)
    (folder / "prompt.json").write_text(json.dumps(meta))
    (folder / "config.yaml").write_text(CONFIG)
    predictions = "language,index_id,label,predicted\n"
    table = "language,n,accuracy\n"
    for language, answers in right.items():
        for index_id, is_right in answers:
            label = "ab"[index_id % 2]
            predicted = label if is_right else "c"
            predictions += f"{language},{index_id},{label},{predicted}\n"
        accuracy = 100 * mean(int(is_right) for _, is_right in answers)
        table += f"{language},{len(answers)},{accuracy:.4f}\n"
    (folder / "test_predictions.csv").write_text(predictions)
    (folder / "test.csv").write_text(table)
    return folder


def answer(seed, gain, without=0):
    """Random answers to 40 sentences in five languages; in the targets `gain` more are right.

    without: so many sentences are missing in hat_Latn.
    """
    draw = random.Random(f"{seed} {gain}")
    right = {}
    for language in SOURCES + TARGETS:
        share = 0.4 + gain * (language in TARGETS)
        answers = [(index_id, draw.random() < share) for index_id in range(40)]
        right[language] = answers[without:] if language == "hat_Latn" else answers
    return right


def write_method(root, method, seeds, gain, without=0):
    """A run folder for each seed."""
    return [write_run(root, method, seed, answer(seed, gain, without)) for seed in seeds]


def run(folders, *options):
    """The command."""
    report.main([*map(str, folders), *map(str, options)])


def run_and_read(folders, out, *options):
    """The command -> the lines of report.csv."""
    run(folders, "--out", out, *options)
    return list(csv.DictReader((out / "report.csv").read_text().splitlines()))


def squeeze(text):
    """Text without blanks: tables whatever their widths."""
    return text.replace(" ", "")


def squeeze_lines(text):
    """Text with each run of blanks as one."""
    return " ".join(text.split())


# ---- Tables ----

def test_table_is_mean_and_sample_deviation_over_seeds(tmp_path, capsys):
    """Would catch: averaging over sentences first, n for n - 1, a source counted as a target."""
    data = {seed: answer(seed, 0.2, without=25) for seed in (1, 2, 3)}
    folders = [write_run(tmp_path, "spt", seed, right) for seed, right in data.items()]
    line = run_and_read(folders, tmp_path / "out")[0]
    means = []
    for right in data.values():
        accuracies = [mean(int(ok) for _, ok in right[language]) for language in TARGETS]
        means.append(100 * mean(accuracies))
    assert float(line["Here"]) == pytest.approx(mean(means))
    assert float(line["Here std"]) == pytest.approx(stdev(means))
    assert f"{mean(means):.1f} ± {stdev(means):.1f}" in capsys.readouterr().out


def test_baselines_give_the_papers_24_means():
    """Would catch: a wrong column or group, nqo_Nkoo averaged in, a figure copied wrongly."""
    config = report.read_config()
    lines = report.baseline_lines(config, report.read_language_facts())
    means = [round(line[title], 1) for line in lines for title in config["targets"]]
    assert means == [
        48.6, 66.4, 87.8, 75.6,
        33.7, 54.2, 86.2, 68.0,
        33.5, 55.0, 86.5, 68.5,
        33.4, 54.6, 86.5, 68.3,
        23.3, 35.7, 55.7, 44.3,
        23.3, 39.2, 68.1, 51.7]


def test_published_figures_stand_under_our_titles(tmp_path, capsys):
    """Would catch: published lines under other titles or widths, re-runs sold as published."""
    folder = write_run(tmp_path, "spt", 1, answer(1, 0.1))
    (folder / "config.yaml").write_text("targets: {Low: low_performing, Rest: seen}\n")
    run([folder])
    tables = capsys.readouterr().out.split("\n\n")
    own, published, reruns, baselines = [table.split("\n") for table in tables[1::2]]
    assert own[0] == published[0] == reruns[0] == baselines[0]
    assert squeeze(own[0]) == "|method|source|seeds|trainable|Sources|Low|Rest|"
    assert squeeze(published[5]) == "|xpe|joshi5|10|-|-|39.1|-|"
    assert squeeze(reruns[5]) == "|xpe-spt|joshi5|10|-|-|+2.03±1.34|-|"
    assert "re-runs (not published" in tables[4]


def test_a_table_is_markdown_and_aligned():
    """Would catch: a missing closing bar, ragged lines, names to the right, -0.00, nan."""
    columns = {"group": "group", "A": "xpe", "A - B": "xpe - spt"}
    lines = [{"group": "Here", "A": 61.25, "A std": 0.25, "A - B": -0.001},
             {"group": "A long name", "A": float("nan"), "A - B": 1.5}]
    text = report.format_tables([report.Table("Title", columns, lines, ["A remark."])])
    assert text.split("\n") == [
        "Title",
        "",
        "| group       |        xpe | xpe - spt |",
        "| :---------- | ---------: | --------: |",
        "| Here        | 61.2 ± 0.2 |      0.00 |",
        "| A long name |          - |     +1.50 |",
        "",
        "A remark."]


def test_adapted_runs_stand_beside_their_source_run(tmp_path, capsys):
    """Would catch: an adapted run counted as a seed of its source's line, 'before' of another
    language, languages counted as seeds, a language that one seed lacks averaged over silently."""
    folders = []
    for seed, right_after in {1: {"mri_Latn": 1, "hat_Latn": 3}, 2: {"mri_Latn": 2}}.items():
        nothing = {language: [(n, False) for n in range(4)] for language in TARGETS}
        folders.append(write_run(tmp_path, "xpe", seed, nothing))
        for language, count in right_after.items():
            answers = {language: [(n, n < count) for n in range(4)]}
            folders.append(write_run(
                tmp_path, "xpe", seed, answers, name=f"xpe-s{seed}-to-{language}",
                adapted_to=language, adapted_from=f"xpe-s{seed}"))
    run(folders)
    printed = capsys.readouterr()
    expected = "|xpe|two|2|hat_Latn,mri_Latn|0.0±0.0|50.0±0.0|50.0±0.0|"
    assert expected in squeeze(printed.out)
    assert "xpe two: missing although other runs have them: seeds 2 hat_Latn" in printed.err
    assert "although its runs differ" not in printed.err


def test_adapted_runs_of_two_recipes_are_told(tmp_path, capsys):
    """Would catch: a mean over two rates that nobody asked for."""
    folders = [write_run(tmp_path, "xpe", 1, answer(1, 0))]
    for language, rate in (("mri_Latn", 0.1), ("hat_Latn", 0.2)):
        settings = {"rate": rate, "data": language, "source": "0123"}
        folders.append(write_run(
            tmp_path, "xpe", 1, {language: answer(1, 0)[language]}, name=f"to-{language}",
            adapted_to=language, adapted_from="xpe-s1", training={"settings": settings}))
    run(folders)
    error = capsys.readouterr().err
    assert "xpe two: averaged, although its runs differ in rate" in error


# ---- Comparison ----

def slow_squares(table):
    """Sums of squares of a table seeds x sentences: of the seeds' means, and of the rest."""
    overall = mean(mean(of_seed) for of_seed in table)
    seed_means = [mean(of_seed) for of_seed in table]
    sentence_means = [mean(column) for column in zip(*table)]
    of_seeds = sum((seed_mean - overall) ** 2 for seed_mean in seed_means)
    rest = 0
    for seed_mean, of_seed in zip(seed_means, table):
        for sentence_mean, value in zip(sentence_means, of_seed):
            rest += (value - seed_mean - sentence_mean + overall) ** 2
    return of_seeds, rest


def slow_estimate(a, b):
    """Difference and its standard error from tables seeds x sentences, by the textbook."""
    seeds, sentences = len(a), len(a[0])
    differences = [mean(column_a) - mean(column_b)
                   for column_a, column_b in zip(zip(*a), zip(*b))]
    seeds_a, rest_a = slow_squares(a)
    seeds_b, rest_b = slow_squares(b)
    rest = (rest_a + rest_b) / ((seeds - 1) * (sentences - 1))
    of_seeds = max(sentences * (seeds_a + seeds_b) / (seeds - 1), rest)
    of_sentences = max(seeds * stdev(differences) ** 2, rest)
    return mean(differences), ((of_seeds + of_sentences - rest) / (seeds * sentences)) ** 0.5


def answers_of_targets(gain):
    """Seeds x sentences: the share of the three targets in which a sentence is answered rightly."""
    table = []
    for seed in (1, 2, 3):
        right = answer(seed, gain)
        table.append([mean(int(right[language][n][1]) for language in TARGETS) for n in range(40)])
    return table


def test_comparison_against_a_slow_loop(tmp_path, capsys):
    """Would catch: unpaired sentences, languages taken for independent, a wrong error."""
    folders = write_method(tmp_path, "xpe", (1, 2, 3, 9), 0.3)
    folders += write_method(tmp_path, "spt", (1, 2, 3), 0.1)
    lines = run_and_read(folders, tmp_path / "out", "--compare", "xpe", "spt")
    line = next(line for line in lines if line["group"] == "Here")
    a, b = answers_of_targets(0.3), answers_of_targets(0.1)
    overall, error = slow_estimate(a, b)
    estimate = report.estimate_difference(np.array(a), np.array(b))
    assert float(line["A - B"]) == pytest.approx(100 * overall)
    assert estimate[:2] == pytest.approx((overall, error))
    reach = report.t_quantile(estimate[2]) * error
    assert float(line["low"]) == pytest.approx(100 * (overall - reach))
    assert float(line["high"]) == pytest.approx(100 * (overall + reach))
    printed = capsys.readouterr()
    assert "seeds 1, 2, 3 are those that both have; 5 of 5 languages" in printed.err
    assert "3 seeds: how much runs differ by chance is guessed" in squeeze_lines(printed.out)


def test_missing_sentences_shift_no_mean(tmp_path):
    """Would catch: sentences that a language lacks counted as ties."""
    folders = write_method(tmp_path, "xpe", (1, 2), 0.3, without=20)
    folders += write_method(tmp_path, "spt", (1, 2), 0.1, without=20)
    lines = run_and_read(folders, tmp_path / "out", "--compare", "xpe", "spt")
    line = next(line for line in lines if line["group"] == "Here")
    of_languages = [float(line["A - B"]) for line in lines if line["language"] in TARGETS]
    assert float(line["A - B"]) == pytest.approx(mean(of_languages))
    assert float(line["A - B"]) == pytest.approx(float(line["A"]) - float(line["B"]))


def test_students_t():
    """Would catch: a one-sided quantile, a grid too coarse. Quantiles from a printed table."""
    for freedom, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (203, 1.972)):
        assert report.t_quantile(freedom) == pytest.approx(quantile, rel=1e-3)
        assert report.t_test(quantile, 1.0, freedom) == pytest.approx(0.05, rel=1e-2)
    assert report.t_test(-5.5, 1.0, 9) == pytest.approx(0.000381, rel=1e-2)
    assert report.t_test(0.0, 0.0, 9) == 1 and report.t_test(0.5, 0.0, 9) == 0


def test_degrees_of_freedom_are_those_of_what_varies():
    """Would catch: a plain t over seeds where sentences make the differences, or the reverse."""
    draw = np.random.default_rng(0)
    a, b = draw.normal(0, 0.01, (2, 4, 100))
    by_seed = np.array([[-1.0], [-1.0], [1.0], [1.0]])
    by_sentence = draw.normal(0, 1, (1, 100))
    assert report.estimate_difference(a + by_seed, b - by_seed)[2] == pytest.approx(6, abs=0.01)
    assert report.estimate_difference(a + by_sentence, b)[2] == pytest.approx(99, abs=1)
    assert report.estimate_difference(a[:1], b[:1])[2] == 99


def test_holm():
    """Would catch: no running maximum, or the wrong order. By hand."""
    adjusted = report.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_clear_language_is_marked_and_a_source_never(tmp_path, capsys):
    """Would catch: marks that miss a plain effect, a source tested as a target."""
    folders = []
    for seed in range(1, 6):
        right = answer(seed, 0.1)
        folders.append(write_run(tmp_path, "spt", seed, right))
        better = dict(right)
        for language in ("mri_Latn", "eng_Latn"):
            flips = random.Random(seed).sample(range(40), 3)
            better[language] = [(n, n not in flips) for n in range(40)]
        folders.append(write_run(tmp_path, "xpe", seed, better))
    lines = run_and_read(folders, tmp_path / "out", "--compare", "xpe", "spt")
    notes = {line["language"]: line["note"] for line in lines if line["language"]}
    assert notes == {"mri_Latn": "significant", "hat_Latn": "", "ltz_Latn": "",
                     "eng_Latn": "source", "zho_Hans": "source"}
    assert "1 won, 0 lost; significant" in squeeze_lines(capsys.readouterr().out)


def test_one_seed_compares_two_runs(tmp_path, capsys):
    """Would catch: one run of each sold as a comparison of methods."""
    folders = write_method(tmp_path, "xpe", [1], 0.6) + write_method(tmp_path, "spt", [1], 0.0)
    lines = run_and_read(folders, tmp_path / "out", "--compare", "xpe", "spt")
    printed = capsys.readouterr().out
    assert "with one seed none is tested" in printed
    assert "this compares two runs, not two methods" in printed
    assert "significant" not in [line["note"] for line in lines]


def test_equal_methods_are_seldom_called_different():
    """Would catch: an interval that forgets the seeds. All rates: tests/false_alarms.py."""
    rates = false_alarms.interval_rates(3, 150, np.random.default_rng(0))
    assert rates["report"] < 9 and rates["fixed"] > 20


# ---- What is missing or wrong is said ----

def test_missing_seeds_languages_and_scores_are_said(tmp_path, capsys):
    """Would catch: a missing seed, language or score passed over."""
    part = answer(2, 0.1)
    del part["hat_Latn"]
    folders = [write_run(tmp_path, "spt", 1, answer(1, 0.1)), write_run(tmp_path, "spt", 2, part),
               write_run(tmp_path, "xpe", 1, answer(1, 0.1))]
    unscored = write_run(tmp_path, "xpe", 2, answer(1, 0.1), name="xpe s2")
    (unscored / "test_predictions.csv").unlink()
    run([*folders, unscored])
    said = capsys.readouterr().err
    assert "xpe two: missing although other runs have them: seeds 2" in said
    assert "spt-s2: Here: 1 of 3 languages not scored: hat_Latn" in said
    assert "left out, no test_predictions.csv" in said
    assert f"evaluate.py '{unscored}' scores it" in said


def test_targets_that_no_run_has_are_said(tmp_path, capsys):
    """Would catch: a group that promises more languages than the corpus has, or a group of none."""
    run([write_run(tmp_path, "spt", 1, {"eng_Latn": [(0, True)], "ltz_Latn": [(0, True)]})])
    table, said = capsys.readouterr()
    assert "Here: 2 of 3 languages are scored in no run: mri_Latn, hat_Latn" in said
    assert "One: 1 of 1 languages are scored in no run: mri_Latn" in said
    assert "100.0 (1 of 3)" in table and "100.0 (1 of 1)" not in table


def test_sources_that_shrink_a_group_are_said_once(tmp_path, capsys):
    """Would catch: a column whose title promises more languages than its figure has."""
    right = {language: [(0, True)] for language in TARGETS}
    run([write_run(tmp_path, "xpe", seed, right, sources=TARGETS[1:]) for seed in (1, 2)])
    line = "trained on hat_Latn+ltz_Latn: a source is no target, so there remain of Here 1 of 3\n"
    assert capsys.readouterr().err.count(line) == 1


def test_arguments_that_are_no_runs_are_skipped(tmp_path, capsys):
    """Would catch: a report lost to one empty, unfinished or unfit argument of a glob."""
    run_folder = write_run(tmp_path, "spt", 1, answer(1, 0.1))
    for name in ("empty", "unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "unfinished" / "pass.json").write_text("{}")
    (tmp_path / "file.txt").write_text("")
    names = ("empty", "unfinished", "file.txt", "nothing-*", "absent")
    run([run_folder, run_folder, *(tmp_path / name for name in names)])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(names)
    assert "empty: left out, holds no prompt.json" in said[3]
    assert "unfinished: left out, its training has not come to an end" in said[4]
    assert "file.txt: left out, a file" in said[0]
    assert "nothing-*: left out, no folder matches this pattern" in said[1]
    assert "absent: left out, no such folder" in said[2]


def prompt_json(**changes):
    """A prompt.json that is whole but for these changes, as text."""
    meta = {"kind": "spt", "seed": 1, "sources": [], "backbone": {"name": "x"}}
    return json.dumps({**meta, **changes})


@pytest.mark.parametrize("text, reason", [
    ("{}", "prompt.json lacks kind, seed, sources, backbone"),
    ('{"kind": "spt", "seed": 1e999, "sources": [], "backbone": {}}', "seed cannot be inf"),
    ('{"kind": "spt", "seed": 1, "sources": [], "backbone": {}}', "the backbone has no name"),
    ('{"kind": "new", "seed": 1, "sources": [], "backbone": {}}', "kind 'new' is not one of"),
    (prompt_json(kind="dual"), "its prompt cannot be named"),
    (prompt_json(kind="dual", prompt={"encoder": "mlp", "ratio": math.inf}), "cannot be named"),
    (prompt_json(kind="dual", prompt={"encoder": "mlp", "ratio": math.nan}), "cannot be named"),
    (prompt_json(adapted_to=["x"]), "adapted_to cannot be ['x']"),
    (prompt_json(adapted_from=1), "adapted_from cannot be 1"),
    (prompt_json(backbone={"name": "x", "fingerprint": [1]}), "fingerprint cannot be [1]"),
    ("[]", "holds no JSON object"),
])
def test_a_damaged_prompt_json_costs_one_run(tmp_path, capsys, text, reason):
    """Would catch: a whole report lost to one file, or a line that does not say what is missing."""
    folders = write_method(tmp_path, "spt", (1, 2), 0.1)
    (folders[1] / "prompt.json").write_text(text)
    run(folders)
    printed = capsys.readouterr()
    assert f"{folders[1]}: left out, " in printed.err and reason in printed.err
    assert "|spt|two|1|1,234|" in squeeze(printed.out)


def test_scores_that_do_not_fit_are_left_out(tmp_path, capsys):
    """Would catch: a table of other predictions, a sentence counted twice."""
    folders = write_method(tmp_path, "spt", (1, 2, 3), 0.1)
    table = folders[1] / "test.csv"
    table.write_text(table.read_text().replace("mri_Latn,40,", "mri_Latn,40,1"))
    predictions = folders[2] / "test_predictions.csv"
    predictions.write_text(predictions.read_text() + "mri_Latn,0,a,a\n")
    run(folders)
    said = capsys.readouterr().err
    assert "spt-s2: left out, test.csv disagrees with the predictions" in said
    assert "spt-s3: left out, test_predictions.csv: a sentence occurs twice in mri_Latn" in said
    for damage in (b"\xff\xfel\0", b"language\n" + b"x" * 200_000):
        table.write_bytes(damage)
        run(folders)
        assert "spt-s2: left out, test.csv is not as evaluate.py" in capsys.readouterr().err


def test_settings_of_training_that_are_no_settings(tmp_path, capsys):
    """Would catch: a traceback for one damaged run."""
    run([write_run(tmp_path, "spt", 1, answer(1, 0), training={"settings": "abc"})])
    assert "|spt|two|1|-|" in squeeze(capsys.readouterr().out)


def test_other_targets_in_another_run_are_said(tmp_path, capsys):
    """Would catch: columns of one run over the scores of all; an unscored run that decides."""
    folders = write_method(tmp_path, "spt", (1, 2, 3), 0.1)
    (folders[2] / "config.yaml").write_text("targets: {Mine: others}\n")
    run(folders)
    printed = capsys.readouterr()
    assert f"{folders[2]}: config.yaml has other targets there; the columns are" in printed.err
    assert "|Here|" in squeeze(printed.out)
    for file in folders[2].glob("test*"):
        file.unlink()
    run([folders[2], *folders[:2]])
    printed = capsys.readouterr()
    assert "|Here|" in squeeze(printed.out) and "other targets" not in printed.err


def test_a_missing_config_is_said(tmp_path, capsys):
    """Would catch: a run's own groups gone in silence."""
    folders = write_method(tmp_path, "spt", (1, 2), 0.1)
    (folders[0] / "config.yaml").unlink()
    run(folders)
    printed = capsys.readouterr()
    assert f"{folders[0]}: config.yaml is missing" in printed.err
    assert f"those of {folders[1] / 'config.yaml'}" in printed.err
    assert "|Sources|Here|One|" in squeeze(printed.out)


def test_a_backbone_is_its_weights(tmp_path, capsys):
    """Would catch: two backbones of one folder name compared, one of two names refused."""
    right = answer(1, 0.1)
    ours = write_run(tmp_path, "spt", 1, right)
    moved = write_run(tmp_path, "spt", 2, right, backbone={"name": "b/c", "fingerprint": "0123"})
    other = write_run(tmp_path, "spt", 3, right, backbone={"name": "tiny", "fingerprint": "4567"})
    unknown = write_run(tmp_path, "spt", 4, right, backbone={"name": "b/tiny"})
    strange = write_run(tmp_path, "spt", 5, right, backbone={"name": "b/d"})
    run([ours, moved])
    run([ours, unknown])
    assert "spt-s4: without a fingerprint of the backbone" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"several backbones, tiny \(0123\), tiny \(4567\)"):
        run([ours, other])
    with pytest.raises(ValueError, match="several backbones, d, tiny"):
        run([ours, strange])


def test_both_formats_are_read_alike(tmp_path, capsys):
    """Would catch: folders of the version before left out, or in a line of their own."""
    run([write_run(tmp_path, "xpe", 1, answer(1, 0.1)),
         write_run(tmp_path, "xpe", 2, answer(2, 0.1), format=1)])
    printed = capsys.readouterr()
    assert "|xpe|two|2|1,234|" in squeeze(printed.out) and printed.err == ""


def test_leaving_out_a_language(tmp_path):
    """Would catch: a language left out of the means and not of the comparison."""
    folders = write_method(tmp_path, "xpe", (1, 2), 0.3)
    folders += write_method(tmp_path, "spt", (1, 2), 0.1)
    options = ("--compare", "xpe", "spt", "--leave-out", "mri_Latn")
    lines = run_and_read(folders, tmp_path / "out", *options)
    assert "mri_Latn" not in [line["language"] for line in lines]
    assert [line["languages"] for line in lines if line["group"] == "Here"] == ["2"]
    assert ("left out of all figures but the published ones: mri_Latn"
            in (tmp_path / "out" / "report.md").read_text())


def test_sources_of_one_method_alone_are_called_so(tmp_path):
    """Would catch: a mean over languages that are zero-shot for one of the two, called Sources."""
    folders = [write_run(tmp_path, "xpe", 1, answer(1, 0.3), sources=SOURCES[:1]),
               write_run(tmp_path, "spt", 1, answer(1, 0.1))]
    lines = run_and_read(folders, tmp_path / "out", "--compare", "xpe", "spt")
    groups = [line["group"] for line in lines if line["group"]]
    assert groups == ["Sources of either", "Here", "One"]


def test_sources_alone_have_no_verdict(tmp_path, capsys):
    """Would catch: "with one seed none is tested" of three seeds, where no target was scored."""
    folders = []
    for method in ("xpe", "spt"):
        for seed in (1, 2, 3):
            right = {code: answer(seed, 0.1)[code] for code in SOURCES}
            folders.append(write_run(tmp_path, method, seed, right))
    run(folders, "--compare", "xpe", "spt")
    printed = capsys.readouterr().out
    assert "No target language is scored in both." in printed and "one seed" not in printed


def refused(arguments, message):
    """The command ends in a ValueError with this message."""
    with pytest.raises(ValueError, match=message):
        run(arguments)


def test_refusals_name_what_was_given(tmp_path):
    """Would catch: a refusal that leaves the reader guessing."""
    xpe = write_run(tmp_path, "xpe", 1, answer(1, 0))
    spt = write_run(tmp_path, "spt", 1, answer(1, 0))
    again = write_run(tmp_path / "again", "spt", 1, answer(1, 0))
    other_sentences = write_run(tmp_path / "other", "spt", 2, {"mri_Latn": [(7, True)]})
    other_seed = write_run(tmp_path / "seed", "spt", 5, answer(5, 0))
    unscored = write_run(tmp_path / "unscored", "spt", 1, answer(1, 0))
    (unscored / "test.csv").unlink()
    compare = ["--compare", "xpe", "spt"]
    refused([unscored], "none of these is a scored run; .*no test.csv")
    refused([spt, other_sentences], "other sentences or labels in mri_Latn")
    refused([spt, again], "spt two: the same seed occurs twice in spt-s1, spt-s1")
    refused([spt, "--leave-out", "hat_Lat"], "did you mean hat_Latn")
    refused([xpe, spt, "--compare", "xpe", "spd"], "spd: must be one of spt-two, xpe-two")
    refused([xpe, spt, "--compare", "xpe", "xpe"], "name two different methods")
    refused([xpe, spt, "--compare", "xpe", "xpe-two"], "name two different methods")
    refused([xpe, other_seed, *compare], "no seed and language in common")
    refused([spt, "--plot", "gain.png"], "--plot needs --compare")
    refused([xpe, spt, *compare, "--plot", "gain"], "must end in .png, .pdf, .svg")


def test_matplotlib_is_asked_for_before_any_work(tmp_path, monkeypatch):
    """Would catch: minutes of reading before 'No module named matplotlib'."""
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        run([tmp_path / "absent"], "--compare", "xpe", "spt", "--plot", tmp_path / "gain.png")


def test_arrows_go_one_way():
    """Would catch: an import of train.py, a circle with evaluate.py, matplotlib for a table."""
    code = "import report, sys; print(*{'train', 'matplotlib', 'transformers'} & {*sys.modules})"
    process = subprocess.run([sys.executable, "-c", code], cwd=report.HERE, capture_output=True,
                             text=True, check=True)
    assert process.stdout.split() == []
    assert "import report" not in (report.HERE / "evaluate.py").read_text()


# ---- Pictures ----

def test_pictures(tmp_path):
    """Would catch: a picture that cannot be drawn, or is too large for a paper."""
    pytest.importorskip("matplotlib")
    folders = write_method(tmp_path, "xpe", (1, 2), 0.3)
    folders += write_method(tmp_path, "spt", (1, 2), 0.1)
    run(folders, "--compare", "xpe", "spt", "--plot", tmp_path / "gain.png")
    overview = tmp_path / "gain.png"
    assert overview.read_bytes().startswith(b"\x89PNG") and overview.stat().st_size < 200_000
    assert (tmp_path / "gain-languages.png").is_file()


def make_comparison(languages, config):
    """A comparison of invented gains, some of them significant."""
    draw = np.random.default_rng(0)
    lines = []
    for number, language in enumerate(languages):
        gain = float(draw.normal(0, 4))
        note = "significant" if number % 20 == 0 else ""
        lines.append({"language": language, "A - B": gain, "low": gain - 2, "high": gain + 2,
                      "p": 0.5, "note": note})
    lines.sort(key=lambda line: -line["A - B"])
    groups = []
    for title, codes in config["targets"].items():
        group = {"group": title, "languages": len(codes)}
        groups.append({**group, "A - B": 1.0, "low": -1.0, "high": 3.0})
    return report.Comparison(["xpe", "spt"], 10, {"eng_Latn"}, groups, lines)


def test_205_languages_fit_into_a_picture(tmp_path):
    """Would catch: names that vanish, dots beyond the axis, axes that differ, no zero."""
    pytest.importorskip("matplotlib")
    config = report.read_config()
    report.write_targets_out(config, [])
    facts = report.read_language_facts()
    comparison = make_comparison(list(facts), config)
    assigned = report.assign_groups(facts, comparison.sources, config)
    assert assigned["kab_Latn"] == "Low-performing" and assigned["ceb_Latn"] == "Unseen"
    assert assigned["eng_Latn"] == "Sources" and assigned["tha_Thai"] == "Seen w/o Joshi5"

    names = []
    figure = report.draw_languages(comparison, assigned, config, facts)
    for axes in figure.axes:
        names += [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == len(facts) == 205 and "Kabyle kab_Latn" in names

    overview = report.draw_overview(comparison, assigned, config, facts)
    limits = {axes.get_xlim() for axes in overview.axes}
    assert len(limits) == 1
    low, high = limits.pop()
    gains = [line["A - B"] for line in comparison.languages]
    assert low < min(gains) and high > max(gains) and low < 0 < high
    report.save_figure(overview, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").stat().st_size < 200_000


def test_rare_families_share_a_strip():
    """Would catch: a language dropped from the strips, strips in no order."""
    values = list(itertools.chain(*([chr(97 + n)] * (n + 1) for n in range(12))))
    lines = [{"A - B": float(ord(value))} for value in values]
    strips = report.split_into_strips(values, lines)
    assert len(strips) == report.MAX_STRIPS
    assert [label for label, _ in strips][:2] == ["l (12)", "k (11)"]
    assert strips[-1][0] == "5 others (15)"
    assert sum(len(part) for _, part in strips) == len(lines)


# ---- The results that the README quotes ----

RESULTS = report.HERE / "sample" / "results"
OF_SIB200 = 204                         # test sentences of a language; the results have a part


def read_table(path):
    """The lines of a csv file as dicts."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def resolved_targets(folder):
    """{title: languages} of the columns of a report in sample/results."""
    config = report.read_config()
    titles = {title: report.resolve_group(config, names)
              for title, names in config["targets"].items()}
    columns = read_table(folder / "report.csv")[0]
    return {title: codes for title, codes in titles.items() if title in columns}


def groups_of(line, titles, config):
    """The target groups without the sources of this line, and the sources."""
    sources = report.resolve_group(config, line["source"])
    groups = {title: [code for code in codes if code not in sources]
              for title, codes in titles.items()}
    return {"Sources": sources, **groups}


def measured_lines(folder):
    """The lines of a report that are means over runs of ours, not published."""
    return [line for line in read_table(folder / "report.csv")
            if line["method"] and "e5" in line["table"]]


@pytest.mark.parametrize("name", ["joshi5", "sources"])
def test_the_shipped_tables_follow_from_the_shipped_scores(name):
    """Would catch: a mean or deviation that the runs' own test.csv do not give."""
    folder = RESULTS / name
    config = report.read_config()
    titles = resolved_targets(folder)
    lines = measured_lines(folder)
    assert len(lines) == {"joshi5": 6, "sources": 4}[name]
    for line in lines:
        scores = []
        for path in sorted(folder.glob(f"{line['method']}-{line['source']}-s*/test.csv")):
            scores.append({row["language"]: float(row["accuracy"]) for row in read_table(path)})
        assert len(scores) == int(line["seeds"])
        for title, codes in groups_of(line, titles, config).items():
            if line[title] in ("", "nan"):
                continue
            means = [mean(of_run[code] for code in codes if code in of_run) for of_run in scores]
            assert float(line[title]) == pytest.approx(mean(means), abs=1e-3)
            assert float(line[f"{title} std"]) == pytest.approx(stdev(means), abs=1e-3)


def seeds_of(method, runs, source):
    """The seeds of a method, from the folders of its runs."""
    folders = (RESULTS / runs).glob(f"{method}-{source}-s*")
    return {int(folder.name.rpartition("-s")[2]) for folder in folders}


def read_right(folders, languages):
    """Run folders -> ({language: hits (S, I)}, {language: numbers of the sentences}).

    right.csv holds a 1 for each right answer, of every second or every sixth sentence.
    """
    hits = {code: [] for code in languages}
    for folder in folders:
        for line in read_table(folder / "right.csv"):
            if line["language"] in hits:
                hits[line["language"]].append([int(digit) for digit in line["right"]])
    hits = {code: np.array(rows, dtype=float) for code, rows in hits.items()}
    ids = {}
    for code, rows in hits.items():
        step = OF_SIB200 // rows.shape[1]
        ids[code] = [f"{number:03}" for number in range(0, OF_SIB200, step)]
    return hits, ids


def interval_of(a, b, runs, source, codes, seeds=None):
    """{"A - B", "low", "high"} of two methods' means over languages, from the shipped answers."""
    seeds = seeds or sorted(seeds_of(a, runs, source) & seeds_of(b, runs, source))
    means = []
    for method in (a, b):
        folders = [RESULTS / runs / f"{method}-{source}-s{seed}" for seed in seeds]
        means.append(report.average_languages(*read_right(folders, codes), codes))
    return report.interval(*report.estimate_difference(*means))


COMPARISONS = [     # folder of the report, of the runs, their sources, methods
    ("joshi5", "joshi5", "joshi5", "xpe", "spt"),
    ("joshi5/head", "joshi5", "joshi5", "xpe", "head"),
    ("joshi5/full", "joshi5", "joshi5", "xpe", "full"),
    ("sources/enarzho", "sources", "enarzho", "xpe", "spt"),
    ("sources/seen", "sources", "seen", "xpe", "spt"),
]


@pytest.mark.parametrize("folder, runs, source, a, b", COMPARISONS)
def test_the_shipped_intervals_follow_from_the_shipped_answers(folder, runs, source, a, b):
    """Would catch: an interval that cannot be had again from what is in the repository."""
    titles = resolved_targets(RESULTS / folder)
    lines = [line for line in read_table(RESULTS / folder / "report.csv") if line["group"]]
    groups = groups_of({"source": source}, titles, report.read_config())
    assert [line["group"] for line in lines] == [title for title in groups if title != "Sources"
                                                 or runs == "joshi5"]
    seeds = seeds_of(a, runs, source) & seeds_of(b, runs, source)
    assert len(seeds) == {"joshi5": 10, "joshi5/full": 3}.get(folder, 5)
    for line in lines:
        expected = interval_of(a, b, runs, source, groups[line["group"]])
        for key, value in expected.items():
            assert float(line[key]) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("a", ["dual30", "dual70"])
@pytest.mark.parametrize("b", ["spt", "xpe"])
def test_neither_dual_is_told_from_others(a, b):
    """Would catch: that sentence of the README after results that say otherwise."""
    titles = resolved_targets(RESULTS / "joshi5")
    for codes in groups_of({"source": "joshi5"}, titles, report.read_config()).values():
        found = interval_of(a, b, "joshi5", "joshi5", codes)
        assert found["low"] < 0 < found["high"]


def test_the_readme_quotes_the_results():
    """Would catch: a figure in the README that is no longer that of the results."""
    readme = (report.HERE / "README.md").read_text(encoding="utf-8")
    readme = " ".join(readme.replace("*", "").split())
    for line in measured_lines(RESULTS / "joshi5"):
        for title in ("Sources", "Low-performing", "Unseen", "Seen w/o Joshi5"):
            quoted = f"{float(line[title]):.1f} ± {float(line[f'{title} std']):.1f}"
            assert quoted in readme, (line["method"], title)
    means = {}
    for line in measured_lines(RESULTS / "sources") + measured_lines(RESULTS / "joshi5"):
        means[line["method"], line["source"]] = f"{float(line['Low-performing']):.1f}"
    spt = ", ".join(means["spt", source] for source in ("enarzho", "joshi5", "seen"))
    xpe = ", ".join(means["xpe", source] for source in ("enarzho", "joshi5", "seen"))
    assert f"SPT has {spt} and XPE {xpe};" in readme
    for folder, *_ in COMPARISONS:
        for line in read_table(RESULTS / folder / "report.csv"):
            quoted = ["Low-performing"]
            if folder == "joshi5":
                quoted += ["Unseen", "Seen w/o Joshi5"]
            if line["group"] in quoted:
                low, high = float(line["low"]), float(line["high"])
                assert f"{float(line['A - B']):+.1f} ({low:+.1f} to {high:+.1f})" in readme


def mean_accuracies(method):
    """sample/results/joshi5 -> {language: accuracy, mean over seeds}."""
    scores = {}
    for path in (RESULTS / "joshi5").glob(f"{method}-joshi5-s*/test.csv"):
        for line in read_table(path):
            scores.setdefault(line["language"], []).append(float(line["accuracy"]))
    return {code: mean(values) for code, values in scores.items()}


def test_the_readme_counts_languages_rightly():
    """Would catch: "better in 36 languages" after other results; gains where there is no signal."""
    readme = " ".join((report.HERE / "README.md").read_text(encoding="utf-8").split())
    codes = resolved_targets(RESULTS / "joshi5")["Low-performing"]
    xpe, spt = mean_accuracies("xpe"), mean_accuracies("spt")
    gains = {code: round(xpe[code] - spt[code], 4) for code in codes}
    won = sum(gain > 0 for gain in gains.values())
    lost = sum(gain < 0 for gain in gains.values())
    assert f"better in {won} languages, worse in {lost}" in readme
    assert f"{won} gain, by up to {max(gains.values()):.1f} points" in readme
    guessing = sum(gain for code, gain in gains.items() if xpe[code] < 30)
    assert 0.25 < guessing / sum(gains.values()) < 0.33         # "more than a quarter"
    seeds = range(11, 16)
    first = interval_of("xpe", "spt", "joshi5", "joshi5", codes, seeds)
    quoted = f"{first['A - B']:+.1f} ({first['low']:+.1f} to {first['high']:+.1f})"
    assert f"first five seeds alone gave {quoted}" in readme


def test_the_readme_quotes_the_adaptation():
    """Would catch: a figure "before" or "after" that adapted.csv does not give."""
    readme = " ".join((report.HERE / "README.md").read_text(encoding="utf-8").split())
    lines = read_table(RESULTS / "adapted.csv")
    for method, name in (("spt", "SPT"), ("xpe", "XPE")):
        quoted = []
        for column in ("before", "after"):
            of_seed = []
            for seed in ("11", "12", "13"):
                values = [float(line[column]) for line in lines
                          if line["method"] == method and line["seed"] == seed]
                assert len(values) == 24
                of_seed.append(mean(values))
            quoted.append(f"{mean(of_seed):.1f} ± {stdev(of_seed):.1f}")
        assert f"{name} from {' to '.join(quoted)}" in readme
        kanuri = [float(line["after"]) - float(line["before"]) for line in lines
                  if line["method"] == method and line["language"] == "knc_Arab"]
        assert f"{mean(kanuri):.0f} with {name}" in readme.replace(" points with", " with")
