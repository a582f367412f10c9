"""SIB-200, and any corpus of its shape: from TSV files to batches of token ids.

The paper's section "Data": 7 topics in 205 parallel languages, 701 / 99 / 204 sentences each. A
corpus is a folder <language>/{train,dev,test}.tsv with the columns `category` and `text`. This
file needs torch and numpy (huggingface_hub to download) and knows nothing of the model. As a
command it checks and counts a corpus:

    $ python data.py --data DIR            (SIB-200: 7 s on one core)
    train: 701 to 701 sentences a language, 143,705 in all
      dev: 99 to 99 sentences a language, 20,295 in all
     test: 204 to 204 sentences a language, 41,820 in all
    205 languages (ace_Arab, ace_Latn, ...), 7 labels: science/technology 51,660, travel 40,590, ...

Read downwards: errors, files, token ids, batches, folders and the hub, the command.
"""
import argparse
import csv
import difflib
import hashlib
import math
import os
import re
import sys
import textwrap
import threading
import unicodedata
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
# The order of SIB-200's labels.txt; any other would silently permute what a trained head says.
LABELS = ("science/technology", "travel", "politics", "sports", "health", "entertainment",
          "geography")
SPLITS = ("train", "dev", "test")

# index_id names a sentence in all languages; label counts from 0 in the corpus's order of labels.
Sentence = namedtuple("Sentence", "index_id label text")


# ---- Errors: one line that says what was given, where, and what to do ----------------------------

def check(condition, message):
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@contextmanager
def reading(path):
    """Turn any error over outside input into ValueError "path: what is wrong".

    Not for the project's own logic. An OSError that names its file passes through.
    """
    try:
        yield
    except Exception as error:      # parsers raise errors of their own kinds
        if isinstance(error, OSError) and error.filename:
            raise
        lacks = "lacks " if isinstance(error, KeyError) else ""
        raise ValueError(f"{path}: {lacks}{shorten(str(error) or type(error))}") from None


def warn(line):
    """Print one line on standard error; the program goes on."""
    print(f"warning: {line}", file=sys.stderr)


def shorten(message):
    """Return a message or error in one line of at most 800 characters."""
    return textwrap.shorten(str(message), 800, placeholder=" ...")


def shorten_list(words):
    """'a, b, c', with no more than six of them written out."""
    if len(words) <= 6:
        return ", ".join(words)
    return f"{', '.join(words[:6])} and {len(words) - 6} more"


def nearest(word, words):
    """Return ' (did you mean ...?)' for the one of `words` that is most like `word`, or ''."""
    matches = difflib.get_close_matches(word, words)
    return f" (did you mean {matches[0]}?)" if matches else ""


def tidy(name):
    """A name or code as it is compared: stripped, in Unicode's form NFC."""
    return unicodedata.normalize("NFC", name.strip())


def split_commas(text):
    """'a, b' -> ['a', 'b']; None -> []."""
    return [tidy(part) for part in (text or "").split(",") if part.strip()]


def run_main(main):
    """Run a script's main: every error that a person can cause ends in one line and status 2."""
    for stream in (sys.stdout, sys.stderr):     # an unencodable letter must not end it
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        sys.exit(main())
    except BrokenPipeError:
        os._exit(1)             # `| head` has seen enough: what is left to print is dropped
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        line = error
    except RuntimeError as error:
        if "allocate" not in str(error):        # torch's word for too little memory
            raise
        line = ("out of memory: lower train.learners_at_once, train.batch_size or evaluate.tokens "
                f"(of a trained run in its config.yaml): {error}")
    print(f"error: {shorten(line)}", file=sys.stderr)
    sys.exit(2)


