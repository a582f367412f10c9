"""evaluate.py and runs.py: every figure is computed a second time, slowly.

    pytest tests/test_evaluate.py                   (offline, CPU; some fifteen seconds on one core)

Runs are made with runs.save_prompt: hardly anything is trained. Each test says which mistake it
would catch.
"""
import copy
import csv
import functools
import io
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

import data
import evaluate
import runs
import train
import xpe
from helpers import WORDS, close, corpus, run, tiny_backbone


EXACT = "--device cpu --amp off "


def score(arguments):
    """Run evaluate.py in float32 -> (stdout, stderr); it must succeed."""
    status, out, err = run(evaluate.main, *shlex.split(EXACT + arguments))
    assert status == 0, err
    return out, err


def refused(arguments, message):
    """Assert that evaluate.py ends in one line that matches `message`."""
    status, _, error = run(evaluate.main, *shlex.split(arguments))
    assert status == 2 and re.search(f"^error: .*{message}.*\n$", error, re.MULTILINE), error


def drawn(module, seed=1):
    """Fill every parameter from N(0, 0.5): each part must show, and labels must vary."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def write_run(folder, world, seed=11, kind="dual", **changes):
    """A run folder as train.py leaves it, its numbers drawn at random."""
    folder.mkdir(parents=True)
    prompt = drawn(xpe.SoftPrompt(16, 4, ratio=0.5, hidden=6), seed)
    head = drawn(xpe.ClassificationHead(16, 7), seed)
    places = {section: {"name": str(world / section), "revision": "local"}
              for section in ("backbone", "data")}
    meta = dict(places, kind=kind, reads="prompt", labels=list(data.LABELS), max_length=20,
                sources=["aaa_Latn", "bbb_Latn"], training={})
    modules = {"head": head} if kind == "full" else {"prompt": prompt, "head": head}
    runs.save_prompt(folder, torch.nn.ModuleDict(modules), {**meta, **changes})
    # 60 positions to a batch: many batches, sorted by length
    settings = "targets: {Others: others}\ngroups: {others: [ccc_Latn, bbb_Latn]}"
    (folder / "config.yaml").write_text(settings + "\nevaluate: {tokens: 60}")
    return folder


@pytest.fixture
def one(world, tmp_path):
    """A run folder."""
    return write_run(tmp_path / "dual50-two-s11", world)


@functools.cache
def loaded(folder):
    """-> (backbone, tokenizer), as transformers loads them."""
    backbone = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return backbone.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def answer_slowly(folder, text, backbone=None):
    """Probabilities (C,) that a run folder gives one text, one step after the other."""
    modules, meta = runs.load_prompt(folder)
    own, tokenizer = loaded(meta["backbone"]["name"])
    backbone = backbone or own
    ids = tokenizer(text, truncation=True, max_length=meta["max_length"])["input_ids"]
    words = backbone.embeddings.word_embeddings.weight[torch.tensor(ids)]
    rows = modules["prompt"].eval()()[0] if meta["prompt"] else words[:0]
    states = backbone(inputs_embeds=torch.cat((rows, words))[None])[0][0]       # (P+T, H)
    of_text = states[len(rows):]
    vector = {"prompt": states[0], "first": of_text[0], "last": of_text[-1],
              "mean": of_text.mean(dim=0)}[meta["reads"]]
    return modules["head"].eval()(vector[None]).softmax(dim=1)[0]


def line_of(folder, text):
    """[label, probability] of a text, as --text prints them."""
    shares = answer_slowly(folder, text)
    return [data.LABELS[shares.argmax()], f"{shares.max():.3f}"]


def read_csv(path):
    """The lines of a CSV file as dicts."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- Predictions and metrics ---------------------------------------------------------------------

