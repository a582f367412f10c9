"""backbone.py: what is picked on which machine, what is loaded, and which backbones are refused.

    python -m pytest -q tests/test_backbone.py      (about 8 s)

Backbones are random and tiny; the hub is a server on this machine.
"""
import http.server
import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import close, tiny, tiny_tokenizer
from huggingface_hub import constants

import backbone
import xpe
from config import read_config

CPU = torch.device("cpu")


@pytest.fixture
def copy(backbones, tmp_path):
    """A copy of the tiny XLM-R's folder, to be spoilt."""
    return shutil.copytree(backbones("xlm-roberta"), tmp_path / "copy")


def load(name, reads="prompt", **more):
    """Load and try a backbone as the scripts do."""
    settings = {**read_config()["backbone"], "name": str(name), **more}
    return backbone.load_backbone(settings, settings, CPU, "off", reads)


# ---- Device and precision ------------------------------------------------------------------------

@pytest.mark.parametrize("row", [
    # device, what it has, train.amp: precision, attention
    "cpu   -            auto  off   None",
    "cpu   avx512_bf16  auto  bf16  eager",
    "cpu   amx_bf16     auto  bf16  eager",
    "cpu   bf16         auto  bf16  eager",
    "cpu   bf16         fp16  fp16  None",
    "cpu   -            bf16  bf16  eager",
    "cuda  native       auto  bf16  None",
    "cuda  -            auto  off   None"])
def test_precision_and_attention(monkeypatch, row):
    """Catches: bf16 on a laptop, or emulated on an older GPU, many times slower; a choice that is
    overruled; the slower kind of attention."""
    device, has, amp, precision, attention = row.split()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation: including_emulation or has == "native")
    device = SimpleNamespace(type=device)
    assert backbone.pick_precision(amp, device) == precision
    assert str(backbone.pick_attention("auto", device, precision)) == attention


def test_device():
    """Catches: a misspelt device that ends in a traceback."""
    assert backbone.pick_device("cpu") == CPU
    for name in ("gpu", "cuda:77"):
        with pytest.raises(ValueError, match=f"^--device {name}: "):
            backbone.pick_device(name)


@pytest.mark.parametrize("precision, frozen_weights, frozen, stored, in_autocast", [
    ("off", "amp", True, torch.float32, False), ("bf16", "amp", True, torch.bfloat16, False),
    ("bf16", "float32", True, torch.float32, True), ("bf16", "amp", False, torch.float32, True)])
def test_place(precision, frozen_weights, frozen, stored, in_autocast):
    """Catches: a prompt in half precision, which small steps do not move; a backbone that is
    trained in half precision."""
    prompt, head = xpe.SoftPrompt(16), xpe.ClassificationHead(16, 7)
    model = xpe.PromptedClassifier(tiny(), prompt, head, frozen=frozen)
    autocast = backbone.place(model, CPU, precision, frozen_weights)
    for name, tensor in model.named_parameters():
        assert tensor.dtype == (stored if name.startswith("backbone.") else torch.float32)
    with autocast():
        assert torch.is_autocast_enabled("cpu") == in_autocast


# ---- What can be used ----------------------------------------------------------------------------

@pytest.mark.parametrize("kind, reads", [
    ("xlm-roberta", "prompt"), ("bert", "first"), ("electra", "prompt"), ("deberta-v2", "mean"),
    ("qwen2", "last"), ("mt5", "mean"), ("m2m_100", "prompt"),
    ("layoutlm", "prompt")])
def test_backbones_of_any_kind(backbones, kind, reads):
    """Catches: weights that change on loading; mT5 and NLLB refused, or their word embeddings
    scaled twice; a narrower table of embeddings, as ELECTRA's, taken for an error;
    LayoutLM's pooler, which is called unasked."""
    model, tokenizer, identity = load(backbones(kind), reads)
    whole, ids = tiny(kind), torch.tensor([[4, 9, 30, 7, 12, 5]])
    encoder = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    expected = encoder(input_ids=ids)[0]
    states = model(inputs_embeds=model.get_input_embeddings()(ids))[0]
    close(states, expected[:, :states.shape[1]])        # of one position, where that is enough
    assert identity["type"].removesuffix("-encoder") == kind


def test_a_checkpoint_in_half_precision(copy):
    """Catches: a checkpoint that stays in its own type, as transformers 5 would have it; a
    fingerprint that does not see the weights."""
    before = load(copy)[2]["fingerprint"]
    transformers.AutoModel.from_pretrained(copy).bfloat16().save_pretrained(copy)
    model, _, identity = load(copy)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert identity["fingerprint"] != before


