"""backbone.py: what is picked on which machine, what is loaded, and which backbones are refused.

    pytest tests/test_backbone.py           (offline, CPU; about ten seconds on one core)

Each test says which mistake it would catch. Backbones are random and tiny.
"""
import hashlib
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import (DECODERS, ENCODER_DECODERS, ENCODERS, close, random_texts, tiny,
                     write_backbone, write_tokenizer)

import backbone
import xpe

CPU = torch.device("cpu")
GPU = SimpleNamespace(type="cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a folder with a tiny backbone of it, written once."""
    root = tmp_path_factory.mktemp("backbones")

    def folder_of(kind):
        if not (root / kind).exists():
            write_backbone(root / kind, kind)
        return root / kind
    return folder_of


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the tiny XLM-R's folder, to be spoilt."""
    return shutil.copytree(folders("xlm-roberta"), tmp_path / "copy")


def check(folder, reads="prompt", **more):
    """Load and try a backbone, as train.py does."""
    model, tokenizer, identity = backbone.load_backbone(str(folder))
    backbone.check_backbone(model, tokenizer, identity, reads, **more)


# ---- Device, precision, attention ----

def pretend_cpu(monkeypatch, **capabilities):
    """Let torch report these capabilities, whatever this machine and its environment are."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize("capabilities, precision", [
    (dict(avx2=True, avx512_bf16=False, amx_bf16=False), "off"),
    (dict(avx2=True, avx512_bf16=True, amx_bf16=False), "bf16"),
    (dict(avx2=True, avx512_bf16=False, amx_bf16=True), "bf16"),
    (dict(architecture="aarch64", neon=True, bf16=True), "bf16"),
    (dict(architecture="aarch64", neon=True, bf16=False), "off"),
    ({}, "off")])
def test_auto_takes_bf16_where_the_cpu_multiplies_it(monkeypatch, capsys, capabilities, precision):
    """Catches: bf16 on a laptop, twenty times slower; float32 where bf16 is the faster one."""
    pretend_cpu(monkeypatch, **capabilities)
    assert backbone.pick_precision("auto", CPU) == precision
    attention = {"bf16": "eager", "off": "sdpa"}[precision]
    assert backbone.pick_attention("auto", CPU, precision) == attention
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, value, precision", [
    ("ATEN_CPU_CAPABILITY", "avx2", "off"), ("ATEN_CPU_CAPABILITY", "default", "off"),
    ("ATEN_CPU_CAPABILITY", "avx512", "bf16"), ("ONEDNN_MAX_CPU_ISA", "AVX2", "off"),
    ("ONEDNN_MAX_CPU_ISA", "avx512_core", "off"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "bf16"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", "bf16")])
def test_a_cpu_that_is_told_to_act_as_an_older_one(monkeypatch, name, value, precision):
    """Catches: tests of the older kind of CPU that on a newer machine run in bf16 after all."""
    pretend_cpu(monkeypatch, avx512_bf16=True, amx_bf16=True)
    monkeypatch.setenv(name, value)
    assert backbone.pick_precision("auto", CPU) == precision


def test_an_older_torch_that_cannot_say(monkeypatch):
    """Catches: an AttributeError with torch 2.6."""
    pretend_cpu(monkeypatch)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert backbone.pick_precision("auto", CPU) == "off"


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu(monkeypatch, native):
    """Catches: bf16 on a GPU before Ampere, which torch calls supported because it emulates it."""
    def is_bf16_supported(including_emulation=True):
        return including_emulation or native
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert backbone.pick_precision("auto", GPU) == ("bf16" if native else "off")
    assert backbone.pick_attention("auto", GPU, "bf16") == "sdpa"


def test_what_is_asked_for_is_taken(monkeypatch, capsys):
    """Catches: a choice overruled; a slow one taken without a word; a warning in vain."""
    pretend_cpu(monkeypatch, avx512_bf16=False)
    for amp in ("fp16", "off"):
        assert backbone.pick_precision(amp, CPU) == amp
    assert capsys.readouterr().err == ""
    assert backbone.pick_precision("bf16", CPU) == "bf16"
    warning = capsys.readouterr().err
    assert warning.startswith("warning: this CPU has no bf16 instructions")
    assert "train.amp=off" in warning and warning.count("\n") == 1
    pretend_cpu(monkeypatch, avx512_bf16=True)
    assert backbone.pick_precision("bf16", CPU) == "bf16"
    assert backbone.pick_precision("bf16", GPU) == "bf16"
    assert capsys.readouterr().err == ""
    for attention in ("sdpa", "eager"):
        assert backbone.pick_attention(attention, CPU, "bf16") == attention
        assert backbone.pick_attention(attention, GPU, "off") == attention


def test_pick_device():
    """Catches: a misspelt device, or CUDA where there is none, that ends in a traceback."""
    assert backbone.pick_device("cpu") == CPU
    assert backbone.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="--device gpu: "):
        backbone.pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda:7: "):
            backbone.pick_device("cuda:7")
    for name in ("meta", "hpu"):        # holds no numbers; needs a package that is not there
        with pytest.raises(ValueError, match=f"--device {name}: "):
            backbone.pick_device(name)


@pytest.mark.parametrize("precision, frozen_weights, frozen, stored, in_autocast", [
    ("off", "amp", True, torch.float32, False), ("off", "amp", False, torch.float32, False),
    ("bf16", "amp", True, torch.bfloat16, False), ("fp16", "amp", True, torch.float16, False),
    ("bf16", "float32", True, torch.float32, True), ("bf16", "amp", False, torch.float32, True)])
def test_place(precision, frozen_weights, frozen, stored, in_autocast):
    """Catches: a prompt in half precision, which small steps do not move."""
    prompt = xpe.SoftPrompt(16, 4)
    model = xpe.PromptedClassifier(tiny(), prompt, xpe.ClassificationHead(16, 7), frozen=frozen)
    autocast = backbone.place(model, CPU, precision, frozen_weights)
    for name, parameter in model.named_parameters():
        expected = stored if name.startswith("backbone.") else torch.float32
        assert parameter.dtype == expected, name
    for _ in range(2):      # a context can be made again for every batch
        with autocast():
            assert torch.is_autocast_enabled("cpu") == in_autocast
    if precision == "bf16":
        assert (autocast is nullcontext) != in_autocast


# ---- Loading ----

@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_a_backbone_of_any_kind(folders, kind):
    """Catches: weights that change on loading, a pooler that full fine-tuning would save."""
    model, tokenizer, identity = backbone.load_backbone(str(folders(kind)), attention="eager")
    assert identity["type"] == kind
    assert (identity["name"], identity["revision"]) == (str(folders(kind)), "local")
    backbone.check_backbone(model, tokenizer, identity, "last" if kind in DECODERS else "prompt")
    assert not model.training
    saved = tiny(kind, vocab_size=len(tokenizer))
    for name, parameter in model.named_parameters():
        assert "pooler" not in name
        assert torch.equal(parameter, saved.get_parameter(name)), name
    ids = torch.tensor(random_texts(7)) % len(tokenizer)
    close(model(ids)[0], saved(ids)[0])


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_of_an_encoder_decoder_the_encoder_is_taken(folders, kind):
    """Catches: mT5, NLLB and mBART refused; word embeddings scaled twice, or not."""
    model, tokenizer, identity = backbone.load_backbone(str(folders(kind)))
    assert identity["type"] == f"{kind}-encoder"
    backbone.check_backbone(model, tokenizer, identity, "mean")
    assert xpe.widths(model) == (16, 16)
    whole = tiny(kind, vocab_size=len(tokenizer))
    assert model.num_parameters() < whole.num_parameters()
    ids = torch.tensor(random_texts(7)) % len(tokenizer)
    expected = whole(input_ids=ids, decoder_input_ids=ids).encoder_last_hidden_state
    close(model(inputs_embeds=model.get_input_embeddings()(ids))[0], expected)


@pytest.mark.parametrize("kind", ["squeezebert", "layoutlm"])
def test_a_backbone_that_calls_its_pooler_unasked(folders, kind):
    """Catches: 'NoneType' object is not callable, deep inside the forward."""
    check(folders(kind))


def test_a_backbone_is_loaded_in_float32(copy):
    """Catches: a checkpoint in half precision that stays in it, as transformers 5 would have it."""
    whole = backbone.load_backbone(str(copy))[2]["fingerprint"]
    half = transformers.AutoModel.from_pretrained(copy).bfloat16()
    (copy / "model.safetensors").rename(copy / "whole.safetensors.kept")
    half.save_pretrained(copy)
    model, _, identity = backbone.load_backbone(str(copy))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, half.get_parameter(name).float()), name
    assert identity["fingerprint"] != whole
    (copy / "whole.safetensors.kept").rename(copy / "model.safetensors")    # the config says half
    assert backbone.load_backbone(str(copy))[2]["fingerprint"] == whole


def test_fingerprints(folders, copy):
    """Catches: a fingerprint that earlier run folders do not know, or that nothing changes."""
    model, tokenizer, identity = backbone.load_backbone(str(folders("xlm-roberta")))
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:64].numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + first)
    assert identity["fingerprint"] == digest.hexdigest()[:16]
    same = transformers.AutoTokenizer.from_pretrained(copy)
    write_tokenizer(copy, ["world", "Hello"])
    other = transformers.AutoTokenizer.from_pretrained(copy)
    hashes = [backbone.tokenizer_fingerprint(each) for each in (tokenizer, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_attention_that_a_model_does_not_have(folders, capsys):
    """Catches: an error where the slower implementation would have done, or a silent change."""
    model = backbone.load_backbone(str(folders("deberta-v2")), attention="sdpa")[0]
    assert "no sdpa attention for it, eager is used" in capsys.readouterr().err
    assert model.config._attn_implementation == "eager"
    for attention in ("sdpa", "eager"):
        model = backbone.load_backbone(str(folders("xlm-roberta")), attention=attention)[0]
        assert model.config._attn_implementation == attention
    assert capsys.readouterr().err == ""


def drop_weight(folder):
    """Leave one weight out of a backbone's file."""
    model = transformers.AutoModel.from_pretrained(folder)
    weights = model.state_dict()
    del weights["encoder.layer.0.attention.self.query.weight"]
    model.save_pretrained(folder, state_dict=weights)


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def leave_gguf(folder):
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def leave_tensorflow(folder):
    (folder / "model.safetensors").rename(folder / "tf_model.h5")


def make_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def damage_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def leave_pickle(folder):
    """A pickle that would call print: torch's refusal advises weights_only=False."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nprint\n(S'code was run'\ntR.")


def damage_config(folder):
    (folder / "config.json").write_text("{")


def ask_for_code(folder):
    """A configuration that brings its own Python code."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["model_type"] = "evil"
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    path.write_text(json.dumps(settings))
    (folder / "evil.py").write_text("raise SystemExit('code was run')")


def widen_config(folder):
    """Weights of other sizes than the configuration says: transformers refers to a report."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["intermediate_size"] = 48
    path.write_text(json.dumps(settings))


def make_run(folder):
    (folder / "config.json").unlink()
    (folder / "prompt.json").write_text("{}")


@pytest.mark.parametrize("spoil, error, message", [
    (drop_weight, ValueError, "lack 1 of its weights, encoder.layer.0.attention.self.query"),
    (remove_weights, ValueError, "holds no weights: wanted are .*safetensors"),
    (leave_gguf, ValueError, "holds GGUF files only, which are made for llama.cpp; take"),
    (leave_tensorflow, ValueError, "holds no weights: .*TensorFlow"),
    (make_adapter, ValueError, "is an adapter: name the backbone"),
    (make_run, ValueError, "is a run: name the backbone that it was made for"),
    (widen_config, OSError, r"intermediate.dense.bias is \(32,\) in its files, but \(48,\) by its"),
    (damage_weights, OSError, "cannot load backbone .*check the folder"),
    # transformers 4 says the second
    (leave_pickle, OSError, "it holds more than tensors, which may be code, and is not opened"
     "|Unable to load weights"),
    (damage_config, OSError, "cannot load backbone .*check the folder"),
    (ask_for_code, OSError, "cannot load backbone .*backbone.trust_remote_code=true")])
def test_a_folder_that_is_no_whole_backbone(copy, spoil, error, message):
    """Catches: random weights in place of missing ones, foreign code, a traceback."""
    spoil(copy)
    with pytest.raises(error, match=message) as refused:
        backbone.load_backbone(str(copy))
    assert "\n" not in str(refused.value)
    assert str(copy) in str(refused.value)


def test_a_name_that_is_no_folder(monkeypatch):
    """Catches: a misspelt path taken for a name on the hub, with minutes of waiting."""
    def refuse(*_, **__):
        pytest.fail("the hub was asked")
    monkeypatch.setattr(backbone, "download", refuse)
    for name in ("/no/where", "./models/xlm-r", "a/b/c", "-x", "../nothing",
                 "~nosuchuser/x"):
        with pytest.raises(FileNotFoundError, match="backbone.name: no folder"):
            backbone.load_backbone(name)


def fetched(files, leave_out, patterns=None):
    """Which files of a repository such patterns fetch, by the hub client's own rule."""
    from huggingface_hub.utils import filter_repo_objects
    return set(filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=leave_out))