def make_parser(description, options):
    """-> an ArgumentParser of lines "--option META  help" or "--option META=default  help";
    without META an option is a flag."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    pattern = r"(--\S+)(?: (\w+)(?:=(\S+))?)?  +(.*)"
    for line in options.strip().splitlines():
        option, meta, default, text = re.fullmatch(pattern, line).groups()
        if meta:
            parser.add_argument(option, metavar=meta, default=default, help=text)
        else:
            parser.add_argument(option, action="store_true", help=text)
    return parser


# ---- Files ---------------------------------------------------------------------------------------

def read_text(path):
    """Return the text of a UTF-8 file without its byte order mark; ValueError with the bad line."""
    raw = Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not valid UTF-8 ({error.reason})") from None


@cache
def read_tsv(path, labels=LABELS):
    """Read one split -> list of Sentence, texts exactly as in the file, blanks included.

    Columns are found by name; without a column index_id, sentences are numbered. SIB-200 was
    written by pandas: a field that holds a quote is quoted and its quotes are doubled (7,688 of its
    sentences), so each line is CSV, read strictly. A sentence is one line: a stray quote cannot
    swallow the lines after it. ValueError with file and line for anything that is not clean. Empty
    lines are skipped.
    """
    columns = []
    sentences = {}                      # by index_id
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        with reading(f"{path}:{number}"):
            fields = next(csv.reader([line], delimiter="\t", strict=True))
            if not columns:
                columns = fields
                check({"category", "text"}.issubset(columns),
                      f"the header must name the columns category and text, it is {columns[:6]}")
            elif fields:
                check(len(fields) == len(columns), f"must have {len(columns)} fields")
                row = dict(zip(columns, fields))
                label = tidy(row["category"])
                check(label in labels, f"unknown category {label[:40]!r}, known are "
                      f"{shorten_list(labels)}; others go into labels.txt, one on each line")
                check(row["text"].strip(), "empty text")
                index_id = row.get("index_id", str(len(sentences)))
                check(index_id not in sentences, f"index_id {index_id!r} was already used")
                sentences[index_id] = Sentence(index_id, labels.index(label), row["text"])
    check(sentences, f"{path}: no sentence in this split")
    return list(sentences.values())


class Corpus:
    """A folder <language>/{train,dev,test}.tsv; a file validation.tsv is a dev split too.

    .root is the folder, .files {language: {split: path}}, sorted, .labels the label names in the
    order of their numbers. ValueError if there is no language.
    """

    def __init__(self, root):
        self.root = root
        self.files = defaultdict(dict)
        for path in sorted(self.root.glob("[!.]*/*.tsv")):
            split = path.stem.replace("validation", "dev")
            if split in SPLITS:
                self.files[tidy(path.parent.name)].setdefault(split, path)
        check(self.files, f"{root}: no folder <language>/{{train,dev,test}}.tsv here")
        # the labels beside the languages, else of all languages' own, else SIB-200's
        paths = list(self.root.glob("labels.txt")) or sorted(self.root.glob("*/labels.txt"))
        names = []
        for path in paths:
            names += map(tidy, read_text(path).split("\n"))
        self.labels = tuple(dict.fromkeys(filter(None, names))) or LABELS

    def read_any(self, language, split):
        """Return a list of Sentence, empty if the language does not have this split; ValueError,
        with the nearest code, for an unknown language."""
        check(language in self.files,
              f"no language {language!r} in {self.root}{nearest(language, self.files)}")
        path = self.files[language].get(split)
        return read_tsv(path, self.labels) if path else []

    def read(self, language, split):
        """Return a list of Sentence; ValueError for what read_any does not know or have."""
        sentences = self.read_any(language, split)
        check(sentences, f"{self.root / language / split}.tsv: no such split; {language} has "
                         f"{', '.join(self.files[language])}")
        return sentences


def short_hash(content):
    """Bytes -> 16 hexadecimal digits that tell them from others."""
    return hashlib.sha256(content).hexdigest()[:16]


def fingerprint(sentences):
    """Return a short hash of ids, labels and texts: two runs with the same one saw equal data."""
    content = "".join(repr(tuple(sentence)) for sentence in sentences)
    return short_hash(content.encode())


LEAK = 0.02     # share of a split that may be repeated: single sentences are in SIB-200, too


def find_leaks(corpus, sources, targets):
    """List what a model trained on `sources` has seen -> lines of text.

    That is dev sentences of the sources that are in their train splits, and test sentences of the
    targets that are in either, found by text or by index_id.
    """
    lines = []
    for what in ("text", "index_id"):
        places = {}                     # a text or index_id -> "train of eng_Latn"
        # dev sentences against train; then test sentences against both
        for seen, split, languages in (("train", "dev", sources), ("dev", "test", targets)):
            for code in sources:
                for sentence in corpus.read_any(code, seen):
                    places.setdefault(getattr(sentence, what), f"{seen} of {code}")
            for code in languages:
                values = [getattr(sentence, what) for sentence in corpus.read_any(code, split)]
                found = [places[value] for value in values if value in places]
                size = len(values)
                # ids that merely number the lines of each file say nothing
                if len(found) > LEAK * size and values[-1] not in (str(size), str(size - 1)):
                    lines.append(f"{len(found)} of {size} {split} sentences of {code} are also in "
                                 f"{shorten_list(sorted(set(found)))}, by their {what}")
    return lines


# ---- Token ids -----------------------------------------------------------------------------------

# Texts are tokenized in parts: the tokenizer holds 14 KB for each sentence while it works.
TEXTS_AT_ONCE = 2048
# A fast tokenizer keeps the last max_length as its state, which another thread would change.
TOKENIZER_LOCK = threading.Lock()


def tokenize(texts, tokenizer, max_length):
    """Texts -> list of int32 arrays of at most max_length token ids, special tokens included."""
    encoded = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start:start + TEXTS_AT_ONCE]
        with TOKENIZER_LOCK, reading("the backbone's tokenizer fails"):
            rows = tokenizer(part, truncation=True, max_length=max_length)
        encoded += [np.array(ids, dtype=np.int32) for ids in rows["input_ids"]]
    return encoded


def encode(texts, tokenizer, max_length):
    """tokenize(), with a warning that says how many texts are so long that they may be cut."""
    encoded = tokenize(texts, tokenizer, max_length)
    longest = sum(len(ids) == max_length for ids in encoded)
    if longest:
        warn(f"{longest:,} of {len(texts):,} texts fill or exceed data.max_length, {max_length} "
             f"tokens, where they are cut")
    return encoded


def collate(encoded, pad_id):
    """Token ids of B texts -> input_ids, attention_mask (1 token, 0 padding), both (B, T) int64.

    Padding is on the *right*: left padding would shift the positions that XLM-R gives to
    `inputs_embeds`.
    """
    lengths = np.array([len(ids) for ids in encoded])
    is_token = np.arange(lengths.max()) < lengths[:, None]          # (B, T)
    input_ids = np.full(is_token.shape, pad_id)
    input_ids[is_token] = np.concatenate(encoded)
    return torch.from_numpy(input_ids), torch.from_numpy(is_token.astype(np.int64))


# ---- Batches -------------------------------------------------------------------------------------

# ours: before sorting, each length grows by a random share, up to this, of the mean length. More
# noise mixes the sentences better and pads more. SIB-200, 12,000 word pieces, batches of 32:
#                                   pairs of a batch that       padding:   padding:
#                                   meet again in 10 epochs     one seed   10 seeds joined
#   0.12, Joshi5 (4,907 sentences)            40 %                5.5 %       5.9 %
#   0.12, one language (701)                  88 %                7-9 %       8-10 %
#   0,    one language                        98 %                3-6 %       3-6 %
#   group_by_length of transformers,
#         one language                        77 %               16-21 %
LENGTH_NOISE = 0.12


def length_batches(lengths, batch_size, seed, epoch):
    """Batches of one training epoch -> list of index arrays, a pure function of its arguments.

    Sentences of about equal length form a batch. Sizes and order of the batches depend on the
    epoch alone, only the noise on the seed: at step i the learners of all seeds have batches of
    one size and of about the same lengths, so that joining them (in train.py) adds little padding.
    """
    noise = np.random.default_rng([seed, epoch]).random(len(lengths))
    order = np.argsort(lengths + LENGTH_NOISE * lengths.mean() * noise, kind="stable")

    # One batch takes the remainder, and its few sentences count more, because a batch's loss is a
    # mean: it must not always be the batch of the longest ones.
    shared_random = np.random.default_rng(epoch)
    count = math.ceil(len(lengths) / batch_size)
    sizes = np.full(count, batch_size)
    sizes[shared_random.integers(count)] -= count * batch_size - len(lengths)
    batches = np.split(order, np.cumsum(sizes)[:-1])
    return [batches[i] for i in shared_random.permutation(count)]


# A batch of evaluation takes up to 32 texts of any length: enough to keep a processor busy.
# It takes more only while they are nearly as long as its longest, so that they pad at most 5 %.
FREE_TEXTS = 32
NEARLY_AS_LONG = 0.95


def token_batches(lengths, budget, extra=0):
    """Batches for evaluation -> list of index arrays, longest first: too little memory shows early.

    A batch has at most `budget` positions, padding and `extra` prompt rows of each text included;
    a text that is longer than the budget is a batch of its own.
    """
    sizes = np.asarray(lengths) + extra
    order = np.argsort(-sizes, kind="stable")
    batches = []
    while len(order):
        longest = sizes[order[0]]
        fit = max(1, budget // longest)
        similar = np.count_nonzero(sizes[order[:fit]] >= NEARLY_AS_LONG * longest)
        count = max(similar, min(fit, FREE_TEXTS))
        batches.append(order[:count])
        order = order[count:]
    return batches


# ---- Folders and the hub -------------------------------------------------------------------------

def locate(where, kind="model", patterns=None):
    """Find a corpus, a backbone or a run -> (folder, identity: {name, revision, folder}).

    where: {name, revision}, and it may have a `folder`, which is tried first: where it was when the
    run was trained. A folder that exists, here or in this repository, is used, and its revision is
    "local". The hub is asked neither for what was a folder nor for a mistyped path (a missing
    folder in one that exists). On the hub, kind is "dataset" or "model"; the files that match
    `patterns` come in one snapshot, and the revision is the commit. Without patterns the name
    itself is returned, for transformers to fetch. ValueError in one line.
    """
    name = where["name"]
    revision = where["revision"]
    for place in (where.get("folder", name), name, HERE / name):
        folder = Path(place).expanduser()
        if folder.is_dir():
            folder = folder.resolve()
            return folder, {"name": name, "revision": "local", "folder": str(folder)}
    # only a few backbones have a name without an owner
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+" if patterns else r"\w[\w.-]*(/[\w.-]+)?", name)
    mistyped = "/" in name and Path(name).parent.is_dir()
    check(on_hub and revision != "local" and not mistyped,
          f"{name}: no such folder in {Path.cwd()}")
    if patterns is None:
        return name, {"name": name, "revision": revision}
    import huggingface_hub
    with reading(f"{name}: not a folder here, and the hub does not give it (offline? give a "
                 f"folder; private or gated? `hf auth login` first)"):
        folder = Path(huggingface_hub.snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=patterns))
    return folder, {"name": name, "revision": folder.name}


def open_corpus(where):
    """Name and revision of a corpus -> (Corpus, identity). For both, and errors, see `locate`."""
    folder, identity = locate(where, "dataset", ["data/*.tsv", "data/*labels.txt"])
    if (folder / "data").is_dir():
        folder /= "data"
    return Corpus(folder), identity


# ---- The command ---------------------------------------------------------------------------------

def main(argv=None):
    """Count the sentences of all languages."""
    options = "--data DIR=.  folder <language>/{train,dev,test}.tsv, or a dataset on the hub"
    parser = make_parser("Check and count the sentences of a corpus.", options)
    args = parser.parse_args(argv)
    corpus, _ = open_corpus({"name": args.data, "revision": "main"})
    labels = Counter()
    for split in SPLITS:
        sizes = []
        for code in corpus.files:
            sentences = corpus.read_any(code, split)
            labels.update(corpus.labels[sentence.label] for sentence in sentences)
            sizes.append(len(sentences))
        print(f"{split:>5}: {min(sizes)} to {max(sizes)} sentences a language, "
              f"{sum(sizes):,} in all")
    counts = [f"{label} {labels[label]:,}" for label in corpus.labels]
    print(f"{len(corpus.files)} languages ({shorten_list(list(corpus.files))}), "
          f"{len(counts)} labels: {', '.join(counts)}")
    for line in find_leaks(corpus, corpus.files, corpus.files):
        print(line)


if __name__ == "__main__":
    run_main(main)
