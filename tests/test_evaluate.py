"""evaluate.py: every figure is computed a second time, slowly; every message is matched.

    python -m pytest -q tests/test_evaluate.py

Each test says which mistake it would catch. Runs are made with xpe.save_prompt: nothing is trained.
"""
import copy
import csv
import functools
import io
import json
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import close, loud, random_texts, tiny, write_backbone, write_corpus
from safetensors.torch import save_file

import config
import data
import evaluate
import xpe

LANGUAGES = ("aaa_Latn", "bbb_Latn", "ccc_Latn")


def make_loud(module, seed):
    """Fill every parameter from N(0, 0.5): each part must show, and labels must vary."""
    return loud(module, seed, std=0.5).eval()


def write_run(folder, world, seed=11, ratio=0.5, kind="dual", **changes):
    """A run folder as train.py leaves it, its numbers drawn at random."""
    folder.mkdir(parents=True)
    prompt = None
    if kind != "full":
        prompt = make_loud(xpe.SoftPrompt(16, 4, ratio, hidden=6), seed)
    head = make_loud(xpe.ClassificationHead(16, 7), seed + 100)
    meta = {"kind": kind, "reads": "prompt", "labels": list(data.LABELS), "max_length": 20,
            "backbone": {"name": str(world / "backbone"), "revision": "local"},
            "data": {"name": str(world / "corpus"), "revision": "local"},
            "sources": ["aaa_Latn", "bbb_Latn"], "seed": seed, "training": {}}
    meta.update(changes)
    xpe.save_prompt(folder, prompt, head, meta)
    settings = {"groups": {"others": ["ccc_Latn", "bbb_Latn"]}, "targets": {"Others": "others"}}
    (folder / "config.yaml").write_bytes(config.dump_config(settings))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a backbone and a corpus."""
    root = tmp_path_factory.mktemp("world")
    write_backbone(root / "backbone")
    write_corpus(root / "corpus", LANGUAGES)
    return root


@pytest.fixture(autouse=True)
def quick_settings(monkeypatch):
    """The default config.yaml is parsed once, not 100 times."""
    def read_yaml(path, read=config.read_yaml):
        if path == config.HERE / "config.yaml":
            return copy.deepcopy(default_settings())
        return read(path)
    monkeypatch.setattr(config, "read_yaml", read_yaml)


@functools.cache
def default_settings(read=config.read_yaml):
    return read(config.HERE / "config.yaml")


@pytest.fixture
def run(world, tmp_path):
    """One run folder."""
    return write_run(tmp_path / "dual50-two-s11", world)


@pytest.fixture
def no_loading(monkeypatch):
    """A backbone must not be loaded: what is wrong has to be told before."""
    def refuse(*_, **__):
        pytest.fail("a backbone was loaded")
    monkeypatch.setattr(evaluate, "load_backbone", refuse)


def main(*arguments):
    """evaluate.main on the CPU; its status must be 0."""
    assert evaluate.main([*map(str, arguments), "--device", "cpu"]) == 0


def read_csv(path):
    """The lines of a CSV file as dicts."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def plain_classifier(backbone):
    """transformers' own classifier with this XLM-R inside."""
    settings = copy.deepcopy(backbone.config)
    settings.num_labels = 7
    whole = transformers.XLMRobertaForSequenceClassification(settings).eval()
    whole.roberta = backbone
    return whole


def plain_logits(backbone, matrix, head, ids):
    """Logits (C,) of one unpadded sentence, by transformers' own classifier."""
    whole = plain_classifier(backbone)
    whole.classifier.load_state_dict(head.state_dict())
    words = backbone.embeddings.word_embeddings.weight[torch.tensor(ids)]
    x = torch.cat((matrix, words))[None]
    with torch.no_grad():
        return whole(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2])).logits[0]


@functools.cache
def load_plainly(folder):
    """-> (backbone, tokenizer), as transformers loads them."""
    backbone = transformers.AutoModel.from_pretrained(folder).eval()
    return backbone, transformers.AutoTokenizer.from_pretrained(folder)


def answer_slowly(folder, text):
    """-> (label, probabilities) of one text, by a run folder, one step after the other."""
    prompt, head, meta = xpe.load_prompt(folder)
    backbone, tokenizer = load_plainly(meta["backbone"]["name"])
    logits = plain_logits(backbone, prompt.eval()()[0], head, tokenizer(text)["input_ids"])
    return data.LABELS[int(logits.argmax())], logits.softmax(0)


def check_probabilities(line, expected):
    """A line of test_predictions.csv holds these probabilities, in SIB-200's order."""
    for label, share in zip(data.LABELS, expected, strict=True):
        assert float(line[f"p({label})"]) == pytest.approx(float(share), abs=2e-5)


# ---- predictions and metrics ----

