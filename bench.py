"""Speed, padding and memory of training and evaluation, beside the bare backbone and the authors' toolkit.

One run on one machine, real SIB-200 sentence lengths, and the contenders take turns because machines drift:
read the ratios. Weights and token ids are random, which changes no speed.

    ours x K    train.py's own loop up to its first dev evaluation: XPE, K seeds in one pass
    floor x K   the same backbone over as many rows and tokens, forward and backward to one leaf tensor of
                prompt rows: no padding, mask, encoder, head, optimizer
    toolkit     micm-nlp, the authors' library, on transformers' Trainer: Adafactor, group_by_length, no logs
    evaluation  evaluate.py's `predict`, and its floor: forward only

    python bench.py --size small --amp off          # with sample/'s sentences and tokenizer
    python bench.py --size large --data Davlan/sib200 --tokenizer FacebookAI/xlm-roberta-large

One thread of an AMD EPYC that other jobs shared, --size tiny --attention eager --steps 40:
    ours x 1            6.23         192    1.076     1.439    2.6%     -
"""
import argparse
import resource
import tempfile
import time
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.trainer_pt_utils import get_length_grouped_indices as grouped

import train
import xpe
from data import Corpus, encode, length_batches, locate, run_main, token_batches
from evaluate import HERE, load_config, pick_device, place, predict, resolve_group

# layers, width, heads, vocabulary, positions; base and large are XLM-R's
SIZES = {"tiny": (3, 192, 4, 12000, 258), "small": (6, 256, 4, 12000, 258),
         "base": (12, 768, 12, 250002, 514), "large": (24, 1024, 16, 250002, 514)}
PAD, CLASSES, P = 1, 7, 20


def now():
    """Seconds, once the GPU has done all that it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def sentence_lengths(args, config):
    """-> tokens of each training sentence, tokens of each test sentence."""
    corpus, cut = Corpus(locate(args.data)[0]), config["data"]["max_length"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    sources = [x for x in resolve_group(config, args.sources) if x in corpus.languages()]
    for split, languages in (("train", sources), ("test", corpus.languages())):
        texts = [s.text for x in languages for s in corpus.read(x, split)]
        n = np.array([len(x) for x in encode(texts, tokenizer, cut)])
        n = np.clip((n * args.mean / n.mean()).round(), 3, cut).astype(int) if args.mean else n
        print(f"{split}: {len(languages)} languages, {len(n):,} sentences of {n.mean():.0f} tokens")
        yield n


def padding(lengths, batches):
    """Share of pads among the text's positions (prompt rows, which need none, are not counted)."""
    area = sum(len(b) * lengths[b].max() for b in batches)
    return 1 - lengths[np.concatenate(batches)].sum() / area


def ours(backbone, ids, labels, K, cfg, device):
    """-> (model, autocast, run): run(steps) takes steps of train.train with K learners."""
    H = backbone.config.hidden_size
    task = SimpleNamespace(ids={"train": ids}, labels={"train": labels}, weights=torch.ones(CLASSES),
                           lengths=np.array([len(x) for x in ids]))
    model = xpe.PromptedClassifier(backbone, xpe.stack([xpe.SoftPrompt(H, P) for _ in range(K)]),
                                   xpe.stack([xpe.ClassificationHead(H, CLASSES) for _ in range(K)]))
    autocast = place(model, device, cfg["amp"], cfg["frozen_weights"])

    def run(steps):
        settings = cfg | {"steps": steps, "evaluate_every": steps}
        learners = [train.Learner(HERE / "no such folder", k, task, {}) for k in range(K)]
        with mock.patch.object(train, "judge_all", side_effect=StopIteration), suppress(StopIteration):
            train.train(learners, model, autocast, settings, PAD, device, quiet=True)   # up to its evaluation
    return model, autocast, run


