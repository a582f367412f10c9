"""Tables, comparisons and pictures from scored runs: the paper's Table 1, ours beside the published rows.

The paper's section "Results". It works from what `evaluate.py RUN...` left in each run folder, without
backbone or corpus; all is recomputed from the predictions; what is missing is said.

    python evaluate.py runs/* --report --compare xpe spt --plot gain.png --out report
    |    xpe| joshi5|  3|    63,271| 57.5 ± 0.2|     23.3 ± 0.2| 33.1 ± 0.6| ...    (sample/backbone, SIB-200)
"""
import csv
import io
from collections import Counter
from importlib.util import find_spec
from itertools import groupby, product
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data import nearest
from evaluate import HERE, accuracy, group_means, load_config, method_name, resolve_group, to_csv, warn
from xpe import read_json, write_atomic

# paper: XLM-R-large, zero-shot, mean over languages and 10 seeds; what stays away is not known here
PAPER = ("method", "source", "46 low-performing", "113 unseen", "85 seen w/o Joshi5", "198 w/o Joshi5")
PUBLISHED = (("spt", "joshi5", 36.0, 56.0, 85.6, 68.7), ("dual30", "joshi5", 36.8),
             ("dual70", "joshi5", 37.3, None, 86.6), ("xpe", "joshi5", 39.1, 57.2, 84.5, 69.0),
             ("spt", "enarzho", 35.2), ("xpe", "enarzho", 35.3), ("spt", "seen", 39.1), ("xpe", "seen", 41.9))
KINDS = {"full": 0, "head": 1, "spt": 2, "dual": 3, "xpe": 4}       # their order in the tables


def read_csv(path):
    """Rows of a CSV file as dicts, lines of '#' skipped."""
    return csv.DictReader(x for x in io.StringIO(path.read_text("utf-8")) if not x.startswith("#"))


def read_run(folder, split, config, gold):
    """A scored run -> what its prompt.json says, method and source as the tables name them, and by language
    hits (bool array: the sentences it got right) and scores (percent).

    gold: {language: (index_ids, labels)}, filled here: all runs must have met the same sentences. Raises
    FileNotFoundError if the run is not scored, ValueError if its files disagree, or with an earlier run's.
    """
    absent = {"adapted_to": "", "adapted_from": "", "training": {}, "prompt": {"encoder": "mlp"}}
    r = SimpleNamespace(**absent | read_json(folder / "prompt.json"))
    r.name, r.hits, r.scores = folder.resolve().name, {}, {}
    if type(r.seed) is not int:
        raise TypeError(f"the seed {r.seed!r}")
    r.backbone = Path(r.backbone["name"]).name
    r.trainable, r.settings = r.training.get("trainable"), r.training.get("settings") or {}
    r.method, r.rank = method_name(r.kind, r.prompt), KINDS[r.kind]
    r.source = next((group for group in config["groups"] if {*resolve_group(config, group)} == {*r.sources}),
                    "+".join(r.sources))
    for c, rows in groupby(read_csv(folder / f"{split}_predictions.csv"), lambda row: row["language"]):
        ids, labels, predicted = zip(*((row["index_id"], row["label"], row["predicted"]) for row in rows))
        if gold.setdefault(c, (ids, labels)) != (ids, labels) or len({*ids}) < len(ids):
            raise ValueError(f"{folder}: other sentences or labels in {c} than in another run, or one twice")
        r.hits[c], r.scores[c] = np.array(labels) == np.array(predicted), accuracy(labels, predicted)
    table = {row["language"]: (row["n"], row["accuracy"]) for row in read_csv(folder / f"{split}.csv")}
    if table != {c: (str(len(r.hits[c])), f"{r.scores[c]:.4f}") for c in r.hits}:
        raise ValueError(f"{folder}/{split}.csv: disagrees with the predictions beside it; score it again")
    return r


def figures(r, config, before, say):
    """What the tables average: a run's mean over each group; of an adapted run accuracy before and after.

    before: {name of a source run: its scores}. None if they cannot be had; what is missing is said.
    """
    if r.adapted_to:
        x, y = before.get(r.adapted_from, {}).get(r.adapted_to), r.scores.get(r.adapted_to)
        if x is None or y is None:
            return say(f"{r.name}: left out, it or {r.adapted_from} is not scored on {r.adapted_to}")
        return {"before": x, "after": y, "gain": y - x}
    means = group_means(r.scores, config, r.sources)
    for title, (_, n, of) in means.items():
        if 0 < n < of:
            say(f"{r.name}: {title}: {of - n} of {of} languages not scored")
    left = ((title, means[title][2], len(codes)) for title, codes in config["targets"].items())
    if left := [f"{title} {n} of {of}" for title, n, of in left if n < of]:
        say(f"{r.method} {r.source}: languages left without its own sources: {', '.join(left)}")
    return {title: np.nan if mean is None else mean for title, (mean, _, _) in means.items()}


