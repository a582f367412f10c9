"""bench.py: fair contenders, and ratios that are computed as they are named. No figure is a time.

    python -m pytest tests/test_bench.py
"""
import numpy as np

import bench
import train
from data import collate


def test_bench_times_what_it_counts(monkeypatch, tmp_path):
    """Catches: a benchmark that no longer fits the code that it times, that leaves files behind,
    that trains on other batches than it counts; a floor with fewer texts or tokens than what stands
    over it."""
    trained, tables = [], []

    noting = lambda texts, pad_id: trained.append(texts) or collate(texts, pad_id)
    monkeypatch.setattr(train, "collate", noting)
    real = bench.measure
    monkeypatch.setattr(bench, "measure", lambda *table: tables.append(table) or real(*table))
    monkeypatch.chdir(tmp_path)
    options = "--learners 1,2 --steps 4 --turns 1 --device cpu --set train.amp=off"
    bench.main(options.split())
    assert not list(tmp_path.iterdir())
    (_, training, _), (_, evaluation, _) = tables
    assert list(training) == ["floor", "ours x 1", "ours x 2"]
    assert list(evaluation) == ["floor", "ours"]
    counted = training["ours x 2"][0].tolist()
    assert sorted(counted) == sorted(len(ids) for texts in trained[-2:] for ids in texts)
    lengths = training["ours x 1"][0]
    for floor, _ in (training["floor"], evaluation["floor"]):
        assert len(floor) >= len(lengths) and set(floor) == {round(lengths.mean())}


def test_turns_and_table(monkeypatch, capsys):
    """Catches: one contender after the other, so that a machine that slows down hits one of them; a
    warm-up that counts; a ratio the wrong way round, of medians, or of texts that differ."""
    seconds = iter([9, 9, 1, 2, 2, 1, 4, 8])            # in this order
    clock = [0]
    monkeypatch.setattr(bench, "timer", lambda: clock[0])

    def run():
        clock[0] += next(seconds)
    # 216 tokens with prompts of 20 rows, and 132
    contenders = {"floor": (np.array([10, 6, 4, 4, 8, 8, 8, 8]), run),
                  "ours": (np.array([10, 6, 4, 4, 8]), run)}
    bench.measure("training", contenders, turns=3)
    *_, floor, ours = capsys.readouterr().out.splitlines()
    assert floor.split() == ["floor", "4", "1.00"]
    assert ours.split() == ["ours", "2", "0.31"]