def floor(backbone, autocast, lengths, batches, device, backward=True):
    """-> run(steps): the batches' rows and tokens as full rectangles through the bare backbone."""
    owed, ids = 0.0, []
    for b in batches:
        owed += lengths[b].mean()                   # rows of equal length: carry over what rounding leaves
        ids.append(torch.randint(5, backbone.config.vocab_size, (len(b), round(owed)), device=device))
        owed -= round(owed)
    words = backbone.get_input_embeddings()
    rows = torch.randn_like(words.weight[None, :P]).requires_grad_()                            # (1, P, H)
    weights = torch.randn(rows.shape[-1], device=device)    # a LayerNorm's plain sum has no gradient

    def run(steps):
        backbone.train(backward)
        with torch.set_grad_enabled(backward):
            for x in ids[:steps]:
                with autocast():
                    h = backbone(inputs_embeds=torch.cat((rows.expand(len(x), -1, -1), words(x)), 1))[0]
                if backward:
                    rows.grad = None
                    (h[:, 0].float() * weights).sum().backward()
    return run


def toolkit(sizes, ids, labels, cfg, device, tokenizer):
    """-> (model, run): run(steps) takes steps of the authors' toolkit and returns when they began."""
    from micm_nlp.models.xpe import get_xpe_model
    with redirect_stdout(None):                     # it prints its layers
        model = get_xpe_model(transformers.XLMRobertaForSequenceClassification(sizes), dict(
            peft_type="XPE", task_type="SEQ_CLS", encoder_reparameterization_type="MLP", num_virtual_tokens=P,
            encoder_ratio=1.0, encoder_hidden_size=sizes.hidden_size // 4, encoder_num_layers=2,
            encoder_dropout=0.1, encoder_freeze=False, encoder_embedding_freeze=False)).to(device)
    collator = transformers.DataCollatorWithPadding(transformers.AutoTokenizer.from_pretrained(tokenizer))
    rows = [{"input_ids": x, "attention_mask": [1] * len(x), "labels": int(y)} for x, y in zip(ids, labels)]

    class Timer(transformers.TrainerCallback):
        def on_epoch_begin(self, *_, **__):         # setting up does not count
            self.start = now()

    def run(steps):
        timer = Timer()
        with redirect_stdout(None), tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=cfg["batch_size"], report_to="none",
                optim="adafactor", learning_rate=cfg["rate"], weight_decay=cfg["weight_decay"],
                max_grad_norm=cfg["clip"], lr_scheduler_type="cosine_with_restarts", save_strategy="no",
                logging_strategy="no", disable_tqdm=True, train_sampling_strategy="group_by_length",
                remove_unused_columns=False, bf16=cfg["amp"] == "bf16", use_cpu=device.type == "cpu")
            transformers.Trainer(model, arguments, collator, rows, callbacks=[timer]).train()
        return timer.start
    return model, run


