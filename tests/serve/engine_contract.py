"""A small engine that follows the contracts of vLLM 0.32 and SGLang 0.5.23, as read in their code: adapters come and go by name. It is
no imitation of an answer: transformers runs the seed's exported folder, and PEFT the adapter folders that the gateway names.

vLLM: entrypoints/serve/lora/api_router.py, entrypoints/openai/models/serving.py. SGLang: srt/entrypoints/http_server.py,
srt/managers/tokenizer_control_mixin.py, srt/entrypoints/openai/serving_base.py.
"""

import asyncio
import json
import threading
from pathlib import Path

import torch
from peft import PeftModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "base"


class ContractEngine:
    """One engine. `held`: while it is clear, streams stop after their first token; `log`: what was asked of it."""

    def __init__(self, seed: Path, kind: str = "vllm", key: str | None = None):
        self.kind, self.key, self.seed = kind, key, str(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(seed)
        self.model = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
        self.peft, self.lock = None, threading.Lock()
        self.loras, self.known = {}, {}  # name -> path: those that are here, and those that ever were
        self.log, self.most, self.cut = [], 0, threading.Event()
        self.held = asyncio.Event()
        self.held.set()
        prefix = "/v1" if kind == "vllm" else ""
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route(f"{prefix}/load_lora_adapter", self.load, methods=["POST"]),
                Route(f"{prefix}/unload_lora_adapter", self.unload, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/tokenize", self.tokenize, methods=["POST"]),
            ]
        )

    def restart(self):
        """It has lost what it had loaded."""
        self.loras.clear()
        self.known.clear()

    def _keyed(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def models(self, request: Request):
        if not self._keyed(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        cards = [{"id": BASE, "object": "model", "owned_by": self.kind, "root": self.seed, "parent": None, "max_model_len": 256}]
        cards += [{"id": name, "object": "model", "owned_by": self.kind, "root": path, "parent": BASE} for name, path in self.loras.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def tokenize(self, request: Request):
        asked = await request.json()
        tokens = self.tokenizer.encode(asked["prompt"], add_special_tokens=asked.get("add_special_tokens", True))
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": 256})

    # ---- adapters

    async def load(self, request: Request):
        asked = await request.json()
        name, path = asked["lora_name"], asked["lora_path"]
        self.log.append(("load", name))
        if name in self.loras:
            if self.kind == "sglang":
                return self._sglang(False, f"Failed to load LoRA adapter {name} because it is already loaded")
            return _error(
                400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set", "InvalidUserInput"
            )
        if not (Path(path) / "adapter_config.json").is_file():
            message = f"Loading lora {name} failed: No adapter found for {path}"
            return self._sglang(False, message) if self.kind == "sglang" else _error(404, message, "NotFoundError")
        await asyncio.to_thread(self._open, name, path)
        self.loras[name] = self.known[name] = path
        self.most = max(self.most, len(self.loras))
        return self._sglang(True) if self.kind == "sglang" else PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def _open(self, name, path):
        with self.lock:
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.model, path, adapter_name=name)
            elif name not in self.peft.peft_config:
                self.peft.load_adapter(path, adapter_name=name)

    async def unload(self, request: Request):
        name = (await request.json())["lora_name"]
        self.log.append(("unload", name))
        if name not in self.loras:
            message = f"The lora adapter '{name}' cannot be found."
            return self._sglang(False, message) if self.kind == "sglang" else _error(404, message, "NotFoundError")
        del self.loras[name]
        return self._sglang(True) if self.kind == "sglang" else PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _sglang(self, success, message=None):
        body = {"success": success, "error_message": message, "loaded_adapters": dict(self.loras)}
        return JSONResponse(body, 200 if success else 400)

    # ---- text

    def _named(self, model):
        """The adapter of a request, and the refusal where there is none."""
        _base, _, name = model.partition(":") if self.kind == "sglang" else ("", "", "" if model == BASE else model)
        if not name or name in self.loras:
            return name, None
        if self.kind == "sglang":
            if name in self.known:  # it comes back by itself
                self.loras[name] = self.known[name]
                return name, None
            return name, _error(
                400, f"Got LoRA adapter that has never been loaded: {name}\nAll loaded adapters: dict_keys([]).", "BadRequest"
            )
        return name, _error(404, f"The model `{model}` does not exist.", "NotFoundError")

    def _next(self, tokens, name):
        with self.lock, torch.inference_mode():
            if self.peft is None:
                return int(self.model(torch.tensor([tokens])).logits[0, -1].argmax())
            if not name:
                with self.peft.disable_adapter():
                    return int(self.peft(torch.tensor([tokens])).logits[0, -1].argmax())
            self.peft.set_adapter(name)
            return int(self.peft(torch.tensor([tokens])).logits[0, -1].argmax())

    async def complete(self, request: Request):
        asked = await request.json()
        prompt = asked["prompt"]
        prompts = prompt if isinstance(prompt, list) and isinstance(prompt[0], list | str) else [prompt]
        return await self._answer(request, asked, [self.tokenizer.encode(one) if isinstance(one, str) else one for one in prompts])

    async def chat(self, request: Request):
        asked = await request.json()
        tokens = self.tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
        return await self._answer(request, asked, [tokens])

    async def _answer(self, request: Request, asked, prompts):
        if not self._keyed(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        self.log.append(("asked", asked["model"]))
        if asked.get("temperature") != 0:
            return _error(400, "this engine takes the likeliest token: temperature must be 0", "BadRequestError")
        name, refusal = self._named(asked["model"])
        if refusal:
            return refusal
        most = asked.get("max_tokens", 16)
        if asked.get("stream"):
            return StreamingResponse(self._events(asked, prompts[0], name, most), media_type="text/event-stream")
        choices, made = [], 0
        for index, tokens in enumerate(prompts):
            tokens = list(tokens)
            for _ in range(most):
                tokens.append(await asyncio.to_thread(self._next, tokens, name))
            text = self.tokenizer.decode(tokens[-most:])
            made += most
            choices.append({"index": index, "text": text, "message": {"role": "assistant", "content": text}, "finish_reason": "length"})
        given = sum(map(len, prompts))
        usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        return JSONResponse(
            {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": asked["model"], "choices": choices, "usage": usage}
        )

    async def _events(self, asked, tokens, name, most):
        tokens = list(tokens)
        try:
            for made in range(most):
                tokens.append(await asyncio.to_thread(self._next, tokens, name))
                choice = {
                    "index": 0,
                    "text": self.tokenizer.decode(tokens[-1:]),
                    "logprobs": None,
                    "finish_reason": None if made + 1 < most else "length",
                }
                part = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": asked["model"], "choices": [choice]}
                yield f"data: {json.dumps(part)}\n\n"
                await self.held.wait()
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cut.set()
            raise


def _error(status, message, kind):
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
