from tests.unit.models.conftest import one_rank  # noqa: F401
