"""Hybrid models of Hugging Face transformers on sleepkern's kernels.

    from sleepkern.integrations.transformers import patch, patched, unpatch

    with patch():                 # all families, every model of the process, also those already built
        model.generate(...)
    patch("qwen3_5", "kimi_linear", "bamba")    # FAMILIES has all names; Lara-Mini needs 5.24
    patch(model)                  # the families that this model is made of
    patched(model)                # what of them is replaced at the moment
    unpatch()

The modeling files call module-level functions for the recurrence of many tokens and of one, and for the short
convolution before it. `patch` puts functions over `sleepkern.gated_delta_rule`, `kda`, `simple_gla`, `recurrent_step`
and `sleepkern.nn.short_convolution` in their place, and `gated_rms_norm` into the class of the norm after it. Weights
and code stay as they are. Layers of transformers 4.57 to 5.10 keep the functions that they found when they were built:
there, patch before building, or `patch(model)`, which also sets them in the model's layers. Those versions' Mamba-2
families compute inline and stay stock, but for the scan on a GPU with mamba_ssm (mamba2.py).

Each call is looked at on its own: what sleepkern does not do (float64, torch.export, a device without a kernel, an
argument that it does not know) goes to the original function, with the reason in the debug log.

New with the patch: packed sequences on the CPU, forward and gradients, as each sequence alone. Name them by what
transformers and its collators give: cu_seq_lens_q, cu_seq_lens_k, cu_seqlens, seq_idx, or position_ids that restart
(docs/guides/packed_sequences.md). What cannot be kept apart raises.

Also new: `generate` with drafts (assistant_model, prompt_lookup_num_tokens), whose rejected tokens a `RollbackCache`
takes back in recurrent layers too (docs/guides/reuse_states.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

from .families import FAMILIES, patch, patched, unpatch

if TYPE_CHECKING:
    from .rollback import RollbackCache
    from .token_tree import TokenTree

__all__ = ["FAMILIES", "RollbackCache", "TokenTree", "patch", "patched", "unpatch"]
_FILES = {"RollbackCache": "rollback", "TokenTree": "token_tree"}


def __getattr__(name: str) -> Any:
    """The classes whose files import transformers.

    Raises:
        ImportError: transformers is too old for them.
    """
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    except ImportError as error:
        import transformers

        raise ImportError(
            f"transformers: got {transformers.__version__}, whose caches cannot roll back; expected 5.20 or newer"
        ) from error
