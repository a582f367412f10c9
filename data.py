"""SIB-200, and any corpus of its shape: from TSV files to batches of token ids.

The paper's section "Data": 7 topics in 205 parallel languages, 701 / 99 / 204 sentences each. A
corpus is a folder <language>/{train,dev,test}.tsv with the columns `category` and `text`. This
file needs torch and numpy (huggingface_hub to download) and knows nothing of the model. It goes
downwards: files, token ids, batches, the hub, the command. That checks and counts a corpus:

    $ python data.py --data DIR            (SIB-200: 5 s on one core)
    languages                           train     dev    test
    ace_Arab, ace_Latn ... zul_Latn       701      99     204
    205 languages, 205,820 sentences, 7 labels: science/technology, travel, politics, ...
"""
import argparse
import csv
import difflib
import hashlib
import io
import math
import os
import re
import signal
import sys
import threading
import time
from collections import namedtuple
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch

# The order of SIB-200's labels.txt; any other would silently permute what a trained head says.
LABELS = ("science/technology", "travel", "politics", "sports", "health", "entertainment",
          "geography")
SPLITS = ("train", "dev", "test")
SPLIT_OF_FILE = {"train": "train", "dev": "dev", "validation": "dev", "test": "test"}

# index_id names a sentence in all languages; label counts from 0 in the corpus's order of labels.
Sentence = namedtuple("Sentence", "index_id label text")


def nearest(word, words):
    """Return ' (did you mean ...?)' for the one of `words` that is most like `word`, or ''."""
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def read_text(path):
    """Return the text of a UTF-8 file without its byte order mark; ValueError with the bad line."""
    raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
        bad = raw.find(b"\0")               # valid UTF-8, but a sign of UTF-16 or of a damaged file
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        line = 1 + raw[:bad].count(b"\n")
        raise ValueError(f"{path}:{line}: this is not UTF-8 text (byte 0x{raw[bad]:02x})")
    return text


