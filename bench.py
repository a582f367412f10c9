"""Speed, padding and memory of training and evaluation, beside the bare backbone and the authors' toolkit.

Contenders take turns, because machines drift: read the ratios. Sentence lengths are a corpus's; weights and
token ids are random, which changes no speed.

    ours x K    train.py's own loop up to its first dev evaluation: XPE on Joshi5, K seeds in one pass
    floor x K   the same backbone over as many rows and tokens, forward and backward to one leaf tensor of
                prompt rows: no padding, mask, encoder, head, optimizer
    toolkit     micm-nlp, the authors' library, on transformers' Trainer: Adafactor, group_by_length, no logs
    evaluation  evaluate.py's `predict`, and its floor: forward only (on a CPU some batches of it)

    python bench.py --size large --data Davlan/sib200 --tokenizer FacebookAI/xlm-roberta-large

One thread of an AMD EPYC, --size tiny --attention eager, bf16, an epoch of real SIB-200 lengths a turn:
                 run-steps/s sentences/s of floor x toolkit padding    GB
    ours x 1            7.41         237    1.391     1.568    2.6%     -
"""
import argparse
import tempfile
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import transformers
from torch.utils.benchmark import Timer, timer
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_pt_utils import get_length_grouped_indices as grouped

import train
from data import Corpus, encode, length_batches, locate, run_main, token_batches
from evaluate import HERE, load_config, pick_device, place, predict, resolve_group

SIZES = {"tiny": (3, 192, 4, 12000), "small": (6, 256, 4, 12000),       # layers, width, heads, vocabulary
         "base": (12, 768, 12, 250002), "large": (24, 1024, 16, 250002)}        # these two are XLM-R's
PAD, CLASSES, P = 1, 7, 20


def ours(backbone, ids, labels, K, config, cfg, device):
    """-> (model, autocast, run): run(steps) takes steps of train.train with K learners."""
    task = SimpleNamespace(ids={"train": ids}, labels={"train": labels}, weights=torch.ones(CLASSES),
                           lengths=np.array([len(x) for x in ids]))
    meta = {"labels": range(CLASSES), "reads": "prompt"}
    learners = [train.Learner(HERE / "no such folder", k, task, dict(meta)) for k in range(K)]
    model = train.make_model(SimpleNamespace(config=config, cfg=cfg, source=None), learners, backbone)
    autocast = place(model, device, cfg["amp"], cfg["frozen_weights"])

    def run(steps):
        settings = cfg | {"steps": steps, "evaluate_every": steps}      # stopped at its first evaluation
        with mock.patch.object(train, "judge_all", side_effect=StopIteration), suppress(StopIteration):
            train.train(learners, model, autocast, settings, PAD, device, quiet=True)
    return model, autocast, run


def floor(backbone, autocast, batches, device, backward=True):
    """-> run(steps): as many rows and tokens, in full rectangles, through the bare backbone."""
    words = backbone.get_input_embeddings()
    rows = torch.randn_like(words.weight[None, :P]).requires_grad_()                            # (1, P, H)
    weights = torch.randn(rows.shape[-1], device=device)    # a LayerNorm's plain sum has no gradient
    ids = [torch.randint(5, len(words.weight), (len(n), round(n.mean())), device=device) for n in batches]

    def run(steps):
        backbone.train(backward)
        for x in ids[:steps]:
            with torch.set_grad_enabled(backward), autocast():
                h = backbone(inputs_embeds=torch.cat((rows.expand(len(x), -1, -1), words(x)), 1))[0]
            if backward:
                (h[:, 0].float() * weights).sum().backward()
    return run


def toolkit(sizes, ids, labels, cfg, device, tokenizer):
    """-> (model, run): run(steps) takes steps of the authors' toolkit -> seconds, by its Trainer's clock."""
    from micm_nlp.models.xpe import get_xpe_model
    with redirect_stdout(None):                     # it prints its layers, and below its figures
        model = get_xpe_model(transformers.XLMRobertaForSequenceClassification(sizes), dict(
            peft_type="XPE", task_type="SEQ_CLS", encoder_reparameterization_type="MLP", num_virtual_tokens=P,
            encoder_ratio=1.0, encoder_hidden_size=sizes.hidden_size // 4, encoder_num_layers=2,
            encoder_dropout=0.1, encoder_freeze=False, encoder_embedding_freeze=False)).to(device)
    collator = transformers.DataCollatorWithPadding(transformers.AutoTokenizer.from_pretrained(tokenizer))
    rows = [{"input_ids": x, "attention_mask": [1] * len(x), "labels": int(y)} for x, y in zip(ids, labels)]

    def run(steps):
        with redirect_stdout(None), tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=cfg["batch_size"], optim="adafactor",
                train_sampling_strategy="sequential", bf16=cfg["amp"] == "bf16", report_to="none",
                use_cpu=device.type == "cpu", save_strategy="no", logging_strategy="no", disable_tqdm=True)
            return transformers.Trainer(model, arguments, collator, rows).train().metrics["train_runtime"]
    return model, run