def averages(runs, say):
    """Runs -> rows of a table: the mean of each figure and, as `<name> std`, its deviation over the seeds.

    Says which seeds are missing. Raises ValueError if one stands twice.
    """
    out, order = [], attrgetter("source", "rank", "method")
    for (source, _, method), own in groupby(sorted(runs, key=order), order):
        own, peers = list(own), [r for r in runs if r.source == source]
        have = [(r.seed, r.adapted_to) for r in own]
        if len({*have}) < len(have):
            raise ValueError(f"{method} {source}: a seed stands twice in {', '.join(r.name for r in own)}")
        want = product({r.seed for r in peers}, {r.adapted_to for r in peers})
        if lacking := [f"{seed} {c}".strip() for seed, c in sorted({*want} - {*have})]:
            say(f"{method} {source}: missing although other runs have them: seeds {', '.join(lacking)}")
        seeds, languages = (sorted({*x}) for x in zip(*have))
        row = {"method": method, "source": source, "n": len(seeds)}
        if own[0].adapted_to:
            row["languages"] = " ".join(languages) if len(languages) < 4 else len(languages)
        else:
            row["trainable"] = own[0].trainable
            mixed = {k for r in own for k in r.settings if r.settings[k] != own[0].settings.get(k)}
            if mixed := sorted(mixed - {"learners_at_once", "tokens"}):
                say(f"{method} {source}: averaged, although its runs differ in {', '.join(mixed)}")
        for name in own[0].figures:
            values = [np.mean([r.figures[name] for r in own if r.seed == seed]) for seed in seeds]
            row[name] = float(np.mean(values))
            row[f"{name} std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        out.append(row)
    return out


def baseline_rows(config, facts):
    """Means over the target groups of the published figures per language."""
    complete = [row for row in facts if all(row.values())]      # paper: without nqo_Nkoo
    means = {name: group_means({row["code"]: float(row[name]) for row in complete}, config, [])
             for name in list(complete[0])[3:]}
    return [{"method": name} | {t: m[t][0] for t in config["targets"]} for name, m in means.items()]


def table(rows):
    """Rows (dicts) as a Markdown table that is aligned for the terminal, too; "x std" stands beside "x"."""
    def shown(v, std):
        if v is None or v != v:
            return "-"
        text = format(v, {float: ".1f", int: ","}.get(type(v), ""))
        return text if std is None else f"{text} ± {std:.1f}"
    keys = [k for k in rows[0] if not k.endswith(" std")]
    lines = [keys] + [[shown(row.get(k), row.get(f"{k} std")) for k in keys] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (w - 1) + ":" for w in widths])
    return "\n".join("".join(f"| {x:>{w}}" for x, w in zip(line, widths)) + "|" for line in lines)


def sign_flips(k):
    """Exact two-sided p-value of sum(k), k integers, if each might as well have had the other sign."""
    p, total = np.ones(1), np.abs(k).sum()      # p: the distribution of the sum, from -total to total
    for step in 2 * np.abs(k):
        p = (np.pad(p, (step, 0)) + np.pad(p, (0, step))) / 2
    return min(1.0, float(p[np.abs(np.arange(-total, total + 1)) >= abs(k.sum())].sum()))


def holm(p):
    """Holm's adjusted p-values: those up to 0.05 are significant together at 0.05."""
    steps = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    return np.minimum(1, steps[np.argsort(np.argsort(p))])


