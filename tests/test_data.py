"""data.py: files read strictly, token ids, the two batch orders, folders and the hub, the command.

    python -m pytest -q tests/test_data.py          (about 5 s)

Most of it goes through the command, `python data.py --data FOLDER`, which reads all that is there.
"""
import csv
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import run, tiny_tokenizer

import data

HEAD = "index_id\tcategory\ttext\n"
GOOD = HEAD + "1\ttravel\tone\n2\thealth\ttwo\n"


def write(folder, files):
    """Write {path in the folder: text} -> folder; "\\udcff" stands for the byte 0xff."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode(errors="surrogateescape"))
    return folder


# ---- Files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("start, line_end", [("", "\n"), ("\ufeff", "\r\n")])
def test_texts_come_back_as_written(tmp_path, start, line_end):
    """Catches: splitting at other characters than the file's own, texts stripped or normalised,
    columns taken by their place, a byte order mark in the header."""
    texts = ['He said "no"', '"', " blanks \u00a0at the edges ", "e\u0301 NFD, \u0958 too",
             "a\u2028b\u0085c\x0bd\x1ce", "\ufeffinside", "it's 5'' long", "\u200b\u0627\u200f"]
    content = io.StringIO(newline="")
    writer = csv.writer(content, delimiter="\t", lineterminator=line_end)
    writer.writerows([["text", "note", "category"], *([text, "x", "sports"] for text in texts), []])
    write(tmp_path, {"eng_Latn/test.tsv": start + content.getvalue()})
    sentences = data.Corpus(tmp_path).read("eng_Latn", "test")
    assert sentences == [(str(i), 3, text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("content, message", [
    ("", "test.tsv:1: the header must name the columns category and text, it is []"),
    (HEAD, "test.tsv: no sentence in this split"),
    ("1\ttravel\ta\n", "test.tsv:1: the header must name the columns category and text, it is ["),
    (GOOD + "3\ttravels\ta\n", "test.tsv:4: unknown category 'travels', known are science/tech"),
    (GOOD + "3\ttravel\n", "test.tsv:4: must have 3 fields"),
    (GOOD + "3\ttravel\t \u00a0\n", "test.tsv:4: empty text"),
    (GOOD + "\n2\ttravel\ta\n", "test.tsv:5: index_id '2' was already used"),
    (GOOD + "3\ttravel\t\udcff\n", "test.tsv:4: not valid UTF-8 (invalid start byte)"),
    ("\udcff\udcfei\0n\0", "test.tsv:1: not valid UTF-8"),
    (GOOD + '3\ttravel\t"Yes\n4\ttravel\tno"\n', "test.tsv:4: unexpected end of data"),
    (GOOD + '3\ttravel\t"Yes" he said\n', "test.tsv:4: ' ' expected after '\"'")])
def test_a_bad_file(tmp_path, content, message):
    """Catches: sentences that are skipped, or swallowed by a stray quote; an error that does not
    say where."""
    write(tmp_path, {"eng_Latn/train.tsv": GOOD, "eng_Latn/test.tsv": content})
    status, _, err = run(data.main, "--data", tmp_path)
    assert status == 2 and err.count("\n") == 1
    assert f"error: {tmp_path}/eng_Latn/{message}" in err


@pytest.mark.parametrize("files, expected", [
    # codes, splits and counts
    ({".git/dev.tsv": GOOD, "a/more.tsv": GOOD, "b/x.txt": "", "c/test.tsv": HEAD + "1\ttravel\tx"},
     "train: 0 to 0 sentences a language, 0 in all dev: 0 to 2 sentences a language, 2 in all test: "
     "0 to 1 sentences a language, 1 in all 2 languages (a, c), 7 labels: science/"
     "technology 0, travel 2, politics 0, sports 0, health 1, entertainment 0, geography 0 END"),
    ({f"{code}/validation.tsv": GOOD for code in "bcd"}, "4 languages (a, b, c, d), 7 labels"),
    # labels
    ({"labels.txt": "\ufefftravel\r\n\r\nhealth \r\n"}, "2 labels: travel 1, health 1"),
    ({"b/labels.txt": "travel\nart\n", "a/labels.txt": "health\ntravel\n"},
     "3 labels: health 1, travel 1, art 0"),
    ({"a/labels.txt": "travel\nart\n", "labels.txt": "art\nhealth\ntravel\n"},
     "3 labels: art 0, health 1, travel 1"),
    ({"labels.txt": "e\u0301\n\u0958\n", "a/dev.tsv": HEAD + "1\t \u00e9\tx\n2\t\u0915\u093c\ty"},
     "2 labels: \u00e9 1, \u0915\u093c 1"),
    # sentences that are not new
    ({"a/train.tsv": HEAD + "5\ttravel\ttwo"}, "1 of 2 dev sentences of a are also in train of a, "
     "by their text"),
    ({"b/test.tsv": HEAD + "7\ttravel\tone\n8\ttravel\tsix"}, "1 of 2 test sentences of b are also "
     "in dev of a, by their text"),
    ({"b/train.tsv": HEAD + "5\ttravel\tsix", "c/test.tsv": HEAD + "5\ttravel\tten"},
     "1 of 1 test sentences of c are also in train of b, by their index_id"),
    ({"b/train.tsv": HEAD + "0\ttravel\tsix", "c/test.tsv": HEAD + "0\ttravel\tten"},
     "geography 0 END"),
    ({"b/dev.tsv": HEAD + "1\ttravel\tuno\n2\ttravel\tdue"}, "geography 0 END")])
def test_a_corpus(tmp_path, files, expected):
    """Catches: a split, language or label that is lost, or read though it is none; alphabetical
    labels, which permute a trained head; names compared by their bytes;
    test sentences that were trained on; a warning about ids that only number the lines."""
    write(tmp_path, {"a/dev.tsv": GOOD, **files})
    _, out, err = run(data.main, "--data", tmp_path)
    printed = " ".join(f"{out} {err} END".replace(str(tmp_path), "FOLDER").split())
    assert expected in printed


@pytest.mark.parametrize("language, message", [
    ("eng_Lat", r"no language 'eng_Lat' in .*did you mean eng_Latn\?"),
    ("eng_Latn", "eng_Latn/dev.tsv: no such split; eng_Latn has test")])
def test_what_a_corpus_lacks(tmp_path, language, message):
    """Catches: a missing split read as empty, a code that leaves the folder."""
    write(tmp_path, {"eng_Latn/test.tsv": GOOD})
    with pytest.raises(ValueError, match=message):
        data.Corpus(tmp_path).read(language, "dev")


# ---- Token ids -----------------------------------------------------------------------------------

def test_encode(tmp_path):
    """Catches: texts cut in silence; </s> lost; texts in another order once there are thousands; a
    thread that uses the max_length that another one has set."""
    tokenizer = tiny_tokenizer(tmp_path)
    lengths = [n % 10 for n in range(2100)]
    texts, limits = ["star " * n for n in lengths], [4, 5, 11, 12] * 2
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda limit: data.encode(texts, tokenizer, limit), limits)
        for limit, encoded in zip(limits, results):
            expected = [[0, *[4] * min(n, limit - 2), 2] for n in lengths]
            assert [ids.tolist() for ids in encoded] == expected


def test_collate():
    """Catches: left padding, which shifts XLM-R's positions; a text's own pad id masked."""
    input_ids, mask = data.collate([[5, 1, 7], [8]], pad_id=1)
    assert input_ids.tolist() == [[5, 1, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# ---- Batches -------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(6).integers(16, 120, 701)


@pytest.mark.parametrize("count, batch_size, padding", [
    (701, 32, 0.12), (640, 32, 0.12), (5, 32, 1), (3, 1, 0.12)])
def test_training_batches(count, batch_size, padding):
    """Catches: sentences left out or doubled; more than one small batch, or one that always holds
    the longest sentences; a resumed run with other batches than before; seeds of one pass whose
    batches differ in size, or in length so that they pad by a third; seeds without an effect."""
    lengths, longest_in_small = LENGTHS[:count], set()
    for epoch in range(9):
        one, other, again = [data.length_batches(lengths, batch_size, seed, epoch)
                             for seed in (11, 12, 11)]
        assert sorted(np.concatenate(one)) == list(range(count))
        assert sorted(map(len, one))[1:] == [batch_size] * ((count - 1) // batch_size)
        assert [*map(len, one)] == [*map(len, other)]
        assert all(map(np.array_equal, one, again))
        assert count < 32 or not all(map(np.array_equal, one, other))
        joined = map(np.append, one, other)
        computed = sum(len(batch) * lengths[batch].max() for batch in joined)
        assert computed < (1 + padding) * 2 * lengths.sum()
        longest_in_small.add(lengths.argmax() in min(one, key=len))
    assert count < batch_size or False in longest_in_small


@pytest.mark.parametrize("budget, extra", [(4096, 20), (1000, 0), (1, 0)])
def test_evaluation_batches(budget, extra):
    """Catches: a budget overrun, texts lost at the end, an endless loop at a text above it."""
    batches = data.token_batches(LENGTHS, budget, extra)
    assert sorted(np.concatenate(batches)) == list(range(701))
    longest = [LENGTHS[batch].max() + extra for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, size in zip(batches, longest):
        assert len(batch) == 1 or len(batch) * size <= budget


# ---- Folders and the hub -------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub's client -> the list of calls that it gets."""
    calls = []

    def snapshot_download(name, **settings):
        calls.append((name, settings))
        if name == "some/missing":
            raise ConnectionError("cannot\nreach it")
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_mistyped_path_does_not_ask_the_hub(monkeypatch, hub):
    """Catches: minutes of waiting for a repository that nobody meant, or its download."""
    monkeypatch.chdir(data.HERE)
    for name in ("/no/where", "nowhere", "a/b/c", "../no-where", "tests/dta"):
        with pytest.raises(ValueError, match=f"^{name}: no such folder in"):
            data.open_corpus({"name": name, "revision": "main"})
    with pytest.raises(ValueError, match="^some/corpus: no such folder in"):
        data.open_corpus({"name": "some/corpus", "revision": "local"})
    assert hub == []


