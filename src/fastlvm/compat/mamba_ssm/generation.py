"""Generation as mamba_ssm has it: one token after the other from the states of the layers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlvm.compat._checks import check_shape
from fastlvm.compat.mamba_ssm.cache import InferenceParams
from fastlvm.compat.mamba_ssm.norms import wide
from fastlvm.errors import InputError

_NEVER = -math.inf


@dataclass
class GenerateDecoderOnlyOutput:
    """What `decode` gives; `output.sequences` is also `output["sequences"]` and `output[0]`, as in transformers.

    Args:
        sequences: the prompts and what follows [B, L + new], as the prompts' dtype.
        scores: logits [B, V] for every new token, before any penalty or filter; None or empty unless they were wanted.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key) if isinstance(key, str) else (self.sequences, self.scores)[key]


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Set to -inf, in place, what is less probable than `min_p` times the most probable; logits [..., V]."""
    if min_p > 0.0:
        logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), _NEVER)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set to -inf, in place, what is below the `top_k`-th largest; logits [..., V]."""
    logits.masked_fill_(logits < logits.topk(top_k, dim=-1).values[..., -1:], _NEVER)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set to -inf, in place, all but the fewest most probable that have `top_p` together; logits [..., V]."""
    if 0.0 < top_p < 1.0:
        ordered, places = wide(logits).sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(dim=-1)
        before = shares.cumsum(dim=-1) - shares
        before[..., 0] = 0.0  # the most probable stays, however its share was rounded
        logits.masked_fill_(torch.empty_like(places, dtype=torch.bool).scatter_(-1, places, before >= top_p), _NEVER)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Divide the logits [B, V] of the tokens [B, L] by the penalty, those below 0 multiply: in place, and returned.

    Keskar et al., "CTRL", 2019.
    """
    if repetition_penalty == 1.0:
        return logits
    seen = logits.gather(1, prev_output_tokens)
    seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, seen)


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """One token for every row of logits [B, V]: [B], int64. The logits stay as they are.

    Args:
        logits: of any scale.
        top_k: the most probable that are left to choose from; 1 takes the most probable, whatever the rest is, and 0
            leaves all.
        top_p: then the fewest most probable that have this probability together, after the temperature; 0 or 1
            leaves all.
        min_p: and those with at least this share of the highest probability, before the temperature; 0 leaves all.
        temperature: what the logits are divided by, above 0.

    Raises:
        InputError: an argument is out of its range.
    """
    _check_choice(top_k, top_p, min_p, temperature)
    if top_k == 1:
        return logits.argmax(dim=-1)
    held, tokens = (logits.clone(), None) if top_k == 0 else logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    modify_logits_for_min_p_filtering(held, min_p)
    if temperature != 1.0:
        held /= temperature
    modify_logits_for_top_p_filtering(held, top_p)
    chosen = torch.multinomial(wide(held).softmax(dim=-1), num_samples=1)
    return (chosen if tokens is None else tokens.gather(-1, chosen))[:, 0]


def _check_choice(top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; wants a whole number from 0 on, 0 for all tokens")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if not 0.0 <= share <= 1.0:
            raise InputError(f"{name} is {share}; wants a number from 0 to 1")
    if top_k != 1 and not temperature > 0.0:
        raise InputError(f"temperature is {temperature}; wants more than 0, or top_k=1 for the most probable token")


def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> GenerateDecoderOnlyOutput:
    """Go on with prompts of equal length until they have `max_length` tokens; one token is added in any case.

    Args:
        input_ids: [B, L], L at least 1.
        model: takes `position_ids`, `inference_params` and `num_last_tokens` and gives `.logits`, as
            `MambaLMHeadModel` does.
        max_length: tokens with the prompt's.
        top_k, top_p, min_p, temperature: how a token is chosen, as in `sample`.
        repetition_penalty: of the tokens before, the prompt's included; 1 for none.
        eos_token_id: end when every row has it at once.
        teacher_outputs: [B, T], taken instead of what would be chosen, as far as it goes.
        vocab_size: choose from the first that many tokens.
        cg: of no effect; there are no CUDA graphs.
        enable_timing: print how long it took, in milliseconds.
        output_scores: keep the logits.
        streamer: has `put` and `end`, as those of transformers: gets the prompt and every new token.

    Raises:
        InputError: an argument is out of its range, or a shape does not fit.
    """
    _check_choice(top_k, top_p, min_p, temperature)
    taught = _check_tokens(input_ids, teacher_outputs, repetition_penalty)
    begin = _clock(input_ids) if enable_timing else 0.0
    cache = InferenceParams(max_seqlen=max_length, max_batch_size=len(input_ids))
    sequences, scores = [input_ids], []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with torch.inference_mode():
        while True:
            logits = _next_logits(model, sequences[-1], cache)[..., :vocab_size]
            if output_scores:
                scores.append(logits)
            cache.seqlen_offset += sequences[-1].shape[1]
            if teacher_outputs is not None and cache.seqlen_offset < taught:
                token = teacher_outputs[:, cache.seqlen_offset]
            else:
                if repetition_penalty != 1.0:
                    seen = torch.cat(sequences, dim=1)
                    logits = modify_logit_for_repetition_penalty(logits.clone(), seen, repetition_penalty)
                token = sample(logits, top_k, top_p, min_p, temperature)
            sequences.append(token[:, None])
            if streamer is not None:
                streamer.put(sequences[-1].cpu())
            ended = eos_token_id is not None and bool((token == eos_token_id).all())
            if ended or cache.seqlen_offset >= max_length - 1:
                break
    if streamer is not None:
        streamer.end()
    # outside of the inference mode, whose tensors no gradient may pass
    output = GenerateDecoderOnlyOutput(torch.cat(sequences, dim=1), tuple(score.clone() for score in scores))
    if enable_timing:
        print(f"Prompt processing + decoding time: {1000 * (_clock(input_ids) - begin):.0f}ms")
    return output


def _check_tokens(input_ids: Tensor, teacher_outputs: Tensor | None, repetition_penalty: float) -> int:
    """How many tokens, the prompt's included, are given and not chosen."""
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; wants (B, L), one token or more")
    if not repetition_penalty > 0.0:
        raise InputError(f"repetition_penalty is {repetition_penalty}; wants more than 0, 1 for none")
    taught = 0 if teacher_outputs is None else teacher_outputs.shape[-1]
    check_shape("decode", "teacher_outputs", teacher_outputs, "(B, T)", (len(input_ids), taught))
    return taught


def _clock(input_ids: Tensor) -> float:
    """Seconds, once the device of the tokens has done what it was given."""
    if input_ids.device.type == "cuda":
        torch.cuda.synchronize(input_ids.device)
    return time.perf_counter()


def _next_logits(model: Any, tokens: Tensor, cache: InferenceParams) -> Tensor:
    """[B, V], after the prompt or one more token."""
    position_ids = None
    if cache.seqlen_offset > 0:
        position_ids = torch.full((len(tokens), 1), cache.seqlen_offset, dtype=torch.int64, device=tokens.device)
    logits: Tensor = model(tokens, position_ids=position_ids, inference_params=cache, num_last_tokens=1).logits[:, -1]
    return logits


class GenerationMixin:
    """`generate` for a model that `decode` takes."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`decode` with this model; `kwargs` are its other arguments.

        Returns:
            The sequences [B, L + new], or what `decode` gives with `return_dict_in_generate`.
        """
        chosen = (top_k, top_p, min_p, temperature)
        output = decode(input_ids, self, max_length, *chosen, output_scores=output_scores, **kwargs)
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences
