"""Where documents begin, by hand; loops over random rows are in the tests of what uses it."""

import jax.numpy as jnp
import numpy as np

from tptt_jax.ops.documents import document_ordinals, follows_another, segment_starts, tokens_so_far

# Left padding, padding inside a document, an id that returns, right padding.
IDS = jnp.asarray([[0, 5, 5, 0, 5, 2, 5, 5, 0], [1, 0, 0, 1, 1, 0, 3, 3, 3]])


def test_padding_interrupts_a_document_without_ending_it():
    begins = follows_another(IDS)
    assert np.flatnonzero(begins[0]).tolist() == [5, 6]
    assert np.flatnonzero(begins[1]).tolist() == [6]
    assert tokens_so_far(IDS).tolist() == [[0, 1, 2, 2, 3, 1, 1, 2, 2], [1, 1, 1, 2, 3, 3, 1, 2, 3]]


def test_contiguous_documents_begin_where_any_do():
    ids = jnp.asarray([[5, 5, 2, 5, 5, 5, 0, 0]])
    starts, ordinals = segment_starts(ids)[0], document_ordinals(ids)[0]
    begins = np.append(0, np.flatnonzero(follows_another(ids)[0]))
    assert starts[:6].tolist() == begins[ordinals[:6]].tolist()
