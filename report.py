"""Tables, comparisons and pictures from scored runs: the paper's Table 1, ours beside the published rows.

The paper's section "Results". evaluate.py calls this file. It works from what `evaluate.py RUN...` left in
each run folder, without backbone or corpus; all is recomputed from the predictions; what is missing is said.

    python evaluate.py runs/* --report --compare xpe spt --plot gain.png --out report
    |    xpe| joshi5|  3|    63,271| 56.6 ± 1.0|     22.9 ± 0.3| 32.8 ± 0.2| ...    (sample/backbone, SIB-200)
"""
import csv
from collections import Counter, namedtuple
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data import nearest
from evaluate import HERE, accuracy, group_means, load_config, resolve_group, to_csv, warn
from xpe import read_json, write_atomic

# paper: XLM-R-large, zero-shot, mean over languages and 10 seeds; what stays away is not known here
PAPER = ("method", "source", "46 low-performing", "113 unseen", "85 seen w/o Joshi5", "198 w/o Joshi5")
PUBLISHED = (("spt", "joshi5", 36.0, 56.0, 85.6, 68.7), ("dual30", "joshi5", 36.8),
             ("dual70", "joshi5", 37.3, None, 86.6), ("xpe", "joshi5", 39.1, 57.2, 84.5, 69.0),
             ("spt", "enarzho", 35.2), ("xpe", "enarzho", 35.3), ("spt", "seen", 39.1), ("xpe", "seen", 41.9))
KINDS = ("full", "head", "spt", "dual", "xpe")      # in the order of the tables
# hits: {language: bool array of the sentences it got right}; scores: {language: accuracy in percent}
Scored = namedtuple("Scored", "folder meta config method source hits scores")


def read_csv(path):
    """Rows of a CSV file as dicts, lines of '#' skipped."""
    lines = path.read_text("utf-8").splitlines()
    return csv.DictReader(line for line in lines if not line.startswith("#"))


def read_run(folder, split, leave_out, gold, say):
    """A run folder -> Scored, or None and a line that says why not.

    gold: {language: (file, index_ids, labels)}, filled here: all runs must have met the same sentences.
    """
    path, table_path = folder / f"{split}_predictions.csv", folder / f"{split}.csv"
    missing = [f.name for f in (folder / "prompt.json", path, table_path) if not f.is_file()]
    if missing:
        return say(f"{folder}: left out, no {', '.join(missing)}; python evaluate.py {folder} scores it")
    meta, saved = read_json(folder / "prompt.json"), folder / "config.yaml"
    if meta.get("kind") not in KINDS or not {"seed", "sources", "backbone"} <= meta.keys():
        raise ValueError(f"{folder / 'prompt.json'}: kind, seed, sources or backbone is missing or unknown")
    config, prompt = load_config(saved if saved.is_file() else None), meta.get("prompt") or {}
    method = meta["kind"] if meta["kind"] != "dual" else f"dual{round(100 * prompt['ratio'])}"
    if meta["kind"] in ("dual", "xpe") and prompt.get("encoder", "mlp") != "mlp":
        method += f"-{prompt['encoder']}"
    sources = meta["sources"]
    source = next((g for g in config["groups"] if set(resolve_group(config, g)) == set(sources)),
                  "+".join(sources) if len(sources) < 4 else f"{len(sources)}-languages")
    columns, hits, scores = {}, {}, {}
    for row in read_csv(path):
        columns.setdefault(row["language"], []).append((row["index_id"], row["label"], row["predicted"]))
    table = {row["language"]: (row["n"], row["accuracy"]) for row in read_csv(table_path)}
    for c, rows in columns.items():
        ids, labels, predicted = zip(*rows)
        first, *known = gold.setdefault(c, (path, ids, labels))
        if known != [ids, labels] or len(set(ids)) < len(ids):
            raise ValueError(f"{path}: other sentences or labels in {c} than {first}, or one twice")
        hits[c], scores[c] = np.array(labels) == np.array(predicted), accuracy(labels, predicted)
    if table != {c: (str(len(hits[c])), f"{scores[c]:.4f}") for c in hits}:
        raise ValueError(f"{table_path}: disagrees with {path.name}; score the run again")
    hits, scores = ({c: x for c, x in d.items() if c not in leave_out} for d in (hits, scores))
    return Scored(folder, meta, config, method, source, hits, scores)


