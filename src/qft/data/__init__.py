"""Training, evaluation and calibration data: files, conversations, tokens, statistics, packing."""
