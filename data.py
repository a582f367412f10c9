"""SIB-200, and anything shaped like it: <language>/{train,dev,test}.tsv with columns `category` and `text`.

The paper's section "Data": topic classification, 7 classes, 205 parallel languages, 701 / 99 / 204 sentences
each. This file needs torch and numpy (huggingface_hub to download) and knows nothing of the model.

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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# The order of SIB-200's labels.txt. Any other, the alphabetical one say, silently permutes the head.
LABELS = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
SPLITS = ("train", "dev", "test")


class Sentence(NamedTuple):
    """One row: `index_id` is the same in all languages, `label` counts from 0 in the corpus's label order."""
    index_id: str
    label: int
    text: str


def nearest(word, words):
    """' (did you mean ...?)' for the nearest of `words`, or ''."""
    match = difflib.get_close_matches(word, list(words), 1, 0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def read_tsv(path, labels=LABELS):
    """Read one split -> list of Sentence, texts exactly as they stand (not stripped, not normalised).

    SIB-200 is written by pandas: a field with a quote character is quoted and its quotes are doubled (7,688
    of 205,820 rows), so this is csv, strictly. A BOM and CRLF are accepted, empty lines skipped. Raises
    FileNotFoundError, or ValueError with file and line for anything that is not clean.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > 256 << 20:
        raise ValueError(f"{path}: larger than 256 MB")
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line, byte = e.object[:e.start].count(10) + 1, e.object[e.start]        # e.object: what follows a BOM
        raise ValueError(f"{path}:{line}: not UTF-8 (byte 0x{byte:02x})") from None
    if "\0" in content:
        raise ValueError(f"{path}:{content[:content.index(chr(0))].count(chr(10)) + 1}: holds a NUL byte")
    number = {name: i for i, name in enumerate(labels)}
    reader = csv.reader(io.StringIO(content, newline=""), delimiter="\t", strict=True)
    sentences, header, seen = [], None, set()
    try:
        for row in reader:
            at = f"{path}:{reader.line_num}"
            if not row:
                continue
            if header is None:
                header = row
                for column in ("category", "text"):
                    if header.count(column) != 1:
                        raise ValueError(f"{at}: the header must name a column {column!r} once, "
                                         f"it is {header[:6]}")
                category, text = header.index("category"), header.index("text")
                index_id = header.index("index_id") if "index_id" in header else None
                continue
            if len(row) != len(header):
                raise ValueError(f"{at}: {len(row)} fields, the header has {len(header)}")
            if row[category] not in number:
                raise ValueError(f"{at}: unknown category {row[category][:60]!r}, known are "
                                 f"{', '.join(labels)}; other labels go into a file labels.txt beside the "
                                 f"languages, one a line")
            if not row[text].strip():
                raise ValueError(f"{at}: empty text")
            name = str(len(sentences)) if index_id is None else row[index_id]
            if name in seen:
                raise ValueError(f"{at}: index_id {name!r} stands twice")
            seen.add(name)
            sentences.append(Sentence(name, number[row[category]], row[text]))
    except csv.Error as e:
        raise ValueError(f"{path}:{reader.line_num}: {e} (an unclosed or stray quote?)") from None
    if header is None:
        raise ValueError(f"{path}: empty file")
    return sentences


class Corpus:
    """A folder <language>/{train,dev,test}.tsv. `labels` come from labels.txt beside or in the language
    folders, otherwise they are SIB-200's seven. Raises FileNotFoundError if the folder holds no language."""

    def __init__(self, root):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder")
        self._languages = sorted({p.parent.name for s in (*SPLITS, "validation")
                                  for p in self.root.glob(f"*/{s}.tsv") if p.is_file()})
        if not self._languages:
            raise FileNotFoundError(f"{root}: no folder <language>/{{train,dev,test}}.tsv here")
        self.labels, source = LABELS, None
        beside = [self.root / "labels.txt", *(self.root / d / "labels.txt" for d in self._languages)]
        for file in filter(Path.is_file, beside):
            try:
                if file.stat().st_size > 1 << 20:
                    raise ValueError("larger than 1 MB")
                names = tuple(x for x in file.read_text("utf-8-sig").splitlines() if x.strip())
            except ValueError as e:
                raise ValueError(f"{file}: not readable: {e}") from None
            if len(set(names)) != len(names) or len(names) < 2:
                raise ValueError(f"{file}: must name two or more labels, each once, one a line")
            if source and names != self.labels:
                raise ValueError(f"{file}: other labels than {source}")
            self.labels, source = names, file

    def languages(self):
        """All language codes, sorted."""
        return list(self._languages)

    def check(self, languages):
        """Raise ValueError for a language that is not in the corpus, naming the nearest code."""
        for name in languages:
            if name not in self._languages:
                raise ValueError(f"no language {name!r} in {self.root}{nearest(name, self._languages)}")

    def read(self, language, split):
        """-> list of Sentence. `dev` and `validation` are the same split. Raises ValueError for an unknown
        language or an empty split, FileNotFoundError for a missing one."""
        self.check([language])
        folder = self.root / language
        names = ("dev", "validation") if split in ("dev", "validation") else (split,)
        has = sorted(p.name for p in folder.glob("*.tsv"))
        path = folder / next((f"{n}.tsv" for n in names if f"{n}.tsv" in has), f"{split}.tsv")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such split; {language} has {', '.join(has)}")
        sentences = read_tsv(path, self.labels)
        if not sentences:
            raise ValueError(f"{path}: no sentence in this split")
        return sentences


def fingerprint(sentences):
    """A short hash of ids, labels and texts: tells whether two runs saw the same data."""
    digest = hashlib.sha256()
    for s in sentences:
        digest.update(repr(tuple(s)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


class Damaged(OSError):
    """A file from the hub is not what its hash says."""


def verify(folder):
    """Compare the files of a snapshot with their hashes, which name them in the cache; the hub's client
    compares sizes only. Damaged if one differs; it is removed, so that the next attempt fetches it anew."""
    for file in (f.resolve() for f in folder.rglob("*") if f.is_symlink()):
        content = file.read_bytes()
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()         # git's
        if len(file.name) in (40, 64) and file.name not in (sha1, hashlib.sha256(content).hexdigest()):
            file.unlink()
            raise Damaged(f"a file of {folder.name} came with another content than announced; it is removed")


def download(name, revision, kind, patterns):
    """Fetch what matches `patterns` of a hub repository in one snapshot -> folder, named after the commit.

    One snapshot, because hundreds of single requests end in "429 too many requests". Passing trouble is
    tried again; then FileNotFoundError says in one line what was wanted and why it could not be had.
    """
    import huggingface_hub
    for wait in (1, 4, 16, None):
        try:
            folder = Path(huggingface_hub.snapshot_download(
                name, repo_type=kind, revision=revision, max_workers=4, allow_patterns=patterns))
            verify(folder)
            return folder
        except Exception as e:      # the client raises its own, httpx's, requests' and the system's errors
            # the client wraps what the server said into a LocalEntryNotFoundError
            status = next((x.response.status_code for x in (e, e.__cause__)
                           if getattr(x, "response", None) is not None), None)
            passing = status in (408, 429, 500, 502, 503, 504) or "Timeout" in type(e).__name__
            passing = passing or isinstance(e, Damaged)
            if wait is None or not passing:
                line = (str(e).strip() or "no answer").splitlines()[0][:160]
                login = "; `hf auth login` first" if status in (401, 403) else ""
                raise FileNotFoundError(f"cannot get the {kind} {name} (revision {revision}) from the hub: "
                                        f"{type(e).__name__}: {line}{login}") from None
            time.sleep(wait)


def locate(name, revision="main"):
    """-> (folder that holds the languages, revision): `name` is a folder, or a dataset on the hub.

    Raises FileNotFoundError with what was wanted and what to do instead.
    """
    folder = Path(name).expanduser()
    folder = folder if folder.is_dir() else Path(__file__).resolve().parent / folder
    if folder.is_dir():
        revision = "local"
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or ".." in str(name):
        raise FileNotFoundError(f"data.name: {str(name)!r} is neither a folder nor a dataset on the hub")
    else:
        try:
            folder = download(name, revision, "dataset", ["data/*/*.tsv", "data/*/labels.txt"])
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{e}; with a copy on disk use --data FOLDER") from None
        revision = folder.name
    return (folder / "data" if (folder / "data").is_dir() else folder), revision


# ---- from texts to batches ---------------------------------------------------------------------------------

def encode(texts, tokenizer, max_length):
    """Tokenize texts -> list of int32 arrays of token ids, special tokens included, cut at max_length."""
    ids, texts = [], list(texts)
    for i in range(0, len(texts), 2048):    # not all at once: the tokenizer's records take 14 KB a sentence
        part = tokenizer(texts[i:i + 2048], truncation=True, max_length=max_length, padding=False,
                         return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        ids += [np.array(row, dtype=np.int32) for row in part]
    for text, row in zip(texts, ids):
        if not len(row):
            raise ValueError(f"the tokenizer makes no token of {text[:60]!r}")
    return ids


def collate(rows, pad_id):
    """Token ids of B texts -> input_ids, attention_mask, both (B, T) int64, padded on the *right*: left
    padding would shift the positions that XLM-R gives to `inputs_embeds`."""
    T = max(map(len, rows))
    ids = np.full((len(rows), T), pad_id, dtype=np.int64)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    for i, row in enumerate(rows):
        ids[i, :len(row)] = row
    return torch.from_numpy(ids), torch.from_numpy((np.arange(T) < lengths[:, None]).astype(np.int64))


def length_batches(lengths, batch_size, seed, epoch):
    """One epoch's batches for training -> list of index arrays, a pure function of its arguments.

    Sentences are grouped by length (a little noise on the length mixes the groups anew each epoch), then the
    batches are shuffled. `seed` decides which sentences meet; the order of the groups depends on the epoch
    alone, so that learners of different seeds have batches of like length at each step, and joining them adds
    little padding.
    """
    noise = np.random.default_rng([seed, epoch]).random(len(lengths))
    order = np.argsort(np.asarray(lengths) * (1 + 0.04 * noise) + noise, kind="stable")
    groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [groups[i] for i in np.random.default_rng([205, epoch]).permutation(len(groups))]


def token_batches(lengths, budget, extra=0):
    """Batches for evaluation -> list of index arrays: sorted by length, longest first (too little memory
    shows at once), as many rows as fit `budget` positions with `extra` prompt rows each, and beyond 32 rows
    only those that need less than 5 % padding. Whoever uses them restores the order."""
    order, batches, start = np.argsort(-np.asarray(lengths), kind="stable"), [], 0
    sizes = np.asarray(lengths)[order] + extra
    while start < len(order):
        fit = max(1, budget // sizes[start])
        alike = np.searchsorted(-sizes, -0.95 * sizes[start], side="right") - start
        batches.append(order[start:start + min(fit, max(alike, 32))])
        start += len(batches[-1])
    return batches


def main(argv=None):
    """Print counts per language and split, and check what a run relies on."""
    parser = argparse.ArgumentParser(description="Counts of a corpus, or what is wrong with its files.")
    parser.add_argument("--data", required=True, help="folder <language>/{train,dev,test}.tsv, or on the hub")
    parser.add_argument("--revision", default="main", help="of the dataset on the hub (default: main)")
    args = parser.parse_args(argv)
    corpus = Corpus(locate(args.data, args.revision)[0])
    counts, labels, shared, wrong = {}, {}, {}, []
    for language in corpus.languages():
        read = dict.fromkeys(SPLITS, ())
        for split in SPLITS:
            try:
                read[split] = corpus.read(language, split)
            except (ValueError, FileNotFoundError) as e:
                wrong.append(f"error: {e}")
        counts[language] = [len(read[s]) for s in SPLITS]
        labels[language] = [np.bincount([x.label for x in read[s]], minlength=len(corpus.labels)).tolist()
                            for s in SPLITS]
        shared[language] = len({x.text for x in read["train"]} & {x.text for x in read["test"]})
    print(f"{'language':<14}" + "".join(f"{s:>8}" for s in SPLITS))
    for language, row in counts.items():
        print(f"{language:<14}" + "".join(f"{n:>8,}" for n in row))
    first = corpus.languages()[0]
    sizes = ", ".join(f"{s} {n}" for s, n in zip(SPLITS, counts[first]))
    same = all(row == counts[first] for row in counts.values())
    print(f"\n{len(counts)} languages, {sum(map(sum, counts.values())):,} sentences"
          + (f": {sizes} in every language" if same else "; the languages differ in size"))
    same = all(table == labels[first] for table in labels.values())
    print(f"labels of {first}, {' / '.join(SPLITS)} "
          + ("(the same in every language):" if same else "(the languages differ):"))
    for name, row in zip(corpus.labels, zip(*labels[first])):
        print(f"  {name:<22}" + " / ".join(map(str, row)))
    if any(shared.values()):
        print("test sentences also in train: " + ", ".join(f"{k} {n}" for k, n in shared.items() if n))
    for line in wrong:
        print(line, file=sys.stderr)
    return 2 if wrong else 0


def run_main(main):
    """Run a script's main: every error that a person can cause ends in one line and status 2."""
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                     # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as e:
        line = " ".join(str(e).split())
        print(f"error: {line if len(line) < 1000 else line[:1000] + ' ...'}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