def test_everything_small_is_fetched_from_the_hub(monkeypatch, folders):
    """Catches: tokenizer files with names of their own left behind; gigabytes of other formats."""
    needed = {"config.json", "tokenizer.json", "sentencepiece.bpe.model", "vocab.txt", "bpe.codes",
              "merges.txt", "spiece.model", "dict.txt", "vocab", "special_tokens_map.json",
              "tokenizer.model.v3", "model.safetensors", "model-00001-of-00002.safetensors",
              "model.safetensors.index.json"}
    others = {"pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot",
              "model.onnx", "onnx/model.onnx", "onnx/config.json", "model.Q4.gguf", "optimizer.pt",
              "scheduler.pt", "training_args.bin", "coreml/x.mlmodel", "model.ckpt",
              "original/model.safetensors"}
    calls = []

    def download(name, revision, kind, patterns=None, leave_out=None):
        calls.append((name, revision, kind, patterns, leave_out))
        return folders("xlm-roberta")
    monkeypatch.setattr(backbone, "download", download)
    monkeypatch.chdir("/")
    identity = backbone.load_backbone("someone/xlm-r", "v2")[2]
    assert identity["revision"] == folders("xlm-roberta").name      # data.download names the commit
    (name, revision, kind, patterns, leave_out), = calls
    assert (name, revision, kind, patterns) == ("someone/xlm-r", "v2", "model", None)
    code = {"modeling_x.py"}
    assert fetched(needed | others | code, leave_out) == needed
    backbone.find_backbone("someone/xlm-r", "main", with_code=True)
    assert fetched(needed | others | code, calls[-1][-1]) == needed | code


