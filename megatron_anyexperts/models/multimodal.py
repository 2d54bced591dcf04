"""The multimodal model: a language model whose placeholder tokens are replaced by image, video and audio features."""

import functools

import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_anyexperts.host_sizes import HostSizes, Ranges
from megatron_anyexperts.media import AUDIO, VISION_CODES
from megatron_anyexperts.models.attention_inputs import AttentionInputs, attention_inputs, cut_documents
from megatron_anyexperts.models.audio import AudioEncoder
from megatron_anyexperts.models.specs import uses_transformer_engine
from megatron_anyexperts.models.vision import VisionEncoder
from megatron_anyexperts.moe.losses import token_weights


class MultimodalModel(MegatronModule):
    """Language model with encoders in front of it.

    1. Encode images, videos and clips (first pipeline stage):       [placeholders, H]
    2. Embed the tokens (first pipeline stage):                      [S, B, H]
    3. Put the features where `token_modality` marks placeholders:   [S, B, H]
    4. Decoder, output layer and loss are `HybridModel`'s.

    Args:
        language_model: the decoder with embedding and output layer of this pipeline stage.
        vision: encoder of images and video, or None; only on the first stage.
        audio: encoder of audio, or None; only on the first stage.
    """

    def __init__(
        self,
        language_model: HybridModel,
        vision: VisionEncoder | None = None,
        audio: AudioEncoder | None = None,
    ):
        super().__init__(language_model.config)
        # Registered in the order of use, which overlapped parameter gathering follows.
        self.vision = vision
        self.audio = audio
        self.language_model = language_model
        self.model_type = ModelType.encoder_or_decoder
        self.transformer_engine = uses_transformer_engine(self.config)
        self._padding_mask_BS: Tensor | None = None
        if language_model.mtp_process and not self.config.anyexperts_stock_moe:
            # `HybridModel` 0.19 does not hand the mask to its prediction layers, which take it, and shift it.
            language_model.mtp.register_forward_pre_hook(self._with_padding_mask, with_kwargs=True)

    # What Megatron's schedules, gradient finalisation and checkpointing ask a model for.
    @property
    def pre_process(self) -> bool:
        """Whether this is the first pipeline stage."""
        return self.language_model.pre_process

    @property
    def post_process(self) -> bool:
        """Whether this is the last pipeline stage."""
        return self.language_model.post_process

    @property
    def mtp_process(self) -> bool:
        """Whether this stage holds the multi-token-prediction layers."""
        return self.language_model.mtp_process

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Whether the output layer uses the embedding's weight."""
        return self.language_model.share_embeddings_and_output_weights

    @property
    def pg_collection(self) -> ProcessGroupCollection:
        """Process groups of the language model."""
        return self.language_model.pg_collection

    @property
    def vp_stage(self) -> int | None:
        """Virtual pipeline stage."""
        return self.language_model.vp_stage

    @property
    def module(self) -> HybridModel:
        """The language model; Megatron's loading looks for a `HybridModel` by unwrapping `.module`."""
        return self.language_model

    @property
    def decoder(self) -> MegatronModule:
        """The decoder's layer stack."""
        return self.language_model.decoder

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied weight on the first and last stages."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the activations of the previous pipeline stage."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        token_modality: Tensor | None = None,
        image_patches: Tensor | None = None,
        image_grids: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        sizes: HostSizes | None = None,
        inference_context: BaseInferenceContext | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Tensor:
        """Per-token losses, or logits where there are no labels.

        Args:
            tokens: int64 [B, S].
            position_ids: int64 [B, S], read by learned absolute positions only.
            segment_ids: int [B, S], the document of each token, 0 for padding; None for one document per row.
            labels: int64 [B, S].
            loss_mask: float [B, S], needed by multi-token prediction, whose loss is taken inside.
            token_modality: int8 [B, S]: 1 image, 2 audio, 3 video placeholders; None for text only.
            image_patches: see `VisionEncoder.forward`; may be empty or None.
            image_grids: int [N, 3] patch grids (t, h, w); may be empty or None.
            audio_features: see `AudioEncoder.forward`; may be empty or None.
            audio_lengths: int [M] frames of each clip; may be empty or None.
            sizes: of these inputs; None: counted here, for which a GPU is waited for. Under context parallelism those
                of `data.context_cut.cut`, whose part of a row all of these inputs then are.
            inference_context: cache of keys and values for decoding.
            runtime_gather_output: gather the logits of all tensor-parallel ranks.

        Returns:
            Losses [B, S] in fp32, or logits [B, S, V / tp]; on earlier pipeline stages the hidden states.

        Raises:
            ValueError: placeholders and features differ in number, or there is no encoder for the input; a row that
                is not cut under context parallelism.
        """
        cp = self.pg_collection.cp
        if cp.size() > 1 and (sizes is None or segment_ids is None or sizes.taken is None):
            raise ValueError(
                f"context_parallel_size={cp.size()}: the model takes one rank's part of a row with its sizes, as "
                "data.context_cut.cut makes them"
            )
        if sizes is None:
            counted = (segment_ids, token_modality, image_grids, audio_lengths)
            sizes = HostSizes.of(*(None if each is None else each.cpu().numpy() for each in counted))
        decoder_input = None
        if self.pre_process:
            modality = torch.zeros_like(tokens, dtype=torch.int8) if token_modality is None else token_modality
            vision, audio = sizes.placeholders
            grids, seen, heard = (sizes.grids, sizes.first_frames), *(sizes.taken or (None, None))
            features = [
                _encode("vision", self.vision, modality, VISION_CODES, image_patches, grids, seen, vision),
                _encode("audio", self.audio, modality, (AUDIO,), audio_features, (sizes.clips,), heard, audio),
            ]
            embedded = self.language_model.embedding(input_ids=tokens, position_ids=position_ids)
            decoder_input = self._fill(embedded, [found for found in features if found is not None])
        attention, self._padding_mask_BS = AttentionInputs(), None
        if segment_ids is not None:
            if cp.size() > 1:
                attention = cut_documents(sizes.documents[0], self.transformer_engine, cp, segment_ids.device)
            else:
                attention = attention_inputs(segment_ids, self.transformer_engine, sizes.documents)
            self._padding_mask_BS = self._padding_mask(segment_ids, loss_mask)
            if loss_mask is not None and attention.packed_seq_params is None:
                loss_mask = within_documents(loss_mask, segment_ids)
        return self.language_model(
            tokens,
            position_ids,
            attention.attention_mask,
            decoder_input=decoder_input,
            labels=labels,
            loss_mask=loss_mask,
            packed_seq_params=attention.packed_seq_params,
            padding_mask=self._padding_mask_BS,
            inference_context=inference_context,
            runtime_gather_output=runtime_gather_output,
        )

    def _padding_mask(self, segment_ids_BS: Tensor, loss_mask_BS: Tensor | None) -> Tensor | None:
        """What the mixture layers take as such, [B, S].

        For ours the `token_weights` by which a microbatch's router losses weigh like its language-model loss: a tensor
        argument, so that a layer that is recomputed gets it too. For Megatron's own bool, true for padding, and under
        sequence parallelism this rank's part of S.
        """
        padding_BS = segment_ids_BS == 0
        if not self.config.anyexperts_stock_moe:
            return token_weights(padding_BS, loss_mask_BS, self.pg_collection.cp)
        if self.config.moe_router_enable_expert_bias:
            return None  # Megatron-Core 0.19.2 cannot combine the two: a shape error in TopKRouter._apply_expert_bias
        return self._local_part(padding_BS, dim=1)

    def _with_padding_mask(self, module: MegatronModule, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "padding_mask": self._padding_mask_BS}

    def _local_part(self, x: Tensor, dim: int) -> Tensor:
        if not self.config.sequence_parallel:
            return x
        tp = self.pg_collection.tp
        return x.chunk(tp.size(), dim=dim)[tp.rank()].contiguous()

    def _fill(self, embeddings_SBH: Tensor, features: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Replace embeddings by features: pairs of where, bool [B, S], and what, [placeholders, H]."""
        if not features:
            return embeddings_SBH
        shape_BS = features[0][0].shape
        filled_XH = features[0][1].new_zeros(shape_BS.numel(), embeddings_SBH.size(-1))
        is_placeholder_BS = torch.zeros_like(features[0][0])
        for is_kind_BS, features_TH in features:
            # As many places as features: with the number known a GPU is not waited for, nor in the backward pass.
            places_T = torch.nonzero_static(is_kind_BS.flatten(), size=len(features_TH)).squeeze(1)
            filled_XH = filled_XH.index_copy(0, places_T, features_TH)
            is_placeholder_BS = is_placeholder_BS | is_kind_BS
        filled_SBH = filled_XH.view(*shape_BS, -1).transpose(0, 1).contiguous()
        # Contiguous like the embeddings: what comes out is sent as it is to the next pipeline stage.
        is_placeholder_SB = is_placeholder_BS.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            # The embedding has split the sequence already. The backward of this scatter gathers, so that the encoders,
            # which see all of the sequence on each rank, get the whole gradient on each rank.
            tp = self.pg_collection.tp
            filled_SBH = tensor_parallel.scatter_to_sequence_parallel_region(filled_SBH, group=tp)
            is_placeholder_SB = self._local_part(is_placeholder_SB, dim=0)
        return torch.where(is_placeholder_SB.unsqueeze(-1), filled_SBH.to(embeddings_SBH.dtype), embeddings_SBH)


def _encode(
    name: str,
    encoder: VisionEncoder | AudioEncoder | None,
    modality_BS: Tensor,
    codes: tuple[int, ...],
    values: Tensor | None,
    sizes: tuple[tuple, ...],
    taken: Ranges | None,
    placeholders: int,
) -> tuple[Tensor, Tensor] | None:
    """Where one kind of placeholder is, bool [B, S], and its features [placeholders, H]; None if there is nothing.

    Without any input an encoder still runs in training, on its smallest one, of which no row is used: overlapped
    gradient reduction waits for a gradient of every parameter in every microbatch, and delayed FP8 scaling for the same
    number of reductions on every rank.

    Args:
        sizes: what the encoder takes behind `values`, first the sizes of the inputs.
        taken: see `HostSizes.taken`.
    """
    is_kind_BS = functools.reduce(torch.logical_or, (modality_BS == code for code in codes))
    if sizes[0]:
        if encoder is None:
            raise ValueError(
                f"the batch holds {len(sizes[0])} {name} inputs, but the model has no {name} encoder: "
                f"set --{name}-num-layers above 0, or leave such samples out of the data"
            )
        features_TH = encoder(values, *sizes)
        if taken is not None:
            features_TH = torch.cat([features_TH[start:stop] for start, stop in taken])
    elif encoder is not None and torch.is_grad_enabled() and _takes_part(encoder):
        features_TH = encoder(*encoder.smallest_input(modality_BS.device))[:0]
    else:
        features_TH = None
    rows = 0 if features_TH is None else features_TH.size(0)
    if placeholders != rows:
        raise ValueError(
            f"{name}: the tokens hold {placeholders} placeholders, the encoder has features for {rows}; build the "
            "batch with the model's MediaShape (--vision-patch-size, --vision-spatial-merge, --audio-stride)"
        )
    return None if features_TH is None else (is_kind_BS, features_TH)


def _takes_part(encoder: VisionEncoder | AudioEncoder) -> bool:
    """Whether other ranks may wait for this encoder in a training step."""
    return bool(encoder.config.fp8) or any(parameter.requires_grad for parameter in encoder.parameters())


def within_documents(loss_mask_BS: Tensor, segment_ids_BS: Tensor) -> Tensor:
    """Loss mask with the first token of each document cleared.

    Multi-token prediction shifts labels and mask by one more place, so the last token of a document would be asked for
    the second of the next one. Its target comes with the mask of that document's first token, which the shifted
    prediction needs for nothing else. The unshifted loss is masked by the caller and does not see this.
    """
    before = torch.nn.functional.pad(segment_ids_BS[:, :-1], (1, 0), value=-1)
    return loss_mask_BS * (segment_ids_BS == before)
