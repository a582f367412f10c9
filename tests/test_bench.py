"""bench.py: fair contenders, and ratios that are computed as they are named. No figure is a time.

    python -m pytest tests/test_bench.py
"""
import argparse
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import bench
import train
from data import collate, length_batches

P = 20                              # prompt rows of config.yaml
BATCH = 32                          # its batch size


@pytest.fixture(scope="module")
def setup():
    """The sample corpus and a backbone of two layers, 16 wide."""
    sizes = bench.SIZES["tiny"]
    bench.SIZES["tiny"] = (2, 16, 2)
    args = argparse.Namespace(data=str(bench.HERE / "sample" / "sib200"), amp="off", size="tiny",
                              tokenizer=str(bench.HERE / "sample" / "backbone"), attention="auto")
    yield bench.read_setup(args, torch.device("cpu"))
    bench.SIZES["tiny"] = sizes


def test_bench_runs_and_says_that_the_toolkit_is_missing(monkeypatch, tmp_path, capsys):
    """Catches: a benchmark that no longer fits the code that it times, that leaves files behind, or
    that shows an empty column without a word."""
    monkeypatch.setitem(bench.SIZES, "tiny", (1, 16, 2))
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert bench.main("--learners 1,2 --steps 4 --turns 1 --device cpu --amp off".split()) == 0
    output = capsys.readouterr().out
    assert "micm-nlp is not installed" in output
    assert "CPU with" in output and "float32" in output
    table = output.split("\n\n")[1].splitlines()
    cells = {line[:12].strip(): line[12:].split() for line in table[1:]}
    assert list(cells) == ["ours x 1", "floor x 1", "ours x 2", "floor x 2",
                           "evaluation", "its floor"]
    assert float(cells["ours x 2"][0]) > 0
    assert float(cells["evaluation"][2]) > 0
    assert not list(tmp_path.iterdir())


def test_ours_is_train_pys_own_loop(setup, monkeypatch):
    """Catches: another number of steps than asked for, other batches than the table counts, a whole
    dev evaluation or a checkpoint in the time, learners that do not move."""
    batches = bench.first_epoch(setup.task, BATCH, K=2)[:3]
    ours = bench.Ours(setup, 2, batches)
    before = [learner.tensors() for learner in ours.learners]
    evaluated, trained = [], []

    def predict(model, encoded, *arguments):
        evaluated.append(len(encoded))
        return torch.zeros(len(encoded), 7)

    def count(texts, pad_id):
        trained.append([len(ids) for ids in texts])
        return collate(texts, pad_id)

    monkeypatch.setattr(train, "predict", predict)
    monkeypatch.setattr(train, "collate", count)
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: pytest.fail("a checkpoint"))
    assert ours.run(3) > 0
    assert evaluated == [2]             # one sentence for each learner
    assert [sorted(lengths) for lengths in trained] == [sorted(lengths) for lengths in batches]
    for learner, old in zip(ours.learners, before):
        assert not torch.equal(learner.tensors()["prompt"]["encoded"], old["prompt"]["encoded"])
    assert not learner.folder.exists()


def test_every_contender_is_shortened(setup):
    """Catches: learners whose last layer computes all positions, because those before them have
    converted the weights to bf16."""
    assert setup.backbone(inputs_embeds=torch.zeros(1, 5, 16))[0].shape[1] == 5
    assert setup.shortened(inputs_embeds=torch.zeros(1, 5, 16))[0].shape[1] == 1
    for K in (1, 2):
        ours = bench.Ours(setup, K, bench.first_epoch(setup.task, BATCH, K)[:1])
        assert ours.model.backbone is setup.shortened


def test_the_floor_does_as_much_without_padding(setup):
    """Catches: a floor with fewer texts or tokens than the contender that it stands under."""
    batches = bench.first_epoch(setup.task, BATCH, K=2)
    floor = bench.Floor("floor x 2", setup, nullcontext, batches)
    assert [len(ids) for ids in floor.input_ids] == [len(lengths) for lengths in batches]
    tokens = sum(ids.numel() for ids in floor.input_ids)
    assert tokens == pytest.approx(sum(lengths.sum() for lengths in batches), rel=0.01)
    seen = []

    def note_shape(module, inputs, output):
        seen.append(output[0].shape)

    hook = setup.backbone.register_forward_hook(note_shape)
    assert floor.run(2) > 0
    hook.remove()
    rows, columns = floor.input_ids[1].shape
    assert seen[1] == (rows, P + columns, 16)
    assert len(seen) == 2
    assert floor.prompt.grad.abs().sum() > 0, "backward went through the whole backbone"
    assert all(p.grad is None for p in setup.backbone.parameters())


