"""What the tests share: tiny random backbones, a small corpus, settings, running a command.

    tiny("bert")                        a random backbone of two layers, 16 wide
    tiny_backbone(folder, "bert")       the same with its tokenizer, as a folder that a run can name
    corpus(folder)                      three languages, seven labels, parallel sentences
    config_file(folder)                 a recipe of 24 steps for that corpus
    run(main, "--data", folder)         (status, stdout, stderr) of a command, in this process

conftest.py makes all of it once, as the fixtures `world` and `backbones`.
"""
import contextlib
import io
import random

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data

transformers.utils.logging.disable_progress_bar()

WORDS = ("star atom cell beach hotel road vote law party goal team match doctor virus sleep film "
         "song stage river mountain coast the a of in and new old was has after near").split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]

# ---- Backbones -----------------------------------------------------------------------------------

# Each kind takes the sizes that it knows. Large weights, so that every part shows in the output.
SIZES = dict(vocab_size=len(SPECIAL + WORDS), hidden_size=16, num_hidden_layers=2,
             num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
             initializer_range=0.3, embedding_size=8, num_key_value_heads=1,
             encoder_layers=2, decoder_layers=2,
             encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_attention_heads=2, init_std=0.3,
             scale_embedding=True, bos_token_id=0, pad_token_id=1)


def tiny(kind="xlm-roberta", **changes):
    """A random backbone of a transformers model type, in evaluation mode; the same at each call."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    return transformers.AutoModel.from_config(config).eval()


def tiny_tokenizer(folder, words=WORDS):
    """Save a tokenizer of single words, with <s> and </s> around a text as XLM-R's -> itself."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return fast


def tiny_backbone(folder, kind="xlm-roberta", **changes):
    """Save a tiny backbone and its tokenizer -> folder."""
    tiny(kind, **changes).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


# ---- A corpus and settings -----------------------------------------------------------------------

def corpus(folder, languages=("aaa_Latn", "bbb_Latn", "ccc_Latn"), sizes=(40, 21, 17)):
    """Write parallel sentences, `sizes` of them in train, dev and test -> folder.

    The first three words give the label away; the others are a cipher of each language.
    """
    for shift, language in enumerate(languages):
        draw = random.Random(0)         # parallel: the same sentences in each language
        (folder / language).mkdir(parents=True)
        for split, size in zip(data.SPLITS, sizes):
            lines = ["index_id\tcategory\ttext"]
            for i in range(size):
                label = draw.randrange(7)
                words = WORDS[3 * label:3 * label + 3]
                for _ in range(draw.randrange(3, 9)):
                    words.append(WORDS[21 + (draw.randrange(11) + shift) % 11])
                lines.append(f"{split}{i}\t{data.LABELS[label]}\t{' '.join(words)}")
            (folder / language / f"{split}.tsv").write_text("\n".join([*lines, ""]), "utf-8")
    return folder


SETTINGS = """
sources: two
groups: {two: [aaa_Latn, bbb_Latn], three: [aaa_Latn, bbb_Latn, ccc_Latn], others: [ccc_Latn]}
targets: {Others: others}
prompt: {length: 4, dropout: 0.2}
train: {batch_size: 4, steps: 24, evaluate_every: 4, checkpoint_every: 4, patience: 0, amp: off,
        rate: 3.0e-2, standard_rate: 1.0e-1, encoded_rate: 1.0e-1}
adapt: {steps: 8, patience: 0}
full: {epochs: 3, rate: 3.0e-3, accumulate: 1}
evaluate: {after_training: false}
"""


def config_file(folder, settings=SETTINGS):
    """Write a recipe for this corpus -> folder/config.yaml."""
    path = folder / "config.yaml"
    path.write_text(settings)
    return path


# ---- Commands and numbers ------------------------------------------------------------------------

def run(main, *arguments):
    """A script's main as its command line runs it -> (exit status, stdout, stderr)."""
    out, err = [io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data.run_main(lambda: main([str(argument) for argument in arguments]))
        except SystemExit as end:
            status = end.code or 0
    out.seek(0)
    err.seek(0)
    return status, out.read(), err.read()


def close(actual, expected, tolerance=1e-5):
    """Assert that two tensors are equal to a tolerance, relative and absolute."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