def test_the_trial_leaves_no_trace(backbones):
    """Catches: a trial that draws the run's random numbers, or leaves gradients."""
    model, *more = load(backbones("xlm-roberta"))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    backbone.check_backbone(model, *more, "prompt")
    assert torch.get_rng_state().equal(state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_fingerprint_of_the_tokenizer(tmp_path):
    """Catches: a tokenizer that has changed its ids, unnoticed."""
    fingerprints = [backbone.tokenizer_fingerprint(tiny_tokenizer(tmp_path, words))
                    for words in (["Hello"], ["Hello"], ["a", "Hello"])]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("kind, warnings", [
    ("xlm-roberta", []), ("convbert", ["(convbert): padding reaches its output: what"])])
def test_warnings(backbones, capsys, kind, warnings):
    """Catches: a useful backbone refused, or a change made in silence."""
    load(backbones(kind))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(warnings)
    assert all(warning in line for warning, line in zip(warnings, lines))


# ---- What is refused -----------------------------------------------------------------------------

def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def added_token(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["Sentence"])
    tokenizer.save_pretrained(folder)


def other_config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return spoil


def pickle(folder):
    """A pickle that would print."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nprint\n(S'code was run'\ntR.")


def code(folder):
    other_config(model_type="evil", auto_map={"AutoConfig": "evil.Config"})(folder)
    (folder / "evil.py").write_text("raise SystemExit('code was run')")


@pytest.mark.parametrize("spoil, message", [
    (no_tokenizer, "the tokenizer has 5 tokens, the backbone 36 rows of word embeddings"),
    (added_token, "has 37 tokens, the backbone 36 rows of .*, or have added tokens"),
    (other_config(num_hidden_layers=4), "lack 32 of its weights: encoder.layer.2.attention."),
    (other_config(intermediate_size=48), "cannot be loaded"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be loaded"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    (pickle, "Weights only load failed"), (code, "trust_remote_code")])
def test_a_folder_that_is_no_whole_backbone(copy, capfd, spoil, message):
    """Catches: random weights in place of missing ones, a run on <unk> alone, an index error that
    on a GPU is a device assert, foreign code that is run, a traceback or a report of many lines."""
    spoil(copy)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load(copy)
    assert str(error.value).startswith(f"backbone {copy}") and "\n" not in str(error.value)
    assert "code was run" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind, reads, message", [
    ("fnet", "mean", "padding reaches its output"), ("canine", "prompt", ""),
    ("marian", "prompt", "its states differ when it is given"),
    ("qwen2", "prompt", "with prompt.reads=prompt the head sees nothing of the text"),
    ("qwen2", "first", "with prompt.reads=first the head sees nothing of the text")])
def test_kinds_that_cannot_be_used(backbones, kind, reads, message):
    """Catches: a score that depends on the neighbours in a batch; a prompt of another scale than
    the words; a head at a position that sees nothing after it; other people's tracebacks."""
    with pytest.raises(ValueError, match=rf"\({kind}.*\): .*{message}") as error:
        load(backbones(kind), reads)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", [
    lambda h: h * torch.nan, lambda h: (h - h.detach()).sqrt() + h.detach()])
def test_wrong_numbers(monkeypatch, backbones, fault):
    """Catches: NaN from the first step, in outputs or gradients."""
    model, *more = load(backbones("xlm-roberta"))
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (fault(real(**inputs)[0]),))
    with pytest.raises(ValueError, match=r"\(xlm-roberta\): its gradients are not finite"):
        backbone.check_backbone(model, *more, "prompt")


# ---- The hub -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path, copy):
    """A server on this machine that answers as the hub does -> the list of paths asked for."""
    asked = []

    class Hub(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            asked.append(path)
            return str(copy / path.partition("?")[0].rpartition("/")[2])

        def end_headers(self):
            for name, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{abs(hash(self.path))}"'),
                                ("X-Error-Code", "EntryNotFound")):
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in (("ENDPOINT", address), ("HF_HUB_CACHE", str(tmp_path / "cache")),
                        ("HUGGINGFACE_CO_URL_TEMPLATE",
                         address + "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(constants, name, value)
    return asked


def test_a_backbone_of_the_hub(hub, copy):
    """Catches: another revision than the one asked for; a result that cannot be repeated, because
    its commit is not known; an error of many lines."""
    identity = load("some/backbone", revision="v1")[2]
    assert (identity["name"], identity["revision"]) == ("some/backbone", COMMIT)
    assert all("/v1/" in path or COMMIT in path for path in hub if "/resolve/" in path)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="^backbone some/backbone: cannot be loaded: .*$"):
        load("some/backbone", revision="v2")