@pytest.mark.parametrize("n, classes", [(1, 7), (50, 3), (204, 7)])
def test_metrics(n, classes):
    """Catches: macro-F1 over classes that do not occur, or weighted; shares instead of percent."""
    labels, predicted = np.random.default_rng(2).integers(0, classes, (2, n)).tolist()
    f1 = []
    for c in {*labels, *predicted}:
        hits = sum(a == b == c for a, b in zip(labels, predicted))
        precision = hits / max(1, predicted.count(c))
        recall = hits / max(1, labels.count(c))
        f1.append(200 * precision * recall / (precision + recall) if hits else 0)
    right = sum(a == b for a, b in zip(labels, predicted))
    assert evaluate.accuracy(labels, predicted) == pytest.approx(100 * right / n)
    assert evaluate.macro_f1(labels, predicted) == pytest.approx(statistics.mean(f1))
    assert evaluate.majority(labels) == pytest.approx(100 * max(map(labels.count, labels)) / n)


def test_group_means_leave_sources_out():
    """Catches: sources inside a zero-shot mean, a language that was not scored counted as 0."""
    settings = {"groups": {"a": ["x", "y", "z"]}, "targets": {"A": "a", "B": ["a", "w", "-y"],
                                                              "C": ["v"], "D": ["x"]}}
    means = evaluate.group_means({"x": 10.0, "y": 20.0, "z": 60.0}, settings, ["x"])
    assert means == {"Sources": (10, 1, 1), "A": (40, 2, 2), "B": (60, 1, 2), "C": (None, 0, 1),
                     "D": (None, 0, 0)}


# ---- Prompt files --------------------------------------------------------------------------------

@pytest.mark.parametrize("encoder", xpe.ENCODERS)
def test_a_prompt_comes_back_as_it_was(one, tmp_path, encoder):
    """Catches: a tensor, a setting or a fact that is lost on disk (peft drops the encoder)."""
    own, meta = runs.load_prompt(one)
    own["prompt"] = drawn(xpe.SoftPrompt(16, 5, 0.4, encoder, hidden=6, dropout=0.3))
    meta.update(more="Zoë", reads="mean", prompt=own["prompt"].config)
    runs.save_prompt(tmp_path, own, meta)
    modules, found = runs.load_prompt(tmp_path)
    assert found == meta
    assert all(parameter.requires_grad for parameter in modules.parameters())
    close(modules.state_dict(), own.state_dict(), 0)
    close(modules["prompt"].eval()(), own["prompt"]())


# ---- Scoring -------------------------------------------------------------------------------------

def test_scores_are_those_of_the_predictions(world, tmp_path):
    """Catches: labels in another order than SIB-200's; predictions beside the wrong sentence (after
    sorting by length, as in the authors' toolkit) or by the wrong run; padding that shows; a mean
    over sentences; a source among the targets; a run changed by company."""
    folders = [write_run(tmp_path / f"run{seed}", world, seed) for seed in (11, 12, 13)]
    out, _ = score(" ".join(map(str, folders)))
    codes = "aaa_Latn", "bbb_Latn", "ccc_Latn"
    sentences = [(code, sentence) for code in codes
                 for sentence in data.Corpus(world / "data").read(code, "test")]
    means = []
    for folder in folders:
        accuracies = dict.fromkeys(codes, 0)
        lines = read_csv(folder / "test_predictions.csv")
        for line, (code, sentence) in zip(lines, sentences, strict=True):
            expected = answer_slowly(folder, sentence.text)
            guess = int(expected.argmax())
            facts = code, sentence.index_id, data.LABELS[sentence.label], data.LABELS[guess]
            assert tuple(line.values())[:4] == facts
            shares = [float(line[f"p({name})"]) for name in data.LABELS]
            close(torch.tensor(shares), expected, 2e-5)
            accuracies[code] += 100 / 7 * (sentence.label == guess)
        table = read_csv(folder / "test.csv")
        assert [float(line["accuracy"]) for line in table] == \
            pytest.approx(list(accuracies.values()), abs=1e-3)
        summary = runs.read_json(folder / "test.json")
        figures = {line["language"]: line["accuracy"] for line in summary["lines"]}
        assert figures == pytest.approx(accuracies)
        a, b, c = accuracies.values()
        assert summary["groups"] == {       # bbb_Latn is among the others, and a source
            "Sources": [pytest.approx((a + b) / 2), 2, 2], "Others": [pytest.approx(c), 1, 1]}
        means.append(c)
    spread = f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}"
    assert re.search(rf"dual50.* Others +{spread} +3 runs", out)

    score(f"{folders[1]} --out {tmp_path}/alone")
    for name in ("test.csv", "test_predictions.csv"):
        assert (tmp_path / "alone/run12" / name).read_text() == (folders[1] / name).read_text()


