"""data.py: files read strictly, tokens and batches, the hub's client, the command.

    pytest tests/test_data.py                       (about 5 s)
    SIB200=FOLDER pytest tests/test_data.py         all of SIB-200, in FOLDER/data and languages.csv
"""
import csv
import hashlib
import io
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

import config
import data

SIB200 = Path(os.environ.get("SIB200", "no/copy"))
HEAD = "index_id\tcategory\ttext\n"


def write(path, content):
    """Write text or bytes into a file and its folders -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def exit_of(main):
    """Run a main as a script does -> its exit status."""
    with pytest.raises(SystemExit) as end:
        data.run_main(main)
    return end.value.code or 0


# TSV

TRICKY_TEXTS = ['He said "no"', " blanks \u00a0at the edges ", "e\u0301 NFD, \u0958 too",
                "a\u2028b\u0085c\x0bd\x1ce", '"', "\ufeffinside", "it's 5'' long",
                "\u200b\u0627\u200f"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_tricky_texts_come_back_as_written(tmp_path, start, line_end):
    """Catches: splitting at quotes or at other separators than the line's, strip, normalisation."""
    content = io.StringIO(newline="")
    writer = csv.writer(content, delimiter="\t", lineterminator=line_end)
    writer.writerow(["index_id", "category", "text"])
    for i, text in enumerate(TRICKY_TEXTS):
        writer.writerow([i, data.LABELS[i % 7], text])
    assert 'He said ""no""' in content.getvalue()
    path = write(tmp_path / "x.tsv", start + content.getvalue() + line_end)     # an empty line last
    assert data.read_tsv(path) == [(str(i), i % 7, text) for i, text in enumerate(TRICKY_TEXTS)]


def test_columns_are_found_by_name(tmp_path):
    """Catches: columns taken by their place; a file without index_id refused."""
    path = write(tmp_path / "x.tsv", "text\tnote\tcategory\nHallo\tx\tb\nWelt\tx\ta\n")
    assert data.read_tsv(path, ("a", "b")) == [("0", 1, "Hallo"), ("1", 0, "Welt")]


@pytest.mark.parametrize("content, message", [
    ("", r"x\.tsv:1: the header must name a column 'category' once, it is \[\]"),
    ("\n\n", r"x\.tsv:1: the header must name a column 'category' once, it is \[\]"),
    (HEAD, r"x\.tsv: no sentence in this split"),
    ("index_id\tcategory\n1\ttravel\n", r"x\.tsv:1: the header must name a column 'text' once"),
    ("1\ttravel\tHello\n", r"x\.tsv:1: the header must name .* it is \['1', 'travel', 'Hello'\]"),
    ("category\ttext\ttext\n", r"x\.tsv:1: .*'text' once"),
    (HEAD + "1\ttravel\tHello\n2\ttravels\tHello\n", r"x\.tsv:3: unknown category 'travels', "),
    (HEAD + "1\tTravel\tHello\n", r"x\.tsv:2: unknown category 'Travel'.* in a file labels\.txt"),
    (HEAD + "1\ttravel\n", r"x\.tsv:2: 2 fields, but the header has 3"),
    (HEAD + "1\ttravel\ta\tb\n", r"x\.tsv:2: 4 fields, but the header has 3"),
    (HEAD + "1\ttravel\t \u00a0\n", r"x\.tsv:2: empty text"),
    (HEAD + "1\ttravel\ta\n\n1\ttravel\tb\n", r"x\.tsv:4: index_id '1' is also that of line 2"),
    (HEAD + "1\ttravel\ta\n2\ttravel\tb\0\n", r"x\.tsv:3: this is not UTF-8 text \(byte 0x00\)"),
    (HEAD.encode() + b"1\ttravel\ta\n2\ttravel\t\xff\n", r"x\.tsv:3: .*not UTF-8 .*0xff"),
    (b"\xef\xbb\xbf" + HEAD.encode() + b"1\ttravel\t\xe4\n", r"x\.tsv:2: .*not UTF-8 .*0xe4"),
    (HEAD.encode("utf-16"), r"x\.tsv:1: .*not UTF-8"),
    (HEAD + "1\ttravel\t" + "a" * 200_000, r"x\.tsv:2: field larger"),
])
def test_a_bad_file_is_refused(tmp_path, content, message):
    """Catches: lines that are skipped or read wrongly; messages without file and line."""
    with pytest.raises(ValueError, match=message):
        data.read_tsv(write(tmp_path / "x.tsv", content))


