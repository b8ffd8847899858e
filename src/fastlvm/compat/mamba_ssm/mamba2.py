"""The Mamba-2 block of mamba_ssm, parameter for parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlvm.compat._checks import UnsupportedError
from fastlvm.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from fastlvm.compat.mamba_ssm import cache
from fastlvm.compat.mamba_ssm.mamba import keep_last, step_sizes
from fastlvm.compat.mamba_ssm.norms import RMSNormGated
from fastlvm.compat.mamba_ssm.ssd import finished_steps, gated, mamba_chunk_scan_combined
from fastlvm.errors import InputError
from fastlvm.ops import ssd_step


class Mamba2(nn.Module):
    """The SSD block (Dao and Gu, "Transformers are SSMs", 2024), without norm and residual connection around it.

    Arguments, parameters and their names are those of `mamba_ssm.Mamba2`, so that its checkpoints load. `chunk_size`
    and `use_mem_eff_path` are of no effect, and `sequence_parallel` neither, since there is no `process_group`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise UnsupportedError("Mamba2: process_group is given; fastlvm has no tensor parallelism, leave it None")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.conv_init, self.process_group, self.sequence_parallel = conv_init, None, sequence_parallel
        self.d_inner = int(expand * d_model)
        self.headdim, self.ngroups = headdim, ngroups
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self._check(A_init_range)
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.chunk_size = dt_limit, chunk_size
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx
        self.activation = "silu"
        self.act = nn.SiLU()

        channels = self.d_ssm + 2 * ngroups * d_state
        d_mlp = self.d_inner - self.d_ssm
        self._parts = [2 * d_mlp, self.d_ssm, channels, self.nheads]  # what skips the scan, z, x B C, dt
        self.in_proj = nn.Linear(d_model, sum(self._parts), bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias, **factory
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(step_sizes(self.nheads, dt_min, dt_max, dt_init_floor, **factory))
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype=dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            self.norm = RMSNormGated(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate, device, dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _check(self, A_init_range: tuple[float, float]) -> None:
        if self.d_ssm % self.headdim or not 0 < self.d_ssm <= self.d_inner:
            wants = f"a multiple of headdim, {self.headdim}, of at most {self.d_inner}"
            raise InputError(f"Mamba2: the scan has {self.d_ssm} channels; wants {wants}, set d_ssm or headdim")
        heads = self.d_ssm // self.headdim
        if self.ngroups < 1 or heads % self.ngroups:
            raise InputError(f"Mamba2: ngroups is {self.ngroups}; wants a number that divides the {heads} heads")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise InputError(f"Mamba2: A_init_range is {A_init_range}; wants a number above 0 and one no less than it")

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """[B, L, d_model] → the same, or [B·L, d_model] with `seqlen` L; with `inference_params` from and into states.

        Args:
            u: the input.
            seqlen: L, where u has no axis for it.
            seq_idx: [B, L], int32: neighbours of the same index are one sequence.
            cu_seqlens: offsets [S + 1] of sequences in one row, whose states `inference_params` are to hold.
            inference_params: a first call takes whole prompts; those with `seqlen_offset` above 0 take one token.
        """
        batch = len(u) if seqlen is None else len(u) // seqlen
        conv_state, ssm_state = None, None
        if inference_params is not None:
            sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
            conv_state, ssm_state = self._get_states_from_cache(inference_params, sequences)
            if inference_params.seqlen_offset > 0:
                return self.step(u, conv_state, ssm_state)[0]
        else:
            cu_seqlens = None
        zxbcdt = self.in_proj(u)
        if seqlen is not None:
            zxbcdt = zxbcdt.unflatten(0, (batch, seqlen))
        skip, z, xbc, dt = zxbcdt.split(self._parts, dim=-1)
        if conv_state is not None:
            _keep_inputs(conv_state, xbc, cu_seqlens)
        y = self._mix(z, xbc, dt, seq_idx, cu_seqlens, ssm_state)
        out = self._out(skip, y, z)
        return out if seqlen is None else out.flatten(0, 1)

    def _mix(
        self, z: Tensor, xbc: Tensor, dt: Tensor, seq_idx: Tensor | None, offsets: Tensor | None, state: Tensor | None
    ) -> Tensor:
        """Convolution and scan; the states after them go to `state`."""
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        xbc = causal_conv1d_fn(xbc.transpose(1, 2), weight, bias, seq_idx, activation=self.activation).transpose(1, 2)
        x, B, C = self._apart(xbc)
        A, D, dt_bias = self._scan_weights()
        y, final, *apart = mamba_chunk_scan_combined(
            x,
            dt,
            A,
            B,
            C,
            self.chunk_size,
            D,
            None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            dt_bias,
            seq_idx=seq_idx,
            cu_seqlens=offsets,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=True,
            return_varlen_states=offsets is not None,
        )
        if state is not None:
            with torch.no_grad():
                state.copy_(apart[0] if apart else final)
        out: Tensor = y.flatten(2)
        return out

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, 1, d_model] for one token [B, 1, d_model], and the states, which are written in place."""
        if hidden_states.shape[1] != 1:
            raise InputError(f"Mamba2: step got {hidden_states.shape[1]} tokens; wants (B, 1, d_model), one at a time")
        skip, z, xbc, dt = self.in_proj(hidden_states[:, 0]).split(self._parts, dim=-1)
        xbc = causal_conv1d_update(xbc, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        x, B, C = self._apart(xbc)
        A, D, dt_bias = self._scan_weights()
        gate = None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim))
        with torch.no_grad():
            dt, bias, softplus = finished_steps("Mamba2", dt, dt_bias, True, self.dt_limit)
            y = ssd_step(ssm_state, x, dt, A, B, C, D, gate, bias, softplus)
        return self._out(skip, y.flatten(1), z)[:, None], conv_state, ssm_state

    def _apart(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., H, P], B and C [..., G, N]."""
        grouped = self.ngroups * self.d_state
        x, B, C = xbc.split([self.d_ssm, grouped, grouped], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _scan_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, D and the bias of dt, in float32 unless the model is in float64."""
        dtype = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        D = self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D
        return -torch.exp(self.A_log.to(dtype)), D.to(dtype), self.dt_bias.to(dtype)

    def _out(self, skip: Tensor, y: Tensor, z: Tensor) -> Tensor:
        if self.rmsnorm:
            y = self.norm(y, z)
        if skip.shape[-1]:
            y = torch.cat([gated(skip), y], dim=-1)
        out: Tensor = self.out_proj(y)
        return out

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> cache.States:
        """States before the first token, zeros: of the convolution [B, channels, d_conv], of the scan [B, H, P, N]."""
        conv, ssm = self.conv1d.weight, self.in_proj.weight
        line = torch.zeros(
            batch_size, self.d_conv, len(conv), device=conv.device, dtype=conv.dtype if dtype is None else dtype
        )
        sizes = (batch_size, self.nheads, self.headdim, self.d_state)
        return line.transpose(1, 2), torch.zeros(sizes, device=ssm.device, dtype=ssm.dtype if dtype is None else dtype)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> cache.States:
        start = lambda: self.allocate_inference_cache(batch_size, 0)  # noqa: E731
        return cache.states(inference_params, self.layer_idx, start, initialize_states)


def _keep_inputs(state: Tensor, xbc: Tensor, cu_seqlens: Tensor | None) -> None:
    """The last inputs of the convolution, of every row of xbc [B, L, D] or of every sequence in the only one."""
    if cu_seqlens is None:
        keep_last(state, xbc.transpose(1, 2))
        return
    if len(xbc) != 1:
        raise InputError(f"Mamba2: u has batch size {len(xbc)}; wants 1 with cu_seqlens, sequences one after another")
    with torch.no_grad():
        state.copy_(causal_conv1d_varlen_states(xbc[0], cu_seqlens, state.shape[2]))
