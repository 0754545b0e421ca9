"""A chat endpoint that really listens, tokenizers of several kinds, and a tiny model that was trained to answer."""

import http.server
import json
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from ropewalk.stages.data.alignment.conversations import assistant, user
from ropewalk.stages.data.vocabulary import add_markers, train_tokenizer
from ropewalk.stages.schema import Artifact, chats_schema, write_artifact, write_table

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the rope walk is long and straight; who are you? Paragraph one, system user assistant tool. Don't!\n" * 40


class ChatServer(http.server.ThreadingHTTPServer):
    """Answers `/v1/chat/completions` by `answer(messages)`; `faults` are played before, one a request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = lambda messages: f"answer {len(messages[-1]['content'])}"
        self.finish_reason = "stop"
        self.faults = []
        self.bodies, self.headers = [], []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def num_requests(self):
        return len(self.bodies)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            fault = server.faults.pop(0) if server.faults else None
        try:
            self.play(body, fault)
        finally:
            with server.lock:
                server.running -= 1

    def play(self, body, fault):
        if self.path != "/v1/chat/completions":
            return self.reply(404, b"{}")
        if fault == "slow":
            time.sleep(0.6)
        elif fault == "hang_up":
            self.close_connection = True
            return self.connection.close()
        elif fault == "garbage":
            return self.reply(200, b"<html>it works</html>")
        elif fault == "no_choice":
            return self.reply(200, b'{"choices": []}')
        elif isinstance(fault, int):
            return self.reply(fault, b'{"error": "secret-host is tired"}')
        elif isinstance(fault, tuple):
            return self.reply(fault[0], b"{}", {"Retry-After": fault[1]})
        message = {"role": "assistant", "content": self.server.answer(body["messages"])}
        answer = {
            "choices": [{"message": message, "finish_reason": self.server.finish_reason}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        }
        self.reply(200, json.dumps(answer).encode())

    def reply(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def no_user_cache(tmp_path, monkeypatch):
    """Calls are kept in a folder of the test, and nothing of the user's environment is used."""
    for name in ("URL", "KEY", "THREADS", "TIMEOUT_SECONDS", "ATTEMPTS"):
        monkeypatch.delenv(f"ROPEWALK_CHAT_{name}", raising=False)
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", str(tmp_path / "call-cache"))
    monkeypatch.setenv("ROPEWALK_CHAT_BACKOFF_SECONDS", "0.01")


@pytest.fixture
def server(monkeypatch):
    with ChatServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("ROPEWALK_CHAT_URL", server.url)
        yield server
        server.shutdown()


def byte_level():
    tokenizer = train_tokenizer([TEXT], 320, "<|bos|>", "<|eos|>")
    add_markers(tokenizer, ["<|im_start|>", "<|im_end|>", "<s>x"])
    return tokenizer


def metaspace():
    """Like SentencePiece models: a space before the first word of the text only, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT, "".join(chr(code) for code in range(32, 127))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def prefixed():
    """Like Llama 2: a space is put before every piece of text between control tokens by the normalizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    # No pre-tokenizer: merges may cross words, so train on words.
    words = [*TEXT.split(), *(chr(code) for code in range(32, 127)), "\n"]
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def word_piece():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[SEP]", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers_by_kind():
    return {"byte_level": byte_level(), "metaspace": metaspace(), "prefixed": prefixed(), "word_piece": word_piece()}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, tokenizers_by_kind):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers_by_kind["byte_level"].save_pretrained(folder)
    return folder


QUESTION, ANSWER = "who are you?", "the rope walk is long"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model of some thousand weights that has learnt one question by heart."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ropewalk.stages.data.alignment.chat_template import ChatEncoder

    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    tokenizer.save_pretrained(folder)
    encoded = ChatEncoder(tokenizer)([user(QUESTION), assistant(ANSWER)], "assistant_turns")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=0,
            pad_token_id=None,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        ids = torch.tensor([encoded.input_ids])
        labels = torch.where(torch.tensor([encoded.loss_mask]), ids, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for _ in range(120):
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def write_chats(tmp_path):
    """Write `{sample_id: messages}` or `{sample_id: (messages, metadata)}` as a Chats artifact."""

    def write(chats, name="chats", shard_records=3):
        rows = []
        for sample_id, chat in chats.items():
            messages, metadata = chat if isinstance(chat, tuple) else (chat, {})
            record = {"sample_id": sample_id, "source": "test", "messages": messages, "metadata": json.dumps(metadata)}
            rows.append(record)
        folder = tmp_path / name
        write_table(folder, "chats", chats_schema(), rows, shard_records=shard_records)
        write_artifact(folder, Artifact(kind="chats", counts={"num_kept": len(rows)}))
        return folder

    return write


@pytest.fixture
def events():
    """A `report` that adds metrics up."""
    found = SimpleNamespace(metrics=Counter())

    def report(event):
        if event["type"] == "metrics":
            found.metrics.update(event["metrics"])

    found.report = report
    return found