def compare(a, b, gold, config, say):
    """Runs A and runs B -> rows of groups, rows of languages (A minus B in points of accuracy), the verdict.

    Paired by seed and test sentence; a source of either is no target. low to high: 95 % of 10,000 resamples
    of index_ids (each with all its translations) and, independently, of seeds; languages and sources stay
    fixed, few seeds understate their share. p: exact sign flips of a language's sentences, the seeds added up
    (one seed: McNemar's test). mark: s for a source, * for significant, by Holm over the target languages.
    Raises ValueError if they share no seed and language.
    """
    a, b = ({r.seed: r for r in runs} for runs in (a, b))
    seeds = sorted(a.keys() & b.keys())
    paired = [m[seed] for m in (a, b) for seed in seeds]
    scored = {c for r in paired for c in r.hits}
    languages = sorted(c for c in scored if all(c in r.hits for r in paired))
    if not languages:
        raise ValueError("--compare: the two have no seed and language in common")
    if a.keys() != b.keys() or len(languages) < len(scored):
        say(f"compare: only {len(seeds)} seeds and {len(languages)} of {len(scored)} languages that all have")
    index = {i: n for n, i in enumerate(dict.fromkeys(i for c in languages for i in gold[c][0]))}
    rng = np.random.default_rng(0)                      # w, v: how often a sentence and a seed is drawn
    w = rng.multinomial(len(index), [1 / len(index)] * len(index), 10_000).astype(float)
    v = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), 10_000) / len(seeds)
    sources, draws, of_languages, of_groups = {c for r in paired for c in r.sources}, {}, [], []
    for c in languages:
        x, y = (np.array([m[seed].hits[c] for seed in seeds], dtype=float) for m in (a, b))     # (S, I)
        drawn = w[:, [index[i] for i in gold[c][0]]]            # (10000, I): it may lack some sentences
        draws[c] = 100 * (drawn @ (x - y).T * v).sum(1) / np.maximum(drawn.sum(1), 1)           # (10000,)
        p = None if c in sources else sign_flips((x - y).sum(0).astype(int))
        of_languages.append({"language": c, "A": 100 * float(x.mean()), "B": 100 * float(y.mean()),
                             "A - B": 100 * float((x - y).mean()), "p": p, "mark": "s"})
    targets = [r for r in of_languages if r["p"] is not None]
    for r, p in zip(targets, holm([r["p"] for r in targets])):
        r["mark"] = "*" if p <= 0.05 else " "
    groups = {"Sources": sources} | {t: {*codes} - sources for t, codes in config["targets"].items()}
    for title, codes in groups.items():
        rows = [r for r in of_languages if r["language"] in codes]
        if rows:
            x, y = (float(np.mean([r[side] for r in rows])) for side in "AB")
            low, high = np.percentile(np.mean([draws[r["language"]] for r in rows], 0), (2.5, 97.5))
            signed = {"A - B": f"{x - y:+.2f}", "low": f"{low:+.2f}", "high": f"{high:+.2f}"}
            of_groups.append({"group": title, "languages": len(rows), "A": x, "B": y} | signed)
    of_languages.sort(key=lambda r: -r["A - B"])
    won, lost = (sum(sign * r["A - B"] > 1e-9 for r in targets) for sign in (1, -1))
    sure = ", ".join(f"{r['language']} {r['A - B']:+.1f}" for r in of_languages if r["mark"] == "*")
    return of_groups, of_languages, f"{won} won, {lost} lost; significant, by Holm: {sure or 'none'}"


