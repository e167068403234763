"""The blocks of a transformer one by one, where the transformer around them is not known as a whole."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmkernels.blocks.contexts import Context
from mmkernels.blocks.drop_in import PLAIN, FusedBlock
from mmkernels.blocks.operations import of_transformer_block
from mmkernels.blocks.recognition.inputs import spatial_inputs, temporal_inputs
from mmkernels.blocks.recognition.transformer import SPATIAL, TEMPORAL, plain_parts_of_block, why_not_block
from mmkernels.blocks.transformer import spatial_transformer_block, temporal_transformer_block, units_of
from mmkernels.kernels.call import Call
from mmkernels.memory.units import BLOCK_INPUT, Choice


class FusedSpatialBlock(FusedBlock):
    """Same equation, parameters and state_dict as diffusers' BasicTransformerBlock as SVD has it."""

    why_not = staticmethod(functools.partial(why_not_block, role=SPATIAL))
    plain_parts = staticmethod(functools.partial(plain_parts_of_block, role=SPATIAL))
    probe_inputs = staticmethod(spatial_inputs)
    __slots__ = ()

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """As in a whole transformer."""
        return {**units_of(SPATIAL, self.plain), BLOCK_INPUT: PLAIN}

    def calls(self) -> Mapping[str, Call]:
        """Of every operation."""
        return of_transformer_block(self, self.plain)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Context = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """hidden_states (B*F, P, C), encoder_hidden_states (B*F, T, C_context); no masks, timestep nor labels."""
        self.check_unchanged()
        given = attention_mask, encoder_attention_mask, timestep, class_labels, added_cond_kwargs
        if encoder_hidden_states is None or any(x is not None for x in given):
            raise ValueError("a fused transformer block takes a context, and no mask, timestep or class labels; undo()")

        def compute(tokens: Tensor, context: Context) -> Tensor:
            return spatial_transformer_block(
                self, tokens, context, choices=self.choices, plain=self.plain, kwargs=cross_attention_kwargs or {}
            )

        return self.run(compute, hidden_states, encoder_hidden_states)


class FusedTemporalBlock(FusedBlock):
    """Same equation, parameters and state_dict as diffusers' TemporalBasicTransformerBlock."""

    why_not = staticmethod(functools.partial(why_not_block, role=TEMPORAL))
    plain_parts = staticmethod(functools.partial(plain_parts_of_block, role=TEMPORAL))
    probe_inputs = staticmethod(temporal_inputs)
    __slots__ = ()

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """As in a whole transformer."""
        return {**units_of(TEMPORAL, self.plain), BLOCK_INPUT: PLAIN}

    def calls(self) -> Mapping[str, Call]:
        """Of every operation."""
        return of_transformer_block(self, self.plain)

    def forward(self, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Context = None) -> Tensor:
        """hidden_states (B*F, P, C), encoder_hidden_states (B*P, T, C_context): a context of each pixel."""
        self.check_unchanged()
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states is None, wanted (B*P, T, C_context)")

        def compute(tokens: Tensor, context: Context) -> Tensor:
            return temporal_transformer_block(
                self, tokens, None, context, num_frames, choices=self.choices, plain=self.plain
            )

        return self.run(compute, hidden_states, encoder_hidden_states)