def by_row(runs, say):
    """Runs -> {(method, source): {(seed, language adapted to, or ""): run}}; says which seeds are missing."""
    rows = {}
    for r in sorted(runs, key=lambda r: (r.source, KINDS.index(r.meta["kind"]), r.method)):
        cell = (r.meta["seed"], r.meta.get("adapted_to", ""))
        other = rows.setdefault((r.method, r.source), {}).setdefault(cell, r)
        if other is not r:
            raise ValueError(f"{other.folder} and {r.folder}: the same method, sources and seed; report one")
    for (method, source), own in rows.items():
        lacking = sorted({cell for k, cells in rows.items() if k[1] == source for cell in cells} - own.keys())
        if lacking:
            say(f"{method} {source}: missing although other runs have them: seeds "
                + ", ".join(f"{seed} {c}".strip() for seed, c in lacking))
    return rows


def spread(name, values):
    """A figure's mean and sample standard deviation over the seeds, as the cells `name` and `name std`."""
    values = [v for v in values if v is not None]
    return {name: float(np.mean(values)) if values else None,
            f"{name} std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def our_rows(rows, config, say):
    """For each method and source: over its seeds, each run's mean over the languages of a group."""
    out = []
    for (method, source), own in rows.items():
        means = [group_means(r.scores, config, r.meta["sources"]) for r in own.values()]
        trainable = next(iter(own.values())).meta.get("training", {}).get("trainable")
        out.append({"method": method, "source": source, "n": len(own), "trainable": trainable})
        settings = [r.meta.get("training", {}).get("settings") or {} for r in own.values()]
        mixed = sorted(k for k in settings[0] if any(s.get(k) != settings[0][k] for s in settings))
        if mixed:
            say(f"{method} {source}: its runs differ in {', '.join(mixed)}, and are averaged all the same")
        for title in means[0]:
            out[-1] |= spread(title, [m[title][0] for m in means])
            for r, (_, n, of) in zip(own.values(), (m[title] for m in means)):
                if n < of and out[-1][title] is not None:
                    say(f"{r.folder.name}: {title}: {of - n} of {of} languages not scored")
    return out


def baseline_rows(config, facts):
    """Means over the target groups of the published figures per language."""
    complete = [row for row in facts if all(row.values())]      # paper: without nqo_Nkoo
    means = {name: group_means({row["code"]: float(row[name]) for row in complete}, config, [])
             for name in list(complete[0])[3:]}
    return [{"method": name} | {t: m[t][0] for t in config["targets"]} for name, m in means.items()]


def adapted_rows(rows, before, say):
    """Runs adapted to a target, on that language; before: {name of a source run: its scores}."""
    out = []
    for (method, source), own in rows.items():
        found, languages = {}, sorted({c for _, c in own})
        for (seed, c), r in own.items():
            x, y = before.get(r.meta.get("adapted_from"), {}).get(c), r.scores.get(c)
            if x is None or y is None:
                say(f"{r.folder.name}: left out, it or {r.meta.get('adapted_from')} is not scored on {c}")
            else:
                found.setdefault(seed, []).append((x, y, y - x))
        out.append({"method": method, "source": source, "n": len(found),
                    "languages": " ".join(languages) if len(languages) < 4 else len(languages)})
        for i, name in enumerate(("before", "after", "gain")):
            out[-1] |= spread(name, [np.mean([x[i] for x in seed]) for seed in found.values()])
    return out


def table(rows):
    """Rows (dicts) as a Markdown table that is aligned for the terminal, too; "x std" stands beside "x"."""
    def shown(v, std):
        text = "-" if v is None else format(v, {float: ".1f", int: ","}.get(type(v), ""))
        return text if std is None else f"{text} ± {std:.1f}"
    keys = [k for k in rows[0] if not k.endswith(" std")]
    lines = [keys] + [[shown(row.get(k), row.get(f"{k} std")) for k in keys] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (w - 1) + ":" for w in widths])
    return "\n".join("".join(f"| {x:>{w}}" for x, w in zip(line, widths)) + "|" for line in lines)


def sign_flips(k):
    """Exact two-sided p-value of sum(k), k integers, if each might as well have had the other sign."""
    steps = np.abs(k[k != 0])
    total = int(steps.sum())
    p = np.zeros(2 * total + 1)                 # the distribution of the sum, from -total to total
    p[total] = 1.0
    for step in steps:
        p = (np.roll(p, step) + np.roll(p, -step)) / 2
    return min(1.0, float(p[np.abs(np.arange(-total, total + 1)) >= abs(int(k.sum()))].sum()))