def test_predict_restores_the_order():
    """Catches: scores credited to the wrong sentence after sorting by length, as in the authors'
    toolkit; prompts mixed up by `owner`; padding that shows; dropout that is awake."""
    encoded = random_texts(3, 14, 1, 9, 9, 2, 30, 5, 7, 7, 1, 12)
    owner = [0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1]
    prompts = [make_loud(xpe.SoftPrompt(16, 4, 0.5, hidden=6), seed) for seed in (1, 2)]
    heads = [make_loud(xpe.ClassificationHead(16, 7), seed) for seed in (5, 6)]
    backbone = tiny()
    expected = []
    for ids, k in zip(encoded, owner):
        expected.append(plain_logits(backbone, prompts[k]()[0], heads[k], ids))
    model = xpe.PromptedClassifier(backbone, prompts, heads).train()
    for budget in (1, 40, 10_000):
        logits = evaluate.predict(model, encoded, 1, torch.tensor(owner), budget)
        close(logits, torch.stack(expected).detach())
        assert logits.dtype == torch.float32 and not logits.requires_grad
    assert evaluate.predict(model, [], 1).shape == (0, 7)


@pytest.mark.parametrize("n, classes", [(1, 7), (5, 7), (50, 3), (204, 7)])
def test_metrics(n, classes):
    """Catches: macro-F1 over classes that do not occur, or weighted; shares instead of percent."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, classes, n).tolist()
    predicted = rng.integers(0, classes, n).tolist()
    f1 = []
    for c in range(7):
        hits = sum(1 for a, b in zip(labels, predicted) if a == c and b == c)
        if c in labels or c in predicted:
            precision = hits / predicted.count(c) if c in predicted else 0
            recall = hits / labels.count(c) if c in labels else 0
            f1.append(2 * precision * recall / (precision + recall) if hits else 0)
    right = sum(1 for a, b in zip(labels, predicted) if a == b)
    assert evaluate.accuracy(labels, predicted) == pytest.approx(100 * right / n)
    assert evaluate.macro_f1(labels, predicted) == pytest.approx(100 * sum(f1) / len(f1))
    most = max(labels.count(c) for c in range(7))
    assert evaluate.majority(labels) == pytest.approx(100 * most / n)


def test_group_means_leave_sources_out():
    """Catches: sources inside a zero-shot mean, languages not scored counted as 0, -exclusions."""
    settings = {"groups": {"a": ["x", "y", "z"], "b": ["a", "w", "-y"]},
                "targets": {"A": "a", "B": "b", "C": ["v"], "D": ["x"]}}
    means = evaluate.group_means({"x": 10.0, "y": 20.0, "z": 60.0}, settings, ["x"])
    assert means == {"Sources": (10.0, 1, 1), "A": (40.0, 2, 2), "B": (60.0, 1, 2),
                     "C": (None, 0, 1), "D": (None, 0, 0)}


@pytest.mark.parametrize("kind, ratio, encoder, name", [
    ("spt", 0, "mlp", "spt"), ("xpe", 1, "mlp", "xpe"), ("dual", 0.3, "mlp", "dual30"),
    ("xpe", 1, "lstm", "xpe-lstm"), ("dual", 0.7, "none", "dual70-none"),
    ("full", 0, "lstm", "full")])
def test_method_name(kind, ratio, encoder, name):
    """Catches: two methods that share a name, and so a folder and a row of the report."""
    assert evaluate.method_name(kind, {"ratio": ratio, "encoder": encoder}) == name


# ---- scoring ----

def check_scored_run(folder, corpus):
    """Compare the files of a scored run with the corpus, each other, and a plain model."""
    predictions = read_csv(folder / "test_predictions.csv")
    assert list(predictions[0])[4:] == [f"p({label})" for label in data.LABELS]
    lines = iter(predictions)
    scores = {}
    for language in LANGUAGES:
        hits = 0
        for i, sentence in enumerate(corpus.read(language, "test")):
            line = next(lines)
            label = data.LABELS[sentence.label]
            assert (line["language"], line["index_id"]) == (language, sentence.index_id)
            assert line["label"] == label
            hits += line["predicted"] == label
            if i % 7 == 0:
                predicted, probabilities = answer_slowly(folder, sentence.text)
                assert line["predicted"] == predicted
                check_probabilities(line, probabilities)
        scores[language] = 100 * hits / 17
    assert next(lines, None) is None

    of_file = {line["language"]: float(line["accuracy"]) for line in read_csv(folder / "test.csv")}
    assert of_file == pytest.approx(scores, abs=1e-3)
    groups = json.loads((folder / "test.json").read_text())["groups"]
    sources = (scores["aaa_Latn"] + scores["bbb_Latn"]) / 2
    assert groups["Sources"]["accuracy"] == pytest.approx(sources, abs=1e-3)
    assert groups["Others"]["accuracy"] == pytest.approx(scores["ccc_Latn"], abs=1e-3)
    assert (groups["Others"]["languages"], groups["Others"]["of"]) == (1, 1)     # not bbb_Latn
    return predictions


def test_scores_are_those_of_the_predictions(world, tmp_path, capsys):
    """Catches: labels in another order than SIB-200's, predictions beside the wrong sentence or by
    the wrong run, a mean over sentences, a source among the targets, a run changed by company."""
    folders = [write_run(tmp_path / f"run{seed}", world, seed, ratio=ratio)
               for seed, ratio in ((11, 0.5), (12, 1.0), (13, 0.0))]
    main(*folders)
    assert "153 sentences of 3 languages, by 3 runs together" in capsys.readouterr().out
    corpus = data.Corpus(world / "corpus")
    predicted = []
    for folder in folders:
        predicted.append([line["predicted"] for line in check_scored_run(folder, corpus)])
    assert len(set(predicted[0] + predicted[1] + predicted[2])) > 2, "this test would see nothing"

    main(folders[1], "--out", tmp_path / "alone")
    alone = read_csv(tmp_path / "alone/run12/test_predictions.csv")
    assert [line["predicted"] for line in alone] == predicted[1]
    again = evaluate.Run(tmp_path / "alone/run12")      # what the report reads is there, too
    assert again.sources == ["aaa_Latn", "bbb_Latn"]
    assert again.config["targets"] == {"Others": "others"}


def test_which_runs_share_a_pass(world, tmp_path):
    """Catches: runs that are scored with a neighbour's maximal length, data or backbone."""
    a = evaluate.Run(write_run(tmp_path / "a", world))
    b = evaluate.Run(write_run(tmp_path / "b", world, seed=12, ratio=1.0, kind="xpe"))
    longer = evaluate.Run(write_run(tmp_path / "c", world, max_length=30))
    first = evaluate.Run(write_run(tmp_path / "d", world, reads="first"))
    full = [evaluate.Run(write_run(tmp_path / name, world, kind="full", reads="first"))
            for name in ("e", "f")]
    other_data = evaluate.Run(tmp_path / "a", data="elsewhere")
    runs = [a, longer, first, *full, b, other_data]
    alone = [[run] for run in (longer, first, *full, other_data)]
    assert evaluate.group_runs(runs) == [[a, b], *alone]


