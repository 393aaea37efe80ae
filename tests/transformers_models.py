"""Models that nobody here wrote: tiny configurations, random weights, real task heads.

Nothing is downloaded. Sizes differ from each other (3 samples of 7 tokens, 4 heads,
width 24) so that no layout is right by chance; `tests/capture/test_transformers.py`
makes them equal too.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
import transformers as hf
from torch import nn
from torch.nn.functional import cross_entropy

VOCABULARY, CLASSES, BATCH, TIME = 47, 5, 3, 7
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 2}
IMAGE = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": CLASSES,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = TEXT | NO_DROPOUT | {"num_labels": CLASSES}
HEAR = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
    "num_labels": CLASSES,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

Batch = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, its batch, and the losses of single samples."""

    name: str
    what: str  # what it has that others have not
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Batch]  # of a batch size and a number of tokens
    losses: Callable[[nn.Module, Batch], torch.Tensor]

    def make(self, batch=BATCH, time=TIME, seed=0):
        """The model, all parameters off their initial values, and a batch."""
        torch.manual_seed(seed)
        # Where tensors are made by default: `torch.Tensor(3)`, as in wav2vec 2.0, is
        # the CPU's whatever that is.
        model = self.build().to(torch.empty(0).device)
        with torch.no_grad():
            for p in model.parameters():  # zeros, and layer scales of 1e-6
                fan_in = p.numel() // len(p) if p.dim() > 1 else 1
                p.add_(0.1 * min(1.0, (24 / fan_in) ** 0.5) * torch.randn_like(p))
        return model, self.inputs(batch, time)


def twin(model):
    """A copy whose float64 gradients can be taken: grouped products have none there."""
    model = copy.deepcopy(model)
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")
    return model


# Inputs


def tokens(batch, time):
    return (torch.randint(3, VOCABULARY, (batch, time)),)


def lengths(batch, time):
    return torch.linspace(time, time / 2, batch).round().long()[:, None]


def padded(batch, time):
    """Tokens, padded on the right, and the mask."""
    mask = (torch.arange(time) < lengths(batch, time)).long()
    (ids,) = tokens(batch, time)
    return ids * mask, mask


def left_padded(batch, time):
    """Tokens, padded on the left, and the mask."""
    ids, mask = padded(batch, time)
    return ids.flip(1), mask.flip(1)


def labelled(inputs):
    return lambda batch, time: (
        *inputs(batch, time),
        torch.randint(CLASSES, (batch,)),
    )


def pairs(batch, time):
    """Source tokens with their mask, and target tokens of another length."""
    return *padded(batch, time), *tokens(batch, time - 2)


def images(size):
    return labelled(lambda batch, time: (torch.randn(batch, 3, size, size),))


def sounds(batch, time):
    return (torch.randn(batch, 30 * time),)


# Losses, a number a sample


def token_mean(logits, labels, mask=None):
    """Mean over the tokens of each sample, of those that are its own."""
    each = cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    if mask is None:
        return each.mean(1)
    own = (mask[:, 1:] * mask[:, :-1]).to(each.dtype)
    return (each * own).sum(1) / own.sum(1)


def language(model, batch):
    """Next tokens, with attention and loss over the tokens that are no padding."""
    ids, *mask = batch
    options = {}
    if mask:
        options["attention_mask"] = mask[0]
    logits = model(ids, use_cache=False, **options).logits
    return token_mean(logits, ids, *mask)


def positioned(model, batch):
    """The same with positions counted from the first token that is no padding."""
    ids, mask = batch
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    return token_mean(logits, ids, mask)


def classes(model, batch):
    x, *mask, target = batch
    logits = model(x, attention_mask=mask[0]) if mask else model(x)
    return cross_entropy(logits.logits, target, reduction="none")


def logit_classes(model, batch):
    x, target = batch
    return cross_entropy(model(x), target, reduction="none")


def sentence_pairs(model, batch):
    """With token types, as BERT's."""
    ids, mask, target = batch
    types = (torch.arange(ids.shape[1], device=ids.device) > 3).long().expand(ids.shape)
    logits = model(ids, attention_mask=mask, token_type_ids=types).logits
    return cross_entropy(logits, target, reduction="none")


