"""Turn a pretrained text LLM into an outlier-free SpeechLM that survives low-bit quantization."""