def holm(p):
    """Holm's adjusted p-values: those up to 0.05 are significant together at 0.05."""
    p, out = np.asarray(p, dtype=float), np.empty(len(p))
    order = np.argsort(p, kind="stable")
    out[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return out


def compare(a, b, gold, config, say):
    """Rows A and B of by_row -> rows of groups and rows of languages: A minus B in points of accuracy.

    Paired by seed and test sentence; a source of either is no target. low to high: 95 % of 10,000 resamples
    of index_ids (each with all its translations) and, independently, of seeds; languages and sources stay
    fixed, few seeds understate their share. p: exact sign flips of a language's sentences, the seeds added up
    (one seed: McNemar's test). mark: s for a source, * for significant, by Holm over the target languages.
    """
    seeds = sorted(a.keys() & b.keys())
    runs = [m[s] for m in (a, b) for s in seeds]
    scored = {c for r in runs for c in r.hits}
    languages = sorted(c for c in scored if all(c in r.hits for r in runs))
    if not languages:
        raise ValueError("--compare: the two have no seed and language in common")
    if a.keys() != b.keys() or len(languages) < len(scored):
        say(f"compare: only {len(seeds)} seeds and {len(languages)} of {len(scored)} languages that all have")
    index = {i: n for n, i in enumerate(dict.fromkeys(i for c in languages for i in gold[c][1]))}
    has = np.zeros((len(index), len(languages)))        # (I, L): 1 where a language has the sentence
    d = np.zeros((len(seeds), *has.shape))              # (S, I, L): A right minus B right
    for n, c in enumerate(languages):
        rows = [index[i] for i in gold[c][1]]
        has[rows, n] = 1
        d[:, rows, n] = [a[s].hits[c].astype(int) - b[s].hits[c] for s in seeds]
    rng = np.random.default_rng(0)                      # w, v: how often a sentence and a seed is drawn
    w = rng.multinomial(len(index), [1 / len(index)] * len(index), 10_000)
    v = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), 10_000) / len(seeds)
    drawn = np.maximum(w @ has, 1)                      # (10000, L): a language may lack some sentences
    draws = 100 * sum(v[:, s, None] * (w @ d[s] / drawn) for s in range(len(seeds)))
    sources = {c for r in runs for c in r.meta["sources"]}
    own = np.array([[np.mean([m[s].scores[c] for s in seeds]) for c in languages] for m in (a, b)])  # (2, L)
    groups = {"Sources": sources} | {t: {*codes} - sources for t, codes in config["targets"].items()}
    of_groups = []
    for title, codes in groups.items():
        at = [n for n, c in enumerate(languages) if c in codes]
        if at:
            x, y = own[:, at].mean(1).tolist()
            low, high = np.percentile(draws[:, at].mean(1), (2.5, 97.5))
            of_groups.append({"group": title, "languages": len(at), "A": x, "B": y, "A - B": f"{x - y:+.2f}",
                              "low": f"{low:+.2f}", "high": f"{high:+.2f}"})
    p = {c: sign_flips(d[:, :, n].sum(0).astype(int)) for n, c in enumerate(languages) if c not in sources}
    mark = dict(zip(p, np.where(holm(list(p.values())) <= 0.05, "*", " ")))
    of_languages = [{"language": c, "A": x, "B": y, "A - B": x - y, "p": p.get(c), "mark": mark.get(c, "s")}
                    for c, (x, y) in zip(languages, own.T.tolist())]
    return of_groups, sorted(of_languages, key=lambda r: -r["A - B"])