def translation(model, batch):
    ids, mask, target = batch
    logits = model(
        input_ids=ids, attention_mask=mask, decoder_input_ids=target, use_cache=False
    ).logits
    return token_mean(logits, target)


def transcription(model, batch):
    features, target = batch
    logits = model(
        input_features=features, decoder_input_ids=target, use_cache=False
    ).logits
    return token_mean(logits, target)


def matched(model, batch):
    """How little each text resembles its own image."""
    ids, pixels = batch
    found = model(input_ids=ids, pixel_values=pixels)
    alike = (found.text_embeds * found.image_embeds).sum(1)
    return -alike * model.logit_scale.exp()


def spoken(batch, time):
    return torch.randn(batch, 6, 16), *tokens(batch, time - 2)


def captioned(batch, time):
    (ids,) = tokens(batch, time)
    ids[:, -1] = VOCABULARY - 1
    return ids, torch.randn(batch, 3, 12, 12)


# Models


def gpt2():
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=24,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def t5(tied=True, dropout_rate=0.0):
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=24,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            dropout_rate=dropout_rate,
            feed_forward_proj="relu" if tied else "gated-gelu",
            tie_word_embeddings=tied,
        )
    )


def convnext(config=hf.ConvNextConfig, model=hf.ConvNextForImageClassification):
    return model(
        config(
            patch_size=2,
            hidden_sizes=[8, 12],
            depths=[2, 1],
            num_stages=2,
            num_labels=CLASSES,
        )
    )


def resnet():
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=CLASSES
        )
    ).eval()


def mixtral(implementation="grouped_mm"):
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, **EXPERTS))
    model.set_experts_implementation(implementation)
    return model


def mamba():
    return hf.MambaForCausalLM(
        hf.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            state_size=4,
            num_hidden_layers=2,
            time_step_rank=3,
        )
    )


def mamba2():
    return hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_heads=4,
            head_dim=8,
            state_size=4,
            n_groups=2,
            num_hidden_layers=2,
            chunk_size=4,
        )
    )


SPOKEN = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def whisper():
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **SPOKEN,
            num_mel_bins=6,
            max_source_positions=8,
            max_target_positions=12,
            decoder_start_token_id=1,
        )
    )


def bart():
    return hf.BartForConditionalGeneration(
        hf.BartConfig(**SPOKEN, max_position_embeddings=16, decoder_start_token_id=1)
    )


def clip():
    text = TEXT | {"max_position_embeddings": 16, "eos_token_id": VOCABULARY - 1}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
    )


def swin(config=hf.SwinConfig, model=hf.SwinForImageClassification):
    return model(
        config(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=CLASSES,
            drop_path_rate=0.0,
        )
    )


def hearing(config, model, **options):
    return model(config(**TEXT, **HEAR, **options)).eval()


def deberta():
    return hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(
            **ENCODER,
            relative_attention=True,
            max_position_embeddings=16,
            pos_att_type=["c2p", "p2c"],
            position_buckets=4,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pooler_hidden_size=24,
            pooler_dropout=0.0,
        )
    )


def modernbert():
    return hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(
            **TEXT, num_labels=CLASSES, global_attn_every_n_layers=2, local_attention=4
        )
    )


def distilbert():
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=24,
            n_layers=2,
            n_heads=4,
            hidden_dim=40,
            max_position_embeddings=16,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=CLASSES,
        )
    )


def of(model, config, *groups, **options):
    merged = {k: v for group in groups for k, v in group.items()}
    return lambda: model(config(**merged | options))