def test_a_corpus_is_a_folder_or_on_the_hub(monkeypatch, hub, tmp_path):
    """Catches: a folder asked for on the hub; data/ not entered; a folder that is not found from
    another working directory; all files fetched; an error of the client as a traceback."""
    folder = write(tmp_path, {"data/a/dev.tsv": GOOD}) / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    for where in ({"name": "~/data", "revision": "main"},
                  {"name": "data", "revision": "local", "folder": str(folder)}):
        identity = {**where, "revision": "local", "folder": str(folder)}
        assert data.open_corpus(where)[1] == identity
    assert hub == []
    found, identity = data.open_corpus({"name": "some/corpus", "revision": "v1"})
    assert (found.root, identity["revision"]) == (folder, tmp_path.name)
    assert hub == [("some/corpus", dict(repo_type="dataset", revision="v1", allow_patterns=[
        "data/*.tsv", "data/*labels.txt"]))]
    with pytest.raises(ValueError, match="^some/missing: .* the hub does not .*: cannot reach it"):
        data.open_corpus({"name": "some/missing", "revision": "v1"})


# ---- How a command ends --------------------------------------------------------------------------

@pytest.mark.parametrize("error, status, line", [
    (ValueError("two\n lines"), 2, "error: two lines\n"),
    (torch.OutOfMemoryError("Tried to allocate"), 2, "error: out of memory: lower "
     "train.learners_at_once, train.batch_size or evaluate.tokens (of a trained run in its "
     "config.yaml): Tried to allocate\n"),
    (KeyboardInterrupt(), 130, "interrupted\n")])
def test_an_error_is_one_line(error, status, line):
    """Catches: tracebacks, a status of 0 after an error."""
    def main(_):
        raise error
    assert run(main) == (status, "", line)


def test_other_errors_keep_their_traceback():
    """Catches: a programming error that is hidden behind one line."""
    with pytest.raises(KeyError):
        data.run_main({}.popitem)


def test_a_terminal_that_has_only_ascii(monkeypatch):
    """Catches: a traceback in place of a language's name."""
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit):
        data.run_main(lambda: print("\u00e9"))
    assert stdout.buffer.getvalue() == b"\\xe9\n"


def test_a_reader_that_has_seen_enough():
    """Catches: a traceback, or Python's own complaint at its end, after `python data.py | head`."""
    code = "import data; data.run_main(lambda: [print(n) for n in range(99999)])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=data.HERE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