def plot(path, title, rows, config, facts):
    """Save a picture: A's gain per language, ordered, and the accuracy of A and B by family and by script."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    kinds = {"seen": "#2f6db3", "unseen": "#e9b000", "low_performing": "#c8500a"}   # of two, the later one
    colour = {c: x for group, x in kinds.items() for c in resolve_group(config, group)}
    colours = [colour.get(r["language"], "#888888") for r in rows]
    about = [facts.get(r["language"], {"name": "", "family": "unknown"}) for r in rows]
    names = [f"{x['name']} {r['language']} {r['mark']}" for x, r in zip(about, rows)]
    figure = Figure((13, 3 + 0.165 * len(rows)), layout="constrained")
    axes = figure.subplot_mosaic([["gain", "family"], ["gain", "script"]])
    axes["gain"].barh(names, [r["A - B"] for r in rows], color=colours)
    axes["gain"].set(xlabel="gain in accuracy (points)", ylim=(-1, len(rows)))
    parts = {"family": [x["family"] for x in about],
             "script": [r["language"].rpartition("_")[2] for r in rows]}
    for key, values in parts.items():
        for value, n in Counter(values).most_common():
            at = [i for i, x in enumerate(values) if x == value]
            label, a, b = f"{value} ({n})", *([rows[i][side] for i in at] for side in "AB")
            axes[key].scatter(a, [label] * n, 14, [colours[i] for i in at], alpha=0.6)
            axes[key].scatter(np.mean(b), label, 90, "grey", "|")
            axes[key].scatter(np.mean(a), label, 90, "black", "|")
        axes[key].set_xlabel("accuracy of A (%); black, grey: mean of A, of B")
    for ax in figure.axes:
        ax.invert_yaxis()
        ax.tick_params("y", labelsize=7)
        ax.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{title} (*: significant by Holm; s: a source)")
    figure.legend(handles=[Patch(color=x, label=group) for group, x in kinds.items()],
                  loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main(args):
    """`evaluate.py RUN... --report`: print and write; groups and targets are those of the first run."""
    if args.plot and not (args.compare and find_spec("matplotlib")):
        raise ValueError("--plot needs --compare A B, and matplotlib: pip install matplotlib")
    notes, gold, runs, leave_out = [], {}, [], set(args.leave_out.split(",")) - {""}
    say, saved = notes.append, Path(args.runs[0]) / "config.yaml"
    config = load_config(saved if saved.is_file() else None)
    for folder in map(Path, args.runs):
        try:
            runs.append(read_run(folder, args.split, config, gold))
        except (FileNotFoundError, NotADirectoryError) as e:
            name = Path(e.filename).name
            how = "train.py --resume ends" if name == "prompt.json" else f"python evaluate.py {folder} scores"
            say(f"{folder}: left out, no {name}; {how} it")
        except (AttributeError, KeyError, TypeError) as e:
            raise ValueError(f"{folder}: not as evaluate.py writes it: {e!r}") from None
    if not runs:
        raise ValueError("none of these runs is scored: python evaluate.py RUN... comes first")
    for c in leave_out - gold.keys():
        raise ValueError(f"--leave-out: {c!r} is not among the scored languages{nearest(c, gold)}")
    for r in runs:
        r.hits, r.scores = ({c: x for c, x in d.items() if c not in leave_out} for d in (r.hits, r.scores))
    if "ars_Arab" in gold.keys() - leave_out and any("arb_Arab" in r.sources for r in runs):
        say("ars_Arab shares 138 of its 204 test sentences with arb_Arab, a source; --leave-out ars_Arab")
    backbone, *others = sorted({r.backbone for r in runs})
    if others:
        raise ValueError(f"runs of several backbones, {backbone}, {', '.join(others)}: report one at a time")
    papers = "low_performing" in config["targets"].values()
    config["targets"] = {t: [c for c in resolve_group(config, group) if c not in leave_out]
                         for t, group in config["targets"].items()}
    facts = {row["code"]: row for row in read_csv(HERE / "baselines.csv")}

    before = {r.name: r.scores for r in runs if not r.adapted_to}
    for r in runs:
        r.figures = figures(r, config, before, say)
    direct, adapted = ([r for r in runs if r.figures and bool(r.adapted_to) == x] for x in (False, True))
    blocks = {f"Accuracy in percent ({args.split}, {backbone}), mean ± standard deviation over n seeds":
              averages(direct, say)}
    if papers:
        blocks["Published (XLM-R-large, 10 seeds, the paper)"] = [dict(zip(PAPER, row)) for row in PUBLISHED]
        blocks["Published (SIB-200's paper, without nqo_Nkoo)"] = baseline_rows(config, facts.values())
    blocks["Adapted to a target language"] = averages(adapted, say)
    if args.compare:
        A, B = args.compare
        picked = [[r for r in direct if name in (r.method, f"{r.method}-{r.source}")] for name in (A, B)]
        if [len({r.source for r in own}) for own in picked] != [1, 1]:
            known = sorted({f"{r.method}-{r.source}" for r in direct})
            raise ValueError(f"--compare {A} {B}: each must be one of {', '.join(known)}")
        of_groups, of_languages, verdict = compare(*picked, gold, config, say)
        blocks[f"{A} (A) against {B} (B), 95 % intervals"] = of_groups
    text = "\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in blocks.items() if rows)
    if args.compare:
        text += f"\n\nTarget languages: {verdict}"
        blocks["languages"] = of_languages
    notes = dict.fromkeys(notes)
    for line in notes:
        warn(line)
    print(text)
    if args.out:
        (out := Path(args.out)).mkdir(parents=True, exist_ok=True)
        write_atomic(out / "report.md", "\n".join([text, "", *(f"* {x}" for x in notes), ""]).encode())
        rows = [{"table": title} | row for title, block in blocks.items() for row in block]
        columns = dict.fromkeys(k for row in rows for k in row)
        write_atomic(out / "report.csv", to_csv(columns, ([row.get(k) for k in columns] for row in rows)))
        print(f"{out}/report.md, report.csv: written")
    if args.plot:
        plot(args.plot, f"{A} minus {B}", of_languages, config, facts)
        print(f"{args.plot}: written")
