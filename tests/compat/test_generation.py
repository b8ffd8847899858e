"""generate(), decode() and sample(): which token follows, when it ends, what is handed on."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastlvm.compat import mamba_ssm
from fastlvm.compat.mamba_ssm import GenerationMixin, MambaConfig, MambaLMHeadModel, decode, sample
from fastlvm.errors import InputError

VOCABULARY = 13
SSM = {"Mamba": {}, "Mamba2": {"layer": "Mamba2", "headdim": 8, "d_state": 8}}
each_kind = pytest.mark.parametrize("kind", SSM)


def _model(kind):
    """In float64, where recomputing and going on from states choose the same token."""
    torch.manual_seed(3)
    sizes = {"d_model": 16, "n_layer": 2, "vocab_size": VOCABULARY, "pad_vocab_size_multiple": 16}
    config = MambaConfig(**sizes, ssm_cfg=SSM[kind], tie_embeddings=False)
    model = MambaLMHeadModel(config).double()
    with torch.no_grad():
        for parameter in model.parameters():  # a model as it starts says the same token over and over
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def _prompt(batch=3, length=4):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


class Script(GenerationMixin):
    """A model that wants the tokens [B, T] of its script, whatever it is given."""

    def __init__(self, rows, vocabulary=VOCABULARY):
        self.tokens, self.vocabulary, self.calls = torch.tensor(rows), vocabulary, []

    def __call__(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        place = inference_params.seqlen_offset + input_ids.shape[1]
        self.calls.append((input_ids.tolist(), position_ids, num_last_tokens))
        wanted = torch.nn.functional.one_hot(self.tokens[:, place], self.vocabulary)
        return SimpleNamespace(logits=2.0 * wanted[:, None])


@each_kind
@pytest.mark.parametrize("length", [1, 4])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_whole_forward(kind, length):
    model, tokens = _model(kind), _prompt(length=length)
    result = model.generate(tokens, 16, return_dict_in_generate=True, output_scores=True)
    scores = []
    while tokens.shape[1] < 16:
        scores.append(model(tokens).logits[:, -1])
        tokens = torch.cat([tokens, scores[-1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(result.sequences, tokens)
    assert len(set(tokens[:, -8:].flatten().tolist())) > 3  # a model that repeats itself would show little
    torch.testing.assert_close(torch.stack(result.scores), torch.stack(scores))


@each_kind
@torch.no_grad()
def test_scores_under_a_teacher_are_the_forwards_of_its_tokens(kind):
    model, teacher = _model(kind), _prompt(length=10)
    result = model.generate(
        teacher[:, :3], 12, teacher_outputs=teacher, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(result.sequences[:, :10], teacher) and result.sequences.shape == (3, 12)
    torch.testing.assert_close(torch.stack(result.scores, 1)[:, :8], model(teacher).logits[:, 2:])
    assert torch.equal(result.sequences[:, 10], model(teacher).logits[:, -1].argmax(-1))


@torch.no_grad()
def test_only_the_first_tokens_of_the_vocabulary_are_chosen():
    model = _model("Mamba")
    torch.manual_seed(0)
    result = model.generate(_prompt(), 40, top_k=0, vocab_size=2, return_dict_in_generate=True, output_scores=True)
    assert set(result.sequences[:, 4:].flatten().tolist()) == {0, 1}
    assert result.scores[0].shape == (3, 2)


def test_every_call_gets_one_token_and_its_place():
    script = Script([[0, 0, 0, 5, 6, 7]])
    assert script.generate(torch.tensor([[1, 2, 3]]), 6).tolist() == [[1, 2, 3, 5, 6, 7]]
    first, *rest = script.calls
    assert first == ([[1, 2, 3]], None, 1)
    assert [(tokens, places.tolist(), last) for tokens, places, last in rest] == [([[5]], [[3]], 1), ([[6]], [[4]], 1)]


@pytest.mark.parametrize(
    "rows, length",
    [
        ([[0, 4, 9, 4, 4]], 3),
        ([[0, 4, 9, 4, 4], [0, 9, 4, 9, 4]], 5),  # never both at once
        ([[0, 4, 4, 9, 4], [0, 9, 4, 9, 4]], 4),
    ],
)
def test_it_ends_when_every_row_has_the_token_of_the_end_at_once(rows, length):
    tokens = Script(rows).generate(torch.zeros(len(rows), 1, dtype=torch.int64), 5, eos_token_id=9)
    assert tokens.tolist() == [row[:length] for row in rows]


def test_the_token_of_the_end_in_a_prompt_ends_nothing():
    assert Script([[0, 0, 3, 4]]).generate(torch.tensor([[1, 9]]), 4, eos_token_id=9).tolist() == [[1, 9, 3, 4]]


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_one_token_is_added_in_any_case(length):
    assert Script([[0, 0, 5, 6]]).generate(torch.tensor([[1, 2]]), length).tolist() == [[1, 2, 5]]


def test_the_penalty_takes_prompt_and_output_and_leaves_the_scores():
    """The script wants 5 all the time, at 2 where the rest is at 0: 2 / 3 for 5 beats 0, (2 / 0.5) would, too."""
    script = Script([[0, 5, 5, 5]])
    plain_run = script.generate(torch.tensor([[5]]), 3, return_dict_in_generate=True, output_scores=True)
    result = script.generate(
        torch.tensor([[5]]), 3, repetition_penalty=3.0, top_k=0, temperature=1e-3, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert result.sequences.tolist() == [[5, 5, 5]]
    assert torch.equal(torch.stack(result.scores), torch.stack(plain_run.scores))


@each_kind
@torch.no_grad()
def test_greedy_tokens_under_a_penalty(kind):
    model, tokens = _model(kind), _prompt()
    result = model.generate(tokens, 14, repetition_penalty=1.7)
    while tokens.shape[1] < 14:
        logits = model(tokens).logits[:, -1]
        for row, seen in zip(logits, tokens.tolist(), strict=True):
            for token in set(seen):
                row[token] = row[token] / 1.7 if row[token] > 0 else row[token] * 1.7
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(result, tokens)
    assert not torch.equal(result, model.generate(_prompt(), 14))


def _kept(logits, top_k=0, top_p=0.0, min_p=0.0, temperature=1.0):
    """Probabilities of one row by the definitions, those of what is left out being 0."""
    probabilities = dict(enumerate(torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist()))
    order = sorted(probabilities, key=probabilities.get, reverse=True)
    kept = order[:top_k] if top_k else order
    kept = [i for i in kept if probabilities[i] >= min_p * probabilities[order[0]]]
    weights = {i: probabilities[i] ** (1 / temperature) for i in kept}
    nucleus, mass = [], 0.0
    for i in kept:
        if 0 < top_p < 1 and mass >= top_p * sum(weights.values()):
            break
        nucleus.append(i)
        mass += weights[i]
    return torch.tensor([weights[i] / mass if i in nucleus else 0.0 for i in range(len(logits))])


LOGITS = [0.3, 2.0, -1.0, 1.2, 0.9, -3.0, 1.9, -0.4]
CHOICES = [
    {"top_k": 0},
    {"top_k": 3},
    {"top_k": 99},
    {"top_k": 0, "top_p": 0.6},
    {"top_k": 0, "top_p": 1.0, "temperature": 0.5},
    {"top_k": 0, "top_p": 1e-9},
    {"top_k": 0, "min_p": 0.3},
    {"top_k": 0, "min_p": 1.0},
    {"top_k": 4, "top_p": 0.7, "temperature": 2.0},
    {"top_k": 5, "min_p": 0.4, "temperature": 3.0},
    {"top_k": 0, "min_p": 0.2, "top_p": 0.8, "temperature": 0.7},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_samples_follow_the_definitions(choice, dtype):
    torch.manual_seed(0)
    rows = torch.tensor(LOGITS, dtype=dtype).expand(20_000, -1)
    before, wanted = rows.clone(), _kept(rows[0].tolist(), **choice)
    tokens = sample(rows, **choice)
    assert tokens.dtype == torch.int64 and torch.equal(rows, before)
    shares = torch.bincount(tokens, minlength=len(LOGITS)) / len(tokens)
    assert set(tokens.tolist()) <= set(wanted.nonzero()[:, 0].tolist())
    assert (shares - wanted).abs().max() < 0.015


def test_rows_are_filtered_each_by_its_own():
    rows = torch.tensor([LOGITS, LOGITS[::-1]]).repeat_interleave(500, 0)
    torch.manual_seed(0)
    tokens = sample(rows, top_k=0, min_p=0.5)
    assert set(tokens[:500].tolist()) == {1, 6} and set(tokens[500:].tolist()) == {6, 1}
    assert set(sample(torch.stack([rows[0], rows[0].roll(3)]).repeat(50, 1), top_k=0, min_p=0.99).tolist()) == {1, 4}


@pytest.mark.parametrize(
    "name, value, kept",
    [
        ("top_k", 3, {1, 3, 6}),
        ("top_p", 0.6, {1, 6}),
        ("top_p", 0.7, {1, 3, 6}),
        ("top_p", 1.0, set(range(8))),
        ("top_p", 0.0, set(range(8))),
        ("min_p", 0.4, {1, 3, 6}),
        ("min_p", 0.0, set(range(8))),
    ],
)
def test_filters_write_in_place(name, value, kept):
    wanted = _kept(LOGITS, **{name: value})
    assert set(wanted.nonzero()[:, 0].tolist()) == kept
    logits = torch.tensor([[LOGITS, LOGITS[::-1]]])  # any axes before
    assert getattr(mamba_ssm, f"modify_logits_for_{name}_filtering")(logits, value) is None
    assert torch.equal(logits[0, 0] == -math.inf, wanted == 0)
    assert torch.equal(logits[0, 1].flip(0), logits[0, 0])
    assert torch.equal(logits[0, 0][wanted > 0], torch.tensor(LOGITS)[wanted > 0])


def test_the_penalty_writes_in_place_and_once_for_every_token():
    logits = torch.tensor([LOGITS, LOGITS])
    result = mamba_ssm.modify_logit_for_repetition_penalty(logits, torch.tensor([[1, 1, 5], [0, 2, 0]]), 2.0)
    assert result is logits
    expected = torch.tensor([LOGITS, LOGITS])
    expected[0, 1], expected[0, 5], expected[1, 0], expected[1, 2] = 1.0, -6.0, 0.15, -2.0
    assert torch.equal(logits, expected)


def test_the_most_probable_is_taken_whatever_else_is_asked_for():
    assert sample(torch.tensor([LOGITS]), top_k=1, temperature=0.0).tolist() == [1]


BAD = [
    ({"top_k": -1}, "top_k is -1; wants a whole number from 0 on"),
    ({"top_k": 0, "top_p": 1.5}, "top_p is 1.5; wants a number from 0 to 1"),
    ({"top_k": 0, "min_p": -0.1}, "min_p is -0.1; wants a number from 0 to 1"),
    ({"top_k": 0, "temperature": 0.0}, "temperature is 0.0; wants more than 0, or top_k=1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; wants more than 0"),
    ({"teacher_outputs": torch.zeros(2, 5)}, r"teacher_outputs has shape \(2, 5\); wants \(B, T\) = \(1, 5\)"),
    ({"teacher_outputs": torch.zeros(5)}, r"teacher_outputs has shape \(5,\)"),
    ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"input_ids has shape \(1, 0\); wants \(B, L\), one token"),
    ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"input_ids has shape \(3,\)"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_arguments_out_of_their_range(arguments, message):
    script = Script([[0] * 6])
    with pytest.raises(InputError, match=message):
        script.generate(**{"input_ids": torch.tensor([[1]]), "max_length": 5, **arguments})
    assert not script.calls


def test_what_comes_back():
    script, prompt = Script([[0, 5, 6]]), torch.tensor([[1]])
    result = script.generate(prompt, 3, return_dict_in_generate=True)
    assert result.scores is None
    assert result["sequences"] is result[0] is result.sequences
    assert decode(prompt, script, 3).scores == ()
    assert len(decode(prompt, script, 3, output_scores=True).scores) == 2
    assert torch.equal(script.generate(prompt, 3, cg=True), result.sequences)


def test_a_streamer_gets_prompt_tokens_and_the_end():
    heard = []
    streamer = SimpleNamespace(put=lambda x: heard.append(x.tolist()), end=lambda: heard.append("end"))
    Script([[0, 5, 6]]).generate(torch.tensor([[1]]), 3, streamer=streamer)
    assert heard == [[[1]], [[5]], [[6]], "end"]


def test_the_time_is_printed_if_wanted(capsys):
    Script([[0, 5, 6]]).generate(torch.tensor([[1]]), 3)
    assert capsys.readouterr().out == ""
    Script([[0, 5, 6]]).generate(torch.tensor([[1]]), 3, enable_timing=True)
    text = capsys.readouterr().out
    assert text.startswith("Prompt processing + decoding time: ") and text.endswith("ms\n")


@each_kind
def test_generated_tokens_can_be_trained_on(kind):
    model = _model(kind)
    result = model.generate(_prompt(), 9, return_dict_in_generate=True, output_scores=True)
    assert not any(x.is_inference() or x.requires_grad for x in (result.sequences, *result.scores))
    (model(result.sequences).logits[:, :-1] * result.scores[0][:, None]).sum().backward()
    assert model.backbone.embedding.weight.grad.any()