def sentence_lengths(args, config):
    """Tokens of each training sentence (Joshi5), then of each test sentence (every language), of a corpus."""
    corpus = Corpus(locate(args.data)[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    sources = [c for c in resolve_group(config, "joshi5") if c in corpus.languages()]
    for split, languages in (("train", sources), ("test", corpus.languages())):
        texts = [s.text for c in languages for s in corpus.read(c, split)]
        n = np.array([len(x) for x in encode(texts, tokenizer, config["data"]["max_length"])])
        print(f"{split}: {len(languages)} languages, {len(n):,} sentences of {n.mean():.0f} tokens")
        yield n


def contenders(args, config, device, lengths, tests):
    """-> {name: who takes turns: run(steps), its module, its floor's name, what its batches hold}."""
    layers, H, heads, vocabulary = SIZES[args.size]
    sizes = transformers.XLMRobertaConfig(
        vocab_size=vocabulary, hidden_size=H, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * H, max_position_embeddings=514, type_vocab_size=1, num_labels=CLASSES)
    backbone = transformers.AutoModel.from_config(sizes, attn_implementation=args.attention)
    backbone.pooler = None
    cfg = train.settings_for(config, "xpe", None, None) | {"amp": args.amp}
    rng, B, out = np.random.default_rng(0), cfg["batch_size"], {}
    ids = [rng.integers(5, vocabulary, n).tolist() for n in lengths]
    labels = rng.integers(0, CLASSES, len(ids))

    def enter(name, of, run, module, batches, trains=True):     # batches: the lengths of their texts
        n = np.concatenate(batches)
        area = sum(len(b) * b.max() for b in batches)           # of the text: prompt rows need no padding
        out[name] = SimpleNamespace(run=run, module=module, of=of, trains=trains, steps=len(batches),
                                    rows=len(n), tokens=n.sum() + P * len(n), rates=[],
                                    padding=1 - n.sum() / area if of else 0)

    for K in map(int, args.seeds.split(",")):
        orders = [length_batches(lengths, B, seed, 0) for seed in range(K)]     # train.py's first epoch
        batches = [lengths[np.concatenate(step)] for step in zip(*orders)]
        batches = batches[:max(2, (args.steps or len(batches)) // K)]
        model, autocast, run = ours(backbone, ids, labels, K, config, cfg, device)
        enter(f"ours x {K}", f"floor x {K}", run, model, batches)
        enter(f"floor x {K}", "", floor(backbone, autocast, batches, device), backbone, batches)
        if K == 1 and find_spec("micm_nlp"):        # as many batches of the Trainer's own order of an epoch
            own = np.split(grouped(lengths.tolist(), B), range(B, len(lengths), B))
            own = own[::max(1, len(own) // len(batches))][:len(batches)]
            rows = np.concatenate(own)
            peer, run = toolkit(sizes, [ids[i] for i in rows], labels[rows], cfg, device, args.tokenizer)
            enter("toolkit", "floor x 1", run, peer, [lengths[b] for b in own])
    batches = [tests[b] for b in token_batches(tests, cfg["tokens"], P)]
    batches = batches if device.type == "cuda" else batches[len(batches) // 24::-(-len(batches) // 12)]
    texts = [rng.integers(5, vocabulary, n).tolist() for n in np.concatenate(batches)]
    enter("evaluation", "its floor", lambda steps: predict(model, texts, PAD, None, cfg["tokens"], autocast),
          model, batches, trains=False)
    enter("its floor", "", floor(backbone, autocast, batches, device, backward=False), backbone, batches,
          trains=False)
    return out


def main(argv=None):
    """The command line, the table."""
    parser = argparse.ArgumentParser(description="Speed beside the bare backbone and the authors' toolkit.")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="auto", help="cpu, cuda (default: auto)")
    parser.add_argument("--amp", choices=("bf16", "off"), default="bf16")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="not the toolkit's")
    parser.add_argument("--data", default=str(HERE / "sample" / "sib200"), help="a corpus, as for train.py")
    parser.add_argument("--tokenizer", default=str(HERE / "sample" / "backbone"), help="a folder or hub name")
    parser.add_argument("--seeds", default="1,3,10", help="K: numbers of seeds trained in one pass")
    parser.add_argument("--steps", type=int, default=0, help="K x steps of one turn (default: an epoch)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; medians are printed")
    args = parser.parse_args(argv)
    config, device = load_config(), pick_device(args.device)
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.size}, {args.amp}, {args.attention}; {machine}; torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    lengths, tests = sentence_lengths(args, config)
    table = contenders(args, config, device, lengths, tests)
    for turn in range(args.repeats + 1):            # the first is the warm-up
        for x in table.values():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - sum(p.nbytes for p in x.module.parameters())
            start = timer()         # waits for the GPU
            took = x.run(x.steps if turn else 4)
            took = took if isinstance(took, float) else timer() - start       # the toolkit says it itself
            if turn:
                x.rates.append(x.tokens / took)
            x.gb = f"{(torch.cuda.max_memory_allocated() - others) / 1e9:.2f}" if gpu else "-"

    print(f"\n{'':<12} run-steps/s sentences/s of floor x toolkit padding    GB")
    for name, x in table.items():
        x.rate = np.median(x.rates)                 # real tokens a second, the prompt's rows among them
        steps = x.rate / (config["train"]["batch_size"] * (lengths.mean() + P))     # of average length
        against = [f"{np.median(np.divide(x.rates, table[other].rates)):.3f}" if other in table else "-"
                   for other in (x.of, "toolkit")]
        print(f"{name:<12}{f'{steps:.2f}' if x.trains else '-':>12}{x.rate * x.rows / x.tokens:>12.0f}"
              f"{against[0]:>9}{against[1] if x.trains else '-':>10}{x.padding:>8.1%}{x.gb:>6}")
    if gpu:
        bare = next(x for name, x in table.items() if name.startswith("floor"))
        with FlopCounterMode(display=False) as counter:
            bare.run(bare.steps)
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        card = 2 * 8192 ** 3 / Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=1).median
        used = counter.get_total_flops() / bare.tokens / card       # seconds of the card for a token
        print(f"share of the {card / 1e12:.0f} TFLOP/s of a large bf16 matrix product: "
              + ", ".join(f"{name} {x.rate * used:.0%}" for name, x in table.items() if x.trains))


if __name__ == "__main__":
    run_main(main)
