"""What each number of the report means: its denominator and what it leaves out."""

DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "Frameworks",
        "The attention function of every layer. vanilla: softmax. softmax1: exp(s) / (1 + sum exp s), "
        "whose rows can sum to almost 0. max_shift: SpARQ eq. 3.2 read literally, exp(s - m) / (1 + sum "
        "exp(s - m)) with m the row's maximum, whose rows sum to at least 1/2. Everything else is equal.",
    ),
    (
        "Precisions",
        "WnAm: n-bit weights and m-bit activations of the linear layers of the decoder blocks. RTN rounds "
        "to the nearest step; SmoothQuant first moves scale from activations to weights. Embeddings and "
        "the output head stay as they are.",
    ),
    (
        "TextLM PPL, SpeechLM PPL",
        "exp of the mean negative log-likelihood per predicted token of the joint vocabulary: text tokens "
        "of <generatetext> text, unit tokens of <generatespeech> units. The end token counts, the "
        "task token does not. Perplexities compare only between models with one vocabulary.",
    ),
    (
        "ASR WER",
        "100 x (substitutions + deletions + insertions) / words of the references, after text "
        "normalization. Errors are summed over utterances before the division. It can pass 100 %.",
    ),
    (
        "TTS CER, TTS WER",
        "100 x edits / length of the references, in characters or words, between the text and what Whisper "
        "writes down of the model's speech, both through Whisper's English normalizer. Units become sound by the "
        "recipe's vocoder in its default voice, at most 30 s. Whisper may also have made the units, and then "
        "flatters; the recordings themselves and the recordings' own units, spoken in the same way, are scored beside.",
    ),
    (
        "TTS UER",
        "Unit error rate: 100 x edits / units between the units that the model generates for a text and "
        "the units of the recording, both without repetitions. It punishes another voice, speed or "
        "wording alike, so it is high even for good speech: the prompt does not say whose voice is wanted.",
    ),
    (
        "Intervals",
        "In brackets: 95 % percentile bootstrap over utterances, 1,000 seeded resamples. They cover the choice of "
        "utterances, not the training of the model.",
    ),
    (
        "Drop",
        "Average performance drop: the mean over one metric a task of the relative increase over the same "
        "framework's own full-precision row, in percent; TTS counts by its CER, or by its UER where no vocoder spoke. "
        "A metric that is missing, whose full-precision value is 0 or that was counted over other data is left out; "
        "the Metrics column and the lines under the table say so. An infinite or undefined metric stays in the mean.",
    ),
    (
        "Prose PPL",
        "Perplexity per token of the backbone's own tokenizer on plain English, before adaptation, in "
        "separate windows whose first token is not counted. It shows what quantization does to the "
        "pretrained model itself.",
    ),
    (
        "Max inf norm",
        "The largest absolute value in the output of any decoder layer, over all tokens but padding. The "
        "output of the final norm is a column of its own, because its learned gain would hide the others.",
    ),
    (
        "Mean kurtosis",
        "E[(x - mean)^4] / E[(x - mean)^2]^2 over all elements of a layer's output for one sequence, "
        "averaged over sequences, then over layers. A normal distribution has 3.",
    ),
    (
        "Row mass, first token",
        "The mean sum of a row of attention probabilities over all layers, heads and queries (1 for "
        "softmax), and the mean probability of the first token over queries that see more than one key.",
    ),
    (
        "Sinks, entropy, max logit",
        "A sink is a token that takes more than 0.3 of what a head spends on a sequence; the column is the sink rate, "
        "the share of all probability that goes to sinks, divided by the row mass. Entropy is that of a row divided by "
        "its mass, in nats. The max logit is the largest scaled product of a query and a key that it may see.",
    ),
    (
        "|v|",
        "The mean Euclidean norm of the value vectors that heads read: of first tokens, of sinks (the first token "
        "may be one), and of all other tokens. A head that does nothing looks at a token whose value is small.",
    ),
    (
        "Outliers by task",
        "The same figures over the sequences of one task each: TextLM has text, SpeechLM units, ASR units and the "
        "text that was said.",
    ),
    (
        "Peak memory",
        "The largest resident size during the step, of the process or of a child that ended in it, whichever is "
        "larger. Outside of Linux it is the largest of the process so far.",
    ),
    (
        "inf, nan, -",
        "An infinite value, an undefined value, and a value that was not measured.",
    ),
)