def test_an_older_repository_without_safetensors(monkeypatch, copy):
    """Catches: a repository of before 2023, with pytorch_model.bin alone, that cannot be loaded."""
    weights = transformers.AutoModel.from_pretrained(copy).state_dict()
    (copy / "model.safetensors").unlink()
    files = {"config.json", "pytorch_model.bin", "tf_model.h5"}
    fetches = []

    def download(name, revision, kind, patterns=None, leave_out=None):
        fetches.append(fetched(files, leave_out, patterns))
        if "pytorch_model.bin" in fetches[-1]:
            torch.save(weights, copy / "pytorch_model.bin")
        return copy
    monkeypatch.setattr(backbone, "download", download)
    model = backbone.load_backbone("someone/xlm-r")[0]
    assert fetches == [{"config.json"}, {"pytorch_model.bin"}]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


# ---- Does it fit? ----

def test_a_folder_without_tokenizer_files(copy):
    """Catches: a run that trains and scores on <unk> alone, with status 0."""
    for path in copy.glob("tokenizer*"):
        path.unlink()
    # transformers 5 makes a tokenizer of five special tokens, transformers 4 raises an error
    message = "the tokenizer has 5 tokens, the backbone 36 rows|cannot load backbone"
    with pytest.raises((ValueError, OSError), match=message):
        check(copy)


