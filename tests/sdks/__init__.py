"""What an SDK's users rely on, on our transport; `promises` has what is alike in all of them."""

import pytest

pytest.register_assert_rewrite("sdks.promises")