@pytest.mark.parametrize("kind, reads", [("dual", "first"), ("dual", "mean"), ("dual", "last"),
                                         ("full", "first"), ("full", "mean")])
def test_what_the_head_reads(world, tmp_path, kind, reads):
    """Catches: a last layer that computes position 0 alone under a head that reads another one; a
    fully tuned run that is answered by the backbone it started from."""
    folder = write_run(tmp_path / "run", world, kind=kind, reads=reads)
    backbone = None
    if kind == "full":
        backbone = drawn(copy.deepcopy(loaded(str(world / "backbone"))[0]))
        save_file(backbone.state_dict(), folder / "backbone.safetensors")
    text = "star atom cell beach"
    _, probabilities = evaluate.load(folder, "cpu", amp="off")([text])
    close(probabilities[0], answer_slowly(folder, text, backbone))


def test_what_is_scored_already(world, one, tmp_path):
    """Catches: hours for scores that are there; old scores shown for a new prompt or new data."""
    root = shutil.copytree(world / "data", tmp_path / "data")
    other = write_run(tmp_path / "other", world, seed=12)
    meta = runs.read_json(one / "prompt.json")
    meta["data"]["name"] = str(root)
    (one / "prompt.json").write_text(json.dumps(meta))
    for change, options in [
            ("", ""), ("", "--again"), (f"cp {other}/prompt.safetensors {one}", ""),
            (f"echo 'new\ttravel\tbeach' >> {root}/ccc_Latn/test.tsv", ""),
            (f"echo {{}} > {one}/test.json", "")]:
        subprocess.run(change, shell=True, check=True)
        data.read_tsv.cache_clear()         # as in another process
        table, _ = score(f"{one} {options}")
        again, _ = score(str(one))
        assert "scored already" not in table and "scored already (precision off)" in again
        assert table.splitlines()[:5] == again.splitlines()[:5]


@pytest.mark.parametrize("options, told", [
    ("--data {root}/other", "ccc_Latn"), ("--backbone {root}/twin", "aaa_Latn"),
    ("--languages 'bbb_Latn, ccc_Latn'", r"Sources .* 1 of 2\n"),
    ("--languages others --split dev", "ccc_Latn")])
def test_other_scores_are_shown_and_not_written(world, one, tmp_path, options, told):
    """Catches: results of the run's own data replaced by those of other data, another backbone or
    some languages; "a, b" read as one code with a blank; a group that vanishes from the table."""
    corpus(tmp_path / "other", ["bbb_Latn", "ccc_Latn"], (5, 5, 7))
    shutil.copytree(world / "backbone", tmp_path / "twin")
    before = sorted(one.iterdir())
    out, _ = score(f"{one} " + options.format(root=tmp_path))
    assert re.search(told, out) and "not written: --out FOLDER" in out
    assert sorted(one.iterdir()) == before
    assert "ccc_Latn" in out and ("aaa_Latn" in out) == ("twin" in options)


def test_nothing_is_written_over(one, tmp_path):
    """Catches: hours of scores written over by those of one more language; a prompt that replaces
    that of another run."""
    command = f"{one} --out {tmp_path}/out --languages"
    score(f"{command} aaa_Latn,bbb_Latn")
    refused(f"{command} bbb_Latn,ccc_Latn", f"out/{one.name} exists; --again writes over it")
    score(f"{command} ccc_Latn --again")
    table = read_csv(tmp_path / "out" / one.name / "test.csv")
    assert [line["language"] for line in table] == ["ccc_Latn"]


def test_means_are_of_one_backbone_and_one_source_group(world, tmp_path):
    """Catches: a mean ± deviation over runs that only share a name."""
    other = tiny_backbone(tmp_path / "other", initializer_range=0.2)
    write_run(tmp_path / "a", world)
    write_run(tmp_path / "b", world, backbone={"name": str(other), "revision": "local"})
    write_run(tmp_path / "c", world, sources=["aaa_Latn", "ccc_Latn"])
    out, _ = score(f"{tmp_path}/a {tmp_path}/b {tmp_path}/c")
    assert out.count(" 1 runs") == len(re.findall(r"\d runs", out)) == 6