LISTED = [
    Model("GPT-2", "`Conv1D`, tied head", gpt2, tokens, language),
    Model(
        "Llama",
        "grouped queries, RMSNorm",
        of(hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
        left_padded,
        positioned,
    ),
    Model(
        "BERT",
        "token types, pooler",
        of(hf.BertForSequenceClassification, hf.BertConfig, ENCODER),
        labelled(padded),
        sentence_pairs,
    ),
    Model("T5", "relative positions, tied", t5, pairs, translation),
    Model(
        "ViT",
        "class token",
        of(hf.ViTForImageClassification, hf.ViTConfig, IMAGE, NO_DROPOUT),
        images(12),
        classes,
    ),
    Model("ConvNeXt", "depth-wise, layer scale", convnext, images(16), classes),
    Model("Mixtral", "experts, `grouped_mm`", mixtral, tokens, language),
    Model("Mamba", "selective scan", mamba, tokens, language),
    Model("Whisper", "convolutions, cross attention", whisper, spoken, transcription),
    Model("ResNet", "evaluation mode", resnet, images(16), classes),
]

MORE = [
    Model("T5 1.1", "gated, not tied", lambda: t5(False), pairs, translation),
    Model("Mixtral", "experts, eager", lambda: mixtral("eager"), tokens, language),
    Model(
        "Mixtral",
        "experts, `batched_mm`",
        lambda: mixtral("batched_mm"),
        tokens,
        language,
    ),
    Model(
        "GPT-OSS",
        "experts with biases, sinks",
        of(
            hf.GptOssForCausalLM,
            hf.GptOssConfig,
            GROUPED,
            EXPERTS,
            head_dim=8,
            sliding_window=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        tokens,
        language,
    ),
    Model(
        "DeepSeek-V3",
        "latent attention, shared experts",
        of(
            hf.DeepseekV3ForCausalLM,
            hf.DeepseekV3Config,
            TEXT,
            num_key_value_heads=4,
            q_lora_rank=12,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
        ),
        tokens,
        language,
    ),
    Model(
        "Qwen3",
        "normalised queries and keys",
        of(hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED, head_dim=8),
        left_padded,
        positioned,
    ),
    Model(
        "Gemma 2",
        "1 + w, soft caps, windows",
        of(
            hf.Gemma2ForCausalLM,
            hf.Gemma2Config,
            GROUPED,
            head_dim=8,
            sliding_window=4,
        ),
        tokens,
        language,
    ),
    Model(
        "Falcon",
        "one key for all queries, ALiBi",
        of(
            hf.FalconForCausalLM,
            hf.FalconConfig,
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            parallel_attn=False,
            bias=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        padded,
        language,
    ),
    Model(
        "OPT",
        "positions from the mask",
        of(
            hf.OPTForCausalLM,
            hf.OPTConfig,
            vocab_size=VOCABULARY,
            hidden_size=24,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            word_embed_proj_dim=16,
            dropout=0.0,
        ),
        left_padded,
        language,
    ),
    Model("Mamba 2", "grouped heads", mamba2, tokens, language),
    Model("DeBERTa-v2", "disentangled attention", deberta, labelled(padded), classes),
    Model("ModernBERT", "windows, no padding", modernbert, labelled(padded), classes),
    Model("DistilBERT", "no token types", distilbert, labelled(padded), classes),
    Model("BART", "learned positions", bart, pairs, translation),
    Model("CLIP", "two towers", clip, captioned, matched),
    Model("Swin", "shifted windows", swin, images(16), classes),
    Model(
        "Swin v2",
        "positions by a network",
        lambda: swin(hf.Swinv2Config, hf.Swinv2ForImageClassification),
        images(16),
        classes,
    ),
    Model(
        "BEiT",
        "a table of positions a layer",
        of(
            hf.BeitForImageClassification,
            hf.BeitConfig,
            IMAGE,
            NO_DROPOUT,
            use_relative_position_bias=True,
            drop_path_rate=0.0,
        ),
        images(12),
        classes,
    ),
    Model(
        "ConvNeXt v2",
        "global response",
        lambda: convnext(hf.ConvNextV2Config, hf.ConvNextV2ForImageClassification),
        images(16),
        classes,
    ),
    Model(
        "wav2vec 2.0",
        "group norm, weight norm",
        lambda: hearing(hf.Wav2Vec2Config, hf.Wav2Vec2ForSequenceClassification),
        labelled(sounds),
        classes,
    ),
    Model(
        "WavLM",
        "gated relative positions",
        lambda: hearing(
            hf.WavLMConfig,
            hf.WavLMForSequenceClassification,
            num_buckets=8,
            max_bucket_distance=16,
        ),
        labelled(sounds),
        classes,
    ),
]
