"""SIB-200, and anything shaped like it: <language>/{train,dev,test}.tsv with columns `category` and `text`.

The paper's section "Data": 7 topics, 205 parallel languages, 701 / 99 / 204 sentences each. This file needs
torch and numpy (huggingface_hub to download) and knows nothing of the model.

    python data.py --data DIR            # counts per language and split, or what is wrong with the files
    205 languages, 205,820 sentences: train 701, dev 99, test 204 in every language    (4 s on two cores)
"""
import argparse
import csv
import difflib
import hashlib
import io
import os
import re
import sys
import time
from collections import namedtuple
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch

# The order of SIB-200's labels.txt. Any other, the alphabetical one say, silently permutes the head.
LABELS = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
SPLITS = ("train", "dev", "test")
HUB_TIMEOUT = 30        # seconds without a byte of answer
# One row. index_id is the same in all languages, label counts from 0 in the corpus's order of labels.
Sentence = namedtuple("Sentence", "index_id label text")


def nearest(word, words):
    """' (did you mean ...?)' for the nearest of `words`, or ''."""
    match = difflib.get_close_matches(word, list(words), 1, 0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def read_text(path):
    """-> the text of a UTF-8 file, with or without a BOM; ValueError with the line of what is no text."""
    raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.replace(b"\0", b"\xff").decode()      # a NUL is no text either
    except UnicodeDecodeError as e:
        line, byte = raw[:e.start].count(b"\n") + 1, raw[e.start]
        raise ValueError(f"{path}:{line}: no UTF-8 text (byte 0x{byte:02x})") from None


def read_tsv(path, labels=LABELS):
    """Read one split -> list of Sentence, texts exactly as they stand (not stripped, not normalised).

    SIB-200 comes from pandas: a field with a quote is quoted, its quotes doubled (7,688 of 205,820 rows), so
    this is csv, strictly; empty lines are skipped. ValueError with file and line for what is not clean.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", strict=True)
    rows, sentences = filter(None, reader), {}       # by index_id
    try:
        header = next(rows, [])
        for column in ("category", "text"):
            if header.count(column) != 1:
                raise ValueError(f"the header must name a column {column!r} once, it is {header[:6]}")
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} fields, the header has {len(header)}")
            field = dict(zip(header, row))
            category, text = field["category"], field["text"]
            index_id = field.get("index_id", str(len(sentences)))
            if category not in labels:
                raise ValueError(f"unknown category {category[:60]!r}, known are {', '.join(labels)}; other "
                                 "labels go into a file labels.txt beside the languages, one a line")
            if not text.strip():
                raise ValueError("empty text")
            if index_id in sentences:
                raise ValueError(f"index_id {index_id!r} stands twice")
            sentences[index_id] = Sentence(index_id, labels.index(category), text)
    except (csv.Error, ValueError) as e:
        hint = " (an unclosed or stray quote?)" if isinstance(e, csv.Error) else ""
        raise ValueError(f"{path}:{reader.line_num}: {e}{hint}") from None
    if not sentences:
        raise ValueError(f"{path}: no sentence in this split")
    return list(sentences.values())


class Corpus:
    """A folder <language>/{train,dev,test}.tsv; `validation` means `dev`. `labels` are those of labels.txt
    beside or in the language folders, otherwise SIB-200's. FileNotFoundError if there is no language."""

    def __init__(self, root):
        self.root, self.labels, self._files = Path(root), LABELS, {}
        for path in sorted(self.root.glob("*/*.tsv")):
            split = path.stem.replace("validation", "dev")
            if split in SPLITS:
                self._files.setdefault(path.parent.name, {}).setdefault(split, path)
        if not self._files:
            raise FileNotFoundError(f"{root}: no folder <language>/{{train,dev,test}}.tsv here")
        files = [f for name in ("", *self._files) for f in (self.root / name).glob("labels.txt")]
        for file in files:
            names = tuple(filter(str.strip, read_text(file).splitlines()))
            if len(set(names)) != len(names) or len(names) < 2:
                raise ValueError(f"{file}: must name two or more labels, each once, one a line")
            if file != files[0] and names != self.labels:
                raise ValueError(f"{file}: other labels than {files[0]}")
            self.labels = names

    def languages(self):
        """All language codes, sorted."""
        return list(self._files)

    def check(self, languages):
        """ValueError for a language that is not in the corpus, naming the nearest code."""
        for name in languages:
            if name not in self._files:
                raise ValueError(f"no language {name!r} in {self.root}{nearest(name, self._files)}")

    def read(self, language, split):
        """-> list of Sentence. ValueError for an unknown language, FileNotFoundError for a missing split."""
        self.check([language])
        files, split = self._files[language], split.replace("validation", "dev")
        if split not in files:
            path, has = self.root / language / f"{split}.tsv", ", ".join(p.name for p in files.values())
            raise FileNotFoundError(f"{path}: no such split; {language} has {has}")
        return read_tsv(files[split], self.labels)


def fingerprint(sentences):
    """A short hash of ids, labels and texts: tells whether two runs saw the same data."""
    content = "".join(repr(tuple(s)) for s in sentences).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:16]