def read_rows(path):
    """Yield (line, fields) for each CSV row of a tab-separated file; `line` is where it begins.

    SIB-200 was written by pandas: a field that holds a quote is quoted and its quotes are doubled
    (7,688 of its sentences), so this is CSV, read strictly. In a file that was written without
    quoting, a stray quote lets one field swallow the lines after it. No field of SIB-200 holds a
    line break or a tab, so such a field is a ValueError. Empty lines are skipped.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", strict=True)
    line = 1
    try:
        for fields in reader:
            if re.search("[\t\r\n]", "".join(fields)):
                raise ValueError(f"{path}:{line}: a field that begins here holds a line break or a "
                                 "tab: a stray quote? (a field with a quote must be quoted, its "
                                 "quotes doubled; a text must be one line without tabs)")
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: {error} (an unclosed or stray quote?)") from None


def read_tsv(path, labels=LABELS):
    """Read one split -> list of Sentence, texts exactly as in the file, blanks included.

    Columns are found by name; without a column index_id, sentences are numbered. Anything that is
    not clean is a ValueError with file and line.
    """
    rows = read_rows(path)
    line, header = next(rows, (1, []))
    for column in ("category", "text"):
        if header.count(column) != 1:
            raise ValueError(f"{path}:{line}: the header must name a column {column!r} once, "
                             f"it is {header[:6]}")

    sentences = []
    line_of = {}                            # index_id -> the line where it was first used
    for line, fields in rows:
        where = f"{path}:{line}"
        if len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} fields, but the header has {len(header)}")
        columns = dict(zip(header, fields))
        category = columns["category"]
        if category not in labels:
            raise ValueError(f"{where}: unknown category {category[:60]!r}, known are "
                             f"{', '.join(labels)}; name other labels in a file labels.txt beside "
                             "the languages, one on each line")
        if not columns["text"].strip():
            raise ValueError(f"{where}: empty text")
        index_id = columns.get("index_id", str(len(sentences)))
        if index_id in line_of:
            raise ValueError(f"{where}: index_id {index_id!r} is also that of line "
                             f"{line_of[index_id]}")
        line_of[index_id] = line
        sentences.append(Sentence(index_id, labels.index(category), columns["text"]))
    if not sentences:
        raise ValueError(f"{path}: no sentence in this split")
    return sentences


def read_labels(path):
    """Read a labels.txt -> tuple of names; ValueError unless there are two or more, each once."""
    names = tuple(name for name in read_text(path).splitlines() if name.strip())
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{path}: must name two or more labels, each once, one on each line")
    return names


class Corpus:
    """A folder <language>/{train,dev,test}.tsv; a file validation.tsv is a dev split too.

    .root is the folder, .labels the label names in the order of their numbers (see find_labels).
    FileNotFoundError if there is no language, ValueError for files that contradict each other.
    """

    def __init__(self, root):
        self.root = Path(root)
        self._files = {}                    # language -> {split: path}
        for path in sorted(self.root.glob("*/*.tsv")):
            if path.stem in SPLIT_OF_FILE:
                files = self._files.setdefault(path.parent.name, {})
                split = SPLIT_OF_FILE[path.stem]
                if split in files:
                    raise ValueError(f"{path}: {files[split].name} is the same split, keep one")
                files[split] = path
        if not self._files:
            raise FileNotFoundError(f"{root}: no folder <language>/{{train,dev,test}}.tsv here")
        self.labels = self.find_labels()

    def find_labels(self):
        """Return the labels of the file labels.txt beside the languages, which must hold those of
        the languages' own files; without it the union of these; without any SIB-200's.

        Languages may differ, as where each file names the classes that occur there. Then a line
        says the union, in the order of first mention, languages sorted by code.
        """
        named = {}                          # labels.txt of a language -> its labels
        for language in self._files:
            path = self.root / language / "labels.txt"
            if path.is_file():
                named[path] = read_labels(path)
        union = tuple(dict.fromkeys(label for labels in named.values() for label in labels))

        shared = self.root / "labels.txt"
        if shared.is_file():
            labels = read_labels(shared)
            for path, names in named.items():
                missing = [name for name in names if name not in labels]
                if missing:
                    raise ValueError(f"{path}: label {missing[0]!r} is missing in {shared}; "
                                     "add it there, or remove one of the files")
            return labels
        if len(set(named.values())) > 1:
            print(f"{self.root}: the languages' files labels.txt differ; their union counts, in "
                  f"order of first mention: {', '.join(union)}", file=sys.stderr)
        return union or LABELS

    def languages(self):
        """Return all language codes, sorted."""
        return list(self._files)

    def check(self, languages):
        """Raise ValueError for a language that is not in the corpus, with the nearest code."""
        for language in languages:
            if language not in self._files:
                hint = nearest(language, self._files)
                raise ValueError(f"no language {language!r} in {self.root}{hint}")

    def splits(self, language):
        """Return those of train, dev, test that a language has; ValueError for an unknown one."""
        self.check([language])
        return [split for split in SPLITS if split in self._files[language]]

    def read(self, language, split):
        """Return a list of Sentence; ValueError for an unknown language, FileNotFoundError for a
        split that it does not have."""
        self.check([language])
        files = self._files[language]
        split = SPLIT_OF_FILE.get(split, split)
        if split not in files:
            names = ", ".join(path.name for path in files.values())
            path = self.root / language / f"{split}.tsv"
            raise FileNotFoundError(f"{path}: no such split; {language} has {names}")
        return read_tsv(files[split], self.labels)


def fingerprint(sentences):
    """Return a short hash of ids, labels and texts: two runs with the same one saw equal data."""
    content = "".join(repr(tuple(sentence)) for sentence in sentences)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# Texts are tokenized in parts, for the tokenizer's records of a sentence take 14 KB meanwhile.
TEXTS_AT_ONCE = 2048
# A fast tokenizer keeps the last max_length as its state, which another thread would change.
TOKENIZER_LOCK = threading.Lock()


def encode(texts, tokenizer, max_length):
    """Tokenize texts -> (list of int32 arrays of token ids, number of texts that were cut).

    The ids include the special tokens. The tokenizer cuts a text of more than max_length tokens.
    """
    encoded = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):       # one token more shows what is too long
        encoded += tokenize(texts[start:start + TEXTS_AT_ONCE], tokenizer, max_length + 1)
    too_long = [i for i, ids in enumerate(encoded) if len(ids) > max_length]
    for start in range(0, len(too_long), TEXTS_AT_ONCE):
        part = too_long[start:start + TEXTS_AT_ONCE]
        shorter = tokenize([texts[i] for i in part], tokenizer, max_length)
        for i, ids in zip(part, shorter):
            encoded[i] = ids
    return encoded, len(too_long)


def tokenize(texts, tokenizer, max_length):
    """Tokenize texts at once -> list of int32 arrays of at most max_length token ids."""
    with TOKENIZER_LOCK:
        output = tokenizer(texts, truncation=True, max_length=max_length,
                           return_attention_mask=False, return_token_type_ids=False)
    return [np.array(ids, dtype=np.int32) for ids in output["input_ids"]]


def collate(encoded, pad_id):
    """Token ids of B texts -> input_ids, attention_mask (1 token, 0 padding), both (B, T) int64.

    Padding is on the *right*: left padding would shift the positions that XLM-R gives to
    `inputs_embeds`.
    """
    longest = max(len(ids) for ids in encoded)
    input_ids = np.full((len(encoded), longest), pad_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, ids in enumerate(encoded):
        input_ids[i, :len(ids)] = ids
        attention_mask[i, :len(ids)] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask)


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
    one size and of about the same lengths, so that joining them adds little padding.
    """
    lengths = np.asarray(lengths)
    noise = np.random.default_rng([seed, epoch]).random(len(lengths))
    order = np.argsort(lengths + LENGTH_NOISE * lengths.mean() * noise, kind="stable")

    # One batch takes the remainder, and its few sentences count more: it must not always be the
    # batch of the longest ones.
    shared_random = np.random.default_rng(epoch)
    count = math.ceil(len(lengths) / batch_size)
    sizes = np.full(count, batch_size)
    small = shared_random.integers(count)
    sizes[small] = len(lengths) - (count - 1) * batch_size
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
    order = np.argsort(-np.asarray(lengths), kind="stable")
    sizes = np.asarray(lengths)[order] + extra
    batches = []
    start = 0
    while start < len(order):
        longest = sizes[start]
        fit = max(1, budget // longest)
        similar = np.count_nonzero(sizes[start:start + fit] >= NEARLY_AS_LONG * longest)
        end = start + max(similar, min(fit, FREE_TEXTS))
        batches.append(order[start:end])
        start = end
    return batches


HUB_TIMEOUT = 30                            # seconds without a byte of answer
HUB_WAITS = (1, 4, 16)                      # seconds before the second, third and last try
TEMPORARY_STATUS = (408, 429, 500, 502, 503, 504)


def locate(name, revision="main"):
    """Find a corpus, a folder or a dataset on the hub -> (folder of the languages, revision).

    The revision is "local" or the commit. FileNotFoundError says what was wanted and what to do.
    """
    folder = Path(os.path.expanduser(name))
    beside_this_file = Path(__file__).resolve().parent / name
    if not folder.is_dir() and beside_this_file.is_dir():
        folder = beside_this_file
    if folder.is_dir():
        revision = "local"
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        folder = download(name, revision, "dataset", ["data/*.tsv", "data/*labels.txt"])
        revision = folder.name
    else:
        raise FileNotFoundError(f"data.name: {name!r} is neither a folder nor a dataset on the hub")
    if (folder / "data").is_dir():
        folder = folder / "data"
    return folder, revision


def download(name, revision, kind, patterns=None, leave_out=None):
    """Fetch files of a repository on the hub -> folder (Path), named after the commit.

    `kind` is "model" or "dataset". Files that match one of `patterns` (None: all) and none of
    `leave_out` are fetched in one snapshot, for hundreds of single requests end in "429 too many
    requests", and compared with their hashes. Temporary trouble is tried again; then
    FileNotFoundError says in one line what was wanted.
    """
    import huggingface_hub
    for wait in (*HUB_WAITS, None):
        try:
            limit_waiting(huggingface_hub.get_session())
            folder = Path(huggingface_hub.snapshot_download(
                name, repo_type=kind, revision=revision, max_workers=4,
                allow_patterns=patterns, ignore_patterns=leave_out))
            verify(folder, patterns, leave_out)
            return folder
        except Exception as error:          # the client's, httpx's, requests' and the system's
            if wait is None or not is_temporary(error):
                reason = (str(error).strip() or "no answer").splitlines()[0]
                raise FileNotFoundError(
                    f"cannot get the {kind} {name} (revision {revision}) from the hub: "
                    f"{type(error).__name__}: {shorten(reason, 160)} (offline? --data FOLDER and "
                    "--backbone FOLDER take a copy; private or gated? `hf auth login` first)"
                ) from None
            time.sleep(wait)


def limit_waiting(session):
    """Give each request of the hub's client a timeout: else a server could let us wait for ever.

    Called before each try, for the client opens a new session after some errors. Only the sessions
    of httpx, in huggingface_hub 1, have hooks for this.
    """
    hooks = getattr(session, "event_hooks", None)
    if hooks and set_timeouts not in hooks["request"]:
        hooks["request"].append(set_timeouts)


def set_timeouts(request):
    """Set those of a request's timeouts (connect, read, write, pool) that the client left open."""
    timeouts = request.extensions["timeout"]
    for phase, seconds in timeouts.items():
        if seconds is None:
            timeouts[phase] = HUB_TIMEOUT


def is_temporary(error):
    """Tell whether an error of the hub's client may be gone at the next try."""
    if isinstance(error, ConnectionError) or "Timeout" in type(error).__name__:
        return True
    for cause in (error, error.__cause__):  # a LocalEntryNotFoundError: the answer is in its cause
        response = getattr(cause, "response", None)
        if getattr(response, "status_code", None) in TEMPORARY_STATUS:
            return True
    return False


def verify(folder, patterns=None, leave_out=None):
    """Compare the files that were asked for (see download) with their hashes, for the hub's client
    compares sizes only. Those that differ are removed, to be fetched anew; then ConnectionError."""
    damaged = set()
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        wanted = patterns is None or matches_any(name, patterns)
        if leave_out and matches_any(name, leave_out):
            wanted = False
        if wanted and file.is_symlink():    # to a file of the cache that is named after its hash
            blob = file.resolve()
            if hash_like_name(blob) != blob.name:
                damaged.add(blob)
    for blob in damaged:
        blob.unlink()
    if damaged:
        raise ConnectionError(f"{len(damaged)} files have other content than the hub announced "
                              "and are removed")


def matches_any(name, patterns):
    """Tell whether a file's name matches one of the patterns, as the hub's client matches them."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def hash_like_name(blob):
    """Return the hash of a cached file, of the kind that its name has: git's SHA-1, or SHA-256 for
    a large file. A name of any other kind is returned itself, for it tells nothing."""
    if len(blob.name) == 40:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    elif len(blob.name) == 64:
        digest = hashlib.sha256()
    else:
        return blob.name
    with blob.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


ERROR_LENGTH = 1000                         # characters: a file must not flood the terminal


def shorten(text, limit):
    """Return the text in one line of about `limit` characters at most, cut after a word."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    whole_words = text[:limit].rsplit(" ", 1)[0]
    return f"{whole_words} ..."


def count_sentences(corpus):
    """Read a whole corpus -> {language: (train, dev, test)}, {language: n}, list of errors.

    The first has the numbers of sentences, "-" for a split that the language does not have and "?"
    for one that cannot be read; the second has the number of test texts that are in train too.
    """
    counts = {}
    repeated = {}
    errors = []
    for language in corpus.languages():
        numbers = dict.fromkeys(SPLITS, "-")
        texts = dict.fromkeys(SPLITS, set())
        for split in corpus.splits(language):
            try:
                sentences = corpus.read(language, split)
            except (ValueError, OSError) as error:
                errors.append(str(error))
                numbers[split] = "?"
            else:
                numbers[split] = len(sentences)
                texts[split] = {sentence.text for sentence in sentences}
        counts[language] = tuple(numbers.values())
        in_both = texts["train"] & texts["test"]
        if in_both:
            repeated[language] = len(in_both)
    return counts, repeated, errors


def main(argv=None):
    """Count the sentences of all languages -> status: 0, or 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(description="Check and count the sentences of a corpus.")
    parser.add_argument("--data", required=True,
                        help="folder <language>/{train,dev,test}.tsv, or a dataset on the hub")
    folder, _ = locate(parser.parse_args(argv).data)
    corpus = Corpus(folder)
    counts, repeated, errors = count_sentences(corpus)

    languages_with = {}                     # (train, dev, test) -> languages with these numbers
    total = 0
    for language, numbers in counts.items():
        languages_with.setdefault(numbers, []).append(language)
        total += sum(number for number in numbers if isinstance(number, int))
    print(f"{'languages':<32}{'train':>8}{'dev':>8}{'test':>8}")
    for (train, dev, test), languages in languages_with.items():
        names = ", ".join(languages)
        if len(languages) > 3:
            names = f"{languages[0]}, {languages[1]} ... {languages[-1]}"
        print(f"{names:<32}{train:>8}{dev:>8}{test:>8}")
    print(f"{len(counts)} languages, {total:,} sentences, {len(corpus.labels)} labels: "
          + ", ".join(corpus.labels))
    if repeated:
        pairs = ", ".join(f"{language} {number}" for language, number in repeated.items())
        print(f"texts of test that are in train too: {pairs}")
    for error in errors:
        print(f"error: {shorten(error, ERROR_LENGTH)}", file=sys.stderr)
    return 2 if errors else 0


def run_main(main):
    """Run a script's main: every error that a person can cause ends in one line and status 2."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:       # as train.py has it during imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:                 # `| head` has seen enough: drop what is left to print
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except torch.OutOfMemoryError as error:
        print(f"error: {shorten(str(error), ERROR_LENGTH)}; lower evaluate.tokens (config.yaml; "
              f"for a run of your own, the config.yaml in its folder)", file=sys.stderr)
        status = 2
    except (ValueError, OSError) as error:
        print(f"error: {shorten(str(error), ERROR_LENGTH)}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    run_main(main)
