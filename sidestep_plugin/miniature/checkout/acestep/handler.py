"""The app's handler, as far as encoding a song needs it, and a generation that hands the same to the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from acestep.constants import DEFAULT_DIT_INSTRUCTION, PROMPT

_SAMPLES = 1920  # of a frame
_FEWEST_FRAMES = 128


class AceStepHandler:
    """Models and settings, filled by whoever loads them."""

    def __init__(self) -> None:
        self.model: Any = None
        self.config: Any = None
        self.vae: Any = None
        self.text_encoder: Any = None
        self.text_tokenizer: Any = None
        self.silence_latent: Any = None
        self.device = "cpu"
        self.dtype = torch.float32
        self.sample_rate = 48000

    @contextmanager
    def _load_model_context(self, model_name: str) -> Iterator[None]:
        yield

    def prepare_batch_data(
        self,
        actual_batch_size: int,
        processed_src_audio: Any,
        audio_duration: float | None,
        captions: str,
        lyrics: str,
        vocal_language: str,
        instruction: str,
        bpm: Any,
        key_scale: str,
        time_signature: str,
    ) -> tuple[list[Any], ...]:
        """Repeat the values of one song; what is empty is told as N/A."""
        about = {
            "bpm": bpm or "N/A",
            "timesignature": time_signature.strip() or "N/A",
            "keyscale": key_scale.strip() or "N/A",
        }
        if audio_duration:
            about["duration"] = f"{int(audio_duration)} seconds"
        values = (captions, instruction, lyrics, vocal_language, about)
        return tuple([value] * actual_batch_size for value in values)

    def _format_lyrics(self, lyrics: str, language: str) -> str:
        return f"# Languages\n{language}\n\n# Lyric\n{lyrics}<|endoftext|>"

    def _prepare_batch(
        self,
        captions: list[str],
        lyrics: list[str],
        target_wavs: torch.Tensor,
        refer_audios: list[list[torch.Tensor]],
        metas: list[dict[str, Any]],
        vocal_languages: list[str],
        instructions: list[str],
    ) -> dict[str, Any]:
        frames = max(_FEWEST_FRAMES, target_wavs.shape[-1] // _SAMPLES)
        texts, prompt_ids, lyric_ids = [], [], []
        for caption, sung, about, language, instruction in zip(
            captions, lyrics, metas, vocal_languages, instructions, strict=True
        ):
            told = "".join(f"- {name}: {value}\n" for name, value in about.items())
            prompt, song = PROMPT.format(instruction, caption, told), self._format_lyrics(sung, language)
            texts.append(f"{prompt}\n\n{song}")
            prompt_ids.append(self._tokens(prompt, 256))
            lyric_ids.append(self._tokens(song, 2048))
        rows = len(captions)
        return {
            "text_inputs": texts,
            "text_token_idss": torch.cat(prompt_ids),
            "lyric_token_idss": torch.cat(lyric_ids),
            "src_latents": self._silence(frames).expand(rows, -1, -1),
            "chunk_masks": torch.ones(rows, frames, dtype=torch.bool),
            "refer_audioss": refer_audios,
        }

    def _tokens(self, text: str, most: int) -> torch.Tensor:
        ids: torch.Tensor = self.text_tokenizer(text, truncation=True, max_length=most, return_tensors="pt").input_ids
        return ids

    def _silence(self, frames: int) -> torch.Tensor:
        silence: torch.Tensor = self.silence_latent
        return silence.repeat(1, -(-frames // silence.shape[1]), 1)[:, :frames]

    def preprocess_batch(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        source, device = batch["src_latents"], torch.device(self.device)
        prompts, lyrics = batch["text_token_idss"].to(device), batch["lyric_token_idss"].to(device)
        prompt_states = self.text_encoder(input_ids=prompts).last_hidden_state.to(self.dtype)
        lyric_states = self.text_encoder.embed_tokens(lyrics).to(self.dtype)
        chunk = batch["chunk_masks"].to(device).unsqueeze(-1).repeat(1, 1, source.shape[-1])
        rows = len(source)
        return (
            None,
            batch["text_inputs"],
            source,
            source,
            prompt_states,
            torch.ones_like(prompts).bool(),
            lyric_states,
            torch.ones_like(lyrics).bool(),
            None,
            self.silence_latent[:, :750].expand(rows, -1, -1),
            torch.arange(rows, device=device),
            chunk,
        )

    @torch.no_grad()
    def generate_music(
        self,
        captions: str,
        lyrics: str = "",
        bpm: Any = None,
        key_scale: str = "",
        time_signature: str = "",
        vocal_language: str = "en",
        audio_duration: float = 30.0,
        inference_steps: int = 2,
        seed: int = 0,
        **unused: Any,
    ) -> dict[str, Any]:
        """Generate latents. As in ACE-Step, what goes wrong is an answer and never raised."""
        try:
            values = self.prepare_batch_data(
                1, None, audio_duration, captions, lyrics, vocal_language, DEFAULT_DIT_INSTRUCTION, bpm, key_scale,
                time_signature,
            )  # fmt: skip
            names = ("captions", "instructions", "lyrics", "vocal_languages", "metas")
            batch = self._prepare_batch(
                **dict(zip(names, values, strict=True)),
                target_wavs=torch.zeros(1, 2, int(round(audio_duration, 1) * self.sample_rate)),
                refer_audios=[[torch.zeros(2, 30 * self.sample_rate)]],
            )
            found = self.preprocess_batch(batch)
            states, mask, context = self.model.prepare_condition(
                text_hidden_states=found[4],
                text_attention_mask=found[5],
                lyric_hidden_states=found[6],
                lyric_attention_mask=found[7],
                refer_audio_acoustic_hidden_states_packed=found[9],
                refer_audio_order_mask=found[10],
                hidden_states=found[2],
                src_latents=found[2],
                chunk_masks=found[11],
            )
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(found[2].shape, generator=generator).to(found[2])
            for step in range(inference_steps):
                t = torch.full((1,), 1.0 - step / inference_steps).to(x)
                velocity = self.model.decoder(
                    hidden_states=x,
                    timestep=t,
                    timestep_r=t,
                    attention_mask=torch.ones(x.shape[:2]).to(x),
                    encoder_hidden_states=states,
                    encoder_attention_mask=mask,
                    context_latents=context,
                )[0]
                x = x - velocity / inference_steps
        except Exception as error:
            return {"success": False, "error": str(error)}
        return {"success": True, "latents": x}
