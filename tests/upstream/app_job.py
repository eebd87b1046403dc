"""One training as ACE-Step's own app or HTTP server starts it, and a record of what the decoder received.

    app_job.py REPORT gradio|http|stop CHECKPOINTS TENSORS MODEL ...

With "stop" the app's button is pressed in the midst of the training, which is then resumed from what that saved.
Knows nothing of this project: it is run in a patched checkout, and by ``acestep-train run``, and the record tells
whether the plugin was there. Several models are trained one after the other in one process, as people do in the app.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from loguru import logger
from transformers import AutoModel

REPORT, HOW, CHECKPOINTS, TENSORS, *MODELS = sys.argv[1:]
SHIFT_MOVED = 2.0


def load(name: str) -> Any:
    model = AutoModel.from_pretrained(str(Path(CHECKPOINTS) / name), trust_remote_code=True).eval()
    return SimpleNamespace(
        model=model, device="cpu", dtype=torch.float32, quantization=None, vae=None, text_encoder=None
    )


def start_training() -> Any:
    """The function behind the app's button, wherever this version keeps it."""
    for name in ("acestep.ui.gradio.events.training.lora_training", "acestep.gradio_ui.events.training_handlers"):
        try:
            return importlib.import_module(name).start_training
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("acestep"):
                raise
    raise SystemExit("this version has no start_training")


def by_gradio(handler: Any, output: str) -> list[str]:
    state: dict[str, Any] = {}
    numbers = (4, 8, 0.0, 1e-3, 6, 3, 1, 100, SHIFT_MOVED, 7)  # rank ... batch 3, shift, seed
    return [str(row[0]) for row in start_training()(TENSORS, handler, *numbers, output, "", state)]


def stopped_and_resumed(handler: Any, output: str) -> list[str]:
    """As people do it: a stop button that sets a flag, and the folder typed into the field for a checkpoint."""
    numbers = (4, 8, 0.0, 1e-3, 6, 3, 1, 100, SHIFT_MOVED, 7)
    told = []
    state: dict[str, Any] = {}
    for row in start_training()(TENSORS, handler, *numbers, output, "", state):
        told.append(str(row[0]))
        state["should_stop"] = state.get("should_stop", False) or "Step 10" in told[-1]
    handler = load(MODELS[0])
    return told + [
        str(row[0]) for row in start_training()(TENSORS, handler, *numbers, output, f"{output}/interrupted", {})
    ]


def by_http(handler: Any, output: str) -> list[str]:
    from acestep.api.train_api_lora_start_route import register_lora_training_start_route
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()
    app.state.handler, app.state.llm_handler = handler, None
    register_lora_training_start_route(
        app, lambda: None, lambda data, code=200, error=None: {"data": data, "error": error}, lambda *_: None
    )
    request = {"tensor_dir": TENSORS, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "train_epochs": 6}
    request |= {"train_batch_size": 3, "gradient_accumulation": 1, "training_shift": SHIFT_MOVED, "training_seed": 7}
    with TestClient(app) as client:
        answer = client.post("/v1/training/start", json=request | {"lora_output_dir": output}).json()
        if answer.get("error"):
            raise SystemExit(answer["error"])
        while app.state.training_state["is_training"]:
            time.sleep(0.05)
    return [str(app.state.training_state["status"])]


log: list[str] = []
logger.remove()
logger.add(lambda line: log.append(str(line).strip()), format="{level} {message}", level="INFO")
trained = []
for number, name in enumerate(MODELS):
    handler = load(name)
    seen: list[float] = []
    dropped: list[bool] = []
    null = handler.model.null_condition_emb.detach()

    def note(
        _: Any, __: Any, given: Any, seen: list[float] = seen, dropped: list[bool] = dropped, null: Any = null
    ) -> None:
        seen += given["timestep"].float().tolist()
        rows = given["encoder_hidden_states"]
        dropped += [torch.equal(row, null[0].expand_as(row)) for row in rows]

    handler.model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    del log[:]
    how = {"gradio": by_gradio, "http": by_http, "stop": stopped_and_resumed}[HOW]
    messages = how(handler, f"output/{number}")
    trained.append({"model": name, "t": seen, "dropped": dropped, "messages": messages, "log": list(log)})
Path(REPORT).write_text(json.dumps(trained), encoding="utf-8")