@pytest.mark.parametrize("reads", ["first", "mean", "last"])
def test_what_the_head_reads(reads, world, tmp_path):
    """Catches: a last layer that computes position 0 alone under a head that reads another one."""
    folder = write_run(tmp_path / "run", world, reads=reads)
    prompt, head, _ = xpe.load_prompt(folder)
    backbone, tokenizer = load_plainly(str(world / "backbone"))
    ids = tokenizer("star atom cell beach")["input_ids"]
    words = backbone.embeddings.word_embeddings.weight[torch.tensor(ids)]
    x = torch.cat((prompt.eval()()[0], words))[None]
    with torch.no_grad():
        h = backbone(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]))[0][0, 4:]   # (T, H)
        vector = {"first": h[0], "last": h[-1], "mean": h.mean(dim=0)}[reads]
        expected = head.eval()(vector[None]).softmax(dim=1)
    _, probabilities = evaluate.load(folder, "cpu")(["star atom cell beach"])
    close(probabilities, expected)


def test_a_fully_tuned_run_has_its_own_backbone(world, tmp_path, capsys):
    """Catches: full fine-tuning scored with the backbone it started from."""
    folder = write_run(tmp_path / "full-two-s11", world, kind="full", reads="first")
    with pytest.raises(FileNotFoundError, match="backbone.safetensors: the weights of this fully"):
        main(folder)
    backbone = transformers.AutoModel.from_pretrained(world / "backbone", add_pooling_layer=False)
    make_loud(backbone, 3)
    save_file(backbone.state_dict(), folder / "backbone.safetensors")
    main(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "backbone")
    _, head, _ = xpe.load_prompt(folder)
    sentence = data.Corpus(world / "corpus").read("ccc_Latn", "test")[5]
    ids = tokenizer(sentence.text)["input_ids"]
    expected = plain_logits(backbone.eval(), torch.empty(0, 16), head, ids).softmax(0)
    lines = read_csv(folder / "test_predictions.csv")
    line = next(x for x in lines if (x["language"], x["index_id"]) == ("ccc_Latn", "test5"))
    check_probabilities(line, expected)


def test_an_adapted_prompt_answers_for_its_own_language(world, tmp_path, capsys):
    """Catches: an adapted prompt that is scored on all languages, or on its neighbour's."""
    folders = [write_run(tmp_path / f"to-{language}", world, adapted_to=language)
               for language in ("ccc_Latn", "bbb_Latn")]
    main(*folders)
    for folder, language in zip(folders, ("ccc_Latn", "bbb_Latn")):
        assert [line["language"] for line in read_csv(folder / "test.csv")] == [language]