@pytest.mark.parametrize("bad", [
    '2\ttravel\t"Yes, he said\n3\ttravel\tb\n4\ttravel\tand no"\n',   # closed two lines later
    '2\ttravel\t"Yes\n3\ttravel\tb\n',                                  # never closed
    '2\ttravel\t"Yes" he said\n',                                   # more after the closing quote
    '2\t"travel\tYes"\n3\ttravel\tb\n',                                 # swallows a tab
    '2\ttravel\t"Yes\r3\ttravel\tb"\n',
    '2\ttravel\t"two\nlines"\n',
])
def test_a_stray_quote_is_told_where_its_field_begins(tmp_path, bad):
    """Catches: sentences swallowed in silence by a field that began with a quote."""
    with pytest.raises(ValueError, match=r"x\.tsv:4: .*stray quote"):
        data.read_tsv(write(tmp_path / "x.tsv", HEAD + "1\ttravel\ta\n\n" + bad + "9\ttravel\tz\n"))


# Corpus

@pytest.fixture
def corpus_folder(tmp_path):
    """eng_Latn with three splits, arb_Arab with train and an empty test, a folder without any."""
    sentences = HEAD + "1\ttravel\ta\n2\tgeography\tb\n"
    for name in ("train", "validation", "test"):
        write(tmp_path / "eng_Latn" / f"{name}.tsv", sentences)
    write(tmp_path / "arb_Arab" / "train.tsv", sentences)
    write(tmp_path / "arb_Arab" / "test.tsv", HEAD)
    write(tmp_path / "notes" / "readme.txt", "not a language")
    return tmp_path


def test_a_corpus_knows_its_languages_and_splits(corpus_folder):
    """Catches: alphabetical labels, which permute the head; `validation` and `dev` told apart."""
    corpus = data.Corpus(corpus_folder)
    assert corpus.languages() == ["arb_Arab", "eng_Latn"]
    assert corpus.labels == data.LABELS
    assert corpus.splits("eng_Latn") == ["train", "dev", "test"]
    assert corpus.splits("arb_Arab") == ["train", "test"]
    for split in ("train", "dev", "validation"):
        assert corpus.read("eng_Latn", split) == [("1", 1, "a"), ("2", 6, "b")]


