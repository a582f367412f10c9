"""Tests of report.py: each is a second, slow, obvious computation of what the report prints."""
import argparse
import csv
import itertools
import json
import random
from statistics import mean, stdev

import numpy as np
import pytest
import report

SOURCES, TARGETS = ["eng_Latn", "zho_Hans"], ["mri_Latn", "hat_Latn", "ltz_Latn"]
CONFIG = f"groups: {{here: {TARGETS}, enarzho: {SOURCES}}}\ntargets: {{Here: here, One: [mri_Latn]}}\n"


def write_run(root, method, seed, right, **more):
    """A scored run folder; right: {language: [(index_id, 1 if predicted right)]}."""
    (folder := root / f"{method}-s{seed}{'-to-' + more['adapted_to'] if more else ''}").mkdir(parents=True)
    meta = {"kind": method, "seed": seed, "sources": SOURCES, "backbone": {"name": "tiny"}, **more}
    (folder / "prompt.json").write_text(json.dumps(meta))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "test_predictions.csv").write_text("language,index_id,label,predicted\n" + "".join(
        f"{c},{i},{'ab'[i % 2]},{'ab'[(i + 1 - ok) % 2]}\n" for c, x in right.items() for i, ok in x))
    (folder / "test.csv").write_text("language,n,accuracy\n" + "".join(
        f"{c},{len(x)},{100 * sum(ok for _, ok in x) / len(x):.4f}\n" for c, x in right.items()))
    return folder


def planted(seed, gain, lacking=0):
    """Random answers to 40 sentences in five languages; the targets are right more often by `gain`."""
    rng = random.Random(f"{seed} {gain}")
    return {c: [(i, int(rng.random() < 0.4 + gain * (c in TARGETS)))
                for i in range(lacking * (c == "hat_Latn"), 40)] for c in SOURCES + TARGETS}


def run(runs, out=None, compare=None, leave_out="", plot=None):
    report.main(argparse.Namespace(split="test", **locals()))
    return out and list(csv.DictReader((out / "report.csv").read_text().splitlines()))


def test_table_is_mean_and_sample_deviation_over_seeds(tmp_path, capsys):
    """Would catch: averaging over sentences first, n instead of n - 1, a source counted as a target."""
    data = {s: planted(s, 0.2, lacking=25) for s in (1, 2, 3)}
    row = run([write_run(tmp_path, "spt", s, d) for s, d in data.items()], out=tmp_path / "out")[0]
    means = [100 * mean(mean(ok for _, ok in d[c]) for c in TARGETS) for d in data.values()]
    assert (float(row["Here"]), float(row["Here std"])) == pytest.approx((mean(means), stdev(means)))
    assert f"{mean(means):.1f} ± {stdev(means):.1f}" in capsys.readouterr().out


def test_baselines_give_the_papers_24_means():
    """Would catch: a wrong column or group, nqo_Nkoo averaged in, a figure changed while copying."""
    rows = report.baseline_rows(report.load_config(), report.read_csv(report.HERE / "baselines.csv"))
    assert [round(v, 1) for row in rows for v in list(row.values())[1:]] == [
        48.6, 66.4, 87.8, 75.6, 33.7, 54.2, 86.2, 68.0, 33.5, 55.0, 86.5, 68.5,
        33.4, 54.6, 86.5, 68.3, 23.3, 35.7, 55.7, 44.3, 23.3, 39.2, 68.1, 51.7]


def test_comparison_against_a_slow_loop(tmp_path, capsys):
    """Would catch: unpaired seeds or sentences, languages resampled apart, lacking sentences as ties."""
    a, b = ({s: planted(s, gain, lacking=20) for s in (1, 2)} for gain in (0.3, 0.1))
    given = (("xpe", a | {9: planted(9, 0.3, 20)}), ("spt", b))
    folders = [write_run(tmp_path, m, s, answers) for m, x in given for s, answers in x.items()]
    row = next(r for r in run(folders, tmp_path / "out", compare=("xpe", "spt")) if r["group"] == "Here")
    d = {s: [{i: x - y for (i, x), (_, y) in zip(a[s][c], b[s][c])} for c in TARGETS] for s in (1, 2)}

    def difference(ids, seeds):
        return 100 * np.mean([np.mean([x[i] for i in ids if i in x]) for s in seeds for x in d[s]])
    draw = random.Random(0).choices
    slow = sorted(difference(draw(range(40), k=40), draw((1, 2), k=2)) for _ in range(4000))
    assert float(row["A - B"]) == pytest.approx(difference(range(40), (1, 2)), abs=0.006)
    assert [float(row["low"]), float(row["high"])] == pytest.approx([slow[100], slow[3899]], abs=1.5)
    assert "only 2 seeds and 5 of 5 languages" in capsys.readouterr().err


