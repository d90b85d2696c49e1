"""Configurations that leave keys out or have others besides: transformers' classes fill them in."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import ConversionError
from convert.sources.opening import read_config
from tests.convert.test_placeholder_keys import ONE_PER_FAMILY, raw_config
from tests.convert.tiny_families import CONFIGS

ADDITIONAL = {
    **{"architectures": ["X"], "torch_dtype": "bfloat16", "transformers_version": "9.0"},
    **{"unsloth_version": "2026.1", "pretraining_tp": 1, "head_dim_": None, "_name_or_path": "\n"},
    **{"attn_implementation": "flash_attention_2", "use_cache": False, "aux": {"deep": [None]}},
}


def read(folder, raw):
    """The configuration; None: it is refused in one line."""
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        return read_config(folder)[1]
    except ConversionError as error:
        refusal = str(error)
    assert "\n" not in refusal
    return None


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_what_is_left_out_is_what_transformers_fills_in(name, tmp_path):
    raw = raw_config(name)
    cls = type(CONFIGS[name])
    # Where no token is named, there is none: a class's own numbers are of its first model.
    keys = [key for key in raw if key != "model_type" and not key.endswith("_token_id")]
    accepted = []

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        left_out=st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True),
        added=st.lists(st.sampled_from(list(ADDITIONAL)), max_size=2, unique=True),
    )
    def run(left_out, added):
        sparse = {key: value for key, value in raw.items() if key not in left_out}
        sparse |= {key: ADDITIONAL[key] for key in added}
        found = read(tmp_path, sparse)
        if found is None:
            return
        try:
            full = json.loads(cls(**sparse).to_json_string(use_diff=False))
        except Exception:  # of its own kinds
            return
        # Some of its defaults fit its own default sizes only.
        if (expected := read(tmp_path, full)) is not None:
            assert found == expected, left_out
            accepted.append(left_out)

    run()
    assert accepted