@pytest.mark.parametrize("language, split, message", [
    ("eng_Lat", "test", r"no language 'eng_Lat' in .*did you mean eng_Latn\?"),
    ("../eng_Latn", "test", "no language '../eng_Latn'"),
    (".", "test", "no language"),
    ("notes", "test", "no language 'notes'"),
    ("/etc", "test", "no language"),
    ("arb_Arab", "dev", r"arb_Arab.dev\.tsv: no such split; arb_Arab has test\.tsv, train\.tsv"),
    ("arb_Arab", "test", r"test\.tsv: no sentence in this split"),
])
def test_what_a_corpus_lacks_is_told(corpus_folder, language, split, message):
    """Catches: codes that leave the folder, missing splits read as empty ones."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.Corpus(corpus_folder).read(language, split)


def test_a_folder_without_languages_is_told(corpus_folder):
    """Catches: a mistyped folder that counts as an empty corpus."""
    for name in ("none", "notes"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no folder <language>"):
            data.Corpus(corpus_folder / name)
    with pytest.raises(FileNotFoundError, match="No such file"):
        data.read_tsv(corpus_folder / "none.tsv")


def test_two_files_of_one_split_are_refused(corpus_folder):
    """Catches: validation.tsv ignored in silence because dev.tsv is there too."""
    write(corpus_folder / "eng_Latn" / "dev.tsv", HEAD)
    with pytest.raises(ValueError, match=r"validation\.tsv: dev\.tsv is the same split"):
        data.Corpus(corpus_folder)


def labels_of(folder, shared=None, **of_languages):
    """Write files labels.txt -> the labels of the corpus."""
    for name, content in of_languages.items():
        write(folder / name / "train.tsv", HEAD)
        if content:
            write(folder / name / "labels.txt", content)
    if shared:
        write(folder / "labels.txt", shared)
    return data.Corpus(folder).labels


def test_labels_keep_the_order_of_their_file(tmp_path, capsys):
    """Catches: a labels.txt that is ignored, sorted, or read with its byte order mark."""
    write(tmp_path / "eng_Latn" / "train.tsv", HEAD + "1\tzebra\ta\n2\tant\tb\n")
    write(tmp_path / "eng_Latn" / "labels.txt", "\ufeffzebra\r\nant\r\n")
    corpus = data.Corpus(tmp_path)
    assert corpus.labels == ("zebra", "ant")
    assert [sentence.label for sentence in corpus.read("eng_Latn", "train")] == [0, 1]
    assert capsys.readouterr().err == ""


def test_labels_that_differ_by_language_are_joined_and_told(tmp_path, capsys):
    """Catches: a corpus refused because each language names only the classes that occur there."""
    labels = labels_of(tmp_path, bbb="sport\nfood\nlaw\n", aaa="sport\nlaw\n", ccc=None)
    assert labels == ("sport", "law", "food")
    assert capsys.readouterr().err.endswith("order of first mention: sport, law, food\n")


def test_the_labels_beside_the_languages_win_if_they_hold_all(tmp_path, capsys):
    """Catches: the file that gives the order for all languages refused, or reordered."""
    languages = dict(aaa="sport\nlaw\n", bbb="sport\nfood\nlaw\n")
    labels = labels_of(tmp_path, "law\nfood\nsport\nart\n", **languages)
    assert labels == ("law", "food", "sport", "art")
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"bbb.labels\.txt: label 'food' is missing in "):
        labels_of(tmp_path, "law\nsport\n", **languages)


@pytest.mark.parametrize("content, message", [
    ("ant\nant\n", r"labels\.txt: must name two or more labels, each once"),
    ("ant\n", "two or more"),
    (b"ok\n\xff\n", r"labels\.txt:2: this is not UTF-8 text \(byte 0xff\)"),
])
def test_a_bad_labels_file_is_refused(tmp_path, content, message):
    """Catches: a label that no sentence can have, a classifier of one class."""
    with pytest.raises(ValueError, match=message):
        labels_of(tmp_path, content, aaa=None)


def test_a_fingerprint_sees_all_of_the_data():
    """Catches: a fingerprint that does not see an id, a label, a text or their order."""
    first, second = data.Sentence("1", 2, "a"), data.Sentence("2", 3, "b")
    others = [[second, first], [first]]
    for change in (dict(label=2), dict(text="b "), dict(text="\ud800"), dict(index_id="3")):
        others.append([first, second._replace(**change)])
    fingerprints = {data.fingerprint(sentences) for sentences in [[first, second], *others]}
    assert len(fingerprints) == 7
    assert data.fingerprint([first, second]) == "394b0739f86dfb9b"      # as runs have saved it


# Token ids

class Words:
    """A tokenizer: a token for each word, 0 and 2 around a text, max_length kept as a state."""

    def __call__(self, texts, truncation, max_length, **_):
        self.limit = max_length
        ids = []
        for text in texts:
            words = [len(word) for word in text.split()]
            ids.append([0, *words[:self.limit - 2], 2])
        return {"input_ids": ids}


def test_encode_counts_the_texts_that_it_cuts(monkeypatch):
    """Catches: texts cut in silence, or counted though they fit; </s> lost; parts out of order."""
    monkeypatch.setattr(data, "TEXTS_AT_ONCE", 2)
    texts = ["a bb ccc", "a bb", "a bb ccc dddd", "a", "eeeee bb ccc"]
    encoded, cut = data.encode(texts, Words(), 4)
    assert [ids.tolist() for ids in encoded] == [
        [0, 1, 2, 2], [0, 1, 2, 2], [0, 1, 2, 2], [0, 1, 2], [0, 5, 2, 2]]
    assert cut == 3
    assert all(ids.dtype == np.int32 for ids in encoded)
    assert data.encode(texts, Words(), 6)[1] == 0
    assert data.encode([], Words(), 6) == ([], 0)


def test_encode_in_several_threads():
    """Catches: a thread that changes the max_length of a tokenizer that another one is using."""
    tokenizer = Words()
    failures = []

    def encode_often():
        for _ in range(300):
            encoded, cut = data.encode(["a bb ccc dddd", "a"] * 5, tokenizer, 4)
            if cut != 5 or max(len(ids) for ids in encoded) != 4:
                failures.append(cut)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=encode_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch)
    assert failures == []


def test_collate_pads_on_the_right():
    """Catches: left padding, which shifts XLM-R's positions; a pad id in a text as padding."""
    input_ids, attention_mask = data.collate([[5, 1, 7], [8], [9, 9, 9, 9]], pad_id=1)
    assert input_ids.dtype == attention_mask.dtype == torch.int64
    assert input_ids.tolist() == [[5, 1, 7, 1], [8, 1, 1, 1], [9, 9, 9, 9]]
    assert attention_mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