def test_precision_is_that_of_the_scoring_device(world, tmp_path, capsys, monkeypatch):
    """Catches: a run that was trained in bf16 on a GPU and is scored in bf16 on a laptop."""
    asked = []

    def pick(amp, device):
        asked.append((amp, device.type))
        return "bf16" if amp == "bf16" else "off"
    monkeypatch.setattr(evaluate, "pick_precision", pick)
    folder = write_run(tmp_path / "run", world, training={"settings": {"amp": "bf16"}})
    with open(folder / "config.yaml", "a") as file:
        file.write("train: {amp: bf16}\n")
    main(folder)
    summary = json.loads((folder / "test.json").read_text())
    assert (summary["precision"], summary["device"]) == ("off", "cpu")
    main(folder, "--amp", "bf16", "--again")
    assert json.loads((folder / "test.json").read_text())["precision"] == "bf16"
    assert asked == [("auto", "cpu"), ("bf16", "cpu")]


def test_optional_files_can_be_deleted(world, run, monkeypatch):
    """Catches: scoring that breaks, or changes, without speed.py and formats.py."""
    texts = ["star atom", "beach hotel road near the river"]
    _, expected = evaluate.load(run, "cpu")(texts)
    monkeypatch.setitem(sys.modules, "speed", None)
    monkeypatch.setitem(sys.modules, "formats", None)
    close(evaluate.load(run, "cpu")(texts)[1], expected)


def test_another_backbone_or_tokenizer_is_told(world, tmp_path, capsys):
    """Catches: a silent change of what the prompt was trained for."""
    identity = {"name": str(world / "backbone"), "revision": "local", "fingerprint": "0" * 16}
    evaluate.load(write_run(tmp_path / "run", world, backbone=identity, tokenizer="1" * 16), "cpu")
    warnings = capsys.readouterr().err
    assert "run: the backbone's weights (" in warnings and "with (0000000000000000)" in warnings
    assert "run: the tokenizer (" in warnings and "with (1111111111111111)" in warnings


def test_logits_that_are_no_numbers_name_the_run(world, tmp_path, monkeypatch):
    """Catches: NaN that becomes the first label, credited to nobody."""
    folders = [write_run(tmp_path / name, world, seed) for name, seed in (("a", 1), ("b", 2))]
    predict = evaluate.predict

    def spoil(*arguments):
        logits = predict(*arguments)
        logits[-1, 3] = float("nan")
        return logits
    monkeypatch.setattr(evaluate, "predict", spoil)
    with pytest.raises(ValueError, match="^b: its logits are not finite numbers"):
        main(*folders)


# ---- what is written, and where ----

def test_other_data_or_backbone_never_write_over_a_runs_own_scores(world, tmp_path, run, capsys):
    """Catches: `--data OTHER` that replaces the results of the run's own data."""
    main(run)
    own = {path.name: path.read_bytes() for path in run.iterdir()}
    write_corpus(tmp_path / "other", LANGUAGES[:2], (5, 5, 9))
    shutil.copytree(world / "backbone", tmp_path / "twin")
    for arguments, what in ((["--data", tmp_path / "other"], "data"),
                            (["--backbone", tmp_path / "twin"], "backbone")):
        capsys.readouterr()
        main(run, *arguments)
        assert f"not its own {what}, so nothing is written; --out FOLDER" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in run.iterdir()} == own
    main(run, "--data", tmp_path / "other", "--out", tmp_path / "out")
    capsys.readouterr()
    assert len(read_csv(tmp_path / "out" / run.name / "test_predictions.csv")) == 2 * 9
    # its own by another name
    main(run, "--data", world / "corpus" / ".." / "corpus", "--again")
    assert "not its own" not in capsys.readouterr().err


def test_some_languages_are_shown_and_not_written(run, capsys):
    """Catches: a test.csv of three languages that looks like that of 205; "a, b" read as one code
    with a blank; a source that is taken for a zero-shot target."""
    main(run, "--languages", "aaa_Latn, ccc_Latn")
    output = capsys.readouterr()
    assert "aaa_Latn: a source of this run, so not zero-shot" in output.err
    assert "of 2: 1 not scored" in output.out and "bbb_Latn" not in output.out
    assert "34 sentences of 2 languages, in" in output.out
    assert not (run / "test.csv").exists()
    assert "languages are named, so nothing is written; --out FOLDER keeps" in output.err
    main(run, "--groups", "others", "--split", "dev")
    assert "42 sentences of 2 languages" in capsys.readouterr().out


def test_scores_of_other_languages_are_not_lost(world, run, tmp_path, no_loading):
    """Catches: hours of scores written over by those of one more language."""
    folder = tmp_path / "out" / run.name
    folder.mkdir(parents=True)
    (folder / "test.csv").write_text("language,n,accuracy\naaa_Latn,9,1.0\nbbb_Latn,9,1.0\n")
    other = write_run(tmp_path / "before", world)       # told before the first is computed
    with pytest.raises(ValueError, match="has scores of aaa_Latn, which would be lost; --out name"):
        main(other, run, "--languages", "bbb_Latn,ccc_Latn", "--out", tmp_path / "out")


