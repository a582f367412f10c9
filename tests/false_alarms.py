"""How often does report.py call one of two equal methods better? A simulation.

    python tests/false_alarms.py [--cases 1000]

Two methods of equal quality are "trained" with S seeds and "scored" on 46 low-performing languages
with 204 parallel sentences. A run differs from other runs of its method in all languages together,
in each language and in each sentence, so much that A - B has a standard deviation over seeds of
about 1.4 points on the mean of the 46 (XPE - SPT in the authors' re-runs: 1.3). Each line is the
share of cases, in percent, in which

    interval    the 95 % interval of the mean over the 46 languages excludes zero (5 is right)
    marked      some language is called significant, by Holm over the 46 (at most 5 is right)

report: as report.py does it. bootstrap: 1,000 resamples of seeds and of sentences. fixed: the
seeds are held fixed, as in McNemar's test or a bootstrap over sentences alone.

With 1,000 cases (standard error of a 5: 0.7), minutes on one core:

                 interval excludes zero      a language marked     A - B over seeds
    seeds     report  bootstrap    fixed        report    fixed           deviation
        1       36.6       36.7     36.6           0.0     79.6                   -
        3        3.9        8.2     32.9           0.0     79.7                1.41
        5        6.6        7.4     35.2           1.1     80.1                1.38
       10        5.0        3.2     33.2           3.7     80.2                1.40

With 2,000 other cases the first column is 4.4, 4.7 and 4.1 for 3, 5 and 10 seeds. One seed cannot
say how much runs differ: its line is why the report then speaks of two runs and marks nothing.
"""
import argparse
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report

LANGUAGES, SENTENCES = 46, 204
SEEDS = (1, 3, 5, 10)
# A sentence is answered rightly if a sum of normal effects with variance 1 exceeds a threshold;
# here 0.027 of such an effect is one point of accuracy. Deviations of the effects:
SENTENCE = 0.6                      # a sentence is hard in all languages, for all runs
SENTENCE_IN_LANGUAGE = 0.5          # its translation is good or bad, for all runs
RUN = 0.02                          # a run is good or bad in all languages: 0.7 points
RUN_IN_LANGUAGE = 0.08              # in one language: 3 points, as between seeds of XLM-R-large
RUN_IN_SENTENCE = 0.1               # in one sentence
DRAWS = 1_000                       # of the bootstrap


def simulate(seeds, random):
    """Hits of two equal methods A and B: (2, languages, S, I), each 0 or 1."""
    base = random.normal(0.37, 0.07, LANGUAGES).clip(0.26, 0.55)        # accuracies
    threshold = np.array([-NormalDist().inv_cdf(accuracy) for accuracy in base])
    effects = np.zeros((2, seeds, LANGUAGES, SENTENCES))
    rest = 1.0
    for deviation, shape in (
            (SENTENCE, (1, 1, 1, SENTENCES)),
            (SENTENCE_IN_LANGUAGE, (1, 1, LANGUAGES, SENTENCES)),
            (RUN, (2, seeds, 1, 1)),
            (RUN_IN_LANGUAGE, (2, seeds, LANGUAGES, 1)),
            (RUN_IN_SENTENCE, (2, seeds, 1, SENTENCES))):
        effects += random.normal(0, deviation, shape)
        rest -= deviation ** 2
    effects += np.sqrt(rest) * random.standard_normal(effects.shape, dtype=np.float32)
    hits = (effects > threshold[:, None]).astype(float)
    return hits.swapaxes(1, 2)


def excludes_zero(a, b):
    """Whether report.py's interval of the mean of a - b, (S, I) each, excludes zero."""
    ends = report.interval(*report.estimate_difference(a, b))
    return ends["low"] > 0 or ends["high"] < 0


def bootstrap_excludes_zero(a, b, random):
    """The same of a bootstrap over seeds (in pairs) and sentences, independently."""
    seeds, sentences = a.shape
    seed_counts = random.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)
    counts = random.multinomial(sentences, np.full(sentences, 1 / sentences), DRAWS)
    means = ((counts @ (a - b).T) * seed_counts).sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return low > 0 or high < 0


def marks_a_language(hits):
    """Whether report.py would call some language significant; hits: (2, languages, S, I)."""
    p_values = [report.t_test(*report.estimate_difference(a, b)) for a, b in zip(*hits)]
    return report.holm(np.array(p_values)).min() <= report.LEVEL


def hold_seeds_fixed(hits):
    """The mean over seeds as if it were one run: (..., 1, I)."""
    return hits.mean(axis=-2, keepdims=True)


def interval_rates(seeds, cases, random):
    """{"report", "fixed": percent of cases whose interval excludes zero}, for a quick test."""
    alarms = {"report": 0, "fixed": 0}
    for _ in range(cases):
        groups = simulate(seeds, random).mean(axis=1)
        alarms["report"] += excludes_zero(*groups)
        alarms["fixed"] += excludes_zero(*hold_seeds_fixed(groups))
    return {what: 100 * count / cases for what, count in alarms.items()}


def rates(seeds, cases, random):
    """{what: percent of cases}, and the deviation of A - B over seeds in points (None for one)."""
    alarms = dict.fromkeys(("report", "bootstrap", "fixed", "marked", "marked fixed"), 0)
    variances = []
    for _ in range(cases):
        hits = simulate(seeds, random)
        groups = hits.mean(axis=1)                      # (2, S, I): means over the languages
        alarms["report"] += excludes_zero(*groups)
        alarms["bootstrap"] += bootstrap_excludes_zero(*groups, random)
        alarms["fixed"] += excludes_zero(*hold_seeds_fixed(groups))
        alarms["marked fixed"] += marks_a_language(hold_seeds_fixed(hits))
        if seeds > 1:                                   # with one seed report.py marks nothing
            alarms["marked"] += marks_a_language(hits)
            of_seeds = (groups[0] - groups[1]).mean(axis=1)
            variances.append(of_seeds.var(ddof=1))
    percent = {what: 100 * count / cases for what, count in alarms.items()}
    percent["deviation"] = 100 * np.sqrt(np.mean(variances)) if variances else None
    return percent


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description="False alarm rates of report.py, by simulation.")
    parser.add_argument("--cases", type=int, default=1000, help="for each number of seeds")
    cases = parser.parse_args().cases
    print("             interval excludes zero      a language marked     A - B over seeds")
    print("seeds     report  bootstrap    fixed        report    fixed           deviation")
    for seeds in SEEDS:
        line = rates(seeds, cases, np.random.default_rng(seeds))
        deviation = "-"
        if line["deviation"]:
            deviation = f"{line['deviation']:.2f}"
        print(f"{seeds:5}{line['report']:11.1f}{line['bootstrap']:11.1f}{line['fixed']:9.1f}"
              f"{line['marked']:14.1f}{line['marked fixed']:9.1f}{deviation:>20}", flush=True)


if __name__ == "__main__":
    main()
