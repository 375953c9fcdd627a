"""The calls of SGLang's linear-attention kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import recurrence as ops
from ...rules import GATED_DELTA_RULE, KDA


class LinearAttnKernel:
    """The three calls of SGLang's linear-attention kernels (`LinearAttnKernelBase`) for one rule.

    Args:
        rule: "gated_delta_rule" (Qwen3-Next, Qwen3.5) or "kda" (Kimi-Linear).
        state_v_first: whether states are stored as [rows,HV,V,K], else [rows,HV,K,V].
        backend: the backend of each call, default the first that can.

    Raises:
        ValueError: another rule.
    """

    def __init__(self, rule: str = "gated_delta_rule", state_v_first: bool = False, backend: str | None = None) -> None:
        known = {"gated_delta_rule": GATED_DELTA_RULE, "kda": KDA}
        if rule not in known:
            raise ValueError(f"rule: got {rule!r}; expected one of {', '.join(known)}")
        self.rule, self.state_v_first, self.backend = known[rule], state_v_first, backend

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """One token of each sequence; its state is updated in place.

        Args:
            q: [1,n,H,K] queries of n sequences, normalised in the kernel.
            k: [1,n,H,K] keys, normalised in the kernel.
            v: [1,n,HV,V] values.
            a: [n,HV], or [n,HV,K] or [n,HV*K] for kda: raw decay, -exp(A_log) softplus(a + dt_bias) is its log.
            b: [n,HV] raw beta, whose sigmoid is the factor of the write.
            A_log: [HV] logarithm of the rate of each head.
            dt_bias: [HV], or [HV,K] or [HV*K] for kda.
            ssm_states: the pool of states.
            cache_indices: [n] rows of the pool; a negative one is a padded row, whose output is 0.
            query_start_loc: [n+1] where the tokens of each sequence start.
            kwargs: keywords for other kernels, which change nothing here.

        Returns:
            Outputs [1,n,HV,V].

        Raises:
            TypeError, ValueError: as `sleepkern.recurrent_step`.
        """
        tokens = self._tokens(q, k, v, a, b)
        one_each = tokens["q"].shape[1] == cache_indices.shape[0]
        if one_each:  # without offsets the kernels of decode take the call
            tokens = {name: t.transpose(0, 1) for name, t in tokens.items()}
        o, _ = ops.recurrent_step(
            **tokens,
            state=self._pool(ssm_states),
            state_indices=cache_indices,
            cu_seqlens=None if one_each else query_start_loc,
            **self._options(A_log, dt_bias),
        )
        return o.transpose(0, 1) if one_each else o

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, None, None]:
        """Prefill: packed sequences of any length, each from and into its row of the pool.

        Args:
            q: [1,T,H,K] queries, normalised in the kernel.
            k: [1,T,H,K] keys, normalised in the kernel.
            v: [1,T,HV,V] values.
            g: [1,T,HV], or [1,T,HV,K] for kda: log decay, at most 0.
            beta: [1,T,HV] factor of the write.
            ssm_states: the pool of states, updated in place.
            cache_indices: [n] rows of the pool; a negative one starts from zero and is not written.
            query_start_loc: [n+1] where the tokens of each sequence start.
            kwargs: keywords for other kernels, which change nothing here.

        Returns:
            Outputs [1,T,HV,V], None and None: states are in the pool, and none along the way are returned.

        Raises:
            TypeError, ValueError: as the rule of sleepkern.
        """
        run = ops.kda if self.rule is KDA else ops.gated_delta_rule
        o, _ = run(
            q, k, v, g, beta,
            initial_state=self._pool(ssm_states),
            state_indices=cache_indices,
            cu_seqlens=query_start_loc,
            use_qk_l2norm_in_kernel=True,
            backend=self.backend,
        )  # fmt: skip
        return o, None, None

    def target_verify(
        self,
        A_log: Tensor,
        dt_bias: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        intermediate_states_buffer: Tensor,
        intermediate_state_indices: Tensor,
        cache_steps: int,
        retrieve_parent_token: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The tokens of a draft of each sequence; states in the pool are read, and those after each token are stored.

        Args:
            A_log, dt_bias: as in `decode`.
            q, k, v, a, b: as in `decode`, cache_steps tokens for each of n sequences.
            ssm_states: the pool of states, which stays as it is.
            cache_indices: [n] rows of the pool.
            query_start_loc: [n+1] offsets of n drafts of equal length.
            intermediate_states_buffer: [m,cache_steps,HV,K,V] gets the state after each token of a draft.
            intermediate_state_indices: [n] rows of that buffer.
            cache_steps: the number of tokens of each draft.
            retrieve_parent_token: of drafts that are trees, which are refused; None.
            kwargs: keywords for other kernels, which change nothing here.

        Returns:
            Outputs [1,n*cache_steps,HV,V].

        Raises:
            NotImplementedError: a draft that is a tree.
            TypeError, ValueError: as `sleepkern.recurrent_step`.
        """
        if retrieve_parent_token is not None:
            raise NotImplementedError(
                "retrieve_parent_token: got a draft that is a tree; expected None, one chain each"
            )
        n = cache_indices.shape[0]
        buffer = self._slots(intermediate_states_buffer, cache_steps)
        tokens = {name: t.unflatten(1, (n, cache_steps))[0] for name, t in self._tokens(q, k, v, a, b).items()}
        steps = intermediate_states_buffer.shape[1]
        slots = intermediate_state_indices[:, None] * steps + torch.arange(cache_steps, device=cache_indices.device)
        present = (intermediate_state_indices >= 0)[:, None]
        o, _ = ops.recurrent_step(
            **tokens,
            state=self._pool(ssm_states),
            state_indices=cache_indices,
            states_out=self._pool(buffer),
            states_out_indices=torch.where(present, slots, -1),
            **self._options(A_log, dt_bias),
        )
        return o.flatten(0, 1)[None]

    @staticmethod
    def _slots(buffer: Tensor, cache_steps: int) -> Tensor:
        """The states [m,steps,...] of a buffer as the rows of one pool."""
        if buffer.dim() != 5 or buffer.shape[1] < cache_steps:
            raise ValueError(
                f"intermediate_states_buffer: got shape {list(buffer.shape)}; expected [m,steps,HV,K,V] with at least "
                f"cache_steps = {cache_steps} steps"
            )
        try:
            return buffer.view(buffer.shape[0] * buffer.shape[1], *buffer.shape[2:])
        except RuntimeError:
            raise ValueError(
                f"intermediate_states_buffer: got strides {list(buffer.stride())}; expected all steps at one distance"
            ) from None

    def _pool(self, states: Tensor) -> Tensor:
        return states.transpose(-1, -2) if self.state_v_first else states

    def _tokens(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> dict[str, Any]:
        """q, k, v, g and beta as one packed row."""
        HV, K = v.shape[2], k.shape[3]
        tail = (HV, K) if self.rule is KDA else (HV,)
        return {"q": q, "k": k, "v": v, "g": a.reshape(1, -1, *tail), "beta": b.reshape(1, -1, HV)}

    def _options(self, A_log: Tensor, dt_bias: Tensor) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "A_log": A_log.flatten(),
            "dt_bias": dt_bias.flatten(),
            "use_beta_sigmoid_in_kernel": True,
            "backend": self.backend,
        }