def test_other_languages_may_be_written_over_when_asked(run, tmp_path):
    """Catches: no way out of the refusal; a damaged file that refuses, too."""
    folder = tmp_path / "out" / run.name
    for wanted in (["bbb_Latn"], ["ccc_Latn", "--again"]):
        main(run, "--out", tmp_path / "out", "--languages", *wanted)
        assert [line["language"] for line in read_csv(folder / "test.csv")] == wanted[:1]
    for damaged in (b"\xff\x00language", b"n,language\n9\n"):
        (folder / "test.csv").write_bytes(damaged)
        main(run, "--out", tmp_path / "out", "--languages", "bbb_Latn")


def test_scored_runs_are_not_computed_again(world, run, tmp_path, capsys, monkeypatch):
    """Catches: hours for scores that are there; old scores shown for a new prompt or new data."""
    main(run)
    first = capsys.readouterr().out
    computed = []
    fill_group = evaluate.fill_group

    def spy(*arguments):
        computed.append(arguments)
        fill_group(*arguments)
    monkeypatch.setattr(evaluate, "fill_group", spy)
    main(run)
    second = capsys.readouterr().out
    assert not computed and "scored already; --again scores anew" in second
    assert first.splitlines()[:6] == second.splitlines()[:6]
    main(run, "--again")
    assert len(computed) == 1
    (run / "test.json").write_text("{}")
    main(run)
    assert len(computed) == 2
    prompt, head, meta = xpe.load_prompt(run)
    xpe.save_prompt(run, make_loud(prompt, 77), head, meta)
    main(run)
    assert len(computed) == 3
    shutil.copytree(world / "corpus", tmp_path / "corpus")
    with open(tmp_path / "corpus/ccc_Latn/test.tsv", "a") as file:
        file.write("new\ttravel\tbeach hotel\n")
    meta["data"]["name"] = str(tmp_path / "corpus")
    xpe.save_prompt(run, prompt, head, meta)
    main(run)
    assert len(computed) == 4


def test_scores_of_another_backbone_or_precision_are_computed(world, run, tmp_path, capsys,
                                                              monkeypatch):
    """Catches: the table of one backbone shown as that of another, float32 answered by bf16."""
    shutil.copytree(world / "backbone", tmp_path / "other")
    computed = []
    fill_group = evaluate.fill_group

    def spy(*arguments):
        computed.append(arguments)
        fill_group(*arguments)
    monkeypatch.setattr(evaluate, "fill_group", spy)
    out = ["--out", tmp_path / "scores"]
    for count, choice in enumerate([["--backbone", tmp_path / "other"], [], ["--amp", "bf16"],
                                    ["--amp", "off"]], start=1):
        main(run, *choice, *out)
        main(run, *choice, *out)
        assert len(computed) == count, choice
        named = xpe.read_json(tmp_path / "scores" / run.name / "prompt.json")["backbone"]["name"]
        assert Path(named) == (tmp_path / "other" if count == 1 else world / "backbone")


