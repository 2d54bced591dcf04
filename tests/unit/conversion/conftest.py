from tests.unit.models.conftest import make_model, one_rank  # noqa: F401