def test_evaluation_answers_the_texts_that_it_counts(setup):
    """Catches: sentences counted that are not answered; on a CPU only the longest ones."""
    ours = bench.Ours(setup, 1, [])
    evaluation = bench.Evaluation(setup, ours, budget=640)
    assert evaluation.count_texts() == len(evaluation.texts) < len(setup.test)
    lengths = np.concatenate(evaluation.batches)
    assert sorted(lengths) == sorted(len(ids) for ids in evaluation.texts)
    whole = np.array([len(ids) for ids in setup.test])
    assert lengths.mean() == pytest.approx(whole.mean(), rel=0.15)
    assert evaluation.run(0) > 0


def test_first_epoch_is_the_loops(setup):
    """Catches: lengths of one learner's batches in the place of all."""
    lengths = setup.task.lengths
    orders = [length_batches(lengths, BATCH, seed, 0) for seed in range(3)]
    batches = bench.first_epoch(setup.task, BATCH, K=3)
    wanted = [lengths[orders[k][1]].sum() for k in range(3)]
    assert batches[1].sum() == sum(wanted)
    assert sum(len(batch) for batch in batches) == 3 * len(lengths)


class Fake(bench.Contender):
    """Runs in the seconds that it is given."""

    def __init__(self, name, batches, seconds=(), protocol=None):
        super().__init__(name, [np.array(lengths) for lengths in batches])
        self.seconds = list(seconds)
        self.protocol = protocol

    def run(self, steps):
        self.protocol.append((self.name, steps))
        return float(len(self.protocol))


def test_they_take_turns():
    """Catches: one contender after the other, so that a machine that slows down hits one of them; a
    warm-up that counts."""
    protocol = []
    fakes = [Fake(name, [[5], [6]], protocol=protocol) for name in "ab"]
    bench.take_turns(fakes, turns=2, on_gpu=False)
    assert protocol == [("a", 4), ("b", 4), ("a", 2), ("b", 2), ("a", 2), ("b", 2)]
    assert fakes[0].seconds == [3.0, 5.0]


def test_the_table_computes_what_it_says(capsys):
    """Catches: a ratio the wrong way round or of medians, steps that forget K, padding that counts
    prompt rows."""
    ours = Fake("ours x 2", [[10, 6, 4, 4], [8, 8, 8, 8]], seconds=[1.0, 2.0, 4.0])
    ours.floor = Fake("floor x 2", ours.batches, seconds=[2.0, 1.0, 2.0])
    toolkit = Fake("toolkit", [[10, 6], [10, 10]], seconds=[2.0, 4.0, 8.0])
    bench.show_table([ours, ours.floor, toolkit], batch_size=2, prompt_length=4)
    lines = capsys.readouterr().out.splitlines()
    # ours: 8 texts and 56 + 8 x 4 = 88 tokens; toolkit: 4 texts and 36 + 16 = 52, in twice the time
    assert lines[2].split() == ["ours", "x", "2", "2.00", "4", "0.50", "3.38", "22.2%", "-"]
    assert lines[4].split() == ["toolkit", "0.50", "1", "-", "1.00", "10.0%", "-"]


@pytest.mark.skipif(not find_spec("micm_nlp"), reason="the authors' toolkit is not installed")
def test_the_toolkit_trains_as_much_as_ours(setup):
    """Catches: a contender with another prompt, encoder or head, or with other texts."""
    ours = bench.Ours(setup, 1, [])
    toolkit = bench.Toolkit(setup, 4)
    assert toolkit.run(2) > 0
    trainable = sum(p.numel() for p in toolkit.model.parameters() if p.requires_grad)
    ours.run(1)
    assert trainable == ours.learners[0].meta["training"]["trainable"]
    assert len(toolkit.batches) == 4
    lengths = [len(text["input_ids"]) for text in toolkit.texts]
    assert lengths == list(np.concatenate(toolkit.batches))
    assert toolkit.count_texts() == len(toolkit.texts)
