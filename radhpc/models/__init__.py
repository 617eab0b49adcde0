"""Model families, attention, LoRA, quantization, weights, token loss, image processors and tokenizer."""