def test_other_labels_are_refused(world, one, tmp_path):
    """Catches: predictions of a head whose classes mean something else, and a permuted order."""
    root = shutil.copytree(world / "data", tmp_path / "data")
    for labels in (sorted(data.LABELS), [*data.LABELS, "weather"]):
        (root / "labels.txt").write_text("\n".join(labels))
        refused(f"{one} --data {root}", f"has the labels {labels[0]}.* was trained on science")


# ---- Finding runs --------------------------------------------------------------------------------

def test_a_glob_over_a_folder_of_runs(one, tmp_path):
    """Catches: `evaluate.py dir/*` that ends, or asks the hub, at what is not a run; a damaged run
    that costs the others their scores."""
    messages = {"notes.txt": "notes.txt: no such folder", "damaged": "damaged/prompt.json: ",
                "without": "No such file or directory: '.*without/prompt.safetensors'",
                "empty": "has no prompt.json", "unfinished": "not come to an end"}
    subprocess.run(f"touch notes.txt; cp -r {one} damaged; cp -r {one} without; mkdir empty;"
                   "echo {} > damaged/prompt.json; rm without/prompt.safetensors; mkdir unfinished;"
                   "touch unfinished/metrics.jsonl", shell=True, cwd=tmp_path, check=True)
    _, err = score(" ".join(map(str, tmp_path.iterdir())))
    assert (one / "test.csv").is_file() and err.count("left out") == len(messages)
    for name, message in messages.items():
        assert re.search(message, err)
        refused(f"{tmp_path}/{name}", message)
    refused(f"{tmp_path}", "has no prompt.json: not a run")
    refused(f"{tmp_path}/empty {tmp_path}/notes.txt", "none of the 2 RUN arguments is a run")


