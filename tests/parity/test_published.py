"""The published shapes of the paper's models, mapped completely and without allocating them."""

import pytest

from tests.convert.published import PUBLISHED, check_published

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")

from tests.parity.torch_models import as_stored  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_has_its_place(name):
    content = dict(PUBLISHED[name])
    config = transformers.AutoConfig.for_model(**content)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # named_parameters gives tied weights once, as checkpoints have them.
    shapes = {key: tuple(x.shape) for key, x in as_stored(dict(model.named_parameters())).items()}
    assert check_published(content, shapes) == len(shapes)
