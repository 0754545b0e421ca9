"""A local causal language model as the one that answers: transformers `generate`, greedy or seeded sampling.

It takes the endpoint's requests. Prompts go through the model's chat template by `ChatEncoder`, so a text in a prompt
cannot forge a turn. One request at a time: a batch would change the bits of its answers with its members. Sampling is
seeded by the request itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ropewalk.stages.data.alignment.chat_template import ChatEncoder, ChatRefusedError
from ropewalk.stages.data.alignment.endpoint import CallFailedError, Completion, Tally
from ropewalk.stages.data.vocabulary import load_tokenizer


def model_name(folder: Path) -> str:
    """A name that follows from the files that decide a model's answers: weights, configs and tokenizer."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]
    if not any(path.suffix == ".safetensors" for path in paths):
        raise ValueError(f"slot model: {folder} has no *.safetensors")
    total = hashlib.sha256()
    for path in sorted(paths):
        if path.name == "artifact.json":
            continue
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"local:{total.hexdigest()[:32]}"


class LocalModel:
    """Answers requests with a model of a Hugging Face folder, on the GPU if there is one."""

    num_threads = 1

    def __init__(self, folder: Path, tally: Tally) -> None:
        """Load the model. Raises ValueError if the folder lacks weights or a chat template."""
        import torch
        from transformers import AutoModelForCausalLM

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # The bits of a sum must not depend on the cores.
        self._tally = tally
        self._tokenizer = load_tokenizer(folder)
        self._encoder = ChatEncoder(self._tokenizer)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
        model, loading = loaded
        if loading["missing_keys"]:
            raise ValueError(f"{folder} lacks the weights {sorted(loading['missing_keys'])[:3]}: save it again")
        self._model: Any = model.to(self._device).eval()
        self._ends = _end_ids(self._model, self._tokenizer)

    def close(self) -> None:
        """Nothing waits."""

    def complete(self, request: dict[str, Any]) -> Completion:
        """See `Endpoint.complete`. Raises CallFailedError if the prompt and its answer do not fit the model."""
        try:
            prompt = self._encoder.prompt(request["messages"])
        except ChatRefusedError as refused:
            raise CallFailedError(str(refused)) from None
        window = getattr(self._model.config, "max_position_embeddings", None)
        if window is not None and len(prompt) + request["max_tokens"] > window:
            raise CallFailedError(f"{len(prompt)} and {request['max_tokens']} tokens do not fit the window of {window}")
        self._tally.add(num_requests=1)
        ids = self._generate(prompt, request)
        ended = bool(ids) and ids[-1] in self._ends
        text = self._tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        return Completion(
            text=text,
            finish_reason="stop" if ended else "length",
            num_prompt_tokens=len(prompt),
            num_completion_tokens=len(ids),
        )

    def _generate(self, prompt: list[int], request: dict[str, Any]) -> list[int]:
        import torch
        from transformers import GenerationConfig

        # The folder's own settings may penalise repetition; a request says all that is wanted.
        settings = GenerationConfig(
            max_new_tokens=request["max_tokens"],
            do_sample=request["temperature"] > 0,
            temperature=request["temperature"] or None,
            top_p=request.get("top_p") if request["temperature"] > 0 else None,
            top_k=0 if request["temperature"] > 0 else None,
            eos_token_id=sorted(self._ends),
            pad_token_id=min(self._ends),
        )
        ids_BL = torch.tensor([prompt], device=self._device)
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).digest()
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(int.from_bytes(digest[:7], "little"))
            out_BL = self._model.generate(
                ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=settings, use_cache=True
            )
        return out_BL[0, len(prompt) :].tolist()


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """What ends an answer: the ends that the model and the tokenizer name."""
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for named in (model.config.eos_token_id, model.generation_config.eos_token_id):
        ends |= set(named) if isinstance(named, list) else set() if named is None else {named}
    if not ends:
        raise ValueError("slot model: neither the model nor its tokenizer names an end token")
    return ends
