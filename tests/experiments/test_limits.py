"""Token ids and lengths that a model cannot read."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from experiments.data import TokenBatch, TokenBatchSource, TokenData
from experiments.models.limits import check_lengths, check_tokens
from experiments.training.evaluation import evaluate_held_out, losses_by_place
from experiments.training.run_data import check_rows
from tests.tiny import make_tokenizer
from tptt_jax import CausalLM, ModelConfig, generate
from tptt_jax.inference.prefill import read
from tptt_jax.training.train_step import Batch

LEARNED = ModelConfig.tiny(position_embedding="learned", max_positions=8, vocab_size=20)


@pytest.fixture(scope="module")
def model():
    return CausalLM(LEARNED, rngs=nnx.Rngs(0))


def source(tokens: np.ndarray, segment_ids: np.ndarray) -> TokenBatchSource:
    return TokenBatchSource(
        tokens=tokens.astype(np.int32), segment_ids=segment_ids, loss_mask=segment_ids > 0
    )


def put(batch: TokenBatch) -> Batch:
    return Batch(*batch)


def test_tokens_outside_the_embedding_are_named():
    tokenizer = make_tokenizer(begin=True)
    check_tokens(np.arange(20), 20, tokenizer)
    with pytest.raises(ValueError, match=r"ids 0 to 2, got 3 \(<\|turn\|>\): use the tokenizer"):
        check_tokens(np.array([[0, 3], [3, 1]]), 3, tokenizer)
    with pytest.raises(ValueError, match="got -1, 20, 21, 2 more: "):
        check_tokens(np.array([20, -1, 21, 22, 23, 5]), 20)


@pytest.mark.parametrize("token", [-1, 20])
def test_nothing_runs_on_tokens_outside_the_embedding(model, token):
    tokens, ids = np.full((1, 4), token), np.ones((1, 4), np.int32)
    rows = source(tokens, ids)
    for call in (
        lambda: read(model, tokens),
        lambda: generate(model, tokens, 2),
        lambda: evaluate_held_out(model, rows, put, batch_size=1),
        lambda: losses_by_place(model, Batch(*rows.batch_at(0, 1, 0)), use_memory=False),
    ):
        with pytest.raises(ValueError, match=rf"rows for token ids 0 to 19, got {token}: use the"):
            call()


def test_padding_of_prompts_may_be_anything(model):
    tokens = np.array([[1, 2, -1], [1, 2, 3]])
    assert read(model, tokens, tokens > 0).batch_size == 2


def test_rows_for_the_memory_alone_have_the_same_limits():
    short, longer = np.ones((1, 8), np.int32), np.ones((1, 9), np.int32)
    data = TokenData(
        train=source(short, short),
        eval=None,
        asked=source(longer, longer),
        format="text",
        num_documents=1,
        num_truncated=0,
        num_without_targets=0,
    )
    tokenizer = make_tokenizer(begin=True)
    with pytest.raises(ValueError, match=r"lower --data\.recall-length to 8"):
        check_rows(data, LEARNED, tokenizer)
    check_rows(replace(data, asked=source(short, short)), LEARNED, tokenizer)


def test_documents_longer_than_learned_positions_are_refused(model):
    ids = np.array([[1] * 8 + [2] * 8, [1] * 4 + [2] * 3 + [0] * 9], np.int32)
    check_lengths(ids, LEARNED, "--x")
    longer = np.array([[1] * 7 + [2] * 9], np.int32)
    with pytest.raises(ValueError, match=r"Rows have 9 tokens, .* lower --x to 8"):
        check_lengths(longer, LEARNED, "--x")
    check_lengths(longer, ModelConfig.tiny(max_positions=8), "--x")
    with pytest.raises(ValueError, match=r"lower --data\.eval-length to 8"):
        evaluate_held_out(model, source(longer, longer), put, batch_size=1)
    with pytest.raises(ValueError, match="the 8 positions that this model has learned"):
        generate(model, np.ones((1, 8), int), 2)