def test_targets_that_cannot_be_scored_are_told(world, tmp_path, run, capsys):
    """Catches: languages and whole groups that vanish from the table."""
    (run / "config.yaml").write_bytes(config.dump_config({
        "groups": {"others": ["ccc_Latn", "ddd_Latn", "eee_Latn"]},
        "targets": {"Others": "others", "Elsewhere": ["fff_Latn"]}}))
    shutil.copytree(world / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus/bbb_Latn/test.tsv").unlink()
    main(run, "--data", tmp_path / "corpus")
    output = capsys.readouterr()
    assert "lacks 3 of the target languages: ddd_Latn, eee_Latn, fff_Latn" in output.err
    assert "without test.tsv, so not scored: bbb_Latn" in output.err
    table = [line.split() for line in output.out.splitlines()]
    assert ["Elsewhere", "-", "-", "0", "of", "1:", "1", "not", "scored"] in table
    line = next(line for line in table if line and line[0] == "Others")
    assert line[3:] == "1 of 3: 2 not scored".split()


def test_other_labels_are_refused(world, tmp_path, run, no_loading):
    """Catches: predictions of a head whose classes mean something else, and a permuted order."""
    shutil.copytree(world / "corpus", tmp_path / "corpus")
    labels = tmp_path / "corpus/labels.txt"
    labels.write_text("\n".join(sorted(data.LABELS)) + "\n")
    with pytest.raises(ValueError, match="labels entertainment, .* on science.*write these, in"):
        main(run, "--data", tmp_path / "corpus")
    labels.write_text("\n".join([*data.LABELS, "weather"]) + "\n")
    with pytest.raises(ValueError, match="weather; .* was trained on [^;]*$"):
        main(run, "--data", tmp_path / "corpus")


@pytest.mark.parametrize("where", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_written_is_told_before_computing(where, run, tmp_path, no_loading):
    """Catches: an error after an hour of computing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written there .*; --out names another folder"):
        main(run, "--out", tmp_path / where)


def test_a_read_only_run_folder_is_told_before_computing(run, no_loading, monkeypatch):
    """Catches: the same, without --out (root may write everywhere, so the refusal is played)."""
    def refuse(dir):
        assert Path(dir) == run
        raise PermissionError(13, "Permission denied", str(dir))
    monkeypatch.setattr(evaluate.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="s11: the scores cannot be written there .Permission"):
        main(run)


def test_two_runs_of_one_name(world, tmp_path, no_loading):
    """Catches: scores of one run written over those of another."""
    folders = [write_run(tmp_path / parent / "run", world) for parent in ("a", "b")]
    with pytest.raises(ValueError, match="two of the runs would write to .*out/run"):
        main(*folders, "--out", tmp_path / "out")


def test_hostile_columns_of_csv():
    """Catches: a comma, a quote or a line break that moves the fields after it."""
    fields = ['a,b', 'say "no"', "two\nlines", None, "Zoë"]
    text = evaluate.to_csv(["x,y", "b", "c", "d", "e"], [fields]).decode()
    assert list(csv.reader(io.StringIO(text))) == [
        ["x,y", "b", "c", "d", "e"], ['a,b', 'say "no"', "two\nlines", "", "Zoë"]]


# ---- run folders ----

def test_a_glob_over_a_folder_of_runs(world, tmp_path, run, capsys):
    """Catches: `evaluate.py dir/*` that ends, or asks the hub, at what is no run."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/checkpoint.pt").write_text("")
    for name in ("damaged", "without_tensors"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "damaged/prompt.json").write_text("{}")
    (tmp_path / "without_tensors/prompt.safetensors").unlink()
    main(*sorted(tmp_path.iterdir()))
    warnings = capsys.readouterr().err
    assert "left out: " in warnings and "damaged/prompt.json: format is None" in warnings
    assert "without_tensors: prompt.safetensors, the trained tensors, is missing" in warnings
    assert "empty: holds no prompt.json" in warnings and "notes.txt: is a file" in warnings
    assert "unfinished: its training has not come to an end" in warnings
    assert (run / "test.csv").is_file()
    for name, message in (("empty", "holds no prompt.json"), ("notes.txt", "is a file"),
                          ("unfinished", "not come to an end"), ("", "holds runs, but is none"),
                          ("without_tensors", "is missing")):
        with pytest.raises(FileNotFoundError, match=message):
            main(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none of the 2 RUN arguments is a run"):
        main(tmp_path / "empty", tmp_path / "notes.txt")


@pytest.mark.parametrize("where, message", [
    ("runs/typo", "runs/typo: no such run folder"), ("here/typo", "here/typo: no such run folder"),
    ("/no/where", "/no/where: no such run folder"), ("typo", "typo: no such run folder"),
    ("here/spt-*", r"here/spt-\*: no folder matches")])
def test_a_missing_folder_is_not_looked_for_on_the_hub(where, message, tmp_path, monkeypatch):
    """Catches: minutes of retries, and a message about a hub that nobody meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(evaluate, "download", None)
    with pytest.raises(FileNotFoundError, match=message):
        evaluate.Run(where)


def test_a_run_from_the_hub(run, tmp_path, monkeypatch):
    """Catches: a branch that is not asked for; scores written into the hub's cache."""
    monkeypatch.setattr(evaluate, "download", lambda *asked: (seen.append(asked), run)[1])
    seen = []
    opened = evaluate.Run("someone/prompts@seed-3")
    assert seen[0][:3] == ("someone/prompts", "seed-3", "model")
    assert opened.results == Path("runs/someone--prompts@seed-3") and opened.folder == run
    assert evaluate.Run("someone/prompts").meta["seed"] == 11 and seen[1][1] == "main"


@pytest.mark.parametrize("name, sources, seed", [
    ("xpe-joshi5@seed-07", 7, 7), ("spt-seen@seed-12", 92, 12), ("something", 7, 1)])
def test_a_release_of_the_authors(name, sources, seed, world, tmp_path, capsys):
    """Catches: labels called 0 to 6, sources that count as targets, files in their folder."""
    folder = tmp_path / name
    folder.mkdir()
    prompt = make_loud(xpe.SoftPrompt(16, 4, 0.0), 1)
    head = make_loud(xpe.ClassificationHead(16, 7), 2)
    tensors = {f"base_model.classifier.{key}": value for key, value in head.state_dict().items()}
    tensors["prompt_encoder.embedding.weight"] = prompt.standard.detach()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "XPE", "encoder_ratio": 0.0, "token_dim": 16, "num_virtual_tokens": 4,
        "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 4, "encoder_num_layers": 2,
        "encoder_dropout": 0.1, "base_model_name_or_path": "FacebookAI/xlm-roberta-large"}))
    opened = evaluate.Run(folder)
    assert opened.meta["labels"] == list(data.LABELS) and opened.released
    assert (len(opened.sources), opened.meta["seed"]) == (sources, seed)
    assert opened.results == Path("runs") / name
    assert opened.config["backbone"]["name"] == "FacebookAI/xlm-roberta-large"
    close(opened.prompt()[0], prompt.standard)
    assert ("its name says no source group" in capsys.readouterr().err) == (name == "something")
    local = ["--backbone", world / "backbone", "--data", world / "corpus"]
    main(folder, *local, "--out", tmp_path / "out")
    lines = read_csv(tmp_path / "out" / name / "test.csv")
    assert [line["language"] for line in lines] == list(LANGUAGES)
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert f"Sources - - 0 of {sources}: {sources} not scored".split() in cells
    assert evaluate.Run(tmp_path / "out" / name).sources == opened.sources
    assert len(list(folder.iterdir())) == 2


