//! Chat templates, tokenization and loss spans.