def test_a_tokenizer_of_another_model(copy):
    """Catches: a tokenizer to which nearly every word is unknown."""
    write_tokenizer(copy, [f"word{i}" for i in range(32)])
    with pytest.raises(ValueError, match=r"roberta\): its tokenizer does not know \d+ of \d+"):
        check(copy)
    check(copy, texts=["word1 word2 word3 other"])      # texts to train on, of which it knows most


def test_a_tokenizer_that_fails(copy):
    """Catches: a plain Exception of the library tokenizers, as a traceback."""
    written = json.loads((copy / "tokenizer.json").read_text())
    written["model"]["unk_token"] = "[absent]"
    (copy / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="the backbone's tokenizer fails on '.*': "):
        check(copy)


def test_a_tokenizer_with_a_part_of_the_vocabulary(copy):
    """Catches: the tokenizer of a smaller model beside these weights."""
    write_tokenizer(copy, "The river rises .".split())
    with pytest.raises(ValueError, match="has 8 tokens, the backbone 36 rows of word embeddings"):
        check(copy)


def test_token_ids_beyond_the_embeddings(copy):
    """Catches: an IndexError in the first step, on a GPU a device assert."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["Sentence"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"\(xlm-roberta\): the tokenizer has ids up to 36, the "
                                         "backbone 36 rows of word embeddings: .*resize_token_emb"):
        check(copy)


def test_padding_that_reaches_the_answers_is_refused(folders):
    """Catches: a score that depends on the texts that happen to stand in the same batch."""
    for reads in xpe.READS:     # in transformers 4 it takes no mask at all
        message = (r"\(fnet\) fails .* unexpected keyword argument 'attention_mask'|"
                   r"\(fnet\): padding reaches its output: what the head reads of a text "
                   rf"\(prompt.reads={reads}\) changes by \d+\.\d%")
        with pytest.raises(ValueError, match=message):
            check(folders("fnet"), reads)


def test_padding_that_reaches_the_answers_a_little_is_told(folders, capsys):
    """Catches: the same in silence, or a useful backbone refused; a warning where there is none."""
    check(folders("convbert"))
    warnings = capsys.readouterr().err
    assert "(convbert): padding reaches its output a little" in warnings
    check(folders("xlm-roberta"), "mean")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind, message", [
    ("canine", r"\(canine\) has no table of word embeddings"),
    ("nystromformer", r"\(nystromformer\) fails with a prompt .*RuntimeError: shape")])
def test_a_backbone_that_fails_inside(folders, kind, message):
    """Catches: other people's traceback instead of one line with the backbone's type."""
    with pytest.raises(ValueError, match=message) as refused:
        check(folders(kind))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reads", ["prompt", "first"])
def test_a_head_that_would_see_no_text(folders, reads):
    """Catches: a decoder read at the prompt, or at <s>: positions that see nothing after them."""
    message = rf"\(qwen2\): with prompt.reads={reads} the head sees nothing of the text"
    with pytest.raises(ValueError, match=message):
        check(folders("qwen2"), reads)
    check(folders("qwen2"), "last")
    check(folders("qwen2"), "mean")


class Broken(torch.nn.Module):
    """A backbone whose forward is another one's, with something wrong."""

    def __init__(self, real, fault):
        super().__init__()
        self.real = real
        self.config = real.config
        self.fault = fault

    @property
    def device(self):
        return self.real.device

    def get_input_embeddings(self):
        return self.real.get_input_embeddings()

    def forward(self, inputs_embeds, attention_mask):
        states = self.real(inputs_embeds=inputs_embeds, attention_mask=attention_mask)[0]
        if self.fault == "nan":
            states = states * float("nan")
        if self.fault == "shorter":
            states = states[:, ::2]
        if self.fault == "pooled":
            states = states[:, 0]
        if self.fault == "narrower":
            states = states[:, :, :8]
        if self.fault == "detached":
            states = states.detach()
        if self.fault == "zero":
            states = states * 0
        if self.fault == "steep":
            states = (states - states.detach()).abs().sqrt() + states.detach()
        return (states,)


