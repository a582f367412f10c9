"""What the tests share: tiny random backbones of many kinds, a small corpus, comparisons.

    tiny("bert")                        a random backbone of two layers, 16 wide
    write_backbone(folder, "bert")      the same with a tokenizer, as a folder that a run can name
    write_corpus(folder)                three languages, seven labels, parallel sentences
    loud(module, seed), close(a, b), random_texts(9, 4, 1), run_script(main, argv, capsys)
"""
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data

# Large weights: every part of a backbone shows in its output.
SIZES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=32, max_position_embeddings=64, initializer_range=0.3)

# What a kind needs besides SIZES.
ENCODERS = {
    "xlm-roberta": {}, "xlm-roberta-xl": {}, "roberta": {}, "camembert": {}, "bert": {},
    "distilbert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "electra": dict(embedding_size=8),
    "deberta-v2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"],
                       position_biased_input=False, position_buckets=8),
    "modernbert": dict(local_attention=8, global_attn_every_n_layers=2, pad_token_id=1,
                       bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2),
}
DECODERS = {"qwen2": dict(num_key_value_heads=1), "llama": dict(num_key_value_heads=1)}

# These name their sizes themselves, so SIZES is not laid under.
T5_SIZES = dict(vocab_size=60, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2,
                decoder_start_token_id=0, pad_token_id=1)
BART_SIZES = dict(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2,
                  encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
                  decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.3, pad_token_id=1,
                  bos_token_id=0, eos_token_id=2)
ENCODER_DECODERS = {"t5": T5_SIZES, "mt5": T5_SIZES, "m2m_100": BART_SIZES, "mbart": BART_SIZES,
                    "bart": BART_SIZES}

# Encoders that need care: no mask, no word embeddings, a pooler that is called unasked.
MISFITS = {
    "fnet": {}, "convbert": dict(embedding_size=16), "canine": dict(num_hash_buckets=64),
    "mobilebert": dict(embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16),
    "nystromformer": dict(num_landmarks=8, segment_means_seq_len=64),
    "squeezebert": dict(embedding_size=16), "layoutlm": {},
}
XLNET_SIZES = dict(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=32,
                   initializer_range=0.3, pad_token_id=1)

WORDS = ("star atom cell beach hotel road vote law party goal team match doctor virus sleep film "
         "song stage river mountain coast the a of in and new old was has after near").split()
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


# ---- backbones ----

def tiny_config(kind, **changes):
    """The configuration of a tiny backbone of a transformers model type."""
    if kind in ENCODER_DECODERS:
        sizes = dict(ENCODER_DECODERS[kind])
    elif kind == "xlnet":
        sizes = dict(XLNET_SIZES)
    else:
        sizes = dict(SIZES)
        for extra in (ENCODERS, DECODERS, MISFITS):
            sizes.update(extra.get(kind, {}))
    if kind == "distilbert":        # it has other names for these
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                     "intermediate_size"):
            del sizes[name]
    sizes.update(changes)
    return transformers.AutoConfig.for_model(kind, **sizes)


def tiny(kind="xlm-roberta", **changes):
    """A random backbone of two layers, 16 wide, in evaluation mode; the same at each call."""
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(tiny_config(kind, **changes)).eval()


def write_tokenizer(folder, words=WORDS):
    """Save a tokenizer that knows single words, as XLM-R's with <s> and </s> -> its size."""
    vocabulary = {}
    for word in (*SPECIAL, *words):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def write_backbone(folder, kind="xlm-roberta", **changes):
    """Save a tiny backbone and its tokenizer as AutoModel and AutoTokenizer read them -> folder."""
    transformers.utils.logging.disable_progress_bar()
    size = write_tokenizer(folder)
    changes = {"vocab_size": size, **changes}
    tiny(kind, **changes).save_pretrained(folder)
    return folder


# ---- a corpus ----

def write_corpus(root, languages=("aaa_Latn", "bbb_Latn", "ccc_Latn"), sizes=(40, 21, 17)):
    """Parallel sentences of SIB-200's labels: three words give the topic away -> root.

    sizes: sentences in train, dev and test. The other words are a cipher of each language.
    """
    rng = np.random.default_rng(0)
    drawn = {}
    for split, size in zip(data.SPLITS, sizes):
        drawn[split] = [draw_sentence(rng) for _ in range(size)]
    for shift, language in enumerate(languages):
        (root / language).mkdir(parents=True)
        for split, sentences in drawn.items():
            lines = ["index_id\tcategory\ttext"]
            for i, (label, fillers) in enumerate(sentences):
                words = WORDS[3 * label:3 * label + 3]
                words = words + [WORDS[21 + (filler + shift) % 11] for filler in fillers]
                lines.append(f"{split}{i}\t{data.LABELS[label]}\t{' '.join(words)}")
            text = "\n".join(lines) + "\n"
            (root / language / f"{split}.tsv").write_text(text, "utf-8")
    return root


def draw_sentence(rng):
    """-> (label, up to five numbers of filling words)."""
    return int(rng.integers(7)), rng.integers(0, 11, int(rng.integers(0, 6)))


# ---- numbers and commands ----

def loud(module, seed, std=0.3):
    """Fill every parameter with N(0, std), biases and norms too: none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return module


def random_texts(*lengths, seed=1):
    """Random token ids (5 ... 59) of texts, one list for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 60, (n,), generator=generator).tolist() for n in lengths]


def close(a, b, tolerance=1e-5):
    """Assert that two tensors are equal to a tolerance, relative and absolute."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def run_script(main, argv, capsys):
    """A script's main as its command line runs it -> (exit status, standard error)."""
    capsys.readouterr()
    arguments = [str(argument) for argument in argv]
    with pytest.raises(SystemExit) as end:
        data.run_main(lambda: main(arguments))
    return end.value.code or 0, capsys.readouterr().err
