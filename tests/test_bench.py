"""bench.py: fair contenders, and ratios that are computed as they are named. No figure is a time.

    python -m pytest tests/test_bench.py
"""
from importlib.util import find_spec

import numpy as np

import bench
import train
from data import collate


def test_bench_times_what_it_counts(monkeypatch, tmp_path, capsys):
    """Catches: a benchmark that no longer fits the code that it times, that leaves files behind,
    that trains on other batches than it counts; a floor with fewer texts or tokens than what stands
    over it; a contender that is missing without a word."""
    trained, tables = [], []

    noting = lambda texts, pad_id: trained.append(texts) or collate(texts, pad_id)
    monkeypatch.setattr(train, "collate", noting)
    monkeypatch.setattr(bench, "show_table", lambda *table: tables.append(table))
    monkeypatch.setitem(bench.SIZES, "tiny", (2, 16, 2))
    monkeypatch.chdir(tmp_path)
    assert bench.main("--learners 1,2 --steps 4 --turns 1 --device cpu --amp off".split()) == 0
    assert not list(tmp_path.iterdir())
    (contenders, seconds), = tables
    toolkit = ["toolkit"] if find_spec("micm_nlp") else []
    assert toolkit or "micm-nlp is not installed" in capsys.readouterr().out
    assert list(seconds) == ["ours x 1", "floor x 1", "ours x 2", "floor x 2", *toolkit,
                             "evaluation", "its floor"]
    assert min(seconds.values()) > [0]
    ours, floor = contenders[2:4]
    for texts, rectangle, lengths in zip(trained[-2:], floor.batches, ours.batches):
        assert sorted(map(len, texts)) == sorted(lengths)
        assert rectangle.tolist() == [round(lengths.mean())] * len(lengths)


def test_turns_and_table(capsys):
    """Catches: one contender after the other, so that a machine that slows down hits one of them; a
    warm-up that counts; a ratio the wrong way round, of medians, or of texts that differ."""
    seconds = iter([9, 9, 9, 1, 2, 2, 2, 1, 4, 4, 2, 8])        # in this order
    lengths = [10, 6, 4, 4, 8, 8, 8, 8]     # 216 tokens with prompts of 20 rows; the toolkit: 132
    contenders = [bench.Contender(name, [np.array(lengths[:count])], lambda _: next(seconds), floor)
                  for name, count, floor in (("ours", 8, "floor"), ("floor", 8, ""),
                                             ("toolkit", 5, ""))]
    bench.show_table(contenders, bench.take_turns(contenders, turns=3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["ours", "4", "0.50", "3.27"]
    assert lines[4].split() == ["toolkit", "1", "-", "1.00"]