# Batches: lengths as those of SIB-200 with a tokenizer of 12,000 word pieces

JOSHI5 = np.clip(np.random.default_rng(5).gamma(7.0, 8.2, 4907).astype(int), 13, 164)
ONE_LANGUAGE = np.clip(np.random.default_rng(6).gamma(9.0, 5.7, 701).astype(int), 16, 120)


def padding_of(lengths, batches):
    """Return the share of padding in percent."""
    computed = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 100 * (1 - sum(lengths[batch].sum() for batch in batches) / computed)


@pytest.mark.parametrize("count, batch_size", [
    (4907, 32), (701, 32), (64, 32), (5, 32), (33, 32), (3, 1)])
def test_an_epoch_holds_each_sentence_once(count, batch_size):
    """Catches: sentences left out or doubled, and more than one small batch."""
    for epoch in range(3):
        batches = data.length_batches(JOSHI5[:count], batch_size, 11, epoch)
        assert sorted(np.concatenate(batches)) == list(range(count))
        small = count % batch_size
        assert sorted(len(batch) for batch in batches) == (
            [small] * (small > 0) + [batch_size] * (count // batch_size))


def test_batches_are_a_function_of_seed_and_epoch():
    """Catches: a resumed run with other batches than the run that was not interrupted."""
    np.random.seed(1)
    first = data.length_batches(JOSHI5, 32, 11, 4)
    np.random.seed(2)
    again = data.length_batches(JOSHI5.tolist(), 32, 11, 4)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for seed, epoch in ((12, 4), (11, 5)):
        other = data.length_batches(JOSHI5, 32, seed, epoch)
        assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other}


@pytest.mark.parametrize("lengths, alone, joined", [(JOSHI5, 6, 6.5), (ONE_LANGUAGE, 9, 10)])
def test_learners_of_a_pass_join_with_little_padding(lengths, alone, joined):
    """Catches: steps at which learners' batches differ in size or length; padding of a third."""
    for epoch in range(2):
        ten_seeds = [data.length_batches(lengths, 32, seed, epoch) for seed in range(11, 21)]
        for batches in ten_seeds:
            assert padding_of(lengths, batches) < alone
        steps = list(zip(*ten_seeds, strict=True))
        assert all(len({len(batch) for batch in step}) == 1 for step in steps)
        assert padding_of(lengths, [np.concatenate(step) for step in steps]) < joined
        means = [lengths[batch].mean() for batch in ten_seeds[0]]
        assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5          # shuffled, not sorted


def test_the_small_batch_is_not_always_that_of_the_longest():
    """Catches: the longest sentences always in the small batch, each counting 2.9 times."""
    means = []
    for epoch in range(60):
        batches = data.length_batches(JOSHI5, 32, 11, epoch)
        small, = [batch for batch in batches if len(batch) == 4907 % 32]
        means.append(JOSHI5[small].mean())
    below_median = np.mean(np.array(means) < np.median(JOSHI5))
    assert 0.3 < below_median < 0.7


def test_sentences_meet_others_in_later_epochs():
    """Catches: too little noise: one language's batches nearly the same in each epoch (98 %)."""
    together = np.zeros((11, 701, 701), dtype=bool)
    for epoch in range(11):
        for batch in data.length_batches(ONE_LANGUAGE, 32, 11, epoch):
            together[epoch][np.ix_(batch, batch)] = True
    first = together[0] & ~np.eye(701, dtype=bool)
    meet_again = (first & together[1:].any(axis=0)).sum() / first.sum()
    assert meet_again < 0.91


@pytest.mark.parametrize("budget, extra", [(4096, 20), (1000, 0), (100, 20), (1, 0)])
def test_evaluation_batches_keep_the_budget(budget, extra):
    """Catches: a budget overrun, texts lost at the end, an endless loop at a text above it."""
    batches = data.token_batches(JOSHI5.tolist(), budget, extra)
    assert sorted(np.concatenate(batches)) == list(range(4907))
    longest = [JOSHI5[batch].max() + extra for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, size in zip(batches, longest):
        assert len(batch) == 1 or len(batch) * size <= budget
        if len(batch) > data.FREE_TEXTS:
            assert JOSHI5[batch].min() + extra >= 0.95 * size


def test_evaluation_batches_of_nothing():
    """Catches: an index error where there is nothing to score."""
    assert data.token_batches([], 100) == []


# The hub (its faults, over a real connection: test_robustness.py)

def make_snapshot(folder, files):
    """Write a snapshot as in the hub's cache: links to files named by hashes -> its folder."""
    snapshot = folder / "snapshots" / ("c" * 40)
    for name, content in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if len(content) > 1000:                                 # as the hub does with large files
            blob = hashlib.sha256(content).hexdigest()
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(write(folder / "blobs" / blob, content))
    return snapshot


@pytest.fixture
def snapshot(tmp_path):
    """A repository with small files, of known and of unknown names, and weights."""
    return make_snapshot(tmp_path, {
        "config.json": b"{}", "bpe.codes": b"w 1", "data/a/train.tsv": b"x" * 2000,
        "model.safetensors": b"y" * 3000, "onnx/model.onnx": b"z" * 3000})


def test_whole_files_are_left_alone(snapshot):
    """Catches: a hash computed wrongly, or files without a hash in their name removed."""
    (snapshot / "no_link.txt").write_text("local")
    (snapshot / "other.txt").symlink_to(write(snapshot / "blobs" / "no-hash", "?"))
    data.verify(snapshot)
    assert len(list(snapshot.rglob("*.*"))) == 7


@pytest.mark.parametrize("patterns, leave_out, damaged", [
    (None, None, {"bpe.codes", "data/a/train.tsv", "onnx/model.onnx"}),
    (["data/*.tsv", "*.json"], None, {"data/a/train.tsv"}),
    (None, ["*.onnx", "*.tsv"], {"bpe.codes"}),
    (["*.codes", "*.onnx"], ["onnx/*"], {"bpe.codes"}),
    (["*.json"], None, set()),
    (None, ["*.codes", "*.tsv", "*.onnx"], set()),
])
def test_damaged_files_that_were_asked_for_are_removed(snapshot, patterns, leave_out, damaged):
    """Catches: changed content of equal size taken for good; a cache made unusable by a file that
    nobody asked for."""
    for name in ("bpe.codes", "data/a/train.tsv", "onnx/model.onnx"):
        size = (snapshot / name).stat().st_size
        (snapshot / name).resolve().write_bytes(b"!" * size)
    if damaged:
        with pytest.raises(ConnectionError, match=f"{len(damaged)} files have other content"):
            data.verify(snapshot, patterns, leave_out)
    else:
        data.verify(snapshot, patterns, leave_out)
    links = [path for path in snapshot.rglob("*") if path.is_symlink()]
    assert {str(link.relative_to(snapshot)) for link in links if not link.exists()} == damaged


class ReadTimeout(Exception):
    """Named as httpx's error."""


def answered(status):
    """An error of the client that holds the server's status."""
    error = Exception(f"the server says {status}\nand more")
    error.response = types.SimpleNamespace(status_code=status)
    return error


@pytest.fixture
def client(monkeypatch):
    """A hub's client that raises .errors in turn, then fetches what is missing of .announced and
    returns .folder; it notes .calls and .waits."""
    client = types.SimpleNamespace(errors=[], folder=None, announced={}, calls=[], waits=[])

    def snapshot_download(name, **settings):
        client.calls.append((name, settings))
        if client.errors:
            raise client.errors.pop(0)
        for blob, content in client.announced.items():
            if not blob.exists():
                blob.write_bytes(content)
        return str(client.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(data.time, "sleep", client.waits.append)
    return client


def test_a_download_asks_for_what_it_should(client, snapshot):
    """Catches: patterns that do not reach the client, small files such as bpe.codes left out."""
    client.folder = snapshot
    assert data.download("a/b", "main", "model", leave_out=["*.bin"]) == snapshot
    assert client.calls == [("a/b", dict(repo_type="model", revision="main", max_workers=4,
                                         allow_patterns=None, ignore_patterns=["*.bin"]))]
    assert data.download("a/b", "v1", "dataset", ["data/*"]) == snapshot
    assert client.calls[1][1]["allow_patterns"] == ["data/*"]
    assert client.waits == []


def test_temporary_trouble_is_tried_again(client, snapshot):
    """Catches: a run that ends at a busy server; an answer in the cause of the error overlooked."""
    client.folder = snapshot
    wrapped = Exception("not in the cache")
    wrapped.__cause__ = answered(429)
    client.errors = [answered(503), ReadTimeout("slow"), wrapped]
    assert data.download("a/b", "main", "model") == snapshot
    assert client.waits == [1, 4, 16]


def test_a_damaged_file_is_fetched_anew(client, snapshot):
    """Catches: a damaged file that ends the run, or is taken, though the hub has a good one."""
    client.folder = snapshot
    blob = (snapshot / "config.json").resolve()
    client.announced = {blob: blob.read_bytes()}
    blob.write_bytes(b"!!")
    assert data.download("a/b", "main", "model") == snapshot
    assert (client.waits, len(client.calls)) == ([1], 2)
    assert blob.read_bytes() == b"{}"


@pytest.mark.parametrize("error, tries", [
    (answered(404), 1), (answered(401), 1), (PermissionError("x"), 1),
    (answered(500), 4), (ConnectionResetError(), 4)])
def test_trouble_that_stays_is_told_in_one_line(client, error, tries):
    """Catches: retries of what cannot succeed, endless retries, messages without the name."""
    client.errors = [error] * 9
    with pytest.raises(FileNotFoundError) as end:
        data.download("a/b", "v1", "dataset")
    message = str(end.value)
    assert message.startswith("cannot get the dataset a/b (revision v1) from the hub: "
                              + type(error).__name__)
    assert "\n" not in message and "offline?" in message
    assert len(client.calls) == tries


def test_each_request_has_a_timeout():
    """Catches: a server that never answers and hangs a run; the same hook added at each try."""
    session = types.SimpleNamespace(event_hooks={"request": []})
    data.limit_waiting(session)
    data.limit_waiting(session)
    hook, = session.event_hooks["request"]
    timeouts = {"connect": None, "read": 7, "pool": None}
    hook(types.SimpleNamespace(extensions={"timeout": timeouts}))
    assert timeouts == {"connect": 30, "read": 7, "pool": 30}
    data.limit_waiting(types.SimpleNamespace())         # a session of requests has no such hooks


def test_a_corpus_is_a_folder_or_on_the_hub(client, corpus_folder, monkeypatch):
    """Catches: a folder asked for on the hub; data/ not entered; a path sent to the hub."""
    inner = corpus_folder / "data"
    inner.mkdir()
    assert data.locate(str(corpus_folder)) == (inner, "local")
    monkeypatch.setenv("HOME", str(corpus_folder))
    assert data.locate("~/eng_Latn") == (corpus_folder / "eng_Latn", "local")
    for name in ("/no/where", "nowhere", "a/b/c", "../no-where"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a dataset"):
            data.locate(name)
    assert client.calls == []
    client.folder = corpus_folder
    assert data.locate("someone/corpus", "v1") == (inner, corpus_folder.name)
    name, settings = client.calls[0]
    assert name == "someone/corpus"
    assert (settings["repo_type"], settings["revision"]) == ("dataset", "v1")
    assert settings["allow_patterns"] == ["data/*.tsv", "data/*labels.txt"]


# The command

def count(folder):
    return lambda: data.main(["--data", str(folder)])


def test_the_command_counts_a_corpus(tmp_path, capsys):
    """Catches: 205 lines of equal numbers; an error where a target language has only test.tsv."""
    for language in ("aaa", "bbb", "ccc", "ddd"):
        for split, text in (("train", "a"), ("dev", "b"), ("test", "c")):
            sentences = f"{HEAD}1\ttravel\t{text}\n2\thealth\tx{text}\n"
            write(tmp_path / language / f"{split}.tsv", sentences)
    write(tmp_path / "eee" / "test.tsv", HEAD + "1\ttravel\ta\n")
    write(tmp_path / "ddd" / "test.tsv", HEAD + "1\ttravel\ta\n2\ttravel\tc\n")
    assert exit_of(count(tmp_path)) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[:3] == [["languages", "train", "dev", "test"],
                         ["aaa,", "bbb", "...", "ddd", "2", "2", "2"], ["eee", "-", "-", "1"]]
    assert "5 languages, 25 sentences, 7 labels: science/technology, travel" in out
    assert out.endswith("texts of test that are in train too: ddd 1\n")
    assert err == ""


def test_the_command_tells_what_cannot_be_read(corpus_folder, capsys):
    """Catches: data.py saying that all is well over files that a run cannot read."""
    write(corpus_folder / "eng_Latn" / "train.tsv", HEAD + "1\tsport\ta\n")
    assert exit_of(count(corpus_folder)) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[2].split() == ["eng_Latn", "?", "2", "2"]
    assert "train.tsv:2: unknown category 'sport'" in err
    assert "arb_Arab/test.tsv: no sentence" in err
    assert [line[:7] for line in err.splitlines()] == ["error: "] * 2


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, status, line", [
    (ValueError("two\n lines"), 2, "error: two lines\n"),
    (FileNotFoundError("x: no such folder"), 2, "error: x: no such folder\n"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2,
     "error: CUDA out of memory; lower evaluate.tokens (config.yaml; for a run of your own, the "
     "config.yaml in its folder)\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_errors_that_a_person_can_cause_are_one_line(capsys, error, status, line):
    """Catches: tracebacks, a status of 0 after an error."""
    assert exit_of(raising(error)) == status
    assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback():
    """Catches: a programming error that is hidden behind one line."""
    with pytest.raises(KeyError):
        data.run_main(raising(KeyError("x")))


def test_a_long_error_is_cut_after_a_word(capsys):
    """Catches: a terminal flooded with a file's content, a message that ends within a word."""
    exit_of(raising(ValueError("word " * 500)))
    err = capsys.readouterr().err
    assert len(err) < 1020 and err.endswith("word ...\n")
    assert data.shorten("short  text", 20) == "short text"
    assert data.shorten("x" * 90, 20) == "x" * 20 + " ..."
    assert data.shorten("a file: " + "x" * 90, 20) == "a file: ..."


def test_a_closed_pipe_is_no_traceback():
    """Catches: a traceback after `python data.py | head -1`."""
    code = ("import data\n"
            "def main():\n"
            "    for _ in range(99999): print('line')\n"
            "data.run_main(main)")
    root = str(Path(data.__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (1, b"")


# The real data

needs_sib200 = pytest.mark.skipif(not (SIB200 / "data").is_dir(),
                                  reason="no copy of SIB-200: SIB200=FOLDER pytest")


@needs_sib200
def test_the_whole_of_sib200():
    """Catches: any sentence of the real files read otherwise than csv.DictReader reads it."""
    corpus = data.Corpus(SIB200 / "data")
    class_sizes = set()
    quoted = total = 0
    for language in corpus.languages():
        for split, number in (("train", 701), ("dev", 99), ("test", 204)):
            path = SIB200 / "data" / language / f"{split}.tsv"
            with path.open(encoding="utf-8", newline="") as file:
                lines = list(csv.DictReader(file, delimiter="\t"))
            sentences = corpus.read(language, split)
            assert len(sentences) == number
            for sentence, line in zip(sentences, lines, strict=True):
                category = corpus.labels[sentence.label]
                assert (sentence.index_id, category, sentence.text) == (
                    line["index_id"], line["category"], line["text"])
                quoted += '"' in sentence.text
            class_sizes.add((split, *np.bincount([sentence.label for sentence in sentences])))
            total += number
    assert (len(corpus.languages()), total, quoted) == (205, 205_820, 7_688)
    # each split has the same classes in all languages
    train, = [sizes[1:] for sizes in class_sizes if sizes[0] == "train"]
    test, = [sizes[1:] for sizes in class_sizes if sizes[0] == "test"]
    assert (max(train), min(train), max(test)) == (176, 58, 51)


@needs_sib200
def test_the_groups_of_the_recipe_are_those_of_the_data():
    """Catches: a wrong, missing or doubled code in config.yaml's groups."""
    recipe = config.read_config()
    groups = {name: config.resolve_group(recipe, name) for name in recipe["groups"]}
    assert {name: len(codes) for name, codes in groups.items()} == dict(
        low_performing=46, unseen=113, seen=92, seen_without_joshi5=85, all_without_joshi5=198,
        diverse_seen=23, diverse_unseen=24, joshi5=7, enarzho=3, all=205)
    assert all(len(set(codes)) == len(codes) for codes in groups.values())
    assert sorted(groups["all"]) == data.Corpus(SIB200 / "data").languages()
    diverse = set(groups["diverse_seen"] + groups["diverse_unseen"])
    assert diverse <= set(groups["all_without_joshi5"])
    with open(SIB200 / "languages.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for group, column, value in (("low_performing", "low_performing", "1"),
                                 ("seen", "xlmr_seen", "1"), ("unseen", "xlmr_seen", "0"),
                                 ("joshi5", "joshi_class", "5")):
        assert set(groups[group]) == {line["code"] for line in table if line[column] == value}
