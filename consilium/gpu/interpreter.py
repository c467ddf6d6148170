"""A mistake of Triton 3.6's interpreter beside numpy 2.4 put right: loops over bounds that a kernel is given or loads."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def mend() -> None:
    """numpy takes no array of one element for an integer any more; the interpreter's scalars are such arrays."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