def test_sign_flips_and_holm():
    """Would catch: a one-sided p, ties not counted, Holm without its running maximum or in wrong order."""
    for k in ([2, -1, 3, 0, 1, 1, -2, 3], [1] * 8 + [-1] * 2, [0, 0]):
        flips = [abs(np.dot(signs, k)) >= abs(sum(k)) for signs in itertools.product((1, -1), repeat=len(k))]
        assert report.sign_flips(np.array(k)) == pytest.approx(mean(map(int, flips)))
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])       # by hand


def test_adapted_runs_stand_beside_their_source_run(tmp_path, capsys):
    """Would catch: an adapted run counted as a seed of its source's row, 'before' of another language."""
    run([write_run(tmp_path, "xpe", 1, {"mri_Latn": [(0, 1), (1, 0), (2, 0), (3, 0)]}),
         write_run(tmp_path, "xpe", 1, {"mri_Latn": [(0, 1), (1, 1), (2, 1), (3, 0)]},
                   adapted_to="mri_Latn", adapted_from="xpe-s1")])
    assert "|xpe|enarzho|1|mri_Latn|25.0|75.0|50.0|" in capsys.readouterr().out.replace(" ", "")


def test_adapted_runs_are_averaged_by_seed_and_what_lacks_is_said(tmp_path, capsys):
    """Would catch: languages counted as seeds, a language that one seed lacks averaged over silently."""
    right = {1: {"mri_Latn": 1, "hat_Latn": 3}, 2: {"mri_Latn": 2}}
    folders = [write_run(tmp_path, "xpe", s, {c: [(i, 0) for i in range(4)] for c in TARGETS}) for s in right]
    folders += [write_run(tmp_path, "xpe", s, {c: [(i, int(i < n)) for i in range(4)]}, adapted_to=c,
                          adapted_from=f"xpe-s{s}") for s, x in right.items() for c, n in x.items()]
    run(folders)
    said = capsys.readouterr()
    assert "|xpe|enarzho|2|hat_Latnmri_Latn|0.0±0.0|50.0±0.0|50.0±0.0|" in said.out.replace(" ", "")
    assert "xpe enarzho: missing although other runs have them: seeds 2 hat_Latn" in said.err


def test_sources_that_shrink_a_group_are_said_once(tmp_path, capsys):
    """Would catch: a column whose title promises more languages than its figure has."""
    data = {c: [(0, 1)] for c in TARGETS}
    folders = [write_run(tmp_path, "xpe", s, data) for s in (1, 2)]
    for folder in folders:
        text = (folder / "prompt.json").read_text().replace(json.dumps(SOURCES), json.dumps(TARGETS[1:]))
        (folder / "prompt.json").write_text(text)
    run(folders)
    line = "xpe hat_Latn+ltz_Latn: languages left without its own sources: Here 1 of 3\n"
    assert capsys.readouterr().err.count(line) == 1


def test_what_is_missing_is_said(tmp_path, capsys):
    """Would catch: a missing seed, language or score passed over; scores that do not fit together."""
    full, part = planted(1, 0.1), {c: x for c, x in planted(2, 0.1).items() if c != "hat_Latn"}
    folders = [write_run(tmp_path, *x) for x in (("spt", 1, full), ("spt", 2, part), ("xpe", 1, full))]
    unscored = write_run(tmp_path, "xpe", 2, full)
    (unscored / "test_predictions.csv").unlink()
    run([*folders, unscored])
    said = capsys.readouterr().err
    assert "xpe enarzho: missing although other runs have them: seeds 2" in said
    assert "spt-s2: Here: 1 of 3 languages" in said and "xpe-s2: left out, no test_predictions.csv" in said
    other = write_run(tmp_path / "b", "spt", 1, {"mri_Latn": [(7, 1)]})
    table = (broken := write_run(tmp_path / "c", "spt", 3, full)) / "test.csv"
    table.write_text(table.read_text().replace("mri_Latn,40,", "mri_Latn,40,1"))
    ((damaged := write_run(tmp_path / "d", "spt", 4, full)) / "prompt.json").write_text('{"kind": "spt"}')
    endless = write_run(tmp_path / "f", "spt", 4, full) / "prompt.json"
    endless.write_text(endless.read_text().replace('"seed": 4', '"seed": 1e999'))
    for message, runs, more in (
            ("none of these runs is scored", [unscored], {}), ("needs --compare", folders, {"plot": "x.png"}),
            ("mean hat_Latn", folders, {"leave_out": "hat_Lat"}), ("test.csv: disagrees", [broken], {}),
            ("other sentences", [folders[2], other], {}), ("not as evaluate", [damaged], {}),
            ("not as evaluate.*the seed inf", [endless.parent], {}),
            ("stands twice", [folders[0], write_run(tmp_path / "e", "spt", 1, full)], {}),
            ("one of spt-", folders, {"compare": "ab"})):
        with pytest.raises(ValueError, match=message):
            run(runs, **more)