def plot(path, title, rows, config, facts):
    """A picture of A's gain per language, ordered, and of A's and B's accuracy by family and by script."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    kinds = {"seen": "#2f6db3", "unseen": "#e9b000", "low_performing": "#c8500a"}   # of two, the later one
    colour = {c: x for group, x in kinds.items() for c in resolve_group(config, group)}
    colours = [colour.get(r["language"], "#888888") for r in rows]
    gains = [r["A - B"] for r in rows]
    about = [facts.get(r["language"], {"name": "", "family": "unknown"}) for r in rows]
    names = [f"{x['name']} {r['language']} {r['mark']}" for x, r in zip(about, rows)]
    columns = -(-len(rows) // 70)
    size = -(-len(rows) // columns)
    figure = Figure((4.6 * (columns + 2), 3 + 0.165 * size), layout="constrained")
    *bars, by_family, by_script = figure.subplots(1, columns + 2)
    reach = 1.05 * max(map(abs, gains))
    for ax, i in zip(bars, range(0, len(rows), size)):
        ax.barh(names[i:i + size], gains[i:i + size], 0.75, color=colours[i:i + size])
        ax.set(xlim=(-reach, reach), xlabel="gain in accuracy (points)", ylim=(-0.6, size - 0.4))
        ax.axvline(0, color="black", linewidth=0.7)
    for ax, parts in ((by_family, [x["family"] for x in about]),
                      (by_script, [r["language"].rpartition("_")[2] for r in rows])):
        for part, n in Counter(parts).most_common():
            at = [i for i, x in enumerate(parts) if x == part]
            label, a, b = f"{part} ({n})", *([rows[i][side] for i in at] for side in "AB")
            ax.scatter(a, [label] * n, 14, [colours[i] for i in at], alpha=0.6)
            ax.scatter(np.mean(b), label, 90, "grey", "|")
            ax.scatter(np.mean(a), label, 90, "black", "|")
        ax.set_xlabel("accuracy of A (%)")
    for ax in figure.axes:
        ax.invert_yaxis()
        ax.tick_params("y", labelsize=7)
        ax.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{title} (*: significant by Holm; s: a source; | black, grey: mean of A, of B)")
    figure.legend(handles=[Patch(color=x, label=group) for group, x in kinds.items()],
                  loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    print(f"{path}: written")


def main(args):
    """`evaluate.py RUN... --report`: print and write; groups and targets are those of the first run."""
    if args.plot and not (args.compare and find_spec("matplotlib")):
        raise ValueError("--plot needs --compare A B, and matplotlib: pip install matplotlib")
    notes, gold, leave_out = [], {}, set(args.leave_out.split(",")) - {""}

    def say(line):
        warn(line)
        notes.append(f"* {line}")
    runs = [r for f in args.runs if (r := read_run(Path(f), args.split, leave_out, gold, say))]
    if not runs:
        raise ValueError("none of these runs is scored: python evaluate.py RUN... comes first")
    for c in leave_out - gold.keys():
        raise ValueError(f"--leave-out: {c!r} is not among the scored languages{nearest(c, gold)}")
    if "ars_Arab" in gold.keys() - leave_out and any("arb_Arab" in r.meta["sources"] for r in runs):
        say("ars_Arab shares 138 of its 204 test sentences with arb_Arab, a source; --leave-out ars_Arab")
    names, whole = {Path(r.meta["backbone"]["name"]).name for r in runs}, runs[0].config
    if len(names) > 1:
        raise ValueError(f"runs of several backbones, {', '.join(sorted(names))}: report one at a time")
    config = whole | {"targets": {t: [c for c in resolve_group(whole, g) if c not in leave_out]
                                  for t, g in whole["targets"].items()}}
    facts = {row["code"]: row for row in read_csv(HERE / "baselines.csv")}
    direct, adapted = (by_row([r for r in runs if ("adapted_to" in r.meta) == x], say) for x in (False, True))
    before = {r.folder.resolve().name: r.scores for own in direct.values() for r in own.values()}
    blocks = {f"Accuracy in percent ({args.split}, {names.pop()}), mean ± standard deviation over n seeds":
              our_rows(direct, config, say)}
    if "low_performing" in whole["targets"].values():       # the paper's own
        blocks["Published (XLM-R-large, 10 seeds, the paper)"] = [dict(zip(PAPER, row)) for row in PUBLISHED]
        blocks["Published (SIB-200's paper, without nqo_Nkoo)"] = baseline_rows(config, facts.values())
    blocks["Adapted to a target language"] = adapted_rows(adapted, before, say)
    if args.compare:
        A, B = args.compare
        picked = [[own for key, own in direct.items() if name in (key[0], "-".join(key))] for name in (A, B)]
        if [len(x) for x in picked] != [1, 1]:
            raise ValueError(f"--compare {A} {B}: each must be one of {', '.join(map('-'.join, direct))}")
        of_groups, of_languages = compare(*picked[0], *picked[1], gold, config, say)
        blocks[f"{A} (A) against {B} (B), 95 % intervals"] = of_groups
    text = "\n\n".join(f"{title}\n\n{table(rows)}" for title, rows in blocks.items() if rows)
    if args.compare:
        tested = [r for r in of_languages if r["mark"] != "s"]
        won, lost = (sum(sign * r["A - B"] > 1e-9 for r in tested) for sign in (1, -1))
        sure = ", ".join(f"{r['language']} {r['A - B']:+.1f}" for r in tested if r["mark"] == "*")
        text += f"\n\nTarget languages: {won} won, {lost} lost; significant, by Holm: {sure or 'none'}"
        blocks["languages"] = of_languages
    print(text)
    if args.out:
        (out := Path(args.out)).mkdir(parents=True, exist_ok=True)
        write_atomic(out / "report.md", "\n".join([text, "", *notes, ""]).encode())
        rows = [{"table": title} | row for title, block in blocks.items() for row in block]
        columns = {k: None for row in rows for k in row}
        write_atomic(out / "report.csv", to_csv([columns | row for row in rows]))
        print(f"{out}/report.md, report.csv: written")
    if args.plot:
        plot(args.plot, f"{A} minus {B}", of_languages, config, facts)