@pytest.mark.parametrize("where", ["runs/typo", "here/typo", "/no/where", "./typo", "here/spt-*"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(where, one, tmp_path, monkeypatch):
    """Catches: minutes of retries, and a message about a hub that nobody meant."""
    monkeypatch.chdir(tmp_path)
    for name in ("here", "runs"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    for option in ("", f"{one} --backbone ", f"{one} --data "):
        refused(option + where, "no such folder")


def test_a_run_used_elsewhere(world, tmp_path, monkeypatch):
    """Catches: a run whose backbone and data are found only from the folder in which it was
    trained, or are looked for on the hub when they are gone."""
    root = shutil.copytree(world, tmp_path / "place")
    monkeypatch.chdir(root)
    arguments = "--sources config.yaml --data data --backbone backbone --mode spt --steps 2"
    assert run(train.main, *arguments.split())[0] == 0
    monkeypatch.chdir(tmp_path)
    score("place/runs/spt-two-s11")
    (root / "backbone").rename(root / "moved")
    refused("place/runs/spt-two-s11 --again", f"backbone: .*{root}/backbone|no such folder")
    score("place/runs/spt-two-s11 --text star --backbone place/moved")


def test_another_backbone_or_tokenizer_is_told(world, tmp_path):
    """Catches: a silent change of what the prompt was trained for."""
    identity = {"name": str(world / "backbone"), "revision": "local", "fingerprint": "0" * 16,
                "tokenizer": "1" * 16}
    folder = write_run(tmp_path / "run", world, backbone=identity)
    _, err = score(f"{folder} --text star")
    assert re.search("run: .*fingerprint was '0000000000000000'.*tokenizer was '1111111111111111'",
                     err)
    assert "not written" in score(str(folder))[0] and not (folder / "test.csv").exists()


# ---- Raw text ------------------------------------------------------------------------------------

def test_use_from_python(one):
    """Catches: answers in another order than the texts; one text, none, and repeated ones."""
    classifier = evaluate.load(one, "cpu", amp="off")
    texts = ["star atom cell", "beach", "vote law party near the old coast", "beach"]
    labels, probabilities = classifier(iter(texts))
    close(probabilities, torch.stack([answer_slowly(one, text) for text in texts]))
    assert labels == [classifier.labels[shares.argmax()] for shares in probabilities]
    assert classifier.labels == list(data.LABELS)
    labels, probabilities = classifier([])
    assert labels == [] and probabilities.shape == (0, 7)
    for wrong in ("star", ["star", 7]):
        with pytest.raises(ValueError, match="a list of texts|tokenizer fails"):
            classifier(wrong)


def test_threads_may_share_a_classifier(one):
    """Catches: something shared that is changed for the time of a call (a forward that is set and
    deleted, a tokenizer's truncation): 18 to 29 of 80 calls failed so."""
    classifier = evaluate.load(one, "cpu", amp="off")
    rng = np.random.default_rng(0)
    calls = [[" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 30, 5)] for _ in range(30)]
    alone = [classifier(texts)[1] for texts in calls]
    with ThreadPoolExecutor(6) as pool:
        for (_, probabilities), expected in zip(pool.map(classifier, calls), alone, strict=True):
            close(probabilities, expected)


@pytest.mark.parametrize("raw, texts", [
    ("star atom\n\nbeach\n", ["star atom", "", "beach"]), ("star", ["star"]),
    ("\ufeffstar\r\n  \nvote\u2028law\n", ["star", "", "vote law"]),
    ("star\tatom\n\n", ["star atom", ""])])
def test_lines_of_standard_input(one, monkeypatch, raw, texts):
    """Catches: blank lines that vanish, so that output is no longer beside input; a BOM or a
    carriage return that becomes text; a line separator of Unicode that breaks a line."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw.encode()), "ascii"))
    out, _ = score(f"{one} --text")
    for line, text in zip(out.removesuffix("\n").split("\n"), texts, strict=True):
        answer = line_of(one, text) if text else ["", ""]
        assert line.split("\t") == [*answer, text]


def test_texts_that_cannot_be_read(one, monkeypatch):
    """Catches: a traceback for bytes that are not UTF-8, an error without its line."""
    raw = io.BytesIO(b"one\n\ncaf\xe9\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, "ascii"))
    refused(f"{one} --text", "standard input:3: .utf-8. codec")


def test_several_runs_answer_each_text_on_one_line(world, tmp_path):
    """Catches: a text with a line break that is printed on two lines, answers of the wrong run, a
    text that is cut without a word."""
    folders = [write_run(tmp_path / f"run{seed}", world, seed, max_length=length)
               for seed, length in ((1, 6), (2, 20), (3, 6))]
    texts = "star\natom\tcell", "beach", "star atom cell beach hotel road"
    _, out, err = run(evaluate.main, *EXACT.split(), *folders, "--text", *texts)
    expected = [[folder.name, *line_of(folder, text), " ".join(text.split())]
                for folder in folders for text in texts]
    assert [line.split("\t") for line in out.splitlines()] == expected
    assert "1 of 3 texts fill or exceed data.max_length, 6 tokens" in err and "20" not in err


# ---- The command ---------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    ("RUN --device gpu", "--device gpu"),
    ("RUN --languages othrs", "no .*'othrs'"),
    ("RUN --languages ccc_Lat", r"no language 'ccc_Lat' in .*did you mean ccc_Latn"),
    ("RUN --data /no/where", "/no/where: no such folder"),
    ("RUN --export onnx x", "--export takes one RUN, the word peft and a new folder"),
    ("RUN --text caf\udce9", "--text: .*utf-8"),
    ("RUN --out RUN/prompt.json/x", "prompt.json/x"),
    ("RUN COPY --out BROKEN/out", "two runs would write to the same folder"),
    ("RUN --out BROKEN/copy --again", "another trained run"),
    ("BROKEN --text star", "not finite numbers .computed in precision")])
def test_bad_command_lines(world, one, tmp_path, arguments, message):
    """Catches: a traceback, a message without the way out, a run that answers with NaN."""
    copy = shutil.copytree(one, tmp_path / "copy" / one.name)
    (copy / "metrics.jsonl").touch()
    modules, meta = runs.load_prompt(one)
    modules["head"].out_proj.weight.data.fill_(3e38)
    runs.save_prompt(one / "..", modules, meta)
    for name, path in (("RUN", one), ("COPY", copy), ("BROKEN", tmp_path)):
        arguments = arguments.replace(name, str(path))
    refused(arguments, message)
