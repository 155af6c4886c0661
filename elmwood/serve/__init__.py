"""The server of models: an ordinary OpenAI endpoint over anything `open_model` opens, that can say which experts answered."""

from elmwood.registry import require

require("fastapi", "serve")
