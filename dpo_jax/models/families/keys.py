"""Keys of ``config.json`` that all families read, and keys that do not affect the computation."""

SHARED_KEYS = frozenset({
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
})  # fmt: skip

# Dropout is harmless, since training uses none. The other keys concern storage, generation, tokens and tools.
HARMLESS_KEYS = frozenset({
    "attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "embedding_dropout", "hidden_dropout",
    "resid_pdrop", "residual_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "use_cache", "pretraining_tp", "torch_dtype", "dtype", "transformers_version", "id2label",
    "label2id", "num_labels", "return_dict", "chunk_size_feed_forward", "cache_implementation", "problem_type",
    "tokenizer_class", "task_specific_params", "name_or_path", "model_max_length", "bos_token", "eos_token",
    "pad_token", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "diversity_penalty", "num_beams", "num_beam_groups", "num_return_sequences",
    "encoder_no_repeat_ngram_size", "no_repeat_ngram_size", "unsloth_version", "unsloth_fixed",
    "transformers.js_config", "is_llama_config",
})  # fmt: skip
# Values of an option that is off.
EMPTY_VALUES = (None, False, 0, 0.0, "", [], {})
# Keys that transformers reads for every model, with the values that do not affect the computation.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "is_causal": (True, None),
    "partial_rotary_factor": (1, 1.0, None),
    "original_max_position_embeddings": (None,),
    "layer_types": (None,),
    "quantization_config": (None, {}),
}