def test_files_that_are_missing_from_a_run(run, capsys):
    """Catches: groups that change in silence, a folder without its tensors called finished."""
    (run / "config.yaml").unlink()
    assert "Low-performing" in evaluate.Run(run).config["targets"]
    assert "config.yaml is missing: the target groups are those of" in capsys.readouterr().err
    (run / "prompt.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="prompt.safetensors, the trained tensors, is"):
        evaluate.Run(run)


@pytest.mark.parametrize("sources", [None, "aaa_Latn", [1], {}])
def test_sources_that_make_no_sense(sources, world, tmp_path):
    """Catches: a traceback, or letters of a code taken for languages."""
    folder = write_run(tmp_path / "run", world, sources=sources)
    with pytest.raises(ValueError, match="prompt.json: 'sources' must be a list of language codes"):
        evaluate.Run(folder)


def test_backbone_and_data_are_those_of_the_training(world, tmp_path):
    """Catches: scores on the hub's newest files instead of the commit met in training; the word
    for a folder taken for a branch."""
    backbone = {"name": "someone/encoder", "revision": "c0ffee"}
    opened = evaluate.Run(write_run(tmp_path / "run", world, backbone=backbone))
    assert opened.config["backbone"]["name"] == "someone/encoder"
    assert opened.config["backbone"]["revision"] == "c0ffee"
    assert opened.config["data"]["revision"] == "main" and opened.changed == []
    opened = evaluate.Run(tmp_path / "run", backbone="someone/encoder")     # its own
    assert opened.config["backbone"]["revision"] == "c0ffee" and opened.changed == []
    opened = evaluate.Run(tmp_path / "run", backbone="another/encoder")
    assert opened.config["backbone"]["revision"] == "main" and opened.changed == ["backbone"]


def test_a_backbones_code_is_not_trusted_because_a_run_says_so(run):
    """Catches: a run folder from elsewhere whose config.yaml has its backbone's code run."""
    with open(run / "config.yaml", "a") as file:
        file.write("backbone: {trust_remote_code: true}\n")
    assert evaluate.Run(run).config["backbone"]["trust_remote_code"] is False
    assert evaluate.Run(run, trust=True).config["backbone"]["trust_remote_code"] is True


# ---- raw text ----

def test_use_from_python(run, capsys):
    """Catches: answers in another order than the texts; one text, none, and repeated ones."""
    classifier = evaluate.load(run, device="cpu")
    texts = ["star atom cell", "beach", "vote law party near the old coast", "beach"]
    labels, probabilities = classifier(texts)
    for text, label, shares in zip(texts, labels, probabilities, strict=True):
        expected_label, expected = answer_slowly(run, text)
        assert label == expected_label
        close(shares, expected.detach())
    assert probabilities.sum(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert classifier.labels == list(data.LABELS)
    labels, probabilities = classifier([])
    assert labels == [] and probabilities.shape == (0, 7)
    assert classifier(text for text in texts[:1])[0] == classifier(texts[:1])[0]
    with pytest.raises(TypeError, match="a list of texts, not one text"):
        classifier("star atom")
    with pytest.raises(TypeError, match="text 1 is no text but nan"):
        classifier(["star", float("nan")])
    assert capsys.readouterr().err == ""


def test_threads_may_share_a_classifier(run):
    """Catches: something shared that is changed for the time of a call (a forward that is set and
    deleted, a tokenizer's truncation): 18 to 29 of 80 calls failed so."""
    classifier = evaluate.load(run, device="cpu")
    rng = np.random.default_rng(0)
    words = "star atom beach hotel road vote law party goal near the old coast".split()
    calls = [[" ".join(rng.choice(words, n)) for n in rng.integers(1, 17, 5)] for _ in range(30)]
    alone = [classifier(texts) for texts in calls]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(classifier, calls))
    for (labels, probabilities), (expected_labels, expected) in zip(together, alone, strict=True):
        assert labels == expected_labels
        close(probabilities, expected)


def classify_stdin(raw, monkeypatch, capsys, *arguments):
    """What `evaluate.py ... --text` prints for these bytes of standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
    capsys.readouterr()
    main(*arguments, "--text")
    return capsys.readouterr().out.removesuffix("\n").split("\n")


def test_lines_of_standard_input(run, monkeypatch, capsys):
    """Catches: blank lines that vanish, so that output is no longer beside input; a BOM or a
    carriage return that becomes text; a line separator of Unicode that breaks a line."""
    text = "\ufeffstar atom\n\nbeach hotel\r\n  \nvote\u2028law".encode()
    lines = classify_stdin(text, monkeypatch, capsys, run)
    assert len(text.decode().split("\n")) == 5
    fields = [line.split("\t") for line in lines]
    assert [field[2] for field in fields] == ["star atom", "", "beach hotel", "  ", "vote\u2028law"]
    assert [bool(field[0]) for field in fields] == [True, False, True, False, True]
    for label, share, text in fields:
        if label:
            expected, probabilities = answer_slowly(run, text)
            assert label == expected and share == f"{probabilities.max():.3f}"
    assert len(classify_stdin(b"star\n", monkeypatch, capsys, run)) == 1


def test_texts_that_cannot_be_read(run, monkeypatch, capsys, no_loading):
    """Catches: a traceback for bytes that are no UTF-8, an error without its line."""
    with pytest.raises(ValueError, match=r"standard input:3: this is not UTF-8 text \(byte 0xe9\)"):
        classify_stdin(b"one\n\ncaf\xe9\n", monkeypatch, capsys, run)
    with pytest.raises(ValueError, match="--text: text 2 is not UTF-8"):
        main(run, "--text", "one", "caf\udce9")
    for raw in (b"", b"\n \n"):
        with pytest.raises(ValueError, match="--text: nothing to classify"):
            classify_stdin(raw, monkeypatch, capsys, run)


def test_several_runs_answer_each_text_on_one_line(world, tmp_path, capsys):
    """Catches: a text with a line break that is printed on two lines, answers of the wrong run."""
    folders = [write_run(tmp_path / f"run{seed}", world, seed) for seed in (1, 2)]
    folders.append(write_run(tmp_path / "run3", world, 3, max_length=30))
    texts = ["star\natom\tcell", "beach"]
    main(*folders, "--text", *texts)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["run1", "run2", "run3"] * 2
    assert [line[3] for line in lines] == ["star\\natom\\tcell"] * 3 + ["beach"] * 3
    for i in range(6):
        assert lines[i][1] == answer_slowly(folders[i % 3], texts[i // 3])[0]


def test_a_terminal_that_cannot_show_a_letter(run, monkeypatch):
    """Catches: output that ends half-way at the first letter that its encoding does not have."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    main(run, "--text", "star", "Привет", "beach")
    sys.stdout.flush()
    lines = raw.getvalue().decode("cp1252").splitlines()
    assert len(lines) == 3 and lines[1].endswith("\\u041f\\u0440\\u0438\\u0432\\u0435\\u0442")


def test_texts_that_were_cut_are_told(world, tmp_path, capsys):
    """Catches: texts longer than max_length that are cut in silence."""
    folder = write_run(tmp_path / "run", world, max_length=6)
    main(folder, "--text", "star atom", "a of in and new", "star atom cell beach")
    assert "warning: 1 of 3 texts cut at 6 tokens" in capsys.readouterr().err
    main(folder)
    corpus = data.Corpus(world / "corpus")
    texts = {sentence.text for code in LANGUAGES for sentence in corpus.read(code, "test")}
    cut = sum(len(text.split()) + 2 > 6 for text in texts)
    assert f"warning: {cut} of {len(texts)} texts cut at 6 tokens" in capsys.readouterr().err


# ---- the command ----

@pytest.mark.parametrize("arguments, message", [
    ([], "RUN is missing: name one or more run folders"),
    (["--text", "hi", "RUN"], "--text takes everything behind it, so the run comes first: "),
    (["RUN", "--device", "gpu"], "--device gpu"),
    (["RUN", "--groups", "othrs"], r"--groups: no group 'othrs' \(did you mean others\?\)"),
    (["RUN", "--languages", "ccc_Lat"], r"no language 'ccc_Lat' in .*did you mean ccc_Latn"),
    (["RUN", "--languages=-ccc_Latn"], "no language '-ccc_Latn'"),
    (["RUN", "--export", "onnx", "x"], "--export takes one RUN, the word peft and a new folder"),
    (["RUN", "--data", "/no/where"], "data.name: '/no/where' is neither a folder nor"),
    (["RUN", "--out", "x", "--again", "--text", "hi"], "--out, --again: not with --text, which sc"),
    (["RUN", "--export", "peft", "x", "--backbone", "b"], "--backbone: not with --export, which"),
    (["RUN", "--export", "peft", "x", "--text", "hi"], "--text and --export: one of them"),
])
def test_bad_command_lines(arguments, message, run, no_loading):
    """Catches: a traceback, a message without the way out, an error after loading the backbone."""
    arguments = [str(run) if argument == "RUN" and i == 0 else argument
                 for i, argument in enumerate(arguments)]
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.main(arguments)


def test_export(run, tmp_path, capsys):
    """Catches: an option that does not reach formats.py."""
    prompt, head, meta = xpe.load_prompt(run)
    meta["backbone"]["type"] = "xlm-roberta"
    xpe.save_prompt(run, prompt, head, meta)
    main(run, "--export", "peft", tmp_path / "peft")
    assert (tmp_path / "peft/adapter_config.json").is_file()
    assert shlex.quote(str(tmp_path / "peft")) in capsys.readouterr().out