@pytest.mark.parametrize("fault, message", [
    ("nan", "outputs or gradients that are not finite"),
    ("steep", "outputs or gradients that are not finite"),
    ("zero", "the head sees nothing of the text"),
    ("shorter", r"its output is \(1, \d+, 16\), not \(1, \d+\) and a width"),
    ("narrower", "its states are 8 wide, its configuration says 16"),
    ("pooled", r"its output is \(1, 16\), not"),
    ("detached", "fails with a prompt before its word embeddings: RuntimeError: .*grad")])
def test_a_backbone_with_wrong_numbers(folders, fault, message):
    """Catches: NaN from the first step, a reshaped output, a prompt that cannot learn."""
    model, tokenizer, identity = backbone.load_backbone(str(folders("xlm-roberta")))
    with pytest.raises(ValueError, match=message) as refused:
        backbone.check_backbone(Broken(model, fault), tokenizer, identity, "prompt")
    assert "(xlm-roberta)" in str(refused.value)
    backbone.check_backbone(Broken(model, None), tokenizer, identity, "prompt")


def test_the_trial_leaves_no_trace(folders):
    """Catches: a trial that draws from the run's random numbers, or leaves modes and gradients."""
    model, tokenizer, identity = backbone.load_backbone(str(folders("xlm-roberta")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        backbone.check_backbone(model, tokenizer, identity, "prompt")
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training == training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