def verify(folder, patterns):
    """Compare files of a snapshot with their hashes, which name them in the cache; the hub's client compares
    sizes only. Removes those that differ, so that they are fetched anew, and raises ConnectionError."""
    wanted = (f for f in folder.rglob("*") if any(fnmatch(f.relative_to(folder), p) for p in patterns))
    damaged = set()
    for file in (f.resolve() for f in wanted if f.is_symlink()):
        git = hashlib.sha1(b"blob %d\0" % file.stat().st_size)
        digest = {40: git, 64: hashlib.sha256()}.get(len(file.name))        # git's, or a large file's
        with file.open("rb") as f:
            for block in iter(lambda: f.read(1 << 20), b"") if digest else ():
                digest.update(block)
        if digest and digest.hexdigest() != file.name:
            damaged.add(file)
    for file in damaged:
        file.unlink()
    if damaged:
        raise ConnectionError(f"{len(damaged)} files came with other content than announced and are removed")


def bound(request):
    """The hub's client calls its API without a timeout: a server that never answers would hang us."""
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {k: HUB_TIMEOUT if v is None else v for k, v in limits.items()}


def download(name, revision, kind, patterns):
    """Fetch what matches `patterns` of a hub repository -> folder, named after the commit. In one snapshot:
    hundreds of single requests end in "429 too many requests". Passing trouble is tried again; then
    FileNotFoundError says in one line what was wanted and why it could not be had."""
    import huggingface_hub
    for wait in (1, 4, 16, None):
        try:
            # each time, for the client opens a new session after some errors
            getattr(huggingface_hub.get_session(), "event_hooks", {"request": []})["request"].append(bound)
            folder = Path(huggingface_hub.snapshot_download(
                name, repo_type=kind, revision=revision, max_workers=4, allow_patterns=patterns))
            verify(folder, patterns)
            return folder
        except Exception as e:      # the client's own, httpx's, requests' and the system's errors
            # what the server said may stand in the cause of a LocalEntryNotFoundError
            said = {getattr(getattr(x, "response", None), "status_code", 0) for x in (e, e.__cause__)}
            if wait is None or not (isinstance(e, ConnectionError) or "Timeout" in type(e).__name__
                                    or said & {408, 429, 500, 502, 503, 504}):
                line = (str(e).strip() or "no answer").splitlines()[0][:160]
                raise FileNotFoundError(
                    f"cannot get the {kind} {name} (revision {revision}) from the hub: {type(e).__name__}: "
                    f"{line} (offline? --data FOLDER and --backbone FOLDER take a copy; "
                    f"private or gated? `hf auth login` first)") from None
            time.sleep(wait)


def locate(name, revision="main"):
    """-> (folder that holds the languages, revision): `name` is a folder, or a dataset on the hub.
    FileNotFoundError with what was wanted and what to do instead."""
    places = Path(name).expanduser(), Path(__file__).resolve().parent / name
    local = next(filter(Path.is_dir, places), None)
    if not local and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"data.name: {name!r} is neither a folder nor a dataset on the hub")
    folder = local or download(name, revision, "dataset", ["data/*.tsv", "data/*labels.txt"])
    inner = folder / "data"
    return (inner if inner.is_dir() else folder), ("local" if local else folder.name)