def main(argv=None):
    """The command line, the turns, the table."""
    parser = argparse.ArgumentParser(description="Speed beside the bare backbone and the authors' toolkit.")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="auto", help="cpu, cuda (default: auto)")
    parser.add_argument("--amp", choices=("bf16", "off"), default="bf16")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="not the toolkit's")
    parser.add_argument("--data", default=str(HERE / "sample" / "sib200"), help="a corpus, as for train.py")
    parser.add_argument("--tokenizer", default=str(HERE / "sample" / "backbone"), help="a folder or hub name")
    parser.add_argument("--sources", default="joshi5", help="training languages, a group of config.yaml")
    parser.add_argument("--mean", type=float, default=0, help="scale lengths to this mean (XLM-R's is 35)")
    parser.add_argument("--seeds", default="1,3,10", help="K: numbers of seeds trained in one pass")
    parser.add_argument("--steps", type=int, default=0, help="K x steps of one turn (default: an epoch)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; medians are printed")
    args = parser.parse_args(argv)
    config, device = load_config(), pick_device(args.device)
    cfg = train.settings_for(config, "xpe", None, None) | {"amp": args.amp}
    gpu, B = device.type == "cuda", cfg["batch_size"]
    layers, H, heads, vocabulary, positions = SIZES[args.size]
    sizes = transformers.XLMRobertaConfig(
        vocab_size=vocabulary, hidden_size=H, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * H, max_position_embeddings=positions, type_vocab_size=1, num_labels=CLASSES)
    backbone = transformers.AutoModel.from_config(sizes, attn_implementation=args.attention)
    backbone.pooler = None
    machine = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.size}: {layers} layers x {H}; {machine}; {args.amp}, {args.attention}; "
          f"torch {torch.__version__}, transformers {transformers.__version__}")
    lengths, tests = sentence_lengths(args, config)
    scored = token_batches(tests, cfg["tokens"], P)
    scored = scored if gpu else scored[len(scored) // 24::-(-len(scored) // 12)]        # on a CPU about 12
    rng = np.random.default_rng(0)
    ids, texts = ([rng.integers(5, vocabulary, n).tolist() for n in some]
                  for some in (lengths, tests[np.concatenate(scored)]))
    labels = rng.integers(0, CLASSES, len(ids))
    print(f"{len(texts):,} of the test sentences are timed\n", flush=True)
    table = {}                                      # name -> who takes a turn, and what is done in it

    def enter(name, run, module, lengths, batches, floor="", share=0.0):
        n = lengths[np.concatenate(batches)] + P
        table[name] = SimpleNamespace(run=run, module=module, floor=floor, share=share, steps=len(batches),
                                      rows=len(n), tokens=n.sum(), trains=lengths is not tests, rates=[])

    for K in map(int, args.seeds.split(",")):
        orders = [length_batches(lengths, B, seed, 0) for seed in range(K)]     # train.py's first epoch
        batches = [np.concatenate(step) for step in zip(*orders)]
        batches = batches[:max(2, (args.steps or len(batches)) // K)]
        model, autocast, run = ours(backbone, ids, labels, K, cfg, device)
        enter(f"ours x {K}", run, model, lengths, batches, f"floor x {K}", padding(lengths, batches))
        enter(f"floor x {K}", floor(backbone, autocast, lengths, batches, device), backbone, lengths, batches)
        if K == 1 and find_spec("micm_nlp"):
            own = np.concatenate(batches)
            peer, run = toolkit(sizes, [ids[i] for i in own], labels[own], cfg, device, args.tokenizer)
            order = own[grouped(lengths[own].tolist(), B)]
            batches = [order[i:i + B] for i in range(0, len(order), B)]
            enter("toolkit", run, peer, lengths, batches, "floor x 1", padding(lengths, batches))
    model = next(iter(table.values())).module
    enter("evaluation", lambda _: predict(model, texts, PAD, None, cfg["tokens"], autocast), model, tests,
          scored, "its floor", padding(tests, scored))
    enter("its floor", floor(backbone, autocast, tests, scored, device, False), backbone, tests, scored)

    for turn in range(-1, args.repeats):            # the first is the warm-up
        for x in table.values():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - sum(p.nbytes for p in x.module.parameters())
            start = now()
            began = x.run(x.steps if turn >= 0 else min(4, x.steps))
            x.rates.append(x.tokens / (now() - (began if isinstance(began, float) else start)))
            x.gb = f"{(torch.cuda.max_memory_allocated() - others) / 1e9:.2f}" if gpu else "-"
    print(f"{'':<12} run-steps/s sentences/s of floor x toolkit padding    GB")
    for name, x in table.items():
        def against(other):
            return f"{np.median(np.divide(x.rates, table[other].rates)[1:]):.3f}" if other in table else "-"
        x.rate = np.median(x.rates[1:])             # real tokens a second, the prompt's rows among them
        steps = x.rate / (B * (lengths.mean() + P)) # of average length: a turn may be a part of an epoch
        print(f"{name:<12}{f'{steps:.2f}' if x.trains else '-':>12}{x.rate * x.rows / x.tokens:>12.0f}"
              f"{against(x.floor):>9}{against('toolkit') if x.trains else '-':>10}{x.share:>8.1%}{x.gb:>6}")
    print("" if "toolkit" in table else "toolkit      not installed\n", end="")
    if not gpu:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return print(f"peak resident memory of this process, everyone in it: {kilobytes / 1e6:.2f} GB")
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for n in (5, 50):                               # the first is the warm-up
        start = now()
        for _ in range(n):
            a @ a
        fastest = n * 2 * 8192 ** 3 / (now() - start)
    # a weight costs 2 operations forward and 2 back to its input; attention 4 H T forward and 8 H T back
    token = layers * (4 * 12 * H ** 2 + 12 * H * ((lengths + P) ** 2).sum() / (lengths + P).sum())
    shares = ", ".join(f"{name} {x.rate * token / fastest:.0%}" for name, x in table.items() if x.trains)
    print(f"share of the {fastest / 1e12:.0f} TFLOP/s of a large bf16 matrix product: {shares}")


if __name__ == "__main__":
    run_main(main)