def encode(texts, tokenizer, max_length):
    """Tokenize texts -> list of int32 arrays of token ids, special tokens included, cut at max_length."""
    ids = []
    for i in range(0, len(texts), 2048):    # not all at once: the tokenizer's records take 14 KB a sentence
        part = tokenizer(texts[i:i + 2048], truncation=True, max_length=max_length,
                         return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        ids += [np.array(row, dtype=np.int32) for row in part]
    return ids


def collate(rows, pad_id):
    """Token ids of B texts -> input_ids, attention_mask, both (B, T) int64, padded on the *right*: left
    padding would shift the positions that XLM-R gives to `inputs_embeds`."""
    ids = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, :len(row)], mask[i, :len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def length_batches(lengths, batch_size, seed, epoch):
    """One epoch's batches for training -> list of index arrays, a pure function of its arguments.

    Sentences are grouped by length, with a little noise of `seed` and epoch, and the groups shuffled: by the
    epoch alone, so that learners of all seeds have like lengths at each step and join with little padding.
    """
    noise = np.random.default_rng([seed, epoch]).random(len(lengths))
    order = np.argsort(np.asarray(lengths) * (1 + 0.04 * noise) + noise, kind="stable")
    groups = np.split(order, range(batch_size, len(order), batch_size))
    return [groups[i] for i in np.random.default_rng([205, epoch]).permutation(len(groups))]


def token_batches(lengths, budget, extra=0):
    """Batches for evaluation -> list of index arrays, longest first (too little memory shows at once): as
    many rows as fit `budget` positions with `extra` prompt rows each, beyond 32 if they pad less than 5 %."""
    order, batches, start = np.argsort(-np.asarray(lengths), kind="stable"), [], 0
    sizes = np.asarray(lengths)[order] + extra
    while start < len(order):
        fit = max(1, budget // sizes[start])
        alike = np.searchsorted(-sizes, -0.95 * sizes[start], side="right") - start
        batches.append(order[start:start + min(fit, max(alike, 32))])
        start += len(batches[-1])
    return batches


def main(argv=None):
    """Print counts per language and split, and what a run could not read."""
    parser = argparse.ArgumentParser(description="Counts of a corpus, or what is wrong with its files.")
    parser.add_argument("--data", required=True, help="folder <language>/{train,dev,test}.tsv, or on the hub")
    corpus = Corpus(locate(parser.parse_args(argv).data)[0])
    counts, wrong = [], []
    print(f"{'language':<14}" + "".join(f"{split:>8}" for split in SPLITS))
    for language in corpus.languages():
        texts = dict.fromkeys(SPLITS, ())
        for split in SPLITS:
            try:
                texts[split] = [s.text for s in corpus.read(language, split)]
            except (ValueError, FileNotFoundError) as e:
                wrong.append(f"error: {e}\n")
        counts.append([len(texts[split]) for split in SPLITS])
        shared = len(set(texts["train"]) & set(texts["test"]))
        print(f"{language:<14}" + "".join(f"{n:>8,}" for n in counts[-1])
              + f"   {shared} of test stand in train too" * (shared > 0))
    sizes = ", ".join(f"{split} {n}" for split, n in zip(SPLITS, counts[0])) + " in every language"
    sizes = sizes if counts.count(counts[0]) == len(counts) else "many sizes"
    print(f"\n{len(counts)} languages, {sum(map(sum, counts)):,} sentences: {sizes}")
    sys.stderr.writelines(wrong)
    return 2 if wrong else 0


def run_main(main):
    """Run a script's main: every error that a person can cause ends in one line and status 2."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:                     # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        hint = "; lower evaluate.tokens in config.yaml" * isinstance(e, torch.OutOfMemoryError)
        print(f"error: {' '.join(str(e).split())[:1000]}{hint}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    run_main(main)
